//! One accepted connection: from ICReq to its Connect, and from there to where its queue belongs.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use memdesc::MemSink;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::{Instant, timeout, timeout_at};
use zerocopy::FromBytes;

use super::association::Membership;
use super::discovery::Viewpoint;
use super::fabrics::{self, Refusal, Request};
use super::lane::{Parts, TargetLane};
use super::session::{Registration, Session};
use super::subsystem::Subsystem;
use super::{Limits, Target};
use crate::spec::fabrics::{CATTR_DISABLE_SQ_FLOW, Connect, ConnectData};
use crate::spec::{Cqe, Nqn, Status, trtype};
use crate::transport::drive::Driven;
use crate::transport::registry::Lease;
use crate::transport::{
    Command, CommandTag, Connection, ControllerEvent, ControllerQueuePair, Lane, QueueParams,
    Ready, loopback, tcp,
};

/// In-capsule data that an admin queue takes, in bytes; the same for every NVMe/TCP controller.
const ADMIN_IN_CAPSULE: u32 = 8192;
/// Entries of a queue whose Connect was not read yet.
const FIRST_QUEUE_SIZE: u32 = 4;
/// Time that a refused host has to read the answer and close.
const LINGER: Duration = Duration::from_secs(1);

type Queue = Driven<dyn ControllerQueuePair>;

/// How a TCP connection came.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arrival {
    pub(super) peer: SocketAddr,
    /// The listener serves I/O subsystems, and not discovery alone.
    pub(super) serves_io: bool,
}

/// A connection on which nothing was said yet.
pub(super) enum Incoming {
    Tcp(TcpStream, Arrival),
    Loopback(loopback::Connection),
}

impl Incoming {
    /// Who is at the other end, for the log.
    pub(super) fn peer(&self) -> String {
        match self {
            Self::Tcp(_, arrival) => arrival.peer.to_string(),
            Self::Loopback(_) => "this process".to_owned(),
        }
    }

    /// I/O subsystems may be connected to, and not discovery alone.
    fn serves_io(&self) -> bool {
        match self {
            Self::Tcp(_, arrival) => arrival.serves_io,
            Self::Loopback(_) => true,
        }
    }

    /// The address that the host used; within a process there is none.
    fn local(&self) -> Result<SocketAddr, Failure> {
        match self {
            Self::Tcp(stream, _) => stream
                .local_addr()
                .map_err(|error| Failure::Local(error.to_string())),
            Self::Loopback(_) => Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
        }
    }

    /// What has to be agreed before the first command.
    async fn negotiate(self, deadline: Instant) -> Result<(u8, Connection), Failure> {
        Ok(match self {
            Self::Tcp(stream, _) => (trtype::TCP, tcp::accept(stream, deadline).await?.into()),
            Self::Loopback(connection) => (trtype::INTRA_HOST, connection.into()),
        })
    }
}

/// Why a connection came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("{0}")]
    Handshake(#[from] tcp::ConnectError),
    #[error("no Connect command in time")]
    TimedOut,
    #[error("{0}")]
    Ended(String),
    #[error("{0}")]
    Local(String),
    #[error("Connect was refused: {0}")]
    Refused(Status),
}

/// What an accepted Connect began.
enum Accepted {
    Admin {
        registration: Registration,
        kato: u32,
        host: Nqn,
    },
    Io {
        membership: Membership,
        subsystem: Arc<Subsystem>,
        queue_size: u32,
    },
}

/// Serves a connection: until its queue is handed off, or its association is over.
pub(super) async fn serve(
    target: &Arc<Target>,
    incoming: Incoming,
    permit: OwnedSemaphorePermit,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), Failure> {
    let peer = incoming.peer();
    let deadline = Instant::now() + target.limits.handshake;
    let local = incoming.local()?;
    let begun = tokio::select! {
        begun = begin(target, incoming, deadline) => begun?,
        _ = shutdown.wait_for(|&down| down) => return Ok(()),
    };
    match begun {
        (
            queue,
            Accepted::Admin {
                registration,
                kato,
                host,
            },
        ) => {
            let cntlid = registration.association.cntlid();
            let nqn = registration.subsystem.nqn().clone();
            if target.quota.allow() {
                tracing::info!(%peer, %host, subsystem = %nqn, cntlid, "association begins");
            }
            let view = Viewpoint {
                host: host.clone(),
                local,
            };
            let session = Session::new(queue, registration, view, kato);
            let end = session.run(shutdown).await;
            if target.quota.allow() {
                tracing::info!(%peer, %host, subsystem = %nqn, cntlid, "association over: {end}");
            }
        }
        (
            queue,
            Accepted::Io {
                membership,
                subsystem,
                queue_size,
            },
        ) => {
            let parts = Parts {
                pair: queue.into_pair(),
                subsystem,
                membership,
                queue_size,
                permit,
            };
            let for_lane = Arc::clone(target);
            target.lanes.place(Box::new(move || {
                Box::new(TargetLane::new(parts, &for_lane)) as Box<dyn Lane>
            }));
        }
    }
    Ok(())
}

