//! The fault decorator alone: which operations its rules pick, and how they end.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memdesc::{MemSink, MemSource};
use nvmf::backend::fault::{Action, Fault, Operations};
use nvmf::backend::{
    Backend, BackendIo, BackendOp, Engine, FaultBackend, FileBackend, NullBackend, RamBackend,
};
use nvmf::spec::Status;
use nvmf::transport::Transfer;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const BLOCK: usize = 512;
const ERROR: Action = Action::Error(None);

fn error(rule: impl FnOnce(&mut Fault)) -> Fault {
    with(ERROR, rule)
}

fn with(action: Action, rule: impl FnOnce(&mut Fault)) -> Fault {
    let mut fault = Fault::new(action);
    rule(&mut fault);
    fault
}

fn delay(least: u64, most: u64) -> Action {
    Action::Delay {
        least: Duration::from_millis(least),
        most: Duration::from_millis(most),
    }
}

fn faulty(faults: impl IntoIterator<Item = Fault>) -> FaultBackend {
    FaultBackend::new(Arc::new(NullBackend::new(1 << 30, 512).unwrap()), faults)
}

fn read(lba: u64, blocks: usize) -> BackendOp {
    BackendOp::Read {
        offset: lba * BLOCK as u64,
        sink: MemSink::from_bytes(vec![0xaa; blocks * BLOCK]),
    }
}

fn write(lba: u64, blocks: usize) -> BackendOp {
    BackendOp::Write {
        offset: lba * BLOCK as u64,
        source: MemSource::from_bytes(vec![0x55; blocks * BLOCK]),
        fua: false,
    }
}

fn zeroes(lba: u64, blocks: u64) -> BackendOp {
    BackendOp::WriteZeroes {
        offset: lba * BLOCK as u64,
        len: blocks * BLOCK as u64,
        may_unmap: false,
        fua: false,
    }
}

/// The result of an operation that is done at once.
fn result(backend: &FaultBackend, op: BackendOp) -> Result<(), Status> {
    let mut io = BackendIo::new(Engine::Auto);
    backend.submit(&mut io, op, 1);
    let done = io.done().unwrap();
    assert_eq!((done.token, io.in_flight()), (1, 0));
    done.result
}

/// Which of so many reads fail.
fn failing(backend: &FaultBackend, reads: u64) -> Vec<u64> {
    let fails = |&lba: &u64| result(backend, read(lba, 1)).is_err();
    (0..reads).filter(fails).collect()
}

fn readable(fd: BorrowedFd<'_>, within: Duration) -> bool {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let within = Timespec {
        tv_sec: within.as_secs().try_into().unwrap(),
        tv_nsec: within.subsec_nanos().into(),
    };
    poll(&mut fds, Some(&within)).unwrap() == 1
}

#[test]
fn an_error_is_the_one_asked_for_and_else_of_the_medium() {
    let plain = faulty([error(|_| {})]);
    let (unreadable, unwritable) = (Status::UNRECOVERED_READ_ERROR, Status::WRITE_FAULT);
    assert_eq!(result(&plain, read(0, 1)), Err(unreadable));
    assert_eq!(result(&plain, write(0, 1)), Err(unwritable));
    assert_eq!(result(&plain, zeroes(0, 1)), Err(unwritable));
    assert_eq!(result(&plain, BackendOp::Flush), Err(unwritable));
    assert_eq!(plain.counters().read().errors, 4);
    assert_eq!(plain.counters().read().reads, 0, "nothing was done");
    let status = Status::NAMESPACE_NOT_READY.do_not_retry();
    let chosen = faulty([Fault::new(Action::Error(Some(status)))]);
    assert_eq!(result(&chosen, read(0, 1)), Err(status));
}

#[test]
fn the_memory_of_a_failed_operation_comes_back_untouched() {
    let mut io = BackendIo::new(Engine::Auto);
    faulty([error(|_| {})]).submit(&mut io, read(0, 1), 1);
    let Transfer::In(sink) = io.done().unwrap().transfer else {
        panic!("a read gives its sink back");
    };
    assert_eq!(sink.into_parts().1.unwrap(), [0xaa; BLOCK]);
}

