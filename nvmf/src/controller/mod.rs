//! Subsystems, ports and controllers that remote hosts connect to.
//!
//! A [`Port`] accepts connections. The first command on each must be Connect: on an admin queue it
//! makes an association with a controller of its own (the dynamic model), whose admin queue stays on
//! the control plane; an I/O queue joins an association and is handed to a worker as a
//! [`TargetLane`], through the [`LaneHost`] that the daemon gives.
//!
//! What several threads share has one owner: the association owns its registers and the list of its
//! I/O queues behind one lock that no I/O command takes; a lane learns that it must end from a
//! one-shot message, and tells that traffic flows by one relaxed store in a turn.
//!
//! A reset or shutdown is reported as done only when every I/O queue is gone with nothing in flight
//! at a backend, and, for a shutdown, the backends were flushed: what a host writes elsewhere after
//! that cannot be overtaken.

mod admin;
mod ana;
mod association;
mod buffers;
mod compare;
mod connection;
mod cross_reset;
mod discovery;
mod fabrics;
mod features;
mod identify;
mod io;
mod lane;
mod log_page;
mod notices;
mod port;
mod quota;
mod ranges;
mod registers;
mod session;
#[cfg(feature = "sim")]
mod simulated;
mod subsystem;

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::backend::Engine;
use crate::spec::Nqn;
pub use crate::spec::ana::AnaState;
use crate::transport::{Counters, Lane, Registry};
pub use lane::TargetLane;
pub use port::{BindError, LocalPort, Port};
#[cfg(feature = "sim")]
pub(crate) use simulated::SimulatedLane;
pub use subsystem::{Namespace, NamespaceError, Subsystem};

/// Smallest memory page that the controller declares (CAP.MPSMIN 0), in bytes.
const PAGE: u32 = 4096;

/// What bounds a target. Every number is a promise to hosts or a defence against them.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at a time, of any kind.
    pub max_connections: usize,
    /// Associations at a time, over all subsystems.
    pub max_associations: usize,
    /// Largest I/O queue in entries (2 to 65536); CAP.MQES tells hosts.
    pub queue_size: u32,
    /// I/O queues of one association.
    pub io_queues: u16,
    /// Largest data transfer of one command in bytes: a power of two, at least 4096; MDTS tells
    /// hosts.
    pub max_transfer: u32,
    /// Largest in-capsule data of an I/O command in bytes: a multiple of 16; IOCCSZ tells hosts.
    pub in_capsule: u32,
    /// Asynchronous Event Requests held for one association.
    pub async_events: u8,
    /// Cross-Controller Resets that one controller sees to at a time; CCRL tells hosts. With 0 there
    /// are none.
    pub cross_resets: u8,
    /// Time from accepting a connection to a successful Connect.
    pub handshake: Duration,
    /// Time that an association may stay disabled, from Connect, reset or shutdown on.
    pub disabled: Duration,
    /// Time that a host without a keep-alive may be silent to a discovery controller (Base,
    /// "Discovery controller activity timeout").
    pub discovery_idle: Duration,
    /// Staging memory of one lane in bytes, at least twice `max_transfer`: a Compare takes that.
    pub lane_buffers: usize,
    /// How file backends reach the kernel.
    pub engine: Engine,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_associations: 256,
            queue_size: 1024,
            io_queues: 128,
            max_transfer: 1 << 20,
            in_capsule: 8192,
            async_events: 16,
            cross_resets: 4,
            handshake: Duration::from_secs(10),
            disabled: Duration::from_secs(120),
            discovery_idle: Duration::from_secs(120),
            lane_buffers: 8 << 20,
            engine: Engine::Auto,
        }
    }
}

/// Where I/O queues go to be driven.
pub trait LaneHost: Send + Sync {
    /// Places a lane on a worker, which calls `lane` on its own thread and drives what it returns
    /// until it has ended. Dropping `lane` uncalled ends the queue.
    fn place(&self, lane: Box<dyn FnOnce() -> Box<dyn Lane> + Send>);
}

