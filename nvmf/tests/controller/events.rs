//! What a controller reports of its own accord: namespaces that grow, access that changes. With a host
//! that says exactly what the test wants said, and with ours.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use memdesc::MemSink;
use nvmf::backend::FileBackend;
use nvmf::controller::{AnaState, Limits, Subsystem};
use nvmf::host::{
    Association, Changed, HostEvent, HostOptions, LocalEnd, NamespaceSelector, TargetAddress,
};
use nvmf::spec::event::{AsyncEvent, config, kind, notice};
use nvmf::spec::feature::fid;
use nvmf::spec::identify::cns;
use nvmf::spec::log::{GetLogPage, RETAIN_EVENT, lid};
use nvmf::spec::property::Cc;
use nvmf::spec::{Nqn, Sqe, Status};
use nvmf::transport::{Registry, Transfer};
use tempfile::NamedTempFile;
use tokio::sync::mpsc::Receiver;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::rig::{HOSTNQN, PATIENCE, Queue, Rig, SUBNQN, ram, subsystem};

const BLOCK: u64 = 512;
/// Long enough for what must not come.
const WHILE: Duration = Duration::from_millis(100);

/// A file of so many blocks.
fn image(blocks: u64) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&vec![7; (blocks * BLOCK) as usize]).unwrap();
    file
}

fn backend(file: &NamedTempFile) -> Arc<FileBackend> {
    Arc::new(FileBackend::open(file.path(), BLOCK as u32, false).unwrap())
}

/// NSID 1 is a file of 64 blocks, NSID 2 memory.
async fn with_file() -> (Rig, NamedTempFile) {
    let file = image(64);
    let rig = Rig::with(
        subsystem([backend(&file) as Arc<_>, ram(1 << 20, 512)]),
        Limits::default(),
    )
    .await;
    (rig, file)
}

fn grow(rig: &Rig, file: &NamedTempFile, blocks: u64) {
    file.as_file().set_len(blocks * BLOCK).unwrap();
    rig.target.subsystems()[0].grow();
}

async fn enable_events(queue: &mut Queue, events: u32) {
    let set = Sqe::set_features(fid::ASYNC_EVENT_CONFIG, events);
    assert_eq!(queue.command(set).await.status(), Status::SUCCESS);
}

fn log(lid: u8, len: u64) -> Sqe {
    GetLogPage {
        lid,
        offset: 0,
        len,
    }
    .to_sqe()
}

async fn blocks(queue: &mut Queue) -> u64 {
    let (cqe, id) = queue
        .receive(Sqe::identify(cns::NAMESPACE, 1, 0), 4096)
        .await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    u64::from_le_bytes(id[..8].try_into().unwrap())
}

const NAMESPACE_CHANGED: AsyncEvent = AsyncEvent {
    kind: kind::NOTICE,
    info: notice::NAMESPACE_ATTRIBUTE,
    page: lid::CHANGED_NAMESPACES,
};

#[tokio::test]
async fn growth_is_reported_once_and_told_in_the_list_until_that_is_read() {
    let (rig, file) = with_file().await;
    let (mut queue, _) = rig.associate().await;
    let (_, id) = queue
        .receive(Sqe::identify(cns::CONTROLLER, 0, 0), 4096)
        .await;
    let oaes = u32::from_le_bytes(id[92..96].try_into().unwrap());
    let offered = config::NAMESPACE_ATTRIBUTE | config::CROSS_CONTROLLER_RESET;
    assert_eq!(oaes, offered);
    enable_events(&mut queue, config::NAMESPACE_ATTRIBUTE).await;
    queue.start(Sqe::async_event_request(), Transfer::None, 77);
    assert_eq!(blocks(&mut queue).await, 64);
    grow(&rig, &file, 64);
    timeout(WHILE, queue.finish())
        .await
        .expect_err("nothing has grown");
    grow(&rig, &file, 128);
    let event = queue.finish().await;
    assert_eq!(event.token, 77);
    assert_eq!(AsyncEvent::from_dw0(event.cqe.dw0()), NAMESPACE_CHANGED);
    assert_eq!(blocks(&mut queue).await, 128);
    // The next growth is in the list, and not reported: it was not read yet.
    queue.start(Sqe::async_event_request(), Transfer::None, 78);
    grow(&rig, &file, 256);
    timeout(WHILE, queue.finish())
        .await
        .expect_err("the list was not read");
    let retained = Sqe {
        cdw10: log(lid::CHANGED_NAMESPACES, 4096).cdw10 | RETAIN_EVENT,
        ..log(lid::CHANGED_NAMESPACES, 4096)
    };
    for (sqe, first) in [
        (retained, 1),
        (log(lid::CHANGED_NAMESPACES, 4096), 1),
        (log(lid::CHANGED_NAMESPACES, 4096), 0),
    ] {
        let (cqe, list) = queue.receive(sqe, 4096).await;
        assert_eq!(cqe.status(), Status::SUCCESS);
        assert_eq!((list[0], &list[1..]), (first, &[0; 4095][..]));
    }
    grow(&rig, &file, 512);
    let event = queue.finish().await;
    assert_eq!(event.token, 78);
    assert_eq!(AsyncEvent::from_dw0(event.cqe.dw0()), NAMESPACE_CHANGED);
}

