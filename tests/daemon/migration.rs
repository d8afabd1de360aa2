//! A guest that moves: what the daemon writes to its memory is marked in the VMM's log, the disk goes on behind another daemon,
//! and its state with it. And front-ends that cannot be told of a change.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VringConfigData};

use crate::daemons::{Attach, Directory, Export};
use crate::front_end::{DATA, FrontEnd, IOERR, OK, SECTOR, feature, kind, negotiate_with};
use crate::memory::{HIGH, HIGH_SIZE, LOW_SIZE, Memory, memfd};
use crate::noise::noise;
use crate::ring::{RING_BYTES, Ring, into, out};

const LOG_ALL: u64 = 1 << 26;
const PAGE: u64 = 4096;
pub(crate) const RINGS: usize = 2;

/// A front-end that can migrate its guest.
pub(crate) struct Migrating {
    pub(crate) guest: FrontEnd,
    log: File,
    bytes: u64,
}

impl Migrating {
    #[track_caller]
    pub(crate) fn connect(socket: &Path) -> Self {
        let memory = Memory::new();
        let ring = |index| {
            let base = RING_BYTES * u64::try_from(index).expect("a small number");
            Ring::new(Arc::clone(&memory), base, 128, true)
        };
        let rings = (0..RINGS).map(ring).collect();
        let (frontend, features) = negotiate(socket);
        let mut guest = FrontEnd {
            frontend,
            memory,
            rings,
            features,
        };
        start(&mut guest, [0; RINGS]);
        let bytes = (HIGH + HIGH_SIZE) / PAGE / 8;
        Self {
            guest,
            log: memfd(bytes),
            bytes,
        }
    }

    /// Begins to log, as QEMU does.
    #[track_caller]
    pub(crate) fn begin(&self) {
        let region = VhostUserDirtyLogRegion {
            mmap_size: self.bytes,
            mmap_offset: 0,
            mmap_handle: self.log.as_raw_fd(),
        };
        let frontend = &self.guest.frontend;
        frontend
            .set_log_base(0, Some(region))
            .expect("SET_LOG_BASE");
        let features = self.guest.features | LOG_ALL;
        frontend.set_features(features).expect("SET_FEATURES");
        for (index, ring) in self.guest.rings.iter().enumerate() {
            let config = ring.config();
            let used = config.used_ring_addr - crate::memory::user_addr(0);
            let logged = VringConfigData {
                flags: 1,
                log_addr: Some(used),
                ..config
            };
            frontend
                .set_vring_addr(index, &logged)
                .expect("SET_VRING_ADDR");
        }
    }

    /// Ends it.
    #[track_caller]
    fn end(&self) {
        let frontend = &self.guest.frontend;
        frontend
            .set_features(self.guest.features)
            .expect("SET_FEATURES");
        for (index, ring) in self.guest.rings.iter().enumerate() {
            frontend
                .set_vring_addr(index, &ring.config())
                .expect("SET_VRING_ADDR");
        }
    }

    /// Takes the marked pages out of the log: their guest addresses.
    fn marked(&self) -> Vec<u64> {
        let mut bits = vec![0; usize::try_from(self.bytes).expect("64 bits")];
        self.log.read_exact_at(&mut bits, 0).expect("the log");
        self.log
            .write_all_at(&vec![0; bits.len()], 0)
            .expect("cleared");
        let some = bits.iter().zip(0_u64..).filter(|(byte, _)| **byte != 0);
        let pages = some.flat_map(|(byte, at)| {
            let set = (0..8).filter(move |bit| byte >> bit & 1 != 0);
            set.map(move |bit| (8 * at + bit) * PAGE)
        });
        pages.collect()
    }

    /// Copies what is marked.
    fn copy_to(&self, copy: &mut [u8]) -> usize {
        let marked = self.marked();
        for &addr in &marked {
            let low = LOW_SIZE.min(addr);
            let at = if addr < HIGH {
                addr
            } else {
                low + (addr - HIGH)
            };
            let at = usize::try_from(at).expect("64 bits");
            let page = self.guest.memory.read(addr, 4096);
            copy[at..at + 4096].copy_from_slice(&page);
        }
        marked.len()
    }
}

