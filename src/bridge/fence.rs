//! Fences: block ranges that a lost association may still write to, and who may write there meanwhile.
//!
//! A write that was handed to a queue pair and not completed is of unknown fate: the controller may carry it out
//! long after the connection is gone. Replayed as it was it does no harm. But whatever else writes to the same
//! blocks must wait until the old one cannot be carried out any more, or the guest would find later data
//! replaced by earlier. See `docs/adr/0007-lost-controllers.md`.
//!
//! The records are plain numbers, without references and without a clock, so that they can be kept outside the
//! process.

use std::ops::Range;

/// Records that one disk keeps. More are merged: a fence becomes wider then, and is never dropped.
pub(crate) const MAX_FENCES: usize = 4096;

/// The number of an earlier life's associations: all of them, as one.
pub(crate) const EARLIER: u64 = 0;
/// Instead of the number of an association: several may still write there, or one that nobody knows. Only time ends
/// such a fence.
pub(crate) const SEVERAL: u64 = u64::MAX;

/// A request of a disk, as long as the front-end keeps its region of requests in flight: longer than a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    /// The ring that it is on.
    pub(crate) ring: u16,
    /// Its number there.
    pub(crate) request: u64,
}

/// One range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fence {
    /// First block.
    pub(crate) slba: u64,
    /// Blocks, at least 1.
    pub(crate) blocks: u64,
    /// The request whose writes they are, and which may write there again; `None` when several were merged.
    pub(crate) owner: Option<Owner>,
    /// The association that may still write, counted from 1; [`EARLIER`] or [`SEVERAL`].
    pub(crate) generation: u64,
    /// When it cannot any more, in milliseconds of the owner's clock.
    pub(crate) deadline: u64,
}

impl Fence {
    fn end(&self) -> u64 {
        self.slba.saturating_add(self.blocks)
    }

    fn overlaps(&self, blocks: &Range<u64>) -> bool {
        self.slba < blocks.end && blocks.start < self.end()
    }

    /// Both, and what is between.
    fn merged(self, other: Self) -> Self {
        let slba = self.slba.min(other.slba);
        Self {
            slba,
            blocks: self.end().max(other.end()) - slba,
            owner: self.owner.filter(|_| self.owner == other.owner),
            generation: if self.generation == other.generation {
                self.generation
            } else {
                SEVERAL
            },
            deadline: self.deadline.max(other.deadline),
        }
    }
}

/// The fences of a disk, or those that one lane adds to them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fences(Vec<Fence>);

impl Fences {
    /// Adds a range. Empty ones are none.
    pub(crate) fn add(&mut self, fence: Fence) {
        if fence.blocks == 0 {
            return;
        }
        if self.0.len() >= MAX_FENCES {
            self.halve();
        }
        self.0.push(fence);
    }

    /// Adds the ranges of another set, as those of association `generation`, in force until `deadline`.
    pub(crate) fn add_all(&mut self, other: &Self, generation: u64, deadline: u64) {
        for &fence in &other.0 {
            self.add(Fence {
                generation,
                deadline,
                ..fence
            });
        }
    }

    /// True when `owner` must not write to these blocks now.
    pub(crate) fn forbid(&self, owner: Owner, blocks: &Range<u64>) -> bool {
        let forbids = |fence: &Fence| fence.owner != Some(owner) && fence.overlaps(blocks);
        self.0.iter().any(forbids)
    }

    /// Requests have other numbers from now on: none is an owner any more.
    pub(crate) fn disown(&mut self) {
        for fence in &mut self.0 {
            fence.owner = None;
        }
    }

    /// The same, of the requests of one ring. True when some were.
    pub(crate) fn disown_ring(&mut self, ring: usize) -> bool {
        let mut any = false;
        for fence in &mut self.0 {
            let owned = fence.owner.filter(|owner| usize::from(owner.ring) == ring);
            if owned.is_some() {
                fence.owner = None;
                any = true;
            }
        }
        any
    }

