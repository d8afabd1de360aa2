//! Daemons that are killed again and again, at any moment, under load: each request is answered once, and well, and each
//! block has what was written last.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::daemons::{Attach, Directory, Export};
use crate::front_end::{DATA, OK, Setup, kind};
use crate::keeper::{KEEP, Keeper};
use crate::outages::QUICK;
use crate::ring::{Used, into, out};

/// Kills in an ordinary run, unless VHOST_NVMF_ROUNDS says more.
const ROUNDS: u64 = 5;
const RINGS: usize = 3;
/// Requests that each ring has in flight.
const DEPTH: usize = 16;
/// Blocks of 4 KiB for each of them.
const BLOCKS: u64 = 3;
const BLOCK: u64 = 4096;

/// What a place of a ring does: it writes its blocks one after the other, and reads each before it writes it again.
#[derive(Clone)]
struct Worker {
    head: u16,
    /// How many times each was written, and answered.
    written: [u8; BLOCKS as usize],
    at: usize,
    writes: bool,
    since: Instant,
}

struct Load {
    keeper: Keeper,
    workers: Vec<Vec<Worker>>,
    answered: u64,
    longest: Duration,
}

fn block(ring: usize, place: usize, at: usize) -> u64 {
    ((ring * DEPTH + place) as u64) * BLOCKS + at as u64
}

fn buffer(ring: usize, place: usize) -> u64 {
    DATA + BLOCK * (ring * DEPTH + place) as u64
}

/// Differs by block and round.
fn pattern(block: u64, round: u8) -> Vec<u8> {
    let words = BLOCK as usize / 8;
    let word = block << 8 | u64::from(round);
    word.to_le_bytes().repeat(words)
}

impl Load {
    fn start(socket: &Path, announced: Option<u16>) -> Self {
        let setup = Setup {
            rings: RINGS,
            announced,
            ..Setup::default()
        };
        let idle = Worker {
            head: 0,
            written: [0; BLOCKS as usize],
            at: 0,
            writes: true,
            since: Instant::now(),
        };
        let mut load = Self {
            keeper: Keeper::connect(socket, setup, KEEP),
            workers: vec![vec![idle; DEPTH]; RINGS],
            answered: 0,
            longest: Duration::ZERO,
        };
        for ring in 0..RINGS {
            for place in 0..DEPTH {
                load.post(ring, place);
            }
            load.keeper.guest.rings[ring].submit();
        }
        load
    }

    fn post(&mut self, ring: usize, place: usize) {
        let worker = &mut self.workers[ring][place];
        let block = block(ring, place, worker.at);
        let address = buffer(ring, place);
        let guest = &mut self.keeper.guest;
        let (kind, data) = if worker.writes {
            let round = worker.written[worker.at].wrapping_add(1);
            guest.memory.write(address, &pattern(block, round));
            (kind::WRITE, out(address, BLOCK as u32))
        } else {
            guest.memory.write(address, &[0xee; BLOCK as usize]);
            (kind::READ, into(address, BLOCK as u32))
        };
        worker.since = Instant::now();
        let (header, status) = guest.frame(ring, place, kind, 8 * block);
        worker.head = guest.rings[ring].add(&[header, data, status]);
    }

    #[track_caller]
    fn answered(&mut self, ring: usize, used: Used) {
        let mut workers = self.workers[ring].iter();
        let place = workers.position(|worker| worker.head == used.head);
        let place = place.expect("nobody has asked for that");
        assert_eq!(self.keeper.guest.status(ring, place), OK);
        let worker = &mut self.workers[ring][place];
        // No other is to be taken for it.
        worker.head = u16::MAX;
        self.longest = self.longest.max(worker.since.elapsed());
        self.answered += 1;
        if worker.writes {
            worker.written[worker.at] = worker.written[worker.at].wrapping_add(1);
        } else {
            let block = block(ring, place, worker.at);
            let expected = pattern(block, worker.written[worker.at]);
            let found = self
                .keeper
                .guest
                .memory
                .read(buffer(ring, place), BLOCK as usize);
            assert!(found == expected, "block {block} has something else");
            worker.at = (worker.at + 1) % BLOCKS as usize;
        }
        worker.writes = !worker.writes;
    }

