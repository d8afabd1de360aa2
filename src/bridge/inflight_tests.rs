//! Requests through the slot table, against a queue of the tests' own.

use memdesc::{MemSink, MemSource};
use nvmf::host::ControllerInfo;
use nvmf::spec::Cqe;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use super::super::samples::{controller, namespace};
use super::super::translate::Refused;
use super::*;

/// A queue that holds what was submitted until the test completes it.
#[derive(Default)]
pub(super) struct Queue {
    pub(super) room: usize,
    ended: bool,
    pub(super) held: VecDeque<(Sqe, Transfer, u64)>,
}

impl Queue {
    fn with_room(room: usize) -> Self {
        Self {
            room,
            ..Self::default()
        }
    }

    fn submit(&mut self, sqe: Sqe, transfer: Transfer, token: u64) -> Result<(), Rejected> {
        let reason = match () {
            () if self.ended => RejectedReason::Ended,
            () if self.held.len() >= self.room => RejectedReason::Full,
            () => {
                self.held.push_back((sqe, transfer, token));
                return Ok(());
            }
        };
        Err(Rejected { transfer, reason })
    }

    pub(super) fn complete(&mut self, status: Status) -> Completion {
        let (_, transfer, token) = self.held.pop_front().unwrap();
        completion(transfer, token, status)
    }
}

fn completion(transfer: Transfer, token: u64, status: Status) -> Completion {
    Completion {
        token,
        cqe: Cqe::new(0, status),
        sqhd_valid: true,
        transferred: 0,
        transfer,
    }
}

/// A queue as the one path.
struct To<'a> {
    queue: &'a mut Queue,
    limits: &'a Limits,
}

impl Outlet for To<'_> {
    fn choose(&mut self, _avoid: PathSet) -> Option<usize> {
        Some(0)
    }

    fn limits(&self, _path: usize) -> Option<&Limits> {
        Some(self.limits)
    }

    fn submit(
        &mut self,
        _path: usize,
        sqe: Sqe,
        transfer: Transfer,
        token: u64,
    ) -> Result<(), Rejected> {
        self.queue.submit(sqe, transfer, token)
    }
}

pub(super) fn only(path: usize) -> PathSet {
    let mut set = PathSet::EMPTY;
    set.insert(path);
    set
}

pub(super) struct Rig {
    ring: u16,
    opened: u64,
    pub(super) limits: Limits,
    pub(super) storage: Storage,
    pub(super) inflight: Inflight<u32>,
    pub(super) fences: Fences,
    pub(super) queue: Queue,
}

impl Rig {
    /// A table of 4 slots, a queue with room for `room`, and MDTS of 4 KiB.
    pub(super) fn new(room: usize) -> Self {
        let controller = ControllerInfo {
            max_transfer: Some(4096),
            ..controller()
        };
        Self {
            ring: 0,
            opened: 0,
            limits: Limits::new(&controller, &namespace(512, 1 << 20)),
            storage: Storage::new(8),
            inflight: Inflight::new(4),
            fences: Fences::default(),
            queue: Queue::with_room(room),
        }
    }

    /// The name of the next request.
    pub(super) fn owner(&mut self) -> Owner {
        self.opened += 1;
        Owner {
            ring: self.ring,
            request: self.opened,
        }
    }

    pub(super) fn open(&mut self, guest: u32, operation: Operation) {
        let owner = self.owner();
        self.inflight
            .open(guest, owner, operation, &self.limits)
            .expect("there is room");
    }

    pub(super) fn issue(&mut self) -> Option<RejectedReason> {
        let Self {
            limits,
            storage,
            inflight,
            fences,
            queue,
            ..
        } = self;
        let mut outlet = To { queue, limits };
        inflight.issue(limits, fences, storage, &mut outlet)
    }

    /// What was lost may begin anew.
    fn release(&mut self) {
        self.inflight.release(only(0), &self.limits);
    }

    pub(super) fn complete(&mut self, status: Status) {
        let completion = self.queue.complete(status);
        assert!(self.settle(completion, Fate::Known));
    }

    pub(super) fn settle(&mut self, completion: Completion, fate: Fate) -> bool {
        self.inflight
            .settle(0, completion, fate, &self.limits, &mut self.storage)
    }

    /// The queue pair ends with all that it holds. Gives what is left of it.
    fn lose(&mut self) -> Unknown {
        while !self.queue.held.is_empty() {
            let completion = self.queue.complete(Status::ABORTED_BY_HOST);
            assert!(self.settle(completion, Fate::Unknown));
        }
        self.inflight.take_unknown(0)
    }

