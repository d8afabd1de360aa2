//! The ANA log: in parts, while it changes, and of controllers that lie about it.

use super::*;
use crate::host::scripted::Answer;
use crate::host::{AnaLog, AnaState};
use crate::spec::ana::LSP_GROUPS_ONLY;
use crate::spec::identify::{cmic, lpa};
use crate::spec::log::{GetLogPage, lid};
use crate::spec::opcode::admin;

/// A log of these groups: identifier, state, namespaces.
fn log(change_count: u64, groups: &[(u32, u8, &[u32])]) -> Vec<u8> {
    let mut bytes = change_count.to_le_bytes().to_vec();
    bytes.extend((groups.len() as u16).to_le_bytes());
    bytes.extend([0; 6]);
    for (id, state, nsids) in groups {
        bytes.extend(id.to_le_bytes());
        bytes.extend((nsids.len() as u32).to_le_bytes());
        bytes.extend(change_count.to_le_bytes());
        bytes.push(*state);
        bytes.extend([0; 15]);
        bytes.extend(nsids.iter().flat_map(|nsid| nsid.to_le_bytes()));
    }
    bytes
}

/// A controller that reports this log.
fn reporting(page: Vec<u8>) -> Scripted {
    Scripted::new().with(|model| {
        model.identity.cmic = cmic::ANA;
        model.identity.lpa = lpa::EXTENDED;
        model.identity.anatt = 10;
        model.identity.anagrpmax = 128.into();
        model.identity.nanagrpid = 128.into();
        model.pages.insert(lid::ANA, page);
    })
}

async fn read(controller: &Scripted) -> Result<AnaLog, HostError> {
    connect(controller).await.unwrap().ana_log().await
}

async fn refusal(controller: &Scripted) -> String {
    let text = read(controller).await.unwrap_err().to_string();
    assert!(text.contains("ANA log") && !text.contains('\n'), "{text}");
    text
}

fn reads(controller: &Scripted) -> usize {
    controller.look(|model| {
        let sent = model.commands.iter();
        sent.filter(|(opcode, _)| *opcode == admin::GET_LOG_PAGE)
            .count()
    })
}

#[tokio::test]
async fn what_identify_tells_of_access_is_kept() {
    let association = connect(&reporting(log(0, &[]))).await.unwrap();
    let info = association.controller().ana.unwrap();
    assert_eq!((info.max_group, info.groups), (128, 128));
    assert_eq!(info.transition_time, std::time::Duration::from_secs(10));
    assert_eq!(info.namespaces, 1024, "NN, for want of MNAN");
    let without = connect(&Scripted::new()).await.unwrap();
    assert_eq!(without.controller().ana, None);
    let text = without.ana_log().await.unwrap_err().to_string();
    assert!(text.contains("does not report asymmetric"), "{text}");
}

#[tokio::test]
async fn states_are_those_of_the_group_that_lists_the_namespace_or_that_identify_names() {
    let controller = reporting(log(
        7,
        &[
            (1, AnaState::Optimized as u8, &[1, 2]),
            (2, AnaState::NonOptimized as u8, &[]),
            (3, AnaState::Inaccessible as u8, &[70_000]),
            (4, 0xf0 | AnaState::PersistentLoss as u8, &[]),
            (5, AnaState::Change as u8, &[]),
            (128, 9, &[]),
        ],
    ));
    let log = read(&controller).await.unwrap();
    assert_eq!(log.change_count, 7);
    assert_eq!(log.state_of(1, 1), Some(AnaState::Optimized));
    // The log is newer than what was identified.
    assert_eq!(log.state_of(2, 3), Some(AnaState::Optimized));
    assert_eq!(log.state_of(70_000, 3), Some(AnaState::Inaccessible));
    assert_eq!(log.state_of(9, 2), Some(AnaState::NonOptimized));
    assert_eq!(log.state_of(9, 4), Some(AnaState::PersistentLoss));
    assert_eq!(log.state_of(9, 5), Some(AnaState::Change));
    assert_eq!(log.state_of(9, 128), Some(AnaState::Inaccessible));
    assert_eq!(log.state_of(9, 6), None);
    assert_eq!(reads(&controller), 1, "one command is consistent");
}

/// Many namespaces in two groups.
fn long(change_count: u64) -> Vec<u8> {
    let first: Vec<u32> = (1..=20_000).collect();
    let second: Vec<u32> = (20_001..=40_000).collect();
    let groups: [(u32, u8, &[u32]); 2] = [
        (1, AnaState::Optimized as u8, &first),
        (2, AnaState::Inaccessible as u8, &second),
    ];
    log(change_count, &groups)
}

