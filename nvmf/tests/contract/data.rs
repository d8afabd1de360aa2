//! Data between host and controller: whole, in pieces, in part, lent, and what does not fit.

use std::collections::{BTreeSet, HashMap};

use nvmf::spec::opcode::nvm;
use nvmf::spec::{Cqe, Sqe, Status};
use nvmf::transport::{Command, CommandTag, ControllerEvent, Transfer};

use crate::link::{IN_CAPSULE, Kind, Link, Random, bytes, links, pattern, sink, source};

/// Nothing, one byte, around what a capsule holds and what one PDU of data holds, and more.
const SIZES: [usize; 9] = [
    0,
    1,
    511,
    IN_CAPSULE,
    IN_CAPSULE + 1,
    65_537,
    262_144,
    262_145,
    1 << 20,
];

#[test]
fn data_of_every_size_arrives_and_its_memory_comes_back_with_the_count() {
    for mut link in links(false) {
        for len in SIZES {
            let data = pattern(len as u64, len);
            link.write(&data, 1);
            let Command { tag, data_len, .. } = link.arrived();
            assert_eq!(data_len as usize, len);
            if len > 0 {
                link.controller.fetch(tag, 0, sink(len)).unwrap();
                assert!(link.fetched(tag) == (data.clone(), Ok(())), "{link:?}");
            }
            link.controller.respond(tag, Cqe::default());
            let done = link.completed();
            assert_eq!(done.cqe.status(), Status::SUCCESS);
            assert_eq!((done.token, done.transferred as usize), (1, len));
            assert!(bytes(done.transfer) == data);

            link.read(len, 2);
            let Command { tag, .. } = link.arrived();
            if len > 0 {
                link.controller.send(tag, 0, source(&data), true).unwrap();
            }
            link.controller.respond(tag, Cqe::default());
            let done = link.completed();
            assert_eq!(done.cqe.status(), Status::SUCCESS);
            assert_eq!((done.token, done.transferred as usize), (2, len));
            assert!(bytes(done.transfer) == data);
            if len > 0 {
                assert_eq!(link.sent(tag), len);
            }
            link.is_over();
        }
    }
}

#[test]
fn a_fetch_may_be_split_anywhere_in_order() {
    for mut link in links(false) {
        let mut random = Random(5);
        for round in 0..30 {
            let len = 1 + random.below(SIZES[random_size(round)]);
            let data = pattern(round as u64, len);
            link.write(&data, 1);
            let Command { tag, .. } = link.arrived();
            for piece in random.pieces(len) {
                let at = piece.start as u32;
                let room = sink(piece.len());
                link.controller.fetch(tag, at, room).unwrap();
                let (got, result) = link.fetched(tag);
                assert_eq!(result, Ok(()), "{:?} {piece:?} of {len}", link.kind);
                assert!(got == data[piece.clone()], "{:?} {piece:?}", link.kind);
            }
            link.controller.respond(tag, Cqe::default());
            let done = link.completed();
            assert_eq!(done.cqe.status(), Status::SUCCESS);
            assert_eq!(done.transferred as usize, len);
        }
        link.is_over();
    }
}

/// Small ones twice as often.
fn random_size(round: usize) -> usize {
    [3, 4, 3, 5, 4, 7][round % 6]
}

#[test]
fn a_send_may_be_split_anywhere_in_order() {
    for mut link in links(false) {
        let mut random = Random(6);
        for round in 0..30 {
            let len = 1 + random.below(SIZES[random_size(round)]);
            let data = pattern(round as u64, len);
            link.read(len, 1);
            let Command { tag, .. } = link.arrived();
            for piece in random.pieces(len) {
                let last = piece.end == len;
                let at = piece.start as u32;
                let from = source(&data[piece.clone()]);
                link.controller.send(tag, at, from, last).unwrap();
                assert_eq!(link.sent(tag), piece.len());
            }
            link.controller.respond(tag, Cqe::default());
            let done = link.completed();
            assert_eq!(done.cqe.status(), Status::SUCCESS, "{:?}", link.kind);
            assert_eq!(done.transferred as usize, len);
            assert!(bytes(done.transfer) == data);
        }
        link.is_over();
    }
}

