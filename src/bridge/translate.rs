//! One guest request as the NVMe commands that carry it out, produced one at a time.
//!
//! A request may be larger than anything that the controller takes, so its commands are not listed
//! but generated: a [`Plan`] is a cursor of a few words that is advanced when a queue has room.

use std::num::NonZeroU64;
use std::ops::Range;

use nvmf::host::{ControllerInfo, DeallocateLimits, NamespaceInfo};
use nvmf::spec::Sqe;
use nvmf::spec::sqe::DsmRange;
use vhost_user_blk::{Operation, SectorRange};
use zerocopy::IntoBytes;

use crate::limits::{MAX_COMMAND_BLOCKS, MAX_DISCARD_RANGES, ZERO_WRITE_BYTES};

/// log2 of a sector, virtio's unit.
const SECTOR_SHIFT: u32 = 9;
/// Bytes that describe the ranges of one Dataset Management command, at most.
pub(crate) const RANGES_BYTES: usize = MAX_DISCARD_RANGES as usize * size_of::<DsmRange>();

/// What a namespace and its controller take, in the units of commands.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    nsid: u32,
    /// log2 of the block size in bytes, at least 9.
    block_shift: u32,
    block_count: u64,
    /// Blocks of one Read or Write, 1 to 65536.
    transfer_blocks: u64,
    /// Multiples of this that no Read or Write crosses.
    boundary: Option<NonZeroU64>,
    /// `None` where writes have to stand in for Write Zeroes.
    write_zeroes: Option<WriteZeroesLimits>,
    /// `None` where discards do nothing.
    deallocate: Option<DeallocateLimits>,
}

#[derive(Debug, Clone, Copy)]
struct WriteZeroesLimits {
    /// Blocks of one Write Zeroes, 1 to 65536.
    blocks: u64,
    /// The deallocate bit may be set: the blocks read as zeroes all the same.
    may_deallocate: bool,
}

impl Limits {
    /// From what a controller says about itself and the namespace.
    pub(crate) fn new(controller: &ControllerInfo, namespace: &NamespaceInfo) -> Self {
        let block_shift = namespace.block_size.trailing_zeros().max(SECTOR_SHIFT);
        let command_blocks = |bytes: Option<u64>| {
            let blocks = bytes.map_or(MAX_COMMAND_BLOCKS, |bytes| bytes >> block_shift);
            blocks.clamp(1, MAX_COMMAND_BLOCKS)
        };
        let write_zeroes = WriteZeroesLimits {
            blocks: command_blocks(controller.max_write_zeroes),
            may_deallocate: namespace.write_zeroes_deallocates && namespace.deallocated_reads_zero,
        };
        Self {
            nsid: namespace.nsid,
            block_shift,
            block_count: namespace.block_count,
            transfer_blocks: command_blocks(controller.max_transfer),
            boundary: (namespace.optimal.boundary)
                .and_then(|blocks| NonZeroU64::new(blocks.into())),
            write_zeroes: controller.supports_write_zeroes().then_some(write_zeroes),
            deallocate: controller
                .supports_deallocate()
                .then_some(controller.deallocate),
        }
    }

    /// The namespace has so many blocks now; it never becomes smaller.
    pub(crate) fn grow(&mut self, block_count: u64) {
        self.block_count = self.block_count.max(block_count);
    }

    fn bytes(&self, blocks: u64) -> usize {
        // Only ever used for blocks of one request, whose bytes are in memory, or of one command.
        usize::try_from(blocks << self.block_shift).unwrap_or(usize::MAX)
    }

    /// Blocks from `first` that one Read or Write may move, at least 1.
    fn transfer_from(&self, first: u64) -> u64 {
        let to_boundary = self
            .boundary
            .map_or(u64::MAX, |blocks| blocks.get() - first % blocks);
        self.transfer_blocks.min(to_boundary)
    }

    /// The blocks of `bytes` bytes from `sector`.
    fn blocks(&self, sector: u64, bytes: u64) -> Result<Range<u64>, Refused> {
        let touched = self.touched(sector, bytes)?;
        let to_block = self.block_shift - SECTOR_SHIFT;
        if !bytes.is_multiple_of(1 << self.block_shift) || !sector.is_multiple_of(1 << to_block) {
            return Err(Refused::Misaligned);
        }
        Ok(touched)
    }

