//! The engine under both roles: receives through a staging buffer with a direct tail, and sends
//! batches of PDUs with one system call each. Data digests are folded here, as payload is placed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use memdesc::{MemSink, MemSource};

use super::super::{Counters, Ending, Interest, Ready};
use super::copies::{Copies, PrivateCopy};
use super::socket::Socket;
use super::syscall::{MAX_VECTORS, Storage};
use crate::tcp::{DIGEST_LEN, Digests, FatalError, QPair, Role, TxPayload, TxPdu, Want, crc32c};

/// Transfers of at least this many bytes are received straight into their memory, headers read
/// apart from payload; smaller ones go through the staging buffer.
const DIRECT_MIN: usize = 16 * 1024;
/// Staging buffer: what one call receives of headers and small payloads.
const STAGING_LEN: usize = 64 * 1024;
/// Header bytes that are asked for behind a direct payload, digests apart: every PDU that a host
/// receives has exactly so many, and every PDU that a controller receives at least so many.
const NEXT_HEADER: usize = 24;
/// Bytes gathered for one call that sends.
const SEND_MAX: usize = 2 * 1024 * 1024;
/// Calls that one turn may make in each direction before others get theirs.
const CALLS_PER_TURN: usize = 16;

thread_local! {
    /// Staging belongs to the thread: a pair holds one only while bytes are in it.
    static STAGING: RefCell<Vec<Box<[u8; STAGING_LEN]>>> = const { RefCell::new(Vec::new()) };
}

/// A command's memory, by slot: what the engine asks its role for.
pub(super) trait Memory {
    /// Where received payload goes.
    fn sink(&mut self, slot: u16) -> Target<'_>;
    /// Bytes of payload were placed where [`Memory::sink`] said.
    fn placed(&mut self, slot: u16, bytes: usize);
    /// Where sent payload comes from, and the command offset of its first byte.
    fn source(&self, slot: u16) -> Option<(&MemSource, u32)>;
    /// The kernel has all of a piece.
    fn sent(&mut self, payload: TxPayload);
    /// Outstanding transfers of [`DIRECT_MIN`] bytes and more that will be received.
    fn large_expected(&self) -> usize;
    /// What is sent may change on its way, by the hand of somebody who is not to suffer for it: so a
    /// digest is taken of a private copy. Otherwise it is taken in place where that is cheaper.
    const MAY_CHANGE: bool;
}

/// See [`Memory::sink`].
pub(super) enum Target<'a> {
    /// The memory, and the command offset of its first byte.
    Sink(&'a mut MemSink, u32),
    /// Nobody wants it.
    Discard,
}

/// True when a transfer of this length is received directly.
pub(super) fn is_large(len: usize) -> bool {
    len >= DIRECT_MIN
}

/// A socket, its machine, and what is between them.
pub(super) struct Stream<R> {
    socket: Socket,
    pub(super) machine: QPair<R>,
    staging: Option<Box<[u8; STAGING_LEN]>>,
    start: usize,
    end: usize,
    digests: Digests,
    /// CRC32C of what was received of the current payload, when data digests are on.
    received_crc: u32,
    batch: VecDeque<Queued>,
    /// Bytes of the first PDU of the batch that are gone.
    front_sent: usize,
    copies: Copies,
    storage: Storage,
    blocked: bool,
    ending: Option<Ending>,
    counters: Counters,
}

/// A PDU that waits to be sent.
struct Queued {
    pdu: TxPdu,
    data: Data,
}

/// The payload of a PDU that waits to be sent, if it has one.
enum Data {
    /// It stays where it is.
    InPlace,
    /// Likewise, and this follows it.
    Digested([u8; DIGEST_LEN]),
    /// It was copied, with its digest.
    Copied(PrivateCopy),
}

enum Pump {
    /// All staged bytes are used.
    Drained,
    /// The consumer must be asked.
    Paused,
}

impl<R: Role> Stream<R> {
    pub(super) fn new(socket: Socket, machine: QPair<R>) -> Self {
        let digests = machine.limits().digests;
        Self {
            socket,
            machine,
            digests,
            received_crc: 0,
            staging: None,
            start: 0,
            end: 0,
            batch: VecDeque::with_capacity(64),
            front_sent: 0,
            copies: Copies::default(),
            storage: Storage::default(),
            blocked: false,
            ending: None,
            counters: Counters::default(),
        }
    }

