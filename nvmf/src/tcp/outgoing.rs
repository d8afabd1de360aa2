//! A PDU on its way out: header bytes, and a reference to the payload behind them.

use super::digest::{DIGEST_LEN, Digests, crc32c};

/// Longest header that is received or sent, in bytes: a termination request with all of an IC PDU.
/// Data begins at 144 at most, where 76 bytes of a header and its digest meet an alignment of 72.
pub const MAX_HEADER_LEN: usize = 152;

/// Largest payload that we put in one PDU, in bytes, whatever the peer takes: bounds how long one
/// large transfer holds up everything behind it.
pub const MAX_TX_DATA: u32 = 128 * 1024;

/// Payload that follows a header that is sent: a range of a command's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TxPayload {
    /// The command.
    pub slot: u16,
    /// Offset into the command's data.
    pub offset: u32,
    /// Bytes.
    pub len: u32,
}

/// One PDU to send.
#[derive(Debug, Clone, Copy)]
pub struct TxPdu {
    header: [u8; MAX_HEADER_LEN],
    len: u8,
    /// Four bytes follow the payload, if there is any: its CRC32C, little-endian, of the bytes as they are sent.
    pub data_digest: bool,
    /// Payload after the header. When the kernel has taken all of it, say so with
    /// [`QPair::transmitted`].
    pub payload: Option<TxPayload>,
}

impl TxPdu {
    /// A header of `len` bytes: after `bytes`, their digest where one is agreed on, and padding.
    pub(crate) fn new(bytes: &[u8], len: usize, digests: Digests) -> Self {
        let mut header = [0; MAX_HEADER_LEN];
        header[..bytes.len()].copy_from_slice(bytes);
        if digests.header {
            let digest = crc32c(0, bytes).to_le_bytes();
            header[bytes.len()..bytes.len() + DIGEST_LEN].copy_from_slice(&digest);
        }
        Self {
            header,
            len: len as u8,
            data_digest: digests.data,
            payload: None,
        }
    }

    pub(crate) fn with_payload(mut self, payload: TxPayload) -> Self {
        self.payload = (payload.len > 0).then_some(payload);
        self
    }

    /// All that is sent: header, payload and digests, in bytes.
    pub fn wire_len(&self) -> usize {
        let digest = if self.data_digest { DIGEST_LEN } else { 0 };
        let payload = self
            .payload
            .map_or(0, |payload| payload.len as usize + digest);
        self.header().len() + payload
    }

    /// Header, its digest, and padding.
    pub fn header(&self) -> &[u8] {
        &self.header[..usize::from(self.len)]
    }
}
