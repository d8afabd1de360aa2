//! A device lane: rings of one disk on one side, host queue pairs on the other, one per path.
//!
//! When a queue pair ends, a lane answers nobody: what was outstanding on it is parked until the control plane
//! releases it, and everything else takes another path. Without any, what comes waits as far as there are slots. When
//! to try again, when to give up, and what must not be written meanwhile, is for the control plane to say; a lane has
//! no clock for it.

mod held;
mod leaving;
mod sectors;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use nvmf::spec::Status;
use nvmf::transport::{Lane, Ready, RejectedReason, Turn};
use tokio::sync::{mpsc, oneshot};
use vhost_user_blk::{BlkStatus, Operation, Queue, Request, Token};

use super::mailbox::{LaneMessage, PairLost};
use super::paths::Paths;
use super::patience::Patience;
use super::throttle::{Gate, Throttle};
use crate::bridge::fence::{Fences, Owner};
use crate::bridge::inflight::{Fate, Finished, Inflight};
use crate::bridge::path_choice::{EARLIER_LIFE, IoPolicy};
use crate::bridge::sectors::Sectors;
use crate::bridge::status::{FailureLog, Outcome};
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
/// small ones. Twice as many where several times the batch stays behind, so that there is enough to do until the
/// guest goes on: it is woken half as often then.
const ANSWERED_BYTES: u64 = 512 << 10;
/// So many times the requests of a batch.
const ENOUGH_BEHIND: usize = 3;

/// Turns that need not look at the clock for commands that are overdue.
const UNWATCHED_MAX: u32 = 256;

/// A guest's request in flight.
#[derive(Debug)]
struct Guest {
    /// Number of its ring in the device.
    ring: usize,
    token: Token,
    /// Names it in the whole disk.
    owner: Owner,
    /// Bytes that it moves.
    bytes: u64,
    /// Its number in [`DeviceLane::sectors`].
    job: Option<u16>,
}

/// A ring that runs here.
#[derive(Debug)]
struct Ring {
    index: usize,
    queue: Box<Queue>,
    /// Somebody may have sent already what was in flight before it came here.
    already: bool,
    /// There may be requests to take.
    scan: bool,
    /// It was scanned to its end and the driver was not asked to kick since.
    dry: bool,
    /// It is to be given back when it has nothing in flight.
    stopping: Option<oneshot::Sender<Option<Box<Queue>>>>,
    /// What is not answered then is left in flight.
    leaving: bool,
    /// It is late with that.
    late: bool,
    /// Acknowledged after the next scan.
    started: Option<oneshot::Sender<()>>,
}

/// See the module.
pub(crate) struct DeviceLane {
    name: String,
    /// The disk's.
    limits: Limits,
    paths: Paths,
    /// Nothing is held.
    failing: bool,
    fences: Arc<Fences>,
    /// Told when nothing is outstanding that they forbid.
    fenced: Option<oneshot::Sender<()>>,
    rings: Vec<Ring>,
    inflight: Inflight<Guest>,
    /// What requests need that are not aligned, where the disk takes such. Every write to the disk comes by here then.
    sectors: Option<Sectors<Guest>>,
    /// Where requests wait for the limits of the disk, with the number of their ring; `None` without any.
    gate: Option<Gate<(usize, Request)>>,
    storage: Storage,
    failures: FailureLog,
    mail: mpsc::Receiver<LaneMessage>,
    generation: u64,
    ended: bool,
    /// Requests that the next turn takes from one ring, where a path answers within its flush.
    batch: usize,
    /// Where it is told that requests of an earlier life are here.
    recovered: mpsc::Sender<()>,
    /// What the times of requests are counted from that are attempted again later.
    epoch: Instant,
    /// Turns without a look at the clock for what is overdue.
    unwatched: u32,
    patience: Patience,
    counters: Arc<LaneCounters>,
}

