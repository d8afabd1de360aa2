//! The controller's side of a simulated connection: executes commands, with every liberty that the
//! transport's contract gives it.
//!
//! Data is fetched and sent in random pieces, in-capsule data at once or later, answers come before
//! or after the last piece was sent, commands overtake each other, and some fail.

use super::expect::Side;
use super::media::{Finished, Work};
use super::pipe::Pipe;
use super::world::{Config, State};
use crate::spec::opcode::nvm;
use crate::spec::{Cqe, Sqe, Status};
use crate::transport::{Command, CommandTag, ControllerEvent, ControllerQueuePair, Ending, Ready};
use memdesc::{MemSink, MemSource};

/// What serves the controller's end of a connection.
pub(super) trait ControllerSide {
    fn ending(&self) -> Option<&Ending>;
    /// A driver would call it now.
    fn is_due(&self, now: u64) -> bool;
    /// When it goes on by itself.
    fn next_start(&self) -> Option<u64>;
    /// One turn of a driver.
    fn turn(&mut self, state: &mut State) -> Result<(), String>;
    /// Ends the connection from this side.
    fn end(&mut self, state: &mut State) -> Result<(), String>;
    /// The media have done an operation of this connection.
    fn done(&mut self, state: &mut State, done: Finished) -> Result<(), String>;
    /// What must hold once the connection is over.
    fn check_over(&mut self) -> Result<(), String>;
}

/// Where a command stands.
#[derive(Debug)]
enum Stage {
    /// It waits until this moment.
    Waiting(u64),
    /// Its data is being fetched; what has come so far.
    Fetching(Vec<u8>),
    /// The media work on it; a compare's data waits here.
    Working(Vec<u8>),
    /// Its data is being sent.
    Sending { data: Vec<u8>, sent: usize },
    /// Answered; a buffer has not come back.
    Answered,
}

#[derive(Debug)]
struct Slot {
    sqe: Sqe,
    len: usize,
    stage: Stage,
    /// A buffer of it is with the transport.
    lent: bool,
}

/// See the module.
pub(super) struct TargetSide {
    pair: Box<dyn ControllerQueuePair>,
    pipe: Pipe,
    config: Config,
    number: u32,
    ready: Ready,
    again: bool,
    slots: Vec<Option<Slot>>,
    ending: Option<Ending>,
}

impl TargetSide {
    pub(super) fn new(
        pair: Box<dyn ControllerQueuePair>,
        pipe: Pipe,
        config: &Config,
        number: u32,
    ) -> Self {
        Self {
            pair,
            pipe,
            config: config.clone(),
            number,
            ready: Ready {
                readable: true,
                writable: true,
            },
            again: true,
            slots: Vec::new(),
            ending: None,
        }
    }

    fn watch_ending(&mut self) -> Result<(), String> {
        let before = self.ending.clone();
        self.ending = self.pair.ending().cloned();
        match (&before, &self.ending) {
            (None, Some(ending)) => {
                self.pipe
                    .expect(|expect| expect.check(Side::Controller, ending))?;
                if self.slots.iter().flatten().any(|slot| slot.lent) {
                    return Err("the controller's end kept a buffer".to_owned());
                }
                Ok(())
            }
            (Some(_), after) if before != *after => {
                Err(format!("the controller's ending changed from {before:?}"))
            }
            _ => Ok(()),
        }
    }

    fn events(&mut self, state: &mut State) -> Result<(), String> {
        while let Some(event) = self.pair.event() {
            match event {
                ControllerEvent::Command(command) => self.command(state, command)?,
                ControllerEvent::Fetched {
                    tag, sink, result, ..
                } => {
                    self.fetched(state, tag, sink, result)?;
                }
                ControllerEvent::Sent { tag, source, .. } => self.sent(state, tag, &source)?,
            }
            // Answers may have come to pass: they leave with the next flush.
            self.again = true;
        }
        Ok(())
    }

    fn slot(&mut self, tag: CommandTag, what: &str) -> Result<&mut Slot, String> {
        let slot = self.slots.get_mut(usize::from(tag.0));
        slot.and_then(Option::as_mut)
            .ok_or_else(|| format!("{what} for no command (tag {})", tag.0))
    }

    fn command(&mut self, state: &mut State, command: Command) -> Result<(), String> {
        let Command { tag, sqe, data_len } = command;
        let index = usize::from(tag.0);
        if index >= self.config.queue_size as usize {
            return Err(format!(
                "tag {index} in a queue of {}",
                self.config.queue_size
            ));
        }
        if self.slots.len() <= index {
            self.slots.resize_with(index + 1, || None);
        }
        if let Some(slot) = &self.slots[index]
            && !matches!(slot.stage, Stage::Answered)
        {
            return Err(format!("tag {index} was given twice"));
        }
        let now = state.now;
        let delay = if state.random.percent(50) {
            0
        } else {
            state.random.between(0, 60) as u64
        };
        self.slots[index] = Some(Slot {
            sqe,
            len: data_len as usize,
            stage: Stage::Waiting(now + delay),
            lent: false,
        });
        if delay == 0 {
            self.start(state, tag)?;
        }
        Ok(())
    }

