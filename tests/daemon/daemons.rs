//! The two commands of the program as a test has them: `export` on a free port, `attach` in a
//! directory of its own.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::process::Process;

/// What the program promises from a signal to its end.
pub(crate) const END: Duration = Duration::from_secs(2);

/// A directory that is removed with the test.
pub(crate) struct Directory(tempfile::TempDir);

impl Directory {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// A target on a free port of 127.0.0.1.
pub(crate) struct Export {
    pub(crate) process: Process,
    /// One for each namespace.
    pub(crate) uris: Vec<String>,
}

impl Export {
    #[track_caller]
    pub(crate) fn start(specs: &[&str]) -> Self {
        Self::start_with(&["--listen", "127.0.0.1:0"], specs)
    }

    /// Its controllers cannot be asked whether another one is done: time alone tells.
    #[track_caller]
    pub(crate) fn start_silent(specs: &[&str]) -> Self {
        Self::start_with(&["--listen", "127.0.0.1:0", "--ccrl", "0"], specs)
    }

    /// `args` say where to listen, once.
    #[track_caller]
    pub(crate) fn start_with(args: &[&str], specs: &[&str]) -> Self {
        Self::start_behind(&[], args, specs)
    }

    /// With words before the command: [`Process::start_behind`].
    #[track_caller]
    pub(crate) fn start_behind(words: &[String], args: &[&str], specs: &[&str]) -> Self {
        let command = ["export", "--log-format", "json"];
        let all = command.iter().chain(args).chain(specs);
        let process = Process::start_behind("export", words, all);
        let last = format!("nsid={}", specs.len());
        let uris = process.await_stdout(|line| line.ends_with(&last));
        Self { process, uris }
    }

    /// The URI of the first namespace.
    pub(crate) fn uri(&self) -> &str {
        &self.uris[0]
    }

    /// The URI without a selector.
    pub(crate) fn subsystem(&self) -> &str {
        self.uri().split('?').next().expect("a URI")
    }

    /// As in `127.0.0.1:4420`.
    pub(crate) fn address(&self) -> &str {
        let rest = self.uri().strip_prefix("nvme+tcp://").expect("a URI");
        rest.split('/').next().expect("an address")
    }

    /// Ends it with SIGTERM.
    #[track_caller]
    pub(crate) fn stop(&mut self) {
        self.stop_by(Signal::TERM);
    }

    #[track_caller]
    pub(crate) fn stop_by(&mut self, signal: Signal) {
        end(&mut self.process, signal);
    }

    /// What it counted for a namespace, after its end.
    #[track_caller]
    pub(crate) fn counter(&self, nsid: u32, name: &str) -> u64 {
        let mut events = self.process.logged("namespace counters");
        events.retain(|fields| fields["nsid"] == nsid);
        counted(&events, name)
    }

    /// What it counted for all queues, after its end.
    #[track_caller]
    pub(crate) fn total(&self, name: &str) -> u64 {
        counted(&self.process.logged("target counters"), name)
    }
}

/// A disk on a socket.
pub(crate) struct Attach {
    pub(crate) process: Process,
    pub(crate) socket: PathBuf,
    _directory: Option<Directory>,
}

impl Attach {
    #[track_caller]
    pub(crate) fn start(uri: &str) -> Self {
        Self::start_with(&[], uri)
    }

    #[track_caller]
    pub(crate) fn start_with(args: &[&str], uri: &str) -> Self {
        let directory = Directory::new();
        let mut attach = Self::start_at(&directory.path("disk.sock"), args, uri);
        attach._directory = Some(directory);
        attach
    }

    #[track_caller]
    pub(crate) fn start_at(socket: &Path, args: &[&str], uri: &str) -> Self {
        Self::start_command(&[], "attach", socket, args, uri)
    }

    /// With words before the command: [`Process::start_behind`].
    #[track_caller]
    pub(crate) fn start_behind(words: &[String], args: &[&str], uri: &str) -> Self {
        let directory = Directory::new();
        let socket = directory.path("disk.sock");
        let mut attach = Self::start_command(words, "attach", &socket, args, uri);
        attach._directory = Some(directory);
        attach
    }

    /// A local disk instead.
    #[track_caller]
    pub(crate) fn serve(args: &[&str], spec: &str) -> Self {
        let directory = Directory::new();
        let mut serve = Self::start_command(&[], "serve", &directory.path("disk.sock"), args, spec);
        serve._directory = Some(directory);
        serve
    }

    /// The same, at this socket.
    #[track_caller]
    pub(crate) fn serve_at(socket: &Path, args: &[&str], spec: &str) -> Self {
        Self::start_command(&[], "serve", socket, args, spec)
    }

    #[track_caller]
    fn start_command(
        words: &[String],
        name: &'static str,
        socket: &Path,
        args: &[&str],
        what: &str,
    ) -> Self {
        let path = socket.to_str().expect("UTF-8");
        let command = [name, "--log-format", "json", "--socket-path", path];
        let all = command.iter().chain(args).chain([&what]);
        let process = Process::start_behind(name, words, all);
        process.await_stdout(|line| line.starts_with("One queue for each vCPU"));
        assert!(socket.exists(), "it is ready and has no socket");
        Self {
            process,
            socket: socket.to_owned(),
            _directory: None,
        }
    }

    /// Ends it with SIGTERM.
    #[track_caller]
    pub(crate) fn stop(&mut self) {
        self.stop_by(Signal::TERM);
    }

    #[track_caller]
    pub(crate) fn stop_by(&mut self, signal: Signal) {
        end(&mut self.process, signal);
        assert!(!self.socket.exists(), "the socket was left behind");
    }

    /// What it counted, after its end.
    #[track_caller]
    pub(crate) fn counter(&self, name: &str) -> u64 {
        counted(&self.process.logged("disk counters"), name)
    }

    /// What was counted for the storage of a local disk, after its end.
    #[track_caller]
    pub(crate) fn storage_counter(&self, name: &str) -> u64 {
        counted(&self.process.logged("namespace counters"), name)
    }
}

/// Sends a signal that must lead to a clean end in time.
#[track_caller]
fn end(process: &mut Process, signal: Signal) {
    let sent = Instant::now();
    process.signal(signal);
    let status = process.wait(Duration::from_secs(10));
    let took = sent.elapsed();
    assert!(status.success(), "it ended with {status}");
    assert!(took < END, "it took {took:?} to end");
}

#[track_caller]
fn counted(events: &[Value], name: &str) -> u64 {
    let [fields] = events else {
        panic!("not one line of counters but {events:?}")
    };
    fields[name]
        .as_u64()
        .unwrap_or_else(|| panic!("no counter {name} in {fields}"))
}