#[tokio::test]
async fn a_long_log_is_read_in_parts_that_the_controller_can_transfer() {
    for (mdts, least) in [(0, 3), (1, 20), (2, 10)] {
        let controller = reporting(long(1)).with(|model| model.identity.mdts = mdts);
        let log = read(&controller).await.unwrap();
        assert_eq!(log.state_of(20_000, 9), Some(AnaState::Optimized));
        assert_eq!(log.state_of(40_000, 9), Some(AnaState::Inaccessible));
        assert!(reads(&controller) >= least, "MDTS {mdts}");
    }
}

#[tokio::test]
async fn a_log_that_changes_while_it_is_read_is_read_again() {
    let mut parts = 0;
    let controller = reporting(long(1)).scripted(move |model, sqe, _| {
        if sqe.opcode == admin::GET_LOG_PAGE {
            parts += 1;
            if parts == 2 {
                model.pages.insert(lid::ANA, long(2));
            }
        }
        None
    });
    assert_eq!(read(&controller).await.unwrap().change_count, 2);
    // One that never stands still.
    let mut change_count = 0;
    let controller = reporting(Vec::new()).scripted(move |model, sqe, _| {
        if sqe.opcode == admin::GET_LOG_PAGE && GetLogPage::from_sqe(sqe).offset == 0 {
            change_count += 1;
            model.pages.insert(lid::ANA, long(change_count));
        }
        None
    });
    let text = refusal(&controller).await;
    assert!(text.contains("changed under each of 8"), "{text}");
}

#[tokio::test]
async fn of_a_log_that_is_too_long_or_cannot_be_read_in_parts_only_groups_are_read() {
    let all: Vec<u32> = (1..=70_000).collect();
    let whole: [(u32, u8, &[u32]); 2] = [
        (1, AnaState::Optimized as u8, &all),
        (2, AnaState::Change as u8, &[]),
    ];
    for extended in [true, false] {
        let page = log(1, &whole);
        let controller = reporting(page)
            .with(|model| model.identity.lpa = if extended { lpa::EXTENDED } else { 0 })
            .scripted(|model, sqe, _| {
                if sqe.opcode == admin::GET_LOG_PAGE && sqe.cdw10.get() & LSP_GROUPS_ONLY != 0 {
                    let groups = [
                        (1, AnaState::Optimized as u8, &[][..]),
                        (2, AnaState::Change as u8, &[][..]),
                    ];
                    model.pages.insert(lid::ANA, log(1, &groups));
                }
                None
            });
        let log = read(&controller).await.unwrap();
        assert_eq!(log.state_of(5, 1), Some(AnaState::Optimized));
        assert_eq!(log.state_of(5, 2), Some(AnaState::Change));
        assert!(log.namespaces.is_empty());
    }
}

#[tokio::test]
async fn logs_that_lie_are_refused() {
    let one = |id, nsids: &[u32]| log(1, &[(id, AnaState::Optimized as u8, nsids)]);
    let mut endless = one(1, &[]);
    endless[20..24].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut crowded = one(1, &[]);
    crowded[8..10].copy_from_slice(&u16::MAX.to_le_bytes());
    let mut more_groups = one(1, &[]);
    more_groups[8] = 3;
    for (page, named) in [
        (one(0, &[]), "group 0"),
        (one(129, &[]), "group 129"),
        (log(1, &[(1, 1, &[]), (1, 2, &[])]), "group 1 twice"),
        (log(1, &[(1, 1, &[5]), (2, 1, &[5])]), "namespace 5 in two"),
        (endless, "not asked for"),
        (crowded, "65535 groups"),
        (more_groups, "group 0"),
    ] {
        let controller = reporting(page);
        let text = refusal(&controller).await;
        assert!(text.contains(named), "{text}");
        assert!(reads(&controller) <= 3);
    }
}

#[tokio::test]
async fn a_log_without_end_is_left_after_a_bounded_number_of_bytes() {
    // Every group says that more groups and namespaces follow, and they do.
    let controller = reporting(Vec::new())
        .with(|model| {
            model.identity.nn = u32::MAX.into();
            model.identity.anagrpmax = u32::MAX.into();
            model.identity.nanagrpid = u32::MAX.into();
        })
        .scripted(|_, sqe, _| {
            let asked = sqe.opcode == admin::GET_LOG_PAGE;
            let part = GetLogPage::from_sqe(sqe);
            asked.then(|| Answer::Data(vec![0xff; part.len as usize]))
        });
    let text = refusal(&controller).await;
    assert!(text.contains("65535 groups"), "{text}");
    assert_eq!(reads(&controller), 1);
}
