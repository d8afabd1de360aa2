//! What a block holds, as bytes: a pattern that names the write, and that no part of another is.

use super::disk::ZEROES;

fn word(value: u64, lba: u64, index: u64) -> u64 {
    let key = value.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ lba.wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
    key.wrapping_add(index.wrapping_mul(0x1656_67b1_9e37_79f9))
}

/// Fills blocks from `lba` on with what a write of `value` leaves.
pub(super) fn fill(bytes: &mut [u8], value: u64, lba: u64, block_size: usize) {
    if value == ZEROES {
        return bytes.fill(0);
    }
    for (lba, block) in (lba..).zip(bytes.chunks_exact_mut(block_size)) {
        let (first, rest) = block.split_at_mut(8);
        first.copy_from_slice(&value.to_le_bytes());
        for (index, bytes) in (0..).zip(rest.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word(value, lba, index).to_le_bytes());
        }
    }
}

/// The value that a block holds.
///
/// # Errors
/// It holds no one write's content.
pub(super) fn value_of(block: &[u8], lba: u64) -> Result<u64, String> {
    let mut first = [0; 8];
    first.copy_from_slice(&block[..8]);
    let value = u64::from_le_bytes(first);
    let good = |index: u64, bytes: &[u8]| {
        let expected = if value == ZEROES {
            0
        } else {
            word(value, lba, index)
        };
        bytes == expected.to_le_bytes()
    };
    let wrong = (0u64..)
        .zip(block[8..].chunks_exact(8))
        .find(|(index, bytes)| !good(*index, bytes));
    match wrong {
        None => Ok(value),
        Some((index, bytes)) => Err(format!(
            "block {lba} begins as write {value:#x} left it, but has {bytes:02x?} at {}",
            8 + index * 8
        )),
    }
}
