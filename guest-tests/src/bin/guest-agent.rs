//! The guest's first process in tests: runs the scripts that the harness sends over a virtio-serial port.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use guest_tests::{PORT_NAME, Reply, Request};

/// So much of a script's output is sent; the end is what matters.
const OUTPUT_LIMIT: usize = 64 * 1024;

fn main() -> Result<()> {
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open(port_device()?)?;
    let to_harness = Arc::new(Mutex::new(port.try_clone()?));
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned();
    send(&to_harness, &Reply::Hello { boot_id })?;

    let mut reader = BufReader::new(port);
    let mut line = String::new();
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            // Nobody at the other end, for now.
            thread::sleep(Duration::from_millis(100));
            continue;
        }
        let Request::Run {
            id,
            script,
            seconds,
        } = serde_json::from_str(&line).context("request")?;
        let to_harness = Arc::clone(&to_harness);
        thread::spawn(move || {
            let reply = run(id, &script, seconds);
            if let Err(error) = send(&to_harness, &reply) {
                eprintln!("guest-agent: {error:#}");
            }
        });
    }
}

/// The port's device; it may appear a moment after the agent starts.
fn port_device() -> Result<PathBuf> {
    for _ in 0..100 {
        for entry in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
        {
            let path = entry?.path();
            let name = fs::read_to_string(path.join("name")).unwrap_or_default();
            if name.trim() == PORT_NAME
                && let Some(device) = path.file_name()
            {
                return Ok(PathBuf::from("/dev").join(device));
            }
        }
        thread::sleep(Duration::from_millis(100));
    }
    anyhow::bail!("no virtio-serial port is called {PORT_NAME}")
}

/// A script may end its own machine, so this is not the place for a clean-up.
fn run(id: u64, script: &str, seconds: u64) -> Reply {
    let result = Command::new("timeout")
        .args(["-k", "5", &seconds.to_string(), "bash", "-c", script])
        .env("PATH", "/run:/usr/sbin:/usr/bin")
        .env("HOME", "/tmp")
        .env("LANG", "C.UTF-8")
        .current_dir("/tmp")
        .output();
    match result {
        Ok(output) => Reply::Done {
            id,
            // 128 + signal, as a shell has it: a killed script is none that succeeded.
            status: output.status.code().unwrap_or(137),
            stdout: end_of(&output.stdout),
            stderr: end_of(&output.stderr),
        },
        Err(error) => Reply::Done {
            id,
            status: 127,
            stdout: String::new(),
            stderr: error.to_string(),
        },
    }
}

fn end_of(output: &[u8]) -> String {
    let start = output.len().saturating_sub(OUTPUT_LIMIT);
    String::from_utf8_lossy(&output[start..]).into_owned()
}

fn send(port: &Mutex<File>, reply: &Reply) -> Result<()> {
    let mut line = serde_json::to_string(reply)?;
    line.push('\n');
    let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(port.write_all(line.as_bytes())?)
}
