//! A Linux guest under QEMU: booted, given scripts to run, rebooted, powered off.
//!
//! Its root disk is an NVMe device that QEMU itself emulates, read-only, so that nothing the guest runs comes from the disks
//! under test.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use tempfile::TempDir;

use crate::artifacts::artifacts;
use crate::channel::{PORT_NAME, Reply, Request};
use crate::daemon::Daemon;
use crate::monitor::Monitor;
use crate::network;
use crate::qemu::qemu_program;

/// An emulated machine takes 5 seconds. Where each processor had six others to do, one of forty took two minutes.
const BOOT_LIMIT: Duration = Duration::from_secs(240);
const POWER_OFF_LIMIT: Duration = Duration::from_secs(30);
/// For a script that names no other limit.
const SCRIPT_LIMIT: Duration = Duration::from_secs(120);
/// The guest ends a script at its limit; the harness gives up on the guest so much later.
const GRACE: Duration = Duration::from_secs(20);
const SHOWN_CONSOLE_LINES: usize = 60;
/// In the guest: the addresses that QEMU's user network gives.
const NETWORK_UP: &str = "modprobe virtio_net; for i in $(seq 50); do [ -e /sys/class/net/eth0 ] && break; sleep 0.1; done; \
                          ip link set lo up; ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; \
                          ip route add default via 10.0.2.2";

/// A vhost-user-blk disk of a guest. The first is /dev/vda, the next /dev/vdb, and so on.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The back-end's socket.
    pub socket: PathBuf,
    /// The number of queues that QEMU asks for.
    pub queues: u16,
}

/// What a guest is made of.
#[derive(Clone, Debug)]
pub struct GuestOptions {
    /// Virtual processors.
    pub cpus: u16,
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// The disks under test.
    pub disks: Vec<Disk>,
    /// A network card: the guest reaches this machine's loopback as 10.0.2.2, and its other addresses as they are.
    pub network: bool,
    /// The network that QEMU runs in: [`crate::Network::entrance`]; empty: this machine's.
    pub entrance: Vec<String>,
    /// TCP ports of the guest that this machine reaches on its loopback, at [`Guest::forwarded`]. They take a network card.
    pub forward: Vec<u16>,
    /// It can be migrated. Its root disk is a virtio disk then, behind those under test, since QEMU cannot migrate its NVMe device.
    pub migratable: bool,
    /// Its memory is in huge pages of 2 MiB, which the machine must have reserved.
    pub huge_pages: bool,
    /// Further arguments of QEMU, as they are.
    pub arguments: Vec<String>,
}

impl Default for GuestOptions {
    fn default() -> Self {
        Self {
            cpus: 1,
            memory_mib: 512,
            disks: Vec::new(),
            network: false,
            entrance: Vec::new(),
            forward: Vec::new(),
            migratable: false,
            huge_pages: false,
            arguments: Vec::new(),
        }
    }
}

/// What a script left.
#[derive(Clone, Debug)]
pub struct Output {
    /// Its exit status; 124 when its time was over.
    pub status: i32,
    /// The end of its standard output.
    pub stdout: String,
    /// The end of its standard error.
    pub stderr: String,
}

/// A script that runs in the guest.
#[derive(Debug)]
#[must_use = "wait for it with Guest::finish"]
pub struct Job {
    id: u64,
    deadline: Instant,
}

/// A running guest. QEMU ends when it is dropped; when the test failed, the end of the console is printed first.
pub struct Guest {
    qemu: Daemon,
    console: PathBuf,
    monitor: PathBuf,
    to_agent: UnixStream,
    heard: Arc<Heard>,
    boots: usize,
    next_id: u64,
    /// It left a script unanswered: whatever else it is asked would only cost time.
    silent: bool,
    /// Ports of the guest, and where this machine reaches them.
    forwarded: Vec<(u16, SocketAddr)>,
    /// Holds the console and the agent's socket.
    _directory: TempDir,
}

/// What the agent has said.
#[derive(Default)]
struct Heard {
    state: Mutex<HeardState>,
    changed: Condvar,
}

#[derive(Default)]
struct HeardState {
    boot_ids: Vec<String>,
    outputs: HashMap<u64, Output>,
    closed: bool,
}

