//! In-flight regions: asked for, handed over, kept from session to session, refused.

use std::fs::File;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;

use super::*;

const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;
/// Bytes of a region for four rings of 16 entries, with 64 KiB behind, and parts for four rings of 1024.
const REGION_LEN: u64 = 4 * 320 + 65600 + 4 * 16448;

/// A region as a front-end keeps it.
struct Kept {
    told: VhostUserInflight,
    file: File,
}

impl Kept {
    fn ask(bench: &mut Bench) -> Self {
        Self::ask_for(bench, SIZE)
    }

    fn ask_for(bench: &mut Bench, entries: u16) -> Self {
        let asked = VhostUserInflight::new(0, 0, 4, entries);
        let (told, file) = bench.front.get_inflight_fd(&asked).expect("a region");
        Self { told, file }
    }

    fn hand_over(&self, bench: &mut Bench) -> Result<(), vhost::Error> {
        bench
            .front
            .set_inflight_fd(&self.told, self.file.as_raw_fd())
    }
}

impl Bench {
    fn set_up_ring_at(&self, base: u16) {
        self.front.set_vring_num(0, SIZE).expect("size");
        let config = ring_config();
        self.front.set_vring_addr(0, &config).expect("addresses");
        self.front.set_vring_base(0, base).expect("base");
        self.front.set_vring_call(0, &self.call).expect("call");
        self.front.set_vring_kick(0, &self.kick).expect("kick");
    }

    /// Does all that leads to ring 0 running on `kept`.
    fn run_on(&mut self, kept: &Kept, base: u16) {
        self.negotiate();
        kept.hand_over(self).expect("a good region");
        self.share_memory();
        self.set_up_ring_at(base);
        self.front.set_vring_enable(0, true).expect("enable");
        assert_eq!(self.worker.running(), [0]);
    }

    /// Ends the session and begins the next, with the same guest.
    fn reconnect(self) -> Self {
        let (guest, worker, device, result) = self.close();
        result.expect("orderly");
        Self::connect(guest, worker, device)
    }

    /// Accepts protocol features that the library does not know.
    fn accept(&self, bits: &[u32]) {
        let features: u64 = bits.iter().map(|bit| 1 << bit).sum();
        let request = FrontendReq::SET_PROTOCOL_FEATURES as u32;
        self.send(request, 1, &features.to_le_bytes());
    }
}

#[test]
fn a_region_is_made_as_asked_and_cannot_shrink() {
    let mut bench = Bench::new();
    bench.negotiate();
    let kept = Kept::ask(&mut bench);
    let VhostUserInflight {
        mmap_size,
        mmap_offset,
        num_queues,
        queue_size,
    } = kept.told;
    assert_eq!((mmap_size, mmap_offset), (REGION_LEN, 0));
    assert_eq!((num_queues, queue_size), (4, SIZE));
    assert_eq!(kept.file.metadata().expect("stat").len(), REGION_LEN);
    let seals = fcntl_get_seals(&kept.file).expect("seals");
    assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW));
    assert!(bench.worker.tails().is_empty(), "it is not in use");
    kept.hand_over(&mut bench).expect("handed over");
    let tails = bench.worker.tails();
    let [Some(tail)] = &tails[..] else {
        panic!("not one tail: {tails:?}");
    };
    assert!(tail.fresh() && tail.kept());
    assert_eq!(tail.len(), 65536);
}

#[test]
fn a_region_that_nobody_could_use_is_answered_with_none() {
    let mut bench = Bench::new();
    bench.negotiate();
    let get = FrontendReq::GET_INFLIGHT_FD as u32;
    for (rings, entries) in [(257_u16, 16_u16), (0, 16), (4, 0), (4, 32769)] {
        let mut body = vec![0; 16];
        body.extend(rings.to_le_bytes());
        body.extend(entries.to_le_bytes());
        body.extend([0; 4]);
        bench.send(get, 1, &body);
        let (request, flags, reply) = bench.receive();
        assert_eq!((request, flags), (get, 5), "{rings} rings of {entries}");
        assert_eq!(reply, [0; 24], "{rings} rings of {entries}");
    }
    bench.goes_on();
}

