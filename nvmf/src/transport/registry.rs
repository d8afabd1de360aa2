//! The registry of transports: by type and priority, counting the queue pairs that use each.
//!
//! A transport that is to go has to be idle. [`Registry::remove`] asks once; [`Registry::leave`]
//! keeps new queue pairs away while it waits for those there are. Either the transport is gone
//! afterwards, or everything is as it was before: a wait that ran out or was given up leaves the
//! transport registered, at its place, and taking queue pairs again. Both can be tried again.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::Notify;

pub use super::connection::Connection;
use super::{ControllerQueuePair, HostQueuePair, loopback, tcp};

/// A connected queue pair as the control plane hands it to a transport.
#[derive(Debug)]
pub struct QueueParams<C = Connection> {
    /// Admin queue, otherwise I/O.
    pub admin: bool,
    /// Queue size in entries (2 to 65536); one fewer can be outstanding.
    pub queue_size: u32,
    /// SQ flow control is on: every response carries SQHD.
    pub sq_flow_control: bool,
    /// Largest in-capsule data in bytes: what the host may send, or the controller accepts.
    pub in_capsule_limit: u32,
    /// The connection, negotiated.
    pub connection: C,
    /// Kept by the queue pair as long as it lives: how the registry counts who uses a transport.
    pub lease: Lease,
}

impl QueueParams {
    /// The same for a transport that takes one kind of connection only.
    ///
    /// # Errors
    /// Itself, to be declined, when the connection is of another kind.
    pub fn over<C: Any>(self) -> Result<QueueParams<C>, Box<Self>> {
        match self.connection.take() {
            Ok(connection) => Ok(QueueParams {
                admin: self.admin,
                queue_size: self.queue_size,
                sq_flow_control: self.sq_flow_control,
                in_capsule_limit: self.in_capsule_limit,
                connection,
                lease: self.lease,
            }),
            Err(connection) => Err(Box::new(Self { connection, ..self })),
        }
    }
}

/// Counts as one user of a transport until it is dropped, and keeps the transport alive.
#[derive(Default)]
pub struct Lease(Option<Arc<Entry>>);

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.0.as_ref().map(|entry| entry.transport.name());
        f.debug_tuple("Lease").field(&name).finish()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(entry) = &self.0 {
            let mut users = entry.users();
            users.queue_pairs -= 1;
            let idle = users.queue_pairs == 0;
            drop(users);
            if idle {
                entry.idle.notify_waiters();
            }
        }
    }
}

/// A transport's answer to a queue pair that it is offered.
pub enum Opening<P: ?Sized> {
    /// Taken.
    Opened(Box<P>),
    /// Not for this transport: the next by priority is asked.
    Declined(Box<QueueParams>),
}

/// A way to move capsules. Higher priorities are asked first.
pub trait Transport: Send + Sync {
    /// Name for messages, of its own in a registry.
    fn name(&self) -> &'static str;

    /// Transport type: see [`crate::spec::trtype`].
    fn trtype(&self) -> u8;

    /// Software TCP has 0; anything special is above.
    fn priority(&self) -> i32;

    /// Opens the host's side of a connected queue pair.
    fn open_host(&self, params: Box<QueueParams>) -> Opening<dyn HostQueuePair>;

    /// Opens the controller's side of a connected queue pair.
    fn open_controller(&self, params: Box<QueueParams>) -> Opening<dyn ControllerQueuePair>;
}

/// Why no queue pair was opened, or a transport did not come or go.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// No transport of this type is registered.
    #[error("no transport of type {0:#x} is available")]
    UnknownType(u8),
    /// Every transport of the type declined.
    #[error("no transport of type {0:#x} takes this queue pair")]
    Declined(u8),
    /// Every transport of the type is about to leave.
    #[error("the transport of type {0:#x} is leaving and takes no new queue pairs")]
    Leaving(u8),
    /// No transport of this name is registered.
    #[error("no transport is named {0}")]
    UnknownName(String),
    /// A transport of this name is registered already.
    #[error("a transport named {0} is there already")]
    NameTaken(&'static str),
    /// The transport has queue pairs.
    #[error("transport {name} is in use by {queue_pairs} queue pairs")]
    Busy {
        /// The transport.
        name: &'static str,
        /// Queue pairs alive.
        queue_pairs: usize,
    },
}

struct Entry {
    transport: Box<dyn Transport>,
    users: Mutex<Users>,
    /// Told when the last queue pair has gone.
    idle: Notify,
}

#[derive(Default)]
struct Users {
    queue_pairs: usize,
    /// Who waits for the transport to be idle; no queue pair is added meanwhile.
    leavers: usize,
    /// Not in the registry any more.
    gone: bool,
}

impl Entry {
    fn users(&self) -> MutexGuard<'_, Users> {
        // Numbers and a flag: never half-changed.
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a queue pair before the transport is asked for it. `None` when it is leaving.
    fn enter(self: &Arc<Self>) -> Option<Lease> {
        let mut users = self.users();
        if users.gone || users.leavers > 0 {
            return None;
        }
        users.queue_pairs += 1;
        Some(Lease(Some(Arc::clone(self))))
    }

    async fn idle(&self) {
        loop {
            let mut told = std::pin::pin!(self.idle.notified());
            // From here on a last queue pair that goes is not missed.
            told.as_mut().enable();
            if self.is_idle() {
                return;
            }
            told.await;
        }
    }

    fn is_idle(&self) -> bool {
        let users = self.users();
        users.gone || users.queue_pairs == 0
    }
}

