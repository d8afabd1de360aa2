//! What a seed decides about a world: sizes, limits, digests, and what goes wrong.

use super::fault::Fault;
use super::random::Random;
use crate::tcp::Digests;
use crate::tcp::negotiate::Negotiated;

/// What a run may be like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Each connection has a fault, or none, as the seed says.
    Any,
    /// No connection has a fault.
    Calm,
    /// Every connection has this fault, if it can.
    Only(Fault),
}

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Config {
    pub(super) block_size: usize,
    pub(super) blocks: usize,
    pub(super) volatile: bool,
    pub(super) queue_size: u32,
    pub(super) in_capsule: u32,
    pub(super) sq_flow_control: bool,
    pub(super) host: Negotiated,
    pub(super) controller: Negotiated,
    /// See [`super::pipe::Pipe::new`].
    pub(super) piece: usize,
    pub(super) room: usize,
    /// Most data of one command: what moves in few bytes at a time must be short.
    pub(super) most_bytes: usize,
    /// Most commands begun in one turn.
    pub(super) burst: usize,
    /// Media errors in percent.
    pub(super) errors: usize,
    /// The product's target lane serves it.
    pub(super) lane: bool,
    /// Turns of the host in which it gives a command up, in percent.
    pub(super) abandoned: usize,
    /// Most time that a direction stalls, or a step of the media takes.
    pub(super) stall: usize,
    pub(super) latency: usize,
}

impl Config {
    /// The disk of a world.
    pub(super) fn disk(random: &mut Random) -> Self {
        let (block_size, blocks) = if random.percent(80) {
            (512, 320)
        } else {
            (4096, 48)
        };
        let volatile = random.percent(50);
        let mut config = Self {
            block_size,
            blocks,
            volatile,
            queue_size: 2,
            in_capsule: 0,
            sq_flow_control: true,
            host: negotiated(),
            controller: negotiated(),
            piece: 1,
            room: 1,
            most_bytes: 0,
            burst: 1,
            errors: 0,
            lane: false,
            abandoned: 0,
            stall: 0,
            latency: 1,
        };
        config.connection(random);
        config
    }

    /// Everything that another connection to the same disk may do another way.
    pub(super) fn connection(&mut self, random: &mut Random) {
        let one_of = |random: &mut Random, values: &[usize]| random.pick(values).unwrap_or(1);
        let align = |random: &mut Random| (random.between(0, 31) as u32 + 1) * 4;
        let digests = Digests {
            header: random.percent(50),
            data: random.percent(50),
        };
        let (to_host, to_controller) = (align(random), align(random));
        let max_r2t = random.between(1, 16) as u32;
        let max_h2c_data = 4 * random.between(1024, 8192) as u32;
        self.host = Negotiated {
            rx_align: to_host,
            tx_align: to_controller,
            max_h2c_data,
            max_r2t,
            digests,
        };
        self.controller = Negotiated {
            rx_align: to_controller,
            tx_align: to_host,
            ..self.host
        };
        self.queue_size = match random.below(4) {
            0 => 2,
            1 => 3,
            2 => random.between(4, 16) as u32,
            _ => random.between(17, 64) as u32,
        };
        self.in_capsule = one_of(random, &[0, 512, 4096, 8192, 16384, 65536]) as u32;
        self.sq_flow_control = random.percent(50);
        self.piece = one_of(random, &[40, 600, 5000, 30_000, 100_000, 400_000]);
        self.room = one_of(random, &[100, 3000, 20_000, 100_000, 1 << 20]);
        self.most_bytes = self.piece.min(self.room) * 64;
        self.burst = one_of(random, &[1, 4, 32]);
        self.errors = one_of(random, &[0, 0, 3, 15]);
        self.lane = random.percent(40);
        self.abandoned = one_of(random, &[0, 0, 1, 5]);
        self.stall = one_of(random, &[0, 20, 200]);
        self.latency = one_of(random, &[1, 10, 100]);
    }

    /// Makes it a fast connection.
    pub(super) fn hurry(&mut self) {
        self.piece = 1 << 18;
        self.room = 1 << 18;
        self.errors = 0;
        self.abandoned = 0;
    }

    pub(super) fn digests(&self) -> Digests {
        self.host.digests
    }

    /// What goes wrong with the next connection.
    pub(super) fn fault(&self, profile: Profile, random: &mut Random) -> Fault {
        let possible = Fault::possible(self.digests());
        match profile {
            Profile::Calm => Fault::None,
            Profile::Only(fault) if possible.contains(&fault) => fault,
            Profile::Only(_) => Fault::None,
            Profile::Any if random.percent(15) => Fault::None,
            Profile::Any => random.pick(&possible).unwrap_or(Fault::None),
        }
    }
}

fn negotiated() -> Negotiated {
    Negotiated {
        rx_align: 4,
        tx_align: 4,
        max_h2c_data: 4096,
        max_r2t: 1,
        digests: Digests::default(),
    }
}
