//! The side of a disk that faces VMMs: one session after the other, and the hand-over of a session to another process.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nvmf::host::NamespaceInfo;
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use vhost_user_blk::{Device, Interrupt, Record, Rings, Served, Session};

use crate::config::Drain;
use crate::disks::Ready;
use crate::endpoint::{Endpoint, Origin};
use crate::handover::description::Description;
use crate::handover::giving::{Door, Gift, Outcome, Request};
use crate::handover::taking::{self, NotTaken, Taken};
use crate::handover::{now, since};
use crate::limits::{HANDOVER_DRAIN, HANDOVER_STEP};
use crate::metrics::DiskCounters;
use crate::reconnect::earlier::SessionNews;
use crate::rings::LaneRings;
use crate::status::StatusSignal;
use crate::worker::mailbox::LaneMessage;
use crate::worker::placement::Placement;

/// How long rings may take to drain when the daemon is told to end.
const DRAIN: Duration = Duration::from_millis(500);
/// How long all lanes together may take to let go of everything.
const LET_GO: Duration = Duration::from_millis(200);

/// See the module.
pub(crate) struct Front {
    /// The disk, for the log.
    pub(crate) name: String,
    /// The command that it is a disk of.
    pub(crate) command: &'static str,
    /// NQN of its subsystem.
    pub(crate) subsystem: String,
    /// Its namespace now.
    pub(crate) namespace: watch::Receiver<NamespaceInfo>,
    /// The namespace was there at the start.
    pub(crate) there: bool,
    /// What the front-end sees.
    pub(crate) device: Arc<Device>,
    /// Which lane each ring runs on.
    pub(crate) placement: Arc<Placement>,
    /// Where the control plane learns what a session does.
    pub(crate) session: mpsc::Sender<SessionNews>,
    /// How rings stop.
    pub(crate) drain: Drain,
    /// What was done.
    pub(crate) counters: Arc<DiskCounters>,
}

/// Where a disk's front-ends come from at first.
pub(crate) enum Start {
    /// They come.
    Fresh(Endpoint),
    /// The disk is another process's.
    TakeOver(TakeOver),
}

/// A disk that is to be taken over.
pub(crate) struct TakeOver {
    /// Where front-ends come from.
    pub(crate) origin: Origin,
    /// The socket of the disk, absolute.
    pub(crate) path: PathBuf,
    /// Disks that were taken over already: one after the other is.
    pub(crate) taken: Arc<Mutex<usize>>,
    /// Told when the disk is ours.
    pub(crate) ready: Ready,
}

/// A session in a thread of its own.
struct Running {
    /// Ends the session when it is shut down.
    shutdown: UnixStream,
    interrupt: Interrupt,
    end: oneshot::Receiver<End>,
}

/// How the thread of a session has ended.
enum End {
    /// The session is over.
    Gone,
    /// Its rings are paused.
    Paused(Session, Record),
    /// Its rings could not be paused.
    Busy(Session, String),
}

/// Everything that is served from.
struct Serving {
    endpoint: Endpoint,
    door: Option<Door>,
    session: Option<Running>,
}

impl Front {
    /// Serves front-ends until `stop` comes, there can be no other, or a successor has taken the disk over.
    ///
    /// # Errors
    /// The disk was not taken over.
    pub(crate) async fn serve(
        &self,
        start: Start,
        stop: impl Future<Output = ()>,
    ) -> Result<(), NotTaken> {
        tokio::pin!(stop);
        let mut status = StatusSignal::new();
        let begun = tokio::select! {
            begun = self.begin(start) => begun,
            () = &mut stop => {
                self.let_go(None).await;
                return Ok(());
            }
        };
        let mut served = match begun {
            Ok(served) => served,
            Err(error) => {
                self.let_go(None).await;
                return Err(error);
            }
        };
        loop {
            let Serving {
                endpoint,
                door,
                session,
            } = &mut served;
            tokio::select! {
                () = &mut stop => break,
                end = Running::ended(session) => {
                    *session = self.go_on(end);
                    if session.is_none() {
                        tracing::info!(disk = self.name, "front-end has gone; waiting for the next");
                    }
                }
                next = endpoint.next(&self.name), if session.is_none() => match next {
                    Some(stream) => *session = self.open_session(stream),
                    None => {
                        tracing::info!(disk = self.name, "no other front-end can come: ending");
                        break;
                    }
                },
                () = status.asked() => self.log_status(session.is_some()),
                request = Door::next(door) => {
                    served = match self.give(served, request).await {
                        Some(served) => served,
                        None => {
                            self.let_go(None).await;
                            return Ok(());
                        }
                    };
                }
            }
        }
        let Serving {
            endpoint,
            door,
            session,
        } = served;
        // Nobody connects any more.
        drop((endpoint, door));
        self.let_go(session).await;
        Ok(())
    }

