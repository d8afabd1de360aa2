//! A disk with two paths to its namespace, as a guest sees it when one of them goes, or both.

use std::thread;
use std::time::{Duration, Instant};

use crate::daemons::{Attach, Export};
use crate::front_end::{DATA, FrontEnd, IOERR, OK, Setup, UNANSWERED, kind};
use crate::outages::{BACK, FENCED, QUICK, WHILE, await_logged, await_status, under_load};
use crate::proxy::Proxy;
use crate::ring::out;

const ANOTHER: &str = "another path is connected";
const LOST: &str = "association lost";
/// How long a path may be silent before that is noticed, with the keep-alive time of [`QUICK`]: a command that is
/// sent at the end of a period has a period for its answer.
pub(crate) const DETECTION: Duration = Duration::from_millis(2500);

/// One target behind two relays.
pub(crate) struct TwoPaths {
    export: Export,
    pub(crate) proxies: [Proxy; 2],
}

impl TwoPaths {
    pub(crate) fn start(spec: &str) -> Self {
        Self::to(Export::start(&[spec]))
    }

    fn to(export: Export) -> Self {
        let proxy = || Proxy::start(export.address());
        Self {
            proxies: [proxy(), proxy()],
            export,
        }
    }

    fn uri(&self, path: usize) -> String {
        self.proxies[path].uri(self.export.subsystem())
    }

    /// Both are connected, by the first relay first.
    pub(crate) fn attach(&self, args: &[&str]) -> Attach {
        self.attach_with(&QUICK, args)
    }

    pub(crate) fn attach_with(&self, times: &[&str], args: &[&str]) -> Attach {
        let second = self.uri(1);
        let paths = ["--path", &second, "--nr-io-queues", "2"];
        let args = [times, &paths, args].concat();
        let attach = Attach::start_with(&args, &self.uri(0));
        await_logged(&attach, ANOTHER, 1);
        attach
    }
}

fn losses(attach: &Attach) -> usize {
    let lines = attach.process.stderr();
    lines.iter().filter(|line| line.contains(LOST)).count()
}

