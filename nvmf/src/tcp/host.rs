//! The host's end: commands out, R2T answered with H2CData, C2HData in, responses matched.

use std::collections::VecDeque;

use super::error::{FatalError, Fes};
use super::limits::Limits;
use super::outgoing::{MAX_TX_DATA, TxPayload, TxPdu};
use super::pdu::{self, Data, Pdu, Receiver, offset, pdu_type};
use super::qpair::{QPair, Role, Window, sealed};
use crate::spec::opcode::nvm;
use crate::spec::sqe::{PSDT_MASK, PSDT_SGL, SglDescriptor, sgl_type};
use crate::spec::{Cqe, Sqe, Status};

/// CID that no command may have (Base: reserved for error log entries).
const CID_RESERVED: u16 = 0xffff;

/// R2Ts of one command that a host keeps at most; MAXR2T of ours is never above.
pub(crate) const MAX_R2TS: usize = 8;

/// Which way a command's data goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Direction {
    /// No data.
    #[default]
    None,
    /// Host to controller.
    Out,
    /// Controller to host.
    In,
}

/// A command whose fate is known and whose memory the machine does not refer to any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completed {
    /// The slot that it had. It is free, unless the command was abandoned and its fate is unknown.
    pub slot: u16,
    /// Its completion. The status is a data transfer error when the controller reported success
    /// although the data did not all move (NVMe has no short transfers), and a transient transport
    /// error when it did not move intact.
    pub cqe: Cqe,
    /// False when the entry was made up from the SUCCESS flag.
    pub sqhd_valid: bool,
    /// Bytes that moved: were received whole PDUs of, or were taken by the kernel.
    pub transferred: u32,
}

/// Data that an R2T asked for and that is not sent yet. What comes before it is sent or asked for
/// by R2Ts before it.
#[derive(Debug, Clone, Copy, Default)]
struct Solicited {
    ttag: u16,
    left: u32,
}

/// The R2Ts of a command that are not fully answered, in order.
#[derive(Debug, Clone, Copy, Default)]
struct Solicitations {
    list: [Solicited; MAX_R2TS],
    first: u8,
    count: u8,
}

impl Solicitations {
    fn len(&self) -> usize {
        usize::from(self.count)
    }

    /// To be called with fewer than [`MAX_R2TS`].
    fn push(&mut self, solicited: Solicited) {
        self.list[(usize::from(self.first) + self.len()) % MAX_R2TS] = solicited;
        self.count += 1;
    }

    fn front(&mut self) -> Option<&mut Solicited> {
        (self.count > 0).then(|| &mut self.list[usize::from(self.first)])
    }

    fn pop(&mut self) {
        self.first = (self.first + 1) % MAX_R2TS as u8;
        self.count -= 1;
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    busy: bool,
    cid: u16,
    /// How often the slot was used: the upper bits of the CID.
    generation: u16,
    sqe: Sqe,
    direction: Direction,
    in_capsule: bool,
    /// The capsule went out.
    sent: bool,
    len: u32,
    /// Data was received whose digest did not match.
    corrupt: bool,
    /// In: bytes received. Out: bytes asked for by R2T (or in the capsule).
    moved: u32,
    /// R2Ts not yet fully answered.
    solicited: Solicitations,
    /// Out: offset of the next byte that an R2T has asked for and that is to be sent.
    next_out: u32,
    /// Out: bytes that the kernel has.
    sent_bytes: u32,
    /// PDUs given out whose payload the kernel has not all taken.
    tx_pending: u32,
    last_seen: bool,
    cqe: Option<(Cqe, bool)>,
    /// Nobody waits for it any more: it is reported before its fate is known.
    abandoned: bool,
    /// It was reported so, and only its fate is waited for.
    reported: bool,
    /// It is among the completed.
    listed: bool,
}

/// What C2HData is being received.
#[derive(Debug, Clone, Copy)]
struct Receiving {
    slot: u16,
    /// How much the command has when the payload is complete.
    end: u32,
    last: bool,
    success: bool,
}

/// State of the host role.
#[derive(Debug)]
pub struct Host {
    slots: Vec<Slot>,
    /// Bits of a CID that are the slot.
    slot_bits: u32,
    free: Vec<u16>,
    /// Slots whose capsule is to be sent, in order.
    capsules: VecDeque<u16>,
    /// Slots with R2Ts to answer, one PDU each in turn, so that no command starves another. The R2Ts
    /// of one command are answered one after the other.
    turns: VecDeque<u16>,
    completed: VecDeque<u16>,
    /// Commands that were reported although their fate is not known.
    unresolved: usize,
    receiving: Option<Receiving>,
}

impl Role for Host {}

impl QPair<Host> {
    /// A host's queue pair of `queue_size` entries: one fewer commands can be outstanding.
    pub fn host(queue_size: u32, mut limits: Limits) -> Self {
        let depth = queue_size.clamp(2, 65536) as usize - 1;
        limits.max_r2t = limits.max_r2t.clamp(1, MAX_R2TS as u32);
        let role = Host {
            slots: vec![Slot::default(); depth],
            slot_bits: usize::BITS - (depth - 1).leading_zeros(),
            free: (0..depth as u16).rev().collect(),
            capsules: VecDeque::with_capacity(depth),
            turns: VecDeque::with_capacity(depth),
            completed: VecDeque::with_capacity(depth),
            unresolved: 0,
            receiving: None,
        };
        Self::with_role(role, limits)
    }

