//! R2Ts: how many, in which order, and what becomes of those of a command that is answered early.

use nvmf::spec::{Cqe, Sqe, Status};
use nvmf::tcp::{Controller, ControllerEvent, Direction, Limits, QPair, TxPdu, Want};

use crate::stepping::{feed, pattern, sent};
use crate::{QUEUE_SIZE, data_pdu, host, limits, offence, response};

const KIB: u32 = 1024;

/// What a data header or an R2T says: CCCID, TTAG, offset, length.
fn says(header: &[u8]) -> (u16, u16, u32, u32) {
    let u16 = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let u32 = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    (u16(8), u16(10), u32(12), u32(16))
}

#[test]
fn a_host_answers_the_r2ts_of_a_command_in_order_and_lets_commands_take_turns() {
    let mut host = host();
    let mut submit = || {
        let sqe = Sqe::write(1, 0, 1, false);
        host.submit(sqe, Direction::Out, 20_000).unwrap().1
    };
    let (a, b) = (submit(), submit());
    sent(&mut host, |_| Vec::new());
    for (cid, ttag, offset, len) in [(a, 1, 0, 8192), (a, 2, 8192, 11_808), (b, 3, 0, 20_000)] {
        let r2t = data_pdu(0x09, 0, cid, ttag, offset, len);
        feed(&mut host, &r2t, 24, |_| (), |_, _, _| ()).unwrap();
    }
    let mut seen = Vec::new();
    while let Some(pdu) = host.transmit() {
        let (cid, ttag, offset, len) = says(pdu.header());
        seen.push((cid, ttag, offset, len, pdu.header()[1] & 4 != 0));
    }
    assert_eq!(
        seen,
        [
            (a, 1, 0, 4096, false),
            (b, 3, 0, 4096, false),
            (a, 1, 4096, 4096, true),
            (b, 3, 4096, 4096, false),
            (a, 2, 8192, 4096, false),
            (b, 3, 8192, 4096, false),
            (a, 2, 12_288, 4096, false),
            (b, 3, 12_288, 4096, false),
            (a, 2, 16_384, 3616, true),
            (b, 3, 16_384, 3616, true),
        ]
    );
}

#[test]
fn a_host_takes_as_many_r2ts_as_it_offered_and_no_more() {
    for max_r2t in 1..=8 {
        let limits = Limits {
            max_r2t,
            ..limits()
        };
        let mut host = QPair::host(QUEUE_SIZE, limits);
        let sqe = Sqe::write(1, 0, 1, false);
        let (_, cid) = host.submit(sqe, Direction::Out, 20_000).unwrap();
        sent(&mut host, |_| Vec::new());
        let r2t = |which: u32| data_pdu(0x09, 0, cid, which as u16, which * 1000, 1000);
        // Each that is answered makes room for another.
        feed(&mut host, &r2t(0), 24, |_| (), |_, _, _| ()).unwrap();
        sent(&mut host, |_| pattern(20_000));
        for which in 1..=max_r2t {
            feed(&mut host, &r2t(which), 24, |_| (), |_, _, _| ()).unwrap();
        }
        assert_eq!(offence(&mut host, &r2t(max_r2t + 1)), (5, 0), "{max_r2t}");
    }
}

/// A controller whose host takes `max_r2t` R2Ts for each command, with writes of these lengths, all
/// of whose data is fetched: and the CIDs.
fn fetching(max_r2t: u32, lens: &[u32]) -> (QPair<Controller>, Vec<u16>) {
    let limits = Limits {
        max_r2t,
        max_h2c_data: 1024 * KIB,
        ..limits()
    };
    let mut host = QPair::host(QUEUE_SIZE, limits);
    let mut controller = QPair::controller(QUEUE_SIZE, false, limits);
    let mut cids = Vec::new();
    for &len in lens {
        let sqe = Sqe::write(1, 0, 1, false);
        let (_, cid) = host.submit(sqe, Direction::Out, len).unwrap();
        cids.push(cid);
        let stream = sent(&mut host, |_| Vec::new());
        feed(&mut controller, &stream, 72, |_| (), |_, _, _| ()).unwrap();
        let Some(ControllerEvent::Command { slot, .. }) = controller.event() else {
            panic!()
        };
        assert_eq!(usize::from(slot), cids.len() - 1);
        controller.fetch(slot, 0, len).unwrap();
    }
    (controller, cids)
}

