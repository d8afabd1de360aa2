//! Digests in the NVMe/TCP machine: what they cover, what a wrong one leads to, and what it does not.

use nvmf::spec::{Cqe, Sqe, Status};
use nvmf::tcp::{
    Controller, ControllerEvent, Digests, Direction, Host, Limits, QPair, Role, Want, crc32c,
};

use crate::stepping::{feed, pattern, sent};

const QUEUE_SIZE: u32 = 8;
const BOTH: Digests = Digests {
    header: true,
    data: true,
};
const HEADER: Digests = Digests {
    header: true,
    data: false,
};
const DATA: Digests = Digests {
    header: false,
    data: true,
};

fn limits(digests: Digests) -> Limits {
    Limits {
        rx_align: 4,
        tx_align: 4,
        max_h2c_data: 4096,
        max_r2t: 2,
        in_capsule_limit: 1024,
        digests,
        admin: false,
    }
}

fn host(digests: Digests) -> QPair<Host> {
    QPair::host(QUEUE_SIZE, limits(digests))
}

fn controller(digests: Digests) -> QPair<Controller> {
    QPair::controller(QUEUE_SIZE, false, limits(digests))
}

/// A host and a controller with one command of `len` bytes on its way: the stream that it makes.
fn begun(direction: Direction, len: usize) -> (QPair<Host>, QPair<Controller>, Vec<u8>) {
    let mut host = host(BOTH);
    let sqe = match direction {
        Direction::In => Sqe::read(1, 0, 1),
        _ => Sqe::write(1, 0, 1, false),
    };
    host.submit(sqe, direction, len as u32).unwrap();
    let stream = sent(&mut host, |_| pattern(len));
    (host, controller(BOTH), stream)
}

fn take(machine: &mut QPair<Controller>, stream: &[u8], seen: &mut Vec<ControllerEvent>) {
    let mut events = |machine: &mut QPair<Controller>| {
        while let Some(event) = machine.event() {
            seen.push(event);
        }
    };
    feed(machine, stream, stream.len(), &mut events, |_, _, _| ()).unwrap();
    events(machine);
}

fn give(machine: &mut QPair<Host>, stream: &[u8]) {
    feed(machine, stream, stream.len(), |_| (), |_, _, _| ()).unwrap();
}

/// A write of 5000 bytes up to its R2T, answered: the H2CData that follow.
fn soliciting() -> (QPair<Host>, QPair<Controller>, u16, Vec<u8>, Vec<u8>) {
    let (mut host, mut controller, stream) = begun(Direction::Out, 5000);
    let mut seen = Vec::new();
    take(&mut controller, &stream, &mut seen);
    let [ControllerEvent::Command { slot, .. }] = seen[..] else {
        panic!("{seen:?}")
    };
    controller.fetch(slot, 0, 5000).unwrap();
    let r2t = sent(&mut controller, |_| Vec::new());
    give(&mut host, &r2t);
    let data = sent(&mut host, |_| pattern(5000));
    (host, controller, slot, r2t, data)
}

/// A read of 5000 bytes, sent in two pieces: the C2HData.
fn reading() -> (QPair<Host>, QPair<Controller>, Vec<u8>) {
    let (host, mut controller, stream) = begun(Direction::In, 5000);
    let mut seen = Vec::new();
    take(&mut controller, &stream, &mut seen);
    let [ControllerEvent::Command { slot, .. }] = seen[..] else {
        panic!("{seen:?}")
    };
    controller.send(slot, 0, 3000, false).unwrap();
    let mut data = sent(&mut controller, |_| pattern(5000));
    controller.send(slot, 3000, 2000, true).unwrap();
    controller.respond(slot, Cqe::default());
    data.extend(sent(&mut controller, |_| pattern(5000)));
    (host, controller, data)
}

fn statuses(host: &mut QPair<Host>) -> Vec<Status> {
    std::iter::from_fn(|| host.completed())
        .map(|done| done.cqe.status())
        .collect()
}

