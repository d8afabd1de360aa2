//! Asks a discovery controller who can be reached where.
//!
//! What it answers is checked record by record: one that makes no sense is left out, with the
//! reason, and the others count.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use zerocopy::FromBytes;

use super::address::{TargetAddress, share};
use super::admin::{Admin, LossReport};
use super::association::connect_admin;
use super::connect::Parties;
use super::dial::{Dial, Tcp, rounded};
use super::enable::{enable, read_discovery_capabilities, shut_down};
use super::error::HostError;
use super::options::HostOptions;
use crate::spec::discovery::{
    DiscoveryHeader, DiscoveryRecord, RECORD_LEN, adrfam, sectype, subtype, treq,
};
use crate::spec::fabrics::CNTLID_DYNAMIC;
use crate::spec::identify::{IDENTIFY_LEN, IdentifyController, cns};
use crate::spec::log::{GetLogPage, lid};
use crate::spec::{Nqn, Sqe, Status, trtype};
use crate::transport::Registry;

/// Records of a log that are read, at most.
const RECORDS_MAX: u64 = 1024;
/// Records read at once: every controller can transfer a page.
const CHUNK: u64 = 4;
/// How often a log is read again because it changed meanwhile.
const READS_MAX: usize = 8;
/// Longest wait for the controller's shutdown.
const SHUTDOWN: Duration = Duration::from_millis(300);

/// What a discovery controller says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiscoveryLog {
    /// The controller's address, the one of several that answered.
    pub address: SocketAddr,
    /// Changes of the log so far (GENCTR).
    pub generation: u64,
    /// Its records, in its order.
    pub records: Vec<Discovered>,
    /// Records that make no sense.
    pub skipped: Vec<Skipped>,
}

/// One way to a subsystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Discovered {
    /// What is there.
    pub kind: DiscoveredKind,
    /// Transport type: see [`trtype`].
    pub trtype: u8,
    /// Address family: see [`adrfam`].
    pub adrfam: u8,
    /// Transport address; printable ASCII.
    pub traddr: String,
    /// Transport service, the port of TCP; printable ASCII.
    pub trsvcid: String,
    /// The subsystem.
    pub subnqn: Nqn,
    /// Port of the subsystem.
    pub portid: u16,
    /// Controller to ask for.
    pub cntlid: u16,
    /// Largest admin queue in entries, as it is told.
    pub asqsz: u16,
    /// Transport requirements: see [`treq`].
    pub treq: u8,
    /// Flags: see [`crate::spec::discovery::eflags`].
    pub eflags: u16,
    /// The subsystem as it can be connected to, or what is in the way.
    pub target: Result<TargetAddress, String>,
}

/// What a record leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiscoveredKind {
    /// Another discovery subsystem.
    Referral,
    /// A subsystem with namespaces.
    Nvm,
    /// The discovery subsystem that was asked.
    Current,
}

/// A record that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Its place in the log, from 0.
    pub index: usize,
    /// Why.
    pub reason: String,
}

/// Asks the discovery controller of `host`, at the first of `ports` where one answers. All of it
/// takes no longer than [`HostOptions::connect_timeout`]. Cancel-safe: dropping the future closes
/// what it opened.
///
/// # Errors
/// [`HostError`] is the reason as one line: of the address and port where most went well, the later
/// one of equals.
pub async fn discover(
    registry: &Registry,
    host: &str,
    ports: &[u16],
    options: &HostOptions,
) -> Result<DiscoveryLog, HostError> {
    options.check()?;
    let end = Instant::now() + options.connect_timeout;
    let mut addresses = Vec::new();
    for &port in ports {
        let target = TargetAddress {
            host: host.to_owned(),
            port,
            subnqn: Nqn::discovery(),
        };
        addresses.extend(target.resolve(end).await?);
    }
    discover_over(&Tcp::new(registry, options), &addresses, host, options, end).await
}

pub(super) async fn discover_over(
    dial: &impl Dial,
    addresses: &[SocketAddr],
    host: &str,
    options: &HostOptions,
    end: Instant,
) -> Result<DiscoveryLog, HostError> {
    let mut best: Option<HostError> = None;
    for (tried, &at) in addresses.iter().enumerate() {
        let deadline = share(Instant::now(), end, addresses.len() - tried);
        match ask(dial, at, options, deadline).await {
            Ok(log) => return Ok(log),
            Err(error) => {
                tracing::debug!("{error}");
                if best.as_ref().is_none_or(|it| it.depth() <= error.depth()) {
                    best = Some(error);
                }
            }
        }
    }
    Err(best.unwrap_or_else(|| HostError::Resolve {
        host: host.to_owned(),
        reason: "it has no address".to_owned(),
    }))
}

