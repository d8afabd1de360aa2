//! Faulty storage as hosts see it: statuses, delays that hold nothing else up, and no answer at all.

use std::sync::Arc;
use std::time::{Duration, Instant};

use memdesc::{MemSink, MemSource};
use nvmf::backend::fault::{Action, Fault, Operations};
use nvmf::backend::powercut::Survivors;
use nvmf::backend::{Backend, FaultBackend, PowerCutBackend};
use nvmf::controller::Limits;
use nvmf::spec::opcode::nvm;
use nvmf::spec::{Sqe, Status};
use nvmf::transport::Transfer;

use crate::rig::{PATIENCE, Queue, Rig, pattern, ram, subsystem};

struct Bench {
    rig: Rig,
    admin: Queue,
    queue: Queue,
}

/// A namespace of memory with faults, and a queue to it.
async fn bench(faults: impl IntoIterator<Item = Fault>) -> Bench {
    let backend = Arc::new(FaultBackend::new(ram(4 << 20, 512), faults)) as Arc<dyn Backend>;
    let rig = Rig::with(subsystem([backend]), Limits::default()).await;
    let (admin, cntlid) = rig.associate().await;
    let queue = rig.io_queue(cntlid, 1, 32).await;
    Bench { rig, admin, queue }
}

fn rule(action: Action, operations: Operations) -> Fault {
    Fault {
        operations,
        ..Fault::new(action)
    }
}

fn into(len: usize) -> Transfer {
    Transfer::In(MemSink::from_bytes(vec![0xee; len]))
}

#[tokio::test]
async fn a_host_is_told_the_status_of_the_rule_and_the_next_command_succeeds() {
    let status = Status::NAMESPACE_NOT_READY.do_not_retry();
    let once = |action, operations| Fault {
        count: Some(1),
        ..rule(action, operations)
    };
    let Bench {
        rig,
        admin: _admin,
        mut queue,
    } = bench([
        once(Action::Error(Some(status)), Operations::READ),
        once(Action::Error(None), Operations::WRITE),
        once(Action::Error(None), Operations::FLUSH),
        once(Action::Error(None), Operations::COMPARE),
        once(Action::Error(None), Operations::WRITE_ZEROES),
    ])
    .await;
    let data = pattern(1, 4096);
    let compare = Sqe {
        opcode: nvm::COMPARE,
        ..Sqe::read(1, 0, 8)
    };
    for (round, ok) in [(0, false), (1, true)] {
        let expected = |status| if ok { Status::SUCCESS } else { status };
        let write = queue.send(Sqe::write(1, 0, 8, false), &data).await;
        assert_eq!(write.status(), expected(Status::WRITE_FAULT), "{round}");
        let (read, got) = queue.receive(Sqe::read(1, 0, 8), 4096).await;
        assert_eq!(read.status(), expected(status));
        if ok {
            assert!(got == data);
        }
        let same = queue.send(compare, &data).await;
        assert_eq!(same.status(), expected(Status::UNRECOVERED_READ_ERROR));
        for sqe in [Sqe::flush(1), Sqe::write_zeroes(1, 100, 8, true, false)] {
            assert_eq!(
                queue.command(sqe).await.status(),
                expected(Status::WRITE_FAULT)
            );
        }
    }
    let counts = rig.backend(1).counters().read();
    assert_eq!((counts.errors, counts.flushes), (5, 1));
    rig.stop().await;
}

