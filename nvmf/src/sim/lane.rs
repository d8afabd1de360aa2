//! The product's target lane as the controller's side of a simulated connection.

use std::sync::Arc;

use super::backend::{Mailbox, SimulatedBackend};
use super::expect::Side;
use super::media::Finished;
use super::pipe::Pipe;
use super::target::ControllerSide;
use super::world::{Config, State};
use crate::backend::{Counters, Geometry};
use crate::controller::{Limits, SimulatedLane};
use crate::spec::Status;
use crate::transport::{ControllerQueuePair, Ending, Ready, Turn};

/// Largest transfer, in bytes: the whole disk.
const MAX_TRANSFER: u32 = 256 * 1024;

/// See the module.
pub(super) struct LaneSide {
    lane: SimulatedLane,
    mailbox: Mailbox,
    pipe: Pipe,
    errors: usize,
    number: u32,
    ready: Ready,
    again: bool,
    ending: Option<Ending>,
    /// It said that it is over.
    over: bool,
}

impl LaneSide {
    pub(super) fn new(
        pair: Box<dyn ControllerQueuePair>,
        pipe: Pipe,
        config: &Config,
        number: u32,
        may_keep_buffers: bool,
    ) -> Result<Self, String> {
        let mailbox = Mailbox::default();
        let backend = SimulatedBackend {
            mailbox: mailbox.clone(),
            geometry: Geometry {
                block_size: config.block_size as u32,
                block_count: config.blocks as u64,
                read_only: false,
                deallocate: false,
                deallocated_reads_zeroes: true,
                volatile_cache: config.volatile,
            },
            counters: Counters::default(),
        };
        // As little as is allowed, so that commands have to wait for each other's buffers. A write whose
        // host gave it up keeps its buffer to the end, so there must be some for the others then.
        let buffers = if may_keep_buffers {
            64 * MAX_TRANSFER as usize
        } else {
            2 * MAX_TRANSFER as usize
        };
        let limits = Limits {
            max_transfer: MAX_TRANSFER,
            lane_buffers: buffers,
            ..Limits::default()
        };
        Ok(Self {
            lane: SimulatedLane::new(pair, Arc::new(backend), config.queue_size, limits)?,
            mailbox,
            pipe,
            errors: config.errors,
            number,
            ready: Ready {
                readable: true,
                writable: true,
            },
            again: true,
            ending: None,
            over: false,
        })
    }

    fn watch_ending(&mut self) -> Result<(), String> {
        let before = self.ending.clone();
        self.ending = self.lane.ending().cloned();
        match (&before, &self.ending) {
            (None, Some(ending)) => self
                .pipe
                .expect(|expect| expect.check(Side::Controller, ending)),
            (Some(_), after) if before != *after => {
                Err(format!("the controller's ending changed from {before:?}"))
            }
            _ => Ok(()),
        }
    }
}

impl ControllerSide for LaneSide {
    fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    fn is_due(&self, _now: u64) -> bool {
        let connection =
            self.ending.is_none() && self.pipe.is_news(Side::Controller, self.lane.wants_write());
        !self.over && (self.again || connection || self.mailbox.is_news())
    }

    fn next_start(&self) -> Option<u64> {
        None
    }

    fn turn(&mut self, state: &mut State) -> Result<(), String> {
        let writable = self.lane.wants_write();
        self.pipe.poll(Side::Controller, writable, &mut self.ready);
        let turn = self.lane.turn(&mut self.ready);
        self.again = turn == Turn::Again;
        while let Some((token, work)) = self.mailbox.next() {
            let error = if work.reads() {
                Status::UNRECOVERED_READ_ERROR
            } else {
                Status::WRITE_FAULT
            };
            let fails = state.random.percent(self.errors).then_some(error);
            state
                .media
                .submit(self.number, token, work, fails, state.now);
        }
        if let Some(what) = self.mailbox.take_violation() {
            return Err(what);
        }
        self.watch_ending()?;
        if turn == Turn::Ended {
            self.over = true;
            if self.ending.is_none() || self.mailbox.in_flight() > 0 {
                return Err("the lane ended before its work did".to_owned());
            }
        }
        Ok(())
    }

    fn end(&mut self, _state: &mut State) -> Result<(), String> {
        self.lane.close();
        self.again = true;
        self.watch_ending()
    }

    fn done(&mut self, _state: &mut State, done: Finished) -> Result<(), String> {
        self.mailbox.finish(done.token, done.result)
    }

    fn check_over(&mut self) -> Result<(), String> {
        if self.ending.is_none() {
            return Err("the lane's queue pair did not end".to_owned());
        }
        // Operations that went with the power never end, and the lane would wait for them.
        if !self.over && self.mailbox.in_flight() == 0 {
            return Err("the lane did not end".to_owned());
        }
        Ok(())
    }
}
