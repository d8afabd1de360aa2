//! One record of a discovery log: what it says, checked, and what can be connected to because of it.

use std::net::{IpAddr, SocketAddr};

use crate::host::address::TargetAddress;
use crate::spec::discovery::{DiscoveryRecord, adrfam, sectype, subtype, treq};
use crate::spec::fabrics::CNTLID_DYNAMIC;
use crate::spec::{Nqn, trtype};
use crate::transport::tcp::LocalEnd;

/// One way to a subsystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Discovered {
    /// What is there.
    pub kind: DiscoveredKind,
    /// Transport type: see [`trtype`].
    pub trtype: u8,
    /// Address family: see [`adrfam`].
    pub adrfam: u8,
    /// Transport address; printable ASCII.
    pub traddr: String,
    /// Transport service, the port of TCP; printable ASCII.
    pub trsvcid: String,
    /// The subsystem.
    pub subnqn: Nqn,
    /// Port of the subsystem.
    pub portid: u16,
    /// Controller to ask for.
    pub cntlid: u16,
    /// Largest admin queue in entries, as it is told.
    pub asqsz: u16,
    /// Transport requirements: see [`treq`].
    pub treq: u8,
    /// Flags: see [`crate::spec::discovery::eflags`].
    pub eflags: u16,
    /// Where it can be connected to, or what is in the way: a subsystem to attach or, of a referral, a discovery
    /// controller to ask.
    pub target: Result<TargetAddress, String>,
}

/// What a record leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DiscoveredKind {
    /// Another discovery subsystem.
    Referral,
    /// A subsystem with namespaces.
    Nvm,
    /// The discovery subsystem that was asked.
    Current,
}

/// What a record leads to: equal for all spellings of one address and port.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Lead {
    kind: DiscoveredKind,
    trtype: u8,
    host: String,
    port: String,
    subnqn: Nqn,
}

impl Discovered {
    /// What it leads to.
    pub(super) fn lead(&self) -> Lead {
        let (host, port) = match &self.target {
            Ok(TargetAddress { host, port, .. }) => (host.clone(), port.to_string()),
            Err(_) => {
                let address = self.traddr.parse::<IpAddr>();
                let port = self.trsvcid.parse::<u16>();
                (
                    address.map_or(self.traddr.clone(), |it| it.to_canonical().to_string()),
                    port.map_or(self.trsvcid.clone(), |it| it.to_string()),
                )
            }
        };
        Lead {
            kind: self.kind,
            trtype: self.trtype,
            host,
            port,
            subnqn: self.subnqn.clone(),
        }
    }
}

/// What a record of the controller at `at` says, or why it makes no sense.
pub(super) fn digest(record: &DiscoveryRecord, at: SocketAddr) -> Result<Discovered, String> {
    let kind = match record.subtype {
        subtype::REFERRAL => DiscoveredKind::Referral,
        subtype::NVM => DiscoveredKind::Nvm,
        subtype::CURRENT => DiscoveredKind::Current,
        other => return Err(format!("its subsystem type {other} is not known")),
    };
    let subnqn = Nqn::from_field(&record.subnqn)
        .map_err(|error| format!("its subsystem NQN {}: {error}", quoted(&record.subnqn)))?;
    let unprintable = |what, field| format!("its {what} {} is not printable text", quoted(field));
    let traddr = text(&record.traddr).ok_or_else(|| unprintable("address", &record.traddr))?;
    let trsvcid = text(&record.trsvcid).ok_or_else(|| unprintable("port", &record.trsvcid))?;
    let mut discovered = Discovered {
        kind,
        trtype: record.trtype,
        adrfam: record.adrfam,
        traddr,
        trsvcid,
        subnqn,
        portid: record.portid.get(),
        cntlid: record.cntlid.get(),
        asqsz: record.asqsz.get(),
        treq: record.treq,
        eflags: record.eflags.get(),
        target: Err(String::new()),
    };
    discovered.target = target(&discovered, record.tsas[0], at);
    Ok(discovered)
}

/// A string field without its padding, of blanks or zeroes; `None` when it has anything but
/// printable ASCII.
fn text(field: &[u8]) -> Option<String> {
    let text = str::from_utf8(padded(field)).ok()?.trim_matches(' ');
    let printable = text.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
    printable.then(|| text.to_owned())
}

/// A field up to the first zero.
fn padded(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|&b| b == 0).unwrap_or(field.len());
    &field[..end]
}

/// A field that is no text as it can be shown: escaped, and not all of a long one.
fn quoted(field: &[u8]) -> String {
    const SHOWN: usize = 48;
    let field = padded(field);
    let shown = &field[..field.len().min(SHOWN)];
    let more = if shown.len() < field.len() { "…" } else { "" };
    format!("\"{}{more}\"", shown.escape_ascii())
}

