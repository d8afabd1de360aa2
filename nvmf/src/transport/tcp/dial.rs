//! Connecting and accepting: TCP, then ICReq and ICResp, each within a deadline.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::parting::part;
use super::{Connection, Digests, LocalEnd};
use crate::tcp::FatalError;
use crate::tcp::negotiate::{self, IC_LEN};

/// How long a peer may acknowledge nothing before it is taken for dead, where nothing else is said: a
/// host's keep-alive time-out says it for both ends when it is shorter, and this when there is none.
const PATIENCE: Duration = Duration::from_secs(30);

/// First byte of a TLS alert record: what a peer that insists on TLS answers with.
const TLS_ALERT: u8 = 0x15;

/// Why no connection came about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The operating system's answer.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// No answer in time.
    #[error("no answer in time")]
    TimedOut,
    /// The peer does not speak NVMe/TCP, or not as it should.
    #[error("the peer broke the NVMe/TCP protocol: {0}")]
    Protocol(String),
    /// The peer answered with a termination request.
    #[error("the peer ended the connection: {0}")]
    Terminated(String),
    /// The peer closed the connection before the handshake was complete.
    #[error("the peer closed the connection during the NVMe/TCP handshake")]
    Closed,
    /// The peer answered as TLS does.
    #[error("the peer demands TLS, which is not supported")]
    TlsDemanded,
}

/// Connects to a controller, from `local`, and exchanges ICReq and ICResp, asking for `digests`. The controller may
/// grant fewer; [`Connection::negotiated`] says which.
///
/// # Errors
/// [`ConnectError`]; nothing stays open then.
pub async fn connect(
    local: &LocalEnd,
    address: SocketAddr,
    digests: Digests,
    deadline: Instant,
) -> Result<Connection, ConnectError> {
    within(deadline, async {
        let mut stream = local.connect(address).await?;
        prepare(&stream)?;
        stream.write_all(&negotiate::ic_req(digests)).await?;
        let resp = read_ic(&mut stream).await?;
        match negotiate::agree(&resp, digests) {
            Ok(negotiated) => Ok(Connection {
                stream: stream.into_std()?,
                negotiated,
            }),
            Err(error) => Err(refuse(stream, error, &resp, true)),
        }
    })
    .await
}

/// Answers a host that has connected: ICReq and ICResp. It is granted the digests that it asks for.
///
/// # Errors
/// [`ConnectError`]; the connection is closed then.
pub async fn accept(mut stream: TcpStream, deadline: Instant) -> Result<Connection, ConnectError> {
    within(deadline, async {
        prepare(&stream)?;
        let req = read_ic(&mut stream).await?;
        match negotiate::answer(&req) {
            Ok((negotiated, resp)) => {
                stream.write_all(&resp).await?;
                Ok(Connection {
                    stream: stream.into_std()?,
                    negotiated,
                })
            }
            Err(error) => Err(refuse(stream, error, &req, false)),
        }
    })
    .await
}

/// Sets the options that each connection has, of either role: no delay, and an end to a peer that is
/// not there any more.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    set_patience(stream, PATIENCE)
}

/// See [`Connection::set_patience`].
pub(super) fn set_patience(stream: &impl AsFd, patience: Duration) -> io::Result<()> {
    let socket = SockRef::from(stream);
    // The system counts in seconds. Probes begin when the patience is over, so that NVMe's own
    // keep-alive finds out first; where there is none, the peer is given up with the second.
    let second = Duration::from_secs(1);
    let keepalive = TcpKeepalive::new()
        .with_time(patience.max(second))
        .with_interval((patience / 4).max(second));
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(patience.max(second)))
}

async fn within<T>(
    deadline: Instant,
    attempt: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    timeout_at(deadline, attempt)
        .await
        .unwrap_or(Err(ConnectError::TimedOut))
}

async fn read_ic(stream: &mut TcpStream) -> Result<[u8; IC_LEN], ConnectError> {
    let mut bytes = [0; IC_LEN];
    let mut have = 0;
    while have < IC_LEN {
        match stream.read(&mut bytes[have..]).await? {
            0 => return Err(cut_short(&bytes[..have])),
            n => have += n,
        }
        // Not an IC PDU: it may be shorter, and waiting for the rest would be in vain.
        if have >= 24 && negotiate::termination(&bytes[..have]).is_some() {
            return Err(cut_short(&bytes[..have]));
        }
        if bytes[0] == TLS_ALERT {
            return Err(ConnectError::TlsDemanded);
        }
        // Another protocol, whose peer may wait for us: the type alone is enough to refuse it.
        if !negotiate::may_begin(bytes[0]) {
            break;
        }
    }
    Ok(bytes)
}

fn cut_short(bytes: &[u8]) -> ConnectError {
    match negotiate::termination(bytes) {
        Some(term) => ConnectError::Terminated(term.to_string()),
        None => ConnectError::Closed,
    }
}

fn refuse(
    stream: TcpStream,
    error: FatalError,
    offending: &[u8; IC_LEN],
    host: bool,
) -> ConnectError {
    // The peer may be gone already, and the error is the same either way.
    if let Ok(stream) = stream.into_std() {
        part(&stream, negotiate::refuse(error, offending, host));
    }
    ConnectError::Protocol(error.to_string())
}
