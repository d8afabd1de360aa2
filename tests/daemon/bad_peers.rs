//! Targets that are not there, not what was asked for, or not what they should be: one line that
//! names the thing and says what to do, status 1, and nothing left behind.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use nvmf::spec::identify::{IdentifyController, IdentifyNamespace, cns};
use nvmf::spec::property::Cc;
use nvmf::spec::{Cqe, Nqn, Status};

use crate::daemons::{Attach, Directory, Export};
use crate::front_end::{FrontEnd, OK};
use crate::process::Process;
use crate::scripted::{Failure, SUBNQN, Script, Scripted, Stage};

const NQN: &str = "nqn.2026-01.org.example:disk1";
const HOST: &str = "nqn.2026-01.org.example:host1";
/// What connecting may take by default, and the time to begin and to end.
const CONNECT_LIMIT: Duration = Duration::from_secs(5 + 2);

/// An `attach` that has to fail.
struct Attempt {
    process: Process,
    directory: Directory,
    begun: Instant,
}

impl Attempt {
    fn start(args: &[&str], uri: &str) -> Self {
        let directory = Directory::new();
        let socket = directory.path("disk.sock");
        let path = socket.to_str().expect("UTF-8");
        let command = ["attach", "--socket-path", path];
        let process = Process::start("attach", command.iter().chain(args).chain(&[uri]));
        Self {
            process,
            directory,
            begun: Instant::now(),
        }
    }

    /// It ends in time, with one line that has all these words, and leaves no socket.
    #[track_caller]
    fn fails(mut self, words: &[&str]) {
        let socket = self.directory.path("disk.sock");
        failed(&mut self.process, words);
        let took = self.begun.elapsed();
        assert!(took < CONNECT_LIMIT, "it took {took:?}");
        assert!(!socket.exists(), "the socket was left behind");
    }
}

#[track_caller]
fn failed(process: &mut Process, words: &[&str]) {
    let status = process.wait(Duration::from_secs(20));
    let lines = process.stderr();
    assert_eq!(status.code(), Some(1), "{lines:?}");
    assert_eq!(process.stdout(), [""; 0]);
    let [line] = &lines[..] else {
        panic!("not one line: {lines:#?}")
    };
    assert!(line.starts_with("vhost-nvmf: "), "{line}");
    for word in words {
        assert!(line.contains(word), "{word:?} is not in: {line}");
    }
}

#[track_caller]
fn refused(uri: &str, words: &[&str]) {
    Attempt::start(&[], uri).fails(words);
}

fn uri_of(address: SocketAddr) -> String {
    format!("nvme+tcp://{address}/{NQN}")
}

/// A peer that does something with every connection, in threads that end with the program.
fn peer(act: fn(TcpStream)) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    thread::spawn(move || listener.incoming().map_while(Result::ok).for_each(act));
    address
}

/// A peer that answers whatever it gets with these bytes, and then waits for the other to go.
fn speaker(bytes: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.read(&mut [0; 128]);
            let _ = stream.write_all(bytes);
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    address
}

#[test]
fn a_target_that_cannot_be_reached_is_named() {
    let free = TcpListener::bind("127.0.0.1:0")
        .expect("a port")
        .local_addr()
        .expect("an address");
    refused(
        &uri_of(free),
        &[&free.to_string(), "refused", "vhost-nvmf export"],
    );
    refused(
        &format!("nvme+tcp://no-such-host.invalid/{NQN}"),
        &["no-such-host.invalid", "resolve", "check the name"],
    );
}

#[test]
fn a_target_that_does_not_answer_is_given_up_when_the_time_to_connect_is_over() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent = (silent.local_addr().expect("an address"), silent);
    let dripping = peer(|mut stream| {
        thread::spawn(move || {
            while stream.write_all(&[1]).is_ok() {
                thread::sleep(Duration::from_millis(300));
            }
        });
    });
    let no_connect = Scripted::start(Script {
        failure: Some((Some(Stage::Connect), Failure::Silent)),
        ..Script::default()
    });
    let no_identify = Scripted::start(Script {
        failure: Some((Some(Stage::Identify(cns::CONTROLLER)), Failure::Silent)),
        ..Script::default()
    });
    // All at once, since each takes its time.
    let attempts = [
        (uri_of(silent.0), silent.0.to_string(), "handshake"),
        (uri_of(dripping), dripping.to_string(), "handshake"),
        (no_connect.uri(), no_connect.address(), "Connect"),
        (
            no_identify.uri(),
            no_identify.address(),
            "Identify Controller",
        ),
        // Reserved for documentation: no answer, or the network's that there is no such thing.
        (
            format!("nvme+tcp://192.0.2.1/{NQN}"),
            "192.0.2.1".to_owned(),
            "",
        ),
    ];
    let started = attempts.map(|(uri, address, word)| (Attempt::start(&[], &uri), address, word));
    for (attempt, address, word) in started {
        attempt.fails(&[&address, word]);
    }
}

