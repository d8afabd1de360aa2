//! A local disk: storage of this machine behind the embedded controller, reached without a network.

use std::sync::Arc;
use std::time::Duration;

use nvmf::controller::{
    LaneHost, Limits, LocalPort, NamespaceError, Subsystem, Target, TargetError,
};
use nvmf::host::{Association, HostError, NamespaceSelector};
use nvmf::transport::loopback::{self, Connector, Coupled, NotCoupled};
use nvmf::transport::{HostQueuePair, Lane, Registry};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::bridge::path_choice::{Access, IoPolicy};
use crate::config::{Drain, DrainPolicy, Machine, ServeConfig};
use crate::disk::{Backing, Disk};
use crate::limits;
use crate::reconnect::way_back::Found;
use crate::storage::{self, StorageError};
use crate::worker::pool::Workers;

/// Namespace identifier of the disk.
const NSID: u32 = 1;
/// A ring that stops waits for storage as long as it takes; nothing is ended for it, since nothing would come back.
const LOCAL_DRAIN: Drain = Drain {
    timeout: Duration::from_secs(limits::DEFAULT_DRAIN_SECONDS as u64),
    policy: DrainPolicy::Error,
    may_end_paths: false,
};
/// How long storage of this machine goes on with writes of a process that is gone, once the next has opened it: a
/// file is locked until the last of them is completed.
const LOCAL_QUIET: Duration = Duration::ZERO;

/// Why there is no local disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// The storage cannot be used.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// Its identity cannot be used.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// The controller cannot be made.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The controller cannot be connected to.
    #[error("the embedded controller: {0}")]
    Host(#[from] HostError),
    /// The transport is not loopback.
    #[error(transparent)]
    NotCoupled(#[from] NotCoupled),
    /// The controller did not hand a queue over.
    #[error("the embedded controller has given a queue up; look at the log")]
    NoLane,
}

/// The controller behind a local disk.
pub(crate) struct Local {
    target: Arc<Target>,
    stop: oneshot::Sender<()>,
    port: JoinHandle<()>,
}

impl Local {
    /// Opens the storage, connects to it and places the disk's lanes on the workers.
    ///
    /// # Errors
    /// [`ServeError`] as one line.
    pub(crate) async fn serve(
        config: &ServeConfig,
        machine: &Machine,
        workers: &Workers,
    ) -> Result<(Self, Disk), ServeError> {
        let mut subsystem = Subsystem::new(machine.default_subnqn(), "local");
        let uuid = config.namespace.uuid;
        let storage = match config.takeover {
            true => storage::open_beside(&config.namespace)?,
            false => storage::open(&config.namespace)?,
        };
        subsystem.add_namespace(NSID, uuid, storage)?;
        let nqn = subsystem.nqn().clone();
        let registry = Arc::new(Registry::with_defaults());
        let (lanes, mut placed) = mpsc::unbounded_channel();
        let limits = Limits {
            io_queues: config.host.nr_io_queues,
            queue_size: config.host.queue_size.into(),
            // A local disk has one controller.
            cross_resets: 0,
            ..Limits::default()
        };
        let handover = Arc::new(Handover(lanes));
        let target = Target::new(vec![subsystem], limits, Arc::clone(&registry), handover)?;
        let target = Arc::new(target);
        let (connector, listener) = loopback::listen();
        let (stop, stopped) = oneshot::channel();
        let port = LocalPort::new(Arc::clone(&target), listener);
        let port = tokio::spawn(port.serve(async {
            // That nobody can tell any more is the end, too.
            let _ = stopped.await;
        }));
        let local = Self { target, stop, port };
        let options = &config.host;
        let association = Association::connect_local(&registry, &connector, &nqn, options).await?;
        let namespace = association.select(&NamespaceSelector::Nsid(NSID)).await?;
        let pairs = queue_pairs(&association, &registry, &connector, &mut placed).await?;
        let backing = Backing {
            name: config.namespace.to_string(),
            controller: association.controller().clone(),
            namespace: namespace.clone(),
            lanes: pairs.len(),
            first: Some((
                association,
                Found {
                    namespace,
                    access: Access::Optimized,
                    pairs,
                },
            )),
            policy: IoPolicy::default(),
            // Storage that does not answer is waited for, as an operating system does.
            io_timeout: Duration::ZERO,
            rates: config.rates,
            poll_max: config.poll_max,
            keep_alive: options.keep_alive_tmo,
            drain: LOCAL_DRAIN,
            local_quiet: Some(LOCAL_QUIET),
            // A controller in the same process does not come back on its own.
            way_back: None,
            others: Vec::new(),
            command: "serve",
        };
        let disk = Disk::new(backing, config.choices, workers).await;
        Ok((local, disk))
    }

    /// What the disk is a namespace of.
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// Ends the controller, whose associations are over, and logs what was done with the storage.
    pub(crate) async fn end(self) {
        let Self { target, stop, port } = self;
        drop(stop);
        // Bounded by itself.
        let _ = port.await;
        for subsystem in target.subsystems() {
            storage::log_counts(subsystem);
        }
    }
}

/// Connects the I/O queues one after the other, and joins the two ends of each.
async fn queue_pairs(
    association: &Association,
    registry: &Registry,
    connector: &Connector,
    placed: &mut mpsc::UnboundedReceiver<NewLane>,
) -> Result<Vec<Box<dyn HostQueuePair>>, ServeError> {
    let mut pairs: Vec<Box<dyn HostQueuePair>> = Vec::new();
    for qid in 1..=association.io_queues_granted() {
        let host = association
            .open_local_io_queue(registry, connector, qid)
            .await?;
        // Only this queue was connected since the last one, so the lane is its other end.
        let lane = placed.recv().await.ok_or(ServeError::NoLane)?;
        pairs.push(Box::new(Coupled::new(host, lane())?));
    }
    Ok(pairs)
}

type NewLane = Box<dyn FnOnce() -> Box<dyn Lane> + Send>;

/// Hands the controller's ends of queues to whoever connects them.
struct Handover(mpsc::UnboundedSender<NewLane>);

impl LaneHost for Handover {
    fn place(&self, lane: NewLane) {
        // Dropping it ends the queue, and nobody wants it any more.
        let _ = self.0.send(lane);
    }
}
