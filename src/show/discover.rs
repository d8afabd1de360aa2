//! `discover`: the log of a discovery controller, with a URI for each subsystem to attach.

use nvmf::host::discovery::{
    Discovered, DiscoveredKind, Discovery, DiscoveryLog, Skipped, Unfollowed,
};
use nvmf::host::{HostError, HostOptions, NamespaceSelector, TargetAddress, discovery};
use nvmf::spec::discovery::adrfam;
use nvmf::spec::trtype;
use nvmf::transport::Registry;
use serde_json::{Value, json};

use super::table::table;
use super::{ShowError, Shown};
use crate::cli::DiscoverArgs;
use crate::config::fabrics_conf::{Connection, FabricsConf};
use crate::config::{HostIdentity, Machine, Uri};

/// Asks the discovery controllers that the options name, and those that they refer to unless they are not wanted.
///
/// # Errors
/// [`ShowError`] as one line, within the connect time-out of each; of several controllers, when none answers.
pub(super) async fn discover(
    registry: &Registry,
    args: &DiscoverArgs,
    machine: &Machine,
) -> Result<Shown, ShowError> {
    let show = &args.show;
    let host = |connection: Option<&Connection>| {
        let (mut hostnqn, mut hostid) = (show.hostnqn.clone(), show.hostid);
        if let (None, None, Some(connection)) = (&hostnqn, hostid, connection) {
            hostnqn = connection.hostnqn.clone();
            hostid = connection.hostid;
        }
        let HostIdentity { nqn, id } = HostIdentity::resolve(hostnqn, hostid, machine);
        HostOptions {
            local: show.local.end(),
            ..HostOptions::new(nqn, id)
        }
    };
    if let Some(uri) = &args.uri {
        let found = ask(registry, &uri.targets(), &host(None), args).await;
        let found = found.map_err(|error| match uri.port {
            Some(_) => error.into(),
            None => ShowError::NoDiscovery {
                host: uri.host.clone(),
                error,
            },
        })?;
        return Ok(Shown {
            text: text(&found),
            json: json(&found),
        });
    }
    let Some(path) = &args.config_fabrics else {
        return Err(ShowError::Nothing);
    };
    let mut shown = Shown {
        text: String::new(),
        json: Value::Array(Vec::new()),
    };
    let (mut answered, mut failed) = (false, None);
    for connection in FabricsConf::read(path)?.discovery_controllers()? {
        let answer = ask(
            registry,
            &connection.targets(),
            &host(Some(&connection)),
            args,
        )
        .await;
        let (text, json) = match &answer {
            Ok(found) => (text(found), json(found)),
            Err(error) => (format!("{error}\n"), json!({ "error": error.to_string() })),
        };
        shown.text.push_str(&text);
        if let Value::Array(all) = &mut shown.json {
            all.push(json);
        }
        answered |= answer.is_ok();
        failed = answer.err().or(failed);
    }
    match failed {
        Some(error) if !answered => Err(error.into()),
        _ => Ok(shown),
    }
}

async fn ask(
    registry: &Registry,
    targets: &[TargetAddress],
    options: &HostOptions,
    args: &DiscoverArgs,
) -> Result<Discovery, HostError> {
    if !args.no_referrals {
        return discovery::explore(registry, targets, options).await;
    }
    Ok(Discovery {
        logs: vec![discovery::discover(registry, targets, options).await?],
        ..Discovery::default()
    })
}

fn text(found: &Discovery) -> String {
    let mut text = String::new();
    for log in &found.logs {
        text.push_str(&log_text(log));
    }
    for Unfollowed {
        referrer,
        to,
        reason,
    } in &found.unfollowed
    {
        text.push_str(&format!(
            "referral of {referrer} to {to} not followed: {reason}\n"
        ));
    }
    text
}

fn log_text(log: &DiscoveryLog) -> String {
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
    let mut text = match log.referrer {
        Some(referrer) => format!(
            "Discovery controller {}, to which {referrer} refers\n",
            log.address
        ),
        None => format!("Discovery controller {}\n", log.address),
    };
    text.push_str(&table(&rows));
    for Skipped { index, reason } in &log.skipped {
        text.push_str(&format!("record {index} left out: {reason}\n"));
    }
    text
}

/// The log of the controller that was asked, and beside it those of the controllers that it refers to.
fn json(found: &Discovery) -> Value {
    let mut logs = found.logs.iter().map(log_json);
    let mut json = logs.next().unwrap_or_default();
    json["referrals"] = logs.collect();
    let unfollowed = found
        .unfollowed
        .iter()
        .map(|it| json!({ "referrer": it.referrer.to_string(), "to": it.to, "reason": it.reason }));
    json["unfollowed"] = unfollowed.collect();
    json
}

fn log_json(log: &DiscoveryLog) -> Value {
    let records: Vec<Value> = log.records.iter().map(record).collect();
    let skipped = log.skipped.iter();
    let skipped: Vec<Value> = skipped
        .map(|Skipped { index, reason }| json!({ "index": index, "reason": reason }))
        .collect();
    json!({
        "controller": log.address.to_string(),
        "referrer": log.referrer.map(|it| it.to_string()),
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
    if record.kind != DiscoveredKind::Nvm {
        return None;
    }
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
