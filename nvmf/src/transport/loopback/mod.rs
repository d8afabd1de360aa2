//! A fabric inside one process: capsules and descriptions of memory change hands, and no bytes.
//!
//! What one end queues in a turn, a flush hands over in one piece: the lists of both ends are
//! swapped under a lock that is taken for each turn, not for each command. The memory of a command
//! travels with its capsule, and comes back with the answer.
//!
//! Two ends in different tasks wake each other through a socket pair, and data is copied between
//! their memories, under the lock, so that a host's end that goes away takes its memory with it at
//! once. Two ends that one owner drives on one thread are [`Coupled`]: nothing is woken, and the
//! controller may borrow the host's memory, since the owner lets go of the controller's end first.

mod controller;
mod coupled;
mod exchange;
mod host;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::registry;
use super::{ControllerQueuePair, HostQueuePair, Opening, QueueParams, Transport};
use crate::spec::trtype;
pub use coupled::{Coupled, NotCoupled};
use exchange::Exchange;

/// Connections that were asked for and not accepted.
const BACKLOG: usize = 16;

/// One end of a connection: the host's and the controller's are alike until a queue pair is opened
/// on them.
#[derive(Debug)]
pub struct Connection {
    exchange: Arc<Exchange>,
    /// Writing to it wakes the other end, and reading from it takes a wake-up.
    wake: UnixStream,
}

impl Connection {
    /// The ends of a new connection.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = UnixStream::pair()?;
        one.set_nonblocking(true)?;
        other.set_nonblocking(true)?;
        let exchange = Arc::new(Exchange::default());
        let end = |wake| Self {
            exchange: Arc::clone(&exchange),
            wake,
        };
        Ok((end(one), end(other)))
    }
}

impl From<Connection> for registry::Connection {
    fn from(connection: Connection) -> Self {
        Self::new(connection)
    }
}

/// The loopback transport.
#[derive(Debug, Clone, Copy, Default)]
pub struct Loopback;

impl Transport for Loopback {
    fn name(&self) -> &'static str {
        "loopback"
    }

    fn trtype(&self) -> u8 {
        trtype::INTRA_HOST
    }

    fn priority(&self) -> i32 {
        0
    }

    fn open_host(&self, params: Box<QueueParams>) -> Opening<dyn HostQueuePair> {
        match params.over() {
            Ok(params) => Opening::Opened(Box::new(host::LoopbackHost::new(params))),
            Err(params) => Opening::Declined(params),
        }
    }

    fn open_controller(&self, params: Box<QueueParams>) -> Opening<dyn ControllerQueuePair> {
        match params.over() {
            Ok(params) => Opening::Opened(Box::new(controller::LoopbackController::new(params))),
            Err(params) => Opening::Declined(params),
        }
    }
}

/// Where hosts of this process connect to.
#[derive(Debug, Clone)]
pub struct Connector(mpsc::Sender<Connection>);

/// Where a controller of this process accepts connections.
#[derive(Debug)]
pub struct Listener(mpsc::Receiver<Connection>);

/// A place to connect to, and its listener.
pub fn listen() -> (Connector, Listener) {
    let (connector, listener) = mpsc::channel(BACKLOG);
    (Connector(connector), Listener(listener))
}

impl Connector {
    /// Connects; the host's end.
    ///
    /// # Errors
    /// The listener is gone, or no descriptor is left.
    pub async fn connect(&self) -> io::Result<Connection> {
        let (host, controller) = Connection::pair()?;
        let sent = self.0.send(controller).await;
        sent.map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(host)
    }
}

impl Listener {
    /// The next connection; `None` when nobody can connect any more. Cancel-safe.
    pub async fn accept(&mut self) -> Option<Connection> {
        self.0.recv().await
    }
}
