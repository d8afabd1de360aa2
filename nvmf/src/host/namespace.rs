//! A namespace as its controller describes it: what it is called, its limits, and whether it can
//! be served as a disk.

use uuid::Uuid;
use zerocopy::FromBytes;

use crate::spec::identify::{IdentifyNamespace, NamespaceDescriptorHeader, nidt};

/// Block sizes that are served, as powers of two: 512 bytes to 64 KiB.
const LBADS: std::ops::RangeInclusive<u8> = 9..=16;
/// DLFEAT bits 2:0: deallocated blocks read as zeroes.
const DLFEAT_ZEROES: u8 = 1;
/// DLFEAT bit 3: Write Zeroes may deallocate.
const DLFEAT_WRITE_ZEROES_DEALLOCATES: u8 = 1 << 3;
/// NSFEAT bit 5, the upper of OPTPERF.
const NSFEAT_OPTPERF_HIGH: u8 = 1 << 5;
/// NSATTR bit 0: write protected now.
const NSATTR_WRITE_PROTECTED: u8 = 1;

/// Which namespace of a subsystem is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamespaceSelector {
    /// The only one; an error when there are several.
    Only,
    /// By its namespace ID.
    Nsid(u32),
    /// By its UUID.
    Uuid(Uuid),
    /// By its NGUID.
    Nguid([u8; 16]),
}

impl std::fmt::Display for NamespaceSelector {
    /// As in the query of a URI.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Only => f.write_str("(the only one)"),
            Self::Nsid(nsid) => write!(f, "nsid={nsid}"),
            Self::Uuid(uuid) => write!(f, "uuid={uuid}"),
            Self::Nguid(nguid) => write!(f, "nguid={:032x}", u128::from_be_bytes(*nguid)),
        }
    }
}

/// A namespace that can be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamespaceInfo {
    /// Namespace ID.
    pub nsid: u32,
    /// Bytes of a block: a power of two, 512 to 65536.
    pub block_size: u32,
    /// Blocks, at least 1.
    pub block_count: u64,
    /// UUID.
    pub uuid: Option<Uuid>,
    /// NGUID.
    pub nguid: Option<[u8; 16]>,
    /// EUI-64.
    pub eui64: Option<[u8; 8]>,
    /// Writes fail now.
    pub write_protected: bool,
    /// Blocks that were deallocated read as zeroes.
    pub deallocated_reads_zero: bool,
    /// Write Zeroes with the deallocate bit deallocates.
    pub write_zeroes_deallocates: bool,
    /// What is best for speed.
    pub optimal: OptimalIo,
    /// ANA group; 0 = none.
    pub anagrpid: u32,
}

impl NamespaceInfo {
    /// Size in bytes.
    pub fn capacity(&self) -> u64 {
        // Checked when the description was read.
        self.block_count * u64::from(self.block_size)
    }
}

/// Sizes that perform best, in blocks; `None` = not told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OptimalIo {
    /// Commands should not cross multiples of this (NOIOB).
    pub boundary: Option<u32>,
    /// Writes should be multiples of this (NPWG).
    pub write_granularity: Option<u32>,
    /// Writes should begin at multiples of this (NPWA).
    pub write_alignment: Option<u32>,
    /// Writes should have this size (NOWS).
    pub write_size: Option<u32>,
    /// Deallocations should be multiples of this (NPDG).
    pub deallocate_granularity: Option<u32>,
    /// Deallocations should begin at multiples of this (NPDA).
    pub deallocate_alignment: Option<u32>,
}

impl OptimalIo {
    fn from_identify(data: &IdentifyNamespace) -> Self {
        let one_based = |zero_based: u16| Some(u32::from(zero_based) + 1);
        let boundary = Some(u32::from(data.noiob.get())).filter(|&blocks| blocks != 0);
        let told = |bits: u8, value| one_based(value).filter(|_| data.nsfeat & bits != 0);
        // Of two bits, either is for what writes should be. The upper, which came with version 2.1, leaves the
        // deallocation fields to others of another structure.
        let deallocates = IdentifyNamespace::NSFEAT_OPTPERF;
        let writes = deallocates | NSFEAT_OPTPERF_HIGH;
        Self {
            boundary,
            write_granularity: told(writes, data.npwg.get()),
            write_alignment: told(writes, data.npwa.get()),
            write_size: told(writes, data.nows.get()),
            deallocate_granularity: told(deallocates, data.npdg.get()),
            deallocate_alignment: told(deallocates, data.npda.get()),
        }
    }
}

