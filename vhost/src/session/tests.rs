//! Sessions over a socket pair, with `vhost`'s front-end on the other side.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::thread::JoinHandle;
use std::time::Duration;

use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::device::{DeviceOptions, bit};
use crate::guest::{
    ADDRESSES, EVENT_IDX, Guest, REGION, REGIONS, SIZE, USER, header, into, options, out,
};
use crate::{BlkStatus, Operation, Request, Token};

mod configuration;
mod device_state;
mod handover;
mod inflight;
mod memory;
mod messages;
mod migration;
mod rings;

const PROTOCOL_FEATURES: u64 = 1 << 30;
const FLUSH: u32 = 4;
const DISK_WRITE: u32 = 1;

/// A worker that takes every request it sees and holds it until told otherwise.
#[derive(Default)]
struct Worker {
    lanes: Mutex<BTreeMap<usize, Lane>>,
    events: Mutex<Vec<String>>,
    tails: Mutex<Vec<Option<Tail>>>,
}

struct Lane {
    queue: Queue,
    held: Vec<Request>,
}

impl Lane {
    fn scan(&mut self) {
        while let Ok(Some(request)) = self.queue.take(&mut Vec::new) {
            self.held.push(request);
        }
        self.queue.flush();
        self.queue.rearm();
    }

    fn leave(&mut self) {
        for Request {
            token, operation, ..
        } in self.held.drain(..)
        {
            drop(operation);
            self.queue.leave(token);
        }
        self.queue.flush();
    }

    fn finish(&mut self) {
        for Request {
            token, operation, ..
        } in self.held.drain(..)
        {
            finish(&mut self.queue, token, &operation);
        }
        self.queue.flush();
    }
}

fn finish(queue: &mut Queue, token: Token, operation: &Operation) {
    queue.finish(token, operation, BlkStatus::Ok);
}

impl Worker {
    fn log(&self, event: String) {
        self.events.lock().expect("unpoisoned").push(event);
    }

    /// What was asked of the worker since the last look.
    fn events(&self) -> Vec<String> {
        std::mem::take(&mut self.events.lock().expect("unpoisoned"))
    }

    /// The tails that the worker was told of since the last look.
    fn tails(&self) -> Vec<Option<Tail>> {
        std::mem::take(&mut self.tails.lock().expect("unpoisoned"))
    }

    fn running(&self) -> Vec<usize> {
        self.lanes
            .lock()
            .expect("unpoisoned")
            .keys()
            .copied()
            .collect()
    }

    fn with<T>(&self, index: usize, act: impl FnOnce(&mut Lane) -> T) -> T {
        let mut lanes = self.lanes.lock().expect("unpoisoned");
        act(lanes.get_mut(&index).expect("running"))
    }

    fn held(&self, index: usize) -> usize {
        self.with(index, |lane| lane.held.len())
    }
}

impl Rings for Worker {
    fn start(&self, index: usize, queue: Queue) {
        self.log(format!("start {index}"));
        let mut lane = Lane {
            queue,
            held: Vec::new(),
        };
        lane.scan();
        let before = self.lanes.lock().expect("unpoisoned").insert(index, lane);
        assert!(before.is_none(), "ring {index} was started twice");
    }

    fn update(&self, index: usize, update: QueueUpdate) {
        let name = match &update {
            QueueUpdate::Scan => "scan".to_owned(),
            QueueUpdate::Kick(file) => format!("kick {}", file.is_some()),
            QueueUpdate::Call(signal) => format!("call {}", signal.is_some()),
            QueueUpdate::Err(signal) => format!("err {}", signal.is_some()),
            QueueUpdate::Memory(map) => format!("memory {}", map.regions()),
            QueueUpdate::WriteThrough(on) => format!("write-through {on}"),
            QueueUpdate::Log(log) => format!("log {}", log.is_some()),
        };
        self.log(format!("{name} {index}"));
        self.with(index, |lane| {
            lane.queue.apply(update);
            lane.scan();
        });
    }

    fn stop(&self, index: usize) -> Option<Queue> {
        self.log(format!("stop {index}"));
        let mut lane = self.lanes.lock().expect("unpoisoned").remove(&index)?;
        lane.finish();
        Some(lane.queue)
    }

    fn suspend(&self, index: usize) -> Option<Queue> {
        self.log(format!("suspend {index}"));
        let mut lane = self.lanes.lock().expect("unpoisoned").remove(&index)?;
        lane.leave();
        Some(lane.queue)
    }

    fn pause(&self, rings: &[usize]) -> Result<Vec<Queue>, String> {
        self.log(format!("pause {}", rings.len()));
        if rings.iter().any(|&ring| self.held(ring) > 0) {
            return Err("requests are in flight".to_owned());
        }
        let mut lanes = self.lanes.lock().expect("unpoisoned");
        let lanes = rings
            .iter()
            .map(|ring| lanes.remove(ring).expect("running"));
        Ok(lanes.map(|lane| lane.queue).collect())
    }

    fn settle(&self) {
        assert_eq!(self.running(), [0; 0], "a ring is running");
        self.log("settle".to_owned());
    }

    fn region(&self, tail: Option<Tail>) {
        assert_eq!(self.running(), [0; 0], "a ring is running");
        self.tails.lock().expect("unpoisoned").push(tail);
    }
}

