//! Asynchronous events: which are asked for, what they are told as, and that no controller makes them a
//! burden.

use std::time::Duration;

use tokio::sync::mpsc::Receiver;
use tokio::time::{sleep, timeout};

use super::*;
use crate::host::scripted::{Answer, SHORT, namespace};
use crate::host::{Changed, HostEvent};
use crate::spec::event::{AsyncEvent, config, kind, notice};
use crate::spec::log::{CHANGED_NAMESPACES_LEN, GetLogPage, lid};
use crate::spec::opcode::admin;
use crate::spec::{Cqe, Status, feature};
use crate::transport::Ending;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(5);

/// A controller that holds this many requests and reports everything.
fn reporting(requests: u8) -> Scripted {
    Scripted::new().with(|model| {
        model.identity.aerl = requests - 1;
        model.identity.oaes = (config::NAMESPACE_ATTRIBUTE | config::ANA_CHANGE).into();
    })
}

fn changed_list(nsids: &[u32]) -> Vec<u8> {
    let mut page: Vec<u8> = nsids.iter().flat_map(|nsid| nsid.to_le_bytes()).collect();
    page.resize(CHANGED_NAMESPACES_LEN, 0);
    page
}

fn notice_of(info: u8, page: u8) -> Cqe {
    let event = AsyncEvent {
        kind: kind::NOTICE,
        info,
        page,
    };
    Cqe::with_result(0, event.to_dw0().into())
}

fn namespaces_changed() -> Cqe {
    notice_of(notice::NAMESPACE_ATTRIBUTE, lid::CHANGED_NAMESPACES)
}

async fn next(events: &mut Receiver<HostEvent>) -> HostEvent {
    let event = timeout(LONG, events.recv()).await.expect("in time");
    event.expect("the channel is open")
}

