//! One path of a disk as the control plane sees it: its state, its association, its outage, and what the log says of
//! them.

use std::time::Duration;

use nvmf::host::{Association, ControllerInfo};
use tokio::time::Instant;

use super::backoff::Backoff;
use super::state::{Event, State};
use super::way_back::{NotBack, Patience, WayBack};
use crate::bridge::path_choice::Access;

/// How long a write of unknown fate is feared where nothing bounds it: without keep-alive, a controller need not
/// notice that its host is gone.
pub(super) const FEAR: Duration = Duration::from_secs(120);

/// Why held requests fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    FastIoFail,
    ControllerLoss,
    /// There is no way back.
    Never,
}

/// A loss, or a path that was never there, as far as it has to be told when it is over.
pub(super) struct Outage {
    pub(super) since: Instant,
    /// Requests that have to be replayed.
    pub(super) unanswered: u64,
    /// Attempts that were made.
    pub(super) attempts: u32,
    /// It is logged.
    pub(super) loud: bool,
    /// The path was there before.
    pub(super) lost: bool,
}

/// See the module.
pub(super) struct Path {
    /// The disk, for the log.
    pub(super) disk: String,
    pub(super) state: State,
    pub(super) way_back: Option<WayBack>,
    pub(super) association: Option<Association>,
    /// The number of the association among all of the disk, lost or not; 0 before the first.
    pub(super) number: u64,
    /// What the namespace is called there.
    pub(super) nsid: u32,
    /// Lanes that have a queue pair there: the first ones.
    pub(super) pairs: usize,
    /// What the path is good for.
    pub(super) access: Access,
    /// When its controller must be through with a change of that.
    pub(super) change_ends: Option<Instant>,
    pub(super) outage: Outage,
    /// When requests fail that no path carries out, as far as this one is asked, and why.
    pub(super) failing: Vec<(Instant, Reason)>,
    /// The last such time that has passed.
    pub(super) failed: Option<Reason>,
    backoff: Backoff,
    /// When the association was made.
    connected: Instant,
}

impl Path {
    /// One that is not connected yet.
    pub(super) fn new(disk: String, way_back: Option<WayBack>) -> Self {
        let patience = way_back.as_ref().map(|way| way.patience);
        let most = patience.map_or(Duration::ZERO, |patience| patience.reconnect_delay);
        let since = Instant::now();
        Self {
            disk,
            state: State::Waiting,
            way_back,
            association: None,
            number: 0,
            nsid: 0,
            pairs: 0,
            access: Access::Optimized,
            change_ends: None,
            outage: Outage {
                since,
                unanswered: 0,
                attempts: 0,
                loud: true,
                lost: false,
            },
            failing: patience.map_or(Vec::new(), |patience| failing(since, patience)),
            failed: None,
            backoff: Backoff::new(most),
            connected: since,
        }
    }

    /// It is connected from the start.
    pub(super) fn begin_connected(&mut self) {
        self.state = State::Resuming;
    }

    pub(super) fn enter(&mut self, event: Event) {
        let next = self.state.after(event);
        tracing::debug!(disk = self.disk, from = %self.state, to = %next, "{event:?}");
        self.state = next;
    }

    /// Notes and logs that the association is lost, and ends it. Gives how long it may still write.
    pub(super) fn lose(&mut self, cause: &str, keep_alive: Duration) -> Duration {
        let since = Instant::now();
        let association = self.association.take();
        let controller = association.as_ref().map(Association::controller);
        let at = controller.map(|controller| controller.address.to_string());
        let at = at.unwrap_or_default();
        let loud = self.backoff.lost(self.connected.elapsed());
        if loud {
            tracing::warn!(
                disk = self.disk,
                controller = at,
                "association lost: {cause}"
            );
        } else {
            tracing::debug!(
                disk = self.disk,
                controller = at,
                "association lost again: {cause}"
            );
        }
        self.change_ends = None;
        self.outage = Outage {
            since,
            unanswered: 0,
            attempts: 0,
            loud,
            lost: true,
        };
        let patience = self.way_back.as_ref().map(|way| way.patience);
        self.failing = patience.map_or(Vec::new(), |patience| failing(since, patience));
        self.failed = None;
        self.quiet_after(controller, keep_alive)
    }

    /// How long the association that there is may still write when it is lost.
    pub(super) fn quiet(&self, keep_alive: Duration) -> Option<Duration> {
        let controller = self.association.as_ref()?.controller();
        Some(controller.liveness.quiet_after(keep_alive).unwrap_or(FEAR))
    }

    /// How long a lost association may still write.
    fn quiet_after(&self, controller: Option<&ControllerInfo>, keep_alive: Duration) -> Duration {
        let bound = controller.and_then(|controller| controller.liveness.quiet_after(keep_alive));
        if bound.is_none() && self.outage.loud {
            tracing::warn!(
                disk = self.disk,
                "without keep-alive nothing says when a lost controller stops writing; {FEAR:?} are taken for \
                 enough"
            );
        }
        bound.unwrap_or(FEAR)
    }

    /// The pause before the next attempt.
    pub(super) fn next_pause(&mut self) -> Duration {
        self.outage.attempts = self.outage.attempts.saturating_add(1);
        self.backoff.next()
    }

    pub(super) fn attempt_failed(&mut self, error: &NotBack) {
        let attempts = self.outage.attempts;
        // The first, the second, the fourth and so on: an outage of days leaves a page.
        if self.outage.loud && attempts.is_power_of_two() {
            let since = self.outage.since.elapsed();
            tracing::warn!(
                disk = self.disk,
                attempts,
                "still not connected after {}: {error}",
                seconds(since)
            );
        } else {
            tracing::debug!(disk = self.disk, attempts, "not connected: {error}");
        }
        self.enter(Event::Failed);
    }

    /// Notes that there is an association. Gives its controller.
    pub(super) fn resume(&mut self, association: Association, number: u64, nsid: u32) {
        self.association = Some(association);
        (self.number, self.nsid) = (number, nsid);
        self.failing.clear();
        self.failed = None;
        self.connected = Instant::now();
    }

    /// Logs that there is an association again; `fenced` ranges are, for the whole disk.
    pub(super) fn tell_resumed(&self, fenced: usize) {
        let controller = self.association.as_ref().map(Association::controller);
        let controller = controller.map(|controller| controller.address.to_string());
        let controller = controller.unwrap_or_default();
        let outage = &self.outage;
        if !outage.lost {
            tracing::info!(
                disk = self.disk,
                controller,
                attempts = outage.attempts,
                "another path is connected"
            );
        } else if outage.loud {
            tracing::info!(
                disk = self.disk,
                controller,
                seconds = outage.since.elapsed().as_secs_f32(),
                attempts = outage.attempts,
                replayed = outage.unanswered,
                fenced,
                "association is back"
            );
        } else {
            tracing::debug!(disk = self.disk, controller, "association is back again");
        }
    }
}

/// The times at which held requests fail.
fn failing(since: Instant, patience: Patience) -> Vec<(Instant, Reason)> {
    let times = [
        (patience.fast_io_fail, Reason::FastIoFail),
        (patience.ctrl_loss, Reason::ControllerLoss),
    ];
    let at = |(after, reason): (Option<Duration>, _)| {
        let at = since.checked_add(after?)?;
        Some((at, reason))
    };
    times.into_iter().filter_map(at).collect()
}

/// For people.
fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
