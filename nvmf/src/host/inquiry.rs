//! Asks a controller about its namespaces, also from beside the association.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::admin::Admin;
use super::ana::{self, AnaInfo, AnaLog};
use super::error::HostError;
use super::namespace::{Found, NamespaceInfo, NamespaceSelector};
use super::survey::Survey;
use crate::spec::Nqn;

/// A look at all namespaces may take this many times as long as connecting.
const SURVEY_MAX: u32 = 6;
/// A look at so many namespaces may take as long again as connecting.
const NAMESPACES_AT_ONCE: u32 = 16;

/// Looks at the namespaces of one association's controller; see [`super::Association::inquiry`].
#[derive(Debug, Clone)]
pub struct Inquiry {
    /// Does not keep the queue.
    pub(super) admin: Admin,
    pub(super) address: SocketAddr,
    pub(super) subnqn: Nqn,
    pub(super) hostnqn: Nqn,
    /// Bytes that one command may transfer.
    pub(super) max_transfer: Option<u64>,
    /// What the controller says about asymmetric namespace access.
    pub(super) ana: Option<AnaInfo>,
    /// Parts of logs at any offset can be read.
    pub(super) extended_log: bool,
    /// How long connecting may take.
    pub(super) within: Duration,
}

impl Inquiry {
    /// The controller's address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// As [`super::Association::reidentify`].
    ///
    /// # Errors
    /// As there.
    pub async fn reidentify(&self, nsid: u32) -> Result<Option<NamespaceInfo>, HostError> {
        self.survey(async |survey| survey.one(nsid).await).await
    }

    /// As [`super::Association::ana_log`].
    ///
    /// # Errors
    /// As there.
    pub async fn ana_log(&self) -> Result<AnaLog, HostError> {
        let info = self.ana.ok_or_else(|| HostError::Unusable {
            at: self.address,
            reason: "it does not report asymmetric namespace access".to_owned(),
        })?;
        let begun = Instant::now();
        let admin = self.admin.bounded(begun, begun + self.within);
        ana::read_log(&admin, &info, self.max_transfer, self.extended_log).await
    }

    /// All active namespaces.
    pub(super) async fn all(&self) -> Result<Vec<Found>, HostError> {
        self.survey(async |survey| survey.all().await).await
    }

    /// The namespace that is meant.
    pub(super) async fn select(
        &self,
        selector: &NamespaceSelector,
    ) -> Result<NamespaceInfo, HostError> {
        self.survey(async |survey| survey.select(selector).await)
            .await
    }

    async fn survey<T>(
        &self,
        look: impl AsyncFnOnce(&mut Survey<'_>) -> Result<T, HostError>,
    ) -> Result<T, HostError> {
        let (begun, within) = (Instant::now(), self.within);
        let mut survey = Survey {
            admin: self.admin.bounded(begun, begun + within),
            each: within / NAMESPACES_AT_ONCE,
            subnqn: &self.subnqn,
            hostnqn: &self.hostnqn,
            max_transfer: self.max_transfer,
        };
        let within = within * SURVEY_MAX;
        timeout(within, look(&mut survey))
            .await
            .unwrap_or(Err(HostError::TimedOut {
                at: self.address,
                command: "Identify of its namespaces",
                after: within,
            }))
    }
}
