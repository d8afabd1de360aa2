//! A device lane: rings of one disk on one side, host queue pairs on the other, one per path.
//!
//! When its queue pair ends, a lane answers nobody: what was outstanding waits for the next one, and so does
//! what comes, as far as there are slots. When to try again, when to give up, and what must not be written
//! meanwhile, is for the control plane to say; a lane has no clock for it.

mod held;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use nvmf::spec::Status;
use nvmf::transport::{Counters, HostQueuePair, Lane, Ready, RejectedReason, Turn};
use tokio::sync::{mpsc, oneshot};
use vhost_user_blk::{BlkStatus, Operation, Queue, Request, Token};

use super::mailbox::{LaneMessage, PairLost, Resume};
use super::patience::Patience;
use super::throttle::{Gate, Throttle};
use crate::bridge::fence::Fences;
use crate::bridge::inflight::{Fate, Finished, Inflight, Unknown};
use crate::bridge::status::FailureLog;
use crate::bridge::transfer::Storage;
use crate::bridge::translate::Limits;
use crate::metrics::LaneCounters;

/// Requests taken from one ring in one turn, before other rings and lanes get theirs.
const TAKE_MAX: usize = 128;

/// The same where a path answers within its flush. The guest goes on with what was answered while
/// the next are worked on, so that neither waits for the other; larger batches would have both take
/// turns, and sleep in between.
const ANSWERED_MAX: usize = 8;
/// Bytes after which such a batch takes no more: large requests are worked on for as long as several
/// small ones.
const ANSWERED_BYTES: u64 = 512 << 10;

/// Associations of a disk are counted from here.
pub(crate) const FIRST_ASSOCIATION: u64 = 1;

/// A guest's request in flight.
#[derive(Debug)]
struct Guest {
    /// Number of its ring in the device.
    ring: usize,
    token: Token,
    /// Bytes that it moves.
    bytes: u64,
}

/// A ring that runs here.
#[derive(Debug)]
struct Ring {
    index: usize,
    queue: Box<Queue>,
    /// There may be requests to take.
    scan: bool,
    /// It was scanned to its end and the driver was not asked to kick since.
    dry: bool,
    /// It is to be given back when it has nothing in flight.
    stopping: Option<oneshot::Sender<Option<Box<Queue>>>>,
    /// It is late with that.
    late: bool,
    /// Acknowledged after the next scan.
    started: Option<oneshot::Sender<()>>,
}

/// See the module.
pub(crate) struct DeviceLane {
    name: String,
    limits: Limits,
    /// One queue pair for each way to the controller that is alive.
    paths: Vec<Box<dyn HostQueuePair>>,
    /// The association that they belong to.
    association: u64,
    /// Where their end is told.
    losses: mpsc::Sender<PairLost>,
    /// Gets what is left of them.
    losing: Option<oneshot::Sender<Unknown>>,
    /// Nothing is held.
    failing: bool,
    fences: Arc<Fences>,
    /// What queue pairs counted that are gone.
    past: Counters,
    rings: Vec<Ring>,
    inflight: Inflight<Guest>,
    /// Where requests wait for the limits of the disk, with the number of their ring; `None` without any.
    gate: Option<Gate<(usize, Request)>>,
    storage: Storage,
    failures: FailureLog,
    mail: mpsc::Receiver<LaneMessage>,
    generation: u64,
    ended: bool,
    /// Requests that the next turn takes from one ring, where a path answers within its flush.
    batch: usize,
    /// Requests that can be in flight.
    slots: usize,
    patience: Patience,
    counters: Arc<LaneCounters>,
}

/// What a lane is made from.
pub(crate) struct LaneSetup {
    /// The disk, for the log.
    pub(crate) name: String,
    /// Its number in the disk.
    pub(crate) index: u16,
    /// The namespace and what its controller takes.
    pub(crate) limits: Limits,
    /// A connected I/O queue pair for each path.
    pub(crate) pairs: Vec<Box<dyn HostQueuePair>>,
    /// Where the end of a queue pair is told: room for one from each lane.
    pub(crate) losses: mpsc::Sender<PairLost>,
    /// The lane's end of its mailbox.
    pub(crate) mail: mpsc::Receiver<LaneMessage>,
    /// Where it counts.
    pub(crate) counters: Arc<LaneCounters>,
    /// Guest requests that may be in flight at once.
    pub(crate) slots: usize,
    /// What the disk may do, if that is limited.
    pub(crate) throttle: Option<Arc<Throttle>>,
    /// How long it looks for work before it sleeps, at most.
    pub(crate) poll_max: Duration,
}

