//! Requests of every kind and layout, and what the guest finds afterwards.

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES};

use super::*;
use crate::SectorRange;
use crate::device::DeviceOptions;
use crate::guest::{REGIONS, features};

fn queue_of(guest: &Guest, options: DeviceOptions) -> Queue {
    queue_with(guest, |setup| setup.device = Device::new(options))
}

/// Posts a request whose payload is `payload`.
fn post_payload(guest: &mut Guest, kind: u32, payload: &[u8]) -> u16 {
    guest.write(DATA_AT, payload);
    let len = u32::try_from(payload.len()).expect("short");
    post(guest, kind, 0, &[out(DATA_AT, len)])
}

fn status(guest: &Guest) -> u8 {
    guest.read(STATUS_AT, 1)[0]
}

/// Posts a request that the device must answer alone, and returns its status and used length.
fn answer(guest: &mut Guest, queue: &mut Queue, head: u16) -> (u8, u32) {
    take_nothing(queue);
    queue.flush();
    let used = guest.used();
    let [(id, len)] = used[..] else {
        panic!("used elements: {used:?}");
    };
    assert_eq!(id, u32::from(head));
    (status(guest), len)
}

fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(count.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

#[test]
fn a_read_fills_guest_memory_and_counts_the_status_byte() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    let data = [into(DATA_AT, 512), into(DATA_AT + 0x800, 1024)];
    let head = post(&mut guest, READ, 7, &data);
    let mut request = take(&mut queue);
    let Operation::Read {
        sector,
        ref mut sink,
    } = request.operation
    else {
        panic!("{:?}", request.operation);
    };
    assert_eq!((sector, sink.len()), (7, 1536));
    let bytes: Vec<u8> = (0..1536)
        .map(|n| u8::try_from(n % 251).expect("small"))
        .collect();
    sink.copy_from(0, &bytes).expect("inside");
    assert_eq!(queue.in_flight(), 1);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    assert_eq!(queue.in_flight(), 0);
    assert_eq!(guest.used(), [], "not visible before the flush");
    queue.flush();
    assert_eq!(guest.used(), [(u32::from(head), 1537)]);
    assert_eq!(guest.read(DATA_AT, 512), bytes[..512]);
    assert_eq!(guest.read(DATA_AT + 0x800, 1024), bytes[512..]);
    assert_eq!(status(&guest), 0);
}

#[test]
fn a_failed_read_counts_the_status_byte_alone() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    let head = post(&mut guest, READ, 0, &[into(DATA_AT, 512)]);
    let request = take(&mut queue);
    queue.finish(request.token, &request.operation, BlkStatus::IoError);
    queue.flush();
    assert_eq!(guest.used(), [(u32::from(head), 1)]);
    assert_eq!(status(&guest), 1);
}

#[test]
fn a_write_shows_the_guest_s_bytes_as_they_are_when_read() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    let head = post(&mut guest, WRITE_TO_DISK, 9, &[out(DATA_AT, 512)]);
    let request = take(&mut queue);
    let Operation::Write {
        sector,
        ref source,
        fua,
    } = request.operation
    else {
        panic!("{:?}", request.operation);
    };
    assert_eq!((sector, source.len(), fua), (9, 512, false));
    guest.write(DATA_AT, &[0x5a; 512]);
    let mut bytes = [0; 512];
    source.copy_to(0, &mut bytes).expect("inside");
    assert_eq!(bytes, [0x5a; 512]);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    queue.flush();
    assert_eq!(guest.used(), [(u32::from(head), 1)]);
}

