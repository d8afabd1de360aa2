//! A process of a test: started, watched, its output kept, ended when dropped.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};
use serde_json::Value;

/// So many lines of each stream are kept.
const KEPT_LINES: usize = 4000;
/// So many of them are printed when the test fails.
const SHOWN_LINES: usize = 60;

/// A running (or ended) process. Its end follows when the value is dropped or the test's thread ends, whatever the reason.
pub struct Daemon {
    name: String,
    child: Child,
    status: Option<ExitStatus>,
    stdout: Arc<Lines>,
    stderr: Arc<Lines>,
}

/// The lines of one stream, up to now.
#[derive(Default)]
struct Lines {
    state: Mutex<LinesState>,
    changed: Condvar,
}

#[derive(Default)]
struct LinesState {
    lines: VecDeque<String>,
    closed: bool,
}

impl Daemon {
    /// Starts `command`; `name` is what it is called in reports.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(name: &str, command: &Command) -> Result<Self> {
        let mut child = dying_with_its_parent(command)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let stdout = Lines::follow(child.stdout.take());
        let stderr = Lines::follow(child.stderr.take());
        Ok(Self {
            name: name.to_owned(),
            child,
            status: None,
            stdout,
            stderr,
        })
    }

    /// What it is called in reports.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process's identifier.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until standard output has `count` lines that `wanted` picks, and returns them.
    ///
    /// # Errors
    /// When the process ends first or `limit` is over.
    pub fn wait_for_output(
        &mut self,
        count: usize,
        limit: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Vec<String>> {
        let deadline = Instant::now() + limit;
        loop {
            let found: Vec<String> = self
                .stdout
                .lines()
                .into_iter()
                .filter(|line| wanted(line))
                .collect();
            if found.len() >= count {
                return Ok(found);
            }
            if let Some(status) = self.try_wait()? {
                self.stderr.wait_until_closed();
                bail!(
                    "{} ended ({status}) before it was ready:\n{}",
                    self.name,
                    self.stderr.tail(5)
                );
            }
            if Instant::now() >= deadline {
                bail!(
                    "{} was not ready after {limit:?}:\n{}",
                    self.name,
                    self.stderr.tail(5)
                );
            }
            self.stdout.wait_for_change(Duration::from_millis(50));
        }
    }

    /// The exit status, if it has ended.
    ///
    /// # Errors
    /// When the system cannot tell.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    /// When `limit` is over.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!("{} did not end within {limit:?}", self.name);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends SIGTERM and waits for a clean end (status 0) within `limit`.
    ///
    /// # Errors
    /// When it had ended before, ends with another status, or takes too long.
    pub fn stop(&mut self, limit: Duration) -> Result<()> {
        if let Some(status) = self.try_wait()? {
            bail!("{} had ended already: {status}", self.name);
        }
        self.signal(Signal::TERM)?;
        let status = self.wait(limit)?;
        if !status.success() {
            bail!("{} ended with {status} on SIGTERM", self.name);
        }
        // What it logged last is there when its streams are closed.
        self.stdout.wait_until_closed();
        self.stderr.wait_until_closed();
        Ok(())
    }

    /// Ends it at once, with SIGKILL, and waits for its end.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn kill(&mut self) -> Result<()> {
        if self.try_wait()?.is_none() {
            self.child.kill()?;
            self.status = Some(self.child.wait()?);
        }
        Ok(())
    }

    /// Stops it where it is, as if its machine had frozen.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Sends SIGHUP, which has `export` and `serve` look at the size of their storage.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn hang_up(&self) -> Result<()> {
        self.signal(Signal::HUP)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal)
            .with_context(|| format!("signal to {}", self.name))
    }

    /// The lines of its standard error, after its end.
    pub fn complaints(&self) -> Vec<String> {
        self.stderr.wait_until_closed();
        self.stderr.lines()
    }

    /// The `fields` of every JSON log line whose message is `message`.
    pub fn logged(&self, message: &str) -> Vec<Value> {
        self.stderr
            .lines()
            .iter()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter_map(|mut event| event.get_mut("fields").map(Value::take))
            .filter(|fields| fields["message"] == message)
            .collect()
    }

    /// The messages of JSON log lines that begin so, each once, in the order in which they came.
    pub fn messages(&self, beginning: &str) -> Vec<String> {
        let mut messages = Vec::new();
        for line in self.stderr.lines() {
            let event = serde_json::from_str::<Value>(&line).unwrap_or_default();
            let message = event["fields"]["message"].as_str().unwrap_or_default();
            if message.starts_with(beginning) && !messages.iter().any(|known| known == message) {
                messages.push(message.to_owned());
            }
        }
        messages
    }

    /// The JSON log lines that warn or complain, as they are.
    pub fn warnings(&self) -> Vec<String> {
        let level = |line: &str| {
            let event = serde_json::from_str::<Value>(line).unwrap_or_default();
            event["level"] == "WARN" || event["level"] == "ERROR"
        };
        let lines = self.stderr.lines();
        lines.into_iter().filter(|line| level(line)).collect()
    }

    /// The memory that is its own: anonymous and file pages, without the guest memory that it shares.
    ///
    /// # Errors
    /// When it has ended.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let kib = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().nth(1));
            Ok(number
                .with_context(|| format!("no {name} in its status"))?
                .parse()?)
        };
        Ok((kib("RssAnon")? + kib("RssFile")?) * 1024)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // The shown log tells of the failure, not of this end.
        if thread::panicking() {
            eprintln!("---- {}: the end of its log", self.name);
            eprintln!("{}", self.stderr.tail(SHOWN_LINES));
        }
        if let Err(error) = self.kill() {
            eprintln!("{}: cannot be ended: {error:#}", self.name);
        }
    }
}

