//! PDUs as bytes: made for a receiver, correct but for what the input spoils; and read.

use nvmf::tcp::{Limits, crc32c};

use crate::input::Input;

/// PDU types (NVMe/TCP, figure "PDU Types").
pub(crate) mod kind {
    pub(crate) const H2C_TERM_REQ: u8 = 0x02;
    pub(crate) const C2H_TERM_REQ: u8 = 0x03;
    pub(crate) const CAPSULE_CMD: u8 = 0x04;
    pub(crate) const CAPSULE_RESP: u8 = 0x05;
    pub(crate) const H2C_DATA: u8 = 0x06;
    pub(crate) const C2H_DATA: u8 = 0x07;
    pub(crate) const R2T: u8 = 0x09;
}

/// Flags of the common header.
pub(crate) const LAST_PDU: u8 = 1 << 2;
pub(crate) const SUCCESS: u8 = 1 << 3;

/// Largest header that is received, with its digest and padding: PDO is a byte.
pub(crate) const MAX_HEADER: usize = 255;
/// Largest termination request, and more than any other header that is sent.
pub(crate) const MAX_TERM_REQ: usize = 152;

/// Bytes of a header of this type.
fn header_len(kind: u8) -> usize {
    match kind {
        kind::CAPSULE_CMD => 72,
        _ => 24,
    }
}

/// A PDU for a receiver with these limits: header fields from byte 8 on, and payload. One in sixteen
/// is spoilt, by a bit of the header before its digest is made, of the digests, or of the payload.
pub(crate) fn pdu(
    input: &mut Input<'_>,
    limits: &Limits,
    kind: u8,
    flags: u8,
    fields: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let hlen = header_len(kind);
    let is_term_req = matches!(kind, kind::H2C_TERM_REQ | kind::C2H_TERM_REQ);
    let carries_data = matches!(kind, kind::CAPSULE_CMD | kind::H2C_DATA | kind::C2H_DATA);
    let header_digest = limits.digests.header && !is_term_req;
    let data_digest = limits.digests.data && carries_data && !payload.is_empty();
    let after = hlen + if header_digest { 4 } else { 0 };
    let has_offset = carries_data && (kind != kind::CAPSULE_CMD || !payload.is_empty());
    let starts = if has_offset {
        after.next_multiple_of(limits.rx_align as usize)
    } else {
        after
    };
    let plen = starts + payload.len() + if data_digest { 4 } else { 0 };
    let mut header = vec![
        kind,
        flags | u8::from(header_digest) | u8::from(data_digest) << 1,
        hlen as u8,
        if has_offset { starts as u8 } else { 0 },
    ];
    header.extend_from_slice(&(plen as u32).to_le_bytes());
    header.extend_from_slice(fields);
    header.resize(hlen, 0);
    let spoilt = input.u8();
    if spoilt == 0xff {
        let at = input.below(hlen);
        header[at] ^= 1 << input.below(8);
    }
    let digest = crc32c(0, &header);
    let mut bytes = header;
    if header_digest {
        bytes.extend_from_slice(&digest.to_le_bytes());
    }
    bytes.resize(starts, 0);
    bytes.extend_from_slice(payload);
    if data_digest {
        bytes.extend_from_slice(&crc32c(0, payload).to_le_bytes());
    }
    if (0xf0..0xff).contains(&spoilt) {
        let at = usize::from(input.u16()) % bytes.len();
        bytes[at] ^= 1 << input.below(8);
    }
    bytes
}

/// Fields of a data PDU or R2T, from byte 8 on.
pub(crate) fn data_fields(cccid: u16, ttag: u16, offset: u32, length: u32) -> Vec<u8> {
    let mut fields = cccid.to_le_bytes().to_vec();
    fields.extend_from_slice(&ttag.to_le_bytes());
    fields.extend_from_slice(&offset.to_le_bytes());
    fields.extend_from_slice(&length.to_le_bytes());
    fields
}

/// A termination request with these fields.
pub(crate) fn term_req(input: &mut Input<'_>, limits: &Limits, kind: u8) -> Vec<u8> {
    let mut fields = input.u16().to_le_bytes().to_vec();
    fields.extend_from_slice(&input.u32().to_le_bytes());
    fields.resize(16, 0);
    let len = input.below(140);
    let echoed = input.take(len).to_vec();
    pdu(input, limits, kind, 0, &fields, &echoed)
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}
