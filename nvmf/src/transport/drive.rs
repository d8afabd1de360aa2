//! Drives one queue pair from an async task: for the control plane.

use std::io;
use std::task::{Context, Poll};

use super::watch::Watch;
use super::{QueuePair, Ready};

/// A queue pair and its registration with the runtime.
///
/// Needs a tokio runtime with I/O. [`Self::into_pair`] takes the pair out, to be handed to a worker.
pub struct Driven<P: QueuePair + ?Sized> {
    watch: Watch,
    pair: Box<P>,
    ready: Ready,
}

impl<P: QueuePair + ?Sized> Driven<P> {
    /// Registers the pair's descriptor.
    ///
    /// # Errors
    /// The runtime refuses the descriptor.
    pub fn new(pair: Box<P>) -> io::Result<Self> {
        let watch = Watch::new(pair.interest().fd, true)?;
        Ok(Self {
            watch,
            pair,
            ready: Ready {
                readable: true,
                writable: true,
            },
        })
    }

    /// The queue pair.
    pub fn pair(&mut self) -> &mut P {
        &mut self.pair
    }

    /// Takes the registration back and gives the queue pair up.
    pub fn into_pair(self) -> Box<P> {
        self.pair
    }

    /// Sends what is queued, then waits until the descriptor moved something or the pair ended.
    /// Cancel-safe.
    pub async fn progress(&mut self) {
        std::future::poll_fn(|cx| self.poll_progress(cx)).await;
    }

    /// As [`Self::progress`], to be polled.
    pub fn poll_progress(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.pair.flush(&mut self.ready) {
            cx.waker().wake_by_ref();
        }
        if self.pair.ending().is_some() {
            return Poll::Ready(());
        }
        let news = self
            .watch
            .poll(cx, self.pair.interest().writable, &mut self.ready);
        // Readiness that was left over counts too: it will not be reported again.
        if news || self.ready.readable {
            self.pair.progress(&mut self.ready);
            return Poll::Ready(());
        }
        Poll::Pending
    }
}
