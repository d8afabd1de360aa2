//! Commands of an admin queue: what each is answered with.

use std::sync::Arc;
use std::time::Instant;

use super::Target;
use super::association::Association;
use super::discovery::{self, Viewpoint};
use super::features::{Features, Value};
use super::registers::Effect;
use super::subsystem::Subsystem;
use super::{cross_reset, identify, log_page};
use crate::spec::fabrics::Property;
use crate::spec::opcode::{admin, fabrics};
use crate::spec::{Sqe, Status};

/// Connect Invalid Queue Type, which Disconnect on an admin queue is.
const INVALID_QUEUE_TYPE: Status = Status::new(1, 0x85);
/// Abort's result: the command was not aborted.
const NOT_ABORTED: u64 = 1;

/// What to do about a command.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Succeed with this result, dwords 0 and 1.
    Result(u64),
    /// Send this, then succeed.
    Data(Vec<u8>),
    /// Keep the command until there is an event.
    Hold,
    /// Succeed, and do what was asked of the controller.
    Effect(Effect),
}

/// An admin queue's view of its controller.
pub(super) struct Admin<'a> {
    pub(super) association: &'a Arc<Association>,
    pub(super) subsystem: &'a Subsystem,
    pub(super) target: &'a Target,
    pub(super) view: &'a Viewpoint,
    pub(super) features: &'a mut Features,
    /// Asynchronous Event Requests that are held.
    pub(super) held: usize,
    /// When the association began.
    pub(super) since: Instant,
}

impl Admin<'_> {
    /// Decides about one command.
    ///
    /// # Errors
    /// The status to answer with.
    pub(super) fn command(&mut self, sqe: &Sqe, data_len: u32) -> Result<Answer, Status> {
        if sqe.opcode == fabrics::OPCODE {
            self.association.mark();
            return self.fabrics(sqe);
        }
        if !self.association.registers(|it| it.is_enabled()) {
            return Err(Status::SEQUENCE_ERROR.do_not_retry());
        }
        self.association.mark();
        let limits = &self.target.limits;
        let is_discovery = self.subsystem.is_discovery();
        match sqe.opcode {
            admin::IDENTIFY if is_discovery => discovery::identify(
                sqe,
                data_len,
                self.subsystem,
                self.association.cntlid(),
                limits,
            )
            .map(Answer::Data),
            admin::GET_LOG_PAGE if is_discovery => {
                let (association, target) = (self.association, self.target);
                discovery::get_log_page(sqe, data_len, association, target, self.view)
                    .map(Answer::Data)
            }
            admin::SET_FEATURES | admin::GET_FEATURES
                if is_discovery && !discovery::has_feature(sqe) =>
            {
                Err(Status::INVALID_FIELD.do_not_retry())
            }
            admin::IDENTIFY => identify::identify(
                sqe,
                data_len,
                self.subsystem,
                self.association.instance(),
                limits,
            )
            .map(Answer::Data),
            admin::GET_LOG_PAGE => {
                let hours = self.since.elapsed().as_secs() / 3600;
                let page = log_page::get(
                    sqe,
                    data_len,
                    self.association,
                    self.subsystem,
                    hours,
                    limits,
                );
                page.map(Answer::Data)
            }
            admin::SET_FEATURES => self
                .features
                .set(sqe, self.association, self.subsystem, limits)
                .map(|dw0| Answer::Result(u64::from(dw0))),
            admin::GET_FEATURES => self
                .features
                .get(sqe, data_len, self.association, self.subsystem)
                .map(|value| match value {
                    Value::Dword(dw0) => Answer::Result(u64::from(dw0)),
                    Value::Data(data) => Answer::Data(data),
                }),
            admin::KEEP_ALIVE => Ok(Answer::Result(0)),
            admin::CROSS_CONTROLLER_RESET if !is_discovery && limits.cross_resets > 0 => {
                cross_reset::reset(sqe, self.association, self.subsystem, limits.cross_resets)
                    .map(|dw0| Answer::Result(u64::from(dw0)))
            }
            admin::ASYNC_EVENT_REQUEST if self.held < usize::from(limits.async_events) => {
                Ok(Answer::Hold)
            }
            admin::ASYNC_EVENT_REQUEST => Err(Status::AER_LIMIT_EXCEEDED.do_not_retry()),
            admin::ABORT => Ok(Answer::Result(NOT_ABORTED)),
            _ => Err(Status::INVALID_OPCODE.do_not_retry()),
        }
    }

    fn fabrics(&mut self, sqe: &Sqe) -> Result<Answer, Status> {
        let property = Property::from_sqe(sqe);
        match sqe.fctype() {
            fabrics::PROPERTY_GET => self
                .association
                .registers(|registers| registers.get(property))
                .map(Answer::Result),
            fabrics::PROPERTY_SET => self
                .association
                .registers(|registers| registers.set(property))
                .map(Answer::Effect),
            fabrics::CONNECT => Err(Status::SEQUENCE_ERROR.do_not_retry()),
            fabrics::DISCONNECT => Err(INVALID_QUEUE_TYPE.do_not_retry()),
            _ => Err(Status::INVALID_OPCODE.do_not_retry()),
        }
    }
}
