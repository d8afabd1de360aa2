//! The admin queue of one association, from its Connect to the end: a task of the control plane.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use memdesc::MemSource;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::Target;
use super::admin::{Admin, Answer};
use super::association::Association;
use super::cross_reset::CrossResets;
use super::discovery::Viewpoint;
use super::features::Features;
use super::notices::Notices;
use super::registers::Effect;
use super::subsystem::Subsystem;
use crate::spec::{Cqe, Status};
use crate::transport::drive::Driven;
use crate::transport::{Command, CommandTag, ControllerEvent, ControllerQueuePair};

/// Further away than any deadline: nothing to wait for.
const NEVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// Bytes of answers that may wait to be sent: a host that asks and does not read gets errors.
const UNSENT_MAX: usize = 4 << 20;

/// Why an association ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum End {
    #[error("the admin queue ended: {0}")]
    Admin(String),
    #[error("no command from the host in the keep-alive time of {0:?}")]
    KeepAlive(Duration),
    #[error("it was not enabled within {0:?}")]
    Disabled(Duration),
    #[error("its host had another controller end it")]
    CrossReset,
    #[error("the target shuts down")]
    Target,
}

/// The place of an association in its subsystem and in the target's count, until dropped.
pub(super) struct Registration {
    pub(super) association: Arc<Association>,
    pub(super) subsystem: Arc<Subsystem>,
    pub(super) target: Arc<Target>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.association.set_over();
        self.association.close_queues();
        self.subsystem.unregister(self.association.cntlid());
        self.target.associations.fetch_sub(1, Relaxed);
    }
}

/// The work of a reset or shutdown, after the I/O queues have been told to end.
enum Closing {
    /// I/O queues are not all gone.
    Queues { flush: bool },
    /// The backends put on stable storage what they hold.
    Flush(JoinHandle<()>),
}

/// See the module.
pub(super) struct Session {
    queue: Driven<dyn ControllerQueuePair>,
    registration: Registration,
    view: Viewpoint,
    features: Features,
    held: VecDeque<CommandTag>,
    /// Bytes of answers that were not sent yet.
    unsent: usize,
    closing: Option<Closing>,
    /// When the host must have given a sign of life, or have enabled the controller.
    deadline: Instant,
    since: std::time::Instant,
}

impl Session {
    /// Of an association whose Connect was accepted; `kato` is in milliseconds.
    pub(super) fn new(
        queue: Driven<dyn ControllerQueuePair>,
        registration: Registration,
        view: Viewpoint,
        kato: u32,
    ) -> Self {
        let disabled = registration.target.limits.disabled;
        Self {
            queue,
            registration,
            view,
            features: Features::new(kato),
            held: VecDeque::new(),
            unsent: 0,
            closing: None,
            deadline: Instant::now() + disabled,
            since: std::time::Instant::now(),
        }
    }

    /// Serves the association until it ends, then waits until its I/O queues are gone.
    pub(super) async fn run(mut self, mut shutdown: watch::Receiver<bool>) -> End {
        let end = self.serve(&mut shutdown).await;
        let association = Arc::clone(&self.registration.association);
        association.set_over();
        association.registers(|registers| registers.fail());
        association.close_queues();
        self.queue.pair().end();
        while association.queues() > 0 {
            association.changed().await;
        }
        end
    }

    async fn serve(&mut self, shutdown: &mut watch::Receiver<bool>) -> End {
        let association = Arc::clone(&self.registration.association);
        loop {
            self.events();
            self.report();
            self.advance_closing();
            if let Some(ending) = self.queue.pair().ending() {
                return End::Admin(ending.to_string());
            }
            if association.is_reset() {
                return End::CrossReset;
            }
            tokio::select! {
                // An error means that whoever would say so is gone: the same.
                _ = shutdown.wait_for(|&down| down) => return End::Target,
                () = self.queue.progress() => {}
                () = association.changed() => {}
                () = flushed(&mut self.closing) => self.closed(),
                () = sleep_until(self.deadline) => {
                    if let Some(end) = self.expired() {
                        return end;
                    }
                }
            }
        }
    }

    fn events(&mut self) {
        while let Some(event) = self.queue.pair().event() {
            match event {
                ControllerEvent::Command(command) => self.command(command),
                ControllerEvent::Sent { source, .. } => self.unsent -= source.len(),
                // No admin command fetches data.
                ControllerEvent::Fetched { .. } => {}
            }
        }
    }

    fn command(&mut self, Command { tag, sqe, data_len }: Command) {
        let Registration {
            association,
            subsystem,
            target,
        } = &self.registration;
        let mut admin = Admin {
            association,
            subsystem,
            target,
            view: &self.view,
            features: &mut self.features,
            held: self.held.len(),
            since: self.since,
        };
        let had_keep_alive = admin.features.keep_alive();
        let answer = admin.command(&sqe, data_len);
        if self.features.keep_alive() != had_keep_alive {
            self.restart_clock();
        }
        match answer {
            Err(status) => self.respond(tag, Cqe::new(0, status)),
            Ok(Answer::Result(result)) => self.respond(tag, Cqe::with_result(0, result)),
            Ok(Answer::Hold) => self.held.push_back(tag),
            Ok(Answer::Data(data)) => self.send(tag, data),
            Ok(Answer::Effect(effect)) => {
                self.respond(tag, Cqe::new(0, Status::SUCCESS));
                self.effect(effect);
            }
        }
    }

