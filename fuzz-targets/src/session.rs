//! A front-end that says anything, with any descriptors, while its rings may run.
//!
//! Whatever comes, the session neither panics nor hangs, keeps no descriptor beyond its end, asks of the worker only
//! what the contract of [`Rings`] allows, and answers in whole messages, in order. As long as message
//! boundaries are kept it goes on: the last thing that it is asked is answered as the first was.

use std::collections::BTreeMap;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::pipe::{PipeFlags, pipe_with};
use vhost_user_blk::{BlkStatus, Device, Queue, QueueUpdate, Request, Rings, Tail, serve};

use crate::guest::{AVAILABLE, DESCRIPTORS, Memory, REGION, REGIONS, USED, USER, options};
use crate::input::Input;
use crate::wire::u32_at;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

const GET_FEATURES: u32 = 1;
/// Largest number of a request that there is, and some more.
const REQUESTS: u8 = 50;

/// Protocol features: what the device offers, but for what is not a block device's.
const PROTOCOL: u64 =
    1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 19 | 1 << 20;
/// Features of virtio that a driver takes: events, indirect tables, protocol features, version 1.
const FEATURES: u64 = 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32;

/// Messages of one program. The replies to so many fit into a socket.
const MAX_STEPS: usize = 100;
/// Nothing takes as long on a machine that works.
const PATIENCE: Duration = Duration::from_secs(20);

/// A ring that runs, and what is in flight.
struct Lane {
    queue: Queue,
    held: Vec<Request>,
}

impl Lane {
    /// Takes all that there is, and answers half of it.
    fn scan(&mut self) {
        while let Ok(Some(request)) = self.queue.take(&mut Vec::new) {
            self.held.push(request);
        }
        let keep = self.held.len() / 2;
        self.finish(keep);
        self.queue.rearm();
    }

    fn finish(&mut self, keep: usize) {
        for Request {
            token, operation, ..
        } in self.held.drain(keep..)
        {
            self.queue.finish(token, &operation, BlkStatus::Ok);
        }
        self.queue.flush();
    }
}

/// Checks what is asked of it.
#[derive(Default)]
struct Worker(Mutex<BTreeMap<usize, Lane>>);

impl Rings for Worker {
    fn start(&self, index: usize, queue: Queue) {
        assert_eq!(queue.index(), index);
        let mut lane = Lane {
            queue,
            held: Vec::new(),
        };
        lane.scan();
        let before = self.0.lock().expect("unpoisoned").insert(index, lane);
        assert!(before.is_none(), "ring {index} was started twice");
    }

    fn update(&self, index: usize, update: QueueUpdate) {
        let mut lanes = self.0.lock().expect("unpoisoned");
        let lane = lanes.get_mut(&index).expect("it is running");
        lane.queue.apply(update);
        lane.scan();
    }

    fn stop(&self, index: usize) -> Option<Queue> {
        let lane = self.0.lock().expect("unpoisoned").remove(&index);
        let mut lane = lane.expect("it is running");
        lane.finish(0);
        assert_eq!(lane.queue.in_flight(), 0);
        Some(lane.queue)
    }

    fn pause(&self, rings: &[usize]) -> Result<Vec<Queue>, String> {
        Ok(rings.iter().filter_map(|&index| self.stop(index)).collect())
    }

    fn region(&self, _tail: Option<Tail>) {
        assert!(self.0.lock().expect("unpoisoned").is_empty());
    }
}

/// Runs what the bytes say.
///
/// # Panics
/// When the session does what it must not.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (reader, writer) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).expect("a pipe");
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    ours.set_read_timeout(Some(PATIENCE)).expect("a time-out");
    let device = Device::new(options(input.bit()));
    let worker = Arc::new(Worker::default());
    let rings = Arc::clone(&worker);
    let session = std::thread::spawn(move || serve(theirs, device, rings));
    let mut program = Program {
        memory: Memory::new(),
        socket: &ours,
        stray: writer.as_fd(),
        whole: true,
        sent: Vec::new(),
    };
    program.begin();
    let mut steps = 0;
    while !input.is_empty() && program.whole && steps < MAX_STEPS {
        program.step(&mut input);
        steps += 1;
    }
    let (whole, sent) = program.end();
    let _ = ours.shutdown(Shutdown::Write);
    let mut replies = Vec::new();
    // A session that gave up leaves unread messages, and the kernel says so.
    let read = (&ours)
        .read_to_end(&mut replies)
        .map_err(|error| error.kind());
    let waited = matches!(read, Err(std::io::ErrorKind::WouldBlock));
    assert!(!waited, "the session hangs");
    let ended = session.join().expect("no panic");
    check(&replies, &sent, whole);
    assert!(ended.is_ok() || !whole, "{ended:?}");
    assert!(worker.0.lock().expect("unpoisoned").is_empty());
    drop(worker);
    // All descriptors that were sent are the same end of this pipe, or memory.
    drop(writer);
    let mut left = [0; 4096];
    let deadline = Instant::now() + PATIENCE;
    loop {
        match rustix::io::read(&reader, &mut left) {
            Ok(0) => break,
            Ok(_) => {}
            // A thread that moves the device's state may be on its way out.
            Err(error) => assert!(Instant::now() < deadline, "a descriptor is open: {error}"),
        }
    }
}

