//! Aligned memory that stands in for a request's own, where direct I/O does not take that.

/// Bytes of one piece: bounds what requests hold, however large they are.
const PIECE: usize = 128 << 10;

/// True when the kernel can be given these for direct I/O.
pub(super) fn is_aligned(vectors: &[libc::iovec], alignment: usize) -> bool {
    vectors.iter().all(|vector| {
        vector.iov_base.addr().is_multiple_of(alignment) && vector.iov_len.is_multiple_of(alignment)
    })
}

/// See the module.
#[derive(Debug)]
pub(super) struct Bounce {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Bounce {
    /// Memory for the next `remaining` bytes, or the first piece of them; what `kept` has is used
    /// again.
    pub(super) fn take(
        kept: &mut Option<Box<Self>>,
        remaining: usize,
        alignment: usize,
    ) -> &mut Self {
        let len = remaining.min(PIECE);
        let bounce = kept.get_or_insert_with(|| {
            let memory = vec![0; len + alignment];
            let start = memory.as_ptr().align_offset(alignment).min(alignment);
            Box::new(Self { memory, start, len })
        });
        // Pieces only get shorter.
        bounce.len = len.min(bounce.memory.len() - bounce.start);
        bounce
    }

    /// The bytes of the piece.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }

    /// The piece for the kernel. It stays where it is while this value lives.
    pub(super) fn vector(&mut self) -> libc::iovec {
        let bytes = self.bytes();
        libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_is_aligned_and_no_longer_than_a_piece() {
        for alignment in [512, 4096] {
            let mut kept = None;
            for (remaining, len) in [(PIECE + 512, PIECE), (512, 512)] {
                let bounce = Bounce::take(&mut kept, remaining, alignment);
                let vector = bounce.vector();
                assert_eq!((vector.iov_len, bounce.bytes().len()), (len, len));
                assert!(vector.iov_base.addr().is_multiple_of(alignment));
            }
        }
    }

    #[test]
    fn addresses_and_lengths_have_to_be_aligned() {
        let vector = |base: usize, len| libc::iovec {
            iov_base: std::ptr::without_provenance_mut(base),
            iov_len: len,
        };
        assert!(is_aligned(&[vector(4096, 512), vector(512, 1024)], 512));
        assert!(!is_aligned(&[vector(4096, 512), vector(513, 512)], 512));
        assert!(!is_aligned(&[vector(4096, 511)], 512));
        assert!(!is_aligned(&[vector(512, 4096)], 4096));
        assert!(is_aligned(&[], 4096), "a step without data");
    }
}
