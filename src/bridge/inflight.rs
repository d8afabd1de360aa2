//! Guest requests whose commands are outstanding: one slot for each, allocated once.
//!
//! A request enters with [`Inflight::open`] and leaves with [`Inflight::take_done`], once, whatever
//! happens in between. Its commands are submitted one at a time and in turn with those of other
//! requests, so that one that needs a thousand delays nobody for long; they carry a token by which
//! their completions find the slot again. A token that no command is outstanding for is noticed.
//!
//! A request some of whose commands were lost with their path, or failed in passing, is parked and begins anew,
//! whole, when that may be: everything that a guest can ask for may be done twice. What was lost with a path begins
//! anew once the loss is released, which is when every lane of the disk knows the fences that it left. A request
//! that writes where another of unknown fate may still write is set aside until the fence is gone, and delays
//! nobody else.

mod left;

use std::collections::VecDeque;
use std::ops::Range;

use nvmf::spec::{Sqe, Status};
use nvmf::transport::{Completion, Rejected, RejectedReason, Transfer};
use vhost_user_blk::Operation;

use super::fence::{Fence, Fences, Owner};
use super::path_choice::PathSet;
use super::retry::pause;
use super::status::Outcome;
use super::transfer::{Storage, give_back, lend};
use super::translate::{Limits, PartData, Plan, RANGES_BYTES, Request};
use crate::limits::{MAX_PATHS, MAX_RETRIES, MAX_SLOTS};

/// An attempt that does not count is made as after so many that do.
const UNCOUNTED: u8 = 2;

/// Slots for requests; `T` is what the owner wants back with the result.
#[derive(Debug)]
pub(crate) struct Inflight<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u16>,
    /// Slots with commands to submit, in turn.
    waiting: VecDeque<u16>,
    /// Slots with commands that a fence holds back.
    fenced: VecDeque<u16>,
    /// Slots whose requests begin anew later.
    parked: VecDeque<u16>,
    /// Tokens of requests that were under way when fences came that are against them.
    overtaken: Vec<u64>,
    /// Slots whose result is to be taken.
    done: VecDeque<u16>,
    scratch: Vec<u8>,
    /// By path, and for an earlier life: what was handed to a queue pair that is gone and not completed, since this was last taken.
    unknown: Vec<Unknown>,
}

/// Where commands go.
pub(crate) trait Outlet {
    /// The path for the next command, preferably none of `avoid`; `None` when there is no path to use.
    fn choose(&mut self, avoid: PathSet) -> Option<usize>;

    /// What the controller on that path takes; `None` when there is no such path.
    fn limits(&self, path: usize) -> Option<&Limits>;

    /// Hands a command to that path.
    ///
    /// # Errors
    /// [`Rejected`] gives the data back.
    fn submit(
        &mut self,
        path: usize,
        sqe: Sqe,
        transfer: Transfer,
        token: u64,
    ) -> Result<(), Rejected>;
}

/// What is left of a queue pair that is gone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Unknown {
    /// Requests that lost commands.
    pub(crate) requests: u64,
    /// Blocks that they may still write to.
    pub(crate) fences: Fences,
}

/// How a command came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The completion is the controller's, or the transport knows better.
    Known,
    /// Nobody knows: its queue pair is gone.
    Unknown,
    /// It failed, and is worth another attempt.
    Again(Again),
}

/// How a request that failed is attempted again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Again {
    /// Milliseconds of the caller's clock, not 0.
    pub(crate) now: u64,
    /// The pause that the controller asks for, in milliseconds.
    pub(crate) asked: Option<u64>,
    /// On another path, if there is one.
    pub(crate) elsewhere: bool,
    /// It is one of the attempts that a request has.
    pub(crate) counted: bool,
}

#[derive(Debug)]
struct Slot<T> {
    /// Changes with every request; part of the token.
    generation: u32,
    entry: Option<Entry<T>>,
}

