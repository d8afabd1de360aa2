//! When rings run: started, stopped, disabled, reset, left behind.

use super::*;

#[test]
fn a_ring_runs_once_it_has_everything_and_is_enabled() {
    let mut bench = Bench::new();
    bench.negotiate();
    bench.share_memory();
    bench.post_flush();
    bench.set_up_ring(0);
    assert_eq!(bench.worker.events(), [""; 0], "not enabled");
    bench.front.set_vring_enable(0, true).expect("enable");
    assert_eq!(bench.worker.events(), ["start 0"]);
    assert_eq!(bench.worker.held(0), 1, "scanned without a kick");
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("enable");
    assert_eq!(bench.worker.events(), ["scan 0"]);
    assert_eq!(bench.worker.held(0), 2, "scanned at every enable");
}

#[test]
fn without_protocol_features_rings_are_enabled_from_the_start() {
    let bench = Bench::new();
    let features = bench.front.get_features().expect("features");
    bench
        .front
        .set_features(features & !PROTOCOL_FEATURES)
        .expect("set features");
    bench.share_memory();
    bench.set_up_ring(1);
    bench.goes_on();
    assert_eq!(bench.worker.running(), [1]);
}

#[test]
fn disabling_drains_and_enabling_goes_on_where_the_ring_stood() {
    let mut bench = Bench::new();
    bench.run_ring();
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    assert_eq!(bench.guest.used(), []);
    bench.front.set_vring_enable(0, false).expect("disable");
    assert_eq!(bench.guest.used().len(), 1, "finished before the answer");
    assert!(bench.calls() > 0);
    bench.post_flush();
    assert_eq!(bench.worker.running(), [0; 0]);
    assert_eq!((bench.guest.used(), bench.calls()), (vec![], 0));
    bench.front.set_vring_enable(0, true).expect("enable");
    assert_eq!(bench.worker.held(0), 1);
    assert_eq!(bench.front.get_vring_base(0).expect("base"), 2);
}

#[test]
fn the_base_is_answered_after_the_drain_and_the_ring_starts_again_with_a_kick() {
    let mut bench = Bench::new();
    bench.run_ring();
    for _ in 0..3 {
        bench.post_flush();
    }
    bench.front.set_vring_enable(0, true).expect("scan");
    assert_eq!(bench.worker.held(0), 3);
    assert_eq!(bench.front.get_vring_base(0).expect("base"), 3);
    assert_eq!(bench.guest.used().len(), 3);
    bench.front.set_vring_enable(0, true).expect("enable");
    assert_eq!(bench.worker.running(), [0; 0], "not without a kick");
    bench.front.set_vring_kick(0, &bench.kick).expect("kick");
    assert_eq!(bench.worker.running(), [0]);
    assert_eq!(bench.front.get_vring_base(0).expect("base"), 3);
    assert_eq!(bench.front.get_vring_base(3).expect("never used"), 0);
}

#[test]
fn the_base_of_a_ring_that_does_not_exist_is_answered_with_0() {
    let mut bench = Bench::new();
    bench.negotiate();
    let get_base = FrontendReq::GET_VRING_BASE as u32;
    bench.send(get_base, 1, &state(200, 0));
    assert_eq!(bench.receive(), (get_base, 5, state(200, 0)));
    bench.goes_on();
}

#[test]
fn descriptors_can_be_replaced_while_the_ring_runs() {
    let mut bench = Bench::new();
    bench.run_ring();
    bench.worker.events();
    bench.post_flush();
    bench.front.set_vring_kick(0, &bench.kick).expect("kick");
    assert_eq!(bench.worker.events(), ["kick true 0"]);
    assert_eq!(bench.worker.held(0), 1, "scanned: the old kick may be lost");
    bench.front.set_vring_err(0, &bench.kick).expect("err");
    assert_eq!(bench.worker.events(), ["err true 0"]);
    for (request, event) in [
        (FrontendReq::SET_VRING_CALL, "call false 0"),
        (FrontendReq::SET_VRING_KICK, "kick false 0"),
        (FrontendReq::SET_VRING_ERR, "err false 0"),
    ] {
        bench.send(request as u32, 1 | 8, &0x100_u64.to_le_bytes());
        assert_eq!(bench.receive().2, [0; 8]);
        assert_eq!(bench.worker.events(), [event]);
    }
    bench
        .worker
        .with(0, |lane| assert!(lane.queue.kick_fd().is_none()));
    assert_eq!(bench.worker.running(), [0]);
}

