//! The program by the conventions of vhost-user back-ends: inherited sockets, VMMs that listen, several disks, workers.

use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};

use crate::daemons::{Attach, Directory, END, Export};
use crate::driver::{Direction, Driver};
use crate::front_end::{FrontEnd, IOERR, OK, Setup};
use crate::process::Process;
use crate::ring::PATIENCE;

/// Starts the program, which inherits this descriptor.
fn start_with(fd: impl AsFd, command: &str, args: &[&str]) -> Process {
    let fd = fd.as_fd();
    fcntl_setfd(fd, FdFlags::empty()).expect("a flag");
    let number = fd.as_raw_fd().to_string();
    let command = [command, "--log-format", "json", "--fd", &number];
    Process::start(command[0], command.iter().chain(args))
}

#[track_caller]
fn ends_well(process: &mut Process, signal: Signal) {
    let sent = Instant::now();
    process.signal(signal);
    let status = process.wait(PATIENCE);
    assert!(status.success(), "{status}");
    assert!(sent.elapsed() < END, "it took {:?}", sent.elapsed());
}

#[test]
fn a_listening_socket_that_is_inherited_serves_one_vmm_after_the_other_and_stays() {
    let directory = Directory::new();
    let path = directory.path("disk.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    let mut serve = start_with(&listener, "serve", &["ram:8M"]);
    drop(listener);
    serve.await_stdout(|line| line.contains(path.to_str().expect("UTF-8")));
    for round in 0..2 {
        let mut guest = FrontEnd::connect(&path);
        assert_eq!(guest.write(0, round, &[1; 512]), OK);
    }
    ends_well(&mut serve, Signal::TERM);
    assert!(path.exists(), "what others made is theirs to remove");
}

#[test]
fn a_connected_socket_that_is_inherited_is_served_and_its_end_is_the_end() {
    let (vmm, ours) = UnixStream::pair().expect("a pair");
    let mut serve = start_with(&ours, "serve", &["ram:8M"]);
    drop(ours);
    let mut guest = FrontEnd::over(vmm, Setup::default());
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert!(serve.is_running());
    drop(guest);
    let status = serve.wait(END);
    assert!(status.success(), "{status}");
    assert_eq!(serve.stdout(), [""; 0]);
}

#[test]
fn a_descriptor_that_is_no_socket_of_a_vmm_ends_the_start() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut serve = start_with(&listener, "serve", &["ram:8M"]);
    assert_eq!(serve.wait(PATIENCE).code(), Some(1));
    let log = serve.stderr().concat();
    assert!(
        log.contains("no Unix socket") && log.contains("--fd"),
        "{log}"
    );
}

#[test]
fn a_vmm_that_listens_is_connected_to_however_late_and_however_often_it_comes() {
    let directory = Directory::new();
    let path = directory.path("vmm.sock");
    let text = path.to_str().expect("UTF-8");
    let args = [
        "serve",
        "--log-format",
        "json",
        "--connect",
        "--socket-path",
        text,
        "ram:8M",
    ];
    let mut serve = Process::start("serve", args);
    serve.await_log(|line| line.contains("does not listen yet"));
    for round in 0..2 {
        let listener = UnixListener::bind(&path).expect("a socket");
        let (stream, _) = listener.accept().expect("it connects");
        let mut guest = FrontEnd::over(stream, Setup::default());
        assert_eq!(guest.write(0, round, &[1; 512]), OK);
        std::fs::remove_file(&path).expect("it is there");
    }
    assert!(serve.stdout().iter().any(|line| line.contains("server=on")));
    ends_well(&mut serve, Signal::INT);
}

#[test]
fn the_convention_of_other_back_ends_needs_no_command_and_no_uri() {
    let directory = Directory::new();
    let (image, path) = (directory.path("disk.img"), directory.path("disk.sock"));
    std::fs::write(&image, vec![7; 1 << 20]).expect("an image");
    let socket = format!("--socket-path={}", path.display());
    let file = format!("--blk-file={}", image.display());
    let mut serve = Process::start("serve", [&socket, &file, "--read-only"]);
    serve.await_stdout(|line| line.starts_with("One queue for each vCPU"));
    let mut guest = FrontEnd::connect(&path);
    assert_eq!(guest.read(0, 8, 512), (OK, vec![7; 512]));
    assert_eq!(guest.write(0, 0, &[1; 512]), IOERR);
    ends_well(&mut serve, Signal::TERM);
}

