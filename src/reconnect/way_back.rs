//! One attempt to get back to a namespace: an association, the same namespace, queue pairs for every lane.

use std::sync::Arc;
use std::time::Duration;

use nvmf::host::{AnaLog, Association, HostError, HostOptions, NamespaceInfo, TargetAddress};
use nvmf::spec::ana::AnaState;
use nvmf::transport::{HostQueuePair, Registry};

use super::crowd::Crowd;
use super::verify::{NotTheSame, has_own_name, selector, verify};
use crate::bridge::path_choice::Access;

/// How long a controller may take to shut down that is of no use.
pub(super) const SHUTDOWN: Duration = Duration::from_millis(500);

/// Where a namespace was, and what its user has decided about its loss.
#[derive(Clone)]
pub(crate) struct WayBack {
    /// The transports.
    pub(crate) registry: Arc<Registry>,
    /// The controller.
    pub(crate) target: TargetAddress,
    /// Who connects. As many I/O queues are asked for as there are lanes, whatever this says.
    pub(crate) host: HostOptions,
    /// Who else is at the same address.
    pub(crate) crowd: Arc<Crowd>,
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
    /// Nothing says that it is the same by another path.
    #[error(
        "the namespace has no UUID, NGUID or EUI-64, so nothing tells whether the controller at {at} has the same; \
         it takes one path alone"
    )]
    Nameless {
        /// Its address.
        at: std::net::SocketAddr,
    },
}

/// What an association is for.
pub(crate) struct Found {
    /// The namespace.
    pub(crate) namespace: NamespaceInfo,
    /// What the path is good for.
    pub(crate) access: Access,
    /// A connected queue pair for each lane, or for the first ones.
    pub(crate) pairs: Vec<Box<dyn HostQueuePair>>,
}

impl Found {
    /// Connects the queue pairs of an association, whose controller has this namespace.
    ///
    /// # Errors
    /// A queue cannot be connected, or the controller does not tell what it says it would.
    pub(crate) async fn open(
        association: &Association,
        registry: &Registry,
        namespace: NamespaceInfo,
    ) -> Result<Self, HostError> {
        let access = match association.controller().ana {
            None => Access::Optimized,
            Some(_) => {
                let log = association.ana_log().await?;
                access_of(&log, namespace.nsid, namespace.anagrpid)
            }
        };
        Ok(Self {
            namespace,
            access,
            pairs: association.open_io_queues(registry).await?,
        })
    }
}

/// What a log says of a namespace; what it does not speak of is there.
pub(crate) fn access_of(log: &AnaLog, nsid: u32, group: u32) -> Access {
    match log.state_of(nsid, group) {
        None | Some(AnaState::Optimized) => Access::Optimized,
        Some(AnaState::NonOptimized) => Access::NonOptimized,
        Some(AnaState::Inaccessible) => Access::Inaccessible,
        Some(AnaState::PersistentLoss) => Access::PersistentLoss,
        Some(AnaState::Change) => Access::Change,
    }
}

impl WayBack {
    /// Makes an association. Takes no longer than the host's options allow.
    pub(crate) async fn connect(&self, lanes: usize) -> Result<Association, NotBack> {
        let options = HostOptions {
            nr_io_queues: u16::try_from(lanes).unwrap_or(u16::MAX),
            ..self.host.clone()
        };
        let _turn = self.crowd.turn(&self.target).await;
        Ok(Association::connect(&self.registry, &self.target, &options).await?)
    }

    /// Finds the namespace that was lost, and connects queue pairs for the lanes. The association comes back
    /// with them; one that is of no use is shut down. The disk has `several` paths.
    pub(crate) async fn verify(
        &self,
        association: Association,
        lost: &NamespaceInfo,
        several: bool,
    ) -> Result<(Association, Found), NotBack> {
        match self.find(&association, lost, several).await {
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
        several: bool,
    ) -> Result<Found, NotBack> {
        let at = association.controller().address;
        if several && !has_own_name(lost) {
            return Err(NotBack::Nameless { at });
        }
        let namespace = association.select(&selector(lost)).await?;
        verify(lost, &namespace).map_err(|reason| NotBack::Other { at, reason })?;
        Ok(Found::open(association, &self.registry, namespace).await?)
    }
}
