//! How many lines peers may cause in the log.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines in each window.
const LINES: u32 = 20;
const WINDOW: Duration = Duration::from_secs(10);

/// Lets a bounded number of lines through in each window.
#[derive(Debug)]
pub(super) struct Quota(Mutex<(Instant, u32)>);

impl Quota {
    pub(super) fn new() -> Self {
        Self(Mutex::new((Instant::now(), 0)))
    }

    /// True when one more line may be logged now.
    pub(super) fn allow(&self) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0.elapsed() > WINDOW {
            *state = (Instant::now(), 0);
        }
        state.1 = state.1.saturating_add(1);
        state.1 <= LINES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_off() {
        let quota = Quota::new();
        assert_eq!((0..1000).filter(|_| quota.allow()).count(), LINES as usize);
    }
}
