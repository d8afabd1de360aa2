//! What Get Log Page answers: the supported pages, errors, health, firmware slots, changed namespaces,
//! commands and effects, asymmetric access, resets of other controllers.

use super::Limits;
use super::association::Association;
use super::identify::firmware;
use super::subsystem::Subsystem;
use crate::spec::ana::LSP_GROUPS_ONLY;
use crate::spec::cross_reset::REMOVE_COMPLETED;
use crate::spec::log::{GetLogPage, RETAIN_EVENT, lid};
use crate::spec::opcode::{admin, nvm};
use crate::spec::{Sqe, Status};

/// Bytes of a data unit in the health log.
const DATA_UNIT: u64 = 512 * 1000;

/// Reads a Get Log Page and checks it, before anything is allocated for its answer.
///
/// # Errors
/// The status to answer with.
pub(super) fn request(sqe: &Sqe, data_len: u32, limits: &Limits) -> Result<GetLogPage, Status> {
    let request = GetLogPage::from_sqe(sqe);
    let bound = u64::from(data_len.min(limits.max_transfer));
    if !request.offset.is_multiple_of(4) || request.len > bound {
        return Err(Status::INVALID_FIELD.do_not_retry());
    }
    Ok(request)
}

/// The part of a page that a request means, zeroes after the end of the page.
///
/// # Errors
/// The status to answer with.
pub(super) fn part(mut page: Vec<u8>, request: GetLogPage) -> Result<Vec<u8>, Status> {
    if request.offset >= page.len() as u64 {
        return Err(Status::INVALID_FIELD.do_not_retry());
    }
    page.drain(..request.offset as usize);
    page.resize(request.len as usize, 0);
    Ok(page)
}

/// Answers Get Log Page: as many bytes as it asks for, zeroes after the end of the page.
///
/// # Errors
/// The status to answer with.
pub(super) fn get(
    sqe: &Sqe,
    data_len: u32,
    association: &Association,
    subsystem: &Subsystem,
    hours: u64,
    limits: &Limits,
) -> Result<Vec<u8>, Status> {
    let request = request(sqe, data_len, limits)?;
    let retain = sqe.cdw10.get() & RETAIN_EVENT != 0;
    let page = match request.lid {
        lid::SUPPORTED => supported(subsystem, limits),
        // No error is ever recorded, so every entry, at any offset, is an empty one.
        lid::ERROR => return Ok(vec![0; request.len as usize]),
        lid::HEALTH => health(subsystem, hours),
        lid::FIRMWARE => firmware_slots(),
        lid::EFFECTS => effects(limits),
        lid::CHANGED_NAMESPACES => {
            association.notices(|notices| notices.changed_namespaces(request, retain))
        }
        lid::ANA if subsystem.ana().is_some() => {
            if !retain {
                // Before it is made: what changes meanwhile is reported.
                association.notices(super::notices::Notices::ana_read);
            }
            let groups_only = sqe.cdw10.get() & LSP_GROUPS_ONLY != 0;
            let groups = subsystem.ana();
            groups.map_or_else(Vec::new, |it| it.log(subsystem.namespaces(), groups_only))
        }
        lid::CROSS_CONTROLLER_RESET if limits.cross_resets > 0 => {
            if !retain {
                // Before it is made: what ends meanwhile is reported.
                association.notices(super::notices::Notices::cross_reset_read);
            }
            let remove = sqe.cdw10.get() & REMOVE_COMPLETED != 0;
            association.cross_resets(|resets| resets.log(remove))
        }
        _ => return Err(Status::INVALID_FIELD.do_not_retry()),
    };
    part(page, request)
}

/// Supported Log Pages (Base 2.0): a dword for each identifier.
fn supported(subsystem: &Subsystem, limits: &Limits) -> Vec<u8> {
    /// The page exists. Offsets are in bytes, so there is no index offset.
    const SUPPORTED: u32 = 1;
    let mut page = vec![0; 1024];
    for lid in [
        lid::SUPPORTED,
        lid::ERROR,
        lid::HEALTH,
        lid::FIRMWARE,
        lid::CHANGED_NAMESPACES,
        lid::EFFECTS,
    ]
    .into_iter()
    .chain(subsystem.ana().map(|_| lid::ANA))
    .chain((limits.cross_resets > 0).then_some(lid::CROSS_CONTROLLER_RESET))
    {
        let at = usize::from(lid) * 4;
        page[at..at + 4].copy_from_slice(&SUPPORTED.to_le_bytes());
    }
    page
}

/// SMART / Health Information: what was counted by the backends since the process started.
fn health(subsystem: &Subsystem, hours: u64) -> Vec<u8> {
    const AVAILABLE_SPARE: usize = 3;
    let mut page = vec![0; 512];
    page[AVAILABLE_SPARE] = 100;
    let (mut reads, mut writes, mut read, mut written) = (0, 0, 0, 0);
    for namespace in subsystem.namespaces() {
        let counts = namespace.backend().counters().read();
        reads += counts.reads;
        writes += counts.writes;
        read += counts.read_bytes;
        written += counts.written_bytes;
    }
    // 128-bit counters; data units are rounded up.
    for (at, value) in [
        (32, read.div_ceil(DATA_UNIT)),
        (48, written.div_ceil(DATA_UNIT)),
        (64, reads),
        (80, writes),
        // Power cycles.
        (112, 1),
        (128, hours),
    ] {
        page[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
    }
    page
}

fn firmware_slots() -> Vec<u8> {
    let mut page = vec![0; 512];
    // Slot 1 is active, and holds this build.
    page[0] = 1;
    page[8..16].copy_from_slice(&firmware());
    page
}

/// Commands Supported and Effects.
fn effects(limits: &Limits) -> Vec<u8> {
    const SUPPORTED: u32 = 1;
    /// The command may change blocks.
    const LBCC: u32 = 1 << 1;
    const IO: usize = 1024;
    let mut page = vec![0; 4096];
    let mut set = |at: usize, opcode: u8, value: u32| {
        let at = at + usize::from(opcode) * 4;
        page[at..at + 4].copy_from_slice(&value.to_le_bytes());
    };
    for opcode in [
        admin::GET_LOG_PAGE,
        admin::IDENTIFY,
        admin::ABORT,
        admin::SET_FEATURES,
        admin::GET_FEATURES,
        admin::ASYNC_EVENT_REQUEST,
        admin::KEEP_ALIVE,
    ]
    .into_iter()
    .chain((limits.cross_resets > 0).then_some(admin::CROSS_CONTROLLER_RESET))
    {
        set(0, opcode, SUPPORTED);
    }
    for opcode in [nvm::FLUSH, nvm::READ, nvm::COMPARE] {
        set(IO, opcode, SUPPORTED);
    }
    for opcode in [nvm::WRITE, nvm::WRITE_ZEROES, nvm::DATASET_MANAGEMENT] {
        set(IO, opcode, SUPPORTED | LBCC);
    }
    page
}
