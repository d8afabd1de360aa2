//! SIGUSR1: has everything that serves say in the log how it is.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Comes at each SIGUSR1. Whoever has something to tell listens with one of its own.
#[derive(Debug)]
pub(crate) struct StatusSignal(Option<Signal>);

impl StatusSignal {
    /// From here on the signal does not end the process.
    pub(crate) fn new() -> Self {
        let listening = signal(SignalKind::user_defined1());
        let listening = listening.inspect_err(|error| {
            tracing::warn!(%error, "SIGUSR1 cannot be listened for: it will end the process");
        });
        Self(listening.ok())
    }

    /// Waits for the next one.
    pub(crate) async fn asked(&mut self) {
        let came = match &mut self.0 {
            Some(signal) => signal.recv().await,
            None => None,
        };
        if came.is_none() {
            std::future::pending().await
        }
    }
}
