//! A target on a loopback port, a worker for its lanes, and a host that says exactly what a test
//! wants said.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use memdesc::{MemSink, MemSource};
use nvmf::backend::{Backend, RamBackend};
use nvmf::controller::{LaneHost, Limits, Port, Subsystem, Target};
use nvmf::spec::fabrics::{
    CATTR_DISABLE_SQ_FLOW, CNTLID_DYNAMIC, Connect, ConnectData, PropertySize, property_get,
    property_set,
};
use nvmf::spec::nqn::NQN_FIELD_LEN;
use nvmf::spec::property::{Cap, Cc, Csts, offset};
use nvmf::spec::{Cqe, Nqn, Sqe, Status, trtype};
use nvmf::transport::drive::Driven;
use nvmf::transport::registry::Lease;
use nvmf::transport::watch::Watch;
use nvmf::transport::{
    Completion, HostQueuePair, Lane, QueueParams, Ready, Registry, Transfer, Turn, tcp,
};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use uuid::Uuid;
use zerocopy::IntoBytes;

pub const SUBNQN: &str = "nqn.2026-01.org.example:subsystem";
pub const HOSTNQN: &str = "nqn.2026-01.org.example:host";
pub const HOSTID: [u8; 16] = [7; 16];
/// Nothing in these tests takes longer on a machine that works.
pub const PATIENCE: Duration = Duration::from_secs(10);

type NewLane = Box<dyn FnOnce() -> Box<dyn Lane> + Send>;

/// A worker thread, as the daemon has them.
pub struct Worker(mpsc::UnboundedSender<NewLane>);

impl Worker {
    pub fn start() -> Self {
        let (lanes, mut new) = mpsc::unbounded_channel::<NewLane>();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_io()
                .build()
                .unwrap();
            let local = tokio::task::LocalSet::new();
            local.spawn_local(async move {
                while let Some(lane) = new.recv().await {
                    tokio::task::spawn_local(drive(lane()));
                }
            });
            runtime.block_on(local);
        });
        Self(lanes)
    }
}

impl LaneHost for Worker {
    fn place(&self, lane: NewLane) {
        let _ = self.0.send(lane);
    }
}

async fn drive(mut lane: Box<dyn Lane>) {
    let mut watches = Vec::new();
    let mut ready: Vec<Ready> = Vec::new();
    let mut generation = None;
    let mut again = false;
    poll_fn(|cx| {
        loop {
            let mut due = std::mem::take(&mut again) | lane.poll_mailbox(cx);
            if generation != Some(lane.generation()) {
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
                generation = Some(lane.generation());
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
                    again = true;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Turn::Ended => return Poll::Ready(()),
            }
        }
    })
    .await;
}

/// A target that is being served.
pub struct Rig {
    pub target: Arc<Target>,
    pub address: SocketAddr,
    shutdown: Option<oneshot::Sender<()>>,
    served: JoinHandle<()>,
}

pub fn ram(size: u64, block_size: u32) -> Arc<dyn Backend> {
    Arc::new(RamBackend::new(size, block_size).unwrap())
}

/// A subsystem of the rig's name with these backends, NSIDs from 1 on.
pub fn subsystem(backends: impl IntoIterator<Item = Arc<dyn Backend>>) -> Subsystem {
    let mut subsystem = Subsystem::new(Nqn::new(SUBNQN).unwrap(), "SN0001");
    for (nsid, backend) in (1..).zip(backends) {
        let uuid = Uuid::from_u128(0x1000 + u128::from(nsid));
        subsystem.add_namespace(nsid, uuid, backend).unwrap();
    }
    subsystem
}

impl Rig {
    /// Serves one subsystem with one namespace of 4 MiB of memory.
    pub async fn start() -> Self {
        Self::with(subsystem([ram(4 << 20, 512)]), Limits::default()).await
    }

    pub async fn with(subsystem: Subsystem, limits: Limits) -> Self {
        let target = Self::target(subsystem, limits);
        let any = ["127.0.0.1:0".parse().unwrap()];
        let port = Port::bind(Arc::clone(&target), &any).await.unwrap();
        Self::serve(target, port)
    }

    /// A target that is not served yet.
    pub fn target(subsystem: Subsystem, limits: Limits) -> Arc<Target> {
        let registry = Arc::new(Registry::with_defaults());
        let worker = Arc::new(Worker::start());
        Arc::new(Target::new(vec![subsystem], limits, registry, worker).unwrap())
    }

    /// Serves a target on a port of its.
    pub fn serve(target: Arc<Target>, port: Port) -> Self {
        let address = port.local_addrs()[0];
        let (shutdown, down) = oneshot::channel();
        let served = tokio::spawn(port.serve(async {
            let _ = down.await;
        }));
        Self {
            target,
            address,
            shutdown: Some(shutdown),
            served,
        }
    }

    /// Ends the target and waits for that.
    pub async fn stop(mut self) {
        self.shutdown.take();
        self.served.await.unwrap();
    }

    pub fn backend(&self, nsid: u32) -> &Arc<dyn Backend> {
        let subsystem = &self.target.subsystems()[0];
        let mut all = subsystem.namespaces().iter();
        all.find(|ns| ns.nsid() == nsid).unwrap().backend()
    }

    /// A connection on which nothing but ICReq was sent.
    pub async fn dial(&self, queue_size: u32) -> Queue {
        let deadline = Instant::now() + PATIENCE;
        let connection = tcp::connect(
            &tcp::LocalEnd::default(),
            self.address,
            tcp::Digests::default(),
            deadline,
        )
        .await
        .unwrap();
        let params = QueueParams {
            admin: false,
            queue_size,
            sq_flow_control: false,
            in_capsule_limit: 8192,
            connection: connection.into(),
            lease: Lease::default(),
        };
        let registry = Registry::with_defaults();
        let pair = registry.open_host(trtype::TCP, params).unwrap();
        Queue(Driven::new(pair).unwrap())
    }

