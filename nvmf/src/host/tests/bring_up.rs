//! Addresses, capabilities, enabling, limits, queues.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::host::scripted::{Answer, CNTLID, SHORT};
use crate::spec::opcode::{admin, fabrics};
use crate::spec::property::{Cap, Cc, Csts, offset};
use crate::spec::{Status, feature};
use crate::transport::Ending;

fn other() -> SocketAddr {
    "[2001:db8::1]:4420".parse().unwrap()
}

async fn connect_at(
    controller: &Scripted,
    addresses: &[SocketAddr],
    options: &HostOptions,
) -> Result<Association, HostError> {
    Association::connect_over(controller, addresses, &target(), options).await
}

#[tokio::test]
async fn a_dead_first_address_leaves_time_for_the_second() {
    let controller = Scripted::new().broken_at(other(), None);
    let mut options = options();
    options.connect_timeout = SHORT * 4;
    let association = connect_at(&controller, &[other(), at()], &options)
        .await
        .unwrap();
    assert_eq!(association.controller().address, at());
    let pairs = association.open_io_queues_over(&controller).await.unwrap();
    let opened = controller.opened();
    assert_eq!(opened.len(), 2 + pairs.len());
    assert!(
        opened[2..].iter().all(|(address, _)| *address == at()),
        "I/O queues go where the admin queue is"
    );
}

#[tokio::test]
async fn the_address_that_got_farthest_gives_the_error() {
    let refused = HostError::Refused { at: at() };
    let unreachable = HostError::Unreachable {
        at: other(),
        reason: "x".to_owned(),
    };
    let controller = Scripted::new()
        .broken_at(at(), Some(refused.clone()))
        .broken_at(other(), Some(unreachable));
    for addresses in [[at(), other()], [other(), at()]] {
        let error = connect_at(&controller, &addresses, &options()).await;
        assert_eq!(error.unwrap_err(), refused);
    }
}

#[tokio::test]
async fn options_that_no_controller_takes_are_refused_before_anything_is_sent() {
    type Change = fn(&mut HostOptions);
    let controller = Scripted::new();
    let changes: [(Change, &str); 5] = [
        (|o| o.hostid = Uuid::nil(), "--hostid"),
        (|o| o.nr_io_queues = 0, "--nr-io-queues"),
        (|o| o.queue_size = 1, "--queue-size"),
        (
            |o| o.keep_alive_tmo = Duration::from_secs(4_294_968),
            "--keep-alive-tmo",
        ),
        (|o| o.connect_timeout = Duration::ZERO, "time-out"),
    ];
    for (change, named) in changes {
        let mut options = options();
        change(&mut options);
        let error = connect_with(&controller, &options).await.unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
    }
    assert_eq!(controller.opened().len(), 0);
}

#[tokio::test]
async fn enabling_sets_what_is_ours_and_keeps_what_is_not() {
    let controller = Scripted::new().with(|model| model.cc = Cc(1 << 24 | 7 << 11 | 3 << 4));
    connect(&controller).await.unwrap();
    assert_eq!(
        controller.look(|model| model.cc),
        Cc(Cc::enable(0).0 | 1 << 24)
    );
}

#[tokio::test]
async fn the_page_size_is_the_controllers_smallest() {
    let controller = Scripted::new().with(|model| {
        model.cap.0 |= 2 << 48 | 4 << 52;
        model.identity.mdts = 3;
    });
    let association = connect(&controller).await.unwrap();
    assert_eq!(controller.look(|model| model.cc.mps()), 2);
    assert_eq!(association.controller().max_transfer, Some(8 * 16384));
}

#[tokio::test]
async fn a_controller_with_only_chosen_command_sets_is_asked_for_all_of_them() {
    let controller = Scripted::new().with(|model| {
        model.cap.0 = model.cap.0 & !Cap::CSS_NVM | Cap::CSS_IOCSS;
    });
    connect(&controller).await.unwrap();
    assert_eq!(controller.look(|model| model.cc.css()), 6);
}

#[tokio::test]
async fn capabilities_that_cannot_be_are_refused() {
    type Change = fn(&mut Cap);
    let changes: [(Change, &str); 4] = [
        (|cap| cap.0 &= !Cap::CSS_NVM, "NVM command set"),
        (|cap| cap.0 |= 5 << 48 | 5 << 52, "smallest page is 131072"),
        (|cap| cap.0 |= 1 << 48, "larger than its largest"),
        (|cap| cap.0 &= !0xffff, "MQES"),
    ];
    for (change, named) in changes {
        let controller = Scripted::new().with(|model| change(&mut model.cap));
        let error = refused(&controller).await;
        assert!(error.to_string().contains(named), "{error}");
    }
}

