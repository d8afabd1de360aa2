//! A port: listens, and gives every connection a task of its own.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::Target;
use super::connection::{self, Arrival, Incoming};
use super::discovery::Listed;
use crate::spec::discovery::DISCOVERY_PORT;
use crate::transport::loopback;

/// Time for associations to end when the target shuts down.
const FAREWELL: Duration = Duration::from_millis(800);
/// Pause after a failure to accept: for want of descriptors, mostly.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {error}{hint}")]
pub struct BindError {
    /// The address.
    pub address: SocketAddr,
    /// What the operating system says.
    pub error: io::Error,
    hint: &'static str,
}

impl BindError {
    fn new(address: SocketAddr, error: io::Error) -> Self {
        let hint = match error.kind() {
            io::ErrorKind::AddrInUse => "; stop what uses the port, or choose another one",
            io::ErrorKind::PermissionDenied => "; choose a port above 1023",
            io::ErrorKind::AddrNotAvailable => "; choose an address of this machine",
            _ => "",
        };
        Self {
            address,
            error,
            hint,
        }
    }
}

/// Listening sockets of a target.
pub struct Port {
    target: Arc<Target>,
    listeners: Vec<Listener>,
}

struct Listener {
    socket: TcpListener,
    listed: Listed,
}

impl Port {
    /// Listens on every address.
    ///
    /// # Errors
    /// [`BindError`] for the first address that cannot be had; none stays bound then.
    pub async fn bind(target: Arc<Target>, addresses: &[SocketAddr]) -> Result<Self, BindError> {
        let mut port = Self {
            target,
            listeners: Vec::new(),
        };
        for &address in addresses {
            port.listen(address, true).await?;
        }
        Ok(port)
    }

    /// Listens for discovery, and nothing else, also on port 8009 of every address that is listened
    /// on. A port that cannot be had there is logged: discovery is served on the others, too.
    pub async fn add_discovery(&mut self) {
        for mut address in self.local_addrs() {
            address.set_port(DISCOVERY_PORT);
            if self.addresses(|_| true).contains(&address) {
                continue;
            }
            match self.listen(address, false).await {
                Ok(()) => tracing::info!(%address, "listening for discovery, too"),
                Err(error) => tracing::info!("no discovery there: {error}"),
            }
        }
    }

    async fn listen(&mut self, address: SocketAddr, serves_io: bool) -> Result<(), BindError> {
        let failed = |error| BindError::new(address, error);
        let socket = TcpListener::bind(address).await.map_err(failed)?;
        let local = socket.local_addr().map_err(failed)?;
        let listed = Listed::new(&self.target, local, serves_io);
        self.listeners.push(Listener { socket, listed });
        Ok(())
    }

    /// The addresses where the subsystems are, with the ports that the system chose for 0.
    pub fn local_addrs(&self) -> Vec<SocketAddr> {
        self.addresses(|listed| listed.serves_io)
    }

    /// The addresses where there is discovery alone.
    pub fn discovery_addrs(&self) -> Vec<SocketAddr> {
        self.addresses(|listed| !listed.serves_io)
    }

    fn addresses(&self, which: impl Fn(&Listed) -> bool) -> Vec<SocketAddr> {
        let listeners = self.listeners.iter();
        let wanted = listeners.filter(|listener| which(&listener.listed));
        let addresses = wanted.map(|listener| listener.socket.local_addr());
        addresses.filter_map(Result::ok).collect()
    }

    /// Serves hosts until `shutdown` is ready, then ends all associations and returns within a
    /// second.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) {
        let mut tasks = Tasks::new(self.target);
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                Some(_) = tasks.running.join_next(), if !tasks.running.is_empty() => {}
                accepted = accept(&self.listeners) => match accepted {
                    Ok((stream, arrival)) => tasks.admit(Incoming::Tcp(stream, arrival)),
                    Err(error) => {
                        if tasks.target.quota.allow() {
                            tracing::warn!(%error, "a connection could not be accepted");
                        }
                        tokio::select! {
                            () = &mut shutdown => break,
                            () = sleep(ACCEPT_PAUSE) => {}
                        }
                    }
                },
            }
        }
        drop(self.listeners);
        tasks.end().await;
    }
}

/// Where hosts of this process connect, over the loopback transport.
pub struct LocalPort {
    target: Arc<Target>,
    listener: loopback::Listener,
}

impl LocalPort {
    /// Of a target.
    pub fn new(target: Arc<Target>, listener: loopback::Listener) -> Self {
        Self { target, listener }
    }

    /// As [`Port::serve`].
    pub async fn serve(mut self, shutdown: impl Future<Output = ()>) {
        let mut tasks = Tasks::new(self.target);
        let mut shutdown = std::pin::pin!(shutdown);
        let mut reachable = true;
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                Some(_) = tasks.running.join_next(), if !tasks.running.is_empty() => {}
                accepted = self.listener.accept(), if reachable => match accepted {
                    Some(connection) => tasks.admit(Incoming::Loopback(connection)),
                    // What is connected goes on.
                    None => reachable = false,
                },
            }
        }
        drop(self.listener);
        tasks.end().await;
    }
}

async fn accept(listeners: &[Listener]) -> io::Result<(TcpStream, Arrival)> {
    std::future::poll_fn(|cx| {
        for listener in listeners {
            if let Poll::Ready(accepted) = listener.socket.poll_accept(cx) {
                let serves_io = listener.listed.serves_io;
                let arrived = |(stream, peer)| (stream, Arrival { peer, serves_io });
                return Poll::Ready(accepted.map(arrived));
            }
        }
        Poll::Pending
    })
    .await
}

/// The connections of a port.
struct Tasks {
    target: Arc<Target>,
    connections: Arc<Semaphore>,
    shutdown: watch::Sender<bool>,
    /// Aborted when dropped.
    running: JoinSet<()>,
}

impl Tasks {
    fn new(target: Arc<Target>) -> Self {
        Self {
            connections: Arc::new(Semaphore::new(target.limits.max_connections)),
            target,
            shutdown: watch::channel(false).0,
            running: JoinSet::new(),
        }
    }

    /// Ends all associations, within a second.
    async fn end(mut self) {
        self.shutdown.send_replace(true);
        let all = async { while self.running.join_next().await.is_some() {} };
        if timeout(FAREWELL, all).await.is_err() {
            tracing::warn!("some associations did not end in time");
        }
    }

    fn admit(&mut self, incoming: Incoming) {
        let target = Arc::clone(&self.target);
        let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() else {
            if target.quota.allow() {
                tracing::warn!(
                    peer = incoming.peer(),
                    "connection dropped: there are too many"
                );
            }
            return;
        };
        let shutdown = self.shutdown.subscribe();
        self.running.spawn(async move {
            let peer = incoming.peer();
            let served = connection::serve(&target, incoming, permit, shutdown).await;
            if let Err(failure) = served
                && target.quota.allow()
            {
                tracing::info!(%peer, "connection closed: {failure}");
            }
        });
    }
}
