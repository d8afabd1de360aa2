//! What can go wrong between a host and a controller, each as one line that says what to do.

use std::net::SocketAddr;
use std::time::Duration;

use crate::spec::Status;
use crate::transport::Ending;

/// Why an association did not come up, or a command to its controller failed.
///
/// `at` is the controller's address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// An option has a value that cannot be used.
    #[error("{option} cannot be {value}: {reason}")]
    Option {
        /// The option, as it is spelled on the command line.
        option: &'static str,
        /// Its value.
        value: String,
        /// Why not.
        reason: &'static str,
    },
    /// The host name has no address.
    #[error("cannot resolve host name {host}: {reason}; check the name, or give an IP address")]
    Resolve {
        /// The name.
        host: String,
        /// The resolver's reason.
        reason: String,
    },
    /// Nothing listens at the address.
    #[error(
        "{at} refused the connection; is `vhost-nvmf export` or another NVMe/TCP target listening there?"
    )]
    Refused {
        /// The address.
        at: SocketAddr,
    },
    /// No connection to the address can be made.
    #[error("cannot reach {at}: {reason}; check the address, the route and firewalls")]
    Unreachable {
        /// The address.
        at: SocketAddr,
        /// The system's reason.
        reason: String,
    },
    /// Connecting and the handshake took too long.
    #[error(
        "no NVMe/TCP handshake with {at} within {after:?}; check the address, firewalls, and that an NVMe/TCP target listens there"
    )]
    HandshakeTimedOut {
        /// The address.
        at: SocketAddr,
        /// How long it was waited for.
        after: Duration,
    },
    /// The peer hung up before the handshake was over.
    #[error(
        "{at} closed the connection during the NVMe/TCP handshake; it may demand TLS, which is not supported, or not be an NVMe/TCP target"
    )]
    HandshakeClosed {
        /// The address.
        at: SocketAddr,
    },
    /// The peer's answer to the handshake is wrong.
    #[error(
        "NVMe/TCP handshake with {at} failed: {reason}; it may demand TLS, which is not supported, or not be an NVMe/TCP target"
    )]
    Handshake {
        /// The address.
        at: SocketAddr,
        /// What was wrong.
        reason: String,
    },
    /// The peer answered as TLS does.
    #[error(
        "{at} demands TLS, which is not supported; connect to a port of the target that does without"
    )]
    TlsDemanded {
        /// The address.
        at: SocketAddr,
    },
    /// No transport of ours takes the connection, or the system has no resources for it.
    #[error("cannot use the connection to {at}: {reason}")]
    Transport {
        /// The address.
        at: SocketAddr,
        /// Why.
        reason: String,
    },
    /// Connect: the subsystem is not known there.
    #[error(
        "the controller at {at} has no subsystem {subnqn}; check the NQN against what the target exports"
    )]
    UnknownSubsystem {
        /// The address.
        at: SocketAddr,
        /// The subsystem that was asked for.
        subnqn: String,
    },
    /// Connect: the subsystem does not admit us.
    #[error(
        "subsystem {subnqn} at {at} does not allow host {hostnqn}; allow that host NQN on the target, or give an allowed one with --hostnqn"
    )]
    HostNotAllowed {
        /// The address.
        at: SocketAddr,
        /// The subsystem.
        subnqn: String,
        /// Our NQN.
        hostnqn: String,
    },
    /// Connect: a parameter of ours was refused.
    #[error("the controller at {at} refused {parameter} of the {queue} queue: {advice}")]
    ParameterRefused {
        /// The address.
        at: SocketAddr,
        /// Which queue was to be connected.
        queue: Queue,
        /// The parameter and its value.
        parameter: String,
        /// What to do about it.
        advice: &'static str,
    },
    /// Connect: no room for another association.
    #[error(
        "subsystem {subnqn} at {at} is busy: it takes no further association now; disconnect another host or retry later"
    )]
    Busy {
        /// The address.
        at: SocketAddr,
        /// The subsystem.
        subnqn: String,
    },
    /// The controller wants in-band authentication.
    #[error(
        "subsystem {subnqn} at {at} demands in-band authentication of host {hostnqn}, which is not supported; turn DH-HMAC-CHAP off for this host on the target"
    )]
    AuthenticationDemanded {
        /// The address.
        at: SocketAddr,
        /// The subsystem.
        subnqn: String,
        /// Our NQN.
        hostnqn: String,
    },
    /// The peer hung up instead of answering Connect.
    #[error(
        "{at} ended the connection instead of answering Connect ({reason}); some targets do so when they do not know the subsystem or the host: check {subnqn} and {hostnqn}"
    )]
    ConnectDropped {
        /// The address.
        at: SocketAddr,
        /// How the connection ended.
        reason: Ending,
        /// The subsystem.
        subnqn: String,
        /// Our NQN.
        hostnqn: String,
    },
    /// A command came back with an error status.
    #[error("{command} failed at the controller at {at}: {status}")]
    Command {
        /// The address.
        at: SocketAddr,
        /// The command.
        command: &'static str,
        /// Its status.
        status: Status,
    },
    /// A command was not answered in time.
    #[error("the controller at {at} did not answer {command} within {after:?}")]
    TimedOut {
        /// The address.
        at: SocketAddr,
        /// The command.
        command: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// Everything together took too long.
    #[error("the controller at {at} was not ready within {after:?}: {command} had no answer yet")]
    TooSlow {
        /// The address.
        at: SocketAddr,
        /// The command whose answer was awaited in the end.
        command: &'static str,
        /// How long all of it was waited for.
        after: Duration,
    },
    /// The association was lost under the command.
    #[error("{command} was not answered: the controller at {at} was lost: {loss}")]
    Lost {
        /// The address.
        at: SocketAddr,
        /// The command.
        command: &'static str,
        /// How.
        loss: Loss,
    },
    /// The controller says something that cannot be true, or that we cannot work with.
    #[error("the controller at {at} cannot be used: {reason}")]
    Unusable {
        /// The address.
        at: SocketAddr,
        /// What it says.
        reason: String,
    },
    /// The controller did not become ready in the time that it claims to need.
    #[error(
        "the controller at {at} was enabled and did not become ready within {after:?}, the time that it states; look at the target's log"
    )]
    NeverReady {
        /// The address.
        at: SocketAddr,
        /// CAP.TO.
        after: Duration,
    },
    /// The controller reports a fatal status.
    #[error(
        "the controller at {at} reports a fatal status (CSTS {csts:#x}); look at the target's log"
    )]
    Fatal {
        /// The address.
        at: SocketAddr,
        /// The status register.
        csts: u32,
    },
    /// The namespace that was asked for is not there.
    #[error("subsystem {subnqn} at {at} has no namespace {selector}; it has {existing}")]
    NoSuchNamespace {
        /// The address.
        at: SocketAddr,
        /// The subsystem.
        subnqn: String,
        /// What was asked for.
        selector: String,
        /// What there is.
        existing: String,
    },
    /// The subsystem has no namespace at all for us.
    #[error(
        "subsystem {subnqn} at {at} has no namespace for host {hostnqn}; export one, or allow this host to see one"
    )]
    NoNamespaces {
        /// The address.
        at: SocketAddr,
        /// The subsystem.
        subnqn: String,
        /// Our NQN.
        hostnqn: String,
    },
    /// There are several namespaces and none was chosen.
    #[error(
        "subsystem {subnqn} at {at} has several namespaces; choose one by adding its selector to the URI: {existing}"
    )]
    SeveralNamespaces {
        /// The address.
        at: SocketAddr,
        /// The subsystem.
        subnqn: String,
        /// What there is.
        existing: String,
    },
    /// The namespace has a format or a size that we cannot serve.
    #[error("namespace {nsid} of subsystem {subnqn} at {at} cannot be used: {reason}")]
    UnusableNamespace {
        /// The address.
        at: SocketAddr,
        /// The subsystem.
        subnqn: String,
        /// The namespace.
        nsid: u32,
        /// Which property is in the way.
        reason: String,
    },
}