#[test]
fn data_in_the_capsule_can_be_taken_at_once() {
    for mut link in links(false) {
        let data = pattern(1, IN_CAPSULE);
        for _ in 0..3 {
            link.write(&data, 1);
            let Command { tag, .. } = link.arrived();
            link.controller.fetch(tag, 0, sink(IN_CAPSULE)).unwrap();
            let sends = link.host.counters().sends;
            let (got, result) = link.fetched(tag);
            assert!(got == data && result == Ok(()));
            let after = link.host.counters().sends;
            assert_eq!(after, sends, "{:?}: the host is not asked", link.kind);
            link.controller.respond(tag, Cqe::default());
            link.completed();
        }
        // Nor does it have to be taken at all.
        link.write(&data, 2);
        let Command { tag, .. } = link.arrived();
        link.idle();
        link.controller
            .respond(tag, Cqe::new(0, Status::INVALID_FIELD));
        let done = link.completed();
        assert_eq!(done.cqe.status(), Status::INVALID_FIELD);
        assert!(bytes(done.transfer) == data);
        link.is_over();
    }
}

#[test]
fn an_error_gives_the_memory_back_with_the_count_of_what_moved() {
    const LEN: usize = 100_000;
    let failure = Status::UNRECOVERED_READ_ERROR.do_not_retry();
    for mut link in links(false) {
        for part in [0, 1, 50_000, LEN] {
            let data = pattern(1, LEN);
            link.read(LEN, 1);
            let Command { tag, .. } = link.arrived();
            if part > 0 {
                let from = source(&data[..part]);
                link.controller.send(tag, 0, from, false).unwrap();
                assert_eq!(link.sent(tag), part);
            }
            link.controller.respond(tag, Cqe::new(0, failure));
            let done = link.completed();
            assert_eq!(done.cqe.status(), failure, "{part} {link:?}");
            assert_eq!(done.transferred as usize, part, "{:?}", link.kind);
            let got = bytes(done.transfer);
            assert!(got[..part] == data[..part] && got[part..].iter().all(|&b| b == 0xaa));

            link.write(&data, 2);
            let Command { tag, .. } = link.arrived();
            if part > 0 {
                link.controller.fetch(tag, 0, sink(part)).unwrap();
                assert!(link.fetched(tag) == (data[..part].to_vec(), Ok(())));
            }
            link.controller.respond(tag, Cqe::new(0, failure));
            let done = link.completed();
            assert_eq!(done.cqe.status(), failure, "{part} {link:?}");
            assert_eq!(done.transferred as usize, part, "{:?}", link.kind);
            assert!(bytes(done.transfer) == data);
            link.is_over();
        }
    }
}

#[test]
fn a_success_without_all_of_the_data_is_none() {
    for mut link in links(false) {
        for part in [0, 1, 511] {
            link.read(512, 1);
            let Command { tag, .. } = link.arrived();
            if part > 0 {
                let from = source(&pattern(1, part));
                let sent = link.controller.send(tag, 0, from, true);
                // A transport may refuse to call that the last.
                if let Err((from, _)) = sent {
                    link.controller.send(tag, 0, from, false).unwrap();
                }
                assert_eq!(link.sent(tag), part);
            }
            link.controller.respond(tag, Cqe::default());
            let done = link.completed();
            assert!(!done.cqe.status().is_success(), "{:?} {part}", link.kind);
            assert_eq!(done.transferred as usize, part);
            assert_eq!(done.transfer.len(), 512);
            link.is_over();
        }
    }
}

