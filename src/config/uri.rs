//! URI of a remote namespace: `nvme+tcp://HOST[:PORT]/SUBNQN[?nsid=N | ?uuid=U | ?nguid=G]`, and
//! where connections begin: `&host-traddr=ADDRESS&host-iface=NAME`.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use nvmf::host::{LocalEnd, NamespaceSelector, TargetAddress};
use nvmf::spec::discovery::{DISCOVERY_PORT, IO_PORT};
use nvmf::spec::nqn::{DISCOVERY_NQN, NqnError};
use nvmf::spec::{NSID_ALL, Nqn};

use super::ids::{IdError, parse_nguid, parse_uuid};

const SCHEME: &str = "nvme+tcp";
/// Of what is found by asking a discovery controller.
pub(super) const DISCOVERY_SCHEME: &str = "nvme+tcp-discovery";

/// Keys of where a path begins.
pub(super) const HOST_TRADDR: &str = "host-traddr";
pub(super) const HOST_IFACE: &str = "host-iface";

/// A remote namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Uri {
    /// Its subsystem, and where that is.
    pub(crate) target: TargetAddress,
    /// Which of the subsystem's namespaces.
    pub(crate) selector: NamespaceSelector,
}

/// Where to ask what there is: `nvme+tcp://HOST[:PORT]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiscoveryUri {
    /// Host name, IPv4 or IPv6 address; no brackets.
    pub(crate) host: String,
    /// TCP port, when only that one is to be asked.
    pub(crate) port: Option<u16>,
}

impl DiscoveryUri {
    /// Where the discovery controller may be: on the port that is given, else on those that are usual.
    pub(crate) fn targets(&self) -> Vec<TargetAddress> {
        let ports = self
            .port
            .map_or(vec![DISCOVERY_PORT, IO_PORT], |port| vec![port]);
        let target = |port| TargetAddress {
            host: self.host.clone(),
            port,
            subnqn: Nqn::discovery(),
            local: LocalEnd::default(),
        };
        ports.into_iter().map(target).collect()
    }
}

/// Why a string is not the URI of a namespace, or of a host to ask.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UriError {
    /// Not this scheme.
    #[error(
        "a URI begins with {SCHEME}://, as in {SCHEME}://HOST:4420/SUBNQN; that of a disk to be found by discovery \
         with {DISCOVERY_SCHEME}://"
    )]
    Scheme,
    /// No host.
    #[error("there is no host; write {SCHEME}://HOST:4420/SUBNQN")]
    NoHost,
    /// Not a name or an address.
    #[error("'{0}' is not a host name or an address; write an IPv6 address in brackets")]
    Host(String),
    /// Not a port.
    #[error("'{0}' is not a port; write a number from 1 to 65535, or leave it out for 4420")]
    Port(String),
    /// No subsystem.
    #[error("there is no subsystem; write its NQN after the host: {SCHEME}://HOST:4420/SUBNQN")]
    NoSubsystem,
    /// Bad subsystem name.
    #[error("subsystem '{nqn}': {error}")]
    Subsystem {
        /// As written.
        nqn: String,
        /// What is wrong with it.
        error: NqnError,
    },
    /// A discovery subsystem.
    #[error("a discovery subsystem has no namespaces; write the NQN of one that it lists")]
    Discovery,
    /// Bad percent-encoding.
    #[error("'{0}' is not percent-encoded UTF-8; write % itself as %25")]
    Encoding(String),
    /// A fragment.
    #[error("'#' begins nothing here; write # in a name as %23")]
    Fragment,
    /// More than a host, where subsystems are to be found out.
    #[error(
        "discovery asks a host what subsystems it has; write {SCHEME}://HOST[:PORT] alone, \
         without '{0}'"
    )]
    NotAlone(String),
    /// A subsystem in the place of a pattern.
    #[error(
        "with {DISCOVERY_SCHEME}, write the subsystem as a pattern: {DISCOVERY_SCHEME}://HOST/?nqn={0}"
    )]
    NotAPattern(String),
    /// Two patterns.
    #[error("a disk is of one subsystem; keep one nqn=")]
    TwoPatterns,
    /// Bad pattern.
    #[error(
        "nqn={0}: write a subsystem's NQN, in which * is any text and ? any character, or leave it out"
    )]
    Pattern(String),
    /// A key that does not exist.
    #[error("'{0}' does not select a namespace; write ?nsid=N, ?uuid=U or ?nguid=G")]
    Key(String),
    /// Bad address of this machine.
    #[error("{HOST_TRADDR}={0}: write an IPv4 or IPv6 address of this machine")]
    HostTraddr(String),
    /// Bad interface of this machine.
    #[error("{HOST_IFACE}: {0}")]
    HostIface(String),
    /// A path begins in one place.
    #[error("{0}= is there twice; keep one")]
    Twice(&'static str),
    /// Two selectors.
    #[error("one namespace is selected once; keep one of nsid=, uuid= and nguid=")]
    TwoSelectors,
    /// Bad namespace identifier.
    #[error("nsid={0}: write a number from 1 to 4294967294")]
    Nsid(String),
    /// Bad UUID or NGUID.
    #[error("{key}={value}: {error}")]
    Id {
        /// Which of the two.
        key: &'static str,
        /// As written.
        value: String,
        /// What is wrong with it.
        error: IdError,
    },
}