#[test]
fn requests_in_flight_when_the_front_end_leaves_are_there_when_it_comes_back() {
    let mut bench = Bench::new();
    bench.negotiate();
    let kept = Kept::ask(&mut bench);
    bench.run_on(&kept, 0);
    bench.post_flush();
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    assert_eq!(bench.worker.held(0), 2);
    bench.worker.events();
    let mut bench = bench.reconnect();
    assert_eq!(bench.worker.events(), ["suspend 0"]);
    assert_eq!(bench.guest.used(), [], "no answer");
    bench.worker.tails();

    // A front-end may know nothing of what was taken, or think that all was.
    bench.run_on(&kept, 2);
    let tails = bench.worker.tails();
    assert!(matches!(&tails[..], [Some(tail)] if tail.kept() && !tail.fresh()));
    assert_eq!(bench.worker.held(0), 2);
    let recovered = |lane: &mut Lane| lane.held.iter().all(|request| request.recovered);
    assert!(bench.worker.with(0, recovered));
    assert!(bench.calls() > 0, "a call may have been owed");
    assert_eq!(bench.front.get_vring_base(0).expect("base"), 2);
    assert_eq!(bench.worker.events(), ["start 0", "suspend 0"]);
    bench.front.set_vring_kick(0, &bench.kick).expect("kick");
    bench.accept(&[3, 9, 12]);
    bench.front.set_vring_enable(0, false).expect("disable");
    assert_eq!(bench.guest.used(), [(0, 1), (2, 1)]);
}

#[test]
fn without_a_region_of_the_front_ends_a_session_that_ends_finishes_its_requests() {
    let mut bench = Bench::new();
    bench.run_ring();
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    let tails = bench.worker.tails();
    assert!(matches!(&tails[..], [Some(tail)] if tail.fresh() && !tail.kept()));
    bench.worker.events();
    let (mut guest, worker, _, result) = bench.close();
    result.expect("orderly");
    assert_eq!(worker.events(), ["stop 0"]);
    assert!(matches!(worker.tails()[..], [None]));
    assert_eq!(guest.used(), [(0, 1)]);
}

#[test]
fn the_tail_comes_back_with_the_region() {
    let mut bench = Bench::new();
    bench.negotiate();
    let kept = Kept::ask(&mut bench);
    kept.hand_over(&mut bench).expect("handed over");
    let tail = bench.worker.tails().pop().flatten().expect("a tail");
    tail.store(8, 0x0123_4567_89ab_cdef);
    assert!(tail.write(65531, b"bytes"));
    let mut bench = bench.reconnect();
    bench.negotiate();
    kept.hand_over(&mut bench).expect("handed over");
    let tail = bench.worker.tails().pop().flatten().expect("a tail");
    assert_eq!(tail.load(8), 0x0123_4567_89ab_cdef);
    let mut bytes = [0; 5];
    assert!(tail.read(65531, &mut bytes));
    assert_eq!(&bytes, b"bytes");
}

#[test]
fn a_ring_without_the_right_to_leave_requests_drains_for_the_base() {
    let mut bench = Bench::new();
    bench.negotiate();
    let kept = Kept::ask(&mut bench);
    bench.run_on(&kept, 0);
    // INFLIGHT_SHMFD alone.
    bench.accept(&[3, 9, 12]);
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    assert_eq!(bench.front.get_vring_base(0).expect("base"), 1);
    assert_eq!(bench.guest.used(), [(0, 1)]);
}

#[test]
fn a_ring_that_is_disabled_before_its_base_is_asked_for_leaves_requests_as_that_does() {
    let mut bench = Bench::new();
    bench.negotiate();
    let kept = Kept::ask(&mut bench);
    bench.run_on(&kept, 0);
    bench.accept(&[3, 9, 12, 20]);
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    bench.worker.events();
    bench.front.set_vring_enable(0, false).expect("disabled");
    assert_eq!(bench.front.get_vring_base(0).expect("base"), 1);
    assert_eq!(bench.worker.events(), ["suspend 0"]);
    assert_eq!(bench.guest.used(), [], "no answer");
    bench.front.set_vring_kick(0, &bench.kick).expect("kick");
    bench.front.set_vring_enable(0, true).expect("enabled");
    assert_eq!(bench.worker.held(0), 1);
    let recovered = |lane: &mut Lane| lane.held.iter().all(|request| request.recovered);
    assert!(bench.worker.with(0, recovered));
}

