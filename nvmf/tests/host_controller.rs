//! Our host against our controller, over loopback TCP: associations from the first byte to the last.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends when something is missing"
)]

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use memdesc::{MemSink, MemSource};
use nvmf::backend::RamBackend;
use nvmf::controller::{LaneHost, Limits, Port, Subsystem, Target};
use nvmf::host::{
    Association, HostError, HostOptions, LocalEnd, Loss, NamespaceSelector, TargetAddress,
};
use nvmf::spec::{Nqn, Sqe, Status};
use nvmf::transport::drive::Driven;
use nvmf::transport::watch::Watch;
use nvmf::transport::{Completion, HostQueuePair, Lane, Ready, Registry, Transfer, Turn};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;
use uuid::Uuid;

const SUBNQN: &str = "nqn.2026-01.org.example:disks";
const CLOSED_SUBNQN: &str = "nqn.2026-01.org.example:closed";
const HOSTNQN: &str = "nqn.2026-01.org.example:host1";
const LONG: Duration = Duration::from_secs(10);

/// A worker for every lane.
struct Workers;

impl LaneHost for Workers {
    fn place(&self, lane: Box<dyn FnOnce() -> Box<dyn Lane> + Send>) {
        std::thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_io().build().unwrap();
            runtime.block_on(drive(lane()));
        });
    }
}

async fn drive(mut lane: Box<dyn Lane>) {
    let mut generation = None;
    let mut watches: Vec<Watch> = Vec::new();
    let mut ready = Vec::new();
    poll_fn(move |cx| {
        loop {
            let mut due = lane.poll_mailbox(cx);
            if generation != Some(lane.generation()) {
                generation = Some(lane.generation());
                let mut descriptors = Vec::new();
                lane.descriptors(&mut descriptors);
                watches = descriptors
                    .iter()
                    .map(|fd| Watch::new(*fd, true).unwrap())
                    .collect();
                let both = Ready {
                    readable: true,
                    writable: true,
                };
                ready = vec![both; watches.len()];
                due = true;
            }
            for (index, watch) in watches.iter().enumerate() {
                due |= watch.poll(cx, lane.wants_write(index), &mut ready[index]);
            }
            if !due {
                return Poll::Pending;
            }
            match lane.turn(&mut ready) {
                Turn::Idle => {}
                Turn::Again => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Turn::Ended => return Poll::Ready(()),
            }
        }
    })
    .await;
}

/// A target on a thread of its own, so that it can be killed.
struct Exported {
    target: Arc<Target>,
    at: SocketAddr,
    kill: Option<oneshot::Sender<()>>,
}

impl Exported {
    fn new() -> Self {
        let disk = |size, block| Arc::new(RamBackend::new(size, block).unwrap());
        let mut open = Subsystem::new(Nqn::new(SUBNQN).unwrap(), "SERIAL7");
        open.add_namespace(1, Uuid::from_u128(1), disk(4 << 20, 512))
            .unwrap();
        open.add_namespace(9, Uuid::from_u128(9), disk(8 << 20, 4096))
            .unwrap();
        let mut closed = Subsystem::new(Nqn::new(CLOSED_SUBNQN).unwrap(), "SERIAL8");
        closed.allow_host(Nqn::new("nqn.2026-01.org.example:friend").unwrap());
        let limits = Limits {
            io_queues: 3,
            queue_size: 64,
            ..Limits::default()
        };
        let registry = Arc::new(Registry::with_defaults());
        let target = Target::new(vec![open, closed], limits, registry, Arc::new(Workers));
        let target = Arc::new(target.unwrap());
        let (kill, killed) = oneshot::channel();
        let (tell, told) = std::sync::mpsc::channel();
        let served = Arc::clone(&target);
        std::thread::spawn(move || {
            // Dropping the runtime drops every connection, without a word.
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let loopback = "127.0.0.1:0".parse().unwrap();
                let port = Port::bind(served, &[loopback]).await.unwrap();
                tell.send(port.local_addrs()[0]).unwrap();
                tokio::select! {
                    () = port.serve(std::future::pending()) => {}
                    _ = killed => {}
                }
            });
        });
        Self {
            target,
            at: told.recv().unwrap(),
            kill: Some(kill),
        }
    }

    fn kill(&mut self) {
        self.kill = None;
    }

    /// Waits until it has no associations.
    async fn is_free(&self) {
        let free = async {
            while self.target.associations() != 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(LONG, free)
            .await
            .expect("the controller forgets the association");
    }
}

