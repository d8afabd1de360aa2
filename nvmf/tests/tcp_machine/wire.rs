//! Captured connections, fed again to either end of the machine with every PDU cut at every point.
//!
//! What the end under test says itself has to be what was captured, byte for byte. The format and how
//! to capture anew: `wire/README.md`.

use std::collections::HashMap;
use std::path::Path;

use nvmf::spec::{Cqe, Sqe, sqe::sgl_type};
use nvmf::tcp::negotiate::{self, IC_LEN, Negotiated};
use nvmf::tcp::{ControllerEvent, Digests, Direction, QPair};
use zerocopy::FromBytes;

use crate::stepping::{feed_pieces, on_the_wire};

const FABRICS: u8 = 0x7f;
/// In-capsule data that our controller takes.
const IN_CAPSULE: u32 = 8192;

/// One PDU of a fixture.
#[derive(Debug)]
struct Pdu {
    from_host: bool,
    bytes: Vec<u8>,
}

impl Pdu {
    fn kind(&self) -> u8 {
        self.bytes[0]
    }

    fn last(&self) -> bool {
        self.bytes[1] & 4 != 0
    }

    fn success(&self) -> bool {
        self.bytes[1] & 8 != 0
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap())
    }

    fn sqe(&self) -> Sqe {
        Sqe::read_from_bytes(&self.bytes[8..72]).unwrap()
    }

    fn cqe(&self) -> Cqe {
        Cqe::read_from_bytes(&self.bytes[8..24]).unwrap()
    }

    /// Its data, as if the command's data began with `offset` bytes of something else.
    fn data_at(&self, offset: u32, len: u32) -> Vec<u8> {
        let start = usize::from(self.bytes[3]);
        let mut data = vec![0; offset as usize];
        data.extend_from_slice(&self.bytes[start..start + len as usize]);
        data
    }

    /// The same with another CID, where `cids` has one. Only without digests can that be.
    fn with_cid(&self, cids: &HashMap<u16, u16>) -> Self {
        let at = match self.kind() {
            0x04 => 10,
            0x05 => 20,
            _ => 8,
        };
        let cid = cids[&self.u16(at)];
        let mut bytes = self.bytes.clone();
        if cid != self.u16(at) {
            assert_eq!(bytes[1] & 3, 0);
            bytes[at..at + 2].copy_from_slice(&cid.to_le_bytes());
        }
        let from_host = self.from_host;
        Self { from_host, bytes }
    }

    /// Three pieces, so that two cuts are tried at once: `cut` bytes from the start and from the end.
    fn pieces(&self, cut: usize) -> Vec<&[u8]> {
        let cut = cut.min(self.bytes.len() / 2);
        let (first, rest) = self.bytes.split_at(cut);
        let (middle, last) = rest.split_at(rest.len() - cut);
        vec![first, middle, last]
    }
}

fn parse(text: &str) -> Vec<Pdu> {
    let mut pdus: Vec<Pdu> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if line.starts_with(['>', '<']) {
            let from_host = line.starts_with('>');
            let bytes = Vec::new();
            pdus.push(Pdu { from_host, bytes });
            continue;
        }
        let bytes = &mut pdus.last_mut().unwrap().bytes;
        let byte = |hex: &str| u8::from_str_radix(hex, 16).unwrap();
        for word in line.split_whitespace() {
            if let Some((value, times)) = word.split_once('*') {
                bytes.extend(std::iter::repeat_n(byte(value), times.parse().unwrap()));
            } else {
                bytes.extend((0..word.len()).step_by(2).map(|at| byte(&word[at..at + 2])));
            }
        }
    }
    for pdu in &pdus {
        assert_eq!(pdu.u32(4) as usize, pdu.bytes.len());
    }
    pdus
}

/// A captured connection.
struct Capture {
    admin: bool,
    negotiated: Negotiated,
    queue_size: u32,
    pdus: Vec<Pdu>,
}

impl Capture {
    /// Reads a fixture, with what both ends make of its ICReq and ICResp.
    fn read(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/wire")
            .join(name);
        let mut pdus = parse(&std::fs::read_to_string(path).unwrap());
        let rest = pdus.split_off(2);
        let ic = |pdu: &Pdu| <[u8; IC_LEN]>::try_from(&pdu.bytes[..]).unwrap();
        let (req, resp) = (ic(&pdus[0]), ic(&pdus[1]));
        let asked = Digests {
            header: req[11] & 1 != 0,
            data: req[11] & 2 != 0,
        };
        let as_host = negotiate::agree(&resp, asked);
        let as_controller = negotiate::answer(&req);
        let negotiated = if name.starts_with("linux-target") {
            assert_eq!(negotiate::ic_req(asked), req);
            as_host.unwrap()
        } else {
            let (negotiated, answer) = as_controller.unwrap();
            assert_eq!(answer, resp);
            if name.starts_with("ours") {
                assert_eq!(negotiate::ic_req(asked), req);
                assert_eq!(as_host.unwrap(), negotiated);
            }
            negotiated
        };
        // Connect: SQSIZE, zero-based, at byte 44 of the entry.
        let queue_size = u32::from(rest[0].u16(8 + 44)) + 1;
        Self {
            admin: name.contains("admin"),
            negotiated,
            queue_size,
            pdus: rest,
        }
    }