impl HostError {
    /// How far the attempt got, to choose which of several addresses' errors says most.
    /// Whether it may pass by itself: what is asked for may just not be there now. False where the two sides do not
    /// agree, and somebody has to change something.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Resolve { .. }
            | Self::Refused { .. }
            | Self::Unreachable { .. }
            | Self::HandshakeTimedOut { .. }
            | Self::HandshakeClosed { .. }
            | Self::Transport { .. }
            | Self::UnknownSubsystem { .. }
            | Self::Busy { .. }
            | Self::ConnectDropped { .. }
            | Self::Command { .. }
            | Self::TimedOut { .. }
            | Self::TooSlow { .. }
            | Self::Lost { .. }
            | Self::NeverReady { .. }
            | Self::Fatal { .. }
            | Self::NoSuchNamespace { .. }
            | Self::NoNamespaces { .. } => true,
            Self::Option { .. }
            | Self::Handshake { .. }
            | Self::TlsDemanded { .. }
            | Self::HostNotAllowed { .. }
            | Self::ParameterRefused { .. }
            | Self::AuthenticationDemanded { .. }
            | Self::Unusable { .. }
            | Self::SeveralNamespaces { .. }
            | Self::UnusableNamespace { .. } => false,
        }
    }

    pub(super) fn depth(&self) -> u8 {
        match self {
            Self::Option { .. } | Self::Resolve { .. } | Self::Unreachable { .. } => 0,
            Self::HandshakeTimedOut { .. } => 1,
            Self::Refused { .. } => 2,
            Self::HandshakeClosed { .. }
            | Self::Handshake { .. }
            | Self::TlsDemanded { .. }
            | Self::Transport { .. } => 3,
            _ => 4,
        }
    }
}

/// A queue, for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue(pub u16);

impl std::fmt::Display for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => f.write_str("admin"),
            qid => write!(f, "I/O ({qid})"),
        }
    }
}

/// How an association was lost.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Loss {
    /// The admin queue's connection ended.
    #[error("{0}")]
    Ended(Ending),
    /// A Keep Alive had no answer within this time.
    #[error("no answer to Keep Alive within {0:?}")]
    KeepAlive(Duration),
    /// CSTS.CFS is set: this is CSTS.
    #[error("it reports a fatal status (CSTS {0:#x})")]
    Fatal(u32),
    /// CSTS.RDY went away without our doing: this is CSTS.
    #[error("it is no longer ready (CSTS {0:#x})")]
    NotReady(u32),
}