    pub(super) fn done(&mut self) -> Option<(u32, Outcome)> {
        let finished = self.inflight.take_done()?;
        Some((finished.guest, finished.outcome))
    }
}

/// A write of guest memory; statics stand in for the guest's.
pub(super) fn write(sector: u64, len: usize) -> Operation {
    Operation::Write {
        sector,
        source: MemSource::zeroes(len, Vec::new()),
        fua: false,
    }
}

fn read(sector: u64, len: usize) -> Operation {
    Operation::Read {
        sector,
        sink: MemSink::from_bytes(vec![0; len]),
    }
}

#[test]
fn a_request_is_done_once_and_has_its_memory_back() {
    let mut rig = Rig::new(4);
    rig.open(1, read(0, 4096));
    assert_eq!(rig.issue(), None);
    assert_eq!(rig.queue.held[0].1.len(), 4096);
    assert_eq!(rig.done(), None);
    rig.complete(Status::SUCCESS);
    let finished = rig.inflight.take_done().unwrap();
    assert_eq!((finished.guest, finished.outcome), (1, Outcome::Done));
    match finished.operation {
        Operation::Read { sink, .. } => assert_eq!(sink.len(), 4096),
        other => panic!("{other:?}"),
    }
    assert!(rig.inflight.take_done().is_none());
    assert_eq!(rig.inflight.room(), 4);
}

#[test]
fn a_large_request_is_issued_as_the_queue_has_room_and_done_after_its_last_part() {
    let mut rig = Rig::new(2);
    rig.open(1, write(0, 5 * 4096));
    assert_eq!(rig.issue(), Some(RejectedReason::Full));
    let mut blocks = Vec::new();
    while rig.done().is_none() {
        blocks.push(rig.queue.held[0].0.slba());
        assert_eq!(rig.queue.held[0].1.len(), 4096);
        rig.complete(Status::SUCCESS);
        rig.issue();
    }
    assert_eq!(blocks, [0, 8, 16, 24, 32]);
}

#[test]
fn requests_take_turns() {
    let mut rig = Rig::new(4);
    rig.open(1, write(0, 3 * 4096));
    rig.open(2, write(100, 4096));
    assert_eq!(rig.issue(), None);
    let order: Vec<u64> = rig.queue.held.iter().map(|held| held.0.slba()).collect();
    assert_eq!(order, [0, 100, 8, 16]);
}

#[test]
fn the_first_failure_wins_and_stops_what_was_not_submitted() {
    let mut rig = Rig::new(2);
    rig.open(1, write(0, 5 * 4096));
    rig.issue();
    rig.complete(Status::WRITE_FAULT);
    assert_eq!(rig.done(), None, "a command still has its memory");
    assert_eq!(rig.issue(), None);
    assert_eq!(rig.queue.held.len(), 1);
    rig.complete(Status::INTERNAL_ERROR);
    assert_eq!(rig.done(), Some((1, Outcome::Failed(Status::WRITE_FAULT))));
    assert_eq!(rig.inflight.room(), 4);
}

#[test]
fn a_rejected_command_is_submitted_again_later_with_its_memory() {
    let mut rig = Rig::new(0);
    rig.open(1, read(8, 4096));
    assert_eq!(rig.issue(), Some(RejectedReason::Full));
    assert!(rig.inflight.is_waiting());
    rig.queue.room = 1;
    assert_eq!(rig.issue(), None);
    assert_eq!(rig.queue.held[0].0.slba(), 8);
    assert_eq!(rig.queue.held[0].1.len(), 4096);
}

#[test]
fn what_has_nothing_to_do_or_cannot_be_done_is_done_at_once() {
    let mut rig = Rig::new(4);
    rig.open(1, write(0, 0));
    rig.open(2, write(0, 100));
    rig.open(3, read(1 << 11, 512));
    assert_eq!(rig.issue(), None);
    assert!(rig.queue.held.is_empty());
    assert_eq!(rig.done(), Some((1, Outcome::Done)));
    assert_eq!(rig.done(), Some((2, Outcome::Refused(Refused::Misaligned))));
    assert_eq!(rig.done(), Some((3, Outcome::Refused(Refused::PastEnd))));
}

#[test]
fn a_full_table_gives_the_request_back() {
    let mut rig = Rig::new(4);
    for guest in 0..4 {
        rig.open(guest, Operation::Flush);
    }
    assert_eq!(rig.inflight.room(), 0);
    let owner = rig.owner();
    let back = rig.inflight.open(9, owner, Operation::Flush, &rig.limits);
    assert!(matches!(back, Err((9, Operation::Flush))));
    rig.issue();
    rig.complete(Status::SUCCESS);
    assert_eq!(rig.done(), Some((0, Outcome::Done)));
    assert_eq!(rig.inflight.room(), 1);
}