impl DeviceLane {
    /// A lane without rings.
    pub(crate) fn new(setup: LaneSetup) -> Self {
        let LaneSetup {
            name,
            index,
            limits,
            pairs,
            losses,
            mail,
            counters,
            slots,
            throttle,
            poll_max,
        } = setup;
        Self {
            name,
            limits,
            paths: pairs,
            association: FIRST_ASSOCIATION,
            losses,
            losing: None,
            failing: false,
            fences: Arc::default(),
            past: Counters::default(),
            rings: Vec::new(),
            inflight: Inflight::new(index, slots),
            gate: throttle.map(|throttle| Gate::new(throttle, slots)),
            storage: Storage::new(slots),
            failures: FailureLog::default(),
            mail,
            generation: 0,
            ended: false,
            batch: 1,
            slots,
            patience: Patience::new(poll_max),
            counters,
        }
    }

    fn receive(&mut self, message: LaneMessage) {
        match message {
            LaneMessage::Start { index, queue, done } => {
                self.rings.retain(|ring| ring.index != index);
                self.rings.push(Ring {
                    index,
                    queue,
                    scan: true,
                    dry: false,
                    stopping: None,
                    late: false,
                    started: Some(done),
                });
                self.generation += 1;
            }
            LaneMessage::Update {
                index,
                update,
                done,
            } => {
                if let Some(ring) = self.rings.iter_mut().find(|ring| ring.index == index) {
                    ring.queue.apply(update);
                    ring.scan = true;
                    // The kick may be another descriptor now.
                    self.generation += 1;
                }
                // The session may have gone away meanwhile.
                let _ = done.send(());
            }
            LaneMessage::Stop { index, done } => {
                match self.rings.iter_mut().find(|ring| ring.index == index) {
                    Some(ring) => ring.stopping = Some(done),
                    None => drop(done.send(None)),
                }
            }
            LaneMessage::Hurry { index } => {
                let ring = self.rings.iter_mut().find(|ring| ring.index == index);
                if let Some(ring) = ring.filter(|ring| ring.stopping.is_some()) {
                    ring.late = true;
                }
            }
            LaneMessage::Lose { done } => {
                for pair in &mut self.paths {
                    pair.end();
                }
                self.losing = Some(done);
            }
            LaneMessage::Resume(resume) => self.resume(*resume),
            LaneMessage::Fail => self.failing = true,
            LaneMessage::Grow { block_count } => self.limits.grow(block_count),
            LaneMessage::Fences(fences) => {
                self.fences = fences;
                self.inflight.fences_changed();
            }
            LaneMessage::End { done } => {
                self.end();
                let _ = done.send(());
            }
        }
    }

    /// Drops everything: queue pairs first, so that nothing refers to guest memory any more.
    fn end(&mut self) {
        self.publish_counters();
        self.paths.clear();
        self.inflight = Inflight::new(0, 1);
        self.gate = None;
        self.rings.clear();
        self.generation += 1;
        self.ended = true;
    }

    /// Goes on with a new queue pair. What was outstanding on the old one was told before, so that its fences
    /// are among the new.
    fn resume(&mut self, resume: Resume) {
        let Resume {
            association,
            pair,
            limits,
            fences,
        } = resume;
        self.generation = self.generation.wrapping_add(1);
        self.paths.push(pair);
        self.association = association;
        self.limits = limits;
        self.fences = fences;
        self.failing = false;
        self.inflight.start_anew(&self.limits);
    }

    /// Sends and receives on every path. True when one has more to do at once.
    fn progress(&mut self, ready: &mut [Ready]) -> bool {
        let mut more = false;
        for (pair, ready) in self.paths.iter_mut().zip(ready) {
            more |= pair.progress(ready);
        }
        self.settle();
        more
    }

