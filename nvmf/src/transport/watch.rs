//! Readiness of one descriptor, as the runtime reports it: the only place that registers one.

#![expect(
    unsafe_code,
    reason = "the runtime asks for a promise that the descriptor stays the same while registered"
)]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::task::{Context, Poll};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Ready;

/// Times that readiness is cleared before it is taken to be permanent.
const ROUNDS: usize = 4;

/// A descriptor registered with the current tokio runtime, edge-triggered, for one direction or both.
///
/// It holds a duplicate, so the owner may close its own at any time.
#[derive(Debug)]
pub struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    /// Registers a descriptor, for reading and, with `writes`, for writing. One that is never written to
    /// had better be registered without: an io_uring can always be written to, and says so again and again.
    ///
    /// # Errors
    /// No descriptor left, or one that cannot be polled.
    pub fn new(fd: BorrowedFd<'_>, writes: bool) -> io::Result<Self> {
        let duplicate = fd.try_clone_to_owned()?;
        let interest = match writes {
            true => Interest::READABLE | Interest::WRITABLE,
            false => Interest::READABLE,
        };
        // SAFETY: the `AsyncFd` owns the duplicate, and nothing here replaces or closes it.
        let registered = unsafe { AsyncFd::register_with_interest(duplicate, interest) };
        registered.map(Self).map_err(io::Error::from)
    }

    /// Adds to `ready` what has become possible, and leaves the waker for what has not; `writable` only where
    /// it was registered. True when something was added.
    pub fn poll(&self, cx: &mut Context<'_>, writable: bool, ready: &mut Ready) -> bool {
        let mut news = false;
        // Cleared at once: `ready` remembers, and whatever happens after this sets it anew. A
        // closed direction cannot be cleared, so the number of rounds is bounded; then the task
        // is woken again, since its waker was not left behind.
        for round in 0..ROUNDS {
            let Poll::Ready(Ok(mut guard)) = self.0.poll_read_ready(cx) else {
                break;
            };
            guard.clear_ready();
            ready.readable = true;
            news = true;
            if round + 1 == ROUNDS {
                cx.waker().wake_by_ref();
            }
        }
        for round in 0..if writable { ROUNDS } else { 0 } {
            let Poll::Ready(Ok(mut guard)) = self.0.poll_write_ready(cx) else {
                break;
            };
            guard.clear_ready();
            ready.writable = true;
            news = true;
            if round + 1 == ROUNDS {
                cx.waker().wake_by_ref();
            }
        }
        news
    }
}
