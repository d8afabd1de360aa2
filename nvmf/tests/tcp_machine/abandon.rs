//! Commands that a host gives up: when their memory is free, and when their CID is.

use nvmf::spec::{Sqe, Status};
use nvmf::tcp::{Completed, Direction, Host, QPair, Want};

use crate::stepping::{feed, pattern, sent};
use crate::{QUEUE_SIZE, data_pdu, host, response, with_command};

fn give(host: &mut QPair<Host>, stream: &[u8]) {
    feed(
        host,
        stream,
        stream.len(),
        |_| (),
        |_, _, _| panic!("nobody wants it"),
    )
    .unwrap();
}

fn aborted(done: Option<Completed>, transferred: u32) {
    let done = done.unwrap();
    assert_eq!(done.cqe.status(), Status::ABORTED_BY_HOST);
    assert_eq!((done.sqhd_valid, done.transferred), (false, transferred));
}

#[test]
fn a_command_that_was_not_sent_never_is() {
    let mut host = host();
    let sqe = Sqe::write(1, 0, 1, false);
    let (_, before) = host.submit(sqe, Direction::Out, 100).unwrap();
    let (_, cid) = host.submit(sqe, Direction::Out, 512).unwrap();
    let (_, after) = host.submit(sqe, Direction::Out, 100).unwrap();
    assert!(host.abandon(cid));
    aborted(host.completed(), 0);
    assert_eq!(
        (host.completed(), host.room(), host.outstanding()),
        (None, 5, 2)
    );
    assert!(!host.abandon(cid));
    let cids: Vec<_> = std::iter::from_fn(|| host.transmit())
        .map(|pdu| u16::from_le_bytes([pdu.header()[10], pdu.header()[11]]))
        .collect();
    assert_eq!(cids, [before, after]);
}

#[test]
fn a_read_is_reported_at_once_and_its_cid_rests_until_it_is_answered() {
    for by_flag in [true, false] {
        let (mut host, cid) = with_command(Direction::In, 100);
        assert!(host.abandon(cid));
        aborted(host.completed(), 0);
        assert_eq!(
            (host.completed(), host.outstanding(), host.room()),
            (None, 0, 6)
        );
        assert!(!host.abandon(cid));
        // No other command gets the slot meanwhile.
        for _ in 0..6 {
            let (slot, _) = host.submit(Sqe::flush(1), Direction::None, 0).unwrap();
            assert_ne!(slot, 0);
        }
        assert_eq!(host.submit(Sqe::flush(1), Direction::None, 0), None);
        // What comes is discarded, and checked as ever.
        if by_flag {
            give(&mut host, &data_pdu(0x07, 12, cid, 0, 0, 100));
        } else {
            give(&mut host, &data_pdu(0x07, 0, cid, 0, 0, 50));
            assert_eq!(host.room(), 0);
            give(&mut host, &response(cid));
        }
        assert_eq!((host.completed(), host.room()), (None, 1));
        let (slot, next) = host.submit(Sqe::flush(1), Direction::None, 0).unwrap();
        assert_eq!(slot, 0);
        assert_ne!(next, cid);
    }
}

#[test]
fn data_for_an_abandoned_command_keeps_to_the_rules() {
    for (bytes, fes) in [
        (data_pdu(0x07, 4, 0, 0, 0, 101), 4),
        (data_pdu(0x07, 0, 0, 0, 1, 50), 2),
        (data_pdu(0x07, 0, 0, 0, 0, 100), 2),
    ] {
        let (mut host, cid) = with_command(Direction::In, 100);
        host.abandon(cid);
        let mut bytes = bytes;
        bytes[8..10].copy_from_slice(&cid.to_le_bytes());
        assert_eq!(crate::offence(&mut host, &bytes).0, fes);
    }
}

#[test]
fn what_is_arriving_when_a_command_is_abandoned_is_discarded_from_there() {
    let (mut host, cid) = with_command(Direction::In, 100);
    let stream = data_pdu(0x07, 4, cid, 0, 0, 100);
    let mut placed = 0;
    let place = |_, _, bytes: &[u8]| placed += bytes.len();
    feed(&mut host, &stream[..24 + 40], 9, |_| (), place).unwrap();
    assert_eq!(placed, 40);
    assert!(host.abandon(cid));
    assert_eq!(host.want(), Want::Discard(60));
    // Less than a whole PDU does not count.
    aborted(host.completed(), 0);
    give(&mut host, &stream[64..]);
    give(&mut host, &response(cid));
    assert_eq!(
        (host.completed(), host.room()),
        (None, QUEUE_SIZE as usize - 1)
    );
}

#[test]
fn a_write_is_reported_when_the_kernel_has_what_was_given_out_and_no_more_of_it_is_sent() {
    let (mut host, cid) = with_command(Direction::Out, 12_000);
    let stream = [
        data_pdu(0x09, 0, cid, 3, 0, 8000),
        data_pdu(0x09, 0, cid, 4, 8000, 1000),
    ]
    .concat();
    give(&mut host, &stream);
    let first = host.transmit().unwrap();
    assert!(host.abandon(cid));
    assert_eq!(host.completed(), None);
    assert!(host.transmit().is_none());
    host.transmitted(first.payload.unwrap());
    aborted(host.completed(), 4096);
    // It may go on asking, in vain.
    give(&mut host, &data_pdu(0x09, 0, cid, 5, 9000, 3000));
    assert!(host.transmit().is_none());
    give(&mut host, &response(cid));
    assert_eq!(
        (host.completed(), host.room()),
        (None, QUEUE_SIZE as usize - 1)
    );
}

