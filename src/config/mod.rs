//! What the daemon is to do, checked: a value of these types can be acted on as it is.

pub(crate) mod drain;
pub(crate) mod fabrics_conf;
pub(crate) mod fault;
pub(crate) mod identity;
pub(crate) mod ids;
pub(crate) mod locator;
pub(crate) mod plan;
pub(crate) mod powercut;
pub(crate) mod size;
pub(crate) mod spec;
pub(crate) mod uri;

use std::io;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nvmf::backend::fault::Fault;
use nvmf::host::HostOptions;
use nvmf::spec::Nqn;
use nvmf::spec::ana::AnaState;
use uuid::Uuid;

use crate::bridge::geometry::Choices;
use crate::bridge::path_choice::IoPolicy;
use crate::cli::{AttachArgs, DiskArgs, ExportArgs, ServeArgs};
use crate::endpoint::Origin;
use crate::limits::{LOCAL_QUEUE_SIZE, MAX_NAMESPACES, MAX_NR_IO_QUEUES};
use crate::reconnect::way_back::Patience;
use crate::worker::pool::Crew;
use crate::worker::throttle::Rates;
pub(crate) use drain::{Drain, DrainPolicy};
pub(crate) use identity::{HostIdentity, Machine};
pub(crate) use ids::Serial;
pub(crate) use locator::Locator;
pub(crate) use plan::{AttachPlan, Source};
pub(crate) use powercut::PowerCut;
pub(crate) use size::Size;
pub(crate) use spec::{BlockSize, Spec, Storage};
pub(crate) use uri::{DiscoveryUri, Uri, host_of_listener};

/// One remote namespace to serve as a disk.
#[derive(Debug, Clone)]
pub(crate) struct AttachConfig {
    /// Queues on offer to the guest.
    pub(crate) num_queues: u16,
    /// Serial, when it is not to follow from the namespace.
    pub(crate) serial: Option<Serial>,
    /// The guest may not write.
    pub(crate) read_only: bool,
    /// Sectors of 512 bytes, whatever the size of a block is.
    pub(crate) emulate_512: bool,
    /// What it may do in a second.
    pub(crate) rates: Rates,
    /// How long a lane looks for work before it sleeps, at most.
    pub(crate) poll_max: Duration,
    /// How rings stop.
    pub(crate) drain: Drain,
    /// How long to wait for a controller that is lost.
    pub(crate) patience: Patience,
    /// A path on which a command has no answer for so long is lost; zero waits for ever.
    pub(crate) io_timeout: Duration,
    /// How commands are spread over paths.
    pub(crate) policy: IoPolicy,
    /// Who connects, and with what queues.
    pub(crate) host: HostOptions,
    /// The namespace.
    pub(crate) uri: Uri,
}

/// Storage of this machine to serve as a disk.
#[derive(Debug, Clone)]
pub(crate) struct ServeConfig {
    /// Where VMMs come from.
    pub(crate) origin: Origin,
    /// The disk is another process's, which gives it away.
    pub(crate) takeover: bool,
    /// Who works.
    pub(crate) crew: Crew,
    /// What the user decides about the disk.
    pub(crate) choices: Choices,
    /// What it may do in a second.
    pub(crate) rates: Rates,
    /// How long a lane looks for work before it sleeps, at most.
    pub(crate) poll_max: Duration,
    /// How the embedded controller is connected to.
    pub(crate) host: HostOptions,
    /// The storage.
    pub(crate) namespace: NamespaceConfig,
}

/// A subsystem to export.
#[derive(Debug, Clone)]
pub(crate) struct ExportConfig {
    /// Where to listen, at least one address; port 0 lets the system choose.
    pub(crate) listen: Vec<SocketAddr>,
    /// Name of the subsystem.
    pub(crate) subnqn: Nqn,
    /// Hosts that may connect; `None` lets any.
    pub(crate) allowed_hosts: Option<Vec<Nqn>>,
    /// How its namespaces are reached; `None` reports nothing of the kind.
    pub(crate) ana_state: Option<AnaState>,
    /// I/O queues that one association of a host may have.
    pub(crate) io_queues: u16,
    /// Cross-Controller Resets that one controller sees to at a time; 0 is none.
    pub(crate) ccrl: u8,
    /// Who works.
    pub(crate) crew: Crew,
    /// Its namespaces, at least one, by ascending identifier from 1.
    pub(crate) namespaces: Vec<NamespaceConfig>,
}

