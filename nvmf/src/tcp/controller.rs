//! The controller's end: commands in, R2T out, H2CData in, C2HData and responses out.

use std::collections::VecDeque;
use std::ops::Range;

use super::cid_table::CidTable;
use super::error::{FatalError, Fes};
use super::limits::Limits;
use super::outgoing::{MAX_TX_DATA, TxPayload, TxPdu};
use super::pdu::{self, Data, Pdu, Receiver, offset, pdu_type};
use super::qpair::{QPair, Role, Window, sealed};
use crate::spec::fabrics::SQHD_FLOW_DISABLED;
use crate::spec::sqe::{PSDT_SGL, sgl_type};
use crate::spec::{Cqe, Sqe, Status};

/// What happened on a controller's queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControllerEvent {
    /// A command arrived. Its in-capsule data, if any, is the payload that follows.
    Command {
        /// Its slot until it retires.
        slot: u16,
        /// The entry.
        sqe: Sqe,
        /// Bytes of data that the SGL describes.
        data_len: u32,
        /// They are in the capsule.
        in_capsule: bool,
    },
    /// All data of the slot's fetch has arrived.
    Fetched {
        /// The command.
        slot: u16,
        /// False when a digest of it did not match: what was placed is not to be used.
        intact: bool,
    },
}

/// Why a fetch was not begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FetchError(pub Status);

/// Why data was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SendError(pub Status);

/// What became of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// It will be sent.
    Queued,
    /// There is no such command, or it was answered before.
    Unknown,
}

/// R2Ts that one command has outstanding at most, where the host takes so many.
const MAX_R2TS: usize = 4;

/// Most data that one R2T asks for where a command may have several, in bytes: so that large
/// transfers take turns while each keeps its host busy.
const R2T_LEN: u32 = 256 * 1024;

/// Data of a command that is wanted: asked for with R2Ts, or lying in the capsule.
#[derive(Debug, Clone, Copy)]
struct Fetch {
    /// Next byte to ask for, as an offset into the command's data.
    unasked: u32,
    end: u32,
    /// Next byte expected: R2Ts of one command are answered in order.
    expected: u32,
    /// Bytes that have not arrived, asked for or not.
    left: u32,
    /// No digest of it mismatched so far.
    intact: bool,
}

/// What an R2T asked for, as offsets into the command's data.
#[derive(Debug, Clone, Copy, Default)]
struct Asked {
    start: u32,
    end: u32,
    /// Not all of it has come.
    open: bool,
}

/// Data queued for the host.
#[derive(Debug, Clone, Copy)]
struct Outgoing {
    next: u32,
    end: u32,
    last: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    busy: bool,
    /// The consumer has taken the command from the events.
    seen: bool,
    cid: u16,
    data_len: u32,
    in_capsule: bool,
    fetch: Option<Fetch>,
    /// Bytes that were fetched so far, or are being fetched.
    fetched: u32,
    /// The next R2T waits for its turn.
    r2t_queued: bool,
    outgoing: Option<Outgoing>,
    /// Bytes queued for the host so far.
    sent: u32,
    /// The consumer has answered.
    answered: bool,
    /// Answered while data was still to be sent or to come: goes out after it, or as the SUCCESS flag
    /// of what is sent.
    answer: Option<Cqe>,
    /// The answer is on its way: nothing more will be sent.
    closed: bool,
    tx_pending: u32,
}

#[derive(Debug, Clone, Copy)]
enum Tx {
    R2t(u16),
    Data(u16),
    Response { slot: Option<u16>, cqe: Cqe },
}

/// State of the controller role.
#[derive(Debug)]
pub struct Controller {
    slots: Vec<Slot>,
    free: Vec<u16>,
    cids: CidTable,
    tx: VecDeque<Tx>,
    events: VecDeque<ControllerEvent>,
    /// Whose payload arrives, and how much it is.
    receiving: Option<(u16, u32)>,
    /// R2Ts that the host takes for one command.
    max_r2t: u32,
    /// R2Ts that a command may have outstanding.
    r2ts: u16,
    /// By transfer tag: as many for each slot.
    asked: Vec<Asked>,
    queue_size: u32,
    sq_flow_control: bool,
    sqhd: u32,
}

impl Role for Controller {}

impl QPair<Controller> {
    /// A controller's queue pair of `queue_size` entries.
    pub fn controller(queue_size: u32, sq_flow_control: bool, limits: Limits) -> Self {
        let role = Controller::new(queue_size, sq_flow_control, limits.max_r2t);
        Self::with_role(role, limits)
    }

