//! The data path of one ring: requests out, answers in, one index and one call for a batch.

use std::fs::File;
use std::num::Wrapping;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use memdesc::Segment;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Error as RingError, Queue as Ring, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

use crate::blk::parse::{NotTaken, Parser};
use crate::blk::request::{BlkStatus, HEADER, Operation};
use crate::chain::{BrokenRing, Chain};
use crate::complaints::Complaints;
use crate::descriptors::Descriptors;
use crate::device::{Device, has};
use crate::dirty::RingLog;
use crate::generation::Generations;
use crate::inflight::{Part, Tracking};
use crate::memory::GuestMap;
use crate::token::{Claim, Token, Tokens};
use crate::used_ring::UsedRing;
use crate::vring::{MAX_RING_SIZE, RingAddresses, Signal};

/// A request of the guest.
///
/// The memory in `operation` is the guest's; it stays mapped until `token` is finished. So the
/// operation, and whatever was made from it and given to the kernel, must be gone by then.
#[derive(Debug)]
pub struct Request {
    /// Goes back with the result.
    pub token: Token,
    /// What to do.
    pub operation: Operation,
    /// It was in flight in an earlier life of the ring: it may have been carried out already, in part
    /// or whole, or may be carried out yet, by whoever had it then.
    pub recovered: bool,
    /// Its number: no other request of the device has it, and it keeps it from life to life. Of two
    /// requests of one ring, the one that was taken later has the larger number. A ring that starts with
    /// nothing to go on from ([`Queue::recovering`] is 0) may begin anew with its numbers.
    pub id: u64,
}

/// A change of a ring that runs, to be given to [`Queue::apply`].
#[derive(Debug, Clone)]
pub enum QueueUpdate {
    /// Look for requests now.
    Scan,
    /// Another descriptor to wait on, or none. Stop waiting on [`Queue::kick_fd`] before applying
    /// this, and wait on the new one after.
    Kick(Option<Arc<File>>),
    /// Another descriptor to call the driver with, or none.
    Call(Option<Signal>),
    /// Another descriptor to report a broken ring with, or none.
    Err(Option<Signal>),
    /// A new generation of guest memory.
    Memory(Arc<GuestMap>),
    /// Whether writes have to be durable before they are answered.
    WriteThrough(bool),
    /// Another log of what is written to guest memory, or none. The one before is not touched any more.
    Log(Option<RingLog>),
}

/// All that a queue is made from.
#[derive(Debug)]
pub(crate) struct QueueSetup {
    pub(crate) index: usize,
    pub(crate) device: Arc<Device>,
    pub(crate) map: Arc<GuestMap>,
    pub(crate) features: u64,
    pub(crate) size: u16,
    pub(crate) addresses: RingAddresses,
    pub(crate) base: u16,
    pub(crate) kick: Option<Arc<File>>,
    pub(crate) call: Option<Signal>,
    pub(crate) err: Option<Signal>,
    pub(crate) write_through: bool,
    pub(crate) part: Part,
    pub(crate) log: Option<RingLog>,
    pub(crate) complaints: Arc<Complaints>,
}

/// One ring that runs. Owned by one worker; it has no lock inside.
///
/// A worker scans a ring by calling [`Self::take`] until there is nothing more, finishes requests
/// as they get done, calls [`Self::flush`] once for all that it finished, and [`Self::rearm`]
/// before it goes to sleep. It scans when [`Self::kick_fd`] becomes readable (the descriptor is
/// not read: wait for edges), after each [`Self::apply`], and when `rearm` says so.
#[derive(Debug)]
pub struct Queue {
    index: usize,
    device: Arc<Device>,
    features: u64,
    ring: Ring,
    used: UsedRing,
    /// The newest generation of guest memory that holds all of the ring.
    home: Arc<GuestMap>,
    /// The newest generation does not hold the ring.
    suspended: bool,
    generations: Generations,
    tokens: Tokens,
    tracking: Tracking,
    chain: Chain,
    kick: Option<Arc<File>>,
    call: Option<Signal>,
    err: Option<Signal>,
    write_through: bool,
    /// Where writes to guest memory are marked, while they are.
    log: Option<RingLog>,
    /// The driver was asked to kick.
    armed: bool,
    /// An earlier life of the ring may have answered requests and not called the driver.
    owes_call: bool,
    broken: Option<BrokenRing>,
    complaints: Arc<Complaints>,
}

