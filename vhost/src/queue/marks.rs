//! What a ring marks in the front-end's log of written pages; while there is none, one branch for a request and
//! a few for a batch.

use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;

use super::Queue;
use crate::blk::request::Operation;
use crate::chain::Half;
use crate::device::has;
use crate::token::Claim;

impl Queue {
    /// Marks what was written in answer to the chain read last, which nobody took: status, used element, and
    /// so many bytes before.
    #[inline]
    pub(super) fn mark_answer(&self, status_addr: u64, written: u32) {
        if let Some(log) = &self.log {
            log.wrote(status_addr, 1);
            log.staged(self.used.staged(), self.ring.size());
            self.mark_chain(u64::from(written));
        }
    }

    /// Marks what may have been written for the chain read last before it turned out to be bad: as much of the
    /// serial as there was memory for.
    pub(super) fn mark_attempt(&self) {
        self.mark_chain(self.device.options().serial.len() as u64);
    }

    /// Marks that many of the writable bytes of the chain read last.
    fn mark_chain(&self, len: u64) {
        if let Some(log) = &self.log {
            // What is outside memory was not written.
            let _ = self.chain.for_range(Half::Writable, 0, len, |addr, len| {
                log.wrote(addr, len as u64);
                Ok(())
            });
        }
    }

    /// Marks what was written for a request: its data, whether or not it succeeded, its status and its used
    /// element. What of it was not written, as on a ring that broke meanwhile, may be marked all the same.
    #[inline]
    pub(super) fn mark_finished(&self, claim: Claim, operation: &Operation) {
        if let Some(log) = &self.log {
            log.finished(self.generations.get(claim.generation), operation);
            log.wrote(claim.status_addr, 1);
            log.staged(self.used.staged(), self.ring.size());
        }
    }

    /// Marks the used index.
    #[inline]
    pub(super) fn mark_published(&self) {
        if let Some(log) = &self.log {
            log.published();
        }
    }

    /// Marks where the driver is told whether to kick.
    #[inline]
    pub(super) fn mark_notification(&self) {
        if let Some(log) = &self.log {
            let event_idx = has(self.features, VIRTIO_RING_F_EVENT_IDX);
            log.notified(event_idx, self.ring.size());
        }
    }
}
