//! Sectors of 512 bytes on a namespace with blocks of 4096: whatever is written in part, the rest of the block stays.

use std::thread;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use crate::daemons::{Attach, Directory, Export};
use crate::front_end::{DATA, FrontEnd, IOERR, OK, SECTOR, Setup, kind};
use crate::keeper::{KEEP, Keeper, SUSPEND};
use crate::noise::noise;
use crate::outages::{BACK, QUICK, WHILE, await_logged};
use crate::proxy::Proxy;
use crate::ring::{into, out};

const EMULATE: &str = "--emulate-512";
/// Storage with commands under way at any time.
const SLOW: &str = "ram:8M,block-size=4096,fault=delay=1ms-20ms:read,fault=delay=1ms-20ms:write";
/// Sectors that the tests work on, so few that requests meet all the time.
const SECTORS: u64 = 96;
/// Rings of a guest.
const RINGS: usize = 4;
/// Requests on a ring at once.
const DEPTH: usize = 12;

fn rings(attach: &Attach) -> FrontEnd {
    let setup = Setup {
        rings: RINGS,
        ..Setup::default()
    };
    FrontEnd::connect_with(&attach.socket, setup)
}

/// What the first sectors hold.
struct Model(Vec<u8>);

impl Model {
    /// Writes all of them.
    fn fill(guest: &mut FrontEnd) -> Self {
        let data = noise((SECTORS * SECTOR) as usize, 7);
        assert_eq!(guest.write(0, 0, &data), OK);
        Self(data)
    }

    fn at(&mut self, sector: u64, count: u64) -> &mut [u8] {
        &mut self.0[(sector * SECTOR) as usize..((sector + count) * SECTOR) as usize]
    }

    /// Reads all of them, in pieces that keep to no block.
    #[track_caller]
    fn check(&mut self, guest: &mut FrontEnd) {
        for (sector, count) in [(0, 1), (1, 30), (31, 9), (40, 8), (48, SECTORS - 48)] {
            let (status, read) = guest.read(0, sector, (count * SECTOR) as usize);
            assert_eq!(status, OK);
            let expected = self.at(sector, count);
            let differs = |(found, expected): (&[u8], &[u8])| found != expected;
            let size = SECTOR as usize;
            let mut sectors = read.chunks(size).zip(expected.chunks(size));
            if let Some(at) = sectors.position(differs) {
                panic!("sector {} is not what was written", sector + at as u64);
            }
        }
    }
}

/// One batch: as many requests as the rings take, none of which touches a sector of another, though all touch the
/// same few blocks. Half of them write. Their data is at places of their own.
struct Batch {
    writes: Vec<(u64, u64, Vec<u8>)>,
    /// Requests on each ring.
    counts: [usize; RINGS],
}

impl Batch {
    /// Adds it to the rings, and rings the bells.
    fn submit(guest: &mut FrontEnd, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut writes = Vec::new();
        let mut sector = random.u64(0..3);
        let mut pieces = Vec::new();
        while pieces.len() < RINGS * DEPTH {
            let most = if random.u8(..) < 40 { 20 } else { 2 };
            let count = random.u64(1..=most);
            if sector + count > SECTORS {
                break;
            }
            pieces.push((sector, count));
            sector += count + random.u64(0..2);
        }
        random.shuffle(&mut pieces);
        let mut counts = [0; RINGS];
        for (index, &(sector, count)) in pieces.iter().enumerate() {
            let (ring, slot) = (index % RINGS, index / RINGS);
            counts[ring] += 1;
            let at = DATA + index as u64 * 20 * SECTOR;
            let len = (count * SECTOR) as usize;
            if random.bool() {
                let data = noise(len, seed << 8 | index as u64);
                guest.memory.write(at, &data);
                let buffers = [out(at, 256), out(at + 256, len as u32 - 256)];
                guest.add(ring, slot, kind::WRITE, sector, &buffers);
                writes.push((sector, count, data));
            } else {
                guest.add(ring, slot, kind::READ, sector, &[into(at, len as u32)]);
            }
        }
        for ring in 0..RINGS {
            guest.rings[ring].submit();
        }
        Self { writes, counts }
    }

