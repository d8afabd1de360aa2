//! Guest memory: one generation of the table of regions that a front-end shares, mapped.
//!
//! A generation never changes. Adding or removing a region makes a new [`GuestMap`] that shares the
//! mappings that stay, and so does a whole new table that names them again; a mapping goes away with
//! the last generation that knows it. Whoever drops that one, a worker in most cases, does not unmap
//! (see [`crate::unmap`]).

#![expect(
    unsafe_code,
    reason = "mapping files that another process shares, and describing pieces of them"
)]

use std::fs::File;
use std::num::NonZero;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;

use memdesc::Segment;
use rustix::fs::{FileType, Stat, fstat, fstatfs};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestUsize, MemoryRegionAddress, VolatileSlice,
};

use crate::access::Slices;
use crate::device::MAX_MEMORY_SLOTS;
use crate::unmap;

/// `f_type` of a hugetlbfs, whose files are mapped in whole huge pages.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// A region as the front-end describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RegionSpec {
    /// Where the guest sees it.
    pub(crate) guest_addr: u64,
    /// Where the front-end has it, the address space of ring addresses in messages.
    pub(crate) user_addr: u64,
    /// Bytes.
    pub(crate) size: u64,
    /// Where it starts in its file.
    pub(crate) file_offset: u64,
}

/// Why a memory table or a change of it is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error("region {0:#x}+{1:#x} is empty or ends past the address space")]
    Range(u64, u64),
    #[error("region {0:#x}+{1:#x} overlaps another one")]
    Overlap(u64, u64),
    #[error("more than {MAX_MEMORY_SLOTS} regions")]
    TooMany,
    #[error("no region {0:#x}+{1:#x} at user address {2:#x}")]
    NoSuchRegion(u64, u64, u64),
    #[error("region {0:#x}+{1:#x} reaches past the end of its file, {2:#x} bytes long")]
    PastEndOfFile(u64, u64, u64),
    #[error("cannot map region {0:#x}+{1:#x}: {2}")]
    Map(u64, u64, rustix::io::Errno),
}

/// A range of guest memory that no region holds, in part or whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OutsideMemory;

/// A shared mapping, unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is process-wide; nothing in it is bound to the thread that made it.
unsafe impl Send for Mapping {}
// SAFETY: shared access only reads the address and the length.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// What a guest has in memory is not for our core dumps, which it would make huge besides.
    fn leave_out_of_dumps(&self) {
        // SAFETY: the range is ours, and the advice changes nothing that a program can see.
        let advised =
            unsafe { madvise(self.base.as_ptr().cast(), self.len, Advice::LinuxDontDump) };
        if let Err(error) = advised {
            tracing::debug!(%error, "guest memory will be in core dumps");
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        #[cfg(test)]
        unmap::note(self.len);
        // SAFETY: the mapping is ours, and whatever points into it holds, or is counted by, the
        // generation that keeps it.
        if let Err(error) = unsafe { munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::error!(%error, len = self.len, "cannot unmap guest memory");
        }
    }
}

/// What tells one living file from every other: device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileId(u64, u64);

impl FileId {
    fn of(stat: &Stat) -> Self {
        Self(stat.st_dev, stat.st_ino)
    }
}

/// A mapped region.
#[derive(Debug)]
pub struct Region {
    spec: RegionSpec,
    file: FileId,
    /// For whoever goes on with the session.
    handle: Arc<File>,
    mapping: Mapping,
    /// Where the region starts in the mapping, which starts at a page boundary of the file.
    lead: usize,
    size: usize,
}

impl Region {
    /// Checks what can be checked of a region before it is mapped.
    pub(crate) fn check(spec: RegionSpec, file: &File) -> Result<Stat, MemoryError> {
        let RegionSpec {
            guest_addr,
            user_addr,
            size,
            file_offset,
        } = spec;
        let fits = |start: u64| start.checked_add(size).is_some();
        if size == 0 || !fits(guest_addr) || !fits(user_addr) || !fits(file_offset) {
            return Err(MemoryError::Range(guest_addr, size));
        }
        let stat = fstat(file).map_err(|errno| MemoryError::Map(guest_addr, size, errno))?;
        let file_len = u64::try_from(stat.st_size).unwrap_or(0);
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        // Touching a page past the end of a file is a SIGBUS.
        if is_file && file_offset + size > file_len {
            return Err(MemoryError::PastEndOfFile(guest_addr, size, file_len));
        }
        Ok(stat)
    }

