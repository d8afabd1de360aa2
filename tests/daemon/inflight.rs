//! Daemons that end with requests in flight, and those that go on where they were: nothing is lost, nothing is answered
//! twice, and what the earlier one has sent undoes nothing.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use vhost::VhostBackend;

use crate::daemons::{Attach, Directory, Export};
use crate::front_end::{DATA, OK, Setup, UNANSWERED, kind};
use crate::keeper::{KEEP, Keeper, SUSPEND};
use crate::outages::{FENCED, QUICK, WHILE, await_logged, await_status};
use crate::proxy::Proxy;
use crate::ring::{into, out};

/// The next daemon goes on with them.
const GOES_ON: &str = "requests of an earlier life go on";
/// What a daemon needs to start, and a busy machine.
const PROMPT: Duration = Duration::from_millis(1500);

/// A disk whose daemons come and go at one socket.
pub(crate) struct Disk {
    directory: Directory,
    attach: Option<Attach>,
}

impl Disk {
    pub(crate) fn new() -> Self {
        Self {
            directory: Directory::new(),
            attach: None,
        }
    }

    pub(crate) fn start(&mut self, args: &[&str], uri: &str) -> &Attach {
        self.start_with(&[&QUICK[..], args].concat(), uri)
    }

    pub(crate) fn start_with(&mut self, args: &[&str], uri: &str) -> &Attach {
        // The one before is gone, with SIGKILL.
        drop(self.attach.take());
        self.attach.insert(Attach::start_at(
            &self.directory.path("disk.sock"),
            args,
            uri,
        ))
    }

    pub(crate) fn attach(&self) -> &Attach {
        self.attach.as_ref().expect("it runs")
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.attach().socket
    }

    pub(crate) fn kill(&mut self) {
        drop(self.attach.take());
    }

    pub(crate) fn stop(&mut self) -> Attach {
        let mut attach = self.attach.take().expect("it runs");
        attach.stop();
        attach
    }
}

fn fill(keeper: &Keeper, slot: usize, byte: u8) -> u64 {
    let at = DATA + 4096 * slot as u64;
    keeper.guest.memory.write(at, &[byte; 4096]);
    at
}

/// Posts a write of 4 KiB to a ring.
pub(crate) fn post(keeper: &mut Keeper, ring: usize, slot: usize, block: u64, byte: u8) {
    let at = fill(keeper, slot, byte);
    keeper
        .guest
        .add(ring, slot, kind::WRITE, 8 * block, &[out(at, 4096)]);
    keeper.guest.rings[ring].submit();
}

#[test]
fn what_was_in_flight_when_a_daemon_was_killed_is_done_by_the_next_once() {
    let export = Export::start(&["ram:8M"]);
    let mut disk = Disk::new();
    disk.start(&["--nr-io-queues", "2"], export.uri());
    let setup = Setup {
        rings: 3,
        ..Setup::default()
    };
    let mut keeper = Keeper::connect(disk.socket(), setup, KEEP);
    for ring in 0..3 {
        assert_eq!(keeper.guest.write(ring, 512, &[9; 512]), OK);
    }
    export.process.pause();
    for ring in 0..3 {
        for slot in 0..20 {
            let block = (20 * ring + slot) as u64;
            post(&mut keeper, ring, 20 * ring + slot, block, block as u8 + 1);
        }
        // Reads and flushes, too.
        let at = DATA + 4096 * (100 + ring as u64);
        keeper.guest.memory.write(at, &[0x77; 512]);
        keeper
            .guest
            .add(ring, 61, kind::READ, 512, &[into(at, 512)]);
        keeper.guest.add(ring, 62, kind::FLUSH, 0, &[]);
        keeper.guest.rings[ring].submit();
    }
    thread::sleep(WHILE);
    disk.kill();
    export.process.resume();
    let killed = Instant::now();
    disk.start(&["--nr-io-queues", "2"], export.uri());
    keeper.reconnect(disk.socket());
    for ring in 0..3 {
        keeper.guest.rings[ring].wait(22);
    }
    assert!(killed.elapsed() < PROMPT, "{:?}", killed.elapsed());
    for ring in 0..3 {
        for slot in 0..20 {
            assert_eq!(keeper.guest.status(ring, 20 * ring + slot), OK);
        }
        assert_eq!(keeper.guest.status(ring, 61), OK);
        assert_eq!(keeper.guest.status(ring, 62), OK);
        let at = DATA + 4096 * (100 + ring as u64);
        assert!(keeper.guest.memory.read(at, 512) == [9; 512]);
    }
    for block in 0..60 {
        let (status, bytes) = keeper.guest.read(0, 8 * block, 4096);
        assert_eq!(status, OK);
        assert!(bytes == [block as u8 + 1; 4096], "block {block}");
    }
    let attach = disk.stop();
    assert_eq!(attach.counter("errors"), 0);
}