#[derive(Debug)]
struct Entry<T> {
    guest: T,
    /// Names it in the whole disk.
    owner: Owner,
    /// The paths whose loss took commands of it and was not collected yet.
    lost: PathSet,
    /// Those whose loss was collected and not released yet.
    collected: PathSet,
    /// It is parked: nothing of it is issued until it begins anew.
    parked: bool,
    /// When it may begin anew; 0 is at once.
    due: u64,
    /// Paths that it failed on.
    avoid: PathSet,
    /// Attempts that failed and counted.
    retries: u8,
    operation: Operation,
    /// Bytes of memory that the operation has when none is lent to a command.
    len: usize,
    plan: Plan,
    /// Commands submitted and not completed.
    outstanding: u32,
    /// The one outstanding command has all of the operation's memory.
    lent_whole: bool,
    outcome: Outcome,
}

/// A request that is over. No command refers to the operation's memory any more.
#[derive(Debug)]
pub(crate) struct Finished<T> {
    /// What [`Inflight::open`] was given.
    pub(crate) guest: T,
    /// Likewise; hand it to [`Storage::keep`].
    pub(crate) operation: Operation,
    /// The result.
    pub(crate) outcome: Outcome,
}

impl<T> Inflight<T> {
    /// Room for `capacity` requests, at most [`MAX_SLOTS`].
    pub(crate) fn new(capacity: usize) -> Self {
        let capacity = capacity.clamp(1, MAX_SLOTS);
        let slot = |_| Slot {
            generation: 0,
            entry: None,
        };
        Self {
            slots: (0..capacity).map(slot).collect(),
            free: (0..=u16::MAX).take(capacity).rev().collect(),
            waiting: VecDeque::with_capacity(capacity),
            fenced: VecDeque::with_capacity(capacity),
            parked: VecDeque::with_capacity(capacity),
            overtaken: Vec::new(),
            done: VecDeque::with_capacity(capacity),
            scratch: Vec::with_capacity(RANGES_BYTES),
            unknown: vec![Unknown::default(); MAX_PATHS + 1],
        }
    }

    /// Requests that can be opened now.
    pub(crate) fn room(&self) -> usize {
        self.free.len()
    }