    /// Takes what was completed. True when there was something.
    fn settle(&mut self) -> bool {
        let Self {
            paths,
            inflight,
            limits,
            storage,
            ..
        } = self;
        let mut any = false;
        for pair in paths {
            while let Some(completion) = pair.completion() {
                let made_up = !completion.sqhd_valid
                    && completion.cqe.status().code() == Status::ABORTED_BY_HOST.code();
                let fate = match made_up && pair.ending().is_some() {
                    true => Fate::Unknown,
                    false => Fate::Known,
                };
                inflight.settle(completion, fate, limits, storage);
                any = true;
            }
        }
        any
    }

    /// Takes what a flush completed at once, as a controller in this process does. True when that
    /// made room for something that waits.
    fn settle_at_once(&mut self) -> bool {
        let waits = |ring: &Ring| ring.scan && ring.stopping.is_none();
        self.settle() && (self.inflight.is_waiting() || self.rings.iter().any(waits))
    }

    /// Sends what this turn brought about. True when one path has more to send at once.
    fn flush_paths(&mut self, ready: &mut [Ready]) -> bool {
        let mut more = false;
        for (pair, ready) in self.paths.iter_mut().zip(ready) {
            more |= pair.flush(ready);
        }
        more
    }

    /// Takes out paths that have ended, once nothing is outstanding on them, and tells the control plane.
    fn drop_lost_paths(&mut self) {
        if self.paths.iter().any(|pair| pair.ending().is_some()) {
            self.settle();
        }
        for index in (0..self.paths.len()).rev() {
            let pair = &self.paths[index];
            let Some(ending) = pair.ending().filter(|_| pair.outstanding() == 0) else {
                continue;
            };
            let lost = PairLost {
                association: self.association,
                cause: ending.to_string(),
            };
            // A full channel has told of a loss before.
            let _ = self.losses.try_send(lost);
            let pair = self.paths.remove(index);
            self.past = sum(self.past, pair.counters());
            self.generation = self.generation.wrapping_add(pair.generation() + 1);
        }
        if self.paths.is_empty()
            && let Some(done) = self.losing.take()
        {
            // Nobody asks any more when the daemon ends.
            let _ = done.send(self.inflight.take_unknown());
        }
    }

    /// Fails what will not be carried out in time: everything that waits when nothing is held, and what the
    /// rings have in flight that are late. True when there was something.
    fn give_up(&mut self) -> bool {
        let waiting = self.inflight.is_waiting();
        let no_path = self.paths.iter().all(|pair| pair.ending().is_some());
        if no_path && self.failing {
            self.inflight.give_up_waiting(Status::HOST_PATH_ERROR);
        }
        let Self {
            rings, inflight, ..
        } = self;
        let hurried = rings.iter().any(|ring| ring.late);
        if hurried {
            let late = |index| rings.iter().any(|ring| ring.late && ring.index == index);
            inflight.give_up_some(Status::HOST_PATH_ERROR, no_path, |guest: &Guest| {
                late(guest.ring)
            });
        }
        if hurried && no_path {
            self.give_up_held();
        }
        // Then the rings have more to offer.
        waiting && !self.inflight.is_waiting()
    }

    /// Submits commands that wait, as many as there is room for. Without a path they go on waiting.
    fn issue(&mut self) {
        let Self {
            inflight,
            paths,
            storage,
            limits,
            fences,
            counters,
            ..
        } = self;
        let Some(pair) = paths.iter_mut().find(|pair| pair.ending().is_none()) else {
            return;
        };
        let rejected = inflight.issue(limits, fences, storage, |sqe, transfer, token| {
            counters.commands.add(1);
            pair.submit(sqe, transfer, token).map(drop)
        });
        match rejected {
            None | Some(RejectedReason::Full | RejectedReason::Ended) => {}
            Some(RejectedReason::TooLong) => inflight.give_up_waiting(Status::INTERNAL_ERROR),
        }
    }

