//! Requests of a lane that wait for the limits of its disk: when they begin, and when they are given up.

use std::time::Instant;

use nvmf::spec::Status;
use vhost_user_blk::Request;

use super::{DeviceLane, Guest, owner};
use crate::bridge::inflight::Finished;
use crate::bridge::status::Outcome;
use crate::worker::throttle::Weight;

impl DeviceLane {
    /// Begins requests that waited for the disk's limits, up to `most`. True when there are more for the next turn;
    /// and the number of the ring that may offer its own first.
    pub(super) fn begin_held(&mut self, most: usize) -> (bool, usize) {
        let Some(gate) = &mut self.gate else {
            return (false, 0);
        };
        gate.begin_turn(Instant::now());
        let first = gate.first_ring(self.rings.len());
        for _ in 0..most {
            if !self.has_room() {
                return (false, first);
            }
            let Self { gate, rings, .. } = self;
            let next = gate.as_mut().and_then(|gate| {
                let stops = |index| {
                    (rings.iter()).any(|ring| ring.index == index && ring.stopping.is_some())
                };
                // A ring that stops waits for nothing that it need not.
                let stopping = rings.iter().any(|ring| ring.stopping.is_some());
                let released = stopping.then(|| gate.release(|&(ring, _)| stops(ring)));
                released.flatten().or_else(|| gate.depart())
            });
            match next {
                Some((ring, request)) => drop(self.begin(ring, request)),
                None => return (false, first),
            };
        }
        (true, first)
    }

    /// Begins a request of the ring at `at` if the limits of the disk allow, otherwise it waits. Returns the bytes that move.
    pub(super) fn admit(&mut self, at: usize, request: Request) -> u64 {
        let ring = self.rings[at].index;
        let Some(gate) = &mut self.gate else {
            return self.begin(ring, request);
        };
        match gate.arrive(at, Weight::of(&request.operation), (ring, request)) {
            Some((ring, request)) => self.begin(ring, request),
            None => {
                self.counters.throttled.add(1);
                0
            }
        }
    }

    /// Fails what waits for the disk's limits though its ring is late and there is no path.
    pub(super) fn give_up_held(&mut self) {
        let outcome = Outcome::Failed(Status::HOST_PATH_ERROR);
        loop {
            let Self { gate, rings, .. } = self;
            let late = |index| rings.iter().any(|ring| ring.late && ring.index == index);
            let held = gate
                .as_mut()
                .and_then(|gate| gate.release(|&(ring, _)| late(ring)));
            let Some((ring, request)) = held else {
                return;
            };
            let owner = owner(ring, request.id);
            let Request {
                token, operation, ..
            } = request;
            let guest = Guest {
                ring,
                token,
                owner,
                bytes: 0,
                job: None,
            };
            self.conclude(Finished {
                guest,
                operation,
                outcome,
            });
        }
    }

    /// When the first of them may begin. Where there is no room for it, what makes room comes with a turn of its own.
    pub(super) fn held_until(&self) -> Option<Instant> {
        self.gate.as_ref().filter(|_| self.has_room())?.deadline()
    }
}
