//! Referrals: each controller is asked once, whatever it is called, and there is an end to it.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use super::discovery::{page, record, serving};
use super::*;
use crate::host::dial::{Dial, NewQueue};
use crate::host::discovery::{Discovery, discover_over, follow};
use crate::host::scripted::SHORT;
use crate::spec::discovery::{DiscoveryRecord, adrfam, subtype};
use crate::transport::HostQueuePair;

/// Discovery controllers by address. Elsewhere nobody answers, or the same one everywhere.
struct Fabric {
    controllers: HashMap<SocketAddr, Scripted>,
    elsewhere: Option<Box<dyn Fn(SocketAddr) -> Scripted + Send + Sync>>,
    opened: std::sync::Mutex<Vec<SocketAddr>>,
}

impl Fabric {
    fn new(controllers: impl IntoIterator<Item = (SocketAddr, Vec<DiscoveryRecord>)>) -> Self {
        let controllers = controllers.into_iter();
        Self {
            controllers: controllers
                .map(|(at, records)| (at, serving(move |_| Ok(page(1, &records)))))
                .collect(),
            elsewhere: None,
            opened: Default::default(),
        }
    }

    /// With time for a busy machine.
    async fn explore(&self, first: SocketAddr) -> Discovery {
        self.explore_within(SHORT * 100, first).await
    }

    /// With so much for each connection.
    async fn explore_within(&self, connect_timeout: Duration, first: SocketAddr) -> Discovery {
        let options = HostOptions {
            connect_timeout,
            ..options()
        };
        let end = Instant::now() + connect_timeout;
        let log = discover_over(self, &[(first, Nqn::discovery())], &options, end).await;
        follow(self, log.unwrap(), &options).await
    }

    fn opened(&self) -> Vec<SocketAddr> {
        self.opened.lock().unwrap().clone()
    }
}

impl Dial for Fabric {
    async fn open(
        &self,
        at: SocketAddr,
        queue: NewQueue,
        deadline: Instant,
    ) -> Result<Box<dyn HostQueuePair>, HostError> {
        self.opened.lock().unwrap().push(at);
        match (self.controllers.get(&at), &self.elsewhere) {
            (Some(controller), _) => controller.open(at, queue, deadline).await,
            (None, Some(elsewhere)) => elsewhere(at).open(at, queue, deadline).await,
            (None, None) => Err(HostError::Refused { at }),
        }
    }
}

fn v4(last: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, last], 8009))
}

fn lead(subtype: u8, traddr: &str, trsvcid: &str) -> DiscoveryRecord {
    let mut record = record();
    record.subtype = subtype;
    record.traddr = [0; 256];
    record.traddr[..traddr.len()].copy_from_slice(traddr.as_bytes());
    record.trsvcid = [0; 32];
    record.trsvcid[..trsvcid.len()].copy_from_slice(trsvcid.as_bytes());
    if traddr.contains(':') {
        record.adrfam = adrfam::IPV6;
    }
    if subtype != subtype::NVM {
        record.subnqn = Nqn::discovery().to_field();
    }
    record
}

fn referral(traddr: &str, trsvcid: &str) -> DiscoveryRecord {
    lead(subtype::REFERRAL, traddr, trsvcid)
}

fn disk(traddr: &str, trsvcid: &str) -> DiscoveryRecord {
    lead(subtype::NVM, traddr, trsvcid)
}

#[tokio::test]
async fn each_controller_is_asked_once_however_it_is_spelt() {
    let fabric = Fabric::new([
        (
            v4(1),
            vec![
                disk("192.0.2.9", "4420"),
                // Itself, in other words.
                referral("::ffff:192.0.2.1", "8009"),
                referral("::ffff:c000:0201", "08009"),
                referral("192.0.2.2", "8009"),
                referral("192.0.2.2", "8009"),
            ],
        ),
        (
            v4(2),
            vec![
                lead(subtype::CURRENT, "192.0.2.2", "8009"),
                // Back to the first, and on to a third.
                referral("192.0.2.1", "8009"),
                referral("::ffff:192.0.2.3", "8009"),
                disk("::ffff:192.0.2.9", "04420"),
                disk("192.0.2.9", "4421"),
            ],
        ),
        (
            v4(3),
            vec![referral("192.0.2.2", "8009"), referral("192.0.2.3", "8009")],
        ),
    ]);
    let found = fabric.explore(v4(1)).await;
    assert_eq!(fabric.opened(), [v4(1), v4(2), v4(3)]);
    assert_eq!(found.unfollowed, []);
    let asked: Vec<_> = found
        .logs
        .iter()
        .map(|log| (log.address, log.referrer))
        .collect();
    assert_eq!(
        asked,
        [(v4(1), None), (v4(2), Some(v4(1))), (v4(3), Some(v4(2)))]
    );
    let disks: Vec<_> = found
        .records()
        .filter(|record| record.subnqn.as_str() == SUBNQN)
        .map(|record| record.target.as_ref().unwrap().to_string())
        .collect();
    assert_eq!(
        disks,
        [4420, 4421].map(|port| format!("nvme+tcp://192.0.2.9:{port}/{SUBNQN}"))
    );
}

