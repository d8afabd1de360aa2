//! A guest for tests: memory in several regions, and a driver that posts whatever it is told to.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress};

use crate::chain::BrokenRing;
use crate::device::{Device, DeviceOptions, bit};
use crate::inflight::Part;
use crate::memory::{GuestMap, RegionSpec};
use crate::queue::{Queue, QueueSetup, Request};
use crate::vring::{RingAddresses, Signal};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Entries of the rings of this guest.
pub(crate) const SIZE: u16 = 16;

pub(crate) const ADDRESSES: RingAddresses = RingAddresses {
    descriptors: 0x0,
    available: 0x1000,
    used: 0x2000,
};

/// Bytes in each region.
pub(crate) const REGION: u64 = 0x1_0000;

/// Two regions side by side and one behind a hole.
pub(crate) const REGIONS: [u64; 3] = [0, REGION, 0x10_0000];

/// What the front-end's addresses are ahead of the guest's.
pub(crate) const USER: u64 = 0x7000_0000_0000;

/// A descriptor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Desc {
    pub(crate) fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A device-readable buffer.
pub(crate) fn out(addr: u64, len: u32) -> (u64, u32, u16) {
    (addr, len, 0)
}

/// A device-writable buffer.
pub(crate) fn into(addr: u64, len: u32) -> (u64, u32, u16) {
    (addr, len, WRITE)
}

/// A request header.
pub(crate) fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0xee; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

pub(crate) fn memfd(len: u64) -> File {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC).expect("memfd");
    ftruncate(&fd, len).expect("size");
    File::from(fd)
}

/// An event descriptor, and a second handle on it to read.
pub(crate) fn event() -> (File, OwnedFd) {
    let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("eventfd");
    (File::from(fd.try_clone().expect("clone")), fd)
}

/// Times that the event was raised since the last look.
pub(crate) fn raised(fd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(_) => 0,
    }
}

pub(crate) fn options() -> DeviceOptions {
    DeviceOptions {
        capacity_sectors: 2048,
        block_size: 512,
        physical_block_exp: 3,
        min_io_blocks: 8,
        opt_io_blocks: 64,
        read_only: false,
        num_queues: 4,
        seg_max: 30,
        max_discard_sectors: 1000,
        max_discard_seg: 4,
        discard_sector_alignment: 8,
        max_write_zeroes_sectors: 2000,
        max_write_zeroes_seg: 2,
        write_zeroes_may_unmap: true,
        serial: *b"SERIAL-OF-THE-DISK-1",
        identity: None,
    }
}

/// All features on offer, save those in `without`.
pub(crate) fn features(device: &Device, without: &[u32]) -> u64 {
    without
        .iter()
        .fold(device.features(), |all, feature| all & !bit(*feature))
}

