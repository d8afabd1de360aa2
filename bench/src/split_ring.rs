//! The driver's side of a split virtqueue, with one slot for each request: indirect descriptors where the device takes
//! them, chains of three otherwise; event indices, or flags without them.

use std::io;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};

use crate::link::MAX_DEPTH;
use crate::memory::Memory;

/// Entries of the ring: enough for a chain of three in every slot.
pub(crate) const RING_SIZE: u16 = 512;
/// Bytes at the front of the memory that the ring and its tables take.
pub(crate) const RING_BYTES: usize = 64 << 10;

const DESC: usize = 0;
const AVAIL: usize = 8 << 10;
const USED: usize = 12 << 10;
const TABLES: usize = 20 << 10;
const TABLE_STRIDE: usize = 64;
const DESC_LEN: usize = 16;
/// Descriptors of a request: header, data, status.
const CHAIN: usize = 3;

const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;

/// A part of the memory, as the device sees it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    /// Offset in the memory.
    pub(crate) at: usize,
    /// Bytes.
    pub(crate) len: u32,
    /// The device writes it.
    pub(crate) device_writes: bool,
}

/// The ring at the front of a [`Memory`].
#[derive(Debug)]
pub(crate) struct SplitRing {
    guest_base: u64,
    indirect: bool,
    event_idx: bool,
    /// Next entry of the avail ring; not all before it need be published.
    avail: u16,
    published: u16,
    used: u16,
}

impl SplitRing {
    /// A ring in fresh memory that the device knows at `guest_base`.
    pub(crate) fn new(memory: &Memory, guest_base: u64, indirect: bool, event_idx: bool) -> Self {
        let ring = Self {
            guest_base,
            indirect,
            event_idx,
            avail: 0,
            published: 0,
            used: 0,
        };
        // Without event indices, calls are off except while the driver waits.
        if !event_idx {
            ring.set_avail_flags(memory, VRING_AVAIL_F_NO_INTERRUPT as u16);
        }
        ring
    }

    /// Offsets of the descriptor table, the avail ring and the used ring.
    pub(crate) const fn offsets() -> [usize; 3] {
        [DESC, AVAIL, USED]
    }

    /// Puts the request of a slot into the avail ring. A slot that is in flight may not be put in again.
    pub(crate) fn put(&mut self, memory: &Memory, slot: usize, parts: [Part; CHAIN]) {
        let (head, table) = if self.indirect {
            let table = TABLES + slot * TABLE_STRIDE;
            let address = self.guest_base + table as u64;
            let len = (CHAIN * DESC_LEN) as u32;
            write_desc(memory, DESC + slot * DESC_LEN, address, len, INDIRECT, 0);
            (slot, table)
        } else {
            (slot * CHAIN, DESC + slot * CHAIN * DESC_LEN)
        };
        for (index, part) in parts.into_iter().enumerate() {
            let more = if index + 1 < CHAIN { NEXT } else { 0 };
            let flags = more | if part.device_writes { WRITE } else { 0 };
            // `next` counts from the start of the table that the chain is in.
            let first = if self.indirect { 0 } else { head };
            let at = table + index * DESC_LEN;
            let address = self.guest_base + part.at as u64;
            write_desc(
                memory,
                at,
                address,
                part.len,
                flags,
                (first + index + 1) as u16,
            );
        }
        let entry = AVAIL + 4 + 2 * usize::from(self.avail % RING_SIZE);
        memory.store(entry, head as u16, Ordering::Relaxed);
        self.avail = self.avail.wrapping_add(1);
    }