    /// True when commands wait to be submitted.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Takes a request, which `owner` names in the whole disk. One that cannot be carried out, or has nothing to do,
    /// is done at once.
    ///
    /// # Errors
    /// There is no [`Self::room`]; it comes back as it was.
    #[expect(
        clippy::result_large_err,
        reason = "boxing it would allocate for a request; callers look for room first"
    )]
    pub(crate) fn open(
        &mut self,
        guest: T,
        owner: Owner,
        operation: Operation,
        limits: &Limits,
    ) -> Result<(), (T, Operation)> {
        let Some(index) = self.free.pop() else {
            return Err((guest, operation));
        };
        let (plan, outcome) = match Plan::new(limits, Request::from(&operation)) {
            Ok(plan) => (plan, Outcome::Done),
            Err(refused) => (Plan::DONE, Outcome::Refused(refused)),
        };
        if plan.is_done() {
            self.done.push_back(index);
        } else {
            self.waiting.push_back(index);
        }
        let len = match &operation {
            Operation::Read { sink, .. } => sink.len(),
            Operation::Write { source, .. } => source.len(),
            Operation::Flush | Operation::Discard(_) | Operation::WriteZeroes { .. } => 0,
        };
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            slot.entry = Some(Entry {
                guest,
                owner,
                lost: PathSet::EMPTY,
                collected: PathSet::EMPTY,
                parked: false,
                due: 0,
                avoid: PathSet::EMPTY,
                retries: 0,
                operation,
                len,
                plan,
                outstanding: 0,
                lent_whole: false,
                outcome,
            });
        }
        Ok(())
    }

    /// Submits waiting commands until there are none, there is no path, or one is rejected: then it stays, and
    /// the reason is returned. `limits` are the disk's. Requests that `fences` forbid are set aside until
    /// [`Self::fences_changed`].
    pub(crate) fn issue(
        &mut self,
        limits: &Limits,
        fences: &Fences,
        storage: &mut Storage,
        outlet: &mut impl Outlet,
    ) -> Option<RejectedReason> {
        while let Some(&index) = self.waiting.front() {
            let Some(slot) = self.slots.get_mut(usize::from(index)) else {
                self.waiting.pop_front();
                continue;
            };
            let token = token(slot.generation, index);
            let Some(entry) = &mut slot.entry else {
                self.waiting.pop_front();
                continue;
            };
            if !fences.is_empty() && entry.is_forbidden(limits, fences) {
                self.waiting.pop_front();
                self.fenced.push_back(index);
                continue;
            }
            let path = outlet.choose(entry.avoid)?;
            let mut plan = entry.plan;
            let taken = *outlet.limits(path)?;
            let submit = |sqe, data| outlet.submit(path, sqe, data, token);
            match entry.submit_next(&mut plan, &taken, &mut self.scratch, storage, submit) {
                Ok(()) => entry.plan = plan,
                Err(Stopped::Rejected(reason)) => return Some(reason),
                Err(Stopped::Impossible) => entry.give_up(Status::INTERNAL_ERROR),
            }
            self.waiting.pop_front();
            if !entry.plan.is_done() {
                self.waiting.push_back(index);
            } else if entry.outstanding == 0 {
                self.done.push_back(index);
            }
        }
        None
    }

    /// Takes the completion of a command that was submitted on `path`; its memory goes back to its request.
    /// False when no such command was outstanding: the transport has broken its contract. Of a command of
    /// unknown fate, what it may still write is remembered for [`Self::take_unknown`].
    pub(crate) fn settle(
        &mut self,
        path: usize,
        completion: Completion,
        fate: Fate,
        limits: &Limits,
        storage: &mut Storage,
    ) -> bool {
        let (generation, index) = parse_token(completion.token);
        let slot = self.slots.get_mut(usize::from(index));
        let entry = slot
            .filter(|slot| slot.generation == generation)
            .and_then(|slot| slot.entry.as_mut())
            .filter(|entry| entry.outstanding > 0);
        let Some(entry) = entry else {
            tracing::error!(token = completion.token, "a completion came from nowhere");
            return false;
        };
        give_back(
            &mut entry.operation,
            completion.transfer,
            std::mem::take(&mut entry.lent_whole),
            storage,
        );
        entry.outstanding -= 1;
        let status = completion.cqe.status();
        let begins_anew = match fate {
            Fate::Unknown => {
                if !entry.lost.insert(path)
                    && let Some(unknown) = self.unknown.get_mut(path)
                {
                    unknown.requests += 1;
                    entry.fence(limits, &mut unknown.fences);
                }
                true
            }
            Fate::Again(again) => entry.attempts_again(path, again),
            Fate::Known => false,
        };
        let begins_anew = begins_anew && entry.outcome == Outcome::Done;
        if begins_anew {
            if !std::mem::replace(&mut entry.parked, true) {
                self.parked.push_back(index);
                if !entry.plan.is_done() {
                    // Whatever was done of it before is done again.
                    entry.plan = Plan::DONE;
                    self.waiting.retain(|&waiting| waiting != index);
                    self.fenced.retain(|&fenced| fenced != index);
                }
            }
        } else if fate != Fate::Unknown && !status.is_success() {
            // What was not submitted would only hide where the request failed.
            if !entry.plan.is_done() {
                self.waiting.retain(|&waiting| waiting != index);
                self.fenced.retain(|&fenced| fenced != index);
            }
            if std::mem::take(&mut entry.parked) {
                self.parked.retain(|&parked| parked != index);
            }
            entry.give_up(status);
        }
        if entry.parked {
            if entry.begins(0) {
                self.begin_anew(0, limits);
            }
        } else if entry.outstanding == 0 && entry.plan.is_done() {
            self.done.push_back(index);
        }
        true
    }

    /// What was handed to queue pairs of `path` that are gone and not completed, since the last call.
    ///
    /// What is lost later with the next association of the path is not meant by a release that is under way now.
    pub(crate) fn take_unknown(&mut self, path: usize) -> Unknown {
        for index in &self.parked {
            let slot = self.slots.get_mut(usize::from(*index));
            if let Some(entry) = slot.and_then(|slot| slot.entry.as_mut())
                && entry.lost.remove(path)
            {
                entry.collected.insert(path);
            }
        }
        let unknown = self.unknown.get_mut(path);
        unknown.map(std::mem::take).unwrap_or_default()
    }

    /// The fences that lost paths have left are known to all lanes: what was lost with these paths, and collected,
    /// begins anew.
    pub(crate) fn release(&mut self, paths: PathSet, limits: &Limits) {
        for index in &self.parked {
            let slot = self.slots.get_mut(usize::from(*index));
            if let Some(entry) = slot.and_then(|slot| slot.entry.as_mut()) {
                entry.collected.remove_all(paths);
            }
        }
        self.begin_anew(0, limits);
    }

    /// When the next request that is parked for a time may begin anew, in milliseconds of the caller's clock.
    pub(crate) fn next_due(&self) -> Option<u64> {
        let due = |index: &u16| {
            let entry = self.slots.get(usize::from(*index))?.entry.as_ref()?;
            (entry.due > 0 && entry.begins(u64::MAX)).then_some(entry.due)
        };
        self.parked.iter().filter_map(due).min()
    }

    /// Has every parked request begin anew that may: nothing of it is outstanding, its losses are released, and
    /// its time has come.
    pub(crate) fn begin_anew(&mut self, now: u64, limits: &Limits) {
        for _ in 0..self.parked.len() {
            let Some(index) = self.parked.pop_front() else {
                return;
            };
            let slot = self.slots.get_mut(usize::from(index));
            let Some(entry) = slot.and_then(|slot| slot.entry.as_mut()) else {
                continue;
            };
            if !entry.begins(now) {
                self.parked.push_back(index);
                continue;
            }
            entry.start_anew(limits);
            if entry.plan.is_done() {
                self.done.push_back(index);
            } else {
                self.waiting.push_back(index);
            }
        }
    }

    /// Looks again at what was set aside.
    pub(crate) fn fences_changed(&mut self) {
        self.waiting.append(&mut self.fenced);
    }

    /// Remembers which requests have commands outstanding that `fences` forbid from now on.
    pub(crate) fn note_overtaken(&mut self, limits: &Limits, fences: &Fences) {
        self.overtaken.clear();
        if fences.is_empty() {
            return;
        }
        for (slot, index) in self.slots.iter().zip(0..) {
            let entry = slot.entry.as_ref().filter(|entry| entry.outstanding > 0);
            if entry.is_some_and(|entry| entry.is_forbidden(limits, fences)) {
                self.overtaken.push(token(slot.generation, index));
            }
        }
    }

    /// True while one of those has a command outstanding.
    pub(crate) fn is_overtaken(&mut self) -> bool {
        let Self {
            overtaken, slots, ..
        } = self;
        overtaken.retain(|&token| {
            let (generation, index) = parse_token(token);
            let slot = slots.get(usize::from(index));
            let slot = slot.filter(|slot| slot.generation == generation);
            let entry = slot.and_then(|slot| slot.entry.as_ref());
            entry.is_some_and(|entry| entry.outstanding > 0)
        });
        !overtaken.is_empty()
    }

    /// Gives up every command that was not submitted. Those that were complete as ever.
    pub(crate) fn give_up_waiting(&mut self, status: Status) {
        self.give_up_some(status, true, |_| true);
    }

    /// As [`Self::give_up_waiting`], of some requests: of those that are set aside or parked, and with `all` of
    /// those that wait for a path, too.
    pub(crate) fn give_up_some(&mut self, status: Status, all: bool, meant: impl Fn(&T) -> bool) {
        let Self {
            slots,
            waiting,
            fenced,
            parked,
            done,
            ..
        } = self;
        let mut stays = |&index: &u16| {
            let slot = slots.get_mut(usize::from(index));
            let Some(entry) = slot.and_then(|slot| slot.entry.as_mut()) else {
                return false;
            };
            if !meant(&entry.guest) {
                return true;
            }
            entry.give_up(status);
            entry.parked = false;
            if entry.outstanding == 0 {
                done.push_back(index);
            }
            false
        };
        if all {
            waiting.retain(&mut stays);
        }
        parked.retain(&mut stays);
        fenced.retain(stays);
    }

    /// A request that is over.
    pub(crate) fn take_done(&mut self) -> Option<Finished<T>> {
        let index = self.done.pop_front()?;
        let slot = self.slots.get_mut(usize::from(index))?;
        slot.generation = slot.generation.wrapping_add(1);
        let entry = slot.entry.take()?;
        self.free.push(index);
        Some(Finished {
            guest: entry.guest,
            operation: entry.operation,
            outcome: entry.outcome,
        })
    }
}