fn asked(pdu: &TxPdu) -> (u16, u16, u32, u32) {
    assert_eq!(pdu.header()[0], 0x09);
    says(pdu.header())
}

/// The H2CData that answers an R2T as a whole, or a part of it.
fn h2c_data((cid, ttag, offset, len): (u16, u16, u32, u32), last: bool) -> Vec<u8> {
    let mut bytes = data_pdu(0x06, if last { 4 } else { 0 }, cid, ttag, offset, len);
    let data = pattern((offset + len) as usize);
    bytes[24..].copy_from_slice(&data[offset as usize..]);
    bytes
}

#[test]
fn a_controller_keeps_several_r2ts_of_a_large_write_outstanding_where_it_may() {
    for (max_r2t, most) in [(2, 2), (4, 4), (9, 4), (u32::MAX, 4)] {
        let (mut controller, _) = fetching(max_r2t, &[2048 * KIB + 12]);
        let mut open = Vec::new();
        let (mut total, mut stored) = (0, vec![0; 2048 * 1024 + 12]);
        while total < 2048 * KIB + 12 {
            while let Some(pdu) = controller.transmit() {
                open.push(asked(&pdu));
            }
            let tags = |of: &[(u16, u16, u32, u32)]| {
                let mut tags: Vec<u16> = of.iter().map(|r2t| r2t.1).collect();
                tags.sort_unstable();
                tags.dedup();
                tags.len()
            };
            assert!(open.len() <= most && tags(&open) == open.len());
            let rest = (2048 * KIB + 12 - total).div_ceil(256 * KIB) as usize;
            assert_eq!(open.len(), most.min(rest));
            // In order, and without gaps.
            let r2t = open.remove(0);
            assert_eq!(r2t.2, total);
            total += r2t.3;
            let store = |_, at: u32, bytes: &[u8]| {
                stored[at as usize..][..bytes.len()].copy_from_slice(bytes);
            };
            feed(&mut controller, &h2c_data(r2t, true), 9999, |_| (), store).unwrap();
        }
        assert!(stored == pattern(stored.len()));
        let done = ControllerEvent::Fetched {
            slot: 0,
            intact: true,
        };
        assert_eq!(controller.event(), Some(done));
        assert_eq!(
            (controller.event(), controller.transmit().is_some()),
            (None, false)
        );
    }
}

#[test]
fn a_host_that_takes_one_r2t_is_asked_once_for_all() {
    let (mut controller, cids) = fetching(1, &[2048 * KIB]);
    let r2t = asked(&controller.transmit().unwrap());
    assert_eq!(r2t, (cids[0], r2t.1, 0, 2048 * KIB));
    assert!(controller.transmit().is_none());
}

#[test]
fn commands_take_turns_to_ask() {
    let (mut controller, cids) = fetching(4, &[1024 * KIB, 1024 * KIB, 100 * KIB]);
    let order: Vec<u16> = std::iter::from_fn(|| controller.transmit())
        .map(|pdu| asked(&pdu).0)
        .collect();
    let [a, b, c] = cids[..] else { panic!() };
    assert_eq!(order, [a, b, c, a, b, a, b, a, b]);
}

#[test]
fn r2ts_of_one_command_have_to_be_answered_in_order_and_each_within_its_range() {
    let both = || {
        let (mut controller, _) = fetching(2, &[512 * KIB]);
        let mut r2t = || asked(&controller.transmit().unwrap());
        let (first, second) = (r2t(), r2t());
        (controller, first, second)
    };
    let part = |(cid, ttag, ..): (u16, u16, u32, u32), offset, last: bool| {
        data_pdu(0x06, if last { 4 } else { 0 }, cid, ttag, offset, 4096)
    };
    let (_, first, second) = both();
    for (stream, expected) in [
        // The second before the first.
        (part(second, second.2, false), (2, 0)),
        (part(second, 0, false), (4, 0)),
        // The range of the second under the tag of the first.
        (part(first, second.2, false), (4, 0)),
        (part(first, second.2 - 2048, false), (4, 0)),
        // In turns.
        (
            [part(first, 0, false), part(second, second.2, false)].concat(),
            (2, 0),
        ),
        (
            [part(first, 0, false), part(second, 4096, false)].concat(),
            (4, 0),
        ),
        // The end of one is not the end of the command's data, but its flag is due.
        (part(first, 0, true), (2, 0)),
    ] {
        let (mut controller, ..) = both();
        assert_eq!(offence(&mut controller, &stream), expected);
    }
    let (mut controller, first, second) = both();
    for r2t in [first, second] {
        let stream = h2c_data(r2t, true);
        feed(&mut controller, &stream, 9999, |_| (), |_, _, _| ()).unwrap();
    }
    assert!(controller.event().is_some());
}

