//! Fabrics commands: Connect with its data, and the property commands.

use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::nqn::NQN_FIELD_LEN;
use super::opcode::fabrics;
use super::sqe::Sqe;

/// CNTLID of a Connect that lets the subsystem choose (dynamic model).
pub const CNTLID_DYNAMIC: u16 = 0xffff;
/// CNTLID of a Connect that asks for any static controller.
pub const CNTLID_STATIC_ANY: u16 = 0xfffe;
/// Largest CNTLID of a controller.
pub const CNTLID_MAX: u16 = 0xffef;
/// CATTR bit: SQ flow control is not wanted.
pub const CATTR_DISABLE_SQ_FLOW: u8 = 1 << 2;
/// SQHD of a Connect response when SQ flow control is off.
pub const SQHD_FLOW_DISABLED: u16 = 0xffff;
/// Bits of the Connect response's result that say authentication is demanded (ATR, ASCR).
pub const CONNECT_AUTHREQ_MASK: u32 = 3 << 17;

/// Data of the Connect command, 1024 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConnectData {
    /// Host identifier.
    pub hostid: [u8; 16],
    /// Controller wanted, or [`CNTLID_DYNAMIC`].
    pub cntlid: U16,
    /// Reserved.
    pub reserved18: [u8; 238],
    /// Subsystem NQN, zero-terminated.
    pub subnqn: [u8; NQN_FIELD_LEN],
    /// Host NQN, zero-terminated.
    pub hostnqn: [u8; NQN_FIELD_LEN],
    /// Reserved.
    pub reserved768: [u8; 256],
}

const _: () = assert!(size_of::<ConnectData>() == 1024);

/// The Connect command's own fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connect {
    /// Record format; 0 is the only one.
    pub recfmt: u16,
    /// Queue: 0 admin, otherwise I/O.
    pub qid: u16,
    /// Queue size, zero-based.
    pub sqsize: u16,
    /// Attributes: [`CATTR_DISABLE_SQ_FLOW`] and others.
    pub cattr: u8,
    /// Keep-alive time-out in milliseconds; admin queue only.
    pub kato: u32,
}

impl Connect {
    /// As a command; the transport describes the data.
    pub fn to_sqe(self) -> Sqe {
        let mut sqe = Sqe::fabrics(fabrics::CONNECT);
        sqe.cdw10 = (u32::from(self.recfmt) | u32::from(self.qid) << 16).into();
        sqe.cdw11 = (u32::from(self.sqsize) | u32::from(self.cattr) << 16).into();
        sqe.cdw12 = self.kato.into();
        sqe
    }

    /// From a command that is a Connect.
    pub fn from_sqe(sqe: &Sqe) -> Self {
        Self {
            recfmt: sqe.cdw10.get() as u16,
            qid: (sqe.cdw10.get() >> 16) as u16,
            sqsize: sqe.cdw11.get() as u16,
            cattr: (sqe.cdw11.get() >> 16) as u8,
            kato: sqe.cdw12.get(),
        }
    }
}

/// Byte offsets of Connect fields, as error responses name them.
pub mod connect_offset {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const SGL1: u16 = 24;
    pub const RECFMT: u16 = 40;
    pub const QID: u16 = 42;
    pub const SQSIZE: u16 = 44;
    pub const KATO: u16 = 48;
    pub const DATA_HOSTID: u16 = 0;
    pub const DATA_CNTLID: u16 = 16;
    pub const DATA_SUBNQN: u16 = 256;
    pub const DATA_HOSTNQN: u16 = 512;
}

/// Result of a refused Connect: where the offending parameter is (IPO), and whether that is an
/// offset into the data (IATTR) or into the command.
pub fn invalid_parameter(offset: u16, in_data: bool) -> u32 {
    u32::from(offset) | u32::from(in_data) << 16
}

/// Takes [`invalid_parameter`] apart.
pub fn invalid_parameter_parts(dw0: u32) -> (u16, bool) {
    (dw0 as u16, dw0 >> 16 & 1 != 0)
}

/// Size of a property: the ATTRIB field of property commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PropertySize {
    /// Four bytes.
    Four,
    /// Eight bytes.
    Eight,
}

/// Property Get of the property at `offset`.
pub fn property_get(offset: u32, size: PropertySize) -> Sqe {
    let mut sqe = Sqe::fabrics(fabrics::PROPERTY_GET);
    sqe.cdw10 = (matches!(size, PropertySize::Eight) as u32).into();
    sqe.cdw11 = offset.into();
    sqe
}

/// Property Set of a four-byte property.
pub fn property_set(offset: u32, value: u32) -> Sqe {
    let mut sqe = Sqe::fabrics(fabrics::PROPERTY_SET);
    sqe.cdw11 = offset.into();
    sqe.cdw12 = value.into();
    sqe
}

/// A property command taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Property {
    /// Size; `None` for a reserved value.
    pub size: Option<PropertySize>,
    /// Which property.
    pub offset: u32,
    /// Value to set.
    pub value: u64,
}

impl Property {
    /// From a Property Get or Set.
    pub fn from_sqe(sqe: &Sqe) -> Self {
        let size = match sqe.cdw10.get() & 7 {
            0 => Some(PropertySize::Four),
            1 => Some(PropertySize::Eight),
            _ => None,
        };
        let value = u64::from(sqe.cdw12.get()) | u64::from(sqe.cdw13.get()) << 32;
        Self {
            size,
            offset: sqe.cdw11.get(),
            value,
        }
    }
}
