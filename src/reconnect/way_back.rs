//! One attempt to get back to a namespace: an association, the same namespace, queue pairs for every lane.

use std::sync::Arc;
use std::time::Duration;

use nvmf::host::{Association, HostError, HostOptions, NamespaceInfo, TargetAddress};
use nvmf::transport::{HostQueuePair, Registry};

use super::verify::{NotTheSame, selector, verify};

/// How long a controller may take to shut down that is of no use.
const SHUTDOWN: Duration = Duration::from_millis(500);

/// Where a namespace was, and what its user has decided about its loss.
#[derive(Clone)]
pub(crate) struct WayBack {
    /// The transports.
    pub(crate) registry: Arc<Registry>,
    /// The controller.
    pub(crate) target: TargetAddress,
    /// Who connects. As many I/O queues are asked for as there are lanes, whatever this says.
    pub(crate) host: HostOptions,
    /// How long to wait for what.
    pub(crate) patience: Patience,
}

/// How long to wait for a controller that is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Patience {
    /// Between two attempts, at most.
    pub(crate) reconnect_delay: Duration,
    /// From the loss until it is given up; `None` = never.
    pub(crate) ctrl_loss: Option<Duration>,
    /// From the loss until requests fail; `None` = not before it is given up.
    pub(crate) fast_io_fail: Option<Duration>,
}

/// Why an attempt has failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotBack {
    /// The controller cannot be connected to.
    #[error(transparent)]
    Host(#[from] HostError),
    /// It is not the one that was lost.
    #[error("the controller at {at} is connected to, but {reason}")]
    Other {
        /// Its address.
        at: std::net::SocketAddr,
        /// What is different.
        reason: NotTheSame,
    },
    /// It does not take as many queues any more.
    #[error(
        "the controller at {at} grants {granted} I/O queues now; the disk has {lanes} lanes, and each \
         needs one"
    )]
    TooFewQueues {
        /// Its address.
        at: std::net::SocketAddr,
        /// I/O queues that there may be.
        granted: u16,
        /// I/O queues that there have to be.
        lanes: usize,
    },
}

/// The namespace, and a connected queue pair for each lane.
pub(crate) type Found = (NamespaceInfo, Vec<Box<dyn HostQueuePair>>);

impl WayBack {
    /// Makes an association. Takes no longer than the host's options allow.
    pub(crate) async fn connect(&self, lanes: usize) -> Result<Association, NotBack> {
        let options = HostOptions {
            nr_io_queues: u16::try_from(lanes).unwrap_or(u16::MAX),
            ..self.host.clone()
        };
        Ok(Association::connect(&self.registry, &self.target, &options).await?)
    }

    /// Finds the namespace that was lost, and connects a queue pair for each lane. The association comes back
    /// with them; one that is of no use is shut down.
    pub(crate) async fn verify(
        &self,
        association: Association,
        lost: &NamespaceInfo,
        lanes: usize,
    ) -> Result<(Association, Found), NotBack> {
        match self.find(&association, lost, lanes).await {
            Ok(found) => Ok((association, found)),
            Err(error) => {
                association.shutdown(SHUTDOWN).await;
                Err(error)
            }
        }
    }

    async fn find(
        &self,
        association: &Association,
        lost: &NamespaceInfo,
        lanes: usize,
    ) -> Result<Found, NotBack> {
        let at = association.controller().address;
        let namespace = association.select(&selector(lost)).await?;
        verify(lost, &namespace).map_err(|reason| NotBack::Other { at, reason })?;
        let granted = association.io_queues_granted();
        if usize::from(granted) < lanes {
            return Err(NotBack::TooFewQueues { at, granted, lanes });
        }
        Ok((namespace, association.open_io_queues(&self.registry).await?))
    }
}