    /// Shows the device what was put in; true when it has to be kicked.
    pub(crate) fn publish(&mut self, memory: &Memory) -> bool {
        let (old, new) = (self.published, self.avail);
        if old == new {
            return false;
        }
        memory.store(AVAIL + 2, new, Ordering::Release);
        self.published = new;
        // The index is visible before the device's wish is read; the device does the reverse.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event: u16 = memory.load(USED + 4 + 8 * usize::from(RING_SIZE), Ordering::Relaxed);
            crossed(event, new, old)
        } else {
            let flags: u16 = memory.load(USED, Ordering::Relaxed);
            flags & VRING_USED_F_NO_NOTIFY as u16 == 0
        }
    }

    /// The slot of a finished request.
    ///
    /// # Errors
    /// The device returned something that it never got.
    pub(crate) fn take(&mut self, memory: &Memory) -> io::Result<Option<usize>> {
        if self.is_empty(memory) {
            return Ok(None);
        }
        let entry = USED + 4 + 8 * usize::from(self.used % RING_SIZE);
        let head: u32 = memory.load(entry, Ordering::Relaxed);
        self.used = self.used.wrapping_add(1);
        let head = head as usize;
        let slot = if self.indirect { head } else { head / CHAIN };
        if slot >= MAX_DEPTH || (!self.indirect && !head.is_multiple_of(CHAIN)) {
            let what = format!("the device returned descriptor {head}, which heads no request");
            return Err(io::Error::other(what));
        }
        Ok(Some(slot))
    }

    /// Asks the device for a call at the next finished request; false when there is one already.
    pub(crate) fn arm(&mut self, memory: &Memory) -> bool {
        if self.event_idx {
            let used_event = AVAIL + 4 + 2 * usize::from(RING_SIZE);
            memory.store(used_event, self.used, Ordering::Relaxed);
        } else {
            self.set_avail_flags(memory, 0);
        }
        // The wish is visible before the index is read again: without this fence the processor may read first, and then
        // a device that publishes in between sees the old wish and never calls.
        fence(Ordering::SeqCst);
        let sleep = self.is_empty(memory);
        if !sleep {
            self.disarm(memory);
        }
        sleep
    }

    /// Asks for no more calls.
    pub(crate) fn disarm(&mut self, memory: &Memory) {
        // An event index asks for one call only.
        if !self.event_idx {
            self.set_avail_flags(memory, VRING_AVAIL_F_NO_INTERRUPT as u16);
        }
    }

    fn is_empty(&self, memory: &Memory) -> bool {
        memory.load::<u16>(USED + 2, Ordering::Acquire) == self.used
    }

    fn set_avail_flags(&self, memory: &Memory, flags: u16) {
        memory.store(AVAIL, flags, Ordering::Relaxed);
    }
}

/// True when going from `old` to `new` passes `event`.
fn crossed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