struct Bench {
    front: Frontend,
    raw: UnixStream,
    guest: Guest,
    worker: Arc<Worker>,
    device: Arc<Device>,
    thread: JoinHandle<Result<(), SessionError>>,
    kick: EventFd,
    call: EventFd,
}

impl Bench {
    fn new() -> Self {
        Self::with(options())
    }

    fn with(options: DeviceOptions) -> Self {
        Self::connect(Guest::new(), Arc::default(), Device::new(options))
    }

    fn connect(guest: Guest, worker: Arc<Worker>, device: Arc<Device>) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        let rings: Arc<dyn Rings> = Arc::clone(&worker) as _;
        let served = Arc::clone(&device);
        let thread = std::thread::spawn(move || serve(theirs, served, rings));
        ours.set_read_timeout(Some(Duration::from_secs(10)))
            .expect("timeout");
        let raw = ours.try_clone().expect("clone");
        Self {
            front: Frontend::from_stream(ours, 256),
            raw,
            guest,
            worker,
            device,
            thread,
            kick: EventFd::new(0).expect("eventfd"),
            call: EventFd::new(EFD_NONBLOCK).expect("eventfd"),
        }
    }

    /// Negotiates everything but `without`.
    fn negotiate_without(&mut self, without: u64) {
        self.front.set_owner().expect("owner");
        let features = self.front.get_features().expect("features");
        let protocol = self
            .front
            .get_protocol_features()
            .expect("protocol features");
        self.front
            .set_protocol_features(protocol)
            .expect("set protocol features");
        self.front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        self.front
            .set_features(features & !without)
            .expect("set features");
    }

    fn negotiate(&mut self) {
        self.negotiate_without(0);
    }

    fn share_memory(&self) {
        self.front.set_mem_table(&self.regions()).expect("memory");
    }

    fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let files = self.guest.files.iter();
        REGIONS
            .iter()
            .zip(files)
            .map(|(addr, file)| region(*addr, file))
            .collect()
    }

    fn set_up_ring(&self, index: usize) {
        self.front.set_vring_num(index, SIZE).expect("size");
        self.front
            .set_vring_addr(index, &ring_config())
            .expect("addresses");
        self.front.set_vring_base(index, 0).expect("base");
        self.front.set_vring_call(index, &self.call).expect("call");
        self.front.set_vring_kick(index, &self.kick).expect("kick");
    }

    /// Does all that leads to ring 0 running.
    fn run_ring(&mut self) {
        self.negotiate();
        self.share_memory();
        self.set_up_ring(0);
        self.front.set_vring_enable(0, true).expect("enable");
        assert_eq!(self.worker.running(), [0]);
    }

    fn post_flush(&mut self) {
        self.guest.write(0x4000, &header(FLUSH, 0));
        self.guest.post(&[out(0x4000, 16), into(0x5000, 1)]);
    }

    /// Calls of the driver since the last look.
    fn calls(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }

    fn config(&mut self, offset: u32, size: u32) -> Result<Vec<u8>, vhost::Error> {
        let room = vec![0; usize::try_from(size).expect("small")];
        let flags = VhostUserConfigFlags::WRITABLE;
        self.front
            .get_config(offset, size, flags, &room)
            .map(|(_, bytes)| bytes)
    }

    fn set_writeback(&mut self, value: u8) -> Result<(), vhost::Error> {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.front.set_config(32, flags, &[value])
    }

    fn send(&self, request: u32, flags: u32, body: &[u8]) {
        let size = u32::try_from(body.len()).expect("small");
        let mut message: Vec<u8> = Vec::new();
        for word in [request, flags, size] {
            message.extend(word.to_le_bytes());
        }
        message.extend(body);
        (&self.raw).write_all(&message).expect("send");
    }

    fn receive(&self) -> (u32, u32, Vec<u8>) {
        let mut head = [0; 12];
        (&self.raw).read_exact(&mut head).expect("reply");
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let mut body = vec![0; usize::try_from(word(8)).expect("small")];
        (&self.raw).read_exact(&mut body).expect("body");
        (word(0), word(4), body)
    }

    /// Sends a message that must be refused with a non-zero acknowledgement.
    fn refused(&self, request: u32, body: &[u8]) {
        self.send(request, 1 | 8, body);
        let (code, flags, reply) = self.receive();
        assert_eq!((code, flags), (request, 1 | 4));
        assert_eq!(reply, 1_u64.to_le_bytes());
    }

    /// The session still answers.
    fn goes_on(&self) {
        assert_eq!(
            self.front.get_features().expect("features"),
            self.device.features()
        );
    }

    fn close(self) -> (Guest, Arc<Worker>, Arc<Device>, Result<(), SessionError>) {
        drop(self.front);
        drop(self.raw);
        let result = self.thread.join().expect("no panic");
        (self.guest, self.worker, self.device, result)
    }
}

fn region(guest_addr: u64, file: &std::fs::File) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: guest_addr,
        memory_size: REGION,
        userspace_addr: USER + guest_addr,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }
}

fn ring_config() -> VringConfigData {
    VringConfigData {
        queue_max_size: SIZE,
        queue_size: SIZE,
        flags: 0,
        desc_table_addr: USER + ADDRESSES.descriptors,
        used_ring_addr: USER + ADDRESSES.used,
        avail_ring_addr: USER + ADDRESSES.available,
        log_addr: None,
    }
}

fn state(index: u32, num: u32) -> Vec<u8> {
    [index.to_le_bytes(), num.to_le_bytes()].concat()
}
