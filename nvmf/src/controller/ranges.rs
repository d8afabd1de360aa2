//! The ranges of one Dataset Management command, handed out one after the other.

use memdesc::MemSource;
use zerocopy::{FromZeros, IntoBytes};

use super::io::RANGE_LEN;
use crate::backend::Geometry;
use crate::spec::sqe::DsmRange;

/// Ranges as they were fetched, and how many were handed out.
#[derive(Debug)]
pub(super) struct Ranges {
    source: MemSource,
    count: u16,
    next: u16,
}

impl Ranges {
    /// Of `count` ranges that `source` begins with.
    pub(super) fn new(source: MemSource, count: u16) -> Self {
        Self {
            source,
            count,
            next: 0,
        }
    }

    /// The byte range that range `index` names, when it lies inside.
    fn get(&self, index: u16, geometry: &Geometry) -> Option<(u64, u64)> {
        let mut range = DsmRange::new_zeroed();
        let at = usize::from(index) * RANGE_LEN;
        self.source.copy_to(at, range.as_mut_bytes()).ok()?;
        geometry.blocks(range.slba.get(), u64::from(range.nlb.get()))
    }

    /// True when every range lies inside.
    pub(super) fn all_inside(&self, geometry: &Geometry) -> bool {
        (0..self.count).all(|index| self.get(index, geometry).is_some())
    }

    /// The next byte range that is not empty: offset and length.
    pub(super) fn next(&mut self, geometry: &Geometry) -> Option<(u64, u64)> {
        while self.next < self.count {
            let range = self.get(self.next, geometry);
            self.next += 1;
            if let Some((offset, len)) = range
                && len > 0
            {
                return Some((offset, len));
            }
        }
        None
    }

    /// The memory, for use again.
    pub(super) fn into_source(self) -> MemSource {
        self.source
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry {
        block_size: 512,
        block_count: 100,
        read_only: false,
        deallocate: true,
        deallocated_reads_zeroes: true,
        volatile_cache: false,
    };

    fn ranges(list: &[(u64, u32)], count: u16) -> Ranges {
        let bytes = list.iter().flat_map(|&(slba, nlb)| {
            let range = DsmRange {
                cattr: 0.into(),
                nlb: nlb.into(),
                slba: slba.into(),
            };
            range.as_bytes().to_vec()
        });
        Ranges::new(MemSource::from_bytes(bytes.collect()), count)
    }

    #[test]
    fn ranges_come_in_order_without_the_empty_ones_and_the_surplus() {
        let mut ranges = ranges(&[(0, 1), (50, 0), (98, 2), (10, 1)], 3);
        assert!(ranges.all_inside(&GEOMETRY));
        assert_eq!(ranges.next(&GEOMETRY), Some((0, 512)));
        assert_eq!(ranges.next(&GEOMETRY), Some((98 * 512, 1024)));
        assert_eq!(ranges.next(&GEOMETRY), None);
    }

    #[test]
    fn one_range_outside_is_noticed_wherever_it_stands() {
        for outside in [
            (100, 1),
            (99, 2),
            (u64::MAX, 1),
            (u64::MAX, u32::MAX),
            (101, 0),
        ] {
            assert!(
                !ranges(&[(0, 1), outside], 2).all_inside(&GEOMETRY),
                "{outside:?}"
            );
            assert!(ranges(&[(0, 1), outside], 1).all_inside(&GEOMETRY));
        }
    }

    #[test]
    fn memory_that_is_too_short_for_its_count_holds_no_range() {
        assert!(!ranges(&[(0, 1)], 2).all_inside(&GEOMETRY));
    }
}
