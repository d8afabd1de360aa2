//! Private memory that surrounds someone else's in one memdesc, and stays for as long as a memdesc refers to it.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::extent::{Extent, OutOfBounds, Segment, span};
use crate::{MemSink, MemSource};

/// What direct I/O likes best.
const ALIGNMENT: usize = 4096;

/// Memory of this process, zero at first, that sources and sinks can be surrounded with. It is only ever reached through
/// memdescs, so several may refer to the same bytes; what becomes of those is then for their owner to order.
#[derive(Debug)]
pub struct Padding(Arc<Memory>);

/// An allocation of its own.
#[derive(Debug)]
pub(crate) struct Memory {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it is an address that stays valid until it is dropped, and no reference to the memory is ever made; copies through
// segments are as racy as those of a guest's memory, and made in the same way.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout, and no segment refers to it: whoever has one has a reference to this.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

impl Padding {
    /// `len` bytes, at least one, on the boundary of a page.
    pub fn new(len: usize) -> Self {
        let size = len.clamp(1, isize::MAX as usize - ALIGNMENT);
        // Within what a layout may be, so the other branch is never taken.
        let layout = Layout::from_size_align(size, ALIGNMENT).unwrap_or(Layout::new::<[u8; 1]>());
        // SAFETY: the size is not zero.
        let base = unsafe { alloc_zeroed(layout) };
        match NonNull::new(base) {
            Some(base) => Self(Arc::new(Memory { base, layout })),
            None => handle_alloc_error(layout),
        }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.layout.size()
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// A range to be filled, its segment put into `list`.
    ///
    /// # Errors
    /// [`OutOfBounds`] when the range is not inside.
    pub fn sink(
        &self,
        range: Range<usize>,
        mut list: Vec<Segment>,
    ) -> Result<MemSink, OutOfBounds> {
        list.clear();
        list.extend(self.segment(&range)?);
        let mut extent = Extent::from_segments(list);
        extent.keep(Arc::clone(&self.0));
        Ok(MemSink::from_extent(extent))
    }

    /// Surrounds what is read with ranges of the padding, of which either may be empty.
    ///
    /// # Errors
    /// [`OutOfBounds`] when a range is not inside, or the source has a padding; it is unchanged then.
    pub fn surround_source(
        &self,
        before: Range<usize>,
        source: &mut MemSource,
        after: Range<usize>,
    ) -> Result<(), OutOfBounds> {
        self.surround(&before, source.extent_mut(), &after)
    }

    /// As [`Self::surround_source`], what is filled.
    ///
    /// # Errors
    /// As [`Self::surround_source`].
    pub fn surround_sink(
        &self,
        before: Range<usize>,
        sink: &mut MemSink,
        after: Range<usize>,
    ) -> Result<(), OutOfBounds> {
        self.surround(&before, sink.extent_mut(), &after)
    }

    fn surround(
        &self,
        before: &Range<usize>,
        extent: &mut Extent,
        after: &Range<usize>,
    ) -> Result<(), OutOfBounds> {
        let (before, after) = (self.segment(before)?, self.segment(after)?);
        if extent.is_padded() {
            return Err(OutOfBounds {
                offset: 0,
                len: extent.len(),
                available: 0,
            });
        }
        extent.surround(before, after);
        extent.keep(Arc::clone(&self.0));
        Ok(())
    }

    /// `None` where it is empty.
    fn segment(&self, range: &Range<usize>) -> Result<Option<Segment>, OutOfBounds> {
        let len = span(range, self.len())?;
        // SAFETY: the offset is inside the allocation, or at its end.
        let base = unsafe { self.0.base.add(range.start) };
        // SAFETY: whatever memdesc gets the segment keeps the allocation, and no reference to it is ever made.
        let segment = unsafe { Segment::new(base, len) };
        Ok((len > 0).then_some(segment))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_surrounded_is_read_as_one() {
        let padding = Padding::new(16);
        let mut sink = padding.sink(0..16, Vec::new()).unwrap();
        sink.copy_from(0, b"0123456789abcdef").unwrap();
        let mut source = MemSource::from_bytes(b"<->".to_vec());
        padding.surround_source(2..4, &mut source, 13..16).unwrap();
        let mut read = [0; 8];
        source.copy_to(0, &mut read).unwrap();
        assert_eq!((source.len(), &read), (8, b"23<->def"));
        source
            .slice(1..5, Vec::new())
            .unwrap()
            .copy_to(0, &mut read[..4])
            .unwrap();
        assert_eq!(&read[..4], b"3<->");
        assert_eq!(source.into_parts().1.unwrap(), b"<->");
    }

    #[test]
    fn what_is_surrounded_is_filled_as_one_and_its_slices_keep_the_padding() {
        let padding = Padding::new(8);
        let mut middle = [0u8; 4];
        let base = NonNull::from(&mut middle).cast();
        // SAFETY: it outlives the sink, and is looked at only after that.
        let segment = unsafe { Segment::new(base, 4) };
        let mut sink = MemSink::from_segments(vec![segment]);
        padding.surround_sink(0..2, &mut sink, 6..8).unwrap();
        let source = padding.sink(0..8, Vec::new()).unwrap().into_source();
        drop(padding);
        let mut slice = sink.slice(1..7, Vec::new()).unwrap().unwrap();
        drop(sink);
        slice.copy_from(0, b"abcdef").unwrap();
        drop(slice);
        let mut read = [0; 8];
        source.copy_to(0, &mut read).unwrap();
        assert_eq!((&read, &middle), (b"\0a\0\0\0\0f\0", b"bcde"));
    }

    #[test]
    fn ranges_are_checked_and_nothing_is_surrounded_twice() {
        let padding = Padding::new(8);
        let mut source = MemSource::zeroes(1, Vec::new());
        for (before, after) in [(0..9, 0..0), (0..1, 8..9), (0..0, usize::MAX..usize::MAX)] {
            let refused = padding.surround_source(before, &mut source, after);
            refused.unwrap_err();
            assert_eq!(source.len(), 1);
        }
        padding.sink(5..9, Vec::new()).unwrap_err();
        padding.surround_source(0..0, &mut source, 8..8).unwrap();
        padding
            .surround_source(0..1, &mut source, 0..0)
            .unwrap_err();
        assert_eq!((source.len(), padding.len()), (1, 8));
    }
}
