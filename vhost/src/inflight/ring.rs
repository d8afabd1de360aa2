//! One ring's part of an in-flight region: which heads are in flight, since when, and which of them
//! the last batch answered.
//!
//! While a ring runs, its part is only ever written. It is read, and every byte of it is checked,
//! when the ring starts.

use std::sync::Arc;

use vm_memory::mmap::MmapRegionError;

use super::mapping::Mapping;

/// Bytes before the entries.
const HEADER: usize = 16;
/// Bytes in an entry; there is one for each descriptor.
const ENTRY: usize = 16;
/// What parts are aligned to.
pub(super) const ALIGNMENT: usize = 64;

/// The version of a part that a ring has run on. 0 is one that no ring has.
const VERSION: u16 = 1;

// Fields of the header.
const FEATURES_AT: usize = 0;
const VERSION_AT: usize = 8;
const ENTRIES_AT: usize = 10;
const LAST_BATCH_AT: usize = 12;
const USED_AT: usize = 14;

// Fields of an entry.
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

/// A counter that no ring gets to.
const COUNTER_LIMIT: u64 = 1 << 55;

/// Why a ring's part of an in-flight region cannot be what a back-end has left there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadInflight {
    /// The region was made for fewer rings.
    #[error("the in-flight region has no part for the ring")]
    NoPart,
    /// The version is not one that is known here.
    #[error("its part of the in-flight region has version {0}; only version 1 is supported")]
    Version(u16),
    /// It has features, of which none are known here.
    #[error("its part of the in-flight region has features {0:#x}; none are supported")]
    Features(u64),
    /// It has another number of entries than the front-end says.
    #[error(
        "its part of the in-flight region has {found} entries, but was handed over with {told}"
    )]
    Entries {
        /// In the part.
        found: u16,
        /// In the front-end's message.
        told: u16,
    },
    /// The ring has more descriptors than the part has entries.
    #[error("its part of the in-flight region has entries for {entries} of {size} descriptors")]
    TooSmall {
        /// In the part.
        entries: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// An entry is neither in flight nor free.
    #[error("the in-flight region has {value} for descriptor {head}, where 0 and 1 are possible")]
    Flag {
        /// The descriptor.
        head: u16,
        /// What was found.
        value: u8,
    },
    /// An entry is in flight that is no descriptor of the ring.
    #[error("the in-flight region has descriptor {head} in flight, of a ring with {size}")]
    NoDescriptor {
        /// Number of the entry.
        head: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A counter is higher than any ring gets.
    #[error("the in-flight region has counter {counter:#x} for descriptor {head}")]
    Counter {
        /// The descriptor.
        head: u16,
        /// What was found.
        counter: u64,
    },
    /// The part belongs to another state of the ring.
    #[error(
        "the in-flight region was last written at used index {region}, and the ring is at {ring}"
    )]
    UsedIndex {
        /// In the part.
        region: u16,
        /// In the ring.
        ring: u16,
    },
    /// The list of heads that were answered last leaves the ring, or meets itself.
    #[error("the in-flight region's list of the last batch is broken at descriptor {head}")]
    Batch {
        /// Where.
        head: u16,
    },
    /// The driver has not made so many requests available.
    #[error("the in-flight region has {in_flight} requests where the driver made {available}")]
    NotAvailable {
        /// In the part.
        in_flight: u16,
        /// Requests that the driver has not seen an answer to.
        available: u16,
    },
}

/// A head in flight, by its age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Aged {
    /// Its place in the order in which requests were taken.
    pub(crate) counter: u64,
    /// First descriptor of its chain.
    pub(crate) head: u16,
}

/// What a ring finds in its part.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// A ring has run on the part before.
    pub(crate) initialised: bool,
    /// Heads in flight, the oldest first.
    pub(crate) in_flight: Vec<Aged>,
    /// Counter of the next request.
    pub(crate) counter: u64,
}

/// One ring's part.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    memory: Arc<Mapping>,
    at: usize,
    entries: u16,
    kept: bool,
}