    pub(super) fn interest(&self) -> Interest<'_> {
        Interest {
            fd: self.fd(),
            readable: true,
            writable: self.blocked,
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.fd()
    }

    pub(super) fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    /// Bytes copied by the role itself, to be counted with ours.
    pub(super) fn count_copied(&mut self, bytes: usize) {
        self.counters.copied_bytes += bytes as u64;
    }

    /// Ends the stream: nothing is sent or received any more. The first cause stays.
    pub(super) fn end(&mut self, cause: Ending) {
        if self.ending.is_none() {
            self.stop(cause);
            // The peer learns at once; an error means that it knows already.
            let _ = self.socket.shutdown();
        }
    }

    fn stop(&mut self, cause: Ending) {
        self.ending = Some(cause);
        self.machine.silence();
        self.batch.clear();
        self.copies.clear();
        self.release_staging(true);
    }

    /// Moves bytes both ways, a bounded amount. True when more can be moved at once.
    pub(super) fn progress(&mut self, memory: &mut impl Memory, ready: &mut Ready) -> bool {
        let unsent = self.flush(memory, ready);
        for _ in 0..CALLS_PER_TURN {
            if self.ending.is_some() {
                return false;
            }
            if let Pump::Paused = self.pump(memory) {
                return true;
            }
            if self.ending.is_some() || !ready.readable {
                return unsent && self.ending.is_none();
            }
            self.receive(memory, ready);
        }
        if let Pump::Paused = self.pump(memory) {
            return true;
        }
        unsent || ready.readable
    }

    /// Uses staged bytes until there are none or the consumer must be asked.
    fn pump(&mut self, memory: &mut impl Memory) -> Pump {
        while self.start < self.end && self.ending.is_none() {
            let Some(staging) = self.staging.as_ref() else {
                break;
            };
            let bytes = &staging[self.start..self.end];
            match self.machine.want() {
                Want::Header(_) => match self.machine.feed(bytes) {
                    Ok(used) => {
                        self.start += used;
                        self.received_crc = 0;
                        self.check_terminated();
                    }
                    Err(error) => return self.fault(memory, error),
                },
                Want::Payload { slot, offset, len } => {
                    let take = bytes.len().min(len as usize);
                    if self.digests.data {
                        self.received_crc = crc32c(self.received_crc, &bytes[..take]);
                    }
                    match memory.sink(slot) {
                        Target::Discard => {}
                        Target::Sink(sink, base) => {
                            let at = offset.saturating_sub(base) as usize;
                            // The machine checked the range against the command's length.
                            let copied = sink.copy_from(at, &bytes[..take]);
                            debug_assert!(copied.is_ok());
                            self.counters.copied_bytes += take as u64;
                            memory.placed(slot, take);
                        }
                    }
                    self.start += take;
                    self.machine.payload_moved(take as u32);
                }
                Want::Discard(len) => {
                    let take = bytes.len().min(len as usize);
                    self.start += take;
                    self.machine.payload_moved(take as u32);
                }
                Want::DataDigest(_) => {
                    self.start += self.machine.digest(bytes, self.received_crc);
                }
                Want::Consumer => return Pump::Paused,
                Want::Nothing => self.start = self.end,
            }
        }
        self.release_staging(false);
        if self.machine.want() == Want::Consumer {
            Pump::Paused
        } else {
            Pump::Drained
        }
    }

    /// Continues with what is staged after the consumer took what there was.
    pub(super) fn resume(&mut self, memory: &mut impl Memory) {
        self.pump(memory);
    }

    /// True when staged bytes wait for the consumer.
    pub(super) fn has_staged(&self) -> bool {
        self.start < self.end
    }

    fn release_staging(&mut self, all: bool) {
        if all || self.start == self.end {
            (self.start, self.end) = (0, 0);
            if let Some(staging) = self.staging.take() {
                STAGING.with_borrow_mut(|pool| {
                    if pool.len() < 4 {
                        pool.push(staging);
                    }
                });
            }
        }
    }

