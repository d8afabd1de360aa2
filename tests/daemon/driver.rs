//! The guest's driver as a library has it: `virtio-driver`, with memory that it shares.

#![expect(
    unsafe_code,
    reason = "virtio-driver takes the memory of a request as a raw pointer"
)]

use std::os::fd::AsRawFd;
use std::path::Path;

use virtio_driver::{
    Completion, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf,
    VirtioBlkTransport, VirtioFeatureFlags,
};
use vm_memory::Bytes;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::memory::memfd;
use crate::process::readable_within;
use crate::ring::PATIENCE;

/// A disk as virtio-driver sees it. Fields are dropped in this order: each uses the one below.
pub(crate) struct Driver {
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    transport: Box<VirtioBlkTransport>,
    memory: GuestMemoryMmap,
}

/// What to do with a piece of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    Write,
}

impl Driver {
    /// Sets up so many queues of `size` entries, and `memory` bytes for data.
    pub(crate) fn connect(socket: &Path, queues: usize, size: u16, memory: u64) -> Self {
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::all().bits();
        let path = socket.to_str().expect("UTF-8");
        let transport = VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path, features);
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport.expect("a device"));
        let len = usize::try_from(memory).expect("64 bits");
        let file = FileOffset::new(memfd(memory), 0);
        let region = (GuestAddress(0), len, Some(file));
        let memory = GuestMemoryMmap::from_ranges_with_files([region]).expect("memory");
        let region = memory.iter().next().expect("one region");
        let fd = region.file_offset().expect("a file").file().as_raw_fd();
        let address = region.as_ptr().addr();
        transport
            .map_mem_region(address, len, fd, 0)
            .expect("ADD_MEM_REG");
        let mut queues =
            VirtioBlkQueue::setup_queues(&mut *transport, queues, size).expect("queues on offer");
        for queue in &mut queues {
            queue.set_used_notif_enabled(true);
        }
        Self {
            queues,
            transport,
            memory,
        }
    }

    pub(crate) fn write_memory(&self, at: usize, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(at as u64))
            .expect("inside");
    }

    pub(crate) fn read_memory(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at as u64))
            .expect("inside");
        bytes
    }

    /// Adds a request between `offset` of the disk and `at` in the memory. False when the queue has
    /// no room for it.
    pub(crate) fn add(
        &mut self,
        queue: usize,
        direction: Direction,
        offset: u64,
        (at, len): (usize, usize),
        context: usize,
    ) -> bool {
        let region = self.memory.iter().next().expect("one region");
        assert!(at + len <= usize::try_from(region.len()).expect("64 bits"));
        let start = region.as_ptr().wrapping_add(at);
        let queue = &mut self.queues[queue];
        // SAFETY: `at + len` is inside the region, which lives longer than the queue, and no
        // reference is ever made to what is in it.
        let added = unsafe {
            match direction {
                Direction::Read => queue.read_raw(offset, start, len, context),
                Direction::Write => queue.write_raw(offset, start, len, context),
            }
        };
        match added {
            Ok(()) => true,
            Err(error) if error.to_string() == "Not enough free descriptors" => false,
            Err(error) => panic!("{error}"),
        }
    }

    pub(crate) fn flush(&mut self, queue: usize) {
        self.queues[queue]
            .flush(usize::MAX)
            .expect("room in the queue");
    }

    pub(crate) fn kick(&mut self, queue: usize) {
        if self.queues[queue].avail_notif_needed() {
            self.transport
                .get_submission_notifier(queue)
                .notify()
                .expect("a kick");
        }
    }

    /// Waits for so many requests of a queue to be answered, asleep until the device calls; every
    /// answer must be good. Gives their contexts.
    #[track_caller]
    pub(crate) fn wait(&mut self, queue: usize, count: usize) -> Vec<usize> {
        let fd = self.transport.get_completion_fd(queue);
        let mut done = Vec::new();
        while done.len() < count {
            for Completion { context, ret } in self.queues[queue].completions() {
                assert_eq!(ret, 0, "request {context} of queue {queue} failed");
                done.push(context);
            }
            if done.len() < count {
                let called = readable_within(&*fd, PATIENCE);
                assert!(
                    called,
                    "queue {queue}: {} of {count} are answered",
                    done.len()
                );
                fd.read().expect("an event");
            }
        }
        assert_eq!(done.len(), count);
        done
    }
}
