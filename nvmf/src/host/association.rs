//! An association with one controller: bring-up, its I/O queue pairs, its loss, its end.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use memdesc::MemSource;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::address::{TargetAddress, share};
use super::admin::{ADMIN_QUEUE_ENTRIES, Admin, LossReport};
use super::ana::AnaLog;
use super::connect::{ConnectQueue, Connected, Parties, connect_queue};
use super::dial::{Dial, Local, NewQueue, Tcp};
use super::enable::{enable, read_capabilities, shut_down};
use super::error::{HostError, Loss};
use super::events::{Events, HostEvent};
use super::identify::{ControllerInfo, identify_controller};
use super::inquiry::Inquiry;
use super::keepalive::KeepAlive;
use super::namespace::{ListedNamespace, NamespaceInfo, NamespaceSelector};
use super::options::HostOptions;
use super::traffic::{QueueTraffic, Traffic};
use crate::spec::fabrics::CNTLID_DYNAMIC;
use crate::spec::property::Cc;
use crate::spec::{Nqn, Sqe, Status, feature};
use crate::transport::drive::Driven;
use crate::transport::loopback::Connector;
use crate::transport::tcp::LocalEnd;
use crate::transport::{HostQueuePair, Registry, Transfer};

/// In-capsule data that every admin queue takes over NVMe/TCP.
const ADMIN_IN_CAPSULE_LIMIT: u32 = 8192;
/// Largest transfer of one command with data digests, in bytes. Linux targets check one digest over
/// all that a command writes, so it has to travel in one PDU; this much does.
const DIGEST_TRANSFER_MAX: u64 = 128 << 10;
/// Connecting so many I/O queues may take as long again as connecting the first.
const QUEUES_AT_ONCE: u32 = 16;
/// Longest wait for a controller's shutdown when bringing the association up failed.
const FAILED_SHUTDOWN: Duration = Duration::from_millis(500);
/// Stands for the address of a controller in this process.
const LOCAL: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
/// How long the end of the admin queue's task is waited for, once it was told.
const STOP_GRACE: Duration = Duration::from_millis(100);

/// An association with a controller, as long as this value lives. Dropping it closes the admin
/// queue at once; [`Self::shutdown`] is the orderly end.
#[derive(Debug)]
pub struct Association {
    options: HostOptions,
    info: ControllerInfo,
    cc: Cc,
    /// I/O queues that the controller grants.
    granted: u16,
    admin: Admin,
    admin_task: JoinHandle<()>,
    keep_alive: Option<KeepAlive>,
    /// Where traffic counts for it.
    traffic: Option<Traffic>,
    events: Option<Events>,
    losses: LossReport,
}

impl Association {
    /// Connects to a subsystem's controller, enables it and asks what it can do. Call it inside a
    /// tokio runtime with I/O and time; two small tasks stay behind. Cancel-safe: dropping the
    /// future closes what it opened.
    ///
    /// # Errors
    /// [`HostError`] is the reason as one line. When the host has several addresses, the error is
    /// that of the address where most went well.
    pub async fn connect(
        registry: &Registry,
        target: &TargetAddress,
        options: &HostOptions,
    ) -> Result<Self, HostError> {
        let kato = options.check()?;
        let begun = Instant::now();
        let addresses = target.resolve(begun + options.connect_timeout).await?;
        // Its I/O queues begin where its admin queue does.
        let options = HostOptions {
            local: target.local.or(&options.local),
            ..options.clone()
        };
        let dial = Tcp::new(registry, &options);
        Self::connect_any(&dial, &addresses, target, &options, kato, begun).await
    }