    /// Waits until all of it is answered, and well.
    #[track_caller]
    fn finish(self, guest: &mut FrontEnd, model: &mut Model) {
        for (ring, count) in self.counts.into_iter().enumerate() {
            guest.rings[ring].wait(count);
            for slot in 0..count {
                assert_eq!(guest.status(ring, slot), OK, "ring {ring}, request {slot}");
            }
        }
        for (sector, count, data) in self.writes {
            model.at(sector, count).copy_from_slice(&data);
        }
    }
}

/// Writes and reads sectors on all rings at once, batch after batch.
#[track_caller]
fn work(guest: &mut FrontEnd, model: &mut Model, batches: std::ops::Range<u64>) {
    for seed in batches {
        Batch::submit(guest, seed).finish(guest, model);
        eprintln!("batch {seed}");
        model.check(guest);
    }
}

fn config(guest: &mut FrontEnd, offset: u32, len: usize) -> Vec<u8> {
    let (flags, buffer) = (VhostUserConfigFlags::WRITABLE, vec![0; len]);
    let config = guest
        .frontend
        .get_config(offset, len as u32, flags, &buffer);
    config.expect("GET_CONFIG").1
}

#[test]
fn a_guest_sees_sectors_and_what_it_writes_to_one_changes_no_other() {
    let export = Export::start(&["ram:8M,block-size=4096"]);
    for mut disk in [
        Attach::start_with(&[EMULATE], export.uri()),
        Attach::start_with(&[EMULATE, "--data-digest", "--hdr-digest"], export.uri()),
        Attach::serve(&[EMULATE], "ram:8M,block-size=4096"),
    ] {
        let mut guest = rings(&disk);
        assert_eq!(config(&mut guest, 0, 8), 16384u64.to_le_bytes());
        assert_eq!(config(&mut guest, 20, 4), 512u32.to_le_bytes());
        // log2 of sectors in a block, where the first begins, and the least that is good.
        assert_eq!(config(&mut guest, 24, 4), [3, 0, 8, 0]);
        let mut model = Model::fill(&mut guest);
        work(&mut guest, &mut model, 0..40);
        assert_eq!(guest.flush(0), OK);
        let last = (8 << 20) / SECTOR - 1;
        assert_eq!(guest.write(1, last, &[3; 512]), OK);
        assert_eq!(guest.read(2, last, 512), (OK, vec![3; 512]));
        assert_eq!(guest.write(1, last, &[3; 1024]), IOERR, "the end");
        drop(guest);
        disk.stop();
        assert!(disk.counter("unaligned") > 500);
        assert_eq!(disk.counter("errors"), 1);
    }
}

#[test]
fn requests_of_a_file_that_takes_no_unaligned_memory_are_as_right() {
    let directory = Directory::new();
    let path = directory.path("disk.img");
    std::fs::write(&path, vec![0; 1 << 20]).expect("an image");
    for options in ["", ",direct"] {
        let spec = format!("{}{options},block-size=4096", path.display());
        let disk = Attach::serve(&[EMULATE], &spec);
        let mut guest = rings(&disk);
        let mut model = Model::fill(&mut guest);
        work(&mut guest, &mut model, 0..10);
    }
}

