//! The controller's queue pair over TCP.

use std::collections::VecDeque;

use memdesc::{MemSink, MemSource};

use super::super::registry::Lease;
use super::super::{
    Command, CommandTag, ControllerEvent, ControllerQueuePair, Counters, Ending, Interest,
    QueuePair, QueueParams, Ready,
};
use super::Connection;
use super::socket::Socket;
use super::stream::{Memory, Stream, Target, is_large};
use crate::spec::{Cqe, Status};
use crate::tcp::{self, Answered, Controller, FetchError, QPair, SendError, TxPayload};

/// In-capsule data of a command, from its arrival to its fetch.
#[derive(Default)]
enum InCapsule {
    /// The command has none, or it was fetched.
    #[default]
    None,
    /// The consumer may fetch it in place.
    Offered,
    /// It goes, or went, into memory of ours.
    Kept(MemSink),
    /// All of it is in memory of ours.
    Arrived(Vec<u8>),
    /// Its digest did not match: every fetch of it fails.
    Corrupt,
}

#[derive(Default)]
struct Slot {
    data_len: u32,
    in_capsule: InCapsule,
    /// Where a fetch goes, and its first byte as an offset into the command's data.
    sink: Option<(MemSink, u32)>,
    /// Bytes that were placed there.
    placed: usize,
    /// A fetch from kept in-capsule data that has not all arrived.
    waiting: Option<(MemSink, u32)>,
    /// Where a send comes from, its first byte, and how much of it the kernel has.
    source: Option<(MemSource, u32)>,
    source_sent: usize,
}

struct Memories {
    slots: Vec<Slot>,
    large_expected: usize,
    done: VecDeque<ControllerEvent>,
}

/// See the module.
pub(super) struct TcpController {
    stream: Stream<Controller>,
    memory: Memories,
    _lease: Lease,
}

impl TcpController {
    pub(super) fn new<S: Into<Socket>>(params: QueueParams<Connection<S>>) -> Self {
        let negotiated = &params.connection.negotiated;
        let limits = negotiated.limits(params.in_capsule_limit, params.admin);
        let machine = QPair::controller(params.queue_size, params.sq_flow_control, limits);
        let mut pair = Self {
            stream: Stream::new(params.connection.stream.into(), machine),
            memory: Memories {
                slots: Vec::new(),
                large_expected: 0,
                done: VecDeque::new(),
            },
            _lease: params.lease,
        };
        pair.memory.resize(params.queue_size);
        pair
    }

    /// All of a fetch has arrived: hands the sink over, or keeps unclaimed in-capsule data.
    fn fetched(&mut self, tag: u16, intact: bool) -> Option<ControllerEvent> {
        let slot = self.memory.slots.get_mut(usize::from(tag))?;
        if let Some((sink, _)) = slot.sink.take() {
            if is_large(sink.len()) {
                self.memory.large_expected -= 1;
            }
            let result = if intact {
                Ok(())
            } else {
                Err(Status::TRANSIENT_TRANSPORT)
            };
            return Some(fetched(tag, sink, result, slot.placed));
        }
        if let InCapsule::Kept(sink) = std::mem::take(&mut slot.in_capsule) {
            let bytes = sink.into_parts().1.unwrap_or_default();
            let waiting = slot.waiting.take();
            slot.in_capsule = if intact {
                InCapsule::Arrived(bytes)
            } else {
                InCapsule::Corrupt
            };
            if let Some((sink, offset)) = waiting {
                let copied = self.memory.copy_kept(tag, sink, offset);
                self.stream.count_copied(copied);
            }
        }
        None
    }

    /// The connection has ended: gives back what the consumer lent.
    fn release_lent(&mut self) {
        if self.stream.ending().is_none() {
            return;
        }
        for (index, slot) in self.memory.slots.iter_mut().enumerate() {
            let tag = index as u16;
            let lent = [(slot.sink.take(), slot.placed), (slot.waiting.take(), 0)];
            for (lent, placed) in lent {
                if let Some((sink, _)) = lent {
                    let over = fetched(tag, sink, Err(Status::DATA_TRANSFER_ERROR), placed);
                    self.memory.done.push_back(over);
                }
            }
            if let Some((source, _)) = slot.source.take() {
                self.memory.done.push_back(ControllerEvent::Sent {
                    tag: CommandTag(tag),
                    source,
                    transferred: slot.source_sent as u32,
                });
            }
        }
        self.memory.large_expected = 0;
    }
}

fn fetched(
    tag: u16,
    sink: MemSink,
    result: Result<(), Status>,
    transferred: usize,
) -> ControllerEvent {
    ControllerEvent::Fetched {
        tag: CommandTag(tag),
        sink,
        result,
        // Within a length of 32 bits.
        transferred: transferred as u32,
    }
}