#[test]
fn a_write_that_a_killed_daemon_has_sent_does_not_undo_a_later_one() {
    // The target holds the first write back, and does not learn that the host is gone.
    let export = Export::start_silent(&["ram:8M,fault=delay=1500ms:write:count=1"]);
    let proxy = Proxy::start(export.address());
    let uri = proxy.uri(export.subsystem());
    let mut disk = Disk::new();
    disk.start(&[], &uri);
    let mut keeper = Keeper::connect(disk.socket(), Setup::default(), KEEP);
    post(&mut keeper, 0, 0, 0, 1);
    thread::sleep(WHILE);
    let killed = Instant::now();
    disk.start(&[], &uri);
    keeper.reconnect(disk.socket());
    keeper.guest.rings[0].wait(1);
    assert_eq!(keeper.guest.status(0, 0), OK);
    assert!(killed.elapsed() < PROMPT, "{:?}", killed.elapsed());
    post(&mut keeper, 0, 1, 0, 2);
    // Writes elsewhere are not held up behind it, also when there is another daemon.
    post(&mut keeper, 0, 2, 5, 3);
    await_status(&keeper.guest, 0, 2);
    assert_eq!(keeper.guest.status(0, 1), UNANSWERED);
    disk.start(&[], &uri);
    keeper.reconnect(disk.socket());
    post(&mut keeper, 0, 3, 6, 3);
    await_status(&keeper.guest, 0, 3);
    await_status(&keeper.guest, 0, 1);
    let held = killed.elapsed();
    keeper.guest.rings[0].wait(3);
    thread::sleep(FENCED.saturating_sub(killed.elapsed()));
    let (status, bytes) = keeper.guest.read(0, 0, 4096);
    assert_eq!(status, OK);
    assert!(bytes == [2; 4096], "the first write came last");
    eprintln!("it was held for {held:?}");
    assert!(held >= FENCED, "it was held for {held:?}");
    assert!(held < 3 * FENCED, "it was held for {held:?}");
    assert_eq!(disk.stop().counter("errors"), 0);
}

#[test]
fn a_front_end_that_comes_back_while_the_target_is_away_is_served_at_once_and_its_requests_wait() {
    let export = Export::start(&["ram:8M"]);
    let proxy = Proxy::start(export.address());
    let mut disk = Disk::new();
    disk.start(&[], &proxy.uri(export.subsystem()));
    let mut keeper = Keeper::connect(disk.socket(), Setup::default(), KEEP);
    post(&mut keeper, 0, 0, 0, 1);
    keeper.guest.rings[0].wait(1);
    proxy.silence(true);
    for slot in 1..20 {
        post(&mut keeper, 0, slot, slot as u64, slot as u8);
    }
    thread::sleep(WHILE);
    for _ in 0..3 {
        let left = Instant::now();
        keeper.reconnect(disk.socket());
        let back = left.elapsed();
        assert!(back < Duration::from_secs(1), "it took {back:?}");
    }
    assert!(keeper.guest.rings[0].is_silent(WHILE));
    proxy.silence(false);
    proxy.cut_hosts_off();
    keeper.guest.rings[0].wait(19);
    for slot in 1..20 {
        assert_eq!(keeper.guest.status(0, slot), OK);
        let (status, bytes) = keeper.guest.read(0, 8 * slot as u64, 4096);
        assert_eq!((status, bytes), (OK, vec![slot as u8; 4096]));
    }
    assert_eq!(disk.stop().counter("errors"), 0);
}

