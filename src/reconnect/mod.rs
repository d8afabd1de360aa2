//! The paths from a disk to its controllers: notices the loss of one, tries to get it back, and guards what the lost
//! association may still write.
//!
//! One task drives the states of [`state`] for each path, and all timers of a disk; what takes its time, such as an
//! attempt to connect, runs beside it and holds up no other path. Lanes tell it that a queue pair has ended, and are
//! told everything else: `docs/adr/0007-lost-controllers.md` and `docs/adr/0008-several-paths.md` say why this is
//! safe.

pub(crate) mod backoff;
mod cross_reset;
pub(crate) mod crowd;
pub(crate) mod earlier;
mod moving;
mod path;
pub(crate) mod state;
mod status;
pub(crate) mod verify;
pub(crate) mod way_back;

use std::sync::Arc;
use std::time::Duration;

use nvmf::host::{AnaLog, Association, HostError, HostEvent, NamespaceInfo, TargetAddress};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use self::cross_reset::{Answer, AtLarge};
use self::earlier::{Earlier, SessionNews};
use self::path::{Path, Reason};
use self::state::Event;
use self::way_back::{Found, NotBack, WayBack, access_of};
use crate::bridge::fence::Fences;
use crate::bridge::path_choice::{Access, PathSet};
use crate::bridge::translate::Limits;
use crate::limits::MAX_PATHS;
use crate::namespace_events::NamespaceEvents;
use crate::status::StatusSignal;
use crate::worker::mailbox::{LaneMessage, Mailbox, PairLost, Resume};
use crate::worker::placement::Placement;

/// How long to wait before a log of access states is read again that could not be read.
const READ_AGAIN: Duration = Duration::from_secs(1);

/// What the ways to a namespace are made of.
pub(crate) struct PathsSetup {
    /// The disk, for the log.
    pub(crate) name: String,
    /// The association of the first path, what was found there, and its queue pairs; `None` when its controller is
    /// away.
    pub(crate) first: Option<(Association, Found)>,
    /// The namespace.
    pub(crate) namespace: NamespaceEvents,
    /// The keep-alive time-out that was asked for.
    pub(crate) keep_alive: Duration,
    /// All lanes of the disk, and which rings they have.
    pub(crate) placement: Arc<Placement>,
    /// What the front-end's session tells.
    pub(crate) session: mpsc::Receiver<SessionNews>,
    /// Lanes tell that requests of an earlier life have come to them.
    pub(crate) recovered: mpsc::Receiver<()>,
    /// How long storage in this machine goes on with what a process had begun that is gone; `None` for a
    /// controller elsewhere.
    pub(crate) local_quiet: Option<Duration>,
    /// Parts of blocks are written by writing all of a block.
    pub(crate) writes_around: bool,
    /// What the lanes tell of queue pairs.
    pub(crate) losses: mpsc::Receiver<PairLost>,
    /// The associations whose controllers said that access has changed, as the lanes tell.
    pub(crate) changes: mpsc::Receiver<u64>,
    /// How to get back to the first path; `None` where its loss is the end.
    pub(crate) way_back: Option<WayBack>,
    /// Where further paths lead to.
    pub(crate) others: Vec<TargetAddress>,
    /// The same, of those that are found later.
    pub(crate) new_paths: mpsc::Receiver<TargetAddress>,
}

/// See the module.
pub(crate) struct Paths {
    name: String,
    paths: Vec<Path>,
    /// Where further paths lead to.
    others: Vec<TargetAddress>,
    new_paths: mpsc::Receiver<TargetAddress>,
    /// What is to be done first.
    first: Option<(Association, Found)>,
    /// Associations up to now.
    associations: u64,
    namespace: NamespaceEvents,
    keep_alive: Duration,
    lanes: Vec<Mailbox>,
    placement: Arc<Placement>,
    /// The lanes that have rings, as was said last, and whether they are being moved.
    usable: usize,
    moving: bool,
    earlier: Earlier,
    at_large: AtLarge,
    status: StatusSignal,
    losses: mpsc::Receiver<PairLost>,
    changes: mpsc::Receiver<u64>,
    /// What runs beside.
    tasks: JoinSet<News>,
    fences: Fences,
    /// What the deadlines of fences are counted from.
    epoch: Instant,
    /// Losses up to now.
    round: u64,
    /// Paths whose fences not every lane is known to know.
    unreleased: PathSet,
}

