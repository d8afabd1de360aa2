//! A decorator with a volatile write cache, whose content is lost when the power goes.
//!
//! A write is answered when it is in the cache. A flush moves what is there to the backend below, which
//! stands for the medium, and then flushes that; a write with force unit access goes past the cache. When
//! the cache is full, blocks from a place that is up to chance make room, so that what is on the medium is
//! what a disk might have there: any subset of what was not flushed.
//!
//! The power goes with the process, or by [`PowerCutBackend::cut`].
//!
//! Blocks move to the medium for one operation at a time, whatever lane it is of: so two versions of a block
//! are never on their way at once. An operation that finds it so tries again a little later.

mod cache;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use memdesc::MemSource;

use super::fault::mix;
use super::later::Step;
use super::{Backend, BackendIo, BackendOp, Counters, Done, Engine, Geometry};
use crate::spec::Status;
use crate::transport::Transfer;
use cache::{Cache, RUN, Run};

/// Until an operation looks again whether it may move blocks to the medium.
const PAUSE: Duration = Duration::from_micros(500);
/// Fewer blocks make no cache.
const LEAST_BLOCKS: u64 = 16;
/// Time that [`PowerCutBackend::sync`] waits for its turn.
const SYNC_PATIENCE: Duration = Duration::from_secs(10);

/// What a power cut leaves of the blocks that were written and not flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survivors {
    /// Nothing.
    None,
    /// Each block with even odds; the seed decides which.
    Random {
        /// The seed.
        seed: u64,
    },
}

/// What became of the blocks that were written and not flushed, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cut {
    /// Blocks that are as they were before.
    pub lost: Vec<u64>,
    /// Blocks that are as they were written.
    pub kept: Vec<u64>,
}

/// Why the power cannot be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CutError {
    /// Blocks are on their way to the medium.
    #[error("blocks are on their way to the medium; try again")]
    Busy,
    /// The medium does not take what survives.
    #[error("the medium failed: {0}")]
    Medium(Status),
}

struct Shared {
    inner: Arc<dyn Backend>,
    geometry: Geometry,
    counters: Counters,
    cache: Mutex<Cache>,
}

/// See the module.
pub struct PowerCutBackend(Arc<Shared>);

impl PowerCutBackend {
    /// Over a backend that stands for the medium, with a cache of at most `size` bytes (but of 16 blocks).
    /// The seed decides what makes room.
    pub fn new(inner: Arc<dyn Backend>, size: u64, seed: u64) -> Self {
        let below = inner.geometry();
        let blocks = (size / u64::from(below.block_size)).max(LEAST_BLOCKS);
        let capacity = usize::try_from(blocks).unwrap_or(usize::MAX);
        Self(Arc::new(Shared {
            geometry: Geometry {
                volatile_cache: true,
                // A large range that is given back stays as it is.
                deallocated_reads_zeroes: false,
                ..below
            },
            inner,
            counters: Counters::default(),
            cache: Mutex::new(Cache::new(below.block_size, capacity, seed)),
        }))
    }

    /// Blocks that a power cut would take.
    pub fn volatile_blocks(&self) -> usize {
        self.0.cache().len()
    }

    /// Cuts the power, and turns it on again at once. Blocks for as long as the medium takes for what
    /// survives. Writes that are in flight come before or after it.
    ///
    /// # Errors
    /// [`CutError`]; nothing is lost when it is [`CutError::Busy`].
    pub fn cut(&self, survivors: Survivors) -> Result<Cut, CutError> {
        let role = Role::take(&self.0).ok_or(CutError::Busy)?;
        let survives = |block| match survivors {
            Survivors::None => false,
            Survivors::Random { seed } => mix(seed, block).is_multiple_of(2),
        };
        let mut cut = Cut {
            lost: self.0.cache().lose(survives),
            kept: Vec::new(),
        };
        let kept = role.move_all().map_err(CutError::Medium)?;
        cut.kept = kept;
        Ok(cut)
    }
}

impl Shared {
    fn cache(&self) -> MutexGuard<'_, Cache> {
        // Nothing that holds it can panic half-way.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn size(&self) -> u64 {
        u64::from(self.geometry.block_size)
    }

    fn check(&self, op: &BackendOp) -> Result<(), Status> {
        op.check(&self.geometry)?;
        let (offset, len) = op.extent();
        match offset.is_multiple_of(self.size()) && len.is_multiple_of(self.size()) {
            true => Ok(()),
            false => Err(Status::INVALID_FIELD.do_not_retry()),
        }
    }

    fn finish(&self, io: &mut BackendIo, token: u32, op: BackendOp, result: Result<(), Status>) {
        match (&op, result) {
            (_, Err(_)) => self.counters.count_error(),
            (BackendOp::Read { sink, .. }, _) => self.counters.count_read(sink.len() as u64),
            (BackendOp::Write { source, fua, .. }, _) => {
                self.counters.count_write(source.len() as u64, *fua);
            }
            (BackendOp::Flush, _) => self.counters.count_flush(),
            (BackendOp::WriteZeroes { .. }, _) => self.counters.count_write_zeroes(),
            (BackendOp::Deallocate { .. }, _) => self.counters.count_deallocate(),
        }
        io.finish(token, op.into_transfer(), result);
    }
}

