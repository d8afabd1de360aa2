//! What lies between the two ends: the commands and answers that were handed over.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::spec::{Cqe, Sqe};
use crate::transport::Transfer;

/// A command and its memory, on the way to the controller.
#[derive(Debug)]
pub(super) struct Submission {
    pub(super) cid: u16,
    pub(super) sqe: Sqe,
    pub(super) transfer: Transfer,
}

/// An answer and the memory of its command, on the way to the host.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) cid: u16,
    pub(super) cqe: Cqe,
    /// False when the queue's end made the entry up.
    pub(super) sqhd_valid: bool,
    pub(super) transferred: u32,
    pub(super) transfer: Transfer,
    /// The controller is done with the command. Otherwise it was abandoned, and this is its memory.
    pub(super) last: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) commands: Vec<Submission>,
    pub(super) answers: Vec<Answer>,
    /// CIDs of commands that were abandoned at the host, and that the controller does not know of.
    pub(super) abandoned: Vec<u16>,
    /// The host's end was ended: its memory must not be touched unless it was lent.
    pub(super) host_over: bool,
    pub(super) controller_over: bool,
    /// One owner drives both ends.
    pub(super) coupled: bool,
    /// Payload that the controller's end copied.
    pub(super) copied_bytes: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Exchange(Mutex<State>);

impl Exchange {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Lists are swapped and flags set: nothing is ever half-changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hands a batch over: `queued` goes behind what was not taken yet, and is empty afterwards. True
/// when the other end knows of nothing yet.
pub(super) fn hand_over<T>(queued: &mut Vec<T>, taken: &mut Vec<T>) -> bool {
    let first = taken.is_empty();
    if first {
        std::mem::swap(queued, taken);
    } else {
        taken.append(queued);
    }
    first
}

/// Wakes the end that waits on the other side of `wake`.
pub(super) fn wake(mut wake: &UnixStream) {
    // A full socket buffer holds wake-ups already, and a closed one is one for ever.
    let _ = wake.write(&[0]);
}

/// Takes all wake-ups.
pub(super) fn acknowledge(mut wake: &UnixStream) {
    let mut bytes = [0; 64];
    while matches!(wake.read(&mut bytes), Ok(n) if n == bytes.len()) {}
}
