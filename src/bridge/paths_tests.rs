//! A disk of two lanes with two paths in a model: pairs end, losses are collected, fences and releases reach the lanes
//! late, and what lost associations still have is carried out at any time until they expire.

use memdesc::MemSource;
use nvmf::host::ControllerInfo;
use nvmf::spec::Cqe;
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use super::super::path_choice::EARLIER_LIFE;
use super::super::samples::{controller, namespace};
use super::tests::schedules;
use super::*;

const LANES: usize = 2;
const PATHS: usize = 2;
const BLOCKS: usize = 6;

/// Steps of the model.
#[derive(Debug, Clone)]
enum Step {
    /// The guest writes so many blocks, on one of the lanes.
    Write(usize, usize, usize),
    /// A lane submits what it can, preferably to this path.
    Issue(usize, usize),
    /// The oldest command of a lane on a path is carried out.
    Complete(usize, usize),
    /// The queue pair of a lane on a path ends; others do not know.
    End(usize, usize),
    /// The control plane notices that a path is lost, and collects.
    Lose(usize),
    /// There is another association for a path.
    Resume(usize),
    /// A lane reads the next message.
    Read(usize),
    /// Some command of a lost association is carried out.
    Late(usize),
    /// The oldest of the lost associations cannot write any more.
    Expire,
    /// The process is killed, and the next goes on with the region of requests in flight and its record.
    Crash,
    /// The control plane collects what was in flight then.
    Recover,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (lane, path) = (|| 0..LANES, || 0..PATHS);
    let step = prop_oneof![
        6 => (lane(), 0..BLOCKS, 1..5usize).prop_map(|(lane, at, len)| {
            Step::Write(lane, at, len.min(BLOCKS - at))
        }),
        8 => (lane(), path()).prop_map(|(lane, path)| Step::Issue(lane, path)),
        5 => (lane(), path()).prop_map(|(lane, path)| Step::Complete(lane, path)),
        1 => (lane(), path()).prop_map(|(lane, path)| Step::End(lane, path)),
        2 => path().prop_map(Step::Lose),
        3 => path().prop_map(Step::Resume),
        8 => lane().prop_map(Step::Read),
        1 => (0..100usize).prop_map(Step::Late),
        1 => Just(Step::Expire),
        1 => Just(Step::Crash),
        2 => Just(Step::Recover),
    ];
    prop::collection::vec(step, 1..200)
}

#[derive(Clone)]
enum Message {
    Fences(Fences, Option<u64>),
    Release(PathSet),
    Resume(usize, Fences),
}

/// A command that was submitted: of which request, and where it writes.
struct Held {
    sqe: Sqe,
    transfer: Transfer,
    token: u64,
}

struct Lane {
    inflight: Inflight<usize>,
    storage: Storage,
    fences: Fences,
    /// Commands by path.
    held: [VecDeque<Held>; PATHS],
    alive: [bool; PATHS],
    mail: VecDeque<Message>,
    /// The round of fences to be acknowledged.
    fenced: Option<u64>,
}

/// Sends to the path that is preferred, or else to the other.
struct To<'a> {
    held: &'a mut [VecDeque<Held>; PATHS],
    alive: [bool; PATHS],
    prefer: usize,
    limits: &'a Limits,
}

impl Outlet for To<'_> {
    fn choose(&mut self, _avoid: PathSet) -> Option<usize> {
        let mut order = [self.prefer, 1 - self.prefer].into_iter();
        order.find(|&path| self.alive[path] && self.held[path].len() < 3)
    }

    fn limits(&self, _path: usize) -> Option<&Limits> {
        Some(self.limits)
    }

    fn submit(
        &mut self,
        path: usize,
        sqe: Sqe,
        transfer: Transfer,
        token: u64,
    ) -> Result<(), Rejected> {
        self.held[path].push_back(Held {
            sqe,
            transfer,
            token,
        });
        Ok(())
    }
}

/// What a lost association may still carry out.
struct Ghost {
    path: usize,
    association: u64,
    request: usize,
    blocks: Range<usize>,
}

/// A request of the guest.
struct Asked {
    opened: usize,
    answered: Option<usize>,
    lane: usize,
    blocks: Range<usize>,
}