    /// Takes requests from the rings that may have some. True when one has more for the next turn.
    fn take_requests(&mut self) -> bool {
        let answers = self.paths.iter().any(|pair| pair.answers_in_flush());
        let (most, most_bytes) = if answers {
            (self.batch, ANSWERED_BYTES)
        } else {
            (TAKE_MAX, u64::MAX)
        };
        let rings = self.rings.len();
        let (mut more, first) = self.begin_held(most);
        for at in (first..rings).chain(0..first) {
            if self.rings[at].scan && self.rings[at].stopping.is_none() {
                more |= self.take_from(at, most, most_bytes);
            }
        }
        more
    }

    /// Takes up to `most` requests, and none once they move `most_bytes`.
    fn take_from(&mut self, at: usize, most: usize, most_bytes: u64) -> bool {
        let mut bytes = 0;
        for _ in 0..most {
            if bytes >= most_bytes {
                return true;
            }
            if self.inflight.room() == 0 || self.inflight.is_waiting() {
                // Completions make room, and then the scan goes on.
                return false;
            }
            if self.gate.as_ref().is_some_and(|gate| !gate.is_open()) {
                // The deadline does.
                return false;
            }
            let Self { rings, storage, .. } = self;
            let ring = &mut rings[at];
            match ring.queue.take(&mut || storage.list()) {
                Ok(Some(request)) => {
                    bytes += self.admit(at, request);
                }
                Ok(None) => {
                    ring.scan = false;
                    ring.dry = true;
                    return false;
                }
                // Logged and signalled by the queue; what is in flight is still finished.
                Err(_) => {
                    ring.scan = false;
                    return false;
                }
            }
        }
        true
    }

    /// Begins a request. Returns the bytes that it moves.
    fn begin(&mut self, ring: usize, request: Request) -> u64 {
        let Request { token, operation } = request;
        let bytes = match &operation {
            Operation::Read { sink, .. } => sink.len() as u64,
            Operation::Write { source, .. } => source.len() as u64,
            Operation::Flush | Operation::Discard(_) | Operation::WriteZeroes { .. } => 0,
        };
        let guest = Guest { ring, token, bytes };
        match self.inflight.open(guest, operation, &self.limits) {
            Ok(()) => self.issue(),
            // There was room before the request was taken.
            Err((guest, operation)) => {
                self.storage.keep(operation);
                self.answer(guest, BlkStatus::IoError);
            }
        }
        bytes
    }

    /// Answers every request that is over.
    fn finish(&mut self) {
        while let Some(Finished {
            guest,
            operation,
            outcome,
        }) = self.inflight.take_done()
        {
            let counters = &self.counters;
            counters.requests.add(1);
            let status = outcome.blk_status();
            let ok = matches!(status, BlkStatus::Ok);
            let moved = if ok { guest.bytes } else { 0 };
            match &operation {
                Operation::Read { .. } => {
                    counters.reads.add(1);
                    counters.read_bytes.add(moved);
                }
                Operation::Write { .. } => {
                    counters.writes.add(1);
                    counters.written_bytes.add(moved);
                }
                Operation::Flush => counters.flushes.add(1),
                Operation::Discard(_) => counters.discards.add(1),
                Operation::WriteZeroes { .. } => counters.write_zeroes.add(1),
            }
            if !ok {
                counters.errors.add(1);
                self.failures.note(&self.name, outcome);
            }
            self.storage.keep(operation);
            self.answer(guest, status);
        }
    }

    fn answer(&mut self, guest: Guest, status: BlkStatus) {
        let Guest { ring, token, .. } = guest;
        if let Some(ring) = self
            .rings
            .iter_mut()
            .find(|candidate| candidate.index == ring)
        {
            ring.queue.finish(token, status);
        }
    }

    /// Shows every guest what was answered, and gives back the rings that are done.
    fn flush_rings(&mut self) {
        let mut left = false;
        for ring in &mut self.rings {
            self.counters.interrupts.add(u64::from(ring.queue.flush()));
            if let Some(done) = ring.started.take() {
                let _ = done.send(());
            }
            left |= ring.stopping.is_some() && ring.queue.in_flight() == 0;
        }
        if left {
            self.give_back();
        }
    }

    fn give_back(&mut self) {
        for at in (0..self.rings.len()).rev() {
            let ring = &self.rings[at];
            if ring.stopping.is_some() && ring.queue.in_flight() == 0 {
                let ring = self.rings.swap_remove(at);
                self.generation += 1;
                if let Some(done) = ring.stopping {
                    let _ = done.send(Some(ring.queue));
                }
            }
        }
    }

