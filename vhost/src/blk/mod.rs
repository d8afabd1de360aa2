//! The block device's own part of virtio: its configuration space and its requests.

pub(crate) mod config;
pub(crate) mod parse;
pub(crate) mod request;
