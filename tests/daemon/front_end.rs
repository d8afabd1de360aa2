//! A VMM with a driver in its guest: `vhost`'s front-end, rings in shared memory, and requests.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::memory::Memory;
use crate::ring::{Buffer, RING_BYTES, Ring, into, out};

/// Request types of a virtio block device.
pub(crate) mod kind {
    pub(crate) const READ: u32 = 0;
    pub(crate) const WRITE: u32 = 1;
    pub(crate) const FLUSH: u32 = 4;
    pub(crate) const GET_ID: u32 = 8;
    pub(crate) const DISCARD: u32 = 11;
    pub(crate) const WRITE_ZEROES: u32 = 13;
}

pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
pub(crate) const UNSUPP: u8 = 2;
/// What a status byte is before the device writes it.
pub(crate) const UNANSWERED: u8 = 0xaa;

/// Feature bits of virtio and of its block device.
pub(crate) mod feature {
    pub(crate) const RO: u64 = 1 << 5;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
}

/// Bytes of a sector.
pub(crate) const SECTOR: u64 = 512;

/// Guest memory from here on is for data; below are rings, then headers and status bytes.
pub(crate) const DATA: u64 = 8 << 20;
const REQUESTS: u64 = 4 << 20;
/// An indirect table, behind the requests of 63 rings.
const TABLE: u64 = DATA - RING_BYTES;
/// Bytes for the header and the status of one request.
const REQUEST: u64 = 64;

/// How a front-end sets a device up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) rings: usize,
    /// Entries of each ring.
    pub(crate) size: u16,
    /// Entries that the region of requests in flight is asked for, where that is another number.
    pub(crate) announced: Option<u16>,
    /// Features that are on offer and not accepted.
    pub(crate) without: u64,
    /// Enable the rings.
    pub(crate) enable: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            rings: 1,
            size: 128,
            announced: None,
            without: 0,
            enable: true,
        }
    }
}

pub(crate) struct FrontEnd {
    pub(crate) frontend: Frontend,
    pub(crate) memory: Arc<Memory>,
    pub(crate) rings: Vec<Ring>,
    pub(crate) features: u64,
}

/// Connects and negotiates as VMMs do, up to the features of the device. No answer may take longer
/// than the tests' patience.
pub(crate) fn negotiate(socket: &Path, without: u64) -> (Frontend, u64) {
    negotiate_with(socket, without, VhostUserProtocolFeatures::empty())
}

/// The same, with more protocol features.
pub(crate) fn negotiate_with(
    socket: &Path,
    without: u64,
    more: VhostUserProtocolFeatures,
) -> (Frontend, u64) {
    let stream = UnixStream::connect(socket).expect("somebody listens");
    negotiate_over(stream, without, more)
}

fn negotiate_over(
    stream: UnixStream,
    without: u64,
    more: VhostUserProtocolFeatures,
) -> (Frontend, u64) {
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("a time-out");
    let mut frontend = Frontend::from_stream(stream, 64);
    frontend.set_owner().expect("SET_OWNER");
    let features = frontend.get_features().expect("GET_FEATURES") & !without;
    let protocol = frontend
        .get_protocol_features()
        .expect("GET_PROTOCOL_FEATURES");
    let wanted = VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | more;
    frontend
        .set_protocol_features(protocol & wanted)
        .expect("SET_PROTOCOL_FEATURES");
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    frontend.set_features(features).expect("SET_FEATURES");
    (frontend, features)
}

impl FrontEnd {
    #[track_caller]
    pub(crate) fn connect(socket: &Path) -> Self {
        Self::connect_with(socket, Setup::default())
    }

    #[track_caller]
    pub(crate) fn connect_with(socket: &Path, setup: Setup) -> Self {
        let stream = UnixStream::connect(socket).expect("somebody listens");
        Self::over(stream, setup)
    }

    /// On a socket that is connected already.
    #[track_caller]
    pub(crate) fn over(stream: UnixStream, setup: Setup) -> Self {
        let (mut frontend, features) =
            negotiate_over(stream, setup.without, VhostUserProtocolFeatures::empty());
        frontend.get_queue_num().expect("GET_QUEUE_NUM");
        let memory = Memory::new();
        frontend
            .set_mem_table(&memory.regions())
            .expect("SET_MEM_TABLE");
        let event_idx = features & feature::EVENT_IDX != 0;
        let ring = |index| {
            let base = RING_BYTES * u64::try_from(index).expect("a small number");
            Ring::new(Arc::clone(&memory), base, setup.size, event_idx)
        };
        let rings = (0..setup.rings).map(ring).collect();
        let mut front_end = Self {
            frontend,
            memory,
            rings,
            features,
        };
        for index in 0..setup.rings {
            front_end.start(index, 0);
            if setup.enable {
                front_end.enable(index, true);
            }
        }
        front_end
    }