/// What something that runs beside has come to.
enum News {
    /// The pause before an attempt is over.
    Elapsed(usize),
    /// An association was made, or not.
    Established(usize, Result<Association, NotBack>),
    /// It was found to be of use, or not.
    Verified(usize, Result<(Association, Found), NotBack>),
    /// An association has ended.
    Lost(PairLost),
    /// A controller reports something; what comes next comes from there.
    Reported(u64, HostEvent, mpsc::Receiver<HostEvent>),
    /// The log of access states was read.
    Access(u64, Result<AnaLog, HostError>),
    /// All lanes have no command outstanding that the fences of this round forbid.
    Fenced(u64),
    /// A controller was asked whether another one is done.
    Answered(Answer),
    /// So many rings run on other lanes now.
    Moved(usize),
    /// There is nothing more to come.
    Nothing,
}

impl Paths {
    /// The paths of a disk of which the first is connected.
    pub(crate) fn new(setup: PathsSetup) -> Self {
        let PathsSetup {
            name,
            first,
            namespace,
            keep_alive,
            placement,
            session,
            recovered,
            local_quiet,
            writes_around,
            losses,
            changes,
            way_back,
            others,
            new_paths,
        } = setup;
        let lanes = placement.lanes().to_vec();
        let mut primary = Path::new(name.clone(), way_back);
        // The disk was there before, if not in this process.
        primary.outage.lost = true;
        Self {
            name,
            paths: vec![primary],
            others,
            new_paths,
            first,
            associations: 0,
            namespace,
            keep_alive,
            usable: lanes.len(),
            moving: false,
            lanes,
            placement,
            earlier: Earlier::new(session, recovered, local_quiet, writes_around),
            at_large: AtLarge::default(),
            status: StatusSignal::new(),
            losses,
            changes,
            tasks: JoinSet::new(),
            fences: Fences::default(),
            epoch: Instant::now(),
            round: 0,
            unreleased: PathSet::EMPTY,
        }
    }

    /// The namespace, and when it is another.
    pub(crate) fn namespace(&self) -> watch::Receiver<NamespaceInfo> {
        self.namespace.seen()
    }

    /// Keeps the disk connected until `stop` comes, or its sender goes away. Gives the associations that there are
    /// then.
    pub(crate) async fn run(mut self, stop: oneshot::Receiver<()>) -> Vec<Association> {
        tokio::select! {
            _ = stop => {}
            () = self.keep() => {}
        }
        let associations = self.paths.iter_mut();
        let mut associations: Vec<_> = associations
            .filter_map(|path| path.association.take())
            .collect();
        associations.extend(self.first.map(|(association, _)| association));
        associations
    }

    /// Never ends.
    async fn keep(&mut self) {
        match self.first.take() {
            Some((association, found)) => {
                if let Some(path) = self.paths.first_mut() {
                    path.begin_connected();
                }
                self.resume(0, association, found).await;
            }
            None => self.pause(0),
        }
        for target in std::mem::take(&mut self.others) {
            self.add(target);
        }
        loop {
            let next = self.next_timer();
            tokio::select! {
                Some(done) = self.tasks.join_next() => {
                    // What panics or is aborted has nothing to tell.
                    if let Ok(news) = done {
                        self.take(news).await;
                    }
                }
                Some(pair) = self.losses.recv() => self.lost_pair(&pair).await,
                Some(target) = self.new_paths.recv() => self.add(target),
                news = self.earlier.next() => self.session_news(news).await,
                Some(number) = self.changes.recv() => self.read_access(number, Duration::ZERO),
                () = self.status.asked() => self.log_status(),
                () = until(next) => {
                    self.expire().await;
                    self.fail().await;
                    self.end_changes().await;
                }
            }
        }
    }

    /// One more path, to be connected like one that was lost.
    fn add(&mut self, target: TargetAddress) {
        let ways = self.paths.iter().filter_map(|path| path.way_back.as_ref());
        if self.paths.len() >= MAX_PATHS || ways.clone().any(|way| way.target == target) {
            return;
        }
        let Some(way) = ways.clone().next() else {
            return;
        };
        let way = WayBack {
            target,
            ..way.clone()
        };
        self.paths.push(Path::new(self.name.clone(), Some(way)));
        self.pause(self.paths.len() - 1);
    }

