//! Admin commands: Identify, features, log pages, and what is answered to the rest.

use std::sync::Arc;

use memdesc::MemSink;
use nvmf::backend::{Backend, RamBackend};
use nvmf::controller::Limits;
use nvmf::spec::feature::fid;
use nvmf::spec::identify::{IDENTIFY_LEN, IdentifyController, IdentifyNamespace, cns, oncs};
use nvmf::spec::opcode::{admin, fabrics};
use nvmf::spec::property::Cc;
use nvmf::spec::{Cqe, NSID_ALL, Sqe, Status};
use nvmf::transport::Transfer;
use zerocopy::FromBytes;

use crate::rig::{HOSTID, PATIENCE, Queue, Rig, SUBNQN, field, ram, subsystem};

async fn enabled() -> (Rig, Queue) {
    let rig = Rig::start().await;
    let (mut queue, _) = rig.connect().await;
    queue.enable().await;
    (rig, queue)
}

async fn identify(queue: &mut Queue, cns: u8, nsid: u32) -> (Status, Vec<u8>) {
    let sqe = Sqe::identify(cns, nsid, 0);
    let (cqe, data) = queue.receive(sqe, IDENTIFY_LEN).await;
    (cqe.status(), data)
}

fn refused(status: Status) -> Status {
    status.do_not_retry()
}

#[tokio::test]
async fn before_it_is_enabled_only_fabrics_commands_are_served() {
    let rig = Rig::start().await;
    let (mut queue, _) = rig.connect().await;
    let sequence = refused(Status::SEQUENCE_ERROR);
    assert_eq!(queue.command(Sqe::keep_alive()).await.status(), sequence);
    let (status, _) = identify(&mut queue, cns::CONTROLLER, 0).await;
    assert_eq!(status, sequence);
    assert!(!queue.csts().await.rdy());
    queue.enable().await;
    let alive = queue.command(Sqe::keep_alive()).await;
    assert_eq!(alive.status(), Status::SUCCESS);
}

#[tokio::test]
async fn identify_controller_says_what_is_true() {
    let limits = Limits {
        queue_size: 256,
        max_transfer: 256 << 10,
        in_capsule: 16384,
        async_events: 4,
        ..Limits::default()
    };
    let rig = Rig::with(subsystem([ram(1 << 20, 512)]), limits).await;
    let (mut queue, cntlid) = rig.connect().await;
    assert_eq!(queue.cap().await.max_queue_entries(), 256);
    queue.enable().await;
    let (status, data) = identify(&mut queue, cns::CONTROLLER, 0).await;
    assert_eq!(status, Status::SUCCESS);
    let id = IdentifyController::read_from_bytes(&data).unwrap();
    assert_eq!(&id.sn, b"SN0001              ");
    assert_eq!(id.cntlid.get(), cntlid);
    assert_eq!(id.ver.get(), 0x0001_0400);
    assert_eq!(id.cntrltype, 1);
    assert_eq!(4096 << id.mdts, 256 << 10);
    assert_eq!(id.ioccsz.get() * 16, 64 + 16384);
    assert_eq!(id.iorcsz.get() * 16, 16);
    assert_eq!((id.icdoff.get(), id.fcatt), (0, 0));
    assert_eq!((id.sqes, id.cqes), (0x66, 0x44));
    assert_eq!(id.maxcmd.get(), 256);
    assert_eq!(id.aerl, 3);
    assert_eq!(id.oacs.get(), 0);
    let written = oncs::COMPARE | oncs::DATASET_MANAGEMENT | oncs::WRITE_ZEROES;
    assert_eq!(id.oncs.get(), written);
    assert_eq!(id.vwc & 1, 0, "memory has no volatile cache in front of it");
    assert_eq!(id.kas.get(), 10);
    assert_eq!(id.ctratt.get() & 0x41, 0x41, "128-bit host ID, TBKAS");
    assert_ne!(
        id.sgls.get() & 3,
        0,
        "hosts refuse a controller without SGLs"
    );
    assert_ne!(id.cmic & 2, 0, "several hosts may use it");
    assert_eq!(id.subnqn, field(SUBNQN));
    assert!(id.nn.get() >= 1);
}