#[test]
fn zeroes_end_where_they_are_asked_to_and_a_discard_takes_whole_blocks_alone() {
    let export = Export::start(&["ram:8M,block-size=4096"]);
    let mut disk = Attach::start_with(&[EMULATE], export.uri());
    let mut guest = rings(&disk);
    let mut model = Model::fill(&mut guest);
    for (sector, count) in [(3, 2), (6, 3), (17, 30), (56, 8), (65, 7), (72, 9)] {
        assert_eq!(guest.range(kind::WRITE_ZEROES, sector, count, 0), OK);
        model.at(sector, count.into()).fill(0);
        model.check(&mut guest);
    }
    let mut model = Model::fill(&mut guest);
    // The backend fills discarded blocks with zeroes.
    assert_eq!(guest.range(kind::DISCARD, 3, 30, 0), OK);
    model.at(8, 24).fill(0);
    model.check(&mut guest);
    assert_eq!(guest.range(kind::DISCARD, 41, 10, 0), OK);
    model.check(&mut guest);
    let end = u64::from(8u32 << 20) / SECTOR;
    assert_eq!(guest.range(kind::WRITE_ZEROES, end - 3, 4, 0), IOERR);
    drop(guest);
    disk.stop();
    assert_eq!(disk.counter("errors"), 1);
}

#[test]
fn without_the_option_such_requests_fail_and_one_line_names_it() {
    let export = Export::start(&["ram:8M,block-size=4096"]);
    let disk = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&disk.socket);
    for _ in 0..10 {
        assert_eq!(guest.write(0, 1, &[1; 512]), IOERR);
        assert_eq!(guest.read(0, 8, 512).0, IOERR);
    }
    let lines = disk.process.stderr();
    let lines = lines.iter().filter(|line| line.contains(EMULATE));
    // The first, the second, the fourth, ...
    assert_eq!(lines.count(), 5);
}

#[test]
fn a_path_that_is_lost_between_reading_a_block_and_writing_it_is_not_noticed() {
    let export = Export::start(&[SLOW]);
    let proxy = Proxy::start(export.address());
    let args = [&QUICK[..], &[EMULATE]].concat();
    let mut disk = Attach::start_with(&args, &proxy.uri(export.subsystem()));
    let mut guest = rings(&disk);
    let mut model = Model::fill(&mut guest);
    for round in 0..8 {
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(5 + 9 * round));
                proxy.cut_hosts_off();
            });
            work(&mut guest, &mut model, 100 + round..101 + round);
        });
        await_logged(&disk, BACK, round as usize + 1);
    }
    drop(guest);
    disk.stop();
    assert_eq!(disk.counter("errors"), 0);
    let replayed = disk.process.logged(BACK);
    let replayed = replayed
        .iter()
        .filter_map(|fields| fields["replayed"].as_u64());
    assert!(replayed.sum::<u64>() > 0, "nothing was ever in flight");
}

#[test]
fn a_daemon_that_is_killed_between_reading_a_block_and_writing_it_is_not_noticed() {
    let export = Export::start(&[SLOW]);
    let args = [&QUICK[..], &[EMULATE]].concat();
    let directory = Directory::new();
    let socket = directory.path("disk.sock");
    let mut disk = Attach::start_at(&socket, &args, export.uri());
    let setup = Setup {
        rings: RINGS,
        ..Setup::default()
    };
    let mut keeper = Keeper::connect(&socket, setup, KEEP);
    let mut model = Model::fill(&mut keeper.guest);
    for round in 0..4 {
        let batch = Batch::submit(&mut keeper.guest, 200 + round);
        thread::sleep(Duration::from_millis(5 + 9 * round));
        drop(disk);
        disk = Attach::start_at(&socket, &args, export.uri());
        keeper.reconnect(&socket);
        batch.finish(&mut keeper.guest, &mut model);
        eprintln!("round {round}");
        model.check(&mut keeper.guest);
    }
    drop(keeper);
    disk.stop();
    assert_eq!(disk.counter("errors"), 0);
}

