//! Where connections to a target begin: the address of this machine that options or a path ask for.

use std::time::Duration;

use crate::daemons::{Attach, Directory, Export};
use crate::process::Process;

/// Established connections from 127.0.0.`last` to the port of an export.
fn connections(last: u8, export: &Export) -> usize {
    let port = export.address().rsplit_once(':').expect("a port").1;
    let to = format!("{:04X}", port.parse::<u16>().expect("a number"));
    let from = format!("{last:02X}00007F:");
    let table = std::fs::read_to_string("/proc/net/tcp").expect("the table of sockets");
    let lines = table.lines().map(str::split_ascii_whitespace);
    lines
        .filter(|line| {
            let fields: Vec<&str> = line.clone().take(4).collect();
            matches!(fields[..], [_, local, remote, "01"] if local.starts_with(&from) && remote.ends_with(&to))
        })
        .count()
}

#[test]
fn all_queues_of_a_path_begin_where_its_uri_or_else_the_options_say() {
    let export = Export::start(&["ram:8M"]);
    let queues = ["--nr-io-queues", "2"];
    let both = [
        &queues[..],
        &["--host-traddr", "127.0.0.9", "--host-iface", "lo"],
    ]
    .concat();
    let _one = Attach::start_with(&both, export.uri());
    assert_eq!(connections(9, &export), 3);
    let uri = format!("{}&host-traddr=127.0.0.8", export.uri());
    let _other = Attach::start_with(&both, &uri);
    assert_eq!(connections(8, &export), 3);
    assert_eq!(connections(9, &export), 3);
}

#[test]
fn an_address_that_this_machine_does_not_have_is_named() {
    let export = Export::start(&["ram:8M"]);
    let directory = Directory::new();
    let socket = directory.path("disk.sock");
    let socket = socket.to_str().expect("text");
    let args = [
        "attach",
        "--socket-path",
        socket,
        "--host-traddr",
        "192.0.2.77",
    ];
    let mut attach = Process::start("attach", args.into_iter().chain([export.uri()]));
    assert!(!attach.wait(Duration::from_secs(20)).success());
    let said = attach.stderr().join("\n");
    assert!(said.contains("cannot connect from 192.0.2.77"), "{said}");
}