/// Bytes of a part with so many entries.
pub(super) fn part_len(entries: u16) -> usize {
    (HEADER + ENTRY * usize::from(entries)).next_multiple_of(ALIGNMENT)
}

impl Part {
    /// The part at `at`, which must lie in `memory`.
    pub(super) fn new(memory: Arc<Mapping>, at: usize, entries: u16) -> Self {
        Self {
            memory,
            at,
            entries,
            kept: true,
        }
    }

    /// A part that nobody else knows of, for a ring of `entries`.
    pub(crate) fn private(entries: u16) -> Result<Self, MmapRegionError> {
        let memory = Arc::new(Mapping::private(part_len(entries))?);
        Ok(Self {
            memory,
            at: 0,
            entries,
            kept: false,
        })
    }

    /// The front-end keeps it.
    pub(crate) fn kept(&self) -> bool {
        self.kept
    }

    fn entry(&self, head: u16) -> usize {
        self.at + HEADER + ENTRY * usize::from(head)
    }

    fn half(&self, field: usize) -> u16 {
        u16::from_le(self.memory.load(self.at + field))
    }

    fn set_half(&self, field: usize, value: u16) {
        self.memory.store(self.at + field, value.to_le());
    }

    fn flag(&self, head: u16) -> u8 {
        self.memory.load(self.entry(head))
    }

    /// When the request at `head` was last taken.
    pub(crate) fn counter(&self, head: u16) -> u64 {
        u64::from_le(self.memory.load(self.entry(head) + COUNTER_AT))
    }

    fn set_counter(&self, head: u16, counter: u64) {
        let at = self.entry(head) + COUNTER_AT;
        self.memory.store(at, counter.to_le());
    }

    /// Notes that `head` is in flight.
    pub(crate) fn take(&self, head: u16, counter: u64) {
        self.set_counter(head, counter);
        self.memory.store(self.entry(head), 1_u8);
    }

    /// Notes that `head` belongs to the batch that is shown to the driver next, behind `before`.
    pub(crate) fn link(&self, head: u16, before: u16) {
        let at = self.entry(head) + NEXT_AT;
        self.memory.store(at, before.to_le());
        self.set_half(LAST_BATCH_AT, head);
    }

    /// Notes that `head` is in flight no more.
    pub(crate) fn clear(&self, head: u16) {
        self.memory.store(self.entry(head), 0_u8);
    }

    /// Notes that all up to the used index `used` is settled.
    pub(crate) fn settle(&self, used: u16) {
        self.set_half(USED_AT, used);
    }

    /// True when no ring has run on the part.
    pub(super) fn is_fresh(&self) -> bool {
        self.half(VERSION_AT) == 0
    }

    /// Makes it one that no ring has run on.
    pub(crate) fn forget(&self) {
        self.set_half(VERSION_AT, 0);
    }

    /// Checks what does not depend on the ring.
    pub(super) fn check(&self) -> Result<(), BadInflight> {
        match self.half(VERSION_AT) {
            0 => return Ok(()),
            VERSION => {}
            version => return Err(BadInflight::Version(version)),
        }
        match u64::from_le(self.memory.load(self.at + FEATURES_AT)) {
            0 => {}
            features => return Err(BadInflight::Features(features)),
        }
        let (found, told) = (self.half(ENTRIES_AT), self.entries);
        if found != told {
            return Err(BadInflight::Entries { found, told });
        }
        Ok(())
    }