    /// An admin queue that is connected, and its CNTLID.
    pub async fn connect(&self) -> (Queue, u16) {
        self.connect_with(0).await
    }

    pub async fn connect_with(&self, kato: u32) -> (Queue, u16) {
        let mut queue = self.dial(32).await;
        let connect = Connect {
            kato,
            ..admin_connect()
        };
        let cqe = queue.connect(connect, &connect_data()).await;
        assert_eq!(cqe.status(), Status::SUCCESS);
        (queue, cqe.dw0() as u16)
    }

    /// An association that is enabled, with I/O queues granted; and its CNTLID.
    pub async fn associate(&self) -> (Queue, u16) {
        let (mut admin, cntlid) = self.connect().await;
        admin.enable().await;
        let cqe = admin.command(Sqe::set_features(7, 0x0003_0003)).await;
        assert_eq!(cqe.dw0(), 0x0003_0003);
        (admin, cntlid)
    }

    /// An I/O queue of an association.
    pub async fn io_queue(&self, cntlid: u16, qid: u16, entries: u32) -> Queue {
        let mut queue = self.dial(entries).await;
        let connect = Connect {
            qid,
            sqsize: (entries - 1) as u16,
            ..admin_connect()
        };
        let cqe = queue.connect(connect, &io_data(cntlid)).await;
        assert_eq!(cqe.status(), Status::SUCCESS);
        queue
    }
}

pub fn admin_connect() -> Connect {
    Connect {
        recfmt: 0,
        qid: 0,
        sqsize: 31,
        cattr: CATTR_DISABLE_SQ_FLOW,
        kato: 0,
    }
}

pub fn field(nqn: &str) -> [u8; NQN_FIELD_LEN] {
    Nqn::new(nqn).unwrap().to_field()
}

pub fn connect_data() -> ConnectData {
    ConnectData {
        hostid: HOSTID,
        cntlid: CNTLID_DYNAMIC.into(),
        reserved18: [0; 238],
        subnqn: field(SUBNQN),
        hostnqn: field(HOSTNQN),
        reserved768: [0; 256],
    }
}

pub fn io_data(cntlid: u16) -> ConnectData {
    ConnectData {
        cntlid: cntlid.into(),
        ..connect_data()
    }
}

/// A host's queue pair, one command at a time or several.
pub struct Queue(pub Driven<dyn HostQueuePair>);

impl Queue {
    pub async fn submit(&mut self, sqe: Sqe, transfer: Transfer) -> Completion {
        self.start(sqe, transfer, 0);
        self.finish().await
    }

    pub fn start(&mut self, sqe: Sqe, transfer: Transfer, token: u64) {
        self.0.pair().submit(sqe, transfer, token).unwrap();
    }

    pub async fn finish(&mut self) -> Completion {
        let wait = async {
            loop {
                if let Some(completion) = self.0.pair().completion() {
                    return completion;
                }
                assert!(
                    self.0.pair().ending().is_none(),
                    "{:?}",
                    self.0.pair().ending()
                );
                self.0.progress().await;
            }
        };
        timeout(PATIENCE, wait).await.expect("no completion")
    }

    /// Waits until the other end has closed the connection.
    pub async fn closed(&mut self, within: Duration) -> bool {
        let wait = async {
            while self.0.pair().ending().is_none() {
                self.0.progress().await;
            }
        };
        timeout(within, wait).await.is_ok()
    }

    /// A command without data.
    pub async fn command(&mut self, sqe: Sqe) -> Cqe {
        self.submit(sqe, Transfer::None).await.cqe
    }

    /// A command that brings `len` bytes.
    pub async fn receive(&mut self, sqe: Sqe, len: usize) -> (Cqe, Vec<u8>) {
        let sink = MemSink::from_bytes(vec![0xee; len]);
        let completion = self.submit(sqe, Transfer::In(sink)).await;
        let Transfer::In(sink) = completion.transfer else {
            panic!("the sink did not come back");
        };
        (completion.cqe, sink.into_parts().1.unwrap())
    }

    /// A command that takes data along.
    pub async fn send(&mut self, sqe: Sqe, data: &[u8]) -> Cqe {
        let source = MemSource::from_bytes(data.to_vec());
        self.submit(sqe, Transfer::Out(source)).await.cqe
    }

    pub async fn connect(&mut self, connect: Connect, data: &ConnectData) -> Cqe {
        self.send(connect.to_sqe(), data.as_bytes()).await
    }

    pub async fn property(&mut self, offset: u32, size: PropertySize) -> u64 {
        let cqe = self.command(property_get(offset, size)).await;
        assert_eq!(cqe.status(), Status::SUCCESS);
        cqe.result.get()
    }

    pub async fn csts(&mut self) -> Csts {
        Csts(self.property(offset::CSTS, PropertySize::Four).await as u32)
    }

    pub async fn cap(&mut self) -> Cap {
        Cap(self.property(offset::CAP, PropertySize::Eight).await)
    }

    pub async fn set_cc(&mut self, cc: u32) -> Status {
        self.command(property_set(offset::CC, cc)).await.status()
    }

    pub async fn enable(&mut self) {
        assert_eq!(self.set_cc(Cc::enable(0).0).await, Status::SUCCESS);
        assert!(self.csts().await.rdy());
    }

    /// Polls CSTS until it is as wanted.
    pub async fn until(&mut self, wanted: impl Fn(Csts) -> bool) {
        let wait = async {
            while !wanted(self.csts().await) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, wait).await.expect("CSTS");
    }
}

/// Random-looking bytes from a seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}
