//! What the load generator needs of a disk: requests in, finished slots out, and a way to wait.

use std::io;
use std::time::Duration;

/// Most requests in flight; slots are numbered below it.
pub(crate) const MAX_DEPTH: usize = 128;
/// Bytes of a sector, the unit of positions.
pub(crate) const SECTOR: u64 = 512;
/// Most bytes of one request.
pub(crate) const MAX_LEN: usize = 128 << 10;

/// Which way the data of a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// One request for the buffer of a slot.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request {
    /// Which way.
    pub(crate) direction: Direction,
    /// First sector.
    pub(crate) sector: u64,
    /// Bytes, at most [`MAX_LEN`].
    pub(crate) len: usize,
}

/// One queue of a disk. A slot is in flight from `submit` until `finished` gives it back.
pub(crate) trait Link {
    /// Sectors of the disk.
    fn sectors(&self) -> u64;
    /// Prepares a request; it is seen by the other side with the next `publish`.
    fn submit(&mut self, slot: usize, request: Request);
    /// Shows what was prepared, and wakes the other side if it asked for that.
    ///
    /// # Errors
    /// It cannot be woken.
    fn publish(&mut self) -> io::Result<()>;
    /// The slot of a request that is finished, if there is one.
    ///
    /// # Errors
    /// The request failed, or the other side broke the protocol.
    fn finished(&mut self) -> io::Result<Option<usize>>;
    /// Waits until something is finished; returns early now and then.
    ///
    /// # Errors
    /// Nothing was for as long as `timeout`.
    fn wait(&mut self, timeout: Duration) -> io::Result<()>;
    /// Fills the buffer of a slot that is not in flight.
    fn fill(&mut self, slot: usize, bytes: &[u8]);
    /// Reads the buffer of a slot that is not in flight.
    fn read(&self, slot: usize, bytes: &mut [u8]);
}
