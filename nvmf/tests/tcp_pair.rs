//! Our host's queue pair against our controller's over a real loopback connection.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]
#![expect(unsafe_code, reason = "segments over memory that changes")]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memdesc::{MemSink, MemSource, Segment};
use nvmf::spec::{Cqe, Sqe, Status, trtype};
use nvmf::tcp::negotiate;
use nvmf::transport::registry::Lease;
use nvmf::transport::tcp::{Connection, Digests, LocalEnd, accept, connect};
use nvmf::transport::{
    CommandTag, ControllerEvent, ControllerQueuePair, Ending, Fes, HostQueuePair, QueuePair,
    QueueParams, Ready, Registry, Transfer,
};

const QUEUE_SIZE: u32 = 32;
const IN_CAPSULE: u32 = 8192;
const WRITE: u8 = 1;
const READ: u8 = 2;

const OFF: Digests = Digests {
    header: false,
    data: false,
};
const HEADER: Digests = Digests {
    header: true,
    ..OFF
};
const DATA: Digests = Digests { data: true, ..OFF };
const BOTH: Digests = Digests {
    header: true,
    data: true,
};
const ALL: [Digests; 4] = [OFF, HEADER, DATA, BOTH];

fn connections(digests: Digests) -> (Connection, Connection) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let local = LocalEnd::default();
        let (host, controller) = tokio::join!(connect(&local, address, digests, deadline), async {
            accept(listener.accept().await.unwrap().0, deadline).await
        });
        (host.unwrap(), controller.unwrap())
    })
}

fn params(connection: Connection, sq_flow_control: bool) -> QueueParams {
    QueueParams {
        admin: false,
        queue_size: QUEUE_SIZE,
        sq_flow_control,
        in_capsule_limit: IN_CAPSULE,
        connection: connection.into(),
        lease: Lease::default(),
    }
}

type Pairs = (Box<dyn HostQueuePair>, Box<dyn ControllerQueuePair>);

fn pairs(registry: &Registry, sq_flow_control: bool, digests: Digests) -> Pairs {
    let (host, controller) = connections(digests);
    let host = registry
        .open_host(trtype::TCP, params(host, sq_flow_control))
        .unwrap();
    let controller = registry
        .open_controller(trtype::TCP, params(controller, sq_flow_control))
        .unwrap();
    (host, controller)
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes = vec![0; len];
    for piece in bytes.chunks_mut(8) {
        piece.copy_from_slice(&next()[..piece.len()]);
    }
    bytes
}

/// A controller that keeps what was written under NSID and gives it back.
#[derive(Default)]
struct Shelf {
    kept: HashMap<u32, Vec<u8>>,
    commands: HashMap<u16, Sqe>,
    /// Data is fetched only after the next events were asked for, when in-capsule data has
    /// already gone by.
    lazy: bool,
    late: Vec<(CommandTag, usize)>,
}

impl Shelf {
    fn turn(&mut self, pair: &mut dyn ControllerQueuePair) {
        loop {
            while let Some(event) = pair.event() {
                self.event(pair, event);
            }
            if self.late.is_empty() {
                return;
            }
            for (tag, len) in std::mem::take(&mut self.late) {
                pair.fetch(tag, 0, MemSink::from_bytes(vec![0; len]))
                    .unwrap();
            }
        }
    }

    fn event(&mut self, pair: &mut dyn ControllerQueuePair, event: ControllerEvent) {
        match event {
            ControllerEvent::Command(command) => {
                let tag = command.tag;
                self.commands.insert(tag.0, command.sqe);
                let len = command.data_len as usize;
                match command.sqe.opcode {
                    WRITE if self.lazy => self.late.push((tag, len)),
                    WRITE => pair
                        .fetch(tag, 0, MemSink::from_bytes(vec![0; len]))
                        .unwrap(),
                    READ => {
                        let data = self.kept[&command.sqe.nsid.get()].clone();
                        assert_eq!(data.len(), len);
                        pair.send(tag, 0, MemSource::from_bytes(data), true)
                            .unwrap();
                        pair.respond(tag, Cqe::default());
                    }
                    _ => pair.respond(tag, Cqe::new(0, Status::INVALID_OPCODE)),
                }
            }
            ControllerEvent::Fetched {
                tag, sink, result, ..
            } => {
                if let Err(status) = result {
                    return pair.respond(tag, Cqe::new(0, status));
                }
                let nsid = self.commands[&tag.0].nsid.get();
                self.kept.insert(nsid, sink.into_parts().1.unwrap());
                pair.respond(tag, Cqe::default());
            }
            ControllerEvent::Sent { .. } => {}
        }
    }
}

