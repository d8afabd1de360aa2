//! ICReq and ICResp: pure functions from one peer's parameters to what was agreed.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::digest::Digests;
use super::error::{FatalError, Fes};
use super::host::MAX_R2TS;
use super::limits::Limits;
use super::pdu::{CommonHeader, offset, pdu_type};

/// Length of ICReq and of ICResp.
pub const IC_LEN: usize = 128;
/// R2Ts that a host of ours takes for one command at a time.
pub const HOST_MAX_R2T: u32 = 4;
/// Largest payload of one H2CData that a controller of ours takes, in bytes.
pub const CONTROLLER_MAX_H2C_DATA: u32 = 1024 * 1024;

/// What an end proposes of itself in ICReq or ICResp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Digests that a host asks for. A controller grants each that it is asked for.
    pub digests: Digests,
    /// Alignment of the payload that it wants to receive, in bytes: a multiple of 4 up to 128. Sent as
    /// HPDA or CPDA.
    pub align: u32,
    /// R2Ts that a host takes for one command at a time (1 to 8). Sent as MAXR2T.
    pub max_r2t: u32,
    /// Largest payload of one H2CData that a controller takes, in bytes: a multiple of 4, at least
    /// 4096. Sent as MAXH2CDATA.
    pub max_h2c_data: u32,
}

impl Default for Offer {
    fn default() -> Self {
        Self {
            digests: Digests::default(),
            align: 4,
            max_r2t: HOST_MAX_R2T,
            max_h2c_data: CONTROLLER_MAX_H2C_DATA,
        }
    }
}

impl Offer {
    /// HPDA or CPDA: dwords, zero-based.
    fn pda(&self) -> u8 {
        (self.align.clamp(4, 128) / 4 - 1) as u8
    }

    fn max_r2t(&self) -> u32 {
        self.max_r2t.clamp(1, MAX_R2TS as u32)
    }

    fn max_h2c_data(&self) -> u32 {
        self.max_h2c_data.max(4096) & !3
    }
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct IcPdu {
    common: CommonHeader,
    pfv: U16,
    /// HPDA or CPDA: dwords, zero-based.
    pda: u8,
    digests: u8,
    /// ICReq: MAXR2T, zero-based. ICResp: MAXH2CDATA in bytes.
    limit: U32,
    reserved: [u8; 112],
}

const _: () = assert!(size_of::<IcPdu>() == IC_LEN);

/// What a host and a controller agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Negotiated {
    /// Alignment of payload that we receive, in bytes (4 to 128).
    pub rx_align: u32,
    /// Alignment of payload that we send, in bytes (4 to 128).
    pub tx_align: u32,
    /// Largest payload of one H2CData, in bytes.
    pub max_h2c_data: u32,
    /// R2Ts that one command may have outstanding.
    pub max_r2t: u32,
    /// Digests that PDUs carry.
    pub digests: Digests,
}

impl Negotiated {
    /// What bounds a queue pair on this connection. `in_capsule_limit` is in bytes.
    pub fn limits(&self, in_capsule_limit: u32, admin: bool) -> Limits {
        Limits {
            rx_align: self.rx_align,
            tx_align: self.tx_align,
            max_h2c_data: self.max_h2c_data,
            max_r2t: self.max_r2t,
            in_capsule_limit,
            digests: self.digests,
            admin,
        }
    }
}

fn ic_pdu(pdu_type: u8, pda: u8, digests: Digests, limit: u32) -> [u8; IC_LEN] {
    let common = CommonHeader {
        pdu_type,
        flags: 0,
        hlen: IC_LEN as u8,
        pdo: 0,
        plen: (IC_LEN as u32).into(),
    };
    let pdu = IcPdu {
        common,
        pfv: 0.into(),
        pda,
        digests: digests.to_wire(),
        limit: limit.into(),
        reserved: [0; 112],
    };
    let mut bytes = [0; IC_LEN];
    bytes.copy_from_slice(pdu.as_bytes());
    bytes
}

/// The ICReq of a host of ours that asks for `digests`.
pub fn ic_req(digests: Digests) -> [u8; IC_LEN] {
    ic_req_of(&Offer {
        digests,
        ..Offer::default()
    })
}

/// The ICReq that makes this offer.
pub fn ic_req_of(ours: &Offer) -> [u8; IC_LEN] {
    ic_pdu(
        pdu_type::IC_REQ,
        ours.pda(),
        ours.digests,
        ours.max_r2t() - 1,
    )
}