/// The right to move blocks to the medium: one operation has it at a time.
struct Role(Arc<Shared>);

impl Role {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        let mut cache = shared.cache();
        if std::mem::replace(&mut cache.busy, true) {
            return None;
        }
        Some(Self(Arc::clone(shared)))
    }

    /// Moves everything, blocking; which blocks it was.
    fn move_all(&self) -> Result<Vec<u64>, Status> {
        let shared = &self.0;
        let mut moved = Vec::new();
        let mut from = 0;
        loop {
            let Some(run) = shared.cache().run(from, RUN) else {
                return Ok(moved);
            };
            from = run.first + run.blocks();
            let op = write(shared, &run, run.bytes.clone());
            perform(&*shared.inner, op)?;
            shared.cache().retire(&run);
            moved.extend(run.first..from);
        }
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        self.0.cache().busy = false;
    }
}

fn write(shared: &Shared, run: &Run, bytes: Vec<u8>) -> BackendOp {
    BackendOp::Write {
        offset: run.first * shared.size(),
        source: MemSource::from_bytes(bytes),
        fua: false,
    }
}

/// Performs an operation, blocking.
fn perform(backend: &dyn Backend, op: BackendOp) -> Result<(), Status> {
    let mut io = BackendIo::new(Engine::Auto);
    backend.submit(&mut io, op, 0);
    loop {
        io.flush();
        if let Some(done) = io.done() {
            return done.result;
        }
        io.wait();
    }
}

/// An operation and where it is answered.
struct Operation {
    shared: Arc<Shared>,
    op: BackendOp,
    token: u32,
}

impl Operation {
    fn finish(self, io: &mut BackendIo, result: Result<(), Status>) {
        self.shared.finish(io, self.token, self.op, result);
    }

    /// Begins, or begins again.
    fn begin(self, io: &mut BackendIo) {
        let (offset, len) = self.op.extent();
        let (first, count) = (offset / self.shared.size(), len / self.shared.size());
        let mut cache = self.shared.cache();
        let too_much = cache.is_too_much(count);
        let stored = match &self.op {
            BackendOp::Read { .. } => {
                let generation = cache.generation();
                drop(cache);
                return self.read(io, generation);
            }
            BackendOp::Flush => {
                drop(cache);
                return self.destage(io);
            }
            BackendOp::Write { fua: true, .. } | BackendOp::WriteZeroes { fua: true, .. } => {
                drop(cache);
                return self.through(io);
            }
            // Only a hint.
            BackendOp::Deallocate { .. } if too_much => true,
            _ if too_much => {
                drop(cache);
                return self.through(io);
            }
            BackendOp::Write { source, .. } => cache.store(first, source),
            _ => cache.store_zeroes(first, count),
        };
        drop(cache);
        match stored {
            true => self.finish(io, Ok(())),
            false => self.destage(io),
        }
    }

    fn read(self, io: &mut BackendIo, generation: u64) {
        let Self { shared, op, token } = self;
        let BackendOp::Read { offset, sink } = op else {
            return;
        };
        let inner = Arc::clone(&shared.inner);
        let step = Reading {
            shared,
            offset,
            token,
            generation,
        };
        let token = io.follow(Box::new(step));
        inner.submit(io, BackendOp::Read { offset, sink }, token);
    }

    /// Moves blocks to the medium: all for a flush, and some to make room.
    fn destage(self, io: &mut BackendIo) {
        let Some(role) = Role::take(&self.shared) else {
            return io.wait_for(Some(PAUSE), Box::new(self), false);
        };
        let moving = Destaging {
            operation: self,
            role,
            from: 0,
            run: None,
        };
        moving.next(io);
    }

    /// Does it to the medium, past the cache.
    fn through(self, io: &mut BackendIo) {
        let Some(role) = Role::take(&self.shared) else {
            return io.wait_for(Some(PAUSE), Box::new(self), false);
        };
        let Self { shared, op, token } = self;
        let inner = Arc::clone(&shared.inner);
        let (offset, len) = op.extent();
        let fua = matches!(
            op,
            BackendOp::Write { fua: true, .. } | BackendOp::WriteZeroes { fua: true, .. }
        );
        let until = shared.cache().writes();
        let step = Through {
            until,
            shared,
            token,
            role,
            offset,
            len,
            fua,
        };
        let token = io.follow(Box::new(step));
        inner.submit(io, op, token);
    }
}

impl Step for Operation {
    fn resume(self: Box<Self>, io: &mut BackendIo, _done: Option<Done>) {
        self.begin(io);
    }

    fn abandon(self: Box<Self>, io: &mut BackendIo) {
        self.finish(io, Err(Status::ABORTED_SQ_DELETION));
    }
}

