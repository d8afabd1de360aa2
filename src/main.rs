//! The `vhost-nvmf` daemon: a command line in, one disk or one target out.

#![expect(
    dead_code,
    unused_imports,
    reason = "the daemon that uses the rest is not wired yet"
)]

mod bridge;
mod cli;
mod config;
mod hints;
mod limits;
mod logging;
mod report;
mod socket;

use std::error::Error;
use std::io::Write as _;
use std::process::ExitCode;

use cli::Invocation;
use config::{AttachConfig, ExportConfig, Machine};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to do when standard error is gone too.
            let _ = writeln!(
                std::io::stderr(),
                "vhost-nvmf: {}",
                report::one_line(error.as_ref())
            );
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    match cli::parse(std::env::args_os())? {
        Invocation::Print(text) => std::io::stdout().write_all(text.as_bytes())?,
        Invocation::Attach(log, args) => {
            logging::start(log);
            let config = AttachConfig::resolve(*args, &Machine::read());
            let (_listener, socket) = socket::listen(&config.socket_path)?;
            let hints = hints::VmmHints {
                socket_path: socket.path(),
                num_queues: config.num_queues,
                read_only: config.read_only,
            };
            write!(std::io::stdout(), "{hints}")?;
        }
        Invocation::Export(log, args) => {
            logging::start(log);
            ExportConfig::resolve(args, &Machine::read())?;
        }
    }
    Ok(())
}
