//! The controller's end of a loopback connection.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use memdesc::{MemSink, MemSource};

use super::Connection;
use super::exchange::{Answer, Exchange, Submission, acknowledge, hand_over, wake};
use crate::spec::fabrics::SQHD_FLOW_DISABLED;
use crate::spec::opcode::nvm;
use crate::spec::{Cqe, Sqe, Status};
use crate::transport::registry::Lease;
use crate::transport::{
    Command, CommandTag, ControllerEvent, ControllerQueuePair, Counters, Ending, Interest,
    QueuePair, QueueParams, Ready, Transfer,
};

/// The memory of a command.
#[derive(Debug)]
enum Memory {
    /// With us.
    Here(Transfer),
    /// Lent, with the answer once there is one.
    Lent(Option<Cqe>),
    /// Home: the host has abandoned the command.
    Gone,
}

/// A command that was given out and not completed.
#[derive(Debug)]
struct Slot {
    memory: Memory,
    /// Success without all of its data is not to be believed.
    needs_data: bool,
    /// The host has abandoned the command.
    abandoned: bool,
    len: u32,
    /// Bytes that were copied in order, or lent.
    moved: u32,
}

/// See the module.
pub(super) struct LoopbackController {
    exchange: Arc<Exchange>,
    wake: UnixStream,
    slots: Vec<Option<Slot>>,
    /// Commands that were not given out.
    commands: VecDeque<Submission>,
    /// Copies that are over.
    events: VecDeque<ControllerEvent>,
    /// Answers since the last flush.
    queued: Vec<Answer>,
    ending: Option<Ending>,
    coupled: bool,
    admin: bool,
    sq_flow_control: bool,
    queue_size: u32,
    head: u32,
    copied_bytes: u64,
    _lease: Lease,
}

fn outstanding(slots: &mut [Option<Slot>], tag: CommandTag) -> Option<&mut Slot> {
    slots.get_mut(usize::from(tag.0))?.as_mut()
}

impl LoopbackController {
    pub(super) fn new(params: QueueParams<Connection>) -> Self {
        let Connection { exchange, wake } = params.connection;
        Self {
            exchange,
            wake,
            slots: Vec::new(),
            commands: VecDeque::new(),
            events: VecDeque::new(),
            queued: Vec::new(),
            ending: None,
            coupled: false,
            admin: params.admin,
            sq_flow_control: params.sq_flow_control,
            queue_size: params.queue_size.clamp(2, 65536),
            head: 0,
            copied_bytes: 0,
            _lease: params.lease,
        }
    }

    /// Gives a command out.
    fn begin(&mut self, submission: Submission) -> Command {
        let Submission { cid, sqe, transfer } = submission;
        let index = usize::from(cid);
        if index >= self.slots.len() {
            self.slots.resize_with(index + 1, || None);
        }
        // The host's end refused what is longer.
        let len = u32::try_from(transfer.len()).unwrap_or(u32::MAX);
        self.slots[index] = Some(Slot {
            needs_data: self.needs_data(&sqe, &transfer),
            abandoned: false,
            memory: Memory::Here(transfer),
            len,
            moved: 0,
        });
        self.head = (self.head + 1) % self.queue_size;
        Command {
            tag: CommandTag(cid),
            sqe,
            data_len: len,
        }
    }

    fn needs_data(&self, sqe: &Sqe, transfer: &Transfer) -> bool {
        match transfer {
            Transfer::None => false,
            Transfer::In(_) => true,
            Transfer::Out(_) => !self.admin && sqe.opcode == nvm::WRITE,
        }
    }

    /// Lets go of commands that the host has abandoned; of memory that is lent, when it is back.
    fn let_go(&mut self, abandoned: &[u16]) {
        for &cid in abandoned {
            let waiting = self.commands.iter().position(|here| here.cid == cid);
            if let Some(Submission { transfer, .. }) =
                waiting.and_then(|at| self.commands.remove(at))
            {
                self.give_up(cid, 0, transfer, true);
            } else if let Some(slot) = outstanding(&mut self.slots, CommandTag(cid)) {
                slot.abandoned = true;
                self.send_memory_home(cid);
            }
        }
    }

    /// Gives the memory of an abandoned command back while the command itself goes on.
    fn send_memory_home(&mut self, cid: u16) {
        if let Some(slot) = outstanding(&mut self.slots, CommandTag(cid))
            && let Memory::Here(transfer) = &mut slot.memory
        {
            let (transfer, moved) = (std::mem::take(transfer), slot.moved);
            slot.memory = Memory::Gone;
            self.give_up(cid, moved, transfer, false);
        }
    }

