//! Guests that do their worst to one ring, for a while: other rings of the disk and other disks of the process
//! go on, and the daemon neither ends, nor spins, nor keeps what the ring had.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::daemons::{Directory, Export};
use crate::efficiency::wake_ups;
use crate::front_end::{DATA, FrontEnd, OK, Setup, kind};
use crate::malformed::{MISDEEDS, reported};
use crate::memory::Memory;
use crate::process::Process;
use crate::ring::{RING_BYTES, into, out};

/// How long each guest does its worst.
const SIEGE: Duration = Duration::from_secs(3);
/// Longest that a good request may take meanwhile, on a machine that others use as well.
const STALL: Duration = Duration::from_secs(2);
/// Where good requests are, on the disk and in memory; the bad ones stay below.
const GOOD_SECTOR: u64 = 400_000;
const GOOD_DATA: u64 = 32 << 20;
const LEN: usize = 8192;

/// Two disks of one process and one worker.
struct Disks {
    directory: Directory,
    attach: Process,
    _export: Export,
}

impl Disks {
    fn start() -> Self {
        let directory = Directory::new();
        let export = Export::start(&["ram:256M", "ram:256M"]);
        let mut args: Vec<String> = ["attach", "--log-format", "json", "--workers", "1"]
            .map(str::to_owned)
            .into();
        for (uri, name) in export.uris.iter().zip(["a", "b"]) {
            let socket = directory.path(name);
            args.push(format!("--disk=socket-path={},uri={uri}", socket.display()));
        }
        let attach = Process::start("attach", args);
        attach.await_stdout(|line| line.starts_with("One queue for each vCPU"));
        Self {
            directory,
            attach,
            _export: export,
        }
    }

    fn descriptors(&self) -> usize {
        let open = std::fs::read_dir(format!("/proc/{}/fd", self.attach.pid()));
        open.expect("it runs").count()
    }
}

fn connect(socket: &Path, rings: usize) -> FrontEnd {
    let setup = Setup {
        rings,
        ..Setup::default()
    };
    FrontEnd::connect_with(socket, setup)
}

/// Writes something to a ring's part of the disk, reads it back, and gives the longer of the two times.
#[track_caller]
fn write_and_read(guest: &mut FrontEnd, ring: usize, seed: u8) -> Duration {
    let ours = u64::try_from(ring).expect("small");
    let sector = GOOD_SECTOR + 1024 * ours;
    let at = GOOD_DATA + (1 << 20) * ours;
    let len = u32::try_from(LEN).expect("small");
    guest.memory.write(at, &[seed; LEN]);
    let began = Instant::now();
    assert_eq!(guest.run(ring, kind::WRITE, sector, &[out(at, len)]), OK);
    let written = began.elapsed();
    guest.memory.write(at, &[!seed; LEN]);
    let began = Instant::now();
    assert_eq!(guest.run(ring, kind::READ, sector, &[into(at, len)]), OK);
    assert!(guest.memory.read(at, LEN) == [seed; LEN], "other data");
    written.max(began.elapsed())
}

/// What the good rings saw.
#[derive(Debug)]
struct Seen {
    pairs: u64,
    longest: Duration,
}

/// Has disk B carry on until told to end.
fn carry_on(socket: &Path, over: &AtomicBool) -> Seen {
    let mut guest = connect(socket, 1);
    let mut seen = Seen {
        pairs: 0,
        longest: Duration::ZERO,
    };
    while !over.load(Ordering::Relaxed) {
        let seed = u8::try_from(seen.pairs % 251).expect("a byte");
        seen.longest = seen.longest.max(write_and_read(&mut guest, 0, seed));
        seen.pairs += 1;
    }
    seen
}

/// Stops the bad ring and starts it anew, as a guest that is reset does.
fn start_anew(guest: &mut FrontEnd) {
    guest.frontend.get_vring_base(0).expect("GET_VRING_BASE");
    guest.memory.write(0, &vec![0; 0x1_0000]);
    guest.rings[0].restart(0);
    guest.start(0, 0);
}

/// Runs `worst` on ring 0 of disk A again and again, while ring 1 of it and disk B do good work.
fn besiege(disks: &Disks, mut worst: impl FnMut(&mut FrontEnd, u64)) {
    let over = AtomicBool::new(false);
    let socket = disks.directory.path("b");
    let (rounds, here, there) = std::thread::scope(|scope| {
        let other = scope.spawn(|| carry_on(&socket, &over));
        let mut guest = connect(&disks.directory.path("a"), 2);
        let mut here = Duration::ZERO;
        let mut rounds = 0;
        let began = Instant::now();
        while began.elapsed() < SIEGE {
            worst(&mut guest, rounds);
            let seed = u8::try_from(rounds % 251).expect("a byte");
            here = here.max(write_and_read(&mut guest, 1, seed));
            start_anew(&mut guest);
            rounds += 1;
        }
        over.store(true, Ordering::Relaxed);
        (rounds, here, other.join().expect("disk B works"))
    });
    eprintln!("{rounds} rounds; longest beside it {here:?}, on the other disk {there:?}");
    assert!(rounds > 10 && there.pairs > 10, "hardly anything was done");
    assert!(here < STALL && there.longest < STALL, "it was held up");
}

/// Nobody is there: the process falls asleep, with as many descriptors as before.
fn is_at_rest(disks: &Disks, descriptors: usize) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while disks.descriptors() > descriptors && Instant::now() < deadline {
        sleep(Duration::from_millis(10));
    }
    assert_eq!(disks.descriptors(), descriptors, "descriptors");
    // What the ring left behind may still be answered.
    let quiet = || {
        let before = wake_ups(&disks.attach).0;
        sleep(Duration::from_millis(500));
        wake_ups(&disks.attach).0 - before
    };
    let wake_ups: Vec<_> = (0..4)
        .map(|_| quiet())
        .take_while(|woken| *woken > 0)
        .collect();
    assert!(wake_ups.len() < 4, "wake-ups of idle workers: {wake_ups:?}");
}

