//! A controller that a test scripts, behind queue pairs that never leave the process.
//!
//! Without a script it is an honest controller with the namespaces that it was given. A script sees
//! each command first, and may answer in any way that a real peer could.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use uuid::Uuid;
use zerocopy::{FromZeros, IntoBytes};

use super::dial::{Dial, NewQueue};
use super::error::HostError;
use crate::spec::fabrics::{Connect, Property, SQHD_FLOW_DISABLED};
use crate::spec::identify::{
    IDENTIFY_LEN, IdentifyController, IdentifyNamespace, LbaFormat, cns, nidt,
};
use crate::spec::log::GetLogPage;
use crate::spec::opcode::{admin, fabrics};
use crate::spec::property::{Cap, Cc, Csts, offset};
use crate::spec::{Cqe, Nqn, Sqe, Status, feature};
use crate::transport::{
    CommandId, Completion, Counters, Ending, HostQueuePair, Interest, QueuePair, Ready, Rejected,
    RejectedReason, Transfer,
};

pub(super) const SUBNQN: &str = "nqn.2026-01.org.example:disk1";
pub(super) const CNTLID: u16 = 7;

/// What happens to a command.
pub(super) enum Answer {
    /// Success with this in dwords 0 and 1.
    Result(u64),
    /// Success with this data.
    Data(Vec<u8>),
    /// This entry.
    Entry(Cqe),
    /// No answer, ever.
    Silence,
    /// No answer before there is an event.
    Held,
    /// The connection ends instead.
    End(Ending),
}

impl Answer {
    pub(super) fn status(status: Status) -> Self {
        Self::Entry(Cqe::new(0, status))
    }

    /// An error status with a result.
    pub(super) fn refusal(status: Status, result: u32) -> Self {
        Self::Entry(Cqe {
            result: u64::from(result).into(),
            ..Cqe::new(0, status)
        })
    }
}

/// Sees a command and the data that came with it; `None` leaves it to the honest controller.
pub(super) type Script = Box<dyn FnMut(&mut Model, &Sqe, &[u8]) -> Option<Answer> + Send>;

/// The honest controller's state.
pub(super) struct Model {
    pub(super) cap: Cap,
    pub(super) cc: Cc,
    pub(super) csts: Csts,
    pub(super) identity: IdentifyController,
    /// Identify data and identification descriptors by NSID.
    pub(super) namespaces: BTreeMap<u32, (IdentifyNamespace, Vec<u8>)>,
    /// Log pages.
    pub(super) pages: BTreeMap<u8, Vec<u8>>,
    /// I/O queues that it grants.
    pub(super) queues: u16,
    /// What Connect commands said, with their data.
    pub(super) connects: Vec<(Connect, Vec<u8>)>,
    /// Opcodes of the other commands, with FCTYPE or CDW10 beside it.
    pub(super) commands: Vec<(u8, u32)>,
}

impl Model {
    fn new() -> Self {
        let mut identity = IdentifyController::new_zeroed();
        identity.sn.copy_from_slice(b"SN-0001             ");
        identity.mn[..5].copy_from_slice(b"Model");
        identity.fr.copy_from_slice(b"1.0     ");
        identity.cntlid = CNTLID.into();
        identity.ver = 0x0001_0400.into();
        identity.cntrltype = 1;
        identity.sqes = 0x66;
        identity.cqes = 0x44;
        identity.nn = 1024.into();
        identity.ioccsz = (4 + 8192 / 16).into();
        identity.iorcsz = 1.into();
        identity.subnqn = Nqn::new(SUBNQN).unwrap().to_field();
        Self {
            cap: Cap(Cap::CSS_NVM | Cap::CQR | 1 << 24 | 1023),
            cc: Cc::default(),
            csts: Csts::default(),
            identity,
            namespaces: BTreeMap::new(),
            pages: BTreeMap::new(),
            queues: 4,
            connects: Vec::new(),
            commands: Vec::new(),
        }
    }

