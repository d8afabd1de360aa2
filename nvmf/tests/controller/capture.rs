//! Captures what our host and our controller say to each other, as the wire fixtures of `tests/wire`.
//!
//! Run by hand, when the bytes are to change: see `tests/wire/README.md`.

use std::fmt::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use nvmf::host::{Association, HostOptions, LocalEnd, TargetAddress};
use nvmf::spec::{Nqn, Sqe, Status};
use nvmf::transport::Registry;
use nvmf::transport::drive::Driven;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use uuid::Uuid;

use nvmf::controller::Limits;

use crate::rig::{HOSTNQN, PATIENCE, Queue, Rig, SUBNQN, pattern, ram, subsystem};

/// PDUs of one connection in the order in which they went by, with their direction.
type Trace = Arc<Mutex<Vec<(char, Vec<u8>)>>>;

/// Relays each connection to `to`, one trace for each.
async fn relay(to: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<Trace>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let traces = Arc::new(Mutex::new(Vec::new()));
    let all = Arc::clone(&traces);
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let trace = Trace::default();
            all.lock().unwrap().push(Arc::clone(&trace));
            let far = TcpStream::connect(to).await.unwrap();
            let (from_host, to_host) = near.into_split();
            let (from_controller, to_controller) = far.into_split();
            tokio::spawn(pass('>', from_host, to_controller, Arc::clone(&trace)));
            tokio::spawn(pass('<', from_controller, to_host, trace));
        }
    });
    (at, traces)
}

/// Passes on whole PDUs, each noted before it goes on.
async fn pass(
    direction: char,
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    trace: Trace,
) {
    let mut common = [0; 8];
    while from.read_exact(&mut common).await.is_ok() {
        let plen = u32::from_le_bytes(common[4..].try_into().unwrap()) as usize;
        let mut pdu = common.to_vec();
        pdu.resize(plen, 0);
        from.read_exact(&mut pdu[8..]).await.unwrap();
        trace.lock().unwrap().push((direction, pdu.clone()));
        if to.write_all(&pdu).await.is_err() {
            return;
        }
    }
}

fn text(title: &str, trace: &Trace) -> String {
    let mut text = format!("# {title}\n");
    for (direction, pdu) in &*trace.lock().unwrap() {
        let name = match pdu[0] {
            0x00 => "ICReq",
            0x01 => "ICResp",
            0x04 => "CapsuleCmd",
            0x05 => "CapsuleResp",
            0x06 => "H2CData",
            0x07 => "C2HData",
            0x09 => "R2T",
            other => panic!("PDU type {other}"),
        };
        writeln!(text, "{direction} {name}").unwrap();
        let mut line = String::new();
        for run in pdu.chunk_by(|a, b| a == b) {
            if run.len() >= 32 {
                write!(line, " {:02x}*{} ", run[0], run.len()).unwrap();
            } else {
                for byte in run {
                    write!(line, "{byte:02x}").unwrap();
                }
            }
            if line.len() >= 100 {
                writeln!(text, "{}", line.trim()).unwrap();
                line.clear();
            }
        }
        writeln!(text, "{}", line.trim()).unwrap();
    }
    text
}

/// An association from connecting to shutting down, its data moved in each way that there is.
async fn converse(at: SocketAddr, hdr_digest: bool, data_digest: bool) {
    let registry = Registry::with_defaults();
    let target = TargetAddress {
        host: at.ip().to_string(),
        port: at.port(),
        subnqn: Nqn::new(SUBNQN).unwrap(),
        local: LocalEnd::default(),
    };
    let mut options = HostOptions::new(Nqn::new(HOSTNQN).unwrap(), Uuid::from_u128(5));
    options.keep_alive_tmo = std::time::Duration::ZERO;
    options.queue_size = 16;
    options.hdr_digest = hdr_digest;
    options.data_digest = data_digest;
    let association = Association::connect(&registry, &target, &options)
        .await
        .unwrap();
    association.namespaces().await.unwrap();
    let pair = association
        .open_io_queues(&registry)
        .await
        .unwrap()
        .remove(0);
    let mut queue = Queue(Driven::new(pair).unwrap());
    // In the capsule, then asked for.
    for (lba, blocks) in [(0, 1u16), (1, 5)] {
        let data = pattern(lba, usize::from(blocks) * 512);
        let cqe = queue
            .send(Sqe::write(1, lba, blocks.into(), false), &data)
            .await;
        assert_eq!(cqe.status(), Status::SUCCESS);
    }
    for (lba, blocks) in [(0, 1u16), (1, 5)] {
        let len = usize::from(blocks) * 512;
        let (cqe, data) = queue.receive(Sqe::read(1, lba, blocks.into()), len).await;
        assert_eq!(cqe.status(), Status::SUCCESS);
        assert!(data == pattern(lba, len));
    }
    assert_eq!(queue.command(Sqe::flush(1)).await.status(), Status::SUCCESS);
    association.shutdown(PATIENCE).await;
}

#[tokio::test]
#[ignore = "writes tests/wire; run it when those bytes are to change"]
async fn the_wire_fixtures_are_captured_anew() {
    let into = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/wire");
    for (name, title, header, data) in [
        ("plain", "no digests", false, false),
        ("header", "header digests", true, false),
        ("data", "data digests", false, true),
        ("both", "header and data digests", true, true),
    ] {
        let limits = Limits {
            in_capsule: 1024,
            ..Limits::default()
        };
        let rig = Rig::with(subsystem([ram(1 << 20, 512)]), limits).await;
        let (at, traces) = relay(rig.address).await;
        converse(at, header, data).await;
        let traces = std::mem::take(&mut *traces.lock().unwrap());
        assert_eq!(traces.len(), 2);
        for (queue, trace) in ["admin", "io"].into_iter().zip(&traces) {
            let title = format!("our host and our controller, {queue} queue, {title}");
            let path = into.join(format!("ours-{queue}-{name}.hex"));
            std::fs::write(path, text(&title, trace)).unwrap();
        }
        rig.stop().await;
    }
}
