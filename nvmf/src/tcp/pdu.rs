//! PDU headers: layouts, the checks that need no state, and encoding.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::digest::{DIGEST_LEN, Digests};
use super::error::{FatalError, Fes};
use super::limits::Limits;
use super::outgoing::{MAX_HEADER_LEN, TxPdu};
use crate::spec::{Cqe, Sqe};

/// Largest termination request: header and 128 bytes of the offending PDU's header.
const TERM_REQ_MAX: u32 = 152;

pub(crate) const COMMON_LEN: usize = 8;

/// PDU types.
pub(crate) mod pdu_type {
    pub(crate) const IC_REQ: u8 = 0x00;
    pub(crate) const IC_RESP: u8 = 0x01;
    pub(crate) const H2C_TERM_REQ: u8 = 0x02;
    pub(crate) const C2H_TERM_REQ: u8 = 0x03;
    pub(crate) const CAPSULE_CMD: u8 = 0x04;
    pub(crate) const CAPSULE_RESP: u8 = 0x05;
    pub(crate) const H2C_DATA: u8 = 0x06;
    pub(crate) const C2H_DATA: u8 = 0x07;
    pub(crate) const R2T: u8 = 0x09;
}

/// Flags of the common header.
pub(crate) mod flag {
    pub(crate) const HEADER_DIGEST: u8 = 1 << 0;
    pub(crate) const DATA_DIGEST: u8 = 1 << 1;
    pub(crate) const LAST_PDU: u8 = 1 << 2;
    pub(crate) const SUCCESS: u8 = 1 << 3;
}

/// Common header of every PDU (NVMe/TCP, figure "PDU Common Header").
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct CommonHeader {
    pub(crate) pdu_type: u8,
    pub(crate) flags: u8,
    pub(crate) hlen: u8,
    pub(crate) pdo: u8,
    pub(crate) plen: U32,
}

/// CapsuleCmd.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct CapsuleCmd {
    pub(crate) common: CommonHeader,
    pub(crate) sqe: Sqe,
}

/// CapsuleResp.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct CapsuleResp {
    pub(crate) common: CommonHeader,
    pub(crate) cqe: Cqe,
}

/// H2CData, C2HData and R2T: the three have one layout.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct DataHeader {
    pub(crate) common: CommonHeader,
    pub(crate) cccid: U16,
    /// Reserved in C2HData.
    pub(crate) ttag: U16,
    pub(crate) offset: U32,
    pub(crate) length: U32,
    pub(crate) reserved: [u8; 4],
}

/// Header of a termination request, either direction.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct TermReqHeader {
    pub(crate) common: CommonHeader,
    pub(crate) fes: U16,
    pub(crate) fei: [u8; 4],
    pub(crate) reserved: [u8; 10],
}

const _: () = {
    assert!(size_of::<CommonHeader>() == COMMON_LEN);
    assert!(size_of::<CapsuleCmd>() == 72);
    assert!(size_of::<CapsuleResp>() == 24);
    assert!(size_of::<DataHeader>() == 24);
    assert!(size_of::<TermReqHeader>() == 24);
};

/// Byte offsets of fields, as FEI names them.
pub(crate) mod offset {
    pub(crate) const TYPE: u32 = 0;
    pub(crate) const FLAGS: u32 = 1;
    pub(crate) const HLEN: u32 = 2;
    pub(crate) const PDO: u32 = 3;
    pub(crate) const PLEN: u32 = 4;
    pub(crate) const CCCID: u32 = 8;
    pub(crate) const TTAG: u32 = 10;
    pub(crate) const DATA_LENGTH: u32 = 16;
}

/// A termination request that was received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TermReq {
    /// Fatal error status that the peer reports.
    pub fes: Fes,
    /// Fatal error information.
    pub fei: u32,
}

impl std::fmt::Display for TermReq {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} (FES {}, FEI {})",
            self.fes.text(),
            self.fes.0,
            self.fei
        )
    }
}

