//! Cross-Controller Reset: the command, and the log page that tells how far it has come.

use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::opcode::admin;
use super::sqe::Sqe;

/// One run of a controller, from the moment at which it was enabled: a CNTLID that is used again, and a controller
/// that is enabled again, get another one (Base, figure "Identify Controller Data Structure", CIU and CIRN).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ControllerInstance {
    /// Controller ID.
    pub cntlid: u16,
    /// Controller Instance Uniquifier, from 1.
    pub ciu: u8,
    /// Controller Instance Random Number.
    pub cirn: u64,
}

impl ControllerInstance {
    /// A Cross-Controller Reset of this controller, to be sent to another one.
    pub fn to_sqe(self) -> Sqe {
        let mut sqe = Sqe::new(admin::CROSS_CONTROLLER_RESET, 0);
        sqe.cdw10 = (u32::from(self.cntlid) | u32::from(self.ciu) << 16).into();
        sqe.cdw12 = (self.cirn as u32).into();
        sqe.cdw13 = ((self.cirn >> 32) as u32).into();
        sqe
    }

    /// From a command that is a Cross-Controller Reset.
    pub fn from_sqe(sqe: &Sqe) -> Self {
        Self {
            cntlid: sqe.cdw10.get() as u16,
            ciu: (sqe.cdw10.get() >> 16) as u8,
            cirn: u64::from(sqe.cdw12.get()) | u64::from(sqe.cdw13.get()) << 32,
        }
    }
}

/// Completion, dword 0: the reset was done before the command was completed (Immediate Reset Successful).
pub const IMMEDIATE: u32 = 1;
/// Get Log Page, dword 10: resets that are over leave the log with this reading (Remove Completed).
pub const REMOVE_COMPLETED: u32 = 1 << 8;
/// Entries of the log at most; with them it has 4096 bytes.
pub const ENTRIES_MAX: usize = 511;

/// What the log begins with.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CrossResetHeader {
    /// Entries that follow (an ordinary count).
    pub ne: U16,
    /// Reserved.
    pub reserved2: [u8; 6],
}

/// One reset that was asked for.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CrossResetEntry {
    /// The impacted controller's ID.
    pub icid: U16,
    /// Its uniquifier.
    pub ciu: u8,
    /// Reserved.
    pub reserved3: u8,
    /// A controller to ask instead; [`NO_ALTERNATE`] is none.
    pub acid: U16,
    /// How far it has come: see [`ccrs`].
    pub ccrs: u8,
    /// See [`ccrf`].
    pub ccrf: u8,
}

const _: () = assert!(size_of::<CrossResetHeader>() == 8 && size_of::<CrossResetEntry>() == 8);

/// [`CrossResetEntry::acid`] without a controller.
pub const NO_ALTERNATE: u16 = 0xffff;

/// Values of [`CrossResetEntry::ccrs`].
pub mod ccrs {
    /// The reset goes on.
    pub const IN_PROGRESS: u8 = 0;
    /// It is done: no command of the controller is carried out any more.
    pub const SUCCESS: u8 = 1;
    /// It has come to nothing.
    pub const FAILED: u8 = 2;
}

/// Bits of [`CrossResetEntry::ccrf`].
pub mod ccrf {
    /// There is such a controller, and it is the same host's.
    pub const VALIDATED: u8 = 1 << 0;
    /// Its reset was begun.
    pub const INITIATED: u8 = 1 << 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_has_everything_where_the_specification_puts_it() {
        let instance = ControllerInstance {
            cntlid: 0x1234,
            ciu: 0xa5,
            cirn: 0x1122_3344_5566_7788,
        };
        let sqe = instance.to_sqe();
        assert_eq!(sqe.opcode, 0x38);
        assert_eq!(sqe.cdw10.get(), 0x00a5_1234);
        assert_eq!(
            (sqe.cdw12.get(), sqe.cdw13.get()),
            (0x5566_7788, 0x1122_3344)
        );
        assert_eq!(ControllerInstance::from_sqe(&sqe), instance);
    }
}
