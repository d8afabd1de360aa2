//! CRC32C of memory that may change at any time, in one pass with a copy of it or without one.
//!
//! A library takes a digest of a slice, and a slice of foreign memory there cannot be. A copy of every piece
//! first costs as much again as the digest. So on processors that have the instruction, this reads each word
//! once, in three streams that hide its latency, and the word goes to the digest, and to the copy if there is
//! one; `docs/adr/0009-digests-in-one-pass.md` has the numbers. Elsewhere pieces are copied and then summed.

use crate::copy::copy_apart;

/// Bytes that are copied at a time where the digest is taken of a copy.
const PIECE: usize = 1536;

/// Extends `crc` over `len` bytes at `from`.
///
/// # Safety
/// `from` is readable for `len` bytes.
pub(crate) unsafe fn crc32c(crc: u32, from: *const u8, len: usize) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("sse4.2") {
        // SAFETY: promised by the caller, and the processor has the instruction. Without a copy the
        // second place is not used.
        return unsafe { words::crc32c::<false>(crc, from, std::ptr::null_mut(), len) };
    }
    let mut private = [0u8; PIECE];
    let mut crc = crc;
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(PIECE);
        // SAFETY: inside what the caller promises; `private` has room for a piece and is nobody else's.
        unsafe { copy_apart(from.add(done), private.as_mut_ptr(), piece) };
        crc = crc32c::crc32c_append(crc, &private[..piece]);
        done += piece;
    }
    crc
}

