//! `identify` and `list-ns`: what a controller says of itself, and of its namespaces.

use nvmf::host::{
    Association, ControllerInfo, HostOptions, ListedNamespace, NamespaceInfo, NamespaceSelector,
};
use nvmf::transport::Registry;
use serde_json::{Value, json};

use super::table::table;
use super::{END, ShowError, Shown};
use crate::config::Uri;

/// Shows a controller, and the namespace that the URI selects, if it selects one.
///
/// # Errors
/// [`ShowError`] as one line.
pub(super) async fn identify(
    registry: &Registry,
    uri: &Uri,
    options: &HostOptions,
) -> Result<Shown, ShowError> {
    let association = Association::connect(registry, &uri.target, options).await?;
    let namespace = match &uri.selector {
        NamespaceSelector::Only => Ok(None),
        selector => association.select(selector).await.map(Some),
    };
    let info = association.controller().clone();
    association.shutdown(END).await;
    let namespace = namespace?;
    let mut rows = controller_rows(&info);
    let mut json = controller_json(&info);
    if let Some(namespace) = &namespace {
        rows.extend(namespace_rows(namespace));
        json["namespace"] = namespace_json(&listed(namespace), uri);
    }
    let text = table(&rows);
    Ok(Shown { text, json })
}

/// Shows all namespaces of a controller, or the one that the URI selects.
///
/// # Errors
/// [`ShowError`] as one line.
pub(super) async fn list_namespaces(
    registry: &Registry,
    uri: &Uri,
    options: &HostOptions,
) -> Result<Shown, ShowError> {
    let association = Association::connect(registry, &uri.target, options).await?;
    let namespaces = match &uri.selector {
        NamespaceSelector::Only => association.list_namespaces().await,
        selector => association
            .select(selector)
            .await
            .map(|namespace| vec![listed(&namespace)]),
    };
    let info = association.controller().clone();
    association.shutdown(END).await;
    let namespaces = namespaces?;
    let heading = ["NSID", "BYTES", "BLOCK", "ACCESS", "UUID", "ATTACH"].map(str::to_owned);
    let mut rows = vec![heading];
    rows.extend(namespaces.iter().map(|namespace| row(namespace, uri)));
    let json: Vec<Value> = namespaces
        .iter()
        .map(|namespace| namespace_json(namespace, uri))
        .collect();
    Ok(Shown {
        text: table(&rows),
        json: json!({
            "controller": info.address.to_string(),
            "subnqn": info.subnqn.as_str(),
            "namespaces": json,
        }),
    })
}

fn controller_rows(info: &ControllerInfo) -> Vec<[String; 2]> {
    let limit =
        |bytes: Option<u64>| bytes.map_or("no limit".to_owned(), |it| format!("{it} bytes"));
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let deallocate = match info.supports_deallocate() {
        true => format!("yes, up to {} ranges", info.deallocate.max_ranges),
        false => "no".to_owned(),
    };
    [
        ("Controller", info.address.to_string()),
        ("Subsystem", info.subnqn.to_string()),
        ("Controller ID", info.cntlid.to_string()),
        ("NVMe version", version(info.version)),
        ("Model", info.model.clone()),
        ("Serial number", info.serial.clone()),
        ("Firmware", info.firmware.clone()),
        ("Largest transfer", limit(info.max_transfer)),
        (
            "In-capsule data",
            format!("{} bytes", info.in_capsule_limit),
        ),
        ("Queue entries", info.max_queue_entries.to_string()),
        ("Volatile write cache", yes(info.volatile_write_cache)),
        ("Write Zeroes", yes(info.supports_write_zeroes())),
        ("Largest Write Zeroes", limit(info.max_write_zeroes)),
        ("Deallocate", deallocate),
    ]
    .map(|(name, value)| [name.to_owned(), value])
    .into()
}

