//! What the device offers over vhost-user, and what it makes of a front-end that asks wrongly.

use std::os::fd::AsRawFd;
use std::time::Duration;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::daemons::{Attach, Export};
use crate::front_end::{DATA, FrontEnd, OK, SECTOR, Setup, feature, kind, negotiate};
use crate::memory::{memfd, user_addr};
use crate::noise::noise;
use crate::raw::{self, Raw};
use crate::ring::{into, out};

#[test]
fn the_features_on_offer_are_exactly_these() {
    let bits = |bits: &[u32]| bits.iter().fold(0_u64, |all, bit| all | 1 << bit);
    // SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES,
    // the bit that has writes logged, INDIRECT_DESC, EVENT_IDX, the vhost-user bit for protocol features, VERSION_1.
    let expected = bits(&[2, 6, 9, 10, 11, 12, 13, 14, 26, 28, 29, 30, 32]);
    // MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS,
    // DEVICE_STATE, GET_VRING_BASE_INFLIGHT, GET_VRING_BASE_SKIP_DRAIN.
    let protocol = bits(&[0, 1, 3, 5, 9, 12, 13, 15, 19, 20, 23]);
    let export = Export::start(&["ram:8M", "ram:8M,block-size=4096"]);
    for uri in &export.uris {
        for (args, expected) in [
            (&[][..], expected),
            (&["--read-only"], expected | feature::RO),
        ] {
            let attach = Attach::start_with(args, uri);
            let mut front_end = Raw::connect(&attach.socket);
            assert_eq!(front_end.get(raw::GET_FEATURES), expected);
            assert_eq!(front_end.get(raw::GET_PROTOCOL_FEATURES), protocol);
        }
    }
}

#[test]
fn the_configuration_space_can_be_read_in_any_length_up_to_256() {
    let export = Export::start(&["ram:8M,block-size=4096"]);
    let attach = Attach::start(export.uri());
    let (mut frontend, _) = negotiate(&attach.socket, 0);
    let flags = VhostUserConfigFlags::empty();
    let mut get = |offset: u32, size: usize| {
        let length = u32::try_from(size).expect("small");
        let answer = frontend.get_config(offset, length, flags, &vec![0; size]);
        answer.map(|(_, bytes)| bytes)
    };
    let whole = get(0, 256).expect("all of it");
    for size in 1..=256 {
        assert_eq!(
            get(0, size).expect("GET_CONFIG"),
            whole[..size],
            "{size} bytes"
        );
    }
    for offset in 1..256 {
        let from = usize::try_from(offset).expect("small");
        assert_eq!(
            get(offset, 256 - from).expect("GET_CONFIG"),
            whole[from..],
            "from {offset}"
        );
    }
    let field = |at: usize, len: usize| &whole[at..at + len];
    assert_eq!(field(0, 8), (8_u64 << 20 >> 9).to_le_bytes(), "capacity");
    assert_eq!(field(20, 4), 4096_u32.to_le_bytes(), "blk_size");
    assert_eq!(field(32, 1), [1], "writeback");
    assert_eq!(field(34, 2), 64_u16.to_le_bytes(), "num_queues");
    assert_eq!(field(60, 196), [0; 196]);

    // Past the end it is refused by an answer without contents, and the session goes on.
    drop(frontend);
    let mut front_end = Raw::negotiated(&attach.socket);
    for (offset, size) in [(0, 257), (255, 2), (1, 256), (u32::MAX, 1), (0, u32::MAX)] {
        let mut body = [offset, size, 0].map(u32::to_le_bytes).concat();
        body.resize(12 + usize::try_from(size.min(260)).expect("small"), 0);
        front_end.send(raw::GET_CONFIG, raw::VERSION, &body);
        let answer = front_end.reply(raw::GET_CONFIG);
        assert_eq!(
            answer.get(4..8),
            Some(&[0; 4][..]),
            "{size} bytes at {offset}: {answer:?}"
        );
    }
    assert_eq!(front_end.get(raw::GET_QUEUE_NUM), 64);
}

