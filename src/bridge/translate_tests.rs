//! Plans of requests, command by command.

use nvmf::host::OptimalIo;
use nvmf::spec::opcode::nvm;
use nvmf::spec::sqe::CDW12_DEAC;
use proptest::prelude::*;
use zerocopy::FromBytes;

use super::super::samples::{controller, namespace};
use super::*;

const MIB: u64 = 1 << 20;

/// A command in short: opcode, first block, blocks, FUA or deallocate, data.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Read(u64, u32, Range<usize>),
    Write(u64, u32, bool, Range<usize>),
    WriteZero(u64, u32, bool),
    WriteZeroes(u64, u32, bool),
    Deallocate(Vec<(u64, u32)>),
    Flush,
}

fn steps(limits: &Limits, request: Request<'_>) -> Result<Vec<Step>, Refused> {
    let ranges = match request {
        Request::Discard(ranges) | Request::WriteZeroes { ranges, .. } => ranges,
        _ => &[],
    };
    let len = match request {
        Request::Read { len, .. } | Request::Write { len, .. } => len,
        _ => 0,
    };
    let mut plan = Plan::new(limits, request)?;
    let mut scratch = Vec::with_capacity(RANGES_BYTES);
    let storage = scratch.as_ptr();
    let mut steps = Vec::new();
    loop {
        let was_done = plan.is_done();
        let Some(part) = plan.next_part(limits, ranges, &mut scratch) else {
            assert!(was_done, "a plan that is not done has a next part");
            break;
        };
        assert!(!was_done, "a plan that is done has none");
        steps.push(step(&part, len));
    }
    assert_eq!(scratch.as_ptr(), storage, "the scratch space was enough");
    Ok(steps)
}

fn step(part: &Part<'_>, len: usize) -> Step {
    let sqe = &part.sqe;
    assert_eq!(sqe.nsid.get(), 7);
    let (slba, nlb, fua) = (sqe.slba(), sqe.block_count(), sqe.fua());
    match (sqe.opcode, &part.data) {
        (nvm::FLUSH, PartData::None) => Step::Flush,
        (nvm::READ, PartData::Whole) => Step::Read(slba, nlb, 0..len),
        (nvm::READ, PartData::Slice(range)) => Step::Read(slba, nlb, range.clone()),
        (nvm::WRITE, PartData::Whole) => Step::Write(slba, nlb, fua, 0..len),
        (nvm::WRITE, PartData::Slice(range)) => Step::Write(slba, nlb, fua, range.clone()),
        (nvm::WRITE, PartData::Zeroes(len)) => {
            assert_eq!(*len % nlb as usize, 0);
            Step::WriteZero(slba, nlb, fua)
        }
        (nvm::WRITE_ZEROES, PartData::None) => {
            Step::WriteZeroes(slba, nlb, sqe.cdw12.get() & CDW12_DEAC != 0)
        }
        (nvm::DATASET_MANAGEMENT, PartData::Ranges(bytes)) => {
            let entries = <[DsmRange]>::ref_from_bytes(bytes).unwrap();
            assert_eq!(sqe.cdw10.get() as usize + 1, entries.len());
            let entry = |e: &DsmRange| (e.slba.get(), e.nlb.get());
            Step::Deallocate(entries.iter().map(entry).collect())
        }
        other => panic!("opcode and data do not go together: {other:?}"),
    }
}

fn limits(block_size: u32) -> Limits {
    Limits::new(&controller(), &namespace(block_size, 64 * MIB))
}

fn range(sector: u64, count: u32) -> SectorRange {
    SectorRange {
        sector,
        count,
        unmap: false,
    }
}

#[test]
fn a_request_that_fits_is_one_command_with_all_of_its_memory() {
    let read = |sector, len| Request::Read { sector, len };
    assert_eq!(
        steps(&limits(512), read(8, 4096)),
        Ok(vec![Step::Read(8, 8, 0..4096)])
    );
    assert_eq!(
        steps(&limits(4096), read(8, 8192)),
        Ok(vec![Step::Read(1, 2, 0..8192)])
    );
    let write = Request::Write {
        sector: 16,
        len: 4096,
        fua: true,
    };
    assert_eq!(
        steps(&limits(4096), write),
        Ok(vec![Step::Write(2, 1, true, 0..4096)])
    );
}