/// Answers a look at CSTS.
fn status_register(sqe: &Sqe, csts: u32) -> Option<Answer> {
    let asked = is_fabrics(sqe, fabrics::PROPERTY_GET) && sqe.cdw11.get() == offset::CSTS;
    asked.then_some(Answer::Result(csts.into()))
}

#[tokio::test]
async fn a_controller_may_take_a_while_to_become_ready() {
    let mut looks = 0;
    let controller = Scripted::new().scripted(move |_, sqe, _| {
        let answer = status_register(sqe, 0)?;
        looks += 1;
        (looks < 4).then_some(answer)
    });
    connect(&controller).await.unwrap();
}

#[tokio::test]
async fn a_controller_that_never_becomes_ready_is_given_up_after_what_it_states() {
    let controller = Scripted::new().scripted(|_, sqe, _| status_register(sqe, 0));
    let after = Duration::from_millis(500);
    assert_eq!(
        refused(&controller).await,
        HostError::NeverReady { at: at(), after }
    );
}

#[tokio::test]
async fn a_fatal_status_ends_the_wait_at_once() {
    let controller = Scripted::new()
        .with(|model| model.cap.0 |= 255 << 24)
        .scripted(|_, sqe, _| status_register(sqe, Csts::CFS));
    let csts = Csts::CFS;
    assert_eq!(
        refused(&controller).await,
        HostError::Fatal { at: at(), csts }
    );
}

#[tokio::test]
async fn a_controller_that_is_enabled_already_is_started_afresh() {
    let controller = Scripted::new().with(|model| {
        model.cc = Cc::enable(0);
        model.csts = Csts(Csts::RDY);
    });
    connect(&controller).await.unwrap();
    let sets = controller.look(|model| {
        let set = (fabrics::OPCODE, u32::from(fabrics::PROPERTY_SET));
        model.commands.iter().filter(|&&c| c == set).count()
    });
    assert_eq!(sets, 2);
}

#[tokio::test]
async fn fewer_queues_than_asked_for_are_taken_and_more_are_not() {
    for (granted, expected) in [(1, 1), (3, 3), (4, 4), (64, 4)] {
        let controller = Scripted::new().with(|model| model.queues = granted);
        let mut options = options();
        options.nr_io_queues = 4;
        let association = connect_with(&controller, &options).await.unwrap();
        assert_eq!(association.io_queues_granted(), expected);
        let pairs = association.open_io_queues_over(&controller).await.unwrap();
        assert_eq!(pairs.len(), usize::from(expected));
    }
}

#[tokio::test]
async fn unequal_counts_of_queues_grant_the_smaller() {
    let controller = Scripted::new().scripted(|_, sqe, _| {
        let asked = sqe.opcode == admin::SET_FEATURES
            && sqe.cdw10.get() == u32::from(feature::fid::NUMBER_OF_QUEUES);
        asked.then_some(Answer::Result(0x0001_0007))
    });
    let mut options = options();
    options.nr_io_queues = 8;
    let association = connect_with(&controller, &options).await.unwrap();
    assert_eq!(association.io_queues_granted(), 2);
}

#[tokio::test]
async fn queues_are_no_longer_than_the_controller_takes() {
    for (mqes, maxcmd, expected) in [(1023, 0, 128), (63, 0, 64), (1023, 32, 32), (1, 1, 2)] {
        let controller = Scripted::new().with(|model| {
            model.cap.0 = model.cap.0 & !0xffff | mqes;
            model.identity.maxcmd = maxcmd.into();
        });
        let association = connect(&controller).await.unwrap();
        association.open_io_queues_over(&controller).await.unwrap();
        let (_, io) = controller.opened()[1];
        assert_eq!((io.entries, io.in_capsule_limit), (expected, 8192));
        let sqsize = controller.look(|model| model.connects[1].0.sqsize);
        assert_eq!(u32::from(sqsize) + 1, expected);
    }
}

#[tokio::test]
async fn controller_ids_that_differ_are_refused() {
    let controller = Scripted::new().with(|model| model.identity.cntlid = 8.into());
    let error = refused(&controller).await;
    assert!(error.to_string().contains("0x0007"), "{error}");
}

#[tokio::test]
async fn data_that_did_not_come_is_not_believed() {
    let controller = Scripted::new()
        .scripted(|_, sqe, _| (sqe.opcode == admin::IDENTIFY).then(|| Answer::Data(vec![0; 100])));
    let error = refused(&controller).await;
    assert!(error.to_string().contains("100 of 4096"), "{error}");
}