    /// Each of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Fence> {
        self.0.iter()
    }

    /// As few as these, each as wide as has to be: at least 1.
    pub(crate) fn squeeze(&mut self, most: usize) {
        while self.0.len() > most.max(1) {
            self.halve();
        }
    }

    /// True when nothing is fenced.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Ranges.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The next time that one expires.
    pub(crate) fn next_deadline(&self) -> Option<u64> {
        self.0.iter().map(|fence| fence.deadline).min()
    }

    /// Takes out what has expired at `now`. True when there was something.
    pub(crate) fn expire(&mut self, now: u64) -> bool {
        let before = self.0.len();
        self.0.retain(|fence| fence.deadline > now);
        self.0.len() < before
    }

    /// Takes out those of one association, which cannot write any more. Gives how many there were.
    pub(crate) fn end(&mut self, generation: u64) -> usize {
        let before = self.0.len();
        let ended = |fence: &Fence| fence.generation == generation && generation != SEVERAL;
        self.0.retain(|fence| !ended(fence));
        before - self.0.len()
    }

    /// Half as many, each as wide as two neighbours and what is between them.
    fn halve(&mut self) {
        self.0.sort_unstable_by_key(|fence| fence.slba);
        let merge = |pair: &[Fence]| {
            let [first, rest @ ..] = pair else {
                return None;
            };
            Some(rest.iter().fold(*first, |all, &next| all.merged(next)))
        };
        self.0 = self.0.chunks(2).filter_map(merge).collect();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fence(slba: u64, blocks: u64, request: u64, deadline: u64) -> Fence {
        Fence {
            slba,
            blocks,
            owner: Some(Owner { ring: 0, request }),
            generation: 1,
            deadline,
        }
    }

    const STRANGER: Owner = Owner {
        ring: 1,
        request: 0,
    };

    #[test]
    fn a_fence_holds_back_everybody_but_its_owner_until_it_expires() {
        let mut fences = Fences::default();
        fences.add(fence(10, 5, 7, 100));
        let owner = Owner {
            ring: 0,
            request: 7,
        };
        let same_number_elsewhere = Owner {
            ring: 1,
            request: 7,
        };
        for (blocks, held) in [
            (0..10, false),
            (9..11, true),
            (14..20, true),
            (15..16, false),
        ] {
            assert_eq!(fences.forbid(STRANGER, &blocks), held, "{blocks:?}");
            assert_eq!(fences.forbid(same_number_elsewhere, &blocks), held);
            assert!(!fences.forbid(owner, &blocks));
        }
        assert_eq!(fences.next_deadline(), Some(100));
        assert!(!fences.expire(99));
        assert!(fences.forbid(STRANGER, &(10..11)));
        assert!(fences.expire(100));
        assert!(fences.is_empty() && !fences.forbid(STRANGER, &(10..11)));
    }

    #[test]
    fn two_requests_of_unknown_fate_that_overlap_hold_each_other_back() {
        let mut fences = Fences::default();
        fences.add(fence(0, 8, 1, 100));
        fences.add(fence(4, 8, 2, 100));
        for request in [1, 2] {
            assert!(fences.forbid(Owner { ring: 0, request }, &(4..8)));
        }
    }

    #[test]
    fn what_an_association_leaves_ends_with_it_and_what_was_merged_with_another_s_does_not() {
        let of = |generation, slba| Fence {
            generation,
            ..fence(slba, 4, slba, 100)
        };
        let mut fences = Fences::default();
        for fence in [of(1, 0), of(1, 8), of(2, 16), of(3, 24), of(SEVERAL, 40)] {
            fences.add(fence);
        }
        assert_eq!(fences.end(4), 0);
        fences.halve();
        assert_eq!(fences.end(2) + fences.end(3) + fences.end(SEVERAL), 0);
        assert!(fences.forbid(STRANGER, &(17..18)) && fences.forbid(STRANGER, &(25..26)));
        assert_eq!(fences.end(1), 1);
        assert!(!fences.forbid(STRANGER, &(0..12)));
        assert_eq!(fences.len(), 2);
    }

    #[test]
    fn too_many_become_fewer_and_wider_and_none_is_lost() {
        let mut fences = Fences::default();
        for at in 0..3 * MAX_FENCES as u64 {
            fences.add(fence(at * 100, 1, at, at));
            assert!(fences.len() <= MAX_FENCES);
        }
        for at in 0..3 * MAX_FENCES as u64 {
            assert!(fences.forbid(STRANGER, &(at * 100..at * 100 + 1)), "{at}");
        }
        fences.add(fence(u64::MAX - 1, u64::MAX, 0, 5));
        assert!(fences.forbid(STRANGER, &(u64::MAX - 1..u64::MAX)));
    }

    proptest! {
        /// The model remembers every range as it was added.
        #[test]
        fn whatever_was_added_and_has_not_expired_is_forbidden_to_others(
            added in prop::collection::vec((0..200u64, 1..20u64, 0..6u64, 0..50u64), 0..60),
            halvings in 0..3usize,
            now in 0..50u64,
            (start, blocks) in (0..220u64, 1..20u64),
            request in 0..6u64,
        ) {
            let mut fences = Fences::default();
            for &(slba, blocks, request, deadline) in &added {
                fences.add(fence(slba, blocks, request, deadline));
            }
            for _ in 0..halvings {
                fences.halve();
            }
            fences.expire(now);
            let must_wait = added.iter().any(|&(slba, count, owner, deadline)| {
                deadline > now && owner != request && slba < start + blocks && start < slba + count
            });
            let owner = Owner { ring: 0, request };
            let forbidden = fences.forbid(owner, &(start..start + blocks));
            if halvings == 0 {
                prop_assert_eq!(forbidden, must_wait);
            } else {
                prop_assert!(forbidden || !must_wait);
            }
        }
    }
}