pub(crate) fn negotiate(socket: &Path) -> (Frontend, u64) {
    let more = VhostUserProtocolFeatures::LOG_SHMFD | VhostUserProtocolFeatures::DEVICE_STATE;
    let (mut frontend, features) = negotiate_with(socket, LOG_ALL, more);
    assert_ne!(features & feature::EVENT_IDX, 0);
    frontend.get_queue_num().expect("GET_QUEUE_NUM");
    (frontend, features)
}

#[track_caller]
pub(crate) fn start(guest: &mut FrontEnd, bases: [u16; RINGS]) {
    let regions = guest.memory.regions();
    guest
        .frontend
        .set_mem_table(&regions)
        .expect("SET_MEM_TABLE");
    for (index, base) in bases.into_iter().enumerate() {
        guest.start(index, base);
        guest.enable(index, true);
    }
}

/// Posts requests of every kind on both rings, some of which fail, with data in pages that others have too.
fn post_some(guest: &mut FrontEnd, round: u64) {
    for ring in 0..RINGS {
        let own = DATA + (1 << 20) * u64::try_from(ring).expect("small") + round * 777;
        let high = HIGH + round * 5000;
        guest.add(ring, 0, kind::READ, round, &[into(own, 512)]);
        let crossing = [into(own + 0x3f00, 1024), into(high, 3 * 4096 + 512)];
        guest.add(ring, 1, kind::READ, 64, &crossing);
        guest.add(ring, 2, kind::WRITE, 1000 + round, &[out(own, 4096)]);
        guest.add(ring, 3, kind::FLUSH, 0, &[]);
        guest.add(ring, 4, kind::GET_ID, 0, &[into(own + 0x8ff0, 20)]);
        // Beyond the end of the disk, and of no kind.
        guest.add(ring, 5, kind::READ, 1 << 40, &[into(own + 0xa000, 8192)]);
        guest.add(ring, 6, 99, 0, &[into(own + 0xd000, 512)]);
        let large = into(own + 0x1_0000, 256 << 10);
        guest.add(ring, 7, kind::READ, 8, &[large]);
    }
}

/// Waits for all of them without a word to the device.
fn await_all(guest: &mut FrontEnd) {
    for ring in &mut guest.rings {
        let mut used = 0;
        while used < 8 {
            used += ring.wait_for_some().len();
        }
    }
}

#[track_caller]
pub(crate) fn a_copy_keeps_up(disk: &Attach) {
    let mut migrating = Migrating::connect(&disk.socket);
    // Before, and in between, nothing is marked.
    for migration in 0..2 {
        post_some(&mut migrating.guest, migration);
        for ring in &mut migrating.guest.rings {
            ring.submit();
        }
        await_all(&mut migrating.guest);
        assert_eq!(migrating.marked(), [0; 0]);
        migrating.begin();
        for round in 0..4 {
            post_some(&mut migrating.guest, 2 + 4 * migration + round);
            for ring in &mut migrating.guest.rings {
                ring.publish();
            }
            // What the guest writes itself, the VMM knows without the log.
            let mut copy = migrating.guest.memory.snapshot();
            for ring in &mut migrating.guest.rings {
                ring.kick();
            }
            await_all(&mut migrating.guest);
            // What comes after an answer, as for the index at which it wants to be kicked, comes soon.
            let mut pages = migrating.copy_to(&mut copy);
            for _ in 0..10 {
                std::thread::sleep(Duration::from_millis(20));
                pages += migrating.copy_to(&mut copy);
            }
            assert!(pages > 130, "only {pages} pages are marked");
            let memory = migrating.guest.memory.snapshot();
            let mut differ = copy.chunks(4096).zip(memory.chunks(4096));
            let missed = differ.position(|(copy, memory)| copy != memory);
            assert_eq!(missed, None, "a page that was not marked");
        }
        migrating.end();
        // What came after the last copy.
        migrating.marked();
    }
}

