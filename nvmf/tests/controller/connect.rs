//! Connect: what is refused, with which status and which offence, and what is accepted.

use std::time::Duration;

use nvmf::controller::Limits;
use nvmf::spec::fabrics::{
    CATTR_DISABLE_SQ_FLOW, CNTLID_STATIC_ANY, Connect, ConnectData, connect_offset,
    invalid_parameter_parts, property_get,
};
use nvmf::spec::fabrics::{PropertySize, SQHD_FLOW_DISABLED};
use nvmf::spec::property::Cc;
use nvmf::spec::{Cqe, Nqn, Sqe, Status};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use zerocopy::IntoBytes;

use crate::rig::{
    PATIENCE, Queue, Rig, admin_connect, connect_data, field, io_data, ram, subsystem,
};

/// Where the offence is: an offset into the command, or into its data.
#[derive(Debug, Clone, Copy, PartialEq)]
enum At {
    Command(u16),
    Data(u16),
}

fn assert_invalid(what: &str, cqe: &Cqe, at: At) {
    let invalid = Status::CONNECT_INVALID_PARAMETERS.do_not_retry();
    assert_eq!(cqe.status(), invalid, "{what}: {}", cqe.status());
    let (offset, in_data) = invalid_parameter_parts(cqe.dw0());
    let got = if in_data {
        At::Data(offset)
    } else {
        At::Command(offset)
    };
    assert_eq!(got, at, "{what}");
}

/// A refused connection is closed by the target, if the host does not.
async fn all_closed(queues: Vec<Queue>) {
    for mut queue in queues {
        assert!(queue.closed(PATIENCE).await);
    }
}

#[tokio::test]
async fn a_connection_begins_with_connect_or_not_at_all() {
    let rig = Rig::start().await;
    let mut refused = Vec::new();
    for sqe in [
        Sqe::keep_alive(),
        Sqe::flush(1),
        property_get(0, PropertySize::Eight),
    ] {
        let mut queue = rig.dial(32).await;
        let cqe = queue.command(sqe).await;
        assert_eq!(cqe.status(), Status::INVALID_OPCODE.do_not_retry());
        refused.push(queue);
    }
    all_closed(refused).await;
}

#[tokio::test]
async fn each_offence_of_the_command_is_named_and_the_first_wins() {
    let rig = Rig::start().await;
    let good = admin_connect();
    let io = Connect { qid: 1, ..good };
    let mut refused = Vec::new();
    for (what, connect, at) in [
        (
            "admin SQSIZE 0",
            Connect { sqsize: 0, ..good },
            At::Command(connect_offset::SQSIZE),
        ),
        (
            "admin SQSIZE 4096",
            Connect {
                sqsize: 4096,
                ..good
            },
            At::Command(connect_offset::SQSIZE),
        ),
        (
            "I/O SQSIZE 0",
            Connect { sqsize: 0, ..io },
            At::Command(connect_offset::SQSIZE),
        ),
        (
            "I/O SQSIZE beyond MQES",
            Connect { sqsize: 1024, ..io },
            At::Command(connect_offset::SQSIZE),
        ),
        (
            "I/O KATO",
            Connect { kato: 1, ..io },
            At::Command(connect_offset::KATO),
        ),
        (
            "SQSIZE before KATO",
            Connect {
                kato: 1,
                sqsize: 0,
                ..io
            },
            At::Command(connect_offset::SQSIZE),
        ),
    ] {
        let mut queue = rig.dial(32).await;
        // Data that is wrong too: the command is looked at first.
        let data = ConnectData {
            hostid: [0; 16],
            ..connect_data()
        };
        let cqe = queue.connect(connect, &data).await;
        assert_invalid(what, &cqe, at);
        refused.push(queue);
    }
    all_closed(refused).await;
    let mut queue = rig.dial(32).await;
    let unknown_format = Connect {
        recfmt: 1,
        sqsize: 0,
        ..good
    };
    let cqe = queue.connect(unknown_format, &connect_data()).await;
    let refusal = Status::CONNECT_INCOMPATIBLE_FORMAT.do_not_retry();
    assert_eq!(cqe.status(), refusal);
}

