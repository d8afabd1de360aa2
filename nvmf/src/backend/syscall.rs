//! Hands the steps of file jobs to the kernel: through an io_uring, or as blocking calls.
//!
//! The only `unsafe` of file backends. What it promises: memory named in a submission (the vectors
//! and what they point to) stays where it is until its completion was taken, also when the ring is
//! dropped with work in flight.

#![expect(
    unsafe_code,
    reason = "vectors are handed to the kernel, which std does not offer at an offset"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};

use super::job::{Job, Step, last_error};

/// Operations that one ring has in flight.
const DEPTH: u32 = 128;
/// Vectors in one call: the kernel's own limit (IOV_MAX).
const MAX_VECTORS: usize = 1024;

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Performs a job's next step, blocking. Returns what the call did: bytes, 0, or a negated error
/// number.
pub(super) fn perform(job: &mut Job, vectors: &mut Vec<libc::iovec>) -> i32 {
    job.vectors(MAX_VECTORS, vectors);
    let fd = job.file().as_raw_fd();
    let (offset, len) = (job.position() as i64, job.remaining() as i64);
    let count = vectors.len() as i32;
    let result = match job.step() {
        // SAFETY: the vectors describe memory that the job holds, and the call ends before it goes.
        Step::Read => unsafe { libc::preadv(fd, vectors.as_ptr(), count, offset) },
        Step::Write { dsync } => {
            let flags = if dsync { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as above; the memory is only read.
            unsafe { libc::pwritev2(fd, vectors.as_ptr(), count, offset, flags) }
        }
        // SAFETY: no memory is involved.
        Step::Punch => unsafe { libc::fallocate(fd, PUNCH, offset, len) as isize },
        // SAFETY: no memory is involved.
        Step::ZeroRange => unsafe { libc::fallocate(fd, ZERO_RANGE, offset, len) as isize },
        // SAFETY: no memory is involved.
        Step::Sync => unsafe { libc::fdatasync(fd) as isize },
    };
    if result < 0 {
        return last_error();
    }
    i32::try_from(result).unwrap_or(i32::MAX)
}

/// Vectors for the kernel: addresses that nothing here follows.
#[derive(Default)]
struct Vectors(Vec<libc::iovec>);

// SAFETY: an address is the same on every thread, and only the kernel follows these; who may use the
// memory is the job's business.
unsafe impl Send for Vectors {}

#[derive(Default)]
struct Slot {
    job: Option<Job>,
    vectors: Vectors,
}

/// An io_uring and the jobs whose steps it performs.
pub(super) struct Ring {
    ring: IoUring,
    slots: Vec<Slot>,
    free: Vec<u32>,
}

impl Ring {
    /// Sets a ring up.
    ///
    /// # Errors
    /// The kernel has no io_uring, forbids it, or lacks an operation that is needed.
    pub(super) fn new() -> io::Result<Self> {
        let ring = IoUring::new(DEPTH)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        if !needed.iter().all(|&code| probe.is_supported(code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            ring,
            slots: (0..DEPTH).map(|_| Slot::default()).collect(),
            free: (0..DEPTH).rev().collect(),
        })
    }

    /// The descriptor that becomes readable when a completion is there.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring keeps its descriptor open, and the answer borrows the ring.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// True when no further job can be taken now.
    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Jobs that the ring holds.
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes a job; its first step begins with the next [`Self::submit`]. Gives it back when full.
    pub(super) fn push(&mut self, job: Job) -> Result<(), Job> {
        let Some(index) = self.free.pop() else {
            return Err(job);
        };
        self.slots[index as usize].job = Some(job);
        self.queue(index);
        Ok(())
    }

    fn queue(&mut self, index: u32) {
        let Slot { job, vectors } = &mut self.slots[index as usize];
        let Some(job) = job else { return };
        job.vectors(MAX_VECTORS, &mut vectors.0);
        let entry = entry(job, &vectors.0).user_data(u64::from(index));
        // SAFETY: the job stays in its slot, and with it the memory of its transfer, and the slot's
        // vectors stay untouched, until `take` has seen the completion. Dropping waits for that.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // Every slot has at most one entry, and there are as many entries as slots.
        debug_assert!(pushed.is_ok(), "there is an entry for every slot");
    }

    /// Gives the kernel what was queued, in one call. True when it did not take everything, so that
    /// this must be called again.
    pub(super) fn submit(&mut self) -> bool {
        if self.ring.submission().is_empty() {
            return false;
        }
        // Errors are the passing kind (interrupted, or completions have to be taken first).
        let _ = self.ring.submit();
        !self.ring.submission().is_empty()
    }

    /// The next job that came to its end, with its result. Jobs that need a further step are queued
    /// again on the way.
    pub(super) fn take(&mut self) -> Option<(Job, Result<(), crate::spec::Status>)> {
        loop {
            let completion = self.ring.completion().next()?;
            let index = completion.user_data() as u32;
            let slot = self.slots.get_mut(index as usize)?;
            let mut job = slot.job.take()?;
            match job.advance(completion.result()) {
                Some(result) => {
                    self.free.push(index);
                    return Some((job, result));
                }
                None => {
                    slot.job = Some(job);
                    self.queue(index);
                }
            }
        }
    }

    /// Waits until a completion is there, submitting what is queued.
    pub(super) fn wait(&mut self) {
        // Interrupted waits end early; callers look and come back.
        let _ = self.ring.submit_and_wait(1);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel may still write to, or read from, what the jobs hold. Their current step is
        // waited for (queued entries cannot be taken back, so they run too); further ones are not
        // begun.
        let mut running = self.in_flight();
        while running > 0 {
            self.wait();
            while self.ring.completion().next().is_some() {
                running -= 1;
            }
        }
    }
}

fn entry(job: &Job, vectors: &[libc::iovec]) -> squeue::Entry {
    let fd = Fd(job.file().as_raw_fd());
    let count = vectors.len() as u32;
    match job.step() {
        Step::Read => opcode::Readv::new(fd, vectors.as_ptr(), count)
            .offset(job.position())
            .build(),
        Step::Write { dsync } => opcode::Writev::new(fd, vectors.as_ptr(), count)
            .offset(job.position())
            .rw_flags(if dsync { libc::RWF_DSYNC } else { 0 })
            .build(),
        Step::Punch => opcode::Fallocate::new(fd, job.remaining())
            .offset(job.position())
            .mode(PUNCH)
            .build(),
        Step::ZeroRange => opcode::Fallocate::new(fd, job.remaining())
            .offset(job.position())
            .mode(ZERO_RANGE)
            .build(),
        Step::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
    }
}
