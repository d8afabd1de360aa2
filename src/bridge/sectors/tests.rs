//! Against a model: a disk of whole blocks below, an array of sectors above, and operations that take effect at any time
//! between their beginning and their end.

use memdesc::MemSink;
use proptest::prelude::*;
use vhost_user_blk::SectorRanges;

use super::*;
use crate::bridge::samples::{controller, namespace};
use crate::bridge::translate::{Plan, Refused, Request};

const BLOCKS: usize = 6;
const SLOTS: usize = 16;

fn limits(block: u32) -> Limits {
    let bytes = BLOCKS as u64 * u64::from(block);
    Limits::new(&controller(), &namespace(block, bytes))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Zero,
    Discard,
    Flush,
}

/// What a guest asks for: `count` sectors from `sector`.
#[derive(Debug, Clone, Copy)]
struct Asked {
    kind: Kind,
    sector: usize,
    count: usize,
    byte: u8,
}

impl Asked {
    fn sectors(&self) -> Range<usize> {
        self.sector..self.sector + self.count
    }

    fn bytes(&self) -> Range<usize> {
        self.sector * SECTOR..(self.sector + self.count) * SECTOR
    }

    fn operation(&self) -> Operation {
        let sector = self.sector as u64;
        let ranges = || {
            SectorRanges::from(SectorRange {
                sector,
                count: self.count as u32,
                unmap: self.kind == Kind::Zero,
            })
        };
        match self.kind {
            Kind::Read => Operation::Read {
                sector,
                sink: MemSink::from_bytes(vec![0xee; self.bytes().len()]),
            },
            Kind::Write => Operation::Write {
                sector,
                source: MemSource::from_bytes(vec![self.byte; self.bytes().len()]),
                fua: true,
            },
            Kind::Zero => Operation::WriteZeroes {
                ranges: ranges(),
                fua: true,
            },
            Kind::Discard => Operation::Discard(ranges()),
            Kind::Flush => Operation::Flush,
        }
    }
}

/// An operation on its way.
struct Begun {
    request: usize,
    job: Option<u16>,
    operation: Operation,
    /// It has taken effect.
    applied: bool,
    fails: bool,
}

/// A guest, its disk, and what is between.
struct World {
    block: usize,
    limits: Limits,
    sectors: Sectors<usize>,
    storage: Storage,
    disk: Vec<u8>,
    /// What the guest knows of its disk; `None` where a request has failed.
    expected: Vec<Option<u8>>,
    /// By number, while they are under way.
    asked: Vec<Option<Asked>>,
    begun: Vec<Begun>,
}

impl World {
    fn new(block: u32) -> Self {
        let limits = limits(block);
        let disk: Vec<u8> = (0..BLOCKS * block as usize)
            .map(|at| (at / SECTOR) as u8 | 0x80)
            .collect();
        Self {
            block: block as usize,
            limits,
            sectors: Sectors::new(&limits, SLOTS).unwrap(),
            storage: Storage::new(SLOTS),
            expected: disk.iter().copied().map(Some).collect(),
            disk,
            asked: Vec::new(),
            begun: Vec::new(),
        }
    }

    fn under_way(&self) -> impl Iterator<Item = &Asked> {
        self.asked.iter().flatten()
    }

    /// A guest does not ask for two things at once of which one changes what the other touches.
    fn may_ask(&self, asked: &Asked) -> bool {
        let clashes = |other: &&Asked| {
            let (one, other_sectors) = (asked.sectors(), other.sectors());
            one.start < other_sectors.end
                && other_sectors.start < one.end
                && !(asked.kind == Kind::Read && other.kind == Kind::Read)
        };
        self.under_way().count() < SLOTS && !self.under_way().any(|other| clashes(&other))
    }

    fn ask(&mut self, asked: Asked) {
        let request = self.asked.len();
        self.asked.push(Some(asked));
        let arrival =
            self.sectors
                .arrive(request, asked.operation(), &self.limits, &mut self.storage);
        if let Some((request, operation, job)) = arrival {
            self.begin(request, job, operation);
        }
    }

    fn begin(&mut self, request: usize, job: Option<u16>, operation: Operation) {
        // Nothing but what the controller takes.
        let plan = Plan::new(&self.limits, Request::from(&operation));
        plan.unwrap();
        self.begun.push(Begun {
            request,
            job,
            operation,
            applied: false,
            fails: false,
        });
    }

