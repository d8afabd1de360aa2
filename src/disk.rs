//! One disk: a vhost-user device in front, an association behind, lanes between them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvmf::host::{Association, ControllerInfo, HostError, NamespaceInfo, TargetAddress};
use nvmf::transport::Registry;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use vhost_user_blk::Device;

use crate::bridge::geometry::{self, Choices};
use crate::bridge::path_choice::IoPolicy;
use crate::bridge::translate::Limits;
use crate::config::{AttachConfig, Drain, Uri};
use crate::front::{Front, Start};
use crate::handover::taking::NotTaken;
use crate::limits::{LANE_SLOTS, MAILBOX, MAX_PATHS};
use crate::metrics::DiskCounters;
use crate::namespace_events::NamespaceEvents;
use crate::reconnect::crowd::Crowd;
use crate::reconnect::way_back::{Found, WayBack};
use crate::reconnect::{Paths, PathsSetup};
use crate::remembered::Remembered;
use crate::worker::lane::{DeviceLane, LaneSetup};
use crate::worker::mailbox::Mailbox;
use crate::worker::placement::Placement;
use crate::worker::pool::Workers;
use crate::worker::throttle::{Rates, Throttle};

/// How long the controller may take to shut down.
const SHUTDOWN: Duration = Duration::from_millis(600);
/// Blocks above the page size of common guests are not understood by all of them.
const GUEST_BLOCK_MAX: u32 = 4096;

/// What a disk is made of.
pub(crate) struct Backing {
    /// What it is called in the log.
    pub(crate) name: String,
    /// The association of the first path, and what was found there; `None` while its controller is away.
    pub(crate) first: Option<(Association, Found)>,
    /// The controller, as far as it is known.
    pub(crate) controller: ControllerInfo,
    /// The namespace.
    pub(crate) namespace: NamespaceInfo,
    /// Lanes, at least one.
    pub(crate) lanes: usize,
    /// How commands are spread over paths.
    pub(crate) policy: IoPolicy,
    /// A path on which a command has no answer for so long is lost; zero waits for ever.
    pub(crate) io_timeout: Duration,
    /// What it may do in a second.
    pub(crate) rates: Rates,
    /// How long a lane looks for work before it sleeps, at most.
    pub(crate) poll_max: Duration,
    /// The keep-alive time-out that was asked for.
    pub(crate) keep_alive: Duration,
    /// How rings stop.
    pub(crate) drain: Drain,
    /// How long storage in this machine goes on with what a process had begun that is gone; `None` for a
    /// controller elsewhere.
    pub(crate) local_quiet: Option<Duration>,
    /// How to get back to the controller; `None` where its loss is the end.
    pub(crate) way_back: Option<WayBack>,
    /// Where other paths lead to the same.
    pub(crate) others: Vec<TargetAddress>,
    /// The command that it is a disk of.
    pub(crate) command: &'static str,
}

impl Backing {
    /// As the user has decided, without a way to the controller.
    fn new(
        config: &AttachConfig,
        controller: ControllerInfo,
        namespace: NamespaceInfo,
        lanes: usize,
    ) -> Self {
        Self {
            name: config.uri.to_string(),
            first: None,
            controller,
            namespace,
            lanes,
            policy: config.policy,
            io_timeout: config.io_timeout,
            rates: config.rates,
            poll_max: config.poll_max,
            keep_alive: config.host.keep_alive_tmo,
            drain: config.drain,
            local_quiet: None,
            way_back: None,
            others: Vec::new(),
            command: "attach",
        }
    }
}

fn way_back(registry: Arc<Registry>, config: &AttachConfig) -> WayBack {
    WayBack {
        registry,
        target: config.uri.target.clone(),
        host: config.host.clone(),
        crowd: Arc::new(Crowd::default()),
        patience: config.patience,
    }
}

/// A disk that is served.
pub(crate) struct Disk {
    paths: Paths,
    /// Where paths are told that are new.
    more: mpsc::Sender<TargetAddress>,
    front: Front,
}

impl Disk {
    /// Connects to the namespace.
    ///
    /// # Errors
    /// [`HostError`] as one line; nothing stays open then.
    pub(crate) async fn connect(
        registry: Arc<Registry>,
        config: &AttachConfig,
    ) -> Result<Backing, HostError> {
        let Uri { target, selector } = &config.uri;
        let association = Association::connect(&registry, target, &config.host).await?;
        let opened = async {
            let namespace = association.select(selector).await?;
            Found::open(&association, &registry, namespace).await
        };
        let found = match opened.await {
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
            nsid = found.namespace.nsid,
            io_queues = found.pairs.len(),
            access = %found.access,
            "namespace attached"
        );
        if found.namespace.write_protected && !config.read_only {
            tracing::warn!(
                disk = %config.uri,
                "the namespace is write protected: writes fail until that changes; attach it with \
                 --read-only if it is to stay so"
            );
        }
        let controller = controller.clone();
        let (namespace, lanes) = (found.namespace.clone(), found.pairs.len());
        Ok(Backing {
            first: Some((association, found)),
            way_back: Some(way_back(registry, config)),
            ..Backing::new(config, controller, namespace, lanes)
        })
    }