    /// Logs how the disk is.
    fn log_status(&self, front_end: bool) {
        let broken = self.device.broken_rings().into_iter();
        let broken: Vec<_> = broken
            .map(|(ring, reason)| format!("ring {ring}: {reason}"))
            .collect();
        tracing::info!(
            disk = self.name,
            front_end,
            told_of_changes = self.device.can_tell_changes(),
            sectors = self.device.capacity(),
            broken = broken.join("; "),
            "status: disk"
        );
        self.counters.totals().log(&self.name);
    }

    async fn begin(&self, start: Start) -> Result<Serving, NotTaken> {
        match start {
            Start::Fresh(endpoint) => Ok(Serving {
                door: self.open_door(&endpoint),
                endpoint,
                session: None,
            }),
            Start::TakeOver(take_over) => self.take_over(take_over).await,
        }
    }

    /// Listens for successors. A disk without that is served all the same.
    fn open_door(&self, endpoint: &Endpoint) -> Option<Door> {
        let path = endpoint.own_path()?;
        match Door::open(&path) {
            Ok(door) => Some(door),
            Err(error) => {
                tracing::warn!(disk = self.name, %error, "the disk cannot be handed over to another process");
                None
            }
        }
    }

    fn rings(&self) -> Arc<dyn Rings> {
        let (placement, session) = (Arc::clone(&self.placement), self.session.clone());
        let name = self.name.clone();
        Arc::new(LaneRings::new(name, placement, session, self.drain))
    }

    /// What the disk is now.
    fn description(&self) -> Description {
        let namespace = self.namespace.borrow();
        Description::new(self.command, &self.subsystem, &namespace, &self.device)
    }

    fn open_session(&self, stream: UnixStream) -> Option<Running> {
        let opened = Session::new(stream, Arc::clone(&self.device), self.rings());
        match opened {
            Ok(session) => {
                tracing::info!(disk = self.name, "front-end connected");
                self.run(session, false)
            }
            Err(error) => {
                tracing::error!(disk = self.name, %error, "cannot serve a front-end");
                None
            }
        }
    }

    /// Goes on after a session's thread has ended, with the same session if it is not over.
    fn go_on(&self, end: End) -> Option<Running> {
        match end {
            End::Gone => None,
            End::Paused(session, _) => self.run(session, true),
            End::Busy(session, _) => self.run(session, false),
        }
    }

    /// Serves a session in a thread of its own: messages are read blocking, and a drain may take its time.
    fn run(&self, mut session: Session, resume: bool) -> Option<Running> {
        let name = self.name.clone();
        let (ended, end) = oneshot::channel();
        let interrupt = Interrupt::new();
        let opened = session.stream().and_then(|shutdown| {
            let interrupt = interrupt?;
            let running = Running {
                shutdown,
                interrupt: interrupt.clone(),
                end,
            };
            let thread = std::thread::Builder::new().name("session".to_owned());
            thread.spawn(move || {
                if resume {
                    session.resume();
                }
                let end = match session.serve(&interrupt) {
                    Ok(Served::Gone) => {
                        // Its rings are back before anybody hears of it.
                        drop(session);
                        End::Gone
                    }
                    Ok(Served::Interrupted) => match session.pause() {
                        Ok(record) => End::Paused(session, record),
                        Err(reason) => End::Busy(session, reason.to_string()),
                    },
                    Err(error) => {
                        tracing::warn!(disk = name, %error, "session ended");
                        drop(session);
                        End::Gone
                    }
                };
                // Where nobody waits any more, the disk ends, and the session with it.
                let _ = ended.send(end);
            })?;
            Ok(running)
        });
        match opened {
            Ok(running) => Some(running),
            Err(error) => {
                tracing::error!(disk = self.name, %error, "cannot serve a front-end");
                None
            }
        }
    }

