//! Options of where connections to controllers begin.

use std::net::IpAddr;

use clap::Args;
use nvmf::host::LocalEnd;

use crate::config::uri::parse_interface;

/// Where connections begin; for the system to choose where nothing is said.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct LocalArgs {
    /// Address of this machine to connect from, where a path does not say it itself with ?host-traddr=
    #[arg(long, value_name = "ADDRESS")]
    host_traddr: Option<IpAddr>,
    /// Network interface to connect through, where a path does not say it itself with ?host-iface=
    #[arg(long, value_name = "NAME", value_parser = parse_interface)]
    host_iface: Option<String>,
}

impl LocalArgs {
    /// As the host takes it.
    pub(crate) fn end(&self) -> LocalEnd {
        LocalEnd {
            address: self.host_traddr,
            interface: self.host_iface.clone(),
        }
    }
}
