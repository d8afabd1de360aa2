//! What can be wrong with a configuration file of connections, with the file, the line and the fix.

use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use nvmf::spec::Nqn;
use nvmf::spec::nqn::NqnError;
use uuid::Uuid;

use super::DROP_INS_MAX;
use crate::config::ids::IdError;

/// Why a configuration of connections cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    /// A file that cannot be read.
    #[error("cannot read '{}': {error}; check the path and its permissions", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The format that was before this one.
    #[error("'{}' is of the old format; convert it with `nvme config-convert`", .0.display())]
    Json(PathBuf),
    /// Too many files.
    #[error("'{}' has more than {DROP_INS_MAX} files; put several endpoints into one", .0.display())]
    TooManyFiles(PathBuf),
    /// A line.
    #[error("{}:{line}: {fault}", .path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        fault: Fault,
    },
    /// No section for what is asked for.
    #[error("'{}' has no [Subsystem] {wanted}; it has {found}", .path.display())]
    NoSubsystem {
        /// The file.
        path: PathBuf,
        /// What it should have.
        wanted: String,
        /// What it has.
        found: String,
    },
    /// Several sections for what is asked for.
    #[error("'{}' has several subsystems; choose one with --nqn: {found}", .path.display())]
    SeveralSubsystems {
        /// The file.
        path: PathBuf,
        /// What it has.
        found: String,
    },
    /// Nobody to ask.
    #[error("'{}' has no [Discovery Controller]; add one, or give a URI", .0.display())]
    NoDiscoveryController(PathBuf),
}

impl FileError {
    pub(super) fn at(path: &Path, line: usize, fault: Fault) -> Self {
        Self::Line {
            path: path.to_owned(),
            line,
            fault,
        }
    }
}

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// Neither section nor assignment.
    #[error("'{0}' is neither a [Section] nor KEY = VALUE")]
    Junk(String),
    /// No section before it.
    #[error("{0} is before any [Section]; put it below one")]
    NoSection(String),
    /// A key that does not exist.
    #[error("there is no key '{key}'; did you mean '{nearest}'?")]
    UnknownKey {
        /// As written.
        key: String,
        /// What it may have been meant to be.
        nearest: &'static str,
    },
    /// A key that belongs elsewhere.
    #[error("{key} belongs to {place}")]
    NotHere {
        /// The key.
        key: String,
        /// Its place.
        place: &'static str,
    },
    /// A key that may not be where it is.
    #[error(
        "{key} does not belong to {section}; put it below [Subsystem] or [Discovery Controller]"
    )]
    NotIn {
        /// The key.
        key: &'static str,
        /// Where it is.
        section: &'static str,
    },
    /// Two hosts.
    #[error(
        "there is a [Host] in line {first} already; give each host a file of its own in the directory beside this one"
    )]
    SecondHost {
        /// Line of the first one.
        first: usize,
    },
    /// Not a number.
    #[error("{key} = {value}: write a decimal number alone; a comment has a line of its own")]
    NotANumber {
        /// The key.
        key: &'static str,
        /// As written.
        value: String,
    },
    /// Not a switch.
    #[error("{key} = {value}: write true or false")]
    NotASwitch {
        /// The key.
        key: &'static str,
        /// As written.
        value: String,
    },
    /// Out of range.
    #[error("{key} = {value}: write a number from {} to {}", .range.start(), .range.end())]
    Range {
        /// The key.
        key: &'static str,
        /// As written.
        value: i64,
        /// What it may be.
        range: RangeInclusive<i64>,
    },
    /// No value where one is needed.
    #[error("{0} has no value, and none is built in")]
    Empty(String),
    /// Bad name.
    #[error("{key} = {value}: {error}")]
    Nqn {
        /// The key.
        key: &'static str,
        /// As written.
        value: String,
        /// What is wrong with it.
        error: NqnError,
    },
    /// Bad host identifier.
    #[error("hostid = {value}: {error}")]
    HostId {
        /// As written.
        value: String,
        /// What is wrong with it.
        error: IdError,
    },
    /// A part of a controller line.
    #[error(
        "'{0}' is not KEY=VALUE; write controller = transport=tcp;traddr=192.0.2.1;trsvcid=4420"
    )]
    NotAPair(String),
    /// Twice in a controller line.
    #[error("{0} is there twice; keep one, and write a controller line for each path")]
    Repeated(&'static str),
    /// Missing in a controller line.
    #[error("there is no {0}; write controller = transport=tcp;traddr=192.0.2.1;trsvcid=4420")]
    NoAddress(&'static str),
    /// Bad address of this machine.
    #[error("host-traddr = {0}: write an IPv4 or IPv6 address of this machine")]
    HostTraddr(String),
    /// Bad interface of this machine.
    #[error("host-iface: {0}")]
    HostIface(String),
    /// Security of a path alone.
    #[error("{0} is the same for all paths; put it into a line of its own in the section")]
    PerPath(&'static str),
    /// No subsystem.
    #[error("this [Subsystem] has no nqn; add nqn = NQN")]
    NoNqn,
    /// No path.
    #[error("this section has no controller line; add controller = transport=tcp;traddr=ADDRESS")]
    NoPath,
    /// A further host without a name.
    #[error("this [Host] has no hostnqn, by which it differs from that of the main file; add one")]
    NoHostNqn,
    /// One name of two hosts.
    #[error("hostnqn {nqn} is that of {} too; put all that it connects to into one file", .other.display())]
    SameHostNqn {
        /// The name.
        nqn: Nqn,
        /// The other file.
        other: PathBuf,
    },
    /// One identifier of two hosts.
    #[error("hostid {id} is that of {} too, of another hostnqn; give each its own", .other.display())]
    SameHostId {
        /// The identifier.
        id: Uuid,
        /// The other file.
        other: PathBuf,
    },
    /// What is not there.
    #[error("{key} = {value}: {reason}; remove it, or leave its value empty")]
    NotSupported {
        /// The key.
        key: &'static str,
        /// As written.
        value: String,
        /// Why.
        reason: &'static str,
    },
    /// No way that can be gone.
    #[error("no path is over TCP, the only transport that is supported; the first is over {0}")]
    NoTcp(String),
    /// Bad address.
    #[error("traddr = {0}: write a host name or an address")]
    Host(String),
    /// Bad port.
    #[error("trsvcid = {0}: write a port from 1 to 65535")]
    Port(String),
    /// Paths that differ.
    #[error(
        "{0} differs from that of the path before; all paths of a disk have the same, so put it into the section"
    )]
    PathsDiffer(&'static str),
}
