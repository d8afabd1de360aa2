//! A target lane: one controller-role I/O queue pair ⇄ the backends of its subsystem.
//!
//! A command goes through these stages; memory backends skip those in brackets, since the transport
//! reads and writes their memory in place. Where the transport lends the host's own memory, a read or
//! write is the backend's alone, and the memory is restored before the answer:
//!
//! ```text
//! Read:  [wait for a buffer] → [backend] → send → respond
//! Write: [wait for a buffer] → fetch → [backend] → respond
//! Compare: wait for two buffers → fetch → backend → compare → respond
//! Deallocate: wait for a buffer → fetch ranges → check all → backend, one range after another → respond
//! Flush, Write Zeroes: backend → respond
//! ```

use std::collections::VecDeque;
use std::future::Future;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;

use memdesc::{MemSink, MemSource};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::association::Membership;
use super::buffers::Buffers;
use super::compare::Compare;
use super::io::{self, Action, Plan, RANGE_LEN};
use super::ranges::Ranges;
use super::subsystem::Subsystem;
use super::{Limits, Target, Totals};
use crate::backend::{Backend, BackendIo, BackendOp, Done};
use crate::spec::{Cqe, Status};
use crate::transport::{
    Command, CommandTag, ControllerEvent, ControllerQueuePair, Counters, Lane, Ready, Transfer,
    Turn,
};

/// Events that one turn takes from the queue pair.
const EVENTS_PER_TURN: usize = 128;

/// A command in work.
#[derive(Debug)]
struct Slot {
    plan: Plan,
    /// What is still to be deallocated.
    ranges: Option<Ranges>,
    /// The memory of a Compare.
    compare: Option<Compare>,
    /// The backend works on the host's memory.
    lent: bool,
}

/// See the module. Made by [`super::Port`] for each I/O queue whose Connect was accepted.
pub struct TargetLane {
    /// Before the queue pair: it may refer to memory that the pair has lent.
    io: BackendIo,
    /// Before the subsystem: it may refer to the memory of backends.
    pair: Box<dyn ControllerQueuePair>,
    subsystem: Arc<Subsystem>,
    membership: Membership,
    ending: Option<oneshot::Receiver<()>>,
    limits: Limits,
    totals: Arc<Totals>,
    /// What the pair had counted when it was handed over: the Connect.
    before: Counters,
    slots: Vec<Option<Slot>>,
    buffers: Buffers,
    /// Commands that need a buffer, in order of arrival.
    waiting: VecDeque<CommandTag>,
    _permit: OwnedSemaphorePermit,
}

/// What a lane is made of; crosses to the worker's thread.
pub(super) struct Parts {
    pub(super) pair: Box<dyn ControllerQueuePair>,
    pub(super) subsystem: Arc<Subsystem>,
    pub(super) membership: Membership,
    pub(super) queue_size: u32,
    pub(super) permit: OwnedSemaphorePermit,
}

impl TargetLane {
    /// To be called on the worker's thread.
    pub(super) fn new(parts: Parts, target: &Target) -> Self {
        let Parts {
            pair,
            subsystem,
            mut membership,
            queue_size,
            permit,
        } = parts;
        let before = pair.counters();
        let mut slots = Vec::new();
        slots.resize_with(queue_size as usize, || None);
        Self {
            pair,
            io: BackendIo::new(target.limits.engine),
            subsystem,
            ending: membership.take_ending(),
            membership,
            limits: target.limits.clone(),
            totals: Arc::clone(&target.totals),
            before,
            slots,
            buffers: Buffers::new(target.limits.lane_buffers),
            waiting: VecDeque::with_capacity(queue_size as usize),
            _permit: permit,
        }
    }

    fn backend(subsystem: &Subsystem, namespace: usize) -> &Arc<dyn Backend> {
        subsystem.namespaces()[namespace].backend()
    }

    /// Takes a bounded number of events. True when there may be more.
    fn events(&mut self) -> bool {
        let mut commands = false;
        let mut more = true;
        for _ in 0..EVENTS_PER_TURN {
            match self.pair.event() {
                None => {
                    more = false;
                    break;
                }
                Some(ControllerEvent::Command(command)) => {
                    commands = true;
                    self.command(command);
                }
                Some(ControllerEvent::Fetched {
                    tag, sink, result, ..
                }) => {
                    self.fetched(tag, sink, result);
                }
                Some(ControllerEvent::Sent { source, .. }) => {
                    self.buffers.give_back_source(source);
                }
            }
        }
        if commands {
            self.membership.association().mark();
        }
        more
    }