fn step(pair: &mut (impl QueuePair + ?Sized)) {
    let mut ready = Ready {
        readable: true,
        writable: true,
    };
    pair.progress(&mut ready);
    pair.flush(&mut Ready {
        readable: true,
        writable: true,
    });
}

/// Runs commands of many sizes at full depth, written and then read back. Returns the payload
/// bytes that each side copied.
fn round_trip(
    sq_flow_control: bool,
    lazy: bool,
    digests: Digests,
    sizes: &[usize],
    rounds: usize,
) -> (u64, u64) {
    let registry = Registry::with_defaults();
    let pairs = pairs(&registry, sq_flow_control, digests);
    assert_eq!(registry.queue_pairs("tcp"), 2);
    round_trip_over(pairs, lazy, sizes, rounds)
}

fn round_trip_over(
    (mut host, mut controller): Pairs,
    lazy: bool,
    sizes: &[usize],
    rounds: usize,
) -> (u64, u64) {
    let mut shelf = Shelf {
        lazy,
        ..Shelf::default()
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    for writing in [true, false] {
        let (mut next, mut done) = (0usize, 0usize);
        let total = sizes.len() * rounds;
        while done < total {
            assert!(Instant::now() < deadline, "stuck after {done} of {total}");
            while next < total && host.room() > 0 {
                let len = sizes[next % sizes.len()];
                let sqe = Sqe::new(if writing { WRITE } else { READ }, next as u32 + 1);
                let transfer = if writing {
                    Transfer::Out(MemSource::from_bytes(pattern(next as u64, len)))
                } else {
                    Transfer::In(MemSink::from_bytes(vec![0; len]))
                };
                host.submit(sqe, transfer, next as u64).unwrap();
                next += 1;
            }
            step(&mut *host);
            step(&mut *controller);
            shelf.turn(&mut *controller);
            step(&mut *controller);
            while let Some(completion) = host.completion() {
                let index = completion.token as usize;
                assert!(
                    completion.cqe.status().is_success(),
                    "{}",
                    completion.cqe.status()
                );
                assert_eq!(completion.transferred as usize, sizes[index % sizes.len()]);
                if let Transfer::In(sink) = completion.transfer {
                    let bytes = sink.into_parts().1.unwrap();
                    assert!(
                        bytes == pattern(index as u64, bytes.len()),
                        "command {index}"
                    );
                }
                done += 1;
            }
            assert_eq!(host.ending(), None);
            assert_eq!(controller.ending(), None);
        }
        assert_eq!(host.outstanding(), 0);
    }
    (
        host.counters().copied_bytes,
        controller.counters().copied_bytes,
    )
}

#[test]
fn data_of_every_size_survives_both_ways() {
    let sizes = [
        512, 1, 4096, 8191, 8192, 8193, 16383, 16384, 20000, 131072, 131073, 262144, 524288, 65536,
        3, 12288,
    ];
    for digests in ALL {
        for sq_flow_control in [false, true] {
            for lazy in [false, true] {
                let rounds = if digests == OFF { 12 } else { 4 };
                round_trip(sq_flow_control, lazy, digests, &sizes, rounds);
            }
        }
    }
}

#[test]
fn data_survives_both_ways_with_any_alignment() {
    let registry = Registry::with_defaults();
    for (of_host, of_controller) in [(128, 4), (4, 128), (72, 68), (68, 72), (100, 20)] {
        for digests in ALL {
            let (mut host, mut controller) = connections(digests);
            let agreed = &mut host.negotiated;
            (agreed.rx_align, agreed.tx_align) = (of_host, of_controller);
            let agreed = &mut controller.negotiated;
            (agreed.rx_align, agreed.tx_align) = (of_controller, of_host);
            let host = registry.open_host(trtype::TCP, params(host, false));
            let controller = registry.open_controller(trtype::TCP, params(controller, false));
            let pairs = (host.unwrap(), controller.unwrap());
            let sizes = [1, 4096, 8192, 8193, 16383, 16384, 20000, 131072, 300_000];
            round_trip_over(pairs, false, &sizes, 4);
        }
    }
}

#[test]
fn transfers_of_128_kib_copy_nothing_on_either_side() {
    for digests in [OFF, HEADER] {
        let copied = round_trip(false, false, digests, &[131072], 64);
        assert_eq!(copied, (0, 0), "{digests:?}");
    }
}

#[test]
fn with_data_digests_the_host_alone_copies_what_it_sends() {
    let sent = 64 * 131072;
    for digests in [DATA, BOTH] {
        let copied = round_trip(false, false, digests, &[131072], 64);
        assert_eq!(copied, (sent, 0), "{digests:?}");
    }
}

#[test]
fn a_peer_that_speaks_nonsense_is_told_once_and_left() {
    let registry = Registry::with_defaults();
    let (host, controller) = connections(OFF);
    let mut peer = host.stream;
    peer.set_nonblocking(false).unwrap();
    peer.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut pair = registry
        .open_controller(trtype::TCP, params(controller, false))
        .unwrap();
    let mut header = [0u8; 24];
    header[0] = 0x05; // A response, which no controller receives.
    header[2] = 24;
    header[4] = 24;
    peer.write_all(&header[..8]).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while pair.ending().is_none() && Instant::now() < deadline {
        step(&mut *pair);
    }
    // The cause can be read by a program.
    let Some(&Ending::Protocol(error)) = pair.ending() else {
        panic!("{:?}", pair.ending())
    };
    assert_eq!((error.fes, error.fei), (Fes::INVALID_HEADER_FIELD, 0));
    let mut answer = Vec::new();
    peer.read_to_end(&mut answer).unwrap();
    // C2HTermReq, FES 1, FEI 0, and the eight bytes that offended.
    assert_eq!(answer[0], 0x03);
    assert_eq!(u16::from_le_bytes([answer[8], answer[9]]), 1);
    assert_eq!(answer[10..14], [0; 4]);
    assert_eq!(answer[24..], header[..8]);
}

/// A connection that passes through the test, which may flip a bit on the way.
struct Tampered {
    near: TcpStream,
    far: TcpStream,
    /// Bytes passed, from the host and from the controller.
    passed: [u64; 2],
    /// Direction (0: from the host) and offset of the byte to flip.
    flip: Option<(usize, u64)>,
}

impl Tampered {
    fn new(registry: &Registry, digests: Digests) -> (Pairs, Self) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let link = || {
            let end = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let other = listener.accept().unwrap().0;
            end.set_nonblocking(true).unwrap();
            other.set_nonblocking(true).unwrap();
            (end, other)
        };
        let (negotiated, _) = negotiate::answer(&negotiate::ic_req(digests)).unwrap();
        let (host, near) = link();
        let (controller, far) = link();
        let of = |stream| params(Connection { stream, negotiated }, false);
        let host = registry.open_host(trtype::TCP, of(host)).unwrap();
        let controller = registry.open_controller(trtype::TCP, of(controller));
        let tampered = Self {
            near,
            far,
            passed: [0, 0],
            flip: None,
        };
        ((host, controller.unwrap()), tampered)
    }

    /// Passes on what has arrived.
    fn pass(&mut self) {
        let Self {
            near,
            far,
            passed,
            flip,
        } = self;
        for (direction, (from, to)) in [(&*near, &*far), (&*far, &*near)].into_iter().enumerate() {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = (&*from).read(&mut bytes) {
                let begin = passed[direction];
                passed[direction] += n as u64;
                if let Some((_, at)) = flip.filter(|&(which, at)| {
                    which == direction && (begin..begin + n as u64).contains(&at)
                }) {
                    bytes[(at - begin) as usize] ^= 0x20;
                    *flip = None;
                }
                to.set_nonblocking(false).unwrap();
                (&*to).write_all(&bytes[..n]).unwrap();
                to.set_nonblocking(true).unwrap();
            }
        }
    }
}

