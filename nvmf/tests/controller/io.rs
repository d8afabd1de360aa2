//! I/O queues: data of every size through both kinds of backend, statuses, and what is counted.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use memdesc::{MemSink, MemSource};
use nvmf::backend::{Backend, Engine, FileBackend, PowerCutBackend, RamBackend};
use nvmf::controller::Limits;
use nvmf::spec::opcode::{fabrics, nvm};
use nvmf::spec::sqe::DsmRange;
use nvmf::spec::{Sqe, Status};
use nvmf::transport::Transfer;
use zerocopy::IntoBytes;

use crate::rig::{PATIENCE, Queue, Rig, pattern, ram, subsystem};

const SIZE: u64 = 8 << 20;

struct Image(PathBuf);

impl Image {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("nvmf-controller-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        Self(path)
    }

    fn backend(&self, block_size: u32) -> Arc<dyn Backend> {
        Arc::new(FileBackend::open(&self.0, block_size, false).unwrap())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A target with namespaces 1 (memory, 512), 2 (memory, 4096), 3 (file, 512), 4 (file, 4096) and
/// 5 (memory, read-only), an association and one of its I/O queues.
struct Bench {
    rig: Rig,
    images: [Image; 2],
    admin: Queue,
    queue: Queue,
    cntlid: u16,
}

async fn bench(limits: Limits) -> Bench {
    let images = [Image::new(), Image::new()];
    let read_only = RamBackend::new(SIZE, 512).unwrap().read_only();
    let backends = [
        ram(SIZE, 512),
        ram(SIZE, 4096),
        images[0].backend(512),
        images[1].backend(4096),
        Arc::new(read_only),
    ];
    let rig = Rig::with(subsystem(backends), limits).await;
    let (admin, cntlid) = rig.associate().await;
    let queue = rig.io_queue(cntlid, 1, 128).await;
    Bench {
        rig,
        images,
        admin,
        queue,
        cntlid,
    }
}

fn block_size(nsid: u32) -> u32 {
    if nsid.is_multiple_of(2) { 4096 } else { 512 }
}

fn refused(status: Status) -> Status {
    status.do_not_retry()
}

async fn write(queue: &mut Queue, nsid: u32, lba: u64, data: &[u8]) {
    let count = data.len() as u32 / block_size(nsid);
    let cqe = queue.send(Sqe::write(nsid, lba, count, false), data).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
}

async fn read(queue: &mut Queue, nsid: u32, lba: u64, len: usize) -> Vec<u8> {
    let count = len as u32 / block_size(nsid);
    let (cqe, data) = queue.receive(Sqe::read(nsid, lba, count), len).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    data
}

#[tokio::test]
async fn data_of_every_size_comes_back_from_every_backend_and_is_counted() {
    let engines = [Engine::Auto, Engine::Threads];
    for engine in engines {
        let limits = Limits {
            engine,
            ..Limits::default()
        };
        let Bench {
            rig,
            mut queue,
            admin: _admin,
            images: _images,
            ..
        } = bench(limits).await;
        for nsid in 1..=4 {
            let block = block_size(nsid) as usize;
            // In the capsule, at its limit, just beyond, and up to MDTS.
            let sizes = [block, 8192, 8192 + block, 128 << 10, 1 << 20];
            let mut bytes = 0;
            for (seed, len) in sizes.into_iter().enumerate() {
                let data = pattern(seed as u64, len);
                write(&mut queue, nsid, seed as u64, &data).await;
                let got = read(&mut queue, nsid, seed as u64, len).await;
                assert!(got == data, "{engine:?} namespace {nsid}: {len} bytes");
                bytes += len as u64;
            }
            let counts = rig.backend(nsid).counters().read();
            assert_eq!((counts.reads, counts.writes), (5, 5));
            assert_eq!((counts.read_bytes, counts.written_bytes), (bytes, bytes));
        }
    }
}

#[tokio::test]
async fn many_commands_at_once_end_with_their_own_data() {
    // Buffers for a few commands only: the others wait for one.
    for lane_buffers in [8 << 20, 1 << 20] {
        let limits = Limits {
            lane_buffers,
            max_transfer: 512 << 10,
            ..Limits::default()
        };
        let Bench {
            rig: _rig,
            mut queue,
            admin: _admin,
            images: _images,
            ..
        } = bench(limits).await;
        for nsid in [1, 3] {
            let count = 64;
            let len = 64 << 10;
            let blocks = len as u32 / 512;
            for token in 0..count {
                let source = MemSource::from_bytes(pattern(token, len));
                let sqe = Sqe::write(nsid, token * u64::from(blocks), blocks, false);
                queue.start(sqe, Transfer::Out(source), token);
            }
            for _ in 0..count {
                assert_eq!(queue.finish().await.cqe.status(), Status::SUCCESS);
            }
            for token in 0..count {
                let sink = MemSink::from_bytes(vec![0; len]);
                let sqe = Sqe::read(nsid, token * u64::from(blocks), blocks);
                queue.start(sqe, Transfer::In(sink), token);
            }
            for _ in 0..count {
                let done = queue.finish().await;
                assert_eq!(done.cqe.status(), Status::SUCCESS);
                let Transfer::In(sink) = done.transfer else {
                    panic!("the sink did not come back");
                };
                let data = sink.into_parts().1.unwrap();
                assert!(data == pattern(done.token, len), "{}", done.token);
            }
        }
    }
}

#[tokio::test]
async fn large_transfers_copy_no_payload_byte() {
    let Bench {
        rig,
        mut queue,
        admin: _admin,
        images: _images,
        ..
    } = bench(Limits::default()).await;
    for nsid in 1..=4 {
        for round in 0..8 {
            let data = pattern(round, 128 << 10);
            write(&mut queue, nsid, 0, &data).await;
            assert!(read(&mut queue, nsid, 0, data.len()).await == data);
        }
    }
    drop(queue);
    let target = Arc::clone(&rig.target);
    rig.stop().await;
    let totals = target.totals();
    assert!(
        totals.sends > 0 && totals.receives > 0,
        "the lane has ended"
    );
    assert_eq!(totals.copied_bytes, 0);
}

#[tokio::test]
async fn flush_and_forced_writes_reach_the_backend_as_such() {
    let Bench {
        rig,
        mut queue,
        admin: _admin,
        images: _images,
        ..
    } = bench(Limits::default()).await;
    for nsid in 1..=4 {
        let data = vec![1; 4096];
        let count = 4096 / block_size(nsid);
        let forced = Sqe::write(nsid, 0, count, true);
        assert_eq!(queue.send(forced, &data).await.status(), Status::SUCCESS);
        write(&mut queue, nsid, 0, &data).await;
        let flushed = queue.command(Sqe::flush(nsid)).await;
        assert_eq!(flushed.status(), Status::SUCCESS);
        let counts = rig.backend(nsid).counters().read();
        assert_eq!(
            (counts.writes, counts.fua_writes, counts.flushes),
            (2, 1, 1)
        );
    }
}

fn compare(nsid: u32, lba: u64, count: u32) -> Sqe {
    Sqe {
        opcode: nvm::COMPARE,
        ..Sqe::read(nsid, lba, count)
    }
}

#[tokio::test]
async fn compare_says_whether_the_blocks_hold_the_hosts_data() {
    for engine in [Engine::Auto, Engine::Threads] {
        let limits = Limits {
            engine,
            ..Limits::default()
        };
        let Bench {
            rig: _rig,
            mut queue,
            admin: _admin,
            images: _images,
            ..
        } = bench(limits).await;
        for nsid in 1..=4 {
            let block = block_size(nsid) as usize;
            for len in [block, 8192 + block, 1 << 20] {
                let count = (len / block) as u32;
                let mut data = pattern(len as u64, len);
                write(&mut queue, nsid, 5, &data).await;
                let same = queue.send(compare(nsid, 5, count), &data).await;
                assert_eq!(same.status(), Status::SUCCESS, "namespace {nsid}, {len}");
                for at in [0, len / 2, len - 1] {
                    data[at] ^= 1;
                    let other = queue.send(compare(nsid, 5, count), &data).await;
                    let failure = refused(Status::COMPARE_FAILURE);
                    assert_eq!(other.status(), failure, "byte {at} of {len}");
                    data[at] ^= 1;
                }
            }
        }
    }
}

#[tokio::test]
async fn compares_wait_for_both_of_their_buffers_beside_reads_that_take_one() {
    // Room for one Compare of this size, or for two reads.
    let limits = Limits {
        max_transfer: 64 << 10,
        lane_buffers: 128 << 10,
        ..Limits::default()
    };
    let Bench {
        rig: _rig,
        mut queue,
        admin: _admin,
        images: _images,
        ..
    } = bench(limits).await;
    let data = pattern(1, 64 << 10);
    for nsid in [1, 3] {
        write(&mut queue, nsid, 0, &data).await;
        for token in 0..60 {
            if token % 3 == 0 {
                let sink = MemSink::from_bytes(vec![0; data.len()]);
                queue.start(Sqe::read(nsid, 0, 128), Transfer::In(sink), token);
            } else {
                // Every other one differs, and one in six is outside.
                let lba = if token % 6 == 5 { SIZE / 512 } else { 0 };
                let mut data = data.clone();
                data[1000] ^= (token % 2) as u8;
                let source = MemSource::from_bytes(data);
                let sqe = compare(nsid, lba, 128);
                queue.start(sqe, Transfer::Out(source), token);
            }
        }
        for _ in 0..60 {
            let done = queue.finish().await;
            let expected = match done.token % 6 {
                1 => refused(Status::COMPARE_FAILURE),
                5 => refused(Status::LBA_OUT_OF_RANGE),
                _ => Status::SUCCESS,
            };
            assert_eq!(done.cqe.status(), expected, "command {}", done.token);
        }
    }
}

#[tokio::test]
async fn zeroed_blocks_read_as_zeroes_and_their_neighbours_do_not() {
    let Bench {
        rig,
        mut queue,
        admin: _admin,
        images: _images,
        ..
    } = bench(Limits::default()).await;
    for nsid in 1..=4 {
        let block = block_size(nsid) as usize;
        let data = vec![9; 64 * block];
        for deallocate in [false, true] {
            write(&mut queue, nsid, 0, &data).await;
            let sqe = Sqe::write_zeroes(nsid, 3, 40, deallocate, true);
            assert_eq!(queue.command(sqe).await.status(), Status::SUCCESS);
            let got = read(&mut queue, nsid, 0, data.len()).await;
            let mut expected = data.clone();
            expected[3 * block..43 * block].fill(0);
            assert!(got == expected, "namespace {nsid}");
        }
        assert_eq!(rig.backend(nsid).counters().read().write_zeroes, 2);
    }
}

fn ranges(list: &[(u64, u32)]) -> Vec<u8> {
    let ranges = list.iter().map(|&(slba, nlb)| DsmRange {
        cattr: 0.into(),
        nlb: nlb.into(),
        slba: slba.into(),
    });
    ranges.flat_map(|range| range.as_bytes().to_vec()).collect()
}

#[tokio::test]
async fn exactly_the_ranges_of_a_deallocate_are_deallocated() {
    let Bench {
        rig,
        mut queue,
        admin: _admin,
        images: _images,
        ..
    } = bench(Limits::default()).await;
    for nsid in 1..=4 {
        let block = block_size(nsid) as usize;
        let data = vec![9; 64 * block];
        write(&mut queue, nsid, 0, &data).await;
        // As Linux does: room for 256 ranges, three of which count; one is empty.
        let mut list = ranges(&[(0, 8), (20, 0), (32, 8), (48, 8)]);
        list.resize(4096, 0);
        let cqe = queue.send(Sqe::deallocate(nsid, 3), &list).await;
        assert_eq!(cqe.status(), Status::SUCCESS);
        let mut expected = data.clone();
        expected[..8 * block].fill(0);
        expected[32 * block..40 * block].fill(0);
        assert!(read(&mut queue, nsid, 0, data.len()).await == expected);
        assert_eq!(rig.backend(nsid).counters().read().deallocates, 2);

        // One bad range, and none of them is touched.
        let blocks = SIZE / block as u64;
        for bad in [(blocks, 1), (blocks - 1, 2), (u64::MAX, 8)] {
            let list = ranges(&[(48, 8), bad]);
            let cqe = queue.send(Sqe::deallocate(nsid, 2), &list).await;
            assert_eq!(cqe.status(), refused(Status::LBA_OUT_OF_RANGE));
        }
        assert!(read(&mut queue, nsid, 0, data.len()).await == expected);
        // All 256, the last of which counts too.
        let mut many = vec![(0, 0); 255];
        many.push((48, 8));
        let cqe = queue.send(Sqe::deallocate(nsid, 256), &ranges(&many)).await;
        assert_eq!(cqe.status(), Status::SUCCESS);
        let got = read(&mut queue, nsid, 48, 8 * block).await;
        assert!(got.iter().all(|&b| b == 0));
    }
}

#[tokio::test]
async fn a_refused_command_leaves_the_queue_usable() {
    let Bench {
        rig: _rig,
        mut queue,
        admin: _admin,
        images: _images,
        ..
    } = bench(Limits::default()).await;
    let last = SIZE / 512 - 1;
    let data = vec![1; 4096];
    for nsid in [1, 3] {
        let outside = queue.send(Sqe::write(nsid, last, 8, false), &data).await;
        assert_eq!(outside.status(), refused(Status::LBA_OUT_OF_RANGE));
        let (cqe, _) = queue.receive(Sqe::read(nsid, u64::MAX - 3, 8), 4096).await;
        assert_eq!(cqe.status(), refused(Status::LBA_OUT_OF_RANGE));
        let short = queue.send(Sqe::write(nsid, 0, 16, false), &data).await;
        assert_eq!(short.status(), refused(Status::DATA_SGL_LENGTH_INVALID));
        let large = vec![1; 64 << 10];
        let long = queue.send(Sqe::write(nsid, 0, 16, false), &large).await;
        assert_eq!(long.status(), refused(Status::DATA_SGL_LENGTH_INVALID));
        let (cqe, _) = queue
            .receive(Sqe::read(nsid, 0, 4096), (1 << 20) + (1 << 20))
            .await;
        assert_eq!(cqe.status(), refused(Status::INVALID_FIELD), "beyond MDTS");
        write(&mut queue, nsid, 0, &data).await;
        assert_eq!(read(&mut queue, nsid, 0, 4096).await, data);
    }
    for nsid in [0, 6, u32::MAX] {
        let cqe = queue.command(Sqe::flush(nsid)).await;
        assert_eq!(cqe.status(), refused(Status::INVALID_NAMESPACE));
    }
    for opcode in [nvm::VERIFY, nvm::WRITE_UNCORRECTABLE, 0x7e] {
        let cqe = queue.command(Sqe::new(opcode, 1)).await;
        assert_eq!(cqe.status(), refused(Status::INVALID_OPCODE));
    }
    let protected = queue.send(Sqe::write(5, 0, 8, false), &data).await;
    assert_eq!(protected.status(), refused(Status::WRITE_PROTECTED));
}

#[tokio::test]
async fn disconnect_is_answered_and_ends_the_queue_which_can_then_be_connected_again() {
    let Bench {
        rig,
        mut queue,
        cntlid,
        admin: _admin,
        images: _images,
    } = bench(Limits::default()).await;
    let mut unknown = Sqe::fabrics(fabrics::DISCONNECT);
    unknown.cdw10 = 1.into();
    let cqe = queue.command(unknown).await;
    assert_eq!(cqe.status(), refused(Status::CONNECT_INCOMPATIBLE_FORMAT));
    let cqe = queue.command(Sqe::fabrics(fabrics::DISCONNECT)).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    assert!(queue.closed(PATIENCE).await);
    let mut queue = rig.io_queue(cntlid, 1, 128).await;
    let alive = queue.command(Sqe::flush(1)).await;
    assert_eq!(alive.status(), Status::SUCCESS);
}

#[tokio::test]
async fn an_io_queue_that_breaks_off_in_the_middle_of_things_frees_its_place() {
    let Bench {
        rig,
        queue,
        cntlid,
        admin: _admin,
        images: _images,
    } = bench(Limits::default()).await;
    let mut broken = queue;
    for round in 0..10 {
        for token in 0..32 {
            let source = MemSource::from_bytes(pattern(token, 128 << 10));
            let sqe = Sqe::write(3, token * 256, 256, false);
            broken.start(sqe, Transfer::Out(source), token);
        }
        if round % 2 == 0 {
            broken.finish().await;
        }
        drop(broken);
        // The place is free when the lane is gone, which takes a moment.
        broken = loop {
            let mut next = rig.dial(128).await;
            let connect = nvmf::spec::fabrics::Connect {
                qid: 1,
                sqsize: 127,
                ..crate::rig::admin_connect()
            };
            let cqe = next.connect(connect, &crate::rig::io_data(cntlid)).await;
            if cqe.status() == Status::SUCCESS {
                break next;
            }
            assert_eq!(cqe.status(), refused(Status::SEQUENCE_ERROR));
            tokio::time::sleep(PATIENCE / 1000).await;
        };
    }
    assert_eq!(
        broken.command(Sqe::flush(3)).await.status(),
        Status::SUCCESS
    );
}

/// Storage that answers at once, through buffers: nothing but the lane itself can make it go on.
#[tokio::test]
async fn reads_that_wait_for_buffers_go_on_when_nothing_else_happens() {
    const LEN: usize = 64 << 10;
    let limits = Limits {
        max_transfer: LEN as u32,
        lane_buffers: 2 * LEN,
        ..Limits::default()
    };
    let backend = PowerCutBackend::new(ram(SIZE, 512), 1 << 20, 1);
    let rig = Rig::with(subsystem([Arc::new(backend) as Arc<dyn Backend>]), limits).await;
    let (admin, cntlid) = rig.associate().await;
    let mut queue = rig.io_queue(cntlid, 1, 64).await;
    for round in 0..20 {
        for token in 0..16 {
            let sink = MemSink::from_bytes(vec![0xee; LEN]);
            let read = Sqe::read(1, 0, LEN as u32 / 512);
            queue.start(read, Transfer::In(sink), token);
        }
        for _ in 0..16 {
            let status = queue.finish().await.cqe.status();
            assert_eq!(status, Status::SUCCESS, "round {round}");
        }
    }
    drop((queue, admin));
    rig.stop().await;
}