#[test]
fn fetches_follow_each_other() {
    let (mut controller, _) = fetching(2, &[]);
    let mut host = host();
    let sqe = Sqe::write(1, 0, 1, false);
    host.submit(sqe, Direction::Out, 9000).unwrap();
    let stream = sent(&mut host, |_| Vec::new());
    feed(&mut controller, &stream, 72, |_| (), |_, _, _| ()).unwrap();
    let Some(ControllerEvent::Command { slot, .. }) = controller.event() else {
        panic!()
    };
    assert!(controller.fetch(slot, 1, 100).is_err());
    let (mut at, mut stored) = (0, vec![0; 9000]);
    for len in [1000, 3000, 5000] {
        controller.fetch(slot, at, len).unwrap();
        assert!(
            controller.fetch(slot, at + len, 1).is_err(),
            "one at a time"
        );
        let r2t = sent(&mut controller, |_| Vec::new());
        feed(&mut host, &r2t, 24, |_| (), |_, _, _| ()).unwrap();
        let data = sent(&mut host, |_| pattern(9000));
        let store = |_, at: u32, bytes: &[u8]| {
            stored[at as usize..][..bytes.len()].copy_from_slice(bytes);
        };
        feed(&mut controller, &data, 77, |_| (), store).unwrap();
        assert!(matches!(
            controller.event(),
            Some(ControllerEvent::Fetched { intact: true, .. })
        ));
        assert!(controller.fetch(slot, at, len).is_err(), "not again");
        at += len;
    }
    assert!(stored == pattern(9000));
    assert!(controller.fetch(slot, 9000, 1).is_err());
}

#[test]
fn a_tag_that_was_answered_is_closed() {
    let (mut controller, _) = fetching(2, &[1024 * KIB]);
    let r2t = asked(&controller.transmit().unwrap());
    let stream = h2c_data(r2t, true);
    feed(&mut controller, &stream, 9999, |_| (), |_, _, _| ()).unwrap();
    assert_eq!(offence(&mut controller, &stream), (1, 10));
}

#[test]
fn tags_of_all_commands_differ() {
    let lens = [1024 * KIB; 7];
    let (mut controller, _) = fetching(4, &lens);
    let mut tags: Vec<u16> = std::iter::from_fn(|| controller.transmit())
        .map(|pdu| asked(&pdu).1)
        .collect();
    assert_eq!(tags.len(), 28);
    tags.sort_unstable();
    tags.dedup();
    assert_eq!(tags.len(), 28);
    // However long the queue, they fit 16 bits.
    let limits = Limits {
        max_r2t: 4,
        ..limits()
    };
    let mut long = QPair::controller(65536, false, limits);
    for cid in 0..65535u16 {
        let mut sqe = Sqe::write(1, 0, 1, false);
        sqe.cid = cid.into();
        sqe.flags = nvmf::spec::sqe::PSDT_SGL;
        sqe.sgl1.length = (1024 * KIB).into();
        sqe.sgl1.sgl_type = nvmf::spec::sqe::sgl_type::TRANSPORT;
        let mut bytes = crate::header(0x04, 0, 72, 0, 72);
        bytes[8..].copy_from_slice(zerocopy::IntoBytes::as_bytes(&sqe));
        feed(&mut long, &bytes, 72, |_| (), |_, _, _| ()).unwrap();
        let Some(ControllerEvent::Command { slot, .. }) = long.event() else {
            panic!()
        };
        long.fetch(slot, 0, 1024 * KIB).unwrap();
        let r2t = long.transmit().unwrap();
        assert_eq!(asked(&r2t).1, slot);
    }
}

