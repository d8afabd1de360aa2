//! Stays in touch with the discovery controller that a disk was found by, and tells of ways that are new.
//!
//! A way that is not told any more is no reason to leave it: what is connected stays connected, whatever a log
//! says.

use std::sync::Arc;
use std::time::Duration;

use nvmf::host::discovery::DiscoveryWatch;
use nvmf::host::{HostError, HostOptions, TargetAddress};
use nvmf::transport::Registry;
use tokio::time::{Instant, sleep};

use crate::config::locator::Search;
use crate::finding::ways_to;
use crate::reconnect::backoff::Backoff;

/// Keep-alive time-out of the connection: nothing depends on noticing its end soon.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// Between two attempts to connect, at most.
const DELAY_MAX: Duration = Duration::from_secs(60);
/// Between two looks at a log that changes without end.
const PAUSE: Duration = Duration::from_secs(1);
/// Ways that are known at once; a log that tells of ever more is not believed.
const WAYS_MAX: usize = 64;

/// A disk that was found by discovery.
pub(crate) struct Rediscovery {
    disk: String,
    registry: Arc<Registry>,
    search: Search,
    options: HostOptions,
    /// Ways that were told, and whether they still are; at least one.
    known: Vec<(TargetAddress, bool)>,
}

impl Rediscovery {
    /// Of a disk, for the log, that was found at these ways; all are to the same subsystem.
    pub(crate) fn new(
        disk: String,
        registry: Arc<Registry>,
        search: Search,
        host: &HostOptions,
        ways: Vec<TargetAddress>,
    ) -> Self {
        Self {
            disk,
            registry,
            search,
            options: HostOptions {
                keep_alive_tmo: KEEP_ALIVE,
                local: host.local.clone(),
                connect_timeout: host.connect_timeout,
                ..HostOptions::new(host.hostnqn.clone(), host.hostid)
            },
            known: ways.into_iter().map(|way| (way, true)).collect(),
        }
    }

    /// Gives each new way to `found`. Never ends.
    pub(crate) async fn run(mut self, mut found: impl FnMut(&TargetAddress)) {
        let mut backoff = Backoff::new(DELAY_MAX);
        let mut attempts = 0u32;
        loop {
            sleep(backoff.next()).await;
            let targets = self.search.controller.targets();
            let connected = DiscoveryWatch::connect(&self.registry, &targets, &self.options).await;
            let lost = match connected {
                Ok(watch) => {
                    tracing::debug!(disk = self.disk, controller = %watch.address(), "discovery is watched");
                    attempts = 0;
                    let since = Instant::now();
                    let lost = self.watch(watch, &mut found).await;
                    let loud = backoff.lost(since.elapsed());
                    (loud, lost)
                }
                Err(error) => {
                    attempts = attempts.saturating_add(1);
                    (attempts == 1, error)
                }
            };
            match lost {
                (true, error) => {
                    tracing::warn!(
                        disk = self.disk,
                        "discovery tells of no new ways now: {error}"
                    );
                }
                (false, error) => tracing::debug!(disk = self.disk, "discovery: {error}"),
            }
        }
    }

    /// Until the controller is lost, or fails.
    async fn watch(
        &mut self,
        mut watch: DiscoveryWatch,
        found: &mut impl FnMut(&TargetAddress),
    ) -> HostError {
        loop {
            match watch.explore(&self.registry).await {
                Ok(log) => {
                    let subnqn = self.known.first().map(|(way, _)| way.subnqn.clone());
                    let ways = subnqn.map(|subnqn| ways_to(&log, &subnqn).0);
                    self.compare(ways.unwrap_or_default(), found);
                }
                Err(error) => return error,
            }
            sleep(PAUSE).await;
            if let Err(lost) = watch.changed().await {
                return lost;
            }
        }
    }

    /// Takes in what is told now.
    fn compare(&mut self, told: Vec<TargetAddress>, found: &mut impl FnMut(&TargetAddress)) {
        let disk = &self.disk;
        for (way, still) in &mut self.known {
            let now = told.contains(way);
            if *still && !now {
                tracing::info!(disk, %way, "discovery does not tell of a way any more; it is used as long as it works");
            }
            *still = now;
        }
        for way in told {
            if self.known.iter().any(|(known, _)| *known == way) {
                continue;
            }
            if self.known.len() >= WAYS_MAX {
                let Some(gone) = self.known.iter().position(|(_, still)| !still) else {
                    tracing::debug!(disk, %way, "one way too many");
                    continue;
                };
                self.known.remove(gone);
            }
            tracing::info!(disk, %way, "discovery tells of a new way");
            found(&way);
            self.known.push((way, true));
        }
    }
}

#[cfg(test)]
mod tests {
    use nvmf::host::LocalEnd;
    use nvmf::spec::Nqn;
    use uuid::Uuid;

    use super::*;
    use crate::config::locator::Locator;

    fn way(host: usize) -> TargetAddress {
        TargetAddress {
            host: format!("192.0.2.{host}"),
            port: 4420,
            subnqn: Nqn::new("nqn.2026-01.org.example:disk1").unwrap(),
            local: LocalEnd::default(),
        }
    }

    fn rediscovery() -> Rediscovery {
        let Locator::Search(search) = "nvme+tcp-discovery://h".parse().unwrap() else {
            panic!("no search")
        };
        let host = HostOptions::new(way(1).subnqn, Uuid::from_u128(1));
        let registry = Arc::new(Registry::with_defaults());
        Rediscovery::new("disk".to_owned(), registry, search, &host, vec![way(1)])
    }

    fn told(rediscovery: &mut Rediscovery, ways: &[usize]) -> Vec<TargetAddress> {
        let mut found = Vec::new();
        let ways = ways.iter().copied().map(way).collect();
        rediscovery.compare(ways, &mut |way: &TargetAddress| found.push(way.clone()));
        found
    }

    #[test]
    fn a_new_way_is_found_once_whatever_goes_and_comes_back() {
        let mut it = rediscovery();
        assert_eq!(told(&mut it, &[1]), []);
        assert_eq!(told(&mut it, &[2, 1]), [way(2)]);
        assert_eq!(told(&mut it, &[]), []);
        assert_eq!(told(&mut it, &[1, 2, 3]), [way(3)]);
    }

    #[test]
    fn ways_without_end_have_one_and_those_that_are_gone_make_room() {
        let mut it = rediscovery();
        let all: Vec<usize> = (1..100).collect();
        assert_eq!(told(&mut it, &all).len(), WAYS_MAX - 1);
        assert_eq!(told(&mut it, &all), []);
        assert_eq!(told(&mut it, &[1, 99]), [way(99)]);
        assert_eq!(it.known.len(), WAYS_MAX);
    }
}
