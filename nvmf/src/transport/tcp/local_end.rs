//! Where on this machine connections begin: an address, a network interface, or what the system's routes say.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};

use tokio::net::{TcpSocket, TcpStream};

/// Where connections begin. Each part that is not given is for the system to choose.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct LocalEnd {
    /// An address of this machine, of the same family as the controller's (host transport address).
    pub address: Option<IpAddr>,
    /// The network interface that everything goes through, at most 15 bytes (host interface).
    pub interface: Option<String>,
}

impl LocalEnd {
    /// What is given here, and of `other` what is not.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        Self {
            address: self.address.or(other.address),
            interface: self.interface.clone().or_else(|| other.interface.clone()),
        }
    }

    /// Connects from here.
    ///
    /// # Errors
    /// The operating system's; where it does not let connections begin here, with what was asked for.
    pub(super) async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        let socket = match to {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        }?;
        self.bind(&socket, to).map_err(|error| {
            io::Error::new(error.kind(), format!("cannot connect {self}: {error}"))
        })?;
        socket.connect(to).await
    }

    fn bind(&self, socket: &TcpSocket, to: SocketAddr) -> io::Result<()> {
        if let Some(interface) = &self.interface {
            socket.bind_device(Some(interface.as_bytes()))?;
        }
        match self.address {
            None => Ok(()),
            Some(address) if address.is_ipv4() == to.is_ipv4() => {
                socket.bind(SocketAddr::new(address, 0))
            }
            Some(_) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is of another family", to.ip()),
            )),
        }
    }
}

impl fmt::Display for LocalEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.address, &self.interface) {
            (None, None) => f.write_str("from anywhere"),
            (Some(address), None) => write!(f, "from {address}"),
            (None, Some(interface)) => write!(f, "through {interface}"),
            (Some(address), Some(interface)) => write!(f, "from {address} through {interface}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn end(address: Option<&str>, interface: Option<&str>) -> LocalEnd {
        LocalEnd {
            address: address.map(|address| address.parse().unwrap()),
            interface: interface.map(str::to_owned),
        }
    }

    /// Where a listener sees the connection come from.
    async fn seen(from: LocalEnd) -> io::Result<IpAddr> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let _stream = from.connect(listener.local_addr()?).await?;
        Ok(listener.accept().await?.1.ip())
    }

    #[tokio::test]
    async fn connections_begin_where_they_are_to() {
        let loopback = |last: u8| IpAddr::from([127, 0, 0, last]);
        assert_eq!(seen(LocalEnd::default()).await.unwrap(), loopback(1));
        assert_eq!(
            seen(end(Some("127.0.0.9"), None)).await.unwrap(),
            loopback(9)
        );
        assert_eq!(
            seen(end(Some("127.0.0.8"), Some("lo"))).await.unwrap(),
            loopback(8)
        );
    }

    #[tokio::test]
    async fn what_this_machine_does_not_have_is_named() {
        for (from, name) in [
            (end(Some("192.0.2.1"), None), "192.0.2.1"),
            (end(None, Some("no-such-if0")), "no-such-if0"),
            (end(Some("::1"), None), "another family"),
        ] {
            let error = seen(from).await.unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn what_is_given_goes_before_what_holds_for_all() {
        let all = end(Some("192.0.2.1"), Some("eth0"));
        assert_eq!(LocalEnd::default().or(&all), all);
        let own = end(None, Some("eth1")).or(&all);
        assert_eq!(own, end(Some("192.0.2.1"), Some("eth1")));
    }
}
