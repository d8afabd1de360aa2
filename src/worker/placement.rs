//! Which lane each ring of a disk runs on: the session starts and stops rings here, and the control plane moves them when
//! lanes lose all their queue pairs while others have some.
//!
//! Everything blocks until the lane has acted, so it is for threads that may. One lock a ring: whoever starts, changes
//! or stops it has it alone.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use tokio::sync::oneshot;
use vhost_user_blk::{Queue, QueueUpdate};

use super::mailbox::{LaneMessage, Mailbox};

/// See the module.
#[derive(Debug)]
pub(crate) struct Placement {
    lanes: Vec<Mailbox>,
    /// So many lanes, the first ones, have rings.
    usable: AtomicUsize,
    seats: Vec<Mutex<Seat>>,
}

/// What waiting for a ring has come to.
pub(crate) enum Waited {
    /// It is back.
    Back(Box<Queue>),
    /// Not yet.
    Late(oneshot::Receiver<Option<Box<Queue>>>),
    /// It never will be.
    Gone,
}

/// Where a ring is.
#[derive(Debug, Default)]
struct Seat {
    /// The lane that it runs on.
    lane: Option<usize>,
    /// Somebody may have sent already what it has in flight from an earlier life.
    already: bool,
}

impl Placement {
    /// Room for `rings` rings on these lanes, all of which are of use.
    pub(crate) fn new(lanes: Vec<Mailbox>, rings: usize) -> Self {
        Self {
            usable: AtomicUsize::new(lanes.len()),
            lanes,
            seats: std::iter::repeat_with(Mutex::default).take(rings).collect(),
        }
    }

    /// The lanes.
    pub(crate) fn lanes(&self) -> &[Mailbox] {
        &self.lanes
    }

    fn seat(&self, index: usize) -> Option<MutexGuard<'_, Seat>> {
        let seat = self.seats.get(index)?;
        Some(seat.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The lane that a ring falls to.
    fn lane_for(&self, index: usize) -> usize {
        index % self.usable.load(Ordering::Acquire).max(1)
    }

    /// The next requests of all rings come with another region: what is in flight there may have been sent
    /// `already`.
    pub(crate) fn begin(&self, already: bool) {
        for index in 0..self.seats.len() {
            if let Some(mut seat) = self.seat(index) {
                seat.already = already;
            }
        }
    }

    /// Has a ring run.
    pub(crate) fn start(&self, index: usize, queue: Queue) {
        if let Some(mut seat) = self.seat(index) {
            let already = std::mem::take(&mut seat.already);
            self.start_in(&mut seat, index, Box::new(queue), already);
        }
    }

    fn start_in(&self, seat: &mut Seat, index: usize, queue: Box<Queue>, already: bool) {
        let lane = self.lane_for(index);
        seat.lane = Some(lane);
        if let Some(lane) = self.lanes.get(lane) {
            lane.ask(|done| LaneMessage::Start {
                index,
                queue,
                already,
                done,
            });
        }
    }

    /// Has a ring that runs changed.
    pub(crate) fn update(&self, index: usize, update: QueueUpdate) {
        let seat = self.seat(index);
        let lane = seat.as_ref().and_then(|seat| self.lanes.get(seat.lane?));
        lane.and_then(|lane| {
            lane.ask(|done| LaneMessage::Update {
                index,
                update,
                done,
            })
        });
    }

    /// Takes a ring back that answers all its requests first.
    pub(crate) fn stop(&self, index: usize) -> Option<Queue> {
        let mut seat = self.seat(index)?;
        let lane = self.lanes.get(seat.lane.take()?)?;
        let queue = lane.ask(|done| LaneMessage::Stop { index, done });
        Some(*queue.flatten()?)
    }

    /// Takes several rings back at once that answer all their requests first, by `deadline`; `wait` waits for that
    /// with a time limit. Where it is too late for one, all run on, and what is given is `None`.
    pub(crate) fn stop_all(
        &self,
        rings: &[usize],
        wait: impl Fn(oneshot::Receiver<Option<Box<Queue>>>) -> Waited,
    ) -> Option<Vec<Queue>> {
        let mut seats: Vec<_> = rings
            .iter()
            .filter_map(|&ring| Some((ring, self.seat(ring)?)))
            .collect();
        let mut answers = Vec::with_capacity(seats.len());
        for (ring, seat) in &seats {
            let lane = seat.lane.and_then(|lane| self.lanes.get(lane));
            let stop = |done| LaneMessage::Stop { index: *ring, done };
            answers.push(lane.and_then(|lane| lane.request(stop)));
        }
        let mut back = Vec::with_capacity(seats.len());
        let mut late = Vec::new();
        for (at, answer) in answers.into_iter().enumerate() {
            match answer.map(&wait) {
                Some(Waited::Back(queue)) => back.push((at, queue)),
                Some(Waited::Late(answer)) => late.push((at, answer)),
                // The lane has ended, and the ring with it.
                Some(Waited::Gone) | None => {}
            }
        }
        if late.is_empty() && back.len() == rings.len() {
            for (_, seat) in &mut seats {
                seat.lane = None;
            }
            return Some(back.into_iter().map(|(_, queue)| *queue).collect());
        }
        for (at, answer) in late {
            let (ring, seat) = &seats[at];
            if let Some(lane) = seat.lane.and_then(|lane| self.lanes.get(lane)) {
                lane.tell(LaneMessage::Stay { index: *ring });
            }
            // It may have been given back just before.
            if let Ok(Some(queue)) = answer.blocking_recv() {
                back.push((at, queue));
            }
        }
        for (at, queue) in back {
            let (ring, seat) = &mut seats[at];
            self.start_in(seat, *ring, queue, false);
        }
        None
    }

    /// Takes a ring back that leaves requests in flight.
    pub(crate) fn suspend(&self, index: usize) -> Option<Queue> {
        let mut seat = self.seat(index)?;
        Some(*self.suspend_in(&mut seat, index)?)
    }

    fn suspend_in(&self, seat: &mut Seat, index: usize) -> Option<Box<Queue>> {
        let lane = self.lanes.get(seat.lane.take()?)?;
        lane.ask(|done| LaneMessage::Suspend { index, done })
            .flatten()
    }

    /// Has rings run on the first `usable` lanes alone from now on, and moves those that are elsewhere. What they have
    /// in flight goes with them. Gives the number of those that were moved.
    pub(crate) fn spread(&self, usable: usize) -> usize {
        self.usable
            .store(usable.clamp(1, self.lanes.len().max(1)), Ordering::Release);
        let mut moved = 0;
        let mut busy = Vec::new();
        for (index, seat) in self.seats.iter().enumerate() {
            match seat.try_lock() {
                Ok(mut seat) => moved += usize::from(self.shift(&mut seat, index)),
                Err(TryLockError::Poisoned(seat)) => {
                    moved += usize::from(self.shift(&mut seat.into_inner(), index));
                }
                // It may take long to stop, and others need not wait for that.
                Err(TryLockError::WouldBlock) => busy.push(index),
            }
        }
        for index in busy {
            if let Some(mut seat) = self.seat(index) {
                moved += usize::from(self.shift(&mut seat, index));
            }
        }
        moved
    }

    /// True when the ring was moved.
    fn shift(&self, seat: &mut Seat, index: usize) -> bool {
        if seat.lane.is_none_or(|lane| lane == self.lane_for(index)) {
            return false;
        }
        let Some(mut queue) = self.suspend_in(seat, index) else {
            return false;
        };
        queue.reopen();
        // Nothing works on it any more, and what was lost is known to be.
        self.start_in(seat, index, queue, false);
        true
    }
}
