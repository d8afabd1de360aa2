//! The first hop of the plain relay: requests and answers in two rings of shared memory, an eventfd each way.
//!
//! As little as can be: an entry is one word, and a side that sleeps says so in a flag.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use anyhow::Result;
use rustix::event::{EventfdFlags, eventfd};

use crate::bell::Bell;
use crate::link::{Direction, Link, MAX_DEPTH, MAX_LEN, Request, SECTOR};
use crate::memory::Memory;

/// Entries of a ring; more than can be in flight.
const ENTRIES: u32 = 256;
/// Where the buffers of the slots begin.
const DATA: usize = 64 << 10;

/// One of the two rings: one side puts entries in, the other takes them out.
#[derive(Debug, Clone, Copy)]
struct Ring {
    at: usize,
}

const REQUESTS: Ring = Ring { at: 0 };
const ANSWERS: Ring = Ring { at: 16 << 10 };

impl Ring {
    const fn tail(self) -> usize {
        self.at
    }

    const fn asleep(self) -> usize {
        self.at + 64
    }

    const fn entry(self, index: u32) -> usize {
        self.at + 4096 + 8 * (index % ENTRIES) as usize
    }

    /// Shows entries before `tail`; true when the other side has to be woken.
    fn publish(self, memory: &Memory, tail: u32) -> bool {
        memory.store(self.tail(), tail, Ordering::Release);
        fence(Ordering::SeqCst);
        let asleep = memory.load::<u32>(self.asleep(), Ordering::Relaxed) != 0;
        if asleep {
            memory.store(self.asleep(), 0_u32, Ordering::Relaxed);
        }
        asleep
    }

    fn take(self, memory: &Memory, head: &mut u32) -> Option<u64> {
        if memory.load::<u32>(self.tail(), Ordering::Acquire) == *head {
            return None;
        }
        let entry = memory.load(self.entry(*head), Ordering::Relaxed);
        *head = head.wrapping_add(1);
        Some(entry)
    }

    /// Says that the taking side is about to sleep; false when there is an entry already.
    fn arm(self, memory: &Memory, head: u32) -> bool {
        memory.store(self.asleep(), 1_u32, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let sleep = memory.load::<u32>(self.tail(), Ordering::Acquire) == head;
        if !sleep {
            memory.store(self.asleep(), 0_u32, Ordering::Relaxed);
        }
        sleep
    }
}

/// Offset of a slot's buffer.
pub(crate) const fn buffer(slot: usize) -> usize {
    DATA + slot * MAX_LEN
}

fn ring_bell(fd: impl AsFd) -> io::Result<()> {
    rustix::io::write(fd, &1_u64.to_ne_bytes())?;
    Ok(())
}

/// The side that has requests.
pub(crate) struct Asking {
    memory: Memory,
    kick: OwnedFd,
    _call: OwnedFd,
    bell: Bell,
    tail: u32,
    published: u32,
    head: u32,
    sectors: u64,
}

impl Asking {
    /// A hop, and what the answering process gets as its standard input and output.
    ///
    /// # Errors
    /// The system has no memory or descriptors for it.
    pub(crate) fn new(bytes: u64) -> Result<(Self, Stdio, Stdio)> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let (kick, call) = (eventfd(0, flags)?, eventfd(0, flags)?);
        let ends = (kick.try_clone()?, call.try_clone()?);
        let bell = Bell::new()?;
        bell.add(&call, false, 0)?;
        let asking = Self {
            memory: Memory::new(buffer(MAX_DEPTH))?,
            kick,
            _call: call,
            bell,
            tail: 0,
            published: 0,
            head: 0,
            sectors: bytes / SECTOR,
        };
        Ok((asking, ends.0.into(), ends.1.into()))
    }

    /// The memory, for another process to open.
    pub(crate) fn file(&self) -> &File {
        self.memory.file()
    }
}

impl Link for Asking {
    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn submit(&mut self, slot: usize, request: Request) {
        let write = u64::from(request.direction == Direction::Write);
        let entry = (request.len as u64) << 32 | write << 16 | slot as u64;
        self.memory
            .store(REQUESTS.entry(self.tail), entry, Ordering::Relaxed);
        self.tail = self.tail.wrapping_add(1);
    }