#[test]
fn what_is_written_for_a_remote_disk_is_marked() {
    let export = Export::start(&["ram:16M"]);
    a_copy_keeps_up(&Attach::start(export.uri()));
}

#[test]
fn what_is_written_for_a_local_disk_is_marked() {
    a_copy_keeps_up(&Attach::serve(&[], "ram:16M"));
}

#[test]
fn requests_of_a_slow_disk_are_marked_when_they_are_answered_and_nobody_waits_for_them_before() {
    let disk = Attach::serve(&[], "ram:16M,fault=delay=1s:read");
    let mut migrating = Migrating::connect(&disk.socket);
    let at = HIGH + 3 * PAGE;
    let began = std::time::Instant::now();
    migrating.guest.add(0, 0, kind::READ, 0, &[into(at, 512)]);
    migrating.guest.rings[0].submit();
    migrating.begin();
    assert!(began.elapsed() < Duration::from_millis(900), "it waited");
    assert!(!migrating.marked().contains(&at), "too early");
    // Stopping the ring does wait.
    let base = migrating.guest.frontend.get_vring_base(0);
    assert_eq!(base.expect("GET_VRING_BASE"), 1);
    assert!(began.elapsed() >= Duration::from_secs(1));
    assert!(migrating.marked().contains(&at));
    assert_eq!(migrating.guest.status(0, 0), OK);
}

#[test]
fn two_daemons_have_one_namespace_and_a_guest_goes_from_one_to_the_other() {
    let export = Export::start(&["ram:16M"]);
    let disks = [(); 2].map(|()| Attach::start(export.uri()));
    let mut guest = Migrating::connect(&disks[0].socket).guest;
    for round in 0..6_u64 {
        let data = noise(8192, round);
        assert_eq!(guest.write(0, round * 100, &data), OK);
        let bases = [0, 1].map(|ring| {
            let base = guest.frontend.get_vring_base(ring);
            u16::try_from(base.expect("GET_VRING_BASE")).expect("an index")
        });
        let next = usize::from(round % 2 == 0);
        let (frontend, _) = negotiate(&disks[next].socket);
        guest.frontend = frontend;
        start(&mut guest, bases);
        for earlier in 0..=round {
            let read = guest.read(1, earlier * 100, 8192);
            assert_eq!(read, (OK, noise(8192, earlier)));
        }
    }
}

/// Saves the state of a device whose rings are stopped.
pub(crate) fn save(frontend: &Frontend) -> Vec<u8> {
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let stopped = VhostTransferStatePhase::STOPPED;
    let save = VhostTransferStateDirection::SAVE;
    let given = frontend.set_device_state_fd(save, stopped, writer.into());
    assert!(given.expect("SET_DEVICE_STATE_FD").is_none());
    let mut state = Vec::new();
    reader.read_to_end(&mut state).expect("a state");
    frontend.check_device_state().expect("CHECK_DEVICE_STATE");
    state
}

fn load(frontend: &Frontend, state: &[u8]) -> bool {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    let stopped = VhostTransferStatePhase::STOPPED;
    let load = VhostTransferStateDirection::LOAD;
    let given = frontend.set_device_state_fd(load, stopped, reader.into());
    assert!(given.expect("SET_DEVICE_STATE_FD").is_none());
    writer.write_all(state).expect("room");
    drop(writer);
    frontend.check_device_state().is_ok()
}

