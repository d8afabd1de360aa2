//! The front-end's socket beside the message library: what must be seen before a message is
//! handled, and answers that the library leaves out.
//!
//! The library ends its work on a message with an error and no answer when the header is not to
//! its liking, when a body does not fit its request, or when a feature is missing. In the first
//! case it also leaves the body unread and so loses its place in the stream. Here each message is
//! peeked at, whole, so that such a one can be skipped and refused in good order.

use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{ioctl_fionread, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recv, recvmsg,
};
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE, VhostUserVringState};

/// Bytes of a message header.
pub(crate) const HEADER: usize = 12;

/// Largest body that is waited for, and skipped if it is of no use; past this the peer is not
/// speaking vhost-user.
const MAX_SKIPPED: usize = 64 * 1024;

/// Bytes of the fixed part of a configuration message: offset, size, flags.
const CONFIG_PAYLOAD: usize = 12;

/// Bytes of a ring's number and a state of it.
const RING_STATE: usize = 8;

/// Bytes of what describes an in-flight region.
const INFLIGHT: usize = 24;

/// The request to stop a ring and leave its requests in flight, which the library does not know.
const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;

/// Bytes of the description of a log: size, offset.
const LOG: usize = 16;

/// Answer to a transfer of the device's state that does not take place: an error, and no descriptor.
const STATE_REFUSED: u64 = 0x101;

/// How often to look again for the rest of a message that did not arrive at once.
const RECHECK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// A message that waits in the socket.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) request: u32,
    flags: u32,
    size: usize,
    /// File descriptors came with it.
    with_files: bool,
    /// All of it has arrived.
    pub(crate) whole: bool,
    /// A descriptor that comes with it, of those that the library has no use for, or not enough.
    pub(crate) file: Option<OwnedFd>,
    /// Start of the body, zero where there is none.
    start: [u8; CONFIG_PAYLOAD],
}

/// A second handle on the front-end's socket.
#[derive(Debug)]
pub(crate) struct Channel {
    stream: UnixStream,
    peeked: Vec<u8>,
}

impl Message {
    /// Why the library would lose its place over this message, if it would.
    pub(crate) fn unusable(&self) -> Option<&'static str> {
        let Ok(request) = FrontendReq::try_from(self.request) else {
            return Some("unknown request");
        };
        if self.flags & VERSION_MASK != VERSION {
            return Some("unknown protocol version");
        }
        if self.flags & !(VERSION_MASK | NEED_REPLY) != 0 {
            return Some("unknown header flags");
        }
        if self.size > MAX_MSG_SIZE {
            return Some("body too large");
        }
        (self.with_files && !takes_files(request)).then_some("file descriptors not expected")
    }

    /// The ring that this message wants stopped with its requests left in flight, if it is such a one.
    pub(crate) fn ring_to_suspend(&self) -> Option<u32> {
        let ours = self.request == GET_VRING_BASE_SKIP_DRAIN
            && self.flags & !NEED_REPLY == VERSION
            && self.size == RING_STATE
            && self.whole
            && !self.with_files;
        let [a, b, c, d, ..] = self.start;
        ours.then(|| u32::from_le_bytes([a, b, c, d]))
    }

    /// Name of the request, for the log.
    pub(crate) fn name(&self) -> String {
        match FrontendReq::try_from(self.request) {
            Ok(request) => format!("{request:?}"),
            Err(()) => format!("request {}", self.request),
        }
    }
}

/// True for requests that carry file descriptors, or did in some front-end.
fn takes_files(request: FrontendReq) -> bool {
    matches!(
        request,
        FrontendReq::SET_MEM_TABLE
            | FrontendReq::SET_VRING_CALL
            | FrontendReq::SET_VRING_KICK
            | FrontendReq::SET_VRING_ERR
            | FrontendReq::SET_LOG_BASE
            | FrontendReq::SET_LOG_FD
            | FrontendReq::SET_BACKEND_REQ_FD
            | FrontendReq::SET_INFLIGHT_FD
            | FrontendReq::ADD_MEM_REG
            | FrontendReq::REM_MEM_REG
            | FrontendReq::SET_DEVICE_STATE_FD
            | FrontendReq::GPU_SET_SOCKET
    )
}

