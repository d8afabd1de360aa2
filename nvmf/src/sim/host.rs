//! The host's side of a simulated connection: a load of commands, and what must come of each.

use std::collections::BTreeMap;

use super::arena::Buffer;
use super::content;
use super::disk::{Moment, ZEROES};
use super::expect::{Failing, Side};
use super::pipe::Pipe;
use super::world::{Config, State};
use crate::spec::opcode::nvm;
use crate::spec::{Sqe, Status};
use crate::transport::{
    CommandId, Completion, Ending, HostQueuePair, Ready, RejectedReason, Transfer,
};

/// Namespace of every command.
pub(super) const NSID: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    Read,
    Write { number: u64, fua: bool },
    Zeroes { number: u64, fua: bool },
    Compare { values: Vec<u64> },
    Flush,
}

#[derive(Debug)]
struct Issued {
    what: What,
    lba: u64,
    count: u32,
    cid: u16,
    began: Moment,
    buffer: Option<Buffer>,
    /// Where its memory is, to know it again.
    base: usize,
    abandoned: bool,
}

/// See the module.
pub(super) struct HostSide {
    pair: Box<dyn HostQueuePair>,
    pipe: Pipe,
    config: Config,
    ready: Ready,
    /// It asked to be called again.
    again: bool,
    issued: BTreeMap<u64, Issued>,
    ending: Option<Ending>,
}

/// The first address of attached memory.
fn base(transfer: &mut Transfer) -> usize {
    let mut vectors = Vec::new();
    let covered = match transfer {
        Transfer::None => return 0,
        Transfer::Out(source) => source.iovecs(0..source.len(), 1, &mut vectors),
        Transfer::In(sink) => sink.iovecs(0..sink.len(), 1, &mut vectors),
    };
    debug_assert!(covered.is_ok());
    vectors.first().map_or(0, |vector| vector.iov_base as usize)
}

impl HostSide {
    pub(super) fn new(pair: Box<dyn HostQueuePair>, pipe: Pipe, config: &Config) -> Self {
        Self {
            pair,
            pipe,
            config: config.clone(),
            ready: Ready {
                readable: true,
                writable: true,
            },
            again: true,
            issued: BTreeMap::new(),
            ending: None,
        }
    }

    pub(super) fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    pub(super) fn outstanding(&self) -> usize {
        self.issued.len()
    }

    /// A command can be begun.
    pub(super) fn has_room(&self) -> bool {
        self.ending.is_none() && self.pair.room() > 0
    }

    /// A driver would call it now.
    pub(super) fn is_due(&self) -> bool {
        let writable = self.pair.interest().writable;
        self.ending.is_none() && (self.again || self.pipe.is_news(Side::Host, writable))
    }

    /// One turn of a driver: completions, up to `begin` new commands, one flush.
    pub(super) fn turn(&mut self, state: &mut State, begin: usize) -> Result<(), String> {
        let writable = self.pair.interest().writable;
        let news = self.pipe.poll(Side::Host, writable, &mut self.ready);
        let mut again = false;
        if news || self.again || self.ready.readable {
            again |= self.pair.progress(&mut self.ready);
        }
        self.complete(state)?;
        for _ in 0..begin {
            if !self.has_room() || !self.begin(state)? {
                break;
            }
            state.left -= 1;
        }
        self.abandon_one(state)?;
        again |= self.pair.flush(&mut self.ready);
        self.again = again;
        self.complete(state)
    }

    /// Gives some command up, now and then.
    fn abandon_one(&mut self, state: &mut State) -> Result<(), String> {
        if !state.random.percent(self.config.abandoned) || self.ending.is_some() {
            return Ok(());
        }
        let at = state.random.below(self.issued.len());
        let chosen = self.issued.values_mut().nth(at);
        let Some(issued) = chosen.filter(|it| !it.abandoned) else {
            return Ok(());
        };
        // What a fault does to a command is judged only while somebody waits for it.
        if !self.pipe.forget(issued.cid) {
            return Ok(());
        }
        issued.abandoned = true;
        let cid = issued.cid;
        state.report.abandoned += 1;
        if !self.pair.abandon(CommandId(cid)) {
            return Err(format!(
                "CID {cid:#x} is outstanding and could not be abandoned"
            ));
        }
        self.complete(state)
    }