#[test]
fn a_snapshot_is_restored_by_another_daemon_on_the_same_namespace_and_on_no_other() {
    let export = Export::start(&["ram:16M", "ram:16M"]);
    let source = Attach::start(export.uri());
    let mut migrating = Migrating::connect(&source.socket);
    assert!(migrating.guest.set_config(32, 0), "write-through");
    // As cloud-hypervisor does it.
    for ring in 0..RINGS {
        let base = migrating.guest.frontend.get_vring_base(ring);
        base.expect("GET_VRING_BASE");
    }
    let state = save(&migrating.guest.frontend);
    drop(migrating);
    let writeback = |frontend: &mut Frontend| {
        let flags = VhostUserConfigFlags::WRITABLE;
        let config = frontend.get_config(32, 1, flags, &[0]);
        config.expect("GET_CONFIG").1[0]
    };
    let same = Attach::start(export.uri());
    let (mut frontend, _) = negotiate(&same.socket);
    assert_eq!(writeback(&mut frontend), 1);
    assert!(load(&frontend, &state));
    assert_eq!(writeback(&mut frontend), 0);
    assert!(load(&frontend, &[]), "a snapshot without a state");
    let other = Attach::start_with(&["--serial", "another"], &export.uris[1]);
    let (mut frontend, _) = negotiate(&other.socket);
    assert!(!load(&frontend, &state));
    assert_eq!(writeback(&mut frontend), 1);
    // The VMM has its answer first.
    let refused = "the device's state is refused";
    other.process.await_log(|line| line.contains(refused));
    let refused = other.process.logged(refused);
    let reason = refused[0]["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("another namespace"), "{reason}");
}

/// The whole configuration as cloud-hypervisor and Firecracker ask for it.
fn capacity(frontend: &mut Frontend) -> u64 {
    let flags = VhostUserConfigFlags::WRITABLE;
    let config = frontend.get_config(0, 60, flags, &[0; 60]);
    let bytes = config.expect("GET_CONFIG").1;
    u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) * SECTOR
}

#[test]
fn front_ends_that_give_no_channel_see_a_larger_disk_when_they_look() {
    let config = VhostUserProtocolFeatures::CONFIG;
    let firecracker = config;
    let cloud_hypervisor = config
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::DEVICE_STATE;
    const FLUSH_EVENT_IDX_AND_MORE: u64 = 1 << 9 | 1 << 29 | 1 << 30 | 1 << 32;
    for protocol in [firecracker, cloud_hypervisor] {
        let directory = Directory::new();
        let path = directory.path("disk.img");
        let resize = |bytes| {
            let mut options = File::options();
            let options = options.write(true).create(true).truncate(false);
            let file = options.open(&path).expect("an image");
            file.set_len(bytes).expect("room");
        };
        resize(1 << 20);
        let export = Export::start(&[path.to_str().expect("UTF-8")]);
        let disk = Attach::start(export.uri());
        let stream = UnixStream::connect(&disk.socket).expect("somebody listens");
        let mut frontend = Frontend::from_stream(stream, 64);
        frontend.set_owner().expect("SET_OWNER");
        let offer = frontend.get_features().expect("GET_FEATURES");
        let offered = frontend.get_protocol_features();
        let offered = offered.expect("GET_PROTOCOL_FEATURES");
        frontend
            .set_protocol_features(offered & protocol)
            .expect("SET_PROTOCOL_FEATURES");
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let features = offer & FLUSH_EVENT_IDX_AND_MORE;
        frontend.set_features(features).expect("SET_FEATURES");
        let memory = Memory::new();
        let mut guest = FrontEnd {
            rings: vec![Ring::new(Arc::clone(&memory), 0, 128, true)],
            memory,
            frontend,
            features,
        };
        let regions = guest.memory.regions();
        guest
            .frontend
            .set_mem_table(&regions)
            .expect("SET_MEM_TABLE");
        guest.start(0, 0);
        guest.enable(0, true);
        assert_eq!(capacity(&mut guest.frontend), 1 << 20);
        assert_eq!(guest.write(0, 3000, &noise(512, 1)), IOERR);
        resize(2 << 20);
        export.process.signal(Signal::HUP);
        let told = "the VMM sees it when it reads the configuration again";
        disk.process.await_log(|line| line.contains(told));
        assert_eq!(capacity(&mut guest.frontend), 2 << 20);
        assert_eq!(guest.write(0, 3000, &noise(512, 1)), OK);
    }
}
