//! Limits of a disk: as much as they allow and no more, in time, and nothing else is held up.

use std::thread::sleep;
use std::time::{Duration, Instant};

use vhost::VhostBackend;

use crate::daemons::{Attach, Export};
use crate::efficiency::wake_ups;
use crate::front_end::{DATA, FrontEnd, IOERR, OK, Setup, UNANSWERED, kind};
use crate::ring::{into, out};

/// Long enough for whatever may pass to pass, many times over.
const WHILE: Duration = Duration::from_millis(200);

/// What was answered, and in what time at most: all that was answered was asked for within it.
#[derive(Debug, Clone)]
struct Done {
    reads: u64,
    writes: u64,
    /// Both, by ring.
    rings: Vec<u64>,
    seconds: f64,
}

impl Done {
    /// Checks a number of `what` against a limit. No machine is so slow that more than half of it is missed.
    #[track_caller]
    fn check(&self, what: u64, per_second: u64, burst: u64) {
        let (what, per_second) = (what as f64, per_second as f64);
        let most = per_second * self.seconds + burst as f64;
        assert!(what <= most, "{what} where {most} were allowed: {self:?}");
        let least = per_second * self.seconds / 2.0;
        assert!(what >= least, "{what}, not even {least}: {self:?}");
    }
}

/// Keeps `reads` and `writes` of `len` bytes under way on each ring for a while.
fn load(guest: &mut FrontEnd, (reads, writes): (usize, usize), len: u32, time: Duration) -> Done {
    let add = |guest: &mut FrontEnd, ring, read| match read {
        // Requests of a kind are all the same, so they can share a header and a status.
        true => guest.add(ring, 0, kind::READ, 0, &[into(DATA, len)]),
        false => guest.add(
            ring,
            1,
            kind::WRITE,
            1024,
            &[out(DATA + u64::from(len), len)],
        ),
    };
    let started = Instant::now();
    for ring in 0..guest.rings.len() {
        (0..reads).for_each(|_| add(guest, ring, true));
        (0..writes).for_each(|_| add(guest, ring, false));
        guest.rings[ring].submit();
    }
    let mut done = Done {
        reads: 0,
        writes: 0,
        rings: vec![0; guest.rings.len()],
        seconds: 0.0,
    };
    while started.elapsed() < time {
        for ring in 0..guest.rings.len() {
            let used = guest.rings[ring].used();
            for used in &used {
                let read = used.len > 1;
                *(if read {
                    &mut done.reads
                } else {
                    &mut done.writes
                }) += 1;
                add(guest, ring, read);
            }
            done.rings[ring] += used.len() as u64;
            if !used.is_empty() {
                guest.rings[ring].submit();
            }
        }
        sleep(Duration::from_micros(500));
    }
    done.seconds = started.elapsed().as_secs_f64();
    done
}

fn with_rings(attach: &Attach, rings: usize) -> FrontEnd {
    let setup = Setup {
        rings,
        ..Setup::default()
    };
    FrontEnd::connect_with(&attach.socket, setup)
}

fn two_rings(attach: &Attach) -> FrontEnd {
    with_rings(attach, 2)
}

const TWO_SECONDS: Duration = Duration::from_secs(2);

#[test]
fn requests_are_as_many_as_allowed_whichever_lanes_they_come_by() {
    let export = Export::start(&["ram:8M"]);
    let args = ["--nr-io-queues=2", "--iops=400", "--iops-burst=30"];
    for mut disk in [
        Attach::start_with(&args, export.uri()),
        Attach::serve(&args, "null:8M"),
    ] {
        let done = load(&mut two_rings(&disk), (8, 8), 4096, TWO_SECONDS);
        done.check(done.reads + done.writes, 400, 30);
        assert!(done.reads > 100 && done.writes > 100, "{done:?}");
        disk.stop();
        assert_eq!(disk.counter("errors"), 0);
        assert!(disk.counter("throttled") > 300);
    }
}

