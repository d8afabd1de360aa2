//! A list of segments with a length: the part that sources and sinks share.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::copy::{copy_anywhere, copy_apart};
use crate::digest;
use crate::padding::Memory;

/// A range that does not lie inside what is described, or that ends before it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfBounds {
    /// First byte asked for.
    pub offset: usize,
    /// Bytes asked for; 0 for a range that ends before it begins.
    pub len: usize,
    /// Bytes that the memdesc has.
    pub available: usize,
}

impl std::fmt::Display for OutOfBounds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            offset,
            len,
            available,
        } = self;
        write!(
            f,
            "{len} bytes at offset {offset} do not fit in a memdesc of {available} bytes"
        )
    }
}

impl std::error::Error for OutOfBounds {}

/// One contiguous piece of mapped memory.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a segment is an address and a length; who may use it, and for how long, is promised in
// `Segment::new`, and that promise is not bound to a thread.
unsafe impl Send for Segment {}

impl Segment {
    /// Describes `len` bytes at `base`.
    ///
    /// # Safety
    /// The memory must stay mapped and readable, and writable too when the segment is put in a
    /// [`crate::MemSink`], until every memdesc that holds this segment is dropped or taken apart
    /// and the kernel holds no vector made from it. It may change at any time, and no Rust
    /// reference to it may exist meanwhile.
    pub unsafe fn new(base: NonNull<u8>, len: usize) -> Self {
        Self { base, len }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset <= self.len);
        // SAFETY: callers stay inside the segment, which is one mapped object.
        unsafe { self.base.as_ptr().add(offset) }
    }
}

/// Segments, their total length, and private memory that they may point into.
#[derive(Debug)]
pub(crate) struct Extent {
    segments: Vec<Segment>,
    len: usize,
    kept: Kept,
}

/// Memory that goes with an extent.
#[derive(Debug)]
enum Kept {
    /// All of it is someone else's.
    Nothing,
    /// The segments describe this very buffer.
    Bytes(Vec<u8>),
    /// Some of the segments point into this.
    Padding(Arc<Memory>),
    /// Some into the one, the others into the other.
    Both(Box<(Vec<u8>, Arc<Memory>)>),
}

impl Extent {
    pub(crate) fn from_segments(segments: Vec<Segment>) -> Self {
        let len = segments
            .iter()
            .map(Segment::len)
            .fold(0, usize::saturating_add);
        Self {
            segments,
            len,
            kept: Kept::Nothing,
        }
    }

    pub(crate) fn from_bytes(mut bytes: Vec<u8>, mut list: Vec<Segment>) -> Self {
        list.clear();
        if let Some(base) = NonNull::new(bytes.as_mut_ptr()).filter(|_| !bytes.is_empty()) {
            list.push(Segment {
                base,
                len: bytes.len(),
            });
        }
        Self {
            segments: list,
            len: bytes.len(),
            kept: Kept::Bytes(bytes),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_owned(&self) -> bool {
        matches!(self.kept, Kept::Bytes(_) | Kept::Both(_))
    }

    /// It has a padding.
    pub(crate) fn is_padded(&self) -> bool {
        matches!(self.kept, Kept::Padding(_) | Kept::Both(_))
    }

    /// Keeps what segments point into for as long as there is this extent, or a slice of it. It has no padding before.
    pub(crate) fn keep(&mut self, memory: Arc<Memory>) {
        self.kept = match std::mem::replace(&mut self.kept, Kept::Nothing) {
            Kept::Bytes(bytes) => Kept::Both(Box::new((bytes, memory))),
            Kept::Nothing | Kept::Padding(_) | Kept::Both(_) => Kept::Padding(memory),
        };
    }

    /// Adds a segment at each end.
    pub(crate) fn surround(&mut self, before: Option<Segment>, after: Option<Segment>) {
        if let Some(before) = before {
            self.segments.insert(0, before);
        }
        self.segments.extend(after);
        let more = [before, after]
            .into_iter()
            .flatten()
            .map(|segment| segment.len);
        self.len = more.fold(self.len, usize::saturating_add);
    }

    pub(crate) fn into_parts(self) -> (Vec<Segment>, Option<Vec<u8>>) {
        let Self {
            mut segments, kept, ..
        } = self;
        segments.clear();
        let bytes = match kept {
            Kept::Bytes(bytes) => Some(bytes),
            Kept::Both(both) => Some(both.0),
            Kept::Nothing | Kept::Padding(_) => None,
        };
        (segments, bytes)
    }

    fn check(&self, offset: usize, len: usize) -> Result<(), OutOfBounds> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(OutOfBounds {
                offset,
                len,
                available: self.len,
            }),
        }
    }

    /// The length of a range that lies inside.
    pub(crate) fn span(&self, range: &Range<usize>) -> Result<usize, OutOfBounds> {
        span(range, self.len)
    }

    /// Calls `piece` with each contiguous piece of the range, in order, until it returns false.
    fn for_pieces(&self, range: Range<usize>, mut piece: impl FnMut(*mut u8, usize) -> bool) {
        let mut skip = range.start;
        let mut left = range.end - range.start;
        for segment in &self.segments {
            if left == 0 {
                return;
            }
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let take = (segment.len - skip).min(left);
            if !piece(segment.at(skip), take) {
                return;
            }
            left -= take;
            skip = 0;
        }
    }