    /// The most that a host put in a capsule: as much as it may, where a fixture has longer writes.
    fn in_capsule(&self) -> u32 {
        let capsules = self.pdus.iter().filter(|pdu| pdu.kind() == 0x04);
        let sgls = capsules.map(|pdu| pdu.sqe().sgl1);
        let in_capsule = sgls.filter(|sgl| sgl.sgl_type == sgl_type::IN_CAPSULE);
        in_capsule.map(|sgl| sgl.length.get()).max().unwrap()
    }

    fn longest(&self) -> usize {
        self.pdus.iter().map(|pdu| pdu.bytes.len()).max().unwrap()
    }
}

fn direction(sqe: &Sqe) -> Direction {
    let len = sqe.sgl1.length.get();
    // The lowest two bits of an opcode say it; for Fabrics commands those of its type.
    let code = match sqe.opcode {
        FABRICS => sqe.nsid.get() as u8,
        opcode => opcode,
    };
    match code & 3 {
        _ if len == 0 => Direction::None,
        1 => Direction::Out,
        2 => Direction::In,
        other => panic!("data of direction {other}"),
    }
}

/// The fixture's controller speaks to our host.
fn host_side(capture: &Capture, cut: usize) {
    let limits = capture
        .negotiated
        .limits(capture.in_capsule(), capture.admin);
    let mut host = QPair::host(capture.queue_size, limits);
    let mut answered = 0;
    // Which CID a host takes depends on when it looked for completions, which is not captured.
    let mut cids = HashMap::new();
    for pdu in &capture.pdus {
        if pdu.from_host {
            let (offset, len) = if pdu.kind() == 0x04 {
                let sqe = pdu.sqe();
                let len = sqe.sgl1.length.get();
                let (_, cid) = host.submit(sqe, direction(&sqe), len).unwrap();
                cids.insert(sqe.cid.get(), cid);
                let in_capsule = sqe.sgl1.sgl_type == sgl_type::IN_CAPSULE;
                (0, if in_capsule { len } else { 0 })
            } else {
                (pdu.u32(12), pdu.u32(16))
            };
            let ours = host.transmit().unwrap();
            let bytes = on_the_wire(&ours, |_| pdu.data_at(offset, len));
            let expected = pdu.with_cid(&cids);
            assert!(bytes == expected.bytes, "{bytes:02x?}\n{expected:02x?}");
            if let Some(payload) = ours.payload {
                host.transmitted(payload);
            }
            continue;
        }
        let pdu = &pdu.with_cid(&cids);
        let mut placed = 0;
        let place = |_, offset: u32, bytes: &[u8]| {
            let at = usize::from(pdu.bytes[3]) + (offset - pdu.u32(12)) as usize;
            assert!(pdu.bytes[at..at + bytes.len()] == *bytes);
            placed += bytes.len();
        };
        feed_pieces(&mut host, pdu.pieces(cut), |_| (), place).unwrap();
        assert!(host.at_boundary());
        let completed = host.completed();
        match pdu.kind() {
            0x05 => assert_eq!(completed.unwrap().cqe, pdu.cqe()),
            0x07 => {
                assert_eq!(placed, pdu.u32(16) as usize);
                let done = completed.map(|done| (done.cqe.status().is_success(), done.sqhd_valid));
                assert_eq!(done, pdu.success().then_some((true, false)));
            }
            _ => assert!(completed.is_none()),
        }
        answered += usize::from(completed.is_some());
    }
    let commands = capture.pdus.iter().filter(|pdu| pdu.kind() == 0x04);
    assert_eq!(answered + host.outstanding(), commands.count());
}