    /// Maps a region that was checked.
    pub(crate) fn map(spec: RegionSpec, file: &File, stat: &Stat) -> Result<Self, MemoryError> {
        let RegionSpec {
            guest_addr,
            size,
            file_offset,
            ..
        } = spec;
        let range = || MemoryError::Range(guest_addr, size);
        let failed = |errno| MemoryError::Map(guest_addr, size, errno);
        let page = page_size(file).map_err(failed)?;
        let lead = file_offset % page;
        let len = (lead + size)
            .checked_next_multiple_of(page)
            .and_then(|len| usize::try_from(len).ok())
            .ok_or_else(range)?;
        // SAFETY: a new mapping at an address that the kernel chooses touches no memory of ours.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                file,
                file_offset - lead,
            )
        }
        .map_err(failed)?;
        let base = NonNull::new(base.cast()).ok_or(failed(rustix::io::Errno::FAULT))?;
        let mapping = Mapping { base, len };
        mapping.leave_out_of_dumps();
        let handle = rustix::io::fcntl_dupfd_cloexec(file, 3).map_err(failed)?;
        let handle = File::from(handle);
        unmap::get_ready();
        Ok(Self {
            spec,
            file: FileId::of(stat),
            handle: Arc::new(handle),
            mapping,
            lead: usize::try_from(lead).map_err(|_| range())?,
            size: usize::try_from(size).map_err(|_| range())?,
        })
    }

    fn holds_user(&self, addr: u64) -> bool {
        addr.checked_sub(self.spec.user_addr)
            .is_some_and(|offset| offset < self.spec.size)
    }

    fn overlaps_user(&self, other: &Self) -> bool {
        self.holds_user(other.spec.user_addr) || other.holds_user(self.spec.user_addr)
    }
}

/// Bytes in which mappings of the file start and end.
fn page_size(file: impl AsFd) -> rustix::io::Result<u64> {
    let normal = rustix::param::page_size() as u64;
    let system = fstatfs(file)?;
    let huge = system.f_type as u64 == HUGETLBFS_MAGIC;
    let size = if huge { system.f_bsize as u64 } else { normal };
    NonZero::new(size).map_or(Ok(normal), |size| Ok(size.get()))
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.spec.size
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.spec.guest_addr)
    }

    fn bitmap(&self) {}

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        let outside = || GuestMemoryError::InvalidBackendAddress;
        let start = usize::try_from(offset.0).map_err(|_| outside())?;
        match start.checked_add(count) {
            Some(end) if end <= self.size => {}
            _ => return Err(outside()),
        }
        // SAFETY: `lead + size` bytes are mapped at `base` for as long as `self` lives, the range
        // was just checked to lie in the last `size` of them, and all accesses are volatile or
        // atomic.
        Ok(unsafe { VolatileSlice::new(self.mapping.base.as_ptr().add(self.lead + start), count) })
    }
}

impl GuestMemoryRegionBytes for Region {}

/// One generation of a guest's memory.
#[derive(Debug, Default)]
pub struct GuestMap {
    memory: GuestRegionCollection<Region>,
}

impl GuestMap {
    /// Maps a whole new table. Regions that this generation has as well are not mapped again: the
    /// pages of theirs that we have touched stay as quick to reach as they were.
    pub(crate) fn replaced(&self, regions: Vec<(RegionSpec, File)>) -> Result<Self, MemoryError> {
        let mut map = Self::default();
        for (spec, file) in regions {
            let stat = Region::check(spec, &file)?;
            let region = match self.mapped(spec, FileId::of(&stat)) {
                Some(region) => region,
                None => Arc::new(Region::map(spec, &file, &stat)?),
            };
            map.memory = map.inserted(region)?;
        }
        Ok(map)
    }

    /// The generation that has one more region. The file need not stay open.
    pub(crate) fn with(&self, spec: RegionSpec, file: &File) -> Result<Self, MemoryError> {
        let stat = Region::check(spec, file)?;
        let region = Region::map(spec, file, &stat)?;
        let memory = self.inserted(Arc::new(region))?;
        Ok(Self { memory })
    }

