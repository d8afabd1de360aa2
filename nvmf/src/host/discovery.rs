//! Asks a discovery controller who can be reached where, and the controllers that it refers to.
//!
//! What it answers is checked record by record: one that makes no sense is left out, with the
//! reason, and the others count.

mod controller;
mod record;
mod referrals;
mod watch;

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use self::controller::DiscoveryController;
use super::address::{TargetAddress, share};
use super::dial::{Dial, Tcp, rounded};
use super::error::HostError;
use super::options::HostOptions;
use crate::spec::Nqn;
use crate::transport::Registry;

pub use record::{Discovered, DiscoveredKind};
#[cfg(test)]
pub(super) use referrals::follow;
pub use referrals::{Discovery, Unfollowed, explore};
pub use watch::DiscoveryWatch;

/// Longest wait for the controller's shutdown.
const SHUTDOWN: Duration = Duration::from_millis(300);

/// What a discovery controller says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiscoveryLog {
    /// The controller's address, the one of several that answered.
    pub address: SocketAddr,
    /// The discovery subsystem, as it was asked for.
    pub subnqn: Nqn,
    /// The same, when it calls itself something else.
    pub own_name: Option<Nqn>,
    /// The controller that referred to this one; `None` when it was asked for.
    pub referrer: Option<SocketAddr>,
    /// Changes of the log so far (GENCTR).
    pub generation: u64,
    /// Its records, in its order.
    pub records: Vec<Discovered>,
    /// Records that make no sense.
    pub skipped: Vec<Skipped>,
}

/// A record that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Its place in the log, from 0.
    pub index: usize,
    /// Why.
    pub reason: String,
}

/// Asks a discovery controller, at the first of `targets` where one answers. All of it takes no longer than
/// [`HostOptions::connect_timeout`]. Cancel-safe: dropping the future closes what it opened.
///
/// # Errors
/// [`HostError`] is the reason as one line: of the address where most went well, the later one of equals.
pub async fn discover(
    registry: &Registry,
    targets: &[TargetAddress],
    options: &HostOptions,
) -> Result<DiscoveryLog, HostError> {
    options.check()?;
    let end = Instant::now() + options.connect_timeout;
    let addresses = resolve(targets, end).await?;
    discover_over(&Tcp::new(registry, options), &addresses, options, end).await
}

/// All addresses of all targets, with the subsystem that each is asked for.
async fn resolve(
    targets: &[TargetAddress],
    end: Instant,
) -> Result<Vec<(SocketAddr, Nqn)>, HostError> {
    let mut addresses = Vec::new();
    for target in targets {
        let resolved = target.resolve(end).await?.into_iter();
        addresses.extend(resolved.map(|at| (at, target.subnqn.clone())));
    }
    Ok(addresses)
}

pub(super) async fn discover_over(
    dial: &impl Dial,
    addresses: &[(SocketAddr, Nqn)],
    options: &HostOptions,
    end: Instant,
) -> Result<DiscoveryLog, HostError> {
    let mut best: Option<HostError> = None;
    for (tried, (at, subnqn)) in addresses.iter().enumerate() {
        let deadline = share(Instant::now(), end, addresses.len() - tried);
        match ask(dial, *at, subnqn, options, deadline).await {
            Ok(log) => return Ok(log),
            Err(error) => {
                tracing::debug!("{error}");
                if best.as_ref().is_none_or(|it| it.depth() <= error.depth()) {
                    best = Some(error);
                }
            }
        }
    }
    Err(best.unwrap_or_else(nobody))
}

/// There is no address to ask at.
fn nobody() -> HostError {
    HostError::Resolve {
        host: "of a discovery controller".to_owned(),
        reason: "none was given".to_owned(),
    }
}

/// One controller, from connecting to shutting down.
async fn ask(
    dial: &impl Dial,
    at: SocketAddr,
    subnqn: &Nqn,
    options: &HostOptions,
    deadline: Instant,
) -> Result<DiscoveryLog, HostError> {
    let begun = Instant::now();
    let work = async {
        let span = (begun, deadline);
        // It is over before any keep-alive could be due.
        let controller = DiscoveryController::connect(dial, (at, subnqn), options, 0, span).await?;
        Ok((controller.read_log(span).await?, controller))
    };
    // One that takes long to become ready gets no more time here.
    let (log, controller) = timeout_at(deadline, work).await.unwrap_or_else(|_| {
        let after = rounded(deadline.saturating_duration_since(begun));
        Err(unusable(at, format!("it was not ready within {after:?}")))
    })?;
    let left = deadline.saturating_duration_since(Instant::now());
    controller.close(left.min(SHUTDOWN)).await;
    Ok(log)
}

fn unusable(at: SocketAddr, reason: String) -> HostError {
    HostError::Unusable { at, reason }
}