#[test]
fn a_request_of_its_own_leaves_requests_and_get_vring_base_drains_where_there_is_one() {
    let mut bench = Bench::new();
    bench.negotiate();
    let kept = Kept::ask(&mut bench);
    bench.run_on(&kept, 0);
    bench.accept(&[3, 9, 12, 20, 23]);
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    bench.worker.events();
    bench.send(GET_VRING_BASE_SKIP_DRAIN, 1, &state(0, 0));
    let reply = (GET_VRING_BASE_SKIP_DRAIN, 5, state(0, 1));
    assert_eq!(bench.receive(), reply);
    assert_eq!(bench.worker.events(), ["suspend 0"]);
    assert_eq!(bench.guest.used(), []);
    bench.front.set_vring_kick(0, &bench.kick).expect("kick");
    assert_eq!(bench.front.get_vring_base(0).expect("base"), 1);
    assert_eq!(bench.worker.events(), ["start 0", "stop 0"]);
    assert_eq!(bench.guest.used(), [(0, 1)]);
    bench.send(GET_VRING_BASE_SKIP_DRAIN, 1, &state(77, 0));
    assert_eq!(bench.receive().2, state(77, 0), "no such ring");
    bench.goes_on();
}

#[test]
fn the_request_to_leave_requests_is_refused_where_it_was_not_agreed_on() {
    let mut bench = Bench::new();
    bench.negotiate();
    bench.refused(GET_VRING_BASE_SKIP_DRAIN, &state(0, 0));
    bench.accept(&[3, 9, 23]);
    bench.refused(GET_VRING_BASE_SKIP_DRAIN, &state(0, 0));
    bench.accept(&[3, 9, 12, 20, 23]);
    bench.refused(GET_VRING_BASE_SKIP_DRAIN, &[0; 12]);
    bench.goes_on();
}

#[test]
fn a_region_is_not_replaced_under_a_running_ring() {
    let mut bench = Bench::new();
    bench.negotiate();
    let kept = Kept::ask(&mut bench);
    bench.run_on(&kept, 0);
    let other = Kept::ask(&mut bench);
    assert!(other.hand_over(&mut bench).is_err());
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    assert_eq!(bench.worker.held(0), 1, "it runs on");
}

#[test]
fn a_region_that_cannot_be_served_is_refused_and_no_ring_starts_before_a_better_one() {
    let mut bench = Bench::new();
    bench.negotiate();
    let kept = Kept::ask(&mut bench);
    let VhostUserInflight { mmap_size, .. } = kept.told;
    let told = |len, offset, rings, entries| VhostUserInflight::new(len, offset, rings, entries);
    for bad in [
        told(mmap_size + 1, 0, 4, SIZE),
        told(mmap_size, 4096, 4, SIZE),
        told(mmap_size, u64::MAX - 4095, 4, SIZE),
        told(mmap_size - 64, 64, 4, SIZE),
        told(4 * 320 - 1, 0, 4, SIZE),
        told(u64::MAX, 0, 4, SIZE),
        told(mmap_size, 0, 257, SIZE),
        told(mmap_size, 0, 4, u16::MAX),
    ] {
        let fd = kept.file.as_raw_fd();
        assert!(bench.front.set_inflight_fd(&bad, fd).is_err());
    }
    bench.share_memory();
    bench.set_up_ring_at(0);
    assert!(bench.front.set_vring_enable(0, true).is_err());
    assert_eq!(bench.worker.running(), [0; 0]);
    kept.hand_over(&mut bench).expect("a good one");
    assert_eq!(bench.worker.running(), [0]);
}

#[test]
fn a_ring_may_be_larger_than_the_region_was_asked_for() {
    let mut bench = Bench::new();
    bench.negotiate();
    let kept = Kept::ask_for(&mut bench, SIZE / 2);
    bench.run_on(&kept, 0);
    for _ in 0..6 {
        bench.post_flush();
    }
    bench.front.set_vring_enable(0, true).expect("scan");
    assert_eq!(bench.worker.held(0), 6);
    let mut bench = bench.reconnect();
    assert_eq!(bench.guest.used(), [], "no answer");
    bench.run_on(&kept, 6);
    assert_eq!(bench.worker.held(0), 6);
    let recovered = |lane: &mut Lane| lane.held.iter().all(|request| request.recovered);
    assert!(bench.worker.with(0, recovered));
}

