//! `--disk`: one of several disks of a process, as options of its own in one argument.
//!
//! Each is read as a command line of its own that has the options of all disks first; so whatever can be said of one
//! disk can be said of each.

use std::collections::BTreeSet;
use std::ffi::OsString;

use clap::{ArgAction, Command, CommandFactory as _};

use super::{CommandLine, DiskArgs, UsageError, one_line, read};
use crate::limits;

const OPTION: &str = "--disk";
/// Options that are the process's and of no disk.
const OF_THE_PROCESS: [&str; 6] = [
    "disk",
    "workers",
    "worker-cpus",
    "takeover",
    "help",
    "print-capabilities",
];

/// Reads what is said of each of several disks: `take` gives what is wanted of a command.
///
/// # Errors
/// [`UsageError`] names the disk by its number.
pub(super) fn read_all<T>(
    args: &[OsString],
    subcommand: &str,
    positional: &str,
    take: impl Fn(super::Command) -> Option<T>,
) -> Result<Vec<T>, UsageError> {
    let see = format!("see 'vhost-nvmf {subcommand} --help'");
    let whole = CommandLine::command();
    let lines = whole
        .find_subcommand(subcommand)
        .map_or(Ok(Vec::new()), |command| {
            command_lines(args, command, positional)
        });
    let lines = lines.map_err(|error| UsageError(format!("{error}; {see}")))?;
    if lines.len() > limits::MAX_DISKS {
        let most = limits::MAX_DISKS;
        return Err(UsageError(format!("a process has at most {most} disks")));
    }
    let mut all = Vec::with_capacity(lines.len());
    for (line, number) in lines.iter().zip(1..) {
        // What is said of one disk wins over what is said of all.
        let reader = CommandLine::command()
            .mut_subcommand(subcommand, |reader| reader.args_override_self(true));
        match read(reader, line) {
            Ok(CommandLine { command, .. }) => all.extend(take(command)),
            Err(error) => {
                let error = one_line(&error, Some(subcommand));
                return Err(UsageError(format!("--disk number {number}: {error}")));
            }
        }
    }
    Ok(all)
}

/// Checks that no two disks have one socket.
///
/// # Errors
/// [`UsageError`] names the second.
pub(super) fn distinct<'a>(disks: impl Iterator<Item = &'a DiskArgs>) -> Result<(), UsageError> {
    let mut sockets = BTreeSet::new();
    for (disk, number) in disks.zip(1..) {
        if let Some(origin) = disk.socket.origin().map(|origin| origin.name())
            && !sockets.insert(origin.clone())
        {
            return Err(UsageError(format!(
                "--disk number {number}: another disk has the socket {origin} already; give each one of its own"
            )));
        }
    }
    Ok(())
}

/// The command line of each disk, from one that has `--disk` and is valid apart from what those say.
/// `positional` is the key of what `attach` and `serve` are given without an option.
///
/// # Errors
/// A message that names the disk by its number.
fn command_lines(
    args: &[OsString],
    command: &Command,
    positional: &str,
) -> Result<Vec<Vec<OsString>>, String> {
    let (shared, disks) = separate(args);
    let lines = disks.iter().zip(1..).map(|(disk, number)| {
        let line = match disk.to_str() {
            Some(disk) => command_line(&shared, disk, command, positional),
            None => Err("it is not UTF-8".to_owned()),
        };
        line.map_err(|error| format!("--disk number {number}: {error}"))
    });
    lines.collect()
}

/// What is said of all disks, and what is said of each.
fn separate(args: &[OsString]) -> (Vec<OsString>, Vec<OsString>) {
    let (mut shared, mut disks) = (Vec::new(), Vec::new());
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let value = arg
            .to_str()
            .and_then(|arg| arg.strip_prefix(OPTION)?.strip_prefix('='));
        match value {
            Some(value) => disks.push(value.into()),
            None if arg == OPTION => disks.extend(rest.next().cloned()),
            None => shared.push(arg.clone()),
        }
    }
    (shared, disks)
}

