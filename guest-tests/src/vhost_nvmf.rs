//! The product's daemons, started for a test: `vhost-nvmf export`, and `attach` and `serve` with a disk.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::artifacts::daemon_binary;
use crate::daemon::Daemon;
use crate::network::{self, Network};

const READY_LIMIT: Duration = Duration::from_secs(15);
/// The product promises two seconds from SIGTERM to its end; the rest is for a busy machine to notice it.
const STOP_LIMIT: Duration = Duration::from_millis(2500);
/// The NSID of a local disk's storage.
const LOCAL_NSID: u32 = 1;

/// A controller that exports namespaces over NVMe/TCP on a free port of 127.0.0.1.
pub struct Export {
    /// The process.
    pub daemon: Daemon,
    /// The URI of each namespace, in the order of the specifications.
    pub uris: Vec<String>,
}

/// What `export` or `serve` counted for a namespace, up to its end.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "the fields are the log line's own")]
pub struct NamespaceCounters {
    pub nsid: u32,
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub fua_writes: u64,
    pub write_zeroes: u64,
    pub deallocates: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub copied_bytes: u64,
}

/// A disk on a vhost-user socket.
pub struct Attach {
    /// The process.
    pub daemon: Daemon,
    /// The socket.
    pub socket: PathBuf,
}

/// How a disk is attached.
#[derive(Clone, Debug, Default)]
pub struct AttachOptions {
    /// `--num-queues`; none: the product's default.
    pub num_queues: Option<u16>,
    /// `--serial`.
    pub serial: Option<String>,
    /// `--read-only`.
    pub read_only: bool,
    /// Further arguments, as they are.
    pub arguments: Vec<String>,
}

/// What `attach` or `serve` counted for its disk, up to its end.
#[derive(Clone, Debug, Deserialize)]
#[expect(missing_docs, reason = "the fields are the log line's own")]
pub struct DiskCounters {
    pub requests: u64,
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub copied_bytes: u64,
}

impl Export {
    /// Starts `export` with these specifications (`file:PATH[,ro][,block-size=N]`, `ram:SIZE`) and waits until it is ready.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn start<S: AsRef<str>>(specs: &[S]) -> Result<Self> {
        Self::start_at("127.0.0.1:0", specs)
    }

    /// As [`Export::start`], listening on `address`: where another one was, for instance.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn start_at<S: AsRef<str>>(address: &str, specs: &[S]) -> Result<Self> {
        let mut command = Command::new(daemon_binary()?);
        command.args(["export", "--log-format", "json", "--listen", address]);
        command.args(specs.iter().map(AsRef::as_ref));
        Self::run(&command, specs.len())
    }

    /// Starts `export` in a network of its own ([`Network::entrance`]), on port 4420 of these addresses, with discovery on port
    /// 8009. There is a URI for each specification at each address.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn start_in(
        network: &Network,
        addresses: &[&str],
        arguments: &[&str],
        specs: &[&str],
    ) -> Result<Self> {
        let mut command = network::command(&network.entrance(), daemon_binary()?);
        command.args(["export", "--log-format", "json"]);
        for address in addresses {
            command.args(["--listen", &format!("{address}:4420")]);
        }
        command.args(arguments).args(specs);
        Self::run(&command, addresses.len() * specs.len())
    }

    fn run(command: &Command, count: usize) -> Result<Self> {
        let mut daemon = Daemon::start("export", command)?;
        let lines =
            daemon.wait_for_output(count, READY_LIMIT, |line| line.contains("nvme+tcp://"))?;
        let uri = |line: String| {
            line.split_whitespace()
                .find(|word| word.starts_with("nvme+tcp://"))
                .map(str::to_owned)
        };
        let uris: Vec<String> = lines.into_iter().filter_map(uri).collect();
        if uris.len() != count {
            bail!("export printed {} URIs instead of {count}", uris.len());
        }
        Ok(Self { daemon, uris })
    }

    /// Ends it with SIGTERM.
    ///
    /// # Errors
    /// When it does not end cleanly and in time.
    pub fn stop(&mut self) -> Result<()> {
        self.daemon.stop(STOP_LIMIT)
    }

    /// What it counted for namespace `nsid`; after [`Export::stop`].
    ///
    /// # Errors
    /// When it logged nothing of the sort, or a field is missing.
    pub fn counters(&self, nsid: u32) -> Result<NamespaceCounters> {
        namespace_counters(&self.daemon, nsid)
    }
}

