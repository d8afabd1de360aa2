//! What is received over TCP is what was sent, wherever the stream is cut: around the thresholds of
//! staging and of placing directly, at every byte of headers and digests.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use memdesc::MemSink;
use nvmf::spec::sqe::{PSDT_SGL, sgl_type};
use nvmf::spec::{Cqe, Sqe, trtype};
use nvmf::tcp::negotiate::{self, Offer};
use nvmf::tcp::{Digests, crc32c};
use nvmf::transport::registry::Lease;
use nvmf::transport::tcp::Connection;
use nvmf::transport::{
    ControllerEvent, ControllerQueuePair, HostQueuePair, QueuePair, QueueParams, Ready, Registry,
    Transfer,
};
use zerocopy::IntoBytes;

const PATIENCE: Duration = Duration::from_secs(10);
/// More than the largest that is staged.
const IN_CAPSULE: u32 = 128 * 1024;

const ALL: [(bool, bool); 4] = [(false, false), (true, false), (false, true), (true, true)];

/// Lengths on both sides of what is placed directly (16 KiB) and of what one staging buffer holds
/// (64 KiB), with and without the headers and digests around it.
fn lengths() -> Vec<usize> {
    let mut lengths = vec![1, 24, 4096];
    for threshold in [16 * 1024, 64 * 1024] {
        for around in [0, 24, 28, 32, 56, 72, 76] {
            lengths.extend([threshold - around, threshold + around]);
        }
        lengths.extend([threshold - 1, threshold + 1]);
    }
    lengths.push(100_001);
    lengths.sort_unstable();
    lengths.dedup();
    lengths
}

/// Where a stream of PDUs that begin at `starts` is cut: at every byte around each of them, around the
/// end, and around what a staging buffer holds.
fn cuts(starts: &[usize], end: usize) -> Vec<usize> {
    let mut cuts: Vec<usize> = Vec::new();
    for &start in starts {
        cuts.extend(start.saturating_sub(5)..start + 30);
    }
    cuts.extend(end - 6..end);
    cuts.extend([
        16 * 1024 - 1,
        16 * 1024,
        16 * 1024 + 24,
        64 * 1024 - 1,
        64 * 1024,
        64 * 1024 + 1,
    ]);
    cuts.retain(|&cut| cut > 0 && cut < end);
    cuts.sort_unstable();
    cuts.dedup();
    cuts
}

struct Peer {
    stream: TcpStream,
    digests: Digests,
}

fn connected(digests: Digests) -> (QueueParams, Peer) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let peer = listener.accept().unwrap().0;
    for socket in [&stream, &peer] {
        socket.set_nodelay(true).unwrap();
    }
    stream.set_nonblocking(true).unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    let ours = Offer {
        digests,
        ..Offer::default()
    };
    let (negotiated, _) = negotiate::answer(&negotiate::ic_req_of(&ours)).unwrap();
    let params = QueueParams {
        admin: false,
        queue_size: 8,
        sq_flow_control: false,
        in_capsule_limit: IN_CAPSULE,
        connection: Connection { stream, negotiated }.into(),
        lease: Lease::default(),
    };
    (
        params,
        Peer {
            stream: peer,
            digests,
        },
    )
}

impl Peer {
    /// A PDU with its digests. `header` is without them, and its data follows.
    fn pdu(&self, kind: u8, flags: u8, rest: &[u8], data: &[u8]) -> Vec<u8> {
        let Digests {
            header,
            data: of_data,
        } = self.digests;
        let hlen = 8 + rest.len();
        let pdo = hlen + if header { 4 } else { 0 };
        let digest = if of_data && !data.is_empty() { 4 } else { 0 };
        let flags = flags | u8::from(header) | u8::from(digest > 0) << 1;
        let plen = (pdo + data.len() + digest) as u32;
        let pdo_field = if data.is_empty() { 0 } else { pdo as u8 };
        let mut bytes = vec![kind, flags, hlen as u8, pdo_field];
        bytes.extend_from_slice(&plen.to_le_bytes());
        bytes.extend_from_slice(rest);
        if header {
            bytes.extend_from_slice(&crc32c(0, &bytes).to_le_bytes());
        }
        bytes.extend_from_slice(data);
        if digest > 0 {
            bytes.extend_from_slice(&crc32c(0, data).to_le_bytes());
        }
        bytes
    }

