//! Cross-Controller Reset: who may have whom ended, and that nobody is told too early that it is done.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use memdesc::MemSource;
use nvmf::backend::{Backend, BackendIo, BackendOp, Counters, Geometry};
use nvmf::controller::Limits;
use nvmf::host::{Association, HostError, HostOptions, LocalEnd, TargetAddress};
use nvmf::spec::cross_reset::{IMMEDIATE, REMOVE_COMPLETED, ccrs};
use nvmf::spec::event::{AsyncEvent, config, notice};
use nvmf::spec::log::{GetLogPage, RETAIN_EVENT, lid};
use nvmf::spec::{ControllerInstance, Nqn, Sqe, Status};
use nvmf::transport::{Registry, Transfer};
use uuid::Uuid;

use crate::rig::{
    HOSTNQN, PATIENCE, Queue, Rig, SUBNQN, admin_connect, connect_data, pattern, ram, subsystem,
};

/// Memory that keeps writes, once begun, until a gate is open: nothing recalls them.
struct Gated {
    ram: Arc<dyn Backend>,
    gate: Arc<Gate>,
}

#[derive(Default)]
struct Gate {
    /// Writes that were begun, and whether they may go on.
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Gate {
    fn open(&self) {
        self.state.lock().unwrap().1 = true;
        self.changed.notify_all();
    }

    fn begun(&self) -> usize {
        self.state.lock().unwrap().0
    }
}

/// A test that fails opens it, too: whoever stands there would stand there for ever.
struct OpenAtLast(Arc<Gate>);

impl Drop for OpenAtLast {
    fn drop(&mut self) {
        self.0.open();
    }
}

impl Backend for Gated {
    fn geometry(&self) -> Geometry {
        self.ram.geometry()
    }

    fn counters(&self) -> &Counters {
        self.ram.counters()
    }