#[test]
fn a_daemon_that_is_told_to_end_leaves_what_waits_and_the_next_needs_no_fences() {
    let ram = "ram:8M,uuid=6ba7b810-9dad-41d1-80b4-00c04fd430c8";
    let mut export = Export::start(&[ram]);
    let address = export.address().to_owned();
    let (uri, directory) = (export.subsystem().to_owned(), Directory::new());
    let state = directory.path("state");
    let args = ["--state-dir", state.to_str().expect("UTF-8")];
    let mut disk = Disk::new();
    disk.start(&args, &uri);
    let mut keeper = Keeper::connect(disk.socket(), Setup::default(), KEEP);
    post(&mut keeper, 0, 0, 0, 1);
    keeper.guest.rings[0].wait(1);
    export.stop();
    await_logged_lost(disk.attach());
    for slot in 0..20 {
        post(&mut keeper, 0, slot, slot as u64, slot as u8 + 1);
    }
    thread::sleep(WHILE);
    // Asserts the time.
    let attach = disk.stop();
    assert_eq!(attach.counter("errors"), 0);
    assert!(keeper.guest.rings[0].used().is_empty());
    // The next starts while the target is away, and goes on all the same.
    disk.start(&args, &uri);
    keeper.reconnect(disk.socket());
    await_logged(disk.attach(), GOES_ON, 1);
    assert!(keeper.guest.rings[0].is_silent(WHILE));
    let _export = Export::start_with(&["--listen", &address], &[ram]);
    keeper.guest.rings[0].wait(20);
    assert!((0..20).all(|slot| keeper.guest.status(0, slot) == OK));
    assert_eq!(disk.attach().process.logged(GOES_ON)[0]["fenced"], 0);
}

#[test]
fn a_ring_whose_base_is_asked_for_is_given_back_at_once_with_its_requests_in_flight() {
    let export = Export::start(&["ram:8M"]);
    let mut disk = Disk::new();
    disk.start(&["--nr-io-queues", "2"], export.uri());
    let setup = Setup {
        rings: 2,
        ..Setup::default()
    };
    let mut keeper = Keeper::connect(disk.socket(), setup, SUSPEND);
    for ring in 0..2 {
        assert_eq!(keeper.guest.write(ring, 512, &[9; 512]), OK);
    }
    export.process.pause();
    for ring in 0..2 {
        for slot in 0..20 {
            post(
                &mut keeper,
                ring,
                slot,
                (20 * ring + slot) as u64,
                slot as u8 + 1,
            );
        }
    }
    thread::sleep(WHILE);
    let asked = Instant::now();
    let bases = [0, 1].map(|ring| keeper.guest.frontend.get_vring_base(ring).expect("a base"));
    assert!(
        asked.elapsed() < Duration::from_secs(1),
        "{:?}",
        asked.elapsed()
    );
    assert_eq!(bases, [21, 21]);
    // From then on nothing is touched, whatever the target does.
    let before = keeper.guest.memory.snapshot();
    export.process.resume();
    thread::sleep(WHILE);
    assert!(
        keeper.guest.memory.snapshot() == before,
        "a suspended ring touched the guest's memory"
    );
    // Another daemon goes on with them, as after a migration; the first one is still there.
    let other = Attach::start_with(&QUICK, export.uri());
    keeper.reconnect(&other.socket);
    for ring in 0..2 {
        keeper.guest.rings[ring].wait(20);
        assert!((0..20).all(|slot| keeper.guest.status(ring, slot) == OK));
    }
    for block in 0..40 {
        let (status, bytes) = keeper.guest.read(0, 8 * block, 4096);
        assert_eq!(
            (status, bytes),
            (OK, vec![(block % 20) as u8 + 1; 4096]),
            "block {block}"
        );
    }
    assert_eq!(disk.stop().counter("errors"), 0);
}

