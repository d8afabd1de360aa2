//! A world from a seed: connections one after another, each with its load and its fault, stepped in
//! virtual time; at the end the whole disk is read and judged.

use super::arena::Arena;
pub(super) use super::config::Config;
use super::config::Profile;
use super::disk::ModelDisk;
use super::expect::Side;
use super::fault::Fault;
use super::host::HostSide;
use super::lane::LaneSide;
use super::media::Media;
use super::pipe::Pipe;
use super::random::Random;
use super::target::{ControllerSide, TargetSide};
use super::transport::SimulatedTcp;
use crate::spec::{Status, trtype};
use crate::tcp::negotiate::Negotiated;
use crate::transport::registry::Lease;
use crate::transport::tcp::Connection;
use crate::transport::{self, QueueParams, Registry};

/// Steps that a connection may take: a world that needs more is going round in circles.
const STEPS_MAX: u64 = 400_000;

/// Something that must never happen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("seed {seed}, step {step}, connection {connection} ({fault:?}): {what}")]
pub struct Violation {
    /// The seed.
    pub seed: u64,
    /// When.
    pub step: u64,
    /// Which connection, from 1 on.
    pub connection: u32,
    /// What went wrong with it on purpose.
    pub fault: Fault,
    /// What happened.
    pub what: String,
}

/// What a world did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// Commands begun.
    pub commands: u64,
    /// Those that succeeded.
    pub succeeded: u64,
    /// Those that the controller failed, or that were not believed.
    pub failed: u64,
    /// Those that were lost with a connection, or given up in time.
    pub lost: u64,
    /// Those that the host gave up, whatever came of it.
    pub abandoned: u64,
    /// Steps of virtual time.
    pub steps: u64,
    /// Faults that came to pass.
    pub faults: Vec<Fault>,
    /// A number that differs when anything that a command came to does.
    pub trace: u64,
}

impl Report {
    pub(super) fn count(&mut self, status: Status) {
        let count = match status.code() {
            0 => &mut self.succeeded,
            code if code == Status::ABORTED_BY_HOST.code() => &mut self.lost,
            _ => &mut self.failed,
        };
        *count += 1;
        self.trace = self
            .trace
            .wrapping_mul(0x0100_0000_01b3)
            .wrapping_add(u64::from(status.code()) + self.steps);
    }
}

/// What outlives a connection.
pub(super) struct State {
    pub(super) random: Random,
    pub(super) model: ModelDisk,
    pub(super) media: Media,
    pub(super) arena: Arena,
    /// Virtual time, in steps.
    pub(super) now: u64,
    /// Commands that this connection is still to begin.
    pub(super) left: usize,
    writes: u64,
    pub(super) report: Report,
}

impl State {
    /// A number for a write.
    pub(super) fn next_write(&mut self) -> u64 {
        self.writes += 1;
        self.writes
    }
}

/// Runs the world of a seed.
///
/// # Errors
/// The first thing that must never happen, and did.
pub fn run(seed: u64, profile: Profile) -> Result<Report, Violation> {
    let violation = |what| Violation {
        seed,
        step: 0,
        connection: 0,
        fault: Fault::None,
        what,
    };
    let mut random = Random::new(seed);
    let mut config = Config::disk(&mut random);
    let mut state = State {
        model: ModelDisk::new(config.blocks, config.volatile),
        media: Media::new(
            config.block_size,
            config.blocks,
            config.volatile,
            config.latency,
            random.fork(),
        ),
        arena: Arena::new().map_err(violation)?,
        now: 0,
        left: 0,
        writes: 0,
        report: Report::default(),
        random,
    };
    let connections = state.random.between(1, 3) as u32;
    let mut lost_before = None;
    for number in 1..=connections + 1 {
        // The last one only looks at what the others left.
        let profile = if number > connections {
            Profile::Calm
        } else {
            profile
        };
        config.connection(&mut state.random);
        if number > connections {
            config.hurry();
        }
        let fault = config.fault(profile, &mut state.random);
        state.left = state.random.between(1, 40);
        let mut link =
            Link::new(&config, fault, number, lost_before, &mut state).map_err(violation)?;
        let checked = link
            .run(&mut state)
            .and_then(|()| {
                if number > connections {
                    link.read_all(&mut state)?;
                }
                link.finish(&mut state)
            })
            .and_then(|()| state.arena.check());
        if link.pipe.fault_landed() || link.timed_landed {
            state.report.faults.push(fault);
        }
        checked.map_err(|what| Violation {
            step: state.now,
            connection: number,
            fault,
            ..violation(what)
        })?;
        lost_before = Some(state.writes + 1);
        state.report.steps = state.now;
    }
    Ok(state.report)
}

