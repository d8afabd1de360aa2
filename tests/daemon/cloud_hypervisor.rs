//! A front-end such as cloud-hypervisor is: its features, and its messages in its order, from start to end of a guest.
//!
//! It asks for 60 bytes of configuration before it accepts features, gives no channel to be told of changes on, says the
//! driver's available index wherever a base is due, and stops rings with SET_VRING_ENABLE alone.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

use crate::daemons::{Attach, Directory, Export};
use crate::front_end::{DATA, FrontEnd, OK, UNANSWERED, feature, kind};
use crate::hotplug::{Module, PLUGGED};
use crate::memory::{HIGH, HIGH_SIZE, Memory, memfd, user_addr};
use crate::ring::{RING_BYTES, Ring, into, out};

const QUEUES: usize = 2;
const SIZE: u16 = 128;
const LOG_ALL: u64 = 1 << 26;
/// Of virtio and its block device, what it passes to a guest, and dirty logs for itself.
const FEATURES: u64 = 1 << 1 // SIZE_MAX
    | 1 << 2 // SEG_MAX
    | 1 << 4 // GEOMETRY
    | feature::RO
    | 1 << 6 // BLK_SIZE
    | feature::FLUSH
    | 1 << 10 // TOPOLOGY
    | 1 << 11 // CONFIG_WCE
    | 1 << 12 // MQ
    | 1 << 13 // DISCARD
    | 1 << 14 // WRITE_ZEROES
    | LOG_ALL
    | 1 << 28 // INDIRECT_DESC
    | feature::EVENT_IDX
    | 1 << 30 // PROTOCOL_FEATURES
    | 1 << 32 // VERSION_1
    | 1 << 35 // IN_ORDER
    | 1 << 36 // ORDER_PLATFORM
    | 1 << 38; // NOTIFICATION_DATA
const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::CONFIG
    .union(VhostUserProtocolFeatures::MQ)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::DEVICE_STATE);
/// Bytes of configuration.
const CONFIG: u32 = 60;
/// Its guest can wait so long for a back-end that comes back.
const EPISODE: Duration = Duration::from_secs(60);
const PAGE: u64 = 4096;

/// The VMM and its guest.
struct Vmm {
    guest: FrontEnd,
    protocol: VhostUserProtocolFeatures,
    config: Vec<u8>,
    inflight: Option<(VhostUserInflight, File)>,
}

/// Tries to connect every 100 ms.
fn connect(socket: &Path) -> Frontend {
    let began = Instant::now();
    loop {
        if let Ok(stream) = UnixStream::connect(socket) {
            let limit = Some(Duration::from_secs(20));
            stream.set_read_timeout(limit).expect("a time-out");
            return Frontend::from_stream(stream, QUEUES as u64);
        }
        assert!(began.elapsed() < EPISODE, "the disk is dead for good");
        sleep(Duration::from_millis(100));
    }
}

/// GET_CONFIG, as newer releases ask it; older ones say offset 0x100.
fn config(frontend: &mut Frontend, offset: u32) -> Vec<u8> {
    let flags = VhostUserConfigFlags::WRITABLE;
    let room = [0; CONFIG as usize];
    let (_, bytes) = frontend
        .get_config(offset, CONFIG, flags, &room)
        .expect("GET_CONFIG");
    bytes
}

impl Vmm {
    /// Starts with a guest whose memory and rings are fresh.
    fn start(socket: &Path) -> Self {
        let mut frontend = connect(socket);
        frontend.set_owner().expect("SET_OWNER");
        let features = frontend.get_features().expect("GET_FEATURES") & FEATURES;
        let offered = frontend.get_protocol_features().expect("protocol features");
        let protocol = offered & PROTOCOL;
        frontend
            .set_protocol_features(protocol)
            .expect("SET_PROTOCOL_FEATURES");
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert!(frontend.get_queue_num().expect("GET_QUEUE_NUM") >= QUEUES as u64);
        let config = config(&mut frontend, 0);
        let memory = Memory::new();
        let ring = |index| Ring::new(Arc::clone(&memory), RING_BYTES * index, SIZE, true);
        let rings = (0..QUEUES as u64).map(ring).collect();
        let guest = FrontEnd {
            frontend,
            memory,
            rings,
            // The guest takes them all; the log is not its business.
            features: features & !LOG_ALL,
        };
        let mut vmm = Self {
            guest,
            protocol,
            config,
            inflight: None,
        };
        vmm.set_up();
        vmm
    }

