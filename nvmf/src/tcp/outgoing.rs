//! A PDU on its way out: header bytes, and a reference to the payload behind them.

/// Longest header that is received or sent, in bytes: IC PDUs, and PDO with the largest alignment.
pub const MAX_HEADER_LEN: usize = 128;

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
    /// Payload after the header. When the kernel has taken all of it, say so with
    /// [`QPair::transmitted`].
    pub payload: Option<TxPayload>,
}

impl TxPdu {
    /// A header of `len` bytes, of which those after `bytes` are padding.
    pub(crate) fn new(bytes: &[u8], len: usize) -> Self {
        let mut header = [0; MAX_HEADER_LEN];
        header[..bytes.len()].copy_from_slice(bytes);
        Self {
            header,
            len: len as u8,
            payload: None,
        }
    }

    pub(crate) fn with_payload(mut self, payload: TxPayload) -> Self {
        self.payload = (payload.len > 0).then_some(payload);
        self
    }

    /// Header and padding.
    pub fn header(&self) -> &[u8] {
        &self.header[..usize::from(self.len)]
    }
}
