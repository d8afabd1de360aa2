//! Mirrors of what the NVMe specifications put on the wire: layouts and numbers, no behaviour.
//!
//! Documents meant: NVM Express Base 2.0, NVM Command Set 1.0, NVMe over Fabrics (part of Base
//! 2.0), NVMe/TCP Transport 1.0. Field names are the specifications' own, in lower case. Counts
//! that are zero-based on the wire keep the wire's value here; the first layer above turns them
//! into ordinary counts.

pub mod ana;
pub mod cqe;
pub mod cross_reset;
pub mod discovery;
pub mod event;
pub mod fabrics;
pub mod feature;
pub mod identify;
pub mod log;
pub mod nqn;
pub mod opcode;
pub mod property;
pub mod sqe;
pub mod status;

pub use cqe::Cqe;
pub use cross_reset::ControllerInstance;
pub use nqn::Nqn;
pub use sqe::Sqe;
pub use status::Status;

/// Namespace identifier that means "every namespace" where a command allows it.
pub const NSID_ALL: u32 = 0xffff_ffff;

/// Transport types of discovery entries and port descriptions (Base, figure "TRTYPE").
pub mod trtype {
    /// TCP.
    pub const TCP: u8 = 3;
    /// Intra-host: both ends in one process or machine.
    pub const INTRA_HOST: u8 = 0xfe;
}
