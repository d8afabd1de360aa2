//! A session that goes on in another process, while the front-end notices nothing.
//!
//! What a session has come to is written down as the vhost-user messages that lead there, with their files. The other
//! process carries them out like a front-end's, so whatever is checked there is checked here, and then puts the
//! front-end's socket in their place. Rings do not run before the last part of it, which is withheld until one of the
//! two has decided that it is the one that goes on.

mod socket;

use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::io::retry_on_intr;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost::vhost_user::message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};

use crate::channel::{Channel, HEADER};
use crate::device::Device;
use crate::session::{Rings, Session, SessionError};

/// Messages that a record may have: several for each ring, one for each region, and few others.
pub const MAX_RECORDED: usize = 4096;

/// One message of a record, and the files that go with it.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// Header and body, as a front-end sends them.
    pub bytes: Vec<u8>,
    /// The files, in order.
    pub files: Vec<Arc<File>>,
}

/// What a session has come to.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// All but what has rings run.
    pub setup: Vec<Recorded>,
    /// What has rings run.
    pub start: Vec<Recorded>,
}

/// Why a session cannot be handed over now. It goes on.
#[derive(Debug, thiserror::Error)]
pub enum NotHandedOver {
    /// Its rings cannot stop.
    #[error("{0}")]
    Busy(String),
    /// A part of it cannot be written down.
    #[error("{0}")]
    Unrecordable(String),
}

/// Why a session cannot go on from a record.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Not a record.
    #[error("message {number} of the record of the session makes no sense: {reason}")]
    Malformed {
        /// Its number, from 1.
        number: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// What it asks for is not possible here.
    #[error("message {number} of the record of the session is refused: {reason}")]
    Refused {
        /// Its number, from 1.
        number: usize,
        /// Why.
        reason: String,
    },
    /// The session itself.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The system said no.
    #[error("cannot go on with a session: {0}")]
    Io(#[from] io::Error),
}

/// Requests that a record may have.
const RECORDED: [FrontendReq; 14] = [
    FrontendReq::GET_FEATURES,
    FrontendReq::SET_FEATURES,
    FrontendReq::SET_PROTOCOL_FEATURES,
    FrontendReq::SET_MEM_TABLE,
    FrontendReq::ADD_MEM_REG,
    FrontendReq::SET_CONFIG,
    FrontendReq::SET_BACKEND_REQ_FD,
    FrontendReq::SET_INFLIGHT_FD,
    FrontendReq::SET_VRING_NUM,
    FrontendReq::SET_VRING_BASE,
    FrontendReq::SET_VRING_ADDR,
    FrontendReq::SET_VRING_CALL,
    FrontendReq::SET_VRING_ERR,
    FrontendReq::SET_VRING_KICK,
];

impl Recorded {
    /// Checks the form of a message from another process: whatever waits for more of it would wait for ever.
    fn check(&self) -> Result<(), &'static str> {
        let word = |at: usize| -> Option<u32> {
            let bytes = self.bytes.get(at..at + 4)?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        };
        let (Some(request), Some(flags), Some(size)) = (word(0), word(4), word(8)) else {
            return Err("it has no header");
        };
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > MAX_MSG_SIZE || self.bytes.len() != HEADER + size {
            return Err("its length is wrong");
        }
        let known = RECORDED.iter().any(|&known| known as u32 == request)
            || request == FrontendReq::SET_VRING_ENABLE as u32;
        match known && flags == 1 {
            true if self.files.len() > MAX_ATTACHED_FD_ENTRIES => Err("it has too many files"),
            true => Ok(()),
            false => Err("it is of no use here"),
        }
    }
}

impl Session {
    /// Stops the rings, when nothing is in flight any more, and writes down what the session has come to. Until it is
    /// [resumed](Self::resume) or [left](Self::leave), it must not be served.
    ///
    /// # Errors
    /// [`NotHandedOver`]; the rings run on then.
    pub fn pause(&mut self) -> Result<Record, NotHandedOver> {
        let parked = self.front_end().pause().map_err(NotHandedOver::Busy)?;
        self.parked = parked;
        let recorded = self.front_end().record(&self.parked);
        recorded.map_err(|reason| {
            self.resume();
            NotHandedOver::Unrecordable(reason)
        })
    }

    /// Has the rings run again.
    pub fn resume(&mut self) {
        let parked = std::mem::take(&mut self.parked);
        self.front_end().resume(parked);
    }

    /// Lets go of the session, which another process goes on with: of its rings nothing is touched any more.
    pub fn leave(self) {
        self.front_end().forget();
    }

    /// Goes on with a session on the front-end's `stream`, but does not have its rings run yet.
    ///
    /// # Errors
    /// [`RestoreError`]; whatever the record says, that is all that can happen.
    pub fn restore(
        stream: UnixStream,
        setup: &[Recorded],
        device: Arc<Device>,
        rings: Arc<dyn Rings>,
    ) -> Result<Restored, RestoreError> {
        let (front, back) = UnixStream::pair()?;
        let mut restored = Restored {
            session: Session::new(back, device, rings)?,
            front,
            stream,
        };
        restored.play(setup)?;
        Ok(restored)
    }
}

/// A session that was restored, and whose rings do not run yet.
pub struct Restored {
    session: Session,
    /// Where the messages of the record are sent.
    front: UnixStream,
    /// The front-end's socket.
    stream: UnixStream,
}

impl Restored {
    /// Has the rings run. The session is to be served then.
    ///
    /// # Errors
    /// [`RestoreError`] where the record is not what a session writes down.
    pub fn start(mut self, start: &[Recorded]) -> Result<Session, RestoreError> {
        self.play(start)?;
        let Self {
            mut session,
            stream,
            ..
        } = self;
        stream.set_nonblocking(false)?;
        session.channel = Channel::new(stream.try_clone()?);
        socket::replace(&session.handler, &stream)?;
        session.stream = stream;
        Ok(session)
    }

    /// Carries out messages of the record.
    fn play(&mut self, messages: &[Recorded]) -> Result<(), RestoreError> {
        for (message, number) in messages.iter().zip(1..) {
            let malformed = |reason| RestoreError::Malformed { number, reason };
            message.check().map_err(malformed)?;
            send(&self.front, &message.bytes, &message.files)?;
            let session = &mut self.session;
            let seen = session.channel.peek()?;
            let mut seen = seen.ok_or_else(|| malformed("it did not arrive"))?;
            if let Some(reason) = seen.unusable() {
                return Err(malformed(reason));
            }
            let file = seen.file.take();
            session.front_end().begin(file);
            let done = session.handler.handle_request();
            done.map_err(|error| RestoreError::Refused {
                number,
                reason: error.to_string(),
            })?;
        }
        Ok(())
    }
}

/// Sends a message with its files.
fn send(stream: &UnixStream, bytes: &[u8], files: &[Arc<File>]) -> io::Result<()> {
    let files: Vec<BorrowedFd<'_>> = files.iter().map(|file| file.as_fd()).collect();
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::NOSIGNAL;
    let sent = retry_on_intr(|| sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, flags))?;
    match sent == bytes.len() {
        true => Ok(()),
        false => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// As files are given to [`Recorded`].
impl From<(Vec<u8>, Vec<OwnedFd>)> for Recorded {
    fn from((bytes, files): (Vec<u8>, Vec<OwnedFd>)) -> Self {
        let files = files.into_iter().map(|file| Arc::new(File::from(file)));
        Self {
            bytes,
            files: files.collect(),
        }
    }
}
