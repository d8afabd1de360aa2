//! The contenders: what each is made of, what it needs, and how it is started.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::child::{Program, succeeds};
use crate::hop::Asking;
use crate::kernel;
use crate::link::Link;
use crate::vhost_disk::VhostDisk;

/// What a contender is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `vhost-nvmf serve SPEC`.
    Serve(Backing),
    /// `vhost-nvmf attach` of `vhost-nvmf export ram:`; with header and data digests or without.
    Bridge { digests: bool },
    /// `qemu-storage-daemon`, with what a file is read and written with.
    Qsd(Backing, &'static str),
    /// The plain relay and its responder.
    Relay,
    /// A socket that somebody else serves, and the processes that do.
    Socket(PathBuf, Vec<u32>),
}

/// What is behind a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backing {
    Null,
    Ram,
    File,
}

/// A contender by its name in the table.
#[derive(Debug, Clone)]
pub(crate) struct Contender {
    pub(crate) name: String,
    pub(crate) kind: Kind,
}

/// Every contender that the bench itself can start, in the order of the table.
pub(crate) fn all() -> Vec<Contender> {
    let contender = |name: &str, kind| Contender {
        name: name.to_owned(),
        kind,
    };
    vec![
        contender("serve-null", Kind::Serve(Backing::Null)),
        contender("serve-ram", Kind::Serve(Backing::Ram)),
        contender("serve-file", Kind::Serve(Backing::File)),
        contender("bridge-ram", Kind::Bridge { digests: false }),
        contender("bridge-ram-digests", Kind::Bridge { digests: true }),
        contender("relay", Kind::Relay),
        contender("qsd-null", Kind::Qsd(Backing::Null, "threads")),
        contender("qsd-file-threads", Kind::Qsd(Backing::File, "threads")),
        contender("qsd-file-io_uring", Kind::Qsd(Backing::File, "io_uring")),
    ]
}

/// What contenders are started with.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    /// The program `vhost-nvmf`.
    pub(crate) vhost_nvmf: PathBuf,
    /// The program `qemu-storage-daemon`.
    pub(crate) qsd: PathBuf,
    /// A directory for sockets and logs.
    pub(crate) directory: PathBuf,
    /// The file of those that have one.
    pub(crate) file: PathBuf,
    /// Bytes of each disk.
    pub(crate) size: u64,
}

/// A contender that is served, and connected to.
pub(crate) struct Running {
    // Dropped first: a back-end whose front-end has gone ends more quietly.
    pub(crate) link: Box<dyn Link>,
    pub(crate) processes: Processes,
}

/// CPU time of a contender.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CpuSeconds {
    /// Of all its processes.
    pub(crate) all: f64,
    /// Of the one that serves the socket.
    pub(crate) device: f64,
}

/// All processes of a contender.
#[derive(Debug, Default)]
pub(crate) struct Processes {
    /// The first serves the socket.
    programs: Vec<Program>,
    others: Vec<u32>,
}

impl Contender {
    /// Whether it is known to give back what was written.
    pub(crate) fn keeps_data(&self) -> bool {
        match self.kind {
            Kind::Serve(backing) | Kind::Qsd(backing, _) => backing != Backing::Null,
            Kind::Bridge { .. } => true,
            // Whatever is behind a socket, it may be a null device.
            Kind::Relay | Kind::Socket(..) => false,
        }
    }

    /// Why it cannot take part here, and what to do about that.
    pub(crate) fn missing(&self, setup: &Setup) -> Option<String> {
        let program = setup.vhost_nvmf.display();
        let build = "cargo build --release -p vhost-nvmf";
        match self.kind {
            Kind::Serve(_) | Kind::Bridge { .. } if !setup.vhost_nvmf.is_file() => {
                Some(format!("there is no {program}; {build}"))
            }
            Kind::Serve(_)
                if !succeeds(Command::new(&setup.vhost_nvmf).args(["serve", "--help"])) =>
            {
                Some(format!("{program} has no command 'serve'; {build}"))
            }
            Kind::Qsd(..) if !succeeds(Command::new(&setup.qsd).arg("--version")) => Some(format!(
                "there is no {}; on Debian: apt-get install qemu-system-common",
                setup.qsd.display()
            )),
            _ => None,
        }
    }