    /// Commands that can be submitted now.
    pub fn room(&self) -> usize {
        self.role.free.len()
    }

    /// Commands outstanding, completed ones not yet taken included, those apart that were abandoned
    /// and taken.
    pub fn outstanding(&self) -> usize {
        self.role.slots.len() - self.role.free.len() - self.role.unresolved
    }

    /// The slot that the next [`Self::submit`] takes.
    pub fn next_slot(&self) -> Option<u16> {
        self.role.free.last().copied()
    }

    /// Queues a command with `len` bytes of data. Returns its slot and CID; `None` when full.
    pub fn submit(&mut self, mut sqe: Sqe, direction: Direction, len: u32) -> Option<(u16, u16)> {
        let in_capsule_limit = self.limits().in_capsule_limit.min(MAX_TX_DATA);
        let role = &mut self.role;
        let index = role.free.pop()?;
        let slot = &mut role.slots[usize::from(index)];
        let generation = slot.generation.wrapping_add(1);
        // A queue of 65535 commands leaves no bit for the generation; it has no slot 65535 either.
        let upper = generation.checked_shl(role.slot_bits).unwrap_or(0);
        let cid = if upper | index == CID_RESERVED {
            index
        } else {
            upper | index
        };
        let in_capsule = direction == Direction::Out && len <= in_capsule_limit;
        sqe.cid = cid.into();
        sqe.flags = sqe.flags & !PSDT_MASK | PSDT_SGL;
        let kind = if in_capsule {
            sgl_type::IN_CAPSULE
        } else {
            sgl_type::TRANSPORT
        };
        sqe.sgl1 = SglDescriptor {
            length: len.into(),
            sgl_type: kind,
            ..Default::default()
        };
        *slot = Slot {
            busy: true,
            cid,
            generation,
            sqe,
            direction,
            in_capsule,
            len,
            ..Slot::default()
        };
        role.capsules.push_back(index);
        Some((index, cid))
    }

    /// Gives a command up: it completes with [`Status::ABORTED_BY_HOST`] as soon as nothing that was
    /// given out by [`QPair::transmit`] refers to its memory, what arrives for it is discarded, and no
    /// more of its data is sent. One whose capsule was not given out is never sent. Otherwise its slot
    /// and CID are not used again before the controller has answered. A command that was answered
    /// already completes as it was. False when no such command is outstanding.
    pub fn abandon(&mut self, cid: u16) -> bool {
        let role = &mut self.role;
        let index = role.index(cid);
        let slot = role.slots.get_mut(usize::from(index));
        let Some(slot) = slot.filter(|slot| slot.busy && slot.cid == cid && !slot.abandoned) else {
            return false;
        };
        if slot.cqe.is_some() {
            return true;
        }
        if slot.sent {
            slot.abandoned = true;
            role.stop_sending(index);
        } else {
            slot.cqe = Some((Cqe::new(cid, Status::ABORTED_BY_HOST), false));
            role.capsules.retain(|&queued| queued != index);
        }
        role.retire_if_done(index);
        self.discard_payload_of(index);
        true
    }

    /// The next command that has ended.
    pub fn completed(&mut self) -> Option<Completed> {
        let admin = self.limits().admin;
        let role = &mut self.role;
        let index = role.completed.pop_front()?;
        let slot = &mut role.slots[usize::from(index)];
        slot.listed = false;
        let transferred = match slot.direction {
            Direction::Out => slot.sent_bytes,
            Direction::In | Direction::None => slot.moved,
        };
        let Some((mut cqe, sqhd_valid)) = slot.cqe.take() else {
            slot.reported = true;
            role.unresolved += 1;
            return Some(Completed {
                slot: index,
                cqe: Cqe::new(slot.cid, Status::ABORTED_BY_HOST),
                sqhd_valid: false,
                transferred,
            });
        };
        let short = transferred < slot.len
            && match slot.direction {
                Direction::In => true,
                Direction::Out => !admin && slot.sqe.opcode == nvm::WRITE,
                Direction::None => false,
            }
            && !mutated!(ShortTransferAccepted);
        if cqe.status().is_success() && slot.corrupt {
            cqe.status = Status::TRANSIENT_TRANSPORT.to_wire().into();
        } else if cqe.status().is_success() && short {
            cqe.status = Status::DATA_TRANSFER_ERROR.to_wire().into();
        }
        let done = Completed {
            slot: index,
            cqe,
            sqhd_valid,
            transferred,
        };
        slot.busy = false;
        role.free.push(index);
        Some(done)
    }

