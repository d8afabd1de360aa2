//! Who this machine is: host names and identifiers that stay the same from one start to the next.

use std::path::Path;

use nvmf::spec::Nqn;
use uuid::Uuid;

use super::ids::parse_uuid;

/// Namespace of the UUIDs that are derived from a name alone.
const NAME_SPACE: Uuid = Uuid::from_u128(0x8a2c_7d1e_5f0b_4c39_9d64_1b7e_a3f2_c058);
/// Before a host name in the default NQN of an exported subsystem.
const SUBNQN_PREFIX: &str = "nqn.2026-11.io.github.vhost-nvmf:";

/// What the machine says about itself.
#[derive(Debug, Clone, Default)]
pub(crate) struct Machine {
    id: Option<Uuid>,
    hostname: Option<String>,
    nvme_hostnqn: Option<Nqn>,
    nvme_hostid: Option<Uuid>,
}

/// The names under which a host connects (Base, "Host NQN" and "Host Identifier").
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostIdentity {
    /// Host NQN.
    pub(crate) nqn: Nqn,
    /// Host identifier.
    pub(crate) id: Uuid,
}

impl Machine {
    /// Reads `/etc/machine-id`, `/etc/nvme/hostnqn`, `/etc/nvme/hostid` and the host name; what is
    /// absent or not valid counts as absent, the latter with a line in the log.
    pub(crate) fn read() -> Self {
        Self::read_under(Path::new("/"))
    }

    /// A machine with this identifier and nothing else.
    #[cfg(test)]
    pub(crate) fn with_id(id: Uuid) -> Self {
        Self {
            id: Some(id),
            ..Self::default()
        }
    }

    fn read_under(root: &Path) -> Self {
        Self {
            id: read_valid(&root.join("etc/machine-id"), parse_uuid),
            hostname: read_valid(&root.join("proc/sys/kernel/hostname"), |name| {
                Ok::<_, std::convert::Infallible>(name.to_owned())
            }),
            nvme_hostnqn: read_valid(&root.join("etc/nvme/hostnqn"), str::parse::<Nqn>),
            nvme_hostid: read_valid(&root.join("etc/nvme/hostid"), parse_uuid),
        }
    }

    /// The machine's name.
    pub(crate) fn hostname(&self) -> Option<&str> {
        self.hostname.as_deref()
    }

    /// A UUID that stays the same for this machine and `purpose`; `None` when the machine has no
    /// identifier. The machine's own is not revealed by it.
    pub(crate) fn derive(&self, purpose: &[u8]) -> Option<Uuid> {
        self.id.map(|id| Uuid::new_v5(&id, purpose))
    }

    /// The NQN of an exported subsystem that was given none: from the machine's name, else from its
    /// identifier, else a new one.
    pub(crate) fn default_subnqn(&self) -> Nqn {
        self.hostname()
            .and_then(|name| Nqn::new(format!("{SUBNQN_PREFIX}{name}")).ok())
            .unwrap_or_else(|| {
                Nqn::from_uuid(self.derive(b"subsystem").unwrap_or_else(Uuid::new_v4))
            })
    }
}

impl HostIdentity {
    /// What was asked for, else what `/etc/nvme` says, else names derived from the machine, else new
    /// ones with a line in the log. Where only one of the two names is known, the other is the one that
    /// `/etc/nvme` has beside it, or follows from it: a controller may refuse one identifier under two names.
    pub(crate) fn resolve(nqn: Option<Nqn>, id: Option<Uuid>, machine: &Machine) -> Self {
        let (nqn, id) = if nqn.is_some() || id.is_some() {
            (nqn, id)
        } else {
            (machine.nvme_hostnqn.clone(), machine.nvme_hostid)
        };
        match (nqn, id) {
            (Some(nqn), Some(id)) => Self { nqn, id },
            (Some(nqn), None) => {
                let beside = machine.nvme_hostnqn.as_ref() == Some(&nqn);
                let id = machine.nvme_hostid.filter(|_| beside);
                let id = id
                    .or_else(|| uuid_of(&nqn))
                    .unwrap_or_else(|| Uuid::new_v5(&NAME_SPACE, nqn.as_str().as_bytes()));
                Self { nqn, id }
            }
            (None, Some(id)) => match &machine.nvme_hostnqn {
                Some(nqn) if machine.nvme_hostid.is_none_or(|beside| beside == id) => {
                    let nqn = nqn.clone();
                    Self { nqn, id }
                }
                _ => Self::of(id),
            },
            (None, None) => Self::of(machine.derive(b"host").unwrap_or_else(|| {
                let id = Uuid::new_v4();
                tracing::warn!(
                    hostid = %id,
                    "this machine has no identity, so it connects under a new one; \
                     give --hostnqn, or write /etc/nvme/hostnqn, to keep one"
                );
                id
            })),
        }
    }

    fn of(id: Uuid) -> Self {
        Self {
            nqn: Nqn::from_uuid(id),
            id,
        }
    }
}

/// The UUID of an NQN in UUID form.
fn uuid_of(nqn: &Nqn) -> Option<Uuid> {
    let (_, uuid) = nqn.as_str().rsplit_once(":uuid:")?;
    let uuid = parse_uuid(uuid).ok()?;
    (Nqn::from_uuid(uuid) == *nqn).then_some(uuid)
}