#[test]
fn a_rule_is_for_its_kinds_of_operations() {
    let ops = || {
        let deallocate = BackendOp::Deallocate {
            offset: 0,
            len: 512,
        };
        [
            (Operations::READ, read(0, 1)),
            (Operations::WRITE, write(0, 1)),
            (Operations::FLUSH, BackendOp::Flush),
            (Operations::WRITE_ZEROES, zeroes(0, 1)),
            (Operations::DEALLOCATE, deallocate),
        ]
    };
    for (kind, _) in ops() {
        let backend = faulty([error(|rule| rule.operations = kind)]);
        for (other, op) in ops() {
            assert_eq!(result(&backend, op).is_err(), other == kind, "{other:?}");
        }
    }
    let compare = faulty([error(|rule| rule.operations = Operations::COMPARE)]);
    assert_eq!(result(&compare, read(0, 1)), Ok(()));
    let mut io = BackendIo::new(Engine::Auto);
    compare.submit_for_compare(&mut io, read(0, 1), 1);
    assert!(io.done().unwrap().result.is_err());
}

#[test]
fn a_rule_with_blocks_is_for_whatever_touches_one_of_them() {
    let backend = faulty([error(|rule| rule.blocks = Some(10..=19))]);
    for (lba, blocks, fails) in [
        (0, 10, false),
        (0, 11, true),
        (12, 1, true),
        (19, 100, true),
        (20, 1, false),
        (0, 100, true),
    ] {
        assert_eq!(result(&backend, read(lba, blocks)).is_err(), fails, "{lba}");
        assert_eq!(result(&backend, zeroes(lba, blocks as u64)).is_err(), fails);
    }
    assert_eq!(result(&backend, BackendOp::Flush), Ok(()));
    let empty = BackendOp::Read {
        offset: 15 * 512,
        sink: MemSink::from_bytes(Vec::new()),
    };
    assert_eq!(result(&backend, empty), Ok(()));
}

#[test]
fn operations_are_picked_by_their_number() {
    let backend = faulty([error(|rule| (rule.after, rule.count) = (3, Some(2)))]);
    assert_eq!(failing(&backend, 10), [3, 4]);
    assert_eq!(backend.picked(0), 2);
    let backend = faulty([error(|rule| rule.every = 4)]);
    assert_eq!(failing(&backend, 10), [0, 4, 8]);
    let backend = faulty([error(|rule| {
        (rule.after, rule.every, rule.count) = (1, 3, Some(2));
    })]);
    assert_eq!(failing(&backend, 20), [1, 4]);
    let backend = faulty([error(|rule| rule.every = 0)]);
    assert_eq!(failing(&backend, 3), [0, 1, 2]);
}

#[test]
fn a_rate_is_kept_and_its_seed_decides_which() {
    let at = |rate, seed| faulty([error(|rule| (rule.rate, rule.seed) = (rate, seed))]);
    let tenth = failing(&at(100_000, 1), 10_000);
    assert!((800..1200).contains(&tenth.len()), "{}", tenth.len());
    assert_eq!(failing(&at(100_000, 1), 10_000), tenth);
    assert_ne!(failing(&at(100_000, 2), 10_000), tenth);
    assert_eq!(failing(&at(0, 1), 1000).len(), 0);
    assert_eq!(failing(&at(1_000_000, 1), 1000).len(), 1000);
}

#[test]
fn the_first_error_decides_and_later_rules_do_not_see_the_operation() {
    let status = Status::INTERNAL_ERROR;
    let rules = [
        error(|rule| rule.blocks = Some(5..=5)),
        with(Action::Error(Some(status)), |rule| rule.count = Some(1)),
    ];
    let backend = faulty(rules);
    assert_eq!(
        result(&backend, read(5, 1)),
        Err(Status::UNRECOVERED_READ_ERROR)
    );
    assert_eq!(result(&backend, read(6, 1)), Err(status));
    assert_eq!(result(&backend, read(7, 1)), Ok(()));
}

