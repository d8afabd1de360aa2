//! Every operation on scattered memory gives what the same operation on one byte array gives.
#![expect(unsafe_code, reason = "segments over test memory")]

use std::ptr::NonNull;

use memdesc::{MemSink, MemSource, OutOfBounds, Segment};
use proptest::prelude::*;

/// A backing store cut into segments at the given lengths.
fn segments(store: &mut [u8], lengths: &[usize]) -> Vec<Segment> {
    let mut at = 0;
    let mut list = Vec::new();
    for &len in lengths {
        let len = len.min(store.len() - at);
        let base = NonNull::from(&mut store[at..]).cast();
        // SAFETY: the store outlives every memdesc of the test and is not touched meanwhile.
        list.push(unsafe { Segment::new(base, len) });
        at += len;
    }
    list
}

fn total(lengths: &[usize]) -> usize {
    lengths.iter().sum()
}

proptest! {
    #[test]
    fn a_source_reads_what_the_array_holds(
        lengths in prop::collection::vec(0usize..40, 0..12),
        offset in 0usize..300,
        len in 0usize..300,
    ) {
        let mut store: Vec<u8> = (0..total(&lengths)).map(|i| (i * 7) as u8).collect();
        let model = store.clone();
        let source = MemSource::from_segments(segments(&mut store, &lengths));
        let mut read = vec![0; len];
        let done = source.copy_to(offset, &mut read);
        match model.get(offset..offset + len) {
            Some(expected) => {
                prop_assert!(done.is_ok());
                prop_assert_eq!(&read[..], expected);
                let part = source.slice(offset..offset + len, Vec::new()).unwrap();
                let mut again = vec![0; len];
                part.copy_to(0, &mut again).unwrap();
                prop_assert_eq!(&again[..], expected);
            }
            None => prop_assert_eq!(
                done,
                Err(OutOfBounds { offset, len, available: model.len() })
            ),
        }
    }

    #[test]
    fn a_sink_changes_the_range_and_nothing_else(
        lengths in prop::collection::vec(0usize..40, 0..12),
        offset in 0usize..300,
        len in 0usize..300,
    ) {
        let mut store = vec![0xee; total(&lengths)];
        let mut model = store.clone();
        let from: Vec<u8> = (0..len).map(|i| i as u8).collect();
        let mut sink = MemSink::from_segments(segments(&mut store, &lengths));
        let done = sink.copy_from(offset, &from);
        drop(sink);
        match model.get_mut(offset..offset + len) {
            Some(range) => {
                prop_assert!(done.is_ok());
                range.copy_from_slice(&from);
            }
            None => prop_assert!(done.is_err()),
        }
        prop_assert_eq!(store, model);
    }

    #[test]
    fn a_digest_is_that_of_the_array_however_it_is_cut(
        lengths in prop::collection::vec(0usize..6000, 0..6),
        start in 0usize..20000,
        len in 0usize..20000,
        at in 0usize..20000,
    ) {
        let mut store: Vec<u8> = (0..total(&lengths)).map(|i| (i * 7 + i / 256) as u8).collect();
        let model = store.clone();
        let sink = MemSink::from_segments(segments(&mut store, &lengths));
        let digest = sink.crc32c(start..start + len, 0);
        match model.get(start..start + len) {
            Some(range) => {
                prop_assert_eq!(digest, Ok(crc32c::crc32c(range)));
                let at = start + at.min(len);
                let first = sink.crc32c(start..at, 0).unwrap();
                prop_assert_eq!(sink.crc32c(at..start + len, first), digest);
            }
            None => prop_assert_eq!(
                digest,
                Err(OutOfBounds { offset: start, len, available: model.len() })
            ),
        }
    }

    #[test]
    fn vectors_cover_the_range_in_order_up_to_the_limit(
        lengths in prop::collection::vec(0usize..40, 1..12),
        cut in 0usize..200,
        max in 0usize..14,
    ) {
        let mut store = vec![0; total(&lengths)];
        let base = store.as_ptr() as usize;
        let all = store.len();
        let source = MemSource::from_segments(segments(&mut store, &lengths));
        let start = cut.min(all);
        let mut out = Vec::new();
        let covered = source.iovecs(start..all, max, &mut out).unwrap();
        prop_assert!(out.len() <= max);
        let mut at = base + start;
        for iov in &out {
            prop_assert_eq!(iov.iov_base as usize, at);
            prop_assert!(iov.iov_len > 0);
            at += iov.iov_len;
        }
        prop_assert_eq!(at - base - start, covered);
        prop_assert!(covered == all - start || out.len() == max);
    }

    #[test]
    fn a_copy_between_differently_cut_memory_keeps_the_order(
        from in prop::collection::vec(0usize..40, 0..8),
        to in prop::collection::vec(0usize..40, 0..8),
        skip in 0usize..50,
    ) {
        let mut a: Vec<u8> = (0..total(&from)).map(|i| i as u8).collect();
        let mut b = vec![0xff; total(&to)];
        let model = a.clone();
        let len = a.len().saturating_sub(skip).min(b.len());
        let source = MemSource::from_segments(segments(&mut a, &from));
        let mut sink = MemSink::from_segments(segments(&mut b, &to));
        let start = skip.min(source.len());
        memdesc::copy(&source, start, &mut sink, 0, len).unwrap();
        prop_assert!(memdesc::copy(&source, start, &mut sink, 1, usize::MAX).is_err());
        drop(sink);
        prop_assert_eq!(&b[..len], &model[start..start + len]);
        prop_assert!(b[len..].iter().all(|&byte| byte == 0xff));
    }
}

#[test]
fn zeroes_of_any_length_read_as_zero() {
    let source = MemSource::zeroes(200_000, Vec::new());
    let mut bytes = vec![1; 200_000];
    source.copy_to(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
}

#[test]
fn owned_bytes_come_back_after_they_were_filled() {
    let mut sink = MemSink::from_bytes(vec![0; 8]);
    sink.copy_from(2, &[1, 2, 3]).unwrap();
    sink.fill(6..8, 9).unwrap();
    assert_eq!(sink.into_parts().1.unwrap(), [0, 0, 1, 2, 3, 0, 9, 9]);
}

#[test]
fn a_slice_of_owned_bytes_outlives_them() {
    let source = MemSource::from_bytes(vec![1, 2, 3, 4]);
    let part = source.slice(1..3, Vec::new()).unwrap();
    drop(source);
    let mut bytes = [0; 2];
    part.copy_to(0, &mut bytes).unwrap();
    assert_eq!(bytes, [2, 3]);
}
