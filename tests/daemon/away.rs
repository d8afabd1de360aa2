//! A disk whose target is away when the daemon starts: it is there as it was, and requests wait.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use crate::daemons::{Attach, Directory, Export};
use crate::front_end::{DATA, FrontEnd, IOERR, OK, SECTOR, UNANSWERED, kind};
use crate::noise::noise;
use crate::process::Process;
use crate::ring::out;

const UUID: &str = "6ba7b810-9dad-41d1-80b4-00c04fd430c8";
const OTHER_UUID: &str = "6ba7b811-9dad-41d1-80b4-00c04fd430c8";
const SIZE: u64 = 8 << 20;
/// Longer than any attempt's pause, and what an attempt takes.
const SOON: Duration = Duration::from_secs(8);

/// A target whose disk is a file, which can go away and come back where it was; and where disks are remembered.
struct Away {
    directory: Directory,
    address: String,
    uri: String,
    export: Option<Export>,
}

impl Away {
    fn new() -> Self {
        let mut away = Self {
            directory: Directory::new(),
            address: "127.0.0.1:0".to_owned(),
            uri: String::new(),
            export: None,
        };
        away.resize(SIZE);
        away.come_back(UUID);
        let export = away.export.as_ref().expect("it runs");
        (away.address, away.uri) = (export.address().to_owned(), export.subsystem().to_owned());
        away
    }

    fn resize(&self, size: u64) {
        let path = self.directory.path("disk.img");
        let mut options = std::fs::OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).open(path);
        file.expect("a file").set_len(size).expect("room");
    }

    fn come_back(&mut self, uuid: &str) {
        let path = self.directory.path("disk.img");
        let spec = format!("file:{},uuid={uuid}", path.display());
        self.export = Some(Export::start_with(&["--listen", &self.address], &[&spec]));
    }

    fn go_away(&mut self) {
        drop(self.export.take());
    }

    fn args(&self) -> [String; 4] {
        let state = self.directory.path("state");
        let state = state.to_str().expect("UTF-8").to_owned();
        [
            "--state-dir".to_owned(),
            state,
            "--reconnect-delay=1".to_owned(),
            "--nr-io-queues=2".to_owned(),
        ]
    }

    fn attach_with(&self, more: &[&str], uri: &str) -> Attach {
        let args = self.args();
        let args: Vec<&str> = args
            .iter()
            .map(String::as_str)
            .chain(more.iter().copied())
            .collect();
        Attach::start_with(&args, uri)
    }

    fn attach(&self) -> Attach {
        self.attach_with(&[], &self.uri)
    }

    /// Attaches once, so that the disk is remembered, and leaves without a target.
    fn remember(&mut self) {
        let mut attach = self.attach();
        let mut guest = FrontEnd::connect(&attach.socket);
        assert_eq!(guest.write(0, 0, &noise(4096, 1)), OK);
        drop(guest);
        attach.stop();
        self.go_away();
    }
}

fn capacity(guest: &mut FrontEnd) -> u64 {
    let flags = VhostUserConfigFlags::WRITABLE;
    let config = guest.frontend.get_config(0, 8, flags, &[0; 8]);
    let (_, bytes) = config.expect("GET_CONFIG");
    u64::from_le_bytes(bytes.try_into().expect("8 bytes")) * SECTOR
}

/// Puts a write into a ring; nobody waits for it.
fn begin_write(guest: &mut FrontEnd, slot: usize, sector: u64, bytes: &[u8]) {
    guest.memory.write(DATA, bytes);
    guest.add(
        0,
        slot,
        kind::WRITE,
        sector,
        &[out(DATA, bytes.len() as u32)],
    );
    guest.rings[0].submit();
}

#[track_caller]
fn await_status(guest: &mut FrontEnd, slot: usize) -> u8 {
    let deadline = Instant::now() + SOON;
    while guest.status(0, slot) == UNANSWERED {
        assert!(Instant::now() < deadline, "request {slot} is not answered");
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(guest.rings[0].wait_for_some().len(), 1);
    guest.status(0, slot)
}

/// What `attach` says that must fail.
#[track_caller]
fn refused(socket: &Path, args: &[&str]) -> String {
    let socket = socket.to_str().expect("UTF-8");
    let command = ["attach", "--log-level=error", "--socket-path", socket];
    let mut attach = Process::start("attach", command.iter().chain(args));
    assert!(!attach.wait(Duration::from_secs(20)).success());
    attach.stderr().concat()
}

#[test]
fn a_disk_that_is_remembered_is_there_at_once_and_requests_wait_for_its_target() {
    let mut away = Away::new();
    away.remember();
    let began = Instant::now();
    let mut attach = away.attach();
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "it waited for the target"
    );
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(capacity(&mut guest), SIZE);
    begin_write(&mut guest, 0, 8, &noise(4096, 2));
    assert!(guest.rings[0].is_silent(Duration::from_secs(2)));
    away.come_back(UUID);
    assert_eq!(await_status(&mut guest, 0), OK);
    assert!(
        guest.read(0, 0, 4096) == (OK, noise(4096, 1)),
        "not what was written"
    );
    assert!(
        guest.read(0, 8, 4096) == (OK, noise(4096, 2)),
        "not what was written"
    );
    // A loss later is like any other.
    away.go_away();
    attach
        .process
        .await_log(|line| line.contains("association lost"));
    away.come_back(UUID);
    assert!(
        guest.read(0, 0, 4096) == (OK, noise(4096, 1)),
        "not what was written"
    );
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}

