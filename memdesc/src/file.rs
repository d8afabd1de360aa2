//! Ranges of files, as something to copy from and to.
//!
//! They are no kind of [`MemSource`] and [`MemSink`], because those promise what a file cannot give:
//! vectors for the kernel, and copies that neither fail nor wait for a disk. So whoever takes a
//! memdesc has no case for files to handle, and memory costs no branch more.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::extent::{OutOfBounds, span};
use crate::{MemSink, MemSource};

/// Vectors of one call: the kernel's own limit (IOV_MAX).
const MAX_VECTORS: usize = 1024;
/// Bytes that digests and fills take at a time, on the stack.
const PIECE: usize = 4096;

/// Why a range of a file was not copied, or not all of it.
#[derive(Debug)]
pub enum FileError {
    /// The range does not lie inside what is described; nothing was copied.
    OutOfBounds(OutOfBounds),
    /// The file has no more bytes, or takes none.
    EndOfFile {
        /// Bytes copied before that, from the start of the range on.
        copied: usize,
    },
    /// The operating system's answer.
    Io {
        /// Bytes copied before that, from the start of the range on.
        copied: usize,
        /// What it says.
        error: io::Error,
    },
}

impl std::fmt::Display for FileError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::OutOfBounds(error) => error.fmt(f),
            Self::EndOfFile { copied } => write!(f, "the file ends after {copied} bytes"),
            Self::Io { copied, error } => write!(f, "{error}, after {copied} bytes"),
        }
    }
}

impl std::error::Error for FileError {}

impl From<OutOfBounds> for FileError {
    fn from(error: OutOfBounds) -> Self {
        Self::OutOfBounds(error)
    }
}

/// One call of preadv or pwritev.
type Call = unsafe extern "C" fn(i32, *const libc::iovec, i32, libc::off_t) -> isize;

/// See [`FileSource`] and [`FileSink`].
#[derive(Debug, Clone, Copy)]
struct FileRange<'f> {
    file: BorrowedFd<'f>,
    start: u64,
    len: usize,
}

impl FileRange<'_> {
    fn new(file: BorrowedFd<'_>, start: u64, len: usize) -> Result<FileRange<'_>, OutOfBounds> {
        // What the kernel can address.
        let available = i64::MAX.saturating_sub_unsigned(start).max(0) as usize;
        if i64::try_from(start).is_err() || len > available {
            return Err(OutOfBounds {
                offset: 0,
                len,
                available,
            });
        }
        Ok(FileRange { file, start, len })
    }

    fn slice(self, range: &Range<usize>) -> Result<Self, OutOfBounds> {
        let len = span(range, self.len)?;
        Ok(Self {
            start: self.start + range.start as u64,
            len,
            ..self
        })
    }

    /// Makes `call` until all of the range was moved. `vectors` puts some of what is left of the
    /// other side, from this offset on, into the list.
    ///
    /// # Safety
    /// Until the next vectors are asked for or this returns, the memory that they describe must be
    /// as `call` needs it.
    unsafe fn each(
        self,
        call: Call,
        mut vectors: impl FnMut(usize, &mut Vec<libc::iovec>) -> Result<(), OutOfBounds>,
    ) -> Result<(), FileError> {
        let mut list = Vec::new();
        let mut copied = 0;
        while copied < self.len {
            list.clear();
            vectors(copied, &mut list)?;
            let at = (self.start + copied as u64) as libc::off_t;
            let count = list.len() as i32;
            // SAFETY: the caller vouches for the memory; the list outlives the call.
            let moved = unsafe { call(self.file.as_raw_fd(), list.as_ptr(), count, at) };
            match usize::try_from(moved) {
                Ok(0) => return Err(FileError::EndOfFile { copied }),
                Ok(moved) => copied += moved,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(FileError::Io { copied, error });
                    }
                }
            }
        }
        Ok(())
    }
}

/// A range of a file whose bytes are read.
///
/// Reading may wait for a disk: not for a thread that must not block.
#[derive(Debug, Clone, Copy)]
pub struct FileSource<'f>(FileRange<'f>);