#[test]
fn a_command_whose_answer_is_here_completes_as_it_was() {
    let mut host = host();
    let sqe = Sqe::write(1, 0, 1, false);
    let (_, cid) = host.submit(sqe, Direction::Out, 512).unwrap();
    let pdu = host.transmit().unwrap();
    give(&mut host, &response(cid));
    assert!(host.abandon(cid));
    assert_eq!(host.completed(), None);
    host.transmitted(pdu.payload.unwrap());
    let done = host.completed().unwrap();
    assert!(done.cqe.status().is_success() && done.sqhd_valid);
    assert_eq!(
        (done.transferred, host.completed(), host.room()),
        (512, None, 7)
    );

    // The answer comes between the two.
    let (mut host, cid) = with_command(Direction::In, 100);
    assert!(host.abandon(cid));
    give(&mut host, &response(cid));
    let done = host.completed().unwrap();
    assert_eq!(done.cqe.status(), Status::DATA_TRANSFER_ERROR);
    assert_eq!((host.completed(), host.room()), (None, 7));
}

#[test]
fn the_end_of_the_connection_reports_no_command_twice() {
    let mut host = host();
    let mut submit = |len| {
        let sqe = Sqe::write(1, 0, 1, false);
        host.submit(sqe, Direction::Out, len).unwrap().1
    };
    let (reported, waiting, listed) = (submit(9000), submit(512), submit(9000));
    // The first and the third are with the kernel, the second is not.
    let capsules: Vec<_> = std::iter::from_fn(|| host.transmit()).collect();
    assert!(host.abandon(reported));
    aborted(host.completed(), 0);
    assert!(host.abandon(waiting) && host.abandon(listed));
    assert_eq!(capsules[1].payload.unwrap().slot, 1);
    host.abort_all();
    let mut slots = Vec::new();
    while let Some(done) = host.completed() {
        assert_eq!(done.cqe.status(), Status::ABORTED_BY_HOST);
        slots.push(done.slot);
    }
    slots.sort_unstable();
    assert_eq!(slots, [1, 2]);
    assert_eq!(
        (host.outstanding(), host.room()),
        (0, QUEUE_SIZE as usize - 1)
    );
}

/// Random steps of a host whose peer does all that it may: each command is reported once, and every
/// slot is free at the end.
#[test]
fn each_command_is_reported_once_whatever_happens_in_which_order() {
    for seed in 1..=2000u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut random = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        let mut host = host();
        let (mut live, mut with_kernel, mut asked) = (Vec::new(), Vec::new(), Vec::new());
        let (mut submitted, mut reported) = (0, 0);
        for _ in 0..60 {
            match random(6) {
                0 | 1 => {
                    let direction = [Direction::In, Direction::Out][random(2)];
                    let len = [100, 5000][random(2)];
                    let sqe = Sqe::write(1, 0, 1, false);
                    if let Some((_, cid)) = host.submit(sqe, direction, len) {
                        live.push((cid, direction, len, false));
                        submitted += 1;
                    }
                }
                2 => {
                    if let Some(pdu) = host.transmit() {
                        if pdu.header()[0] == 0x04 {
                            let cid = u16::from_le_bytes([pdu.header()[10], pdu.header()[11]]);
                            let sent = live.iter_mut().find(|command| command.0 == cid);
                            sent.unwrap().3 = true;
                        }
                        with_kernel.extend(pdu.payload);
                    }
                }
                3 if !with_kernel.is_empty() => host.transmitted(with_kernel.remove(0)),
                4 if !live.is_empty() => {
                    let (cid, .., sent) = live[random(live.len())];
                    if host.abandon(cid) && !sent {
                        live.retain(|command| command.0 != cid);
                    }
                }
                5 if !live.is_empty() => {
                    let which = random(live.len());
                    let (cid, direction, len, sent) = live[which];
                    let stream = match (direction, random(2)) {
                        _ if !sent => continue,
                        (Direction::Out, 0) if len > 1024 && !asked.contains(&cid) => {
                            asked.push(cid);
                            data_pdu(0x09, 0, cid, 1, 0, len)
                        }
                        (Direction::In, 0) => {
                            live.swap_remove(which);
                            data_pdu(0x07, 12, cid, 0, 0, len)
                        }
                        _ => {
                            live.swap_remove(which);
                            response(cid)
                        }
                    };
                    feed(&mut host, &stream, 999, |_| (), |_, _, _| ()).unwrap();
                }
                _ => {}
            }
            reported += std::iter::from_fn(|| host.completed()).count();
            assert!(reported <= submitted, "seed {seed}");
            assert_eq!(host.outstanding(), submitted - reported, "seed {seed}");
        }
        sent(&mut host, |_| pattern(5000));
        for payload in with_kernel {
            host.transmitted(payload);
        }
        for (cid, ..) in live {
            give(&mut host, &response(cid));
        }
        reported += std::iter::from_fn(|| host.completed()).count();
        assert_eq!((reported, host.room()), (submitted, 7), "seed {seed}");
    }
}