    /// Ends the connection from this side.
    pub(super) fn end(&mut self, state: &mut State) -> Result<(), String> {
        self.pair.end();
        self.complete(state)
    }

    /// Begins a random command; false when there is no memory for it.
    fn begin(&mut self, state: &mut State) -> Result<bool, String> {
        let (lba, count) = self.place(state);
        let fua = state.random.percent(20);
        let len = count as usize * self.config.block_size;
        let kind = state.random.below(100);
        let buffer = match kind {
            0..90 => match state.arena.take(len)? {
                Some(buffer) => Some(buffer),
                None => return Ok(false),
            },
            _ => None,
        };
        let (what, sqe, transfer) = match (kind, buffer) {
            (0..40, Some(buffer)) => {
                let sink = state.arena.sink(buffer)?;
                (What::Read, Sqe::read(NSID, lba, count), Transfer::In(sink))
            }
            (40..82, Some(buffer)) => {
                let number = state.next_write();
                let mut bytes = vec![0; len];
                content::fill(&mut bytes, number, lba, self.config.block_size);
                state.arena.write(buffer, &bytes)?;
                state.model.begin(number, number, lba, count);
                let source = state.arena.source(buffer)?;
                let sqe = Sqe::write(NSID, lba, count, fua);
                (What::Write { number, fua }, sqe, Transfer::Out(source))
            }
            (_, Some(buffer)) => {
                let values = self.guess(state, lba, count);
                let mut bytes = vec![0; len];
                let blocks = bytes.chunks_exact_mut(self.config.block_size);
                for ((lba, block), value) in (lba..).zip(blocks).zip(&values) {
                    content::fill(block, *value, lba, self.config.block_size);
                }
                state.arena.write(buffer, &bytes)?;
                let source = state.arena.source(buffer)?;
                let sqe = Sqe {
                    opcode: nvm::COMPARE,
                    ..Sqe::read(NSID, lba, count)
                };
                (What::Compare { values }, sqe, Transfer::Out(source))
            }
            (90..95, None) => {
                let number = state.next_write();
                state.model.begin(number, ZEROES, lba, count);
                let sqe = Sqe::write_zeroes(NSID, lba, count, false, fua);
                (What::Zeroes { number, fua }, sqe, Transfer::None)
            }
            (_, None) => (What::Flush, Sqe::flush(NSID), Transfer::None),
        };
        self.submit(state, what, (lba, count), sqe, buffer, transfer)?;
        Ok(true)
    }

    /// Begins a read; false when there is no room for it now.
    pub(super) fn read(&mut self, state: &mut State, lba: u64, count: u32) -> Result<bool, String> {
        let len = count as usize * self.config.block_size;
        let buffer = if self.has_room() {
            state.arena.take(len)?
        } else {
            None
        };
        let Some(buffer) = buffer else {
            return Ok(false);
        };
        let transfer = Transfer::In(state.arena.sink(buffer)?);
        let sqe = Sqe::read(NSID, lba, count);
        let place = (lba, count);
        self.submit(state, What::Read, place, sqe, Some(buffer), transfer)?;
        self.again = true;
        Ok(true)
    }

    fn submit(
        &mut self,
        state: &mut State,
        what: What,
        (lba, count): (u64, u32),
        sqe: Sqe,
        buffer: Option<Buffer>,
        mut transfer: Transfer,
    ) -> Result<(), String> {
        let began = state.model.now();
        let base = base(&mut transfer);
        // Numbered, and not guessed by taking the wrong one.
        let token = state.report.commands.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let submitted = self.pair.submit(sqe, transfer, token);
        let cid = match submitted {
            Ok(id) => id.0,
            Err(rejected) => return Err(format!("refused with room: {:?}", rejected.reason)),
        };
        state.report.commands += 1;
        let issued = Issued {
            what,
            lba,
            count,
            cid,
            began,
            buffer,
            base,
            abandoned: false,
        };
        self.pipe.begun(cid);
        self.issued.insert(token, issued);
        Ok(())
    }

