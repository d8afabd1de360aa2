//! The host's end of a loopback connection.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::Connection;
use super::exchange::{Answer, Exchange, State, Submission, acknowledge, hand_over, wake};
use crate::spec::sqe::{PSDT_MASK, PSDT_SGL, SglDescriptor, sgl_type};
use crate::spec::{Cqe, Sqe, Status};
use crate::transport::registry::Lease;
use crate::transport::{
    CommandId, Completion, Counters, Ending, HostQueuePair, Interest, QueuePair, QueueParams,
    Ready, Rejected, RejectedReason, Transfer,
};

/// What became of a CID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Free,
    /// Its command is outstanding.
    Outstanding,
    /// Outstanding, and abandoned.
    Abandoned,
    /// Its command was abandoned and completed; the controller is not done with it.
    Resting,
}

/// See the module.
pub(super) struct LoopbackHost {
    exchange: Arc<Exchange>,
    wake: UnixStream,
    /// Tokens of commands, by CID.
    tokens: Vec<u64>,
    /// By CID.
    uses: Vec<Use>,
    free: Vec<u16>,
    /// CIDs that rest.
    resting: usize,
    /// Commands since the last flush.
    queued: Vec<Submission>,
    /// Answers that were not taken yet.
    answers: VecDeque<Answer>,
    ending: Option<Ending>,
    coupled: bool,
    copied_bytes: u64,
    _lease: Lease,
}

impl LoopbackHost {
    pub(super) fn new(params: QueueParams<Connection>) -> Self {
        let depth = params.queue_size.clamp(2, 65536) as usize - 1;
        let Connection { exchange, wake } = params.connection;
        Self {
            exchange,
            wake,
            tokens: vec![0; depth],
            uses: vec![Use::Free; depth],
            resting: 0,
            free: (0..depth as u16).rev().collect(),
            queued: Vec::with_capacity(depth.min(1024)),
            answers: VecDeque::with_capacity(depth.min(1024)),
            ending: None,
            coupled: false,
            copied_bytes: 0,
            _lease: params.lease,
        }
    }

    /// Takes what was handed over.
    fn take(&mut self) {
        let Self {
            exchange, answers, ..
        } = self;
        let mut state = exchange.lock();
        let State {
            answers: new,
            abandoned,
            ..
        } = &mut *state;
        // The controller must not take a later command of the same CID for the abandoned one.
        if !abandoned.is_empty() {
            abandoned.retain(|&cid| !new.iter().any(|answer| answer.last && answer.cid == cid));
        }
        answers.extend(new.drain(..));
        self.copied_bytes = state.copied_bytes;
        if state.controller_over && self.ending.is_none() {
            self.ending = Some(Ending::Closed);
        }
        if self.ending.is_some() {
            // Nobody will take these any more.
            answers.extend(state.commands.drain(..).map(lost));
            answers.extend(self.queued.drain(..).map(lost));
        }
    }
}

/// The completion of a command that the controller never saw.
fn lost(submission: Submission) -> Answer {
    Answer {
        cid: submission.cid,
        cqe: Cqe::new(submission.cid, Status::ABORTED_BY_HOST),
        sqhd_valid: false,
        transferred: 0,
        transfer: submission.transfer,
        last: true,
    }
}

/// Takes the command of a CID out of a list.
fn withdraw(list: &mut Vec<Submission>, cid: u16) -> Option<Submission> {
    let at = list.iter().position(|submission| submission.cid == cid)?;
    Some(list.remove(at))
}

