//! Traffic Based Keep Alive: what queues tell of commands that the controller has received and answered lately.
//!
//! Time is cut into periods, by the task that sends Keep Alive commands. A period has traffic when a
//! command was answered in it that was submitted in it, too: then the controller has received one after
//! the period began. An answer alone does not show that, since the command may have been on its way
//! for long.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// The periods of one association.
#[derive(Debug)]
pub(super) struct Traffic(Arc<Periods>);

#[derive(Debug)]
struct Periods {
    /// The number of the one that goes on.
    now: AtomicU64,
    /// The number of one that had traffic.
    seen: AtomicU64,
}

impl Traffic {
    /// Begins the first period.
    pub(super) fn new() -> Self {
        Self(Arc::new(Periods {
            now: AtomicU64::new(1),
            seen: AtomicU64::new(0),
        }))
    }

    /// For whoever drives one of the association's queue pairs.
    pub(super) fn of_queue(&self) -> QueueTraffic {
        QueueTraffic {
            periods: Arc::clone(&self.0),
            period: 0,
            proof: None,
        }
    }

    /// Another handle to the same periods.
    pub(super) fn share(&self) -> Self {
        Self(Arc::clone(&self.0))
    }

    /// Begins the next period. True when the one before had traffic.
    pub(super) fn next_period(&self) -> bool {
        let period = self.0.now.load(Relaxed);
        self.0.now.store(period.wrapping_add(1), Relaxed);
        self.0.seen.load(Relaxed) == period
    }
}

/// Tells an association's keep-alive of the traffic of one of its queue pairs. Belongs to whoever drives
/// the pair.
#[derive(Debug)]
pub struct QueueTraffic {
    periods: Arc<Periods>,
    /// The period that was seen last.
    period: u64,
    /// More answers than this are those of commands of that period, too; `None` once that was told.
    proof: Option<u64>,
}

impl QueueTraffic {
    /// Says how many commands the controller has answered on this queue pair since it was connected, and how many are
    /// outstanding. Call it where a batch of work begins and where it ends: a period begins for
    /// this queue pair with the first call in it, and what was outstanding then proves nothing.
    ///
    /// This costs a load of a number that seldom changes, and one store in each period with traffic: in
    /// every quarter of the keep-alive time-out.
    pub fn note(&mut self, answered: u64, outstanding: usize) {
        let period = self.periods.now.load(Relaxed);
        if self.period != period {
            self.period = period;
            self.proof = Some(answered.saturating_add(outstanding as u64));
        } else if self.proof.is_some_and(|proof| answered > proof) {
            self.proof = None;
            self.periods.seen.store(period, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_has_traffic_when_a_command_was_submitted_and_answered_in_it() {
        let traffic = Traffic::new();
        let mut queue = traffic.of_queue();
        queue.note(0, 0);
        queue.note(1, 0);
        assert!(traffic.next_period());
        assert!(!traffic.next_period(), "nothing since");
        queue.note(1, 0);
        queue.note(1, 5);
        assert!(!traffic.next_period(), "no answer");
    }

    #[test]
    fn answers_to_commands_of_before_are_no_traffic() {
        let traffic = Traffic::new();
        let mut queue = traffic.of_queue();
        queue.note(0, 3);
        for answered in 1..=3 {
            queue.note(answered, 3 - answered as usize);
        }
        assert!(!traffic.next_period());
        // One that is never answered is no more than that.
        queue.note(3, 1);
        queue.note(4, 1);
        assert!(!traffic.next_period());
        queue.note(4, 1);
        queue.note(6, 1);
        assert!(traffic.next_period());
    }

    #[test]
    fn any_queue_will_do_and_what_a_late_one_tells_is_not_taken_for_now() {
        let traffic = Traffic::new();
        let mut queues = [(); 3].map(|()| traffic.of_queue());
        queues[2].note(0, 0);
        queues[2].note(9, 0);
        assert!(traffic.next_period());
        queues[0].note(0, 0);
        queues[1].note(0, 0);
        queues[1].note(1, 0);
        queues[0].note(0, 0);
        assert!(traffic.next_period());
        // These answers came before it looked at the period.
        queues[0].note(7, 0);
        assert!(!traffic.next_period());
    }
}
