//! Cuts a byte stream into checked headers and stretches of payload, resumable at any byte.

use zerocopy::FromBytes;

use super::error::FatalError;
use super::limits::Limits;
use super::outgoing::MAX_HEADER_LEN;
use super::pdu::{self, COMMON_LEN, CommonHeader, Pdu, Receiver, Shape};

/// Where in the stream the framer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Collecting a header; its shape is known once the common part is complete.
    Header(Option<Shape>),
    /// Skipping this many bytes between header and payload.
    Pad(usize),
    /// The payload is the driver's to move.
    Payload,
}

/// What feeding led to.
#[derive(Debug)]
pub(crate) enum Framed {
    /// More bytes are needed.
    More,
    /// A header is complete; its payload (if any) follows.
    Pdu(Pdu),
    /// A termination request too malformed to read.
    Garbage,
}

#[derive(Debug)]
pub(crate) struct Framer {
    header: [u8; MAX_HEADER_LEN],
    have: usize,
    state: State,
    /// Set while padding is skipped.
    parsed: Option<Pdu>,
}

impl Framer {
    pub(crate) fn new() -> Self {
        Self {
            header: [0; MAX_HEADER_LEN],
            have: 0,
            state: State::Header(None),
            parsed: None,
        }
    }

    /// Bytes that complete the current header, as far as is known.
    pub(crate) fn needed(&self) -> usize {
        match self.state {
            State::Header(None) => COMMON_LEN - self.have,
            State::Header(Some(shape)) => shape.hlen + shape.pad - self.have,
            State::Pad(left) => left,
            State::Payload => 0,
        }
    }

    /// At a PDU boundary with nothing begun.
    pub(crate) fn at_boundary(&self) -> bool {
        self.state == State::Header(None) && self.have == 0
    }

    /// The header bytes collected so far.
    pub(crate) fn offending(&self) -> &[u8] {
        &self.header[..self.have]
    }

    /// Takes bytes, never more than belong to the current header and its padding; returns how many.
    pub(crate) fn feed(
        &mut self,
        bytes: &[u8],
        receiver: Receiver,
        limits: &Limits,
    ) -> Result<(usize, Framed), FatalError> {
        let mut used = 0;
        loop {
            match self.state {
                State::Header(shape) => {
                    let until = shape.map_or(COMMON_LEN, |shape| shape.hlen);
                    let take = (until - self.have).min(bytes.len() - used);
                    self.header[self.have..self.have + take]
                        .copy_from_slice(&bytes[used..used + take]);
                    self.have += take;
                    used += take;
                    if self.have < until {
                        return Ok((used, Framed::More));
                    }
                    let Some(shape) = shape else {
                        let Ok((common, _)) = CommonHeader::read_from_prefix(&self.header) else {
                            return Ok((used, Framed::Garbage));
                        };
                        match pdu::check_common(&common, receiver, limits)? {
                            Some(shape) => self.state = State::Header(Some(shape)),
                            None => return Ok((used, Framed::Garbage)),
                        }
                        continue;
                    };
                    let parsed = pdu::parse(&self.header[..shape.hlen], shape)?;
                    if shape.pad > 0 {
                        self.parsed = Some(parsed);
                        self.state = State::Pad(shape.pad);
                        continue;
                    }
                    self.state = State::Payload;
                    return Ok((used, Framed::Pdu(parsed)));
                }
                State::Pad(left) => {
                    let take = left.min(bytes.len() - used);
                    used += take;
                    self.state = State::Pad(left - take);
                    if left > take {
                        return Ok((used, Framed::More));
                    }
                    self.state = State::Payload;
                    return Ok((used, self.parsed.take().map_or(Framed::More, Framed::Pdu)));
                }
                State::Payload => return Ok((used, Framed::More)),
            }
        }
    }

    /// The payload of the current PDU is complete (or there is none): the next header begins.
    pub(crate) fn next_header(&mut self) {
        self.have = 0;
        self.state = State::Header(None);
    }
}
