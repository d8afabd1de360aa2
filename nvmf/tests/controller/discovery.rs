//! The discovery subsystem: its Connect, its commands, its log.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nvmf::controller::{Limits, Port, Subsystem, Target};
use nvmf::host::discovery::{Discovered, DiscoveredKind, DiscoveryLog, DiscoveryWatch, discover};
use nvmf::host::{HostOptions, LocalEnd, TargetAddress};
use nvmf::spec::discovery::{DiscoveryHeader, DiscoveryRecord, RECORD_LEN, eflags, subtype, treq};
use nvmf::spec::event::{AsyncEvent, config, notice};
use nvmf::spec::fabrics::{Connect, ConnectData, connect_offset, invalid_parameter};
use nvmf::spec::feature::fid;
use nvmf::spec::identify::{IDENTIFY_LEN, IdentifyController, cns};
use nvmf::spec::log::{GetLogPage, lid};
use nvmf::spec::nqn::DISCOVERY_NQN;
use nvmf::spec::opcode::{admin, nvm};
use nvmf::spec::{Nqn, Sqe, Status};
use nvmf::transport::{Registry, Transfer};
use tokio::time::timeout;
use uuid::Uuid;
use zerocopy::FromBytes;

use crate::rig::*;

fn discovery_data() -> ConnectData {
    ConnectData {
        subnqn: field(DISCOVERY_NQN),
        ..connect_data()
    }
}

/// An enabled discovery controller.
async fn associate(rig: &Rig, kato: u32) -> Queue {
    let mut queue = rig.dial(32).await;
    let connect = Connect {
        kato,
        ..admin_connect()
    };
    let cqe = queue.connect(connect, &discovery_data()).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    queue.enable().await;
    queue
}

fn part(offset: u64, len: u64) -> Sqe {
    let lid = lid::DISCOVERY;
    GetLogPage { lid, offset, len }.to_sqe()
}

async fn whole_log(queue: &mut Queue, len: usize) -> Vec<u8> {
    let (cqe, log) = queue.receive(part(0, len as u64), len).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    log
}

async fn ask(rig: &Rig, hostnqn: &str) -> DiscoveryLog {
    let options = HostOptions::new(Nqn::new(hostnqn).unwrap(), Uuid::from_bytes(HOSTID));
    let target = TargetAddress {
        host: rig.address.ip().to_string(),
        port: rig.address.port(),
        subnqn: Nqn::discovery(),
        local: LocalEnd::default(),
    };
    let registry = Registry::with_defaults();
    discover(&registry, &[target], &options).await.unwrap()
}

fn of_kind(log: &DiscoveryLog, kind: DiscoveredKind) -> Vec<&Discovered> {
    let records = log.records.iter();
    records.filter(|record| record.kind == kind).collect()
}

#[tokio::test]
async fn a_discovery_controller_says_what_it_is_and_has_no_io_queues() {
    let rig = Rig::start().await;
    let mut admin = associate(&rig, 0).await;
    let identify = Sqe::identify(cns::CONTROLLER, 0, 0);
    let (cqe, bytes) = admin.receive(identify, IDENTIFY_LEN).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    let (id, _) = IdentifyController::ref_from_prefix(&bytes).unwrap();
    assert_eq!(id.cntrltype, 2);
    assert_eq!(id.subnqn, field(DISCOVERY_NQN));
    assert_eq!((id.nn.get(), id.oncs.get(), id.vwc), (0, 0, 0));
    // Without these, Linux does not bring the controller up.
    assert!(id.maxcmd.get() > 0 && id.sgls.get() & 3 != 0);

    let mut io = rig.dial(32).await;
    let connect = Connect {
        qid: 1,
        ..admin_connect()
    };
    let data = ConnectData {
        cntlid: id.cntlid,
        ..discovery_data()
    };
    let cqe = io.connect(connect, &data).await;
    assert_eq!(
        cqe.status(),
        Status::CONNECT_INVALID_PARAMETERS.do_not_retry()
    );
    assert_eq!(cqe.dw0(), invalid_parameter(connect_offset::QID, false));
    rig.stop().await;
}