#[test]
fn a_completion_from_nowhere_is_noticed_and_changes_nothing() {
    let mut rig = Rig::new(4);
    rig.open(1, Operation::Flush);
    rig.issue();
    let token = rig.queue.held[0].2;
    rig.complete(Status::SUCCESS);
    let again = |rig: &mut Rig, token| {
        let completion = completion(Transfer::None, token, Status::SUCCESS);
        rig.settle(completion, Fate::Known)
    };
    assert!(!again(&mut rig, token), "its one command is complete");
    assert_eq!(rig.done(), Some((1, Outcome::Done)));
    rig.open(2, Operation::Flush);
    rig.issue();
    assert_ne!(rig.queue.held[0].2, token);
    assert!(!again(&mut rig, token), "the slot is another request's now");
    assert!(!again(&mut rig, u64::MAX));
    assert_eq!(rig.done(), None);
}

#[test]
fn giving_up_ends_what_waits_and_leaves_what_was_submitted() {
    let mut rig = Rig::new(1);
    rig.open(1, write(0, 2 * 4096));
    rig.open(2, Operation::Flush);
    rig.issue();
    rig.queue.ended = true;
    assert_eq!(rig.issue(), Some(RejectedReason::Ended));
    rig.inflight.give_up_waiting(Status::HOST_PATH_ERROR);
    let lost = Outcome::Failed(Status::HOST_PATH_ERROR);
    assert_eq!(rig.done(), Some((2, lost)));
    assert_eq!(rig.done(), None, "a command still has the memory of 1");
    rig.complete(Status::ABORTED_BY_HOST);
    assert_eq!(rig.done(), Some((1, lost)));
}

#[test]
fn storage_is_used_again() {
    let mut rig = Rig::new(8);
    for round in 0..3 {
        rig.open(round, write(0, 4 * 4096));
        rig.issue();
        for _ in 0..4 {
            rig.complete(Status::SUCCESS);
        }
        let finished = rig.inflight.take_done().unwrap();
        rig.storage.keep(finished.operation);
    }
    let mut capacities = std::iter::repeat_with(|| rig.storage.list().capacity());
    let kept = capacities.by_ref().take_while(|&c| c > 0).count();
    assert_eq!(kept, 7, "4 slices, and the request's own list each round");
}

#[test]
fn what_was_outstanding_on_a_lost_queue_pair_is_issued_again_and_done_once() {
    let mut rig = Rig::new(8);
    rig.open(1, read(8, 4096));
    rig.open(2, write(16, 4096));
    rig.open(3, Operation::Flush);
    rig.issue();
    let left = rig.lose();
    assert_eq!((left.requests, left.fences.len()), (3, 1));
    assert_eq!(rig.done(), None);
    rig.release();
    assert_eq!(rig.issue(), None);
    let again: Vec<_> = rig.queue.held.iter().map(|held| held.1.len()).collect();
    assert_eq!(again, [4096, 4096, 0], "with their memory");
    for _ in 0..3 {
        rig.complete(Status::SUCCESS);
    }
    let done: Vec<_> = std::iter::from_fn(|| rig.done()).collect();
    assert_eq!(done, [1, 2, 3].map(|guest| (guest, Outcome::Done)));
    assert_eq!(rig.inflight.take_unknown(0).requests, 0, "it is told once");
}

#[test]
fn a_request_of_which_a_part_was_lost_begins_anew_and_all_of_it_is_fenced() {
    let mut rig = Rig::new(2);
    rig.open(1, write(0, 4 * 4096));
    rig.issue();
    rig.complete(Status::SUCCESS);
    rig.issue();
    let left = rig.lose();
    let stranger = Owner {
        ring: 1,
        request: 1,
    };
    assert!(left.fences.forbid(stranger, &(0..1)) && left.fences.forbid(stranger, &(31..32)));
    assert!(!left.fences.forbid(stranger, &(32..33)));
    rig.release();
    let mut blocks = Vec::new();
    while rig.done().is_none() {
        rig.issue();
        blocks.push(rig.queue.held[0].0.slba());
        rig.complete(Status::SUCCESS);
    }
    assert_eq!(blocks, [0, 8, 16, 24]);
}

