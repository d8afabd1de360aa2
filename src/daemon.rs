//! What a command does from its checked configuration to its end: runtimes, workers, signals.

use std::convert::Infallible;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvmf::controller::Target;
use nvmf::transport::Registry;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

use crate::attach::Attached;
use crate::config::{AttachPlan, ExportConfig, Machine, ServeConfig};
use crate::disks::{Failure, Ready, Stop, serve_all};
use crate::endpoint::{Endpoint, Origin};
use crate::export::Export;
use crate::hints::VmmHints;
use crate::serve::Local;
use crate::worker::pool::{Crew, Workers};

/// How long the end of everything may take once nothing is served any more; what is left then is
/// ended with the process.
const END: Duration = Duration::from_millis(300);

/// Serves remote namespaces as disks until a signal comes.
///
/// # Errors
/// One line for the user; nothing is left behind.
pub(crate) fn attach(plans: Vec<AttachPlan>) -> Result<(), Failure> {
    let lanes = plans.iter().map(|plan| plan.host().nr_io_queues);
    let crew = plans.first().map(AttachPlan::crew).unwrap_or_default();
    let origins = plans.iter().map(AttachPlan::origin).collect();
    let (runtime, workers) = start(&crew, lanes.map(usize::from).sum())?;
    let workers = Arc::new(workers);
    let registry = Arc::new(Registry::with_defaults());
    let plans: Vec<_> = plans.into_iter().map(Arc::new).collect();
    let result = runtime.block_on(serve_disks(origins, |number, endpoint, mut stop, ready| {
        let (plan, registry) = (Arc::clone(&plans[number]), Arc::clone(&registry));
        let workers = Arc::clone(&workers);
        async move {
            let attached = tokio::select! {
                attached = Attached::attach(registry, &plan, &workers) => attached?,
                () = stop.wait() => return Ok(()),
            };
            let host = plan.host();
            tracing::info!(hostnqn = %host.hostnqn, hostid = %host.hostid, "this host");
            ready.tell(hints(
                &endpoint,
                attached.config.num_queues,
                attached.config.read_only,
            ));
            let (disk, beside) = attached.into_parts();
            tokio::select! {
                () = disk.serve(endpoint, stop.wait()) => {}
                () = beside.run() => {}
            }
            Ok(())
        }
    }));
    end(runtime, workers);
    result
}

/// Serves storage of this machine as disks until a signal comes.
///
/// # Errors
/// One line for the user; nothing is left behind.
pub(crate) fn serve(configs: Vec<ServeConfig>, machine: Machine) -> Result<(), Failure> {
    let lanes = configs.iter().map(|config| config.host.nr_io_queues);
    let crew = configs.first().map(|config| config.crew.clone());
    let origins = configs.iter().map(|config| Some(config.origin.clone()));
    let origins = origins.collect();
    let lanes = lanes.map(usize::from).sum();
    let (runtime, workers) = start(&crew.unwrap_or_default(), lanes)?;
    let (workers, machine) = (Arc::new(workers), Arc::new(machine));
    let configs: Vec<_> = configs.into_iter().map(Arc::new).collect();
    let result = runtime.block_on(serve_disks(origins, |number, endpoint, mut stop, ready| {
        let (config, machine) = (Arc::clone(&configs[number]), Arc::clone(&machine));
        let workers = Arc::clone(&workers);
        async move {
            let (local, disk) = tokio::select! {
                served = Local::serve(&config, &machine, &workers) => served?,
                () = stop.wait() => return Ok(()),
            };
            let choices = &config.choices;
            ready.tell(hints(&endpoint, choices.num_queues, choices.read_only));
            let mut growth = Growth::new()?;
            tokio::select! {
                () = disk.serve(endpoint, stop.wait()) => {}
                never = growth.follow(local.target()) => match never {},
            };
            local.end().await;
            Ok(())
        }
    }));
    end(runtime, workers);
    result
}

/// Listens for all disks first, so that a VMM that is quicker than a controller waits in the queue, and then starts
/// them.
async fn serve_disks<F>(
    origins: Vec<Option<Origin>>,
    disk: impl Fn(usize, Endpoint, Stop, Ready) -> F,
) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>> + 'static,
{
    let mut signals = Signals::new()?;
    let mut disks = Vec::with_capacity(origins.len());
    for origin in origins.iter().flatten() {
        disks.push((origin.name(), Endpoint::open(origin)?));
    }
    serve_all(disks, signals.wait(), print, disk).await
}

/// What to add to the command line of the VMM, if it is known how it can connect.
fn hints(endpoint: &Endpoint, num_queues: u16, read_only: bool) -> String {
    let hints = endpoint.path().map(|path| {
        VmmHints {
            socket_path: &path,
            num_queues,
            read_only,
            vmm_listens: endpoint.vmm_listens(),
        }
        .to_string()
    });
    hints.unwrap_or_default()
}

/// Exports namespaces until a signal comes.
///
/// # Errors
/// One line for the user; nothing is left behind.
pub(crate) fn export(config: &ExportConfig, machine: &Machine) -> Result<(), Failure> {
    let (runtime, workers) = start(&config.crew, usize::MAX)?;
    let workers = Arc::new(workers);
    let result = runtime.block_on(async {
        let mut stop = Signals::new()?;
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

/// The control plane's runtime, and the workers that `lanes` lanes need.
fn start(crew: &Crew, lanes: usize) -> Result<(Runtime, Workers), Failure> {
    raise_descriptors();
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("control")
        .enable_all()
        .build()?;
    Ok((runtime, crew.start(lanes)?))
}

/// Allows as many descriptors as this process may have: each ring takes three, each region of memory one.
fn raise_descriptors() {
    let limits = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limits.maximum,
        ..limits
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of open descriptors stays as it is");
    }
}

/// Lets the threads end; not for long.
fn end(runtime: Runtime, workers: Arc<Workers>) {
    let deadline = Instant::now() + END;
    // Nobody else has it any more: the disks are over.
    let threads = Arc::into_inner(workers).map(Workers::finish);
    let threads = threads.unwrap_or_default();
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
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
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