/// Copies `into.len()` bytes from `from`, and extends `crc` over what was copied.
///
/// # Safety
/// `from` is readable for so many bytes, none of which is in `into`.
pub(crate) unsafe fn copy_crc32c(crc: u32, from: *const u8, into: &mut [u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("sse4.2") {
        // SAFETY: promised by the caller, and the processor has the instruction.
        return unsafe { words::crc32c::<true>(crc, from, into.as_mut_ptr(), into.len()) };
    }
    // SAFETY: promised by the caller.
    unsafe { copy_apart(from, into.as_mut_ptr(), into.len()) };
    crc32c::crc32c_append(crc, into)
}

#[cfg(target_arch = "x86_64")]
mod words {
    use std::arch::x86_64::{_mm_crc32_u8, _mm_crc32_u64};

    const WORD: usize = size_of::<u64>();
    /// Bytes of one of three streams.
    const LANE: usize = 256;
    /// What follows a digest so far moves it on by so many zero bytes.
    static PAST_ONE: Shift = Shift::new(LANE);
    static PAST_TWO: Shift = Shift::new(2 * LANE);

    /// As outside, with `to` as the place of a copy if there is to be one.
    ///
    /// # Safety
    /// `from` is readable, and with `COPY` `to` is writable, for `len` bytes; they do not overlap. The
    /// processor has SSE 4.2.
    #[target_feature(enable = "sse4.2")]
    pub(super) unsafe fn crc32c<const COPY: bool>(
        crc: u32,
        from: *const u8,
        to: *mut u8,
        len: usize,
    ) -> u32 {
        let mut state = !crc;
        let mut done = 0;
        let byte = |state: u32, at: usize| {
            // SAFETY: every caller below stays inside `len`.
            let byte = unsafe { from.add(at).read_volatile() };
            if COPY {
                // SAFETY: as above.
                unsafe { to.add(at).write(byte) };
            }
            _mm_crc32_u8(state, byte)
        };
        let word = |state: u64, at: usize| {
            // SAFETY: every caller below stays inside `len`, and `from` is aligned there.
            let word = unsafe { from.add(at).cast::<u64>().read_volatile() };
            if COPY {
                // SAFETY: as above; the copy need not be aligned.
                unsafe { to.add(at).cast::<u64>().write_unaligned(word) };
            }
            _mm_crc32_u64(state, word)
        };
        let unaligned = from.align_offset(WORD).min(len);
        while done < unaligned {
            state = byte(state, done);
            done += 1;
        }
        while len - done >= 3 * LANE {
            let (mut first, mut second, mut third) = (u64::from(state), 0, 0);
            for at in (done..done + LANE).step_by(WORD) {
                first = word(first, at);
                second = word(second, at + LANE);
                third = word(third, at + 2 * LANE);
            }
            // The upper halves are zero.
            state = PAST_TWO.apply(first as u32) ^ PAST_ONE.apply(second as u32) ^ third as u32;
            done += 3 * LANE;
        }
        let mut rest = u64::from(state);
        while len - done >= WORD {
            rest = word(rest, done);
            done += WORD;
        }
        state = rest as u32;
        while done < len {
            state = byte(state, done);
            done += 1;
        }
        !state
    }

    /// What a number of zero bytes does to the state of a digest: a linear map, looked up byte by byte.
    struct Shift([[u32; 256]; 4]);

    impl Shift {
        const fn new(zeroes: usize) -> Self {
            let map = power(BYTE, zeroes);
            let mut table = [[0; 256]; 4];
            let mut place = 0;
            while place < 4 {
                let mut value = 0;
                while value < 256 {
                    table[place][value] = product(&map, (value as u32) << (8 * place));
                    value += 1;
                }
                place += 1;
            }
            Self(table)
        }

        fn apply(&self, state: u32) -> u32 {
            let [a, b, c, d] = state.to_le_bytes().map(usize::from);
            self.0[0][a] ^ self.0[1][b] ^ self.0[2][c] ^ self.0[3][d]
        }
    }

    /// A linear map of 32 bits: what it makes of each.
    type Map = [u32; 32];

    /// One zero byte.
    const BYTE: Map = power(BIT, 8);
    /// One zero bit: the polynomial of CRC32C, reflected, for the bit that falls out.
    const BIT: Map = {
        let mut map = [0x82f6_3b78; 32];
        let mut bit = 1;
        while bit < 32 {
            map[bit] = 1 << (bit - 1);
            bit += 1;
        }
        map
    };

    const fn product(map: &Map, state: u32) -> u32 {
        let mut sum = 0;
        let mut bit = 0;
        while bit < 32 {
            if state >> bit & 1 == 1 {
                sum ^= map[bit];
            }
            bit += 1;
        }
        sum
    }

    const fn after(first: &Map, second: &Map) -> Map {
        let mut both = [0; 32];
        let mut bit = 0;
        while bit < 32 {
            both[bit] = product(second, first[bit]);
            bit += 1;
        }
        both
    }

    /// `map`, so many times.
    const fn power(map: Map, times: usize) -> Map {
        let mut result = [0; 32];
        let mut bit = 0;
        while bit < 32 {
            result[bit] = 1 << bit;
            bit += 1;
        }
        let mut square = map;
        let mut left = times;
        while left > 0 {
            if left & 1 == 1 {
                result = after(&result, &square);
            }
            square = after(&square, &square);
            left >>= 1;
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_at_every_alignment_has_the_digest_of_the_library_and_an_exact_copy() {
        let bytes: Vec<u8> = (0..4000_u32)
            .map(|i| (i.wrapping_mul(0x9e37_79b1) >> 13) as u8)
            .collect();
        let around = |n: usize| n.saturating_sub(2)..n + 10;
        let lens = [0, 8, 16, 256, 768, 1536, 2304].map(around);
        for start in 0..9 {
            for len in lens.iter().cloned().flatten() {
                let from = &bytes[start..start + len];
                let expected = crc32c::crc32c_append(77, from);
                // SAFETY: a slice is readable.
                assert_eq!(unsafe { crc32c(77, from.as_ptr(), len) }, expected);
                let mut to = vec![0xee; len + 3];
                // SAFETY: as above, and the two are apart.
                let crc = unsafe { copy_crc32c(77, from.as_ptr(), &mut to[3..]) };
                assert_eq!(crc, expected, "{len} bytes at {start}");
                assert_eq!((&to[..3], &to[3..]), (&[0xee; 3][..], from));
            }
        }
    }

    #[test]
    fn the_check_value_of_the_polynomial_is_right() {
        let digits = b"123456789";
        // SAFETY: a slice is readable.
        assert_eq!(unsafe { crc32c(0, digits.as_ptr(), 9) }, 0xe306_9283);
    }
}