/// What can be connected to, or what is in the way.
fn target(record: &Discovered, tls: u8, at: SocketAddr) -> Result<TargetAddress, String> {
    let Discovered {
        kind,
        subnqn,
        traddr,
        trsvcid,
        ..
    } = record;
    match kind {
        DiscoveredKind::Current => return Err("it is the discovery subsystem itself".to_owned()),
        DiscoveredKind::Nvm if *subnqn == Nqn::discovery() => {
            return Err("it is a discovery subsystem".to_owned());
        }
        DiscoveredKind::Nvm | DiscoveredKind::Referral => {}
    }
    if record.trtype != trtype::TCP {
        return Err(format!("transport type {} is not TCP", record.trtype));
    }
    let demands_tls = match record.treq & treq::SECURE_CHANNEL_MASK {
        treq::SECURE_CHANNEL_REQUIRED => true,
        treq::SECURE_CHANNEL_NOT_REQUIRED => false,
        _ => tls != sectype::NONE,
    };
    if demands_tls {
        return Err("it demands TLS, which is not supported".to_owned());
    }
    if record.cntlid != CNTLID_DYNAMIC {
        return Err("it has fixed controllers, which are not supported".to_owned());
    }
    let address: IpAddr = traddr
        .parse()
        .map_err(|_| format!("'{traddr}' is not an IP address"))?;
    let family = match address {
        IpAddr::V4(_) => adrfam::IPV4,
        IpAddr::V6(_) => adrfam::IPV6,
    };
    if record.adrfam != family {
        return Err(format!(
            "'{traddr}' is not of its address family, {}",
            record.adrfam
        ));
    }
    if address.is_unspecified() {
        return Err(format!("'{traddr}' is nowhere in particular"));
    }
    let port = trsvcid.parse().ok().filter(|&port| port != 0);
    Ok(TargetAddress {
        host: host(address, at),
        port: port.ok_or_else(|| format!("'{trsvcid}' is not a port"))?,
        subnqn: subnqn.clone(),
        local: LocalEnd::default(),
    })
}

/// An address in the one spelling that it has here. A link-local one is on the link over which it was told.
fn host(address: IpAddr, told_by: SocketAddr) -> String {
    match (address.to_canonical(), told_by) {
        (IpAddr::V6(v6), SocketAddr::V6(at))
            if v6.is_unicast_link_local() && at.scope_id() != 0 =>
        {
            format!("{v6}%{}", at.scope_id())
        }
        (address, _) => address.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::FromBytes;

    use super::*;
    use crate::spec::discovery::RECORD_LEN;

    /// Records that are mostly right, so that every field is looked at.
    fn some_record() -> impl Strategy<Value = Vec<u8>> {
        let field = |text: &'static [&'static str], len: usize| {
            let noise = prop::collection::vec(any::<u8>(), 0..8);
            (prop::sample::select(text), noise).prop_map(move |(text, noise)| {
                let mut field = text.as_bytes().to_vec();
                field.extend(noise);
                field.resize(len, 0);
                field
            })
        };
        let head = prop::collection::vec(0u8..5, 4);
        let ids = prop::sample::select(vec![0xffu8, 0]);
        (
            head,
            ids,
            field(&["4420", "", "0"], 32),
            field(&["nqn.2026-01.org.example:d", ""], 256),
            field(&["192.0.2.1", "fe80::1", "::ffff:1.2.3.4", "::", "h"], 256),
        )
            .prop_map(|(head, id, trsvcid, subnqn, traddr)| {
                let mut record = vec![0; RECORD_LEN];
                record[..4].copy_from_slice(&head);
                record[6..8].fill(id);
                record[32..64].copy_from_slice(&trsvcid);
                record[256..512].copy_from_slice(&subnqn);
                record[512..768].copy_from_slice(&traddr);
                record
            })
    }

    proptest! {
        #[test]
        fn whatever_a_record_has_what_is_shown_of_it_is_text_and_what_it_leads_to_is_an_address(
            bytes in some_record()
        ) {
            let at: SocketAddr = "[fe80::2%3]:8009".parse().unwrap();
            match digest(DiscoveryRecord::ref_from_bytes(&bytes).unwrap(), at) {
                Ok(record) => {
                    prop_assert!(!record.traddr.contains(char::is_control));
                    prop_assert!(!record.trsvcid.contains(char::is_control));
                    if let Ok(target) = &record.target {
                        prop_assert!(target.literal().is_some(), "{}", target);
                    }
                    prop_assert_eq!(record.lead(), record.lead());
                }
                Err(reason) => prop_assert!(!reason.contains(char::is_control), "{}", reason),
            }
        }
    }

    #[test]
    fn a_link_local_address_is_on_the_link_over_which_it_was_told() {
        for (told_by, address, host) in [
            ("[fe80::2%3]:8009", "fe80::1", "fe80::1%3"),
            ("[fd00::2]:8009", "fe80::1", "fe80::1"),
            ("[fe80::2%3]:8009", "fd00::1", "fd00::1"),
            ("192.0.2.1:8009", "fe80::1", "fe80::1"),
            ("[fe80::2%3]:8009", "::ffff:192.0.2.9", "192.0.2.9"),
        ] {
            let (at, address) = (told_by.parse().unwrap(), address.parse().unwrap());
            assert_eq!(super::host(address, at), host);
        }
    }
}
