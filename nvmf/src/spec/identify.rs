//! Data structures that Identify returns.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Length of every Identify structure.
pub const IDENTIFY_LEN: usize = 4096;

/// Controller or Namespace Structure values (Base, figure "CNS Values").
pub mod cns {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const NAMESPACE: u8 = 0x00;
    pub const CONTROLLER: u8 = 0x01;
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    pub const NAMESPACE_DESCRIPTORS: u8 = 0x03;
    pub const IO_NAMESPACE: u8 = 0x05;
    pub const IO_CONTROLLER: u8 = 0x06;
    pub const INDEPENDENT_NAMESPACE: u8 = 0x08;
}

/// Identify Controller (Base, figure "Identify Controller Data Structure").
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(missing_docs, reason = "field names are the specification's")]
pub struct IdentifyController {
    pub vid: U16,
    pub ssvid: U16,
    pub sn: [u8; 20],
    pub mn: [u8; 40],
    pub fr: [u8; 8],
    pub rab: u8,
    pub ieee: [u8; 3],
    pub cmic: u8,
    /// Largest data transfer, as a power of two of the smallest page; 0 = no limit.
    pub mdts: u8,
    pub cntlid: U16,
    pub ver: U32,
    pub rtd3r: U32,
    pub rtd3e: U32,
    pub oaes: U32,
    pub ctratt: U32,
    pub rrls: U16,
    pub reserved102: [u8; 9],
    /// Controller type: 1 I/O, 2 discovery.
    pub cntrltype: u8,
    pub fguid: [u8; 16],
    pub crdt: [U16; 3],
    pub crcap: u8,
    /// Controller Instance Uniquifier; 0 = not told.
    pub ciu: u8,
    /// Controller Instance Random Number.
    pub cirn: U64,
    pub reserved144: [u8; 109],
    pub nvmsr: u8,
    pub vwci: u8,
    pub mec: u8,
    pub oacs: U16,
    pub acl: u8,
    /// Outstanding Asynchronous Event Requests, zero-based.
    pub aerl: u8,
    pub frmw: u8,
    pub lpa: u8,
    pub elpe: u8,
    pub npss: u8,
    pub avscc: u8,
    pub apsta: u8,
    pub wctemp: U16,
    pub cctemp: U16,
    pub mtfa: U16,
    pub hmpre: U32,
    pub hmmin: U32,
    pub tnvmcap: [u8; 16],
    pub unvmcap: [u8; 16],
    pub rpmbs: U32,
    pub edstt: U16,
    pub dsto: u8,
    pub fwug: u8,
    /// Keep-alive granularity, in units of 100 ms.
    pub kas: U16,
    pub hctma: U16,
    pub mntmt: U16,
    pub mxtmt: U16,
    pub sanicap: U32,
    pub hmminds: U32,
    pub hmmaxd: U16,
    pub nsetidmax: U16,
    pub endgidmax: U16,
    pub anatt: u8,
    pub anacap: u8,
    pub anagrpmax: U32,
    pub nanagrpid: U32,
    pub pels: U32,
    pub domain_identifier: U16,
    pub reserved358: [u8; 10],
    pub megcap: [u8; 16],
    pub tmpthha: u8,
    pub mupa: u8,
    /// Command Quiesce Time in milliseconds; 0 = not told.
    pub cqt: U16,
    pub reserved388: [u8; 124],
    /// Submission entry sizes: required in bits 3:0, largest in 7:4.
    pub sqes: u8,
    /// Completion entry sizes: required in bits 3:0, largest in 7:4.
    pub cqes: u8,
    pub maxcmd: U16,
    /// Largest valid NSID.
    pub nn: U32,
    /// Optional NVM commands: see [`oncs`].
    pub oncs: U16,
    pub fuses: U16,
    pub fna: u8,
    /// Volatile write cache: bit 0 present; bits 2:1 whether a flush of all namespaces works.
    pub vwc: u8,
    pub awun: U16,
    pub awupf: U16,
    pub icsvscc: u8,
    pub nwpc: u8,
    pub acwu: U16,
    pub cdfs: U16,
    pub sgls: U32,
    pub mnan: U32,
    pub maxdna: [u8; 16],
    pub maxcna: U32,
    pub reserved564: [u8; 204],
    pub subnqn: [u8; 256],
    pub reserved1024: [u8; 768],
    /// I/O command capsule size, in units of 16 bytes.
    pub ioccsz: U32,
    /// I/O response capsule size, in units of 16 bytes.
    pub iorcsz: U32,
    /// In-capsule data offset, in units of 16 bytes.
    pub icdoff: U16,
    /// Fabrics attributes: bit 0 = static controllers.
    pub fcatt: u8,
    pub msdbd: u8,
    pub ofcs: U16,
    pub dctype: u8,
    /// Cross-Controller Resets that may go on at a time; 0 = the command is not supported.
    pub ccrl: u8,
    pub reserved1808: [u8; 240],
    pub psd: [u8; 1024],
    pub vs: [u8; 1024],
}

const _: () = {
    assert!(size_of::<IdentifyController>() == IDENTIFY_LEN);
    assert!(std::mem::offset_of!(IdentifyController, mdts) == 77);
    assert!(std::mem::offset_of!(IdentifyController, cntrltype) == 111);
    assert!(std::mem::offset_of!(IdentifyController, ciu) == 135);
    assert!(std::mem::offset_of!(IdentifyController, cirn) == 136);
    assert!(std::mem::offset_of!(IdentifyController, oacs) == 256);
    assert!(std::mem::offset_of!(IdentifyController, kas) == 320);
    assert!(std::mem::offset_of!(IdentifyController, cqt) == 386);
    assert!(std::mem::offset_of!(IdentifyController, sqes) == 512);
    assert!(std::mem::offset_of!(IdentifyController, sgls) == 536);
    assert!(std::mem::offset_of!(IdentifyController, subnqn) == 768);
    assert!(std::mem::offset_of!(IdentifyController, ioccsz) == 1792);
    assert!(std::mem::offset_of!(IdentifyController, ccrl) == 1807);
    assert!(std::mem::offset_of!(IdentifyController, psd) == 2048);
};

