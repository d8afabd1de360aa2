//! What a host says of peers that are no NVMe/TCP controllers, on real sockets.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nvmf::host::{Association, HostError, HostOptions, LocalEnd, TargetAddress};
use nvmf::spec::Nqn;
use nvmf::transport::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_millis(300);

async fn connect(host: &str, port: u16) -> HostError {
    let target = TargetAddress {
        host: host.to_owned(),
        port,
        subnqn: Nqn::new("nqn.2026-01.org.example:disk1").unwrap(),
        local: LocalEnd::default(),
    };
    let hostnqn = Nqn::new("nqn.2026-01.org.example:host1").unwrap();
    let mut options = HostOptions::new(hostnqn, Uuid::from_u128(1));
    options.connect_timeout = PATIENCE;
    let registry = Registry::with_defaults();
    let started = Instant::now();
    let error = Association::connect(&registry, &target, &options)
        .await
        .unwrap_err();
    assert!(started.elapsed() < PATIENCE * 10, "{error}");
    assert!(!error.to_string().contains('\n'), "{error}");
    assert_eq!(
        registry.queue_pairs("tcp"),
        0,
        "no queue pair is left behind"
    );
    error
}

/// Listens, treats the first peer as told, and returns what the host says of it.
async fn against<F>(peer: impl FnOnce(TcpStream) -> F) -> (SocketAddr, HostError)
where
    F: Future<Output = ()>,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let (error, ()) = tokio::join!(connect("127.0.0.1", at.port()), async {
        peer(listener.accept().await.unwrap().0).await;
    });
    (at, error)
}

#[tokio::test]
async fn a_port_where_nothing_listens_refuses() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    drop(listener);
    let error = connect("127.0.0.1", at.port()).await;
    assert_eq!(error, HostError::Refused { at });
    let text = error.to_string();
    assert!(
        text.contains(&at.to_string()) && text.contains("vhost-nvmf export"),
        "{text}"
    );
    // By name: whatever addresses it has, none answers.
    let error = connect("localhost", at.port()).await;
    assert!(matches!(error, HostError::Refused { .. }), "{error}");
}

#[tokio::test]
async fn a_peer_that_never_answers_is_given_up_in_time() {
    let (at, error) = against(async |stream| {
        tokio::time::sleep(PATIENCE * 2).await;
        drop(stream);
    })
    .await;
    match error {
        HostError::HandshakeTimedOut { at: address, after } => {
            assert_eq!(address, at);
            assert!(after <= PATIENCE, "{after:?}");
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_peer_that_hangs_up_may_demand_tls() {
    let (at, error) = against(async |mut stream| {
        let mut request = [0; 128];
        stream.read_exact(&mut request).await.unwrap();
    })
    .await;
    assert_eq!(error, HostError::HandshakeClosed { at });
    assert!(error.to_string().contains("TLS"), "{error}");
}

#[tokio::test]
async fn a_tls_alert_is_recognised() {
    let (at, error) = against(async |mut stream| {
        // A fatal alert: unexpected message.
        let alert = [0x15, 0x03, 0x03, 0x00, 0x02, 0x02, 0x0a];
        stream.write_all(&alert).await.unwrap();
        tokio::time::sleep(PATIENCE).await;
    })
    .await;
    assert_eq!(error, HostError::TlsDemanded { at });
}

#[tokio::test]
async fn a_peer_of_another_protocol_is_no_controller() {
    let (_, error) = against(async |mut stream| {
        let page = [b"HTTP/1.1 400 Bad Request\r\n".as_slice(), &[b' '; 200]].concat();
        stream.write_all(&page).await.unwrap();
        tokio::time::sleep(PATIENCE).await;
    })
    .await;
    assert!(matches!(error, HostError::Handshake { .. }), "{error}");
}
