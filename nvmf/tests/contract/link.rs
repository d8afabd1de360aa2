//! A queue pair with both its ends, over any transport.

use std::collections::VecDeque;
use std::fmt;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use memdesc::{MemSink, MemSource};
use nvmf::spec::{Sqe, trtype};
use nvmf::tcp::negotiate::{self, Offer};
use nvmf::transport::registry::Lease;
use nvmf::transport::tcp::Digests;
use nvmf::transport::{
    Command, CommandId, CommandTag, Completion, Connection, ControllerEvent, ControllerQueuePair,
    HostQueuePair, QueuePair, QueueParams, Ready, Registry, Transfer, loopback, tcp,
};

pub const QUEUE_SIZE: u32 = 16;
/// Data in a capsule, where a transport has that.
pub const IN_CAPSULE: usize = 4096;
/// Nothing in these tests takes longer on a machine that works.
const PATIENCE: Duration = Duration::from_secs(20);

/// Which transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Tcp(Digests),
    Loopback,
    /// One owner drives both ends.
    Coupled,
}

const OFF: Digests = Digests {
    header: false,
    data: false,
};
const ON: Digests = Digests {
    header: true,
    data: true,
};
pub const ALL: [Kind; 4] = [Kind::Tcp(OFF), Kind::Tcp(ON), Kind::Loopback, Kind::Coupled];

impl Kind {
    pub fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp(_))
    }

    fn connections(self) -> (u8, Connection, Connection) {
        match self {
            Self::Loopback | Self::Coupled => {
                let (host, controller) = loopback::Connection::pair().unwrap();
                (trtype::INTRA_HOST, host.into(), controller.into())
            }
            Self::Tcp(digests) => {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let host = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                let controller = listener.accept().unwrap().0;
                let offer = Offer {
                    digests,
                    ..Offer::default()
                };
                let [host, controller] = [host, controller].map(|stream| {
                    stream.set_nonblocking(true).unwrap();
                    stream.set_nodelay(true).unwrap();
                    let request = negotiate::ic_req_of(&offer);
                    let (negotiated, _) = negotiate::answer(&request).unwrap();
                    tcp::Connection { stream, negotiated }.into()
                });
                (trtype::TCP, host, controller)
            }
        }
    }
}

/// Both ends. Events that a test has not asked for wait in `events`.
pub struct Link {
    pub kind: Kind,
    pub host: Box<dyn HostQueuePair>,
    pub controller: Box<dyn ControllerQueuePair>,
    pub events: VecDeque<ControllerEvent>,
    pub completions: VecDeque<Completion>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let events: Vec<String> = self
            .events
            .iter()
            .map(|event| match event {
                ControllerEvent::Command(command) => format!("command {:?}", command.tag),
                ControllerEvent::Fetched { tag, result, .. } => {
                    format!("fetched {tag:?} {result:?}")
                }
                ControllerEvent::Sent { tag, .. } => format!("sent {tag:?}"),
            })
            .collect();
        let completed = |done: &Completion| (done.token, done.cqe.status(), done.transferred);
        let completions: Vec<_> = self.completions.iter().map(completed).collect();
        let endings = (self.host.ending(), self.controller.ending());
        write!(
            f,
            "{:?}, endings {endings:?}, events {events:?}, completions {completions:?}",
            self.kind
        )
    }
}

/// One for each transport.
pub fn links(sq_flow_control: bool) -> impl Iterator<Item = Link> {
    ALL.into_iter()
        .map(move |kind| Link::new(kind, sq_flow_control))
}

fn step<P: QueuePair + ?Sized>(pair: &mut P) {
    let both = Ready {
        readable: true,
        writable: true,
    };
    pair.flush(&mut both.clone());
    pair.progress(&mut both.clone());
}

impl Link {
    pub fn new(kind: Kind, sq_flow_control: bool) -> Self {
        let registry = Registry::with_defaults();
        let (trtype, host, controller) = kind.connections();
        let params = |connection| QueueParams {
            admin: false,
            queue_size: QUEUE_SIZE,
            sq_flow_control,
            in_capsule_limit: IN_CAPSULE as u32,
            connection,
            lease: Lease::default(),
        };
        let mut host = registry.open_host(trtype, params(host)).unwrap();
        let controller = registry.open_controller(trtype, params(controller));
        if kind == Kind::Coupled {
            assert!(host.couple());
        }
        Self {
            kind,
            host,
            controller: controller.unwrap(),
            events: VecDeque::new(),
            completions: VecDeque::new(),
        }
    }

    /// Both ends have a turn.
    pub fn turn(&mut self) {
        step(&mut *self.host);
        self.controller_turn();
        step(&mut *self.host);
        self.completions
            .extend(std::iter::from_fn(|| self.host.completion()));
    }

