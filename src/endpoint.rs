//! Where the front-ends of a disk come from: a socket that listens, one that was inherited, or a VMM that listens itself.

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType, getpeername};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, sleep, sleep_until};

use crate::socket::{self, Access, SocketError, SocketPath};

/// How long to wait before a VMM is tried again that does not listen.
const CONNECT_PAUSE: Duration = Duration::from_secs(1);
/// How long to wait after a front-end could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where front-ends are to come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// They connect to a socket that is made.
    Listen {
        /// Its path.
        path: PathBuf,
        /// Who may connect.
        access: Access,
    },
    /// They connect, or one is connected, to a socket that this process was given.
    Inherited(RawFd),
    /// They listen at a path, and are connected to.
    Connect(PathBuf),
}

impl Origin {
    /// The path of its socket.
    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            Self::Listen { path, .. } | Self::Connect(path) => Some(path),
            Self::Inherited(_) => None,
        }
    }

    /// What it is called in messages.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Listen { path, .. } | Self::Connect(path) => path.display().to_string(),
            Self::Inherited(fd) => format!("descriptor {fd}"),
        }
    }
}

/// Why a descriptor that was given is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EndpointError {
    /// No socket at that path.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Not open, or not for us.
    #[error(
        "--fd {fd} cannot be used: {error}; let the program that starts this one leave the descriptor open"
    )]
    Descriptor {
        /// The descriptor.
        fd: RawFd,
        /// What the system said.
        error: io::Error,
    },
    /// Something else than a Unix stream socket.
    #[error(
        "--fd {fd} is {what}; give a Unix stream socket that listens, or that a VMM is connected to"
    )]
    NotOurs {
        /// The descriptor.
        fd: RawFd,
        /// What it is.
        what: &'static str,
    },
    /// The system said no.
    #[error("cannot wait for a VMM: {0}")]
    Io(#[from] io::Error),
}

/// Gives the front-ends of a disk, one after the other.
#[derive(Debug)]
pub(crate) struct Endpoint(Kind);

#[derive(Debug)]
enum Kind {
    Listening {
        listener: UnixListener,
        /// Ours, when we have made it.
        path: Option<SocketPath>,
    },
    /// The only one, until it is given.
    Connected(Option<StdUnixStream>),
    Connecting {
        path: PathBuf,
        /// When to try next.
        at: Instant,
        /// It is known that the VMM does not listen.
        silent: bool,
    },
}

impl Endpoint {
    /// Makes or takes the socket. Within a runtime.
    ///
    /// # Errors
    /// [`EndpointError`] names it; nothing was changed then.
    pub(crate) fn open(origin: &Origin) -> Result<Self, EndpointError> {
        match origin {
            Origin::Listen { path, access } => {
                let (listener, path) = socket::listen(path, access)?;
                Ok(Self::listening(listener, Some(path))?)
            }
            Origin::Inherited(fd) => Self::inherited(*fd),
            Origin::Connect(path) => {
                socket::check_form(path)?;
                Ok(Self(Kind::Connecting {
                    path: std::path::absolute(path)?,
                    at: Instant::now(),
                    silent: false,
                }))
            }
        }
    }

    /// A socket that listens already. Within a runtime.
    fn listening(listener: StdUnixListener, path: Option<SocketPath>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        Ok(Self(Kind::Listening { listener, path }))
    }

    fn inherited(fd: RawFd) -> Result<Self, EndpointError> {
        let socket = inherited(fd).map_err(|error| EndpointError::Descriptor { fd, error })?;
        let not = |what| EndpointError::NotOurs { fd, what };
        if socket_domain(&socket).map_err(|_| not("no socket"))? != AddressFamily::UNIX {
            return Err(not("no Unix socket"));
        }
        if socket_type(&socket).map_err(io::Error::from)? != SocketType::STREAM {
            return Err(not("no stream socket"));
        }
        if socket_acceptconn(&socket).map_err(io::Error::from)? {
            Ok(Self::listening(socket.into(), None)?)
        } else if getpeername(&socket).is_ok() {
            Ok(Self(Kind::Connected(Some(socket.into()))))
        } else {
            Err(not("a socket that neither listens nor is connected"))
        }
    }

    /// A socket that another process has listened on, at `path`, and leaves to this one. Within a runtime.
    ///
    /// # Errors
    /// It is of no use.
    pub(crate) fn taken(listener: OwnedFd, path: &Path) -> Result<Self, EndpointError> {
        let path = SocketPath::of_socket(path)?;
        Ok(Self::listening(listener.into(), Some(path))?)
    }

    /// Another descriptor of the socket, where one listens.
    pub(crate) fn listener(&self) -> Option<io::Result<OwnedFd>> {
        match &self.0 {
            Kind::Listening { listener, .. } => Some(listener.as_fd().try_clone_to_owned()),
            Kind::Connected(_) | Kind::Connecting { .. } => None,
        }
    }

    /// Leaves the socket to another process.
    pub(crate) fn leave(self) {
        if let Kind::Listening {
            path: Some(mut path),
            ..
        } = self.0
        {
            path.leave();
        }
    }