#[test]
fn a_failure_that_is_known_is_not_replayed_but_what_was_lost_beside_it_is_fenced() {
    for lost_first in [false, true] {
        let mut rig = Rig::new(2);
        rig.open(1, write(0, 2 * 4096));
        rig.issue();
        let (first, second) = (
            rig.queue.complete(Status::WRITE_FAULT),
            rig.queue.complete(Status::ABORTED_BY_HOST),
        );
        let (known, unknown) = ((first, Fate::Known), (second, Fate::Unknown));
        let order = match lost_first {
            true => [unknown, known],
            false => [known, unknown],
        };
        for (completion, fate) in order {
            assert_eq!(rig.done(), None);
            assert!(rig.settle(completion, fate));
        }
        assert_eq!(rig.done(), Some((1, Outcome::Failed(Status::WRITE_FAULT))));
        assert_eq!(rig.inflight.take_unknown(0).fences.len(), 1);
        assert!(!rig.inflight.is_waiting());
    }
}

#[test]
fn what_a_fence_holds_back_delays_nobody_and_goes_on_when_the_fence_is_gone() {
    let mut rig = Rig::new(8);
    rig.fences.add(Fence {
        slba: 0,
        blocks: 8,
        owner: None,
        generation: 1,
        deadline: 1,
    });
    rig.open(1, write(7, 4096));
    rig.open(2, write(8, 4096));
    rig.open(3, read(0, 4096));
    assert_eq!(rig.issue(), None);
    assert_eq!(rig.queue.held.len(), 2);
    assert!(!rig.inflight.is_waiting(), "rings go on being scanned");
    rig.fences = Fences::default();
    assert_eq!(rig.issue(), None);
    assert_eq!(
        rig.queue.held.len(),
        2,
        "it is looked at again when told to"
    );
    rig.inflight.fences_changed();
    assert_eq!(rig.issue(), None);
    assert_eq!(rig.queue.held[2].0.slba(), 7);
}

#[test]
fn some_can_be_given_up_where_they_wait() {
    let mut rig = Rig::new(0);
    rig.fences.add(Fence {
        slba: 0,
        blocks: 8,
        owner: None,
        generation: 1,
        deadline: 1,
    });
    rig.open(1, write(0, 4096));
    rig.open(2, read(0, 4096));
    rig.open(3, write(0, 4096));
    rig.issue();
    rig.open(4, read(0, 4096));
    let failed = |guest| Some((guest, Outcome::Failed(Status::HOST_PATH_ERROR)));
    let odd = |guest: &u32| guest % 2 == 1;
    let inflight = &mut rig.inflight;
    inflight.give_up_some(Status::HOST_PATH_ERROR, false, |&guest| guest < 3);
    assert_eq!(rig.done(), failed(1), "it was behind a fence");
    assert_eq!(rig.done(), None);
    rig.inflight.fences_changed();
    rig.inflight
        .give_up_some(Status::HOST_PATH_ERROR, true, odd);
    assert_eq!(rig.done(), failed(3));
    assert_eq!(rig.done(), None);
    assert!(rig.inflight.is_waiting());
}

/// Steps of the model below.
#[derive(Debug, Clone)]
enum Step {
    /// The guest writes so many blocks, on one of two lanes.
    Write(usize, u64, u64),
    Issue(usize),
    /// The oldest command of a lane is carried out.
    Complete(usize),
    /// The association is lost, and everything collected.
    Lose,
    /// There is another.
    Resume,
    /// The oldest of the lost associations cannot write any more.
    Expire,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = || (0..2usize, 0..40u64, 1..20u64);
    let step = prop_oneof![
        6 => place().prop_map(|(lane, first, blocks)| Step::Write(lane, first, blocks)),
        6 => (0..2usize).prop_map(Step::Issue),
        4 => (0..2usize).prop_map(Step::Complete),
        1 => Just(Step::Lose),
        2 => Just(Step::Resume),
        1 => Just(Step::Expire),
    ];
    prop::collection::vec(step, 1..120)
}

/// A disk of two lanes that loses its controller again and again.
struct Disk {
    lanes: [Rig; 2],
    /// The control plane's.
    fences: Fences,
    /// Number of the association; its deadline is its number, too.
    association: u64,
    expired: u64,
    connected: bool,
    opened: u32,
    done: u32,
    /// What a lost association may write: its number, the guest's request, and blocks.
    ghosts: Vec<(u64, u32, Range<u64>)>,
    /// Blocks by request.
    requests: Vec<Range<u64>>,
}

