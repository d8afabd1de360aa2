//! How a disk is found: by nvme-cli's configuration file of connections, and by discovery.

use std::path::PathBuf;

use serde_json::Value;

use crate::daemons::{Attach, Directory, Export};
use crate::front_end::{FrontEnd, OK};
use crate::process::Process;

const HOST: &str = "nqn.2026-01.org.example:host-of-the-file";
const HOSTID: &str = "46ba5037-7ce5-41fa-9452-48477bf00080";

/// A configuration file, and the directory that it is in.
struct Conf {
    _directory: Directory,
    path: PathBuf,
}

impl Conf {
    fn new(text: &str) -> Self {
        let directory = Directory::new();
        let path = directory.path("nvme-fabrics.conf");
        std::fs::write(&path, text).expect("a file");
        Self {
            _directory: directory,
            path,
        }
    }

    /// `attach` by this file.
    #[track_caller]
    fn attach(&self, args: &[&str]) -> Attach {
        let args: Vec<_> = args.iter().chain(&["--config-fabrics"]).copied().collect();
        Attach::start_with(&args, self.path.to_str().expect("UTF-8"))
    }

    /// What `attach` says that must fail.
    #[track_caller]
    fn refused(&self, args: &[&str]) -> String {
        let path = self.path.to_str().expect("UTF-8");
        refused(&[args, &["--config-fabrics", path]].concat())
    }
}

/// The one line of an `attach` that must fail.
#[track_caller]
fn refused(args: &[&str]) -> String {
    let directory = Directory::new();
    let socket = directory.path("disk.sock");
    let socket = socket.to_str().expect("UTF-8");
    let command = ["attach", "--log-level=error", "--socket-path", socket];
    let mut attach = Process::start("attach", command.iter().chain(args));
    assert!(!attach.wait(std::time::Duration::from_secs(20)).success());
    let lines = attach.stderr();
    assert_eq!(lines.len(), 1, "{lines:?}");
    lines[0].clone()
}

/// The fields of the first such line of the log, once it is there.
#[track_caller]
fn logged(attach: &Attach, message: &str) -> Value {
    attach.process.await_log(|line| line.contains(message));
    attach.process.logged(message).remove(0)
}

/// The NQN and the port of an export.
fn of(export: &Export) -> (String, String) {
    let nqn = export.subsystem().rsplit('/').next().expect("an NQN");
    let port = export.address().rsplit(':').next().expect("a port");
    (nqn.to_owned(), port.to_owned())
}

fn section(nqn: &str, ports: &[&str]) -> String {
    let mut text = format!("[Subsystem]\nnqn = {nqn}\nnr-io-queues = 1\n");
    for port in ports {
        text += &format!("controller = transport=tcp;traddr=127.0.0.1;trsvcid={port}\n");
    }
    text
}

#[test]
fn a_disk_is_attached_as_the_file_says_unless_the_command_line_says_otherwise() {
    let nqn = "nqn.2026-01.org.example:of-the-file";
    let listen = [
        "--listen",
        "127.0.0.1:0",
        "--subnqn",
        nqn,
        "--allow-host",
        HOST,
    ];
    let export = Export::start_with(&listen, &["ram:8M", "ram:4M"]);
    let (_, port) = of(&export);
    // The first path leads nowhere.
    let text = format!(
        "[Host]\nhostnqn = {HOST}\nhostid = {HOSTID}\n{}{}",
        section("nqn.2026-01.org.example:another", &["1"]),
        section(nqn, &["1", &port])
    );
    let conf = Conf::new(&text);
    for (args, queues) in [(&[][..], 1), (&["--nr-io-queues", "2"], 2)] {
        let args = [&["--nqn", nqn, "--namespace", "nsid=2"], args].concat();
        let mut attach = conf.attach(&args);
        let host = logged(&attach, "this host");
        assert_eq!(
            (&host["hostnqn"], &host["hostid"]),
            (&HOST.into(), &HOSTID.into())
        );
        let attached = logged(&attach, "namespace attached");
        assert_eq!(attached["io_queues"], queues, "{attached}");
        assert_eq!(attached["nsid"], 2);
        let mut guest = FrontEnd::connect(&attach.socket);
        assert_eq!(guest.write(0, 0, &[1; 512]), OK);
        attach.stop();
    }
    // Another host is not let in.
    let refused = conf.refused(&["--nqn", nqn, "--hostnqn", "nqn.2026-01.org.example:other"]);
    assert!(
        refused.contains("nqn.2026-01.org.example:other"),
        "{refused}"
    );
    assert!(conf.refused(&[]).contains("--nqn"));
    let refused = conf.refused(&["--nqn", "nqn.2026-01.org.example:of-the-fil"]);
    assert!(refused.contains(nqn), "{refused}");
}