    fn submit(&self, io: &mut BackendIo, op: BackendOp, token: u32) {
        if matches!(op, BackendOp::Write { .. }) {
            let mut state = self.gate.state.lock().unwrap();
            state.0 += 1;
            while !state.1 {
                state = self.gate.changed.wait(state).unwrap();
            }
        }
        self.ram.submit(io, op, token);
    }
}

async fn gated() -> (Rig, Arc<Gate>, OpenAtLast) {
    let gate = Arc::new(Gate::default());
    let backend = Gated {
        ram: ram(4 << 20, 512),
        gate: Arc::clone(&gate),
    };
    let rig = Rig::with(subsystem([Arc::new(backend) as _]), Limits::default()).await;
    let last = OpenAtLast(Arc::clone(&gate));
    (rig, gate, last)
}

/// What Identify Controller says: what it runs as, and how many others it can see to.
async fn identity(admin: &mut Queue) -> (ControllerInstance, u8) {
    let (cqe, id) = admin.receive(Sqe::identify(1, 0, 0), 4096).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    let instance = ControllerInstance {
        cntlid: u16::from_le_bytes([id[78], id[79]]),
        ciu: id[135],
        cirn: u64::from_le_bytes(id[136..144].try_into().unwrap()),
    };
    (instance, id[1807])
}

/// Controllers in the log with how far they are.
async fn log(admin: &mut Queue, flags: u32) -> Vec<(u16, u8, u8)> {
    let part = GetLogPage {
        lid: lid::CROSS_CONTROLLER_RESET,
        offset: 0,
        len: 4096,
    };
    let mut sqe = part.to_sqe();
    sqe.cdw10 = (sqe.cdw10.get() | flags).into();
    let (cqe, page) = admin.receive(sqe, 4096).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    let count = usize::from(u16::from_le_bytes([page[0], page[1]]));
    let entries = page[8..].chunks(8).take(count);
    entries
        .map(|it| (u16::from_le_bytes([it[0], it[1]]), it[2], it[6]))
        .collect()
}

async fn until_done(admin: &mut Queue, of: ControllerInstance) {
    let wait = async {
        while log(admin, 0).await != [(of.cntlid, of.ciu, ccrs::SUCCESS)] {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("done");
}

async fn begun(gate: &Gate) {
    let wait = async {
        while gate.begun() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("a write");
}

fn write(queue: &mut Queue) {
    let data = MemSource::from_bytes(pattern(1, 4096));
    queue.start(Sqe::write(1, 0, 8, false), Transfer::Out(data), 1);
}

async fn settle(queue: &mut Queue) {
    for _ in 0..20 {
        let step = queue.0.progress();
        let _ = tokio::time::timeout(Duration::from_millis(5), step).await;
    }
}

#[tokio::test]
async fn another_controller_of_the_host_is_ended_with_its_queues_and_is_then_unknown() {
    let rig = Rig::start().await;
    let (mut lost, cntlid) = rig.associate().await;
    let mut io = rig.io_queue(cntlid, 1, 32).await;
    let (mut asked, _) = rig.associate().await;
    let (instance, limit) = identity(&mut lost).await;
    assert_eq!((instance.cntlid, limit), (cntlid, 4));
    assert_ne!(instance.ciu, 0);
    let cqe = asked.command(instance.to_sqe()).await;
    assert_eq!(cqe.status(), Status::SUCCESS);
    if cqe.dw0() & IMMEDIATE == 0 {
        until_done(&mut asked, instance).await;
    }
    assert!(lost.closed(PATIENCE).await && io.closed(PATIENCE).await);
    let cqe = asked.command(instance.to_sqe()).await;
    assert_eq!((cqe.status(), cqe.dw0()), (Status::SUCCESS, IMMEDIATE));
    asked.command(Sqe::keep_alive()).await;
}

#[tokio::test]
async fn a_write_that_is_with_the_backend_is_waited_for_and_its_end_is_reported() {
    for connected in [true, false] {
        let (rig, gate, _last) = gated().await;
        let (mut lost, cntlid) = rig.associate().await;
        let mut io = rig.io_queue(cntlid, 1, 32).await;
        let (instance, _) = identity(&mut lost).await;
        let (mut asked, _) = rig.associate().await;
        let set = Sqe::set_features(0x0b, config::CROSS_CONTROLLER_RESET);
        assert_eq!(asked.command(set).await.status(), Status::SUCCESS);
        write(&mut io);
        settle(&mut io).await;
        begun(&gate).await;
        if !connected {
            drop((lost, io));
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let cqe = asked.command(instance.to_sqe()).await;
        assert_eq!((cqe.status(), cqe.dw0()), (Status::SUCCESS, 0));
        let again = asked.command(instance.to_sqe()).await.status();
        assert_eq!(again.code(), Status::CROSS_RESET_IN_PROGRESS.code());
        asked.start(Sqe::async_event_request(), Transfer::None, 7);
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let entries = log(&mut asked, REMOVE_COMPLETED | RETAIN_EVENT).await;
            let expected = (instance.cntlid, instance.ciu, ccrs::IN_PROGRESS);
            assert_eq!(entries, [expected], "the write is still with the backend");
        }
        gate.open();
        let event = asked.finish().await;
        assert_eq!(event.token, 7);
        let event = AsyncEvent::from_dw0(event.cqe.dw0());
        assert_eq!(
            (event.info, event.page),
            (notice::CROSS_CONTROLLER_RESET, 0x1e)
        );
        let done = [(instance.cntlid, instance.ciu, ccrs::SUCCESS)];
        assert_eq!(log(&mut asked, REMOVE_COMPLETED).await, done);
        assert_eq!(log(&mut asked, 0).await, []);
        // What was waited for is there, and nothing comes after it.
        let (_admin, cntlid) = rig.associate().await;
        let mut io = rig.io_queue(cntlid, 1, 32).await;
        let (_, data) = io.receive(Sqe::read(1, 0, 8), 4096).await;
        assert!(data == pattern(1, 4096));
    }
}

#[tokio::test]
async fn itself_what_cannot_be_and_another_host_s_controller_are_refused() {
    let rig = Rig::start().await;
    let (mut asked, _) = rig.associate().await;
    let (itself, _) = identity(&mut asked).await;
    let invalid = Status::INVALID_FIELD.do_not_retry();
    let cntlid = 0xfff5;
    for instance in [itself, ControllerInstance { cntlid, ..itself }] {
        assert_eq!(asked.command(instance.to_sqe()).await.status(), invalid);
    }
    let nqn = Nqn::new("nqn.2026-01.org.example:another").unwrap();
    for (hostid, hostnqn) in [([9; 16], None), (connect_data().hostid, Some(nqn))] {
        let mut data = connect_data();
        data.hostid = hostid;
        if let Some(nqn) = hostnqn {
            data.hostnqn = nqn.to_field();
        }
        let mut other = rig.dial(32).await;
        let cqe = other.connect(admin_connect(), &data).await;
        assert_eq!(cqe.status(), Status::SUCCESS);
        other.enable().await;
        let (instance, _) = identity(&mut other).await;
        assert_eq!(asked.command(instance.to_sqe()).await.status(), invalid);
        assert_eq!(
            other.command(Sqe::keep_alive()).await.status(),
            Status::SUCCESS
        );
        // By another number it is another one, which is gone.
        let guessed = ControllerInstance {
            cirn: instance.cirn ^ 1,
            ..instance
        };
        assert_eq!(asked.command(guessed.to_sqe()).await.dw0(), IMMEDIATE);
        assert_eq!(
            other.command(Sqe::keep_alive()).await.status(),
            Status::SUCCESS
        );
    }
    assert_eq!(log(&mut asked, 0).await, []);
}

#[tokio::test]
async fn a_controller_that_is_enabled_again_runs_as_another_one() {
    let rig = Rig::start().await;
    let (mut admin, _) = rig.associate().await;
    let (mut asked, _) = rig.associate().await;
    let (first, _) = identity(&mut admin).await;
    admin
        .set_cc(nvmf::spec::property::Cc::enable(0).0 & !1)
        .await;
    admin.until(|csts| !csts.rdy()).await;
    admin.enable().await;
    let (second, _) = identity(&mut admin).await;
    assert_eq!(first.cntlid, second.cntlid);
    assert_ne!(first.ciu, second.ciu);
    assert_ne!(first.cirn, second.cirn);
    assert_eq!(asked.command(first.to_sqe()).await.dw0(), IMMEDIATE);
    let alive = admin.command(Sqe::keep_alive()).await;
    assert_eq!(alive.status(), Status::SUCCESS, "it was not meant");
}

#[tokio::test]
async fn where_none_are_offered_nothing_speaks_of_them() {
    let limits = Limits {
        cross_resets: 0,
        ..Limits::default()
    };
    let rig = Rig::with(subsystem([ram(4 << 20, 512)]), limits).await;
    let (mut asked, _) = rig.associate().await;
    let (instance, limit) = identity(&mut asked).await;
    assert_eq!((instance.ciu, instance.cirn, limit), (0, 0, 0));
    let cqe = asked.command(instance.to_sqe()).await;
    assert_eq!(cqe.status(), Status::INVALID_OPCODE.do_not_retry());
}

async fn host(rig: &Rig, registry: &Registry) -> Association {
    let target = TargetAddress {
        host: rig.address.ip().to_string(),
        port: rig.address.port(),
        subnqn: Nqn::new(SUBNQN).unwrap(),
        local: LocalEnd::default(),
    };
    let options = HostOptions::new(Nqn::new(HOSTNQN).unwrap(), Uuid::from_u128(7));
    Association::connect(registry, &target, &options)
        .await
        .unwrap()
}

#[tokio::test]
async fn the_host_role_learns_that_it_is_done_when_it_is_and_gives_up_in_time() {
    let (rig, gate, _last) = gated().await;
    let registry = Registry::with_defaults();
    let lost = host(&rig, &registry).await;
    let asked = host(&rig, &registry).await;
    assert_eq!(asked.controller().cross_resets, 4);
    let instance = lost.controller().instance.unwrap();
    let mut pairs = lost.open_io_queues(&registry).await.unwrap();
    let mut io = Queue(nvmf::transport::drive::Driven::new(pairs.remove(0)).unwrap());
    write(&mut io);
    settle(&mut io).await;
    begun(&gate).await;
    let inquiry = asked.inquiry();
    let within = Duration::from_millis(300);
    let late = inquiry.reset_other(instance, within).await.unwrap_err();
    assert!(matches!(late, HostError::TimedOut { .. }), "{late}");
    // Several that ask take nothing from each other.
    let both = async {
        tokio::join!(
            inquiry.reset_other(instance, PATIENCE),
            inquiry.reset_other(instance, PATIENCE),
        )
    };
    let mut both = std::pin::pin!(both);
    let early = tokio::time::timeout(Duration::from_millis(300), &mut both);
    assert!(early.await.is_err(), "the write is still with the backend");
    gate.open();
    let done = both.await;
    done.0.unwrap();
    done.1.unwrap();
    inquiry.reset_other(instance, PATIENCE).await.unwrap();
    let own = asked.controller().instance.unwrap();
    let refused = inquiry.reset_other(own, PATIENCE).await.unwrap_err();
    assert!(matches!(refused, HostError::Command { .. }), "{refused}");
}
