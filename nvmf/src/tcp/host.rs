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
    /// The slot that it had, now free.
    pub slot: u16,
    /// Its completion. The status is a data transfer error when the controller reported success
    /// although the data did not all move (NVMe has no short transfers), and a transient transport
    /// error when it did not move intact.
    pub cqe: Cqe,
    /// False when the entry was made up from the SUCCESS flag.
    pub sqhd_valid: bool,
    /// Bytes that moved.
    pub transferred: u32,
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
    r2ts: u32,
    /// PDUs given out whose payload the kernel has not all taken.
    tx_pending: u32,
    last_seen: bool,
    cqe: Option<(Cqe, bool)>,
}

/// Data that an R2T asked for and that is not sent yet.
#[derive(Debug, Clone, Copy)]
struct Solicited {
    slot: u16,
    ttag: u16,
    offset: u32,
    left: u32,
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
    /// Answered R2Ts, one PDU each in turn, so that no command starves another.
    solicited: VecDeque<Solicited>,
    completed: VecDeque<u16>,
    receiving: Option<Receiving>,
}

impl Role for Host {}

impl QPair<Host> {
    /// A host's queue pair of `queue_size` entries: one fewer commands can be outstanding.
    pub fn host(queue_size: u32, limits: Limits) -> Self {
        let depth = queue_size.clamp(2, 65536) as usize - 1;
        let r2ts = depth.saturating_mul(limits.max_r2t.min(16) as usize);
        let role = Host {
            slots: vec![Slot::default(); depth],
            slot_bits: usize::BITS - (depth - 1).leading_zeros(),
            free: (0..depth as u16).rev().collect(),
            capsules: VecDeque::with_capacity(depth),
            solicited: VecDeque::with_capacity(r2ts.min(1024)),
            completed: VecDeque::with_capacity(depth),
            receiving: None,
        };
        Self::with_role(role, limits)
    }

    /// Commands that can be submitted now.
    pub fn room(&self) -> usize {
        self.role.free.len()
    }

    /// Commands outstanding, completed ones not yet taken included.
    pub fn outstanding(&self) -> usize {
        self.role.slots.len() - self.role.free.len()
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
        let moved = if in_capsule { len } else { 0 };
        *slot = Slot {
            busy: true,
            cid,
            generation,
            sqe,
            direction,
            in_capsule,
            len,
            moved,
            ..Slot::default()
        };
        role.capsules.push_back(index);
        Some((index, cid))
    }

    /// The next command that has ended.
    pub fn completed(&mut self) -> Option<Completed> {
        let admin = self.limits().admin;
        let role = &mut self.role;
        let index = role.completed.pop_front()?;
        let slot = &mut role.slots[usize::from(index)];
        let (mut cqe, sqhd_valid) = slot.cqe.take()?;
        let short = slot.moved < slot.len
            && match slot.direction {
                Direction::In => true,
                Direction::Out => !admin && slot.sqe.opcode == nvm::WRITE,
                Direction::None => false,
            };
        if cqe.status().is_success() && slot.corrupt {
            cqe.status = Status::TRANSIENT_TRANSPORT.to_wire().into();
        } else if cqe.status().is_success() && short {
            cqe.status = Status::DATA_TRANSFER_ERROR.to_wire().into();
        }
        let done = Completed {
            slot: index,
            cqe,
            sqhd_valid,
            transferred: slot.moved,
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
        role.solicited.clear();
        role.receiving = None;
        for (index, slot) in role
            .slots
            .iter_mut()
            .enumerate()
            .filter(|(_, slot)| slot.busy)
        {
            slot.tx_pending = 0;
            if slot.cqe.is_none() {
                slot.cqe = Some((Cqe::new(slot.cid, Status::ABORTED_BY_HOST), false));
                role.completed.push_back(index as u16);
            } else if !role.completed.contains(&(index as u16)) {
                role.completed.push_back(index as u16);
            }
        }
    }
}

impl Host {
    /// The slot of a CID of a command that was sent and not yet answered.
    fn find(&self, cid: u16) -> Option<u16> {
        let mask = (1u32 << self.slot_bits) - 1;
        let index = (u32::from(cid) & mask) as u16;
        let slot = self.slots.get(usize::from(index))?;
        (slot.busy && slot.sent && slot.cid == cid && slot.cqe.is_none()).then_some(index)
    }

    fn settle(&mut self, index: u16, cqe: Cqe, sqhd_valid: bool) {
        let slot = &mut self.slots[usize::from(index)];
        slot.cqe = Some((cqe, sqhd_valid));
        if slot.r2ts > 0 {
            // Answered early: what is not yet in a PDU is not sent any more.
            slot.r2ts = 0;
            self.solicited.retain(|solicited| solicited.slot != index);
        }
        self.retire_if_done(index);
    }

    fn retire_if_done(&mut self, index: u16) {
        let slot = &self.slots[usize::from(index)];
        if slot.cqe.is_some() && slot.tx_pending == 0 {
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
        let index = self
            .find(data.cccid)
            .filter(|&index| self.slots[usize::from(index)].direction == Direction::In)
            .ok_or(FatalError::field(
                offset::CCCID,
                "data for a command that expects none",
            ))?;
        let slot = &mut self.slots[usize::from(index)];
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
        self.receiving = Some(Receiving {
            slot: index,
            end,
            last: data.last,
            success: data.success,
        });
        Ok(Window {
            slot: Some(index),
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
        if slot.r2ts >= limits.max_r2t {
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
            .filter(|&end| end <= slot.len);
        slot.moved = end.ok_or(FatalError::other(
            Fes::DATA_OUT_OF_RANGE,
            "R2T beyond the end of the command's data",
        ))?;
        slot.r2ts += 1;
        self.solicited.push_back(Solicited {
            slot: index,
            ttag: r2t.ttag,
            offset: r2t.offset,
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
        let mut next = self.solicited.pop_front()?;
        let slot = &mut self.slots[usize::from(next.slot)];
        let length = next.left.min(limits.max_h2c_data).min(MAX_TX_DATA);
        let data = Data {
            cccid: slot.cid,
            ttag: next.ttag,
            offset: next.offset,
            length,
            last: length == next.left,
            success: false,
        };
        let payload = TxPayload {
            slot: next.slot,
            offset: next.offset,
            len: length,
        };
        slot.tx_pending += 1;
        next.offset += length;
        next.left -= length;
        if next.left > 0 {
            self.solicited.push_back(next);
        } else {
            slot.r2ts -= 1;
        }
        Some(pdu::data(pdu_type::H2C_DATA, data, limits).with_payload(payload))
    }

    fn transmitted(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        slot.tx_pending = slot.tx_pending.saturating_sub(1);
        self.retire_if_done(index);
    }
}
