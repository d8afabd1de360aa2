//! When a Keep Alive is due.

use std::time::Duration;

use tokio::time::Instant;

/// Time-outs from one Keep Alive to the next, at most.
const LOOK_EVERY: u32 = 10;

/// When a Keep Alive is due to one controller, by what it has received before. Time is cut into periods: of half the
/// time-out, or of a quarter while there is traffic. It is known whether there was any, not when: so at the end of a
/// quarter with traffic the controller need not get a command before another quarter has passed.
#[derive(Debug)]
pub(super) struct Beats {
    kato: Duration,
    /// The begin of the period that goes on.
    begun: Option<Instant>,
    /// When the last one was sent.
    sent: Option<Instant>,
    /// The begin of the last period that had traffic.
    traffic: Option<Instant>,
    /// The period is a short one.
    short: bool,
}

impl Beats {
    /// With nothing sent yet.
    pub(super) fn new(kato: Duration) -> Self {
        Self {
            kato,
            begun: None,
            sent: None,
            traffic: None,
            short: false,
        }
    }

    /// How long the period is that goes on: at least a millisecond.
    pub(super) fn period(&self) -> Duration {
        let periods = if self.short { 4 } else { 2 };
        (self.kato / periods).max(Duration::from_millis(1))
    }

    /// The controller has received a command at this time or later.
    pub(super) fn last_traffic(&self) -> Option<Instant> {
        self.traffic
    }

    /// A period is over, and had traffic or not; the next begins. True when a Keep Alive is due now.
    pub(super) fn next(&mut self, now: Instant, traffic: bool) -> bool {
        if traffic {
            self.traffic = self.begun;
        }
        self.begun = Some(now);
        let due = self.is_due(now);
        if due {
            self.sent = Some(now);
        }
        self.short = traffic || !due;
        due
    }

    /// Half of the time-out has passed without any command that is known of, or many time-outs without this one.
    fn is_due(&self, now: Instant) -> bool {
        let Some(sent) = self.sent else {
            return true;
        };
        // Of two ends of periods one may be late by more than the other.
        let nearly = |time: Duration| time.saturating_sub(self.kato / 8);
        let heard = self.traffic.map_or(sent, |traffic| traffic.max(sent));
        let within = |time: Duration, since| now.saturating_duration_since(since) < nearly(time);
        !within(self.kato / 2, heard) || !within(self.kato.saturating_mul(LOOK_EVERY), sent)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::{option, prop_assert, proptest};

    use super::*;

    const KATO: Duration = Duration::from_secs(4);

    /// What is sent at the begin of each period: they come after those with traffic, or without.
    fn sent(traffic: impl IntoIterator<Item = bool>) -> Vec<bool> {
        let mut beats = Beats::new(KATO);
        let mut now = Instant::now();
        let mut sent = vec![beats.next(now, false)];
        for traffic in traffic {
            now += beats.period();
            sent.push(beats.next(now, traffic));
        }
        sent
    }

    #[test]
    fn one_is_sent_in_every_half_of_the_time_out_unless_traffic_takes_its_place() {
        assert_eq!(sent([false; 5]), [true; 6]);
        let busy = sent([true; 39]);
        assert_eq!(
            busy[..2],
            [true; 2],
            "when the traffic was is not known yet"
        );
        assert!(!busy[2..].contains(&true));
        let ends = sent([true, true, true, false, false, true]);
        assert_eq!(ends, [true, true, false, false, true, true, true]);
    }

    #[test]
    fn one_is_sent_in_ten_time_outs_at_the_least() {
        let sent = sent([true; 121]);
        let at: Vec<_> = (0..122).filter(|&count| sent[count]).collect();
        assert_eq!(at, [0, 1, 41, 81, 121]);
    }

    #[test]
    fn periods_are_short_while_there_is_traffic_and_never_nothing() {
        let mut beats = Beats::new(KATO);
        let begin = Instant::now();
        let ends = [(0, false, 2), (2, true, 4), (3, false, 4), (4, false, 2)];
        for (quarter, traffic, part) in ends {
            beats.next(begin + KATO / 4 * quarter, traffic);
            assert_eq!(beats.period(), KATO / part, "{quarter}");
        }
        for millis in 0..4 {
            let mut beats = Beats::new(Duration::from_millis(millis));
            beats.next(Instant::now(), true);
            assert!(beats.period() >= Duration::from_millis(1));
        }
    }

    proptest! {
        /// Each period is late by so many thousandths of the time-out, and has traffic at that part of it, or none.
        #[test]
        fn a_controller_never_waits_longer_for_a_command_than_half_of_the_time_out(
            periods in vec((0..=20_u32, option::weighted(0.7, 0.0..1.0_f64)), 1..400),
        ) {
            let most = KATO / 2 + KATO / 1000 * 40;
            let mut beats = Beats::new(KATO);
            let mut now = Instant::now();
            beats.next(now, false);
            // When it has received the last command.
            let mut last = now;
            for (late, traffic) in periods {
                let next = now + beats.period() + KATO / 1000 * late;
                if let Some(part) = traffic {
                    let at = now + (next - now).mul_f64(part);
                    prop_assert!(at - last <= most, "{:?}", at - last);
                    last = at;
                }
                now = next;
                prop_assert!(now - last <= most, "{:?}", now - last);
                if beats.next(now, traffic.is_some()) {
                    last = now;
                }
            }
        }
    }

    #[test]
    fn a_task_that_was_held_up_sends_at_once() {
        let mut beats = Beats::new(KATO);
        let begin = Instant::now();
        assert!(beats.next(begin, false));
        assert!(beats.next(begin + KATO * 2, true));
        assert!(!beats.next(begin + KATO * 2 + beats.period(), false));
        // Commands that passed long ago are no better than none.
        assert!(beats.next(begin + KATO * 4, true));
    }
}