    fn command(&mut self, command: Command) {
        let Command { tag, sqe, data_len } = command;
        let plan = match io::plan(&sqe, data_len, &self.subsystem, &self.limits) {
            Ok(plan) => plan,
            Err(status) => return self.pair.respond(tag, Cqe::new(0, status)),
        };
        let index = usize::from(tag.0);
        if index >= self.slots.len() {
            // A transport may have more slots than the queue has entries; never more than 65536.
            self.slots.resize_with(index + 1, || None);
        }
        self.slots[index] = Some(Slot {
            plan,
            ranges: None,
            compare: None,
            lent: false,
        });
        match plan.action {
            Action::Read { .. }
            | Action::Write { .. }
            | Action::Compare { .. }
            | Action::Deallocate { .. } => {
                let started = self.lent(tag, plan)
                    || self.in_place(tag, plan)
                    || (self.waiting.is_empty() && self.staged(tag, plan));
                if !started {
                    self.waiting.push_back(tag);
                }
            }
            Action::Flush => self.submit(tag, plan.namespace, BackendOp::Flush),
            Action::WriteZeroes {
                offset,
                len,
                may_unmap,
                fua,
            } => {
                let op = BackendOp::WriteZeroes {
                    offset,
                    len,
                    may_unmap,
                    fua,
                };
                self.submit(tag, plan.namespace, op);
            }
            Action::Nothing => self.respond(tag, Ok(())),
            Action::Disconnect => {
                // The host may connect the queue again as soon as it sees the answer.
                self.membership.leave();
                self.respond(tag, Ok(()));
                // The answer leaves before the connection ends.
                self.pair.flush(&mut Ready {
                    readable: false,
                    writable: true,
                });
                self.pair.end();
            }
        }
    }

    /// Has the backend fill or store the host's own memory, where the transport lends it.
    fn lent(&mut self, tag: CommandTag, plan: Plan) -> bool {
        let (Action::Read { .. } | Action::Write { .. }) = plan.action else {
            return false;
        };
        let Some(memory) = self.pair.lend(tag) else {
            return false;
        };
        let op = match (plan.action, memory) {
            (Action::Read { offset, .. }, Transfer::In(sink)) => BackendOp::Read { offset, sink },
            (Action::Write { offset, fua, .. }, Transfer::Out(source)) => BackendOp::Write {
                offset,
                source,
                fua,
            },
            (_, memory) => {
                // Data that goes the other way than the command says.
                self.pair.restore(tag, memory);
                self.respond(tag, Err(Status::INVALID_FIELD.do_not_retry()));
                return true;
            }
        };
        if let Some(slot) = &mut self.slots[usize::from(tag.0)] {
            slot.lent = true;
        }
        self.submit(tag, plan.namespace, op);
        true
    }

    /// Serves a command from the backend's own memory, where it has that.
    fn in_place(&mut self, tag: CommandTag, plan: Plan) -> bool {
        let backend = Self::backend(&self.subsystem, plan.namespace);
        match plan.action {
            Action::Read { offset, len } => {
                let mut list = self.buffers.list();
                let Some(source) = backend.source(offset, len as usize, &mut list) else {
                    self.buffers.give_back_list(list);
                    return false;
                };
                backend.counters().count_read(u64::from(len));
                self.send(tag, source);
                true
            }
            Action::Write { offset, len, .. } => {
                let mut list = self.buffers.list();
                let Some(sink) = backend.sink(offset, len as usize, &mut list) else {
                    self.buffers.give_back_list(list);
                    return false;
                };
                self.fetch(tag, sink);
                true
            }
            _ => false,
        }
    }

    /// Begins to serve a command through a buffer. False when there is none now.
    fn staged(&mut self, tag: CommandTag, plan: Plan) -> bool {
        let len = match plan.action {
            Action::Read { len, .. } | Action::Write { len, .. } => len as usize,
            Action::Deallocate { ranges } => usize::from(ranges) * RANGE_LEN,
            Action::Compare { len, .. } => return self.staged_compare(tag, len as usize),
            _ => return true,
        };
        let Some(sink) = self.buffers.sink(len) else {
            return false;
        };
        match plan.action {
            Action::Read { offset, .. } => {
                self.submit(tag, plan.namespace, BackendOp::Read { offset, sink });
            }
            _ => self.fetch(tag, sink),
        }
        true
    }

    /// Begins a Compare, which takes two buffers. False when they are not there now.
    fn staged_compare(&mut self, tag: CommandTag, len: usize) -> bool {
        let Some((compare, sink)) = Compare::new(len, &mut self.buffers) else {
            return false;
        };
        if let Some(Some(slot)) = self.slots.get_mut(usize::from(tag.0)) {
            slot.compare = Some(compare);
        }
        self.fetch(tag, sink);
        true
    }

    /// Goes on with commands that wait for buffers.
    fn wake_waiting(&mut self) {
        while let Some(&tag) = self.waiting.front() {
            let slot = self.slots.get(usize::from(tag.0)).and_then(Option::as_ref);
            if let Some(plan) = slot.map(|slot| slot.plan)
                && !self.staged(tag, plan)
            {
                return;
            }
            self.waiting.pop_front();
        }
    }

