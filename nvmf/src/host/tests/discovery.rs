//! Discovery logs: chunks, changes, records that make no sense, peers that are something else.

use std::time::Duration;

use tokio::time::Instant;
use zerocopy::{FromZeros, IntoBytes};

use super::*;
use crate::host::discovery::{DiscoveredKind, DiscoveryLog, discover_over};
use crate::host::scripted::{Answer, SHORT};
use crate::spec::discovery::{DiscoveryHeader, DiscoveryRecord, adrfam, subtype, treq};
use crate::spec::log::{GetLogPage, lid};
use crate::spec::opcode::{admin, fabrics};
use crate::spec::property::Cap;
use crate::spec::{Status, trtype};

pub(super) fn record() -> DiscoveryRecord {
    let mut record = DiscoveryRecord::new_zeroed();
    record.trtype = trtype::TCP;
    record.adrfam = adrfam::IPV4;
    record.subtype = subtype::NVM;
    record.treq = treq::SECURE_CHANNEL_NOT_REQUIRED;
    record.cntlid = 0xffff.into();
    record.subnqn = Nqn::new(SUBNQN).unwrap().to_field();
    record.traddr[..9].copy_from_slice(b"192.0.2.1");
    record.trsvcid[..4].copy_from_slice(b"4420");
    record
}

pub(super) fn page(generation: u64, records: &[DiscoveryRecord]) -> Vec<u8> {
    let mut header = DiscoveryHeader::new_zeroed();
    header.genctr = generation.into();
    header.numrec = (records.len() as u64).into();
    let mut page = header.as_bytes().to_vec();
    for record in records {
        page.extend_from_slice(record.as_bytes());
    }
    page
}

/// Serves the log that `log` makes for each command, which may also answer with a status.
pub(super) fn serving(
    mut log: impl FnMut(GetLogPage) -> Result<Vec<u8>, Status> + Send + 'static,
) -> Scripted {
    Scripted::new()
        .with(|model| {
            model.identity.cntrltype = 2;
            // One entry, and no command set: it has no I/O queues.
            model.cap = Cap(Cap::CQR | 1 << 24);
        })
        .scripted(move |_, sqe, _| {
            (sqe.opcode == admin::GET_LOG_PAGE).then(|| {
                let part = GetLogPage::from_sqe(sqe);
                assert_eq!(part.lid, lid::DISCOVERY);
                assert!(part.len <= 4096, "{part:?}");
                match log(part) {
                    Ok(page) => {
                        let rest = page[part.offset as usize..].to_vec();
                        Answer::Data(rest)
                    }
                    Err(status) => Answer::status(status),
                }
            })
        })
}

/// For what has to be answered, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(10);

async fn ask(controller: &Scripted) -> Result<DiscoveryLog, HostError> {
    ask_at(controller, &[at()], PATIENCE).await
}

/// With so much time for all addresses together.
async fn ask_at(
    controller: &Scripted,
    addresses: &[SocketAddr],
    time: Duration,
) -> Result<DiscoveryLog, HostError> {
    let end = Instant::now() + time;
    let addresses: Vec<_> = addresses.iter().map(|&at| (at, Nqn::discovery())).collect();
    let log = discover_over(controller, &addresses, &options(), end).await;
    if let Err(error) = &log {
        assert!(!error.to_string().contains('\n'), "{error}");
    }
    log
}

#[tokio::test]
async fn a_log_of_any_length_is_read_in_pages_after_identify() {
    for count in [0, 1, 3, 4, 5, 9, 1234] {
        let records: Vec<_> = (0..count)
            .map(|portid: u16| {
                let mut record = record();
                record.portid = portid.into();
                record
            })
            .collect();
        let controller = serving(move |_| Ok(page(7, &records)));
        let log = ask(&controller).await.unwrap();
        assert_eq!((log.address, log.generation), (at(), 7));
        let portids: Vec<u16> = log.records.iter().map(|record| record.portid).collect();
        assert_eq!(portids, (0..count).collect::<Vec<_>>());
        assert_eq!(log.skipped, []);
        let commands = controller.look(|model| model.commands.clone());
        let first = commands.iter().find(|(op, _)| *op != fabrics::OPCODE);
        assert_eq!(first.unwrap().0, admin::IDENTIFY);
        let (connect, data) = controller.look(|model| model.connects.clone()).remove(0);
        assert_eq!((connect.qid, connect.kato), (0, 0));
        assert!(data[256..].starts_with(b"nqn.2014-08.org.nvmexpress.discovery\0"));
    }
}

