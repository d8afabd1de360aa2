//! What `attach` is to do, before it is known which way leads to the namespace.

use std::fmt;
use std::path::Path;

use nvmf::host::{HostOptions, NamespaceSelector, TargetAddress};

use super::fabrics_conf::{Connection, FabricsConf, FileError, Settings};
use super::locator::{Locator, Search};
use super::{AttachConfig, HostIdentity, Machine, Uri, host_options};
use crate::cli::AttachArgs;
use crate::endpoint::Origin;
use crate::worker::pool::Crew;

/// A disk to attach.
#[derive(Debug)]
pub(crate) struct AttachPlan {
    /// The options, completed from a file.
    args: AttachArgs,
    identity: HostIdentity,
    selector: NamespaceSelector,
    /// Where its subsystem is.
    pub(crate) source: Source,
}

/// Where a subsystem is.
#[derive(Debug)]
pub(crate) enum Source {
    /// At these addresses, at least one.
    Paths(Vec<TargetAddress>),
    /// Where discovery tells.
    Search(Search),
}

impl AttachPlan {
    /// Fills in what the command line left open, from a file if it names one.
    ///
    /// # Errors
    /// [`FileError`] names what is wrong with the file.
    pub(crate) fn resolve(mut args: AttachArgs, machine: &Machine) -> Result<Self, FileError> {
        let mut hostnqn = args.hostnqn.clone();
        let mut hostid = args.hostid;
        let (source, selector) = match (args.uri.take(), &args.config_fabrics) {
            (Some(Locator::Namespace(Uri { target, selector })), _) => {
                let mut targets = vec![target];
                for Uri { target, .. } in std::mem::take(&mut args.path) {
                    if !targets.contains(&target) {
                        targets.push(target);
                    }
                }
                (Source::Paths(targets), selector)
            }
            (Some(Locator::Search(search)), _) => {
                let selector = search.selector.clone();
                (Source::Search(search), selector)
            }
            (None, Some(path)) => {
                let connection = FabricsConf::read(path)?.subsystem(args.nqn.as_ref())?;
                let targets = connection.targets();
                let selector = args.namespace.take().unwrap_or(NamespaceSelector::Only);
                // Both names of a host come from one place.
                if hostnqn.is_none() && hostid.is_none() {
                    hostnqn = connection.hostnqn.clone();
                    hostid = connection.hostid;
                }
                complete(&mut args, &connection);
                (Source::Paths(targets), selector)
            }
            // The command line demands one of the two.
            (None, None) => (Source::Paths(Vec::new()), NamespaceSelector::Only),
        };
        Ok(Self {
            identity: HostIdentity::resolve(hostnqn, hostid, machine),
            args,
            selector,
            source,
        })
    }

    /// Where VMMs come from; `None` where the command line says nothing of that, which it does not let pass.
    pub(crate) fn origin(&self) -> Option<Origin> {
        self.args.disk.socket.origin()
    }

    /// The disk is another process's, which gives it away.
    pub(crate) fn takes_over(&self) -> bool {
        self.args.disk.takeover
    }

    /// Who works.
    pub(crate) fn crew(&self) -> Crew {
        self.args.disk.workers.crew()
    }

    /// Where disks are remembered, if the user has decided that.
    pub(crate) fn state_directory(&self) -> Option<&Path> {
        self.args.state_dir.as_deref()
    }

    /// Who connects, and with what queues.
    pub(crate) fn host(&self) -> HostOptions {
        host_options(&self.args, &self.identity)
    }

    /// The disk, by one way to it.
    pub(crate) fn config(&self, target: TargetAddress) -> AttachConfig {
        let selector = self.selector.clone();
        AttachConfig::new(&self.args, &self.identity, Uri { target, selector })
    }
}

impl fmt::Display for AttachPlan {
    /// What is asked for, whatever way leads to it: the subsystem and the namespace, or the search.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::Search(search) => write!(f, "{search}"),
            Source::Paths(paths) => {
                if let Some(path) = paths.first() {
                    write!(f, "{}", path.subnqn)?;
                }
                match &self.selector {
                    NamespaceSelector::Only => Ok(()),
                    selector => write!(f, "?{selector}"),
                }
            }
        }
    }
}

/// Sets what a file decides and the command line does not.
fn complete(args: &mut AttachArgs, connection: &Connection) {
    /// An option that is not given becomes what the file has, if it has something.
    macro_rules! complete {
        ($($option:ident = $value:expr;)*) => {
            $(if let Some(value) = $value && !args.given.contains(stringify!($option)) {
                args.$option = value;
            })*
        };
    }
    let Settings {
        nr_io_queues,
        queue_size,
        keep_alive_tmo,
        reconnect_delay,
        ctrl_loss_tmo,
        fast_io_fail_tmo,
        hdr_digest,
        data_digest,
    } = connection.settings;
    complete! {
        nr_io_queues = nr_io_queues.map(Some);
        queue_size = queue_size;
        keep_alive_tmo = keep_alive_tmo;
        reconnect_delay = reconnect_delay;
        ctrl_loss_tmo = ctrl_loss_tmo;
        fast_io_fail_tmo = fast_io_fail_tmo;
        hdr_digest = hdr_digest;
        data_digest = data_digest;
    }
}
