//! Memory that the bench shares with a contender: a memfd, reached by copies and atomic words alone.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::mmap::MmapRegion;
use vm_memory::{AtomicAccess, Bytes, FileOffset, VolatileMemory, VolatileSlice};

/// A shared mapping. Offsets and lengths are the bench's own, so one that is outside is a bug in it and panics.
#[derive(Debug)]
pub(crate) struct Memory {
    region: MmapRegion,
    file: File,
}

impl Memory {
    /// New memory of `len` bytes, all zero.
    ///
    /// # Errors
    /// The system has none.
    pub(crate) fn new(len: usize) -> Result<Self> {
        let file = File::from(memfd_create("bench", MemfdFlags::CLOEXEC)?);
        file.set_len(len as u64)?;
        Self::map(file)
    }

    /// The memory behind a path, as another process made it.
    ///
    /// # Errors
    /// There is nothing that can be mapped.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let mut options = File::options();
        let file = options.read(true).write(true).open(path);
        Self::map(file.with_context(|| format!("{}", path.display()))?)
    }

    fn map(file: File) -> Result<Self> {
        let len = usize::try_from(file.metadata()?.len())?;
        let region = MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), len)?;
        Ok(Self { region, file })
    }

    #[cfg(test)]
    pub(crate) fn map_again(file: &File) -> Self {
        Self::map(file.try_clone().expect("a descriptor")).expect("a mapping")
    }

    /// What is mapped.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Bytes in all.
    pub(crate) fn len(&self) -> usize {
        self.region.size()
    }

    /// Where the mapping begins in this process.
    pub(crate) fn address(&self) -> u64 {
        self.region.as_ptr() as u64
    }

    /// A part of it.
    pub(crate) fn slice(&self, at: usize, len: usize) -> VolatileSlice<'_, impl BitmapSlice> {
        within(self.region.get_slice(at, len))
    }

    /// Reads an aligned word.
    pub(crate) fn load<T: AtomicAccess>(&self, at: usize, order: Ordering) -> T {
        within(self.region.as_volatile_slice().load(at, order))
    }

    /// Writes an aligned word.
    pub(crate) fn store<T: AtomicAccess>(&self, at: usize, value: T, order: Ordering) {
        within(self.region.as_volatile_slice().store(value, at, order));
    }

    /// Copies bytes in.
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        within(self.region.as_volatile_slice().write_slice(bytes, at));
    }

    /// Copies bytes out.
    pub(crate) fn read(&self, at: usize, bytes: &mut [u8]) {
        within(self.region.as_volatile_slice().read_slice(bytes, at));
    }
}

#[expect(
    clippy::expect_used,
    reason = "a bug of the bench, as indexing a slice would be"
)]
fn within<T>(result: Result<T, vm_memory::VolatileMemoryError>) -> T {
    result.expect("an offset inside the memory")
}