/// A write of so many blocks.
fn write(blocks: &Range<usize>) -> Operation {
    Operation::Write {
        sector: blocks.start as u64,
        source: MemSource::zeroes(blocks.len() * 512, Vec::new()),
        fua: false,
    }
}

/// A request has its name from its ring and its number.
fn owner(lane: usize, request: usize) -> Owner {
    Owner {
        ring: lane as u16,
        request: request as u64,
    }
}

struct Disk {
    limits: Limits,
    lanes: [Lane; LANES],
    /// What each block has: the request that wrote it last.
    content: [Option<usize>; BLOCKS],
    requests: Vec<Asked>,
    ghosts: Vec<Ghost>,
    time: usize,
    // The control plane's.
    associations: u64,
    number: [u64; PATHS],
    connected: [bool; PATHS],
    fences: Fences,
    /// Associations that are lost, the oldest first, and the deadline of the last.
    lost: VecDeque<u64>,
    round: u64,
    unreleased: PathSet,
    acknowledged: [u64; LANES],
    released: u64,
    /// What the region says of fences: as they were when lanes were last told of them.
    record: Fences,
    /// The number that the associations of the life before have together.
    earlier: u64,
    /// It was not collected yet.
    recovering: bool,
}

impl Lane {
    fn new() -> Self {
        Self {
            inflight: Inflight::new(6),
            storage: Storage::new(8),
            fences: Fences::default(),
            held: Default::default(),
            alive: [true; PATHS],
            mail: VecDeque::new(),
            fenced: None,
        }
    }
}

impl Disk {
    fn new() -> Self {
        let controller = ControllerInfo {
            max_transfer: Some(1024),
            ..controller()
        };
        Self {
            limits: Limits::new(&controller, &namespace(512, 1 << 20)),
            lanes: [Lane::new(), Lane::new()],
            content: [None; BLOCKS],
            requests: Vec::new(),
            ghosts: Vec::new(),
            time: 0,
            associations: 2,
            number: [1, 2],
            connected: [true; PATHS],
            fences: Fences::default(),
            lost: VecDeque::new(),
            round: 0,
            unreleased: PathSet::EMPTY,
            acknowledged: [0; LANES],
            released: 0,
            record: Fences::default(),
            earlier: 0,
            recovering: false,
        }
    }

    fn request(lane: &Lane, token: u64) -> usize {
        let slot = &lane.inflight.slots[usize::from(parse_token(token).1)];
        slot.entry.as_ref().unwrap().guest
    }

    fn blocks(held: &Held) -> Range<usize> {
        let first = usize::try_from(held.sqe.slba()).unwrap();
        first..first + held.transfer.len() / 512
    }

    fn settle(&mut self, lane: usize, path: usize, held: Held, fate: Fate) {
        let status = match fate {
            Fate::Unknown => Status::ABORTED_BY_HOST,
            _ => Status::SUCCESS,
        };
        let completion = Completion {
            token: held.token,
            cqe: Cqe::new(0, status),
            sqhd_valid: fate != Fate::Unknown,
            transferred: 0,
            transfer: held.transfer,
        };
        let Self { lanes, limits, .. } = self;
        let Lane {
            inflight, storage, ..
        } = &mut lanes[lane];
        assert!(inflight.settle(path, completion, fate, limits, storage));
    }

    /// A queue pair ends: what it has may be carried out at any time, or never.
    fn end(&mut self, lane: usize, path: usize) {
        self.lanes[lane].alive[path] = false;
        while let Some(held) = self.lanes[lane].held[path].pop_front() {
            self.ghosts.push(Ghost {
                path,
                association: self.number[path],
                request: Self::request(&self.lanes[lane], held.token),
                blocks: Self::blocks(&held),
            });
            self.settle(lane, path, held, Fate::Unknown);
        }
    }

    fn lose(&mut self, path: usize) {
        if !std::mem::replace(&mut self.connected[path], false) {
            return;
        }
        self.round += 1;
        self.unreleased.insert(path);
        let number = self.number[path];
        for lane in 0..LANES {
            // It is told in order: what was sent before is read first.
            while !self.lanes[lane].mail.is_empty() {
                self.read(lane);
            }
            self.end(lane, path);
            let left = self.lanes[lane].inflight.take_unknown(path);
            self.fences.add_all(&left.fences, number, number);
        }
        self.lost.push_back(number);
        self.fence();
    }

