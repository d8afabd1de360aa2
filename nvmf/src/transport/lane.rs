//! A lane: work that one worker thread owns and drives, knowing no runtime.

use std::task::Context;

use super::{Interest, Ready};

/// What a lane wants after a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Sleep until a descriptor is ready or the mailbox has something.
    Idle,
    /// It stopped at its bound: give others a turn, then come back without sleeping.
    Again,
    /// It is over and can be dropped.
    Ended,
}

/// Work that a worker drives: gather what is ready, process a bounded batch, flush once.
pub trait Lane {
    /// A number that changes whenever the descriptors of [`Self::interests`] change.
    fn generation(&self) -> u64;

    /// Lists the descriptors to watch. Which directions are wanted may change with every turn; the
    /// descriptors and their order only together with [`Self::generation`].
    fn interests<'a>(&'a self, out: &mut Vec<Interest<'a>>);

    /// Takes what the control plane sent, and leaves the waker where it will be found. True when
    /// there was something, so that a turn is due.
    fn poll_mailbox(&mut self, cx: &mut Context<'_>) -> bool;

    /// One turn. `ready` matches [`Self::interests`]; flags that were used up are cleared.
    fn turn(&mut self, ready: &mut [Ready]) -> Turn;
}