#[test]
fn a_fetch_that_does_not_fit_is_refused_with_its_sink_and_nothing_follows() {
    for mut link in links(false) {
        for len in [512, IN_CAPSULE * 2] {
            link.write(&pattern(1, len), 1);
            let out = link.arrived().tag;
            link.read(len, 2);
            let into = link.arrived().tag;
            link.submit(Sqe::flush(1), Transfer::None, 3);
            let none = link.arrived().tag;
            let all = len as u32;
            for (tag, offset, room) in [
                (out, 0, len + 1),
                (out, 1, len),
                (out, all, 1),
                (out, u32::MAX, 2),
                (none, 0, 1),
                (CommandTag(9), 0, 1),
                (CommandTag(u16::MAX), 0, 1),
            ] {
                let refused = link.controller.fetch(tag, offset, sink(room));
                let case = (link.kind, len, tag, offset, room);
                let (back, status) = refused.expect_err(&format!("{case:?} does not fit"));
                assert_eq!(back.len(), room);
                assert!(!status.is_success());
            }
            assert!(link.events.is_empty());
            // The command is none the worse for it.
            link.controller.fetch(out, 0, sink(len)).unwrap();
            assert!(link.fetched(out) == (pattern(1, len), Ok(())));
            for tag in [out, none] {
                link.controller.respond(tag, Cqe::default());
            }
            link.controller
                .respond(into, Cqe::new(0, Status::INVALID_FIELD));
            for token in [1, 3, 2] {
                assert_eq!(link.completed().token, token);
            }
            link.is_over();
        }
    }
}

#[test]
fn a_send_that_does_not_fit_is_refused_with_its_source_and_nothing_follows() {
    for mut link in links(false) {
        link.read(512, 1);
        let into = link.arrived().tag;
        link.write(&pattern(1, 512), 2);
        let out = link.arrived().tag;
        link.submit(Sqe::flush(1), Transfer::None, 3);
        let none = link.arrived().tag;
        for (tag, offset, len) in [
            (into, 0, 513),
            (into, 1, 1),
            (into, u32::MAX, 2),
            (out, 0, 512),
            (none, 0, 1),
            (CommandTag(9), 0, 1),
            (CommandTag(u16::MAX), 0, 1),
        ] {
            let refused = link
                .controller
                .send(tag, offset, source(&vec![7; len]), true);
            let (back, status) = refused.expect_err("does not fit");
            assert_eq!(back.len(), len);
            assert!(!status.is_success());
        }
        link.idle();
        assert!(link.events.is_empty() && link.completions.is_empty());
        let data = pattern(2, 512);
        link.controller.send(into, 0, source(&data), true).unwrap();
        assert_eq!(link.sent(into), 512);
        link.controller.respond(into, Cqe::default());
        let done = link.completed();
        assert!(bytes(done.transfer) == data && done.cqe.status().is_success());
        link.controller.respond(none, Cqe::default());
        link.controller
            .respond(out, Cqe::new(0, Status::INVALID_FIELD));
        assert_eq!([link.completed().token, link.completed().token], [3, 2]);
        link.is_over();
    }
}

#[test]
fn an_answered_command_is_answered_once_and_has_no_more_data() {
    for mut link in links(false) {
        link.read(512, 1);
        let Command { tag, .. } = link.arrived();
        link.controller
            .respond(tag, Cqe::new(0, Status::INTERNAL_ERROR));
        link.controller.respond(tag, Cqe::default());
        let refused = link.controller.send(tag, 0, source(&[1; 512]), true);
        assert_eq!(refused.expect_err("it is over").0.len(), 512);
        assert!(link.controller.fetch(tag, 0, sink(1)).is_err());
        link.controller.restore(tag, Transfer::None);
        assert_eq!(link.completed().cqe.status(), Status::INTERNAL_ERROR);
        link.is_over();
    }
}