/// One controller, from connecting to shutting down.
async fn ask(
    dial: &impl Dial,
    at: SocketAddr,
    options: &HostOptions,
    deadline: Instant,
) -> Result<DiscoveryLog, HostError> {
    let begun = Instant::now();
    let work = async {
        let subnqn = Nqn::discovery();
        let parties = Parties {
            at,
            subnqn: &subnqn,
            hostnqn: &options.hostnqn,
            hostid: options.hostid,
        };
        // It is over before any keep-alive could be due.
        let connected = connect_admin(dial, parties, 0, deadline).await;
        let (driven, _) = connected.map_err(without_subsystem)?;
        let losses = LossReport::new();
        let (admin, _) = Admin::spawn(driven, at, options.connect_timeout, losses);
        let mut admin = admin.bounded(begun, deadline);
        let cap = read_discovery_capabilities(&admin).await?;
        let cc = enable(&mut admin, cap).await?;
        check_type(&admin).await?;
        Ok((read_log(&admin).await?, admin, cc))
    };
    // One that takes long to become ready gets no more time here.
    let (log, admin, cc) = timeout_at(deadline, work).await.unwrap_or_else(|_| {
        let after = rounded(deadline.saturating_duration_since(begun));
        Err(unusable(at, format!("it was not ready within {after:?}")))
    })?;
    let left = deadline.saturating_duration_since(Instant::now());
    shut_down(&admin, cc, left.min(SHUTDOWN)).await;
    admin.stop();
    Ok(log)
}

/// No subsystem of that name: another port of the target may have it.
fn without_subsystem(error: HostError) -> HostError {
    match error {
        HostError::UnknownSubsystem { at, .. } => unusable(
            at,
            "it has no discovery subsystem; give the port of one that does".to_owned(),
        ),
        other => other,
    }
}

fn unusable(at: SocketAddr, reason: String) -> HostError {
    HostError::Unusable { at, reason }
}

/// Refuses what says that it is no discovery controller. Older ones do not say what they are.
async fn check_type(admin: &Admin) -> Result<(), HostError> {
    const NOT_REPORTED: u8 = 0;
    const DISCOVERY: u8 = 2;
    let sqe = Sqe::identify(cns::CONTROLLER, 0, 0);
    let bytes = admin.read("Identify Controller", sqe, IDENTIFY_LEN).await?;
    match IdentifyController::ref_from_prefix(&bytes) {
        Ok((data, _)) if matches!(data.cntrltype, NOT_REPORTED | DISCOVERY) => Ok(()),
        Ok((data, _)) => Err(unusable(
            admin.at(),
            format!(
                "it is not a discovery controller (CNTRLTYPE {})",
                data.cntrltype
            ),
        )),
        Err(_) => Err(unusable(
            admin.at(),
            "Identify Controller is too short".to_owned(),
        )),
    }
}

/// Reads the log, again from the start when it changes meanwhile.
async fn read_log(admin: &Admin) -> Result<DiscoveryLog, HostError> {
    const RESTART: u16 = Status::LOG_RESTART_DISCOVERY.code();
    for _ in 0..READS_MAX {
        match read_once(admin).await {
            Ok(Some(log)) => return Ok(log),
            Ok(None) => {}
            Err(HostError::Command { status, .. }) if status.code() == RESTART => {}
            Err(error) => return Err(error),
        }
    }
    Err(unusable(
        admin.at(),
        format!("its discovery log changed under each of {READS_MAX} attempts to read it"),
    ))
}

/// Reads the log; `None` when it changed meanwhile.
async fn read_once(admin: &Admin) -> Result<Option<DiscoveryLog>, HostError> {
    let at = admin.at();
    let header = read_header(admin).await?;
    if header.recfmt.get() != 0 {
        return Err(unusable(
            at,
            format!(
                "its discovery log has records of format {}, which is not known",
                header.recfmt
            ),
        ));
    }
    let count = header.numrec.get();
    if count > RECORDS_MAX {
        return Err(unusable(
            at,
            format!(
                "its discovery log has {count} records; {RECORDS_MAX} is the most that is read"
            ),
        ));
    }
    let mut log = DiscoveryLog {
        address: at,
        generation: header.genctr.get(),
        records: Vec::new(),
        skipped: Vec::new(),
    };
    let mut index = 0;
    while index < count {
        let records = CHUNK.min(count - index);
        let bytes = read_part(admin, 1 + index, records).await?;
        for (nth, record) in bytes.chunks_exact(RECORD_LEN).enumerate() {
            let place = index as usize + nth;
            let digested = DiscoveryRecord::ref_from_bytes(record)
                .map_err(|_| "it is cut off".to_owned())
                .and_then(digest);
            match digested {
                Ok(record) => log.records.push(record),
                Err(reason) => log.skipped.push(Skipped {
                    index: place,
                    reason,
                }),
            }
        }
        index += records;
    }
    let after = read_header(admin).await?;
    Ok((after.genctr == header.genctr).then_some(log))
}