    /// Hands the disk over to a successor that asks for it; `None` when it is the successor's then.
    async fn give(&self, mut served: Serving, request: Request) -> Option<Serving> {
        let (disk, successor) = (self.name.as_str(), request.pid);
        tracing::info!(disk, successor, "another process asks for the disk");
        let keep = |reason: &str| {
            tracing::warn!(disk, successor, reason, "the disk is not handed over");
            request.refuse(reason);
        };
        if let Err(reason) = self.description().check(&request.disk) {
            keep(&reason);
            return Some(served);
        }
        let paused_at = now();
        let paused = match served.session.take() {
            None => None,
            Some(mut running) => {
                running.interrupt.raise();
                let limit = HANDOVER_DRAIN + HANDOVER_STEP;
                match timeout(limit, &mut running.end).await {
                    Ok(Ok(End::Paused(session, record))) => Some((session, record)),
                    Ok(Ok(End::Busy(session, reason))) => {
                        served.session = self.run(session, false);
                        keep(&reason);
                        return Some(served);
                    }
                    Ok(Ok(End::Gone) | Err(_)) => None,
                    Err(_) => {
                        // It pauses later, and goes on then.
                        served.session = Some(running);
                        keep("its front-end has asked for something that takes long");
                        return Some(served);
                    }
                }
            }
        };
        let (gift, paused) = self.gift(&served, paused, paused_at);
        let outcome = match gift {
            Ok(gift) => {
                let offered = spawn_blocking(move || request.offer(&gift)).await;
                offered.unwrap_or_else(|error| Outcome::Kept(error.to_string()))
            }
            Err(error) => Outcome::Kept(error.to_string()),
        };
        match outcome {
            Outcome::Given(stalled) => {
                let stalled_ms = stalled.map(milliseconds);
                let guest = match stalled_ms {
                    Some(ms) => format!("guest stalled {ms} ms"),
                    None => "it is not known for how long the guest stalled".to_owned(),
                };
                tracing::info!(disk, successor, stalled_ms, "disk handed over; {guest}");
                if let Some(session) = paused {
                    session.leave();
                }
                served.endpoint.leave();
                if let Some(door) = served.door {
                    door.leave();
                }
                None
            }
            Outcome::Kept(reason) => {
                let stalled_ms = milliseconds(since(paused_at));
                tracing::warn!(
                    disk,
                    successor,
                    reason,
                    stalled_ms,
                    "the disk is not handed over, and goes on"
                );
                served.session = paused.and_then(|session| self.run(session, true));
                Some(served)
            }
        }
    }

    /// What a successor is given, and the session that it is of.
    fn gift(
        &self,
        served: &Serving,
        paused: Option<(Session, Record)>,
        paused_at: u64,
    ) -> (io::Result<Gift>, Option<Session>) {
        let (session, record) = paused.unzip();
        let gather = || {
            let stream = session.as_ref().map(Session::stream).transpose()?;
            let door = served.door.as_ref().map(Door::listener).transpose()?;
            Ok(Gift {
                session: stream.map(OwnedFd::from).zip(record),
                listener: served.endpoint.listener().transpose()?,
                door: door.ok_or_else(|| io::Error::other("nobody can be asked"))?,
                paused_at,
            })
        };
        (gather(), session)
    }

    /// Takes the disk over from the process that serves it.
    async fn take_over(&self, take_over: TakeOver) -> Result<Serving, NotTaken> {
        let TakeOver {
            origin,
            path,
            taken,
            ready,
        } = take_over;
        if !self.there {
            return Err(NotTaken::Away(path));
        }
        let mut count = taken.lock().await;
        let (device, rings) = (Arc::clone(&self.device), self.rings());
        let (disk, socket) = (self.description(), path.clone());
        let took = spawn_blocking(move || -> Result<Taken, NotTaken> {
            taking::ask(&socket, disk)?.take(device, rings)
        });
        let mut took = match took.await {
            Ok(took) => took?,
            Err(error) => {
                let error = io::Error::other(error);
                return Err(NotTaken::Talk { path, error });
            }
        };
        *count += 1;
        let stalled_ms = milliseconds(took.stalled);
        tracing::info!(
            disk = self.name,
            stalled_ms,
            "disk taken over; guest stalled {stalled_ms} ms"
        );
        let session = took.session.take();
        let session = session.and_then(|session| self.run(session, false));
        let (endpoint, door) = took.sockets(&origin)?;
        // What it has grown by since its front-end was told last.
        self.device.set_capacity(self.device.capacity());
        ready.tell(format!(
            "{}: taken over; guest stalled {stalled_ms} ms\n",
            path.display()
        ));
        Ok(Serving {
            endpoint,
            door: Some(door),
            session,
        })
    }

    /// Ends the session, and then the lanes.
    async fn let_go(&self, session: Option<Running>) {
        if let Some(Running { shutdown, end, .. }) = session {
            // The session stops its rings, which drains them.
            let _ = shutdown.shutdown(std::net::Shutdown::Both);
            if timeout(DRAIN, end).await.is_err() {
                tracing::warn!(disk = self.name, "requests in flight are given up");
            }
        }
        // All are told before any is waited for, so that many take no longer than one.
        let let_go = async {
            let lanes = self.placement.lanes();
            let mut ends = Vec::with_capacity(lanes.len());
            for lane in lanes {
                let (done, ended) = oneshot::channel();
                lane.send(LaneMessage::End { done }).await;
                ends.push(ended);
            }
            for ended in ends {
                // An error means that the lane is gone, which is an end too.
                let _ = ended.await;
            }
        };
        if timeout(LET_GO, let_go).await.is_err() {
            tracing::warn!(disk = self.name, "some lanes did not end in time");
        }
    }
}

impl Running {
    /// Waits for the end of the thread, if there is one; otherwise for ever.
    async fn ended(session: &mut Option<Self>) -> End {
        match session {
            // An error means that the thread is gone, which is an end too.
            Some(session) => (&mut session.end).await.unwrap_or(End::Gone),
            None => std::future::pending().await,
        }
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
