//! How a ring goes on from an earlier life, and how one leaves requests to the next.

use virtio_queue::{Queue as Ring, QueueT};

use super::{Queue, QueueSetup, ring_error};
use crate::chain::BrokenRing;
use crate::inflight::Tracking;
use crate::token::Token;
use std::sync::atomic::Ordering;

impl Queue {
    /// Reads what an earlier life of the ring left in flight, and sets where it goes on.
    ///
    /// A region that the front-end keeps knows all that is in flight, so everything else up to the used
    /// index is answered, and what follows was never taken: what the front-end says of that is not needed,
    /// and is known to be wrong after a crash. Without such a region it is all that there is.
    pub(super) fn recover(
        setup: &QueueSetup,
        ring: &mut Ring,
        used: u16,
    ) -> Result<Tracking, BrokenRing> {
        let available = ring
            .avail_idx(&*setup.map, Ordering::Acquire)
            .map_err(ring_error)?;
        let found = setup.part.recover(setup.size, used, available.0)?;
        let in_flight = found.in_flight.len();
        if setup.part.kept() {
            let taken = u16::try_from(in_flight).unwrap_or(u16::MAX);
            let next = used.wrapping_add(taken);
            if !found.initialised && next != setup.base && setup.complaints.allow() {
                let (ring, told) = (setup.index, setup.base);
                tracing::warn!(
                    ring,
                    told,
                    used,
                    "nothing is in flight: ring starts at its used index"
                );
            }
            ring.set_next_avail(next);
        }
        if in_flight > 0 && setup.complaints.allow() {
            tracing::info!(
                ring = setup.index,
                in_flight,
                "ring goes on from an earlier life"
            );
        }
        let part = setup.part.clone();
        Ok(Tracking::new(part, setup.index, setup.size, found))
    }

    /// Requests that were in flight in an earlier life and were not taken in this one yet. They are
    /// taken first, in the order in which they were taken then.
    pub fn recovering(&self) -> usize {
        self.tracking.recovering()
    }

    /// Takes a token back without an answer: the request stays in flight for the guest, and in the
    /// in-flight region for whoever serves the ring next, be it this queue after [`Self::reopen`].
    /// Whatever works on it must have ended, as for [`Self::finish`].
    pub fn leave(&mut self, token: Token) {
        if let Some(claim) = self.redeem(token) {
            self.generations.release(claim.generation);
        }
    }

    /// Begins a new life of the ring in this process: what was left in flight can be taken again. All
    /// tokens must be back; otherwise nothing is done, and it is logged.
    pub fn reopen(&mut self) {
        let in_flight = self.in_flight();
        if in_flight > 0 {
            let ring = self.index;
            tracing::error!(
                ring,
                in_flight,
                "a ring cannot begin anew while it is worked on"
            );
            debug_assert!(false, "ring {ring} was reopened with requests in flight");
            return;
        }
        self.flush();
        if self.broken.is_none() {
            self.tracking.reopen();
        }
    }

    /// Called when the front-end has stopped the ring and does not expect it to go on from here: requests
    /// that are still in flight on a ring that broke, or whose region ends with the session, will never
    /// be answered.
    pub(crate) fn close(mut self) {
        if self.broken.is_some() || !self.tracking.kept() {
            let unanswered = self.tracking.forget();
            if unanswered > 0 && self.complaints.allow() {
                let ring = self.index;
                tracing::warn!(
                    ring,
                    unanswered,
                    "ring was stopped with requests unanswered"
                );
            }
        }
    }
}
