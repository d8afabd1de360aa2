//! What a peer did wrong, as the termination request says it.

/// Fatal error status of a termination request (NVMe/TCP, figure "Fatal Error Status").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fes(pub u16);

impl Fes {
    /// A header field has a value that is not allowed; FEI is its byte offset.
    pub const INVALID_HEADER_FIELD: Self = Self(1);
    /// A PDU came out of sequence.
    pub const SEQUENCE_ERROR: Self = Self(2);
    /// A header digest does not match; FEI is the digest received.
    pub const HEADER_DIGEST: Self = Self(3);
    /// Data is outside the range that was asked for.
    pub const DATA_OUT_OF_RANGE: Self = Self(4);
    /// More R2Ts, or more data in one PDU, than was agreed.
    pub const LIMIT_EXCEEDED: Self = Self(5);
    /// A parameter of the connection is not supported; FEI is its byte offset.
    pub const UNSUPPORTED_PARAMETER: Self = Self(6);

    /// What the value means.
    pub fn text(self) -> &'static str {
        match self {
            Self::INVALID_HEADER_FIELD => "invalid PDU header field",
            Self::SEQUENCE_ERROR => "PDU sequence error",
            Self::HEADER_DIGEST => "header digest error",
            Self::DATA_OUT_OF_RANGE => "data transfer out of range",
            Self::LIMIT_EXCEEDED => "R2T or data transfer limit exceeded",
            Self::UNSUPPORTED_PARAMETER => "unsupported parameter",
            _ => "reserved fatal error status",
        }
    }
}

/// The peer broke the protocol: the connection cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} ({}, FES {}, FEI {fei})", fes.text(), fes.0)]
pub struct FatalError {
    /// Fatal error status.
    pub fes: Fes,
    /// Fatal error information: for a header field, its byte offset.
    pub fei: u32,
    /// What was wrong, for the log.
    pub what: &'static str,
}

impl FatalError {
    /// A header field, by its byte offset.
    pub(crate) const fn field(offset: u32, what: &'static str) -> Self {
        Self {
            fes: Fes::INVALID_HEADER_FIELD,
            fei: offset,
            what,
        }
    }

    /// Something other than a header field; FEI is 0.
    pub(crate) const fn other(fes: Fes, what: &'static str) -> Self {
        Self { fes, fei: 0, what }
    }
}
