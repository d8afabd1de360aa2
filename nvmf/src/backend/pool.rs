//! The stand-in for io_uring where the kernel or a container refuses it: a few blocking threads.
//!
//! One pool serves the whole process; it is started by the first job that needs it. Each lane has a
//! [`Mailbox`] that finished jobs come back to, with a descriptor that wakes the lane.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use super::job::Job;
use super::syscall::perform;
use crate::spec::Status;

/// Threads of the pool: enough to keep a disk busy, few enough not to matter.
const THREADS: usize = 4;

static POOL: OnceLock<Pool> = OnceLock::new();

type Finished = (Job, Result<(), Status>);

struct Pool {
    jobs: Mutex<VecDeque<(Job, Arc<Return>)>>,
    work: Condvar,
    threads: OnceLock<usize>,
}

struct Return {
    finished: Mutex<VecDeque<Finished>>,
    arrived: Condvar,
    wake: UnixStream,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that holds these locks can leave them half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    fn shared() -> &'static Self {
        POOL.get_or_init(|| Self {
            jobs: Mutex::new(VecDeque::new()),
            work: Condvar::new(),
            threads: OnceLock::new(),
        })
    }

    fn push(&'static self, job: Job, back: Arc<Return>) {
        let threads = *self.threads.get_or_init(|| {
            (0..THREADS)
                .filter(|n| {
                    std::thread::Builder::new()
                        .name(format!("file-io-{n}"))
                        .spawn(|| self.run())
                        .is_ok()
                })
                .count()
        });
        if threads == 0 {
            // Not even one thread: slow is better than never.
            let mut vectors = Vec::new();
            back.finish(Self::complete(job, &mut vectors));
            return;
        }
        lock(&self.jobs).push_back((job, back));
        self.work.notify_one();
    }

    fn run(&self) {
        let mut vectors = Vec::new();
        loop {
            let mut jobs = lock(&self.jobs);
            let (job, back) = loop {
                match jobs.pop_front() {
                    Some(next) => break next,
                    None => {
                        jobs = self.work.wait(jobs).unwrap_or_else(PoisonError::into_inner);
                    }
                }
            };
            drop(jobs);
            back.finish(Self::complete(job, &mut vectors));
        }
    }

    fn complete(mut job: Job, vectors: &mut Vec<libc::iovec>) -> Finished {
        loop {
            let result = perform(&mut job, vectors);
            if let Some(result) = job.advance(result) {
                return (job, result);
            }
        }
    }
}

impl Return {
    fn finish(&self, finished: Finished) {
        let mut list = lock(&self.finished);
        let first = list.is_empty();
        list.push_back(finished);
        drop(list);
        self.arrived.notify_all();
        if first {
            // A full socket buffer holds a wake-up already.
            let _ = (&self.wake).write(&[0]);
        }
    }
}

/// A lane's side of the pool.
pub(super) struct Mailbox {
    back: Arc<Return>,
    wake: UnixStream,
    in_flight: usize,
}

impl Mailbox {
    /// A mailbox with nothing in flight.
    ///
    /// # Errors
    /// No descriptor left.
    pub(super) fn new() -> io::Result<Self> {
        let (wake, other) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        other.set_nonblocking(true)?;
        Ok(Self {
            back: Arc::new(Return {
                finished: Mutex::new(VecDeque::new()),
                arrived: Condvar::new(),
                wake: other,
            }),
            wake,
            in_flight: 0,
        })
    }

    /// The descriptor that becomes readable when a job has finished.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Jobs that have not come back.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Gives a job to the pool.
    pub(super) fn push(&mut self, job: Job) {
        self.in_flight += 1;
        Pool::shared().push(job, Arc::clone(&self.back));
    }

    /// Empties the wake-up descriptor, after it was readable.
    pub(super) fn acknowledge(&mut self) {
        let mut bytes = [0; 64];
        while matches!(self.wake.read(&mut bytes), Ok(n) if n == bytes.len()) {}
    }

    /// The next job that came to its end.
    pub(super) fn take(&mut self) -> Option<Finished> {
        let finished = lock(&self.back.finished).pop_front()?;
        self.in_flight -= 1;
        Some(finished)
    }

    /// Waits until a job has finished.
    pub(super) fn wait(&mut self) {
        if self.in_flight == 0 {
            return;
        }
        let mut list = lock(&self.back.finished);
        while list.is_empty() {
            list = self
                .back
                .arrived
                .wait(list)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        // Jobs may describe memory that goes away with the lane.
        while self.in_flight > 0 {
            self.wait();
            while self.take().is_some() {}
        }
    }
}
