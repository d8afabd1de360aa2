//! The end of each daemon: by a signal, with the peer alive, silent or gone.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::daemons::{Attach, Directory, END, Export};
use crate::front_end::{DATA, FrontEnd, IOERR, OK, kind};
use crate::process::Process;
use crate::ring::{into, out};

/// Whether the controller said that its shutdown was complete, from a log at debug level.
fn shutdown_was_complete(attach: &Attach) -> bool {
    let ended = attach.process.logged("association ended");
    assert_eq!(ended.len(), 1, "{ended:?}");
    ended[0]["complete"] == true
}

#[test]
fn a_signal_ends_attach_in_good_order_with_and_without_a_front_end() {
    let export = Export::start(&["ram:8M"]);
    for (signal, connected) in [
        (Signal::TERM, true),
        (Signal::TERM, false),
        (Signal::INT, true),
        (Signal::INT, false),
    ] {
        let mut attach = Attach::start_with(&["--log-level", "debug"], export.uri());
        let guest = connected.then(|| {
            let mut guest = FrontEnd::connect(&attach.socket);
            assert_eq!(guest.write(0, 0, &[1; 512]), OK);
            guest
        });
        attach.stop_by(signal);
        assert!(
            shutdown_was_complete(&attach),
            "{signal:?}, connected: {connected}"
        );
        assert_eq!(attach.counter("requests"), u64::from(connected));
        drop(guest);
    }
}

#[test]
fn a_signal_lets_requests_in_flight_finish() {
    let mut export = Export::start(&["ram:64M"]);
    let mut attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    for slot in 0..32 {
        guest.add(
            0,
            slot,
            kind::WRITE,
            2048 * slot as u64,
            &[out(DATA, 1 << 20)],
        );
    }
    guest.rings[0].submit();
    // Some of it is in flight once the first answer is there.
    let answered = guest.rings[0].wait_for_some().len();
    attach.stop();
    let answered = answered + guest.rings[0].used().len();
    assert_eq!(attach.counter("requests"), answered as u64);
    assert_eq!(
        (0..32).filter(|slot| guest.status(0, *slot) == OK).count(),
        answered
    );
    export.stop();
}

#[test]
fn a_signal_ends_attach_in_time_when_the_target_is_silent_with_requests_in_flight() {
    let export = Export::start(&["ram:8M"]);
    for signal in [Signal::TERM, Signal::INT] {
        let mut attach = Attach::start_with(&["--nr-io-queues", "2"], export.uri());
        let mut guest = FrontEnd::connect(&attach.socket);
        assert_eq!(guest.write(0, 0, &[1; 512]), OK);
        export.process.pause();
        for slot in 0..20 {
            guest.add(0, slot, kind::WRITE, 0, &[out(DATA, 64 << 10)]);
            guest.add(0, slot + 20, kind::READ, 0, &[into(DATA, 64 << 10)]);
        }
        guest.rings[0].submit();
        std::thread::sleep(Duration::from_millis(50));
        attach.stop_by(signal);
        assert!(
            guest.rings[0].used().is_empty(),
            "nobody answered, and yet it was answered"
        );
        export.process.resume();
    }
}

#[test]
fn a_signal_ends_attach_while_it_waits_for_the_target() {
    // It is accepted, and never answered.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let uri = format!("nvme+tcp://{address}/nqn.2026-01.org.example:disk1");
    let directory = Directory::new();
    let socket = directory.path("disk.sock");
    let path = socket.to_str().expect("UTF-8");
    let mut process = Process::start("attach", ["attach", "--socket-path", path, &uri]);
    let _connected = listener.accept().expect("it connects");
    let sent = Instant::now();
    process.signal(Signal::TERM);
    let status = process.wait(Duration::from_secs(10));
    assert!(sent.elapsed() < END, "it took {:?}", sent.elapsed());
    assert!(status.success(), "{status}");
    assert!(!socket.exists());
    assert_eq!(process.stdout(), [""; 0]);
}

#[test]
fn when_the_target_is_killed_and_nothing_is_held_requests_fail_the_log_says_why_and_the_end_is_as_quick()
 {
    let export = Export::start(&["ram:8M"]);
    let mut attach = Attach::start_with(&["--ctrl-loss-tmo", "0"], export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    export.process.pause();
    for slot in 0..16 {
        guest.add(0, slot, kind::WRITE, 0, &[out(DATA, 64 << 10)]);
    }
    guest.rings[0].submit();
    let address = export.address().to_owned();
    drop(export);
    guest.rings[0].wait(16);
    for slot in 0..16 {
        assert_eq!(guest.status(0, slot), IOERR, "request {slot}");
    }
    attach
        .process
        .await_log(|line| line.contains("\"WARN\"") && line.contains("association lost"));
    attach
        .process
        .await_log(|line| line.contains("\"ERROR\"") && line.contains("given up"));
    assert_eq!(guest.write(0, 0, &[1; 512]), IOERR);
    assert_eq!(guest.read(0, 0, 512).0, IOERR);
    assert_eq!(guest.flush(0), IOERR);
    let log = attach.process.stderr();
    assert!(
        log.iter().any(|line| line.contains(&address)),
        "{address} is not in the log"
    );
    // Another front-end is served all the same, with errors.
    drop(guest);
    let mut next = FrontEnd::connect(&attach.socket);
    assert_eq!(next.read(0, 0, 512).0, IOERR);
    attach.stop();
    assert_eq!(attach.counter("errors"), 16 + 4);
}

#[test]
fn a_target_that_falls_silent_is_lost_after_the_keep_alive_time() {
    let export = Export::start(&["ram:8M"]);
    let mut attach = Attach::start_with(
        &["--keep-alive-tmo", "1", "--ctrl-loss-tmo", "0"],
        export.uri(),
    );
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    export.process.pause();
    guest.add(0, 0, kind::WRITE, 0, &[out(DATA, 4096)]);
    guest.rings[0].submit();
    guest.rings[0].wait(1);
    assert_eq!(guest.status(0, 0), IOERR);
    attach
        .process
        .await_log(|line| line.contains("association lost"));
    attach.stop();
}

#[test]
fn export_ends_in_time_with_hosts_connected_and_they_notice() {
    let directory = Directory::new();
    let path = directory.path("disk.img");
    std::fs::write(&path, vec![0; 8 << 20]).expect("a file");
    let file = format!("file:{}", path.display());
    for (spec, signal) in [("ram:8M", Signal::TERM), (&file, Signal::INT)] {
        let mut export = Export::start(&[spec]);
        let mut attach = Attach::start_with(&["--ctrl-loss-tmo", "0"], export.uri());
        let mut guest = FrontEnd::connect(&attach.socket);
        assert_eq!(guest.write(0, 0, &[1; 512]), OK);
        export.stop_by(signal);
        assert_eq!(export.counter(1, "writes"), 1);
        assert_eq!(guest.write(0, 0, &[1; 512]), IOERR);
        attach
            .process
            .await_log(|line| line.contains("association lost"));
        attach.stop();
    }
}

#[test]
fn export_ends_in_time_when_a_host_is_silent() {
    let mut export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    attach.process.pause();
    // Connected, and not even a host.
    let strangers: Vec<_> = (0..4)
        .map(|_| std::net::TcpStream::connect(export.address()))
        .collect();
    export.stop();
    drop(strangers);
}
