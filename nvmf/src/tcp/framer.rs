//! Cuts a byte stream into checked headers and stretches of payload, resumable at any byte.

use zerocopy::FromBytes;

use super::digest::{DIGEST_LEN, crc32c};
use super::error::{FatalError, Fes};
use super::limits::Limits;
use super::outgoing::MAX_HEADER_LEN;
use super::pdu::{self, COMMON_LEN, CommonHeader, Pdu, Receiver, Shape};

/// Most of an offending header that a termination request carries, in bytes.
const MAX_ECHOED: usize = 128;

/// Where in the stream the framer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Collecting a header and its digest; its shape is known once the common part is complete.
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
    Pdu {
        /// The PDU.
        pdu: Pdu,
        /// A digest follows that payload.
        data_digest: bool,
    },
    /// A termination request too malformed to read.
    Garbage,
}

#[derive(Debug)]
pub(crate) struct Framer {
    header: [u8; MAX_HEADER_LEN],
    have: usize,
    /// Bytes of the header itself, as far as known.
    hlen: usize,
    state: State,
    /// Set while padding is skipped.
    parsed: Option<Pdu>,
    /// A digest follows the payload of that PDU.
    data_digest: bool,
}

impl Framer {
    pub(crate) fn new() -> Self {
        Self {
            header: [0; MAX_HEADER_LEN],
            have: 0,
            hlen: COMMON_LEN,
            state: State::Header(None),
            parsed: None,
            data_digest: false,
        }
    }

    /// Bytes that complete the current header, as far as is known.
    pub(crate) fn needed(&self) -> usize {
        match self.state {
            State::Header(None) => COMMON_LEN - self.have,
            State::Header(Some(shape)) => shape.hlen + shape.header_digest + shape.pad - self.have,
            State::Pad(left) => left,
            State::Payload => 0,
        }
    }

    /// At a PDU boundary with nothing begun.
    pub(crate) fn at_boundary(&self) -> bool {
        self.state == State::Header(None) && self.have == 0
    }

    /// The header bytes collected so far, digest apart.
    pub(crate) fn offending(&self) -> &[u8] {
        &self.header[..self.have.min(self.hlen)]
    }

    /// Takes what is there of the rest of a header whose common part is an offence, to be reported with
    /// it.
    fn take_offending(&mut self, common: &CommonHeader, rest: &[u8]) {
        let hlen = usize::from(common.hlen).clamp(COMMON_LEN, MAX_ECHOED);
        let take = (hlen - COMMON_LEN).min(rest.len());
        self.header[COMMON_LEN..COMMON_LEN + take].copy_from_slice(&rest[..take]);
        self.have = COMMON_LEN + take;
        self.hlen = self.have;
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
                    let until = shape.map_or(COMMON_LEN, |shape| shape.hlen + shape.header_digest);
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
                        match pdu::check_common(&common, receiver, limits) {
                            Ok(Some(shape)) => {
                                self.hlen = shape.hlen;
                                self.state = State::Header(Some(shape));
                            }
                            Ok(None) => return Ok((used, Framed::Garbage)),
                            Err(error) => {
                                self.take_offending(&common, &bytes[used..]);
                                return Err(error);
                            }
                        }
                        continue;
                    };
                    if shape.header_digest > 0 {
                        self.check_digest(shape.hlen)?;
                    }
                    self.data_digest = shape.data_digest;
                    let pdu = pdu::parse(&self.header[..shape.hlen], shape)?;
                    self.parsed = Some(pdu);
                    self.state = State::Pad(shape.pad);
                }
                State::Pad(left) => {
                    let take = left.min(bytes.len() - used);
                    used += take;
                    self.state = State::Pad(left - take);
                    if left > take {
                        return Ok((used, Framed::More));
                    }
                    self.state = State::Payload;
                    let data_digest = self.data_digest;
                    let framed = self
                        .parsed
                        .take()
                        .map_or(Framed::More, |pdu| Framed::Pdu { pdu, data_digest });
                    return Ok((used, framed));
                }
                State::Payload => return Ok((used, Framed::More)),
            }
        }
    }

    /// Compares the digest behind a complete header with the header.
    fn check_digest(&self, hlen: usize) -> Result<(), FatalError> {
        let (header, rest) = self.header.split_at(hlen);
        let mut received = [0; DIGEST_LEN];
        received.copy_from_slice(&rest[..DIGEST_LEN]);
        let received = u32::from_le_bytes(received);
        if crc32c(0, header) == received || mutated!(DigestIgnored) {
            return Ok(());
        }
        Err(FatalError {
            fes: Fes::HEADER_DIGEST,
            fei: received,
            what: "the header digest does not match",
        })
    }

    /// The payload of the current PDU is complete (or there is none): the next header begins.
    pub(crate) fn next_header(&mut self) {
        self.have = 0;
        self.hlen = COMMON_LEN;
        self.state = State::Header(None);
    }
}