/// A namespace to export or to serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NamespaceConfig {
    /// Namespace identifier.
    pub(crate) nsid: u32,
    /// Where the blocks are; a file's path is absolute and without symbolic links.
    pub(crate) storage: Storage,
    /// Logical block size.
    pub(crate) block_size: BlockSize,
    /// Identifier that stays the same for the same file on the same machine.
    pub(crate) uuid: Uuid,
    /// What goes wrong with the storage on purpose, in order.
    pub(crate) faults: Vec<Fault>,
    /// A volatile write cache over it.
    pub(crate) powercut: Option<PowerCut>,
}

/// What is wrong between options that are each well formed, or with what they name.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file of a namespace is not there, or not for us.
    #[error("cannot use '{}': {error}; check the path and its permissions", .path.display())]
    Unusable {
        /// Its path as written.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The path names something that holds no blocks.
    #[error("'{}' is {kind}; give a regular file or a block device", .path.display())]
    NotStorage {
        /// Its path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// A file that is not a whole number of blocks.
    #[error(
        "'{}' has {size} bytes, not a multiple of the block size {block_size} and at least one; \
         enlarge it with `truncate -s %{block_size}`, or choose another block-size=",
        .path.display()
    )]
    NotBlocks {
        /// Its path.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The block size in bytes.
        block_size: u32,
    },
    /// Two namespaces with one UUID.
    #[error(
        "{first} and {second} have the same UUID {uuid}; export each storage once, and give each \
         namespace a uuid= of its own"
    )]
    SameUuid {
        /// One of them.
        first: String,
        /// The other.
        second: String,
        /// Their UUID.
        uuid: Uuid,
    },
    /// An address twice.
    #[error("--listen {0} is given twice; keep one")]
    SameAddress(SocketAddr),
    /// Storage that is gone with its process.
    #[error("--takeover is not possible: {0}; end that process, and start this one without")]
    NotTakenOver(&'static str),
    /// Neither a socket nor storage was given, which the command line does not let pass.
    #[error("there is no socket, or nothing to serve")]
    Nothing,
    /// Too many namespaces.
    #[error("{0} namespaces are too many for one subsystem; export at most {MAX_NAMESPACES}")]
    TooManyNamespaces(usize),
}

impl AttachConfig {
    /// A namespace, attached as the options say.
    pub(crate) fn new(args: &AttachArgs, identity: &HostIdentity, uri: Uri) -> Self {
        Self {
            num_queues: args.disk.num_queues,
            serial: args.disk.serial,
            read_only: args.disk.read_only,
            emulate_512: args.disk.emulate_512,
            rates: args.disk.rates.rates(),
            poll_max: Duration::from_nanos(args.poll_max_ns.into()),
            drain: Drain {
                timeout: Duration::from_secs(args.drain_timeout.into()),
                policy: args.drain_policy,
                may_end_paths: true,
            },
            patience: Patience {
                reconnect_delay: Duration::from_secs(args.reconnect_delay.into()),
                ctrl_loss: limited(args.ctrl_loss_tmo),
                fast_io_fail: limited(args.fast_io_fail_tmo),
            },
            io_timeout: Duration::from_secs(args.io_timeout.into()),
            policy: args.iopolicy,
            host: host_options(args, identity),
            uri,
        }
    }
}

/// Who connects, and with what queues.
fn host_options(args: &AttachArgs, identity: &HostIdentity) -> HostOptions {
    let HostIdentity { nqn, id } = identity.clone();
    HostOptions {
        nr_io_queues: io_queues(args.nr_io_queues, &args.disk),
        queue_size: args.queue_size,
        keep_alive_tmo: Duration::from_secs(args.keep_alive_tmo.into()),
        hdr_digest: args.hdr_digest,
        data_digest: args.data_digest,
        local: args.local.end(),
        connect_timeout: Duration::from_secs(args.connect_timeout.into()),
        ..HostOptions::new(nqn, id)
    }
}

impl AttachConfig {
    /// What the user decides about the disk.
    pub(crate) fn choices(&self) -> Choices {
        Choices {
            num_queues: self.num_queues,
            serial: self.serial,
            read_only: self.read_only,
            emulate_512: self.emulate_512,
        }
    }
}