    fn data(&self, kind: u8, flags: u8, cccid: u16, ttag: u16, data: &[u8]) -> Vec<u8> {
        let mut rest = Vec::new();
        rest.extend_from_slice(&cccid.to_le_bytes());
        rest.extend_from_slice(&ttag.to_le_bytes());
        rest.extend_from_slice(&0u32.to_le_bytes());
        rest.extend_from_slice(&(data.len() as u32).to_le_bytes());
        rest.extend_from_slice(&[0; 4]);
        self.pdu(kind, flags, &rest, data)
    }

    /// Takes what the other end has sent, of this many bytes without digests.
    fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len + if self.digests.header { 4 } else { 0 }];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }
}

fn step(pair: &mut (impl QueuePair + ?Sized)) {
    pair.progress(&mut Ready {
        readable: true,
        writable: true,
    });
}

fn pattern() -> Vec<u8> {
    (0..200_000u32).map(|i| (i * 31 + i / 251) as u8).collect()
}

/// A large read and a small one behind it, so that a header follows what is placed directly.
fn two_reads(host: &mut dyn HostQueuePair, peer: &mut Peer, data: [&[u8]; 2], cut: usize) {
    let mut cids = Vec::new();
    for (token, data) in data.iter().enumerate() {
        let sink = Transfer::In(MemSink::from_bytes(vec![0xee; data.len()]));
        let id = host.submit(Sqe::read(1, 0, 1), sink, token as u64);
        cids.push(id.unwrap().0);
    }
    step(host);
    peer.take(72);
    peer.take(72);
    let stream = [
        peer.data(0x07, 0x0c, cids[0], 0, data[0]),
        peer.data(0x07, 0x0c, cids[1], 0, data[1]),
    ]
    .concat();
    for piece in [&stream[..cut], &stream[cut..cut + 1], &stream[cut + 1..]] {
        peer.stream.write_all(piece).unwrap();
        step(host);
    }
    let began = Instant::now();
    for (token, data) in data.iter().enumerate() {
        let done = loop {
            if let Some(done) = host.completion() {
                break done;
            }
            assert!(began.elapsed() < PATIENCE, "{:?}", host.ending());
            step(host);
        };
        assert_eq!(done.token, token as u64);
        assert!(done.cqe.status().is_success(), "{}", done.cqe.status());
        let Transfer::In(sink) = done.transfer else {
            panic!("the memory comes back")
        };
        assert!(
            sink.into_parts().1.unwrap() == *data,
            "{} at {cut}",
            data.len()
        );
    }
}

#[test]
fn a_host_receives_what_was_sent_wherever_it_is_cut() {
    let pattern = pattern();
    for (header, data) in ALL {
        let (params, mut peer) = connected(Digests { header, data });
        let host = Registry::with_defaults().open_host(trtype::TCP, params);
        let mut host = host.unwrap();
        for len in lengths() {
            let data = [&pattern[..len], &pattern[7..7 + 600]];
            let first = peer.data(0x07, 0, 0, 0, data[0]).len();
            let second = peer.data(0x07, 0, 0, 0, data[1]).len();
            for cut in cuts(&[0, 24, first, first + 24], first + second) {
                two_reads(&mut *host, &mut peer, data, cut);
            }
        }
        assert_eq!((host.outstanding(), host.ending()), (0, None));
    }
}

/// The capsule of a write of `data`, in it or to be asked for.
fn capsule(peer: &Peer, cid: u16, data: &[u8], in_capsule: bool) -> Vec<u8> {
    let mut sqe = Sqe::write(1, 0, 1, false);
    sqe.cid = cid.into();
    sqe.flags = PSDT_SGL;
    sqe.sgl1.length = (data.len() as u32).into();
    sqe.sgl1.sgl_type = if in_capsule {
        sgl_type::IN_CAPSULE
    } else {
        sgl_type::TRANSPORT
    };
    let data = if in_capsule { data } else { &[] };
    peer.pdu(0x04, 0, sqe.as_bytes(), data)
}

