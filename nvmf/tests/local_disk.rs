//! An association with a controller of the same process, and I/O with both ends driven as one.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use memdesc::{MemSink, MemSource};
use nvmf::backend::{Backend, Engine, FileBackend, NullBackend, RamBackend};
use nvmf::controller::{LaneHost, Limits, LocalPort, Subsystem, Target};
use nvmf::host::{Association, HostOptions, NamespaceInfo, NamespaceSelector};
use nvmf::spec::{Nqn, Sqe, Status};
use nvmf::transport::loopback::{Coupled, listen};
use nvmf::transport::{
    Completion, Ending, HostQueuePair, Lane, QueuePair, Ready, Registry, Transfer,
};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

const SIZE: u64 = 8 << 20;

type NewLane = Box<dyn FnOnce() -> Box<dyn Lane> + Send>;

struct Handover(mpsc::UnboundedSender<NewLane>);

impl LaneHost for Handover {
    fn place(&self, lane: NewLane) {
        self.0.send(lane).unwrap();
    }
}

/// A disk with one queue pair, whose ends are coupled.
struct Local {
    target: Arc<Target>,
    association: Association,
    namespace: NamespaceInfo,
    pair: Coupled,
    stop: oneshot::Sender<()>,
    port: tokio::task::JoinHandle<()>,
}

impl Local {
    async fn new(backend: impl Backend + 'static, engine: Engine) -> Self {
        let nqn = Nqn::new("nqn.2026-01.org.example:local").unwrap();
        let mut subsystem = Subsystem::new(nqn.clone(), "1");
        let uuid = Uuid::from_u128(7);
        subsystem.add_namespace(1, uuid, Arc::new(backend)).unwrap();
        let registry = Arc::new(Registry::with_defaults());
        let (lanes, mut placed) = mpsc::unbounded_channel();
        let limits = Limits {
            engine,
            ..Limits::default()
        };
        let lanes = Arc::new(Handover(lanes));
        let target = Target::new(vec![subsystem], limits, Arc::clone(&registry), lanes);
        let target = Arc::new(target.unwrap());
        let (connector, listener) = listen();
        let (stop, stopped) = oneshot::channel::<()>();
        let port = LocalPort::new(Arc::clone(&target), listener);
        let port = tokio::spawn(port.serve(async { drop(stopped.await) }));
        let mut options = HostOptions::new(nqn.clone(), Uuid::from_u128(1));
        options.keep_alive_tmo = Duration::ZERO;
        let association = Association::connect_local(&registry, &connector, &nqn, &options);
        let association = association.await.unwrap();
        let namespace = association.select(&NamespaceSelector::Only).await.unwrap();
        let host = association.open_local_io_queue(&registry, &connector, 1);
        let host = host.await.unwrap();
        let lane = placed.recv().await.unwrap()();
        Self {
            target,
            association,
            namespace,
            pair: Coupled::new(host, lane).unwrap(),
            stop,
            port,
        }
    }

    /// Flushes, and waits for the next completion.
    fn completion(&mut self) -> Completion {
        let mut ready = Ready {
            readable: true,
            writable: true,
        };
        self.pair.flush(&mut ready);
        for _ in 0..5000 {
            if let Some(done) = self.pair.completion() {
                return done;
            }
            std::thread::sleep(Duration::from_millis(1));
            ready.readable = true;
            self.pair.progress(&mut ready);
        }
        panic!("no completion in 5 s");
    }

    fn write(&mut self, lba: u64, data: Vec<u8>) -> Completion {
        let blocks = data.len() as u32 / self.namespace.block_size;
        let sqe = Sqe::write(1, lba, blocks, false);
        let source = MemSource::from_bytes(data);
        self.pair.submit(sqe, Transfer::Out(source), 1).unwrap();
        self.completion()
    }

    fn read(&mut self, lba: u64, len: usize) -> Completion {
        let blocks = len as u32 / self.namespace.block_size;
        let sink = MemSink::from_bytes(vec![0xaa; len]);
        let sqe = Sqe::read(1, lba, blocks);
        self.pair.submit(sqe, Transfer::In(sink), 2).unwrap();
        self.completion()
    }