/// What a lane is made from.
pub(crate) struct LaneSetup {
    /// The disk, for the log.
    pub(crate) name: String,
    /// The namespace, and what the controller takes that it was first found at.
    pub(crate) limits: Limits,
    /// How commands are spread over paths.
    pub(crate) policy: IoPolicy,
    /// Where the end of a queue pair is told: room for two from each path of each lane.
    pub(crate) losses: mpsc::Sender<PairLost>,
    /// Where it is told which associations' controllers say that access has changed.
    pub(crate) changes: mpsc::Sender<u64>,
    /// Where it is told that requests of an earlier life are here.
    pub(crate) recovered: mpsc::Sender<()>,
    /// A path on which a command has no answer for so long is ended; zero waits for ever.
    pub(crate) io_timeout: Duration,
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
    /// Sectors are smaller than blocks; the disk has no other lane then.
    pub(crate) emulate_512: bool,
}

impl DeviceLane {
    /// A lane without rings and paths.
    pub(crate) fn new(setup: LaneSetup) -> Self {
        let LaneSetup {
            name,
            limits,
            policy,
            losses,
            changes,
            recovered,
            io_timeout,
            mail,
            counters,
            slots,
            throttle,
            poll_max,
            emulate_512,
        } = setup;
        Self {
            name,
            limits,
            paths: Paths::new(policy, io_timeout, losses, changes),
            failing: false,
            fences: Arc::default(),
            fenced: None,
            rings: Vec::new(),
            inflight: Inflight::new(slots),
            sectors: emulate_512.then(|| Sectors::new(&limits, slots)).flatten(),
            gate: throttle.map(|throttle| Gate::new(throttle, slots)),
            storage: Storage::new(slots),
            failures: FailureLog::default(),
            mail,
            generation: 0,
            ended: false,
            batch: 1,
            recovered,
            epoch: Instant::now(),
            unwatched: 0,
            patience: Patience::new(poll_max),
            counters,
        }
    }

