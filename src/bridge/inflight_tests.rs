//! Requests through the slot table, against a queue of the tests' own.

use memdesc::{MemSink, MemSource};
use nvmf::host::ControllerInfo;
use nvmf::spec::Cqe;

use super::super::samples::{controller, namespace};
use super::super::translate::Refused;
use super::*;

/// A queue that holds what was submitted until the test completes it.
#[derive(Default)]
struct Queue {
    room: usize,
    ended: bool,
    held: VecDeque<(Sqe, Transfer, u64)>,
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

    fn complete(&mut self, status: Status) -> Completion {
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

struct Rig {
    limits: Limits,
    storage: Storage,
    inflight: Inflight<u32>,
    fences: Fences,
    queue: Queue,
}

impl Rig {
    /// A table of 4 slots, a queue with room for `room`, and MDTS of 4 KiB.
    fn new(room: usize) -> Self {
        let controller = ControllerInfo {
            max_transfer: Some(4096),
            ..controller()
        };
        Self {
            limits: Limits::new(&controller, &namespace(512, 1 << 20)),
            storage: Storage::new(8),
            inflight: Inflight::new(0, 4),
            fences: Fences::default(),
            queue: Queue::with_room(room),
        }
    }

    fn open(&mut self, guest: u32, operation: Operation) {
        self.inflight
            .open(guest, operation, &self.limits)
            .expect("there is room");
    }

    fn issue(&mut self) -> Option<RejectedReason> {
        let Self {
            limits,
            storage,
            inflight,
            fences,
            queue,
        } = self;
        inflight.issue(limits, fences, storage, |sqe, transfer, token| {
            queue.submit(sqe, transfer, token)
        })
    }

    fn complete(&mut self, status: Status) {
        let completion = self.queue.complete(status);
        assert!(self.settle(completion, Fate::Known));
    }

    fn settle(&mut self, completion: Completion, fate: Fate) -> bool {
        self.inflight
            .settle(completion, fate, &self.limits, &mut self.storage)
    }

    /// The queue pair ends with all that it holds. Gives what is left of it.
    fn lose(&mut self) -> Unknown {
        while !self.queue.held.is_empty() {
            let completion = self.queue.complete(Status::ABORTED_BY_HOST);
            assert!(self.settle(completion, Fate::Unknown));
        }
        self.inflight.take_unknown()
    }

    fn done(&mut self) -> Option<(u32, Outcome)> {
        let finished = self.inflight.take_done()?;
        Some((finished.guest, finished.outcome))
    }
}

/// A write of guest memory; statics stand in for the guest's.
fn write(sector: u64, len: usize) -> Operation {
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
    let back = rig.inflight.open(9, Operation::Flush, &rig.limits);
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
