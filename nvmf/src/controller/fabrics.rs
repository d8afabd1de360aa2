//! The Connect command: what is checked, in which order, and what a refusal says.
//!
//! First the command, then its data, then what the data names. The first offence wins.

use std::sync::Arc;

use super::association::{Association, HostIdentity, Membership};
use super::subsystem::Subsystem;
use super::{Limits, Target};
use crate::spec::fabrics::{
    CNTLID_DYNAMIC, CNTLID_MAX, Connect, ConnectData, connect_offset, invalid_parameter,
};
use crate::spec::opcode::fabrics;
use crate::spec::{Nqn, Sqe, Status};

/// Largest admin queue in entries (Base, "Admin Submission Queue").
pub(super) const MAX_ADMIN_QUEUE: u32 = 4096;

/// The answer to a Connect that is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: Status,
    /// Dword 0 of the completion.
    pub(super) result: u32,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self { status, result: 0 }
    }
}

/// Connect Invalid Parameters, naming the offence: an offset into the data, or into the command.
pub(super) fn invalid(offset: u16, in_data: bool) -> Refusal {
    Refusal {
        status: Status::CONNECT_INVALID_PARAMETERS.do_not_retry(),
        result: invalid_parameter(offset, in_data),
    }
}

/// Checks the first command of a connection.
///
/// # Errors
/// What to answer.
pub(super) fn check_command(sqe: &Sqe, data_len: u32, limits: &Limits) -> Result<Connect, Refusal> {
    if sqe.opcode != fabrics::OPCODE || sqe.fctype() != fabrics::CONNECT {
        return Err(Status::INVALID_OPCODE.do_not_retry().into());
    }
    let connect = Connect::from_sqe(sqe);
    if connect.recfmt != 0 {
        return Err(Status::CONNECT_INCOMPATIBLE_FORMAT.do_not_retry().into());
    }
    let largest = match connect.qid {
        0 => MAX_ADMIN_QUEUE,
        _ => limits.queue_size,
    };
    if !(2..=largest).contains(&queue_size(&connect)) {
        return Err(invalid(connect_offset::SQSIZE, false));
    }
    if connect.qid != 0 && connect.kato != 0 {
        return Err(invalid(connect_offset::KATO, false));
    }
    if data_len as usize != size_of::<ConnectData>() {
        return Err(invalid(connect_offset::SGL1, false));
    }
    Ok(connect)
}

/// Entries of the queue that a Connect asks for.
pub(super) fn queue_size(connect: &Connect) -> u32 {
    u32::from(connect.sqsize) + 1
}

/// Connect data that is well-formed, and the subsystem that it names.
pub(super) struct Request {
    pub(super) subsystem: Arc<Subsystem>,
    pub(super) host: HostIdentity,
    pub(super) hostnqn: Nqn,
    cntlid: u16,
}

/// Checks the data of a Connect. Without `serves_io`, discovery is all that there is.
///
/// # Errors
/// What to answer.
pub(super) fn check_data(
    connect: &Connect,
    data: &ConnectData,
    target: &Target,
    serves_io: bool,
) -> Result<Request, Refusal> {
    if data.hostid == [0; 16] {
        return Err(invalid(connect_offset::DATA_HOSTID, true));
    }
    let cntlid = data.cntlid.get();
    let cntlid_is_valid = match connect.qid {
        0 => cntlid == CNTLID_DYNAMIC,
        _ => cntlid <= CNTLID_MAX,
    };
    if !cntlid_is_valid {
        return Err(invalid(connect_offset::DATA_CNTLID, true));
    }
    let subnqn =
        Nqn::from_field(&data.subnqn).map_err(|_| invalid(connect_offset::DATA_SUBNQN, true))?;
    let hostnqn =
        Nqn::from_field(&data.hostnqn).map_err(|_| invalid(connect_offset::DATA_HOSTNQN, true))?;
    let io = target.subsystems.iter().filter(|_| serves_io);
    let mut subsystems = io.chain([&target.discovery]);
    let subsystem = subsystems
        .find(|subsystem| *subsystem.nqn() == subnqn)
        .ok_or(invalid(connect_offset::DATA_SUBNQN, true))?;
    if subsystem.is_discovery() && connect.qid != 0 {
        return Err(invalid(connect_offset::QID, false));
    }
    if !subsystem.allows(&hostnqn) {
        return Err(Status::CONNECT_INVALID_HOST.do_not_retry().into());
    }
    Ok(Request {
        subsystem: Arc::clone(subsystem),
        host: HostIdentity {
            hostid: data.hostid,
            hostnqn: data.hostnqn,
        },
        hostnqn,
        cntlid,
    })
}

/// Makes the association that an admin Connect asks for; `None` when no CNTLID is free.
pub(super) fn associate(request: &Request, limits: &Limits) -> Option<Arc<Association>> {
    let queue_size = limits.queue_size;
    request
        .subsystem
        .register(|cntlid, last_ciu| Association::new(cntlid, last_ciu, request.host, queue_size))
}

/// Lets the I/O queue of a Connect join its association.
///
/// # Errors
/// What to answer.
pub(super) fn join(connect: &Connect, request: &Request) -> Result<Membership, Refusal> {
    let found = request.subsystem.controller(request.cntlid);
    let association = found.ok_or(invalid(connect_offset::DATA_CNTLID, true))?;
    association.join(connect.qid, &request.host)
}