/// One connection.
struct Link {
    number: u32,
    config: Config,
    fault: Fault,
    pipe: Pipe,
    host: HostSide,
    target: Box<dyn ControllerSide>,
    /// Until when each side's stream stands still.
    stalled: [u64; 2],
    /// When a fault that comes at a moment comes.
    timed: Option<u64>,
    timed_landed: bool,
    /// Writes of earlier connections, with lower numbers than this, may still take effect.
    lost_before: Option<u64>,
    until: u64,
}

/// What a step can be.
#[derive(Debug, Clone, Copy)]
enum Action {
    Host { begin: bool },
    Target,
    Move(Side),
    Media,
}

fn params(config: &Config, negotiated: Negotiated, pipe: &Pipe, side: Side) -> QueueParams {
    QueueParams {
        admin: false,
        queue_size: config.queue_size,
        sq_flow_control: config.sq_flow_control,
        in_capsule_limit: config.in_capsule,
        connection: transport::Connection::new(Connection {
            stream: pipe.end(side),
            negotiated,
        }),
        lease: Lease::default(),
    }
}

impl Link {
    fn new(
        config: &Config,
        fault: Fault,
        number: u32,
        lost_before: Option<u64>,
        state: &mut State,
    ) -> Result<Self, String> {
        let random = state.random.fork();
        let pipe = Pipe::new(config.digests(), fault, config.piece, config.room, random);
        let host = params(config, config.host, &pipe, Side::Host);
        let controller = params(config, config.controller, &pipe, Side::Controller);
        let registry = Registry::with_defaults();
        let opened = registry
            .add(Box::new(SimulatedTcp))
            .and_then(|()| registry.open_host(trtype::TCP, host))
            .and_then(|host| Ok((host, registry.open_controller(trtype::TCP, controller)?)));
        let (host, controller) = opened.map_err(|error| error.to_string())?;
        let target: Box<dyn ControllerSide> = if config.lane {
            let kept = config.abandoned > 0 || fault == Fault::EarlyAnswer;
            Box::new(LaneSide::new(
                controller,
                pipe.clone(),
                config,
                number,
                kept,
            )?)
        } else {
            Box::new(TargetSide::new(controller, pipe.clone(), config, number))
        };
        let timed = fault
            .is_timed()
            .then(|| state.now + state.random.between(1, 400) as u64);
        Ok(Self {
            number,
            config: config.clone(),
            fault,
            host: HostSide::new(host, pipe.clone(), config),
            target,
            pipe,
            stalled: [0; 2],
            timed,
            timed_landed: false,
            lost_before,
            until: state.now + STEPS_MAX,
        })
    }

    fn actions(&self, state: &State) -> Vec<Action> {
        let mut actions = Vec::with_capacity(6);
        let begin = state.left > 0 && self.host.has_room();
        if self.host.is_due() {
            actions.push(Action::Host { begin: false });
        }
        if begin {
            actions.push(Action::Host { begin: true });
        }
        if self.target.is_due(state.now) {
            actions.push(Action::Target);
        }
        for side in [Side::Host, Side::Controller] {
            if self.pipe.has_work(side) && self.stalled[side.index()] <= state.now {
                actions.push(Action::Move(side));
            }
        }
        if state.media.next_due().is_some_and(|due| due <= state.now) {
            actions.push(Action::Media);
        }
        actions
    }

    /// When something can happen again; `None` when nothing will.
    fn next_moment(&self, state: &State) -> Option<u64> {
        let stalled = [Side::Host, Side::Controller]
            .into_iter()
            .filter(|&side| self.pipe.has_work(side))
            .map(|side| self.stalled[side.index()]);
        let others = [state.media.next_due(), self.target.next_start(), self.timed];
        stalled.chain(others.into_iter().flatten()).min()
    }