impl Guest {
    /// Boots a guest and waits until it takes scripts.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn boot(options: &GuestOptions) -> Result<Self> {
        let start = Instant::now();
        let mut guest = Self::launch(options, false)?;
        if let Err(error) = guest.wait_for_boot(BOOT_LIMIT) {
            // The caller gets no guest whose drop could show this.
            eprintln!("{}", guest.console_tail(SHOWN_CONSOLE_LINES));
            return Err(error);
        }
        if options.network || !guest.forwarded.is_empty() {
            guest.sh(NETWORK_UP).context("the guest's network")?;
        }
        eprintln!("  guest up after {:.1} s", start.elapsed().as_secs_f32());
        Ok(guest)
    }

    /// Starts a machine that waits for another one of the same options, disks apart, to be migrated to it from `uri`.
    /// Once it is there: [`Guest::take_over`].
    ///
    /// # Errors
    /// When QEMU does not start.
    pub fn incoming(options: &GuestOptions, uri: &str) -> Result<Self> {
        let guest = Self::launch(options, true)?;
        // It listens there when this is answered.
        let uri = json!({ "uri": uri });
        guest.monitor()?.execute("migrate-incoming", &uri)?;
        Ok(guest)
    }

    /// Goes on with the scripts of the machine that this one was before it was migrated.
    pub fn take_over(&mut self, source: &Self) {
        self.next_id = source.next_id;
        // What the agent said there is not said again here.
        let outputs = std::mem::take(&mut source.heard.lock().outputs);
        self.heard.lock().outputs.extend(outputs);
    }

    /// QEMU's monitor; there can be one connection at a time.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn monitor(&self) -> Result<Monitor> {
        Monitor::connect(&self.monitor)
    }

    fn launch(options: &GuestOptions, incoming: bool) -> Result<Self> {
        let artifacts = artifacts()?;
        let directory = tempfile::Builder::new().prefix("guest-").tempdir()?;
        let initramfs = directory.path().join("initramfs");
        fs::write(&initramfs, &artifacts.initramfs)?;
        let console = directory.path().join("console.log");
        let channel = directory.path().join("agent.sock");
        let listener =
            UnixListener::bind(&channel).with_context(|| channel.display().to_string())?;

        let memory = format!("{}M", options.memory_mib);
        let mut command = network::command(&options.entrance, qemu_program());
        command.args(&artifacts.accelerator);
        command.args([
            "-M",
            "q35",
            "-nodefaults",
            "-display",
            "none",
            "-m",
            &memory,
        ]);
        command.args(["-smp", &options.cpus.to_string()]);
        let pages = match options.huge_pages {
            true => ",hugetlb=on,hugetlbsize=2M",
            false => "",
        };
        command.args([
            "-object",
            &format!("memory-backend-memfd,id=guest-memory,size={memory},share=on{pages}"),
        ]);
        command.args(["-numa", "node,memdev=guest-memory"]);
        command
            .arg("-kernel")
            .arg(&artifacts.kernel)
            .arg("-initrd")
            .arg(&initramfs);
        command.args(["-append", &kernel_arguments(options)]);
        command.args(["-serial", &format!("file:{}", console.display())]);
        let monitor = directory.path().join("monitor.sock");
        command.args([
            "-qmp",
            &format!("unix:{},server=on,wait=off", monitor.display()),
        ]);
        let root = artifacts.root.display();
        command.args([
            "-drive",
            &format!("if=none,id=root,format=raw,readonly=on,file={root}"),
        ]);
        if !options.migratable {
            command.args(["-device", "nvme,drive=root,serial=root"]);
        }
        command.args(["-device", "virtio-serial-pci"]);
        command.args([
            "-chardev",
            &format!("socket,id=agent,path={}", channel.display()),
        ]);
        command.args([
            "-device",
            &format!("virtserialport,chardev=agent,name={PORT_NAME}"),
        ]);
        for (index, disk) in options.disks.iter().enumerate() {
            let Disk { socket, queues } = disk;
            command.args([
                "-chardev",
                &format!("socket,id=disk{index},path={}", socket.display()),
            ]);
            command.args([
                "-device",
                &format!("vhost-user-blk-pci,chardev=disk{index},num-queues={queues}"),
            ]);
        }
        if options.migratable {
            command.args(["-device", "virtio-blk-pci,drive=root,serial=root"]);
        }
        let forwarded = forwarded(&options.forward)?;
        if options.network || !forwarded.is_empty() {
            command.args(["-netdev", &user_network(&forwarded)]);
            command.args(["-device", "virtio-net-pci,netdev=network"]);
        }
        command.args(&options.arguments);
        if incoming {
            command.args(["-incoming", "defer"]);
        }

        let mut qemu = Daemon::start("QEMU", &command)?;
        let to_agent = accept(&listener, &mut qemu)?;
        let heard = Heard::follow(to_agent.try_clone()?);
        Ok(Self {
            qemu,
            console,
            monitor,
            to_agent,
            heard,
            boots: 0,
            next_id: 1,
            silent: false,
            forwarded,
            _directory: directory,
        })
    }

    /// Where this machine reaches a port of [`GuestOptions::forward`].
    ///
    /// # Errors
    /// When the port is none of them.
    pub fn forwarded(&self, port: u16) -> Result<SocketAddr> {
        let mut all = self.forwarded.iter();
        let found = all.find(|(guest, _)| *guest == port);
        Ok(found
            .with_context(|| format!("port {port} is not forwarded"))?
            .1)
    }

    /// Runs a bash script (with `set -euo pipefail`) and returns what it left, whatever its status.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn run(&mut self, script: &str) -> Result<Output> {
        let job = self.start(script, SCRIPT_LIMIT)?;
        self.finish(job)
    }

    /// Runs a script that has to succeed and returns its standard output, trimmed.
    ///
    /// # Errors
    /// When it fails; the error holds its standard error.
    pub fn sh(&mut self, script: &str) -> Result<String> {
        self.sh_within(SCRIPT_LIMIT, script)
    }

    /// As [`Guest::sh`], with a time limit of its own.
    ///
    /// # Errors
    /// When it fails or its time is over.
    pub fn sh_within(&mut self, limit: Duration, script: &str) -> Result<String> {
        let job = self.start(script, limit)?;
        self.finish(job)?.success()
    }

    /// Starts a script and returns at once.
    ///
    /// # Errors
    /// When the guest is gone.
    pub fn start(&mut self, script: &str, limit: Duration) -> Result<Job> {
        let id = self.next_id;
        self.next_id += 1;
        let script = format!("set -euo pipefail\n{script}");
        self.send(&Request::Run {
            id,
            script,
            seconds: limit.as_secs().max(1),
        })?;
        Ok(Job {
            id,
            deadline: Instant::now() + limit + GRACE,
        })
    }

    /// Waits for the end of a script.
    ///
    /// # Errors
    /// When the guest does not answer in time, has rebooted, or is gone.
    pub fn finish(&mut self, job: Job) -> Result<Output> {
        let boots = self.boots;
        self.wait(job.deadline, "the end of a script", |state| {
            if state.boot_ids.len() != boots {
                bail!("the guest rebooted by itself");
            }
            Ok(state.outputs.remove(&job.id))
        })
    }

    /// Reboots the guest from inside, without a shutdown, and waits until it takes scripts again.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn reboot(&mut self) -> Result<()> {
        let job = self.start("sync; exec busybox reboot -f", Duration::from_secs(30))?;
        self.wait_for_another_boot()?;
        self.heard.lock().outputs.remove(&job.id);
        Ok(())
    }

    /// Resets the machine through its monitor, whatever it is doing. Scripts that run are never answered. Gives the time that
    /// QEMU took to stop and reset its devices.
    ///
    /// # Errors
    /// When QEMU does not do it.
    pub fn reset(&mut self) -> Result<Duration> {
        self.monitor()?.reset()
    }

    /// Waits until a machine that was reset takes scripts again.
    ///
    /// # Errors
    /// When it does not come back.
    pub fn come_up_again(&mut self) -> Result<()> {
        self.wait_for_another_boot()?;
        self.heard.lock().outputs.clear();
        Ok(())
    }

    fn wait_for_another_boot(&mut self) -> Result<()> {
        let start = Instant::now();
        self.wait_for_boot(BOOT_LIMIT)?;
        let seconds = start.elapsed().as_secs_f32();
        eprintln!("  guest up again after {seconds:.1} s");
        let state = self.heard.lock();
        let distinct = state
            .boot_ids
            .iter()
            .rev()
            .take(2)
            .collect::<std::collections::HashSet<_>>()
            .len();
        if distinct < 2 {
            bail!("the guest says hello again without having rebooted");
        }
        Ok(())
    }

    /// Powers the guest off from inside and waits for QEMU's end.
    ///
    /// # Errors
    /// When QEMU does not end, or not with status 0.
    pub fn power_off(&mut self) -> Result<()> {
        let _never_answered =
            self.start("sync; exec busybox poweroff -f", Duration::from_secs(30))?;
        let status = self.qemu.wait(POWER_OFF_LIMIT)?;
        if !status.success() {
            bail!("QEMU ended with {status}");
        }
        Ok(())
    }

    /// Ends QEMU at once, as if the power had gone.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.qemu.kill()
    }

    /// Stops the machine where it is. Its clock goes on.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn freeze(&self) -> Result<()> {
        self.qemu.freeze()
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn thaw(&self) -> Result<()> {
        self.qemu.thaw()
    }

    /// The last lines of the serial console.
    pub fn console_tail(&self, count: usize) -> String {
        let console = fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&console);
        let lines: Vec<&str> = text.lines().collect();
        let last = &lines[lines.len().saturating_sub(count)..];
        let shown: Vec<String> = last
            .iter()
            .map(|line| format!("    {}", line.trim_end()))
            .collect();
        format!("---- the end of the guest's console\n{}", shown.join("\n"))
    }

    fn send(&mut self, request: &Request) -> Result<()> {
        if self.silent {
            bail!("not tried, the guest has stopped answering");
        }
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        self.to_agent
            .write_all(line.as_bytes())
            .context("the guest is gone")
    }

    fn wait_for_boot(&mut self, limit: Duration) -> Result<()> {
        let boots = self.boots + 1;
        let deadline = Instant::now() + limit;
        self.wait(deadline, "the guest to come up", |state| {
            Ok((state.boot_ids.len() >= boots).then_some(()))
        })?;
        self.boots = boots;
        Ok(())
    }

    fn wait<T>(
        &mut self,
        deadline: Instant,
        what: &str,
        mut arrived: impl FnMut(&mut HeardState) -> Result<Option<T>>,
    ) -> Result<T> {
        let heard = Arc::clone(&self.heard);
        let mut state = heard.lock();
        loop {
            if let Some(value) = arrived(&mut state)? {
                return Ok(value);
            }
            if state.closed {
                bail!("QEMU ended while waiting for {what}");
            }
            let Some(left) = deadline
                .checked_duration_since(Instant::now())
                .filter(|left| !left.is_zero())
            else {
                self.silent = true;
                bail!("no answer from the guest: waited for {what}");
            };
            let waited = heard.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// What the kernel is told; its root is the NVMe device, or the virtio disk behind those under test.
fn kernel_arguments(options: &GuestOptions) -> String {
    let behind = |count: usize| (b'a'..=b'z').nth(count).map_or('z', char::from);
    let root = match options.migratable {
        true => format!("vd{}", behind(options.disks.len())),
        false => "nvme0n1".to_owned(),
    };
    format!("console=ttyS0 loglevel=6 panic=-1 root=/dev/{root} ro init=/run/guest-agent")
}

/// A free port of the loopback for each port of the guest. Nothing holds it until QEMU takes it, a moment later.
fn forwarded(ports: &[u16]) -> Result<Vec<(u16, SocketAddr)>> {
    let listeners: Vec<TcpListener> = ports
        .iter()
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect::<std::io::Result<_>>()?;
    let addresses = listeners.iter().map(TcpListener::local_addr);
    let pairs = ports.iter().zip(addresses);
    pairs.map(|(&port, address)| Ok((port, address?))).collect()
}

fn user_network(forwarded: &[(u16, SocketAddr)]) -> String {
    let forward = |(port, address): &(u16, SocketAddr)| format!(",hostfwd=tcp:{address}-:{port}");
    let forwards: String = forwarded.iter().map(forward).collect();
    format!("user,id=network,ipv6=off{forwards}")
}

impl Drop for Guest {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.console_tail(SHOWN_CONSOLE_LINES));
        }
    }
}