    /// Ends every command with [`Status::ABORTED_BY_HOST`]: the connection is lost, and nothing
    /// that was given out by [`QPair::transmit`] is used any more.
    pub fn abort_all(&mut self) {
        self.silence();
        let role = &mut self.role;
        role.capsules.clear();
        role.turns.clear();
        role.receiving = None;
        for index in 0..role.slots.len() {
            let slot = &mut role.slots[index];
            if slot.busy {
                slot.tx_pending = 0;
                let lost = (Cqe::new(slot.cid, Status::ABORTED_BY_HOST), false);
                slot.cqe.get_or_insert(lost);
                role.retire_if_done(index as u16);
            }
        }
    }
}

impl Host {
    /// The slot that a CID names, which may not exist.
    fn index(&self, cid: u16) -> u16 {
        let mask = (1u32 << self.slot_bits) - 1;
        (u32::from(cid) & mask) as u16
    }

    /// The slot of a CID of a command that was sent and not yet answered.
    fn find(&self, cid: u16) -> Option<u16> {
        let index = self.index(cid);
        let slot = self.slots.get(usize::from(index))?;
        (slot.busy && slot.sent && slot.cid == cid && slot.cqe.is_none()).then_some(index)
    }

    fn settle(&mut self, index: u16, cqe: Cqe, sqhd_valid: bool) {
        let slot = &mut self.slots[usize::from(index)];
        slot.cqe = Some((cqe, sqhd_valid));
        // Answered early: what is not yet in a PDU is not sent any more.
        self.stop_sending(index);
        self.retire_if_done(index);
    }

    /// Leaves R2Ts of a command unanswered.
    fn stop_sending(&mut self, index: u16) {
        let solicited = &mut self.slots[usize::from(index)].solicited;
        if solicited.len() > 0 {
            *solicited = Solicitations::default();
            self.turns.retain(|&turn| turn != index);
        }
    }

    /// Reports a command whose fate is known, or does not matter any more, and whose memory nothing
    /// refers to.
    fn retire_if_done(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        let referred_to = slot.tx_pending > 0 && !mutated!(RetiredOnCqeAlone);
        if referred_to || (slot.cqe.is_none() && !slot.abandoned) {
            return;
        }
        if slot.reported {
            if slot.cqe.take().is_some() {
                slot.busy = false;
                slot.reported = false;
                self.unresolved -= 1;
                self.free.push(index);
            }
        } else if !slot.listed {
            slot.listed = true;
            self.completed.push_back(index);
        }
    }

    fn response(&mut self, cqe: Cqe) -> Result<Window, FatalError> {
        let index = self.find(cqe.cid.get()).ok_or(FatalError::field(
            offset::CCCID + 12,
            "response to a command that is not outstanding",
        ))?;
        self.settle(index, cqe, true);
        Ok(Window::EMPTY)
    }

    fn data_in(&mut self, data: Data) -> Result<Window, FatalError> {
        let index = self.find(data.cccid).ok_or(FatalError::field(
            offset::CCCID,
            "data for a command that is not outstanding",
        ))?;
        data.check_length()?;
        let slot = &mut self.slots[usize::from(index)];
        if slot.direction != Direction::In {
            let what = "data for a command that expects none";
            return Err(FatalError::other(Fes::SEQUENCE_ERROR, what));
        }
        let end = data
            .offset
            .checked_add(data.length)
            .filter(|&end| end <= slot.len);
        let end = end.ok_or(FatalError::other(
            Fes::DATA_OUT_OF_RANGE,
            "data beyond the end of the command's buffer",
        ))?;
        if data.offset != slot.moved || slot.last_seen {
            return Err(FatalError::other(Fes::SEQUENCE_ERROR, "data out of order"));
        }
        if end == slot.len && !data.last {
            let what = "the final data does not have LAST_PDU";
            return Err(FatalError::other(Fes::SEQUENCE_ERROR, what));
        }
        slot.last_seen = data.last;
        let wanted = !slot.abandoned;
        self.receiving = Some(Receiving {
            slot: index,
            end,
            last: data.last,
            success: data.success,
        });
        Ok(Window {
            slot: wanted.then_some(index),
            offset: data.offset,
            len: data.length,
        })
    }

