//! An association: what the admin queue's task shares with Connects of I/O queues and with lanes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::{Notify, oneshot};

use super::cross_reset::{CrossResets, cirn, next_ciu};
use super::fabrics::{self, Refusal};
use super::notices::Notices;
use super::registers::Registers;
use crate::spec::fabrics::connect_offset;
use crate::spec::nqn::NQN_FIELD_LEN;
use crate::spec::{ControllerInstance, Status};

/// Who made an association.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct HostIdentity {
    pub(super) hostid: [u8; 16],
    /// The whole field of the Connect data.
    pub(super) hostnqn: [u8; NQN_FIELD_LEN],
}

struct State {
    registers: Registers,
    /// I/O queues granted by Number of Queues, once that was set.
    granted: Option<u16>,
    /// Connected I/O queues by QID; the sender tells the lane to end.
    queues: BTreeMap<u16, Option<oneshot::Sender<()>>>,
    /// I/O queues that have given their QID up, and are not gone.
    leaving: usize,
    notices: Notices,
    /// What it runs as since it was enabled.
    instance: ControllerInstance,
    /// Other controllers that it was asked to have reset.
    resets: CrossResets,
    /// Those that are told when no command of this one is left.
    awaited_by: Vec<Weak<Association>>,
    over: bool,
    /// It is over since another one was asked to reset it.
    reset: bool,
}

impl State {
    /// No command of it is with a backend, and none will be.
    fn is_quiet(&self) -> bool {
        self.over && self.queues.is_empty() && self.leaving == 0
    }
}

/// See the module.
pub(super) struct Association {
    cntlid: u16,
    host: HostIdentity,
    /// Some command arrived on some queue since this was last taken.
    traffic: AtomicBool,
    state: Mutex<State>,
    /// An I/O queue is gone, or there is something to report.
    changed: Notify,
}

/// An I/O queue's membership in its association: it lasts until this is dropped.
pub(super) struct Membership {
    association: Arc<Association>,
    qid: u16,
    ending: Option<oneshot::Receiver<()>>,
    left: bool,
}