#[tokio::test]
async fn identify_namespace_says_what_is_true_and_nothing_of_one_that_is_not_there() {
    let read_only = RamBackend::new(1 << 20, 4096).unwrap().read_only();
    let backends: [Arc<dyn Backend>; 2] = [ram(4 << 20, 512), Arc::new(read_only)];
    let rig = Rig::with(subsystem(backends), Limits::default()).await;
    let (mut queue, _) = rig.connect().await;
    queue.enable().await;
    for (nsid, blocks, lbads, protected) in [(1, 8192, 9, 0), (2, 256, 12, 1)] {
        let (status, data) = identify(&mut queue, cns::NAMESPACE, nsid).await;
        assert_eq!(status, Status::SUCCESS);
        let id = IdentifyNamespace::read_from_bytes(&data).unwrap();
        let sizes = (id.nsze.get(), id.ncap.get(), id.nuse.get());
        assert_eq!(sizes, (blocks, blocks, blocks));
        let format = id.format().unwrap();
        assert_eq!((format.lbads, format.ms.get(), id.nlbaf), (lbads, 0, 0));
        assert_eq!(id.nsattr & 1, protected);
        assert_eq!(id.dlfeat & 7, 1, "deallocated blocks read as zeroes");
        assert_eq!(id.nmic & 1, 1);
        let uuid = 0x1000 + u128::from(nsid);
        assert_eq!(id.nguid, uuid.to_be_bytes());
    }
    let (status, data) = identify(&mut queue, cns::NAMESPACE, 3).await;
    assert_eq!((status, data), (Status::SUCCESS, vec![0; IDENTIFY_LEN]));
    for nsid in [0, NSID_ALL] {
        let (status, _) = identify(&mut queue, cns::NAMESPACE, nsid).await;
        assert_eq!(status, refused(Status::INVALID_NAMESPACE));
    }
}

#[tokio::test]
async fn the_lists_of_identify_are_in_order_and_filled_with_zeroes() {
    let rig = Rig::with(
        subsystem([ram(1 << 20, 512), ram(1 << 20, 512), ram(1 << 20, 512)]),
        Limits::default(),
    )
    .await;
    let (mut queue, _) = rig.connect().await;
    queue.enable().await;
    for (after, expected) in [(0, vec![1u32, 2, 3]), (2, vec![3]), (3, vec![])] {
        let (status, data) = identify(&mut queue, cns::ACTIVE_NAMESPACES, after).await;
        assert_eq!(status, Status::SUCCESS);
        let mut list: Vec<u8> = expected.iter().flat_map(|it| it.to_le_bytes()).collect();
        list.resize(IDENTIFY_LEN, 0);
        assert_eq!(data, list);
    }
    for after in [NSID_ALL - 1, NSID_ALL] {
        let (status, _) = identify(&mut queue, cns::ACTIVE_NAMESPACES, after).await;
        assert_eq!(status, refused(Status::INVALID_FIELD));
    }
    let (status, data) = identify(&mut queue, cns::NAMESPACE_DESCRIPTORS, 2).await;
    assert_eq!(status, Status::SUCCESS);
    let id = 0x1002u128.to_be_bytes();
    assert_eq!(data[..4], [2, 16, 0, 0]);
    assert_eq!(data[4..20], id);
    assert_eq!(data[20..24], [3, 16, 0, 0]);
    assert_eq!(data[24..40], id);
    assert_eq!(data[40..45], [4, 1, 0, 0, 0]);
    assert!(data[45..].iter().all(|&b| b == 0));
    let (status, _) = identify(&mut queue, cns::NAMESPACE_DESCRIPTORS, 9).await;
    assert_eq!(status, refused(Status::INVALID_FIELD));
}

#[tokio::test]
async fn what_newer_hosts_ask_is_answered_and_what_nobody_should_ask_is_not() {
    let (_rig, mut queue) = enabled().await;
    for (cns, nsid) in [
        (cns::IO_NAMESPACE, 1),
        (cns::IO_CONTROLLER, 0),
        (cns::INDEPENDENT_NAMESPACE, 1),
    ] {
        let (status, _) = identify(&mut queue, cns, nsid).await;
        assert_eq!(status, Status::SUCCESS, "CNS {cns:#x}");
    }
    let (_, data) = identify(&mut queue, cns::INDEPENDENT_NAMESPACE, 1).await;
    assert_eq!(data[14] & 1, 1, "ready");
    let mut zoned = Sqe::identify(cns::IO_CONTROLLER, 0, 0);
    zoned.cdw11 = (2 << 24).into();
    let (cqe, _) = queue.receive(zoned, IDENTIFY_LEN).await;
    assert_eq!(cqe.status(), refused(Status::INVALID_FIELD));
    let (status, _) = identify(&mut queue, 0x14, 1).await;
    assert_eq!(status, refused(Status::INVALID_FIELD));
    for len in [4092, 8192] {
        let sqe = Sqe::identify(cns::CONTROLLER, 0, 0);
        let (cqe, _) = queue.receive(sqe, len).await;
        let wrong = refused(Status::DATA_SGL_LENGTH_INVALID);
        assert_eq!(cqe.status(), wrong, "{len}");
    }
}

