//! What is remembered of a disk from one start to the next: enough to offer it while its target is away.
//!
//! One small JSON file for each disk, in a directory that belongs to this daemon. It is replaced as a whole, and
//! one that makes no sense counts as absent.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nvmf::host::{
    ControllerInfo, DeallocateLimits, EventSupport, Liveness, LocalEnd, NamespaceInfo, OptimalIo,
    TargetAddress,
};
use nvmf::spec::identify::oncs;
use nvmf::spec::{NSID_ALL, Nqn};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::limits::NR_IO_QUEUES;

/// The form of the files.
const VERSION: u32 = 1;
/// Bytes of a file, at most.
const FILE_MAX: u64 = 64 << 10;
/// Ways that are remembered, at most.
const WAYS_MAX: usize = 64;
/// Namespace of the UUIDs that files are named by.
const NAME_SPACE: Uuid = Uuid::from_u128(0x1c1f_7a52_93d8_4f0e_b1a6_5d2e_08c4_77e9);
/// Where system services keep their state.
const SYSTEM: &str = "/var/lib/vhost-nvmf";

/// A disk, as it was when its controller was last connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remembered {
    /// Its namespace.
    pub(crate) namespace: NamespaceInfo,
    /// I/O queue pairs that were granted, at least 1.
    pub(crate) io_queues: u16,
    /// The ways to its subsystem, the one that was used first; at least one.
    pub(crate) ways: Vec<TargetAddress>,
}

/// A directory of remembered disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StateDirectory(PathBuf);

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use '{}' for --state-dir: {error}; check that it is a directory that can be written to", .path.display())]
pub(crate) struct StateError {
    path: PathBuf,
    error: io::Error,
}

/// What a file holds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    /// What the disk was asked for as.
    disk: String,
    subnqn: String,
    ways: Vec<Way>,
    io_queues: u16,
    nsid: u32,
    block_size: u32,
    block_count: u64,
    uuid: Option<Uuid>,
    nguid: Option<String>,
    eui64: Option<String>,
    write_granularity: Option<u32>,
    write_size: Option<u32>,
    deallocate_granularity: Option<u32>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Way {
    host: String,
    port: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host_traddr: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    host_iface: Option<String>,
}

impl Remembered {
    /// A controller that could have it. Nothing of it is used before there is one: whatever it can do, requests
    /// wait for that.
    pub(crate) fn controller(&self, subnqn: &Nqn) -> ControllerInfo {
        ControllerInfo {
            address: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            subnqn: subnqn.clone(),
            cntlid: 0,
            version: 0,
            serial: String::new(),
            model: String::new(),
            firmware: String::new(),
            max_transfer: None,
            in_capsule_limit: 0,
            max_queue_entries: 2,
            oncs: oncs::DATASET_MANAGEMENT | oncs::WRITE_ZEROES,
            volatile_write_cache: true,
            max_write_zeroes: None,
            deallocate: DeallocateLimits::default(),
            retry_delays: Default::default(),
            liveness: Liveness::default(),
            cmic: 0,
            ana: None,
            instance: None,
            cross_resets: 0,
            extended_log: false,
            events: EventSupport::default(),
        }
    }
}

impl StateDirectory {
    /// The directory that was asked for, which is made when it is not there; without one that of the service
    /// manager (`STATE_DIRECTORY`), `/var/lib/vhost-nvmf` where it is there and can be written to, or
    /// `vhost-nvmf` in `XDG_STATE_HOME`; else none.
    ///
    /// # Errors
    /// [`StateError`] when what was asked for cannot be written to.
    pub(crate) fn open(asked: Option<&Path>) -> Result<Option<Self>, StateError> {
        if let Some(path) = asked {
            return match usable(path) {
                Ok(()) => Ok(Some(Self(path.to_owned()))),
                Err(error) => Err(StateError {
                    path: path.to_owned(),
                    error,
                }),
            };
        }
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        // There may be several, separated by colons.
        let service = variable("STATE_DIRECTORY")
            .and_then(|paths| Some(PathBuf::from(paths.to_str()?.split(':').next()?)));
        let system = Some(PathBuf::from(SYSTEM)).filter(|path| path.is_dir());
        let user = variable("XDG_STATE_HOME").map(|home| Path::new(&home).join("vhost-nvmf"));
        let candidates = [service, system, user].into_iter().flatten();
        Ok(candidates
            .filter(|path| path.is_absolute())
            .find(|path| usable(path).is_ok())
            .map(Self))
    }

