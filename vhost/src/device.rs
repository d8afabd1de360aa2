//! What the device is and offers: features, limits and configuration space.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::backend_channel::BackendChannel;
use crate::blk::config::Config;
use crate::blk::request::MAX_RANGES;
use crate::chain::BrokenRing;

/// Most queues that a device can offer.
pub const MAX_QUEUES: u16 = 256;

/// Memory regions that a front-end may add; it may never shrink, or front-ends refuse to come back.
pub(crate) const MAX_MEMORY_SLOTS: u64 = 509;

/// What the device tells the guest.
#[derive(Debug, Clone)]
pub struct DeviceOptions {
    /// Capacity in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// log2 of the number of logical blocks in a physical one.
    pub physical_block_exp: u8,
    /// Suggested minimum size of a request, in logical blocks.
    pub min_io_blocks: u16,
    /// Optimal size of a request in logical blocks, 0 when there is none.
    pub opt_io_blocks: u32,
    /// Writes, discards and write-zeroes are answered with an I/O error.
    pub read_only: bool,
    /// Queues on offer, 1 to [`MAX_QUEUES`]; values outside are brought inside.
    pub num_queues: u16,
    /// Most data segments in one request.
    pub seg_max: u32,
    /// Most sectors in one discard segment.
    pub max_discard_sectors: u32,
    /// Most segments in one discard, 1 to 16; values outside are brought inside.
    pub max_discard_seg: u32,
    /// Alignment that discards should have, in sectors.
    pub discard_sector_alignment: u32,
    /// Most sectors in one write-zeroes segment.
    pub max_write_zeroes_sectors: u32,
    /// Most segments in one write-zeroes, 1 to 16; values outside are brought inside.
    pub max_write_zeroes_seg: u32,
    /// A write-zeroes with the unmap flag may deallocate.
    pub write_zeroes_may_unmap: bool,
    /// Answer to VIRTIO_BLK_T_GET_ID, padded with zero bytes.
    pub serial: [u8; 20],
    /// Tells the storage from all other, whatever leads to it, so that a guest is not moved to other data.
    pub identity: Option<[u8; 16]>,
}

/// A device, shared by the sessions that serve it and by its queues.
#[derive(Debug)]
pub struct Device {
    options: DeviceOptions,
    capacity: AtomicU64,
    /// Of the front-end that is connected, if it gave one.
    backend_channel: Mutex<Option<BackendChannel>>,
    /// Rings that the guest has broken, until they are stopped.
    broken: Mutex<BTreeMap<usize, BrokenRing>>,
}

impl Device {
    /// Makes a device; limits outside their range are brought inside.
    pub fn new(mut options: DeviceOptions) -> Arc<Self> {
        let segments = 1..=u32::try_from(MAX_RANGES).unwrap_or(u32::MAX);
        options.num_queues = options.num_queues.clamp(1, MAX_QUEUES);
        options.max_discard_seg = options
            .max_discard_seg
            .clamp(*segments.start(), *segments.end());
        options.max_write_zeroes_seg = options
            .max_write_zeroes_seg
            .clamp(*segments.start(), *segments.end());
        Arc::new(Self {
            capacity: AtomicU64::new(options.capacity_sectors),
            backend_channel: Mutex::default(),
            broken: Mutex::default(),
            options,
        })
    }

    /// The feature bit of a disk that cannot be written to.
    pub const READ_ONLY: u64 = bit(VIRTIO_BLK_F_RO);

    /// Protocol feature bits on offer.
    pub fn protocol_features(&self) -> u64 {
        protocol_features().bits()
    }

    /// Changes the capacity, in sectors of 512 bytes, that the next read of the configuration shows, and
    /// tells the front-end. Never waits. False when there is no front-end, or it gave no channel to be told
    /// on (VHOST_USER_PROTOCOL_F_BACKEND_REQ): then it learns of the change when it reads the configuration.
    pub fn set_capacity(&self, sectors: u64) -> bool {
        self.capacity.store(sectors, Ordering::Relaxed);
        let mut channel = self.backend_channel();
        let told = channel.as_ref().is_some_and(BackendChannel::config_changed);
        if !told {
            *channel = None;
        }
        told
    }

    /// Whether a front-end is connected that can be told of changes: it gave a channel for that.
    pub fn can_tell_changes(&self) -> bool {
        self.backend_channel().is_some()
    }