impl QueuePair for LoopbackHost {
    fn interest(&self) -> Interest<'_> {
        Interest {
            fd: self.wake.as_fd(),
            readable: true,
            writable: false,
        }
    }

    fn progress(&mut self, ready: &mut Ready) -> bool {
        self.flush(ready);
        if std::mem::take(&mut ready.readable) && !self.coupled {
            acknowledge(&self.wake);
        }
        self.take();
        false
    }

    fn flush(&mut self, _ready: &mut Ready) -> bool {
        if self.queued.is_empty() || self.ending.is_some() {
            return false;
        }
        let mut state = self.exchange.lock();
        let first = hand_over(&mut self.queued, &mut state.commands);
        drop(state);
        if first && !self.coupled {
            wake(&self.wake);
        }
        false
    }

    /// Not before everything is completed: memory that was lent comes back in its own time.
    fn ending(&self) -> Option<&Ending> {
        match self.outstanding() {
            0 => self.ending.as_ref(),
            _ => None,
        }
    }

    fn end(&mut self) {
        if self.ending.is_none() {
            self.ending = Some(Ending::Local);
            self.exchange.lock().host_over = true;
            self.take();
            wake(&self.wake);
        }
    }

    fn counters(&self) -> Counters {
        Counters {
            copied_bytes: self.copied_bytes,
            ..Counters::default()
        }
    }
}

impl HostQueuePair for LoopbackHost {
    fn submit(
        &mut self,
        mut sqe: Sqe,
        transfer: Transfer,
        token: u64,
    ) -> Result<CommandId, Rejected> {
        let rejected = |transfer, reason| Err(Rejected { transfer, reason });
        if self.ending.is_some() {
            return rejected(transfer, RejectedReason::Ended);
        }
        let Ok(len) = u32::try_from(transfer.len()) else {
            return rejected(transfer, RejectedReason::TooLong);
        };
        let Some(cid) = self.free.pop() else {
            return rejected(transfer, RejectedReason::Full);
        };
        self.tokens[usize::from(cid)] = token;
        self.uses[usize::from(cid)] = Use::Outstanding;
        sqe.cid = cid.into();
        sqe.flags = sqe.flags & !PSDT_MASK | PSDT_SGL;
        sqe.sgl1 = SglDescriptor {
            length: len.into(),
            sgl_type: sgl_type::TRANSPORT,
            ..Default::default()
        };
        self.queued.push(Submission { cid, sqe, transfer });
        Ok(CommandId(cid))
    }

    fn abandon(&mut self, id: CommandId) -> bool {
        let CommandId(cid) = id;
        match self.uses.get_mut(usize::from(cid)) {
            Some(here @ Use::Outstanding) => *here = Use::Abandoned,
            _ => return false,
        }
        if let Some(unsent) = withdraw(&mut self.queued, cid) {
            self.answers.push_back(lost(unsent));
            return true;
        }
        let answered = |answer: &Answer| answer.cid == cid;
        if self.answers.iter().any(answered) {
            return true;
        }
        let mut state = self.exchange.lock();
        if let Some(unseen) = withdraw(&mut state.commands, cid) {
            self.answers.push_back(lost(unseen));
        } else if !state.answers.iter().any(answered) {
            state.abandoned.push(cid);
            drop(state);
            if !self.coupled {
                wake(&self.wake);
            }
        }
        true
    }

    fn room(&self) -> usize {
        match self.ending {
            Some(_) => 0,
            None => self.free.len(),
        }
    }

    fn outstanding(&self) -> usize {
        self.tokens.len() - self.free.len() - self.resting
    }

    fn completion(&mut self) -> Option<Completion> {
        loop {
            let answer = self.answers.pop_front()?;
            let here = &mut self.uses[usize::from(answer.cid)];
            let rested = *here == Use::Resting;
            if answer.last {
                *here = Use::Free;
                self.free.push(answer.cid);
                if rested {
                    self.resting -= 1;
                    continue;
                }
            } else {
                *here = Use::Resting;
                self.resting += 1;
            }
            return Some(Completion {
                token: self.tokens[usize::from(answer.cid)],
                cqe: answer.cqe,
                sqhd_valid: answer.sqhd_valid,
                transferred: answer.transferred,
                transfer: answer.transfer,
            });
        }
    }

    fn couple(&mut self) -> bool {
        self.coupled = true;
        self.exchange.lock().coupled = true;
        true
    }
}

impl Drop for LoopbackHost {
    fn drop(&mut self) {
        // The other end sees the closed socket and then this.
        self.exchange.lock().host_over = true;
    }
}