    /// Sizes the queue as the Connect command asks; to be called before that is answered.
    pub fn set_queue(&mut self, queue_size: u32, sq_flow_control: bool) {
        self.role.resize(queue_size, sq_flow_control);
    }

    /// The next event.
    pub fn event(&mut self) -> Option<ControllerEvent> {
        let event = self.role.events.pop_front();
        if let Some(ControllerEvent::Command { slot, .. }) = event
            && let Some(slot) = self.role.slots.get_mut(usize::from(slot))
        {
            slot.seen = true;
        }
        event
    }

    /// Commands that arrived and were not answered.
    pub fn outstanding(&self) -> usize {
        self.role
            .slots
            .iter()
            .filter(|slot| slot.busy && !slot.answered)
            .count()
    }

    /// So much waits to be sent that receiving more would let the peer grow our memory.
    pub fn backlogged(&self) -> bool {
        self.role.tx.len() > self.role.slots.len() + 64
    }

    /// The slot holds a command that was not answered.
    pub fn is_outstanding(&self, slot: u16) -> bool {
        self.role
            .slots
            .get(usize::from(slot))
            .is_some_and(|slot| slot.busy && !slot.answered)
    }

    /// Begins to fetch `len` bytes of a command's data at `offset`; one fetch at a time for each
    /// command, and each where the one before it ended, since R2Ts have to be so. In-capsule data is the payload that follows the command; it is fetched as a whole.
    ///
    /// # Errors
    /// The status to answer with.
    pub fn fetch(&mut self, index: u16, offset: u32, len: u32) -> Result<(), FetchError> {
        let role = &mut self.role;
        let slot = role.slots.get_mut(usize::from(index));
        let slot = slot.filter(|slot| slot.busy && !slot.answered);
        let slot = slot.ok_or(FetchError(Status::INTERNAL_ERROR))?;
        let end = offset.checked_add(len).filter(|&end| end <= slot.data_len);
        let end = end.ok_or(FetchError(Status::DATA_SGL_LENGTH_INVALID))?;
        if slot.in_capsule || slot.fetch.is_some() || len == 0 || offset != slot.fetched {
            return Err(FetchError(Status::INTERNAL_ERROR));
        }
        slot.fetched = end;
        slot.fetch = Some(Fetch {
            unasked: offset,
            end,
            expected: offset,
            left: len,
            intact: true,
        });
        role.queue_r2t(index);
        Ok(())
    }

    /// Queues data for the host; `last` with the final piece, which the one that reaches the end of the
    /// command's data is in any case. One piece at a time.
    ///
    /// # Errors
    /// The status to answer with.
    pub fn send(&mut self, index: u16, offset: u32, len: u32, last: bool) -> Result<(), SendError> {
        let role = &mut self.role;
        let slot = role.slots.get_mut(usize::from(index));
        let slot = slot.filter(|slot| slot.busy && !slot.answered);
        let slot = slot.ok_or(SendError(Status::INTERNAL_ERROR))?;
        let end = offset.checked_add(len).filter(|&end| end <= slot.data_len);
        let end = end.ok_or(SendError(Status::INVALID_FIELD))?;
        if slot.in_capsule || offset != slot.sent || slot.outgoing.is_some() || len == 0 {
            return Err(SendError(Status::INVALID_FIELD));
        }
        slot.sent = end;
        slot.outgoing = Some(Outgoing {
            next: offset,
            end,
            last: last || end == slot.data_len,
        });
        role.tx.push_back(Tx::Data(index));
        Ok(())
    }

    /// Answers a command. CID and SQHD are filled in when the answer is sent, which is after all data
    /// that was asked for has come; no more is asked for.
    pub fn respond(&mut self, index: u16, cqe: Cqe) -> Answered {
        let role = &mut self.role;
        let Some(slot) = role.slots.get_mut(usize::from(index)) else {
            return Answered::Unknown;
        };
        if !slot.busy || slot.answered {
            return Answered::Unknown;
        }
        slot.answered = true;
        slot.ask_no_more();
        let awaited = slot.fetch.is_some() && !slot.in_capsule;
        if slot.outgoing.is_some() || awaited {
            slot.answer = Some(cqe);
        } else {
            role.tx.push_back(Tx::Response {
                slot: Some(index),
                cqe,
            });
        }
        Answered::Queued
    }
}

