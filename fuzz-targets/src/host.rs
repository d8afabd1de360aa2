//! The host's machine against a controller that says anything.

use std::collections::BTreeMap;

use nvmf::spec::{Cqe, Sqe, Status};
use nvmf::tcp::{Direction, Host, Limits, QPair, TxPayload, TxPdu};
use zerocopy::IntoBytes;

use crate::input::Input;
use crate::parcel::{Feeder, Step, check_broken, check_sent, check_silent};
use crate::wire::{self, LAST_PDU, SUCCESS, kind, u16_at, u32_at};

/// What must be true of a command that is outstanding.
#[derive(Debug)]
struct Command {
    cid: u16,
    direction: Direction,
    len: u32,
    /// In: bytes that were placed. Out: bytes whose PDUs were given out.
    moved: u32,
    /// Out: bytes that the kernel has.
    kernel_has: u32,
    /// Out: bytes that were asked for, or went along.
    asked: u32,
    /// Data came whose digest was wrong.
    corrupt: bool,
    /// PDUs given out whose payload the kernel has not all taken.
    pending: u32,
    /// Its capsule was given out.
    sent: bool,
    /// The controller has answered it.
    answered: bool,
    /// Nobody waits for it.
    abandoned: bool,
}

struct Run {
    machine: QPair<Host>,
    limits: Limits,
    depth: usize,
    commands: BTreeMap<u16, Command>,
    /// Slots and CIDs of abandoned commands that were completed before their fate was known.
    unresolved: BTreeMap<u16, Command>,
    /// Payload of PDUs that were given out, which the kernel has not taken.
    pending: Vec<TxPayload>,
    feeder: Feeder,
    /// The slot whose payload was last placed.
    placing: Option<u16>,
    over: bool,
}

/// Runs what the bytes say.
///
/// # Panics
/// When a promise of the machine is broken.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let limits = input.limits();
    let queue_size = 2 + input.below(8) as u32;
    let mut run = Run {
        machine: QPair::host(queue_size, limits),
        limits,
        depth: queue_size as usize - 1,
        commands: BTreeMap::new(),
        unresolved: BTreeMap::new(),
        pending: Vec::new(),
        feeder: Feeder::default(),
        placing: None,
        over: false,
    };
    while !input.is_empty() && !run.over {
        run.act(&mut input);
        run.check();
    }
    run.end();
}

impl Run {
    fn act(&mut self, input: &mut Input<'_>) {
        let limits = self.limits;
        match input.below(11) {
            0 => self.submit(input),
            1 => self.transmit(1 + input.below(4)),
            2 => self.kernel_took(input),
            3 => self.complete(),
            4 => {
                let bytes = self.data(input);
                self.deliver(input, &bytes);
            }
            5 => {
                let bytes = self.r2t(input);
                self.deliver(input, &bytes);
            }
            6 => {
                let bytes = self.response(input);
                self.deliver(input, &bytes);
            }
            7 => {
                let len = input.below(200);
                let bytes = input.take(len).to_vec();
                self.deliver(input, &bytes);
            }
            8 if input.below(16) == 0 => {
                let bytes = wire::term_req(input, &limits, kind::C2H_TERM_REQ);
                self.deliver(input, &bytes);
            }
            9 => self.abandon(input),
            // What a driver does in a turn.
            _ => {
                self.submit(input);
                self.transmit(8);
                while !self.pending.is_empty() {
                    self.kernel_took(input);
                }
            }
        }
    }

    fn submit(&mut self, input: &mut Input<'_>) {
        let direction = input.pick(&[Direction::Out, Direction::In, Direction::None]);
        let len = match direction {
            Direction::None => 0,
            _ => input.length(),
        };
        let sqe = match direction {
            Direction::Out => Sqe::write(1, 0, 1, false),
            Direction::In => Sqe::read(1, 0, 1),
            Direction::None => Sqe::flush(1),
        };
        let full = self.commands.len() + self.unresolved.len() == self.depth;
        let next = self.machine.next_slot();
        let submitted = self.machine.submit(sqe, direction, len);
        assert_eq!(submitted.is_none(), full);
        let Some((slot, cid)) = submitted else { return };
        assert_eq!(next, Some(slot));
        assert!(cid != 0xffff && usize::from(slot) < self.depth);
        assert!(!self.unresolved.contains_key(&slot));
        let mut others = self.commands.values().chain(self.unresolved.values());
        assert!(others.all(|command| command.cid != cid));
        let command = Command {
            cid,
            direction,
            len,
            moved: 0,
            kernel_has: 0,
            asked: 0,
            corrupt: false,
            pending: 0,
            sent: false,
            answered: false,
            abandoned: false,
        };
        assert!(self.commands.insert(slot, command).is_none());
    }

    fn transmit(&mut self, count: usize) {
        for _ in 0..count {
            let Some(pdu) = self.machine.transmit() else {
                return;
            };
            self.sent(&pdu);
        }
    }

