//! Faults of one connection: what the pipe does to the PDUs that pass, and what must follow.
//!
//! A peer that misbehaves is made from one that does not, by altering, dropping, repeating or forging
//! its PDUs. Header digests are made right again, unless it is they that are to be wrong.

use std::collections::{BTreeSet, VecDeque};

use super::expect::{EndingIs, Expectations, Failing, Side};
use super::follower::{DIGEST, Follower, Header, Step, flag, kind};
use super::random::Random;
use crate::tcp::Digests;

/// What goes wrong with a connection, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Nothing.
    None,
    /// Both streams end wherever they are, also inside a PDU.
    Cut,
    /// The connection breaks, and what was on the way is gone.
    Reset,
    /// The connection breaks, and the controller loses what it had acknowledged and not flushed.
    PowerCut,
    /// A side ends the connection.
    Ended(Side),
    /// A bit of the payload that a side sends, or of its digest, changes. Needs data digests.
    PayloadBit(Side),
    /// A bit of a header that a side sends, or of its digest, changes. Needs header digests.
    HeaderBit(Side),
    /// A bit of a header field that every receiver checks changes.
    CheckedBit(Side),
    /// A side sends a termination request.
    TermReq(Side),
    /// A side's data PDU lies elsewhere than it says.
    DataShifted(Side),
    /// An R2T asks for more than the command has.
    R2tTooLong,
    /// An R2T asks for data out of order.
    R2tShifted,
    /// An R2T comes twice.
    R2tRepeated,
    /// The last data of a read never comes, and the controller says that all is well.
    TailDropped,
    /// Data in the middle of a read is called the last, and a success; nothing follows.
    EarlySuccess,
    /// A command is answered with an error before all its data has left.
    EarlyAnswer,
    /// A response comes twice.
    ResponseRepeated,
    /// C2HData is for a command that there is not.
    DataForeign,
    /// H2CData has a transfer tag that there is not.
    TagForeign,
    /// H2CData has LAST_PDU where it should not, or lacks it.
    LastFlipped,
    /// A capsule is longer than was agreed.
    CapsuleTooLong,
}

impl Fault {
    /// Those that a connection with these digests can have.
    pub fn possible(digests: Digests) -> Vec<Self> {
        let mut faults = vec![
            Self::Cut,
            Self::Reset,
            Self::PowerCut,
            Self::R2tTooLong,
            Self::R2tShifted,
            Self::R2tRepeated,
            Self::TailDropped,
            Self::EarlySuccess,
            Self::EarlyAnswer,
            Self::ResponseRepeated,
            Self::DataForeign,
            Self::TagForeign,
            Self::LastFlipped,
            Self::CapsuleTooLong,
        ];
        for side in [Side::Host, Side::Controller] {
            faults.extend([
                Self::Ended(side),
                Self::CheckedBit(side),
                Self::TermReq(side),
                Self::DataShifted(side),
            ]);
            if digests.data {
                faults.push(Self::PayloadBit(side));
            }
            if digests.header {
                faults.push(Self::HeaderBit(side));
            }
        }
        faults
    }

    /// It comes at a moment, and not with a PDU.
    pub(super) fn is_timed(self) -> bool {
        matches!(
            self,
            Self::Cut | Self::Reset | Self::PowerCut | Self::Ended(_)
        )
    }
}

/// What becomes of a PDU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Pass,
    Swallow,
    /// A bit of the byte so far behind the header changes.
    Flip(usize),
}

/// One way through the pipe.
#[derive(Debug)]
struct Way {
    follower: Follower,
    verdict: Verdict,
    /// PDUs that go in between two others.
    forged: VecDeque<Vec<u8>>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Interference {
    fault: Fault,
    digests: Digests,
    random: Random,
    /// PDUs that could have been hit and are let pass.
    spare: usize,
    landed: bool,
    ways: [Way; 2],
    /// Whatever else the controller says about this command is kept from the host.
    muted: Option<u16>,
    /// Commands that were answered.
    answered: BTreeSet<u16>,
    /// Commands that the host gave up.
    forgotten: BTreeSet<u16>,
}

impl Interference {
    pub(super) fn new(fault: Fault, digests: Digests, mut random: Random) -> Self {
        let way = || Way {
            follower: Follower::new(digests.header),
            verdict: Verdict::Pass,
            forged: VecDeque::new(),
        };
        Self {
            fault,
            digests,
            spare: random.below(8),
            random,
            landed: false,
            ways: [way(), way()],
            muted: None,
            answered: BTreeSet::new(),
            forgotten: BTreeSet::new(),
        }
    }

    /// A command with this CID begins.
    pub(super) fn remember(&mut self, cid: u16) {
        self.forgotten.remove(&cid);
    }

    /// The host gives a command up: it is not hit. False when it may have been.
    pub(super) fn forget(&mut self, cid: u16) -> bool {
        if !self.landed {
            self.forgotten.insert(cid);
        }
        !self.landed
    }

    pub(super) fn landed(&self) -> bool {
        self.landed
    }