async fn until_held(controller: &Scripted, held: usize) {
    let armed = async {
        while controller.held() != held {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(LONG, armed).await.expect("all are armed");
}

fn count(controller: &Scripted, opcode: u8) -> usize {
    controller.look(|model| {
        let sent = model.commands.iter();
        sent.filter(|(sent, _)| *sent == opcode).count()
    })
}

#[tokio::test]
async fn every_slot_is_kept_busy_up_to_eight() {
    for (requests, expected) in [(1, 1), (4, 4), (16, 8), (255, 8)] {
        let controller = reporting(requests);
        let mut association = connect(&controller).await.unwrap();
        assert_eq!(controller.held(), 0, "nobody asked for events");
        let mut events = association.events();
        until_held(&controller, expected).await;
        controller.look(|model| {
            model
                .pages
                .insert(lid::CHANGED_NAMESPACES, changed_list(&[3]));
        });
        for _ in 0..3 {
            controller.complete_held(namespaces_changed());
            let changed = Changed::Namespaces(vec![3]);
            assert_eq!(
                next(&mut events).await,
                HostEvent::NamespacesChanged(changed)
            );
        }
        until_held(&controller, expected).await;
        // Other commands have their room.
        assert_eq!(association.namespaces().await.unwrap().len(), 1);
        assert_eq!(*association.lost().borrow(), None);
    }
}

#[tokio::test]
async fn what_is_asked_for_is_what_is_on_offer() {
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let controller = reporting(4).scripted(move |_, sqe, _| {
        if sqe.opcode == admin::SET_FEATURES
            && sqe.cdw10.get() == u32::from(feature::fid::ASYNC_EVENT_CONFIG)
        {
            tell.send(sqe.cdw11.get()).unwrap();
            // As a controller without health would.
            if sqe.cdw11.get() & config::HEALTH != 0 {
                return Some(Answer::status(Status::INVALID_FIELD));
            }
        }
        None
    });
    let mut association = connect(&controller).await.unwrap();
    let _events = association.events();
    let notices = config::NAMESPACE_ATTRIBUTE | config::ANA_CHANGE;
    assert_eq!(told.recv().await, Some(notices | config::HEALTH));
    assert_eq!(told.recv().await, Some(notices));
    until_held(&controller, 4).await;
}

#[tokio::test]
async fn an_event_comes_after_its_page_was_read_and_before_the_slot_is_free_again() {
    let controller = reporting(1);
    let mut association = connect(&controller).await.unwrap();
    let mut events = association.events();
    until_held(&controller, 1).await;
    controller.look(|model| {
        model.pages.insert(lid::ANA, vec![0; 16]);
        model
            .pages
            .insert(lid::HEALTH, [&[4][..], &[0; 511]].concat());
        model.pages.insert(lid::FIRMWARE, vec![0; 512]);
        model.pages.insert(lid::ERROR, vec![0; 64]);
    });
    let health = Cqe::with_result(0, u64::from(lid::HEALTH) << 16 | u64::from(kind::HEALTH));
    let error = Cqe::with_result(0, u64::from(lid::ERROR) << 16 | 3 << 8);
    for (cqe, page, expected) in [
        (
            notice_of(notice::ANA_CHANGE, lid::ANA),
            lid::ANA,
            HostEvent::AnaChanged,
        ),
        (
            notice_of(notice::FIRMWARE_ACTIVATION, lid::FIRMWARE),
            lid::FIRMWARE,
            HostEvent::Firmware,
        ),
        (
            health,
            lid::HEALTH,
            HostEvent::Smart(vec!["reliability degraded"]),
        ),
        (
            error,
            lid::ERROR,
            HostEvent::Error("persistent internal error"),
        ),
    ] {
        controller.look(|model| model.commands.clear());
        controller.complete_held(cqe);
        assert_eq!(next(&mut events).await, expected);
        until_held(&controller, 1).await;
        let commands = controller.look(|model| {
            let sent = model.commands.iter();
            let of_events =
                sent.filter(|(opcode, _)| *opcode != admin::KEEP_ALIVE && *opcode != 0x7f);
            of_events.copied().collect::<Vec<_>>()
        });
        let [(admin::GET_LOG_PAGE, get), (admin::ASYNC_EVENT_REQUEST, _)] = commands[..] else {
            panic!("{commands:?}");
        };
        assert_eq!(get as u8, page);
        assert_eq!(get >> 15 & 1, 0, "the event is cleared");
    }
}

#[tokio::test]
async fn a_page_that_cannot_be_read_costs_no_slot_and_no_event() {
    let controller = reporting(2).scripted(|_, sqe, _| {
        let part = GetLogPage::from_sqe(sqe);
        match sqe.opcode {
            admin::GET_LOG_PAGE if part.lid == lid::CHANGED_NAMESPACES => Some(Answer::Silence),
            _ => None,
        }
    });
    let mut short = options();
    short.connect_timeout = SHORT;
    let mut association = connect_with(&controller, &short).await.unwrap();
    let mut events = association.events();
    // One page is refused, as the honest controller does not have it; the other has no answer.
    controller.complete_held(notice_of(notice::ANA_CHANGE, lid::ANA));
    assert_eq!(next(&mut events).await, HostEvent::AnaChanged);
    controller.complete_held(namespaces_changed());
    let all = HostEvent::NamespacesChanged(Changed::All);
    assert_eq!(next(&mut events).await, all);
    until_held(&controller, 2).await;
}

#[tokio::test]
async fn events_that_nobody_takes_become_one_that_means_all() {
    let controller = reporting(8);
    let mut association = connect(&controller).await.unwrap();
    let mut events = association.events();
    until_held(&controller, 8).await;
    // All but one fit where events wait; that one is lost, and is told of as soon as there is room.
    const WAITING: usize = 32;
    for sent in 1..=WAITING + 1 {
        controller.complete_held(notice_of(0x77, 0));
        let armed = async {
            while count(&controller, admin::ASYNC_EVENT_REQUEST) < 8 + sent {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(LONG, armed).await.expect("armed again");
    }
    let unknown = HostEvent::Other {
        kind: kind::NOTICE,
        info: 0x77,
        page: 0,
    };
    for _ in 0..WAITING {
        assert_eq!(next(&mut events).await, unknown);
    }
    assert_eq!(next(&mut events).await, HostEvent::Missed);
    timeout(SHORT, events.recv()).await.expect_err("no more");
}

#[tokio::test]
async fn a_storm_of_events_is_slowed_down() {
    let controller = reporting(8).scripted(|_, sqe, _| {
        let cqe = notice_of(0x77, 0);
        (sqe.opcode == admin::ASYNC_EVENT_REQUEST).then_some(Answer::Entry(cqe))
    });
    let mut association = connect(&controller).await.unwrap();
    let mut events = association.events();
    let mut taken = 0;
    let storm = async {
        while events.recv().await.is_some() {
            taken += 1;
        }
    };
    timeout(SHORT * 8, storm).await.expect_err("it goes on");
    // 32 at once, and 4 each second.
    assert!((32..=35).contains(&taken), "{taken}");
    assert!(count(&controller, admin::ASYNC_EVENT_REQUEST) <= taken + 8);
}

#[tokio::test]
async fn refused_requests_are_sent_ever_more_rarely() {
    let controller = reporting(1).scripted(|_, sqe, _| {
        let refused = Answer::status(Status::INTERNAL_ERROR);
        (sqe.opcode == admin::ASYNC_EVENT_REQUEST).then_some(refused)
    });
    let mut association = connect(&controller).await.unwrap();
    let _events = association.events();
    // After one second, after two more, after four more.
    sleep(Duration::from_millis(2500)).await;
    let sent = count(&controller, admin::ASYNC_EVENT_REQUEST);
    assert_eq!(sent, 2);
    assert_eq!(*association.lost().borrow(), None);
}

#[tokio::test]
async fn fewer_slots_than_were_told_are_kept_busy() {
    let controller = reporting(8).scripted(|_, sqe, _| {
        static HELD: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        if sqe.opcode != admin::ASYNC_EVENT_REQUEST {
            return None;
        }
        let held = HELD.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        (held >= 3).then(|| Answer::status(Status::AER_LIMIT_EXCEEDED))
    });
    let mut association = connect(&controller).await.unwrap();
    let _events = association.events();
    until_held(&controller, 3).await;
    sleep(SHORT).await;
    let sent = count(&controller, admin::ASYNC_EVENT_REQUEST);
    assert_eq!(sent, 8, "what was refused is not tried again");
}

#[tokio::test]
async fn a_controller_without_events_is_not_asked_again_and_closes_the_channel() {
    let controller = reporting(4).scripted(|_, sqe, _| {
        let unknown = Answer::status(Status::INVALID_OPCODE);
        (sqe.opcode == admin::ASYNC_EVENT_REQUEST).then_some(unknown)
    });
    let mut association = connect(&controller).await.unwrap();
    let mut events = association.events();
    assert_eq!(timeout(LONG, events.recv()).await.expect("in time"), None);
    assert!(count(&controller, admin::ASYNC_EVENT_REQUEST) <= 8);
    // A second channel would be of no use, and says so.
    assert_eq!(association.events().recv().await, None);
}

#[tokio::test]
async fn events_end_with_their_association() {
    let controller = reporting(2);
    let mut association = connect(&controller).await.unwrap();
    let mut events = association.events();
    until_held(&controller, 2).await;
    controller.end(Ending::Closed);
    assert_eq!(timeout(LONG, events.recv()).await.expect("in time"), None);

    let controller = reporting(2);
    let mut association = connect(&controller).await.unwrap();
    let mut events = association.events();
    until_held(&controller, 2).await;
    association.shutdown(LONG).await;
    assert_eq!(timeout(LONG, events.recv()).await.expect("in time"), None);
    let closed = async {
        while controller.alive() != 0 {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(LONG, closed).await.expect("in time");
}

#[tokio::test]
async fn a_namespace_is_looked_at_again() {
    let controller = Scripted::new();
    let association = connect(&controller).await.unwrap();
    let info = association.reidentify(1).await.unwrap().unwrap();
    assert_eq!(info.block_count, 2048);
    controller.look(|model| {
        model.namespaces.insert(1, (namespace(4096, 9), Vec::new()));
        model.namespaces.insert(3, (namespace(1, 8), Vec::new()));
    });
    let info = association.reidentify(1).await.unwrap().unwrap();
    assert_eq!(info.block_count, 4096);
    assert_eq!(association.reidentify(2).await, Ok(None));
    for nsid in [0, u32::MAX] {
        assert_eq!(association.reidentify(nsid).await, Ok(None));
    }
    let error = association.reidentify(3).await.unwrap_err();
    assert!(matches!(error, HostError::UnusableNamespace { .. }));
}

#[tokio::test]
async fn an_inquiry_looks_from_another_task_and_does_not_keep_the_association() {
    let controller = Scripted::new();
    let association = connect(&controller).await.unwrap();
    let inquiry = association.inquiry();
    let look = tokio::spawn({
        let inquiry = inquiry.clone();
        async move { inquiry.reidentify(1).await }
    });
    let info = look.await.unwrap().unwrap().unwrap();
    assert_eq!((info.nsid, inquiry.address()), (1, at()));
    drop(association);
    let closed = async {
        while controller.alive() != 0 {
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(LONG, closed).await.expect("in time");
    let error = inquiry.reidentify(1).await.unwrap_err();
    assert!(matches!(error, HostError::Lost { .. }), "{error}");
}
