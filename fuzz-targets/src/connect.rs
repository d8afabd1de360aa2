//! Connect and the fabrics and admin commands behind it, against a whole target over loopback.
//!
//! Whether a Connect is accepted is worked out again from its fields; an answer that differs, an
//! answer that does not come, and an association that stays behind are all failures.

use std::sync::Arc;
use std::time::Duration;

use memdesc::{MemSink, MemSource};
use nvmf::backend::NullBackend;
use nvmf::controller::{LaneHost, Limits, LocalPort, Subsystem, Target};
use nvmf::spec::fabrics::{
    CNTLID_DYNAMIC, Connect, ConnectData, PropertySize, connect_offset, invalid_parameter_parts,
    property_get, property_set,
};
use nvmf::spec::opcode::{admin, fabrics};
use nvmf::spec::{Cqe, Nqn, Sqe, Status, trtype};
use nvmf::transport::drive::Driven;
use nvmf::transport::loopback::{Connector, listen};
use nvmf::transport::registry::Lease;
use nvmf::transport::{HostQueuePair, Lane, QueueParams, Registry, Transfer};
use tokio::sync::oneshot;
use tokio::time::timeout;
use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use crate::input::Input;

const SUBNQN: &str = "nqn.2026-01.org.example:disks";
const CLOSED: &str = "nqn.2026-01.org.example:closed";
const HOSTNQN: &str = "nqn.2026-01.org.example:host";
const HOSTID: [u8; 16] = [7; 16];
/// Nothing takes as long on a machine that works.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest data of a Connect that is tried.
const MAX_DATA: usize = 2048;
/// Associations at a time: the first, and one more.
const MAX_ASSOCIATIONS: usize = 2;
/// Commands that follow a Connect, at most.
const MAX_COMMANDS: usize = 24;
/// Entries of an admin queue, at most (Base, "Admin Submission Queue").
const MAX_ADMIN_QUEUE: u32 = 4096;

/// Runs what the bytes say.
///
/// # Panics
/// When the target answers what it must not, or not at all.
pub fn run(data: &[u8]) {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let rig = Rig::new();
        let mut input = Input::new(data);
        rig.converse(&mut input).await;
        rig.end().await;
    });
}

/// I/O queues that were accepted are dropped, which ends them.
struct Nowhere;

impl LaneHost for Nowhere {
    fn place(&self, _lane: Box<dyn FnOnce() -> Box<dyn Lane> + Send>) {}
}

struct Rig {
    target: Arc<Target>,
    registry: Arc<Registry>,
    connector: Connector,
    stop: oneshot::Sender<()>,
    port: tokio::task::JoinHandle<()>,
}

impl Rig {
    fn new() -> Self {
        let nqn = |name| Nqn::new(name).expect("a name");
        let mut open = Subsystem::new(nqn(SUBNQN), "1");
        let disk = Arc::new(NullBackend::new(1 << 30, 512).expect("a disk"));
        open.add_namespace(1, Uuid::from_u128(1), disk)
            .expect("the first");
        let mut closed = Subsystem::new(nqn(CLOSED), "2");
        closed.allow_host(nqn("nqn.2026-01.org.example:friend"));
        let registry = Arc::new(Registry::with_defaults());
        let limits = Limits {
            max_associations: MAX_ASSOCIATIONS,
            ..Limits::default()
        };
        let subsystems = vec![open, closed];
        let target = Target::new(subsystems, limits, Arc::clone(&registry), Arc::new(Nowhere));
        let target = Arc::new(target.expect("a target"));
        let (connector, listener) = listen();
        let (stop, stopped) = oneshot::channel::<()>();
        let port = LocalPort::new(Arc::clone(&target), listener);
        let port = tokio::spawn(port.serve(async { drop(stopped.await) }));
        Self {
            target,
            registry,
            connector,
            stop,
            port,
        }
    }

    async fn converse(&self, input: &mut Input<'_>) {
        let (mut queue, accepted) = self.connect(input, 0, CNTLID_DYNAMIC).await;
        let Some(cntlid) = accepted else {
            return;
        };
        for _ in 0..MAX_COMMANDS {
            if input.is_empty() {
                return;
            }
            if input.below(8) == 0 {
                let qid = 1 + input.below(3) as u16;
                let (io, _) = self.connect(input, qid, cntlid).await;
                drop(io);
                continue;
            }
            if !queue.command(input).await {
                return;
            }
        }
    }