/// What a namespace is called, whether or not it can be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Identifiers {
    pub(super) uuid: Option<Uuid>,
    pub(super) nguid: Option<[u8; 16]>,
    pub(super) eui64: Option<[u8; 8]>,
}

impl Identifiers {
    /// From Identify Namespace, where older controllers tell NGUID and EUI-64.
    pub(super) fn from_identify(data: &IdentifyNamespace) -> Self {
        Self {
            uuid: None,
            nguid: set(data.nguid),
            eui64: set(data.eui64),
        }
    }

    /// Adds what a list of Namespace Identification Descriptors says. The list ends with a zero
    /// type or with the data; descriptors of a wrong length or of unknown type are passed over.
    pub(super) fn add_descriptors(&mut self, mut list: &[u8]) {
        while let Ok((header, rest)) = NamespaceDescriptorHeader::ref_from_prefix(list) {
            if header.nidt == 0 {
                return;
            }
            let Some((id, rest)) = rest.split_at_checked(usize::from(header.nidl)) else {
                return;
            };
            list = rest;
            match header.nidt {
                nidt::UUID => {
                    let id = id.try_into().ok().and_then(set::<16>);
                    self.uuid = id.map(Uuid::from_bytes).or(self.uuid);
                }
                nidt::NGUID => {
                    self.nguid = id.try_into().ok().and_then(set).or(self.nguid);
                }
                nidt::EUI64 => {
                    self.eui64 = id.try_into().ok().and_then(set).or(self.eui64);
                }
                _ => {}
            }
        }
    }
}

/// An identifier of zeroes is none.
fn set<const N: usize>(id: [u8; N]) -> Option<[u8; N]> {
    (id != [0; N]).then_some(id)
}

/// An active namespace, whether or not it can be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedNamespace {
    /// Namespace ID.
    pub nsid: u32,
    /// UUID.
    pub uuid: Option<Uuid>,
    /// NGUID.
    pub nguid: Option<[u8; 16]>,
    /// EUI-64.
    pub eui64: Option<[u8; 8]>,
    /// What can be served, or what is in the way.
    pub info: Result<NamespaceInfo, String>,
}

impl From<Found> for ListedNamespace {
    fn from(found: Found) -> Self {
        let Found { nsid, ids, info } = found;
        Self {
            nsid,
            uuid: ids.uuid,
            nguid: ids.nguid,
            eui64: ids.eui64,
            info,
        }
    }
}

/// An active namespace, as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) nsid: u32,
    pub(super) ids: Identifiers,
    /// What can be served, or what is in the way.
    pub(super) info: Result<NamespaceInfo, String>,
}

impl Found {
    pub(super) fn matches(&self, selector: &NamespaceSelector) -> bool {
        match selector {
            NamespaceSelector::Only => true,
            NamespaceSelector::Nsid(nsid) => self.nsid == *nsid,
            NamespaceSelector::Uuid(uuid) => self.ids.uuid == Some(*uuid),
            NamespaceSelector::Nguid(nguid) => self.ids.nguid == Some(*nguid),
        }
    }
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "?nsid={} (", self.nsid)?;
        if let Some(uuid) = self.ids.uuid {
            write!(f, "{}, ", NamespaceSelector::Uuid(uuid))?;
        } else if let Some(nguid) = self.ids.nguid {
            write!(f, "{}, ", NamespaceSelector::Nguid(nguid))?;
        }
        match &self.info {
            Ok(info) => write!(f, "{} bytes)", info.capacity()),
            Err(reason) => write!(f, "unusable: {reason})"),
        }
    }
}