/// Runs one command and returns its status.
fn run(
    (host, controller): &mut Pairs,
    shelf: &mut Shelf,
    link: &mut Tampered,
    sqe: Sqe,
    transfer: Transfer,
) -> Status {
    host.submit(sqe, transfer, 0).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        assert!(Instant::now() < deadline, "no completion");
        step(&mut **host);
        link.pass();
        step(&mut **controller);
        shelf.turn(&mut **controller);
        step(&mut **controller);
        link.pass();
        step(&mut **host);
        assert_eq!((host.ending(), controller.ending()), (None, None));
        if let Some(completion) = host.completion() {
            if let (Transfer::In(sink), true) =
                (completion.transfer, completion.cqe.status().is_success())
            {
                let bytes = sink.into_parts().1.unwrap();
                assert!(bytes == pattern(9, bytes.len()));
            }
            return completion.cqe.status();
        }
    }
}

#[test]
fn a_flipped_bit_of_data_fails_that_command_alone_and_the_queue_goes_on() {
    let registry = Registry::with_defaults();
    // In a capsule, asked for by R2T, and large enough to be received in place.
    for len in [4096usize, 12288, 100_000] {
        for lazy in [false, true] {
            let (mut pairs, mut link) = Tampered::new(&registry, BOTH);
            let mut shelf = Shelf {
                lazy,
                ..Shelf::default()
            };
            let mut write = |link: &mut Tampered| {
                let data = Transfer::Out(MemSource::from_bytes(pattern(9, len)));
                run(&mut pairs, &mut shelf, link, Sqe::new(WRITE, 1), data)
            };
            assert_eq!(write(&mut link), Status::SUCCESS);
            // Capsule header and its digest; then, of H2CData too; then into the payload.
            let headers = if len <= IN_CAPSULE as usize {
                76
            } else {
                76 + 28
            };
            link.flip = Some((0, link.passed[0] + headers + len as u64 / 2));
            assert_eq!(
                write(&mut link),
                Status::TRANSIENT_TRANSPORT,
                "{len}, {lazy}"
            );
            assert_eq!(link.flip, None);
            assert_eq!(write(&mut link), Status::SUCCESS);

            let mut read = |link: &mut Tampered| {
                let sink = Transfer::In(MemSink::from_bytes(vec![0; len]));
                run(&mut pairs, &mut shelf, link, Sqe::new(READ, 1), sink)
            };
            assert_eq!(read(&mut link), Status::SUCCESS);
            link.flip = Some((1, link.passed[1] + 28 + len as u64 / 2));
            assert_eq!(
                read(&mut link),
                Status::TRANSIENT_TRANSPORT,
                "{len}, {lazy}"
            );
            assert_eq!(link.flip, None);
            assert_eq!(read(&mut link), Status::SUCCESS);
        }
    }
}