    fn sent(&mut self, pdu: &TxPdu) {
        check_sent(pdu, &self.limits);
        let header = pdu.header();
        let cid = match header[0] {
            kind::CAPSULE_CMD => u16_at(header, 10),
            kind::H2C_DATA => u16_at(header, 8),
            other => panic!("a host sent a PDU of type {other}"),
        };
        let mut commands = self.commands.iter_mut();
        let (&slot, command) = commands
            .find(|(_, command)| command.cid == cid)
            .expect("a PDU of a command that is not outstanding");
        assert!(!command.abandoned, "sent although it was abandoned");
        if header[0] == kind::CAPSULE_CMD {
            assert!(!std::mem::replace(&mut command.sent, true), "sent twice");
            let len = pdu.payload.map_or(0, |payload| payload.len);
            assert!(len <= self.limits.in_capsule_limit);
            assert!(len == 0 || len == command.len);
            assert_eq!(u32_at(header, 8 + 32), command.len, "SGL length");
            command.asked += len;
        }
        let Some(payload) = pdu.payload else {
            assert_eq!(header[0], kind::CAPSULE_CMD, "H2CData without data");
            return;
        };
        assert_eq!((payload.slot, command.direction), (slot, Direction::Out));
        let end = payload.offset.checked_add(payload.len).unwrap();
        assert!(payload.len > 0 && end <= command.asked && end <= command.len);
        if header[0] == kind::H2C_DATA {
            assert!(payload.len <= self.limits.max_h2c_data);
            assert_eq!(u32_at(header, 12), payload.offset);
            assert_eq!(u32_at(header, 16), payload.len);
        }
        command.moved += payload.len;
        assert!(command.moved <= command.asked);
        command.pending += 1;
        self.pending.push(payload);
    }

    fn kernel_took(&mut self, input: &mut Input<'_>) {
        if self.pending.is_empty() {
            return;
        }
        let payload = self.pending.remove(input.below(self.pending.len()));
        let command = self.commands.get_mut(&payload.slot).unwrap();
        command.pending -= 1;
        command.kernel_has += payload.len;
        self.machine.transmitted(payload);
    }

    fn abandon(&mut self, input: &mut Input<'_>) {
        let (_, cid) = self.target(input);
        let known = self.machine.abandon(cid);
        let mut commands = self.commands.values_mut();
        let command = commands.find(|it| it.cid == cid && !it.abandoned);
        assert_eq!(known, command.is_some());
        if let Some(command) = command.filter(|it| !it.answered) {
            if command.sent {
                command.abandoned = true;
            } else {
                // As good as answered: nobody will ever hear of it.
                command.answered = true;
            }
        }
    }

    /// The command that a slot has.
    fn at(&self, slot: u16) -> &Command {
        let command = self.commands.get(&slot);
        command.unwrap_or_else(|| &self.unresolved[&slot])
    }

    /// An outstanding command in most cases: its slot and CID.
    fn target(&self, input: &mut Input<'_>) -> (Option<u16>, u16) {
        let all = self.commands.keys().chain(self.unresolved.keys());
        let mut slots: Vec<u16> = all.copied().collect();
        slots.sort_unstable();
        if slots.is_empty() {
            return (None, input.u16());
        }
        let slot = slots[input.below(slots.len())];
        let cid = input.about(self.at(slot).cid.into()) as u16;
        (Some(slot), cid)
    }

    fn data(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let (slot, cid) = self.target(input);
        let (moved, len) = slot.map_or((0, 0), |slot| {
            let command = self.at(slot);
            (command.moved, command.len)
        });
        let rest = len.saturating_sub(moved);
        let piece = if input.bit() {
            rest
        } else {
            rest.min(input.u16().into())
        };
        let length = input.about(piece).min(20_000);
        let offset = input.about(moved);
        let ends = offset.saturating_add(length) >= len;
        let flags = match input.u8() {
            0..=0x7f if ends => LAST_PDU,
            0x80..=0xbf if ends => LAST_PDU | SUCCESS,
            0..=0xdf => 0,
            other => other & (LAST_PDU | SUCCESS),
        };
        let named = input.about(length);
        let fields = wire::data_fields(cid, 0, offset, named);
        let payload = vec![input.u8(); length as usize];
        let limits = self.limits;
        wire::pdu(input, &limits, kind::C2H_DATA, flags, &fields, &payload)
    }

    fn r2t(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let (slot, cid) = self.target(input);
        let (asked, len) = slot.map_or((0, 0), |slot| {
            let command = self.at(slot);
            (command.asked, command.len)
        });
        let rest = len.saturating_sub(asked);
        let piece = if input.bit() {
            rest
        } else {
            rest.min(input.length())
        };
        let length = input.about(piece);
        let fields = wire::data_fields(cid, input.u16(), input.about(asked), length);
        let limits = self.limits;
        wire::pdu(input, &limits, kind::R2T, 0, &fields, &[])
    }

    fn response(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let (_, cid) = self.target(input);
        let mut cqe = Cqe::new(cid, Status::from_wire(input.u16() & 0xfffe));
        if input.bit() {
            cqe = Cqe::new(cid, Status::SUCCESS);
        }
        let limits = self.limits;
        wire::pdu(input, &limits, kind::CAPSULE_RESP, 0, cqe.as_bytes(), &[])
    }