    fn receive(&mut self, message: LaneMessage) {
        match message {
            LaneMessage::Start {
                index,
                queue,
                already,
                done,
            } => {
                self.rings.retain(|ring| ring.index != index);
                self.rings.push(Ring {
                    index,
                    queue,
                    already,
                    scan: true,
                    dry: false,
                    stopping: None,
                    leaving: false,
                    late: false,
                    started: Some(done),
                });
                self.generation += 1;
                self.take_recovered();
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
            LaneMessage::Suspend { index, done } => self.suspend(index, done),
            LaneMessage::Stay { index } => self.stay(index),
            LaneMessage::Leave { index } => self.leave(index),
            LaneMessage::Hurry { index } => self.hurry(index),
            LaneMessage::Lose { path, done } => self.paths.lose(path, done),
            LaneMessage::Resume(resume) => {
                self.failing = false;
                self.set_fences(Arc::clone(&resume.fences));
                self.paths.resume(*resume);
            }
            LaneMessage::Release(paths) => {
                self.inflight.release(paths, &self.limits);
                self.release_recovered(paths);
            }
            LaneMessage::Fail => self.failing = true,
            LaneMessage::Grow { block_count, done } => {
                self.limits.grow(block_count);
                self.paths.grow(block_count);
                // Who grows the disk may be gone.
                let _ = done.send(());
            }
            LaneMessage::Fences { fences, done } => {
                self.set_fences(fences);
                if done.is_some() {
                    self.inflight.note_overtaken(&self.limits, &self.fences);
                    self.fenced = done;
                }
            }
            LaneMessage::Access { path, access } => self.paths.set_access(path, access),
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
        self.inflight = Inflight::new(1);
        self.sectors = None;
        self.gate = None;
        self.rings.clear();
        self.generation += 1;
        self.ended = true;
    }

    fn set_fences(&mut self, fences: Arc<Fences>) {
        self.fences = fences;
        self.inflight.fences_changed();
    }

    /// Takes what was completed. True when there was something.
    fn settle(&mut self) -> bool {
        let Self {
            paths,
            inflight,
            limits,
            storage,
            epoch,
            ..
        } = self;
        let mut any = false;
        while let Some((path, completion, unknown)) = paths.completion() {
            let now = || milliseconds(*epoch);
            let fate = match unknown {
                true => Fate::Unknown,
                false => paths.judge(path, completion.cqe.status(), now),
            };
            inflight.settle(path, completion, fate, limits, storage);
            any = true;
        }
        any
    }

    /// Takes what a flush completed at once, as a controller in this process does. True when that
    /// made room for something that waits.
    fn settle_at_once(&mut self) -> bool {
        let waits = |ring: &Ring| ring.scan && ring.stopping.is_none();
        self.settle() && (self.inflight.is_waiting() || self.rings.iter().any(waits))
    }

    /// Takes out paths that have ended, once nothing is outstanding on them, and tells the control plane. Then
    /// tells it, too, that nothing is outstanding any more that the fences forbid: in this order, so that it
    /// hears of what was lost meanwhile first.
    fn drop_lost_paths(&mut self) {
        if self.paths.any_ends() {
            self.settle();
        }
        let Self {
            paths,
            inflight,
            sectors,
            ..
        } = self;
        paths.drop_ended(|path| {
            if let Some(sectors) = sectors.as_mut().filter(|_| path == EARLIER_LIFE) {
                sectors.collected();
            }
            inflight.take_unknown(path)
        });
        if self.fenced.is_some()
            && !self.paths.any_ends()
            && !self.inflight.is_overtaken()
            && let Some(done) = self.fenced.take()
        {
            let _ = done.send(());
        }
    }

    /// Fails what will not be carried out in time: everything that waits when nothing is held, and what the
    /// rings have in flight that are late. True when there was something.
    fn give_up(&mut self) -> bool {
        let waiting = self.inflight.is_waiting();
        let no_path = self.paths.none_is_usable();
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
        if hurried {
            self.give_up_ordered();
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
            ..
        } = self;
        match inflight.issue(limits, fences, storage, paths) {
            None | Some(RejectedReason::Full | RejectedReason::Ended) => {}
            Some(RejectedReason::TooLong) => inflight.give_up_waiting(Status::INTERNAL_ERROR),
        }
    }

    /// Takes requests from the rings that may have some. True when one has more for the next turn.
    fn take_requests(&mut self) -> bool {
        let answers = self.paths.any_answers_in_flush();
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

    /// Takes up to `most` requests, and none once they move `most_bytes`; twice that where enough others wait.
    fn take_from(&mut self, at: usize, most: usize, most_bytes: u64) -> bool {
        let mut bytes = 0;
        for taken in 0..most {
            if bytes >= most_bytes {
                let waiting = usize::from(self.rings[at].queue.waiting());
                if bytes >= most_bytes.saturating_mul(2) || waiting < ENOUGH_BEHIND * taken {
                    return true;
                }
            }
            if !self.has_room() {
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
                Ok(Some(request)) if request.recovered => self.open_recovered(at, request),
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
        let owner = owner(ring, request.id);
        let Request {
            token, operation, ..
        } = request;
        let bytes = match &operation {
            Operation::Read { sink, .. } => sink.len() as u64,
            Operation::Write { source, .. } => source.len() as u64,
            Operation::Flush | Operation::Discard(_) | Operation::WriteZeroes { .. } => 0,
        };
        let guest = Guest {
            ring,
            token,
            owner,
            bytes,
            job: None,
        };
        self.arrive(guest, operation);
        bytes
    }

    /// Has the commands of an operation made.
    fn open(&mut self, guest: Guest, operation: Operation) {
        let owner = guest.owner;
        match self.inflight.open(guest, owner, operation, &self.limits) {
            Ok(()) => self.issue(),
            // There was room before the request was taken.
            Err((guest, operation)) => {
                let outcome = Outcome::Failed(Status::INTERNAL_ERROR);
                let failed = Finished {
                    guest,
                    operation,
                    outcome,
                };
                if let Some(failed) = self.advance(failed) {
                    self.conclude(failed);
                }
            }
        }
    }

    /// Answers every request that is over. True when that has others begin, or go on.
    fn finish(&mut self) -> bool {
        let mut more = false;
        loop {
            while let Some(finished) = self.inflight.take_done() {
                match self.advance(finished) {
                    Some(finished) => self.conclude(finished),
                    None => more = true,
                }
            }
            if !self.begin_ready() {
                return more;
            }
            more = true;
        }
    }

    /// Counts a request that is over, and answers it.
    fn conclude(&mut self, finished: Finished<Guest>) {
        let Finished {
            guest,
            operation,
            outcome,
        } = finished;
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
        self.answer(guest, operation, status);
    }

    fn answer(&mut self, guest: Guest, operation: Operation, status: BlkStatus) {
        let Guest { ring, token, .. } = guest;
        if let Some(ring) = self
            .rings
            .iter_mut()
            .find(|candidate| candidate.index == ring)
        {
            ring.queue.finish(token, &operation, status);
        }
        self.storage.keep(operation);
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
        // What a queue pair leaves is told before the rings whose requests it had are elsewhere.
        let any_ends = self.paths.any_ends();
        for at in (0..self.rings.len()).rev() {
            let ring = &self.rings[at];
            let waits = ring.leaving && any_ends;
            if ring.stopping.is_some() && ring.queue.in_flight() == 0 && !waits {
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
        self.inflight.room() == self.inflight.capacity()
            && self.gate.as_ref().is_none_or(Gate::is_empty)
    }

    /// Has requests begin anew whose time has come, and ends paths with commands that are overdue. Where nothing
    /// waits for a time, the clock is read in turns that nothing has made ready, and now and then.
    fn pass_time(&mut self, ready: &[Ready]) {
        if self.inflight.next_due().is_some() {
            let now = milliseconds(self.epoch);
            self.inflight.begin_anew(now, &self.limits);
        }
        let often = self.unwatched >= UNWATCHED_MAX || !ready.iter().any(|ready| ready.readable);
        self.unwatched = if often { 0 } else { self.unwatched + 1 };
        self.paths.end_overdue(often, Instant::now);
    }

    fn publish_counters(&self) {
        let total = self.paths.counters();
        self.counters.commands.set(self.paths.commands());
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

/// Names a request in the whole disk, by its ring and its number.
fn owner(ring: usize, request: u64) -> Owner {
    Owner {
        // There are no more rings than that.
        ring: u16::try_from(ring).unwrap_or(u16::MAX),
        request,
    }
}

/// Milliseconds since then, never 0.
fn milliseconds(epoch: Instant) -> u64 {
    let millis = epoch.elapsed().as_millis();
    u64::try_from(millis).unwrap_or(u64::MAX).max(1)
}

impl Lane for DeviceLane {
    fn generation(&self) -> u64 {
        self.generation.wrapping_add(self.paths.generation())
    }

    fn descriptors<'a>(&'a self, out: &mut Vec<BorrowedFd<'a>>) {
        out.extend(self.paths.descriptors());
        out.extend(self.rings.iter().filter_map(|ring| ring.queue.kick_fd()));
    }

    /// Kicks are never answered on their descriptors.
    fn writes(&self, index: usize) -> bool {
        self.paths.writes(index)
    }

    fn wants_write(&self, index: usize) -> bool {
        self.paths.wants_write(index)
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
        let due = self.inflight.next_due();
        let due = due.and_then(|due| self.epoch.checked_add(Duration::from_millis(due)));
        let times = [self.held_until(), self.paths.overdue_at(), due];
        times.into_iter().flatten().min()
    }

    fn turn(&mut self, ready: &mut [Ready]) -> Turn {
        if self.ended {
            return Turn::Ended;
        }
        self.counters.turns.add(1);
        self.pass_time(ready);
        let paths = self.paths.len();
        let (path_ready, kicks) = ready.split_at_mut(paths.min(ready.len()));
        for (ring, kick) in self.kicked_rings().zip(kicks) {
            ring.scan |= std::mem::take(&mut kick.readable);
        }
        self.paths.tell_traffic();
        // Completions before new work: they make room for it.
        let mut again = self.paths.progress(path_ready);
        self.settle();
        self.issue();
        again |= self.take_requests();
        if !self.is_idle() {
            self.patience.worked(Instant::now);
        }
        again |= self.paths.flush(path_ready);
        again |= self.settle_at_once();
        self.drop_lost_paths();
        again |= self.give_up();
        self.leave_requests();
        again |= self.finish();
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
        self.paths.watch_overdue(Instant::now);
        self.paths.tell_traffic();
        self.publish_counters();
        if again { Turn::Again } else { Turn::Idle }
    }
}
