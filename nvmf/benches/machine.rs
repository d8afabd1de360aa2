//! What the NVMe/TCP machine itself costs: both roles exchange commands in memory, with no socket and no payload.
//!
//! `cargo bench -p nvmf --bench machine` prints nanoseconds for each command, at either end: the median of many batches.

use std::error::Error;
use std::io::{self, Write as _};
use std::time::{Duration, Instant};

use nvmf::spec::opcode::nvm::READ;
use nvmf::spec::{Cqe, Sqe, Status};
use nvmf::tcp::{
    Controller, ControllerEvent, DIGEST_LEN, Digests, Direction, Host, Limits, QPair, Role, TxPdu,
    Want,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Commands that are outstanding together.
const BATCH: u64 = 32;
/// Batches that are measured.
const BATCHES: u32 = 300;
/// What Linux's target accepts by default.
const IN_CAPSULE: u32 = 16 << 10;
/// What we and Linux accept.
const MAX_H2C_DATA: u32 = 128 << 10;
const BLOCK: u32 = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
}

const ROWS: [(&str, Kind, u32); 4] = [
    ("read 4 KiB", Kind::Read, 4 << 10),
    ("write 4 KiB, in the capsule", Kind::Write, 4 << 10),
    ("read 128 KiB", Kind::Read, 128 << 10),
    ("write 128 KiB, one R2T", Kind::Write, 128 << 10),
];

fn main() -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{:<28}{:<9}{:>8}{:>15}",
        "NVMe/TCP machine alone", "digests", "host ns", "controller ns"
    )?;
    for digests in [false, true] {
        for (row, kind, len) in ROWS {
            let mut ends = Ends::new(digests);
            for _ in 0..BATCHES {
                ends.batch(kind, len)?;
            }
            let word = if digests { "yes" } else { "no" };
            let host = each(&mut ends.host_times);
            let controller = each(&mut ends.controller_times);
            writeln!(out, "{row:<28}{word:<9}{host:>8.0}{controller:>15.0}")?;
        }
    }
    Ok(())
}

/// Nanoseconds for each command of the middle batch: some are interrupted.
fn each(times: &mut [Duration]) -> f64 {
    times.sort_unstable();
    let middle = times.get(times.len() / 2).copied().unwrap_or_default();
    middle.as_secs_f64() * 1e9 / BATCH as f64
}

/// Both ends, and what is on its way between them.
struct Ends {
    host: QPair<Host>,
    controller: QPair<Controller>,
    to_controller: Vec<TxPdu>,
    to_host: Vec<TxPdu>,
    /// Of each batch.
    host_times: Vec<Duration>,
    /// Of each batch.
    controller_times: Vec<Duration>,
}

impl Ends {
    fn new(digests: bool) -> Self {
        let limits = Limits {
            rx_align: 4,
            tx_align: 4,
            max_h2c_data: MAX_H2C_DATA,
            max_r2t: 1,
            in_capsule_limit: IN_CAPSULE,
            digests: Digests {
                header: digests,
                data: digests,
            },
            admin: false,
        };
        Self {
            host: QPair::host(128, limits),
            controller: QPair::controller(128, false, limits),
            to_controller: Vec::new(),
            to_host: Vec::new(),
            host_times: Vec::new(),
            controller_times: Vec::new(),
        }
    }

    /// Carries a batch of commands out.
    fn batch(&mut self, kind: Kind, len: u32) -> Result<()> {
        let blocks = len / BLOCK;
        let start = Instant::now();
        for lba in 0..BATCH {
            let (sqe, direction) = match kind {
                Kind::Read => (Sqe::read(1, lba, blocks), Direction::In),
                Kind::Write => (Sqe::write(1, lba, blocks, false), Direction::Out),
            };
            self.host
                .submit(sqe, direction, len)
                .ok_or("the queue is full")?;
        }
        drain(&mut self.host, &mut self.to_controller);
        let (mut host, mut controller) = (start.elapsed(), Duration::ZERO);
        let mut left = BATCH;
        while left > 0 {
            if self.to_controller.is_empty() {
                return Err(format!("{left} commands hang").into());
            }
            let start = Instant::now();
            self.controller_turn()?;
            let middle = Instant::now();
            left -= self.host_turn()?;
            controller += middle - start;
            host += middle.elapsed();
        }
        self.host_times.push(host);
        self.controller_times.push(controller);
        Ok(())
    }

    fn controller_turn(&mut self) -> Result<()> {
        let answer = |machine: &mut QPair<Controller>| {
            while let Some(event) = machine.event() {
                serve(machine, event);
            }
        };
        feed(&mut self.controller, &self.to_controller, answer)?;
        answer(&mut self.controller);
        self.to_controller.clear();
        drain(&mut self.controller, &mut self.to_host);
        Ok(())
    }

    /// Returns how many commands were completed.
    fn host_turn(&mut self) -> Result<u64> {
        feed(&mut self.host, &self.to_host, |_| ())?;
        self.to_host.clear();
        let mut completed = 0;
        while let Some(done) = self.host.completed() {
            if !done.cqe.status().is_success() {
                return Err(format!("a command failed: {}", done.cqe.status()).into());
            }
            completed += 1;
        }
        drain(&mut self.host, &mut self.to_controller);
        Ok(completed)
    }
}

/// What a controller does about an event, if its storage takes no time.
fn serve(machine: &mut QPair<Controller>, event: ControllerEvent) {
    let slot = match event {
        ControllerEvent::Command {
            slot,
            data_len,
            in_capsule,
            sqe,
            ..
        } => {
            // A refusal leaves the command unanswered, and that is noticed.
            if sqe.opcode != READ {
                if !in_capsule {
                    let _ = machine.fetch(slot, 0, data_len);
                }
                return;
            }
            let _ = machine.send(slot, 0, data_len, true);
            slot
        }
        ControllerEvent::Fetched { slot, .. } => slot,
    };
    machine.respond(slot, Cqe::new(0, Status::SUCCESS));
}

fn drain<R: Role>(machine: &mut QPair<R>, wire: &mut Vec<TxPdu>) {
    while let Some(pdu) = machine.transmit() {
        if let Some(payload) = pdu.payload {
            machine.transmitted(payload);
        }
        wire.push(pdu);
    }
}

/// Feeds PDUs; `seen` takes events that stand in the way of payload.
fn feed<R: Role>(
    machine: &mut QPair<R>,
    pdus: &[TxPdu],
    mut seen: impl FnMut(&mut QPair<R>),
) -> Result<()> {
    for pdu in pdus {
        let mut header = pdu.header();
        let mut payload = pdu.payload.map_or(0, |payload| payload.len);
        let mut digest = pdu.data_digest && payload > 0;
        while !header.is_empty() || payload > 0 || digest {
            match machine.want() {
                Want::Header(_) => header = &header[machine.feed(header)?..],
                Want::Payload { len, .. } | Want::Discard(len) => {
                    machine.payload_moved(len);
                    payload -= len;
                }
                Want::DataDigest(_) => {
                    machine.digest(&[0; DIGEST_LEN], 0);
                    digest = false;
                }
                Want::Consumer => seen(machine),
                Want::Nothing => return Err("a machine ended".into()),
            }
        }
    }
    Ok(())
}
