//! What stores a namespace's blocks, and how a lane talks to it.
//!
//! A [`Backend`] is shared: by several subsystems, by every lane that serves one of its namespaces,
//! and with the control plane. It keeps no state of a request. That lives in the [`BackendIo`] that
//! each lane owns: an io_uring (or its stand-in), the operations in flight, and what is done.
//!
//! Who checks what: the controller checks a command against the namespace (range, read-only, data
//! length) because it must answer with the exact status. The backend checks every operation again,
//! because other callers may not have: an operation outside of it is answered with a status, never
//! with a panic, whatever its offset and length are.

mod bounce;
mod counters;
pub mod fault;
mod file;
mod io;
mod job;
mod later;
mod null;
mod pool;
pub mod powercut;
mod ram;
mod syscall;

use std::ops::RangeInclusive;

use memdesc::{MemSink, MemSource, Segment};

use crate::spec::Status;
use crate::transport::Transfer;
pub use counters::{Counters, Counts};
pub use fault::FaultBackend;
pub use file::{FileBackend, OpenError};
pub use io::{BackendIo, Engine};
pub use null::{NullBackend, NullError};
pub use powercut::PowerCutBackend;
pub use ram::{RamBackend, RamError};

/// Shape and abilities of a backend. Constant for its life, but for the number of blocks, which
/// [`Backend::grow`] may raise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of a block: 512 or 4096.
    pub block_size: u32,
    /// Blocks.
    pub block_count: u64,
    /// Nothing can be written.
    pub read_only: bool,
    /// Blocks can be given back.
    pub deallocate: bool,
    /// Blocks that were given back read as zeroes.
    pub deallocated_reads_zeroes: bool,
    /// A completed write may be lost with the power until a flush has completed.
    pub volatile_cache: bool,
}

impl Geometry {
    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.block_count.saturating_mul(u64::from(self.block_size))
    }

    /// True when `offset..offset + len`, in bytes, lies inside.
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        offset
            .checked_add(len)
            .is_some_and(|end| end <= self.bytes())
    }

    /// The byte range of `count` blocks from `lba` on, when they exist.
    pub fn blocks(&self, lba: u64, count: u64) -> Option<(u64, u64)> {
        let end = lba.checked_add(count)?;
        let size = u64::from(self.block_size);
        (end <= self.block_count).then(|| (lba * size, count * size))
    }
}

/// One operation; offsets and lengths are bytes.
#[derive(Debug)]
pub enum BackendOp {
    /// Fills `sink`.
    Read {
        /// From here.
        offset: u64,
        /// All of it.
        sink: MemSink,
    },
    /// Stores `source`.
    Write {
        /// From here.
        offset: u64,
        /// All of it.
        source: MemSource,
        /// On stable storage before it is done.
        fua: bool,
    },
    /// Puts everything that was written on stable storage.
    Flush,
    /// Makes a range read as zeroes.
    WriteZeroes {
        /// From here.
        offset: u64,
        /// So many bytes.
        len: u64,
        /// The range may be given back.
        may_unmap: bool,
        /// On stable storage before it is done.
        fua: bool,
    },
    /// Gives a range back, if that is possible: a hint.
    Deallocate {
        /// From here.
        offset: u64,
        /// So many bytes.
        len: u64,
    },
}

impl BackendOp {
    /// The data of a refused operation, to be given back.
    fn into_transfer(self) -> Transfer {
        match self {
            Self::Read { sink, .. } => Transfer::In(sink),
            Self::Write { source, .. } => Transfer::Out(source),
            _ => Transfer::None,
        }
    }

    /// Offset and length of what is read or changed; nothing for a flush.
    fn extent(&self) -> (u64, u64) {
        match self {
            Self::Read { offset, sink } => (*offset, sink.len() as u64),
            Self::Write { offset, source, .. } => (*offset, source.len() as u64),
            Self::Flush => (0, 0),
            Self::WriteZeroes { offset, len, .. } | Self::Deallocate { offset, len } => {
                (*offset, *len)
            }
        }
    }

    /// The blocks that are read or changed, any part of them.
    fn blocks(&self, block_size: u32) -> Option<RangeInclusive<u64>> {
        let (offset, len) = self.extent();
        let last = offset.saturating_add(len.checked_sub(1)?);
        let size = u64::from(block_size.max(1));
        Some(offset / size..=last / size)
    }

    /// Checks the operation against a geometry.
    fn check(&self, geometry: &Geometry) -> Result<(), Status> {
        let writes = match self {
            Self::Flush => return Ok(()),
            Self::Read { .. } => false,
            Self::Write { .. } | Self::WriteZeroes { .. } | Self::Deallocate { .. } => true,
        };
        let (offset, len) = self.extent();
        if writes && geometry.read_only {
            return Err(Status::WRITE_PROTECTED.do_not_retry());
        }
        if !geometry.contains(offset, len) {
            return Err(Status::LBA_OUT_OF_RANGE.do_not_retry());
        }
        Ok(())
    }
}

/// The end of an operation.
#[derive(Debug)]
pub struct Done {
    /// What [`Backend::submit`] was given.
    pub token: u32,
    /// The data that went with it: the sink of a read, the source of a write.
    pub transfer: Transfer,
    /// How it went.
    pub result: Result<(), Status>,
}

/// Storage of a namespace. See the module for who checks what.
pub trait Backend: Send + Sync {
    /// Shape and abilities.
    fn geometry(&self) -> Geometry;

    /// What was done so far, by whoever shares it.
    fn counters(&self) -> &Counters;

    /// Starts an operation; a [`Done`] with `token`, below 2^31, comes out of `io`, at once or later.
    /// Operations may overtake each other. A flush covers the writes that were done before it was
    /// submitted.
    fn submit(&self, io: &mut BackendIo, op: BackendOp, token: u32);

    /// As [`Self::submit`], of a read whose data a Compare is to look at.
    fn submit_for_compare(&self, io: &mut BackendIo, op: BackendOp, token: u32) {
        self.submit(io, op, token);
    }

    /// The memory itself, to be read in place, where this backend is memory. `list` gives its
    /// storage when the answer is `Some`. Whoever sends it counts it in [`Self::counters`].
    fn source(&self, offset: u64, len: usize, list: &mut Vec<Segment>) -> Option<MemSource> {
        let _ = (offset, len, list);
        None
    }

    /// The memory itself, to be written in place, where this backend is memory and can be written.
    /// As [`Self::source`] otherwise.
    fn sink(&self, offset: u64, len: usize, list: &mut Vec<Segment>) -> Option<MemSink> {
        let _ = (offset, len, list);
        None
    }

    /// Takes over what the storage has grown by since it was opened; true when it has grown. Where it
    /// has shrunk, the blocks that are gone keep failing. Called from the control plane.
    ///
    /// # Errors
    /// What the storage reports.
    fn grow(&self) -> std::io::Result<bool> {
        Ok(false)
    }

    /// Flushes from the control plane, blocking.
    ///
    /// # Errors
    /// What the storage reports.
    fn sync(&self) -> std::io::Result<()> {
        Ok(())
    }
}
