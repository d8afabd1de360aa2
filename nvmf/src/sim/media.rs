//! What the simulated controller stores blocks in: operations take time, overtake each other, fail
//! half-done, and what is not flushed may go with the power.

use std::collections::BTreeMap;

use super::random::Random;
use crate::spec::Status;

/// What an operation does, in blocks.
#[derive(Debug)]
pub(super) enum Work {
    Read { lba: u64, count: u32 },
    Write { lba: u64, data: Vec<u8>, fua: bool },
    Zeroes { lba: u64, count: u32, fua: bool },
    Flush,
}

impl Work {
    pub(super) fn reads(&self) -> bool {
        matches!(self, Self::Read { .. })
    }
}

/// The end of an operation.
#[derive(Debug)]
pub(super) struct Finished {
    /// Who asked for it: a number for each connection.
    pub(super) owner: u32,
    pub(super) token: u32,
    /// What was read.
    pub(super) result: Result<Vec<u8>, Status>,
}

#[derive(Debug)]
struct Operation {
    owner: u32,
    token: u32,
    work: Work,
    /// Blocks that are still to be done.
    left: Vec<u32>,
    read: Vec<u8>,
    due: u64,
    /// It ends so once no more than this many blocks are left.
    fails: Option<(Status, usize)>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Media {
    block_size: usize,
    stable: Vec<u8>,
    /// Of each block, what was written and not flushed, in order.
    cache: Option<BTreeMap<u64, Vec<Vec<u8>>>>,
    operations: Vec<Operation>,
    random: Random,
    /// Most time that a step of an operation takes.
    latency: usize,
}

impl Media {
    pub(super) fn new(
        block_size: usize,
        blocks: usize,
        volatile: bool,
        latency: usize,
        random: Random,
    ) -> Self {
        Self {
            block_size,
            stable: vec![0; block_size * blocks],
            cache: volatile.then(BTreeMap::new),
            operations: Vec::new(),
            random,
            latency,
        }
    }

    /// Begins an operation on blocks that exist; with `fails` it ends so, after part of it was done.
    pub(super) fn submit(
        &mut self,
        owner: u32,
        token: u32,
        work: Work,
        fails: Option<Status>,
        now: u64,
    ) {
        let count = match &work {
            Work::Read { count, .. } | Work::Zeroes { count, .. } => *count as usize,
            Work::Write { data, .. } => data.len() / self.block_size,
            Work::Flush => 1,
        };
        let read = match work {
            Work::Read { .. } => vec![0; count * self.block_size],
            _ => Vec::new(),
        };
        let fails = fails.map(|status| (status, self.random.between(0, count)));
        self.operations.push(Operation {
            owner,
            token,
            work,
            left: (0..count as u32).collect(),
            read,
            due: now + self.random.between(0, self.latency) as u64,
            fails,
        });
    }

    /// When something can next be done.
    pub(super) fn next_due(&self) -> Option<u64> {
        self.operations.iter().map(|it| it.due).min()
    }

    /// Nothing that others than this owner asked for is still to be done.
    pub(super) fn is_idle_but_for(&self, owner: u32) -> bool {
        self.operations.iter().all(|it| it.owner == owner)
    }

    /// Does a step of one of the operations that are due.
    pub(super) fn step(&mut self, now: u64) -> Option<Finished> {
        let due: Vec<usize> = (0..self.operations.len())
            .filter(|&at| self.operations[at].due <= now)
            .collect();
        let at = self.random.pick(&due)?;
        let mut operation = self.operations.swap_remove(at);
        let floor = operation.fails.map_or(0, |(_, left)| left);
        let able = operation.left.len().saturating_sub(floor);
        // Mostly all at once, so that long operations do not take for ever.
        let steps = if self.random.percent(70) {
            able
        } else {
            self.random.between(0, able)
        };
        for _ in 0..steps {
            let next = self.random.below(operation.left.len());
            let index = operation.left.swap_remove(next);
            self.perform(&mut operation, index);
        }
        if operation.left.len() > floor {
            operation.due = now + self.random.between(1, self.latency) as u64;
            self.operations.push(operation);
            return None;
        }
        let result = match operation.fails {
            Some((status, _)) => Err(status),
            None => Ok(operation.read),
        };
        Some(Finished {
            owner: operation.owner,
            token: operation.token,
            result,
        })
    }

    fn perform(&mut self, operation: &mut Operation, index: u32) {
        let at = index as usize * self.block_size;
        let end = at + self.block_size;
        match &operation.work {
            Work::Read { lba, .. } => {
                let block = self.block(lba + u64::from(index));
                operation.read[at..end].copy_from_slice(block);
            }
            Work::Write { lba, data, fua } => {
                self.put(lba + u64::from(index), data[at..end].to_vec(), *fua);
            }
            Work::Zeroes { lba, fua, .. } => {
                self.put(lba + u64::from(index), vec![0; self.block_size], *fua);
            }
            Work::Flush => {
                for (lba, mut versions) in self
                    .cache
                    .as_mut()
                    .map(std::mem::take)
                    .into_iter()
                    .flatten()
                {
                    if let Some(newest) = versions.pop() {
                        self.store(lba, &newest);
                    }
                }
            }
        }
    }

    fn block(&self, lba: u64) -> &[u8] {
        let cached = self
            .cache
            .as_ref()
            .and_then(|cache| cache.get(&lba)?.last());
        cached.map_or_else(
            || &self.stable[lba as usize * self.block_size..][..self.block_size],
            Vec::as_slice,
        )
    }

    fn store(&mut self, lba: u64, block: &[u8]) {
        self.stable[lba as usize * self.block_size..][..self.block_size].copy_from_slice(block);
    }

    fn put(&mut self, lba: u64, block: Vec<u8>, fua: bool) {
        match &mut self.cache {
            Some(cache) if !fua => cache.entry(lba).or_default().push(block),
            Some(cache) => {
                cache.remove(&lba);
                self.store(lba, &block);
            }
            None => self.store(lba, &block),
        }
    }

    /// Power is gone and back: of each block, any of what was not flushed may have reached the
    /// medium, or none of it; what was in work is over.
    pub(super) fn power_cut(&mut self) {
        self.operations.clear();
        for (lba, versions) in self
            .cache
            .as_mut()
            .map(std::mem::take)
            .into_iter()
            .flatten()
        {
            let survivor = self.random.below(versions.len() + 1);
            if let Some(block) = versions.get(survivor) {
                self.store(lba, block);
            }
        }
    }
}
