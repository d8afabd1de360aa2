//! Rings that stop and start again: what was taken is finished first, and then nothing is touched.

use std::thread;
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::daemons::{Attach, Export};
use crate::front_end::{DATA, FrontEnd, OK, Setup, UNANSWERED, kind};
use crate::noise::noise;
use crate::ring::{into, out};

/// Long enough for a ring that runs to answer, many times over.
const WHILE: Duration = Duration::from_millis(200);

const REQUESTS: usize = 24;
const LEN: u32 = 64 << 10;

/// Stops a ring that has requests in flight at a target that does not answer; `stop` is called in
/// a thread of its own, and must return when the target has answered, not before.
fn stopping_waits_for_what_is_in_flight(
    stop: fn(&mut Frontend) -> Option<u32>,
    again: fn(&mut FrontEnd),
) {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    let data = noise(LEN as usize, 20);
    assert_eq!(guest.write(0, 0, &data), OK);
    export.process.pause();
    for slot in 0..REQUESTS {
        let at = DATA + u64::from(LEN) * slot as u64;
        let (kind, sector, buffer) = match slot % 2 {
            0 => (kind::READ, 0, into(at, LEN)),
            _ => (kind::WRITE, 128 * slot as u64, out(at, LEN)),
        };
        guest.memory.write(at, &vec![0x77; LEN as usize]);
        guest.add(0, slot, kind, sector, &[buffer]);
    }
    guest.rings[0].submit();
    assert!(guest.rings[0].is_silent(WHILE), "a stopped target answered");

    let mut frontend = guest.frontend.clone();
    let stopping = thread::spawn(move || (stop(&mut frontend), Instant::now()));
    thread::sleep(WHILE);
    assert!(
        !stopping.is_finished(),
        "the ring stopped with {REQUESTS} requests in flight"
    );
    let continued = Instant::now();
    export.process.resume();
    let (base, stopped) = stopping.join().expect("an answer");
    assert!(stopped > continued);
    assert!(
        base.is_none_or(|base| base == 1 + REQUESTS as u32),
        "base {base:?}"
    );
    // All of it was there when the answer was.
    assert_eq!(guest.rings[0].used().len(), REQUESTS);
    for slot in 0..REQUESTS {
        assert_eq!(guest.status(0, slot), OK, "request {slot}");
        if slot % 2 == 0 {
            let at = DATA + u64::from(LEN) * slot as u64;
            assert!(
                guest.memory.read(at, LEN as usize) == data,
                "request {slot}"
            );
        }
    }

    stopped_ring_touches_nothing(&mut guest);
    again(&mut guest);
    guest.rings[0].wait(1);
    assert_eq!(guest.status(0, 0), OK);
    assert!(guest.memory.read(DATA, LEN as usize) == data);
}

/// Posts a read of the first data to ring 0, which must not be served.
fn stopped_ring_touches_nothing(guest: &mut FrontEnd) {
    guest.memory.write(DATA, &[0x66; 4096]);
    guest.add(0, 0, kind::READ, 0, &[into(DATA, LEN)]);
    guest.rings[0].publish();
    let before = guest.memory.snapshot();
    guest.rings[0].kick();
    thread::sleep(WHILE);
    assert!(
        guest.memory.snapshot() == before,
        "a stopped ring touched the guest's memory"
    );
    assert_eq!(guest.status(0, 0), UNANSWERED);
}

#[test]
fn get_vring_base_waits_for_requests_in_flight_and_then_nothing_is_touched() {
    let stop = |frontend: &mut Frontend| Some(frontend.get_vring_base(0).expect("GET_VRING_BASE"));
    stopping_waits_for_what_is_in_flight(stop, |guest| guest.start(0, 1 + REQUESTS as u16));
}

#[test]
fn disabling_a_ring_waits_for_requests_in_flight_and_then_nothing_is_touched() {
    let stop = |frontend: &mut Frontend| {
        frontend
            .set_vring_enable(0, false)
            .expect("SET_VRING_ENABLE");
        None
    };
    stopping_waits_for_what_is_in_flight(stop, |guest| guest.enable(0, true));
}

#[test]
fn a_ring_is_scanned_whenever_it_is_enabled_without_a_kick() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let setup = Setup {
        enable: false,
        ..Setup::default()
    };
    let mut guest = FrontEnd::connect_with(&attach.socket, setup);
    for round in 0..5 {
        guest.add(0, 0, kind::WRITE, round, &[out(DATA, 512)]);
        guest.add(0, 1, kind::READ, round, &[into(DATA + 4096, 512)]);
        guest.rings[0].publish();
        assert!(
            guest.rings[0].is_silent(Duration::from_millis(50)),
            "it was not enabled"
        );
        guest.enable(0, true);
        guest.rings[0].wait(2);
        assert_eq!(
            (guest.status(0, 0), guest.status(0, 1)),
            (OK, OK),
            "round {round}"
        );
        guest.enable(0, false);
    }
    // Enabled twice, it is scanned twice.
    guest.enable(0, true);
    guest.add(0, 0, kind::FLUSH, 0, &[]);
    guest.rings[0].publish();
    guest.enable(0, true);
    guest.rings[0].wait(1);
}

#[test]
fn a_ring_that_stopped_goes_on_where_it_was_also_across_the_wrap_of_its_indices() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let setup = Setup {
        enable: false,
        size: 16,
        ..Setup::default()
    };
    let mut guest = FrontEnd::connect_with(&attach.socket, setup);
    let mut base = 65_500_u16;
    guest.frontend.get_vring_base(0).expect("GET_VRING_BASE");
    guest.rings[0].restart(base);
    guest.start(0, base);
    guest.enable(0, true);
    for round in 0..6 {
        for number in 0..11_u16 {
            let data = noise(512, u64::from(number) + 100 * round);
            assert_eq!(guest.write(0, 3, &data), OK);
            assert_eq!(
                guest.read(0, 3, 512),
                (OK, data),
                "round {round}, request {number}"
            );
            base = base.wrapping_add(2);
        }
        let stopped = guest.frontend.get_vring_base(0).expect("GET_VRING_BASE");
        assert_eq!(stopped, u32::from(base), "round {round}");
        guest.start(0, base);
    }
    assert!(base < 65_500, "the indices did not wrap");
}

#[test]
fn one_ring_stops_while_another_goes_on() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let setup = Setup {
        rings: 3,
        ..Setup::default()
    };
    let mut guest = FrontEnd::connect_with(&attach.socket, setup);
    for round in 0..20_u16 {
        assert_eq!(guest.write(2, 0, &[1; 512]), OK);
        let base = guest.frontend.get_vring_base(2).expect("GET_VRING_BASE");
        assert_eq!(base, u32::from(round) + 1);
        assert_eq!(guest.write(0, 0, &[2; 512]), OK);
        assert_eq!(guest.write(1, 0, &[3; 512]), OK);
        guest.start(2, round + 1);
    }
}