    /// The blocks that have a byte of `bytes` bytes from `sector`.
    fn touched(&self, sector: u64, bytes: u64) -> Result<Range<u64>, Refused> {
        let to_block = self.block_shift - SECTOR_SHIFT;
        let end = sector.checked_add(bytes.div_ceil(1 << SECTOR_SHIFT));
        let end = end.map(|end| end.div_ceil(1 << to_block));
        let end = end.filter(|&end| end <= self.block_count);
        let first = sector >> to_block;
        // Of no bytes there are none, also at the end.
        let end = end.filter(|_| first <= self.block_count);
        Ok(first..end.ok_or(Refused::PastEnd)?.max(first))
    }

    /// The whole blocks inside a range of sectors; may be empty.
    fn inner_blocks(&self, range: &SectorRange) -> Result<Range<u64>, Refused> {
        let to_block = self.block_shift - SECTOR_SHIFT;
        let end = range.sector.checked_add(u64::from(range.count));
        let end = end.filter(|end| end.div_ceil(1 << to_block) <= self.block_count);
        let end = end.ok_or(Refused::PastEnd)? >> to_block;
        let first = range.sector.div_ceil(1 << to_block);
        Ok(first..end.max(first))
    }
}

impl Limits {
    /// log2 of the sectors in a block.
    pub(crate) fn sectors_shift(&self) -> u32 {
        self.block_shift - SECTOR_SHIFT
    }

    /// The blocks that a request changes, as a whole or in part, range by range; none of one that only reads, or goes past
    /// the end.
    pub(crate) fn written<'a>(
        &self,
        request: Request<'a>,
    ) -> impl Iterator<Item = Range<u64>> + 'a {
        let (whole, ranges, inner): (_, &[SectorRange], _) = match request {
            Request::Write { len: 0, .. } | Request::Read { .. } | Request::Flush => {
                (None, &[], false)
            }
            Request::Write { sector, len, .. } => {
                (self.touched(sector, len as u64).ok(), &[], false)
            }
            Request::Discard(ranges) => (None, ranges, true),
            Request::WriteZeroes { ranges, .. } => (None, ranges, false),
        };
        let limits = *self;
        let blocks = move |range: &SectorRange| match inner {
            true => limits.inner_blocks(range).ok(),
            false => {
                let bytes = u64::from(range.count) << SECTOR_SHIFT;
                limits.touched(range.sector, bytes).ok()
            }
        };
        whole
            .into_iter()
            .chain(ranges.iter().filter_map(blocks))
            .filter(|blocks| !blocks.is_empty())
    }
}

/// Why a request is answered with an error and no command. Guests do not send such.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    /// Not a whole number of blocks, or not at a block's start.
    #[error(
        "not on block boundaries; give the disk --emulate-512 if its guest, or its firmware, knows sectors of 512 bytes only"
    )]
    Misaligned,
    /// Not inside the disk.
    #[error("past the end of the disk")]
    PastEnd,
}

/// What is asked, without the memory.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Request<'a> {
    /// `len` bytes from `sector`.
    Read { sector: u64, len: usize },
    /// `len` bytes to `sector`.
    Write { sector: u64, len: usize, fua: bool },
    /// Everything written to stable storage.
    Flush,
    /// No more interest in these.
    Discard(&'a [SectorRange]),
    /// Zeroes in these.
    WriteZeroes {
        ranges: &'a [SectorRange],
        fua: bool,
    },
}

impl<'a> From<&'a Operation> for Request<'a> {
    fn from(operation: &'a Operation) -> Self {
        match operation {
            Operation::Read { sector, sink } => Self::Read {
                sector: *sector,
                len: sink.len(),
            },
            Operation::Write {
                sector,
                source,
                fua,
            } => Self::Write {
                sector: *sector,
                len: source.len(),
                fua: *fua,
            },
            Operation::Flush => Self::Flush,
            Operation::Discard(ranges) => Self::Discard(ranges),
            Operation::WriteZeroes { ranges, fua } => Self::WriteZeroes { ranges, fua: *fua },
        }
    }
}

/// One command of a plan.
#[derive(Debug, Clone)]
pub(crate) struct Part<'a> {
    /// The command.
    pub(crate) sqe: Sqe,
    /// Its data.
    pub(crate) data: PartData<'a>,
}