impl Association {
    /// `last_ciu` is the uniquifier that the CNTLID has had last; 0 is none.
    pub(super) fn new(cntlid: u16, last_ciu: u8, host: HostIdentity, queue_size: u32) -> Self {
        Self {
            cntlid,
            host,
            traffic: AtomicBool::new(true),
            state: Mutex::new(State {
                registers: Registers::new(queue_size),
                granted: None,
                queues: BTreeMap::new(),
                leaving: 0,
                notices: Notices::default(),
                instance: ControllerInstance {
                    cntlid,
                    ciu: next_ciu(last_ciu),
                    cirn: cirn(),
                },
                resets: CrossResets::default(),
                awaited_by: Vec::new(),
                over: false,
                reset: false,
            }),
            changed: Notify::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is complete in itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn cntlid(&self) -> u16 {
        self.cntlid
    }

    pub(super) fn host(&self) -> &HostIdentity {
        &self.host
    }

    /// Runs `change` with the registers.
    pub(super) fn registers<R>(&self, change: impl FnOnce(&mut Registers) -> R) -> R {
        change(&mut self.state().registers)
    }

    /// Runs `change` with what is to be reported to the host.
    pub(super) fn notices<R>(&self, change: impl FnOnce(&mut Notices) -> R) -> R {
        change(&mut self.state().notices)
    }

    /// As [`Self::notices`], and has the admin queue's task look at them.
    pub(super) fn report(&self, change: impl FnOnce(&mut Notices)) {
        self.notices(change);
        self.changed.notify_one();
    }

    /// Notes that the host is alive. Lanes call it once in a turn.
    pub(super) fn mark(&self) {
        self.traffic.store(true, Relaxed);
    }

    /// True when the host was alive since the last call.
    pub(super) fn take_mark(&self) -> bool {
        self.traffic.swap(false, Relaxed)
    }

    /// The number of I/O queues granted.
    pub(super) fn granted(&self) -> Option<u16> {
        self.state().granted
    }

    /// Grants I/O queues, once between two resets.
    ///
    /// # Errors
    /// The status to answer with.
    pub(super) fn grant(&self, queues: u16) -> Result<(), Status> {
        let mut state = self.state();
        if state.granted.is_some() {
            return Err(Status::SEQUENCE_ERROR.do_not_retry());
        }
        state.granted = Some(queues);
        Ok(())
    }

    /// Admits an I/O queue.
    ///
    /// # Errors
    /// What to answer the Connect with.
    pub(super) fn join(
        self: &Arc<Self>,
        qid: u16,
        host: &HostIdentity,
    ) -> Result<Membership, Refusal> {
        let mut state = self.state();
        if host.hostid != self.host.hostid {
            return Err(fabrics::invalid(connect_offset::DATA_HOSTID, true));
        }
        if host.hostnqn != self.host.hostnqn {
            return Err(fabrics::invalid(connect_offset::DATA_HOSTNQN, true));
        }
        if state.over || !state.registers.is_enabled() {
            return Err(fabrics::invalid(connect_offset::DATA_CNTLID, true));
        }
        let Some(granted) = state.granted else {
            return Err(Status::SEQUENCE_ERROR.do_not_retry().into());
        };
        if qid > granted {
            return Err(fabrics::invalid(connect_offset::QID, false));
        }
        if state.queues.contains_key(&qid) {
            return Err(Status::SEQUENCE_ERROR.do_not_retry().into());
        }
        let (end, ending) = oneshot::channel();
        state.queues.insert(qid, Some(end));
        Ok(Membership {
            association: Arc::clone(self),
            qid,
            ending: Some(ending),
            left: false,
        })
    }

    /// Tells every I/O queue to end and forgets the grant: a reset, a shutdown, or the end.
    pub(super) fn close_queues(&self) {
        let mut state = self.state();
        state.granted = None;
        for end in state.queues.values_mut().filter_map(Option::take) {
            // A lane that has ended on its own needs no telling.
            let _ = end.send(());
        }
    }

    /// I/O queues that are not gone.
    pub(super) fn queues(&self) -> usize {
        let state = self.state();
        state.queues.len() + state.leaving
    }

    /// Waits until some I/O queue is gone since the last time, or there is something to report.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Marks the association as over: nothing joins it any more.
    pub(super) fn set_over(&self) {
        let mut state = self.state();
        state.over = true;
        self.tell_if_quiet(state);
    }

    /// What it runs as.
    pub(super) fn instance(&self) -> ControllerInstance {
        self.state().instance
    }

    /// It was enabled, maybe not for the first time: it runs as another one from now on. What the one before had
    /// begun is done, or it could not have been enabled.
    pub(super) fn renew_instance(&self) {
        let mut state = self.state();
        state.instance.ciu = next_ciu(state.instance.ciu);
        state.instance.cirn = cirn();
    }

    /// Runs `change` with the resets of others that it was asked for.
    pub(super) fn cross_resets<R>(&self, change: impl FnOnce(&mut CrossResets) -> R) -> R {
        change(&mut self.state().resets)
    }

    /// Ends it, since another controller was asked for that. True when no command of it is left; otherwise `asked`
    /// is told when that is so.
    pub(super) fn end_for(&self, asked: &Arc<Self>) -> bool {
        let mut state = self.state();
        (state.over, state.reset) = (true, true);
        for end in state.queues.values_mut().filter_map(Option::take) {
            let _ = end.send(());
        }
        let quiet = state.is_quiet();
        if !quiet {
            // As many as there are associations, however often it is asked for.
            state.awaited_by.retain(|asked| asked.strong_count() > 0);
            state.awaited_by.push(Arc::downgrade(asked));
        }
        drop(state);
        self.changed.notify_one();
        quiet
    }

    /// Another controller was asked to end it.
    pub(super) fn is_reset(&self) -> bool {
        self.state().reset
    }

    /// Tells those that wait for it, once no command is left.
    fn tell_if_quiet(&self, mut state: MutexGuard<'_, State>) {
        if !state.is_quiet() {
            return;
        }
        let instance = state.instance;
        let awaited_by = std::mem::take(&mut state.awaited_by);
        // One lock at a time: two associations may wait for each other.
        drop(state);
        for asked in awaited_by.iter().filter_map(Weak::upgrade) {
            asked.cross_resets(|resets| resets.complete(instance));
            asked.report(Notices::cross_reset);
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.state().over
    }
}

impl Membership {
    /// The association.
    pub(super) fn association(&self) -> &Association {
        &self.association
    }

    /// The queue.
    pub(super) fn qid(&self) -> u16 {
        self.qid
    }

    /// The message that the queue must end; taken once.
    pub(super) fn take_ending(&mut self) -> Option<oneshot::Receiver<()>> {
        self.ending.take()
    }

    /// Gives the QID up, while the queue goes on to its end.
    pub(super) fn leave(&mut self) {
        if !std::mem::replace(&mut self.left, true) {
            let mut state = self.association.state();
            state.queues.remove(&self.qid);
            state.leaving += 1;
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut state = self.association.state();
        if self.left {
            state.leaving -= 1;
        } else {
            state.queues.remove(&self.qid);
        }
        self.association.tell_if_quiet(state);
        self.association.changed.notify_one();
    }
}
