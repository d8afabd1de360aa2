//! The two ends of a loopback connection: what they hand each other, and that memory comes back.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]

use memdesc::{MemSink, MemSource};
use nvmf::spec::{Cqe, Sqe, Status, trtype};
use nvmf::transport::loopback::Connection;
use nvmf::transport::registry::Lease;
use nvmf::transport::{
    Command, Completion, ControllerEvent, ControllerQueuePair, Ending, HostQueuePair, QueueParams,
    Ready, Registry, Transfer,
};

const QUEUE_SIZE: u32 = 8;

type Host = Box<dyn HostQueuePair>;
type Controller = Box<dyn ControllerQueuePair>;

fn params(connection: Connection, sq_flow_control: bool) -> QueueParams {
    QueueParams {
        admin: false,
        queue_size: QUEUE_SIZE,
        sq_flow_control,
        in_capsule_limit: 0,
        connection: connection.into(),
        lease: Lease::default(),
    }
}

fn open(registry: &Registry, sq_flow_control: bool) -> (Host, Controller) {
    let (host, controller) = Connection::pair().unwrap();
    let host = registry.open_host(trtype::INTRA_HOST, params(host, sq_flow_control));
    let controller =
        registry.open_controller(trtype::INTRA_HOST, params(controller, sq_flow_control));
    (host.unwrap(), controller.unwrap())
}

fn pair() -> (Host, Controller) {
    open(&Registry::with_defaults(), false)
}

/// Ends that one owner drives, so that memory is lent.
fn coupled() -> (Host, Controller) {
    let (mut host, controller) = pair();
    assert!(host.couple());
    (host, controller)
}

fn ready() -> Ready {
    Ready {
        readable: true,
        writable: true,
    }
}

fn read(host: &mut Host, len: usize, token: u64) {
    let sink = MemSink::from_bytes(vec![0xaa; len]);
    let sqe = Sqe::read(1, 0, 1);
    host.submit(sqe, Transfer::In(sink), token).unwrap();
}

fn write(host: &mut Host, data: &[u8], token: u64) {
    let source = MemSource::from_bytes(data.to_vec());
    let sqe = Sqe::write(1, 0, 1, false);
    host.submit(sqe, Transfer::Out(source), token).unwrap();
}

/// Hands over what the host has queued, and gives the next command.
fn arrived(host: &mut Host, controller: &mut Controller) -> Command {
    host.flush(&mut ready());
    controller.progress(&mut ready());
    match controller.event() {
        Some(ControllerEvent::Command(command)) => command,
        other => panic!("{other:?}"),
    }
}

fn completed(host: &mut Host, controller: &mut Controller) -> Option<Completion> {
    controller.flush(&mut ready());
    host.progress(&mut ready());
    host.completion()
}