    fn start_due(&mut self, state: &mut State) -> Result<(), String> {
        for index in 0..self.slots.len() {
            let waits = self.slots[index].as_ref().map(|slot| &slot.stage);
            if let Some(Stage::Waiting(until)) = waits
                && *until <= state.now
            {
                self.start(state, CommandTag(index as u16))?;
            }
        }
        Ok(())
    }

    fn start(&mut self, state: &mut State, tag: CommandTag) -> Result<(), String> {
        let Slot { sqe, len, .. } = *self.slot(tag, "start")?;
        let data = matches!(sqe.opcode, nvm::WRITE | nvm::COMPARE);
        if state.random.percent(self.config.errors) && data {
            // Not even its data is wanted.
            return self.respond(tag, Err(Status::WRITE_FAULT));
        }
        if data {
            self.slot(tag, "start")?.stage = Stage::Fetching(Vec::with_capacity(len));
            return self.fetch_next(state, tag);
        }
        self.work(state, tag, Vec::new())
    }

    /// Answers some command whose data is on the way: the rest is not wanted any more.
    fn fail_some(&mut self, state: &mut State) -> Result<(), String> {
        if !state.random.percent(self.config.errors) {
            return Ok(());
        }
        let fetching = |slot: &Option<Slot>| {
            matches!(
                slot,
                Some(Slot {
                    stage: Stage::Fetching(_),
                    lent: true,
                    ..
                })
            )
        };
        match self.slots.iter().position(fetching) {
            Some(index) => self.respond(CommandTag(index as u16), Err(Status::WRITE_FAULT)),
            None => Ok(()),
        }
    }

    fn fetch_next(&mut self, state: &mut State, tag: CommandTag) -> Result<(), String> {
        let slot = self.slot(tag, "fetch")?;
        let Stage::Fetching(have) = &slot.stage else {
            return Err("fetching out of turn".to_owned());
        };
        let (offset, left) = (have.len(), slot.len - have.len());
        let piece = if state.random.percent(60) {
            left
        } else {
            state.random.between(1, left)
        };
        slot.lent = true;
        let sink = MemSink::from_bytes(vec![0x5a; piece]);
        match self.pair.fetch(tag, offset as u32, sink) {
            Ok(()) => Ok(()),
            Err((_, status)) if self.pair.ending().is_some() => {
                self.slot(tag, "fetch")?.lent = false;
                let _ = status;
                Ok(())
            }
            Err((_, status)) => Err(format!("a fetch was refused: {status}")),
        }
    }

    fn fetched(
        &mut self,
        state: &mut State,
        tag: CommandTag,
        sink: MemSink,
        result: Result<(), Status>,
    ) -> Result<(), String> {
        let over = self.pair.ending().is_some();
        let slot = self.slot(tag, "data")?;
        if !std::mem::take(&mut slot.lent) {
            return Err("a sink came back twice".to_owned());
        }
        let len = slot.len;
        let have = match &mut slot.stage {
            Stage::Fetching(have) => have,
            // All of it may have come just before.
            Stage::Answered => {
                self.slots[usize::from(tag.0)] = None;
                return Ok(());
            }
            _ => return Err("data out of turn".to_owned()),
        };
        if result.is_err() && over {
            return Ok(());
        }
        if let Err(status) = result {
            return self.respond(tag, Err(status));
        }
        let bytes = sink.into_parts().1.ok_or("other memory came back")?;
        have.extend_from_slice(&bytes);
        if have.len() < len {
            return self.fetch_next(state, tag);
        }
        let data = std::mem::take(have);
        self.work(state, tag, data)
    }

    /// Has the media do it, its data being there.
    fn work(&mut self, state: &mut State, tag: CommandTag, data: Vec<u8>) -> Result<(), String> {
        let errors = self.config.errors;
        let number = self.number;
        let slot = self.slot(tag, "work")?;
        let sqe = slot.sqe;
        let (lba, count, fua) = (sqe.slba(), sqe.block_count(), sqe.fua());
        let (work, kept, error) = match sqe.opcode {
            nvm::READ => (
                Work::Read { lba, count },
                Vec::new(),
                Status::UNRECOVERED_READ_ERROR,
            ),
            nvm::COMPARE => (
                Work::Read { lba, count },
                data,
                Status::UNRECOVERED_READ_ERROR,
            ),
            nvm::WRITE => (
                Work::Write { lba, data, fua },
                Vec::new(),
                Status::WRITE_FAULT,
            ),
            nvm::WRITE_ZEROES => (
                Work::Zeroes { lba, count, fua },
                Vec::new(),
                Status::WRITE_FAULT,
            ),
            _ => (Work::Flush, Vec::new(), Status::WRITE_FAULT),
        };
        slot.stage = Stage::Working(kept);
        let fails = state.random.percent(errors).then_some(error);
        state
            .media
            .submit(number, u32::from(tag.0), work, fails, state.now);
        Ok(())
    }

