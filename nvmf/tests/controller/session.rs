//! The life of an association: enabling, reset, shutdown, keep-alive, loss, and the target's end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvmf::controller::Limits;
use nvmf::host::{Association, HostOptions, LocalEnd, NamespaceSelector, TargetAddress};
use nvmf::spec::property::{Cc, Csts};
use nvmf::spec::{Nqn, Sqe, Status};
use nvmf::transport::drive::Driven;
use nvmf::transport::{Registry, Transfer};
use uuid::Uuid;

use crate::rig::{HOSTNQN, PATIENCE, Queue, Rig, SUBNQN, pattern, ram, subsystem};

async fn with(limits: Limits) -> Rig {
    Rig::with(subsystem([ram(4 << 20, 512)]), limits).await
}

async fn settled(rig: &Rig, associations: usize) {
    let wait = async {
        while rig.target.associations() != associations {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, wait).await;
    waited.expect("associations");
}

#[tokio::test]
async fn shutdown_completes_ends_the_io_queues_and_allows_enabling_again() {
    let rig = Rig::start().await;
    let (mut admin, cntlid) = rig.associate().await;
    for shn in [Cc::SHN_NORMAL, Cc::SHN_ABRUPT] {
        let mut io = rig.io_queue(cntlid, 1, 32).await;
        assert_eq!(io.command(Sqe::flush(1)).await.status(), Status::SUCCESS);
        assert_eq!(admin.set_cc(Cc::enable(0).0 | shn).await, Status::SUCCESS);
        admin.until(Csts::shutdown_complete).await;
        assert!(!admin.csts().await.rdy());
        assert!(io.closed(PATIENCE).await);
        admin.enable().await;
        assert_eq!(admin.csts().await.0, Csts::RDY, "SHST reads 0 again");
        admin.command(Sqe::set_features(7, 0)).await;
    }
}

#[tokio::test]
async fn reset_ends_the_io_queues_before_ready_drops() {
    let rig = Rig::start().await;
    let (mut admin, cntlid) = rig.associate().await;
    let mut queues = Vec::new();
    for qid in 1..=4 {
        queues.push(rig.io_queue(cntlid, qid, 32).await);
    }
    admin.set_cc(Cc::enable(0).0 & !Cc::EN).await;
    admin.until(|csts| !csts.rdy()).await;
    for queue in &mut queues {
        assert!(queue.closed(PATIENCE).await);
    }
    let gone = admin.command(Sqe::keep_alive()).await;
    assert_eq!(gone.status(), Status::SEQUENCE_ERROR.do_not_retry());
    admin.enable().await;
    admin.command(Sqe::set_features(7, 0)).await;
    rig.io_queue(cntlid, 1, 32).await;
}

#[tokio::test]
async fn losing_the_admin_queue_ends_the_association_with_its_io_queues() {
    let rig = Rig::start().await;
    let (admin, cntlid) = rig.associate().await;
    let mut io = rig.io_queue(cntlid, 1, 32).await;
    let (mut other, _) = rig.associate().await;
    assert_eq!(rig.target.associations(), 2);
    drop(admin);
    assert!(io.closed(PATIENCE).await);
    settled(&rig, 1).await;
    let alive = other.command(Sqe::keep_alive()).await;
    assert_eq!(alive.status(), Status::SUCCESS, "the other one lives");
}

#[tokio::test]
async fn a_host_that_falls_silent_is_given_up_after_one_to_two_keep_alive_times() {
    let rig = Rig::start().await;
    // Rounded up to a second.
    let (mut admin, cntlid) = rig.connect_with(700).await;
    admin.enable().await;
    admin.command(Sqe::set_features(7, 0)).await;
    let mut io = rig.io_queue(cntlid, 1, 32).await;
    // Traffic of an I/O queue is a sign of life: three periods of it.
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(3) {
        assert_eq!(io.command(Sqe::flush(1)).await.status(), Status::SUCCESS);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let silence = Instant::now();
    assert!(admin.closed(PATIENCE).await);
    let after = silence.elapsed();
    let expected = Duration::from_millis(900)..Duration::from_millis(4000);
    assert!(expected.contains(&after), "{after:?}");
    assert!(io.closed(PATIENCE).await);
    settled(&rig, 0).await;
}

#[tokio::test]
async fn the_keep_alive_time_can_be_changed_and_turned_off() {
    let rig = Rig::start().await;
    let (mut admin, _) = rig.connect_with(1000).await;
    admin.enable().await;
    let off = admin.command(Sqe::set_features(0x0f, 0)).await;
    assert_eq!(off.status(), Status::SUCCESS);
    assert!(!admin.closed(Duration::from_millis(2500)).await);
    let on = admin.command(Sqe::set_features(0x0f, 1)).await;
    assert_eq!(on.status(), Status::SUCCESS);
    assert!(admin.closed(PATIENCE).await);
}

#[tokio::test]
async fn an_association_that_stays_disabled_is_ended() {
    let rig = with(Limits {
        disabled: Duration::from_millis(300),
        ..Limits::default()
    })
    .await;
    let (mut never, _) = rig.connect().await;
    assert!(never.closed(PATIENCE).await, "never enabled");
    let (mut admin, _) = rig.connect().await;
    admin.enable().await;
    assert!(!admin.closed(Duration::from_millis(600)).await, "enabled");
    admin.set_cc(Cc::enable(0).0 | Cc::SHN_NORMAL).await;
    admin.until(Csts::shutdown_complete).await;
    assert!(admin.closed(PATIENCE).await, "shut down and not enabled");
    settled(&rig, 0).await;
}

#[tokio::test]
async fn the_end_of_the_target_ends_everything_within_a_second() {
    let rig = Rig::start().await;
    let (mut admin, cntlid) = rig.associate().await;
    let mut io = rig.io_queue(cntlid, 1, 32).await;
    let mut idle = rig.dial(32).await;
    let begin = Instant::now();
    rig.stop().await;
    assert!(begin.elapsed() < Duration::from_secs(1));
    for queue in [&mut admin, &mut io, &mut idle] {
        assert!(queue.closed(PATIENCE).await);
    }
}

#[tokio::test]
async fn our_own_host_finds_the_namespace_and_moves_data() {
    let rig = Rig::start().await;
    let registry = Registry::with_defaults();
    let address = TargetAddress {
        host: rig.address.ip().to_string(),
        port: rig.address.port(),
        subnqn: Nqn::new(SUBNQN).unwrap(),
        local: LocalEnd::default(),
    };
    let mut options = HostOptions::new(Nqn::new(HOSTNQN).unwrap(), Uuid::from_u128(5));
    options.nr_io_queues = 3;
    let association = Association::connect(&registry, &address, &options)
        .await
        .unwrap();
    assert_eq!(association.io_queues_granted(), 3);
    let info = association.controller();
    assert_eq!(info.max_transfer, Some(1 << 20));
    assert_eq!(info.in_capsule_limit, 8192);
    assert!(info.supports_write_zeroes() && info.supports_deallocate());
    let namespace = association.select(&NamespaceSelector::Only).await.unwrap();
    assert_eq!((namespace.nsid, namespace.block_size), (1, 512));
    assert_eq!(namespace.block_count, 8192);
    assert_eq!(namespace.uuid, Some(Uuid::from_u128(0x1001)));
    let pairs = association.open_io_queues(&registry).await.unwrap();
    assert_eq!(pairs.len(), 3);
    for (index, pair) in pairs.into_iter().enumerate() {
        let mut queue = Queue(Driven::new(pair).unwrap());
        let data = pattern(index as u64, 128 << 10);
        let sqe = Sqe::write(1, 0, 256, false);
        assert_eq!(queue.send(sqe, &data).await.status(), Status::SUCCESS);
        let (cqe, got) = queue.receive(Sqe::read(1, 0, 256), data.len()).await;
        assert_eq!(cqe.status(), Status::SUCCESS);
        assert!(got == data);
    }
    let begin = Instant::now();
    association.shutdown(PATIENCE).await;
    assert!(begin.elapsed() < Duration::from_secs(2));
    settled(&rig, 0).await;
}

#[tokio::test]
async fn hosts_that_come_and_go_leave_nothing_behind() {
    let rig = Rig::start().await;
    let target = Arc::clone(&rig.target);
    for round in 0..20 {
        let (mut admin, cntlid) = rig.associate().await;
        let mut io = rig.io_queue(cntlid, 1, 32).await;
        for token in 0..8 {
            io.start(Sqe::flush(1), Transfer::None, token);
        }
        if round % 2 == 0 {
            io.finish().await;
            admin.set_cc(Cc::enable(0).0 | Cc::SHN_NORMAL).await;
        }
    }
    settled(&rig, 0).await;
    assert_eq!(target.associations(), 0);
    let (_admin, cntlid) = rig.associate().await;
    assert!(cntlid > 20, "numbers are not given out again at once");
}