    /// One call: payload straight to where it belongs, what follows to the staging buffer, which
    /// is empty.
    fn receive(&mut self, memory: &mut impl Memory, ready: &mut Ready) {
        let large = memory.large_expected() > 0;
        let want = self.machine.want();
        let mut staging = self.staging.take().unwrap_or_else(|| {
            let pooled = STAGING.with_borrow_mut(Vec::pop);
            pooled.unwrap_or_else(|| Box::new([0; STAGING_LEN]))
        });
        let mut scatter = self.storage.scatter();
        let mut direct = 0;
        let mut tail = true;
        if let Want::Payload { slot, offset, len } = want {
            match memory.sink(slot) {
                Target::Sink(sink, base) => {
                    let at = offset.saturating_sub(base) as usize;
                    tail = scatter.sink(sink, at..at + len as usize);
                    direct = scatter.len();
                }
                Target::Discard => {}
            }
        }
        let digest_len = |on: bool| if on { DIGEST_LEN } else { 0 };
        let next_header = NEXT_HEADER + digest_len(self.digests.header);
        let staged_max = match want {
            _ if !tail => 0,
            Want::Header(needed) if large => needed.clamp(next_header, STAGING_LEN),
            Want::Payload { .. } if large && direct > 0 => {
                digest_len(self.digests.data) + next_header
            }
            Want::DataDigest(needed) if large => needed + next_header,
            _ => STAGING_LEN,
        };
        if staged_max > 0 {
            scatter.bytes(&mut staging[..staged_max]);
        }
        let asked = scatter.len();
        let result = self.socket.receive(scatter);
        self.staging = Some(staging);
        self.counters.receives += 1;
        match result {
            Ok(0) => self.end_of_stream(),
            Ok(received) => {
                // Fewer than asked: the socket is empty, and more will be announced.
                ready.readable = received == asked;
                let placed = received.min(direct);
                if placed > 0 {
                    self.digest_placed(memory, want, placed);
                    if let Want::Payload { slot, .. } = want {
                        memory.placed(slot, placed);
                    }
                    self.machine.payload_moved(placed as u32);
                }
                (self.start, self.end) = (0, received - placed);
                self.release_staging(false);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ready.readable = false;
                self.release_staging(false);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => self.end(Ending::Lost(error.to_string())),
        }
    }

    /// Folds what the kernel has just written to a sink, which is still in the caches.
    fn digest_placed(&mut self, memory: &mut impl Memory, want: Want, placed: usize) {
        if !self.digests.data {
            return;
        }
        if let Want::Payload { slot, offset, .. } = want
            && let Target::Sink(sink, base) = memory.sink(slot)
        {
            let at = offset.saturating_sub(base) as usize;
            let crc = sink.crc32c(at..at + placed, self.received_crc);
            // The machine checked the range against the command's length.
            debug_assert!(crc.is_ok());
            self.received_crc = crc.unwrap_or(!self.received_crc);
        }
    }

    fn end_of_stream(&mut self) {
        let cause = if self.machine.at_boundary() {
            Ending::Closed
        } else {
            Ending::Lost("closed in the middle of a PDU".to_owned())
        };
        self.end(cause);
    }

    fn check_terminated(&mut self) {
        if let Some(term) = self.machine.terminated() {
            self.end(term.map_or(Ending::Garbled, Ending::Terminated));
        }
    }

    /// The peer broke the protocol: tell it once, and end. The connection itself ends when the peer
    /// has read that, or in its time.
    fn fault(&mut self, memory: &impl Memory, error: FatalError) -> Pump {
        let last_words = self.last_words(memory);
        self.stop(Ending::Protocol(error));
        self.socket.part(last_words);
        Pump::Drained
    }

    /// The rest of the PDU that the kernel has a part of, so that the peer finds what follows; and the
    /// termination request. What else was to be sent is not.
    fn last_words(&mut self, memory: &impl Memory) -> Vec<u8> {
        let mut bytes = Vec::new();
        let begun = self.batch.front().filter(|_| self.front_sent > 0);
        if let Some(Queued { pdu, data }) = begun {
            bytes.extend_from_slice(pdu.header());
            if let Data::Copied(copy) = data {
                bytes.extend_from_slice(self.copies.bytes(*copy));
            } else if let Some(payload) = pdu.payload {
                let start = bytes.len();
                bytes.resize(start + payload.len as usize, 0);
                let Some((source, base)) = memory.source(payload.slot) else {
                    return Vec::new();
                };
                let at = payload.offset.saturating_sub(base) as usize;
                if source.copy_to(at, &mut bytes[start..]).is_err() {
                    return Vec::new();
                }
                if let Data::Digested(digest) = data {
                    bytes.extend_from_slice(digest);
                }
            }
            bytes.drain(..self.front_sent.min(bytes.len()));
        }
        if let Some(term) = self.machine.transmit() {
            bytes.extend_from_slice(term.header());
        }
        bytes
    }

    /// Sends what the machine has, batch by batch, until there is nothing or the socket is full.
    /// True when it stopped before that: the socket has room, and will not say so again.
    pub(super) fn flush(&mut self, memory: &mut impl Memory, ready: &mut Ready) -> bool {
        if self.blocked && !ready.writable {
            return false;
        }
        self.blocked = false;
        for _ in 0..CALLS_PER_TURN {
            if self.ending.is_some() || !self.fill(memory) {
                return false;
            }
            match self.send(memory) {
                Ok(true) => {}
                Ok(false) => {
                    // Not all was taken: the socket says when there is room.
                    self.blocked = true;
                    ready.writable = false;
                    return false;
                }
                Err(error) => {
                    self.end(Ending::Lost(error.to_string()));
                    return false;
                }
            }
        }
        self.fill(memory)
    }

    /// Takes PDUs from the machine up to what one call sends; false when there is nothing to send.
    fn fill(&mut self, memory: &impl Memory) -> bool {
        let mut bytes: usize = self.batch.iter().map(|queued| queued.pdu.wire_len()).sum();
        while bytes < SEND_MAX && self.batch.len() < MAX_VECTORS / 2 {
            let Some(pdu) = self.machine.transmit() else {
                break;
            };
            bytes += pdu.wire_len();
            let data = match pdu.payload {
                Some(payload) if pdu.data_digest => {
                    let Some(data) = self.digested(memory, payload) else {
                        self.end(Ending::Lost("data to be sent is not there".to_owned()));
                        return false;
                    };
                    data
                }
                _ => Data::InPlace,
            };
            self.batch.push_back(Queued { pdu, data });
        }
        !self.batch.is_empty()
    }

    /// Takes the digest of a payload: small ones are copied with it, so that many go with few vectors.
    fn digested<M: Memory>(&mut self, memory: &M, payload: TxPayload) -> Option<Data> {
        let TxPayload { slot, offset, len } = payload;
        let (source, base) = memory.source(slot)?;
        let at = offset.saturating_sub(base) as usize;
        let len = len as usize;
        if !M::MAY_CHANGE && is_large(len) {
            let digest = source.crc32c(at..at + len, 0).ok()?;
            return Some(Data::Digested(digest.to_le_bytes()));
        }
        let copy = self.copies.copy(source, at, len).ok()?;
        self.counters.copied_bytes += len as u64;
        Some(Data::Copied(copy))
    }

    /// One call. True when the kernel took all that was gathered.
    fn send(&mut self, memory: &mut impl Memory) -> io::Result<bool> {
        let mut gather = self.storage.gather();
        let mut skip = self.front_sent;
        for Queued { pdu, data } in &self.batch {
            if gather.room() < 3 {
                break;
            }
            let header = pdu.header();
            gather.bytes(&header[skip.min(header.len())..]);
            skip = skip.saturating_sub(header.len());
            if let Data::Copied(copy) = data {
                let bytes = self.copies.bytes(*copy);
                gather.bytes(&bytes[skip.min(bytes.len())..]);
            } else if let Some(payload) = pdu.payload {
                let Some((source, base)) = memory.source(payload.slot) else {
                    break;
                };
                let at = payload.offset.saturating_sub(base) as usize;
                let len = payload.len as usize;
                if !gather.source(source, at + skip.min(len)..at + len) || gather.room() == 0 {
                    break;
                }
                if let Data::Digested(digest) = data {
                    gather.bytes(&digest[skip.saturating_sub(len)..]);
                }
            }
            skip = 0;
        }
        let gathered = gather.len();
        self.counters.sends += 1;
        let mut sent = match self.socket.send(gather) {
            Ok(sent) => sent,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(error) => return Err(error),
        };
        let all = sent == gathered;
        while let Some(front) = self.batch.front() {
            let left = front.pdu.wire_len() - self.front_sent;
            if sent < left {
                self.front_sent += sent;
                break;
            }
            sent -= left;
            self.front_sent = 0;
            if let Data::Copied(copy) = front.data {
                self.copies.release(copy);
            }
            if let Some(payload) = front.pdu.payload {
                self.machine.transmitted(payload);
                memory.sent(payload);
            }
            self.batch.pop_front();
        }
        Ok(all)
    }
}

impl<R> Drop for Stream<R> {
    fn drop(&mut self) {
        if let Some(staging) = self.staging.take() {
            // The thread may be ending, its pool gone: then the buffer is simply freed.
            let _ = STAGING.try_with(|pool| pool.borrow_mut().push(staging));
        }
    }
}