#[test]
fn a_ring_that_stops_leaves_what_takes_too_long_if_that_was_asked_for() {
    let export = Export::start(&["ram:8M"]);
    let proxy = Proxy::start(export.address());
    let mut disk = Disk::new();
    let args = ["--drain-timeout=1", "--drain-policy=leave"];
    disk.start(&args, &proxy.uri(export.subsystem()));
    let mut keeper = Keeper::connect(disk.socket(), Setup::default(), KEEP);
    proxy.silence(true);
    for slot in 0..5 {
        post(&mut keeper, 0, slot, slot as u64, slot as u8 + 1);
    }
    thread::sleep(WHILE);
    let asked = Instant::now();
    keeper.guest.frontend.get_vring_base(0).expect("a base");
    let took = asked.elapsed();
    assert!(
        took > Duration::from_millis(900) && took < Duration::from_secs(2),
        "{took:?}"
    );
    assert!(keeper.guest.rings[0].used().is_empty());
    proxy.silence(false);
    proxy.cut_hosts_off();
    // As the machine goes on, the same ring starts with the same region.
    keeper.guest.start(0, 0);
    keeper.guest.rings[0].wait(5);
    assert!((0..5).all(|slot| keeper.guest.status(0, slot) == OK));
    assert_eq!(disk.stop().counter("errors"), 0);
}

#[test]
fn a_region_that_comes_with_another_record_has_all_writes_wait_until_nothing_can_be_late() {
    let export = Export::start(&["ram:8M"]);
    let mut disk = Disk::new();
    disk.start(&[], export.uri());
    let mut keeper = Keeper::connect(disk.socket(), Setup::default(), KEEP);
    assert_eq!(keeper.guest.write(0, 0, &[1; 512]), OK);
    keeper.spoil_tail();
    let began = Instant::now();
    disk.start(&[], export.uri());
    keeper.reconnect(disk.socket());
    let (status, bytes) = keeper.guest.read(0, 0, 512);
    assert_eq!((status, bytes), (OK, vec![1; 512]));
    assert!(began.elapsed() < PROMPT, "reads wait for nothing");
    assert_eq!(keeper.guest.write(0, 0, &[2; 512]), OK);
    assert!(began.elapsed() > FENCED, "{:?}", began.elapsed());
    assert_eq!(keeper.guest.read(0, 0, 512), (OK, vec![2; 512]));
}

#[test]
fn a_request_of_a_new_region_is_not_taken_for_one_that_had_its_number_before() {
    // The target holds the first write back, and does not learn that the host is gone.
    let export = Export::start_silent(&["ram:8M,fault=delay=1500ms:write:count=1"]);
    let proxy = Proxy::start(export.address());
    let mut disk = Disk::new();
    disk.start(&[], &proxy.uri(export.subsystem()));
    let mut keeper = Keeper::connect(disk.socket(), Setup::default(), KEEP);
    post(&mut keeper, 0, 0, 0, 1);
    thread::sleep(WHILE);
    let lost = Instant::now();
    proxy.cut_hosts_off();
    keeper.guest.rings[0].wait(1);
    assert_eq!(keeper.guest.status(0, 0), OK);
    // The machine is reset: its first request has the number of the first one before.
    keeper.guest.frontend.get_vring_base(0).expect("a base");
    keeper.guest.rings[0].restart(0);
    keeper.renew();
    keeper.reconnect(disk.socket());
    post(&mut keeper, 0, 1, 0, 2);
    await_status(&keeper.guest, 0, 1);
    assert!(lost.elapsed() >= FENCED, "{:?}", lost.elapsed());
    thread::sleep(WHILE);
    keeper.guest.rings[0].wait(1);
    let (status, bytes) = keeper.guest.read(0, 0, 4096);
    assert_eq!(status, OK);
    assert!(bytes == [2; 4096], "the first write came last");
}

