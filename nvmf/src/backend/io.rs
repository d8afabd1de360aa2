//! A lane's side of its backends: what is in flight, what waits, and what is done.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Once;
use std::time::Duration;

use super::Done;
use super::job::Job;
use super::later::{Clock, Later, Step};
use super::pool::Mailbox;
use super::syscall::Ring;
use crate::spec::Status;
use crate::transport::{Ready, Transfer};

/// How file operations reach the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// An io_uring; threads where that is refused.
    #[default]
    Auto,
    /// An io_uring; operations fail where that is refused.
    Uring,
    /// A pool of threads.
    Threads,
}

enum State {
    Unused,
    Ring(Box<Ring>),
    Threads(Mailbox),
    Failed,
}

impl State {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Unused | Self::Failed => None,
            Self::Ring(ring) => Some(ring.fd()),
            Self::Threads(mailbox) => Some(mailbox.fd()),
        }
    }
}

/// Owned by one lane. The engine is made by the first operation that needs one, so a lane over
/// memory has none.
///
/// Operations that do not fit wait in order. Dropping it waits for the kernel to let go of every
/// buffer; what had not begun is dropped.
pub struct BackendIo {
    engine: Engine,
    state: State,
    backlog: VecDeque<Job>,
    done: VecDeque<Done>,
    generation: u64,
    /// What decorators have left for later; made by the first that does. After the engine, which
    /// may use memory of theirs.
    later: Option<Box<Later>>,
    #[cfg(feature = "sim")]
    simulated: Option<crate::sim::Mailbox>,
}

impl BackendIo {
    /// With nothing in flight and no engine yet.
    pub fn new(engine: Engine) -> Self {
        Self {
            engine,
            state: State::Unused,
            backlog: VecDeque::new(),
            done: VecDeque::new(),
            generation: 0,
            later: None,
            #[cfg(feature = "sim")]
            simulated: None,
        }
    }