impl Memories {
    fn resize(&mut self, queue_size: u32) {
        let depth = queue_size.clamp(2, 65536) as usize;
        if depth > self.slots.len() {
            self.slots.resize_with(depth, Slot::default);
            self.done.reserve(depth);
        }
    }

    /// Gives back what a command that was answered would have fetched into: what still comes is
    /// discarded.
    fn give_up_fetch(&mut self, tag: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(tag)) else {
            return;
        };
        slot.in_capsule = InCapsule::None;
        if let Some((sink, _)) = slot.sink.take() {
            if is_large(sink.len()) {
                self.large_expected -= 1;
            }
            let given_up = fetched(tag, sink, Err(Status::DATA_TRANSFER_ERROR), slot.placed);
            self.done.push_back(given_up);
        }
        if let Some((sink, _)) = slot.waiting.take() {
            let given_up = fetched(tag, sink, Err(Status::DATA_TRANSFER_ERROR), 0);
            self.done.push_back(given_up);
        }
    }

    /// Copies kept in-capsule data into a sink and reports the fetch; returns the bytes copied.
    fn copy_kept(&mut self, tag: u16, mut sink: MemSink, offset: u32) -> usize {
        let bytes = match self
            .slots
            .get(usize::from(tag))
            .map(|slot| &slot.in_capsule)
        {
            Some(InCapsule::Arrived(bytes)) => bytes,
            kept => {
                let status = match kept {
                    Some(InCapsule::Corrupt) => Status::TRANSIENT_TRANSPORT,
                    _ => Status::INTERNAL_ERROR,
                };
                self.done.push_back(fetched(tag, sink, Err(status), 0));
                return 0;
            }
        };
        let start = offset as usize;
        let range = bytes.get(start..start.saturating_add(sink.len()));
        let result = match range.map(|range| sink.copy_from(0, range)) {
            Some(Ok(())) => Ok(()),
            _ => Err(Status::DATA_SGL_LENGTH_INVALID),
        };
        let copied = if result.is_ok() { sink.len() } else { 0 };
        self.done.push_back(fetched(tag, sink, result, copied));
        copied
    }
}

impl Memory for Memories {
    /// It is the controller's. Where a backend gives its own memory away to be sent, a write to the same
    /// blocks at the same time may spoil a digest; such a read has no one result anyway, and the host
    /// repeats it.
    const MAY_CHANGE: bool = false;

    fn sink(&mut self, tag: u16) -> Target<'_> {
        let Some(slot) = self.slots.get_mut(usize::from(tag)) else {
            return Target::Discard;
        };
        if let Some((sink, base)) = &mut slot.sink {
            return Target::Sink(sink, *base);
        }
        match &mut slot.in_capsule {
            InCapsule::None | InCapsule::Arrived(_) | InCapsule::Corrupt => Target::Discard,
            kept => {
                if matches!(kept, InCapsule::Offered) {
                    // Not claimed when it could be: keep it until it is fetched.
                    *kept = InCapsule::Kept(MemSink::from_bytes(vec![0; slot.data_len as usize]));
                }
                match kept {
                    InCapsule::Kept(sink) => Target::Sink(sink, 0),
                    _ => Target::Discard,
                }
            }
        }
    }

    fn placed(&mut self, tag: u16, bytes: usize) {
        if let Some(slot) = self.slots.get_mut(usize::from(tag)) {
            slot.placed += bytes;
        }
    }

    fn source(&self, tag: u16) -> Option<(&MemSource, u32)> {
        let (source, base) = self.slots.get(usize::from(tag))?.source.as_ref()?;
        Some((source, *base))
    }

    fn sent(&mut self, payload: TxPayload) {
        let Some(slot) = self.slots.get_mut(usize::from(payload.slot)) else {
            return;
        };
        slot.source_sent += payload.len as usize;
        if slot
            .source
            .as_ref()
            .is_some_and(|(source, _)| slot.source_sent >= source.len())
            && let Some((source, _)) = slot.source.take()
        {
            let tag = CommandTag(payload.slot);
            self.done.push_back(ControllerEvent::Sent {
                tag,
                transferred: slot.source_sent as u32,
                source,
            });
        }
    }

    fn large_expected(&self) -> usize {
        self.large_expected
    }
}

impl QueuePair for TcpController {
    fn interest(&self) -> Interest<'_> {
        self.stream.interest()
    }

    fn progress(&mut self, ready: &mut Ready) -> bool {
        // A peer that sends commands and takes no answers is not read from until it does: either
        // the socket is full, which is waited for, or there is more to send at once.
        if self.stream.machine.backlogged() {
            let unsent = self.stream.flush(&mut self.memory, ready);
            if self.stream.machine.backlogged() || self.stream.ending().is_some() {
                self.release_lent();
                return unsent;
            }
        }
        let more = self.stream.progress(&mut self.memory, ready);
        self.release_lent();
        more
    }

    fn flush(&mut self, ready: &mut Ready) -> bool {
        let more = self.stream.flush(&mut self.memory, ready);
        self.release_lent();
        more
    }

    fn ending(&self) -> Option<&Ending> {
        self.stream.ending()
    }

    fn end(&mut self) {
        self.stream.end(Ending::Local);
        self.release_lent();
    }

    fn counters(&self) -> Counters {
        self.stream.counters()
    }
}