    /// Reports an abandoned command; `last` when nothing will be done about it any more.
    fn give_up(&mut self, cid: u16, moved: u32, transfer: Transfer, last: bool) {
        self.queued.push(Answer {
            cid,
            cqe: Cqe::new(cid, Status::ABORTED_BY_HOST),
            sqhd_valid: false,
            transferred: moved,
            transfer,
            last,
        });
    }

    /// Sends a command home.
    fn answer(&mut self, cid: u16, mut cqe: Cqe, moved: u32, transfer: Transfer) {
        cqe.cid = cid.into();
        cqe.sqhd = match self.sq_flow_control {
            true => (self.head as u16).into(),
            false => SQHD_FLOW_DISABLED.into(),
        };
        self.queued.push(Answer {
            cid,
            cqe,
            sqhd_valid: self.ending.is_none(),
            transferred: moved,
            transfer,
            last: true,
        });
    }

    /// Ends, once: what is held goes home, what was lent follows.
    fn finish(&mut self, ending: Ending) {
        if self.ending.is_some() {
            return;
        }
        self.ending = Some(ending);
        let lost = Cqe::new(0, Status::ABORTED_BY_HOST);
        while let Some(Submission { cid, transfer, .. }) = self.commands.pop_front() {
            self.answer(cid, lost, 0, transfer);
        }
        for cid in 0..self.slots.len() {
            match self.slots[cid].take() {
                None => {}
                Some(
                    slot @ Slot {
                        memory: Memory::Lent(Some(_)),
                        ..
                    },
                ) => {
                    self.slots[cid] = Some(slot);
                }
                Some(
                    slot @ Slot {
                        memory: Memory::Lent(None),
                        ..
                    },
                ) => {
                    let memory = Memory::Lent(Some(lost));
                    self.slots[cid] = Some(Slot { memory, ..slot });
                }
                Some(Slot {
                    memory: Memory::Here(transfer),
                    ..
                }) => {
                    self.answer(cid as u16, lost, 0, transfer);
                }
                Some(Slot {
                    memory: Memory::Gone,
                    ..
                }) => self.answer(cid as u16, lost, 0, Transfer::None),
            }
        }
        self.exchange.lock().controller_over = true;
        self.hand_over();
        wake(&self.wake);
    }

    fn hand_over(&mut self) {
        if self.queued.is_empty() {
            return;
        }
        let mut state = self.exchange.lock();
        let first = hand_over(&mut self.queued, &mut state.answers);
        state.copied_bytes = self.copied_bytes;
        drop(state);
        if first && !self.coupled {
            wake(&self.wake);
        }
    }
}

impl QueuePair for LoopbackController {
    fn interest(&self) -> Interest<'_> {
        Interest {
            fd: self.wake.as_fd(),
            readable: true,
            writable: false,
        }
    }

    fn progress(&mut self, ready: &mut Ready) -> bool {
        if std::mem::take(&mut ready.readable) && !self.coupled {
            acknowledge(&self.wake);
        }
        if self.ending.is_some() {
            // What the host still hands over, it takes back itself.
            self.hand_over();
            return false;
        }
        let Self {
            exchange, commands, ..
        } = self;
        let mut state = exchange.lock();
        let abandoned = std::mem::take(&mut state.abandoned);
        commands.extend(state.commands.drain(..));
        self.coupled = state.coupled;
        let over = state.host_over;
        drop(state);
        self.let_go(&abandoned);
        if over {
            self.finish(Ending::Closed);
        }
        self.hand_over();
        false
    }

    fn flush(&mut self, _ready: &mut Ready) -> bool {
        self.hand_over();
        false
    }

    fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    fn end(&mut self) {
        self.finish(Ending::Local);
    }

    fn counters(&self) -> Counters {
        Counters {
            copied_bytes: self.copied_bytes,
            ..Counters::default()
        }
    }
}

impl ControllerQueuePair for LoopbackController {
    fn event(&mut self) -> Option<ControllerEvent> {
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
        let submission = self.commands.pop_front()?;
        Some(ControllerEvent::Command(self.begin(submission)))
    }

