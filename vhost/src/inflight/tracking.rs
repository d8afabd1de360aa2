//! A running ring's books of what it has in flight, kept in its part of the in-flight region.
//!
//! The region is not read while the ring runs: what it says could have been changed by others.

use crate::chain::BrokenRing;

use super::ring::{Aged, Found, Part};

/// Bits of a request's number that say which ring it is of.
const RING_BITS: u32 = 8;

/// See the module.
#[derive(Debug)]
pub(crate) struct Tracking {
    part: Part,
    /// Number of the ring in its device.
    ring: u64,
    /// By descriptor: the region has it in flight, and the driver has not seen an answer.
    held: Vec<bool>,
    /// How many of them are.
    count: usize,
    /// Counter of the next request.
    counter: u64,
    /// Heads answered and not shown to the driver yet, in order.
    batch: Vec<u16>,
    /// The last head of a batch, shown or not.
    linked: u16,
    /// An earlier life may have ended between answers and the call for them.
    owes_call: bool,
    /// Heads in flight since an earlier life and not taken in this one, the youngest first.
    recovered: Vec<Aged>,
}

impl Tracking {
    /// Books for a ring of `size` entries that goes on from what its part says.
    pub(crate) fn new(part: Part, ring: usize, size: u16, found: Found) -> Self {
        let mut held = vec![false; usize::from(size)];
        let mut recovered = found.in_flight;
        for aged in &recovered {
            if let Some(held) = held.get_mut(usize::from(aged.head)) {
                *held = true;
            }
        }
        recovered.reverse();
        Self {
            owes_call: found.initialised && part.kept(),
            part,
            ring: ring as u64,
            held,
            count: recovered.len(),
            counter: found.counter,
            batch: Vec::with_capacity(usize::from(size)),
            linked: 0,
            recovered,
        }
    }

    /// Requests that the driver has made available and has not seen an answer to.
    pub(crate) fn held(&self) -> usize {
        self.count
    }

    /// True when the driver may wait for a call that an earlier life owed it.
    pub(crate) fn owes_call(&self) -> bool {
        self.owes_call
    }

    /// Requests of an earlier life that were not taken yet.
    pub(crate) fn recovering(&self) -> usize {
        self.recovered.len()
    }

    /// The number of the request with this counter, which no other request of the device has.
    fn id(&self, counter: u64) -> u64 {
        counter << RING_BITS | self.ring
    }

    /// The next request of an earlier life: its head and its number.
    pub(crate) fn next_recovered(&mut self) -> Option<(u16, u64)> {
        let aged = self.recovered.pop()?;
        Some((aged.head, self.id(aged.counter)))
    }

    /// Notes the request at `head` as in flight and returns its number.
    pub(crate) fn take(&mut self, head: u16) -> Result<u64, BrokenRing> {
        match self.held.get_mut(usize::from(head)) {
            None => return Err(BrokenRing::NoDescriptor { head }),
            Some(true) => return Err(BrokenRing::HeadInFlight { head }),
            Some(held) => *held = true,
        }
        let counter = self.counter;
        self.part.take(head, counter);
        self.count += 1;
        self.counter += 1;
        Ok(self.id(counter))
    }

    /// Notes that the next batch has an answer to the request at `head`.
    pub(crate) fn stage(&mut self, head: u16) {
        self.part.link(head, self.linked);
        self.linked = head;
        self.batch.push(head);
    }

    /// Notes that the driver sees the batch, and that the used index is `used` with it.
    pub(crate) fn published(&mut self, used: u16) {
        for head in self.batch.drain(..) {
            self.part.clear(head);
            if let Some(held) = self.held.get_mut(usize::from(head)) {
                *held = false;
            }
            self.count -= 1;
        }
        self.part.settle(used);
    }

    /// Has everything that is in flight taken again, oldest first. Nothing may be in a batch, and
    /// nobody may have a request any more.
    pub(crate) fn reopen(&mut self) {
        let Self {
            part,
            held,
            recovered,
            ..
        } = self;
        recovered.clear();
        let heads = (0..).zip(held.iter()).filter(|(_, held)| **held);
        recovered.extend(heads.map(|(head, _)| Aged {
            counter: part.counter(head),
            head,
        }));
        recovered.sort_unstable();
        recovered.reverse();
    }

    /// Notes that nothing is in flight any more, answered or not. Returns how many requests will not
    /// be answered.
    pub(crate) fn forget(&mut self) -> usize {
        for (head, held) in (0..).zip(&mut self.held) {
            if std::mem::take(held) {
                self.part.clear(head);
            }
        }
        self.batch.clear();
        self.recovered.clear();
        std::mem::take(&mut self.count)
    }

    /// The front-end keeps the region.
    pub(crate) fn kept(&self) -> bool {
        self.part.kept()
    }
}
