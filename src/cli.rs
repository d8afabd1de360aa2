//! The command line: its spelling, its help, and its errors as one line.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{
    ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum,
    value_parser,
};
use nvmf::host::NamespaceSelector;
use nvmf::spec::Nqn;
use nvmf::spec::ana::AnaState;
use tracing::level_filters::LevelFilter;
use uuid::Uuid;

use self::local_end::LocalArgs;
use crate::bridge::path_choice::IoPolicy;
use crate::config::ids::parse_uuid;
use crate::config::uri::parse_selector;
use crate::config::{DiscoveryUri, DrainPolicy, Locator, Serial, Spec, Uri};
use crate::limits;
use crate::logging::{LogFormat, LogOptions};
use program::{SocketArgs, WorkerArgs};
use rates::RateArgs;

mod disks;
mod local_end;
mod program;
mod rates;

/// What the vhost-user specification's back-end program conventions call the capabilities of a
/// block back-end.
const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;
const SUBCOMMANDS: [&str; 6] = [
    "attach", "serve", "export", "discover", "identify", "list-ns",
];
const PRINT_CAPABILITIES: &str = "--print-capabilities";

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Invocation {
    /// Print this on standard output, and nothing else.
    Print(String),
    /// Serve remote namespaces as disks, at least one.
    Attach(LogOptions, Vec<AttachArgs>),
    /// Serve storage of this machine as disks, at least one.
    Serve(LogOptions, Vec<ServeArgs>),
    /// Export storage to other hosts.
    Export(LogOptions, ExportArgs),
    /// Show what a controller says.
    Show(LogOptions, Box<Question>),
}

/// What is asked of a controller.
#[derive(Debug)]
pub(crate) enum Question {
    /// Which subsystems there are.
    Discover(DiscoverArgs),
    /// What it is.
    Identify(InspectArgs),
    /// Which namespaces it has.
    ListNs(InspectArgs),
}

/// A command line that asks for nothing; one line that says what to write.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(String);

/// Remote NVMe namespaces as disks of virtual machines.
#[derive(Debug, Parser)]
#[command(name = "vhost-nvmf", version, after_help = EXAMPLES)]
struct CommandLine {
    /// Print what this vhost-user back-end can do, as JSON, and exit; other options are ignored
    #[arg(long)]
    print_capabilities: bool,
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a namespace of a remote controller as a vhost-user-blk disk
    Attach(Box<AttachArgs>),
    /// Serve a file, block device or memory of this machine as a vhost-user-blk disk
    Serve(Box<ServeArgs>),
    /// Export files, block devices and memory as namespaces over NVMe/TCP
    Export(ExportArgs),
    /// List the subsystems that a host offers over NVMe/TCP
    Discover(DiscoverArgs),
    /// Show what a remote controller is
    Identify(InspectArgs),
    /// List the namespaces of a remote controller
    ListNs(InspectArgs),
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Logging")]
struct LogArgs {
    /// Log more; twice logs everything
    #[arg(short, long, global = true, action = ArgAction::Count, conflicts_with = "log_level")]
    verbose: u8,
    /// Log this and what is worse [default: info; error where a command only shows something]
    #[arg(long, global = true, value_name = "LEVEL", value_enum)]
    log_level: Option<LogLevel>,
    /// Log lines for people, or JSON objects
    #[arg(
        long,
        global = true,
        value_name = "FORMAT",
        value_enum,
        default_value_t
    )]
    log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogLevel {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// What a disk is to its VMM, wherever its blocks are.
#[derive(Debug, Args)]
pub(crate) struct DiskArgs {
    #[command(flatten)]
    pub(crate) socket: SocketArgs,
    /// Queues on offer to the guest: at least its vCPUs
    #[arg(
        long,
        value_name = "N",
        default_value_t = limits::DEFAULT_NUM_QUEUES,
        value_parser = value_parser!(u16).range(limits::NUM_QUEUES)
    )]
    pub(crate) num_queues: u16,
    /// Serial that the guest reads, at most 20 characters [default: from the namespace]
    #[arg(long, value_name = "S", conflicts_with = "disk")]
    pub(crate) serial: Option<Serial>,
    /// Offer a read-only disk
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Sectors of 512 bytes where the namespace has larger blocks: for firmware, boot loaders and guests that know no
    /// others. What begins or ends within a block is read, changed and written; all requests are worked on by one lane
    #[arg(long, conflicts_with = "nr_io_queues")]
    pub(crate) emulate_512: bool,
    #[command(flatten)]
    pub(crate) rates: RateArgs,
    #[command(flatten)]
    pub(crate) workers: WorkerArgs,
    /// Take the disks over from the process that serves them, while their guests wait for some milliseconds. If that
    /// cannot be done, this process ends, and the other goes on
    #[arg(long, conflicts_with = "fd")]
    pub(crate) takeover: bool,
    /// One of several disks, by its options without dashes, as in
    /// socket-path=/run/a.sock,uri=nvme+tcp://HOST/SUBNQN,read-only=on; a comma within a value is written twice. May be
    /// given several times; options outside hold for every disk that does not say otherwise
    #[arg(long, value_name = "OPTION=VALUE,...")]
    disk: Vec<String>,
}