    /// What follows when the guest's driver is ready, and after a reconnection.
    fn set_up(&mut self) {
        let guest = &mut self.guest;
        let front = &mut guest.frontend;
        front.set_features(guest.features).expect("SET_FEATURES");
        let regions = guest.memory.regions();
        front.set_mem_table(&regions).expect("SET_MEM_TABLE");
        for index in 0..QUEUES {
            front.set_vring_num(index, SIZE).expect("SET_VRING_NUM");
        }
        let (shape, file) = self.inflight.get_or_insert_with(|| {
            let asked = VhostUserInflight {
                num_queues: QUEUES as u16,
                queue_size: SIZE,
                ..VhostUserInflight::default()
            };
            front.get_inflight_fd(&asked).expect("GET_INFLIGHT_FD")
        });
        front
            .set_inflight_fd(shape, file.as_raw_fd())
            .expect("SET_INFLIGHT_FD");
        for (index, ring) in guest.rings.iter().enumerate() {
            front
                .set_vring_addr(index, &ring.config())
                .expect("SET_VRING_ADDR");
            let base = ring.available();
            front.set_vring_base(index, base).expect("SET_VRING_BASE");
            front
                .set_vring_call(index, &ring.call)
                .expect("SET_VRING_CALL");
            front
                .set_vring_kick(index, &ring.kick)
                .expect("SET_VRING_KICK");
        }
        self.enable(true);
    }

    /// The back-end went away.
    fn reconnect(&mut self, socket: &Path) {
        let mut front = connect(socket);
        front.set_owner().expect("SET_OWNER");
        front.get_features().expect("GET_FEATURES");
        front
            .set_protocol_features(self.protocol)
            .expect("SET_PROTOCOL_FEATURES");
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        self.guest.frontend = front;
        self.set_up();
    }

    fn hang_up(&mut self) {
        let (nobody, _) = UnixStream::pair().expect("sockets");
        self.guest.frontend = Frontend::from_stream(nobody, 1);
    }

    /// Pauses the guest's disk, or lets it go on; a reset begins like a pause.
    fn enable(&mut self, on: bool) {
        for index in 0..QUEUES {
            self.guest.enable(index, on);
        }
    }

    fn log(&self) -> File {
        let last = HIGH + HIGH_SIZE - 1;
        let size = last / (PAGE * 8) + 1;
        let file = memfd(size);
        let log = VhostUserDirtyLogRegion {
            mmap_size: size,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        let front = &self.guest.frontend;
        front.set_log_base(0, Some(log)).expect("SET_LOG_BASE");
        file
    }

    fn log_rings(&self, on: bool) {
        for (index, ring) in self.guest.rings.iter().enumerate() {
            let mut config = ring.config();
            let used = config.used_ring_addr - user_addr(0);
            (config.flags, config.log_addr) = (u32::from(on), on.then_some(used));
            let front = &self.guest.frontend;
            front.set_vring_addr(index, &config).expect("the same ring");
        }
    }

    /// Adds a request on each ring and shows it.
    fn post(&mut self, slot: usize, kind: u32) {
        for index in 0..QUEUES {
            let sector = 64 * slot as u64 + 8 * index as u64;
            let at = DATA + (64 * slot as u64 + 8 * index as u64) * 512;
            let data = match kind {
                kind::READ => into(at, 4096),
                _ => out(at, 4096),
            };
            self.guest.add(index, slot, kind, sector, &[data]);
            self.guest.rings[index].submit();
        }
    }

    #[track_caller]
    fn wait(&mut self, slots: std::ops::Range<usize>) {
        for index in 0..QUEUES {
            self.guest.rings[index].wait(slots.len());
            for slot in slots.clone() {
                assert_eq!(self.guest.status(index, slot), OK, "{slot} of ring {index}");
            }
        }
    }

    fn used(&self) -> Vec<u16> {
        self.guest.rings.iter().map(Ring::used_idx).collect()
    }

    /// What is saved with a snapshot of the guest, which is paused.
    fn save(&mut self) -> Vec<u8> {
        for index in 0..QUEUES {
            let base = self.guest.frontend.get_vring_base(index);
            let expected = u32::from(self.guest.rings[index].available());
            assert_eq!(base.expect("GET_VRING_BASE"), expected, "all is answered");
        }
        let (mut ours, theirs) = std::io::pipe().expect("a pipe");
        self.transfer(VhostTransferStateDirection::SAVE, theirs.into());
        let mut state = Vec::new();
        ours.read_to_end(&mut state).expect("a state");
        self.check();
        state
    }

    fn transfer(&mut self, direction: VhostTransferStateDirection, end: std::os::fd::OwnedFd) {
        let stopped = VhostTransferStatePhase::STOPPED;
        let front = &mut self.guest.frontend;
        front
            .set_device_state_fd(direction, stopped, end)
            .expect("SET_DEVICE_STATE_FD");
    }

    fn check(&self) {
        let front = &self.guest.frontend;
        front.check_device_state().expect("CHECK_DEVICE_STATE");
    }
}

/// Storage that takes its time.
fn slow() -> Export {
    Export::start(&["ram:64M,fault=delay=200ms:read,fault=delay=200ms:write"])
}

#[test]
fn it_gets_all_the_protocol_features_that_it_asks_for_and_its_sixty_bytes() {
    let export = Export::start(&["ram:64M"]);
    let attach = Attach::start(export.uri());
    let mut vmm = Vmm::start(&attach.socket);
    assert_eq!(vmm.protocol, PROTOCOL);
    assert_eq!(vmm.guest.features & 1 << 35, 0, "answers come in any order");
    let config = &vmm.config;
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().expect("4 bytes"));
    assert_eq!(config.len(), CONFIG as usize);
    assert_eq!(word(0) / 2048, 64, "MiB");
    assert_eq!(word(20), 512, "bytes in a block");
    assert_eq!(config[32], 1, "the cache is written back");
    assert!(word(36) > 0 && word(48) > 0, "discards and zeroes");
    assert_eq!(self::config(&mut vmm.guest.frontend, 0x100), vmm.config);
    // The driver turns the cache off: one byte.
    assert!(vmm.guest.set_config(32, 0));
    vmm.post(0, kind::WRITE);
    vmm.wait(0..1);
}