#[test]
fn a_flipped_bit_of_a_header_ends_the_connection_and_says_why() {
    let registry = Registry::with_defaults();
    let ((mut host, mut controller), mut link) = Tampered::new(&registry, BOTH);
    link.flip = Some((0, 40));
    host.submit(Sqe::new(READ, 1), Transfer::None, 0).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while host.ending().is_none() && Instant::now() < deadline {
        step(&mut *host);
        link.pass();
        step(&mut *controller);
        link.pass();
    }
    let named = |ending: Option<&Ending>| ending.map(ToString::to_string).unwrap_or_default();
    assert!(
        named(controller.ending()).contains("FES 3"),
        "{:?}",
        controller.ending()
    );
    assert!(
        named(host.ending()).contains("FES 3"),
        "{:?}",
        host.ending()
    );
    assert_eq!(
        host.completion().unwrap().cqe.status(),
        Status::ABORTED_BY_HOST
    );
}

#[test]
fn memory_that_changes_while_it_is_sent_never_spoils_its_digest() {
    let registry = Registry::with_defaults();
    let memory: Vec<AtomicU64> = (0..65536).map(AtomicU64::new).collect();
    let stop = AtomicBool::new(false);
    let source = || {
        let base = NonNull::from(&memory[0]).cast();
        // SAFETY: `memory` outlives every source made here, and is only reached through atomics.
        MemSource::from_segments(vec![unsafe { Segment::new(base, 524_288) }])
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for word in &memory {
                    word.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let ((mut host, mut controller), mut shelf) =
            (pairs(&registry, false, DATA), Shelf::default());
        let mut statuses = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(20);
        for _ in 0..20 {
            host.submit(Sqe::new(WRITE, 1), Transfer::Out(source()), 0)
                .unwrap();
        }
        while statuses.len() < 20 && Instant::now() < deadline {
            step(&mut *host);
            step(&mut *controller);
            shelf.turn(&mut *controller);
            step(&mut *controller);
            let done = std::iter::from_fn(|| host.completion());
            statuses.extend(done.map(|done| done.cqe.status()));
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(statuses, [Status::SUCCESS; 20]);
    });
}
