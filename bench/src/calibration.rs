//! What the machine itself can do at the moment: work that never changes, so that what changes is the machine.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use anyhow::Result;

const STEPS: u64 = 100_000_000;
const ROUND_TRIPS: u32 = 10_000;

/// One calibration.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(crate) struct Calibration {
    /// Milliseconds for a fixed chain of multiplications on one CPU.
    pub(crate) cpu_ms: f64,
    /// Microseconds for a byte to another thread and back, over a pair of sockets.
    pub(crate) ping_pong_us: f64,
}

/// Calibrates once.
///
/// # Errors
/// The system has no sockets or threads left.
pub(crate) fn calibrate() -> Result<Calibration> {
    let start = Instant::now();
    let mut x = 1_u64;
    for step in 0..STEPS {
        x = std::hint::black_box(x.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(step));
    }
    let cpu_ms = start.elapsed().as_secs_f64() * 1e3;

    let (mut here, mut there) = UnixStream::pair()?;
    let echo = std::thread::spawn(move || -> io::Result<()> {
        let mut byte = [0];
        while there.read(&mut byte)? == 1 {
            there.write_all(&byte)?;
        }
        Ok(())
    });
    let start = Instant::now();
    let mut byte = [0];
    for _ in 0..ROUND_TRIPS {
        here.write_all(&byte)?;
        here.read_exact(&mut byte)?;
    }
    let ping_pong_us = start.elapsed().as_secs_f64() * 1e6 / f64::from(ROUND_TRIPS);
    drop(here);
    // It has ended: its socket is closed.
    let _ = echo.join();
    Ok(Calibration {
        cpu_ms,
        ping_pong_us,
    })
}