#[tokio::test]
async fn commands_that_are_not_for_discovery_are_refused_and_those_that_are_work() {
    let rig = Rig::start().await;
    let mut admin = associate(&rig, 0).await;
    let invalid = Status::INVALID_FIELD.do_not_retry();
    for structure in [
        cns::NAMESPACE,
        cns::ACTIVE_NAMESPACES,
        cns::NAMESPACE_DESCRIPTORS,
        cns::IO_CONTROLLER,
    ] {
        let identify = Sqe::identify(structure, 1, 0);
        let (cqe, _) = admin.receive(identify, IDENTIFY_LEN).await;
        assert_eq!(cqe.status(), invalid, "CNS {structure}");
    }
    for lid in [lid::ERROR, lid::HEALTH, lid::FIRMWARE, lid::EFFECTS, 0x71] {
        let (offset, len) = (0, 512);
        let get = GetLogPage { lid, offset, len }.to_sqe();
        let (cqe, _) = admin.receive(get, 512).await;
        assert_eq!(cqe.status(), invalid, "log {lid:#x}");
    }
    // Number of Queues.
    let cqe = admin.command(Sqe::set_features(7, 0)).await;
    assert_eq!(cqe.status(), invalid);
    let cqe = admin.command(Sqe::set_features(0x0f, 30_000)).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    let cqe = admin.command(Sqe::keep_alive()).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    let cqe = admin.command(Sqe::new(nvm::WRITE, 1)).await;
    assert_eq!(cqe.status(), Status::INVALID_OPCODE.do_not_retry());
    // Held, and so not answered before what comes after it.
    let event = Sqe::new(admin::ASYNC_EVENT_REQUEST, 0);
    admin.start(event, Transfer::None, 77);
    admin.start(Sqe::keep_alive(), Transfer::None, 78);
    assert_eq!(admin.finish().await.token, 78);
    rig.stop().await;
}

#[tokio::test]
async fn the_log_needs_an_enabled_controller() {
    let rig = Rig::start().await;
    let mut queue = rig.dial(32).await;
    queue.connect(admin_connect(), &discovery_data()).await;
    let (cqe, _) = queue.receive(part(0, 1024), 1024).await;
    assert_eq!(cqe.status(), Status::SEQUENCE_ERROR.do_not_retry());
    rig.stop().await;
}

#[tokio::test]
async fn a_host_that_keeps_alive_is_kept_and_one_that_does_not_goes() {
    let rig = Rig::start().await;
    let mut silent = associate(&rig, 1000).await;
    let mut alive = associate(&rig, 1000).await;
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let cqe = alive.command(Sqe::keep_alive()).await;
        assert_eq!(cqe.status(), Status::SUCCESS);
    }
    assert!(silent.closed(Duration::from_millis(1)).await);
    rig.stop().await;
}

#[tokio::test]
async fn a_host_without_a_keep_alive_does_not_stay_for_ever() {
    let limits = Limits {
        discovery_idle: Duration::from_millis(300),
        ..Limits::default()
    };
    let rig = Rig::with(subsystem([ram(1 << 20, 512)]), limits).await;
    let mut silent = associate(&rig, 0).await;
    let (mut io_controller, _) = rig.connect().await;
    io_controller.enable().await;
    assert!(silent.closed(PATIENCE).await);
    assert!(!io_controller.closed(Duration::from_millis(700)).await);
    rig.stop().await;
}

#[tokio::test]
async fn each_record_has_every_field() {
    let rig = Rig::start().await;
    let mut admin = associate(&rig, 0).await;
    let log = whole_log(&mut admin, 3 * RECORD_LEN).await;
    let header = DiscoveryHeader::read_from_bytes(&log[..RECORD_LEN]).unwrap();
    assert_eq!((header.numrec.get(), header.recfmt.get()), (2, 0));
    let port = rig.address.port().to_string();
    for (at, kind, nqn, flags) in [
        (1, subtype::NVM, SUBNQN, 0),
        (
            2,
            subtype::CURRENT,
            DISCOVERY_NQN,
            eflags::DUPRETINFO | eflags::EPCSD,
        ),
    ] {
        let bytes = &log[at * RECORD_LEN..][..RECORD_LEN];
        let record = DiscoveryRecord::read_from_bytes(bytes).unwrap();
        assert_eq!((record.trtype, record.adrfam, record.subtype), (3, 1, kind));
        assert_eq!(record.treq, treq::DISABLE_SQ_FLOW);
        assert_eq!((record.portid.get(), record.cntlid.get()), (1, 0xffff));
        assert_eq!((record.asqsz.get(), record.eflags.get()), (4096, flags));
        assert_eq!(record.subnqn, field(nqn));
        assert_eq!(record.traddr, padded::<256>("127.0.0.1"));
        assert_eq!(record.trsvcid, padded::<32>(&port));
        assert_eq!(record.tsas, [0; 256]);
    }
    rig.stop().await;
}

fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    field[..text.len()].copy_from_slice(text.as_bytes());
    field
}

