//! Waiting for an eventfd with one system call: edge-triggered, so that it need not be read.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Descriptors that are waited for.
#[derive(Debug)]
pub(crate) struct Bell {
    epoll: Epoll,
}

impl Bell {
    /// Waits for none yet.
    ///
    /// # Errors
    /// The system has no more descriptors.
    pub(crate) fn new() -> io::Result<Self> {
        let epoll = Epoll::new()?;
        Ok(Self { epoll })
    }

    /// Wakes with `data` whenever something new can be read from `fd`, and, when asked, whenever it can be written again.
    /// `fd` has to stay open for as long as this lives.
    ///
    /// # Errors
    /// It is no descriptor that can be waited for.
    pub(crate) fn add(&self, fd: &impl AsRawFd, writable: bool, data: u64) -> io::Result<()> {
        let mut events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if writable {
            events |= EventSet::OUT;
        }
        let event = EpollEvent::new(events, data);
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
    }

    /// Waits, and calls `ready` with the data of each descriptor that has news. Without a timeout it waits for ever.
    ///
    /// # Errors
    /// `TimedOut`, or `Interrupted` by a signal.
    pub(crate) fn wait(
        &self,
        timeout: Option<Duration>,
        mut ready: impl FnMut(u64),
    ) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 4];
        let timeout = timeout.map_or(-1, |t| i32::try_from(t.as_millis()).unwrap_or(i32::MAX));
        let count = self.epoll.wait(timeout, &mut events)?;
        if count == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        for event in events.iter().take(count) {
            ready(event.data());
        }
        Ok(())
    }
}
