//! Drives an admin queue: commands from anywhere, each with a deadline; one task owns the pair.
//!
//! A command whose deadline passes is forgotten by who asked; it stays outstanding on the queue,
//! which owns its memory, and its completion is dropped when it comes. So commands may also be
//! outstanding for ever without disturbing others.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use memdesc::MemSink;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use super::dial::rounded;
use super::error::{HostError, Loss};
use crate::spec::fabrics::{PropertySize, property_get, property_set};
use crate::spec::{Sqe, Status};
use crate::transport::drive::Driven;
use crate::transport::{Completion, Ending, HostQueuePair, Transfer};

/// Entries of an admin queue.
pub(super) const ADMIN_QUEUE_ENTRIES: u32 = 32;
/// Commands that wait for room on the queue before those who ask have to wait, too.
const BACKLOG: usize = 16;

struct Request {
    sqe: Sqe,
    transfer: Transfer,
    reply: oneshot::Sender<Completion>,
}

/// Where the loss of an association is published, once.
#[derive(Debug, Clone)]
pub(super) struct LossReport(Arc<watch::Sender<Option<Loss>>>);

impl LossReport {
    pub(super) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }

    /// Publishes a loss, unless one was published before.
    pub(super) fn report(&self, at: SocketAddr, loss: Loss) {
        self.0.send_if_modified(|known| {
            if known.is_some() {
                return false;
            }
            // Whoever needs the association says so where it matters.
            tracing::debug!(controller = %at, "association lost: {loss}");
            *known = Some(loss);
            true
        });
    }

    /// A receiver to which a loss is news, also one from before.
    pub(super) fn subscribe(&self) -> watch::Receiver<Option<Loss>> {
        let mut losses = self.0.subscribe();
        if losses.borrow().is_some() {
            losses.mark_changed();
        }
        losses
    }

    pub(super) fn get(&self) -> Option<Loss> {
        self.0.borrow().clone()
    }
}

/// A handle to an admin queue. The queue ends when the last handle that keeps it is dropped.
#[derive(Debug, Clone)]
pub(super) struct Admin {
    at: SocketAddr,
    /// How long a command may take that says nothing else.
    timeout: Duration,
    /// When all commands of this handle together must be over, and since when.
    span: Option<(Instant, Instant)>,
    requests: mpsc::Sender<Request>,
    /// None where the handle does not keep the queue.
    stop: Option<Arc<Stop>>,
    losses: LossReport,
}

