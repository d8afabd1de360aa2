//! Logging of written pages, as front-ends turn it on, over and off while rings run.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::VhostUserDirtyLogRegion;

use super::*;
use crate::guest::{event, raised};

const LOG_ALL: u64 = 1 << 26;
const DISK_READ: u32 = 0;
/// Covers all regions of the guest, on a multiple of nothing.
const LOG_BYTES: u64 = 35;
/// Pages of what the tests use.
const USED_PAGE: usize = 2;
const STATUS_PAGE: usize = 5;
const DATA_PAGE: usize = 6;

/// A front-end's log, under a name by which its mapping is found.
struct Log {
    file: File,
    name: &'static str,
}

impl Log {
    fn new(name: &'static str) -> Self {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC).expect("memfd");
        ftruncate(&fd, LOG_BYTES).expect("size");
        Self {
            file: File::from(fd),
            name,
        }
    }

    fn region(&self) -> VhostUserDirtyLogRegion {
        VhostUserDirtyLogRegion {
            mmap_size: LOG_BYTES,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// The pages marked since the last look.
    fn take(&self) -> Vec<usize> {
        let mut bits = [0; LOG_BYTES as usize];
        self.file.read_exact_at(&mut bits, 0).expect("the log");
        self.file
            .write_all_at(&[0; LOG_BYTES as usize], 0)
            .expect("cleared");
        let marked = |page: &usize| bits[page / 8] >> (page % 8) & 1 != 0;
        (0..8 * bits.len()).filter(marked).collect()
    }

    fn is_mapped(&self) -> bool {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        maps.contains(&format!("memfd:{} ", self.name))
    }
}

impl Bench {
    fn features(&self) -> u64 {
        self.device.features() & !LOG_ALL
    }

    /// As a front-end that is not migrating.
    fn run_unlogged(&mut self) {
        self.negotiate_without(LOG_ALL);
        self.share_memory();
        self.set_up_ring(0);
        self.front.set_vring_enable(0, true).expect("enable");
        self.worker.events();
    }

    fn share(&self, log: &Log) {
        self.front
            .set_log_base(0, Some(log.region()))
            .expect("a log");
    }

    fn log_ring(&self, on: bool) {
        let config = VringConfigData {
            flags: u32::from(on),
            log_addr: on.then_some(ADDRESSES.used),
            ..ring_config()
        };
        self.front.set_vring_addr(0, &config).expect("addresses");
    }

    /// What QEMU does when a migration begins.
    fn log_all(&self, log: &Log) {
        self.share(log);
        self.front
            .set_features(self.features() | LOG_ALL)
            .expect("LOG_ALL");
        self.log_ring(true);
    }

    fn post_read(&mut self, data: u64) {
        self.guest.write(0x4000, &header(DISK_READ, 0));
        self.guest
            .post(&[out(0x4000, 16), into(data, 512), into(0x5000, 1)]);
        self.front.set_vring_enable(0, true).expect("scan");
    }

    fn finish(&self) {
        self.worker.with(0, Lane::finish);
    }
}

#[test]
fn a_request_in_flight_is_marked_and_its_ring_never_stops() {
    let mut bench = Bench::new();
    bench.run_unlogged();
    bench.post_read(0x6000);
    assert_eq!(bench.worker.held(0), 1);
    bench.worker.events();
    let log = Log::new("log-in-flight");
    bench.log_all(&log);
    let events = bench.worker.events();
    assert!(
        events.iter().all(|event| event.starts_with("log ")),
        "{events:?}"
    );
    assert_eq!(bench.worker.held(0), 1, "it was not waited for");
    log.take();
    bench.finish();
    assert_eq!(log.take(), [USED_PAGE, STATUS_PAGE, DATA_PAGE]);
    bench.close().3.expect("orderly");
}

#[test]
fn logging_ends_when_told_and_its_log_is_unmapped() {
    let orders: [fn(&Bench); 2] = [
        // QEMU's, and cloud-hypervisor's.
        |bench| {
            bench
                .front
                .set_features(bench.features())
                .expect("features");
            bench.log_ring(false);
        },
        |bench| {
            bench.log_ring(false);
            bench
                .front
                .set_features(bench.features())
                .expect("features");
        },
    ];
    for (end, name) in orders.into_iter().zip(["log-first", "log-second"]) {
        let mut bench = Bench::new();
        bench.run_unlogged();
        let log = Log::new(name);
        bench.log_all(&log);
        assert!(log.is_mapped());
        bench.post_read(0x6000);
        end(&bench);
        assert!(!log.is_mapped());
        log.take();
        bench.finish();
        assert_eq!(log.take(), [0; 0]);
        let events = bench.worker.events();
        assert_eq!(events.last().expect("some"), "log false 0");
        assert!(!events.iter().any(|event| event.starts_with("stop")));
        // And begins again.
        bench.log_all(&log);
        bench.post_read(0x6000);
        bench.finish();
        assert!(log.take().contains(&DATA_PAGE));
        bench.close().3.expect("orderly");
        assert!(!log.is_mapped());
    }
}

#[test]
fn a_log_that_was_replaced_is_not_written_to_once_the_front_end_has_its_answer() {
    let mut bench = Bench::new();
    bench.run_unlogged();
    let logs = ["log-0", "log-1", "log-2"].map(Log::new);
    bench.log_all(&logs[0]);
    for pair in logs.windows(2) {
        bench.post_read(0x6000);
        bench.share(&pair[1]);
        pair[0].take();
        assert!(!pair[0].is_mapped() && pair[1].is_mapped());
        bench.finish();
        assert_eq!(pair[0].take(), [0; 0]);
        assert_eq!(pair[1].take(), [USED_PAGE, STATUS_PAGE, DATA_PAGE]);
    }
    bench.close().3.expect("orderly");
}

#[test]
fn a_region_that_is_added_later_is_logged() {
    let mut bench = Bench::new();
    bench.negotiate_without(LOG_ALL);
    let few = &bench.regions()[..2];
    bench.front.set_mem_table(few).expect("memory");
    bench.set_up_ring(0);
    bench.front.set_vring_enable(0, true).expect("enable");
    let log = Log::new("log-later");
    bench.log_all(&log);
    let late = bench.regions().swap_remove(2);
    bench.front.add_mem_region(&late).expect("added");
    log.take();
    bench.post_read(REGIONS[2] + 0x1000);
    bench.finish();
    let data = usize::try_from(REGIONS[2] / 4096).expect("small") + 1;
    assert_eq!(log.take(), [USED_PAGE, STATUS_PAGE, data]);
    bench.close().3.expect("orderly");
}

#[test]
fn a_ring_that_starts_while_a_guest_is_migrated_is_logged() {
    let mut bench = Bench::new();
    // As QEMU starts a device then: what it accepts, the ring, the log, and at last it is enabled.
    bench.negotiate();
    bench.share_memory();
    bench.set_up_ring(0);
    bench.log_ring(true);
    let log = Log::new("log-start");
    bench.share(&log);
    bench.front.set_vring_enable(0, true).expect("enable");
    assert_eq!(bench.worker.running(), [0]);
    bench.post_read(0x6000);
    bench.finish();
    assert_eq!(log.take(), [USED_PAGE, STATUS_PAGE, DATA_PAGE]);
    bench.close().3.expect("orderly");
}

#[test]
fn a_driver_that_accepts_every_bit_it_sees_has_its_ring_run_without_a_log() {
    let mut bench = Bench::new();
    bench.run_ring();
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    assert_eq!(bench.worker.held(0), 1);
    bench.close().3.expect("orderly");
}

#[test]
fn rings_stand_still_while_there_is_no_log_that_can_be_used() {
    let mut bench = Bench::new();
    bench.run_unlogged();
    let (log, next) = (Log::new("log-good"), Log::new("log-next"));
    bench.log_all(&log);
    bench.post_read(0x6000);
    log.take();
    let region = VhostUserDirtyLogRegion {
        mmap_size: 1 << 20,
        ..next.region()
    };
    bench
        .front
        .set_log_base(0, Some(region))
        .expect_err("larger than its file");
    assert_eq!(bench.worker.running(), [0; 0]);
    assert_eq!(
        log.take(),
        [USED_PAGE, STATUS_PAGE, DATA_PAGE],
        "what was in flight"
    );
    bench.front.set_vring_enable(0, true).expect("enable");
    bench
        .front
        .set_features(bench.features() | LOG_ALL)
        .expect("again");
    assert_eq!(bench.worker.running(), [0; 0]);
    bench.share(&next);
    assert_eq!(bench.worker.running(), [0]);
    bench.post_read(0x6000);
    bench.finish();
    assert_eq!(next.take(), [USED_PAGE, STATUS_PAGE, DATA_PAGE]);
    // A log of no bytes does not get past the library, and the end of the migration is as good as a log.
    bench.send(FrontendReq::SET_LOG_BASE as u32, 1, &[0; 16]);
    assert_eq!(bench.receive().2, [0; 16]);
    assert_eq!(bench.worker.running(), [0; 0]);
    bench.front.set_features(bench.features()).expect("the end");
    assert_eq!(bench.worker.running(), [0]);
    bench.close().3.expect("orderly");
}

#[test]
fn marks_are_signalled_where_the_front_end_wants_to_know() {
    let mut bench = Bench::new();
    bench.run_unlogged();
    let log = Log::new("log-signal");
    bench.log_all(&log);
    let (file, news) = event();
    bench
        .front
        .set_log_fd(file.as_raw_fd())
        .expect("SET_LOG_FD");
    raised(&news);
    bench.post_read(0x6000);
    assert_eq!(raised(&news), 0);
    bench.finish();
    assert_eq!(raised(&news), 1);
    bench.refused(FrontendReq::SET_LOG_FD as u32, &[]);
    bench.front.set_hdr_flags(VhostUserHeaderFlag::empty());
    bench.goes_on();
    bench.close().3.expect("orderly");
}

#[test]
fn memory_that_was_taken_away_is_marked_for_what_still_arrives_in_it() {
    let mut bench = Bench::new();
    bench.run_unlogged();
    bench.post_read(REGIONS[2]);
    let log = Log::new("log-gone");
    bench.log_all(&log);
    let gone = bench.regions().swap_remove(2);
    bench.front.remove_mem_region(&gone).expect("removed");
    log.take();
    bench.finish();
    let data = usize::try_from(REGIONS[2] / 4096).expect("small");
    assert_eq!(log.take(), [USED_PAGE, STATUS_PAGE, data]);
    bench.close().3.expect("orderly");
}

#[test]
fn a_guest_that_may_go_on_elsewhere_waits_with_its_last_ring_and_no_other_does() {
    let mut bench = Bench::new();
    bench.run_unlogged();
    bench.set_up_ring(1);
    bench.front.set_vring_enable(1, true).expect("enable");
    bench.worker.events();
    let stop = |bench: &Bench| {
        for ring in [1, 0] {
            bench.front.get_vring_base(ring).expect("base");
        }
        let events = bench.worker.events().into_iter();
        events
            .filter(|event| !event.starts_with("log "))
            .collect::<Vec<_>>()
    };
    assert_eq!(stop(&bench), ["stop 1", "stop 0"]);
    let start = |bench: &mut Bench| {
        for ring in [0, 1] {
            bench.set_up_ring(ring);
        }
        bench.worker.events();
    };
    start(&mut bench);
    let log = Log::new("log-of-a-guest-that-goes");
    bench.log_all(&log);
    assert_eq!(stop(&bench), ["stop 1", "stop 0", "settle"]);
    assert_eq!(stop(&bench), [""; 0], "they do not run");
    // QEMU disables all before it asks for the base of any.
    start(&mut bench);
    for ring in [1, 0] {
        bench.front.set_vring_enable(ring, false).expect("disable");
    }
    assert_eq!(stop(&bench), ["stop 1", "stop 0", "settle"]);
    for ring in [1, 0] {
        bench.front.set_vring_enable(ring, true).expect("enable");
    }
    // The migration has failed.
    bench
        .front
        .set_features(bench.features())
        .expect("features");
    bench.log_ring(false);
    start(&mut bench);
    assert_eq!(stop(&bench), ["stop 1", "stop 0"]);
    bench.close().3.expect("orderly");
}
