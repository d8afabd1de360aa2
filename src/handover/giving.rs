//! The process that gives a disk away: where it is asked to, and what it sends.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{SocketFlags, SocketType, accept_with};
use rustix::process::geteuid;
use tokio::sync::mpsc;
use vhost_user_blk::{Interrupt, Record};

use super::description::Description;
use super::wire::Wire;
use super::{Answer, Baton, Hello, Offer, Started, VERSION, path_beside};
use crate::socket::{self, Access, SocketError, SocketPath};

/// How long to wait after a successor could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Bytes of the stack of the thread that waits for them: it does little.
const STACK: usize = 256 << 10;

/// Where successors ask for a disk.
pub(crate) struct Door {
    /// Another descriptor of what listens.
    listener: OwnedFd,
    path: SocketPath,
    requests: mpsc::Receiver<Request>,
    interrupt: Interrupt,
}

/// A successor that asks for the disk.
pub(crate) struct Request {
    wire: Wire,
    /// What it has.
    pub(crate) disk: Description,
    /// Its number.
    pub(crate) pid: i32,
}

/// What a successor is given.
pub(crate) struct Gift {
    /// The front-end's socket, and what its session has come to.
    pub(crate) session: Option<(OwnedFd, Record)>,
    /// What listens for front-ends.
    pub(crate) listener: Option<OwnedFd>,
    /// What listens for successors.
    pub(crate) door: OwnedFd,
    /// When the rings were told to stop.
    pub(crate) paused_at: u64,
}

/// What has become of a disk that was offered.
pub(crate) enum Outcome {
    /// It is the successor's; the guest has waited so long, where that is known.
    Given(Option<Duration>),
    /// It is still ours.
    Kept(String),
}

impl Door {
    /// Listens beside the socket of a disk.
    ///
    /// # Errors
    /// There can be no socket.
    pub(crate) fn open(path: &Path) -> Result<Self, SocketError> {
        let access = Access {
            mode: Some(0o600),
            ..Access::default()
        };
        let (listener, path) =
            socket::listen_for(SocketType::SEQPACKET, &path_beside(path), &access)?;
        Self::over(listener, path)
    }

    /// The same, where somebody has listened before.
    ///
    /// # Errors
    /// The socket is not there.
    pub(super) fn taken(listener: OwnedFd, path: &Path) -> Result<Self, SocketError> {
        Self::over(listener, SocketPath::of_socket(&path_beside(path))?)
    }

    fn over(listener: OwnedFd, path: SocketPath) -> Result<Self, SocketError> {
        let failed = |source: io::Error| SocketError::Io {
            path: path.path().to_owned(),
            source,
        };
        rustix::io::ioctl_fionbio(&listener, true).map_err(|error| failed(error.into()))?;
        let ours = listener.try_clone().map_err(failed)?;
        let interrupt = Interrupt::new().map_err(failed)?;
        let (tell, requests) = mpsc::channel(1);
        let until = interrupt.clone();
        let thread = std::thread::Builder::new().name("handover".to_owned());
        let thread = thread.stack_size(STACK);
        thread
            .spawn(move || listen(&listener, &until, &tell))
            .map_err(failed)?;
        Ok(Self {
            listener: ours,
            path,
            requests,
            interrupt,
        })
    }

    /// The next successor. Nothing is lost when this is dropped before it is done.
    pub(crate) async fn next(door: &mut Option<Self>) -> Request {
        let request = match door {
            Some(door) => door.requests.recv().await,
            None => None,
        };
        match request {
            Some(request) => request,
            None => std::future::pending().await,
        }
    }

    /// What listens for successors.
    pub(crate) fn listener(&self) -> io::Result<OwnedFd> {
        self.listener.try_clone()
    }

    /// Leaves the socket to a successor.
    pub(crate) fn leave(mut self) {
        self.path.leave();
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.interrupt.raise();
    }
}

/// Accepts successors, one at a time, until it is interrupted or nobody listens to it.
fn listen(listener: &OwnedFd, interrupt: &Interrupt, tell: &mpsc::Sender<Request>) {
    while matches!(interrupt.wait_for(listener), Ok(true)) {
        let heard = match accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(socket) => hear(socket),
            // Nobody, after all.
            Err(Errno::AGAIN) => continue,
            Err(error) => {
                // Out of descriptors, which does not last.
                std::thread::sleep(ACCEPT_PAUSE);
                Err(error.into())
            }
        };
        match heard {
            Ok(request) => {
                if tell.blocking_send(request).is_err() {
                    return;
                }
            }
            Err(error) => tracing::warn!(%error, "a successor was turned away"),
        }
    }
}

/// Finds out who asks, and for what.
fn hear(socket: OwnedFd) -> io::Result<Request> {
    let peer = socket_peercred(&socket)?;
    if peer.uid != geteuid() && !peer.uid.is_root() {
        return Err(io::Error::other(format!(
            "process {} belongs to user {}, and not to that of this process",
            peer.pid.as_raw_nonzero(),
            peer.uid.as_raw()
        )));
    }
    let wire = Wire::new(socket)?;
    let (Hello { version, disk }, _) = wire.hear()?;
    if version != VERSION {
        let reason = format!("it speaks version {VERSION} of the hand-over, not {version}");
        wire.say(&Answer::Refused(reason.clone()), &[])?;
        return Err(io::Error::other(reason));
    }
    Ok(Request {
        wire,
        disk,
        pid: peer.pid.as_raw_nonzero().get(),
    })
}

impl Request {
    /// Says why the disk stays.
    pub(crate) fn refuse(&self, reason: &str) {
        // Who has gone does not want to know.
        let _ = self.wire.say(&Answer::Refused(reason.to_owned()), &[]);
    }

    /// Offers the disk, and finds out whose it is then. Blocks, for some seconds at most.
    pub(crate) fn offer(&self, gift: &Gift) -> Outcome {
        let baton = match Baton::new() {
            Ok(baton) => baton,
            Err(error) => return Outcome::Kept(error.to_string()),
        };
        let error = match self.send(gift, &baton).and_then(|()| self.wire.hear()) {
            Ok((Started { stalled }, _)) => {
                return Outcome::Given(Some(Duration::from_micros(stalled)));
            }
            Err(error) => error,
        };
        match baton.take() {
            Ok(true) => Outcome::Kept(error.to_string()),
            Ok(false) => {
                tracing::error!(
                    %error,
                    successor = self.pid,
                    "the successor has taken the disk, and was not heard of again"
                );
                Outcome::Given(None)
            }
            Err(error) => Outcome::Kept(error.to_string()),
        }
    }

    fn send(&self, gift: &Gift, baton: &Baton) -> io::Result<()> {
        let Gift {
            session,
            listener,
            door,
            paused_at,
        } = gift;
        let empty = Record::default();
        let record = session.as_ref().map_or(&empty, |(_, record)| record);
        let offer = Offer {
            session: session.is_some(),
            listens: listener.is_some(),
            setup: record.setup.len(),
            start: record.start.len(),
            paused_at: *paused_at,
        };
        let mut files: Vec<BorrowedFd<'_>> = vec![baton.0.as_fd(), door.as_fd()];
        files.extend(listener.as_ref().map(AsFd::as_fd));
        files.extend(session.as_ref().map(|(socket, _)| socket.as_fd()));
        self.wire.say(&Answer::Offered(offer), &files)?;
        for message in record.setup.iter().chain(&record.start) {
            let files: Vec<_> = message.files.iter().map(|file| file.as_fd()).collect();
            self.wire.send(&message.bytes, &files)?;
        }
        Ok(())
    }
}
