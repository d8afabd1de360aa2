//! What the status of a command means to the guest, and to whoever reads the log.

use nvmf::spec::{Status, status::sct};
use vhost_user_blk::BlkStatus;

use super::translate::Refused;

/// How a guest's request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Every command succeeded.
    Done,
    /// A command failed; of several, the first that was known to.
    Failed(Status),
    /// No command was made.
    Refused(Refused),
}

/// Who or what a status speaks of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    /// Nobody: it succeeded.
    Success,
    /// The controller does not know the command.
    Unsupported,
    /// The way to the controller, or the end of the association.
    Path,
    /// The controller cannot do it just now.
    NotNow,
    /// The medium lost data, or cannot keep it.
    Medium,
    /// The namespace takes no writes, or has no room for them.
    Denied,
    /// The command was wrong: we are.
    Malformed,
    /// Anything else that the controller says.
    Controller,
}

/// Number of classes.
const CLASSES: usize = 8;

impl Class {
    /// The one table. Codes without a line of their own fall to what their type says.
    pub(crate) fn of(status: Status) -> Self {
        /// Codes above this in the generic type belong to a command set.
        const NVM_RESERVATION_CONFLICT: Status = Status::new(sct::GENERIC, 0x83);
        const FORMAT_IN_PROGRESS: Status = Status::new(sct::GENERIC, 0x84);
        const SANITIZE_IN_PROGRESS: Status = Status::new(sct::GENERIC, 0x1d);
        const COMMAND_INTERRUPTED: Status = Status::new(sct::GENERIC, 0x21);
        const ADMIN_MEDIA_NOT_READY: Status = Status::new(sct::GENERIC, 0x24);
        const ABORTED_POWER_LOSS: Status = Status::new(sct::GENERIC, 0x05);
        const ABORTED_PREEMPT: Status = Status::new(sct::GENERIC, 0x1b);

        let is = |known: &[Status]| known.iter().any(|known| known.code() == status.code());
        match status.sct() {
            sct::GENERIC => match () {
                () if status.is_success() => Self::Success,
                () if is(&[Status::INVALID_OPCODE]) => Self::Unsupported,
                () if is(&[
                    Status::ABORT_REQUESTED,
                    Status::ABORTED_SQ_DELETION,
                    ABORTED_POWER_LOSS,
                    ABORTED_PREEMPT,
                    Status::TRANSIENT_TRANSPORT,
                    Status::DATA_TRANSFER_ERROR,
                ]) =>
                {
                    Self::Path
                }
                () if is(&[
                    Status::NAMESPACE_NOT_READY,
                    FORMAT_IN_PROGRESS,
                    SANITIZE_IN_PROGRESS,
                    COMMAND_INTERRUPTED,
                    ADMIN_MEDIA_NOT_READY,
                ]) =>
                {
                    Self::NotNow
                }
                () if is(&[
                    Status::WRITE_PROTECTED,
                    Status::CAPACITY_EXCEEDED,
                    NVM_RESERVATION_CONFLICT,
                ]) =>
                {
                    Self::Denied
                }
                () if is(&[
                    Status::INVALID_FIELD,
                    Status::CID_CONFLICT,
                    Status::SEQUENCE_ERROR,
                    Status::INVALID_NAMESPACE,
                    Status::LBA_OUT_OF_RANGE,
                ]) =>
                {
                    Self::Malformed
                }
                // Everything about SGLs and PRPs.
                () if matches!(status.sc(), 0x0d..=0x13 | 0x16..=0x19) => Self::Malformed,
                () => Self::Controller,
            },
            sct::COMMAND if is(&[Status::WRITE_TO_READ_ONLY_RANGE]) => Self::Denied,
            sct::COMMAND => Self::Malformed,
            sct::MEDIA => Self::Medium,
            sct::PATH => Self::Path,
            _ => Self::Controller,
        }
    }

    /// What the guest is told. It has three words for all of this.
    pub(crate) fn blk_status(self) -> BlkStatus {
        match self {
            Self::Success => BlkStatus::Ok,
            Self::Unsupported => BlkStatus::Unsupported,
            Self::Path
            | Self::NotNow
            | Self::Medium
            | Self::Denied
            | Self::Malformed
            | Self::Controller => BlkStatus::IoError,
        }
    }

    fn index(self) -> usize {
        self as usize
    }
}