/// Checks of the fields that both IC PDUs have, lowest offset first.
fn check(bytes: &[u8; IC_LEN], expected_type: u8) -> Result<IcPdu, FatalError> {
    let Ok(pdu) = IcPdu::read_from_bytes(bytes) else {
        return Err(FatalError::field(offset::PLEN, "wrong length of an IC PDU"));
    };
    let common = pdu.common;
    if common.pdu_type != expected_type {
        return Err(FatalError::field(
            offset::TYPE,
            "not the IC PDU that starts a connection",
        ));
    }
    if common.flags != 0 {
        return Err(FatalError::field(offset::FLAGS, "flags in an IC PDU"));
    }
    if usize::from(common.hlen) != IC_LEN {
        return Err(FatalError::field(
            offset::HLEN,
            "wrong header length of an IC PDU",
        ));
    }
    if common.pdo != 0 {
        return Err(FatalError::field(offset::PDO, "data offset in an IC PDU"));
    }
    if common.plen.get() as usize != IC_LEN {
        return Err(FatalError::field(offset::PLEN, "wrong length of an IC PDU"));
    }
    if pdu.pfv.get() != 0 {
        return Err(FatalError {
            fes: Fes::UNSUPPORTED_PARAMETER,
            fei: 8,
            what: "PDU format version is not 0",
        });
    }
    if pdu.pda > 31 {
        return Err(FatalError::field(10, "data alignment above 128 bytes"));
    }
    if pdu.digests & !3 != 0 {
        return Err(FatalError::field(11, "reserved digest bits"));
    }
    Ok(pdu)
}

fn align(pda: u8) -> u32 {
    (u32::from(pda) + 1) * 4
}

/// The controller's side: checks an ICReq and makes the ICResp, which grants each digest that the
/// host asks for.
///
/// # Errors
/// The offence, for a termination request.
pub fn answer(req: &[u8; IC_LEN]) -> Result<(Negotiated, [u8; IC_LEN]), FatalError> {
    answer_with(req, &Offer::default())
}

/// As [`answer`], with another offer of ours than the default.
///
/// # Errors
/// The offence, for a termination request.
pub fn answer_with(
    req: &[u8; IC_LEN],
    ours: &Offer,
) -> Result<(Negotiated, [u8; IC_LEN]), FatalError> {
    let pdu = check(req, pdu_type::IC_REQ)?;
    let negotiated = Negotiated {
        rx_align: align(ours.pda()),
        tx_align: align(pdu.pda),
        max_h2c_data: ours.max_h2c_data(),
        max_r2t: pdu.limit.get().saturating_add(1),
        digests: Digests::from_wire(pdu.digests),
    };
    let resp = ic_pdu(
        pdu_type::IC_RESP,
        ours.pda(),
        negotiated.digests,
        ours.max_h2c_data(),
    );
    Ok((negotiated, resp))
}

/// The host's side: checks an ICResp against the digests that were asked for. The controller may
/// grant fewer.
///
/// # Errors
/// The offence, for a termination request.
pub fn agree(resp: &[u8; IC_LEN], asked: Digests) -> Result<Negotiated, FatalError> {
    let ours = Offer {
        digests: asked,
        ..Offer::default()
    };
    agree_with(resp, &ours)
}

/// As [`agree`], of the offer that the ICReq made.
///
/// # Errors
/// The offence, for a termination request.
pub fn agree_with(resp: &[u8; IC_LEN], ours: &Offer) -> Result<Negotiated, FatalError> {
    let pdu = check(resp, pdu_type::IC_RESP)?;
    if pdu.digests & !ours.digests.to_wire() != 0 {
        let what = "a digest was enabled that was not asked for";
        return Err(FatalError::field(11, what));
    }
    let max_h2c_data = pdu.limit.get();
    if max_h2c_data < 4096 || !max_h2c_data.is_multiple_of(4) {
        return Err(FatalError::field(
            12,
            "MAXH2CDATA below 4096 or not a multiple of 4",
        ));
    }
    Ok(Negotiated {
        rx_align: align(ours.pda()),
        tx_align: align(pdu.pda),
        max_h2c_data,
        max_r2t: ours.max_r2t(),
        digests: Digests::from_wire(pdu.digests),
    })
}

/// A termination request for an offending IC PDU: `host` says who sends it.
pub fn refuse(error: FatalError, offending: &[u8; IC_LEN], host: bool) -> Vec<u8> {
    let kind = if host {
        pdu_type::H2C_TERM_REQ
    } else {
        pdu_type::C2H_TERM_REQ
    };
    super::pdu::term_req(kind, error, offending)
        .header()
        .to_vec()
}

/// False for the first byte of what is neither an IC PDU nor a termination request: a peer that
/// speaks another protocol.
pub fn may_begin(first: u8) -> bool {
    use pdu_type::{C2H_TERM_REQ, H2C_TERM_REQ, IC_REQ, IC_RESP};
    [IC_REQ, IC_RESP, C2H_TERM_REQ, H2C_TERM_REQ].contains(&first)
}

