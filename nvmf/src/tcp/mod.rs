//! NVMe/TCP as a pure machine for both roles: no sockets, clocks, threads or payload.
//!
//! [`QPair`] takes the bytes of headers and says where the payload between them belongs; whoever
//! drives it moves that payload. What it wants sent it gives out one PDU at a time, as header bytes
//! and a reference to a range of a command's data. It is bounded in everything, and allocates only
//! when a queue is sized.
//!
//! On a protocol fault it sends one termination request with the exact FES and FEI, then is silent.
//! A header digest is made and checked here. A data digest covers payload, so the driver folds it
//! ([`crc32c`]) and the machine says where it lies; a mismatch fails that command alone.

mod cid_table;
mod controller;
mod digest;
mod error;
mod framer;
mod host;
mod limits;
pub mod negotiate;
mod outgoing;
mod pdu;
mod qpair;

pub use controller::{Answered, Controller, ControllerEvent, FetchError, SendError};
pub use digest::{DIGEST_LEN, Digests, crc32c};
pub use error::{FatalError, Fes};
pub use host::{Completed, Direction, Host};
pub use limits::Limits;
pub use outgoing::{MAX_HEADER_LEN, MAX_TX_DATA, TxPayload, TxPdu};
pub use pdu::TermReq;
pub use qpair::{QPair, Role, Want};
