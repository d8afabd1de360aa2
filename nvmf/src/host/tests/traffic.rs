//! Traffic Based Keep Alive: what a busy and an idle host send, and when either finds a loss.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::*;
use crate::host::scripted::Answer;
use crate::host::{Loss, QueueTraffic};
use crate::spec::identify::ctratt;
use crate::spec::opcode::{admin, fabrics};
use crate::transport::{Ending, HostQueuePair, Ready, Transfer};

const KATO: Duration = Duration::from_millis(400);

fn counts_traffic(controller: Scripted) -> Scripted {
    controller.with(|model| model.identity.ctratt = ctratt::TBKAS.into())
}

/// An association, an I/O queue of it, and what it tells.
struct Busy {
    association: Association,
    pair: Box<dyn HostQueuePair>,
    traffic: Option<QueueTraffic>,
    answered: u64,
}

impl Busy {
    async fn connect(controller: &Scripted) -> Self {
        let options = HostOptions {
            keep_alive_tmo: KATO,
            ..options()
        };
        let association = connect_with(controller, &options).await.unwrap();
        let mut pairs = association.open_io_queues_over(controller).await.unwrap();
        let traffic = association.traffic();
        Self {
            association,
            pair: pairs.remove(0),
            traffic,
            answered: 0,
        }
    }

    fn note(&mut self) {
        if let Some(traffic) = &mut self.traffic {
            traffic.note(self.answered, self.pair.outstanding());
        }
    }

    /// A command, and its answer if it has one.
    fn command(&mut self) {
        self.note();
        let sent = self.pair.submit(Sqe::flush(1), Transfer::None, 0);
        sent.expect("room");
        self.pair.progress(&mut Ready::default());
        while self.pair.completion().is_some() {
            self.answered += 1;
        }
        self.note();
    }

    /// Commands in these pauses for so long.
    async fn work(&mut self, pause: Duration, length: Duration) {
        let end = Instant::now() + length;
        while Instant::now() < end {
            self.command();
            sleep(pause).await;
        }
    }

    fn lost(&self) -> Option<Loss> {
        self.association.lost().borrow().clone()
    }

    async fn loss(&self) -> Loss {
        let mut lost = self.association.lost();
        let loss = timeout(KATO * 100, lost.wait_for(Option::is_some)).await;
        loss.expect("in time").unwrap().clone().unwrap()
    }
}

fn keep_alives(controller: &Scripted) -> usize {
    controller.look(|model| {
        let sent = model.commands.iter();
        sent.filter(|(opcode, _)| *opcode == admin::KEEP_ALIVE)
            .count()
    })
}

/// I/O commands of the tests; none is an admin command that a host sends.
fn is_io(sqe: &Sqe) -> bool {
    sqe.opcode == Sqe::flush(1).opcode
}

#[tokio::test]
async fn a_busy_host_sends_none_where_traffic_counts() {
    let controller = counts_traffic(Scripted::new());
    let mut busy = Busy::connect(&controller).await;
    busy.work(KATO / 20, KATO / 2).await;
    let begin = keep_alives(&controller);
    // One that waits for a command in each time-out, and finds none, ends the connection.
    let mut last = Instant::now();
    controller.set_script(move |_, _, _| {
        let strict = last.elapsed() > KATO;
        last = Instant::now();
        strict.then_some(Answer::End(Ending::Closed))
    });
    busy.work(KATO / 20, KATO * 5).await;
    // A machine that stands still for a while has the host send one.
    let sent = keep_alives(&controller) - begin;
    assert!(sent <= 2, "{sent}");
    assert_eq!(busy.lost(), None);
}