    async fn take(&mut self, news: News) {
        match news {
            News::Elapsed(index) => self.connect(index),
            News::Established(index, Ok(association)) => self.verify(index, association),
            News::Established(index, Err(error)) | News::Verified(index, Err(error)) => {
                if let Some(path) = self.paths.get_mut(index) {
                    path.attempt_failed(&error);
                    self.pause(index);
                }
            }
            News::Verified(index, Ok((association, found))) => {
                self.enter(index, Event::Verified);
                self.resume(index, association, found).await;
            }
            News::Lost(lost) => {
                if let Some(index) = self.path_of(lost.association) {
                    self.lose(index, &lost.cause).await;
                }
            }
            News::Reported(number, event, events) => self.reported(number, &event, events),
            News::Access(number, log) => self.access_read(number, log).await,
            News::Fenced(round) => self.fenced(round).await,
            News::Answered(answer) => self.answered(answer).await,
            News::Moved(moved) => self.moved(moved),
            News::Nothing => {}
        }
    }

    fn enter(&mut self, index: usize, event: Event) {
        if let Some(path) = self.paths.get_mut(index) {
            path.enter(event);
        }
    }

    /// The path with an association of this number; what others tell is no news.
    fn path_of(&self, number: u64) -> Option<usize> {
        let mut paths = self.paths.iter();
        paths.position(|path| path.association.is_some() && path.number == number)
    }

    async fn lost_pair(&mut self, pair: &PairLost) {
        if let Some(index) = self.path_of(pair.association) {
            self.lose(index, &format!("an I/O queue: {}", pair.cause))
                .await;
        }
    }

    /// Ends the association of a path with all of its queue pairs, and fences what it may still write. From then on
    /// nothing reaches the controller any more through it.
    async fn lose(&mut self, index: usize, cause: &str) {
        let Some(path) = self.paths.get_mut(index) else {
            return;
        };
        path.enter(Event::Lost);
        let party = path.party();
        let quiet_after = path.lose(cause, self.keep_alive);
        let number = path.number;
        let (unanswered, fences) = self.collect(index, number).await;
        // Now is later than the last command; what its milliseconds are short of is made up for.
        let deadline = self
            .now()
            .saturating_add(millis(quiet_after).saturating_add(1));
        self.fences.add_all(&fences, number, deadline);
        if !fences.is_empty() {
            self.lost_at_large(number, party, deadline);
        }
        self.fence().await;
        let Some(path) = self.paths.get_mut(index) else {
            return;
        };
        path.outage.unanswered = unanswered;
        if path.way_back.is_some() {
            path.enter(Event::Collected);
            self.pause(index);
        } else {
            path.enter(Event::NoWayBack);
            path.failing = vec![(Instant::now(), Reason::Never)];
        }
        self.ask();
        self.spread();
    }

    /// Has every lane end its queue pair of a path. Gives how many requests were not answered, and what they may
    /// still write.
    async fn collect(&mut self, index: usize, number: u64) -> (u64, Fences) {
        self.round += 1;
        self.unreleased.insert(index);
        let mut answers = Vec::with_capacity(self.lanes.len());
        for lane in &self.lanes {
            let (done, answer) = oneshot::channel();
            lane.send(LaneMessage::Lose { path: index, done }).await;
            answers.push(answer);
        }
        let mut unanswered = 0;
        let mut fences = Fences::default();
        for answer in answers {
            // Without an answer the lane is gone, and the guest's requests with it.
            if let Ok(unknown) = answer.await {
                unanswered += unknown.requests;
                fences.add_all(&unknown.fences, number, u64::MAX);
            }
        }
        (unanswered, fences)
    }

    /// Gives every lane all fences, and learns when nothing is outstanding any more that they forbid.
    async fn fence(&mut self) {
        self.save();
        let fences = Arc::new(self.fences.clone());
        let mut answers = Vec::with_capacity(self.lanes.len());
        for lane in &self.lanes {
            let (done, answer) = oneshot::channel();
            let (fences, done) = (Arc::clone(&fences), Some(done));
            lane.send(LaneMessage::Fences { fences, done }).await;
            answers.push(answer);
        }
        let round = self.round;
        self.tasks.spawn(async move {
            for answer in answers {
                // Without an answer the lane is gone, or has got the fences of a later round.
                let _ = answer.await;
            }
            News::Fenced(round)
        });
    }

    /// What was lost begins anew, unless something else is lost meanwhile: what that may still write has to be known
    /// first.
    async fn fenced(&mut self, round: u64) {
        while let Ok(pair) = self.losses.try_recv() {
            self.lost_pair(&pair).await;
        }
        if round == self.round {
            let released = std::mem::take(&mut self.unreleased);
            self.tell(|| LaneMessage::Release(released)).await;
        }
    }

    /// Waits for the time of the next attempt.
    fn pause(&mut self, index: usize) {
        if let Some(path) = self.paths.get_mut(index) {
            let pause = path.next_pause();
            self.tasks.spawn(async move {
                sleep(pause).await;
                News::Elapsed(index)
            });
        }
    }

