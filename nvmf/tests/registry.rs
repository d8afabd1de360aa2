//! The registry: a third transport beside TCP and loopback, who is asked first, and how one leaves.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use memdesc::MemSink;
use nvmf::spec::{Cqe, Sqe, Status, trtype};
use nvmf::transport::loopback::{self, Loopback};
use nvmf::transport::registry::Lease;
use nvmf::transport::{
    Command, CommandId, CommandTag, Completion, Connection, ControllerEvent, ControllerQueuePair,
    Counters, Ending, HostQueuePair, Interest, Opening, QueuePair, QueueParams, Ready, Registry,
    RegistryError, Rejected, RejectedReason, Transfer, Transport,
};

const LONG: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(20);
/// A type that neither TCP nor loopback has.
const OTHER: u8 = 0xf0;

fn params(connection: Connection) -> QueueParams {
    QueueParams {
        admin: false,
        queue_size: 8,
        sq_flow_control: false,
        in_capsule_limit: 0,
        connection,
        lease: Lease::default(),
    }
}

/// A connection that no transport of the crate knows.
#[derive(Debug)]
struct Private(loopback::Connection);

/// A transport that moves capsules over connections of its own kind.
struct Third;

fn unwrapped(params: QueueParams<Private>) -> Box<QueueParams> {
    Box::new(QueueParams {
        admin: params.admin,
        queue_size: params.queue_size,
        sq_flow_control: params.sq_flow_control,
        in_capsule_limit: params.in_capsule_limit,
        connection: params.connection.0.into(),
        lease: params.lease,
    })
}

impl Transport for Third {
    fn name(&self) -> &'static str {
        "third"
    }

    fn trtype(&self) -> u8 {
        trtype::TCP
    }

    fn priority(&self) -> i32 {
        10
    }

    fn open_host(&self, params: Box<QueueParams>) -> Opening<dyn HostQueuePair> {
        match params.over() {
            Ok(params) => Loopback.open_host(unwrapped(params)),
            Err(params) => Opening::Declined(params),
        }
    }

    fn open_controller(&self, params: Box<QueueParams>) -> Opening<dyn ControllerQueuePair> {
        match params.over() {
            Ok(params) => Loopback.open_controller(unwrapped(params)),
            Err(params) => Opening::Declined(params),
        }
    }
}

/// A queue pair that does nothing, and counts while it is there.
struct Dummy {
    socket: UnixStream,
    live: Arc<AtomicUsize>,
    _lease: Lease,
}

impl Dummy {
    fn new(live: &Arc<AtomicUsize>, lease: Lease) -> Box<Self> {
        live.fetch_add(1, SeqCst);
        Box::new(Self {
            socket: UnixStream::pair().unwrap().0,
            live: Arc::clone(live),
            _lease: lease,
        })
    }
}

impl Drop for Dummy {
    fn drop(&mut self) {
        // Before the lease goes.
        self.live.fetch_sub(1, SeqCst);
    }
}

impl QueuePair for Dummy {
    fn interest(&self) -> Interest<'_> {
        Interest {
            fd: self.socket.as_fd(),
            readable: false,
            writable: false,
        }
    }

    fn progress(&mut self, _ready: &mut Ready) -> bool {
        false
    }

    fn flush(&mut self, _ready: &mut Ready) -> bool {
        false
    }

    fn ending(&self) -> Option<&Ending> {
        None
    }

    fn end(&mut self) {}

    fn counters(&self) -> Counters {
        Counters::default()
    }
}

impl HostQueuePair for Dummy {
    fn submit(&mut self, _sqe: Sqe, transfer: Transfer, _: u64) -> Result<CommandId, Rejected> {
        let reason = RejectedReason::Full;
        Err(Rejected { transfer, reason })
    }

    fn room(&self) -> usize {
        0
    }

    fn outstanding(&self) -> usize {
        0
    }

    fn completion(&mut self) -> Option<Completion> {
        None
    }
}

impl ControllerQueuePair for Dummy {
    fn event(&mut self) -> Option<ControllerEvent> {
        None
    }

    fn fetch(&mut self, _: CommandTag, _: u32, sink: MemSink) -> Result<(), (MemSink, Status)> {
        Err((sink, Status::INTERNAL_ERROR))
    }

    fn send(
        &mut self,
        _tag: CommandTag,
        _offset: u32,
        source: memdesc::MemSource,
        _last: bool,
    ) -> Result<(), (memdesc::MemSource, Status)> {
        Err((source, Status::INTERNAL_ERROR))
    }