pub(crate) struct Guest {
    pub(crate) files: Vec<File>,
    pub(crate) map: Arc<GuestMap>,
    pub(crate) avail_idx: u16,
    pub(crate) used_seen: u16,
    next_desc: u16,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let files: Vec<_> = REGIONS.iter().map(|_| memfd(REGION)).collect();
        let map = Arc::new(map_of(&files));
        Self {
            files,
            map,
            avail_idx: 0,
            used_seen: 0,
            next_desc: 0,
        }
    }

    pub(crate) fn setup(device: &Arc<Device>, map: &Arc<GuestMap>) -> QueueSetup {
        QueueSetup {
            index: 0,
            device: Arc::clone(device),
            map: Arc::clone(map),
            features: bit(VIRTIO_F_VERSION_1) | device.features(),
            size: SIZE,
            addresses: ADDRESSES,
            base: 0,
            kick: None,
            call: None,
            err: None,
            write_through: false,
            part: Part::private(SIZE).expect("memory"),
            log: None,
            complaints: Arc::default(),
        }
    }

    pub(crate) fn queue(&self) -> Queue {
        Queue::new(Self::setup(&Device::new(options()), &self.map)).expect("valid ring")
    }

    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        let memory = &*self.map;
        memory
            .write_slice(bytes, GuestAddress(addr))
            .expect("in memory");
    }

    pub(crate) fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let memory = &*self.map;
        memory
            .read_slice(&mut bytes, GuestAddress(addr))
            .expect("in memory");
        bytes
    }

    pub(crate) fn word(&self, addr: u64) -> u16 {
        let bytes = self.read(addr, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// Writes one descriptor of the ring's table.
    pub(crate) fn desc(&self, index: u16, desc: Desc) {
        let addr = ADDRESSES.descriptors + 16 * u64::from(index);
        self.write(addr, &desc.bytes());
    }

    /// Writes a chain of descriptors into `table`, at `first` and behind, and wraps at `size`.
    fn link(&self, table: u64, first: u16, size: u16, buffers: &[(u64, u32, u16)]) {
        for (at, (addr, len, flags)) in (0_u16..).zip(buffers) {
            let last = usize::from(at) + 1 == buffers.len();
            let desc = Desc {
                addr: *addr,
                len: *len,
                flags: flags | if last { 0 } else { NEXT },
                next: if last { 0 } else { (first + at + 1) % size },
            };
            let index = (first + at) % size;
            self.write(table + 16 * u64::from(index), &desc.bytes());
        }
    }

    /// Writes a chain into a table of its own.
    pub(crate) fn table(&self, table: u64, buffers: &[(u64, u32, u16)]) {
        self.link(table, 0, SIZE, buffers);
    }

    /// Posts a chain of direct descriptors and returns its head.
    pub(crate) fn post(&mut self, buffers: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_desc;
        self.link(ADDRESSES.descriptors, head, SIZE, buffers);
        self.next_desc = (head + u16::try_from(buffers.len()).expect("short")) % SIZE;
        self.offer(head);
        head
    }

    /// Posts a chain through an indirect table at `table` and returns its head.
    pub(crate) fn post_indirect(&mut self, table: u64, buffers: &[(u64, u32, u16)]) -> u16 {
        let count = u16::try_from(buffers.len()).expect("short");
        self.link(table, 0, count, buffers);
        self.post(&[(table, 16 * u32::from(count), INDIRECT)])
    }

    /// Makes the chain at `head` available.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % SIZE);
        self.write(ADDRESSES.available + 4 + 2 * slot, &head.to_le_bytes());
        self.set_avail(self.avail_idx.wrapping_add(1));
    }

    /// Sets the available index.
    pub(crate) fn set_avail(&mut self, index: u16) {
        self.avail_idx = index;
        self.write(ADDRESSES.available + 2, &index.to_le_bytes());
    }

    /// Asks for a call when the used index passes `index`.
    pub(crate) fn set_used_event(&self, index: u16) {
        let addr = ADDRESSES.available + 4 + 2 * u64::from(SIZE);
        self.write(addr, &index.to_le_bytes());
    }

    /// When the device asks for a kick.
    pub(crate) fn avail_event(&self) -> u16 {
        self.word(ADDRESSES.used + 4 + 8 * u64::from(SIZE))
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.word(ADDRESSES.used + 2)
    }

    /// Used elements that became visible since the last look.
    pub(crate) fn used(&mut self) -> Vec<(u32, u32)> {
        let mut elements = Vec::new();
        while self.used_seen != self.used_idx() {
            let slot = u64::from(self.used_seen % SIZE);
            let bytes = self.read(ADDRESSES.used + 4 + 8 * slot, 8);
            let word = |at: usize| {
                let bytes: [u8; 4] = bytes[at..at + 4].try_into().expect("4 bytes");
                u32::from_le_bytes(bytes)
            };
            elements.push((word(0), word(4)));
            self.used_seen = self.used_seen.wrapping_add(1);
        }
        elements
    }
}

pub(crate) fn map_of(files: &[File]) -> GuestMap {
    let specs = REGIONS
        .iter()
        .zip(files)
        .map(|(addr, file)| (spec(*addr), file.try_clone().expect("clone")));
    GuestMap::default().replaced(specs.collect()).expect("map")
}

pub(crate) fn spec(guest_addr: u64) -> RegionSpec {
    RegionSpec {
        guest_addr,
        user_addr: USER + guest_addr,
        size: REGION,
        file_offset: 0,
    }
}

/// Takes one request that there must be.
pub(crate) fn take(queue: &mut Queue) -> Request {
    queue
        .take(&mut Vec::new)
        .expect("ring is whole")
        .expect("a request")
}

/// Takes where there must be no request left.
pub(crate) fn take_nothing(queue: &mut Queue) {
    let taken = queue.take(&mut Vec::new).expect("ring is whole");
    assert!(taken.is_none(), "unexpected request: {taken:?}");
}

/// Takes from a ring that must turn out to be broken.
pub(crate) fn take_broken(queue: &mut Queue) -> BrokenRing {
    queue.take(&mut Vec::new).expect_err("ring is broken")
}

pub(crate) fn signal() -> (Signal, OwnedFd) {
    let (file, fd) = event();
    (Signal::new(file), fd)
}

pub(crate) const EVENT_IDX: u32 = VIRTIO_RING_F_EVENT_IDX;
