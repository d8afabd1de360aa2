//! Copies of bytes, in pieces that the C library never copies slowly.
//!
//! From some thousand bytes on, glibc copies with one string instruction. On AMD processors that takes up to
//! thirty times as long where the destination lies a few bytes ahead of the source, counted within their pages:
//! 80 in place of 3 microseconds for 128 KiB. A guest's page and memory of the allocator's, whose blocks begin 16
//! bytes into a page, are just such a pair. Below that size it uses vector registers, which are as fast.

/// Below every threshold that glibc has for the instruction: it begins at 2048 with vectors of 16 bytes, and
/// is higher with longer ones.
const PIECE: usize = 1536;

/// Copies `len` bytes between places that do not overlap.
///
/// # Safety
/// `from` is readable, `to` is writable and nobody else's reference, both for `len` bytes, and they do not overlap.
pub(crate) unsafe fn copy_apart(from: *const u8, to: *mut u8, len: usize) {
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(PIECE);
        // SAFETY: promised by the caller for all of it.
        unsafe { std::ptr::copy_nonoverlapping(from.add(done), to.add(done), piece) };
        done += piece;
    }
}

/// As [`copy_apart`], for places that may overlap.
///
/// # Safety
/// As there, but for overlapping.
pub(crate) unsafe fn copy_anywhere(from: *const u8, to: *mut u8, len: usize) {
    if from.addr().abs_diff(to.addr()) < len {
        // SAFETY: promised by the caller; this takes account of overlapping.
        unsafe { std::ptr::copy(from, to, len) };
    } else {
        // SAFETY: promised by the caller; they are further apart than they are long.
        unsafe { copy_apart(from, to, len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_around_a_piece_is_copied_and_not_a_byte_more() {
        let from: Vec<u8> = (0..3 * PIECE).map(|i| (i * 7 + i / 256) as u8).collect();
        for len in (0..3)
            .chain(PIECE - 2..PIECE + 3)
            .chain(2 * PIECE - 1..2 * PIECE + 2)
        {
            let mut to = vec![0xee; len + 1];
            // SAFETY: both have `len` bytes.
            unsafe { copy_apart(from.as_ptr(), to.as_mut_ptr(), len) };
            assert_eq!((&to[..len], to[len]), (&from[..len], 0xee));
        }
    }

    #[test]
    fn places_that_overlap_are_copied_as_if_there_were_a_third() {
        let original: Vec<u8> = (0..4 * PIECE).map(|i| (i * 13 + i / 200) as u8).collect();
        for (from, to) in [
            (0, 1),
            (1, 0),
            (0, PIECE),
            (PIECE, 0),
            (5, 5),
            (0, 2 * PIECE),
        ] {
            let len = 2 * PIECE;
            let mut memory = original.clone();
            let base = memory.as_mut_ptr();
            // SAFETY: both ranges lie in `memory`.
            unsafe { copy_anywhere(base.add(from), base.add(to), len) };
            assert_eq!(memory[to..to + len], original[from..from + len]);
        }
    }
}
