//! The channel on which the back-end speaks first: a front-end gives it with SET_BACKEND_REQ_FD.
//!
//! The message library has a sender for it that knows no notice of a changed configuration, so the
//! descriptor is kept beside it and that one message is written here.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{SendFlags, send};

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: version 1, no body, no reply wanted.
const CONFIG_CHANGED: [u32; 3] = [2, 1, 0];

/// The back-end's end of the channel.
#[derive(Debug)]
pub(crate) struct BackendChannel(OwnedFd);

impl BackendChannel {
    /// Of a connected stream socket.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Another descriptor of it.
    pub(crate) fn file(&self) -> io::Result<File> {
        Ok(self.0.try_clone()?.into())
    }

    /// Tells the front-end that the configuration space has changed. Never waits: a front-end that does
    /// not read has such notices before it already. False when the channel is of no use any more.
    pub(crate) fn config_changed(&self) -> bool {
        let message = CONFIG_CHANGED.map(u32::to_le_bytes).concat();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match retry_on_intr(|| send(&self.0, &message, flags)) {
            // A part of a message would be taken for another one.
            Ok(sent) => sent == message.len(),
            Err(error) => error == Errno::AGAIN,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_notice_is_twelve_bytes_and_a_front_end_that_does_not_read_costs_nothing() {
        let (mut front, back) = UnixStream::pair().expect("a pair");
        let channel = BackendChannel::new(back.into());
        // Far more than a socket holds.
        for _ in 0..100_000 {
            assert!(channel.config_changed());
        }
        let mut message = [0; 12];
        front.read_exact(&mut message).expect("a message");
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        drop(front);
        assert!(!channel.config_changed());
    }
}
