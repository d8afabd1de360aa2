//! Packets between the two processes of a hand-over, with files, each in time or not at all.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::retry_on_intr;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
    connect, recvmsg, sendmsg, socket_with,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::limits::HANDOVER_STEP;

/// Bytes of a packet, at most: what is longer is refused.
const PACKET: usize = 16 << 10;
/// Files of a packet, at most: as many as a vhost-user message has.
const FILES: usize = 32;

/// One end.
#[derive(Debug)]
pub(super) struct Wire(OwnedFd);

impl Wire {
    /// On a connected socket that keeps packets apart. Blocking, with a time limit for each packet.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, false)?;
        for timeout in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&socket, timeout, Some(HANDOVER_STEP))?;
        }
        Ok(Self(socket))
    }

    /// Connects to whoever listens at `path`.
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
        let socket = socket_with(family, SocketType::SEQPACKET, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        Self::new(socket)
    }

    /// Sends a packet.
    pub(super) fn send(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = [IoSlice::new(bytes)];
        retry_on_intr(|| sendmsg(&self.0, &bytes, &mut ancillary, SendFlags::NOSIGNAL))?;
        Ok(())
    }

    /// Sends a value.
    pub(super) fn say(&self, value: &impl Serialize, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send(&serde_json::to_vec(value)?, files)
    }

    /// Receives a packet; an error when the other process has gone, or says nothing in time.
    pub(super) fn receive(&self) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        let mut bytes = vec![0; PACKET];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = retry_on_intr(|| {
            let into = &mut [IoSliceMut::new(&mut bytes)];
            recvmsg(&self.0, into, &mut ancillary, flags)
        });
        let received = received.map_err(|error| match error {
            rustix::io::Errno::AGAIN => io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the other process has said nothing for {HANDOVER_STEP:?}"),
            ),
            error => error.into(),
        })?;
        let mut files = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(io::Error::other(
                "a packet is too long, or there are too many files",
            ));
        }
        if received.bytes == 0 {
            let gone = "the other process has gone";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, gone));
        }
        bytes.truncate(received.bytes);
        Ok((bytes, files))
    }

    /// Receives a value.
    pub(super) fn hear<T: DeserializeOwned>(&self) -> io::Result<(T, Vec<OwnedFd>)> {
        let (bytes, files) = self.receive()?;
        Ok((serde_json::from_slice(&bytes)?, files))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::net::socketpair;

    use super::*;

    fn pair() -> (Wire, Wire) {
        let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
        let (a, b) = socketpair(family, SocketType::SEQPACKET, flags, None).unwrap();
        (Wire::new(a).unwrap(), Wire::new(b).unwrap())
    }

    #[test]
    fn packets_arrive_one_by_one_with_their_files() {
        let (a, b) = pair();
        let file = tempfile::tempfile().unwrap();
        a.send(b"one", &[file.as_fd(), file.as_fd()]).unwrap();
        a.say(&7, &[]).unwrap();
        let (bytes, files) = b.receive().unwrap();
        assert_eq!((bytes.as_slice(), files.len()), (&b"one"[..], 2));
        assert_eq!(b.hear::<u32>().unwrap().0, 7);
        drop(a);
        let gone = b.receive().unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_too_long_or_no_value_is_an_error() {
        let (a, b) = pair();
        a.send(&[b'x'; PACKET + 1], &[]).unwrap();
        assert!(b.receive().unwrap_err().to_string().contains("too long"));
        a.send(b"{", &[]).unwrap();
        assert!(b.hear::<u32>().is_err());
    }
}
