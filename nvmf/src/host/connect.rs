//! The Fabrics Connect command: its data, and what its answer means.

use std::net::SocketAddr;
use std::time::Duration;

use memdesc::MemSource;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;
use zerocopy::IntoBytes;

use super::dial::rounded;
use super::error::{HostError, Queue};
use crate::spec::fabrics::{
    CATTR_DISABLE_SQ_FLOW, CNTLID_MAX, CONNECT_AUTHREQ_MASK, Connect, ConnectData,
    SQHD_FLOW_DISABLED, connect_offset, invalid_parameter_parts,
};
use crate::spec::{Cqe, Nqn, Status};
use crate::transport::drive::Driven;
use crate::transport::{Completion, HostQueuePair, Transfer};

/// Who connects to what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parties<'a> {
    pub(super) at: SocketAddr,
    pub(super) subnqn: &'a Nqn,
    pub(super) hostnqn: &'a Nqn,
    pub(super) hostid: Uuid,
}

/// The queue to be connected.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectQueue {
    /// 0 for the admin queue.
    pub(super) qid: u16,
    /// Entries, 2 to 65536.
    pub(super) entries: u32,
    /// The controller, or "any" for the admin queue.
    pub(super) cntlid: u16,
    /// Milliseconds; 0 for none. Admin queue only.
    pub(super) kato: u32,
}

/// A successful answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Connected {
    pub(super) cntlid: u16,
    /// The controller keeps SQ flow control on.
    pub(super) sq_flow_control: bool,
}

/// Connects a queue pair to its controller.
///
/// SQ flow control is always asked to be off. When the controller keeps it on, nothing has to be
/// done: the controller takes commands from the submission queue in order and answers only what it
/// took, so at most as many entries are in use as commands are unanswered. A queue pair of N
/// entries never has more than N - 1 of those, which is what flow control allows.
pub(super) async fn connect_queue(
    driven: &mut Driven<dyn HostQueuePair>,
    parties: Parties<'_>,
    queue: ConnectQueue,
    deadline: Instant,
) -> Result<Connected, HostError> {
    let started = Instant::now();
    let completion = timeout_at(deadline, exchange(driven, parties, queue))
        .await
        .map_err(|_| HostError::TimedOut {
            at: parties.at,
            command: "Connect",
            after: rounded(deadline.saturating_duration_since(started)),
        })?;
    if let Some(ending) = driven.pair().ending()
        && completion.as_ref().is_none_or(|done| is_lost(&done.cqe))
    {
        return Err(HostError::ConnectDropped {
            at: parties.at,
            reason: ending.clone(),
            subnqn: parties.subnqn.to_string(),
            hostnqn: parties.hostnqn.to_string(),
        });
    }
    let completion = completion.ok_or_else(|| HostError::Transport {
        at: parties.at,
        reason: "the new queue pair takes no command".to_owned(),
    })?;
    check(&completion, parties, queue)
}

/// Sends Connect and waits for its completion; `None` when there can be none.
async fn exchange(
    driven: &mut Driven<dyn HostQueuePair>,
    parties: Parties<'_>,
    queue: ConnectQueue,
) -> Option<Completion> {
    let command = Connect {
        recfmt: 0,
        qid: queue.qid,
        sqsize: (queue.entries - 1) as u16,
        cattr: CATTR_DISABLE_SQ_FLOW,
        kato: queue.kato,
    };
    let data = connect_data(parties, queue.cntlid);
    let transfer = Transfer::Out(MemSource::from_bytes(data.as_bytes().to_vec()));
    driven.pair().submit(command.to_sqe(), transfer, 0).ok()?;
    loop {
        if let Some(completion) = driven.pair().completion() {
            return Some(completion);
        }
        if driven.pair().ending().is_some() {
            return None;
        }
        driven.progress().await;
    }
}

fn connect_data(parties: Parties<'_>, cntlid: u16) -> ConnectData {
    ConnectData {
        hostid: *parties.hostid.as_bytes(),
        cntlid: cntlid.into(),
        reserved18: [0; 238],
        subnqn: parties.subnqn.to_field(),
        hostnqn: parties.hostnqn.to_field(),
        reserved768: [0; 256],
    }
}

fn is_lost(cqe: &Cqe) -> bool {
    cqe.status().code() == Status::ABORTED_BY_HOST.code()
}