fn bytes(transfer: Transfer) -> Vec<u8> {
    match transfer {
        Transfer::None => Vec::new(),
        Transfer::In(sink) => sink.into_parts().1.unwrap(),
        Transfer::Out(source) => source.into_parts().1.unwrap(),
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

const SIZES: [usize; 8] = [0, 1, 511, 512, 4096, 4097, 65537, 1 << 20];

#[test]
fn data_of_every_size_is_copied_between_ends_that_are_apart() {
    let (mut host, mut controller) = pair();
    let mut copied = 0;
    for len in SIZES {
        write(&mut host, &pattern(len), 1);
        let Command { tag, data_len, .. } = arrived(&mut host, &mut controller);
        assert_eq!(data_len as usize, len);
        assert!(controller.lend(tag).is_none(), "not across threads");
        let sink = MemSink::from_bytes(vec![0; len]);
        controller.fetch(tag, 0, sink).unwrap();
        let Some(ControllerEvent::Fetched { sink, result, .. }) = controller.event() else {
            panic!("a fetch ends");
        };
        assert_eq!(result, Ok(()));
        assert_eq!(bytes(Transfer::In(sink)), pattern(len));
        controller.respond(tag, Cqe::default());
        let done = completed(&mut host, &mut controller).unwrap();
        assert_eq!((done.token, done.transferred as usize), (1, len));
        assert!(done.cqe.status().is_success());
        assert_eq!(bytes(done.transfer), pattern(len));

        read(&mut host, len, 2);
        let Command { tag, .. } = arrived(&mut host, &mut controller);
        let half = len / 2;
        for (range, last) in [(0..half, false), (half..len, true)] {
            let at = range.start as u32;
            let source = MemSource::from_bytes(pattern(len)[range].to_vec());
            controller.send(tag, at, source, last).unwrap();
            let event = controller.event();
            assert!(matches!(event, Some(ControllerEvent::Sent { .. })));
        }
        controller.respond(tag, Cqe::default());
        let done = completed(&mut host, &mut controller).unwrap();
        assert!(done.cqe.status().is_success());
        assert_eq!(bytes(done.transfer), pattern(len));
        copied += 2 * len as u64;
        assert_eq!(host.counters().copied_bytes, copied);
    }
    assert_eq!((host.outstanding(), controller.outstanding()), (0, 0));
}

#[test]
fn lent_memory_is_the_hosts_own_and_is_not_copied() {
    let (mut host, mut controller) = coupled();
    for len in SIZES.into_iter().filter(|&len| len > 0) {
        read(&mut host, len, 3);
        let Command { tag, .. } = arrived(&mut host, &mut controller);
        let Some(Transfer::In(mut sink)) = controller.lend(tag) else {
            panic!("memory is lent");
        };
        assert!(controller.lend(tag).is_none(), "once only");
        sink.copy_from(0, &pattern(len)).unwrap();
        controller.restore(tag, Transfer::In(sink));
        controller.respond(tag, Cqe::default());
        let done = completed(&mut host, &mut controller).unwrap();
        assert!(done.cqe.status().is_success());
        assert_eq!((done.token, done.transferred as usize), (3, len));
        assert_eq!(bytes(done.transfer), pattern(len));
    }
    assert_eq!(host.counters().copied_bytes, 0);
}

#[test]
fn an_end_completes_everything_once_and_what_was_lent_when_it_is_back() {
    for by_host in [true, false] {
        let (mut host, mut controller) = coupled();
        for token in 0..4 {
            read(&mut host, 512, token);
        }
        let Command { tag, .. } = arrived(&mut host, &mut controller);
        let lent = controller.lend(tag).unwrap();
        // One is given out and not lent, two are not given out, one was not flushed.
        let second = controller.event();
        assert!(matches!(second, Some(ControllerEvent::Command(_))));
        write(&mut host, &[1; 512], 4);
        if by_host {
            host.end();
            controller.progress(&mut ready());
            assert_eq!(controller.ending(), Some(&Ending::Closed));
        } else {
            controller.end();
        }
        let mut tokens = Vec::new();
        while let Some(done) = completed(&mut host, &mut controller) {
            assert_eq!(done.cqe.status().code(), Status::ABORTED_BY_HOST.code());
            assert!(!done.sqhd_valid);
            assert_eq!(done.transfer.len(), 512);
            tokens.push(done.token);
        }
        tokens.sort_unstable();
        assert_eq!(tokens, [1, 2, 3, 4]);
        assert_eq!(host.ending(), None, "memory is still lent");
        assert_eq!(host.room(), 0);
        let sink = MemSink::from_bytes(vec![0; 1]);
        let refused = host.submit(Sqe::read(1, 0, 1), Transfer::In(sink), 9);
        assert_eq!(refused.unwrap_err().transfer.len(), 1);
        controller.restore(tag, lent);
        let done = completed(&mut host, &mut controller).unwrap();
        assert_eq!((done.token, done.transfer.len()), (0, 512));
        let cause = if by_host {
            Ending::Local
        } else {
            Ending::Closed
        };
        assert_eq!(host.ending(), Some(&cause));
        assert!(completed(&mut host, &mut controller).is_none());
    }
}

#[test]
fn a_host_that_is_gone_has_taken_its_memory_along() {
    let (mut host, mut controller) = pair();
    write(&mut host, &[1; 512], 1);
    read(&mut host, 512, 2);
    let Command { tag, .. } = arrived(&mut host, &mut controller);
    drop(host);
    let sink = MemSink::from_bytes(vec![0; 512]);
    let (sink, status) = controller.fetch(tag, 0, sink).unwrap_err();
    assert_eq!(status, Status::DATA_TRANSFER_ERROR);
    assert_eq!(bytes(Transfer::In(sink)), [0; 512]);
    controller.progress(&mut ready());
    assert_eq!(controller.ending(), Some(&Ending::Closed));
    assert!(controller.event().is_none());
    controller.respond(tag, Cqe::default());
    assert_eq!(controller.outstanding(), 0);
}

#[test]
fn a_controller_that_is_gone_has_completed_everything() {
    let (mut host, mut controller) = pair();
    read(&mut host, 512, 1);
    read(&mut host, 512, 2);
    arrived(&mut host, &mut controller);
    read(&mut host, 512, 3);
    drop(controller);
    host.progress(&mut ready());
    let all = std::iter::from_fn(|| host.completion());
    let mut tokens: Vec<u64> = all.map(|done| done.token).collect();
    tokens.sort_unstable();
    assert_eq!(tokens, [1, 2, 3]);
    assert_eq!(host.ending(), Some(&Ending::Closed));
}

/// Progress of both ends, until nothing is on its way.
fn settle(host: &mut Host, controller: &mut Controller) {
    for _ in 0..2 {
        host.flush(&mut ready());
        controller.progress(&mut ready());
        controller.flush(&mut ready());
        host.progress(&mut ready());
    }
}

fn aborted(done: Option<Completion>, token: u64, len: usize) {
    let done = done.unwrap();
    assert_eq!(done.cqe.status(), Status::ABORTED_BY_HOST);
    assert!(!done.sqhd_valid);
    assert_eq!((done.token, done.transfer.len()), (token, len));
}

#[test]
fn an_abandoned_command_that_the_controller_has_not_seen_never_reaches_it() {
    for flushed in [false, true] {
        let (mut host, mut controller) = pair();
        let sink = MemSink::from_bytes(vec![0; 512]);
        let id = host.submit(Sqe::read(1, 0, 1), Transfer::In(sink), 1);
        let id = id.unwrap();
        if flushed {
            host.flush(&mut ready());
        }
        read(&mut host, 100, 2);
        assert!(host.abandon(id));
        aborted(host.completion(), 1, 512);
        assert!(!host.abandon(id));
        let Command { data_len, .. } = arrived(&mut host, &mut controller);
        assert_eq!((data_len, host.outstanding()), (100, 1));
        assert!(controller.event().is_none());
        assert_eq!(host.room(), QUEUE_SIZE as usize - 2);
    }
}

#[test]
fn memory_of_an_abandoned_command_comes_home_and_its_cid_rests_until_it_is_answered() {
    for (seen, reads) in [(false, true), (true, true), (true, false)] {
        let (mut host, mut controller) = pair();
        let transfer = if reads {
            Transfer::In(MemSink::from_bytes(vec![0xaa; 512]))
        } else {
            Transfer::Out(MemSource::from_bytes(vec![0xaa; 512]))
        };
        let id = host.submit(Sqe::read(1, 0, 1), transfer, 1).unwrap();
        host.flush(&mut ready());
        controller.progress(&mut ready());
        let tag = seen.then(|| match controller.event() {
            Some(ControllerEvent::Command(Command { tag, .. })) => tag,
            other => panic!("{other:?}"),
        });
        assert!(host.abandon(id));
        assert!(host.completion().is_none());
        settle(&mut host, &mut controller);
        aborted(host.completion(), 1, 512);
        assert!(!host.abandon(id));
        assert_eq!(host.outstanding(), 0);
        let Some(tag) = tag else {
            // It was not given out, and never will be.
            assert!(controller.event().is_none());
            assert_eq!(host.room(), QUEUE_SIZE as usize - 1);
            continue;
        };
        assert_eq!(host.room(), QUEUE_SIZE as usize - 2);
        for token in 10..16 {
            read(&mut host, 1, token);
        }
        assert_eq!(host.room(), 0);
        settle(&mut host, &mut controller);
        // What the controller still does about it goes nowhere.
        if reads {
            let source = MemSource::from_bytes(vec![1; 512]);
            controller.send(tag, 0, source, true).unwrap();
            let event = controller.event();
            assert!(matches!(event, Some(ControllerEvent::Sent { .. })));
        } else {
            let sink = MemSink::from_bytes(vec![0; 512]);
            let (sink, status) = controller.fetch(tag, 0, sink).unwrap_err();
            assert_eq!((sink.len(), status), (512, Status::DATA_TRANSFER_ERROR));
        }
        assert!(controller.lend(tag).is_none());
        controller.respond(tag, Cqe::default());
        settle(&mut host, &mut controller);
        assert!(host.completion().is_none(), "once only");
        assert_eq!((host.room(), host.outstanding()), (1, 6));
        let sink = MemSink::from_bytes(vec![0; 1]);
        let again = host.submit(Sqe::read(1, 0, 1), Transfer::In(sink), 20);
        assert_eq!(again.unwrap(), id);
    }
}

#[test]
fn lent_memory_of_an_abandoned_command_comes_home_when_it_is_restored() {
    for answered_first in [false, true] {
        let (mut host, mut controller) = coupled();
        let sink = MemSink::from_bytes(vec![0; 512]);
        let id = host.submit(Sqe::read(1, 0, 1), Transfer::In(sink), 1);
        let Command { tag, .. } = arrived(&mut host, &mut controller);
        let lent = controller.lend(tag).unwrap();
        assert!(host.abandon(id.unwrap()));
        if answered_first {
            controller.respond(tag, Cqe::default());
        }
        settle(&mut host, &mut controller);
        assert!(host.completion().is_none(), "the backend has it");
        assert_eq!(host.outstanding(), 1);
        controller.restore(tag, lent);
        settle(&mut host, &mut controller);
        if answered_first {
            // Its fate is known by now.
            let done = host.completion().unwrap();
            assert!(done.cqe.status().is_success());
            assert_eq!(done.transfer.len(), 512);
        } else {
            aborted(host.completion(), 1, 512);
            assert_eq!(host.room(), QUEUE_SIZE as usize - 2);
            controller.respond(tag, Cqe::default());
            settle(&mut host, &mut controller);
        }
        assert!(host.completion().is_none());
        assert_eq!(host.room(), QUEUE_SIZE as usize - 1);
    }
}

#[test]
fn an_answer_that_crosses_an_abandon_is_the_one_that_counts() {
    for handed_over in [false, true] {
        let (mut host, mut controller) = pair();
        let id = host.submit(Sqe::flush(1), Transfer::None, 1).unwrap();
        let Command { tag, .. } = arrived(&mut host, &mut controller);
        controller.respond(tag, Cqe::default());
        if handed_over {
            controller.flush(&mut ready());
        }
        assert!(host.abandon(id));
        let done = completed(&mut host, &mut controller).unwrap();
        assert!(done.cqe.status().is_success());
        // The next command of this CID is another.
        let again = host.submit(Sqe::flush(1), Transfer::None, 2).unwrap();
        assert_eq!(again, id);
        arrived(&mut host, &mut controller);
        settle(&mut host, &mut controller);
        assert!(host.completion().is_none());
        assert_eq!(host.outstanding(), 1);
    }
}

#[test]
fn the_end_reports_no_abandoned_command_twice() {
    for by_host in [true, false] {
        let (mut host, mut controller) = pair();
        let id = host.submit(Sqe::flush(1), Transfer::None, 1).unwrap();
        arrived(&mut host, &mut controller);
        host.abandon(id);
        settle(&mut host, &mut controller);
        aborted(host.completion(), 1, 0);
        read(&mut host, 512, 2);
        if by_host {
            host.end()
        } else {
            controller.end()
        }
        settle(&mut host, &mut controller);
        aborted(host.completion(), 2, 512);
        assert!(host.completion().is_none());
        assert!(host.ending().is_some());
    }
}
