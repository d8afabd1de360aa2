//! A guest that does anything to its ring and its memory, against a plain reading of the same bytes.
//!
//! The input is a program of the guest: descriptors, tables, headers, heads and indices, right or wrong. Whatever
//! the device takes from the ring is what [`crate::reference`] makes of it, and guest memory is changed where
//! the reference says and nowhere else; a ring is broken for the reason that the reference gives, and is not
//! touched any more.

use vhost_user_blk::{BlkStatus, BrokenRing, Operation, Queue, Request, Token};

use crate::guest::{AVAILABLE, DESCRIPTORS, Guest, REGION, REGIONS, USED, options};
use crate::input::Input;
use crate::reference::{Ask, Meaning, Shadow, Span, Terms, meaning};

/// Feature bits that a driver may leave out.
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;
const EVENT_IDX: u64 = 1 << 29;

/// Steps of one program.
const MAX_STEPS: usize = 200;
/// Places for headers, payloads, statuses and indirect tables, some across borders.
const PLACES: [u64; 16] = [
    0x4000,
    0x5000,
    0x6000,
    0x8000,
    0xa000,
    REGION - 8,
    REGION - 256,
    2 * REGION - 16,
    2 * REGION - 512,
    REGIONS[2],
    REGIONS[2] + 0x400,
    REGIONS[2] + REGION - 1,
    AVAILABLE,
    USED,
    DESCRIPTORS,
    u64::MAX - 15,
];
const LENGTHS: [u32; 12] = [16, 1, 512, 1024, 0, 4096, 15, 17, 20, 32, 65536, 100_000];
const KINDS: [u32; 8] = [0, 1, 4, 8, 11, 13, 2, 99];

/// A request that the device took and has not answered.
struct Held {
    token: Token,
    operation: Operation,
    head: u16,
    status: u64,
    /// What is written besides the status when all goes well.
    written: u32,
}

struct Rig {
    guest: Guest,
    queue: Queue,
    shadow: Shadow,
    terms: Terms,
    /// The driver's available index, and the device's.
    offered: u16,
    next: u16,
    /// Indices of the used ring: behind what is staged, and what the guest sees.
    staged: u16,
    published: u16,
    held: Vec<Held>,
    /// Heads that the driver may not use again: their answers are not published. Those that are
    /// staged come first.
    open: Vec<u16>,
    /// Where good requests get their descriptors.
    free: u16,
    broken: bool,
}

/// Runs what the bytes say.
///
/// # Panics
/// When the device does what the reference does not.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut rig = Rig::new(&mut input);
    let mut steps = 0;
    while !input.is_empty() && !rig.broken && steps < MAX_STEPS {
        rig.step(&mut input);
        steps += 1;
    }
    rig.end();
}

