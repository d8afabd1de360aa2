//! Targets that fail at one stage or another of bringing an association up: whatever they do, and whatever a VMM does
//! meanwhile, there is an error in time that names the address and the stage.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nvmf::spec::identify::cns;
use nvmf::spec::property::offset;

use crate::daemons::{Attach, Directory};
use crate::front_end::{FrontEnd, IOERR};
use crate::process::Process;
use crate::scripted::{Failure, Script, Scripted, Stage};

/// What connecting may take by default, and what the program needs to begin and to end when many others do so, too.
const LIMIT: Duration = Duration::from_secs(5 + 4);
/// Between two bytes: the shortest answer takes longer than connecting may.
const SLOW: Failure = Failure::Slow(Duration::from_millis(300));
const FAILURES: [Failure; 4] = [Failure::Silent, Failure::CutOff, SLOW, Failure::Nonsense];

/// The stages, in order, each with what it is called.
const ADMIN: [(Stage, &str); 8] = [
    (Stage::Handshake, "handshake"),
    (Stage::Connect, "Connect"),
    (Stage::Property(offset::CAP), "Property Get of CAP"),
    (Stage::Property(offset::CC), "Property Get of CC"),
    (Stage::SetProperty, "Property Set of CC"),
    (Stage::Property(offset::CSTS), "Property Get of CSTS"),
    (Stage::Identify(cns::CONTROLLER), "Identify Controller"),
    (Stage::SetFeatures, "Set Features (Number of Queues)"),
];
const NAMESPACES: [(Stage, &str); 3] = [
    (
        Stage::Identify(cns::ACTIVE_NAMESPACES),
        "Identify Active Namespace ID list",
    ),
    (Stage::Identify(cns::NAMESPACE), "Identify Namespace"),
    (
        Stage::Identify(cns::NAMESPACE_DESCRIPTORS),
        "Identify Namespace Identification Descriptors",
    ),
];
const IO: [(Stage, &str); 2] = [
    (Stage::IoHandshake, "handshake"),
    (Stage::IoConnect, "Connect"),
];

/// What a VMM does while the controller is waited for.
#[derive(Clone, Copy, Debug)]
enum Vmm {
    /// There is none.
    Absent,
    /// It has connected, and asked for the features.
    Waiting,
    /// It has connected, asked, and was killed.
    Killed,
}

/// A command that has to fail.
struct Attempt {
    process: Process,
    controller: Scripted,
    begun: Instant,
    words: Vec<&'static str>,
    what: String,
    /// Of `attach`.
    directory: Option<Directory>,
    vmm: Option<UnixStream>,
}

impl Attempt {
    fn start(command: &str, stage: Option<Stage>, failure: Failure, word: &'static str) -> Self {
        let controller = Scripted::start(Script {
            failure: Some((stage, failure)),
            discovery: command == "discover",
            ..Script::default()
        });
        let uri = match command {
            "discover" => format!("nvme+tcp://{}", controller.address()),
            _ => controller.uri(),
        };
        let directory = (command == "attach").then(Directory::new);
        let socket = directory.as_ref().map(|it| it.path("disk.sock"));
        let socket = socket.map(|it| it.to_str().expect("UTF-8").to_owned());
        let path = socket.iter().flat_map(|it| ["--socket-path", it]);
        let args = [command].into_iter().chain(path).chain([uri.as_str()]);
        Self {
            process: Process::start(command, args),
            controller,
            begun: Instant::now(),
            words: vec![word],
            what: format!("{command}, {stage:?}, {failure:?}"),
            directory,
            vmm: None,
        }
    }

    /// Has a VMM connect, as soon as there is a socket; an attempt that fails at once may be over before.
    fn with(mut self, vmm: Vmm) -> Self {
        self.what += &format!(", VMM {vmm:?}");
        if matches!(vmm, Vmm::Absent) {
            return self;
        }
        let directory = self.directory.as_ref().expect("attach");
        let socket = directory.path("disk.sock");
        while self.process.is_running() && self.vmm.is_none() {
            self.vmm = UnixStream::connect(&socket).ok();
            std::thread::sleep(Duration::from_millis(1));
        }
        if let Some(stream) = &mut self.vmm {
            // GET_FEATURES; nobody may be there any more.
            let header = [1_u32, 1, 0].map(u32::to_le_bytes);
            let _ = stream.write_all(header.as_flattened());
        }
        if matches!(vmm, Vmm::Killed) {
            self.vmm = None;
        }
        self
    }

