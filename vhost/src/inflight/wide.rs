//! Parts for rings that are larger than the front-end said when it asked for the region.
//!
//! QEMU asks with its option `queue-size`. Releases of 2026 before 11.1 tell the driver of 1024 entries
//! whatever that option says, and the driver takes what it is told. The specification's parts would be too
//! small, and how far apart they are is given by what the front-end says. So a region that is made here has
//! others, behind all that other back-ends look at.

use std::sync::Arc;

use super::RegionShape;
use super::mapping::Mapping;
use super::ring::{Part, part_len};

/// The most entries of a ring that may come unannounced: QEMU knows no larger rings.
pub(super) const ENTRIES: u16 = 1024;

/// Where the wide parts of a region are. Those of all its rings follow each other.
#[derive(Debug)]
pub(super) struct WideParts {
    memory: Arc<Mapping>,
    at: usize,
    rings: u16,
}

impl WideParts {
    /// Bytes that they take in a region for `rings` rings of `entries`: none where its own parts are as large.
    pub(super) fn len(rings: u16, entries: u16) -> usize {
        match entries < ENTRIES {
            true => usize::from(rings) * part_len(ENTRIES),
            false => 0,
        }
    }

    /// Those of `memory` from `at` on, if a region of this shape has any. All must lie in `memory`.
    pub(super) fn at(memory: &Arc<Mapping>, at: usize, shape: RegionShape) -> Option<Self> {
        (Self::len(shape.rings, shape.entries) > 0).then(|| Self {
            memory: Arc::clone(memory),
            at,
            rings: shape.rings,
        })
    }

    /// The one of ring `index`.
    pub(super) fn part(&self, index: usize) -> Option<Part> {
        let at = self.at + part_len(ENTRIES) * index;
        let memory = || Arc::clone(&self.memory);
        (index < usize::from(self.rings)).then(|| Part::new(memory(), at, ENTRIES))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{bytes, region};
    use super::super::{Part, Region, RegionShape};

    /// Where the wide parts of a region for two rings of 64 are: behind its own parts and what is private.
    const AT: u64 = 2 * 1088 + 65600;

    /// A ring of `size` leaves `head` in flight.
    fn leave(part: &Part, size: u16, head: u16) {
        part.recover(size, 0, 0).expect("fresh");
        part.take(head, 1);
    }

    #[test]
    fn a_ring_that_is_larger_than_was_said_has_a_part_behind_everything_else() {
        let (region, file, shape) = region(2, 64);
        assert_eq!(shape.len, AT + 2 * 16448);
        leave(&region.part(1, 1024).expect("part"), 1024, 1023);
        let at = AT + 16448;
        assert_eq!(
            bytes(&file, at + 8, 4),
            [1, 0, 0, 4],
            "version 1, 1024 entries"
        );
        assert_eq!(bytes(&file, at + 16 + 1023 * 16, 1), [1]);
        assert_eq!(bytes(&file, 0, 2 * 1088), [0; 2 * 1088], "the other parts");

        let again = Region::open(shape, file).expect("a good region");
        assert!(!again.tail().fresh());
        let part = again.part(1, 65).expect("part");
        assert!(part.recover(65, 0, 0).is_err(), "1023 is no head of it");
        let part = again.part(1, 1024).expect("part");
        let found = part.recover(1024, 0, 1).expect("one in flight");
        assert_eq!(found.in_flight[0].head, 1023);
    }

    #[test]
    fn a_ring_that_changes_its_size_across_what_was_said_begins_anew() {
        let (region, ..) = region(2, 64);
        for (before, after) in [(64, 65), (65, 64)] {
            leave(&region.part(0, before).expect("part"), before, 3);
            let part = region.part(0, after).expect("part");
            let found = part.recover(after, 0, 0).expect("fresh");
            assert!(!found.initialised, "{before} to {after}");
            let part = region.part(0, before).expect("part");
            let found = part.recover(before, 0, 0).expect("fresh");
            assert!(!found.initialised, "{before} to {after} and back");
            region.forget();
        }
    }

    #[test]
    fn a_region_of_a_back_end_that_has_no_wide_parts_is_one_for_rings_of_what_was_said() {
        let (_, file, shape) = region(2, 64);
        let told = RegionShape {
            len: shape.len - 64,
            ..shape
        };
        let region = Region::open(told, file).expect("a good region");
        let part = region.part(0, 65).expect("part");
        let refused = part.recover(65, 0, 0).expect_err("too small");
        assert!(refused.to_string().contains("64 of 65"), "{refused}");
        assert!(part.recover(64, 0, 0).is_ok());
    }

    #[test]
    fn wide_parts_are_checked_as_others_are() {
        let (_, file, shape) = region(2, 64);
        rustix::io::pwrite(&file, &[7], AT + 16448 + 8).expect("write");
        let refused = Region::open(shape, file).expect_err("version 7");
        let refused = refused.to_string();
        assert!(
            refused.contains("ring 1") && refused.contains("version 7"),
            "{refused}"
        );
    }

    #[test]
    fn wide_parts_are_forgotten_with_the_others() {
        let (region, file, shape) = region(2, 64);
        leave(&region.part(1, 100).expect("part"), 100, 3);
        region.forget();
        let again = Region::open(shape, file).expect("a good region");
        assert!(again.tail().fresh());
    }
}