/// Under which name others reach a listener: where it listens on every address, this machine's name,
/// or the loopback address when it has none.
pub(crate) fn host_of_listener(local: SocketAddr, hostname: Option<&str>) -> String {
    match local {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => format!("{}%{}", v6.ip(), v6.scope_id()),
        _ if !local.ip().is_unspecified() => local.ip().to_string(),
        _ => match hostname.filter(|name| is_name(name)) {
            Some(name) => name.to_owned(),
            None if local.is_ipv6() => Ipv6Addr::LOCALHOST.to_string(),
            None => Ipv4Addr::LOCALHOST.to_string(),
        },
    }
}

/// Host and port of `HOST[:PORT]`; an IPv6 address loses its brackets.
pub(super) fn parse_authority(authority: &str) -> Result<(String, Option<u16>), UriError> {
    if authority.is_empty() {
        return Err(UriError::NoHost);
    }
    let wrong = || UriError::Host(authority.to_owned());
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (address, rest) = rest.split_once(']').ok_or_else(wrong)?;
        let port = match rest.strip_prefix(':') {
            None if !rest.is_empty() => return Err(wrong()),
            port => port,
        };
        (ipv6(address).ok_or_else(wrong)?, port)
    } else {
        let (host, port) = match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        };
        // A second colon: most likely an IPv6 address without its brackets.
        if port.is_some_and(|port| port.contains(':')) {
            return Err(wrong());
        }
        if host.is_empty() {
            return Err(UriError::NoHost);
        }
        if !is_name(host) {
            return Err(wrong());
        }
        (host.to_owned(), port)
    };
    let port = match port {
        None => None,
        Some(text) => Some(
            parse_number(text)
                .and_then(|port| u16::try_from(port).ok())
                .filter(|&port| port != 0)
                .ok_or_else(|| UriError::Port(text.to_owned()))?,
        ),
    };
    Ok((host, port))
}

/// An IPv6 address with or without a zone, whose `%` may be encoded as URIs want it (RFC 6874).
fn ipv6(text: &str) -> Option<String> {
    let (address, zone) = match text.split_once('%') {
        Some((address, zone)) => (address, Some(zone.strip_prefix("25").unwrap_or(zone))),
        None => (text, None),
    };
    let address: Ipv6Addr = address.parse().ok()?;
    match zone {
        None => Some(address.to_string()),
        Some(zone) if is_name(zone) => Some(format!("{address}%{zone}")),
        Some(_) => None,
    }
}

/// A host name, an IPv4 address, or an IPv6 address without brackets.
pub(crate) fn parse_host(text: &str) -> Option<String> {
    ipv6(text).or_else(|| is_name(text).then(|| text.to_owned()))
}

fn is_name(host: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    !host.is_empty() && host.len() <= 253 && host.bytes().all(allowed)
}

/// Digits alone: `u32::from_str` takes a sign too.
fn parse_number(text: &str) -> Option<u32> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

fn after_scheme(text: &str) -> Result<&str, UriError> {
    let (scheme, rest) = text.split_once("://").ok_or(UriError::Scheme)?;
    match scheme.eq_ignore_ascii_case(SCHEME) {
        true => Ok(rest),
        false => Err(UriError::Scheme),
    }
}

impl FromStr for DiscoveryUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let rest = after_scheme(text)?;
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, more) = rest.split_at(end);
        if !matches!(more.strip_prefix('/'), Some("" | DISCOVERY_NQN)) && !more.is_empty() {
            return Err(UriError::NotAlone(more.to_owned()));
        }
        let (host, port) = parse_authority(authority)?;
        Ok(Self { host, port })
    }
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let rest = after_scheme(text)?;
        if rest.contains('#') {
            return Err(UriError::Fragment);
        }
        let (rest, query) = match rest.split_once('?') {
            Some((rest, query)) => (rest, Some(query)),
            None => (rest, None),
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (host, port) = parse_authority(authority)?;
        let port = port.unwrap_or(IO_PORT);
        let subnqn = parse_subsystem(path)?;
        let (local, selectors) =
            query.map_or(Ok((LocalEnd::default(), Vec::new())), parse_local)?;
        let selector = match selectors.is_empty() {
            true => NamespaceSelector::Only,
            false => parse_selector(&selectors.join("&"))?,
        };
        Ok(Self {
            target: TargetAddress {
                host,
                port,
                subnqn,
                local,
            },
            selector,
        })
    }
}

