//! The limits of a disk in virtual time: several lanes, each with rings that are never empty.

use std::num::NonZeroU64;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const READ: Direction = Direction::Read;
const WRITE: Direction = Direction::Write;

fn rate(per_second: u64, burst: u64) -> Option<Rate> {
    Some(Rate {
        per_second: NonZeroU64::new(per_second)?,
        burst: NonZeroU64::new(burst)?,
    })
}

fn weight(direction: Direction, bytes: u64) -> Option<Weight> {
    Some(Weight { direction, bytes })
}

/// A disk and its lanes; what waits at them are numbers.
struct Disk {
    start: Instant,
    gates: Vec<Gate<u32>>,
}

impl Disk {
    fn new(rates: Rates, lanes: usize) -> Self {
        let start = Instant::now();
        let throttle = Arc::new(Throttle::new(&rates, start).unwrap());
        let gate = || Gate::new(Arc::clone(&throttle), 64);
        Self {
            start,
            gates: std::iter::repeat_with(gate).take(lanes).collect(),
        }
    }

    /// A turn of a lane at a time in milliseconds: what departs.
    fn turn(&mut self, lane: usize, millis: u64) -> Vec<u32> {
        let gate = &mut self.gates[lane];
        gate.begin_turn(self.start + Duration::from_millis(millis));
        std::iter::from_fn(|| gate.depart()).collect()
    }

    fn arrive(&mut self, lane: usize, weight: Option<Weight>, request: u32) -> bool {
        self.gates[lane].arrive(lane, weight, request).is_some()
    }

    /// Milliseconds to the deadline of a lane.
    fn deadline(&self, lane: usize) -> Option<u64> {
        let deadline = self.gates[lane].deadline()?;
        Some((deadline - self.start).as_millis() as u64)
    }
}

fn requests(total: Option<Rate>, reads: Option<Rate>, writes: Option<Rate>) -> Rates {
    Rates {
        requests: Limit {
            total,
            reads,
            writes,
        },
        bytes: Limit::default(),
    }
}

#[test]
fn a_disk_without_limits_has_no_throttle() {
    assert!(Throttle::new(&Rates::default(), Instant::now()).is_none());
}

#[test]
fn a_request_waits_until_its_deadline_and_no_other_is_taken_meanwhile() {
    let mut disk = Disk::new(requests(rate(10, 1), None, None), 1);
    assert!(disk.turn(0, 0).is_empty());
    assert!(disk.gates[0].is_open() && disk.deadline(0).is_none());
    assert!(disk.arrive(0, weight(READ, 512), 1));
    assert!(!disk.arrive(0, weight(WRITE, 512), 2));
    assert!(!disk.gates[0].is_open() && !disk.gates[0].is_empty());
    assert_eq!(disk.deadline(0), Some(100));
    assert!(disk.turn(0, 99).is_empty());
    assert_eq!(disk.turn(0, 100), [2]);
    assert!(disk.gates[0].is_open() && disk.gates[0].is_empty());
    assert_eq!(disk.deadline(0), None);
}

#[test]
fn a_flush_passes_whoever_waits() {
    let mut disk = Disk::new(requests(rate(1, 1), rate(1, 1), None), 1);
    disk.turn(0, 0);
    assert!(disk.arrive(0, weight(READ, 512), 1));
    assert!(!disk.arrive(0, weight(READ, 512), 2));
    assert!(disk.arrive(0, None, 3));
    assert!(Weight::of(&Operation::Flush).is_none());
}

#[test]
fn reads_and_writes_with_limits_of_their_own_do_not_wait_for_each_other() {
    let mut disk = Disk::new(requests(None, rate(1, 1), None), 1);
    disk.turn(0, 0);
    assert!(disk.arrive(0, weight(READ, 512), 0));
    for read in 1..10 {
        assert!(!disk.arrive(0, weight(READ, 512), read));
        assert!(disk.gates[0].is_open(), "writes may come");
        assert!(disk.arrive(0, weight(WRITE, 512), 100));
    }
    assert_eq!(disk.turn(0, 1000), [1]);
    assert_eq!(disk.deadline(0), Some(2000));
    let mut disk = Disk::new(requests(None, rate(1, 1), rate(1, 1)), 1);
    disk.turn(0, 0);
    for number in 0..2 {
        assert_eq!(disk.arrive(0, weight(READ, 512), number), number == 0);
        assert_eq!(disk.arrive(0, weight(WRITE, 512), number), number == 0);
    }
    assert!(!disk.gates[0].is_open());
}

#[test]
fn as_many_wait_as_there_is_room_for() {
    let mut disk = Disk::new(requests(None, rate(1, 1), None), 1);
    disk.turn(0, 0);
    let mut waiting = 0;
    while disk.gates[0].is_open() {
        waiting += u32::from(!disk.arrive(0, weight(READ, 512), 1));
    }
    assert_eq!(waiting, 64);
}