#[test]
fn a_pause_waits_for_what_is_in_flight_and_what_is_posted_meanwhile_waits_for_its_end() {
    let export = slow();
    let attach = Attach::start(export.uri());
    let mut vmm = Vmm::start(&attach.socket);
    vmm.post(0, kind::WRITE);
    sleep(Duration::from_millis(50));
    vmm.enable(false);
    assert_eq!(vmm.used(), [1, 1], "it is answered before the pause is");
    vmm.post(1, kind::WRITE);
    sleep(Duration::from_millis(500));
    assert_eq!(vmm.used(), [1, 1], "and nothing after");
    vmm.enable(true);
    vmm.wait(0..2);
    // The guest resets its device, and another driver begins.
    vmm.enable(false);
    for index in 0..QUEUES {
        let base = RING_BYTES * index as u64;
        vmm.guest.memory.write(base, &[0; RING_BYTES as usize]);
        vmm.guest.rings[index].restart(0);
    }
    vmm.inflight = None;
    vmm.set_up();
    vmm.post(2, kind::READ);
    vmm.wait(2..3);
}

#[test]
fn memory_that_it_plugs_in_serves_at_once() {
    let export = Export::start(&["ram:64M"]);
    let attach = Attach::start(export.uri());
    let mut vmm = Vmm::start(&attach.socket);
    let module = Module::new(16 << 20);
    let front = &mut vmm.guest.frontend;
    front
        .add_mem_region(&module.region(0))
        .expect("ADD_MEM_REG");
    module.fill(0, 8192, 0x77);
    let (from, to) = (out(PLUGGED, 8192), into(PLUGGED + 8192, 8192));
    assert_eq!(vmm.guest.run(0, kind::WRITE, 0, &[from]), OK);
    assert_eq!(vmm.guest.run(1, kind::READ, 0, &[to]), OK);
    module.holds(8192, 8192, 0x77);
}