    fn answer(&mut self, sqe: &Sqe, data: &[u8]) -> Answer {
        match sqe.opcode {
            fabrics::OPCODE => self.fabrics(sqe, data),
            admin::IDENTIFY => self.identify(sqe.cdw10.get() as u8, sqe.nsid.get()),
            admin::SET_FEATURES if sqe.cdw10.get() as u8 == feature::fid::NUMBER_OF_QUEUES => {
                Answer::Result(feature::number_of_queues(self.queues).into())
            }
            admin::SET_FEATURES if sqe.cdw10.get() as u8 == feature::fid::ASYNC_EVENT_CONFIG => {
                Answer::Result(0)
            }
            admin::KEEP_ALIVE => Answer::Result(0),
            admin::ASYNC_EVENT_REQUEST => Answer::Held,
            admin::GET_LOG_PAGE => self.log_page(GetLogPage::from_sqe(sqe)),
            _ => Answer::status(Status::INVALID_OPCODE),
        }
    }

    fn fabrics(&mut self, sqe: &Sqe, data: &[u8]) -> Answer {
        match sqe.fctype() {
            fabrics::CONNECT => {
                self.connects.push((Connect::from_sqe(sqe), data.to_vec()));
                Answer::Entry(Cqe {
                    sqhd: SQHD_FLOW_DISABLED.into(),
                    ..Cqe::with_result(0, CNTLID.into())
                })
            }
            fabrics::PROPERTY_GET => match Property::from_sqe(sqe).offset {
                offset::CAP => Answer::Result(self.cap.0),
                offset::CC => Answer::Result(self.cc.0.into()),
                offset::CSTS => Answer::Result(self.csts.0.into()),
                _ => Answer::status(Status::INVALID_FIELD),
            },
            fabrics::PROPERTY_SET => {
                self.cc = Cc(Property::from_sqe(sqe).value as u32);
                self.csts = match (self.cc.en(), self.cc.shn()) {
                    (true, 0) => Csts(Csts::RDY),
                    (_, 0) => Csts(0),
                    _ => Csts(Csts::SHST_COMPLETE),
                };
                Answer::Result(0)
            }
            _ => Answer::status(Status::INVALID_OPCODE),
        }
    }

    /// Part of a page, zeroes behind its end.
    fn log_page(&mut self, part: GetLogPage) -> Answer {
        let Some(page) = self.pages.get(&part.lid) else {
            return Answer::status(Status::INVALID_LOG_PAGE);
        };
        if part.offset > 0 && part.offset >= page.len() as u64 {
            return Answer::status(Status::INVALID_FIELD);
        }
        let mut bytes = page[part.offset as usize..].to_vec();
        bytes.resize(part.len as usize, 0);
        Answer::Data(bytes)
    }

    fn identify(&mut self, structure: u8, nsid: u32) -> Answer {
        let page = |bytes: &[u8]| {
            let mut page = bytes.to_vec();
            page.resize(IDENTIFY_LEN, 0);
            Answer::Data(page)
        };
        match structure {
            cns::CONTROLLER => page(self.identity.as_bytes()),
            cns::ACTIVE_NAMESPACES => {
                let above = self.namespaces.keys().filter(|&&other| other > nsid);
                let list: Vec<u8> = above.take(1024).flat_map(|n| n.to_le_bytes()).collect();
                page(&list)
            }
            cns::NAMESPACE | cns::NAMESPACE_DESCRIPTORS => match self.namespaces.get(&nsid) {
                Some((data, _)) if structure == cns::NAMESPACE => page(data.as_bytes()),
                Some((_, descriptors)) => page(descriptors),
                None => Answer::status(Status::INVALID_NAMESPACE),
            },
            _ => Answer::status(Status::INVALID_FIELD),
        }
    }
}

/// A namespace of `blocks` blocks of 2^`lbads` bytes.
pub(super) fn namespace(blocks: u64, lbads: u8) -> IdentifyNamespace {
    let mut data = IdentifyNamespace::new_zeroed();
    data.nsze = blocks.into();
    data.lbaf[0] = LbaFormat {
        lbads,
        ..LbaFormat::default()
    };
    data
}

/// An identification descriptor with this UUID.
pub(super) fn uuid_descriptor(uuid: Uuid) -> Vec<u8> {
    let mut descriptor = vec![nidt::UUID, 16, 0, 0];
    descriptor.extend(uuid.as_bytes());
    descriptor
}

struct State {
    model: Model,
    script: Option<Script>,
    ending: Option<Ending>,
    /// What held commands are answered with, when there are some.
    events: VecDeque<Cqe>,
    /// Commands that are held now.
    held: usize,
    /// Other ends of the pairs' descriptors, to wake who waits for them.
    wakers: Vec<UnixStream>,
    /// What was opened where.
    opened: Vec<(SocketAddr, NewQueue)>,
    /// Addresses that do not work; `None` never answers.
    broken: HashMap<SocketAddr, Option<HostError>>,
}

