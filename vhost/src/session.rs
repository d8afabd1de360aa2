//! One front-end's session: its messages turned into calls on the device's rings.
//!
//! A message that cannot be carried out is refused: the front-end is told so where the protocol has
//! a way to (see [`crate::channel`]), and the session goes on. Only a broken transport ends it, and
//! so does a stream in which message boundaries are lost.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use crate::channel::{Channel, Message};
use crate::complaints::Complaints;
use crate::device::Device;
use crate::front_end::FrontEnd;
use crate::inflight::Tail;
use crate::interrupt::Interrupt;
use crate::queue::{Queue, QueueUpdate};
use crate::vring::Signal;

/// Who runs the rings. Called from the session's thread, which waits: each call returns when the
/// worker that owns the ring has acted on it.
pub trait Rings: Send + Sync {
    /// Hands over ring `index`, which is not running. The worker scans it at once.
    fn start(&self, index: usize, queue: Queue);

    /// Has ring `index`, which is running, apply `update`. The worker scans it afterwards.
    fn update(&self, index: usize, update: QueueUpdate);

    /// Takes ring `index` back: nothing more is taken from it, what was taken is finished, and the
    /// answers are flushed. What [`Queue::recovering`] counts was taken, in an earlier life. `None` when
    /// the ring was not running.
    ///
    /// What cannot be finished in time may be left, where [`Tail::kept`] says that this is of use.
    fn stop(&self, index: usize) -> Option<Queue>;

    /// Takes ring `index` back as it is: nothing more is taken from it, what was taken and is not
    /// finished is left with [`Queue::leave`], and nothing of it is worked on any more, here or at the
    /// storage, or its successor knows of it through the tail. `None` when it was not running.
    ///
    /// An implementor that cannot do that finishes everything.
    fn suspend(&self, index: usize) -> Option<Queue> {
        self.stop(index)
    }

    /// Takes all these rings back at once, with nothing in flight, as [`Self::stop`] does, but fails nothing
    /// and leaves nothing: where that takes too long, or what was lost earlier could still change what the
    /// rings' successor writes, all run on.
    ///
    /// # Errors
    /// Why they run on.
    fn pause(&self, rings: &[usize]) -> Result<Vec<Queue>, String>;

    /// The guest may go on elsewhere once this returns, and write there. No ring is running. Waits until nothing of
    /// what was given up on can be carried out late any more, no longer than the front-end can be kept waiting.
    fn settle(&self) {}

    /// Rings that start from now on use another in-flight region, whose private tail this is: a new
    /// one, or one that an earlier life has left. `None` when there is none any more, because the
    /// session is over or the region was refused. No ring is running.
    fn region(&self, _tail: Option<Tail>) {}
}

/// Why a session ended, other than by the front-end going away.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The socket failed.
    #[error("vhost-user socket: {0}")]
    Socket(#[from] io::Error),
    /// The message library gave up on the connection.
    #[error("vhost-user connection: {0}")]
    Connection(VhostError),
}

/// Serves one front-end connection until it goes away, and then stops every ring it started.
/// Where the front-end keeps an in-flight region, their requests are left in it; otherwise they are
/// finished. Blocks. To end it from outside, shut the stream down through a clone.
///
/// # Errors
/// [`SessionError`] when the connection broke rather than being closed between two messages.
pub fn serve(
    stream: UnixStream,
    device: Arc<Device>,
    rings: Arc<dyn Rings>,
) -> Result<(), SessionError> {
    let mut session = Session::new(stream, device, rings)?;
    while session.next()? {}
    Ok(())
}

/// How it came that a session is not served any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// The front-end has gone.
    Gone,
    /// Somebody wants something else of it: it may be served again.
    Interrupted,
}

/// One front-end's connection. Every ring that it has started stops with it, as [`serve`] says.
pub struct Session {
    /// The front-end's socket, a descriptor of our own.
    pub(crate) stream: UnixStream,
    pub(crate) channel: Channel,
    pub(crate) handler: BackendReqHandler<Mutex<FrontEnd>>,
    front_end: Arc<Mutex<FrontEnd>>,
    /// Rings that are paused.
    pub(crate) parked: Vec<Queue>,
    complaints: Arc<Complaints>,
}