    /// What is remembered of a disk.
    pub(crate) fn load(&self, disk: &str) -> Option<Remembered> {
        let path = self.path(disk);
        let mut text = String::new();
        match File::open(&path).and_then(|file| file.take(FILE_MAX).read_to_string(&mut text)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!("'{}' is not used: {error}", path.display());
                return None;
            }
        }
        let record = serde_json::from_str(&text).map_err(|error| error.to_string());
        match record.and_then(|record: Record| record.check(disk)) {
            Ok(remembered) => Some(remembered),
            Err(reason) => {
                tracing::warn!("'{}' is not used: {reason}", path.display());
                None
            }
        }
    }

    /// Remembers a disk in place of what was remembered of it. A failure is a line in the log: the disk is
    /// served all the same.
    pub(crate) fn store(&self, disk: &str, remembered: &Remembered) {
        let path = self.path(disk);
        let record = Record::new(disk, remembered);
        let stored = serde_json::to_string_pretty(&record)
            .map_err(io::Error::other)
            .and_then(|text| replace(&path, &text));
        if let Err(error) = stored {
            tracing::warn!(
                "cannot write '{}', so the disk is not offered while its target is away: {error}",
                path.display()
            );
        }
    }

    fn path(&self, disk: &str) -> PathBuf {
        let name = Uuid::new_v5(&NAME_SPACE, disk.as_bytes());
        self.0.join(format!("{name}.json"))
    }
}

impl Record {
    fn new(disk: &str, remembered: &Remembered) -> Self {
        let Remembered {
            namespace,
            io_queues,
            ways,
        } = remembered;
        let subnqn = ways.first().map(|way| way.subnqn.to_string());
        let way = |way: &TargetAddress| Way {
            host: way.host.clone(),
            port: way.port,
            host_traddr: way.local.address,
            host_iface: way.local.interface.clone(),
        };
        Self {
            version: VERSION,
            disk: disk.to_owned(),
            subnqn: subnqn.unwrap_or_default(),
            ways: ways.iter().take(WAYS_MAX).map(way).collect(),
            io_queues: *io_queues,
            nsid: namespace.nsid,
            block_size: namespace.block_size,
            block_count: namespace.block_count,
            uuid: namespace.uuid,
            nguid: namespace
                .nguid
                .map(|id| format!("{:032x}", u128::from_be_bytes(id))),
            eui64: namespace
                .eui64
                .map(|id| format!("{:016x}", u64::from_be_bytes(id))),
            write_granularity: namespace.optimal.write_granularity,
            write_size: namespace.optimal.write_size,
            deallocate_granularity: namespace.optimal.deallocate_granularity,
        }
    }

    /// What it says, if that can be.
    fn check(self, disk: &str) -> Result<Remembered, String> {
        if self.version != VERSION {
            return Err(format!("its version is {}", self.version));
        }
        if self.disk != disk {
            return Err(format!("it is of {}", self.disk));
        }
        let subnqn = Nqn::new(self.subnqn).map_err(|error| format!("subnqn: {error}"))?;
        let blocks = self.block_size.is_power_of_two() && (512..=65536).contains(&self.block_size);
        let bytes = self.block_count.checked_mul(self.block_size.into());
        if !blocks || bytes.is_none_or(|bytes| bytes == 0) {
            let (count, size) = (self.block_count, self.block_size);
            return Err(format!("{count} blocks of {size} bytes"));
        }
        if self.nsid == 0 || self.nsid == NSID_ALL {
            return Err(format!("nsid {}", self.nsid));
        }
        if !NR_IO_QUEUES.contains(&self.io_queues.into()) {
            return Err(format!("io_queues {}", self.io_queues));
        }
        if self.ways.is_empty() || self.ways.len() > WAYS_MAX {
            return Err(format!("{} ways", self.ways.len()));
        }
        let nguid = hex(self.nguid, |text| u128::from_str_radix(text, 16))?;
        let eui64 = hex(self.eui64, |text| u64::from_str_radix(text, 16))?;
        let ways = self.ways.into_iter().map(|way| TargetAddress {
            host: way.host,
            port: way.port,
            subnqn: subnqn.clone(),
            local: LocalEnd {
                address: way.host_traddr,
                interface: way.host_iface,
            },
        });
        Ok(Remembered {
            ways: ways.collect(),
            io_queues: self.io_queues,
            namespace: NamespaceInfo {
                nsid: self.nsid,
                block_size: self.block_size,
                block_count: self.block_count,
                uuid: self.uuid,
                nguid: nguid.map(u128::to_be_bytes),
                eui64: eui64.map(u64::to_be_bytes),
                write_protected: false,
                deallocated_reads_zero: false,
                write_zeroes_deallocates: false,
                anagrpid: 0,
                optimal: OptimalIo {
                    write_granularity: self.write_granularity,
                    write_size: self.write_size,
                    deallocate_granularity: self.deallocate_granularity,
                    ..OptimalIo::default()
                },
            },
        })
    }
}

