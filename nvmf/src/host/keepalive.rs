//! Keeps an association alive, and finds out when it is not.
//!
//! A Keep Alive is sent every half of the time-out; with each goes a look at the controller's status. A controller
//! with Traffic Based Keep Alive starts its timer again with any command (Base, "Keep Alive"). It gets one when for half of
//! the time-out no other command is known to have reached it, and otherwise once in ten time-outs: what it
//! answers on I/O queues does not show that its admin queue lives.

use std::pin::pin;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::admin::Admin;
use super::beats::Beats;
use super::enable::read_status;
use super::error::{HostError, Loss};
use super::traffic::Traffic;
use crate::spec::Sqe;
use crate::transport::Transfer;

/// Time-outs that an answer may take while other commands are answered.
const PATIENCE: u32 = 4;

/// The task; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct KeepAlive(JoinHandle<()>);

impl Drop for KeepAlive {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl KeepAlive {
    /// Starts sending, the first at once. `traffic` is of a controller that counts it.
    pub(super) fn start(admin: Admin, kato: Duration, traffic: Option<Traffic>) -> Self {
        Self(tokio::spawn(run(admin, kato, traffic)))
    }
}

async fn run(admin: Admin, kato: Duration, traffic: Option<Traffic>) {
    let mut due = Beats::new(kato);
    let mut period_ends = pin!(sleep(Duration::ZERO));
    let (last_traffic, _) = watch::channel(None);
    // A slow answer does not hold the next command up, so there are a few at a time: at most four, and ten while
    // the controller answers others.
    let mut beats = JoinSet::new();
    loop {
        tokio::select! {
            () = &mut period_ends => {
                // Before the next period begins: what comes in it comes later than now.
                let now = Instant::now();
                let passed = traffic.as_ref().is_some_and(Traffic::next_period);
                let send = due.next(now, passed);
                last_traffic.send_replace(due.last_traffic());
                period_ends.as_mut().reset(now + due.period());
                if send {
                    let (admin, alive) = (admin.clone(), last_traffic.subscribe());
                    beats.spawn(async move { beat(&admin, kato, alive).await });
                }
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
/// queue has reported it. `alive` is a time after which the controller has received a
/// command.
async fn beat(
    admin: &Admin,
    kato: Duration,
    alive: watch::Receiver<Option<Instant>>,
) -> Result<(), Option<Loss>> {
    let within = kato.saturating_mul(PATIENCE);
    let answer = admin.execute_within("Keep Alive", Sqe::keep_alive(), Transfer::None, within);
    let mut answer = pin!(answer);
    let begun = Instant::now();
    let mut waited = Duration::ZERO;
    let answer = loop {
        let since = begun + waited;
        waited += kato;
        match timeout_at(begun + waited, &mut answer).await {
            Ok(answer) => break answer,
            // It answers others, and may come round to this one.
            Err(_) if *alive.borrow() >= Some(since) && waited < within => {}
            Err(_) => return Err(Some(Loss::KeepAlive(waited))),
        }
    };
    match answer {
        Ok(_) => {}
        // It lives, if it does not like the command.
        Err(HostError::Command { status, .. }) => {
            tracing::debug!(controller = %admin.at(), "Keep Alive: {status}");
        }
        Err(HostError::TimedOut { after, .. }) => return Err(Some(Loss::KeepAlive(after))),
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