/// The controller, and the fabric that leads to it.
#[derive(Clone)]
pub(super) struct Scripted(Arc<Mutex<State>>);

impl Scripted {
    /// An honest controller with one namespace, of 2048 blocks of 512 bytes.
    pub(super) fn new() -> Self {
        let mut model = Model::new();
        model.namespaces.insert(1, (namespace(2048, 9), Vec::new()));
        Self(Arc::new(Mutex::new(State {
            model,
            script: None,
            ending: None,
            events: VecDeque::new(),
            held: 0,
            wakers: Vec::new(),
            opened: Vec::new(),
            broken: HashMap::new(),
        })))
    }

    /// With changes to the honest controller.
    pub(super) fn with(self, change: impl FnOnce(&mut Model)) -> Self {
        change(&mut self.state().model);
        self
    }

    /// With a script.
    pub(super) fn scripted(
        self,
        script: impl FnMut(&mut Model, &Sqe, &[u8]) -> Option<Answer> + Send + 'static,
    ) -> Self {
        self.set_script(script);
        self
    }

    pub(super) fn set_script(
        &self,
        script: impl FnMut(&mut Model, &Sqe, &[u8]) -> Option<Answer> + Send + 'static,
    ) {
        self.state().script = Some(Box::new(script));
    }

    /// Nothing comes of connecting to this address: the error, or no answer.
    pub(super) fn broken_at(self, at: SocketAddr, error: Option<HostError>) -> Self {
        self.state().broken.insert(at, error);
        self
    }

    /// Ends all connections.
    pub(super) fn end(&self, ending: Ending) {
        let mut state = self.state();
        state.ending = Some(ending);
        for waker in &mut state.wakers {
            let _ = waker.write(&[0]);
        }
    }

    /// Answers a held command, as soon as there is one.
    pub(super) fn complete_held(&self, cqe: Cqe) {
        let mut state = self.state();
        state.events.push_back(cqe);
        for waker in &mut state.wakers {
            let _ = waker.write(&[0]);
        }
    }

    /// Commands that are held now.
    pub(super) fn held(&self) -> usize {
        self.state().held
    }

    /// Looks at the honest controller's state.
    pub(super) fn look<T>(&self, look: impl FnOnce(&mut Model) -> T) -> T {
        look(&mut self.state().model)
    }

    /// Queue pairs that exist. The test must have no clone of this value.
    pub(super) fn alive(&self) -> usize {
        Arc::strong_count(&self.0) - 1
    }

