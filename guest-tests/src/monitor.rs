//! QEMU's monitor (QMP): commands to a running machine, and the migration of one.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::qemu::qemu_version;

/// QEMU answers at once, unless the machine is very busy.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(50);

/// How fast a migration copies, and when it stops the machine for the rest.
struct Pace {
    /// In bytes a second.
    bandwidth: u64,
    /// It stops the machine when the rest takes no longer.
    downtime_ms: u64,
}

/// What was not copied yet goes while the machine stands still, all of it: nothing here is larger than what the loopback moves in moments.
const AT_ONCE: Pace = Pace {
    bandwidth: 4 << 30,
    downtime_ms: 60_000,
};

/// A machine that works has nearly always written to more meanwhile than a few pages, so it is copied round by round. With a limit of 0
/// QEMU 10.0 would not look what there is before it stops the machine.
const SLOWLY: Pace = Pace {
    bandwidth: 32 << 20,
    downtime_ms: 1,
};

/// How many times a migration looks for what was written to meanwhile before it stops a machine that goes on writing.
///
/// Where QEMU 7.2 emulates processors, what they write in rounds after the first gets lost, with any disks and with none: so
/// all of memory is copied once there, and the rest while the machine stands still.
///
/// # Errors
/// As [`qemu_version`].
pub fn rounds_of_copying() -> Result<u64> {
    Ok(if qemu_version()? >= (10, 0) { 6 } else { 1 })
}

/// A connection to a monitor.
#[derive(Debug)]
pub struct Monitor {
    reader: BufReader<UnixStream>,
}

/// How a migration went, as QEMU measured it.
#[derive(Clone, Copy, Debug)]
pub struct Migrated {
    /// From its beginning to its end.
    pub total: Duration,
    /// The machine stood still for so long.
    pub downtime: Duration,
    /// Rounds of copying pages that had been written to meanwhile.
    pub rounds: u64,
}

impl Monitor {
    /// Connects to the monitor on a socket.
    ///
    /// # Errors
    /// When nobody answers there.
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("QEMU's monitor")?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut monitor = Self {
            reader: BufReader::new(stream),
        };
        monitor.read()?;
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU's monitor is gone");
        }
        serde_json::from_str(&line).with_context(|| line.clone())
    }

    /// Executes a command and returns what it returned.
    ///
    /// # Errors
    /// When QEMU refuses it, or is gone.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.reader.get_mut().write_all(line.as_bytes())?;
        loop {
            // Events come in between.
            let mut answer = self.read()?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Writes the first `size` bytes of the machine's memory to a file.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn save_memory(&mut self, size: u64, file: &Path) -> Result<()> {
        let arguments = json!({ "val": 0, "size": size, "filename": file });
        self.execute("pmemsave", &arguments).map(drop)
    }

    /// Stops the machine's processors: devices keep their state and begin nothing new.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn stop(&mut self) -> Result<()> {
        self.execute("stop", &json!({})).map(drop)
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn cont(&mut self) -> Result<()> {
        self.execute("cont", &json!({})).map(drop)
    }

    /// Resets the machine, waits until its devices and memory are, and gives the time that this took.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn reset(&mut self) -> Result<Duration> {
        self.execute("system_reset", &json!({}))?;
        let begun = Instant::now();
        // The command only asks for it. The event tells that it is done.
        while self.read()?["event"] != "RESET" {}
        Ok(begun.elapsed())
    }

    /// Migrates the machine to `uri`, in several rounds of copying where this QEMU is good at that, and waits until it is done.
    ///
    /// # Errors
    /// When it fails, or takes longer than `limit`.
    pub fn migrate(&mut self, uri: &str, limit: Duration) -> Result<Migrated> {
        let rounds = rounds_of_copying()?;
        self.begin_migration(uri)?;
        let deadline = Instant::now() + limit;
        let mut slow = rounds > 1;
        loop {
            let state = self.execute("query-migrate", &json!({}))?;
            let millis = |name: &str| Duration::from_millis(state[name].as_u64().unwrap_or(0));
            let copied = state["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
            match state["status"].as_str().unwrap_or("none") {
                "completed" => {
                    return Ok(Migrated {
                        total: millis("total-time"),
                        downtime: millis("downtime"),
                        rounds: copied,
                    });
                }
                "failed" | "cancelled" => bail!("the migration to {uri} has failed: {state}"),
                _ if Instant::now() > deadline => bail!("the migration takes too long: {state}"),
                _ if slow && copied >= rounds => {
                    slow = false;
                    self.set_parameters(&AT_ONCE)?;
                }
                _ => sleep(PAUSE),
            }
        }
    }

    /// Begins to migrate the machine.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn begin_migration(&mut self, uri: &str) -> Result<()> {
        let pace = match rounds_of_copying()? {
            1 => AT_ONCE,
            _ => SLOWLY,
        };
        self.set_parameters(&pace)?;
        self.execute("migrate", &json!({ "uri": uri })).map(drop)
    }

    fn set_parameters(&mut self, pace: &Pace) -> Result<()> {
        let parameters =
            json!({ "max-bandwidth": pace.bandwidth, "downtime-limit": pace.downtime_ms });
        self.execute("migrate-set-parameters", &parameters)
            .map(drop)
    }

    /// Waits until the machine is here that was migrated, and could run.
    ///
    /// # Errors
    /// When it is not within `limit`.
    pub fn await_migrated(&mut self, limit: Duration) -> Result<()> {
        self.await_status(limit, |state| state["status"] != "inmigrate")
    }

    /// Waits until the machine runs, as one does that was migrated here.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn await_running(&mut self, limit: Duration) -> Result<()> {
        self.await_status(limit, |state| state["running"] == true)
    }

    fn await_status(&mut self, limit: Duration, reached: impl Fn(&Value) -> bool) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let state = self.execute("query-status", &json!({}))?;
            if reached(&state) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the machine does not run: {state}");
            }
            sleep(PAUSE);
        }
    }
}