    /// Where a command goes: mostly few blocks, close together so that many overlap.
    fn place(&self, state: &mut State) -> (u64, u32) {
        let blocks = self.config.blocks;
        let most = match state.random.below(100) {
            0..30 => 1,
            30..70 => 8,
            70..90 => 40,
            90..98 => 140,
            _ => blocks,
        };
        let able = (self.config.most_bytes / self.config.block_size).max(1);
        let count = state.random.between(1, most.min(blocks).min(able));
        let most_lba = blocks - count;
        let near = if state.random.percent(60) { 16 } else { blocks };
        let lba = state.random.between(0, most_lba.min(near));
        (lba as u64, count as u32)
    }

    /// What a compare expects: mostly what is likely there.
    fn guess(&self, state: &mut State, lba: u64, count: u32) -> Vec<u64> {
        let mut values: Vec<u64> = (lba..lba + u64::from(count))
            .map(|lba| state.model.likely(lba))
            .collect();
        if state.random.percent(30) {
            let at = state.random.below(values.len());
            values[at] = u64::MAX;
        }
        values
    }

    /// Takes and judges everything that was completed.
    fn complete(&mut self, state: &mut State) -> Result<(), String> {
        let before = self.ending.clone();
        self.ending = self.pair.ending().cloned();
        if before.is_some() && before != self.ending {
            return Err(format!("the host's ending changed from {before:?}"));
        }
        if let (None, Some(ending)) = (&before, &self.ending) {
            self.pipe
                .expect(|expect| expect.check(Side::Host, ending))?;
        }
        while let Some(completion) = self.pair.completion() {
            let token = completion.token;
            let issued = self.issued.remove(&token);
            let issued = issued.ok_or_else(|| {
                format!("a command that was not outstanding was completed (token {token:#x})")
            })?;
            let told = format!(
                "{:?} of {} blocks at {}",
                issued.what, issued.count, issued.lba
            );
            self.judge(state, completion, issued)
                .map_err(|what| format!("{told}: {what}"))?;
        }
        match (&self.ending, self.issued.len()) {
            (Some(_), 1..) => Err("the queue pair ended with commands outstanding".to_owned()),
            (None, count) if count != self.pair.outstanding() => Err(format!(
                "{count} commands are outstanding, the queue pair says {}",
                self.pair.outstanding()
            )),
            _ => Ok(()),
        }
    }

    fn judge(
        &self,
        state: &mut State,
        mut completion: Completion,
        issued: Issued,
    ) -> Result<(), String> {
        let Completion {
            cqe,
            sqhd_valid,
            transferred,
            ..
        } = completion;
        let status = cqe.status();
        let len = issued.buffer.map_or(0, |buffer| buffer.len);
        if base(&mut completion.transfer) != issued.base || completion.transfer.len() != len {
            return Err("other memory came back".to_owned());
        }
        if transferred as usize > len {
            return Err(format!("{transferred} bytes of {len} were moved"));
        }
        let aborted = status.code() == Status::ABORTED_BY_HOST.code();
        let failing = self
            .pipe
            .expect(|expect| expect.take_failing(issued.cid).filter(|_| !aborted));
        if self.ending.is_none() {
            self.pipe.retired(issued.cid)?;
            if !aborted {
                self.check_sqhd(cqe.sqhd.get(), sqhd_valid, failing)?;
            }
        }
        let may_abort = self.ending.is_some() || issued.abandoned;
        check_status(&issued.what, status, failing, may_abort)?;
        if status.is_success() && transferred as usize != len {
            return Err(format!("a success with {transferred} bytes of {len}"));
        }
        let bytes = match issued.buffer {
            Some(buffer) => state.arena.give_back(buffer)?,
            None => Vec::new(),
        };
        state.report.count(status);
        if status.is_success() {
            self.learn(state, &issued, &bytes)
        } else if aborted || failing == Some(Failing::Early) {
            // The controller may still do it.
            Ok(())
        } else {
            Self::learn_failure(state, &issued, status)
        }
    }

