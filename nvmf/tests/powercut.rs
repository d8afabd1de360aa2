//! The power-cut decorator: what it keeps, what is lost with the power, and what never is.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use memdesc::{MemSink, MemSource};
use nvmf::backend::fault::{Action, Fault, Operations};
use nvmf::backend::powercut::{CutError, Survivors};
use nvmf::backend::{
    Backend, BackendIo, BackendOp, Counters, Done, Engine, FaultBackend, FileBackend, Geometry,
    PowerCutBackend, RamBackend,
};
use nvmf::spec::Status;
use nvmf::transport::Transfer;

const BLOCK: u64 = 512;
const BLOCKS: u64 = 8192;
/// Blocks that the cache holds in most tests.
const CACHE: u64 = 256;

fn ram() -> Arc<dyn Backend> {
    Arc::new(RamBackend::new(BLOCKS * BLOCK, 512).unwrap())
}

fn over(medium: &Arc<dyn Backend>) -> PowerCutBackend {
    PowerCutBackend::new(Arc::clone(medium), CACHE * BLOCK, 1)
}

struct Lane(BackendIo);

impl Lane {
    fn new() -> Self {
        Self(BackendIo::new(Engine::Auto))
    }

    fn done(&mut self) -> Done {
        loop {
            self.0.flush();
            if let Some(done) = self.0.done() {
                return done;
            }
            assert!(self.0.in_flight() > 0, "an operation was lost");
            self.0.wait();
        }
    }

    fn run(&mut self, backend: &dyn Backend, op: BackendOp) -> Result<Transfer, Status> {
        backend.submit(&mut self.0, op, 7);
        let done = self.done();
        assert_eq!((done.token, self.0.in_flight()), (7, 0));
        done.result.map(|()| done.transfer)
    }

    fn write(&mut self, backend: &dyn Backend, block: u64, count: u64, byte: u8) {
        self.run(backend, write(block, count, byte, false)).unwrap();
    }

    fn flush(&mut self, backend: &dyn Backend) {
        self.run(backend, BackendOp::Flush).unwrap();
    }

    /// The byte of each block, which must be the same all over it.
    fn read(&mut self, backend: &dyn Backend, block: u64, count: u64) -> Vec<u8> {
        shown(self.run(backend, read(block, count)).unwrap())
    }
}

fn shown(transfer: Transfer) -> Vec<u8> {
    let Transfer::In(sink) = transfer else {
        panic!("a read gives its sink back");
    };
    let bytes = sink.into_parts().1.unwrap();
    let blocks = bytes.chunks(BLOCK as usize);
    let byte = |block: &[u8]| {
        assert!(block.iter().all(|&byte| byte == block[0]), "a torn block");
        block[0]
    };
    blocks.map(byte).collect()
}

fn read(block: u64, count: u64) -> BackendOp {
    BackendOp::Read {
        offset: block * BLOCK,
        sink: MemSink::from_bytes(vec![0xee; (count * BLOCK) as usize]),
    }
}

fn write(block: u64, count: u64, byte: u8, fua: bool) -> BackendOp {
    BackendOp::Write {
        offset: block * BLOCK,
        source: MemSource::from_bytes(vec![byte; (count * BLOCK) as usize]),
        fua,
    }
}

fn zeroes(block: u64, count: u64, fua: bool) -> BackendOp {
    BackendOp::WriteZeroes {
        offset: block * BLOCK,
        len: count * BLOCK,
        may_unmap: true,
        fua,
    }
}

#[test]
fn what_was_flushed_is_on_the_medium_and_what_was_not_is_lost_with_the_power() {
    let medium = ram();
    let disk = over(&medium);
    let mut lane = Lane::new();
    lane.write(&disk, 0, 4, 1);
    lane.flush(&disk);
    lane.write(&disk, 2, 4, 2);
    assert_eq!(lane.read(&disk, 0, 7), [1, 1, 2, 2, 2, 2, 0]);
    assert_eq!(lane.read(&*medium, 0, 7), [1, 1, 1, 1, 0, 0, 0]);
    assert_eq!(disk.volatile_blocks(), 4);
    let cut = disk.cut(Survivors::None).unwrap();
    assert_eq!((cut.lost, cut.kept), (vec![2, 3, 4, 5], vec![]));
    assert_eq!(lane.read(&disk, 0, 7), [1, 1, 1, 1, 0, 0, 0]);
    lane.write(&disk, 2, 1, 3);
    assert_eq!(lane.read(&disk, 1, 3), [1, 3, 1], "the power is on again");
}