impl Slot {
    /// Drops what was not asked for of a fetch.
    fn ask_no_more(&mut self) {
        if let Some(fetch) = self.fetch.as_mut().filter(|_| !self.in_capsule) {
            fetch.left -= fetch.end - fetch.unasked;
            fetch.end = fetch.unasked;
            if fetch.left == 0 {
                self.fetch = None;
            }
        }
    }
}

impl Controller {
    fn new(queue_size: u32, sq_flow_control: bool, max_r2t: u32) -> Self {
        let mut role = Self {
            slots: Vec::new(),
            free: Vec::new(),
            cids: CidTable::new(1),
            tx: VecDeque::new(),
            events: VecDeque::new(),
            receiving: None,
            max_r2t,
            r2ts: 1,
            asked: Vec::new(),
            queue_size,
            sq_flow_control,
            sqhd: 0,
        };
        role.resize(queue_size, sq_flow_control);
        role
    }

    /// Slots that exist stay: the Connect command itself is in one.
    fn resize(&mut self, queue_size: u32, sq_flow_control: bool) {
        self.queue_size = queue_size.clamp(2, 65536);
        self.sq_flow_control = sq_flow_control;
        let depth = self.queue_size as usize;
        let had = self.slots.len();
        if depth > had {
            self.slots.resize(depth, Slot::default());
            self.free.extend((had..depth).rev().map(|slot| slot as u16));
            self.tx.reserve(depth);
            self.events.reserve(depth);
            let mut cids = CidTable::new(depth);
            for (index, slot) in self.slots.iter().enumerate().filter(|(_, slot)| slot.busy) {
                cids.insert(slot.cid, index as u16);
            }
            self.cids = cids;
        }
        if !self.asked.iter().any(|asked| asked.open) {
            // Every transfer tag fits its 16 bits.
            let fit = 65536 / self.slots.len().max(1);
            self.r2ts = (self.max_r2t as usize).min(fit).clamp(1, MAX_R2TS) as u16;
        }
        let tags = self.slots.len() * usize::from(self.r2ts);
        self.asked.resize(tags, Asked::default());
    }

    /// The transfer tags of a slot.
    fn tags(&self, index: u16) -> Range<usize> {
        let r2ts = usize::from(self.r2ts);
        let first = usize::from(index) * r2ts;
        first..first + r2ts
    }

    fn reject(&mut self, cid: u16, status: Status, data_len: u32) -> Window {
        let cqe = Cqe::new(cid, status.do_not_retry());
        self.tx.push_back(Tx::Response { slot: None, cqe });
        Window::discard(data_len)
    }

    fn command(&mut self, sqe: Sqe, capsule_data: u32) -> Result<Window, FatalError> {
        let cid = sqe.cid.get();
        let sgl = sqe.sgl1;
        let data_len = sgl.length.get();
        if self.cids.contains(cid) {
            return Ok(self.reject(cid, Status::CID_CONFLICT, capsule_data));
        }
        if sqe.psdt() != PSDT_SGL {
            return Ok(self.reject(cid, Status::INVALID_FIELD, capsule_data));
        }
        let in_capsule = match sgl.sgl_type {
            sgl_type::IN_CAPSULE if data_len != capsule_data => {
                return Ok(self.reject(cid, Status::DATA_SGL_LENGTH_INVALID, capsule_data));
            }
            sgl_type::IN_CAPSULE => true,
            sgl_type::TRANSPORT if capsule_data > 0 => {
                return Ok(self.reject(cid, Status::INVALID_FIELD, capsule_data));
            }
            sgl_type::TRANSPORT => false,
            // A command without data may leave the descriptor empty.
            0 if data_len == 0 && capsule_data == 0 => false,
            _ => return Ok(self.reject(cid, Status::SGL_TYPE_INVALID, capsule_data)),
        };
        if sgl.address.get() != 0 {
            return Ok(self.reject(cid, Status::SGL_OFFSET_INVALID, capsule_data));
        }
        let index = self.free.pop().ok_or(FatalError::other(
            Fes::SEQUENCE_ERROR,
            "more commands outstanding than the queue has entries",
        ))?;
        self.cids.insert(cid, index);
        let in_capsule = in_capsule && data_len > 0;
        let fetch = in_capsule.then_some(Fetch {
            unasked: data_len,
            end: data_len,
            expected: data_len,
            left: data_len,
            intact: true,
        });
        self.slots[usize::from(index)] = Slot {
            busy: true,
            cid,
            data_len,
            in_capsule,
            fetch,
            ..Slot::default()
        };
        self.events.push_back(ControllerEvent::Command {
            slot: index,
            sqe,
            data_len,
            in_capsule,
        });
        if !in_capsule {
            return Ok(Window::EMPTY);
        }
        self.receiving = Some((index, data_len));
        Ok(Window {
            slot: Some(index),
            offset: 0,
            len: data_len,
        })
    }