#[test]
fn a_file_with_a_fault_is_refused_before_anything_is_connected() {
    let conf = Conf::new(&section("nqn.2026-01.org.example:disk1", &["0"]));
    let refused = conf.refused(&[]);
    assert!(
        refused.contains("nvme-fabrics.conf:4: trsvcid = 0"),
        "{refused}"
    );
    let conf = Conf::new("[Subsystem]\nnqn = nqn.2026-01.org.example:a\nqueue-deep = 1\n");
    let refused = conf.refused(&[]);
    assert!(
        refused.contains(":3: there is no key 'queue-deep'"),
        "{refused}"
    );
}

#[test]
fn a_disk_is_attached_by_what_discovery_tells() {
    let nqn = "nqn.2026-01.org.example:found";
    let listen = [
        "--listen",
        "127.0.0.1:0",
        "--subnqn",
        nqn,
        "--allow-host",
        HOST,
    ];
    let export = Export::start_with(&listen, &["ram:8M", "ram:4M"]);
    let controller = format!("nvme+tcp-discovery://{}/", export.address());
    let host = ["--hostnqn", HOST];
    for query in ["?nqn=*:fo?nd&nsid=2", "?nsid=2"] {
        let mut attach = Attach::start_with(&host, &format!("{controller}{query}"));
        let attached = logged(&attach, "namespace attached");
        assert_eq!(attached["nsid"], 2);
        assert_eq!(attached["disk"], format!("{}?nsid=2", export.subsystem()));
        let mut guest = FrontEnd::connect(&attach.socket);
        assert_eq!(guest.write(0, 0, &[1; 512]), OK);
        attach.stop();
    }
    // What is told is told to hosts that may connect.
    let none = refused(&[&controller]);
    assert!(
        none.contains("there is none") && none.contains("admits nqn."),
        "{none}"
    );
    let query = format!("{controller}?nqn=*lost");
    let none = refused(&[&host[..], &[&query]].concat());
    assert!(none.contains("'*lost'") && none.contains(nqn), "{none}");
    let nobody = refused(&["nvme+tcp-discovery://127.0.0.1:1"]);
    assert!(
        nobody.contains("by discovery") && nobody.contains("refused"),
        "{nobody}"
    );
}

#[test]
fn all_ways_of_a_file_and_of_discovery_are_paths_of_the_disk() {
    let nqn = "nqn.2026-01.org.example:two-ways";
    let listen = [
        "--listen",
        "127.0.0.1:0",
        "--listen",
        "127.0.0.2:0",
        "--subnqn",
        nqn,
    ];
    let uuid = "ram:8M,uuid=6ba7b810-9dad-41d1-80b4-00c04fd430c8";
    let export = Export::start_with(&listen, &[uuid]);
    let uris = export
        .process
        .await_stdout(|line| line.contains("127.0.0.2:"));
    let second = uris.iter().find(|uri| uri.contains("127.0.0.2:"));
    let second = second
        .expect("an address")
        .split(['/', ':'])
        .nth(4)
        .expect("a port");
    let mut text = section(nqn, &[&of(&export).1]);
    text += &format!("controller = transport=tcp;traddr=127.0.0.2;trsvcid={second}\n");
    let conf = Conf::new(&text);
    let search = format!("nvme+tcp-discovery://{}/", export.address());
    for mut attach in [conf.attach(&[]), Attach::start(&search)] {
        let paths = ["namespace attached", "another path is connected"];
        let mut paths = paths.map(|message| logged(&attach, message)["controller"].to_string());
        paths.sort();
        assert!(paths[0].contains(export.address()), "{paths:?}");
        assert!(
            paths[1].contains(&format!("127.0.0.2:{second}")),
            "{paths:?}"
        );
        let mut guest = FrontEnd::connect(&attach.socket);
        assert_eq!(guest.write(0, 0, &[1; 512]), OK);
        drop(guest);
        attach.stop();
    }
}
