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
fn a_descriptor_that_comes_with_a_removal_is_closed() {
    let mut bench = Bench::new();
    bench.negotiate();
    bench.share_memory();
    let (mut reader, writer) = std::io::pipe().expect("pipe");
    let header = [FrontendReq::REM_MEM_REG as u32, 1 | 8, 40].map(u32::to_le_bytes);
    let gone = REGIONS[1];
    // Padding, where the guest has it, its size, where the front-end has it, where in a file.
    let body = [0, gone, REGION, USER + gone, 0].map(u64::to_le_bytes);
    let message = [header.concat(), body.concat()].concat();
    let files = [writer.as_raw_fd()];
    vmm_sys_util::sock_ctrl_msg::ScmSocket::send_with_fds(&bench.raw, &[&message[..]], &files)
        .expect("send");
    assert_eq!(bench.receive().2, 0_u64.to_le_bytes(), "removed");
    drop(writer);
    assert_eq!(reader.read(&mut [0]).expect("end"), 0, "our copy is closed");
    assert!(bench.front.remove_mem_region(&bench.regions()[1]).is_err());
}

#[test]
fn slots_can_be_filled_to_the_limit_and_no_further() {
    let mut bench = Bench::new();
    bench.run_ring();
    assert_eq!(bench.front.get_max_mem_slots().expect("slots"), 509);
    let file = crate::guest::memfd(REGION);
    let slot = |number: u64| region(0x100_0000 + number * REGION, &file);
    // The ring's own memory has three.
    for number in 3..509 {
        bench.front.add_mem_region(&slot(number)).expect("slot");
    }
    bench.worker.events();
    assert!(bench.front.add_mem_region(&slot(509)).is_err());
    assert_eq!(bench.worker.events(), [""; 0], "the table is as it was");
    // Every one of them is there, in no order; one that went makes room for one.
    for number in (3..509).map(|at| 3 + (at * 211) % 506) {
        bench
            .front
            .remove_mem_region(&slot(number))
            .expect("removed");
    }
    assert!(bench.front.remove_mem_region(&slot(3)).is_err());
    assert_eq!(bench.worker.events().last().expect("some"), "memory 3 0");
    bench.front.add_mem_region(&slot(509)).expect("room");
    bench.post_flush();
    bench.front.set_vring_enable(0, true).expect("scan");
    assert_eq!(bench.worker.held(0), 1);
}
