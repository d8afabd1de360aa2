//! Who a host is and what it asks of a controller.

use std::time::Duration;

use uuid::Uuid;

use super::error::HostError;
use crate::spec::Nqn;
use crate::transport::tcp::LocalEnd;

/// Who we are and what we ask of a controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostOptions {
    /// Our NQN: what the target's list of allowed hosts goes by.
    pub hostnqn: Nqn,
    /// Our host identifier; not nil. One NQN always comes with the same identifier.
    pub hostid: Uuid,
    /// I/O queues to ask for, at least 1. Fewer may be granted.
    pub nr_io_queues: u16,
    /// Entries of an I/O queue, at least 2; one fewer can be outstanding. The controller's limit
    /// applies.
    pub queue_size: u16,
    /// Keep-alive time-out, sent in milliseconds; zero turns it off.
    pub keep_alive_tmo: Duration,
    /// Ask for header digests (CRC32C). A controller may decline.
    pub hdr_digest: bool,
    /// Ask for data digests (CRC32C). A controller may decline.
    pub data_digest: bool,
    /// Where connections begin, as far as a [`TargetAddress`](super::TargetAddress) does not say it itself.
    pub local: LocalEnd,
    /// How long it may take from the first address to the end of identifying the controller, without the time that it states to
    /// need for getting ready; then to find a namespace, and then to connect the first I/O queues; and each command later.
    pub connect_timeout: Duration,
}

impl HostOptions {
    /// Options with their defaults: one queue of 128 entries, no digests, 5 s until either end takes the other
    /// for dead, 5 s to connect.
    pub fn new(hostnqn: Nqn, hostid: Uuid) -> Self {
        Self {
            hostnqn,
            hostid,
            nr_io_queues: 1,
            queue_size: 128,
            keep_alive_tmo: Duration::from_secs(5),
            hdr_digest: false,
            data_digest: false,
            local: LocalEnd::default(),
            connect_timeout: Duration::from_secs(5),
        }
    }

    /// Refuses what no controller would take. Returns KATO in milliseconds, rounded up.
    pub(super) fn check(&self) -> Result<u32, HostError> {
        let refused = |option, value: String, reason| {
            Err(HostError::Option {
                option,
                value,
                reason,
            })
        };
        if self.hostid.is_nil() {
            return refused(
                "--hostid",
                self.hostid.to_string(),
                "it must not be all zeroes",
            );
        }
        if self.nr_io_queues == 0 {
            return refused("--nr-io-queues", "0".to_owned(), "at least 1 is needed");
        }
        if self.queue_size < 2 {
            let reason = "a queue has at least 2 entries";
            return refused("--queue-size", self.queue_size.to_string(), reason);
        }
        if self.connect_timeout.is_zero() {
            let reason = "nothing can be connected to in no time";
            return refused("the connect time-out", "0".to_owned(), reason);
        }
        let millis = self.keep_alive_tmo.as_nanos().div_ceil(1_000_000);
        u32::try_from(millis).or_else(|_| {
            let reason = "the most is 4294967 s";
            refused(
                "--keep-alive-tmo",
                format!("{:?}", self.keep_alive_tmo),
                reason,
            )
        })
    }
}
