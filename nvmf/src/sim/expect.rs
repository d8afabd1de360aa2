//! What may follow from the faults of a connection: how each end may end, and which commands fail.

use std::collections::BTreeMap;

use crate::transport::Ending;

/// One end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// The host's.
    Host,
    /// The controller's.
    Controller,
}

impl Side {
    /// The other one.
    #[must_use]
    pub fn peer(self) -> Self {
        match self {
            Self::Host => Self::Controller,
            Self::Controller => Self::Host,
        }
    }

    pub(super) fn index(self) -> usize {
        match self {
            Self::Host => 0,
            Self::Controller => 1,
        }
    }
}

/// An ending that may be reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndingIs {
    Closed,
    Lost,
    Local,
    /// A protocol error of the peer, with this FES and, where it is known, this FEI.
    Protocol(u16, Option<u32>),
    /// A termination request of the peer; with this FES where it is known.
    Terminated(Option<u16>),
}

impl EndingIs {
    fn allows(self, ending: &Ending) -> bool {
        match (self, ending) {
            (Self::Closed, Ending::Closed)
            | (Self::Lost, Ending::Lost(_))
            | (Self::Local, Ending::Local)
            | (Self::Terminated(None), Ending::Terminated(_) | Ending::Garbled) => true,
            (Self::Terminated(Some(fes)), Ending::Terminated(term)) => term.fes.0 == fes,
            (Self::Protocol(fes, fei), Ending::Protocol(error)) => {
                error.fes.0 == fes && fei.is_none_or(|fei| error.fei == fei)
            }
            _ => false,
        }
    }
}

/// How a command has to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failing {
    /// Some of its data did not arrive intact.
    Digest,
    /// Some of its data never arrived, although the controller says that all is well.
    Short,
    /// It was answered with an error before its data had left.
    Early,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Expectations {
    endings: [Vec<EndingIs>; 2],
    must_end: [bool; 2],
    failing: BTreeMap<u16, Failing>,
    /// Something that must never happen, happened on the wire.
    violation: Option<String>,
}

impl Expectations {
    /// A side may end so.
    pub(super) fn may_end(&mut self, side: Side, how: EndingIs) {
        self.endings[side.index()].push(how);
    }

    /// A side must end in one of the ways that were allowed.
    pub(super) fn must_end(&mut self, side: Side) {
        self.must_end[side.index()] = true;
    }

    pub(super) fn is_to_end(&self, side: Side) -> bool {
        self.must_end[side.index()]
    }

    /// The command with this CID must fail.
    pub(super) fn fails(&mut self, cid: u16, how: Failing) {
        self.failing.insert(cid, how);
    }

    /// How the command that has just completed had to fail, if it had to.
    pub(super) fn take_failing(&mut self, cid: u16) -> Option<Failing> {
        self.failing.remove(&cid)
    }

    /// A side sent a termination request with this FES and FEI.
    pub(super) fn saw_term_req(&mut self, by: Side, fes: u16, fei: u32) {
        let due = self.endings[by.index()].iter().any(|ending| {
            matches!(ending, EndingIs::Protocol(known, at)
                if *known == fes && at.is_none_or(|at| at == fei))
        });
        if !due {
            self.violate(format!(
                "the {by:?} sent a termination request (FES {fes}, FEI {fei}) for no reason"
            ));
        }
    }

    pub(super) fn violate(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    pub(super) fn take_violation(&mut self) -> Option<String> {
        self.violation.take()
    }

    /// Checks an ending that was reported.
    pub(super) fn check(&self, side: Side, ending: &Ending) -> Result<(), String> {
        let allowed = &self.endings[side.index()];
        if allowed.iter().any(|allowed| allowed.allows(ending)) {
            return Ok(());
        }
        Err(format!(
            "the {side:?} ended with \"{ending}\"; allowed were {allowed:?}"
        ))
    }
}