    fn fetch(&mut self, tag: CommandTag, sink: MemSink) {
        if let Err((sink, status)) = self.pair.fetch(tag, 0, sink) {
            self.buffers.give_back(Transfer::In(sink));
            self.respond(tag, Err(status));
        }
    }

    fn submit(&mut self, tag: CommandTag, namespace: usize, op: BackendOp) {
        Self::backend(&self.subsystem, namespace).submit(&mut self.io, op, u32::from(tag.0));
    }

    /// Sends the data of a read, and answers it.
    fn send(&mut self, tag: CommandTag, source: MemSource) {
        match self.pair.send(tag, 0, source, true) {
            Ok(()) => self.respond(tag, Ok(())),
            Err((source, status)) => {
                self.buffers.give_back_source(source);
                self.respond(tag, Err(status));
            }
        }
    }

    fn respond(&mut self, tag: CommandTag, result: Result<(), Status>) {
        let slot = self.slots.get_mut(usize::from(tag.0));
        if let Some(Slot {
            ranges, compare, ..
        }) = slot.and_then(Option::take)
        {
            if let Some(ranges) = ranges {
                self.buffers.give_back_source(ranges.into_source());
            }
            if let Some(compare) = compare {
                compare.end(&mut self.buffers);
            }
        }
        let status = result.err().unwrap_or(Status::SUCCESS);
        self.pair.respond(tag, Cqe::new(0, status));
    }

    fn fetched(&mut self, tag: CommandTag, sink: MemSink, result: Result<(), Status>) {
        let slot = self.slots.get_mut(usize::from(tag.0));
        let Some(slot) = slot.and_then(Option::as_mut) else {
            return self.buffers.give_back(Transfer::In(sink));
        };
        if let Err(status) = result {
            self.buffers.give_back(Transfer::In(sink));
            return self.respond(tag, Err(status));
        }
        let Plan { namespace, action } = slot.plan;
        match action {
            Action::Write { offset, len, fua } => {
                let backend = Self::backend(&self.subsystem, namespace);
                // A staged write's sink owns its memory; one in place is over now.
                let (list, bytes) = sink.into_parts();
                let Some(bytes) = bytes else {
                    backend.counters().count_write(u64::from(len), fua);
                    let empty = MemSource::from_segments(list);
                    self.buffers.give_back_source(empty);
                    return self.respond(tag, Ok(()));
                };
                let source = MemSource::from_bytes_with(bytes, list);
                let op = BackendOp::Write {
                    offset,
                    source,
                    fua,
                };
                self.submit(tag, namespace, op);
            }
            Action::Deallocate { ranges } => {
                let ranges = Ranges::new(sink.into_source(), ranges);
                let geometry = Self::backend(&self.subsystem, namespace).geometry();
                let all_inside = ranges.all_inside(&geometry);
                slot.ranges = Some(ranges);
                if all_inside {
                    self.next_range(tag);
                } else {
                    self.respond(tag, Err(Status::LBA_OUT_OF_RANGE.do_not_retry()));
                }
            }
            Action::Compare { offset, .. } => {
                let compare = slot.compare.as_mut();
                let room = compare.and_then(|compare| compare.keep(sink.into_source()));
                match room {
                    Some(sink) => {
                        let read = BackendOp::Read { offset, sink };
                        let backend = Self::backend(&self.subsystem, namespace);
                        backend.submit_for_compare(&mut self.io, read, u32::from(tag.0));
                    }
                    None => self.respond(tag, Err(Status::INTERNAL_ERROR)),
                }
            }
            _ => {
                self.buffers.give_back(Transfer::In(sink));
                self.respond(tag, Err(Status::INTERNAL_ERROR));
            }
        }
    }

    /// Deallocates the next range of a command, or ends it.
    fn next_range(&mut self, tag: CommandTag) {
        let slot = self.slots.get_mut(usize::from(tag.0));
        let Some(Slot { plan, ranges, .. }) = slot.and_then(Option::as_mut) else {
            return;
        };
        let namespace = plan.namespace;
        let geometry = Self::backend(&self.subsystem, namespace).geometry();
        match ranges.as_mut().and_then(|ranges| ranges.next(&geometry)) {
            Some((offset, len)) => {
                self.submit(tag, namespace, BackendOp::Deallocate { offset, len });
            }
            None => self.respond(tag, Ok(())),
        }
    }

    /// Compares what the backend read with what the host sent.
    fn compare(&mut self, tag: CommandTag, stored: MemSink) {
        let stored = stored.into_source();
        let slot = self.slots.get(usize::from(tag.0)).and_then(Option::as_ref);
        let compare = slot.and_then(|slot| slot.compare.as_ref());
        let verdict = match compare {
            Some(compare) => compare.verdict(&stored),
            None => Err(Status::INTERNAL_ERROR),
        };
        self.buffers.give_back_source(stored);
        self.respond(tag, verdict);
    }

