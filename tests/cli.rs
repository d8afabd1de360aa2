//! The program as it is run: what it prints, how it fails, and that it leaves nothing behind.

#![expect(clippy::expect_used, reason = "a test that cannot run has failed")]

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

const NQN: &str = "nqn.2026-01.org.example:disk1";

fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhost-nvmf"))
        .args(args)
        .output()
        .expect("the program can be run")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Runs with bad input: exit status 1, nothing on standard output, one line on standard error that
/// has every word of `names`.
#[track_caller]
fn refused<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>, names: &[&str]) {
    let output = run(args);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert_eq!(text(&output.stdout), "");
    assert!(message.ends_with('\n'), "{message:?}");
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.starts_with("vhost-nvmf: "), "{message}");
    for name in names {
        assert!(message.contains(name), "{name:?} is not in: {message}");
    }
}

#[track_caller]
fn attach_refused(args: &[&str], names: &[&str]) {
    let socket = ["attach", "--socket-path", "/nowhere/disk.sock"];
    refused(socket.iter().chain(args), names);
}

#[track_caller]
fn export_refused(args: &[&str], names: &[&str]) {
    refused(["export"].iter().chain(args), names);
}

fn uri() -> String {
    format!("nvme+tcp://127.0.0.1:1/{NQN}")
}

struct Directory(tempfile::TempDir);

impl Directory {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, size: usize) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, vec![0; size]).expect("a file");
        path
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).expect("readable");
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.expect("an entry").file_name().into_string().ok()
        };
        entries.filter_map(name).collect()
    }
}

