//! The end of a connection whose peer broke the protocol: the termination request leaves, and the peer
//! gets a while to read it and to close.
//!
//! Closing at once would lose it: a socket that is closed with data unread resets its connection, and
//! some peers then throw away what they did not read. The wait is that of a thread of its own, since
//! whoever drives the queue pair has others to drive; there are only a few such threads at a time.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long the peer has to close. The specification allows 30 s.
const GRACE: Duration = Duration::from_secs(5);
/// Connections that part at a time; more are closed at once.
const MAX_PARTING: usize = 16;
/// Bytes that are read and thrown away at most.
const MAX_DISCARDED: u64 = 64 * 1024 * 1024;

static PARTING: AtomicUsize = AtomicUsize::new(0);

/// Counts one connection that parts.
struct Counted;

impl Counted {
    fn new() -> Option<Self> {
        let below = |count| (count < MAX_PARTING).then_some(count + 1);
        let counted = PARTING.fetch_update(Ordering::Relaxed, Ordering::Relaxed, below);
        counted.is_ok().then_some(Self)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        PARTING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Sends `last_words`, and closes when the peer has closed or after a while. The caller neither reads
/// nor writes the socket any more.
pub(super) fn part(socket: &TcpStream, last_words: Vec<u8>) {
    part_within(socket, last_words, GRACE);
}

fn part_within(socket: &TcpStream, mut last_words: Vec<u8>, grace: Duration) {
    // Most often all of it leaves at once.
    match (&mut &*socket).write(&last_words) {
        Ok(sent) => drop(last_words.drain(..sent)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
        Err(_) => last_words.clear(),
    }
    let parting = Counted::new().zip(socket.try_clone().ok());
    let spawned = parting.map(|(counted, socket)| {
        let thread = std::thread::Builder::new().name("parting".to_owned());
        thread.spawn(move || {
            wait(&socket, &last_words, grace);
            // Whoever else holds the socket must not keep the connection.
            let _ = socket.shutdown(Shutdown::Both);
            drop(counted);
        })
    });
    if !matches!(spawned, Some(Ok(_))) {
        // The peer may know already.
        let _ = socket.shutdown(Shutdown::Both);
    }
}

/// Whatever fails here, the connection is closed afterwards, and nothing else can be done.
fn wait(mut socket: &TcpStream, mut last_words: &[u8], grace: Duration) {
    let until = Instant::now() + grace;
    let left = || {
        let left = until.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    };
    if socket.set_nonblocking(false).is_err() {
        return;
    }
    while !last_words.is_empty()
        && let Some(left) = left()
        && socket.set_write_timeout(Some(left)).is_ok()
    {
        match socket.write(last_words) {
            Ok(sent) => last_words = &last_words[sent..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
    if !last_words.is_empty() || socket.shutdown(Shutdown::Write).is_err() {
        return;
    }
    let mut discarded = 0;
    let mut bytes = [0; 8192];
    while discarded < MAX_DISCARDED
        && let Some(left) = left()
        && socket.set_read_timeout(Some(left)).is_ok()
    {
        match socket.read(&mut bytes) {
            Ok(0) => return,
            Ok(n) => discarded += n as u64,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        let socket = listener.accept().unwrap().0;
        socket.set_nonblocking(true).unwrap();
        (socket, peer)
    }

    /// Reads to the end; panics if the connection was reset before.
    fn rest(peer: &mut TcpStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        peer.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_peer_that_has_sent_more_than_was_read_still_gets_to_know_why() {
        let (socket, mut peer) = connected();
        peer.write_all(&[1; 300_000]).unwrap();
        part(&socket, vec![7; 24]);
        drop(socket);
        // More that nobody asked for.
        peer.write_all(&[1; 300_000]).unwrap();
        assert_eq!(rest(&mut peer), [7; 24]);
    }

    #[test]
    fn what_does_not_fit_the_socket_is_sent_when_there_is_room() {
        let (socket, mut peer) = connected();
        let mut filled = 0;
        while let Ok(n) = (&mut &socket).write(&[3; 65536]) {
            filled += n;
        }
        part(&socket, vec![7; 100_000]);
        let bytes = rest(&mut peer);
        assert_eq!(bytes.len(), filled + 100_000);
        assert!(bytes[filled..].iter().all(|&byte| byte == 7));
    }

    #[test]
    fn a_peer_that_does_not_close_is_left_in_time() {
        let (socket, mut peer) = connected();
        let began = Instant::now();
        part_within(&socket, vec![7; 24], Duration::from_millis(200));
        assert_eq!(rest(&mut peer), [7; 24]);
        // It is refused once the connection is gone.
        while peer.write_all(&[1]).is_ok() {
            assert!(began.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(began.elapsed() >= Duration::from_millis(200));
    }
}