fn write_desc(memory: &Memory, at: usize, address: u64, len: u32, flags: u16, next: u16) {
    memory.store(at, address, Ordering::Relaxed);
    memory.store(at + 8, len, Ordering::Relaxed);
    memory.store(at + 12, flags, Ordering::Relaxed);
    memory.store(at + 14, next, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x4000_0000;

    fn parts() -> [Part; CHAIN] {
        let part = |at, len, device_writes| Part {
            at,
            len,
            device_writes,
        };
        [
            part(0x8000, 16, false),
            part(0x1_0000, 4096, true),
            part(0x8100, 1, true),
        ]
    }

    /// What a device does with the newest request: reads its chain, returns its head.
    fn chain(memory: &Memory, index: u16) -> (u16, Vec<(u64, u32, u16)>) {
        let head: u16 = memory.load(AVAIL + 4 + 2 * usize::from(index), Ordering::Relaxed);
        let desc = |at: usize| {
            let address: u64 = memory.load(at, Ordering::Relaxed);
            let len: u32 = memory.load(at + 8, Ordering::Relaxed);
            let flags: u16 = memory.load(at + 12, Ordering::Relaxed);
            let next: u16 = memory.load(at + 14, Ordering::Relaxed);
            (address, len, flags, next)
        };
        let (mut table, mut index) = (DESC, usize::from(head));
        let (address, len, flags, _) = desc(DESC + index * DESC_LEN);
        if flags & INDIRECT != 0 {
            assert_eq!(len, 48);
            (table, index) = ((address - BASE) as usize, 0);
        }
        let mut list = Vec::new();
        loop {
            let (address, len, flags, next) = desc(table + index * DESC_LEN);
            list.push((address - BASE, len, flags & WRITE));
            if flags & NEXT == 0 {
                return (head, list);
            }
            index = usize::from(next);
        }
    }

    fn finish(memory: &Memory, index: u16, head: u16) {
        let entry = USED + 4 + 8 * usize::from(index % RING_SIZE);
        memory.store(entry, u32::from(head), Ordering::Relaxed);
        memory.store(USED + 2, index.wrapping_add(1), Ordering::Release);
    }

    #[test]
    fn a_request_reads_the_same_with_and_without_indirect_descriptors() {
        for indirect in [true, false] {
            let memory = Memory::new(RING_BYTES).expect("memory");
            let mut ring = SplitRing::new(&memory, BASE, indirect, true);
            ring.put(&memory, 127, parts());
            let (head, list) = chain(&memory, 0);
            let expected = [(0x8000, 16, 0), (0x1_0000, 4096, WRITE), (0x8100, 1, WRITE)];
            assert_eq!(list, expected);
            assert_eq!(ring.take(&memory).expect("sound"), None);
            finish(&memory, 0, head);
            assert_eq!(ring.take(&memory).expect("sound"), Some(127));
            assert_eq!(ring.take(&memory).expect("sound"), None);
        }
    }

    #[test]
    fn indices_wrap() {
        let memory = Memory::new(RING_BYTES).expect("memory");
        let mut ring = SplitRing::new(&memory, BASE, true, true);
        for index in 0..=u16::MAX {
            ring.put(&memory, usize::from(index % 7), parts());
            ring.publish(&memory);
            let (head, _) = chain(&memory, index % RING_SIZE);
            finish(&memory, index, head);
            let slot = ring.take(&memory).expect("sound");
            assert_eq!(slot, Some(usize::from(index % 7)));
        }
        ring.put(&memory, 3, parts());
        assert!(
            ring.publish(&memory),
            "avail_event is 0, and so was the index"
        );
        assert_eq!(memory.load::<u16>(AVAIL + 2, Ordering::Relaxed), 1);
    }

    #[test]
    fn the_device_is_kicked_only_when_it_asked_for_it() {
        let memory = Memory::new(RING_BYTES).expect("memory");
        let mut ring = SplitRing::new(&memory, BASE, true, true);
        let avail_event = USED + 4 + 8 * usize::from(RING_SIZE);
        memory.store(avail_event, 1_u16, Ordering::Relaxed);
        ring.put(&memory, 0, parts());
        assert!(!ring.publish(&memory));
        ring.put(&memory, 1, parts());
        assert!(ring.publish(&memory));
        assert!(!ring.publish(&memory), "nothing new");

        let memory = Memory::new(RING_BYTES).expect("memory");
        let mut ring = SplitRing::new(&memory, BASE, true, false);
        ring.put(&memory, 0, parts());
        assert!(ring.publish(&memory));
        memory.store(USED, VRING_USED_F_NO_NOTIFY as u16, Ordering::Relaxed);
        ring.put(&memory, 1, parts());
        assert!(!ring.publish(&memory));
    }

    #[test]
    fn the_driver_does_not_sleep_on_what_is_finished() {
        for event_idx in [true, false] {
            let memory = Memory::new(RING_BYTES).expect("memory");
            let mut ring = SplitRing::new(&memory, BASE, true, event_idx);
            ring.put(&memory, 0, parts());
            assert!(ring.arm(&memory));
            finish(&memory, 0, 0);
            assert!(!ring.arm(&memory));
            assert_eq!(ring.take(&memory).expect("sound"), Some(0));
            assert!(ring.arm(&memory));
            let used_event: u16 = memory.load(AVAIL + 4 + 2 * 512, Ordering::Relaxed);
            assert_eq!(used_event, u16::from(event_idx));
        }
    }

    #[test]
    fn a_descriptor_that_heads_no_request_is_an_error() {
        for (indirect, head) in [(true, 128), (false, 1), (false, 384)] {
            let memory = Memory::new(RING_BYTES).expect("memory");
            let mut ring = SplitRing::new(&memory, BASE, indirect, true);
            finish(&memory, 0, head);
            assert!(ring.take(&memory).is_err(), "{indirect} {head}");
        }
    }
}
