//! A program of a contender: started, waited for until it serves, and ended by its process number.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::kernel;

/// How long a program may take until it serves.
const START: Duration = Duration::from_secs(20);
/// How long a program may take to end before it is killed.
const END: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(5);

/// A running program; ended when dropped.
#[derive(Debug)]
pub(crate) struct Program {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Program {
    /// Starts a program whose standard error goes to the file `log`.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn start(mut command: Command, log: PathBuf) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stderr(File::create(&log)?);
        let child = kernel::end_with_parent(&mut command)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name, child, log })
    }

    /// Its process number.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The first line that it prints. Its standard output has to be a pipe.
    ///
    /// # Errors
    /// It ends before, or takes too long.
    pub(crate) fn first_line(&mut self) -> Result<String> {
        let out = self.child.stdout.take().context("no pipe")?;
        let (send, receive) = mpsc::channel();
        // Reads on to the end, so that the program never blocks on its output.
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
        match receive.recv_timeout(START) {
            Ok(line) => Ok(line),
            Err(_) => bail!("{} printed nothing: {}", self.name, self.last_words()),
        }
    }

    /// Waits until a path is there.
    ///
    /// # Errors
    /// The program ends before, or takes too long.
    pub(crate) fn wait_for(&mut self, path: &Path) -> Result<()> {
        let start = Instant::now();
        while !path.exists() {
            let ended = self.child.try_wait()?.is_some();
            if ended || start.elapsed() > START || kernel::interrupted() {
                bail!("{} does not serve: {}", self.name, self.last_words());
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// The end of its log, in one line.
    pub(crate) fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(3).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    }

    /// Ends it, and returns its log.
    pub(crate) fn end(mut self) -> String {
        self.stop();
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn stop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        // Not waited for yet, so the number is still its own.
        if let Some(pid) = pid {
            let _ = kill_process(pid, Signal::TERM);
        }
        let start = Instant::now();
        while start.elapsed() < END {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(PAUSE);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.stop();
    }
}

/// True when a program runs and likes its arguments.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    let command = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}
