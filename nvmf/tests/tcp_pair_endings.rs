//! How a queue pair over TCP ends, and what becomes of what was outstanding; commands that are given up.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use memdesc::{MemSink, MemSource};
use nvmf::spec::{Cqe, Sqe, Status, trtype};
use nvmf::tcp::negotiate::{self, Offer};
use nvmf::transport::registry::Lease;
use nvmf::transport::tcp::{Connection, LocalEnd, accept, connect};
use nvmf::transport::{
    Command, CommandId, Completion, ControllerEvent, ControllerQueuePair, Ending, Fes,
    HostQueuePair, QueuePair, QueueParams, Ready, Registry, Transfer,
};
use socket2::SockRef;

const QUEUE_SIZE: u32 = 8;
const PATIENCE: Duration = Duration::from_secs(10);

type Host = Box<dyn HostQueuePair>;
type Controller = Box<dyn ControllerQueuePair>;

/// The ends of a connection on which nothing was said.
fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let other = listener.accept().unwrap().0;
    for socket in [&one, &other] {
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    (one, other)
}

fn params(stream: TcpStream) -> QueueParams {
    stream.set_nonblocking(true).unwrap();
    let (negotiated, _) = negotiate::answer(&negotiate::ic_req_of(&Offer::default())).unwrap();
    QueueParams {
        admin: false,
        queue_size: QUEUE_SIZE,
        sq_flow_control: true,
        in_capsule_limit: 4096,
        connection: Connection { stream, negotiated }.into(),
        lease: Lease::default(),
    }
}

/// A host whose controller is the test.
fn host() -> (Host, TcpStream) {
    let (host, peer) = sockets();
    let pair = Registry::with_defaults().open_host(trtype::TCP, params(host));
    (pair.unwrap(), peer)
}

/// A controller whose host is the test.
fn controller() -> (Controller, TcpStream) {
    let (controller, peer) = sockets();
    let pair = Registry::with_defaults().open_controller(trtype::TCP, params(controller));
    (pair.unwrap(), peer)
}

fn pair() -> (Host, Controller) {
    let registry = Registry::with_defaults();
    let (host, controller) = sockets();
    let host = registry.open_host(trtype::TCP, params(host));
    let controller = registry.open_controller(trtype::TCP, params(controller));
    (host.unwrap(), controller.unwrap())
}

fn step(pair: &mut (impl QueuePair + ?Sized)) {
    pair.progress(&mut Ready {
        readable: true,
        writable: true,
    });
}

/// Steps a pair until something is there.
#[track_caller]
fn until<P: QueuePair + ?Sized, T>(pair: &mut P, mut there: impl FnMut(&mut P) -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        step(pair);
        if let Some(there) = there(pair) {
            return there;
        }
        assert!(began.elapsed() < PATIENCE, "nothing came");
        std::thread::sleep(Duration::from_micros(100));
    }
}

#[track_caller]
fn ending<P: QueuePair + ?Sized>(pair: &mut P) -> Ending {
    until(pair, |pair| pair.ending().cloned())
}

fn read(host: &mut Host, len: usize, token: u64) -> CommandId {
    let sink = MemSink::from_bytes(vec![0xaa; len]);
    let sqe = Sqe::read(1, 0, 1);
    host.submit(sqe, Transfer::In(sink), token).unwrap()
}

fn write(host: &mut Host, len: usize, token: u64) -> CommandId {
    let source = MemSource::from_bytes(vec![0xbb; len]);
    let sqe = Sqe::write(1, 0, 1, false);
    host.submit(sqe, Transfer::Out(source), token).unwrap()
}

fn data_pdu(kind: u8, flags: u8, cccid: u16, ttag: u16, offset: u32, len: u32) -> Vec<u8> {
    let r2t = kind == 0x09;
    let carried = if r2t { 0 } else { len };
    let mut bytes = vec![kind, flags, 24, if r2t { 0 } else { 24 }];
    bytes.extend_from_slice(&(24 + carried).to_le_bytes());
    bytes.extend_from_slice(&cccid.to_le_bytes());
    bytes.extend_from_slice(&ttag.to_le_bytes());
    bytes.extend_from_slice(&offset.to_le_bytes());
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.resize(24 + carried as usize, 0xcc);
    bytes
}

