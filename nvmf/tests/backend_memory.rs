//! What a namespace of memory costs. Alone in its process, since it looks at the whole of it.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]

use std::fs;

use memdesc::MemSource;
use nvmf::backend::{Backend, BackendIo, BackendOp, Engine, RamBackend};

fn resident() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn run(ram: &RamBackend, op: BackendOp) {
    let mut io = BackendIo::new(Engine::Auto);
    ram.submit(&mut io, op, 0);
    assert_eq!(io.done().unwrap().result, Ok(()));
    assert!(io.descriptor().is_none(), "memory needs no engine");
}

#[test]
fn memory_costs_what_was_written_and_gives_back_what_is_deallocated() {
    let before = resident();
    let ram = RamBackend::new(1 << 40, 4096).unwrap();
    for mib in 0..64 {
        let op = BackendOp::Write {
            offset: mib << 30,
            source: MemSource::from_bytes(vec![1; 1 << 20]),
            fua: false,
        };
        run(&ram, op);
    }
    let used = resident();
    let cost = used - before;
    assert!((64 << 20..80 << 20).contains(&cost), "{cost}");
    let op = BackendOp::Deallocate {
        offset: 0,
        len: 1 << 40,
    };
    run(&ram, op);
    assert!(resident() < used - (60 << 20), "{used} {}", resident());
}
