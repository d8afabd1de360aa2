//! The controller's machine against a host that says anything, and a consumer that does anything.

use std::collections::BTreeMap;

use nvmf::spec::sqe::sgl_type;
use nvmf::spec::{Cqe, Sqe, Status};
use nvmf::tcp::{Answered, Controller, ControllerEvent, Limits, QPair, TxPayload, TxPdu};
use zerocopy::IntoBytes;

use crate::input::Input;
use crate::parcel::{Feeder, Step, check_broken, check_sent, check_silent};
use crate::wire::{self, LAST_PDU, SUCCESS, kind, u16_at, u32_at};

/// SQHD where flow control is off.
const NO_SQHD: u16 = 0xffff;

/// A range that the consumer has asked for, or that lies in the capsule.
#[derive(Debug, Clone, Copy)]
struct Fetch {
    /// What no R2T has asked for begins here.
    unasked: u32,
    end: u32,
    /// Bytes that were placed, of so many.
    placed: u32,
    total: u32,
    intact: bool,
}

/// An R2T that was sent: what of its range is still to come.
#[derive(Debug, Clone, Copy)]
struct Tag {
    slot: u16,
    next: u32,
    end: u32,
}

/// What must be true of a command that the consumer has seen.
#[derive(Debug)]
struct Command {
    cid: u16,
    data_len: u32,
    in_capsule: bool,
    fetch: Option<Fetch>,
    /// Where the next fetch has to begin.
    fetched: u32,
    /// Bytes given to be sent, bytes whose PDUs were given out, and whether the last was among the
    /// former.
    given: u32,
    sent: u32,
    last: bool,
    /// What the consumer answered, and whether that was before all data had come.
    answer: Option<Status>,
    early: bool,
}

struct Run {
    machine: QPair<Controller>,
    limits: Limits,
    queue_size: u32,
    flow_control: bool,
    /// By slot, from its event to its answer on the wire.
    commands: BTreeMap<u16, Command>,
    /// Commands that were answered on the wire with a fetch that was not over, until their slot is
    /// used again.
    ghosts: BTreeMap<u16, Command>,
    /// R2Ts that are open, by transfer tag.
    tags: BTreeMap<u16, Tag>,
    /// Bytes that were placed of the PDU that is being received.
    in_pdu: u32,
    /// Capsules that came, and answers that left.
    capsules: usize,
    answers: usize,
    sqhd: u32,
    pending: Vec<TxPayload>,
    feeder: Feeder,
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
    let queue_size = 2 + input.below(7) as u32;
    let flow_control = input.bit();
    let mut run = Run {
        machine: QPair::controller(queue_size, flow_control, limits),
        limits,
        queue_size,
        flow_control,
        commands: BTreeMap::new(),
        ghosts: BTreeMap::new(),
        tags: BTreeMap::new(),
        in_pdu: 0,
        capsules: 0,
        answers: 0,
        sqhd: 0,
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
        match input.below(14) {
            0 | 1 => {
                let bytes = self.capsule(input);
                self.deliver(input, &bytes);
            }
            2 | 3 => {
                let bytes = self.data(input);
                self.deliver(input, &bytes);
            }
            4 => {
                let len = input.below(200);
                let bytes = input.take(len).to_vec();
                self.deliver(input, &bytes);
            }
            5 => self.event(),
            6 => self.fetch(input),
            7 => self.send(input),
            8 => self.respond(input),
            9 => self.transmit(1 + input.below(4)),
            10 => self.kernel_took(input),
            _ => match input.below(16) {
                0 => {
                    let limits = self.limits;
                    let bytes = wire::term_req(input, &limits, kind::H2C_TERM_REQ);
                    self.deliver(input, &bytes);
                }
                1 => self.resize(input),
                // What a driver does in a turn.
                _ => {
                    self.event();
                    self.fetch_all();
                    self.transmit(100);
                    while !self.pending.is_empty() {
                        self.kernel_took(input);
                    }
                }
            },
        }
    }