#[test]
fn sixty_four_queues_can_be_used_at_once() {
    let export = Export::start(&["ram:64M"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect_with(
        &attach.socket,
        Setup {
            rings: 64,
            ..Setup::default()
        },
    );
    assert!(guest.frontend.get_queue_num().expect("GET_QUEUE_NUM") >= 64);
    let place = |ring: usize| ((ring * 8) as u64, DATA + (ring as u64) * 4096);
    for (kind, buffer) in [(kind::WRITE, out as fn(_, _) -> _), (kind::READ, into)] {
        for ring in 0..64 {
            let (sector, at) = place(ring);
            match kind {
                kind::WRITE => guest.memory.write(at, &noise(4096, ring as u64)),
                _ => guest.memory.write(at, &[0; 4096]),
            }
            guest.add(ring, 0, kind, sector, &[buffer(at, 4096)]);
        }
        guest.rings.iter_mut().for_each(crate::ring::Ring::submit);
        for ring in 0..64 {
            guest.rings[ring].wait(1);
            assert_eq!(guest.status(ring, 0), OK);
            assert!(guest.memory.read(place(ring).1, 4096) == noise(4096, ring as u64));
        }
    }
}

#[test]
fn num_queues_is_what_was_asked_for() {
    let export = Export::start(&["ram:8M"]);
    for queues in [1, 256] {
        let attach = Attach::start_with(&["--num-queues", &queues.to_string()], export.uri());
        let mut front_end = Raw::negotiated(&attach.socket);
        assert_eq!(front_end.get(raw::GET_QUEUE_NUM), queues);
        let body = [34_u32, 2, 0].map(u32::to_le_bytes).concat();
        front_end.send(
            raw::GET_CONFIG,
            raw::VERSION,
            &[&body[..], &[0; 2]].concat(),
        );
        let answer = front_end.reply(raw::GET_CONFIG);
        assert_eq!(
            answer[12..],
            u16::try_from(queues).expect("small").to_le_bytes()
        );
    }
}

#[test]
fn a_refused_message_is_answered_and_the_session_goes_on() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect_with(
        &attach.socket,
        Setup {
            rings: 2,
            ..Setup::default()
        },
    );
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    let frontend = &guest.frontend;
    let config = guest.rings[1].config();
    let outside = vhost::VringConfigData {
        desc_table_addr: user_addr(1 << 60),
        ..config
    };
    assert!(
        frontend.set_features(1 << 50 | guest.features).is_err(),
        "unknown features"
    );
    assert!(frontend.set_features(0).is_err(), "a legacy driver");
    assert!(
        frontend.set_vring_num(1, 100).is_err(),
        "a ring of 100 entries"
    );
    assert!(frontend.set_vring_num(0, 64).is_err(), "a ring that runs");
    assert!(frontend.set_vring_base(0, 7).is_err(), "a ring that runs");
    assert!(
        frontend.set_vring_addr(1, &outside).is_err(),
        "a ring outside the memory"
    );
    assert!(!guest.set_config(0, 1), "the capacity");
    assert!(!guest.set_config(32, 2), "a cache mode that there is not");
    let nowhere = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: 4096,
        userspace_addr: user_addr(0),
        mmap_offset: 0,
        mmap_handle: memfd(4096).as_raw_fd(),
    };
    let file = memfd(4096);
    let overlapping = VhostUserMemoryRegionInfo {
        mmap_handle: file.as_raw_fd(),
        ..nowhere
    };
    assert!(
        guest.frontend.add_mem_region(&overlapping).is_err(),
        "a region twice"
    );
    let elsewhere = VhostUserMemoryRegionInfo {
        guest_phys_addr: 1 << 50,
        ..overlapping
    };
    assert!(
        guest.frontend.remove_mem_region(&elsewhere).is_err(),
        "no such region"
    );
    assert_eq!(guest.read(0, 0, 512), (OK, vec![1; 512]));
    assert_eq!(guest.write(1, 1, &[2; 512]), OK);
}

#[test]
fn what_is_no_request_of_the_protocol_is_refused_in_good_order() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut front_end = Raw::negotiated(&attach.socket);
    let u32s = |words: &[u32]| {
        words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<_>>()
    };
    for (request, body) in [
        (0, vec![]),
        (99, vec![1, 2, 3]),
        (u32::MAX, vec![0; 4096]),
        (raw::SET_VRING_NUM, u32s(&[64, 128])),
        (raw::SET_VRING_NUM, u32s(&[0])),
        (raw::SET_VRING_NUM, u32s(&[0, 128, 0])),
        (raw::SET_VRING_ENABLE, u32s(&[1 << 30, 1])),
        (raw::SET_VRING_BASE, u32s(&[0, 1 << 16])),
        (raw::SET_FEATURES, vec![]),
        (raw::SET_CONFIG, u32s(&[0, 400, 0])),
        (raw::SET_INFLIGHT_FD, vec![0; 24]),
        (raw::ADD_MEM_REG, vec![0; 40]),
    ] {
        assert!(
            !front_end.acknowledged(request, &body),
            "request {request}: {body:?}"
        );
        assert_eq!(
            front_end.get(raw::GET_QUEUE_NUM),
            64,
            "after request {request}: {body:?}"
        );
    }
    // Without the wish for an acknowledgement there is none.
    front_end.send(99, raw::VERSION, &[0; 8]);
    assert!(front_end.is_silent());
    // Nor is there a way to refuse this one, so a ring that does not exist stands at 0.
    front_end.send(raw::GET_VRING_BASE, raw::VERSION, &u32s(&[200, 0]));
    assert_eq!(front_end.reply(raw::GET_VRING_BASE), u32s(&[200, 0]));
    drop(front_end);

    // What is no message at all ends the session, and only that.
    for bytes in [
        &[0xff; 100][..],
        &[0; 5],
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ] {
        let mut stranger = Raw::connect(&attach.socket);
        stranger.send_bytes(bytes);
        drop(stranger);
    }
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
}

