//! Guests that break the rules of a ring: it stops being served, and nothing else happens.

use std::time::Duration;

use vhost::VhostBackend;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::daemons::{Attach, Export};
use crate::front_end::{DATA, FrontEnd, IOERR, OK, Setup, kind};
use crate::memory::{HIGH, HIGH_SIZE, LOW_SIZE};
use crate::ring::{Buffer, into, out};

const INDIRECT: u16 = 4;
const NEXT: u16 = 1;

/// What a guest does to its ring 0.
pub(crate) type Misdeed = fn(&mut FrontEnd);

/// Posts a write whose data are as given.
fn write_from(guest: &mut FrontEnd, data: &[Buffer]) {
    guest.add(0, 0, kind::WRITE, 0, data);
}

/// Points a chain at an indirect table of `len` bytes at `table`.
fn indirect(guest: &mut FrontEnd, table: u64, len: u32) {
    let ring = &mut guest.rings[0];
    ring.write_descriptor(0, out(table, len), INDIRECT, 0);
    ring.offer(0);
}

pub(crate) const MISDEEDS: &[(&str, Misdeed)] = &[
    ("a chain that never ends", |guest| {
        guest.rings[0].add_loop(out(DATA, 16))
    }),
    ("data in no memory", |guest| {
        write_from(guest, &[out(1 << 40, 512)])
    }),
    ("data past the end of a region", |guest| {
        write_from(guest, &[out(LOW_SIZE - 256, 512)])
    }),
    ("data past the end of all memory", |guest| {
        write_from(guest, &[out(HIGH + HIGH_SIZE - 256, 512)]);
    }),
    ("data past the end of all addresses", |guest| {
        write_from(guest, &[out(u64::MAX - 100, 512)])
    }),
    ("a read into no memory", |guest| {
        guest.add(0, 0, kind::READ, 0, &[into(1 << 40, 512)]);
    }),
    ("a status in no memory", |guest| {
        let (header, _) = guest.frame(0, 0, kind::FLUSH, 0);
        guest.rings[0].add(&[header, into(1 << 40, 1)]);
    }),
    ("no place for a status", |guest| {
        let (header, _) = guest.frame(0, 0, kind::WRITE, 0);
        guest.rings[0].add(&[header, out(DATA, 512)]);
    }),
    ("an available index that jumps", |guest| {
        guest.rings[0].skip(1000)
    }),
    ("one entry more than the ring has", |guest| {
        guest.rings[0].skip(129)
    }),
    ("a request that is made available twice", |guest| {
        let (header, status) = guest.frame(0, 0, kind::FLUSH, 0);
        let head = guest.rings[0].add(&[header, status]);
        guest.rings[0].offer(head);
    }),
    ("a head outside the table", |guest| {
        guest.rings[0].offer(128)
    }),
    ("a next outside the table", |guest| {
        let ring = &mut guest.rings[0];
        ring.write_descriptor(0, out(DATA, 16), NEXT, 500);
        ring.offer(0);
    }),
    ("an indirect table in no memory", |guest| {
        indirect(guest, 1 << 40, 64)
    }),
    ("an indirect table of a fraction", |guest| {
        indirect(guest, DATA, 33)
    }),
    ("an empty indirect table", |guest| indirect(guest, DATA, 0)),
    ("an indirect table in an indirect table", |guest| {
        let ring = &mut guest.rings[0];
        ring.write_descriptor(DATA, out(DATA + 4096, 32), INDIRECT, 0);
        indirect(guest, DATA, 16);
    }),
    ("an indirect table that never ends", |guest| {
        let ring = &mut guest.rings[0];
        ring.write_descriptor(DATA, out(DATA, 16), NEXT, 0);
        indirect(guest, DATA, 16);
    }),
    ("more data than a length can say", |guest| {
        let buffers = vec![out(0, 1 << 25); 130];
        guest.rings[0].add_indirect(DATA, &buffers);
    }),
];

/// Waits until the device reports that a ring is broken.
pub(crate) fn reported(err: &EventFd) -> bool {
    use std::os::fd::AsRawFd;
    let epoll = Epoll::new().expect("epoll");
    let readable = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, err.as_raw_fd(), readable)
        .expect("epoll");
    epoll
        .wait(5000, &mut [EpollEvent::default()])
        .expect("epoll")
        > 0
}

#[test]
fn a_guest_that_breaks_its_ring_breaks_that_ring_alone_and_not_for_the_next_front_end() {
    let export = Export::start(&["ram:64M"]);
    let mut attach = Attach::start(export.uri());
    for (misdeed, commit) in MISDEEDS {
        let setup = Setup {
            rings: 3,
            ..Setup::default()
        };
        let mut guest = FrontEnd::connect_with(&attach.socket, setup);
        let err = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        guest
            .frontend
            .set_vring_err(0, &err)
            .expect("SET_VRING_ERR");
        assert_eq!(guest.write(0, 1, &[1; 512]), OK, "before {misdeed}");
        guest.write(1, 1, &[7; 512]);
        let used = guest.rings[0].used_idx();
        commit(&mut guest);
        guest.rings[0].publish();
        guest.rings[0].kick();
        assert!(reported(&err), "{misdeed}: not reported");
        assert_eq!(guest.rings[0].used_idx(), used, "{misdeed}: it was used");
        // A good request comes too late.
        guest.rings[0].kick();
        assert!(
            guest.rings[0].is_silent(Duration::from_millis(20)),
            "{misdeed}: it goes on"
        );
        for ring in [1, 2] {
            assert_eq!(
                guest.read(ring, 1, 512),
                (OK, vec![7; 512]),
                "{misdeed}: ring {ring}"
            );
        }
        // Stopped and set up anew, the ring is as good as before.
        guest.frontend.get_vring_base(0).expect("GET_VRING_BASE");
        guest.rings[0].restart(0);
        guest.start(0, 0);
        assert_eq!(guest.write(0, 1, &[1; 512]), OK, "after {misdeed}");
        assert!(attach.process.is_running());
    }
    let log = attach.process.stderr();
    assert!(
        log.iter().any(|line| line.contains("ring is broken")),
        "nothing in the log"
    );
    attach.stop();
}

#[test]
fn requests_in_flight_are_finished_on_a_ring_that_breaks() {
    let export = Export::start(&["ram:8M"]);
    let mut attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    let err = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    guest
        .frontend
        .set_vring_err(0, &err)
        .expect("SET_VRING_ERR");
    for slot in 0..8 {
        guest.add(0, slot, kind::WRITE, 0, &[out(DATA, 64 << 10)]);
    }
    guest.rings[0].offer(500);
    guest.rings[0].publish();
    guest.rings[0].kick();
    assert!(reported(&err), "not reported");
    // The front-end can still stop it, which waits for what is in flight.
    let base = guest.frontend.get_vring_base(0).expect("GET_VRING_BASE");
    assert!((8..=9).contains(&base), "base {base}");
    drop(guest);
    attach.stop();
    assert_eq!(attach.counter("writes"), 8);
}

#[test]
fn a_header_that_is_too_short_is_an_error_and_the_ring_goes_on() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    for len in [1, 8, 15] {
        let (header, status) = guest.frame(0, 0, kind::FLUSH, 0);
        guest.rings[0].add(&[out(header.addr, len), status]);
        guest.rings[0].submit();
        guest.rings[0].wait(1);
        assert_eq!(guest.status(0, 0), IOERR, "{len} bytes");
        assert_eq!(guest.flush(0), OK);
    }
}