async fn read_header(admin: &Admin) -> Result<DiscoveryHeader, HostError> {
    let bytes = read_part(admin, 0, 1).await?;
    DiscoveryHeader::read_from_bytes(&bytes)
        .map_err(|_| unusable(admin.at(), "its discovery log is too short".to_owned()))
}

/// Reads `count` pieces of the log, of which the first is the header and the others are records.
async fn read_part(admin: &Admin, first: u64, count: u64) -> Result<Vec<u8>, HostError> {
    let part = GetLogPage {
        lid: lid::DISCOVERY,
        offset: first * RECORD_LEN as u64,
        len: count * RECORD_LEN as u64,
    };
    let command = "Get Log Page (Discovery)";
    admin.read(command, part.to_sqe(), part.len as usize).await
}

fn digest(record: &DiscoveryRecord) -> Result<Discovered, String> {
    let kind = match record.subtype {
        subtype::REFERRAL => DiscoveredKind::Referral,
        subtype::NVM => DiscoveredKind::Nvm,
        subtype::CURRENT => DiscoveredKind::Current,
        other => return Err(format!("its subsystem type {other} is not known")),
    };
    let subnqn =
        Nqn::from_field(&record.subnqn).map_err(|error| format!("its subsystem NQN: {error}"))?;
    let traddr = text(&record.traddr).ok_or("its address is not printable text")?;
    let trsvcid = text(&record.trsvcid).ok_or("its port is not printable text")?;
    let target = target(record, kind, &traddr, &trsvcid, &subnqn);
    Ok(Discovered {
        kind,
        trtype: record.trtype,
        adrfam: record.adrfam,
        traddr,
        trsvcid,
        subnqn,
        portid: record.portid.get(),
        cntlid: record.cntlid.get(),
        asqsz: record.asqsz.get(),
        treq: record.treq,
        eflags: record.eflags.get(),
        target,
    })
}

/// A string field without its padding, of blanks or zeroes; `None` when it has anything but
/// printable ASCII.
fn text(field: &[u8]) -> Option<String> {
    let end = field.iter().position(|&b| b == 0).unwrap_or(field.len());
    let text = str::from_utf8(&field[..end]).ok()?.trim_matches(' ');
    let printable = text.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
    printable.then(|| text.to_owned())
}

/// What can be connected to, or what is in the way.
fn target(
    record: &DiscoveryRecord,
    kind: DiscoveredKind,
    traddr: &str,
    trsvcid: &str,
    subnqn: &Nqn,
) -> Result<TargetAddress, String> {
    if kind != DiscoveredKind::Nvm || *subnqn == Nqn::discovery() {
        return Err("it is a discovery subsystem".to_owned());
    }
    if record.trtype != trtype::TCP {
        return Err(format!("transport type {} is not TCP", record.trtype));
    }
    let demands_tls = match record.treq & treq::SECURE_CHANNEL_MASK {
        treq::SECURE_CHANNEL_REQUIRED => true,
        treq::SECURE_CHANNEL_NOT_REQUIRED => false,
        _ => record.tsas[0] != sectype::NONE,
    };
    if demands_tls {
        return Err("it demands TLS, which is not supported".to_owned());
    }
    if record.cntlid != CNTLID_DYNAMIC {
        return Err("it has fixed controllers, which are not supported".to_owned());
    }
    let address: IpAddr = traddr
        .parse()
        .map_err(|_| format!("'{traddr}' is not an IP address"))?;
    let family = match address {
        IpAddr::V4(_) => adrfam::IPV4,
        IpAddr::V6(_) => adrfam::IPV6,
    };
    if record.adrfam != family {
        return Err(format!(
            "'{traddr}' is not of its address family, {}",
            record.adrfam
        ));
    }
    if address.is_unspecified() {
        return Err(format!("'{traddr}' is nowhere in particular"));
    }
    let port = trsvcid.parse().ok().filter(|&port| port != 0);
    Ok(TargetAddress {
        host: address.to_string(),
        port: port.ok_or_else(|| format!("'{trsvcid}' is not a port"))?,
        subnqn: subnqn.clone(),
    })
}
