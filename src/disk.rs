//! One disk: a vhost-user device in front, an association behind, lanes between them.

use std::io;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use nvmf::host::{Association, HostError, NamespaceInfo};
use nvmf::transport::{HostQueuePair, Registry};
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio::time::timeout;
use vhost_user_blk::{Device, Queue, QueueUpdate, Rings, serve};

use crate::bridge::geometry::{self, Choices};
use crate::bridge::translate::Limits;
use crate::config::{AttachConfig, Uri};
use crate::limits::{LANE_SLOTS, MAILBOX};
use crate::metrics::DiskCounters;
use crate::worker::Worker;
use crate::worker::lane::{DeviceLane, LaneSetup};
use crate::worker::mailbox::{LaneMessage, Mailbox};

/// How long rings may take to drain when the daemon is told to end.
const DRAIN: Duration = Duration::from_millis(500);
/// How long all lanes together may take to let go of everything.
const LET_GO: Duration = Duration::from_millis(200);
/// How long the controller may take to shut down.
const SHUTDOWN: Duration = Duration::from_millis(600);
/// How long to wait after a front-end could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Blocks above the page size of common guests are not understood by all of them.
const GUEST_BLOCK_MAX: u32 = 4096;

/// What a disk is made of.
pub(crate) struct Backing {
    /// What it is called in the log.
    pub(crate) name: String,
    /// The controller.
    pub(crate) association: Association,
    /// The namespace.
    pub(crate) namespace: NamespaceInfo,
    /// Connected I/O queue pairs, at least one.
    pub(crate) pairs: Vec<Box<dyn HostQueuePair>>,
    /// How long a lane looks for work before it sleeps, at most.
    pub(crate) poll_max: Duration,
}

/// A disk that is served.
pub(crate) struct Disk {
    name: String,
    device: Arc<Device>,
    lanes: Vec<Mailbox>,
    association: Association,
    counters: Arc<DiskCounters>,
}

impl Disk {
    /// Connects to the namespace and places a lane for each I/O queue pair on the workers.
    ///
    /// # Errors
    /// [`HostError`] as one line; nothing stays open then.
    pub(crate) async fn attach(
        registry: &Registry,
        config: &AttachConfig,
        workers: &[Worker],
    ) -> Result<Self, HostError> {
        let Uri { target, selector } = &config.uri;
        let association = Association::connect(registry, target, &config.host).await?;
        let opened = async {
            let namespace = association.select(selector).await?;
            Ok((namespace, association.open_io_queues(registry).await?))
        };
        let (namespace, pairs) = match opened.await {
            Ok(opened) => opened,
            Err(error) => {
                association.shutdown(SHUTDOWN).await;
                return Err(error);
            }
        };
        let controller = association.controller();
        tracing::info!(
            disk = %config.uri,
            controller = %controller.address,
            cntlid = controller.cntlid,
            model = controller.model,
            serial = controller.serial,
            firmware = controller.firmware,
            nsid = namespace.nsid,
            io_queues = pairs.len(),
            "namespace attached"
        );
        let backing = Backing {
            name: config.uri.to_string(),
            association,
            namespace,
            pairs,
            poll_max: config.poll_max,
        };
        Ok(Self::new(backing, config.choices(), workers).await)
    }

    /// Makes a disk of a namespace, and places a lane for each of its queue pairs on the workers.
    pub(crate) async fn new(backing: Backing, choices: Choices, workers: &[Worker]) -> Self {
        let Backing {
            name,
            association,
            namespace,
            pairs,
            poll_max,
        } = backing;
        let controller = association.controller();
        let limits = Limits::new(controller, &namespace);
        let device = Device::new(geometry::device_options(&choices, controller, &namespace));
        let counters = Arc::new(DiskCounters::default());
        let mut lanes = Vec::with_capacity(pairs.len());
        for (pair, worker) in pairs.into_iter().zip(workers.iter().cycle()) {
            let (mailbox, mail) = Mailbox::new(MAILBOX);
            let setup = LaneSetup {
                name: name.clone(),
                limits,
                pairs: vec![pair],
                mail,
                counters: counters.lane(),
                slots: LANE_SLOTS,
                poll_max,
            };
            worker
                .place(Box::new(move || Box::new(DeviceLane::new(setup))))
                .await;
            lanes.push(mailbox);
        }
        if namespace.block_size > GUEST_BLOCK_MAX {
            tracing::warn!(
                disk = name,
                "blocks of {} bytes: guests with pages of {GUEST_BLOCK_MAX} bytes may refuse the disk",
                namespace.block_size
            );
        }
        tracing::info!(
            disk = name,
            block_size = namespace.block_size,
            blocks = namespace.block_count,
            lanes = lanes.len(),
            "disk ready"
        );
        Self {
            name,
            device,
            lanes,
            association,
            counters,
        }
    }

