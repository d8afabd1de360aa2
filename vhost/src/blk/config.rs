//! The configuration space of a virtio block device (virtio 1.3, section 5.2.4).

use std::ops::Range;

/// Size of the configuration space that the device shows, in bytes: more than the specification
/// defines, because front-ends ask for what they know and expect zeroes for the rest.
pub(crate) const CONFIG_SPACE: usize = 256;

/// Where old front-ends believe that the configuration space starts.
const LEGACY_OFFSET: u32 = 0x100;

/// The only field that a driver may write.
pub(crate) const WRITEBACK: usize = 32;

/// What the configuration space says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Config {
    /// Capacity in units of 512 bytes.
    pub(crate) capacity: u64,
    /// Most data segments in one request.
    pub(crate) seg_max: u32,
    /// Logical block size in bytes.
    pub(crate) blk_size: u32,
    /// log2 of the number of logical blocks in a physical one.
    pub(crate) physical_block_exp: u8,
    /// Suggested minimum size of a request, in logical blocks.
    pub(crate) min_io_size: u16,
    /// Optimal size of a request, in logical blocks.
    pub(crate) opt_io_size: u32,
    /// 1 for a write-back cache, 0 for write-through.
    pub(crate) writeback: u8,
    /// Queues that a driver may use.
    pub(crate) num_queues: u16,
    /// Most sectors in one discard segment.
    pub(crate) max_discard_sectors: u32,
    /// Most segments in one discard.
    pub(crate) max_discard_seg: u32,
    /// Alignment that discards should have, in sectors.
    pub(crate) discard_sector_alignment: u32,
    /// Most sectors in one write-zeroes segment.
    pub(crate) max_write_zeroes_sectors: u32,
    /// Most segments in one write-zeroes.
    pub(crate) max_write_zeroes_seg: u32,
    /// Whether a write-zeroes may deallocate.
    pub(crate) write_zeroes_may_unmap: bool,
}

impl Config {
    /// The bytes that the guest sees, little-endian, zero where nothing is offered.
    pub(crate) fn to_bytes(self) -> [u8; CONFIG_SPACE] {
        let mut space = [0; CONFIG_SPACE];
        let mut put = |offset: usize, bytes: &[u8]| {
            space[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &self.capacity.to_le_bytes());
        put(12, &self.seg_max.to_le_bytes());
        put(20, &self.blk_size.to_le_bytes());
        put(24, &[self.physical_block_exp]);
        put(26, &self.min_io_size.to_le_bytes());
        put(28, &self.opt_io_size.to_le_bytes());
        put(WRITEBACK, &[self.writeback]);
        put(34, &self.num_queues.to_le_bytes());
        put(36, &self.max_discard_sectors.to_le_bytes());
        put(40, &self.max_discard_seg.to_le_bytes());
        put(44, &self.discard_sector_alignment.to_le_bytes());
        put(48, &self.max_write_zeroes_sectors.to_le_bytes());
        put(52, &self.max_write_zeroes_seg.to_le_bytes());
        put(56, &[u8::from(self.write_zeroes_may_unmap)]);
        space
    }
}

/// The part of the configuration space that a front-end means, or `None` when it is not inside.
///
/// Offsets are counted from the start of the device's fields. Front-ends built on early Rust
/// libraries add 0x100, where that space lies in a memory-mapped virtio device; both are taken.
pub(crate) fn range(offset: u32, size: usize) -> Option<Range<usize>> {
    let start = usize::try_from(offset.checked_sub(LEGACY_OFFSET).unwrap_or(offset)).ok()?;
    let end = start.checked_add(size)?;
    (end <= CONFIG_SPACE).then_some(start..end)
}

/// The value for `writeback` in a write of `bytes` at `offset`, or `None` when the write touches
/// anything else or is not 0 or 1.
pub(crate) fn written_writeback(offset: u32, bytes: &[u8]) -> Option<u8> {
    match (range(offset, bytes.len())?.start, bytes) {
        (WRITEBACK, [value @ (0 | 1)]) => Some(*value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: Config = Config {
        capacity: 0x0102_0304_0506_0708,
        seg_max: 254,
        blk_size: 4096,
        physical_block_exp: 3,
        min_io_size: 8,
        opt_io_size: 0x1122_3344,
        writeback: 1,
        num_queues: 64,
        max_discard_sectors: 0x2000,
        max_discard_seg: 16,
        discard_sector_alignment: 8,
        max_write_zeroes_sectors: 0x4000,
        max_write_zeroes_seg: 1,
        write_zeroes_may_unmap: true,
    };

    #[test]
    fn every_field_lies_where_virtio_puts_it() {
        let space = CONFIG.to_bytes();
        let mut expected = [0; CONFIG_SPACE];
        expected[..60].copy_from_slice(&[
            8, 7, 6, 5, 4, 3, 2, 1, // capacity
            0, 0, 0, 0, // size_max
            254, 0, 0, 0, // seg_max
            0, 0, 0, 0, // geometry
            0, 0x10, 0, 0, // blk_size
            3, 0, 8, 0, 0x44, 0x33, 0x22, 0x11, // topology
            1, 0, 64, 0, // writeback, unused, num_queues
            0, 0x20, 0, 0, 16, 0, 0, 0, 8, 0, 0, 0, // discard
            0, 0x40, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, // write zeroes, unused
        ]);
        assert_eq!(space, expected);
    }

    #[test]
    fn a_range_counts_from_either_start() {
        assert_eq!(range(0, 60), Some(0..60));
        assert_eq!(range(0x100, 60), Some(0..60));
        assert_eq!(range(0x120, 1), Some(32..33));
        assert_eq!(range(200, 56), Some(200..256));
        assert_eq!(range(0, 256), Some(0..256));
    }

    #[test]
    fn a_range_past_the_end_is_none() {
        assert_eq!(range(0, 257), None);
        assert_eq!(range(255, 2), None);
        assert_eq!(range(0x1ff, 2), None);
        assert_eq!(range(u32::MAX, 1), None);
    }

    #[test]
    fn only_the_writeback_byte_can_be_written() {
        assert_eq!(written_writeback(32, &[0]), Some(0));
        assert_eq!(written_writeback(0x120, &[1]), Some(1));
        assert_eq!(written_writeback(32, &[2]), None);
        assert_eq!(written_writeback(31, &[0]), None);
        assert_eq!(written_writeback(33, &[0]), None);
        assert_eq!(written_writeback(32, &[0, 0]), None);
        assert_eq!(written_writeback(0, &[0; 60]), None);
    }
}