    /// A new connection, and whatever Connect the input makes of a good one. The CNTLID, when it was
    /// accepted.
    async fn connect(&self, input: &mut Input<'_>, qid: u16, cntlid: u16) -> (Queue, Option<u16>) {
        let connection = self.connector.connect().await.expect("descriptors");
        let params = QueueParams {
            admin: qid == 0,
            queue_size: 8,
            sq_flow_control: false,
            in_capsule_limit: 8192,
            connection: connection.into(),
            lease: Lease::default(),
        };
        let pair = self.registry.open_host(trtype::INTRA_HOST, params);
        let pair = Driven::new(pair.expect("loopback")).expect("a runtime");
        let mut queue = Queue(pair);
        let mut sqe = good(qid).to_sqe();
        let mut data = good_data(cntlid).as_bytes().to_vec();
        spoil(input, sqe.as_mut_bytes(), 64);
        spoil(input, &mut data, 1024);
        match input.u8() {
            0..=0xe7 => {}
            0xe8..=0xef => data.truncate(usize::from(input.u16()) % MAX_DATA),
            _ => data.resize(usize::from(input.u16()) % MAX_DATA, 0),
        }
        let before = self.target.associations();
        let transfer = Transfer::Out(MemSource::from_bytes(data.clone()));
        let cqe = queue.run(sqe, transfer).await.expect("an answer");
        let expected = judge(&sqe, &data);
        let status = cqe.status();
        if status.is_success() {
            let answer = cqe.dw0();
            assert!(expected.is_ok(), "accepted although {expected:?}");
            assert!(answer <= 0xffef, "CNTLID {answer:#x}");
            return (queue, Some(answer as u16));
        }
        match expected {
            // Whether a queue may join depends on its association, too.
            Ok(()) if Connect::from_sqe(&sqe).qid != 0 => {}
            Ok(()) if before == MAX_ASSOCIATIONS => {
                assert_eq!(status.code(), Status::CONNECT_CONTROLLER_BUSY.code());
            }
            _ => assert_refused(&cqe, expected),
        }
        (queue, None)
    }

    /// Everything that was accepted is gone when its queues are.
    async fn end(self) {
        let gone = async {
            while self.target.associations() > 0 {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, gone).await.expect("no association stays");
        drop(self.stop);
        timeout(PATIENCE, self.port)
            .await
            .expect("the port ends")
            .expect("without a panic");
    }
}

fn good(qid: u16) -> Connect {
    Connect {
        recfmt: 0,
        qid,
        sqsize: 7,
        cattr: 0,
        kato: 0,
    }
}

fn good_data(cntlid: u16) -> ConnectData {
    let field = |name| Nqn::new(name).expect("a name").to_field();
    ConnectData {
        hostid: HOSTID,
        cntlid: cntlid.into(),
        reserved18: [0; 238],
        subnqn: field(SUBNQN),
        hostnqn: field(HOSTNQN),
        reserved768: [0; 256],
    }
}

/// Changes up to three bytes below `bound`, or a run of them.
fn spoil(input: &mut Input<'_>, bytes: &mut [u8], bound: usize) {
    for _ in 0..input.below(4) {
        let at = usize::from(input.u16()) % bound;
        let new = match input.u8() {
            0xf0.. => {
                let len = input.below(40);
                input.take(len)
            }
            _ => input.take(1),
        };
        for (old, new) in bytes[at..].iter_mut().zip(new) {
            *old = *new;
        }
    }
}

/// What a refusal of Connect has to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refused {
    Status(Status),
    /// Connect Invalid Parameters, at this offset, in the data or the command.
    At(u16, bool),
}