#[test]
fn forced_writes_are_on_the_medium_and_take_nothing_else_along() {
    let medium = ram();
    let disk = over(&medium);
    let mut lane = Lane::new();
    lane.write(&disk, 0, 8, 1);
    lane.run(&disk, write(2, 2, 2, true)).unwrap();
    lane.run(&disk, zeroes(4, 1, true)).unwrap();
    let expected = [1, 1, 2, 2, 0, 1, 1, 1];
    assert_eq!(lane.read(&disk, 0, 8), expected);
    assert_eq!(lane.read(&*medium, 0, 8), [0, 0, 2, 2, 0, 0, 0, 0]);
    assert_eq!(disk.cut(Survivors::None).unwrap().lost, [0, 1, 5, 6, 7]);
    assert_eq!(lane.read(&disk, 0, 8), [0, 0, 2, 2, 0, 0, 0, 0]);
    let counts = disk.counters().read();
    assert_eq!(
        (counts.writes, counts.fua_writes, counts.write_zeroes),
        (2, 1, 1)
    );
}

#[test]
fn zeroes_and_discards_are_as_volatile_as_writes() {
    let medium = ram();
    let disk = over(&medium);
    let mut lane = Lane::new();
    lane.write(&disk, 0, 8, 1);
    lane.flush(&disk);
    lane.run(&disk, zeroes(0, 2, false)).unwrap();
    let (offset, len) = (4 * BLOCK, 2 * BLOCK);
    lane.run(&disk, BackendOp::Deallocate { offset, len })
        .unwrap();
    assert_eq!(lane.read(&disk, 0, 8), [0, 0, 1, 1, 0, 0, 1, 1]);
    disk.cut(Survivors::None).unwrap();
    assert_eq!(lane.read(&disk, 0, 8), [1; 8]);
    lane.run(&disk, zeroes(0, 2, false)).unwrap();
    lane.flush(&disk);
    disk.cut(Survivors::None).unwrap();
    assert_eq!(lane.read(&disk, 0, 4), [0, 0, 1, 1]);
}

#[test]
fn any_subset_may_survive_and_its_seed_decides_which() {
    let run = |seed| {
        let medium = ram();
        let disk = over(&medium);
        let mut lane = Lane::new();
        lane.write(&disk, 0, 100, 1);
        let cut = disk.cut(Survivors::Random { seed }).unwrap();
        let blocks = lane.read(&disk, 0, 100);
        assert_eq!(lane.read(&*medium, 0, 100), blocks);
        for block in 0..100 {
            let kept = blocks[block as usize] == 1;
            assert_eq!(cut.kept.contains(&block), kept);
            assert_eq!(cut.lost.contains(&block), !kept);
        }
        assert_eq!(disk.volatile_blocks(), 0);
        cut
    };
    let cut = run(1);
    assert!((25..75).contains(&cut.kept.len()), "{cut:?}");
    assert_eq!(run(1), cut);
    assert_ne!(run(2), cut);
}

#[test]
fn a_full_cache_makes_room_at_random_and_stays_in_its_bounds() {
    let medium = ram();
    let disk = over(&medium);
    let mut lane = Lane::new();
    for block in 0..BLOCKS / 2 {
        lane.write(&disk, block * 2, 1, 1);
        assert!(disk.volatile_blocks() <= CACHE as usize);
    }
    let even = |bytes: Vec<u8>| bytes.into_iter().step_by(2).collect::<Vec<_>>();
    let seen = even(lane.read(&disk, 0, BLOCKS));
    assert!(seen.iter().all(|&byte| byte == 1), "every block is seen");
    let lost = disk.cut(Survivors::None).unwrap().lost;
    assert!(!lost.is_empty() && lost.len() <= CACHE as usize);
    let newest = lost.iter().filter(|&&block| block > BLOCKS - 2 * CACHE);
    assert_ne!(newest.count(), lost.len(), "not just the newest are lost");
    let after = even(lane.read(&disk, 0, BLOCKS));
    for (number, byte) in (0..).zip(after) {
        assert_eq!(byte == 0, lost.contains(&(number * 2)), "block {number}");
    }
}

