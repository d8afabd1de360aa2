//! The options that a process has whatever disks it serves: where their VMMs come from, and who works for them.

use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::{Args, value_parser};

use crate::endpoint::Origin;
use crate::limits;
use crate::socket::Access;
use crate::worker::pool::{CpuList, Crew};

const HEADING: &str = "Socket";
const BLK_FILE: &str = "--blk-file";

/// Descriptors that can be given: those below have their ordinary use.
const DESCRIPTORS: RangeInclusive<i64> = 3..=i32::MAX as i64;

/// Where VMMs come from.
#[derive(Debug, Clone, Args)]
pub(crate) struct SocketArgs {
    /// Unix socket for the VMM to connect to; with --connect, the one that the VMM listens on
    #[arg(
        long,
        help_heading = HEADING,
        value_name = "PATH",
        required_unless_present_any = ["fd", "disk"],
        conflicts_with_all = ["fd", "disk"]
    )]
    socket_path: Option<PathBuf>,
    /// Descriptor of a Unix socket that this process is started with: one that listens, or one that a VMM is
    /// connected to; the process then ends with that VMM
    #[arg(
        long,
        help_heading = HEADING,
        value_name = "FDNUM",
        value_parser = value_parser!(i32).range(DESCRIPTORS),
        conflicts_with = "disk"
    )]
    fd: Option<i32>,
    /// Connect to the VMM instead of listening, and again whenever it has gone
    #[arg(long, help_heading = HEADING, conflicts_with = "fd")]
    connect: bool,
    /// Permissions of the socket, in octal, as in 0660 [default: by the umask]
    #[arg(
        long,
        help_heading = HEADING,
        value_name = "MODE",
        value_parser = parse_mode,
        conflicts_with_all = ["fd", "connect"]
    )]
    socket_mode: Option<u32>,
    /// User that the socket belongs to, by name or number
    #[arg(
        long,
        help_heading = HEADING,
        value_name = "USER",
        value_parser = parse_user,
        conflicts_with_all = ["fd", "connect"]
    )]
    socket_owner: Option<u32>,
    /// Group that the socket belongs to, by name or number
    #[arg(
        long,
        help_heading = HEADING,
        value_name = "GROUP",
        value_parser = parse_group,
        conflicts_with_all = ["fd", "connect"]
    )]
    socket_group: Option<u32>,
}

impl SocketArgs {
    /// Where front-ends are to come from; `None` where each disk says that for itself.
    pub(crate) fn origin(&self) -> Option<Origin> {
        match (&self.socket_path, self.fd) {
            (Some(path), _) if self.connect => Some(Origin::Connect(path.clone())),
            (Some(path), _) => Some(Origin::Listen {
                path: path.clone(),
                access: Access {
                    mode: self.socket_mode,
                    owner: self.socket_owner,
                    group: self.socket_group,
                },
            }),
            (None, fd) => fd.map(Origin::Inherited),
        }
    }
}

/// Who works.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct WorkerArgs {
    /// Threads that do the work of all disks [default: one for each CPU]
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(limits::WORKERS))]
    workers: Option<u64>,
    /// CPUs that the workers run on, one each in turn, as in 2-5,8 [default: any of the process]
    #[arg(long, value_name = "LIST")]
    worker_cpus: Option<CpuList>,
}

impl WorkerArgs {
    /// The workers.
    pub(crate) fn crew(&self) -> Crew {
        Crew {
            count: self.workers.and_then(|count| usize::try_from(count).ok()),
            cpus: self.worker_cpus.clone(),
        }
    }
}

/// Adds the command that is meant where a program that starts vhost-user back-ends gives none.
pub(super) fn with_subcommand(mut args: Vec<OsString>) -> Vec<OsString> {
    let is_file = |arg: &OsString| {
        let rest = arg.to_str().and_then(|arg| arg.strip_prefix(BLK_FILE));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    };
    let named = |arg: &OsString| super::SUBCOMMANDS.iter().any(|name| arg == name);
    if args.iter().any(is_file) && !args.iter().skip(1).any(named) {
        args.insert(1, "serve".into());
    }
    args
}

fn parse_mode(text: &str) -> Result<u32, &'static str> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("write permission bits in octal, as in 0660"),
    }
}

fn parse_user(text: &str) -> Result<u32, String> {
    let found =
        |name: &str| nix::unistd::User::from_name(name).map(|it| it.map(|it| it.uid.as_raw()));
    parse_account(text, "user", found)
}

fn parse_group(text: &str) -> Result<u32, String> {
    let found =
        |name: &str| nix::unistd::Group::from_name(name).map(|it| it.map(|it| it.gid.as_raw()));
    parse_account(text, "group", found)
}

fn parse_account(
    text: &str,
    kind: &str,
    find: impl Fn(&str) -> nix::Result<Option<u32>>,
) -> Result<u32, String> {
    match text.parse::<u32>() {
        // All ones means to leave it as it is.
        Ok(u32::MAX) => Err(format!("there is no {kind} of that number")),
        Ok(number) => Ok(number),
        Err(_) => match find(text) {
            Ok(Some(number)) => Ok(number),
            Ok(None) => Err(format!(
                "there is no {kind} of that name; a number is taken as it is"
            )),
            Err(error) => Err(format!(
                "{kind}s cannot be looked up: {error}; write a number"
            )),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups_have_names_and_numbers() {
        assert_eq!(parse_user("root"), Ok(0));
        assert_eq!(parse_group("root"), Ok(0));
        assert_eq!(parse_user("12345"), Ok(12345));
        assert!(parse_user("no such user").unwrap_err().contains("number"));
        assert!(parse_group("4294967295").is_err());
    }

    #[test]
    fn modes_are_octal_permission_bits() {
        assert_eq!(
            (parse_mode("0660"), parse_mode("777")),
            (Ok(0o660), Ok(0o777))
        );
        for text in ["", "rw", "0888", "1777", "-1"] {
            assert!(parse_mode(text).is_err(), "{text}");
        }
    }
}