    /// Has the next turn scan rings as if they had been kicked. Kicks stay off meanwhile: the driver
    /// need not leave its guest to tell what is looked for.
    fn look_again(&mut self) {
        for ring in &mut self.rings {
            ring.scan |= ring.dry;
        }
    }

    /// Asks for kicks where everything was taken. True when requests arrived meanwhile.
    fn rearm(&mut self) -> bool {
        let mut again = false;
        for ring in &mut self.rings {
            if std::mem::take(&mut ring.dry) && ring.stopping.is_none() && ring.queue.rearm() {
                ring.scan = true;
                again = true;
            }
        }
        again
    }

    /// Nothing is in flight, and nothing waits for the disk's limits.
    fn is_idle(&self) -> bool {
        self.inflight.room() == self.slots && self.gate.as_ref().is_none_or(Gate::is_empty)
    }

    fn publish_counters(&self) {
        let total = self
            .paths
            .iter()
            .fold(self.past, |total, pair| sum(total, pair.counters()));
        self.counters.copied_bytes.set(total.copied_bytes);
        self.counters.sends.set(total.sends);
        self.counters.receives.set(total.receives);
    }

    /// Rings whose kicks are watched, in the order of the descriptors.
    fn kicked_rings(&mut self) -> impl Iterator<Item = &mut Ring> {
        self.rings
            .iter_mut()
            .filter(|ring| ring.queue.kick_fd().is_some())
    }
}

fn sum(a: Counters, b: Counters) -> Counters {
    Counters {
        copied_bytes: a.copied_bytes + b.copied_bytes,
        sends: a.sends + b.sends,
        receives: a.receives + b.receives,
    }
}

impl Lane for DeviceLane {
    fn generation(&self) -> u64 {
        let paths = self.paths.iter().map(|pair| pair.generation());
        paths.fold(self.generation, u64::wrapping_add)
    }

    fn descriptors<'a>(&'a self, out: &mut Vec<BorrowedFd<'a>>) {
        out.extend(self.paths.iter().map(|pair| pair.interest().fd));
        out.extend(self.rings.iter().filter_map(|ring| ring.queue.kick_fd()));
    }

    fn wants_write(&self, index: usize) -> bool {
        self.paths
            .get(index)
            .is_some_and(|pair| pair.interest().writable)
    }

    fn poll_mailbox(&mut self, cx: &mut Context<'_>) -> bool {
        let mut news = false;
        loop {
            match self.mail.poll_recv(cx) {
                Poll::Ready(Some(message)) => {
                    self.receive(message);
                    news = true;
                }
                Poll::Ready(None) => {
                    // Nobody can reach the lane any more.
                    if !self.ended {
                        self.end();
                    }
                    return true;
                }
                Poll::Pending => return news,
            }
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.held_until()
    }

    fn turn(&mut self, ready: &mut [Ready]) -> Turn {
        if self.ended {
            return Turn::Ended;
        }
        self.counters.turns.add(1);
        let paths = self.paths.len();
        let (path_ready, kicks) = ready.split_at_mut(paths.min(ready.len()));
        for (ring, kick) in self.kicked_rings().zip(kicks) {
            ring.scan |= std::mem::take(&mut kick.readable);
        }
        // Completions before new work: they make room for it.
        let mut again = self.progress(path_ready);
        self.issue();
        again |= self.take_requests();
        if !self.is_idle() {
            self.patience.worked(Instant::now);
        }
        again |= self.flush_paths(path_ready);
        again |= self.settle_at_once();
        self.drop_lost_paths();
        again |= self.give_up();
        self.finish();
        self.flush_rings();
        // The first answer after a pause wakes the guest's driver, so it should come soon.
        self.batch = if again {
            (self.batch * 2).min(ANSWERED_MAX)
        } else {
            1
        };
        if !again && self.is_idle() && self.patience.look_again(Instant::now) {
            self.look_again();
            again = true;
        } else {
            again |= self.rearm();
        }
        self.publish_counters();
        if again { Turn::Again } else { Turn::Idle }
    }
}