#[test]
fn rings_that_are_never_empty_get_equal_shares_whichever_lanes_they_are_at() {
    // Each at a lane of its own, all at one, and two at one and one at each of two others.
    for lanes in ["--nr-io-queues=4", "--nr-io-queues=1", "--nr-io-queues=3"] {
        let disk = Attach::serve(&[lanes, "--iops=400", "--iops-burst=10"], "null:8M");
        let done = load(&mut with_rings(&disk, 4), (16, 0), 4096, TWO_SECONDS);
        done.check(done.reads, 400, 10);
        let least = done.reads / if lanes.ends_with('3') { 10 } else { 6 };
        assert!(
            done.rings.iter().all(|ring| *ring > least),
            "{lanes}: {done:?}"
        );
    }
}

#[test]
fn bytes_are_as_many_as_allowed_and_a_burst_is_a_tenth_of_a_second_unless_said_otherwise() {
    let mut disk = Attach::serve(&["--bandwidth=16M"], "null:8M");
    let done = load(&mut two_rings(&disk), (8, 8), 64 << 10, TWO_SECONDS);
    let bytes = (done.reads + done.writes) * (64 << 10);
    done.check(bytes, 16 << 20, (16 << 20) / 10);
    disk.stop();
    // Requests that are larger than a burst keep to the rate, too.
    let args = ["--write-bandwidth=4M", "--bandwidth-burst=4K"];
    let disk = Attach::serve(&args, "null:8M");
    let done = load(&mut two_rings(&disk), (0, 4), 256 << 10, TWO_SECONDS);
    done.check(done.writes * (256 << 10), 4 << 20, 256 << 10);
}

#[test]
fn reads_are_limited_and_writes_between_them_are_not_and_the_other_way_round() {
    let disk = Attach::serve(&["--read-iops=100", "--iops-burst=5"], "null:8M");
    let done = load(&mut two_rings(&disk), (12, 12), 4096, TWO_SECONDS);
    done.check(done.reads, 100, 5);
    assert!(done.writes > 10 * done.reads, "{done:?}");
    let disk = Attach::serve(&["--write-iops=100", "--read-bandwidth=1T"], "null:8M");
    let done = load(&mut two_rings(&disk), (12, 12), 4096, TWO_SECONDS);
    done.check(done.writes, 100, 10);
    assert!(done.reads > 10 * done.writes, "{done:?}");
}

/// Offers `count` reads of 4 KiB in slots of their own.
fn offer_reads(guest: &mut FrontEnd, count: usize) {
    for slot in 0..count {
        let at = DATA + 4096 * slot as u64;
        guest.add(0, slot, kind::READ, 0, &[into(at, 4096)]);
    }
    guest.rings[0].submit();
}

#[test]
fn a_burst_passes_at_once_and_what_follows_waits_for_its_time() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start_with(&["--iops=1", "--iops-burst=40"], export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    let started = Instant::now();
    offer_reads(&mut guest, 41);
    guest.rings[0].wait(40);
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "{:?}",
        started.elapsed()
    );
    guest.rings[0].wait(1);
    assert!(
        started.elapsed() >= Duration::from_secs(1),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn a_flush_is_not_limited_and_does_not_wait_for_the_writes_that_do() {
    let args = ["--nr-io-queues=1", "--write-iops=1", "--iops-burst=1"];
    let disk = Attach::serve(&args, "null:8M");
    let mut guest = FrontEnd::connect(&disk.socket);
    for slot in 0..3 {
        guest.add(0, slot, kind::WRITE, 0, &[out(DATA, 4096)]);
    }
    guest.rings[0].submit();
    guest.rings[0].wait(1);
    for slot in 10..30 {
        guest.add(0, slot, kind::FLUSH, 0, &[]);
        guest.rings[0].submit();
        guest.rings[0].wait(1);
        assert_eq!(guest.status(0, slot), OK);
    }
    assert_eq!(guest.status(0, 2), UNANSWERED, "the third write");
}

#[test]
fn another_disk_of_the_same_target_does_not_notice() {
    let export = Export::start(&["ram:8M"]);
    let limited = Attach::start_with(&["--iops=10"], export.uri());
    let other = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&limited.socket);
    let started = Instant::now();
    offer_reads(&mut guest, 30);
    let done = load(&mut two_rings(&other), (8, 8), 4096, Duration::from_secs(1));
    assert!(done.reads + done.writes > 1000, "{done:?}");
    let answered = guest.rings[0].used().len() as f64;
    let most = 1.0 + 10.0 * started.elapsed().as_secs_f64();
    assert!(answered <= most, "{answered}: the limit was not in force");
}

