//! A decorator that delays, fails or never answers the operations that its rules pick.
//!
//! What one run does, another does again: which of the matching operations a rule picks, and how long
//! it delays each, follows from its seed and their order alone.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bitflags::bitflags;

use super::later::Step;
use super::{Backend, BackendIo, BackendOp, Counters, Done, Geometry};
use crate::spec::Status;

bitflags! {
    /// Kinds of operations.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Operations: u8 {
        /// Reads, but for a Compare.
        const READ = 1;
        /// Writes.
        const WRITE = 1 << 1;
        /// Flushes.
        const FLUSH = 1 << 2;
        /// Write Zeroes.
        const WRITE_ZEROES = 1 << 3;
        /// Ranges given back.
        const DEALLOCATE = 1 << 4;
        /// Reads for a Compare.
        const COMPARE = 1 << 5;
    }
}

/// What becomes of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It fails, undone, with this status; without one, as an unreadable or unwritable medium.
    Error(Option<Status>),
    /// It begins later; any time between the two is as likely.
    Delay {
        /// At least so much later.
        least: Duration,
        /// At most so much later.
        most: Duration,
    },
    /// It is not done, and not answered before the queue pair ends.
    Hang,
}

/// One in a million operations, as a rate.
pub const PER_MILLION: u32 = 1_000_000;

/// A rule: what to do, and with which operations. Of those that match by kind and range, `after` are
/// left alone, then every `every`th is picked with the probability `rate`, `count` times in all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What becomes of an operation that is picked.
    pub action: Action,
    /// Kinds that match.
    pub operations: Operations,
    /// Operations on any of these blocks match; with this, flushes never do.
    pub blocks: Option<RangeInclusive<u64>>,
    /// Matching operations that are left alone at first.
    pub after: u64,
    /// The first of so many matching operations is picked; 0 is taken as 1.
    pub every: u64,
    /// Probability in millionths.
    pub rate: u32,
    /// So many operations are picked, and no more.
    pub count: Option<u64>,
    /// Seed of what is up to chance.
    pub seed: u64,
    /// A delayed operation is done also when the queue that it came by has ended meanwhile: as what a disk was
    /// given, and nobody can recall.
    pub firm: bool,
}

impl Fault {
    /// A rule for every operation.
    pub fn new(action: Action) -> Self {
        Self {
            action,
            operations: Operations::all(),
            blocks: None,
            after: 0,
            every: 1,
            rate: PER_MILLION,
            count: None,
            seed: 0,
            firm: false,
        }
    }
}

struct Rule {
    fault: Fault,
    /// Operations that matched.
    matched: AtomicU64,
    /// Operations that were picked.
    picked: AtomicU64,
}

impl Rule {
    /// What the rule's chance has for this operation, when it is picked.
    fn pick(&self, operation: Operations, blocks: Option<&RangeInclusive<u64>>) -> Option<u64> {
        let fault = &self.fault;
        if !fault.operations.contains(operation) {
            return None;
        }
        if let Some(wanted) = &fault.blocks
            && !blocks
                .is_some_and(|have| have.start() <= wanted.end() && wanted.start() <= have.end())
        {
            return None;
        }
        let number = self.matched.fetch_add(1, Relaxed);
        let number = number.checked_sub(fault.after)?;
        if number % fault.every.max(1) != 0 {
            return None;
        }
        let chance = mix(fault.seed, number);
        if chance % u64::from(PER_MILLION) >= u64::from(fault.rate) {
            return None;
        }
        let most = fault.count.unwrap_or(u64::MAX);
        let more = |picked| (picked < most).then_some(picked + 1);
        self.picked.fetch_update(Relaxed, Relaxed, more).ok()?;
        Some(mix(chance, number))
    }
}

/// A number that is the same for the same two, and otherwise up to chance (SplitMix64).
pub(super) fn mix(seed: u64, number: u64) -> u64 {
    let mut bits = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// A backend with faults.
///
/// The rules are asked in order: delays add up, and the first error or hang decides. What is picked
/// for neither goes to the backend below. Memory of that is no longer used in place.
pub struct FaultBackend {
    inner: Arc<dyn Backend>,
    rules: Vec<Rule>,
}

/// What the rules say about an operation in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Perform,
    Fail(Status),
    Hang,
}