#[tokio::test]
async fn connect_data_of_another_length_is_named_by_its_sgl() {
    let rig = Rig::start().await;
    for len in [0, 1023, 1025, 2048] {
        let mut queue = rig.dial(32).await;
        let mut data = connect_data().as_bytes().to_vec();
        data.resize(len, 0);
        let cqe = match len {
            0 => queue.command(admin_connect().to_sqe()).await,
            _ => queue.send(admin_connect().to_sqe(), &data).await,
        };
        let at = At::Command(connect_offset::SGL1);
        assert_invalid(&format!("{len} bytes"), &cqe, at);
    }
}

#[tokio::test]
async fn each_offence_of_the_data_is_named_and_the_first_wins() {
    let rig = Rig::start().await;
    let good = connect_data();
    let mut unterminated = good;
    unterminated.subnqn = [b'n'; 256];
    let mut bad_host = good;
    bad_host.hostnqn = [0; 256];
    let nil = [0; 16];
    let mut refused = Vec::new();
    for (what, qid, data, at) in [
        (
            "nil HOSTID",
            0,
            ConnectData {
                hostid: nil,
                cntlid: 3.into(),
                ..unterminated
            },
            At::Data(0),
        ),
        (
            "static CNTLID",
            0,
            ConnectData {
                cntlid: 3.into(),
                ..unterminated
            },
            At::Data(16),
        ),
        (
            "any static CNTLID",
            0,
            ConnectData {
                cntlid: CNTLID_STATIC_ANY.into(),
                ..good
            },
            At::Data(16),
        ),
        ("I/O with the dynamic CNTLID", 1, good, At::Data(16)),
        (
            "I/O with a reserved CNTLID",
            1,
            io_data(0xfff0),
            At::Data(16),
        ),
        (
            "SUBNQN without end",
            0,
            ConnectData {
                hostnqn: [0; 256],
                ..unterminated
            },
            At::Data(256),
        ),
        ("empty HOSTNQN", 0, bad_host, At::Data(512)),
        (
            "unknown subsystem",
            0,
            ConnectData {
                subnqn: field("nqn.2026-01.org.example:other"),
                ..good
            },
            At::Data(256),
        ),
        ("I/O without an association", 1, io_data(1), At::Data(16)),
    ] {
        let mut queue = rig.dial(32).await;
        let connect = Connect {
            qid,
            ..admin_connect()
        };
        let cqe = queue.connect(connect, &data).await;
        assert_invalid(what, &cqe, at);
        refused.push(queue);
    }
    all_closed(refused).await;
    assert_eq!(rig.target.associations(), 0);
}

#[tokio::test]
async fn a_host_that_is_not_on_the_list_is_an_invalid_host_and_shall_not_retry() {
    let mut closed = subsystem([ram(1 << 20, 512)]);
    let friend = "nqn.2026-01.org.example:friend";
    closed.allow_host(Nqn::new(friend).unwrap());
    let rig = Rig::with(closed, Limits::default()).await;
    let mut queue = rig.dial(32).await;
    let cqe = queue.connect(admin_connect(), &connect_data()).await;
    assert_eq!(cqe.status(), Status::CONNECT_INVALID_HOST.do_not_retry());
    let mut queue = rig.dial(32).await;
    let data = ConnectData {
        hostnqn: field(friend),
        ..connect_data()
    };
    let cqe = queue.connect(admin_connect(), &data).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
}

