//! The 16-byte completion queue entry.

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::status::Status;

/// Completion queue entry (Base, figure "Common Completion Queue Entry Layout").
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Cqe {
    /// Command-specific result, dwords 0 and 1.
    pub result: U64,
    /// Submission queue head; reserved when SQ flow control is off.
    pub sqhd: U16,
    /// Reserved on fabrics.
    pub sqid: U16,
    /// Command identifier.
    pub cid: U16,
    /// Status word, phase bit included.
    pub status: U16,
}

const _: () = assert!(size_of::<Cqe>() == 16);

impl Cqe {
    /// A completion with this status for a command.
    pub fn new(cid: u16, status: Status) -> Self {
        Self {
            cid: cid.into(),
            status: status.to_wire().into(),
            ..Self::default()
        }
    }

    /// A success with a result in dwords 0 and 1.
    pub fn with_result(cid: u16, result: u64) -> Self {
        Self {
            result: result.into(),
            ..Self::new(cid, Status::SUCCESS)
        }
    }

    /// The status without the phase bit.
    pub fn status(&self) -> Status {
        Status::from_wire(self.status.get())
    }

    /// Dword 0 of the result.
    pub fn dw0(&self) -> u32 {
        self.result.get() as u32
    }
}