    fn respond(&mut self, _tag: CommandTag, _cqe: Cqe) {}

    fn outstanding(&self) -> usize {
        0
    }

    fn set_sq_flow_control(&mut self, _on: bool, _queue_size: u32) {}
}

/// A transport that says when it is asked, and takes everything or nothing.
struct Asked {
    name: &'static str,
    priority: i32,
    takes: bool,
    log: Arc<Mutex<Vec<String>>>,
    live: Arc<AtomicUsize>,
    /// To look at how often it is counted while it is asked.
    registry: Weak<Registry>,
    /// Another transport, which it takes out of the registry when it is asked.
    removes: Option<&'static str>,
}

impl Asked {
    fn new(name: &'static str, priority: i32, takes: bool) -> Self {
        Self {
            name,
            priority,
            takes,
            log: Arc::default(),
            live: Arc::default(),
            registry: Weak::new(),
            removes: None,
        }
    }

    fn asked(&self, role: &str) -> bool {
        let name = self.name;
        let registry = self.registry.upgrade();
        if let (Some(other), Some(registry)) = (self.removes, &registry) {
            registry.remove(other).unwrap();
        }
        let counted = registry.map(|all| all.queue_pairs(name));
        let counted = counted.map_or(String::new(), |counted| format!(", counted {counted}"));
        self.log
            .lock()
            .unwrap()
            .push(format!("{name} {role}{counted}"));
        self.takes
    }
}

impl Transport for Asked {
    fn name(&self) -> &'static str {
        self.name
    }

    fn trtype(&self) -> u8 {
        OTHER
    }

    fn priority(&self) -> i32 {
        self.priority
    }

    fn open_host(&self, params: Box<QueueParams>) -> Opening<dyn HostQueuePair> {
        match self.asked("host") {
            true => Opening::Opened(Dummy::new(&self.live, params.lease)),
            false => Opening::Declined(params),
        }
    }

    fn open_controller(&self, params: Box<QueueParams>) -> Opening<dyn ControllerQueuePair> {
        match self.asked("controller") {
            true => Opening::Opened(Dummy::new(&self.live, params.lease)),
            false => Opening::Declined(params),
        }
    }
}

fn other() -> QueueParams {
    params(Connection::new(()))
}

fn open(registry: &Registry) -> Result<Box<dyn HostQueuePair>, RegistryError> {
    registry.open_host(OTHER, other())
}

fn error<T: ?Sized>(result: Result<Box<T>, RegistryError>) -> RegistryError {
    match result {
        Ok(_) => panic!("a queue pair was opened"),
        Err(error) => error,
    }
}

/// The registry of the crate, with one transport that takes everything of type [`OTHER`].
fn with_one() -> Registry {
    let registry = Registry::with_defaults();
    registry.add(Box::new(Asked::new("one", 0, true))).unwrap();
    registry
}

fn ready() -> Ready {
    Ready {
        readable: true,
        writable: true,
    }
}

#[test]
fn a_third_transport_carries_commands_for_both_roles_and_is_counted() {
    let registry = Registry::with_defaults();
    registry.add(Box::new(Third)).unwrap();
    let (host, controller) = loopback::Connection::pair().unwrap();
    let host = registry.open_host(trtype::TCP, params(Connection::new(Private(host))));
    let controller =
        registry.open_controller(trtype::TCP, params(Connection::new(Private(controller))));
    let (mut host, mut controller) = (host.unwrap(), controller.unwrap());
    assert_eq!(registry.queue_pairs("third"), 2);
    assert_eq!(registry.queue_pairs("tcp"), 0);

    host.submit(Sqe::flush(1), Transfer::None, 5).unwrap();
    host.flush(&mut ready());
    controller.progress(&mut ready());
    let Some(ControllerEvent::Command(Command { tag, .. })) = controller.event() else {
        panic!("no command");
    };
    controller.respond(tag, Cqe::default());
    controller.flush(&mut ready());
    host.progress(&mut ready());
    assert_eq!(host.completion().unwrap().token, 5);

    drop(controller);
    assert_eq!(registry.queue_pairs("third"), 1);
    drop(host);
    assert_eq!(registry.queue_pairs("third"), 0);
}

#[test]
fn a_transport_declines_connections_of_another_kind_as_they_were() {
    let (host, _controller) = loopback::Connection::pair().unwrap();
    let Opening::Declined(back) = Third.open_host(Box::new(params(host.into()))) else {
        panic!("not its kind");
    };
    assert_eq!(back.queue_size, 8);
    assert!(back.connection.get::<loopback::Connection>().is_some());
    assert!(back.connection.get::<Private>().is_none());
    assert!(format!("{:?}", back.connection).contains("loopback"));
    let Opening::Opened(_) = Loopback.open_host(back) else {
        panic!("its kind");
    };
}

