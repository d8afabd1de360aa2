//! Memory to read from.

use std::ops::Range;
use std::ptr::NonNull;

use crate::extent::{Extent, OutOfBounds, Segment};

/// Zeroes for every command that has to write them; a source may name this page many times.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// Memory whose bytes are read: sent to a peer, written to a file, or copied out.
#[derive(Debug)]
pub struct MemSource(Extent);

impl MemSource {
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

    /// Describes `len` zero bytes, in segments of up to 64 KiB put into `list`.
    pub fn zeroes(len: usize, mut list: Vec<Segment>) -> Self {
        list.clear();
        let mut left = len;
        while left > 0 {
            let take = left.min(ZEROES.len());
            // SAFETY: a static is mapped for ever, and a source is only read.
            list.push(unsafe { Segment::new(NonNull::from(&ZEROES).cast(), take) });
            left -= take;
        }
        Self(Extent::from_segments(list))
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True when there is nothing to read.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Describes a sub-range, its segments put into `list`. Memory that this source owns is
    /// copied, so that the slice may outlive it; foreign memory never is.
    ///
    /// # Errors
    /// [`OutOfBounds`] when the range is not inside.
    pub fn slice(&self, range: Range<usize>, list: Vec<Segment>) -> Result<Self, OutOfBounds> {
        if self.0.is_owned() {
            let mut bytes = vec![0; self.0.span(&range)?];
            self.copy_to(range.start, &mut bytes)?;
            return Ok(Self::from_bytes_with(bytes, list));
        }
        self.0.slice(range, list).map(Self)
    }

    /// Appends at most `max` vectors that cover the range from its start; returns the bytes that
    /// they cover, fewer than asked only when `max` ran out.
    ///
    /// # Errors
    /// [`OutOfBounds`] when the range is not inside; `out` is unchanged then.
    pub fn iovecs(
        &self,
        range: Range<usize>,
        max: usize,
        out: &mut Vec<libc::iovec>,
    ) -> Result<usize, OutOfBounds> {
        self.0.iovecs(range, max, out)
    }

    /// Copies `into.len()` bytes from `offset`.
    ///
    /// # Errors
    /// [`OutOfBounds`] when the range is not inside; nothing is copied then.
    pub fn copy_to(&self, offset: usize, into: &mut [u8]) -> Result<(), OutOfBounds> {
        self.0.read(offset, into)
    }

    /// As [`Self::copy_to`], and extends `crc`, the CRC32C of what came before (0 at the start), over what was
    /// copied: whatever becomes of the memory, digest and copy belong together.
    ///
    /// # Errors
    /// As [`Self::copy_to`].
    pub fn copy_to_crc32c(
        &self,
        offset: usize,
        into: &mut [u8],
        crc: u32,
    ) -> Result<u32, OutOfBounds> {
        self.0.read_crc32c(offset, into, crc)
    }

    /// Extends `crc`, the CRC32C of what came before (0 at the start), over the range. A guest may
    /// change its memory at any time, so this says nothing about what a later copy will hold:
    /// digest the copy where that matters.
    ///
    /// # Errors
    /// [`OutOfBounds`] when the range is not inside.
    pub fn crc32c(&self, range: Range<usize>, crc: u32) -> Result<u32, OutOfBounds> {
        self.0.crc32c(range, crc)
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

    pub(crate) fn extent(&self) -> &Extent {
        &self.0
    }
}
