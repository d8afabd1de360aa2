//! What decorators of backends leave for later: after a time, or when another operation is done.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::{BackendIo, Done};

/// Marks tokens that are ours; the rest is an index.
const OURS: u32 = 1 << 31;

/// The rest of an operation. Dropping it gives up what it holds.
pub(super) trait Step: Send {
    /// Goes on: when its time has come, or with the end of the operation that it waited for.
    fn resume(self: Box<Self>, io: &mut BackendIo, done: Option<Done>);

    /// Ends the operation whose time has not come, since its lane is over. What waits for another
    /// operation is not abandoned.
    fn abandon(self: Box<Self>, io: &mut BackendIo) {
        let _ = io;
    }
}

/// Steps of a lane, by index.
#[derive(Default)]
pub(super) struct Later {
    steps: Vec<Option<Box<dyn Step>>>,
    free: Vec<u32>,
    /// Indices of those that wait for a time, or for the end of the lane.
    waiting: Vec<u32>,
    /// Indices of those that wait for a time, and whatever becomes of the lane.
    firm: Vec<u32>,
    clock: Option<Clock>,
    over: bool,
}

impl Later {
    /// Keeps what goes on when an operation is done; the token to submit that with.
    pub(super) fn follow(&mut self, step: Box<dyn Step>) -> u32 {
        self.keep(step) | OURS
    }

    /// The step that waited for an operation with this token.
    pub(super) fn followed(&mut self, token: u32) -> Option<Box<dyn Step>> {
        match token & OURS {
            0 => None,
            _ => self.take(token & !OURS),
        }
    }

    /// Keeps what goes on after a time, or not before the lane is over. It comes back when it
    /// cannot be: there is no descriptor left, or the lane is over. `engine` is what the lane waits
    /// on otherwise. What is `firm` goes on after its time also where the lane is over meanwhile.
    pub(super) fn wait(
        &mut self,
        after: Option<Duration>,
        step: Box<dyn Step>,
        engine: Option<BorrowedFd<'_>>,
        firm: bool,
    ) -> Result<(), Box<dyn Step>> {
        if self.over {
            return Err(step);
        }
        if after.is_some() && self.clock.is_none() {
            match Clock::new(engine) {
                Ok(clock) => self.clock = Some(clock),
                Err(error) => {
                    tracing::error!("an operation cannot be delayed: {error}");
                    return Err(step);
                }
            }
        }
        let index = self.keep(step);
        match firm && after.is_some() {
            true => self.firm.push(index),
            false => self.waiting.push(index),
        }
        if let (Some(after), Some(clock)) = (after, &mut self.clock) {
            clock
                .deadlines
                .push(Reverse((Instant::now() + after, index)));
            clock.arm();
        }
        Ok(())
    }

    /// The next step whose time has come.
    pub(super) fn due(&mut self) -> Option<Box<dyn Step>> {
        let clock = self.clock.as_mut()?;
        let Reverse((deadline, index)) = *clock.deadlines.peek()?;
        if deadline > Instant::now() {
            // It may be another one than the clock was set for.
            clock.arm();
            return None;
        }
        clock.deadlines.pop();
        self.waiting.retain(|&waiting| waiting != index);
        self.firm.retain(|&firm| firm != index);
        self.take(index)
    }

    /// Lets nothing wait any more that is not firm; the next step that did.
    pub(super) fn end(&mut self) -> Option<Box<dyn Step>> {
        self.over = true;
        if let Some(clock) = &mut self.clock {
            let firm = &self.firm;
            clock
                .deadlines
                .retain(|Reverse((_, index))| firm.contains(index));
        }
        let index = self.waiting.pop()?;
        self.take(index)
    }

    /// Steps that wait for a time.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len() + self.firm.len()
    }

    /// The clock, once there is one.
    pub(super) fn clock(&self) -> Option<&Clock> {
        self.clock.as_ref()
    }

    fn keep(&mut self, step: Box<dyn Step>) -> u32 {
        if let Some(index) = self.free.pop() {
            self.steps[index as usize] = Some(step);
            return index;
        }
        self.steps.push(Some(step));
        // A lane has no more operations than its queue pairs have entries.
        (self.steps.len() - 1) as u32
    }

    fn take(&mut self, index: u32) -> Option<Box<dyn Step>> {
        let step = self.steps.get_mut(index as usize)?.take()?;
        self.free.push(index);
        Some(step)
    }
}

/// Deadlines, and one descriptor that becomes readable for them as well as for the engine.
pub(super) struct Clock {
    deadlines: BinaryHeap<Reverse<(Instant, u32)>>,
    timer: OwnedFd,
    /// Holds the timer and the engine.
    all: OwnedFd,
    /// What the timer is set to.
    armed: Option<Instant>,
}

impl Clock {
    fn new(engine: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let clock = Self {
            deadlines: BinaryHeap::new(),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            all: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            armed: None,
        };
        clock.add(clock.timer.as_fd())?;
        if let Some(engine) = engine {
            clock.add(engine)?;
        }
        Ok(clock)
    }

    /// Watches the engine, too.
    ///
    /// # Errors
    /// The kernel has no room for it.
    pub(super) fn add(&self, engine: BorrowedFd<'_>) -> io::Result<()> {
        let data = epoll::EventData::new_u64(0);
        epoll::add(&self.all, engine, data, epoll::EventFlags::IN)?;
        Ok(())
    }

    /// The descriptor for all.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.all.as_fd()
    }

    /// True while something waits for a time.
    pub(super) fn is_set(&self) -> bool {
        !self.deadlines.is_empty()
    }

    /// Blocks until the engine or a deadline is ready.
    pub(super) fn block(&self) {
        let mut event = Vec::with_capacity(1);
        // Interrupted waits end early; callers look and come back.
        let _ = epoll::wait(&self.all, rustix::buffer::spare_capacity(&mut event), None);
    }

    /// Sets the timer to the next deadline, which also takes its readiness back.
    fn arm(&mut self) {
        let Some(&Reverse((deadline, _))) = self.deadlines.peek() else {
            return;
        };
        if self.armed == Some(deadline) {
            return;
        }
        // Zero would turn it off.
        let after = deadline.saturating_duration_since(Instant::now());
        let after = after.max(Duration::from_nanos(1));
        let never = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let once = Itimerspec {
            it_interval: never,
            it_value: Timespec {
                tv_sec: after.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: after.subsec_nanos().into(),
            },
        };
        match timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            Ok(_) => self.armed = Some(deadline),
            Err(error) => tracing::error!("a timer cannot be set: {error}"),
        }
    }
}
