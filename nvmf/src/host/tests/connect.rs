//! The answers to Connect, row by row.

use std::time::{Duration, Instant};

use zerocopy::FromBytes;

use super::*;
use crate::host::error::Queue;
use crate::host::scripted::{Answer, CNTLID, SHORT};
use crate::spec::fabrics::{CATTR_DISABLE_SQ_FLOW, ConnectData, connect_offset, invalid_parameter};
use crate::spec::opcode::fabrics::CONNECT;
use crate::spec::{Cqe, Status};
use crate::transport::{Ending, Fes, TermReq};

/// A controller that answers Connect of queue `qid` so.
fn answering(qid: u16, answer: impl Fn() -> Answer + Send + 'static) -> Scripted {
    Scripted::new().scripted(move |_, sqe, _| {
        (is_fabrics(sqe, CONNECT) && sqe.cdw10.get() >> 16 == u32::from(qid)).then(&answer)
    })
}

fn refusing(qid: u16, status: Status, result: u32) -> Scripted {
    answering(qid, move || Answer::refusal(status.do_not_retry(), result))
}

fn connected(dw0: u32, sqhd: u16) -> Answer {
    Answer::Entry(Cqe {
        sqhd: sqhd.into(),
        ..Cqe::with_result(0, dw0.into())
    })
}

#[tokio::test]
async fn connect_says_who_we_are_and_asks_for_no_flow_control() {
    let controller = Scripted::new();
    let association = connect(&controller).await.unwrap();
    let pairs = association.open_io_queues_over(&controller).await.unwrap();
    assert_eq!(pairs.len(), 1);
    let connects = controller.look(|model| model.connects.clone());
    let (admin, io) = (&connects[0], &connects[1]);
    assert_eq!((admin.0.qid, admin.0.sqsize, admin.0.kato), (0, 31, 5000));
    assert_eq!((io.0.qid, io.0.sqsize, io.0.kato), (1, 127, 0));
    for ((command, bytes), cntlid) in [(admin, 0xffff), (io, CNTLID)] {
        let data = ConnectData::ref_from_bytes(bytes).unwrap();
        assert_eq!((command.recfmt, command.cattr), (0, CATTR_DISABLE_SQ_FLOW));
        assert_eq!(data.cntlid.get(), cntlid);
        assert_eq!(data.hostid, *options().hostid.as_bytes());
        assert_eq!(Nqn::from_field(&data.subnqn).unwrap(), target().subnqn);
        assert_eq!(Nqn::from_field(&data.hostnqn).unwrap().as_str(), HOSTNQN);
    }
}

#[tokio::test]
async fn a_controller_that_takes_no_data_in_the_connect_capsule_gets_them_otherwise() {
    let mut refusals = 0;
    let controller = Scripted::new().scripted(move |_, sqe, _| {
        let first = is_fabrics(sqe, CONNECT) && refusals == 0;
        refusals += u32::from(first);
        first.then(|| Answer::refusal(Status::SGL_OFFSET_INVALID.do_not_retry(), 0))
    });
    let association = connect(&controller).await.unwrap();
    drop(association);
    let opened = controller.opened();
    let limits: Vec<u32> = opened.iter().map(|(_, new)| new.in_capsule_limit).collect();
    assert_eq!(limits, [8192, 0]);
    // A controller that refuses that, too, is not asked a third time.
    let controller = refusing(0, Status::SGL_OFFSET_INVALID, 0);
    let error = refused(&controller).await;
    assert!(matches!(error, HostError::Command { .. }), "{error}");
    assert_eq!(controller.opened().len(), 2);
}

#[tokio::test]
async fn an_unknown_subsystem_is_named() {
    let result = invalid_parameter(connect_offset::DATA_SUBNQN, true);
    let error = refused(&refusing(0, Status::CONNECT_INVALID_PARAMETERS, result)).await;
    let subnqn = SUBNQN.to_owned();
    assert_eq!(error, HostError::UnknownSubsystem { at: at(), subnqn });
    assert!(error.to_string().contains("192.0.2.1:4420"), "{error}");
}

#[tokio::test]
async fn a_host_that_is_not_allowed_is_told_its_name_and_the_fix() {
    let error = refused(&refusing(0, Status::CONNECT_INVALID_HOST, 0)).await;
    assert!(matches!(error, HostError::HostNotAllowed { .. }));
    let text = error.to_string();
    assert!(
        text.contains(HOSTNQN) && text.contains("--hostnqn"),
        "{text}"
    );
}