impl Channel {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            peeked: vec![0; HEADER + MAX_MSG_SIZE + 1],
        }
    }

    /// Waits for the next message and looks at it without taking it. `None` when the front-end has
    /// closed the connection between two messages.
    pub(crate) fn peek(&mut self) -> io::Result<Option<Message>> {
        let (seen, _) = self.look(1)?;
        if seen == 0 {
            return Ok(None);
        }
        self.wait_for(HEADER)?;
        let (seen, _) = self.look(HEADER)?;
        if seen < HEADER {
            return Err(io::Error::other("message header cut short"));
        }
        let word = |at: usize| {
            let bytes = [0, 1, 2, 3].map(|byte| self.peeked[at + byte]);
            u32::from_le_bytes(bytes)
        };
        let (request, flags) = (word(0), word(4));
        let size = usize::try_from(word(8)).unwrap_or(usize::MAX);
        if size > MAX_SKIPPED {
            return Err(io::Error::other("not a vhost-user message"));
        }
        // One byte more than the message: see `look`.
        let most = HEADER + size.min(MAX_MSG_SIZE);
        let whole = self.wait_for(most)? && size <= MAX_MSG_SIZE;
        let (seen, files) = self.look(most + 1)?;
        let mut start = [0; CONFIG_PAYLOAD];
        let present = seen.min(most).saturating_sub(HEADER).min(CONFIG_PAYLOAD);
        start[..present].copy_from_slice(&self.peeked[HEADER..HEADER + present]);
        let with_files = files && seen <= most;
        let file = match FrontendReq::try_from(request) {
            Ok(FrontendReq::SET_BACKEND_REQ_FD | FrontendReq::SET_LOG_FD) if with_files => {
                self.file()?
            }
            _ => None,
        };
        Ok(Some(Message {
            request,
            flags,
            size,
            with_files,
            whole,
            file,
            start,
        }))
    }

    /// A descriptor of ours for the first file that comes with the message that was looked at; whoever takes
    /// the message gets its own.
    fn file(&mut self) -> io::Result<Option<OwnedFd>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut files = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
        let buffer = &mut [IoSliceMut::new(&mut self.peeked[..HEADER])];
        retry_on_intr(|| recvmsg(&self.stream, &mut *buffer, &mut files, flags))?;
        let rights = files.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        });
        Ok(rights.and_then(|mut files| files.next()))
    }

    /// Waits for a byte and looks at up to `len`. Returns how many there are, and whether files
    /// came with the last of them: without room for files the kernel says that it left them out,
    /// and keeps them for whoever takes the bytes.
    ///
    /// The kernel looks no further than the end of what was sent together with files. When it gets
    /// to `len` before that, it may report the files of the message behind, too; so whoever asks
    /// for files must ask for more bytes than those of one message, and see fewer.
    fn look(&mut self, len: usize) -> io::Result<(usize, bool)> {
        let mut no_files = RecvAncillaryBuffer::default();
        let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
        let buffer = &mut [IoSliceMut::new(&mut self.peeked[..len])];
        let message = retry_on_intr(|| recvmsg(&self.stream, &mut *buffer, &mut no_files, flags))?;
        Ok((message.bytes, message.flags.contains(ReturnFlags::CTRUNC)))
    }

    /// Waits until `len` bytes can be received; false when the front-end left before it sent them.
    /// Front-ends send a message at once, so there is hardly ever anything to wait for, and the
    /// kernel has no way to wait for more than some data without taking it.
    fn wait_for(&self, len: usize) -> io::Result<bool> {
        let arrived = || ioctl_fionread(&self.stream).map(|bytes| bytes >= len as u64);
        loop {
            if arrived()? {
                return Ok(true);
            }
            let mut hang_up = [PollFd::new(&self.stream, PollFlags::RDHUP)];
            if retry_on_intr(|| poll(&mut hang_up, Some(&RECHECK)))? > 0 {
                return Ok(arrived()?);
            }
        }
    }

    /// Takes an unusable message out of the socket; files that came with it are closed.
    pub(crate) fn skip(&mut self, message: &Message) -> io::Result<()> {
        let mut left = HEADER + message.size;
        while left > 0 {
            let most = left.min(self.peeked.len());
            let room = &mut self.peeked[..most];
            let (taken, _) = retry_on_intr(|| recv(&self.stream, &mut *room, RecvFlags::WAITALL))?;
            if taken == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left = left.saturating_sub(taken);
        }
        Ok(())
    }

    /// Answers a message that asks for the state of a ring.
    pub(crate) fn reply_ring(
        &mut self,
        message: &Message,
        state: VhostUserVringState,
    ) -> io::Result<()> {
        let mut payload = [0; RING_STATE];
        payload[..4].copy_from_slice(&{ state.index }.to_le_bytes());
        payload[4..].copy_from_slice(&{ state.num }.to_le_bytes());
        self.reply(message.request, &payload)
    }

    /// Tells the front-end that its message was carried out, where it wants to know.
    pub(crate) fn accept(&mut self, message: &Message, acknowledge: bool) -> io::Result<()> {
        match acknowledge && message.flags & NEED_REPLY != 0 {
            true => self.reply(message.request, &0_u64.to_le_bytes()),
            false => Ok(()),
        }
    }

    /// Answers SET_LOG_BASE, for whose answer a front-end waits in any case, with a log of no bytes.
    pub(crate) fn refuse_log(&mut self, message: &Message) -> io::Result<()> {
        self.reply(message.request, &[0; LOG])
    }

    /// Tells the front-end that its message was refused, where the protocol has a way to: a
    /// configuration without payload for GET_CONFIG, a region without size, which is none, for
    /// GET_INFLIGHT_FD, no descriptor for SET_DEVICE_STATE_FD, a non-zero acknowledgement for what asks for
    /// one once acknowledgements are negotiated.
    pub(crate) fn refuse(&mut self, message: &Message, acknowledge: bool) -> io::Result<()> {
        if message.request == FrontendReq::GET_CONFIG as u32 {
            let mut payload = message.start;
            payload[4..8].fill(0);
            self.reply(message.request, &payload)
        } else if message.request == FrontendReq::GET_INFLIGHT_FD as u32 {
            self.reply(message.request, &[0; INFLIGHT])
        } else if message.request == FrontendReq::SET_DEVICE_STATE_FD as u32 {
            self.reply(message.request, &STATE_REFUSED.to_le_bytes())
        } else if acknowledge && message.flags & NEED_REPLY != 0 {
            self.reply(message.request, &1_u64.to_le_bytes())
        } else {
            Ok(())
        }
    }

    fn reply(&mut self, request: u32, payload: &[u8]) -> io::Result<()> {
        let size = u32::try_from(payload.len()).unwrap_or(0);
        let mut message = Vec::with_capacity(HEADER + payload.len());
        for word in [request, VERSION | REPLY, size] {
            message.extend(word.to_le_bytes());
        }
        message.extend(payload);
        self.stream.write_all(&message)
    }
}
