//! Where a subsystem is reached: host, port and NQN, and the socket addresses behind them.

use std::net::{SocketAddr, SocketAddrV6};

use tokio::time::{Instant, timeout_at};

use super::error::HostError;
use crate::spec::Nqn;
use crate::transport::tcp::LocalEnd;

/// Addresses tried for one name, at most.
const ADDRESSES_MAX: usize = 8;

/// A subsystem at a transport address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetAddress {
    /// Host name, IPv4 or IPv6 address; no brackets.
    pub host: String,
    /// TCP port; 4420 by convention.
    pub port: u16,
    /// The subsystem.
    pub subnqn: Nqn,
    /// Where connections to it begin.
    pub local: LocalEnd,
}

impl std::fmt::Display for TargetAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            host, port, subnqn, ..
        } = self;
        if host.contains(':') {
            write!(f, "nvme+tcp://[{host}]:{port}/{subnqn}")?;
        } else {
            write!(f, "nvme+tcp://{host}:{port}/{subnqn}")?;
        }
        match self.local == LocalEnd::default() {
            true => Ok(()),
            false => write!(f, " {}", self.local),
        }
    }
}

impl TargetAddress {
    /// The socket addresses, in the resolver's order, none twice; at least one.
    pub(super) async fn resolve(&self, deadline: Instant) -> Result<Vec<SocketAddr>, HostError> {
        if let Some(address) = self.literal() {
            return Ok(vec![address]);
        }
        let failed = |reason: String| HostError::Resolve {
            host: self.host.clone(),
            reason,
        };
        let lookup = tokio::net::lookup_host((self.host.as_str(), self.port));
        let found = timeout_at(deadline, lookup)
            .await
            .map_err(|_| failed("the resolver did not answer in time".to_owned()))?
            .map_err(|error| failed(error.to_string()))?;
        let mut addresses = Vec::new();
        for address in found {
            if !addresses.contains(&address) && addresses.len() < ADDRESSES_MAX {
                addresses.push(address);
            }
        }
        if addresses.is_empty() {
            return Err(failed("it has no address".to_owned()));
        }
        Ok(addresses)
    }

    /// The address itself, when no resolver is needed. An IPv6 address may have a numeric scope.
    pub(super) fn literal(&self) -> Option<SocketAddr> {
        if let Ok(ip) = self.host.parse() {
            return Some(SocketAddr::new(ip, self.port));
        }
        let scoped: SocketAddrV6 = format!("[{}]:{}", self.host, self.port).parse().ok()?;
        Some(scoped.into())
    }
}

/// When an attempt must be over, so that each of `left` attempts, this one included, gets an equal
/// share of what remains.
pub(super) fn share(now: Instant, end: Instant, left: usize) -> Instant {
    let left = u32::try_from(left.max(1)).unwrap_or(u32::MAX);
    now + end.saturating_duration_since(now) / left
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn target(host: &str) -> TargetAddress {
        TargetAddress {
            host: host.to_owned(),
            port: 4420,
            subnqn: Nqn::new("nqn.2026-01.org.example:disk1").unwrap(),
            local: LocalEnd::default(),
        }
    }

    async fn resolved(host: &str) -> Result<Vec<SocketAddr>, HostError> {
        let deadline = Instant::now() + Duration::from_secs(10);
        target(host).resolve(deadline).await
    }

    #[test]
    fn ipv6_is_shown_in_brackets_and_names_are_not() {
        let tail = "4420/nqn.2026-01.org.example:disk1";
        assert_eq!(
            target("::1").to_string(),
            format!("nvme+tcp://[::1]:{tail}")
        );
        assert_eq!(target("a.b").to_string(), format!("nvme+tcp://a.b:{tail}"));
    }

    #[tokio::test]
    async fn literal_addresses_need_no_resolver() {
        for (host, shown) in [
            ("127.0.0.1", "127.0.0.1:4420"),
            ("::1", "[::1]:4420"),
            ("fe80::2%3", "[fe80::2%3]:4420"),
        ] {
            let addresses = resolved(host).await.unwrap();
            assert_eq!(addresses.len(), 1);
            assert_eq!(addresses[0].to_string(), shown);
        }
    }

    #[tokio::test]
    async fn a_name_that_does_not_resolve_is_named_in_the_error() {
        let error = resolved("no-such-host.invalid").await.unwrap_err();
        assert!(
            matches!(&error, HostError::Resolve { host, .. } if host == "no-such-host.invalid")
        );
        assert!(!error.to_string().contains('\n'), "{error}");
    }

    #[test]
    fn each_address_gets_an_equal_share_of_what_remains() {
        let now = Instant::now();
        let end = now + Duration::from_secs(6);
        assert_eq!(share(now, end, 3), now + Duration::from_secs(2));
        let later = now + Duration::from_secs(1);
        assert_eq!(share(later, end, 2), later + Duration::from_millis(2500));
        assert_eq!(share(end, end, 1), end);
        assert_eq!(
            share(end, now, 1),
            end,
            "a deadline that has passed leaves nothing"
        );
    }
}
