//! One operation on a file as a sequence of system calls: decides the next, judges the last.
//!
//! Both engines perform the same steps, so short transfers, the end of the file, force unit access
//! and the fallbacks for what a file system lacks are decided here and nowhere else.
//!
//! ```text
//! Read ──▶ (short: again from there · end of file: zeroes) ──▶ done
//! Write ─▶ (short: again from there) ──▶ done
//! Punch ─▶ done | unsupported ─▶ ZeroRange ─▶ done | unsupported ─▶ WriteZeroes ─▶ … ─▶ done
//!            with force unit access, a punch or zero range is followed by Sync
//! ```
//!
//! With direct I/O, a step whose memory is not aligned as the device asks goes through memory that
//! is; its length is then a piece of the operation's.

use std::fs::File;
use std::io;
use std::sync::Arc;

use memdesc::MemSource;

use super::bounce::{self, Bounce};
use super::{BackendOp, Counters, Done};
use crate::spec::Status;
use crate::transport::Transfer;

/// Zeroes written by one call where the file system cannot make them itself.
const ZERO_CHUNK: usize = 1 << 20;
/// Calls that may be interrupted one after another before that counts as an error.
const MAX_RETRIES: u8 = 100;

/// A file, and what is counted about it; shared by the backend and its operations in flight.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) file: File,
    /// With direct I/O: what addresses and lengths of memory have to be multiples of.
    pub(super) alignment: Option<usize>,
    pub(super) counters: Counters,
}

/// What the kernel is to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Read into the vectors.
    Read,
    /// Write from the vectors, on stable storage when `dsync`.
    Write { dsync: bool },
    /// Make a hole in the range, without changing the size.
    Punch,
    /// Zero the range, keeping it allocated.
    ZeroRange,
    /// Put the file's data on stable storage.
    Sync,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    WriteZeroes,
    Deallocate,
}

/// An operation and how far it came.
#[derive(Debug)]
pub(super) struct Job {
    target: Arc<Target>,
    token: u32,
    kind: Kind,
    step: Step,
    offset: u64,
    len: u64,
    done: u64,
    fua: bool,
    retries: u8,
    transfer: Transfer,
    /// Stands in for memory that direct I/O does not take, during the step that it was made for.
    bounce: Option<Box<Bounce>>,
}

impl Job {
    /// An operation that was checked against the geometry.
    pub(super) fn new(target: Arc<Target>, op: BackendOp, token: u32) -> Self {
        let mut job = Self {
            target,
            token,
            kind: Kind::Flush,
            step: Step::Sync,
            offset: 0,
            len: 0,
            done: 0,
            fua: false,
            retries: 0,
            transfer: Transfer::None,
            bounce: None,
        };
        match op {
            BackendOp::Read { offset, sink } => {
                (job.kind, job.step) = (Kind::Read, Step::Read);
                (job.offset, job.len) = (offset, sink.len() as u64);
                job.transfer = Transfer::In(sink);
            }
            BackendOp::Write {
                offset,
                source,
                fua,
            } => {
                (job.kind, job.step) = (Kind::Write, Step::Write { dsync: fua });
                (job.offset, job.len, job.fua) = (offset, source.len() as u64, fua);
                job.transfer = Transfer::Out(source);
            }
            BackendOp::Flush => {}
            BackendOp::WriteZeroes {
                offset,
                len,
                may_unmap,
                fua,
            } => {
                job.kind = Kind::WriteZeroes;
                job.step = if may_unmap {
                    Step::Punch
                } else {
                    Step::ZeroRange
                };
                (job.offset, job.len, job.fua) = (offset, len, fua);
            }
            BackendOp::Deallocate { offset, len } => {
                (job.kind, job.step) = (Kind::Deallocate, Step::Punch);
                (job.offset, job.len) = (offset, len);
            }
        }
        job
    }

    /// The next step.
    pub(super) fn step(&self) -> Step {
        self.step
    }

    /// The file.
    pub(super) fn file(&self) -> &File {
        &self.target.file
    }

    /// Where the next step begins.
    pub(super) fn position(&self) -> u64 {
        self.offset + self.done
    }

    /// Bytes that the next step is to cover at most.
    pub(super) fn remaining(&self) -> u64 {
        self.len - self.done
    }

    /// True when there is nothing to do: an empty range.
    pub(super) fn is_empty(&self) -> bool {
        self.kind != Kind::Flush && self.len == 0
    }

    /// Vectors for the next step, in place of what `out` held; empty when it moves no data.
    pub(super) fn vectors(&mut self, max: usize, out: &mut Vec<libc::iovec>) {
        out.clear();
        let done = self.done as usize;
        let remaining = self.remaining() as usize;
        let covered = match &mut self.transfer {
            Transfer::None => Ok(0),
            Transfer::In(sink) => sink.iovecs(done..done + remaining, max, out),
            // Zeroes: the same memory for every piece.
            Transfer::Out(source) if self.kind == Kind::WriteZeroes => {
                source.iovecs(0..remaining.min(source.len()), max, out)
            }
            Transfer::Out(source) => source.iovecs(done..done + remaining, max, out),
        };
        debug_assert!(covered.is_ok(), "the range of a job is its transfer's");
        match self.target.alignment {
            Some(alignment) if !bounce::is_aligned(out, alignment) => self.bounce(alignment, out),
            _ => self.bounce = None,
        }
    }

