//! What hosts and controllers may ask of a fabric: queue pairs, capsules and data movement.
//!
//! A queue pair is negotiated and connected on the control plane, then handed to the worker that
//! drives it. It knows no runtime: its owner asks for [`QueuePair::interest`], waits however it
//! likes, and calls [`QueuePair::progress`]. One thread can own many.
//!
//! Contract, for every transport:
//! - A capsule is a call: [`HostQueuePair::submit`] and [`ControllerQueuePair::respond`].
//! - Memory attached to a call is completed exactly once: it comes back in a [`Completion`],
//!   [`ControllerEvent::Fetched`] or [`ControllerEvent::Sent`], with success or not, and never
//!   while the transport or the kernel still refers to it.
//! - Memory that [`ControllerQueuePair::lend`] gave out goes back with
//!   [`ControllerQueuePair::restore`], whatever became of the command, and the command is not
//!   completed before.
//! - A command that is given up with [`HostQueuePair::abandon`] is completed as soon as nothing refers
//!   to its memory, and its CID is not used again before its fate is known.
//! - A queue pair ends once, with its cause in [`QueuePair::ending`]; what was outstanding then is
//!   completed with [`Status::ABORTED_BY_HOST`] (host) or dropped with its buffers returned
//!   (controller).

mod connection;
pub mod drive;
pub mod lane;
pub mod loopback;
pub mod registry;
pub mod tcp;
pub mod watch;

use std::os::fd::BorrowedFd;

use memdesc::{MemSink, MemSource};

use crate::spec::{Cqe, Sqe, Status};
pub use crate::tcp::{FatalError, Fes, TermReq};
pub use lane::{Lane, Turn};
pub use registry::{Connection, Opening, QueueParams, Registry, RegistryError, Transport};

/// What a queue pair (or a lane) waits for.
#[derive(Debug, Clone, Copy)]
pub struct Interest<'a> {
    /// Descriptor to watch.
    pub fd: BorrowedFd<'a>,
    /// Wake when it can be read.
    pub readable: bool,
    /// Wake when it can be written.
    pub writable: bool,
}

/// What is known to be possible on a descriptor. Set by whoever waits; cleared by whoever finds
/// that the descriptor would block. Readiness is edge-triggered: what is not cleared by use must
/// be used again before sleeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ready {
    /// It may have something to read.
    pub readable: bool,
    /// It may take something.
    pub writable: bool,
}

/// Data that goes with a command, by direction.
#[derive(Debug, Default)]
pub enum Transfer {
    /// No data.
    #[default]
    None,
    /// From the host's memory to the controller.
    Out(MemSource),
    /// From the controller into the host's memory.
    In(MemSink),
}

impl Transfer {
    /// Bytes to move.
    pub fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Out(source) => source.len(),
            Self::In(sink) => sink.len(),
        }
    }

    /// True when there is nothing to move.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A command that is outstanding on a host's queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CommandId(pub u16);

/// Why a command was not taken; it comes back as it was.
#[derive(Debug)]
pub struct Rejected {
    /// The data that was to go with it.
    pub transfer: Transfer,
    /// The reason.
    pub reason: RejectedReason,
}

/// See [`Rejected`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RejectedReason {
    /// As many commands are outstanding as the queue allows.
    Full,
    /// The queue pair has ended.
    Ended,
    /// More data than a command can describe (4 GiB).
    TooLong,
}

/// A command that has ended, and whose memory nothing refers to any more.
#[derive(Debug)]
pub struct Completion {
    /// What [`HostQueuePair::submit`] was given.
    pub token: u64,
    /// The completion entry. Its status is not success when the data did not all arrive, whatever
    /// the controller said.
    pub cqe: Cqe,
    /// False when the transport made the entry up, so that its SQHD means nothing.
    pub sqhd_valid: bool,
    /// Bytes that were moved: whole PDUs that were received, or what was sent.
    pub transferred: u32,
    /// The data that was attached.
    pub transfer: Transfer,
}