    /// The region that is exactly this one, if there is one.
    fn mapped(&self, spec: RegionSpec, file: FileId) -> Option<Arc<Region>> {
        let at = GuestAddress(spec.guest_addr);
        let (_, region) = self.memory.remove_region(at, spec.size).ok()?;
        // Our mapping keeps the file alive, so that no other file can have become it.
        (region.spec == spec && region.file == file).then_some(region)
    }

    fn inserted(&self, region: Arc<Region>) -> Result<GuestRegionCollection<Region>, MemoryError> {
        if self.memory.num_regions() as u64 >= MAX_MEMORY_SLOTS {
            return Err(MemoryError::TooMany);
        }
        let overlap = MemoryError::Overlap(region.spec.guest_addr, region.spec.size);
        if self.memory.iter().any(|other| region.overlaps_user(other)) {
            return Err(overlap);
        }
        self.memory.insert_region(region).map_err(|_| overlap)
    }

    /// The generation that lacks a region, found by its addresses and size alone.
    pub(crate) fn without(&self, spec: RegionSpec) -> Result<Self, MemoryError> {
        let missing = || MemoryError::NoSuchRegion(spec.guest_addr, spec.size, spec.user_addr);
        let (memory, region) = self
            .memory
            .remove_region(GuestAddress(spec.guest_addr), spec.size)
            .map_err(|_| missing())?;
        if region.spec.user_addr != spec.user_addr {
            return Err(missing());
        }
        Ok(Self { memory })
    }

    /// Regions in the table.
    pub fn regions(&self) -> usize {
        self.memory.num_regions()
    }

    /// Up to `len` bytes at `addr`, as far as one region has them.
    #[inline]
    pub(crate) fn slice(&self, addr: u64, len: usize) -> Option<VolatileSlice<'_>> {
        let (region, at) = self.memory.to_region_addr(GuestAddress(addr))?;
        let behind = usize::try_from(region.spec.size - at.0).unwrap_or(usize::MAX);
        region.get_slice(at, len.min(behind)).ok()
    }

    /// The regions.
    pub(crate) fn table(&self) -> &GuestRegionCollection<Region> {
        &self.memory
    }

    /// What the front-end has for an address of the guest's.
    pub(crate) fn user_addr(&self, guest_addr: u64) -> Option<u64> {
        let (region, at) = self.memory.to_region_addr(GuestAddress(guest_addr))?;
        Some(region.spec.user_addr + at.0)
    }

    /// The regions as the front-end described them, with their files.
    pub(crate) fn recorded(&self) -> Vec<(RegionSpec, Arc<File>)> {
        let regions = self.memory.iter();
        regions
            .map(|region| (region.spec, Arc::clone(&region.handle)))
            .collect()
    }

    /// The guest's address of what the front-end has at `user_addr`.
    pub(crate) fn guest_addr(&self, user_addr: u64) -> Option<u64> {
        let region = self
            .memory
            .iter()
            .find(|region| region.holds_user(user_addr))?;
        Some(region.spec.guest_addr + (user_addr - region.spec.user_addr))
    }

    /// Appends the segments that make up `len` bytes at `addr`: more than one where the range
    /// crosses into an adjacent region.
    ///
    /// Whoever takes the segments must keep this generation alive until they are gone.
    pub(crate) fn segments(
        &self,
        addr: u64,
        len: usize,
        out: &mut Vec<Segment>,
    ) -> Result<(), OutsideMemory> {
        for slice in Slices::new(self, addr, len) {
            let slice = slice.map_err(|_| OutsideMemory)?;
            let base = NonNull::new(slice.ptr_guard_mut().as_ptr()).ok_or(OutsideMemory)?;
            // SAFETY: the slice is mapped readable and writable until the last generation that
            // has the region is dropped. The queue that made the segments counts them against
            // this generation and keeps it until their request is finished.
            out.push(unsafe { Segment::new(base, slice.len()) });
        }
        Ok(())
    }
}

impl Drop for GuestMap {
    fn drop(&mut self) {
        if self.memory.num_regions() > 0 {
            unmap::later(std::mem::take(&mut self.memory));
        }
    }
}

#[cfg(test)]
mod tests;