#[test]
fn a_guest_that_breaks_a_ring_again_and_again_disturbs_nobody() {
    let disks = Disks::start();
    drop(connect(&disks.directory.path("a"), 2));
    sleep(Duration::from_millis(100));
    let descriptors = disks.descriptors();
    besiege(&disks, |guest, round| {
        let err = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let frontend = &guest.frontend;
        frontend.set_vring_err(0, &err).expect("SET_VRING_ERR");
        let at = usize::try_from(round).expect("64 bits") % MISDEEDS.len();
        let (misdeed, commit) = MISDEEDS[at];
        commit(guest);
        guest.rings[0].publish();
        guest.rings[0].kick();
        assert!(reported(&err), "{misdeed}: not reported");
        // Kicks of a ring that is broken mean nothing.
        guest.rings[0].kick();
    });
    is_at_rest(&disks, descriptors);
    // Said often enough, and not as often as it happened.
    let said = disks.attach.logged("ring is broken").len();
    assert!((1..=100).contains(&said), "{said} lines of log");
}

/// Numbers that look random.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn pick(&mut self, choices: &[u64]) -> u64 {
        choices[usize::try_from(self.below(choices.len() as u64)).expect("small")]
    }
}

/// A place in the bad ring or in what its requests are made of.
fn place(numbers: &mut Numbers) -> u64 {
    match numbers.below(4) {
        0 => numbers.below(RING_BYTES),
        1 => (4 << 20) + numbers.below(8192),
        _ => (8 << 20) + numbers.below(1 << 20),
    }
}

/// Changes a descriptor, a header, an index or a few bytes, at any time.
fn meddle(memory: &Memory, numbers: &mut Numbers) {
    let size = 128;
    match numbers.below(8) {
        0..=3 => {
            let mut descriptor = place(numbers).to_le_bytes().to_vec();
            let len = numbers.pick(&[16, 1, 512, 4096, 0, 65536, 100_000, 0xffff_ffff]);
            descriptor.extend_from_slice(&len.to_le_bytes()[..4]);
            let flags = numbers.pick(&[0, 1, 2, 3, 3, 1, 4, 5, 7]);
            descriptor.extend_from_slice(&flags.to_le_bytes()[..2]);
            descriptor.extend_from_slice(&numbers.below(size + 1).to_le_bytes()[..2]);
            let tables = [0, 8 << 20, (8 << 20) + 0x1000];
            memory.write(
                numbers.pick(&tables) + 16 * numbers.below(size),
                &descriptor,
            );
        }
        4 | 5 => {
            let kind = numbers.pick(&[0, 1, 4, 8, 11, 13, 99]);
            let sector = numbers.pick(&[0, 1, 999, 1 << 40, u64::MAX / 512, u64::MAX]);
            let header = [kind.to_le_bytes(), sector.to_le_bytes()].concat();
            memory.write(place(numbers), &header);
        }
        6 => {
            let head = numbers.below(size).to_le_bytes();
            let slot = RING_BYTES / 2 + 4 + 2 * numbers.below(size);
            memory.write(slot, &head[..2]);
        }
        _ => {
            let index = memory.load(RING_BYTES / 2 + 2);
            let step = numbers.pick(&[1, 1, 1, 1, 2, 3, 100, 129, 40_000]);
            let index = index.wrapping_add(u16::try_from(step).expect("small"));
            memory.store(RING_BYTES / 2 + 2, index);
        }
    }
}

#[test]
fn a_guest_that_changes_its_ring_and_its_requests_while_they_are_in_use_harms_itself_alone() {
    let disks = Disks::start();
    drop(connect(&disks.directory.path("a"), 2));
    sleep(Duration::from_millis(100));
    let descriptors = disks.descriptors();
    let seed = Instant::now().elapsed().as_nanos() as u64 ^ u64::from(disks.attach.pid()) << 20 | 1;
    eprintln!("seed {seed}");
    let mut numbers = Numbers(seed);
    let mut taken = 0_u64;
    besiege(&disks, |guest, _| {
        let memory = Arc::clone(&guest.memory);
        let over = AtomicBool::new(false);
        let mut others = Numbers(numbers.next() | 1);
        // Good requests, to be spoiled.
        for slot in 0..30 {
            let at = DATA + 8192 * u64::try_from(slot).expect("small");
            let (kind, data) = match slot % 2 {
                0 => (kind::READ, into(at, 8192)),
                _ => (kind::WRITE, out(at, 8192)),
            };
            guest.add(0, slot, kind, 0, &[data]);
        }
        guest.rings[0].publish();
        std::thread::scope(|scope| {
            let meddler = scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    meddle(&memory, &mut others);
                    std::thread::yield_now();
                }
            });
            let until = Instant::now() + Duration::from_millis(20);
            while Instant::now() < until {
                guest.rings[0].kick();
                std::thread::yield_now();
            }
            over.store(true, Ordering::Relaxed);
            meddler.join().expect("it meddles");
        });
        let base = guest.frontend.get_vring_base(0).expect("GET_VRING_BASE");
        taken += u64::from(base);
    });
    eprintln!("{taken} requests of the bad ring were taken");
    assert!(taken > 0, "none was good enough to be taken");
    is_at_rest(&disks, descriptors);
}
