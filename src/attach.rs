//! Attaches a disk: finds the way to it, and remembers it for a start at which there is none.

use std::convert::Infallible;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use nvmf::host::{HostError, NamespaceInfo, TargetAddress};
use nvmf::transport::Registry;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::config::{AttachConfig, AttachPlan, Source};
use crate::disk::{Backing, Disk};
use crate::finding::{self, FindError};
use crate::rediscovery::Rediscovery;
use crate::remembered::{Remembered, StateDirectory};
use crate::worker::pool::Workers;

/// How long a target is waited for whose disk is remembered: a VMM waits, too.
const HEAD_START: Duration = Duration::from_secs(1);

/// A disk, and what goes on beside it.
pub(crate) struct Attached {
    /// The disk.
    pub(crate) disk: Disk,
    /// As what it was attached.
    pub(crate) config: AttachConfig,
    beside: Beside,
}

/// What goes on beside a disk that is served.
pub(crate) struct Beside {
    rediscovery: Option<Rediscovery>,
    memory: Option<Memory>,
    namespace: watch::Receiver<NamespaceInfo>,
    /// Where paths are told that are new.
    more: mpsc::Sender<TargetAddress>,
}

/// What a disk is remembered as.
struct Memory {
    state: StateDirectory,
    /// What it was asked for as.
    name: String,
    remembered: Remembered,
}

/// Why no way leads to a disk now.
#[derive(Debug, thiserror::Error)]
enum Away {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("the target has not answered within {HEAD_START:?}")]
    Slow,
}

impl Away {
    /// It is not known to be wrong: the target may just not be there now.
    fn may_pass(&self) -> bool {
        match self {
            Self::Find(FindError::NoAnswer(error)) | Self::Host(error) => error.may_pass(),
            // A target that restarts tells what it has one by one.
            Self::Find(FindError::NoMatch { .. }) | Self::Slow => true,
            Self::Find(FindError::Several { .. } | FindError::NoWay { .. }) => false,
        }
    }
}

impl Attached {
    /// Attaches the disk by the first way that leads to it. When none does, but the disk is remembered, it is there
    /// all the same: with the geometry that it had, and requests are held.
    ///
    /// # Errors
    /// One line for the user; nothing stays open then.
    pub(crate) async fn attach(
        registry: Arc<Registry>,
        plan: &AttachPlan,
        workers: &Workers,
    ) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let state = StateDirectory::open(plan.state_directory())?;
        let name = plan.to_string();
        let remembered = state.as_ref().and_then(|state| state.load(&name));
        let connect = Self::connect(&registry, plan);
        let connected = match remembered {
            Some(_) => timeout(HEAD_START, connect)
                .await
                .unwrap_or(Err(Away::Slow)),
            None => connect.await,
        };
        let error = match connected {
            Ok((mut backing, config, ways)) => {
                backing.others = others(&ways);
                let rediscovery = rediscovery(&registry, plan, &config, ways.clone());
                let remembered = Remembered {
                    namespace: backing.namespace.clone(),
                    io_queues: u16::try_from(backing.lanes).unwrap_or(u16::MAX),
                    ways,
                };
                let memory = state.map(|state| Memory {
                    state,
                    name,
                    remembered,
                });
                if let Some(memory) = &memory {
                    memory.store();
                }
                return Ok(Self::new(backing, config, rediscovery, memory, workers).await);
            }
            Err(error) => error,
        };
        let (Some(state), Some(remembered), true) = (state, remembered, error.may_pass()) else {
            return Err(error.into());
        };
        // There is at least one.
        let Some(way) = remembered.ways.first() else {
            return Err(error.into());
        };
        let config = plan.config(way.clone());
        tracing::warn!(
            disk = %config.uri,
            "{error}; the disk is offered as it was before, and requests wait until its target is there"
        );
        let mut backing = Disk::away(Arc::clone(&registry), &config, &remembered);
        backing.others = others(&remembered.ways);
        let rediscovery = rediscovery(&registry, plan, &config, remembered.ways.clone());
        let memory = Some(Memory {
            state,
            name,
            remembered,
        });
        Ok(Self::new(backing, config, rediscovery, memory, workers).await)
    }

    /// Connects by the first way that can be gone. Gives all ways, that one first.
    async fn connect(
        registry: &Arc<Registry>,
        plan: &AttachPlan,
    ) -> Result<(Backing, AttachConfig, Vec<TargetAddress>), Away> {
        let mut ways = match &plan.source {
            Source::Paths(paths) => paths.clone(),
            Source::Search(search) => {
                let ways = finding::find(registry, search, &plan.host()).await?;
                for way in &ways {
                    tracing::info!(%search, %way, "found by discovery");
                }
                ways
            }
        };
        let mut failed = None;
        for at in 0..ways.len() {
            let config = plan.config(ways[at].clone());
            match Disk::connect(Arc::clone(registry), &config).await {
                Ok(backing) => {
                    ways[..=at].rotate_right(1);
                    return Ok((backing, config, ways));
                }
                Err(error) => {
                    if at + 1 < ways.len() {
                        tracing::warn!(path = %config.uri, "{error}; the next path is tried");
                    }
                    failed = Some(error);
                }
            }
        }
        Err(Away::Host(failed.unwrap_or_else(|| HostError::Resolve {
            host: plan.to_string(),
            reason: "there is no path".to_owned(),
        })))
    }

    async fn new(
        backing: Backing,
        config: AttachConfig,
        rediscovery: Option<Rediscovery>,
        memory: Option<Memory>,
        workers: &Workers,
    ) -> Self {
        let disk = Disk::new(backing, config.choices(), workers).await;
        let beside = Beside {
            rediscovery,
            memory,
            namespace: disk.namespace(),
            more: disk.more_paths(),
        };
        Self {
            disk,
            config,
            beside,
        }
    }

    /// The disk, and what goes on beside it.
    pub(crate) fn into_parts(self) -> (Disk, Beside) {
        (self.disk, self.beside)
    }
}

/// The ways but the first, which is the one that is gone at the start.
fn others(ways: &[TargetAddress]) -> Vec<TargetAddress> {
    ways.iter().skip(1).cloned().collect()
}

fn rediscovery(
    registry: &Arc<Registry>,
    plan: &AttachPlan,
    config: &AttachConfig,
    ways: Vec<TargetAddress>,
) -> Option<Rediscovery> {
    let Source::Search(search) = &plan.source else {
        return None;
    };
    let (disk, registry) = (config.uri.to_string(), Arc::clone(registry));
    Some(Rediscovery::new(
        disk,
        registry,
        search.clone(),
        &config.host,
        ways,
    ))
}

impl Beside {
    /// Goes on for as long as the disk does. Never ends.
    pub(crate) async fn run(self) -> Infallible {
        let rediscovered = async {
            match self.rediscovery {
                Some(rediscovery) => {
                    let more = self.more;
                    // A disk that has as many as it takes needs no more.
                    rediscovery
                        .run(|way| drop(more.try_send(way.clone())))
                        .await;
                }
                None => std::future::pending().await,
            }
        };
        tokio::join!(rediscovered, remember(self.memory, self.namespace));
        std::future::pending().await
    }
}

/// Remembers the namespace whenever it is another than before. Never ends.
async fn remember(memory: Option<Memory>, mut namespace: watch::Receiver<NamespaceInfo>) {
    if let Some(mut memory) = memory {
        while namespace.changed().await.is_ok() {
            memory.remembered.namespace = namespace.borrow_and_update().clone();
            memory.store();
        }
    }
    std::future::pending().await
}

impl Memory {
    fn store(&self) {
        self.state.store(&self.name, &self.remembered);
    }
}
