//! Private copies of outgoing payload with their digests, in pooled memory that is filled and given
//! back in the order of sending.
//!
//! A guest may change a page while it is sent, and a digest of something else than what is sent would
//! fail the command. So with data digests the payload is copied once, and the digest taken of the
//! copy.

use std::cell::RefCell;
use std::collections::VecDeque;

use memdesc::{MemSource, OutOfBounds};

use crate::tcp::{DIGEST_LEN, MAX_TX_DATA};

/// One payload of the largest size, or many small ones.
const CHUNK_LEN: usize = MAX_TX_DATA as usize + DIGEST_LEN;
/// Chunks that a thread keeps: as many as one stream fills for one call that sends.
const POOLED: usize = 34;

thread_local! {
    /// Chunks belong to the thread: a stream holds some only while copies wait to be sent.
    static POOL: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

struct Chunk {
    bytes: Box<[u8]>,
    filled: usize,
    /// Copies in it that were not released.
    live: usize,
}

/// A payload and its digest.
#[derive(Debug, Clone, Copy)]
pub(super) struct PrivateCopy {
    /// Chunks are numbered in the order of their use.
    chunk: u64,
    start: usize,
    len: usize,
}

/// The copies of one stream that wait to be sent.
#[derive(Default)]
pub(super) struct Copies {
    chunks: VecDeque<Chunk>,
    /// Number of the first chunk.
    first: u64,
}

impl Copies {
    /// Copies `len` bytes of `source` at `offset`, and puts their digest behind them.
    pub(super) fn copy(
        &mut self,
        source: &MemSource,
        offset: usize,
        len: usize,
    ) -> Result<PrivateCopy, OutOfBounds> {
        let total = len + DIGEST_LEN;
        let fits = |chunk: &Chunk| chunk.bytes.len() - chunk.filled >= total;
        if !self.chunks.back().is_some_and(fits) {
            self.chunks.push_back(Chunk {
                bytes: take(total),
                filled: 0,
                live: 0,
            });
        }
        let number = self.first + (self.chunks.len() as u64 - 1);
        let available = source.len();
        let chunk = self.chunks.back_mut().ok_or(OutOfBounds {
            offset,
            len,
            available,
        })?;
        let start = chunk.filled;
        let (data, rest) = chunk.bytes[start..].split_at_mut(len);
        let digest = source.copy_to_crc32c(offset, data, 0)?;
        rest[..DIGEST_LEN].copy_from_slice(&digest.to_le_bytes());
        chunk.filled += total;
        chunk.live += 1;
        Ok(PrivateCopy {
            chunk: number,
            start,
            len: total,
        })
    }

    /// The payload and its digest.
    pub(super) fn bytes(&self, copy: PrivateCopy) -> &[u8] {
        let chunk = self.chunks.get((copy.chunk - self.first) as usize);
        chunk.map_or(&[], |chunk| &chunk.bytes[copy.start..copy.start + copy.len])
    }

    /// The kernel has all of it.
    pub(super) fn release(&mut self, copy: PrivateCopy) {
        if let Some(chunk) = self.chunks.get_mut((copy.chunk - self.first) as usize) {
            chunk.live -= 1;
        }
        while self.chunks.front().is_some_and(|chunk| chunk.live == 0) {
            self.drop_front();
        }
    }

    /// Nothing will be sent any more.
    pub(super) fn clear(&mut self) {
        while !self.chunks.is_empty() {
            self.drop_front();
        }
    }

    fn drop_front(&mut self) {
        if let Some(chunk) = self.chunks.pop_front() {
            self.first += 1;
            give_back(chunk.bytes);
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.clear();
    }
}

fn take(least: usize) -> Box<[u8]> {
    let pooled = POOL.with_borrow_mut(Vec::pop);
    pooled
        .filter(|chunk| chunk.len() >= least)
        .unwrap_or_else(|| vec![0; least.max(CHUNK_LEN)].into_boxed_slice())
}

fn give_back(chunk: Box<[u8]>) {
    // The thread may be ending, its pool gone: then the chunk is simply freed.
    let _ = POOL.try_with(|pool| {
        let mut pool = pool.borrow_mut();
        if pool.len() < POOLED {
            pool.push(chunk);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tcp::crc32c;

    fn pooled() -> usize {
        POOL.with_borrow(Vec::len)
    }

    #[test]
    fn each_copy_is_followed_by_its_digest_and_chunks_go_back_when_all_of_theirs_are_sent() {
        let bytes: Vec<u8> = (0..100_000).map(|i| (i * 7) as u8).collect();
        let source = MemSource::from_bytes(bytes.clone());
        let mut copies = Copies::default();
        for round in 0..3 {
            let taken: Vec<_> = [(0, 100_000), (5, 20_000), (99_999, 1), (0, 100_000)]
                .into_iter()
                .map(|(at, len)| (at, len, copies.copy(&source, at, len).unwrap()))
                .collect();
            assert_eq!(copies.chunks.len(), 2);
            for &(at, len, copy) in &taken {
                let (data, digest) = copies.bytes(copy).split_at(len);
                assert!(data == &bytes[at..at + len]);
                assert_eq!(digest, crc32c(0, data).to_le_bytes());
            }
            for (_, _, copy) in taken {
                copies.release(copy);
            }
            assert_eq!((copies.chunks.len(), pooled()), (0, 2), "round {round}");
        }
    }

    #[test]
    fn a_range_past_the_end_is_refused_and_leaves_no_trace() {
        let source = MemSource::from_bytes(vec![1; 10]);
        let mut copies = Copies::default();
        assert!(copies.copy(&source, 5, 6).is_err());
        let copy = copies.copy(&source, 5, 5).unwrap();
        assert_eq!(copies.bytes(copy)[..5], [1; 5]);
        copies.release(copy);
        assert!(copies.chunks.is_empty());
    }
}
