//! A lane's staging memory: buffers by size, handed out within a budget and used again.

use memdesc::{MemSink, MemSource, Segment};

use crate::transport::Transfer;

/// Smallest buffer, as a power of two.
const MIN_SHIFT: u32 = 12;
/// Sizes: 4 KiB to 128 MiB.
const CLASSES: usize = 16;
/// Bytes kept while nothing is handed out: an idle lane costs little.
const IDLE_KEPT: usize = 1 << 20;
/// Segment lists that are kept for use again.
const MAX_LISTS: usize = 256;

/// Buffers of power-of-two sizes. What is handed out and what is kept never exceed the budget
/// together.
#[derive(Debug)]
pub(super) struct Buffers {
    free: [Vec<Vec<u8>>; CLASSES],
    lists: Vec<Vec<Segment>>,
    budget: usize,
    /// Bytes handed out.
    out: usize,
    /// Bytes kept.
    kept: usize,
    /// Sizes that were handed out since everything was last back.
    recent: [bool; CLASSES],
}

fn class(len: usize) -> usize {
    let shift = len.max(1).next_power_of_two().ilog2();
    (shift.max(MIN_SHIFT) - MIN_SHIFT) as usize
}

fn size(class: usize) -> usize {
    1 << (class + MIN_SHIFT as usize)
}

impl Buffers {
    pub(super) fn new(budget: usize) -> Self {
        Self {
            free: Default::default(),
            lists: Vec::new(),
            budget,
            out: 0,
            kept: 0,
            recent: [false; CLASSES],
        }
    }

    /// A segment list, empty.
    pub(super) fn list(&mut self) -> Vec<Segment> {
        self.lists.pop().unwrap_or_default()
    }

    /// A sink of `len` bytes; `None` when the budget is used up, until something comes back.
    pub(super) fn sink(&mut self, len: usize) -> Option<MemSink> {
        let class = class(len);
        let bytes = self.bytes(class)?;
        self.out += size(class);
        let bytes = sized(bytes, len);
        let list = self.list();
        Some(MemSink::from_bytes_with(bytes, list))
    }

    fn bytes(&mut self, class: usize) -> Option<Vec<u8>> {
        *self.recent.get_mut(class)? = true;
        if let Some(bytes) = self.free[class].pop() {
            self.kept -= size(class);
            return Some(bytes);
        }
        if self.out + size(class) > self.budget {
            return None;
        }
        // Buffers of other sizes make room.
        self.trim(self.budget - self.out - size(class));
        Some(Vec::with_capacity(size(class)))
    }

    /// Lets kept buffers go until no more than `most` bytes are kept: first those of sizes that are
    /// not in use any more, so that a load allocates nothing once it is under way, then the largest.
    fn trim(&mut self, most: usize) {
        while self.kept > most {
            let kept = || (0..CLASSES).rev().filter(|&it| !self.free[it].is_empty());
            let unused = kept().find(|&it| !self.recent[it]);
            let Some(class) = unused.or_else(|| kept().next()) else {
                return;
            };
            self.free[class].pop();
            self.kept -= size(class);
        }
    }

    /// Takes memory back: what was handed out, or a list over foreign memory.
    pub(super) fn give_back(&mut self, transfer: Transfer) {
        let (list, bytes) = match transfer {
            Transfer::None => return,
            Transfer::In(sink) => sink.into_parts(),
            Transfer::Out(source) => source.into_parts(),
        };
        self.give_back_list(list);
        if let Some(bytes) = bytes {
            let class = class(bytes.len());
            self.out -= size(class).min(self.out);
            self.kept += size(class);
            self.free[class.min(CLASSES - 1)].push(bytes);
        }
        if self.out == 0 {
            self.trim(IDLE_KEPT);
            self.recent = [false; CLASSES];
        }
    }

    /// Takes back an empty segment list that nothing was made of.
    pub(super) fn give_back_list(&mut self, list: Vec<Segment>) {
        if self.lists.len() < MAX_LISTS {
            self.lists.push(list);
        }
    }

    /// Takes a source back.
    pub(super) fn give_back_source(&mut self, source: MemSource) {
        self.give_back(Transfer::Out(source));
    }
}

/// The buffer with exactly this length. Only growth is cleared, so buffers that are used with one
/// length again and again are not.
fn sized(mut bytes: Vec<u8>, len: usize) -> Vec<u8> {
    bytes.resize(len, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_bounds_what_is_out_and_a_return_makes_room() {
        let mut buffers = Buffers::new(16 << 10);
        let held: Vec<_> = (0..4).map(|_| buffers.sink(4096).unwrap()).collect();
        assert!(buffers.sink(1).is_none());
        for sink in held {
            buffers.give_back(Transfer::In(sink));
        }
        assert!(buffers.sink(16 << 10).is_some(), "kept ones make room");
        assert!(buffers.sink(1).is_none());
    }

    #[test]
    fn an_idle_lane_keeps_little() {
        let mut buffers = Buffers::new(16 << 20);
        let held: Vec<_> = (0..16).map(|_| buffers.sink(1 << 20).unwrap()).collect();
        for sink in held {
            buffers.give_back(Transfer::In(sink));
        }
        assert_eq!((buffers.out, buffers.kept), (0, IDLE_KEPT));
    }

    #[test]
    fn what_the_present_load_uses_is_kept_rather_than_what_an_earlier_one_did() {
        let mut buffers = Buffers::new(16 << 20);
        for len in [4096, 131_072] {
            for _ in 0..3 {
                let held: Vec<_> = (0..8).map(|_| buffers.sink(len).unwrap()).collect();
                for sink in held {
                    buffers.give_back(Transfer::In(sink));
                }
            }
        }
        assert_eq!((buffers.kept, buffers.free[5].len()), (IDLE_KEPT, 8));
    }

    #[test]
    fn a_buffer_is_used_again_with_whatever_length_its_size_holds() {
        let mut buffers = Buffers::new(1 << 20);
        for len in [5000, 8192, 4097, 6000] {
            let sink = buffers.sink(len).unwrap();
            assert_eq!(sink.len(), len);
            buffers.give_back(Transfer::In(sink));
            assert_eq!((buffers.out, buffers.kept), (0, 8192));
        }
    }
}
