//! Drivers that misbehave: what breaks a ring, and what does not.

use proptest::prelude::*;

use super::*;
use crate::guest::{REGION, REGIONS};

#[test]
fn answers_that_are_not_published_count_as_outstanding() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    for _ in 0..SIZE {
        post_in_one(&mut guest, 99);
    }
    take_nothing(&mut queue);
    guest.offer(0);
    assert_eq!(take_broken(&mut queue), BrokenRing::TooManyAvailable);
}

/// Posts a request that takes one descriptor of the ring, as many as there are.
fn post_in_one(guest: &mut Guest, kind: u32) -> u16 {
    guest.write(HEADER_AT, &header(kind, 0));
    guest.post_indirect(0x7000, &[out(HEADER_AT, 16), into(STATUS_AT, 1)])
}

#[test]
fn a_request_that_is_made_available_again_before_its_answer_breaks_the_ring() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    let head = post(&mut guest, FLUSH, 0, &[]);
    let request = take(&mut queue);
    guest.offer(head);
    assert_eq!(take_broken(&mut queue), BrokenRing::HeadInFlight { head });
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    assert!(!queue.flush());
    assert_eq!(guest.used_idx(), 0, "a broken ring is not written to");
}

#[test]
fn a_request_whose_answer_is_not_published_is_still_in_flight() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    let head = post(&mut guest, FLUSH, 0, &[]);
    let request = take(&mut queue);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    guest.offer(head);
    assert_eq!(take_broken(&mut queue), BrokenRing::HeadInFlight { head });
}

#[test]
fn a_request_can_be_made_available_again_once_it_was_answered() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    let head = post(&mut guest, FLUSH, 0, &[]);
    for round in 1..=3 {
        let request = take(&mut queue);
        queue.finish(request.token, &request.operation, BlkStatus::Ok);
        queue.flush();
        assert_eq!(guest.used_idx(), round);
        guest.offer(head);
    }
}

/// Posts `buffers` and returns why that broke the ring.
fn broken_by(buffers: &[(u64, u32, u16)]) -> BrokenRing {
    let mut guest = Guest::new();
    let (err, errors) = signal();
    let mut queue = queue_with(&guest, |setup| setup.err = Some(err));
    guest.write(HEADER_AT, &header(WRITE_TO_DISK, 0));
    guest.post(buffers);
    let reason = take_broken(&mut queue);
    assert_eq!(raised(&errors), 1);
    assert_eq!(take_broken(&mut queue), reason);
    assert_eq!(raised(&errors), 0, "reported once");
    assert_eq!(queue.broken(), Some(reason));
    assert!(!queue.rearm());
    reason
}

#[test]
fn a_readable_descriptor_behind_a_writable_one_breaks_the_ring() {
    assert_eq!(
        broken_by(&[out(HEADER_AT, 16), into(STATUS_AT, 1), out(DATA_AT, 512)]),
        BrokenRing::ReadableAfterWritable { head: 0 }
    );
}

#[test]
fn a_chain_without_a_status_breaks_the_ring() {
    let no_status = BrokenRing::NoStatus { head: 0 };
    assert_eq!(
        broken_by(&[out(HEADER_AT, 16), out(DATA_AT, 512)]),
        no_status
    );
    assert_eq!(
        broken_by(&[out(HEADER_AT, 16), into(STATUS_AT, 0)]),
        no_status
    );
}

#[test]
fn memory_that_the_guest_does_not_have_breaks_the_ring() {
    let outside = BrokenRing::OutsideMemory { head: 0 };
    let hole = REGIONS[1] + REGION;
    let status = into(STATUS_AT, 1);
    for data in [
        out(hole, 512),
        out(hole - 256, 512),
        out(REGIONS[2] - 256, 512),
        out(u64::MAX - 100, 512),
    ] {
        assert_eq!(broken_by(&[out(HEADER_AT, 16), data, status]), outside);
    }
    assert_eq!(broken_by(&[out(hole - 8, 16), status]), outside);
    assert_eq!(broken_by(&[out(HEADER_AT, 16), into(hole, 1)]), outside);
    assert_eq!(broken_by(&[out(HEADER_AT, 16), into(u64::MAX, 2)]), outside);
}

