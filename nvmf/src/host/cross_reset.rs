//! Asks a controller to end another one of the same host, and learns when no command of that is carried out any more.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use zerocopy::FromBytes;

use super::error::HostError;
use super::inquiry::Inquiry;
use crate::spec::cross_reset::{
    CrossResetEntry, CrossResetHeader, ENTRIES_MAX, IMMEDIATE, REMOVE_COMPLETED, ccrs,
};
use crate::spec::log::{GetLogPage, lid};
use crate::spec::{ControllerInstance, NSID_ALL, Status};
use crate::transport::Transfer;

/// First and longest pause before the controller is asked again how far it has come.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// Bytes of the log page with as many entries as there can be.
const LOG_LEN: usize = size_of::<CrossResetHeader>() + ENTRIES_MAX * size_of::<CrossResetEntry>();

/// What the controller has made of the question up to now.
enum Progress {
    Done,
    GoesOn,
    /// It can be asked later.
    NotYet,
}

impl Inquiry {
    /// Has another controller of this subsystem and host reset, and waits until the reset is done: no command that was
    /// sent to it is carried out afterwards, nor is one that may still be under way to it. Takes no longer than
    /// `within` and the time of one command.
    ///
    /// The log is looked at, and no event waited for: that costs a few short commands in a rare moment, and no event
    /// can be missed.
    ///
    /// # Errors
    /// Nothing is known of the other controller then: this one refuses, does not answer, or fails; or the reset takes
    /// longer.
    pub async fn reset_other(
        &self,
        other: ControllerInstance,
        within: Duration,
    ) -> Result<(), HostError> {
        let begun = Instant::now();
        let mut pause = FIRST_PAUSE;
        let mut progress = self.ask_for_reset(other).await?;
        loop {
            if matches!(progress, Progress::Done) {
                return Ok(());
            }
            if begun.elapsed() >= within {
                return Err(HostError::TimedOut {
                    at: self.address,
                    command: "Cross-Controller Reset",
                    after: within,
                });
            }
            sleep(pause.min(within)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            progress = match self.look_up(other).await? {
                Some(progress) => progress,
                // Whoever else reads the log may have taken it out. Asked again, the controller says the same.
                None => self.ask_for_reset(other).await?,
            };
        }
    }

    async fn ask_for_reset(&self, other: ControllerInstance) -> Result<Progress, HostError> {
        const GOES_ON: u16 = Status::CROSS_RESET_IN_PROGRESS.code();
        const BUSY: [u16; 2] = [
            Status::CROSS_RESET_LIMIT_EXCEEDED.code(),
            Status::CROSS_RESET_LOG_FULL.code(),
        ];
        let asked = self
            .admin
            .execute("Cross-Controller Reset", other.to_sqe(), Transfer::None)
            .await;
        match asked {
            Ok(done) if done.cqe.dw0() & IMMEDIATE != 0 => Ok(Progress::Done),
            Ok(_) => Ok(Progress::GoesOn),
            Err(HostError::Command { status, .. }) if status.code() == GOES_ON => {
                Ok(Progress::GoesOn)
            }
            Err(HostError::Command { status, .. }) if BUSY.contains(&status.code()) => {
                Ok(Progress::NotYet)
            }
            Err(error) => Err(error),
        }
    }

    /// What the log says of a reset; `None` when it is not in it.
    async fn look_up(&self, other: ControllerInstance) -> Result<Option<Progress>, HostError> {
        let part = GetLogPage {
            lid: lid::CROSS_CONTROLLER_RESET,
            offset: 0,
            len: LOG_LEN as u64,
        };
        let mut sqe = part.to_sqe();
        sqe.nsid = NSID_ALL.into();
        sqe.cdw10 = (sqe.cdw10.get() | REMOVE_COMPLETED).into();
        let command = "Get Log Page (Cross-Controller Reset)";
        let page = self.admin.read(command, sqe, LOG_LEN).await?;
        match status_of(&page, other) {
            None => Ok(None),
            Some(ccrs::SUCCESS) => Ok(Some(Progress::Done)),
            Some(ccrs::IN_PROGRESS) => Ok(Some(Progress::GoesOn)),
            Some(status) => Err(HostError::Unusable {
                at: self.address,
                reason: format!(
                    "the Cross-Controller Reset of controller {:#06x} has failed (CCRS {status:#04x})",
                    other.cntlid
                ),
            }),
        }
    }
}

/// How far the reset of this controller has come, as far as the page speaks of it.
fn status_of(page: &[u8], other: ControllerInstance) -> Option<u8> {
    let (header, rest) = CrossResetHeader::ref_from_prefix(page).ok()?;
    let entries = usize::from(header.ne.get()).min(ENTRIES_MAX);
    let mut found = None;
    for bytes in rest.chunks(size_of::<CrossResetEntry>()).take(entries) {
        let (entry, _) = CrossResetEntry::ref_from_prefix(bytes).ok()?;
        if (entry.icid.get(), entry.ciu) == (other.cntlid, other.ciu) {
            // Of several, one that is not done decides.
            match (found, entry.ccrs) {
                (Some(before), ccrs::SUCCESS) => found = Some(before),
                (_, status) => found = Some(status),
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(entries: &[(u16, u8, u8)]) -> Vec<u8> {
        let mut page = (entries.len() as u16).to_le_bytes().to_vec();
        page.resize(8, 0);
        for &(icid, ciu, ccrs) in entries {
            let [low, high] = icid.to_le_bytes();
            page.extend([low, high, ciu, 0, 0xff, 0xff, ccrs, 3]);
        }
        page.resize(LOG_LEN, 0);
        page
    }

    #[test]
    fn a_log_tells_of_the_controller_that_is_meant_and_of_no_other() {
        let other = ControllerInstance {
            cntlid: 7,
            ciu: 2,
            cirn: 5,
        };
        for (entries, expected) in [
            (&[][..], None),
            (&[(7, 1, 1), (8, 2, 1)], None),
            (&[(8, 2, 0), (7, 2, 1)], Some(1)),
            (&[(7, 2, 0)], Some(0)),
            (&[(7, 2, 1), (7, 2, 0)], Some(0)),
            (&[(7, 2, 0), (7, 2, 1)], Some(0)),
            (&[(7, 2, 2), (7, 2, 1)], Some(2)),
        ] {
            assert_eq!(status_of(&page(entries), other), expected, "{entries:?}");
        }
        // More than there is, and less than it says.
        let mut lies = page(&[(7, 2, 1)]);
        lies[..2].copy_from_slice(&u16::MAX.to_le_bytes());
        assert_eq!(status_of(&lies, other), Some(1));
        for len in 0..16 {
            assert_eq!(status_of(&lies[..len], other), None, "{len} bytes");
        }
    }
}