/// Flips each bit of a header behind its common part, and of its digest.
fn every_flip_is_fatal<R: Role>(make: impl Fn() -> QPair<R>, header: &[u8]) {
    let hlen = usize::from(header[2]);
    for at in 8..hlen + 4 {
        for bit in 0..8 {
            let mut bytes = header.to_vec();
            bytes[at] ^= 1 << bit;
            let digest: [u8; 4] = bytes[hlen..hlen + 4].try_into().unwrap();
            let mut machine = make();
            let error = feed(&mut machine, &bytes, hlen + 4, |_| (), |_, _, _| ()).unwrap_err();
            assert_eq!((error.fes.0, error.fei), (3, u32::from_le_bytes(digest)));
            // Told once, with the header but no digest, neither its own nor the one that was wrong.
            let term = machine.transmit().unwrap();
            assert_eq!(term.header()[1], 0);
            assert_eq!(term.header()[8..10], [3, 0]);
            assert_eq!(term.header()[10..14], digest);
            assert_eq!(term.header()[24..], bytes[..hlen]);
            assert!(term.payload.is_none() && machine.transmit().is_none());
            assert_eq!(machine.want(), Want::Nothing);
        }
    }
}

#[test]
fn a_flipped_bit_in_any_header_is_fatal_and_reported_with_the_digest_received() {
    let (_, _, capsule) = begun(Direction::Out, 512);
    every_flip_is_fatal(|| controller(BOTH), &capsule[..76]);
    let (_, _, _, r2t, data) = soliciting();
    every_flip_is_fatal(|| controller(BOTH), &data[..28]);
    every_flip_is_fatal(|| host(BOTH), &r2t);
    let (_, _, data) = reading();
    every_flip_is_fatal(|| host(BOTH), &data[..28]);
    let (_, mut controller, stream) = begun(Direction::None, 0);
    let mut seen = Vec::new();
    take(&mut controller, &stream, &mut seen);
    let [ControllerEvent::Command { slot, .. }] = seen[..] else {
        panic!("{seen:?}")
    };
    controller.respond(slot, Cqe::default());
    let response = sent(&mut controller, |_| Vec::new());
    assert_eq!(response.len(), 28);
    every_flip_is_fatal(|| host(BOTH), &response);
}

#[test]
fn a_header_digest_lies_before_the_padding() {
    let wide = Limits {
        tx_align: 128,
        ..limits(BOTH)
    };
    let mut host = QPair::host(QUEUE_SIZE, wide);
    host.submit(Sqe::write(1, 0, 1, false), Direction::Out, 512)
        .unwrap();
    let stream = sent(&mut host, |_| pattern(512));
    assert_eq!((stream[3], stream.len()), (128, 128 + 512 + 4));
    assert_eq!(stream[72..76], crc32c(0, &stream[..72]).to_le_bytes());
    assert!(stream[76..128].iter().all(|&pad| pad == 0));
    assert_eq!(stream[640..], crc32c(0, &pattern(512)).to_le_bytes());
    let (mut controller, mut seen) = (controller(BOTH), Vec::new());
    take(&mut controller, &stream, &mut seen);
    assert_eq!(
        seen[1..],
        [ControllerEvent::Fetched {
            slot: 0,
            intact: true
        }]
    );
}

fn header(kind: u8, flags: u8, hlen: u8, pdo: u8, plen: u32) -> Vec<u8> {
    let mut bytes = vec![kind, flags, hlen, pdo];
    bytes.extend_from_slice(&plen.to_le_bytes());
    bytes
}

fn offence<R: Role>(mut machine: QPair<R>, bytes: &[u8]) -> (u16, u32) {
    let error = feed(&mut machine, bytes, 8, |_| (), |_, _, _| ()).unwrap_err();
    (error.fes.0, error.fei)
}

