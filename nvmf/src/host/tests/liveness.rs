//! Keep-alive, loss, shutdown, and commands that are never answered.

use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::*;
use crate::host::Loss;
use crate::host::scripted::{Answer, SHORT};
use crate::spec::opcode::{admin, fabrics};
use crate::spec::property::Csts;
use crate::transport::{Ending, FatalError, Fes, TermReq};

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(5);

fn with_kato(kato: Duration) -> HostOptions {
    HostOptions {
        keep_alive_tmo: kato,
        ..options()
    }
}

fn keep_alives(controller: &Scripted) -> usize {
    controller.look(|model| {
        let sent = model.commands.iter();
        sent.filter(|(opcode, _)| *opcode == admin::KEEP_ALIVE)
            .count()
    })
}

async fn loss_of(association: &Association) -> Loss {
    let mut lost = association.lost();
    let loss = timeout(LONG, lost.wait_for(Option::is_some)).await;
    loss.expect("in time").unwrap().clone().unwrap()
}

#[tokio::test]
async fn keep_alives_are_sent_twice_in_their_time_and_none_when_they_are_off() {
    let controller = Scripted::new();
    let association = connect_with(&controller, &with_kato(SHORT)).await.unwrap();
    tokio::time::sleep(SHORT * 3).await;
    assert_eq!(*association.lost().borrow(), None);
    // The first at once, then one each half: 7, fewer on a machine that is busy.
    let sent = keep_alives(&controller);
    assert!((3..=7).contains(&sent), "{sent}");

    let controller = Scripted::new();
    let association = connect_with(&controller, &with_kato(Duration::ZERO))
        .await
        .unwrap();
    tokio::time::sleep(SHORT).await;
    assert_eq!(*association.lost().borrow(), None);
    assert_eq!(keep_alives(&controller), 0);
    assert_eq!(controller.look(|model| model.connects[0].0.kato), 0);
}

