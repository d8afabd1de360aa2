//! Sessions that go on elsewhere: from a record that is as it should be, and from records that hold anything.

use std::sync::mpsc;

use proptest::prelude::*;
use vhost::vhost_user::message::VhostUserInflight;

use super::*;
use crate::handover::{NotHandedOver, Record, Recorded, RestoreError};
use crate::interrupt::Interrupt;

/// A front-end whose session can be interrupted, and what gives the session then.
struct Interruptible {
    bench: Bench,
    interrupt: Interrupt,
    session: mpsc::Receiver<Session>,
}

/// Serves a session until it is interrupted, and gives it then.
fn serve_until(
    mut session: Session,
    interrupt: &Interrupt,
) -> (
    mpsc::Receiver<Session>,
    JoinHandle<Result<(), SessionError>>,
) {
    let (given, give) = mpsc::channel();
    let interrupt = interrupt.clone();
    let thread = std::thread::spawn(move || {
        if session.serve(&interrupt)? == Served::Interrupted {
            given.send(session).expect("somebody waits");
        }
        Ok(())
    });
    (give, thread)
}

impl Interruptible {
    fn new() -> Self {
        let mut bench = Bench::new();
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let rings: Arc<dyn Rings> = Arc::clone(&bench.worker) as _;
        let session = Session::new(theirs, Arc::clone(&bench.device), rings).expect("a session");
        let interrupt = Interrupt::new().expect("an event");
        let (session, thread) = serve_until(session, &interrupt);
        ours.set_read_timeout(Some(Duration::from_secs(10)))
            .expect("a time-out");
        bench.raw = ours.try_clone().expect("a clone");
        bench.front = Frontend::from_stream(ours, 256);
        bench.thread = thread;
        Self {
            bench,
            interrupt,
            session,
        }
    }

    fn interrupted(&self) -> Session {
        self.interrupt.raise();
        let patience = Duration::from_secs(10);
        self.session.recv_timeout(patience).expect("interrupted")
    }
}

/// A front-end that has said all that one can say, and the record of its session.
fn recorded() -> (Interruptible, Session, Record) {
    let mut front_end = Interruptible::new();
    let bench = &mut front_end.bench;
    bench.negotiate();
    bench.share_memory();
    let asked = VhostUserInflight::new(0, 0, 4, SIZE);
    let (told, file) = bench.front.get_inflight_fd(&asked).expect("a region");
    let given = bench.front.set_inflight_fd(&told, file.as_raw_fd());
    given.expect("SET_INFLIGHT_FD");
    bench.set_writeback(0).expect("SET_CONFIG");
    let (channel, _other) = UnixStream::pair().expect("a pair");
    let given = bench.front.set_backend_request_fd(&channel);
    given.expect("SET_BACKEND_REQ_FD");
    bench.set_up_ring(0);
    bench.front.set_vring_enable(0, true).expect("enable");
    let mut session = front_end.interrupted();
    let record = session.pause().expect("a record");
    (front_end, session, record)
}

#[test]
fn a_session_goes_on_elsewhere_as_it_was() {
    let (mut front_end, session, record) = recorded();
    assert_eq!(front_end.bench.worker.running(), [0; 0]);
    let stream = session.stream().expect("a socket");
    session.leave();
    let bench = &mut front_end.bench;
    assert_eq!(bench.worker.running(), [0; 0]);
    let worker = Arc::<Worker>::default();
    let rings: Arc<dyn Rings> = Arc::clone(&worker) as _;
    let device = Device::new(options());
    let restored = Session::restore(stream, &record.setup, Arc::clone(&device), rings);
    let restored = restored.expect("a session");
    assert_eq!(
        worker.running(),
        [0; 0],
        "no ring runs before the others let go"
    );
    bench.post_flush();
    let session = restored.start(&record.start).expect("a session");
    assert_eq!(worker.running(), [0]);
    assert_eq!(worker.held(0), 1, "what was posted meanwhile is found");
    let (_given, thread) = serve_until(session, &front_end.interrupt);
    bench.thread = thread;
    assert_eq!(
        bench.config(32, 1).expect("GET_CONFIG"),
        [0],
        "the cache mode"
    );
    bench.goes_on();
    // Acknowledgements go on, and so do refusals.
    bench.refused(FrontendReq::SET_VRING_NUM as u32, &state(0, 12));
    worker.with(0, Lane::finish);
    let base = bench.front.get_vring_base(0).expect("GET_VRING_BASE");
    assert_eq!(base, 1);
    assert_eq!(worker.running(), [0; 0]);
}