#[tokio::test]
async fn a_delayed_command_holds_up_no_other() {
    let time = Duration::from_millis(150);
    let slow = Action::Delay {
        least: time,
        most: time,
    };
    let slow = Fault {
        blocks: Some(0..=0),
        ..rule(slow, Operations::READ)
    };
    let Bench {
        rig,
        mut admin,
        mut queue,
    } = bench([slow]).await;
    let data = pattern(2, 512);
    queue.send(Sqe::write(1, 0, 1, false), &data).await;
    let began = Instant::now();
    queue.start(Sqe::read(1, 0, 1), into(512), 1);
    for lba in 1..20 {
        queue.start(Sqe::read(1, lba, 1), into(512), 1 + lba);
    }
    for _ in 1..20 {
        let done = queue.finish().await;
        assert!(done.token > 1, "the slow one is not among the others");
    }
    admin.command(Sqe::keep_alive()).await;
    let done = queue.finish().await;
    assert!(began.elapsed() >= time);
    assert_eq!((done.token, done.cqe.status()), (1, Status::SUCCESS));
    let Transfer::In(sink) = done.transfer else {
        panic!("the sink comes back");
    };
    assert!(sink.into_parts().1.unwrap() == data);
    rig.stop().await;
}

#[tokio::test]
async fn a_command_that_hangs_goes_with_its_queue_and_the_controller_has_room_again() {
    let limits = Limits {
        max_connections: 2,
        ..Limits::default()
    };
    let hang = rule(Action::Hang, Operations::READ | Operations::WRITE);
    let backend = FaultBackend::new(ram(4 << 20, 512), [hang]);
    let backend = Arc::new(backend) as Arc<dyn Backend>;
    let rig = Rig::with(subsystem([backend]), limits).await;
    for _ in 0..3 {
        // The admin queue and the I/O queue are all that the controller has room for, so a lane
        // that did not end would keep the next host out.
        let (admin, mut queue) = connected(&rig).await;
        queue.start(Sqe::read(1, 0, 8), into(4096), 1);
        let source = Transfer::Out(MemSource::from_bytes(vec![1; 65536]));
        queue.start(Sqe::write(1, 8, 128, false), source, 2);
        assert_eq!(queue.command(Sqe::flush(1)).await.status(), Status::SUCCESS);
        drop((queue, admin));
    }
    rig.stop().await;
}

#[tokio::test]
async fn a_host_that_flushes_or_forces_its_writes_has_them_after_a_power_cut() {
    let disk = Arc::new(PowerCutBackend::new(ram(4 << 20, 512), 1 << 20, 1));
    let backend = Arc::clone(&disk) as Arc<dyn Backend>;
    let rig = Rig::with(subsystem([backend]), Limits::default()).await;
    let (mut admin, cntlid) = rig.associate().await;
    let (_, identify) = admin.receive(Sqe::identify(1, 0, 0), 4096).await;
    assert_eq!(identify[525] & 1, 1, "VWC: there is a volatile write cache");
    let mut queue = rig.io_queue(cntlid, 1, 32).await;
    let data = [1, 2, 3].map(|seed| pattern(seed, 4096));
    for (data, (lba, fua)) in data.iter().zip([(0, false), (8, true), (16, false)]) {
        if lba == 8 {
            assert_eq!(queue.command(Sqe::flush(1)).await.status(), Status::SUCCESS);
        }
        let cqe = queue.send(Sqe::write(1, lba, 8, fua), data).await;
        assert_eq!(cqe.status(), Status::SUCCESS);
    }
    let (_, read) = queue.receive(Sqe::read(1, 0, 24), 3 * 4096).await;
    assert!(read == data.concat());
    let lost = disk.cut(Survivors::None).unwrap().lost;
    assert_eq!(lost, (16..24).collect::<Vec<_>>());
    let (_, read) = queue.receive(Sqe::read(1, 0, 24), 3 * 4096).await;
    assert!(read == [&data[0][..], &data[1], &[0; 4096]].concat());
    rig.stop().await;
}

/// An association with an I/O queue, as soon as there is room for both.
async fn connected(rig: &Rig) -> (Queue, Queue) {
    let deadline = Instant::now() + PATIENCE;
    while rig.target.associations() > 0 {
        assert!(Instant::now() < deadline, "the last one does not end");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // The lane lets its place go a little later than the association.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let (admin, cntlid) = rig.associate().await;
    let queue = rig.io_queue(cntlid, 1, 32).await;
    (admin, queue)
}
