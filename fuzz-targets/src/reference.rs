//! What a chain of descriptors means, worked out plainly from a copy of the guest's memory.

use vhost_user_blk::{BrokenRing, SectorRange};

use crate::guest::{DESCRIPTORS, REGION, REGIONS};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Most descriptors in a chain where the ring has fewer entries: as many segments as the device
/// allows, a header byte by byte, and a status.
const LIMIT: usize = 30 + 16 + 1;

/// Consecutive bytes of one region: its number, and where in it.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    region: usize,
    range: std::ops::Range<usize>,
}

impl Span {
    pub(crate) fn len(&self) -> usize {
        self.range.len()
    }
}

/// A copy of the guest's memory, to be changed as the device is expected to.
pub(crate) struct Shadow(pub(crate) [Vec<u8>; 3]);

impl Shadow {
    pub(crate) fn new() -> Self {
        Self(std::array::from_fn(|_| vec![0; REGION as usize]))
    }

    /// Where `len` bytes at `addr` are, or `None` when some are nowhere.
    pub(crate) fn spans(addr: u64, len: u64) -> Option<Vec<Span>> {
        let mut spans = Vec::new();
        let (mut at, end) = (u128::from(addr), u128::from(addr) + u128::from(len));
        while at < end {
            let holds =
                |start: &u64| (u128::from(*start)..u128::from(start + REGION)).contains(&at);
            let region = REGIONS.iter().position(holds)?;
            let start = u128::from(REGIONS[region]);
            let upto = end.min(start + u128::from(REGION));
            spans.push(Span {
                region,
                range: (at - start) as usize..(upto - start) as usize,
            });
            at = upto;
        }
        Some(spans)
    }

    pub(crate) fn bytes(&self, span: &Span) -> &[u8] {
        &self.0[span.region][span.range.clone()]
    }

    pub(crate) fn read(&self, addr: u64, len: u64) -> Option<Vec<u8>> {
        let spans = Self::spans(addr, len)?;
        Some(
            spans
                .iter()
                .flat_map(|span| self.bytes(span))
                .copied()
                .collect(),
        )
    }

    pub(crate) fn u16(&self, addr: u64) -> u16 {
        let bytes = self.read(addr, 2).expect("in memory");
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    pub(crate) fn write(&mut self, addr: u64, bytes: &[u8]) {
        let spans = Self::spans(addr, bytes.len() as u64).expect("in memory");
        self.scatter(&spans, bytes);
    }

    /// Writes `bytes` from the first span on.
    pub(crate) fn scatter(&mut self, spans: &[Span], mut bytes: &[u8]) {
        for span in spans {
            let (now, later) = bytes.split_at(span.range.len());
            self.0[span.region][span.range.clone()].copy_from_slice(now);
            bytes = later;
        }
    }

    pub(crate) fn fill(&mut self, spans: &[Span], byte: u8) {
        for span in spans {
            self.0[span.region][span.range.clone()].fill(byte);
        }
    }
}

/// What a chain asks for.
#[derive(Debug)]
pub(crate) enum Ask {
    /// Sectors into memory.
    Read(u64, Vec<Span>),
    /// Memory onto sectors.
    Write(u64, Vec<Span>),
    Flush,
    Discard(Vec<SectorRange>),
    WriteZeroes(Vec<SectorRange>),
}

/// What becomes of a chain.
#[derive(Debug)]
pub(crate) enum Meaning {
    /// A request; its status goes there.
    Asks(Ask, u64),
    /// An answer at once: status, where it goes, and what is written besides.
    Answered(u8, u64, Vec<(Span, Vec<u8>)>),
}

const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// What the device and its driver agreed on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) size: u16,
    pub(crate) read_only: bool,
    pub(crate) discard: bool,
    pub(crate) write_zeroes: bool,
    pub(crate) serial: [u8; 20],
}

/// Buffers of one direction.
type Buffers = Vec<(u64, u32)>;

/// Follows a chain.
fn walk(memory: &Shadow, size: u16, head: u16) -> Result<(Buffers, Buffers), BrokenRing> {
    let limit = LIMIT.max(usize::from(size));
    let (mut readable, mut writable) = (Buffers::new(), Buffers::new());
    let (mut table, mut entries, mut indirect) = (DESCRIPTORS, u32::from(size), false);
    let (mut index, mut hops, mut seen, mut total, mut writing) = (u32::from(head), 0, 0, 0, false);
    let lost = |seen| match seen {
        0 => BrokenRing::NoDescriptor { head },
        _ => BrokenRing::Endless { head },
    };
    loop {
        if hops == entries || index >= entries {
            return Err(lost(seen));
        }
        let at = table.checked_add(16 * u64::from(index));
        let bytes = at.and_then(|at| memory.read(at, 16)).ok_or(lost(seen))?;
        let addr = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        let len = u32::from_le_bytes(bytes[8..12].try_into().expect("4 bytes"));
        let flags = u16::from_le_bytes([bytes[12], bytes[13]]);
        let next = u16::from_le_bytes([bytes[14], bytes[15]]);
        if flags & INDIRECT != 0 {
            if indirect || !len.is_multiple_of(16) || len / 16 > 65535 {
                return Err(lost(seen));
            }
            (table, entries, indirect) = (addr, len / 16, true);
            (index, hops) = (0, 0);
            continue;
        }
        total += u64::from(len);
        if total > u64::from(u32::MAX) {
            return Err(lost(seen));
        }
        (seen, hops) = (seen + 1, hops + 1);
        if seen > limit {
            return Err(BrokenRing::TooLong { head });
        }
        let write = flags & WRITE != 0;
        if writing && !write {
            return Err(BrokenRing::ReadableAfterWritable { head });
        }
        writing = write;
        let buffers = if write { &mut writable } else { &mut readable };
        buffers.extend((len > 0).then_some((addr, len)));
        if flags & NEXT == 0 {
            return Ok((readable, writable));
        }
        index = u32::from(next);
    }
}

