//! Keeps an association alive, and finds out when it is not.
//!
//! A Keep Alive is sent every half of the time-out, whatever else is sent: also to controllers that
//! would count other traffic, because I/O queues belong to workers and asking them would cost more
//! than the command. With each goes a look at the controller's status.

use std::time::Duration;

use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::admin::Admin;
use super::enable::read_status;
use super::error::{HostError, Loss};
use crate::spec::Sqe;
use crate::transport::Transfer;

/// The task; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct KeepAlive(JoinHandle<()>);

impl Drop for KeepAlive {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl KeepAlive {
    /// Starts sending, every half of `kato`.
    pub(super) fn start(admin: Admin, kato: Duration) -> Self {
        Self(tokio::spawn(run(admin, kato)))
    }
}

async fn run(admin: Admin, kato: Duration) {
    // At least a millisecond: an interval cannot be zero.
    let mut ticks = interval((kato / 2).max(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // A slow answer does not hold the next command up, so there are a few at a time, at most four.
    let mut beats = JoinSet::new();
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let admin = admin.clone();
                beats.spawn(async move { beat(&admin, kato).await });
            }
            Some(Ok(outcome)) = beats.join_next() => {
                if let Err(loss) = outcome {
                    if let Some(loss) = loss {
                        admin.report(loss);
                    }
                    // Commands that wait for this controller need not wait any longer.
                    admin.stop();
                    return;
                }
            }
        }
    }
}

/// One Keep Alive and one look at CSTS. An error is the loss that it shows; `None` when the admin
/// queue has reported it.
async fn beat(admin: &Admin, kato: Duration) -> Result<(), Option<Loss>> {
    let sent = admin
        .execute_within("Keep Alive", Sqe::keep_alive(), Transfer::None, kato)
        .await;
    match sent {
        Ok(_) => {}
        // It lives, if it does not like the command.
        Err(HostError::Command { status, .. }) => {
            tracing::debug!(controller = %admin.at(), "Keep Alive: {status}");
        }
        Err(HostError::TimedOut { .. }) => return Err(Some(Loss::KeepAlive(kato))),
        Err(_) => return Err(None),
    }
    // Bounded by the same time, so that beats do not pile up.
    match timeout(kato, read_status(admin)).await {
        Ok(Ok(csts)) if csts.cfs() => Err(Some(Loss::Fatal(csts.0))),
        Ok(Ok(csts)) if !csts.rdy() => Err(Some(Loss::NotReady(csts.0))),
        // The next Keep Alive tells whether it is gone.
        _ => Ok(()),
    }
}
