//! The token of a request in flight, and the books that notice one that is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// What a token stands for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Claim {
    /// First descriptor of the chain.
    pub(crate) head: u16,
    /// Guest address of the status byte.
    pub(crate) status_addr: u64,
    /// Length for the used element when the request succeeds.
    pub(crate) written: u32,
    /// Number of the generation of guest memory that the request refers to.
    pub(crate) generation: u32,
}

/// Shared by a queue and its tokens.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    lost: AtomicU32,
}

/// A request in flight. It must go back to its queue with [`crate::Queue::finish`].
///
/// A token that is dropped instead leaves the guest waiting for ever and the ring unable to drain;
/// its queue logs that as an error when it is next flushed, and panics in a debug build. Dropping
/// the queue and its tokens together, in any order, is allowed.
#[derive(Debug)]
#[must_use = "a request that is not finished is never answered"]
pub struct Token {
    claim: Claim,
    /// `None` only between redemption and drop.
    ledger: Option<Arc<Ledger>>,
}

impl Drop for Token {
    fn drop(&mut self) {
        if let Some(ledger) = &self.ledger {
            ledger.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Tokens that a queue can still give out. The references to the ledger are made once and travel
/// with the tokens, so that no request clones one.
#[derive(Debug)]
pub(crate) struct Tokens {
    ledger: Arc<Ledger>,
    free: Vec<Arc<Ledger>>,
}

impl Tokens {
    /// As many tokens as a ring of `size` entries can have requests.
    pub(crate) fn new(size: u16) -> Self {
        let ledger = Arc::new(Ledger::default());
        Self {
            free: vec![Arc::clone(&ledger); usize::from(size)],
            ledger,
        }
    }

    /// A token for `claim`, or `None` when all are out.
    pub(crate) fn issue(&mut self, claim: Claim) -> Option<Token> {
        let ledger = self.free.pop()?;
        Some(Token {
            claim,
            ledger: Some(ledger),
        })
    }

    /// Takes a token back; `None` when it is another queue's.
    pub(crate) fn redeem(&mut self, mut token: Token) -> Option<Claim> {
        let ours = |ledger: &Arc<Ledger>| Arc::ptr_eq(ledger, &self.ledger);
        if !token.ledger.as_ref().is_some_and(ours) {
            return None;
        }
        self.free.extend(token.ledger.take());
        Some(token.claim)
    }

    /// Tokens dropped without being redeemed since the last call.
    pub(crate) fn take_lost(&self) -> u32 {
        match self.ledger.lost.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.ledger.lost.swap(0, Ordering::Relaxed),
        }
    }
}
