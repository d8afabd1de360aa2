//! Disks that one process hands over to another while their guests use them, and those that stay where they are.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, bind,
    connect, listen, recv, send, socket_with,
};
use rustix::process::Signal;
use vhost::vhost_user::VhostUserFrontend;

use crate::daemons::{Attach, Directory, END, Export};
use crate::front_end::{DATA, FrontEnd, OK, Setup, kind};
use crate::process::{Process, readable_within};
use crate::ring::{PATIENCE, out};

/// A guest may wait for so long in a hand-over, on a machine that runs other tests beside.
const STALL: u64 = 500;

/// Starts a process that takes over what another serves at `socket`.
fn successor(command: &str, socket: &Path, args: &[&str], what: &str) -> Process {
    let path = socket.to_str().expect("UTF-8");
    let all = [
        command,
        "--log-format",
        "json",
        "--takeover",
        "--socket-path",
        path,
    ];
    Process::start("successor", all.iter().chain(args).chain([&what]))
}

/// Waits until a process says that it has taken a disk over, and gives the stall in milliseconds.
#[track_caller]
fn stall(process: &Process) -> u64 {
    process.await_stdout(|line| line.contains("taken over; guest stalled"));
    process.await_log(|line| line.contains("disk taken over"));
    let log = process.stderr();
    let line = log.iter().find(|line| line.contains("disk taken over"));
    let line = line.expect("a line");
    let event: serde_json::Value = serde_json::from_str(line).expect("JSON");
    event["fields"]["stalled_ms"].as_u64().expect("a number")
}

/// The end of a process that has handed its disk over.
#[track_caller]
fn has_given(old: &mut Process) {
    let status = old.wait(PATIENCE);
    assert!(status.success(), "{status}");
    let log = old.stderr().concat();
    assert!(log.contains("disk handed over; guest stalled"), "{log}");
}

#[track_caller]
fn ends(process: &mut Process) {
    process.signal(Signal::TERM);
    let status = process.wait(END);
    assert!(status.success(), "{status}");
}

/// A guest that writes and reads back without a pause until it is told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    thread: JoinHandle<FrontEnd>,
}

