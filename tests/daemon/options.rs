//! Options of sockets, workers and several disks that contradict each other, and the description for other programs.

use std::ffi::OsStr;
use std::path::Path;

use crate::process::Process;
use crate::ring::PATIENCE;

/// Port 1 needs privileges to listen on, and nothing does.
const URI: &str = "nvme+tcp://127.0.0.1:1/nqn.2026-01.org.example:disk1";

/// Runs with bad input: exit status 1, nothing on standard output, one line that has every word.
#[track_caller]
fn refused<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>, words: &[&str]) {
    let mut process = Process::start("refused", args);
    assert_eq!(process.wait(PATIENCE).code(), Some(1));
    assert_eq!(process.stdout(), [""; 0]);
    let log = process.stderr();
    assert_eq!(log.len(), 1, "{log:?}");
    for word in words {
        assert!(log[0].contains(word), "{word:?} is not in: {}", log[0]);
    }
}

#[test]
fn the_description_for_management_software_is_of_this_kind_of_program() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("qemu-scripts");
    let name = "50-vhost-nvmf.json";
    let description = std::fs::read_to_string(directory.join(name)).expect("a description");
    let description: serde_json::Value = serde_json::from_str(&description).expect("JSON");
    let keys: Vec<&str> = description
        .as_object()
        .expect("an object")
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(keys, ["binary", "description", "type"]);
    let mut process = Process::start("capabilities", ["--print-capabilities"]);
    assert!(process.wait(PATIENCE).success());
    let capabilities = process.stdout().concat();
    let capabilities: serde_json::Value = serde_json::from_str(&capabilities).expect("JSON");
    assert_eq!(description["type"], capabilities["type"]);
    let binary = Path::new(description["binary"].as_str().expect("a path"));
    assert!(binary.is_absolute());
    assert_eq!(binary.file_name(), Some(OsStr::new("vhost-nvmf")));
}

#[test]
fn options_of_the_socket_that_contradict_each_other_are_named() {
    for (args, words) in [
        (
            &["--socket-path", "/s", "--fd", "3"][..],
            &["--socket-path", "--fd"][..],
        ),
        (&["--fd", "3", "--connect"], &["--fd", "--connect"]),
        (&["--fd", "2"], &["--fd", "2"]),
        (&["--fd", "x"], &["--fd", "x"]),
        (
            &["--fd", "3", "--socket-mode", "0660"],
            &["--fd", "--socket-mode"],
        ),
        (
            &["--socket-path", "/s", "--socket-mode", "rw"],
            &["--socket-mode", "octal"],
        ),
        (
            &["--socket-path", "/s", "--socket-group", "no-such-group"],
            &["--socket-group", "no-such-group", "number"],
        ),
        (
            &["--socket-path", "/s", "--workers", "0"],
            &["--workers", "1..=1024"],
        ),
        (
            &["--socket-path", "/s", "--worker-cpus", "3-1"],
            &["--worker-cpus", "0-3,8"],
        ),
        (&[], &["--socket-path"]),
    ] {
        let args = ["attach"].iter().chain(args).copied().chain([URI]);
        refused(args, words);
    }
    // Open for other tests, or not at all: a number that no process has.
    refused(
        ["serve", "--fd", "1000000", "ram:1M"],
        &["--fd 1000000", "leave the descriptor open"],
    );
    let cpus = [
        "serve",
        "--worker-cpus",
        "1023",
        "--socket-path",
        "/nowhere/s",
        "ram:1M",
    ];
    refused(cpus, &["CPU 1023", "--worker-cpus"]);
}

#[test]
fn what_is_said_wrongly_of_one_of_several_disks_is_named_with_its_number() {
    let good = format!("socket-path=/nowhere/a.sock,uri={}", URI);
    let attach = |disk: &str, words: &[&str]| {
        refused(["attach", "--disk", &good, "--disk", disk], words);
    };
    attach(
        "socket-path=/nowhere/b.sock",
        &["number 2", "URI", "attach --help"],
    );
    attach(&format!("uri={}", URI), &["number 2", "--socket-path"]);
    attach(
        &format!("{good},num-queues=0"),
        &["number 2", "--num-queues", "1..=256"],
    );
    attach(
        &format!("{good},serail=x"),
        &["number 2", "serail=", "serial="],
    );
    attach(
        &format!("{good},read-only=1"),
        &["number 2", "read-only=on"],
    );
    attach(&format!("{good},workers=1"), &["number 2", "workers="]);
    attach(&good, &["number 2", "/nowhere/a.sock", "another disk"]);
    refused(["attach", "--disk", &good, URI], &["--disk", "URI"]);
    refused(
        ["attach", "--disk", &good, "--socket-path", "/s"],
        &["--disk", "--socket-path"],
    );
    refused(
        ["serve", "--disk", "socket-path=/nowhere/a.sock,spec=ram:1X"],
        &["number 1", "1X"],
    );
}
