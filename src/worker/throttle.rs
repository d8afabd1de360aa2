//! Limits of a disk: requests and bytes in a second, kept by all its lanes together.
//!
//! A request that may not pass yet waits at its lane's [`Gate`], and those behind it in the ring, so that a guest
//! fills its own queues and no memory of ours. Where reads and writes have limits of their own, those that wait
//! are told apart, and do not hold back the others.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use vhost_user_blk::Operation;

use super::rate::{Bucket, Rate, Ticks};

/// Limits of one kind; `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Limit {
    /// Of everything.
    pub(crate) total: Option<Rate>,
    /// Of reads.
    pub(crate) reads: Option<Rate>,
    /// Of all that changes the disk.
    pub(crate) writes: Option<Rate>,
}

/// What a disk may do in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Rates {
    /// Requests.
    pub(crate) requests: Limit,
    /// Bytes that are read and written.
    pub(crate) bytes: Limit,
}

/// What a request takes of its disk's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Weight {
    direction: Direction,
    bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

impl Weight {
    /// `None` for a flush: it moves nothing, and the guest's file systems stand still meanwhile. Discards and
    /// write-zeroes are one request each, and no bytes, since none are moved however many they name.
    pub(super) fn of(operation: &Operation) -> Option<Self> {
        let (direction, bytes) = match operation {
            Operation::Flush => return None,
            Operation::Read { sink, .. } => (Direction::Read, sink.len()),
            Operation::Write { source, .. } => (Direction::Write, source.len()),
            Operation::Discard(_) | Operation::WriteZeroes { .. } => (Direction::Write, 0),
        };
        let bytes = bytes as u64;
        Some(Self { direction, bytes })
    }
}

/// The limits of one disk, shared by its lanes.
#[derive(Debug)]
pub(crate) struct Throttle {
    /// When its time began.
    epoch: Instant,
    total: Buckets,
    reads: Buckets,
    writes: Buckets,
}

#[derive(Debug, Default)]
struct Buckets {
    requests: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Throttle {
    /// `None` where there is nothing to keep to.
    pub(crate) fn new(rates: &Rates, now: Instant) -> Option<Self> {
        let buckets = |limit: fn(&Limit) -> Option<Rate>| Buckets {
            requests: limit(&rates.requests).map(Bucket::new),
            bytes: limit(&rates.bytes).map(Bucket::new),
        };
        (*rates != Rates::default()).then(|| Self {
            epoch: now,
            total: buckets(|limit| limit.total),
            reads: buckets(|limit| limit.reads),
            writes: buckets(|limit| limit.writes),
        })
    }

    /// Reads and writes do not wait for the same.
    fn is_split(&self) -> bool {
        !self.reads.is_empty() || !self.writes.is_empty()
    }

    fn time(&self, now: Instant) -> Ticks {
        Ticks::from_elapsed(now.saturating_duration_since(self.epoch))
    }

    /// Takes what a request needs, and says when it may pass.
    fn reserve(&self, now: Ticks, weight: Weight) -> Ticks {
        let own = match weight.direction {
            Direction::Read => &self.reads,
            Direction::Write => &self.writes,
        };
        let total = self.total.reserve(now, weight.bytes);
        total.max(own.reserve(now, weight.bytes))
    }
}

impl Buckets {
    fn is_empty(&self) -> bool {
        self.requests.is_none() && self.bytes.is_none()
    }