fn command_line(
    shared: &[OsString],
    disk: &str,
    command: &Command,
    positional: &str,
) -> Result<Vec<OsString>, String> {
    let mut line = shared.to_vec();
    let mut last = None;
    for item in split(disk) {
        let (key, value) = item
            .split_once('=')
            .ok_or_else(|| format!("'{item}' has no value; write {item}=VALUE"))?;
        if key == positional {
            if last.replace(value.to_owned()).is_some() {
                return Err(format!("{key}= is given twice"));
            }
            continue;
        }
        let mut options = command.get_arguments();
        let option = options.find(|arg| arg.get_long() == Some(key));
        let Some(option) = option.filter(|_| !OF_THE_PROCESS.contains(&key)) else {
            return Err(unknown(key, command, positional));
        };
        let flag = format!("--{key}");
        match (option.get_action(), value) {
            (ArgAction::SetTrue, "on") => line.push(flag.into()),
            (ArgAction::SetTrue, "off") => line.retain(|arg| *arg != *flag),
            (ArgAction::SetTrue, _) => {
                return Err(format!("{key}={value}: write {key}=on or {key}=off"));
            }
            _ => line.push(format!("{flag}={value}").into()),
        }
    }
    line.extend(last.map(OsString::from));
    Ok(line)
}

fn unknown(key: &str, command: &Command, positional: &str) -> String {
    let options = command.get_arguments().filter_map(clap::Arg::get_long);
    let known = options
        .filter(|name| !OF_THE_PROCESS.contains(name))
        .chain([positional]);
    let similar = known
        .map(|name| (strsim::jaro(key, name), name))
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .filter(|(similar, _)| *similar > 0.7);
    let name = command.get_name();
    let hint = match similar {
        Some((_, name)) => format!("did you mean {name}="),
        None => {
            format!("a disk has {positional}= and the options of {name} that are not the process's")
        }
    };
    format!("there is no {key}= for a disk; {hint}")
}

/// Items between commas; two commas in a row are one in an item.
fn split(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let separates = c == ',' && chars.next_if_eq(&',').is_none();
        match items.last_mut() {
            Some(item) if !separates => item.push(c),
            _ => items.push(String::new()),
        }
    }
    items
}

#[cfg(test)]
mod tests {
    use clap::Arg;

    use super::*;

    fn lines(args: &[&str]) -> Result<Vec<Vec<String>>, String> {
        let flag = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
        let value = |name: &'static str| Arg::new(name).long(name);
        let command = Command::new("attach").args([
            flag("read-only"),
            value("socket-path"),
            value("workers"),
        ]);
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        let lines = command_lines(&args, &command, "uri")?;
        let text = |line: Vec<OsString>| {
            line.iter()
                .map(|arg| arg.to_str().unwrap().to_owned())
                .collect()
        };
        Ok(lines.into_iter().map(text).collect())
    }

    #[test]
    fn each_disk_has_the_options_of_all_and_then_its_own() {
        let found = lines(&[
            "attach",
            "--workers",
            "2",
            "--disk",
            "uri=u?a=b,socket-path=/a,,b",
            "--read-only",
            "--disk=socket-path=/c,read-only=off,uri=v",
        ]);
        let expected = [
            &[
                "attach",
                "--workers",
                "2",
                "--read-only",
                "--socket-path=/a,b",
                "u?a=b",
            ][..],
            &["attach", "--workers", "2", "--socket-path=/c", "v"],
        ];
        assert_eq!(found.unwrap(), expected);
    }

    #[test]
    fn what_a_disk_cannot_have_is_named_with_its_number() {
        for (disk, words) in [
            ("uri=v,serail=x", &["number 2", "serail="][..]),
            ("uri=v,socketpath=x", &["socketpath=", "socket-path="]),
            ("uri=v,workers=2", &["workers="]),
            ("uri=v,read-only", &["'read-only'", "read-only=VALUE"]),
            ("uri=v,read-only=yes", &["read-only=yes", "read-only=on"]),
            ("uri=v,uri=w", &["uri=", "twice"]),
            ("uri=v,", &["''"]),
        ] {
            let error = lines(&["attach", "--disk", "uri=u", "--disk", disk]).unwrap_err();
            for word in words {
                assert!(error.contains(word), "{disk}: {word}: {error}");
            }
        }
    }
}
