//! Follows a byte stream from PDU to PDU, by a reading of the specification of its own.
//!
//! It shares no code with the machine, so a mistake there is not repeated here.

/// PDU types (NVMe/TCP, figure "PDU Type").
pub(super) mod kind {
    pub(crate) const H2C_TERM_REQ: u8 = 0x02;
    pub(crate) const C2H_TERM_REQ: u8 = 0x03;
    pub(crate) const CAPSULE_CMD: u8 = 0x04;
    pub(crate) const CAPSULE_RESP: u8 = 0x05;
    pub(crate) const H2C_DATA: u8 = 0x06;
    pub(crate) const C2H_DATA: u8 = 0x07;
    pub(crate) const R2T: u8 = 0x09;
}

/// Flags of the common header.
pub(super) mod flag {
    pub(crate) const HEADER_DIGEST: u8 = 0x01;
    pub(crate) const LAST_PDU: u8 = 0x04;
    pub(crate) const SUCCESS: u8 = 0x08;
}

/// Bytes of the common header.
const COMMON: usize = 8;
/// Bytes of a digest.
pub(super) const DIGEST: usize = 4;

/// A header as it travels, its digest included.
#[derive(Debug, Clone, Default)]
pub(super) struct Header(pub(super) Vec<u8>);

impl Header {
    fn u16(&self, at: usize) -> u16 {
        self.0
            .get(at..at + 2)
            .map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
    }

    fn u32(&self, at: usize) -> u32 {
        let bytes = self.0.get(at..at + 4);
        bytes.map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    pub(super) fn kind(&self) -> u8 {
        self.0.first().copied().unwrap_or_default()
    }

    pub(super) fn flags(&self) -> u8 {
        self.0.get(1).copied().unwrap_or_default()
    }

    pub(super) fn hlen(&self) -> usize {
        self.0.get(2).copied().unwrap_or_default().into()
    }

    pub(super) fn pdo(&self) -> usize {
        self.0.get(3).copied().unwrap_or_default().into()
    }

    pub(super) fn plen(&self) -> usize {
        self.u32(4) as usize
    }

    /// True of either termination request, which never has digests.
    pub(super) fn is_term_req(&self) -> bool {
        matches!(self.kind(), kind::H2C_TERM_REQ | kind::C2H_TERM_REQ)
    }

    /// The command that it is about.
    pub(super) fn cid(&self) -> Option<u16> {
        match self.kind() {
            kind::CAPSULE_CMD => Some(self.u16(COMMON + 2)),
            kind::CAPSULE_RESP => Some(self.u16(COMMON + 12)),
            kind::H2C_DATA | kind::C2H_DATA | kind::R2T => Some(self.u16(COMMON)),
            _ => None,
        }
    }

    /// DATAO or R2TO.
    pub(super) fn offset(&self) -> u32 {
        self.u32(12)
    }

    /// DATAL or R2TL.
    pub(super) fn length(&self) -> u32 {
        self.u32(16)
    }

    /// FES and FEI of a termination request.
    pub(super) fn termination(&self) -> (u16, u32) {
        (self.u16(8), self.u32(10))
    }

    pub(super) fn put16(&mut self, at: usize, value: u16) {
        self.put(at, &value.to_le_bytes());
    }

    pub(super) fn put32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.0.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    /// Makes the digest right, if there is one.
    pub(super) fn seal(&mut self) {
        let hlen = self.hlen();
        if self.0.len() == hlen + DIGEST {
            let digest = crc32c::crc32c(&self.0[..hlen]);
            self.put32(hlen, digest);
        }
    }
}

/// What the next bytes turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// More are needed.
    Short,
    /// They complete a header.
    Header,
    /// They are padding, payload or its digest.
    Body,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Follower {
    header_digest: bool,
    header: Header,
    /// The header is complete.
    whole: bool,
    /// Bytes that follow the header and have not come.
    body: usize,
}

impl Follower {
    pub(super) fn new(header_digest: bool) -> Self {
        Self {
            header_digest,
            ..Self::default()
        }
    }

    /// Bytes of a header, as far as can be told.
    fn needed(&self) -> usize {
        if self.header.0.len() < COMMON {
            return COMMON;
        }
        let digest = if self.header_digest && !self.header.is_term_req() {
            DIGEST
        } else {
            0
        };
        (self.header.hlen() + digest).max(COMMON)
    }

    /// Takes some of `bytes`: how many, and what they are.
    pub(super) fn step(&mut self, bytes: &[u8]) -> (usize, Step) {
        if self.whole && self.body > 0 {
            let take = self.body.min(bytes.len());
            self.body -= take;
            return (take, if take > 0 { Step::Body } else { Step::Short });
        }
        if self.whole {
            self.header.0.clear();
            self.whole = false;
        }
        let mut used = 0;
        loop {
            let needed = self.needed();
            let take = (needed - self.header.0.len()).min(bytes.len() - used);
            self.header.0.extend_from_slice(&bytes[used..used + take]);
            used += take;
            if self.header.0.len() < needed {
                return (used, Step::Short);
            }
            if needed == self.needed() {
                self.whole = true;
                self.body = self.header.plen().saturating_sub(needed);
                return (used, Step::Header);
            }
        }
    }

    /// The header of the current PDU, complete after [`Step::Header`].
    pub(super) fn header(&self) -> &Header {
        &self.header
    }

    /// The header of the current PDU is complete.
    pub(super) fn is_whole(&self) -> bool {
        self.whole
    }

    /// Bytes of the current PDU behind its header that have not come.
    pub(super) fn left(&self) -> usize {
        if self.whole { self.body } else { 0 }
    }

    /// Between two PDUs.
    pub(super) fn at_boundary(&self) -> bool {
        if self.whole {
            self.body == 0
        } else {
            self.header.0.is_empty()
        }
    }
}