    /// Starts and connects it. `run` tells one start from another.
    ///
    /// # Errors
    /// One of its programs does not serve.
    pub(crate) fn start(&self, setup: &Setup, run: &str) -> Result<Running> {
        let at = |suffix: &str| {
            setup
                .directory
                .join(format!("{}-{run}.{suffix}", self.name))
        };
        let mut programs = Vec::new();
        let mut others = Vec::new();
        let socket = at("sock");
        match &self.kind {
            Kind::Serve(backing) => {
                let mut command = vhost_nvmf(setup, "serve");
                command.arg("--socket-path").arg(&socket);
                command.arg(spec(*backing, setup)).stdout(Stdio::null());
                programs.push(Program::start(command, at("log"))?);
            }
            Kind::Bridge { digests } => {
                let mut command = vhost_nvmf(setup, "export");
                command.args(["--listen", "127.0.0.1:0", "--subnqn", NQN]);
                command
                    .arg(spec(Backing::Ram, setup))
                    .stdout(Stdio::piped());
                let mut export = Program::start(command, at("export.log"))?;
                let uri = export.first_line()?;
                let mut command = vhost_nvmf(setup, "attach");
                command.arg("--socket-path").arg(&socket);
                if *digests {
                    command.args(["--hdr-digest", "--data-digest"]);
                }
                command.arg(uri).stdout(Stdio::null());
                // The bridge is ended before its target.
                programs.push(Program::start(command, at("log"))?);
                programs.push(export);
            }
            Kind::Qsd(backing, aio) => {
                let command = qsd(setup, *backing, aio, &socket);
                programs.push(Program::start(command, at("log"))?);
            }
            Kind::Relay => return start_relay(setup, &at("log"), &at("responder.log")),
            Kind::Socket(path, pids) => {
                others.clone_from(pids);
                let link = Box::new(VhostDisk::connect(path)?);
                return Ok(Running {
                    link,
                    processes: Processes { programs, others },
                });
            }
        }
        if let Some(server) = programs.first_mut() {
            server.wait_for(&socket)?;
        }
        let connected = VhostDisk::connect(&socket).with_context(|| {
            programs
                .first()
                .map(Program::last_words)
                .unwrap_or_default()
        });
        Ok(Running {
            link: Box::new(connected?),
            processes: Processes { programs, others },
        })
    }
}

const NQN: &str = "nqn.2026-01.org.example:bench";

fn vhost_nvmf(setup: &Setup, subcommand: &str) -> Command {
    let mut command = Command::new(&setup.vhost_nvmf);
    command.arg(subcommand).args(["--log-format", "json"]);
    command.stdin(Stdio::null());
    command
}

fn spec(backing: Backing, setup: &Setup) -> OsString {
    match backing {
        Backing::Null => format!("null:{}", setup.size).into(),
        Backing::Ram => format!("ram:{}", setup.size).into(),
        Backing::File => {
            let mut spec = OsString::from("file:");
            spec.push(&setup.file);
            spec
        }
    }
}

fn qsd(setup: &Setup, backing: Backing, aio: &str, socket: &Path) -> Command {
    let blockdev = match backing {
        Backing::Null | Backing::Ram => {
            format!("null-co,node-name=disk,size={},read-zeroes=off", setup.size)
        }
        Backing::File => format!(
            "file,node-name=disk,filename={},aio={aio},locking=off,cache.direct=off",
            setup.file.display()
        ),
    };
    let mut command = Command::new(&setup.qsd);
    command.arg("--blockdev").arg(blockdev);
    command.arg("--export").arg(format!(
        "vhost-user-blk,id=disk,node-name=disk,writable=on,num-queues=1,\
         addr.type=unix,addr.path={}",
        socket.display()
    ));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn start_relay(setup: &Setup, log: &Path, responder_log: &Path) -> Result<Running> {
    let this = std::env::current_exe()?;
    let mut command = Command::new(&this);
    command
        .arg("responder")
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut responder = Program::start(command, responder_log.to_owned())?;
    let address = responder.first_line()?;
    let (hop, kick, call) = Asking::new(setup.size)?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(hop.file());
    let mut command = Command::new(&this);
    command.args(["relay", "--responder", &address, "--memory"]);
    command.arg(format!("/proc/{}/fd/{fd}", std::process::id()));
    command.stdin(kick).stdout(call);
    let relay = Program::start(command, log.to_owned())?;
    Ok(Running {
        link: Box::new(hop),
        processes: Processes {
            programs: vec![relay, responder],
            others: Vec::new(),
        },
    })
}

impl Processes {
    /// Every process that it consists of; none when they are not known.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let own = self.programs.iter().map(Program::pid);
        own.chain(self.others.iter().copied()).collect()
    }

    /// The CPU time that it has used; none when its processes are not known.
    ///
    /// # Errors
    /// One has ended.
    pub(crate) fn cpu_seconds(&self) -> Result<Option<CpuSeconds>> {
        let mut used: Option<CpuSeconds> = None;
        for pid in self.pids() {
            let seconds = kernel::cpu_time(pid)?.as_secs_f64();
            let first = CpuSeconds {
                all: 0.0,
                device: seconds,
            };
            used.get_or_insert(first).all += seconds;
        }
        Ok(used)
    }

    /// The last that its programs said.
    pub(crate) fn last_words(&self) -> String {
        let words = self.programs.iter().map(Program::last_words);
        words.collect::<Vec<_>>().join(" | ")
    }
}

impl Running {
    /// Ends it, and returns the log of each program.
    pub(crate) fn end(self) -> Vec<String> {
        drop(self.link);
        self.processes
            .programs
            .into_iter()
            .map(Program::end)
            .collect()
    }
}
