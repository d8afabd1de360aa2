//! The registry of transports: by type and priority, counting the queue pairs that use each.

use std::sync::Arc;

use super::{ControllerQueuePair, HostQueuePair, loopback, tcp};

/// What a queue pair runs over. A transport declines what is not its own.
#[derive(Debug)]
pub enum Connection {
    /// A TCP connection.
    Tcp(tcp::Connection),
    /// One end of a connection inside this process.
    Loopback(loopback::Connection),
}

impl From<tcp::Connection> for Connection {
    fn from(connection: tcp::Connection) -> Self {
        Self::Tcp(connection)
    }
}

impl From<loopback::Connection> for Connection {
    fn from(connection: loopback::Connection) -> Self {
        Self::Loopback(connection)
    }
}

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
    /// The same for a transport that takes one kind of connection only; as it was when `pick`
    /// says that this one is of another kind.
    pub(super) fn over<C>(
        self,
        pick: impl FnOnce(Connection) -> Result<C, Connection>,
    ) -> Result<QueueParams<C>, Box<Self>> {
        let Self {
            admin,
            queue_size,
            sq_flow_control,
            in_capsule_limit,
            connection,
            lease,
        } = self;
        match pick(connection) {
            Ok(connection) => Ok(QueueParams {
                admin,
                queue_size,
                sq_flow_control,
                in_capsule_limit,
                connection,
                lease,
            }),
            Err(connection) => Err(Box::new(Self {
                admin,
                queue_size,
                sq_flow_control,
                in_capsule_limit,
                connection,
                lease,
            })),
        }
    }
}

/// Counts as one user of a transport until it is dropped.
#[derive(Debug, Default)]
pub struct Lease(#[expect(dead_code, reason = "held for its count")] Option<Arc<()>>);

/// A transport's answer to a queue pair that it is offered.
pub enum Opening<P: ?Sized> {
    /// Taken.
    Opened(Box<P>),
    /// Not for this transport: the next by priority is asked.
    Declined(Box<QueueParams>),
}

/// A way to move capsules. Higher priorities are asked first.
pub trait Transport: Send + Sync {
    /// Name for messages.
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

/// Why no queue pair was opened, or a transport did not leave.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// No transport of this type is registered.
    #[error("no transport of type {0:#x} is available")]
    UnknownType(u8),
    /// Every transport of the type declined.
    #[error("no transport of type {0:#x} takes this queue pair")]
    Declined(u8),
    /// No transport of this name is registered.
    #[error("no transport is named {0}")]
    UnknownName(String),
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
    users: Arc<()>,
}

/// Transports, highest priority first; equal priorities in order of arrival.
#[derive(Default)]
pub struct Registry {
    entries: Vec<Entry>,
}

impl Registry {
    /// A registry with nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// The registry of this build: software TCP and loopback.
    pub fn with_defaults() -> Self {
        let mut registry = Self::new();
        registry.add(Box::new(tcp::Tcp));
        registry.add(Box::new(loopback::Loopback));
        registry
    }

    /// Registers a transport.
    pub fn add(&mut self, transport: Box<dyn Transport>) {
        let priority = transport.priority();
        let at = self
            .entries
            .partition_point(|entry| entry.transport.priority() >= priority);
        self.entries.insert(
            at,
            Entry {
                transport,
                users: Arc::new(()),
            },
        );
    }

    /// Takes a transport out.
    ///
    /// # Errors
    /// [`RegistryError::Busy`] while queue pairs use it; [`RegistryError::UnknownName`].
    pub fn remove(&mut self, name: &str) -> Result<(), RegistryError> {
        let at = self
            .entries
            .iter()
            .position(|entry| entry.transport.name() == name)
            .ok_or_else(|| RegistryError::UnknownName(name.to_owned()))?;
        let entry = &self.entries[at];
        match Arc::strong_count(&entry.users) - 1 {
            0 => drop(self.entries.remove(at)),
            queue_pairs => {
                return Err(RegistryError::Busy {
                    name: entry.transport.name(),
                    queue_pairs,
                });
            }
        }
        Ok(())
    }

    /// Queue pairs alive on a transport.
    pub fn queue_pairs(&self, name: &str) -> usize {
        let entry = self
            .entries
            .iter()
            .find(|entry| entry.transport.name() == name);
        entry.map_or(0, |entry| Arc::strong_count(&entry.users) - 1)
    }

    /// Opens the host's side of a connected queue pair with the first transport that takes it.
    ///
    /// # Errors
    /// [`RegistryError::UnknownType`] or [`RegistryError::Declined`].
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
    /// [`RegistryError::UnknownType`] or [`RegistryError::Declined`].
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
        let mut known = false;
        for entry in self
            .entries
            .iter()
            .filter(|entry| entry.transport.trtype() == trtype)
        {
            known = true;
            params.lease = Lease(Some(Arc::clone(&entry.users)));
            match open(entry.transport.as_ref(), params) {
                Opening::Opened(pair) => return Ok(pair),
                Opening::Declined(back) => params = back,
            }
        }
        Err(if known {
            RegistryError::Declined(trtype)
        } else {
            RegistryError::UnknownType(trtype)
        })
    }
}