    /// As [`Self::connect`], to a controller in this process. Its address is shown as 0.0.0.0:0.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_local(
        registry: &Registry,
        connector: &Connector,
        subnqn: &Nqn,
        options: &HostOptions,
    ) -> Result<Self, HostError> {
        let kato = options.check()?;
        let begun = Instant::now();
        let target = TargetAddress {
            host: "this process".to_owned(),
            port: LOCAL.port(),
            subnqn: subnqn.clone(),
            local: LocalEnd::default(),
        };
        let dial = Local {
            registry,
            connector,
        };
        Self::connect_any(&dial, &[LOCAL], &target, options, kato, begun).await
    }

    /// Connects at the first of several addresses where that works.
    async fn connect_any(
        dial: &impl Dial,
        addresses: &[SocketAddr],
        target: &TargetAddress,
        options: &HostOptions,
        kato: u32,
        begun: Instant,
    ) -> Result<Self, HostError> {
        let end = begun + options.connect_timeout;
        let mut best: Option<HostError> = None;
        for (tried, &at) in addresses.iter().enumerate() {
            let deadline = share(Instant::now(), end, addresses.len() - tried);
            let parties = Parties {
                at,
                subnqn: &target.subnqn,
                hostnqn: &options.hostnqn,
                hostid: options.hostid,
            };
            match connect_admin(dial, parties, kato, deadline).await {
                Ok((driven, connected)) => {
                    let span = (begun, end);
                    return Self::bring_up(driven, connected, parties, options, kato, span).await;
                }
                Err(error) => {
                    tracing::debug!("{error}");
                    if best
                        .as_ref()
                        .is_none_or(|best| best.depth() <= error.depth())
                    {
                        best = Some(error);
                    }
                }
            }
        }
        Err(best.unwrap_or_else(|| HostError::Resolve {
            host: target.host.clone(),
            reason: "it has no address".to_owned(),
        }))
    }

    /// Connects over a fabric of the test's own.
    #[cfg(test)]
    pub(super) async fn connect_over(
        dial: &impl Dial,
        addresses: &[SocketAddr],
        target: &TargetAddress,
        options: &HostOptions,
    ) -> Result<Self, HostError> {
        let kato = options.check()?;
        Self::connect_any(dial, addresses, target, options, kato, Instant::now()).await
    }

    /// What comes after the admin queue's Connect.
    async fn bring_up(
        driven: Driven<dyn HostQueuePair>,
        connected: Connected,
        parties: Parties<'_>,
        options: &HostOptions,
        kato: u32,
        (begun, end): (Instant, Instant),
    ) -> Result<Self, HostError> {
        let losses = LossReport::new();
        let (admin, admin_task) =
            Admin::spawn(driven, parties.at, options.connect_timeout, losses.clone());
        let mut bounded = admin.bounded(begun, end);
        let cap = read_capabilities(&bounded).await?;
        let cc = enable(&mut bounded, cap).await?;
        // The controller's timer runs from here on, and identifying may take its time.
        let keep_alive = |traffic| {
            let kato = Duration::from_millis(kato.into());
            (!kato.is_zero()).then(|| KeepAlive::start(admin.clone(), kato, traffic))
        };
        let mut kept_alive = keep_alive(None);
        let identified = async {
            let mut info =
                identify_controller(&bounded, parties.subnqn, cap, connected.cntlid).await?;
            if options.data_digest {
                let most = info.max_transfer.unwrap_or(DIGEST_TRANSFER_MAX);
                info.max_transfer = Some(most.min(DIGEST_TRANSFER_MAX));
            }
            if info.retry_delays != [Duration::ZERO; 3] {
                ask_for_retry_delays(&bounded).await?;
            }
            let granted = ask_for_queues(&bounded, options.nr_io_queues).await?;
            Ok((info, granted))
        };
        let (info, granted) = match identified.await {
            Ok(identified) => identified,
            Err(error) => {
                drop(kept_alive);
                shut_down(&admin, cc, FAILED_SHUTDOWN).await;
                return Err(error);
            }
        };
        let traffic = info.liveness.traffic_based.then(Traffic::new);
        if let Some(traffic) = &traffic {
            kept_alive = keep_alive(Some(traffic.share()));
        }
        tracing::debug!(
            controller = %info.address, cntlid = info.cntlid, subnqn = %info.subnqn,
            model = info.model, serial = info.serial, firmware = info.firmware,
            io_queues = granted, sq_flow_control = connected.sq_flow_control,
            "association established"
        );
        Ok(Self {
            options: options.clone(),
            info,
            cc,
            granted,
            admin,
            admin_task,
            keep_alive: kept_alive,
            traffic,
            events: None,
            losses,
        })
    }

    /// What the controller is and can do.
    pub fn controller(&self) -> &ControllerInfo {
        &self.info
    }

    /// I/O queues that the controller grants: at least 1, at most what was asked for.
    pub fn io_queues_granted(&self) -> u16 {
        self.granted
    }

    /// Entries of each I/O queue: what was asked for, within the controller's limit.
    pub fn io_queue_entries(&self) -> u32 {
        u32::from(self.options.queue_size).min(self.info.max_queue_entries)
    }

    /// The active namespaces that can be served, by ascending NSID. Others are logged with what is
    /// in the way.
    ///
    /// # Errors
    /// The controller fails to answer, or its lists make no sense.
    pub async fn namespaces(&self) -> Result<Vec<NamespaceInfo>, HostError> {
        let found = self.inquiry().all().await?;
        let mut usable = Vec::with_capacity(found.len());
        for found in found {
            match found.info {
                Ok(info) => usable.push(info),
                Err(reason) => {
                    tracing::warn!(nsid = found.nsid, "namespace cannot be used: {reason}");
                }
            }
        }
        Ok(usable)
    }

    /// All active namespaces by ascending NSID, also those that cannot be served.
    ///
    /// # Errors
    /// As [`Self::namespaces`].
    pub async fn list_namespaces(&self) -> Result<Vec<ListedNamespace>, HostError> {
        let found = self.inquiry().all().await?;
        Ok(found.into_iter().map(ListedNamespace::from).collect())
    }

    /// Finds one namespace.
    ///
    /// # Errors
    /// As [`Self::namespaces`]; nothing or too much is selected, and then the error lists what
    /// there is; or the namespace cannot be served, with the reason.
    pub async fn select(&self, selector: &NamespaceSelector) -> Result<NamespaceInfo, HostError> {
        self.inquiry().select(selector).await
    }

    /// Looks at one namespace again, after [`HostEvent::NamespacesChanged`] for instance; `None` when it is
    /// not active now.
    ///
    /// # Errors
    /// As [`Self::namespaces`]; or it cannot be served any more, with the reason.
    pub async fn reidentify(&self, nsid: u32) -> Result<Option<NamespaceInfo>, HostError> {
        self.inquiry().reidentify(nsid).await
    }

    /// Something to look at namespaces with from another task. It does not keep the association: once that is
    /// gone, what it is asked fails.
    pub fn inquiry(&self) -> Inquiry {
        Inquiry {
            admin: self.admin.detached(),
            address: self.info.address,
            subnqn: self.info.subnqn.clone(),
            hostnqn: self.options.hostnqn.clone(),
            max_transfer: self.info.max_transfer,
            ana: self.info.ana,
            extended_log: self.info.extended_log,
            within: self.options.connect_timeout,
        }
    }

    /// Reads how the namespaces can be reached through this controller, however long that log is.
    ///
    /// # Errors
    /// The controller reports nothing of the kind ([`ControllerInfo::ana`]), does not answer within the time for
    /// connecting, or its log makes no sense.
    pub async fn ana_log(&self) -> Result<AnaLog, HostError> {
        self.inquiry().ana_log().await
    }

    /// What the controller reports of its own accord, from now on: asks for the events that it offers, and
    /// keeps as many requests outstanding as it holds, at most 8. The channel closes with the association, or
    /// when the controller refuses for good. Events that are not taken in time become one
    /// [`HostEvent::Missed`]. Only the first call gets events; a later one gets a channel that is closed.
    pub fn events(&mut self) -> mpsc::Receiver<HostEvent> {
        if self.events.is_some() {
            return mpsc::channel(1).1;
        }
        let (task, events) = Events::start(self.admin.clone(), self.info.events, false);
        self.events = Some(task);
        events
    }

    /// Connects all I/O queue pairs that the controller grants, in ascending order of queue ID. They
    /// are not registered with the runtime, and are ready to be handed to workers. Drop them before
    /// [`Self::shutdown`].
    ///
    /// # Errors
    /// The first queue that fails; those before it are closed.
    pub async fn open_io_queues(
        &self,
        registry: &Registry,
    ) -> Result<Vec<Box<dyn HostQueuePair>>, HostError> {
        self.open_io_queues_over(&Tcp::new(registry, &self.options))
            .await
    }

    pub(super) async fn open_io_queues_over(
        &self,
        dial: &impl Dial,
    ) -> Result<Vec<Box<dyn HostQueuePair>>, HostError> {
        let mut pairs = Vec::with_capacity(self.granted.into());
        let mut deadline = Instant::now() + self.options.connect_timeout;
        for qid in 1..=self.granted {
            pairs.push(self.open_io_queue(dial, qid, deadline).await?);
            deadline += self.options.connect_timeout / QUEUES_AT_ONCE;
        }
        Ok(pairs)
    }

    /// Connects one I/O queue pair of an association with a controller in this process; `qid` is
    /// from 1 to [`Self::io_queues_granted`].
    ///
    /// # Errors
    /// As [`Self::open_io_queues`].
    pub async fn open_local_io_queue(
        &self,
        registry: &Registry,
        connector: &Connector,
        qid: u16,
    ) -> Result<Box<dyn HostQueuePair>, HostError> {
        let dial = Local {
            registry,
            connector,
        };
        let deadline = Instant::now() + self.options.connect_timeout;
        self.open_io_queue(&dial, qid, deadline).await
    }

    async fn open_io_queue(
        &self,
        dial: &impl Dial,
        qid: u16,
        deadline: Instant,
    ) -> Result<Box<dyn HostQueuePair>, HostError> {
        let at = self.info.address;
        let entries = self.io_queue_entries();
        let new = NewQueue {
            admin: false,
            entries,
            in_capsule_limit: self.info.in_capsule_limit,
        };
        let pair = dial.open(at, new, deadline).await?;
        let mut driven = drive(at, pair)?;
        let parties = Parties {
            at,
            subnqn: &self.info.subnqn,
            hostnqn: &self.options.hostnqn,
            hostid: self.options.hostid,
        };
        let queue = ConnectQueue {
            qid,
            entries,
            cntlid: self.info.cntlid,
            kato: 0,
        };
        connect_queue(&mut driven, parties, queue, deadline).await?;
        Ok(driven.into_pair())
    }

    /// For whoever drives an I/O queue pair, one for each: what to tell of its commands, so that they count as signs of
    /// life and Keep Alive commands are left out beside them. `None` where there is nothing to gain: without keep-alive, and with a
    /// controller that does not count traffic ([`ControllerInfo::liveness`]).
    pub fn traffic(&self) -> Option<QueueTraffic> {
        let traffic = self.traffic.as_ref().filter(|_| self.keep_alive.is_some());
        traffic.map(Traffic::of_queue)
    }

    /// Tells when the association is lost, and how: once, the first cause. A loss from before this
    /// call counts as a change, too. The sender goes away
    /// with the association, without a loss when the association was shut down or dropped.
    pub fn lost(&self) -> watch::Receiver<Option<Loss>> {
        self.losses.subscribe()
    }

    /// Ends the association in order: asks the controller for a normal shutdown, waits until that is
    /// complete, closes the admin queue. Takes no longer than `deadline` and a moment, also when the
    /// controller is dead.
    ///
    /// The I/O queue pairs should be drained and dropped before.
    pub async fn shutdown(self, deadline: Duration) {
        // A controller that shuts down is not ready any more, which is no loss now.
        drop(self.keep_alive);
        drop(self.events);
        let complete = shut_down(&self.admin, self.cc, deadline).await;
        self.admin.stop();
        let abort = self.admin_task.abort_handle();
        if timeout(STOP_GRACE, self.admin_task).await.is_err() {
            abort.abort();
        }
        tracing::debug!(
            controller = %self.info.address, cntlid = self.info.cntlid, complete,
            "association ended"
        );
    }
}

