//! What has to be done for one request on a disk whose blocks are larger than sectors, and what is in its way.

use std::ops::Range;

use memdesc::MemSource;
use vhost_user_blk::{Operation, SectorRange, SectorRanges};

use super::SECTOR;
use crate::bridge::translate::{Limits, Request};

/// A request that writes, or needs a pad.
#[derive(Debug)]
pub(super) struct Job {
    /// Its number among all.
    pub(super) order: u64,
    /// All that it writes to is in these blocks.
    pub(super) written: Range<u64>,
    pub(super) edges: Edges,
    /// It works with a pad.
    pub(super) padded: bool,
    pub(super) pad: Option<u16>,
    pub(super) work: Work,
}

/// Blocks of which a request writes a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Edges {
    None,
    /// Twice the same where there is one alone.
    Two(u64, u64),
    /// Any of those that it writes to.
    Any,
}

/// What a job has to do.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "jobs are slots that are allocated once, and boxes would be for each request"
)]
pub(super) enum Work {
    /// One operation.
    Whole,
    Write {
        sector: u64,
        /// Sectors.
        count: u64,
        fua: bool,
        /// Until it is written.
        source: Option<MemSource>,
        /// Reads that are done.
        reads: usize,
    },
    Zero {
        ranges: SectorRanges,
        fua: bool,
        /// The range that is worked on.
        index: usize,
        /// Its first sector that is not done; `None` at its start.
        at: Option<u64>,
        /// Reads that are done.
        reads: usize,
    },
}

/// A read of blocks at the edges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EdgeRead {
    pub(super) block: u64,
    pub(super) blocks: usize,
    /// The block of the pad that the first goes to.
    pub(super) to: usize,
}

impl Job {
    /// What has to be known of a request, number `order` of all; `None` where it is begun as it is, and nobody cares.
    pub(super) fn plan(operation: &Operation, limits: &Limits, order: u64) -> Option<Self> {
        let shift = limits.sectors_shift();
        let request = Request::from(operation);
        let hull = |all: Range<u64>, blocks: Range<u64>| {
            all.start.min(blocks.start)..all.end.max(blocks.end)
        };
        let written = limits.written(request).reduce(hull);
        let unaligned = is_unaligned(shift, operation);
        let reads = matches!(operation, Operation::Read { .. });
        // What writes nothing stands in nobody's way, and what goes past the end is refused.
        if written.is_none() && !(reads && unaligned) {
            return None;
        }
        let (edges, work) = match operation {
            Operation::Write {
                sector,
                source,
                fua,
            } if unaligned => {
                let (sector, count, fua) = (*sector, sectors(source.len()), *fua);
                let work = Work::Write {
                    sector,
                    count,
                    fua,
                    source: None,
                    reads: 0,
                };
                let end = sector.saturating_add(count);
                (edges(shift, &(sector..end)), work)
            }
            // With a range past the end, none is touched.
            Operation::WriteZeroes { ranges, fua }
                if unaligned && limits.written(request).count() == ranges.len() =>
            {
                let edges = match &ranges[..] {
                    [range] => edges(shift, &(range.sector..end_of(range))),
                    _ => Edges::Any,
                };
                let (ranges, fua) = (*ranges, *fua);
                let work = Work::Zero {
                    ranges,
                    fua,
                    index: 0,
                    at: None,
                    reads: 0,
                };
                (edges, work)
            }
            _ => (Edges::None, Work::Whole),
        };
        Some(Self {
            order,
            written: written.unwrap_or(0..0),
            edges,
            padded: reads || edges != Edges::None,
            pad: None,
            work,
        })
    }

    /// Writes a part of one of these blocks.
    pub(super) fn has_edge_in(&self, blocks: &Range<u64>) -> bool {
        match self.edges {
            Edges::None => false,
            Edges::Two(one, other) => blocks.contains(&one) || blocks.contains(&other),
            Edges::Any => self.written.start < blocks.end && blocks.start < self.written.end,
        }
    }
}

/// True for what begins or ends within a block; a discard does not, since it is a hint.
pub(super) fn is_unaligned(shift: u32, operation: &Operation) -> bool {
    let aligned = |sector: u64, count: u64| is_aligned(shift, sector) && is_aligned(shift, count);
    match operation {
        Operation::Read { sector, sink } => !aligned(*sector, sectors(sink.len())),
        Operation::Write { sector, source, .. } => !aligned(*sector, sectors(source.len())),
        Operation::WriteZeroes { ranges, .. } => {
            let whole = |range: &SectorRange| aligned(range.sector, range.count.into());
            !ranges.iter().all(whole)
        }
        Operation::Flush | Operation::Discard(_) => false,
    }
}

pub(super) fn is_aligned(shift: u32, sector: u64) -> bool {
    sector.is_multiple_of(1 << shift)
}

/// Its last sector, and one more.
pub(super) fn end_of(range: &SectorRange) -> u64 {
    range.sector.saturating_add(range.count.into())
}

pub(super) fn sectors(bytes: usize) -> u64 {
    (bytes / SECTOR) as u64
}

/// The blocks at the first and at the last of these sectors, as far as they are written in part.
fn partial(shift: u32, sectors: &Range<u64>) -> (Option<u64>, Option<u64>) {
    let block = |sector| (!is_aligned(shift, sector)).then_some(sector >> shift);
    (block(sectors.start), block(sectors.end))
}

fn edges(shift: u32, sectors: &Range<u64>) -> Edges {
    match partial(shift, sectors) {
        (None, None) => Edges::None,
        (Some(one), None) | (None, Some(one)) => Edges::Two(one, one),
        (Some(one), Some(other)) => Edges::Two(one, other),
    }
}

/// What has to be read before these sectors are written.
pub(super) fn edge_reads(shift: u32, sectors: &Range<u64>) -> [Option<EdgeRead>; 2] {
    let read = |block, blocks, to| Some(EdgeRead { block, blocks, to });
    match partial(shift, sectors) {
        (None, None) => [None, None],
        (Some(first), None) => [read(first, 1, 0), None],
        (None, Some(last)) => [read(last, 1, 1), None],
        (Some(first), Some(last)) if first == last => [read(first, 1, 0), None],
        (Some(first), Some(last)) if first + 1 == last => [read(first, 2, 0), None],
        (Some(first), Some(last)) => [read(first, 1, 0), read(last, 1, 1)],
    }
}

/// What comes next of a range of which `at` is the first sector that is left: whole blocks, or sectors of one block.
pub(super) fn piece(shift: u32, range: &SectorRange, at: Option<u64>) -> Range<u64> {
    let start = at.unwrap_or(range.sector);
    let end = end_of(range);
    let whole = end >> shift << shift;
    if is_aligned(shift, start) && start < whole {
        return start..whole;
    }
    let next = ((start >> shift) + 1) << shift;
    start..end.min(next)
}