    /// Changes when [`Self::descriptor`] does.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What becomes readable when something is done; `None` before the first operation that needs
    /// an engine.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self.clock() {
            Some(clock) => Some(clock.fd()),
            None => self.state.descriptor(),
        }
    }

    fn clock(&self) -> Option<&Clock> {
        self.later.as_ref().and_then(|later| later.clock())
    }

    /// Operations that were submitted and whose [`Done`] was not taken.
    pub fn in_flight(&self) -> usize {
        #[cfg(feature = "sim")]
        if let Some(mailbox) = &self.simulated {
            return mailbox.in_flight() + self.done.len();
        }
        let engine = match &self.state {
            State::Unused | State::Failed => 0,
            State::Ring(ring) => ring.in_flight(),
            State::Threads(mailbox) => mailbox.in_flight(),
        };
        let waiting = self.later.as_ref().map_or(0, |later| later.waiting());
        engine + self.backlog.len() + self.done.len() + waiting
    }

    /// Operations are done, and no descriptor says so: what was not taken of [`Self::finish`].
    pub fn has_done(&self) -> bool {
        !self.done.is_empty()
    }

    /// Reports an operation as done: for backends that need no engine, and for refusals.
    pub fn finish(&mut self, token: u32, transfer: Transfer, result: Result<(), Status>) {
        self.done.push_back(Done {
            token,
            transfer,
            result,
        });
    }

    /// Starts a job, or lets it wait until there is room.
    pub(super) fn push(&mut self, job: Job) {
        if job.is_empty() {
            return self.done.push_back(job.finish(Ok(())));
        }
        if matches!(self.state, State::Unused) {
            self.open();
        }
        match &mut self.state {
            State::Ring(ring) if self.backlog.is_empty() => {
                if let Err(job) = ring.push(job) {
                    self.backlog.push_back(job);
                }
            }
            State::Ring(_) => self.backlog.push_back(job),
            State::Threads(mailbox) => mailbox.push(job),
            State::Unused | State::Failed => {
                self.done.push_back(job.finish(Err(Status::INTERNAL_ERROR)));
            }
        }
    }

    /// Gives the kernel what was submitted since the last call, in one system call. True when it
    /// must be called again without sleeping.
    pub fn flush(&mut self) -> bool {
        match &mut self.state {
            State::Ring(ring) => ring.submit(),
            _ => false,
        }
    }

    fn open(&mut self) {
        self.state = open(self.engine);
        self.generation += 1;
        if let (Some(clock), Some(engine)) = (self.clock(), self.state.descriptor())
            && let Err(error) = clock.add(engine)
        {
            tracing::error!("files cannot be served: {error}");
            self.state = State::Failed;
        }
    }

    /// Leaves a step for later: after a time, or when the lane is over. It is abandoned where that
    /// is not possible. One that is `firm` comes after its time even if the lane is over by then.
    pub(super) fn wait_for(&mut self, after: Option<Duration>, step: Box<dyn Step>, firm: bool) {
        let later = self.later.get_or_insert_default();
        let had_clock = later.clock().is_some();
        if let Err(step) = later.wait(after, step, self.state.descriptor(), firm) {
            return step.abandon(self);
        }
        if later.clock().is_some() != had_clock {
            self.generation += 1;
        }
    }

    /// Leaves a step for when an operation is done; the token to submit that with.
    pub(super) fn follow(&mut self, step: Box<dyn Step>) -> u32 {
        self.later.get_or_insert_default().follow(step)
    }

    /// Goes on with steps whose operations were done at once, so that what is below decorators ends
    /// as soon there as it does without them.
    pub(super) fn settle(&mut self) {
        let mut at = 0;
        while let (Some(done), Some(later)) = (self.done.get(at), &mut self.later) {
            let Some(step) = later.followed(done.token) else {
                at += 1;
                continue;
            };
            let done = self.done.remove(at);
            step.resume(self, done);
            at = 0;
        }
    }

    /// Ends what only waits for its time, and is not firm, now and from now on: for a lane that is over, and
    /// has nobody to answer.
    pub fn abandon(&mut self) {
        // Made also for a lane that has none, to know that it is over.
        while let Some(step) = self.later.get_or_insert_default().end() {
            step.abandon(self);
        }
    }

    /// The next operation that is done. Call until `None` before sleeping, then [`Self::flush`].
    pub fn done(&mut self) -> Option<Done> {
        if self.later.is_none() {
            return self.engine_done();
        }
        loop {
            while let Some(step) = self.later.as_mut().and_then(|later| later.due()) {
                step.resume(self, None);
            }
            let done = self.engine_done()?;
            let later = self.later.as_mut();
            match later.and_then(|later| later.followed(done.token)) {
                Some(step) => step.resume(self, Some(done)),
                None => return Some(done),
            }
        }
    }

    /// Takes what is done from there, too.
    #[cfg(feature = "sim")]
    pub(crate) fn simulate(&mut self, mailbox: &crate::sim::Mailbox) {
        self.simulated.get_or_insert_with(|| mailbox.clone());
    }

    fn engine_done(&mut self) -> Option<Done> {
        #[cfg(feature = "sim")]
        if let Some(done) = self.simulated.as_ref().and_then(|mailbox| mailbox.take()) {
            return Some(done);
        }
        if let Some(done) = self.done.pop_front() {
            return Some(done);
        }
        match &mut self.state {
            State::Unused | State::Failed => None,
            State::Threads(mailbox) => mailbox.take().map(|(job, result)| job.finish(result)),
            State::Ring(ring) => {
                let (job, result) = ring.take()?;
                while !ring.is_full() {
                    let Some(waiting) = self.backlog.pop_front() else {
                        break;
                    };
                    if let Err(waiting) = ring.push(waiting) {
                        self.backlog.push_front(waiting);
                        break;
                    }
                }
                Some(job.finish(result))
            }
        }
    }

    /// Takes note that the descriptor was readable; to be called before [`Self::done`].
    pub fn acknowledge(&mut self, ready: &mut Ready) {
        if ready.readable
            && let State::Threads(mailbox) = &mut self.state
        {
            mailbox.acknowledge();
        }
        ready.readable = false;
    }

    /// Blocks until something may be done, when something is in flight: for callers without a
    /// runtime.
    pub fn wait(&mut self) {
        if !self.done.is_empty() {
            return;
        }
        if self.clock().is_some_and(Clock::is_set) {
            self.flush();
            if let Some(clock) = self.clock() {
                clock.block();
            }
            return;
        }
        match &mut self.state {
            State::Unused | State::Failed => {}
            State::Ring(ring) if ring.in_flight() > 0 => ring.wait(),
            State::Ring(_) => {}
            State::Threads(mailbox) => mailbox.wait(),
        }
    }
}

fn open(engine: Engine) -> State {
    static REFUSED: Once = Once::new();
    if engine != Engine::Threads {
        match Ring::new() {
            Ok(ring) => return State::Ring(Box::new(ring)),
            Err(error) if engine == Engine::Uring => {
                tracing::error!("io_uring cannot be used: {error}");
                return State::Failed;
            }
            Err(error) => REFUSED.call_once(|| {
                tracing::warn!("io_uring cannot be used ({error}): files are served by threads");
            }),
        }
    }
    match Mailbox::new() {
        Ok(mailbox) => State::Threads(mailbox),
        Err(error) => {
            tracing::error!("files cannot be served: {error}");
            State::Failed
        }
    }
}
