//! Memory to write to.

use std::ops::Range;

use crate::extent::{Extent, OutOfBounds, Segment};

/// Memory whose bytes are written: received from a peer, read from a file, or copied in.
#[derive(Debug)]
pub struct MemSink(Extent);

impl MemSink {
    /// Describes the concatenation of `segments`.
    pub fn from_segments(segments: Vec<Segment>) -> Self {
        Self(Extent::from_segments(segments))
    }

    /// Takes ownership of `bytes` and describes all of them.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(Extent::from_bytes(bytes, Vec::new()))
    }

    /// As [`Self::from_bytes`], with the storage of an earlier segment list.
    pub fn from_bytes_with(bytes: Vec<u8>, list: Vec<Segment>) -> Self {
        Self(Extent::from_bytes(bytes, list))
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True when there is no room.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Describes a sub-range, its segments put into `list`; `None` for memory that this sink
    /// owns, which a second writer must not outlive.
    ///
    /// # Errors
    /// [`OutOfBounds`] when the range is not inside.
    pub fn slice(
        &self,
        range: Range<usize>,
        list: Vec<Segment>,
    ) -> Result<Option<Self>, OutOfBounds> {
        if self.0.is_owned() {
            return Ok(None);
        }
        self.0.slice(range, list).map(|extent| Some(Self(extent)))
    }

    /// Appends at most `max` vectors that cover the range from its start; returns the bytes that
    /// they cover, fewer than asked only when `max` ran out.
    ///
    /// # Errors
    /// [`OutOfBounds`] when the range is not inside; `out` is unchanged then.
    pub fn iovecs(
        &mut self,
        range: Range<usize>,
        max: usize,
        out: &mut Vec<libc::iovec>,
    ) -> Result<usize, OutOfBounds> {
        self.0.iovecs(range, max, out)
    }

    /// Copies all of `from` to `offset`.
    ///
    /// # Errors
    /// [`OutOfBounds`] when the range is not inside; nothing is copied then.
    pub fn copy_from(&mut self, offset: usize, from: &[u8]) -> Result<(), OutOfBounds> {
        self.0.write(offset, from)
    }

    /// Sets every byte of the range.
    ///
    /// # Errors
    /// [`OutOfBounds`] when the range is not inside; nothing is written then.
    pub fn fill(&mut self, range: Range<usize>, byte: u8) -> Result<(), OutOfBounds> {
        self.0.fill(range, byte)
    }

    /// Extends `crc`, the CRC32C of what came before (0 at the start), over the range.
    ///
    /// # Errors
    /// [`OutOfBounds`] when the range is not inside.
    pub fn crc32c(&self, range: Range<usize>, crc: u32) -> Result<u32, OutOfBounds> {
        self.0.crc32c(range, crc)
    }

    /// Names the address and length of each piece of a range, in order: of one that the kernel wrote
    /// through vectors, for whoever keeps a log of the memory that was written.
    ///
    /// # Errors
    /// [`OutOfBounds`] when the range is not inside; `piece` is not called then.
    pub fn written(
        &self,
        range: Range<usize>,
        piece: impl FnMut(*const u8, usize),
    ) -> Result<(), OutOfBounds> {
        self.0.pieces(range, piece)
    }

    /// Turns what was filled into something to read, with the same memory.
    pub fn into_source(self) -> crate::MemSource {
        crate::MemSource::from_extent(self.0)
    }

    /// Gives back the (emptied) segment list and the owned bytes, for reuse.
    pub fn into_parts(self) -> (Vec<Segment>, Option<Vec<u8>>) {
        self.0.into_parts()
    }

    pub(crate) fn from_extent(extent: Extent) -> Self {
        Self(extent)
    }

    pub(crate) fn extent_mut(&mut self) -> &mut Extent {
        &mut self.0
    }

    pub(crate) fn extent(&mut self) -> &Extent {
        &self.0
    }
}