    /// Steps until nothing can happen any more.
    fn run(&mut self, state: &mut State) -> Result<(), String> {
        loop {
            state.now += 1;
            if state.now > self.until {
                return Err(format!("no end after {STEPS_MAX} steps"));
            }
            if self.timed.is_some_and(|at| at <= state.now) {
                self.timed = None;
                self.strike(state)?;
            }
            let actions = self.actions(state);
            match state.random.pick(&actions) {
                Some(action) => self.act(state, action)?,
                None => match self.next_moment(state) {
                    Some(moment) => state.now = state.now.max(moment),
                    None => break,
                },
            }
            if let Some(what) = self
                .pipe
                .expect(super::expect::Expectations::take_violation)
            {
                return Err(what);
            }
            self.settle(state);
        }
        self.check_still()
    }

    /// Writes of earlier connections take no effect any more once the media know nothing of them.
    fn settle(&mut self, state: &mut State) {
        if let Some(before) = self.lost_before
            && state.media.is_idle_but_for(self.number)
        {
            state.model.settle(before);
            self.lost_before = None;
        }
    }

    fn act(&mut self, state: &mut State, action: Action) -> Result<(), String> {
        match action {
            Action::Host { begin: false } => self.host.turn(state, 0),
            Action::Host { begin: true } => {
                let most = self.config.burst.min(state.left);
                let begin = state.random.between(1, most);
                self.host.turn(state, begin)
            }
            Action::Target => self.target.turn(state),
            Action::Move(side) => {
                self.pipe.move_some(side);
                if state.random.percent(5) {
                    let stall = state.random.between(0, self.config.stall) as u64;
                    self.stalled[side.index()] = state.now + stall;
                }
                Ok(())
            }
            Action::Media => match state.media.step(state.now) {
                Some(done) if done.owner == self.number => self.target.done(state, done),
                _ => Ok(()),
            },
        }
    }

    /// The fault that comes at a moment.
    fn strike(&mut self, state: &mut State) -> Result<(), String> {
        if self.host.ending().is_some() || self.target.ending().is_some() {
            return Ok(());
        }
        self.timed_landed = true;
        match self.fault {
            Fault::Cut => self.pipe.cut(),
            Fault::Reset => self.pipe.reset(),
            Fault::PowerCut => {
                self.pipe.reset();
                state.media.power_cut();
                state.model.power_cut();
            }
            Fault::Ended(side) => self.end(state, side)?,
            _ => {}
        }
        Ok(())
    }

    fn end(&mut self, state: &mut State, side: Side) -> Result<(), String> {
        self.pipe
            .expect(|expect| expect.may_end(side, super::expect::EndingIs::Local));
        match side {
            Side::Host => self.host.end(state),
            Side::Controller => self.target.end(state),
        }
    }

    /// Nothing moves any more: nothing may be left undone.
    fn check_still(&self) -> Result<(), String> {
        let endings = [
            (Side::Host, self.host.ending()),
            (Side::Controller, self.target.ending()),
        ];
        for (side, ending) in endings {
            if self.pipe.expect(|expect| expect.is_to_end(side)) && ending.is_none() {
                return Err(format!("the {side:?} should have ended"));
            }
        }
        if self.host.outstanding() > 0 {
            return Err(format!(
                "{} commands hang: nothing is under way any more",
                self.host.outstanding()
            ));
        }
        Ok(())
    }

    /// Reads the whole disk.
    fn read_all(&mut self, state: &mut State) -> Result<(), String> {
        let mut lba = 0;
        while lba < self.config.blocks {
            let count = (self.config.blocks - lba).min(32);
            self.run(state)?;
            if !self.host.read(state, lba as u64, count as u32)? {
                return Err("no room for a read on an idle connection".to_owned());
            }
            self.run(state)?;
            lba += count;
        }
        Ok(())
    }

    /// Ends what has not ended, and checks what must hold then.
    fn finish(&mut self, state: &mut State) -> Result<(), String> {
        state.left = 0;
        if self.host.ending().is_none() && self.target.ending().is_none() {
            match state.random.below(3) {
                0 => self.end(state, Side::Host)?,
                1 => self.end(state, Side::Controller)?,
                _ => self.pipe.cut(),
            }
        }
        self.run(state)?;
        self.host.check_over()?;
        self.target.check_over()
    }
}
