//! Handing a disk over to another process of this program, while its guest waits for some milliseconds.
//!
//! Beside the socket of each disk there is another one, where a successor asks for it. `docs/adr/0014-hand-over.md` has
//! the steps, and what happens when either process dies at one of them.

pub(crate) mod description;
pub(crate) mod giving;
pub(crate) mod taking;
mod wire;

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, read};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use self::description::Description;

/// The form of what the two processes say to each other.
const VERSION: u32 = 1;

/// What a successor says first.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    version: u32,
    disk: Description,
}

/// What it is answered.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// The disk stays where it is.
    Refused(String),
    /// The disk, in as many messages.
    Offered(Offer),
}

/// What comes with a disk.
#[derive(Debug, Serialize, Deserialize)]
struct Offer {
    /// A front-end is connected.
    session: bool,
    /// A socket listens for front-ends.
    listens: bool,
    /// Messages of the record, without those that have rings run.
    setup: usize,
    /// Those.
    start: usize,
    /// When the rings were told to stop, by the clock of [`now`].
    paused_at: u64,
}

/// What a successor says at last.
#[derive(Debug, Serialize, Deserialize)]
struct Started {
    /// For how long no ring ran, in microseconds.
    stalled: u64,
}

/// What goes on with the disk: whoever of the two takes it, and there is only one.
#[derive(Debug)]
struct Baton(OwnedFd);

impl Baton {
    fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(eventfd(1, flags)?))
    }

    /// True for the first who asks.
    fn take(&self) -> io::Result<bool> {
        match read(&self.0, &mut [0; 8]) {
            Ok(_) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Where a successor asks for the disk that front-ends find at `path`.
pub(crate) fn path_beside(path: &Path) -> PathBuf {
    let mut beside = OsString::from(path);
    beside.push(".handover");
    beside.into()
}

/// Nanoseconds of a clock that all processes have.
pub(crate) fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

/// How long it is since then.
pub(crate) fn since(then: u64) -> Duration {
    Duration::from_nanos(now().saturating_sub(then))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_takes_the_baton() {
        let baton = Baton::new().unwrap();
        let other = Baton(baton.0.try_clone().unwrap());
        assert!(other.take().unwrap());
        assert!(!baton.take().unwrap());
        assert!(!other.take().unwrap());
    }

    #[test]
    fn the_socket_is_beside_the_disks() {
        assert_eq!(
            path_beside(Path::new("/run/a.sock")),
            Path::new("/run/a.sock.handover")
        );
    }
}
