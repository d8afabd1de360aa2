//! The queue pair machine: what both roles share of receiving, sending and ending.

use super::digest::Trailer;
use super::error::FatalError;
use super::framer::{Framed, Framer};
use super::limits::Limits;
use super::outgoing::{TxPayload, TxPdu};
use super::pdu::{self, Pdu, Receiver, TermReq};

/// What the next received bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Header: feed them; this many complete what is known of it.
    Header(usize),
    /// Payload of the command in `slot`: `len` bytes at `offset` of its data.
    Payload {
        /// The command.
        slot: u16,
        /// Offset into the command's data.
        offset: u32,
        /// Bytes.
        len: u32,
    },
    /// Payload that nobody wants any more: this many bytes to skip.
    Discard(u32),
    /// The rest of the payload's digest: this many bytes for [`QPair::digest`].
    DataDigest(usize),
    /// Payload inside a command that is still among the events: take that one first.
    Consumer,
    /// Nothing: the connection is over.
    Nothing,
}

/// Where received payload goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    /// `None`: nowhere.
    pub(crate) slot: Option<u16>,
    pub(crate) offset: u32,
    pub(crate) len: u32,
}

impl Window {
    pub(crate) const EMPTY: Self = Self {
        slot: None,
        offset: 0,
        len: 0,
    };

    pub(crate) fn discard(len: u32) -> Self {
        Self {
            slot: None,
            offset: 0,
            len,
        }
    }
}

/// What differs between the ends: a host or a controller.
pub trait Role: sealed::Sealed {}

pub(crate) mod sealed {
    use super::{FatalError, Limits, Pdu, Receiver, TxPayload, TxPdu, Window};

    pub trait Sealed {
        #[expect(private_interfaces, reason = "the trait is sealed")]
        const RECEIVER: Receiver;
        const TERM_REQ: u8;
        /// A PDU's header arrived; says where its payload goes.
        #[expect(private_interfaces, reason = "the trait is sealed")]
        fn received(&mut self, pdu: Pdu, limits: &Limits) -> Result<Window, FatalError>;
        /// The payload of that PDU is complete; `intact` unless its digest does not match.
        fn payload_complete(&mut self, intact: bool);
        /// The command in this slot was not yet taken from the events.
        fn unseen(&self, slot: u16) -> bool;
        /// The next PDU to send.
        fn transmit(&mut self, limits: &Limits) -> Option<TxPdu>;
        /// The kernel has all payload of a PDU.
        fn transmitted(&mut self, payload: TxPayload);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Live,
    /// The peer broke the protocol; the termination request is still to be sent.
    Faulted(FatalError),
    /// The peer sent a termination request; `None` when it was too malformed to read.
    Terminated(Option<TermReq>),
    /// Nothing is sent or received any more.
    Silent,
}

/// One end of an NVMe/TCP queue pair.
#[derive(Debug)]
pub struct QPair<R> {
    framer: Framer,
    limits: Limits,
    life: Life,
    window: Window,
    /// Set while a digest is to come behind the payload.
    trailer: Option<Trailer>,
    pub(crate) role: R,
}

impl<R: Role> QPair<R> {
    pub(crate) fn with_role(role: R, limits: Limits) -> Self {
        Self {
            framer: Framer::new(),
            limits,
            life: Life::Live,
            window: Window::EMPTY,
            trailer: None,
            role,
        }
    }

    /// What bounds it.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// What the next received bytes are.
    pub fn want(&self) -> Want {
        if self.life != Life::Live {
            return Want::Nothing;
        }
        match self.window {
            Window { len: 0, .. } => match &self.trailer {
                Some(trailer) => Want::DataDigest(trailer.needed()),
                None => Want::Header(self.framer.needed()),
            },
            Window {
                slot: Some(slot), ..
            } if self.role.unseen(slot) => Want::Consumer,
            Window {
                slot: Some(slot),
                offset,
                len,
            } => Want::Payload { slot, offset, len },
            Window {
                slot: None, len, ..
            } => Want::Discard(len),
        }
    }

