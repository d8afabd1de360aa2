//! Once warm, a command allocates nothing, in either role, over each transport.
//!
//! A binary of its own, since it counts what the allocator is asked for.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]
#![expect(unsafe_code, reason = "an allocator, and segments over test memory")]

mod counting;
mod ends;
mod machine;

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memdesc::{MemSink, MemSource, Segment};
use nvmf::backend::{Backend, FileBackend, RamBackend};
use nvmf::spec::Sqe;
use nvmf::transport::{Ready, Transfer};

use ends::{Ends, Fabric};

/// Commands that find every pool at the size that it needs.
const WARM_UP: usize = 1000;
/// Commands of which none may allocate, small ones and large ones.
const COUNTED: usize = 10_000;
const COUNTED_LARGE: usize = 2000;
/// Entries of the queues, one more than the commands outstanding.
const QUEUE_SIZE: u16 = 33;
const BLOCK: usize = 512;
const DISK: u64 = 16 << 20;
const SMALL: usize = 4096;
const LARGE: usize = 128 * 1024;

fn ready() -> Ready {
    Ready {
        readable: true,
        writable: true,
    }
}

/// A guest's memory: room for every command that is outstanding, and a segment list for each.
struct Memory {
    base: NonNull<u8>,
    len: usize,
    lists: Vec<(usize, Vec<Segment>)>,
}

impl Memory {
    /// For `depth` commands of `len` bytes. Never freed: a test has few of them.
    fn new(depth: usize, len: usize) -> Self {
        let bytes: &'static mut [u8] = vec![0x5a; depth * len].leak();
        Self {
            base: NonNull::from(bytes).cast(),
            len,
            lists: (0..depth).map(|at| (at, Vec::with_capacity(1))).collect(),
        }
    }

    /// A description of unused memory, and its number.
    fn take(&mut self) -> Option<(usize, Vec<Segment>)> {
        let (index, mut list) = self.lists.pop()?;
        // SAFETY: leaked memory that nothing but memdescs reach; this part of it is in the list of
        // what is unused once at most.
        list.push(unsafe { Segment::new(self.base.add(index * self.len), self.len) });
        Some((index, list))
    }

    fn give_back(&mut self, index: u64, transfer: Transfer) {
        let (list, _) = match transfer {
            Transfer::In(sink) => sink.into_parts(),
            Transfer::Out(source) => source.into_parts(),
            Transfer::None => panic!("the memory did not come back"),
        };
        self.lists.push((index as usize, list));
    }
}

/// Runs `count` commands, as many at a time as there is memory for, `turn` driving both ends.
fn run(ends: &mut Ends, memory: &mut Memory, writing: bool, count: usize) {
    let blocks = (memory.len / BLOCK) as u32;
    let deadline = Instant::now() + Duration::from_secs(120);
    let (mut begun, mut ended) = (0, 0);
    while ended < count {
        while begun < count && ends.host().room() > 0 {
            let Some((index, list)) = memory.take() else {
                break;
            };
            let lba = begun as u64 * u64::from(blocks) % (DISK / BLOCK as u64);
            let (sqe, transfer) = if writing {
                let source = MemSource::from_segments(list);
                (Sqe::write(1, lba, blocks, false), Transfer::Out(source))
            } else {
                let sink = MemSink::from_segments(list);
                (Sqe::read(1, lba, blocks), Transfer::In(sink))
            };
            ends.host().submit(sqe, transfer, index as u64).unwrap();
            begun += 1;
        }
        ends.turn();
        while let Some(done) = ends.host().completion() {
            assert!(done.cqe.status().is_success(), "{}", done.cqe.status());
            assert_eq!(done.transferred as usize, memory.len);
            memory.give_back(done.token, done.transfer);
            ended += 1;
        }
        assert!(
            Instant::now() < deadline,
            "{ended} of {count} in two minutes"
        );
        assert_eq!(ends.host().ending(), None);
    }
}

fn nothing_allocates(fabric: Fabric, backend: impl Backend + 'static) {
    let mut ends = Ends::new(fabric, Arc::new(backend), QUEUE_SIZE);
    // As much as a lane keeps staged between bursts, at most: here everything that is outstanding
    // ends before anything else begins, which a guest that keeps its queue full does not do.
    for (len, depth, count) in [
        (SMALL, 1, COUNTED),
        (SMALL, 32, COUNTED),
        (LARGE, 1, COUNTED_LARGE),
        (LARGE, 8, COUNTED_LARGE),
    ] {
        let mut memory = Memory::new(depth, len);
        for writing in [true, false] {
            run(&mut ends, &mut memory, writing, WARM_UP);
            let what = format!("{fabric:?}, {len} bytes, depth {depth}, writing: {writing}");
            counting::none(&what, || run(&mut ends, &mut memory, writing, count));
        }
    }
    ends.end();
}

fn ram() -> RamBackend {
    RamBackend::new(DISK, BLOCK as u32).unwrap()
}

/// A file of the disk's size, gone when it is closed.
fn file() -> FileBackend {
    let name = format!("nvmf-steady-{}-{:?}", std::process::id(), Instant::now());
    let path = std::env::temp_dir().join(name.replace([' ', '{', '}', ':'], ""));
    let image = std::fs::File::create(&path).unwrap();
    image.set_len(DISK).unwrap();
    let backend = FileBackend::open(&path, BLOCK as u32, false).unwrap();
    std::fs::remove_file(path).unwrap();
    backend
}

#[test]
fn over_tcp_to_memory() {
    nothing_allocates(Fabric::tcp(false, false), ram());
}

#[test]
fn over_tcp_to_memory_with_header_and_data_digests() {
    nothing_allocates(Fabric::tcp(true, true), ram());
}

#[test]
fn over_tcp_to_a_file() {
    nothing_allocates(Fabric::tcp(false, false), file());
}

#[test]
fn over_tcp_to_a_file_with_header_and_data_digests() {
    nothing_allocates(Fabric::tcp(true, true), file());
}

#[test]
fn over_loopback_to_memory_with_ends_apart() {
    nothing_allocates(Fabric::Apart, ram());
}

#[test]
fn over_loopback_to_a_file_with_ends_apart() {
    nothing_allocates(Fabric::Apart, file());
}

#[test]
fn over_coupled_loopback_to_memory() {
    nothing_allocates(Fabric::Coupled, ram());
}

#[test]
fn over_coupled_loopback_to_a_file() {
    nothing_allocates(Fabric::Coupled, file());
}
