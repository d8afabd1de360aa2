//! Reads how a controller's namespaces can be reached through it: the ANA log.
//!
//! What one command can carry is read with one command, and is consistent then. A longer log comes in
//! parts, and is read again when its change count says that it changed meanwhile.

use std::collections::BTreeMap;
use std::time::Duration;

use zerocopy::FromBytes;
use zerocopy::little_endian::U32;

use super::admin::Admin;
use super::error::HostError;
use crate::spec::NSID_ALL;
use crate::spec::ana::{self, AnaGroupDescriptor, AnaHeader, AnaState};
use crate::spec::log::{GetLogPage, lid};

/// Groups that are read, at most.
const GROUPS_MAX: u32 = 4096;
/// Namespaces of all groups that are read, at most; of a log with more, groups alone are read.
const NAMESPACES_MAX: u64 = 65_536;
/// Bytes that one command reads, at most.
const PART_MAX: u64 = 64 << 10;
/// Bytes that one command can ask for of a controller that knows no extended lengths.
const SIMPLE_PART_MAX: u64 = 16 << 10;
/// How often a log is read again because it changed meanwhile.
const READS_MAX: usize = 8;
/// Length of the header and of a group's descriptor.
const HEADER_LEN: u64 = size_of::<AnaHeader>() as u64;
const DESCRIPTOR_LEN: u64 = size_of::<AnaGroupDescriptor>() as u64;
/// For messages.
const COMMAND: &str = "Get Log Page (ANA)";

/// What a controller says of itself that reports asymmetric namespace access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AnaInfo {
    /// States that it may report, and how groups change: see [`crate::spec::ana::anacap`] (ANACAP).
    pub capabilities: u8,
    /// Longest time that a group is in the change state (ANATT); zero when it does not tell.
    pub transition_time: Duration,
    /// The largest group identifier (ANAGRPMAX).
    pub max_group: u32,
    /// Groups that there may be (NANAGRPID).
    pub groups: u32,
    /// Namespaces that there may be (MNAN, or NN without).
    pub namespaces: u32,
}

/// The ANA log of one controller.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AnaLog {
    /// Changes of the log so far (CHGCNT).
    pub change_count: u64,
    /// State by group; one that the specification does not define counts as inaccessible.
    pub groups: BTreeMap<u32, AnaState>,
    /// Group by namespace, as far as the log tells.
    pub namespaces: BTreeMap<u32, u32>,
}

impl AnaLog {
    /// State of a namespace: of the group that lists it, or else of the group that Identify Namespace
    /// names (`anagrpid`). `None` when the log has neither.
    pub fn state_of(&self, nsid: u32, anagrpid: u32) -> Option<AnaState> {
        let group = self.namespaces.get(&nsid).unwrap_or(&anagrpid);
        self.groups.get(group).copied()
    }
}

/// Why an attempt to read the log ended without one.
enum Stop {
    Failed(HostError),
    /// It has more namespaces than are read.
    TooLong,
}

impl From<HostError> for Stop {
    fn from(error: HostError) -> Self {
        Self::Failed(error)
    }
}

/// Reads the log of a controller that reports one. `most` is what one command may transfer, in bytes;
/// `extended` when parts at any offset can be read. All of it takes no longer than the bounds of `admin`.
pub(super) async fn read_log(
    admin: &Admin,
    info: &AnaInfo,
    most: Option<u64>,
    extended: bool,
) -> Result<AnaLog, HostError> {
    let bound = if extended { PART_MAX } else { SIMPLE_PART_MAX };
    let mut log = Pages {
        admin,
        info,
        part_max: most.unwrap_or(bound).min(bound),
        extended,
        groups_only: false,
        bytes: Vec::new(),
    };
    for _ in 0..READS_MAX {
        match log.read_once().await {
            Ok(Some(log)) => return Ok(log),
            Ok(None) => {}
            Err(Stop::Failed(error)) => return Err(error),
            Err(Stop::TooLong) if log.groups_only => {
                return Err(log.unusable("is longer than what can be read".to_owned()));
            }
            Err(Stop::TooLong) => log.groups_only = true,
        }
    }
    Err(log.unusable(format!(
        "changed under each of {READS_MAX} attempts to read it"
    )))
}

/// The log, as far as it was read.
struct Pages<'a> {
    admin: &'a Admin,
    info: &'a AnaInfo,
    part_max: u64,
    extended: bool,
    groups_only: bool,
    bytes: Vec<u8>,
}

