//! Targets that can be asked whether a controller that was lost is done: writes wait for the answer, and not for its
//! keep-alive time.

use std::thread;
use std::time::{Duration, Instant};

use crate::daemons::{Attach, Export};
use crate::front_end::{DATA, FrontEnd, OK, Setup, kind};
use crate::inflight::{Disk, post};
use crate::keeper::{KEEP, Keeper};
use crate::multipath::{DETECTION, TwoPaths};
use crate::outages::{WHILE, await_logged, await_status};
use crate::proxy::Proxy;
use crate::ring::out;

/// The answer.
const ENDED: &str = "the controller says that nothing of a lost association is carried out any more: its fences end";
/// Keep-alive times that nobody waits for here, and attempts as often as there can be.
const LONG: [&str; 4] = ["--keep-alive-tmo", "30", "--reconnect-delay", "1"];
/// The target holds the first write back for so long, and does not learn that its host is gone.
const SLOW: &str = "ram:8M,fault=delay=1500ms:write:count=1";
const HELD_BACK: Duration = Duration::from_millis(1500);
/// What an attempt to connect and a few commands take on a busy machine: far less than any keep-alive time.
const PROMPT: Duration = Duration::from_millis(1400);

/// Two writes to the same blocks, the second when the first was answered again.
fn overlapping(guest: &mut FrontEnd, since: Instant) {
    guest.rings[0].wait(1);
    assert_eq!(guest.status(0, 0), OK);
    let second = DATA + 0x10_0000;
    guest.memory.write(second, &[2; 4096]);
    guest.add(0, 1, kind::WRITE, 4, &[out(second, 4096)]);
    guest.rings[0].submit();
    await_status(guest, 0, 1);
    let held = since.elapsed();
    guest.rings[0].wait(1);
    eprintln!("it was held for {held:?}");
    assert!(held < PROMPT, "it was held for {held:?}");
    // By now the first has been carried out a second time, if it ever is.
    thread::sleep((HELD_BACK + WHILE).saturating_sub(since.elapsed()));
    let content = guest.read(0, 0, 12 * 512);
    let expected = [vec![1; 2048], vec![2; 4096]].concat();
    assert_eq!(content.0, OK);
    assert!(content.1 == expected, "the first write came last");
}

fn first(guest: &mut FrontEnd) {
    guest.memory.write(DATA, &[1; 4096]);
    guest.add(0, 0, kind::WRITE, 0, &[out(DATA, 4096)]);
    guest.rings[0].submit();
    thread::sleep(WHILE);
}

#[test]
fn a_later_write_waits_for_the_next_association_and_its_answer_alone() {
    let export = Export::start(&[SLOW]);
    let proxy = Proxy::start(export.address());
    let mut attach = Attach::start_with(&LONG, &proxy.uri(export.subsystem()));
    let mut guest = FrontEnd::connect(&attach.socket);
    first(&mut guest);
    let lost = Instant::now();
    proxy.cut_hosts_off();
    overlapping(&mut guest, lost);
    await_logged(&attach, ENDED, 1);
    let lines = attach.process.logged(ENDED);
    assert_eq!(
        (&lines[0]["ended"], &lines[0]["left"]),
        (&1.into(), &0.into())
    );
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}

#[test]
fn what_the_target_cannot_recall_is_waited_for() {
    // From one association to the next, and from one life to the next.
    let slow = format!("{SLOW}:firm");
    let export = || {
        let export = Export::start(&[&slow]);
        let proxy = Proxy::start(export.address());
        let uri = proxy.uri(export.subsystem());
        (export, proxy, uri)
    };
    let late = |began: Instant, content: Vec<u8>| {
        let held = began.elapsed();
        assert!(held >= HELD_BACK, "it was held for {held:?}");
        assert!(held < HELD_BACK + PROMPT, "it was held for {held:?}");
        assert!(content == [2; 4096], "the first write came last");
    };
    let (export_of_one, proxy, uri) = export();
    let attach = Attach::start_with(&LONG, &uri);
    let mut guest = FrontEnd::connect(&attach.socket);
    let began = Instant::now();
    first(&mut guest);
    proxy.cut_hosts_off();
    guest.rings[0].wait(1);
    assert_eq!(guest.write(0, 0, &[2; 4096]), OK);
    late(began, guest.read(0, 0, 4096).1);
    drop((attach, export_of_one));

    let (_export, _proxy, uri) = export();
    let mut disk = Disk::new();
    disk.start_with(&LONG, &uri);
    let mut keeper = Keeper::connect(disk.socket(), Setup::default(), KEEP);
    let began = Instant::now();
    post(&mut keeper, 0, 0, 0, 1);
    thread::sleep(WHILE);
    disk.start_with(&LONG, &uri);
    keeper.reconnect(disk.socket());
    keeper.guest.rings[0].wait(1);
    assert_eq!(keeper.guest.write(0, 0, &[2; 4096]), OK);
    late(began, keeper.guest.read(0, 0, 4096).1);
    assert_eq!(disk.stop().counter("errors"), 0);
}

#[test]
fn another_path_is_asked_about_one_that_is_cut_off_and_does_not_come_back() {
    let paths = TwoPaths::start(SLOW);
    let mut attach = paths.attach_with(&LONG, &[]);
    let setup = Setup {
        rings: 2,
        ..Setup::default()
    };
    let mut guest = FrontEnd::connect_with(&attach.socket, setup);
    first(&mut guest);
    let lost = Instant::now();
    paths.proxies[0].silence(true);
    paths.proxies[0].cut_hosts_off();
    overlapping(&mut guest, lost);
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}

