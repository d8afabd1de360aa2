//! A subsystem: its name, its namespaces, who may use it, and the controllers it has given out.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::ana::{AnaGroups, GROUPS_MAX};
use super::association::Association;
use super::notices::Notices;
use crate::backend::Backend;
use crate::spec::ana::AnaState;
use crate::spec::fabrics::CNTLID_MAX;
use crate::spec::nqn::DISCOVERY_NQN;
use crate::spec::{ControllerInstance, Nqn};

/// Largest NSID that a subsystem gives out.
pub(super) const MAX_NSID: u32 = 1024;

/// A namespace: storage with an identity.
pub struct Namespace {
    nsid: u32,
    uuid: Uuid,
    backend: Arc<dyn Backend>,
    /// 0 where the subsystem reports no access states.
    ana_group: u32,
}

impl Namespace {
    /// Namespace identifier, from 1.
    pub fn nsid(&self) -> u32 {
        self.nsid
    }

    /// Its UUID; the same 16 bytes are its NGUID.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Its ANA group; 0 where the subsystem reports no access states.
    pub(super) fn ana_group(&self) -> u32 {
        self.ana_group
    }

    /// Its storage.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }
}

/// Why a namespace was not added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NamespaceError {
    /// The NSID is not in range.
    #[error("namespace ID {0} is not between 1 and {MAX_NSID}")]
    Range(u32),
    /// The NSID is taken.
    #[error("namespace ID {0} is used twice")]
    Nsid(u32),
    /// The UUID is taken, or nil.
    #[error("UUID {0} is used twice, or nil; every namespace needs a UUID of its own")]
    Uuid(Uuid),
}

#[derive(Default)]
struct Controllers {
    last: u16,
    by_id: BTreeMap<u16, Arc<Association>>,
    /// Those that gave their CNTLIDs up while I/O queues of theirs were not gone.
    leaving: Vec<Arc<Association>>,
    /// The uniquifier that each CNTLID has had last, up to the highest that was ever in use.
    uniquifiers: Vec<u8>,
}

/// A subsystem. It is complete before a [`super::Target`] is made of it.
pub struct Subsystem {
    nqn: Nqn,
    serial: String,
    hosts: Vec<Nqn>,
    namespaces: Vec<Namespace>,
    ana: Option<AnaGroups>,
    controllers: Mutex<Controllers>,
}

impl Subsystem {
    /// An empty subsystem that any host may use. `serial` is cut to 20 printable ASCII characters.
    pub fn new(nqn: Nqn, serial: &str) -> Self {
        let printable = serial.chars().filter(|c| c.is_ascii() && !c.is_control());
        Self {
            nqn,
            serial: printable.take(20).collect(),
            hosts: Vec::new(),
            namespaces: Vec::new(),
            ana: None,
            controllers: Mutex::default(),
        }
    }

    /// Lets a host in; from the first call on, only hosts that were named.
    pub fn allow_host(&mut self, host: Nqn) {
        self.hosts.push(host);
    }

    /// Adds a namespace.
    ///
    /// # Errors
    /// [`NamespaceError`].
    pub fn add_namespace(
        &mut self,
        nsid: u32,
        uuid: Uuid,
        backend: Arc<dyn Backend>,
    ) -> Result<(), NamespaceError> {
        if !(1..=MAX_NSID).contains(&nsid) {
            return Err(NamespaceError::Range(nsid));
        }
        let Err(at) = self.namespaces.binary_search_by_key(&nsid, |ns| ns.nsid) else {
            return Err(NamespaceError::Nsid(nsid));
        };
        if uuid.is_nil() || self.namespaces.iter().any(|ns| ns.uuid == uuid) {
            return Err(NamespaceError::Uuid(uuid));
        }
        let namespace = Namespace {
            nsid,
            uuid,
            backend,
            ana_group: u32::from(self.ana.is_some()),
        };
        self.namespaces.insert(at, namespace);
        Ok(())
    }

    /// Has the subsystem report asymmetric namespace access: all namespaces are in group 1 unless
    /// [`Self::set_ana_group`] says otherwise, and all groups are optimized.
    pub fn report_ana(&mut self) {
        self.ana = Some(AnaGroups::new());
        for namespace in &mut self.namespaces {
            namespace.ana_group = 1;
        }
    }

    /// Puts a namespace into an ANA group, 1 to 16. False when there is no such namespace or group, or access
    /// states are not reported.
    pub fn set_ana_group(&mut self, nsid: u32, group: u32) -> bool {
        let place = self.find(nsid).filter(|_| self.ana.is_some());
        match place {
            Some(place) if (1..=GROUPS_MAX).contains(&group) => {
                self.namespaces[place].ana_group = group;
                true
            }
            _ => false,
        }
    }

    /// Changes how the namespaces of an ANA group can be reached through the controllers of this subsystem,
    /// and reports that to their hosts. Without effect where access states are not reported.
    pub fn set_ana_state(&self, group: u32, state: AnaState) {
        let changed = self.ana.as_ref().is_some_and(|it| it.set(group, state));
        if changed {
            self.report(Notices::ana);
        }
    }

    /// Takes over what the storage of its namespaces has grown by, and reports that to the hosts.
    pub fn grow(&self) {
        for namespace in &self.namespaces {
            let nsid = namespace.nsid;
            match namespace.backend.grow() {
                Ok(true) => {
                    let blocks = namespace.backend.geometry().block_count;
                    tracing::info!(subsystem = %self.nqn, nsid, blocks, "the namespace has grown");
                    self.report(|notices| notices.namespace(nsid));
                }
                Ok(false) => {}
                Err(error) => tracing::warn!(
                    subsystem = %self.nqn, nsid,
                    "the size of the namespace's storage cannot be read: {error}"
                ),
            }
        }
    }