fn response(cid: u16) -> Vec<u8> {
    let mut bytes = vec![0x05, 0, 24, 0, 24, 0, 0, 0];
    bytes.extend_from_slice(zerocopy::IntoBytes::as_bytes(&Cqe::new(
        cid,
        Status::SUCCESS,
    )));
    bytes
}

fn term_req(kind: u8, fes: u16, fei: u32) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 24, 0, 24, 0, 0, 0];
    bytes.extend_from_slice(&fes.to_le_bytes());
    bytes.extend_from_slice(&fei.to_le_bytes());
    bytes.resize(24, 0);
    bytes
}

#[test]
fn each_cause_is_told_apart_for_either_end_and_stays() {
    let whole = response(0x77);
    for (bytes, how, expected) in [
        (vec![], Some(Shutdown::Write), "closed"),
        (whole[..7].to_vec(), Some(Shutdown::Write), "lost"),
        (vec![], None, "reset"),
        (term_req(0x03, 4, 0), Some(Shutdown::Write), "terminated"),
        (vec![0x03, 0, 24, 0, 153, 0, 0, 0], None, "garbled"),
        (vec![0x77; 8], Some(Shutdown::Write), "protocol"),
    ] {
        for of_host in [true, false] {
            let (mut pair, mut peer): (Box<dyn QueuePair>, _) = if of_host {
                let (pair, peer) = host();
                (pair, peer)
            } else {
                let (pair, peer) = controller();
                (pair, peer)
            };
            let mut bytes = bytes.clone();
            match bytes.first_mut() {
                Some(kind @ 0x03) if !of_host => *kind = 0x02,
                Some(kind @ 0x05) if !of_host => *kind = 0x04,
                _ => {}
            }
            if bytes.first() == Some(&0x04) {
                bytes[2] = 72;
                bytes[4] = 72;
            }
            peer.write_all(&bytes).unwrap();
            if expected == "reset" {
                SockRef::from(&peer)
                    .set_linger(Some(Duration::ZERO))
                    .unwrap();
                drop(peer);
            } else if let Some(how) = how {
                peer.shutdown(how).unwrap();
            }
            let ended = ending(&mut *pair);
            let found = match &ended {
                Ending::Closed => "closed",
                Ending::Lost(why) if why.contains("middle of a PDU") => "lost",
                Ending::Lost(_) => "reset",
                Ending::Terminated(term) => {
                    assert_eq!((term.fes, term.fei), (Fes::DATA_OUT_OF_RANGE, 0));
                    "terminated"
                }
                Ending::Garbled => "garbled",
                Ending::Protocol(error) => {
                    assert_eq!((error.fes, error.fei), (Fes::INVALID_HEADER_FIELD, 0));
                    "protocol"
                }
                Ending::Local => "local",
            };
            assert_eq!(found, expected, "host: {of_host}");
            // What comes later does not change it.
            pair.end();
            step(&mut *pair);
            assert_eq!(pair.ending(), Some(&ended));
        }
    }
    let (mut pair, _peer) = host();
    pair.end();
    assert_eq!(pair.ending(), Some(&Ending::Local));
}

#[test]
fn a_termination_request_is_not_answered() {
    let (mut pair, mut peer) = host();
    peer.write_all(&term_req(0x03, 1, 8)).unwrap();
    ending(&mut *pair);
    let mut bytes = Vec::new();
    peer.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, []);
}

#[test]
fn a_peer_that_keeps_sending_is_told_why_all_the_same() {
    let (mut pair, mut peer) = controller();
    let mut nonsense = vec![0x77; 8];
    nonsense.resize(200_000, 1);
    peer.write_all(&nonsense).unwrap();
    assert!(matches!(ending(&mut *pair), Ending::Protocol(_)));
    // The owner has no more use for it.
    drop(pair);
    peer.write_all(&[1; 200_000]).unwrap();
    let mut told = Vec::new();
    peer.read_to_end(&mut told).unwrap();
    // The header is as long as it says.
    assert_eq!((told.len(), told[0]), (24 + 0x77, 0x03));
    assert_eq!(
        told[24..34],
        [0x77, 0x77, 0x77, 0x77, 0x77, 0x77, 0x77, 0x77, 1, 1]
    );
}

