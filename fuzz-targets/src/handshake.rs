//! ICReq and ICResp: both roles' answers to any 128 bytes, against the rules written down again.

use nvmf::tcp::negotiate::{self, IC_LEN, Negotiated, Offer};
use nvmf::tcp::{Digests, FatalError};

use crate::input::Input;
use crate::wire::{kind, u16_at, u32_at};

const IC_REQ: u8 = 0;
const IC_RESP: u8 = 1;

/// Runs what the bytes say.
///
/// # Panics
/// When an answer is not what the rules say.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let choice = input.u8();
    let ours = offer(&mut input);
    let as_host = choice & 4 != 0;
    let theirs = offer(&mut input);
    let req = negotiate::ic_req_of(&theirs);
    let mut pdu = if as_host {
        let answered = negotiate::answer_with(&req, &theirs);
        answered.expect("our own ICReq is good").1
    } else {
        req
    };
    // Whole, or with a few bytes changed.
    if choice & 8 != 0 {
        let bytes = input.take(IC_LEN);
        pdu[..bytes.len()].copy_from_slice(bytes);
    } else {
        for _ in 0..input.below(4) {
            let at = input.below(20);
            pdu[at] = input.u8();
        }
    }
    if as_host {
        host(&pdu, &ours);
    } else {
        controller(&pdu, &ours);
    }
    let beginning = input.take(200);
    stray(beginning);
}

/// What an end proposes; a value that cannot be proposed among them.
fn offer(input: &mut Input<'_>) -> Offer {
    let digests = input.u8();
    Offer {
        digests: Digests {
            header: digests & 1 != 0,
            data: digests & 2 != 0,
        },
        align: u32::from(input.u8()),
        max_r2t: u32::from(input.u8() % 12),
        max_h2c_data: input.pick(&[0, 4096, 8191, 131_072, u32::MAX]),
    }
}

/// The first offence of the fields that both PDUs have, as FES and FEI.
fn offence(pdu: &[u8; IC_LEN], expected: u8) -> Option<(u16, u32)> {
    let fields = [
        (pdu[0] != expected, 1, 0),
        (pdu[1] != 0, 1, 1),
        (pdu[2] != 128, 1, 2),
        (pdu[3] != 0, 1, 3),
        (u32_at(pdu, 4) != 128, 1, 4),
        (u16_at(pdu, 8) != 0, 6, 8),
        (pdu[10] > 31, 1, 10),
        (pdu[11] > 3, 1, 11),
    ];
    let found = fields.into_iter().find(|(wrong, ..)| *wrong);
    found.map(|(_, fes, fei)| (fes, fei))
}

fn controller(req: &[u8; IC_LEN], ours: &Offer) {
    match (negotiate::answer_with(req, ours), offence(req, IC_REQ)) {
        (Ok((negotiated, resp)), None) => {
            check(&negotiated, req, &resp);
            assert_eq!(negotiated.max_r2t, u32_at(req, 12).saturating_add(1));
            assert_eq!(offence(&resp, IC_RESP), None);
            // A host that asked so takes it, and means the same.
            let offered = Offer {
                digests: negotiated.digests,
                align: negotiated.tx_align,
                ..Offer::default()
            };
            let host = negotiate::agree_with(&resp, &offered).expect("our own ICResp is good");
            assert_eq!(host.digests, negotiated.digests);
            assert_eq!(host.max_h2c_data, negotiated.max_h2c_data);
            let aligned = (host.rx_align, host.tx_align);
            assert_eq!(aligned, (negotiated.tx_align, negotiated.rx_align));
        }
        (Err(error), Some(expected)) => refused(error, expected, req, false),
        (answer, expected) => panic!("{answer:?}, not {expected:?}"),
    }
}

fn host(resp: &[u8; IC_LEN], ours: &Offer) {
    let asked = ours.digests;
    let allowed = u8::from(asked.header) | u8::from(asked.data) << 1;
    let limit = u32_at(resp, 12);
    let expected = offence(resp, IC_RESP)
        .or_else(|| (resp[11] & !allowed != 0).then_some((1, 11)))
        .or_else(|| (limit < 4096 || !limit.is_multiple_of(4)).then_some((1, 12)));
    match (negotiate::agree_with(resp, ours), expected) {
        (Ok(negotiated), None) => {
            check(&negotiated, resp, &negotiate::ic_req_of(ours));
            assert_eq!(negotiated.max_h2c_data, limit);
        }
        (Err(error), Some(expected)) => refused(error, expected, resp, true),
        (answer, expected) => panic!("{answer:?}, not {expected:?}"),
    }
}

/// What was agreed is what the peer's PDU says, and ours.
fn check(negotiated: &Negotiated, peer: &[u8; IC_LEN], ours: &[u8; IC_LEN]) {
    let align = |pdu: &[u8; IC_LEN]| (u32::from(pdu[10]) + 1) * 4;
    assert_eq!(negotiated.tx_align, align(peer));
    assert_eq!(negotiated.rx_align, align(ours));
    let digests = negotiated.digests;
    assert_eq!(digests.header, peer[11] & 1 != 0);
    assert_eq!(digests.data, peer[11] & 2 != 0);
    assert!(negotiated.max_h2c_data >= 4096 && negotiated.max_r2t > 0);
}

/// A refusal names the first offence, and is a termination request that the other end can read.
fn refused(error: FatalError, expected: (u16, u32), offending: &[u8; IC_LEN], by_host: bool) {
    assert_eq!((error.fes.0, error.fei), expected);
    let bytes = negotiate::refuse(error, offending, by_host);
    let expected_kind = if by_host {
        kind::H2C_TERM_REQ
    } else {
        kind::C2H_TERM_REQ
    };
    assert_eq!((bytes[0], bytes[2]), (expected_kind, 24));
    assert!((24..=152).contains(&bytes.len()));
    assert_eq!(u32_at(&bytes, 4) as usize, bytes.len());
    let read = negotiate::termination(&bytes).expect("it is one");
    assert_eq!((read.fes, read.fei), (error.fes, error.fei));
}

/// Bytes that come where an IC PDU is expected: only whole termination requests are taken for one.
fn stray(bytes: &[u8]) {
    let read = negotiate::termination(bytes);
    let is_one = bytes.len() >= 24 && matches!(bytes[0], kind::H2C_TERM_REQ | kind::C2H_TERM_REQ);
    assert_eq!(read.is_some(), is_one);
    if let Some(first) = bytes.first() {
        assert_eq!(negotiate::may_begin(*first), *first <= kind::C2H_TERM_REQ);
    }
}