#[tokio::test]
async fn the_log_is_read_in_parts_of_any_length() {
    let rig = Rig::start().await;
    let mut admin = associate(&rig, 0).await;
    let whole = whole_log(&mut admin, 3 * RECORD_LEN).await;
    for (offset, len, room) in [
        (0, 16, 16),
        (0, 4, 4),
        (8, 8, 8),
        (1024, 4096, 4096),
        (1028, 1000, 1000),
        (3068, 4096, 4096),
        (0, 65536, 65536),
    ] {
        let (cqe, bytes) = admin.receive(part(offset, len), room).await;
        assert_eq!(
            cqe.status(),
            Status::SUCCESS,
            "{len} bytes at {offset} into {room}"
        );
        let mut expected = whole[offset as usize..].to_vec();
        expected.resize(len as usize, 0);
        assert_eq!(
            &bytes[..len as usize],
            expected,
            "{len} bytes at {offset} into {room}"
        );
    }
    // More room than is asked for: the rest stays as it was, which our host does not take for success.
    let (_, bytes) = admin.receive(part(1024, 1024), 4096).await;
    assert_eq!(bytes[..1024], whole[1024..2048]);
    assert_eq!(bytes[1024..], [0xee; 3072]);
    for (offset, len, room) in [
        (3072, 4, 4),
        (u64::MAX - 3, 4, 4),
        (2, 4, 4),
        (0, 4096, 1024),
    ] {
        let (cqe, _) = admin.receive(part(offset, len), room).await;
        assert_eq!(
            cqe.status(),
            Status::INVALID_FIELD.do_not_retry(),
            "{len} bytes at {offset} into {room}"
        );
    }
    rig.stop().await;
}

#[tokio::test]
async fn a_host_that_may_not_connect_does_not_see_the_subsystem() {
    let mut closed = subsystem([ram(1 << 20, 512)]);
    closed.allow_host(Nqn::new(HOSTNQN).unwrap());
    let rig = Rig::with(closed, Limits::default()).await;
    let log = ask(&rig, HOSTNQN).await;
    let friend = of_kind(&log, DiscoveredKind::Nvm);
    assert_eq!(friend.len(), 1);
    let target = friend[0].target.as_ref().unwrap();
    assert_eq!(
        target.to_string(),
        format!("nvme+tcp://{}/{SUBNQN}", rig.address)
    );
    let log = ask(&rig, "nqn.2026-01.org.example:stranger").await;
    assert_eq!(of_kind(&log, DiscoveredKind::Nvm).len(), 0);
    assert_eq!(of_kind(&log, DiscoveredKind::Current).len(), 1);
    rig.stop().await;
}

#[tokio::test]
async fn the_generation_changes_with_the_listeners_and_wildcards_are_where_the_host_came() {
    let rig = Rig::start().await;
    let before = ask(&rig, HOSTNQN).await;
    let any = ["0.0.0.0:0".parse().unwrap(), "[::1]:0".parse().unwrap()];
    let port = Port::bind(Arc::clone(&rig.target), &any).await.unwrap();
    let added = port.local_addrs();
    let log = ask(&rig, HOSTNQN).await;
    assert_eq!(log.generation, before.generation + 2);
    // The IPv6 listener is not for a host that came over IPv4.
    let io = of_kind(&log, DiscoveredKind::Nvm);
    let at: Vec<_> = io
        .iter()
        .map(|record| {
            (
                record.portid,
                record.traddr.as_str(),
                record.trsvcid.as_str(),
            )
        })
        .collect();
    let (first, second) = (rig.address.port(), added[0].port());
    assert_eq!(
        at,
        [
            (1, "127.0.0.1", first.to_string().as_str()),
            (2, "127.0.0.1", second.to_string().as_str())
        ]
    );
    drop(port);
    let after = ask(&rig, HOSTNQN).await;
    assert_eq!(after.records, before.records);
    assert_eq!(after.generation, log.generation + 2);
    rig.stop().await;
}

#[tokio::test]
async fn a_host_that_stays_connected_is_told_of_every_change_until_it_has_read_the_log() {
    let rig = Rig::start().await;
    let mut queue = associate(&rig, 0).await;
    let id = queue.receive(Sqe::identify(cns::CONTROLLER, 0, 0), IDENTIFY_LEN);
    let (_, id) = id.await;
    let id = IdentifyController::read_from_bytes(&id).unwrap();
    assert_eq!(id.oaes.get(), config::DISCOVERY_CHANGE);
    let set = Sqe::set_features(fid::ASYNC_EVENT_CONFIG, config::DISCOVERY_CHANGE);
    assert_eq!(queue.command(set).await.status(), Status::SUCCESS);
    for token in 1..4 {
        queue.start(Sqe::async_event_request(), Transfer::None, token);
        let any = ["127.0.0.1:0".parse().unwrap()];
        let port = Port::bind(Arc::clone(&rig.target), &any).await.unwrap();
        let event = queue.finish().await;
        assert_eq!(event.token, token);
        let event = AsyncEvent::from_dw0(event.cqe.dw0());
        let info = notice::DISCOVERY_CHANGE;
        assert_eq!((event.info, event.page), (info, lid::DISCOVERY));
        // Neither of these changes is reported: the log was not read.
        queue.start(Sqe::async_event_request(), Transfer::None, 77);
        drop(port);
        queue.start(Sqe::keep_alive(), Transfer::None, 78);
        assert_eq!(queue.finish().await.token, 78);
        whole_log(&mut queue, RECORD_LEN).await;
        drop(Port::bind(Arc::clone(&rig.target), &any).await.unwrap());
        assert_eq!(queue.finish().await.token, 77);
        whole_log(&mut queue, RECORD_LEN).await;
    }
    rig.stop().await;
}

