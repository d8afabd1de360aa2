//! A stream of PDUs, good and bad, cut in any way: how it is cut must not matter.
//!
//! The same bytes go into two machines of one role, once in one piece and once in many. What they
//! make of them must be the same: events, places of payload, what they send, and the offence.

use nvmf::spec::{Cqe, Sqe};
use nvmf::tcp::{
    Completed, Controller, ControllerEvent, Direction, FatalError, Host, Limits, QPair, Role,
};
use zerocopy::IntoBytes;

use crate::input::Input;
use crate::parcel::{Feeder, Step};
use crate::wire::{self, LAST_PDU, SUCCESS, kind};

/// Commands that a host has outstanding, or a controller takes, at most.
const QUEUE_SIZE: u32 = 9;

/// What was seen of a machine, in order.
#[derive(Debug, PartialEq)]
enum Seen {
    /// So many bytes, placed one after the other from there on.
    Placed(u16, u32, u32),
    Event(ControllerEvent),
    Completed(Completed),
    Sent(Vec<u8>),
    Broken(FatalError),
    Terminated,
}

/// Runs what the bytes say.
///
/// # Panics
/// When cutting the stream matters, or a promise of the machine is broken.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let limits = input.limits();
    let as_host = input.bit();
    let cuts = [input.u8(), input.u8(), input.u8(), input.u8()];
    let (whole, pieces) = if as_host {
        let stream = stream(&mut input, &limits, to_host);
        let seen = |cuts: &[u8]| watch(host(limits), &stream, cuts, host_events);
        (seen(&[]), seen(&cuts))
    } else {
        let stream = stream(&mut input, &limits, to_controller);
        let seen = |cuts: &[u8]| {
            let machine = QPair::controller(QUEUE_SIZE, false, limits);
            watch(machine, &stream, cuts, controller_events)
        };
        (seen(&[]), seen(&cuts))
    };
    assert_eq!(whole, pieces);
}