/// Where the data of a command is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PartData<'a> {
    /// There is none.
    None,
    /// All of the request's memory.
    Whole,
    /// These bytes of the request's memory.
    Slice(Range<usize>),
    /// This many zeroes.
    Zeroes(usize),
    /// The ranges of a Dataset Management command.
    Ranges(&'a [u8]),
}

/// The commands that are still to be made for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan(Steps);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Steps {
    Done,
    Flush,
    /// Blocks `next..end` of a read or write that began at `first`.
    Transfer {
        direction: Direction,
        first: u64,
        next: u64,
        end: u64,
    },
    /// Ranges from `index` on; of that one, `done` blocks are through.
    Ranges {
        work: RangeWork,
        index: usize,
        done: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write { fua: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RangeWork {
    Deallocate,
    Zero { fua: bool },
}

impl Plan {
    /// Nothing to do.
    pub(crate) const DONE: Self = Self(Steps::Done);

    /// Plans a request. One that has nothing to do, such as a discard that the controller does not
    /// know, is done at once.
    ///
    /// # Errors
    /// [`Refused`] when it cannot be carried out as asked; part of it never is.
    pub(crate) fn new(limits: &Limits, request: Request<'_>) -> Result<Self, Refused> {
        match request {
            Request::Flush => Ok(Self(Steps::Flush)),
            Request::Read { sector, len } => Self::transfer(limits, Direction::Read, sector, len),
            Request::Write { sector, len, fua } => {
                Self::transfer(limits, Direction::Write { fua }, sector, len)
            }
            Request::Discard(ranges) => {
                for range in ranges {
                    limits.inner_blocks(range)?;
                }
                if limits.deallocate.is_none() {
                    return Ok(Self::DONE);
                }
                Ok(Self::ranges(limits, RangeWork::Deallocate, ranges, 0, 0))
            }
            Request::WriteZeroes { ranges, fua } => {
                for range in ranges {
                    limits.blocks(range.sector, u64::from(range.count) << SECTOR_SHIFT)?;
                }
                Ok(Self::ranges(limits, RangeWork::Zero { fua }, ranges, 0, 0))
            }
        }
    }

    fn transfer(
        limits: &Limits,
        direction: Direction,
        sector: u64,
        len: usize,
    ) -> Result<Self, Refused> {
        let Range { start, end } = limits.blocks(sector, len as u64)?;
        Ok(Self(if start == end {
            Steps::Done
        } else {
            Steps::Transfer {
                direction,
                first: start,
                next: start,
                end,
            }
        }))
    }

    /// A plan that goes on at block `done` of range `index`, or after it when that is its end.
    fn ranges(
        limits: &Limits,
        work: RangeWork,
        ranges: &[SectorRange],
        mut index: usize,
        mut done: u64,
    ) -> Self {
        while let Some(range) = ranges.get(index) {
            if done < blocks_left(limits, range, 0) {
                return Self(Steps::Ranges { work, index, done });
            }
            (index, done) = (index + 1, 0);
        }
        Self::DONE
    }

    /// True when no command is left to be made.
    pub(crate) fn is_done(&self) -> bool {
        self.0 == Steps::Done
    }

    /// Makes the next command. `limits` and `ranges` are those that the plan was made with, the
    /// latter empty for all but discards and write-zeroes. `scratch` is where the data of a
    /// Dataset Management command is put.
    pub(crate) fn next_part<'a>(
        &mut self,
        limits: &Limits,
        ranges: &[SectorRange],
        scratch: &'a mut Vec<u8>,
    ) -> Option<Part<'a>> {
        match self.0 {
            Steps::Done => None,
            Steps::Flush => {
                self.0 = Steps::Done;
                Some(Part {
                    sqe: Sqe::flush(limits.nsid),
                    data: PartData::None,
                })
            }
            Steps::Transfer {
                direction,
                first,
                next,
                end,
            } => Some(self.next_transfer(limits, direction, first, next, end)),
            Steps::Ranges { work, index, done } => match (work, limits.deallocate) {
                (RangeWork::Deallocate, Some(caps)) => {
                    self.next_deallocate(limits, caps, ranges, (index, done), scratch)
                }
                (RangeWork::Deallocate, None) => {
                    *self = Self::DONE;
                    None
                }
                (RangeWork::Zero { fua }, _) => {
                    self.next_zeroes(limits, fua, ranges, (index, done))
                }
            },
        }
    }

    fn next_transfer(
        &mut self,
        limits: &Limits,
        direction: Direction,
        first: u64,
        next: u64,
        end: u64,
    ) -> Part<'static> {
        let count = (end - next).min(limits.transfer_from(next));
        let after = next + count;
        self.0 = if after == end {
            Steps::Done
        } else {
            Steps::Transfer {
                direction,
                first,
                next: after,
                end,
            }
        };
        let data = if (next, after) == (first, end) {
            PartData::Whole
        } else {
            PartData::Slice(limits.bytes(next - first)..limits.bytes(after - first))
        };
        let count = command_count(count);
        let sqe = match direction {
            Direction::Read => Sqe::read(limits.nsid, next, count),
            Direction::Write { fua } => Sqe::write(limits.nsid, next, count, fua),
        };
        Part { sqe, data }
    }

    fn next_zeroes(
        &mut self,
        limits: &Limits,
        fua: bool,
        ranges: &[SectorRange],
        (index, done): (usize, u64),
    ) -> Option<Part<'static>> {
        let Some(range) = ranges.get(index) else {
            *self = Self::DONE;
            return None;
        };
        let slba = (range.sector >> (limits.block_shift - SECTOR_SHIFT)) + done;
        let most = match limits.write_zeroes {
            Some(caps) => caps.blocks,
            None => limits
                .transfer_from(slba)
                .min((ZERO_WRITE_BYTES >> limits.block_shift).max(1)),
        };
        let count = blocks_left(limits, range, done).min(most);
        let work = RangeWork::Zero { fua };
        *self = Self::ranges(limits, work, ranges, index, done + count);
        let nlb = command_count(count);
        Some(match limits.write_zeroes {
            Some(caps) => Part {
                sqe: Sqe::write_zeroes(
                    limits.nsid,
                    slba,
                    nlb,
                    range.unmap && caps.may_deallocate,
                    fua,
                ),
                data: PartData::None,
            },
            None => Part {
                sqe: Sqe::write(limits.nsid, slba, nlb, fua),
                data: PartData::Zeroes(limits.bytes(count)),
            },
        })
    }

    /// As many ranges, and pieces of ranges, as one command may hold.
    fn next_deallocate<'a>(
        &mut self,
        limits: &Limits,
        caps: DeallocateLimits,
        ranges: &[SectorRange],
        (mut index, mut done): (usize, u64),
        scratch: &'a mut Vec<u8>,
    ) -> Option<Part<'a>> {
        scratch.clear();
        let mut room = u32::from(caps.max_ranges).clamp(1, MAX_DISCARD_RANGES);
        let mut total = caps.max_blocks.unwrap_or(u64::MAX).max(1);
        let mut entries = 0;
        while let Some(range) = ranges.get(index).filter(|_| room > 0 && total > 0) {
            let most = u64::from(caps.max_range_blocks.max(1)).min(total);
            let count = blocks_left(limits, range, done).min(most);
            if count == 0 {
                (index, done) = (index + 1, 0);
                continue;
            }
            let first = limits.inner_blocks(range).map_or(0, |blocks| blocks.start);
            let entry = DsmRange {
                cattr: 0.into(),
                // A range has fewer than 2^32 sectors, so fewer blocks.
                nlb: u32::try_from(count).unwrap_or(u32::MAX).into(),
                slba: (first + done).into(),
            };
            scratch.extend_from_slice(entry.as_bytes());
            (room, total, done, entries) = (room - 1, total - count, done + count, entries + 1);
        }
        *self = Self::ranges(limits, RangeWork::Deallocate, ranges, index, done);
        (entries > 0).then(|| Part {
            sqe: Sqe::deallocate(limits.nsid, entries),
            data: PartData::Ranges(scratch),
        })
    }
}

/// Whole blocks of a range that are left after `done` of them.
fn blocks_left(limits: &Limits, range: &SectorRange, done: u64) -> u64 {
    // Checked when the plan was made, so nothing is lost by taking a refusal for emptiness.
    let blocks = limits.inner_blocks(range).unwrap_or(0..0);
    (blocks.end - blocks.start).saturating_sub(done)
}

/// A count of at most [`MAX_COMMAND_BLOCKS`] blocks.
fn command_count(blocks: u64) -> u32 {
    debug_assert!((1..=MAX_COMMAND_BLOCKS).contains(&blocks));
    u32::try_from(blocks).unwrap_or(1)
}

#[cfg(test)]
#[path = "translate_tests.rs"]
mod tests;