#[test]
fn what_a_killed_daemon_writes_late_undoes_no_sector_that_another_ring_has_written_since() {
    let slow = "ram:8M,block-size=4096,fault=delay=1500ms:write:after=1:count=1";
    // The target holds a write back, and does not learn that its host is gone.
    let export = Export::start_silent(&[slow]);
    let proxy = Proxy::start(export.address());
    let uri = proxy.uri(export.subsystem());
    let args = [&QUICK[..], &[EMULATE]].concat();
    let directory = Directory::new();
    let socket = directory.path("disk.sock");
    let disk = Attach::start_at(&socket, &args, &uri);
    let setup = Setup {
        rings: 2,
        ..Setup::default()
    };
    let mut keeper = Keeper::connect(&socket, setup, KEEP);
    assert_eq!(keeper.guest.write(0, 0, &[1; 4096]), OK);
    let post = |guest: &mut FrontEnd, ring: usize, sector: u64, byte: u8| {
        let at = DATA + 4096 * (1 + sector);
        guest.memory.write(at, &[byte; 512]);
        guest.add(ring, 7, kind::WRITE, sector, &[out(at, 512)]);
        guest.rings[ring].submit();
    };
    post(&mut keeper.guest, 1, 0, 2);
    thread::sleep(WHILE);
    drop(disk);
    let _disk = Attach::start_at(&socket, &args, &uri);
    keeper.reconnect_slowly(&socket, |guest| {
        post(guest, 0, 1, 3);
        thread::sleep(WHILE);
    });
    keeper.guest.rings[0].wait(1);
    keeper.guest.rings[1].wait(1);
    assert_eq!([0, 1].map(|ring| keeper.guest.status(ring, 7)), [OK; 2]);
    // The late one has come by now.
    thread::sleep(Duration::from_millis(1500));
    let block = [[2; 512].as_slice(), &[3; 512], &[1; 3072]].concat();
    assert_eq!(keeper.guest.read(0, 0, 4096), (OK, block));
}

#[test]
fn rings_that_are_suspended_leave_what_waits_for_others_as_well() {
    let export = Export::start(&[SLOW]);
    let args = [&QUICK[..], &[EMULATE]].concat();
    let mut disk = Attach::start_with(&args, export.uri());
    let setup = Setup {
        rings: RINGS,
        ..Setup::default()
    };
    let mut keeper = Keeper::connect(&disk.socket, setup, SUSPEND);
    let mut model = Model::fill(&mut keeper.guest);
    for round in 0..4 {
        let batch = Batch::submit(&mut keeper.guest, 300 + round);
        thread::sleep(Duration::from_millis(3 + 5 * round));
        for ring in 0..RINGS {
            let base = keeper.guest.frontend.get_vring_base(ring);
            base.expect("GET_VRING_BASE");
        }
        keeper.reconnect(&disk.socket);
        batch.finish(&mut keeper.guest, &mut model);
        eprintln!("round {round}");
        model.check(&mut keeper.guest);
    }
    drop(keeper);
    disk.stop();
    assert_eq!(disk.counter("errors"), 0);
}

#[test]
fn a_block_that_cannot_be_read_or_written_fails_what_needs_it_and_nothing_else() {
    for (fault, write) in [
        ("fault=error=unrecovered-read-error+dnr:read:lba=1", IOERR),
        ("fault=error=write-fault+dnr:write:lba=1", IOERR),
        ("fault=error=write-fault+dnr:write:lba=5", OK),
    ] {
        let export = Export::start(&[&format!("ram:8M,block-size=4096,{fault}")]);
        let disk = Attach::start_with(&[EMULATE], export.uri());
        let mut guest = rings(&disk);
        assert_eq!(guest.write(0, 0, &[1; 4096]), OK);
        assert_eq!(guest.write(0, 16, &[2; 4096]), OK);
        assert_eq!(guest.write(0, 12, &[3; 512]), write, "{fault}");
        // At the end of it, and at the start.
        assert_eq!(guest.write(1, 4, &[4; 2560]), write, "{fault}");
        assert_eq!(guest.write(1, 15, &[5; 2560]), write, "{fault}");
        assert_eq!(guest.write(2, 19, &[6; 512]), OK);
        let (status, read) = guest.read(3, 19, 512);
        assert_eq!((status, read), (OK, vec![6; 512]));
        let (status, read) = guest.read(3, 0, 2048);
        assert_eq!((status, read), (OK, vec![1; 2048]));
    }
}