    /// Says all about a ring that it needs to run once it is enabled.
    #[track_caller]
    pub(crate) fn start(&self, index: usize, base: u16) {
        let Self {
            frontend, rings, ..
        } = self;
        let ring = &rings[index];
        frontend
            .set_vring_num(index, ring.size())
            .expect("SET_VRING_NUM");
        frontend
            .set_vring_base(index, base)
            .expect("SET_VRING_BASE");
        frontend
            .set_vring_addr(index, &ring.config())
            .expect("SET_VRING_ADDR");
        frontend
            .set_vring_call(index, &ring.call)
            .expect("SET_VRING_CALL");
        frontend
            .set_vring_kick(index, &ring.kick)
            .expect("SET_VRING_KICK");
    }

    #[track_caller]
    pub(crate) fn enable(&mut self, index: usize, on: bool) {
        self.frontend
            .set_vring_enable(index, on)
            .expect("SET_VRING_ENABLE");
    }

    fn header_addr(ring: usize, slot: usize) -> u64 {
        let at = |number: usize| u64::try_from(number).expect("a small number");
        REQUESTS + RING_BYTES * at(ring) + REQUEST * at(slot)
    }

    fn status_addr(ring: usize, slot: usize) -> u64 {
        Self::header_addr(ring, slot) + 32
    }

    /// Writes the header of a request and forgets its last status; gives the two buffers.
    pub(crate) fn frame(
        &self,
        ring: usize,
        slot: usize,
        kind: u32,
        sector: u64,
    ) -> (Buffer, Buffer) {
        let (header, status) = (Self::header_addr(ring, slot), Self::status_addr(ring, slot));
        self.memory.write(header, &kind.to_le_bytes());
        self.memory.write(header + 4, &[0; 4]);
        self.memory.write(header + 8, &sector.to_le_bytes());
        self.memory.write(status, &[UNANSWERED]);
        (out(header, 16), into(status, 1))
    }

    /// Adds a request as one descriptor for the header, those of `data`, one for the status.
    #[track_caller]
    pub(crate) fn add(
        &mut self,
        ring: usize,
        slot: usize,
        kind: u32,
        sector: u64,
        data: &[Buffer],
    ) {
        let (header, status) = self.frame(ring, slot, kind, sector);
        self.rings[ring].add(&[&[header], data, &[status]].concat());
    }

    /// The status of a request, [`UNANSWERED`] while it has none.
    pub(crate) fn status(&self, ring: usize, slot: usize) -> u8 {
        self.memory.byte(Self::status_addr(ring, slot))
    }

    /// Carries out one request on an idle ring and gives its status.
    #[track_caller]
    pub(crate) fn run(&mut self, ring: usize, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
        self.add(ring, 0, kind, sector, data);
        self.rings[ring].submit();
        self.rings[ring].wait(1);
        self.status(ring, 0)
    }

    /// As [`Self::run`] on ring 0, if `indirect` through an indirect table.
    #[track_caller]
    pub(crate) fn run_in(&mut self, indirect: bool, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
        if !indirect {
            return self.run(0, kind, sector, data);
        }
        let (header, status) = self.frame(0, 0, kind, sector);
        let chain = [&[header], data, &[status]].concat();
        self.rings[0].add_indirect(TABLE, &chain);
        self.rings[0].submit();
        self.rings[0].wait(1);
        self.status(0, 0)
    }

    #[track_caller]
    pub(crate) fn write(&mut self, ring: usize, sector: u64, bytes: &[u8]) -> u8 {
        self.memory.write(DATA, bytes);
        self.run(ring, kind::WRITE, sector, &[out(DATA, length(bytes.len()))])
    }

    /// The status, and what was read.
    #[track_caller]
    pub(crate) fn read(&mut self, ring: usize, sector: u64, len: usize) -> (u8, Vec<u8>) {
        self.memory.write(DATA, &vec![0x5a; len]);
        let status = self.run(ring, kind::READ, sector, &[into(DATA, length(len))]);
        (status, self.memory.read(DATA, len))
    }

    #[track_caller]
    pub(crate) fn flush(&mut self, ring: usize) -> u8 {
        self.run(ring, kind::FLUSH, 0, &[])
    }

    /// A discard or write-zeroes of one range.
    #[track_caller]
    pub(crate) fn range(&mut self, kind: u32, sector: u64, count: u32, flags: u32) -> u8 {
        let mut range = sector.to_le_bytes().to_vec();
        range.extend(count.to_le_bytes());
        range.extend(flags.to_le_bytes());
        self.memory.write(DATA, &range);
        self.run(0, kind, 0, &[out(DATA, 16)])
    }

    /// Writes a byte of the configuration space.
    #[track_caller]
    pub(crate) fn set_config(&mut self, offset: u32, value: u8) -> bool {
        let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
        self.frontend.set_config(offset, flags, &[value]).is_ok()
    }
}

fn length(len: usize) -> u32 {
    u32::try_from(len).expect("below 4 GiB")
}
