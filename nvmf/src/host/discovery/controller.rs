//! A discovery controller that is connected to: what it is, and its log.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;
use zerocopy::FromBytes;

use super::record::digest;
use super::{DiscoveryLog, Skipped, unusable};
use crate::host::admin::{Admin, LossReport};
use crate::host::association::connect_admin;
use crate::host::connect::Parties;
use crate::host::dial::Dial;
use crate::host::enable::{enable, read_discovery_capabilities, shut_down};
use crate::host::error::HostError;
use crate::host::events::EventSupport;
use crate::host::identify::event_support;
use crate::host::options::HostOptions;
use crate::spec::discovery::{DiscoveryHeader, DiscoveryRecord, RECORD_LEN};
use crate::spec::identify::{IDENTIFY_LEN, IdentifyController, cns};
use crate::spec::log::{GetLogPage, lid};
use crate::spec::property::Cc;
use crate::spec::{Nqn, Sqe, Status};

/// Records of a log that are read, at most: 8 MiB of it.
const RECORDS_MAX: u64 = 8192;
/// Records read at once: every controller can transfer a page.
const CHUNK: u64 = 4;
/// How often a log is read again because it changed meanwhile.
const READS_MAX: usize = 8;

/// An association with a discovery controller. Dropping it closes the connection.
#[derive(Debug)]
pub(super) struct DiscoveryController {
    pub(super) admin: Admin,
    cc: Cc,
    subnqn: Nqn,
    /// What it calls itself, when that is not what it was asked for.
    own_name: Option<Nqn>,
    /// How its end is published.
    pub(super) losses: LossReport,
    /// The events that it reports.
    pub(super) events: EventSupport,
}

impl DiscoveryController {
    /// Connects, enables the controller, and refuses one of another kind. All of it is over by `deadline`.
    pub(super) async fn connect(
        dial: &impl Dial,
        (at, subnqn): (SocketAddr, &Nqn),
        options: &HostOptions,
        kato: u32,
        (begun, deadline): (Instant, Instant),
    ) -> Result<Self, HostError> {
        let parties = Parties {
            at,
            subnqn,
            hostnqn: &options.hostnqn,
            hostid: options.hostid,
        };
        let connected = connect_admin(dial, parties, kato, deadline).await;
        let (driven, _) = connected.map_err(without_subsystem)?;
        let losses = LossReport::new();
        let (admin, _) = Admin::spawn(driven, at, options.connect_timeout, losses.clone());
        let mut bounded = admin.bounded(begun, deadline);
        let cap = read_discovery_capabilities(&bounded).await?;
        let cc = enable(&mut bounded, cap).await?;
        let (own_name, events) = identify(&bounded).await?;
        let own_name = own_name.filter(|name| name != subnqn);
        Ok(Self {
            admin,
            cc,
            losses,
            events,
            subnqn: subnqn.clone(),
            own_name,
        })
    }

    /// Reads the log, again from the start when it changes meanwhile; within this time.
    pub(super) async fn read_log(
        &self,
        (begun, deadline): (Instant, Instant),
    ) -> Result<DiscoveryLog, HostError> {
        let admin = self.admin.bounded(begun, deadline);
        const RESTART: u16 = Status::LOG_RESTART_DISCOVERY.code();
        for _ in 0..READS_MAX {
            match self.read_once(&admin).await {
                Ok(Some(log)) => return Ok(log),
                Ok(None) => {}
                Err(HostError::Command { status, .. }) if status.code() == RESTART => {}
                Err(error) => return Err(error),
            }
        }
        Err(unusable(
            self.admin.at(),
            format!("its discovery log changed under each of {READS_MAX} attempts to read it"),
        ))
    }

    /// Shuts the controller down, within this time, and closes the connection.
    pub(super) async fn close(self, within: Duration) {
        shut_down(&self.admin, self.cc, within).await;
        self.admin.stop();
    }

    /// Reads the log; `None` when it changed meanwhile.
    async fn read_once(&self, admin: &Admin) -> Result<Option<DiscoveryLog>, HostError> {
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
            subnqn: self.subnqn.clone(),
            own_name: self.own_name.clone(),
            referrer: None,
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
                    .and_then(|record| digest(record, at));
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

/// Refuses what says that it is no discovery controller; older ones do not say what they are. Gives the name of
/// its subsystem, if it tells one, and the events that it reports.
async fn identify(admin: &Admin) -> Result<(Option<Nqn>, EventSupport), HostError> {
    const NOT_REPORTED: u8 = 0;
    const DISCOVERY: u8 = 2;
    let sqe = Sqe::identify(cns::CONTROLLER, 0, 0);
    let bytes = admin.read("Identify Controller", sqe, IDENTIFY_LEN).await?;
    match IdentifyController::ref_from_prefix(&bytes) {
        Ok((data, _)) if matches!(data.cntrltype, NOT_REPORTED | DISCOVERY) => {
            Ok((Nqn::from_field(&data.subnqn).ok(), event_support(data)))
        }
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
