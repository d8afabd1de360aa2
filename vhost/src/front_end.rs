//! What a front-end has set up, and the handler of each of its requests.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserInflight, VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures,
    VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Backend, Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandlerMut,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use crate::backend_channel::BackendChannel;
use crate::blk::config;
use crate::complaints::Complaints;
use crate::device::{Device, MAX_MEMORY_SLOTS, has, protocol_features};
use crate::front_end::inflight::InflightRegion;
use crate::memory::{GuestMap, RegionSpec};
use crate::queue::{Queue, QueueSetup, QueueUpdate};
use crate::session::Rings;
use crate::vring::{Kick, MAX_RING_SIZE, RingAddresses, Signal, Vring};

mod cache_mode;
mod device_state;
mod handover;
mod inflight;
mod log;

/// The state of a session, changed by one request after another.
pub(crate) struct FrontEnd {
    device: Arc<Device>,
    rings: Arc<dyn Rings>,
    complaints: Arc<Complaints>,
    /// Features that the front-end accepted; `None` until it has.
    features: Option<u64>,
    /// Protocol features as the message library understands them, accepted or not.
    protocol_features: u64,
    /// The front-end has asked for the features, and so knows of protocol features.
    offered: bool,
    memory: Arc<GuestMap>,
    vrings: Vec<Vring>,
    inflight: InflightRegion,
    /// What the driver last wrote to the configuration, 1 until it does.
    writeback: u8,
    /// What is marked where while a guest is migrated.
    logging: log::Logging,
    /// The state of the device on its way to the front-end or back.
    transfer: Option<device_state::Transfer>,
    /// The handler of the message at hand was reached, so the library answers for it.
    answered: bool,
    /// A descriptor that came with the message at hand.
    backend_channel: Option<OwnedFd>,
}

