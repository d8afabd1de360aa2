//! Memory as a namespace, mapped lazily: it costs what was written to it.

#![expect(unsafe_code, reason = "anonymous memory is mapped and given back")]

use std::cell::Cell;
use std::io;
use std::ptr::NonNull;

use memdesc::{MemSink, MemSource, Segment};

use super::{Backend, BackendIo, BackendOp, Counters, Geometry};
use crate::spec::Status;
use crate::transport::Transfer;

const PAGE: u64 = 4096;

thread_local! {
    /// The storage of the last description of a range of this memory, for the next.
    static LIST: Cell<Vec<Segment>> = const { Cell::new(Vec::new()) };
}

/// Zero-filled memory of a fixed size, gone with the process.
///
/// Lanes receive into it and send from it in place, so the memory may change at any time and is
/// only ever reached through memdescs. A write that its connection does not survive may have
/// arrived in part.
#[derive(Debug)]
pub struct RamBackend {
    base: NonNull<u8>,
    geometry: Geometry,
    counters: Counters,
}

// SAFETY: the mapping belongs to no thread, and it is only reached through memdescs, whose contract
// is that memory may change under them.
unsafe impl Send for RamBackend {}
// SAFETY: as above.
unsafe impl Sync for RamBackend {}

/// Why there is no such memory.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum RamError {
    #[error("ram: a size of {size} bytes is not a multiple of the block size {block_size}")]
    Size { size: u64, block_size: u32 },
    #[error("ram: a namespace needs a size, for example ram:64M")]
    Empty,
    #[error("block size {0} is not supported; it is 512 or 4096")]
    BlockSize(u32),
    #[error("ram: {size} bytes of address space cannot be reserved ({error}); use a smaller size")]
    Map { size: u64, error: io::Error },
}