#[tokio::test]
async fn the_number_of_queues_is_capped_and_set_once_between_resets() {
    let limits = Limits {
        io_queues: 6,
        ..Limits::default()
    };
    let rig = Rig::with(subsystem([ram(1 << 20, 512)]), limits).await;
    let (mut queue, _) = rig.connect().await;
    queue.enable().await;
    let set = fid::NUMBER_OF_QUEUES;
    for value in [0xffff, 0x0001_0002, 0xffff_ffff] {
        let cqe = queue.command(Sqe::set_features(set, value)).await;
        assert_eq!(cqe.status(), refused(Status::INVALID_FIELD), "{value:#x}");
    }
    let get = Sqe {
        opcode: admin::GET_FEATURES,
        ..Sqe::set_features(set, 0)
    };
    let unset = queue.command(get).await.status();
    assert_eq!(unset, refused(Status::SEQUENCE_ERROR));
    let cqe = queue.command(Sqe::set_features(set, 0xfffe_fffe)).await;
    assert_eq!((cqe.status(), cqe.dw0()), (Status::SUCCESS, 0x0005_0005));
    assert_eq!(queue.command(get).await.dw0(), 0x0005_0005);
    let again = queue.command(Sqe::set_features(set, 0)).await;
    assert_eq!(again.status(), refused(Status::SEQUENCE_ERROR));
    queue.set_cc(Cc::enable(0).0 & !Cc::EN).await;
    queue.until(|csts| !csts.rdy()).await;
    queue.enable().await;
    let cqe = queue.command(Sqe::set_features(set, 0)).await;
    assert_eq!((cqe.status(), cqe.dw0()), (Status::SUCCESS, 0));
}

#[tokio::test]
async fn the_other_features_are_kept_or_refused() {
    let (_rig, mut queue) = enabled().await;
    let get = |fid| Sqe {
        opcode: admin::GET_FEATURES,
        ..Sqe::set_features(fid, 0)
    };
    for (fid, value) in [
        (fid::ASYNC_EVENT_CONFIG, 0x0000_0100),
        (fid::KEEP_ALIVE_TIMER, 60_000),
        (fid::ARBITRATION, 0x0203_0407),
        (fid::POWER_MANAGEMENT, 0),
        (fid::TEMPERATURE_THRESHOLD, 0x0157),
        (fid::ERROR_RECOVERY, 70),
        (fid::WRITE_ATOMICITY, 1),
    ] {
        let cqe = queue.command(Sqe::set_features(fid, value)).await;
        assert_eq!(cqe.status(), Status::SUCCESS);
        assert_eq!(queue.command(get(fid)).await.dw0(), value);
    }
    let reserved = Sqe::set_features(fid::ASYNC_EVENT_CONFIG, 1 << 14);
    let status = queue.command(reserved).await.status();
    assert_eq!(status, refused(Status::INVALID_FIELD));
    // Memory has no write cache to turn on.
    let cache = fid::VOLATILE_WRITE_CACHE;
    assert_eq!(queue.command(get(cache)).await.dw0(), 0);
    let same = queue.command(Sqe::set_features(cache, 0)).await;
    assert_eq!(same.status(), Status::SUCCESS);
    let other = queue.command(Sqe::set_features(cache, 1)).await;
    assert_eq!(other.status(), refused(Status::FEATURE_NOT_CHANGEABLE));
    let (cqe, id) = queue.receive(get(fid::HOST_ID), 16).await;
    assert_eq!((cqe.status(), id), (Status::SUCCESS, HOSTID.to_vec()));
    for sqe in [
        Sqe::set_features(fid::HOST_ID, 0),
        Sqe::set_features(fid::POWER_MANAGEMENT, 1),
        Sqe::set_features(fid::TEMPERATURE_THRESHOLD, 1 << 16),
        Sqe::set_features(fid::ERROR_RECOVERY, 1 << 16),
        get(fid::HOST_BEHAVIOR),
    ] {
        let status = queue.command(sqe).await.status();
        assert_eq!(status, refused(Status::INVALID_FIELD));
    }
    let mut saved = Sqe::set_features(fid::ASYNC_EVENT_CONFIG, 0);
    saved.cdw10 = (saved.cdw10.get() | 1 << 31).into();
    let status = queue.command(saved).await.status();
    assert_eq!(status, refused(Status::new(1, 0x0d)), "not saveable");
}