#[test]
fn a_ring_stops_when_what_waits_for_others_is_done_too() {
    let export = Export::start(&["ram:8M,block-size=4096"]);
    let disk = Attach::start_with(&[EMULATE], export.uri());
    let mut guest = rings(&disk);
    assert_eq!(guest.write(0, 0, &[1; 4096]), OK);
    export.process.pause();
    for slot in 0..8 {
        let at = DATA + 512 * slot;
        guest.memory.write(at, &[10 + slot as u8; 512]);
        let ring = slot as usize % 2;
        guest.add(ring, slot as usize / 2, kind::WRITE, slot, &[out(at, 512)]);
    }
    guest.rings[0].submit();
    guest.rings[1].submit();
    assert!(guest.rings[0].is_silent(WHILE));
    let frontend = guest.frontend.clone();
    let stopping = thread::spawn(move || frontend.get_vring_base(0).expect("GET_VRING_BASE"));
    thread::sleep(WHILE);
    assert!(!stopping.is_finished());
    export.process.resume();
    assert_eq!(stopping.join().expect("an answer"), 5);
    assert_eq!([0, 1, 2, 3].map(|slot| guest.status(0, slot)), [OK; 4]);
    guest.rings[1].wait(4);
    for slot in 0..8 {
        assert_eq!(guest.read(1, slot, 512).1, [10 + slot as u8; 512]);
    }
}

#[test]
fn a_ring_that_is_late_fails_what_waits_for_others_as_well() {
    let export = Export::start(&["ram:8M,block-size=4096"]);
    let proxy = Proxy::start(export.address());
    let args = [&QUICK[..], &[EMULATE, "--drain-timeout", "1"]].concat();
    let disk = Attach::start_with(&args, &proxy.uri(export.subsystem()));
    let mut guest = rings(&disk);
    assert_eq!(guest.write(0, 0, &[1; 4096]), OK);
    proxy.silence(true);
    for slot in 0..6 {
        guest.add(
            slot % 2,
            slot / 2,
            kind::WRITE,
            slot as u64,
            &[out(DATA, 512)],
        );
    }
    guest.rings[0].submit();
    guest.rings[1].submit();
    // All are taken, and the first of them is lost.
    let lost = |line: &str| line.contains("association lost");
    disk.process.await_log(lost);
    assert!(guest.rings[1].is_silent(WHILE));
    guest.frontend.get_vring_base(1).expect("GET_VRING_BASE");
    assert_eq!([0, 1, 2].map(|slot| guest.status(1, slot)), [IOERR; 3]);
    proxy.silence(false);
    proxy.cut_hosts_off();
    guest.rings[0].wait(3);
    assert_eq!([0, 1, 2].map(|slot| guest.status(0, slot)), [OK; 3]);
}

#[test]
fn limits_count_what_the_guest_asks_for_and_not_what_that_takes() {
    let mut disk = Attach::serve(
        &[EMULATE, "--iops=200", "--iops-burst=1"],
        "ram:8M,block-size=4096",
    );
    let mut guest = rings(&disk);
    let began = std::time::Instant::now();
    for sector in 0..100 {
        assert_eq!(guest.write(0, 2 * sector + 1, &[sector as u8; 512]), OK);
    }
    let took = began.elapsed();
    assert!(took > Duration::from_millis(480), "{took:?}");
    assert!(took < Duration::from_millis(1500), "{took:?}");
    drop(guest);
    disk.stop();
    assert_eq!(disk.counter("unaligned"), 100);
    assert_eq!(disk.counter("commands"), 200);
}