/// Keeps new queue pairs away from a transport until it is dropped.
struct Closed<'a>(&'a Entry);

impl<'a> Closed<'a> {
    fn new(entry: &'a Entry) -> Self {
        entry.users().leavers += 1;
        Self(entry)
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.users().leavers -= 1;
    }
}

/// Transports, highest priority first; equal priorities in order of arrival.
#[derive(Default)]
pub struct Registry {
    entries: RwLock<Vec<Arc<Entry>>>,
}

impl Registry {
    /// A registry with nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// The registry of this build: software TCP and loopback.
    pub fn with_defaults() -> Self {
        let registry = Self::new();
        let defaults: [Box<dyn Transport>; 2] = [Box::new(tcp::Tcp), Box::new(loopback::Loopback)];
        for transport in defaults {
            let added = registry.add(transport);
            debug_assert_eq!(added, Ok(()), "names are different");
        }
        registry
    }

    /// Registers a transport.
    ///
    /// # Errors
    /// [`RegistryError::NameTaken`].
    pub fn add(&self, transport: Box<dyn Transport>) -> Result<(), RegistryError> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let name = transport.name();
        if entries.iter().any(|entry| entry.transport.name() == name) {
            return Err(RegistryError::NameTaken(name));
        }
        let priority = transport.priority();
        let at = entries.partition_point(|entry| entry.transport.priority() >= priority);
        let entry = Entry {
            transport,
            users: Mutex::default(),
            idle: Notify::new(),
        };
        entries.insert(at, Arc::new(entry));
        Ok(())
    }

    /// Takes a transport out that nothing uses; otherwise nothing is changed.
    ///
    /// # Errors
    /// [`RegistryError::Busy`] while queue pairs use it; [`RegistryError::UnknownName`].
    pub fn remove(&self, name: &str) -> Result<(), RegistryError> {
        self.take_out(&*self.find(name)?)
    }

    /// Takes a transport out as soon as nothing uses it, within `patience`. It is offered no queue
    /// pairs meanwhile. When time runs out or the future is dropped, it stays and is offered them
    /// again. To be called in a tokio runtime with time.
    ///
    /// # Errors
    /// [`RegistryError::Busy`] when queue pairs were left; [`RegistryError::UnknownName`].
    pub async fn leave(&self, name: &str, patience: Duration) -> Result<(), RegistryError> {
        let entry = self.find(name)?;
        let _closed = Closed::new(&entry);
        // The last one may go just after the time has run out: what counts is what is there then.
        let _ = tokio::time::timeout(patience, entry.idle()).await;
        self.take_out(&entry)
    }

    /// Queue pairs alive on a transport.
    pub fn queue_pairs(&self, name: &str) -> usize {
        self.find(name).map_or(0, |entry| entry.users().queue_pairs)
    }

    /// Opens the host's side of a connected queue pair with the first transport that takes it.
    ///
    /// # Errors
    /// [`RegistryError::UnknownType`], [`RegistryError::Declined`] or [`RegistryError::Leaving`].
    pub fn open_host(
        &self,
        trtype: u8,
        params: QueueParams,
    ) -> Result<Box<dyn HostQueuePair>, RegistryError> {
        self.open(trtype, params, |transport, params| {
            transport.open_host(params)
        })
    }

    /// Opens the controller's side of a connected queue pair with the first transport that takes
    /// it.
    ///
    /// # Errors
    /// [`RegistryError::UnknownType`], [`RegistryError::Declined`] or [`RegistryError::Leaving`].
    pub fn open_controller(
        &self,
        trtype: u8,
        params: QueueParams,
    ) -> Result<Box<dyn ControllerQueuePair>, RegistryError> {
        self.open(trtype, params, |transport, params| {
            transport.open_controller(params)
        })
    }

    fn open<P: ?Sized>(
        &self,
        trtype: u8,
        params: QueueParams,
        open: impl Fn(&dyn Transport, Box<QueueParams>) -> Opening<P>,
    ) -> Result<Box<P>, RegistryError> {
        let mut params = Box::new(params);
        let mut error = RegistryError::UnknownType(trtype);
        // No lock is held while a transport opens: it may take its time, and ask here itself.
        for entry in self.of_type(trtype) {
            let Some(lease) = entry.enter() else {
                if error == RegistryError::UnknownType(trtype) {
                    error = RegistryError::Leaving(trtype);
                }
                continue;
            };
            params.lease = lease;
            match open(entry.transport.as_ref(), params) {
                Opening::Opened(pair) => return Ok(pair),
                Opening::Declined(back) => params = back,
            }
            error = RegistryError::Declined(trtype);
        }
        Err(error)
    }

    fn of_type(&self, trtype: u8) -> Vec<Arc<Entry>> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let matching = entries
            .iter()
            .filter(|entry| entry.transport.trtype() == trtype);
        matching.cloned().collect()
    }

    fn find(&self, name: &str) -> Result<Arc<Entry>, RegistryError> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let found = entries.iter().find(|entry| entry.transport.name() == name);
        found
            .cloned()
            .ok_or_else(|| RegistryError::UnknownName(name.to_owned()))
    }

    fn take_out(&self, leaving: &Entry) -> Result<(), RegistryError> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let mut users = leaving.users();
        if users.queue_pairs > 0 {
            return Err(RegistryError::Busy {
                name: leaving.transport.name(),
                queue_pairs: users.queue_pairs,
            });
        }
        // It may have been taken out by someone else meanwhile.
        users.gone = true;
        entries.retain(|entry| !std::ptr::eq(&**entry, leaving));
        Ok(())
    }
}