impl Queue {
    pub(crate) fn new(setup: QueueSetup) -> Result<Self, BrokenRing> {
        let layout = |_| BrokenRing::RingLayout;
        let RingAddresses {
            descriptors,
            available,
            used,
        } = setup.addresses;
        let max = u16::try_from(MAX_RING_SIZE).map_err(|_| BrokenRing::RingLayout)?;
        let mut ring = Ring::new(max).map_err(layout)?;
        ring.try_set_size(setup.size).map_err(layout)?;
        ring.try_set_desc_table_address(GuestAddress(descriptors))
            .map_err(layout)?;
        ring.try_set_avail_ring_address(GuestAddress(available))
            .map_err(layout)?;
        ring.try_set_used_ring_address(GuestAddress(used))
            .map_err(layout)?;
        let event_idx = has(setup.features, VIRTIO_RING_F_EVENT_IDX);
        ring.set_event_idx(event_idx);
        ring.set_next_avail(setup.base);
        ring.set_ready(true);
        if !ring.is_valid(&*setup.map) {
            return Err(BrokenRing::RingOutsideMemory);
        }
        let used = UsedRing::new(&setup.map, used, available, setup.size, event_idx)?;
        let tracking = Self::recover(&setup, &mut ring, used.published())?;
        // Drivers count segments against `seg_max` and not against the size of the ring when they
        // use indirect tables. A header may come byte by byte, and a status is one more.
        let seg_max = usize::try_from(setup.device.options().seg_max).unwrap_or(usize::MAX);
        let limit = usize::from(setup.size).max(seg_max.saturating_add(HEADER + 1));
        Ok(Self {
            index: setup.index,
            device: setup.device,
            features: setup.features,
            ring,
            used,
            home: Arc::clone(&setup.map),
            suspended: false,
            generations: Generations::new(setup.map),
            tokens: Tokens::new(setup.size),
            owes_call: tracking.owes_call(),
            tracking,
            chain: Chain::new(limit),
            kick: setup.kick,
            call: setup.call,
            err: setup.err,
            write_through: setup.write_through,
            log: setup.log,
            armed: true,
            broken: None,
            complaints: setup.complaints,
        })
    }

