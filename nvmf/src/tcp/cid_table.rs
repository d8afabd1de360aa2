//! Which slot a CID outstanding at a controller has: open addressing, sized once.

/// Marks a place that holds nothing.
const EMPTY: u32 = u32::MAX;

/// At most as many entries as it was made for.
#[derive(Debug)]
pub(crate) struct CidTable {
    /// CID in the lower half, slot in the upper.
    places: Vec<u32>,
    mask: usize,
}

impl CidTable {
    pub(crate) fn new(capacity: usize) -> Self {
        let len = (capacity.max(1) * 2).next_power_of_two();
        Self {
            places: vec![EMPTY; len],
            mask: len - 1,
        }
    }

    fn home(&self, cid: u16) -> usize {
        (usize::from(cid).wrapping_mul(0x9e37_79b1) >> 7) & self.mask
    }

    fn place(&self, cid: u16) -> Result<usize, usize> {
        let mut at = self.home(cid);
        loop {
            match self.places[at] {
                EMPTY => return Err(at),
                entry if entry as u16 == cid => return Ok(at),
                _ => at = (at + 1) & self.mask,
            }
        }
    }

    pub(crate) fn contains(&self, cid: u16) -> bool {
        self.place(cid).is_ok()
    }

    /// Adds a CID that is not there yet.
    pub(crate) fn insert(&mut self, cid: u16, slot: u16) {
        if let Err(at) = self.place(cid) {
            self.places[at] = u32::from(slot) << 16 | u32::from(cid);
        }
    }

    pub(crate) fn remove(&mut self, cid: u16) {
        let Ok(mut hole) = self.place(cid) else {
            return;
        };
        // Close the gap: whatever follows may move back to it unless its home lies behind.
        let mut at = (hole + 1) & self.mask;
        while self.places[at] != EMPTY {
            let home = self.home(self.places[at] as u16);
            let distance = at.wrapping_sub(home) & self.mask;
            if distance >= (at.wrapping_sub(hole) & self.mask) {
                self.places[hole] = self.places[at];
                hole = at;
            }
            at = (at + 1) & self.mask;
        }
        self.places[hole] = EMPTY;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_agrees_with_a_set(steps in prop::collection::vec((any::<bool>(), 0u16..40), 0..400)) {
            let mut table = CidTable::new(16);
            let mut model = HashSet::new();
            for (add, value) in steps {
                // Spread over the whole range, with collisions.
                let cid = value.wrapping_mul(4099);
                if add && model.len() < 16 && model.insert(cid) {
                    table.insert(cid, value);
                } else {
                    model.remove(&cid);
                    table.remove(cid);
                }
                for value in 0u16..40 {
                    let cid = value.wrapping_mul(4099);
                    prop_assert_eq!(table.contains(cid), model.contains(&cid));
                }
            }
        }
    }
}