/// Opens and connects the admin queue at one address.
///
/// The admin queue takes Connect's data in its capsule. A Linux target whose port is set to take no
/// data in-capsule does not, and says that the offset is invalid: it gets them when it asks for them.
pub(super) async fn connect_admin(
    dial: &impl Dial,
    parties: Parties<'_>,
    kato: u32,
    deadline: Instant,
) -> Result<(Driven<dyn HostQueuePair>, Connected), HostError> {
    const REFUSED: u16 = Status::SGL_OFFSET_INVALID.code();
    let with = |limit| connect_admin_with(dial, parties, kato, limit, deadline);
    match with(ADMIN_IN_CAPSULE_LIMIT).await {
        Err(HostError::Command { status, .. }) if status.code() == REFUSED => {
            tracing::debug!(controller = %parties.at, "no data in the Connect capsule");
            with(0).await
        }
        other => other,
    }
}

async fn connect_admin_with(
    dial: &impl Dial,
    parties: Parties<'_>,
    kato: u32,
    in_capsule_limit: u32,
    deadline: Instant,
) -> Result<(Driven<dyn HostQueuePair>, Connected), HostError> {
    let new = NewQueue {
        admin: true,
        entries: ADMIN_QUEUE_ENTRIES,
        in_capsule_limit,
    };
    let pair = dial.open(parties.at, new, deadline).await?;
    let mut driven = drive(parties.at, pair)?;
    let queue = ConnectQueue {
        qid: 0,
        entries: ADMIN_QUEUE_ENTRIES,
        cntlid: CNTLID_DYNAMIC,
        kato,
    };
    let connected = connect_queue(&mut driven, parties, queue, deadline).await?;
    Ok((driven, connected))
}