    /// Takes everything that the backends have done, and starts what that makes possible.
    fn backend_done(&mut self) {
        while let Some(Done {
            token,
            transfer,
            result,
        }) = self.io.done()
        {
            let tag = CommandTag(token as u16);
            let slot = self.slots.get(usize::from(tag.0)).and_then(Option::as_ref);
            if slot.is_some_and(|slot| slot.lent) {
                self.pair.restore(tag, transfer);
                self.respond(tag, result);
                continue;
            }
            let action = slot.map(|slot| slot.plan.action);
            match (action, transfer, result) {
                (Some(Action::Read { .. }), Transfer::In(sink), Ok(())) => {
                    self.send(tag, sink.into_source());
                }
                (Some(Action::Deallocate { .. }), _, Ok(())) => self.next_range(tag),
                (Some(Action::Compare { .. }), Transfer::In(stored), Ok(())) => {
                    self.compare(tag, stored);
                }
                (_, transfer, result) => {
                    self.buffers.give_back(transfer);
                    self.respond(tag, result);
                }
            }
        }
    }
}

impl Lane for TargetLane {
    fn generation(&self) -> u64 {
        self.io.generation()
    }

    fn descriptors<'a>(&'a self, out: &mut Vec<BorrowedFd<'a>>) {
        out.push(self.pair.interest().fd);
        out.extend(self.io.descriptor());
    }

    fn writes(&self, index: usize) -> bool {
        index == 0
    }

    fn wants_write(&self, index: usize) -> bool {
        index == 0 && self.pair.interest().writable
    }

    fn poll_mailbox(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(ending) = &mut self.ending else {
            return false;
        };
        if Pin::new(ending).poll(cx).is_pending() {
            return false;
        }
        self.ending = None;
        self.pair.end();
        true
    }

    fn turn(&mut self, ready: &mut [Ready]) -> Turn {
        let mut unwatched = Ready::default();
        let (pair_ready, io_ready) = match ready {
            [] => return Turn::Idle,
            [pair] => (pair, &mut unwatched),
            [pair, io, ..] => (pair, io),
        };
        let mut again = false;
        if self.pair.ending().is_none() {
            again |= self.pair.progress(pair_ready);
        }
        self.io.acknowledge(io_ready);
        self.backend_done();
        self.wake_waiting();
        again |= self.events();
        // One call starts everything that this turn submitted; what ends at once is answered in
        // this turn.
        again |= self.io.flush();
        self.backend_done();
        again |= self.pair.flush(pair_ready);
        if self.waiting.is_empty() {
            again |= self.io.flush();
        } else {
            // What was sent gives its buffers back. What that makes possible, and was done at once, no
            // descriptor announces: it is answered in the next turn.
            again |= self.events();
            self.wake_waiting();
            again |= self.io.flush();
            again |= self.pair.flush(pair_ready);
            again |= self.io.has_done();
        }
        if self.pair.ending().is_none() {
            return if again { Turn::Again } else { Turn::Idle };
        }
        self.waiting.clear();
        let more = self.events();
        // What is held back would be answered to nobody.
        self.io.abandon();
        self.backend_done();
        match (self.io.flush() || more, self.io.in_flight()) {
            (true, _) => Turn::Again,
            (false, 0) => Turn::Ended,
            (false, _) => Turn::Idle,
        }
    }
}

#[cfg(feature = "sim")]
impl TargetLane {
    /// How the queue pair ended.
    pub(super) fn ending(&self) -> Option<&crate::transport::Ending> {
        self.pair.ending()
    }
}

impl TargetLane {
    /// Waits for every operation on lent memory, and gives that back.
    fn restore_all(&mut self) {
        self.io.abandon();
        self.backend_done();
        while self.slots.iter().flatten().any(|slot| slot.lent) && self.io.in_flight() > 0 {
            self.io.wait();
            self.backend_done();
        }
    }
}

impl Drop for TargetLane {
    fn drop(&mut self) {
        self.restore_all();
        let (all, before) = (self.pair.counters(), self.before);
        let counters = Counters {
            copied_bytes: all.copied_bytes - before.copied_bytes,
            sends: all.sends - before.sends,
            receives: all.receives - before.receives,
        };
        self.totals.add(counters);
        let association = self.membership.association();
        tracing::debug!(
            cntlid = association.cntlid(),
            qid = self.membership.qid(),
            ending = self.pair.ending().map(tracing::field::display),
            copied_bytes = counters.copied_bytes,
            sends = counters.sends,
            receives = counters.receives,
            "I/O queue ended"
        );
    }
}
