//! What a command does from its checked configuration to its end: runtimes, workers, signals.

use std::convert::Infallible;
use std::error::Error;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvmf::controller::Target;
use nvmf::transport::Registry;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

use crate::attach::Attached;
use crate::config::{AttachPlan, ExportConfig, Machine, ServeConfig};
use crate::export::Export;
use crate::hints::VmmHints;
use crate::serve::Local;
use crate::socket;
use crate::worker::Worker;

/// How long the end of everything may take once nothing is served any more; what is left then is
/// ended with the process.
const END: Duration = Duration::from_millis(300);

/// Serves a remote namespace as a disk until a signal comes.
///
/// # Errors
/// One line for the user; nothing is left behind.
pub(crate) fn attach(plan: &AttachPlan) -> Result<(), Box<dyn Error>> {
    let host = plan.host();
    let (runtime, workers) = start(usize::from(host.nr_io_queues))?;
    let result = runtime.block_on(async {
        let mut stop = Stop::new()?;
        // Listening comes first: a VMM that is quicker than the controller waits in the queue.
        let (listener, path) = socket::listen(plan.socket_path())?;
        let registry = Arc::new(Registry::with_defaults());
        let attached = tokio::select! {
            attached = Attached::attach(registry, plan, &workers) => attached?,
            () = stop.wait() => return Ok(()),
        };
        tracing::info!(hostnqn = %host.hostnqn, hostid = %host.hostid, "this host");
        let hints = VmmHints {
            socket_path: path.path(),
            num_queues: attached.config.num_queues,
            read_only: attached.config.read_only,
        };
        print(&hints.to_string())?;
        let (disk, beside) = attached.into_parts();
        tokio::select! {
            served = disk.serve(listener, stop.wait()) => served?,
            () = beside.run() => {}
        }
        Ok(())
    });
    end(runtime, workers);
    result
}

/// Serves storage of this machine as a disk until a signal comes.
///
/// # Errors
/// One line for the user; nothing is left behind.
pub(crate) fn serve(config: &ServeConfig, machine: &Machine) -> Result<(), Box<dyn Error>> {
    let (runtime, workers) = start(usize::from(config.host.nr_io_queues))?;
    let result = runtime.block_on(async {
        let mut stop = Stop::new()?;
        let (listener, path) = socket::listen(&config.socket_path)?;
        let (local, disk) = tokio::select! {
            served = Local::serve(config, machine, &workers) => served?,
            () = stop.wait() => return Ok(()),
        };
        let hints = VmmHints {
            socket_path: path.path(),
            num_queues: config.choices.num_queues,
            read_only: config.choices.read_only,
        };
        print(&hints.to_string())?;
        let mut growth = Growth::new()?;
        let served = tokio::select! {
            served = disk.serve(listener, stop.wait()) => served,
            never = growth.follow(local.target()) => match never {},
        };
        local.end().await;
        Ok(served?)
    });
    end(runtime, workers);
    result
}

/// Exports namespaces until a signal comes.
///
/// # Errors
/// One line for the user; nothing is left behind.
pub(crate) fn export(config: &ExportConfig, machine: &Machine) -> Result<(), Box<dyn Error>> {
    let (runtime, workers) = start(usize::MAX)?;
    let workers: Arc<[Worker]> = workers.into();
    let result = runtime.block_on(async {
        let mut stop = Stop::new()?;
        let registry = Arc::new(Registry::with_defaults());
        let mut growth = Growth::new()?;
        let export = Export::open(config, registry, Arc::clone(&workers)).await?;
        print(&export.uris(machine))?;
        let target = Arc::clone(export.target());
        tokio::select! {
            () = export.serve(stop.wait()) => {}
            never = growth.follow(&target) => match never {},
        }
        Ok(())
    });
    runtime.shutdown_timeout(END);
    result
}

/// The control plane's runtime, and at most `lanes` workers: one for each CPU.
fn start(lanes: usize) -> io::Result<(Runtime, Vec<Worker>)> {
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("control")
        .enable_all()
        .build()?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = (0..cpus.min(lanes))
        .map(Worker::start)
        .collect::<io::Result<_>>()?;
    Ok((runtime, workers))
}

/// Lets the threads end; not for long.
fn end(runtime: Runtime, workers: Vec<Worker>) {
    let deadline = Instant::now() + END;
    let threads: Vec<_> = workers.into_iter().map(Worker::finish).collect();
    while threads.iter().any(|thread| !thread.is_finished()) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    runtime.shutdown_timeout(deadline.saturating_duration_since(Instant::now()));
}

/// Standard output is for results. That nobody reads them is no reason to end.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// The signal that has storage looked at again.
struct Growth(tokio::signal::unix::Signal);

impl Growth {
    fn new() -> io::Result<Self> {
        Ok(Self(signal(SignalKind::hangup())?))
    }

    /// At each signal, takes over what the storage of a target's namespaces has grown by.
    async fn follow(&mut self, target: &Target) -> Infallible {
        loop {
            if self.0.recv().await.is_none() {
                return std::future::pending().await;
            }
            tracing::info!("SIGHUP: looking at the size of the storage");
            for subsystem in target.subsystems() {
                subsystem.grow();
            }
        }
    }
}

/// The signals that end the daemon.
struct Stop {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Stop {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn wait(&mut self) {
        let name = tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        };
        tracing::info!("{name}: ending");
    }
}