    fn send_next(&mut self, state: &mut State, tag: CommandTag) -> Result<(), String> {
        let slot = self.slot(tag, "send")?;
        let Stage::Sending { data, sent } = &mut slot.stage else {
            return Err("sending out of turn".to_owned());
        };
        let (offset, left) = (*sent, data.len() - *sent);
        let piece = if state.random.percent(50) {
            left
        } else {
            state.random.between(1, left)
        };
        let last = piece == left;
        let source = MemSource::from_bytes(data[offset..offset + piece].to_vec());
        *sent += piece;
        slot.lent = true;
        match self.pair.send(tag, offset as u32, source, last) {
            Ok(()) => {}
            Err(_) if self.pair.ending().is_some() => {
                self.slot(tag, "send")?.lent = false;
                return Ok(());
            }
            Err((_, status)) => return Err(format!("a send was refused: {status}")),
        }
        if last && state.random.percent(70) {
            return self.respond(tag, Ok(()));
        }
        if !last && state.random.percent(self.config.errors) {
            return self.respond(tag, Err(Status::UNRECOVERED_READ_ERROR));
        }
        Ok(())
    }

    fn sent(
        &mut self,
        state: &mut State,
        tag: CommandTag,
        source: &MemSource,
    ) -> Result<(), String> {
        let over = self.pair.ending().is_some();
        let slot = self.slot(tag, "a sent piece")?;
        if !std::mem::take(&mut slot.lent) || source.is_empty() {
            return Err("a source came back twice".to_owned());
        }
        match &slot.stage {
            Stage::Answered => {
                self.slots[usize::from(tag.0)] = None;
                Ok(())
            }
            _ if over => Ok(()),
            Stage::Sending { data, sent } if *sent < data.len() => self.send_next(state, tag),
            _ => self.respond(tag, Ok(())),
        }
    }

    fn respond(&mut self, tag: CommandTag, result: Result<(), Status>) -> Result<(), String> {
        let slot = self.slot(tag, "an answer")?;
        if slot.lent {
            slot.stage = Stage::Answered;
        } else {
            self.slots[usize::from(tag.0)] = None;
        }
        let status = result.err().unwrap_or(Status::SUCCESS);
        self.pair.respond(tag, Cqe::new(0, status));
        Ok(())
    }
}

impl ControllerSide for TargetSide {
    fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    fn is_due(&self, now: u64) -> bool {
        let writable = self.pair.interest().writable;
        self.ending.is_none()
            && (self.again
                || self.pipe.is_news(Side::Controller, writable)
                || self.next_start().is_some_and(|at| at <= now))
    }

    fn next_start(&self) -> Option<u64> {
        let waiting = self
            .slots
            .iter()
            .flatten()
            .filter_map(|slot| match slot.stage {
                Stage::Waiting(until) => Some(until),
                _ => None,
            });
        waiting.min().filter(|_| self.ending.is_none())
    }

    fn turn(&mut self, state: &mut State) -> Result<(), String> {
        let writable = self.pair.interest().writable;
        let news = self.pipe.poll(Side::Controller, writable, &mut self.ready);
        let mut again = false;
        if news || self.again || self.ready.readable {
            again |= self.pair.progress(&mut self.ready);
        }
        self.events(state)?;
        self.start_due(state)?;
        self.fail_some(state)?;
        again |= self.pair.flush(&mut self.ready);
        self.again = again;
        self.events(state)?;
        self.watch_ending()
    }

    fn end(&mut self, state: &mut State) -> Result<(), String> {
        self.pair.end();
        self.events(state)?;
        self.watch_ending()
    }

    fn done(&mut self, state: &mut State, done: Finished) -> Result<(), String> {
        if self.ending.is_some() {
            return Ok(());
        }
        self.again = true;
        let tag = CommandTag(done.token as u16);
        let slot = self.slot(tag, "a result")?;
        let Stage::Working(kept) = &mut slot.stage else {
            return Err("a result out of turn".to_owned());
        };
        let kept = std::mem::take(kept);
        match (slot.sqe.opcode, done.result) {
            (_, Err(status)) => self.respond(tag, Err(status)),
            (nvm::READ, Ok(data)) => {
                slot.stage = Stage::Sending { data, sent: 0 };
                self.send_next(state, tag)
            }
            (nvm::COMPARE, Ok(data)) if data != kept => {
                self.respond(tag, Err(Status::COMPARE_FAILURE))
            }
            _ => self.respond(tag, Ok(())),
        }
    }

    fn check_over(&mut self) -> Result<(), String> {
        if self.ending.is_none() {
            return Err("the controller's queue pair did not end".to_owned());
        }
        match self.pair.event() {
            None => Ok(()),
            Some(event) => Err(format!("an event after the end: {event:?}")),
        }
    }
}
