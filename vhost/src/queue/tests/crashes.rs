//! A driver and a device that is killed between any two stores: no request is lost, none is answered
//! twice, and all are taken in order.

use std::collections::BTreeMap;
use std::fs::File;

use proptest::prelude::*;

use super::*;
use crate::fuse::killed_after;
use crate::inflight::{Part, Region, RegionShape};

/// Where the indirect tables of the requests are, and behind them what they refer to.
const TABLES_AT: u64 = 0x8000;
const REQUEST: u64 = 0x100;
/// Entries that a region is asked for with, which are less than the ring has.
const TOO_FEW: u16 = SIZE / 2;

/// A request of the driver's.
#[derive(Debug, Clone, Copy)]
struct Posted {
    sector: u64,
    /// Number that the device gave it, once it was taken in a life that got to say so.
    id: Option<u64>,
}

/// A driver, its ring, and the region that outlives its device.
struct World {
    guest: Guest,
    shape: RegionShape,
    file: File,
    /// Requests without an answer, by head.
    waiting: BTreeMap<u16, Posted>,
    free: Vec<u16>,
    posted: u64,
    answered: u64,
    lives: u32,
}

/// One life of the device.
struct Life {
    queue: Queue,
    held: Vec<Request>,
}

impl World {
    /// With a region that was asked for with so many entries.
    fn new(entries: u16) -> Self {
        let (shape, file) = Region::make(2, entries).expect("region");
        Self {
            guest: Guest::new(),
            shape,
            file,
            waiting: BTreeMap::new(),
            free: (0..SIZE).collect(),
            posted: 0,
            answered: 0,
            lives: 0,
        }
    }

    fn part(&self) -> Part {
        let file = self.file.try_clone().expect("clone");
        let region = Region::open(self.shape, file).expect("a good region");
        region.part(1, SIZE).expect("part of ring 1")
    }

    /// Makes a request available, if there is a free head.
    fn post(&mut self) {
        let Some(head) = self.free.pop() else {
            return;
        };
        let sector = self.posted;
        self.posted += 1;
        let table = TABLES_AT + REQUEST * u64::from(head);
        let (head_at, status_at, data_at) = (table + 0x40, table + 0x60, DATA_AT);
        // One in five asks for what is not on offer, and is answered without a request.
        let kind = if sector % 5 == 4 { 99 } else { WRITE_TO_DISK };
        self.guest.write(head_at, &header(kind, sector));
        self.guest.write(status_at, &[UNTOUCHED]);
        let chain = [out(head_at, 16), out(data_at, 512), into(status_at, 1)];
        self.guest.table(table, &chain);
        let indirect = Desc {
            addr: table,
            len: 48,
            flags: INDIRECT,
            next: 0,
        };
        self.guest.desc(head, indirect);
        self.guest.offer(head);
        self.waiting.insert(head, Posted { sector, id: None });
    }

    /// Begins a life of the device.
    fn begin(&mut self) -> Life {
        self.lives += 1;
        let part = self.part();
        let queue = queue_with(&self.guest, |setup| {
            setup.index = 1;
            setup.part = part;
            // What a front-end says that knows nothing of what was taken.
            setup.base = self.guest.avail_idx;
        });
        let held = Vec::new();
        Life { queue, held }
    }

    /// Looks at the used ring as a driver does.
    fn collect(&mut self) {
        for (head, written) in self.guest.used() {
            let head = u16::try_from(head).expect("a head");
            let done = self.waiting.remove(&head);
            assert!(done.is_some(), "head {head} was answered and not in flight");
            let status_at = TABLES_AT + REQUEST * u64::from(head) + 0x60;
            assert_ne!(self.guest.read(status_at, 1), [UNTOUCHED]);
            assert_eq!(written, 1);
            self.free.insert(0, head);
            self.answered += 1;
        }
        assert_eq!(u64::from(self.guest.used_idx()), self.answered);
    }

    /// Takes a request and checks that it is one that waits, and the oldest of its kind.
    fn take(&mut self, life: &mut Life) -> bool {
        let recovering = life.queue.recovering();
        let taken = life.queue.take(&mut Vec::new).expect("ring is whole");
        let Some(request) = taken else {
            assert_eq!(life.queue.recovering(), 0);
            return false;
        };
        // What is answered on the way is recovered, too.
        assert!(!request.recovered || recovering > 0);
        assert_eq!(request.id & 0xff, 1, "the ring is part of the number");
        let Operation::Write { sector, .. } = request.operation else {
            panic!("not what was posted: {request:?}");
        };
        let posted = self.waiting.values_mut().find(|p| p.sector == sector);
        let posted = posted.expect("taken, but not waiting");
        if let Some(id) = posted.id {
            assert!(request.recovered, "sector {sector} was taken before");
            assert_eq!(request.id, id, "the number of sector {sector}");
        }
        posted.id = Some(request.id);
        let twice = life.held.iter().any(|held| held.id == request.id);
        assert!(!twice, "number {} was given twice", request.id);
        if let Some(before) = life.held.last() {
            // The driver's order is that of its sectors.
            assert!(before.id < request.id, "out of order");
        }
        life.held.push(request);
        true
    }

