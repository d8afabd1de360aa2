//! The Get Log Page command, and the identifiers of log pages.

use super::opcode::admin;
use super::sqe::Sqe;

/// Log page identifiers (Base, figure "Log Page Identifiers").
pub mod lid {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const SUPPORTED: u8 = 0x00;
    pub const ERROR: u8 = 0x01;
    pub const HEALTH: u8 = 0x02;
    pub const FIRMWARE: u8 = 0x03;
    pub const CHANGED_NAMESPACES: u8 = 0x04;
    pub const EFFECTS: u8 = 0x05;
    pub const ANA: u8 = 0x0c;
    pub const CROSS_CONTROLLER_RESET: u8 = 0x1e;
    pub const DISCOVERY: u8 = 0x70;
}

/// Get Log Page, dword 10: events that the page belongs to are not cleared (Retain Asynchronous Event).
pub const RETAIN_EVENT: u32 = 1 << 15;
/// Length of the changed namespace list; the list of one entry [`super::NSID_ALL`] means "too many".
pub const CHANGED_NAMESPACES_LEN: usize = 4096;

/// A Get Log Page command taken apart: which part of which page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GetLogPage {
    /// The page: see [`lid`].
    pub lid: u8,
    /// First byte of the part; a multiple of 4.
    pub offset: u64,
    /// Bytes of the part: a multiple of 4, from 4 to 16 GiB (NUMD made one-based).
    pub len: u64,
}

impl GetLogPage {
    /// As a command.
    pub fn to_sqe(self) -> Sqe {
        debug_assert!(self.len >= 4 && self.len.is_multiple_of(4));
        let numd = (self.len / 4).wrapping_sub(1) as u32;
        let mut sqe = Sqe::new(admin::GET_LOG_PAGE, 0);
        sqe.cdw10 = (u32::from(self.lid) | numd << 16).into();
        sqe.cdw11 = (numd >> 16).into();
        sqe.cdw12 = (self.offset as u32).into();
        sqe.cdw13 = ((self.offset >> 32) as u32).into();
        sqe
    }

    /// From a command that is a Get Log Page.
    pub fn from_sqe(sqe: &Sqe) -> Self {
        let numd = u64::from(sqe.cdw10.get() >> 16) | u64::from(sqe.cdw11.get() & 0xffff) << 16;
        Self {
            lid: sqe.cdw10.get() as u8,
            offset: u64::from(sqe.cdw12.get()) | u64::from(sqe.cdw13.get()) << 32,
            len: (numd + 1) * 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_page_survives_the_wire() {
        for (offset, len) in [
            (0, 4),
            (1024, 4096),
            (0x1_2345_6788, 1 << 20),
            (0, 16 << 30),
        ] {
            let part = GetLogPage {
                lid: lid::DISCOVERY,
                offset,
                len,
            };
            assert_eq!(GetLogPage::from_sqe(&part.to_sqe()), part);
        }
    }
}
