//! The queue itself: how much it takes, what a host is told of it, and commands that are given up.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;

use memdesc::MemSource;
use nvmf::spec::fabrics::SQHD_FLOW_DISABLED;
use nvmf::spec::sqe::{PSDT_MASK, PSDT_SGL};
use nvmf::spec::{Cqe, Sqe, Status};
use nvmf::transport::{Command, CommandTag, RejectedReason, Transfer};

use crate::link::{IN_CAPSULE, QUEUE_SIZE, bytes, links, pattern, sink, source};

#[test]
fn a_queue_takes_one_command_fewer_than_it_has_entries_again_and_again() {
    let depth = QUEUE_SIZE as usize - 1;
    for mut link in links(true) {
        for round in 0..4 {
            for token in 0..depth as u64 {
                assert_eq!(link.host.room(), depth - token as usize);
                link.write(&pattern(token, 64), token);
            }
            assert_eq!((link.host.room(), link.host.outstanding()), (0, depth));
            let data = Transfer::Out(source(&[1; 33]));
            let rejected = link.host.submit(Sqe::write(1, 0, 1, false), data, 99);
            let rejected = rejected.unwrap_err();
            assert_eq!(rejected.reason, RejectedReason::Full);
            assert_eq!(bytes(rejected.transfer), [1; 33]);
            let mut tags = BTreeSet::new();
            for _ in 0..depth {
                let Command { tag, .. } = link.arrived();
                assert!(u32::from(tag.0) < QUEUE_SIZE, "an index into the queue");
                assert!(tags.insert(tag.0), "of its own");
            }
            assert_eq!(link.controller.outstanding(), depth);
            for tag in tags {
                let failed = Cqe::new(0, Status::INVALID_FIELD);
                link.controller.respond(CommandTag(tag), failed);
            }
            let mut tokens = BTreeSet::new();
            for _ in 0..depth {
                assert!(tokens.insert(link.completed().token), "round {round}");
            }
            assert_eq!(link.host.room(), depth);
            link.is_over();
        }
    }
}

#[test]
fn answers_may_come_in_any_order() {
    for mut link in links(true) {
        for token in 0..5 {
            link.submit(Sqe::flush(1), Transfer::None, token);
        }
        let tags: Vec<_> = (0..5).map(|_| link.arrived().tag).collect();
        for token in [3, 0, 4, 2, 1] {
            link.controller.respond(tags[token], Cqe::default());
            let done = link.completed();
            assert_eq!(done.token as usize, token);
            assert!(done.cqe.status().is_success());
        }
        link.is_over();
    }
}

#[test]
fn more_data_than_a_command_can_describe_is_refused_and_comes_back() {
    let len = (4 << 30) + 512;
    for mut link in links(false) {
        let data = Transfer::Out(MemSource::zeroes(len, Vec::new()));
        let rejected = link.host.submit(Sqe::write(1, 0, 1, false), data, 1);
        let rejected = rejected.unwrap_err();
        assert_eq!(rejected.reason, RejectedReason::TooLong);
        assert_eq!(rejected.transfer.len(), len);
        assert_eq!(link.host.outstanding(), 0);
        link.is_over();
    }
}

#[test]
fn every_command_describes_its_data_by_an_sgl() {
    for mut link in links(false) {
        for flags in [0, PSDT_MASK] {
            let sqe = Sqe {
                flags,
                ..Sqe::read(1, 0, 1)
            };
            link.submit(sqe, Transfer::In(sink(700)), 1);
            let Command { tag, sqe, data_len } = link.arrived();
            assert_eq!(sqe.flags & PSDT_MASK, PSDT_SGL, "{:?}", link.kind);
            assert_eq!((sqe.sgl1.length.get(), data_len), (700, 700));
            link.controller
                .respond(tag, Cqe::new(0, Status::INTERNAL_ERROR));
            link.completed();
        }
        link.is_over();
    }
}

#[test]
fn with_flow_control_every_answer_carries_the_head_of_the_queue() {
    for mut link in links(true) {
        for number in 1..40u32 {
            let writes = number % 3 == 0;
            match writes {
                true => link.write(&pattern(1, 512), 1),
                false => link.read(512, 1),
            };
            let Command { tag, .. } = link.arrived();
            if !writes {
                let data = pattern(2, 512);
                link.controller.send(tag, 0, source(&data), true).unwrap();
                link.sent(tag);
            } else {
                link.controller.fetch(tag, 0, sink(512)).unwrap();
                assert_eq!(link.fetched(tag).1, Ok(()));
            }
            link.controller.respond(tag, Cqe::default());
            let done = link.completed();
            assert!(done.cqe.status().is_success());
            assert!(done.sqhd_valid, "{:?}: it may not be left out", link.kind);
            assert_eq!(u32::from(done.cqe.sqhd.get()), number % QUEUE_SIZE);
        }
        link.is_over();
    }
}