    fn reserve(&self, now: Ticks, bytes: u64) -> Ticks {
        let passes = |bucket: &Option<Bucket>, amount| match bucket {
            Some(bucket) if amount > 0 => bucket.reserve(now, amount),
            _ => now,
        };
        passes(&self.requests, 1).max(passes(&self.bytes, bytes))
    }
}

/// Where the requests of one lane wait for the limits of its disk.
#[derive(Debug)]
pub(super) struct Gate<T> {
    throttle: Arc<Throttle>,
    /// When the turn began.
    now: Ticks,
    /// One for reads and one for the others, or the first for all.
    lines: [Line<T>; 2],
    split: bool,
    /// Requests that may wait in all.
    most: usize,
    /// The ring to ask first: the one after that whose request was the last to wait.
    first: usize,
}

/// Requests that wait, the first of which has its tokens.
#[derive(Debug)]
struct Line<T> {
    waiting: VecDeque<(Weight, T)>,
    /// When the first may pass.
    passes: Ticks,
}

impl<T> Gate<T> {
    /// One where at most `most` requests wait.
    pub(super) fn new(throttle: Arc<Throttle>, most: usize) -> Self {
        let line = || Line {
            waiting: VecDeque::new(),
            passes: Ticks::default(),
        };
        Self {
            split: throttle.is_split(),
            throttle,
            now: Ticks::default(),
            lines: [line(), line()],
            most,
            first: 0,
        }
    }

    /// A turn begins.
    pub(super) fn begin_turn(&mut self, now: Instant) {
        self.now = self.throttle.time(now);
    }

    /// The ring of `rings` that is asked for requests first, so that none gets all that there is.
    pub(super) fn first_ring(&self, rings: usize) -> usize {
        self.first % rings.max(1)
    }

    /// Nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting() == 0
    }

    /// One more request could pass, or wait without those behind it.
    pub(super) fn is_open(&self) -> bool {
        let lines = if self.split {
            &self.lines[..]
        } else {
            &self.lines[..1]
        };
        self.waiting() < self.most && lines.iter().any(|line| line.waiting.is_empty())
    }

    /// Lets a request of ring number `ring` pass that may, and gives it back; otherwise it waits here.
    pub(super) fn arrive(&mut self, ring: usize, weight: Option<Weight>, request: T) -> Option<T> {
        let Some(weight) = weight else {
            return Some(request);
        };
        let line = match weight.direction {
            Direction::Write if self.split => &mut self.lines[1],
            Direction::Read | Direction::Write => &mut self.lines[0],
        };
        if line.waiting.is_empty() {
            line.passes = self.throttle.reserve(self.now, weight);
            if line.passes <= self.now {
                return Some(request);
            }
        }
        line.waiting.push_back((weight, request));
        self.first = ring + 1;
        None
    }

    /// A request that waited and may pass now.
    pub(super) fn depart(&mut self) -> Option<T> {
        let now = self.now;
        let due = |line: &&mut Line<T>| !line.waiting.is_empty() && line.passes <= now;
        let line = self
            .lines
            .iter_mut()
            .filter(due)
            .min_by_key(|line| line.passes)?;
        line.remove(0, &self.throttle, now)
    }

    /// A request that waited and is `meant` to wait no more; others wait the longer for it.
    pub(super) fn release(&mut self, meant: impl Fn(&T) -> bool) -> Option<T> {
        for line in &mut self.lines {
            let Some(at) = line.waiting.iter().position(|(_, request)| meant(request)) else {
                continue;
            };
            return line.remove(at, &self.throttle, self.now);
        }
        None
    }

    /// When the next request may pass.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let lines = self.lines.iter().filter(|line| !line.waiting.is_empty());
        let passes = lines.map(|line| line.passes).min()?;
        // Beyond what the clock can show, never.
        self.throttle.epoch.checked_add(passes.to_elapsed())
    }

    fn waiting(&self) -> usize {
        self.lines.iter().map(|line| line.waiting.len()).sum()
    }
}

impl<T> Line<T> {
    /// Takes one out. Whoever is first then takes its tokens; the one that goes has them already, or
    /// takes them as it goes.
    fn remove(&mut self, at: usize, throttle: &Throttle, now: Ticks) -> Option<T> {
        let (weight, request) = self.waiting.remove(at)?;
        if at > 0 {
            throttle.reserve(now, weight);
        } else if let Some(&(next, _)) = self.waiting.front() {
            self.passes = throttle.reserve(now, next);
        }
        Some(request)
    }
}

#[cfg(test)]
#[path = "throttle_tests.rs"]
mod tests;
