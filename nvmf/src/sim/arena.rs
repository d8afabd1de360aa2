//! Memory for the host's commands, in which every byte that is written out of turn is noticed.
//!
//! A buffer lies between guards. When it has come back it is filled with poison, and both are looked
//! at again before the memory is used anew.

use std::cell::RefCell;
use std::collections::BTreeMap;

use memdesc::{MemSink, MemSource};

use crate::backend::{Backend, RamBackend};

/// Bytes of the arena.
const SIZE: usize = 8 << 20;
/// Bytes before and behind each buffer.
const GUARD: usize = 64;
/// What guards hold.
const GUARD_BYTE: u8 = 0x9d;
/// What buffers hold that have come back.
const POISON: u8 = 0xd7;

thread_local! {
    /// Address space is not given back by the memory backend: worlds of one thread use the same.
    static POOL: RefCell<Vec<RamBackend>> = const { RefCell::new(Vec::new()) };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Region {
    len: usize,
    live: bool,
}

/// A buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Buffer {
    start: usize,
    pub(super) len: usize,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Arena {
    memory: Option<RamBackend>,
    /// By the first byte of the buffer itself.
    regions: BTreeMap<usize, Region>,
    cursor: usize,
}

impl Arena {
    pub(super) fn new() -> Result<Self, String> {
        let pooled = POOL.with_borrow_mut(Vec::pop);
        let memory = match pooled {
            Some(memory) => memory,
            None => RamBackend::new(SIZE as u64, 512).map_err(|error| error.to_string())?,
        };
        Ok(Self {
            memory: Some(memory),
            regions: BTreeMap::new(),
            cursor: 0,
        })
    }

    fn sink_at(&self, start: usize, len: usize) -> Result<MemSink, String> {
        let memory = self.memory.as_ref();
        let sink = memory.and_then(|memory| memory.sink(start as u64, len, &mut Vec::new()));
        sink.ok_or_else(|| "outside of the arena".to_owned())
    }

    fn source_at(&self, start: usize, len: usize) -> Result<MemSource, String> {
        let memory = self.memory.as_ref();
        let source = memory.and_then(|memory| memory.source(start as u64, len, &mut Vec::new()));
        source.ok_or_else(|| "outside of the arena".to_owned())
    }

    fn set(&self, start: usize, len: usize, byte: u8) -> Result<(), String> {
        let mut sink = self.sink_at(start, len)?;
        sink.fill(0..len, byte).map_err(|error| error.to_string())
    }

    fn expect(&self, start: usize, len: usize, byte: u8, what: &str) -> Result<(), String> {
        let mut bytes = vec![0; len];
        let source = self.source_at(start, len)?;
        source
            .copy_to(0, &mut bytes)
            .map_err(|error| error.to_string())?;
        if bytes == vec![byte; len] {
            return Ok(());
        }
        let at = bytes.iter().position(|&found| found != byte);
        Err(format!("{what} was written, at its byte {at:?} of {len}"))
    }

    /// A buffer; `None` when there is no room now.
    pub(super) fn take(&mut self, len: usize) -> Result<Option<Buffer>, String> {
        let whole = GUARD + len + GUARD;
        for _ in 0..2 {
            while self.cursor + whole <= SIZE {
                match self.in_the_way(self.cursor, self.cursor + whole)? {
                    Some(end) => self.cursor = end,
                    None => {
                        let start = self.cursor + GUARD;
                        self.cursor += whole;
                        self.set(start - GUARD, GUARD, GUARD_BYTE)?;
                        self.set(start + len, GUARD, GUARD_BYTE)?;
                        self.regions.insert(start, Region { len, live: true });
                        return Ok(Some(Buffer { start, len }));
                    }
                }
            }
            self.cursor = 0;
        }
        Ok(None)
    }

    /// Releases what has come back there; the end of what has not, if there is such.
    fn in_the_way(&mut self, from: usize, to: usize) -> Result<Option<usize>, String> {
        let near: Vec<_> = self
            .regions
            .range(..to + GUARD)
            .rev()
            .take_while(|(start, region)| *start + region.len + GUARD > from)
            .map(|(start, region)| (*start, *region))
            .collect();
        for &(start, region) in &near {
            if region.live {
                return Ok(Some(start + region.len + GUARD));
            }
        }
        for (start, region) in near {
            self.check_returned(start, region.len)?;
            self.regions.remove(&start);
        }
        Ok(None)
    }

    fn check_returned(&self, start: usize, len: usize) -> Result<(), String> {
        self.check_guards(start, len)?;
        self.expect(start, len, POISON, "a buffer that had come back")
    }

    fn check_guards(&self, start: usize, len: usize) -> Result<(), String> {
        self.expect(start - GUARD, GUARD, GUARD_BYTE, "memory before a buffer")?;
        self.expect(start + len, GUARD, GUARD_BYTE, "memory behind a buffer")
    }

    pub(super) fn write(&self, buffer: Buffer, bytes: &[u8]) -> Result<(), String> {
        let mut sink = self.sink_at(buffer.start, buffer.len)?;
        sink.copy_from(0, bytes).map_err(|error| error.to_string())
    }

    pub(super) fn source(&self, buffer: Buffer) -> Result<MemSource, String> {
        self.source_at(buffer.start, buffer.len)
    }

    pub(super) fn sink(&self, buffer: Buffer) -> Result<MemSink, String> {
        self.set(buffer.start, buffer.len, !POISON)?;
        self.sink_at(buffer.start, buffer.len)
    }

    /// A buffer has come back: what it holds. Its guards must be whole.
    pub(super) fn give_back(&mut self, buffer: Buffer) -> Result<Vec<u8>, String> {
        let Buffer { start, len } = buffer;
        match self.regions.get_mut(&start) {
            Some(region) if region.live => region.live = false,
            _ => return Err("a buffer came back twice".to_owned()),
        }
        let mut bytes = vec![0; len];
        let source = self.source_at(start, len)?;
        source
            .copy_to(0, &mut bytes)
            .map_err(|error| error.to_string())?;
        self.check_guards(start, len)?;
        self.set(start, len, POISON)?;
        Ok(bytes)
    }

    /// Looks at everything that has come back.
    pub(super) fn check(&self) -> Result<(), String> {
        self.regions
            .iter()
            .filter(|(_, region)| !region.live)
            .try_for_each(|(&start, region)| self.check_returned(start, region.len))
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            // The thread may be ending, its pool gone: then the memory is simply given up.
            let _ = POOL.try_with(|pool| pool.borrow_mut().push(memory));
        }
    }
}
