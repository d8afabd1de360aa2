//! A disk behind a vhost-user socket: the session of a front-end, and one queue.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bell::Bell;
use crate::link::{Direction, Link, MAX_DEPTH, MAX_LEN, Request};
use crate::memory::Memory;
use crate::split_ring::{Part, RING_BYTES, RING_SIZE, SplitRing};

/// Where the back-end sees the memory: neither zero nor its address here, so that neither works by chance.
const GUEST_BASE: u64 = 0x4000_0000;
/// Header and status of each slot; each on a cache line of its own.
const HEADERS: usize = RING_BYTES;
const STATUSES: usize = HEADERS + MAX_DEPTH * LINE;
const LINE: usize = 64;
const DATA: usize = 128 << 10;
const HEADER_LEN: u32 = 16;

/// A connected disk with a running queue.
pub(crate) struct VhostDisk {
    memory: Memory,
    ring: SplitRing,
    kick: EventFd,
    _call: EventFd,
    bell: Bell,
    sectors: u64,
    // The session is what keeps the back-end at it.
    _session: Frontend,
}

impl VhostDisk {
    /// Connects to a back-end's socket and starts a queue.
    ///
    /// # Errors
    /// There is no back-end, or it lacks what the bench needs.
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let mut session = Frontend::connect(path, 1).context("cannot connect")?;
        session.set_owner()?;
        let wanted = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | bit(VIRTIO_F_VERSION_1)
            | bit(VIRTIO_RING_F_EVENT_IDX)
            | bit(VIRTIO_RING_F_INDIRECT_DESC)
            // Without it a disk may have to make each write durable at once.
            | bit(VIRTIO_BLK_F_FLUSH);
        let offered = session.get_features()?;
        if offered & bit(VIRTIO_BLK_F_RO) != 0 {
            bail!("the disk is read-only");
        }
        let features = offered & wanted;
        let needed = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | bit(VIRTIO_F_VERSION_1);
        if features & needed != needed {
            bail!("it offers {offered:#x}; the bench needs protocol features and VERSION_1");
        }
        let slots = negotiate_protocol(&mut session)?;
        let sectors = read_capacity(&mut session)?;
        session.set_features(features)?;

        let memory = Memory::new(DATA + MAX_DEPTH * MAX_LEN)?;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_BASE,
            memory_size: memory.len() as u64,
            userspace_addr: memory.address(),
            mmap_offset: 0,
            mmap_handle: File::as_raw_fd(memory.file()),
        };
        if slots {
            session.add_mem_region(&region)?;
        } else {
            session.set_mem_table(&[region])?;
        }
        let ring = SplitRing::new(
            &memory,
            GUEST_BASE,
            features & bit(VIRTIO_RING_F_INDIRECT_DESC) != 0,
            features & bit(VIRTIO_RING_F_EVENT_IDX) != 0,
        );
        let (kick, call) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        let bell = Bell::new()?;
        bell.add(&call, false, 0)?;
        start_ring(&mut session, &memory, &kick, &call)?;
        Ok(Self {
            memory,
            ring,
            kick,
            _call: call,
            bell,
            sectors,
            _session: session,
        })
    }
}

/// True when memory is to be announced region by region.
fn negotiate_protocol(session: &mut Frontend) -> Result<bool> {
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    let features = session.get_protocol_features()? & wanted;
    if !features.contains(VhostUserProtocolFeatures::CONFIG) {
        bail!("it does not tell its configuration space, and so not its size");
    }
    session.set_protocol_features(features)?;
    if features.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        session.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    Ok(features.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS))
}

/// `capacity`, the first field of the configuration space.
fn read_capacity(session: &mut Frontend) -> Result<u64> {
    let (_, bytes) = session.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8])?;
    let bytes = bytes
        .as_slice()
        .try_into()
        .context("a short configuration space")?;
    Ok(u64::from_le_bytes(bytes))
}

fn start_ring(
    session: &mut Frontend,
    memory: &Memory,
    kick: &EventFd,
    call: &EventFd,
) -> Result<()> {
    let [desc, avail, used] = SplitRing::offsets().map(|at| memory.address() + at as u64);
    session.set_vring_num(0, RING_SIZE)?;
    session.set_vring_base(0, 0)?;
    let addresses = VringConfigData {
        queue_max_size: RING_SIZE,
        queue_size: RING_SIZE,
        flags: 0,
        desc_table_addr: desc,
        avail_ring_addr: avail,
        used_ring_addr: used,
        log_addr: None,
    };
    session.set_vring_addr(0, &addresses)?;
    session.set_vring_call(0, call)?;
    session.set_vring_kick(0, kick)?;
    session.set_vring_enable(0, true)?;
    Ok(())
}

impl Link for VhostDisk {
    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn submit(&mut self, slot: usize, request: Request) {
        let reads = request.direction == Direction::Read;
        let kind = if reads {
            VIRTIO_BLK_T_IN
        } else {
            VIRTIO_BLK_T_OUT
        };
        let header = HEADERS + slot * LINE;
        let status = STATUSES + slot * LINE;
        self.memory.store(header, kind, Ordering::Relaxed);
        self.memory.store(header + 4, 0_u32, Ordering::Relaxed);
        self.memory
            .store(header + 8, request.sector, Ordering::Relaxed);
        self.memory.store(status, u8::MAX, Ordering::Relaxed);
        let part = |at, len, device_writes| Part {
            at,
            len,
            device_writes,
        };
        let parts = [
            part(header, HEADER_LEN, false),
            part(DATA + slot * MAX_LEN, request.len as u32, reads),
            part(status, 1, true),
        ];
        self.ring.put(&self.memory, slot, parts);
    }

    fn publish(&mut self) -> io::Result<()> {
        if self.ring.publish(&self.memory) {
            self.kick.write(1)?;
        }
        Ok(())
    }

    fn finished(&mut self) -> io::Result<Option<usize>> {
        let slot = self.ring.take(&self.memory)?;
        if let Some(slot) = slot {
            let at = STATUSES + slot * LINE;
            let status: u8 = self.memory.load(at, Ordering::Relaxed);
            if u32::from(status) != VIRTIO_BLK_S_OK {
                let what = format!("a request failed with virtio status {status}");
                return Err(io::Error::other(what));
            }
        }
        Ok(slot)
    }

    fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        if self.ring.arm(&self.memory) {
            self.bell.wait(Some(timeout), |_| ())?;
            self.ring.disarm(&self.memory);
        }
        Ok(())
    }

    fn fill(&mut self, slot: usize, bytes: &[u8]) {
        self.memory.write(DATA + slot * MAX_LEN, bytes);
    }

    fn read(&self, slot: usize, bytes: &mut [u8]) {
        self.memory.read(DATA + slot * MAX_LEN, bytes);
    }
}

fn bit(number: u32) -> u64 {
    1 << number
}
