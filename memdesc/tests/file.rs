//! Every operation on a range of a file gives what the same operation on a byte array gives.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]
#![expect(unsafe_code, reason = "segments over test memory")]

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use memdesc::{FileError, FileSink, FileSource, MemSink, MemSource, Segment};
use proptest::prelude::*;

/// Where the ranges of these tests begin.
const START: u64 = 1000;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 13 + i / 256) as u8).collect()
}

/// A file that goes away by itself, with these bytes at [`START`] and nothing behind them.
fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    // Also where there are none.
    file.set_len(START).unwrap();
    file.write_all_at(bytes, START).unwrap();
    file
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes.split_off(START as usize)
}

/// `store` as a scatter list.
fn segments(store: &mut [u8], piece: usize) -> Vec<Segment> {
    let of = |piece: &mut [u8]| {
        let len = piece.len();
        // SAFETY: the store outlives every memdesc of the test and is not touched meanwhile.
        unsafe { Segment::new(NonNull::from(piece).cast(), len) }
    };
    store.chunks_mut(piece).map(of).collect()
}

proptest! {
    #[test]
    fn a_source_reads_what_the_file_holds(
        len in 0usize..10_000,
        start in 0usize..12_000,
        wanted in 0usize..9_000,
        piece in 1usize..900,
    ) {
        let bytes = pattern(len);
        let file = file(&bytes);
        let source = FileSource::new(file.as_fd(), START, len).unwrap();
        let range: Range<usize> = start..start + wanted;
        let expected = bytes.get(range.clone());
        let mut read = vec![0; wanted];
        prop_assert_eq!(source.copy_to(start, &mut read).is_ok(), expected.is_some());
        let mut store = vec![0; wanted + 5];
        let mut sink = MemSink::from_segments(segments(&mut store, piece));
        prop_assert_eq!(source.copy(start, &mut sink, 5, wanted).is_ok(), expected.is_some());
        let too_much = source.copy(0, &mut sink, 6, wanted);
        prop_assert!(matches!(too_much, Err(FileError::OutOfBounds(_))));
        drop(sink);
        let digest = source.crc32c(range.clone(), 3).ok();
        prop_assert_eq!(digest, expected.map(|part| crc32c::crc32c_append(3, part)));
        let slice = source.slice(range).ok();
        prop_assert_eq!(slice.map(|slice| slice.len()), expected.map(<[u8]>::len));
        if let (Some(slice), Some(expected)) = (slice, expected) {
            prop_assert_eq!(&read[..], expected);
            prop_assert_eq!(&store[5..], expected);
            let mut again = vec![0; wanted];
            slice.copy_to(0, &mut again).unwrap();
            prop_assert_eq!(&again[..], expected);
        }
    }

    #[test]
    fn a_sink_changes_the_range_and_nothing_else(
        len in 0usize..10_000,
        start in 0usize..12_000,
        given in 0usize..9_000,
        piece in 1usize..900,
        byte in any::<u8>(),
    ) {
        let mut model = pattern(len);
        let file = file(&model);
        let mut whole = FileSink::new(file.as_fd(), START, len).unwrap();
        let range: Range<usize> = start..start + given;
        let from: Vec<u8> = pattern(given).iter().map(|byte| !byte).collect();
        for way in 0..3 {
            let done = match way {
                0 => whole.copy_from(start, &from),
                1 => {
                    let mut store = from.clone();
                    let source = MemSource::from_segments(segments(&mut store, piece));
                    whole.copy(start, &source, 0, given)
                }
                _ => whole.fill(range.clone(), byte),
            };
            let part = model.get_mut(range.clone());
            prop_assert_eq!(done.is_ok(), part.is_some());
            if let Some(part) = part {
                match way {
                    0 | 1 => part.copy_from_slice(&from),
                    _ => part.fill(byte),
                }
            }
            prop_assert!(contents(&file) == model, "way {}", way);
        }
        prop_assert_eq!(whole.slice(range.clone()).is_ok(), model.get(range).is_some());
    }
}

#[test]
fn a_file_that_ends_early_says_after_how_many_bytes() {
    let file = file(&pattern(5000));
    let source = FileSource::new(file.as_fd(), START, 9000).unwrap();
    let ended = |done: Result<(), FileError>| match done {
        Err(FileError::EndOfFile { copied }) => copied,
        other => panic!("{other:?}"),
    };
    assert_eq!(ended(source.copy_to(100, &mut vec![0; 8000])), 4900);
    let mut sink = MemSink::from_bytes(vec![0; 8000]);
    assert_eq!(ended(source.copy(100, &mut sink, 0, 8000)), 4900);
    assert_eq!(ended(source.crc32c(100..8100, 0).map(drop)), 4900);
}

#[test]
fn what_the_system_refuses_is_reported_with_its_reason() {
    let (mut pipe, _writer) = std::io::pipe().unwrap();
    let source = FileSource::new(pipe.as_fd(), 0, 10).unwrap();
    let Err(FileError::Io { copied: 0, error }) = source.copy_to(0, &mut [0; 10]) else {
        panic!("a pipe has no offsets");
    };
    assert_eq!(error.kind(), std::io::ErrorKind::NotSeekable);
    let read_only = File::open("/dev/null").unwrap();
    let mut sink = FileSink::new(read_only.as_fd(), 0, 10).unwrap();
    assert!(matches!(
        sink.copy_from(0, &[1; 10]),
        Err(FileError::Io { copied: 0, .. })
    ));
    drop(_writer);
    assert_eq!(pipe.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn a_sink_at_the_end_of_a_file_makes_it_longer() {
    let file = file(&pattern(10));
    let mut sink = FileSink::new(file.as_fd(), START + 10, 10).unwrap();
    sink.fill(5..10, 7).unwrap();
    let expected = [pattern(10), vec![0; 5], vec![7; 5]].concat();
    assert_eq!(contents(&file), expected);
}

#[test]
fn more_vectors_than_one_call_takes_are_several_calls() {
    let bytes = pattern(5000);
    let file = file(&bytes);
    let mut store = vec![0; 5000];
    let mut sink = MemSink::from_segments(segments(&mut store, 1));
    let source = FileSource::new(file.as_fd(), START, 5000).unwrap();
    source.copy(0, &mut sink, 0, 5000).unwrap();
    drop(sink);
    assert_eq!(store, bytes);
}

#[test]
fn a_range_that_no_file_can_have_is_refused() {
    let file = file(&[]);
    let fd = file.as_fd();
    assert!(FileSource::new(fd, u64::MAX, 0).is_err());
    assert!(FileSource::new(fd, i64::MAX as u64, 1).is_err());
    assert!(FileSource::new(fd, i64::MAX as u64, 0).is_ok());
    let source = FileSource::new(fd, 0, 10).unwrap();
    let overflow = source.copy_to(usize::MAX, &mut [0; 1]);
    assert!(matches!(overflow, Err(FileError::OutOfBounds(_))));
    let mut sink = MemSink::from_bytes(vec![0; 10]);
    let overflow = source.copy(1, &mut sink, 1, usize::MAX);
    assert!(matches!(overflow, Err(FileError::OutOfBounds(_))));
}