impl Load {
    fn start(mut guest: FrontEnd, rings: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let requests = Arc::new(AtomicU64::new(0));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&requests));
        let thread = thread::spawn(move || {
            let mut round = 0_u64;
            while !stopped.load(Ordering::Relaxed) {
                let ring = usize::try_from(round).expect("64 bits") % rings;
                let sector = round % 1000 * 8;
                let content = crate::noise::noise(4096, round);
                assert_eq!(guest.write(ring, sector, &content), OK);
                assert_eq!(guest.read(ring, sector, 4096), (OK, content));
                round += 1;
                counted.fetch_add(2, Ordering::Relaxed);
            }
            guest
        });
        Self {
            stop,
            requests,
            thread,
        }
    }

    /// Requests that are done.
    fn done(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// It has done something more since.
    #[track_caller]
    fn went_on(&self, before: u64) -> bool {
        assert!(!self.thread.is_finished(), "the guest has an error");
        self.done() >= before + 10
    }

    /// Waits until it has done something more.
    #[track_caller]
    fn goes_on(&self) {
        let before = self.done();
        let deadline = Instant::now() + PATIENCE;
        while !self.went_on(before) {
            assert!(Instant::now() < deadline, "the guest stands still");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Nobody serves its disk any more, and it will never be done.
    fn abandon(self) {}

    fn finish(self) -> FrontEnd {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no error")
    }
}

#[test]
fn a_disk_is_handed_over_again_and_again_under_load_and_its_socket_stays() {
    let export = Export::start(&["ram:8M"]);
    let directory = Directory::new();
    let socket = directory.path("disk.sock");
    let mut old = Attach::start_at(&socket, &[], export.uri()).process;
    let setup = Setup {
        rings: 4,
        ..Setup::default()
    };
    let load = Load::start(FrontEnd::connect_with(&socket, setup), 4);
    for _ in 0..5 {
        load.goes_on();
        let new = successor("attach", &socket, &[], export.uri());
        let stalled = stall(&new);
        assert!(stalled < STALL, "the guest stalled for {stalled} ms");
        has_given(&mut old);
        load.goes_on();
        old = new;
    }
    let mut guest = load.finish();
    assert_eq!(guest.flush(0), OK);
    // The session is a whole one: what was negotiated holds, and the next front-end finds the disk.
    guest.frontend.get_queue_num().expect("GET_QUEUE_NUM");
    guest.enable(1, false);
    guest.enable(1, true);
    assert_eq!(guest.write(1, 0, &[9; 512]), OK);
    drop(guest);
    let mut next = FrontEnd::connect(&socket);
    assert_eq!(next.read(0, 0, 512), (OK, vec![9; 512]));
    drop(next);
    ends(&mut old);
    assert!(!socket.exists() && !directory.path("disk.sock.handover").exists());
}

#[test]
fn a_disk_without_a_front_end_is_handed_over_too() {
    let export = Export::start(&["ram:8M"]);
    let directory = Directory::new();
    let socket = directory.path("disk.sock");
    let mut old = Attach::start_at(&socket, &[], export.uri()).process;
    let mut new = successor("attach", &socket, &[], export.uri());
    stall(&new);
    has_given(&mut old);
    let mut guest = FrontEnd::connect(&socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    ends(&mut new);
}

#[test]
fn a_local_image_is_handed_over() {
    let directory = Directory::new();
    let (image, socket) = (directory.path("disk.img"), directory.path("disk.sock"));
    std::fs::write(&image, vec![0; 8 << 20]).expect("an image");
    let spec = format!(
        "{},uuid=6ba7b810-9dad-41d1-80b4-00c04fd430c8",
        image.to_str().expect("UTF-8")
    );
    let mut old = Process::start(
        "old",
        [
            "serve",
            "--log-format",
            "json",
            "--socket-path",
            socket.to_str().expect("UTF-8"),
            &spec,
        ],
    );
    old.await_stdout(|line| line.starts_with("One queue for each vCPU"));
    let load = Load::start(FrontEnd::connect(&socket), 1);
    load.goes_on();
    let mut new = successor("serve", &socket, &[], &spec);
    assert!(stall(&new) < STALL);
    has_given(&mut old);
    load.goes_on();
    drop(load.finish());
    ends(&mut new);
}

#[test]
fn disks_of_one_process_are_handed_over_one_after_the_other() {
    let directory = Directory::new();
    let export = Export::start(&["ram:8M", "ram:8M"]);
    let sockets: Vec<PathBuf> = (0..2)
        .map(|nth| directory.path(&format!("{nth}.sock")))
        .collect();
    let start = |takeover: &[&str]| {
        let mut args = vec!["attach".to_owned(), "--log-format=json".to_owned()];
        args.extend(takeover.iter().map(|&option| option.to_owned()));
        for (socket, uri) in sockets.iter().zip(&export.uris) {
            args.push(format!("--disk=socket-path={},uri={uri}", socket.display()));
        }
        Process::start("attach", args)
    };
    let mut old = start(&[]);
    old.await_stdout(|line| line.contains("--disk") && line.contains("1.sock"));
    let loads: Vec<Load> = sockets
        .iter()
        .map(|socket| Load::start(FrontEnd::connect(socket), 1))
        .collect();
    loads.iter().for_each(Load::goes_on);
    let mut new = start(&["--takeover"]);
    new.await_stdout(|line| line.contains("1.sock: taken over"));
    has_given(&mut old);
    loads.iter().for_each(Load::goes_on);
    for load in loads {
        drop(load.finish());
    }
    ends(&mut new);
}

#[test]
fn a_successor_that_has_something_else_is_refused_with_a_reason() {
    let export = Export::start(&["ram:8M", "ram:8M"]);
    let directory = Directory::new();
    let socket = directory.path("disk.sock");
    let mut old = Attach::start_at(&socket, &["--num-queues", "8"], &export.uris[0]).process;
    let load = Load::start(FrontEnd::connect(&socket), 1);
    for (args, uri, word) in [
        (&[][..], &export.uris[1], "another namespace"),
        (&["--num-queues", "4"], &export.uris[0], "--num-queues 8"),
        (&["--read-only"], &export.uris[0], "--read-only"),
    ] {
        let mut new = successor("attach", &socket, args, uri);
        assert_eq!(new.wait(PATIENCE).code(), Some(1));
        let log = new.stderr();
        let last = log.last().expect("a line");
        assert!(last.contains(word) && last.contains("keeps it"), "{last}");
        load.goes_on();
    }
    let mut local = successor("serve", &socket, &[], "ram:8M");
    assert_eq!(local.wait(PATIENCE).code(), Some(1));
    assert!(local.stderr().concat().contains("ram:"));
    assert!(old.is_running());
    drop(load.finish());
    ends(&mut old);
}

#[test]
fn without_a_process_that_serves_the_disk_there_is_nothing_to_take_over() {
    let export = Export::start(&["ram:8M"]);
    let directory = Directory::new();
    let mut new = successor("attach", &directory.path("disk.sock"), &[], export.uri());
    assert_eq!(new.wait(PATIENCE).code(), Some(1));
    let log = new.stderr().concat();
    assert!(
        log.contains("disk.sock") && log.contains("leave --takeover out"),
        "{log}"
    );
}

#[test]
fn a_disk_whose_requests_have_no_answer_stays_where_it_is_and_goes_on() {
    let export = Export::start(&["ram:8M,fault=hang:write:lba=8000-8007:count=1"]);
    let directory = Directory::new();
    let socket = directory.path("disk.sock");
    let mut old = Attach::start_at(&socket, &[], export.uri()).process;
    let setup = Setup {
        rings: 2,
        ..Setup::default()
    };
    let mut guest = FrontEnd::connect_with(&socket, setup);
    guest.add(1, 0, kind::WRITE, 8000, &[out(DATA + 8192, 4096)]);
    guest.rings[1].submit();
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    let mut new = successor("attach", &socket, &[], export.uri());
    assert_eq!(new.wait(PATIENCE).code(), Some(1));
    let log = new.stderr().concat();
    assert!(
        log.contains("keeps it: requests in flight had no answer"),
        "{log}"
    );
    for ring in 0..2 {
        assert_eq!(guest.write(ring, 0, &[2; 512]), OK, "ring {ring}");
    }
    assert_eq!(
        guest.status(1, 0),
        OK,
        "the first request of the second ring is another one now"
    );
    old.signal(Signal::TERM);
    assert!(old.wait(END).success());
}

/// Packets of a hand-over, as a successor has them that does not behave.
struct Rogue(OwnedFd);

impl Rogue {
    /// What a successor says first, found out by listening in the place of a disk.
    fn hello(uri: &str) -> Vec<u8> {
        let directory = Directory::new();
        let listener = packets();
        let address = SocketAddrUnix::new(directory.path("disk.sock.handover")).expect("a path");
        bind(&listener, &address).expect("a socket");
        listen(&listener, 1).expect("a socket");
        let new = successor("attach", &directory.path("disk.sock"), &[], uri);
        let accepted = Self(accept(&listener).expect("it asks"));
        let hello = accepted.receive().expect("a packet");
        drop(new);
        hello
    }

    fn connect(socket: &Path) -> Self {
        let mut path = socket.as_os_str().to_owned();
        path.push(".handover");
        let ours = packets();
        connect(&ours, &SocketAddrUnix::new(path).expect("a path")).expect("it listens");
        Self(ours)
    }

    fn send(&self, bytes: &[u8]) {
        send(&self.0, bytes, SendFlags::NOSIGNAL).expect("it is there");
    }

    /// The next packet, its files closed; `None` when there is none.
    fn receive(&self) -> Option<Vec<u8>> {
        assert!(readable_within(&self.0, PATIENCE), "nothing is said");
        let mut bytes = vec![0; 65536];
        let (count, _) = recv(&self.0, &mut bytes[..], RecvFlags::empty()).ok()?;
        bytes.truncate(count);
        (count > 0).then_some(bytes)
    }
}

fn packets() -> OwnedFd {
    socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .expect("a socket")
}

#[test]
fn a_successor_that_goes_at_any_step_before_it_has_taken_the_disk_leaves_it_where_it_is() {
    let export = Export::start(&["ram:8M"]);
    let hello = Rogue::hello(export.uri());
    let directory = Directory::new();
    let socket = directory.path("disk.sock");
    let mut old = Attach::start_at(&socket, &[], export.uri()).process;
    let setup = Setup {
        rings: 2,
        ..Setup::default()
    };
    let load = Load::start(FrontEnd::connect_with(&socket, setup), 2);
    // Before it says what it has, and after something that is none.
    drop(Rogue::connect(&socket));
    Rogue::connect(&socket).send(b"{}");
    load.goes_on();
    for step in 0.. {
        let rogue = Rogue::connect(&socket);
        rogue.send(&hello);
        if step == 0 {
            drop(rogue);
            load.goes_on();
            continue;
        }
        let offer = rogue.receive().expect("an offer");
        let offer: serde_json::Value = serde_json::from_slice(&offer).expect("JSON");
        let count = |name: &str| offer["Offered"][name].as_u64().expect("a number");
        let messages = count("setup") + count("start");
        assert!(messages > 10, "{offer}");
        for _ in 1..step {
            rogue.receive().expect("a message");
        }
        drop(rogue);
        load.goes_on();
        if step > messages {
            break;
        }
    }
    // One that says nothing more is not waited for.
    let rogue = Rogue::connect(&socket);
    rogue.send(&hello);
    rogue.receive().expect("an offer");
    load.goes_on();
    let mut new = successor("attach", &socket, &[], export.uri());
    stall(&new);
    has_given(&mut old);
    drop(load.finish());
    ends(&mut new);
}

#[test]
fn whenever_a_successor_is_killed_one_of_the_two_serves_the_disk() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let export = Export::start(&["ram:8M"]);
    let directory = Directory::new();
    let socket = directory.path("disk.sock");
    let mut old = Attach::start_at(&socket, &[], export.uri()).process;
    let mut load = Load::start(FrontEnd::connect(&socket), 1);
    let mut killed = 0;
    for _ in 0..20 {
        load.goes_on();
        let new = successor("attach", &socket, &[], export.uri());
        thread::sleep(Duration::from_millis(random.u64(0..80)));
        if new
            .stderr()
            .iter()
            .any(|line| line.contains("disk taken over"))
        {
            has_given(&mut old);
            old = new;
            continue;
        }
        let before = load.done();
        drop(new);
        killed += 1;
        let given = |line: &String| line.contains("disk handed over");
        while !load.went_on(before) {
            if old.stderr().iter().any(given) {
                // It had just taken the disk. Nobody has that now, and the VMM finds the next one.
                assert!(old.wait(PATIENCE).success());
                load.abandon();
                old = Attach::start_at(&socket, &[], export.uri()).process;
                load = Load::start(FrontEnd::connect(&socket), 1);
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
    load.goes_on();
    assert!(killed > 0, "every successor was too quick");
    drop(load.finish());
    ends(&mut old);
}
