//! Commands that ask a controller and show what it says.

mod discover;
mod inspect;
mod table;

use std::error::Error;
use std::time::Duration;

use nvmf::host::{HostError, HostOptions};
use nvmf::spec::discovery::{DISCOVERY_PORT, IO_PORT};
use nvmf::transport::Registry;
use serde_json::Value;
use tokio::runtime::Builder;

use crate::cli::{OutputFormat, Question, ShowArgs};
use crate::config::fabrics_conf::FileError;
use crate::config::{HostIdentity, Machine};
use crate::daemon;

/// How long what is left may take to end once the answer is there.
const END: Duration = Duration::from_millis(100);

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShowError {
    /// The controller, or the way to it.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The file that names who is asked.
    #[error(transparent)]
    File(#[from] FileError),
    /// Nobody to ask.
    #[error("there is nobody to ask; give a URI or --config-fabrics")]
    Nothing,
    /// None of the usual ports.
    #[error("no discovery on ports {DISCOVERY_PORT} and {IO_PORT} of {host}: {error}")]
    NoDiscovery {
        /// The host.
        host: String,
        /// How far the one that got farthest got.
        error: HostError,
    },
}

/// An answer, for people and for programs.
struct Shown {
    text: String,
    json: Value,
}

/// Asks, and prints the answer.
///
/// # Errors
/// One line for the user.
pub(crate) fn show(
    question: Question,
    machine: &Machine,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let registry = Registry::with_defaults();
    let answer = runtime.block_on(async {
        match question {
            Question::Discover(args) => {
                let shown = discover::discover(&registry, &args, machine).await?;
                let format = args.show.output_format;
                Ok((shown, format))
            }
            Question::Identify(args) => {
                let (host, format) = resolve(args.show, machine);
                let shown = inspect::identify(&registry, &args.uri, &host).await?;
                Ok((shown, format))
            }
            Question::ListNs(args) => {
                let (host, format) = resolve(args.show, machine);
                let shown = inspect::list_namespaces(&registry, &args.uri, &host).await?;
                Ok((shown, format))
            }
        }
    });
    // A resolver that does not answer is not waited for.
    runtime.shutdown_timeout(END);
    let (shown, format) = answer.map_err(|error: ShowError| error)?;
    match format {
        OutputFormat::Text => daemon::print(&shown.text)?,
        OutputFormat::Json => daemon::print(&format!("{:#}\n", shown.json))?,
    }
    Ok(())
}

fn resolve(args: ShowArgs, machine: &Machine) -> (HostOptions, OutputFormat) {
    let HostIdentity { nqn, id } = HostIdentity::resolve(args.hostnqn, args.hostid, machine);
    let options = HostOptions {
        local: args.local.end(),
        ..HostOptions::new(nqn, id)
    };
    (options, args.output_format)
}
