//! Any sequence of operations on memory of any kind leaves what it leaves in one byte array.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]
#![expect(
    unsafe_code,
    reason = "segments over test memory, and a kernel's writes"
)]

use std::ops::Range;
use std::ptr::NonNull;

use memdesc::{MemSink, MemSource, Segment};
use proptest::prelude::*;

/// What memory is made of. Scatter lists have segments without bytes among the others.
#[derive(Debug, Clone)]
enum Kind {
    Contiguous(usize),
    Scattered(Vec<usize>),
    Owned(usize),
}

impl Kind {
    fn len(&self) -> usize {
        match self {
            Self::Contiguous(len) | Self::Owned(len) => *len,
            Self::Scattered(lengths) => lengths.iter().sum(),
        }
    }

    /// Segments of `store`, in an order that is not that of the addresses.
    fn segments(&self, store: &mut [u8]) -> Vec<Segment> {
        let lengths = match self {
            Self::Scattered(lengths) => lengths.clone(),
            _ => vec![self.len()],
        };
        let base = NonNull::from(&mut *store).cast::<u8>();
        let mut end = store.len();
        lengths
            .into_iter()
            .map(|len| {
                end -= len;
                // SAFETY: inside the store, which outlives every memdesc of the test and is not
                // touched meanwhile.
                unsafe { Segment::new(base.add(end), len) }
            })
            .collect()
    }
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![
        (0usize..300).prop_map(Kind::Contiguous),
        prop::collection::vec(prop_oneof![Just(0usize), 0usize..70], 0..10)
            .prop_map(Kind::Scattered),
        (0usize..300).prop_map(Kind::Owned),
    ]
}

/// A place that may lie outside what it is asked of, or end before it begins.
type Place = (usize, usize);

#[derive(Debug, Clone)]
enum Op {
    CopyFrom(usize, Vec<u8>),
    Fill(Place, u8),
    Digest(Place),
    /// Written by "the kernel" through at most so many vectors at a time.
    Receive(Place, usize),
    Written(Place),
    /// From another memory, at a place of its own.
    Copy {
        from: Kind,
        at: usize,
        to: usize,
        len: usize,
    },
    /// A slice of a slice is filled.
    Slice(Place, Place, u8),
}

fn places() -> impl Strategy<Value = Place> {
    // Mostly inside, sometimes at the end, outside or the wrong way round.
    prop_oneof![
        4 => (0usize..300, 0usize..100).prop_map(|(start, len)| (start, start + len)),
        1 => (0usize..400, 0usize..400),
        1 => (0usize..300).prop_map(|start| (start, usize::MAX)),
    ]
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0usize..350, prop::collection::vec(any::<u8>(), 0..80))
            .prop_map(|(at, bytes)| Op::CopyFrom(at, bytes)),
        (places(), any::<u8>()).prop_map(|(place, byte)| Op::Fill(place, byte)),
        places().prop_map(Op::Digest),
        (places(), 1usize..5).prop_map(|(place, max)| Op::Receive(place, max)),
        places().prop_map(Op::Written),
        (kinds(), 0usize..300, 0usize..300, 0usize..200).prop_map(|(from, at, to, len)| Op::Copy {
            from,
            at,
            to,
            len
        }),
        (places(), places(), any::<u8>())
            .prop_map(|(outer, inner, byte)| Op::Slice(outer, inner, byte)),
    ]
}

fn range(place: Place) -> Range<usize> {
    place.0..place.1
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 13 + i / 256) as u8).collect()
}

/// The range of a model, where it is one.
fn inside(model: &mut [u8], place: Place) -> Option<&mut [u8]> {
    model.get_mut(range(place))
}

/// Writes through vectors, as `readv` would.
fn receive(sink: &mut MemSink, range: Range<usize>, max: usize, bytes: &[u8]) {
    let mut done = 0;
    while done < bytes.len() {
        let mut vectors = Vec::new();
        let covered = sink
            .iovecs(range.start + done..range.end, max, &mut vectors)
            .unwrap();
        assert!(covered > 0 && vectors.len() <= max);
        for vector in vectors {
            assert!(vector.iov_len > 0);
            // SAFETY: a vector of a sink describes memory that may be written.
            unsafe {
                std::ptr::copy(
                    bytes[done..].as_ptr(),
                    vector.iov_base.cast(),
                    vector.iov_len,
                );
            }
            done += vector.iov_len;
        }
    }
}

