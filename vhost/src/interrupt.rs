//! What has a thread that waits for a socket do something else, such as a session between two messages.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::{Errno, read, retry_on_intr, write};

/// Interrupts whoever waits for a socket with it. Clones interrupt the same one.
#[derive(Debug, Clone)]
pub struct Interrupt(Arc<OwnedFd>);

impl Interrupt {
    /// Nobody waits yet.
    ///
    /// # Errors
    /// No descriptor can be had.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(event)))
    }

    /// Ends the wait, or the next one.
    pub fn raise(&self) {
        // It only fails where it is raised already.
        let _ = write(&*self.0, &1_u64.to_ne_bytes());
    }

    /// Waits until `stream` has something to read, or has ended; false when it was interrupted instead, which is then
    /// forgotten.
    ///
    /// # Errors
    /// It cannot be waited.
    pub fn wait_for(&self, stream: impl AsFd) -> io::Result<bool> {
        let mut events = [
            PollFd::new(&*self.0, PollFlags::IN),
            PollFd::new(&stream, PollFlags::IN),
        ];
        retry_on_intr(|| poll(&mut events, None))?;
        if events[0].revents().is_empty() {
            return Ok(true);
        }
        match read(&*self.0, &mut [0; 8]) {
            Ok(_) | Err(Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}
