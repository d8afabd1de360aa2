//! Backends through their public interface: every case with every engine and block size.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]
#![expect(clippy::print_stderr, reason = "what is skipped is said aloud")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use memdesc::{MemSink, MemSource};
use nvmf::backend::{
    Backend, BackendIo, BackendOp, Done, Engine, FileBackend, OpenError, RamBackend,
};
use nvmf::spec::Status;
use nvmf::transport::Transfer;

const SIZE: u64 = 4 << 20;

/// A file that goes away with the test.
struct Image(PathBuf);

impl Image {
    fn new(size: u64) -> Self {
        Self::within(std::env::temp_dir(), size)
    }

    fn within(directory: PathBuf, size: u64) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "nvmf-backend-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = directory.join(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        Self(path)
    }

    fn open(&self, block_size: u32, read_only: bool) -> FileBackend {
        FileBackend::open(&self.0, block_size, read_only).unwrap()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The engines that this machine has.
fn engines() -> Vec<Engine> {
    let image = Image::new(4096);
    let mut probe = Lane::new(Engine::Uring);
    let result = probe.run(&image.open(512, false), BackendOp::Flush).result;
    if result.is_err() {
        eprintln!("SKIPPED for io_uring: this machine refuses it");
        return vec![Engine::Threads];
    }
    vec![Engine::Uring, Engine::Threads]
}

struct Lane {
    io: BackendIo,
    next: u32,
}

impl Lane {
    fn new(engine: Engine) -> Self {
        Self {
            io: BackendIo::new(engine),
            next: 0,
        }
    }

    fn done(&mut self) -> Done {
        loop {
            self.io.flush();
            if let Some(done) = self.io.done() {
                return done;
            }
            assert!(self.io.in_flight() > 0, "an operation was lost");
            self.io.wait();
        }
    }

    fn run(&mut self, backend: &dyn Backend, op: BackendOp) -> Done {
        self.next += 1;
        backend.submit(&mut self.io, op, self.next);
        let done = self.done();
        assert_eq!(done.token, self.next);
        assert_eq!(self.io.in_flight(), 0);
        done
    }

    fn read(&mut self, backend: &dyn Backend, offset: u64, len: usize) -> Vec<u8> {
        let sink = MemSink::from_bytes(vec![0xaa; len]);
        let done = self.run(backend, BackendOp::Read { offset, sink });
        assert_eq!(done.result, Ok(()));
        bytes(done.transfer)
    }

    fn write(&mut self, backend: &dyn Backend, offset: u64, data: &[u8], fua: bool) {
        let op = write(offset, data.to_vec(), fua);
        let done = self.run(backend, op);
        assert_eq!(done.result, Ok(()));
        assert_eq!(bytes(done.transfer), data, "the source comes back");
    }
}

fn write(offset: u64, data: Vec<u8>, fua: bool) -> BackendOp {
    let source = MemSource::from_bytes(data);
    BackendOp::Write {
        offset,
        source,
        fua,
    }
}

fn bytes(transfer: Transfer) -> Vec<u8> {
    let parts = match transfer {
        Transfer::In(sink) => sink.into_parts(),
        Transfer::Out(source) => source.into_parts(),
        Transfer::None => panic!("the data did not come back"),
    };
    parts.1.unwrap()
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Runs a case with a file by every engine, and with memory, at both block sizes.
fn everywhere(case: impl Fn(&mut Lane, &dyn Backend)) {
    for block_size in [512, 4096] {
        for engine in engines() {
            let image = Image::new(SIZE);
            case(&mut Lane::new(engine), &image.open(block_size, false));
            // A tmpfs cannot zero a range, so zeroes are written.
            let shm = PathBuf::from("/dev/shm");
            if shm.is_dir() {
                let image = Image::within(shm, SIZE);
                case(&mut Lane::new(engine), &image.open(block_size, false));
            }
        }
        let ram = RamBackend::new(SIZE, block_size).unwrap();
        case(&mut Lane::new(Engine::Auto), &ram);
    }
}

#[test]
fn what_was_written_is_read_back_and_counted() {
    everywhere(|lane, backend| {
        let block = u64::from(backend.geometry().block_size);
        assert_eq!(backend.geometry().bytes(), SIZE);
        let mut written = 0;
        for (round, blocks) in [1, 2, 7, 64, 256].into_iter().enumerate() {
            let offset = round as u64 * 300 * block % (SIZE / 2);
            let data = pattern(blocks, (blocks * block) as usize);
            lane.write(backend, offset, &data, round % 2 == 1);
            assert_eq!(lane.read(backend, offset, data.len()), data);
            written += data.len() as u64;
        }
        assert_eq!(lane.run(backend, BackendOp::Flush).result, Ok(()));
        let counts = backend.counters().read();
        assert_eq!((counts.writes, counts.fua_writes, counts.reads), (5, 2, 5));
        assert_eq!((counts.flushes, counts.errors), (1, 0));
        assert_eq!(
            (counts.read_bytes, counts.written_bytes),
            (written, written)
        );
    });
}

#[test]
fn zeroes_and_holes_read_as_zeroes_and_leave_their_neighbours_alone() {
    everywhere(|lane, backend| {
        let block = u64::from(backend.geometry().block_size);
        let data = pattern(1, 1 << 20);
        for may_unmap in [None, Some(false), Some(true)] {
            lane.write(backend, 0, &data, false);
            // Neither end on a page of the machine, where blocks are small.
            let (offset, len) = (3 * block, 130 * block);
            let op = match may_unmap {
                None => BackendOp::Deallocate { offset, len },
                Some(may_unmap) => BackendOp::WriteZeroes {
                    offset,
                    len,
                    may_unmap,
                    fua: may_unmap,
                },
            };
            assert_eq!(lane.run(backend, op).result, Ok(()));
            let mut expected = data.clone();
            expected[offset as usize..(offset + len) as usize].fill(0);
            let got = lane.read(backend, 0, data.len());
            assert!(got == expected, "{may_unmap:?}");
        }
        let counts = backend.counters().read();
        assert_eq!((counts.write_zeroes, counts.deallocates), (2, 1));
    });
}

#[test]
fn nothing_outside_is_touched_whatever_the_offset_and_length() {
    everywhere(|lane, backend| {
        let outside = Err(Status::LBA_OUT_OF_RANGE.do_not_retry());
        for offset in [SIZE, SIZE - 511, u64::MAX, u64::MAX - 511, 1 << 63] {
            let sink = MemSink::from_bytes(vec![0; 512]);
            let read = lane.run(backend, BackendOp::Read { offset, sink });
            assert_eq!(read.result, outside);
            assert_eq!(bytes(read.transfer).len(), 512, "the data comes back");
            let write = lane.run(backend, write(offset, vec![1; 512], true));
            assert_eq!(write.result, outside);
            for len in [512, u64::MAX, SIZE + 1] {
                let discard = BackendOp::Deallocate { offset, len };
                assert_eq!(lane.run(backend, discard).result, outside);
                let zeroes = BackendOp::WriteZeroes {
                    offset,
                    len,
                    may_unmap: true,
                    fua: false,
                };
                assert_eq!(lane.run(backend, zeroes).result, outside);
            }
            assert!(backend.source(offset, 512, &mut Vec::new()).is_none());
            assert!(backend.sink(offset, 512, &mut Vec::new()).is_none());
        }
    });
}

#[test]
fn a_read_only_backend_refuses_whatever_writes() {
    let protected = Err(Status::WRITE_PROTECTED.do_not_retry());
    let image = Image::new(SIZE);
    let ram = RamBackend::new(SIZE, 512).unwrap().read_only();
    let file = image.open(512, true);
    for backend in [&file as &dyn Backend, &ram] {
        assert!(backend.geometry().read_only);
        let mut lane = Lane::new(Engine::Auto);
        let written = lane.run(backend, write(0, vec![1; 512], false));
        assert_eq!(written.result, protected);
        let (offset, len) = (0, 512);
        let discard = BackendOp::Deallocate { offset, len };
        assert_eq!(lane.run(backend, discard).result, protected);
        assert!(backend.sink(0, 512, &mut Vec::new()).is_none());
        assert_eq!(lane.read(backend, 0, 512), vec![0; 512]);
    }
}

#[test]
fn more_operations_than_the_ring_holds_all_end_exactly_once() {
    const COUNT: u32 = 2000;
    for engine in engines() {
        let image = Image::new(SIZE);
        let backend = image.open(512, false);
        let mut lane = Lane::new(engine);
        for token in 0..COUNT {
            let data = vec![token as u8; 512];
            let offset = u64::from(token) * 512;
            backend.submit(&mut lane.io, write(offset, data, false), token);
        }
        let mut seen = vec![false; COUNT as usize];
        while lane.io.in_flight() > 0 {
            let done = lane.done();
            assert_eq!(done.result, Ok(()));
            let token = done.token as usize;
            assert!(!std::mem::replace(&mut seen[token], true), "twice");
            assert_eq!(bytes(done.transfer), vec![token as u8; 512]);
        }
        assert!(seen.iter().all(|&seen| seen));
        let file = fs::read(&image.0).unwrap();
        for (token, block) in file.chunks(512).take(COUNT as usize).enumerate() {
            assert!(block.iter().all(|&b| b == token as u8), "{engine:?}");
        }
    }
}

#[test]
fn a_lane_that_is_dropped_waits_for_what_the_kernel_has() {
    for engine in engines() {
        let image = Image::new(SIZE);
        let backend = image.open(4096, false);
        for round in 0..20 {
            let mut io = BackendIo::new(engine);
            for token in 0..200 {
                let op = write(u64::from(token) * 4096, vec![round; 4096], token % 50 == 0);
                backend.submit(&mut io, op, token);
            }
            if round % 2 == 0 {
                io.flush();
            }
            drop(io);
        }
        // Whole blocks of one round or another: no memory was let go too early.
        for block in fs::read(&image.0).unwrap().chunks(4096) {
            assert!(block.iter().all(|&b| b == block[0] && b < 20), "{engine:?}");
        }
    }
}

#[test]
fn a_file_that_shrank_reads_as_zeroes_after_its_end() {
    for engine in engines() {
        let image = Image::new(SIZE);
        let backend = image.open(512, false);
        let mut lane = Lane::new(engine);
        lane.write(&backend, 0, &[7; 4096], false);
        let file = File::options().write(true).open(&image.0).unwrap();
        file.set_len(1000).unwrap();
        let got = lane.read(&backend, 0, 4096);
        assert!(got[..1000].iter().all(|&b| b == 7) && got[1000..].iter().all(|&b| b == 0));
    }
}

#[test]
fn more_segments_than_one_call_takes_are_moved_in_several() {
    for engine in engines() {
        let image = Image::new(128 << 20);
        let backend = image.open(512, false);
        let mut lane = Lane::new(engine);
        let (first, last) = (vec![1; 512], vec![2; 512]);
        lane.write(&backend, 0, &first, false);
        lane.write(&backend, (70 << 20) - 512, &last, false);
        lane.write(&backend, 70 << 20, &last, false);
        let source = MemSource::zeroes(70 << 20, Vec::new());
        let mut vectors = Vec::new();
        source
            .iovecs(0..source.len(), usize::MAX, &mut vectors)
            .unwrap();
        assert!(vectors.len() > 1024, "more than IOV_MAX");
        let op = BackendOp::Write {
            offset: 0,
            source,
            fua: false,
        };
        assert_eq!(lane.run(&backend, op).result, Ok(()));
        assert_eq!(lane.read(&backend, 0, 512), vec![0; 512]);
        assert_eq!(lane.read(&backend, (70 << 20) - 512, 512), vec![0; 512]);
        assert_eq!(lane.read(&backend, 70 << 20, 512), last);
    }
}

#[test]
fn a_hole_in_a_file_frees_its_blocks() {
    for engine in engines() {
        let image = Image::new(SIZE);
        let backend = image.open(4096, false);
        let mut lane = Lane::new(engine);
        lane.write(&backend, 0, &vec![1; 1 << 20], true);
        let used = fs::metadata(&image.0).unwrap().blocks();
        let (offset, len) = (0, 1 << 20);
        lane.run(&backend, BackendOp::Deallocate { offset, len });
        let left = fs::metadata(&image.0).unwrap();
        assert!(left.blocks() < used, "{used} {}", left.blocks());
        assert_eq!(left.len(), SIZE, "the size stays");
    }
}

#[test]
fn two_writers_of_one_image_are_refused_and_readers_share_it() {
    let image = Image::new(SIZE);
    let writer = image.open(512, false);
    for read_only in [false, true] {
        let second = FileBackend::open(&image.0, 512, read_only).unwrap_err();
        assert!(matches!(second, OpenError::InUse { .. }), "{second}");
    }
    drop(writer);
    let readers = [image.open(512, true), image.open(512, true)];
    let writer = FileBackend::open(&image.0, 512, false).unwrap_err();
    assert!(writer.to_string().contains("read-only"), "{writer}");
    drop(readers);
    image.open(512, false);
}

#[test]
fn an_image_that_cannot_be_opened_is_an_error_that_names_it_and_the_way_out() {
    let message = |path: &str, block_size| {
        let path = PathBuf::from(path);
        let error = FileBackend::open(&path, block_size, false).unwrap_err();
        let text = error.to_string();
        assert!(!text.contains('\n'), "one line: {text}");
        text
    };
    let missing = message("/nonexistent/disk.img", 512);
    assert!(missing.contains("/nonexistent/disk.img: no such file"));
    assert!(missing.contains("truncate -s"));
    assert!(message("/tmp", 512).contains("is a directory"));
    assert!(message("/dev/null", 512).contains("neither a regular file nor a block device"));
    let image = Image::new(0);
    let path = image.0.to_str().unwrap();
    assert!(message(path, 512).contains("is empty"));
    assert!(message(path, 1024).contains("block size 1024"));
    File::options()
        .write(true)
        .open(&image.0)
        .unwrap()
        .write_all_at(&[0; 1000], 0)
        .unwrap();
    let size = message(path, 4096);
    assert!(size.contains("1000") && size.contains("4096"), "{size}");
    assert!(RamBackend::new(1000, 512).is_err());
    assert!(RamBackend::new(0, 512).is_err());
    assert!(RamBackend::new(1 << 62, 512).is_err());
}

#[test]
fn one_backend_serves_many_lanes_at_once() {
    for engine in engines() {
        let image = Image::new(SIZE);
        let backend: Arc<dyn Backend> = Arc::new(image.open(512, false));
        let lanes: Vec<_> = (0..4u64)
            .map(|index| {
                let backend = Arc::clone(&backend);
                std::thread::spawn(move || {
                    let mut lane = Lane::new(engine);
                    for round in 0..50 {
                        let data = pattern(index * 100 + round, 8192);
                        let offset = index << 20 | round << 13;
                        lane.write(&*backend, offset, &data, false);
                        assert_eq!(lane.read(&*backend, offset, 8192), data);
                    }
                })
            })
            .collect();
        for lane in lanes {
            lane.join().unwrap();
        }
        assert_eq!(backend.counters().read().writes, 200);
    }
}

#[test]
fn direct_io_takes_memory_of_any_alignment_and_copies_only_what_is_not_aligned() {
    let image = Image::new(SIZE);
    let backend = match FileBackend::open_direct(&image.0, 4096, false) {
        Err(OpenError::NoDirect(_)) => {
            return eprintln!("SKIPPED: this file system has no direct I/O");
        }
        opened => opened.unwrap(),
    };
    // Memory whose alignment is known.
    let memory = RamBackend::new(2 << 20, 512).unwrap();
    let stored = File::open(&image.0).unwrap();
    for engine in engines() {
        let mut lane = Lane::new(engine);
        for at in [0, 4096, 1, 511, 4095] {
            for (turn, len) in [4096, 3 * 4096, 1 << 20].into_iter().enumerate() {
                let before = backend.counters().read().copied_bytes;
                let offset = 4096 * (1 + turn as u64);
                let data: Vec<u8> = (0..len).map(|i| (i / 3 + at as usize) as u8).collect();
                let sink = |at| memory.sink(at, len, &mut Vec::new()).unwrap();
                let source = |at| memory.source(at, len, &mut Vec::new()).unwrap();
                sink(at).copy_from(0, &data).unwrap();
                let op = BackendOp::Write {
                    offset,
                    source: source(at),
                    fua: turn == 1,
                };
                assert_eq!(lane.run(&backend, op).result, Ok(()));
                let mut found = vec![0; len];
                stored.read_exact_at(&mut found, offset).unwrap();
                assert!(found == data, "what was written at {at}");
                sink(at).fill(0..len, 0).unwrap();
                let op = BackendOp::Read {
                    offset,
                    sink: sink(at),
                };
                assert_eq!(lane.run(&backend, op).result, Ok(()));
                source(at).copy_to(0, &mut found).unwrap();
                assert!(found == data, "what was read to {at}");
                let copied = backend.counters().read().copied_bytes - before;
                let expected = if at % 4096 == 0 { 0 } else { 2 * len as u64 };
                assert_eq!(copied, expected, "{len} bytes at {at}");
            }
        }
        let offset = 4096;
        let op = BackendOp::WriteZeroes {
            offset,
            len: 1 << 20,
            may_unmap: false,
            fua: true,
        };
        assert_eq!(lane.run(&backend, op).result, Ok(()));
        assert!(lane.read(&backend, offset, 1 << 20).iter().all(|&b| b == 0));
    }
}
