//! The blocks of a volatile write cache: what was written and is not on the medium.

use std::collections::BTreeMap;

use memdesc::{MemSink, MemSource};

use super::super::fault::mix;

/// Most blocks that are written to the medium in one piece.
pub(super) const RUN: usize = 256;

struct Entry {
    /// The number of the write that it is of.
    written: u64,
    /// `None` for zeroes.
    data: Option<Box<[u8]>>,
}

/// Neighbouring blocks on their way to the medium.
pub(super) struct Run {
    pub(super) first: u64,
    /// Which write each block is of.
    written: Vec<u64>,
    pub(super) bytes: Vec<u8>,
}

impl Run {
    pub(super) fn blocks(&self) -> u64 {
        self.written.len() as u64
    }
}

/// See the module. Ranges are blocks: the first, and how many.
pub(super) struct Cache {
    block_size: usize,
    /// Most blocks that it holds.
    capacity: usize,
    entries: BTreeMap<u64, Entry>,
    /// Writes so far.
    writes: u64,
    /// Counts up when blocks leave: what was read from the medium before may lack them.
    generation: u64,
    /// Somebody moves blocks to the medium.
    pub(super) busy: bool,
    seed: u64,
    evictions: u64,
}

impl Cache {
    pub(super) fn new(block_size: u32, capacity: usize, seed: u64) -> Self {
        Self {
            block_size: block_size as usize,
            capacity,
            entries: BTreeMap::new(),
            writes: 0,
            generation: 0,
            busy: false,
            seed,
            evictions: 0,
        }
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Writes so far.
    pub(super) fn writes(&self) -> u64 {
        self.writes
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Keeps a write. False when there is no room for it.
    pub(super) fn store(&mut self, first: u64, source: &MemSource) -> bool {
        let count = (source.len() / self.block_size) as u64;
        if !self.has_room(first, count) {
            return false;
        }
        let size = self.block_size;
        self.put(first, count, |index| {
            let mut data = vec![0; size].into_boxed_slice();
            let copied = source.copy_to(index * size, &mut data);
            debug_assert!(copied.is_ok(), "the block is in the source");
            Some(data)
        });
        true
    }

    /// Keeps zeroes. False when there is no room for them.
    pub(super) fn store_zeroes(&mut self, first: u64, count: u64) -> bool {
        if !self.has_room(first, count) {
            return false;
        }
        self.put(first, count, |_| None);
        true
    }

    /// True when so many blocks are better not kept at all.
    pub(super) fn is_too_much(&self, count: u64) -> bool {
        count > self.capacity as u64 / 2
    }

    fn has_room(&self, first: u64, count: u64) -> bool {
        let there = self.entries.range(first..first + count).count() as u64;
        self.entries.len() as u64 + count - there <= self.capacity as u64
    }

    fn put(&mut self, first: u64, count: u64, data: impl Fn(usize) -> Option<Box<[u8]>>) {
        self.writes += 1;
        for index in 0..count {
            let entry = Entry {
                written: self.writes,
                data: data(index as usize),
            };
            self.entries.insert(first + index, entry);
        }
    }

    /// Puts what is kept over what the medium has.
    pub(super) fn patch(&self, first: u64, sink: &mut MemSink) {
        let size = self.block_size;
        let count = (sink.len() / size) as u64;
        for (block, entry) in self.entries.range(first..first + count) {
            let at = (block - first) as usize * size;
            let put = match &entry.data {
                Some(data) => sink.copy_from(at, data),
                None => sink.fill(at..at + size, 0),
            };
            debug_assert!(put.is_ok(), "the block is in the sink");
        }
    }

    /// The next run from `from` on, of `most` blocks, each as it is now. A flush takes one after the other
    /// to the last: also a block that was written again since it began, for the version that it covers is
    /// not kept beside the new one.
    pub(super) fn run(&self, from: u64, most: usize) -> Option<Run> {
        let mut run: Option<Run> = None;
        for (&block, entry) in self.entries.range(from..) {
            let run = match &mut run {
                Some(run) if block != run.first + run.blocks() => break,
                Some(run) if run.written.len() == most => break,
                Some(run) => run,
                none => none.insert(Run {
                    first: block,
                    written: Vec::new(),
                    bytes: Vec::new(),
                }),
            };
            run.written.push(entry.written);
            match &entry.data {
                Some(data) => run.bytes.extend_from_slice(data),
                None => run.bytes.resize(run.bytes.len() + self.block_size, 0),
            }
        }
        run
    }

    /// A run from a place that is up to chance, to make room.
    pub(super) fn victim(&mut self) -> Option<Run> {
        let (&first, _) = self.entries.first_key_value()?;
        let (&last, _) = self.entries.last_key_value()?;
        self.evictions += 1;
        let chance = mix(self.seed, self.evictions);
        let from = first + chance % (last - first + 1);
        // Not so much that all of a small cache is always on the medium.
        self.run(from, (self.capacity / 16).clamp(1, RUN))
    }

    /// A run is on the medium now: what was not written again leaves.
    pub(super) fn retire(&mut self, run: &Run) {
        for (block, &written) in (run.first..).zip(&run.written) {
            self.leave(block, written);
        }
        self.generation += 1;
    }

    /// A range was written past the cache, after the write `until`: what is older leaves.
    pub(super) fn supersede(&mut self, first: u64, count: u64, until: u64) {
        let blocks: Vec<u64> = self
            .entries
            .range(first..first.saturating_add(count))
            .map(|(&block, _)| block)
            .collect();
        for block in blocks {
            self.leave(block, until);
        }
        self.generation += 1;
    }

    fn leave(&mut self, block: u64, until: u64) {
        if self.entries.get(&block).is_some_and(|e| e.written <= until) {
            self.entries.remove(&block);
        }
    }

    /// Drops the blocks that `survives` is false for; which they are.
    pub(super) fn lose(&mut self, survives: impl Fn(u64) -> bool) -> Vec<u64> {
        let mut lost = Vec::new();
        self.entries.retain(|&block, _| {
            let survived = survives(block);
            if !survived {
                lost.push(block);
            }
            survived
        });
        self.generation += 1;
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 512;

    fn cache(capacity: usize) -> Cache {
        Cache::new(SIZE as u32, capacity, 1)
    }

    fn blocks(byte: u8, count: usize) -> MemSource {
        MemSource::from_bytes(vec![byte; count * SIZE])
    }

    /// The first byte of each of so many blocks, 0xee where nothing is kept.
    fn shown(cache: &Cache, first: u64, count: usize) -> Vec<u8> {
        let mut sink = MemSink::from_bytes(vec![0xee; count * SIZE]);
        cache.patch(first, &mut sink);
        let bytes = sink.into_parts().1.unwrap();
        bytes.iter().step_by(SIZE).copied().collect()
    }

    #[test]
    fn what_is_kept_covers_what_the_medium_has_block_by_block() {
        let mut cache = cache(100);
        assert!(cache.store(10, &blocks(1, 3)));
        assert!(cache.store_zeroes(11, 1));
        assert_eq!(shown(&cache, 8, 6), [0xee, 0xee, 1, 0, 1, 0xee]);
        assert_eq!(shown(&cache, 12, 1), [1]);
        assert_eq!(shown(&cache, 13, 4), [0xee; 4]);
    }

    #[test]
    fn room_is_counted_in_blocks_that_are_not_there_yet() {
        let mut cache = cache(4);
        assert!(cache.store(0, &blocks(1, 3)));
        assert!(!cache.store(10, &blocks(2, 2)));
        assert_eq!(shown(&cache, 10, 2), [0xee; 2], "nothing of it is kept");
        assert!(cache.store(1, &blocks(2, 3)));
        assert!(!cache.store_zeroes(4, 1));
        assert_eq!(shown(&cache, 0, 5), [1, 2, 2, 2, 0xee]);
    }

    #[test]
    fn a_run_is_of_neighbours_as_they_are_now() {
        let mut cache = cache(1000);
        cache.store(10, &blocks(1, 2));
        cache.store(12, &blocks(2, 1));
        cache.store(20, &blocks(3, 1));
        cache.store(12, &blocks(4, 1));
        let run = cache.run(0, RUN).unwrap();
        assert_eq!((run.first, run.blocks()), (10, 3));
        let bytes: Vec<u8> = run.bytes.iter().step_by(SIZE).copied().collect();
        assert_eq!(bytes, [1, 1, 4]);
        let run = cache.run(13, RUN).unwrap();
        assert_eq!((run.first, run.blocks()), (20, 1));
        assert!(cache.run(21, RUN).is_none());
        assert_eq!(cache.run(11, 1).unwrap().blocks(), 1);
        cache.store(100, &blocks(5, RUN + 1));
        assert_eq!(cache.run(100, RUN).unwrap().blocks(), RUN as u64);
    }

    #[test]
    fn what_was_written_again_stays_when_its_run_is_on_the_medium() {
        let mut cache = cache(100);
        cache.store(0, &blocks(1, 3));
        let run = cache.run(0, RUN).unwrap();
        cache.store(1, &blocks(2, 1));
        let generation = cache.generation();
        cache.retire(&run);
        assert_ne!(cache.generation(), generation);
        assert_eq!(shown(&cache, 0, 3), [0xee, 2, 0xee]);
        let until = cache.writes();
        cache.store(2, &blocks(3, 1));
        cache.supersede(0, 3, until);
        assert_eq!(shown(&cache, 0, 3), [0xee, 0xee, 3]);
    }

    #[test]
    fn victims_are_up_to_chance_and_to_the_seed() {
        let firsts = |seed| {
            let mut cache = Cache::new(SIZE as u32, 1000, seed);
            for block in 0..100 {
                cache.store(block * 2, &blocks(1, 1));
            }
            let mut victim = || cache.victim().unwrap().first;
            (0..20).map(|_| victim()).collect::<Vec<_>>()
        };
        assert_eq!(firsts(1), firsts(1));
        assert_ne!(firsts(1), firsts(2));
        assert!(!firsts(1).is_sorted());
        assert!(cache(1).victim().is_none());
    }

    #[test]
    fn a_loss_takes_what_does_not_survive_and_names_it() {
        let mut cache = cache(100);
        cache.store(5, &blocks(1, 4));
        assert_eq!(cache.lose(|block| block % 2 == 0), [5, 7]);
        assert_eq!(shown(&cache, 5, 4), [0xee, 1, 0xee, 1]);
        assert_eq!(cache.len(), 2);
    }
}
