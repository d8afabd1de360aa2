//! Both ends of an I/O queue pair, driven by one thread: a host's, and the lane of the controller.

use std::sync::Arc;
use std::time::Duration;

use nvmf::backend::Backend;
use nvmf::controller::{LaneHost, Limits, LocalPort, Port, Subsystem, Target};
use nvmf::host::{Association, HostOptions, LocalEnd, TargetAddress};
use nvmf::spec::Nqn;
use nvmf::transport::loopback::{Coupled, listen};
use nvmf::transport::{HostQueuePair, Lane, Registry, Turn};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::ready;

/// What is between the ends.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fabric {
    Tcp { header: bool, data: bool },
    Apart,
    Coupled,
}

impl Fabric {
    pub(crate) fn tcp(header: bool, data: bool) -> Self {
        Self::Tcp { header, data }
    }
}

type NewLane = Box<dyn FnOnce() -> Box<dyn Lane> + Send>;

struct Handover(mpsc::UnboundedSender<NewLane>);

impl LaneHost for Handover {
    fn place(&self, lane: NewLane) {
        self.0.send(lane).unwrap();
    }
}

/// See the module. An association was made for them, as for any other queue pair.
pub(crate) struct Ends {
    host: Box<dyn HostQueuePair>,
    /// `None` when the host's end drives it.
    lane: Option<Box<dyn Lane>>,
    association: Association,
    target: Arc<Target>,
    stop: oneshot::Sender<()>,
    runtime: Runtime,
}

impl Ends {
    pub(crate) fn new(fabric: Fabric, backend: Arc<dyn Backend>, queue_size: u16) -> Self {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().unwrap();
        let nqn = Nqn::new("nqn.2026-01.org.example:steady").unwrap();
        let mut subsystem = Subsystem::new(nqn.clone(), "1");
        let uuid = Uuid::from_u128(7);
        subsystem.add_namespace(1, uuid, backend).unwrap();
        let registry = Arc::new(Registry::with_defaults());
        let (lanes, mut placed) = mpsc::unbounded_channel();
        let lanes = Arc::new(Handover(lanes));
        let limits = Limits::default();
        let target = Target::new(vec![subsystem], limits, Arc::clone(&registry), lanes);
        let target = Arc::new(target.unwrap());
        let mut options = HostOptions::new(nqn.clone(), Uuid::from_u128(1));
        options.keep_alive_tmo = Duration::ZERO;
        options.queue_size = queue_size;
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async { drop(stopped.await) };
        let served = Arc::clone(&target);
        let (association, host, lane) = runtime.block_on(async {
            let (association, host) = if let Fabric::Tcp { header, data } = fabric {
                (options.hdr_digest, options.data_digest) = (header, data);
                let any = ["127.0.0.1:0".parse().unwrap()];
                let port = Port::bind(served, &any).await.unwrap();
                let at = port.local_addrs()[0];
                tokio::spawn(port.serve(stopped));
                let address = TargetAddress {
                    host: at.ip().to_string(),
                    port: at.port(),
                    subnqn: nqn,
                    local: LocalEnd::default(),
                };
                let association = Association::connect(&registry, &address, &options).await;
                let association = association.unwrap();
                let mut pairs = association.open_io_queues(&registry).await.unwrap();
                (association, pairs.pop().unwrap())
            } else {
                let (connector, listener) = listen();
                tokio::spawn(LocalPort::new(served, listener).serve(stopped));
                let association = Association::connect_local(&registry, &connector, &nqn, &options);
                let association = association.await.unwrap();
                let host = association.open_local_io_queue(&registry, &connector, 1);
                let host = host.await.unwrap();
                (association, host)
            };
            (association, host, placed.recv().await.unwrap()())
        });
        let (host, lane): (Box<dyn HostQueuePair>, _) = match fabric {
            Fabric::Coupled => (Box::new(Coupled::new(host, lane).unwrap()), None),
            Fabric::Tcp { .. } | Fabric::Apart => (host, Some(lane)),
        };
        Self {
            host,
            lane,
            association,
            target,
            stop,
            runtime,
        }
    }

    pub(crate) fn host(&mut self) -> &mut dyn HostQueuePair {
        &mut *self.host
    }

    /// Has each end do what it can: the host's, the controller's, and the host's again.
    pub(crate) fn turn(&mut self) {
        self.host.flush(&mut ready());
        if let Some(lane) = &mut self.lane {
            let turn = lane.turn(&mut [ready(), ready()]);
            assert_ne!(turn, Turn::Ended);
        }
        self.host.progress(&mut ready());
    }

    /// Ends the association, in order.
    pub(crate) fn end(self) {
        drop(self.host);
        drop(self.lane);
        let farewell = self.association.shutdown(Duration::from_secs(5));
        self.runtime.block_on(async {
            farewell.await;
            while self.target.associations() > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        drop(self.stop);
    }
}