/// A relay that can be frozen: a peer that is there and says nothing.
async fn relay(to: SocketAddr) -> (SocketAddr, watch::Sender<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let (freeze, frozen) = watch::channel(false);
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let mut frozen = frozen.clone();
            tokio::spawn(async move {
                let mut far = TcpStream::connect(to).await.unwrap();
                tokio::select! {
                    _ = copy_bidirectional(&mut near, &mut far) => {}
                    () = async { drop(frozen.wait_for(|frozen| *frozen).await) } => {
                        // Both ends stay open.
                        std::future::pending::<()>().await;
                    }
                }
            });
        }
    });
    (at, freeze)
}

fn options() -> HostOptions {
    let hostnqn = Nqn::new(HOSTNQN).unwrap();
    HostOptions::new(hostnqn, Uuid::from_u128(0x77))
}

async fn connect_as(
    registry: &Registry,
    at: SocketAddr,
    subnqn: &str,
    options: &HostOptions,
) -> Result<Association, HostError> {
    let target = TargetAddress {
        host: at.ip().to_string(),
        port: at.port(),
        subnqn: Nqn::new(subnqn).unwrap(),
        local: LocalEnd::default(),
    };
    Association::connect(registry, &target, options).await
}

async fn connect(registry: &Registry, at: SocketAddr, options: &HostOptions) -> Association {
    connect_as(registry, at, SUBNQN, options).await.unwrap()
}

/// Runs one command on an I/O queue pair.
async fn run(pair: &mut Driven<dyn HostQueuePair>, sqe: Sqe, transfer: Transfer) -> Completion {
    pair.pair().submit(sqe, transfer, 42).unwrap();
    let done = async {
        loop {
            if let Some(completion) = pair.pair().completion() {
                return completion;
            }
            pair.progress().await;
        }
    };
    timeout(LONG, done).await.expect("an answer in time")
}

async fn write(pair: &mut Driven<dyn HostQueuePair>, nsid: u32, lba: u64, data: &[u8], block: u32) {
    let sqe = Sqe::write(nsid, lba, data.len() as u32 / block, true);
    let source = MemSource::from_bytes(data.to_vec());
    let done = run(pair, sqe, Transfer::Out(source)).await;
    assert_eq!(done.cqe.status(), Status::SUCCESS);
}

async fn read(
    pair: &mut Driven<dyn HostQueuePair>,
    nsid: u32,
    lba: u64,
    len: u32,
    block: u32,
) -> Vec<u8> {
    let sqe = Sqe::read(nsid, lba, len / block);
    let sink = MemSink::from_bytes(vec![0xee; len as usize]);
    let done = run(pair, sqe, Transfer::In(sink)).await;
    assert_eq!(done.cqe.status(), Status::SUCCESS);
    match done.transfer {
        Transfer::In(sink) => sink.into_parts().1.unwrap(),
        other => panic!("{other:?}"),
    }
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (seed + i * 7 + i / 251) as u8).collect()
}

async fn loss_of(association: &Association) -> Loss {
    let mut lost = association.lost();
    let loss = timeout(LONG, lost.wait_for(Option::is_some)).await;
    loss.expect("in time").unwrap().clone().unwrap()
}

