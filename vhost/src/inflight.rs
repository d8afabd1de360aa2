//! The in-flight region: memory that outlives this process and says which requests it had.
//!
//! The layout is that of the vhost-user specification for split rings ("Inflight I/O tracking"), one
//! part a ring, each aligned to 64 bytes, and behind them a private [`Tail`] and wide parts for
//! rings that turn out larger than the front-end said. A front-end asks for a region, hands it over before
//! rings start, keeps it, and hands it over again to whoever serves the rings next. Where it does not,
//! private memory takes its place, so that everything above works in one way.

mod mapping;
mod ring;
mod tail;
mod tracking;
mod wide;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{
    FileType, MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate,
    memfd_create,
};
use rustix::io::Errno;
use vm_memory::FileOffset;
use vm_memory::mmap::MmapRegionError;

pub use ring::BadInflight;
pub(crate) use ring::Part;
pub use tail::Tail;
pub(crate) use tracking::Tracking;

use crate::device::MAX_QUEUES;
use crate::vring::MAX_RING_SIZE;
use mapping::Mapping;
use ring::{ALIGNMENT, part_len};
use tail::PRIVATE;
use wide::WideParts;

/// What the files of regions are called in `/proc`.
const NAME: &str = "vhost-user-blk-inflight";

/// What a front-end says about a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RegionShape {
    /// Bytes.
    pub(crate) len: u64,
    /// Where it starts in its file.
    pub(crate) offset: u64,
    /// Rings that it has parts for.
    pub(crate) rings: u16,
    /// Entries of each part.
    pub(crate) entries: u16,
}

/// Why there is no in-flight region, or not that one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InflightError {
    #[error("an in-flight region for {0} rings; 1 to {MAX_QUEUES} are possible")]
    Rings(u16),
    #[error("an in-flight region for rings of {0} entries; 1 to {MAX_RING_SIZE} are possible")]
    Entries(u16),
    #[error("the in-flight region has {found} bytes, and {needed} are needed")]
    TooShort { found: u64, needed: u64 },
    #[error("the in-flight region has {0} bytes, more than any has")]
    TooLong(u64),
    #[error("the in-flight region starts at {0:#x}, which is not a multiple of the page size")]
    Offset(u64),
    #[error("the in-flight region ends behind its file, which has {0} bytes")]
    PastEndOfFile(u64),
    #[error("the in-flight region's file is not memory that can be sealed against shrinking: {0}")]
    NotSealed(Errno),
    #[error("cannot make an in-flight region: {0}")]
    Make(Errno),
    #[error("cannot look at the in-flight region's file: {0}")]
    Stat(Errno),
    #[error("cannot map the in-flight region: {0}")]
    Map(#[from] MmapRegionError),
    #[error("ring {ring}: {reason}")]
    Part { ring: u16, reason: BadInflight },
}

/// A region in use.
#[derive(Debug)]
pub(crate) struct Region {
    memory: Arc<Mapping>,
    rings: u16,
    entries: u16,
    tail: Tail,
    wide: Option<WideParts>,
}

/// Bytes of all parts.
fn parts_len(rings: u16, entries: u16) -> usize {
    usize::from(rings) * part_len(entries)
}

impl RegionShape {
    fn check(self) -> Result<(), InflightError> {
        if self.rings == 0 || self.rings > MAX_QUEUES {
            return Err(InflightError::Rings(self.rings));
        }
        if self.entries == 0 || u32::from(self.entries) > MAX_RING_SIZE {
            return Err(InflightError::Entries(self.entries));
        }
        Ok(())
    }
}

