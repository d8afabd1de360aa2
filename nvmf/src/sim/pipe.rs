//! A connection in memory: two byte streams that split, stall, are cut, and are altered on the way.
//!
//! ```text
//! send ─▶ sent ─▶ (faults) ─▶ flying ─▶ arrived ─▶ receive
//! ```
//!
//! Nothing moves by itself: the world moves it, a random amount at a time. Readiness is announced
//! once for each change, as a kernel does to an edge-triggered poll.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::expect::{EndingIs, Expectations, Side};
use super::fault::{Fault, Interference};
use super::follower::{Follower, Step, kind};
use super::random::Random;
use crate::tcp::Digests;
use crate::transport::Ready;

/// One way of the connection, named by who sends.
struct Way {
    from: Side,
    /// Taken from the sender.
    sent: VecDeque<u8>,
    /// Most bytes that may be there.
    room: usize,
    /// The sender was refused something, and waits.
    refused: bool,
    /// Follows what the sender handed over.
    handed: Follower,
    flying: VecDeque<u8>,
    /// Follows what arrives.
    follower: Follower,
    arrived: VecDeque<u8>,
    /// The sender sends nothing more.
    shut: bool,
    /// The receiver takes nothing more.
    deaf: bool,
    /// The end of the stream has arrived.
    over: bool,
    /// A termination request has arrived: the receiver reports that.
    terminated: bool,
    readable: bool,
    writable: bool,
}

impl Way {
    fn new(from: Side, digests: Digests) -> Self {
        Self {
            from,
            sent: VecDeque::new(),
            room: 1 << 16,
            refused: false,
            handed: Follower::new(digests.header),
            flying: VecDeque::new(),
            follower: Follower::new(digests.header),
            arrived: VecDeque::new(),
            shut: false,
            deaf: false,
            over: false,
            terminated: false,
            readable: false,
            writable: false,
        }
    }

    fn has_work(&self) -> bool {
        !self.deaf
            && (!self.sent.is_empty() || !self.flying.is_empty() || (self.shut && !self.over))
    }

    /// Nothing that is under way arrives any more. A sender that waits for room has it.
    fn drop_all(&mut self) {
        self.sent.clear();
        self.flying.clear();
        if std::mem::take(&mut self.refused) {
            self.writable = true;
        }
    }

    /// The stream ends where it is.
    fn cut(&mut self) {
        self.drop_all();
        self.shut = true;
    }
}

struct Shared {
    ways: [Way; 2],
    random: Random,
    /// Sizes that a move is drawn from, in bytes.
    piece: usize,
    /// Room that a sender gets, in bytes.
    room: usize,
    interference: Interference,
    expect: Expectations,
    reset: bool,
    /// Commands that the host reported as over, and whose CIDs it did not use again.
    retired: BTreeSet<u16>,
}

/// The world's hold on a connection.
#[derive(Clone)]
pub(super) struct Pipe(Arc<Mutex<Shared>>);

/// One end of a simulated connection: stands where a socket would.
pub struct PipeEnd {
    pipe: Pipe,
    side: Side,
}

impl std::fmt::Debug for PipeEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("PipeEnd").field(&self.side).finish()
    }
}

