//! How queue pairs end, and that everything which was outstanding comes back once.

use std::collections::BTreeMap;

use nvmf::spec::{Cqe, Sqe, Status};
use nvmf::transport::{Command, Completion, ControllerEvent, Ending, RejectedReason, Transfer};

use crate::link::{IN_CAPSULE, Kind, Link, links, pattern, sink, source};

/// Who ends it, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Host,
    Controller,
}

/// Lengths by token, of commands in every state: not given out, given out, their data on its way, not
/// flushed.
fn outstanding(link: &mut Link) -> BTreeMap<u64, usize> {
    let large = 200_000;
    let lens = [512, IN_CAPSULE, large, 0, 512, large, 100, large];
    for (token, len) in (0..).zip(lens) {
        match token % 2 {
            0 => link.read(len, token),
            _ => link.write(&pattern(token, len), token),
        };
    }
    // Token 2 has sent a part, and 5 asks for all of its data; 7 and 6 were not looked at.
    let tags: Vec<_> = (0..6).map(|_| link.arrived().tag).collect();
    let part = source(&pattern(2, 1000));
    link.controller.send(tags[2], 0, part, false).unwrap();
    link.controller.fetch(tags[5], 0, sink(large)).unwrap();
    (0..).zip(lens).collect()
}

fn aborted(done: &Completion) {
    assert_eq!(done.cqe.status(), Status::ABORTED_BY_HOST);
    assert!(!done.sqhd_valid, "nobody said so");
}

#[test]
fn an_end_completes_everything_once_with_its_memory_and_names_its_cause() {
    for by in [By::Host, By::Controller] {
        for mut link in links(false) {
            let mut lens = outstanding(&mut link);
            // Not flushed.
            link.write(&[9; 512], 99);
            lens.insert(99, 512);
            assert_eq!((link.host.ending(), link.controller.ending()), (None, None));
            match by {
                By::Host => link.host.end(),
                By::Controller => link.controller.end(),
            }
            while !lens.is_empty() {
                let done = link.completed();
                aborted(&done);
                let len = lens.remove(&done.token);
                assert_eq!(Some(done.transfer.len()), len, "{by:?} {:?}", link.kind);
                assert!(done.transferred as usize <= done.transfer.len());
            }
            let other = |link: &mut Link| match by {
                By::Host => link.controller.ending().cloned(),
                By::Controller => link.host.ending().cloned(),
            };
            let seen = link.until(other);
            // A socket that is closed with something unread resets the connection.
            let closed = matches!(seen, Ending::Closed)
                || link.kind.is_tcp() && matches!(seen, Ending::Lost(_));
            assert!(closed, "{by:?} {:?}: {seen:?}", link.kind);
            let own = match by {
                By::Host => link.host.ending(),
                By::Controller => link.controller.ending(),
            };
            assert_eq!(own, Some(&Ending::Local));
            // What the controller had given away comes back, too, once each.
            let mut back = (0, 0);
            link.idle();
            for event in link.events.drain(..) {
                match event {
                    ControllerEvent::Fetched { sink, result, .. } => {
                        assert_eq!(sink.len(), 200_000);
                        // Loopback has moved it at once.
                        assert!(result.is_err() || !link.kind.is_tcp());
                        back.0 += 1;
                    }
                    ControllerEvent::Sent { source, .. } => {
                        assert_eq!(source.len(), 1000);
                        back.1 += 1;
                    }
                    ControllerEvent::Command(_) => {}
                }
            }
            assert_eq!(back, (1, 1), "{by:?} {:?}", link.kind);
            assert!(link.completions.is_empty(), "once");
            assert_eq!((link.host.outstanding(), link.host.room()), (0, 0));
        }
    }
}

#[test]
fn an_ending_is_the_first_cause_and_stays() {
    for mut link in links(false) {
        link.controller.end();
        let first = link.until(|link| link.host.ending().cloned());
        assert!(matches!(first, Ending::Closed), "{first:?}");
        link.host.end();
        link.controller.end();
        link.idle();
        assert_eq!(link.host.ending(), Some(&first));
        assert_eq!(link.controller.ending(), Some(&Ending::Local));
        link.is_over();
    }
}

#[test]
fn an_ended_queue_pair_takes_nothing_and_gives_it_back() {
    for mut link in links(false) {
        link.write(&pattern(1, 512), 1);
        let Command { tag, .. } = link.arrived();
        link.controller.end();
        link.until(|link| link.host.ending().map(|_| ()));
        let data = Transfer::Out(source(&[1; 77]));
        let rejected = link.host.submit(Sqe::write(1, 0, 1, false), data, 2);
        let rejected = rejected.unwrap_err();
        assert_eq!(rejected.reason, RejectedReason::Ended);
        assert_eq!(rejected.transfer.len(), 77);
        let fetch = link.controller.fetch(tag, 0, sink(512));
        assert_eq!(fetch.unwrap_err().0.len(), 512, "{:?}", link.kind);
        let send = link.controller.send(tag, 0, source(&[1; 5]), true);
        assert_eq!(send.unwrap_err().0.len(), 5);
        assert!(link.controller.lend(tag).is_none());
        link.controller.respond(tag, Cqe::default());
        aborted(&link.completed());
        link.idle();
        assert!(link.completions.is_empty());
    }
}

#[test]
fn what_was_answered_before_the_end_is_completed_as_it_was() {
    for mut link in links(false) {
        link.read(512, 1);
        let Command { tag, .. } = link.arrived();
        let data = pattern(3, 512);
        link.controller.send(tag, 0, source(&data), true).unwrap();
        link.controller.respond(tag, Cqe::default());
        assert_eq!(link.sent(tag), 512);
        link.until(|link| (!link.completions.is_empty()).then_some(()));
        link.read(512, 2);
        link.arrived();
        link.host.end();
        let done = link.completed();
        assert_eq!((done.token, done.cqe.status()), (1, Status::SUCCESS));
        let done = link.completed();
        aborted(&done);
        assert_eq!(done.token, 2);
    }
}

#[test]
fn lent_memory_outlives_the_end_and_the_ending_waits_for_it() {
    let mut link = Link::new(Kind::Coupled, false);
    for end in [By::Host, By::Controller] {
        link = Link::new(Kind::Coupled, false);
        link.read(512, 1);
        let Command { tag, .. } = link.arrived();
        link.read(512, 2);
        let lent = link.controller.lend(tag).unwrap();
        match end {
            By::Host => link.host.end(),
            By::Controller => link.controller.end(),
        }
        assert_eq!(link.completed().token, 2);
        link.idle();
        assert_eq!(link.host.ending(), None);
        assert!(link.completions.is_empty(), "the backend has it");
        link.controller.restore(tag, lent);
        let done = link.completed();
        aborted(&done);
        assert_eq!((done.token, done.transfer.len()), (1, 512));
        assert!(link.host.ending().is_some());
    }
    link.is_over();
}