    /// Serves front-ends, one after the other, until `stop` comes; then drains, shuts the
    /// controller down, and logs the counters. Ends within two seconds of `stop`, also when the
    /// controller is dead.
    ///
    /// # Errors
    /// The listening socket cannot be waited on.
    pub(crate) async fn serve(
        self,
        listener: StdUnixListener,
        stop: impl Future<Output = ()>,
    ) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        tokio::pin!(stop);
        let mut lost = self.association.lost();
        let mut alive = true;
        let mut session: Option<Session> = None;
        loop {
            tokio::select! {
                () = &mut stop => break,
                changed = lost.changed(), if alive => {
                    alive = false;
                    if changed.is_ok() {
                        self.path_lost(&lost).await;
                    }
                }
                () = Session::ended(&mut session) => {
                    session = None;
                    tracing::info!(disk = self.name, "front-end has gone; waiting for the next");
                }
                accepted = listener.accept(), if session.is_none() => match accepted {
                    Ok((stream, _)) => match self.open_session(stream) {
                        Ok(opened) => session = Some(opened),
                        Err(error) => {
                            tracing::error!(disk = self.name, %error, "cannot serve a front-end");
                        }
                    },
                    // Out of descriptors, or a front-end that gave up: neither lasts.
                    Err(error) => {
                        tracing::warn!(disk = self.name, %error, "cannot accept a front-end");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(listener);
        self.shutdown(session).await;
        Ok(())
    }

    fn open_session(&self, stream: tokio::net::UnixStream) -> io::Result<Session> {
        let stream = stream.into_std()?;
        let shutdown = stream.try_clone()?;
        let device = Arc::clone(&self.device);
        let rings: Arc<dyn Rings> = Arc::new(LaneRings {
            lanes: self.lanes.clone(),
        });
        let name = self.name.clone();
        let (ended, end) = oneshot::channel();
        // A thread of its own: the messages are read blocking, and a drain may take its time.
        std::thread::Builder::new()
            .name("session".to_owned())
            .spawn(move || {
                if let Err(error) = serve(stream, device, rings) {
                    tracing::warn!(disk = name, %error, "session ended");
                }
                let _ = ended.send(());
            })?;
        tracing::info!(disk = self.name, "front-end connected");
        Ok(Session { shutdown, end })
    }

    async fn path_lost(&self, lost: &tokio::sync::watch::Receiver<Option<nvmf::host::Loss>>) {
        let loss = lost.borrow().as_ref().map(ToString::to_string);
        if let Some(loss) = loss {
            tracing::error!(
                disk = self.name,
                "association lost: {loss}; every request fails until the daemon is started again"
            );
            for lane in &self.lanes {
                lane.send(LaneMessage::PathLost).await;
            }
        }
    }

    async fn shutdown(self, session: Option<Session>) {
        if let Some(Session { shutdown, end }) = session {
            // The session stops its rings, which drains them.
            let _ = shutdown.shutdown(std::net::Shutdown::Both);
            if timeout(DRAIN, end).await.is_err() {
                tracing::warn!(disk = self.name, "requests in flight are given up");
            }
        }
        // All are told before any is waited for, so that many take no longer than one.
        let let_go = async {
            let mut ends = Vec::with_capacity(self.lanes.len());
            for lane in &self.lanes {
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
        self.association.shutdown(SHUTDOWN).await;
        self.counters.totals().log(&self.name);
    }
}

/// A front-end's session, in a thread of its own.
struct Session {
    /// Ends the session when it is shut down.
    shutdown: UnixStream,
    end: oneshot::Receiver<()>,
}

impl Session {
    /// Waits for the end of the session, if there is one; otherwise for ever.
    async fn ended(session: &mut Option<Self>) {
        match session {
            // An error means that the thread is gone, which is an end too.
            Some(session) => drop((&mut session.end).await),
            None => std::future::pending().await,
        }
    }
}

/// Gives each ring to the lane that its number falls to.
struct LaneRings {
    lanes: Vec<Mailbox>,
}

impl LaneRings {
    fn lane(&self, index: usize) -> Option<&Mailbox> {
        self.lanes.get(index % self.lanes.len().max(1))
    }
}

impl Rings for LaneRings {
    fn start(&self, index: usize, queue: Queue) {
        let queue = Box::new(queue);
        let lane = self.lane(index);
        lane.and_then(|lane| lane.ask(|done| LaneMessage::Start { index, queue, done }));
    }

    fn update(&self, index: usize, update: QueueUpdate) {
        let lane = self.lane(index);
        lane.and_then(|lane| {
            lane.ask(|done| LaneMessage::Update {
                index,
                update,
                done,
            })
        });
    }

    fn stop(&self, index: usize) -> Option<Queue> {
        let lane = self.lane(index)?;
        let queue = lane
            .ask(|done| LaneMessage::Stop { index, done })
            .flatten()?;
        Some(*queue)
    }
}