/// A reason to refuse a message, in the only error of the library's that carries one.
fn refuse(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> VhostError {
    VhostError::ReqHandlerError(io::Error::other(reason))
}

impl FrontEnd {
    pub(crate) fn new(
        device: Arc<Device>,
        rings: Arc<dyn Rings>,
        complaints: Arc<Complaints>,
    ) -> Self {
        let count = usize::from(device.options().num_queues);
        Self {
            device,
            rings,
            complaints,
            features: None,
            protocol_features: 0,
            offered: false,
            memory: Arc::default(),
            vrings: std::iter::repeat_with(Vring::default).take(count).collect(),
            inflight: InflightRegion::default(),
            writeback: 1,
            logging: log::Logging::default(),
            transfer: None,
            answered: false,
            backend_channel: None,
        }
    }

    /// Prepares for the next message; `backend_channel` is another descriptor of what it brings.
    pub(crate) fn begin(&mut self, backend_channel: Option<OwnedFd>) {
        self.answered = false;
        self.backend_channel = backend_channel;
    }

    /// True when the library has already answered the message that it just refused. It does so for
    /// whatever its handler refused, and for four requests that it checks itself.
    pub(crate) fn has_answered(&self, request: u32) -> bool {
        let checked = [
            FrontendReq::SET_MEM_TABLE,
            FrontendReq::SET_CONFIG,
            FrontendReq::SET_BACKEND_REQ_FD,
            FrontendReq::GPU_SET_SOCKET,
        ];
        let has = |feature: VhostUserProtocolFeatures| self.protocol_features & feature.bits() != 0;
        let negotiated = |request| match request {
            FrontendReq::SET_CONFIG => has(VhostUserProtocolFeatures::CONFIG),
            FrontendReq::SET_BACKEND_REQ_FD => has(VhostUserProtocolFeatures::BACKEND_REQ),
            _ => true,
        };
        let checked = FrontendReq::try_from(request)
            .is_ok_and(|request| checked.contains(&request) && negotiated(request));
        self.answered || checked
    }

    /// True when the front-end expects acknowledgements of the messages that ask for one.
    pub(crate) fn acknowledges(&self) -> bool {
        self.offered && self.protocol_features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    fn has_feature(&self, number: u32) -> bool {
        self.features.is_some_and(|features| has(features, number))
    }

    /// The cache mode as the driver sees it: 0 when it cannot flush and did not know, or said, that
    /// the cache is a write-through one.
    fn shown_writeback(&self) -> u8 {
        let no_flush =
            self.has_feature(VIRTIO_BLK_F_CONFIG_WCE) && !self.has_feature(VIRTIO_BLK_F_FLUSH);
        if no_flush { 0 } else { self.writeback }
    }

    /// True when a write that was answered must survive a loss of power.
    fn write_through(&self) -> bool {
        let chosen = self.has_feature(VIRTIO_BLK_F_CONFIG_WCE) && self.writeback == 0;
        !self.has_feature(VIRTIO_BLK_F_FLUSH) || chosen
    }

    fn vring(&mut self, index: u32) -> VhostResult<(usize, &mut Vring)> {
        let count = self.vrings.len();
        let at = usize::try_from(index).unwrap_or(usize::MAX);
        let vring = self.vrings.get_mut(at);
        let vring = vring.ok_or_else(|| refuse(format!("ring {index} of {count}")))?;
        Ok((at, vring))
    }

    /// As [`Self::vring`], for requests that only make sense while the ring does not run.
    fn idle_vring(&mut self, index: u32) -> VhostResult<&mut Vring> {
        let (_, vring) = self.vring(index)?;
        if vring.running {
            return Err(refuse(format!("ring {index} is running")));
        }
        Ok(vring)
    }

    /// Starts ring `at` if it has all that it needs and is not running.
    fn start_if_ready(&mut self, at: usize) -> VhostResult<()> {
        if self.must_not_write() {
            return Ok(());
        }
        let (write_through, log) = (self.write_through(), self.ring_log(at));
        let idle = self.vrings.get(at).filter(|vring| !vring.running);
        let ready = idle.and_then(|vring| Some((vring.runs_at()?, vring.size)));
        let (Some(features), Some((addresses, size))) = (self.features, ready) else {
            return Ok(());
        };
        let part = self.part(at, size)?;
        let Some(vring) = self.vrings.get_mut(at) else {
            return Ok(());
        };
        let setup = QueueSetup {
            index: at,
            device: Arc::clone(&self.device),
            map: Arc::clone(&self.memory),
            features,
            size,
            addresses,
            base: vring.base,
            kick: vring.kick.descriptor(),
            call: vring.call.clone(),
            err: vring.err.clone(),
            write_through,
            part,
            log,
            complaints: Arc::clone(&self.complaints),
        };
        let queue = Queue::new(setup).map_err(|reason| refuse(format!("ring {at}: {reason}")))?;
        vring.running = true;
        self.rings.start(at, queue);
        Ok(())
    }

    /// Starts whatever became ready by a change that is not a ring's own.
    fn start_all_ready(&mut self) {
        for at in 0..self.vrings.len() {
            if let Err(error) = self.start_if_ready(at)
                && self.complaints.allow()
            {
                tracing::warn!(%error, "cannot start a ring yet");
            }
        }
    }

    /// Stops ring `at` and remembers where it stopped.
    fn stop(&mut self, at: usize) {
        let Some(vring) = self.vrings.get_mut(at) else {
            return;
        };
        if std::mem::replace(&mut vring.running, false) {
            match self.rings.stop(at) {
                Some(queue) => {
                    vring.base = queue.next_avail();
                    queue.close();
                }
                None => tracing::error!(ring = at, "a running ring did not come back"),
            }
        }
    }

    fn stop_all(&mut self) {
        for at in 0..self.vrings.len() {
            self.stop(at);
        }
    }

    fn update(&self, at: usize, update: QueueUpdate) {
        if self.vrings.get(at).is_some_and(|vring| vring.running) {
            self.rings.update(at, update);
        }
    }

    fn update_all(&self, update: &QueueUpdate) {
        for at in 0..self.vrings.len() {
            self.update(at, update.clone());
        }
    }

    fn set_memory(&mut self, map: GuestMap) {
        self.memory = Arc::new(map);
        self.update_all(&QueueUpdate::Memory(Arc::clone(&self.memory)));
        self.start_all_ready();
    }

    /// Forgets all rings and what the driver set. Memory and what the two ends negotiated about
    /// their messages stay.
    fn reset(&mut self) {
        self.stop_all();
        self.vrings.fill_with(Vring::default);
        self.reset_region();
        self.features = None;
        self.set_cache_mode(1);
    }
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        self.device.set_backend_channel(None);
        // A front-end that keeps the region comes back with it, and no answer would be as good as the
        // one that its requests get then.
        self.suspend_all();
        self.drop_region();
    }
}

fn region_spec(region: &VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest_addr: region.guest_phys_addr,
        user_addr: region.user_addr,
        size: region.memory_size,
        file_offset: region.mmap_offset,
    }
}

/// A request that is not on offer.
fn not_offered<T>() -> VhostResult<T> {
    Err(VhostError::InvalidOperation("not offered"))
}