impl Pages<'_> {
    /// Reads the log; `None` when it changed meanwhile.
    async fn read_once(&mut self) -> Result<Option<AnaLog>, Stop> {
        self.bytes.clear();
        let first = self.most_likely_length().min(self.part_max);
        self.bytes = self.part(0, first).await?;
        let header: AnaHeader = self.take(0)?;
        let count = u32::from(header.ngrps.get());
        if count > self.info.groups.min(GROUPS_MAX) {
            return Err(self.odd(format!(
                "has {count} groups; Identify said {}, and {GROUPS_MAX} is the most that is read",
                self.info.groups
            )));
        }
        let mut log = AnaLog {
            change_count: header.chgcnt.get(),
            ..AnaLog::default()
        };
        let mut at = HEADER_LEN;
        for _ in 0..count {
            at = self.group(&mut log, at).await?;
        }
        if self.bytes.len() as u64 > first {
            let bytes = self.part(0, HEADER_LEN).await?;
            let after = AnaHeader::read_from_bytes(&bytes);
            if after.is_ok_and(|after| after.chgcnt != header.chgcnt) {
                return Ok(None);
            }
        }
        Ok(Some(log))
    }

    /// Adds the group whose descriptor begins at `at`; returns where the next one does.
    async fn group(&mut self, log: &mut AnaLog, at: u64) -> Result<u64, Stop> {
        let names_at = at + DESCRIPTOR_LEN;
        self.need(names_at).await?;
        let group: AnaGroupDescriptor = self.take(at)?;
        let id = group.anagrpid.get();
        if id == 0 || id > self.info.max_group {
            return Err(self.odd(format!(
                "has group {id}; Identify said that {} is the largest",
                self.info.max_group
            )));
        }
        // Nothing is sent on a path of which it is not known that it takes it.
        let state = AnaState::from_wire(group.state).unwrap_or(AnaState::Inaccessible);
        if log.groups.insert(id, state).is_some() {
            return Err(self.odd(format!("has group {id} twice")));
        }
        let names = u64::from(group.nnsids.get());
        if self.groups_only && names != 0 {
            return Err(self.odd("has namespaces, which were not asked for".to_owned()));
        }
        if log.namespaces.len() as u64 + names > NAMESPACES_MAX {
            return Err(Stop::TooLong);
        }
        let end = names_at + names * 4;
        self.need(end).await?;
        let listed = <[U32]>::ref_from_bytes(&self.bytes[names_at as usize..end as usize]);
        for nsid in listed.unwrap_or_default() {
            if log.namespaces.insert(nsid.get(), id).is_some() {
                return Err(self.odd(format!("has namespace {nsid} in two groups, or twice")));
            }
        }
        Ok(end)
    }

    /// Reads on until there are `len` bytes.
    async fn need(&mut self, len: u64) -> Result<(), Stop> {
        while (self.bytes.len() as u64) < len {
            let have = self.bytes.len() as u64;
            if !self.extended {
                return Err(Stop::TooLong);
            }
            let likely = self.most_likely_length().saturating_sub(have);
            let more = likely.max(len - have).min(self.part_max);
            let more = self.part(have, more).await?;
            self.bytes.extend(more);
        }
        Ok(())
    }

    /// What a log with all groups and namespaces has. Controllers return less without complaint.
    fn most_likely_length(&self) -> u64 {
        let names = match self.groups_only {
            true => 0,
            false => u64::from(self.info.namespaces),
        };
        HEADER_LEN + u64::from(self.info.groups) * DESCRIPTOR_LEN + names * 4
    }

    async fn part(&self, offset: u64, len: u64) -> Result<Vec<u8>, HostError> {
        let part = GetLogPage {
            lid: lid::ANA,
            offset,
            len,
        };
        let mut sqe = part.to_sqe();
        sqe.nsid = NSID_ALL.into();
        if self.groups_only {
            sqe.cdw10 |= ana::LSP_GROUPS_ONLY;
        }
        self.admin.read(COMMAND, sqe, len as usize).await
    }

    fn take<T: FromBytes>(&self, at: u64) -> Result<T, Stop> {
        let bytes = self.bytes.get(at as usize..).unwrap_or_default();
        match T::read_from_prefix(bytes) {
            Ok((value, _)) => Ok(value),
            Err(_) => Err(self.odd("is too short".to_owned())),
        }
    }

    fn odd(&self, reason: String) -> Stop {
        Stop::Failed(self.unusable(reason))
    }

    fn unusable(&self, reason: String) -> HostError {
        HostError::Unusable {
            at: self.admin.at(),
            reason: format!("its ANA log {reason}"),
        }
    }
}