#[test]
fn a_header_may_come_in_pieces_and_share_a_descriptor_with_data() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    guest.write(HEADER_AT, &header(WRITE_TO_DISK, 0x1234));
    guest.write(DATA_AT, &[1; 1024]);
    // 5 bytes, nothing, 10 bytes; then one byte of header that lies in front of the data.
    guest.write(DATA_AT - 1, &header(WRITE_TO_DISK, 0x1234)[15..]);
    guest.post(&[
        out(HEADER_AT, 5),
        out(HEADER_AT, 0),
        out(HEADER_AT + 5, 10),
        out(DATA_AT - 1, 1 + 300),
        out(DATA_AT + 300, 212),
        into(STATUS_AT, 1),
    ]);
    let request = take(&mut queue);
    let Operation::Write {
        sector, ref source, ..
    } = request.operation
    else {
        panic!("{:?}", request.operation);
    };
    assert_eq!((sector, source.len()), (0x1234, 512));
    let mut bytes = [0; 512];
    source.copy_to(0, &mut bytes).expect("inside");
    assert_eq!(bytes, [1; 512]);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
}

#[test]
fn the_status_is_the_last_writable_byte_wherever_that_is() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    guest.write(HEADER_AT, &header(READ, 0));
    // A one-byte descriptor in the middle is data; the status shares a descriptor with data.
    guest.post(&[
        out(HEADER_AT, 16),
        into(STATUS_AT, 1),
        into(DATA_AT, 512),
        into(DATA_AT + 512, 0),
    ]);
    let mut request = take(&mut queue);
    let Operation::Read { ref mut sink, .. } = request.operation else {
        panic!("{:?}", request.operation);
    };
    assert_eq!(sink.len(), 512);
    sink.fill(0..512, 0x77).expect("inside");
    guest.write(DATA_AT + 511, &[UNTOUCHED]);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    assert_eq!(guest.read(STATUS_AT, 1), [0x77]);
    assert_eq!(guest.read(DATA_AT, 511), [0x77; 511]);
    assert_eq!(guest.read(DATA_AT + 511, 1), [0]);
}

#[test]
fn a_buffer_across_adjacent_regions_is_two_segments() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    let boundary = REGIONS[1];
    guest.write(boundary - 100, &[3; 512]);
    post(&mut guest, WRITE_TO_DISK, 0, &[out(boundary - 100, 512)]);
    let request = take(&mut queue);
    let Operation::Write { ref source, .. } = request.operation else {
        panic!("{:?}", request.operation);
    };
    let mut vectors = Vec::new();
    source.iovecs(0..512, 8, &mut vectors).expect("inside");
    let lens: Vec<_> = vectors.iter().map(|vector| vector.iov_len).collect();
    assert_eq!(lens, [100, 412]);
    let mut bytes = [0; 512];
    source.copy_to(0, &mut bytes).expect("inside");
    assert_eq!(bytes, [3; 512]);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
}

#[test]
fn an_indirect_table_works_and_may_be_longer_than_the_ring() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    guest.write(HEADER_AT, &header(READ, 3));
    let mut buffers = vec![out(HEADER_AT, 16)];
    buffers.extend((0..30).map(|at| into(DATA_AT + 512 * at, 512)));
    buffers.push(into(STATUS_AT, 1));
    assert!(buffers.len() > usize::from(SIZE));
    let head = guest.post_indirect(0xf008, &buffers);
    let request = take(&mut queue);
    let Operation::Read { sector, ref sink } = request.operation else {
        panic!("{:?}", request.operation);
    };
    assert_eq!((sector, sink.len()), (3, 30 * 512));
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    queue.flush();
    assert_eq!(guest.used(), [(u32::from(head), 30 * 512 + 1)]);
}

#[test]
fn segment_storage_is_asked_for_only_where_it_is_needed_and_used_from_the_start() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    post(&mut guest, FLUSH, 0, &[]);
    let mut none = || -> Vec<Segment> { panic!("asked for storage") };
    let request = queue.take(&mut none).expect("whole").expect("a request");
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    post(&mut guest, READ, 0, &[into(DATA_AT, 512)]);
    let mut storage = Some(Vec::with_capacity(64));
    let request = queue
        .take(&mut || storage.take().expect("once"))
        .expect("whole");
    let request = request.expect("a request");
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    let Operation::Read { sink, .. } = request.operation else {
        panic!("{:?}", request.operation);
    };
    assert_eq!(sink.into_parts().0.capacity(), 64);
}

