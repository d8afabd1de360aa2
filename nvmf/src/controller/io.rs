//! Commands of an I/O queue: checked, and turned into what a lane does about them.

use super::Limits;
use super::subsystem::Subsystem;
use crate::backend::Geometry;
use crate::spec::opcode::{fabrics, nvm};
use crate::spec::sqe::{CDW11_DSM_DEALLOCATE, CDW12_DEAC};
use crate::spec::{Sqe, Status};

/// Bytes of one range of Dataset Management.
pub(super) const RANGE_LEN: usize = 16;

/// What a command asks for. Offsets and lengths are bytes, inside the namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Read {
        offset: u64,
        len: u32,
    },
    Write {
        offset: u64,
        len: u32,
        fua: bool,
    },
    /// Compare what is stored with the data.
    Compare {
        offset: u64,
        len: u32,
    },
    Flush,
    WriteZeroes {
        offset: u64,
        len: u64,
        may_unmap: bool,
        fua: bool,
    },
    /// Deallocate the ranges that the data holds.
    Deallocate {
        ranges: u16,
    },
    /// Nothing that changes anything.
    Nothing,
    /// End the queue.
    Disconnect,
}

/// A checked command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    /// Place of the namespace in the subsystem's list; 0 when there is none to name.
    pub(super) namespace: usize,
    pub(super) action: Action,
}

fn refuse<T>(status: Status) -> Result<T, Status> {
    Err(status.do_not_retry())
}

/// Checks a command: opcode, namespace, write protection, size, range, then the length of its data.
///
/// # Errors
/// The status to answer with.
pub(super) fn plan(
    sqe: &Sqe,
    data_len: u32,
    subsystem: &Subsystem,
    limits: &Limits,
) -> Result<Plan, Status> {
    if sqe.opcode == fabrics::OPCODE {
        return self::fabrics(sqe);
    }
    let writes = match sqe.opcode {
        nvm::READ | nvm::COMPARE | nvm::FLUSH => false,
        nvm::WRITE | nvm::WRITE_ZEROES | nvm::DATASET_MANAGEMENT => true,
        _ => return refuse(Status::INVALID_OPCODE),
    };
    if sqe.fuse() != 0 {
        return refuse(Status::INVALID_FIELD);
    }
    let Some(namespace) = subsystem.find(sqe.nsid.get()) else {
        return refuse(Status::INVALID_NAMESPACE);
    };
    if let Some(groups) = subsystem.ana() {
        groups.check(subsystem.namespaces()[namespace].ana_group())?;
    }
    let geometry = subsystem.namespaces()[namespace].backend().geometry();
    if writes && geometry.read_only {
        return refuse(Status::WRITE_PROTECTED);
    }
    let action = match sqe.opcode {
        nvm::READ => {
            let (offset, len) = transfer(sqe, data_len, &geometry, limits)?;
            Action::Read { offset, len }
        }
        nvm::WRITE => {
            let (offset, len) = transfer(sqe, data_len, &geometry, limits)?;
            let fua = sqe.fua();
            Action::Write { offset, len, fua }
        }
        nvm::COMPARE => {
            let (offset, len) = transfer(sqe, data_len, &geometry, limits)?;
            Action::Compare { offset, len }
        }
        nvm::WRITE_ZEROES => {
            no_data(data_len)?;
            let (offset, len) = range(sqe, &geometry)?;
            Action::WriteZeroes {
                offset,
                len,
                may_unmap: sqe.cdw12.get() & CDW12_DEAC != 0 && geometry.deallocate,
                fua: sqe.fua(),
            }
        }
        nvm::DATASET_MANAGEMENT => dataset_management(sqe, data_len, &geometry)?,
        _ => {
            no_data(data_len)?;
            Action::Flush
        }
    };
    Ok(Plan { namespace, action })
}

fn fabrics(sqe: &Sqe) -> Result<Plan, Status> {
    match sqe.fctype() {
        fabrics::DISCONNECT if sqe.cdw10.get() as u16 != 0 => {
            refuse(Status::CONNECT_INCOMPATIBLE_FORMAT)
        }
        fabrics::DISCONNECT => Ok(Plan {
            namespace: 0,
            action: Action::Disconnect,
        }),
        fabrics::CONNECT => refuse(Status::SEQUENCE_ERROR),
        _ => refuse(Status::INVALID_OPCODE),
    }
}

