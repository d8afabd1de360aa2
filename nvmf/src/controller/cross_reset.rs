//! Cross-Controller Reset: a host has another of its controllers ended, and learns when no command of that is left.
//!
//! To say so too early is to have the host's data replaced by what it wrote before. So a controller counts as gone
//! when nothing can join it any more and the last of its I/O queues is gone with nothing in flight at a backend;
//! whether its connections were lost before makes no difference. Of a controller that this subsystem knows nothing of,
//! no command can be with a backend either: it was gone when it was forgotten, or it was another process's, and files
//! are locked until the last operation of a process is done.

use zerocopy::IntoBytes;

use std::sync::Arc;

use uuid::Uuid;

use super::association::Association;
use super::subsystem::Subsystem;
use crate::spec::cross_reset::{
    CrossResetEntry, CrossResetHeader, ENTRIES_MAX, IMMEDIATE, NO_ALTERNATE, ccrf, ccrs,
};
use crate::spec::fabrics::CNTLID_MAX;
use crate::spec::{ControllerInstance, Sqe, Status};

/// The uniquifier after this one.
pub(super) fn next_ciu(ciu: u8) -> u8 {
    ciu.checked_add(1).unwrap_or(1)
}

/// A number that nobody can guess, nor meet twice.
pub(super) fn cirn() -> u64 {
    // Both halves have bits that are always the same, at different places.
    let (high, low) = Uuid::new_v4().as_u64_pair();
    high ^ low
}

/// One reset that was asked for.
#[derive(Debug)]
struct Reset {
    impacted: ControllerInstance,
    done: bool,
}

/// Resets that one controller was asked for, until its host has read that they are done.
#[derive(Debug, Default)]
pub(super) struct CrossResets(Vec<Reset>);

impl CrossResets {
    /// Notes that one goes on, of at most `limit`.
    ///
    /// # Errors
    /// The status to answer with.
    fn begin(&mut self, impacted: ControllerInstance, limit: u8) -> Result<(), Status> {
        let going_on = || self.0.iter().filter(|reset| !reset.done);
        if going_on().any(|reset| reset.impacted == impacted) {
            return Err(Status::CROSS_RESET_IN_PROGRESS.do_not_retry());
        }
        if going_on().count() >= usize::from(limit) {
            return Err(Status::CROSS_RESET_LIMIT_EXCEEDED);
        }
        if self.0.len() >= ENTRIES_MAX {
            return Err(Status::CROSS_RESET_LOG_FULL);
        }
        self.0.push(Reset {
            impacted,
            done: false,
        });
        Ok(())
    }

    /// The answer to the command tells it.
    fn withdraw(&mut self, impacted: ControllerInstance) {
        self.0
            .retain(|reset| reset.done || reset.impacted != impacted);
    }

    /// No command of this controller is left.
    pub(super) fn complete(&mut self, impacted: ControllerInstance) {
        for reset in &mut self.0 {
            reset.done |= reset.impacted == impacted;
        }
    }

    /// The controller that was asked begins anew, and with it the log; what goes on goes on.
    pub(super) fn forget(&mut self) {
        self.0.retain(|reset| !reset.done);
    }

    /// The log page. What is over is in it for the last time where the host asks for that.
    pub(super) fn log(&mut self, remove_completed: bool) -> Vec<u8> {
        let header = CrossResetHeader {
            ne: (self.0.len() as u16).into(),
            reserved2: [0; 6],
        };
        let mut page = header.as_bytes().to_vec();
        for Reset { impacted, done } in &self.0 {
            let entry = CrossResetEntry {
                icid: impacted.cntlid.into(),
                ciu: impacted.ciu,
                reserved3: 0,
                acid: NO_ALTERNATE.into(),
                ccrs: if *done {
                    ccrs::SUCCESS
                } else {
                    ccrs::IN_PROGRESS
                },
                ccrf: ccrf::VALIDATED | ccrf::INITIATED,
            };
            page.extend_from_slice(entry.as_bytes());
        }
        if remove_completed {
            self.forget();
        }
        page.resize(size_of::<CrossResetHeader>() + 8 * ENTRIES_MAX, 0);
        page
    }
}