/// Why a command was not submitted.
enum Stopped {
    Rejected(RejectedReason),
    /// The operation does not have the memory that its plan speaks of.
    Impossible,
}

impl<T> Entry<T> {
    /// The blocks that it changes, also while its memory is lent.
    fn written<'a>(&'a self, limits: &Limits) -> impl Iterator<Item = Range<u64>> + 'a {
        let mut request = Request::from(&self.operation);
        if let Request::Write { len, .. } = &mut request {
            *len = self.len;
        }
        limits.written(request)
    }

    fn is_forbidden(&self, limits: &Limits, fences: &Fences) -> bool {
        let mut written = self.written(limits);
        written.any(|blocks| fences.forbid(self.owner, &blocks))
    }

    /// Fences all that the request writes, since its commands are not told apart. Who collects the fences says
    /// of which association they are and how long they last.
    fn fence(&self, limits: &Limits, fences: &mut Fences) {
        for blocks in self.written(limits) {
            fences.add(Fence {
                slba: blocks.start,
                blocks: blocks.end - blocks.start,
                owner: Some(self.owner),
                generation: 0,
                deadline: u64::MAX,
            });
        }
    }

    /// It is parked and may begin anew.
    fn begins(&self, now: u64) -> bool {
        let released = self.lost.is_empty() && self.collected.is_empty();
        self.parked && self.outstanding == 0 && released && self.due <= now
    }

    /// Notes what was decided about an attempt that failed on `path`; false when it was the last.
    fn attempts_again(&mut self, path: usize, again: Again) -> bool {
        let mut failures = UNCOUNTED;
        if again.counted {
            if self.retries >= MAX_RETRIES {
                return false;
            }
            self.retries += 1;
            failures = self.retries;
        }
        if again.elsewhere {
            self.avoid.insert(path);
        }
        let pause = pause(failures, again.asked);
        if pause > 0 {
            self.due = self.due.max(again.now.saturating_add(pause));
        }
        true
    }

    fn start_anew(&mut self, limits: &Limits) {
        (self.parked, self.due) = (false, 0);
        match Plan::new(limits, Request::from(&self.operation)) {
            Ok(plan) => self.plan = plan,
            Err(refused) => {
                self.plan = Plan::DONE;
                self.outcome = Outcome::Refused(refused);
            }
        }
    }

    /// The first failure wins.
    fn give_up(&mut self, status: Status) {
        self.plan = Plan::DONE;
        if self.outcome == Outcome::Done {
            self.outcome = Outcome::Failed(status);
        }
    }

    fn submit_next(
        &mut self,
        plan: &mut Plan,
        limits: &Limits,
        scratch: &mut Vec<u8>,
        storage: &mut Storage,
        submit: impl FnOnce(Sqe, Transfer) -> Result<(), Rejected>,
    ) -> Result<(), Stopped> {
        let ranges = match Request::from(&self.operation) {
            Request::Discard(ranges) | Request::WriteZeroes { ranges, .. } => ranges,
            Request::Read { .. } | Request::Write { .. } | Request::Flush => &[],
        };
        let Some(part) = plan.next_part(limits, ranges, scratch) else {
            return Ok(());
        };
        let whole = part.data == PartData::Whole;
        let transfer =
            lend(&mut self.operation, part.data, storage).map_err(|_| Stopped::Impossible)?;
        match submit(part.sqe, transfer) {
            Ok(()) => {
                self.outstanding += 1;
                self.lent_whole = whole;
                Ok(())
            }
            Err(Rejected { transfer, reason }) => {
                give_back(&mut self.operation, transfer, whole, storage);
                Err(Stopped::Rejected(reason))
            }
        }
    }
}

fn token(generation: u32, index: u16) -> u64 {
    u64::from(generation) << 16 | u64::from(index)
}

fn parse_token(token: u64) -> (u32, u16) {
    ((token >> 16) as u32, token as u16)
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "paths_tests.rs"]
mod paths_tests;