#[tokio::test]
async fn an_io_queue_joins_only_its_own_association_when_that_is_ready_for_it() {
    let rig = Rig::start().await;
    let (mut admin, cntlid) = rig.connect().await;
    let connect = Connect {
        qid: 1,
        ..admin_connect()
    };
    let sequence = Status::SEQUENCE_ERROR.do_not_retry();
    let attempt = async |qid, data: ConnectData| {
        let mut queue = rig.dial(32).await;
        let cqe = queue.connect(Connect { qid, ..connect }, &data).await;
        (queue, cqe)
    };

    let (_, cqe) = attempt(1, io_data(cntlid)).await;
    assert_invalid("not enabled", &cqe, At::Data(16));
    admin.enable().await;
    let (_, cqe) = attempt(1, io_data(cntlid)).await;
    assert_eq!(cqe.status(), sequence, "Number of Queues comes first");
    // Also for a queue that will never be: the order of the checks.
    let (_, cqe) = attempt(0x100, io_data(cntlid)).await;
    assert_eq!(cqe.status(), sequence);
    admin.command(Sqe::set_features(7, 0)).await;

    let (_, cqe) = attempt(0x100, io_data(cntlid)).await;
    assert_invalid("only one queue was granted", &cqe, At::Command(42));
    let (_, cqe) = attempt(1, io_data(cntlid + 1)).await;
    assert_invalid("no such controller", &cqe, At::Data(16));
    let other_id = ConnectData {
        hostid: [8; 16],
        ..io_data(cntlid)
    };
    let (_, cqe) = attempt(1, other_id).await;
    assert_invalid("another HOSTID", &cqe, At::Data(0));
    let other_nqn = ConnectData {
        hostnqn: field("nqn.2026-01.org.example:host2"),
        ..io_data(cntlid)
    };
    let (_, cqe) = attempt(1, other_nqn).await;
    assert_invalid("another HOSTNQN", &cqe, At::Data(512));

    let (_queue, cqe) = attempt(1, io_data(cntlid)).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    assert_eq!(cqe.dw0(), u32::from(cntlid));
    let (_, cqe) = attempt(1, io_data(cntlid)).await;
    assert_eq!(cqe.status(), sequence, "that queue is connected");

    admin.set_cc(Cc::enable(0).0 & !Cc::EN).await;
    admin.until(|csts| !csts.rdy()).await;
    let (_, cqe) = attempt(1, io_data(cntlid)).await;
    assert_invalid("disabled again", &cqe, At::Data(16));
}

#[tokio::test]
async fn flow_control_is_off_only_when_the_host_asks_for_that() {
    let rig = Rig::start().await;
    for (cattr, off) in [(CATTR_DISABLE_SQ_FLOW, true), (0, false)] {
        let mut queue = rig.dial(32).await;
        let connect = Connect {
            cattr,
            ..admin_connect()
        };
        let cqe = queue.connect(connect, &connect_data()).await;
        assert_eq!(cqe.status(), Status::SUCCESS);
        assert_eq!(cqe.sqhd.get() == SQHD_FLOW_DISABLED, off);
        let first = queue.command(property_get(8, PropertySize::Four)).await;
        let second = queue.command(property_get(8, PropertySize::Four)).await;
        if !off {
            assert_eq!(second.sqhd.get(), first.sqhd.get() + 1);
        }
    }
}

#[tokio::test]
async fn more_associations_than_allowed_are_busy_and_may_be_tried_again() {
    let limits = Limits {
        max_associations: 2,
        ..Limits::default()
    };
    let rig = Rig::with(subsystem([ram(1 << 20, 512)]), limits).await;
    let (first, first_id) = rig.connect().await;
    let (_second, second_id) = rig.connect().await;
    assert_ne!(first_id, second_id);
    let mut queue = rig.dial(32).await;
    let cqe = queue.connect(admin_connect(), &connect_data()).await;
    assert_eq!(cqe.status(), Status::CONNECT_CONTROLLER_BUSY);
    drop(first);
    while rig.target.associations() > 1 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (_third, third_id) = rig.connect().await;
    // A late Connect for the first one must not find the third.
    assert_ne!(third_id, first_id);
}

#[tokio::test]
async fn a_connection_that_never_finishes_its_handshake_is_closed() {
    let limits = Limits {
        handshake: Duration::from_millis(200),
        ..Limits::default()
    };
    let rig = Rig::with(subsystem([ram(1 << 20, 512)]), limits).await;
    let mut silent = TcpStream::connect(rig.address).await.unwrap();
    let mut queue = rig.dial(32).await;
    let mut byte = [0];
    let end = tokio::time::timeout(PATIENCE, silent.read(&mut byte)).await;
    assert!(matches!(end, Ok(Ok(0) | Err(_))));
    assert!(queue.closed(PATIENCE).await);
}

#[tokio::test]
async fn connections_beyond_the_limit_are_dropped_and_the_others_live() {
    let limits = Limits {
        max_connections: 2,
        ..Limits::default()
    };
    let rig = Rig::with(subsystem([ram(1 << 20, 512)]), limits).await;
    let (mut admin, _) = rig.connect().await;
    let _idle = rig.dial(32).await;
    let mut third = TcpStream::connect(rig.address).await.unwrap();
    let mut byte = [0];
    let end = tokio::time::timeout(PATIENCE, third.read(&mut byte)).await;
    assert!(matches!(end, Ok(Ok(0) | Err(_))));
    admin.enable().await;
}