    /// Goes on for a while.
    #[track_caller]
    fn run(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.turn(true);
        }
    }

    #[track_caller]
    fn turn(&mut self, more: bool) {
        for ring in 0..RINGS {
            let used = self.keeper.guest.rings[ring].used();
            for used in &used {
                self.answered(ring, *used);
            }
            for place in 0..DEPTH {
                if more && self.workers[ring][place].head == u16::MAX {
                    self.post(ring, place);
                }
            }
            if !used.is_empty() {
                self.keeper.guest.rings[ring].submit();
            }
        }
    }

    /// Until nothing is in flight.
    #[track_caller]
    fn finish(&mut self) {
        let end = Instant::now() + Duration::from_secs(15);
        let idle = |load: &Self| {
            let mut all = load.workers.iter().flatten();
            all.all(|worker| worker.head == u16::MAX)
        };
        while !idle(self) {
            assert!(Instant::now() < end, "requests were lost");
            self.turn(false);
        }
    }
}

fn rounds() -> u64 {
    let rounds = std::env::var("VHOST_NVMF_ROUNDS").ok();
    rounds.map_or(ROUNDS, |rounds| rounds.parse().expect("a number"))
}

/// Kills and starts daemons at one socket.
fn under_kills(announced: Option<u16>, start: impl Fn(&Path) -> Attach) {
    let seed = fastrand::u64(..);
    eprintln!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let directory = Directory::new();
    let socket = directory.path("disk.sock");
    let mut daemon = start(&socket);
    let mut load = Load::start(&socket, announced);
    for _ in 0..rounds() {
        load.run(Duration::from_micros(random.u64(0..300_000)));
        drop(daemon);
        daemon = start(&socket);
        load.keeper.reconnect(&socket);
        // Sometimes it does not even come to that.
        if random.u8(..) < 40 {
            thread::sleep(Duration::from_micros(random.u64(0..5000)));
            drop(daemon);
            daemon = start(&socket);
            load.keeper.reconnect(&socket);
        }
        // Sometimes it is told to end.
        if random.u8(..) < 40 {
            load.run(Duration::from_millis(20));
            daemon.stop();
            daemon = start(&socket);
            load.keeper.reconnect(&socket);
        }
    }
    load.run(Duration::from_millis(300));
    load.finish();
    eprintln!(
        "{} kills, {} requests, the longest took {:?}",
        rounds(),
        load.answered,
        load.longest
    );
    assert!(load.answered > 100 * rounds(), "{} requests", load.answered);
    daemon.stop();
    assert_eq!(daemon.counter("errors"), 0);
}

#[test]
fn a_daemon_that_is_killed_again_and_again_loses_nothing_and_answers_nothing_twice() {
    let export = Export::start(&["ram:8M"]);
    let args = [&QUICK[..], &["--nr-io-queues", "2"]].concat();
    under_kills(None, |socket| Attach::start_at(socket, &args, export.uri()));
}

#[test]
fn nor_does_one_with_a_local_disk() {
    under_kills_of_serve(None);
}

#[test]
fn nor_does_one_whose_rings_are_larger_than_the_vmm_said() {
    under_kills_of_serve(Some(32));
}

fn under_kills_of_serve(announced: Option<u16>) {
    let directory = Directory::new();
    let image = directory.path("disk.img");
    let file = std::fs::File::create(&image).expect("a file");
    file.set_len(8 << 20).expect("room");
    let spec = format!("file:{}", image.display());
    under_kills(announced, |socket| {
        Attach::serve_at(socket, &["--nr-io-queues=2"], &spec)
    });
}
