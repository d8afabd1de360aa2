//! The discovery subsystem: what its controllers answer, and the log of who is reached where.
//!
//! A log is made for the host that asks: of the subsystems that it may connect to, at the addresses
//! that it can reach the way it came.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError};

use zerocopy::{FromZeros, IntoBytes};

use super::association::Association;
use super::fabrics::MAX_ADMIN_QUEUE;
use super::notices::Notices;
use super::subsystem::Subsystem;
use super::{Limits, Target, identify, log_page};
use crate::spec::discovery::{
    DiscoveryHeader, DiscoveryRecord, RECORD_LEN, adrfam, eflags, sectype, subtype, treq,
};
use crate::spec::event::config;
use crate::spec::fabrics::CNTLID_DYNAMIC;
use crate::spec::feature::fid;
use crate::spec::identify::{IDENTIFY_LEN, cns};
use crate::spec::log::{RETAIN_EVENT, lid};
use crate::spec::{Nqn, Sqe, Status, trtype};

/// CNTRLTYPE of a discovery controller.
const DISCOVERY_CONTROLLER: u8 = 2;
/// LPA: extended data, so offsets and long parts.
const LPA: u8 = 1 << 2;

/// Where a target listens, and how often that has changed.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    generation: u64,
    last: u16,
    all: Vec<Listener>,
}

#[derive(Debug)]
struct Listener {
    portid: u16,
    address: SocketAddr,
    /// I/O subsystems are reached there, and not discovery alone.
    serves_io: bool,
}

/// A listener's place in the log of its target, until dropped.
pub(super) struct Listed {
    target: Arc<Target>,
    portid: u16,
    pub(super) serves_io: bool,
}

impl Listed {
    pub(super) fn new(target: &Arc<Target>, address: SocketAddr, serves_io: bool) -> Self {
        let mut listeners = target.listeners();
        listeners.generation = listeners.generation.wrapping_add(1);
        listeners.last = listeners.last.wrapping_add(1);
        let portid = listeners.last;
        listeners.all.push(Listener {
            portid,
            address,
            serves_io,
        });
        drop(listeners);
        target.discovery.report(Notices::discovery);
        Self {
            target: Arc::clone(target),
            portid,
            serves_io,
        }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut listeners = self.target.listeners();
        listeners.generation = listeners.generation.wrapping_add(1);
        listeners.all.retain(|other| other.portid != self.portid);
        drop(listeners);
        self.target.discovery.report(Notices::discovery);
    }
}

impl Target {
    fn listeners(&self) -> std::sync::MutexGuard<'_, Listeners> {
        // Every change under this lock is complete in itself.
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A host as it came: what its log depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Viewpoint {
    pub(super) host: Nqn,
    /// The address of ours that it connected to.
    pub(super) local: SocketAddr,
}

impl Listener {
    /// The address at which a host reaches it that has come to `local`; `None` when it cannot.
    fn seen_from(&self, local: IpAddr) -> Option<IpAddr> {
        let asking = local.to_canonical();
        let own = self.address.ip().to_canonical();
        if own.is_unspecified() {
            let heard = match (own.is_ipv4(), asking.is_ipv4()) {
                // On sockets for both families, IPv4 arrives as IPv6 with a prefix.
                (false, true) => local.is_ipv6(),
                (own, asking) => own == asking,
            };
            return heard.then_some(asking);
        }
        let reached =
            own.is_ipv4() == asking.is_ipv4() && (asking.is_loopback() || !own.is_loopback());
        reached.then_some(own)
    }