#[tokio::test]
async fn a_controller_that_lists_itself_under_its_own_name_is_not_asked_again() {
    let own = Nqn::new("nqn.2026-01.org.example:discovery").unwrap();
    let mut itself = referral("192.0.2.1", "8009");
    itself.subnqn = own.to_field();
    let fabric = Fabric::new([(v4(1), vec![itself])]);
    fabric.controllers[&v4(1)].look(|model| model.identity.subnqn = own.to_field());
    let found = fabric.explore(v4(1)).await;
    assert_eq!(fabric.opened(), [v4(1)]);
    assert_eq!(found.logs[0].own_name, Some(own));
}

#[tokio::test]
async fn a_referral_by_a_name_of_its_own_is_connected_to_under_that_name() {
    let own = Nqn::new("nqn.2026-01.org.example:discovery").unwrap();
    let mut other = referral("192.0.2.2", "8009");
    other.subnqn = own.to_field();
    let fabric = Fabric::new([(v4(1), vec![other]), (v4(2), vec![])]);
    fabric.explore(v4(1)).await;
    let (_, data) = fabric.controllers[&v4(2)].look(|model| model.connects.remove(0));
    assert!(data[256..].starts_with(own.as_str().as_bytes()));
}

#[tokio::test]
async fn a_referral_that_leads_nowhere_is_told_and_the_others_count() {
    let mut fibre = referral("192.0.2.5", "8009");
    fibre.trtype = 2;
    let fabric = Fabric::new([
        (
            v4(1),
            vec![
                referral("192.0.2.2", "8009"),
                fibre,
                referral("192.0.2.3", "8009"),
            ],
        ),
        (v4(3), vec![disk("192.0.2.9", "4420")]),
    ]);
    let found = fabric.explore(v4(1)).await;
    assert_eq!(found.logs.len(), 2);
    assert_eq!(found.logs[1].records.len(), 1);
    let reasons: Vec<_> = found
        .unfollowed
        .iter()
        .map(|it| format!("{}: {}", it.to, it.reason))
        .collect();
    assert_eq!(reasons.len(), 2, "{reasons:?}");
    assert!(reasons[0].starts_with("192.0.2.5:8009: transport type 2"));
    assert!(reasons[1].starts_with("192.0.2.2:8009: "), "{reasons:?}");
    assert!(found.unfollowed.iter().all(|it| it.referrer == v4(1)));
}

#[tokio::test]
async fn referrals_without_end_have_one() {
    // Each refers to the next.
    let chain = |at: SocketAddr| {
        let SocketAddr::V4(v4) = at else {
            panic!("{at}")
        };
        let next = format!("192.0.2.{}", v4.ip().octets()[3] + 1);
        serving(move |_| Ok(page(1, &[referral(&next, "8009")])))
    };
    let mut fabric = Fabric::new([]);
    fabric.elsewhere = Some(Box::new(chain));
    let found = fabric.explore(v4(1)).await;
    assert_eq!(fabric.opened(), [1, 2, 3, 4, 5].map(v4));
    assert_eq!(found.unfollowed.len(), 1);
    assert!(
        found.unfollowed[0]
            .reason
            .contains("4 from one to the next")
    );

    // The first refers to many.
    let many = (2..200).map(|last| referral(&format!("192.0.2.{last}"), "8009"));
    let mut fabric = Fabric::new([(v4(1), many.collect())]);
    fabric.elsewhere = Some(Box::new(|_| serving(|_| Ok(page(1, &[])))));
    let found = fabric.explore(v4(1)).await;
    assert_eq!(found.logs.len(), 33);
    assert_eq!(found.unfollowed.len(), 198 - 32);
    assert!(found.unfollowed[0].reason.contains("32 referrals"));
}

#[tokio::test]
async fn silent_referrals_take_no_longer_together_than_a_few_attempts_to_connect() {
    let many = (2..30).map(|last| referral(&format!("192.0.2.{last}"), "8009"));
    let mut fabric = Fabric::new([(v4(1), many.collect())]);
    fabric.elsewhere = Some(Box::new(|at| {
        serving(|_| Ok(page(1, &[]))).broken_at(at, None)
    }));
    let started = Instant::now();
    let found = fabric.explore_within(SHORT * 4, v4(1)).await;
    assert_eq!((found.logs.len(), found.unfollowed.len()), (1, 28));
    assert!(started.elapsed() < SHORT * 4 * 5 + Duration::from_secs(1));
}