/// The replies are whole, in the order of the requests, and the first and the last say the same.
fn check(mut replies: &[u8], sent: &[u32], whole: bool) {
    let mut sent = sent.iter();
    let mut offers = Vec::new();
    while !replies.is_empty() {
        assert!(replies.len() >= 12, "a reply is cut short");
        let (request, flags) = (u32_at(replies, 0), u32_at(replies, 4));
        let size = u32_at(replies, 8) as usize;
        assert_eq!(flags, VERSION | REPLY);
        assert!(replies.len() >= 12 + size, "a reply is cut short");
        // What could not be made out may be answered as anything.
        assert!(
            !whole || sent.any(|it| *it == request),
            "{request} was not asked"
        );
        if request == GET_FEATURES && size == 8 {
            offers.push(&replies[12..20]);
        }
        replies = &replies[12 + size..];
    }
    assert!(offers.len() >= 2 || !whole, "it has stopped answering");
    // A refusal has a number, too.
    assert!(!whole || offers.first() == offers.last());
}

struct Program<'a> {
    memory: Memory,
    socket: &'a UnixStream,
    /// Sent where a descriptor belongs, and where none does.
    stray: BorrowedFd<'a>,
    /// Message boundaries are kept so far.
    whole: bool,
    sent: Vec<u32>,
}