fn parse_subsystem(path: &str) -> Result<Nqn, UriError> {
    if path.is_empty() {
        return Err(UriError::NoSubsystem);
    }
    let name = decode(path)?;
    let nqn = Nqn::new(name.as_str()).map_err(|error| UriError::Subsystem { nqn: name, error })?;
    if nqn == Nqn::discovery() {
        return Err(UriError::Discovery);
    }
    Ok(nqn)
}

/// Takes where a path begins out of a query.
fn parse_local(query: &str) -> Result<(LocalEnd, Vec<&str>), UriError> {
    let mut local = LocalEnd::default();
    let mut others = Vec::new();
    for pair in query.split('&') {
        match pair.split_once('=') {
            Some((HOST_TRADDR, value)) => {
                let value = decode(value)?;
                let address = value.parse().map_err(|_| UriError::HostTraddr(value))?;
                if local.address.replace(address).is_some() {
                    return Err(UriError::Twice(HOST_TRADDR));
                }
            }
            Some((HOST_IFACE, value)) => {
                let interface = parse_interface(&decode(value)?).map_err(UriError::HostIface)?;
                if local.interface.replace(interface).is_some() {
                    return Err(UriError::Twice(HOST_IFACE));
                }
            }
            _ => others.push(pair),
        }
    }
    Ok((local, others))
}

/// The name of a network interface, as Linux allows it.
///
/// # Errors
/// One line that says what to write.
pub(crate) fn parse_interface(name: &str) -> Result<String, String> {
    let allowed = |b: u8| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'&' | b'%');
    if (1..=15).contains(&name.len()) && name.bytes().all(allowed) {
        Ok(name.to_owned())
    } else {
        Err(format!(
            "'{name}' is not the name of a network interface; write one that 'ip link' shows"
        ))
    }
}

pub(crate) fn parse_selector(query: &str) -> Result<NamespaceSelector, UriError> {
    let mut found = None;
    for pair in query.split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = decode(value)?;
        let id = |key, error| UriError::Id {
            key,
            value: value.clone(),
            error,
        };
        let selector = match key {
            "nsid" => parse_number(&value)
                .filter(|&nsid| nsid != 0 && nsid != NSID_ALL)
                .map(NamespaceSelector::Nsid)
                .ok_or_else(|| UriError::Nsid(value.clone()))?,
            "uuid" => {
                NamespaceSelector::Uuid(parse_uuid(&value).map_err(|error| id("uuid", error))?)
            }
            "nguid" => {
                NamespaceSelector::Nguid(parse_nguid(&value).map_err(|error| id("nguid", error))?)
            }
            other => return Err(UriError::Key(other.to_owned())),
        };
        if found.replace(selector).is_some() {
            return Err(UriError::TwoSelectors);
        }
    }
    Ok(found.unwrap_or(NamespaceSelector::Only))
}

