//! Keeps asynchronous event requests outstanding at a controller, and turns what completes them into
//! [`HostEvent`]s.
//!
//! An event is held back by the controller until the log page that it names was read. So the page is read
//! before the request is sent again, and an event whose page cannot be read is reported for all that it
//! may mean. A controller that completes requests faster than anything can happen is slowed down, and one
//! that refuses them is asked ever more rarely.

mod event;
mod pace;

use std::time::Duration;

use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep};

use self::pace::Pace;
use super::admin::Admin;
use super::error::HostError;
use crate::spec::event::{AsyncEvent, config};
use crate::spec::log::GetLogPage;
use crate::spec::{NSID_ALL, Sqe, Status, feature};
use crate::transport::{Completion, Transfer};

pub use event::{Changed, HostEvent};

/// Requests that are outstanding at most: the admin queue has room for more commands beside them.
const REQUESTS_MAX: u16 = 8;
/// Events that wait for whoever takes them.
const WAITING_MAX: usize = 32;
/// First and longest pause after a refused request.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);
const REFUSED_PAUSE_MAX: Duration = Duration::from_secs(60);

/// What a controller says of the events that it reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EventSupport {
    /// Requests that it holds (AERL), from 1; 0 when nothing is known.
    pub requests: u16,
    /// Optional events that it can report: bits of [`config`] (OAES).
    pub optional: u32,
    /// Entries of its error log (ELPE), from 1; 0 when nothing is known.
    pub error_entries: u16,
}

impl EventSupport {
    /// The events that are wanted of those that there are. A discovery controller has no health.
    fn wanted(self, is_discovery: bool) -> u32 {
        let (notices, health) = match is_discovery {
            true => (config::DISCOVERY_CHANGE, 0),
            false => (
                config::NAMESPACE_ATTRIBUTE | config::FIRMWARE_ACTIVATION | config::ANA_CHANGE,
                config::HEALTH,
            ),
        };
        self.optional & notices | health
    }
}

/// The task; it ends when this is dropped, or when nobody takes events any more.
#[derive(Debug)]
pub(super) struct Events(JoinHandle<()>);

impl Drop for Events {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Events {
    /// Starts asking a controller that is enabled.
    pub(super) fn start(
        admin: Admin,
        support: EventSupport,
        is_discovery: bool,
    ) -> (Self, mpsc::Receiver<HostEvent>) {
        let (events, taken) = mpsc::channel(WAITING_MAX);
        let listener = Listener {
            admin,
            support,
            slots: support.requests.clamp(1, REQUESTS_MAX).into(),
            held: JoinSet::new(),
            pace: Pace::new(Instant::now()),
            refused: 0,
            events,
            missed: false,
        };
        (Self(tokio::spawn(listener.run(is_discovery))), taken)
    }
}

struct Listener {
    admin: Admin,
    support: EventSupport,
    /// Requests to keep outstanding.
    slots: usize,
    /// The requests; `None` when the queue ended.
    held: JoinSet<Option<Completion>>,
    pace: Pace,
    /// Requests that were refused since one was not.
    refused: u32,
    events: mpsc::Sender<HostEvent>,
    /// Events were lost for want of room, and that was not told yet.
    missed: bool,
}

impl Listener {
    async fn run(mut self, is_discovery: bool) {
        self.configure(is_discovery).await;
        while self.slots > 0 {
            self.arm();
            let news = tokio::select! {
                news = self.held.join_next() => news,
                permit = self.events.reserve(), if self.missed => {
                    let Ok(permit) = permit else { return };
                    permit.send(HostEvent::Missed);
                    self.missed = false;
                    continue;
                }
                () = self.events.closed() => return,
            };
            let Some(Ok(Some(completion))) = news else {
                return;
            };
            match completion.cqe.status() {
                status if status.is_success() => {
                    self.refused = 0;
                    let event = AsyncEvent::from_dw0(completion.cqe.dw0());
                    if !self.completed(event).await {
                        return;
                    }
                }
                status => self.refused(status).await,
            }
        }
    }

    /// Keeps every slot busy.
    fn arm(&mut self) {
        while self.held.len() < self.slots {
            let admin = self.admin.clone();
            let sqe = Sqe::async_event_request();
            self.held
                .spawn(async move { admin.submit(sqe, Transfer::None).await });
        }
    }

    /// Asks for the events that are wanted. A controller that does not know all of them is asked for the
    /// notices alone; one that refuses reports what it likes.
    async fn configure(&self, is_discovery: bool) {
        let wanted = self.support.wanted(is_discovery);
        for value in [wanted, wanted & !config::HEALTH] {
            let sqe = Sqe::set_features(feature::fid::ASYNC_EVENT_CONFIG, value);
            let set = self
                .admin
                .execute("Set Features (Events)", sqe, Transfer::None);
            match set.await {
                Ok(_) => return,
                Err(error) => tracing::debug!("{error}"),
            }
        }
    }

    /// Reads the page of an event, and passes the event on. False when there is no more to come.
    async fn completed(&mut self, event: AsyncEvent) -> bool {
        let pause = self.pace.take(Instant::now());
        if !pause.is_zero() {
            if self.pace.is_news() {
                tracing::warn!(
                    controller = %self.admin.at(),
                    "it reports events without end; they are taken one in {pause:?} at most"
                );
            }
            sleep(pause).await;
        }
        let page = match event::page_len(event, self.support.error_entries) {
            0 => Vec::new(),
            len => match self.read_page(event, len).await {
                Ok(page) => page,
                Err(HostError::Lost { .. }) => return false,
                Err(error) => {
                    tracing::debug!("event page {:#04x}: {error}", event.page);
                    Vec::new()
                }
            },
        };
        self.pass_on(event::digest(event, &page))
    }

    /// Reads the beginning of a page, which clears its event.
    async fn read_page(&self, event: AsyncEvent, len: usize) -> Result<Vec<u8>, HostError> {
        let part = GetLogPage {
            lid: event.page,
            offset: 0,
            len: len as u64,
        };
        let mut sqe = part.to_sqe();
        sqe.nsid = NSID_ALL.into();
        self.admin.read("Get Log Page (Event)", sqe, len).await
    }

    fn pass_on(&mut self, event: HostEvent) -> bool {
        match self.events.try_send(event) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                self.missed = true;
                true
            }
            Err(TrySendError::Closed(_)) => false,
        }
    }

    /// A request came back with an error: there may be fewer slots than was said, or none.
    async fn refused(&mut self, status: Status) {
        const LIMIT: u16 = Status::AER_LIMIT_EXCEEDED.code();
        const UNKNOWN: u16 = Status::INVALID_OPCODE.code();
        let at = self.admin.at();
        match status.code() {
            LIMIT if self.slots > 1 => self.slots -= 1,
            UNKNOWN => {
                tracing::warn!(controller = %at, "it reports no events: {status}");
                self.slots = 0;
            }
            _ => {
                if self.refused == 0 {
                    tracing::warn!(controller = %at, "it refuses to report events: {status}");
                }
                let pause = REFUSED_PAUSE.saturating_mul(1 << self.refused.min(6));
                self.refused = self.refused.saturating_add(1);
                sleep(pause.min(REFUSED_PAUSE_MAX)).await;
            }
        }
    }
}
