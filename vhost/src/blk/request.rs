//! Requests of a virtio block device (virtio 1.3, section 5.2.6): what a driver may ask.

use memdesc::{MemSink, MemSource};

/// Bytes of the header that starts every request.
pub(crate) const HEADER: usize = 16;

/// Bytes of a segment of a discard or write-zeroes.
const RANGE: usize = 16;

/// Most segments that this crate takes in one discard or write-zeroes.
pub(crate) const MAX_RANGES: usize = 16;

/// Bytes of a sector, the unit of every position and length in the protocol.
pub(crate) const SECTOR: u64 = 512;

/// Flag of a segment: the blocks may be deallocated.
const UNMAP: u32 = 1;

/// How a request ended, as the guest is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlkStatus {
    /// Done.
    Ok,
    /// Failed: the device or the driver is at fault.
    IoError,
    /// The device does not know this kind of request, or a flag in it.
    Unsupported,
}

impl BlkStatus {
    /// The byte that the guest reads.
    pub(crate) fn byte(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::IoError => 1,
            Self::Unsupported => 2,
        }
    }
}

/// Consecutive sectors to discard or to zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SectorRange {
    /// First sector of 512 bytes.
    pub sector: u64,
    /// Sectors, never 0; `sector + count` does not overflow, in bytes neither.
    pub count: u32,
    /// A write-zeroes may deallocate them. False for a discard, where it goes without saying.
    pub unmap: bool,
}

/// One to sixteen ranges, kept in place.
#[derive(Debug, Clone, Copy)]
pub struct SectorRanges {
    ranges: [SectorRange; MAX_RANGES],
    len: usize,
}

impl From<SectorRange> for SectorRanges {
    /// One range.
    fn from(range: SectorRange) -> Self {
        let mut ranges = [SectorRange::default(); MAX_RANGES];
        ranges[0] = range;
        Self { ranges, len: 1 }
    }
}

impl std::ops::Deref for SectorRanges {
    type Target = [SectorRange];

    fn deref(&self) -> &[SectorRange] {
        &self.ranges[..self.len]
    }
}

/// What the guest asks of the storage. Positions are in sectors of 512 bytes; lengths are multiples
/// of 512, never 0, and end below 2^64 bytes. Whether they lie inside the disk and on block
/// boundaries is for the storage to say.
#[derive(Debug)]
pub enum Operation {
    /// Fill `sink` from the disk.
    Read {
        /// First sector.
        sector: u64,
        /// Guest memory to fill.
        sink: MemSink,
    },
    /// Put `source` on the disk.
    Write {
        /// First sector.
        sector: u64,
        /// Guest memory to read.
        source: MemSource,
        /// Durable before it is answered.
        fua: bool,
    },
    /// Make durable every write answered so far.
    Flush,
    /// The contents of these sectors are of no interest any more.
    Discard(SectorRanges),
    /// Make these sectors read as zeroes.
    WriteZeroes {
        /// The sectors.
        ranges: SectorRanges,
        /// Durable before it is answered.
        fua: bool,
    },
}

/// The kinds of request that the device knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Sectors to guest memory.
    Read,
    /// Guest memory to sectors.
    Write,
    /// Volatile cache to stable storage.
    Flush,
    /// The serial, to guest memory.
    GetId,
    /// Sectors of no interest.
    Discard,
    /// Sectors that shall read as zeroes.
    WriteZeroes,
}

/// The fixed start of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// `None` for a type that the device does not know.
    pub(crate) kind: Option<Kind>,
    /// First sector of a read or write.
    pub(crate) sector: u64,
}

impl Header {
    /// Reads a header from private memory.
    pub(crate) fn parse(bytes: &[u8; HEADER]) -> Self {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = *bytes;
        let kind = match u32::from_le_bytes([t0, t1, t2, t3]) {
            0 => Some(Kind::Read),
            1 => Some(Kind::Write),
            4 => Some(Kind::Flush),
            8 => Some(Kind::GetId),
            11 => Some(Kind::Discard),
            13 => Some(Kind::WriteZeroes),
            _ => None,
        };
        Self {
            kind,
            sector: u64::from_le_bytes(sector),
        }
    }
}

/// True when `len` bytes at `sector` are a whole number of sectors, at least one, that end below
/// 2^64 bytes.
pub(crate) fn is_transfer(sector: u64, len: u64) -> bool {
    len != 0 && len.is_multiple_of(SECTOR) && ends_in_range(sector, len)
}

fn ends_in_range(sector: u64, len: u64) -> bool {
    sector
        .checked_mul(SECTOR)
        .and_then(|start| start.checked_add(len))
        .is_some()
}

/// What one kind of ranged request allows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RangeLimits {
    /// Most segments, at most [`MAX_RANGES`].
    pub(crate) segments: u32,
    /// Most sectors in a segment.
    pub(crate) sectors: u32,
    /// The unmap flag means something.
    pub(crate) may_unmap: bool,
}

/// Bytes that hold the segments of a discard or write-zeroes, copied out of guest memory.
pub(crate) struct RangeBytes {
    bytes: [u8; RANGE * MAX_RANGES],
    len: usize,
}

