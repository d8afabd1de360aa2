//! A TCP relay between host and target that a test can interrupt in several ways.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// A relay on a port of its own until the process ends.
pub(crate) struct Proxy {
    address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    target: String,
    /// Nothing is passed on, and nobody is told.
    silent: bool,
    /// The hosts' ends of connections.
    hosts: Vec<TcpStream>,
    /// Bytes that came from hosts.
    sent: u64,
}

impl Proxy {
    /// To the target at this address.
    pub(crate) fn start(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Mutex::new(Shared {
            target: target.to_owned(),
            silent: false,
            hosts: Vec::new(),
            sent: 0,
        }));
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            for host in listener.incoming().map_while(Result::ok) {
                relay(&host, &accepting);
            }
        });
        Self { address, shared }
    }

    /// A target's URI with the proxy in the target's place.
    pub(crate) fn uri(&self, uri: &str) -> String {
        let target = lock(&self.shared).target.clone();
        uri.replace(&target, &self.address.to_string())
    }

    /// From now on everything is swallowed, or passed on again. What was swallowed is gone.
    pub(crate) fn silence(&self, silent: bool) {
        lock(&self.shared).silent = silent;
    }

    /// Bytes that came from hosts up to now.
    pub(crate) fn sent(&self) -> u64 {
        lock(&self.shared).sent
    }

    /// Ends all connections with hosts. The target is told nothing, and goes on.
    pub(crate) fn cut_hosts_off(&self) {
        for host in lock(&self.shared).hosts.drain(..) {
            let _ = host.shutdown(Shutdown::Both);
        }
    }
}

/// Passes bytes on in both directions. The target's end stays open as long as the target wants it.
fn relay(host: &TcpStream, shared: &Arc<Mutex<Shared>>) {
    let clone = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
    let target = lock(shared).target.clone();
    let Ok(target) = TcpStream::connect(target) else {
        let _ = host.shutdown(Shutdown::Both);
        return;
    };
    let _ = host.set_nodelay(true);
    let _ = target.set_nodelay(true);
    lock(shared).hosts.push(clone(host));
    let (from_host, to_target) = (clone(host), clone(&target));
    let kept = Arc::clone(shared);
    thread::spawn(move || pass_on(from_host, to_target, &kept, true));
    let (to_host, kept) = (clone(host), Arc::clone(shared));
    thread::spawn(move || {
        let end = clone(&to_host);
        pass_on(target, to_host, &kept, false);
        let _ = end.shutdown(Shutdown::Both);
    });
}

/// Until `from` has no more. What `to` does not take is lost.
fn pass_on(mut from: TcpStream, mut to: TcpStream, shared: &Mutex<Shared>, counted: bool) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(len) => {
                let silent = {
                    let mut shared = lock(shared);
                    shared.sent += if counted { len as u64 } else { 0 };
                    shared.silent
                };
                if !silent {
                    let _ = to.write_all(&buffer[..len]);
                }
            }
        }
    }
    // A thread that ends here would close the target's end at once.
    thread::sleep(Duration::from_secs(60));
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
