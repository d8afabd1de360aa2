//! A lane: work that one worker thread owns and drives, knowing no runtime.

use std::os::fd::BorrowedFd;
use std::task::Context;
use std::time::Instant;

use super::Ready;

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
pub trait Lane: Send {
    /// A number that changes whenever the descriptors of [`Self::descriptors`] change.
    fn generation(&self) -> u64;

    /// Lists the descriptors to watch. They, and their order, stay the same while
    /// [`Self::generation`] does.
    fn descriptors<'a>(&'a self, out: &mut Vec<BorrowedFd<'a>>);

    /// False when the lane never waits until it can write to descriptor number `index`. It stays the same while
    /// [`Self::generation`] does.
    fn writes(&self, index: usize) -> bool;

    /// True when the lane waits until it can write to descriptor number `index`. All are waited on
    /// for reading.
    fn wants_write(&self, index: usize) -> bool;

    /// Takes what the control plane sent, and leaves the waker where it will be found. True when
    /// there was something, so that a turn is due.
    fn poll_mailbox(&mut self, cx: &mut Context<'_>) -> bool;

    /// When a turn is due although nothing has happened; `None` = never. It is asked after every turn
    /// that leaves the lane idle. A turn that comes later than it says is no error.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// One turn. `ready` matches [`Self::descriptors`]; flags that were used up are cleared.
    fn turn(&mut self, ready: &mut [Ready]) -> Turn;
}
