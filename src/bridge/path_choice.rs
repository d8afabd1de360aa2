//! Which of several paths the next command takes.
//!
//! The best of what is there: optimized paths first, non-optimized ones when there is nothing better, others not at
//! all. Among equals the policy decides.

use std::fmt;

use clap::ValueEnum;

use crate::limits::MAX_PATHS;

/// How a controller gets at the namespace (Base, "Asymmetric Namespace Access").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Directly; also where the controller does not tell.
    Optimized,
    /// By a detour.
    NonOptimized,
    /// Not now, but perhaps later.
    Inaccessible,
    /// Not any more.
    PersistentLoss,
    /// It is about to be one of the others.
    Change,
}

impl Access {
    /// Commands may be sent there.
    pub(crate) fn is_usable(self) -> bool {
        self.rank().is_some()
    }

    /// 0 is best; `None` is not to be used.
    fn rank(self) -> Option<u8> {
        match self {
            Self::Optimized => Some(0),
            Self::NonOptimized => Some(1),
            Self::Inaccessible | Self::PersistentLoss | Self::Change => None,
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Optimized => "optimized",
            Self::NonOptimized => "non-optimized",
            Self::Inaccessible => "inaccessible",
            Self::PersistentLoss => "persistent-loss",
            Self::Change => "change",
        })
    }
}

/// How commands are spread over paths that are equally good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum IoPolicy {
    /// One path as long as none is better
    #[default]
    Numa,
    /// Each path in turn
    RoundRobin,
    /// The path with the fewest commands under way
    QueueDepth,
}

/// Some of a disk's paths, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct PathSet(u32);

/// Stands for all paths of an earlier life, which this process never had: a number beyond those of its own.
pub(crate) const EARLIER_LIFE: usize = MAX_PATHS;

const _: () = assert!(EARLIER_LIFE < u32::BITS as usize);

impl PathSet {
    /// None.
    pub(crate) const EMPTY: Self = Self(0);

    fn bit(path: usize) -> u32 {
        u32::try_from(path)
            .ok()
            .and_then(|path| 1u32.checked_shl(path))
            .unwrap_or(0)
    }

    /// True when there is none.
    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// True when this one is among them.
    pub(crate) fn contains(self, path: usize) -> bool {
        self.0 & Self::bit(path) != 0
    }

    /// Adds one. True when it was there already.
    pub(crate) fn insert(&mut self, path: usize) -> bool {
        let before = self.contains(path);
        self.0 |= Self::bit(path);
        before
    }

    /// Takes one out. True when it was there.
    pub(crate) fn remove(&mut self, path: usize) -> bool {
        let before = self.contains(path);
        self.0 &= !Self::bit(path);
        before
    }

    /// Takes out all of these.
    pub(crate) fn remove_all(&mut self, others: Self) {
        self.0 &= !others.0;
    }
}

/// A path that is alive.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    /// Its number.
    pub(crate) path: usize,
    /// How good it is.
    pub(crate) access: Access,
    /// Commands that it takes now.
    pub(crate) room: usize,
    /// Commands under way on it.
    pub(crate) outstanding: usize,
}

/// The choice of one lane.
#[derive(Debug, Default)]
pub(crate) struct PathChoice {
    policy: IoPolicy,
    /// What was chosen last.
    last: usize,
}

impl PathChoice {
    /// By this policy.
    pub(crate) fn new(policy: IoPolicy) -> Self {
        Self { policy, last: 0 }
    }

    /// The path for the next command, preferably none of `avoid`; `None` when none can be used.
    pub(crate) fn choose(
        &mut self,
        candidates: impl Iterator<Item = Candidate>,
        avoid: PathSet,
    ) -> Option<usize> {
        let order = |candidate: &Candidate| {
            let rank = candidate.access.rank()?;
            let avoided = avoid.contains(candidate.path);
            // Turns begin behind the last one, which is last itself.
            let turn = (candidate.path + MAX_PATHS - self.last - 1) % MAX_PATHS;
            let by_policy = match self.policy {
                IoPolicy::Numa => (0, usize::from(candidate.path != self.last), candidate.path),
                IoPolicy::RoundRobin => (usize::from(candidate.room == 0), 0, turn),
                IoPolicy::QueueDepth => {
                    let full = usize::from(candidate.room == 0);
                    (full, candidate.outstanding, turn)
                }
            };
            Some((avoided, rank, by_policy))
        };
        let usable = candidates.filter_map(|candidate| Some((order(&candidate)?, candidate.path)));
        let (_, path) = usable.min()?;
        // One that is only there for a request that avoids others is not stayed on.
        if avoid.is_empty() {
            self.last = path;
        }
        Some(path)
    }
}

#[cfg(test)]
mod tests {
    use super::Access::{Change, Inaccessible, NonOptimized, Optimized, PersistentLoss};
    use super::*;

    fn candidate((path, access, room, outstanding): (usize, Access, usize, usize)) -> Candidate {
        Candidate {
            path,
            access,
            room,
            outstanding,
        }
    }

    fn idle(states: &[(usize, Access)]) -> Vec<(usize, Access, usize, usize)> {
        states
            .iter()
            .map(|&(path, access)| (path, access, 8, 0))
            .collect()
    }