/// Judges the Connect of an admin queue by its fields alone, first offence first.
fn judge(sqe: &Sqe, data: &[u8]) -> Result<(), Refused> {
    let demand = |good: bool, at, in_data| match good {
        true => Ok(()),
        false => Err(Refused::At(at, in_data)),
    };
    if sqe.opcode != fabrics::OPCODE || sqe.fctype() != fabrics::CONNECT {
        return Err(Refused::Status(Status::INVALID_OPCODE));
    }
    let connect = Connect::from_sqe(sqe);
    if connect.recfmt != 0 {
        return Err(Refused::Status(Status::CONNECT_INCOMPATIBLE_FORMAT));
    }
    let most = match connect.qid {
        0 => MAX_ADMIN_QUEUE,
        _ => Limits::default().queue_size,
    };
    let entries = u32::from(connect.sqsize) + 1;
    demand(
        entries >= 2 && entries <= most,
        connect_offset::SQSIZE,
        false,
    )?;
    demand(
        connect.qid == 0 || connect.kato == 0,
        connect_offset::KATO,
        false,
    )?;
    let read = ConnectData::read_from_bytes(data).ok();
    let data = read.ok_or(Refused::At(connect_offset::SGL1, false))?;
    demand(data.hostid != [0; 16], connect_offset::DATA_HOSTID, true)?;
    let cntlid = data.cntlid.get();
    let right = match connect.qid {
        0 => cntlid == CNTLID_DYNAMIC,
        _ => cntlid <= 0xffef,
    };
    demand(right, connect_offset::DATA_CNTLID, true)?;
    let subnqn = Nqn::from_field(&data.subnqn).ok();
    let hostnqn = Nqn::from_field(&data.hostnqn).ok();
    demand(subnqn.is_some(), connect_offset::DATA_SUBNQN, true)?;
    demand(hostnqn.is_some(), connect_offset::DATA_HOSTNQN, true)?;
    let named = subnqn.map(|nqn| nqn.to_string()).unwrap_or_default();
    let discovery = named == Nqn::discovery().to_string();
    let known = discovery || named == SUBNQN || named == CLOSED;
    demand(known, connect_offset::DATA_SUBNQN, true)?;
    demand(!discovery || connect.qid == 0, connect_offset::QID, false)?;
    if named == CLOSED {
        return Err(Refused::Status(Status::CONNECT_INVALID_HOST));
    }
    Ok(())
}

fn assert_refused(cqe: &Cqe, expected: Result<(), Refused>) {
    let status = cqe.status();
    match expected {
        Ok(()) => panic!("a good Connect was refused: {status}"),
        Err(Refused::Status(expected)) => assert_eq!(status.code(), expected.code()),
        Err(Refused::At(at, in_data)) => {
            assert_eq!(status.code(), Status::CONNECT_INVALID_PARAMETERS.code());
            assert_eq!(invalid_parameter_parts(cqe.dw0()), (at, in_data));
        }
    }
}

/// A host's queue, one command at a time.
struct Queue(Driven<dyn HostQueuePair>);

impl Queue {
    /// The answer; `None` when the association is over, as a keep-alive time of the input's choice
    /// may bring about.
    async fn run(&mut self, sqe: Sqe, transfer: Transfer) -> Option<Cqe> {
        let len = transfer.len();
        if let Err(rejected) = self.0.pair().submit(sqe, transfer, 9) {
            assert_eq!(rejected.transfer.len(), len);
            return None;
        }
        let wait = async {
            loop {
                if let Some(done) = self.0.pair().completion() {
                    return Some(done);
                }
                if self.0.pair().ending().is_some() {
                    return None;
                }
                self.0.progress().await;
            }
        };
        let done = timeout(PATIENCE, wait).await.expect("an answer")?;
        assert_eq!(done.token, 9);
        assert_eq!(done.transfer.len(), len, "the memory comes back whole");
        assert!(done.transferred as usize <= len);
        Some(done.cqe)
    }

    /// A fabrics or admin command of the input's making. False when the association is over.
    async fn command(&mut self, input: &mut Input<'_>) -> bool {
        let mut sqe = match input.below(6) {
            0 => property_get(input.u8().into(), size(input)),
            1 => {
                let value = input.pick(&[0, 0x0046_0001, 0x0046_0000, 0x0046_4001, u32::MAX]);
                property_set(input.pick(&[0x14, 0x14, 0x1c, 0, 0x20]), value)
            }
            2 => Sqe::identify(input.u8() % 8, input.below(3) as u32, 0),
            3 => Sqe::set_features(input.u8(), input.u32()),
            4 => {
                let mut sqe = Sqe::new(admin::GET_LOG_PAGE, 1);
                sqe.cdw10 = (u32::from(input.u8() % 8) | u32::from(input.u16()) << 16).into();
                sqe
            }
            _ => Sqe::new(input.u8(), input.below(3) as u32),
        };
        spoil(input, sqe.as_mut_bytes(), 64);
        // Asynchronous Event Requests are not answered.
        if sqe.opcode == admin::ASYNC_EVENT_REQUEST {
            return true;
        }
        let len = input.pick(&[0, 4096, 4096, 4, 512, 8192]);
        let transfer = match len {
            0 => Transfer::None,
            _ => Transfer::In(MemSink::from_bytes(vec![0; len])),
        };
        self.run(sqe, transfer).await.is_some()
    }
}

fn size(input: &mut Input<'_>) -> PropertySize {
    match input.bit() {
        true => PropertySize::Eight,
        false => PropertySize::Four,
    }
}