    /// Has the next step use memory of our own.
    fn bounce(&mut self, alignment: usize, out: &mut Vec<libc::iovec>) {
        let (done, remaining) = (self.done as usize, self.remaining() as usize);
        let bounce = Bounce::take(&mut self.bounce, remaining, alignment);
        if let Transfer::Out(source) = &self.transfer {
            // The zeroes of a write-zeroes are one piece, used again and again.
            let at = if self.kind == Kind::WriteZeroes {
                0
            } else {
                done
            };
            let copied = source.copy_to(at, bounce.bytes());
            debug_assert!(copied.is_ok(), "the range of a job is its transfer's");
        }
        out.clear();
        out.push(bounce.vector());
    }

    /// Takes `count` bytes that a step moved out of the memory that stood in, if it did.
    fn debounce(&mut self, count: usize) {
        let Some(bounce) = &mut self.bounce else {
            return;
        };
        if let (Transfer::In(sink), Some(bytes)) = (&mut self.transfer, bounce.bytes().get(..count))
        {
            let copied = sink.copy_from(self.done as usize, bytes);
            debug_assert!(copied.is_ok(), "the range of a job is its transfer's");
        }
        self.target.counters.count_copied(count as u64);
    }

    /// Judges a step by what the system call returned (bytes, 0, or a negated error number). `None`
    /// when there is another step to do.
    pub(super) fn advance(&mut self, result: i32) -> Option<Result<(), Status>> {
        if result < 0 {
            return self.failed(-result);
        }
        self.retries = 0;
        match self.step {
            Step::Read if result == 0 => {
                // The file ended early: what is not there reads as zeroes.
                let range = self.done as usize..self.len as usize;
                if let Transfer::In(sink) = &mut self.transfer {
                    let filled = sink.fill(range, 0);
                    debug_assert!(filled.is_ok(), "the range of a job is its transfer's");
                }
                Some(Ok(()))
            }
            Step::Write { .. } if result == 0 => Some(Err(Status::WRITE_FAULT)),
            Step::Read | Step::Write { .. } => {
                let count = u64::from(result.unsigned_abs()).min(self.remaining());
                self.debounce(count as usize);
                self.done += count;
                (self.done == self.len).then_some(Ok(()))
            }
            Step::Punch | Step::ZeroRange if self.fua => {
                self.step = Step::Sync;
                None
            }
            Step::Punch | Step::ZeroRange | Step::Sync => Some(Ok(())),
        }
    }

    fn failed(&mut self, errno: i32) -> Option<Result<(), Status>> {
        if matches!(errno, libc::EINTR | libc::EAGAIN) && self.retries < MAX_RETRIES {
            self.retries += 1;
            return None;
        }
        // Alignment that a device does not take counts as "cannot do it" too.
        let unsupported = matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL);
        match self.step {
            Step::Punch if unsupported && self.kind == Kind::Deallocate => Some(Ok(())),
            Step::Punch if unsupported => {
                self.step = Step::ZeroRange;
                None
            }
            Step::ZeroRange if unsupported => {
                self.step = Step::Write { dsync: self.fua };
                let chunk = usize::try_from(self.len).map_or(ZERO_CHUNK, |len| len.min(ZERO_CHUNK));
                self.transfer = Transfer::Out(MemSource::zeroes(chunk, Vec::new()));
                None
            }
            step => Some(Err(status_of(step, errno))),
        }
    }

    /// Ends the job, counting it.
    pub(super) fn finish(self, result: Result<(), Status>) -> Done {
        let counters = &self.target.counters;
        match (&result, self.kind) {
            (Err(_), _) => counters.count_error(),
            (Ok(()), Kind::Read) => counters.count_read(self.len),
            (Ok(()), Kind::Write) => counters.count_write(self.len, self.fua),
            (Ok(()), Kind::Flush) => counters.count_flush(),
            (Ok(()), Kind::WriteZeroes) => counters.count_write_zeroes(),
            (Ok(()), Kind::Deallocate) => counters.count_deallocate(),
        }
        let transfer = match self.kind {
            Kind::Read | Kind::Write => self.transfer,
            // The zeroes are the job's own.
            _ => Transfer::None,
        };
        Done {
            token: self.token,
            transfer,
            result,
        }
    }
}

/// The status for a system call that failed. "Do not retry" only where trying again cannot help.
fn status_of(step: Step, errno: i32) -> Status {
    match errno {
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Status::CAPACITY_EXCEEDED.do_not_retry(),
        libc::EROFS | libc::EPERM | libc::EBADF | libc::EACCES => {
            Status::WRITE_PROTECTED.do_not_retry()
        }
        libc::ENODEV | libc::ENXIO => Status::NAMESPACE_NOT_READY,
        libc::ENOMEM | libc::EAGAIN | libc::EINTR => Status::INTERNAL_ERROR,
        _ if step == Step::Read => Status::UNRECOVERED_READ_ERROR,
        _ => Status::WRITE_FAULT,
    }
}