    /// The region knows before the lanes do.
    fn fence(&mut self) {
        self.record = self.fences.clone();
        let message = Message::Fences(self.fences.clone(), Some(self.round));
        self.tell(&message);
    }

    /// All that was not in the region is gone; all that was under way may come late.
    fn crash(&mut self) {
        self.associations += 1;
        for lane in 0..LANES {
            for path in 0..PATHS {
                self.end(lane, path);
            }
        }
        for path in 0..PATHS {
            let late = self.ghosts.iter_mut();
            // Of lost ones the record tells, except where they were not collected.
            for ghost in late.filter(|ghost| !self.lost.contains(&ghost.association)) {
                ghost.association = self.associations;
            }
            self.connected[path] = false;
        }
        self.earlier = self.associations;
        self.lost.push_back(self.earlier);
        self.fences = self.record.clone();
        self.lanes = [Lane::new(), Lane::new()];
        for lane in &mut self.lanes {
            lane.alive = [false; PATHS];
            lane.fences = self.fences.clone();
        }
        self.round += 1;
        (self.acknowledged, self.unreleased) = ([0; LANES], PathSet::EMPTY);
        let Self {
            lanes,
            limits,
            requests,
            ..
        } = self;
        for (number, request) in requests.iter().enumerate() {
            if request.answered.is_none() {
                let inflight = &mut lanes[request.lane].inflight;
                let owner = owner(request.lane, number);
                inflight.make_room(1);
                inflight
                    .open_lost(number, owner, write(&request.blocks), true, limits)
                    .expect("there is room");
            }
        }
        self.recovering = true;
    }

    /// What was in flight in the life before is collected, as of a lost path.
    fn recover(&mut self) {
        if !std::mem::take(&mut self.recovering) {
            return;
        }
        self.round += 1;
        self.unreleased.insert(EARLIER_LIFE);
        for lane in &mut self.lanes {
            let left = lane.inflight.take_unknown(EARLIER_LIFE);
            // Nothing of it comes any more when its time is over.
            if self.lost.contains(&self.earlier) {
                self.fences
                    .add_all(&left.fences, self.earlier, self.earlier);
            }
        }
        self.fence();
    }

    fn tell(&mut self, message: &Message) {
        for lane in &mut self.lanes {
            lane.mail.push_back(message.clone());
        }
    }

    fn read(&mut self, lane: usize) {
        let Self { lanes, limits, .. } = self;
        let lane = &mut lanes[lane];
        match lane.mail.pop_front() {
            Some(Message::Fences(fences, round)) => {
                lane.fences = fences;
                lane.inflight.fences_changed();
                if round.is_some() {
                    lane.inflight.note_overtaken(limits, &lane.fences);
                    lane.fenced = round;
                }
            }
            Some(Message::Release(paths)) => lane.inflight.release(paths, limits),
            Some(Message::Resume(path, fences)) => {
                lane.fences = fences;
                lane.inflight.fences_changed();
                lane.alive[path] = true;
            }
            None => {}
        }
    }

    /// Lanes acknowledge, and when all have, what was lost is released.
    fn acknowledge(&mut self) {
        for (lane, acknowledged) in self.lanes.iter_mut().zip(&mut self.acknowledged) {
            if lane.fenced.is_some() && !lane.inflight.is_overtaken() {
                *acknowledged = lane.fenced.take().unwrap();
            }
        }
        let all = self.acknowledged.iter().all(|&round| round == self.round);
        if !all || self.released == self.round {
            return;
        }
        // What lanes have told of meanwhile is collected first.
        for path in 0..PATHS {
            let ended = |lane: &Lane| {
                let coming =
                    |message: &Message| matches!(message, Message::Resume(at, _) if *at == path);
                !lane.alive[path] && !lane.mail.iter().any(coming)
            };
            if self.connected[path] && self.lanes.iter().any(ended) {
                self.lose(path);
                return;
            }
        }
        self.released = self.round;
        let message = Message::Release(std::mem::take(&mut self.unreleased));
        self.tell(&message);
    }