impl RangeBytes {
    /// Room for `len` bytes of segments, or `None` when that is none, too many or a fraction.
    pub(crate) fn with_len(len: u64, limits: RangeLimits) -> Option<Self> {
        let len = usize::try_from(len).ok()?;
        let most = RANGE * usize::try_from(limits.segments).ok()?.min(MAX_RANGES);
        (len != 0 && len.is_multiple_of(RANGE) && len <= most).then_some(Self {
            bytes: [0; RANGE * MAX_RANGES],
            len,
        })
    }

    /// The room to copy the segments to.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }

    /// Reads the segments.
    ///
    /// # Errors
    /// [`BlkStatus::Unsupported`] when a flag is unknown, or is one that the request may not carry;
    /// [`BlkStatus::IoError`] when a range is empty, larger than the limit or past 2^64 bytes.
    pub(crate) fn parse(&self, limits: RangeLimits) -> Result<SectorRanges, BlkStatus> {
        let mut parsed = SectorRanges {
            ranges: [SectorRange::default(); MAX_RANGES],
            len: 0,
        };
        let (segments, _) = self.bytes[..self.len].as_chunks::<RANGE>();
        for (range, segment) in parsed.ranges.iter_mut().zip(segments) {
            *range = parse_range(segment, limits)?;
            parsed.len += 1;
        }
        Ok(parsed)
    }
}

fn parse_range(segment: &[u8; RANGE], limits: RangeLimits) -> Result<SectorRange, BlkStatus> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, flags @ ..] = *segment;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let count = u32::from_le_bytes([c0, c1, c2, c3]);
    let flags = u32::from_le_bytes(flags);
    let known = if limits.may_unmap { UNMAP } else { 0 };
    if flags & !known != 0 {
        return Err(BlkStatus::Unsupported);
    }
    if count == 0 || count > limits.sectors || !ends_in_range(sector, u64::from(count) * SECTOR) {
        return Err(BlkStatus::IoError);
    }
    Ok(SectorRange {
        sector,
        count,
        unmap: flags & UNMAP != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: RangeLimits = RangeLimits {
        segments: 4,
        sectors: 1000,
        may_unmap: true,
    };

    fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8], limits: RangeLimits) -> Result<SectorRanges, BlkStatus> {
        let mut ranges =
            RangeBytes::with_len(bytes.len() as u64, limits).ok_or(BlkStatus::IoError)?;
        ranges.as_mut_slice().copy_from_slice(bytes);
        ranges.parse(limits)
    }

    #[test]
    fn a_header_is_little_endian() {
        let bytes = [13, 0, 0, 0, 9, 9, 9, 9, 1, 2, 0, 0, 0, 0, 0, 0x80];
        let header = Header::parse(&bytes);
        assert_eq!(header.kind, Some(Kind::WriteZeroes));
        assert_eq!(header.sector, 0x8000_0000_0000_0201);
    }

    #[test]
    fn types_outside_the_offer_are_unknown() {
        for kind in [2, 3, 5, 7, 10, 14, 15, 0x8000_0000_u32] {
            let mut bytes = [0; HEADER];
            bytes[..4].copy_from_slice(&kind.to_le_bytes());
            assert_eq!(Header::parse(&bytes).kind, None, "type {kind}");
        }
    }

    #[test]
    fn a_transfer_is_whole_sectors_below_the_end_of_the_address_space() {
        assert!(is_transfer(0, 512));
        assert!(!is_transfer(0, 0));
        assert!(!is_transfer(0, 513));
        assert!(!is_transfer(u64::MAX, 512));
        assert!(!is_transfer(u64::MAX / 512, 512));
        assert!(is_transfer(u64::MAX / 512 - 1, 512));
    }

    #[test]
    fn segments_are_read_in_order() {
        let bytes = [segment(8, 16, 1), segment(1 << 40, 1000, 0)].concat();
        let ranges = parse(&bytes, LIMITS).expect("valid");
        assert_eq!(
            *ranges,
            [
                SectorRange {
                    sector: 8,
                    count: 16,
                    unmap: true
                },
                SectorRange {
                    sector: 1 << 40,
                    count: 1000,
                    unmap: false
                },
            ]
        );
    }

    #[test]
    fn unknown_flags_are_unsupported() {
        assert_eq!(
            parse(&segment(0, 8, 2), LIMITS).err(),
            Some(BlkStatus::Unsupported)
        );
        let discard = RangeLimits {
            may_unmap: false,
            ..LIMITS
        };
        assert_eq!(
            parse(&segment(0, 8, 1), discard).err(),
            Some(BlkStatus::Unsupported)
        );
    }

    #[test]
    fn bad_ranges_are_io_errors() {
        for (sector, count) in [(0, 0), (0, 1001), (u64::MAX, 1), (u64::MAX / 512, 1)] {
            assert_eq!(
                parse(&segment(sector, count, 0), LIMITS).err(),
                Some(BlkStatus::IoError),
                "{count} sectors at {sector}"
            );
        }
    }

    #[test]
    fn a_list_is_whole_segments_within_the_limit() {
        assert!(RangeBytes::with_len(0, LIMITS).is_none());
        assert!(RangeBytes::with_len(15, LIMITS).is_none());
        assert!(RangeBytes::with_len(64, LIMITS).is_some());
        assert!(RangeBytes::with_len(80, LIMITS).is_none());
        assert!(RangeBytes::with_len(u64::MAX, LIMITS).is_none());
    }
}
