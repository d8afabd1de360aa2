//! The `vhost-nvmf` daemon.
fn main() {}
