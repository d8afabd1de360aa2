//! The way from a disk to its controller: notices its loss, tries to get it back, and guards what the lost
//! association may still write.
//!
//! One task drives the states of [`state`] and all timers of a disk. Lanes tell it that their queue pair has
//! ended, and are told everything else: `docs/adr/0007-lost-controllers.md` says why this is safe.

pub(crate) mod backoff;
pub(crate) mod state;
pub(crate) mod verify;
pub(crate) mod way_back;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use nvmf::host::{Association, ControllerInfo, HostEvent, NamespaceInfo};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};

use self::backoff::Backoff;
use self::state::{Event, State};
use self::way_back::{Found, NotBack, Patience, WayBack};
use crate::bridge::fence::Fences;
use crate::bridge::translate::Limits;
use crate::namespace_events::NamespaceEvents;
use crate::worker::lane::FIRST_ASSOCIATION;
use crate::worker::mailbox::{LaneMessage, Mailbox, PairLost, Resume};

/// How long a write of unknown fate is feared where nothing bounds it: without keep-alive, a controller need not
/// notice that its host is gone.
const FEAR: Duration = Duration::from_secs(120);

/// What the way to a controller is made of.
pub(crate) struct PathSetup {
    /// The disk, for the log.
    pub(crate) name: String,
    /// The association, whose queue pairs the lanes have; `None` when the controller is away, and they have none.
    pub(crate) association: Option<Association>,
    /// The namespace.
    pub(crate) namespace: NamespaceEvents,
    /// The keep-alive time-out that was asked for.
    pub(crate) keep_alive: Duration,
    /// All lanes of the disk.
    pub(crate) lanes: Vec<Mailbox>,
    /// What the lanes tell.
    pub(crate) losses: mpsc::Receiver<PairLost>,
    /// How to get back; `None` where a loss is the end.
    pub(crate) way_back: Option<WayBack>,
}

/// See the module.
pub(crate) struct Path {
    name: String,
    state: State,
    association: Option<Association>,
    /// The number of the association, lost or not.
    number: u64,
    /// What it reports.
    events: mpsc::Receiver<HostEvent>,
    namespace: NamespaceEvents,
    /// What the namespace is called there.
    nsid: u32,
    keep_alive: Duration,
    lanes: Vec<Mailbox>,
    losses: mpsc::Receiver<PairLost>,
    way_back: Option<WayBack>,
    fences: Fences,
    /// What the deadlines of fences are counted from.
    epoch: Instant,
    /// When held requests fail, and why.
    failing: Vec<(Instant, Reason)>,
    backoff: Backoff,
    /// When the association was made.
    connected: Instant,
}

/// Why held requests fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    FastIoFail,
    ControllerLoss,
}

/// A loss, as far as it has to be told when it is over.
struct Outage {
    since: Instant,
    /// Requests that have to be replayed.
    unanswered: u64,
    /// Attempts that were made.
    attempts: u32,
    /// It is logged.
    loud: bool,
}

impl Path {
    /// A path that is connected, or is to be.
    pub(crate) fn new(setup: PathSetup) -> Self {
        let PathSetup {
            name,
            mut association,
            namespace,
            keep_alive,
            lanes,
            losses,
            way_back,
        } = setup;
        let patience = way_back.as_ref().map(|way| way.patience);
        let most = patience.map_or(Duration::ZERO, |patience| patience.reconnect_delay);
        Self {
            name,
            state: match association {
                Some(_) => State::Connected,
                None => State::Waiting,
            },
            events: match &mut association {
                Some(association) => association.events(),
                None => mpsc::channel(1).1,
            },
            association,
            number: FIRST_ASSOCIATION,
            nsid: namespace.namespace().nsid,
            namespace,
            keep_alive,
            lanes,
            losses,
            way_back,
            fences: Fences::default(),
            epoch: Instant::now(),
            failing: Vec::new(),
            backoff: Backoff::new(most),
            connected: Instant::now(),
        }
    }

    /// The namespace, and when it is another.
    pub(crate) fn namespace(&self) -> watch::Receiver<NamespaceInfo> {
        self.namespace.seen()
    }

    /// Keeps the disk connected until `stop` comes, or its sender goes away. Gives the association, if there is
    /// one then.
    pub(crate) async fn run(mut self, stop: oneshot::Receiver<()>) -> Option<Association> {
        tokio::select! {
            _ = stop => {}
            () = self.keep() => {}
        }
        self.association
    }