/// Reads a description, and says what is in the way when the namespace cannot be served.
/// `max_transfer` is what one command of the controller may transfer, in bytes.
pub(super) fn digest(
    nsid: u32,
    data: &IdentifyNamespace,
    ids: Identifiers,
    max_transfer: Option<u64>,
) -> Result<NamespaceInfo, String> {
    let block_count = data.nsze.get();
    if block_count == 0 {
        return Err("it has no blocks".to_owned());
    }
    let format = data.format().ok_or_else(|| {
        format!(
            "its LBA format (FLBAS {:#04x}) is not one of the {} that it lists",
            data.flbas,
            u32::from(data.nlbaf) + 1
        )
    })?;
    if format.ms.get() != 0 {
        // FLBAS bit 4: the metadata is part of each block.
        let place = if data.flbas & 1 << 4 != 0 {
            "inside extended LBAs"
        } else {
            "beside each block"
        };
        return Err(format!(
            "it is formatted with {} bytes of metadata {place}; format it without",
            format.ms
        ));
    }
    if data.dps & 7 != 0 {
        return Err(format!(
            "it is formatted with protection information of type {}; format it without",
            data.dps & 7
        ));
    }
    if !LBADS.contains(&format.lbads) {
        return Err(format!(
            "its block size is 2^{} bytes; 512 (2^{}) to 65536 (2^{}) are supported",
            format.lbads,
            LBADS.start(),
            LBADS.end()
        ));
    }
    let block_size = 1u32 << format.lbads;
    if block_count.checked_mul(u64::from(block_size)).is_none() {
        return Err(format!(
            "its size of {block_count} blocks of {block_size} bytes is beyond 2^64 bytes"
        ));
    }
    if let Some(max) = max_transfer.filter(|&max| max < u64::from(block_size)) {
        return Err(format!(
            "its blocks of {block_size} bytes are larger than the {max} bytes that a command may transfer"
        ));
    }
    Ok(NamespaceInfo {
        nsid,
        block_size,
        block_count,
        uuid: ids.uuid,
        nguid: ids.nguid,
        eui64: ids.eui64,
        write_protected: data.nsattr & NSATTR_WRITE_PROTECTED != 0,
        deallocated_reads_zero: data.dlfeat & 7 == DLFEAT_ZEROES,
        write_zeroes_deallocates: data.dlfeat & DLFEAT_WRITE_ZEROES_DEALLOCATES != 0,
        optimal: OptimalIo::from_identify(data),
        anagrpid: data.anagrpid.get(),
    })
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::*;
    use crate::spec::identify::LbaFormat;

    fn namespace(change: impl FnOnce(&mut IdentifyNamespace)) -> Result<NamespaceInfo, String> {
        let mut data = IdentifyNamespace::new_zeroed();
        data.nsze = 1000.into();
        data.nlbaf = 1;
        data.lbaf[0].lbads = 9;
        data.lbaf[1].lbads = 12;
        change(&mut data);
        digest(5, &data, Identifiers::from_identify(&data), None)
    }

    #[test]
    fn the_format_in_use_gives_the_block_size() {
        let info = namespace(|data| data.flbas = 1).unwrap();
        assert_eq!(
            (info.nsid, info.block_size, info.capacity()),
            (5, 4096, 4_096_000)
        );
    }

    #[test]
    fn formats_that_cannot_be_served_are_refused_with_their_value() {
        type Change = fn(&mut IdentifyNamespace);
        let changes: [(Change, &str); 10] = [
            (|data| data.nsze = 0.into(), "no blocks"),
            (|data| data.flbas = 2, "FLBAS 0x02"),
            (|data| data.flbas = 0x21, "FLBAS 0x21"),
            (
                |data| data.lbaf[0].ms = 8.into(),
                "8 bytes of metadata beside",
            ),
            (
                |data| {
                    data.lbaf[0].ms = 64.into();
                    data.flbas = 0x10;
                },
                "64 bytes of metadata inside extended LBAs",
            ),
            (|data| data.dps = 3, "type 3"),
            (|data| data.lbaf[0].lbads = 8, "2^8"),
            (|data| data.lbaf[0].lbads = 17, "2^17"),
            (|data| data.lbaf[0] = LbaFormat::default(), "2^0"),
            (
                |data| data.nsze = (1 << 55).into(),
                "36028797018963968 blocks of 512",
            ),
        ];
        for (change, named) in changes {
            let reason = namespace(change).unwrap_err();
            assert!(reason.contains(named), "{reason}");
            assert!(!reason.contains('\n'));
        }
        let largest = namespace(|data| data.nsze = ((1 << 55) - 1).into()).unwrap();
        assert_eq!(largest.capacity(), u64::MAX - 511);
    }

    #[test]
    fn the_sixteenth_format_needs_the_upper_bits_of_the_index() {
        let info = namespace(|data| {
            data.nlbaf = 17;
            data.flbas = 1 << 5 | 1;
            data.lbaf[17].lbads = 13;
        });
        assert_eq!(info.unwrap().block_size, 8192);
    }

    #[test]
    fn blocks_larger_than_a_transfer_are_refused() {
        let mut data = IdentifyNamespace::new_zeroed();
        data.nsze = 1.into();
        data.lbaf[0].lbads = 16;
        let ids = Identifiers::default();
        assert!(digest(1, &data, ids, Some(32768)).is_err());
        assert!(digest(1, &data, ids, Some(65536)).is_ok());
    }

    #[test]
    fn hints_count_only_when_they_are_said_to_be_valid() {
        let set = |data: &mut IdentifyNamespace| {
            data.noiob = 256.into();
            data.npwg = 7.into();
            data.nows = 31.into();
        };
        let told = namespace(|data| {
            set(data);
            data.nsfeat = IdentifyNamespace::NSFEAT_OPTPERF;
        });
        let told = told.unwrap().optimal;
        assert_eq!(
            (told.boundary, told.write_granularity, told.write_size),
            (Some(256), Some(8), Some(32))
        );
        let later = namespace(|data| {
            set(data);
            data.npdg = 7.into();
            data.nsfeat = NSFEAT_OPTPERF_HIGH;
        });
        let later = later.unwrap().optimal;
        assert_eq!(
            (
                later.write_granularity,
                later.write_size,
                later.deallocate_granularity
            ),
            (Some(8), Some(32), None)
        );
        let untold = namespace(set).unwrap().optimal;
        assert_eq!(
            (untold.boundary, untold.write_granularity, untold.write_size),
            (Some(256), None, None)
        );
    }

    #[test]
    fn what_deallocation_leaves_and_write_protection_are_read() {
        let info = namespace(|data| {
            data.dlfeat = 0x09;
            data.nsattr = 1;
        });
        let info = info.unwrap();
        assert!(
            info.deallocated_reads_zero && info.write_zeroes_deallocates && info.write_protected
        );
        // 2: reads of deallocated blocks return ones.
        let info = namespace(|data| data.dlfeat = 0x02).unwrap();
        assert!(
            !info.deallocated_reads_zero && !info.write_zeroes_deallocates && !info.write_protected
        );
    }

    fn descriptor(nidt: u8, id: &[u8]) -> Vec<u8> {
        [&[nidt, id.len() as u8, 0, 0], id].concat()
    }

    fn identifiers(list: &[u8]) -> Identifiers {
        let mut ids = Identifiers::default();
        ids.add_descriptors(list);
        ids
    }

    #[test]
    fn all_identifiers_are_found_in_any_order() {
        let list = [
            descriptor(nidt::CSI, &[0]),
            descriptor(nidt::UUID, &[1; 16]),
            descriptor(99, &[7; 40]),
            descriptor(nidt::EUI64, &[2; 8]),
            descriptor(nidt::NGUID, &[3; 16]),
            vec![0; 100],
            descriptor(nidt::UUID, &[9; 16]),
        ];
        let expected = Identifiers {
            uuid: Some(Uuid::from_bytes([1; 16])),
            nguid: Some([3; 16]),
            eui64: Some([2; 8]),
        };
        assert_eq!(identifiers(&list.concat()), expected);
    }

    #[test]
    fn descriptors_that_are_wrong_or_cut_off_say_nothing() {
        let nothing = Identifiers::default();
        assert_eq!(identifiers(&descriptor(nidt::UUID, &[1; 15])), nothing);
        assert_eq!(identifiers(&descriptor(nidt::EUI64, &[1; 16])), nothing);
        assert_eq!(identifiers(&descriptor(nidt::NGUID, &[0; 16])), nothing);
        // Lengths of nothing, to the end of the page.
        assert_eq!(identifiers(&[nidt::UUID, 0, 0, 0].repeat(1024)), nothing);
        let whole = descriptor(nidt::UUID, &[1; 16]);
        for cut in 0..whole.len() {
            assert_eq!(identifiers(&whole[..cut]), nothing, "cut at {cut}");
        }
        // One that is wrong is passed over.
        let list = [descriptor(nidt::UUID, &[1; 3]), whole].concat();
        assert!(identifiers(&list).uuid.is_some());
    }

    #[test]
    fn selectors_are_shown_as_a_uri_has_them() {
        let mut nguid = [0; 16];
        nguid[0] = 0x0a;
        assert_eq!(NamespaceSelector::Nsid(3).to_string(), "nsid=3");
        assert_eq!(
            NamespaceSelector::Nguid(nguid).to_string(),
            "nguid=0a000000000000000000000000000000"
        );
    }
}