#[test]
fn fences_are_in_force_on_another_machine_whose_clock_says_nothing_of_them() {
    // The target holds the first write back, and does not learn that the host is gone.
    let export = Export::start_silent(&["ram:8M,fault=delay=1500ms:write:count=1"]);
    let proxy = Proxy::start(export.address());
    let uri = proxy.uri(export.subsystem());
    let mut disk = Disk::new();
    disk.start(&[], &uri);
    let mut keeper = Keeper::connect(disk.socket(), Setup::default(), KEEP);
    post(&mut keeper, 0, 0, 0, 1);
    thread::sleep(WHILE);
    let lost = Instant::now();
    // It is lost, and there is no way back before the end.
    proxy.silence(true);
    proxy.cut_hosts_off();
    await_logged_lost(disk.attach());
    thread::sleep(WHILE);
    disk.kill();
    keeper.change_machine();
    proxy.silence(false);
    disk.start(&[], &uri);
    keeper.reconnect(disk.socket());
    keeper.guest.rings[0].wait(1);
    assert_eq!(keeper.guest.status(0, 0), OK);
    post(&mut keeper, 0, 1, 0, 2);
    await_status(&keeper.guest, 0, 1);
    assert!(lost.elapsed() >= FENCED, "{:?}", lost.elapsed());
    keeper.guest.rings[0].wait(1);
    assert!(keeper.guest.read(0, 0, 4096) == (OK, vec![2; 4096]));
}

#[test]
fn the_cache_mode_that_a_guest_chose_outlives_the_daemon() {
    const WRITEBACK: u32 = 32;
    let mut export = Export::start(&["ram:8M"]);
    let mut disk = Disk::new();
    disk.start(&[], export.uri());
    let mut keeper = Keeper::connect(disk.socket(), Setup::default(), KEEP);
    assert_eq!(keeper.guest.write(0, 0, &[1; 512]), OK);
    assert!(keeper.guest.set_config(WRITEBACK, 0));
    for _ in 0..2 {
        disk.start(&[], export.uri());
        keeper.reconnect(disk.socket());
        assert_eq!(keeper.guest.write(0, 1, &[2; 512]), OK);
    }
    assert!(keeper.guest.set_config(WRITEBACK, 1));
    disk.start(&[], export.uri());
    keeper.reconnect(disk.socket());
    assert_eq!(keeper.guest.write(0, 3, &[4; 512]), OK);
    disk.kill();
    export.stop();
    assert_eq!(
        (export.counter(1, "writes"), export.counter(1, "fua_writes")),
        (4, 2)
    );
}

#[test]
fn a_local_disk_goes_on_where_a_killed_daemon_was() {
    let directory = Directory::new();
    let image = directory.path("disk.img");
    std::fs::File::create(&image)
        .expect("a file")
        .set_len(8 << 20)
        .expect("room");
    let spec = format!("file:{},fault=delay=60s:write:count=5", image.display());
    let serve = Attach::serve(&[], &spec);
    let mut keeper = Keeper::connect(&serve.socket, Setup::default(), KEEP);
    for slot in 0..20 {
        post(&mut keeper, 0, slot, slot as u64, slot as u8 + 1);
    }
    keeper.guest.rings[0].wait(15);
    drop(serve);
    let mut serve = Attach::serve(&[], &format!("file:{}", image.display()));
    keeper.reconnect(&serve.socket);
    keeper.guest.rings[0].wait(5);
    for block in 0..20 {
        assert_eq!(keeper.guest.status(0, block), OK);
        let (status, bytes) = keeper.guest.read(0, 8 * block as u64, 4096);
        assert_eq!((status, bytes), (OK, vec![block as u8 + 1; 4096]));
    }
    drop(keeper);
    serve.stop_by(Signal::TERM);
    assert_eq!(serve.counter("errors"), 0);
}

#[track_caller]
fn await_logged_lost(attach: &Attach) {
    attach
        .process
        .await_log(|line| line.contains("association lost"));
}