/// The same command, but ended by the kernel when the thread that started it ends, so that a killed test leaves nothing.
fn dying_with_its_parent(command: &Command) -> Command {
    let mut wrapped = Command::new("setpriv");
    wrapped
        .args(["--pdeathsig", "KILL", "--"])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(name, value),
            None => wrapped.env_remove(name),
        };
    }
    wrapped
}

impl Lines {
    /// Collects the lines of `stream` in a thread of its own.
    fn follow(stream: Option<impl Read + Send + 'static>) -> Arc<Self> {
        let lines = Arc::new(Self::default());
        let Some(stream) = stream else { return lines };
        let collected = Arc::clone(&lines);
        thread::spawn(move || {
            let mut reader = BufReader::new(stream);
            let mut line = Vec::new();
            while matches!(reader.read_until(b'\n', &mut line), Ok(length) if length > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                let mut state = collected.lock();
                if state.lines.len() == KEPT_LINES {
                    state.lines.pop_front();
                }
                state.lines.push_back(text);
                drop(state);
                collected.changed.notify_all();
                line.clear();
            }
            collected.lock().closed = true;
            collected.changed.notify_all();
        });
        lines
    }

    fn lock(&self) -> MutexGuard<'_, LinesState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lines(&self) -> Vec<String> {
        self.lock().lines.iter().cloned().collect()
    }

    fn tail(&self, count: usize) -> String {
        let state = self.lock();
        let skipped = state.lines.len().saturating_sub(count);
        let lines: Vec<String> = state
            .lines
            .iter()
            .skip(skipped)
            .map(|line| format!("    {line}"))
            .collect();
        lines.join("\n")
    }

    fn wait_for_change(&self, limit: Duration) {
        drop(self.changed.wait_timeout(self.lock(), limit));
    }

    /// At most a second: a grandchild may hold the stream open.
    fn wait_until_closed(&self) {
        let limit = Duration::from_secs(1);
        drop(
            self.changed
                .wait_timeout_while(self.lock(), limit, |state| !state.closed),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Daemon {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Daemon::start("shell", &command).unwrap()
    }

    #[test]
    fn output_that_comes_late_is_waited_for() {
        let mut daemon = shell("sleep 0.2; echo noise; echo ready; sleep 60");
        let found = daemon
            .wait_for_output(1, Duration::from_secs(10), |line| line == "ready")
            .unwrap();
        assert_eq!(found, ["ready"]);
    }

    #[test]
    fn an_end_before_readiness_is_reported_with_the_log() {
        let mut daemon = shell("echo no such file >&2; exit 3");
        let error = daemon
            .wait_for_output(1, Duration::from_secs(10), |_| true)
            .unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("no such file") && text.contains("exit status: 3"),
            "{text}"
        );
    }

    #[test]
    fn a_process_that_ignores_sigterm_is_not_a_clean_end() {
        let mut daemon = shell("trap '' TERM; echo ready; while :; do sleep 0.1; done");
        daemon
            .wait_for_output(1, Duration::from_secs(10), |line| line == "ready")
            .unwrap();
        let error = daemon.stop(Duration::from_millis(300)).unwrap_err();
        assert!(error.to_string().contains("did not end"), "{error}");
    }

    #[test]
    fn logged_events_are_found_by_their_message() {
        let mut daemon = shell(
            r#"echo '{"level":"INFO","fields":{"message":"disk counters","reads":7}}' >&2; echo plain >&2; echo ready; sleep 60"#,
        );
        daemon
            .wait_for_output(1, Duration::from_secs(10), |_| true)
            .unwrap();
        daemon.kill().unwrap();
        daemon.stderr.wait_until_closed();
        let events = daemon.logged("disk counters");
        assert_eq!(events.len(), 1);
        assert_eq!(events[0]["reads"], 7);
    }

    #[test]
    fn only_lines_that_warn_or_complain_are_warnings() {
        let mut daemon = shell(
            r#"for level in INFO WARN DEBUG ERROR; do echo "{\"level\":\"$level\"}" >&2; done; echo WARN >&2; echo ready; sleep 60"#,
        );
        daemon
            .wait_for_output(1, Duration::from_secs(10), |_| true)
            .unwrap();
        daemon.kill().unwrap();
        daemon.stderr.wait_until_closed();
        let warnings = [r#"{"level":"WARN"}"#, r#"{"level":"ERROR"}"#];
        assert_eq!(daemon.warnings(), warnings);
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let daemon = shell("sleep 60");
        let path = format!("/proc/{}", daemon.pid());
        assert!(std::path::Path::new(&path).exists());
        drop(daemon);
        assert!(!std::path::Path::new(&path).exists());
    }
}
