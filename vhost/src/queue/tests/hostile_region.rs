//! In-flight regions that hold anything, before a ring starts and while it runs.

use proptest::prelude::*;

use super::*;
use crate::inflight::{BadInflight, Part, Region};

/// Entries of the region's parts.
const ENTRIES: u16 = 32;
const PART: usize = 576;

/// A region with a part for one ring, and what writes to it behind the ring's back.
struct Shared {
    part: Part,
    file: File,
}

impl Shared {
    fn new() -> Self {
        let (shape, file) = Region::make(1, ENTRIES).expect("region");
        let theirs = file.try_clone().expect("clone");
        let region = Region::open(shape, theirs).expect("a fresh region");
        let part = region.part(0, ENTRIES).expect("part");
        Self { part, file }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        rustix::io::pwrite(&self.file, bytes, at).expect("write");
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; PART];
        rustix::io::pread(&self.file, &mut bytes, 0).expect("read");
        bytes
    }

    /// A part that a ring has run on, up to used index `used`, with these entries in flight.
    fn written(used: u16, last_batch: u16, entries: &[(u16, u8, u16, u64)]) -> Self {
        let shared = Self::new();
        shared.put(8, &1_u16.to_le_bytes());
        shared.put(10, &ENTRIES.to_le_bytes());
        shared.put(12, &last_batch.to_le_bytes());
        shared.put(14, &used.to_le_bytes());
        for (head, flag, next, counter) in entries {
            let at = 16 + 16 * u64::from(*head);
            shared.put(at, &[*flag]);
            shared.put(at + 6, &next.to_le_bytes());
            shared.put(at + 8, &counter.to_le_bytes());
        }
        shared
    }

    fn queue(&self, guest: &Guest) -> Result<Queue, BrokenRing> {
        let mut setup = Guest::setup(&Device::new(options()), &guest.map);
        setup.part = self.part.clone();
        Queue::new(setup)
    }

    /// Why a ring with `posted` requests, all of them to be flushed, cannot start on it.
    fn refused(&self, posted: usize) -> BadInflight {
        let before = self.bytes();
        match self.queue(&guest_with(posted)) {
            Err(BrokenRing::Inflight(reason)) => {
                assert_eq!(self.bytes(), before, "a refused part is not touched");
                reason
            }
            other => panic!("not refused: {other:?}"),
        }
    }
}

/// A guest whose driver has made flushes available, at even heads.
fn guest_with(posted: usize) -> Guest {
    let mut guest = Guest::new();
    for _ in 0..posted {
        post(&mut guest, FLUSH, 0, &[]);
    }
    guest
}

#[test]
fn a_part_of_another_version_or_with_features_is_refused() {
    let shared = Shared::written(0, 0, &[]);
    shared.put(8, &2_u16.to_le_bytes());
    assert_eq!(shared.refused(1), BadInflight::Version(2));
    let shared = Shared::written(0, 0, &[]);
    shared.put(0, &(1_u64 << 63).to_le_bytes());
    assert_eq!(shared.refused(1), BadInflight::Features(1 << 63));
}

#[test]
fn a_part_with_another_number_of_entries_is_refused() {
    let shared = Shared::written(0, 0, &[]);
    shared.put(10, &16_u16.to_le_bytes());
    let (found, told) = (16, ENTRIES);
    assert_eq!(shared.refused(1), BadInflight::Entries { found, told });
}

#[test]
fn a_part_that_is_too_small_for_the_ring_is_refused() {
    let (shape, file) = Region::make(1, 8).expect("region");
    let region = Region::open(shape, file).expect("open");
    let guest = Guest::new();
    let mut setup = Guest::setup(&Device::new(options()), &guest.map);
    setup.part = region.part(0, 8).expect("part");
    let too_small = BadInflight::TooSmall {
        entries: 8,
        size: SIZE,
    };
    let refused = Queue::new(setup).err();
    assert_eq!(refused, Some(BrokenRing::Inflight(too_small)));
}