#[test]
fn a_daemon_that_is_killed_and_comes_back_within_its_minute_is_not_noticed_by_the_guest() {
    let directory = Directory::new();
    let socket = directory.path("disk.sock");
    let export = slow();
    let mut attach = Attach::start_at(&socket, &[], export.uri());
    let mut vmm = Vmm::start(&socket);
    for round in 0..3 {
        let slots = 4 * round..4 * round + 4;
        for slot in slots.clone() {
            vmm.guest
                .memory
                .write(DATA + 64 * 512 * slot as u64, &[slot as u8; 8192]);
            vmm.post(slot, kind::WRITE);
        }
        sleep(Duration::from_millis(50));
        attach.process.signal(Signal::KILL);
        attach.process.wait(Duration::from_secs(5));
        let unanswered = vmm.guest.status(0, slots.start);
        assert_eq!(unanswered, UNANSWERED, "nothing was in flight");
        vmm.hang_up();
        attach = std::thread::scope(|scope| {
            let back = scope.spawn(|| vmm.reconnect(&socket));
            sleep(Duration::from_millis(700));
            let attach = Attach::start_at(&socket, &[], export.uri());
            back.join().expect("it comes back");
            attach
        });
        vmm.wait(slots.clone());
        let answered = vmm.used();
        assert_eq!(answered, [4 * round as u16 + 4; 2], "each is answered once");
    }
    vmm.guest.memory.write(DATA, &[0; 4096]);
    vmm.post(0, kind::READ);
    vmm.wait(0..1);
    assert_eq!(vmm.guest.memory.read(DATA, 4096), vec![0; 4096]);
    attach.stop();
}

#[test]
fn a_snapshot_is_restored_by_another_machine_with_another_daemon() {
    let export = Export::start(&["ram:64M"]);
    let attach = Attach::start(export.uri());
    let mut vmm = Vmm::start(&attach.socket);
    assert!(vmm.guest.set_config(32, 0));
    vmm.guest.memory.write(DATA, &[0x61; 4096]);
    vmm.post(0, kind::WRITE);
    vmm.wait(0..1);
    vmm.enable(false);
    let state = vmm.save();
    // The same guest, elsewhere: its memory, and its rings as they were.
    let other = Attach::start(export.uri());
    vmm.hang_up();
    let mut front = connect(&other.socket);
    front.set_owner().expect("SET_OWNER");
    front.get_features().expect("GET_FEATURES");
    front
        .set_protocol_features(vmm.protocol)
        .expect("SET_PROTOCOL_FEATURES");
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    vmm.guest.frontend = front;
    let (theirs, mut ours) = std::io::pipe().expect("a pipe");
    vmm.transfer(VhostTransferStateDirection::LOAD, theirs.into());
    ours.write_all(&state).expect("room");
    drop(ours);
    vmm.check();
    vmm.inflight = None;
    vmm.set_up();
    assert_eq!(config(&mut vmm.guest.frontend, 0)[32], 0, "the cache mode");
    vmm.guest.memory.write(DATA, &[0; 4096]);
    vmm.post(1, kind::WRITE);
    vmm.wait(1..2);
    assert_eq!(vmm.guest.run(0, kind::READ, 0, &[into(DATA, 4096)]), OK);
    assert_eq!(vmm.guest.memory.read(DATA, 4096), [0x61; 4096]);
}

#[test]
fn what_is_written_to_memory_is_in_the_log_that_it_changes_under_load() {
    let export = Export::start(&["ram:64M"]);
    let attach = Attach::start(export.uri());
    let mut vmm = Vmm::start(&attach.socket);
    let dirty = |log: &File, addr: u64| {
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(log, &mut byte, addr / PAGE / 8).expect("a log");
        byte[0] & 1 << (addr / PAGE % 8) != 0
    };
    // The log, then the feature, then the rings.
    let first = vmm.log();
    let front = &vmm.guest.frontend;
    let features = vmm.guest.features;
    front
        .set_features(features | LOG_ALL)
        .expect("SET_FEATURES");
    vmm.log_rings(true);
    vmm.post(0, kind::READ);
    vmm.wait(0..1);
    for addr in [
        DATA,
        DATA + 4096,
        vmm.guest.rings[0].config().used_ring_addr - user_addr(0),
    ] {
        assert!(dirty(&first, addr), "{addr:#x}");
    }
    assert!(!dirty(&first, DATA + 64 * 512), "nobody wrote there");
    let second = vmm.log();
    vmm.post(1, kind::READ);
    vmm.wait(1..2);
    assert!(dirty(&second, DATA + 64 * 512));
    assert!(!dirty(&first, DATA + 64 * 512), "the old log is left alone");
    vmm.log_rings(false);
    vmm.guest
        .frontend
        .set_features(features)
        .expect("SET_FEATURES");
    vmm.post(2, kind::READ);
    vmm.wait(2..3);
    assert!(!dirty(&second, DATA + 128 * 512), "it is off");
}
