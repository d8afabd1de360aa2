//! Two networks of a test's own, a host's and a target's, and links between them that can be cut.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// Two network namespaces. They end with this value, and the links with them.
pub(crate) struct Networks {
    host: Holder,
    target: Holder,
    /// Links between them, numbered from 1.
    links: u8,
}

/// How a link can be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Frames get lost, and nobody is told: they go to an address that nobody has.
    Swallowed,
    /// The far end is down: the host's interface has no carrier.
    Unplugged,
    /// The host's own interface is down: the host has no route.
    Down,
}

/// A process that does nothing, in a network of its own.
struct Holder(Child);

impl Networks {
    /// Makes so many links, link `n` between 198.18.`n`.1, the host's, and 198.18.`n`.2, the target's. Says so where this machine
    /// does not let us, and gives nothing.
    pub(crate) fn start(links: u8) -> Option<Self> {
        match Self::try_start(links) {
            Ok(networks) => Some(networks),
            Err(missing) => {
                eprintln!(
                    "SKIPPED: no network namespaces with links: {missing}; it takes root, unshare, nsenter and ip (packages \
                     util-linux and iproute2)"
                );
                None
            }
        }
    }

    fn try_start(links: u8) -> Result<Self, String> {
        let networks = Self {
            host: Holder::start()?,
            target: Holder::start()?,
            links,
        };
        let target = networks.target.0.id();
        for link in 1..=links {
            networks.host.ip(&format!(
                "link add host{link} type veth peer name target{link} netns {target}"
            ))?;
            for (network, name, last) in
                [(&networks.host, "host", 1), (&networks.target, "target", 2)]
            {
                network.ip(&format!(
                    "addr add 198.18.{link}.{last}/24 dev {name}{link}"
                ))?;
                network.ip(&format!("link set {name}{link} up"))?;
            }
        }
        Ok(networks)
    }

    /// The words that run a command in the host's network.
    pub(crate) fn host(&self) -> Vec<String> {
        self.host.entrance()
    }

    /// The words that run a command in the target's network.
    pub(crate) fn target(&self) -> Vec<String> {
        self.target.entrance()
    }

    /// The target's address at a link.
    pub(crate) fn address(&self, link: u8) -> String {
        assert!((1..=self.links).contains(&link), "there is no link {link}");
        format!("198.18.{link}.2")
    }

    /// From now on nothing goes over a link, in either direction.
    #[track_caller]
    pub(crate) fn cut(&self, link: u8, how: Cut) {
        match how {
            Cut::Swallowed => {
                let nobody = "lladdr 02:00:00:00:00:99 nud permanent";
                self.on_host(&format!(
                    "neigh replace 198.18.{link}.2 {nobody} dev host{link}"
                ));
                self.on_target(&format!(
                    "neigh replace 198.18.{link}.1 {nobody} dev target{link}"
                ));
            }
            Cut::Unplugged => self.on_target(&format!("link set target{link} down")),
            Cut::Down => self.on_host(&format!("link set host{link} down")),
        }
    }

    /// The link is as it was.
    #[track_caller]
    pub(crate) fn mend(&self, link: u8, how: Cut) {
        match how {
            Cut::Swallowed => {
                self.on_host(&format!("neigh del 198.18.{link}.2 dev host{link}"));
                self.on_target(&format!("neigh del 198.18.{link}.1 dev target{link}"));
            }
            Cut::Unplugged => self.on_target(&format!("link set target{link} up")),
            Cut::Down => self.on_host(&format!("link set host{link} up")),
        }
    }

    #[track_caller]
    fn on_host(&self, command: &str) {
        self.host.ip(command).expect("the host's network");
    }

    #[track_caller]
    fn on_target(&self, command: &str) {
        self.target.ip(command).expect("the target's network");
    }
}

impl Holder {
    fn start() -> Result<Self, String> {
        let script = "PATH=$PATH:/usr/sbin:/sbin ip link set lo up && echo ready && exec sleep 300";
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "unshare", "--net", "--"])
            .args(["sh", "-c", script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("setpriv: {error}"))?;
        let stdout = child.stdout.take().expect("a pipe");
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line);
        if read.is_ok() && line == "ready\n" {
            return Ok(Self(child));
        }
        let output = child.wait_with_output();
        let said = output.map_or_else(|error| error.to_string(), |output| said(&output.stderr));
        Err(said)
    }

    fn entrance(&self) -> Vec<String> {
        let target = format!("--target={}", self.0.id());
        ["nsenter", &target, "--net", "--"]
            .map(str::to_owned)
            .to_vec()
    }

    /// Runs `ip` in it.
    fn ip(&self, command: &str) -> Result<(), String> {
        let entrance = self.entrance();
        let path = std::env::var("PATH").unwrap_or_default();
        let output = Command::new(&entrance[0])
            .args(&entrance[1..])
            .arg("ip")
            .args(command.split(' '))
            .env("PATH", format!("{path}:/usr/sbin:/sbin"))
            .output()
            .map_err(|error| format!("nsenter: {error}"))?;
        if !output.status.success() {
            return Err(format!("ip {command}: {}", said(&output.stderr)));
        }
        Ok(())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn said(stderr: &[u8]) -> String {
    String::from_utf8_lossy(stderr).trim().replace('\n', "; ")
}