/// The first line of a file, parsed; `None` when there is none.
fn read_valid<T, E: std::fmt::Display>(
    path: &Path,
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> Option<T> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().next().map(str::trim).unwrap_or_default();
    if line.is_empty() {
        return None;
    }
    parse(line)
        .inspect_err(|error| tracing::warn!("{} is not used: {error}", path.display()))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: u128 = 0x6ba7_b810_9dad_41d1_80b4_00c0_4fd4_30c8;

    fn machine() -> Machine {
        Machine {
            id: Some(Uuid::from_u128(ID)),
            hostname: Some("box".to_owned()),
            ..Machine::default()
        }
    }

    fn nqn(name: &str) -> Nqn {
        Nqn::new(name).unwrap()
    }

    #[test]
    fn what_was_asked_for_comes_first() {
        let machine = Machine {
            nvme_hostnqn: Some(nqn("nqn.2026-01.org.example:file")),
            nvme_hostid: Some(Uuid::from_u128(1)),
            ..machine()
        };
        let asked = nqn("nqn.2026-01.org.example:asked");
        let id = Uuid::from_u128(2);
        assert_eq!(
            HostIdentity::resolve(Some(asked.clone()), Some(id), &machine),
            HostIdentity { nqn: asked, id }
        );
        assert_eq!(
            HostIdentity::resolve(None, None, &machine),
            HostIdentity {
                nqn: nqn("nqn.2026-01.org.example:file"),
                id: Uuid::from_u128(1)
            }
        );
    }

    #[test]
    fn one_name_gives_the_other() {
        let id = Uuid::from_u128(ID);
        let both = HostIdentity {
            nqn: Nqn::from_uuid(id),
            id,
        };
        let none = Machine::default();
        assert_eq!(HostIdentity::resolve(None, Some(id), &none), both);
        assert_eq!(
            HostIdentity::resolve(Some(Nqn::from_uuid(id)), None, &none),
            both
        );
        let named = |name| HostIdentity::resolve(Some(nqn(name)), None, &none).id;
        let first = named("nqn.2026-01.org.example:a");
        assert_eq!(first, named("nqn.2026-01.org.example:a"));
        assert_ne!(first, named("nqn.2026-01.org.example:b"));
    }

    #[test]
    fn the_name_that_is_left_out_is_the_one_beside_it_if_there_is_one() {
        let (a, b) = (nqn("nqn.2026-01.org.example:a"), Uuid::from_u128(2));
        let machine = Machine {
            nvme_hostnqn: Some(a.clone()),
            nvme_hostid: Some(b),
            ..machine()
        };
        let both = HostIdentity {
            nqn: a.clone(),
            id: b,
        };
        assert_eq!(HostIdentity::resolve(Some(a.clone()), None, &machine), both);
        assert_eq!(HostIdentity::resolve(None, Some(b), &machine), both);
        // Others have nothing to do with it.
        let other = Uuid::from_u128(3);
        let host = HostIdentity::resolve(None, Some(other), &machine);
        assert_eq!(host.nqn, Nqn::from_uuid(other));
        let host = HostIdentity::resolve(Some(nqn("nqn.2026-01.org.example:c")), None, &machine);
        assert_ne!(host.id, b);
        // A name without an identifier takes one.
        let machine = Machine {
            nvme_hostid: None,
            ..machine
        };
        let host = HostIdentity::resolve(None, Some(other), &machine);
        assert_eq!((host.nqn, host.id), (a, other));
    }

    #[test]
    fn without_any_name_the_machine_gives_the_same_one_each_time_but_not_its_own_id() {
        let host = HostIdentity::resolve(None, None, &machine());
        assert_eq!(host, HostIdentity::resolve(None, None, &machine()));
        assert_ne!(host.id, Uuid::from_u128(ID));
        assert_eq!(host.nqn, Nqn::from_uuid(host.id));
        let nowhere = Machine::default();
        assert_ne!(
            HostIdentity::resolve(None, None, &nowhere),
            HostIdentity::resolve(None, None, &nowhere)
        );
    }

    #[test]
    fn the_default_subsystem_is_named_after_the_machine() {
        assert_eq!(
            machine().default_subnqn().as_str(),
            "nqn.2026-11.io.github.vhost-nvmf:box"
        );
        let unnamed = Machine {
            hostname: None,
            ..machine()
        };
        assert_eq!(unnamed.default_subnqn(), unnamed.default_subnqn());
        assert!(uuid_of(&unnamed.default_subnqn()).is_some());
    }

    #[test]
    fn files_are_read_and_what_is_not_valid_in_them_counts_as_absent() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("etc/machine-id", "6ba7b8109dad41d180b400c04fd430c8\n");
        write("etc/nvme/hostnqn", "nqn.2026-01.org.example:host\n");
        write("etc/nvme/hostid", "nonsense\n");
        let machine = Machine::read_under(root.path());
        assert_eq!(machine.id, Some(Uuid::from_u128(ID)));
        assert_eq!(
            machine.nvme_hostnqn,
            Some(nqn("nqn.2026-01.org.example:host"))
        );
        assert_eq!(machine.nvme_hostid, None);
        assert_eq!(machine.hostname(), None);
        write("etc/machine-id", "uninitialized\n");
        assert_eq!(Machine::read_under(root.path()).id, None);
    }
}