    /// What looks like a termination request in the stream of this side may be none of its own: it is
    /// forged, or the headers no longer say where PDUs begin.
    pub(super) fn forges_term_req(&self, from: Side) -> bool {
        match self.fault {
            Fault::TermReq(side) | Fault::HeaderBit(side) | Fault::CheckedBit(side) => side == from,
            Fault::CapsuleTooLong => from == Side::Host,
            _ => false,
        }
    }

    /// Forged PDUs for the stream of this side, when it is between two PDUs.
    pub(super) fn take_forged(&mut self, from: Side) -> Vec<u8> {
        let way = &mut self.ways[from.index()];
        if !way.follower.at_boundary() {
            return Vec::new();
        }
        way.forged.drain(..).flatten().collect()
    }

    /// What becomes of bytes that this side has sent; `waiting` more of them have been handed over.
    pub(super) fn pass(
        &mut self,
        from: Side,
        bytes: &[u8],
        waiting: usize,
        expect: &mut Expectations,
    ) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len());
        let mut rest = bytes;
        while !rest.is_empty() {
            let way = &mut self.ways[from.index()];
            let left = way.follower.left();
            let (used, step) = way.follower.step(rest);
            let (taken, after) = rest.split_at(used);
            rest = after;
            match step {
                Step::Short => break,
                Step::Header => {
                    let mut header = way.follower.header().clone();
                    let body = way.follower.left();
                    let handed = rest.len() + waiting;
                    let verdict = self.header(from, &mut header, body, handed, expect);
                    let way = &mut self.ways[from.index()];
                    way.verdict = verdict;
                    if verdict != Verdict::Swallow {
                        out.extend_from_slice(&header.0);
                    }
                    if let Verdict::Flip(at) = verdict {
                        // Counted from the end, as the body shrinks.
                        way.verdict = Verdict::Flip(body - at);
                    }
                }
                Step::Body => match way.verdict {
                    Verdict::Swallow => {}
                    Verdict::Flip(at) if at <= left && at > left - used => {
                        let start = out.len();
                        out.extend_from_slice(taken);
                        out[start + left - at] ^= 1 << self.random.below(8);
                    }
                    Verdict::Pass | Verdict::Flip(_) => out.extend_from_slice(taken),
                },
            }
            out.extend(self.take_forged(from));
        }
        out
    }

    /// A header has come, with `body` bytes behind it, of which `handed` were handed over.
    fn header(
        &mut self,
        from: Side,
        header: &mut Header,
        body: usize,
        handed: usize,
        expect: &mut Expectations,
    ) -> Verdict {
        let Some(cid) = header.cid() else {
            return Verdict::Pass;
        };
        let answers = header.kind() == kind::CAPSULE_RESP || header.flags() & flag::SUCCESS != 0;
        if from == Side::Controller && self.muted == Some(cid) {
            return Verdict::Swallow;
        }
        if header.kind() == kind::CAPSULE_CMD {
            self.answered.remove(&cid);
        } else if from == Side::Controller && answers {
            self.answered.insert(cid);
        }
        let spared = self.landed || self.forgotten.contains(&cid);
        if spared || !self.applies(from, header, body, handed, cid) {
            return Verdict::Pass;
        }
        if self.spare > 0 {
            self.spare -= 1;
            return Verdict::Pass;
        }
        self.landed = true;
        self.strike(from, header, body, cid, expect)
    }

    /// The fault could hit this PDU.
    fn applies(&self, from: Side, header: &Header, body: usize, handed: usize, cid: u16) -> bool {
        let kind = header.kind();
        let is_data = matches!(kind, kind::H2C_DATA | kind::C2H_DATA);
        let last = header.flags() & flag::LAST_PDU != 0;
        let success = header.flags() & flag::SUCCESS != 0;
        match self.fault {
            Fault::None | Fault::Cut | Fault::Reset | Fault::PowerCut | Fault::Ended(_) => false,
            Fault::PayloadBit(side) => side == from && body > 0,
            Fault::HeaderBit(side) | Fault::CheckedBit(side) | Fault::TermReq(side) => side == from,
            Fault::DataShifted(side) => side == from && is_data,
            Fault::R2tTooLong | Fault::R2tShifted | Fault::R2tRepeated => kind == kind::R2T,
            Fault::TailDropped => kind == kind::C2H_DATA && last && !success,
            Fault::EarlySuccess => kind == kind::C2H_DATA && !last,
            Fault::EarlyAnswer => {
                from == Side::Host && body > handed && !self.answered.contains(&cid)
            }
            Fault::ResponseRepeated => kind == kind::CAPSULE_RESP,
            Fault::DataForeign => kind == kind::C2H_DATA,
            Fault::TagForeign | Fault::LastFlipped => kind == kind::H2C_DATA,
            Fault::CapsuleTooLong => kind == kind::CAPSULE_CMD && body > 0,
        }
    }

    fn strike(
        &mut self,
        from: Side,
        header: &mut Header,
        body: usize,
        cid: u16,
        expect: &mut Expectations,
    ) -> Verdict {
        let receiver = from.peer();
        let mut breaks = |ways: &[EndingIs]| {
            ways.iter().for_each(|&how| expect.may_end(receiver, how));
            expect.must_end(receiver);
        };
        match self.fault {
            Fault::None | Fault::Cut | Fault::Reset | Fault::PowerCut | Fault::Ended(_) => {}
            Fault::PayloadBit(_) => {
                expect.fails(cid, Failing::Digest);
                // Padding is nobody's.
                let padding = header.pdo().saturating_sub(header.0.len());
                return Verdict::Flip(self.random.between(padding, body - 1));
            }
            Fault::HeaderBit(_) => {
                let at = self.random.below(header.0.len());
                header.0[at] ^= 1 << self.random.below(8);
                breaks(&[EndingIs::Protocol(1, None), EndingIs::Protocol(3, None)]);
                if header.is_term_req() {
                    breaks(&[EndingIs::Terminated(None)]);
                }
            }
            Fault::CheckedBit(_) => {
                if self.random.percent(50) {
                    header.0[1] ^= 0x10 << self.random.below(4);
                    breaks(&[EndingIs::Protocol(1, Some(1))]);
                } else {
                    header.0[2] ^= 1 << self.random.below(8);
                    breaks(&[EndingIs::Protocol(1, Some(2))]);
                }
            }
            Fault::TermReq(_) => {
                let fes = self.random.between(1, 6) as u16;
                self.forge(from, term_req(from, fes));
                expect.must_end(receiver);
            }
            Fault::DataShifted(_) => {
                header.put32(12, header.offset() ^ 1 << self.random.between(2, 31));
                breaks(&[
                    EndingIs::Protocol(2, Some(0)),
                    EndingIs::Protocol(4, Some(0)),
                ]);
            }
            Fault::R2tTooLong => {
                let more = 1 << self.random.between(20, 30);
                header.put32(16, header.length().saturating_add(more));
                breaks(&[EndingIs::Protocol(4, Some(0))]);
            }
            Fault::R2tShifted => {
                header.put32(12, header.offset() ^ 4);
                breaks(&[EndingIs::Protocol(2, Some(0))]);
            }
            Fault::R2tRepeated => {
                self.forge(from, header.0.clone());
                breaks(&[
                    EndingIs::Protocol(2, Some(0)),
                    EndingIs::Protocol(5, Some(0)),
                ]);
            }
            Fault::TailDropped => {
                expect.fails(cid, Failing::Short);
                return Verdict::Swallow;
            }
            Fault::EarlySuccess => {
                header.0[1] |= flag::LAST_PDU | flag::SUCCESS;
                self.muted = Some(cid);
                expect.fails(cid, Failing::Short);
            }
            Fault::EarlyAnswer => {
                self.muted = Some(cid);
                let answer = early_answer(cid, self.digests);
                self.forge(Side::Controller, answer);
                expect.fails(cid, Failing::Early);
            }
            Fault::ResponseRepeated => {
                self.forge(from, header.0.clone());
                breaks(&[EndingIs::Protocol(1, Some(20))]);
            }
            Fault::DataForeign => {
                header.put16(8, cid ^ 0x8000);
                breaks(&[EndingIs::Protocol(1, Some(8))]);
            }
            Fault::TagForeign => {
                header.put16(10, 0xfffe);
                breaks(&[EndingIs::Protocol(1, Some(10))]);
            }
            Fault::LastFlipped => {
                header.0[1] ^= flag::LAST_PDU;
                breaks(&[EndingIs::Protocol(2, Some(0))]);
            }
            Fault::CapsuleTooLong => {
                header.put32(4, 1 << self.random.between(24, 31));
                breaks(&[EndingIs::Protocol(1, Some(4))]);
            }
        }
        if !matches!(self.fault, Fault::HeaderBit(_)) {
            header.seal();
        }
        Verdict::Pass
    }

    fn forge(&mut self, from: Side, pdu: Vec<u8>) {
        self.ways[from.index()].forged.push_back(pdu);
    }
}

fn term_req(from: Side, fes: u16) -> Vec<u8> {
    let kind = match from {
        Side::Host => kind::H2C_TERM_REQ,
        Side::Controller => kind::C2H_TERM_REQ,
    };
    let mut pdu = vec![0; 24];
    pdu[..8].copy_from_slice(&[kind, 0, 24, 0, 24, 0, 0, 0]);
    pdu[8..10].copy_from_slice(&fes.to_le_bytes());
    pdu
}

/// A response with Internal Error to a command that is not done.
fn early_answer(cid: u16, digests: Digests) -> Vec<u8> {
    let digest = if digests.header { DIGEST } else { 0 };
    let mut pdu = Header(vec![0; 24 + digest]);
    let flags = if digests.header {
        flag::HEADER_DIGEST
    } else {
        0
    };
    pdu.0[..5].copy_from_slice(&[kind::CAPSULE_RESP, flags, 24, 0, 24 + digest as u8]);
    pdu.put16(16, 0xffff);
    pdu.put16(20, cid);
    pdu.put16(22, 0x06 << 1);
    pdu.seal();
    pdu.0
}
