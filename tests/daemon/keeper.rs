//! A VMM that keeps guest memory, rings and the region of requests in flight while daemons come and go.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::front_end::{FrontEnd, Setup, feature, negotiate_with};
use crate::memory::Memory;
use crate::ring::{RING_BYTES, Ring};

pub(crate) const KEEP: VhostUserProtocolFeatures = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
/// GET_VRING_BASE leaves requests in flight.
pub(crate) const SUSPEND: VhostUserProtocolFeatures = VhostUserProtocolFeatures::INFLIGHT_SHMFD
    .union(VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT);

/// See the module.
pub(crate) struct Keeper {
    pub(crate) guest: FrontEnd,
    setup: Setup,
    protocol: VhostUserProtocolFeatures,
    shape: VhostUserInflight,
    file: File,
}

impl Keeper {
    /// With a new region.
    #[track_caller]
    pub(crate) fn connect(
        socket: &Path,
        setup: Setup,
        protocol: VhostUserProtocolFeatures,
    ) -> Self {
        let (mut frontend, features) = negotiate_with(socket, setup.without, protocol);
        let (shape, file) = new_region(&mut frontend, setup);
        let memory = Memory::new();
        let event_idx = features & feature::EVENT_IDX != 0;
        let ring = |index| {
            let base = RING_BYTES * u64::try_from(index).expect("a small number");
            Ring::new(Arc::clone(&memory), base, setup.size, event_idx)
        };
        let rings = (0..setup.rings).map(ring).collect();
        let guest = FrontEnd {
            frontend,
            memory,
            rings,
            features,
        };
        let mut keeper = Self {
            guest,
            setup,
            protocol,
            shape,
            file,
        };
        keeper.set_up();
        keeper
    }

    /// Leaves the daemon.
    pub(crate) fn leave(&mut self) {
        let (nobody, _) = UnixStream::pair().expect("two sockets");
        self.guest.frontend = Frontend::from_stream(nobody, 1);
    }

    /// Goes on with another daemon, or the same.
    #[track_caller]
    pub(crate) fn reconnect(&mut self, socket: &Path) {
        self.leave();
        let (frontend, features) = negotiate_with(socket, self.setup.without, self.protocol);
        assert_eq!(features, self.guest.features, "another offer");
        self.guest.frontend = frontend;
        self.set_up();
    }

    /// The same, with something between the start of the first ring and that of the others.
    #[track_caller]
    pub(crate) fn reconnect_slowly(&mut self, socket: &Path, between: impl FnOnce(&mut FrontEnd)) {
        self.leave();
        let (frontend, features) = negotiate_with(socket, self.setup.without, self.protocol);
        assert_eq!(features, self.guest.features, "another offer");
        self.guest.frontend = frontend;
        self.hand_over();
        self.run(0..1);
        between(&mut self.guest);
        self.run(1..self.setup.rings);
    }

    /// Gets another region, as QEMU does when its machine is reset.
    #[track_caller]
    pub(crate) fn renew(&mut self) {
        (self.shape, self.file) = new_region(&mut self.guest.frontend, self.setup);
    }

    /// Where daemons keep what the next needs: behind the parts of the rings, which are aligned to 64 bytes.
    fn tail_at(&self) -> u64 {
        let part = (16 + 16 * u64::from(self.shape.queue_size)).next_multiple_of(64);
        self.shape.mmap_offset + u64::from(self.shape.num_queues) * part
    }

    /// Fills that with nonsense.
    #[track_caller]
    pub(crate) fn spoil_tail(&self) {
        let bytes = vec![0x5a; (64 << 10) + 64];
        self.file
            .write_all_at(&bytes, self.tail_at())
            .expect("written");
    }

    /// Has what daemons keep there come from another run of the machine, or another machine, as after a migration. Knows their
    /// layout: numbers of 8 bytes, of which one is a checksum and two name the run.
    #[track_caller]
    pub(crate) fn change_machine(&self) {
        const FENCES: usize = 4;
        let half: u64 = 32 << 10;
        let start = self.tail_at();
        for at in [start, start + half] {
            let mut bytes = vec![0; 32 << 10];
            self.file.read_exact_at(&mut bytes, at).expect("read");
            let number = |index: usize| {
                let bytes = bytes[8 * index..8 * index + 8].try_into();
                u64::from_le_bytes(bytes.expect("8 bytes"))
            };
            assert_eq!(number(0), u64::from_le_bytes(*b"vnvmfrec"), "no record");
            let len = 8 * (13 + 5 * usize::try_from(number(FENCES)).expect("a few"));
            bytes[72] ^= 1;
            bytes[24..32].fill(0);
            let sum = u64::from(crc32c::crc32c(&bytes[..len]));
            bytes[24..32].copy_from_slice(&sum.to_le_bytes());
            self.file.write_all_at(&bytes, at).expect("written");
        }
    }

    #[track_caller]
    fn set_up(&mut self) {
        self.hand_over();
        self.run(0..self.setup.rings);
    }

    /// Gives it the region and the memory.
    #[track_caller]
    fn hand_over(&mut self) {
        let Self {
            guest, shape, file, ..
        } = self;
        guest
            .frontend
            .set_inflight_fd(shape, file.as_raw_fd())
            .expect("SET_INFLIGHT_FD");
        guest
            .frontend
            .set_mem_table(&guest.memory.regions())
            .expect("SET_MEM_TABLE");
    }

    #[track_caller]
    fn run(&mut self, rings: std::ops::Range<usize>) {
        let guest = &mut self.guest;
        for index in rings {
            // What cloud-hypervisor says when it comes back: wrong, if anything is in flight.
            let base = guest.rings[index].available();
            guest.start(index, base);
            guest.enable(index, true);
        }
    }
}

fn new_region(frontend: &mut Frontend, setup: Setup) -> (VhostUserInflight, File) {
    let asked = VhostUserInflight {
        num_queues: u16::try_from(setup.rings).expect("a few"),
        queue_size: setup.announced.unwrap_or(setup.size),
        ..VhostUserInflight::default()
    };
    frontend.get_inflight_fd(&asked).expect("GET_INFLIGHT_FD")
}