#[tokio::test]
async fn a_controller_is_found_to_be_what_it_is() {
    let exported = Exported::new();
    let registry = Registry::with_defaults();
    let mut options = options();
    options.nr_io_queues = 200;
    let association = connect(&registry, exported.at, &options).await;
    let info = association.controller();
    assert_eq!(
        (info.address, info.serial.as_str()),
        (exported.at, "SERIAL7")
    );
    assert_eq!(
        (info.max_transfer, info.in_capsule_limit),
        (Some(1 << 20), 8192)
    );
    assert!(info.supports_write_zeroes() && info.supports_deallocate());
    assert_eq!(
        (
            association.io_queues_granted(),
            association.io_queue_entries()
        ),
        (3, 64)
    );
    let namespaces = association.namespaces().await.unwrap();
    let found: Vec<_> = namespaces
        .iter()
        .map(|ns| (ns.nsid, ns.block_size, ns.capacity(), ns.uuid))
        .collect();
    let expected = [
        (1, 512, 4 << 20, Some(Uuid::from_u128(1))),
        (9, 4096, 8 << 20, Some(Uuid::from_u128(9))),
    ];
    assert_eq!(found, expected);
    let error = association
        .select(&NamespaceSelector::Only)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("?nsid=9"), "{error}");
    let by_uuid = NamespaceSelector::Uuid(Uuid::from_u128(9));
    assert_eq!(association.select(&by_uuid).await.unwrap().nsid, 9);
}

#[tokio::test]
async fn every_io_queue_reads_what_another_wrote() {
    let exported = Exported::new();
    let registry = Registry::with_defaults();
    let mut options = options();
    options.nr_io_queues = 3;
    let association = connect(&registry, exported.at, &options).await;
    let pairs = association.open_io_queues(&registry).await.unwrap();
    assert_eq!((pairs.len(), registry.queue_pairs("tcp")), (3, 4));
    assert!(pairs.iter().all(|pair| pair.room() == 63));
    let mut pairs: Vec<_> = pairs
        .into_iter()
        .map(|pair| Driven::new(pair).unwrap())
        .collect();
    // In the capsule, just beyond, and with many R2Ts.
    for (round, len) in [512, 4096, 8192, 8704, 131_072, 1 << 20]
        .into_iter()
        .enumerate()
    {
        for (nsid, block) in [(1, 512), (9, 4096)] {
            let len = len / block as usize * block as usize;
            if len == 0 {
                continue;
            }
            let data = pattern(round, len);
            write(&mut pairs[round % 3], nsid, 3, &data, block).await;
            let reader = &mut pairs[(round + 1) % 3];
            assert!(
                read(reader, nsid, 3, len as u32, block).await == data,
                "{len} of {nsid}"
            );
        }
    }
    let zeroed = run(
        &mut pairs[0],
        Sqe::write_zeroes(1, 4, 2, false, true),
        Transfer::None,
    )
    .await;
    assert_eq!(zeroed.cqe.status(), Status::SUCCESS);
    assert_eq!(read(&mut pairs[1], 1, 4, 1024, 512).await, [0; 1024]);
    let flushed = run(&mut pairs[2], Sqe::flush(1), Transfer::None).await;
    assert_eq!(flushed.cqe.status(), Status::SUCCESS);
    let beyond = Sqe::read(1, 8192, 1);
    let sink = MemSink::from_bytes(vec![0; 512]);
    let beyond = run(&mut pairs[0], beyond, Transfer::In(sink)).await;
    assert_eq!(beyond.cqe.status().code(), Status::LBA_OUT_OF_RANGE.code());
}

#[tokio::test]
async fn subsystems_that_do_not_want_us_say_why() {
    let exported = Exported::new();
    let registry = Registry::with_defaults();
    let unknown = "nqn.2026-01.org.example:nobody";
    let error = connect_as(&registry, exported.at, unknown, &options())
        .await
        .unwrap_err();
    assert!(
        matches!(error, HostError::UnknownSubsystem { .. }),
        "{error}"
    );
    let error = connect_as(&registry, exported.at, CLOSED_SUBNQN, &options())
        .await
        .unwrap_err();
    assert!(matches!(error, HostError::HostNotAllowed { .. }), "{error}");
    assert!(error.to_string().contains(HOSTNQN), "{error}");
    assert_eq!(registry.queue_pairs("tcp"), 0);
}

