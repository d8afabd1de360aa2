//! What was done with a backend, counted by everyone who shares it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Live counters of one backend. Only what succeeded counts.
#[derive(Debug, Default)]
pub struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    fua_writes: AtomicU64,
    flushes: AtomicU64,
    write_zeroes: AtomicU64,
    deallocates: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    copied_bytes: AtomicU64,
    errors: AtomicU64,
}

/// A reading of [`Counters`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Reads.
    pub reads: u64,
    /// Writes, forced ones among them.
    pub writes: u64,
    /// Writes with force unit access.
    pub fua_writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Write Zeroes.
    pub write_zeroes: u64,
    /// Ranges given back.
    pub deallocates: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written by writes; Write Zeroes is not among them.
    pub written_bytes: u64,
    /// Bytes copied because direct I/O did not take their memory.
    pub copied_bytes: u64,
    /// Operations that failed.
    pub errors: u64,
}

impl Counters {
    /// Counts a read of `bytes`.
    pub fn count_read(&self, bytes: u64) {
        self.reads.fetch_add(1, Relaxed);
        self.read_bytes.fetch_add(bytes, Relaxed);
    }

    /// Counts a write of `bytes`.
    pub fn count_write(&self, bytes: u64, fua: bool) {
        self.writes.fetch_add(1, Relaxed);
        self.fua_writes.fetch_add(u64::from(fua), Relaxed);
        self.written_bytes.fetch_add(bytes, Relaxed);
    }

    /// Counts a flush.
    pub fn count_flush(&self) {
        self.flushes.fetch_add(1, Relaxed);
    }

    /// Counts a Write Zeroes.
    pub fn count_write_zeroes(&self) {
        self.write_zeroes.fetch_add(1, Relaxed);
    }

    /// Counts a range given back.
    pub fn count_deallocate(&self) {
        self.deallocates.fetch_add(1, Relaxed);
    }

    /// Counts `bytes` copied to or from aligned memory.
    pub fn count_copied(&self, bytes: u64) {
        self.copied_bytes.fetch_add(bytes, Relaxed);
    }

    /// Counts an operation that failed.
    pub fn count_error(&self) {
        self.errors.fetch_add(1, Relaxed);
    }

    /// Reads them all.
    pub fn read(&self) -> Counts {
        Counts {
            reads: self.reads.load(Relaxed),
            writes: self.writes.load(Relaxed),
            fua_writes: self.fua_writes.load(Relaxed),
            flushes: self.flushes.load(Relaxed),
            write_zeroes: self.write_zeroes.load(Relaxed),
            deallocates: self.deallocates.load(Relaxed),
            read_bytes: self.read_bytes.load(Relaxed),
            written_bytes: self.written_bytes.load(Relaxed),
            copied_bytes: self.copied_bytes.load(Relaxed),
            errors: self.errors.load(Relaxed),
        }
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "reads={} writes={} fua_writes={} flushes={} write_zeroes={} deallocates={} \
             read_bytes={} written_bytes={} copied_bytes={} errors={}",
            self.reads,
            self.writes,
            self.fua_writes,
            self.flushes,
            self.write_zeroes,
            self.deallocates,
            self.read_bytes,
            self.written_bytes,
            self.copied_bytes,
            self.errors
        )
    }
}