type Make = fn(&mut Input<'_>, &Limits) -> Vec<u8>;

fn stream(input: &mut Input<'_>, limits: &Limits, make: Make) -> Vec<u8> {
    let mut stream = Vec::new();
    while !input.is_empty() && stream.len() < 1 << 16 {
        match input.u8() {
            0xf0.. => {
                let len = input.below(100);
                stream.extend_from_slice(input.take(len));
            }
            _ => stream.extend(make(input, limits)),
        }
    }
    stream
}

/// CIDs of the commands that [`host`] has outstanding: those of fresh slots, the first generation.
fn cid(input: &mut Input<'_>) -> u16 {
    let slot = input.below(8) as u16;
    input.about(u32::from(slot | 8)) as u16
}

fn to_host(input: &mut Input<'_>, limits: &Limits) -> Vec<u8> {
    let cid = cid(input);
    match input.below(4) {
        0 => {
            let cqe = Cqe::new(cid, nvmf::spec::Status::SUCCESS);
            wire::pdu(input, limits, kind::CAPSULE_RESP, 0, cqe.as_bytes(), &[])
        }
        1 => {
            let fields = wire::data_fields(cid, input.u16(), input.about(0), input.about(3000));
            wire::pdu(input, limits, kind::R2T, 0, &fields, &[])
        }
        2 if input.below(16) == 0 => wire::term_req(input, limits, kind::C2H_TERM_REQ),
        _ => {
            let length = input.about(3000).min(5000);
            let fields = wire::data_fields(cid, 0, input.about(0), length);
            let flags = input.pick(&[LAST_PDU, LAST_PDU | SUCCESS, 0]);
            let payload = vec![input.u8(); length as usize];
            wire::pdu(input, limits, kind::C2H_DATA, flags, &fields, &payload)
        }
    }
}

fn to_controller(input: &mut Input<'_>, limits: &Limits) -> Vec<u8> {
    let which = input.u8();
    if which & 3 == 3 {
        // The first slots are taken from the highest number down, or from 0 up: either is tried.
        let ttag = u16::from(which >> 4);
        let length = input.length().min(5000);
        let fields = wire::data_fields(input.below(16) as u16, ttag, input.about(0), length);
        let flags = input.pick(&[LAST_PDU, 0]);
        let payload = vec![input.u8(); length as usize];
        return wire::pdu(input, limits, kind::H2C_DATA, flags, &fields, &payload);
    }
    if which & 0x3f == 0x3e {
        return wire::term_req(input, limits, kind::H2C_TERM_REQ);
    }
    let mut sqe = Sqe::write(1, 0, 1, false);
    sqe.cid = (input.below(16) as u16).into();
    sqe.flags = input.pick(&[0x40, 0x40, 0x40, 0]);
    let length = input.length().min(5000);
    let in_capsule = input.bit();
    sqe.sgl1.length = length.into();
    sqe.sgl1.sgl_type = if in_capsule { 0x01 } else { 0x5a };
    let carried = if in_capsule { length as usize } else { 0 };
    let payload = vec![input.u8(); carried];
    let bytes = sqe.as_bytes();
    wire::pdu(input, limits, kind::CAPSULE_CMD, 0, bytes, &payload)
}

/// A host with commands outstanding, reads and writes in turn.
fn host(limits: Limits) -> QPair<Host> {
    let mut host = QPair::host(QUEUE_SIZE, limits);
    for at in 0..8u32 {
        let (sqe, direction) = if at % 2 == 0 {
            (Sqe::read(1, 0, 1), Direction::In)
        } else {
            (Sqe::write(1, 0, 1, false), Direction::Out)
        };
        host.submit(sqe, direction, 3000).expect("there is room");
    }
    while let Some(pdu) = host.transmit() {
        if let Some(payload) = pdu.payload {
            host.transmitted(payload);
        }
    }
    host
}

fn host_events(machine: &mut QPair<Host>, seen: &mut Vec<Seen>) {
    while let Some(completed) = machine.completed() {
        seen.push(Seen::Completed(completed));
    }
}

/// Takes events, and answers them: whole data is asked for, and then comes success.
fn controller_events(machine: &mut QPair<Controller>, seen: &mut Vec<Seen>) {
    while let Some(event) = machine.event() {
        seen.push(Seen::Event(event));
        match event {
            ControllerEvent::Command {
                slot,
                data_len,
                in_capsule,
                ..
            } => {
                let wanted = !in_capsule && machine.fetch(slot, 0, data_len).is_ok();
                if !in_capsule && !wanted {
                    machine.respond(slot, Cqe::default());
                }
            }
            ControllerEvent::Fetched { slot, .. } => {
                machine.respond(slot, Cqe::default());
            }
        }
    }
}

/// Feeds a stream in pieces of these lengths in turn, or as one.
fn watch<R: Role>(
    mut machine: QPair<R>,
    mut stream: &[u8],
    cuts: &[u8],
    events: fn(&mut QPair<R>, &mut Vec<Seen>),
) -> Vec<Seen> {
    let mut feeder = Feeder::default();
    let mut seen = Vec::new();
    let mut lengths = cuts.iter().cycle().map(|cut| usize::from(*cut) + 1);
    let mut left = usize::MAX;
    if !cuts.is_empty() {
        left = lengths.next().unwrap_or(1);
    }
    while !stream.is_empty() {
        let given = &stream[..stream.len().min(left)];
        let (used, step) = feeder.step(&mut machine, given);
        stream = &stream[used..];
        left -= used;
        if left == 0 {
            left = lengths.next().unwrap_or(usize::MAX);
        }
        match step {
            Step::Header | Step::Digest(_) | Step::Consumer => {}
            Step::Payload(slot, offset, len) => match seen.last_mut() {
                Some(Seen::Placed(before, start, placed))
                    if *before == slot && *start + *placed == offset =>
                {
                    *placed += len;
                }
                _ => seen.push(Seen::Placed(slot, offset, len)),
            },
            Step::Broken(error) => seen.push(Seen::Broken(error)),
            Step::Over => break,
        }
        if machine.terminated().is_some() {
            seen.push(Seen::Terminated);
            break;
        }
        // Between PDUs, so that what happens does not depend on the cuts.
        if feeder.completed().is_some() || !matches!(step, Step::Header | Step::Payload(..)) {
            events(&mut machine, &mut seen);
            while let Some(pdu) = machine.transmit() {
                let header = pdu.header();
                // How much of an offending header is echoed depends on how much of it is there.
                let same = match header[0] {
                    kind::H2C_TERM_REQ | kind::C2H_TERM_REQ => &header[8..32],
                    _ => header,
                };
                seen.push(Seen::Sent(same.to_vec()));
                if let Some(payload) = pdu.payload {
                    machine.transmitted(payload);
                }
            }
        }
    }
    seen
}