#[test]
fn a_request_larger_than_mdts_is_split_and_every_part_keeps_fua() {
    let controller = ControllerInfo {
        max_transfer: Some(8192),
        ..controller()
    };
    let limits = Limits::new(&controller, &namespace(4096, 64 * MIB));
    let write = Request::Write {
        sector: 8,
        len: 5 * 4096,
        fua: true,
    };
    assert_eq!(
        steps(&limits, write),
        Ok(vec![
            Step::Write(1, 2, true, 0..8192),
            Step::Write(3, 2, true, 8192..16384),
            Step::Write(5, 1, true, 16384..20480),
        ])
    );
}

#[test]
fn without_mdts_a_command_still_has_at_most_65536_blocks() {
    let read = Request::Read {
        sector: 0,
        len: 64 * MIB as usize,
    };
    assert_eq!(
        steps(&limits(512), read),
        Ok(vec![
            Step::Read(0, 65536, 0..32 << 20),
            Step::Read(65536, 65536, 32 << 20..64 << 20),
        ])
    );
}

#[test]
fn misaligned_requests_and_those_past_the_end_make_no_command() {
    let limits = limits(4096);
    let end = 64 * MIB / 512;
    let read = |sector, len| steps(&limits, Request::Read { sector, len });
    assert_eq!(read(1, 4096), Err(Refused::Misaligned));
    assert_eq!(read(0, 512), Err(Refused::Misaligned));
    assert_eq!(read(end - 8, 8192), Err(Refused::PastEnd));
    assert_eq!(read(end, 4096), Err(Refused::PastEnd));
    assert_eq!(read(!7, 4096), Err(Refused::PastEnd));
    assert_eq!(read(end - 8, 4096).map(|steps| steps.len()), Ok(1));
    let zero = |sector, count| {
        let ranges = &[range(0, 8), range(sector, count)];
        steps(&limits, Request::WriteZeroes { ranges, fua: false })
    };
    assert_eq!(zero(8, 7), Err(Refused::Misaligned));
    assert_eq!(zero(4, 8), Err(Refused::Misaligned));
    assert_eq!(zero(end, 8), Err(Refused::PastEnd));
    let discard = |sector, count| steps(&limits, Request::Discard(&[range(sector, count)]));
    assert_eq!(discard(end - 1, 2), Err(Refused::PastEnd));
    assert_eq!(discard(u64::MAX, 1), Err(Refused::PastEnd));
}

#[test]
fn requests_of_no_bytes_have_nothing_to_do() {
    let limits = limits(512);
    assert_eq!(
        steps(&limits, Request::Read { sector: 0, len: 0 }),
        Ok(vec![])
    );
    assert_eq!(steps(&limits, Request::Discard(&[])), Ok(vec![]));
}

#[test]
fn a_flush_is_always_forwarded() {
    assert_eq!(steps(&limits(512), Request::Flush), Ok(vec![Step::Flush]));
}

#[test]
fn a_discard_is_one_command_of_the_whole_blocks_inside_each_range() {
    let ranges = [range(0, 16), range(17, 23), range(41, 6), range(48, 8)];
    assert_eq!(
        steps(&limits(4096), Request::Discard(&ranges)),
        Ok(vec![Step::Deallocate(vec![(0, 2), (3, 2), (6, 1)])])
    );
    assert_eq!(
        steps(&limits(4096), Request::Discard(&ranges[2..3])),
        Ok(vec![]),
        "no whole block inside"
    );
}

#[test]
fn a_discard_keeps_to_each_limit_of_the_controller() {
    let limited = |max_ranges, max_range_blocks, max_blocks| {
        let controller = ControllerInfo {
            deallocate: DeallocateLimits {
                max_ranges,
                max_range_blocks,
                max_blocks,
            },
            ..controller()
        };
        let limits = Limits::new(&controller, &namespace(512, 64 * MIB));
        let ranges = [range(0, 10), range(100, 3), range(200, 4)];
        steps(&limits, Request::Discard(&ranges)).unwrap()
    };
    use Step::Deallocate as D;
    assert_eq!(
        limited(2, u32::MAX, None),
        [D(vec![(0, 10), (100, 3)]), D(vec![(200, 4)])]
    );
    assert_eq!(
        limited(256, 6, None),
        [D(vec![(0, 6), (6, 4), (100, 3), (200, 4)])]
    );
    assert_eq!(
        limited(256, u32::MAX, Some(12)),
        [D(vec![(0, 10), (100, 2)]), D(vec![(102, 1), (200, 4)])]
    );
}