    fn connect(&mut self, index: usize) {
        self.enter(index, Event::Elapsed);
        let lanes = self.lanes.len();
        if let Some(way) = self.way_back(index) {
            self.tasks
                .spawn(async move { News::Established(index, way.connect(lanes).await) });
        }
    }

    fn verify(&mut self, index: usize, association: Association) {
        self.enter(index, Event::Established);
        let lost = self.namespace.namespace();
        let several = self.paths.len() > 1;
        if let Some(way) = self.way_back(index) {
            self.tasks.spawn(async move {
                News::Verified(index, way.verify(association, &lost, several).await)
            });
        }
    }

    fn way_back(&self, index: usize) -> Option<WayBack> {
        self.paths.get(index)?.way_back.clone()
    }

    /// Gives every lane its queue pair, and all fences with it.
    async fn resume(&mut self, index: usize, mut association: Association, found: Found) {
        let Found {
            namespace,
            access,
            pairs,
        } = found;
        self.associations += 1;
        let number = self.associations;
        // That of the start has been told.
        let connected_later = self
            .paths
            .get(index)
            .is_some_and(|path| path.outage.attempts > 0);
        self.watch(number, &mut association);
        self.fences.expire(self.now());
        let fences = Arc::new(self.fences.clone());
        let controller = association.controller();
        let limits = Limits::new(controller, &namespace);
        let reports_access = controller.ana.is_some();
        let traffic: Vec<_> = pairs.iter().map(|_| association.traffic()).collect();
        let retry_delays = controller.retry_delays.map(millis);
        if pairs.len() < self.lanes.len() {
            tracing::warn!(
                disk = self.name,
                controller = %controller.address,
                io_queues = pairs.len(),
                lanes = self.lanes.len(),
                "the controller grants fewer I/O queues than the disk has lanes: the others do without this path"
            );
        }
        if let Some(path) = self.paths.get_mut(index) {
            path.resume(association, number, namespace.nsid);
            path.pairs = pairs.len();
        }
        // Before anything is sent.
        self.save();
        for ((lane, pair), traffic) in self.lanes.iter().zip(pairs).zip(traffic) {
            let resume = Resume {
                path: index,
                association: number,
                pair,
                limits,
                retry_delays,
                access,
                reports_access,
                traffic,
                fences: Arc::clone(&fences),
            };
            lane.send(LaneMessage::Resume(Box::new(resume))).await;
        }
        // That of the start is known.
        if connected_later {
            self.namespace.found(&namespace).await;
        }
        self.set_access(index, access).await;
        self.enter(index, Event::Resumed);
        self.ask();
        self.spread();
        if connected_later && let Some(path) = self.paths.get(index) {
            path.tell_resumed(fences.len());
        }
    }

    /// Learns of the end of an association, and of what it reports.
    fn watch(&mut self, number: u64, association: &mut Association) {
        let mut lost = association.lost();
        self.tasks.spawn(async move {
            let changed = lost.changed().await;
            let loss = lost.borrow().as_ref().map(ToString::to_string);
            let ended = || "it was ended".to_owned();
            let cause = loss.filter(|_| changed.is_ok()).unwrap_or_else(ended);
            News::Lost(PairLost {
                association: number,
                cause,
            })
        });
        let events = association.events();
        self.await_event(number, events);
    }

    fn await_event(&mut self, number: u64, mut events: mpsc::Receiver<HostEvent>) {
        self.tasks.spawn(async move {
            match events.recv().await {
                Some(event) => News::Reported(number, event, events),
                None => News::Nothing,
            }
        });
    }

    fn reported(&mut self, number: u64, event: &HostEvent, events: mpsc::Receiver<HostEvent>) {
        let Some(index) = self.path_of(number) else {
            return;
        };
        let path = self.paths.get(index);
        if let Some((association, nsid)) =
            path.and_then(|path| Some((path.association.as_ref()?, path.nsid)))
        {
            self.namespace.take(event, association, number, nsid);
        }
        if matches!(event, HostEvent::AnaChanged | HostEvent::Missed) {
            self.read_access(number, Duration::ZERO);
        }
        self.await_event(number, events);
    }

    /// Reads what an association's path is good for, if its controller tells.
    fn read_access(&mut self, number: u64, after: Duration) {
        let index = self.path_of(number);
        let path = index.and_then(|index| self.paths.get(index));
        let association = path.and_then(|path| path.association.as_ref());
        if let Some(association) =
            association.filter(|association| association.controller().ana.is_some())
        {
            let inquiry = association.inquiry();
            self.tasks.spawn(async move {
                sleep(after).await;
                News::Access(number, inquiry.ana_log().await)
            });
        }
    }

