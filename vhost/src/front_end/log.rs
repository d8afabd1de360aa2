//! Logging of written pages as a front-end asks for it, before and while it migrates a guest.
//!
//! It shares a log (SET_LOG_BASE), has writes of requests marked with the feature VHOST_F_LOG_ALL, and writes to
//! a used ring with a flag of the ring's addresses. All three may come and go while rings run, and concern nothing
//! but marks: no ring stops for them. When a request of the front-end's is answered, what it asked for is in force:
//! a log that was replaced is not written to any more.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::{
    VhostUserLog, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};

use vhost::vhost_user::Result as VhostResult;

use super::{FrontEnd, refuse};
use crate::dirty::{DirtyLog, RingLog};
use crate::queue::QueueUpdate;
use crate::vring::Signal;

/// The feature bit that has writes of requests marked.
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// What the front-end has shared for it.
#[derive(Debug, Default)]
pub(super) struct Logging {
    log: Option<Arc<DirtyLog>>,
    /// Raised when there are new marks.
    call: Option<Signal>,
    /// Something is marked in it, or was.
    in_use: bool,
    /// The last log that was shared is not one that can be used.
    refused: bool,
}

/// True when features differ in more than whether writes are logged.
pub(super) fn differ(before: Option<u64>, now: u64) -> bool {
    before.map(|features| features & !LOG_ALL) != Some(now & !LOG_ALL)
}

impl FrontEnd {
    /// True when logs come as descriptors, and are answered.
    pub(crate) fn takes_logs(&self) -> bool {
        self.protocol_features & VhostUserProtocolFeatures::LOG_SHMFD.bits() != 0
    }

    fn logs_all(&self) -> bool {
        self.features
            .is_some_and(|features| features & LOG_ALL != 0)
    }

    /// Writes are to be marked, and the front-end believes that they are; but there is no log to do it in. A ring
    /// that ran would change memory behind the front-end's back.
    pub(super) fn must_not_write(&self) -> bool {
        self.logging.refused && self.logs_all()
    }

    /// There is a log, or should be one.
    pub(super) fn is_logging(&self) -> bool {
        self.logging.log.is_some() || self.logging.refused
    }

    /// What ring `at` marks, and where.
    pub(super) fn ring_log(&self, at: usize) -> Option<RingLog> {
        let log = self.logging.log.as_ref()?;
        let vring = self.vrings.get(at)?;
        let data = self.logs_all();
        let own = vring.addresses.map(|addresses| addresses.used);
        let used = vring.log_addr.or(own.filter(|_| data));
        (data || used.is_some()).then(|| RingLog {
            log: Arc::clone(log),
            data,
            used,
            call: self.logging.call.clone(),
            complaints: Arc::clone(&self.complaints),
        })
    }

    /// Has ring `at` mark what is to be marked from now on.
    pub(super) fn update_log(&mut self, at: usize) {
        self.update(at, QueueUpdate::Log(self.ring_log(at)));
        self.drop_unused_log();
    }

    /// As [`Self::update_log`], all rings.
    pub(super) fn update_logs(&mut self) {
        for at in 0..self.vrings.len() {
            self.update(at, QueueUpdate::Log(self.ring_log(at)));
        }
        self.drop_unused_log();
    }

    /// Unmaps the log once nothing is marked in it any more. One that is new waits for its use.
    fn drop_unused_log(&mut self) {
        let wanted = self.logs_all() || self.vrings.iter().any(|vring| vring.log_addr.is_some());
        if std::mem::replace(&mut self.logging.in_use, wanted) && !wanted {
            self.logging.log = None;
        }
    }

    /// Goes on with another log. The one before is unmapped here, once no ring has it.
    pub(super) fn share_log(&mut self, log: &VhostUserLog, file: &File) -> VhostResult<()> {
        let VhostUserLog {
            mmap_size,
            mmap_offset,
        } = *log;
        let log = DirtyLog::map(file, mmap_size, mmap_offset);
        let log = log.map_err(|error| refuse(format!("the log of written pages: {error}")))?;
        self.logging.refused = false;
        let before = self.logging.log.replace(Arc::new(log));
        self.update_logs();
        drop(before);
        self.start_all_ready();
        Ok(())
    }

    /// The front-end has shared a log that cannot be used, and may not look at the answer: QEMU does not. Rings that
    /// have to be logged are stopped until there is another, or logging ends: what they have in flight is
    /// still marked in the log before.
    pub(crate) fn log_was_refused(&mut self) {
        self.logging.refused = true;
        if self.must_not_write() {
            self.hold_rings();
        }
        self.logging.log = None;
    }

    /// Stops rings that must not run unlogged.
    pub(super) fn hold_rings(&mut self) {
        self.stop_all();
        if self.complaints.allow() {
            tracing::error!(
                "the front-end's log of written pages cannot be used: rings stand still until it shares another or \
                 ends its migration"
            );
        }
    }

    /// What to raise when there are new marks.
    pub(crate) fn set_log_call(&mut self, call: Signal) {
        self.logging.call = Some(call);
        self.update_logs();
    }
}