fn controller_json(info: &ControllerInfo) -> Value {
    json!({
        "controller": info.address.to_string(),
        "subnqn": info.subnqn.as_str(),
        "cntlid": info.cntlid,
        "version": version(info.version),
        "model": info.model,
        "serial": info.serial,
        "firmware": info.firmware,
        "max_transfer": info.max_transfer,
        "in_capsule_limit": info.in_capsule_limit,
        "max_queue_entries": info.max_queue_entries,
        "volatile_write_cache": info.volatile_write_cache,
        "write_zeroes": info.supports_write_zeroes(),
        "max_write_zeroes": info.max_write_zeroes,
        "deallocate": info.supports_deallocate(),
        "deallocate_max_ranges": info.deallocate.max_ranges,
        "deallocate_max_range_blocks": info.deallocate.max_range_blocks,
        "deallocate_max_blocks": info.deallocate.max_blocks,
    })
}

fn version(version: u32) -> String {
    match version {
        0 => "not told".to_owned(),
        told => format!("{}.{}.{}", told >> 16, told >> 8 & 0xff, told & 0xff),
    }
}

fn namespace_rows(info: &NamespaceInfo) -> Vec<[String; 2]> {
    [
        ("Namespace ID", info.nsid.to_string()),
        ("Size", format!("{} bytes", info.capacity())),
        ("Block size", format!("{} bytes", info.block_size)),
        ("Access", access(info).to_owned()),
        ("Identifier", identifier(&listed(info))),
    ]
    .map(|(name, value)| [name.to_owned(), value])
    .into()
}

fn row(namespace: &ListedNamespace, uri: &Uri) -> [String; 6] {
    let nsid = namespace.nsid.to_string();
    match &namespace.info {
        Ok(info) => [
            nsid,
            info.capacity().to_string(),
            info.block_size.to_string(),
            access(info).to_owned(),
            identifier(namespace),
            of(uri, namespace.nsid),
        ],
        Err(reason) => {
            let none = || "-".to_owned();
            let identifier = identifier(namespace);
            [
                nsid,
                none(),
                none(),
                none(),
                identifier,
                format!("- ({reason})"),
            ]
        }
    }
}

fn namespace_json(namespace: &ListedNamespace, uri: &Uri) -> Value {
    let ListedNamespace {
        nsid,
        uuid,
        nguid,
        eui64,
        info,
    } = namespace;
    let mut json = json!({
        "nsid": nsid,
        "uuid": uuid.map(|uuid| uuid.to_string()),
        "nguid": nguid.map(|id| hex(&id)),
        "eui64": eui64.map(|id| hex(&id)),
        "uri": info.is_ok().then(|| of(uri, *nsid)),
        "obstacle": info.as_ref().err(),
    });
    if let Ok(info) = info {
        json["size"] = info.capacity().into();
        json["block_size"] = info.block_size.into();
        json["block_count"] = info.block_count.into();
        json["write_protected"] = info.write_protected.into();
        json["deallocated_reads_zero"] = info.deallocated_reads_zero.into();
        json["optimal"] = json!({
            "boundary": info.optimal.boundary,
            "write_granularity": info.optimal.write_granularity,
            "write_alignment": info.optimal.write_alignment,
            "write_size": info.optimal.write_size,
            "deallocate_granularity": info.optimal.deallocate_granularity,
            "deallocate_alignment": info.optimal.deallocate_alignment,
        });
    }
    json
}

fn listed(info: &NamespaceInfo) -> ListedNamespace {
    ListedNamespace {
        nsid: info.nsid,
        uuid: info.uuid,
        nguid: info.nguid,
        eui64: info.eui64,
        info: Ok(info.clone()),
    }
}

fn access(info: &NamespaceInfo) -> &'static str {
    match info.write_protected {
        true => "read-only",
        false => "read-write",
    }
}

/// The UUID, or else another identifier under its name.
fn identifier(namespace: &ListedNamespace) -> String {
    let ListedNamespace {
        uuid, nguid, eui64, ..
    } = namespace;
    let uuid = uuid.map(|uuid| uuid.to_string());
    uuid.or_else(|| nguid.map(|id| format!("nguid {}", hex(&id))))
        .or_else(|| eui64.map(|id| format!("eui64 {}", hex(&id))))
        .unwrap_or_else(|| "-".to_owned())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The URI of a namespace of the subsystem that a URI names.
fn of(uri: &Uri, nsid: u32) -> String {
    let target = uri.target.clone();
    let selector = NamespaceSelector::Nsid(nsid);
    Uri { target, selector }.to_string()
}