#[test]
fn digest_flags_are_set_exactly_where_digests_are() {
    // What a controller receives: capsules with and without data, and data.
    for (digests, bytes) in [
        (BOTH, header(0x04, 0, 72, 0, 76)),
        (BOTH, header(0x04, 2, 72, 0, 76)),
        (BOTH, header(0x04, 3, 72, 0, 76)),
        (BOTH, header(0x04, 3, 72, 76, 76)),
        (BOTH, header(0x04, 1, 72, 76, 92)),
        (BOTH, header(0x04, 2, 72, 76, 92)),
        (BOTH, header(0x06, 1, 24, 28, 40)),
        (HEADER, header(0x04, 3, 72, 76, 92)),
        (HEADER, header(0x04, 0, 72, 76, 92)),
        (DATA, header(0x04, 1, 72, 0, 72)),
        (DATA, header(0x04, 2, 72, 0, 72)),
        (DATA, header(0x04, 0, 72, 72, 92)),
        (DATA, header(0x06, 0, 24, 24, 40)),
        (Digests::default(), header(0x06, 2, 24, 24, 40)),
        (Digests::default(), header(0x04, 1, 72, 0, 72)),
    ] {
        let found = offence(controller(digests), &bytes);
        assert_eq!(found, (1, 1), "{digests:?} {bytes:02x?}");
    }
    // What a host receives: responses, R2T and data.
    for (digests, bytes) in [
        (BOTH, header(0x05, 0, 24, 0, 28)),
        (BOTH, header(0x05, 3, 24, 0, 28)),
        (BOTH, header(0x09, 0, 24, 0, 28)),
        (BOTH, header(0x07, 5, 24, 28, 40)),
        (HEADER, header(0x07, 7, 24, 28, 40)),
        (DATA, header(0x05, 2, 24, 0, 24)),
        (DATA, header(0x09, 2, 24, 0, 24)),
        (DATA, header(0x07, 4, 24, 24, 40)),
    ] {
        let found = offence(host(digests), &bytes);
        assert_eq!(found, (1, 1), "{digests:?} {bytes:02x?}");
    }
}

#[test]
fn offsets_and_lengths_make_room_for_digests() {
    for (digests, bytes, fei) in [
        // Data that would begin inside the header's digest.
        (BOTH, header(0x04, 3, 72, 72, 92), 3),
        (HEADER, header(0x06, 1, 24, 24, 40), 3),
        // Data without an offset.
        (HEADER, header(0x04, 1, 72, 0, 80), 3),
        // Too short for the header's digest.
        (HEADER, header(0x04, 1, 72, 0, 72), 4),
        // Nothing, or less, in front of the data's digest.
        (BOTH, header(0x04, 3, 72, 76, 80), 4),
        (BOTH, header(0x04, 3, 72, 76, 79), 4),
        (DATA, header(0x06, 2, 24, 24, 28), 4),
        // The digest is no part of what a capsule may hold, nor of the limit.
        (DATA, header(0x04, 2, 72, 72, 72 + 1024 + 4 + 1), 4),
    ] {
        let found = offence(controller(digests), &bytes);
        assert_eq!(found, (1, fei), "{digests:?} {bytes:02x?}");
    }
    let full = header(0x04, 2, 72, 72, 72 + 1024 + 4);
    assert_eq!(controller(DATA).feed(&full), Ok(8));
    for (bytes, fei) in [
        (header(0x05, 1, 24, 0, 24), 4),
        (header(0x09, 1, 24, 0, 32), 4),
        (header(0x07, 3, 24, 24, 40), 3),
    ] {
        assert_eq!(offence(host(BOTH), &bytes), (1, fei), "{bytes:02x?}");
    }
}

#[test]
fn flipped_data_of_a_read_fails_that_read_alone_and_may_be_retried() {
    // In the first piece, in the last, and in either digest.
    for at in [
        28,
        3027,
        3028,
        3031,
        3032 + 28,
        3032 + 28 + 1999,
        3032 + 28 + 2003,
    ] {
        let (mut host, mut controller, mut data) = reading();
        assert_eq!(data.len(), 28 + 3000 + 4 + 28 + 2000 + 4);
        data[at] ^= 0x10;
        give(&mut host, &data);
        let [status] = statuses(&mut host)[..] else {
            panic!("flip at {at}")
        };
        assert_eq!(status, Status::TRANSIENT_TRANSPORT, "flip at {at}");
        // The queue goes on.
        host.submit(Sqe::read(1, 0, 1), Direction::In, 512).unwrap();
        let stream = sent(&mut host, |_| Vec::new());
        let mut seen = Vec::new();
        take(&mut controller, &stream, &mut seen);
        let Some(&ControllerEvent::Command { slot, .. }) = seen.last() else {
            panic!("{seen:?}")
        };
        controller.send(slot, 0, 512, true).unwrap();
        controller.respond(slot, Cqe::default());
        let data = sent(&mut controller, |_| pattern(512));
        give(&mut host, &data);
        assert_eq!(statuses(&mut host), [Status::SUCCESS]);
    }
}