#[test]
fn what_is_larger_than_the_cache_goes_past_it_and_is_not_shadowed() {
    let medium = ram();
    let disk = over(&medium);
    let mut lane = Lane::new();
    lane.write(&disk, 10, 4, 1);
    lane.write(&disk, 0, CACHE * 2, 2);
    assert_eq!(lane.read(&disk, 8, 8), [2; 8]);
    assert_eq!(disk.volatile_blocks(), 0);
    lane.write(&disk, 10, 4, 3);
    lane.run(&disk, zeroes(0, CACHE * 2, false)).unwrap();
    assert_eq!(lane.read(&disk, 8, 8), [0; 8]);
    lane.write(&disk, 0, CACHE, 4);
    let (offset, len) = (0, BLOCKS * BLOCK);
    lane.run(&disk, BackendOp::Deallocate { offset, len })
        .expect("a hint, and not taken");
    assert!(!disk.geometry().deallocated_reads_zeroes);
}

#[test]
fn what_is_outside_or_not_whole_blocks_is_refused_and_its_memory_comes_back() {
    let medium = ram();
    let disk = over(&medium);
    let mut io = BackendIo::new(Engine::Auto);
    for (offset, len, status) in [
        (BLOCKS * BLOCK, 512, Status::LBA_OUT_OF_RANGE),
        (u64::MAX, 512, Status::LBA_OUT_OF_RANGE),
        (1, 512, Status::INVALID_FIELD),
        (0, 511, Status::INVALID_FIELD),
    ] {
        let source = MemSource::from_bytes(vec![1; len]);
        let fua = false;
        let op = BackendOp::Write {
            offset,
            source,
            fua,
        };
        disk.submit(&mut io, op, 1);
        let done = io.done().unwrap();
        assert_eq!(done.result, Err(status.do_not_retry()));
        assert_eq!(done.transfer.len(), len);
    }
    assert!(disk.geometry().volatile_cache);
    assert!(disk.source(0, 512, &mut Vec::new()).is_none());
}

/// Memory that takes a read at once, and gives it back when it is told to.
struct Holding {
    ram: Arc<dyn Backend>,
    held: Mutex<Vec<Done>>,
}

impl Holding {
    fn release(&self, io: &mut BackendIo) {
        for done in self.held.lock().unwrap().drain(..) {
            io.finish(done.token, done.transfer, done.result);
        }
    }
}

impl Backend for Holding {
    fn geometry(&self) -> Geometry {
        self.ram.geometry()
    }

    fn counters(&self) -> &Counters {
        self.ram.counters()
    }

    fn submit(&self, io: &mut BackendIo, op: BackendOp, token: u32) {
        if !matches!(op, BackendOp::Read { .. }) {
            return self.ram.submit(io, op, token);
        }
        let mut own = BackendIo::new(Engine::Auto);
        self.ram.submit(&mut own, op, token);
        self.held.lock().unwrap().push(own.done().unwrap());
    }
}

#[test]
fn a_read_that_saw_the_medium_before_a_block_came_there_is_done_again() {
    let holding = Arc::new(Holding {
        ram: ram(),
        held: Mutex::default(),
    });
    let disk = PowerCutBackend::new(Arc::clone(&holding) as Arc<dyn Backend>, 1 << 20, 1);
    for through in [false, true] {
        let mut lane = Lane::new();
        lane.write(&disk, 3, 2, 1 + u8::from(through));
        disk.submit(&mut lane.0, read(2, 4), 9);
        let other = match through {
            true => write(3, 2, 9, true),
            false => BackendOp::Flush,
        };
        lane.run_while_held(&disk, other);
        assert_eq!(disk.volatile_blocks(), 0, "it has left the cache");
        holding.release(&mut lane.0);
        assert!(lane.0.done().is_none(), "it is read again");
        holding.release(&mut lane.0);
        let done = lane.0.done().unwrap();
        assert_eq!(done.token, 9);
        let byte = if through { 9 } else { 1 };
        assert_eq!(shown(done.transfer), [0, byte, byte, 0]);
    }
}

