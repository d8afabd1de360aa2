//! The paths of one lane: a host queue pair for each path that is alive, which of them the next command takes, and
//! what is told when one ends.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nvmf::host::QueueTraffic;
use nvmf::spec::{Sqe, Status};
use nvmf::transport::{
    Completion, Counters, HostQueuePair, Ready, Rejected, RejectedReason, Transfer,
};
use tokio::sync::{mpsc, oneshot};

use super::mailbox::{PairLost, Resume};
use super::overdue::{Outstanding, Quarters};
use crate::bridge::inflight::{Again, Fate, Outlet, Unknown};
use crate::bridge::path_choice::{Access, Candidate, IoPolicy, PathChoice, PathSet};
use crate::bridge::retry::{Verdict, verdict};
use crate::bridge::translate::Limits;
use crate::limits::MAX_PATHS;

/// A path that is alive, or ends.
struct Live {
    /// Its number in the disk.
    path: usize,
    /// The association that the queue pair belongs to.
    association: u64,
    pair: Box<dyn HostQueuePair>,
    limits: Limits,
    access: Access,
    /// The controller has a log of that.
    reports_access: bool,
    /// Milliseconds that the controller may ask to wait for.
    retry_delays: [u64; 3],
    outstanding: Outstanding,
    /// Where commands count that the controller has answered; and those.
    traffic: Option<QueueTraffic>,
    answered: u64,
    /// Why we have ended it.
    cause: Option<String>,
}

/// Somebody waits for the end of a path.
struct Losing {
    path: usize,
    done: oneshot::Sender<Unknown>,
}

/// See the module.
pub(super) struct Paths {
    /// At most one for each path.
    live: Vec<Live>,
    losing: Vec<Losing>,
    choice: PathChoice,
    /// Where the end of a queue pair is told.
    losses: mpsc::Sender<PairLost>,
    /// Where it is told which associations' controllers say that access has changed.
    changes: mpsc::Sender<u64>,
    /// What queue pairs counted that are gone.
    past: Counters,
    /// Commands that were submitted.
    commands: u64,
    io_timeout: Duration,
    quarters: Quarters,
    generation: u64,
}

impl Paths {
    /// None yet.
    pub(super) fn new(
        policy: IoPolicy,
        io_timeout: Duration,
        losses: mpsc::Sender<PairLost>,
        changes: mpsc::Sender<u64>,
    ) -> Self {
        Self {
            live: Vec::with_capacity(MAX_PATHS),
            losing: Vec::new(),
            choice: PathChoice::new(policy),
            losses,
            changes,
            past: Counters::default(),
            commands: 0,
            io_timeout,
            quarters: Quarters::new(io_timeout),
            generation: 0,
        }
    }

    /// Drops all queue pairs.
    pub(super) fn clear(&mut self) {
        self.live.clear();
        self.generation = self.generation.wrapping_add(1);
    }

    /// Goes on with a new queue pair; that of the association before is gone.
    pub(super) fn resume(&mut self, resume: Resume) {
        let Resume {
            path,
            association,
            pair,
            limits,
            access,
            reports_access,
            retry_delays,
            traffic,
            fences: _,
        } = resume;
        self.generation = self.generation.wrapping_add(1);
        self.live.push(Live {
            path,
            association,
            pair,
            limits,
            access,
            reports_access,
            retry_delays,
            outstanding: Outstanding::default(),
            traffic,
            answered: 0,
            cause: None,
        });
        // Their order is that of the paths, whichever came first.
        self.live.sort_by_key(|live| live.path);
    }

    /// Ends a path, and tells what is left of it once it has ended.
    pub(super) fn lose(&mut self, path: usize, done: oneshot::Sender<Unknown>) {
        for live in self.live.iter_mut().filter(|live| live.path == path) {
            live.pair.end();
        }
        self.losing.push(Losing { path, done });
    }

    /// What a path is good for from now on.
    pub(super) fn set_access(&mut self, path: usize, access: Access) {
        for live in self.live.iter_mut().filter(|live| live.path == path) {
            live.access = access;
        }
    }

    /// The controller on a path says that access has changed. Until it is known how, the path is not used; the
    /// control plane is told to find out.
    pub(super) fn access_changed(&mut self, path: usize) {
        for live in self.live.iter_mut().filter(|live| live.path == path) {
            if live.reports_access && live.access != Access::Change {
                live.access = Access::Change;
                // There is room for one from each path of each lane.
                let _ = self.changes.try_send(live.association);
            }
        }
    }