#[tokio::test]
async fn a_host_that_asks_late_is_told_and_one_that_does_not_want_it_is_not() {
    let (rig, file) = with_file().await;
    let (mut queue, _) = rig.associate().await;
    grow(&rig, &file, 128);
    queue.start(Sqe::async_event_request(), Transfer::None, 1);
    timeout(WHILE, queue.finish())
        .await
        .expect_err("nobody asked for notices");
    let set = Sqe::set_features(fid::ASYNC_EVENT_CONFIG, config::NAMESPACE_ATTRIBUTE);
    queue.start(set, Transfer::None, 2);
    let mut tokens = [queue.finish().await.token, queue.finish().await.token];
    tokens.sort_unstable();
    assert_eq!(tokens, [1, 2]);
}

#[tokio::test]
async fn a_reset_forgets_what_was_to_be_reported() {
    let (rig, file) = with_file().await;
    let (mut queue, _) = rig.associate().await;
    enable_events(&mut queue, config::NAMESPACE_ATTRIBUTE).await;
    grow(&rig, &file, 128);
    queue.set_cc(Cc::enable(0).0 & !Cc::EN).await;
    queue.until(|csts| !csts.rdy()).await;
    queue.enable().await;
    enable_events(&mut queue, config::NAMESPACE_ATTRIBUTE).await;
    queue.start(Sqe::async_event_request(), Transfer::None, 1);
    timeout(WHILE, queue.finish())
        .await
        .expect_err("Identify tells it");
    let (_, list) = queue
        .receive(log(lid::CHANGED_NAMESPACES, 4096), 4096)
        .await;
    assert_eq!(list, [0; 4096]);
}

#[tokio::test]
async fn blocks_that_came_can_be_used_and_those_that_went_fail() {
    let (rig, file) = with_file().await;
    let (_admin, cntlid) = rig.associate().await;
    let mut queue = rig.io_queue(cntlid, 1, 8).await;
    let last = Sqe::write(1, 127, 1, false);
    let beyond = queue.send(last, &[1; 512]).await;
    assert_eq!(beyond.status(), Status::LBA_OUT_OF_RANGE.do_not_retry());
    grow(&rig, &file, 128);
    assert_eq!(queue.send(last, &[1; 512]).await.status(), Status::SUCCESS);
    let (cqe, read) = queue.receive(Sqe::read(1, 127, 1), 512).await;
    assert_eq!((cqe.status(), read), (Status::SUCCESS, vec![1; 512]));
    // A file that shrinks is no reason to shrink the namespace, and none to fall over.
    grow(&rig, &file, 32);
    assert_eq!(rig.backend(1).geometry().block_count, 128);
    let sink = MemSink::from_bytes(vec![0; 512]);
    queue.submit(Sqe::read(1, 100, 1), Transfer::In(sink)).await;
    let (cqe, _) = queue.receive(Sqe::read(1, 0, 1), 512).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
}

async fn host(rig: &Rig) -> (Association, Receiver<HostEvent>) {
    let target = TargetAddress {
        host: rig.address.ip().to_string(),
        port: rig.address.port(),
        subnqn: Nqn::new(SUBNQN).unwrap(),
        local: LocalEnd::default(),
    };
    let options = HostOptions::new(Nqn::new(HOSTNQN).unwrap(), Uuid::from_u128(5));
    let registry = Registry::with_defaults();
    let connecting = Association::connect(&registry, &target, &options);
    let mut association = connecting.await.unwrap();
    let events = association.events();
    (association, events)
}

async fn next(events: &mut Receiver<HostEvent>) -> HostEvent {
    let event = timeout(PATIENCE, events.recv()).await.expect("in time");
    event.expect("the channel is open")
}