/// Sends a stream in three pieces, and another command behind it.
fn write_cut(
    controller: &mut dyn ControllerQueuePair,
    peer: &mut Peer,
    data: &[u8],
    in_capsule: bool,
    cut: usize,
    claim: bool,
) {
    let mut stream = capsule(peer, 1, data, in_capsule);
    if !in_capsule {
        peer.stream.write_all(&stream).unwrap();
        step(controller);
        let Some(ControllerEvent::Command(command)) = controller.event() else {
            panic!("no command: {:?}", controller.ending())
        };
        let sink = MemSink::from_bytes(vec![0xee; data.len()]);
        controller.fetch(command.tag, 0, sink).unwrap();
        step(controller);
        let r2t = peer.take(24);
        let ttag = u16::from_le_bytes([r2t[10], r2t[11]]);
        stream = peer.data(0x06, 0x04, 1, ttag, data);
    }
    stream.extend(capsule(peer, 2, &[], false));
    let (mut fetched, mut late) = (None, None);
    let mut next = None;
    let mut pieces = vec![&stream[..cut], &stream[cut..cut + 1], &stream[cut + 1..]];
    let began = Instant::now();
    while fetched.is_none() || next.is_none() {
        if !pieces.is_empty() {
            peer.stream.write_all(pieces.remove(0)).unwrap();
        }
        step(controller);
        while let Some(event) = controller.event() {
            match event {
                ControllerEvent::Command(command) if command.sqe.cid.get() == 1 => {
                    // Claimed at once, or only when the data has gone by.
                    if claim {
                        let sink = MemSink::from_bytes(vec![0xee; data.len()]);
                        controller.fetch(command.tag, 0, sink).unwrap();
                    } else {
                        late = Some(command.tag);
                    }
                }
                ControllerEvent::Command(command) => next = Some(command.tag),
                ControllerEvent::Fetched {
                    tag, sink, result, ..
                } => {
                    assert_eq!(result, Ok(()));
                    fetched = Some((tag, sink));
                }
                ControllerEvent::Sent { .. } => panic!("nothing was sent"),
            }
        }
        if let Some(tag) = late.filter(|_| next.is_some()) {
            let sink = MemSink::from_bytes(vec![0xee; data.len()]);
            controller.fetch(tag, 0, sink).unwrap();
            late = None;
        }
        assert!(began.elapsed() < PATIENCE, "{:?}", controller.ending());
    }
    let (tag, sink) = fetched.unwrap();
    assert!(
        sink.into_parts().1.unwrap() == data,
        "{} at {cut}",
        data.len()
    );
    for tag in [tag, next.unwrap()] {
        controller.respond(tag, Cqe::default());
    }
    step(controller);
    peer.take(24);
    peer.take(24);
}

#[test]
fn a_controller_receives_what_was_sent_wherever_it_is_cut() {
    let pattern = pattern();
    for (header, data) in ALL {
        let (params, mut peer) = connected(Digests { header, data });
        let controller = Registry::with_defaults().open_controller(trtype::TCP, params);
        let mut controller = controller.unwrap();
        for len in lengths() {
            let data = &pattern[..len];
            for (in_capsule, claim) in [(false, true), (true, true), (true, false)] {
                let first = if in_capsule {
                    capsule(&peer, 1, data, true).len()
                } else {
                    peer.data(0x06, 0, 0, 0, data).len()
                };
                let end = first + capsule(&peer, 2, &[], false).len();
                let head = if in_capsule { 72 } else { 24 };
                for cut in cuts(&[0, head, first, first + 72], end) {
                    // Each byte for the first; a part of them for the others, which share the path.
                    if in_capsule && !cut.is_multiple_of(3) {
                        continue;
                    }
                    write_cut(&mut *controller, &mut peer, data, in_capsule, cut, claim);
                }
            }
        }
        assert_eq!((controller.outstanding(), controller.ending()), (0, None));
    }
}