#[test]
fn a_peer_that_is_no_controller_is_named() {
    for bytes in [
        &b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"[..],
        b"SSH-2.0-OpenSSH_9.2\r\n",
        &[0; 200],
        &[0xff; 4096],
    ] {
        let address = speaker(bytes);
        refused(
            &uri_of(address),
            &[&address.to_string(), "not be an NVMe/TCP target"],
        );
    }
    let closing = peer(drop);
    refused(
        &uri_of(closing),
        &[&closing.to_string(), "closed the connection"],
    );
    let hangs_up = peer(|mut stream| drop(stream.read(&mut [0; 128])));
    refused(
        &uri_of(hangs_up),
        &[&hangs_up.to_string(), "closed the connection"],
    );
}

#[test]
fn a_target_that_demands_tls_is_named() {
    // A fatal alert, as TLS answers what is no TLS: "unexpected message", and "protocol version".
    for alert in [&[0x15, 3, 3, 0, 2, 2, 10][..], &[0x15, 3, 1, 0, 2, 2, 70]] {
        let address = speaker(alert);
        refused(
            &uri_of(address),
            &[&address.to_string(), "demands TLS", "not supported"],
        );
    }
}

#[test]
fn a_controller_that_breaks_the_handshake_is_named() {
    for (at, byte) in [
        (0, 7),
        (2, 24),
        (4, 129),
        (8, 1),
        (10, 255),
        (11, 1),
        (12, 1),
    ] {
        let controller = Scripted::start(Script {
            ic_resp: vec![(at, byte)],
            ..Script::default()
        });
        refused(&controller.uri(), &[&controller.address(), "handshake"]);
    }
}

#[test]
fn a_target_that_demands_authentication_is_named() {
    let demands = [
        Cqe::new(0, Status::AUTHENTICATION_REQUIRED),
        // AUTHREQ.ATR in the result of a success.
        Cqe::with_result(0, 1 | 1 << 17),
    ];
    for cqe in demands {
        let controller = Scripted::start(Script {
            connect: Some(cqe),
            ..Script::default()
        });
        refused(
            &controller.uri(),
            &[SUBNQN, "authentication", "not supported"],
        );
    }
}

#[test]
fn a_namespace_with_a_format_that_cannot_be_served_is_named_with_what_is_in_the_way() {
    type Change = fn(&mut IdentifyNamespace);
    let changes: &[(Change, &str)] = &[
        (|data| data.lbaf[0].ms = 8.into(), "8 bytes of metadata"),
        (|data| data.dps = 1, "protection information of type 1"),
        (|data| data.lbaf[0].lbads = 20, "2^20"),
        (|data| data.lbaf[0].lbads = 0, "2^0"),
        (|data| data.flbas = 5, "FLBAS"),
        (|data| data.nsze = 0.into(), "no blocks"),
    ];
    for (change, word) in changes {
        let controller = Scripted::start(Script {
            namespace: Some(*change),
            ..Script::default()
        });
        for selector in ["", "?nsid=1"] {
            let uri = format!("{}{selector}", controller.uri());
            refused(&uri, &[SUBNQN, "namespace 1", word]);
        }
        // What was enabled is shut down in good order.
        let last = controller.configurations().pop().expect("it was enabled");
        assert_eq!(last.shn(), Cc(Cc::SHN_NORMAL).shn());
    }
}

#[test]
fn a_controller_that_cannot_be_used_is_named() {
    type Change = fn(&mut IdentifyController);
    let changes: &[(Change, &str)] = &[
        (|data| data.cntrltype = 2, "discovery controller"),
        (|data| data.sqes = 0x77, "128 bytes"),
        (|data| data.cntlid = 9.into(), "controller ID"),
        (
            |data| data.subnqn = Nqn::new(NQN).expect("a name").to_field(),
            NQN,
        ),
    ];
    for (change, word) in changes {
        let controller = Scripted::start(Script {
            controller: Some(*change),
            ..Script::default()
        });
        refused(
            &controller.uri(),
            &[&controller.address(), "cannot be used", word],
        );
    }
}

#[test]
fn an_honest_controller_is_used_and_shut_down_with_a_notification() {
    let controller = Scripted::start(Script::default());
    let mut attach = Attach::start(&controller.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.flush(0), OK);
    let before = controller.configurations();
    assert!(before.iter().all(|cc| cc.shn() == 0) && before.iter().any(|cc| cc.en()));
    attach.stop();
    let last = controller.configurations().pop().expect("it was written");
    assert_eq!((last.en(), last.shn()), (true, Cc(Cc::SHN_NORMAL).shn()));
}