fn check(
    completion: &Completion,
    parties: Parties<'_>,
    queue: ConnectQueue,
) -> Result<Connected, HostError> {
    let cqe = &completion.cqe;
    if !cqe.status().is_success() {
        return Err(refusal(cqe, parties, queue));
    }
    let at = parties.at;
    let unusable = |reason: String| HostError::Unusable { at, reason };
    if cqe.dw0() & CONNECT_AUTHREQ_MASK != 0 {
        return Err(authentication(parties));
    }
    let cntlid = cqe.dw0() as u16;
    if cntlid > CNTLID_MAX {
        return Err(unusable(format!(
            "Connect returned controller ID {cntlid:#06x}; the largest is {CNTLID_MAX:#06x}"
        )));
    }
    let sqhd = cqe.sqhd.get();
    let sq_flow_control = sqhd != SQHD_FLOW_DISABLED;
    if sq_flow_control && u32::from(sqhd) >= queue.entries {
        return Err(unusable(format!(
            "Connect returned SQ head {sqhd} for a queue of {} entries",
            queue.entries
        )));
    }
    Ok(Connected {
        cntlid,
        sq_flow_control,
    })
}

fn authentication(parties: Parties<'_>) -> HostError {
    HostError::AuthenticationDemanded {
        at: parties.at,
        subnqn: parties.subnqn.to_string(),
        hostnqn: parties.hostnqn.to_string(),
    }
}

/// What an error status of Connect means.
fn refusal(cqe: &Cqe, parties: Parties<'_>, queue: ConnectQueue) -> HostError {
    const INVALID_PARAMETERS: u16 = Status::CONNECT_INVALID_PARAMETERS.code();
    const INVALID_HOST: u16 = Status::CONNECT_INVALID_HOST.code();
    const BUSY: u16 = Status::CONNECT_CONTROLLER_BUSY.code();
    const AUTHENTICATION: u16 = Status::AUTHENTICATION_REQUIRED.code();
    let Parties {
        at,
        subnqn,
        hostnqn,
        ..
    } = parties;
    match cqe.status().code() {
        INVALID_PARAMETERS => invalid_parameter(cqe.dw0(), parties, queue),
        INVALID_HOST => HostError::HostNotAllowed {
            at,
            subnqn: subnqn.to_string(),
            hostnqn: hostnqn.to_string(),
        },
        BUSY => HostError::Busy {
            at,
            subnqn: subnqn.to_string(),
        },
        AUTHENTICATION => authentication(parties),
        _ => HostError::Command {
            at,
            command: "Connect",
            status: cqe.status(),
        },
    }
}

/// Which parameter a controller does not accept, and what to do about it.
fn invalid_parameter(dw0: u32, parties: Parties<'_>, queue: ConnectQueue) -> HostError {
    let (offset, in_data) = invalid_parameter_parts(dw0);
    let (parameter, advice) = match (offset, in_data) {
        (connect_offset::DATA_SUBNQN, true) => {
            return HostError::UnknownSubsystem {
                at: parties.at,
                subnqn: parties.subnqn.to_string(),
            };
        }
        (connect_offset::DATA_HOSTNQN, true) => (
            format!("host NQN {}", parties.hostnqn),
            "give another with --hostnqn",
        ),
        (connect_offset::DATA_HOSTID, true) => (
            format!("host ID {}", parties.hostid),
            "give another with --hostid; a host NQN must always come with the same host ID",
        ),
        (connect_offset::DATA_CNTLID, true) if queue.qid != 0 => (
            format!("controller ID {:#06x}", queue.cntlid),
            "the controller has ended the association; connect again",
        ),
        (connect_offset::DATA_CNTLID, true) => (
            format!("controller ID {:#06x} (any)", queue.cntlid),
            "only its fixed controllers can be connected to, which is not supported",
        ),
        (connect_offset::QID, false) => (
            format!("queue ID {}", queue.qid),
            "ask for fewer queues with --nr-io-queues",
        ),
        (connect_offset::SQSIZE, false) => (
            format!("a size of {} entries", queue.entries),
            "give a smaller one with --queue-size",
        ),
        (connect_offset::KATO, false) => (
            format!(
                "a keep-alive time-out of {:?}",
                Duration::from_millis(queue.kato.into())
            ),
            "give another with --keep-alive-tmo",
        ),
        (offset, true) => (
            format!("byte {offset} of the Connect data"),
            "look at the target's log",
        ),
        (offset, false) => (
            format!("byte {offset} of the Connect command"),
            "look at the target's log",
        ),
    };
    HostError::ParameterRefused {
        at: parties.at,
        queue: Queue(queue.qid),
        parameter,
        advice,
    }
}
