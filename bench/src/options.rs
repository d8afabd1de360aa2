//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand, value_parser};

use crate::placement::Placement;

/// Measure vhost-user-blk back-ends over their sockets: all contenders in turn, several rounds.
#[derive(Debug, Parser)]
#[command(name = "bench", after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub(crate) struct Options {
    /// Rounds; the table shows medians
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,
    /// Seconds that each row of each contender is measured in a round
    #[arg(long, value_name = "S", default_value = "1", value_parser = parse_seconds)]
    pub(crate) seconds: f64,
    /// Contenders whose name contains one of these; may be given several times
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub(crate) only: Vec<String>,
    /// Rows whose name contains one of these; may be given several times
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub(crate) rows: Vec<String>,
    /// Show the names of contenders and rows, and exit
    #[arg(long)]
    pub(crate) list: bool,
    /// One more contender: a vhost-user-blk socket that is served already. ITS CONTENTS ARE OVERWRITTEN
    #[arg(long, value_name = "NAME=PATH", value_parser = parse_named::<PathBuf>)]
    pub(crate) socket: Vec<(String, PathBuf)>,
    /// A process that serves a --socket, for its CPU time and system calls; may be given several times
    #[arg(long, value_name = "NAME=PID", value_parser = parse_named::<u32>)]
    pub(crate) pid: Vec<(String, u32)>,
    /// MiB of each disk, at most
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = value_parser!(u64).range(16..=65536))]
    pub(crate) size: u64,
    /// Directory for the file that is served: it decides the file system
    #[arg(long, value_name = "PATH", default_value = "/var/tmp")]
    pub(crate) directory: PathBuf,
    /// The vhost-nvmf program [default: VHOST_NVMF_BIN, else the one beside this program]
    #[arg(long, value_name = "PATH")]
    pub(crate) vhost_nvmf: Option<PathBuf>,
    /// The qemu-storage-daemon program
    #[arg(long, value_name = "PATH", default_value = "qemu-storage-daemon")]
    pub(crate) qemu_storage_daemon: PathBuf,
    /// Which processors the driver and the back-ends run on
    #[arg(long, value_name = "HOW", value_enum, default_value_t = Placement::Apart)]
    pub(crate) placement: Placement,
    /// Write every measurement as JSON to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Print Markdown
    #[arg(long)]
    pub(crate) markdown: bool,
    #[command(subcommand)]
    pub(crate) part: Option<Part>,
}

/// Processes of the plain relay; the bench starts them.
#[derive(Debug, Subcommand)]
pub(crate) enum Part {
    #[command(hide = true)]
    Relay {
        #[arg(long)]
        memory: PathBuf,
        #[arg(long)]
        responder: SocketAddr,
    },
    #[command(hide = true)]
    Responder,
}

const EXAMPLES: &str = "\
Examples:
  Everything, with the numbers kept:
    make bench ARGS='--json bench.json'
  A quick look at one row of two contenders:
    make bench ARGS='--rounds 3 --seconds 0.3 --only bridge,relay --rows read-4k-d32'
  A back-end of one's own (its disk is overwritten), with its CPU time:
    make bench ARGS='--only mine,serve-ram --socket mine=/run/mine.sock --pid mine=1234'";

fn parse_seconds(text: &str) -> Result<f64, &'static str> {
    match text.parse() {
        Ok(seconds) if (0.05..=600.0).contains(&seconds) => Ok(seconds),
        _ => Err("write seconds, from 0.05 to 600"),
    }
}

fn parse_named<T: std::str::FromStr>(text: &str) -> Result<(String, T), &'static str> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    let value = value.parse().map_err(|_| "this value is not valid")?;
    Ok((name.to_owned(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        <Options as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn sockets_and_their_processes_have_names() {
        let line = [
            "bench", "--socket", "a=/s=1", "--pid", "a=7", "--pid", "a=8",
        ];
        let options = Options::try_parse_from(line).expect("valid");
        assert_eq!(options.socket, [("a".to_owned(), PathBuf::from("/s=1"))]);
        assert_eq!(options.pid, [("a".to_owned(), 7), ("a".to_owned(), 8)]);
        for bad in ["--socket=/s", "--pid=a=x", "--seconds=0", "--rounds=0"] {
            assert!(Options::try_parse_from(["bench", bad]).is_err(), "{bad}");
        }
    }
}