    fn solicit(&mut self, r2t: Data, limits: &Limits) -> Result<Window, FatalError> {
        let index = self
            .find(r2t.cccid)
            .filter(|&index| {
                let slot = &self.slots[usize::from(index)];
                slot.direction == Direction::Out && !slot.in_capsule
            })
            .ok_or(FatalError::field(
                offset::CCCID,
                "R2T for a command that has no data to send",
            ))?;
        let slot = &mut self.slots[usize::from(index)];
        if r2t.length == 0 {
            return Err(FatalError::field(offset::DATA_LENGTH, "R2T of no data"));
        }
        if slot.abandoned {
            // Its memory is gone: the controller has to do without the data.
            return Ok(Window::EMPTY);
        }
        if slot.solicited.len() >= limits.max_r2t as usize {
            return Err(FatalError::other(
                Fes::LIMIT_EXCEEDED,
                "more R2Ts than MAXR2T allows",
            ));
        }
        if r2t.offset != slot.moved {
            return Err(FatalError::other(Fes::SEQUENCE_ERROR, "R2T out of order"));
        }
        let end = r2t
            .offset
            .checked_add(r2t.length)
            .filter(|&end| end <= slot.len || mutated!(R2tRangeUnchecked));
        slot.moved = end.ok_or(FatalError::other(
            Fes::DATA_OUT_OF_RANGE,
            "R2T beyond the end of the command's data",
        ))?;
        if slot.solicited.len() == 0 {
            self.turns.push_back(index);
        }
        slot.solicited.push(Solicited {
            ttag: r2t.ttag,
            left: r2t.length,
        });
        Ok(Window::EMPTY)
    }
}

impl sealed::Sealed for Host {
    #[expect(private_interfaces, reason = "the trait is sealed")]
    const RECEIVER: Receiver = Receiver::Host;
    const TERM_REQ: u8 = pdu_type::H2C_TERM_REQ;

    #[expect(private_interfaces, reason = "the trait is sealed")]
    fn received(&mut self, pdu: Pdu, limits: &Limits) -> Result<Window, FatalError> {
        match pdu {
            Pdu::CapsuleResp { cqe } => self.response(cqe),
            Pdu::Data(data) => self.data_in(data),
            Pdu::R2t(r2t) => self.solicit(r2t, limits),
            Pdu::CapsuleCmd { .. } | Pdu::TermReq(_) => Err(FatalError::field(
                offset::TYPE,
                "PDU type not expected here",
            )),
        }
    }

    fn payload_complete(&mut self, intact: bool) {
        let Some(Receiving {
            slot: index,
            end,
            last,
            success,
        }) = self.receiving.take()
        else {
            return;
        };
        let slot = &mut self.slots[usize::from(index)];
        slot.moved = end;
        slot.corrupt |= !intact;
        if last && success {
            let cqe = Cqe::new(slot.cid, Status::SUCCESS);
            self.settle(index, cqe, false);
        }
    }

    fn unseen(&self, _slot: u16) -> bool {
        false
    }

    fn transmit(&mut self, limits: &Limits) -> Option<TxPdu> {
        if let Some(index) = self.capsules.pop_front() {
            let slot = &mut self.slots[usize::from(index)];
            slot.sent = true;
            let data_len = if slot.in_capsule { slot.len } else { 0 };
            slot.tx_pending += u32::from(data_len > 0);
            let payload = TxPayload {
                slot: index,
                offset: 0,
                len: data_len,
            };
            return Some(pdu::capsule_cmd(slot.sqe, data_len, limits).with_payload(payload));
        }
        let index = self.turns.pop_front()?;
        let slot = &mut self.slots[usize::from(index)];
        let next = slot.solicited.front()?;
        let length = next.left.min(limits.max_h2c_data).min(MAX_TX_DATA);
        next.left -= length;
        let (ttag, last) = (next.ttag, next.left == 0);
        let data = Data {
            cccid: slot.cid,
            ttag,
            offset: slot.next_out,
            length,
            carried: length,
            last,
            success: false,
        };
        let payload = TxPayload {
            slot: index,
            offset: slot.next_out,
            len: length,
        };
        slot.tx_pending += 1;
        slot.next_out += length;
        if last {
            slot.solicited.pop();
        }
        if slot.solicited.len() > 0 {
            self.turns.push_back(index);
        }
        Some(pdu::data(pdu_type::H2C_DATA, data, limits).with_payload(payload))
    }

    fn transmitted(&mut self, payload: TxPayload) {
        let slot = &mut self.slots[usize::from(payload.slot)];
        slot.tx_pending = slot.tx_pending.saturating_sub(1);
        slot.sent_bytes = slot.sent_bytes.saturating_add(payload.len);
        self.retire_if_done(payload.slot);
    }
}