fn range(sqe: &Sqe, geometry: &Geometry) -> Result<(u64, u64), Status> {
    geometry
        .blocks(sqe.slba(), u64::from(sqe.block_count()))
        .ok_or(Status::LBA_OUT_OF_RANGE.do_not_retry())
}

fn transfer(
    sqe: &Sqe,
    data_len: u32,
    geometry: &Geometry,
    limits: &Limits,
) -> Result<(u64, u32), Status> {
    let len = u64::from(sqe.block_count()) * u64::from(geometry.block_size);
    if len > u64::from(limits.max_transfer) {
        return refuse(Status::INVALID_FIELD);
    }
    let (offset, len) = range(sqe, geometry)?;
    if len != u64::from(data_len) {
        return refuse(Status::DATA_SGL_LENGTH_INVALID);
    }
    Ok((offset, data_len))
}

fn no_data(data_len: u32) -> Result<(), Status> {
    match data_len {
        0 => Ok(()),
        _ => refuse(Status::DATA_SGL_LENGTH_INVALID),
    }
}

fn dataset_management(sqe: &Sqe, data_len: u32, geometry: &Geometry) -> Result<Action, Status> {
    // Zero-based on the wire.
    let ranges = (sqe.cdw10.get() as u8 as u16) + 1;
    // Linux always describes the memory of 256 ranges, however few it means.
    if (data_len as usize) < usize::from(ranges) * RANGE_LEN {
        return refuse(Status::DATA_SGL_LENGTH_INVALID);
    }
    if sqe.cdw11.get() & CDW11_DSM_DEALLOCATE == 0 || !geometry.deallocate {
        return Ok(Action::Nothing);
    }
    Ok(Action::Deallocate { ranges })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::backend::RamBackend;
    use crate::spec::Nqn;
    use uuid::Uuid;

    const BLOCKS: u64 = 4096;

    /// NSID 1: 4096 blocks of 512 bytes; NSID 2: the same, read-only; NSID 3: 4096-byte blocks.
    fn subsystem() -> Subsystem {
        let mut subsystem = Subsystem::new(Nqn::new("nqn.2026-01.org.example:s").unwrap(), "1");
        let ram = |size| RamBackend::new(BLOCKS * u64::from(size), size).unwrap();
        for (nsid, backend) in [(1, ram(512)), (2, ram(512).read_only()), (3, ram(4096))] {
            let uuid = Uuid::from_u128(u128::from(nsid));
            subsystem
                .add_namespace(nsid, uuid, Arc::new(backend))
                .unwrap();
        }
        subsystem
    }

    fn check(sqe: Sqe, data_len: u32) -> Result<Action, Status> {
        plan(&sqe, data_len, &subsystem(), &Limits::default()).map(|plan| plan.action)
    }

    fn refused(status: Status) -> Result<Action, Status> {
        Err(status.do_not_retry())
    }

    #[test]
    fn reads_and_writes_become_byte_ranges_of_their_namespace() {
        let read = Action::Read {
            offset: 8 * 512,
            len: 4096,
        };
        assert_eq!(check(Sqe::read(1, 8, 8), 4096), Ok(read));
        let write = Action::Write {
            offset: 8 * 4096,
            len: 8192,
            fua: true,
        };
        assert_eq!(check(Sqe::write(3, 8, 2, true), 8192), Ok(write));
        let compare = Action::Compare {
            offset: 8 * 512,
            len: 4096,
        };
        let sqe = Sqe {
            opcode: nvm::COMPARE,
            ..Sqe::read(2, 8, 8)
        };
        assert_eq!(check(sqe, 4096), Ok(compare), "of a read-only one too");
    }

    #[test]
    fn a_namespace_that_is_not_there_is_invalid_and_so_is_all_of_them() {
        for nsid in [0, 4, u32::MAX] {
            let invalid = refused(Status::INVALID_NAMESPACE);
            assert_eq!(check(Sqe::read(nsid, 0, 1), 512), invalid);
            assert_eq!(check(Sqe::flush(nsid), 0), invalid);
        }
    }

    #[test]
    fn blocks_beyond_the_end_are_out_of_range_also_when_their_sum_wraps() {
        let outside = refused(Status::LBA_OUT_OF_RANGE);
        assert!(check(Sqe::read(1, BLOCKS - 1, 1), 512).is_ok());
        assert_eq!(check(Sqe::read(1, BLOCKS - 1, 2), 1024), outside);
        assert_eq!(check(Sqe::read(1, u64::MAX, 1), 512), outside);
        assert_eq!(check(Sqe::write(1, u64::MAX, 8, false), 4096), outside);
        let zeroes = Sqe::write_zeroes(1, BLOCKS - 1, 2, true, false);
        assert_eq!(check(zeroes, 0), outside);
    }

    #[test]
    fn the_data_must_have_exactly_the_length_of_the_blocks() {
        let length = refused(Status::DATA_SGL_LENGTH_INVALID);
        assert_eq!(check(Sqe::read(1, 0, 8), 4095), length);
        assert_eq!(check(Sqe::write(1, 0, 8, false), 8192), length);
        assert_eq!(check(Sqe::flush(1), 512), length);
        assert_eq!(check(Sqe::write_zeroes(1, 0, 8, true, false), 4096), length);
        assert_eq!(check(Sqe::deallocate(1, 2), 31), length);
    }

    #[test]
    fn more_than_mdts_allows_is_an_invalid_field() {
        let limit = Limits::default().max_transfer;
        assert!(check(Sqe::read(1, 0, limit / 512), limit).is_ok());
        let more = check(Sqe::read(1, 0, limit / 512 + 1), limit + 512);
        assert_eq!(more, refused(Status::INVALID_FIELD));
        // Write Zeroes moves no data, so MDTS does not bound it.
        assert!(check(Sqe::write_zeroes(1, 0, BLOCKS as u32, true, false), 0).is_ok());
    }

    #[test]
    fn a_read_only_namespace_refuses_whatever_writes_and_still_flushes() {
        let protected = refused(Status::WRITE_PROTECTED);
        assert_eq!(check(Sqe::write(2, 0, 1, false), 512), protected);
        assert_eq!(
            check(Sqe::write_zeroes(2, 0, 1, false, false), 0),
            protected
        );
        assert_eq!(check(Sqe::deallocate(2, 1), 16), protected);
        assert!(check(Sqe::read(2, 0, 1), 512).is_ok());
        assert_eq!(check(Sqe::flush(2), 0), Ok(Action::Flush));
    }

    #[test]
    fn write_zeroes_may_unmap_only_when_the_host_says_so() {
        for deac in [false, true] {
            let zeroes = Action::WriteZeroes {
                offset: 0,
                len: 4096,
                may_unmap: deac,
                fua: true,
            };
            assert_eq!(check(Sqe::write_zeroes(1, 0, 8, deac, true), 0), Ok(zeroes));
        }
    }

    #[test]
    fn ranges_are_counted_from_one_and_the_memory_may_be_larger_than_they_are() {
        let ranges = |count, data_len| check(Sqe::deallocate(1, count), data_len);
        assert_eq!(ranges(1, 16), Ok(Action::Deallocate { ranges: 1 }));
        assert_eq!(ranges(1, 4096), Ok(Action::Deallocate { ranges: 1 }));
        assert_eq!(ranges(256, 4096), Ok(Action::Deallocate { ranges: 256 }));
        let mut hint = Sqe::deallocate(1, 1);
        hint.cdw11 = 1.into();
        assert_eq!(check(hint, 16), Ok(Action::Nothing));
    }

    #[test]
    fn unknown_opcodes_fused_commands_and_other_fabrics_commands_are_refused() {
        for opcode in [nvm::VERIFY, nvm::WRITE_UNCORRECTABLE, 0x80, 0xff] {
            assert_eq!(
                check(Sqe::new(opcode, 1), 0),
                refused(Status::INVALID_OPCODE)
            );
        }
        let mut fused = Sqe::write(1, 0, 1, false);
        fused.flags = 2;
        assert_eq!(check(fused, 512), refused(Status::INVALID_FIELD));
        let get = Sqe::fabrics(fabrics::PROPERTY_GET);
        assert_eq!(check(get, 0), refused(Status::INVALID_OPCODE));
        let connect = Sqe::fabrics(fabrics::CONNECT);
        assert_eq!(check(connect, 1024), refused(Status::SEQUENCE_ERROR));
    }

    #[test]
    fn disconnect_ends_an_io_queue_unless_its_record_format_is_unknown() {
        let mut sqe = Sqe::fabrics(fabrics::DISCONNECT);
        assert_eq!(check(sqe, 0), Ok(Action::Disconnect));
        sqe.cdw10 = 1.into();
        let refusal = refused(Status::CONNECT_INCOMPATIBLE_FORMAT);
        assert_eq!(check(sqe, 0), refusal);
    }
}
