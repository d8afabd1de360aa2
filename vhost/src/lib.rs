//! A vhost-user-blk device, with no knowledge of what stores its blocks.
//!
//! [`serve`] speaks vhost-user with one front-end: it maps the guest's memory, collects the state
//! of each ring, and hands a ring that may run, as a [`Queue`], to whoever implements [`Rings`].
//! From then on the queue belongs to one worker, which takes [`Request`]s from it, finishes them
//! and flushes the answers; the session reaches it only through [`Rings`] (see
//! `docs/adr/0002-own-session-and-queues.md`).
//!
//! What is in flight is kept in memory that outlives the process where the front-end keeps that, and
//! the next one goes on from there (see `docs/adr/0011-in-flight-region.md`).
//!
//! The guest and the front-end are not trusted. What a guest breaks is its own ring
//! ([`BrokenRing`]); what a front-end asks wrongly is refused, and the session goes on. Two things
//! are taken on trust, because no back-end that maps a guest's memory can do without: that the
//! front-end does not truncate the files that it shares, and that it does not remove a region that
//! the guest still has requests in.

mod access;
mod backend_channel;
mod blk;
mod chain;
mod channel;
mod complaints;
mod descriptors;
mod device;
mod device_state;
mod dirty;
mod front_end;
mod generation;
mod handover;
mod inflight;
mod interrupt;
mod memory;
mod queue;
mod session;
mod token;
mod unmap;
mod used_ring;
mod vring;

pub use blk::request::{BlkStatus, Operation, SectorRange, SectorRanges};
pub use chain::BrokenRing;
pub use device::{Device, DeviceOptions, MAX_QUEUES};
pub use dirty::RingLog;
pub use handover::{MAX_RECORDED, NotHandedOver, Record, Recorded, RestoreError, Restored};
pub use inflight::{BadInflight, Tail};
pub use interrupt::Interrupt;
pub use memory::GuestMap;
pub use queue::{Queue, QueueUpdate, Request};
pub use session::{Rings, Served, Session, SessionError, serve};
pub use token::Token;
pub use vring::Signal;

#[cfg(test)]
mod fuse;
#[cfg(test)]
mod guest;