    /// An operation takes effect, once.
    fn apply(&mut self, at: usize) {
        let begun = &mut self.begun[at];
        if std::mem::replace(&mut begun.applied, true) {
            return;
        }
        match &mut begun.operation {
            Operation::Read { sector, sink } => {
                let from = *sector as usize * SECTOR;
                let bytes = &self.disk[from..from + sink.len()];
                sink.copy_from(0, bytes).unwrap();
            }
            Operation::Write {
                sector,
                source,
                fua,
            } => {
                assert!(*fua);
                let from = *sector as usize * SECTOR;
                let len = source.len();
                source.copy_to(0, &mut self.disk[from..from + len]).unwrap();
            }
            Operation::WriteZeroes { ranges, fua } => {
                assert!(*fua && ranges[0].unmap);
                let from = ranges[0].sector as usize * SECTOR;
                self.disk[from..from + ranges[0].count as usize * SECTOR].fill(0);
            }
            Operation::Discard(_) | Operation::Flush => {}
        }
    }

    /// An operation ends, and what follows from that begins.
    fn complete(&mut self, at: usize) {
        if !self.begun[at].fails {
            self.apply(at);
        }
        let Begun {
            request,
            job,
            operation,
            fails,
            ..
        } = self.begun.swap_remove(at);
        let outcome = match fails {
            true => Outcome::Failed(Status::WRITE_FAULT),
            false => Outcome::Done,
        };
        let next = match job {
            Some(job) => self
                .sectors
                .advance(job, operation, outcome, &mut self.storage),
            None => Next::Over(operation, outcome),
        };
        match next {
            Next::Begin(operation) => self.begin(request, job, operation),
            Next::Over(operation, outcome) => self.over(request, operation, outcome),
        }
        while let Some((request, operation, job)) = self.sectors.next_ready(&mut self.storage) {
            self.begin(request, job, operation);
        }
    }

    fn over(&mut self, request: usize, operation: Operation, outcome: Outcome) {
        let asked = self.asked[request].take().unwrap();
        let done = outcome == Outcome::Done;
        match (asked.kind, operation) {
            (Kind::Read, Operation::Read { sink, .. }) => {
                let read = sink.into_parts().1.unwrap();
                let expected = &self.expected[asked.bytes()];
                for (read, expected) in read.iter().zip(expected).filter(|_| done) {
                    assert!(expected.is_none_or(|byte| byte == *read), "{asked:?}");
                }
            }
            (Kind::Write, Operation::Write { source, .. }) => {
                let byte = done.then_some(asked.byte);
                self.expected[asked.bytes()].fill(byte);
                assert_eq!(source.into_parts().1.unwrap().len(), asked.bytes().len());
            }
            (Kind::Zero, Operation::WriteZeroes { ranges, .. }) => {
                assert_eq!(ranges[0].count as usize, asked.count);
                self.expected[asked.bytes()].fill(done.then_some(0));
            }
            (Kind::Discard, Operation::Discard(_)) | (Kind::Flush, Operation::Flush) => {}
            (kind, other) => panic!("{kind:?} became {other:?}"),
        }
    }

    fn drain(&mut self) {
        while !self.begun.is_empty() {
            self.complete(0);
        }
        assert_eq!((self.under_way().count(), self.sectors.held()), (0, 0));
        assert!(self.sectors.jobs.iter().all(Option::is_none));
        let places = self.sectors.jobs.len();
        assert_eq!((self.sectors.edged, self.sectors.free.len()), (0, places));
        let pads = self.sectors.padding.len() / (2 * self.block);
        assert_eq!(self.sectors.pads.len(), pads);
        for (at, (found, expected)) in self.disk.iter().zip(&self.expected).enumerate() {
            let sector = at / SECTOR;
            assert!(
                expected.is_none_or(|byte| byte == *found),
                "sector {sector}"
            );
        }
    }
}

fn asked(block: u32) -> impl Strategy<Value = Asked> {
    let sectors = BLOCKS * block as usize / SECTOR;
    let kinds = prop_oneof![
        4 => Just(Kind::Write),
        2 => Just(Kind::Read),
        2 => Just(Kind::Zero),
        1 => Just(Kind::Discard),
        1 => Just(Kind::Flush),
    ];
    let counts = prop_oneof![4 => 1..4usize, 2 => 1..3 * block as usize / SECTOR];
    (kinds, 0..sectors, counts, 1..0x80u8).prop_map(move |(kind, sector, count, byte)| Asked {
        kind,
        sector,
        count: if kind == Kind::Flush {
            0
        } else {
            count.min(sectors - sector)
        },
        byte,
    })
}