    /// Appends at most `max` vectors for the range and returns the bytes that they cover.
    pub(crate) fn iovecs(
        &self,
        range: Range<usize>,
        max: usize,
        out: &mut Vec<libc::iovec>,
    ) -> Result<usize, OutOfBounds> {
        self.span(&range)?;
        let mut covered = 0;
        let mut room = max;
        self.for_pieces(range, |base, len| {
            if room == 0 {
                return false;
            }
            out.push(libc::iovec {
                iov_base: base.cast(),
                iov_len: len,
            });
            covered += len;
            room -= 1;
            true
        });
        Ok(covered)
    }

    /// Puts the segments of a sub-range into `list`.
    pub(crate) fn slice(
        &self,
        range: Range<usize>,
        mut list: Vec<Segment>,
    ) -> Result<Self, OutOfBounds> {
        let len = self.span(&range)?;
        list.clear();
        self.for_pieces(range, |base, len| {
            if let Some(base) = NonNull::new(base) {
                list.push(Segment { base, len });
            }
            true
        });
        Ok(Self {
            segments: list,
            len,
            kept: match &self.kept {
                Kept::Padding(memory) => Kept::Padding(Arc::clone(memory)),
                // Whoever slices what is owned copies it.
                Kept::Nothing | Kept::Bytes(_) | Kept::Both(_) => Kept::Nothing,
            },
        })
    }

    pub(crate) fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), OutOfBounds> {
        self.check(offset, into.len())?;
        let mut done = 0;
        self.for_pieces(offset..offset + into.len(), |base, len| {
            // SAFETY: `base..base+len` lies in a live segment (promised in `Segment::new`), and
            // `into[done..done+len]` is private memory, so the two cannot overlap.
            unsafe { copy_apart(base, into.as_mut_ptr().add(done), len) };
            done += len;
            true
        });
        Ok(())
    }

    pub(crate) fn write(&self, offset: usize, from: &[u8]) -> Result<(), OutOfBounds> {
        self.check(offset, from.len())?;
        let mut done = 0;
        self.for_pieces(offset..offset + from.len(), |base, len| {
            // SAFETY: as in `read`, the other way; only sinks call this, so it is writable.
            unsafe { copy_apart(from.as_ptr().add(done), base, len) };
            done += len;
            true
        });
        Ok(())
    }

    /// As [`Self::read`], and extends a CRC32C over what was copied.
    pub(crate) fn read_crc32c(
        &self,
        offset: usize,
        into: &mut [u8],
        crc: u32,
    ) -> Result<u32, OutOfBounds> {
        self.check(offset, into.len())?;
        let (mut done, mut crc) = (0, crc);
        self.for_pieces(offset..offset + into.len(), |base, len| {
            // SAFETY: as in `read`.
            crc = unsafe { digest::copy_crc32c(crc, base, &mut into[done..done + len]) };
            done += len;
            true
        });
        Ok(crc)
    }

    /// Extends a CRC32C over the range.
    pub(crate) fn crc32c(&self, range: Range<usize>, crc: u32) -> Result<u32, OutOfBounds> {
        self.span(&range)?;
        let mut crc = crc;
        self.for_pieces(range, |base, len| {
            // SAFETY: `base..base+len` lies in a live segment (promised in `Segment::new`).
            crc = unsafe { digest::crc32c(crc, base, len) };
            true
        });
        Ok(crc)
    }

    /// Calls `piece` with the address and length of each contiguous piece of the range, in order.
    pub(crate) fn pieces(
        &self,
        range: Range<usize>,
        mut piece: impl FnMut(*const u8, usize),
    ) -> Result<(), OutOfBounds> {
        self.span(&range)?;
        self.for_pieces(range, |base, len| {
            piece(base, len);
            true
        });
        Ok(())
    }

    pub(crate) fn fill(&self, range: Range<usize>, byte: u8) -> Result<(), OutOfBounds> {
        self.span(&range)?;
        self.for_pieces(range, |base, len| {
            // SAFETY: the piece lies in a live, writable segment.
            unsafe { std::ptr::write_bytes(base, byte, len) };
            true
        });
        Ok(())
    }
}

/// The length of a range of something that has `available` bytes.
pub(crate) fn span(range: &Range<usize>, available: usize) -> Result<usize, OutOfBounds> {
    if range.start <= range.end && range.end <= available {
        return Ok(range.end - range.start);
    }
    Err(OutOfBounds {
        offset: range.start,
        len: range.end.saturating_sub(range.start),
        available,
    })
}

/// Copies between two extents that may overlap in memory (a guest may well ask for that).
pub(crate) fn copy_between(
    source: &Extent,
    source_offset: usize,
    sink: &Extent,
    sink_offset: usize,
    len: usize,
) -> Result<(), OutOfBounds> {
    source.check(source_offset, len)?;
    sink.check(sink_offset, len)?;
    let mut done = 0;
    source.for_pieces(source_offset..source_offset + len, |from, piece| {
        let start = sink_offset + done;
        let mut copied = 0;
        sink.for_pieces(start..start + piece, |to, part| {
            // SAFETY: both pieces lie in live segments; they may overlap.
            unsafe { copy_anywhere(from.add(copied), to, part) };
            copied += part;
            true
        });
        done += piece;
        true
    });
    Ok(())
}
