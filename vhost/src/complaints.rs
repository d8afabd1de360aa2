//! How much of what a front-end or its guest does wrong is logged: so much per session, no more.

use std::sync::atomic::{AtomicU32, Ordering};

/// Log lines that one session may cause.
const ALLOWANCE: u32 = 64;

/// An allowance of log lines, shared by a session and its queues.
#[derive(Debug)]
pub(crate) struct Complaints {
    left: AtomicU32,
}

impl Default for Complaints {
    fn default() -> Self {
        Self {
            left: AtomicU32::new(ALLOWANCE),
        }
    }
}

impl Complaints {
    /// Uses up one line of the allowance; false when there is none left. Says so with the last.
    pub(crate) fn allow(&self) -> bool {
        let take = |left: u32| left.checked_sub(1);
        let before = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        if before == Ok(1) {
            tracing::warn!("this is the last complaint about this front-end that is logged");
        }
        before.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allowance_is_used_up_once() {
        let complaints = Complaints::default();
        assert_eq!((0..1000).filter(|_| complaints.allow()).count(), 64);
    }
}
