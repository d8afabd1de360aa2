//! A target lane for simulations, as it is after a Connect that was accepted.

use std::sync::Arc;
use std::task::{Context, Waker};

use tokio::sync::Semaphore;
use uuid::Uuid;

use super::association::{Association, HostIdentity};
use super::lane::{Parts, TargetLane};
use super::subsystem::Subsystem;
use super::{LaneHost, Limits, Target};
use crate::backend::Backend;
use crate::spec::Nqn;
use crate::spec::fabrics::{Property, PropertySize};
use crate::spec::nqn::NQN_FIELD_LEN;
use crate::spec::property::{Cc, offset};
use crate::transport::{ControllerQueuePair, Ending, Lane, Ready, Registry, Turn};

/// Places nothing: the lane is made here.
struct Nowhere;

impl LaneHost for Nowhere {
    fn place(&self, _lane: Box<dyn FnOnce() -> Box<dyn Lane> + Send>) {}
}

/// See the module.
pub(crate) struct SimulatedLane {
    lane: TargetLane,
    association: Arc<Association>,
}

impl SimulatedLane {
    /// Serves `backend` as namespace 1 on an I/O queue of `queue_size` entries.
    pub(crate) fn new(
        pair: Box<dyn ControllerQueuePair>,
        backend: Arc<dyn Backend>,
        queue_size: u32,
        limits: Limits,
    ) -> Result<Self, String> {
        let nqn = Nqn::new("nqn.2026-01.org.example:simulated").map_err(|e| e.to_string())?;
        let mut subsystem = Subsystem::new(nqn, "1");
        let added = subsystem.add_namespace(1, Uuid::from_u128(1), backend);
        added.map_err(|error| error.to_string())?;
        let registry = Arc::new(Registry::with_defaults());
        let target = Target::new(Vec::new(), limits, registry, Arc::new(Nowhere));
        let target = target.map_err(|error| error.to_string())?;
        let identity = HostIdentity {
            hostid: [1; 16],
            hostnqn: [0; NQN_FIELD_LEN],
        };
        let association = Arc::new(Association::new(1, 0, identity, queue_size));
        let enable = Property {
            size: Some(PropertySize::Four),
            offset: offset::CC,
            value: Cc::enable(0).0.into(),
        };
        let enabled = association.registers(|registers| registers.set(enable));
        enabled.map_err(|status| status.to_string())?;
        association.grant(1).map_err(|status| status.to_string())?;
        let joined = association.join(1, &identity);
        let membership = joined.map_err(|refusal| refusal.status.to_string())?;
        let permit = Arc::new(Semaphore::new(1)).try_acquire_owned();
        let parts = Parts {
            pair,
            subsystem: Arc::new(subsystem),
            membership,
            queue_size,
            permit: permit.map_err(|error| error.to_string())?,
        };
        Ok(Self {
            lane: TargetLane::new(parts, &target),
            association,
        })
    }

    /// How its queue pair ended.
    pub(crate) fn ending(&self) -> Option<&Ending> {
        self.lane.ending()
    }

    /// It waits until it can write.
    pub(crate) fn wants_write(&self) -> bool {
        self.lane.wants_write(0)
    }

    /// One turn, with what is known of its connection.
    pub(crate) fn turn(&mut self, ready: &mut Ready) -> Turn {
        self.lane.turn(std::slice::from_mut(ready))
    }

    /// The association ends, and with it the queue: as a reset does it.
    pub(crate) fn close(&mut self) {
        self.association.close_queues();
        let mut nobody = Context::from_waker(Waker::noop());
        self.lane.poll_mailbox(&mut nobody);
    }
}
