//! How many attempts to connect may be made at one address at once: a target that comes back has many hosts, each
//! with many disks.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use nvmf::host::TargetAddress;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Attempts at one address.
const AT_ONCE: usize = 4;

/// The attempts of a process.
#[derive(Debug, Default)]
pub(crate) struct Crowd {
    addresses: Mutex<HashMap<(String, u16), Arc<Semaphore>>>,
}

impl Crowd {
    /// Waits for a turn at this address; it is over when what is returned is dropped.
    pub(crate) async fn turn(&self, target: &TargetAddress) -> Option<OwnedSemaphorePermit> {
        let semaphore = {
            let mut addresses = self
                .addresses
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            // Addresses that nobody is at are forgotten.
            addresses.retain(|_, semaphore| {
                Arc::strong_count(semaphore) > 1 || semaphore.available_permits() < AT_ONCE
            });
            let address = (target.host.to_ascii_lowercase(), target.port);
            let semaphore = addresses.entry(address);
            Arc::clone(semaphore.or_insert_with(|| Arc::new(Semaphore::new(AT_ONCE))))
        };
        // It is never closed.
        semaphore.acquire_owned().await.ok()
    }
}

#[cfg(test)]
mod tests {
    use nvmf::host::LocalEnd;
    use nvmf::spec::Nqn;
    use tokio::time::{Duration, timeout};

    use super::*;

    fn target(host: &str, port: u16) -> TargetAddress {
        TargetAddress {
            host: host.to_owned(),
            port,
            subnqn: Nqn::new("nqn.2026-01.org.example:disk1").unwrap(),
            local: LocalEnd::default(),
        }
    }

    #[tokio::test]
    async fn a_fifth_attempt_at_one_address_waits_and_one_at_another_does_not() {
        let crowd = Crowd::default();
        let mut turns = Vec::new();
        for _ in 0..AT_ONCE {
            turns.push(crowd.turn(&target("a", 1)).await.unwrap());
        }
        let soon = Duration::from_millis(20);
        let same = target("A", 1);
        assert!(timeout(soon, crowd.turn(&same)).await.is_err());
        for other in [target("a", 2), target("b", 1)] {
            assert!(timeout(soon, crowd.turn(&other)).await.is_ok());
        }
        turns.pop();
        assert!(timeout(soon, crowd.turn(&same)).await.is_ok());
    }

    #[tokio::test]
    async fn addresses_that_nobody_is_at_are_forgotten() {
        let crowd = Crowd::default();
        for port in 0..100 {
            drop(crowd.turn(&target("a", port)).await);
        }
        assert!(crowd.addresses.lock().unwrap().len() <= 1);
    }
}