    fn record(&self, address: IpAddr, subsystem: &Subsystem) -> DiscoveryRecord {
        let mut record = DiscoveryRecord::new_zeroed();
        record.trtype = trtype::TCP;
        record.adrfam = match address {
            IpAddr::V4(_) => adrfam::IPV4,
            IpAddr::V6(_) => adrfam::IPV6,
        };
        // Nothing about a secure channel, which the security type rules out: hosts that are told that one is not
        // required have been seen to try it (libnvme 1.3).
        record.treq = treq::DISABLE_SQ_FLOW;
        record.portid = self.portid.into();
        record.cntlid = CNTLID_DYNAMIC.into();
        record.asqsz = (MAX_ADMIN_QUEUE as u16).into();
        (record.subtype, record.eflags) = if subsystem.is_discovery() {
            (
                subtype::CURRENT,
                (eflags::DUPRETINFO | eflags::EPCSD).into(),
            )
        } else {
            (subtype::NVM, 0.into())
        };
        record.trsvcid = identify::padded(&self.address.port().to_string());
        record.subnqn = subsystem.nqn().to_field();
        record.traddr = identify::padded(&address.to_string());
        record.tsas[0] = sectype::NONE;
        record
    }
}

/// The whole log of a target as one host sees it.
fn log(target: &Target, view: &Viewpoint) -> Vec<u8> {
    let listeners = target.listeners();
    let mut page = vec![0; RECORD_LEN];
    let mut numrec = 0u64;
    for listener in &listeners.all {
        let Some(address) = listener.seen_from(view.local.ip()) else {
            continue;
        };
        let io = target.subsystems.iter().filter(|_| listener.serves_io);
        let visible = io.filter(|subsystem| subsystem.allows(&view.host));
        for subsystem in visible.chain([&target.discovery]) {
            page.extend_from_slice(listener.record(address, subsystem).as_bytes());
            numrec += 1;
        }
    }
    let mut header = DiscoveryHeader::new_zeroed();
    header.genctr = listeners.generation.into();
    header.numrec = numrec.into();
    page[..RECORD_LEN].copy_from_slice(header.as_bytes());
    page
}

/// Answers Get Log Page on a discovery controller.
///
/// # Errors
/// The status to answer with.
pub(super) fn get_log_page(
    sqe: &Sqe,
    data_len: u32,
    association: &Association,
    target: &Target,
    view: &Viewpoint,
) -> Result<Vec<u8>, Status> {
    let request = log_page::request(sqe, data_len, &target.limits)?;
    if request.lid != lid::DISCOVERY {
        return Err(Status::INVALID_FIELD.do_not_retry());
    }
    if sqe.cdw10.get() & RETAIN_EVENT == 0 {
        // Before it is made: what changes meanwhile is reported.
        association.notices(Notices::discovery_read);
    }
    log_page::part(log(target, view), request)
}

/// Answers Identify on a discovery controller: its own structure is all that it has.
///
/// # Errors
/// The status to answer with.
pub(super) fn identify(
    sqe: &Sqe,
    data_len: u32,
    subsystem: &Subsystem,
    cntlid: u16,
    limits: &Limits,
) -> Result<Vec<u8>, Status> {
    if data_len as usize != IDENTIFY_LEN {
        return Err(Status::DATA_SGL_LENGTH_INVALID.do_not_retry());
    }
    if sqe.cdw10.get() as u8 != cns::CONTROLLER {
        return Err(Status::INVALID_FIELD.do_not_retry());
    }
    let mut id = identify::controller(subsystem, cntlid, limits);
    id.cntrltype = DISCOVERY_CONTROLLER;
    id.lpa = LPA;
    // There are no namespaces, and no I/O queues to reach any.
    id.oaes = config::DISCOVERY_CHANGE.into();
    id.nn = 0.into();
    id.mnan = 0.into();
    id.oncs = 0.into();
    id.vwc = 0;
    id.sqes = 0;
    id.cqes = 0;
    id.ioccsz = 0.into();
    id.iorcsz = 0.into();
    id.ofcs = 0.into();
    Ok(id.as_bytes().to_vec())
}

/// Features that a discovery controller has.
pub(super) fn has_feature(sqe: &Sqe) -> bool {
    let fid = sqe.cdw10.get() as u8;
    matches!(fid, fid::ASYNC_EVENT_CONFIG | fid::KEEP_ALIVE_TIMER)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(listener: &str, local: &str) -> Option<String> {
        let listener = Listener {
            portid: 1,
            address: listener.parse().unwrap(),
            serves_io: true,
        };
        let address = listener.seen_from(local.parse().unwrap());
        address.map(|address| address.to_string())
    }

    #[test]
    fn a_wildcard_listener_is_where_the_host_came_and_of_its_family() {
        for (listener, local, expected) in [
            ("0.0.0.0:1", "192.0.2.7", Some("192.0.2.7")),
            ("0.0.0.0:1", "2001:db8::7", None),
            ("0.0.0.0:1", "127.0.0.1", Some("127.0.0.1")),
            ("[::]:1", "2001:db8::7", Some("2001:db8::7")),
            // Whether it hears IPv4 is not known, until a host comes that way.
            ("[::]:1", "192.0.2.7", None),
            ("[::]:1", "::ffff:192.0.2.7", Some("192.0.2.7")),
            ("0.0.0.0:1", "::ffff:192.0.2.7", Some("192.0.2.7")),
        ] {
            assert_eq!(
                seen(listener, local).as_deref(),
                expected,
                "{listener} from {local}"
            );
        }
    }

    #[test]
    fn a_listener_with_an_address_keeps_it_and_loopback_stays_on_the_machine() {
        for (listener, local, expected) in [
            ("192.0.2.1:1", "192.0.2.7", Some("192.0.2.1")),
            ("192.0.2.1:1", "::ffff:192.0.2.7", Some("192.0.2.1")),
            ("192.0.2.1:1", "2001:db8::7", None),
            ("[2001:db8::1]:1", "2001:db8::7", Some("2001:db8::1")),
            ("[2001:db8::1]:1", "192.0.2.7", None),
            ("192.0.2.1:1", "127.0.0.1", Some("192.0.2.1")),
            ("127.0.0.1:1", "192.0.2.7", None),
            ("127.0.0.1:1", "127.0.0.1", Some("127.0.0.1")),
        ] {
            assert_eq!(
                seen(listener, local).as_deref(),
                expected,
                "{listener} from {local}"
            );
        }
    }
}