    /// As Connect asks for, once it was read.
    fn resize(&mut self, input: &mut Input<'_>) {
        self.queue_size = self.queue_size.max(2 + input.below(30) as u32);
        self.machine.set_queue(self.queue_size, self.flow_control);
        self.sqhd %= self.queue_size;
    }

    fn capsule(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let mut sqe = Sqe::write(1, 0, 1, false);
        sqe.cid = u16::from(input.u8() % 16).into();
        let length = input.length();
        let in_capsule = input.bit() && length <= 8192;
        let carried = if in_capsule { input.about(length) } else { 0 };
        sqe.flags = input.pick(&[0x40, 0x40, 0x40, 0x40, 0x00, 0x80]);
        sqe.sgl1.length = length.into();
        sqe.sgl1.sgl_type = match (input.u8(), in_capsule) {
            (0..=0xef, true) => sgl_type::IN_CAPSULE,
            (0..=0xef, false) => sgl_type::TRANSPORT,
            (other, _) => other,
        };
        sqe.sgl1.address = u64::from(input.about(0)).into();
        let payload = vec![input.u8(); carried.min(20_000) as usize];
        let limits = self.limits;
        let bytes = sqe.as_bytes();
        wire::pdu(input, &limits, kind::CAPSULE_CMD, 0, bytes, &payload)
    }

    /// The slot of a command that the consumer knows: with all events taken, of any there is.
    fn known(&self, input: &mut Input<'_>) -> Option<u16> {
        let mut slots: Vec<u16> = self.commands.keys().copied().collect();
        slots.sort_unstable();
        (!slots.is_empty()).then(|| slots[input.below(slots.len())])
    }

    fn data(&mut self, input: &mut Input<'_>) -> Vec<u8> {
        let mut tags: Vec<u16> = self.tags.keys().copied().collect();
        tags.sort_unstable();
        let ttag = match tags.len() {
            0 => input.u16() % 64,
            many => tags[input.below(many)],
        };
        let tag = self.tags.get(&ttag).copied().unwrap_or(Tag {
            slot: self.known(input).unwrap_or(0),
            next: 0,
            end: input.length(),
        });
        let Tag { slot, next, end } = tag;
        let command = self.commands.get(&slot);
        let rest = (end - next).min(self.limits.max_h2c_data);
        let piece = if input.bit() {
            rest
        } else {
            rest.min(input.u16().into())
        };
        let length = input.about(piece).min(20_000);
        let offset = input.about(next);
        let ends = offset.saturating_add(length) == end;
        let flags = match input.u8() {
            0x20..=0x27 => 0,
            0x28..=0x2f => LAST_PDU,
            _ => u8::from(ends) << 2,
        };
        let cid = input.about(command.map_or(0, |command| command.cid.into())) as u16;
        let ttag = input.about(ttag.into()) as u16;
        let fields = wire::data_fields(cid, ttag, offset, input.about(length));
        let payload = vec![input.u8(); length as usize];
        let limits = self.limits;
        wire::pdu(input, &limits, kind::H2C_DATA, flags, &fields, &payload)
    }

