//! The memory of a guest: shared files in two regions with a hole between them.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

/// Where the second region begins in the guest.
pub(crate) const HIGH: u64 = 4 << 30;
/// Bytes of the first and of the second region.
pub(crate) const LOW_SIZE: u64 = 64 << 20;
pub(crate) const HIGH_SIZE: u64 = 8 << 20;

/// What the front-end's addresses are ahead of the guest's.
const USER: u64 = 0x7000_0000_0000;

pub(crate) struct Memory(GuestMemoryMmap);

impl Memory {
    pub(crate) fn new() -> Arc<Self> {
        let region = |start, size| {
            let file = FileOffset::new(memfd(size), 0);
            (
                GuestAddress(start),
                usize::try_from(size).expect("64 bits"),
                Some(file),
            )
        };
        let regions = [region(0, LOW_SIZE), region(HIGH, HIGH_SIZE)];
        Arc::new(Self(
            GuestMemoryMmap::from_ranges_with_files(regions).expect("memory"),
        ))
    }

    /// As the front-end tells the back-end.
    pub(crate) fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let describe = |region: &vm_memory::GuestRegionMmap| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: user_addr(region.start_addr().0),
            mmap_offset: 0,
            mmap_handle: region.file_offset().expect("a file").file().as_raw_fd(),
        };
        self.0.iter().map(describe).collect()
    }

    #[track_caller]
    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        self.0
            .write_slice(bytes, GuestAddress(addr))
            .expect("in memory");
    }

    #[track_caller]
    pub(crate) fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0
            .read_slice(&mut bytes, GuestAddress(addr))
            .expect("in memory");
        bytes
    }

    pub(crate) fn byte(&self, addr: u64) -> u8 {
        self.read(addr, 1)[0]
    }

    /// Everything, to see later whether anything was written.
    pub(crate) fn snapshot(&self) -> Vec<u8> {
        let mut all = self.read(0, usize::try_from(LOW_SIZE).expect("64 bits"));
        all.extend(self.read(HIGH, usize::try_from(HIGH_SIZE).expect("64 bits")));
        all
    }

    /// Reads an index that the device publishes.
    pub(crate) fn load(&self, addr: u64) -> u16 {
        u16::from_le(
            self.0
                .load(GuestAddress(addr), Ordering::Acquire)
                .expect("in memory"),
        )
    }

    /// Publishes an index to the device.
    pub(crate) fn store(&self, addr: u64, value: u16) {
        self.0
            .store(value.to_le(), GuestAddress(addr), Ordering::Release)
            .expect("in memory");
    }
}

/// The address that the front-end has for a guest's address.
pub(crate) fn user_addr(guest_addr: u64) -> u64 {
    USER + guest_addr
}

/// A file of zeroes without a name.
pub(crate) fn memfd(size: u64) -> File {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(size).expect("a size");
    file
}
