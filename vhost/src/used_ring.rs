//! The used ring: elements are staged one by one, their index is published once for all of them.

use std::sync::atomic::{Ordering, fence};

use crate::chain::BrokenRing;
use crate::memory::{GuestMap, OutsideMemory};

/// Flag in the available ring: the driver wants no call.
const NO_INTERRUPT: u16 = 1;

/// Our end of a used ring.
#[derive(Debug)]
pub(crate) struct UsedRing {
    /// Guest address of the used ring.
    addr: u64,
    /// Guest address of the available ring, where the driver says when it wants a call.
    available: u64,
    size: u16,
    event_idx: bool,
    /// Index behind the last element staged.
    staged: u16,
    /// Index that the guest can see.
    published: u16,
    /// The driver has been called since the ring started. Before that, it always is: an event
    /// index left from an earlier life of the ring says nothing about this one.
    called: bool,
}

impl UsedRing {
    /// A writer that continues at the index that the ring in memory shows.
    pub(crate) fn new(
        map: &GuestMap,
        addr: u64,
        available: u64,
        size: u16,
        event_idx: bool,
    ) -> Result<Self, BrokenRing> {
        let mut ring = Self {
            addr,
            available,
            size,
            event_idx,
            staged: 0,
            published: 0,
            called: false,
        };
        ring.staged = map.load_at(addr.saturating_add(2), Ordering::Acquire)?;
        ring.published = ring.staged;
        Ok(ring)
    }

    /// The index that the guest can see.
    pub(crate) fn published(&self) -> u16 {
        self.published
    }

    /// Index behind the last element staged.
    pub(crate) fn staged(&self) -> u16 {
        self.staged
    }

    /// Elements that the guest cannot see yet.
    pub(crate) fn unpublished(&self) -> u16 {
        self.staged.wrapping_sub(self.published)
    }

    /// Writes an element: chain `head` is done, and `len` bytes were written to it.
    pub(crate) fn stage(&mut self, map: &GuestMap, head: u16, len: u32) -> Result<(), BrokenRing> {
        // A ring's size is never 0: the queue is made from a valid one.
        let slot = u64::from(self.staged.checked_rem(self.size).unwrap_or(0));
        let addr = self.addr.saturating_add(4 + 8 * slot);
        let element = u64::from(head) | u64::from(len) << 32;
        map.write_at(addr, &element.to_le_bytes())?;
        self.staged = self.staged.wrapping_add(1);
        Ok(())
    }

    /// Shows all staged elements to the guest. True when the driver wants a call for them.
    pub(crate) fn publish(&mut self, map: &GuestMap) -> Result<bool, BrokenRing> {
        let (before, now) = (self.published, self.staged);
        if before == now {
            return Ok(false);
        }
        map.store_at(self.addr.saturating_add(2), now, Ordering::Release)?;
        self.published = now;
        // The driver writes when it wants a call and then looks at the index; we write the index
        // and then look. Without the fence both could miss the other.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let used_event = self.available.saturating_add(4 + 2 * u64::from(self.size));
            passed(map.load_at(used_event, Ordering::Relaxed)?, before, now)
        } else {
            map.load_at(self.available, Ordering::Relaxed)? & NO_INTERRUPT == 0
        };
        let first = !std::mem::replace(&mut self.called, true);
        Ok(wanted || first)
    }
}

impl From<OutsideMemory> for BrokenRing {
    fn from(_: OutsideMemory) -> Self {
        Self::RingOutsideMemory
    }
}

/// True when moving an index from `before` to `now` passes `event`, all of them modulo 2^16.
fn passed(event: u16, before: u16, now: u16) -> bool {
    now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_passed_exactly_when_the_index_moves_over_it() {
        assert!(passed(4, 4, 5));
        assert!(!passed(5, 4, 5));
        assert!(!passed(3, 4, 5));
        assert!(passed(6, 4, 9));
        assert!(!passed(9, 4, 9));
    }

    #[test]
    fn an_event_is_passed_across_the_wrap_of_the_index() {
        assert!(passed(65535, 65534, 1));
        assert!(passed(0, 65534, 1));
        assert!(!passed(1, 65534, 1));
        assert!(!passed(65533, 65534, 1));
        assert!(passed(65535, 65535, 0));
    }
}