#[test]
fn without_flow_control_only_a_success_after_data_may_be_made_up() {
    for mut link in links(false) {
        let mut made_up = 0;
        for number in 0..20 {
            // A read, a failed read, a command without data, a write.
            let case = number % 4;
            match case {
                0 | 1 => link.read(512, 1),
                2 => link.submit(Sqe::flush(1), Transfer::None, 1),
                _ => link.write(&pattern(1, 512), 1),
            };
            let Command { tag, .. } = link.arrived();
            let mut status = Status::SUCCESS;
            match case {
                0 => {
                    let data = pattern(2, 512);
                    link.controller.send(tag, 0, source(&data), true).unwrap();
                }
                1 => status = Status::UNRECOVERED_READ_ERROR,
                2 => {}
                _ => {
                    link.controller.fetch(tag, 0, sink(512)).unwrap();
                    assert_eq!(link.fetched(tag).1, Ok(()));
                }
            }
            link.controller.respond(tag, Cqe::new(0, status));
            let done = link.completed();
            assert_eq!(done.cqe.status(), status);
            if case == 0 {
                link.sent(tag);
                made_up += u32::from(!done.sqhd_valid);
            } else {
                assert!(done.sqhd_valid, "{:?} {case}", link.kind);
            }
            if done.sqhd_valid {
                assert_eq!(done.cqe.sqhd.get(), SQHD_FLOW_DISABLED);
            }
        }
        assert_eq!(made_up, if link.kind.is_tcp() { 5 } else { 0 });
        link.is_over();
    }
}

#[test]
fn a_result_that_is_not_zero_is_never_made_up() {
    for mut link in links(false) {
        link.read(512, 1);
        let Command { tag, .. } = link.arrived();
        let data = pattern(1, 512);
        link.controller.send(tag, 0, source(&data), true).unwrap();
        link.controller.respond(tag, Cqe::with_result(0, 0x1234));
        let done = link.completed();
        assert_eq!(done.cqe.result.get(), 0x1234, "{:?}", link.kind);
        assert!(done.sqhd_valid);
        link.sent(tag);
        link.is_over();
    }
}

#[test]
fn flow_control_is_what_connect_asked_for() {
    for mut link in links(true) {
        link.controller.set_sq_flow_control(false, QUEUE_SIZE);
        link.submit(Sqe::flush(1), Transfer::None, 1);
        let Command { tag, .. } = link.arrived();
        link.controller.respond(tag, Cqe::default());
        assert_eq!(link.completed().cqe.sqhd.get(), SQHD_FLOW_DISABLED);
        link.is_over();
    }
}

#[test]
fn a_command_that_is_given_up_before_it_is_flushed_is_never_seen() {
    for mut link in links(false) {
        let id = link.write(&pattern(1, IN_CAPSULE), 1);
        assert!(link.host.abandon(id));
        let done = link.completed();
        assert!(!link.host.abandon(id), "it is over");
        assert_eq!(done.cqe.status(), Status::ABORTED_BY_HOST);
        assert_eq!((done.token, done.transferred), (1, 0));
        assert!(!done.sqhd_valid);
        assert!(bytes(done.transfer) == pattern(1, IN_CAPSULE));
        link.is_over();
        assert_eq!(link.host.room(), QUEUE_SIZE as usize - 1);
    }
}

#[test]
fn a_command_that_is_given_up_later_comes_back_once_and_its_answer_goes_nowhere() {
    for mut link in links(false) {
        for reads in [true, false] {
            let len = 100_000;
            let id = match reads {
                true => link.read(len, 1),
                false => link.write(&pattern(1, len), 1),
            };
            let Command { tag, .. } = link.arrived();
            assert!(link.host.abandon(id));
            let done = link.completed();
            assert_eq!(done.cqe.status(), Status::ABORTED_BY_HOST);
            assert_eq!((done.token, done.transfer.len()), (1, len));
            assert_eq!(link.host.outstanding(), 0);
            assert_eq!(link.host.room(), QUEUE_SIZE as usize - 2, "it rests");
            // Others go on meanwhile.
            link.submit(Sqe::flush(1), Transfer::None, 2);
            let other = link.arrived().tag;
            link.controller.respond(other, Cqe::default());
            assert_eq!(link.completed().token, 2);
            if reads {
                let data = pattern(2, len);
                let sent = link.controller.send(tag, 0, source(&data), true);
                if sent.is_ok() {
                    link.sent(tag);
                }
            }
            link.controller.respond(tag, Cqe::default());
            link.until(|link| (link.host.room() == QUEUE_SIZE as usize - 1).then_some(()));
            link.is_over();
        }
    }
}

#[test]
fn there_is_something_to_wait_on_for_each_end_and_nothing_to_write_when_idle() {
    for mut link in links(false) {
        link.idle();
        let (host, controller) = (link.host.interest(), link.controller.interest());
        assert!(host.readable && controller.readable, "{:?}", link.kind);
        assert!(!host.writable && !controller.writable);
        assert_ne!(host.fd.as_raw_fd(), controller.fd.as_raw_fd());
    }
}