/// A host that has so much to send that the socket takes no more, since the peer does not read.
fn stuffed(len: usize) -> (Host, TcpStream, CommandId) {
    let (mut pair, mut peer) = host();
    let id = write(&mut pair, len, 1);
    step(&mut *pair);
    let r2t = data_pdu(0x09, 0, id.0, 5, 0, len as u32);
    peer.write_all(&r2t).unwrap();
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(300) {
        step(&mut *pair);
    }
    (pair, peer, id)
}

#[test]
fn a_pdu_that_is_half_sent_is_finished_before_the_termination_request() {
    let (mut pair, mut peer, _) = stuffed(32 << 20);
    peer.write_all(&[0x77; 8]).unwrap();
    assert!(matches!(ending(&mut *pair), Ending::Protocol(_)));
    assert_eq!(pair.completion().unwrap().transfer.len(), 32 << 20);
    drop(pair);
    let mut seen = Vec::new();
    peer.read_to_end(&mut seen).unwrap();
    // Whole PDUs, and the termination request as the last.
    let (mut at, mut kinds) = (0, Vec::new());
    while at < seen.len() {
        kinds.push(seen[at]);
        at += u32::from_le_bytes(seen[at + 4..at + 8].try_into().unwrap()) as usize;
    }
    assert_eq!((at, kinds[0]), (seen.len(), 0x04));
    assert_eq!(kinds.pop(), Some(0x02));
    assert!(kinds.len() > 2 && kinds[1..].iter().all(|&kind| kind == 0x06));
}

fn all(host: &mut Host) -> Vec<(u64, u32, usize)> {
    let mut all: Vec<_> = std::iter::from_fn(|| host.completion())
        .map(|done: Completion| {
            assert_eq!(done.cqe.status(), Status::ABORTED_BY_HOST);
            assert!(!done.sqhd_valid);
            (done.token, done.transferred, done.transfer.len())
        })
        .collect();
    all.sort_unstable();
    all
}

#[test]
fn what_is_outstanding_when_the_peer_goes_comes_back_once_with_what_moved() {
    let (mut pair, mut peer) = host();
    let id = read(&mut pair, 1000, 1);
    write(&mut pair, 512, 2);
    write(&mut pair, 100_000, 3);
    step(&mut *pair);
    // Not flushed.
    write(&mut pair, 512, 4);
    let mut capsules = vec![0; 72 * 3 + 512];
    peer.read_exact(&mut capsules).unwrap();
    peer.write_all(&data_pdu(0x07, 0, id.0, 0, 0, 600)).unwrap();
    peer.write_all(&data_pdu(0x07, 4, id.0, 0, 600, 400)[..300])
        .unwrap();
    SockRef::from(&peer)
        .set_linger(Some(Duration::from_secs(1)))
        .unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    assert!(matches!(ending(&mut *pair), Ending::Lost(_)));
    // The fourth left with the next progress, or not.
    let found = all(&mut pair);
    assert_eq!(found[..3], [(1, 600, 1000), (2, 512, 512), (3, 0, 100_000)]);
    assert_eq!((found.len(), found[3].2), (4, 512));
    assert_eq!((pair.outstanding(), pair.room()), (0, 0));
}

#[test]
fn a_command_that_was_not_flushed_is_abandoned_without_a_trace() {
    let (mut pair, mut peer) = host();
    let id = write(&mut pair, 512, 1);
    assert!(pair.abandon(id));
    assert_eq!(all(&mut pair), [(1, 0, 512)]);
    read(&mut pair, 512, 2);
    step(&mut *pair);
    let mut capsule = [0; 72];
    peer.read_exact(&mut capsule).unwrap();
    assert_eq!(capsule[8], 2, "a read");
    pair.end();
    assert_eq!(all(&mut pair), [(2, 0, 512)]);
}

