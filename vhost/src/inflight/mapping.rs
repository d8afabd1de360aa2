//! The memory of an in-flight region: mapped once, read and written within its bounds only.

use std::fs::File;
use std::sync::atomic::Ordering;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::mmap::{MmapRegion, MmapRegionError};
use vm_memory::{AtomicAccess, Bytes, FileOffset, VolatileMemory, VolatileSlice};

/// Mapped memory that others may write to at any time.
#[derive(Debug)]
pub(crate) struct Mapping {
    region: MmapRegion<()>,
}

impl Mapping {
    /// Memory that only this process has, all zero.
    pub(crate) fn private(len: usize) -> Result<Self, MmapRegionError> {
        let region = MmapRegion::new(len)?;
        Ok(Self { region })
    }

    /// `len` bytes of a file, from `offset` on, which is a multiple of the page size.
    pub(crate) fn shared(file: File, offset: u64, len: usize) -> Result<Self, MmapRegionError> {
        let region = MmapRegion::from_file(FileOffset::new(file, offset), len)?;
        Ok(Self { region })
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.region.size()
    }

    /// The file, and where in it the mapping starts.
    pub(crate) fn file(&self) -> Option<&FileOffset> {
        self.region.file_offset()
    }

    fn bytes(&self) -> VolatileSlice<'_, impl BitmapSlice> {
        self.region.as_volatile_slice()
    }

    /// Reads an aligned field in one access; 0 outside the mapping.
    #[inline]
    pub(crate) fn load<T: AtomicAccess + Default>(&self, at: usize) -> T {
        let value = self.bytes().load(at, Ordering::Acquire);
        debug_assert!(value.is_ok(), "field at {at} is outside the region");
        value.unwrap_or_default()
    }

    /// Writes an aligned field in one access, after everything that was written before; nothing
    /// outside the mapping. Who finds the memory after this process was killed, at whatever moment,
    /// finds the stores up to that moment, and none behind it.
    #[inline]
    pub(crate) fn store<T: AtomicAccess>(&self, at: usize, value: T) {
        #[cfg(test)]
        crate::fuse::burn();
        let stored = self.bytes().store(value, at, Ordering::Release);
        debug_assert!(stored.is_ok(), "field at {at} is outside the region");
    }

    /// Copies out of the mapping; false, and nothing is copied, when it ends before that.
    pub(crate) fn read(&self, at: usize, into: &mut [u8]) -> bool {
        self.bytes().read_slice(into, at).is_ok()
    }

    /// Copies into the mapping; false when it ends before that.
    pub(crate) fn write(&self, at: usize, from: &[u8]) -> bool {
        self.bytes().write_slice(from, at).is_ok()
    }
}