impl Rig {
    fn new(input: &mut Input<'_>) -> Self {
        let choice = input.u8();
        let read_only = choice & 0x70 == 0x70;
        let mut without = 0;
        for (bit, feature) in [(1, DISCARD), (2, WRITE_ZEROES), (4, EVENT_IDX)] {
            without |= if choice & bit != 0 { feature } else { 0 };
        }
        let size = input.pick(&[16, 8, 1, 2, 64, 256]);
        let base = input.pick(&[0, 0xffff, 0xfff0, 0x7fff]);
        let options = options(read_only);
        let serial = options.serial;
        let mut guest = Guest::connect(options);
        let mut shadow = Shadow::new();
        for addr in [AVAILABLE + 2, USED + 2] {
            guest.memory.write(addr, &u16::to_le_bytes(base));
            shadow.write(addr, &u16::to_le_bytes(base));
        }
        let (queue, features) = guest.start(size, base, without);
        Self {
            guest,
            queue,
            shadow,
            terms: Terms {
                size,
                read_only,
                discard: features & DISCARD != 0,
                write_zeroes: features & WRITE_ZEROES != 0,
                serial,
            },
            offered: base,
            next: base,
            staged: base,
            published: base,
            held: Vec::new(),
            open: Vec::new(),
            free: 0,
            broken: false,
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 16 {
            0..=3 => self.good_request(input),
            4 | 5 => self.descriptor(input),
            6 => {
                let kind = input.pick(&KINDS);
                let sector = self.sector(input);
                let place = input.pick(&PLACES);
                self.header(place, kind, sector);
            }
            7 => {
                let (sector, place) = (self.sector(input), input.pick(&PLACES));
                self.segment(input, place, sector);
            }
            8 => {
                let head = u16::from(input.u8()) % (self.terms.size + 1);
                self.offer(head);
            }
            9 => {
                let jump = input.pick(&[1, 2, self.terms.size, self.terms.size + 1, 1000]);
                self.offered = self.offered.wrapping_add(jump);
                self.publish();
            }
            10 => {
                let place = input.pick(&PLACES);
                let len = input.below(64);
                let bytes = input.take(len).to_vec();
                self.poke(place, &bytes);
            }
            11 | 12 => self.finish(input),
            13 => self.flush(),
            _ => self.take(),
        }
    }

    /// Writes as the guest, where there is memory.
    fn poke(&mut self, addr: u64, bytes: &[u8]) {
        if Shadow::spans(addr, bytes.len() as u64).is_some() {
            self.guest.memory.write(addr, bytes);
            self.shadow.write(addr, bytes);
        }
    }

    fn sector(&self, input: &mut Input<'_>) -> u64 {
        input.pick(&[
            0,
            8,
            2047,
            1 << 40,
            u64::MAX / 512,
            u64::MAX / 512 - 7,
            u64::MAX,
        ])
    }

    fn header(&mut self, at: u64, kind: u32, sector: u64) {
        self.poke(
            at,
            &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat(),
        );
    }

    fn segment(&mut self, input: &mut Input<'_>, at: u64, sector: u64) {
        let count: u32 = input.pick(&[8, 1, 0, 1000, 1001, 2000, 2001, u32::MAX]);
        let flags: u32 = input.pick(&[0, 0, 0, 1, 2, u32::MAX]);
        let words = [count.to_le_bytes(), flags.to_le_bytes()].concat();
        self.poke(at, &[&sector.to_le_bytes()[..], &words].concat());
    }

    fn write_descriptor(&mut self, at: u64, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.poke(at, &bytes);
    }

    /// Any descriptor, in the ring's table or where an indirect one may be.
    fn descriptor(&mut self, input: &mut Input<'_>) {
        let table = input.pick(&[DESCRIPTORS, DESCRIPTORS, 0x8000, REGION - 256, REGIONS[2]]);
        let index = u16::from(input.u8()) % self.terms.size.min(64);
        let addr = match input.u8() {
            0..=0xcf => input.pick(&PLACES),
            0xd0..=0xef => u64::from(input.u32() % (2 * REGION as u32)),
            _ => u64::from(input.u32()) << 32 | u64::from(input.u32()),
        };
        let len = match input.u8() {
            0..=0xdf => input.pick(&LENGTHS),
            0xe0..=0xef => 16 * u32::from(input.u8()),
            _ => input.u32(),
        };
        let flags = match input.u8() {
            flags @ 0..=0xef => u16::from(flags) & 7,
            _ => input.u16(),
        };
        let next = u16::from(input.u8()) % (self.terms.size + 1);
        let at = table + 16 * u64::from(index);
        self.write_descriptor(at, (addr, len, flags, next));
    }

    /// A request as a driver makes one, or nearly.
    fn good_request(&mut self, input: &mut Input<'_>) {
        let size = self.terms.size;
        if size < 4 {
            return self.descriptor(input);
        }
        let (kind, sector) = (input.pick(&KINDS), self.sector(input));
        let slot = u64::from(self.free % 64);
        let (head_at, status_at) = (0xc000 + 32 * slot, 0xd000 + slot);
        self.header(head_at, kind, sector);
        self.poke(status_at, &[0xaa]);
        let indirect = input.bit();
        let (table, first, wrap) = match indirect {
            true => (0x8000 + 0x100 * (slot % 16), 0, u16::MAX),
            false => (DESCRIPTORS, self.free % size, size),
        };
        let writable = if matches!(kind, 0 | 8) { 2 } else { 0 };
        let mut buffers = vec![(head_at, 16, 0)];
        for _ in 0..input.below(3) {
            let (addr, len) = (input.pick(&PLACES), input.pick(&LENGTHS));
            buffers.push((addr, len, writable));
        }
        buffers.push((status_at, 1, 2));
        let count = buffers.len() as u16;
        for (at, (addr, len, flags)) in (0..count).zip(buffers) {
            let (index, next) = ((first + at) % wrap, (first + at + 1) % wrap);
            let flags = flags | u16::from(at + 1 < count);
            let place = table + 16 * u64::from(index);
            self.write_descriptor(place, (addr, len, flags, next));
        }
        let head = self.free % size;
        if indirect {
            let whole = (table, 16 * u32::from(count), 4, 0);
            self.write_descriptor(DESCRIPTORS + 16 * u64::from(head), whole);
        }
        self.free = self.free.wrapping_add(if indirect { 1 } else { count });
        self.offer(head);
    }

    fn offer(&mut self, head: u16) {
        let slot = u64::from(self.offered % self.terms.size);
        self.poke(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        self.publish();
    }

    fn publish(&mut self) {
        self.poke(AVAILABLE + 2, &self.offered.to_le_bytes());
    }

    /// Takes one request, as the reference says that there is one.
    fn take(&mut self) {
        let taken = self.queue.take(&mut Vec::new);
        self.excuse();
        loop {
            let waiting = self.shadow.u16(AVAILABLE + 2).wrapping_sub(self.next);
            let full = self.open.len() >= usize::from(self.terms.size);
            if waiting > self.terms.size || waiting > 0 && full {
                return self.is_broken(taken, BrokenRing::TooManyAvailable);
            }
            if waiting == 0 {
                assert!(matches!(taken, Ok(None)), "{taken:?}, and there is nothing");
                return self.compare();
            }
            let slot = u64::from(self.next % self.terms.size);
            let head = self.shadow.u16(AVAILABLE + 4 + 2 * slot);
            self.next = self.next.wrapping_add(1);
            if self.open.contains(&head) {
                return self.is_broken(taken, BrokenRing::HeadInFlight { head });
            }
            self.open.push(head);
            match meaning(&self.shadow, &self.terms, head) {
                Err(reason) => return self.is_broken(taken, reason),
                Ok(Meaning::Answered(status, at, pieces)) => {
                    let mut written = 1;
                    for (span, bytes) in pieces {
                        written += bytes.len() as u32;
                        self.shadow.scatter(&[span], &bytes);
                    }
                    self.shadow.write(at, &[status]);
                    self.stage(head, written);
                }
                Ok(Meaning::Asks(ask, at)) => {
                    let request = taken.expect("a whole ring").expect("a request");
                    self.begin(request, &ask, head, at);
                    return self.compare();
                }
            }
        }
    }

    fn is_broken(&mut self, taken: Result<Option<Request>, BrokenRing>, reason: BrokenRing) {
        assert_eq!(taken.err(), Some(reason));
        assert_eq!(self.queue.broken(), Some(reason));
        self.broken = true;
    }

    /// Compares a request with what it should be, and has its data moved.
    fn begin(&mut self, request: Request, ask: &Ask, head: u16, status: u64) {
        let mut written = 1;
        let mut operation = request.operation;
        match (&mut operation, ask) {
            (Operation::Read { sector, sink }, Ask::Read(from, spans)) => {
                assert_eq!(sector, from);
                assert_eq!(sink.len(), total(spans));
                let byte = 0x80 | head as u8;
                sink.fill(0..sink.len(), byte).expect("all of it");
                self.shadow.fill(spans, byte);
                written += sink.len() as u32;
            }
            (Operation::Write { sector, source, .. }, Ask::Write(to, spans)) => {
                assert_eq!(sector, to);
                assert_eq!(source.len(), total(spans));
                let mut at = 0;
                let mut bytes = vec![0; REGION as usize];
                for span in spans {
                    let expected = self.shadow.bytes(span);
                    let bytes = &mut bytes[..expected.len()];
                    source.copy_to(at, bytes).expect("inside");
                    assert!(bytes == expected, "other bytes at {at}");
                    at += expected.len();
                }
            }
            (Operation::Flush, Ask::Flush) => {}
            (Operation::Discard(ranges), Ask::Discard(expected))
            | (Operation::WriteZeroes { ranges, .. }, Ask::WriteZeroes(expected)) => {
                assert_eq!(&ranges[..], &expected[..]);
            }
            (operation, ask) => panic!("{operation:?}, not {ask:?}"),
        }
        self.held.push(Held {
            token: request.token,
            operation,
            head,
            status,
            written,
        });
        assert_eq!(self.queue.in_flight(), self.held.len());
        assert_eq!(self.queue.next_avail(), self.next);
    }

    fn stage(&mut self, head: u16, len: u32) {
        let slot = u64::from(self.staged % self.terms.size);
        let element = [u32::from(head).to_le_bytes(), len.to_le_bytes()].concat();
        self.shadow.write(USED + 4 + 8 * slot, &element);
        self.staged = self.staged.wrapping_add(1);
        let at = self.open.iter().rposition(|open| *open == head);
        let open = self.open.remove(at.expect("it was taken"));
        self.open.insert(0, open);
    }

    /// Finishes one of the requests that are held.
    fn finish(&mut self, input: &mut Input<'_>) {
        let choice = input.u8();
        if self.held.is_empty() {
            return;
        }
        let at = usize::from(choice / 4) % self.held.len();
        let held = self.held.swap_remove(at);
        let (status, byte) = match choice % 4 {
            0 | 1 => (BlkStatus::Ok, 0),
            2 => (BlkStatus::IoError, 1),
            _ => (BlkStatus::Unsupported, 2),
        };
        self.queue.finish(held.token, &held.operation, status);
        self.shadow.write(held.status, &[byte]);
        self.stage(held.head, if byte == 0 { held.written } else { 1 });
        self.compare();
    }

    fn flush(&mut self) {
        let news = self.staged != self.published;
        let called = self.queue.flush();
        assert!(news || !called, "a call without news");
        if news {
            self.shadow.write(USED + 2, &self.staged.to_le_bytes());
            let batch = self.staged.wrapping_sub(self.published);
            self.open.drain(..usize::from(batch));
            self.published = self.staged;
        }
        let more = self.queue.rearm();
        let waiting = self.shadow.u16(AVAILABLE + 2) != self.next;
        assert_eq!(
            more, waiting,
            "it would sleep over requests, or never sleep"
        );
        self.compare();
    }

    /// How the device asks for kicks is its own affair.
    fn excuse(&mut self) {
        let mut asks = [0; 2];
        for addr in [USED, USED + 4 + 8 * u64::from(self.terms.size)] {
            self.guest.memory.read(addr, &mut asks);
            self.shadow.write(addr, &asks);
        }
    }

    /// Guest memory is as the reference has it.
    fn compare(&mut self) {
        self.excuse();
        let mut bytes = vec![0; REGION as usize];
        for (start, expected) in REGIONS.iter().zip(&self.shadow.0) {
            self.guest.memory.read(*start, &mut bytes);
            if bytes != *expected {
                let wrong = bytes.iter().zip(expected).position(|(is, must)| is != must);
                panic!("guest memory differs at {start:#x} + {wrong:#x?}");
            }
        }
    }

    /// All that is held is finished. A broken ring is not written to, and says again why it is broken.
    fn end(mut self) {
        if self.broken {
            for (start, copy) in REGIONS.iter().zip(&mut self.shadow.0) {
                self.guest.memory.read(*start, copy);
            }
            let reason = self.queue.broken().expect("it is broken");
            for held in self.held.drain(..) {
                self.queue
                    .finish(held.token, &held.operation, BlkStatus::Ok);
            }
            assert!(!self.queue.flush() && !self.queue.rearm());
            assert_eq!(self.queue.take(&mut Vec::new).err(), Some(reason));
            self.compare();
        }
        while !self.held.is_empty() {
            self.finish(&mut Input::new(&[]));
        }
        if !self.broken {
            self.flush();
        }
        assert_eq!(self.queue.in_flight(), 0);
        drop(self.queue);
        self.guest.leave();
    }
}

fn total(spans: &[Span]) -> usize {
    spans.iter().map(Span::len).sum()
}