    /// Has every controller report something.
    pub(super) fn report(&self, change: impl Fn(&mut Notices)) {
        let all: Vec<_> = self.controllers().by_id.values().cloned().collect();
        for association in all {
            association.report(&change);
        }
    }

    pub(super) fn ana(&self) -> Option<&AnaGroups> {
        self.ana.as_ref()
    }

    /// Its name.
    pub fn nqn(&self) -> &Nqn {
        &self.nqn
    }

    /// Its serial number.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// Its namespaces, by ascending NSID.
    pub fn namespaces(&self) -> &[Namespace] {
        &self.namespaces
    }

    /// The place of a namespace in [`Self::namespaces`].
    pub(super) fn find(&self, nsid: u32) -> Option<usize> {
        let found = self.namespaces.binary_search_by_key(&nsid, |ns| ns.nsid);
        found.ok()
    }

    /// True when some write may be lost without a flush.
    pub(super) fn has_volatile_cache(&self) -> bool {
        let mut all = self.namespaces.iter();
        all.any(|ns| ns.backend.geometry().volatile_cache)
    }

    /// True for the subsystem that lists the others.
    pub(super) fn is_discovery(&self) -> bool {
        self.nqn.as_str() == DISCOVERY_NQN
    }

    pub(super) fn allows(&self, host: &Nqn) -> bool {
        self.hosts.is_empty() || self.hosts.contains(host)
    }

    fn controllers(&self) -> MutexGuard<'_, Controllers> {
        // Every change is a single insertion or removal.
        self.controllers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the controller that `make` makes a CNTLID: the next free one after the last that was
    /// given out, so that a late Connect for a controller that is gone does not find its successor.
    pub(super) fn register(
        &self,
        make: impl FnOnce(u16, u8) -> Association,
    ) -> Option<Arc<Association>> {
        let mut controllers = self.controllers();
        let mut id = controllers.last;
        for _ in 0..CNTLID_MAX {
            id = if id >= CNTLID_MAX { 1 } else { id + 1 };
            let Controllers {
                by_id, uniquifiers, ..
            } = &mut *controllers;
            if let Entry::Vacant(free) = by_id.entry(id) {
                let last = uniquifiers.get(usize::from(id)).copied().unwrap_or(0);
                let association = Arc::new(make(id, last));
                free.insert(Arc::clone(&association));
                controllers.last = id;
                return Some(association);
            }
        }
        None
    }

    pub(super) fn unregister(&self, cntlid: u16) {
        let mut controllers = self.controllers();
        let Some(association) = controllers.by_id.remove(&cntlid) else {
            return;
        };
        let index = usize::from(cntlid);
        if controllers.uniquifiers.len() <= index {
            controllers.uniquifiers.resize(index + 1, 0);
        }
        controllers.uniquifiers[index] = association.instance().ciu;
        controllers.leaving.retain(|leaving| leaving.queues() > 0);
        if association.queues() > 0 {
            controllers.leaving.push(association);
        }
    }

    /// The controller that ran or runs as this, as long as it has I/O queues or is connected.
    pub(super) fn running(&self, instance: ControllerInstance) -> Option<Arc<Association>> {
        let controllers = self.controllers();
        let present = controllers.by_id.get(&instance.cntlid);
        let mut all = present.into_iter().chain(&controllers.leaving);
        all.find(|association| association.instance() == instance)
            .cloned()
    }

    /// The controller with this CNTLID, unless its association is over.
    pub(super) fn controller(&self, cntlid: u16) -> Option<Arc<Association>> {
        let found = self.controllers().by_id.get(&cntlid).cloned();
        found.filter(|association| !association.is_over())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::RamBackend;

    fn ram() -> Arc<dyn Backend> {
        Arc::new(RamBackend::new(1 << 20, 512).unwrap())
    }

    #[test]
    fn namespaces_are_kept_in_order_and_have_one_identity_each() {
        let mut subsystem = Subsystem::new(Nqn::new("nqn.2026-01.org.example:s").unwrap(), "1");
        let (a, b) = (Uuid::from_u128(1), Uuid::from_u128(2));
        subsystem.add_namespace(5, a, ram()).unwrap();
        subsystem.add_namespace(2, b, ram()).unwrap();
        let nsids: Vec<u32> = subsystem.namespaces().iter().map(Namespace::nsid).collect();
        assert_eq!(nsids, [2, 5]);
        let again = subsystem.add_namespace(5, Uuid::from_u128(3), ram());
        assert_eq!(again, Err(NamespaceError::Nsid(5)));
        let again = subsystem.add_namespace(6, a, ram());
        assert_eq!(again, Err(NamespaceError::Uuid(a)));
        let zero = subsystem.add_namespace(0, Uuid::from_u128(3), ram());
        assert_eq!(zero, Err(NamespaceError::Range(0)));
        assert_eq!((subsystem.find(5), subsystem.find(3)), (Some(1), None));
    }

    #[test]
    fn a_serial_is_cut_to_what_the_field_holds() {
        let nqn = Nqn::new("nqn.2026-01.org.example:s").unwrap();
        let subsystem = Subsystem::new(nqn, "äabc\ndefghijklmnopqrstuvwxyz");
        assert_eq!(subsystem.serial(), "abcdefghijklmnopqrst");
    }
}