/// Bits of [`IdentifyController::oncs`].
pub mod oncs {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const COMPARE: u16 = 1 << 0;
    pub const WRITE_UNCORRECTABLE: u16 = 1 << 1;
    pub const DATASET_MANAGEMENT: u16 = 1 << 2;
    pub const WRITE_ZEROES: u16 = 1 << 3;
    pub const VERIFY: u16 = 1 << 7;
}

/// Bits of [`IdentifyController::cmic`].
pub mod cmic {
    /// The subsystem may have several ports.
    pub const PORTS: u8 = 1 << 0;
    /// The subsystem may have several controllers.
    pub const CONTROLLERS: u8 = 1 << 1;
    /// The subsystem reports asymmetric namespace access.
    pub const ANA: u8 = 1 << 3;
}

/// Bits of [`IdentifyController::lpa`].
pub mod lpa {
    /// Commands supported and effects.
    pub const EFFECTS: u8 = 1 << 1;
    /// Parts of a log page at any offset, and of any length.
    pub const EXTENDED: u8 = 1 << 2;
}

/// Bits of [`IdentifyController::ctratt`].
pub mod ctratt {
    /// The host identifier has 128 bits.
    pub const HOST_ID_128: u32 = 1 << 0;
    /// Any traffic counts as keep-alive.
    pub const TBKAS: u32 = 1 << 6;
}

/// One LBA format.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct LbaFormat {
    /// Metadata bytes for each block.
    pub ms: U16,
    /// Block size as a power of two.
    pub lbads: u8,
    /// Relative performance.
    pub rp: u8,
}

/// Identify Namespace (NVM Command Set, figure "Identify Namespace Data Structure").
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(missing_docs, reason = "field names are the specification's")]
pub struct IdentifyNamespace {
    /// Size in blocks.
    pub nsze: U64,
    pub ncap: U64,
    pub nuse: U64,
    pub nsfeat: u8,
    /// Number of LBA formats, zero-based.
    pub nlbaf: u8,
    /// Format in use: index bits 3:0, with 6:5 as its upper bits; bit 4 = extended LBAs.
    pub flbas: u8,
    pub mc: u8,
    pub dpc: u8,
    /// Protection type in use in bits 2:0; 0 = none.
    pub dps: u8,
    pub nmic: u8,
    pub rescap: u8,
    pub fpi: u8,
    /// What reads of deallocated blocks return: bits 2:0, 1 = zeroes.
    pub dlfeat: u8,
    pub nawun: U16,
    pub nawupf: U16,
    pub nacwu: U16,
    pub nabsn: U16,
    pub nabo: U16,
    pub nabspf: U16,
    /// Optimal I/O boundary in blocks; 0 = none.
    pub noiob: U16,
    pub nvmcap: [u8; 16],
    /// Preferred write granularity, zero-based blocks; valid with NSFEAT bit 4.
    pub npwg: U16,
    pub npwa: U16,
    pub npdg: U16,
    pub npda: U16,
    /// Optimal write size, zero-based blocks; valid with NSFEAT bit 4.
    pub nows: U16,
    pub mssrl: U16,
    pub mcl: U32,
    pub msrc: u8,
    pub reserved81: [u8; 11],
    pub anagrpid: U32,
    pub reserved96: [u8; 3],
    /// Attributes: bit 0 = write protected.
    pub nsattr: u8,
    pub nvmsetid: U16,
    pub endgid: U16,
    pub nguid: [u8; 16],
    pub eui64: [u8; 8],
    pub lbaf: [LbaFormat; 64],
    pub vs: [u8; 3712],
}

const _: () = {
    assert!(size_of::<IdentifyNamespace>() == IDENTIFY_LEN);
    assert!(std::mem::offset_of!(IdentifyNamespace, npwg) == 64);
    assert!(std::mem::offset_of!(IdentifyNamespace, nows) == 72);
    assert!(std::mem::offset_of!(IdentifyNamespace, nguid) == 104);
    assert!(std::mem::offset_of!(IdentifyNamespace, lbaf) == 128);
};

impl IdentifyNamespace {
    /// NSFEAT bit: the optimal write fields are valid.
    pub const NSFEAT_OPTPERF: u8 = 1 << 4;

    /// The LBA format in use, if FLBAS names one that exists.
    pub fn format(&self) -> Option<LbaFormat> {
        let index = usize::from(self.flbas & 0xf | (self.flbas >> 1 & 0x30));
        (index <= usize::from(self.nlbaf))
            .then(|| self.lbaf.get(index).copied())
            .flatten()
    }
}

/// Namespace Identification Descriptor types.
pub mod nidt {
    #![expect(missing_docs, reason = "the names are the specification's")]
    pub const EUI64: u8 = 1;
    pub const NGUID: u8 = 2;
    pub const UUID: u8 = 3;
    pub const CSI: u8 = 4;
}

/// Header of one Namespace Identification Descriptor; NIDL bytes follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NamespaceDescriptorHeader {
    /// Type: see [`nidt`]; 0 ends the list.
    pub nidt: u8,
    /// Length of the identifier in bytes.
    pub nidl: u8,
    /// Reserved.
    pub reserved: [u8; 2],
}