#[tokio::test]
async fn an_io_controller_has_no_notices_of_discovery() {
    let rig = Rig::start().await;
    let (mut admin, _) = rig.associate().await;
    let set = Sqe::set_features(fid::ASYNC_EVENT_CONFIG, config::DISCOVERY_CHANGE);
    let status = admin.command(set).await.status();
    assert_eq!(status, Status::INVALID_FIELD.do_not_retry());
    rig.stop().await;
}

#[tokio::test]
async fn our_watch_of_a_discovery_controller_hears_of_its_changes() {
    let rig = Rig::start().await;
    let registry = Registry::with_defaults();
    let options = HostOptions::new(Nqn::new(HOSTNQN).unwrap(), Uuid::from_bytes(HOSTID));
    let target = TargetAddress {
        host: rig.address.ip().to_string(),
        port: rig.address.port(),
        subnqn: Nqn::discovery(),
        local: LocalEnd::default(),
    };
    let targets = [target];
    let watching = DiscoveryWatch::connect(&registry, &targets, &options);
    let mut watch = watching.await.unwrap();
    for _ in 0..3 {
        let before = watch.explore(&registry).await.unwrap();
        let any = ["127.0.0.1:0".parse().unwrap()];
        let port = Port::bind(Arc::clone(&rig.target), &any).await.unwrap();
        timeout(PATIENCE, watch.changed())
            .await
            .expect("in time")
            .unwrap();
        let after = watch.explore(&registry).await.unwrap();
        assert_eq!(
            after.logs[0].records.len(),
            before.logs[0].records.len() + 2
        );
        drop(port);
        timeout(PATIENCE, watch.changed())
            .await
            .expect("in time")
            .unwrap();
    }
    watch.close(PATIENCE).await;
    rig.stop().await;
}

#[tokio::test]
async fn the_discovery_port_serves_discovery_alone_and_is_no_error_where_it_is_taken() {
    let target = Rig::target(subsystem([ram(1 << 20, 512)]), Limits::default());
    // An address of this process alone, so that its port 8009 is free.
    let pid = std::process::id().to_be_bytes();
    let ip = format!("127.{}.{}.77", pid[2].max(1), pid[3]);
    let first = format!("{ip}:0").parse().unwrap();
    let mut port = Port::bind(Arc::clone(&target), &[first]).await.unwrap();
    port.add_discovery().await;
    let discovery: SocketAddr = format!("{ip}:8009").parse().unwrap();
    assert_eq!(port.discovery_addrs(), [discovery]);
    assert_eq!(port.local_addrs().len(), 1);
    let mut other = Port::bind(Arc::clone(&target), &[first]).await.unwrap();
    other.add_discovery().await;
    assert_eq!(other.discovery_addrs(), []);
    drop(other);

    let io = port.local_addrs()[0].port();
    let mut rig = Rig::serve(target, port);
    rig.address = discovery;
    let log = ask(&rig, HOSTNQN).await;
    let found = |kind| -> Vec<String> {
        let records = of_kind(&log, kind);
        records.iter().map(|it| it.trsvcid.clone()).collect()
    };
    assert_eq!(found(DiscoveredKind::Nvm), [io.to_string()]);
    assert_eq!(
        found(DiscoveredKind::Current),
        [io.to_string(), "8009".to_owned()]
    );
    let mut queue = rig.dial(32).await;
    let cqe = queue.connect(admin_connect(), &connect_data()).await;
    assert_eq!(
        cqe.status(),
        Status::CONNECT_INVALID_PARAMETERS.do_not_retry()
    );
    assert_eq!(
        cqe.dw0(),
        invalid_parameter(connect_offset::DATA_SUBNQN, true)
    );
    rig.stop().await;
}

#[tokio::test]
async fn no_subsystem_can_be_named_as_discovery_is() {
    let subsystem = Subsystem::new(Nqn::discovery(), "1");
    let registry = Arc::new(Registry::with_defaults());
    let worker = Arc::new(Worker::start());
    let target = Target::new(vec![subsystem], Limits::default(), registry, worker);
    let error = target.err().unwrap();
    assert!(error.to_string().contains(DISCOVERY_NQN), "{error}");
}
