//! Rings that come with requests of an earlier life, and rings that leave theirs to a later one.

use tokio::sync::oneshot;
use vhost_user_blk::{BlkStatus, Queue, Request};

use super::{DeviceLane, Guest, owner};

impl DeviceLane {
    /// Takes what rings that have just come had in flight before, all of it: what they still write has to be known
    /// before it is done again.
    pub(super) fn take_recovered(&mut self) {
        for at in 0..self.rings.len() {
            let recovering = self.rings[at].queue.recovering();
            if recovering > 0 {
                self.inflight.make_room(recovering + self.held());
            }
            while self.rings[at].queue.recovering() > 0 && self.inflight.room() > 0 {
                let Self { rings, storage, .. } = self;
                match rings[at].queue.take(&mut || storage.list()) {
                    Ok(Some(request)) if request.recovered => self.open_recovered(at, request),
                    Ok(Some(request)) => drop(self.admit(at, request)),
                    // Broken, or its memory is not there now.
                    Ok(None) | Err(_) => break,
                }
            }
        }
    }

    /// Opens a request of an earlier life, and has the control plane see to it.
    pub(super) fn open_recovered(&mut self, at: usize, request: Request) {
        let ring = &self.rings[at];
        let (index, already) = (ring.index, ring.already);
        let owner = owner(index, request.id);
        let Request {
            token, operation, ..
        } = request;
        let guest = Guest {
            ring: index,
            token,
            owner,
            bytes: 0,
            job: None,
        };
        let Some((guest, operation)) = self.recover(guest, operation, already) else {
            let _ = self.recovered.try_send(());
            return;
        };
        let opened = self
            .inflight
            .open_lost(guest, owner, operation, already, &self.limits);
        if let Err((guest, operation)) = opened {
            // There was room before it was taken.
            self.answer(guest, operation, BlkStatus::IoError);
        }
        // Where there is no room, the control plane has yet to read what was told before, and then looks at all lanes.
        let _ = self.recovered.try_send(());
    }

    /// Has a ring run on that was to stop.
    pub(super) fn stay(&mut self, index: usize) {
        if let Some(ring) = self.rings.iter_mut().find(|ring| ring.index == index) {
            ring.stopping = None;
            ring.leaving = false;
            ring.late = false;
            ring.scan = true;
        }
    }

    /// Stops a ring whose unanswered requests stay in flight.
    pub(super) fn suspend(&mut self, index: usize, done: oneshot::Sender<Option<Box<Queue>>>) {
        match self.rings.iter_mut().find(|ring| ring.index == index) {
            Some(ring) => {
                ring.stopping = Some(done);
                ring.leaving = true;
                self.leave_requests();
            }
            None => drop(done.send(None)),
        }
    }

    /// The same, of a ring that was to finish them.
    pub(super) fn leave(&mut self, index: usize) {
        let mut rings = self.rings.iter_mut();
        if let Some(ring) = rings.find(|ring| ring.index == index && ring.stopping.is_some()) {
            ring.leaving = true;
            self.leave_requests();
        }
    }

    /// Whoever stopped a ring waits no longer than this.
    pub(super) fn hurry(&mut self, index: usize) {
        let mut rings = self.rings.iter_mut();
        let ring = rings.find(|ring| ring.index == index && ring.stopping.is_some());
        if let Some(ring) = ring {
            if ring.leaving {
                self.paths
                    .end_busy("a command had no answer while the front-end suspended its ring");
            } else {
                ring.late = true;
            }
        }
    }

    /// Gives the requests of rings that leave theirs back to them, as far as nothing works on them.
    pub(super) fn leave_requests(&mut self) {
        if !self.rings.iter().any(|ring| ring.leaving) {
            return;
        }
        loop {
            let Self {
                rings,
                inflight,
                sectors,
                gate,
                ..
            } = self;
            let leaves = |index| (rings.iter()).any(|ring| ring.leaving && ring.index == index);
            let held = gate
                .as_mut()
                .and_then(|gate| gate.release(|&(ring, _)| leaves(ring)));
            let left = match held {
                Some((ring, request)) => Some((ring, request.token, request.operation)),
                None => {
                    let leaves = |guest: &Guest| leaves(guest.ring);
                    let waiting = sectors.as_mut().and_then(|sectors| sectors.give_up(leaves));
                    let left = waiting.or_else(|| inflight.take_left(leaves));
                    left.map(|(guest, operation)| {
                        if let (Some(sectors), Some(job)) = (sectors.as_mut(), guest.job) {
                            sectors.abandon(job);
                        }
                        (guest.ring, guest.token, operation)
                    })
                }
            };
            let Some((index, token, operation)) = left else {
                return;
            };
            // The memory that it describes is the guest's until the token is back.
            self.storage.keep(operation);
            let mut rings = self.rings.iter_mut();
            if let Some(ring) = rings.find(|ring| ring.index == index) {
                ring.queue.leave(token);
            }
        }
    }
}
