//! The 64-byte submission queue entry, and its 16-byte SGL descriptor.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::opcode::{admin, fabrics, nvm};

/// SGL descriptor types (high nibble) and sub-types (low nibble) that NVMe/TCP knows.
pub mod sgl_type {
    /// Data block, sub-type offset: the data is inside the capsule.
    pub const IN_CAPSULE: u8 = 0x01;
    /// Transport data block, transport-specific sub-type: the transport moves the data.
    pub const TRANSPORT: u8 = 0x5a;
}

/// SGL descriptor as fabrics use it (Base, section "SGL").
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SglDescriptor {
    /// Offset inside the capsule, or a key; 0 on TCP.
    pub address: U64,
    /// Bytes of data.
    pub length: U32,
    /// Reserved.
    pub reserved: [u8; 3],
    /// One of [`sgl_type`].
    pub sgl_type: u8,
}

/// Submission queue entry (Base, figure "Common Command Format").
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Sqe {
    /// Opcode: see [`super::opcode`].
    pub opcode: u8,
    /// FUSE in bits 1:0, PSDT in bits 7:6.
    pub flags: u8,
    /// Command identifier; the transport's host side fills it in.
    pub cid: U16,
    /// Namespace identifier; for Fabrics commands the first byte is FCTYPE.
    pub nsid: U32,
    /// Command dwords 2 and 3.
    pub cdw2_3: U64,
    /// Metadata pointer.
    pub mptr: U64,
    /// Data pointer: always one SGL descriptor on fabrics.
    pub sgl1: SglDescriptor,
    /// Command dword 10.
    pub cdw10: U32,
    /// Command dword 11.
    pub cdw11: U32,
    /// Command dword 12.
    pub cdw12: U32,
    /// Command dword 13.
    pub cdw13: U32,
    /// Command dword 14.
    pub cdw14: U32,
    /// Command dword 15.
    pub cdw15: U32,
}

const _: () = assert!(size_of::<Sqe>() == 64 && size_of::<SglDescriptor>() == 16);

/// Mask of PSDT in [`Sqe::flags`].
pub const PSDT_MASK: u8 = 0xc0;
/// PSDT: SGLs are used (the only value that fabrics allow).
pub const PSDT_SGL: u8 = 0x40;
/// Mask of FUSE in [`Sqe::flags`].
pub const FUSE_MASK: u8 = 0x03;

/// Read, Write and Write Zeroes, dword 12: force unit access.
pub const CDW12_FUA: u32 = 1 << 30;
/// Write Zeroes, dword 12: deallocate.
pub const CDW12_DEAC: u32 = 1 << 25;
/// Dataset Management, dword 11: attribute deallocate.
pub const CDW11_DSM_DEALLOCATE: u32 = 1 << 2;

/// One range of Dataset Management (NVM Command Set, figure "Range Definition").
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct DsmRange {
    /// Context attributes.
    pub cattr: U32,
    /// Length in blocks (an ordinary count).
    pub nlb: U32,
    /// First block.
    pub slba: U64,
}

const _: () = assert!(size_of::<DsmRange>() == 16);

impl Sqe {
    /// A command with this opcode and namespace, everything else zero.
    pub fn new(opcode: u8, nsid: u32) -> Self {
        Self {
            opcode,
            nsid: nsid.into(),
            ..Self::default()
        }
    }

    fn blocks(opcode: u8, nsid: u32, slba: u64, count: u32, cdw12: u32) -> Self {
        debug_assert!((1..=0x1_0000).contains(&count));
        let mut sqe = Self::new(opcode, nsid);
        sqe.set_slba(slba);
        sqe.cdw12 = (cdw12 | (count.wrapping_sub(1) & 0xffff)).into();
        sqe
    }

    /// Read of `count` blocks (1 to 65536).
    pub fn read(nsid: u32, slba: u64, count: u32) -> Self {
        Self::blocks(nvm::READ, nsid, slba, count, 0)
    }

    /// Write of `count` blocks (1 to 65536).
    pub fn write(nsid: u32, slba: u64, count: u32, fua: bool) -> Self {
        Self::blocks(
            nvm::WRITE,
            nsid,
            slba,
            count,
            if fua { CDW12_FUA } else { 0 },
        )
    }

    /// Write Zeroes over `count` blocks (1 to 65536); `deallocate` permits the controller to
    /// unmap them.
    pub fn write_zeroes(nsid: u32, slba: u64, count: u32, deallocate: bool, fua: bool) -> Self {
        let deac = if deallocate { CDW12_DEAC } else { 0 };
        let fua = if fua { CDW12_FUA } else { 0 };
        Self::blocks(nvm::WRITE_ZEROES, nsid, slba, count, deac | fua)
    }

    /// Flush of one namespace.
    pub fn flush(nsid: u32) -> Self {
        Self::new(nvm::FLUSH, nsid)
    }

    /// Dataset Management, deallocate, over `ranges` ranges (1 to 256) that the data holds.
    pub fn deallocate(nsid: u32, ranges: u32) -> Self {
        debug_assert!((1..=256).contains(&ranges));
        let mut sqe = Self::new(nvm::DATASET_MANAGEMENT, nsid);
        sqe.cdw10 = (ranges.wrapping_sub(1) & 0xff).into();
        sqe.cdw11 = CDW11_DSM_DEALLOCATE.into();
        sqe
    }

    /// Identify of structure `cns`.
    pub fn identify(cns: u8, nsid: u32, cntid: u16) -> Self {
        let mut sqe = Self::new(admin::IDENTIFY, nsid);
        sqe.cdw10 = (u32::from(cns) | u32::from(cntid) << 16).into();
        sqe
    }

    /// Set Features of `fid` with `value` in dword 11.
    pub fn set_features(fid: u8, value: u32) -> Self {
        let mut sqe = Self::new(admin::SET_FEATURES, 0);
        sqe.cdw10 = u32::from(fid).into();
        sqe.cdw11 = value.into();
        sqe
    }

    /// Keep Alive.
    pub fn keep_alive() -> Self {
        Self::new(admin::KEEP_ALIVE, 0)
    }

    /// Asynchronous Event Request.
    pub fn async_event_request() -> Self {
        Self::new(admin::ASYNC_EVENT_REQUEST, 0)
    }

    /// A Fabrics command of this FCTYPE.
    pub fn fabrics(fctype: u8) -> Self {
        Self::new(fabrics::OPCODE, u32::from(fctype))
    }

    /// FCTYPE of a Fabrics command.
    pub fn fctype(&self) -> u8 {
        self.nsid.get() as u8
    }

    /// Starting LBA of an NVM command: dwords 10 and 11.
    pub fn slba(&self) -> u64 {
        u64::from(self.cdw10.get()) | u64::from(self.cdw11.get()) << 32
    }

    fn set_slba(&mut self, slba: u64) {
        self.cdw10 = (slba as u32).into();
        self.cdw11 = ((slba >> 32) as u32).into();
    }

    /// Block count of an NVM command (1 to 65536): NLB made one-based.
    pub fn block_count(&self) -> u32 {
        (self.cdw12.get() & 0xffff) + 1
    }

    /// Force unit access asked for.
    pub fn fua(&self) -> bool {
        self.cdw12.get() & CDW12_FUA != 0
    }

    /// The PSDT bits.
    pub fn psdt(&self) -> u8 {
        self.flags & PSDT_MASK
    }

    /// The FUSE bits.
    pub fn fuse(&self) -> u8 {
        self.flags & FUSE_MASK
    }
}