#[test]
fn an_early_answer_waits_for_the_data_that_was_asked_for_and_asks_for_no_more() {
    let (mut controller, cids) = fetching(2, &[1024 * KIB]);
    let first = asked(&controller.transmit().unwrap());
    let second = asked(&controller.transmit().unwrap());
    controller.respond(0, Cqe::new(0, Status::INTERNAL_ERROR));
    assert!(controller.transmit().is_none());
    assert_eq!(controller.outstanding(), 0);
    for r2t in [first, second] {
        let stream = h2c_data(r2t, true);
        assert!(controller.transmit().is_none());
        feed(&mut controller, &stream[..24], 24, |_| (), |_, _, _| ()).unwrap();
        assert_eq!(controller.want(), Want::Discard(256 * KIB));
        controller.payload_moved(256 * KIB);
    }
    assert_eq!(controller.event(), None);
    let answer = controller.transmit().unwrap();
    assert_eq!(
        (answer.header()[0], &answer.header()[20..22]),
        (0x05, &cids[0].to_le_bytes()[..])
    );
    // The CID is free again.
    let mut again = crate::header(0x04, 0, 72, 0, 72);
    let mut sqe = Sqe::flush(1);
    sqe.cid = cids[0].into();
    sqe.flags = nvmf::spec::sqe::PSDT_SGL;
    again[8..].copy_from_slice(zerocopy::IntoBytes::as_bytes(&sqe));
    feed(&mut controller, &again, 72, |_| (), |_, _, _| ()).unwrap();
    assert!(matches!(
        controller.event(),
        Some(ControllerEvent::Command { .. })
    ));
}

#[test]
fn a_command_that_is_answered_before_it_asked_asks_for_nothing() {
    let (mut controller, cids) = fetching(2, &[1024 * KIB, 4 * KIB]);
    controller.respond(0, Cqe::new(0, Status::INTERNAL_ERROR));
    let r2t = asked(&controller.transmit().unwrap());
    assert_eq!(r2t.0, cids[1]);
    let answer = controller.transmit().unwrap();
    assert_eq!(answer.header()[..1], [0x05]);
    assert!(controller.transmit().is_none());
    // What the other asked for still comes.
    feed(
        &mut controller,
        &h2c_data(r2t, true),
        999,
        |_| (),
        |_, _, _| (),
    )
    .unwrap();
    assert!(matches!(
        controller.event(),
        Some(ControllerEvent::Fetched { slot: 1, .. })
    ));
}

#[test]
fn data_for_a_host_is_split_in_turns_and_only_the_final_piece_says_so() {
    let (mut host, mut controller) = (host(), QPair::controller(QUEUE_SIZE, false, limits()));
    let mut cids = Vec::new();
    for slot in 0..2 {
        let len = 300 * KIB;
        let (_, cid) = host.submit(Sqe::read(1, 0, 1), Direction::In, len).unwrap();
        cids.push(cid);
        let stream = sent(&mut host, |_| Vec::new());
        feed(&mut controller, &stream, 72, |_| (), |_, _, _| ()).unwrap();
        assert!(controller.event().is_some());
        controller.send(slot, 0, len, true).unwrap();
        controller.respond(slot, Cqe::default());
    }
    let mut seen = Vec::new();
    while let Some(pdu) = controller.transmit() {
        let (cid, _, offset, len) = says(pdu.header());
        let flags = pdu.header()[1];
        seen.push((cid, offset / KIB, len / KIB, flags));
        let bytes = crate::stepping::on_the_wire(&pdu, |_| pattern(300 * 1024));
        feed(&mut host, &bytes, 9999, |_| (), |_, _, _| ()).unwrap();
        controller.transmitted(pdu.payload.unwrap());
    }
    let [a, b] = cids[..] else { panic!() };
    assert_eq!(
        seen,
        [
            (a, 0, 128, 0),
            (b, 0, 128, 0),
            (a, 128, 128, 0),
            (b, 128, 128, 0),
            (a, 256, 44, 12),
            (b, 256, 44, 12),
        ]
    );
    for _ in 0..2 {
        assert!(host.completed().unwrap().cqe.status().is_success());
    }
}

#[test]
fn a_response_to_a_command_with_r2ts_frees_its_turn() {
    let mut host = host();
    let mut submit = || {
        let sqe = Sqe::write(1, 0, 1, false);
        host.submit(sqe, Direction::Out, 20_000).unwrap().1
    };
    let (a, b) = (submit(), submit());
    sent(&mut host, |_| Vec::new());
    let stream = [
        data_pdu(0x09, 0, a, 1, 0, 8192),
        data_pdu(0x09, 0, a, 2, 8192, 8192),
        data_pdu(0x09, 0, b, 3, 0, 8192),
        response(a),
    ]
    .concat();
    feed(&mut host, &stream, 24, |_| (), |_, _, _| ()).unwrap();
    let order: Vec<u16> = std::iter::from_fn(|| host.transmit())
        .map(|pdu| says(pdu.header()).0)
        .collect();
    assert_eq!(order, [b, b]);
}