#[test]
fn a_worker_sleeps_between_requests_that_wait_and_when_there_are_none() {
    let export = Export::start(&["ram:8M"]);
    let args = ["--nr-io-queues=2", "--iops=20", "--iops-burst=2"];
    let attach = Attach::start_with(&args, export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    offer_reads(&mut guest, 40);
    guest.rings[0].wait(3);
    let before = wake_ups(&attach.process).0;
    guest.rings[0].wait(20);
    let woken = wake_ups(&attach.process).0 - before;
    // Its time, the answer of the controller, and what the machine adds.
    assert!(woken < 20 * 8, "{woken} wake-ups for 20 requests");
    guest.rings[0].wait(17);
    sleep(WHILE);
    let before = wake_ups(&attach.process).0;
    sleep(Duration::from_secs(1));
    assert_eq!(wake_ups(&attach.process).0, before, "nothing waits");
}

#[test]
fn a_ring_that_stops_does_not_wait_for_limits_and_goes_on_where_it_was() {
    // What waits is in the ring, but for one; or out of it, where writes could pass.
    for (args, taken) in [
        (["--iops=1", "--iops-burst=1"], 2),
        (["--read-iops=1", "--iops-burst=1"], 20),
    ] {
        let disk = Attach::serve(&args, "null:8M");
        let mut guest = FrontEnd::connect(&disk.socket);
        let started = Instant::now();
        offer_reads(&mut guest, 20);
        guest.rings[0].wait(1);
        sleep(WHILE);
        let base = guest.frontend.get_vring_base(0).expect("GET_VRING_BASE");
        assert!(
            started.elapsed() < Duration::from_secs(1),
            "{:?}",
            started.elapsed()
        );
        assert_eq!(base, taken, "{args:?}");
        assert_eq!(guest.rings[0].used().len() + 1, taken as usize, "{args:?}");
        guest.start(0, u16::try_from(base).expect("an index"));
        guest.enable(0, true);
        if taken == 2 {
            // It is owed: two in the first two seconds, then one more each.
            guest.rings[0].wait(1);
            assert!(
                started.elapsed() >= Duration::from_secs(2),
                "{:?}",
                started.elapsed()
            );
        }
    }
}

#[test]
fn sigterm_does_not_wait_for_limits() {
    let export = Export::start(&["ram:8M"]);
    let args = ["--read-iops=1", "--iops-burst=1"];
    let mut attach = Attach::start_with(&args, export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    offer_reads(&mut guest, 20);
    guest.rings[0].wait(1);
    // Ends in time, or panics.
    attach.stop();
    assert_eq!(attach.counter("reads"), 20);
    assert_eq!(attach.counter("errors"), 0);
}

#[test]
fn what_waits_for_limits_fails_with_a_ring_that_stops_while_the_controller_is_away() {
    let mut export = Export::start(&["ram:8M"]);
    let args = ["--read-iops=1", "--iops-burst=1", "--drain-timeout=1"];
    let attach = Attach::start_with(&args, export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    offer_reads(&mut guest, 20);
    guest.rings[0].wait(1);
    export.stop();
    let started = Instant::now();
    guest.frontend.get_vring_base(0).expect("GET_VRING_BASE");
    assert!(
        started.elapsed() < Duration::from_secs(3),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(guest.rings[0].used().len(), 19);
    assert_eq!(guest.status(0, 0), OK);
    for slot in 1..20 {
        assert_eq!(guest.status(0, slot), IOERR, "request {slot}");
    }
}