#[test]
fn a_file_that_could_shrink_is_sealed_or_refused() {
    let mut bench = Bench::new();
    bench.negotiate();
    let told = VhostUserInflight::new(REGION_LEN, 0, 4, SIZE);
    let memory = |flags| {
        let fd = memfd_create("theirs", flags | MemfdFlags::CLOEXEC).expect("memfd");
        let file = File::from(fd);
        file.set_len(REGION_LEN).expect("size");
        file
    };
    let open = memory(MemfdFlags::ALLOW_SEALING);
    bench
        .front
        .set_inflight_fd(&told, open.as_raw_fd())
        .expect("sealed on the way");
    assert!(open.set_len(0).is_err());
    let closed = memory(MemfdFlags::empty());
    assert!(
        bench
            .front
            .set_inflight_fd(&told, closed.as_raw_fd())
            .is_err()
    );
    let sealed = memory(MemfdFlags::ALLOW_SEALING);
    fcntl_add_seals(&sealed, SealFlags::SHRINK | SealFlags::SEAL).expect("seal");
    bench
        .front
        .set_inflight_fd(&told, sealed.as_raw_fd())
        .expect("sealed already");
}

#[test]
fn a_region_without_a_tail_is_one_of_another_back_end_and_is_served() {
    let mut bench = Bench::new();
    bench.negotiate();
    let kept = Kept::ask(&mut bench);
    let kept = Kept {
        told: VhostUserInflight::new(4 * 320, 0, 4, SIZE),
        ..kept
    };
    bench.run_on(&kept, 0);
    let tail = bench.worker.tails().pop().flatten().expect("a tail");
    assert!(tail.kept() && tail.len() == 65536);
    tail.store(0, 1);
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    let mut bench = bench.reconnect();
    bench.worker.tails();
    bench.run_on(&kept, 0);
    let tail = bench.worker.tails().pop().flatten().expect("a tail");
    assert_eq!((tail.fresh(), tail.load(0)), (false, 0));
    assert_eq!(bench.worker.held(0), 1);
}

#[test]
fn a_ring_that_the_region_has_no_part_for_does_not_start() {
    let mut bench = Bench::new();
    bench.negotiate();
    let asked = VhostUserInflight::new(0, 0, 1, SIZE);
    let (told, file) = bench.front.get_inflight_fd(&asked).expect("a region");
    let kept = Kept { told, file };
    kept.hand_over(&mut bench).expect("handed over");
    bench.share_memory();
    bench.set_up_ring(1);
    assert!(bench.front.set_vring_enable(1, true).is_err());
    assert_eq!(bench.worker.running(), [0; 0]);
}

#[test]
fn after_a_reset_the_region_is_as_new() {
    let mut bench = Bench::new();
    bench.negotiate();
    let kept = Kept::ask(&mut bench);
    bench.run_on(&kept, 0);
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    bench.front.reset_device().expect("reset");
    assert_eq!(bench.guest.used(), [(0, 1)], "finished before the answer");
    assert_eq!(bench.worker.running(), [0; 0]);
    // The driver begins anew, and the front-end sees no need for another region.
    bench.guest = Guest::new();
    bench.negotiate();
    bench.share_memory();
    bench.set_up_ring_at(0);
    bench.front.set_vring_enable(0, true).expect("enable");
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    assert_eq!(bench.worker.held(0), 1);
    let mut bench = bench.reconnect();
    bench.run_on(&kept, 0);
    assert_eq!(bench.worker.held(0), 1);
}

#[test]
fn a_ring_that_is_disabled_with_a_region_drains_and_goes_on() {
    let mut bench = Bench::new();
    bench.negotiate();
    let kept = Kept::ask(&mut bench);
    bench.run_on(&kept, 0);
    bench.accept(&[3, 9, 12]);
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    bench.front.set_vring_enable(0, false).expect("disable");
    assert_eq!(bench.guest.used(), [(0, 1)]);
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("enable");
    let fresh = |lane: &mut Lane| lane.held.iter().all(|request| !request.recovered);
    assert!(bench.worker.with(0, fresh));
    assert_eq!(bench.worker.held(0), 1);
}