#[test]
fn a_socket_has_the_mode_that_was_asked_for() {
    let serve = Attach::serve(&["--socket-mode", "0606"], "ram:8M");
    let mode = serve.socket.metadata().expect("it is there").mode();
    assert_eq!(mode & 0o7777, 0o606);
}

/// Starts `attach` or `serve` with these disks, each with a socket of its own in the directory.
fn start_disks(
    directory: &Directory,
    command: &str,
    options: &[&str],
    disks: &[String],
) -> Process {
    let mut args: Vec<String> = [command, "--log-format", "json"].map(str::to_owned).into();
    args.extend(options.iter().map(|option| (*option).to_owned()));
    for (disk, number) in disks.iter().zip(0..) {
        let socket = directory.path(&format!("{number}.sock"));
        args.push(format!("--disk=socket-path={},{disk}", socket.display()));
    }
    Process::start(command, args)
}

#[test]
fn disks_of_one_process_are_apart_from_each_other() {
    let directory = Directory::new();
    let export = Export::start(&["ram:8M", "ram:8M,block-size=4096"]);
    let disks = export.uris.iter().map(|uri| format!("uri={uri}"));
    let disks: Vec<String> = disks
        .chain([format!("uri={},read-only=on", export.uri())])
        .collect();
    let mut attach = start_disks(&directory, "attach", &["--num-queues", "4"], &disks);
    attach.await_stdout(|line| line.contains("--disk") && line.contains("2.sock"));
    let hints = attach.stdout().concat();
    assert!(
        hints.contains("0.sock") && hints.contains("1.sock"),
        "{hints}"
    );
    let mut guests: Vec<FrontEnd> = (0..3)
        .map(|number| FrontEnd::connect(&directory.path(&format!("{number}.sock"))))
        .collect();
    assert_eq!(guests[0].write(0, 0, &[1; 4096]), OK);
    assert_eq!(guests[1].write(0, 0, &[2; 4096]), OK);
    assert_eq!(guests[2].write(0, 0, &[3; 4096]), IOERR);
    for (number, byte) in [(0, 1), (1, 2), (2, 1)] {
        assert_eq!(
            guests[number].read(0, 0, 4096),
            (OK, vec![byte; 4096]),
            "disk {number}"
        );
    }
    ends_well(&mut attach, Signal::TERM);
    for number in 0..3 {
        assert!(!directory.path(&format!("{number}.sock")).exists());
    }
}

#[test]
fn a_disk_whose_target_does_not_answer_delays_no_other() {
    let directory = Directory::new();
    let export = Export::start(&["ram:8M"]);
    // It is accepted, and never answered.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = silent.local_addr().expect("an address");
    let disks = [
        format!("uri=nvme+tcp://{address}/nqn.2026-01.org.example:silent"),
        format!("uri={}", export.uri()),
    ];
    let mut attach = start_disks(&directory, "attach", &["--connect-timeout", "3600"], &disks);
    attach.await_log(|line| line.contains("disk ready"));
    let mut guest = FrontEnd::connect(&directory.path("1.sock"));
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    ends_well(&mut attach, Signal::TERM);
    assert_eq!(attach.stdout(), [""; 0], "not all were ready");
}

#[test]
fn a_disk_that_cannot_be_had_ends_the_start_and_is_named() {
    let directory = Directory::new();
    let export = Export::start(&["ram:8M"]);
    let disks = [
        format!("uri={}", export.uri()),
        format!("uri={}?nsid=7", export.subsystem()),
    ];
    let mut attach = start_disks(&directory, "attach", &[], &disks);
    assert_eq!(attach.wait(PATIENCE).code(), Some(1));
    let log = attach.stderr();
    let last = log.last().expect("a line");
    for word in ["disk 2", "1.sock", "nsid=7"] {
        assert!(last.contains(word), "{word}: {last}");
    }
    assert!(!directory.path("0.sock").exists() && !directory.path("1.sock").exists());
}

#[test]
fn the_loss_of_one_disks_target_is_of_no_concern_to_another() {
    let directory = Directory::new();
    let (lost, kept) = (Export::start(&["ram:8M"]), Export::start(&["ram:8M"]));
    let disks = [
        format!("uri={},ctrl-loss-tmo=0", lost.uri()),
        format!("uri={}", kept.uri()),
    ];
    let mut attach = start_disks(&directory, "attach", &["--workers", "1"], &disks);
    attach.await_stdout(|line| line.starts_with("One queue for each vCPU"));
    let mut guests =
        [0, 1].map(|number| FrontEnd::connect(&directory.path(&format!("{number}.sock"))));
    assert_eq!(guests[0].write(0, 0, &[1; 512]), OK);
    drop(lost);
    assert_eq!(guests[0].write(0, 0, &[1; 512]), IOERR);
    assert_eq!(guests[1].write(0, 0, &[1; 512]), OK);
    ends_well(&mut attach, Signal::TERM);
}