/// The fixture's host speaks to our controller.
fn controller_side(capture: &Capture, cut: usize) {
    let limits = capture.negotiated.limits(IN_CAPSULE, capture.admin);
    let mut controller = QPair::controller(capture.queue_size, true, limits);
    let mut slots = HashMap::new();
    for pdu in &capture.pdus {
        if pdu.from_host {
            let mut events = Vec::new();
            let start = usize::from(pdu.bytes[3]);
            let base = if pdu.kind() == 0x06 { pdu.u32(12) } else { 0 };
            let place = |_, offset: u32, bytes: &[u8]| {
                let at = start + (offset - base) as usize;
                assert!(pdu.bytes[at..at + bytes.len()] == *bytes);
            };
            let seen = |machine: &mut QPair<_>| events.extend(machine.event());
            feed_pieces(&mut controller, pdu.pieces(cut), seen, place).unwrap();
            assert!(controller.at_boundary());
            events.extend(std::iter::from_fn(|| controller.event()));
            let fetched = |event: &ControllerEvent| {
                matches!(event, ControllerEvent::Fetched { intact: true, .. })
            };
            if pdu.kind() == 0x06 {
                assert_eq!(
                    events.iter().filter(|event| fetched(event)).count(),
                    events.len()
                );
                assert_eq!(events.len(), usize::from(pdu.last()));
                continue;
            }
            let Some(&ControllerEvent::Command {
                slot,
                sqe,
                in_capsule,
                ..
            }) = events.first()
            else {
                panic!("{events:?}")
            };
            assert_eq!(sqe, pdu.sqe());
            assert_eq!(events.len(), 1 + usize::from(in_capsule));
            assert!(events[1..].iter().all(fetched));
            slots.insert(sqe.cid.get(), slot);
            if sqe.opcode == FABRICS && sqe.nsid.get() as u8 == 1 {
                // CATTR, bit 2: no SQ flow control.
                let flow_control = pdu.bytes[8 + 46] & 4 == 0;
                controller.set_queue(capture.queue_size, flow_control);
            }
            continue;
        }
        match pdu.kind() {
            0x05 => {
                let slot = slots[&pdu.cqe().cid.get()];
                controller.respond(slot, pdu.cqe());
            }
            0x07 => {
                let slot = slots[&pdu.u16(8)];
                controller
                    .send(slot, pdu.u32(12), pdu.u32(16), pdu.last())
                    .unwrap();
                if pdu.success() {
                    controller.respond(slot, Cqe::default());
                }
            }
            0x09 => controller
                .fetch(slots[&pdu.u16(8)], pdu.u32(12), pdu.u32(16))
                .unwrap(),
            other => panic!("PDU type {other} of a controller"),
        }
        let ours = controller.transmit().unwrap();
        let bytes = on_the_wire(&ours, |_| pdu.data_at(pdu.u32(12), pdu.u32(16)));
        assert!(bytes == pdu.bytes, "{bytes:02x?}\n{:02x?}", pdu.bytes);
        if let Some(payload) = ours.payload {
            controller.transmitted(payload);
        }
        assert!(controller.transmit().is_none());
    }
}

fn replay(names: [&str; 2]) {
    for name in names {
        let capture = Capture::read(name);
        for cut in 0..=capture.longest() / 2 {
            host_side(&capture, cut);
            controller_side(&capture, cut);
        }
    }
}

#[test]
fn our_own_bytes_without_digests() {
    replay(["ours-admin-plain.hex", "ours-io-plain.hex"]);
}

#[test]
fn our_own_bytes_with_header_digests() {
    replay(["ours-admin-header.hex", "ours-io-header.hex"]);
}

#[test]
fn our_own_bytes_with_data_digests() {
    replay(["ours-admin-data.hex", "ours-io-data.hex"]);
}

#[test]
fn our_own_bytes_with_both_digests() {
    replay(["ours-admin-both.hex", "ours-io-both.hex"]);
}

/// The fixtures hold what they are there for.
#[test]
fn an_io_queue_was_captured_with_data_in_capsules_asked_for_and_read() {
    let capture = Capture::read("ours-io-both.hex");
    let count = |kind: u8| capture.pdus.iter().filter(|pdu| pdu.kind() == kind).count();
    // Connect, two writes, two reads, a flush; the reads succeed by flag.
    assert_eq!([0x04, 0x05, 0x06, 0x07, 0x09].map(count), [6, 4, 1, 2, 1]);
    assert_eq!(
        capture.negotiated.digests,
        Digests {
            header: true,
            data: true
        }
    );
}

#[test]
fn a_linux_host_speaks_to_our_controller() {
    for name in ["linux-host-admin.hex", "linux-host-io.hex"] {
        let capture = Capture::read(name);
        for cut in 0..=capture.longest() / 2 {
            controller_side(&capture, cut);
        }
    }
}

#[test]
fn a_linux_target_speaks_to_our_host() {
    for name in ["linux-target-admin.hex", "linux-target-io.hex"] {
        let capture = Capture::read(name);
        for cut in 0..=capture.longest() / 2 {
            host_side(&capture, cut);
        }
    }
}