fn apply(sink: &mut MemSink, model: &mut [u8], op: &Op) -> Result<(), TestCaseError> {
    match op {
        Op::CopyFrom(at, bytes) => {
            let done = sink.copy_from(*at, bytes);
            let part = inside(model, (*at, at + bytes.len()));
            prop_assert_eq!(done.is_ok(), part.is_some());
            if let Some(part) = part {
                part.copy_from_slice(bytes);
            }
        }
        Op::Fill(place, byte) => {
            let done = sink.fill(range(*place), *byte);
            let part = inside(model, *place);
            prop_assert_eq!(done.is_ok(), part.is_some());
            if let Some(part) = part {
                part.fill(*byte);
            }
        }
        Op::Digest(place) => {
            let digest = sink.crc32c(range(*place), 7).ok();
            let part = inside(model, *place);
            prop_assert_eq!(digest, part.map(|part| crc32c::crc32c_append(7, part)));
        }
        Op::Receive(place, max) => match inside(model, *place) {
            Some(part) => {
                let bytes = pattern(part.len());
                receive(sink, range(*place), *max, &bytes);
                part.copy_from_slice(&bytes);
            }
            None => prop_assert!(sink.iovecs(range(*place), *max, &mut Vec::new()).is_err()),
        },
        Op::Written(place) => {
            let (mut pieces, mut vectors) = (Vec::new(), Vec::new());
            let done = sink.written(range(*place), |at, len| pieces.push((at as usize, len)));
            let covered = sink.iovecs(range(*place), usize::MAX, &mut vectors);
            let same = vectors.iter().map(|v| (v.iov_base as usize, v.iov_len));
            prop_assert!(same.eq(pieces));
            let part = inside(model, *place);
            prop_assert_eq!(done.is_ok(), part.is_some());
            prop_assert_eq!(covered.ok(), part.map(|part| part.len()));
        }
        Op::Copy { from, at, to, len } => {
            let mut store = pattern(from.len());
            let mut memory = MemSink::from_segments(from.segments(&mut store));
            if let Kind::Owned(len) = from {
                memory = MemSink::from_bytes(pattern(*len));
            }
            memory.copy_from(0, &pattern(from.len())).unwrap();
            let source = memory.into_source();
            let done = memdesc::copy(&source, *at, sink, *to, *len);
            let mut bytes = pattern(from.len());
            let wanted = inside(&mut bytes, (*at, at + len));
            let part = inside(model, (*to, to + len));
            prop_assert_eq!(done.is_ok(), wanted.is_some() && part.is_some());
            if let (Some(wanted), Some(part)) = (wanted, part) {
                part.copy_from_slice(wanted);
            }
        }
        Op::Slice(outer, inner, byte) => {
            let slice = sink.slice(range(*outer), Vec::new());
            let part = inside(model, *outer);
            match (slice, part) {
                // Memory that the sink owns has no second writer.
                (Ok(None), Some(_)) => {}
                (Ok(Some(mut slice)), Some(part)) => {
                    prop_assert_eq!(slice.len(), part.len());
                    let done = slice.fill(range(*inner), *byte);
                    let part = part.get_mut(range(*inner));
                    prop_assert_eq!(done.is_ok(), part.is_some());
                    if let Some(part) = part {
                        part.fill(*byte);
                    }
                }
                (slice, part) => prop_assert!(part.is_none() && !matches!(slice, Ok(Some(_)))),
            }
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn any_sequence_on_any_kind_is_that_on_an_array(
        kind in kinds(),
        sequence in prop::collection::vec(ops(), 1..20),
    ) {
        let mut store = vec![0; kind.len()];
        let mut model = store.clone();
        let mut sink = match kind {
            Kind::Owned(len) => MemSink::from_bytes(vec![0; len]),
            _ => MemSink::from_segments(kind.segments(&mut store)),
        };
        for op in &sequence {
            apply(&mut sink, &mut model, op)?;
        }
        let source = sink.into_source();
        let mut all = vec![0; model.len()];
        source.copy_to(0, &mut all).unwrap();
        prop_assert_eq!(&all, &model);
    }

    #[test]
    fn a_source_of_any_kind_has_the_slices_and_digests_of_an_array(
        kind in kinds(),
        outer in places(),
        inner in places(),
    ) {
        let bytes = pattern(kind.len());
        let mut store = vec![0; kind.len()];
        let mut sink = match kind {
            Kind::Owned(len) => MemSink::from_bytes(vec![0; len]),
            _ => MemSink::from_segments(kind.segments(&mut store)),
        };
        sink.copy_from(0, &bytes).unwrap();
        let source = sink.into_source();
        let part = bytes.get(range(outer));
        prop_assert_eq!(source.crc32c(range(outer), 0).ok(), part.map(crc32c::crc32c));
        let slice = source.slice(range(outer), Vec::new());
        prop_assert_eq!(slice.is_ok(), part.is_some());
        if let (Ok(slice), Some(part)) = (slice, part) {
            prop_assert_eq!(slice.len(), part.len());
            let again = slice.slice(range(inner), Vec::new());
            let part = part.get(range(inner));
            prop_assert_eq!(again.is_ok(), part.is_some());
            if let (Ok(again), Some(part)) = (again, part) {
                let mut read = vec![0; part.len()];
                again.copy_to(0, &mut read).unwrap();
                prop_assert_eq!(&read, part);
            }
        }
    }
}

#[test]
fn a_slice_past_the_end_of_owned_bytes_is_refused_and_not_shortened() {
    let source = MemSource::from_bytes(vec![1; 10]);
    assert!(source.slice(0..20, Vec::new()).is_err());
    assert!(source.slice(0..usize::MAX, Vec::new()).is_err());
}

#[test]
#[expect(clippy::reversed_empty_ranges, reason = "that is what is refused")]
fn a_range_that_ends_before_it_begins_is_refused() {
    let mut sink = MemSink::from_bytes(vec![1; 10]);
    assert!(sink.fill(5..4, 0).is_err());
    assert!(sink.crc32c(5..4, 0).is_err());
    assert!(sink.iovecs(5..4, 9, &mut Vec::new()).is_err());
    assert!(sink.into_source().slice(5..4, Vec::new()).is_err());
}

#[test]
fn a_segment_list_comes_back_with_its_storage() {
    let list = Vec::with_capacity(8);
    let (list, _) = MemSource::zeroes(100_000, list).into_parts();
    assert!(list.is_empty() && list.capacity() == 8);
    let (list, bytes) = MemSink::from_bytes_with(vec![1; 3], list).into_parts();
    assert_eq!((list.capacity(), bytes.unwrap()), (8, vec![1; 3]));
}

/// The data path moves these by value for every request.
#[test]
fn descriptions_stay_as_small_as_a_list_a_length_and_what_is_owned() {
    assert_eq!(size_of::<MemSource>(), 7 * size_of::<usize>());
    assert_eq!(size_of::<MemSink>(), size_of::<MemSource>());
    assert_eq!(size_of::<Segment>(), 2 * size_of::<usize>());
}