#[test]
fn lengths_that_are_not_whole_sectors_are_io_errors() {
    for len in [1, 511, 513] {
        for (kind, buffer) in [
            (READ, into(DATA_AT, len)),
            (WRITE_TO_DISK, out(DATA_AT, len)),
        ] {
            let mut guest = Guest::new();
            let mut queue = guest.queue();
            let head = post(&mut guest, kind, 0, &[buffer]);
            assert_eq!(answer(&mut guest, &mut queue, head), (1, 1), "{len} bytes");
        }
    }
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    let head = post(&mut guest, READ, 0, &[]);
    assert_eq!(answer(&mut guest, &mut queue, head), (1, 1), "no bytes");
}

#[test]
fn a_sector_that_overflows_is_an_io_error() {
    for sector in [u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1] {
        let mut guest = Guest::new();
        let mut queue = guest.queue();
        let head = post(&mut guest, READ, sector, &[into(DATA_AT, 512)]);
        assert_eq!(answer(&mut guest, &mut queue, head), (1, 1), "at {sector}");
    }
}

#[test]
fn a_short_header_is_an_io_error() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    guest.write(HEADER_AT, &header(READ, 0));
    let head = guest.post(&[out(HEADER_AT, 15), into(DATA_AT, 512), into(STATUS_AT, 1)]);
    assert_eq!(answer(&mut guest, &mut queue, head), (1, 1));
}

#[test]
fn an_unknown_type_is_unsupported() {
    for kind in [2, 10, 14, 0x8000_0000] {
        let mut guest = Guest::new();
        let mut queue = guest.queue();
        let head = post(&mut guest, kind, 0, &[into(DATA_AT, 64)]);
        assert_eq!(answer(&mut guest, &mut queue, head), (2, 1), "type {kind}");
    }
}

#[test]
fn get_id_gives_the_serial() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    let head = post(&mut guest, GET_ID, 0, &[into(DATA_AT, 20)]);
    assert_eq!(answer(&mut guest, &mut queue, head), (0, 21));
    assert_eq!(guest.read(DATA_AT, 20), *b"SERIAL-OF-THE-DISK-1");
}

#[test]
fn get_id_fills_no_more_than_there_is_room_for_and_no_more_than_20_bytes() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    guest.write(DATA_AT, &[UNTOUCHED; 32]);
    let head = post(
        &mut guest,
        GET_ID,
        0,
        &[into(DATA_AT, 3), into(DATA_AT + 8, 2)],
    );
    assert_eq!(answer(&mut guest, &mut queue, head), (0, 6));
    assert_eq!(guest.read(DATA_AT, 4), *b"SER\xaa");
    assert_eq!(guest.read(DATA_AT + 8, 3), *b"IA\xaa");
    let head = post(&mut guest, GET_ID, 0, &[into(DATA_AT, 32)]);
    assert_eq!(answer(&mut guest, &mut queue, head), (0, 21));
    assert_eq!(guest.read(DATA_AT, 21), *b"SERIAL-OF-THE-DISK-1\xaa");
    let head = post(&mut guest, GET_ID, 0, &[]);
    assert_eq!(answer(&mut guest, &mut queue, head), (1, 1));
}

#[test]
fn a_discard_carries_its_ranges() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    let payload = [segment(8, 16, 0), segment(100, 1000, 0)].concat();
    post_payload(&mut guest, DISCARD, &payload);
    let request = take(&mut queue);
    let Operation::Discard(ranges) = request.operation else {
        panic!("{:?}", request.operation);
    };
    let range = |sector, count| SectorRange {
        sector,
        count,
        unmap: false,
    };
    assert_eq!(*ranges, [range(8, 16), range(100, 1000)]);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
}

#[test]
fn a_payload_is_read_from_the_guest_once() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    post_payload(&mut guest, WRITE_ZEROES, &segment(8, 16, 1));
    let request = take(&mut queue);
    guest.write(DATA_AT, &segment(9999, 9999, 9999));
    guest.write(HEADER_AT, &header(READ, 0));
    let Operation::WriteZeroes { ranges, fua } = request.operation else {
        panic!("{:?}", request.operation);
    };
    assert!(!fua);
    let expected = SectorRange {
        sector: 8,
        count: 16,
        unmap: true,
    };
    assert_eq!(*ranges, [expected]);
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
}