    /// The path that is this disk's and no other's, absolute.
    pub(crate) fn own_path(&self) -> Option<PathBuf> {
        match &self.0 {
            Kind::Listening { path, .. } => Some(path.as_ref()?.path().to_owned()),
            Kind::Connected(_) => None,
            Kind::Connecting { path, .. } => Some(path.clone()),
        }
    }

    /// Where a VMM has to connect, absolute, if that is known.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        match &self.0 {
            Kind::Listening {
                path: Some(path), ..
            } => Some(path.path().to_owned()),
            Kind::Listening { listener, .. } => {
                let address = listener.local_addr().ok()?;
                address.as_pathname().map(Path::to_owned)
            }
            Kind::Connected(_) => None,
            Kind::Connecting { path, .. } => Some(path.clone()),
        }
    }

    /// It is the VMM that listens.
    pub(crate) fn vmm_listens(&self) -> bool {
        matches!(self.0, Kind::Connecting { .. })
    }

    /// The next front-end; `None` when there will never be another. Nothing is lost when this is dropped before it
    /// is done.
    pub(crate) async fn next(&mut self, disk: &str) -> Option<StdUnixStream> {
        match &mut self.0 {
            Kind::Listening { listener, .. } => loop {
                let accepted = listener.accept().await;
                match accepted.and_then(|(stream, _)| stream.into_std()) {
                    Ok(stream) => return Some(stream),
                    // Out of descriptors, or a front-end that gave up: neither lasts.
                    Err(error) => {
                        tracing::warn!(disk, %error, "cannot accept a front-end");
                        sleep(ACCEPT_PAUSE).await;
                    }
                }
            },
            Kind::Connected(stream) => stream.take(),
            Kind::Connecting { path, at, silent } => loop {
                sleep_until(*at).await;
                *at = Instant::now() + CONNECT_PAUSE;
                let connected = UnixStream::connect(&*path).await;
                match connected.and_then(UnixStream::into_std) {
                    Ok(stream) => {
                        *silent = false;
                        return Some(stream);
                    }
                    Err(error) if !std::mem::replace(silent, true) => {
                        let path = path.display();
                        tracing::warn!(disk, %path, %error, "the VMM does not listen yet; it is tried every {CONNECT_PAUSE:?}");
                    }
                    Err(_) => {}
                }
            },
        }
    }
}

/// A descriptor of our own for one that this process was started with.
fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    let process = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(process.as_fd(), fd, PidfdGetfdFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().unwrap()
    }

    #[test]
    fn sockets_that_listen_and_that_are_connected_are_told_apart() {
        runtime().block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("disk.sock");
            let listener = StdUnixListener::bind(&path).unwrap();
            let mut endpoint = Endpoint::inherited(listener.as_raw_fd()).unwrap();
            assert_eq!(endpoint.path(), Some(path.clone()));
            for _ in 0..2 {
                let _vmm = StdUnixStream::connect(&path).unwrap();
                assert!(endpoint.next("disk").await.is_some());
            }
            drop(endpoint);
            assert!(path.exists(), "a path that others made is theirs to remove");

            let (_vmm, ours) = StdUnixStream::pair().unwrap();
            let mut endpoint = Endpoint::inherited(ours.as_raw_fd()).unwrap();
            assert!(endpoint.next("disk").await.is_some());
            assert!(endpoint.next("disk").await.is_none(), "there is only one");
        });
    }

    #[test]
    fn descriptors_of_anything_else_are_refused_by_name() {
        runtime().block_on(async {
            let refused = |fd: RawFd| Endpoint::inherited(fd).unwrap_err().to_string();
            let file = tempfile::tempfile().unwrap();
            let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let datagram = UnixDatagram::unbound().unwrap();
            let idle = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
            for (fd, what) in [
                (file.as_raw_fd(), "no socket"),
                (tcp.as_raw_fd(), "no Unix socket"),
                (datagram.as_raw_fd(), "no stream socket"),
                (idle.as_raw_fd(), "neither listens nor is connected"),
            ] {
                let message = refused(fd);
                assert!(message.contains(&format!("--fd {fd} is ")), "{message}");
                assert!(message.contains(what), "{message}");
            }
            let message = refused(9999);
            assert!(message.contains("--fd 9999 cannot be used"), "{message}");
        });
    }

    #[test]
    fn a_vmm_that_comes_late_and_comes_again_is_connected_to() {
        runtime().block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("vmm.sock");
            let mut endpoint = Endpoint::open(&Origin::Connect(path.clone())).unwrap();
            tokio::select! {
                _ = endpoint.next("disk") => panic!("nobody listens"),
                () = sleep(Duration::from_millis(20)) => {}
            }
            let listener = StdUnixListener::bind(&path).unwrap();
            for _ in 0..2 {
                let started = Instant::now();
                let stream = endpoint.next("disk").await.unwrap();
                assert!(started.elapsed() < 3 * CONNECT_PAUSE);
                let (vmm, _) = listener.accept().unwrap();
                drop((stream, vmm));
            }
        });
    }
}