impl Region {
    /// Makes the file of a new region. The front-end gets it, and hands it over to use it.
    ///
    /// # Errors
    /// There are more rings or entries than any device has, or there is no memory.
    pub(crate) fn make(rings: u16, entries: u16) -> Result<(RegionShape, File), InflightError> {
        let shape = RegionShape {
            len: (parts_len(rings, entries) + PRIVATE + WideParts::len(rings, entries)) as u64,
            offset: 0,
            rings,
            entries,
        };
        shape.check()?;
        let file = sealable().map_err(InflightError::Make)?;
        ftruncate(&file, shape.len).map_err(InflightError::Make)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&file, seals).map_err(InflightError::Make)?;
        Ok((shape, File::from(file)))
    }

    /// Takes a region from the front-end: one that was made here, or in an earlier life, or by
    /// another back-end, in which case there is no tail in it.
    ///
    /// # Errors
    /// It is not one that can be served, or that could be taken away while it is.
    pub(crate) fn open(shape: RegionShape, file: File) -> Result<Self, InflightError> {
        shape.check()?;
        let parts = parts_len(shape.rings, shape.entries);
        let most =
            parts_len(MAX_QUEUES, u16::try_from(MAX_RING_SIZE).unwrap_or(u16::MAX)) + PRIVATE;
        let len = usize::try_from(shape.len).unwrap_or(usize::MAX);
        if len < parts {
            return Err(InflightError::TooShort {
                found: shape.len,
                needed: parts as u64,
            });
        }
        if len > most {
            return Err(InflightError::TooLong(shape.len));
        }
        let page = rustix::param::page_size() as u64;
        if !shape.offset.is_multiple_of(page) {
            return Err(InflightError::Offset(shape.offset));
        }
        keep_whole(&file, shape)?;
        let memory = Arc::new(Mapping::shared(file, shape.offset, len)?);
        let behind = parts + PRIVATE;
        let wide = (len >= behind + WideParts::len(shape.rings, shape.entries))
            .then(|| WideParts::at(&memory, behind, shape))
            .flatten();
        let fresh = check_parts(&memory, shape, wide.as_ref())?;
        let tail = if len >= parts + PRIVATE {
            Tail::new(Arc::clone(&memory), parts, fresh)
        } else {
            Tail::elsewhere(fresh, true)?
        };
        Ok(Self {
            memory,
            rings: shape.rings,
            entries: shape.entries,
            tail,
            wide,
        })
    }

    /// What a front-end says about it, and its file.
    pub(crate) fn shape(&self) -> (RegionShape, Option<Arc<File>>) {
        let shape = RegionShape {
            len: self.memory.len() as u64,
            offset: self.memory.file().map_or(0, FileOffset::start),
            rings: self.rings,
            entries: self.entries,
        };
        (shape, self.memory.file().map(|file| Arc::clone(file.arc())))
    }

    /// The part of ring `index`, which has `size` entries.
    pub(crate) fn part(&self, index: usize, size: u16) -> Option<Part> {
        let narrow = self.narrow(index)?;
        let Some(wide) = self.wide.as_ref().and_then(|wide| wide.part(index)) else {
            return Some(narrow);
        };
        // What a ring of another size has left in the other one is over.
        let (part, other) = match size > self.entries {
            true => (wide, narrow),
            false => (narrow, wide),
        };
        other.forget();
        Some(part)
    }

    /// The part of ring `index` that is as large as the front-end said.
    fn narrow(&self, index: usize) -> Option<Part> {
        let at = part_len(self.entries) * index;
        let memory = || Arc::clone(&self.memory);
        (index < usize::from(self.rings)).then(|| Part::new(memory(), at, self.entries))
    }

    /// Makes every part one that no ring has run on. No ring may be running.
    pub(crate) fn forget(&self) {
        for ring in 0..usize::from(self.rings) {
            let wide = self.wide.as_ref().and_then(|wide| wide.part(ring));
            for part in self.narrow(ring).into_iter().chain(wide) {
                part.forget();
            }
        }
    }

    /// The private tail.
    pub(crate) fn tail(&self) -> Tail {
        self.tail.clone()
    }
}

/// An empty file in memory that can be sealed. Some systems want to hear that nobody will execute it,
/// and kernels before 6.3 do not know what that is.
fn sealable() -> Result<OwnedFd, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match memfd_create(NAME, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => memfd_create(NAME, flags),
        result => result,
    }
}

/// Sees to it that all of the region stays where it is: touching a page past the end of a file is a
/// SIGBUS.
fn keep_whole(file: &File, shape: RegionShape) -> Result<(), InflightError> {
    let stat = fstat(file).map_err(InflightError::Stat)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(InflightError::NotSealed(Errno::INVAL));
    }
    if !fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
        fcntl_add_seals(file, SealFlags::SHRINK).map_err(InflightError::NotSealed)?;
    }
    // Only now is the length one that stays.
    let stat = fstat(file).map_err(InflightError::Stat)?;
    let file_len = u64::try_from(stat.st_size).unwrap_or(0);
    match shape.offset.checked_add(shape.len) {
        Some(end) if end <= file_len => Ok(()),
        _ => Err(InflightError::PastEndOfFile(file_len)),
    }
}

/// Checks all parts; true when no ring has run on any.
fn check_parts(
    memory: &Arc<Mapping>,
    shape: RegionShape,
    wide: Option<&WideParts>,
) -> Result<bool, InflightError> {
    let mut fresh = true;
    for ring in 0..shape.rings {
        let at = part_len(shape.entries) * usize::from(ring);
        let part = Part::new(Arc::clone(memory), at, shape.entries);
        let wide = wide.and_then(|wide| wide.part(usize::from(ring)));
        for part in std::iter::once(part).chain(wide) {
            let failed = |reason| InflightError::Part { ring, reason };
            part.check().map_err(failed)?;
            fresh &= part.is_fresh();
        }
    }
    Ok(fresh)
}

// Tails are read and written in numbers of 8 bytes.
const _: () = assert!(ALIGNMENT.is_multiple_of(8));

#[cfg(test)]
mod tests;