    /// Never ends.
    async fn keep(&mut self) {
        if self.association.is_none()
            && let Some(way_back) = self.way_back.clone()
        {
            let mut outage = Outage {
                since: Instant::now(),
                unanswered: 0,
                attempts: 0,
                loud: true,
            };
            self.await_failure(outage.since, way_back.patience);
            self.recover(&way_back, &mut outage).await;
        }
        loop {
            let cause = self.lost().await;
            self.enter(Event::Lost);
            let mut outage = self.lose(&cause).await;
            let Some(way_back) = self.way_back.clone() else {
                self.enter(Event::NoWayBack);
                self.tell(|| LaneMessage::Fail).await;
                tracing::error!(
                    disk = self.name,
                    "requests fail until the daemon is started again"
                );
                return std::future::pending().await;
            };
            self.await_failure(outage.since, way_back.patience);
            self.enter(Event::Collected);
            self.recover(&way_back, &mut outage).await;
        }
    }

    fn enter(&mut self, event: Event) {
        let next = self.state.after(event);
        tracing::debug!(disk = self.name, from = %self.state, to = %next, "{event:?}");
        self.state = next;
    }

    /// Waits until the association or a queue pair of it has ended. Gives the cause.
    async fn lost(&mut self) -> String {
        let Some(association) = &self.association else {
            return "it was never there".to_owned();
        };
        let mut lost = association.lost();
        loop {
            let expiry = self.expiry();
            tokio::select! {
                changed = lost.changed() => {
                    let loss = lost.borrow().as_ref().map(ToString::to_string);
                    let ended = || "it was ended".to_owned();
                    return loss.filter(|_| changed.is_ok()).unwrap_or_else(ended);
                }
                Some(event) = self.events.recv() => {
                    if let Some(association) = &self.association {
                        self.namespace.take(&event, association, self.number, self.nsid);
                    }
                }
                Some(pair) = self.losses.recv() => {
                    // What an association says that is gone is no news.
                    if pair.association == self.number {
                        return format!("an I/O queue: {}", pair.cause);
                    }
                }
                () = until(expiry) => self.expire().await,
            }
        }
    }

    /// Ends the association with all of its queue pairs, and fences what it may still write. From then on nothing
    /// reaches the controller any more through it.
    async fn lose(&mut self, cause: &str) -> Outage {
        let since = Instant::now();
        let association = self.association.take();
        let controller = association.as_ref().map(Association::controller);
        let at = controller.map(|controller| controller.address.to_string());
        let at = at.unwrap_or_default();
        let loud = self.backoff.lost(self.connected.elapsed());
        if loud {
            tracing::warn!(
                disk = self.name,
                controller = at,
                "association lost: {cause}"
            );
        } else {
            tracing::debug!(
                disk = self.name,
                controller = at,
                "association lost again: {cause}"
            );
        }
        let quiet_after = self.quiet_after(controller, loud);
        drop(association);
        let mut answers = Vec::with_capacity(self.lanes.len());
        for lane in &self.lanes {
            let (done, answer) = oneshot::channel();
            lane.send(LaneMessage::Lose { done }).await;
            answers.push(answer);
        }
        let mut unanswered = 0;
        let mut fences = Fences::default();
        for answer in answers {
            // Without an answer the lane is gone, and the guest's requests with it.
            if let Ok(unknown) = answer.await {
                unanswered += unknown.requests;
                fences.add_all(&unknown.fences, self.number, u64::MAX);
            }
        }
        // Now is later than the last command; what its milliseconds are short of is made up for.
        let deadline = self
            .now()
            .saturating_add(millis(quiet_after).saturating_add(1));
        self.fences.add_all(&fences, self.number, deadline);
        Outage {
            since,
            unanswered,
            attempts: 0,
            loud,
        }
    }

    /// How long a lost association may still write.
    fn quiet_after(&self, controller: Option<&ControllerInfo>, loud: bool) -> Duration {
        let bound =
            controller.and_then(|controller| controller.liveness.quiet_after(self.keep_alive));
        if bound.is_none() && loud {
            tracing::warn!(
                disk = self.name,
                "without keep-alive nothing says when a lost controller stops writing; {FEAR:?} are taken for \
                 enough"
            );
        }
        bound.unwrap_or(FEAR)
    }

