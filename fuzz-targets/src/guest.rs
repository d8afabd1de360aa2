//! A guest with a ring: shared memory in three regions, and the device's end of the ring, to be driven by hand.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_user_blk::{Device, DeviceOptions, Queue, QueueUpdate, Rings, serve};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of each region.
pub(crate) const REGION: u64 = 0x1_0000;
/// Where the regions begin: two side by side, and one behind a hole.
pub(crate) const REGIONS: [u64; 3] = [0, REGION, 0x10_0000];

/// The parts of the ring.
pub(crate) const DESCRIPTORS: u64 = 0;
pub(crate) const AVAILABLE: u64 = 0x1000;
pub(crate) const USED: u64 = 0x2000;

/// What the front-end's addresses are ahead of the guest's.
pub(crate) const USER: u64 = 0x7000_0000_0000;

/// Nothing takes as long on a machine that works.
const PATIENCE: Duration = Duration::from_secs(20);

/// A device of which every limit is small.
pub(crate) fn options(read_only: bool) -> DeviceOptions {
    DeviceOptions {
        capacity_sectors: 2048,
        block_size: 512,
        physical_block_exp: 3,
        min_io_blocks: 8,
        opt_io_blocks: 0,
        read_only,
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

/// Guest memory, mapped as a VMM has it.
pub(crate) struct Memory {
    files: Vec<File>,
    map: GuestMemoryMmap,
}

impl Memory {
    pub(crate) fn new() -> Self {
        let file = |_| {
            let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd"));
            file.set_len(REGION).expect("a size");
            file
        };
        let files: Vec<_> = REGIONS.iter().map(file).collect();
        let ranges = REGIONS.iter().zip(&files).map(|(start, file)| {
            let file = FileOffset::new(file.try_clone().expect("a descriptor"), 0);
            (GuestAddress(*start), REGION as usize, Some(file))
        });
        let ranges: Vec<_> = ranges.collect();
        let map = GuestMemoryMmap::from_ranges_with_files(ranges).expect("memory");
        Self { files, map }
    }

    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        let to = GuestAddress(addr);
        self.map.write_slice(bytes, to).expect("in memory");
    }

    pub(crate) fn read(&self, addr: u64, into: &mut [u8]) {
        let from = GuestAddress(addr);
        self.map.read_slice(into, from).expect("in memory");
    }

    /// A file for each region.
    pub(crate) fn files(&self) -> Vec<File> {
        let files = self.files.iter().map(File::try_clone);
        files.collect::<Result<_, _>>().expect("descriptors")
    }

    /// As the front-end tells the back-end.
    pub(crate) fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let regions = REGIONS.iter().zip(&self.files);
        let regions = regions.map(|(start, file)| VhostUserMemoryRegionInfo {
            guest_phys_addr: *start,
            memory_size: REGION,
            userspace_addr: USER + start,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        });
        regions.collect()
    }
}

/// Hands rings to whoever drives them by hand, and does not get them back.
struct HandOver(Mutex<Sender<Queue>>);

impl Rings for HandOver {
    fn start(&self, _index: usize, queue: Queue) {
        let _ = self.0.lock().expect("unpoisoned").send(queue);
    }

    fn update(&self, _index: usize, _update: QueueUpdate) {}

    fn stop(&self, _index: usize) -> Option<Queue> {
        None
    }

    fn pause(&self, _rings: &[usize]) -> Result<Vec<Queue>, String> {
        Err("they are driven by hand".to_owned())
    }
}

/// A front-end whose one ring runs.
pub(crate) struct Guest {
    pub(crate) memory: Memory,
    front: Frontend,
    session: JoinHandle<()>,
    queues: Receiver<Queue>,
}

impl Guest {
    /// Connects to a device.
    pub(crate) fn connect(device: DeviceOptions) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let (sender, queues) = channel();
        let rings = Arc::new(HandOver(Mutex::new(sender)));
        let device = Device::new(device);
        let session = std::thread::spawn(move || serve(theirs, device, rings).expect("a session"));
        Self {
            memory: Memory::new(),
            front: Frontend::from_stream(ours, 4),
            session,
            queues,
        }
    }

    /// Starts a ring of `size` entries at `base`, without some features, and gives the device's end.
    pub(crate) fn start(&mut self, size: u16, base: u16, without: u64) -> (Queue, u64) {
        let front = &mut self.front;
        front.set_owner().expect("SET_OWNER");
        let features = front.get_features().expect("GET_FEATURES") & !without;
        let protocol = front.get_protocol_features().expect("protocol features");
        front.set_protocol_features(protocol).expect("of them all");
        front.set_features(features).expect("SET_FEATURES");
        let regions = self.memory.regions();
        front.set_mem_table(&regions).expect("SET_MEM_TABLE");
        front.set_vring_num(0, size).expect("SET_VRING_NUM");
        front.set_vring_base(0, base).expect("SET_VRING_BASE");
        let config = VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: USER + DESCRIPTORS,
            used_ring_addr: USER + USED,
            avail_ring_addr: USER + AVAILABLE,
            log_addr: None,
        };
        front.set_vring_addr(0, &config).expect("SET_VRING_ADDR");
        let kick = EventFd::new(0).expect("an eventfd");
        front.set_vring_kick(0, &kick).expect("SET_VRING_KICK");
        front.set_vring_enable(0, true).expect("SET_VRING_ENABLE");
        let queue = self.queues.recv_timeout(PATIENCE).expect("a ring");
        (queue, features)
    }

    /// Hangs up; the session must end.
    pub(crate) fn leave(self) {
        drop(self.front);
        self.session.join().expect("no panic");
    }
}
