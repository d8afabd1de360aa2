//! A discovery controller that stays connected: it tells of changes, and is missed when it is gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, timeout};

use super::discovery::{page, record, serving};
use super::*;
use crate::host::discovery::DiscoveryWatch;
use crate::spec::Cqe;
use crate::spec::event::{AsyncEvent, config, kind, notice};
use crate::spec::log::lid;
use crate::transport::Ending;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(10);
/// Shorter than the pause before the second look.
const QUICK: Duration = Duration::from_millis(700);

/// A controller that has as many records as are told, and reports changes.
fn growing() -> (Scripted, Arc<AtomicU64>) {
    let records = Arc::new(AtomicU64::new(1));
    let count = Arc::clone(&records);
    let controller = serving(move |_| {
        let count = count.load(Ordering::Relaxed);
        let record = |nth: u64| {
            let mut record = record();
            record.portid = (nth as u16).into();
            record.traddr[8] = b'1' + nth as u8;
            record
        };
        Ok(page(count, &(0..count).map(record).collect::<Vec<_>>()))
    });
    let controller = controller.with(|model| model.identity.oaes = config::DISCOVERY_CHANGE.into());
    (controller, records)
}

async fn watch(controller: &Scripted) -> DiscoveryWatch {
    let options = HostOptions {
        keep_alive_tmo: Duration::from_secs(30),
        ..options()
    };
    let end = Instant::now() + Duration::from_secs(5);
    let addresses = [(at(), Nqn::discovery())];
    let watch = DiscoveryWatch::connect_over(controller, &addresses, &options, end);
    watch.await.unwrap()
}

async fn told(watch: &DiscoveryWatch, controller: &Scripted) -> usize {
    let found = watch.explore_over(controller).await.unwrap();
    found.records().count()
}

fn change(controller: &Scripted) {
    let event = AsyncEvent {
        kind: kind::NOTICE,
        info: notice::DISCOVERY_CHANGE,
        page: lid::DISCOVERY,
    };
    controller.complete_held(Cqe::with_result(0, event.to_dw0().into()));
}

#[tokio::test]
async fn each_change_is_told_and_the_log_read_over_the_same_connection() {
    let (controller, records) = growing();
    let mut watch = watch(&controller).await;
    assert_eq!(told(&watch, &controller).await, 1);
    for count in 2..5 {
        records.store(count, Ordering::Relaxed);
        change(&controller);
        timeout(QUICK, watch.changed())
            .await
            .expect("in time")
            .unwrap();
        assert_eq!(told(&watch, &controller).await as u64, count);
    }
    let connects = controller.look(|model| model.connects.clone());
    assert_eq!(connects.len(), 1);
    assert_eq!(connects[0].0.kato, 30_000);
    assert_eq!(watch.address(), at());
    watch.close(Duration::from_secs(1)).await;
}

#[tokio::test]
async fn what_changed_before_changes_were_asked_for_is_seen_soon() {
    let (controller, records) = growing();
    let mut watch = watch(&controller).await;
    assert_eq!(told(&watch, &controller).await, 1);
    records.store(2, Ordering::Relaxed);
    timeout(LONG, watch.changed())
        .await
        .expect("in time")
        .unwrap();
    assert_eq!(told(&watch, &controller).await, 2);
    // And then there is quiet, for as long as nothing is told.
    assert!(
        timeout(Duration::from_secs(3), watch.changed())
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_loss_is_told_whether_or_not_changes_are() {
    for tells in [true, false] {
        let (controller, _) = growing();
        if !tells {
            controller.look(|model| model.identity.oaes = 0.into());
        }
        let mut watch = watch(&controller).await;
        controller.end(Ending::Closed);
        let lost = timeout(LONG, watch.changed()).await.expect("in time");
        assert!(matches!(lost, Err(HostError::Lost { .. })), "{lost:?}");
    }
}

#[tokio::test]
async fn one_that_is_dropped_closes_its_connection() {
    let (controller, _) = growing();
    let watch = watch(&controller).await;
    assert_eq!(controller.alive(), 1);
    drop(watch);
    let closed = async {
        while controller.alive() != 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(LONG, closed).await.expect("in time");
}