impl Output {
    /// The trimmed standard output of a script that succeeded.
    ///
    /// # Errors
    /// When it did not; the error holds what it said.
    pub fn success(self) -> Result<String> {
        match self.status {
            0 => Ok(self.stdout.trim().to_owned()),
            124 => bail!(
                "its time in the guest was over: {} {}",
                self.stdout.trim(),
                self.stderr.trim()
            ),
            status => bail!(
                "status {status} in the guest: {} {}",
                self.stdout.trim(),
                self.stderr.trim()
            ),
        }
    }
}

impl Heard {
    fn follow(stream: UnixStream) -> Arc<Self> {
        let heard = Arc::new(Self::default());
        let collected = Arc::clone(&heard);
        thread::spawn(move || {
            let mut reader = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(reader.read_until(b'\n', &mut line), Ok(length) if length > 0) {
                // A reboot may cut a line off: what is no reply is passed over, and missed by its deadline.
                match serde_json::from_slice(&line) {
                    Ok(Reply::Hello { boot_id }) => collected.lock().boot_ids.push(boot_id),
                    Ok(Reply::Done {
                        id,
                        status,
                        stdout,
                        stderr,
                    }) => {
                        collected.lock().outputs.insert(
                            id,
                            Output {
                                status,
                                stdout,
                                stderr,
                            },
                        );
                    }
                    Err(_) => {}
                }
                collected.changed.notify_all();
                line.clear();
            }
            collected.lock().closed = true;
            collected.changed.notify_all();
        });
        heard
    }

    fn lock(&self) -> MutexGuard<'_, HeardState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes QEMU's connection, unless QEMU ends first.
fn accept(listener: &UnixListener, qemu: &mut Daemon) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= deadline {
            bail!("QEMU did not connect to its agent socket");
        }
        // Returns early, with QEMU's own words, when it ends.
        match qemu.wait_for_output(1, Duration::from_millis(50), |_| false) {
            Err(error) if qemu.try_wait()?.is_some() => return Err(error),
            _ => {}
        }
    }
}