#[tokio::test]
async fn our_host_learns_of_growth_time_and_again() {
    let (rig, file) = with_file().await;
    let (association, mut events) = host(&rig).await;
    let (_other, mut others) = host(&rig).await;
    let namespace = association.select(&NamespaceSelector::Nsid(1)).await;
    assert_eq!(namespace.unwrap().block_count, 64);
    for more in 1..20 {
        let blocks = 64 + more * 8;
        grow(&rig, &file, blocks);
        let changed = HostEvent::NamespacesChanged(Changed::Namespaces(vec![1]));
        assert_eq!(next(&mut events).await, changed);
        assert_eq!(next(&mut others).await, changed, "every host is told");
        let namespace = association.reidentify(1).await.unwrap().unwrap();
        assert_eq!(namespace.block_count, blocks);
    }
    association.shutdown(PATIENCE).await;
    assert_eq!(events.recv().await, None);
    rig.stop().await;
}

/// NSIDs 1 and 2 in group 1, NSID 3 in group 2.
async fn with_groups() -> Rig {
    let mut subsystem: Subsystem = subsystem([(); 3].map(|()| ram(1 << 20, 512)));
    assert!(!subsystem.set_ana_group(3, 2), "nothing is reported yet");
    subsystem.report_ana();
    assert!(subsystem.set_ana_group(3, 2));
    assert!(!subsystem.set_ana_group(9, 2) && !subsystem.set_ana_group(3, 17));
    Rig::with(subsystem, Limits::default()).await
}

#[tokio::test]
async fn our_host_reads_the_states_of_groups_and_learns_of_their_changes() {
    let rig = with_groups().await;
    let (association, mut events) = host(&rig).await;
    let subsystem = &rig.target.subsystems()[0];
    let info = association.controller().ana.unwrap();
    assert_eq!((info.max_group, info.groups), (16, 16));
    let third = association.reidentify(3).await.unwrap().unwrap();
    assert_eq!(third.anagrpid, 2);
    let log = association.ana_log().await.unwrap();
    assert_eq!(
        log.groups.len(),
        2,
        "groups without namespaces are not told"
    );
    assert_eq!(log.state_of(3, 2), Some(AnaState::Optimized));
    let before = log.change_count;
    for (state, changes) in AnaState::ALL.into_iter().skip(1).zip(1..) {
        subsystem.set_ana_state(2, state);
        assert_eq!(next(&mut events).await, HostEvent::AnaChanged);
        let log = association.ana_log().await.unwrap();
        assert_eq!(log.change_count, before + changes);
        assert_eq!(log.state_of(3, 2), Some(state));
        assert_eq!(log.state_of(2, 1), Some(AnaState::Optimized));
        assert_eq!(log.namespaces.get(&2), Some(&1));
    }
    // What changes nothing is not reported; nor is what nobody has.
    subsystem.set_ana_state(2, AnaState::Change);
    subsystem.set_ana_state(0, AnaState::Change);
    subsystem.set_ana_state(17, AnaState::Change);
    timeout(WHILE, events.recv()).await.expect_err("no event");
}

#[tokio::test]
async fn commands_for_a_group_that_cannot_be_reached_get_the_path_related_status_of_its_state() {
    let rig = with_groups().await;
    let (_admin, cntlid) = rig.associate().await;
    let mut queue = rig.io_queue(cntlid, 1, 8).await;
    for (state, expected) in [
        (AnaState::NonOptimized, Status::SUCCESS),
        (AnaState::Inaccessible, Status::ANA_INACCESSIBLE),
        (AnaState::PersistentLoss, Status::ANA_PERSISTENT_LOSS),
        (AnaState::Change, Status::ANA_TRANSITION),
        (AnaState::Optimized, Status::SUCCESS),
    ] {
        rig.target.subsystems()[0].set_ana_state(2, state);
        let write = queue.send(Sqe::write(3, 0, 1, false), &[1; 512]).await;
        assert_eq!(write.status(), expected, "{state}");
        assert!(!write.status().dnr(), "a host may retry");
        assert_eq!(queue.command(Sqe::flush(3)).await.status(), expected);
        let (read, _) = queue.receive(Sqe::read(3, 0, 1), 512).await;
        assert_eq!(read.status(), expected);
        let (other, _) = queue.receive(Sqe::read(1, 0, 1), 512).await;
        assert_eq!(other.status(), Status::SUCCESS, "of another group");
    }
}

#[tokio::test]
async fn without_access_states_there_is_nothing_of_them() {
    let rig = Rig::start().await;
    let (association, mut events) = host(&rig).await;
    assert_eq!(association.controller().ana, None);
    let namespace = association.reidentify(1).await.unwrap().unwrap();
    assert_eq!(namespace.anagrpid, 0);
    rig.target.subsystems()[0].set_ana_state(1, AnaState::Inaccessible);
    sleep(WHILE).await;
    assert!(events.try_recv().is_err());
}