#[test]
fn data_of_an_abandoned_read_is_discarded_wherever_it_is_cut() {
    for len in [100usize, 4096, 16384, 100_000] {
        for cut in [0, 23, 24, 24 + len / 2, 24 + len - 1] {
            let (mut pair, mut peer) = host();
            let id = read(&mut pair, len, 1);
            let other = read(&mut pair, len, 2);
            step(&mut *pair);
            let data = data_pdu(0x07, 0x0c, id.0, 0, 0, len as u32);
            peer.write_all(&data[..cut]).unwrap();
            std::thread::sleep(Duration::from_millis(1));
            step(&mut *pair);
            assert!(pair.abandon(id));
            let done = pair.completion().unwrap();
            assert_eq!(done.cqe.status(), Status::ABORTED_BY_HOST);
            let Transfer::In(sink) = done.transfer else {
                panic!("the memory comes back")
            };
            let bytes = sink.into_parts().1.unwrap();
            assert_eq!(bytes.len(), len);
            peer.write_all(&data[cut..]).unwrap();
            peer.write_all(&data_pdu(0x07, 0x0c, other.0, 0, 0, len as u32))
                .unwrap();
            let done = until(&mut *pair, |pair| pair.completion());
            assert!(done.cqe.status().is_success());
            assert_eq!(done.token, 2);
            let Transfer::In(sink) = done.transfer else {
                panic!("the memory comes back")
            };
            assert!(
                sink.into_parts()
                    .1
                    .unwrap()
                    .iter()
                    .all(|&byte| byte == 0xcc)
            );
            assert!(pair.completion().is_none());
            assert_eq!(
                (pair.outstanding(), pair.room()),
                (0, QUEUE_SIZE as usize - 1)
            );
        }
    }
}

#[test]
fn memory_of_an_abandoned_write_comes_back_when_the_kernel_has_what_is_on_its_way() {
    let len = 32 << 20;
    let (mut pair, mut peer, id) = stuffed(len);
    assert!(pair.abandon(id));
    step(&mut *pair);
    assert!(pair.completion().is_none(), "a PDU is half sent");
    peer.set_nonblocking(true).unwrap();
    let (mut read, mut bytes) = (0, vec![0; 1 << 20]);
    let done = until(&mut *pair, |pair| {
        if let Ok(n) = peer.read(&mut bytes) {
            read += n;
        }
        pair.completion()
    });
    assert_eq!(done.cqe.status(), Status::ABORTED_BY_HOST);
    assert!(done.transferred > 0 && (done.transferred as usize) < len);
    assert_eq!(done.transfer.len(), len);
    // Nothing of it follows; and the controller's word frees the CID.
    assert_eq!(pair.room(), QUEUE_SIZE as usize - 2);
    peer.write_all(&response(id.0)).unwrap();
    until(&mut *pair, |pair| {
        (pair.room() == QUEUE_SIZE as usize - 1).then_some(())
    });
    assert!(pair.completion().is_none());
    assert_eq!(pair.ending(), None);
}

fn command(controller: &mut Controller) -> Command {
    until(&mut **controller, |controller| match controller.event() {
        Some(ControllerEvent::Command(command)) => Some(command),
        Some(other) => panic!("{other:?}"),
        None => None,
    })
}