/// If these bytes begin a termination request, what it says. For a peer that answers ICReq so.
pub fn termination(bytes: &[u8]) -> Option<super::TermReq> {
    let (header, _) = super::pdu::TermReqHeader::ref_from_prefix(bytes).ok()?;
    let kind = header.common.pdu_type;
    (kind == pdu_type::C2H_TERM_REQ || kind == pdu_type::H2C_TERM_REQ).then(|| super::TermReq {
        fes: Fes(header.fes.get()),
        fei: u32::from_le_bytes(header.fei),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Digests = Digests {
        header: false,
        data: false,
    };
    const HEADER: Digests = Digests {
        header: true,
        ..NONE
    };
    const DATA: Digests = Digests { data: true, ..NONE };
    const BOTH: Digests = Digests {
        header: true,
        data: true,
    };
    const ALL: [Digests; 4] = [NONE, HEADER, DATA, BOTH];

    #[test]
    fn our_host_and_our_controller_agree() {
        for asked in ALL {
            let (controller, resp) = answer(&ic_req(asked)).unwrap();
            let host = agree(&resp, asked).unwrap();
            assert_eq!(host, controller);
            assert_eq!(host.digests, asked);
            assert_eq!((host.tx_align, host.max_r2t), (4, HOST_MAX_R2T));
        }
    }

    #[test]
    fn each_bad_field_of_an_ic_pdu_is_reported_at_its_offset_lowest_first() {
        for (at, value, fes, fei) in [
            (0, 0x04, 1, 0),
            (1, 0x01, 1, 1),
            (2, 127, 1, 2),
            (3, 8, 1, 3),
            (4, 127, 1, 4),
            (8, 1, 6, 8),
            (10, 32, 1, 10),
            (11, 4, 1, 11),
        ] {
            let mut req = ic_req(NONE);
            req[at] = value;
            // A second offence, further on, must not hide the first.
            req[11] |= 8;
            let error = answer(&req).unwrap_err();
            assert_eq!((error.fes.0, error.fei), (fes, fei), "byte {at}");
        }
    }

    #[test]
    fn a_host_refuses_digests_it_did_not_ask_for_and_a_tiny_maxh2cdata() {
        for (asked, granted) in [(NONE, 1), (NONE, 2), (HEADER, 2), (HEADER, 3), (DATA, 1)] {
            let (_, mut resp) = answer(&ic_req(NONE)).unwrap();
            resp[11] = granted;
            let error = agree(&resp, asked).unwrap_err();
            assert_eq!((error.fes.0, error.fei), (1, 11), "{asked:?}, {granted}");
        }
        let (_, mut tiny) = answer(&ic_req(NONE)).unwrap();
        tiny[12..16].copy_from_slice(&4092u32.to_le_bytes());
        let error = agree(&tiny, NONE).unwrap_err();
        assert_eq!((error.fes.0, error.fei), (1, 12));
    }

    #[test]
    fn a_refused_ic_pdu_is_echoed_as_a_whole() {
        let mut req = ic_req(BOTH);
        req[10] = 77;
        let error = answer(&req).unwrap_err();
        for (host, kind) in [(true, 0x02), (false, 0x03)] {
            let term = refuse(error, &req, host);
            assert_eq!((term[0], &term[4..8]), (kind, &152u32.to_le_bytes()[..]));
            assert_eq!(
                (&term[8..14], &term[24..]),
                (&[1, 0, 10, 0, 0, 0][..], &req[..])
            );
        }
    }

    #[test]
    fn a_host_does_without_digests_that_the_controller_does_not_grant() {
        let (_, resp) = answer(&ic_req(NONE)).unwrap();
        assert_eq!(agree(&resp, BOTH).unwrap().digests, NONE);
        let (_, resp) = answer(&ic_req(DATA)).unwrap();
        assert_eq!(resp[11], 2);
        assert_eq!(agree(&resp, BOTH).unwrap().digests, DATA);
    }

    #[test]
    fn every_alignment_is_offered_and_kept_both_ways() {
        for ours in 0..32 {
            for theirs in 0..32 {
                let offer = |pda: u32| Offer {
                    align: (pda + 1) * 4,
                    ..Offer::default()
                };
                let req = ic_req_of(&offer(ours));
                assert_eq!(u32::from(req[10]), ours);
                let (controller, resp) = answer_with(&req, &offer(theirs)).unwrap();
                let host = agree_with(&resp, &offer(ours)).unwrap();
                let of = |pda| (pda + 1) * 4;
                assert_eq!((host.rx_align, host.tx_align), (of(ours), of(theirs)));
                assert_eq!(
                    (controller.rx_align, controller.tx_align),
                    (of(theirs), of(ours))
                );
            }
        }
    }

    #[test]
    fn what_cannot_be_offered_becomes_the_nearest_that_can() {
        for (align, pda) in [(0, 0), (4, 0), (7, 0), (8, 1), (128, 31), (4096, 31)] {
            let ours = Offer {
                align,
                max_r2t: 0,
                max_h2c_data: 5,
                ..Offer::default()
            };
            let req = ic_req_of(&ours);
            assert_eq!((req[10], &req[12..16]), (pda, &[0; 4][..]));
            let (_, resp) = answer_with(&req, &ours).unwrap();
            assert_eq!((resp[10], &resp[12..16]), (pda, &4096u32.to_le_bytes()[..]));
            assert_eq!(agree_with(&resp, &ours).unwrap().max_r2t, 1);
        }
    }

    #[test]
    fn alignment_and_r2t_limit_are_made_ordinary_counts() {
        let mut req = ic_req(NONE);
        req[10] = 31;
        req[12..16].copy_from_slice(&0u32.to_le_bytes());
        let (agreed, _) = answer(&req).unwrap();
        assert_eq!((agreed.tx_align, agreed.max_r2t), (128, 1));
    }
}
