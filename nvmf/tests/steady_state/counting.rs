//! An allocator that counts what the current thread asks for, while it is told to.

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::{Cell, RefCell};

/// The system's, with a count.
struct Counting;

thread_local! {
    /// Allocations are counted.
    static ARMED: Cell<bool> = const { Cell::new(false) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
    /// Where the first one came from.
    static FIRST: RefCell<Option<String>> = const { RefCell::new(None) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count() {
    // A thread that is ending has no counter any more.
    let armed = ARMED
        .try_with(|armed| armed.replace(false))
        .unwrap_or(false);
    if armed {
        let so_far = COUNT.get();
        if so_far == 0 {
            let trace = Backtrace::force_capture().to_string();
            FIRST.with_borrow_mut(|first| *first = Some(trace));
        }
        COUNT.set(so_far + 1);
        ARMED.set(true);
    }
}

// SAFETY: everything is the system allocator's; counting allocates only while it does not count.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, new: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, new) }
    }
}

/// What `work` allocates: how often, and from where first.
pub(crate) fn allocations(work: impl FnOnce()) -> (u64, Option<String>) {
    COUNT.set(0);
    FIRST.set(None);
    ARMED.set(true);
    work();
    ARMED.set(false);
    (COUNT.get(), FIRST.take())
}

/// Times that the work is done until it allocates nothing.
const ATTEMPTS: usize = 5;

/// Demands that `work` allocates nothing, once pools are as large as it needs them: how much of it is
/// under way at once is up to the kernel, so a pool may still grow by what was never out together
/// before. An allocation that comes with each command comes each time.
pub(crate) fn none(what: &str, mut work: impl FnMut()) {
    let mut last = None;
    for _ in 0..ATTEMPTS {
        let (count, first) = allocations(&mut work);
        match first {
            None => return,
            Some(first) => last = Some((count, first)),
        }
    }
    let (count, first) = last.unwrap_or_default();
    panic!("{what}: {count} allocations each time, the first of them\n{first}");
}

#[test]
fn the_counter_counts() {
    let (count, first) = allocations(|| drop(std::hint::black_box(vec![0u8; 10])));
    assert_eq!(count, 1);
    assert!(first.unwrap().contains("the_counter_counts"));
    let mut list = Vec::with_capacity(1);
    none("room that is there", || list.push(1u8));
    assert_eq!(allocations(|| list.push(2)).0, 1);
}