    /// Completes requests for events, as long as there are both.
    fn report(&mut self) {
        let enabled = self.features.async_events();
        while let Some(&tag) = self.held.front() {
            let association = &self.registration.association;
            let Some(event) = association.notices(|notices| notices.next(enabled)) else {
                return;
            };
            self.held.pop_front();
            self.respond(tag, Cqe::with_result(0, event.to_dw0().into()));
        }
    }

    fn send(&mut self, tag: CommandTag, data: Vec<u8>) {
        let len = data.len();
        if self.unsent + len > UNSENT_MAX {
            return self.respond(tag, Cqe::new(0, Status::INTERNAL_ERROR));
        }
        let source = MemSource::from_bytes(data);
        let status = match self.queue.pair().send(tag, 0, source, true) {
            Ok(()) => {
                self.unsent += len;
                Status::SUCCESS
            }
            Err((_, status)) => status,
        };
        self.respond(tag, Cqe::new(0, status));
    }

    fn respond(&mut self, tag: CommandTag, cqe: Cqe) {
        self.queue.pair().respond(tag, cqe);
    }

    fn effect(&mut self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Enabled => {
                self.registration.association.renew_instance();
                self.restart_clock();
            }
            Effect::Reset => self.close(false),
            Effect::Shutdown => self.close(true),
        }
    }

    /// Begins a reset or a shutdown. A shutdown leaves nothing in volatile caches.
    fn close(&mut self, flush: bool) {
        self.registration.association.close_queues();
        self.features.reset();
        self.registration
            .association
            .notices(|notices| *notices = Notices::default());
        self.registration
            .association
            .cross_resets(CrossResets::forget);
        while let Some(tag) = self.held.pop_front() {
            self.respond(tag, Cqe::new(0, Status::ABORT_REQUESTED));
        }
        self.closing = Some(Closing::Queues { flush });
        self.restart_clock();
    }

    fn advance_closing(&mut self) {
        let Some(Closing::Queues { flush }) = self.closing else {
            return;
        };
        if self.registration.association.queues() > 0 {
            return;
        }
        if !flush {
            return self.closed();
        }
        let subsystem = Arc::clone(&self.registration.subsystem);
        let flush = tokio::task::spawn_blocking(move || {
            for namespace in subsystem.namespaces() {
                if let Err(error) = namespace.backend().sync() {
                    let nsid = namespace.nsid();
                    tracing::error!(nsid, %error, "a namespace could not be flushed");
                }
            }
        });
        self.closing = Some(Closing::Flush(flush));
    }

    fn closed(&mut self) {
        self.closing = None;
        let association = &self.registration.association;
        association.registers(|registers| registers.closed());
        self.restart_clock();
    }

    /// How long the host may be silent; `None` for as long as it likes, which is not with a
    /// discovery controller.
    fn keep_alive(&self) -> Option<Duration> {
        let Registration {
            subsystem, target, ..
        } = &self.registration;
        let idle = subsystem
            .is_discovery()
            .then_some(target.limits.discovery_idle);
        self.features.keep_alive().or(idle)
    }

    /// Begins a new period: of keep-alive while enabled, of grace while not.
    fn restart_clock(&mut self) {
        let association = &self.registration.association;
        association.mark();
        let (enabled, closing) =
            association.registers(|registers| (registers.is_enabled(), registers.is_closing()));
        let period = match self.keep_alive() {
            // The work is ours: the host has nothing to do but wait.
            _ if closing => NEVER,
            _ if !enabled => self.registration.target.limits.disabled,
            Some(keep_alive) => keep_alive,
            None => NEVER,
        };
        self.deadline = Instant::now() + period;
    }

    /// The deadline has passed. With traffic in a keep-alive period, another one begins: so a dead
    /// host is found after one to two periods.
    fn expired(&mut self) -> Option<End> {
        let association = &self.registration.association;
        if !association.registers(|registers| registers.is_enabled()) {
            return Some(End::Disabled(self.registration.target.limits.disabled));
        }
        let keep_alive = self.keep_alive().unwrap_or(NEVER);
        if !association.take_mark() {
            return Some(End::KeepAlive(keep_alive));
        }
        self.deadline = Instant::now() + keep_alive;
        None
    }
}

/// Waits for the flush of a shutdown; for ever when there is none.
async fn flushed(closing: &mut Option<Closing>) {
    match closing {
        Some(Closing::Flush(task)) => {
            // It cannot be cancelled, and what failed was logged.
            let _ = task.await;
        }
        _ => std::future::pending().await,
    }
}