impl Lane {
    /// While a read is held back.
    fn run_while_held(&mut self, backend: &dyn Backend, op: BackendOp) {
        backend.submit(&mut self.0, op, 7);
        let done = self.0.done().unwrap();
        assert_eq!((done.token, done.result), (7, Ok(())));
    }
}

fn faulty(action: Action, operations: Operations, count: u64) -> Arc<dyn Backend> {
    let fault = Fault {
        operations,
        count: Some(count),
        ..Fault::new(action)
    };
    Arc::new(FaultBackend::new(ram(), [fault]))
}

#[test]
fn an_error_of_the_medium_fails_the_flush_and_loses_nothing() {
    for operations in [Operations::WRITE, Operations::FLUSH] {
        let medium = faulty(Action::Error(None), operations, 1);
        let disk = over(&medium);
        let mut lane = Lane::new();
        lane.write(&disk, 0, 100, 1);
        lane.write(&disk, 0, 10, 2);
        let failed = lane.run(&disk, BackendOp::Flush);
        assert_eq!(failed.err(), Some(Status::WRITE_FAULT), "{operations:?}");
        assert_eq!(lane.read(&disk, 0, 10), [2; 10]);
        lane.flush(&disk);
        disk.cut(Survivors::None).unwrap();
        assert_eq!(lane.read(&disk, 0, 10), [2; 10]);
        assert_eq!(disk.counters().read().errors, 1);
    }
    let disk = over(&faulty(Action::Error(None), Operations::WRITE, 1));
    let mut lane = Lane::new();
    lane.write(&disk, 0, 1, 1);
    assert!(lane.run(&disk, write(0, 1, 2, true)).is_err());
    assert_eq!(lane.read(&disk, 0, 1), [1], "it is still there");
}

#[test]
fn flushes_of_two_lanes_wait_for_each_other_and_both_hold() {
    let time = std::time::Duration::from_millis(20);
    let slow = Action::Delay {
        least: time,
        most: time,
    };
    let disk = over(&faulty(slow, Operations::WRITE, 1));
    let (mut one, mut two) = (Lane::new(), Lane::new());
    one.write(&disk, 0, 1, 1);
    disk.submit(&mut one.0, BackendOp::Flush, 1);
    assert_eq!(disk.cut(Survivors::None), Err(CutError::Busy));
    two.write(&disk, 0, 2, 2);
    disk.submit(&mut two.0, BackendOp::Flush, 2);
    assert!(two.0.done().is_none(), "the first is under way");
    assert_eq!(one.done().result, Ok(()));
    assert_eq!(two.done().result, Ok(()));
    disk.cut(Survivors::None).unwrap();
    assert_eq!(one.read(&disk, 0, 2), [2, 2]);
}

#[test]
fn a_block_that_is_written_again_during_a_flush_is_not_older_than_the_flush_afterwards() {
    let time = std::time::Duration::from_millis(20);
    let slow = Action::Delay {
        least: time,
        most: time,
    };
    let disk = over(&faulty(slow, Operations::WRITE, 1));
    let (mut one, mut two) = (Lane::new(), Lane::new());
    one.write(&disk, 10, 1, 2);
    one.write(&disk, 20, 1, 2);
    // Block 10 is on its way, and block 20 is still to come.
    disk.submit(&mut one.0, BackendOp::Flush, 1);
    two.write(&disk, 20, 1, 3);
    assert_eq!(one.done().result, Ok(()));
    disk.cut(Survivors::None).unwrap();
    assert_ne!(one.read(&disk, 20, 1), [0], "what was flushed is there");
}

#[test]
fn a_lane_that_goes_in_the_middle_of_a_flush_keeps_nobody_from_flushing() {
    let disk = over(&faulty(Action::Hang, Operations::WRITE, 1));
    let (mut one, mut two) = (Lane::new(), Lane::new());
    one.write(&disk, 0, 1, 1);
    disk.submit(&mut one.0, BackendOp::Flush, 1);
    assert!(one.0.done().is_none());
    assert_eq!(disk.cut(Survivors::None), Err(CutError::Busy));
    drop(one);
    two.flush(&disk);
    disk.cut(Survivors::None).unwrap();
    assert_eq!(two.read(&disk, 0, 1), [1]);
}