#[tokio::test]
async fn a_keep_alive_without_an_answer_is_a_loss_within_the_time() {
    let controller = Scripted::new();
    let association = connect_with(&controller, &with_kato(SHORT)).await.unwrap();
    let started = Instant::now();
    controller.set_script(|_, _, _| Some(Answer::Silence));
    assert_eq!(loss_of(&association).await, Loss::KeepAlive(SHORT));
    let took = started.elapsed();
    assert!(took >= SHORT && took < SHORT * 10, "{took:?}");
    // Who waits for the controller, or asks it now, is told at once.
    let error = association.namespaces().await.unwrap_err();
    assert!(
        matches!(
            error,
            HostError::Lost {
                loss: Loss::KeepAlive(_),
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn a_keep_alive_that_is_refused_is_still_a_sign_of_life() {
    let controller = Scripted::new().scripted(|_, sqe, _| {
        let status = crate::spec::Status::INVALID_OPCODE;
        (sqe.opcode == admin::KEEP_ALIVE).then(|| Answer::status(status))
    });
    let association = connect_with(&controller, &with_kato(SHORT)).await.unwrap();
    tokio::time::sleep(SHORT * 3).await;
    assert_eq!(*association.lost().borrow(), None);
}

#[tokio::test]
async fn an_end_of_the_admin_connection_is_a_loss_with_its_cause() {
    for ending in [
        Ending::Closed,
        Ending::Lost("reset".to_owned()),
        Ending::Protocol(FatalError {
            fes: Fes::SEQUENCE_ERROR,
            fei: 0,
            what: "x",
        }),
        Ending::Terminated(TermReq {
            fes: Fes::INVALID_HEADER_FIELD,
            fei: 8,
        }),
        Ending::Garbled,
    ] {
        let controller = Scripted::new();
        let association = connect(&controller).await.unwrap();
        controller.end(ending.clone());
        assert_eq!(loss_of(&association).await, Loss::Ended(ending));
    }
}

#[tokio::test]
async fn a_fatal_status_and_a_lost_readiness_are_losses() {
    for (csts, loss) in [
        (Csts::RDY | Csts::CFS, Loss::Fatal(3)),
        (0, Loss::NotReady(0)),
    ] {
        let controller = Scripted::new();
        let association = connect_with(&controller, &with_kato(SHORT)).await.unwrap();
        controller.look(|model| model.csts = Csts(csts));
        assert_eq!(loss_of(&association).await, loss);
    }
}

#[tokio::test]
async fn only_the_first_loss_is_reported() {
    let controller = Scripted::new();
    let association = connect_with(&controller, &with_kato(SHORT)).await.unwrap();
    controller.look(|model| model.csts = Csts(Csts::CFS));
    assert_eq!(loss_of(&association).await, Loss::Fatal(2));
    controller.end(Ending::Closed);
    tokio::time::sleep(SHORT).await;
    assert_eq!(*association.lost().borrow(), Some(Loss::Fatal(2)));
}

#[tokio::test]
async fn who_asks_after_the_loss_still_hears_of_it() {
    let controller = Scripted::new();
    let association = connect(&controller).await.unwrap();
    controller.end(Ending::Closed);
    loss_of(&association).await;
    let mut late = association.lost();
    timeout(LONG, late.changed())
        .await
        .expect("in time")
        .unwrap();
    assert!(late.borrow_and_update().is_some());
    timeout(SHORT, late.changed())
        .await
        .expect_err("it is told once");
}

#[tokio::test]
async fn shutdown_notifies_waits_and_is_no_loss() {
    let controller = Scripted::new();
    let association = connect(&controller).await.unwrap();
    let mut looks = 0;
    controller.set_script(move |model, sqe, _| {
        let shutting_down = is_fabrics(sqe, fabrics::PROPERTY_GET) && model.cc.shn() == 1;
        if !shutting_down {
            return None;
        }
        looks += 1;
        (looks < 3).then(|| Answer::Result((Csts::RDY | Csts::SHST_OCCURRING).into()))
    });
    let mut lost = association.lost();
    association.shutdown(LONG).await;
    assert_eq!(
        controller.look(|model| (model.cc.shn(), model.cc.en())),
        (1, true)
    );
    let ended = timeout(LONG, lost.wait_for(Option::is_some))
        .await
        .expect("in time");
    assert!(ended.is_err(), "the sender goes away, and nothing was lost");
}

#[tokio::test]
async fn shutdown_of_a_dead_controller_takes_its_deadline_and_no_longer() {
    let controller = Scripted::new();
    let association = connect(&controller).await.unwrap();
    controller.set_script(|_, _, _| Some(Answer::Silence));
    let started = Instant::now();
    association.shutdown(SHORT).await;
    let took = started.elapsed();
    assert!(took >= SHORT && took < SHORT * 10, "{took:?}");
}

#[tokio::test]
async fn shutdown_after_a_loss_returns_at_once() {
    let controller = Scripted::new();
    let association = connect(&controller).await.unwrap();
    controller.end(Ending::Closed);
    loss_of(&association).await;
    let started = Instant::now();
    association.shutdown(LONG).await;
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn commands_that_are_never_answered_disturb_no_other() {
    let controller = Scripted::new();
    let mut short = options();
    short.connect_timeout = SHORT;
    let association = connect_with(&controller, &short).await.unwrap();
    // All but one of the 31 commands that the queue takes stay outstanding.
    controller.set_script(|_, sqe, _| (sqe.opcode == admin::IDENTIFY).then_some(Answer::Silence));
    for _ in 0..6 {
        let ask = || association.namespaces();
        let (a, b, c, d, e) = tokio::join!(ask(), ask(), ask(), ask(), ask());
        for asked in [a, b, c, d, e] {
            assert!(matches!(asked, Err(HostError::TimedOut { .. })));
        }
    }
    controller.set_script(|_, _, _| None);
    assert_eq!(association.namespaces().await.unwrap().len(), 1);
    assert_eq!(*association.lost().borrow(), None);
}

#[tokio::test]
async fn a_dropped_association_closes_even_a_queue_that_is_full() {
    let controller = Scripted::new();
    let mut short = with_kato(Duration::ZERO);
    short.connect_timeout = SHORT;
    let association = connect_with(&controller, &short).await.unwrap();
    controller.set_script(|_, _, _| Some(Answer::Silence));
    for _ in 0..7 {
        let ask = || association.namespaces();
        let (a, ..) = tokio::join!(ask(), ask(), ask(), ask(), ask());
        assert!(matches!(a, Err(HostError::TimedOut { .. })));
    }
    let identified = controller.look(|model| {
        let sent = model.commands.iter();
        sent.filter(|(opcode, _)| *opcode == admin::IDENTIFY)
            .count()
    });
    assert_eq!(
        identified,
        1 + 31,
        "one at bring-up, and as many as the queue takes"
    );
    assert_eq!(controller.alive(), 1);
    drop(association);
    let closed = async {
        while controller.alive() != 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(LONG, closed).await.expect("in time");
}