    fn deliver(&mut self, input: &mut Input<'_>, mut bytes: &[u8]) {
        let piece = match input.u8() {
            0..=0x7f => usize::MAX,
            short => usize::from(short & 0x7f) + 1,
        };
        while !bytes.is_empty() && !self.over {
            if self.machine.backlogged() {
                // A driver receives nothing then; it goes on as soon as something was sent.
                self.transmit(1);
                continue;
            }
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
                let ghost = self.ghosts.get_mut(&slot);
                let command = self.commands.get_mut(&slot).or(ghost);
                let command = command.expect("a command that was seen");
                let header = self.feeder.header();
                let start = match header[0] {
                    kind::H2C_DATA => {
                        let tag = self.tags.get(&u16_at(header, 10)).expect("an open tag");
                        assert_eq!((tag.slot, tag.next), (slot, u32_at(header, 12)));
                        assert!(tag.next + u32_at(header, 16) <= tag.end);
                        tag.next
                    }
                    _ => 0,
                };
                assert_eq!(offset, start + self.in_pdu, "a hole");
                self.in_pdu += len;
                let fetch = command.fetch.as_mut().expect("data that was asked for");
                fetch.placed += len;
                assert!(fetch.placed <= fetch.total && offset + len <= command.data_len);
                self.placing = Some(slot);
            }
            Step::Digest(intact) => {
                let command = self.placing.and_then(|slot| self.commands.get_mut(&slot));
                if let Some(fetch) = command.and_then(|command| command.fetch.as_mut()) {
                    fetch.intact &= intact;
                }
            }
            Step::Consumer => self.event(),
            Step::Over => self.over = true,
            Step::Broken(error) => {
                check_broken(&mut self.machine, error, kind::C2H_TERM_REQ);
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
        self.in_pdu = 0;
        self.placing = None;
        match header[0] {
            kind::CAPSULE_CMD => self.capsules += 1,
            kind::H2C_DATA => {
                let ttag = u16_at(header, 10);
                let (offset, length) = (u32_at(header, 12), u32_at(header, 16));
                assert!(length <= self.limits.max_h2c_data);
                let tag = self.tags.get_mut(&ttag).expect("an open tag");
                assert_eq!(tag.next, offset, "out of order");
                tag.next += length;
                assert!(tag.next <= tag.end, "more than was asked for");
                assert_eq!(header[1] & LAST_PDU != 0, tag.next == tag.end);
                if tag.next == tag.end {
                    self.tags.remove(&ttag);
                }
            }
            other => panic!("PDU type {other} was accepted"),
        }
    }

    /// Takes all events.
    fn event(&mut self) {
        while let Some(event) = self.machine.event() {
            match event {
                ControllerEvent::Command {
                    slot,
                    sqe,
                    data_len,
                    in_capsule,
                } => {
                    assert!(u32::from(slot) < self.queue_size);
                    assert_eq!(sqe.psdt(), 0x40);
                    assert_eq!(sqe.sgl1.length.get(), data_len);
                    let cid = sqe.cid.get();
                    let open = self.commands.values().any(|command| command.cid == cid);
                    assert!(!open, "two commands with CID {cid}");
                    if in_capsule {
                        assert!(data_len > 0 && data_len <= self.limits.in_capsule_limit);
                    }
                    let fetch = in_capsule.then_some(Fetch {
                        unasked: data_len,
                        end: data_len,
                        placed: 0,
                        total: data_len,
                        intact: true,
                    });
                    let command = Command {
                        cid,
                        data_len,
                        in_capsule,
                        fetch,
                        fetched: 0,
                        given: 0,
                        sent: 0,
                        last: false,
                        answer: None,
                        early: false,
                    };
                    self.ghosts.remove(&slot);
                    let before = self.commands.insert(slot, command);
                    assert!(before.is_none(), "slot {slot} is in use: {before:?}");
                }
                ControllerEvent::Fetched { slot, intact } => {
                    // The answer may have left since all of it came, but not before.
                    let ghost = self.ghosts.get_mut(&slot);
                    let command = self.commands.get_mut(&slot).or(ghost);
                    let command = command.expect("a command");
                    assert!(!command.early, "fetched after the answer");
                    let fetch = command.fetch.take().expect("a fetch, once");
                    assert_eq!(fetch.placed, fetch.total, "not all of it has come");
                    assert_eq!(fetch.unasked, fetch.end);
                    assert!(self.tags.values().all(|tag| tag.slot != slot));
                    assert_eq!(fetch.intact, intact);
                }
            }
        }
    }

    fn fetch(&mut self, input: &mut Input<'_>) {
        self.event();
        let Some(slot) = self.known(input) else {
            assert!(self.machine.fetch(input.u16(), 0, 1).is_err());
            return;
        };
        let command = self.commands.get_mut(&slot).unwrap();
        let offset = input.about(command.fetched);
        let rest = command.data_len.saturating_sub(offset);
        let piece = if input.bit() {
            rest
        } else {
            rest.min(input.length())
        };
        let len = input.about(piece);
        let end = offset
            .checked_add(len)
            .filter(|&end| end <= command.data_len);
        let free = command.answer.is_none() && !command.in_capsule && command.fetch.is_none();
        let fetched = self.machine.fetch(slot, offset, len);
        let next = len > 0 && offset == command.fetched;
        assert_eq!(fetched.is_ok(), free && next && end.is_some());
        if let (Ok(()), Some(end)) = (fetched, end) {
            command.fetched = end;
            command.fetch = Some(Fetch {
                unasked: offset,
                end,
                placed: 0,
                total: len,
                intact: true,
            });
        }
    }

    /// Fetches the rest of what every command has, unless it is being fetched.
    fn fetch_all(&mut self) {
        for (&slot, command) in &mut self.commands {
            let (from, end) = (command.fetched, command.data_len);
            let free = command.answer.is_none() && !command.in_capsule;
            if free && command.fetch.is_none() && from < end {
                let fetched = self.machine.fetch(slot, from, end - from);
                assert_eq!(fetched, Ok(()));
                command.fetched = end;
                command.fetch = Some(Fetch {
                    unasked: from,
                    end,
                    placed: 0,
                    total: end - from,
                    intact: true,
                });
            }
        }
    }

    fn send(&mut self, input: &mut Input<'_>) {
        self.event();
        let Some(slot) = self.known(input) else {
            assert!(self.machine.send(input.u16(), 0, 1, true).is_err());
            return;
        };
        let command = self.commands.get_mut(&slot).unwrap();
        let rest = command.data_len - command.given;
        let piece = if input.bit() {
            rest
        } else {
            rest.min(input.length())
        };
        let (offset, len) = (input.about(command.given), input.about(piece));
        let end = offset
            .checked_add(len)
            .filter(|&end| end <= command.data_len);
        let last = end == Some(command.data_len);
        let idle = command.given == command.sent;
        let free = command.answer.is_none() && !command.in_capsule && idle;
        let right = offset == command.given && len > 0 && end.is_some();
        let sent = self.machine.send(slot, offset, len, last);
        assert_eq!(sent.is_ok(), free && right);
        if let (Ok(()), Some(end)) = (sent, end) {
            (command.given, command.last) = (end, last);
        }
    }

    fn respond(&mut self, input: &mut Input<'_>) {
        self.event();
        let Some(slot) = self.known(input) else {
            let answered = self.machine.respond(input.u16(), Cqe::default());
            assert_eq!(answered, Answered::Unknown);
            return;
        };
        let status = match input.u8() {
            0..=0xbf => Status::SUCCESS,
            _ => Status::INVALID_FIELD,
        };
        let command = self.commands.get_mut(&slot).unwrap();
        let answered = self.machine.respond(slot, Cqe::new(0, status));
        assert_eq!(answered == Answered::Queued, command.answer.is_none());
        if command.answer.is_none() {
            command.answer = Some(status);
            let awaited = |fetch: Fetch| fetch.placed < fetch.total;
            command.early = command.fetch.is_some_and(awaited);
        }
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
        match header[0] {
            kind::CAPSULE_RESP => self.response(header),
            kind::R2T => self.asked(header),
            kind::C2H_DATA => self.data_sent(pdu),
            other => panic!("a controller sent a PDU of type {other}"),
        }
    }

    fn asked(&mut self, header: &[u8]) {
        let cid = u16_at(header, 8);
        let mut commands = self.commands.iter_mut();
        let (&slot, command) = commands.find(|(_, it)| it.cid == cid).expect("a command");
        assert!(
            command.answer.is_none(),
            "data is asked for after the answer"
        );
        let fetch = command.fetch.as_mut().expect("a fetch");
        let (offset, length) = (u32_at(header, 12), u32_at(header, 16));
        assert!(length > 0 && offset == fetch.unasked);
        fetch.unasked += length;
        assert!(fetch.unasked <= fetch.end);
        let open = self.tags.values().filter(|tag| tag.slot == slot).count();
        assert!(
            open < self.limits.max_r2t as usize,
            "more R2Ts than the host takes"
        );
        let tag = Tag {
            slot,
            next: offset,
            end: offset + length,
        };
        let before = self.tags.insert(u16_at(header, 10), tag);
        assert!(before.is_none(), "a tag that is open");
    }

    fn data_sent(&mut self, pdu: &TxPdu) {
        let header = pdu.header();
        let payload = pdu.payload.expect("C2HData with data");
        let slot = payload.slot;
        let command = self.commands.get_mut(&slot).expect("a command");
        assert_eq!(command.cid, u16_at(header, 8));
        assert_eq!(
            (u32_at(header, 12), u32_at(header, 16)),
            (payload.offset, payload.len)
        );
        assert_eq!(payload.offset, command.sent, "out of order");
        command.sent += payload.len;
        assert!(payload.len > 0 && command.sent <= command.given);
        let ends = command.last && command.sent == command.given;
        assert_eq!(header[1] & LAST_PDU != 0, ends);
        self.pending.push(payload);
        if header[1] & SUCCESS != 0 {
            assert!(ends && !self.flow_control);
            assert_eq!(command.answer, Some(Status::SUCCESS));
            self.answered(slot);
        }
    }

    fn response(&mut self, header: &[u8]) {
        let cid = u16_at(header, 20);
        let status = Status::from_wire(u16_at(header, 22));
        let sqhd = u16_at(header, 16);
        if self.flow_control {
            self.sqhd = (self.sqhd + 1) % self.queue_size;
            assert_eq!(u32::from(sqhd), self.sqhd);
        } else {
            assert_eq!(sqhd, NO_SQHD);
        }
        let mut commands = self.commands.iter();
        let found = commands.find(|(_, it)| it.cid == cid && it.answer == Some(status));
        match found.map(|(&slot, command)| (slot, command.sent == command.given)) {
            Some((slot, all_sent)) => {
                assert!(all_sent, "answered before its data");
                self.answered(slot);
            }
            // Refused by the machine itself.
            None => {
                assert!(!status.is_success(), "an answer that nobody gave");
                self.count_answer();
            }
        }
    }

    /// A command's answer is on the wire.
    fn answered(&mut self, slot: u16) {
        let awaited = self.tags.values().any(|tag| tag.slot == slot);
        assert!(!awaited, "answered while data is to come");
        if let Some(command) = self.commands.remove(&slot)
            && command.fetch.is_some()
        {
            self.ghosts.insert(slot, command);
        }
        self.count_answer();
    }

    fn count_answer(&mut self) {
        self.answers += 1;
        // One may be early: that of a capsule whose data is still to come.
        assert!(self.answers <= self.capsules + 1);
    }

    fn kernel_took(&mut self, input: &mut Input<'_>) {
        if !self.pending.is_empty() {
            let payload = self.pending.remove(input.below(self.pending.len()));
            self.machine.transmitted(payload);
        }
    }

    fn check(&self) {
        let open = self.commands.values().filter(|it| it.answer.is_none());
        let open = open.count();
        assert!(open <= self.machine.outstanding());
        assert!(self.machine.outstanding() <= self.queue_size as usize);
        for (&slot, command) in &self.commands {
            let outstanding = self.machine.is_outstanding(slot);
            assert_eq!(outstanding, command.answer.is_none(), "slot {slot}");
        }
    }

    /// What was answered leaves, each once.
    fn end(mut self) {
        if self.over {
            return;
        }
        self.event();
        self.transmit(usize::MAX);
        let awaits = |slot: u16| self.tags.values().any(|tag| tag.slot == slot);
        let commands = self.commands.iter();
        let answered = commands.filter(|(_, it)| it.answer.is_some());
        let waiting = answered.clone().filter(|(slot, _)| awaits(**slot)).count();
        assert_eq!(answered.count(), waiting, "an answer was not sent");
        if self.machine.at_boundary() {
            let open = self.machine.outstanding();
            assert_eq!(self.capsules, self.answers + open + waiting);
        }
    }
}
