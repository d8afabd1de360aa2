//! For tests: a process that is killed between any two of its stores to memory that others see.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    /// Stores left to this thread, if they are counted.
    static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
}

struct Killed;

/// Called before each store.
pub(crate) fn burn() {
    LEFT.with(|left| match left.get() {
        None => {}
        Some(0) => resume_unwind(Box::new(Killed)),
        Some(stores) => left.set(Some(stores - 1)),
    });
}

/// Does `work`, which ends after `stores` stores at the latest: then there is no result.
pub(crate) fn killed_after<T>(stores: u64, work: impl FnOnce() -> T) -> Option<T> {
    LEFT.with(|left| left.set(Some(stores)));
    let result = catch_unwind(AssertUnwindSafe(work));
    LEFT.with(|left| left.set(None));
    match result {
        Ok(result) => Some(result),
        Err(cause) if cause.is::<Killed>() => None,
        Err(cause) => resume_unwind(cause),
    }
}