    /// Tries until it is connected again.
    async fn recover(&mut self, way_back: &WayBack, outage: &mut Outage) {
        let lanes = self.lanes.len();
        let lost = self.namespace.namespace();
        loop {
            let pause = self.backoff.next();
            outage.attempts = outage.attempts.saturating_add(1);
            self.alongside(sleep(pause)).await;
            self.enter(Event::Elapsed);
            let association = match self.alongside(way_back.connect(lanes)).await {
                Ok(association) => association,
                Err(error) => {
                    self.attempt_failed(&error, outage);
                    continue;
                }
            };
            self.enter(Event::Established);
            let verified = way_back.verify(association, &lost, lanes);
            match self.alongside(verified).await {
                Ok((association, found)) => {
                    self.enter(Event::Verified);
                    self.resume(association, found, outage).await;
                    self.enter(Event::Resumed);
                    return;
                }
                Err(error) => self.attempt_failed(&error, outage),
            }
        }
    }

    /// Carries out a step, and whatever timers ask for meanwhile.
    async fn alongside<T>(&mut self, step: impl Future<Output = T>) -> T {
        let mut step = pin!(step);
        loop {
            let failing = self.failing.iter().map(|(at, _)| *at).min();
            let next = [self.expiry(), failing].into_iter().flatten().min();
            tokio::select! {
                done = &mut step => return done,
                () = until(next) => {
                    self.expire().await;
                    self.fail().await;
                }
            }
        }
    }

    fn attempt_failed(&mut self, error: &NotBack, outage: &Outage) {
        let attempts = outage.attempts;
        // The first, the second, the fourth and so on: an outage of days leaves a page.
        if outage.loud && attempts.is_power_of_two() {
            let since = outage.since.elapsed();
            tracing::warn!(
                disk = self.name,
                attempts,
                "still not connected after {}: {error}",
                seconds(since)
            );
        } else {
            tracing::debug!(disk = self.name, attempts, "not connected: {error}");
        }
        self.enter(Event::Failed);
    }

    /// Gives every lane its queue pair, and all fences with it.
    async fn resume(&mut self, mut association: Association, found: Found, outage: &Outage) {
        let (namespace, pairs) = found;
        // What lanes told of the association before is no news, and must not keep out what they tell next.
        while self.losses.try_recv().is_ok() {}
        self.number += 1;
        self.failing.clear();
        self.fences.expire(self.now());
        let fences = Arc::new(self.fences.clone());
        let limits = Limits::new(association.controller(), &namespace);
        let controller = association.controller().address;
        self.events = association.events();
        self.nsid = namespace.nsid;
        self.association = Some(association);
        for (lane, pair) in self.lanes.iter().zip(pairs) {
            let resume = Resume {
                association: self.number,
                pair,
                limits,
                fences: Arc::clone(&fences),
            };
            lane.send(LaneMessage::Resume(Box::new(resume))).await;
        }
        self.namespace.found(&namespace).await;
        self.connected = Instant::now();
        if outage.loud {
            tracing::info!(
                disk = self.name,
                %controller,
                seconds = outage.since.elapsed().as_secs_f32(),
                attempts = outage.attempts,
                replayed = outage.unanswered,
                fenced = fences.len(),
                "association is back"
            );
        } else {
            tracing::debug!(disk = self.name, %controller, "association is back again");
        }
    }

    /// Sets the times at which held requests fail.
    fn await_failure(&mut self, since: Instant, patience: Patience) {
        let times = [
            (patience.fast_io_fail, Reason::FastIoFail),
            (patience.ctrl_loss, Reason::ControllerLoss),
        ];
        let at = |(after, reason): (Option<Duration>, _)| {
            let at = since.checked_add(after?)?;
            Some((at, reason))
        };
        self.failing = times.into_iter().filter_map(at).collect();
    }

    /// Has held requests fail, when it is time.
    async fn fail(&mut self) {
        let now = Instant::now();
        let due: Vec<_> = self.failing.extract_if(.., |(at, _)| *at <= now).collect();
        for (_, reason) in &due {
            let (option, what) = match reason {
                Reason::FastIoFail => ("--fast-io-fail-tmo", "requests fail until it is back"),
                Reason::ControllerLoss => (
                    "--ctrl-loss-tmo",
                    "the controller is given up, and requests fail until it is back all the same",
                ),
            };
            tracing::error!(disk = self.name, "{option} has passed: {what}");
        }
        if !due.is_empty() {
            self.tell(|| LaneMessage::Fail).await;
        }
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
            let fences = Arc::new(self.fences.clone());
            self.tell(|| LaneMessage::Fences(Arc::clone(&fences))).await;
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

    fn expiry(&self) -> Option<Instant> {
        let deadline = self.fences.next_deadline()?;
        self.epoch.checked_add(Duration::from_millis(deadline))
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

/// For people.
fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