#[tokio::test]
async fn an_idle_association_stays_alive() {
    let exported = Exported::new();
    let registry = Registry::with_defaults();
    let mut options = options();
    options.keep_alive_tmo = Duration::from_secs(1);
    let association = connect(&registry, exported.at, &options).await;
    let mut pairs = association.open_io_queues(&registry).await.unwrap();
    // A controller may take up to twice the time to notice.
    tokio::time::sleep(options.keep_alive_tmo * 3).await;
    assert_eq!(*association.lost().borrow(), None);
    assert_eq!(exported.target.associations(), 1);
    let mut pair = Driven::new(pairs.remove(0)).unwrap();
    assert_eq!(read(&mut pair, 1, 0, 512, 512).await, [0; 512]);
}

#[tokio::test]
async fn a_killed_controller_is_reported_lost_and_all_its_queues_end() {
    let mut exported = Exported::new();
    let registry = Registry::with_defaults();
    let association = connect(&registry, exported.at, &options()).await;
    let mut pairs = association.open_io_queues(&registry).await.unwrap();
    let mut pair = Driven::new(pairs.remove(0)).unwrap();
    let started = Instant::now();
    exported.kill();
    assert!(matches!(loss_of(&association).await, Loss::Ended(_)));
    let ended = async {
        while pair.pair().ending().is_none() {
            pair.progress().await;
        }
    };
    timeout(LONG, ended).await.expect("the I/O queue ends, too");
    // Long before any keep-alive would tell.
    assert!(started.elapsed() < Duration::from_secs(2));
    association.shutdown(LONG).await;
    assert!(started.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn a_controller_that_falls_silent_is_lost_when_the_keep_alive_expires() {
    let exported = Exported::new();
    let registry = Registry::with_defaults();
    let (at, freeze) = relay(exported.at).await;
    let mut options = options();
    options.keep_alive_tmo = Duration::from_millis(400);
    let association = connect(&registry, at, &options).await;
    freeze.send_replace(true);
    let started = Instant::now();
    let loss = loss_of(&association).await;
    assert_eq!(loss, Loss::KeepAlive(options.keep_alive_tmo));
    let took = started.elapsed();
    assert!(
        took >= options.keep_alive_tmo / 2 && took < LONG,
        "{took:?}"
    );
}

#[tokio::test]
async fn shutdown_of_a_silent_controller_ends_in_time() {
    let exported = Exported::new();
    let registry = Registry::with_defaults();
    let (at, freeze) = relay(exported.at).await;
    let association = connect(&registry, at, &options()).await;
    freeze.send_replace(true);
    let started = Instant::now();
    association.shutdown(Duration::from_millis(300)).await;
    let took = started.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(registry.queue_pairs("tcp"), 0);
}

#[tokio::test]
async fn an_orderly_shutdown_leaves_nothing_on_either_side() {
    let exported = Exported::new();
    let registry = Registry::with_defaults();
    for round in 0..3 {
        let association = connect(&registry, exported.at, &options()).await;
        let pairs = association.open_io_queues(&registry).await.unwrap();
        drop(pairs);
        let started = Instant::now();
        association.shutdown(LONG).await;
        assert!(started.elapsed() < Duration::from_secs(1), "round {round}");
        assert_eq!(registry.queue_pairs("tcp"), 0);
        exported.is_free().await;
    }
}

#[tokio::test]
async fn an_association_that_is_dropped_closes_its_connections() {
    let exported = Exported::new();
    let registry = Registry::with_defaults();
    drop(connect(&registry, exported.at, &options()).await);
    exported.is_free().await;
    assert_eq!(registry.queue_pairs("tcp"), 0);
}