#[test]
fn a_session_that_stays_goes_on_and_one_with_requests_in_flight_is_not_recorded() {
    let (mut front_end, mut session, _record) = recorded();
    session.resume();
    let bench = &mut front_end.bench;
    assert_eq!(bench.worker.running(), [0]);
    bench.post_flush();
    bench.kick.write(1).expect("a kick");
    bench.worker.with(0, Lane::scan);
    let busy = session.pause();
    assert!(matches!(busy, Err(NotHandedOver::Busy(_))));
    assert_eq!(bench.worker.running(), [0]);
    bench.worker.with(0, Lane::finish);
    assert!(session.pause().is_ok());
    session.resume();
    let (_given, thread) = serve_until(session, &front_end.interrupt);
    front_end.bench.thread = thread;
    front_end.bench.goes_on();
}

#[test]
fn messages_that_would_be_waited_for_are_refused() {
    let (_front_end, session, record) = recorded();
    let good = &record.setup[0];
    let cut = |bytes: &[u8]| Recorded {
        bytes: bytes.to_vec(),
        files: Vec::new(),
    };
    let more = cut(&[1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0]);
    let unknown = cut(&[99, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let answer = cut(&[1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
    for bad in [cut(&[]), cut(&good.bytes[..11]), more, unknown, answer] {
        let stream = session.stream().expect("a socket");
        let worker: Arc<dyn Rings> = Arc::<Worker>::default();
        let restored = Session::restore(stream, &[bad], Device::new(options()), worker);
        assert!(matches!(
            restored.err(),
            Some(RestoreError::Malformed { number: 1, .. })
        ));
    }
    session.leave();
}

/// What is done to a record.
#[derive(Debug, Clone)]
enum Damage {
    Flip(prop::sample::Index, prop::sample::Index, u8),
    Leave(prop::sample::Index),
    Swap(prop::sample::Index, prop::sample::Index),
    NoFiles(prop::sample::Index),
    Twice(prop::sample::Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        4 => (at(), at(), any::<u8>()).prop_map(|(at, byte, value)| Damage::Flip(at, byte, value)),
        1 => at().prop_map(Damage::Leave),
        1 => (at(), at()).prop_map(|(a, b)| Damage::Swap(a, b)),
        1 => at().prop_map(Damage::NoFiles),
        1 => at().prop_map(Damage::Twice),
    ]
}

fn apply(damage: &Damage, messages: &mut Vec<Recorded>) {
    let len = messages.len();
    if len == 0 {
        return;
    }
    match damage {
        Damage::Flip(at, byte, value) => {
            let bytes = &mut messages[at.index(len)].bytes;
            let byte = byte.index(bytes.len());
            bytes[byte] = *value;
        }
        Damage::Leave(at) => drop(messages.remove(at.index(len))),
        Damage::Swap(a, b) => messages.swap(a.index(len), b.index(len)),
        Damage::NoFiles(at) => messages[at.index(len)].files.clear(),
        Damage::Twice(at) => {
            let message = messages[at.index(len)].clone();
            messages.push(message);
        }
    }
}

#[test]
fn whatever_a_record_holds_a_session_comes_of_it_or_an_error() {
    let (_front_end, session, record) = recorded();
    proptest!(ProptestConfig::with_cases(200), |(setup in prop::collection::vec(damage(), 0..4),
            start in prop::collection::vec(damage(), 0..3))| {
        let mut damaged = record.clone();
        setup.iter().for_each(|damage| apply(damage, &mut damaged.setup));
        start.iter().for_each(|damage| apply(damage, &mut damaged.start));
        let (ours, _front) = UnixStream::pair().expect("a pair");
        let worker = Arc::<Worker>::default();
        let rings: Arc<dyn Rings> = Arc::clone(&worker) as _;
        let restored = Session::restore(ours, &damaged.setup, Device::new(options()), rings);
        let started = restored.and_then(|restored| restored.start(&damaged.start));
        drop(started);
        prop_assert_eq!(worker.running(), [0; 0]);
    });
    session.leave();
}
