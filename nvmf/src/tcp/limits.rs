//! What bounds one queue pair, once its connection is negotiated.

use super::digest::Digests;

/// What bounds a queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Alignment of payload that we receive, in bytes.
    pub rx_align: u32,
    /// Alignment of payload that we send, in bytes.
    pub tx_align: u32,
    /// Largest payload of one H2CData, in bytes.
    pub max_h2c_data: u32,
    /// R2Ts that one command may have outstanding.
    pub max_r2t: u32,
    /// Largest in-capsule data, in bytes.
    pub in_capsule_limit: u32,
    /// Digests that every PDU carries, both ways.
    pub digests: Digests,
    /// The admin queue.
    pub admin: bool,
}
