//! Associations with a controller that is played by a script.

mod ana;
mod bring_up;
mod connect;
mod discovery;
mod events;
mod lies;
mod liveness;
mod namespaces;
mod referrals;
mod traffic;
mod watch;

use std::net::SocketAddr;

use uuid::Uuid;

use super::association::Association;
use super::error::HostError;
use super::options::HostOptions;
use super::scripted::{SUBNQN, Scripted};
use super::{LocalEnd, NamespaceSelector, TargetAddress};
use crate::spec::{Nqn, Sqe};
use crate::transport::Registry;

const HOSTNQN: &str = "nqn.2026-01.org.example:host1";

fn at() -> SocketAddr {
    "192.0.2.1:4420".parse().unwrap()
}

fn target() -> TargetAddress {
    TargetAddress {
        host: at().ip().to_string(),
        port: at().port(),
        subnqn: Nqn::new(SUBNQN).unwrap(),
        local: LocalEnd::default(),
    }
}

fn options() -> HostOptions {
    HostOptions::new(Nqn::new(HOSTNQN).unwrap(), Uuid::from_u128(0x1234))
}

async fn connect(controller: &Scripted) -> Result<Association, HostError> {
    connect_with(controller, &options()).await
}

async fn connect_with(
    controller: &Scripted,
    options: &HostOptions,
) -> Result<Association, HostError> {
    Association::connect_over(controller, &[at()], &target(), options).await
}

/// The error of a bring-up, which must be one line.
async fn refused(controller: &Scripted) -> HostError {
    let error = connect(controller).await.unwrap_err();
    assert!(!error.to_string().contains('\n'), "{error}");
    error
}

/// A fabrics command of this type.
fn is_fabrics(sqe: &Sqe, fctype: u8) -> bool {
    sqe.opcode == crate::spec::opcode::fabrics::OPCODE && sqe.fctype() == fctype
}

fn assert_send<T: Send>(_: &T) {}

#[test]
fn what_an_association_does_can_be_done_in_a_task() {
    fn futures(registry: &Registry, association: Association) {
        assert_send(&Association::connect(registry, &target(), &options()));
        assert_send(&association.namespaces());
        assert_send(&association.select(&NamespaceSelector::Only));
        assert_send(&association.reidentify(1));
        assert_send(&association.ana_log());
        assert_send(&association.open_io_queues(registry));
        assert_send(&association.shutdown(std::time::Duration::ZERO));
    }
    let _ = futures;
}