impl Outcome {
    /// What the guest is told.
    pub(crate) fn blk_status(self) -> BlkStatus {
        match self {
            Self::Done => BlkStatus::Ok,
            Self::Failed(status) => Class::of(status).blk_status(),
            Self::Refused(_) => BlkStatus::IoError,
        }
    }
}

/// The failed requests of a disk in the log: the first of each kind, then the second, fourth, eighth
/// and so on, so that a disk that fails for days leaves a few dozen lines.
#[derive(Debug, Default)]
pub(crate) struct FailureLog {
    failed: [u64; CLASSES],
    refused: u64,
}

impl FailureLog {
    /// Counts an outcome, and logs it when its turn has come; true then. `name` is the disk's.
    pub(crate) fn note(&mut self, name: &str, outcome: Outcome) -> bool {
        let (class, status) = match outcome {
            Outcome::Done => return false,
            Outcome::Refused(reason) => {
                self.refused += 1;
                let count = self.refused;
                if count.is_power_of_two() {
                    tracing::warn!(disk = name, count, "the guest sent a bad request: {reason}");
                }
                return count.is_power_of_two();
            }
            Outcome::Failed(status) => (Class::of(status), status),
        };
        let Some(count) = self.failed.get_mut(class.index()) else {
            return false;
        };
        *count += 1;
        let count = *count;
        if !count.is_power_of_two() {
            return false;
        }
        match class {
            Class::Malformed => {
                tracing::error!(
                    disk = name,
                    count,
                    "a command was refused as wrong: {status}"
                );
            }
            // The loss itself is logged where it is found.
            Class::Path => tracing::debug!(disk = name, count, "a request was lost: {status}"),
            Class::Success
            | Class::Unsupported
            | Class::NotNow
            | Class::Medium
            | Class::Denied
            | Class::Controller => {
                tracing::warn!(disk = name, count, "a request failed: {status}");
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_that_there_can_be_has_an_answer_and_only_success_is_ok() {
        for code in 0..0x800u16 {
            let status = Status::new((code >> 8) as u8, code as u8);
            let answer = Class::of(status).blk_status();
            assert_eq!(answer == BlkStatus::Ok, code == 0, "{status}");
        }
    }

    #[test]
    fn the_retry_bits_change_nothing() {
        for code in 0..0x800u16 {
            let status = Status::new((code >> 8) as u8, code as u8);
            assert_eq!(Class::of(status), Class::of(status.do_not_retry()));
        }
    }

    #[test]
    fn each_class_is_reached_by_the_codes_that_it_is_for() {
        for (status, class) in [
            (Status::INVALID_OPCODE, Class::Unsupported),
            (Status::INVALID_FIELD, Class::Malformed),
            (Status::LBA_OUT_OF_RANGE, Class::Malformed),
            (Status::DATA_SGL_LENGTH_INVALID, Class::Malformed),
            (Status::ABORTED_BY_HOST, Class::Path),
            (Status::TRANSIENT_TRANSPORT, Class::Path),
            (Status::NAMESPACE_NOT_READY, Class::NotNow),
            (Status::UNRECOVERED_READ_ERROR, Class::Medium),
            (Status::WRITE_FAULT, Class::Medium),
            (Status::WRITE_PROTECTED, Class::Denied),
            (Status::WRITE_TO_READ_ONLY_RANGE, Class::Denied),
            (Status::INTERNAL_ERROR, Class::Controller),
            (Status::new(sct::VENDOR, 0xc0), Class::Controller),
        ] {
            assert_eq!(Class::of(status), class, "{status}");
        }
        assert_eq!(
            Outcome::Failed(Status::INVALID_OPCODE).blk_status(),
            BlkStatus::Unsupported
        );
        assert_eq!(
            Outcome::Refused(Refused::PastEnd).blk_status(),
            BlkStatus::IoError
        );
    }

    #[test]
    fn a_thousand_failures_leave_ten_lines_and_hide_no_other_kind() {
        let mut log = FailureLog::default();
        let mut lines = 0;
        for _ in 0..1000 {
            lines += u32::from(log.note("disk", Outcome::Failed(Status::WRITE_FAULT)));
        }
        assert_eq!(lines, 10);
        assert!(log.note("disk", Outcome::Failed(Status::INTERNAL_ERROR)));
        assert!(log.note("disk", Outcome::Refused(Refused::Misaligned)));
        assert!(!log.note("disk", Outcome::Done));
    }
}
