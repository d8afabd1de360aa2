//! Deliberate defects, each at the place of the real check: they show that the simulation finds such.
//!
//! A mutation is on for the current thread, as long as its [`Enabled`] lives. The code under test
//! asks with `mutated!`, which is the constant `false` where the feature is off.

use std::cell::Cell;

/// One defect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// The LAST_PDU and SUCCESS flags of a data PDU are taken for each other.
    LastAndSuccessSwapped,
    /// A read or write that the controller calls a success is one, however little moved.
    ShortTransferAccepted,
    /// A host's command retires with its completion entry, whatever is still queued of its data.
    RetiredOnCqeAlone,
    /// Digests are received, and not compared.
    DigestIgnored,
    /// An R2T may ask for data beyond the end of the command's.
    R2tRangeUnchecked,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::LastAndSuccessSwapped,
        Self::ShortTransferAccepted,
        Self::RetiredOnCqeAlone,
        Self::DigestIgnored,
        Self::R2tRangeUnchecked,
    ];

    /// Turns it on, in place of whatever was on.
    #[must_use]
    pub fn enable(self) -> Enabled {
        Enabled(ON.replace(Some(self)))
    }
}

thread_local! {
    static ON: Cell<Option<Mutation>> = const { Cell::new(None) };
}

/// Keeps a mutation on until it is dropped.
#[derive(Debug)]
pub struct Enabled(Option<Mutation>);

impl Drop for Enabled {
    fn drop(&mut self) {
        ON.set(self.0);
    }
}

/// True while this mutation is on.
pub(crate) fn is_on(mutation: Mutation) -> bool {
    ON.get() == Some(mutation)
}
