//! Access to guest memory by physical address: for `virtio-queue`, and copies and fields of our own.
//!
//! The library's own view of a collection of regions does the same. It is built to serve anything
//! that can fail half-way, and cost half of all time spent on a request; hence this one.

use std::iter::FusedIterator;
use std::sync::atomic::Ordering;

use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestRegionCollection,
    Permissions, VolatileSlice,
};

use crate::memory::{GuestMap, OutsideMemory, Region};

/// The pieces of a range of guest memory, one for each region that it touches.
pub(crate) struct Slices<'a> {
    map: &'a GuestMap,
    addr: u64,
    left: usize,
}

impl<'a> Slices<'a> {
    /// The pieces of `len` bytes at `addr`.
    #[inline]
    pub(crate) fn new(map: &'a GuestMap, addr: u64, len: usize) -> Self {
        Self {
            map,
            addr,
            left: len,
        }
    }
}

impl<'a> Iterator for Slices<'a> {
    type Item = Result<VolatileSlice<'a>, GuestMemoryError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let Some(slice) = self.map.slice(self.addr, self.left) else {
            self.left = 0;
            return Some(Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(
                self.addr,
            ))));
        };
        self.left -= slice.len();
        // No region ends at the end of the address space, so this only wraps behind the last piece
        // of a range that is looked up in vain next.
        self.addr = self.addr.wrapping_add(slice.len() as u64);
        Some(Ok(slice))
    }
}

impl FusedIterator for Slices<'_> {}

impl<'a> GuestMemorySliceIterator<'a, ()> for Slices<'a> {
    #[inline]
    fn stop_on_error(
        mut self,
    ) -> Result<impl Iterator<Item = VolatileSlice<'a>>, GuestMemoryError> {
        let first = self.next().transpose()?;
        Ok(first.into_iter().chain(self.map_while(Result::ok)))
    }
}

impl GuestMemory for GuestMap {
    type PhysicalMemory = GuestRegionCollection<Region>;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        Slices::new(self, addr.0, count).all(|slice| slice.is_ok())
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        _access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>, GuestMemoryError> {
        Ok(Slices::new(self, addr.0, count))
    }

    fn physical_memory(&self) -> Option<&Self::PhysicalMemory> {
        Some(self.table())
    }
}

impl GuestMap {
    /// True when the guest has the byte at `addr`.
    pub(crate) fn contains(&self, addr: u64) -> bool {
        self.table().find_region(GuestAddress(addr)).is_some()
    }

    /// Copies from the guest.
    pub(crate) fn read_at(&self, addr: u64, into: &mut [u8]) -> Result<(), OutsideMemory> {
        let addr = GuestAddress(addr);
        self.read_slice(into, addr).map_err(|_| OutsideMemory)
    }

    /// Copies to the guest.
    pub(crate) fn write_at(&self, addr: u64, from: &[u8]) -> Result<(), OutsideMemory> {
        #[cfg(test)]
        crate::fuse::burn();
        let addr = GuestAddress(addr);
        self.write_slice(from, addr).map_err(|_| OutsideMemory)
    }

    /// Reads an aligned 16-bit field of a ring, in one access.
    pub(crate) fn load_at(&self, addr: u64, order: Ordering) -> Result<u16, OutsideMemory> {
        let value = self.load(GuestAddress(addr), order);
        value.map(u16::from_le).map_err(|_| OutsideMemory)
    }

    /// Writes an aligned 16-bit field of a ring, in one access.
    pub(crate) fn store_at(
        &self,
        addr: u64,
        value: u16,
        order: Ordering,
    ) -> Result<(), OutsideMemory> {
        #[cfg(test)]
        crate::fuse::burn();
        self.store(value.to_le(), GuestAddress(addr), order)
            .map_err(|_| OutsideMemory)
    }
}