#[test]
fn what_the_target_does_not_export_is_named_with_what_it_does() {
    let uuids = [
        "0c7a3a62-3b3e-4f8e-9a51-5d2c7e0b1f44",
        "0c7a3a62-3b3e-4f8e-9a51-5d2c7e0b1f45",
    ];
    let specs = uuids.map(|uuid| format!("ram:8M,uuid={uuid}"));
    let args = ["--listen", "127.0.0.1:0", "--subnqn", NQN];
    let export = Export::start_with(&args, &specs.each_ref().map(String::as_str));
    let (subsystem, address) = (export.subsystem(), export.address());
    let other = format!("nvme+tcp://{address}/nqn.2026-01.org.example:other");
    refused(
        &other,
        &[address, "nqn.2026-01.org.example:other", "check the NQN"],
    );
    let existing = ["nsid=1", "nsid=2", uuids[0], uuids[1]];
    for selector in [
        "nsid=3",
        "uuid=0c7a3a62-3b3e-4f8e-9a51-5d2c7e0b1f46",
        "nguid=00112233445566778899aabbccddeeff",
    ] {
        let words = [&[NQN, address, selector, "no namespace"][..], &existing].concat();
        refused(&format!("{subsystem}?{selector}"), &words);
    }
    let words = [&[NQN, "several namespaces"][..], &existing].concat();
    refused(subsystem, &words);
    // And what it has is found by each name.
    for selector in ["nsid=2", &format!("uuid={}", uuids[1])] {
        let mut attach = Attach::start(&format!("{subsystem}?{selector}"));
        attach.stop();
    }
}

#[test]
fn a_host_that_is_not_allowed_is_named_and_an_allowed_one_is_served() {
    let args = [
        "--listen",
        "127.0.0.1:0",
        "--subnqn",
        NQN,
        "--allow-host",
        HOST,
    ];
    let export = Export::start_with(&args, &["ram:8M"]);
    let stranger = "nqn.2026-01.org.example:stranger";
    Attempt::start(&["--hostnqn", stranger], export.uri()).fails(&[
        NQN,
        stranger,
        "does not allow host",
        "--hostnqn",
    ]);
    let attach = Attach::start_with(&["--hostnqn", HOST], export.uri());
    assert_eq!(FrontEnd::connect(&attach.socket).write(0, 0, &[1; 512]), OK);
}

#[test]
fn a_socket_path_in_use_is_refused_and_its_user_is_not_disturbed() {
    let export = Export::start(&["ram:8M"]);
    let mut attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    let path = attach.socket.to_str().expect("UTF-8").to_owned();
    let mut second = Process::start("attach", ["attach", "--socket-path", &path, export.uri()]);
    failed(&mut second, &[&path, "in use", "choose another path"]);
    assert!(attach.socket.exists());
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    drop(guest);
    assert_eq!(FrontEnd::connect(&attach.socket).write(0, 0, &[1; 512]), OK);
    attach.stop();
}

#[test]
fn a_socket_that_a_killed_daemon_left_is_taken_over() {
    let export = Export::start(&["ram:8M"]);
    let directory = Directory::new();
    let socket = directory.path("disk.sock");
    drop(Attach::start_at(&socket, &[], export.uri()));
    assert!(socket.exists(), "a killed process cannot unlink anything");
    let mut attach = Attach::start_at(&socket, &[], export.uri());
    assert_eq!(FrontEnd::connect(&socket).write(0, 0, &[1; 512]), OK);
    attach.stop();
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let mut export = Process::start("export", ["export", "--listen", &address, "ram:8M"]);
    failed(&mut export, &[&address, "in use", "choose another"]);
    // Nothing stays open of what was opened before.
    let args = [
        "export",
        "--listen",
        "127.0.0.1:0",
        "--listen",
        &address,
        "ram:8M",
    ];
    failed(&mut Process::start("export", args), &[&address, "in use"]);
}

#[test]
fn a_target_on_an_ipv6_address_is_reached() {
    if let Err(error) = TcpListener::bind("[::1]:0") {
        eprintln!("SKIPPED: this machine has no IPv6 address [::1]: {error}");
        return;
    }
    let export = Export::start_with(&["--listen", "[::1]:0"], &["ram:8M"]);
    assert!(
        export.uri().starts_with("nvme+tcp://[::1]:"),
        "{}",
        export.uri()
    );
    let mut attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[6; 512]), OK);
    assert_eq!(guest.read(0, 0, 512), (OK, vec![6; 512]));
    drop(guest);
    attach.stop();
    let port = export
        .address()
        .rsplit(':')
        .next()
        .expect("a port")
        .to_owned();
    let none = format!("nvme+tcp://[::1]:{port}/nqn.2026-01.org.example:other");
    refused(&none, &["[::1]:", "nqn.2026-01.org.example:other"]);
}
