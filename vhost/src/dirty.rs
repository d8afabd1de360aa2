//! The log of guest pages that we have written: what a front-end copies again while it migrates a guest.
//!
//! The front-end shares a bitmap with a bit for each 4 KiB of guest memory, by guest address, and takes bits out
//! while we put them in. A bit is put in after the write that it stands for. Between the two the front-end may
//! have taken the bit out and copied the page as it was; so a mark is made even where one is seen.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress, VolatileMemory};

use crate::blk::request::Operation;
use crate::complaints::Complaints;
use crate::memory::{GuestMap, MemoryError, Region, RegionSpec};
use crate::vring::Signal;

/// Bytes of guest memory that a bit stands for.
const PAGE: u64 = 4096;

/// Where the used index is in a used ring, and its first element; both are in bytes.
const USED_INDEX: u64 = 2;
const USED_ELEMENTS: u64 = 4;
/// Bytes of a used element.
const USED_ELEMENT: u64 = 8;

/// A front-end's bitmap, mapped.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    bitmap: Region,
    bytes: u64,
    /// It turned out not to reach as far as the guest's memory does.
    short: AtomicBool,
}

impl DirtyLog {
    /// Maps `bytes` of a file, from `offset` on.
    pub(crate) fn map(file: &File, bytes: u64, offset: u64) -> Result<Self, MemoryError> {
        let spec = RegionSpec {
            guest_addr: 0,
            user_addr: 0,
            size: bytes,
            file_offset: offset,
        };
        let stat = Region::check(spec, file)?;
        Ok(Self {
            bitmap: Region::map(spec, file, &stat)?,
            bytes,
            short: AtomicBool::new(false),
        })
    }

    /// Marks the pages of `len` bytes at guest address `addr`. False when the log does not reach so far; those
    /// pages that it has are marked.
    fn mark(&self, addr: u64, len: u64) -> bool {
        let Some(behind) = len.checked_sub(1) else {
            return true;
        };
        let last = addr.saturating_add(behind) / PAGE;
        let pages = self.bytes.saturating_mul(8);
        let end = pages.min(last + 1);
        let mut page = addr / PAGE;
        while page < end {
            let next = end.min((page / 8 + 1) * 8);
            // One to eight bits of one byte.
            let bits = (u8::MAX >> (8 - (next - page))) << (page % 8);
            self.put(page / 8, bits);
            page = next;
        }
        last < pages
    }

    fn put(&self, byte: u64, bits: u8) {
        let cell = self.bitmap.get_slice(MemoryRegionAddress(byte), 1);
        if let Ok(cell) = cell
            && let Ok(cell) = cell.get_atomic_ref::<AtomicU8>(0)
        {
            // Whoever takes the bit out sees what was written before.
            cell.fetch_or(bits, Ordering::AcqRel);
        }
    }
}

/// What a ring marks in a log: to be given to its queue.
#[derive(Debug, Clone)]
pub struct RingLog {
    pub(crate) log: Arc<DirtyLog>,
    /// Marks are made of what requests write: data and status.
    pub(crate) data: bool,
    /// The address by which the used ring is marked; `None`: it is not.
    pub(crate) used: Option<u64>,
    /// Raised when there are new marks, if the front-end wants that.
    pub(crate) call: Option<Signal>,
    pub(crate) complaints: Arc<Complaints>,
}

impl RingLog {
    fn mark(&self, addr: u64, len: u64) {
        if !self.log.mark(addr, len)
            && !self.log.short.swap(true, Ordering::Relaxed)
            && self.complaints.allow()
        {
            tracing::error!(
                page = format_args!("{addr:#x}"),
                log_bytes = self.log.bytes,
                "the front-end's log of written pages is too small for a page that was written: the guest must \
                 not be migrated"
            );
        }
    }

    fn mark_used(&self, offset: u64, len: u64) {
        if let Some(used) = self.used {
            self.mark(used.saturating_add(offset), len);
        }
    }

    /// Marks `len` bytes that were written at `addr` in the course of a request.
    pub(crate) fn wrote(&self, addr: u64, len: u64) {
        if self.data {
            self.mark(addr, len);
        }
    }

    /// Marks all that a request was to write, whatever became of it: its memory is in `map`.
    pub(crate) fn finished(&self, map: Option<&GuestMap>, operation: &Operation) {
        if let (true, Some(map), Operation::Read { sink, .. }) = (self.data, map, operation) {
            let all = sink.written(0..sink.len(), |piece, len| {
                for (addr, len) in map.guest_ranges(piece.addr(), len) {
                    self.mark(addr, len);
                }
            });
            debug_assert!(all.is_ok(), "a range of the sink's own");
        }
    }

    /// Marks the element before `staged` in a used ring of `size` entries.
    pub(crate) fn staged(&self, staged: u16, size: u16) {
        let slot = staged.wrapping_sub(1).checked_rem(size).unwrap_or(0);
        self.mark_used(USED_ELEMENTS + USED_ELEMENT * u64::from(slot), USED_ELEMENT);
    }

    /// Marks the used index.
    pub(crate) fn published(&self) {
        self.mark_used(USED_INDEX, 2);
        if let Some(call) = &self.call {
            call.raise();
        }
    }

    /// Marks where a ring of `size` entries says whether it wants kicks: in its flags, or behind its elements.
    pub(crate) fn notified(&self, event_idx: bool, size: u16) {
        let offset = match event_idx {
            true => USED_ELEMENTS + USED_ELEMENT * u64::from(size),
            false => 0,
        };
        self.mark_used(offset, 2);
    }
}

impl GuestMap {
    /// The guest's ranges of `len` mapped bytes at address `host` of ours; those that are not mapped are left out.
    fn guest_ranges(&self, mut host: usize, mut len: usize) -> impl Iterator<Item = (u64, u64)> {
        std::iter::from_fn(move || {
            let (addr, behind) = self.table().iter().find_map(|region| {
                let start = region.get_slice(MemoryRegionAddress(0), 0).ok()?;
                let start = start.ptr_guard().as_ptr().addr();
                let offset = host.checked_sub(start).map(|offset| offset as u64)?;
                let behind = region.len().checked_sub(offset).filter(|len| *len > 0)?;
                Some((region.start_addr().0 + offset, behind))
            })?;
            let take = usize::try_from(behind).unwrap_or(usize::MAX).min(len);
            host = host.checked_add(take)?;
            len -= take;
            (take > 0).then_some((addr, take as u64))
        })
    }
}

#[cfg(test)]
mod tests;