    fn fetch(
        &mut self,
        tag: CommandTag,
        offset: u32,
        mut sink: MemSink,
    ) -> Result<(), (MemSink, Status)> {
        let Self {
            exchange, slots, ..
        } = self;
        let Some(slot) = outstanding(slots, tag) else {
            return Err((sink, Status::INTERNAL_ERROR));
        };
        let source = match &slot.memory {
            Memory::Here(Transfer::Out(source)) => source,
            Memory::Gone => return Err((sink, Status::DATA_TRANSFER_ERROR)),
            _ => return Err((sink, Status::DATA_SGL_LENGTH_INVALID)),
        };
        // While this is held, the host's end is there, and so is its memory.
        let state = exchange.lock();
        if state.host_over {
            return Err((sink, Status::DATA_TRANSFER_ERROR));
        }
        let len = sink.len();
        if memdesc::copy(source, offset as usize, &mut sink, 0, len).is_err() {
            return Err((sink, Status::DATA_SGL_LENGTH_INVALID));
        }
        drop(state);
        // It fits, so it is below 4 GiB.
        slot.moved = slot.moved.max(offset + len as u32);
        self.copied_bytes += len as u64;
        self.events.push_back(ControllerEvent::Fetched {
            tag,
            sink,
            result: Ok(()),
            transferred: len as u32,
        });
        Ok(())
    }

    fn send(
        &mut self,
        tag: CommandTag,
        offset: u32,
        source: MemSource,
        _last: bool,
    ) -> Result<(), (MemSource, Status)> {
        let Self {
            exchange, slots, ..
        } = self;
        let Some(slot) = outstanding(slots, tag) else {
            return Err((source, Status::INTERNAL_ERROR));
        };
        let sink = match &mut slot.memory {
            Memory::Here(Transfer::In(sink)) => sink,
            Memory::Gone => {
                self.events.push_back(ControllerEvent::Sent {
                    tag,
                    source,
                    transferred: 0,
                });
                return Ok(());
            }
            _ => return Err((source, Status::DATA_SGL_LENGTH_INVALID)),
        };
        if offset != slot.moved {
            return Err((source, Status::INTERNAL_ERROR));
        }
        // As in `fetch`.
        let state = exchange.lock();
        if state.host_over {
            return Err((source, Status::DATA_TRANSFER_ERROR));
        }
        let len = source.len();
        if memdesc::copy(&source, 0, sink, offset as usize, len).is_err() {
            return Err((source, Status::INVALID_FIELD));
        }
        drop(state);
        slot.moved += len as u32;
        self.copied_bytes += len as u64;
        self.events.push_back(ControllerEvent::Sent {
            tag,
            source,
            transferred: len as u32,
        });
        Ok(())
    }

    fn lend(&mut self, tag: CommandTag) -> Option<Transfer> {
        if !self.coupled || self.ending.is_some() {
            return None;
        }
        let slot = outstanding(&mut self.slots, tag)?;
        match &mut slot.memory {
            Memory::Here(Transfer::None) | Memory::Lent(_) | Memory::Gone => None,
            Memory::Here(_) if slot.moved > 0 => None,
            Memory::Here(transfer) => {
                let lent = std::mem::take(transfer);
                slot.memory = Memory::Lent(None);
                Some(lent)
            }
        }
    }

    fn restore(&mut self, tag: CommandTag, lent: Transfer) {
        let Some(slot) = outstanding(&mut self.slots, tag) else {
            return;
        };
        let Memory::Lent(answer) = &mut slot.memory else {
            return;
        };
        let answer = answer.take();
        slot.memory = Memory::Here(lent);
        slot.moved = slot.len;
        let abandoned = slot.abandoned;
        if let Some(cqe) = answer {
            self.respond(tag, cqe);
        } else if abandoned {
            self.send_memory_home(tag.0);
        }
    }

    fn respond(&mut self, tag: CommandTag, mut cqe: Cqe) {
        let Some(place) = self.slots.get_mut(usize::from(tag.0)) else {
            return;
        };
        match place.take() {
            None => {}
            Some(
                mut slot @ Slot {
                    memory: Memory::Lent(_),
                    ..
                },
            ) => {
                if let Memory::Lent(answer @ None) = &mut slot.memory {
                    *answer = Some(cqe);
                }
                *place = Some(slot);
            }
            Some(Slot {
                memory: Memory::Here(transfer),
                needs_data,
                len,
                moved,
                ..
            }) => {
                if cqe.status().is_success() && needs_data && moved < len {
                    cqe.status = Status::DATA_TRANSFER_ERROR.to_wire().into();
                }
                self.answer(tag.0, cqe, moved, transfer);
            }
            Some(Slot {
                memory: Memory::Gone,
                ..
            }) => self.answer(tag.0, cqe, 0, Transfer::None),
        }
    }

    fn outstanding(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    fn set_sq_flow_control(&mut self, on: bool, queue_size: u32) {
        self.sq_flow_control = on;
        self.queue_size = queue_size.clamp(2, 65536);
        self.head %= self.queue_size;
    }
}

impl Drop for LoopbackController {
    fn drop(&mut self) {
        self.finish(Ending::Local);
        self.hand_over();
    }
}
