//! A relay between a host and a controller that keeps what went by, PDU by PDU: for the wire fixtures.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::Result;

/// No PDU of a recorded connection is longer.
const PDU_MAX: usize = 4 << 20;
/// Runs of a byte from this length on are written short.
const RUN_MIN: usize = 32;
/// About so many characters of a line.
const LINE: usize = 100;

/// A PDU, and whether the host sent it.
type Pdu = (bool, Vec<u8>);

/// PDUs of one connection, in the order in which they went by.
type Trace = Arc<Mutex<Vec<Pdu>>>;

/// Relays every connection until the test ends, and keeps its PDUs.
pub struct Recorder {
    /// Where it listens.
    pub address: SocketAddr,
    traces: Arc<Mutex<Vec<Trace>>>,
}

impl Recorder {
    /// Starts a relay to `to`, on a free port of the loopback.
    ///
    /// # Errors
    /// When there is none.
    pub fn start(to: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let traces = Arc::<Mutex<Vec<Trace>>>::default();
        let all = Arc::clone(&traces);
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let trace = Trace::default();
                locked(&all).push(Arc::clone(&trace));
                if let Err(error) = relay(near, to, &trace) {
                    eprintln!("recorder: {error:#}");
                }
            }
        });
        Ok(Self { address, traces })
    }

    /// The connections up to now, in the order in which they began, each as the text of a fixture.
    pub fn connections(&self, title: &str) -> Vec<String> {
        let traces = locked(&self.traces);
        traces
            .iter()
            .map(|trace| text(title, &locked(trace)))
            .collect()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the two directions of a connection.
fn relay(near: TcpStream, to: SocketAddr, trace: &Trace) -> Result<()> {
    let far = TcpStream::connect(to)?;
    for stream in [&near, &far] {
        stream.set_nodelay(true)?;
    }
    let (near_too, far_too) = (near.try_clone()?, far.try_clone()?);
    let (there, back) = (Arc::clone(trace), Arc::clone(trace));
    thread::spawn(move || pass(true, near, far, &there));
    thread::spawn(move || pass(false, far_too, near_too, &back));
    Ok(())
}

/// Passes on whole PDUs, each kept before it goes on, so that an answer never stands before what it answers.
fn pass(from_host: bool, mut from: TcpStream, mut to: TcpStream, trace: &Trace) {
    let mut common = [0; 8];
    while from.read_exact(&mut common).is_ok() {
        let [_, _, _, _, length @ ..] = common;
        let length = u32::from_le_bytes(length) as usize;
        if !(common.len()..=PDU_MAX).contains(&length) {
            eprintln!("recorder: a PDU of {length} bytes");
            break;
        }
        let mut pdu = common.to_vec();
        pdu.resize(length, 0);
        if from.read_exact(&mut pdu[common.len()..]).is_err() {
            break;
        }
        locked(trace).push((from_host, pdu.clone()));
        if to.write_all(&pdu).is_err() {
            break;
        }
    }
    // The other end learns that this one is gone; the other direction ends by itself.
    drop(to.shutdown(Shutdown::Write));
}

fn name(pdu: &[u8]) -> &'static str {
    match pdu.first() {
        Some(0x00) => "ICReq",
        Some(0x01) => "ICResp",
        Some(0x02) => "H2CTermReq",
        Some(0x03) => "C2HTermReq",
        Some(0x04) => "CapsuleCmd",
        Some(0x05) => "CapsuleResp",
        Some(0x06) => "H2CData",
        Some(0x07) => "C2HData",
        Some(0x09) => "R2T",
        _ => "unknown",
    }
}

/// A fixture: `> NAME` or `< NAME` for each PDU, its bytes in hex after it, `00*64` for 64 zeroes.
fn text(title: &str, pdus: &[Pdu]) -> String {
    let mut text = format!("# {title}\n");
    for (from_host, pdu) in pdus {
        let direction = if *from_host { '>' } else { '<' };
        text += &format!("{direction} {}\n", name(pdu));
        let mut line = String::new();
        for run in pdu.chunk_by(|a, b| a == b) {
            if run.len() >= RUN_MIN {
                let _ = write!(line, " {:02x}*{} ", run[0], run.len());
            } else {
                run.iter().for_each(|byte| {
                    let _ = write!(line, "{byte:02x}");
                });
            }
            if line.len() >= LINE {
                text += line.trim();
                text.push('\n');
                line.clear();
            }
        }
        if !line.is_empty() {
            text += line.trim();
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_by_is_passed_on_and_kept_in_order() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let recorder = Recorder::start(listener.local_addr().unwrap()).unwrap();
        let mut host = TcpStream::connect(recorder.address).unwrap();
        let (mut controller, _) = listener.accept().unwrap();
        let mut request = vec![4, 0, 72, 0, 72, 0, 0, 0];
        request.resize(72, 0xab);
        let answer = [5, 0, 24, 0, 8, 0, 0, 0];
        let mut buffer = [0; 72];
        // In two pieces.
        host.write_all(&request[..5]).unwrap();
        host.write_all(&request[5..]).unwrap();
        controller.read_exact(&mut buffer).unwrap();
        assert_eq!(buffer[..], request);
        controller.write_all(&answer).unwrap();
        host.read_exact(&mut buffer[..8]).unwrap();
        let expected =
            "# title\n> CapsuleCmd\n0400480048000000 ab*64\n< CapsuleResp\n0500180008000000\n";
        assert_eq!(recorder.connections("title"), [expected]);
    }
}
