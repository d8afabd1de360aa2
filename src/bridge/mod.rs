//! Where virtio meets NVMe: a guest's requests become commands, and their results its answers.
//!
//! Nothing here has a descriptor, a thread, a clock or `unsafe`: a lane feeds it requests and
//! completions, and takes commands and answers.
//!
//! - [`geometry`]: what the guest is told about the disk.
//! - [`translate`]: a request → the commands that carry it out, one after the other.
//! - [`transfer`]: the memory of a command, lent by the request and given back.
//! - [`sectors`]: requests that begin or end within a block.
//! - [`inflight`]: requests whose commands are outstanding.
//! - [`fence`]: block ranges that a lost association may still write to.
//! - [`record`]: what the next life of a disk has to know, as bytes.
//! - [`path_choice`]: which path the next command takes.
//! - [`retry`]: whether a command that failed is worth another attempt.
//! - [`status`]: what a command's status means to the guest and to the log.

pub(crate) mod fence;
pub(crate) mod geometry;
pub(crate) mod inflight;
pub(crate) mod path_choice;
pub(crate) mod record;
pub(crate) mod retry;
pub(crate) mod sectors;
pub(crate) mod status;
pub(crate) mod transfer;
pub(crate) mod translate;

#[cfg(test)]
pub(crate) mod samples;