/// How a queue pair ended. Reported once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ending {
    /// The peer closed the connection between two PDUs.
    #[error("the peer closed the connection")]
    Closed,
    /// The connection broke.
    #[error("the connection was lost: {0}")]
    Lost(String),
    /// The peer broke the protocol; a termination request that says so was sent.
    #[error("the peer broke the NVMe/TCP protocol: {0}")]
    Protocol(FatalError),
    /// The peer sent a termination request.
    #[error("the peer ended the connection: {0}")]
    Terminated(TermReq),
    /// The peer sent a termination request that cannot be read.
    #[error("the peer ended the connection: malformed termination request")]
    Garbled,
    /// We ended it.
    #[error("ended locally")]
    Local,
}

/// Counters of a queue pair, from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Payload bytes copied inside the process.
    pub copied_bytes: u64,
    /// System calls that sent.
    pub sends: u64,
    /// System calls that received.
    pub receives: u64,
}

/// What both roles share.
pub trait QueuePair: Send {
    /// What to wait for now.
    fn interest(&self) -> Interest<'_>;

    /// Sends what is queued and receives what has arrived, a bounded amount; clears in `ready`
    /// what turned out to be exhausted. True when it stopped at its bound with more to do.
    fn progress(&mut self, ready: &mut Ready) -> bool;

    /// Sends what is queued, as one system call where possible. True when it stopped at its bound
    /// with more to send: nothing will announce that, so call again without sleeping.
    fn flush(&mut self, ready: &mut Ready) -> bool;

    /// How it ended, once it has.
    fn ending(&self) -> Option<&Ending>;

    /// Ends it; what is outstanding is completed as lost.
    fn end(&mut self);

    /// Counters since the start.
    fn counters(&self) -> Counters;
}

/// The host's side.
pub trait HostQueuePair: QueuePair {
    /// Queues a command; it is sent by the next flush. The transport chooses the CID and describes
    /// the data in SGL1.
    ///
    /// # Errors
    /// [`Rejected`] gives the data back.
    fn submit(&mut self, sqe: Sqe, transfer: Transfer, token: u64) -> Result<CommandId, Rejected>;

    /// Gives a command up whose completion was not taken. It completes with
    /// [`Status::ABORTED_BY_HOST`] once nothing refers to its memory any more: at the next
    /// [`QueuePair::progress`] or later, where a part of it is on its way to the socket or it is lent.
    /// What still arrives for it is discarded. If it was not flushed it is never sent; otherwise the
    /// controller may still carry it out, and until it answers, the CID is not used again and there is
    /// room for one command fewer. A command that is answered already completes as it was.
    ///
    /// False when no such command is outstanding, or the transport cannot do it: then it goes on.
    fn abandon(&mut self, id: CommandId) -> bool {
        let _ = id;
        false
    }

    /// Commands that can be submitted before one has to complete.
    fn room(&self) -> usize;

    /// Commands whose completion was not taken.
    fn outstanding(&self) -> usize;

    /// The next completion, if there is one.
    fn completion(&mut self) -> Option<Completion>;

    /// A number that changes whenever the descriptor of [`QueuePair::interest`] does.
    fn generation(&self) -> u64 {
        0
    }

    /// True where a flush has the controller work on what was submitted, so that much of it is
    /// complete when the flush is over.
    fn answers_in_flush(&self) -> bool {
        false
    }

    /// Says that whoever drives this end drives the controller's end too, on the same thread and
    /// until this end is gone: neither wakes the other any more, and the controller may borrow the
    /// host's memory. False when the transport has no such thing.
    fn couple(&mut self) -> bool {
        false
    }
}

/// A command outstanding at a controller: an index into the queue's slots, below its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CommandTag(pub u16);