    fn controller_turn(&mut self) {
        step(&mut *self.controller);
        self.events
            .extend(std::iter::from_fn(|| self.controller.event()));
        step(&mut *self.controller);
    }

    /// Turns until there is what a test waits for.
    #[track_caller]
    pub fn until<T>(&mut self, mut there: impl FnMut(&mut Self) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = there(self) {
                return found;
            }
            assert!(Instant::now() < deadline, "nothing comes: {self:?}");
            self.turn();
        }
    }

    /// Turns enough for whatever is on its way to arrive, where nothing is to come.
    pub fn idle(&mut self) {
        for _ in 0..20 {
            self.turn();
            if self.kind.is_tcp() {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }

    pub fn submit(&mut self, sqe: Sqe, transfer: Transfer, token: u64) -> CommandId {
        self.host.submit(sqe, transfer, token).unwrap()
    }

    pub fn read(&mut self, len: usize, token: u64) -> CommandId {
        let sink = MemSink::from_bytes(vec![0xaa; len]);
        self.submit(Sqe::read(1, 0, 1), Transfer::In(sink), token)
    }

    pub fn write(&mut self, data: &[u8], token: u64) -> CommandId {
        let source = MemSource::from_bytes(data.to_vec());
        let sqe = Sqe::write(1, 0, 1, false);
        self.submit(sqe, Transfer::Out(source), token)
    }

    /// The next command at the controller, before any other of its events is asked for: data in the
    /// capsule may still be claimed.
    #[track_caller]
    pub fn arrived(&mut self) -> Command {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(ControllerEvent::Command(command)) = self.events.front() {
                let command = *command;
                self.events.pop_front();
                return command;
            }
            assert!(self.events.is_empty(), "something else comes: {self:?}");
            assert!(Instant::now() < deadline, "no command: {self:?}");
            step(&mut *self.host);
            step(&mut *self.controller);
            self.events.extend(self.controller.event());
        }
    }

    /// The next event, which must be the end of a fetch.
    #[track_caller]
    pub fn fetched(&mut self, tag: CommandTag) -> (Vec<u8>, Result<(), nvmf::spec::Status>) {
        let event = self.until(|link| link.events.pop_front());
        let ControllerEvent::Fetched {
            tag: of,
            sink,
            result,
            transferred,
        } = event
        else {
            panic!("no end of a fetch: {self:?}");
        };
        assert_eq!(of, tag);
        if result.is_ok() {
            assert_eq!(transferred as usize, sink.len());
        }
        (bytes(Transfer::In(sink)), result)
    }

    /// The next event, which must be the end of a send; its length.
    #[track_caller]
    pub fn sent(&mut self, tag: CommandTag) -> usize {
        let event = self.until(|link| link.events.pop_front());
        let ControllerEvent::Sent {
            tag: of,
            source,
            transferred,
        } = event
        else {
            panic!("no end of a send: {self:?}");
        };
        assert_eq!(of, tag);
        // Nothing goes where the host has given the command up.
        assert!([0, source.len()].contains(&(transferred as usize)));
        source.len()
    }

    #[track_caller]
    pub fn completed(&mut self) -> Completion {
        self.until(|link| link.completions.pop_front())
    }

    /// Nothing more comes out of either end.
    #[track_caller]
    pub fn is_over(&mut self) {
        self.idle();
        assert!(self.completions.is_empty(), "{self:?}");
        assert!(self.events.is_empty(), "{self:?}");
        let outstanding = (self.host.outstanding(), self.controller.outstanding());
        assert_eq!(outstanding, (0, 0), "{self:?}");
    }
}

pub fn bytes(transfer: Transfer) -> Vec<u8> {
    match transfer {
        Transfer::None => Vec::new(),
        Transfer::In(sink) => sink.into_parts().1.unwrap(),
        Transfer::Out(source) => source.into_parts().1.unwrap(),
    }
}

pub fn sink(len: usize) -> MemSink {
    MemSink::from_bytes(vec![0x55; len])
}

pub fn source(data: &[u8]) -> MemSource {
    MemSource::from_bytes(data.to_vec())
}

/// Bytes that differ by seed and place.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed);
    (0..len).map(|_| random.below(256) as u8).collect()
}

/// Numbers that follow from a seed.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    /// Cuts a length into pieces, none of them empty.
    pub fn pieces(&mut self, len: usize) -> Vec<std::ops::Range<usize>> {
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < len {
            let most = if self.below(3) == 0 { len - at } else { 3000 };
            let end = at + 1 + self.below(most.min(len - at));
            pieces.push(at..end);
            at = end;
        }
        pieces
    }
}
