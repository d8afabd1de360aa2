//! Both ends of a queue pair in one value: the host's end, and the lane that serves it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::spec::Sqe;
use crate::transport::{
    CommandId, Completion, Counters, Ending, HostQueuePair, Interest, Lane, QueuePair, Ready,
    Rejected, Transfer, Turn,
};

/// A host's queue pair whose controller runs within its calls: a flush hands commands over and has
/// the controller work on them, and what completes at once can be taken right after.
///
/// It waits on what the controller waits on: the engine of its backends.
pub struct Coupled {
    /// Before the host's end: it may have borrowed the host's memory, and lets go of it when it is
    /// dropped. `None` when it has ended.
    controller: Option<Box<dyn Lane>>,
    host: Box<dyn HostQueuePair>,
    /// What the host's end had counted when they were joined: the Connect.
    before: Counters,
    /// What the controller waits on, a duplicate, and since which generation of its descriptors.
    engine: Option<OwnedFd>,
    generation: u64,
    /// Commands were submitted since the last flush.
    queued: bool,
    /// The controller has to run although nothing becomes ready.
    due: bool,
}

/// The transport of a queue pair cannot be driven from both ends by one owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this transport's two ends cannot be driven as one")]
pub struct NotCoupled;

impl Coupled {
    /// Of a host's end and the lane of the controller's end of the same connection.
    ///
    /// # Errors
    /// [`NotCoupled`].
    pub fn new(
        mut host: Box<dyn HostQueuePair>,
        controller: Box<dyn Lane>,
    ) -> Result<Self, NotCoupled> {
        if !host.couple() {
            return Err(NotCoupled);
        }
        Ok(Self {
            generation: controller.generation(),
            controller: Some(controller),
            before: host.counters(),
            host,
            engine: None,
            queued: false,
            due: true,
        })
    }

    /// A turn of the controller, and the host's end takes what came of it.
    fn run(&mut self, ready: &mut Ready) {
        let Some(controller) = &mut self.controller else {
            return;
        };
        let here = Ready {
            readable: true,
            writable: true,
        };
        let mut all = [here, *ready];
        let turn = controller.turn(&mut all);
        self.due = turn == Turn::Again;
        ready.readable = false;
        if turn == Turn::Ended {
            self.controller = None;
            self.due = false;
        }
        self.host.progress(&mut Ready::default());
        self.watch_engine();
    }

    /// Follows a change of what the controller waits on.
    fn watch_engine(&mut self) {
        let Some(controller) = &self.controller else {
            return;
        };
        if self.generation == controller.generation() {
            return;
        }
        let mut descriptors = Vec::new();
        controller.descriptors(&mut descriptors);
        // The first is the controller's end, which nothing wakes.
        let engine = descriptors.get(1).map(BorrowedFd::try_clone_to_owned);
        match engine.transpose() {
            Ok(engine) => {
                self.engine = engine;
                self.generation = controller.generation();
            }
            // Without a descriptor to wait on, the controller is asked again and again while it
            // has something to do.
            Err(_) => self.due |= self.host.outstanding() > 0,
        }
    }
}

impl QueuePair for Coupled {
    fn interest(&self) -> Interest<'_> {
        let engine = self.engine.as_ref().map(AsFd::as_fd);
        Interest {
            fd: engine.unwrap_or_else(|| self.host.interest().fd),
            readable: true,
            writable: false,
        }
    }

    fn progress(&mut self, ready: &mut Ready) -> bool {
        if self.due || ready.readable {
            self.run(ready);
        }
        self.due
    }

    fn flush(&mut self, ready: &mut Ready) -> bool {
        if std::mem::take(&mut self.queued) {
            self.host.flush(&mut Ready::default());
            self.run(ready);
        }
        self.due
    }

    fn ending(&self) -> Option<&Ending> {
        self.host.ending()
    }

    fn end(&mut self) {
        self.host.end();
        self.due = true;
    }

    /// Since the ends were joined.
    fn counters(&self) -> Counters {
        let (all, before) = (self.host.counters(), self.before);
        Counters {
            copied_bytes: all.copied_bytes - before.copied_bytes,
            sends: all.sends - before.sends,
            receives: all.receives - before.receives,
        }
    }
}

impl HostQueuePair for Coupled {
    fn submit(&mut self, sqe: Sqe, transfer: Transfer, token: u64) -> Result<CommandId, Rejected> {
        let submitted = self.host.submit(sqe, transfer, token);
        self.queued |= submitted.is_ok();
        submitted
    }

    fn abandon(&mut self, id: CommandId) -> bool {
        let abandoned = self.host.abandon(id);
        // The controller lets go when it runs.
        self.due |= abandoned;
        abandoned
    }

    fn room(&self) -> usize {
        self.host.room()
    }

    fn outstanding(&self) -> usize {
        self.host.outstanding()
    }

    fn completion(&mut self) -> Option<Completion> {
        self.host.completion()
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn answers_in_flush(&self) -> bool {
        true
    }
}