#[test]
fn a_discard_does_nothing_where_the_controller_cannot() {
    let controller = ControllerInfo {
        oncs: 0,
        ..controller()
    };
    let limits = Limits::new(&controller, &namespace(512, 64 * MIB));
    assert_eq!(steps(&limits, Request::Discard(&[range(0, 8)])), Ok(vec![]));
}

#[test]
fn write_zeroes_deallocates_only_where_asked_for_and_safe() {
    let unmap = SectorRange {
        unmap: true,
        ..range(8, 8)
    };
    let ranges = &[range(0, 8), unmap];
    let request = Request::WriteZeroes { ranges, fua: false };
    assert_eq!(
        steps(&limits(512), request),
        Ok(vec![
            Step::WriteZeroes(0, 8, false),
            Step::WriteZeroes(8, 8, true)
        ])
    );
    for (reads_zero, deallocates) in [(true, false), (false, true)] {
        let namespace = NamespaceInfo {
            deallocated_reads_zero: reads_zero,
            write_zeroes_deallocates: deallocates,
            ..namespace(512, MIB)
        };
        let limits = Limits::new(&controller(), &namespace);
        assert_eq!(
            steps(&limits, request).unwrap()[1],
            Step::WriteZeroes(8, 8, false)
        );
    }
}

#[test]
fn write_zeroes_is_split_at_the_controllers_limit() {
    let controller = ControllerInfo {
        max_write_zeroes: Some(8192),
        max_transfer: Some(4096),
        ..controller()
    };
    let limits = Limits::new(&controller, &namespace(4096, MIB));
    let ranges = &[range(8, 24)];
    assert_eq!(
        steps(&limits, Request::WriteZeroes { ranges, fua: false }),
        Ok(vec![
            Step::WriteZeroes(1, 2, false),
            Step::WriteZeroes(3, 1, false)
        ])
    );
}

#[test]
fn writes_of_zeroes_stand_in_for_write_zeroes() {
    let without = |max_transfer| {
        let controller = ControllerInfo {
            oncs: 0,
            max_transfer,
            ..controller()
        };
        let limits = Limits::new(&controller, &namespace(4096, 64 * MIB));
        let ranges = &[range(8, 4096 + 8)];
        steps(&limits, Request::WriteZeroes { ranges, fua: true }).unwrap()
    };
    assert_eq!(
        without(None),
        [
            Step::WriteZero(1, 256, true),
            Step::WriteZero(257, 256, true),
            Step::WriteZero(513, 1, true)
        ]
    );
    assert_eq!(without(Some(4096)).len(), 513);
}

#[test]
fn a_plan_can_be_tried_again_after_a_queue_was_full() {
    let limits = limits(512);
    let mut plan = Plan::new(
        &limits,
        Request::Read {
            sector: 0,
            len: 64 * MIB as usize,
        },
    )
    .unwrap();
    let mut first = plan;
    let before = first.next_part(&limits, &[], &mut Vec::new()).unwrap().sqe;
    let again = plan.next_part(&limits, &[], &mut Vec::new()).unwrap().sqe;
    assert_eq!(before, again);
    assert_eq!(first, plan);
}

fn bounded(block_size: u32, max_transfer: Option<u64>, boundary: Option<u32>) -> Limits {
    let controller = ControllerInfo {
        max_transfer,
        ..controller()
    };
    let namespace = NamespaceInfo {
        optimal: OptimalIo {
            boundary,
            ..OptimalIo::default()
        },
        ..namespace(block_size, 64 * MIB)
    };
    Limits::new(&controller, &namespace)
}

