//! Each kind of request: what it does to the storage, and what it answers when it is wrong.

use crate::daemons::{Attach, Directory, Export};
use crate::front_end::{
    DATA, FrontEnd, IOERR, OK, SECTOR, Setup, UNANSWERED, UNSUPP, feature, kind,
};
use crate::memory::HIGH;
use crate::noise::noise;
use crate::ring::{Buffer, into, out};

/// Where the cache mode is in the configuration space.
const WRITEBACK: u32 = 32;

#[test]
fn a_flush_reaches_the_storage_and_writes_are_not_fua_while_the_guest_can_flush() {
    let mut export = Export::start(&["ram:8M"]);
    let mut attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    for sector in 0..5 {
        assert_eq!(guest.write(0, sector, &[7; 512]), OK);
    }
    for _ in 0..3 {
        assert_eq!(guest.flush(0), OK);
    }
    drop(guest);
    attach.stop();
    export.stop();
    assert_eq!(
        (attach.counter("writes"), attach.counter("flushes")),
        (5, 3)
    );
    let counted = ["writes", "flushes", "fua_writes"].map(|name| export.counter(1, name));
    assert_eq!(counted, [5, 3, 0]);
}

#[test]
fn every_write_is_fua_when_flush_was_not_negotiated() {
    let mut export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let setup = Setup {
        without: feature::FLUSH,
        ..Setup::default()
    };
    let mut guest = FrontEnd::connect_with(&attach.socket, setup);
    assert_eq!(guest.features & feature::FLUSH, 0);
    for sector in 0..3 {
        assert_eq!(guest.write(0, sector, &[7; 512]), OK);
    }
    // More than one command.
    assert_eq!(guest.write(0, 0, &vec![8; 3 << 20]), OK);
    assert_eq!(guest.range(kind::WRITE_ZEROES, 0, 8, 0), OK);
    drop((guest, attach));
    export.stop();
    let (writes, fua) = (export.counter(1, "writes"), export.counter(1, "fua_writes"));
    // Whether write-zeroes count as FUA writes is the target's affair.
    assert!(writes >= 6, "{writes} writes");
    assert!(fua >= writes, "{fua} of {writes} writes were FUA");
}

#[test]
fn writes_are_fua_from_the_moment_that_the_guest_chooses_write_through() {
    let mut export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert!(guest.set_config(WRITEBACK, 0));
    assert_eq!(guest.write(0, 1, &[2; 512]), OK);
    assert_eq!(guest.write(0, 2, &[3; 512]), OK);
    assert!(guest.set_config(WRITEBACK, 1));
    assert_eq!(guest.write(0, 3, &[4; 512]), OK);
    drop((guest, attach));
    export.stop();
    assert_eq!(
        (export.counter(1, "writes"), export.counter(1, "fua_writes")),
        (4, 2)
    );
}

#[test]
fn zeroed_and_discarded_sectors_read_as_zeroes_and_their_neighbours_stay() {
    let directory = Directory::new();
    let path = directory.path("disk.img");
    std::fs::write(&path, vec![0; 8 << 20]).expect("a file");
    let file = format!("file:{}", path.display());
    for (spec, block) in [("ram:8M", 1), ("ram:8M,block-size=4096", 8), (&file, 1)] {
        let mut export = Export::start(&[spec]);
        let mut attach = Attach::start(export.uri());
        let mut guest = FrontEnd::connect(&attach.socket);
        let data = noise(1 << 20, 1);
        assert_eq!(guest.write(0, 0, &data), OK);
        let mut model = data;
        let unmap = 1;
        for (kind, sector, count, flags) in [
            (kind::WRITE_ZEROES, 8, 8, 0),
            (kind::WRITE_ZEROES, 24, 3 * block, 0),
            (kind::WRITE_ZEROES, 64, 8, unmap),
            (kind::DISCARD, 128, 256, 0),
        ] {
            assert_eq!(
                guest.range(kind, sector, count, flags),
                OK,
                "{spec}: {kind} at {sector}"
            );
            let first = usize::try_from(sector * SECTOR).expect("inside");
            model[first..first + 512 * usize::try_from(count).expect("small")].fill(0);
        }
        let (status, read) = guest.read(0, 0, model.len());
        assert_eq!(status, OK);
        assert!(read == model, "{spec}: the disk is not as it should be");
        drop(guest);
        attach.stop();
        export.stop();
        let counted = (attach.counter("write_zeroes"), attach.counter("discards"));
        assert_eq!(counted, (3, 1), "{spec}");
        let counted = (
            export.counter(1, "write_zeroes"),
            export.counter(1, "deallocates"),
        );
        assert_eq!(counted, (3, 1), "{spec}");
    }
}