impl Pipe {
    /// A connection on which `digests` were agreed; `piece` and `room` bound how much moves at once
    /// and how much a sender may leave, in bytes.
    pub(super) fn new(
        digests: Digests,
        fault: Fault,
        piece: usize,
        room: usize,
        mut random: Random,
    ) -> Self {
        let way = |from| Way::new(from, digests);
        Self(Arc::new(Mutex::new(Shared {
            ways: [way(Side::Host), way(Side::Controller)],
            interference: Interference::new(fault, digests, random.fork()),
            random,
            piece,
            room,
            expect: Expectations::default(),
            reset: false,
            retired: BTreeSet::new(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn end(&self, side: Side) -> PipeEnd {
        PipeEnd {
            pipe: self.clone(),
            side,
        }
    }

    /// Something can be moved that this side has sent.
    pub(super) fn has_work(&self, from: Side) -> bool {
        self.lock().ways[from.index()].has_work()
    }

    /// Moves a random amount of what this side has sent.
    pub(super) fn move_some(&self, from: Side) {
        self.lock().move_some(from);
    }

    /// Adds to `ready` what a poll would announce to this side; true when there was something.
    pub(super) fn poll(&self, side: Side, waits_to_write: bool, ready: &mut Ready) -> bool {
        let mut shared = self.lock();
        let incoming = &mut shared.ways[side.peer().index()];
        // The end of a stream stays announced, as the runtime's flag for it does.
        let mut news = std::mem::take(&mut incoming.readable) || incoming.over;
        ready.readable |= news;
        let outgoing = &mut shared.ways[side.index()];
        if waits_to_write && std::mem::take(&mut outgoing.writable) {
            ready.writable = true;
            news = true;
        }
        news
    }

    /// A poll would announce something to this side.
    pub(super) fn is_news(&self, side: Side, waits_to_write: bool) -> bool {
        let shared = self.lock();
        let incoming = &shared.ways[side.peer().index()];
        incoming.readable || incoming.over || (waits_to_write && shared.ways[side.index()].writable)
    }

    /// Both streams end where they are.
    pub(super) fn cut(&self) {
        for way in &mut self.lock().ways {
            way.cut();
        }
    }

    /// Both streams break.
    pub(super) fn reset(&self) {
        self.lock().reset();
    }

    /// The fault has happened.
    pub(super) fn fault_landed(&self) -> bool {
        self.lock().interference.landed()
    }

    /// Runs `look` with what is expected of the connection.
    pub(super) fn expect<R>(&self, look: impl FnOnce(&mut Expectations) -> R) -> R {
        look(&mut self.lock().expect)
    }

    /// The host begins a command with this CID.
    pub(super) fn begun(&self, cid: u16) {
        let mut shared = self.lock();
        shared.retired.remove(&cid);
        shared.interference.remember(cid);
    }

    /// The host gives a command up: no fault may hit it. False when one may have.
    pub(super) fn forget(&self, cid: u16) -> bool {
        self.lock().interference.forget(cid)
    }

    /// The host reports that a command is over: its memory is no longer sent from.
    pub(super) fn retired(&self, cid: u16) -> Result<(), String> {
        let mut shared = self.lock();
        shared.retired.insert(cid);
        let handed = &shared.ways[Side::Host.index()].handed;
        if !shared.reset && handed.left() > 0 && handed.header().cid() == Some(cid) {
            return Err(format!(
                "CID {cid:#x} was completed while {} bytes of its data were still to be sent",
                handed.left()
            ));
        }
        Ok(())
    }
}

impl Shared {
    fn move_some(&mut self, from: Side) {
        let piece = self.random.between(1, self.piece);
        let way = &mut self.ways[from.index()];
        let take = piece.min(way.sent.len());
        let bytes = take_front(&mut way.sent, take);
        let waiting = way.sent.len();
        let passed = self
            .interference
            .pass(from, &bytes, waiting, &mut self.expect);
        way.flying.extend(passed);
        way.room = self.random.between(1, self.room);
        if way.refused && way.sent.len() < way.room {
            way.refused = false;
            way.writable = true;
        }
        // What a fault puts into the other stream.
        let other = &mut self.ways[from.peer().index()];
        if !other.deaf {
            let forged = self.interference.take_forged(from.peer());
            other.flying.extend(forged);
        }
        self.arrive(from);
    }

    fn arrive(&mut self, from: Side) {
        let way = &mut self.ways[from.index()];
        let receiver = from.peer();
        if !way.flying.is_empty() {
            let take = self.random.between(1, self.piece).min(way.flying.len());
            let bytes = take_front(&mut way.flying, take);
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (used, _) = way.follower.step(rest);
                rest = &rest[used..];
                let header = way.follower.header();
                // The header alone says it all.
                if way.follower.is_whole() && header.is_term_req() && !way.terminated {
                    way.terminated = true;
                    let (fes, fei) = header.termination();
                    if !self.interference.forges_term_req(from) {
                        self.expect.saw_term_req(from, fes, fei);
                    }
                    self.expect
                        .may_end(receiver, EndingIs::Terminated(Some(fes)));
                }
            }
            way.arrived.extend(bytes);
            way.readable = true;
        }
        if way.shut && !way.over && way.sent.is_empty() && way.flying.is_empty() {
            way.over = true;
            way.readable = true;
            if !way.terminated {
                let how = if way.follower.at_boundary() {
                    EndingIs::Closed
                } else {
                    EndingIs::Lost
                };
                self.expect.may_end(receiver, how);
            }
        }
    }

    /// Looks at what a side hands over to be sent.
    fn hand_over(&mut self, side: Side, bytes: &[u8]) {
        let handed = &mut self.ways[side.index()].handed;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (used, step) = handed.step(rest);
            rest = &rest[used..];
            let header = handed.header();
            match (step, header.kind(), header.cid()) {
                // A capsule that was given up may leave; what it carries may not.
                (Step::Header, kind::CAPSULE_CMD | kind::H2C_DATA, Some(cid))
                    if handed.left() > 0 && self.retired.contains(&cid) =>
                {
                    let what = format!("data was sent for CID {cid:#x}, which was over");
                    self.expect.violate(what);
                }
                _ => {}
            }
        }
    }

    fn reset(&mut self) {
        self.reset = true;
        for way in &mut self.ways {
            way.cut();
            way.arrived.clear();
            way.over = true;
            way.readable = true;
            way.writable = true;
            self.expect.may_end(way.from, EndingIs::Lost);
        }
    }
}

impl PipeEnd {
    /// A descriptor that says nothing, in place of a socket's.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        static NOTHING: OnceLock<Option<File>> = OnceLock::new();
        let file = NOTHING.get_or_init(|| File::open("/dev/null").ok());
        match file {
            Some(file) => file.as_fd(),
            None => STDERR.get_or_init(io::stderr).as_fd(),
        }
    }

    /// Takes what there is room for of `len` bytes, which `copy` gives.
    pub(crate) fn send(
        &self,
        len: usize,
        copy: impl FnOnce(usize) -> Vec<u8>,
    ) -> io::Result<usize> {
        let mut guard = self.pipe.lock();
        let shared = &mut *guard;
        if shared.reset {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if shared.random.percent(1) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let way = &mut shared.ways[self.side.index()];
        if way.deaf || way.shut {
            // Nobody will read it.
            shared.hand_over(self.side, &copy(len));
            return Ok(len);
        }
        let room = way.room.saturating_sub(way.sent.len());
        way.refused = room < len;
        if way.refused {
            way.writable = false;
        }
        if room == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let bytes = copy(room.min(len));
        way.sent.extend(&bytes);
        shared.hand_over(self.side, &bytes);
        Ok(bytes.len())
    }

    /// Gives at most `most` bytes to `place`; 0 at the end of the stream.
    pub(crate) fn receive(
        &self,
        most: usize,
        place: impl FnOnce(&[u8]) -> usize,
    ) -> io::Result<usize> {
        let mut shared = self.pipe.lock();
        if shared.reset {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        if shared.random.percent(1) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let way = &mut shared.ways[self.side.peer().index()];
        if way.arrived.is_empty() {
            return if way.over {
                Ok(0)
            } else {
                Err(io::ErrorKind::WouldBlock.into())
            };
        }
        let take = most.min(way.arrived.len());
        let bytes = take_front(&mut way.arrived, take);
        Ok(place(&bytes))
    }

    /// As [`Self::shutdown`], after the last words, which leave when there is room.
    pub(crate) fn part(&self, last_words: &[u8]) {
        let mut shared = self.pipe.lock();
        let way = &mut shared.ways[self.side.index()];
        if !way.deaf && !way.shut {
            way.sent.extend(last_words);
        }
        drop(shared);
        self.shutdown();
    }

    /// Sends and receives nothing any more; what was sent still arrives.
    pub(crate) fn shutdown(&self) {
        let mut shared = self.pipe.lock();
        shared.ways[self.side.index()].shut = true;
        let incoming = &mut shared.ways[self.side.peer().index()];
        incoming.deaf = true;
        incoming.drop_all();
        incoming.arrived.clear();
    }
}

impl Drop for PipeEnd {
    fn drop(&mut self) {
        self.shutdown();
    }
}

static STDERR: OnceLock<io::Stderr> = OnceLock::new();

/// The first `len` bytes, taken out.
fn take_front(bytes: &mut VecDeque<u8>, len: usize) -> Vec<u8> {
    let (front, back) = bytes.as_slices();
    let mut taken = Vec::with_capacity(len);
    taken.extend_from_slice(&front[..len.min(front.len())]);
    taken.extend_from_slice(&back[..len - taken.len()]);
    bytes.drain(..len);
    taken
}