/// Options of `attach`.
#[derive(Debug, Args)]
#[command(after_help = ATTACH_EXAMPLES)]
pub(crate) struct AttachArgs {
    #[command(flatten)]
    pub(crate) disk: DiskArgs,
    /// Host NQN to connect with [default: /etc/nvme/hostnqn, else from /etc/machine-id]
    #[arg(long, value_name = "NQN")]
    pub(crate) hostnqn: Option<Nqn>,
    /// Host identifier to connect with [default: /etc/nvme/hostid, else from /etc/machine-id]
    #[arg(long, value_name = "UUID", value_parser = parse_uuid)]
    pub(crate) hostid: Option<Uuid>,
    #[command(flatten)]
    pub(crate) local: LocalArgs,
    /// I/O queue pairs to the controller [default: as many as CPUs]
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(limits::NR_IO_QUEUES))]
    pub(crate) nr_io_queues: Option<u16>,
    /// Entries of each I/O submission queue
    #[arg(
        long,
        value_name = "N",
        default_value_t = limits::DEFAULT_QUEUE_SIZE,
        value_parser = value_parser!(u16).range(limits::QUEUE_SIZE)
    )]
    pub(crate) queue_size: u16,
    /// Keep-alive timeout in seconds; 0 turns keep-alive off
    #[arg(
        long,
        value_name = "S",
        default_value_t = limits::DEFAULT_KEEP_ALIVE_SECONDS,
        value_parser = value_parser!(u16).range(limits::KEEP_ALIVE_SECONDS)
    )]
    pub(crate) keep_alive_tmo: u16,
    /// Seconds that connecting to a controller may take, until it is known what it can do; and each later step
    #[arg(
        long,
        value_name = "S",
        default_value_t = limits::DEFAULT_CONNECT_SECONDS,
        value_parser = value_parser!(u16).range(limits::CONNECT_SECONDS)
    )]
    pub(crate) connect_timeout: u16,
    /// Seconds after which a command without an answer has its controller taken for lost, or up to a quarter later;
    /// 0 waits for ever
    #[arg(
        long,
        value_name = "S",
        default_value_t = limits::DEFAULT_IO_SECONDS,
        value_parser = value_parser!(u32).range(limits::IO_SECONDS)
    )]
    pub(crate) io_timeout: u32,
    /// Seconds between two attempts to get a lost controller back, at most: the first is made at once, the next
    /// after one second, then after twice as long each time
    #[arg(
        long,
        value_name = "S",
        default_value_t = limits::DEFAULT_RECONNECT_DELAY_SECONDS,
        value_parser = value_parser!(u16).range(limits::RECONNECT_DELAY_SECONDS)
    )]
    pub(crate) reconnect_delay: u16,
    /// Seconds after which a lost controller is given up, and requests fail until it is back all the same;
    /// -1 holds them for ever
    #[arg(
        long,
        value_name = "S",
        default_value_t = -1,
        allow_negative_numbers = true,
        value_parser = value_parser!(i32).range(limits::LOSS_SECONDS)
    )]
    pub(crate) ctrl_loss_tmo: i32,
    /// Seconds after which requests fail while a lost controller is not given up yet; -1 does not fail them
    /// earlier
    #[arg(
        long,
        value_name = "S",
        default_value_t = -1,
        allow_negative_numbers = true,
        value_parser = value_parser!(i32).range(limits::LOSS_SECONDS)
    )]
    pub(crate) fast_io_fail_tmo: i32,
    /// Seconds for which a queue that the VMM stops may wait for a lost controller (see --drain-policy), and, when
    /// the guest migrates, again for what such a one may still write
    #[arg(
        long,
        value_name = "S",
        default_value_t = limits::DEFAULT_DRAIN_SECONDS,
        value_parser = value_parser!(u16).range(limits::DRAIN_SECONDS)
    )]
    pub(crate) drain_timeout: u16,
    /// What becomes of requests that take longer
    #[arg(long, value_enum, default_value_t)]
    pub(crate) drain_policy: DrainPolicy,
    /// Ask for a CRC32C digest of every PDU header
    #[arg(long)]
    pub(crate) hdr_digest: bool,
    /// Ask for a CRC32C digest of all data; what the guest writes is then copied once
    #[arg(long)]
    pub(crate) data_digest: bool,
    /// Nanoseconds for which a lane looks for the next request before it sleeps, while that pays; 0 sleeps
    /// at once, and others' processors stay free
    #[arg(
        long,
        value_name = "NS",
        default_value_t = 0,
        value_parser = value_parser!(u32).range(limits::POLL_MAX_NS)
    )]
    pub(crate) poll_max_ns: u32,
    /// Directory where the disk is remembered, so that it can be offered at the next start though its target is away
    /// [default: that of the service manager, /var/lib/vhost-nvmf where it is there, or vhost-nvmf in $XDG_STATE_HOME]
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Take the ways to the subsystem, and how to connect, from this file and from FILE.d/*.conf, of the form of nvme-cli's
    /// /etc/nvme/nvme-fabrics.conf; options given here win
    #[arg(long, value_name = "FILE")]
    pub(crate) config_fabrics: Option<PathBuf>,
    /// Subsystem of the file [default: the only one]
    #[arg(long, value_name = "NQN", requires = "config_fabrics")]
    pub(crate) nqn: Option<Nqn>,
    /// Namespace of the file's subsystem: nsid=N, uuid=U or nguid=G [default: the only one]
    #[arg(
        long,
        value_name = "SELECTOR",
        requires = "config_fabrics",
        value_parser = parse_selector
    )]
    pub(crate) namespace: Option<NamespaceSelector>,
    /// nvme+tcp://HOST[:4420]/SUBNQN[?nsid=N | ?uuid=U | ?nguid=G], or
    /// nvme+tcp-discovery://HOST[:PORT]/[?nqn=PATTERN][&nsid=N | &uuid=U | &nguid=G] for what the host's discovery
    /// controller, on port 8009 or else 4420, tells of the one subsystem whose NQN is of that pattern
    #[arg(
        value_name = "URI",
        required_unless_present_any = ["config_fabrics", "disk"],
        conflicts_with_all = ["config_fabrics", "disk"]
    )]
    pub(crate) uri: Option<Locator>,
    /// Another path to the same namespace of the same subsystem, at another address; may be given several times. It is
    /// verified when it is connected, and connected whenever it can be
    #[arg(long, value_name = "URI", requires = "uri", conflicts_with = "disk")]
    pub(crate) path: Vec<Uri>,
    /// How commands are spread over paths that are equally good
    #[arg(long, value_name = "POLICY", value_enum, default_value_t)]
    pub(crate) iopolicy: IoPolicy,
    /// Names of the options that are given.
    #[arg(skip)]
    pub(crate) given: BTreeSet<String>,
}

/// Options of `serve`.
#[derive(Debug, Args)]
#[command(after_help = format!("{SERVE_EXAMPLES}\n\n{STORAGE_THAT_FAILS}"))]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) disk: DiskArgs,
    /// Lanes that work on requests, each with an I/O queue pair [default: as many as CPUs]
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(limits::NR_IO_QUEUES))]
    pub(crate) nr_io_queues: Option<u16>,
    /// Nanoseconds for which a lane looks for the next request before it sleeps, while that pays; 0 sleeps
    /// at once, and others' processors stay free
    #[arg(
        long,
        value_name = "NS",
        default_value_t = limits::DEFAULT_LOCAL_POLL_MAX_NS,
        value_parser = value_parser!(u32).range(limits::POLL_MAX_NS)
    )]
    pub(crate) poll_max_ns: u32,
    /// PATH, file:PATH[,ro][,direct], ram:SIZE or null:SIZE, each with
    /// [,block-size=512|4096][,uuid=U][,fault=RULE][,powercut[=SIZE]]
    #[arg(
        value_name = "SPEC",
        required_unless_present_any = ["blk_file", "disk"],
        conflicts_with_all = ["blk_file", "disk"],
        value_parser = OsStringValueParser::new().try_map(|text| Spec::parse(&text))
    )]
    spec: Option<Spec>,
    /// The same as SPEC file:PATH, as other vhost-user back-ends spell it; 'serve' may then be left out
    #[arg(long, value_name = "PATH", conflicts_with = "disk")]
    blk_file: Option<PathBuf>,
}

impl ServeArgs {
    /// What is to be served; `None` where there are several disks.
    pub(crate) fn spec(&self) -> Option<Spec> {
        let file = self.blk_file.clone().map(Spec::file);
        self.spec.clone().or(file)
    }
}

/// Options of `export`.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXPORT_EXAMPLES}\n\n{STORAGE_THAT_FAILS}"))]
pub(crate) struct ExportArgs {
    /// Address to listen on; may be given several times. Discovery answers there, and on port 8009
    /// of the same addresses where that is free, unless a port is 0
    #[arg(
        long,
        value_name = "ADDR:PORT",
        default_value = "127.0.0.1:4420",
        value_parser = parse_listen
    )]
    pub(crate) listen: Vec<SocketAddr>,
    /// NQN of the subsystem [default: from the machine's name]
    #[arg(long, value_name = "NQN")]
    pub(crate) subnqn: Option<Nqn>,
    /// Host that may connect; may be given several times [default: any]
    #[arg(long, value_name = "NQN")]
    pub(crate) allow_host: Vec<Nqn>,
    /// Report asymmetric namespace access, with all namespaces in this state: optimized,
    /// non-optimized, inaccessible, persistent-loss or change [default: not reported]
    #[arg(long, value_name = "STATE", value_parser = parse_ana_state)]
    pub(crate) ana_state: Option<AnaState>,
    /// I/O queues that one association of a host may have
    #[arg(
        long,
        value_name = "N",
        default_value_t = limits::DEFAULT_EXPORT_IO_QUEUES,
        value_parser = value_parser!(u16).range(limits::NR_IO_QUEUES)
    )]
    pub(crate) nr_io_queues: u16,
    /// Cross-Controller Resets that a host can have going on at one controller, to learn when another one
    /// that it has lost is done; 0: none, as it must be where another machine exports the same storage under the
    /// same NQN, or files are on a file system without locks
    #[arg(long, value_name = "N", default_value_t = limits::DEFAULT_CCRL)]
    pub(crate) ccrl: u8,
    #[command(flatten)]
    pub(crate) workers: WorkerArgs,
    /// PATH, file:PATH[,ro][,direct], ram:SIZE or null:SIZE, each with
    /// [,block-size=512|4096][,uuid=U][,fault=RULE][,powercut[=SIZE]]
    #[arg(
        value_name = "SPEC",
        required = true,
        value_parser = OsStringValueParser::new().try_map(|text| Spec::parse(&text))
    )]
    pub(crate) specs: Vec<Spec>,
}

/// Options of what shows something and serves nothing.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// Host NQN to connect with [default: as attach]
    #[arg(long, value_name = "NQN")]
    pub(crate) hostnqn: Option<Nqn>,
    /// Host identifier to connect with [default: as attach]
    #[arg(long, value_name = "UUID", value_parser = parse_uuid)]
    pub(crate) hostid: Option<Uuid>,
    #[command(flatten)]
    pub(crate) local: LocalArgs,
    /// Text for people, or JSON
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    pub(crate) output_format: OutputFormat,
}

/// How an answer looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum OutputFormat {
    #[default]
    Text,
    Json,
}

/// Options of `discover`.
#[derive(Debug, Args)]
#[command(after_help = DISCOVER_EXAMPLES)]
pub(crate) struct DiscoverArgs {
    #[command(flatten)]
    pub(crate) show: ShowArgs,
    /// Ask the host's discovery controller alone, and not those that it refers to
    #[arg(long)]
    pub(crate) no_referrals: bool,
    /// Ask the discovery controllers of this file, of the form of nvme-cli's /etc/nvme/nvme-fabrics.conf, and of
    /// FILE.d/*.conf
    #[arg(long, value_name = "FILE")]
    pub(crate) config_fabrics: Option<PathBuf>,
    /// nvme+tcp://HOST[:PORT]; without a port, 8009 is tried, and then 4420
    #[arg(
        value_name = "URI",
        required_unless_present = "config_fabrics",
        conflicts_with = "config_fabrics"
    )]
    pub(crate) uri: Option<DiscoveryUri>,
}

/// Options of `identify` and `list-ns`.
#[derive(Debug, Args)]
#[command(after_help = INSPECT_EXAMPLES)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    pub(crate) show: ShowArgs,
    /// nvme+tcp://HOST[:4420]/SUBNQN[?nsid=N | ?uuid=U | ?nguid=G]
    #[arg(value_name = "URI")]
    pub(crate) uri: Uri,
}

const EXAMPLES: &str = "\
Examples:
  vhost-nvmf export --subnqn nqn.2026-01.org.example:disks disk.img
  vhost-nvmf attach --socket-path /run/disk.sock \\
      nvme+tcp://127.0.0.1/nqn.2026-01.org.example:disks
  vhost-nvmf discover nvme+tcp://storage.example";

const DISCOVER_EXAMPLES: &str = "\
Examples:
  Everything that this host may connect to, with the URIs to attach:
    vhost-nvmf discover nvme+tcp://storage.example
  The same as another host, for a program:
    vhost-nvmf discover --hostnqn nqn.2026-01.org.example:host1 --output-format json \\
        nvme+tcp://storage.example:4420";

const INSPECT_EXAMPLES: &str = "\
Examples:
  The controller and its limits:
    vhost-nvmf identify nvme+tcp://storage.example/nqn.2026-01.org.example:disks
  Its namespaces, with the URIs to attach:
    vhost-nvmf list-ns nvme+tcp://storage.example/nqn.2026-01.org.example:disks
  One namespace alone, with either command:
    vhost-nvmf list-ns 'nvme+tcp://storage.example/nqn.2026-01.org.example:disks?nsid=2'";

const ATTACH_EXAMPLES: &str = "\
Examples:
  The only namespace of a subsystem:
    vhost-nvmf attach --socket-path /run/disk.sock \\
        nvme+tcp://storage.example/nqn.2026-01.org.example:disks
  One of several, on another port of an IPv6 address, read-only:
    vhost-nvmf attach --socket-path /run/disk.sock --read-only \\
        'nvme+tcp://[fd00::1]:4421/nqn.2026-01.org.example:disks?nsid=2'
  Wherever discovery says that it is:
    vhost-nvmf attach --socket-path /run/disk.sock \\
        'nvme+tcp-discovery://storage.example/?nqn=*:disks&nsid=2'
  As nvme-cli is configured:
    vhost-nvmf attach --socket-path /run/disk.sock --config-fabrics /etc/nvme/nvme-fabrics.conf \\
        --nqn nqn.2026-01.org.example:disks
  By two networks, each used in turn:
    vhost-nvmf attach --socket-path /run/disk.sock --iopolicy round-robin \\
        --path nvme+tcp://192.0.2.10/nqn.2026-01.org.example:disks \\
        nvme+tcp://198.51.100.10/nqn.2026-01.org.example:disks
  Over a network that is not trusted to keep bits as they are:
    vhost-nvmf attach --socket-path /run/disk.sock --hdr-digest --data-digest \\
        nvme+tcp://storage.example/nqn.2026-01.org.example:disks
  Two disks of one process, one of them read-only:
    vhost-nvmf attach \\
        --disk socket-path=/run/a.sock,uri=nvme+tcp://storage.example/nqn.2026-01.org.example:a \\
        --disk socket-path=/run/b.sock,uri=nvme+tcp://storage.example/nqn.2026-01.org.example:b,read-only=on
  With 500 requests and 20 MiB a second at most, and 2000 requests at once after a pause:
    vhost-nvmf attach --socket-path /run/disk.sock --iops 500 --iops-burst 2000 --bandwidth 20M \\
        nvme+tcp://storage.example/nqn.2026-01.org.example:disks

How it is: send SIGUSR1; the log says it of each path and disk, which rings are broken and why, and what was done.";

const SERVE_EXAMPLES: &str = "\
Examples:
  An image:
    vhost-nvmf serve --socket-path /run/disk.sock disk.img
  A block device past the page cache, with one lane:
    vhost-nvmf serve --socket-path /run/disk.sock --nr-io-queues 1 /dev/vg0/disk1,direct
  Nothing at all, to measure what is around it:
    vhost-nvmf serve --socket-path /run/disk.sock null:1T
  Two images in one process:
    vhost-nvmf serve --disk socket-path=/run/a.sock,spec=a.img \\
        --disk socket-path=/run/b.sock,spec=b.img,,direct,read-only=on

Growing the disk: enlarge its file or device, then send SIGHUP. The VMM is told.
How it is: send SIGUSR1; the log says which rings are broken and why, and what was done.";

const EXPORT_EXAMPLES: &str = "\
Examples:
  An image to this machine alone:
    vhost-nvmf export disk.img
  A block device and 1 GiB of memory with 4096-byte blocks, to one host of the network:
    vhost-nvmf export --listen '[::]:4420' \\
        --allow-host nqn.2026-01.org.example:host1 \\
        file:/dev/vg0/disk1 ram:1G,block-size=4096
  An image whose name has a comma, read-only:
    vhost-nvmf export 'file:/images/a,,b.img,ro'

Growing a namespace: enlarge its file or device, then send SIGHUP. Hosts are told.
What was done up to now: send SIGUSR1; the log says it.";

const STORAGE_THAT_FAILS: &str = "\
Storage that fails on purpose, for tests:
  fault=ACTION[:FILTER]...  may be given several times; the first error or hang decides
  ACTION  error[=STATUS]    fail with a status such as write-fault, or SCT/SC in hexadecimal, as in
                            2/0x81; with +dnr, \"do not retry\" is set
          delay=TIME[-TIME] begin later, by a time in us, ms or s, or up to chance between two
          hang              neither do nor answer it
  FILTER  read, write, flush, zeroes, discard, compare
                            these operations only
          lba=N[-M]         operations on these blocks only
          rate=P%           with this probability
          after=N, every=N, count=N
                            not the first N; the first of each N; N in all
          seed=N            another course of what is up to chance
          firm              done after its delay also when its connection is gone: nothing recalls it
  powercut[=SIZE][:seed=N]  keep what is written in memory until it is flushed, SIZE of it [64M];
                            what is in memory is lost when this process is killed
  One write in a hundred fails and must not be retried, and reads of some blocks are slow:
    disk.img,fault=error=write-fault+dnr:write:rate=1%,fault=delay=5ms-50ms:read:lba=0-2047
  A disk whose power goes with kill -9:
    disk.img,powercut";

/// Reads the command line, program name first.
///
/// # Errors
/// [`UsageError`] for everything that is not a valid request.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, UsageError> {
    let args: Vec<OsString> = args.into_iter().collect();
    if args.iter().skip(1).any(|arg| arg == PRINT_CAPABILITIES) {
        return Ok(Invocation::Print(format!("{CAPABILITIES}\n")));
    }
    let args = program::with_subcommand(args);
    let subcommand = args
        .iter()
        .skip(1)
        .find_map(|arg| SUBCOMMANDS.into_iter().find(|name| arg == name));
    match read(CommandLine::command(), &args) {
        Ok(CommandLine { log, command, .. }) => Ok(match command {
            Command::Attach(first) => {
                let disks = match first.disk.disk.is_empty() {
                    true => vec![*first],
                    false => disks::read_all(&args, "attach", "uri", |command| match command {
                        Command::Attach(args) => Some(*args),
                        _ => None,
                    })?,
                };
                disks::distinct(disks.iter().map(|args| &args.disk))?;
                Invocation::Attach(log.options(LogLevel::Info), disks)
            }
            Command::Serve(first) => {
                let disks = match first.disk.disk.is_empty() {
                    true => vec![*first],
                    false => disks::read_all(&args, "serve", "spec", |command| match command {
                        Command::Serve(args) => Some(*args),
                        _ => None,
                    })?,
                };
                disks::distinct(disks.iter().map(|args| &args.disk))?;
                Invocation::Serve(log.options(LogLevel::Info), disks)
            }
            Command::Export(args) => Invocation::Export(log.options(LogLevel::Info), args),
            Command::Discover(args) => log.show(Question::Discover(args)),
            Command::Identify(args) => log.show(Question::Identify(args)),
            Command::ListNs(args) => log.show(Question::ListNs(args)),
        }),
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                Ok(Invocation::Print(error.render().to_string()))
            }
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => Err(UsageError(
                "there is no command; write 'vhost-nvmf attach …', 'vhost-nvmf serve …' or \
                 'vhost-nvmf export …'; see 'vhost-nvmf --help'"
                    .to_owned(),
            )),
            _ => Err(UsageError(one_line(&error, subcommand))),
        },
    }
}

/// Reads one command line.
fn read(mut reader: clap::Command, args: &[OsString]) -> Result<CommandLine, clap::Error> {
    let matches = reader.try_get_matches_from_mut(args)?;
    let mut read = CommandLine::from_arg_matches(&matches)?.check()?;
    if let (Command::Attach(args), Some(matches)) =
        (&mut read.command, matches.subcommand_matches("attach"))
    {
        args.given = given(matches);
    }
    Ok(read)
}

/// The options that were written, and not left to their defaults.
fn given(matches: &ArgMatches) -> BTreeSet<String> {
    let ids = matches.ids().map(|id| id.as_str());
    ids.filter(|id| matches.value_source(id) == Some(ValueSource::CommandLine))
        .map(str::to_owned)
        .collect()
}

/// The message of a [`clap::Error`], which has several lines, as one.
fn one_line(error: &clap::Error, subcommand: Option<&str>) -> String {
    let text = error.render().to_string();
    let mut message = String::new();
    let lines = text.lines().map(str::trim);
    for line in lines.take_while(|line| !line.starts_with("Usage:")) {
        let line = line.strip_prefix("error: ").unwrap_or(line);
        if line.is_empty() || line.starts_with("For more information") {
            continue;
        }
        if !message.is_empty() {
            message.push_str(if line.starts_with("tip:") { "; " } else { " " });
        }
        message.push_str(line);
    }
    let space = if subcommand.is_some() { " " } else { "" };
    let subcommand = subcommand.unwrap_or_default();
    // Writing to a string cannot fail.
    let _ = write!(message, "; see 'vhost-nvmf{space}{subcommand} --help'");
    message
}

fn parse_ana_state(text: &str) -> Result<AnaState, &'static str> {
    let mut all = AnaState::ALL.into_iter();
    all.find(|state| state.name() == text)
        .ok_or("it is optimized, non-optimized, inaccessible, persistent-loss or change")
}

fn parse_listen(text: &str) -> Result<SocketAddr, &'static str> {
    text.parse()
        .map_err(|_| "write ADDR:PORT, as in 127.0.0.1:4420 or [::1]:4420")
}

impl CommandLine {
    /// What no single option shows to be wrong.
    fn check(self) -> Result<Self, clap::Error> {
        let checked = match &self.command {
            Command::Attach(args) => args.disk.rates.check().and_then(|()| args.check_paths()),
            Command::Serve(args) => args.disk.rates.check(),
            _ => Ok(()),
        };
        match checked {
            Ok(()) => Ok(self),
            Err(message) => Err(Self::command().error(ErrorKind::ArgumentConflict, message)),
        }
    }
}

impl AttachArgs {
    /// Every path leads to one subsystem.
    fn check_paths(&self) -> Result<(), String> {
        let target = match &self.uri {
            Some(Locator::Namespace(Uri { target, .. })) => target,
            Some(Locator::Search(_)) if !self.path.is_empty() => {
                return Err(
                    "--path is for a URI that names the subsystem; discovery finds paths itself"
                        .to_owned(),
                );
            }
            _ => return Ok(()),
        };
        let other = self
            .path
            .iter()
            .find(|path| path.target.subnqn != target.subnqn);
        if let Some(other) = other {
            return Err(format!(
                "--path {other} is of another subsystem than {}; all paths of a disk lead to one",
                target.subnqn
            ));
        }
        if self.path.len() >= limits::MAX_PATHS {
            return Err(format!("a disk has at most {} paths", limits::MAX_PATHS));
        }
        Ok(())
    }
}

impl LogArgs {
    /// Standard error is for the one line that says why nothing was shown.
    fn show(&self, question: Question) -> Invocation {
        Invocation::Show(self.options(LogLevel::Error), Box::new(question))
    }

    fn options(&self, default: LogLevel) -> LogOptions {
        let level = match (self.verbose, self.log_level.unwrap_or(default)) {
            (0, LogLevel::Off) => LevelFilter::OFF,
            (0, LogLevel::Error) => LevelFilter::ERROR,
            (0, LogLevel::Warn) => LevelFilter::WARN,
            (0, LogLevel::Info) => LevelFilter::INFO,
            (1, _) | (0, LogLevel::Debug) => LevelFilter::DEBUG,
            (2.., _) | (0, LogLevel::Trace) => LevelFilter::TRACE,
        };
        LogOptions {
            level,
            format: self.log_format,
        }
    }
}