/// Runs `vhost-nvmf discover` in a network, and returns its JSON.
///
/// # Errors
/// When it fails, with what it said.
pub fn discover(network: &Network, hostnqn: &str, uri: &str) -> Result<Value> {
    let mut command = network::command(&network.entrance(), daemon_binary()?);
    command.args(["discover", "--output-format", "json"]);
    command.args(["--hostnqn", hostnqn, uri]);
    let output = command.output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("discover {uri}: {}: {}", output.status, said.trim());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

impl Attach {
    /// Starts `attach` on `socket` and waits until it listens.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn start(socket: &Path, uri: &str, options: &AttachOptions) -> Result<Self> {
        Self::start_command("attach", socket, uri, options)
    }

    /// Starts `serve` on `socket`, with storage of this machine, and waits until it listens.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn serve(socket: &Path, spec: &str, options: &AttachOptions) -> Result<Self> {
        Self::start_command("serve", socket, spec, options)
    }

    fn start_command(
        subcommand: &str,
        socket: &Path,
        what: &str,
        options: &AttachOptions,
    ) -> Result<Self> {
        let mut command = Command::new(daemon_binary()?);
        command
            .args([subcommand, "--log-format", "json", "--socket-path"])
            .arg(socket);
        if let Some(queues) = options.num_queues {
            command.args(["--num-queues", &queues.to_string()]);
        }
        if let Some(serial) = &options.serial {
            command.args(["--serial", serial]);
        }
        if options.read_only {
            command.arg("--read-only");
        }
        command.args(&options.arguments).arg(what);
        let name = format!(
            "{subcommand} {}",
            socket.file_name().unwrap_or_default().display()
        );
        let mut daemon = Daemon::start(&name, &command)?;
        daemon.wait_for_output(1, READY_LIMIT, |line| !line.is_empty())?;
        if !socket.exists() {
            bail!(
                "{name} printed its arguments, but {} is not there",
                socket.display()
            );
        }
        Ok(Self {
            daemon,
            socket: socket.to_owned(),
        })
    }

    /// Starts `attach` on a namespace that it must not get, and returns the one line that it ends with.
    ///
    /// # Errors
    /// When it does not end, ends with another status than 1, or says more or less than one line.
    pub fn refused(socket: &Path, uri: &str) -> Result<String> {
        let mut command = Command::new(daemon_binary()?);
        command.args(["attach", "--socket-path"]).arg(socket);
        command.arg(uri);
        let mut daemon = Daemon::start("attach", &command)?;
        let status = daemon.wait(READY_LIMIT)?;
        let complaints = daemon.complaints();
        if status.code() != Some(1) || complaints.len() != 1 || socket.exists() {
            bail!("attach ended with {status} and said {complaints:?}");
        }
        Ok(complaints.concat())
    }

    /// Ends it with SIGTERM.
    ///
    /// # Errors
    /// When it does not end cleanly and in time, or leaves its socket behind.
    pub fn stop(&mut self) -> Result<()> {
        self.daemon.stop(STOP_LIMIT)?;
        if self.socket.exists() {
            bail!(
                "{} left {} behind",
                self.daemon.name(),
                self.socket.display()
            );
        }
        Ok(())
    }

    /// What it counted; after [`Attach::stop`].
    ///
    /// # Errors
    /// When it logged nothing of the sort, or a field is missing.
    pub fn counters(&self) -> Result<DiskCounters> {
        let event = self.daemon.logged("disk counters").pop();
        parse(event, "\"disk counters\"")
    }

    /// What `serve` counted for its storage; after [`Attach::stop`].
    ///
    /// # Errors
    /// When it logged nothing of the sort, as `attach` does, or a field is missing.
    pub fn storage_counters(&self) -> Result<NamespaceCounters> {
        namespace_counters(&self.daemon, LOCAL_NSID)
    }
}

fn namespace_counters(daemon: &Daemon, nsid: u32) -> Result<NamespaceCounters> {
    let events = daemon.logged("namespace counters");
    let event = events.into_iter().rfind(|fields| fields["nsid"] == nsid);
    parse(
        event,
        &format!("{}: \"namespace counters\" with nsid={nsid}", daemon.name()),
    )
}

fn parse<T: DeserializeOwned>(event: Option<Value>, what: &str) -> Result<T> {
    let event = event.with_context(|| format!("{what}: no such line in the log"))?;
    serde_json::from_value(event).with_context(|| what.to_owned())
}
