//! Set Features and Get Features: what is kept for an association.

use std::time::Duration;

use super::Limits;
use super::association::Association;
use super::subsystem::Subsystem;
use crate::spec::event::config;
use crate::spec::feature::{fid, number_of_queues};
use crate::spec::{Sqe, Status};

/// Bits of Asynchronous Event Configuration that mean something, on an I/O controller and on a discovery
/// controller.
const ASYNC_EVENT_BITS: u32 = 0x3fff | config::CROSS_CONTROLLER_RESET;
const DISCOVERY_EVENT_BITS: u32 = ASYNC_EVENT_BITS | config::DISCOVERY_CHANGE;
/// Save, in dword 10 of Set Features.
const SAVE: u32 = 1 << 31;
/// Feature Identifier Not Saveable.
const NOT_SAVEABLE: Status = Status::new(1, 0x0d);

/// Temperature Threshold: the sensor, and whether the threshold is the lower one.
const TEMPERATURE_SELECT: u32 = 0x3f << 16;
/// Temperature Threshold: the composite temperature's upper and lower threshold.
const TEMPERATURE_UPPER: u32 = 0;
const TEMPERATURE_LOWER: u32 = 1 << 20;
/// Temperature Threshold, in kelvins: a composite temperature never gets there.
const NEVER_TOO_WARM: u32 = 0xffff;

/// Feature values of one association. Number of Queues is the association's own.
///
/// Every controller has arbitration, power management, temperature threshold, error recovery and
/// write atomicity. Here nothing follows from them: they are kept, and told again.
#[derive(Debug)]
pub(super) struct Features {
    async_events: u32,
    arbitration: u32,
    /// Upper and lower, in kelvins.
    temperature: [u32; 2],
    /// Time Limited Error Recovery, in units of 100 ms.
    error_recovery: u32,
    write_atomicity: u32,
    /// In milliseconds as the host gave it; 0 = none.
    kato: u32,
}

/// What Get Features answers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// In the completion.
    Dword(u32),
    /// As data.
    Data(Vec<u8>),
}

fn refuse<T>(status: Status) -> Result<T, Status> {
    Err(status.do_not_retry())
}

impl Features {
    pub(super) fn new(kato: u32) -> Self {
        Self {
            async_events: 0,
            arbitration: 0,
            temperature: [NEVER_TOO_WARM, 0],
            error_recovery: 0,
            write_atomicity: 0,
            kato,
        }
    }

    /// The keep-alive time-out, in whole seconds, rounded up; `None` when there is none.
    pub(super) fn keep_alive(&self) -> Option<Duration> {
        (self.kato > 0).then(|| Duration::from_secs(u64::from(self.kato).div_ceil(1000)))
    }

    /// Events that the host wants: bits of [`crate::spec::event::config`].
    pub(super) fn async_events(&self) -> u32 {
        self.async_events
    }