    /// Rings that the guest has broken and that the front-end has not stopped since, and why nothing more is taken from
    /// them.
    pub fn broken_rings(&self) -> Vec<(usize, BrokenRing)> {
        let broken = self.broken.lock();
        let broken = broken.unwrap_or_else(PoisonError::into_inner);
        broken
            .iter()
            .map(|(ring, reason)| (*ring, *reason))
            .collect()
    }

    /// Notes why ring `ring` is broken, or that it is over.
    pub(crate) fn set_broken(&self, ring: usize, reason: Option<BrokenRing>) {
        let mut broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        match reason {
            Some(reason) => broken.insert(ring, reason),
            None => broken.remove(&ring),
        };
    }

    /// What the front-end is told of changes on.
    pub(crate) fn set_backend_channel(&self, channel: Option<BackendChannel>) {
        *self.backend_channel() = channel;
    }

    /// Another descriptor of what the front-end is told of changes on, if there is that.
    pub(crate) fn backend_channel_file(&self) -> Option<io::Result<File>> {
        self.backend_channel().as_ref().map(BackendChannel::file)
    }

    fn backend_channel(&self) -> MutexGuard<'_, Option<BackendChannel>> {
        let channel = self.backend_channel.lock();
        channel.unwrap_or_else(PoisonError::into_inner)
    }

    /// Capacity in sectors of 512 bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    /// What the device was made with, its limits brought inside their ranges.
    pub fn options(&self) -> &DeviceOptions {
        &self.options
    }

    /// Virtio feature bits on offer: always the same for the same options, since a front-end that
    /// comes back to fewer features drops the device.
    pub fn features(&self) -> u64 {
        let mut features = bit(VIRTIO_F_VERSION_1)
            | bit(VIRTIO_RING_F_EVENT_IDX)
            | bit(VIRTIO_RING_F_INDIRECT_DESC)
            | bit(VIRTIO_BLK_F_MQ)
            | bit(VIRTIO_BLK_F_SEG_MAX)
            | bit(VIRTIO_BLK_F_BLK_SIZE)
            | bit(VIRTIO_BLK_F_TOPOLOGY)
            | bit(VIRTIO_BLK_F_FLUSH)
            | bit(VIRTIO_BLK_F_CONFIG_WCE)
            | bit(VIRTIO_BLK_F_DISCARD)
            | bit(VIRTIO_BLK_F_WRITE_ZEROES)
            | VhostUserVirtioFeatures::LOG_ALL.bits()
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if self.options.read_only {
            features |= bit(VIRTIO_BLK_F_RO);
        }
        features
    }

    /// Configuration space for a device whose `writeback` byte is as given.
    pub(crate) fn config(&self, writeback: u8) -> Config {
        let options = &self.options;
        Config {
            capacity: self.capacity(),
            seg_max: options.seg_max,
            blk_size: options.block_size,
            physical_block_exp: options.physical_block_exp,
            min_io_size: options.min_io_blocks,
            opt_io_size: options.opt_io_blocks,
            writeback,
            num_queues: options.num_queues,
            max_discard_sectors: options.max_discard_sectors,
            max_discard_seg: options.max_discard_seg,
            discard_sector_alignment: options.discard_sector_alignment,
            max_write_zeroes_sectors: options.max_write_zeroes_sectors,
            max_write_zeroes_seg: options.max_write_zeroes_seg,
            write_zeroes_may_unmap: options.write_zeroes_may_unmap,
        }
    }
}

/// Protocol feature: there is a request that stops a ring and leaves its requests in flight, so that
/// GET_VRING_BASE waits for them again. The library does not know it.
pub(crate) const GET_VRING_BASE_SKIP_DRAIN: u64 = bit(23);

/// Protocol features on offer: exactly those that are implemented.
pub(crate) fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT
        | VhostUserProtocolFeatures::from_bits_retain(GET_VRING_BASE_SKIP_DRAIN)
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::DEVICE_STATE
}

/// The mask of a feature that the specification gives as a bit number.
pub(crate) const fn bit(number: u32) -> u64 {
    1 << number
}

/// True when `features` has the bit `number`.
pub(crate) const fn has(features: u64, number: u32) -> bool {
    features & bit(number) != 0
}
