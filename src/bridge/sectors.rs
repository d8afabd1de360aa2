//! Sectors of 512 bytes on a namespace with larger blocks: what a request needs that begins or ends within a block.
//!
//! A read is carried out for whole blocks, the guest's memory surrounded with some of ours. A write reads the blocks at its
//! edges first, and then writes whole blocks: what it has read, the guest's memory, what it has read. A write-zeroes does so at
//! its edges, and is a write-zeroes in between. A discard shrinks to the whole blocks inside it.
//!
//! Nothing else may be written to a block between the two commands that change a part of it, or it would be undone. So
//! all that writes to the disk comes by here, in one lane: what would write to a block at an edge of an earlier request,
//! or has an edge in what an earlier one writes, waits for its end. Reads wait for nobody. See
//! `docs/adr/0015-sectors.md`.

mod job;

use std::collections::VecDeque;
use std::ops::Range;

use memdesc::{MemSource, OutOfBounds, Padding};
use nvmf::spec::Status;
use vhost_user_blk::{Operation, SectorRange};

use self::job::{Edges, Job, Work, edge_reads, end_of, is_aligned, is_unaligned, piece, sectors};
use super::status::Outcome;
use super::transfer::Storage;
use super::translate::Limits;
use crate::limits::{EMULATION_BYTES, EMULATION_REQUESTS};

const SECTOR: usize = 512;
/// What cannot be.
const INTERNAL: Outcome = Outcome::Failed(Status::INTERNAL_ERROR);

/// See the module; `T` is what the owner has of a request besides the operation.
#[derive(Debug)]
pub(crate) struct Sectors<T> {
    /// log2 of the sectors in a block.
    shift: u32,
    /// For each request at work that is not aligned, two blocks: that with its first sector, and that with its last.
    padding: Padding,
    pads: Vec<u16>,
    jobs: Vec<Option<Job>>,
    free: Vec<u16>,
    /// Jobs with edges.
    edged: usize,
    /// Jobs that there were.
    arrived: u64,
    waiting: VecDeque<Waiting<T>>,
    /// A job has ended since those that wait were looked at.
    ended: bool,
}

/// What is to be begun: what the owner has of the request, the operation, and a number that is to come back with its result.
pub(crate) type Ready<T> = (T, Operation, Option<u16>);

/// What is to be done after an operation.
#[derive(Debug)]
pub(crate) enum Next {
    /// Begin this, with the same number.
    Begin(Operation),
    /// The guest's request is over, and this was it.
    Over(Operation, Outcome),
}

#[derive(Debug)]
struct Waiting<T> {
    job: u16,
    guest: T,
    operation: Operation,
    after: After,
}

/// What a request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    /// A pad.
    Pad,
    /// A job, by its place and its number.
    Job(u16, u64),
    /// It was in flight in an earlier life, and what that may still write is not known everywhere: to be collected.
    Lost,
    /// The same, collected.
    Collected,
    /// Nothing, as far as is known.
    Nothing,
}

impl<T> Sectors<T> {
    /// For as many requests as a lane has slots, of a disk with these limits; `None` where its blocks are sectors.
    pub(crate) fn new(limits: &Limits, slots: usize) -> Option<Self> {
        let shift = limits.sectors_shift();
        if shift == 0 {
            return None;
        }
        let pad = (2 * SECTOR) << shift;
        let pads =
            (EMULATION_BYTES / pad).clamp(*EMULATION_REQUESTS.start(), *EMULATION_REQUESTS.end());
        Some(Self {
            shift,
            padding: Padding::new(pads * pad),
            pads: (0..=u16::MAX).take(pads).rev().collect(),
            jobs: (0..slots).map(|_| None).collect(),
            free: (0..=u16::MAX).take(slots).rev().collect(),
            edged: 0,
            arrived: 0,
            waiting: VecDeque::with_capacity(slots),
            ended: false,
        })
    }

    /// Requests that wait.
    pub(crate) fn held(&self) -> usize {
        self.waiting.len()
    }

    /// True for what begins or ends within a block; a discard does not, since it is a hint.
    pub(crate) fn is_unaligned(&self, operation: &Operation) -> bool {
        is_unaligned(self.shift, operation)
    }

