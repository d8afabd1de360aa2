//! The `vhost-nvmf` daemon: a command line in, one disk, one target or one answer out.

mod attach;
mod bridge;
mod cli;
mod config;
mod daemon;
mod disk;
mod disks;
mod endpoint;
mod export;
mod finding;
mod front;
mod handover;
mod hints;
mod limits;
mod logging;
mod metrics;
mod namespace_events;
mod reconnect;
mod rediscovery;
mod remembered;
mod report;
mod rings;
mod serve;
mod show;
mod socket;
mod status;
mod storage;
mod worker;

use std::error::Error;
use std::io::Write as _;
use std::process::ExitCode;

use cli::Invocation;
use config::{AttachPlan, ExportConfig, Machine, ServeConfig};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let line = report::one_line(error.as_ref());
            // Nothing is left to do when standard error is gone too.
            let _ = writeln!(std::io::stderr(), "vhost-nvmf: {line}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error + Send + Sync>> {
    match cli::parse(std::env::args_os())? {
        Invocation::Print(text) => Ok(std::io::stdout().write_all(text.as_bytes())?),
        Invocation::Attach(log, disks) => {
            logging::start(log);
            let machine = Machine::read();
            let plans = disks
                .into_iter()
                .map(|args| AttachPlan::resolve(args, &machine));
            daemon::attach(plans.collect::<Result<_, _>>()?)
        }
        Invocation::Serve(log, disks) => {
            logging::start(log);
            let machine = Machine::read();
            let configs = disks
                .into_iter()
                .map(|args| ServeConfig::resolve(args, &machine));
            daemon::serve(configs.collect::<Result<_, _>>()?, machine)
        }
        Invocation::Export(log, args) => {
            logging::start(log);
            let machine = Machine::read();
            daemon::export(&ExportConfig::resolve(args, &machine)?, &machine)
        }
        Invocation::Show(log, question) => {
            logging::start(log);
            show::show(*question, &Machine::read())
        }
    }
}
