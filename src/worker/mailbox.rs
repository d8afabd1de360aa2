//! What the control plane says to a device lane, and waits for.

use tokio::sync::{mpsc, oneshot};
use vhost_user_blk::{Queue, QueueUpdate};

/// A message to a lane. Each is answered when it has taken effect.
#[derive(Debug)]
pub(crate) enum LaneMessage {
    /// A ring to run from now on.
    Start {
        /// Its number in the device.
        index: usize,
        /// The ring.
        queue: Box<Queue>,
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
    /// The association is lost: end the queue pairs, answer what was outstanding.
    PathLost,
    /// Drop everything and end.
    End {
        /// Answered when the lane holds nothing any more.
        done: oneshot::Sender<()>,
    },
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

    /// Sends a message, waiting only for room.
    pub(crate) async fn send(&self, message: LaneMessage) {
        // A lane that has ended has nothing left to do with it.
        let _ = self.0.send(message).await;
    }
}