    /// Number of the ring in its device.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Becomes readable when the driver has made requests available. `None` when the front-end
    /// gave no descriptor; the ring is then scanned only when it starts or is updated. It belongs
    /// to the front-end too: its flags must stay as they are, and it need not be read.
    pub fn kick_fd(&self) -> Option<BorrowedFd<'_>> {
        self.kick.as_ref().map(|file| file.as_fd())
    }

    /// Index in the available ring of the next request to take: where the ring goes on when it
    /// starts again.
    pub fn next_avail(&self) -> u16 {
        self.ring.next_avail()
    }

    /// Requests taken and not finished.
    pub fn in_flight(&self) -> usize {
        self.generations.in_flight()
    }

    /// Why the ring is not served any more, if so.
    pub fn broken(&self) -> Option<BrokenRing> {
        self.broken
    }

    /// Changes the ring. Scan it afterwards, whatever the change was: a kick on a descriptor that
    /// was replaced may have been missed.
    pub fn apply(&mut self, update: QueueUpdate) {
        match update {
            QueueUpdate::Scan => {}
            QueueUpdate::Kick(file) => self.kick = file,
            QueueUpdate::Call(signal) => {
                self.call = signal;
                self.owes_call |= self.tracking.owes_call();
            }
            QueueUpdate::Err(signal) => self.err = signal,
            QueueUpdate::WriteThrough(on) => self.write_through = on,
            QueueUpdate::Log(log) => self.log = log,
            QueueUpdate::Memory(map) => self.replace_memory(map),
        }
    }

    /// Goes on with a new table. A front-end that changes a region removes it and adds it again;
    /// in between, the table may lack the ring itself. Nothing is taken then, and what is finished
    /// is put into the memory that the ring had.
    fn replace_memory(&mut self, map: Arc<GuestMap>) {
        self.suspended = !self.ring.is_valid(&*map);
        if self.suspended {
            let reason = BrokenRing::RingOutsideMemory;
            self.report(reason, "ring is suspended");
        } else {
            self.home = Arc::clone(&map);
        }
        self.generations.replace(map);
    }

    fn report(&self, reason: BrokenRing, state: &str) {
        if self.complaints.allow() {
            tracing::error!(ring = self.index, %reason, "{state}");
        }
        if let Some(err) = &self.err {
            err.raise();
        }
    }

    /// Takes the next request, or `None` when there is none for now. `lists` gives storage for
    /// segments: that of an earlier request, so that this one allocates nothing.
    ///
    /// Requests that need no storage, and those that cannot be carried out, are answered on the
    /// way; so flush after taking, too.
    ///
    /// # Errors
    /// Why the ring is broken; the first time it has also been logged and signalled.
    pub fn take(
        &mut self,
        lists: &mut impl FnMut() -> Vec<Segment>,
    ) -> Result<Option<Request>, BrokenRing> {
        if let Some(reason) = self.broken {
            return Err(reason);
        }
        if self.suspended {
            return Ok(None);
        }
        self.next_request(lists)
            .inspect_err(|&reason| self.break_ring(reason))
    }

    /// How many requests of the driver wait to be taken, at most as many as the ring has entries: a hint, for the
    /// driver adds to them at any time.
    #[must_use]
    pub fn waiting(&self) -> u16 {
        let available = self.ring.avail_idx(&*self.home, Ordering::Acquire);
        let next = Wrapping(self.ring.next_avail());
        available.map_or(0, |index| (index - next).0.min(self.ring.size()))
    }

    fn next_request(
        &mut self,
        lists: &mut impl FnMut() -> Vec<Segment>,
    ) -> Result<Option<Request>, BrokenRing> {
        self.disarm()?;
        // What is answered here is not published yet and counts as outstanding, so a driver cannot
        // keep the worker in this loop by feeding it.
        while let Some((id, recovered)) = self.next_chain()? {
            let status_addr = self.chain.status_addr(self.generations.current())?;
            let parser = Parser {
                chain: &self.chain,
                map: self.generations.current(),
                device: &self.device,
                features: self.features,
                write_through: self.write_through,
            };
            match parser.parse(lists) {
                Ok(operation) => {
                    let token = self.issue(status_addr, &operation)?;
                    return Ok(Some(Request {
                        token,
                        operation,
                        recovered,
                        id,
                    }));
                }
                Err(NotTaken::Answer(status, written)) => {
                    self.answer_now(status_addr, status, written)?;
                }
                Err(NotTaken::Broken(reason)) => {
                    self.mark_attempt();
                    return Err(reason);
                }
            }
        }
        Ok(None)
    }

    /// Asks the driver not to kick while the worker is looking anyway.
    fn disarm(&mut self) -> Result<(), BrokenRing> {
        if std::mem::replace(&mut self.armed, false) {
            self.ring
                .disable_notification(&*self.home)
                .map_err(ring_error)?;
            self.mark_notification();
        }
        Ok(())
    }

    /// Reads the next chain into `self.chain`. Returns the number of its request, and whether that is
    /// one of an earlier life; those come first.
    fn next_chain(&mut self) -> Result<Option<(u64, bool)>, BrokenRing> {
        let memory = &*self.home;
        if let Some((head, id)) = self.tracking.next_recovered() {
            let (table, size) = (self.ring.desc_table(), self.ring.size());
            let chain = Descriptors::new(memory, table, size, head);
            return self.chain.read(head, chain).map(|()| Some((id, true)));
        }
        // A request more than entries in the ring would also overrun the used ring.
        let full = self.tracking.held() >= usize::from(self.ring.size());
        match self.ring.iter(memory).map_err(ring_error)?.next() {
            None => Ok(None),
            Some(_) if full => Err(BrokenRing::TooManyAvailable),
            Some(chain) => {
                let head = chain.head_index();
                let id = self.tracking.take(head)?;
                self.chain.read(head, chain).map(|()| Some((id, false)))
            }
        }
    }

    /// Counts the chain in `self.chain` as in flight.
    fn issue(&mut self, status_addr: u64, operation: &Operation) -> Result<Token, BrokenRing> {
        let read = match operation {
            Operation::Read { sink, .. } => u32::try_from(sink.len()).unwrap_or(u32::MAX),
            _ => 0,
        };
        let token = self.tokens.issue(Claim {
            head: self.chain.head(),
            status_addr,
            written: read.saturating_add(1),
            generation: self.generations.number(),
        });
        let token = token.ok_or(BrokenRing::TooManyAvailable)?;
        self.generations.acquire();
        Ok(token)
    }

    /// Answers the chain in `self.chain`.
    fn answer_now(
        &mut self,
        status_addr: u64,
        status: BlkStatus,
        written: u32,
    ) -> Result<(), BrokenRing> {
        let head = self.chain.head();
        self.generations
            .current()
            .write_at(status_addr, &[status.byte()])
            .map_err(|_| BrokenRing::OutsideMemory { head })?;
        let staged = self.stage(head, written.saturating_add(1));
        self.mark_answer(status_addr, written);
        staged
    }

    /// Stages the used element of a chain.
    fn stage(&mut self, head: u16, written: u32) -> Result<(), BrokenRing> {
        self.used.stage(&self.home, head, written)?;
        self.tracking.stage(head);
        Ok(())
    }

    /// Ends a request: writes its status and stages its used element, which the guest sees after
    /// the next [`Self::flush`]. On a broken ring nothing is written.
    ///
    /// `operation` is the request's, with the memory that it came with, to which nothing may be written any
    /// more: while the front-end keeps a log of what is written to guest memory, it is marked there.
    pub fn finish(&mut self, token: Token, operation: &Operation, status: BlkStatus) {
        let Some(claim) = self.redeem(token) else {
            return;
        };
        if self.broken.is_none()
            && let Err(reason) = self.answer(claim, status)
        {
            self.break_ring(reason);
        }
        self.mark_finished(claim, operation);
        self.generations.release(claim.generation);
    }

    /// Takes a token back, if it is one of this queue's.
    fn redeem(&mut self, token: Token) -> Option<Claim> {
        let claim = self.tokens.redeem(token);
        if claim.is_none() {
            tracing::error!(ring = self.index, "a request came back to the wrong ring");
            debug_assert!(false, "a request came back to the wrong ring");
        }
        claim
    }

    fn answer(&mut self, claim: Claim, status: BlkStatus) -> Result<(), BrokenRing> {
        let head = claim.head;
        let map = self.generations.get(claim.generation);
        map.and_then(|map| map.write_at(claim.status_addr, &[status.byte()]).ok())
            .ok_or(BrokenRing::OutsideMemory { head })?;
        let written = match status {
            BlkStatus::Ok => claim.written,
            BlkStatus::IoError | BlkStatus::Unsupported => 1,
        };
        self.stage(head, written)
    }

    /// Shows the guest every answer since the last call, at once, and calls the driver if it asked
    /// for that. True when it was called.
    pub fn flush(&mut self) -> bool {
        let lost = self.tokens.take_lost();
        if lost > 0 {
            let ring = self.index;
            tracing::error!(ring, lost, "requests were dropped unfinished");
            debug_assert!(
                false,
                "{lost} requests of ring {ring} were dropped unfinished"
            );
        }
        if self.broken.is_some() {
            return false;
        }
        match self.publish() {
            Ok(wanted) => self.call_driver(wanted),
            Err(reason) => {
                self.break_ring(reason);
                false
            }
        }
    }

    /// Shows the guest what is staged. True when the driver wants a call for it.
    fn publish(&mut self) -> Result<bool, BrokenRing> {
        if self.used.unpublished() == 0 {
            return Ok(false);
        }
        let wanted = self.used.publish(&self.home);
        self.mark_published();
        let wanted = wanted?;
        self.tracking.published(self.used.published());
        Ok(wanted)
    }

    /// Calls the driver if it wants that or may have missed a call. True when it was called.
    fn call_driver(&mut self, wanted: bool) -> bool {
        let Some(call) = &self.call else {
            return false;
        };
        let due = std::mem::take(&mut self.owes_call) || wanted;
        if due {
            call.raise();
        }
        due
    }

    /// Asks the driver for a kick with its next request. True when there already is one: scan
    /// again instead of going to sleep.
    pub fn rearm(&mut self) -> bool {
        if self.broken.is_some() || self.suspended {
            return false;
        }
        self.armed = true;
        let more = self.ring.enable_notification(&*self.home);
        self.mark_notification();
        match more {
            Ok(more) => more,
            Err(error) => {
                self.break_ring(ring_error(error));
                false
            }
        }
    }

    /// Stops serving the ring for good: takes nothing more and writes nothing to it. Logs the
    /// reason and signals the front-end, the first time.
    pub fn break_ring(&mut self, reason: BrokenRing) {
        if self.broken.is_some() {
            return;
        }
        self.broken = Some(reason);
        self.device.set_broken(self.index, Some(reason));
        self.report(reason, "ring is broken");
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if self.broken.is_some() {
            self.device.set_broken(self.index, None);
        }
        let in_flight = self.in_flight();
        if in_flight > 0 {
            let ring = self.index;
            tracing::error!(ring, in_flight, "ring was dropped with requests in flight");
            self.generations.leak();
        }
    }
}

fn ring_error(error: RingError) -> BrokenRing {
    match error {
        RingError::InvalidAvailRingIndex => BrokenRing::TooManyAvailable,
        _ => BrokenRing::RingOutsideMemory,
    }
}

mod marks;
mod recovery;
#[cfg(test)]
mod tests;