/// A data header taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Data {
    pub(crate) cccid: u16,
    pub(crate) ttag: u16,
    pub(crate) offset: u32,
    pub(crate) length: u32,
    /// Bytes of data that the PDU has.
    pub(crate) carried: u32,
    pub(crate) last: bool,
    pub(crate) success: bool,
}

impl Data {
    /// The header's length of data is that of the PDU. To be checked after the fields before it.
    pub(crate) fn check_length(&self) -> Result<(), FatalError> {
        if self.length == self.carried {
            return Ok(());
        }
        let what = "data length differs from what the PDU carries";
        Err(FatalError::field(offset::DATA_LENGTH, what))
    }
}

/// A received PDU, its fields checked as far as that needs no state.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pdu {
    CapsuleCmd { sqe: Sqe, data_len: u32 },
    CapsuleResp { cqe: Cqe },
    Data(Data),
    R2t(Data),
    TermReq(TermReq),
}

/// What a common header tells the framer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Header bytes.
    pub(crate) hlen: usize,
    /// Bytes of the header's digest, right behind it.
    pub(crate) header_digest: usize,
    /// Bytes between that and the payload.
    pub(crate) pad: usize,
    /// Payload bytes.
    pub(crate) data_len: u32,
    /// A digest follows the payload.
    pub(crate) data_digest: bool,
}

/// Who receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Receiver {
    Host,
    Controller,
}

