//! What the guest is told about its disk, from what the controller says about the namespace.

use nvmf::host::{ControllerInfo, NamespaceInfo};
use uuid::Uuid;
use vhost_user_blk::DeviceOptions;

use crate::config::Serial;
use crate::limits::{
    MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_RANGES, MAX_WRITE_ZEROES_SECTORS,
    SEG_MAX, SERIAL_LEN,
};

/// Bytes of a sector, virtio's unit.
const SECTOR: u32 = 512;
/// Largest physical block that is told: some guests cannot use a disk with larger ones. What is best
/// for speed is told as the minimum I/O size all the same.
const PHYSICAL_BLOCK_MAX: u32 = 4096;

/// What the user decides about the disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Choices {
    /// Queues on offer.
    pub(crate) num_queues: u16,
    /// The serial, when it is not to follow from the namespace.
    pub(crate) serial: Option<Serial>,
    /// The guest may not write.
    pub(crate) read_only: bool,
    /// Sectors of 512 bytes, whatever the size of a block is.
    pub(crate) emulate_512: bool,
}

/// Describes the disk. Apart from what the user chooses, only sizes and hints depend on the
/// namespace: what is offered is always the same, since a VMM that comes back to less gives up.
pub(crate) fn device_options(
    choices: &Choices,
    controller: &ControllerInfo,
    namespace: &NamespaceInfo,
) -> DeviceOptions {
    let sectors_per_block = (namespace.block_size / SECTOR).max(1);
    // What the guest takes for a block, and how many of those a block is.
    let (block_size, blocks) = match choices.emulate_512 {
        true => (SECTOR, sectors_per_block),
        false => (namespace.block_size, 1),
    };
    let optimal = &namespace.optimal;
    let granularity = optimal
        .write_granularity
        .unwrap_or(1)
        .saturating_mul(blocks);
    let alignment = optimal.write_alignment;
    let alignment = alignment.map(|alignment| alignment.saturating_mul(blocks));
    let min_io_blocks = unit(granularity, alignment);
    let discard_blocks = unit(
        optimal.deallocate_granularity.unwrap_or(1),
        optimal.deallocate_alignment,
    );
    let serial = choices
        .serial
        .map_or_else(|| serial(controller, namespace), Serial::bytes);
    DeviceOptions {
        // The capacity in bytes was checked to fit 64 bits.
        capacity_sectors: namespace.capacity() / u64::from(SECTOR),
        block_size,
        physical_block_exp: physical_block_exp(block_size, granularity),
        min_io_blocks: u16::try_from(min_io_blocks).unwrap_or(u16::MAX),
        opt_io_blocks: optimal
            .write_size
            .map(|size| size.saturating_mul(blocks))
            .filter(|blocks| blocks.is_multiple_of(min_io_blocks))
            .unwrap_or(0),
        read_only: choices.read_only,
        num_queues: choices.num_queues,
        seg_max: SEG_MAX,
        max_discard_sectors: MAX_DISCARD_SECTORS,
        max_discard_seg: MAX_DISCARD_RANGES,
        discard_sector_alignment: discard_blocks
            .saturating_mul(sectors_per_block)
            .min(MAX_DISCARD_SECTORS),
        max_write_zeroes_sectors: MAX_WRITE_ZEROES_SECTORS,
        max_write_zeroes_seg: MAX_WRITE_ZEROES_RANGES,
        write_zeroes_may_unmap: true,
        serial,
        identity: identity(namespace),
    }
}

/// The unit, in blocks, whose multiples begin and end where the controller likes it. A guest knows no other
/// alignment than that of a unit.
fn unit(granularity: u32, alignment: Option<u32>) -> u32 {
    let wider = alignment.filter(|alignment| alignment.is_multiple_of(granularity));
    wider.unwrap_or(granularity)
}

/// log2 of the blocks in a physical block, where the preferred granularity is one.
fn physical_block_exp(block_size: u32, granularity: u32) -> u8 {
    let most = (PHYSICAL_BLOCK_MAX / block_size.max(1)).max(1);
    let blocks = match granularity.is_power_of_two() {
        true => granularity.min(most),
        false => 1,
    };
    // A power of two of at most 8.
    blocks.trailing_zeros() as u8
}