impl RamBackend {
    /// Reserves `size` bytes; memory is taken as it is written.
    ///
    /// # Errors
    /// [`RamError`].
    pub fn new(size: u64, block_size: u32) -> Result<Self, RamError> {
        if !matches!(block_size, 512 | 4096) {
            return Err(RamError::BlockSize(block_size));
        }
        if size == 0 {
            return Err(RamError::Empty);
        }
        if !size.is_multiple_of(u64::from(block_size)) {
            return Err(RamError::Size { size, block_size });
        }
        let too_big = || RamError::Map {
            size,
            error: io::Error::from_raw_os_error(libc::ENOMEM),
        };
        let len = isize::try_from(size).map_err(|_| too_big())?;
        // SAFETY: a new private mapping at an address that the kernel chooses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len.unsigned_abs(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            return Err(RamError::Map { size, error });
        }
        Ok(Self {
            base: NonNull::new(base.cast()).ok_or_else(too_big)?,
            geometry: Geometry {
                block_size,
                block_count: size / u64::from(block_size),
                read_only: false,
                deallocate: true,
                deallocated_reads_zeroes: true,
                volatile_cache: false,
            },
            counters: Counters::default(),
        })
    }

    /// The same, refusing writes.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.geometry.read_only = true;
        self
    }

    fn segment(&self, offset: u64, len: usize) -> Option<Segment> {
        if !self.geometry.contains(offset, len as u64) {
            return None;
        }
        let at = usize::try_from(offset).ok()?;
        // SAFETY: `at` is at most the size of the mapping.
        let base = unsafe { self.base.add(at) };
        // SAFETY: the range is inside the mapping, which is readable and writable and is never
        // unmapped (see `drop`); no reference to it exists.
        Some(unsafe { Segment::new(base, len) })
    }

    fn list(&self, offset: u64, len: usize, list: &mut Vec<Segment>) -> Option<Vec<Segment>> {
        let segment = self.segment(offset, len)?;
        let mut list = std::mem::take(list);
        list.clear();
        list.push(segment);
        Some(list)
    }

    /// Makes a range that was checked read as zeroes, giving whole pages back.
    fn discard(&self, offset: u64, len: u64) {
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(PAGE), end - end % PAGE);
        if first >= last {
            return self.zero(offset, end);
        }
        self.zero(offset, first);
        self.zero(last, end);
        // SAFETY: whole pages inside the mapping; private and anonymous, so they read as zeroes
        // afterwards.
        let result = unsafe {
            libc::madvise(
                self.base.add(first as usize).as_ptr().cast(),
                (last - first) as usize,
                libc::MADV_DONTNEED,
            )
        };
        if result != 0 {
            // Locked memory, for example.
            self.zero(first, last);
        }
    }

    fn zero(&self, from: u64, to: u64) {
        let len = (to - from) as usize;
        if let Some(segment) = self.segment(from, len) {
            let mut sink = MemSink::from_segments(contiguous(segment));
            let filled = sink.fill(0..len, 0);
            debug_assert!(filled.is_ok(), "the sink has this length");
            LIST.set(sink.into_parts().0);
        }
    }

    fn copy(&self, op: &mut BackendOp) -> Result<(), Status> {
        let outside = |_| Status::LBA_OUT_OF_RANGE.do_not_retry();
        match op {
            BackendOp::Read { offset, sink } => {
                let segment = self.segment(*offset, sink.len()).ok_or(());
                let memory = MemSource::from_segments(contiguous(segment.map_err(outside)?));
                let len = sink.len();
                let copied = memdesc::copy(&memory, 0, sink, 0, len);
                LIST.set(memory.into_parts().0);
                copied.map_err(|_| Status::DATA_TRANSFER_ERROR)?;
                self.counters.count_read(len as u64);
            }
            BackendOp::Write {
                offset,
                source,
                fua,
            } => {
                let segment = self.segment(*offset, source.len()).ok_or(());
                let mut memory = MemSink::from_segments(contiguous(segment.map_err(outside)?));
                let copied = memdesc::copy(source, 0, &mut memory, 0, source.len());
                LIST.set(memory.into_parts().0);
                copied.map_err(|_| Status::DATA_TRANSFER_ERROR)?;
                self.counters.count_write(source.len() as u64, *fua);
            }
            BackendOp::Flush => self.counters.count_flush(),
            BackendOp::WriteZeroes { offset, len, .. } => {
                self.discard(*offset, *len);
                self.counters.count_write_zeroes();
            }
            BackendOp::Deallocate { offset, len } => {
                self.discard(*offset, *len);
                self.counters.count_deallocate();
            }
        }
        Ok(())
    }
}

/// A list of one segment, in the storage of [`LIST`].
fn contiguous(segment: Segment) -> Vec<Segment> {
    let mut list = LIST.take();
    list.push(segment);
    list
}

impl Drop for RamBackend {
    fn drop(&mut self) {
        // The memory is given back, the addresses are not: a memdesc may still name them, and
        // nothing ties its life to this. A namespace lives as long as the process, so that is
        // no loss.
        self.discard(0, self.geometry.bytes());
    }
}

impl Backend for RamBackend {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn submit(&self, io: &mut BackendIo, mut op: BackendOp, token: u32) {
        let checked = op.check(&self.geometry);
        let result = checked.and_then(|()| self.copy(&mut op));
        if result.is_err() {
            self.counters.count_error();
        }
        let transfer = match op {
            BackendOp::Read { sink, .. } => Transfer::In(sink),
            op => op.into_transfer(),
        };
        io.finish(token, transfer, result);
    }

    fn source(&self, offset: u64, len: usize, list: &mut Vec<Segment>) -> Option<MemSource> {
        self.list(offset, len, list).map(MemSource::from_segments)
    }

    fn sink(&self, offset: u64, len: usize, list: &mut Vec<Segment>) -> Option<MemSink> {
        if self.geometry.read_only {
            return None;
        }
        self.list(offset, len, list).map(MemSink::from_segments)
    }
}