#[test]
fn the_highest_priority_is_asked_first_and_equal_ones_in_order_of_arrival() {
    let registry = Arc::new(Registry::with_defaults());
    let log = Arc::new(Mutex::new(Vec::new()));
    for (name, priority, takes) in [
        ("a", 0, false),
        ("b", 5, false),
        ("c", 0, true),
        ("d", 5, false),
        ("e", -1, true),
    ] {
        let asked = Asked {
            log: Arc::clone(&log),
            registry: Arc::downgrade(&registry),
            ..Asked::new(name, priority, takes)
        };
        registry.add(Box::new(asked)).unwrap();
    }
    let host = registry.open_host(OTHER, other()).unwrap();
    let controller = registry.open_controller(OTHER, other()).unwrap();
    assert_eq!(
        *log.lock().unwrap(),
        [
            "b host, counted 1",
            "d host, counted 1",
            "a host, counted 1",
            "c host, counted 1",
            "b controller, counted 1",
            "d controller, counted 1",
            "a controller, counted 1",
            "c controller, counted 2",
        ],
        "counted while it is asked"
    );
    let counts = |name| registry.queue_pairs(name);
    assert_eq!(["a", "b", "c", "d", "e"].map(counts), [0, 0, 2, 0, 0]);
    drop((host, controller));
    assert_eq!(counts("c"), 0);
}

#[test]
fn a_type_that_is_unknown_is_told_from_one_that_declines() {
    let registry = Registry::with_defaults();
    let unknown = RegistryError::UnknownType(OTHER);
    assert_eq!(error(registry.open_host(OTHER, other())), unknown);
    assert_eq!(error(registry.open_controller(OTHER, other())), unknown);
    let declining = Asked::new("declining", 0, false);
    registry.add(Box::new(declining)).unwrap();
    let declined = RegistryError::Declined(OTHER);
    assert_eq!(error(registry.open_host(OTHER, other())), declined);
    assert_eq!(error(registry.open_controller(OTHER, other())), declined);
    assert_ne!(unknown.to_string(), declined.to_string());
    registry.remove("declining").unwrap();
    assert_eq!(error(open(&registry)), unknown);
    assert_eq!(error(Registry::new().open_host(trtype::TCP, other())), {
        RegistryError::UnknownType(trtype::TCP)
    });
}

#[test]
fn a_name_is_there_once() {
    let registry = with_one();
    let again = registry.add(Box::new(Asked::new("one", 7, true)));
    assert_eq!(again, Err(RegistryError::NameTaken("one")));
    let gone = RegistryError::UnknownName("two".to_owned());
    assert_eq!(registry.remove("two"), Err(gone));
    registry.remove("one").unwrap();
    registry
        .add(Box::new(Asked::new("one", 7, true)))
        .expect("the name is free again");
}

#[test]
fn a_transport_in_use_is_busy_and_goes_on_working() {
    let registry = with_one();
    let busy = |queue_pairs| {
        let name = "one";
        Err(RegistryError::Busy { name, queue_pairs })
    };
    let first = open(&registry).unwrap();
    assert_eq!(registry.remove("one"), busy(1));
    let second = open(&registry).expect("nothing has changed");
    assert_eq!(registry.remove("one"), busy(2));
    drop((first, second));
    assert_eq!(registry.remove("one"), Ok(()));
}

#[test]
fn a_transport_that_has_left_while_another_was_asked_is_not_used() {
    let registry = Arc::new(with_one());
    let first = Asked {
        registry: Arc::downgrade(&registry),
        removes: Some("one"),
        ..Asked::new("first", 1, false)
    };
    registry.add(Box::new(first)).unwrap();
    assert_eq!(error(open(&registry)), RegistryError::Declined(OTHER));
    assert_eq!(registry.queue_pairs("one"), 0);
}

#[test]
fn queue_pairs_may_outlive_their_registry() {
    let registry = with_one();
    let pair = open(&registry).unwrap();
    drop(registry);
    assert_eq!(pair.room(), 0);
    drop(pair);
}

