//! A data-plane thread: it owns lanes and drives each of them, with nothing between ring and socket.

pub(crate) mod lane;
pub(crate) mod mailbox;

use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll};
use std::thread::JoinHandle;

use nvmf::transport::watch::Watch;
use nvmf::transport::{Lane, Ready, Turn};
use tokio::runtime::Builder;
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use crate::limits::NEW_LANES;

/// Makes a lane on the thread that will own it.
pub(crate) type NewLane = Box<dyn FnOnce() -> Box<dyn Lane> + Send>;

/// A running worker. It ends when it is dropped and its lanes have ended.
#[derive(Debug)]
pub(crate) struct Worker {
    lanes: mpsc::Sender<NewLane>,
    thread: JoinHandle<()>,
}

impl Worker {
    /// Starts worker number `index`.
    ///
    /// # Errors
    /// No thread or no descriptor can be had.
    pub(crate) fn start(index: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_io().build()?;
        let (lanes, mut new) = mpsc::channel::<NewLane>(NEW_LANES);
        let name = format!("worker-{index}");
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let local = LocalSet::new();
            local.spawn_local(async move {
                while let Some(lane) = new.recv().await {
                    tokio::task::spawn_local(drive(lane()));
                }
            });
            // Ends with the last lane.
            runtime.block_on(local);
        })?;
        Ok(Self { lanes, thread })
    }

    /// Hands a lane over.
    pub(crate) async fn place(&self, lane: NewLane) {
        if self.lanes.send(lane).await.is_err() {
            tracing::error!("a worker has ended; its lane is lost");
        }
    }

    /// As [`Self::place`], without waiting; false when the worker has too many new lanes already.
    pub(crate) fn try_place(&self, lane: NewLane) -> bool {
        self.lanes.try_send(lane).is_ok()
    }

    /// Lets the worker end with its lanes, and gives its thread.
    pub(crate) fn finish(self) -> JoinHandle<()> {
        self.thread
    }
}

/// Drives one lane until it ends.
async fn drive(lane: Box<dyn Lane>) {
    let mut driver = Driver {
        lane,
        watches: Vec::new(),
        ready: Vec::new(),
        generation: None,
    };
    poll_fn(|cx| driver.poll(cx)).await;
}

struct Driver {
    lane: Box<dyn Lane>,
    watches: Vec<Watch>,
    ready: Vec<Ready>,
    generation: Option<u64>,
}

impl Driver {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let mut due = self.lane.poll_mailbox(cx);
            if self.generation != Some(self.lane.generation()) {
                if let Err(error) = self.watch() {
                    tracing::error!(%error, "a lane's descriptors cannot be watched; it ends");
                    return Poll::Ready(());
                }
                due = true;
            }
            for (index, (watch, ready)) in self.watches.iter().zip(&mut self.ready).enumerate() {
                due |= watch.poll(cx, self.lane.wants_write(index), ready);
            }
            if !due {
                return Poll::Pending;
            }
            match self.lane.turn(&mut self.ready) {
                // Once more round: what the turn used up is waited for from now on.
                Turn::Idle => {}
                Turn::Again => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Turn::Ended => return Poll::Ready(()),
            }
        }
    }

    /// Registers the lane's descriptors anew. Each counts as ready until it proves otherwise.
    fn watch(&mut self) -> io::Result<()> {
        let mut descriptors = Vec::new();
        self.lane.descriptors(&mut descriptors);
        self.watches.clear();
        for fd in &descriptors {
            self.watches.push(Watch::new(*fd)?);
        }
        self.ready.clear();
        self.ready.resize(
            descriptors.len(),
            Ready {
                readable: true,
                writable: true,
            },
        );
        self.generation = Some(self.lane.generation());
        Ok(())
    }
}