#[derive(Debug, Clone)]
enum Step {
    Ask(Asked),
    Apply(usize),
    Complete(usize),
    Fail(usize),
}

fn steps(block: u32) -> impl Strategy<Value = (u32, Vec<Step>)> {
    let step = prop_oneof![
        6 => asked(block).prop_map(Step::Ask),
        2 => any::<usize>().prop_map(Step::Apply),
        6 => any::<usize>().prop_map(Step::Complete),
        1 => any::<usize>().prop_map(Step::Fail),
    ];
    prop::collection::vec(step, 0..150).prop_map(move |steps| (block, steps))
}

proptest! {
    #[test]
    fn whatever_a_guest_does_to_sectors_no_other_sector_changes(
        (block, steps) in prop_oneof![steps(1024), steps(4096), steps(16384)],
    ) {
        let mut world = World::new(block);
        for step in steps {
            let count = world.begun.len();
            match step {
                Step::Ask(asked) if world.may_ask(&asked) => world.ask(asked),
                Step::Apply(at) if count > 0 => world.apply(at % count),
                Step::Complete(at) if count > 0 => world.complete(at % count),
                Step::Fail(at) if count > 0 => world.begun[at % count].fails = true,
                _ => {}
            }
        }
        world.drain();
    }
}

fn write(sector: usize, count: usize) -> Asked {
    Asked {
        kind: Kind::Write,
        sector,
        count,
        byte: 1,
    }
}

fn begun(world: &World) -> Vec<(usize, &'static str, u64)> {
    let describe = |begun: &Begun| match &begun.operation {
        Operation::Read { sector, .. } => (begun.request, "read", *sector),
        Operation::Write { sector, .. } => (begun.request, "write", *sector),
        Operation::WriteZeroes { ranges, .. } => (begun.request, "zero", ranges[0].sector),
        Operation::Discard(ranges) => (begun.request, "discard", ranges[0].sector),
        Operation::Flush => (begun.request, "flush", 0),
    };
    world.begun.iter().map(describe).collect()
}

#[test]
fn what_would_write_to_a_block_that_is_changed_in_part_waits_and_everything_else_passes() {
    let mut world = World::new(4096);
    world.ask(write(1, 1));
    // Another part of it, all of it, a neighbour, and what is there now.
    world.ask(write(2, 1));
    world.ask(write(0, 24));
    world.ask(write(24, 8));
    world.ask(Asked {
        kind: Kind::Read,
        ..write(0, 8)
    });
    assert_eq!(
        begun(&world),
        [(0, "read", 0), (3, "write", 24), (4, "read", 0)]
    );
    assert_eq!(world.sectors.held(), 2);
    world.complete(0);
    world.complete(2);
    assert_eq!(
        begun(&world),
        [(4, "read", 0), (3, "write", 24), (1, "read", 0)]
    );
    world.complete(2);
    world.complete(2);
    assert_eq!(
        begun(&world),
        [(4, "read", 0), (3, "write", 24), (2, "write", 0)]
    );
    // It overlaps others as guests' requests do that are at fault themselves.
    world.asked.iter_mut().for_each(|asked| *asked = None);
}

#[test]
fn edges_that_are_neighbours_are_read_at_once_and_others_one_after_the_other() {
    let mut world = World::new(4096);
    world.ask(write(7, 2));
    world.ask(write(17, 30));
    assert_eq!(begun(&world), [(0, "read", 0), (1, "read", 16)]);
    let Operation::Read { sink, .. } = &world.begun[0].operation else {
        panic!();
    };
    assert_eq!(sink.len(), 8192);
    world.complete(1);
    assert_eq!(begun(&world), [(0, "read", 0), (1, "read", 40)]);
    world.complete(1);
    assert_eq!(begun(&world), [(0, "read", 0), (1, "write", 16)]);
    world.drain();
}

#[test]
fn zeroes_are_written_at_the_edges_and_told_in_between() {
    let mut world = World::new(4096);
    world.ask(Asked {
        kind: Kind::Zero,
        ..write(5, 30)
    });
    let mut seen = Vec::new();
    while let Some((_, what, sector)) = begun(&world).pop() {
        seen.push((what, sector));
        world.complete(0);
    }
    let edge = |block| [("read", block), ("write", block)];
    assert_eq!(seen[..2], edge(0));
    assert_eq!(seen[2], ("zero", 8));
    assert_eq!(seen[3..], edge(32));
    world.drain();
}