    /// A disk as it was, whose controller is away.
    pub(crate) fn away(
        registry: Arc<Registry>,
        config: &AttachConfig,
        remembered: &Remembered,
    ) -> Backing {
        let lanes = remembered.io_queues.min(config.host.nr_io_queues);
        let lanes = usize::from(lanes.max(1));
        let controller = remembered.controller(&config.uri.target.subnqn);
        Backing {
            way_back: Some(way_back(registry, config)),
            ..Backing::new(config, controller, remembered.namespace.clone(), lanes)
        }
    }

    /// Makes a disk of a namespace, and places a lane for each of its queue pairs on the workers.
    pub(crate) async fn new(backing: Backing, choices: Choices, workers: &Workers) -> Self {
        let Backing {
            name,
            first,
            controller,
            namespace,
            lanes: count,
            policy,
            io_timeout,
            rates,
            poll_max,
            keep_alive,
            drain,
            local_quiet,
            way_back,
            others,
            command,
        } = backing;
        let there = first.is_some();
        let limits = Limits::new(&controller, &namespace);
        let device = Device::new(geometry::device_options(&choices, &controller, &namespace));
        let counters = Arc::new(DiskCounters::default());
        let mut lanes = Vec::with_capacity(count);
        let throttle = Throttle::new(&rates, Instant::now()).map(Arc::new);
        let reports = count.max(1) * MAX_PATHS;
        let (loss, losses) = mpsc::channel(2 * reports);
        let (change, changes) = mpsc::channel(reports);
        let (more, new_paths) = mpsc::channel(MAX_PATHS);
        let (recovery, recovered) = mpsc::channel(count.max(1));
        for _ in 0..count {
            let (mailbox, mail) = Mailbox::new(MAILBOX);
            let setup = LaneSetup {
                name: name.clone(),
                limits,
                policy,
                losses: loss.clone(),
                changes: change.clone(),
                recovered: recovery.clone(),
                io_timeout,
                mail,
                counters: counters.lane(),
                slots: LANE_SLOTS,
                throttle: throttle.clone(),
                poll_max,
                emulate_512: choices.emulate_512,
            };
            workers
                .place(Box::new(move || Box::new(DeviceLane::new(setup))))
                .await;
            lanes.push(mailbox);
        }
        if namespace.block_size > GUEST_BLOCK_MAX && !choices.emulate_512 {
            tracing::warn!(
                disk = name,
                "blocks of {} bytes: guests with pages of {GUEST_BLOCK_MAX} bytes may refuse the disk",
                namespace.block_size
            );
        }
        tracing::info!(
            disk = name,
            block_size = namespace.block_size,
            emulate_512 = choices.emulate_512,
            blocks = namespace.block_count,
            lanes = lanes.len(),
            "disk ready"
        );
        let namespace = NamespaceEvents::new(
            name.clone(),
            Arc::clone(&device),
            lanes.clone(),
            loss,
            namespace,
        );
        let rings = usize::from(device.options().num_queues);
        let placement = Arc::new(Placement::new(lanes, rings));
        let (session, news) = mpsc::channel(1);
        let paths = Paths::new(PathsSetup {
            name: name.clone(),
            first,
            namespace,
            keep_alive,
            placement: Arc::clone(&placement),
            session: news,
            recovered,
            local_quiet,
            writes_around: choices.emulate_512,
            losses,
            changes,
            new_paths,
            way_back,
            others,
        });
        let front = Front {
            name,
            command,
            subsystem: controller.subnqn.to_string(),
            namespace: paths.namespace(),
            there,
            device,
            placement,
            session,
            drain,
            counters,
        };
        Self { paths, more, front }
    }

    /// Its namespace, and when that is another.
    pub(crate) fn namespace(&self) -> watch::Receiver<NamespaceInfo> {
        self.paths.namespace()
    }

    /// Takes paths that are new, while the disk is served.
    pub(crate) fn more_paths(&self) -> mpsc::Sender<TargetAddress> {
        self.more.clone()
    }

    /// Serves front-ends, one after the other, until `stop` comes or there can be no other; then drains, shuts the
    /// controllers down, and logs the counters. Ends within two seconds of `stop`, also when a
    /// controller is dead or away.
    ///
    /// # Errors
    /// The disk was to be taken over from another process, and was not.
    pub(crate) async fn serve(
        self,
        start: Start,
        stop: impl Future<Output = ()>,
    ) -> Result<(), NotTaken> {
        let Self { paths, front, .. } = self;
        let (end, ended) = oneshot::channel();
        let served = async {
            let served = front.serve(start, stop).await;
            drop(end);
            served
        };
        let (associations, served) = tokio::join!(paths.run(ended), served);
        // All at once, so that many take no longer than one.
        let ends: JoinSet<()> = associations
            .into_iter()
            .map(|association| association.shutdown(SHUTDOWN))
            .collect();
        ends.join_all().await;
        front.counters.totals().log(&front.name);
        served
    }
}