    /// The namespace has so many blocks now.
    pub(super) fn grow(&mut self, block_count: u64) {
        for live in &mut self.live {
            live.limits.grow(block_count);
        }
    }

    /// Tells keep-alive what was answered up to now. To be called where a turn begins, and where it ends.
    pub(super) fn tell_traffic(&mut self) {
        for live in &mut self.live {
            if let Some(traffic) = &mut live.traffic {
                traffic.note(live.answered, live.pair.outstanding());
            }
        }
    }

    /// Sends and receives on every path. True when one has more to do at once.
    pub(super) fn progress(&mut self, ready: &mut [Ready]) -> bool {
        let mut more = false;
        for (live, ready) in self.live.iter_mut().zip(ready) {
            more |= live.pair.progress(ready);
        }
        more
    }

    /// Sends what this turn brought about. True when one path has more to send at once.
    pub(super) fn flush(&mut self, ready: &mut [Ready]) -> bool {
        let mut more = false;
        for (live, ready) in self.live.iter_mut().zip(ready) {
            more |= live.pair.flush(ready);
        }
        more
    }

    /// The next completion, the path that it came on, and whether its command is of unknown fate.
    pub(super) fn completion(&mut self) -> Option<(usize, Completion, bool)> {
        self.live.iter_mut().find_map(|live| {
            let mut completion = live.pair.completion()?;
            completion.token = live.outstanding.settle(completion.token);
            let made_up = !completion.sqhd_valid
                && completion.cqe.status().code() == Status::ABORTED_BY_HOST.code();
            live.answered += u64::from(!made_up);
            let unknown = made_up && live.pair.ending().is_some();
            Some((live.path, completion, unknown))
        })
    }

    /// What becomes of a command that a controller has answered with this status on `path`. `now` gives
    /// milliseconds.
    pub(super) fn judge(&mut self, path: usize, status: Status, now: impl FnOnce() -> u64) -> Fate {
        if status.is_success() {
            return Fate::Known;
        }
        let verdict = verdict(status);
        let live = self.live.iter().find(|live| live.path == path);
        let Some(live) = live.filter(|_| verdict != Verdict::Fail) else {
            return Fate::Known;
        };
        let tells = verdict == Verdict::AccessChanged && live.reports_access;
        let asked = usize::from(status.crdt()).checked_sub(1);
        let again = Again {
            now: now(),
            asked: asked.and_then(|index| live.retry_delays.get(index).copied()),
            elsewhere: verdict != Verdict::Here,
            // Until the controller tells that access is there again, it is not tried.
            counted: !tells,
        };
        if tells {
            self.access_changed(path);
        }
        Fate::Again(again)
    }

    /// Ends paths on which a command is outstanding for too long. `clock` is looked at only when something is
    /// outstanding; `often` says that it is cheap now.
    pub(super) fn end_overdue(&mut self, often: bool, clock: impl FnOnce() -> Instant) {
        if !often || !self.any_outstanding() || !self.quarters.pass(clock) {
            return;
        }
        for live in &mut self.live {
            if live.pair.ending().is_none() && self.quarters.is_overdue(&live.outstanding) {
                let after = self.io_timeout;
                live.cause = Some(format!(
                    "a command had no answer for {after:?} (--io-timeout)"
                ));
                live.pair.end();
            }
        }
    }

    /// Ends paths on which anything is outstanding, for the sake of a ring that must not wait.
    pub(super) fn end_busy(&mut self, cause: &str) {
        for live in &mut self.live {
            if live.pair.ending().is_none() && live.pair.outstanding() > 0 {
                live.cause = Some(cause.to_owned());
                live.pair.end();
            }
        }
    }

    /// Begins to look for them with the first command that is outstanding.
    pub(super) fn watch_overdue(&mut self, clock: impl FnOnce() -> Instant) {
        if self.quarters.stands_still() && self.any_outstanding() {
            self.quarters.pass(clock);
        }
    }

    /// When to look for them.
    pub(super) fn overdue_at(&self) -> Option<Instant> {
        self.quarters.deadline(self.any_outstanding())
    }

    fn any_outstanding(&self) -> bool {
        self.live.iter().any(|live| live.pair.outstanding() > 0)
    }

    /// One has ended, and is still there.
    pub(super) fn any_ends(&self) -> bool {
        self.live.iter().any(|live| live.pair.ending().is_some())
    }