#[test]
fn memory_below_is_not_used_in_place_and_the_shape_is_that_below() {
    let ram = Arc::new(RamBackend::new(1 << 20, 512).unwrap());
    let backend = FaultBackend::new(Arc::clone(&ram) as Arc<dyn Backend>, []);
    assert!(backend.source(0, 512, &mut Vec::new()).is_none());
    assert!(backend.sink(0, 512, &mut Vec::new()).is_none());
    assert_eq!(backend.geometry(), ram.geometry());
    assert_eq!(result(&backend, write(3, 1)), Ok(()));
    assert_eq!(ram.counters().read().writes, 1);
}

#[test]
fn a_delayed_operation_wakes_its_lane_and_does_not_hold_up_others() {
    let slow = with(delay(50, 50), |rule| rule.blocks = Some(0..=0));
    let backend = faulty([slow]);
    let mut io = BackendIo::new(Engine::Auto);
    let began = Instant::now();
    backend.submit(&mut io, read(0, 1), 1);
    assert_eq!(io.in_flight(), 1);
    assert!(io.done().is_none());
    assert_eq!(io.generation(), 1, "there is a descriptor now");
    backend.submit(&mut io, read(1, 1), 2);
    assert_eq!(io.done().unwrap().token, 2);
    assert!(readable(io.descriptor().unwrap(), Duration::from_secs(10)));
    assert!(began.elapsed() >= Duration::from_millis(50));
    assert_eq!(io.done().unwrap().token, 1);
    assert_eq!(io.in_flight(), 0);
}

#[test]
fn delays_end_in_the_order_of_their_deadlines_and_add_up() {
    let rules = [
        with(delay(10, 10), |_| {}),
        with(delay(40, 40), |rule| rule.blocks = Some(0..=0)),
        error(|rule| rule.blocks = Some(1..=1)),
    ];
    let backend = faulty(rules);
    let mut io = BackendIo::new(Engine::Auto);
    let began = Instant::now();
    for lba in 0..3 {
        backend.submit(&mut io, read(lba, 1), lba as u32);
    }
    let mut ended = Vec::new();
    while io.in_flight() > 0 {
        io.wait();
        while let Some(done) = io.done() {
            let after = began.elapsed();
            ended.push((done.token, done.result.is_ok()));
            let least = if done.token == 0 { 50 } else { 10 };
            assert!(after >= Duration::from_millis(least), "{after:?}");
        }
    }
    assert_eq!(ended, [(1, false), (2, true), (0, true)]);
}

#[test]
fn jitter_stays_in_its_range_and_differs() {
    let backend = faulty([with(delay(5, 60), |rule| rule.seed = 7)]);
    let mut io = BackendIo::new(Engine::Auto);
    let began = Instant::now();
    for token in 0..20 {
        backend.submit(&mut io, read(0, 1), token);
    }
    let mut order = Vec::new();
    while io.in_flight() > 0 {
        io.wait();
        while let Some(done) = io.done() {
            assert!(began.elapsed() >= Duration::from_millis(5));
            order.push(done.token);
        }
    }
    assert!(!order.is_sorted(), "{order:?}");
}

