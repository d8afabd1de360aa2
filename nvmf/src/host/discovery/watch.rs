//! Stays connected to a discovery controller, and tells when its log changes.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout_at};

use super::controller::DiscoveryController;
use super::referrals::follow;
use super::{Discovery, resolve, unusable};
use crate::host::address::{TargetAddress, share};
use crate::host::dial::{Dial, Tcp, rounded};
use crate::host::error::{HostError, Loss};
use crate::host::events::{Events, HostEvent};
use crate::host::keepalive::KeepAlive;
use crate::host::options::HostOptions;
use crate::spec::Nqn;
use crate::spec::event::config;
use crate::transport::Registry;

/// How often a log is looked at whose controller does not tell that it changes.
const LOOK: Duration = Duration::from_secs(300);
/// How soon it is looked at for a second time: what changed before the controller was asked to tell of it is not
/// told.
const SOON: Duration = Duration::from_secs(2);

/// A discovery controller that stays connected. Dropping it closes the connection.
#[derive(Debug)]
pub struct DiscoveryWatch {
    // Ends before the queue that it uses.
    events: Events,
    keep_alive: Option<KeepAlive>,
    news: mpsc::Receiver<HostEvent>,
    /// How long the log may go without a look.
    look: Option<Duration>,
    /// It tells when its log changes.
    tells: bool,
    losses: watch::Receiver<Option<Loss>>,
    controller: DiscoveryController,
    options: HostOptions,
}

impl DiscoveryWatch {
    /// Connects to a discovery controller, at the first of `targets` where one answers, and asks it to tell of
    /// changes from now on. It takes no longer than [`HostOptions::connect_timeout`]; the connection is kept
    /// alive as [`HostOptions::keep_alive_tmo`] says.
    ///
    /// # Errors
    /// As [`super::discover`].
    pub async fn connect(
        registry: &Registry,
        targets: &[TargetAddress],
        options: &HostOptions,
    ) -> Result<Self, HostError> {
        let end = Instant::now() + options.connect_timeout;
        let addresses = resolve(targets, end).await?;
        Self::connect_over(&Tcp::new(registry, options), &addresses, options, end).await
    }

    pub(in crate::host) async fn connect_over(
        dial: &impl Dial,
        addresses: &[(SocketAddr, Nqn)],
        options: &HostOptions,
        end: Instant,
    ) -> Result<Self, HostError> {
        let kato = options.check()?;
        let mut best: Option<HostError> = None;
        for (tried, (at, subnqn)) in addresses.iter().enumerate() {
            let begun = Instant::now();
            let deadline = share(begun, end, addresses.len() - tried);
            let to = (*at, subnqn);
            let connect = DiscoveryController::connect(dial, to, options, kato, (begun, deadline));
            let connected = timeout_at(deadline, connect).await.unwrap_or_else(|_| {
                let after = rounded(deadline.saturating_duration_since(begun));
                Err(unusable(*at, format!("it was not ready within {after:?}")))
            });
            match connected {
                Ok(controller) => return Ok(Self::of(controller, options, kato)),
                Err(error) => {
                    tracing::debug!("{error}");
                    if best.as_ref().is_none_or(|it| it.depth() <= error.depth()) {
                        best = Some(error);
                    }
                }
            }
        }
        Err(best.unwrap_or_else(super::nobody))
    }

    fn of(controller: DiscoveryController, options: &HostOptions, kato: u32) -> Self {
        let admin = &controller.admin;
        let (events, news) = Events::start(admin.clone(), controller.events, true);
        Self {
            events,
            keep_alive: (kato != 0)
                .then(|| KeepAlive::start(admin.clone(), Duration::from_millis(kato.into()), None)),
            news,
            look: Some(SOON),
            tells: controller.events.optional & config::DISCOVERY_CHANGE != 0,
            losses: controller.losses.subscribe(),
            controller,
            options: options.clone(),
        }
    }

    /// Its address.
    pub fn address(&self) -> SocketAddr {
        self.controller.admin.at()
    }

    /// Reads its log, and follows referrals as [`super::explore`].
    ///
    /// # Errors
    /// As [`super::discover`].
    pub async fn explore(&self, registry: &Registry) -> Result<Discovery, HostError> {
        self.explore_over(&Tcp::new(registry, &self.options)).await
    }

    pub(in crate::host) async fn explore_over(
        &self,
        dial: &impl Dial,
    ) -> Result<Discovery, HostError> {
        let begun = Instant::now();
        let span = (begun, begun + self.options.connect_timeout);
        let log = self.controller.read_log(span).await?;
        Ok(follow(dial, log, &self.options).await)
    }

    /// Waits until the log may have changed since it was read. Where the controller does not tell, that is so
    /// from time to time. Cancel-safe.
    ///
    /// # Errors
    /// The controller is lost.
    pub async fn changed(&mut self) -> Result<(), HostError> {
        loop {
            let look = self.look;
            let look = async {
                match look {
                    Some(after) => sleep(after).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = self.news.recv(), if self.tells => match event {
                    Some(HostEvent::Discovery | HostEvent::Missed) => return Ok(()),
                    Some(_) => {}
                    // It is lost, which is told too, or reports nothing any more.
                    None => {
                        self.tells = false;
                        self.look = Some(LOOK);
                    }
                },
                // Its sender is kept by this very association.
                _ = self.losses.changed() => {
                    let loss = self.losses.borrow().clone();
                    if let Some(loss) = loss {
                        return Err(self.lost(loss));
                    }
                }
                () = look => {
                    self.look = (!self.tells).then_some(LOOK);
                    return Ok(());
                }
            }
        }
    }

    fn lost(&self, loss: Loss) -> HostError {
        HostError::Lost {
            at: self.address(),
            command: "Asynchronous Event Request",
            loss,
        }
    }

    /// Shuts the controller down, within this time, and closes the connection.
    pub async fn close(self, within: Duration) {
        drop(self.keep_alive);
        drop(self.events);
        self.controller.close(within).await;
    }
}
