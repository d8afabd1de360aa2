//! The memory of a command: lent by the guest's request, taken back when the command has ended.

use memdesc::{MemSink, MemSource, OutOfBounds, Segment};
use nvmf::transport::Transfer;
use vhost_user_blk::Operation;

use super::translate::PartData;

/// Storage of segment lists and small buffers, kept so that requests allocate nothing once as many
/// are in flight as there ever were.
#[derive(Debug)]
pub(crate) struct Storage {
    lists: Vec<Vec<Segment>>,
    buffers: Vec<Vec<u8>>,
    most: usize,
}

impl Storage {
    /// Keeps at most `most` of each.
    pub(crate) fn new(most: usize) -> Self {
        Self {
            lists: Vec::with_capacity(most),
            buffers: Vec::new(),
            most,
        }
    }

    /// An empty list.
    pub(crate) fn list(&mut self) -> Vec<Segment> {
        self.lists.pop().unwrap_or_default()
    }

    /// Keeps the storage of an operation whose memory nothing refers to any more.
    pub(crate) fn keep(&mut self, operation: Operation) {
        match operation {
            Operation::Read { sink, .. } => self.keep_parts(sink.into_parts()),
            Operation::Write { source, .. } => self.keep_parts(source.into_parts()),
            Operation::Flush | Operation::Discard(_) | Operation::WriteZeroes { .. } => {}
        }
    }

    fn keep_transfer(&mut self, transfer: Transfer) {
        match transfer {
            Transfer::None => {}
            Transfer::Out(source) => self.keep_parts(source.into_parts()),
            Transfer::In(sink) => self.keep_parts(sink.into_parts()),
        }
    }

    fn keep_parts(&mut self, (list, buffer): (Vec<Segment>, Option<Vec<u8>>)) {
        if list.capacity() > 0 && self.lists.len() < self.most {
            self.lists.push(list);
        }
        if let Some(buffer) = buffer.filter(|_| self.buffers.len() < self.most) {
            self.buffers.push(buffer);
        }
    }

    fn buffer(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut buffer = self.buffers.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(bytes);
        buffer
    }
}

/// Lends the memory of `operation` that a command needs. [`give_back`] is its counterpart, due
/// before the operation itself is disposed of.
///
/// # Errors
/// [`OutOfBounds`] when the operation has no such memory: the plan was another request's.
pub(crate) fn lend(
    operation: &mut Operation,
    data: PartData<'_>,
    storage: &mut Storage,
) -> Result<Transfer, OutOfBounds> {
    let range = match data {
        PartData::None => return Ok(Transfer::None),
        PartData::Zeroes(len) => {
            let zeroes = MemSource::zeroes(len, storage.list());
            return Ok(Transfer::Out(zeroes));
        }
        PartData::Ranges(bytes) => {
            let buffer = storage.buffer(bytes);
            let source = MemSource::from_bytes_with(buffer, storage.list());
            return Ok(Transfer::Out(source));
        }
        PartData::Whole => None,
        PartData::Slice(range) => Some(range),
    };
    match (operation, range) {
        (Operation::Read { sink, .. }, None) => Ok(Transfer::In(std::mem::replace(
            sink,
            MemSink::from_segments(Vec::new()),
        ))),
        (Operation::Write { source, .. }, None) => Ok(Transfer::Out(std::mem::replace(
            source,
            MemSource::from_segments(Vec::new()),
        ))),
        (Operation::Read { sink, .. }, Some(range)) => {
            let none = outside(&range);
            let slice = sink.slice(range, storage.list())?;
            slice.map(Transfer::In).ok_or(none)
        }
        (Operation::Write { source, .. }, Some(range)) => {
            source.slice(range, storage.list()).map(Transfer::Out)
        }
        (_, range) => Err(outside(&range.unwrap_or(0..0))),
    }
}

/// Takes back what [`lend`] gave. `whole` says that it was all of the operation's memory.
pub(crate) fn give_back(
    operation: &mut Operation,
    transfer: Transfer,
    whole: bool,
    storage: &mut Storage,
) {
    match (operation, transfer) {
        (Operation::Read { sink, .. }, Transfer::In(lent)) if whole => *sink = lent,
        (Operation::Write { source, .. }, Transfer::Out(lent)) if whole => *source = lent,
        (_, transfer) => storage.keep_transfer(transfer),
    }
}

fn outside(range: &std::ops::Range<usize>) -> OutOfBounds {
    OutOfBounds {
        offset: range.start,
        len: range.len(),
        available: 0,
    }
}