    fn publish(&mut self) -> io::Result<()> {
        if self.published != self.tail {
            self.published = self.tail;
            if REQUESTS.publish(&self.memory, self.tail) {
                ring_bell(&self.kick)?;
            }
        }
        Ok(())
    }

    fn finished(&mut self) -> io::Result<Option<usize>> {
        let entry = ANSWERS.take(&self.memory, &mut self.head);
        Ok(entry.map(|slot| slot as usize))
    }

    fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        if ANSWERS.arm(&self.memory, self.head) {
            self.bell.wait(Some(timeout), |_| ())?;
        }
        Ok(())
    }

    fn fill(&mut self, slot: usize, bytes: &[u8]) {
        self.memory.write(buffer(slot), bytes);
    }

    fn read(&self, slot: usize, bytes: &mut [u8]) {
        self.memory.read(buffer(slot), bytes);
    }
}

/// A request as the answering side gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) slot: usize,
    pub(crate) write: bool,
    pub(crate) len: usize,
}

/// The side that answers.
pub(crate) struct Answering {
    memory: Memory,
    call: OwnedFd,
    head: u32,
    tail: u32,
    published: u32,
}

impl Answering {
    /// Answers what comes through `memory`, and rings `call`.
    pub(crate) fn new(memory: Memory, call: OwnedFd) -> Self {
        Self {
            memory,
            call,
            head: 0,
            tail: 0,
            published: 0,
        }
    }

    /// The memory with the buffers.
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The next request.
    pub(crate) fn asked(&mut self) -> Option<Asked> {
        let entry = REQUESTS.take(&self.memory, &mut self.head)?;
        Some(Asked {
            slot: (entry & 0xffff) as usize,
            write: entry >> 16 & 1 == 1,
            len: (entry >> 32) as usize,
        })
    }

    /// Answers a request; seen with the next `publish`.
    pub(crate) fn answer(&mut self, slot: usize) {
        self.memory
            .store(ANSWERS.entry(self.tail), slot as u64, Ordering::Relaxed);
        self.tail = self.tail.wrapping_add(1);
    }

    /// Shows the answers, and wakes the asking side if it sleeps.
    ///
    /// # Errors
    /// It cannot be woken.
    pub(crate) fn publish(&mut self) -> io::Result<()> {
        if self.published != self.tail {
            self.published = self.tail;
            if ANSWERS.publish(&self.memory, self.tail) {
                ring_bell(&self.call)?;
            }
        }
        Ok(())
    }

    /// Says that this side is about to sleep; false when there is a request already.
    pub(crate) fn arm(&self) -> bool {
        REQUESTS.arm(&self.memory, self.head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(direction: Direction, len: usize) -> Request {
        Request {
            direction,
            sector: 0,
            len,
        }
    }

    #[test]
    fn requests_and_answers_cross_and_wake_only_those_who_sleep() {
        let (mut asking, _, _) = Asking::new(1 << 20).expect("a hop");
        let memory = Memory::map_again(asking.file());
        let call = asking._call.try_clone().expect("a descriptor");
        let mut answering = Answering::new(memory, call);
        assert!(answering.arm());
        asking.submit(5, request(Direction::Write, 4096));
        assert_eq!(answering.asked(), None, "not published");
        asking.publish().expect("woken");
        let mut count = [0; 8];
        rustix::io::read(&asking.kick, &mut count).expect("it slept");
        assert!(!answering.arm());
        let asked = answering.asked().expect("published");
        assert_eq!((asked.slot, asked.write, asked.len), (5, true, 4096));

        asking.submit(6, request(Direction::Read, MAX_LEN));
        asking.publish().expect("not woken");
        assert!(rustix::io::read(&asking.kick, &mut count).is_err());
        let asked = answering.asked().expect("published");
        assert_eq!((asked.slot, asked.write, asked.len), (6, false, MAX_LEN));

        answering.answer(6);
        answering.answer(5);
        answering.publish().expect("not woken");
        assert!(asking.wait(Duration::ZERO).is_ok(), "there are answers");
        assert_eq!(asking.finished().expect("sound"), Some(6));
        assert_eq!(asking.finished().expect("sound"), Some(5));
        assert_eq!(asking.finished().expect("sound"), None);
        let error = asking.wait(Duration::ZERO).expect_err("nothing comes");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
