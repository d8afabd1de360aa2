//! What the control plane says to a device lane, and waits for.

use std::sync::Arc;

use nvmf::host::QueueTraffic;
use nvmf::transport::HostQueuePair;
use tokio::sync::{mpsc, oneshot};
use vhost_user_blk::{Queue, QueueUpdate};

use crate::bridge::fence::Fences;
use crate::bridge::inflight::Unknown;
use crate::bridge::path_choice::{Access, PathSet};
use crate::bridge::translate::Limits;

/// A message to a lane. Each is answered when it has taken effect, or takes effect at once.
pub(crate) enum LaneMessage {
    /// A ring to run from now on.
    Start {
        /// Its number in the device.
        index: usize,
        /// The ring.
        queue: Box<Queue>,
        /// Somebody may have sent already what it has in flight from an earlier life.
        already: bool,
        /// Answered when it was scanned for the first time.
        done: oneshot::Sender<()>,
    },
    /// A change of a ring that runs.
    Update {
        /// Its number in the device.
        index: usize,
        /// The change.
        update: QueueUpdate,
        /// Answered when it is in force.
        done: oneshot::Sender<()>,
    },
    /// A ring to give back when everything that was taken from it is finished.
    Stop {
        /// Its number in the device.
        index: usize,
        /// Gets the ring; `None` when the lane does not have it.
        done: oneshot::Sender<Option<Box<Queue>>>,
    },
    /// A ring to give back as soon as nothing works on its requests: those that are not answered until then stay
    /// in flight.
    Suspend {
        /// Its number in the device.
        index: usize,
        /// Gets the ring; `None` when the lane does not have it.
        done: oneshot::Sender<Option<Box<Queue>>>,
    },
    /// A ring that was to be given back, and has not been, runs on.
    Stay {
        /// Its number in the device.
        index: usize,
    },
    /// A ring that was to be given back is late: leave what is not answered in flight.
    Leave {
        /// Its number in the device.
        index: usize,
    },
    /// A ring that was to be given back is late. What it waits for without a queue pair, or behind a fence, fails;
    /// of a ring that leaves its requests in flight, the queue pairs end that still have some.
    Hurry {
        /// Its number in the device.
        index: usize,
    },
    /// The association of a path is lost: end its queue pair, and park what is not answered.
    Lose {
        /// Its number in the disk.
        path: usize,
        /// Gets what was outstanding on queue pairs of the path that are gone, once nothing is on any.
        done: oneshot::Sender<Unknown>,
    },
    /// Go on with a new queue pair.
    Resume(Box<Resume>),
    /// What was lost with these paths may begin anew: every lane knows its fences.
    Release(PathSet),
    /// Until there is a queue pair, whatever is held fails, and what comes, too.
    Fail,
    /// The namespace has grown.
    Grow {
        /// Its blocks now.
        block_count: u64,
        /// Answered when requests for them are taken.
        done: oneshot::Sender<()>,
    },
    /// Other fences from now on.
    Fences {
        /// All of the disk's.
        fences: Arc<Fences>,
        /// Answered when no command is outstanding that they forbid; dropped when others come first.
        done: Option<oneshot::Sender<()>>,
    },
    /// What a path is good for from now on.
    Access {
        /// Its number in the disk.
        path: usize,
        /// See there.
        access: Access,
    },
    /// Drop everything and end.
    End {
        /// Answered when the lane holds nothing any more.
        done: oneshot::Sender<()>,
    },
}

/// What a lane goes on with, at first and after a loss.
pub(crate) struct Resume {
    /// The number of the path in the disk.
    pub(crate) path: usize,
    /// The association that it belongs to, counted from 1 over all paths of the disk.
    pub(crate) association: u64,
    /// Connected.
    pub(crate) pair: Box<dyn HostQueuePair>,
    /// What its controller takes.
    pub(crate) limits: Limits,
    /// The pauses before another attempt that its controller may ask for, in milliseconds.
    pub(crate) retry_delays: [u64; 3],
    /// What the path is good for.
    pub(crate) access: Access,
    /// The controller tells, and tells when it changes.
    pub(crate) reports_access: bool,
    /// Where its commands count as signs of life, if they do.
    pub(crate) traffic: Option<QueueTraffic>,
    /// All of the disk's.
    pub(crate) fences: Arc<Fences>,
}

/// What a lane tells when its queue pair has ended.
#[derive(Debug)]
pub(crate) struct PairLost {
    /// The association that it belonged to.
    pub(crate) association: u64,
    /// How it ended.
    pub(crate) cause: String,
}

/// The control plane's end of a lane's mailbox.
#[derive(Debug, Clone)]
pub(crate) struct Mailbox(mpsc::Sender<LaneMessage>);

impl Mailbox {
    /// A mailbox for `capacity` messages, and the lane's end of it.
    pub(crate) fn new(capacity: usize) -> (Self, mpsc::Receiver<LaneMessage>) {
        let (sender, receiver) = mpsc::channel(capacity);
        (Self(sender), receiver)
    }

    /// Sends a message and waits for its answer; `None` when the lane has ended. Blocks, so it is
    /// for threads of sessions only.
    pub(crate) fn ask<T>(
        &self,
        message: impl FnOnce(oneshot::Sender<T>) -> LaneMessage,
    ) -> Option<T> {
        let (done, answer) = oneshot::channel();
        self.0.blocking_send(message(done)).ok()?;
        answer.blocking_recv().ok()
    }

    /// Sends a message, and gives what its answer comes from; `None` when the lane has ended. Blocks for room.
    pub(crate) fn request<T>(
        &self,
        message: impl FnOnce(oneshot::Sender<T>) -> LaneMessage,
    ) -> Option<oneshot::Receiver<T>> {
        let (done, answer) = oneshot::channel();
        self.0.blocking_send(message(done)).ok()?;
        Some(answer)
    }

    /// As [`Self::send`], for threads that may block.
    pub(crate) fn tell(&self, message: LaneMessage) {
        // A lane that has ended has nothing left to do with it.
        let _ = self.0.blocking_send(message);
    }

    /// Sends a message, waiting only for room.
    pub(crate) async fn send(&self, message: LaneMessage) {
        // A lane that has ended has nothing left to do with it.
        let _ = self.0.send(message).await;
    }
}