/// Checks a common header in the order of its bytes, so that the lowest offence is reported.
///
/// `None` means that it is a termination request not worth an answer: just close.
pub(crate) fn check_common(
    header: &CommonHeader,
    receiver: Receiver,
    limits: &Limits,
) -> Result<Option<Shape>, FatalError> {
    use pdu_type::*;
    let expected = match (receiver, header.pdu_type) {
        (Receiver::Host, CAPSULE_RESP) => (0, 24, DataRule::Never),
        (Receiver::Host, C2H_DATA) => (flag::LAST_PDU | flag::SUCCESS, 24, DataRule::Always),
        (Receiver::Host, R2T) => (0, 24, DataRule::Never),
        (Receiver::Host, C2H_TERM_REQ) | (Receiver::Controller, H2C_TERM_REQ) => {
            return Ok(check_term_req(header));
        }
        (Receiver::Controller, CAPSULE_CMD) => (0, 72, DataRule::Optional),
        (Receiver::Controller, H2C_DATA) => (flag::LAST_PDU, 24, DataRule::Always),
        _ => {
            return Err(FatalError::field(
                offset::TYPE,
                "PDU type not expected here",
            ));
        }
    };
    let (flags_allowed, hlen, rule) = expected;
    let plen = header.plen.get();
    let pdo = u32::from(header.pdo);
    let header_digest = limits.digests.header_len();
    let header_end = u32::from(hlen) + header_digest as u32;
    // NVMe/TCP: flags that are not defined for a type are reserved, and digest flags are set if and
    // only if the digest was negotiated; that of data only where there is data.
    let data_digest = limits.digests.data && rule != DataRule::Never && pdo != 0 && plen > pdo;
    let expected_flags = digest_flags(limits.digests, u32::from(data_digest));
    if header.flags & !flags_allowed != expected_flags {
        return Err(FatalError::field(offset::FLAGS, "PDU flags not allowed"));
    }
    if header.flags & flag::SUCCESS != 0 && header.flags & flag::LAST_PDU == 0 {
        return Err(FatalError::field(offset::FLAGS, "SUCCESS without LAST_PDU"));
    }
    if header.hlen != hlen {
        return Err(FatalError::field(offset::HLEN, "wrong header length"));
    }
    let data_starts = match rule {
        DataRule::Never if pdo != 0 => {
            return Err(FatalError::field(
                offset::PDO,
                "data offset in a PDU without data",
            ));
        }
        DataRule::Never => header_end,
        DataRule::Optional | DataRule::Always if pdo == 0 => {
            // Allowed only when there is no data.
            if plen > header_end {
                return Err(FatalError::field(
                    offset::PDO,
                    "no data offset although data follows",
                ));
            }
            header_end
        }
        DataRule::Optional | DataRule::Always => {
            if pdo < header_end || pdo > plen || !pdo.is_multiple_of(limits.rx_align) {
                return Err(FatalError::field(offset::PDO, "data offset not acceptable"));
            }
            pdo
        }
    };
    if plen < data_starts || (rule == DataRule::Never && plen != header_end) {
        return Err(FatalError::field(
            offset::PLEN,
            "PDU length does not fit its header",
        ));
    }
    let digest_len = if data_digest { DIGEST_LEN as u32 } else { 0 };
    let data_len = match (plen - data_starts).checked_sub(digest_len) {
        Some(data_len) if data_len > 0 || !data_digest => data_len,
        _ => {
            return Err(FatalError::field(
                offset::PLEN,
                "no room for data in front of its digest",
            ));
        }
    };
    if header.pdu_type == CAPSULE_CMD && data_len > limits.in_capsule_limit {
        return Err(FatalError::field(
            offset::PLEN,
            "more in-capsule data than was agreed",
        ));
    }
    Ok(Some(Shape {
        hlen: usize::from(hlen),
        header_digest,
        pad: (data_starts - header_end) as usize,
        data_len,
        data_digest,
    }))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DataRule {
    Never,
    Optional,
    Always,
}

fn check_term_req(header: &CommonHeader) -> Option<Shape> {
    let plen = header.plen.get();
    let good = header.hlen == 24 && (24..=TERM_REQ_MAX).contains(&plen);
    good.then(|| Shape {
        hlen: 24,
        header_digest: 0,
        pad: 0,
        data_len: plen - 24,
        data_digest: false,
    })
}

/// The bits of LAST_PDU and SUCCESS.
fn last_and_success() -> (u8, u8) {
    if mutated!(LastAndSuccessSwapped) {
        (flag::SUCCESS, flag::LAST_PDU)
    } else {
        (flag::LAST_PDU, flag::SUCCESS)
    }
}

/// Types a complete header whose common part was checked.
pub(crate) fn parse(header: &[u8], shape: Shape) -> Result<Pdu, FatalError> {
    let short = FatalError::field(offset::HLEN, "wrong header length");
    let (common, _) = CommonHeader::ref_from_prefix(header).map_err(|_| short)?;
    match common.pdu_type {
        pdu_type::CAPSULE_CMD => {
            let (capsule, _) = CapsuleCmd::ref_from_prefix(header).map_err(|_| short)?;
            Ok(Pdu::CapsuleCmd {
                sqe: capsule.sqe,
                data_len: shape.data_len,
            })
        }
        pdu_type::CAPSULE_RESP => {
            let (capsule, _) = CapsuleResp::ref_from_prefix(header).map_err(|_| short)?;
            Ok(Pdu::CapsuleResp { cqe: capsule.cqe })
        }
        pdu_type::H2C_TERM_REQ | pdu_type::C2H_TERM_REQ => {
            let (term, _) = TermReqHeader::ref_from_prefix(header).map_err(|_| short)?;
            let term = TermReq {
                fes: Fes(term.fes.get()),
                fei: u32::from_le_bytes(term.fei),
            };
            Ok(Pdu::TermReq(term))
        }
        kind => {
            let (data, _) = DataHeader::ref_from_prefix(header).map_err(|_| short)?;
            let (last, success) = last_and_success();
            let parsed = Data {
                cccid: data.cccid.get(),
                ttag: data.ttag.get(),
                offset: data.offset.get(),
                length: data.length.get(),
                carried: shape.data_len,
                last: common.flags & last != 0,
                success: common.flags & success != 0,
            };
            if kind == pdu_type::R2T {
                return Ok(Pdu::R2t(parsed));
            }
            Ok(Pdu::Data(parsed))
        }
    }
}

/// Where payload starts after a header of `hlen` bytes, with its digest and the receiver's
/// alignment.
fn data_offset(hlen: usize, limits: &Limits) -> usize {
    (hlen + limits.digests.header_len()).next_multiple_of(limits.tx_align as usize)
}

/// The digest flags of a PDU with `data_len` bytes of data.
fn digest_flags(digests: Digests, data_len: u32) -> u8 {
    let header = if digests.header {
        flag::HEADER_DIGEST
    } else {
        0
    };
    let data = if digests.data && data_len > 0 {
        flag::DATA_DIGEST
    } else {
        0
    };
    header | data
}

fn common(pdu_type: u8, flags: u8, hlen: usize, pdo: usize, plen: usize) -> CommonHeader {
    CommonHeader {
        pdu_type,
        flags,
        hlen: hlen as u8,
        pdo: pdo as u8,
        plen: (plen as u32).into(),
    }
}

/// CapsuleCmd, with `data_len` bytes of in-capsule data after it.
pub(crate) fn capsule_cmd(sqe: Sqe, data_len: u32, limits: &Limits) -> TxPdu {
    let digests = limits.digests;
    let hlen = size_of::<CapsuleCmd>();
    let pdo = if data_len > 0 {
        data_offset(hlen, limits)
    } else {
        0
    };
    let starts = pdo.max(hlen + digests.header_len());
    let common = common(
        pdu_type::CAPSULE_CMD,
        digest_flags(digests, data_len),
        hlen,
        pdo,
        starts + data_len as usize + digests.data_len(data_len),
    );
    TxPdu::new(CapsuleCmd { common, sqe }.as_bytes(), starts, digests)
}

/// CapsuleResp.
pub(crate) fn capsule_resp(cqe: Cqe, digests: Digests) -> TxPdu {
    let hlen = size_of::<CapsuleResp>();
    let plen = hlen + digests.header_len();
    let flags = digest_flags(digests, 0);
    let common = common(pdu_type::CAPSULE_RESP, flags, hlen, 0, plen);
    TxPdu::new(CapsuleResp { common, cqe }.as_bytes(), plen, digests)
}

/// H2CData or C2HData, with `data.length` bytes of payload after it.
pub(crate) fn data(pdu_type: u8, data: Data, limits: &Limits) -> TxPdu {
    let hlen = size_of::<DataHeader>();
    let digests = limits.digests;
    let pdo = data_offset(hlen, limits);
    let (last, success) = last_and_success();
    let flags = digest_flags(digests, data.length)
        | if data.last { last } else { 0 }
        | if data.success { success } else { 0 };
    let plen = pdo + data.length as usize + digests.data_len(data.length);
    let common = common(pdu_type, flags, hlen, pdo, plen);
    TxPdu::new(data_header(common, data).as_bytes(), pdo, digests)
}

/// R2T.
pub(crate) fn r2t(data: Data, digests: Digests) -> TxPdu {
    let hlen = size_of::<DataHeader>();
    let plen = hlen + digests.header_len();
    let common = common(pdu_type::R2T, digest_flags(digests, 0), hlen, 0, plen);
    TxPdu::new(data_header(common, data).as_bytes(), plen, digests)
}

fn data_header(common: CommonHeader, data: Data) -> DataHeader {
    DataHeader {
        common,
        cccid: data.cccid.into(),
        ttag: data.ttag.into(),
        offset: data.offset.into(),
        length: data.length.into(),
        reserved: [0; 4],
    }
}

/// A termination request, with the start of the offending header behind it; never with digests.
pub(crate) fn term_req(pdu_type: u8, error: FatalError, offending: &[u8]) -> TxPdu {
    let hlen = size_of::<TermReqHeader>();
    // At most 128 bytes, which is the longest header.
    let echo = &offending[..offending.len().min(MAX_HEADER_LEN - hlen)];
    let header = TermReqHeader {
        common: common(pdu_type, 0, hlen, 0, hlen + echo.len()),
        fes: error.fes.0.into(),
        fei: error.fei.to_le_bytes(),
        reserved: [0; 10],
    };
    let mut bytes = [0; MAX_HEADER_LEN];
    bytes[..hlen].copy_from_slice(header.as_bytes());
    bytes[hlen..hlen + echo.len()].copy_from_slice(echo);
    let len = hlen + echo.len();
    TxPdu::new(&bytes[..len], len, Digests::default())
}