    /// None takes commands.
    pub(super) fn none_is_usable(&self) -> bool {
        let usable = |live: &Live| live.pair.ending().is_none() && live.access.is_usable();
        !self.live.iter().any(usable)
    }

    /// One answers within its flush.
    pub(super) fn any_answers_in_flush(&self) -> bool {
        self.live.iter().any(|live| live.pair.answers_in_flush())
    }

    /// Takes out paths that have ended, once nothing is outstanding on them, and tells the control plane. What
    /// they left is then given by `unknown`.
    pub(super) fn drop_ended(&mut self, mut unknown: impl FnMut(usize) -> Unknown) {
        let Self {
            live,
            losses,
            past,
            generation,
            ..
        } = self;
        live.retain_mut(|live| {
            let Some(ending) = live.pair.ending().filter(|_| live.pair.outstanding() == 0) else {
                return true;
            };
            let lost = PairLost {
                association: live.association,
                cause: live.cause.take().unwrap_or_else(|| ending.to_string()),
            };
            // There is room for one from each path of each lane, and for one that was not read yet.
            let _ = losses.try_send(lost);
            *past = sum(*past, live.pair.counters());
            *generation = generation.wrapping_add(live.pair.generation() + 1);
            false
        });
        for index in (0..self.losing.len()).rev() {
            let path = self.losing[index].path;
            if self.live.iter().all(|live| live.path != path) {
                let Losing { done, .. } = self.losing.swap_remove(index);
                // Nobody asks any more when the daemon ends.
                let _ = done.send(unknown(path));
            }
        }
    }

    /// Number of descriptors.
    pub(super) fn len(&self) -> usize {
        self.live.len()
    }

    /// Changes with the descriptors.
    pub(super) fn generation(&self) -> u64 {
        let pairs = self.live.iter().map(|live| live.pair.generation());
        pairs.fold(self.generation, u64::wrapping_add)
    }

    /// One for each path.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.live.iter().map(|live| live.pair.interest().fd)
    }

    /// Descriptor number `index` may be waited on for writing: not where a path ends in this process.
    pub(super) fn writes(&self, index: usize) -> bool {
        let live = self.live.get(index);
        live.is_some_and(|live| !live.pair.answers_in_flush())
    }

    /// Descriptor number `index` is waited on for writing.
    pub(super) fn wants_write(&self, index: usize) -> bool {
        let live = self.live.get(index);
        live.is_some_and(|live| live.pair.interest().writable)
    }

    /// Commands that were submitted.
    pub(super) fn commands(&self) -> u64 {
        self.commands
    }

    /// Sums over all queue pairs that ever were.
    pub(super) fn counters(&self) -> Counters {
        let pairs = self.live.iter().map(|live| live.pair.counters());
        pairs.fold(self.past, sum)
    }
}

impl Outlet for Paths {
    fn choose(&mut self, avoid: PathSet) -> Option<usize> {
        let Self { live, choice, .. } = self;
        let alive = live.iter().filter(|live| live.pair.ending().is_none());
        let candidates = alive.map(|live| Candidate {
            path: live.path,
            access: live.access,
            room: live.pair.room(),
            outstanding: live.pair.outstanding(),
        });
        choice.choose(candidates, avoid)
    }

    fn limits(&self, path: usize) -> Option<&Limits> {
        let mut live = self.live.iter();
        Some(&live.find(|live| live.path == path)?.limits)
    }

    fn submit(
        &mut self,
        path: usize,
        sqe: Sqe,
        transfer: Transfer,
        token: u64,
    ) -> Result<(), Rejected> {
        let mut live = self.live.iter_mut();
        let live = live.find(|live| live.path == path && live.pair.ending().is_none());
        match live {
            Some(live) => {
                let token = self.quarters.stamp(token, &mut live.outstanding);
                let submitted = live.pair.submit(sqe, transfer, token);
                match &submitted {
                    Ok(_) => self.commands += 1,
                    Err(_) => drop(live.outstanding.settle(token)),
                }
                submitted.map(drop)
            }
            None => Err(Rejected {
                transfer,
                reason: RejectedReason::Ended,
            }),
        }
    }
}

fn sum(a: Counters, b: Counters) -> Counters {
    Counters {
        copied_bytes: a.copied_bytes + b.copied_bytes,
        sends: a.sends + b.sends,
        receives: a.receives + b.receives,
    }
}
