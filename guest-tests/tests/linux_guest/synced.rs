//! A guest that writes piece after piece to its disk, syncs each, and tells so: what it told has to be there, whatever happens.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use guest_tests::Guest;

/// Bytes of a piece.
const PIECE: u64 = 64 << 10;

/// A stretch of vda in pieces.
#[derive(Clone, Copy)]
pub(crate) struct Pieces {
    /// Where the first one begins, in bytes.
    pub(crate) start: u64,
    /// There are so many.
    pub(crate) count: u64,
    /// Nobody else's: it is how what the guest tells is known again, too.
    pub(crate) seed: u64,
}

impl Pieces {
    /// The pieces of `length` bytes from `start` on.
    pub(crate) fn of(start: u64, length: u64, seed: u64) -> Self {
        let count = length / PIECE;
        Self { start, count, seed }
    }

    /// A shell function: `piece write|verify NUMBER`.
    fn function(self) -> String {
        let Self { start, seed, .. } = self;
        format!(
            "piece() {{ seeded-data $1 /dev/vda $(({start} + ($2 - 1) * {PIECE})) {PIECE} $(({seed} + $2)); }}\n"
        )
    }

    /// The guest writes and tells, beside a job of the shell, and is not waited for: something will come in between.
    pub(crate) fn write(self, guest: &mut Guest, beside: &str, limit: Duration) -> Result<()> {
        let Self { count, seed, .. } = self;
        let function = self.function();
        let _never_answered = guest.start(
            &format!(
                "{function} {beside}
                 for i in $(seq {count}); do
                     piece write $i
                     echo synced {seed} $i >/dev/ttyS0
                 done"
            ),
            limit,
        )?;
        Ok(())
    }

    /// Waits until the guest has told so of `count` of them.
    ///
    /// # Errors
    /// When it has not within `limit`.
    pub(crate) fn await_told(self, guest: &Guest, count: u64, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while self.told(guest) < count {
            ensure!(Instant::now() < deadline, "the guest syncs too little");
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// So many of them are synced, as the guest told.
    pub(crate) fn told(self, guest: &Guest) -> u64 {
        let console = guest.console_tail(400);
        let told = format!("synced {} ", self.seed);
        let said = console
            .lines()
            .filter_map(|line| line.trim().strip_prefix(&told));
        said.filter_map(|number| number.parse().ok())
            .max()
            .unwrap_or(0)
    }

    /// The guest compares the first `count` of them with what it wrote.
    pub(crate) fn verify(self, guest: &mut Guest, count: u64) -> Result<String> {
        let function = self.function();
        guest.sh(&format!(
            "{function} for i in $(seq {count}); do piece verify $i; done"
        ))?;
        Ok(format!("{count} of {} KiB", PIECE >> 10))
    }
}