#[test]
fn an_engine_and_a_clock_wake_the_lane_through_one_descriptor() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    std::fs::write(&path, vec![1; 1 << 20]).unwrap();
    for engine in [Engine::Auto, Engine::Threads] {
        for delay_first in [true, false] {
            let file = Arc::new(FileBackend::open(&path, 512, false).unwrap());
            let slow = |rule: &mut Fault| rule.blocks = Some(0..=0);
            let backend = FaultBackend::new(file, [with(delay(100, 100), slow)]);
            let mut io = BackendIo::new(engine);
            let mut ended = Vec::new();
            let submit = |io: &mut BackendIo, lba| {
                backend.submit(io, read(lba, 1), lba as u32);
                io.flush();
            };
            if delay_first {
                submit(&mut io, 0);
                submit(&mut io, 1);
            } else {
                submit(&mut io, 1);
                submit(&mut io, 0);
            }
            while io.in_flight() > 0 {
                let fd = io.descriptor().unwrap();
                assert!(readable(fd, Duration::from_secs(10)), "{ended:?}");
                io.acknowledge(&mut nvmf::transport::Ready {
                    readable: true,
                    writable: false,
                });
                while let Some(done) = io.done() {
                    assert_eq!(done.result, Ok(()));
                    ended.push(done.token);
                }
                io.flush();
            }
            assert_eq!(ended, [1, 0], "{engine:?}");
        }
    }
}

#[test]
fn what_hangs_is_answered_when_the_lane_is_over_and_not_before() {
    let rules = [
        with(delay(10_000, 10_000), |rule| rule.blocks = Some(1..=1)),
        with(Action::Hang, |rule| rule.blocks = Some(0..=0)),
    ];
    let backend = faulty(rules);
    let mut io = BackendIo::new(Engine::Auto);
    backend.submit(&mut io, write(0, 1), 1);
    backend.submit(&mut io, read(1, 1), 2);
    backend.submit(&mut io, read(2, 1), 3);
    assert_eq!(io.done().unwrap().token, 3);
    std::thread::sleep(Duration::from_millis(30));
    assert!(io.done().is_none());
    assert_eq!(io.in_flight(), 2);
    io.abandon();
    let mut ended = Vec::new();
    while let Some(done) = io.done() {
        assert_eq!(done.result, Err(Status::ABORTED_SQ_DELETION));
        assert_eq!(done.transfer.len(), BLOCK, "memory comes back");
        ended.push(done.token);
    }
    ended.sort_unstable();
    assert_eq!((ended, io.in_flight()), (vec![1, 2], 0));
    backend.submit(&mut io, write(0, 1), 4);
    let done = io.done().unwrap();
    assert_eq!(done.result, Err(Status::ABORTED_SQ_DELETION), "from now on");
    assert_eq!(backend.counters().read().writes, 0);
}

#[test]
fn what_is_firm_is_done_in_its_time_although_the_lane_is_over() {
    let rules = [
        with(delay(50, 50), |rule| {
            (rule.blocks, rule.firm) = (Some(1..=1), true)
        }),
        with(delay(10, 10), |rule| rule.blocks = Some(0..=0)),
    ];
    let backend = faulty(rules);
    let mut io = BackendIo::new(Engine::Auto);
    let began = Instant::now();
    backend.submit(&mut io, write(1, 1), 1);
    backend.submit(&mut io, write(0, 1), 2);
    io.abandon();
    let done = io.done().unwrap();
    assert_eq!(
        (done.token, done.result),
        (2, Err(Status::ABORTED_SQ_DELETION))
    );
    assert!(io.done().is_none());
    assert_eq!(io.in_flight(), 1, "the lane is not gone before it is");
    while io.in_flight() > 0 {
        assert!(readable(io.descriptor().unwrap(), Duration::from_secs(10)));
        io.abandon();
        if let Some(done) = io.done() {
            assert_eq!((done.token, done.result), (1, Ok(())));
        }
    }
    assert!(began.elapsed() >= Duration::from_millis(50));
    assert_eq!(backend.counters().read().writes, 1);
}

#[test]
fn a_lane_that_is_dropped_drops_what_is_held() {
    let backend = faulty([
        with(delay(60_000, 60_000), |_| {}),
        Fault::new(Action::Hang),
    ]);
    let mut io = BackendIo::new(Engine::Auto);
    let began = Instant::now();
    backend.submit(&mut io, write(0, 1), 1);
    drop(io);
    assert!(began.elapsed() < Duration::from_secs(10));
}