#[test]
fn an_entry_that_is_neither_in_flight_nor_free_is_refused() {
    for head in [0, SIZE, ENTRIES - 1] {
        let shared = Shared::written(0, 0, &[(head, 2, 0, 0)]);
        let value = 2;
        assert_eq!(shared.refused(1), BadInflight::Flag { head, value });
    }
    let head = SIZE;
    let shared = Shared::written(0, 0, &[(head, 1, 0, 0)]);
    let size = SIZE;
    assert_eq!(shared.refused(1), BadInflight::NoDescriptor { head, size });
}

#[test]
fn more_in_flight_than_the_driver_made_available_is_refused() {
    let shared = Shared::written(0, 0, &[(0, 1, 0, 0), (2, 1, 0, 1)]);
    let none = BadInflight::NotAvailable {
        in_flight: 2,
        available: 1,
    };
    assert_eq!(shared.refused(1), none);
    shared.queue(&guest_with(2)).expect("two are there");
}

#[test]
fn a_used_index_of_another_ring_is_refused_while_something_is_in_flight() {
    let far = 0_u16.wrapping_sub(SIZE + 1);
    let shared = Shared::written(far, 0, &[(0, 1, 0, 0)]);
    let other = BadInflight::UsedIndex {
        region: far,
        ring: 0,
    };
    assert_eq!(shared.refused(1), other);
    let shared = Shared::written(far, 0, &[]);
    let queue = shared.queue(&guest_with(1)).expect("nothing is at stake");
    assert_eq!(queue.recovering(), 0);
    assert_eq!(shared.bytes()[14..16], [0, 0]);
}

#[test]
fn a_list_of_the_last_batch_that_leaves_the_ring_or_loops_is_refused() {
    let minus = |count: u16| 0_u16.wrapping_sub(count);
    let shared = Shared::written(minus(1), SIZE, &[(0, 1, 0, 0)]);
    assert_eq!(shared.refused(1), BadInflight::Batch { head: SIZE });
    let shared = Shared::written(minus(2), 4, &[(0, 1, 0, 0), (4, 1, 0xffff, 1)]);
    assert_eq!(shared.refused(2), BadInflight::Batch { head: 0xffff });
    let shared = Shared::written(minus(3), 4, &[(4, 1, 2, 0), (2, 1, 4, 1)]);
    assert_eq!(shared.refused(2), BadInflight::Batch { head: 4 });
}

#[test]
fn a_counter_that_no_ring_gets_to_is_refused() {
    for (flag, counter) in [(1, u64::MAX), (1, 1 << 55), (0, 1 << 63)] {
        let shared = Shared::written(0, 0, &[(4, flag, 0, counter)]);
        let head = 4;
        assert_eq!(shared.refused(1), BadInflight::Counter { head, counter });
    }
}

#[test]
fn equal_counters_are_made_different_in_the_order_of_the_heads() {
    type Entries = &'static [(u16, u8, u16, u64)];
    let cases: [(Entries, [u64; 3]); 2] = [
        (&[(0, 1, 0, 7), (2, 1, 0, 7), (4, 1, 0, 3)], [8, 9, 10]),
        (
            &[(0, 1, 0, 3), (2, 1, 0, 3), (4, 1, 0, 3), (6, 0, 0, 99)],
            [100, 101, 102],
        ),
    ];
    for (entries, counters) in cases {
        let mut guest = guest_with(3);
        let shared = Shared::written(0, 0, entries);
        let mut queue = shared.queue(&guest).expect("can be repaired");
        let requests: Vec<_> = (0..3).map(|_| take(&mut queue)).collect();
        let ids: Vec<_> = requests.iter().map(|request| request.id >> 8).collect();
        assert_eq!(ids, counters, "{entries:?}");
        guest.offer(6);
        post(&mut guest, FLUSH, 0, &[]);
        let mut heads: Vec<_> = requests.into_iter().collect();
        heads.push(take(&mut queue));
        assert_eq!(heads[3].id >> 8, counters[2] + 1, "{entries:?}");
        for request in heads {
            queue.finish(request.token, &request.operation, BlkStatus::Ok);
        }
        queue.flush();
        let mut order: Vec<_> = entries.iter().filter(|entry| entry.1 == 1).collect();
        order.sort_by_key(|entry| (entry.3, entry.0));
        let answered: Vec<_> = guest.used().iter().map(|(head, _)| *head).collect();
        let expected: Vec<_> = order.iter().map(|entry| u32::from(entry.0)).collect();
        assert_eq!(answered[..3], expected, "{entries:?}");
    }
}

