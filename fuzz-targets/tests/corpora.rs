//! Every target with its corpus and with random bytes, on any toolchain, and within bounded memory.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]
#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use fuzz_targets::{TARGETS, Target};

/// Random inputs for each target, unless `FUZZ_INPUTS` says otherwise.
const RANDOM_INPUTS: u64 = 2000;
/// Bytes that one run may have allocated at a time: a queue of a few entries and its data, whatever
/// lengths the input names.
const MEMORY: i64 = 4 << 20;

/// The system's allocator, with the bytes that the current thread holds and held at most.
struct Measuring;

thread_local! {
    static HELD: Cell<i64> = const { Cell::new(0) };
    static MOST: Cell<i64> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Measuring = Measuring;

fn count(bytes: i64) {
    // A thread that is ending has no counters any more.
    let held = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        held.get()
    });
    if let Ok(held) = held {
        let _ = MOST.try_with(|most| most.set(most.get().max(held)));
    }
}

// SAFETY: everything is the system allocator's; counting allocates nothing.
unsafe impl GlobalAlloc for Measuring {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Runs one input; `name` is said when it fails.
fn run(target: Target, input: &[u8], name: &str) {
    let before = HELD.get();
    MOST.set(before);
    if catch_unwind(|| target(input)).is_err() {
        panic!("{name}: the input is {input:02x?}");
    }
    let most = MOST.get() - before;
    assert!(most < MEMORY, "{name}: {most} bytes at a time");
}

fn target(name: &str) -> Target {
    TARGETS.iter().find(|(it, _)| *it == name).unwrap().1
}

fn corpus(name: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory = root.join("../fuzz/corpus").join(name);
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
}

fn replay(name: &str) {
    let files = corpus(name);
    assert!(files.len() >= 10, "{name} has no corpus");
    for file in files {
        let input = std::fs::read(&file).unwrap();
        run(target(name), &input, &file.display().to_string());
    }
}

/// Random programs: half of them of decisions that lean towards what is right.
fn random(name: &str) {
    let variable = |name: &str| std::env::var(name).ok().and_then(|it| it.parse().ok());
    let (first, count) = match variable("FUZZ_SEED") {
        Some(seed) => (seed, 1),
        None => {
            let first = fastrand::u64(..1 << 40);
            (first, variable("FUZZ_INPUTS").unwrap_or(RANDOM_INPUTS))
        }
    };
    eprintln!("{name}: seeds from {first} on, one again with FUZZ_SEED");
    for seed in first..first + count {
        let mut random = fastrand::Rng::with_seed(seed);
        let len = 1 << random.u32(4..11);
        let mut input: Vec<u8> = (0..len).map(|_| random.u8(..)).collect();
        if seed % 2 == 0 {
            for byte in &mut input {
                if *byte >= 0xd0 && random.u8(..16) != 0 {
                    *byte &= 0x3f;
                }
            }
        }
        run(target(name), &input, &format!("{name}, FUZZ_SEED={seed}"));
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(mod $name {
            #[test]
            fn its_corpus() {
                super::replay(stringify!($name));
            }

            #[test]
            fn random_bytes() {
                super::random(stringify!($name));
            }
        })*

        #[test]
        fn no_target_is_left_out() {
            let tested = [$(stringify!($name)),*];
            assert!(TARGETS.iter().map(|(name, _)| *name).eq(tested));
        }
    };
}

targets! { framer host controller handshake connect chain session }

#[test]
fn the_measure_measures() {
    let result = catch_unwind(|| {
        run(
            |_| drop(std::hint::black_box(vec![1u8; 5 << 20])),
            &[],
            "it",
        )
    });
    assert!(result.is_err());
}
