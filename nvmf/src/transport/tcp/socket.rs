//! What a stream sends to and receives from: a TCP socket, or in simulations one end of a pipe.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use super::parting::part;
use super::syscall::{Gather, Scatter};

/// See the module.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    #[cfg(feature = "sim")]
    Simulated(crate::sim::PipeEnd),
}

impl From<TcpStream> for Socket {
    fn from(stream: TcpStream) -> Self {
        Self::Tcp(stream)
    }
}

#[cfg(feature = "sim")]
impl From<crate::sim::PipeEnd> for Socket {
    fn from(end: crate::sim::PipeEnd) -> Self {
        Self::Simulated(end)
    }
}

impl Socket {
    /// What to wait for.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            #[cfg(feature = "sim")]
            Self::Simulated(end) => end.fd(),
        }
    }

    /// Sends; returns how many bytes were taken.
    pub(super) fn send(&self, gather: Gather<'_>) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => gather.send(stream.as_fd()),
            #[cfg(feature = "sim")]
            Self::Simulated(end) => end.send(gather.len(), |most| gather.copy(most)),
        }
    }

    /// Receives; returns how many bytes were written, 0 at the end of the stream.
    pub(super) fn receive(&self, scatter: Scatter<'_>) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => scatter.receive(stream.as_fd()),
            #[cfg(feature = "sim")]
            Self::Simulated(end) => end.receive(scatter.len(), |bytes| scatter.place(bytes)),
        }
    }

    /// Sends the last of it, and lets the peer read that before the connection is closed. Nothing else
    /// is sent or received any more.
    pub(super) fn part(&self, last_words: Vec<u8>) {
        match self {
            Self::Tcp(stream) => part(stream, last_words),
            #[cfg(feature = "sim")]
            Self::Simulated(end) => end.part(&last_words),
        }
    }

    /// Ends both directions.
    pub(super) fn shutdown(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            #[cfg(feature = "sim")]
            Self::Simulated(end) => {
                end.shutdown();
                Ok(())
            }
        }
    }
}