impl VhostUserBackendReqHandlerMut for FrontEnd {
    fn set_owner(&mut self) -> VhostResult<()> {
        self.answered = true;
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        self.answered = true;
        self.reset();
        Ok(())
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.answered = true;
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        self.offered = true;
        Ok(self.device.features())
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        self.answered = true;
        let unknown = features & !self.device.features();
        if unknown != 0 {
            return Err(refuse(format!("features {unknown:#x} are not on offer")));
        }
        if !has(features, VIRTIO_F_VERSION_1) {
            return Err(refuse(
                "the driver did not accept VIRTIO_F_VERSION_1: legacy drivers are not supported",
            ));
        }
        if log::differ(self.features, features) {
            self.stop_all();
        }
        let before = self.features.replace(features);
        if before != Some(features) {
            self.update_logs();
        }
        if self.must_not_write() {
            self.hold_rings();
        }
        // Without protocol features there is no message to enable a ring with.
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            for vring in &mut self.vrings {
                vring.enabled = true;
            }
        }
        self.start_all_ready();
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<Vec<u64>>> {
        self.answered = true;
        let regions = regions.iter().map(region_spec).zip(files).collect();
        self.set_memory(self.memory.replaced(regions).map_err(refuse)?);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        self.answered = true;
        let vring = self.idle_vring(index)?;
        if num > MAX_RING_SIZE || !num.is_power_of_two() {
            return Err(refuse(format!("a ring cannot have {num} entries")));
        }
        vring.size = u16::try_from(num).map_err(refuse)?;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> VhostResult<()> {
        self.answered = true;
        let memory = Arc::clone(&self.memory);
        let guest_addr = |user_addr| {
            let outside = || refuse(format!("no memory at user address {user_addr:#x}"));
            memory.guest_addr(user_addr).ok_or_else(outside)
        };
        let addresses = RingAddresses {
            descriptors: guest_addr(descriptor)?,
            available: guest_addr(available)?,
            used: guest_addr(used)?,
        };
        let log_addr =
            Some(log).filter(|_| flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG));
        let (at, vring) = self.vring(index)?;
        let moved = vring.addresses != Some(addresses);
        let logged = std::mem::replace(&mut vring.log_addr, log_addr);
        if moved {
            self.stop(at);
            self.vrings[at].addresses = Some(addresses);
            self.start_if_ready(at)?;
        }
        if logged != log_addr {
            self.update_log(at);
        }
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        self.answered = true;
        let vring = self.idle_vring(index)?;
        vring.base = u16::try_from(base).map_err(refuse)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        let leave = self.base_leaves_requests();
        Ok(self.stop_at_base(index, leave))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        self.answered = true;
        let (at, vring) = self.vring(u32::from(index))?;
        vring.kick = match file {
            Some(file) => Kick::Descriptor(Arc::new(file)),
            None => Kick::Silent,
        };
        if vring.running {
            let kick = vring.kick.descriptor();
            self.update(at, QueueUpdate::Kick(kick));
        }
        self.start_if_ready(at)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        self.answered = true;
        let (at, vring) = self.vring(u32::from(index))?;
        vring.call = file.map(Signal::new);
        let call = vring.call.clone();
        self.update(at, QueueUpdate::Call(call));
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> VhostResult<()> {
        self.answered = true;
        let (at, vring) = self.vring(u32::from(index))?;
        vring.err = file.map(Signal::new);
        let err = vring.err.clone();
        self.update(at, QueueUpdate::Err(err));
        Ok(())
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        Ok(protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> VhostResult<()> {
        self.answered = true;
        // The library takes them as accepted whatever is said here, so its answers follow them.
        self.protocol_features = features;
        let unknown = features & !protocol_features().bits();
        if unknown != 0 {
            return Err(refuse(format!(
                "protocol features {unknown:#x} are not on offer"
            )));
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(u64::from(self.device.options().num_queues))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        self.answered = true;
        let (at, vring) = self.vring(index)?;
        vring.enabled = enable;
        if !enable {
            self.disable(at);
        } else if vring.running {
            self.update(at, QueueUpdate::Scan);
        } else {
            self.start_if_ready(at)?;
        }
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> VhostResult<Vec<u8>> {
        self.answered = true;
        let space = self.device.config(self.shown_writeback()).to_bytes();
        let range = config::range(offset, usize::try_from(size).unwrap_or(usize::MAX));
        let range = range.ok_or_else(|| refuse(format!("no configuration at {offset}+{size}")))?;
        Ok(space[range].to_vec())
    }

    fn set_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> VhostResult<()> {
        self.answered = true;
        let written = config::written_writeback(offset, bytes);
        let writeback =
            written.ok_or_else(|| refuse("only the cache mode can be written, to 0 or 1"))?;
        self.set_cache_mode(writeback);
        self.update_all(&QueueUpdate::WriteThrough(self.write_through()));
        Ok(())
    }

    fn set_backend_req_fd(&mut self, _backend: Backend) {
        self.answered = true;
        // The library has found it to be a stream socket, and closes its own descriptor of it.
        let channel = self.backend_channel.take().map(BackendChannel::new);
        self.device.set_backend_channel(channel);
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Ok(MAX_MEMORY_SLOTS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<u64>> {
        self.answered = true;
        let map = self.memory.with(region_spec(region), &file);
        self.set_memory(map.map_err(refuse)?);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        self.answered = true;
        let map = self.memory.without(region_spec(region));
        self.set_memory(map.map_err(refuse)?);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> VhostResult<()> {
        self.answered = true;
        not_offered()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        self.answered = true;
        not_offered()
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> VhostResult<(VhostUserInflight, File)> {
        self.make_region(inflight)
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> VhostResult<()> {
        self.answered = true;
        self.take_region(inflight, file)
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        phase: VhostTransferStatePhase,
        file: File,
    ) -> VhostResult<Option<File>> {
        self.answered = true;
        self.begin_transfer(direction, phase, file).map(|()| None)
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        self.answered = true;
        self.end_transfer()
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> VhostResult<()> {
        self.share_log(log, &file)
    }
}
