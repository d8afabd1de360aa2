//! Guest requests whose commands are outstanding: one slot for each, allocated once.
//!
//! A request enters with [`Inflight::open`] and leaves with [`Inflight::take_done`], once, whatever
//! happens in between. Its commands are submitted one at a time and in turn with those of other
//! requests, so that one that needs a thousand delays nobody for long; they carry a token by which
//! their completions find the slot again. A token that no command is outstanding for is noticed.

use std::collections::VecDeque;

use nvmf::spec::{Sqe, Status};
use nvmf::transport::{Completion, Rejected, RejectedReason, Transfer};
use vhost_user_blk::Operation;

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
    /// Slots whose result is to be taken.
    done: VecDeque<u16>,
    scratch: Vec<u8>,
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
            done: VecDeque::with_capacity(capacity),
            scratch: Vec::with_capacity(RANGES_BYTES),
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
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            slot.entry = Some(Entry {
                guest,
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
    /// reason is returned. `limits` are those that the requests were opened with.
    pub(crate) fn issue(
        &mut self,
        limits: &Limits,
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
    /// command was outstanding: the transport has broken its contract.
    pub(crate) fn settle(&mut self, completion: Completion, storage: &mut Storage) -> bool {
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
        if !status.is_success() {
            // What was not submitted would only hide where the request failed.
            if !entry.plan.is_done() {
                self.waiting.retain(|&waiting| waiting != index);
            }
            entry.give_up(status);
        }
        if entry.outstanding == 0 && entry.plan.is_done() {
            self.done.push_back(index);
        }
        true
    }

    /// Gives up every command that was not submitted. Those that were complete as ever.
    pub(crate) fn give_up_waiting(&mut self, status: Status) {
        for index in self.waiting.drain(..) {
            let slot = self.slots.get_mut(usize::from(index));
            if let Some(entry) = slot.and_then(|slot| slot.entry.as_mut()) {
                entry.give_up(status);
                if entry.outstanding == 0 {
                    self.done.push_back(index);
                }
            }
        }
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