    /// What lasts no longer than a controller is enabled.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.kato);
    }

    /// Set Features; returns dword 0 of the completion.
    ///
    /// # Errors
    /// The status to answer with.
    pub(super) fn set(
        &mut self,
        sqe: &Sqe,
        association: &Association,
        subsystem: &Subsystem,
        limits: &Limits,
    ) -> Result<u32, Status> {
        if sqe.cdw10.get() & SAVE != 0 {
            return refuse(NOT_SAVEABLE);
        }
        let value = sqe.cdw11.get();
        match sqe.cdw10.get() as u8 {
            fid::NUMBER_OF_QUEUES => set_queues(value, association, limits),
            fid::ASYNC_EVENT_CONFIG if value & !event_bits(subsystem) != 0 => {
                refuse(Status::INVALID_FIELD)
            }
            fid::ASYNC_EVENT_CONFIG => {
                self.async_events = value;
                Ok(0)
            }
            fid::KEEP_ALIVE_TIMER => {
                self.kato = value;
                Ok(0)
            }
            fid::ARBITRATION => {
                self.arbitration = value;
                Ok(0)
            }
            // There is one power state.
            fid::POWER_MANAGEMENT if value & 0x1f != 0 => refuse(Status::INVALID_FIELD),
            fid::POWER_MANAGEMENT => Ok(0),
            fid::TEMPERATURE_THRESHOLD => {
                self.temperature[threshold(value)?] = value & 0xffff;
                Ok(0)
            }
            // Errors for deallocated blocks are not supported.
            fid::ERROR_RECOVERY if value >> 16 != 0 => refuse(Status::INVALID_FIELD),
            fid::ERROR_RECOVERY => {
                self.error_recovery = value;
                Ok(0)
            }
            fid::WRITE_ATOMICITY => {
                self.write_atomicity = value & 1;
                Ok(0)
            }
            // There is no way to write around the operating system's cache for good.
            fid::VOLATILE_WRITE_CACHE if value & 1 == write_cache(subsystem) => Ok(0),
            fid::VOLATILE_WRITE_CACHE => refuse(Status::FEATURE_NOT_CHANGEABLE),
            _ => refuse(Status::INVALID_FIELD),
        }
    }

    /// Get Features.
    ///
    /// # Errors
    /// The status to answer with.
    pub(super) fn get(
        &self,
        sqe: &Sqe,
        data_len: u32,
        association: &Association,
        subsystem: &Subsystem,
    ) -> Result<Value, Status> {
        const SELECT_CURRENT: u32 = 0;
        let host_id = association.host().hostid;
        if sqe.cdw10.get() >> 8 & 7 != SELECT_CURRENT {
            return refuse(Status::INVALID_FIELD);
        }
        match sqe.cdw10.get() as u8 {
            fid::NUMBER_OF_QUEUES => match association.granted() {
                Some(granted) => Ok(Value::Dword(number_of_queues(granted))),
                None => refuse(Status::SEQUENCE_ERROR),
            },
            fid::ASYNC_EVENT_CONFIG => Ok(Value::Dword(self.async_events)),
            fid::ARBITRATION => Ok(Value::Dword(self.arbitration)),
            fid::POWER_MANAGEMENT => Ok(Value::Dword(0)),
            fid::TEMPERATURE_THRESHOLD => {
                let which = threshold(sqe.cdw11.get())?;
                Ok(Value::Dword(self.temperature[which]))
            }
            fid::ERROR_RECOVERY => Ok(Value::Dword(self.error_recovery)),
            fid::WRITE_ATOMICITY => Ok(Value::Dword(self.write_atomicity)),
            fid::KEEP_ALIVE_TIMER => Ok(Value::Dword(self.kato)),
            fid::VOLATILE_WRITE_CACHE => Ok(Value::Dword(write_cache(subsystem))),
            fid::HOST_ID if data_len as usize != host_id.len() => {
                refuse(Status::DATA_SGL_LENGTH_INVALID)
            }
            fid::HOST_ID => Ok(Value::Data(host_id.to_vec())),
            _ => refuse(Status::INVALID_FIELD),
        }
    }
}

/// Which of the temperature thresholds dword 11 names.
fn threshold(value: u32) -> Result<usize, Status> {
    match value & TEMPERATURE_SELECT {
        TEMPERATURE_UPPER => Ok(0),
        TEMPERATURE_LOWER => Ok(1),
        _ => refuse(Status::INVALID_FIELD),
    }
}

fn event_bits(subsystem: &Subsystem) -> u32 {
    match subsystem.is_discovery() {
        true => DISCOVERY_EVENT_BITS,
        false => ASYNC_EVENT_BITS,
    }
}

fn write_cache(subsystem: &Subsystem) -> u32 {
    u32::from(subsystem.has_volatile_cache())
}

fn set_queues(value: u32, association: &Association, limits: &Limits) -> Result<u32, Status> {
    let (submission, completion) = (value & 0xffff, value >> 16);
    // Queues come in pairs, and 65535 would be one more than there are QIDs.
    if submission == 0xffff || submission != completion {
        return refuse(Status::INVALID_FIELD);
    }
    let wanted = submission as u16 + 1;
    let granted = wanted.min(limits.io_queues);
    association.grant(granted)?;
    Ok(number_of_queues(granted))
}
