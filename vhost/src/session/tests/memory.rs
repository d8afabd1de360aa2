//! Changes of the memory table.

use super::*;

#[test]
fn regions_come_and_go_under_a_running_ring() {
    let mut bench = Bench::new();
    bench.run_ring();
    bench.worker.events();
    let regions = bench.regions();
    bench.front.remove_mem_region(&regions[2]).expect("remove");
    assert_eq!(bench.worker.events(), ["memory 2 0"]);
    assert!(bench.front.remove_mem_region(&regions[2]).is_err());
    bench.front.add_mem_region(&regions[2]).expect("add");
    assert_eq!(bench.worker.events(), ["memory 3 0"]);
    assert!(bench.front.add_mem_region(&regions[2]).is_err(), "overlap");
    let too_long = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0x100_0000,
        userspace_addr: USER + 0x100_0000,
        memory_size: 2 * REGION,
        ..regions[2]
    };
    assert!(bench.front.add_mem_region(&too_long).is_err());
    assert!(
        bench
            .front
            .set_mem_table(&[regions[0], regions[0]])
            .is_err()
    );
    assert_eq!(bench.worker.events(), [""; 0], "the old table is in force");
    bench.share_memory();
    assert_eq!(bench.worker.events(), ["memory 3 0"]);
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    assert_eq!(bench.worker.held(0), 1);
}

#[test]
fn a_region_may_be_named_with_another_offset_when_it_is_removed() {
    let mut bench = Bench::new();
    bench.negotiate();
    bench.share_memory();
    let other = VhostUserMemoryRegionInfo {
        mmap_offset: 0x7000,
        ..bench.regions()[1]
    };
    bench.front.remove_mem_region(&other).expect("remove");
}

#[test]
fn slots_can_be_filled_to_the_limit_and_no_further() {
    let mut bench = Bench::new();
    bench.negotiate();
    let file = crate::guest::memfd(REGION);
    for slot in 0..509 {
        let added = bench.front.add_mem_region(&region(slot * REGION, &file));
        added.expect("slot");
    }
    assert!(
        bench
            .front
            .add_mem_region(&region(509 * REGION, &file))
            .is_err()
    );
    bench.goes_on();
}