    fn finish(&mut self, life: &mut Life, at: usize) {
        if life.held.is_empty() {
            return;
        }
        let request = life.held.remove(at % life.held.len());
        life.queue
            .finish(request.token, &request.operation, BlkStatus::Ok);
    }

    fn step(&mut self, life: &mut Life, step: Step) {
        match step {
            Step::Post => self.post(),
            Step::Take => drop(self.take(life)),
            Step::Finish(at) => self.finish(life, usize::from(at)),
            Step::Flush => drop(life.queue.flush()),
            Step::Collect => self.collect(),
            Step::Reopen => {
                for request in life.held.drain(..) {
                    drop(request.operation);
                    life.queue.leave(request.token);
                }
                let left = life.queue.recovering();
                life.queue.reopen();
                assert!(life.queue.recovering() >= left);
            }
        }
    }

    /// A last life that nobody kills: everything is answered, once.
    fn settle(&mut self) {
        self.collect();
        let mut life = self.begin();
        while self.take(&mut life) {}
        while !life.held.is_empty() {
            self.finish(&mut life, 0);
        }
        life.queue.flush();
        self.collect();
        assert!(self.waiting.is_empty(), "lost: {:?}", self.waiting);
        assert_eq!(self.answered, self.posted);
        assert_eq!(life.queue.next_avail(), self.guest.avail_idx);
    }

    /// One life, killed after so many stores at the latest. True when it was not.
    fn live(&mut self, steps: &[Step], stores: u64) -> bool {
        self.collect();
        let whole = killed_after(stores, || {
            let mut life = self.begin();
            for step in steps {
                self.step(&mut life, *step);
            }
            // It is killed in any case.
            for request in life.held.drain(..) {
                drop(request.operation);
                life.queue.leave(request.token);
            }
        });
        whole.is_some()
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Post,
    Take,
    Finish(u8),
    Flush,
    Collect,
    Reopen,
}

const SCENARIO: &[Step] = &[
    Step::Post,
    Step::Post,
    Step::Post,
    Step::Take,
    Step::Take,
    Step::Finish(1),
    Step::Flush,
    Step::Post,
    Step::Post,
    Step::Take,
    Step::Take,
    Step::Finish(2),
    Step::Finish(0),
    Step::Take,
    Step::Flush,
    Step::Collect,
    Step::Post,
    Step::Take,
    Step::Reopen,
    Step::Take,
    Step::Finish(0),
    Step::Flush,
];

#[test]
fn a_device_that_is_killed_at_any_store_of_its_first_life_loses_nothing() {
    for entries in [32, TOO_FEW] {
        let mut stores = 0;
        loop {
            let mut world = World::new(entries);
            let whole = world.live(SCENARIO, stores);
            world.settle();
            if whole {
                break;
            }
            stores += 1;
        }
        assert!(stores > 100, "{stores} stores are too few to tell");
    }
}

#[test]
fn a_device_that_is_killed_again_at_any_store_of_its_recovery_loses_nothing() {
    for first in (0..).step_by(7) {
        let mut first_whole = false;
        for second in 0.. {
            let mut world = World::new(32);
            first_whole = world.live(SCENARIO, 64 + first);
            let whole = world.live(
                &[Step::Take, Step::Take, Step::Finish(0), Step::Flush],
                second,
            );
            world.settle();
            if whole {
                break;
            }
        }
        if first_whole {
            break;
        }
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => Just(Step::Post),
        4 => Just(Step::Take),
        3 => any::<u8>().prop_map(Step::Finish),
        2 => Just(Step::Flush),
        1 => Just(Step::Collect),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_device_that_is_killed_at_random_loses_nothing_and_answers_nothing_twice(
        lives in proptest::collection::vec((steps(), 0_u64..200), 1..12),
        wide in any::<bool>(),
    ) {
        // A wide part takes two stores for each of its 1024 entries before there is anything to lose.
        let (entries, mut begin) = if wide { (TOO_FEW, 2048) } else { (32, 0) };
        let mut world = World::new(entries);
        for (steps, stores) in lives {
            world.live(&steps, begin + stores);
            begin = 0;
        }
        world.settle();
    }
}