    /// Takes a request; `None` when it has to wait: [`Self::next_ready`] gives it then. `limits` are the disk's.
    ///
    /// Of more than can be named the last are begun as they are: then those that are not aligned fail, and nothing is
    /// harmed. A lane never has so many.
    pub(crate) fn arrive(
        &mut self,
        guest: T,
        operation: Operation,
        limits: &Limits,
        storage: &mut Storage,
    ) -> Option<Ready<T>> {
        let Some(job) = Job::plan(&operation, limits, self.arrived) else {
            return Some((guest, operation, None));
        };
        let after = match self.obstacle(&job) {
            None if job.padded && self.pads.is_empty() => After::Pad,
            None => After::Nothing,
            Some((place, order)) => After::Job(place, order),
        };
        let Some(place) = self.enter(job) else {
            return Some((guest, operation, None));
        };
        if after != After::Nothing {
            self.waiting.push_back(Waiting {
                job: place,
                guest,
                operation,
                after,
            });
            return None;
        }
        let (operation, place) = self.begin(place, operation, storage);
        Some((guest, operation, place))
    }

    /// Takes a request that was in flight in an earlier life: one that writes waits until that was released. Any other comes
    /// back, and is to arrive.
    pub(crate) fn recover(
        &mut self,
        guest: T,
        operation: Operation,
        limits: &Limits,
    ) -> Option<(T, Operation)> {
        let job = Job::plan(&operation, limits, self.arrived);
        let job = job.filter(|job| !job.written.is_empty());
        let Some(place) = job.and_then(|job| self.enter(job)) else {
            return Some((guest, operation));
        };
        self.waiting.push_back(Waiting {
            job: place,
            guest,
            operation,
            after: After::Lost,
        });
        None
    }

    /// The fences of what was recovered up to now have been collected.
    pub(crate) fn collected(&mut self) {
        self.change(After::Lost, After::Collected);
    }

    /// They are known everywhere.
    pub(crate) fn released(&mut self) {
        self.change(After::Collected, After::Nothing);
        self.ended = true;
    }

    fn change(&mut self, from: After, to: After) {
        for waiting in &mut self.waiting {
            if waiting.after == from {
                waiting.after = to;
            }
        }
    }

    /// A place for a job; `None` where there are as many as can be named.
    fn enter(&mut self, job: Job) -> Option<u16> {
        if self.free.is_empty() {
            // As many more as requests were in flight in an earlier life.
            self.free.push(u16::try_from(self.jobs.len()).ok()?);
            self.jobs.push(None);
        }
        let place = self.free.pop()?;
        self.arrived += 1;
        self.edged += usize::from(job.edges != Edges::None);
        *self.jobs.get_mut(usize::from(place))? = Some(job);
        Some(place)
    }

    /// The next request that has waited for long enough; it is to be begun with its number. Those that came first
    /// are first.
    pub(crate) fn next_ready(&mut self, storage: &mut Storage) -> Option<Ready<T>> {
        if !self.ended {
            return None;
        }
        for at in 0..self.waiting.len() {
            let &Waiting {
                job: place, after, ..
            } = self.waiting.get(at)?;
            let there = |(other, order)| self.job(other).is_some_and(|job| job.order == order);
            let now = match after {
                After::Lost | After::Collected => continue,
                After::Job(place, order) if there((place, order)) => continue,
                // Whatever came later does not stand in its way, so that is looked at once.
                After::Pad => None,
                After::Job(..) | After::Nothing => self.obstacle(self.job(place)?),
            };
            let now = match now {
                Some((place, order)) => After::Job(place, order),
                None if self.job(place)?.padded && self.pads.is_empty() => After::Pad,
                None => After::Nothing,
            };
            if now != After::Nothing {
                self.waiting.get_mut(at)?.after = now;
                continue;
            }
            let Waiting {
                guest, operation, ..
            } = self.waiting.remove(at)?;
            let (operation, place) = self.begin(place, operation, storage);
            return Some((guest, operation, place));
        }
        self.ended = false;
        None
    }