/// A command capsule that arrived, its SGL checked.
#[derive(Debug, Clone, Copy)]
pub struct Command {
    /// Names it in the calls that follow.
    pub tag: CommandTag,
    /// The entry.
    pub sqe: Sqe,
    /// Bytes of data that the SGL describes.
    pub data_len: u32,
}

/// What happened on a controller's queue pair.
#[derive(Debug)]
pub enum ControllerEvent {
    /// A command arrived. It must be answered by [`ControllerQueuePair::respond`]. To take
    /// in-capsule data without a further copy, call [`ControllerQueuePair::fetch`] before asking
    /// for the next event.
    Command(Command),
    /// A fetch is over.
    Fetched {
        /// Its command.
        tag: CommandTag,
        /// The sink, filled when `result` is good.
        sink: MemSink,
        /// Otherwise the status to answer with.
        result: Result<(), Status>,
        /// Bytes that arrived: all, when `result` is good or the data was corrupt; otherwise those before
        /// the fetch was over.
        transferred: u32,
    },
    /// A send is over: nothing refers to the source any more.
    Sent {
        /// Its command; it may have been answered since.
        tag: CommandTag,
        /// The source.
        source: MemSource,
        /// Bytes that were handed on: all, unless the queue pair has ended or the host has given the
        /// command up.
        transferred: u32,
    },
}

/// The controller's side.
pub trait ControllerQueuePair: QueuePair {
    /// The next event, if there is one. Receiving pauses while a command's in-capsule data waits
    /// to be claimed, so call until `None` before sleeping.
    fn event(&mut self) -> Option<ControllerEvent>;

    /// Fetches host data `offset..offset + sink.len()` of a command into `sink`;
    /// [`ControllerEvent::Fetched`] follows. May be called several times: the next range begins where
    /// the one before it ended, and is fetched after it. The caller knows which way a command's data
    /// goes; not every transport does.
    ///
    /// # Errors
    /// The sink comes back with the status to answer, when the range is not inside the command's
    /// data or the command is not outstanding.
    fn fetch(
        &mut self,
        tag: CommandTag,
        offset: u32,
        sink: MemSink,
    ) -> Result<(), (MemSink, Status)>;

    /// Sends data of a command to the host: ranges in order from 0, `last` with the final one, which
    /// the one that reaches the end of the command's data is in any case.
    /// [`ControllerEvent::Sent`] follows; the next range may be sent then.
    ///
    /// # Errors
    /// The source comes back with the status to answer, when the range is out of order, does not
    /// fit the command's data, or the command is not outstanding.
    fn send(
        &mut self,
        tag: CommandTag,
        offset: u32,
        source: MemSource,
        last: bool,
    ) -> Result<(), (MemSource, Status)>;

    /// Gives the host's own memory of a command out, where the transport has it and nothing of it
    /// was moved yet, to be read or filled in place: all of it, in place of [`Self::fetch`] and
    /// [`Self::send`]. It must come back with [`Self::restore`], exactly once, when nothing refers
    /// to it any more; until then the command is not completed, also when it is answered or the
    /// queue pair ends.
    fn lend(&mut self, tag: CommandTag) -> Option<Transfer> {
        let _ = tag;
        None
    }

    /// Takes back what [`Self::lend`] gave out for this command.
    fn restore(&mut self, tag: CommandTag, lent: Transfer) {
        // What was never lent cannot come back.
        let _ = (tag, lent);
    }

    /// Answers a command: CID and SQHD are filled in here. A success after the last data may
    /// travel as a flag of that data.
    fn respond(&mut self, tag: CommandTag, cqe: Cqe);

    /// Commands that arrived and were not answered.
    fn outstanding(&self) -> usize;

    /// Sizes the queue as its Connect command asks: called when that was read, before it is
    /// answered. `queue_size` is in entries. While flow control is off, responses carry SQHD
    /// 0xFFFF and a success after data may be elided.
    fn set_sq_flow_control(&mut self, on: bool, queue_size: u32);
}
