//! The host's queue pair over TCP.

use memdesc::MemSource;

use super::super::registry::Lease;
use super::super::{
    CommandId, Completion, Counters, Ending, HostQueuePair, Interest, QueuePair, QueueParams,
    Ready, Rejected, RejectedReason, Transfer,
};
use super::Connection;
use super::socket::Socket;
use super::stream::{Memory, Stream, Target, is_large};
use crate::spec::Sqe;
use crate::tcp::{Direction, Host, QPair, TxPayload};

/// What a slot's command was given.
#[derive(Default)]
struct Attached {
    transfer: Transfer,
    token: u64,
}

struct Memories {
    slots: Vec<Attached>,
    large_expected: usize,
}

/// See the module.
pub(super) struct TcpHost {
    stream: Stream<Host>,
    memory: Memories,
    _lease: Lease,
}

impl TcpHost {
    pub(super) fn new<S: Into<Socket>>(params: QueueParams<Connection<S>>) -> Self {
        let negotiated = &params.connection.negotiated;
        let limits = negotiated.limits(params.in_capsule_limit, params.admin);
        let machine = QPair::host(params.queue_size, limits);
        let mut slots = Vec::new();
        slots.resize_with(machine.room(), Attached::default);
        Self {
            stream: Stream::new(params.connection.stream.into(), machine),
            memory: Memories {
                slots,
                large_expected: 0,
            },
            _lease: params.lease,
        }
    }

    fn abort_if_ended(&mut self) {
        if self.stream.ending().is_some() {
            self.stream.machine.abort_all();
        }
    }
}

impl Memory for Memories {
    /// It is a guest's.
    const MAY_CHANGE: bool = true;

    fn sink(&mut self, slot: u16) -> Target<'_> {
        match self
            .slots
            .get_mut(usize::from(slot))
            .map(|slot| &mut slot.transfer)
        {
            Some(Transfer::In(sink)) => Target::Sink(sink, 0),
            _ => Target::Discard,
        }
    }

    /// The machine counts.
    fn placed(&mut self, _slot: u16, _bytes: usize) {}

    fn source(&self, slot: u16) -> Option<(&MemSource, u32)> {
        match self.slots.get(usize::from(slot)).map(|slot| &slot.transfer) {
            Some(Transfer::Out(source)) => Some((source, 0)),
            _ => None,
        }
    }

    fn sent(&mut self, _payload: TxPayload) {}

    fn large_expected(&self) -> usize {
        self.large_expected
    }
}

impl QueuePair for TcpHost {
    fn interest(&self) -> Interest<'_> {
        self.stream.interest()
    }

    fn progress(&mut self, ready: &mut Ready) -> bool {
        let more = self.stream.progress(&mut self.memory, ready);
        self.abort_if_ended();
        more
    }

    fn flush(&mut self, ready: &mut Ready) -> bool {
        let more = self.stream.flush(&mut self.memory, ready);
        self.abort_if_ended();
        more
    }

    fn ending(&self) -> Option<&Ending> {
        self.stream.ending()
    }

    fn end(&mut self) {
        self.stream.end(Ending::Local);
        self.abort_if_ended();
    }

    fn counters(&self) -> Counters {
        self.stream.counters()
    }
}

impl HostQueuePair for TcpHost {
    fn submit(&mut self, sqe: Sqe, transfer: Transfer, token: u64) -> Result<CommandId, Rejected> {
        if self.stream.ending().is_some() {
            return Err(Rejected {
                transfer,
                reason: RejectedReason::Ended,
            });
        }
        let direction = match &transfer {
            Transfer::None => Direction::None,
            Transfer::Out(_) => Direction::Out,
            Transfer::In(_) => Direction::In,
        };
        let Ok(len) = u32::try_from(transfer.len()) else {
            return Err(Rejected {
                transfer,
                reason: RejectedReason::TooLong,
            });
        };
        let Some((slot, cid)) = self.stream.machine.submit(sqe, direction, len) else {
            return Err(Rejected {
                transfer,
                reason: RejectedReason::Full,
            });
        };
        if direction == Direction::In && is_large(transfer.len()) {
            self.memory.large_expected += 1;
        }
        self.memory.slots[usize::from(slot)] = Attached { transfer, token };
        Ok(CommandId(cid))
    }

    fn abandon(&mut self, id: CommandId) -> bool {
        self.stream.machine.abandon(id.0)
    }

    fn room(&self) -> usize {
        match self.stream.ending() {
            Some(_) => 0,
            None => self.stream.machine.room(),
        }
    }

    fn outstanding(&self) -> usize {
        self.stream.machine.outstanding()
    }

    fn completion(&mut self) -> Option<Completion> {
        let done = self.stream.machine.completed()?;
        let Attached { transfer, token } =
            std::mem::take(&mut self.memory.slots[usize::from(done.slot)]);
        if matches!(transfer, Transfer::In(_)) && is_large(transfer.len()) {
            self.memory.large_expected -= 1;
        }
        Some(Completion {
            token,
            cqe: done.cqe,
            sqhd_valid: done.sqhd_valid,
            transferred: done.transferred,
            transfer,
        })
    }
}
