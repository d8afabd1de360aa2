//! Requests that outlive whoever has them: those of an earlier life are opened as lost, and those that cannot be
//! finished now are left to a later one.

use vhost_user_blk::Operation;

use super::{Inflight, Slot};
use crate::bridge::fence::{Fence, Owner};
use crate::bridge::path_choice::EARLIER_LIFE;
use crate::bridge::translate::{Limits, Plan, Request};
use crate::limits::MAX_SLOTS;

impl<T> Inflight<T> {
    /// Requests that can be in flight at once.
    pub(crate) fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// Makes room for so many requests now, as far as [`MAX_SLOTS`] allow. Allocates, so it is not for the data path.
    pub(crate) fn make_room(&mut self, room: usize) {
        let wanted = (self.slots.len() - self.free.len()).saturating_add(room);
        let more = wanted.min(MAX_SLOTS).saturating_sub(self.slots.len());
        let indices = (0..=u16::MAX).skip(self.slots.len()).take(more);
        self.free.extend(indices);
        self.slots.extend((0..more).map(|_| Slot {
            generation: 0,
            entry: None,
        }));
        for list in [
            &mut self.waiting,
            &mut self.fenced,
            &mut self.parked,
            &mut self.done,
        ] {
            list.reserve(self.slots.len() - list.len());
        }
    }

    /// Takes a request that was in flight before. What writes is parked as lost with [`EARLIER_LIFE`], and begins anew
    /// when that is released; if somebody may have sent it `already`, what it writes is fenced. What does not write
    /// may be done at any time, and so it begins at once.
    ///
    /// # Errors
    /// There is no [`Self::room`]; it comes back as it was.
    #[expect(
        clippy::result_large_err,
        reason = "as for `open`; callers make room first"
    )]
    pub(crate) fn open_lost(
        &mut self,
        guest: T,
        owner: Owner,
        operation: Operation,
        already: bool,
        limits: &Limits,
    ) -> Result<(), (T, Operation)> {
        let next = self.free.last().copied();
        self.open(guest, owner, operation, limits)?;
        let Self {
            slots,
            waiting,
            parked,
            unknown,
            ..
        } = self;
        let slot = next.and_then(|index| slots.get_mut(usize::from(index)));
        let (Some(index), Some(entry)) = (next, slot.and_then(|slot| slot.entry.as_mut())) else {
            return Ok(());
        };
        let Some(unknown) = unknown.get_mut(EARLIER_LIFE) else {
            return Ok(());
        };
        unknown.requests += 1;
        if entry.plan.is_done() || entry.written(limits).next().is_none() {
            return Ok(());
        }
        waiting.retain(|&waiting| waiting != index);
        entry.plan = Plan::DONE;
        entry.parked = true;
        entry.lost.insert(EARLIER_LIFE);
        parked.push_back(index);
        if already {
            entry.fence(limits, &mut unknown.fences);
        }
        Ok(())
    }

    /// Notes a request that was in flight before and is kept elsewhere until [`EARLIER_LIFE`] is released: as for
    /// [`Self::open_lost`], what it writes is fenced if somebody may have sent it `already`.
    pub(crate) fn note_lost(
        &mut self,
        owner: Owner,
        operation: &Operation,
        already: bool,
        limits: &Limits,
    ) {
        let Some(unknown) = self.unknown.get_mut(EARLIER_LIFE) else {
            return;
        };
        unknown.requests += 1;
        for blocks in limits.written(Request::from(operation)).filter(|_| already) {
            unknown.fences.add(Fence {
                slba: blocks.start,
                blocks: blocks.end - blocks.start,
                owner: Some(owner),
                generation: 0,
                deadline: u64::MAX,
            });
        }
    }

    /// Stops what is `meant`: nothing more of it is issued, and what has no command outstanding is taken out, one by
    /// one, without a result. What has commands outstanding is taken out by a later call, unless they were its last
    /// and it is done.
    pub(crate) fn take_left(&mut self, meant: impl Fn(&T) -> bool) -> Option<(T, Operation)> {
        let Self {
            slots,
            free,
            waiting,
            fenced,
            parked,
            ..
        } = self;
        let entry_of = |slots: &[Slot<T>], index: u16| {
            let entry = slots.get(usize::from(index))?.entry.as_ref()?;
            Some(meant(&entry.guest))
        };
        let stays = |index: &u16| entry_of(slots, *index) == Some(false);
        waiting.retain(stays);
        fenced.retain(stays);
        let at = slots.iter().position(|slot| {
            let entry = slot.entry.as_ref().filter(|entry| meant(&entry.guest));
            // With a plan that is through it has a result, unless it begins anew.
            entry.is_some_and(|entry| {
                entry.outstanding == 0 && (entry.parked || !entry.plan.is_done())
            })
        })?;
        let index = u16::try_from(at).ok()?;
        parked.retain(|&parked| parked != index);
        let slot = slots.get_mut(at)?;
        slot.generation = slot.generation.wrapping_add(1);
        let entry = slot.entry.take()?;
        free.push(index);
        Some((entry.guest, entry.operation))
    }
}

#[cfg(test)]
mod tests {
    use nvmf::spec::Status;

    use super::super::tests::{Rig, only, write};
    use super::super::{Fate, Outcome};
    use super::*;

    const STRANGER: Owner = Owner {
        ring: 9,
        request: 0,
    };

    impl Rig {
        fn open_lost(&mut self, guest: u32, operation: Operation, already: bool) {
            let owner = self.owner();
            self.inflight
                .open_lost(guest, owner, operation, already, &self.limits)
                .expect("there is room");
        }

