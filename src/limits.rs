//! Every bound of the daemon, each with its reason.

use std::ops::RangeInclusive;
use std::time::Duration;

/// Queues that a disk may offer. A VMM that has more vCPUs than the disk has queues refuses to
/// start, so the default is high; an unused queue costs nothing.
pub(crate) const NUM_QUEUES: RangeInclusive<i64> = 1..=256;
/// See [`NUM_QUEUES`].
pub(crate) const DEFAULT_NUM_QUEUES: u16 = 64;

/// I/O queue pairs of one association: a worker has one each, and more workers than this help
/// nobody.
pub(crate) const NR_IO_QUEUES: RangeInclusive<i64> = 1..=256;
/// See [`NR_IO_QUEUES`].
pub(crate) const MAX_NR_IO_QUEUES: u16 = 256;

/// I/O queue pairs that a host of the embedded target may have: more than machines usually have processors, and each costs
/// little until it is connected.
pub(crate) const DEFAULT_EXPORT_IO_QUEUES: u16 = 128;

/// Cross-Controller Resets going on at one controller of `export`: a host has a few paths, and loses one or all.
pub(crate) const DEFAULT_CCRL: u8 = 4;

/// Entries of an I/O submission queue. A queue of one entry is not allowed; above this only memory
/// grows.
pub(crate) const QUEUE_SIZE: RangeInclusive<i64> = 2..=4096;
/// As Linux asks.
pub(crate) const DEFAULT_QUEUE_SIZE: u16 = 128;

/// The same for a local disk: as many as a lane has requests in flight.
pub(crate) const LOCAL_QUEUE_SIZE: u16 = 1024;

/// Nanoseconds of looking for work before a sleep: longer than a millisecond is a polling core.
pub(crate) const POLL_MAX_NS: RangeInclusive<i64> = 0..=1_000_000;
/// The same for a local disk, which answers sooner than its guest wakes up: what a sleep and a wake-up
/// take, so looking costs no more than sleeping.
pub(crate) const DEFAULT_LOCAL_POLL_MAX_NS: u32 = 50_000;

/// Requests in a second, where they are limited: more is no limit.
pub(crate) const IOPS: RangeInclusive<u64> = 1..=1_000_000_000;
/// Bytes in a second, where they are limited: with less, one page takes longer than a second, and a guest
/// takes its disk for hung.
pub(crate) const BANDWIDTH_MIN: u64 = 4096;
/// Bursts in a second, unless the user says how large one is: as in QEMU, where a limit without a burst
/// allows a tenth of a second's, so that what comes unevenly gets its rate.
pub(crate) const BURSTS_PER_SECOND: u64 = 10;

/// Seconds after which a silent association is lost; 0 turns keep-alive off.
pub(crate) const KEEP_ALIVE_SECONDS: RangeInclusive<i64> = 0..=3600;
/// Short, because a write whose fate is unknown holds later writes back for a multiple of it.
pub(crate) const DEFAULT_KEEP_ALIVE_SECONDS: u16 = 5;

/// Seconds that connecting may take.
pub(crate) const CONNECT_SECONDS: RangeInclusive<i64> = 1..=3600;
/// See [`CONNECT_SECONDS`]: short, because the next attempt may find another address.
pub(crate) const DEFAULT_CONNECT_SECONDS: u16 = 5;

/// Seconds that a command may be outstanding; 0 is for ever.
pub(crate) const IO_SECONDS: RangeInclusive<i64> = 0..=86_400;
/// As Linux has.
pub(crate) const DEFAULT_IO_SECONDS: u32 = 30;

/// Seconds between two attempts to get a lost controller back, at most.
pub(crate) const RECONNECT_DELAY_SECONDS: RangeInclusive<i64> = 1..=3600;
/// Short: a guest waits, and an attempt costs little.
pub(crate) const DEFAULT_RECONNECT_DELAY_SECONDS: u16 = 2;

/// Seconds from the loss of a controller until something is given up; -1 is never.
pub(crate) const LOSS_SECONDS: RangeInclusive<i64> = -1..=i32::MAX as i64;

/// Seconds that a ring may take to stop while the controller is lost.
pub(crate) const DRAIN_SECONDS: RangeInclusive<i64> = 0..=3600;
/// Short enough that a VMM that stops its guest is not taken for hung; longer than a target takes to restart, and
/// than a fence is in force with the default keep-alive time-out.
pub(crate) const DEFAULT_DRAIN_SECONDS: u16 = 20;