    fn check_sqhd(&self, sqhd: u16, valid: bool, failing: Option<Failing>) -> Result<(), String> {
        let on = self.config.sq_flow_control;
        match (on, valid) {
            _ if failing.is_some() => Ok(()),
            (true, false) => Err("a response was elided although flow control is on".to_owned()),
            (true, true) if u32::from(sqhd) >= self.config.queue_size => Err(format!(
                "SQHD {sqhd} in a queue of {}",
                self.config.queue_size
            )),
            (false, true) if sqhd != 0xffff => Err(format!("SQHD {sqhd} without flow control")),
            _ => Ok(()),
        }
    }

    /// Tells the model of a success.
    fn learn(&self, state: &mut State, issued: &Issued, bytes: &[u8]) -> Result<(), String> {
        let &Issued {
            lba, count, began, ..
        } = issued;
        let forbidden = |it| format!("{it:x?}");
        match &issued.what {
            What::Read => {
                let blocks = bytes.chunks_exact(self.config.block_size);
                let values: Result<Vec<u64>, String> = (lba..)
                    .zip(blocks)
                    .map(|(lba, block)| content::value_of(block, lba))
                    .collect();
                state.model.read(lba, &values?, began).map_err(forbidden)
            }
            What::Compare { values } => state.model.read(lba, values, began).map_err(forbidden),
            What::Write { number, fua } | What::Zeroes { number, fua } => {
                state.model.done(*number, lba, count, *fua);
                Ok(())
            }
            What::Flush => {
                state.model.flushed(began);
                Ok(())
            }
        }
    }

    /// Tells the model of an error.
    fn learn_failure(state: &mut State, issued: &Issued, status: Status) -> Result<(), String> {
        let &Issued {
            lba, count, began, ..
        } = issued;
        match &issued.what {
            What::Write { number, .. } | What::Zeroes { number, .. } => {
                state.model.failed(*number, lba, count);
                Ok(())
            }
            What::Compare { values }
                if status.code() == Status::COMPARE_FAILURE.code()
                    && !state.model.may_differ(lba, values, began) =>
            {
                Err("nothing can differ".to_owned())
            }
            What::Compare { .. } | What::Read | What::Flush => Ok(()),
        }
    }

    /// What must hold once the connection is over.
    pub(super) fn check_over(&mut self) -> Result<(), String> {
        if self.ending.is_none() {
            return Err("the host's queue pair did not end".to_owned());
        }
        if self.pair.room() > 0 || self.pair.completion().is_some() {
            return Err("the host's queue pair goes on after its end".to_owned());
        }
        match self.pair.submit(Sqe::flush(NSID), Transfer::None, 0) {
            Err(rejected) if rejected.reason == RejectedReason::Ended => Ok(()),
            other => Err(format!("a command after the end: {other:?}")),
        }
    }
}

/// The statuses that a command may end with.
fn check_status(
    what: &What,
    status: Status,
    failing: Option<Failing>,
    may_abort: bool,
) -> Result<(), String> {
    let is = |allowed: &[Status]| allowed.iter().any(|it| it.code() == status.code());
    let of_media = [Status::WRITE_FAULT, Status::UNRECOVERED_READ_ERROR];
    let good = match failing {
        Some(Failing::Digest) => {
            is(&of_media) || is(&[Status::TRANSIENT_TRANSPORT, Status::DATA_TRANSFER_ERROR])
        }
        Some(Failing::Short) => is(&of_media) || is(&[Status::DATA_TRANSFER_ERROR]),
        Some(Failing::Early) => is(&[Status::INTERNAL_ERROR]),
        None if status.is_success() || is(&of_media) => true,
        None if is(&[Status::COMPARE_FAILURE]) => matches!(what, What::Compare { .. }),
        None => may_abort && is(&[Status::ABORTED_BY_HOST]),
    };
    if good {
        Ok(())
    } else {
        Err(format!("{status}, where {failing:?} was due"))
    }
}
