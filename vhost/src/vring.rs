//! What a front-end says about one ring: addresses, size, position, descriptors to kick and call.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};

/// Largest ring that virtio allows.
pub(crate) const MAX_RING_SIZE: u32 = 32768;

/// Guest physical addresses of the parts of a split ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RingAddresses {
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// Whether and how the front-end told a ring to start.
#[derive(Debug, Default, Clone)]
pub(crate) enum Kick {
    /// Not yet, or not since the ring was stopped.
    #[default]
    Stopped,
    /// Started, with no descriptor that would say when to look.
    Silent,
    /// Started, with a descriptor that becomes readable.
    Descriptor(Arc<File>),
}

impl Kick {
    /// The descriptor to wait on, if there is one.
    pub(crate) fn descriptor(&self) -> Option<Arc<File>> {
        match self {
            Self::Descriptor(file) => Some(Arc::clone(file)),
            Self::Stopped | Self::Silent => None,
        }
    }
}

/// The state of one ring, as the session knows it.
#[derive(Debug, Default)]
pub(crate) struct Vring {
    /// Entries, 0 until set.
    pub(crate) size: u16,
    pub(crate) addresses: Option<RingAddresses>,
    /// The address by which writes to the used ring are logged, when they are.
    pub(crate) log_addr: Option<u64>,
    /// Available index to start from; stale while the ring runs.
    pub(crate) base: u16,
    pub(crate) kick: Kick,
    pub(crate) call: Option<Signal>,
    pub(crate) err: Option<Signal>,
    pub(crate) enabled: bool,
    /// A worker has its queue.
    pub(crate) running: bool,
}

impl Vring {
    /// Where the ring is, when the front-end has said everything that it needs to run.
    pub(crate) fn runs_at(&self) -> Option<RingAddresses> {
        let started = !matches!(self.kick, Kick::Stopped);
        let may_run = self.enabled && self.size != 0 && started;
        self.addresses.filter(|_| may_run)
    }
}

/// An event descriptor of the front-end's that we write to.
#[derive(Debug, Clone)]
pub struct Signal {
    file: Arc<File>,
    /// The descriptor lacks O_NONBLOCK. The flag is not ours to set, as the front-end shares it.
    may_block: bool,
}

impl Signal {
    /// Takes a descriptor that the front-end sent.
    pub(crate) fn new(file: File) -> Self {
        let flags = fcntl_getfl(&file).unwrap_or(OFlags::empty());
        Self {
            file: Arc::new(file),
            may_block: !flags.contains(OFlags::NONBLOCK),
        }
    }

    /// The descriptor.
    pub(crate) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// Raises the event. When nothing can be written the event is already pending, or the
    /// front-end no longer listens; neither is an error of ours.
    pub(crate) fn raise(&self) {
        if self.may_block && !self.is_writable() {
            return;
        }
        let _ = (&*self.file).write(&1_u64.to_ne_bytes());
    }

    fn is_writable(&self) -> bool {
        let mut descriptors = [PollFd::new(&*self.file, PollFlags::OUT)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(poll(&mut descriptors, Some(&now)), Ok(1..))
            && descriptors[0].revents().contains(PollFlags::OUT)
    }
}