#[test]
fn a_running_ring_keeps_its_size_and_base() {
    let mut bench = Bench::new();
    bench.run_ring();
    assert!(bench.front.set_vring_num(0, SIZE).is_err());
    assert!(bench.front.set_vring_base(0, 5).is_err());
    bench
        .front
        .set_vring_addr(0, &ring_config())
        .expect("the same");
    assert_eq!(bench.worker.running(), [0]);
    bench.worker.events();
    let moved = VringConfigData {
        used_ring_addr: USER + 0x3000,
        ..ring_config()
    };
    bench.front.set_vring_addr(0, &moved).expect("moved");
    assert_eq!(bench.worker.events(), ["stop 0", "start 0"]);
    let nowhere = VringConfigData {
        used_ring_addr: 0x3000,
        ..ring_config()
    };
    assert!(bench.front.set_vring_addr(0, &nowhere).is_err());
    assert_eq!(bench.worker.running(), [0]);
}

#[test]
fn a_ring_that_cannot_start_is_refused() {
    let mut bench = Bench::new();
    bench.negotiate();
    bench.share_memory();
    bench.set_up_ring(0);
    let past_the_end = VringConfigData {
        avail_ring_addr: USER + REGIONS[1] + REGION - 4,
        ..ring_config()
    };
    bench
        .front
        .set_vring_addr(0, &past_the_end)
        .expect("starts inside");
    assert!(bench.front.set_vring_enable(0, true).is_err());
    assert_eq!(bench.worker.running(), [0; 0]);
    bench.goes_on();
}

#[test]
fn a_reset_stops_the_rings_and_forgets_them() {
    for reset in [Frontend::reset_device, |front: &mut Frontend| {
        front.reset_owner()
    }] {
        let mut bench = Bench::new();
        bench.run_ring();
        bench.post_flush();
        bench.front.set_vring_enable(0, true).expect("scan");
        bench.worker.events();
        reset(&mut bench.front).expect("reset");
        assert_eq!(bench.worker.events(), ["stop 0"]);
        assert_eq!(bench.guest.used().len(), 1);
        assert_eq!(bench.front.get_vring_base(0).expect("base"), 0);
        // The front-end sets the device up anew in the same session.
        let features = bench.device.features();
        bench.front.set_features(features).expect("features");
        bench.set_up_ring(0);
        bench.front.set_vring_base(0, 1).expect("base");
        bench.front.set_vring_enable(0, true).expect("enable");
        assert_eq!(bench.worker.running(), [0]);
    }
}

#[test]
fn a_front_end_that_leaves_has_its_rings_drained_and_the_next_one_starts_afresh() {
    let mut bench = Bench::new();
    bench.run_ring();
    bench.set_writeback(0).expect("write-through");
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    assert_eq!(bench.worker.held(0), 1);
    let (mut guest, worker, device, result) = bench.close();
    result.expect("orderly");
    assert_eq!(worker.running(), [0; 0]);
    assert_eq!(guest.used().len(), 1);

    let mut bench = Bench::connect(Guest::new(), worker, device);
    bench.run_ring();
    assert_eq!(bench.config(32, 1).expect("config"), [1]);
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    assert_eq!(bench.worker.held(0), 1);
    bench.close().3.expect("orderly");
}

#[test]
fn a_broken_ring_leaves_the_others_and_the_session_alone() {
    let mut bench = Bench::new();
    bench.run_ring();
    bench.guest.set_avail(SIZE + 1);
    bench.front.set_vring_enable(0, true).expect("scan");
    bench
        .worker
        .with(0, |lane| assert!(lane.queue.broken().is_some()));
    bench.goes_on();
    bench.front.get_vring_base(0).expect("base");
    bench.close().3.expect("orderly");
}
