//! The rings of a disk as its front-end's session sees them: handed to lanes, changed there, and taken back, in time.

mod settling;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};
use vhost_user_blk::{Queue, QueueUpdate, Rings, Tail};

use crate::config::{Drain, DrainPolicy};
use crate::limits::HANDOVER_DRAIN;
use crate::reconnect::earlier::SessionNews;
use crate::worker::mailbox::LaneMessage;
use crate::worker::placement::{Placement, Waited};

/// How long a ring that is suspended may wait for commands that are under way. A controller that is well has answered
/// them long before; without an answer, what they may still write is fenced.
const GRACE: Duration = Duration::from_millis(200);

/// A message about a ring, after a pause.
type Step = (Duration, fn(usize) -> LaneMessage);

/// See the module.
pub(crate) struct LaneRings {
    /// The disk, for the log.
    name: String,
    placement: Arc<Placement>,
    session: mpsc::Sender<SessionNews>,
    drain: Drain,
    /// Where time passes.
    control: Handle,
    running: AtomicUsize,
    /// The front-end keeps the region of requests in flight.
    kept: AtomicBool,
}

impl LaneRings {
    /// None runs yet. Called in the control plane's runtime.
    pub(crate) fn new(
        name: String,
        placement: Arc<Placement>,
        session: mpsc::Sender<SessionNews>,
        drain: Drain,
    ) -> Self {
        Self {
            name,
            placement,
            session,
            drain,
            control: Handle::current(),
            running: AtomicUsize::new(0),
            kept: AtomicBool::new(false),
        }
    }

    /// Tells the control plane, and waits for its answer; `None` when it has ended.
    fn tell<T>(&self, news: impl FnOnce(oneshot::Sender<T>) -> SessionNews) -> Option<T> {
        let (done, answer) = oneshot::channel();
        self.session.blocking_send(news(done)).ok()?;
        answer.blocking_recv().ok()
    }

    /// Sends messages to the lane that has a ring, each after a pause. A ring may be moved meanwhile, so all are told;
    /// the others do not know it.
    fn later(&self, index: usize, steps: Vec<Step>) -> JoinHandle<()> {
        let placement = Arc::clone(&self.placement);
        self.control.spawn(async move {
            for (pause, message) in steps {
                sleep(pause).await;
                for lane in placement.lanes() {
                    lane.send(message(index)).await;
                }
            }
        })
    }

    /// Notes that a ring is back.
    fn stopped(&self) {
        let before = self.running.fetch_sub(1, Ordering::AcqRel);
        self.tell(|done| SessionNews::Stopped {
            running: before > 1,
            done,
        });
    }
}

fn hurry(index: usize) -> LaneMessage {
    LaneMessage::Hurry { index }
}

fn leave(index: usize) -> LaneMessage {
    LaneMessage::Leave { index }
}

impl Rings for LaneRings {
    fn start(&self, index: usize, queue: Queue) {
        self.running.fetch_add(1, Ordering::AcqRel);
        self.tell(|done| SessionNews::Start {
            ring: index,
            anew: queue.recovering() == 0,
            done,
        });
        self.placement.start(index, queue);
    }

    fn update(&self, index: usize, update: QueueUpdate) {
        self.placement.update(index, update);
    }

    fn stop(&self, index: usize) -> Option<Queue> {
        // The front-end waits for this, and so does the next one.
        let leaves = self.drain.policy == DrainPolicy::Leave && self.kept.load(Ordering::Relaxed);
        let mut steps: Vec<Step> = vec![(self.drain.timeout, if leaves { leave } else { hurry })];
        if leaves && self.drain.may_end_paths {
            steps.push((GRACE, hurry));
        }
        let later = self.later(index, steps);
        let queue = self.placement.stop(index);
        later.abort();
        self.stopped();
        queue
    }

    fn suspend(&self, index: usize) -> Option<Queue> {
        // Storage of this machine is waited for: there would be no way back to it.
        let steps: Vec<Step> = match self.drain.may_end_paths {
            true => vec![(GRACE, hurry)],
            false => Vec::new(),
        };
        let later = self.later(index, steps);
        let queue = self.placement.suspend(index);
        later.abort();
        self.stopped();
        queue
    }

    fn pause(&self, rings: &[usize]) -> Result<Vec<Queue>, String> {
        let deadline = Instant::now() + HANDOVER_DRAIN;
        let wait = |mut answer: oneshot::Receiver<_>| {
            let waited = async { timeout_at(deadline, &mut answer).await };
            match self.control.block_on(waited) {
                Ok(Ok(Some(queue))) => Waited::Back(queue),
                Ok(_) => Waited::Gone,
                Err(_) => Waited::Late(answer),
            }
        };
        let queues = self
            .placement
            .stop_all(rings, wait)
            .ok_or_else(|| format!("requests in flight had no answer within {HANDOVER_DRAIN:?}"))?;
        for _ in &queues {
            self.stopped();
        }
        // The front-end's region tells a successor what is fenced; without one nobody does.
        // So it does when there is nobody left to ask.
        let fenced = self.tell(|done| SessionNews::Fenced { done });
        if fenced.is_none_or(|left| left.is_some()) && !self.kept.load(Ordering::Relaxed) {
            for queue in queues {
                self.start(queue.index(), queue);
            }
            return Err(
                "writes that were sent to a lost controller may still be carried out".to_owned(),
            );
        }
        Ok(queues)
    }

    fn settle(&self) {
        let fenced = || self.tell(|done| SessionNews::Fenced { done });
        settling::settle(&self.name, self.drain.timeout, fenced);
    }

    fn region(&self, tail: Option<Tail>) {
        let kept = tail.as_ref().is_some_and(Tail::kept);
        self.kept.store(kept, Ordering::Relaxed);
        match tail {
            // Without a control plane nothing is known.
            Some(tail) => {
                let already = self.tell(|done| SessionNews::Region { tail, done });
                self.placement.begin(already.unwrap_or(true));
            }
            None => drop(self.tell(|done| SessionNews::Over { done })),
        }
    }
}