impl ControllerQueuePair for TcpController {
    fn event(&mut self) -> Option<ControllerEvent> {
        loop {
            if let Some(event) = self.memory.done.pop_front() {
                return Some(event);
            }
            match self.stream.machine.event() {
                Some(tcp::ControllerEvent::Command {
                    slot: tag,
                    sqe,
                    data_len,
                    in_capsule,
                }) => {
                    let slot = self.memory.slots.get_mut(usize::from(tag))?;
                    let state = if in_capsule {
                        InCapsule::Offered
                    } else {
                        InCapsule::None
                    };
                    *slot = Slot {
                        data_len,
                        in_capsule: state,
                        ..Slot::default()
                    };
                    return Some(ControllerEvent::Command(Command {
                        tag: CommandTag(tag),
                        sqe,
                        data_len,
                    }));
                }
                Some(tcp::ControllerEvent::Fetched { slot, intact }) => {
                    if let Some(event) = self.fetched(slot, intact) {
                        return Some(event);
                    }
                }
                None if self.stream.has_staged() && self.stream.ending().is_none() => {
                    self.stream.resume(&mut self.memory);
                    self.release_lent();
                }
                None => return None,
            }
        }
    }

    fn fetch(
        &mut self,
        tag: CommandTag,
        offset: u32,
        sink: MemSink,
    ) -> Result<(), (MemSink, Status)> {
        if self.stream.ending().is_some() {
            return Err((sink, Status::DATA_TRANSFER_ERROR));
        }
        let Ok(len) = u32::try_from(sink.len()) else {
            return Err((sink, Status::DATA_SGL_LENGTH_INVALID));
        };
        let Some(slot) = self.memory.slots.get_mut(usize::from(tag.0)) else {
            return Err((sink, Status::INTERNAL_ERROR));
        };
        let fits = offset
            .checked_add(len)
            .is_some_and(|end| end <= slot.data_len);
        if !self.stream.machine.is_outstanding(tag.0) || slot.waiting.is_some() {
            return Err((sink, Status::INTERNAL_ERROR));
        }
        match slot.in_capsule {
            InCapsule::None => {
                if let Err(FetchError(status)) = self.stream.machine.fetch(tag.0, offset, len) {
                    return Err((sink, status));
                }
                if is_large(sink.len()) {
                    self.memory.large_expected += 1;
                }
                slot.sink = Some((sink, offset));
                slot.placed = 0;
            }
            _ if !fits => return Err((sink, Status::DATA_SGL_LENGTH_INVALID)),
            InCapsule::Offered if offset == 0 && len == slot.data_len => {
                slot.in_capsule = InCapsule::None;
                if is_large(sink.len()) {
                    self.memory.large_expected += 1;
                }
                slot.sink = Some((sink, 0));
                slot.placed = 0;
            }
            InCapsule::Offered | InCapsule::Kept(_) => slot.waiting = Some((sink, offset)),
            InCapsule::Arrived(_) | InCapsule::Corrupt => {
                let copied = self.memory.copy_kept(tag.0, sink, offset);
                self.stream.count_copied(copied);
            }
        }
        Ok(())
    }

    fn send(
        &mut self,
        tag: CommandTag,
        offset: u32,
        source: MemSource,
        last: bool,
    ) -> Result<(), (MemSource, Status)> {
        if self.stream.ending().is_some() {
            return Err((source, Status::DATA_TRANSFER_ERROR));
        }
        let Some(slot) = self.memory.slots.get_mut(usize::from(tag.0)) else {
            return Err((source, Status::INTERNAL_ERROR));
        };
        let Ok(len) = u32::try_from(source.len()) else {
            return Err((source, Status::INVALID_FIELD));
        };
        if slot.source.is_some() {
            return Err((source, Status::INTERNAL_ERROR));
        }
        if let Err(SendError(status)) = self.stream.machine.send(tag.0, offset, len, last) {
            return Err((source, status));
        }
        slot.source = Some((source, offset));
        slot.source_sent = 0;
        Ok(())
    }

    fn respond(&mut self, tag: CommandTag, cqe: Cqe) {
        if let Answered::Queued = self.stream.machine.respond(tag.0, cqe) {
            self.memory.give_up_fetch(tag.0);
        }
    }

    fn outstanding(&self) -> usize {
        self.stream.machine.outstanding()
    }

    fn set_sq_flow_control(&mut self, on: bool, queue_size: u32) {
        self.stream.machine.set_queue(queue_size, on);
        self.memory.resize(queue_size);
    }
}
