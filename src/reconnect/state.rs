//! The states of a path, and what leads from one to the next: the one table.

use std::fmt;

/// Where a disk stands with the controller of one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Its lanes have their queue pairs.
    Connected,
    /// The lanes are asked what they had outstanding.
    Losing,
    /// Until the next attempt.
    Waiting,
    /// An association is being made.
    Connecting,
    /// The namespace is compared with the one before, and queue pairs are connected.
    Verifying,
    /// The lanes get their queue pairs.
    Resuming,
    /// There is no way back.
    GivenUp,
}

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The association, or one of its queue pairs, has ended.
    Lost,
    /// Every lane has told what it had outstanding.
    Collected,
    /// The same, of a controller that cannot be connected to again.
    NoWayBack,
    /// It is time for an attempt.
    Elapsed,
    /// There is an association.
    Established,
    /// It is the same namespace, and there are queue pairs.
    Verified,
    /// The attempt has failed.
    Failed,
    /// Every lane has its queue pair.
    Resumed,
}

impl State {
    /// The next state. What cannot happen in a state changes nothing.
    pub(crate) fn after(self, event: Event) -> Self {
        match (self, event) {
            (Self::Connected, Event::Lost) => Self::Losing,
            (Self::Losing, Event::Collected) => Self::Waiting,
            (Self::Losing, Event::NoWayBack) => Self::GivenUp,
            (Self::Waiting, Event::Elapsed) => Self::Connecting,
            (Self::Connecting, Event::Established) => Self::Verifying,
            (Self::Connecting | Self::Verifying, Event::Failed) => Self::Waiting,
            (Self::Verifying, Event::Verified) => Self::Resuming,
            (Self::Resuming, Event::Resumed) => Self::Connected,
            (state, _) => state,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connected => "connected",
            Self::Losing => "losing",
            Self::Waiting => "waiting",
            Self::Connecting => "connecting",
            Self::Verifying => "verifying",
            Self::Resuming => "resuming",
            Self::GivenUp => "given up",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 7] = [
        State::Connected,
        State::Losing,
        State::Waiting,
        State::Connecting,
        State::Verifying,
        State::Resuming,
        State::GivenUp,
    ];
    const EVENTS: [Event; 8] = [
        Event::Lost,
        Event::Collected,
        Event::NoWayBack,
        Event::Elapsed,
        Event::Established,
        Event::Verified,
        Event::Failed,
        Event::Resumed,
    ];

    #[test]
    fn the_table_is_the_one_that_is_documented() {
        let documented = include_str!("../../docs/architecture.md");
        let mut rows = 0;
        for state in STATES {
            for event in EVENTS {
                let next = state.after(event);
                if next != state {
                    let row = format!("| {state} | {event:?} | {next} |");
                    assert!(documented.contains(&row), "not documented: {row}");
                    rows += 1;
                }
            }
        }
        let is_row = |line: &&str| {
            let states = |name: &str| STATES.iter().any(|state| state.to_string() == name);
            let mut cells = line.split('|').map(str::trim).skip(1);
            cells.next().is_some_and(states) && cells.nth(1).is_some_and(states)
        };
        assert_eq!(documented.lines().filter(is_row).count(), rows);
    }

    #[test]
    fn from_every_state_but_the_last_there_is_a_way_to_connected() {
        for start in STATES.into_iter().filter(|&state| state != State::GivenUp) {
            let mut reached = vec![start];
            let mut at = 0;
            while let Some(&state) = reached.get(at) {
                for next in EVENTS.map(|event| state.after(event)) {
                    if !reached.contains(&next) {
                        reached.push(next);
                    }
                }
                at += 1;
            }
            assert!(reached.contains(&State::Connected), "{start}");
        }
    }
}