    async fn end(self) {
        drop(self.pair);
        self.association.shutdown(Duration::from_secs(5)).await;
        drop(self.stop);
        self.port.await.unwrap();
        assert_eq!(self.target.associations(), 0);
    }
}

fn image() -> (tempdir::Dir, std::path::PathBuf) {
    let directory = tempdir::Dir::new();
    let path = directory.0.join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    (directory, path)
}

mod tempdir {
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A directory that goes away with the test.
    pub(super) struct Dir(pub(super) std::path::PathBuf);

    impl Dir {
        pub(super) fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let next = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("nvmf-local-{}-{next}", std::process::id());
            let path = std::env::temp_dir().join(name);
            std::fs::create_dir(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

fn bytes(transfer: Transfer) -> Vec<u8> {
    match transfer {
        Transfer::None => Vec::new(),
        Transfer::In(sink) => sink.into_parts().1.unwrap(),
        Transfer::Out(source) => source.into_parts().1.unwrap(),
    }
}

#[tokio::test]
async fn a_file_is_read_and_written_without_a_copy_by_both_engines() {
    for engine in [Engine::Auto, Engine::Threads] {
        let (_directory, path) = image();
        let backend = FileBackend::open(&path, 512, false).unwrap();
        let mut local = Local::new(backend, engine).await;
        assert_eq!(local.namespace.capacity(), SIZE);
        assert_eq!(local.namespace.uuid, Some(Uuid::from_u128(7)));
        for len in [512, 4096, 65536, 1 << 20] {
            let done = local.write(8, pattern(len));
            assert!(done.cqe.status().is_success(), "{:?}", done.cqe.status());
            assert_eq!(bytes(done.transfer), pattern(len));
            let mut stored = vec![0; len];
            let file = std::fs::File::open(&path).unwrap();
            file.read_exact_at(&mut stored, 4096).unwrap();
            assert_eq!(stored, pattern(len));
            let done = local.read(8, len);
            assert!(done.cqe.status().is_success());
            assert_eq!(bytes(done.transfer), pattern(len));
        }
        assert_eq!(local.pair.counters().copied_bytes, 0);
        local.end().await;
    }
}

#[tokio::test]
async fn the_controllers_refusals_bring_the_memory_back() {
    let (_directory, path) = image();
    let backend = FileBackend::open(&path, 4096, true).unwrap();
    let mut local = Local::new(backend, Engine::Auto).await;
    assert!(local.namespace.write_protected);
    assert_eq!(local.association.controller().max_transfer, Some(1 << 20));
    let done = local.write(0, vec![1; 4096]);
    assert_eq!(done.cqe.status(), Status::WRITE_PROTECTED.do_not_retry());
    assert_eq!(done.transfer.len(), 4096);
    let done = local.read(SIZE / 4096, 4096);
    assert_eq!(done.cqe.status(), Status::LBA_OUT_OF_RANGE.do_not_retry());
    assert_eq!(done.transfer.len(), 4096);
    let done = local.read(0, (1 << 20) + 4096);
    assert_eq!(done.cqe.status(), Status::INVALID_FIELD.do_not_retry());
    // Data that goes the wrong way.
    let source = MemSource::from_bytes(vec![0; 4096]);
    let read = Sqe::read(1, 0, 1);
    local.pair.submit(read, Transfer::Out(source), 3).unwrap();
    let done = local.completion();
    assert_eq!(done.cqe.status(), Status::INVALID_FIELD.do_not_retry());
    assert_eq!(done.transfer.len(), 4096);
    local.end().await;
}

#[tokio::test]
async fn flush_zeroes_and_deallocation_go_to_the_backend() {
    let (_directory, path) = image();
    let backend = FileBackend::open(&path, 512, false).unwrap();
    let mut local = Local::new(backend, Engine::Auto).await;
    local.write(0, vec![1; 8192]);
    let mut ranges = vec![0; 16];
    ranges[4..8].copy_from_slice(&8u32.to_le_bytes());
    ranges[8..16].copy_from_slice(&8u64.to_le_bytes());
    let ranges = Transfer::Out(MemSource::from_bytes(ranges));
    for (sqe, transfer) in [
        (Sqe::flush(1), Transfer::None),
        (Sqe::write_zeroes(1, 0, 4, false, true), Transfer::None),
        (Sqe::deallocate(1, 1), ranges),
    ] {
        local.pair.submit(sqe, transfer, 4).unwrap();
        assert!(local.completion().cqe.status().is_success());
    }
    let backend = local.target.subsystems()[0].namespaces()[0].backend();
    let counts = backend.counters().read();
    assert_eq!((counts.flushes, counts.write_zeroes), (1, 1));
    assert_eq!(counts.deallocates, 1);
    let read = bytes(local.read(0, 8192).transfer);
    assert!(read[..2048].iter().all(|&b| b == 0));
    assert!(read[2048..4096].iter().all(|&b| b == 1));
    local.end().await;
}

#[tokio::test]
async fn backends_without_an_engine_complete_within_the_flush() {
    let ram = RamBackend::new(SIZE, 512).unwrap();
    let mut local = Local::new(ram, Engine::Auto).await;
    local.write(0, pattern(4096));
    assert_eq!(bytes(local.read(0, 4096).transfer), pattern(4096));
    local.end().await;
    let null = NullBackend::new(1 << 40, 4096).unwrap();
    let mut local = Local::new(null, Engine::Auto).await;
    for token in 0..100 {
        let sink = MemSink::from_bytes(vec![0xaa; 4096]);
        let transfer = Transfer::In(sink);
        local
            .pair
            .submit(Sqe::read(1, 5, 1), transfer, token)
            .unwrap();
    }
    local.pair.flush(&mut Ready::default());
    let all: Vec<_> = std::iter::from_fn(|| local.pair.completion()).collect();
    assert_eq!(all.len(), 100);
    for done in all {
        assert_eq!(bytes(done.transfer), [0; 4096]);
    }
    assert_eq!(local.pair.counters().copied_bytes, 0);
    local.end().await;
}

#[tokio::test]
async fn an_end_with_work_in_flight_gives_all_memory_back_first() {
    for engine in [Engine::Auto, Engine::Threads] {
        let (_directory, path) = image();
        let backend = FileBackend::open(&path, 512, false).unwrap();
        let mut local = Local::new(backend, engine).await;
        for token in 0..127 {
            let sink = MemSink::from_bytes(vec![0; 65536]);
            let sqe = Sqe::read(1, token, 128);
            local.pair.submit(sqe, Transfer::In(sink), token).unwrap();
        }
        let mut ready = Ready::default();
        local.pair.flush(&mut ready);
        local.pair.end();
        let mut seen = 0;
        while local.pair.ending().is_none() {
            ready.readable = true;
            local.pair.progress(&mut ready);
            while let Some(done) = local.pair.completion() {
                assert_eq!(done.transfer.len(), 65536);
                seen += 1;
            }
        }
        assert_eq!((seen, local.pair.ending()), (127, Some(&Ending::Local)));
        local.end().await;
    }
}

#[tokio::test]
async fn dropping_it_with_work_in_flight_waits_for_the_kernel() {
    for engine in [Engine::Auto, Engine::Threads] {
        let (_directory, path) = image();
        let backend = FileBackend::open(&path, 512, false).unwrap();
        let mut local = Local::new(backend, engine).await;
        for token in 0..127 {
            let source = MemSource::from_bytes(pattern(65536));
            let sqe = Sqe::write(1, 0, 128, true);
            local
                .pair
                .submit(sqe, Transfer::Out(source), token)
                .unwrap();
        }
        local.pair.flush(&mut Ready::default());
        let target = Arc::clone(&local.target);
        local.end().await;
        let counters = target.subsystems()[0].namespaces()[0].backend().counters();
        assert_eq!(counters.read().errors, 0);
    }
}