#[test]
fn requests_that_are_not_aligned_wait_when_there_are_more_than_there_is_memory_for() {
    let mut world = World::new(4096);
    let pads = world.sectors.pads.len();
    world.sectors.pads.truncate(1);
    for sector in [1, 9, 17] {
        world.ask(Asked {
            kind: Kind::Read,
            ..write(sector, 1)
        });
    }
    world.ask(write(25, 1));
    world.ask(write(40, 8));
    assert_eq!(begun(&world), [(0, "read", 0), (4, "write", 40)]);
    for next in [1, 2] {
        world.complete(0);
        let all = begun(&world);
        assert!(all.contains(&(next, "read", 8 * next as u64)), "{all:?}");
        world.begun.sort_by_key(|begun| begun.request);
    }
    world.sectors.pads.extend(1..pads as u16);
    world.drain();
}

#[test]
fn one_that_waits_can_be_given_up_and_those_behind_it_go_on() {
    let mut world = World::new(4096);
    world.ask(write(1, 1));
    world.ask(write(2, 1));
    world.ask(write(3, 1));
    let (request, operation) = world.sectors.give_up(|&request| request == 1).unwrap();
    assert!(world.sectors.give_up(|&request| request == 1).is_none());
    world.over(request, operation, Outcome::Failed(Status::HOST_PATH_ERROR));
    world.complete(0);
    world.complete(0);
    assert_eq!(begun(&world), [(2, "read", 0)]);
    world.drain();
}

#[test]
fn writes_of_an_earlier_life_go_on_in_their_order_when_what_was_collected_is_released() {
    let mut world = World::new(4096);
    let recover = |world: &mut World, asked: Asked| {
        let request = world.asked.len();
        world.asked.push(Some(asked));
        let operation = asked.operation();
        world.sectors.recover(request, operation, &world.limits)
    };
    assert!(recover(&mut world, write(1, 1)).is_none());
    assert!(recover(&mut world, write(2, 1)).is_none());
    world.sectors.collected();
    assert!(recover(&mut world, write(9, 1)).is_none());
    // What writes to a block that an earlier one changes in part waits for it as ever.
    world.ask(write(3, 1));
    let read = Asked {
        kind: Kind::Read,
        ..write(1, 1)
    };
    let (request, _) = recover(&mut world, read).unwrap();
    world.asked[request] = None;
    assert!(world.sectors.next_ready(&mut world.storage).is_none());
    world.sectors.released();
    let (request, operation, job) = world.sectors.next_ready(&mut world.storage).unwrap();
    assert!(world.sectors.next_ready(&mut world.storage).is_none());
    world.begin(request, job, operation);
    for expected in [0, 1, 3] {
        assert_eq!(begun(&world), [(expected, "read", 0)]);
        world.complete(0);
        assert_eq!(begun(&world), [(expected, "write", 0)]);
        world.complete(0);
    }
    assert!(world.begun.is_empty());
    world.sectors.collected();
    world.sectors.released();
    let (request, operation, job) = world.sectors.next_ready(&mut world.storage).unwrap();
    world.begin(request, job, operation);
    world.drain();
}

#[test]
fn there_are_places_for_more_requests_than_expected() {
    let mut world = World::new(4096);
    for sector in 0..3 * SLOTS {
        let asked = write(sector, 1);
        world.asked.push(Some(asked));
        let recovered = world
            .sectors
            .recover(sector, asked.operation(), &world.limits);
        assert!(recovered.is_none());
    }
    world.sectors.collected();
    world.sectors.released();
    while let Some((request, operation, job)) = world.sectors.next_ready(&mut world.storage) {
        world.begin(request, job, operation);
    }
    world.drain();
}

#[test]
fn a_disk_with_blocks_of_a_sector_needs_nothing_of_this() {
    assert!(Sectors::<()>::new(&limits(512), SLOTS).is_none());
    let sectors = Sectors::<()>::new(&limits(1 << 20), SLOTS).unwrap();
    assert_eq!(sectors.pads.len(), *EMULATION_REQUESTS.start());
}

#[test]
fn what_goes_past_the_end_is_left_to_be_refused_as_it_is() {
    let mut world = World::new(4096);
    let end = BLOCKS * 8;
    for kind in [Kind::Write, Kind::Zero] {
        let past = Asked {
            kind,
            ..write(end - 1, 2)
        };
        let arrival = world
            .sectors
            .arrive(0, past.operation(), &world.limits, &mut world.storage);
        let Some((_, operation, None)) = arrival else {
            panic!("{arrival:?}");
        };
        let plan = Plan::new(&world.limits, Request::from(&operation));
        assert_eq!(plan.unwrap_err(), Refused::PastEnd);
    }
}
