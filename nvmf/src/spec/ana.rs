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
    /// State in bits 3:0: see [`AnaState`].
    pub state: u8,
    /// Reserved.
    pub reserved17: [u8; 15],
}

const _: () = assert!(size_of::<AnaHeader>() == 16 && size_of::<AnaGroupDescriptor>() == 32);

/// Mask of the state in [`AnaGroupDescriptor::state`].
pub const STATE_MASK: u8 = 0xf;

/// How namespaces can be reached through one controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AnaState {
    /// The best way.
    Optimized = 1,
    /// It works, others are better.
    NonOptimized = 2,
    /// It does not work now.
    Inaccessible = 3,
    /// It will not work any more.
    PersistentLoss = 4,
    /// It changes, for no longer than the controller's ANATT says.
    Change = 0xf,
}

impl AnaState {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Optimized,
        Self::NonOptimized,
        Self::Inaccessible,
        Self::PersistentLoss,
        Self::Change,
    ];

    /// From bits 3:0; `None` of a value that the specification does not define.
    pub fn from_wire(state: u8) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|&known| known as u8 == state & STATE_MASK)
    }

    /// Its name, as Linux and nvme-cli have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Optimized => "optimized",
            Self::NonOptimized => "non-optimized",
            Self::Inaccessible => "inaccessible",
            Self::PersistentLoss => "persistent-loss",
            Self::Change => "change",
        }
    }
}

impl std::fmt::Display for AnaState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
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
