//! Controller properties: offsets, and the bits of CAP, CC and CSTS.

/// Property offsets (Base, figure "Property Definition").
pub mod offset {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const CAP: u32 = 0x00;
    pub const VS: u32 = 0x08;
    pub const CC: u32 = 0x14;
    pub const CSTS: u32 = 0x1c;
    pub const NSSR: u32 = 0x20;
}

/// Controller capabilities, 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cap(pub u64);

impl Cap {
    /// CSS bit: the NVM command set is supported.
    pub const CSS_NVM: u64 = 1 << 37;
    /// CSS bit: one or more I/O command sets, chosen by CC.CSS 6.
    pub const CSS_IOCSS: u64 = 1 << 43;
    /// Contiguous queues required; always set on fabrics.
    pub const CQR: u64 = 1 << 16;

    /// Largest queue in entries (MQES is zero-based).
    pub fn max_queue_entries(self) -> u32 {
        (self.0 as u32 & 0xffff) + 1
    }

    /// Longest time to become ready, in units of 500 ms.
    pub fn to(self) -> u8 {
        (self.0 >> 24) as u8
    }

    /// Smallest memory page, in bytes.
    pub fn mps_min(self) -> u64 {
        1 << (12 + (self.0 >> 48 & 0xf))
    }

    /// Largest memory page, in bytes.
    pub fn mps_max(self) -> u64 {
        1 << (12 + (self.0 >> 52 & 0xf))
    }

    /// The NVM command set can be chosen.
    pub fn supports_nvm(self) -> bool {
        self.0 & (Self::CSS_NVM | Self::CSS_IOCSS) != 0
    }
}

/// Controller configuration, 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cc(pub u32);

impl Cc {
    /// Enable.
    pub const EN: u32 = 1;
    /// SHN value: normal shutdown, in place.
    pub const SHN_NORMAL: u32 = 1 << 14;
    /// SHN value: abrupt shutdown, in place.
    pub const SHN_ABRUPT: u32 = 2 << 14;
    /// Mask of SHN.
    pub const SHN_MASK: u32 = 3 << 14;

    /// The value that enables a fabrics controller: EN, entry sizes 64 and 16 bytes, page size
    /// 2^(12+`mps`), NVM command set.
    pub fn enable(mps: u32) -> Self {
        Self(Self::EN | (mps & 0xf) << 7 | 6 << 16 | 4 << 20)
    }

    /// Enabled.
    pub fn en(self) -> bool {
        self.0 & Self::EN != 0
    }

    /// Command set selected, bits 6:4.
    pub fn css(self) -> u32 {
        self.0 >> 4 & 7
    }

    /// Page size selected, as the power above 4096.
    pub fn mps(self) -> u32 {
        self.0 >> 7 & 0xf
    }

    /// Arbitration mechanism.
    pub fn ams(self) -> u32 {
        self.0 >> 11 & 7
    }

    /// Shutdown notification, 0 to 3.
    pub fn shn(self) -> u32 {
        self.0 >> 14 & 3
    }

    /// I/O submission entry size, as a power of two.
    pub fn iosqes(self) -> u32 {
        self.0 >> 16 & 0xf
    }

    /// I/O completion entry size, as a power of two.
    pub fn iocqes(self) -> u32 {
        self.0 >> 20 & 0xf
    }
}

/// Controller status, 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Csts(pub u32);

impl Csts {
    /// Ready.
    pub const RDY: u32 = 1;
    /// Controller fatal status.
    pub const CFS: u32 = 1 << 1;
    /// SHST: shutdown occurring.
    pub const SHST_OCCURRING: u32 = 1 << 2;
    /// SHST: shutdown complete.
    pub const SHST_COMPLETE: u32 = 2 << 2;
    /// Mask of SHST.
    pub const SHST_MASK: u32 = 3 << 2;

    /// Ready.
    pub fn rdy(self) -> bool {
        self.0 & Self::RDY != 0
    }

    /// Fatal status.
    pub fn cfs(self) -> bool {
        self.0 & Self::CFS != 0
    }

    /// Shutdown is complete.
    pub fn shutdown_complete(self) -> bool {
        self.0 & Self::SHST_MASK == Self::SHST_COMPLETE
    }
}