impl Session {
    /// A session in which nothing was said yet.
    ///
    /// # Errors
    /// The socket cannot be used.
    pub fn new(
        stream: UnixStream,
        device: Arc<Device>,
        rings: Arc<dyn Rings>,
    ) -> Result<Self, SessionError> {
        stream.set_nonblocking(false)?;
        let complaints = Arc::new(Complaints::default());
        let front_end = FrontEnd::new(device, rings, Arc::clone(&complaints));
        let front_end = Arc::new(Mutex::new(front_end));
        Ok(Self {
            stream: stream.try_clone()?,
            channel: Channel::new(stream.try_clone()?),
            handler: BackendReqHandler::from_stream(stream, Arc::clone(&front_end)),
            front_end,
            parked: Vec::new(),
            complaints,
        })
    }

    /// Serves it until the front-end goes away, or somebody interrupts it between two messages. Blocks.
    ///
    /// # Errors
    /// As [`serve`].
    pub fn serve(&mut self, interrupt: &Interrupt) -> Result<Served, SessionError> {
        loop {
            if !interrupt.wait_for(&self.stream)? {
                return Ok(Served::Interrupted);
            }
            if !self.next()? {
                return Ok(Served::Gone);
            }
        }
    }

    /// The front-end's socket.
    ///
    /// # Errors
    /// No descriptor can be had.
    pub fn stream(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    /// Handles the next message; false when there will be none.
    fn next(&mut self) -> Result<bool, SessionError> {
        match self.channel.peek()? {
            Some(mut message) => self.handle(&mut message).map(|()| true),
            None => Ok(false),
        }
    }

    pub(crate) fn front_end(&self) -> MutexGuard<'_, FrontEnd> {
        self.front_end
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&mut self, message: &mut Message) -> Result<(), SessionError> {
        if let Some(ring) = message.ring_to_suspend()
            && self.front_end().may_skip_drain()
        {
            self.channel.skip(message)?;
            let base = self.front_end().stop_at_base(ring, true);
            return Ok(self.channel.reply_ring(message, base)?);
        }
        if let Some(reason) = message.unusable() {
            self.log_refusal(message, &reason);
            self.channel.skip(message)?;
            return self.refuse(message);
        }
        let file = message.file.take();
        if message.request == FrontendReq::SET_LOG_FD as u32 {
            return self.set_log_call(message, file);
        }
        self.front_end().begin(file);
        match self.handler.handle_request() {
            Ok(()) => Ok(()),
            Err(error) if ends_session(&error) || !message.whole => {
                Err(SessionError::Connection(error))
            }
            Err(error) => {
                self.log_refusal(message, &error);
                let answered = self.front_end().has_answered(message.request);
                if answered {
                    return Ok(());
                }
                self.refuse(message)
            }
        }
    }

    /// The library does not know this request.
    fn set_log_call(
        &mut self,
        message: &Message,
        file: Option<OwnedFd>,
    ) -> Result<(), SessionError> {
        self.channel.skip(message)?;
        let Some(file) = file else {
            self.log_refusal(message, &"without a descriptor");
            return self.refuse(message);
        };
        self.front_end().set_log_call(Signal::new(file.into()));
        let acknowledge = self.front_end().acknowledges();
        Ok(self.channel.accept(message, acknowledge)?)
    }

    fn refuse(&mut self, message: &Message) -> Result<(), SessionError> {
        if message.request == FrontendReq::SET_LOG_BASE as u32 && self.front_end().takes_logs() {
            self.front_end().log_was_refused();
            return Ok(self.channel.refuse_log(message)?);
        }
        let acknowledge = self.front_end().acknowledges();
        Ok(self.channel.refuse(message, acknowledge)?)
    }

    fn log_refusal(&self, message: &Message, reason: &dyn std::fmt::Display) {
        if self.complaints.allow() {
            let request = message.name();
            tracing::warn!(%request, %reason, "refused a vhost-user message");
        }
    }
}

/// True for errors of the connection, as opposed to those of one message.
fn ends_session(error: &VhostError) -> bool {
    matches!(
        error,
        VhostError::Disconnected
            | VhostError::PartialMessage
            | VhostError::SocketBroken(_)
            | VhostError::SocketConnect(_)
            | VhostError::SocketError(_)
            | VhostError::SocketRetry(_)
    )
}

#[cfg(test)]
mod tests;