        fn left(&mut self) -> Option<u32> {
            Some(self.inflight.take_left(|_| true)?.0)
        }
    }

    #[test]
    fn writes_of_an_earlier_life_begin_in_their_order_after_their_fences_were_collected_and_released()
     {
        let mut rig = Rig::new(4);
        rig.open_lost(1, write(0, 4096), true);
        rig.open_lost(2, write(64, 4096), true);
        assert_eq!(rig.issue(), None);
        assert!(rig.queue.held.is_empty());
        // A release of what was collected before is not meant for them.
        rig.inflight.release(only(EARLIER_LIFE), &rig.limits);
        assert_eq!(rig.issue(), None);
        assert!(rig.queue.held.is_empty());
        let left = rig.inflight.take_unknown(EARLIER_LIFE);
        assert_eq!((left.requests, left.fences.len()), (2, 2));
        assert!(left.fences.forbid(STRANGER, &(7..8)) && left.fences.forbid(STRANGER, &(64..65)));
        rig.fences = left.fences;
        rig.inflight.release(only(EARLIER_LIFE), &rig.limits);
        assert_eq!(rig.issue(), None, "their own fences are none to them");
        let order: Vec<u64> = rig.queue.held.iter().map(|held| held.0.slba()).collect();
        assert_eq!(order, [0, 64]);
        rig.complete(Status::SUCCESS);
        assert_eq!(rig.done(), Some((1, Outcome::Done)));
    }

    #[test]
    fn what_nobody_can_have_sent_leaves_no_fence_and_what_does_not_write_begins_at_once() {
        let mut rig = Rig::new(4);
        rig.open_lost(1, write(0, 4096), false);
        rig.open_lost(2, Operation::Flush, true);
        assert_eq!(rig.issue(), None);
        assert_eq!(rig.queue.held.len(), 1);
        let left = rig.inflight.take_unknown(EARLIER_LIFE);
        assert_eq!((left.requests, left.fences.len()), (2, 0));
        rig.inflight.release(only(EARLIER_LIFE), &rig.limits);
        assert_eq!(rig.issue(), None);
        assert_eq!(rig.queue.held.len(), 2);
    }

    #[test]
    fn there_is_room_for_as_many_as_were_in_flight_and_slots_do_not_name_two() {
        let mut rig = Rig::new(100);
        rig.open(0, write(0, 512));
        rig.inflight.make_room(60);
        assert_eq!((rig.inflight.room(), rig.inflight.capacity()), (60, 61));
        for guest in 1..=60 {
            rig.open_lost(guest, write(guest.into(), 512), true);
        }
        assert_eq!(rig.inflight.room(), 0);
        rig.inflight.take_unknown(EARLIER_LIFE);
        rig.inflight.release(only(EARLIER_LIFE), &rig.limits);
        rig.issue();
        assert_eq!(rig.queue.held.len(), 61);
        while !rig.queue.held.is_empty() {
            rig.complete(Status::SUCCESS);
        }
        let done: Vec<u32> = std::iter::from_fn(|| rig.done())
            .map(|done| done.0)
            .collect();
        assert_eq!(done, (0..=60).collect::<Vec<u32>>());
        rig.inflight.make_room(usize::MAX);
        assert_eq!(rig.inflight.capacity(), MAX_SLOTS);
    }

    #[test]
    fn what_was_not_begun_and_what_waits_is_left_and_what_is_done_is_not() {
        let mut rig = Rig::new(1);
        rig.open(1, write(0, 4096));
        rig.open(2, write(64, 4096));
        rig.open_lost(3, write(128, 4096), true);
        rig.issue();
        rig.complete(Status::SUCCESS);
        assert_eq!(
            (rig.left(), rig.left(), rig.left()),
            (Some(2), Some(3), None)
        );
        assert_eq!(rig.done(), Some((1, Outcome::Done)));
        assert_eq!(rig.inflight.room(), 4);
        assert_eq!(rig.issue(), None);
        assert!(rig.queue.held.is_empty() && !rig.inflight.is_waiting());
    }

    #[test]
    fn what_is_under_way_is_left_when_its_command_is_back_unless_it_was_the_last() {
        let mut rig = Rig::new(3);
        rig.open(1, write(0, 3 * 4096));
        rig.open(2, write(64, 2 * 4096));
        rig.open(3, write(128, 4096));
        // One command of 1 and 3 each, the other has none.
        rig.queue.room = 3;
        assert!(rig.issue().is_some());
        assert_eq!(rig.left(), None, "each has a command outstanding");
        assert!(rig.issue().is_none() && rig.queue.held.len() == 3);
        for _ in 0..3 {
            rig.complete(Status::SUCCESS);
        }
        assert_eq!(
            (rig.left(), rig.left(), rig.left()),
            (Some(1), Some(2), None)
        );
        assert_eq!(rig.done(), Some((3, Outcome::Done)));
        assert_eq!((rig.done(), rig.inflight.room()), (None, 4));
    }

    #[test]
    fn a_command_of_unknown_fate_leaves_its_fence_although_its_request_is_left() {
        let mut rig = Rig::new(4);
        rig.open(1, write(0, 4096));
        rig.issue();
        let completion = rig.queue.complete(Status::ABORTED_BY_HOST);
        assert!(rig.settle(completion, Fate::Unknown));
        assert_eq!(rig.left(), Some(1));
        let left = rig.inflight.take_unknown(0);
        assert!(left.fences.forbid(STRANGER, &(0..1)));
        rig.inflight.release(only(0), &rig.limits);
        assert_eq!((rig.issue(), rig.done()), (None, None));
    }
}