    fn choose(
        choice: &mut PathChoice,
        candidates: &[(usize, Access, usize, usize)],
        avoid: &[usize],
    ) -> Option<usize> {
        let mut set = PathSet::EMPTY;
        for &path in avoid {
            set.insert(path);
        }
        choice.choose(candidates.iter().copied().map(candidate), set)
    }

    #[test]
    fn whatever_the_policy_the_best_access_decides_first() {
        for policy in [IoPolicy::Numa, IoPolicy::RoundRobin, IoPolicy::QueueDepth] {
            for (states, chosen) in [
                (&[(0, NonOptimized), (1, Optimized)][..], Some(1)),
                (&[(0, Optimized), (1, NonOptimized)], Some(0)),
                (&[(0, Inaccessible), (1, NonOptimized)], Some(1)),
                (&[(0, Change), (1, PersistentLoss), (2, Inaccessible)], None),
                (&[], None),
                (&[(3, NonOptimized)], Some(3)),
            ] {
                let mut choice = PathChoice::new(policy);
                for _ in 0..3 {
                    let found = choose(&mut choice, &idle(states), &[]);
                    assert_eq!(found, chosen, "{policy:?} {states:?}");
                }
            }
        }
    }

    #[test]
    fn numa_stays_where_it_is_until_there_is_something_better_and_goes_back_to_that() {
        let mut choice = PathChoice::new(IoPolicy::Numa);
        let steps: [(&[(usize, Access)], usize); 7] = [
            (&[(0, Optimized), (1, Optimized)], 0),
            (&[(1, Optimized)], 1),
            (&[(0, Optimized), (1, Optimized)], 1),
            (&[(0, Optimized), (1, NonOptimized)], 0),
            (&[(1, NonOptimized)], 1),
            (&[(0, NonOptimized), (1, NonOptimized)], 1),
            (&[(0, Optimized), (1, NonOptimized)], 0),
        ];
        for (states, chosen) in steps {
            assert_eq!(choose(&mut choice, &idle(states), &[]), Some(chosen));
        }
        let full = [(0, Optimized, 0, 8), (1, Optimized, 8, 0)];
        assert_eq!(choose(&mut choice, &full, &[]), Some(0));
    }

    #[test]
    fn round_robin_takes_turns_among_equals_and_passes_over_what_is_full() {
        let mut choice = PathChoice::new(IoPolicy::RoundRobin);
        let all = [
            (0, Optimized),
            (1, NonOptimized),
            (2, Optimized),
            (5, Optimized),
        ];
        let mut order = || choose(&mut choice, &idle(&all), &[]);
        assert_eq!([order(), order(), order(), order()], [2, 5, 0, 2].map(Some));
        let full = [
            (0, Optimized, 8, 0),
            (2, Optimized, 8, 0),
            (5, Optimized, 0, 8),
        ];
        assert_eq!(choose(&mut choice, &full, &[]), Some(0));
        let full = [(0, Optimized, 0, 8), (2, Optimized, 0, 8)];
        assert_eq!(choose(&mut choice, &full, &[]), Some(2));
    }

    #[test]
    fn queue_depth_takes_the_least_busy_and_takes_turns_where_that_is_the_same() {
        let mut choice = PathChoice::new(IoPolicy::QueueDepth);
        let busy = [
            (0, Optimized, 8, 3),
            (1, Optimized, 8, 1),
            (2, NonOptimized, 8, 0),
        ];
        assert_eq!(choose(&mut choice, &busy, &[]), Some(1));
        let same = [(0, Optimized, 8, 2), (1, Optimized, 8, 2)];
        assert_eq!(choose(&mut choice, &same, &[]), Some(0));
        assert_eq!(choose(&mut choice, &same, &[]), Some(1));
    }

    #[test]
    fn a_path_to_avoid_is_better_than_none_and_worse_than_any_other() {
        let mut choice = PathChoice::new(IoPolicy::Numa);
        let states = idle(&[(0, Optimized), (1, NonOptimized), (2, Inaccessible)]);
        assert_eq!(choose(&mut choice, &states, &[0]), Some(1));
        assert_eq!(choose(&mut choice, &states, &[0, 1]), Some(0));
        let states = idle(&[(0, Optimized), (1, Optimized)]);
        assert_eq!(choose(&mut choice, &states, &[0]), Some(1));
        assert_eq!(
            choose(&mut choice, &states, &[]),
            Some(0),
            "the others stay"
        );
    }

    #[test]
    fn a_set_of_paths_has_what_was_put_in() {
        let mut set = PathSet::EMPTY;
        assert!(!set.insert(0) && !set.insert(MAX_PATHS - 1));
        assert!(set.insert(0) && !set.is_empty());
        assert!(
            !set.insert(99) && !set.contains(99),
            "there is no such path"
        );
        let mut first = PathSet::EMPTY;
        first.insert(0);
        assert!(set.remove(0) && !set.remove(0));
        set.insert(0);
        set.remove_all(first);
        assert!(!set.contains(0) && set.contains(MAX_PATHS - 1));
    }
}
