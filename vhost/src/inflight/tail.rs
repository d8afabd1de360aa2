//! The private tail of an in-flight region: room for what recovery needs besides the requests.

use std::sync::Arc;

use vm_memory::mmap::MmapRegionError;

use super::mapping::Mapping;

/// Bytes in a tail.
pub(crate) const TAIL: usize = 64 << 10;
/// Bytes behind it that are this crate's.
const OWN: usize = 64;
/// Both.
pub(crate) const PRIVATE: usize = TAIL + OWN;

/// "vblkwce" before the byte that the driver wrote to the configuration.
const CACHE_MODE: u64 = u64::from_be_bytes(*b"vblkwce\0");

/// Memory at the end of an in-flight region that means nothing to this crate and nothing to the
/// front-end, which keeps it as it keeps the region. Handles on it are cheap and may be used from
/// any thread.
///
/// It comes back from the front-end, so each byte may be anything, and may change at any time.
#[derive(Debug, Clone)]
pub struct Tail {
    memory: Arc<Mapping>,
    at: usize,
    fresh: bool,
    kept: bool,
}

impl Tail {
    /// The `PRIVATE` bytes of `memory` from `at` on, a multiple of 64.
    pub(super) fn new(memory: Arc<Mapping>, at: usize, fresh: bool) -> Self {
        Self {
            memory,
            at,
            fresh,
            kept: true,
        }
    }

    /// A tail in private memory, for a region that has none or for none.
    pub(crate) fn elsewhere(fresh: bool, kept: bool) -> Result<Self, MmapRegionError> {
        Ok(Self {
            memory: Arc::new(Mapping::private(PRIVATE)?),
            at: 0,
            fresh,
            kept,
        })
    }

    /// True when no ring has run on this region yet: the tail says nothing, and nothing was in
    /// flight.
    pub fn fresh(&self) -> bool {
        self.fresh
    }

    /// True when the front-end keeps the region beyond the session, and beyond this process: what
    /// is left in flight is given to whoever serves it next. Otherwise it is lost with the session.
    pub fn kept(&self) -> bool {
        self.kept
    }

    /// Bytes that there are.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        TAIL
    }

    /// The cache mode that was kept, 0 or 1, if one was.
    pub(crate) fn cache_mode(&self) -> Option<u8> {
        match u64::from_le(self.memory.load(self.at + TAIL)) ^ CACHE_MODE {
            0 => Some(0),
            1 => Some(1),
            _ => None,
        }
    }

    /// Keeps a cache mode, 0 or 1.
    pub(crate) fn keep_cache_mode(&self, writeback: u8) {
        let word = CACHE_MODE | u64::from(writeback & 1);
        self.memory.store(self.at + TAIL, word.to_le());
    }

    /// Where `len` bytes at `at` are in the mapping.
    fn place(&self, at: usize, len: usize) -> Option<usize> {
        let end = at.checked_add(len)?;
        (end <= TAIL).then_some(self.at + at)
    }

    /// Copies the bytes at `at`. False, and nothing is copied, when they are not all in the tail.
    #[must_use]
    pub fn read(&self, at: usize, into: &mut [u8]) -> bool {
        let place = self.place(at, into.len());
        place.is_some_and(|place| self.memory.read(place, into))
    }

    /// Copies bytes to `at`, in no order that a reader could rely on. False, and nothing is copied,
    /// when they do not all fit into the tail.
    #[must_use]
    pub fn write(&self, at: usize, from: &[u8]) -> bool {
        let place = self.place(at, from.len());
        place.is_some_and(|place| self.memory.write(place, from))
    }

    /// Reads the number at `at`, which is a multiple of 8, in one access. 0 outside the tail.
    pub fn load(&self, at: usize) -> u64 {
        match self.place(at, 8) {
            Some(place) if at.is_multiple_of(8) => u64::from_le(self.memory.load(place)),
            _ => 0,
        }
    }

    /// Writes the number at `at`, which is a multiple of 8, in one access and after everything that
    /// was written before. Does nothing outside the tail.
    pub fn store(&self, at: usize, value: u64) {
        if let Some(place) = self.place(at, 8).filter(|_| at.is_multiple_of(8)) {
            self.memory.store(place, value.to_le());
        }
    }
}