#[test]
fn an_answer_gives_back_what_a_fetch_was_to_fill_and_the_queue_goes_on() {
    // In the capsule, and asked for.
    for len in [4096, 100_000] {
        let (mut host, mut controller) = pair();
        for round in 0..20 {
            write(&mut host, len, round);
            step(&mut *host);
            let Command { tag, .. } = command(&mut controller);
            let sink = MemSink::from_bytes(vec![0; len]);
            controller.fetch(tag, 0, sink).unwrap();
            controller.respond(tag, Cqe::new(0, Status::WRITE_FAULT));
            let back = until(&mut *controller, |controller| controller.event());
            let ControllerEvent::Fetched { sink, result, .. } = back else {
                panic!("{back:?}")
            };
            assert_eq!(sink.len(), len);
            assert!(result.is_err());
            let began = Instant::now();
            let done = loop {
                step(&mut *controller);
                step(&mut *host);
                if let Some(done) = host.completion() {
                    break done;
                }
                assert!(began.elapsed() < PATIENCE);
            };
            assert_eq!(done.cqe.status(), Status::WRITE_FAULT);
            assert_eq!((done.token, done.transfer.len()), (round, len));
            assert!(controller.event().is_none());
        }
        assert_eq!((host.outstanding(), controller.outstanding()), (0, 0));
    }
}

#[test]
fn a_fetch_that_is_cut_off_tells_how_much_had_arrived() {
    const LEN: usize = 8 << 20;
    let (mut host, mut controller) = pair();
    write(&mut host, LEN, 1);
    step(&mut *host);
    let Command { tag, .. } = command(&mut controller);
    controller
        .fetch(tag, 0, MemSink::from_bytes(vec![0; LEN]))
        .unwrap();
    // More than sockets hold: a few turns are not enough for all of it.
    until(&mut *controller, |controller| {
        step(&mut *host);
        (controller.counters().receives > 4).then_some(())
    });
    drop(host);
    ending(&mut *controller);
    let Some(ControllerEvent::Fetched {
        sink,
        result,
        transferred,
        ..
    }) = controller.event()
    else {
        panic!("the fetch does not come back");
    };
    assert_eq!((sink.len(), result.is_err()), (LEN, true));
    assert!(
        transferred > 0 && (transferred as usize) < LEN,
        "{transferred}"
    );
}

#[test]
fn a_controller_gives_everything_back_when_the_host_goes() {
    let (mut host, mut controller) = pair();
    write(&mut host, 100_000, 1);
    read(&mut host, 1 << 24, 2);
    step(&mut *host);
    let Command { tag, .. } = command(&mut controller);
    controller
        .fetch(tag, 0, MemSink::from_bytes(vec![0; 100_000]))
        .unwrap();
    let Command { tag, .. } = command(&mut controller);
    let source = MemSource::from_bytes(vec![0; 1 << 24]);
    controller.send(tag, 0, source, true).unwrap();
    step(&mut *controller);
    drop(host);
    ending(&mut *controller);
    let mut back = Vec::new();
    while let Some(event) = controller.event() {
        back.push(match event {
            ControllerEvent::Fetched {
                sink,
                result,
                transferred,
                ..
            } => {
                assert!(result.is_err());
                assert_eq!(transferred, 0, "it was not even asked for");
                sink.len()
            }
            ControllerEvent::Sent {
                source,
                transferred,
                ..
            } => {
                assert!((transferred as usize) < source.len());
                source.len()
            }
            ControllerEvent::Command(command) => panic!("{command:?}"),
        });
    }
    assert_eq!(back, [100_000, 1 << 24]);
    let late = MemSink::from_bytes(vec![0; 1]);
    assert!(controller.fetch(tag, 0, late).is_err());
}

#[tokio::test]
async fn both_ends_notice_a_peer_that_is_gone() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let local = LocalEnd::default();
    let (host, controller) = tokio::join!(
        connect(&local, address, Default::default(), deadline),
        async { accept(listener.accept().await.unwrap().0, deadline).await }
    );
    let host = host.unwrap();
    for connection in [&host, &controller.unwrap()] {
        let socket = SockRef::from(&connection.stream);
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        let seconds = Duration::from_secs;
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(seconds(30)));
        assert_eq!(socket.tcp_keepalive_time().unwrap(), seconds(30));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), seconds(7));
    }
    for (patience, expected) in [(5000, 5000), (1500, 1500), (10, 1000)] {
        host.set_patience(Duration::from_millis(patience)).unwrap();
        let set = SockRef::from(&host.stream).tcp_user_timeout().unwrap();
        assert_eq!(set, Some(Duration::from_millis(expected)));
    }
}