/// Why a set of subsystems is no target.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Two subsystems have one name; the discovery subsystem, which every target has, is one.
    #[error("two subsystems are named {0}; every subsystem needs a name of its own")]
    DuplicateNqn(Nqn),
    /// A limit cannot be promised.
    #[error("limit {0} is out of range")]
    Limit(&'static str),
}

/// Subsystems and what bounds their use: shared by every port.
pub struct Target {
    subsystems: Vec<Arc<Subsystem>>,
    /// The subsystem that lists the others.
    discovery: Arc<Subsystem>,
    listeners: Mutex<discovery::Listeners>,
    limits: Limits,
    registry: Arc<Registry>,
    lanes: Arc<dyn LaneHost>,
    associations: AtomicUsize,
    totals: Arc<Totals>,
    quota: quota::Quota,
}

impl Target {
    /// A target of these subsystems, and of a discovery subsystem that lists them.
    ///
    /// # Errors
    /// [`TargetError`].
    pub fn new(
        subsystems: Vec<Subsystem>,
        limits: Limits,
        registry: Arc<Registry>,
        lanes: Arc<dyn LaneHost>,
    ) -> Result<Self, TargetError> {
        for (index, subsystem) in subsystems.iter().enumerate() {
            let mut before = subsystems[..index].iter();
            if subsystem.is_discovery() || before.any(|other| other.nqn() == subsystem.nqn()) {
                return Err(TargetError::DuplicateNqn(subsystem.nqn().clone()));
            }
        }
        check(&limits)?;
        let serial = subsystems.first().map_or("1", Subsystem::serial);
        let discovery = Subsystem::new(Nqn::discovery(), serial);
        Ok(Self {
            subsystems: subsystems.into_iter().map(Arc::new).collect(),
            discovery: Arc::new(discovery),
            listeners: Mutex::default(),
            limits,
            registry,
            lanes,
            associations: AtomicUsize::new(0),
            totals: Arc::default(),
            quota: quota::Quota::new(),
        })
    }

    /// The subsystems.
    pub fn subsystems(&self) -> &[Arc<Subsystem>] {
        &self.subsystems
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Associations now.
    pub fn associations(&self) -> usize {
        self.associations.load(Relaxed)
    }

    /// Counters of the I/O queues that have ended, added up.
    pub fn totals(&self) -> Counters {
        self.totals.read()
    }
}

fn check(limits: &Limits) -> Result<(), TargetError> {
    let transfer = limits.max_transfer;
    let checks = [
        ((2..=65536).contains(&limits.queue_size), "queue_size"),
        ((1..=65535).contains(&limits.io_queues), "io_queues"),
        (
            transfer.is_power_of_two() && (PAGE..=1 << 27).contains(&transfer),
            "max_transfer",
        ),
        (
            limits.in_capsule.is_multiple_of(16) && limits.in_capsule <= 1 << 20,
            "in_capsule",
        ),
        (limits.async_events > 0, "async_events"),
        (limits.lane_buffers / 2 >= transfer as usize, "lane_buffers"),
    ];
    match checks.iter().find(|(good, _)| !good) {
        Some((_, name)) => Err(TargetError::Limit(name)),
        None => Ok(()),
    }
}

/// Sums of [`Counters`].
#[derive(Debug, Default)]
struct Totals {
    copied_bytes: AtomicU64,
    sends: AtomicU64,
    receives: AtomicU64,
}

impl Totals {
    fn add(&self, counters: Counters) {
        self.copied_bytes.fetch_add(counters.copied_bytes, Relaxed);
        self.sends.fetch_add(counters.sends, Relaxed);
        self.receives.fetch_add(counters.receives, Relaxed);
    }

    fn read(&self) -> Counters {
        Counters {
            copied_bytes: self.copied_bytes.load(Relaxed),
            sends: self.sends.load(Relaxed),
            receives: self.receives.load(Relaxed),
        }
    }
}