#[tokio::test]
async fn leaving_waits_for_the_last_queue_pair_on_whatever_thread_it_goes() {
    let registry = Arc::new(with_one());
    let pairs = [open(&registry).unwrap(), open(&registry).unwrap()];
    let leaver = {
        let registry = Arc::clone(&registry);
        tokio::spawn(async move { registry.leave("one", LONG).await })
    };
    let dropped = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&dropped);
    let worker = std::thread::spawn(move || {
        for pair in pairs {
            std::thread::sleep(SHORT);
            flag.store(true, SeqCst);
            drop(pair);
        }
    });
    assert_eq!(leaver.await.unwrap(), Ok(()));
    assert!(dropped.load(SeqCst));
    worker.join().unwrap();
    assert_eq!(error(open(&registry)), RegistryError::UnknownType(OTHER));
}

#[tokio::test]
async fn a_leaving_transport_is_offered_nothing_and_the_next_one_is_asked() {
    let registry = Arc::new(with_one());
    let pair = open(&registry).unwrap();
    let leaver = {
        let registry = Arc::clone(&registry);
        tokio::spawn(async move { registry.leave("one", LONG).await })
    };
    tokio::task::yield_now().await;
    assert_eq!(error(open(&registry)), RegistryError::Leaving(OTHER));
    let next = Asked::new("next", -1, true);
    registry.add(Box::new(next)).unwrap();
    let on_next = open(&registry).unwrap();
    assert_eq!(registry.queue_pairs("next"), 1);
    assert_eq!(registry.queue_pairs("one"), 1);
    drop(pair);
    assert_eq!(leaver.await.unwrap(), Ok(()));
    drop(on_next);
}

#[tokio::test]
async fn leaving_that_takes_too_long_or_is_given_up_changes_nothing_and_can_be_tried_again() {
    let registry = with_one();
    let pair = open(&registry).unwrap();
    let (name, queue_pairs) = ("one", 1);
    let busy = Err(RegistryError::Busy { name, queue_pairs });
    assert_eq!(registry.leave("one", SHORT).await, busy);
    assert_eq!(registry.leave("one", Duration::ZERO).await, busy);
    let given_up = tokio::time::timeout(SHORT, registry.leave("one", LONG));
    assert!(given_up.await.is_err());
    let another = open(&registry).expect("it is back");
    drop((pair, another));
    assert_eq!(registry.leave("one", Duration::ZERO).await, Ok(()));
    let gone = RegistryError::UnknownName("one".to_owned());
    assert_eq!(registry.leave("one", SHORT).await, Err(gone));
}

#[tokio::test]
async fn one_that_gives_up_does_not_open_the_door_for_another_who_still_waits() {
    let registry = Arc::new(with_one());
    let pair = open(&registry).unwrap();
    let patient = {
        let registry = Arc::clone(&registry);
        tokio::spawn(async move { registry.leave("one", LONG).await })
    };
    tokio::task::yield_now().await;
    assert!(registry.leave("one", SHORT).await.is_err());
    assert_eq!(error(open(&registry)), RegistryError::Leaving(OTHER));
    let second = {
        let registry = Arc::clone(&registry);
        tokio::spawn(async move { registry.leave("one", LONG).await })
    };
    tokio::task::yield_now().await;
    drop(pair);
    assert_eq!(patient.await.unwrap(), Ok(()));
    assert_eq!(second.await.unwrap(), Ok(()), "it is gone, as was asked");
}

#[test]
fn opening_and_leaving_at_once_never_leaves_a_queue_pair_without_its_transport() {
    let registry = Registry::with_defaults();
    let over = AtomicBool::new(false);
    let opened = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !over.load(SeqCst) {
                    match open(&registry) {
                        Ok(pair) => {
                            opened.fetch_add(1, SeqCst);
                            drop(pair);
                        }
                        Err(error) => assert!(
                            matches!(
                                error,
                                RegistryError::UnknownType(OTHER) | RegistryError::Leaving(OTHER)
                            ),
                            "{error}"
                        ),
                    }
                }
            });
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        for round in 0..40 {
            let transport = Asked::new("one", 0, true);
            let live = Arc::clone(&transport.live);
            registry.add(Box::new(transport)).unwrap();
            let before = opened.load(SeqCst);
            while opened.load(SeqCst) == before {
                std::thread::yield_now();
            }
            if round % 4 != 0 {
                assert_eq!(runtime.block_on(registry.leave("one", LONG)), Ok(()));
            } else {
                while registry.remove("one").is_err() {}
            }
            assert_eq!(live.load(SeqCst), 0, "round {round}");
            std::thread::yield_now();
            assert_eq!(live.load(SeqCst), 0, "round {round}");
        }
        over.store(true, SeqCst);
    });
}