#[test]
fn bad_ranges_are_refused_and_change_nothing() {
    let export = Export::start(&["ram:8M,block-size=4096"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    let data = noise(8 << 20, 2);
    assert_eq!(guest.write(0, 0, &data), OK);
    let unmap = 1;
    for (kind, sector, count, flags, expected) in [
        (kind::WRITE_ZEROES, 1, 8, 0, IOERR),
        (kind::WRITE_ZEROES, 8, 1, 0, IOERR),
        (kind::WRITE_ZEROES, 16384, 8, 0, IOERR),
        (kind::WRITE_ZEROES, 16376, 16, 0, IOERR),
        (kind::WRITE_ZEROES, u64::MAX / 512, 16, 0, IOERR),
        (kind::WRITE_ZEROES, 0, 0, 0, IOERR),
        (kind::WRITE_ZEROES, 0, u32::MAX, 0, IOERR),
        (kind::WRITE_ZEROES, 0, 8, 2, UNSUPP),
        (kind::DISCARD, 16384, 8, 0, IOERR),
        (kind::DISCARD, u64::MAX, 8, 0, IOERR),
        (kind::DISCARD, 0, 8, unmap, UNSUPP),
    ] {
        let status = guest.range(kind, sector, count, flags);
        assert_eq!(
            status, expected,
            "{kind} of {sector}+{count}, flags {flags}"
        );
    }
    let (status, read) = guest.read(0, 0, data.len());
    assert!(status == OK && read == data, "something was changed");
}

#[test]
fn the_serial_is_the_one_that_was_given_or_follows_from_the_uuid() {
    let export = Export::start(&["ram:8M,uuid=0c7a3a62-3b3e-4f8e-9a51-5d2c7e0b1f44"]);
    for (args, serial) in [
        (&["--serial", "DISK-7"][..], "DISK-7"),
        (&[], "0c7a3a623b3e4f8e9a51"),
    ] {
        let attach = Attach::start_with(args, export.uri());
        let mut guest = FrontEnd::connect(&attach.socket);
        let mut expected = serial.as_bytes().to_vec();
        expected.resize(20, 0);
        guest.memory.write(DATA, &[0xee; 32]);
        assert_eq!(guest.run(0, kind::GET_ID, 0, &[into(DATA, 20)]), OK);
        assert_eq!(guest.memory.read(DATA, 20), expected);
        assert_eq!(guest.memory.read(DATA + 20, 12), [0xee; 12]);
        // With less room there is less of it.
        guest.memory.write(DATA, &[0xee; 32]);
        assert_eq!(guest.run(0, kind::GET_ID, 0, &[into(DATA, 4)]), OK);
        assert_eq!(
            guest.memory.read(DATA, 6),
            [&expected[..4], &[0xee; 2]].concat()
        );
    }
}

#[test]
fn a_read_only_disk_says_so_refuses_what_would_change_it_and_flushes() {
    let mut export = Export::start(&["ram:8M"]);
    let writable = Attach::start(export.uri());
    let data = noise(4096, 3);
    let mut guest = FrontEnd::connect(&writable.socket);
    assert_eq!(guest.features & feature::RO, 0);
    assert_eq!(guest.write(0, 0, &data), OK);
    drop((guest, writable));

    let attach = Attach::start_with(&["--read-only"], export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_ne!(guest.features & feature::RO, 0);
    assert_eq!(guest.write(0, 0, &[9; 512]), IOERR);
    assert_eq!(guest.range(kind::DISCARD, 0, 8, 0), IOERR);
    assert_eq!(guest.range(kind::WRITE_ZEROES, 0, 8, 0), IOERR);
    assert_eq!(guest.flush(0), OK);
    assert_eq!(guest.read(0, 0, 4096), (OK, data));
    drop((guest, attach));
    export.stop();
    assert_eq!(export.counter(1, "writes"), 1);
}

#[test]
fn a_request_outside_the_disk_or_between_blocks_fails_and_the_ring_goes_on() {
    let export = Export::start(&["ram:8M,block-size=4096"]);
    let mut attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    let data = noise(4096, 4);
    assert_eq!(guest.write(0, 16376, &data), OK);
    let bad = [
        (16384, 4096),
        (16376, 8192),
        (u64::MAX / 512, 4096),
        (u64::MAX, 4096),
        (1, 4096),
        (0, 512),
        (0, 4608),
        (0, 100),
        (0, 0),
    ];
    for (sector, len) in bad {
        for (kind, buffer) in [(kind::READ, into(DATA, len)), (kind::WRITE, out(DATA, len))] {
            let buffers = if len == 0 { &[][..] } else { &[buffer] };
            let status = guest.run(0, kind, sector, buffers);
            assert_eq!(
                status, IOERR,
                "request {kind} of {len} bytes at sector {sector}"
            );
        }
        assert_eq!(guest.read(0, 16376, 4096), (OK, data.clone()));
    }
    drop(guest);
    attach.stop();
    assert!(attach.counter("errors") > 0);
}

#[test]
fn an_unknown_request_is_unsupported() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    for kind in [2, 3, 5, 7, 9, 10, 12, 14, 15, 16, 24, 0x8000_0000, u32::MAX] {
        let status = guest.run(0, kind, 0, &[into(DATA, 512)]);
        assert_eq!(status, UNSUPP, "request type {kind}");
    }
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
}

/// Cuts memory into pieces of the given lengths, in turns from both regions.
fn pieces(lengths: &[u32], buffer: fn(u64, u32) -> Buffer) -> Vec<Buffer> {
    let place = |(at, len): (usize, &u32)| {
        let base = if at % 2 == 0 { DATA } else { HIGH };
        buffer(base + 4096 * u64::try_from(at).expect("small") + 3, *len)
    };
    lengths.iter().enumerate().map(place).collect()
}

#[test]
fn data_in_odd_pieces_arrives_as_it_was_directly_and_through_an_indirect_table() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    for (round, lengths) in [
        &[1, 511][..],
        &[1, 1, 1, 509],
        &[513, 1, 3071, 511],
        &[4095, 4093, 4, 4096],
        &[[1; 60].as_slice(), &[452]].concat(),
    ]
    .into_iter()
    .enumerate()
    {
        let len = lengths.iter().sum::<u32>();
        let data = noise(usize::try_from(len).expect("small"), 50 + round as u64);
        for indirect in [false, true] {
            let mut left = &data[..];
            for piece in pieces(lengths, out) {
                let (bytes, rest) = left.split_at(usize::try_from(piece.len).expect("small"));
                guest.memory.write(piece.addr, bytes);
                left = rest;
            }
            let sector = 100 * (round as u64) + u64::from(indirect) * 50;
            let written = guest.run_in(indirect, kind::WRITE, sector, &pieces(lengths, out));
            assert_eq!(written, OK, "{lengths:?}, indirect: {indirect}");
            assert_eq!(
                guest.read(0, sector, data.len()),
                (OK, data.clone()),
                "{lengths:?}"
            );
            let parts = pieces(lengths, into);
            for part in &parts {
                guest
                    .memory
                    .write(part.addr - 1, &vec![0xcc; 2 + part.len as usize]);
            }
            assert_eq!(guest.run_in(indirect, kind::READ, sector, &parts), OK);
            let read = |part: &Buffer| guest.memory.read(part.addr, part.len as usize);
            let gathered: Vec<u8> = parts.iter().flat_map(read).collect();
            assert_eq!(gathered, data, "{lengths:?}, indirect: {indirect}");
            for part in &parts {
                let around = [part.addr - 1, part.addr + u64::from(part.len)];
                assert_eq!(
                    around.map(|addr| guest.memory.byte(addr)),
                    [0xcc; 2],
                    "{part:?}"
                );
            }
        }
    }
}

#[test]
fn a_header_may_be_in_pieces_and_joined_with_data_and_the_status_is_the_last_byte() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    let data = noise(1024, 6);
    // The header in four pieces, the last one with data behind it; the status behind four bytes
    // that the device has no business with.
    let (header, _) = guest.frame(0, 0, kind::WRITE, 40);
    let bytes = guest.memory.read(header.addr, 16);
    let joined = [&bytes[12..], &data[..500]].concat();
    guest.memory.write(DATA, &joined);
    guest.memory.write(HIGH, &data[500..]);
    guest.memory.write(DATA + 4096, &[UNANSWERED; 5]);
    let chain = [
        out(header.addr, 1),
        out(header.addr + 1, 8),
        out(header.addr + 9, 3),
        out(DATA, 504),
        out(HIGH, 524),
        into(DATA + 4096, 5),
    ];
    guest.rings[0].add(&chain);
    guest.rings[0].submit();
    guest.rings[0].wait(1);
    let written = [&[UNANSWERED; 4][..], &[OK]].concat();
    assert_eq!(guest.memory.read(DATA + 4096, 5), written);
    assert_eq!(guest.read(0, 40, 1024), (OK, data.clone()));

    // A read whose data and status share their descriptors.
    let (header, _) = guest.frame(0, 0, kind::READ, 40);
    guest.memory.write(DATA, &[UNANSWERED; 1030]);
    guest.rings[0].add(&[header, into(DATA, 1000), into(DATA + 1000, 25)]);
    guest.rings[0].submit();
    let used = guest.rings[0].wait(1);
    assert_eq!(used[0].len, 1025);
    let expected = [&data[..], &[OK], &[UNANSWERED; 5]].concat();
    assert_eq!(guest.memory.read(DATA, 1030), expected);
}

#[test]
fn the_used_length_is_what_was_written() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    for (kind, sector, buffers, written) in [
        (kind::READ, 0, &[into(DATA, 4096)][..], 4097),
        (kind::WRITE, 0, &[out(DATA, 4096)], 1),
        (kind::FLUSH, 0, &[], 1),
        (kind::GET_ID, 0, &[into(DATA, 20)], 21),
        (kind::READ, 1 << 40, &[into(DATA, 4096)], 1),
    ] {
        guest.add(0, 0, kind, sector, buffers);
        guest.rings[0].submit();
        let used = guest.rings[0].wait(1);
        assert_eq!(used[0].len, written, "request {kind}");
    }
}
