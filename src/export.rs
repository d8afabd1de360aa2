//! The embedded target: namespaces of files and memory, offered to hosts over NVMe/TCP.

use std::sync::Arc;

use nvmf::controller::{
    BindError, LaneHost, Limits, NamespaceError, Port, Subsystem, Target, TargetError,
};
use nvmf::host::{LocalEnd, NamespaceSelector, TargetAddress};
use nvmf::transport::{Lane, Registry};

use crate::config::{ExportConfig, Machine, Uri, host_of_listener};
use crate::status::StatusSignal;
use crate::storage::{self, StorageError};
use crate::worker::pool::Workers;

/// The group that all namespaces are in where access states are reported.
const ANA_GROUP: u32 = 1;

/// Why there is nothing to export.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExportError {
    /// Storage cannot be used.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// An address cannot be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Namespaces contradict each other.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// Subsystems contradict each other.
    #[error(transparent)]
    Target(#[from] TargetError),
}

/// A target that listens.
pub(crate) struct Export {
    target: Arc<Target>,
    port: Port,
}

impl Export {
    /// Opens the storage and listens.
    ///
    /// # Errors
    /// [`ExportError`] as one line; nothing stays open then.
    pub(crate) async fn open(
        config: &ExportConfig,
        registry: Arc<Registry>,
        workers: Arc<Workers>,
    ) -> Result<Self, ExportError> {
        let serial = uuid::Uuid::new_v5(
            &uuid::Uuid::NAMESPACE_OID,
            config.subnqn.as_str().as_bytes(),
        );
        let mut subsystem = Subsystem::new(config.subnqn.clone(), &serial.simple().to_string());
        for host in config.allowed_hosts.iter().flatten() {
            subsystem.allow_host(host.clone());
        }
        for namespace in &config.namespaces {
            let backend = storage::open(namespace)?;
            subsystem.add_namespace(namespace.nsid, namespace.uuid, backend)?;
        }
        if let Some(state) = config.ana_state {
            subsystem.report_ana();
            subsystem.set_ana_state(ANA_GROUP, state);
        }
        let lanes = Arc::new(RoundRobin(workers));
        let limits = Limits {
            io_queues: config.io_queues,
            cross_resets: config.ccrl,
            ..Limits::default()
        };
        let target = Target::new(vec![subsystem], limits, registry, lanes)?;
        let target = Arc::new(target);
        let mut port = Port::bind(Arc::clone(&target), &config.listen).await?;
        // Who lets the system choose a port wants no fixed one beside it.
        if config.listen.iter().all(|address| address.port() != 0) {
            port.add_discovery().await;
        }
        Ok(Self { target, port })
    }

    /// The URI of every namespace on every address, one a line.
    pub(crate) fn uris(&self, machine: &Machine) -> String {
        let mut lines = String::new();
        for address in self.port.local_addrs() {
            for subsystem in self.target.subsystems() {
                for namespace in subsystem.namespaces() {
                    let uri = Uri {
                        target: TargetAddress {
                            host: host_of_listener(address, machine.hostname()),
                            port: address.port(),
                            subnqn: subsystem.nqn().clone(),
                            local: LocalEnd::default(),
                        },
                        selector: NamespaceSelector::Nsid(namespace.nsid()),
                    };
                    lines.push_str(&format!("{uri}\n"));
                }
            }
        }
        lines
    }

    /// What is exported.
    pub(crate) fn target(&self) -> &Arc<Target> {
        &self.target
    }

    /// Serves hosts until `stop` comes, then ends every association and logs the counters.
    pub(crate) async fn serve(self, stop: impl Future<Output = ()>) {
        let Self { target, port } = self;
        let mut status = StatusSignal::new();
        let serving = port.serve(stop);
        tokio::pin!(serving);
        loop {
            tokio::select! {
                () = &mut serving => break,
                () = status.asked() => log_counts(&target),
            }
        }
        log_counts(&target);
    }
}

/// What was done up to now.
fn log_counts(target: &Target) {
    for subsystem in target.subsystems() {
        storage::log_counts(subsystem);
    }
    let totals = target.totals();
    tracing::info!(
        copied_bytes = totals.copied_bytes,
        sends = totals.sends,
        receives = totals.receives,
        "target counters"
    );
}

/// Places I/O queues on the workers in turn.
struct RoundRobin(Arc<Workers>);

impl LaneHost for RoundRobin {
    fn place(&self, lane: Box<dyn FnOnce() -> Box<dyn Lane> + Send>) {
        if !self.0.try_place(lane) {
            tracing::warn!("a worker has too many new queues; one is closed");
        }
    }
}
