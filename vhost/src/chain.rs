//! Descriptor chains: walked once, checked for what the walk does not enforce, and read.

use virtio_queue::desc::split::Descriptor;

use crate::inflight::BadInflight;
use crate::memory::GuestMap;

/// Why a ring is not served any more. Heads are numbers of descriptors in the ring's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BrokenRing {
    /// The driver made more requests available than the ring has entries.
    #[error("more requests are available than the ring has entries")]
    TooManyAvailable,
    /// Part of the ring is not in guest memory.
    #[error("the ring is not in guest memory")]
    RingOutsideMemory,
    /// Ring addresses are not aligned, or the size is not a power of two.
    #[error("the ring's size or alignment is not one that virtio allows")]
    RingLayout,
    /// The available ring names a descriptor that does not exist, or whose table is not readable.
    #[error("chain {head} has no descriptor that can be read")]
    NoDescriptor {
        /// What the available ring named.
        head: u16,
    },
    /// The chain's last readable descriptor says that it goes on.
    #[error(
        "chain {head} does not end: it loops, leaves its table, nests indirect tables or exceeds 4 GiB"
    )]
    Endless {
        /// First descriptor.
        head: u16,
    },
    /// More descriptors than the ring has entries and a request can have segments.
    #[error("chain {head} is longer than the ring")]
    TooLong {
        /// First descriptor.
        head: u16,
    },
    /// A device-readable descriptor follows a device-writable one.
    #[error("chain {head} has a readable descriptor behind a writable one")]
    ReadableAfterWritable {
        /// First descriptor.
        head: u16,
    },
    /// The chain has no byte to put the status in.
    #[error("chain {head} has no room for a status")]
    NoStatus {
        /// First descriptor.
        head: u16,
    },
    /// The driver made a request available again before it was answered.
    #[error("chain {head} was made available again while it was in flight")]
    HeadInFlight {
        /// First descriptor.
        head: u16,
    },
    /// What an earlier life of the ring should have left says something else.
    #[error(transparent)]
    Inflight(#[from] BadInflight),
    /// A descriptor names memory that the guest does not have.
    #[error("chain {head} refers to memory that the guest does not have")]
    OutsideMemory {
        /// First descriptor.
        head: u16,
    },
}

/// Consecutive bytes in guest memory.
#[derive(Debug, Clone, Copy)]
struct Piece {
    addr: u64,
    len: u32,
}

/// The descriptors of one chain, copied out of guest memory. Reused from request to request.
#[derive(Debug)]
pub(crate) struct Chain {
    head: u16,
    pieces: Vec<Piece>,
    /// Index of the first writable piece.
    writable: usize,
    /// Most descriptors.
    limit: usize,
}

/// Which half of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    /// What the device reads.
    Readable,
    /// What the device writes.
    Writable,
}

impl Chain {
    /// Room for chains of up to `limit` descriptors.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            head: 0,
            pieces: Vec::new(),
            writable: 0,
            limit,
        }
    }

    /// First descriptor of the chain read last.
    pub(crate) fn head(&self) -> u16 {
        self.head
    }

    /// Reads all descriptors of the chain at `head`, each once.
    pub(crate) fn read(
        &mut self,
        head: u16,
        chain: impl Iterator<Item = Descriptor>,
    ) -> Result<(), BrokenRing> {
        self.head = head;
        self.pieces.clear();
        let mut writable = None;
        let mut unfinished = None;
        let mut descriptors = 0;
        for descriptor in chain {
            descriptors += 1;
            if descriptors > self.limit {
                return Err(BrokenRing::TooLong { head });
            }
            unfinished = Some(descriptor.has_next());
            match (descriptor.is_write_only(), writable) {
                (true, None) => writable = Some(self.pieces.len()),
                (false, Some(_)) => return Err(BrokenRing::ReadableAfterWritable { head }),
                _ => {}
            }
            if descriptor.len() != 0 {
                self.pieces.push(Piece {
                    addr: descriptor.addr().0,
                    len: descriptor.len(),
                });
            }
        }
        self.writable = writable.unwrap_or(self.pieces.len());
        // The iterator ends the same way for a chain that is over and for one it cannot follow.
        match unfinished {
            Some(false) => Ok(()),
            Some(true) => Err(BrokenRing::Endless { head }),
            None => Err(BrokenRing::NoDescriptor { head }),
        }
    }

    fn half(&self, half: Half) -> &[Piece] {
        match half {
            Half::Readable => &self.pieces[..self.writable],
            Half::Writable => &self.pieces[self.writable..],
        }
    }

    /// Bytes in a half.
    pub(crate) fn len(&self, half: Half) -> u64 {
        let pieces = self.half(half).iter();
        pieces.map(|piece| u64::from(piece.len)).sum()
    }

    /// Guest address of the last writable byte, which is where the status goes.
    pub(crate) fn status_addr(&self, map: &GuestMap) -> Result<u64, BrokenRing> {
        let head = self.head;
        let last = self.half(Half::Writable).last();
        let last = last.ok_or(BrokenRing::NoStatus { head })?;
        let addr = last.addr.checked_add(u64::from(last.len) - 1);
        addr.filter(|addr| map.contains(*addr))
            .ok_or(BrokenRing::OutsideMemory { head })
    }

    /// Calls `each` with the address and length of every piece of `len` bytes at `skip`.
    pub(crate) fn for_range(
        &self,
        half: Half,
        mut skip: u64,
        mut len: u64,
        mut each: impl FnMut(u64, usize) -> Result<(), BrokenRing>,
    ) -> Result<(), BrokenRing> {
        let outside = BrokenRing::OutsideMemory { head: self.head };
        for piece in self.half(half) {
            let piece_len = u64::from(piece.len);
            if skip >= piece_len {
                skip -= piece_len;
                continue;
            }
            if len == 0 {
                break;
            }
            let take = (piece_len - skip).min(len);
            let addr = piece.addr.checked_add(skip).ok_or(outside)?;
            each(addr, usize::try_from(take).map_err(|_| outside)?)?;
            len -= take;
            skip = 0;
        }
        Ok(())
    }

    /// Copies readable bytes from `skip` on into `into`, which must not be longer than they are.
    pub(crate) fn copy_out(
        &self,
        map: &GuestMap,
        skip: u64,
        into: &mut [u8],
    ) -> Result<(), BrokenRing> {
        let outside = BrokenRing::OutsideMemory { head: self.head };
        let mut rest = &mut *into;
        self.for_range(Half::Readable, skip, rest.len() as u64, |addr, len| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(len);
            rest = later;
            map.read_at(addr, now).map_err(|_| outside)
        })
    }

    /// Copies `from` to the start of the writable bytes, which must not be shorter.
    pub(crate) fn copy_in(&self, map: &GuestMap, from: &[u8]) -> Result<(), BrokenRing> {
        let outside = BrokenRing::OutsideMemory { head: self.head };
        let mut rest = from;
        self.for_range(Half::Writable, 0, from.len() as u64, |addr, len| {
            let (now, later) = rest.split_at(len);
            rest = later;
            map.write_at(addr, now).map_err(|_| outside)
        })
    }

    /// Appends the segments of `len` bytes at `skip` of a half.
    pub(crate) fn segments(
        &self,
        map: &GuestMap,
        half: Half,
        skip: u64,
        len: u64,
        out: &mut Vec<memdesc::Segment>,
    ) -> Result<(), BrokenRing> {
        let outside = BrokenRing::OutsideMemory { head: self.head };
        self.for_range(half, skip, len, |addr, len| {
            map.segments(addr, len, out).map_err(|_| outside)
        })
    }
}
