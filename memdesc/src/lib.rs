//! Memory that someone else owns, described so that a transport can read it or fill it in place.
//!
//! | kind | made by |
//! | --- | --- |
//! | contiguous memory, scatter lists, guest memory | `from_segments`: one segment, or several; a guest's are those of its memory map |
//! | owned bytes | `from_bytes`, which also gives them back |
//! | zeroes | [`MemSource::zeroes`] |
//! | other memory, with private memory at either end | [`Padding`] |
//! | a range of a file | [`FileSource`] and [`FileSink`], types of their own: see there |
//!
//! A memdesc is a list of segments and what keeps them mapped. [`MemSource`] is memory that is
//! read (host data on its way to a controller), [`MemSink`] is memory that is written. Neither
//! ever lends a `&[u8]` over its segments: a guest may change them at any time, so they are
//! reached by copies into private memory, by digests, by vectors handed to the kernel, and in no other way.
//!
//! NVMe/TCP is a byte stream, so segments need no alignment and may have any length.
//!
//! Every range is checked: one that is not inside is an error, and nothing has happened then.
//!
//! Segment lists travel by value and come back with [`MemSource::into_parts`] or
//! [`MemSink::into_parts`], so that a lane reuses their storage and allocates nothing for a request.

#![expect(
    unsafe_code,
    reason = "this crate is where descriptions of foreign memory are read and written"
)]

mod copy;
mod digest;
mod extent;
mod file;
mod padding;
mod sink;
mod source;

pub use extent::{OutOfBounds, Segment};
pub use file::{FileError, FileSink, FileSource};
pub use padding::Padding;
pub use sink::MemSink;
pub use source::MemSource;

/// Copies `len` bytes from `source` at `source_offset` to `sink` at `sink_offset`.
///
/// # Errors
/// [`OutOfBounds`] when either range does not lie inside its memdesc; nothing is copied then.
pub fn copy(
    source: &MemSource,
    source_offset: usize,
    sink: &mut MemSink,
    sink_offset: usize,
    len: usize,
) -> Result<(), OutOfBounds> {
    extent::copy_between(
        source.extent(),
        source_offset,
        sink.extent(),
        sink_offset,
        len,
    )
}
