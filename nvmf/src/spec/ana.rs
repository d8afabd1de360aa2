//! Asymmetric Namespace Access: the log page, and the states and bits that go with it.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Header of the log (Base, figure "Asymmetric Namespace Access Log Page").
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct AnaHeader {
    /// Changes of the log so far.
    pub chgcnt: U64,
    /// Group descriptors that follow.
    pub ngrps: U16,
    /// Reserved.
    pub reserved10: [u8; 6],
}

/// One group; NNSIDS namespace identifiers of four bytes follow (Base, figure "ANA Group
/// Descriptor format").
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct AnaGroupDescriptor {
    /// The group, from 1.
    pub anagrpid: U32,
    /// Namespace identifiers that follow; 0 when only groups were asked for.
    pub nnsids: U32,
    /// Change count of the log when this group last changed.
    pub chgcnt: U64,
    /// State in bits 3:0: see [`state`].
    pub state: u8,
    /// Reserved.
    pub reserved17: [u8; 15],
}

const _: () = assert!(size_of::<AnaHeader>() == 16 && size_of::<AnaGroupDescriptor>() == 32);

/// States of a group on one controller.
pub mod state {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const MASK: u8 = 0xf;
    pub const OPTIMIZED: u8 = 1;
    pub const NON_OPTIMIZED: u8 = 2;
    pub const INACCESSIBLE: u8 = 3;
    pub const PERSISTENT_LOSS: u8 = 4;
    pub const CHANGE: u8 = 0xf;
}

/// Bits of ANACAP in Identify Controller.
pub mod anacap {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const OPTIMIZED: u8 = 1 << 0;
    pub const NON_OPTIMIZED: u8 = 1 << 1;
    pub const INACCESSIBLE: u8 = 1 << 2;
    pub const PERSISTENT_LOSS: u8 = 1 << 3;
    pub const CHANGE: u8 = 1 << 4;
    /// A namespace stays in its group as long as it is attached.
    pub const GROUP_IS_FIXED: u8 = 1 << 6;
    /// ANAGRPID may be given when a namespace is managed.
    pub const GROUP_CAN_BE_CHOSEN: u8 = 1 << 7;
}

/// Get Log Page's log specific parameter, in dword 10: return groups without their namespaces.
pub const LSP_GROUPS_ONLY: u32 = 1 << 8;