/// What the namespace is, as far as it says: its UUID, NGUID or EUI-64.
fn identity(namespace: &NamespaceInfo) -> Option<[u8; 16]> {
    let eui64 = || {
        let eui64 = namespace.eui64?;
        Some((u128::from(u64::from_be_bytes(eui64)) << 64).to_be_bytes())
    };
    let uuid = namespace.uuid.map(Uuid::into_bytes);
    uuid.or(namespace.nguid).or_else(eui64)
}

/// A serial of 20 hex digits that stays the same for the namespace, whatever path leads to it:
///
/// - of a UUID its first 20 digits, which is what people recognise it by;
/// - of an NGUID its last 20, since its first may name the vendor's array and not the namespace;
/// - an EUI-64 has 16, and zeroes follow it;
/// - without any, digits made from the subsystem's name and the namespace ID.
fn serial(controller: &ControllerInfo, namespace: &NamespaceInfo) -> [u8; SERIAL_LEN] {
    let digits = match (namespace.uuid, namespace.nguid, namespace.eui64) {
        (Some(uuid), _, _) => format!("{:x}", uuid.simple()),
        (None, Some(nguid), _) => {
            format!("{:032x}", u128::from_be_bytes(nguid)).split_off(32 - SERIAL_LEN)
        }
        (None, None, Some(eui64)) => format!("{:016x}0000", u64::from_be_bytes(eui64)),
        (None, None, None) => {
            let name = format!("{} {}", controller.subnqn, namespace.nsid);
            format!(
                "{:x}",
                Uuid::new_v5(&Uuid::NAMESPACE_OID, name.as_bytes()).simple()
            )
        }
    };
    let mut serial = [0; SERIAL_LEN];
    for (place, digit) in serial.iter_mut().zip(digits.bytes()) {
        *place = digit;
    }
    serial
}

#[cfg(test)]
mod tests {
    use nvmf::host::{DeallocateLimits, OptimalIo};

    use super::super::samples::{controller, namespace};
    use super::*;

    const CHOICES: Choices = Choices {
        num_queues: 64,
        serial: None,
        read_only: false,
        emulate_512: false,
    };

    fn options(namespace: &NamespaceInfo) -> DeviceOptions {
        device_options(&CHOICES, &controller(), namespace)
    }

    fn shown_serial(namespace: &NamespaceInfo) -> String {
        String::from_utf8(options(namespace).serial.to_vec()).unwrap()
    }

    #[test]
    fn sizes_are_in_virtios_units() {
        for block_size in [512, 4096] {
            let options = options(&namespace(block_size, 1 << 30));
            assert_eq!(options.capacity_sectors, 1 << 21);
            assert_eq!(options.block_size, block_size);
            assert_eq!(options.discard_sector_alignment, block_size / 512);
            assert_eq!(options.physical_block_exp, 0);
            assert_eq!((options.min_io_blocks, options.opt_io_blocks), (1, 0));
        }
    }

    #[test]
    fn preferred_sizes_become_topology() {
        let with = |block_size, write_granularity| {
            options(&NamespaceInfo {
                optimal: OptimalIo {
                    write_granularity: Some(write_granularity),
                    write_size: Some(256),
                    deallocate_granularity: Some(16),
                    ..OptimalIo::default()
                },
                ..namespace(block_size, 1 << 30)
            })
        };
        let options = with(512, 8);
        assert_eq!((options.physical_block_exp, options.min_io_blocks), (3, 8));
        assert_eq!(options.opt_io_blocks, 256);
        assert_eq!(options.discard_sector_alignment, 16);
        let options = with(512, 128);
        assert_eq!(
            (options.physical_block_exp, options.min_io_blocks),
            (3, 128)
        );
        let options = with(4096, 4);
        assert_eq!((options.physical_block_exp, options.min_io_blocks), (0, 4));
        assert_eq!(options.discard_sector_alignment, 128);
        let options = with(512, 65536);
        assert_eq!(options.min_io_blocks, u16::MAX);
        assert_eq!(with(512, 6).physical_block_exp, 0);
    }

