//! What is true of every machine, whatever its role: how it takes bytes, sends them, and ends.

use nvmf::tcp::{FatalError, Limits, QPair, Role, TxPdu, Want, crc32c};

use crate::wire::{MAX_HEADER, MAX_TERM_REQ, u16_at, u32_at};

/// What became of bytes that were fed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Header bytes, or bytes that nobody wants.
    Header,
    /// Payload of a slot at an offset, so many bytes of it.
    Payload(u16, u32, u32),
    /// The digest of a payload is complete, and right.
    Digest(bool),
    /// Events have to be taken first.
    Consumer,
    /// The connection is over.
    Over,
    /// The peer has broken the protocol.
    Broken(FatalError),
}

/// Feeds one machine and checks what it promises on the way.
#[derive(Debug, Default)]
pub(crate) struct Feeder {
    /// CRC32C of the payload so far.
    crc: u32,
    trailer: Vec<u8>,
    /// Bytes of the PDU that is being received, its header as far as it came, and its length once
    /// that is known.
    have: usize,
    header: Vec<u8>,
    plen: Option<usize>,
    /// The header of the PDU that the last step completed.
    complete: Option<Vec<u8>>,
}

/// Longest header of a PDU, digest and padding apart.
const HEADER_LEN: usize = 72;

impl Feeder {
    /// Gives the machine what it wants of `bytes`; returns how many it took. It takes at least one
    /// unless events come first or it is over.
    pub(crate) fn step<R: Role>(&mut self, machine: &mut QPair<R>, bytes: &[u8]) -> (usize, Step) {
        assert!(!bytes.is_empty());
        let (used, step) = match machine.want() {
            Want::Header(needed) => {
                assert!((1..=MAX_HEADER).contains(&needed), "{needed} header bytes");
                (self.crc, self.trailer) = (0, Vec::new());
                match machine.feed(bytes) {
                    Ok(used) => {
                        assert!((1..=bytes.len().min(MAX_HEADER)).contains(&used));
                        (used, Step::Header)
                    }
                    Err(error) => return (0, Step::Broken(error)),
                }
            }
            Want::Payload { slot, offset, len } => {
                assert!(len > 0, "payload of no bytes");
                let take = bytes.len().min(len as usize);
                self.crc = crc32c(self.crc, &bytes[..take]);
                machine.payload_moved(take as u32);
                (take, Step::Payload(slot, offset, take as u32))
            }
            Want::Discard(len) => {
                assert!(len > 0, "nothing to discard");
                let take = bytes.len().min(len as usize);
                self.crc = crc32c(self.crc, &bytes[..take]);
                machine.payload_moved(take as u32);
                (take, Step::Header)
            }
            Want::DataDigest(needed) => {
                assert!((1..=4).contains(&needed), "{needed} digest bytes");
                let used = machine.digest(bytes, self.crc);
                assert_eq!(used, needed.min(bytes.len()));
                self.trailer.extend_from_slice(&bytes[..used]);
                match <[u8; 4]>::try_from(&self.trailer[..]) {
                    Ok(digest) => (used, Step::Digest(u32::from_le_bytes(digest) == self.crc)),
                    Err(_) => (used, Step::Header),
                }
            }
            Want::Consumer => return (0, Step::Consumer),
            Want::Nothing => return (0, Step::Over),
        };
        self.follow(machine, &bytes[..used]);
        (used, step)
    }

    /// The header of the PDU that the last step was of, as far as it came.
    pub(crate) fn header(&self) -> &[u8] {
        self.complete.as_deref().unwrap_or(&self.header)
    }

    /// The header of the PDU that the last step completed, once.
    pub(crate) fn completed(&mut self) -> Option<Vec<u8>> {
        self.complete.take()
    }

    /// A PDU ends where its header says, and nowhere else.
    fn follow<R: Role>(&mut self, machine: &QPair<R>, taken: &[u8]) {
        if machine.terminated().is_some() {
            return;
        }
        self.have += taken.len();
        let missing = HEADER_LEN - self.header.len();
        self.header
            .extend_from_slice(&taken[..missing.min(taken.len())]);
        if self.header.len() >= 8 {
            self.plen = Some(u32_at(&self.header, 4) as usize);
        }
        let ended = self.plen == Some(self.have);
        assert!(self.plen.is_none_or(|plen| self.have <= plen));
        let boundary = machine.at_boundary() && matches!(machine.want(), Want::Header(_));
        assert_eq!(boundary, ended, "{} of {:?}", self.have, self.plen);
        if ended {
            let complete = Some(std::mem::take(&mut self.header));
            *self = Self {
                complete,
                ..Self::default()
            };
        }
    }
}

/// Checks that a broken machine says so once, exactly, and is silent from then on.
pub(crate) fn check_broken<R: Role>(machine: &mut QPair<R>, error: FatalError, term_req: u8) {
    assert_eq!(machine.want(), Want::Nothing);
    assert!((1..=6).contains(&error.fes.0), "FES {}", error.fes.0);
    if error.fes.0 == 1 {
        assert!(error.fei < 72, "FEI {} is no offset in a header", error.fei);
    }
    let pdu = machine.transmit().expect("a termination request");
    let header = pdu.header();
    assert_eq!(header[0], term_req);
    assert_eq!((header[1], header[2], header[3]), (0, 24, 0));
    assert_eq!(u32_at(header, 4) as usize, header.len());
    assert!((24..=MAX_TERM_REQ).contains(&header.len()));
    assert_eq!(u16_at(header, 8), error.fes.0);
    assert_eq!(u32_at(header, 10), error.fei);
    assert!(pdu.payload.is_none());
    check_silent(machine);
}

/// Checks that a machine takes and gives nothing any more.
pub(crate) fn check_silent<R: Role>(machine: &mut QPair<R>) {
    assert!(machine.transmit().is_none(), "not silent");
    assert_eq!(machine.want(), Want::Nothing);
    assert_eq!(machine.feed(&[4; 80]), Ok(0));
    assert_eq!(machine.digest(&[0; 4], 0), 0);
}

/// Checks the shape of a PDU that is sent: lengths, flags, digest, alignment, zeroed padding.
pub(crate) fn check_sent(pdu: &TxPdu, limits: &Limits) {
    let header = pdu.header();
    let (hlen, pdo) = (usize::from(header[2]), usize::from(header[3]));
    let data = pdu.payload.map_or(0, |payload| payload.len as usize);
    assert_eq!(u32_at(header, 4) as usize, pdu.wire_len());
    assert!(header.len() <= MAX_TERM_REQ);
    assert_eq!(header[1] & 1 != 0, limits.digests.header);
    assert_eq!(header[1] & 2 != 0, limits.digests.data && data > 0);
    let mut end = hlen;
    if limits.digests.header {
        assert_eq!(u32_at(header, hlen), crc32c(0, &header[..hlen]));
        end += 4;
    }
    if data > 0 {
        assert_eq!(pdo, header.len());
        assert_eq!(pdo % limits.tx_align as usize, 0);
    }
    assert!(header[end..].iter().all(|&byte| byte == 0));
}