#[test]
fn no_read_or_write_crosses_the_boundary_that_a_namespace_reports() {
    let limits = bounded(512, Some(8192), Some(24));
    let read = Request::Read {
        sector: 20,
        len: 40 * 512,
    };
    assert_eq!(
        steps(&limits, read),
        Ok(vec![
            Step::Read(20, 4, 0..2048),
            Step::Read(24, 16, 2048..10_240),
            Step::Read(40, 8, 10_240..14_336),
            Step::Read(48, 12, 14_336..20_480),
        ])
    );
    let (sector, fua) = (23, true);
    let write = Request::Write {
        sector,
        len: 1024,
        fua,
    };
    assert_eq!(
        steps(&limits, write),
        Ok(vec![
            Step::Write(23, 1, true, 0..512),
            Step::Write(24, 1, true, 512..1024),
        ])
    );
    let write = Request::Write {
        sector: 24,
        len: 8192,
        fua,
    };
    assert_eq!(
        steps(&limits, write),
        Ok(vec![Step::Write(24, 16, true, 0..8192)])
    );
}

#[test]
fn writes_of_zeroes_keep_to_the_boundary_and_what_moves_no_data_does_not() {
    let request = Request::WriteZeroes {
        ranges: &[range(20, 10)],
        fua: false,
    };
    let mut limits = bounded(512, None, Some(24));
    assert_eq!(
        steps(&limits, request),
        Ok(vec![Step::WriteZeroes(20, 10, false)])
    );
    let discard = Request::Discard(&[range(20, 10)]);
    assert_eq!(
        steps(&limits, discard),
        Ok(vec![Step::Deallocate(vec![(20, 10)])])
    );
    limits.write_zeroes = None;
    assert_eq!(
        steps(&limits, request),
        Ok(vec![
            Step::WriteZero(20, 4, false),
            Step::WriteZero(24, 6, false),
        ])
    );
}

proptest! {
    /// The parts of a transfer are in order, without gap or overlap, and within the limits.
    #[test]
    fn the_parts_of_a_transfer_cover_it_exactly(
        shift in 9u32..=12,
        first in 0u64..1000,
        count in 1u64..3000,
        max_transfer in proptest::option::of(4096u64..200_000),
        boundary in proptest::option::of(1u32..500),
    ) {
        let limits = bounded(1 << shift, max_transfer, boundary);
        let sector = first << (shift - 9);
        let len = (count << shift) as usize;
        let (mut block, mut byte) = (first, 0);
        for step in steps(&limits, Request::Read { sector, len }).unwrap() {
            let Step::Read(slba, nlb, range) = step else { panic!("{step:?}") };
            prop_assert_eq!((slba, range.start), (block, byte));
            prop_assert_eq!(range.len(), (nlb as usize) << shift);
            prop_assert!(range.len() as u64 <= max_transfer.unwrap_or(u64::MAX));
            if let Some(boundary) = boundary.map(u64::from) {
                prop_assert_eq!(slba / boundary, (slba + u64::from(nlb) - 1) / boundary);
            }
            (block, byte) = (slba + u64::from(nlb), range.end);
        }
        prop_assert_eq!((block, byte), (first + count, len));
    }

    /// What zeroes blocks does so in order, without gap or overlap, and within the limits of what it is.
    #[test]
    fn the_parts_of_a_write_zeroes_cover_its_ranges_exactly(
        shift in 9u32..=12,
        ranges in proptest::collection::vec((0u64..5000, 1u32..4000, any::<bool>()), 0..4),
        max_write_zeroes in proptest::option::of(4096u64..300_000),
        max_transfer in proptest::option::of(4096u64..200_000),
        boundary in proptest::option::of(1u32..500),
        (supported, fua) in any::<(bool, bool)>(),
    ) {
        let mut limits = bounded(1 << shift, max_transfer, boundary);
        let most = max_write_zeroes.map_or(MAX_COMMAND_BLOCKS, |bytes| bytes >> shift);
        limits.write_zeroes = supported.then_some(WriteZeroesLimits {
            blocks: most,
            may_deallocate: true,
        });
        let per = 1 << (shift - 9);
        let ranges: Vec<_> = ranges.into_iter().map(|(sector, count, unmap)| SectorRange {
            sector: sector * u64::from(per),
            count: count * per,
            unmap,
        }).collect();
        let mut zeroed = Vec::new();
        for step in steps(&limits, Request::WriteZeroes { ranges: &ranges, fua }).unwrap() {
            let (slba, nlb, unmap) = match step {
                Step::WriteZeroes(slba, nlb, deallocate) if supported => {
                    prop_assert!(u64::from(nlb) <= most);
                    (slba, nlb, deallocate)
                }
                Step::WriteZero(slba, nlb, its_fua) if !supported => {
                    let bytes = u64::from(nlb) << shift;
                    prop_assert!(bytes <= max_transfer.unwrap_or(u64::MAX).min(ZERO_WRITE_BYTES));
                    prop_assert_eq!(its_fua, fua);
                    if let Some(boundary) = boundary.map(u64::from) {
                        prop_assert_eq!(slba / boundary, (slba + u64::from(nlb) - 1) / boundary);
                    }
                    (slba, nlb, false)
                }
                other => panic!("{other:?}"),
            };
            zeroed.extend((slba..slba + u64::from(nlb)).map(|block| (block, unmap)));
        }
        let expected: Vec<_> = ranges.iter().flat_map(|range| {
            let first = range.sector / u64::from(per);
            let unmap = range.unmap && supported;
            (first..first + u64::from(range.count / per)).map(move |block| (block, unmap))
        }).collect();
        prop_assert_eq!(zeroed, expected);
    }

    /// A discard names no block that is not wholly inside its ranges, and each that is, once.
    #[test]
    fn a_discard_names_exactly_the_blocks_inside_its_ranges(
        shift in 9u32..=12,
        ranges in proptest::collection::vec((0u64..5000, 1u32..500), 0..16),
        max_ranges in 1u16..20,
        max_range_blocks in 1u32..300,
        max_blocks in proptest::option::of(1u64..600),
    ) {
        let deallocate = DeallocateLimits { max_ranges, max_range_blocks, max_blocks };
        let controller = ControllerInfo { deallocate, ..controller() };
        let limits = Limits::new(&controller, &namespace(1 << shift, 64 * MIB));
        let ranges: Vec<_> = ranges.into_iter().map(|(s, c)| range(s, c)).collect();
        let mut named = Vec::new();
        for step in steps(&limits, Request::Discard(&ranges)).unwrap() {
            let Step::Deallocate(entries) = step else { panic!("{step:?}") };
            prop_assert!(entries.len() <= usize::from(max_ranges));
            let total: u64 = entries.iter().map(|&(_, nlb)| u64::from(nlb)).sum();
            prop_assert!(total <= max_blocks.unwrap_or(u64::MAX));
            for (slba, nlb) in entries {
                prop_assert!((1..=max_range_blocks).contains(&nlb));
                named.extend(slba..slba + u64::from(nlb));
            }
        }
        let inside = |r: &SectorRange| {
            let per = 1 << (shift - 9);
            let end = r.sector + u64::from(r.count);
            (0..end / per).filter(|b| b * per >= r.sector).collect::<Vec<_>>()
        };
        let expected: Vec<_> = ranges.iter().flat_map(inside).collect();
        prop_assert_eq!(named, expected);
    }
}