    fn late(&mut self, number: usize) -> Result<(), TestCaseError> {
        if self.ghosts.is_empty() {
            return Ok(());
        }
        let ghost = self.ghosts.swap_remove(number % self.ghosts.len());
        let by = ghost.request;
        for block in ghost.blocks {
            let before = self.content[block].replace(by);
            let (Some(before), Some(answered)) = (before, self.requests[by].answered) else {
                continue;
            };
            let other = &self.requests[before];
            let settled = other.answered.is_some() || other.opened > answered;
            prop_assert!(
                before == by || !settled,
                "block {block} had what request {before} wrote, and association {} of path {} replaced it by what \
                 request {by} wrote, which was answered before",
                ghost.association,
                ghost.path
            );
        }
        Ok(())
    }

    fn take(&mut self, step: Step) -> Result<(), TestCaseError> {
        self.time += 1;
        match step {
            Step::Write(lane, first, blocks) => {
                let blocks = first..first + blocks;
                let operation = write(&blocks);
                let request = self.requests.len();
                let Self { lanes, limits, .. } = self;
                let owner = owner(lane, request);
                if lanes[lane]
                    .inflight
                    .open(request, owner, operation, limits)
                    .is_ok()
                {
                    self.requests.push(Asked {
                        opened: self.time,
                        answered: None,
                        lane,
                        blocks,
                    });
                }
            }
            Step::Issue(lane, prefer) => {
                let Self { lanes, limits, .. } = self;
                let Lane {
                    inflight,
                    storage,
                    fences,
                    held,
                    alive,
                    ..
                } = &mut lanes[lane];
                let mut outlet = To {
                    held,
                    alive: *alive,
                    prefer,
                    limits,
                };
                inflight.issue(limits, fences, storage, &mut outlet);
            }
            Step::Complete(lane, path) => {
                if let Some(held) = self.lanes[lane].held[path].pop_front() {
                    let request = Self::request(&self.lanes[lane], held.token);
                    self.content[Self::blocks(&held)].fill(Some(request));
                    self.settle(lane, path, held, Fate::Known);
                }
            }
            Step::End(lane, path) => self.end(lane, path),
            Step::Lose(path) => self.lose(path),
            Step::Resume(path) if !self.connected[path] => {
                self.connected[path] = true;
                self.associations += 1;
                self.number[path] = self.associations;
                let message = Message::Resume(path, self.fences.clone());
                self.tell(&message);
            }
            Step::Resume(_) => {}
            Step::Read(lane) => self.read(lane),
            Step::Late(number) => self.late(number)?,
            Step::Crash => self.crash(),
            Step::Recover => self.recover(),
            Step::Expire => {
                if let Some(oldest) = self.lost.pop_front() {
                    self.ghosts.retain(|ghost| ghost.association != oldest);
                    self.expire(oldest);
                }
            }
        }
        self.acknowledge();
        for lane in &mut self.lanes {
            while let Some(finished) = lane.inflight.take_done() {
                prop_assert_eq!(finished.outcome, Outcome::Done);
                let request = &mut self.requests[finished.guest];
                prop_assert!(
                    request.answered.replace(self.time).is_none(),
                    "answered twice"
                );
            }
        }
        Ok(())
    }