#[tokio::test]
async fn a_reset_forgets_what_was_set_and_keeps_the_keep_alive_time() {
    let rig = Rig::start().await;
    let (mut queue, _) = rig.connect_with(60_000).await;
    queue.enable().await;
    let get = |fid, value| Sqe {
        opcode: admin::GET_FEATURES,
        ..Sqe::set_features(fid, value)
    };
    let lower = 1 << 20;
    for (fid, value) in [
        (fid::ARBITRATION, 7),
        (fid::TEMPERATURE_THRESHOLD, 300),
        (fid::TEMPERATURE_THRESHOLD, lower | 273),
    ] {
        let cqe = queue.command(Sqe::set_features(fid, value)).await;
        assert_eq!(cqe.status(), Status::SUCCESS);
    }
    let low = queue.command(get(fid::TEMPERATURE_THRESHOLD, lower)).await;
    assert_eq!(low.dw0(), 273);
    queue.set_cc(Cc::enable(0).0 & !Cc::EN).await;
    queue.until(|csts| !csts.rdy()).await;
    queue.enable().await;
    for (fid, which, value) in [
        (fid::ARBITRATION, 0, 0),
        (fid::TEMPERATURE_THRESHOLD, 0, 0xffff),
        (fid::TEMPERATURE_THRESHOLD, lower, 0),
        (fid::KEEP_ALIVE_TIMER, 0, 60_000),
    ] {
        let cqe = queue.command(get(fid, which)).await;
        assert_eq!((cqe.status(), cqe.dw0()), (Status::SUCCESS, value));
    }
}

fn get_log(lid: u8, offset: u64, len: u32) -> Sqe {
    let numd = len / 4 - 1;
    let mut sqe = Sqe::new(admin::GET_LOG_PAGE, NSID_ALL);
    sqe.cdw10 = (u32::from(lid) | numd << 16).into();
    sqe.cdw11 = (numd >> 16).into();
    sqe.cdw12 = (offset as u32).into();
    sqe.cdw13 = ((offset >> 32) as u32).into();
    sqe
}

#[tokio::test]
async fn a_part_of_a_log_page_is_what_it_is_in_the_whole() {
    let (_rig, mut queue) = enabled().await;
    let (cqe, whole) = queue.receive(get_log(2, 0, 512), 512).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    assert_eq!(whole[3], 100, "available spare");
    for (offset, len) in [(0, 256), (128, 256), (508, 4)] {
        let (cqe, part) = queue.receive(get_log(2, offset, len), len as usize).await;
        assert_eq!(cqe.status(), Status::SUCCESS);
        let at = offset as usize;
        assert_eq!(part, whole[at..at + len as usize]);
    }
    // Longer than the page: zeroes follow. Longer than asked for: the rest stays as it was.
    let (cqe, long) = queue.receive(get_log(2, 0, 576), 576).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    assert!(long[..512] == whole && long[512..].iter().all(|&b| b == 0));
    // (Our host reports that as incomplete; what counts here is what came.)
    let sink = MemSink::from_bytes(vec![0xee; 512]);
    let more = queue.submit(get_log(2, 0, 64), Transfer::In(sink)).await;
    assert_eq!(more.transferred, 64);
    let Transfer::In(sink) = more.transfer else {
        panic!("the sink did not come back");
    };
    let more = sink.into_parts().1.unwrap();
    assert!(more[..64] == whole[..64] && more[64..].iter().all(|&b| b == 0xee));
}

#[tokio::test]
async fn a_log_page_is_refused_where_it_does_not_exist_before_anything_is_allocated() {
    let (_rig, mut queue) = enabled().await;
    let invalid = refused(Status::INVALID_FIELD);
    for (what, sqe, len) in [
        ("offset 1", get_log(2, 1, 16), 16),
        ("offset 2", get_log(2, 2, 16), 16),
        ("offset 3", get_log(2, 3, 16), 16),
        ("offset at the end", get_log(2, 512, 16), 16),
        ("offset far away", get_log(2, u64::MAX - 3, 16), 16),
        ("more than the data describes", get_log(2, 0, 512), 256),
        ("16 GiB", get_log(2, 0, u32::MAX - 3), 4096),
        (
            "access states, which are not reported",
            get_log(0xc, 0, 4096),
            4096,
        ),
        ("discovery", get_log(0x70, 0, 1024), 1024),
    ] {
        let (cqe, _) = queue.receive(sqe, len).await;
        assert_eq!(cqe.status(), invalid, "{what}");
    }
    let most = Sqe {
        cdw10: 0xffff_0002.into(),
        cdw11: 0xffff.into(),
        ..get_log(2, 0, 4)
    };
    let (cqe, _) = queue.receive(most, 4096).await;
    assert_eq!(cqe.status(), invalid, "the largest NUMD");
}

