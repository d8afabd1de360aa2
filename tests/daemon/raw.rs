//! A front-end that sends what no library would: vhost-user messages as bytes.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::ring::PATIENCE;

/// Header flags: the protocol's version, and the wish for an acknowledgement.
pub(crate) const VERSION: u32 = 1;
pub(crate) const NEED_REPLY: u32 = 1 << 3;
const REPLY: u32 = 1 << 2;

/// Requests.
pub(crate) const GET_FEATURES: u32 = 1;
pub(crate) const SET_FEATURES: u32 = 2;
pub(crate) const SET_VRING_NUM: u32 = 8;
pub(crate) const SET_VRING_BASE: u32 = 10;
pub(crate) const GET_VRING_BASE: u32 = 11;
pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(crate) const GET_QUEUE_NUM: u32 = 17;
pub(crate) const SET_VRING_ENABLE: u32 = 18;
pub(crate) const GET_CONFIG: u32 = 24;
pub(crate) const SET_CONFIG: u32 = 25;
pub(crate) const SET_INFLIGHT_FD: u32 = 32;
pub(crate) const ADD_MEM_REG: u32 = 37;

pub(crate) struct Raw(UnixStream);

impl Raw {
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("somebody listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        Self(stream)
    }

    pub(crate) fn send(&mut self, request: u32, flags: u32, body: &[u8]) {
        let size = u32::try_from(body.len()).expect("a short body");
        let header = [request, flags, size].map(u32::to_le_bytes).concat();
        self.0
            .write_all(&[&header, body].concat())
            .expect("it listens");
    }

    /// Sends bytes that are not a message.
    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        // The other end may hang up in the middle of it.
        let _ = self.0.write_all(bytes);
    }

    /// The reply to `request`, which has to be the next message.
    #[track_caller]
    pub(crate) fn reply(&mut self, request: u32) -> Vec<u8> {
        let mut header = [0; 12];
        self.0.read_exact(&mut header).expect("a reply");
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
        assert_eq!((word(0), word(4)), (request, VERSION | REPLY), "{header:?}");
        let mut body = vec![0; usize::try_from(word(8)).expect("64 bits")];
        self.0.read_exact(&mut body).expect("a body");
        body
    }

    /// The number that the device replies with.
    #[track_caller]
    pub(crate) fn get(&mut self, request: u32) -> u64 {
        self.send(request, VERSION, &[]);
        u64::from_le_bytes(self.reply(request).try_into().expect("8 bytes"))
    }

    /// True when the device acknowledges, false when it refuses.
    #[track_caller]
    pub(crate) fn acknowledged(&mut self, request: u32, body: &[u8]) -> bool {
        self.send(request, VERSION | NEED_REPLY, body);
        u64::from_le_bytes(self.reply(request).try_into().expect("8 bytes")) == 0
    }

    /// Offers were asked for and acknowledgements agreed on.
    pub(crate) fn negotiated(socket: &Path) -> Self {
        let mut raw = Self::connect(socket);
        raw.get(GET_FEATURES);
        let features = raw.get(GET_PROTOCOL_FEATURES);
        raw.send(SET_PROTOCOL_FEATURES, VERSION, &features.to_le_bytes());
        raw
    }

    /// True when the device says nothing for a while.
    pub(crate) fn is_silent(&mut self) -> bool {
        let mut byte = [0];
        self.0
            .set_read_timeout(Some(Duration::from_millis(100)))
            .expect("a time-out");
        let silent = self.0.read(&mut byte).is_err();
        self.0.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        silent
    }
}