#[test]
fn an_orderly_end_leaves_all_on_the_medium() {
    let medium = ram();
    let disk = over(&medium);
    let mut lane = Lane::new();
    lane.write(&disk, 5, 20, 1);
    disk.sync().unwrap();
    assert_eq!(disk.volatile_blocks(), 0);
    assert_eq!(lane.read(&*medium, 5, 20), [1; 20]);
}

/// What one block may hold after a power cut, the newest last.
#[derive(Clone)]
struct Allowed(Vec<u8>);

/// Random operations on two lanes, a few of them in flight, with power cuts.
fn against_a_model(medium: Arc<dyn Backend>, seed: u64, rounds: usize) {
    const PART: u64 = 512;
    let disk = PowerCutBackend::new(medium, 64 * BLOCK, seed);
    let mut state = seed;
    let mut random = |below: u64| {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) % below
    };
    let mut model = vec![Allowed(vec![0]); PART as usize];
    let mut lanes = [Lane::new(), Lane::new()];
    for round in 0..rounds {
        // Writes of a round do not overlap each other: which of two came last would be open.
        let mut taken = BTreeSet::new();
        let (before, mut flushed) = (model.clone(), Vec::new());
        for (token, lane) in (0..6).map(|token| (token, token as usize % 2)) {
            let (block, count) = (random(PART - 40), 1 + random(40));
            let range = block..block + count;
            let byte = (1 + random(250)) as u8;
            let free = range.clone().all(|block| !taken.contains(&block));
            let fua = random(4) == 0;
            let op = match random(8) {
                0..5 if free => write(block, count, byte, fua),
                5 if free => zeroes(block, count, fua),
                6 => {
                    // It covers what was answered before it begins: earlier rounds.
                    flushed = before.clone();
                    BackendOp::Flush
                }
                _ => continue,
            };
            let zero = matches!(op, BackendOp::WriteZeroes { .. });
            if !matches!(op, BackendOp::Flush) {
                taken.extend(range.clone());
                for block in range {
                    let allowed = &mut model[block as usize].0;
                    if fua {
                        allowed.clear();
                    }
                    allowed.push(if zero { 0 } else { byte });
                }
            }
            disk.submit(&mut lanes[lane].0, op, token);
        }
        // In turn: one may wait for what the other has in flight.
        while lanes.iter().any(|lane| lane.0.in_flight() > 0) {
            for Lane(io) in &mut lanes {
                io.flush();
                while let Some(done) = io.done() {
                    assert_eq!(done.result, Ok(()), "seed {seed}");
                }
            }
            std::thread::yield_now();
        }
        for (allowed, before) in model.iter_mut().zip(flushed) {
            let older = before.0.len() - 1;
            if allowed.0.len() > older && allowed.0.starts_with(&before.0) {
                allowed.0.drain(..older);
            }
        }
        if random(5) == 0 {
            let survivors = match random(2) {
                0 => Survivors::None,
                _ => Survivors::Random { seed: random(1000) },
            };
            disk.cut(survivors).unwrap();
            let found = lanes[0].read(&disk, 0, PART);
            for (block, (allowed, byte)) in model.iter_mut().zip(found).enumerate() {
                assert!(
                    allowed.0.contains(&byte),
                    "seed {seed}, round {round}: block {block} is {byte}, not one of {:?}",
                    allowed.0
                );
                allowed.0 = vec![byte];
            }
        }
        let newest: Vec<u8> = model
            .iter()
            .map(|allowed| allowed.0[allowed.0.len() - 1])
            .collect();
        assert!(
            lanes[1].read(&disk, 0, PART) == newest,
            "seed {seed}, round {round}"
        );
    }
}

#[test]
fn a_disk_in_memory_is_as_its_model_says_whatever_is_lost() {
    for seed in 1..12 {
        against_a_model(ram(), seed, 40);
    }
}

#[test]
fn a_disk_in_a_file_is_as_its_model_says_whatever_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    for seed in 1..8 {
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(BLOCKS * BLOCK).unwrap();
        drop(file);
        let medium = FileBackend::open(&path, 512, false).unwrap();
        against_a_model(Arc::new(medium), seed, 40);
    }
}