#[tokio::test]
async fn the_log_pages_that_exist_have_their_shape() {
    let (_rig, mut queue) = enabled().await;
    let (cqe, error) = queue.receive(get_log(1, 4096, 128), 128).await;
    assert_eq!((cqe.status(), error), (Status::SUCCESS, vec![0; 128]));
    let (cqe, slots) = queue.receive(get_log(3, 0, 512), 512).await;
    assert_eq!((cqe.status(), slots[0]), (Status::SUCCESS, 1));
    let version = format!("{:8}", env!("CARGO_PKG_VERSION"));
    assert_eq!(&slots[8..16], version.as_bytes());
    let (cqe, effects) = queue.receive(get_log(5, 0, 4096), 4096).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    let entry = |at: usize| effects[at];
    assert_eq!(entry(usize::from(admin::IDENTIFY) * 4), 1);
    assert_eq!(entry(1024 + 4), 3, "a write changes blocks");
    assert_eq!(entry(1024 + 5 * 4), 1, "a Compare does not");
    assert_eq!(entry(1024 + 4 * 4), 0, "there is no Write Uncorrectable");
    let (cqe, pages) = queue.receive(get_log(0, 0, 1024), 1024).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    for lid in 0..=255 {
        let (cqe, _) = queue.receive(get_log(lid, 0, 512), 512).await;
        let exists = cqe.status() == Status::SUCCESS;
        let at = usize::from(lid) * 4;
        let said = [u8::from(exists), 0, 0, 0];
        assert_eq!(pages[at..at + 4], said, "page {lid:#x}");
    }
}

#[tokio::test]
async fn event_requests_are_held_up_to_the_limit_and_returned_by_a_reset() {
    let limits = Limits {
        async_events: 3,
        ..Limits::default()
    };
    let rig = Rig::with(subsystem([ram(1 << 20, 512)]), limits).await;
    let (mut queue, _) = rig.connect().await;
    queue.enable().await;
    let request = Sqe::new(admin::ASYNC_EVENT_REQUEST, 0);
    for token in 1..=3 {
        queue.start(request, Transfer::None, token);
    }
    let cqe = queue.command(request).await;
    assert_eq!(cqe.status(), refused(Status::AER_LIMIT_EXCEEDED));
    // The others wait, and do not keep anything else from being answered.
    let alive: Cqe = queue.command(Sqe::keep_alive()).await;
    assert_eq!(alive.status(), Status::SUCCESS);
    assert_eq!(queue.0.pair().outstanding(), 3);
    queue.start(
        nvmf::spec::fabrics::property_set(0x14, 0),
        Transfer::None,
        9,
    );
    let mut aborted = 0;
    for _ in 0..4 {
        let done = queue.finish().await;
        match done.token {
            9 => assert_eq!(done.cqe.status(), Status::SUCCESS),
            _ => {
                assert_eq!(done.cqe.status(), Status::ABORT_REQUESTED);
                aborted += 1;
            }
        }
    }
    assert_eq!(aborted, 3);
}

#[tokio::test]
async fn what_is_not_implemented_is_an_invalid_opcode() {
    let (_rig, mut queue) = enabled().await;
    let abort = queue.command(Sqe::new(admin::ABORT, 0)).await;
    assert_eq!(abort.status(), Status::SUCCESS);
    assert_eq!(abort.dw0() & 1, 1, "not aborted");
    for opcode in [0x00, 0x01, 0x04, 0x0d, 0x10, 0x11, 0x14, 0x80, 0x84, 0xc0] {
        let cqe = queue.command(Sqe::new(opcode, 0)).await;
        assert_eq!(cqe.status(), refused(Status::INVALID_OPCODE), "{opcode:#x}");
    }
    for (fctype, status) in [
        (fabrics::CONNECT, Status::SEQUENCE_ERROR),
        (fabrics::DISCONNECT, Status::new(1, 0x85)),
        (fabrics::AUTHENTICATION_SEND, Status::INVALID_OPCODE),
        (fabrics::AUTHENTICATION_RECEIVE, Status::INVALID_OPCODE),
        (0xff, Status::INVALID_OPCODE),
    ] {
        let cqe = queue.command(Sqe::fabrics(fctype)).await;
        assert_eq!(cqe.status(), refused(status), "{fctype:#x}");
    }
    assert!(!queue.closed(PATIENCE / 100).await, "the association lives");
}