fn length(buffers: &Buffers) -> u64 {
    buffers.iter().map(|(_, len)| u64::from(*len)).sum()
}

/// Where `len` bytes are, `skip` bytes into some buffers.
fn gather(buffers: &Buffers, mut skip: u64, mut len: u64) -> Option<Vec<Span>> {
    let mut all = Vec::new();
    for (addr, size) in buffers {
        let size = u64::from(*size);
        let passed = skip.min(size);
        skip -= passed;
        let part = (size - passed).min(len);
        len -= part;
        if part > 0 {
            all.extend(Shadow::spans(addr.checked_add(passed)?, part)?);
        }
    }
    Some(all)
}

/// Sectors as requests name them: at least one, and none past 2^64 bytes.
fn is_range(sector: u64, bytes: u64) -> bool {
    let end = u128::from(sector) * 512 + u128::from(bytes);
    bytes > 0 && bytes.is_multiple_of(512) && end <= u128::from(u64::MAX)
}

/// Parses the segments of a discard or write-zeroes.
fn ranges(bytes: &[u8], most_sectors: u32, may_unmap: bool) -> Result<Vec<SectorRange>, u8> {
    let one = |bytes: &[u8]| {
        let sector = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        let count = u32::from_le_bytes(bytes[8..12].try_into().expect("4 bytes"));
        let flags = u32::from_le_bytes(bytes[12..].try_into().expect("4 bytes"));
        if flags > u32::from(may_unmap) {
            return Err(UNSUPP);
        }
        if count > most_sectors || !is_range(sector, 512 * u64::from(count)) {
            return Err(IOERR);
        }
        let unmap = flags == 1;
        Ok(SectorRange {
            sector,
            count,
            unmap,
        })
    };
    bytes.chunks(16).map(one).collect()
}

/// What the chain at `head` means.
pub(crate) fn meaning(memory: &Shadow, terms: &Terms, head: u16) -> Result<Meaning, BrokenRing> {
    let outside = BrokenRing::OutsideMemory { head };
    let (readable, writable) = walk(memory, terms.size, head)?;
    let (addr, len) = writable.last().ok_or(BrokenRing::NoStatus { head })?;
    let status = addr.checked_add(u64::from(*len) - 1).ok_or(outside)?;
    Shadow::spans(status, 1).ok_or(outside)?;
    let (out, room) = (length(&readable), length(&writable) - 1);
    let answer = |with| Ok(Meaning::Answered(with, status, Vec::new()));
    if out < 16 {
        return answer(IOERR);
    }
    let copy = |spans: Vec<Span>| -> Vec<u8> {
        let bytes = spans.iter().flat_map(|span| memory.bytes(span));
        bytes.copied().collect()
    };
    let header = copy(gather(&readable, 0, 16).ok_or(outside)?);
    let kind = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
    let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
    let payload = out - 16;
    let known = match kind {
        0 | 1 | 4 | 8 => true,
        11 => terms.discard,
        13 => terms.write_zeroes,
        _ => false,
    };
    if !known {
        return answer(UNSUPP);
    }
    if terms.read_only && matches!(kind, 1 | 11 | 13) {
        return answer(IOERR);
    }
    let ask = match kind {
        0 if is_range(sector, room) => {
            Ask::Read(sector, gather(&writable, 0, room).ok_or(outside)?)
        }
        1 if is_range(sector, payload) => {
            Ask::Write(sector, gather(&readable, 16, payload).ok_or(outside)?)
        }
        0 | 1 => return answer(IOERR),
        4 => Ask::Flush,
        8 if room == 0 => return answer(IOERR),
        8 => {
            let spans = gather(&writable, 0, room.min(20)).ok_or(outside)?;
            let mut serial = &terms.serial[..];
            let pieces = spans.into_iter().map(|span| {
                let (now, later) = serial.split_at(span.range.len());
                serial = later;
                (span, now.to_vec())
            });
            return Ok(Meaning::Answered(0, status, pieces.collect()));
        }
        _ => {
            let (segments, sectors) = if kind == 11 { (4, 1000) } else { (2, 2000) };
            if payload == 0 || !payload.is_multiple_of(16) || payload > 16 * segments {
                return answer(IOERR);
            }
            let bytes = copy(gather(&readable, 16, payload).ok_or(outside)?);
            match ranges(&bytes, sectors, kind == 13) {
                Ok(ranges) if kind == 11 => Ask::Discard(ranges),
                Ok(ranges) => Ask::WriteZeroes(ranges),
                Err(status) => return answer(status),
            }
        }
    };
    Ok(Meaning::Asks(ask, status))
}