    async fn access_read(&mut self, number: u64, log: Result<AnaLog, HostError>) {
        let Some(index) = self.path_of(number) else {
            return;
        };
        match log {
            Ok(log) => {
                let nsid = self.paths.get(index).map_or(0, |path| path.nsid);
                let group = self.namespace.namespace().anagrpid;
                self.set_access(index, access_of(&log, nsid, group)).await;
            }
            Err(error) => {
                tracing::warn!(disk = self.name, "{error}");
                self.read_access(number, READ_AGAIN);
            }
        }
    }

    /// A path is good for this from now on.
    async fn set_access(&mut self, index: usize, access: Access) {
        let Some(path) = self.paths.get_mut(index) else {
            return;
        };
        let controller = path.association.as_ref().map(Association::controller);
        let ana = controller.and_then(|controller| controller.ana);
        if path.access != access {
            let at = controller.map(|controller| controller.address.to_string());
            let at = at.unwrap_or_default();
            tracing::info!(disk = self.name, controller = at, "access is {access} now");
        }
        // A change that goes on is not a new one.
        let within = ana.map(|ana| ana.transition_time);
        path.change_ends = match (access, within) {
            (Access::Change, Some(within)) if !within.is_zero() => path
                .change_ends
                .or_else(|| Instant::now().checked_add(within)),
            _ => None,
        };
        path.access = access;
        self.tell(|| LaneMessage::Access {
            path: index,
            access,
        })
        .await;
        self.spread();
    }

    /// Loses paths whose controllers are not through with a change in the time that they state.
    async fn end_changes(&mut self) {
        let now = Instant::now();
        for index in 0..self.paths.len() {
            let ends = self.paths.get(index).and_then(|path| path.change_ends);
            if ends.is_some_and(|ends| ends <= now) {
                let cause = "access was changing for longer than the controller said it might";
                self.lose(index, cause).await;
            }
        }
    }

    /// Has held requests fail, when the time of every path has passed.
    async fn fail(&mut self) {
        let now = Instant::now();
        let mut due = None;
        for path in &mut self.paths {
            for (_, reason) in path.failing.extract_if(.., |(at, _)| *at <= now) {
                path.failed = Some(reason);
                due = Some(reason);
            }
        }
        let Some(reason) = due else {
            return;
        };
        let gone = |path: &Path| path.association.is_none() && path.failed.is_some();
        if !self.paths.iter().all(gone) {
            return;
        }
        match reason {
            Reason::FastIoFail => tracing::error!(
                disk = self.name,
                "--fast-io-fail-tmo has passed: requests fail until it is back"
            ),
            Reason::ControllerLoss => tracing::error!(
                disk = self.name,
                "--ctrl-loss-tmo has passed: the controller is given up, and requests fail until it is back all \
                 the same"
            ),
            Reason::Never => tracing::error!(
                disk = self.name,
                "requests fail until the daemon is started again"
            ),
        }
        self.tell(|| LaneMessage::Fail).await;
    }

    /// Takes fences down, when it is time.
    async fn expire(&mut self) {
        let now = self.now();
        if self.fences.expire(now) {
            tracing::debug!(
                disk = self.name,
                left = self.fences.len(),
                "fences have expired"
            );
            self.save();
            let fences = Arc::new(self.fences.clone());
            self.tell(|| LaneMessage::Fences {
                fences: Arc::clone(&fences),
                done: None,
            })
            .await;
        }
    }

    async fn tell(&self, message: impl Fn() -> LaneMessage) {
        for lane in &self.lanes {
            lane.send(message()).await;
        }
    }

    /// Milliseconds of the clock of fences, rounded down.
    fn now(&self) -> u64 {
        millis(self.epoch.elapsed())
    }

    /// When something is due.
    fn next_timer(&self) -> Option<Instant> {
        let deadline = self.fences.next_deadline();
        let expiry =
            deadline.and_then(|deadline| self.epoch.checked_add(Duration::from_millis(deadline)));
        let failing = |path: &Path| path.failing.iter().map(|(at, _)| *at).min();
        let paths = self.paths.iter();
        let of_paths = paths.flat_map(|path| [failing(path), path.change_ends]);
        of_paths.chain([expiry]).flatten().min()
    }
}

/// Waits until then; for ever, if there is no such time.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