    fn data_out(&mut self, data: Data, limits: &Limits) -> Result<Window, FatalError> {
        // CCCID lies before TTAG, so it is the lower offence when both are wrong.
        if !self.cids.contains(data.cccid) {
            let what = "data for a command that is not outstanding";
            return Err(FatalError::field(offset::CCCID, what));
        }
        let index = data.ttag / self.r2ts;
        let asked = self.asked.get_mut(usize::from(data.ttag));
        let slot = self.slots.get_mut(usize::from(index));
        let Some((asked, slot)) = asked.filter(|asked| asked.open).zip(slot) else {
            return Err(FatalError::field(
                offset::TTAG,
                "data for a transfer tag that is not open",
            ));
        };
        if slot.cid != data.cccid {
            let what = "data for a command that the transfer tag does not belong to";
            return Err(FatalError::field(offset::CCCID, what));
        }
        data.check_length()?;
        let Some(fetch) = &mut slot.fetch else {
            // Not so while a tag is open.
            return Err(FatalError::other(Fes::SEQUENCE_ERROR, "unexpected data"));
        };
        if data.length > limits.max_h2c_data {
            return Err(FatalError::other(
                Fes::LIMIT_EXCEEDED,
                "more data than MAXH2CDATA",
            ));
        }
        let end = data
            .offset
            .checked_add(data.length)
            .filter(|&end| data.offset >= asked.start && end <= asked.end);
        let end = end.ok_or(FatalError::other(
            Fes::DATA_OUT_OF_RANGE,
            "data beyond the range that was asked for",
        ))?;
        if data.offset != fetch.expected {
            return Err(FatalError::other(Fes::SEQUENCE_ERROR, "data out of order"));
        }
        if data.last != (end == asked.end) {
            let what = "LAST_PDU is not set on exactly the final data";
            return Err(FatalError::other(Fes::SEQUENCE_ERROR, what));
        }
        fetch.expected = end;
        asked.open = !data.last;
        self.receiving = Some((index, data.length));
        let wanted = !slot.answered;
        Ok(Window {
            slot: wanted.then_some(index),
            offset: data.offset,
            len: data.length,
        })
    }

    /// Has a command wait for its turn to ask, if there is something to ask for and one more R2T may
    /// be outstanding.
    fn queue_r2t(&mut self, index: u16) {
        let free = self.asked[self.tags(index)].iter().any(|asked| !asked.open);
        let slot = &mut self.slots[usize::from(index)];
        let unasked = slot.fetch.is_some_and(|fetch| fetch.unasked < fetch.end);
        if free && unasked && !slot.r2t_queued {
            slot.r2t_queued = true;
            self.tx.push_back(Tx::R2t(index));
        }
    }

    /// The next R2T of a command's fetch.
    fn ask(&mut self, index: u16) -> Option<Data> {
        let tags = self.tags(index);
        let slot = &mut self.slots[usize::from(index)];
        slot.r2t_queued = false;
        let fetch = slot
            .fetch
            .as_mut()
            .filter(|fetch| fetch.unasked < fetch.end)?;
        let tag = tags.start + self.asked[tags].iter().position(|asked| !asked.open)?;
        let rest = fetch.end - fetch.unasked;
        let several = self.r2ts > 1;
        let length = if several { rest.min(R2T_LEN) } else { rest };
        let offset = fetch.unasked;
        fetch.unasked += length;
        self.asked[tag] = Asked {
            start: offset,
            end: fetch.unasked,
            open: true,
        };
        let cccid = slot.cid;
        // Behind what other commands ask for.
        self.queue_r2t(index);
        Some(Data {
            cccid,
            ttag: tag as u16,
            offset,
            length,
            carried: 0,
            last: false,
            success: false,
        })
    }

    fn retire_if_done(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        if slot.busy && slot.closed && slot.tx_pending == 0 && slot.fetch.is_none() {
            slot.busy = false;
            self.cids.remove(slot.cid);
            self.free.push(index);
        }
    }

    fn next_sqhd(&mut self) -> u16 {
        if !self.sq_flow_control {
            return SQHD_FLOW_DISABLED;
        }
        self.sqhd = (self.sqhd + 1) % self.queue_size;
        self.sqhd as u16
    }