#[tokio::test]
async fn a_log_that_changes_is_read_again_and_not_for_ever() {
    let mut reads = 0;
    let controller = serving(move |part| {
        reads += u64::from(part.offset == 0);
        // It changes between the first look at the header and the second.
        let generation = u64::from(reads > 1);
        Ok(page(generation, &vec![record(); generation as usize]))
    });
    let log = ask(&controller).await.unwrap();
    assert_eq!((log.generation, log.records.len()), (1, 1));

    let mut statuses = 3;
    let controller = serving(move |_| {
        statuses -= 1;
        match statuses {
            0..3 => Err(Status::LOG_RESTART_DISCOVERY),
            _ => Ok(page(1, &[record()])),
        }
    });
    assert_eq!(ask(&controller).await.unwrap().records.len(), 1);

    let mut reads = 0;
    let controller = serving(move |_| {
        reads += 1;
        Ok(page(reads, &[]))
    });
    let error = ask(&controller).await.unwrap_err();
    assert!(error.to_string().contains("changed"), "{error}");
}

#[tokio::test]
async fn nonsense_in_the_header_is_named() {
    let mut unknown = page(1, &[]);
    unknown[16] = 1;
    let mut many = page(1, &[]);
    many[8..16].copy_from_slice(&8193_u64.to_le_bytes());
    let mut huge = page(1, &[]);
    huge[8..16].fill(0xff);
    for (page, word) in [
        (unknown, "format 1"),
        (huge, "18446744073709551615 records"),
        (many, "8193 records; 8192 is the most"),
        (vec![0; 100], "returned 100 of 1024"),
    ] {
        let controller = serving(move |_| Ok(page.clone()));
        let error = ask(&controller).await.unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
    let controller = serving(|_| Err(Status::INVALID_FIELD.do_not_retry()));
    let error = ask(&controller).await.unwrap_err();
    assert!(matches!(error, HostError::Command { .. }), "{error}");
}

#[tokio::test]
async fn records_without_sense_are_skipped_and_the_others_count() {
    type Change = fn(&mut DiscoveryRecord);
    let bad: [(Change, &str); 5] = [
        (|it| it.subtype = 9, "type 9"),
        (|it| it.subnqn = [b'n'; 256], "nnn…\": the NQN"),
        (|it| it.subnqn[0] = 0, "NQN"),
        (|it| it.traddr[3] = 0x1b, r#"address "192\x1b0.2.1""#),
        (|it| it.trsvcid[1] = 0xe4, r#"port "4\xe420""#),
    ];
    let mut records = vec![record()];
    for (change, _) in bad {
        let mut record = record();
        change(&mut record);
        records.push(record);
    }
    records.push(record());
    let controller = serving(move |_| Ok(page(1, &records)));
    let log = ask(&controller).await.unwrap();
    assert_eq!(log.records.len(), 2);
    for (nth, (skipped, (_, word))) in log.skipped.iter().zip(bad).enumerate() {
        assert_eq!(skipped.index, nth + 1);
        assert!(skipped.reason.contains(word), "{skipped:?}");
    }
    assert_eq!(log.skipped.len(), bad.len());
}

#[tokio::test]
async fn a_target_comes_of_what_can_be_attached_and_a_reason_of_what_cannot() {
    type Change = fn(&mut DiscoveryRecord);
    let good: [(Change, &str); 5] = [
        (|_| {}, "nvme+tcp://192.0.2.1:4420/"),
        (
            |it| {
                // Padded with blanks, as the specification has text.
                it.traddr = [b' '; 256];
                it.traddr[..11].copy_from_slice(b"2001:db8::1");
                it.trsvcid = [b' '; 32];
                it.trsvcid[..1].copy_from_slice(b"1");
                it.adrfam = adrfam::IPV6;
            },
            "nvme+tcp://[2001:db8::1]:1/",
        ),
        (
            |it| {
                it.traddr[..16].copy_from_slice(b"::ffff:192.0.2.1");
                it.adrfam = adrfam::IPV6;
            },
            "nvme+tcp://192.0.2.1:4420/",
        ),
        // A discovery controller to ask.
        (
            |it| it.subtype = subtype::REFERRAL,
            "nvme+tcp://192.0.2.1:4420/",
        ),
        (
            // Possible, and not required.
            |it| it.tsas[0] = 2,
            "nvme+tcp://192.0.2.1:4420/",
        ),
    ];
    let bad: [(Change, &str); 10] = [
        (|it| it.trtype = 1, "transport type 1"),
        (|it| it.subtype = subtype::CURRENT, "discovery"),
        (
            |it| it.subnqn = Nqn::discovery().to_field(),
            "discovery subsystem",
        ),
        (|it| it.treq = treq::SECURE_CHANNEL_REQUIRED, "TLS"),
        (
            |it| {
                it.treq = 0;
                it.tsas[0] = 2;
            },
            "TLS",
        ),
        (|it| it.cntlid = 3.into(), "fixed"),
        (|it| it.adrfam = adrfam::IPV6, "family"),
        (
            |it| it.traddr[..9].copy_from_slice(b"192.0.2.x"),
            "192.0.2.x",
        ),
        (|it| it.trsvcid[..4].copy_from_slice(b"0\0\0\0"), "'0'"),
        (|it| it.trsvcid[..6].copy_from_slice(b"442000"), "442000"),
    ];
    let changes = good.iter().chain(&bad).map(|(change, _)| change);
    let records: Vec<_> = changes
        .map(|change| {
            let mut record = record();
            change(&mut record);
            record
        })
        .collect();
    let controller = serving(move |_| Ok(page(1, &records)));
    let log = ask(&controller).await.unwrap();
    let targets: Vec<_> = log.records.iter().map(|record| &record.target).collect();
    for (target, (_, uri)) in targets.iter().zip(good) {
        let target = target.as_ref().unwrap();
        assert_eq!(target.to_string(), format!("{uri}{SUBNQN}"));
    }
    assert_eq!(targets.len(), good.len() + bad.len());
    for (target, (_, word)) in targets[good.len()..].iter().zip(bad) {
        let reason = target.as_ref().unwrap_err();
        assert!(reason.contains(word), "{reason}");
    }
    assert_eq!(log.records[0].kind, DiscoveredKind::Nvm);
}

#[tokio::test]
async fn a_controller_of_another_kind_is_no_discovery_controller() {
    let controller = Scripted::new();
    let error = ask(&controller).await.unwrap_err();
    assert!(
        error.to_string().contains("not a discovery controller"),
        "{error}"
    );
}

#[tokio::test]
async fn the_second_port_is_tried_and_silence_ends_in_time() {
    let second: SocketAddr = "192.0.2.1:4421".parse().unwrap();
    let refused = HostError::Refused { at: at() };
    let controller = serving(|_| Ok(page(1, &[]))).broken_at(at(), Some(refused));
    let log = ask_at(&controller, &[at(), second], SHORT * 20)
        .await
        .unwrap();
    assert_eq!(log.address, second);
    // The first takes its share of the time, and no more.
    let controller = serving(|_| Ok(page(1, &[]))).broken_at(at(), None);
    let log = ask_at(&controller, &[at(), second], SHORT * 20)
        .await
        .unwrap();
    assert_eq!(log.address, second);

    let controller = serving(|_| Ok(page(1, &[])));
    controller
        .set_script(|_, sqe, _| (sqe.opcode == admin::GET_LOG_PAGE).then_some(Answer::Silence));
    let started = Instant::now();
    let error = ask_at(&controller, &[at()], SHORT * 4).await.unwrap_err();
    assert!(matches!(error, HostError::TimedOut { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(3));
}