/// ICReq, ICResp and Connect, all before the deadline.
async fn begin(
    target: &Arc<Target>,
    incoming: Incoming,
    deadline: Instant,
) -> Result<(Queue, Accepted), Failure> {
    let serves_io = incoming.serves_io();
    let (trtype, connection) = incoming.negotiate(deadline).await?;
    let params = QueueParams {
        // Not known before the Connect is read; both kinds take as much in a capsule.
        admin: true,
        queue_size: FIRST_QUEUE_SIZE,
        sq_flow_control: true,
        in_capsule_limit: target.limits.in_capsule.max(ADMIN_IN_CAPSULE),
        connection,
        lease: Lease::default(),
    };
    let pair = target
        .registry
        .open_controller(trtype, params)
        .map_err(|error| Failure::Local(error.to_string()))?;
    let mut queue = Driven::new(pair).map_err(|error| Failure::Local(error.to_string()))?;
    let first = timeout_at(deadline, first_command(&mut queue));
    let command = first.await.unwrap_or(Err(Failure::TimedOut))?;
    let accepting = timeout_at(deadline, accept(target, &mut queue, serves_io, &command));
    match accepting.await.unwrap_or(Err(Failure::TimedOut))? {
        Ok(accepted) => Ok((queue, accepted)),
        Err(Refusal { status, result }) => {
            let cqe = Cqe {
                result: u64::from(result).into(),
                ..Cqe::new(0, status)
            };
            queue.pair().respond(command.tag, cqe);
            // Closing at once might take the answer away from a host that has sent more.
            let _ = timeout(LINGER, until_end(&mut queue)).await;
            Err(Failure::Refused(status))
        }
    }
}

async fn next_event(queue: &mut Queue) -> Result<ControllerEvent, Failure> {
    loop {
        if let Some(event) = queue.pair().event() {
            return Ok(event);
        }
        if let Some(ending) = queue.pair().ending() {
            return Err(Failure::Ended(ending.to_string()));
        }
        queue.progress().await;
    }
}

async fn first_command(queue: &mut Queue) -> Result<Command, Failure> {
    loop {
        if let ControllerEvent::Command(command) = next_event(queue).await? {
            return Ok(command);
        }
    }
}

async fn until_end(queue: &mut Queue) {
    while next_event(queue).await.is_ok() {}
}

/// Checks a Connect and answers it when it is good.
async fn accept(
    target: &Arc<Target>,
    queue: &mut Queue,
    serves_io: bool,
    command: &Command,
) -> Result<Result<Accepted, Refusal>, Failure> {
    let limits = &target.limits;
    let connect = match fabrics::check_command(&command.sqe, command.data_len, limits) {
        Ok(connect) => connect,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let data = match fetch(queue, command.tag).await? {
        Ok(data) => data,
        Err(status) => return Ok(Err(status.into())),
    };
    let admitted = fabrics::check_data(&connect, &data, target, serves_io)
        .and_then(|request| admit(target, &connect, request, limits));
    let (accepted, cntlid) = match admitted {
        Ok(admitted) => admitted,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let flow_control = connect.cattr & CATTR_DISABLE_SQ_FLOW == 0;
    let queue_size = fabrics::queue_size(&connect);
    queue.pair().set_sq_flow_control(flow_control, queue_size);
    let cqe = Cqe::with_result(0, u64::from(cntlid));
    queue.pair().respond(command.tag, cqe);
    // The host may be waiting for this before it has the queue driven at all.
    queue.pair().flush(&mut Ready {
        readable: false,
        writable: true,
    });
    Ok(Ok(accepted))
}

fn admit(
    target: &Arc<Target>,
    connect: &Connect,
    request: Request,
    limits: &Limits,
) -> Result<(Accepted, u16), Refusal> {
    if connect.qid != 0 {
        let membership = fabrics::join(connect, &request)?;
        let cntlid = membership.association().cntlid();
        let accepted = Accepted::Io {
            membership,
            subsystem: request.subsystem,
            queue_size: fabrics::queue_size(connect),
        };
        return Ok((accepted, cntlid));
    }
    // Both limits may have room again later: a host may retry.
    let busy = Refusal::from(Status::CONNECT_CONTROLLER_BUSY);
    let count = &target.associations;
    let most = limits.max_associations;
    let counted = count.fetch_update(Relaxed, Relaxed, |now| (now < most).then_some(now + 1));
    if counted.is_err() {
        return Err(busy);
    }
    let Some(association) = fabrics::associate(&request, limits) else {
        count.fetch_sub(1, Relaxed);
        return Err(busy);
    };
    let cntlid = association.cntlid();
    let accepted = Accepted::Admin {
        registration: Registration {
            association,
            subsystem: request.subsystem,
            target: Arc::clone(target),
        },
        kato: connect.kato,
        host: request.hostnqn,
    };
    Ok((accepted, cntlid))
}

/// Fetches the data of a Connect, whose length was checked.
async fn fetch(
    queue: &mut Queue,
    tag: CommandTag,
) -> Result<Result<Box<ConnectData>, Status>, Failure> {
    let failed = Ok(Err(Status::DATA_TRANSFER_ERROR));
    let sink = MemSink::from_bytes(vec![0; size_of::<ConnectData>()]);
    if queue.pair().fetch(tag, 0, sink).is_err() {
        return failed;
    }
    loop {
        let event = next_event(queue).await?;
        let ControllerEvent::Fetched { sink, result, .. } = event else {
            continue;
        };
        let bytes = sink.into_parts().1.unwrap_or_default();
        return match (result, ConnectData::read_from_bytes(&bytes)) {
            (Ok(()), Ok(data)) => Ok(Ok(Box::new(data))),
            _ => failed,
        };
    }
}