#[test]
fn an_error_of_the_controller_is_kept_even_if_data_was_flipped() {
    let (mut host, mut controller, stream) = begun(Direction::In, 5000);
    let mut seen = Vec::new();
    take(&mut controller, &stream, &mut seen);
    let [ControllerEvent::Command { slot, .. }] = seen[..] else {
        panic!("{seen:?}")
    };
    controller.send(slot, 0, 3000, false).unwrap();
    let mut data = sent(&mut controller, |_| pattern(5000));
    data[100] ^= 1;
    give(&mut host, &data);
    controller.respond(slot, Cqe::new(0, Status::UNRECOVERED_READ_ERROR));
    let response = sent(&mut controller, |_| Vec::new());
    give(&mut host, &response);
    assert_eq!(statuses(&mut host), [Status::UNRECOVERED_READ_ERROR]);
}

#[test]
fn flipped_data_of_a_write_fails_that_fetch_alone() {
    // In the first of two H2CData, in the second, and in either digest.
    for at in [28, 4123, 4124, 4128 + 28, 4128 + 28 + 903, 4128 + 28 + 904] {
        let (mut host, mut controller, slot, _, mut data) = soliciting();
        assert_eq!(data.len(), 28 + 4096 + 4 + 28 + 904 + 4);
        data[at] ^= 0x80;
        let mut seen = Vec::new();
        take(&mut controller, &data, &mut seen);
        let intact = false;
        assert_eq!(seen, [ControllerEvent::Fetched { slot, intact }], "{at}");
        controller.respond(slot, Cqe::new(0, Status::TRANSIENT_TRANSPORT));
        let response = sent(&mut controller, |_| Vec::new());
        give(&mut host, &response);
        assert_eq!(statuses(&mut host), [Status::TRANSIENT_TRANSPORT]);
        // The tag is free again, and the queue goes on.
        host.submit(Sqe::write(1, 0, 1, false), Direction::Out, 5000)
            .unwrap();
        let stream = sent(&mut host, |_| Vec::new());
        seen.clear();
        take(&mut controller, &stream, &mut seen);
        let [ControllerEvent::Command { slot, .. }] = seen[..] else {
            panic!("{seen:?}")
        };
        controller.fetch(slot, 0, 5000).unwrap();
        let r2t = sent(&mut controller, |_| Vec::new());
        give(&mut host, &r2t);
        let data = sent(&mut host, |_| pattern(5000));
        seen.clear();
        take(&mut controller, &data, &mut seen);
        let intact = true;
        assert_eq!(seen, [ControllerEvent::Fetched { slot, intact }]);
        controller.respond(slot, Cqe::default());
        let response = sent(&mut controller, |_| Vec::new());
        assert_eq!((r2t.len(), response.len()), (28, 28));
        give(&mut host, &response);
        assert_eq!(statuses(&mut host), [Status::SUCCESS]);
    }
}

#[test]
fn flipped_data_in_a_capsule_fails_that_command_alone() {
    for at in [76, 76 + 511, 76 + 512, 76 + 515] {
        let (mut host, mut controller, mut stream) = begun(Direction::Out, 512);
        assert_eq!(stream.len(), 76 + 512 + 4);
        stream[at] ^= 1;
        host.submit(Sqe::write(1, 0, 1, false), Direction::Out, 512)
            .unwrap();
        stream.extend(sent(&mut host, |_| pattern(512)));
        let mut seen = Vec::new();
        take(&mut controller, &stream, &mut seen);
        let fetched: Vec<bool> = seen
            .iter()
            .filter_map(|event| match event {
                ControllerEvent::Fetched { intact, .. } => Some(*intact),
                ControllerEvent::Command { .. } => None,
            })
            .collect();
        assert_eq!(fetched, [false, true], "flip at {at}");
    }
}

#[test]
fn the_digest_of_data_that_nobody_wants_is_not_looked_at() {
    let (_, mut controller, stream) = begun(Direction::Out, 512);
    // The same command twice: the second is refused, its data skipped.
    let mut twice = [stream.clone(), stream].concat();
    *twice.last_mut().unwrap() ^= 1;
    let mut seen = Vec::new();
    take(&mut controller, &twice, &mut seen);
    assert_eq!(seen.len(), 2);
    let answer = sent(&mut controller, |_| Vec::new());
    let word = u16::from_le_bytes([answer[22], answer[23]]);
    assert_eq!(Status::from_wire(word).code(), Status::CID_CONFLICT.code());
    assert!(matches!(controller.want(), Want::Header(8)));
}