impl<'f> FileSource<'f> {
    /// Describes `len` bytes at `start`; whether the file has so many is seen when they are read.
    ///
    /// # Errors
    /// [`OutOfBounds`] for what no file can have: an end beyond 2⁶³ − 1.
    pub fn new(file: BorrowedFd<'f>, start: u64, len: usize) -> Result<Self, OutOfBounds> {
        FileRange::new(file, start, len).map(Self)
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// True when there is nothing to read.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Describes a sub-range.
    ///
    /// # Errors
    /// [`OutOfBounds`] when the range is not inside.
    pub fn slice(&self, range: Range<usize>) -> Result<Self, OutOfBounds> {
        self.0.slice(&range).map(Self)
    }

    /// Reads `into.len()` bytes from `offset`.
    ///
    /// # Errors
    /// [`FileError`]; the first bytes of `into` may have changed.
    pub fn copy_to(&self, offset: usize, into: &mut [u8]) -> Result<(), FileError> {
        let end = offset.saturating_add(into.len());
        let range = self.0.slice(&(offset..end))?;
        let vectors = |done: usize, list: &mut Vec<libc::iovec>| {
            let rest = &mut into[done..];
            list.push(libc::iovec {
                iov_base: rest.as_mut_ptr().cast(),
                iov_len: rest.len(),
            });
            Ok(())
        };
        // SAFETY: `into` is borrowed mutably, and preadv writes no more than a vector's length.
        unsafe { range.each(libc::preadv, vectors) }
    }

    /// Reads `len` bytes from `offset` straight into a sink, at `sink_offset`.
    ///
    /// # Errors
    /// [`FileError`]; with anything but [`FileError::OutOfBounds`] the first bytes of the sink's
    /// range may have changed.
    pub fn copy(
        &self,
        offset: usize,
        sink: &mut MemSink,
        sink_offset: usize,
        len: usize,
    ) -> Result<(), FileError> {
        let range = self.0.slice(&(offset..offset.saturating_add(len)))?;
        let end = sink_offset.saturating_add(len);
        span(&(sink_offset..end), sink.len())?;
        let vectors = |done: usize, list: &mut Vec<libc::iovec>| {
            sink.iovecs(sink_offset + done..end, MAX_VECTORS, list)
                .map(drop)
        };
        // SAFETY: vectors of a sink describe memory that may be written, as `Segment::new` was
        // promised; the sink is borrowed until the last call has returned.
        unsafe { range.each(libc::preadv, vectors) }
    }

    /// Extends `crc`, the CRC32C of what came before (0 at the start), over the range.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn crc32c(&self, range: Range<usize>, crc: u32) -> Result<u32, FileError> {
        let len = span(&range, self.len())?;
        let mut private = [0; PIECE];
        let mut crc = crc;
        for done in (0..len).step_by(PIECE) {
            let piece = &mut private[..PIECE.min(len - done)];
            self.copy_to(range.start + done, piece)
                .map_err(|error| after(error, done))?;
            crc = crc32c::crc32c_append(crc, piece);
        }
        Ok(crc)
    }
}

/// A range of a file whose bytes are written.
///
/// Writing may wait for a disk: not for a thread that must not block.
#[derive(Debug)]
pub struct FileSink<'f>(FileRange<'f>);

impl<'f> FileSink<'f> {
    /// Describes `len` bytes at `start`, which a file that ends before them grows to hold.
    ///
    /// # Errors
    /// [`OutOfBounds`] for what no file can have: an end beyond 2⁶³ − 1.
    pub fn new(file: BorrowedFd<'f>, start: u64, len: usize) -> Result<Self, OutOfBounds> {
        FileRange::new(file, start, len).map(Self)
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// True when there is no room.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Describes a sub-range.
    ///
    /// # Errors
    /// [`OutOfBounds`] when the range is not inside.
    pub fn slice(&self, range: Range<usize>) -> Result<Self, OutOfBounds> {
        self.0.slice(&range).map(Self)
    }

    /// Writes all of `from` at `offset`.
    ///
    /// # Errors
    /// [`FileError`]; with anything but [`FileError::OutOfBounds`] the first bytes may be written.
    pub fn copy_from(&mut self, offset: usize, from: &[u8]) -> Result<(), FileError> {
        let end = offset.saturating_add(from.len());
        let range = self.0.slice(&(offset..end))?;
        let vectors = |done: usize, list: &mut Vec<libc::iovec>| {
            let rest = &from[done..];
            list.push(libc::iovec {
                iov_base: rest.as_ptr().cast_mut().cast(),
                iov_len: rest.len(),
            });
            Ok(())
        };
        // SAFETY: `from` is borrowed, and pwritev only reads.
        unsafe { range.each(libc::pwritev, vectors) }
    }

    /// Writes `len` bytes of a source, from `source_offset` on, at `offset`.
    ///
    /// # Errors
    /// As [`Self::copy_from`].
    pub fn copy(
        &mut self,
        offset: usize,
        source: &MemSource,
        source_offset: usize,
        len: usize,
    ) -> Result<(), FileError> {
        let range = self.0.slice(&(offset..offset.saturating_add(len)))?;
        let end = source_offset.saturating_add(len);
        span(&(source_offset..end), source.len())?;
        let vectors = |done: usize, list: &mut Vec<libc::iovec>| {
            source
                .iovecs(source_offset + done..end, MAX_VECTORS, list)
                .map(drop)
        };
        // SAFETY: vectors of a source describe memory that may be read, as `Segment::new` was
        // promised; the source is borrowed until the last call has returned.
        unsafe { range.each(libc::pwritev, vectors) }
    }

    /// Sets every byte of the range.
    ///
    /// # Errors
    /// As [`Self::copy_from`].
    pub fn fill(&mut self, range: Range<usize>, byte: u8) -> Result<(), FileError> {
        let len = span(&range, self.len())?;
        let piece = [byte; PIECE];
        for done in (0..len).step_by(PIECE) {
            self.copy_from(range.start + done, &piece[..PIECE.min(len - done)])
                .map_err(|error| after(error, done))?;
        }
        Ok(())
    }
}

/// The same error of a range that began `done` bytes earlier.
fn after(error: FileError, done: usize) -> FileError {
    match error {
        FileError::OutOfBounds(error) => FileError::OutOfBounds(error),
        FileError::EndOfFile { copied } => FileError::EndOfFile {
            copied: copied + done,
        },
        FileError::Io { copied, error } => FileError::Io {
            copied: copied + done,
            error,
        },
    }
}