    /// Takes an operation back that was begun with this number, and its result.
    pub(crate) fn advance(
        &mut self,
        place: u16,
        operation: Operation,
        outcome: Outcome,
        storage: &mut Storage,
    ) -> Next {
        let slot = self.jobs.get_mut(usize::from(place));
        let Some(job) = slot.and_then(Option::as_mut) else {
            return Next::Over(operation, outcome);
        };
        match &mut job.work {
            Work::Whole => {}
            Work::Write { reads, source, .. } => {
                // Its memory comes back with its write, for whoever asks what it was.
                match operation {
                    Operation::Write { source: back, .. } => *source = Some(back),
                    other => {
                        *reads += 1;
                        storage.keep(other);
                        if outcome == Outcome::Done {
                            return self.step(place, storage);
                        }
                    }
                }
                return self.over(place, outcome);
            }
            Work::Zero {
                ranges,
                index,
                at,
                reads,
                ..
            } => {
                if let Operation::Read { .. } = operation {
                    *reads += 1;
                } else if let Some(range) = ranges.get(*index) {
                    let end = piece(self.shift, range, *at).end;
                    *reads = 0;
                    if end >= end_of(range) {
                        (*index, *at) = (*index + 1, None);
                    } else {
                        *at = Some(end);
                    }
                }
                storage.keep(operation);
                if outcome == Outcome::Done && *index < ranges.len() {
                    return self.step(place, storage);
                }
                return self.over(place, outcome);
            }
        }
        self.end(place);
        Next::Over(operation, outcome)
    }

    /// Takes out a request that waits and is `meant`, the first of several.
    pub(crate) fn give_up(&mut self, meant: impl Fn(&T) -> bool) -> Option<(T, Operation)> {
        let at = self
            .waiting
            .iter()
            .position(|waiting| meant(&waiting.guest))?;
        let Waiting {
            job,
            guest,
            operation,
            ..
        } = self.waiting.remove(at)?;
        self.end(job);
        Some((guest, operation))
    }

    /// Forgets a request that was begun, and of which nothing is under way.
    pub(crate) fn abandon(&mut self, place: u16) {
        self.end(place);
    }

    fn job(&self, place: u16) -> Option<&Job> {
        self.jobs.get(usize::from(place))?.as_ref()
    }

    /// The last of the jobs before this one that it has to wait for.
    fn obstacle(&self, job: &Job) -> Option<(u16, u64)> {
        if self.edged == 0 || job.written.is_empty() {
            return None;
        }
        let before = (0..).zip(&self.jobs).filter_map(|(place, other)| {
            let other = other.as_ref()?;
            let against = other.order < job.order
                && (other.has_edge_in(&job.written) || job.has_edge_in(&other.written));
            against.then_some((place, other.order))
        });
        before.max_by_key(|&(_, order)| order)
    }

    /// The first operation of a job, and its place unless the job is over with it. There is a pad if it needs one.
    fn begin(
        &mut self,
        place: u16,
        operation: Operation,
        storage: &mut Storage,
    ) -> (Operation, Option<u16>) {
        let Self { jobs, pads, .. } = self;
        let job = jobs.get_mut(usize::from(place)).and_then(Option::as_mut);
        let Some(job) = job.filter(|job| job.padded) else {
            return (operation, Some(place));
        };
        job.pad = pads.pop();
        match (&mut job.work, operation) {
            (Work::Write { source: kept, .. }, Operation::Write { source, .. }) => {
                *kept = Some(source);
            }
            (Work::Zero { .. }, _) => {}
            (_, operation) => return (self.surround_read(place, operation), Some(place)),
        }
        match self.step(place, storage) {
            Next::Begin(operation) => (operation, Some(place)),
            // It is not aligned, and fails as such.
            Next::Over(operation, _) => (operation, None),
        }
    }

    /// A read of all blocks that a read touches.
    fn surround_read(&self, place: u16, operation: Operation) -> Operation {
        let Operation::Read { sector, mut sink } = operation else {
            return operation;
        };
        let range = sector..sector.saturating_add(sectors(sink.len()));
        let surrounded = self
            .frame(place, &range)
            .and_then(|(before, after)| self.padding.surround_sink(before, &mut sink, after));
        match surrounded {
            Ok(()) => Operation::Read {
                sector: self.down(sector),
                sink,
            },
            // The request fails as one that is not aligned.
            Err(_) => Operation::Read { sector, sink },
        }
    }