impl ServeConfig {
    /// Fills in what the command line left open, and looks at the file that it names.
    ///
    /// # Errors
    /// [`ConfigError`] names what cannot be served as asked.
    pub(crate) fn resolve(args: ServeArgs, machine: &Machine) -> Result<Self, ConfigError> {
        let crew = args.disk.workers.crew();
        let (Some(mut spec), Some(origin)) = (args.spec(), args.disk.socket.origin()) else {
            return Err(ConfigError::Nothing);
        };
        let mut read_only = args.disk.read_only;
        if let Storage::File {
            read_only: file, ..
        } = &mut spec.storage
        {
            *file |= read_only;
            read_only = *file;
        }
        if args.disk.takeover {
            can_be_taken_over(&spec)?;
        }
        let HostIdentity { nqn, id } = HostIdentity::resolve(None, None, machine);
        Ok(Self {
            origin,
            takeover: args.disk.takeover,
            choices: Choices {
                num_queues: args.disk.num_queues,
                serial: args.disk.serial,
                read_only,
                emulate_512: args.disk.emulate_512,
            },
            rates: args.disk.rates.rates(),
            poll_max: Duration::from_nanos(args.poll_max_ns.into()),
            host: HostOptions {
                nr_io_queues: io_queues(args.nr_io_queues, &args.disk),
                queue_size: LOCAL_QUEUE_SIZE,
                // A controller in the same process does not die on its own.
                keep_alive_tmo: Duration::ZERO,
                ..HostOptions::new(nqn, id)
            },
            crew,
            namespace: NamespaceConfig::resolve(1, spec, machine)?,
        })
    }
}

/// Two processes have the same storage.
fn can_be_taken_over(spec: &Spec) -> Result<(), ConfigError> {
    let reason = match (&spec.storage, &spec.powercut) {
        (Storage::Ram { .. }, _) => "what ram: stores is in the process that serves it",
        (_, Some(_)) => {
            "what was not flushed is in the process that serves it, because of powercut"
        }
        _ => return Ok(()),
    };
    Err(ConfigError::NotTakenOver(reason))
}

/// A number of seconds, where a negative one is no limit.
fn limited(seconds: i32) -> Option<Duration> {
    Some(Duration::from_secs(u64::try_from(seconds).ok()?))
}

/// As many I/O queue pairs as asked for, else one for each worker. Whoever changes parts of blocks has to know of every
/// write, so one lane does it all then.
fn io_queues(asked: Option<u16>, disk: &DiskArgs) -> u16 {
    let workers = || u16::try_from(disk.workers.crew().count()).unwrap_or(MAX_NR_IO_QUEUES);
    match disk.emulate_512 {
        true => 1,
        false => asked.unwrap_or_else(workers).min(MAX_NR_IO_QUEUES),
    }
}

impl ExportConfig {
    /// Fills in what the command line left open, and looks at the files that it names.
    ///
    /// # Errors
    /// [`ConfigError`] names what cannot be exported as asked.
    pub(crate) fn resolve(args: ExportArgs, machine: &Machine) -> Result<Self, ConfigError> {
        for (index, address) in args.listen.iter().enumerate() {
            if address.port() != 0 && args.listen[..index].contains(address) {
                return Err(ConfigError::SameAddress(*address));
            }
        }
        if args.specs.len() > MAX_NAMESPACES {
            return Err(ConfigError::TooManyNamespaces(args.specs.len()));
        }
        let mut namespaces: Vec<NamespaceConfig> = Vec::with_capacity(args.specs.len());
        for (nsid, spec) in (1..).zip(args.specs) {
            let namespace = NamespaceConfig::resolve(nsid, spec, machine)?;
            if let Some(other) = namespaces.iter().find(|n| n.uuid == namespace.uuid) {
                return Err(ConfigError::SameUuid {
                    first: other.to_string(),
                    second: namespace.to_string(),
                    uuid: namespace.uuid,
                });
            }
            namespaces.push(namespace);
        }
        Ok(Self {
            listen: args.listen,
            subnqn: args.subnqn.unwrap_or_else(|| machine.default_subnqn()),
            allowed_hosts: (!args.allow_host.is_empty()).then_some(args.allow_host),
            ana_state: args.ana_state,
            io_queues: args.nr_io_queues,
            ccrl: args.ccrl,
            crew: args.workers.crew(),
            namespaces,
        })
    }
}

impl NamespaceConfig {
    fn resolve(nsid: u32, spec: Spec, machine: &Machine) -> Result<Self, ConfigError> {
        let (storage, stable) = match spec.storage {
            Storage::File {
                path,
                read_only,
                direct,
            } => {
                let path = check_file(path, spec.block_size.bytes())?;
                let purpose = [b"namespace\0", path.as_os_str().as_bytes()].concat();
                let stable = machine.derive(&purpose);
                if spec.uuid.or(stable).is_none() {
                    tracing::warn!(
                        "this machine has no /etc/machine-id, so the namespace of {} gets a new UUID \
                         at every start; give it a uuid= to keep one",
                        path.display()
                    );
                }
                let storage = Storage::File {
                    path,
                    read_only,
                    direct,
                };
                (storage, stable)
            }
            other @ (Storage::Ram { .. } | Storage::Null { .. }) => (other, None),
        };
        Ok(Self {
            nsid,
            storage,
            block_size: spec.block_size,
            uuid: spec.uuid.or(stable).unwrap_or_else(Uuid::new_v4),
            faults: spec.faults,
            powercut: spec.powercut,
        })
    }
}

