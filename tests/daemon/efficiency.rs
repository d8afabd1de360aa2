//! What the data path costs: copies, system calls, wake-ups and memory, as the program counts them
//! and as the kernel does.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::Duration;

use crate::daemons::{Attach, Export};
use crate::driver::{Direction, Driver};
use crate::front_end::{DATA, FrontEnd, OK, kind};
use crate::process::Process;
use crate::ring::{into, out};

const KIB_128: usize = 128 << 10;

#[test]
fn thousands_of_reads_and_writes_of_128_kib_copy_no_byte_at_either_end() {
    const DEPTH: usize = 32;
    const BATCHES: usize = 40;
    let mut export = Export::start(&["ram:64M"]);
    let mut attach = Attach::start(export.uri());
    let mut driver = Driver::connect(&attach.socket, 2, 128, (2 * DEPTH * KIB_128) as u64);
    for direction in [Direction::Write, Direction::Read] {
        for _ in 0..BATCHES {
            for queue in 0..2 {
                for number in 0..DEPTH {
                    let at = (queue * DEPTH + number) * KIB_128;
                    assert!(driver.add(queue, direction, at as u64, (at, KIB_128), number));
                }
                driver.kick(queue);
            }
            (0..2).for_each(|queue| drop(driver.wait(queue, DEPTH)));
        }
    }
    drop(driver);
    attach.stop();
    export.stop();
    let requests = (2 * DEPTH * BATCHES) as u64;
    assert_eq!(
        (attach.counter("reads"), attach.counter("writes")),
        (requests, requests)
    );
    assert_eq!(attach.counter("copied_bytes"), 0);
    assert_eq!(export.total("copied_bytes"), 0);
}

#[test]
fn data_of_128_kib_in_many_pieces_is_not_copied_either() {
    let mut export = Export::start(&["ram:8M"]);
    let mut attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    let pages = |buffer: fn(u64, u32) -> _| -> Vec<_> {
        (0..32)
            .map(|page| buffer(DATA + 8192 * page, 4096))
            .collect()
    };
    for _ in 0..50 {
        assert_eq!(guest.run_in(true, kind::WRITE, 0, &pages(out)), OK);
        assert_eq!(guest.run_in(true, kind::READ, 0, &pages(into)), OK);
    }
    drop(guest);
    attach.stop();
    export.stop();
    assert_eq!(attach.counter("written_bytes"), 50 * KIB_128 as u64);
    assert_eq!(
        (attach.counter("copied_bytes"), export.total("copied_bytes")),
        (0, 0)
    );
}

/// Batches of requests, each made available at once with one kick.
fn batches(kind: u32, batches: usize, in_batch: usize) -> Attach {
    let mut export = Export::start(&["ram:8M"]);
    let mut attach = Attach::start_with(&["--nr-io-queues", "1"], export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    for _ in 0..batches {
        for slot in 0..in_batch {
            let at = DATA + 4096 * slot as u64;
            let buffer = if kind == kind::READ {
                into(at, 512)
            } else {
                out(at, 512)
            };
            guest.add(0, slot, kind, slot as u64, &[buffer]);
        }
        guest.rings[0].publish();
        guest.rings[0].kick();
        guest.rings[0].wait(in_batch);
        for slot in 0..in_batch {
            assert_eq!(guest.status(0, slot), OK);
        }
    }
    drop(guest);
    attach.stop();
    export.stop();
    assert_eq!(attach.counter("requests"), (batches * in_batch) as u64);
    assert_eq!(attach.counter("commands"), (batches * in_batch) as u64);
    attach
}

#[test]
fn one_system_call_sends_everything_that_one_wake_found() {
    for kind in [kind::WRITE, kind::READ] {
        // Whatever it takes to begin and to end is the same in both runs.
        let few = batches(kind, 5, 32).counter("sends");
        let many = batches(kind, 25, 32).counter("sends");
        assert_eq!(
            many - few,
            20,
            "20 more batches of 32 took {} sends",
            many - few
        );
    }
}

#[test]
fn one_call_tells_the_guest_of_everything_that_one_wake_finished() {
    let attach = batches(kind::WRITE, 20, 32);
    let interrupts = attach.counter("interrupts");
    // A batch may be answered in several wakes, but not one by one; and a guest that looks before
    // it sleeps needs no call.
    assert!(
        (1..=320).contains(&interrupts),
        "{interrupts} for 640 requests"
    );
}

/// Voluntary context switches, which are wake-ups, of workers and of all other threads.
pub(crate) fn wake_ups(process: &Process) -> (u64, u64) {
    let (mut workers, mut others) = (0, 0);
    let mut by_name = BTreeMap::new();
    for (name, switches) in process.context_switches() {
        let sum = if name.starts_with("worker-") {
            &mut workers
        } else {
            &mut others
        };
        *sum += switches;
        *by_name.entry(name).or_insert(0) += switches;
    }
    assert!(by_name.contains_key("worker-0"), "threads: {by_name:?}");
    (workers, others)
}

#[test]
fn idle_workers_are_never_woken_and_keep_alive_costs_the_control_plane_alone() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start_with(&["--keep-alive-tmo", "1"], export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    for sector in 0..100 {
        assert_eq!(guest.write(0, sector, &[1; 512]), OK);
    }
    sleep(Duration::from_millis(200));
    let ends = [&attach.process, &export.process];
    let before = ends.map(wake_ups);
    sleep(Duration::from_secs(2));
    let after = ends.map(wake_ups);
    for (end, (before, after)) in ["attach", "export"].iter().zip(before.iter().zip(&after)) {
        assert_eq!(before.0, after.0, "wake-ups of idle workers of {end}");
        assert!(
            before.1 < after.1,
            "no keep-alive at {end}: this test sees nothing"
        );
    }
    // And it was not asleep for good.
    assert_eq!(guest.read(0, 0, 512), (OK, vec![1; 512]));
}

#[test]
fn attach_with_one_disk_stays_under_16_mib() {
    let export = Export::start(&["ram:64M"]);
    let attach = Attach::start(export.uri());
    let mut driver = Driver::connect(&attach.socket, 2, 128, 32 << 20);
    for direction in [Direction::Write, Direction::Read] {
        for len in [512, KIB_128, 1 << 20] {
            for queue in 0..2 {
                let room = (16 << 20) / len;
                let count = room.min(40);
                for number in 0..count {
                    let at = queue * (16 << 20) + number * len;
                    assert!(driver.add(queue, direction, at as u64, (at, len), number));
                }
                driver.kick(queue);
                driver.wait(queue, count);
            }
        }
    }
    // Guest memory is shared memory, which is counted for itself.
    let [own, mapped, shared] =
        ["RssAnon", "RssFile", "RssShmem"].map(|name| attach.process.status_kib(name));
    assert!(
        shared > 16 << 10,
        "the guest's memory is not in use: {shared} KiB"
    );
    assert!(
        own + mapped < 16 << 10,
        "{own} KiB of its own and {mapped} KiB of files"
    );
}