    /// Feeds bytes in pieces of the input's choice.
    fn deliver(&mut self, input: &mut Input<'_>, mut bytes: &[u8]) {
        let piece = match input.u8() {
            0..=0x7f => usize::MAX,
            short => usize::from(short & 0x7f) + 1,
        };
        while !bytes.is_empty() && !self.over {
            let given = &bytes[..bytes.len().min(piece)];
            let (used, step) = self.feeder.step(&mut self.machine, given);
            bytes = &bytes[used..];
            self.after(step);
            if let Some(header) = self.feeder.completed() {
                self.accepted(&header);
            }
        }
    }

    fn after(&mut self, step: Step) {
        match step {
            Step::Header => {}
            Step::Payload(slot, offset, len) => {
                let command = self.commands.get_mut(&slot).expect("an outstanding slot");
                assert_eq!(command.direction, Direction::In);
                assert!(!command.abandoned, "data for a command that was abandoned");
                assert_eq!(offset, command.moved, "a hole");
                command.moved += len;
                assert!(command.moved <= command.len);
                self.placing = Some(slot);
            }
            Step::Digest(intact) => {
                if let Some(command) = self.placing.and_then(|slot| self.commands.get_mut(&slot)) {
                    command.corrupt |= !intact;
                }
            }
            Step::Consumer => panic!("a host has no events that come first"),
            Step::Over => self.over = true,
            Step::Broken(error) => {
                check_broken(&mut self.machine, error, kind::H2C_TERM_REQ);
                self.over = true;
            }
        }
        if self.machine.terminated().is_some() {
            check_silent(&mut self.machine);
            self.over = true;
        }
    }

    /// Takes note of a PDU that was accepted.
    fn accepted(&mut self, header: &[u8]) {
        // The next digest is of another payload.
        self.placing = None;
        let cid_at = if header[0] == kind::CAPSULE_RESP {
            20
        } else {
            8
        };
        let cid = u16_at(header, cid_at);
        let all = self.commands.iter_mut().chain(&mut self.unresolved);
        let (&slot, command) = { all }
            .find(|(_, command)| command.cid == cid)
            .expect("a PDU for a command that is not outstanding was accepted");
        assert!(command.sent && !command.answered, "too early or too late");
        match header[0] {
            kind::CAPSULE_RESP => command.answered = true,
            // Its data will never be sent, wherever it lies.
            kind::R2T if command.abandoned => {}
            kind::R2T => {
                assert_eq!(command.direction, Direction::Out);
                assert_eq!(u32_at(header, 12), command.asked, "R2T out of order");
                command.asked += u32_at(header, 16);
                assert!(command.asked <= command.len, "R2T past the end");
            }
            kind::C2H_DATA => {
                let end = u32_at(header, 12) + u32_at(header, 16);
                let last = header[1] & LAST_PDU != 0;
                if !command.abandoned {
                    assert_eq!(end, command.moved);
                }
                command.moved = end;
                assert!(end <= command.len && (last || end < command.len));
                command.answered = header[1] & SUCCESS != 0;
            }
            other => panic!("PDU type {other} was accepted"),
        }
        if command.answered {
            self.unresolved.remove(&slot);
        }
    }

    fn complete(&mut self) {
        while let Some(done) = self.machine.completed() {
            let command = self.commands.remove(&done.slot);
            let command = command.expect("a completion of a command that is outstanding");
            assert_eq!(done.cqe.cid.get(), command.cid);
            assert_eq!(command.pending, 0, "the kernel still has its payload");
            let known = command.answered || self.over;
            assert!(known || command.abandoned, "nobody has answered");
            let ok = done.cqe.status().is_success();
            let len = command.len;
            match command.direction {
                Direction::Out => assert_eq!(done.transferred, command.kernel_has),
                _ => assert!(done.transferred <= len),
            }
            match command.direction {
                Direction::In if ok && !command.abandoned => {
                    assert_eq!((command.moved, done.transferred), (len, len));
                    assert!(!command.corrupt, "success with data that is not intact");
                }
                Direction::Out if ok && !self.limits.admin => {
                    assert_eq!(done.transferred, len, "a short write succeeded");
                }
                _ => {}
            }
            if !known {
                assert_eq!(done.cqe.status(), Status::ABORTED_BY_HOST);
                self.unresolved.insert(done.slot, command);
            }
        }
        let late = |it: &Command| (it.answered || it.abandoned) && it.pending == 0;
        assert!(!self.commands.values().any(late), "not completed");
    }

    fn check(&self) {
        assert_eq!(self.machine.outstanding(), self.commands.len());
        assert_eq!(
            self.machine.room(),
            self.depth - self.commands.len() - self.unresolved.len()
        );
    }

    /// However it went, every command that is left ends once.
    fn end(mut self) {
        // The kernel lets go of everything with the connection.
        self.pending.clear();
        for command in self.commands.values_mut() {
            command.pending = 0;
        }
        self.over = true;
        self.machine.abort_all();
        self.complete();
        assert!(self.commands.is_empty(), "{:?}", self.commands);
        self.unresolved.clear();
        self.check();
        check_silent(&mut self.machine);
    }
}