/// What each worker may run on.
fn worker_cpus(process: &Process) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.pid())).expect("it runs");
    let mut found = Vec::new();
    for task in tasks.map(|task| task.expect("an entry").path()) {
        let read = |name: &str| std::fs::read_to_string(task.join(name)).unwrap_or_default();
        if read("comm").starts_with("worker-") {
            let status = read("status");
            let cpus = status
                .lines()
                .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            found.push(cpus.expect("a list").trim().to_owned());
        }
    }
    found
}

#[test]
fn workers_are_as_many_as_asked_for_and_run_where_they_are_told() {
    let serve = Attach::serve(&["--workers", "3", "--worker-cpus", "0"], "ram:8M");
    assert_eq!(worker_cpus(&serve.process), ["0", "0", "0"]);
    let mut guest = FrontEnd::connect_with(
        &serve.socket,
        Setup {
            rings: 4,
            ..Setup::default()
        },
    );
    for ring in 0..4 {
        assert_eq!(guest.write(ring, 0, &[1; 512]), OK);
    }
}

/// Descriptors for this many rings, in this process.
fn allow_descriptors(count: u64) {
    let limits = getrlimit(Resource::Nofile);
    if limits.current.is_some_and(|current| current < count) {
        let current = Some(limits.maximum.map_or(count, |maximum| maximum.min(count)));
        setrlimit(Resource::Nofile, Rlimit { current, ..limits }).expect("a limit");
    }
}

#[test]
fn two_workers_do_the_work_of_256_rings() {
    const RINGS: usize = 256;
    const EACH: usize = 8;
    const PIECE: usize = 4096;
    allow_descriptors(8192);
    let args = ["--workers", "2", "--num-queues", "256"];
    let mut serve = Attach::serve(&args, "ram:64M");
    assert_eq!(worker_cpus(&serve.process).len(), 2);
    let bytes = RINGS * EACH * PIECE;
    let mut driver = Driver::connect(&serve.socket, RINGS, 64, 2 * bytes as u64);
    let content = crate::noise::noise(bytes, 7);
    driver.write_memory(0, &content);
    for (direction, shift) in [(Direction::Write, 0), (Direction::Read, bytes)] {
        for request in 0..RINGS * EACH {
            let at = request * PIECE;
            let added = driver.add(
                request % RINGS,
                direction,
                at as u64,
                (at + shift, PIECE),
                request,
            );
            assert!(added, "request {request}");
        }
        for ring in 0..RINGS {
            driver.kick(ring);
        }
        for ring in 0..RINGS {
            driver.wait(ring, EACH);
        }
    }
    assert!(
        driver.read_memory(bytes, bytes) == content,
        "other bytes were read than written"
    );
    drop(driver);
    serve.stop();
    assert_eq!(serve.counter("requests"), (2 * RINGS * EACH) as u64);
}

#[test]
fn a_ring_of_32768_entries_may_be_full() {
    const PIECE: usize = 512;
    let export = Export::start(&["ram:32M"]);
    let mut attach = Attach::start(export.uri());
    // Each request takes three descriptors.
    let requests = 32768 / 3;
    let bytes = requests * PIECE;
    let mut driver = Driver::connect(&attach.socket, 1, 32768, 2 * bytes as u64);
    let content = crate::noise::noise(bytes, 9);
    driver.write_memory(0, &content);
    for (direction, shift) in [(Direction::Write, 0), (Direction::Read, bytes)] {
        for request in 0..requests {
            let at = request * PIECE;
            let added = driver.add(0, direction, at as u64, (at + shift, PIECE), request);
            assert!(added, "request {request}");
        }
        driver.kick(0);
        let mut answered = driver.wait(0, requests);
        answered.sort_unstable();
        assert!(answered.into_iter().eq(0..requests));
    }
    assert!(
        driver.read_memory(bytes, bytes) == content,
        "other bytes were read than written"
    );
    drop(driver);
    attach.stop();
    assert_eq!(attach.counter("requests"), 2 * requests as u64);
}