impl Disk {
    fn new() -> Self {
        let mut lanes = [Rig::new(3), Rig::new(3)];
        lanes[1].ring = 1;
        Self {
            lanes,
            fences: Fences::default(),
            association: 1,
            expired: 0,
            connected: true,
            opened: 0,
            done: 0,
            ghosts: Vec::new(),
            requests: Vec::new(),
        }
    }

    /// Which request a command belongs to: the test finds it by the slot in its token.
    fn guest(rig: &Rig, token: u64) -> u32 {
        let slot = &rig.inflight.slots[usize::from(parse_token(token).1)];
        slot.entry.as_ref().unwrap().guest
    }

    fn open(&mut self, lane: usize, blocks: Range<u64>, operation: Operation) {
        if self.lanes[lane].inflight.room() > 0 {
            self.lanes[lane].open(self.opened, operation);
            self.requests.push(blocks);
            self.opened += 1;
        }
    }

    fn issue(&mut self, lane: usize) -> Result<(), TestCaseError> {
        let rig = &mut self.lanes[lane];
        let before = rig.queue.held.len();
        rig.issue();
        for (_, _, token) in rig.queue.held.iter().skip(before) {
            let guest = Self::guest(rig, *token);
            let blocks = &self.requests[guest as usize];
            for (association, ghost, range) in &self.ghosts {
                let overlap = range.start < blocks.end && blocks.start < range.end;
                prop_assert!(
                    *ghost == guest || !overlap,
                    "request {guest} writes {blocks:?} while association {association} may still write \
                     {range:?} of request {ghost}"
                );
            }
        }
        Ok(())
    }

    fn lose(&mut self) {
        if !std::mem::replace(&mut self.connected, false) {
            return;
        }
        for rig in &mut self.lanes {
            for (_, _, token) in &rig.queue.held {
                let guest = Self::guest(rig, *token);
                let blocks = self.requests[guest as usize].clone();
                self.ghosts.push((self.association, guest, blocks));
            }
            let left = rig.lose();
            self.fences
                .add_all(&left.fences, self.association, self.association);
        }
    }

    fn resume(&mut self) {
        if std::mem::replace(&mut self.connected, true) {
            return;
        }
        self.association += 1;
        for rig in &mut self.lanes {
            rig.fences = self.fences.clone();
            rig.release();
        }
    }

    fn expire(&mut self) {
        // Of the association that there is, nothing is lost yet.
        let last = self.association - u64::from(self.connected);
        self.expired = (self.expired + 1).min(last);
        let expired = self.expired;
        self.ghosts
            .retain(|(association, ..)| *association > expired);
        self.fences.expire(expired);
        for rig in &mut self.lanes {
            rig.fences = self.fences.clone();
            rig.inflight.fences_changed();
        }
    }

    fn take(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Write(lane, first, blocks) => {
                let len = usize::try_from(blocks * 512).unwrap();
                self.open(lane, first..first + blocks, write(first, len));
            }
            Step::Issue(lane) if self.connected => self.issue(lane)?,
            Step::Complete(lane) if !self.lanes[lane].queue.held.is_empty() => {
                self.lanes[lane].complete(Status::SUCCESS);
            }
            Step::Issue(_) | Step::Complete(_) => {}
            Step::Lose => self.lose(),
            Step::Resume => self.resume(),
            Step::Expire => self.expire(),
        }
        for rig in &mut self.lanes {
            while let Some((_, outcome)) = rig.done() {
                prop_assert_eq!(outcome, Outcome::Done);
                self.done += 1;
            }
        }
        Ok(())
    }
}

/// Schedules of a run: 1000, or as many as PROPTEST_CASES says.
pub(super) fn schedules() -> ProptestConfig {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => ProptestConfig::default(),
        None => ProptestConfig::with_cases(1000),
    }
}

proptest! {
    #![proptest_config(schedules())]

    #[test]
    fn no_schedule_writes_where_a_lost_association_may_still_write_something_else(steps in steps()) {
        let mut disk = Disk::new();
        for step in steps {
            disk.take(step)?;
        }
        // When nothing is lost any more, everything is done, once.
        disk.resume();
        while disk.done < disk.opened {
            let before = disk.done;
            disk.expire();
            for lane in [0, 1] {
                disk.take(Step::Issue(lane))?;
                while !disk.lanes[lane].queue.held.is_empty() {
                    disk.take(Step::Complete(lane))?;
                    disk.take(Step::Issue(lane))?;
                }
            }
            let left = disk.expired + 1 < disk.association;
            prop_assert!(disk.done > before || left, "{} of {}", disk.done, disk.opened);
        }
    }
}
