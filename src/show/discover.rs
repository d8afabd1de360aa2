//! `discover`: the log of a discovery controller, with a URI for each subsystem to attach.

use nvmf::host::discovery::{Discovered, DiscoveredKind, DiscoveryLog, Skipped};
use nvmf::host::{HostOptions, NamespaceSelector, discovery};
use nvmf::spec::discovery::{DISCOVERY_PORT, IO_PORT, adrfam};
use nvmf::spec::trtype;
use nvmf::transport::Registry;
use serde_json::{Value, json};

use super::table::table;
use super::{ShowError, Shown};
use crate::config::{DiscoveryUri, Uri};

/// Asks the discovery controller of a host.
///
/// # Errors
/// [`ShowError`] as one line, within the connect time-out.
pub(super) async fn discover(
    registry: &Registry,
    uri: &DiscoveryUri,
    options: &HostOptions,
) -> Result<Shown, ShowError> {
    let DiscoveryUri { host, port } = uri;
    let log = match port {
        Some(port) => discovery::discover(registry, host, &[*port], options).await?,
        None => discovery::discover(registry, host, &[DISCOVERY_PORT, IO_PORT], options)
            .await
            .map_err(|error| ShowError::NoDiscovery {
                host: host.clone(),
                error,
            })?,
    };
    Ok(Shown {
        text: text(&log),
        json: json(&log),
    })
}

fn text(log: &DiscoveryLog) -> String {
    let heading = ["TYPE", "TRANSPORT", "ADDRESS", "SUBSYSTEM", "ATTACH"].map(str::to_owned);
    let mut rows = vec![heading];
    for record in &log.records {
        let address = match record.traddr.contains(':') {
            true => format!("[{}]:{}", record.traddr, record.trsvcid),
            false => format!("{}:{}", record.traddr, record.trsvcid),
        };
        let attach = match (uri(record), &record.target) {
            (Some(uri), _) => uri,
            // That a discovery subsystem is not attached needs no saying.
            (None, Err(reason)) if record.kind == DiscoveredKind::Nvm => format!("- ({reason})"),
            (None, _) => "-".to_owned(),
        };
        rows.push([
            kind(record.kind).to_owned(),
            transport(record.trtype),
            address,
            record.subnqn.to_string(),
            attach,
        ]);
    }
    let mut text = format!("Discovery controller {}\n", log.address);
    text.push_str(&table(&rows));
    for Skipped { index, reason } in &log.skipped {
        text.push_str(&format!("record {index} left out: {reason}\n"));
    }
    text
}

fn json(log: &DiscoveryLog) -> Value {
    let records: Vec<Value> = log.records.iter().map(record).collect();
    let skipped = log.skipped.iter();
    let skipped: Vec<Value> = skipped
        .map(|Skipped { index, reason }| json!({ "index": index, "reason": reason }))
        .collect();
    json!({
        "controller": log.address.to_string(),
        "generation": log.generation,
        "records": records,
        "skipped": skipped,
    })
}

fn record(record: &Discovered) -> Value {
    json!({
        "subtype": kind(record.kind),
        "transport": transport(record.trtype),
        "address_family": match record.adrfam {
            adrfam::IPV4 => "ipv4".to_owned(),
            adrfam::IPV6 => "ipv6".to_owned(),
            other => other.to_string(),
        },
        "traddr": record.traddr,
        "trsvcid": record.trsvcid,
        "subnqn": record.subnqn.as_str(),
        "portid": record.portid,
        "cntlid": record.cntlid,
        "asqsz": record.asqsz,
        "treq": record.treq,
        "eflags": record.eflags,
        "uri": uri(record),
        "obstacle": record.target.as_ref().err(),
    })
}

fn uri(record: &Discovered) -> Option<String> {
    let target = record.target.clone().ok()?;
    let selector = NamespaceSelector::Only;
    Some(Uri { target, selector }.to_string())
}

fn kind(kind: DiscoveredKind) -> &'static str {
    match kind {
        DiscoveredKind::Referral => "referral",
        DiscoveredKind::Nvm => "nvm",
        DiscoveredKind::Current => "current",
    }
}

fn transport(trtype: u8) -> String {
    match trtype {
        1 => "rdma".to_owned(),
        2 => "fc".to_owned(),
        trtype::TCP => "tcp".to_owned(),
        trtype::INTRA_HOST => "loop".to_owned(),
        other => other.to_string(),
    }
}
