//! A network of a test's own: addresses and ports that no other program of this machine has, and that a guest can reach.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::daemon::Daemon;

const READY_LIMIT: Duration = Duration::from_secs(10);

/// A network namespace whose loopback device has further addresses. It lasts as long as this value, or what runs in it.
///
/// QEMU's user network connects to any address that the machine has, so a guest whose QEMU runs in the namespace reaches these
/// addresses as they are, unlike 127.0.0.1.
pub struct Network {
    holder: Daemon,
    /// It has a user namespace, too: that is how those without privileges get one.
    of_a_user: bool,
}

impl Network {
    /// Makes a network with these IPv4 addresses. With privileges or without.
    ///
    /// # Errors
    /// When this machine does not let us, with what is missing.
    pub fn start(addresses: &[&str]) -> Result<Self> {
        let mut script = "set -e; PATH=$PATH:/usr/sbin:/sbin; ip link set lo up".to_owned();
        for address in addresses {
            script += &format!("; ip addr add {address}/32 dev lo");
        }
        script += "; echo ready; exec sleep infinity";
        let mut refusals = Vec::new();
        for of_a_user in [false, true] {
            let mut command = Command::new("unshare");
            if of_a_user {
                command.args(["--user", "--map-root-user"]);
            }
            command.args(["--net", "--", "sh", "-c", &script]);
            let mut holder = Daemon::start("the network", &command)?;
            match holder.wait_for_output(1, READY_LIMIT, |line| line == "ready") {
                Ok(_) => return Ok(Self { holder, of_a_user }),
                Err(_) => refusals.push(holder.complaints().join(" ")),
            }
        }
        bail!(
            "no network namespace: as it is: {}; with a user namespace: {}; it takes unshare and ip (packages util-linux and \
             iproute2), and root or a kernel that lets users make namespaces",
            refusals[0],
            refusals[1]
        )
    }

    /// The words to put before a command line, so that it runs in this network.
    pub fn entrance(&self) -> Vec<String> {
        let target = format!("--target={}", self.holder.pid());
        let mut words = vec!["nsenter".to_owned(), target, "--net".to_owned()];
        if self.of_a_user {
            words.extend(["--user", "--preserve-credentials"].map(str::to_owned));
        }
        words.push("--".to_owned());
        words
    }
}

/// A command after the words of [`Network::entrance`], of which there may be none.
pub(crate) fn command(entrance: &[String], program: impl AsRef<std::ffi::OsStr>) -> Command {
    match entrance {
        [] => Command::new(program),
        [enter, rest @ ..] => {
            let mut command = Command::new(enter);
            command.args(rest).arg(program);
            command
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_inside_has_the_addresses_and_what_runs_outside_has_not() {
        let network = match Network::start(&["198.51.100.1", "198.51.100.2"]) {
            Ok(network) => network,
            Err(error) => {
                eprintln!("SKIPPED: {error:#}");
                return;
            }
        };
        let addresses = |entrance: &[String]| {
            let mut command = command(entrance, "ip");
            let output = command.args(["-o", "addr"]).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        let inside = addresses(&network.entrance());
        for address in ["127.0.0.1", "198.51.100.1", "198.51.100.2"] {
            assert!(inside.contains(address), "{inside}");
        }
        assert!(!addresses(&[]).contains("198.51.100.1"));
    }
}