/// Ends another controller of the host that has asked `asked`. Gives dword 0 of the answer.
///
/// # Errors
/// The status to answer with.
pub(super) fn reset(
    sqe: &Sqe,
    asked: &Arc<Association>,
    subsystem: &Subsystem,
    limit: u8,
) -> Result<u32, Status> {
    let instance = ControllerInstance::from_sqe(sqe);
    if instance.cntlid == asked.cntlid() || instance.cntlid > CNTLID_MAX {
        return Err(Status::INVALID_FIELD.do_not_retry());
    }
    let Some(impacted) = subsystem.running(instance) else {
        return Ok(IMMEDIATE);
    };
    if impacted.host() != asked.host() {
        return Err(Status::INVALID_FIELD.do_not_retry());
    }
    asked.cross_resets(|resets| resets.begin(instance, limit))?;
    if impacted.end_for(asked) {
        asked.cross_resets(|resets| resets.withdraw(instance));
        return Ok(IMMEDIATE);
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u8 = 4;

    fn instance(cntlid: u16) -> ControllerInstance {
        ControllerInstance {
            cntlid,
            ciu: 1,
            cirn: 7,
        }
    }

    fn entries(page: &[u8]) -> Vec<(u16, u8)> {
        let count = usize::from(u16::from_le_bytes([page[0], page[1]]));
        let entries = page[8..].chunks(8).take(count);
        entries
            .map(|it| (u16::from_le_bytes([it[0], it[1]]), it[6]))
            .collect()
    }

    #[test]
    fn so_many_go_on_at_a_time_and_no_two_of_one_controller() {
        let mut resets = CrossResets::default();
        for cntlid in 1..=u16::from(LIMIT) {
            resets.begin(instance(cntlid), LIMIT).unwrap();
        }
        let again = resets.begin(instance(1), LIMIT).unwrap_err();
        assert_eq!(again.code(), Status::CROSS_RESET_IN_PROGRESS.code());
        let more = resets.begin(instance(9), LIMIT).unwrap_err();
        assert_eq!(more.code(), Status::CROSS_RESET_LIMIT_EXCEEDED.code());
        resets.complete(instance(2));
        resets.begin(instance(9), LIMIT).unwrap();
        resets.withdraw(instance(9));
        resets.begin(instance(2), LIMIT).unwrap();
    }

    #[test]
    fn what_is_over_stays_in_the_log_until_its_removal_is_asked_for() {
        let mut resets = CrossResets::default();
        resets.begin(instance(1), LIMIT).unwrap();
        resets.begin(instance(2), LIMIT).unwrap();
        resets.complete(instance(1));
        for remove in [false, true] {
            let page = resets.log(remove);
            assert_eq!(page.len(), 4096);
            assert_eq!(entries(&page), [(1, ccrs::SUCCESS), (2, ccrs::IN_PROGRESS)]);
        }
        assert_eq!(entries(&resets.log(true)), [(2, ccrs::IN_PROGRESS)]);
    }

    #[test]
    fn a_log_that_nobody_reads_is_full_some_day() {
        let mut resets = CrossResets::default();
        for cntlid in 1..=ENTRIES_MAX as u16 {
            resets.begin(instance(cntlid), LIMIT).unwrap();
            resets.complete(instance(cntlid));
        }
        let full = resets.begin(instance(1000), LIMIT).unwrap_err();
        assert_eq!(full.code(), Status::CROSS_RESET_LOG_FULL.code());
        assert_eq!(entries(&resets.log(true)).len(), ENTRIES_MAX);
        resets.begin(instance(1000), LIMIT).unwrap();
    }

    #[test]
    fn uniquifiers_are_never_zero_and_always_others() {
        for ciu in 0..=u8::MAX {
            assert!(next_ciu(ciu) != 0 && next_ciu(ciu) != ciu);
        }
        assert_ne!(cirn(), cirn());
    }
}