#[track_caller]
fn await_losses(attach: &Attach, count: usize) {
    let deadline = Instant::now() + Duration::from_secs(8);
    while losses(attach) < count {
        assert!(Instant::now() < deadline, "fewer than {count} losses");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn one_of_two_paths_that_swallows_everything_stalls_a_busy_guest_no_longer_than_its_detection() {
    let paths = TwoPaths::start("ram:64M");
    let mut attach = paths.attach(&[]);
    let longest = under_load(&attach, || {
        thread::sleep(WHILE);
        paths.proxies[0].silence(true);
        await_losses(&attach, 1);
        // Some rounds on the other path, while this one is still away.
        thread::sleep(Duration::from_secs(2));
        paths.proxies[0].silence(false);
        paths.proxies[0].cut_hosts_off();
        await_logged(&attach, BACK, 1);
    });
    assert!(longest < DETECTION + FENCED, "{longest:?}");
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}

#[test]
fn two_paths_that_are_lost_in_turn_ten_times_are_not_noticed_by_a_busy_guest() {
    for policy in ["numa", "round-robin"] {
        let paths = TwoPaths::start("ram:64M");
        let mut attach = paths.attach(&["--iopolicy", policy]);
        let longest = under_load(&attach, || {
            for round in 0..10 {
                thread::sleep(WHILE / 2);
                paths.proxies[round % 2].cut_hosts_off();
                await_logged(&attach, BACK, round + 1);
            }
        });
        // Nothing has to be detected. But each round writes all blocks again, so it may wait for the fences of one
        // loss after those of another.
        assert!(longest < 3 * FENCED, "{longest:?}");
        attach.stop();
        assert_eq!(attach.counter("errors"), 0);
    }
}

#[test]
fn requests_wait_when_both_paths_are_lost_and_go_on_when_one_is_back() {
    let paths = TwoPaths::start("ram:8M");
    let mut attach = paths.attach(&[]);
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    for proxy in &paths.proxies {
        proxy.silence(true);
        proxy.cut_hosts_off();
    }
    await_losses(&attach, 2);
    guest.memory.write(DATA, &[2; 512]);
    for slot in 0..4 {
        guest.add(0, slot, kind::WRITE, 8 * slot as u64, &[out(DATA, 512)]);
    }
    guest.rings[0].submit();
    assert!(guest.rings[0].is_silent(WHILE));
    paths.proxies[1].silence(false);
    paths.proxies[1].cut_hosts_off();
    guest.rings[0].wait(4);
    assert_eq!([0, 1, 2, 3].map(|slot| guest.status(0, slot)), [OK; 4]);
    assert_eq!(guest.read(0, 24, 512), (OK, vec![2; 512]));
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}

#[test]
fn a_path_that_is_away_at_the_start_is_used_when_it_is_there() {
    let paths = TwoPaths::start("ram:8M");
    paths.proxies[1].silence(true);
    let second = paths.uri(1);
    let args = [&QUICK[..], &["--path", &second]].concat();
    let mut attach = Attach::start_with(&args, &paths.uri(0));
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    paths.proxies[1].silence(false);
    paths.proxies[1].cut_hosts_off();
    await_logged(&attach, ANOTHER, 1);
    paths.proxies[0].silence(true);
    paths.proxies[0].cut_hosts_off();
    assert_eq!(guest.read(0, 0, 512), (OK, vec![1; 512]));
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}

#[test]
fn the_first_path_may_be_the_one_that_is_away_at_the_start() {
    let export = Export::start(&["ram:8M"]);
    let nobody = export.subsystem().replace(export.address(), "127.0.0.1:1");
    let mut attach = Attach::start_with(&["--path", export.subsystem()], &nobody);
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    attach.stop();
}

#[test]
fn a_path_to_another_namespace_is_refused_and_both_are_named() {
    let uuids = [
        "6ba7b810-9dad-41d1-80b4-00c04fd430c8",
        "6ba7b811-9dad-41d1-80b4-00c04fd430c8",
    ];
    let exports = uuids.map(|uuid| Export::start(&[&format!("ram:8M,uuid={uuid}")]));
    let args = [&QUICK[..], &["--path", exports[1].subsystem()]].concat();
    let mut attach = Attach::start_with(&args, exports[0].subsystem());
    attach.process.await_log(|line| {
        line.contains("\"WARN\"") && uuids.iter().all(|uuid| line.contains(uuid))
    });
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert!(attach.process.logged(ANOTHER).is_empty());
    attach.stop();
}

#[test]
fn round_robin_uses_both_paths_and_numa_stays_on_one() {
    for (policy, both) in [
        ("round-robin", true),
        ("queue-depth", true),
        ("numa", false),
    ] {
        let paths = TwoPaths::start("ram:8M");
        let mut attach = paths.attach(&["--iopolicy", policy]);
        let before = paths.proxies.each_ref().map(Proxy::sent);
        let mut guest = FrontEnd::connect(&attach.socket);
        for _ in 0..64 {
            assert_eq!(guest.write(0, 0, &[7; 4096]), OK);
        }
        let after = paths.proxies.each_ref().map(Proxy::sent);
        let [first, second] = [0, 1].map(|path| after[path] - before[path]);
        assert!(first > 16 * 4096, "{policy}: {first}");
        assert_eq!(second > 16 * 4096, both, "{policy}: {second}");
        attach.stop();
    }
}

#[test]
fn a_write_that_a_lost_path_carries_out_late_does_not_undo_a_later_one_by_another_path() {
    for ring in [0, 1] {
        // The target holds the first write back, and does not learn that the host is gone.
        let slow = "ram:8M,fault=delay=1500ms:write:count=1";
        let paths = TwoPaths::to(Export::start_silent(&[slow]));
        let mut attach = paths.attach(&[]);
        let setup = Setup {
            rings: 2,
            ..Setup::default()
        };
        let mut guest = FrontEnd::connect_with(&attach.socket, setup);
        let [first, second] = [DATA, DATA + 0x10_0000];
        guest.memory.write(first, &[1; 4096]);
        guest.memory.write(second, &[2; 4096]);
        guest.add(0, 0, kind::WRITE, 0, &[out(first, 4096)]);
        guest.rings[0].submit();
        thread::sleep(WHILE);
        let lost = Instant::now();
        paths.proxies[0].silence(true);
        paths.proxies[0].cut_hosts_off();
        // Replayed at once, by the other path.
        guest.rings[0].wait(1);
        assert_eq!(guest.status(0, 0), OK);
        assert!(lost.elapsed() < FENCED, "{:?}", lost.elapsed());
        guest.add(ring, 1, kind::WRITE, 4, &[out(second, 4096)]);
        guest.add(ring, 2, kind::WRITE, 64, &[out(second, 4096)]);
        guest.rings[ring].submit();
        await_status(&guest, ring, 2);
        assert!(lost.elapsed() < FENCED, "{:?}", lost.elapsed());
        assert_eq!(guest.status(ring, 1), UNANSWERED);
        await_status(&guest, ring, 1);
        let held = lost.elapsed();
        guest.rings[ring].wait(2);
        thread::sleep(FENCED.saturating_sub(lost.elapsed()));
        let content = guest.read(0, 0, 12 * 512);
        let expected = [vec![1; 2048], vec![2; 4096]].concat();
        assert_eq!(content.0, OK);
        assert!(content.1 == expected, "the first write came last");
        eprintln!("it was held for {held:?}");
        assert!(held >= FENCED, "it was held for {held:?}");
        attach.stop();
    }
}

#[test]
fn a_command_that_is_never_answered_ends_its_path_and_is_carried_out_again() {
    let paths = TwoPaths::start("ram:8M,fault=hang:read:count=1");
    for args in [
        &["--io-timeout", "1"][..],
        &["--io-timeout", "1", "--keep-alive-tmo", "0"],
    ] {
        let export = Export::start(&["ram:8M,fault=hang:read:count=1"]);
        let mut attach = Attach::start_with(&[&QUICK[2..], args].concat(), export.uri());
        let mut guest = FrontEnd::connect(&attach.socket);
        let asked = Instant::now();
        assert_eq!(guest.read(0, 0, 512).0, OK);
        let took = asked.elapsed();
        assert!(
            took >= Duration::from_secs(1) && took < Duration::from_secs(5),
            "{took:?}"
        );
        attach
            .process
            .await_log(|line| line.contains(LOST) && line.contains("--io-timeout"));
        attach.stop();
        assert_eq!(attach.counter("errors"), 0);
    }
    let mut attach = paths.attach(&["--io-timeout", "1"]);
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.read(0, 0, 512).0, OK);
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}

#[test]
fn errors_that_may_pass_are_not_seen_by_the_guest_unless_they_stay_or_must_not_be_retried() {
    for (fault, status, commands) in [
        ("error=0/22:read:count=3", OK, 4),
        ("error=0/82:read:count=5", OK, 6),
        ("error=0/82:read", IOERR, 6),
        ("error=3/70:read:count=2", OK, 3),
        ("error=3/02:read:count=2", OK, 3),
        ("error=3/02:read", IOERR, 6),
        ("error=0/22+dnr:read:count=1", IOERR, 1),
        ("error=2/81:read:count=1", IOERR, 1),
    ] {
        let export = Export::start(&[&format!("ram:8M,fault={fault}")]);
        let mut attach = Attach::start(export.uri());
        let mut guest = FrontEnd::connect(&attach.socket);
        assert_eq!(guest.read(0, 0, 512).0, status, "{fault}");
        drop(guest);
        attach.stop();
        assert_eq!(attach.counter("commands"), commands, "{fault}");
    }
}

/// A target of its own, whose controller reports this state, and a way there.
fn export_with_access(state: &str, spec: &str) -> (Export, Proxy) {
    let args = [
        "--listen",
        "127.0.0.1:0",
        "--subnqn",
        "nqn.2026-01.org.example:both",
    ];
    let export = Export::start_with(&[&args[..], &["--ana-state", state]].concat(), &[spec]);
    let proxy = Proxy::start(export.address());
    (export, proxy)
}

#[test]
fn the_better_path_is_used_the_other_when_it_is_lost_and_the_better_again_when_it_is_back() {
    for (worse, usable) in [("non-optimized", true), ("inaccessible", false)] {
        // What they store differs, which is not looked at.
        let spec = "ram:8M,uuid=6ba7b810-9dad-41d1-80b4-00c04fd430c8";
        let (first, worse_proxy) = export_with_access(worse, spec);
        let (second, better_proxy) = export_with_access("optimized", spec);
        let better = better_proxy.uri(second.subsystem());
        let args = [&QUICK[..], &["--path", &better]].concat();
        let mut attach = Attach::start_with(&args, &worse_proxy.uri(first.subsystem()));
        await_logged(&attach, ANOTHER, 1);
        let mut guest = FrontEnd::connect(&attach.socket);
        let sent = |proxy: &Proxy, guest: &mut FrontEnd| {
            let before = proxy.sent();
            for sector in 0..32 {
                assert_eq!(guest.write(0, sector, &[9; 4096]), OK);
            }
            proxy.sent() - before > 32 * 4096
        };
        assert!(sent(&better_proxy, &mut guest), "{worse}");
        assert!(!sent(&worse_proxy, &mut guest), "{worse}");
        better_proxy.silence(true);
        better_proxy.cut_hosts_off();
        await_losses(&attach, 1);
        if usable {
            assert!(sent(&worse_proxy, &mut guest), "{worse}");
        } else {
            guest.memory.write(DATA, &[3; 512]);
            guest.add(0, 0, kind::WRITE, 0, &[out(DATA, 512)]);
            guest.rings[0].submit();
            assert!(guest.rings[0].is_silent(WHILE), "nothing can be reached");
        }
        better_proxy.silence(false);
        better_proxy.cut_hosts_off();
        await_logged(&attach, BACK, 1);
        if !usable {
            guest.rings[0].wait(1);
            assert_eq!(guest.status(0, 0), OK);
        }
        assert!(sent(&better_proxy, &mut guest), "{worse}");
        attach.stop();
        assert_eq!(attach.counter("errors"), 0);
    }
}

#[test]
fn a_path_whose_access_changes_for_longer_than_its_controller_says_is_ended_and_connected_again() {
    // The controller states ten seconds.
    let (transition, late) = (Duration::from_secs(10), Duration::from_secs(4));
    let spec = "ram:8M,uuid=6ba7b810-9dad-41d1-80b4-00c04fd430c8";
    let (good, good_proxy) = export_with_access("optimized", spec);
    let (changing, changing_proxy) = export_with_access("change", spec);
    let path = changing_proxy.uri(changing.subsystem());
    let args = [&QUICK[..], &["--path", &path]].concat();
    let mut attach = Attach::start_with(&args, &good_proxy.uri(good.subsystem()));
    await_logged(&attach, ANOTHER, 1);
    let began = Instant::now();
    let mut guest = FrontEnd::connect(&attach.socket);
    while losses(&attach) == 0 {
        assert_eq!(guest.write(0, 8, &[1; 512]), OK);
        assert!(began.elapsed() < transition + late);
        thread::sleep(Duration::from_millis(20));
    }
    let lost = began.elapsed();
    assert!(lost > transition - Duration::from_secs(1), "{lost:?}");
    let lines = attach.process.stderr();
    let mut lines = lines.iter();
    assert!(lines.any(|line| line.contains("access was changing for longer")));
    await_logged(&attach, BACK, 1);
    drop(guest);
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}