#[test]
fn bad_flags_in_ranges_are_unsupported_and_bad_ranges_io_errors() {
    let cases = [
        (DISCARD, segment(0, 8, 1), 2),
        (DISCARD, segment(0, 8, 2), 2),
        (WRITE_ZEROES, segment(0, 8, 2), 2),
        (WRITE_ZEROES, segment(0, 8, 0x8000_0001), 2),
        (DISCARD, segment(0, 1001, 0), 1),
        (DISCARD, segment(0, 0, 0), 1),
        (DISCARD, segment(u64::MAX, 1, 0), 1),
        (DISCARD, segment(0, 8, 0)[..15].to_vec(), 1),
        (DISCARD, segment(0, 8, 0).repeat(5), 1),
        (DISCARD, Vec::new(), 1),
        (WRITE_ZEROES, segment(0, 2001, 0), 1),
        (WRITE_ZEROES, segment(0, 8, 0).repeat(3), 1),
    ];
    for (kind, payload, expected) in cases {
        let mut guest = Guest::new();
        let mut queue = guest.queue();
        let head = post_payload(&mut guest, kind, &payload);
        assert_eq!(
            answer(&mut guest, &mut queue, head),
            (expected, 1),
            "type {kind} with {payload:?}"
        );
    }
}

#[test]
fn a_discard_that_was_not_negotiated_is_unsupported() {
    let mut guest = Guest::new();
    let mut queue = queue_with(&guest, |setup| {
        let without = [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
        setup.features = features(&setup.device, &without);
    });
    for kind in [DISCARD, WRITE_ZEROES] {
        let head = post_payload(&mut guest, kind, &segment(0, 8, 0));
        assert_eq!(answer(&mut guest, &mut queue, head), (2, 1));
    }
}

#[test]
fn a_read_only_disk_reads_and_flushes_and_refuses_the_rest() {
    let mut guest = Guest::new();
    let read_only = DeviceOptions {
        read_only: true,
        ..options()
    };
    let mut queue = queue_of(&guest, read_only);
    let head = post(&mut guest, WRITE_TO_DISK, 0, &[out(DATA_AT, 512)]);
    assert_eq!(answer(&mut guest, &mut queue, head), (1, 1));
    for kind in [DISCARD, WRITE_ZEROES] {
        let head = post_payload(&mut guest, kind, &segment(0, 8, 0));
        assert_eq!(answer(&mut guest, &mut queue, head), (1, 1));
    }
    post(&mut guest, FLUSH, 0, &[]);
    let request = take(&mut queue);
    assert!(matches!(request.operation, Operation::Flush));
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
    post(&mut guest, READ, 0, &[into(DATA_AT, 512)]);
    let request = take(&mut queue);
    assert!(matches!(request.operation, Operation::Read { .. }));
    queue.finish(request.token, &request.operation, BlkStatus::Ok);
}

#[test]
fn write_through_sets_fua_on_writes_and_zeroes_from_then_on() {
    let mut guest = Guest::new();
    let mut queue = guest.queue();
    for write_through in [true, false] {
        queue.apply(QueueUpdate::WriteThrough(write_through));
        post(&mut guest, WRITE_TO_DISK, 0, &[out(DATA_AT, 512)]);
        let request = take(&mut queue);
        let fua = matches!(request.operation, Operation::Write { fua: true, .. });
        assert_eq!(fua, write_through);
        queue.finish(request.token, &request.operation, BlkStatus::Ok);
        post_payload(&mut guest, WRITE_ZEROES, &segment(0, 8, 0));
        let request = take(&mut queue);
        let fua = matches!(request.operation, Operation::WriteZeroes { fua: true, .. });
        assert_eq!(fua, write_through);
        queue.finish(request.token, &request.operation, BlkStatus::Ok);
    }
}