/// The error number of the last system call, negated.
pub(super) fn last_error() -> i32 {
    -io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use memdesc::MemSink;

    fn target() -> Arc<Target> {
        Arc::new(Target {
            file: File::open("/dev/null").unwrap(),
            alignment: None,
            counters: Counters::default(),
        })
    }

    fn zeroes(may_unmap: bool, fua: bool, len: u64) -> Job {
        let op = BackendOp::WriteZeroes {
            offset: 0,
            len,
            may_unmap,
            fua,
        };
        Job::new(target(), op, 7)
    }

    #[test]
    fn a_short_read_goes_on_where_it_stopped_and_the_missing_tail_is_zero() {
        let sink = MemSink::from_bytes(vec![0xff; 1024]);
        let mut job = Job::new(target(), BackendOp::Read { offset: 512, sink }, 1);
        assert_eq!(job.advance(100), None);
        assert_eq!((job.position(), job.remaining()), (612, 924));
        let mut vectors = Vec::new();
        job.vectors(8, &mut vectors);
        assert_eq!(vectors.iter().map(|v| v.iov_len).sum::<usize>(), 924);
        assert_eq!(job.advance(0), Some(Ok(())));
        let done = job.finish(Ok(()));
        let Transfer::In(sink) = done.transfer else {
            panic!("a read gives its sink back");
        };
        let bytes = sink.into_parts().1.unwrap();
        assert!(bytes[..100].iter().all(|&b| b == 0xff) && bytes[100..].iter().all(|&b| b == 0));
    }

    #[test]
    fn a_short_write_goes_on_where_it_stopped_and_no_progress_is_a_fault() {
        let source = MemSource::from_bytes(vec![1; 512]);
        let op = BackendOp::Write {
            offset: 0,
            source,
            fua: true,
        };
        let mut job = Job::new(target(), op, 1);
        assert_eq!(job.step(), Step::Write { dsync: true });
        assert_eq!(job.advance(511), None);
        assert_eq!(job.remaining(), 1);
        assert_eq!(job.advance(0), Some(Err(Status::WRITE_FAULT)));
    }

    #[test]
    fn zeroes_fall_back_from_hole_to_zero_range_to_writing_them_in_pieces() {
        let mut job = zeroes(true, false, (ZERO_CHUNK + 512) as u64);
        assert_eq!(job.step(), Step::Punch);
        assert_eq!(job.advance(-libc::EOPNOTSUPP), None);
        assert_eq!(job.step(), Step::ZeroRange);
        assert_eq!(job.advance(-libc::EOPNOTSUPP), None);
        assert_eq!(job.step(), Step::Write { dsync: false });
        let mut vectors = Vec::new();
        job.vectors(1024, &mut vectors);
        let first: usize = vectors.iter().map(|v| v.iov_len).sum();
        assert_eq!(first, ZERO_CHUNK);
        assert_eq!(job.advance(first as i32), None);
        job.vectors(1024, &mut vectors);
        assert_eq!(vectors.iter().map(|v| v.iov_len).sum::<usize>(), 512);
        assert_eq!(job.advance(512), Some(Ok(())));
        assert!(matches!(job.finish(Ok(())).transfer, Transfer::None));
    }

    #[test]
    fn forced_zeroes_are_synced_after_the_hole() {
        let mut job = zeroes(true, true, 4096);
        assert_eq!(job.advance(0), None);
        assert_eq!(job.step(), Step::Sync);
        assert_eq!(job.advance(0), Some(Ok(())));
    }

    #[test]
    fn a_hint_that_the_file_system_cannot_take_is_no_error() {
        let op = BackendOp::Deallocate {
            offset: 0,
            len: 4096,
        };
        let mut job = Job::new(target(), op, 1);
        assert_eq!(job.advance(-libc::EOPNOTSUPP), Some(Ok(())));
    }

    #[test]
    fn interrupted_calls_are_repeated_but_not_for_ever() {
        let mut job = zeroes(true, false, 4096);
        for _ in 0..MAX_RETRIES {
            assert_eq!(job.advance(-libc::EINTR), None);
        }
        assert_eq!(job.advance(-libc::EINTR), Some(Err(Status::INTERNAL_ERROR)));
    }

    #[test]
    fn errors_become_the_status_that_a_host_can_act_on() {
        let write = Step::Write { dsync: false };
        assert_eq!(
            status_of(write, libc::ENOSPC),
            Status::CAPACITY_EXCEEDED.do_not_retry()
        );
        assert_eq!(status_of(write, libc::EIO), Status::WRITE_FAULT);
        assert_eq!(
            status_of(Step::Read, libc::EIO),
            Status::UNRECOVERED_READ_ERROR
        );
        assert_eq!(status_of(Step::Sync, libc::EIO), Status::WRITE_FAULT);
        assert_eq!(
            status_of(write, libc::EROFS),
            Status::WRITE_PROTECTED.do_not_retry()
        );
    }
}
