//! The transport of simulated connections: NVMe/TCP over the ends of a pipe, for the registry.

use super::pipe::PipeEnd;
use crate::spec::trtype;
use crate::transport::tcp::{self, Connection};
use crate::transport::{ControllerQueuePair, HostQueuePair, Opening, QueueParams, Transport};

/// See the module.
#[derive(Debug, Clone, Copy, Default)]
pub struct SimulatedTcp;

impl Transport for SimulatedTcp {
    fn name(&self) -> &'static str {
        "simulated-tcp"
    }

    fn trtype(&self) -> u8 {
        trtype::TCP
    }

    /// Before software TCP, which declines what is not its own anyway.
    fn priority(&self) -> i32 {
        1
    }

    fn open_host(&self, params: Box<QueueParams>) -> Opening<dyn HostQueuePair> {
        match params.over::<Connection<PipeEnd>>() {
            Ok(params) => Opening::Opened(tcp::simulated_host(params)),
            Err(params) => Opening::Declined(params),
        }
    }

    fn open_controller(&self, params: Box<QueueParams>) -> Opening<dyn ControllerQueuePair> {
        match params.over::<Connection<PipeEnd>>() {
            Ok(params) => Opening::Opened(tcp::simulated_controller(params)),
            Err(params) => Opening::Declined(params),
        }
    }
}