    #[test]
    fn emulated_sectors_are_told_with_the_blocks_that_they_are_in() {
        let emulated = |block_size, optimal| {
            let choices = Choices {
                emulate_512: true,
                ..CHOICES
            };
            let namespace = NamespaceInfo {
                optimal,
                ..namespace(block_size, 1 << 30)
            };
            device_options(&choices, &controller(), &namespace)
        };
        for (block_size, exp, min_io) in [(512, 0, 1), (4096, 3, 8), (16384, 3, 32)] {
            let options = emulated(block_size, OptimalIo::default());
            assert_eq!(options.capacity_sectors, 1 << 21);
            assert_eq!((options.block_size, options.physical_block_exp), (512, exp));
            assert_eq!((options.min_io_blocks, options.opt_io_blocks), (min_io, 0));
            assert_eq!(options.discard_sector_alignment, block_size / 512);
        }
        let optimal = OptimalIo {
            write_granularity: Some(4),
            write_alignment: Some(8),
            write_size: Some(64),
            ..OptimalIo::default()
        };
        let options = emulated(4096, optimal);
        assert_eq!((options.min_io_blocks, options.opt_io_blocks), (64, 512));
    }

    #[test]
    fn an_alignment_that_is_wider_than_the_granularity_is_the_unit_of_a_request() {
        let with = |write_granularity, write_alignment, write_size| {
            let options = options(&NamespaceInfo {
                optimal: OptimalIo {
                    write_granularity: Some(write_granularity),
                    write_alignment: Some(write_alignment),
                    write_size: Some(write_size),
                    deallocate_granularity: Some(write_granularity),
                    deallocate_alignment: Some(write_alignment),
                    ..OptimalIo::default()
                },
                ..namespace(512, 1 << 30)
            });
            (
                options.min_io_blocks,
                options.opt_io_blocks,
                options.discard_sector_alignment,
            )
        };
        assert_eq!(with(8, 8, 64), (8, 64, 8));
        assert_eq!(with(8, 32, 64), (32, 64, 32));
        assert_eq!(with(8, 1, 64), (8, 64, 8));
        assert_eq!(with(8, 12, 64), (8, 64, 8), "not a multiple");
        assert_eq!(with(8, 32, 40), (32, 0, 32), "optimal for whom?");
    }

    #[test]
    fn whatever_a_controller_can_and_cannot_do_what_is_on_offer_is_the_same() {
        let poor = ControllerInfo {
            oncs: 0,
            volatile_write_cache: false,
            max_transfer: Some(4096),
            max_write_zeroes: Some(4096),
            deallocate: DeallocateLimits {
                max_ranges: 1,
                max_range_blocks: 1,
                max_blocks: Some(1),
            },
            ..controller()
        };
        let namespace = namespace(512, 1 << 30);
        let protected = NamespaceInfo {
            write_protected: true,
            deallocated_reads_zero: false,
            write_zeroes_deallocates: false,
            ..namespace.clone()
        };
        let rich = format!("{:?}", device_options(&CHOICES, &controller(), &namespace));
        let poor = format!("{:?}", device_options(&CHOICES, &poor, &protected));
        assert_eq!(rich, poor);
    }

    #[test]
    fn the_serial_is_that_part_of_an_identifier_that_tells_namespaces_apart() {
        let id = 0x6ba7_b810_9dad_41d1_80b4_00c0_4fd4_30c8u128;
        let mut namespace = namespace(512, 1 << 20);
        let nameless = shown_serial(&namespace);
        namespace.eui64 = Some([0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(shown_serial(&namespace), "00010203040506070000");
        namespace.nguid = Some(id.to_be_bytes());
        assert_eq!(shown_serial(&namespace), "41d180b400c04fd430c8");
        namespace.uuid = Some(Uuid::from_u128(id));
        assert_eq!(shown_serial(&namespace), "6ba7b8109dad41d180b4");
        let other = NamespaceInfo {
            nsid: 8,
            ..super::super::samples::namespace(512, 1 << 20)
        };
        assert_ne!(shown_serial(&other), nameless);
    }

    #[test]
    fn what_the_user_chooses_is_told_as_chosen() {
        let choices = Choices {
            num_queues: 3,
            serial: Some("disk1".parse().unwrap()),
            read_only: true,
            emulate_512: false,
        };
        let options = device_options(&choices, &controller(), &namespace(512, 1 << 20));
        assert_eq!(options.num_queues, 3);
        assert!(options.read_only);
        assert_eq!(&options.serial[..6], b"disk1\0");
    }
}
