//! A split virtqueue as a driver has it, which posts whatever a test wants.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vhost::VringConfigData;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::{Memory, user_addr};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Longest wait for an answer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(15);

/// Guest memory that a descriptor names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Buffer {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    /// The device may write it, and not read.
    pub(crate) writable: bool,
}

/// Memory that the device reads.
pub(crate) fn out(addr: u64, len: u32) -> Buffer {
    Buffer {
        addr,
        len,
        writable: false,
    }
}

/// Memory that the device writes.
pub(crate) fn into(addr: u64, len: u32) -> Buffer {
    Buffer {
        addr,
        len,
        writable: true,
    }
}

/// What the device says of a chain that it used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Used {
    pub(crate) head: u16,
    /// Bytes written.
    pub(crate) len: u32,
}

/// Bytes of guest memory that a ring takes, its three parts at quarters of it.
pub(crate) const RING_BYTES: u64 = 0x1_0000;

pub(crate) struct Ring {
    memory: Arc<Memory>,
    base: u64,
    size: u16,
    event_idx: bool,
    /// Available index after what was added; published by [`Self::publish`].
    next: u16,
    published: u16,
    used_seen: u16,
    free: Vec<u16>,
    /// Descriptors by the head of their chain.
    chains: HashMap<u16, Vec<u16>>,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    /// Watches `call`.
    called: Epoll,
}

