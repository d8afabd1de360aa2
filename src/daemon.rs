//! What a command does from its checked configuration to its end: runtimes, workers, signals.

use std::convert::Infallible;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvmf::controller::Target;
use nvmf::transport::Registry;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Barrier, Mutex};

use crate::attach::Attached;
use crate::config::{AttachPlan, ExportConfig, Machine, ServeConfig};
use crate::disks::{Failure, Ready, Stop, serve_all};
use crate::endpoint::{Endpoint, Origin};
use crate::export::Export;
use crate::front::{Start, TakeOver};
use crate::handover::taking::NotTaken;
use crate::hints::VmmHints;
use crate::serve::Local;
use crate::status::StatusSignal;
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
    let takeover = plans
        .iter()
        .any(AttachPlan::takes_over)
        .then(|| Successor::new(plans.len()));
    let (runtime, workers) = start(&crew, lanes.map(usize::from).sum())?;
    let workers = Arc::new(workers);
    let registry = Arc::new(Registry::with_defaults());
    let plans: Vec<_> = plans.into_iter().map(Arc::new).collect();
    let result = runtime.block_on(serve_disks(
        origins,
        takeover.as_ref(),
        |number, place, mut stop, ready| {
            let takeover = takeover.clone();
            let (plan, registry) = (Arc::clone(&plans[number]), Arc::clone(&registry));
            let workers = Arc::clone(&workers);
            async move {
                let attached = tokio::select! {
                    attached = Attached::attach(registry, &plan, &workers) => attached?,
                    () = stop.wait() => return Ok(()),
                };
                let host = plan.host();
                tracing::info!(hostnqn = %host.hostnqn, hostid = %host.hostid, "this host");
                let offer = (attached.config.num_queues, attached.config.read_only);
                let Some(start) = begin(place, takeover.as_ref(), offer, ready, &mut stop).await
                else {
                    return Ok(());
                };
                let (disk, beside) = attached.into_parts();
                let served = tokio::select! {
                    served = disk.serve(start, stop.wait()) => served,
                    never = beside.run() => match never {},
                };
                over(served, takeover.as_ref()).await
            }
        },
    ));
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
    let takeover = configs
        .iter()
        .any(|config| config.takeover)
        .then(|| Successor::new(configs.len()));
    let lanes = lanes.map(usize::from).sum();
    let (runtime, workers) = start(&crew.unwrap_or_default(), lanes)?;
    let (workers, machine) = (Arc::new(workers), Arc::new(machine));
    let configs: Vec<_> = configs.into_iter().map(Arc::new).collect();
    let result = runtime.block_on(serve_disks(
        origins,
        takeover.as_ref(),
        |number, place, mut stop, ready| {
            let takeover = takeover.clone();
            let (config, machine) = (Arc::clone(&configs[number]), Arc::clone(&machine));
            let workers = Arc::clone(&workers);
            async move {
                let (local, disk) = tokio::select! {
                    served = Local::serve(&config, &machine, &workers) => served?,
                    () = stop.wait() => return Ok(()),
                };
                let offer = (config.choices.num_queues, config.choices.read_only);
                let Some(start) = begin(place, takeover.as_ref(), offer, ready, &mut stop).await
                else {
                    local.end().await;
                    return Ok(());
                };
                let mut growth = Growth::new()?;
                let served = tokio::select! {
                    served = disk.serve(start, stop.wait()) => served,
                    never = growth.follow(local.target()) => match never {},
                };
                local.end().await;
                over(served, takeover.as_ref()).await
            }
        },
    ));
    end(runtime, workers);
    result
}

/// Listens for all disks first, so that a VMM that is quicker than a controller waits in the queue, and then starts
/// them. Disks that are taken over have somebody who listens.
async fn serve_disks<F>(
    origins: Vec<Option<Origin>>,
    takeover: Option<&Successor>,
    disk: impl Fn(usize, Place, Stop, Ready) -> F,
) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>> + 'static,
{
    let mut signals = Signals::new()?;
    let mut disks = Vec::with_capacity(origins.len());
    for origin in origins.iter().flatten() {
        let place = match (takeover, origin.path()) {
            (Some(_), Some(path)) => Place::TakenOver(origin.clone(), std::path::absolute(path)?),
            _ => Place::Made(Endpoint::open(origin)?),
        };
        disks.push((origin.name(), place));
    }
    serve_all(disks, signals.wait(), print, disk).await
}

/// Where front-ends of a disk are to come from.
enum Place {
    /// From here.
    Made(Endpoint),
    /// From where another process has them, which has the disk at this path.
    TakenOver(Origin, PathBuf),
}

/// What the disks of a process have in common that takes them over.
#[derive(Clone)]
struct Successor {
    /// None is taken over before all could be.
    all: Arc<Barrier>,
    /// Those that were.
    taken: Arc<Mutex<usize>>,
}

impl Successor {
    fn new(disks: usize) -> Self {
        Self {
            all: Arc::new(Barrier::new(disks)),
            taken: Arc::default(),
        }
    }
}

/// How a disk that is ready begins; `None` when it has to end before that.
async fn begin(
    place: Place,
    takeover: Option<&Successor>,
    (num_queues, read_only): (u16, bool),
    ready: Ready,
    stop: &mut Stop,
) -> Option<Start> {
    match (place, takeover) {
        (Place::TakenOver(origin, path), Some(successor)) => {
            tokio::select! {
                _ = successor.all.wait() => {}
                () = stop.wait() => return None,
            }
            let taken = Arc::clone(&successor.taken);
            Some(Start::TakeOver(TakeOver {
                origin,
                path,
                taken,
                ready,
            }))
        }
        (Place::Made(endpoint), _) => {
            ready.tell(hints(&endpoint, num_queues, read_only));
            Some(Start::Fresh(endpoint))
        }
        (Place::TakenOver(..), None) => None,
    }
}

/// The end of a disk. Where others were taken over already, one that was not is its own affair.
async fn over(served: Result<(), NotTaken>, takeover: Option<&Successor>) -> Result<(), Failure> {
    let Err(error) = served else {
        return Ok(());
    };
    match takeover {
        Some(successor) if *successor.taken.lock().await > 0 => {
            tracing::error!("{error}; this process goes on with the disks that it has taken over");
            Ok(())
        }
        _ => Err(error.into()),
    }
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
        // Nobody may have anything to tell yet, and it is no reason to end.
        StatusSignal::new();
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