#[tokio::test]
async fn each_parameter_that_is_refused_is_named_with_its_option() {
    for (offset, in_data, parameter, advice) in [
        (connect_offset::DATA_HOSTNQN, true, HOSTNQN, "--hostnqn"),
        (
            connect_offset::DATA_HOSTID,
            true,
            "000000001234",
            "--hostid",
        ),
        (connect_offset::DATA_CNTLID, true, "0xffff", "not supported"),
        (connect_offset::SQSIZE, false, "32 entries", "--queue-size"),
        (connect_offset::KATO, false, "5s", "--keep-alive-tmo"),
        (999, true, "byte 999 of the Connect data", "log"),
        (
            connect_offset::RECFMT,
            false,
            "byte 40 of the Connect command",
            "log",
        ),
    ] {
        let result = invalid_parameter(offset, in_data);
        let error = refused(&refusing(0, Status::CONNECT_INVALID_PARAMETERS, result)).await;
        assert!(matches!(
            error,
            HostError::ParameterRefused {
                queue: Queue(0),
                ..
            }
        ));
        let text = error.to_string();
        assert!(text.contains(parameter) && text.contains(advice), "{text}");
    }
}

#[tokio::test]
async fn a_refused_io_queue_is_told_by_its_number() {
    let result = invalid_parameter(connect_offset::QID, false);
    let controller = refusing(2, Status::CONNECT_INVALID_PARAMETERS, result);
    let mut options = options();
    options.nr_io_queues = 2;
    let association = connect_with(&controller, &options).await.unwrap();
    let Err(error) = association.open_io_queues_over(&controller).await else {
        panic!("the second queue was refused");
    };
    let text = error.to_string();
    assert!(
        text.contains("queue ID 2") && text.contains("--nr-io-queues"),
        "{text}"
    );
}

#[tokio::test]
async fn a_busy_controller_says_so() {
    let error = refused(&refusing(0, Status::CONNECT_CONTROLLER_BUSY, 0)).await;
    assert!(matches!(error, HostError::Busy { .. }));
}

#[tokio::test]
async fn authentication_is_refused_by_name_however_it_is_demanded() {
    let by_status = refusing(0, Status::AUTHENTICATION_REQUIRED, 0);
    let by_atr = answering(0, || connected(u32::from(CNTLID) | 1 << 17, 0xffff));
    let by_ascr = answering(0, || connected(u32::from(CNTLID) | 1 << 18, 0xffff));
    for controller in [by_status, by_atr, by_ascr] {
        let error = refused(&controller).await;
        assert!(
            matches!(error, HostError::AuthenticationDemanded { .. }),
            "{error}"
        );
    }
}

#[tokio::test]
async fn any_other_status_is_shown_as_it_is() {
    let status = Status::CONNECT_INCOMPATIBLE_FORMAT;
    let error = refused(&refusing(0, status, 0)).await;
    let expected = HostError::Command {
        at: at(),
        command: "Connect",
        status: status.do_not_retry(),
    };
    assert_eq!(error, expected);
}

#[tokio::test]
async fn flow_control_that_stays_on_is_accepted_with_a_head_inside_the_queue_only() {
    let controller = answering(0, || connected(CNTLID.into(), 31));
    connect(&controller).await.unwrap();
    let error = refused(&answering(0, || connected(CNTLID.into(), 32))).await;
    assert!(error.to_string().contains("SQ head 32"), "{error}");
}

#[tokio::test]
async fn a_controller_id_beyond_the_largest_is_refused() {
    for cntlid in [0xfff0, 0xffff] {
        let error = refused(&answering(0, move || connected(cntlid, 0xffff))).await;
        assert!(
            error.to_string().contains(&format!("{cntlid:#06x}")),
            "{error}"
        );
    }
    let controller = answering(0, || connected(0xffef, 0xffff))
        .with(|model| model.identity.cntlid = 0xffef.into());
    connect(&controller).await.unwrap();
}

#[tokio::test]
async fn a_peer_that_hangs_up_at_connect_is_told_apart() {
    for ending in [
        Ending::Closed,
        Ending::Lost("reset".to_owned()),
        Ending::Terminated(TermReq {
            fes: Fes::INVALID_HEADER_FIELD,
            fei: 8,
        }),
    ] {
        let ended = ending.clone();
        let controller = answering(0, move || Answer::End(ended.clone()));
        match refused(&controller).await {
            HostError::ConnectDropped { reason, .. } => assert_eq!(reason, ending),
            other => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn connect_without_an_answer_ends_in_time() {
    let controller = answering(0, || Answer::Silence);
    let mut options = options();
    options.connect_timeout = SHORT;
    let started = Instant::now();
    let error = connect_with(&controller, &options).await.unwrap_err();
    assert!(
        matches!(
            error,
            HostError::TimedOut {
                command: "Connect",
                ..
            }
        ),
        "{error}"
    );
    assert!(started.elapsed() < Duration::from_secs(2));
}