fn counter() -> impl Strategy<Value = u64> {
    prop_oneof![20 => 0_u64..8, 20 => 0_u64..1 << 55, 1 => any::<u64>()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Most of the bytes are what a back-end could have left, so that not all are refused.
    #[test]
    fn whatever_a_region_holds_only_what_it_has_in_flight_is_taken_from_it(
        header in proptest::collection::vec((0_u64..16, any::<u8>()), 0..2),
        entries in proptest::collection::vec(
            (0..SIZE, prop_oneof![8 => 0_u8..2, 1 => any::<u8>()], 0..ENTRIES, counter()),
            0..20
        ),
        noise in proptest::collection::vec((0_u64..PART as u64, any::<u8>()), 0..3),
        used in prop_oneof![Just(0_u16), Just(0xffff), Just(0xfffd), any::<u16>()],
        last_batch in 0..ENTRIES,
        posted in 0_usize..8,
    ) {
        let mut guest = guest_with(posted);
        let shared = Shared::written(used, last_batch, &entries);
        for (at, byte) in header.iter().chain(&noise) {
            shared.put(*at, &[*byte]);
        }
        let before = shared.bytes();
        let in_flight = |head: u32| before[16 + 16 * head as usize] == 1;
        let Ok(mut queue) = shared.queue(&guest) else {
            return Ok(());
        };
        let recovering = queue.recovering();
        prop_assert!(recovering <= posted);
        let mut requests = Vec::new();
        for _ in 0..recovering {
            match queue.take(&mut Vec::new) {
                Ok(Some(request)) if request.recovered => requests.push(request),
                // Some were answered on the way.
                Ok(Some(request)) => {
                    queue.leave(request.token);
                    break;
                }
                // A descriptor that the driver has not written is no request.
                Ok(None) | Err(_) => break,
            }
        }
        for request in requests {
            queue.finish(request.token, &request.operation, BlkStatus::Ok);
        }
        queue.flush();
        let answered: Vec<_> = guest.used().iter().map(|(head, _)| *head).collect();
        for (at, head) in answered.iter().enumerate() {
            prop_assert!(in_flight(*head), "head {} was not in flight", head);
            prop_assert!(!answered[..at].contains(head), "head {} twice", head);
        }
    }

    #[test]
    fn a_region_that_changes_while_the_ring_runs_does_not_change_what_the_ring_does(
        noise in proptest::collection::vec((0_u64..PART as u64, any::<u8>()), 20..200),
    ) {
        let shared = Shared::new();
        let mut guest = guest_with(4);
        let mut queue = shared.queue(&guest).expect("a fresh part");
        let mut noise = noise.chunks(noise.len() / 4);
        let mut scribble = || {
            for (at, byte) in noise.next().unwrap_or_default() {
                shared.put(*at, &[*byte]);
            }
        };
        let held: Vec<_> = (0..4).map(|_| take(&mut queue)).collect();
        scribble();
        for request in held {
            queue.leave(request.token);
        }
        scribble();
        queue.reopen();
        prop_assert_eq!(queue.recovering(), 4);
        let held: Vec<_> = (0..4).map(|_| take(&mut queue)).collect();
        scribble();
        for request in held {
            queue.finish(request.token, &request.operation, BlkStatus::Ok);
        }
        scribble();
        queue.flush();
        let mut answered: Vec<_> = guest.used().iter().map(|(head, _)| *head).collect();
        answered.sort_unstable();
        prop_assert_eq!(answered, [0, 2, 4, 6]);
    }
}
