//! A process of a test: started, watched, its output kept, ended with the test whatever happens.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

/// No test needs a process for longer; one that hangs is killed, and the test with it.
const LIFETIME: Duration = Duration::from_secs(60);

/// A running or ended process of the program under test.
pub(crate) struct Process {
    name: String,
    child: Child,
    /// Names the process even after another one got its number.
    handle: Arc<OwnedFd>,
    status: Option<ExitStatus>,
    stdout: Output,
    stderr: Output,
}

impl Process {
    /// Runs the program with these arguments; `name` is what the process is called in reports.
    pub(crate) fn start<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> Self {
        Self::start_behind(name, &[], args)
    }

    /// As [`Process::start`], with words before the program: such as run it in another network.
    pub(crate) fn start_behind<S: AsRef<OsStr>>(
        name: &str,
        words: &[String],
        args: impl IntoIterator<Item = S>,
    ) -> Self {
        // The kernel ends it when the thread of the test ends, so that a killed test leaves nothing.
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .args(words)
            .arg(env!("CARGO_BIN_EXE_vhost-nvmf"))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("setpriv (package util-linux) starts the program");
        let handle = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).expect("a pidfd");
        let handle = Arc::new(handle);
        let watched = Arc::clone(&handle);
        thread::spawn(move || {
            if !has_ended(&watched, LIFETIME) {
                let _ = pidfd_send_signal(&watched, Signal::KILL);
            }
        });
        Self {
            name: name.to_owned(),
            stdout: Output::follow(child.stdout.take().expect("a pipe")),
            stderr: Output::follow(child.stderr.take().expect("a pipe")),
            child,
            handle,
            status: None,
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        pidfd_send_signal(&*self.handle, signal).expect("the process runs");
    }

    /// Stops it with SIGSTOP: none of its threads does anything once this returns.
    #[track_caller]
    pub(crate) fn pause(&self) {
        self.signal(Signal::STOP);
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.is_paused() {
            assert!(Instant::now() < deadline, "{} does not stop", self.name);
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn is_paused(&self) -> bool {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("it runs");
        let mut paths = tasks.map(|entry| entry.expect("an entry").path());
        paths.all(|path| {
            let status = std::fs::read_to_string(path.join("status"));
            status.is_ok_and(|status| status.contains("\nState:\tT"))
        })
    }

    /// Lets it go on.
    pub(crate) fn resume(&self) {
        self.signal(Signal::CONT);
    }

    pub(crate) fn is_running(&self) -> bool {
        !has_ended(&self.handle, Duration::ZERO)
    }

    /// Waits for its end, at most `limit`; all of its output is there afterwards.
    #[track_caller]
    pub(crate) fn wait(&mut self, limit: Duration) -> ExitStatus {
        if let Some(status) = self.status {
            return status;
        }
        assert!(
            has_ended(&self.handle, limit),
            "{} did not end within {limit:?}",
            self.name
        );
        let status = self.child.wait().expect("it has ended");
        self.status = Some(status);
        self.stdout.close();
        self.stderr.close();
        status
    }

    /// Waits until a line of standard output is as wanted, and returns the lines up to it.
    #[track_caller]
    pub(crate) fn await_stdout(&self, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let found = self.stdout.wait_for(&wanted);
        assert!(found, "{} did not print what was waited for", self.name);
        self.stdout.lock().lines.clone()
    }

    /// Waits until a line of the log is as wanted.
    #[track_caller]
    pub(crate) fn await_log(&self, wanted: impl Fn(&str) -> bool) {
        let found = self.stderr.wait_for(&wanted);
        assert!(found, "{} did not log what was waited for", self.name);
    }

    pub(crate) fn stdout(&self) -> Vec<String> {
        self.stdout.lock().lines.clone()
    }

    /// The lines of standard error: all that it wrote before this call.
    pub(crate) fn stderr(&self) -> Vec<String> {
        self.stderr.lock().lines.clone()
    }

    /// The fields of every JSON line of the log whose message is `message`.
    pub(crate) fn logged(&self, message: &str) -> Vec<Value> {
        let lines = self.stderr();
        let events = lines
            .iter()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let fields = events.filter_map(|mut event| event.get_mut("fields").map(Value::take));
        fields
            .filter(|fields| fields["message"] == message)
            .collect()
    }

    /// A line of its `/proc/PID/status`, in KiB.
    pub(crate) fn status_kib(&self, name: &str) -> u64 {
        let path = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(path).expect("the process runs");
        number(&status, name).expect("a number of KiB")
    }

    /// Context switches of each of its threads up to now, by the thread's name.
    pub(crate) fn context_switches(&self) -> Vec<(String, u64)> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).expect("it runs");
        let paths = tasks.map(|entry| entry.expect("an entry").path());
        let read = |path: std::path::PathBuf| {
            // A thread may end while it is looked at.
            let name = std::fs::read_to_string(path.join("comm")).ok()?;
            let status = std::fs::read_to_string(path.join("status")).ok()?;
            let switches = number(&status, "voluntary_ctxt_switches")?;
            Some((name.trim().to_owned(), switches))
        };
        let mut threads: Vec<_> = paths.filter_map(read).collect();
        threads.sort();
        threads
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = pidfd_send_signal(&*self.handle, Signal::KILL);
            let _ = self.child.wait();
            self.stdout.close();
            self.stderr.close();
        }
        if thread::panicking() {
            eprintln!("---- standard error of {} ({:?})", self.name, self.status);
            for line in self.stderr() {
                eprintln!("{line}");
            }
        }
    }
}