fn hex<T, E>(
    text: Option<String>,
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> Result<Option<T>, String> {
    match text {
        None => Ok(None),
        Some(text) => match parse(&text) {
            Ok(id) => Ok(Some(id)),
            Err(_) => Err(format!("identifier {text}")),
        },
    }
}

/// Whether files can be made in a directory, which is made when it is not there.
fn usable(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    let probe = path.join(format!(".probe.{}", std::process::id()));
    create(&probe)?;
    fs::remove_file(&probe)
}

/// Puts a file in the place of another: whoever looks sees the one or the other, also after a loss of power.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension(format!("{}.new", std::process::id()));
    let written = create(&new).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    let replaced = written.and_then(|()| fs::rename(&new, path));
    if replaced.is_err() {
        // It may not even be there.
        let _ = fs::remove_file(&new);
        return replaced;
    }
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

/// A file for us alone; one that an earlier process of our number left is emptied.
fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: &str = "nqn.2026-01.org.example:disk1?nsid=1";

    fn remembered() -> Remembered {
        let way = |host: &str| TargetAddress {
            host: host.to_owned(),
            port: 4420,
            subnqn: Nqn::new("nqn.2026-01.org.example:disk1").unwrap(),
            local: LocalEnd::default(),
        };
        Remembered {
            namespace: NamespaceInfo {
                nsid: 1,
                block_size: 4096,
                block_count: 1 << 20,
                uuid: Some(Uuid::from_u128(1)),
                nguid: Some([0x0f; 16]),
                eui64: Some([0x01; 8]),
                write_protected: false,
                deallocated_reads_zero: false,
                write_zeroes_deallocates: false,
                anagrpid: 0,
                optimal: OptimalIo {
                    write_granularity: Some(8),
                    ..OptimalIo::default()
                },
            },
            io_queues: 4,
            ways: vec![
                way("192.0.2.1"),
                TargetAddress {
                    local: LocalEnd {
                        address: Some("fd00::2".parse().unwrap()),
                        interface: Some("eth1".to_owned()),
                    },
                    ..way("fd00::1")
                },
            ],
        }
    }

    fn directory() -> (tempfile::TempDir, StateDirectory) {
        let root = tempfile::tempdir().unwrap();
        let asked = root.path().join("a/b");
        let state = StateDirectory::open(Some(&asked)).unwrap().unwrap();
        (root, state)
    }

    #[test]
    fn a_disk_is_remembered_as_it_was_and_others_are_not_it() {
        let (_root, state) = directory();
        assert_eq!(state.load(DISK), None);
        state.store(DISK, &remembered());
        assert_eq!(state.load(DISK), Some(remembered()));
        assert_eq!(state.load("another"), None);
        let larger = Remembered {
            io_queues: 1,
            ..remembered()
        };
        state.store(DISK, &larger);
        assert_eq!(state.load(DISK), Some(larger));
        let files = fs::read_dir(&state.0).unwrap();
        assert_eq!(files.count(), 1, "only the file itself stays");
    }

    #[test]
    fn a_file_that_makes_no_sense_counts_as_absent() {
        let (_root, state) = directory();
        state.store(DISK, &remembered());
        let good = fs::read_to_string(state.path(DISK)).unwrap();
        for (from, to) in [
            ("\"version\": 1", "\"version\": 2"),
            ("\"block_size\": 4096", "\"block_size\": 4095"),
            ("\"block_size\": 4096", "\"block_size\": 0"),
            ("\"block_count\": 1048576", "\"block_count\": 0"),
            (
                "\"block_count\": 1048576",
                "\"block_count\": 18446744073709551615",
            ),
            ("\"nsid\": 1", "\"nsid\": 0"),
            ("\"io_queues\": 4", "\"io_queues\": 0"),
            ("0f0f0f", "0g0f0f"),
            ("\"subnqn\": \"nqn", "\"subnqn\": \"iqn"),
            ("disk1?nsid=1", "disk2"),
            ("\"nsid\"", "\"another\""),
            ("{", ""),
        ] {
            let bad = good.replace(from, to);
            fs::write(state.path(DISK), &bad).unwrap();
            assert_ne!(bad, good, "{from}");
            assert_eq!(state.load(DISK), None, "{bad}");
        }
        fs::write(state.path(DISK), [0xff; 10]).unwrap();
        assert_eq!(state.load(DISK), None);
        fs::write(state.path(DISK), good).unwrap();
        assert_eq!(state.load(DISK), Some(remembered()));
    }

    #[test]
    fn a_directory_that_cannot_be_is_named() {
        let (_root, state) = directory();
        let file = state.0.join("file");
        fs::write(&file, "").unwrap();
        let error = StateDirectory::open(Some(&file)).unwrap_err().to_string();
        assert!(
            error.contains("file'") && error.contains("--state-dir"),
            "{error}"
        );
    }
}