fn shown(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn help_and_version_are_printed_and_are_no_failure() {
    for (args, words) in [
        (&["--help"][..], &["Examples:", "attach", "export"][..]),
        (&["help"], &["Examples:"]),
        (
            &["attach", "--help"],
            &[
                "Examples:",
                "--socket-path",
                "--fd",
                "--connect",
                "--disk",
                "--worker-cpus",
                "--keep-alive-tmo",
                "--config-fabrics",
                "--state-dir",
                "nvme+tcp-discovery://",
                "--hdr-digest",
                "--data-digest",
                "--iops-burst",
                "--read-bandwidth",
                "nvme+tcp://",
            ],
        ),
        (
            &["export", "-h"],
            &[
                "Examples:",
                "--allow-host",
                "--ana-state",
                "SIGHUP",
                "block-size=",
                "ram:",
            ],
        ),
        (
            &["discover", "--help"],
            &["Examples:", "8009", "--output-format", "--hostnqn"],
        ),
        (&["identify", "-h"], &["Examples:", "nvme+tcp://"]),
        (&["list-ns", "-h"], &["Examples:", "?nsid=2"]),
        (&["--version"], &["vhost-nvmf 0."]),
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert_eq!(text(&output.stderr), "", "{args:?}");
        for word in words {
            assert!(text(&output.stdout).contains(word), "{args:?}: {word}");
        }
    }
}

#[test]
fn capabilities_are_json_whatever_else_is_asked() {
    for args in [
        &["--print-capabilities"][..],
        &["attach", "--print-capabilities", "--no-such-option"],
        &["--print-capabilities", "export", "/missing"],
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(json["type"], "block");
        assert_eq!(
            json["features"],
            serde_json::json!(["read-only", "blk-file"])
        );
    }
}

#[test]
fn a_command_line_that_asks_for_nothing_says_what_to_write() {
    refused::<&str>([], &["attach", "export", "--help"]);
    refused(["serve"], &["serve", "--help"]);
    refused(["attach"], &["--socket-path", "URI", "attach --help"]);
    refused(["export"], &["SPEC", "export --help"]);
    refused(["discover"], &["URI", "discover --help"]);
    refused(["list-ns", "--nsid", "1"], &["--nsid", "list-ns --help"]);
    attach_refused(&["--serail", "x", &uri()], &["--serail", "--serial"]);
    refused(
        ["--log-format", "xml", "export", "ram:1M"],
        &["xml", "--log-format", "text", "json"],
    );
    refused(
        ["export", "--log-level", "loud", "ram:1M"],
        &["loud", "--log-level", "debug"],
    );
}

#[test]
fn malformed_uris_are_named() {
    attach_refused(&["127.0.0.1"], &["127.0.0.1", "nvme+tcp://"]);
    for (rest, names) in [
        ("/x", &["host"][..]),
        ("h", &["NQN"]),
        ("h:0/x", &["'0'", "port"]),
        ("h:99999/x", &["99999", "port"]),
        ("::1/x", &["::1", "brackets"]),
        ("h/disk1", &["disk1", "nqn."]),
        ("h/%zz", &["%zz", "%25"]),
        ("h/nqn.2014-08.org.nvmexpress.discovery", &["discovery"]),
    ] {
        attach_refused(&[&format!("nvme+tcp://{rest}")], names);
    }
    for (query, names) in [
        ("nsid=0", &["nsid=0", "4294967294"][..]),
        ("uuid=disk", &["uuid=disk", "UUID"]),
        ("nguid=12", &["nguid=12", "32 hex"]),
        ("name=x", &["name", "?nsid="]),
        ("nsid=1&nsid=2", &["once"]),
    ] {
        attach_refused(&[&format!("{}?{query}", uri())], names);
    }
}

#[test]
fn malformed_names_and_numbers_are_named() {
    let uri = uri();
    for (option, value, word) in [
        ("--hostnqn", "host1", "nqn."),
        ("--hostid", "host1", "UUID"),
        ("--hostid", "00000000-0000-0000-0000-000000000000", "zero"),
        ("--serial", "123456789012345678901", "20"),
        ("--serial", "disk\u{e9}", "ASCII"),
        ("--num-queues", "0", "1..=256"),
        ("--num-queues", "257", "1..=256"),
        ("--nr-io-queues", "many", "many"),
        ("--queue-size", "1", "2..=4096"),
        ("--keep-alive-tmo", "3601", "0..=3600"),
        ("--connect-timeout", "0", "1..=3600"),
        ("--io-timeout", "86401", "0..=86400"),
        ("--iopolicy", "random", "round-robin"),
        (
            "--path",
            "nvme+tcp://h:4420/nqn.2026-01.org.example:other",
            "another subsystem",
        ),
        ("--path", "127.0.0.1", "nvme+tcp://"),
        ("--iops", "0", "1..=1000000000"),
        ("--write-iops", "1k", "digit"),
        ("--iops-burst", "5", "--read-iops"),
        ("--bandwidth", "0", "at least 4K"),
        ("--read-bandwidth", "4095", "at least 4K"),
        ("--write-bandwidth", "10MB", "as in 100M"),
        ("--bandwidth-burst", "1M", "--write-bandwidth"),
    ] {
        attach_refused(&[option, value, &uri], &[option, value, word]);
    }
    let both = ["--emulate-512", "--nr-io-queues", "2", &uri];
    attach_refused(&both, &["--emulate-512", "--nr-io-queues"]);
    for (option, value, word) in [
        ("--subnqn", "disks", "nqn."),
        ("--allow-host", "host1", "nqn."),
        ("--listen", "localhost", "ADDR:PORT"),
        ("--listen", "127.0.0.1", "ADDR:PORT"),
        ("--ana-state", "best", "non-optimized"),
        ("--ana-state", "15", "non-optimized"),
    ] {
        export_refused(&[option, value, "ram:1M"], &[option, value, word]);
    }
}

#[test]
fn malformed_specs_are_named() {
    for (spec, word) in [
        ("ram:", "size"),
        ("ram:1X", "1X"),
        ("ram:0", "0"),
        ("ram:99999999T", "99999999T"),
        ("ram:1K,block-size=4096", "multiple of the block size 4096"),
        ("ram:1M,ro", "ro"),
        ("ram:1M,block-size=520", "block-size=4096"),
        ("ram:1M,uuid=1", "UUID"),
        ("ram:1M,cache=none", "cache=none"),
        ("ram:1M,fault=oops", "oops"),
        ("ram:1M,powercut=1X", "1X"),
        ("ram:1M,fault=error:rate=5", "rate=2.5%"),
        ("ram:1M,fault=error=write-falt", "write-fault"),
        ("file:", "path"),
    ] {
        export_refused(&[spec], &[spec, word]);
    }
}

#[test]
fn files_that_cannot_be_exported_are_named() {
    let directory = Directory::new();
    let missing = directory.path("missing.img");
    export_refused(&[shown(&missing)], &[shown(&missing), "No such file"]);
    export_refused(&[shown(directory.0.path())], &["a directory"]);
    let odd = directory.file("odd.img", 1000);
    export_refused(&[shown(&odd)], &["odd.img", "1000", "512", "truncate"]);
    let blocks = directory.file("512.img", 512);
    let spec = format!("{},block-size=4096", shown(&blocks));
    export_refused(&[&spec], &["512.img", "4096"]);
    let empty = directory.file("empty.img", 0);
    export_refused(&[shown(&empty)], &["empty.img", "0 bytes"]);
}

#[test]
fn namespaces_and_addresses_that_clash_are_named() {
    let uuid = "uuid=6ba7b810-9dad-41d1-80b4-00c04fd430c8";
    let specs = [format!("ram:1M,{uuid}"), format!("ram:2M,{uuid}")];
    export_refused(&[&specs[0], &specs[1]], &["ram:1M", "ram:2M", "uuid="]);
    let listen = ["--listen", "[::1]:4420", "--listen", "[::1]:4420"];
    export_refused(&[&listen[..], &["ram:1M"]].concat(), &["[::1]:4420"]);
}

#[test]
fn a_socket_path_that_cannot_be_had_is_named_and_nothing_is_left() {
    let directory = Directory::new();
    let uri = uri();
    let attach = |path: &Path, names: &[&str]| {
        // With an identity of its own, so that a machine that has none adds no line about it.
        let nqn = "nqn.2026-01.org.example:host";
        let path = shown(path);
        refused(
            ["attach", "--socket-path", path, "--hostnqn", nqn, &uri],
            names,
        );
    };
    attach(
        &directory.path("missing/disk.sock"),
        &["missing/disk.sock", "directory", "create it"],
    );
    attach(&directory.path(&"x".repeat(108)), &["107", "shorter"]);
    let file = directory.file("disk.img", 4);
    attach(&file, &["disk.img", "not a socket"]);
    let taken = directory.path("taken.sock");
    let _listener = UnixListener::bind(&taken).expect("a socket");
    attach(&taken, &["taken.sock", "in use"]);
    let mut names = directory.names();
    names.sort();
    assert_eq!(names, ["disk.img", "taken.sock"]);
}

#[test]
fn a_name_with_a_line_break_stays_on_one_line() {
    export_refused(&["/no\nsuch\u{1b}[31m.img"], &["/no", "such"]);
    export_refused(&["ram:\n\nUsage: 1M"], &["ram:"]);
    attach_refused(&["nvme+tcp://h\n/x"], &["host name"]);
}

/// A running `export`, ended with the test.
struct Export {
    child: Child,
    uris: Vec<String>,
}

impl Export {
    /// Exports on a free port and waits for the URIs of `specs`.
    fn start(options: &[&str], specs: &[&str]) -> Self {
        Self::start_logging(options, specs, Stdio::null())
    }

    fn start_logging(options: &[&str], specs: &[&str], log: Stdio) -> Self {
        Self::start_at("127.0.0.1:0", options, specs, log)
    }

    fn start_at(listen: &str, options: &[&str], specs: &[&str], log: Stdio) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vhost-nvmf"))
            .args(["export", "--listen", listen, "--subnqn", NQN])
            .args(options)
            .args(specs)
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("the program can be run");
        let out = child.stdout.take().expect("a pipe");
        let lines = BufReader::new(out).lines().take(specs.len());
        let uris = lines.map(|line| line.expect("a URI")).collect();
        Self { child, uris }
    }

    /// `nvme+tcp://127.0.0.1:PORT/`.
    fn base(&self) -> &str {
        let uri = &self.uris[0];
        &uri[..uri.find("/nqn.").expect("a URI") + 1]
    }

    fn port(&self) -> &str {
        let port = self.base().rsplit(':').next().expect("a port");
        port.trim_end_matches('/')
    }

    /// Asks it to end, and gives it the two seconds that it may take.
    fn terminate(mut self) -> ExitStatus {
        let pid = self.child.id().to_string();
        let kill = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(kill.expect("kill can be run").success());
        let deadline = Instant::now() + Duration::from_secs(2);
        loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        // It has ended already after `terminate`.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// As [`refused`], for an `attach` that gets as far as the network; its socket is gone afterwards.
#[track_caller]
fn attach_fails(uri: &str, options: &[&str], names: &[&str]) {
    let directory = Directory::new();
    let socket = directory.path("disk.sock");
    let args = ["--log-level", "error", "attach", "--socket-path"];
    let args = args.into_iter().chain([shown(&socket), uri]);
    refused(args.chain(options.iter().copied()), names);
    assert_eq!(directory.names(), [""; 0]);
}

#[test]
fn export_prints_the_uri_of_each_namespace_and_ends_when_told_to() {
    let export = Export::start(&[], &["ram:1M", "ram:1M,block-size=4096"]);
    for (nsid, uri) in (1..).zip(&export.uris) {
        assert!(uri.starts_with("nvme+tcp://127.0.0.1:"), "{uri}");
        assert!(uri.ends_with(&format!("/{NQN}?nsid={nsid}")), "{uri}");
    }
    assert_eq!(export.terminate().code(), Some(0));
}

#[test]
fn the_log_is_lines_or_json_and_silent_when_told_to_be() {
    let log = |options: &[&str]| {
        let directory = Directory::new();
        let path = directory.path("log");
        let file = std::fs::File::create(&path).expect("a file");
        let export = Export::start_logging(options, &["ram:1M"], file.into());
        assert_eq!(export.terminate().code(), Some(0));
        std::fs::read_to_string(path).expect("a log")
    };
    let lines = log(&[]);
    assert!(
        lines.contains(" INFO ") && !lines.contains('\u{1b}'),
        "{lines}"
    );
    let json = log(&["--log-format", "json"]);
    assert!(!json.is_empty());
    for line in json.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        assert!(line["level"].is_string() && line["timestamp"].is_string());
    }
    assert_eq!(log(&["--log-level", "off"]), "");
}

#[test]
fn a_controller_that_cannot_be_reached_is_named() {
    // Port 1 needs privileges to listen on, and nothing does.
    attach_fails(&uri(), &[], &["127.0.0.1:1", "refused"]);
    let uri = format!("nvme+tcp://no-such-host.invalid/{NQN}");
    attach_fails(&uri, &[], &["no-such-host.invalid"]);
}

#[test]
fn a_subsystem_or_namespace_that_is_not_there_is_named() {
    let export = Export::start(&[], &["ram:1M", "ram:2M"]);
    let other = "nqn.2026-01.org.example:other";
    attach_fails(&format!("{}{other}", export.base()), &[], &[other]);
    let subsystem = format!("{}{NQN}", export.base());
    attach_fails(
        &format!("{subsystem}?nsid=3"),
        &[],
        &["nsid=3", "nsid=1", "nsid=2"],
    );
    let uuid = "uuid=6ba7b810-9dad-41d1-80b4-00c04fd430c8";
    attach_fails(&format!("{subsystem}?{uuid}"), &[], &[uuid, "nsid=1"]);
    attach_fails(&subsystem, &[], &["nsid=1", "nsid=2"]);
}

#[test]
fn a_host_that_is_not_allowed_is_named() {
    let allowed = "nqn.2026-01.org.example:friend";
    let export = Export::start(&["--allow-host", allowed], &["ram:1M"]);
    let stranger = "nqn.2026-01.org.example:stranger";
    attach_fails(&export.uris[0], &["--hostnqn", stranger], &[stranger]);
}

#[test]
fn an_address_that_cannot_be_listened_on_is_named() {
    let export = Export::start(&[], &["ram:1M"]);
    let address = format!("127.0.0.1:{}", export.port());
    export_refused(&["--listen", &address, "ram:1M"], &[&address, "in use"]);
    // An address for documentation, which no machine has.
    let address = "192.0.2.1:4420";
    export_refused(&["--listen", address, "ram:1M"], &[address]);
}

/// What a command that succeeds says in JSON.
#[track_caller]
fn json(args: &[&str]) -> serde_json::Value {
    let output = run(args.iter().chain(&["--output-format", "json"]));
    assert_eq!(text(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// What a command that succeeds says to people.
#[track_caller]
fn said(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(text(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
    text(&output.stdout)
}

#[test]
fn discover_lists_what_can_be_attached() {
    let export = Export::start(&[], &["ram:1M", "ram:1M"]);
    let uri = format!("nvme+tcp://127.0.0.1:{}", export.port());
    let log = json(&["discover", &uri]);
    assert_eq!(log["controller"], format!("127.0.0.1:{}", export.port()));
    assert!(log["generation"].is_u64());
    assert_eq!(log["skipped"], serde_json::json!([]));
    let records = log["records"].as_array().expect("records");
    assert_eq!(records.len(), 2);
    let (nvm, current) = (&records[0], &records[1]);
    for (record, subtype) in [(nvm, "nvm"), (current, "current")] {
        assert_eq!(record["subtype"], subtype);
        assert_eq!(record["transport"], "tcp");
        assert_eq!(record["address_family"], "ipv4");
        assert_eq!(record["traddr"], "127.0.0.1");
        assert_eq!(record["trsvcid"], export.port());
        assert_eq!(
            (&record["portid"], &record["cntlid"]),
            (&1.into(), &0xffff.into())
        );
    }
    assert_eq!(nvm["subnqn"], NQN);
    assert_eq!(nvm["uri"], format!("{uri}/{NQN}"));
    assert_eq!(current["subnqn"], "nqn.2014-08.org.nvmexpress.discovery");
    assert!(nvm["obstacle"].is_null() && current["uri"].is_null());

    let table = said(&["discover", &uri]);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 4, "{table}");
    assert!(
        lines[1].starts_with("TYPE") && lines[1].ends_with("ATTACH"),
        "{table}"
    );
    assert!(
        lines[2].starts_with("nvm ") && lines[2].ends_with(&format!(" {uri}/{NQN}")),
        "{table}"
    );
    assert_eq!(export.terminate().code(), Some(0));
}

#[test]
fn discover_asks_every_discovery_controller_of_a_file() {
    let export = Export::start(&[], &["ram:1M"]);
    let directory = Directory::new();
    let path = directory.path("f.conf");
    let section = |port: &str| {
        format!(
            "[Discovery Controller]\ncontroller = transport=tcp;traddr=127.0.0.1;trsvcid={port}\n"
        )
    };
    let write = |text: &str| std::fs::write(&path, text).expect("a file");
    let args = [
        "discover",
        "--config-fabrics",
        path.to_str().expect("UTF-8"),
    ];
    write(&(section("1") + &section(export.port())));
    let logs = json(&args);
    let [dead, alive] = logs.as_array().expect("one for each").as_slice() else {
        panic!("not two: {logs}")
    };
    assert!(
        dead["error"]
            .as_str()
            .is_some_and(|it| it.contains("refused")),
        "{dead}"
    );
    assert_eq!(alive["records"][0]["subnqn"], NQN);
    assert_eq!(
        (&alive["referrals"], &alive["unfollowed"]),
        (&serde_json::json!([]), &serde_json::json!([]))
    );
    // None answers, or there is none.
    write(&section("1"));
    refused(args, &["127.0.0.1:1", "refused"]);
    write("[Host]\n");
    refused(args, &["f.conf", "[Discovery Controller]"]);
    refused(
        args.iter().chain(&["nvme+tcp://h"]),
        &["--config-fabrics", "URI"],
    );
}

#[test]
fn discover_shows_a_host_only_what_it_may_connect_to() {
    let friend = "nqn.2026-01.org.example:friend";
    let export = Export::start(&["--allow-host", friend], &["ram:1M"]);
    let uri = format!("nvme+tcp://127.0.0.1:{}", export.port());
    let visible = |hostnqn| -> Vec<serde_json::Value> {
        let log = json(&["discover", "--hostnqn", hostnqn, &uri]);
        let records = log["records"].as_array().expect("records").iter();
        records
            .filter(|it| it["subtype"] == "nvm")
            .cloned()
            .collect()
    };
    assert_eq!(visible(friend).len(), 1);
    assert!(visible("nqn.2026-01.org.example:stranger").is_empty());
}

#[test]
fn discover_tries_the_discovery_port_and_then_the_other() {
    // Addresses of this process alone, so that their ports are free.
    let pid = std::process::id().to_be_bytes();
    let ip = |last: u8| format!("127.{}.{}.{last}", pid[2].max(1), pid[3]);
    let free_port = |ip: &str| {
        let listener = TcpListener::bind((ip, 0)).expect("a port");
        listener.local_addr().expect("an address").port()
    };
    let both = ip(11);
    let port = free_port(&both);
    let start = |listen: &str| Export::start_at(listen, &[], &["ram:1M"], Stdio::null());
    let first = start(&format!("{both}:{port}"));
    let log = json(&["discover", &format!("nvme+tcp://{both}")]);
    assert_eq!(log["controller"], format!("{both}:8009"));
    assert_eq!(
        log["records"][0]["uri"],
        format!("nvme+tcp://{both}:{port}/{NQN}")
    );
    // On the discovery port there are no namespaces.
    refused(
        ["list-ns", &format!("nvme+tcp://{both}:8009/{NQN}")],
        &[NQN, "8009"],
    );

    // The port is taken, which is no error for another export.
    let second = start(&format!("{both}:{}", free_port(&both)));
    assert_eq!(second.terminate().code(), Some(0));
    assert_eq!(first.terminate().code(), Some(0));

    // Something else is on the discovery port, so the other is asked.
    let other = ip(12);
    let stranger = TcpListener::bind((other.as_str(), 8009)).expect("a port of its own");
    let stranger = answer_with(stranger, b"HTTP/1.1 400 Bad Request\r\n\r\n");
    let export = start(&format!("{other}:4420"));
    let log = json(&["discover", &format!("nvme+tcp://{other}")]);
    assert_eq!(log["controller"], format!("{other}:4420"));
    assert_eq!(export.terminate().code(), Some(0));
    drop(stranger);

    let nobody = ip(13);
    refused(
        ["discover", &format!("nvme+tcp://{nobody}")],
        &[&nobody, "8009", "4420", "refused"],
    );
}

#[test]
fn identify_and_list_ns_say_what_the_controller_says() {
    let uuid = "6ba7b810-9dad-41d1-80b4-00c04fd430c8";
    let second = format!("ram:2M,block-size=4096,uuid={uuid}");
    let export = Export::start(&[], &["ram:1M", &second]);
    let subsystem = format!("{}{NQN}", export.base());
    let id = json(&["identify", &subsystem]);
    assert_eq!(id["subnqn"], NQN);
    assert_eq!(id["model"], "vhost-nvmf");
    assert_eq!(id["version"], "1.4.0");
    assert_eq!(id["max_transfer"], 1 << 20);
    assert_eq!(
        (&id["write_zeroes"], &id["deallocate"]),
        (&true.into(), &true.into())
    );
    assert!(id.get("namespace").is_none());
    let one = json(&["identify", &format!("{subsystem}?nsid=2")]);
    assert_eq!(one["namespace"]["uuid"], uuid);
    let shown = said(&["identify", &subsystem]);
    assert!(
        shown.contains(NQN) && shown.contains("1048576 bytes"),
        "{shown}"
    );

    let list = json(&["list-ns", &subsystem]);
    let namespaces = list["namespaces"].as_array().expect("namespaces");
    let found: Vec<_> = namespaces
        .iter()
        .map(|it| {
            (
                it["nsid"].as_u64(),
                it["size"].as_u64(),
                it["block_size"].as_u64(),
            )
        })
        .collect();
    let expected = [(1, 1 << 20, 512), (2, 2 << 20, 4096)];
    let expected = expected.map(|(nsid, size, block)| (Some(nsid), Some(size), Some(block)));
    assert_eq!(found, expected);
    for (namespace, uri) in namespaces.iter().zip(&export.uris) {
        assert_eq!(namespace["uri"], uri.as_str());
    }
    let table = said(&["list-ns", &subsystem]);
    assert_eq!(table.lines().count(), 3, "{table}");
    assert!(
        table.contains(uuid) && table.contains(&export.uris[1]),
        "{table}"
    );
    let one = json(&["list-ns", &format!("{subsystem}?uuid={uuid}")]);
    assert_eq!(one["namespaces"].as_array().map(Vec::len), Some(1));
    assert_eq!(one["namespaces"][0]["nsid"], 2);
    refused(
        ["list-ns", &format!("{subsystem}?nsid=3")],
        &["nsid=3", "nsid=1"],
    );
}

/// Answers every connection with `bytes` and then says nothing more.
fn answer_with(listener: TcpListener, bytes: &'static [u8]) -> String {
    let address = listener.local_addr().expect("an address").to_string();
    std::thread::spawn(move || {
        let mut open: Vec<TcpStream> = Vec::new();
        while let Ok((mut stream, _)) = listener.accept() {
            // A peer may be gone already.
            let _ = stream.write_all(bytes);
            open.push(stream);
        }
    });
    address
}

#[test]
fn what_cannot_be_shown_is_named_in_time() {
    let any = || TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent = answer_with(any(), b"");
    let nonsense = answer_with(any(), &[0x55; 256]);
    let cases = [
        ("127.0.0.1:1", "refused"),
        (nonsense.as_str(), "NVMe/TCP"),
        (silent.as_str(), "within"),
    ];
    std::thread::scope(|scope| {
        for (at, word) in cases {
            for command in ["discover", "identify", "list-ns"] {
                let path = if command == "discover" {
                    String::new()
                } else {
                    format!("/{NQN}")
                };
                scope.spawn(move || {
                    let started = Instant::now();
                    refused([command, &format!("nvme+tcp://{at}{path}")], &[at, word]);
                    assert!(started.elapsed() < Duration::from_secs(8), "{command} {at}");
                });
            }
        }
    });
    refused(
        ["discover", &format!("nvme+tcp://h/{NQN}")],
        &[NQN, "nvme+tcp://HOST[:PORT]"],
    );
    refused(
        ["discover", "--output-format", "xml", "nvme+tcp://h"],
        &["xml", "json"],
    );
    let export = Export::start(&[], &["ram:1M"]);
    let other = "nqn.2026-01.org.example:other";
    refused(["identify", &format!("{}{other}", export.base())], &[other]);
}