#[tokio::test]
async fn a_bring_up_that_fails_after_enabling_shuts_the_controller_down() {
    let controller = Scripted::new().scripted(|_, sqe, _| {
        (sqe.opcode == admin::IDENTIFY).then(|| Answer::status(Status::INTERNAL_ERROR))
    });
    let error = refused(&controller).await;
    assert!(matches!(
        error,
        HostError::Command {
            command: "Identify Controller",
            ..
        }
    ));
    assert_eq!(controller.look(|model| model.cc.shn()), 1);
}

#[tokio::test]
async fn an_end_of_the_connection_at_any_command_is_an_error_that_names_the_command() {
    // Commands after Connect: CAP, CC, CC, CSTS, Identify or the first Keep Alive, ...
    for which in 0..6 {
        let mut seen = 0;
        let controller = Scripted::new().scripted(move |_, sqe, _| {
            if is_fabrics(sqe, fabrics::CONNECT) {
                return None;
            }
            seen += 1;
            (seen > which).then_some(Answer::End(Ending::Closed))
        });
        let started = Instant::now();
        match refused(&controller).await {
            HostError::Lost { .. } => {}
            other => panic!("command {which}: {other}"),
        }
        assert!(started.elapsed() < Duration::from_secs(1));
    }
}

#[tokio::test]
async fn version_2_controllers_are_asked_for_their_command_set_limits() {
    let limits = |_: &mut _, sqe: &Sqe, _: &[u8]| {
        let asked = sqe.opcode == admin::IDENTIFY && sqe.cdw10.get() == 6;
        asked.then(|| {
            let mut page = vec![0; 4096];
            page[1] = 5;
            page[3] = 16;
            page[4..8].copy_from_slice(&1000u32.to_le_bytes());
            page[8..16].copy_from_slice(&5000u64.to_le_bytes());
            Answer::Data(page)
        })
    };
    let controller = Scripted::new()
        .with(|model| model.identity.ver = 0x0002_0000.into())
        .scripted(limits);
    let association = connect(&controller).await.unwrap();
    let info = association.controller();
    assert_eq!(info.cntlid, CNTLID);
    assert_eq!(info.max_write_zeroes, Some(32 * 4096));
    let limits = info.deallocate;
    assert_eq!(
        (
            limits.max_ranges,
            limits.max_range_blocks,
            limits.max_blocks
        ),
        (16, 1000, Some(5000))
    );
    // The honest controller does not know that structure.
    let controller = Scripted::new().with(|model| model.identity.ver = 0x0002_0000.into());
    let association = connect(&controller).await.unwrap();
    assert_eq!(association.controller().deallocate.max_ranges, 256);
}

#[tokio::test]
async fn with_data_digests_no_command_moves_more_than_one_pdu_does() {
    for (mdts, digest, expected) in [
        (0, false, None),
        (0, true, Some(128 << 10)),
        (4, true, Some(64 << 10)),
        (8, true, Some(128 << 10)),
        (8, false, Some(1 << 20)),
    ] {
        let controller = Scripted::new().with(|model| model.identity.mdts = mdts);
        let mut options = options();
        options.data_digest = digest;
        let association = connect_with(&controller, &options).await.unwrap();
        assert_eq!(
            association.controller().max_transfer,
            expected,
            "MDTS {mdts}"
        );
    }
}

#[tokio::test]
async fn a_controller_with_retry_delays_is_told_that_they_are_understood_and_no_other() {
    let behavior = u32::from(feature::fid::HOST_BEHAVIOR);
    for (delays, refuses, expected) in [
        ([0, 0, 0], false, 0),
        ([0, 5, 0], false, 1),
        ([1, 2, 3], true, 1),
    ] {
        let told = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&told);
        let controller = Scripted::new()
            .with(|model| model.identity.crdt = delays.map(Into::into))
            .scripted(move |_, sqe, data| {
                let asked = sqe.opcode == admin::SET_FEATURES && sqe.cdw10.get() == behavior;
                asked.then(|| {
                    seen.lock().unwrap().push(data.to_vec());
                    match refuses {
                        true => Answer::status(Status::INVALID_FIELD),
                        false => Answer::Result(0),
                    }
                })
            });
        let association = connect(&controller).await.unwrap();
        let expected_delays =
            delays.map(|tenths: u16| Duration::from_millis(u64::from(tenths) * 100));
        assert_eq!(association.controller().retry_delays, expected_delays);
        let told = told.lock().unwrap();
        assert_eq!(told.len(), expected, "{delays:?}");
        for data in &*told {
            assert_eq!((data.len(), data[0]), (512, 1));
            assert!(data[1..].iter().all(|&byte| byte == 0));
        }
    }
}