#[test]
fn a_chain_that_loops_breaks_the_ring() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    let desc = |next| Desc {
        addr: HEADER_AT,
        len: 16,
        flags: NEXT,
        next,
    };
    guest.desc(3, desc(4));
    guest.desc(4, desc(3));
    guest.offer(3);
    assert_eq!(take_broken(&mut queue), BrokenRing::Endless { head: 3 });
}

#[test]
fn a_chain_that_leaves_its_table_breaks_the_ring() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    let desc = Desc {
        addr: HEADER_AT,
        len: 16,
        flags: NEXT,
        next: SIZE,
    };
    guest.desc(0, desc);
    guest.offer(0);
    assert_eq!(take_broken(&mut queue), BrokenRing::Endless { head: 0 });
}

#[test]
fn a_head_outside_the_table_breaks_the_ring() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    guest.offer(SIZE);
    let head = SIZE;
    assert_eq!(take_broken(&mut queue), BrokenRing::NoDescriptor { head });
}

#[test]
fn an_indirect_table_that_cannot_be_read_breaks_the_ring() {
    let none = BrokenRing::NoDescriptor { head: 0 };
    let hole = REGIONS[1] + REGION;
    assert_eq!(broken_by(&[(hole, 64, INDIRECT)]), none);
    assert_eq!(broken_by(&[(DATA_AT, 60, INDIRECT)]), none);
    assert_eq!(broken_by(&[(DATA_AT, 0, INDIRECT)]), none);
}

#[test]
fn an_indirect_table_in_an_indirect_table_breaks_the_ring() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    guest.write(HEADER_AT, &header(FLUSH, 0));
    guest.post_indirect(
        DATA_AT,
        &[out(HEADER_AT, 16), (DATA_AT + 0x100, 16, INDIRECT)],
    );
    assert_eq!(take_broken(&mut queue), BrokenRing::Endless { head: 0 });
}

#[test]
fn an_indirect_chain_past_every_limit_breaks_the_ring() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    guest.write(HEADER_AT, &header(READ, 0));
    let mut buffers = vec![out(HEADER_AT, 16)];
    buffers.extend((0..60).map(|at| into(DATA_AT + 512 * at, 512)));
    buffers.push(into(STATUS_AT, 1));
    guest.post_indirect(0xf000, &buffers);
    assert_eq!(take_broken(&mut queue), BrokenRing::TooLong { head: 0 });
}

#[test]
fn a_jump_of_the_available_index_breaks_the_ring() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    guest.set_avail(SIZE + 1);
    assert_eq!(take_broken(&mut queue), BrokenRing::TooManyAvailable);
}

#[test]
fn a_request_more_than_the_ring_has_entries_breaks_the_ring() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    let mut tokens = Vec::new();
    for _ in 0..SIZE {
        post_in_one(&mut guest, FLUSH);
        tokens.push(take(&mut queue).token);
    }
    guest.offer(0);
    assert_eq!(take_broken(&mut queue), BrokenRing::TooManyAvailable);
    for token in tokens {
        queue.finish(token, &Operation::Flush, BlkStatus::Ok);
    }
    queue.flush();
    assert_eq!(queue.in_flight(), 0);
    assert_eq!(guest.used_idx(), 0, "a broken ring is not written to");
}

#[test]
fn requests_before_a_bad_one_are_still_handed_out() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    post(&mut guest, FLUSH, 0, &[]);
    guest.offer(SIZE);
    let request = take(&mut queue);
    assert!(matches!(
        take_broken(&mut queue),
        BrokenRing::NoDescriptor { .. }
    ));
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
}