#[test]
fn what_a_request_changes_is_told_in_blocks_that_it_touches_and_what_is_past_the_end_changes_nothing()
 {
    let limits = Limits::new(&controller(), &namespace(4096, 1 << 20));
    let written = |request| {
        let ranges = limits.written(request);
        ranges
            .map(|blocks| (blocks.start, blocks.end))
            .collect::<Vec<_>>()
    };
    let fua = false;
    let write = |sector, len| written(Request::Write { sector, len, fua });
    assert_eq!(write(8, 8192), [(1, 3)]);
    assert_eq!(write(8, 0), []);
    assert_eq!(write(1, 4096), [(0, 2)]);
    assert_eq!(write(15, 512), [(1, 2)]);
    assert_eq!(write(u64::MAX, 512), []);
    assert_eq!(write(2048, 4096), []);
    let range = |sector, count| SectorRange {
        sector,
        count,
        unmap: false,
    };
    let ranges = [range(8, 8), range(17, 6), range(30, 12)];
    assert_eq!(written(Request::Discard(&ranges)), [(1, 2), (4, 5)]);
    let ranges = &ranges[..1];
    assert_eq!(written(Request::WriteZeroes { ranges, fua }), [(1, 2)]);
    let ranges = [range(15, 2), range(2040, 8), range(2047, 2)];
    let ranges = &ranges;
    assert_eq!(
        written(Request::WriteZeroes { ranges, fua }),
        [(1, 3), (255, 256)]
    );
    let (sector, len) = (8, 4096);
    assert_eq!(written(Request::Read { sector, len }), []);
    assert_eq!(written(Request::Flush), []);
}