#[test]
fn a_path_that_swallows_everything_costs_its_detection_and_no_fence() {
    // The commands are under way, and the target never gets them; so it can answer at once.
    let paths = TwoPaths::start("ram:8M");
    let mut attach = paths.attach(&[]);
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 64, &[9; 512]), OK);
    paths.proxies[0].silence(true);
    let began = Instant::now();
    first(&mut guest);
    guest.rings[0].wait(1);
    let detected = began.elapsed();
    assert!(detected < DETECTION, "{detected:?}");
    assert_eq!(guest.write(0, 0, &[2; 512]), OK);
    let held = began.elapsed() - detected;
    assert!(held < WHILE, "it was held for {held:?}");
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}

#[test]
fn what_a_killed_daemon_has_sent_is_asked_about_by_the_next() {
    let export = Export::start(&[SLOW]);
    let proxy = Proxy::start(export.address());
    let uri = proxy.uri(export.subsystem());
    let mut disk = Disk::new();
    disk.start_with(&LONG, &uri);
    let mut keeper = Keeper::connect(disk.socket(), Setup::default(), KEEP);
    post(&mut keeper, 0, 0, 0, 1);
    thread::sleep(WHILE);
    let killed = Instant::now();
    disk.start_with(&LONG, &uri);
    keeper.reconnect(disk.socket());
    keeper.guest.rings[0].wait(1);
    assert_eq!(keeper.guest.status(0, 0), OK);
    post(&mut keeper, 0, 1, 0, 2);
    await_status(&keeper.guest, 0, 1);
    let held = killed.elapsed();
    keeper.guest.rings[0].wait(1);
    eprintln!("it was held for {held:?}");
    assert!(held < PROMPT, "it was held for {held:?}");
    thread::sleep((HELD_BACK + WHILE).saturating_sub(killed.elapsed()));
    let (status, bytes) = keeper.guest.read(0, 0, 4096);
    assert_eq!(status, OK);
    assert!(bytes == [2; 4096], "the first write came last");
    // What the life before the last has left is not feared by anybody any more.
    let killed = Instant::now();
    disk.start_with(&LONG, &uri);
    keeper.reconnect(disk.socket());
    post(&mut keeper, 0, 2, 0, 3);
    await_status(&keeper.guest, 0, 2);
    assert!(killed.elapsed() < PROMPT, "{:?}", killed.elapsed());
    assert_eq!(disk.stop().counter("errors"), 0);
}

#[test]
fn what_two_lives_have_left_is_asked_about_by_a_third_when_the_target_is_there() {
    let export = Export::start(&[SLOW]);
    let proxy = Proxy::start(export.address());
    let uri = proxy.uri(export.subsystem());
    let mut disk = Disk::new();
    disk.start_with(&LONG, &uri);
    let mut keeper = Keeper::connect(disk.socket(), Setup::default(), KEEP);
    post(&mut keeper, 0, 0, 0, 1);
    thread::sleep(WHILE);
    // The first life loses its way, and ends with a fence.
    proxy.silence(true);
    proxy.cut_hosts_off();
    disk.attach()
        .process
        .await_log(|line| line.contains("association lost"));
    thread::sleep(WHILE);
    disk.kill();
    proxy.silence(false);
    let back = Instant::now();
    disk.start_with(&LONG, &uri);
    keeper.reconnect(disk.socket());
    keeper.guest.rings[0].wait(1);
    post(&mut keeper, 0, 1, 0, 2);
    await_status(&keeper.guest, 0, 1);
    let held = back.elapsed();
    eprintln!("it was held for {held:?}");
    assert!(held < PROMPT, "it was held for {held:?}");
    keeper.guest.rings[0].wait(1);
    thread::sleep(HELD_BACK);
    assert_eq!(keeper.guest.read(0, 0, 4096), (OK, vec![2; 4096]));
    assert_eq!(disk.stop().counter("errors"), 0);
}

#[test]
fn another_host_name_is_not_answered_for_and_time_alone_tells() {
    let export = Export::start(&[SLOW]);
    let proxy = Proxy::start(export.address());
    let uri = proxy.uri(export.subsystem());
    let as_another = ["--hostnqn", "nqn.2026-01.org.example:another", "--hostid"];
    let as_another = [&as_another[..], &["6ba7b810-9dad-41d1-80b4-00c04fd430c8"]].concat();
    let mut disk = Disk::new();
    disk.start(&[], &uri);
    let mut keeper = Keeper::connect(disk.socket(), Setup::default(), KEEP);
    post(&mut keeper, 0, 0, 0, 1);
    thread::sleep(WHILE);
    let killed = Instant::now();
    disk.start(&as_another, &uri);
    keeper.reconnect(disk.socket());
    keeper.guest.rings[0].wait(1);
    post(&mut keeper, 0, 1, 0, 2);
    await_status(&keeper.guest, 0, 1);
    let held = killed.elapsed();
    keeper.guest.rings[0].wait(1);
    eprintln!("it was held for {held:?}");
    assert!(held > Duration::from_secs(2), "it was held for {held:?}");
    assert!(disk.attach().process.logged(ENDED).is_empty());
    assert_eq!(disk.stop().counter("errors"), 0);
}
