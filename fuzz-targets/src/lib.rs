//! Bodies of the fuzz targets, as ordinary functions: any bytes go in, and none of them may panic.
//!
//! Each drives the code under test with what the bytes say, keeps a model of what must be true beside
//! it, and compares the two after every step. Bytes that run out read as zero, so every input is a
//! program, and every prefix of one is too. `fuzz/` feeds them with libFuzzer; `tests/` feeds
//! them with the corpora and with random bytes, on any toolchain.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a broken promise is to end the run"
)]

pub mod chain;
pub mod connect;
pub mod controller;
pub mod framer;
mod guest;
pub mod handshake;
pub mod host;
mod input;
mod parcel;
mod reference;
pub mod session;
mod wire;

/// A target: takes any bytes.
pub type Target = fn(&[u8]);

/// Every target, with the name of its corpus and of its binary.
pub const TARGETS: [(&str, Target); 7] = [
    ("framer", framer::run),
    ("host", host::run),
    ("controller", controller::run),
    ("handshake", handshake::run),
    ("connect", connect::run),
    ("chain", chain::run),
    ("session", session::run),
];