impl FaultBackend {
    /// Of the backend below and the rules.
    pub fn new(inner: Arc<dyn Backend>, faults: impl IntoIterator<Item = Fault>) -> Self {
        let rules = faults.into_iter().map(|fault| Rule {
            fault,
            matched: AtomicU64::new(0),
            picked: AtomicU64::new(0),
        });
        Self {
            inner,
            rules: rules.collect(),
        }
    }

    /// Operations that a rule has picked so far, by its place.
    pub fn picked(&self, rule: usize) -> u64 {
        self.rules
            .get(rule)
            .map_or(0, |rule| rule.picked.load(Relaxed))
    }

    fn judge(&self, operation: Operations, op: &BackendOp) -> (Duration, bool, Verdict) {
        let blocks = op.blocks(self.inner.geometry().block_size);
        let (mut delay, mut firm) = (Duration::ZERO, false);
        for rule in &self.rules {
            let Some(chance) = rule.pick(operation, blocks.as_ref()) else {
                continue;
            };
            match rule.fault.action {
                Action::Delay { least, most } => {
                    let width = most.saturating_sub(least).as_nanos();
                    let width = u64::try_from(width).unwrap_or(u64::MAX - 1);
                    firm |= rule.fault.firm;
                    delay += least + Duration::from_nanos(chance % (width + 1));
                }
                Action::Hang => return (delay, firm, Verdict::Hang),
                Action::Error(Some(status)) => return (delay, firm, Verdict::Fail(status)),
                Action::Error(None) => {
                    let reads = Operations::READ | Operations::COMPARE;
                    let status = match reads.contains(operation) {
                        true => Status::UNRECOVERED_READ_ERROR,
                        false => Status::WRITE_FAULT,
                    };
                    return (delay, firm, Verdict::Fail(status));
                }
            }
        }
        (delay, firm, Verdict::Perform)
    }

    fn begin(&self, io: &mut BackendIo, operation: Operations, op: BackendOp, token: u32) {
        let (delay, firm, verdict) = self.judge(operation, &op);
        if verdict == Verdict::Perform && delay.is_zero() {
            return self.inner.submit(io, op, token);
        }
        let held = Box::new(Held {
            inner: Arc::clone(&self.inner),
            op,
            token,
            verdict,
        });
        match delay.is_zero() {
            true => held.resume(io, None),
            false => io.wait_for(Some(delay), held, firm),
        }
    }
}

/// An operation that a rule has picked.
struct Held {
    inner: Arc<dyn Backend>,
    op: BackendOp,
    token: u32,
    verdict: Verdict,
}

impl Step for Held {
    fn resume(self: Box<Self>, io: &mut BackendIo, _done: Option<Done>) {
        let Self {
            inner, op, token, ..
        } = *self;
        match self.verdict {
            Verdict::Perform => inner.submit(io, op, token),
            Verdict::Fail(status) => {
                inner.counters().count_error();
                io.finish(token, op.into_transfer(), Err(status));
            }
            verdict @ Verdict::Hang => {
                let held = Self {
                    inner,
                    op,
                    token,
                    verdict,
                };
                io.wait_for(None, Box::new(held), false);
            }
        }
    }

    fn abandon(self: Box<Self>, io: &mut BackendIo) {
        let status = Status::ABORTED_SQ_DELETION;
        io.finish(self.token, self.op.into_transfer(), Err(status));
    }
}

impl Backend for FaultBackend {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn counters(&self) -> &Counters {
        self.inner.counters()
    }

    fn submit(&self, io: &mut BackendIo, op: BackendOp, token: u32) {
        let operation = match &op {
            BackendOp::Read { .. } => Operations::READ,
            BackendOp::Write { .. } => Operations::WRITE,
            BackendOp::Flush => Operations::FLUSH,
            BackendOp::WriteZeroes { .. } => Operations::WRITE_ZEROES,
            BackendOp::Deallocate { .. } => Operations::DEALLOCATE,
        };
        self.begin(io, operation, op, token);
    }

    fn submit_for_compare(&self, io: &mut BackendIo, op: BackendOp, token: u32) {
        self.begin(io, Operations::COMPARE, op, token);
    }

    fn grow(&self) -> std::io::Result<bool> {
        self.inner.grow()
    }

    fn sync(&self) -> std::io::Result<()> {
        self.inner.sync()
    }
}