/// How long the requests of a disk may take that is handed over: its guest waits, and a successor can come again.
pub(crate) const HANDOVER_DRAIN: Duration = Duration::from_secs(2);
/// How long anything else of a hand-over may take, on either side.
pub(crate) const HANDOVER_STEP: Duration = Duration::from_secs(5);

/// Bytes of the serial that a guest can read (virtio 1.3, "GET_ID").
pub(crate) const SERIAL_LEN: usize = 20;

/// Longest path of a Unix socket on Linux: `sun_path` less its terminating zero.
pub(crate) const SOCKET_PATH_MAX: usize = 107;

/// VMMs that wait to be accepted by a disk, which serves one at a time.
pub(crate) const SOCKET_BACKLOG: i32 = 128;

/// Disks of one process: more than VMs of one machine have, and few enough to be attached all at once.
pub(crate) const MAX_DISKS: usize = 1024;

/// Data-plane threads of one process.
pub(crate) const WORKERS: RangeInclusive<u64> = 1..=1024;

/// Namespaces of one exported subsystem: the list of active namespaces fits one Identify page.
pub(crate) const MAX_NAMESPACES: usize = 1024;

/// Most segments of a guest's request: a queue of 128 entries, the usual size, less the header and
/// the status, so that a driver without indirect descriptors can use it too.
pub(crate) const SEG_MAX: u32 = 126;

/// Sectors in one range of a discard, 1 GiB: a controller may take its time for each range, and a
/// guest that discards a whole disk must leave room for others.
pub(crate) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Ranges in one discard; all of them become one Dataset Management command.
pub(crate) const MAX_DISCARD_RANGES: u32 = 16;

/// Sectors in one write-zeroes, 32 MiB: one Write Zeroes command at either block size, and a
/// bounded number of writes where they stand in for it.
pub(crate) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 16;
/// Ranges in one write-zeroes. Drivers send one.
pub(crate) const MAX_WRITE_ZEROES_RANGES: u32 = 1;

/// Bytes of one write of zeroes where the controller has no Write Zeroes: bounds the list of
/// segments that describe them.
pub(crate) const ZERO_WRITE_BYTES: u64 = 1 << 20;

/// Blocks that one Read, Write or Write Zeroes can name (NVM Command Set, NLB).
pub(crate) const MAX_COMMAND_BLOCKS: u64 = 1 << 16;

/// Guest requests in flight on one lane: what a slot number in a token can name.
pub(crate) const MAX_SLOTS: usize = 1 << 16;

/// Guest requests in flight on one lane, unless its rings are deeper: what a queue pair of the
/// default size carries several times over.
pub(crate) const LANE_SLOTS: usize = 1024;

/// Memory of a disk with `--emulate-512` for what surrounds requests that are not aligned.
pub(crate) const EMULATION_BYTES: usize = 1 << 20;
/// Such requests at work at once, whatever the size of a block is; more wait.
pub(crate) const EMULATION_REQUESTS: RangeInclusive<usize> = 4..=128;

/// Paths of one disk: more than there are controllers of any subsystem that a host connects to, and few enough to
/// look at each for every command.
pub(crate) const MAX_PATHS: usize = 16;

/// Attempts that a request has after the first, where the controller says that one may succeed. As Linux has.
pub(crate) const MAX_RETRIES: u8 = 5;

/// Messages in a lane's mailbox: a session waits for each answer, so there are never many.
pub(crate) const MAILBOX: usize = 16;

/// Lanes handed to a worker that it has not begun to drive.
pub(crate) const NEW_LANES: usize = 64;

const _: () = {
    assert!(LANE_SLOTS <= MAX_SLOTS);
    assert!(LOCAL_QUEUE_SIZE as usize >= LANE_SLOTS);
    assert!(DEFAULT_LOCAL_POLL_MAX_NS as i64 <= *POLL_MAX_NS.end());
    assert!(DEFAULT_NUM_QUEUES as i64 <= *NUM_QUEUES.end());
    assert!(MAX_NR_IO_QUEUES as i64 == *NR_IO_QUEUES.end());
    assert!(DEFAULT_QUEUE_SIZE as i64 <= *QUEUE_SIZE.end());
    assert!(DEFAULT_KEEP_ALIVE_SECONDS as i64 <= *KEEP_ALIVE_SECONDS.end());
    assert!(DEFAULT_DRAIN_SECONDS > 3 * DEFAULT_KEEP_ALIVE_SECONDS);
    assert!(MAX_WRITE_ZEROES_SECTORS as u64 <= MAX_COMMAND_BLOCKS);
    assert!(MAX_NAMESPACES * 4 <= 4096);
};
