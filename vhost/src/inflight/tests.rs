//! The layout of a region, byte by byte, and its tail.

use super::*;
use crate::fuse::killed_after;

pub(super) fn bytes(file: &File, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rustix::io::pread(file, &mut bytes, at).expect("read");
    bytes
}

pub(super) fn region(rings: u16, entries: u16) -> (Region, File, RegionShape) {
    let (shape, file) = Region::make(rings, entries).expect("region");
    let ours = file.try_clone().expect("clone");
    let region = Region::open(shape, ours).expect("a fresh region");
    (region, file, shape)
}

#[test]
fn parts_are_aligned_to_64_bytes_and_the_tail_and_wide_parts_are_behind_them() {
    for (rings, entries, parts, wide) in [
        (1, 1, 64, 16448),
        (1, 2, 64, 16448),
        (1, 4, 128, 16448),
        (3, 64, 3 * 1088, 3 * 16448),
        (2, 1023, 2 * 16384, 2 * 16448),
        (2, 1024, 2 * 16448, 0),
        (256, 32768, 256 * 524_352, 0),
    ] {
        let (shape, _) = Region::make(rings, entries).expect("region");
        let len = parts + 65600 + wide;
        assert_eq!(shape.len, len, "{rings} rings of {entries}");
    }
}

#[test]
fn a_part_is_laid_out_as_the_specification_says() {
    let (region, file, _) = region(2, 64);
    let part = region.part(1, 64).expect("part");
    part.recover(64, 0x1234, 0x1234).expect("fresh");
    let header = [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 64, 0, 0, 0, 0x34, 0x12];
    assert_eq!(bytes(&file, 1088, 16), header);
    part.take(7, 0x0102_0304_0506_0708);
    part.link(7, 0x0a0b);
    let at = 1088 + 16 + 7 * 16;
    let entry = [1, 0, 0, 0, 0, 0, 0x0b, 0x0a, 8, 7, 6, 5, 4, 3, 2, 1];
    assert_eq!(bytes(&file, at, 16), entry);
    assert_eq!(bytes(&file, 1088 + 12, 2), [7, 0]);
    part.clear(7);
    assert_eq!(bytes(&file, at, 1), [0]);
    part.settle(0x1235);
    assert_eq!(bytes(&file, 1088 + 14, 2), [0x35, 0x12]);
    assert_eq!(bytes(&file, 0, 1088), [0; 1088], "the part before");
    part.forget();
    assert_eq!(bytes(&file, 1088 + 8, 2), [0, 0]);
}

#[test]
fn a_part_that_was_not_begun_to_its_end_is_begun_again() {
    let (region, file, _) = region(1, 8);
    rustix::io::pwrite(&file, &[0xff; 144], 0).expect("write");
    rustix::io::pwrite(&file, &[0; 2], 8).expect("write");
    let part = region.part(0, 8).expect("part");
    let found = part.recover(8, 5, 5).expect("not begun");
    assert_eq!(found, ring::Found::default());
    let again = part.recover(8, 5, 5).expect("begun");
    assert!(again.initialised && again.in_flight.is_empty());
    assert_eq!(again.counter, 1);
}

#[test]
fn counters_go_on_behind_those_of_requests_that_were_answered() {
    let (region, ..) = region(1, 8);
    let part = region.part(0, 8).expect("part");
    part.recover(8, 0, 0).expect("fresh");
    part.take(1, 40);
    part.take(2, 41);
    part.clear(2);
    let found = part.recover(8, 0, 1).expect("one in flight");
    assert_eq!(found.counter, 42);
}

#[test]
fn a_kill_while_counters_are_made_different_does_not_change_their_order() {
    let order = |found: &ring::Found| {
        let heads = found.in_flight.iter().map(|aged| aged.head);
        heads.collect::<Vec<_>>()
    };
    for counters in [
        [7, 7, 3, 7, 9],
        [0, 0, 0, 0, 0],
        [1 << 50, 5, 5, 1, 1 << 50],
        [4, 3, 2, 1, 0],
    ] {
        let prepared = || {
            let (region, ..) = region(1, 8);
            let part = region.part(0, 8).expect("part");
            part.recover(8, 0, 0).expect("fresh");
            for (head, counter) in (0..).zip(counters) {
                part.take(head, counter);
            }
            part
        };
        let mut sorted: Vec<_> = (0_u16..).zip(counters).collect();
        sorted.sort_by_key(|(head, counter)| (*counter, *head));
        let expected: Vec<_> = sorted.iter().map(|(head, _)| *head).collect();
        for stores in 0.. {
            let part = prepared();
            let whole = killed_after(stores, || part.recover(8, 0, 5).is_ok());
            let found = part.recover(8, 0, 5).expect("again");
            assert_eq!(order(&found), expected, "{counters:?} after {stores}");
            let last = found.in_flight.iter().map(|aged| aged.counter).max();
            assert!(last < Some(found.counter));
            if whole.is_some() {
                break;
            }
        }
    }
}

#[test]
fn a_tail_is_read_and_written_within_its_bounds_only() {
    let (region, file, _) = region(1, 8);
    let tail = region.tail();
    // A header and eight entries, aligned.
    let start = 192;
    tail.store(65528, 0x0807_0605_0403_0201);
    let last = bytes(&file, start + 65528, 8);
    assert_eq!(last, [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(tail.load(65528), 0x0807_0605_0403_0201);
    assert!(tail.write(0, b"first"));
    assert_eq!(bytes(&file, start, 5), b"first");
    for at in [65532, 65536, usize::MAX - 3, usize::MAX] {
        assert!(!tail.write(at, b"bytes"), "at {at}");
        assert!(!tail.read(at, &mut [0; 5]), "at {at}");
        assert_eq!(
            tail.load(at & !7),
            if at & !7 == 65528 {
                0x0807_0605_0403_0201
            } else {
                0
            }
        );
    }
    tail.store(4, u64::MAX);
    tail.store(65536, u64::MAX);
    assert_eq!(tail.load(4), 0, "not a multiple of 8");
    assert_eq!(bytes(&file, start, 8), b"first\0\0\0");
    assert_eq!(bytes(&file, start - 64, 64), [0; 64], "before the tail");
}

#[test]
fn a_tail_in_private_memory_is_all_zero_and_not_kept() {
    let tail = Tail::elsewhere(true, false).expect("memory");
    let mut bytes = [1; 256];
    assert!(tail.read(65280, &mut bytes));
    assert_eq!(bytes, [0; 256]);
    assert!(tail.fresh() && !tail.kept());
}