#[test]
fn requests_wait_for_the_last_of_all_limits_that_they_have() {
    let rates = Rates {
        requests: Limit {
            total: rate(100, 1),
            reads: rate(10, 1),
            writes: None,
        },
        bytes: Limit {
            total: rate(1_000_000, 4096),
            reads: None,
            writes: rate(10_000, 1000),
        },
    };
    let mut disk = Disk::new(rates, 1);
    disk.turn(0, 0);
    assert!(disk.arrive(0, weight(READ, 512), 1));
    assert!(!disk.arrive(0, weight(READ, 512), 2));
    assert_eq!(disk.deadline(0), Some(100), "reads in a second");
    let mut disk = Disk::new(rates, 1);
    disk.turn(0, 0);
    assert!(
        disk.arrive(0, weight(WRITE, 5000), 1),
        "larger than a burst"
    );
    assert!(
        !disk.arrive(0, weight(WRITE, 0), 2),
        "a discard moves nothing"
    );
    assert_eq!(disk.deadline(0), Some(10), "requests in a second");
    assert_eq!(disk.turn(0, 10), [2]);
    assert!(!disk.arrive(0, weight(WRITE, 500), 3));
    assert_eq!(disk.deadline(0), Some(450), "bytes written in a second");
}

/// What passes at each of four lanes in four seconds, of 1000 requests a second; the last lane has a turn only
/// every so many milliseconds.
fn shares(pause: u64) -> [u64; 4] {
    let mut disk = Disk::new(requests(rate(1000, 10), None, None), 4);
    let mut passed = [0; 4];
    for millis in 0..4000 {
        for (lane, passed) in passed.iter_mut().enumerate() {
            if lane == 3 && millis % pause > 0 {
                continue;
            }
            *passed += disk.turn(lane, millis).len() as u64;
            while disk.gates[lane].is_open() {
                *passed += u64::from(disk.arrive(lane, weight(READ, 512), 1));
            }
        }
    }
    let all: u64 = passed.iter().sum();
    assert!((3990..=4010).contains(&all), "{passed:?}");
    passed
}

#[test]
fn lanes_that_always_have_requests_get_equal_shares_and_one_that_is_late_is_not_forgotten() {
    let equal = shares(1);
    assert!(
        equal.iter().all(|passed| (990..=1010).contains(passed)),
        "{equal:?}"
    );
    let late = shares(3);
    assert!(late[3] > 600, "{late:?}");
}

#[test]
fn the_ring_after_that_whose_request_waits_is_asked_first_however_many_turns_it_takes() {
    let mut disk = Disk::new(requests(rate(1000, 1), None, None), 1);
    let mut shares = [0; 3];
    for millis in 0..300 {
        disk.turn(0, millis);
        // A completion has a turn of its own.
        disk.turn(0, millis);
        let gate = &mut disk.gates[0];
        let first = gate.first_ring(3);
        for ring in (first..3).chain(0..first) {
            while gate.is_open() {
                shares[ring] += 1;
                gate.arrive(ring, weight(READ, 512), 1);
            }
        }
    }
    assert!(
        shares.iter().all(|share| (99..=101).contains(share)),
        "{shares:?}"
    );
    assert_eq!(disk.gates[0].first_ring(0), 0);
}

#[test]
fn what_is_released_early_is_owed() {
    let mut disk = Disk::new(requests(None, rate(10, 1), None), 1);
    disk.turn(0, 0);
    for request in 0..6 {
        disk.arrive(0, weight(READ, 512), request);
    }
    // Of 1 to 5, which wait, these go now.
    let gate = &mut disk.gates[0];
    let gone: Vec<u32> = std::iter::from_fn(|| gate.release(|&request| request > 2)).collect();
    assert_eq!(gone, [3, 4, 5]);
    assert_eq!(
        disk.deadline(0),
        Some(100),
        "the first has what it waits for"
    );
    assert_eq!(disk.turn(0, 100), [1]);
    assert_eq!(disk.deadline(0), Some(500), "after those that went before");
    let gate = &mut disk.gates[0];
    assert_eq!(gate.release(|&request| request == 2), Some(2));
    assert!(gate.is_empty() && gate.deadline().is_none());
}

proptest! {
    #[test]
    fn whatever_lanes_do_the_disk_keeps_to_its_limit_and_nobody_waits_for_ever(
        (per_second, burst) in (1..2000_u64, 1..100_u64),
        lanes in 1..5_usize,
        turns in prop::collection::vec((0..5_usize, 0..20_u64, 0..8_u32), 1..200),
    ) {
        let mut disk = Disk::new(requests(rate(per_second, burst), None, None), lanes);
        let (mut millis, mut passed, mut arrived) = (0, 0_u64, 0_u64);
        let within = |passed, millis| passed * 1000 <= per_second * millis + burst * 1000;
        for (lane, pause, count) in turns {
            let lane = lane % lanes;
            millis += pause;
            passed += disk.turn(lane, millis).len() as u64;
            for _ in 0..count {
                if disk.gates[lane].is_open() {
                    arrived += 1;
                    passed += u64::from(disk.arrive(lane, weight(WRITE, 1), 1));
                }
            }
            prop_assert!(within(passed, millis), "{passed} in {millis} ms");
        }
        // Then the deadlines alone bring the rest.
        while let Some((deadline, lane)) = (0..lanes)
            .filter_map(|lane| Some((disk.deadline(lane)?, lane)))
            .min()
        {
            millis = millis.max(deadline + 1);
            let departed = disk.turn(lane, millis);
            prop_assert!(!departed.is_empty(), "a turn at its deadline is for nothing");
            passed += departed.len() as u64;
            prop_assert!(within(passed, millis), "{passed} in {millis} ms");
        }
        prop_assert_eq!(passed, arrived);
    }
}
