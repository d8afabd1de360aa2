//! The process that takes a disk over: asks for it, and goes on with its session.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use vhost_user_blk::{Device, MAX_RECORDED, Recorded, RestoreError, Rings, Session};

use super::description::Description;
use super::giving::Door;
use super::wire::Wire;
use super::{Answer, Baton, Hello, Started, VERSION, path_beside, since};
use crate::endpoint::{Endpoint, EndpointError, Origin};
use crate::socket::SocketError;

/// Why a disk was not taken over. Whoever serves it goes on, where nothing else is said.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotTaken {
    /// There is nobody to ask.
    #[error(
        "no process can be asked for the disk at '{}': {error}; to start the disk anew, leave --takeover out",
        .path.display()
    )]
    Nobody {
        /// The socket of the disk.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// It says no.
    #[error("the process that serves '{}' keeps it: {reason}", .path.display())]
    Refused {
        /// The socket of the disk.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// It says nothing, or what makes no sense.
    #[error("the process that serves '{}' does not hand it over: {error}", .path.display())]
    Talk {
        /// The socket of the disk.
        path: PathBuf,
        /// What went wrong.
        error: io::Error,
    },
    /// The disk's namespace is not there.
    #[error(
        "the target of the disk at '{}' is away, so it is not taken over; try again when it is there",
        .0.display()
    )]
    Away(PathBuf),
    /// The session cannot go on here.
    #[error(transparent)]
    Session(#[from] RestoreError),
    /// It has changed its mind.
    #[error("the process that serves '{}' has waited for too long, and goes on", .0.display())]
    TooLate(PathBuf),
    /// The sockets are of no use.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The sockets are of no use.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
}

/// A disk that was offered, and is not ours yet.
pub(crate) struct Offered {
    path: PathBuf,
    wire: Wire,
    baton: Baton,
    listener: Option<OwnedFd>,
    door: OwnedFd,
    stream: Option<UnixStream>,
    setup: Vec<Recorded>,
    start: Vec<Recorded>,
    paused_at: u64,
}

/// A disk that is ours.
pub(crate) struct Taken {
    /// Its front-end, if there is one.
    pub(crate) session: Option<Session>,
    /// How long its guest has waited.
    pub(crate) stalled: Duration,
    listener: Option<OwnedFd>,
    door: OwnedFd,
    path: PathBuf,
}

/// Asks whoever serves the disk at `path` for it. Blocks, for some seconds at most.
///
/// # Errors
/// [`NotTaken`].
pub(crate) fn ask(path: &Path, disk: Description) -> Result<Offered, NotTaken> {
    let wire = Wire::connect(&path_beside(path)).map_err(|error| NotTaken::Nobody {
        path: path.to_owned(),
        error,
    })?;
    let talk = |error| NotTaken::Talk {
        path: path.to_owned(),
        error,
    };
    let version = VERSION;
    wire.say(&Hello { version, disk }, &[]).map_err(talk)?;
    let (offer, files) = match wire.hear().map_err(talk)? {
        (Answer::Offered(offer), files) => (offer, files),
        (Answer::Refused(reason), _) => {
            return Err(NotTaken::Refused {
                path: path.to_owned(),
                reason,
            });
        }
    };
    let lacks = || talk(io::Error::other("a socket is missing"));
    let mut files = files.into_iter();
    let mut next = || files.next().ok_or_else(lacks);
    let (baton, door) = (Baton(next()?), next()?);
    let listener = offer.listens.then(&mut next).transpose()?;
    let stream = offer.session.then(next).transpose()?;
    if offer.setup.saturating_add(offer.start) > MAX_RECORDED {
        return Err(talk(io::Error::other(
            "the record of the session is too long",
        )));
    }
    let receive = |count: usize| -> io::Result<Vec<Recorded>> {
        let messages = (0..count).map(|_| wire.receive().map(Recorded::from));
        messages.collect()
    };
    Ok(Offered {
        setup: receive(offer.setup).map_err(talk)?,
        start: receive(offer.start).map_err(talk)?,
        path: path.to_owned(),
        baton,
        listener,
        door,
        stream: stream.map(UnixStream::from),
        paused_at: offer.paused_at,
        wire,
    })
}

impl Offered {
    /// Makes the disk ours: from here on nobody else goes on with it. Blocks.
    ///
    /// # Errors
    /// [`NotTaken`]; it is still the other process's then, unless that is said.
    pub(crate) fn take(
        self,
        device: Arc<Device>,
        rings: Arc<dyn Rings>,
    ) -> Result<Taken, NotTaken> {
        let restored = match self.stream {
            Some(stream) => Some(Session::restore(stream, &self.setup, device, rings)?),
            None => None,
        };
        let path = self.path;
        let talk = |error| NotTaken::Talk {
            path: path.clone(),
            error,
        };
        if !self.baton.take().map_err(talk)? {
            return Err(NotTaken::TooLate(path));
        }
        let session = match restored {
            Some(restored) => Some(restored.start(&self.start)?),
            None => None,
        };
        let stalled = since(self.paused_at);
        let told = u64::try_from(stalled.as_micros()).unwrap_or(u64::MAX);
        if let Err(error) = self.wire.say(&Started { stalled: told }, &[]) {
            tracing::warn!(%error, "the process that served the disk has gone already");
        }
        Ok(Taken {
            session,
            stalled,
            listener: self.listener,
            door: self.door,
            path,
        })
    }
}

impl Taken {
    /// Where front-ends come from, and where a successor asks. Within a runtime.
    ///
    /// # Errors
    /// The sockets are of no use.
    pub(crate) fn sockets(self, origin: &Origin) -> Result<(Endpoint, Door), NotTaken> {
        let endpoint = match self.listener {
            Some(listener) => Endpoint::taken(listener, &self.path)?,
            None => Endpoint::open(origin)?,
        };
        Ok((endpoint, Door::taken(self.door, &self.path)?))
    }
}