fn number(status: &str, name: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

fn has_ended(handle: &OwnedFd, limit: Duration) -> bool {
    readable_within(handle, limit)
}

/// Waits until a descriptor is readable, or hung up.
pub(crate) fn readable_within(fd: &impl AsFd, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: left.as_secs().cast_signed(),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
    }
}

/// The lines of one stream. A thread collects them, so that the process never waits for room; whoever looks at them
/// collects what is there first, and so sees all that the process wrote before.
struct Output {
    shared: Arc<(Mutex<Lines>, Condvar)>,
    reader: Option<JoinHandle<()>>,
}

struct Lines {
    stream: OwnedFd,
    lines: Vec<String>,
    /// The beginning of the next line.
    partial: Vec<u8>,
    closed: bool,
}

impl Output {
    fn follow(stream: impl Into<OwnedFd>) -> Self {
        let stream = stream.into();
        rustix::io::ioctl_fionbio(&stream, true).expect("a pipe that does not block");
        let watched = stream.try_clone().expect("a descriptor");
        let lines = Lines {
            stream,
            lines: Vec::new(),
            partial: Vec::new(),
            closed: false,
        };
        let shared = Arc::new((Mutex::new(lines), Condvar::new()));
        let collected = Arc::clone(&shared);
        let reader = thread::spawn(move || {
            let (lines, changed) = &*collected;
            loop {
                let _ = readable_within(&watched, LIFETIME);
                let lines = collect(lines);
                changed.notify_all();
                if lines.closed {
                    break;
                }
            }
        });
        Self {
            shared,
            reader: Some(reader),
        }
    }

    /// All lines up to now.
    fn lock(&self) -> MutexGuard<'_, Lines> {
        collect(&self.shared.0)
    }

    /// Waits for a line; false when the stream ends, or patience does, without it.
    fn wait_for(&self, wanted: &dyn Fn(&str) -> bool) -> bool {
        let found = |lines: &Lines| lines.lines.iter().any(|line| wanted(line));
        let waiting = |lines: &mut Lines| !found(lines) && !lines.closed;
        let patience = Duration::from_secs(10);
        let (lines, _) = self
            .shared
            .1
            .wait_timeout_while(self.lock(), patience, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        found(&lines)
    }

    /// Waits until the process that has ended has no more to say.
    fn close(&mut self) {
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// Takes what the stream has.
fn collect(lines: &Mutex<Lines>) -> MutexGuard<'_, Lines> {
    let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
    let mut bytes = [0; 4096];
    while !lines.closed {
        match rustix::io::read(&lines.stream, &mut bytes) {
            Ok(0) => lines.closed = true,
            Ok(count) => lines.partial.extend_from_slice(&bytes[..count]),
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::AGAIN) => break,
            Err(error) => panic!("output of a process: {error}"),
        }
        while let Some(end) = lines.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = lines.partial.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line[..end]).into_owned();
            lines.lines.push(line);
        }
    }
    if lines.closed && !lines.partial.is_empty() {
        let last = std::mem::take(&mut lines.partial);
        lines
            .lines
            .push(String::from_utf8_lossy(&last).into_owned());
    }
    lines
}