#[tokio::test]
async fn a_busy_host_sends_two_in_each_time_out_where_traffic_does_not_count() {
    let controller = Scripted::new();
    let mut busy = Busy::connect(&controller).await;
    assert!(busy.traffic.is_none(), "nothing to tell");
    let mut last = Instant::now();
    controller.set_script(move |_, sqe, _| {
        if sqe.opcode != admin::KEEP_ALIVE {
            return is_io(sqe).then_some(Answer::Result(0));
        }
        let strict = last.elapsed() > KATO;
        last = Instant::now();
        strict.then_some(Answer::End(Ending::Closed))
    });
    let begin = keep_alives(&controller);
    busy.work(KATO / 20, KATO * 5).await;
    let sent = keep_alives(&controller) - begin;
    assert!((6..=11).contains(&sent), "{sent}");
    assert_eq!(busy.lost(), None);
}

#[tokio::test]
async fn an_idle_host_sends_two_in_each_time_out_also_where_traffic_counts() {
    let controller = counts_traffic(Scripted::new());
    let mut busy = Busy::connect(&controller).await;
    busy.work(KATO / 20, KATO).await;
    let begin = keep_alives(&controller);
    tokio::time::sleep(KATO * 4).await;
    let sent = keep_alives(&controller) - begin;
    assert!((5..=9).contains(&sent), "{sent}");
    assert_eq!(busy.lost(), None);
}

#[tokio::test]
async fn without_keep_alive_there_is_nothing_to_tell() {
    let controller = counts_traffic(Scripted::new());
    let options = HostOptions {
        keep_alive_tmo: Duration::ZERO,
        ..options()
    };
    let association = connect_with(&controller, &options).await.unwrap();
    assert!(association.traffic().is_none());
}

#[tokio::test]
async fn a_controller_that_falls_silent_is_lost_as_soon_as_without_traffic() {
    let controller = counts_traffic(Scripted::new());
    let mut busy = Busy::connect(&controller).await;
    busy.work(KATO / 30, KATO).await;
    let silence = Instant::now();
    controller.set_script(|_, _, _| Some(Answer::Silence));
    let sending = async {
        loop {
            busy.command();
            sleep(KATO / 30).await;
            if let Some(loss) = busy.lost() {
                return loss;
            }
        }
    };
    let loss = timeout(KATO * 100, sending).await.expect("in time");
    assert_eq!(loss, Loss::KeepAlive(KATO));
    // One and a half, and what a busy machine adds.
    let took = silence.elapsed();
    assert!(took > KATO && took <= KATO * 3, "{took:?}");
}

#[tokio::test]
async fn an_admin_queue_that_is_slow_is_waited_for_while_io_is_answered_but_not_for_ever() {
    for answers_late in [true, false] {
        let controller = counts_traffic(Scripted::new());
        let mut busy = Busy::connect(&controller).await;
        controller.set_script(move |_, sqe, _| match sqe.opcode {
            admin::KEEP_ALIVE => Some(Answer::Held),
            _ if is_io(sqe) => Some(Answer::Result(0)),
            fabrics::OPCODE => None,
            _ => Some(Answer::Silence),
        });
        // An idle one sends one.
        let quiet = keep_alives(&controller);
        while keep_alives(&controller) == quiet {
            sleep(KATO / 100).await;
        }
        let begin = Instant::now();
        busy.work(KATO / 30, KATO * 2).await;
        assert_eq!(busy.lost(), None, "it answers on its I/O queue");
        if answers_late {
            // Two for events are held as well, and asked for anew.
            for _ in 0..20 {
                controller.complete_held(crate::spec::Cqe::new(
                    0,
                    crate::spec::Status::INVALID_OPCODE,
                ));
            }
            busy.work(KATO / 30, KATO * 8).await;
            assert_eq!(busy.lost(), None);
            continue;
        }
        let working = busy.work(KATO / 30, KATO * 3);
        working.await;
        let Loss::KeepAlive(waited) = busy.loss().await else {
            panic!("{:?}", busy.lost());
        };
        assert_eq!(waited, KATO * 4);
        assert!(begin.elapsed() < KATO * 6);
    }
}
