//! Where guest memory is unmapped: on a thread of its own, because that takes long for a large guest.
//!
//! Whoever drops the last reference to a generation may be a worker with requests of other guests
//! to serve. It only sends the regions here; one thread does for a process, which has one address
//! space. The thread sleeps while there is nothing to unmap, and is never joined: what is mapped
//! when the process ends is for the kernel.

use std::sync::OnceLock;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use vm_memory::GuestRegionCollection;

use crate::memory::Region;

type Regions = GuestRegionCollection<Region>;

/// Name of the thread.
const NAME: &str = "unmap";

/// `None` when the thread could not be had.
static THREAD: OnceLock<Option<Sender<Regions>>> = OnceLock::new();

/// Starts the thread, the first time. Called where memory is mapped, so that [`later`] need not.
pub(crate) fn get_ready() {
    THREAD.get_or_init(start);
}

fn start() -> Option<Sender<Regions>> {
    let (sender, receiver) = mpsc::channel();
    let builder = thread::Builder::new().name(NAME.to_owned());
    match builder.spawn(move || run(&receiver)) {
        Ok(_) => Some(sender),
        Err(error) => {
            tracing::warn!(%error, "no thread to unmap guest memory on; requests may wait for it");
            None
        }
    }
}

fn run(receiver: &Receiver<Regions>) {
    // Each is unmapped if nobody else has it.
    while let Ok(regions) = receiver.recv() {
        drop(regions);
    }
}

/// Lets go of regions without waiting for what that may take.
pub(crate) fn later(regions: Regions) {
    if let Some(Some(thread)) = THREAD.get() {
        // A send that fails drops them here.
        let _ = thread.send(regions);
    }
}

#[cfg(test)]
pub(crate) use noted::{note, thread_that_unmapped};

#[cfg(test)]
mod noted {
    use std::sync::Mutex;
    use std::thread;
    use std::time::{Duration, Instant};

    /// Length of each mapping that is gone, and the thread that unmapped it.
    static UNMAPPED: Mutex<Vec<(usize, Option<String>)>> = Mutex::new(Vec::new());

    /// Notes that a mapping of `len` bytes is about to be unmapped by this thread.
    pub(crate) fn note(len: usize) {
        let name = thread::current().name().map(str::to_owned);
        UNMAPPED.lock().expect("unpoisoned").push((len, name));
    }

    /// Name of the thread that unmapped the one mapping of `len` bytes; waits a little for it.
    pub(crate) fn thread_that_unmapped(len: usize) -> Option<String> {
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            let unmapped = UNMAPPED.lock().expect("unpoisoned");
            if let Some((_, name)) = unmapped.iter().find(|(it, _)| *it == len) {
                return name.clone();
            }
            drop(unmapped);
            thread::sleep(Duration::from_millis(1));
        }
        None
    }
}