/// Ends the queue when told, or when dropped: also while the queue is full of commands without an
/// answer, and its task takes no requests.
#[derive(Debug)]
struct Stop(Arc<Notify>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl Admin {
    /// Starts the task that owns a connected admin queue.
    pub(super) fn spawn(
        driven: Driven<dyn HostQueuePair>,
        at: SocketAddr,
        timeout: Duration,
        losses: LossReport,
    ) -> (Self, JoinHandle<()>) {
        let (requests, inbox) = mpsc::channel(BACKLOG);
        let stop = Arc::new(Notify::new());
        let owner = Owner {
            driven,
            at,
            inbox,
            stop: Arc::clone(&stop),
            losses: losses.clone(),
            replies: HashMap::new(),
            next_token: 0,
        };
        let task = tokio::spawn(owner.run());
        let admin = Self {
            at,
            timeout,
            span: None,
            requests,
            stop: Some(Arc::new(Stop(stop))),
            losses,
        };
        (admin, task)
    }

    /// The controller's address.
    pub(super) fn at(&self) -> SocketAddr {
        self.at
    }

    /// A handle that does not keep the queue.
    pub(super) fn detached(&self) -> Self {
        Self {
            stop: None,
            ..self.clone()
        }
    }

    /// A handle whose commands together take no longer than from `begun` to `end`.
    pub(super) fn bounded(&self, begun: Instant, end: Instant) -> Self {
        Self {
            span: Some((begun, end)),
            ..self.clone()
        }
    }

    /// Gives the commands of a bounded handle more time.
    pub(super) fn extend(&mut self, by: Duration) {
        self.span = self.span.map(|(begun, end)| (begun, end + by));
    }

    /// How the association was lost, if it was.
    pub(super) fn loss(&self) -> Option<Loss> {
        self.losses.get()
    }

    /// Publishes a loss.
    pub(super) fn report(&self, loss: Loss) {
        self.losses.report(self.at, loss);
    }

    /// Ends the queue now.
    pub(super) fn stop(&self) {
        if let Some(stop) = &self.stop {
            stop.0.notify_one();
        }
    }

    /// Runs a command, and fails unless its status is success.
    pub(super) async fn execute(
        &self,
        command: &'static str,
        sqe: Sqe,
        transfer: Transfer,
    ) -> Result<Completion, HostError> {
        self.execute_within(command, sqe, transfer, self.timeout)
            .await
    }

    /// As [`Self::execute`], with a time limit of its own.
    pub(super) async fn execute_within(
        &self,
        command: &'static str,
        sqe: Sqe,
        transfer: Transfer,
        within: Duration,
    ) -> Result<Completion, HostError> {
        let at = self.at;
        let asked = Instant::now();
        let mut end = asked + within;
        let mut after = within;
        let mut too_slow = None;
        if let Some((begun, all)) = self.span
            && all < end
        {
            end = all;
            after = rounded(all.saturating_duration_since(asked));
            // It is not this answer alone that takes long.
            let whole = rounded(all - begun);
            too_slow = (after < whole / 2).then_some(whole);
        }
        let late = match too_slow {
            Some(after) => HostError::TooSlow { at, command, after },
            None => HostError::TimedOut { at, command, after },
        };
        let answer = timeout_at(end, self.submit(sqe, transfer))
            .await
            .map_err(|_| late)?;
        let completion = answer.ok_or_else(|| HostError::Lost {
            at,
            command,
            loss: self.loss().unwrap_or(Loss::Ended(Ending::Local)),
        })?;
        match completion.cqe.status() {
            status if status.is_success() => Ok(completion),
            status => Err(HostError::Command {
                at,
                command,
                status,
            }),
        }
    }

    /// Runs a command for as long as it takes. `None` when the queue ended first.
    pub(super) async fn submit(&self, sqe: Sqe, transfer: Transfer) -> Option<Completion> {
        let (reply, answer) = oneshot::channel();
        let request = Request {
            sqe,
            transfer,
            reply,
        };
        self.requests.send(request).await.ok()?;
        answer.await.ok()
    }

    /// Runs a command that returns `len` bytes.
    pub(super) async fn read(
        &self,
        command: &'static str,
        sqe: Sqe,
        len: usize,
    ) -> Result<Vec<u8>, HostError> {
        let sink = MemSink::from_bytes(vec![0; len]);
        let done = self.execute(command, sqe, Transfer::In(sink)).await?;
        let bytes = match done.transfer {
            Transfer::In(sink) => sink.into_parts().1,
            _ => None,
        };
        match bytes {
            Some(bytes) if bytes.len() == len && done.transferred as usize == len => Ok(bytes),
            _ => Err(HostError::Unusable {
                at: self.at,
                reason: format!(
                    "{command} returned {} of {len} bytes with a status of success",
                    done.transferred
                ),
            }),
        }
    }

    /// Property Get.
    pub(super) async fn property(
        &self,
        command: &'static str,
        offset: u32,
        size: PropertySize,
    ) -> Result<u64, HostError> {
        let sqe = property_get(offset, size);
        let done = self.execute(command, sqe, Transfer::None).await?;
        Ok(match size {
            PropertySize::Four => u64::from(done.cqe.dw0()),
            PropertySize::Eight => done.cqe.result.get(),
        })
    }

    /// Property Get of a four-byte property.
    pub(super) async fn register(
        &self,
        command: &'static str,
        offset: u32,
    ) -> Result<u32, HostError> {
        let value = self.property(command, offset, PropertySize::Four).await?;
        Ok(value as u32)
    }

    /// Property Set of a four-byte property.
    pub(super) async fn set_register(
        &self,
        command: &'static str,
        offset: u32,
        value: u32,
    ) -> Result<(), HostError> {
        let sqe = property_set(offset, value);
        self.execute(command, sqe, Transfer::None).await?;
        Ok(())
    }
}

/// The task that owns the pair.
struct Owner {
    driven: Driven<dyn HostQueuePair>,
    at: SocketAddr,
    inbox: mpsc::Receiver<Request>,
    stop: Arc<Notify>,
    losses: LossReport,
    replies: HashMap<u64, oneshot::Sender<Completion>>,
    next_token: u64,
}

impl Owner {
    async fn run(mut self) {
        loop {
            // Published before anyone learns that a command has no answer.
            let ending = self.driven.pair().ending().cloned();
            if let Some(ending) = ending.as_ref().filter(|ending| **ending != Ending::Local) {
                self.losses.report(self.at, Loss::Ended(ending.clone()));
            }
            self.deliver(ending.is_some());
            if ending.is_some() {
                return;
            }
            let room = self.driven.pair().room() > 0;
            tokio::select! {
                () = self.driven.progress() => {}
                Some(request) = self.inbox.recv(), if room => self.submit(request),
                () = self.stop.notified() => self.driven.pair().end(),
            }
        }
    }

    /// Hands completions to those who wait for them. What the transport completed as lost is left
    /// to the drop of the reply, which says so.
    fn deliver(&mut self, ended: bool) {
        while let Some(completion) = self.driven.pair().completion() {
            let Some(reply) = self.replies.remove(&completion.token) else {
                continue;
            };
            let lost = ended && completion.cqe.status().code() == Status::ABORTED_BY_HOST.code();
            if !lost {
                // Whoever asked may have given up meanwhile.
                let _ = reply.send(completion);
            }
        }
    }

    fn submit(&mut self, request: Request) {
        let Request {
            sqe,
            transfer,
            reply,
        } = request;
        if reply.is_closed() {
            return;
        }
        let token = self.next_token;
        self.next_token += 1;
        // A rejection drops the reply: there was room, so the queue has ended.
        if self.driven.pair().submit(sqe, transfer, token).is_ok() {
            self.replies.insert(token, reply);
        }
    }
}