    /// It ends in time, with one line that has all of the words; the VMM sees the end, and no socket is left.
    #[track_caller]
    fn fails(mut self) {
        let what = &self.what;
        let status = self.process.wait(Duration::from_secs(30));
        let took = self.begun.elapsed();
        let lines = self.process.stderr();
        assert_eq!(status.code(), Some(1), "{what}: {lines:?}");
        assert_eq!(self.process.stdout(), [""; 0], "{what}");
        let [line] = &lines[..] else {
            panic!("{what}: not one line: {lines:#?}")
        };
        assert!(line.starts_with("vhost-nvmf: "), "{what}: {line}");
        let address = self.controller.address();
        for word in [address.as_str()].iter().chain(&self.words) {
            assert!(line.contains(word), "{what}: {word:?} is not in: {line}");
        }
        assert!(took < LIMIT, "{what}: it took {took:?}: {line}");
        if let Some(stream) = &mut self.vmm {
            let mut answer = Vec::new();
            // A reset is an end, too.
            let _ = stream.read_to_end(&mut answer);
            assert!(answer.is_empty(), "{what}: the VMM was answered");
        }
        if let Some(directory) = &self.directory {
            assert!(!directory.path("disk.sock").exists(), "{what}: a socket");
        }
    }
}

/// Every failure at every stage, all at once since each takes its time.
fn each(command: &str, stages: &[(Stage, &'static str)]) {
    let mut attempts = Vec::new();
    for (number, &(stage, word)) in stages.iter().enumerate() {
        for (other, failure) in FAILURES.into_iter().enumerate() {
            let attempt = Attempt::start(command, Some(stage), failure, word);
            let vmms = [Vmm::Absent, Vmm::Waiting, Vmm::Killed];
            let vmm = vmms[(number + other) % vmms.len()];
            attempts.push(match command {
                "attach" => attempt.with(vmm),
                _ => attempt,
            });
        }
    }
    attempts.into_iter().for_each(Attempt::fails);
}

#[test]
fn attach_names_the_stage_at_which_a_target_fails_whatever_the_vmm_does() {
    each("attach", &[&ADMIN[..], &NAMESPACES, &IO].concat());
}

#[test]
fn list_ns_names_the_stage_at_which_a_target_fails() {
    each("list-ns", &[&ADMIN[..], &NAMESPACES].concat());
}

#[test]
fn identify_names_the_stage_at_which_a_target_fails() {
    each("identify", &ADMIN);
}

#[test]
fn discover_names_the_stage_at_which_a_target_fails() {
    let log = (Stage::GetLogPage, "Get Log Page (Discovery)");
    each("discover", &[&ADMIN[..7], &[log]].concat());
}

/// Every single answer comes within the time that a command may take.
#[test]
fn a_target_that_is_slow_at_every_stage_does_not_take_all_of_their_times_together() {
    let slow = Failure::Slow(Duration::from_millis(20));
    let commands = ["attach", "list-ns", "identify", "discover"];
    let started = commands.map(|command| Attempt::start(command, None, slow, ""));
    started.into_iter().for_each(Attempt::fails);
}

#[test]
fn a_target_that_breaks_off_in_an_answer_to_the_guest_fails_it_and_those_after_and_is_named() {
    for failure in [Failure::CutOff, Failure::Nonsense] {
        let controller = Scripted::start(Script {
            failure: Some((Some(Stage::Io), failure)),
            ..Script::default()
        });
        // Otherwise they are held until it does better.
        let mut attach = Attach::start_with(&["--ctrl-loss-tmo", "0"], &controller.uri());
        let mut guest = FrontEnd::connect(&attach.socket);
        assert_eq!(guest.flush(0), IOERR, "{failure:?}");
        assert_eq!(guest.flush(0), IOERR, "{failure:?}");
        let address = controller.address();
        attach.process.await_log(|line| {
            let severe = line.contains("\"ERROR\"") || line.contains("\"WARN\"");
            severe && line.contains(&address)
        });
        attach.stop();
    }
}