    /// Reads what an earlier life of a ring with `size` entries left, and completes what it did not
    /// get to. `used` is the ring's used index, and `available` its available one.
    ///
    /// # Errors
    /// Why the part cannot be what a back-end left; nothing was changed then.
    pub(crate) fn recover(
        &self,
        size: u16,
        used: u16,
        available: u16,
    ) -> Result<Found, BadInflight> {
        let entries = self.entries;
        if size > entries {
            return Err(BadInflight::TooSmall { entries, size });
        }
        self.check()?;
        if self.is_fresh() {
            self.initialise(used);
            return Ok(Found::default());
        }
        let mut flags = self.flags(size)?;
        let last = self.last_counter()?;
        let batch = match flags.contains(&true) {
            true => self.last_batch(&flags, used)?,
            // Whatever the batch was, it is settled.
            false => Vec::new(),
        };
        for head in &batch {
            flags[usize::from(*head)] = false;
        }
        let mut in_flight: Vec<_> = (0..size)
            .zip(&flags)
            .filter(|(_, flag)| **flag)
            .map(|(head, _)| Aged {
                counter: self.counter(head),
                head,
            })
            .collect();
        let count = u16::try_from(in_flight.len()).unwrap_or(u16::MAX);
        let unanswered = available.wrapping_sub(used);
        if count > unanswered {
            return Err(BadInflight::NotAvailable {
                in_flight: count,
                available: unanswered,
            });
        }
        for head in batch {
            self.clear(head);
        }
        self.settle(used);
        in_flight.sort_unstable();
        let counter = self.number(&mut in_flight, last);
        Ok(Found {
            initialised: true,
            in_flight,
            counter,
        })
    }

    /// Begins a part at the ring's used index: there was no batch before it. The version is written
    /// last, so a part that is begun half-way is begun again.
    fn initialise(&self, used: u16) {
        for head in 0..self.entries {
            self.clear(head);
            self.set_counter(head, 0);
        }
        self.memory.store(self.at + FEATURES_AT, 0_u64);
        self.set_half(ENTRIES_AT, self.entries);
        self.set_half(LAST_BATCH_AT, 0);
        self.set_half(USED_AT, used);
        self.set_half(VERSION_AT, VERSION);
    }

    /// Which heads of a ring with `size` entries are in flight.
    fn flags(&self, size: u16) -> Result<Vec<bool>, BadInflight> {
        let flags = (0..self.entries).map(|head| match self.flag(head) {
            0 => Ok(false),
            1 if head < size => Ok(true),
            1 => Err(BadInflight::NoDescriptor { head, size }),
            value => Err(BadInflight::Flag { head, value }),
        });
        let mut flags = flags.collect::<Result<Vec<_>, _>>()?;
        flags.truncate(usize::from(size));
        Ok(flags)
    }

    /// The highest counter of all, in flight or not.
    fn last_counter(&self) -> Result<u64, BadInflight> {
        let mut last = 0;
        for head in 0..self.entries {
            let counter = self.counter(head);
            if counter >= COUNTER_LIMIT {
                return Err(BadInflight::Counter { head, counter });
            }
            last = last.max(counter);
        }
        Ok(last)
    }

    /// The heads that were shown to the driver, but perhaps not noted as such any more.
    fn last_batch(&self, flags: &[bool], used: u16) -> Result<Vec<u16>, BadInflight> {
        let region = self.half(USED_AT);
        let count = usize::from(used.wrapping_sub(region));
        if count > flags.len() {
            return Err(BadInflight::UsedIndex { region, ring: used });
        }
        let mut seen = vec![false; flags.len()];
        let mut batch = Vec::with_capacity(count);
        let mut head = self.half(LAST_BATCH_AT);
        for _ in 0..count {
            match seen.get_mut(usize::from(head)) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(BadInflight::Batch { head }),
            }
            batch.push(head);
            head = u16::from_le(self.memory.load(self.entry(head) + NEXT_AT));
        }
        Ok(batch)
    }

    /// Gives each entry a counter of its own, above `last`, where that is not so, and returns the next
    /// one. Who comes after a kill in the middle of this finds the same order.
    fn number(&self, in_flight: &mut [Aged], last: u64) -> u64 {
        if in_flight.is_sorted_by(|a, b| a.counter < b.counter) {
            return last + 1;
        }
        let mut counter = last + in_flight.len() as u64;
        let next = counter + 1;
        for aged in in_flight.iter_mut().rev() {
            aged.counter = counter;
            self.set_counter(aged.head, counter);
            counter -= 1;
        }
        next
    }
}