impl Ring {
    /// A ring of `size` entries, at most 1024, at `base` in guest memory.
    pub(crate) fn new(memory: Arc<Memory>, base: u64, size: u16, event_idx: bool) -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let call = event();
        Self {
            memory,
            base,
            size,
            event_idx,
            next: 0,
            published: 0,
            used_seen: 0,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            kick: event(),
            called: watch(&call),
            call,
        }
    }

    fn desc(&self, index: u16) -> u64 {
        self.base + 16 * u64::from(index)
    }

    fn avail(&self) -> u64 {
        self.base + RING_BYTES / 2
    }

    fn used_at(&self) -> u64 {
        self.base + RING_BYTES / 4 * 3
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// As the front-end tells the back-end.
    pub(crate) fn config(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: user_addr(self.base),
            used_ring_addr: user_addr(self.used_at()),
            avail_ring_addr: user_addr(self.avail()),
            log_addr: None,
        }
    }

    /// Writes one descriptor anywhere.
    pub(crate) fn write_descriptor(&self, addr: u64, buffer: Buffer, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&buffer.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&buffer.len.to_le_bytes());
        let flags = flags | if buffer.writable { WRITE } else { 0 };
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write(addr, &bytes);
    }

    /// Adds a chain, in descriptors that are anywhere in the table; not published yet.
    #[track_caller]
    pub(crate) fn add(&mut self, buffers: &[Buffer]) -> u16 {
        assert!(buffers.len() <= self.free.len(), "the ring is full");
        let chain = self.free.split_off(self.free.len() - buffers.len());
        for (at, buffer) in buffers.iter().enumerate() {
            let next = chain.get(at + 1).copied();
            let flags = if next.is_some() { NEXT } else { 0 };
            self.write_descriptor(self.desc(chain[at]), *buffer, flags, next.unwrap_or(0));
        }
        let head = chain[0];
        self.chains.insert(head, chain);
        self.offer(head);
        head
    }

    /// Adds a chain through an indirect table at `table`; not published yet.
    #[track_caller]
    pub(crate) fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        let count = u16::try_from(buffers.len()).expect("a short chain");
        for (at, buffer) in (0..count).zip(buffers) {
            let last = at + 1 == count;
            let (flags, next) = if last { (0, 0) } else { (NEXT, at + 1) };
            self.write_descriptor(table + 16 * u64::from(at), *buffer, flags, next);
        }
        let head = self.free.pop().expect("room in the ring");
        let whole = out(table, 16 * u32::from(count));
        self.write_descriptor(self.desc(head), whole, INDIRECT, 0);
        self.chains.insert(head, vec![head]);
        self.offer(head);
        head
    }

    /// Adds a chain of two descriptors that never ends.
    pub(crate) fn add_loop(&mut self, buffer: Buffer) {
        self.write_descriptor(self.desc(0), buffer, NEXT, 1);
        self.write_descriptor(self.desc(1), buffer, NEXT, 0);
        self.offer(0);
    }

    /// Puts a head into the available ring.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next % self.size);
        self.memory
            .write(self.avail() + 4 + 2 * slot, &head.to_le_bytes());
        self.next = self.next.wrapping_add(1);
    }

    /// Makes the available index jump, as no driver may.
    pub(crate) fn skip(&mut self, entries: u16) {
        self.next = self.next.wrapping_add(entries);
    }

    /// Shows the device what was added.
    pub(crate) fn publish(&mut self) {
        self.memory.store(self.avail() + 2, self.next);
        fence(Ordering::SeqCst);
    }

    /// Publishes, and kicks if the device asked for that.
    pub(crate) fn submit(&mut self) {
        self.publish();
        let wanted = if self.event_idx {
            let event = self
                .memory
                .load(self.used_at() + 4 + 8 * u64::from(self.size));
            let behind = self.next.wrapping_sub(event).wrapping_sub(1);
            behind < self.next.wrapping_sub(self.published)
        } else {
            self.memory.load(self.used_at()) & 1 == 0
        };
        self.published = self.next;
        if wanted {
            self.kick();
        }
    }

    pub(crate) fn kick(&self) {
        self.kick.write(1).expect("a kick");
    }

    /// The available index as it is now.
    pub(crate) fn available(&self) -> u16 {
        self.published
    }

    /// The used index as it is now.
    pub(crate) fn used_idx(&self) -> u16 {
        self.memory.load(self.used_at() + 2)
    }

    /// Waits for calls on another descriptor from now on.
    pub(crate) fn replace_call(&mut self, call: EventFd) {
        self.called = watch(&call);
        self.call = call;
    }

    /// Starts over at an index of both rings, with no chain outstanding.
    pub(crate) fn restart(&mut self, index: u16) {
        self.memory.store(self.avail() + 2, index);
        self.memory.store(self.used_at() + 2, index);
        (self.next, self.published, self.used_seen) = (index, index, index);
        self.free = (0..self.size).rev().collect();
        self.chains.clear();
    }

    /// What the device has used since the last look.
    pub(crate) fn used(&mut self) -> Vec<Used> {
        let mut all = Vec::new();
        while self.used_seen != self.used_idx() {
            let slot = u64::from(self.used_seen % self.size);
            let bytes = self.memory.read(self.used_at() + 4 + 8 * slot, 8);
            let word =
                |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
            let head = u16::try_from(word(0)).expect("an index");
            let chain = self.chains.remove(&head);
            self.free
                .extend(chain.expect("a chain that was made available").iter().rev());
            all.push(Used { head, len: word(4) });
            self.used_seen = self.used_seen.wrapping_add(1);
        }
        all
    }

    /// Waits for so many chains to be used, asleep until the device calls.
    #[track_caller]
    pub(crate) fn wait(&mut self, count: usize) -> Vec<Used> {
        let deadline = Instant::now() + PATIENCE;
        let mut all = Vec::new();
        while all.len() < count {
            // The call that was asked for is consumed before the look that may miss nothing.
            let _ = self.call.read();
            let event = self.avail() + 4 + 2 * u64::from(self.size);
            self.memory.write(event, &self.used_seen.to_le_bytes());
            fence(Ordering::SeqCst);
            let news = self.used();
            if news.is_empty() {
                let left = deadline.saturating_duration_since(Instant::now());
                assert!(
                    self.is_called(left),
                    "{} of {count} chains were used",
                    all.len()
                );
            }
            all.extend(news);
        }
        assert_eq!(
            all.len(),
            count,
            "more chains were used than were posted: {all:?}"
        );
        all
    }

    /// Waits until something is used, looking often.
    #[track_caller]
    pub(crate) fn wait_for_some(&mut self) -> Vec<Used> {
        let deadline = Instant::now() + PATIENCE;
        while self.used_seen == self.used_idx() {
            assert!(Instant::now() < deadline, "nothing is used");
            std::thread::sleep(Duration::from_micros(100));
        }
        self.used()
    }

    /// Waits until the device calls; false when it does not within `limit`.
    pub(crate) fn is_called(&self, limit: Duration) -> bool {
        let millis = limit.as_millis().try_into().unwrap_or(i32::MAX);
        let events = &mut [EpollEvent::default()];
        self.called.wait(millis, events).expect("epoll") > 0
    }

    /// True when nothing was used within `time`.
    pub(crate) fn is_silent(&self, time: Duration) -> bool {
        std::thread::sleep(time);
        self.used_seen == self.used_idx()
    }
}

fn watch(event: &EventFd) -> Epoll {
    let epoll = Epoll::new().expect("epoll");
    let readable = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, event.as_raw_fd(), readable)
        .expect("epoll");
    epoll
}
