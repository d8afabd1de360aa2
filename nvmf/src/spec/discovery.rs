//! The discovery log page: a header, and a record for each way to a subsystem.

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::nqn::NQN_FIELD_LEN;

/// Length of the header and of every record.
pub const RECORD_LEN: usize = 1024;

/// The port that IANA gave NVMe over Fabrics discovery.
pub const DISCOVERY_PORT: u16 = 8009;
/// The port that IANA gave NVMe over Fabrics I/O.
pub const IO_PORT: u16 = 4420;

/// Header of the log (Base, figure "Discovery Log Page").
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DiscoveryHeader {
    /// Changes of the log so far.
    pub genctr: U64,
    /// Records that follow.
    pub numrec: U64,
    /// Format of the records; 0 is the only one.
    pub recfmt: U16,
    /// Reserved.
    pub reserved18: [u8; 1006],
}

/// One record (Base, figure "Discovery Log Page Entry Data Structure").
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DiscoveryRecord {
    /// Transport type: see [`super::trtype`].
    pub trtype: u8,
    /// Address family: see [`adrfam`].
    pub adrfam: u8,
    /// What the record leads to: see [`subtype`].
    pub subtype: u8,
    /// Transport requirements: see [`treq`].
    pub treq: u8,
    /// The subsystem port.
    pub portid: U16,
    /// Controller to ask for; [`super::fabrics::CNTLID_DYNAMIC`] = any.
    pub cntlid: U16,
    /// Largest admin queue, in entries.
    pub asqsz: U16,
    /// Flags: see [`eflags`].
    pub eflags: U16,
    /// Reserved.
    pub reserved12: [u8; 20],
    /// Transport service: the port number as text.
    pub trsvcid: [u8; 32],
    /// Reserved.
    pub reserved64: [u8; 192],
    /// Subsystem NQN, zero-terminated.
    pub subnqn: [u8; NQN_FIELD_LEN],
    /// Transport address as text.
    pub traddr: [u8; 256],
    /// Transport-specific; for TCP the first byte is SECTYPE: see [`sectype`].
    pub tsas: [u8; 256],
}

const _: () = {
    assert!(size_of::<DiscoveryHeader>() == RECORD_LEN);
    assert!(size_of::<DiscoveryRecord>() == RECORD_LEN);
    assert!(std::mem::offset_of!(DiscoveryRecord, trsvcid) == 32);
    assert!(std::mem::offset_of!(DiscoveryRecord, subnqn) == 256);
    assert!(std::mem::offset_of!(DiscoveryRecord, traddr) == 512);
    assert!(std::mem::offset_of!(DiscoveryRecord, tsas) == 768);
};

/// Values of [`DiscoveryRecord::adrfam`].
pub mod adrfam {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const IPV4: u8 = 1;
    pub const IPV6: u8 = 2;
}

/// Values of [`DiscoveryRecord::subtype`].
pub mod subtype {
    /// Another discovery subsystem.
    pub const REFERRAL: u8 = 1;
    /// A subsystem with namespaces.
    pub const NVM: u8 = 2;
    /// The discovery subsystem that the log comes from.
    pub const CURRENT: u8 = 3;
}

/// Fields of [`DiscoveryRecord::treq`].
pub mod treq {
    /// Mask of the secure channel field.
    pub const SECURE_CHANNEL_MASK: u8 = 3;
    /// A secure channel is required.
    pub const SECURE_CHANNEL_REQUIRED: u8 = 1;
    /// A secure channel is not required.
    pub const SECURE_CHANNEL_NOT_REQUIRED: u8 = 2;
    /// SQ flow control can be turned off.
    pub const DISABLE_SQ_FLOW: u8 = 1 << 2;
}

/// Bits of [`DiscoveryRecord::eflags`].
pub mod eflags {
    /// All records with this bit lead to the same log.
    pub const DUPRETINFO: u16 = 1 << 0;
    /// A host may stay connected.
    pub const EPCSD: u16 = 1 << 1;
}

/// SECTYPE of TCP.
pub mod sectype {
    /// No transport security.
    pub const NONE: u8 = 0;
}