impl Program<'_> {
    fn send(&mut self, request: u32, flags: u32, size: u32, body: &[u8], files: &[BorrowedFd<'_>]) {
        let header = [request, flags, size].map(u32::to_le_bytes).concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(files)));
        }
        let parts = [IoSlice::new(&header), IoSlice::new(body)];
        // A session that has ended reads nothing.
        let sent = sendmsg(self.socket, &parts, &mut control, SendFlags::NOSIGNAL);
        assert!(sent.is_ok() || !self.whole, "{sent:?}");
        self.sent.push(request);
        self.whole &= size as usize == body.len();
    }

    /// Asks what is asked again at the end; the ring in memory has a request.
    fn begin(&mut self) {
        self.send(GET_FEATURES, VERSION, 0, &[], &[]);
        let flush = [&4_u32.to_le_bytes()[..], &[0; 12]].concat();
        self.memory.write(0x4000, &flush);
        for (index, len, flags) in [(0_u64, 16_u32, 1_u16), (1, 1, 2)] {
            let addr = 0x4000 + 0x1000 * index;
            let tail = [len.to_le_bytes(), [flags as u8, 0, 1, 0]].concat();
            let descriptor = [&addr.to_le_bytes()[..], &tail].concat();
            self.memory.write(DESCRIPTORS + 16 * index, &descriptor);
        }
        self.memory.write(AVAILABLE + 2, &1_u16.to_le_bytes());
    }

    fn end(mut self) -> (bool, Vec<u32>) {
        if self.whole {
            self.send(GET_FEATURES, VERSION, 0, &[], &[]);
        }
        (self.whole, self.sent)
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let choice = input.u8();
        let request = match choice {
            // Most programs get a ring to run this way.
            0..=0x3f => return self.start_ring(input),
            0x40..=0x4f => {
                let index = input.u16();
                return self.memory.write(AVAILABLE + 2, &index.to_le_bytes());
            }
            _ => u32::from(choice % REQUESTS),
        };
        let mut body = self.body(input, request);
        let mut flags = VERSION | if input.bit() { NEED_REPLY } else { 0 };
        let mut size = body.len() as u32;
        match input.u8() {
            0..=0xdf => {}
            0xe0..=0xe7 => flags = input.u32(),
            0xe8..=0xf3 => {
                let len = input.below(300);
                body = input.take(len).to_vec();
                size = body.len() as u32;
            }
            0xf4..=0xf9 => size = input.u32() % 0x2_0000,
            _ => body.truncate(input.below(60)),
        }
        if size as usize != body.len() && input.bit() {
            size = body.len() as u32;
        }
        let files = match (input.u8(), request) {
            (0..=0xdf, 5 | 6 | 12..=14 | 21 | 32 | 37 | 42) => 1,
            (0..=0xdf, _) => 0,
            (0xe0..=0xef, _) => input.below(8),
            _ => 0,
        };
        let memory = self.memory.files();
        let memory: Vec<_> = memory.iter().map(AsFd::as_fd).collect();
        let stray = self.stray;
        let which = input.u8();
        let as_memory = matches!(request, 5 | 6 | 32 | 37 | 42) && which < 0xe0;
        let files: Vec<_> = (0..files)
            .map(|at| if as_memory { memory[at % 3] } else { stray })
            .collect();
        self.send(request, flags, size, &body, &files);
    }

    /// What a front-end sends until a ring runs, all of it right; from any state.
    fn start_ring(&mut self, input: &mut Input<'_>) {
        let ring = u32::from(input.u8() % 5);
        let state = |value: u32| [ring.to_le_bytes(), value.to_le_bytes()].concat();
        let features = FEATURES.to_le_bytes();
        let table = self.table();
        let addresses = addresses(ring);
        let files = self.memory.files();
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let stray = [self.stray];
        let index = u64::from(ring).to_le_bytes();
        let choice = input.u8();
        let all: [(u32, &[u8], &[BorrowedFd<'_>]); 9] = [
            (15, &[], &[]),
            (16, &PROTOCOL.to_le_bytes(), &[]),
            (2, &features, &[]),
            (5, &table, &files),
            (8, &state(16), &[]),
            (9, &addresses, &[]),
            (13, &index, &stray),
            (12, &index, &stray),
            (18, &state(1), &[]),
        ];
        for (at, (request, body, files)) in all.into_iter().enumerate() {
            // One of them may be left out.
            if usize::from(choice) != at {
                self.send(request, VERSION, body.len() as u32, body, files);
            }
        }
    }

    fn table(&self) -> Vec<u8> {
        let mut body = [3_u32, 0].map(u32::to_le_bytes).concat();
        for start in REGIONS {
            body.extend(region(start, REGION, USER + start, 0));
        }
        body
    }

    /// A body as the request has it, with values that are right or nearly so.
    fn body(&mut self, input: &mut Input<'_>, request: u32) -> Vec<u8> {
        let number = |input: &mut Input<'_>| match input.u8() {
            small @ 0..=0xdf => u64::from(small),
            0xe0..=0xef => u64::MAX >> input.below(64),
            _ => u64::from(input.u32()) << 32 | u64::from(input.u32()),
        };
        let any_region = |input: &mut Input<'_>| {
            let start = input.pick(&[0, REGION, REGIONS[2], 0x20_0000, u64::MAX - REGION]);
            let size = input.pick(&[REGION, REGION, REGION, 0, 0x1234, REGION + 1, u64::MAX]);
            let offset = input.pick(&[0, 0, 0, 0x1000, 0x234, u64::MAX]);
            region(start, size, USER.wrapping_add(start), offset)
        };
        match request {
            2 | 16 => {
                let bits = input.pick(&[
                    FEATURES,
                    PROTOCOL,
                    PROTOCOL & !8,
                    FEATURES & !(1 << 30),
                    u64::MAX,
                ]);
                bits.to_le_bytes().to_vec()
            }
            5 => {
                let count = u32::from(input.u8() % 10);
                let mut body = [count, 0].map(u32::to_le_bytes).concat();
                (0..count).for_each(|_| body.extend(any_region(input)));
                body
            }
            8 | 10 | 11 | 18 => {
                let ring = u32::from(input.u8() % 6);
                let value = input.pick(&[0, 1, 16, 15, 256, 32768, 65535, 65536, u32::MAX]);
                [ring, value].map(u32::to_le_bytes).concat()
            }
            9 => {
                let mut body = addresses(u32::from(input.u8() % 6));
                if input.bit() {
                    let at = 8 * (1 + input.below(4));
                    body[at..at + 8].copy_from_slice(&number(input).to_le_bytes());
                }
                body
            }
            12..=14 => {
                let ring = u64::from(input.u8() % 6);
                let nowhere = if input.bit() { 1 << 8 } else { 0 };
                (ring | nowhere).to_le_bytes().to_vec()
            }
            24 | 25 => {
                let (offset, size) = (input.pick(&[0, 0x20, 0x100, 59]), input.pick(&[60, 1, 256]));
                let mut body = [offset, size, 0_u32].map(u32::to_le_bytes).concat();
                body.resize(12 + size as usize, input.u8() & 1);
                body
            }
            31 | 32 => {
                let size = input.pick(&[0, 0x1000, REGION, u64::MAX]);
                let counts = [
                    input.pick(&[1_u16, 4, 0, 300]),
                    input.pick(&[16_u16, 256, 0, 40000]),
                ];
                let counts = counts.map(u16::to_le_bytes).concat();
                [&size.to_le_bytes()[..], &[0; 8], &counts, &[0; 4]].concat()
            }
            6 => {
                let size = input.pick(&[0x1000, 0, 0x24, REGION, 2 * REGION, u64::MAX]);
                [size, input.pick(&[0, 1, u64::MAX])]
                    .map(u64::to_le_bytes)
                    .concat()
            }
            42 => {
                let direction = u32::from(input.u8() % 3);
                [direction, u32::from(input.u8() % 2)]
                    .map(u32::to_le_bytes)
                    .concat()
            }
            37 | 38 => [vec![0; 8], any_region(input)].concat(),
            _ => {
                let len = input.pick(&[0, 0, 8, 40]);
                input.take(len).to_vec()
            }
        }
    }
}

fn region(start: u64, size: u64, user: u64, offset: u64) -> Vec<u8> {
    [start, size, user, offset].map(u64::to_le_bytes).concat()
}

/// The body of a SET_VRING_ADDR. All rings are the same one.
fn addresses(ring: u32) -> Vec<u8> {
    let places = [DESCRIPTORS, USED, AVAILABLE].map(|at| (USER + at).to_le_bytes());
    let head = [ring.to_le_bytes(), [0; 4]].concat();
    [&head[..], &places.concat(), &[0; 8]].concat()
}