    /// Takes header bytes; to be called when [`Self::want`] says `Header`. Returns how many were
    /// used: fewer than given when a header is complete and something else follows.
    ///
    /// # Errors
    /// The peer broke the protocol: send what [`Self::transmit`] still gives, and close.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<usize, FatalError> {
        if self.life != Life::Live || self.window.len > 0 || self.trailer.is_some() {
            return Ok(0);
        }
        let step = self.framer.feed(bytes, R::RECEIVER, &self.limits);
        let handled = step.and_then(|(used, framed)| {
            let window = match framed {
                Framed::More => None,
                Framed::Garbage => {
                    self.life = Life::Terminated(None);
                    None
                }
                Framed::Pdu {
                    pdu: Pdu::TermReq(term),
                    ..
                } => {
                    self.life = Life::Terminated(Some(term));
                    None
                }
                Framed::Pdu { pdu, data_digest } => {
                    self.trailer = data_digest.then(Trailer::default);
                    Some(self.role.received(pdu, &self.limits)?)
                }
            };
            Ok((used, window))
        });
        match handled {
            Ok((used, window)) => {
                if let Some(window) = window {
                    self.window = window;
                    self.finish_window();
                }
                Ok(used)
            }
            Err(error) => {
                self.life = Life::Faulted(error);
                Err(error)
            }
        }
    }

    /// `moved` bytes of what [`Self::want`] announced were moved or skipped.
    pub fn payload_moved(&mut self, moved: u32) {
        debug_assert!(moved <= self.window.len);
        let moved = moved.min(self.window.len);
        self.window.len -= moved;
        self.window.offset = self.window.offset.saturating_add(moved);
        self.finish_window();
    }

    /// Takes bytes of the payload's digest; to be called when [`Self::want`] says `DataDigest`.
    /// `computed` is the CRC32C of all payload of this PDU as it was placed; for payload that was to
    /// be discarded it may be anything. Returns how many bytes were used. A mismatch is no offence:
    /// it fails the command.
    pub fn digest(&mut self, bytes: &[u8], computed: u32) -> usize {
        if self.life != Life::Live || self.window.len > 0 {
            return 0;
        }
        let Some(trailer) = &mut self.trailer else {
            return 0;
        };
        let (used, received) = trailer.feed(bytes);
        if let Some(received) = received {
            self.trailer = None;
            let discarded = self.window.slot.is_none();
            let matches = received == computed || mutated!(DigestIgnored);
            self.finish_pdu(discarded || matches);
        }
        used
    }

    /// Nobody wants the payload of this command any more, should it be arriving.
    pub(crate) fn discard_payload_of(&mut self, slot: u16) {
        if self.window.slot == Some(slot) {
            self.window.slot = None;
        }
    }

    fn finish_window(&mut self) {
        if self.window.len == 0 && self.trailer.is_none() {
            self.finish_pdu(true);
        }
    }

    fn finish_pdu(&mut self, intact: bool) {
        self.role.payload_complete(intact);
        self.framer.next_header();
        self.window = Window::EMPTY;
    }

    /// True when the stream could end here without cutting a PDU.
    pub fn at_boundary(&self) -> bool {
        self.framer.at_boundary() && self.window.len == 0
    }

    /// The next PDU to send, if there is one. After a fault: the termination request, once.
    pub fn transmit(&mut self) -> Option<TxPdu> {
        match self.life {
            Life::Live => self.role.transmit(&self.limits),
            Life::Faulted(error) => {
                self.life = Life::Silent;
                Some(pdu::term_req(R::TERM_REQ, error, self.framer.offending()))
            }
            Life::Terminated(_) | Life::Silent => None,
        }
    }

    /// The kernel has taken all payload of a PDU that [`Self::transmit`] gave.
    pub fn transmitted(&mut self, payload: TxPayload) {
        self.role.transmitted(payload);
    }

    /// The peer ended the connection with a termination request (or with one too malformed to
    /// read).
    pub fn terminated(&self) -> Option<Option<TermReq>> {
        match self.life {
            Life::Terminated(term) => Some(term),
            Life::Live | Life::Faulted(_) | Life::Silent => None,
        }
    }

    /// Sends and receives nothing any more.
    pub fn silence(&mut self) {
        self.life = Life::Silent;
    }
}