#[test]
fn a_ring_must_be_aligned_a_power_of_two_and_in_memory() {
    let guest = Guest::new();
    let refused = |change: fn(&mut QueueSetup)| {
        let mut setup = Guest::setup(&Device::new(options()), &guest.map);
        change(&mut setup);
        Queue::new(setup).err()
    };
    let layout = Some(BrokenRing::RingLayout);
    let outside = Some(BrokenRing::RingOutsideMemory);
    assert_eq!(refused(|setup| setup.size = 12), layout);
    assert_eq!(refused(|setup| setup.size = 0), layout);
    assert_eq!(refused(|setup| setup.addresses.descriptors = 8), layout);
    assert_eq!(refused(|setup| setup.addresses.available = 0x1001), layout);
    assert_eq!(refused(|setup| setup.addresses.used = 0x2002), layout);
    let hole = |setup: &mut QueueSetup| setup.addresses.used = REGIONS[1] + REGION - 16;
    assert_eq!(refused(hole), outside);
    assert_eq!(
        refused(|setup| setup.addresses.available = 0x20_0000),
        outside
    );
}

fn any_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let addr = prop_oneof![
        6 => Just(HEADER_AT),
        4 => 0_u64..0x2_0000,
        1 => any::<u64>(),
        1 => Just(u64::from(u16::MAX) - 10),
    ];
    let len = prop_oneof![
        4 => Just(16_u32),
        4 => Just(512_u32),
        3 => 0_u32..2000,
        1 => any::<u32>(),
        1 => Just(1_u32),
    ];
    let flags = prop_oneof![8 => 0_u16..4, 2 => 0_u16..8, 1 => any::<u16>()];
    (addr, len, flags, 0_u16..SIZE + 1)
}

proptest! {
    #[test]
    fn whatever_the_tables_say_every_chain_is_answered_or_breaks_the_ring(
        table in prop::collection::vec(any_descriptor(), usize::from(SIZE)),
        heads in prop::collection::vec(0_u16..SIZE, 1..8),
        kind in prop_oneof![0_u32..16, any::<u32>()],
        sector in any::<u64>(),
    ) {
        let mut guest = Guest::new();
        let mut queue = guest.queue();
        guest.write(HEADER_AT, &header(kind, sector));
        // The same random descriptors are the ring's table and an indirect one at 0x8000.
        for (index, (addr, len, flags, next)) in (0_u16..).zip(&table) {
            let indirect = flags & INDIRECT != 0;
            let desc = Desc {
                addr: if indirect { 0x8000 } else { *addr },
                len: if indirect { u32::from(SIZE) * 16 } else { *len },
                flags: *flags,
                next: *next,
            };
            guest.desc(index, desc);
            guest.write(0x8000 + 16 * u64::from(index), &desc.bytes());
        }
        for head in &heads {
            guest.offer(*head);
        }
        let mut requests = Vec::new();
        let broken = loop {
            match queue.take(&mut Vec::new) {
                Ok(Some(request)) => {
                    if let Operation::Read { sink, .. } = &request.operation {
                        prop_assert!(sink.len() % 512 == 0 && !sink.is_empty());
                    }
                    requests.push(request);
                }
                Ok(None) => break false,
                Err(_) => break true,
            }
        };
        for Request { token, operation, .. } in requests {
            queue.finish(token, &operation, BlkStatus::Ok);
        }
        queue.flush();
        prop_assert_eq!(queue.in_flight(), 0);
        prop_assert_eq!(queue.broken().is_some(), broken);
        // Writes to guest memory may have hit the rings themselves; their count is only certain
        // where the table kept them apart.
        let apart = table.iter().all(|(addr, len, _, _)| {
            *addr >= 0x3000 && addr.saturating_add(u64::from(*len)) <= 0x2_0000
        });
        if !broken && apart {
            prop_assert_eq!(usize::from(guest.used_idx()), heads.len());
        }
    }
}
