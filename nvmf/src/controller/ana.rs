//! Asymmetric namespace access: the state of each group, its log page, and what I/O gets in it.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

use zerocopy::IntoBytes;

use super::subsystem::Namespace;
use crate::spec::Status;
use crate::spec::ana::{AnaGroupDescriptor, AnaHeader, AnaState};

/// The largest group identifier, and how many groups there can be.
pub(super) const GROUPS_MAX: u32 = 16;
/// The longest that a group is in the change state, in seconds (ANATT). What is set from outside lasts as long
/// as it is not set to something else; hosts take it that long.
pub(super) const TRANSITION_SECONDS: u8 = 10;

/// States of a subsystem's groups. The lanes read them without a lock.
#[derive(Debug)]
pub(super) struct AnaGroups {
    changes: AtomicU64,
    /// Wire values, by group less one.
    states: [AtomicU8; GROUPS_MAX as usize],
}

impl AnaGroups {
    /// All groups optimized.
    pub(super) fn new() -> Self {
        Self {
            changes: AtomicU64::new(0),
            states: std::array::from_fn(|_| AtomicU8::new(AnaState::Optimized as u8)),
        }
    }

    fn place(&self, group: u32) -> Option<&AtomicU8> {
        let index = usize::try_from(group.checked_sub(1)?).ok()?;
        self.states.get(index)
    }

    /// Sets a group's state; true when that changed anything.
    pub(super) fn set(&self, group: u32, state: AnaState) -> bool {
        let before = self
            .place(group)
            .map(|place| place.swap(state as u8, Relaxed));
        let changed = before.is_some_and(|before| before != state as u8);
        if changed {
            self.changes.fetch_add(1, Relaxed);
        }
        changed
    }

    fn wire(&self, group: u32) -> u8 {
        self.place(group).map_or(0, |place| place.load(Relaxed))
    }

    /// What a command for a namespace of the group gets.
    ///
    /// # Errors
    /// The path-related status, which a host may retry elsewhere or later.
    pub(super) fn check(&self, group: u32) -> Result<(), Status> {
        match AnaState::from_wire(self.wire(group)) {
            Some(AnaState::Inaccessible) => Err(Status::ANA_INACCESSIBLE),
            Some(AnaState::PersistentLoss) => Err(Status::ANA_PERSISTENT_LOSS),
            Some(AnaState::Change) => Err(Status::ANA_TRANSITION),
            _ => Ok(()),
        }
    }

    /// The log page: every group that has namespaces, with those unless `groups_only`.
    pub(super) fn log(&self, namespaces: &[Namespace], groups_only: bool) -> Vec<u8> {
        let mut page = vec![0; size_of::<AnaHeader>()];
        let changes = self.changes.load(Relaxed);
        let mut groups = 0u16;
        for group in 1..=GROUPS_MAX {
            let members = namespaces.iter().filter(|ns| ns.ana_group() == group);
            let nsids: Vec<u8> = members.flat_map(|ns| ns.nsid().to_le_bytes()).collect();
            if nsids.is_empty() {
                continue;
            }
            groups += 1;
            let listed: &[u8] = if groups_only { &[] } else { &nsids };
            let descriptor = AnaGroupDescriptor {
                anagrpid: group.into(),
                nnsids: (listed.len() as u32 / 4).into(),
                chgcnt: changes.into(),
                state: self.wire(group),
                reserved17: [0; 15],
            };
            page.extend_from_slice(descriptor.as_bytes());
            page.extend_from_slice(listed);
        }
        let header = AnaHeader {
            chgcnt: changes.into(),
            ngrps: groups.into(),
            reserved10: [0; 6],
        };
        page[..size_of::<AnaHeader>()].copy_from_slice(header.as_bytes());
        page
    }
}