pub(super) fn decode(text: &str) -> Result<String, UriError> {
    let wrong = || UriError::Encoding(text.to_owned());
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let ([high, low], tail) = tail.split_first_chunk().ok_or_else(wrong)?;
        let digit = |b: u8| char::from(b).to_digit(16).ok_or_else(wrong);
        bytes.push((digit(*high)? << 4 | digit(*low)?) as u8);
        rest = tail;
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

impl fmt::Display for Uri {
    /// A URI that [`Uri::from_str`] reads back as the same.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TargetAddress {
            host,
            port,
            subnqn,
            local,
        } = &self.target;
        match host.contains(':') {
            true => write!(f, "{SCHEME}://[{host}]:{port}/")?,
            false => write!(f, "{SCHEME}://{host}:{port}/")?,
        }
        for character in subnqn.as_str().chars() {
            match character {
                '%' | '?' | '#' => write!(f, "%{:02X}", u32::from(character))?,
                other => write!(f, "{other}")?,
            }
        }
        let selector = match &self.selector {
            NamespaceSelector::Only => None,
            selector => Some(selector.to_string()),
        };
        let address = (local.address).map(|address| format!("{HOST_TRADDR}={address}"));
        let interface = (local.interface.as_ref()).map(|name| format!("{HOST_IFACE}={name}"));
        for (pair, mark) in [selector, address, interface]
            .into_iter()
            .flatten()
            .zip(std::iter::once('?').chain(std::iter::repeat('&')))
        {
            write!(f, "{mark}{pair}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const NQN: &str = "nqn.2026-01.org.example:disk1";

    fn parse(rest: &str) -> Result<Uri, UriError> {
        format!("nvme+tcp://{rest}").parse()
    }

    #[test]
    fn the_port_defaults_to_4420() {
        let uri = parse(&format!("storage.example/{NQN}")).unwrap();
        assert_eq!(
            (uri.target.host.as_str(), uri.target.port),
            ("storage.example", 4420)
        );
        assert_eq!(uri.target.subnqn.as_str(), NQN);
        assert_eq!(uri.selector, NamespaceSelector::Only);
        let uri = parse(&format!("10.0.0.1:4421/{NQN}")).unwrap();
        assert_eq!(
            (uri.target.host.as_str(), uri.target.port),
            ("10.0.0.1", 4421)
        );
    }

    #[test]
    fn a_path_may_say_where_it_begins() {
        let text =
            format!("nvme+tcp://storage:4420/{NQN}?nsid=2&host-traddr=fd00::5&host-iface=eth1.100");
        let uri: Uri = text.parse().unwrap();
        assert_eq!(uri.selector, NamespaceSelector::Nsid(2));
        assert_eq!(uri.target.local.address, Some("fd00::5".parse().unwrap()));
        assert_eq!(uri.target.local.interface.as_deref(), Some("eth1.100"));
        assert_eq!(uri.to_string(), text);
        let uri = parse(&format!("storage/{NQN}?host-iface=eth0")).unwrap();
        assert_eq!(uri.selector, NamespaceSelector::Only);
        assert_eq!(uri.to_string().parse::<Uri>().unwrap(), uri);
        for (query, named) in [
            ("host-traddr=eth0", "host-traddr=eth0"),
            (
                "host-traddr=::1&host-traddr=::1",
                "host-traddr= is there twice",
            ),
            ("host-iface=", "host-iface: ''"),
            ("host-iface=a%2Fb", "'a/b'"),
            ("host-iface=sixteen-bytes-xx", "sixteen-bytes-xx"),
            ("host=x", "'host'"),
        ] {
            let error = parse(&format!("storage/{NQN}?{query}")).unwrap_err();
            assert!(error.to_string().contains(named), "{error}");
        }
    }

    #[test]
    fn ipv6_is_in_brackets_and_may_have_a_zone() {
        let uri = parse(&format!("[fd00::1]:4421/{NQN}")).unwrap();
        assert_eq!(
            (uri.target.host.as_str(), uri.target.port),
            ("fd00::1", 4421)
        );
        for zone in ["%25eth0", "%eth0"] {
            let uri = parse(&format!("[fe80::1{zone}]/{NQN}")).unwrap();
            assert_eq!(
                (uri.target.host.as_str(), uri.target.port),
                ("fe80::1%eth0", 4420)
            );
        }
    }

    #[test]
    fn each_selector_is_read() {
        let uuid = Uuid::from_u128(7);
        for (query, selector) in [
            ("nsid=3".to_owned(), NamespaceSelector::Nsid(3)),
            (format!("uuid={uuid}"), NamespaceSelector::Uuid(uuid)),
            (
                format!("nguid={:032x}", 7),
                NamespaceSelector::Nguid(*uuid.as_bytes()),
            ),
        ] {
            assert_eq!(
                parse(&format!("h/{NQN}?{query}")).unwrap().selector,
                selector
            );
        }
    }

    #[test]
    fn a_uri_survives_being_shown() {
        for rest in [
            format!("h:4420/{NQN}"),
            format!("[fe80::1%eth0]:1/{NQN}/x?nsid=4294967294"),
            "h:65535/nqn.2026-01.org.example:a%25b%3Fc%23d".to_owned(),
            format!("h:4420/{NQN}?nguid={:032x}", 1),
            format!("h:4420/{NQN}?uuid={}", Uuid::from_u128(1)),
        ] {
            let uri = parse(&rest).unwrap();
            assert_eq!(uri.to_string(), format!("nvme+tcp://{rest}"));
            assert_eq!(uri.to_string().parse(), Ok(uri));
        }
    }

    #[test]
    fn percent_encoding_is_undone() {
        let uri = parse("h/nqn.2026-01.org.example%3Adisk1?nsid=%31").unwrap();
        assert_eq!(uri.target.subnqn.as_str(), NQN);
        assert_eq!(uri.selector, NamespaceSelector::Nsid(1));
    }

    #[test]
    fn a_wrong_host_or_port_is_named() {
        let host = |text: &str| Err(UriError::Host(text.to_owned()));
        assert_eq!(parse(&format!("/{NQN}")), Err(UriError::NoHost));
        assert_eq!(parse(&format!(":4420/{NQN}")), Err(UriError::NoHost));
        assert_eq!(parse(&format!("fd00::1/{NQN}")), host("fd00::1"));
        assert_eq!(parse(&format!("[fd00::1/{NQN}")), host("[fd00::1"));
        assert_eq!(parse(&format!("[::1]4420/{NQN}")), host("[::1]4420"));
        assert_eq!(parse(&format!("[10.0.0.1]/{NQN}")), host("[10.0.0.1]"));
        assert_eq!(parse(&format!("[fe80::1%]/{NQN}")), host("[fe80::1%]"));
        assert_eq!(parse(&format!("me@h/{NQN}")), host("me@h"));
        for port in ["", "0", "65536", "+1", "nvme"] {
            assert_eq!(
                parse(&format!("h:{port}/{NQN}")),
                Err(UriError::Port(port.to_owned()))
            );
        }
    }

    #[test]
    fn discovery_takes_a_host_alone() {
        let discovery = |rest: &str| format!("nvme+tcp://{rest}").parse::<DiscoveryUri>();
        for (rest, host, port) in [
            ("storage.example", "storage.example", None),
            ("10.0.0.1:8010/", "10.0.0.1", Some(8010)),
            ("[fd00::1]", "fd00::1", None),
            ("[fd00::1]:1", "fd00::1", Some(1)),
            ("h/nqn.2014-08.org.nvmexpress.discovery", "h", None),
        ] {
            let host = host.to_owned();
            assert_eq!(discovery(rest), Ok(DiscoveryUri { host, port }));
        }
        for more in [format!("/{NQN}"), "?nsid=1".to_owned(), "#x".to_owned()] {
            let error = discovery(&format!("h{more}"));
            assert_eq!(error, Err(UriError::NotAlone(more)));
        }
        assert_eq!(discovery(""), Err(UriError::NoHost));
        assert_eq!(discovery("h:0"), Err(UriError::Port("0".to_owned())));
        assert_eq!("h".parse::<DiscoveryUri>(), Err(UriError::Scheme));
    }

    #[test]
    fn a_wrong_scheme_subsystem_or_selector_is_named() {
        assert_eq!(NQN.parse::<Uri>(), Err(UriError::Scheme));
        assert_eq!(
            format!("nvme+rdma://h/{NQN}").parse::<Uri>(),
            Err(UriError::Scheme)
        );
        assert_eq!(parse("h"), Err(UriError::NoSubsystem));
        assert_eq!(parse("h/"), Err(UriError::NoSubsystem));
        assert_eq!(parse("h?nsid=1"), Err(UriError::NoSubsystem));
        assert!(matches!(parse("h/disk1"), Err(UriError::Subsystem { .. })));
        assert_eq!(
            parse(&format!("h/{}", Nqn::discovery())),
            Err(UriError::Discovery)
        );
        assert_eq!(parse(&format!("h/{NQN}#1")), Err(UriError::Fragment));
        assert_eq!(parse("h/nqn%"), Err(UriError::Encoding("nqn%".to_owned())));
        for (query, error) in [
            ("", UriError::Key(String::new())),
            ("ns=1", UriError::Key("ns".into())),
            ("nsid=1&nsid=2", UriError::TwoSelectors),
            ("nsid", UriError::Nsid(String::new())),
            ("nsid=0", UriError::Nsid("0".into())),
            ("nsid=4294967295", UriError::Nsid("4294967295".into())),
        ] {
            assert_eq!(parse(&format!("h/{NQN}?{query}")), Err(error));
        }
        assert!(matches!(
            parse(&format!("h/{NQN}?uuid=1")),
            Err(UriError::Id { key: "uuid", .. })
        ));
    }

    #[test]
    fn a_listener_on_every_address_is_shown_under_a_name() {
        let host = |local: &str, name| host_of_listener(local.parse().unwrap(), name);
        assert_eq!(host("127.0.0.1:4420", Some("box")), "127.0.0.1");
        assert_eq!(host("[fd00::1]:4420", None), "fd00::1");
        assert_eq!(host("[fe80::1%3]:4420", None), "fe80::1%3");
        assert_eq!(host("0.0.0.0:4420", Some("box")), "box");
        assert_eq!(host("0.0.0.0:4420", Some("my box")), "127.0.0.1");
        assert_eq!(host("[::]:1", None), "::1");
    }
}
