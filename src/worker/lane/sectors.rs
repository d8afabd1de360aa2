//! Requests of a lane that begin or end within a block, where the disk takes such: what they are made of, and what waits for them.

use nvmf::spec::Status;
use vhost_user_blk::Operation;

use super::{DeviceLane, Guest};
use crate::bridge::inflight::Finished;
use crate::bridge::path_choice::{EARLIER_LIFE, PathSet};
use crate::bridge::sectors::{Next, Sectors};
use crate::bridge::status::Outcome;

impl DeviceLane {
    /// One more request can be taken from a ring: nothing waits for a path, and there is a slot for it and for all that wait
    /// for others to end.
    pub(super) fn has_room(&self) -> bool {
        self.inflight.room() > self.held() && !self.inflight.is_waiting()
    }

    /// Requests that wait for others to end.
    pub(super) fn held(&self) -> usize {
        self.sectors.as_ref().map_or(0, Sectors::held)
    }

    /// Takes a request of an earlier life, if it writes: it waits until what that life may still write is known. Others
    /// come back, as do all where blocks are sectors.
    pub(super) fn recover(
        &mut self,
        guest: Guest,
        operation: Operation,
        already: bool,
    ) -> Option<(Guest, Operation)> {
        let Self {
            sectors,
            inflight,
            limits,
            storage,
            ..
        } = self;
        let Some(sectors) = sectors else {
            return Some((guest, operation));
        };
        inflight.note_lost(guest.owner, &operation, already, limits);
        let (guest, operation) = sectors.recover(guest, operation, limits)?;
        if let Some((mut guest, operation, job)) = sectors.arrive(guest, operation, limits, storage)
        {
            guest.job = job;
            self.open(guest, operation);
        }
        None
    }

    /// What earlier lives may still write is known everywhere, if that is what was released.
    pub(super) fn release_recovered(&mut self, paths: PathSet) {
        if let Some(sectors) = self
            .sectors
            .as_mut()
            .filter(|_| paths.contains(EARLIER_LIFE))
        {
            sectors.released();
        }
    }

    /// Begins a request, or has it wait for those that it must not overtake.
    pub(super) fn arrive(&mut self, guest: Guest, operation: Operation) {
        let Self {
            sectors,
            limits,
            storage,
            counters,
            ..
        } = self;
        let Some(sectors) = sectors else {
            return self.open(guest, operation);
        };
        if sectors.is_unaligned(&operation) {
            counters.unaligned.add(1);
        }
        if let Some((mut guest, operation, job)) = sectors.arrive(guest, operation, limits, storage)
        {
            guest.job = job;
            self.open(guest, operation);
        }
    }

    /// Goes on with the request that an operation was a part of; gives it back when that is over.
    pub(super) fn advance(&mut self, finished: Finished<Guest>) -> Option<Finished<Guest>> {
        let Self {
            sectors,
            storage,
            rings,
            ..
        } = self;
        let (Some(sectors), Some(job)) = (sectors, finished.guest.job) else {
            return Some(finished);
        };
        let Finished {
            guest,
            operation,
            outcome,
        } = finished;
        match sectors.advance(job, operation, outcome, storage) {
            // Whoever has the ring next begins it anew.
            Next::Begin(operation)
                if rings
                    .iter()
                    .any(|ring| ring.leaving && ring.index == guest.ring) =>
            {
                sectors.abandon(job);
                storage.keep(operation);
                let mut rings = rings.iter_mut();
                if let Some(ring) = rings.find(|ring| ring.index == guest.ring) {
                    ring.queue.leave(guest.token);
                }
                None
            }
            Next::Begin(operation) => {
                self.open(guest, operation);
                None
            }
            Next::Over(operation, outcome) => Some(Finished {
                guest,
                operation,
                outcome,
            }),
        }
    }

    /// Begins what has waited for requests that are over. True when there was something.
    pub(super) fn begin_ready(&mut self) -> bool {
        let mut any = false;
        while let Some((mut guest, operation, job)) = {
            let Self {
                sectors, storage, ..
            } = self;
            let sectors = sectors.as_mut();
            sectors.and_then(|sectors| sectors.next_ready(storage))
        } {
            guest.job = job;
            self.open(guest, operation);
            any = true;
        }
        any
    }

    /// Fails what waits for other requests though its ring is late.
    pub(super) fn give_up_ordered(&mut self) {
        loop {
            let Self { sectors, rings, .. } = self;
            let late = |guest: &Guest| {
                let mut rings = rings.iter();
                rings.any(|ring| ring.late && ring.index == guest.ring)
            };
            let given_up = sectors.as_mut().and_then(|sectors| sectors.give_up(late));
            let Some((guest, operation)) = given_up else {
                return;
            };
            self.conclude(Finished {
                guest,
                operation,
                outcome: Outcome::Failed(Status::HOST_PATH_ERROR),
            });
        }
    }
}