#[test]
fn a_target_that_says_nothing_is_not_waited_for() {
    let mut away = Away::new();
    away.remember();
    // It is accepted, and never answered.
    let listener = std::net::TcpListener::bind(&away.address).expect("its port");
    let began = Instant::now();
    let mut attach = away.attach();
    let took = began.elapsed();
    assert!(took < Duration::from_secs(3), "it took {took:?}");
    let mut guest = FrontEnd::connect(&attach.socket);
    begin_write(&mut guest, 0, 0, &[7; 512]);
    drop(listener);
    away.come_back(UUID);
    assert_eq!(await_status(&mut guest, 0), OK);
    attach.stop();
}

#[test]
fn what_has_grown_meanwhile_is_seen_and_remembered() {
    let mut away = Away::new();
    away.remember();
    let mut attach = away.attach();
    away.resize(2 * SIZE);
    away.come_back(UUID);
    attach
        .process
        .await_log(|line| line.contains("the namespace has grown"));
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(capacity(&mut guest), 2 * SIZE);
    assert_eq!(guest.write(0, SIZE / SECTOR, &[1; 512]), OK);
    drop(guest);
    attach.stop();
    away.go_away();
    let mut attach = away.attach();
    assert_eq!(capacity(&mut FrontEnd::connect(&attach.socket)), 2 * SIZE);
    attach.stop();
}

#[test]
fn another_namespace_in_its_place_is_not_taken_for_it() {
    let mut away = Away::new();
    away.remember();
    let mut attach = away.attach();
    let mut guest = FrontEnd::connect(&attach.socket);
    begin_write(&mut guest, 0, 0, &[7; 512]);
    away.come_back(OTHER_UUID);
    attach
        .process
        .await_log(|line| line.contains("not connected after") && line.contains(UUID));
    assert_eq!(guest.status(0, 0), UNANSWERED);
    away.go_away();
    away.come_back(UUID);
    assert_eq!(await_status(&mut guest, 0), OK);
    attach.stop();
}

#[test]
fn requests_fail_when_the_time_has_passed_and_the_end_is_quick() {
    let mut away = Away::new();
    away.remember();
    let mut attach = away.attach_with(&["--fast-io-fail-tmo", "1"], &away.uri);
    let mut guest = FrontEnd::connect(&attach.socket);
    begin_write(&mut guest, 0, 0, &[7; 512]);
    assert_eq!(await_status(&mut guest, 0), IOERR);
    attach.stop();
}

#[test]
fn a_disk_that_is_not_remembered_is_an_error() {
    let mut away = Away::new();
    away.remember();
    let socket = away.directory.path("disk.sock");
    let args = away.args();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    // Without the directory, with another subsystem, and with another namespace.
    let without = refused(&socket, &[&away.uri]);
    assert!(without.contains("refused the connection"), "{without}");
    for other in [format!("{}2", away.uri), format!("{}?nsid=1", away.uri)] {
        let error = refused(&socket, &[&args[..], &[&other]].concat());
        assert!(error.contains("refused the connection"), "{error}");
    }
    // A target that is there and does not want us is no target that is away.
    let path = away.directory.path("disk.img");
    let spec = format!("file:{},uuid={UUID}", path.display());
    let others = [
        "--listen",
        &away.address,
        "--allow-host",
        "nqn.2026-01.org.example:other",
    ];
    let export = Export::start_with(&others, &[&spec]);
    let error = refused(&socket, &[&args[..], &[&away.uri]].concat());
    assert!(error.contains("does not allow host"), "{error}");
    drop(export);
    let nowhere = away.directory.path("disk.img/state");
    let nowhere = nowhere.to_str().expect("UTF-8");
    let error = refused(&socket, &["--state-dir", nowhere, &away.uri]);
    assert!(
        error.contains("--state-dir") && error.contains(nowhere),
        "{error}"
    );
}

#[test]
fn a_disk_that_is_found_by_discovery_is_remembered_with_the_way_to_it() {
    let mut away = Away::new();
    let search = format!("nvme+tcp-discovery://{}/?nqn=*", away.address);
    let mut attach = away.attach_with(&[], &search);
    attach.stop();
    away.go_away();
    let mut attach = away.attach_with(&[], &search);
    let mut guest = FrontEnd::connect(&attach.socket);
    begin_write(&mut guest, 0, 0, &[7; 512]);
    away.come_back(UUID);
    assert_eq!(await_status(&mut guest, 0), OK);
    // Another way appears, when the target comes back with one.
    away.go_away();
    let path = away.directory.path("disk.img");
    let spec = format!("file:{},uuid={UUID}", path.display());
    let listen = ["--listen", &away.address, "--listen", "127.0.0.2:0"];
    let export = Export::start_with(&listen, &[&spec]);
    let is_second = |uri: &str| uri.contains("127.0.0.2:");
    let uris = export.process.await_stdout(is_second);
    let second = uris.iter().find(|uri| is_second(uri)).expect("an address");
    let second = second.split('?').next().expect("a URI");
    attach
        .process
        .await_log(|line| line.contains("tells of a new way") && line.contains(second));
    attach.process.await_log(|line| {
        line.contains("another path is connected") && line.contains("127.0.0.2:")
    });
    assert_eq!(guest.read(0, 0, 512), (OK, vec![7; 512]));
    attach.stop();
}