    /// All that is to be done, again and again.
    fn go_on(&mut self, rounds: usize, expire: bool) -> Result<(), TestCaseError> {
        for _ in 0..rounds {
            self.take(Step::Recover)?;
            for path in 0..PATHS {
                let ended = self.lanes.iter().any(|lane| !lane.alive[path]);
                if ended && self.lanes.iter().all(|lane| lane.mail.is_empty()) {
                    self.take(Step::Lose(path))?;
                }
                self.take(Step::Resume(path))?;
            }
            if expire {
                self.take(Step::Expire)?;
            }
            for lane in 0..LANES {
                while !self.lanes[lane].mail.is_empty() {
                    self.take(Step::Read(lane))?;
                }
                for path in 0..PATHS {
                    self.take(Step::Issue(lane, path))?;
                    while !self.lanes[lane].held[path].is_empty() {
                        self.take(Step::Complete(lane, path))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The fences of one association, whichever was lost before.
    fn expire(&mut self, association: u64) {
        self.fences.end(association);
        self.record = self.fences.clone();
        let message = Message::Fences(self.fences.clone(), None);
        self.tell(&message);
    }
}

proptest! {
    #![proptest_config(schedules())]

    #[test]
    fn no_schedule_of_two_paths_undoes_what_was_answered(steps in steps()) {
        let mut disk = Disk::new();
        for step in steps {
            disk.take(step)?;
        }
        // What can be done before anything expires, then something new everywhere, and then all that is late.
        disk.go_on(4, false)?;
        for lane in 0..LANES {
            disk.take(Step::Write(lane, lane * BLOCKS / 2, BLOCKS / 2))?;
        }
        disk.go_on(4, false)?;
        while !disk.ghosts.is_empty() {
            disk.take(Step::Late(0))?;
        }
        // When nothing is lost any more, everything is done, once.
        disk.go_on(60, true)?;
        let unanswered = disk.requests.iter().filter(|request| request.answered.is_none());
        prop_assert_eq!(unanswered.count(), 0);
    }
}

/// What random schedules seldom come upon: a write that overlaps is under way on the other path when the replay could
/// begin, and is carried out after it.
#[test]
fn a_replay_waits_for_what_is_under_way_to_the_same_blocks_on_the_other_path() {
    let mut disk = Disk::new();
    for step in [
        Step::Write(0, 0, 2),
        Step::Issue(0, 0),
        Step::Write(1, 0, 2),
        Step::Issue(1, 1),
        Step::Lose(0),
        Step::Read(0),
        Step::Read(1),
        Step::Read(0),
        Step::Read(1),
        Step::Issue(0, 1),
        Step::Complete(0, 1),
        Step::Complete(1, 1),
        Step::Late(0),
    ] {
        disk.take(step).unwrap();
    }
    assert!(disk.requests[0].answered.is_none() && disk.requests[1].answered.is_some());
    for step in [Step::Read(0), Step::Issue(0, 1), Step::Complete(0, 1)] {
        disk.take(step).unwrap();
    }
    assert!(disk.requests[0].answered.is_some());
    assert_eq!(disk.content[..2], [Some(0); 2]);
}

#[test]
fn a_release_that_was_under_way_does_not_release_what_was_lost_since() {
    let mut disk = Disk::new();
    for step in [
        Step::Write(1, 0, 1),
        Step::Lose(1),
        Step::Resume(1),
        Step::Write(0, 0, 1),
        Step::Lose(0),
        Step::Read(0),
        Step::Issue(0, 0),
        Step::Read(1),
        Step::End(0, 1),
        Step::Resume(0),
        Step::Read(0),
        Step::Read(0),
        Step::Issue(0, 0),
    ] {
        disk.take(step).unwrap();
    }
    assert_eq!(disk.lanes[0].held[0].len(), 0, "its fence is not known yet");
}

/// What random schedules seldom come upon: a replay was answered, and then the process is killed. The record alone knows that
/// the write that was lost may come late.
#[test]
fn a_fence_of_a_request_that_was_answered_outlives_the_process() {
    let mut disk = Disk::new();
    for step in [
        Step::Write(0, 0, 1),
        Step::Issue(0, 0),
        Step::Lose(0),
        Step::Read(0),
        Step::Read(1),
        Step::Read(0),
        Step::Issue(0, 1),
        Step::Complete(0, 1),
    ] {
        disk.take(step).unwrap();
    }
    assert!(disk.requests[0].answered.is_some());
    for step in [
        Step::Crash,
        Step::Recover,
        Step::Resume(0),
        Step::Read(1),
        Step::Read(1),
        Step::Write(1, 0, 2),
        Step::Issue(1, 0),
    ] {
        disk.take(step).unwrap();
    }
    assert_eq!(disk.lanes[1].held[0].len(), 0, "it overtakes");
    disk.take(Step::Late(0)).unwrap();
    disk.go_on(4, true).unwrap();
    assert!(disk.requests[1].answered.is_some());
    assert_eq!(disk.content[..2], [Some(1); 2]);
}
