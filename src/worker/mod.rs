//! A data-plane thread: it owns lanes and drives each of them, with nothing between ring and socket.

pub(crate) mod lane;
pub(crate) mod mailbox;
mod overdue;
mod paths;
mod patience;
pub(crate) mod placement;
pub(crate) mod pool;
pub(crate) mod rate;
pub(crate) mod throttle;

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::thread::JoinHandle;

use nvmf::transport::watch::Watch;
use nvmf::transport::{Lane, Ready, Turn};
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::runtime::Builder;
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tokio::time::{Instant, Sleep, sleep_until};

use self::pool::CrewError;
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
    /// Starts worker number `index`, on one CPU alone if that is given.
    ///
    /// # Errors
    /// No thread or no descriptor can be had, or not on that CPU.
    fn start(index: usize, cpu: Option<usize>) -> Result<Self, CrewError> {
        let runtime = Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()?;
        let (lanes, mut new) = mpsc::channel::<NewLane>(NEW_LANES);
        let name = format!("worker-{index}");
        let (bound, is_bound) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            // Nobody waits for it when the process ends already.
            let _ = bound.send(cpu.map_or(Ok(()), bind));
            let local = LocalSet::new();
            local.spawn_local(async move {
                while let Some(lane) = new.recv().await {
                    tokio::task::spawn_local(drive(lane()));
                }
            });
            // Ends with the last lane.
            runtime.block_on(local);
        })?;
        match (is_bound.recv(), cpu) {
            (Ok(Err(error)), Some(cpu)) => Err(CrewError::Cpu { cpu, error }),
            _ => Ok(Self { lanes, thread }),
        }
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

/// Has this thread run on one CPU alone.
fn bind(cpu: usize) -> io::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    Ok(sched_setaffinity(None, &cpus)?)
}

/// Drives one lane until it ends.
async fn drive(lane: Box<dyn Lane>) {
    let mut driver = Driver {
        lane,
        watches: Vec::new(),
        ready: Vec::new(),
        generation: None,
        again: false,
        alarm: None,
    };
    poll_fn(|cx| driver.poll(cx)).await;
}

struct Driver {
    lane: Box<dyn Lane>,
    watches: Vec<Watch>,
    ready: Vec<Ready>,
    generation: Option<u64>,
    /// The last turn stopped at its bound.
    again: bool,
    /// Rings at the lane's deadline. Made once, for lanes that have one, and then set anew.
    alarm: Option<Pin<Box<Sleep>>>,
}

impl Driver {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let mut due = std::mem::take(&mut self.again);
            due |= self.lane.poll_mailbox(cx);
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
            if !due && !self.poll_alarm(cx) {
                return Poll::Pending;
            }
            match self.lane.turn(&mut self.ready) {
                // Once more round: what the turn used up is waited for from now on.
                Turn::Idle => {}
                Turn::Again => {
                    self.again = true;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Turn::Ended => return Poll::Ready(()),
            }
        }
    }

    /// True when the lane's deadline has passed; otherwise it will wake the lane, if there is one.
    fn poll_alarm(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(deadline) = self.lane.deadline().map(Instant::from_std) else {
            return false;
        };
        let alarm = self
            .alarm
            .get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if alarm.deadline() != deadline {
            alarm.as_mut().reset(deadline);
        }
        alarm.as_mut().poll(cx).is_ready()
    }

    /// Registers the lane's descriptors anew. Each counts as ready until it proves otherwise.
    fn watch(&mut self) -> io::Result<()> {
        let mut descriptors = Vec::new();
        self.lane.descriptors(&mut descriptors);
        self.watches.clear();
        for (index, fd) in descriptors.iter().enumerate() {
            self.watches.push(Watch::new(*fd, self.lane.writes(index))?);
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

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, mpsc as std_mpsc};
    use std::time::Duration;

    use super::*;

    /// Has nothing to wait for; works until it has had its turns.
    struct Busy {
        left: usize,
        turns: Arc<AtomicUsize>,
        over: std_mpsc::Sender<()>,
    }

    impl Lane for Busy {
        fn generation(&self) -> u64 {
            0
        }

        fn descriptors<'a>(&'a self, _out: &mut Vec<BorrowedFd<'a>>) {}

        fn writes(&self, _index: usize) -> bool {
            false
        }

        fn wants_write(&self, _index: usize) -> bool {
            false
        }

        fn poll_mailbox(&mut self, _cx: &mut Context<'_>) -> bool {
            false
        }

        fn turn(&mut self, _ready: &mut [Ready]) -> Turn {
            self.turns.fetch_add(1, Ordering::Relaxed);
            if self.left == 0 {
                self.over.send(()).unwrap();
                return Turn::Ended;
            }
            self.left -= 1;
            Turn::Again
        }
    }

    /// Does nothing until its time has come, and ends then.
    struct Patient {
        until: std::time::Instant,
        turns: Arc<AtomicUsize>,
        over: std_mpsc::Sender<()>,
    }

    impl Lane for Patient {
        fn generation(&self) -> u64 {
            0
        }

        fn descriptors<'a>(&'a self, _out: &mut Vec<BorrowedFd<'a>>) {}

        fn writes(&self, _index: usize) -> bool {
            false
        }

        fn wants_write(&self, _index: usize) -> bool {
            false
        }

        fn poll_mailbox(&mut self, _cx: &mut Context<'_>) -> bool {
            false
        }

        fn deadline(&self) -> Option<std::time::Instant> {
            Some(self.until)
        }

        fn turn(&mut self, _ready: &mut [Ready]) -> Turn {
            self.turns.fetch_add(1, Ordering::Relaxed);
            if std::time::Instant::now() < self.until {
                return Turn::Idle;
            }
            self.over.send(()).unwrap();
            Turn::Ended
        }
    }

    #[test]
    fn a_lane_has_a_turn_at_its_deadline_and_sleeps_until_then() {
        let worker = Worker::start(0, None).unwrap();
        let turns = Arc::new(AtomicUsize::new(0));
        let (over, ended) = std_mpsc::channel();
        let lane = Patient {
            until: std::time::Instant::now() + Duration::from_millis(50),
            turns: Arc::clone(&turns),
            over,
        };
        assert!(worker.try_place(Box::new(move || Box::new(lane))));
        ended.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(turns.load(Ordering::Relaxed), 2);
        worker.finish().join().unwrap();
    }

    #[test]
    fn a_lane_that_wants_another_turn_gets_it_although_nothing_becomes_ready() {
        let worker = Worker::start(0, None).unwrap();
        let turns = Arc::new(AtomicUsize::new(0));
        let (over, ended) = std_mpsc::channel();
        let lane = Busy {
            left: 100,
            turns: Arc::clone(&turns),
            over,
        };
        assert!(worker.try_place(Box::new(move || Box::new(lane))));
        ended.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(turns.load(Ordering::Relaxed), 101);
        worker.finish().join().unwrap();
    }
}