#[test]
fn memory_comes_and_goes_while_rings_run() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    assert!(
        guest
            .frontend
            .get_max_mem_slots()
            .expect("GET_MAX_MEM_SLOTS")
            >= 32
    );
    let data = noise(8192, 9);
    assert_eq!(guest.write(0, 0, &data), OK);
    for round in 0..3 {
        let start = (8_u64 + round) << 30;
        let file = memfd(1 << 20);
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: start,
            memory_size: (1 << 20) - 4096,
            userspace_addr: user_addr(start),
            mmap_offset: 4096,
            mmap_handle: file.as_raw_fd(),
        };
        guest.frontend.add_mem_region(&region).expect("ADD_MEM_REG");
        assert_eq!(guest.run(0, kind::READ, 0, &[into(start + 100, 8192)]), OK);
        let mut read = vec![0; 8192];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut read, 4196).expect("the file");
        assert!(read == data, "round {round}");
        guest
            .frontend
            .remove_mem_region(&region)
            .expect("REM_MEM_REG");
        assert_eq!(guest.read(0, 0, 8192), (OK, data.clone()));
    }
}

#[test]
fn event_descriptors_can_be_replaced_while_the_ring_runs() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    for round in 0..20 {
        assert_eq!(guest.write(0, round, &[1; 512]), OK);
        let kick = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        guest
            .frontend
            .set_vring_kick(0, &kick)
            .expect("SET_VRING_KICK");
        guest.rings[0].kick = kick;
        assert_eq!(guest.write(0, round, &[2; 512]), OK);
        let call = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        guest
            .frontend
            .set_vring_call(0, &call)
            .expect("SET_VRING_CALL");
        guest.rings[0].replace_call(call);
    }
}

#[test]
fn a_reset_device_starts_anew() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    guest.frontend.reset_device().expect("RESET_DEVICE");
    guest.add(0, 0, kind::READ, 0, &[into(DATA, 512)]);
    guest.rings[0].submit();
    guest.rings[0].kick();
    assert!(
        guest.rings[0].is_silent(Duration::from_millis(200)),
        "the ring still runs"
    );
    guest
        .frontend
        .set_features(guest.features)
        .expect("SET_FEATURES");
    guest.start(0, 1);
    guest.enable(0, true);
    guest.rings[0].wait(1);
    assert_eq!(guest.status(0, 0), OK);
}

#[test]
fn the_next_front_end_is_served_when_one_is_done_and_waits_until_then() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut first = FrontEnd::connect(&attach.socket);
    assert_eq!(first.write(0, 5, &[1; 512]), OK);
    let mut second = Raw::connect(&attach.socket);
    second.send(raw::GET_FEATURES, raw::VERSION, &[]);
    assert!(second.is_silent(), "two front-ends at once");
    assert_eq!(first.write(0, 6, &[2; 512]), OK);
    drop(first);
    assert_eq!(second.reply(raw::GET_FEATURES).len(), 8);
    drop(second);
    for round in 0..10 {
        let mut guest = FrontEnd::connect(&attach.socket);
        assert_eq!(
            guest.read(0, 5, 1024).1,
            [[1; 512], [2; 512]].concat(),
            "round {round}"
        );
    }
}

#[test]
fn a_front_end_that_vanishes_in_the_middle_leaves_correct_data_to_the_next() {
    const LEN: u32 = 64 << 10;
    const REQUESTS: u64 = 32;
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    let old = noise(LEN as usize, 10);
    let new = noise(LEN as usize, 11);
    let sectors = u64::from(LEN) / SECTOR;
    for number in 0..REQUESTS {
        assert_eq!(guest.write(0, sectors * number, &old), OK);
    }
    export.process.pause();
    for number in 0..REQUESTS {
        let at = DATA + u64::from(LEN) * number;
        guest.memory.write(at, &new);
        let slot = usize::try_from(number).expect("small");
        guest.add(0, slot, kind::WRITE, sectors * number, &[out(at, LEN)]);
    }
    guest.rings[0].submit();
    assert!(
        guest.rings[0].is_silent(Duration::from_millis(100)),
        "a stopped target answered"
    );
    drop(guest);
    export.process.resume();
    let mut next = FrontEnd::connect(&attach.socket);
    for number in 0..REQUESTS {
        let (status, read) = next.read(0, sectors * number, LEN as usize);
        assert_eq!(status, OK);
        // What was not answered may or may not have been done, sector by sector.
        for (sector, read) in read.chunks(512).enumerate() {
            let at = sector * 512..sector * 512 + 512;
            let known = read == &old[at.clone()] || read == &new[at];
            assert!(
                known,
                "request {number}, sector {sector}: neither old nor new"
            );
        }
        assert_eq!(next.write(0, sectors * number, &old), OK);
        assert!(next.read(0, sectors * number, LEN as usize).1 == old);
    }
}
