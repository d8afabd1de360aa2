//! Guest requests whose commands are outstanding: one slot for each, allocated once.
//!
//! A request enters with [`Inflight::open`] and leaves with [`Inflight::take_done`], once, whatever
//! happens in between. Its commands are submitted one at a time and in turn with those of other
//! requests, so that one that needs a thousand delays nobody for long; they carry a token by which
//! their completions find the slot again. A token that no command is outstanding for is noticed.
//!
//! A request some of whose commands were lost with their queue pair waits again, and starts anew on the next:
//! everything that a guest can ask for may be done twice. One that writes where another of unknown fate may
//! still write is set aside until the fence is gone, and delays nobody else.

use std::collections::VecDeque;

use nvmf::spec::{Sqe, Status};
use nvmf::transport::{Completion, Rejected, RejectedReason, Transfer};
use vhost_user_blk::Operation;

use super::fence::{Fence, Fences, Owner};
use super::status::Outcome;
use super::transfer::{Storage, give_back, lend};
use super::translate::{Limits, PartData, Plan, RANGES_BYTES, Request};
use crate::limits::MAX_SLOTS;

/// Slots for requests; `T` is what the owner wants back with the result.
#[derive(Debug)]
pub(crate) struct Inflight<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u16>,
    /// Slots with commands to submit, in turn.
    waiting: VecDeque<u16>,
    /// Slots with commands that a fence holds back.
    fenced: VecDeque<u16>,
    /// Slots whose result is to be taken.
    done: VecDeque<u16>,
    scratch: Vec<u8>,
    /// The lane that this is of.
    lane: u16,
    /// Requests that were opened.
    opened: u64,
    /// What was handed to a queue pair that is gone and not completed, since this was last taken.
    unknown: Unknown,
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
    /// Its number among all of the lane.
    number: u64,
    /// It lost a command since it began, or began anew.
    lost: bool,
    operation: Operation,
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
    /// Room for `capacity` requests, at most [`MAX_SLOTS`], of lane number `lane`.
    pub(crate) fn new(lane: u16, capacity: usize) -> Self {
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
            done: VecDeque::with_capacity(capacity),
            scratch: Vec::with_capacity(RANGES_BYTES),
            lane,
            opened: 0,
            unknown: Unknown::default(),
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

    /// Takes a request. One that cannot be carried out, or has nothing to do, is done at once.
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
        self.opened += 1;
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            slot.entry = Some(Entry {
                guest,
                number: self.opened,
                lost: false,
                operation,
                plan,
                outstanding: 0,
                lent_whole: false,
                outcome,
            });
        }
        Ok(())
    }

    /// Submits waiting commands until there are none, or one is rejected: then it stays, and the
    /// reason is returned. `limits` are those that the requests were opened or started anew with. Requests
    /// that `fences` forbid are set aside until [`Self::fences_changed`].
    pub(crate) fn issue(
        &mut self,
        limits: &Limits,
        fences: &Fences,
        storage: &mut Storage,
        mut submit: impl FnMut(Sqe, Transfer, u64) -> Result<(), Rejected>,
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
            if !fences.is_empty() && entry.is_forbidden(limits, fences, self.lane) {
                self.waiting.pop_front();
                self.fenced.push_back(index);
                continue;
            }
            let mut plan = entry.plan;
            match entry.submit_next(
                &mut plan,
                limits,
                &mut self.scratch,
                storage,
                |sqe, data| submit(sqe, data, token),
            ) {
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

    /// Takes the completion of a command; its memory goes back to its request. False when no such
    /// command was outstanding: the transport has broken its contract. Of a command of unknown fate, what
    /// it may still write is remembered for [`Self::take_unknown`].
    pub(crate) fn settle(
        &mut self,
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
        if fate == Fate::Unknown {
            if !std::mem::replace(&mut entry.lost, true) {
                self.unknown.requests += 1;
                let owner = entry.owner(self.lane);
                entry.fence(owner, limits, &mut self.unknown.fences);
            }
            if entry.outcome == Outcome::Done && entry.plan.is_done() {
                // Whatever was done of it before is done again.
                entry.start_anew(limits);
                self.waiting.push_back(index);
            }
        } else if let status = completion.cqe.status()
            && !status.is_success()
        {
            // What was not submitted would only hide where the request failed.
            if !entry.plan.is_done() {
                self.waiting.retain(|&waiting| waiting != index);
                self.fenced.retain(|&fenced| fenced != index);
            }
            entry.give_up(status);
        }
        if entry.outstanding == 0 && entry.plan.is_done() {
            self.done.push_back(index);
        }
        true
    }

    /// What was handed to queue pairs that are gone and not completed, since the last call.
    pub(crate) fn take_unknown(&mut self) -> Unknown {
        std::mem::take(&mut self.unknown)
    }

    /// Has every request that waits begin anew, for another queue pair: what the controller takes may be
    /// different now. No command may be outstanding.
    pub(crate) fn start_anew(&mut self, limits: &Limits) {
        self.fences_changed();
        for _ in 0..self.waiting.len() {
            let Some(index) = self.waiting.pop_front() else {
                return;
            };
            let slot = self.slots.get_mut(usize::from(index));
            let Some(entry) = slot.and_then(|slot| slot.entry.as_mut()) else {
                continue;
            };
            entry.start_anew(limits);
            entry.lost = false;
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

    /// Gives up every command that was not submitted. Those that were complete as ever.
    pub(crate) fn give_up_waiting(&mut self, status: Status) {
        self.give_up_some(status, true, |_| true);
    }

    /// As [`Self::give_up_waiting`], of some requests: of those that are set aside, and with `all` of those
    /// that wait for a queue pair, too.
    pub(crate) fn give_up_some(&mut self, status: Status, all: bool, meant: impl Fn(&T) -> bool) {
        let Self {
            slots,
            waiting,
            fenced,
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
            if entry.outstanding == 0 {
                done.push_back(index);
            }
            false
        };
        if all {
            waiting.retain(&mut stays);
        }
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
    fn owner(&self, lane: u16) -> Owner {
        Owner {
            lane,
            request: self.number,
        }
    }

    fn is_forbidden(&self, limits: &Limits, fences: &Fences, lane: u16) -> bool {
        let owner = self.owner(lane);
        let mut written = limits.written(Request::from(&self.operation));
        written.any(|blocks| fences.forbid(owner, &blocks))
    }

    /// Fences all that the request writes, since its commands are not told apart. Who collects the fences says
    /// of which association they are and how long they last.
    fn fence(&self, owner: Owner, limits: &Limits, fences: &mut Fences) {
        for blocks in limits.written(Request::from(&self.operation)) {
            fences.add(Fence {
                slba: blocks.start,
                blocks: blocks.end - blocks.start,
                owner: Some(owner),
                generation: 0,
                deadline: u64::MAX,
            });
        }
    }

    fn start_anew(&mut self, limits: &Limits) {
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
