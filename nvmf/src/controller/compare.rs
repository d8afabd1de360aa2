//! The memory of one Compare: what the host has, and room for what is stored.

use memdesc::{MemSink, MemSource};

use super::buffers::Buffers;
use crate::spec::Status;
use crate::transport::Transfer;

/// Bytes that are compared at a time.
const PIECE: usize = 4096;

/// Owned by a command from its start to its end, except for what the transport or the backend has.
#[derive(Debug)]
pub(super) struct Compare {
    /// Room for what is stored, until the backend has it.
    room: Option<MemSink>,
    /// The host's data, once they are there.
    expected: Option<MemSource>,
}

impl Compare {
    /// Takes both buffers, so that no command waits for its second one while it holds the first;
    /// also returns where the host's data go. `None` when the budget has no room for them now.
    pub(super) fn new(len: usize, buffers: &mut Buffers) -> Option<(Self, MemSink)> {
        let sink = buffers.sink(len)?;
        let Some(room) = buffers.sink(len) else {
            buffers.give_back(Transfer::In(sink));
            return None;
        };
        let compare = Self {
            room: Some(room),
            expected: None,
        };
        Some((compare, sink))
    }

    /// Keeps the host's data; returns the room for what is stored, which is there once.
    pub(super) fn keep(&mut self, expected: MemSource) -> Option<MemSink> {
        self.expected = Some(expected);
        self.room.take()
    }

    /// Compares what is stored with what the host has.
    ///
    /// # Errors
    /// Compare Failure where they differ.
    pub(super) fn verdict(&self, stored: &MemSource) -> Result<(), Status> {
        let (mut ours, mut theirs) = ([0; PIECE], [0; PIECE]);
        let expected = self.expected.as_ref().ok_or(Status::INTERNAL_ERROR)?;
        for at in (0..stored.len()).step_by(PIECE) {
            let len = PIECE.min(stored.len() - at);
            let (ours, theirs) = (&mut ours[..len], &mut theirs[..len]);
            let copied = stored.copy_to(at, ours);
            let copied = copied.and_then(|()| expected.copy_to(at, theirs));
            copied.map_err(|_| Status::INTERNAL_ERROR)?;
            if ours != theirs {
                return Err(Status::COMPARE_FAILURE.do_not_retry());
            }
        }
        Ok(())
    }

    /// Gives the memory back.
    pub(super) fn end(self, buffers: &mut Buffers) {
        if let Some(room) = self.room {
            buffers.give_back(Transfer::In(room));
        }
        if let Some(expected) = self.expected {
            buffers.give_back_source(expected);
        }
    }
}