impl std::fmt::Display for NamespaceConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.storage {
            Storage::File { path, .. } => write!(f, "'{}'", path.display()),
            Storage::Ram { size } => write!(f, "ram:{size}"),
            Storage::Null { size } => write!(f, "null:{size}"),
        }
    }
}

/// The path without symbolic links, once it is known to hold a whole number of blocks. The size of a
/// block device is for whoever opens it to check.
fn check_file(path: PathBuf, block_size: u32) -> Result<PathBuf, ConfigError> {
    use std::os::unix::fs::FileTypeExt;

    let look = |path: &Path| {
        let canonical = path.canonicalize()?;
        let metadata = canonical.metadata()?;
        Ok((canonical, metadata))
    };
    let (canonical, metadata) = match look(&path) {
        Ok(found) => found,
        Err(error) => return Err(ConfigError::Unusable { path, error }),
    };
    let kind = metadata.file_type();
    if kind.is_block_device() {
        return Ok(canonical);
    }
    if !kind.is_file() {
        let kind = match kind {
            kind if kind.is_dir() => "a directory",
            kind if kind.is_char_device() => "a character device",
            kind if kind.is_socket() => "a socket",
            kind if kind.is_fifo() => "a pipe",
            _ => "neither a file nor a block device",
        };
        return Err(ConfigError::NotStorage { path, kind });
    }
    let size = metadata.len();
    if size == 0 || !size.is_multiple_of(block_size.into()) {
        return Err(ConfigError::NotBlocks {
            path,
            size,
            block_size,
        });
    }
    Ok(canonical)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Invocation, parse};

    const URI: &str = "nvme+tcp://h/nqn.2026-01.org.example:disk1";

    fn command_line(args: &[&str]) -> Invocation {
        let args = ["vhost-nvmf"].iter().chain(args).map(|arg| arg.into());
        parse(args).unwrap()
    }

    fn attach(args: &[&str]) -> AttachConfig {
        match command_line(&[&["attach", "--socket-path", "/s", URI], args].concat()) {
            Invocation::Attach(_, mut disks) => {
                let args = disks.pop().unwrap();
                let plan = AttachPlan::resolve(args, &Machine::default()).unwrap();
                match &plan.source {
                    Source::Paths(paths) => plan.config(paths[0].clone()),
                    Source::Search(search) => panic!("{search:?}"),
                }
            }
            other => panic!("{other:?}"),
        }
    }

    fn export_on(machine: &Machine, args: &[&str]) -> Result<ExportConfig, ConfigError> {
        match command_line(&[&["export"], args].concat()) {
            Invocation::Export(_, args) => ExportConfig::resolve(args, machine),
            other => panic!("{other:?}"),
        }
    }

    fn export(args: &[&str]) -> Result<ExportConfig, ConfigError> {
        export_on(&Machine::default(), args)
    }

    /// A file of `size` bytes in a directory of its own.
    fn file(size: u64) -> (tempfile::TempDir, String) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(size).unwrap();
        (directory, path.to_str().unwrap().to_owned())
    }

    #[test]
    fn attach_has_the_documented_defaults() {
        let config = attach(&[]);
        assert_eq!((config.num_queues, config.host.queue_size), (64, 128));
        assert_eq!(config.host.keep_alive_tmo, Duration::from_secs(5));
        assert!((1..=256).contains(&config.host.nr_io_queues));
        assert!(!config.read_only && config.serial.is_none());
        assert!(!config.host.hdr_digest && !config.host.data_digest);
    }

    #[test]
    fn a_disk_with_smaller_sectors_than_blocks_has_one_queue() {
        assert!(!attach(&[]).choices().emulate_512);
        let config = attach(&["--emulate-512"]);
        assert!(config.choices().emulate_512);
        assert_eq!(config.host.nr_io_queues, 1);
        let serve = [
            "serve",
            "--socket-path=s",
            "--emulate-512",
            "ram:1M,block-size=4096",
        ];
        let Invocation::Serve(_, mut disks) = command_line(&serve) else {
            panic!();
        };
        let config = ServeConfig::resolve(disks.remove(0), &Machine::default()).unwrap();
        assert!(config.choices.emulate_512);
        assert_eq!(config.host.nr_io_queues, 1);
    }

    #[test]
    fn attach_takes_what_it_is_given() {
        let config = attach(&[
            "--num-queues=4",
            "--nr-io-queues=2",
            "--queue-size=32",
            "--keep-alive-tmo=0",
            "--read-only",
            "--serial=disk1",
            "--hostnqn=nqn.2026-01.org.example:host",
            "--hostid=6ba7b810-9dad-41d1-80b4-00c04fd430c8",
        ]);
        assert_eq!((config.num_queues, config.host.nr_io_queues), (4, 2));
        assert_eq!(config.host.queue_size, 32);
        assert!(config.host.keep_alive_tmo.is_zero() && config.read_only);
        assert_eq!(config.serial.unwrap().to_string(), "disk1");
        assert_eq!(config.host.hostnqn.as_str(), "nqn.2026-01.org.example:host");
        assert_eq!(
            config.host.hostid.to_string(),
            "6ba7b810-9dad-41d1-80b4-00c04fd430c8"
        );
    }

    #[test]
    fn each_digest_is_asked_for_by_itself() {
        for (option, digests) in [
            ("--hdr-digest", (true, false)),
            ("--data-digest", (false, true)),
        ] {
            let host = attach(&[option]).host;
            assert_eq!((host.hdr_digest, host.data_digest), digests);
        }
    }

    #[test]
    fn export_listens_on_the_loopback_address_unless_told_otherwise() {
        let config = export(&["ram:1M"]).unwrap();
        assert_eq!(config.listen, ["127.0.0.1:4420".parse().unwrap()]);
        assert_eq!(config.allowed_hosts, None);
        let config = export(&["--listen=[::1]:0", "--listen=127.0.0.1:0", "ram:1M"]).unwrap();
        assert_eq!(config.listen.len(), 2);
        assert!(matches!(
            export(&["--listen=[::1]:1", "--listen=[::1]:1", "ram:1M"]),
            Err(ConfigError::SameAddress(_))
        ));
    }

    #[test]
    fn namespaces_are_numbered_in_order_and_ram_has_a_new_uuid_each_time() {
        let config = export(&["ram:1M", "ram:1M,block-size=4096"]).unwrap();
        let nsids: Vec<u32> = config.namespaces.iter().map(|n| n.nsid).collect();
        assert_eq!(nsids, [1, 2]);
        assert_ne!(config.namespaces[0].uuid, config.namespaces[1].uuid);
    }

    #[test]
    fn a_file_keeps_its_uuid_whatever_path_leads_to_it() {
        let machine = Machine::with_id(Uuid::from_u128(1));
        let (directory, path) = file(4096);
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let resolve = |machine, path: &str| {
            let config = export_on(machine, &[path]).unwrap();
            config.namespaces[0].clone()
        };
        let namespace = resolve(&machine, &path);
        assert_eq!(resolve(&machine, link.to_str().unwrap()), namespace);
        let other = Machine::with_id(Uuid::from_u128(2));
        assert_ne!(resolve(&other, &path).uuid, namespace.uuid);
        let chosen = Uuid::from_u128(3);
        let spec = format!("{path},uuid={chosen}");
        assert_eq!(resolve(&machine, &spec).uuid, chosen);
        assert!(matches!(
            export_on(&machine, &[&path, &path]),
            Err(ConfigError::SameUuid { .. })
        ));
    }

    #[test]
    fn what_holds_no_whole_blocks_is_refused() {
        let (directory, path) = file(512 * 3);
        export(&[&path]).unwrap();
        let spec = format!("{path},block-size=4096");
        assert!(matches!(
            export(&[&spec]),
            Err(ConfigError::NotBlocks {
                size: 1536,
                block_size: 4096,
                ..
            })
        ));
        let (_empty, path) = file(0);
        assert!(matches!(
            export(&[&path]),
            Err(ConfigError::NotBlocks { size: 0, .. })
        ));
        let directory = directory.path().to_str().unwrap();
        for (path, kind) in [
            (directory, "a directory"),
            ("/dev/null", "a character device"),
        ] {
            match export(&[path]) {
                Err(ConfigError::NotStorage { kind: found, .. }) => assert_eq!(found, kind),
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(
            export(&[&format!("{directory}/missing")]),
            Err(ConfigError::Unusable { .. })
        ));
    }
}