/// A read of the medium, to which what is kept is added.
struct Reading {
    shared: Arc<Shared>,
    offset: u64,
    token: u32,
    /// Of the cache when it began.
    generation: u64,
}

impl Step for Reading {
    fn resume(self: Box<Self>, io: &mut BackendIo, done: Option<Done>) {
        let Self {
            shared,
            offset,
            token,
            generation,
        } = *self;
        let Some(Done {
            transfer: Transfer::In(mut sink),
            result,
            ..
        }) = done
        else {
            return io.finish(token, Transfer::None, Err(Status::INTERNAL_ERROR));
        };
        if result.is_ok() {
            let cache = shared.cache();
            if cache.generation() != generation {
                // Blocks have left the cache since: the medium may have been read before they came.
                drop(cache);
                let op = BackendOp::Read { offset, sink };
                return Operation { shared, op, token }.begin(io);
            }
            cache.patch(offset / shared.size(), &mut sink);
        }
        shared.finish(io, token, BackendOp::Read { offset, sink }, result);
    }
}

/// An operation during which blocks move to the medium.
struct Destaging {
    operation: Operation,
    role: Role,
    /// Where a flush goes on.
    from: u64,
    /// On its way.
    run: Option<Run>,
}

impl Destaging {
    fn next(mut self, io: &mut BackendIo) {
        let shared = Arc::clone(&self.operation.shared);
        let is_flush = matches!(self.operation.op, BackendOp::Flush);
        let run = match is_flush {
            true => shared.cache().run(self.from, RUN),
            false => shared.cache().victim(),
        };
        let op = match run {
            Some(mut run) => {
                self.from = run.first + run.blocks();
                let bytes = std::mem::take(&mut run.bytes);
                let op = write(&shared, &run, bytes);
                self.run = Some(run);
                op
            }
            None if is_flush => BackendOp::Flush,
            // Somebody else has made room.
            None => return self.again(io),
        };
        let token = io.follow(Box::new(self));
        shared.inner.submit(io, op, token);
    }

    fn again(self, io: &mut BackendIo) {
        let Self {
            operation, role, ..
        } = self;
        drop(role);
        operation.begin(io);
    }
}

impl Step for Destaging {
    fn resume(mut self: Box<Self>, io: &mut BackendIo, done: Option<Done>) {
        let result = done.map_or(Err(Status::INTERNAL_ERROR), |done| done.result);
        let run = self.run.take();
        match (result, run) {
            (Ok(()), Some(run)) => {
                self.operation.shared.cache().retire(&run);
                match self.operation.op {
                    BackendOp::Flush => self.next(io),
                    _ => self.again(io),
                }
            }
            // The flush of the medium, or what failed.
            (result, _) => {
                let Self {
                    operation, role, ..
                } = *self;
                drop(role);
                operation.finish(io, result);
            }
        }
    }
}

/// A write that the medium performs itself.
struct Through {
    shared: Arc<Shared>,
    token: u32,
    role: Role,
    offset: u64,
    len: u64,
    fua: bool,
    /// The last write before it.
    until: u64,
}

impl Step for Through {
    fn resume(self: Box<Self>, io: &mut BackendIo, done: Option<Done>) {
        let Self {
            shared,
            token,
            role,
            offset,
            len,
            fua,
            until,
        } = *self;
        let (transfer, result) = match done {
            Some(done) => (done.transfer, done.result),
            None => (Transfer::None, Err(Status::INTERNAL_ERROR)),
        };
        if result.is_ok() {
            let (first, count) = (offset / shared.size(), len / shared.size());
            shared.cache().supersede(first, count, until);
        }
        drop(role);
        let op = match transfer {
            Transfer::Out(source) => BackendOp::Write {
                offset,
                source,
                fua,
            },
            _ => BackendOp::WriteZeroes {
                offset,
                len,
                may_unmap: false,
                fua,
            },
        };
        shared.finish(io, token, op, result);
    }
}

impl Backend for PowerCutBackend {
    fn geometry(&self) -> Geometry {
        self.0.geometry
    }

    fn counters(&self) -> &Counters {
        &self.0.counters
    }

    fn submit(&self, io: &mut BackendIo, op: BackendOp, token: u32) {
        let shared = Arc::clone(&self.0);
        if let Err(status) = shared.check(&op) {
            return shared.finish(io, token, op, Err(status));
        }
        Operation { shared, op, token }.begin(io);
        // A medium that is memory is done already.
        io.settle();
    }

    /// As at an orderly shutdown: all that was written is on the medium afterwards.
    fn sync(&self) -> io::Result<()> {
        let until = std::time::Instant::now() + SYNC_PATIENCE;
        let role = loop {
            match Role::take(&self.0) {
                Some(role) => break role,
                None if std::time::Instant::now() < until => std::thread::sleep(PAUSE),
                None => return Err(io::ErrorKind::TimedOut.into()),
            }
        };
        let moved = role.move_all();
        moved.map_err(|status| io::Error::other(status.to_string()))?;
        self.0.inner.sync()
    }
}