fn drive(
    at: SocketAddr,
    pair: Box<dyn HostQueuePair>,
) -> Result<Driven<dyn HostQueuePair>, HostError> {
    Driven::new(pair).map_err(|error| HostError::Transport {
        at,
        reason: error.to_string(),
    })
}

/// Tells a controller that its retry delays are understood, since it gives none otherwise. One that refuses that
/// gives none.
async fn ask_for_retry_delays(admin: &Admin) -> Result<(), HostError> {
    let sqe = Sqe::set_features(feature::fid::HOST_BEHAVIOR, 0);
    let data = MemSource::from_bytes(feature::host_behavior_with_retry_delays());
    let command = "Set Features (Host Behavior Support)";
    match admin.execute(command, sqe, Transfer::Out(data)).await {
        Err(HostError::Command { status, .. }) => {
            tracing::debug!(controller = %admin.at(), "{command}: {status}");
            Ok(())
        }
        other => other.map(drop),
    }
}

/// Asks for I/O queues. Returns how many there may be: never none, never more than asked for.
async fn ask_for_queues(admin: &Admin, wanted: u16) -> Result<u16, HostError> {
    let sqe = Sqe::set_features(
        feature::fid::NUMBER_OF_QUEUES,
        feature::number_of_queues(wanted),
    );
    let done = admin
        .execute("Set Features (Number of Queues)", sqe, Transfer::None)
        .await?;
    let granted = feature::queues_granted(done.cqe.dw0());
    Ok(u16::try_from(granted).unwrap_or(u16::MAX).min(wanted))
}
