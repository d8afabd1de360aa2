//! Firecracker as a front-end: one queue of 256 entries, the configuration and nothing else of the protocol's features, no
//! acknowledgements, and a configuration that is read anew when its user says so.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::daemons::{Attach, Directory, Export};
use crate::front_end::{FrontEnd, IOERR, OK, SECTOR, feature};
use crate::memory::Memory;
use crate::noise::noise;
use crate::ring::Ring;

const SIZE: u16 = 256;
const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const CONFIG: u32 = 60;

/// How a drive's cache is configured there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cache {
    /// The guest cannot flush.
    Unsafe,
    Writeback,
}

/// Connects and sets the device up as its driver would have it.
fn start(socket: &Path, cache: Cache) -> (FrontEnd, Vec<u8>) {
    let stream = UnixStream::connect(socket).expect("somebody listens");
    let limit = Some(Duration::from_secs(20));
    stream.set_read_timeout(limit).expect("a time-out");
    let mut front = Frontend::from_stream(stream, 1);
    front.set_owner().expect("SET_OWNER");
    let mut wanted = VERSION_1 | feature::EVENT_IDX | PROTOCOL_FEATURES | feature::RO;
    if cache == Cache::Writeback {
        wanted |= feature::FLUSH;
    }
    let features = front.get_features().expect("GET_FEATURES") & wanted;
    let protocol = front.get_protocol_features().expect("protocol features");
    let protocol = protocol & VhostUserProtocolFeatures::CONFIG;
    assert!(!protocol.is_empty());
    front
        .set_protocol_features(protocol)
        .expect("SET_PROTOCOL_FEATURES");
    let config = config(&mut front);
    let memory = Memory::new();
    let ring = Ring::new(Arc::clone(&memory), 0, SIZE, true);
    front.set_features(features).expect("SET_FEATURES");
    front
        .set_mem_table(&memory.regions())
        .expect("SET_MEM_TABLE");
    front.set_vring_num(0, SIZE).expect("SET_VRING_NUM");
    front
        .set_vring_addr(0, &ring.config())
        .expect("SET_VRING_ADDR");
    front
        .set_vring_base(0, ring.available())
        .expect("SET_VRING_BASE");
    front.set_vring_call(0, &ring.call).expect("SET_VRING_CALL");
    front.set_vring_kick(0, &ring.kick).expect("SET_VRING_KICK");
    front.set_vring_enable(0, true).expect("SET_VRING_ENABLE");
    let guest = FrontEnd {
        frontend: front,
        memory,
        rings: vec![ring],
        features,
    };
    (guest, config)
}

/// Reads the configuration, at the start and for every PATCH of the drive.
fn config(front: &mut Frontend) -> Vec<u8> {
    let flags = VhostUserConfigFlags::WRITABLE;
    let room = [0; CONFIG as usize];
    let (_, bytes) = front
        .get_config(0, CONFIG, flags, &room)
        .expect("GET_CONFIG");
    assert_eq!(bytes.len(), room.len());
    bytes
}

fn capacity(config: &[u8]) -> u64 {
    SECTOR * u64::from_le_bytes(config[..8].try_into().expect("8 bytes"))
}

#[test]
fn a_drive_works_with_one_queue_and_no_acknowledgements() {
    let export = Export::start(&["ram:64M"]);
    for cache in [Cache::Writeback, Cache::Unsafe] {
        let mut attach = Attach::start(export.uri());
        let (mut guest, config) = start(&attach.socket, cache);
        assert_eq!(guest.features & feature::RO, 0);
        assert_eq!(capacity(&config), 64 << 20);
        let data = noise(64 << 10, 3);
        // The ring may be enabled at any time from now on; the request waits for that.
        assert_eq!(guest.write(0, 128, &data), OK, "{cache:?}");
        if cache == Cache::Writeback {
            assert_eq!(guest.flush(0), OK);
        }
        assert_eq!(guest.read(0, 128, data.len()), (OK, data), "{cache:?}");
        // The microVM ends as it always does.
        drop(guest);
        attach.stop();
    }
}

#[test]
fn a_drive_that_is_read_only_says_so_itself() {
    let export = Export::start(&["ram:64M"]);
    let attach = Attach::start_with(&["--read-only"], export.uri());
    let (mut guest, _) = start(&attach.socket, Cache::Writeback);
    assert_ne!(guest.features & feature::RO, 0);
    assert_eq!(guest.write(0, 0, &[1; 512]), IOERR);
    assert_eq!(guest.read(0, 0, 512), (OK, vec![0; 512]));
    assert_eq!(guest.flush(0), OK);
}

#[test]
fn a_drive_that_has_grown_is_larger_once_its_user_patches_it() {
    const SMALL: u64 = 1 << 20;
    const LARGE: u64 = 3 << 20;
    let directory = Directory::new();
    let image = directory.path("disk.img");
    std::fs::write(&image, noise(SMALL as usize, 1)).expect("an image");
    let export = Export::start(&[image.to_str().expect("UTF-8")]);
    let attach = Attach::start(export.uri());
    let (mut guest, config_at_start) = start(&attach.socket, Cache::Writeback);
    assert_eq!(capacity(&config_at_start), SMALL);
    let file = std::fs::File::options().write(true).open(&image);
    file.expect("a file").set_len(LARGE).expect("room");
    export.process.signal(Signal::HUP);
    // Nothing can tell it; its user tries until it is there.
    let deadline = Instant::now() + Duration::from_secs(10);
    while capacity(&config(&mut guest.frontend)) != LARGE {
        assert!(Instant::now() < deadline, "it does not grow");
        std::thread::sleep(Duration::from_millis(50));
    }
    let data = noise(4096, 2);
    let last = (LARGE - 4096) / SECTOR;
    assert_eq!(guest.write(0, last, &data), OK);
    assert_eq!(guest.read(0, last, 4096), (OK, data));
}