    fn transmit_data(&mut self, index: u16, limits: &Limits) -> Option<TxPdu> {
        let flow_control = self.sq_flow_control;
        let slot = &mut self.slots[usize::from(index)];
        let outgoing = slot.outgoing.as_mut()?;
        let length = (outgoing.end - outgoing.next).min(MAX_TX_DATA);
        let offset = outgoing.next;
        outgoing.next += length;
        let ends = outgoing.next == outgoing.end;
        let last = ends && outgoing.last;
        let mut success = false;
        if ends {
            slot.outgoing = None;
            // An answer that waits for data to come goes out after that.
            if slot.fetch.is_none()
                && let Some(cqe) = slot.answer.take()
            {
                // Without flow control a plain success needs no entry: the flag says it. It says that
                // all data was sent, too.
                let plain = cqe.status().is_success() && cqe.result.get() == 0;
                success = last && !flow_control && plain && slot.sent == slot.data_len;
                if success {
                    slot.closed = true;
                } else {
                    self.tx.push_back(Tx::Response {
                        slot: Some(index),
                        cqe,
                    });
                }
            }
        } else {
            // Round-robin, so that no command starves another.
            self.tx.push_back(Tx::Data(index));
        }
        slot.tx_pending += 1;
        let data = Data {
            cccid: slot.cid,
            ttag: 0,
            offset,
            length,
            carried: length,
            last,
            success,
        };
        let payload = TxPayload {
            slot: index,
            offset,
            len: length,
        };
        Some(pdu::data(pdu_type::C2H_DATA, data, limits).with_payload(payload))
    }
}

impl sealed::Sealed for Controller {
    #[expect(private_interfaces, reason = "the trait is sealed")]
    const RECEIVER: Receiver = Receiver::Controller;
    const TERM_REQ: u8 = pdu_type::C2H_TERM_REQ;

    #[expect(private_interfaces, reason = "the trait is sealed")]
    fn received(&mut self, pdu: Pdu, limits: &Limits) -> Result<Window, FatalError> {
        match pdu {
            Pdu::CapsuleCmd { sqe, data_len } => self.command(sqe, data_len),
            Pdu::Data(data) => self.data_out(data, limits),
            Pdu::CapsuleResp { .. } | Pdu::R2t(_) | Pdu::TermReq(_) => Err(FatalError::field(
                offset::TYPE,
                "PDU type not expected here",
            )),
        }
    }

    fn payload_complete(&mut self, intact: bool) {
        let Some((index, length)) = self.receiving.take() else {
            return;
        };
        let slot = &mut self.slots[usize::from(index)];
        let Some(fetch) = &mut slot.fetch else {
            return;
        };
        fetch.intact &= intact;
        fetch.left -= length;
        let Fetch { left, intact, .. } = *fetch;
        if left > 0 {
            self.queue_r2t(index);
            return;
        }
        slot.fetch = None;
        if !slot.answered {
            self.events.push_back(ControllerEvent::Fetched {
                slot: index,
                intact,
            });
            return;
        }
        if slot.outgoing.is_none()
            && let Some(cqe) = slot.answer.take()
        {
            let slot = Some(index);
            self.tx.push_back(Tx::Response { slot, cqe });
        }
        self.retire_if_done(index);
    }

    fn unseen(&self, slot: u16) -> bool {
        self.slots
            .get(usize::from(slot))
            .is_some_and(|slot| !slot.seen)
    }

    fn transmit(&mut self, limits: &Limits) -> Option<TxPdu> {
        loop {
            match self.tx.pop_front()? {
                Tx::Data(index) => {
                    if let Some(pdu) = self.transmit_data(index, limits) {
                        return Some(pdu);
                    }
                }
                Tx::R2t(index) => {
                    // None when the command was answered meanwhile.
                    if let Some(data) = self.ask(index) {
                        return Some(pdu::r2t(data, limits.digests));
                    }
                }
                Tx::Response { slot, mut cqe } => {
                    cqe.sqhd = self.next_sqhd().into();
                    if let Some(index) = slot {
                        let slot = &mut self.slots[usize::from(index)];
                        cqe.cid = slot.cid.into();
                        slot.closed = true;
                        self.retire_if_done(index);
                    }
                    return Some(pdu::capsule_resp(cqe, limits.digests));
                }
            }
        }
    }

    fn transmitted(&mut self, payload: TxPayload) {
        let slot = &mut self.slots[usize::from(payload.slot)];
        slot.tx_pending = slot.tx_pending.saturating_sub(1);
        self.retire_if_done(payload.slot);
    }
}