    /// The next operation of a job that is not through.
    fn step(&mut self, place: u16, storage: &mut Storage) -> Next {
        let shift = self.shift;
        let Some(job) = self.job(place) else {
            return Next::Over(Operation::Flush, Outcome::Done);
        };
        let (range, reads, fua) = match &job.work {
            Work::Write {
                sector,
                count,
                reads,
                fua,
                ..
            } => (*sector..sector.saturating_add(*count), *reads, *fua),
            Work::Zero {
                ranges,
                index,
                at,
                reads,
                fua,
            } => {
                let Some(range) = ranges.get(*index) else {
                    return self.over(place, Outcome::Done);
                };
                let piece = piece(shift, range, *at);
                if is_aligned(shift, piece.start) && is_aligned(shift, piece.end) {
                    // Ranges have less than 2^32 sectors.
                    let count = u32::try_from(piece.end - piece.start).unwrap_or(u32::MAX);
                    let whole = SectorRange {
                        sector: piece.start,
                        count,
                        unmap: range.unmap,
                    };
                    return Next::Begin(Operation::WriteZeroes {
                        ranges: whole.into(),
                        fua: *fua,
                    });
                }
                (piece, *reads, *fua)
            }
            Work::Whole => return self.over(place, Outcome::Done),
        };
        let pad = self.pad(place);
        if let Some(read) = edge_reads(shift, &range).get(reads).copied().flatten() {
            let block = SECTOR << shift;
            let from = pad + read.to * block;
            // Always inside, since every job that gets here has a pad.
            let sink = self
                .padding
                .sink(from..from + read.blocks * block, storage.list());
            return match sink {
                Ok(sink) => Next::Begin(Operation::Read {
                    sector: read.block << shift,
                    sink,
                }),
                Err(_) => self.over(place, INTERNAL),
            };
        }
        let frame = self.frame(place, &range);
        let source = match self.jobs.get_mut(usize::from(place)) {
            Some(Some(Job {
                work: Work::Write { source, .. },
                ..
            })) => source.take(),
            _ => None,
        };
        let len = usize::try_from(range.end - range.start).unwrap_or(0) * SECTOR;
        let mut source = source.unwrap_or_else(|| MemSource::zeroes(len, storage.list()));
        let surrounded = frame
            .and_then(|(before, after)| self.padding.surround_source(before, &mut source, after));
        match surrounded {
            Ok(()) => Next::Begin(Operation::Write {
                sector: self.down(range.start),
                source,
                fua,
            }),
            Err(_) => self.over(place, INTERNAL),
        }
    }

    /// Where the pad of a job begins.
    fn pad(&self, place: u16) -> usize {
        let pad = self.job(place).and_then(|job| job.pad);
        // Without one nothing is inside.
        pad.map_or(usize::MAX / 2, |pad| {
            usize::from(pad) * ((2 * SECTOR) << self.shift)
        })
    }

    /// What is before the first of these sectors in its block, and what is after the last in its own.
    fn frame(
        &self,
        place: u16,
        range: &Range<u64>,
    ) -> Result<(Range<usize>, Range<usize>), OutOfBounds> {
        let (pad, block) = (self.pad(place), SECTOR << self.shift);
        let within = |sector: u64| (sector & ((1 << self.shift) - 1)) as usize * SECTOR;
        let before = pad..pad + within(range.start);
        let after = match within(range.end) {
            0 => pad..pad,
            last => {
                let alone = !is_aligned(self.shift, range.start)
                    && range.start >> self.shift == range.end >> self.shift;
                let from = if alone { pad } else { pad + block };
                from + last..from + block
            }
        };
        Ok((before, after))
    }

    fn down(&self, sector: u64) -> u64 {
        sector >> self.shift << self.shift
    }

    /// Ends a job of several operations: what the guest has asked for comes back.
    fn over(&mut self, place: u16, outcome: Outcome) -> Next {
        let work = self.end(place);
        let operation = match work {
            Some(Work::Write {
                sector,
                fua,
                source,
                ..
            }) => Operation::Write {
                sector,
                source: source.unwrap_or_else(|| MemSource::from_segments(Vec::new())),
                fua,
            },
            Some(Work::Zero { ranges, fua, .. }) => Operation::WriteZeroes { ranges, fua },
            Some(Work::Whole) | None => Operation::Flush,
        };
        Next::Over(operation, outcome)
    }

    /// Whoever waits for the job, or for its pad, waits no longer.
    fn end(&mut self, place: u16) -> Option<Work> {
        let job = self.jobs.get_mut(usize::from(place))?.take()?;
        self.free.push(place);
        self.pads.extend(job.pad);
        self.edged -= usize::from(job.edges != Edges::None);
        self.ended = true;
        Some(job.work)
    }
}

#[cfg(test)]
mod tests;