#[test]
fn memory_is_lent_by_one_owner_only_and_comes_back_before_the_completion() {
    for mut link in links(false) {
        let lends = link.kind == Kind::Coupled;
        for (token, answered_first) in [(1, false), (2, true)] {
            link.read(4096, token);
            let Command { tag, .. } = link.arrived();
            let lent = link.controller.lend(tag);
            assert_eq!(lent.is_some(), lends, "{:?}", link.kind);
            let Some(Transfer::In(mut memory)) = lent else {
                link.controller
                    .respond(tag, Cqe::new(0, Status::INTERNAL_ERROR));
                link.completed();
                continue;
            };
            assert!(link.controller.lend(tag).is_none(), "once");
            assert!(link.controller.fetch(tag, 0, sink(1)).is_err());
            assert!(link.controller.send(tag, 0, source(&[1]), false).is_err());
            memory.copy_from(0, &pattern(token, 4096)).unwrap();
            if answered_first {
                link.controller.respond(tag, Cqe::default());
            }
            link.idle();
            assert!(link.completions.is_empty(), "the memory is not back");
            link.controller.restore(tag, Transfer::In(memory));
            if !answered_first {
                link.controller.respond(tag, Cqe::default());
            }
            let done = link.completed();
            assert!(done.cqe.status().is_success());
            assert_eq!((done.token, done.transferred), (token, 4096));
            assert!(bytes(done.transfer) == pattern(token, 4096));
        }
        link.submit(Sqe::flush(1), Transfer::None, 3);
        let Command { tag, .. } = link.arrived();
        assert!(link.controller.lend(tag).is_none(), "there is none");
        link.controller.respond(tag, Cqe::default());
        link.completed();
        link.is_over();
    }
}

/// What the controller of the next test does about one event. The first block of a command names its
/// data.
fn serve(link: &mut Link, seeds: &mut HashMap<u16, u64>, event: ControllerEvent) {
    match event {
        ControllerEvent::Command(Command { tag, data_len, sqe }) => {
            let (seed, len) = (sqe.slba(), data_len as usize);
            seeds.insert(tag.0, seed);
            if sqe.opcode == nvm::WRITE {
                return link.controller.fetch(tag, 0, sink(len)).unwrap();
            }
            let from = source(&pattern(seed, len));
            link.controller.send(tag, 0, from, true).unwrap();
            link.controller.respond(tag, Cqe::default());
        }
        ControllerEvent::Fetched {
            tag, sink, result, ..
        } => {
            let got = bytes(Transfer::In(sink));
            assert_eq!(result, Ok(()));
            assert!(got == pattern(seeds[&tag.0], got.len()));
            link.controller.respond(tag, Cqe::default());
        }
        ControllerEvent::Sent { .. } => {}
    }
}

#[test]
fn many_commands_at_once_keep_their_data_apart() {
    const COMMANDS: u64 = 150;
    for mut link in links(true) {
        let mut random = Random(9);
        let mut seeds = HashMap::new();
        let mut tokens = BTreeSet::new();
        let mut next = 0;
        link.until(|link| {
            while next < COMMANDS && link.host.room() > 0 {
                let len = 1 + random.below(SIZES[random_size(next as usize)]);
                match next % 2 {
                    0 => {
                        let data = Transfer::Out(source(&pattern(next, len)));
                        link.submit(Sqe::write(1, next, 1, false), data, next);
                    }
                    _ => {
                        link.submit(Sqe::read(1, next, 1), Transfer::In(sink(len)), next);
                    }
                }
                next += 1;
            }
            while let Some(event) = link.events.pop_front() {
                serve(link, &mut seeds, event);
            }
            while let Some(done) = link.completions.pop_front() {
                assert_eq!(done.cqe.status(), Status::SUCCESS);
                assert_eq!(done.transferred as usize, done.transfer.len());
                let data = bytes(done.transfer);
                assert!(data == pattern(done.token, data.len()), "{}", done.token);
                assert!(tokens.insert(done.token), "once");
            }
            (tokens.len() as u64 == COMMANDS).then_some(())
        });
        link.idle();
        link.events.clear();
        link.is_over();
    }
}