    pub(super) fn opened(&self) -> Vec<(SocketAddr, NewQueue)> {
        self.state().opened.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl Dial for Scripted {
    async fn open(
        &self,
        at: SocketAddr,
        queue: NewQueue,
        deadline: Instant,
    ) -> Result<Box<dyn HostQueuePair>, HostError> {
        self.state().opened.push((at, queue));
        let broken = self.state().broken.get(&at).cloned();
        match broken {
            Some(Some(error)) => return Err(error),
            Some(None) => {
                let started = Instant::now();
                let _ = timeout_at(deadline, std::future::pending::<()>()).await;
                let after = started.elapsed();
                return Err(HostError::HandshakeTimedOut { at, after });
            }
            None => {}
        }
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        self.state().wakers.push(far.try_clone().unwrap());
        Ok(Box::new(ScriptedPair {
            controller: self.clone(),
            near,
            far,
            size: queue.entries as usize,
            done: VecDeque::new(),
            silent: Vec::new(),
            held: VecDeque::new(),
            ending: None,
            next_cid: 0,
        }))
    }
}

struct ScriptedPair {
    controller: Scripted,
    near: UnixStream,
    far: UnixStream,
    size: usize,
    done: VecDeque<Completion>,
    /// Commands that are never answered.
    silent: Vec<(u64, Transfer)>,
    /// Commands that are answered when there is an event.
    held: VecDeque<(u64, Transfer)>,
    ending: Option<Ending>,
    next_cid: u16,
}

impl ScriptedPair {
    fn end_with(&mut self, ending: Ending) {
        if self.ending.is_some() {
            return;
        }
        self.ending = Some(ending);
        self.controller.state().held -= self.held.len();
        for (token, transfer) in self.silent.drain(..).chain(self.held.drain(..)) {
            self.done.push_back(Completion {
                token,
                cqe: Cqe::new(0, Status::ABORTED_BY_HOST),
                sqhd_valid: false,
                transferred: 0,
                transfer,
            });
        }
    }

    /// Answers held commands, while there are both.
    fn answer_held(&mut self) {
        loop {
            let mut state = self.controller.state();
            let Some((token, transfer)) = self.held.pop_front_if(|_| !state.events.is_empty())
            else {
                return;
            };
            state.held -= 1;
            let cqe = state.events.pop_front().unwrap();
            drop(state);
            self.complete(token, transfer, Answer::Entry(cqe));
        }
    }

    fn complete(&mut self, token: u64, transfer: Transfer, answer: Answer) {
        let (cqe, data) = match answer {
            Answer::Result(result) => (Cqe::with_result(0, result), Vec::new()),
            Answer::Data(data) => (Cqe::new(0, Status::SUCCESS), data),
            Answer::Entry(cqe) => (cqe, Vec::new()),
            Answer::Silence => return self.silent.push((token, transfer)),
            Answer::Held => {
                self.held.push_back((token, transfer));
                self.controller.state().held += 1;
                return self.answer_held();
            }
            Answer::End(ending) => {
                self.silent.push((token, transfer));
                return self.end_with(ending);
            }
        };
        let mut transfer = transfer;
        let mut transferred = 0;
        match &mut transfer {
            Transfer::In(sink) => {
                transferred = data.len().min(sink.len()) as u32;
                sink.copy_from(0, &data[..transferred as usize]).unwrap();
            }
            Transfer::Out(source) => transferred = source.len() as u32,
            Transfer::None => {}
        }
        self.done.push_back(Completion {
            token,
            cqe,
            sqhd_valid: true,
            transferred,
            transfer,
        });
    }
}

impl QueuePair for ScriptedPair {
    fn interest(&self) -> Interest<'_> {
        Interest {
            fd: self.near.as_fd(),
            readable: true,
            writable: false,
        }
    }

    fn progress(&mut self, ready: &mut Ready) -> bool {
        let mut bytes = [0; 64];
        while let Ok(1..) = self.near.read(&mut bytes) {}
        ready.readable = false;
        let ending = self.controller.state().ending.clone();
        if let Some(ending) = ending {
            self.end_with(ending);
        }
        self.answer_held();
        false
    }

    fn flush(&mut self, _: &mut Ready) -> bool {
        false
    }

    fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    fn end(&mut self) {
        self.end_with(Ending::Local);
    }

    fn counters(&self) -> Counters {
        Counters::default()
    }
}

impl HostQueuePair for ScriptedPair {
    fn submit(&mut self, sqe: Sqe, transfer: Transfer, token: u64) -> Result<CommandId, Rejected> {
        let reason = if self.ending.is_some() {
            Some(RejectedReason::Ended)
        } else if self.room() == 0 {
            Some(RejectedReason::Full)
        } else {
            None
        };
        if let Some(reason) = reason {
            return Err(Rejected { transfer, reason });
        }
        let mut data = vec![0; transfer.len()];
        match &transfer {
            Transfer::Out(source) => source.copy_to(0, &mut data).unwrap(),
            _ => data.clear(),
        }
        let controller = self.controller.clone();
        let mut state = controller.state();
        let State { model, script, .. } = &mut *state;
        if sqe.opcode != fabrics::OPCODE || sqe.fctype() != fabrics::CONNECT {
            let detail = match sqe.opcode {
                fabrics::OPCODE => sqe.fctype().into(),
                _ => sqe.cdw10.get(),
            };
            model.commands.push((sqe.opcode, detail));
        }
        let scripted = script
            .as_mut()
            .and_then(|script| script(model, &sqe, &data));
        let answer = scripted.unwrap_or_else(|| model.answer(&sqe, &data));
        drop(state);
        self.complete(token, transfer, answer);
        let _ = self.far.write(&[0]);
        self.next_cid = self.next_cid.wrapping_add(1);
        Ok(CommandId(self.next_cid))
    }

    fn room(&self) -> usize {
        self.size - 1 - self.outstanding()
    }

    fn outstanding(&self) -> usize {
        self.silent.len() + self.held.len() + self.done.len()
    }

    fn completion(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }
}

/// A time-out that a test can wait for.
pub(super) const SHORT: Duration = Duration::from_millis(100);
