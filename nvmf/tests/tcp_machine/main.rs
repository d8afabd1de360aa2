//! The NVMe/TCP machine by itself: every split of the stream, and every offence with its FES and
//! FEI.
#![expect(clippy::unwrap_used, reason = "a test ends when something is missing")]

use nvmf::spec::sqe::{PSDT_SGL, sgl_type};
use nvmf::spec::{Cqe, Sqe, Status};
use nvmf::tcp::{Controller, ControllerEvent, Digests, Direction, Host, Limits, QPair, Role, Want};
use zerocopy::IntoBytes;

mod abandon;
mod align;
mod digest;
mod r2t;
mod stepping;
mod wire;

use stepping::{feed, pattern, sent};

const QUEUE_SIZE: u32 = 8;

fn limits() -> Limits {
    Limits {
        rx_align: 4,
        tx_align: 4,
        max_h2c_data: 4096,
        max_r2t: 2,
        in_capsule_limit: 1024,
        digests: Digests::default(),
        admin: false,
    }
}

fn host() -> QPair<Host> {
    QPair::host(QUEUE_SIZE, limits())
}

fn controller() -> QPair<Controller> {
    QPair::controller(QUEUE_SIZE, false, limits())
}

/// Writes and reads of several sizes, every stream cut at every chunk size, with and without
/// digests.
#[test]
fn a_stream_may_be_cut_anywhere() {
    for chunk in (1..200).chain([1000, 5000]) {
        for len in [1usize, 512, 1024, 1025, 9000] {
            for (header, data) in [(false, false), (true, false), (false, true), (true, true)] {
                let limits = Limits {
                    digests: Digests { header, data },
                    ..limits()
                };
                write_then_read(chunk, len, limits, limits);
            }
        }
    }
}

fn write_then_read(chunk: usize, len: usize, of_host: Limits, of_controller: Limits) {
    let mut host = QPair::host(QUEUE_SIZE, of_host);
    let mut controller = QPair::controller(QUEUE_SIZE, false, of_controller);
    let data = pattern(len);
    let mut stored = vec![0; len];
    let mut store = |_, offset: u32, bytes: &[u8]| {
        stored[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    };
    let mut command = None;

    // Write: capsule, R2T when the data is not in it, H2CData, response.
    host.submit(Sqe::write(1, 0, 1, false), Direction::Out, len as u32)
        .unwrap();
    let stream = sent(&mut host, |_| data.clone());
    let mut take = |machine: &mut QPair<Controller>| {
        if command.is_none() {
            command = machine.event();
        }
    };
    feed(&mut controller, &stream, chunk, &mut take, &mut store).unwrap();
    take(&mut controller);
    let Some(ControllerEvent::Command {
        slot,
        data_len,
        in_capsule,
        ..
    }) = command
    else {
        panic!("no command: {command:?}");
    };
    assert_eq!((data_len as usize, in_capsule), (len, len <= 1024));
    if !in_capsule {
        controller.fetch(slot, 0, data_len).unwrap();
        let r2t = sent(&mut controller, |_| Vec::new());
        feed(&mut host, &r2t, chunk, |_| (), |_, _, _| ()).unwrap();
        let stream = sent(&mut host, |_| data.clone());
        feed(&mut controller, &stream, chunk, |_| (), &mut store).unwrap();
    }
    let intact = true;
    assert_eq!(
        controller.event(),
        Some(ControllerEvent::Fetched { slot, intact })
    );
    assert!(stored == data);
    controller.respond(slot, Cqe::default());
    let response = sent(&mut controller, |_| Vec::new());
    feed(&mut host, &response, chunk, |_| (), |_, _, _| ()).unwrap();
    let done = host.completed().unwrap();
    assert!(done.cqe.status().is_success() && done.transferred as usize == len);

    // Read: capsule, C2HData with the SUCCESS flag in place of a response.
    host.submit(Sqe::read(1, 0, 1), Direction::In, len as u32)
        .unwrap();
    let stream = sent(&mut host, |_| Vec::new());
    feed(&mut controller, &stream, chunk, |_| (), |_, _, _| ()).unwrap();
    let Some(ControllerEvent::Command { slot, .. }) = controller.event() else {
        panic!()
    };
    controller.send(slot, 0, len as u32, true).unwrap();
    controller.respond(slot, Cqe::default());
    let stream = sent(&mut controller, |_| data.clone());
    let mut read = vec![0; len];
    let place = |_, offset: u32, bytes: &[u8]| {
        read[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    };
    feed(&mut host, &stream, chunk, |_| (), place).unwrap();
    let done = host.completed().unwrap();
    assert!(done.cqe.status().is_success() && !done.sqhd_valid);
    assert!(read == data);
    assert_eq!((host.outstanding(), controller.outstanding()), (0, 0));
}

fn header(kind: u8, flags: u8, hlen: u8, pdo: u8, plen: u32) -> Vec<u8> {
    let mut bytes = vec![kind, flags, hlen, pdo];
    bytes.extend_from_slice(&plen.to_le_bytes());
    bytes.resize(usize::from(hlen.max(8)), 0);
    bytes
}

fn data_pdu(kind: u8, flags: u8, cccid: u16, ttag: u16, offset: u32, len: u32) -> Vec<u8> {
    let r2t = kind == 0x09;
    let (pdo, plen) = if r2t { (0, 24) } else { (24, 24 + len) };
    let mut bytes = header(kind, flags, 24, pdo, plen);
    bytes[8..10].copy_from_slice(&cccid.to_le_bytes());
    bytes[10..12].copy_from_slice(&ttag.to_le_bytes());
    bytes[12..16].copy_from_slice(&offset.to_le_bytes());
    bytes[16..20].copy_from_slice(&len.to_le_bytes());
    if !r2t {
        bytes.resize(24 + len as usize, 0xaa);
    }
    bytes
}

fn response(cid: u16) -> Vec<u8> {
    let mut bytes = header(0x05, 0, 24, 0, 24);
    bytes[8..].copy_from_slice(Cqe::new(cid, Status::SUCCESS).as_bytes());
    bytes
}

fn offence<R: Role>(machine: &mut QPair<R>, stream: &[u8]) -> (u16, u32) {
    let error = feed(machine, stream, stream.len().max(1), |_| (), |_, _, _| ()).unwrap_err();
    // Once, and then silence.
    let first = machine.transmit().unwrap();
    assert_eq!(first.header()[8..10], error.fes.0.to_le_bytes());
    assert_eq!(first.header()[10..14], error.fei.to_le_bytes());
    assert!(machine.transmit().is_none());
    assert_eq!(machine.want(), Want::Nothing);
    (error.fes.0, error.fei)
}

#[test]
fn a_termination_request_carries_the_offending_header_and_128_bytes_of_it_at_most() {
    for (hlen, sent, carried) in [
        (0, 8, 8),
        (72, 8, 8),
        (72, 72, 72),
        (72, 99, 72),
        (255, 255, 128),
    ] {
        let mut bytes = header(0x08, 0, hlen, 0, 0);
        bytes.resize(sent, 0x5a);
        let mut host = host();
        feed(&mut host, &bytes, sent, |_| (), |_, _, _| ()).unwrap_err();
        let term = host.transmit().unwrap();
        assert_eq!(term.header()[24..], bytes[..carried]);
        assert_eq!(term.header()[4..8], (24 + carried as u32).to_le_bytes());
    }
}

#[test]
fn offences_in_the_common_header_are_reported_lowest_first() {
    // What a controller receives.
    for (bytes, expected) in [
        (header(0x08, 0xff, 0, 0xff, 0), (1, 0)),
        (header(0x05, 0, 24, 0, 24), (1, 0)),
        (header(0x00, 0, 128, 0, 128), (1, 0)),
        (header(0x04, 1, 0, 0xff, 0), (1, 1)),
        (header(0x06, 8, 24, 24, 28), (1, 1)),
        (header(0x04, 0, 71, 0, 0), (1, 2)),
        (header(0x04, 0, 72, 0, 80), (1, 3)),
        (header(0x04, 0, 72, 71, 80), (1, 3)),
        (header(0x04, 0, 72, 74, 80), (1, 3)),
        (header(0x04, 0, 72, 84, 80), (1, 3)),
        (header(0x04, 0, 72, 0, 71), (1, 4)),
        (header(0x04, 0, 72, 72, 72 + 1025), (1, 4)),
        (header(0x04, 0, 72, 72, u32::MAX), (1, 4)),
    ] {
        assert_eq!(offence(&mut controller(), &bytes), expected, "{bytes:02x?}");
    }
    // What a host receives.
    for (bytes, expected) in [
        (header(0x04, 0, 72, 0, 72), (1, 0)),
        (header(0x07, 8, 24, 24, 28), (1, 1)),
        (header(0x07, 1, 24, 24, 28), (1, 1)),
        (header(0x05, 4, 24, 0, 24), (1, 1)),
        (header(0x05, 0, 23, 0, 24), (1, 2)),
        (header(0x05, 0, 24, 24, 24), (1, 3)),
        (header(0x09, 0, 24, 24, 24), (1, 3)),
        (header(0x07, 0, 24, 0, 28), (1, 3)),
        (header(0x05, 0, 24, 0, 25), (1, 4)),
        (header(0x09, 0, 24, 0, 28), (1, 4)),
    ] {
        assert_eq!(offence(&mut host(), &bytes), expected, "{bytes:02x?}");
    }
}

/// A host with one command outstanding, and its CID.
fn with_command(direction: Direction, len: u32) -> (QPair<Host>, u16) {
    let mut host = host();
    let (_, cid) = host
        .submit(Sqe::write(1, 0, 1, false), direction, len)
        .unwrap();
    sent(&mut host, |_| vec![0; len as usize]);
    (host, cid)
}

#[test]
fn a_host_checks_data_against_the_command_it_is_for() {
    let read = || with_command(Direction::In, 100);
    let cid = read().1;
    for (bytes, expected) in [
        (data_pdu(0x07, 4, cid ^ 0x100, 0, 0, 100), (1, 8)),
        (data_pdu(0x07, 4, cid, 0, 0, 101), (4, 0)),
        (data_pdu(0x07, 4, cid, 0, u32::MAX, 100), (4, 0)),
        (data_pdu(0x07, 0, cid, 0, 1, 50), (2, 0)),
        (data_pdu(0x07, 0, cid, 0, 0, 100), (2, 0)),
        (data_pdu(0x09, 0, cid, 0, 0, 100), (1, 8)),
        (response(cid ^ 0x100), (1, 20)),
    ] {
        assert_eq!(offence(&mut read().0, &bytes), expected, "{bytes:02x?}");
    }
    let wrong_length = |cccid| {
        let mut bytes = data_pdu(0x07, 4, cccid, 0, 0, 100);
        bytes[16] = 99;
        bytes
    };
    assert_eq!(offence(&mut read().0, &wrong_length(cid)), (1, 16));
    // The field before it is wrong, too.
    assert_eq!(offence(&mut read().0, &wrong_length(cid ^ 0x100)), (1, 8));
    // More after the last.
    let twice = [
        data_pdu(0x07, 4, cid, 0, 0, 50),
        data_pdu(0x07, 4, cid, 0, 50, 50),
    ]
    .concat();
    assert_eq!(offence(&mut read().0, &twice), (2, 0));
}

#[test]
fn a_host_checks_r2t_against_the_command_it_is_for() {
    let write = || with_command(Direction::Out, 5000);
    let cid = write().1;
    let r2t = |offset, len| data_pdu(0x09, 0, cid, 7, offset, len);
    for (bytes, expected) in [
        (data_pdu(0x09, 0, cid ^ 0x100, 7, 0, 5000), (1, 8)),
        (r2t(0, 0), (1, 16)),
        (r2t(1, 10), (2, 0)),
        (r2t(0, 5001), (4, 0)),
        ([r2t(0, 10), r2t(10, 10), r2t(20, 10)].concat(), (5, 0)),
        ([r2t(0, 10), r2t(0, 10)].concat(), (2, 0)),
        (data_pdu(0x07, 4, cid, 0, 0, 100), (2, 0)),
        (data_pdu(0x07, 4, cid ^ 0x100, 0, 0, 100), (1, 8)),
    ] {
        assert_eq!(offence(&mut write().0, &bytes), expected, "{bytes:02x?}");
    }
    // In-capsule data is not asked for.
    let (mut host, cid) = with_command(Direction::Out, 512);
    assert_eq!(
        offence(&mut host, &data_pdu(0x09, 0, cid, 0, 0, 512)),
        (1, 8)
    );
}

#[test]
fn a_controller_checks_data_against_what_it_asked_for() {
    let asked = || {
        let (mut host, mut controller) = (host(), controller());
        let (_, cid) = host
            .submit(Sqe::write(1, 0, 1, false), Direction::Out, 9000)
            .unwrap();
        let stream = sent(&mut host, |_| Vec::new());
        feed(&mut controller, &stream, 72, |_| (), |_, _, _| ()).unwrap();
        let Some(ControllerEvent::Command { slot, .. }) = controller.event() else {
            panic!()
        };
        controller.fetch(slot, 0, 9000).unwrap();
        sent(&mut controller, |_| Vec::new());
        (controller, cid, slot)
    };
    let (_, cid, ttag) = asked();
    for (bytes, expected) in [
        (data_pdu(0x06, 0, cid, ttag + 1, 0, 100), (1, 10)),
        (data_pdu(0x06, 0, cid, 0xffff, 0, 100), (1, 10)),
        (data_pdu(0x06, 0, cid + 1, ttag, 0, 100), (1, 8)),
        (data_pdu(0x06, 0, cid + 1, 0xffff, 0, 100), (1, 8)),
        (data_pdu(0x06, 0, cid, ttag, 0, 4097), (5, 0)),
        (data_pdu(0x06, 0, cid, ttag, 8999, 2), (4, 0)),
        (data_pdu(0x06, 0, cid, ttag, 4, 100), (2, 0)),
        (data_pdu(0x06, 4, cid, ttag, 0, 100), (2, 0)),
    ] {
        assert_eq!(offence(&mut asked().0, &bytes), expected, "{bytes:02x?}");
    }
    // A length that is not the PDU's, and something else that is wrong.
    for (cccid, ttag, carried, expected) in [
        (cid, ttag, 100, (1, 16)),
        (cid, ttag, 5000, (1, 16)),
        (cid, ttag + 1, 100, (1, 10)),
        (cid + 1, ttag, 100, (1, 8)),
    ] {
        let mut bytes = data_pdu(0x06, 0, cccid, ttag, 0, carried);
        bytes[16] ^= 1;
        assert_eq!(offence(&mut asked().0, &bytes), expected, "{bytes:02x?}");
    }
}

#[test]
fn more_commands_than_the_queue_holds_end_the_connection() {
    let mut controller = controller();
    let capsule = |cid: u16| {
        let mut sqe = Sqe::flush(1);
        sqe.cid = cid.into();
        sqe.flags = PSDT_SGL;
        let mut bytes = header(0x04, 0, 72, 0, 72);
        bytes[8..].copy_from_slice(sqe.as_bytes());
        bytes
    };
    for cid in 0..QUEUE_SIZE as u16 {
        feed(&mut controller, &capsule(cid), 72, |_| (), |_, _, _| ()).unwrap();
    }
    assert_eq!(offence(&mut controller, &capsule(999)).0, 2);
}

#[test]
fn a_bad_data_description_is_answered_and_the_connection_goes_on() {
    let mut cases = Vec::new();
    let mut case = |edit: fn(&mut Sqe), data: usize, status: Status| {
        let mut sqe = Sqe::write(1, 0, 1, false);
        sqe.flags = PSDT_SGL;
        sqe.cid = 5.into();
        sqe.sgl1.length = 512.into();
        sqe.sgl1.sgl_type = sgl_type::IN_CAPSULE;
        edit(&mut sqe);
        let mut bytes = header(0x04, 0, 72, if data > 0 { 72 } else { 0 }, 72 + data as u32);
        bytes[8..].copy_from_slice(sqe.as_bytes());
        bytes.resize(72 + data, 0);
        cases.push((bytes, status));
    };
    case(|_| (), 511, Status::DATA_SGL_LENGTH_INVALID);
    case(
        |sqe| sqe.sgl1.sgl_type = sgl_type::TRANSPORT,
        512,
        Status::INVALID_FIELD,
    );
    case(|sqe| sqe.sgl1.sgl_type = 0x40, 0, Status::SGL_TYPE_INVALID);
    case(
        |sqe| sqe.sgl1.address = 8.into(),
        512,
        Status::SGL_OFFSET_INVALID,
    );
    case(|sqe| sqe.flags = 0, 512, Status::INVALID_FIELD);
    let mut controller = controller();
    for (bytes, status) in cases {
        feed(&mut controller, &bytes, 100, |_| (), |_, _, _| ()).unwrap();
        assert_eq!(controller.event(), None);
        let answer = sent(&mut controller, |_| Vec::new());
        assert_eq!(answer.len(), 24);
        let word = u16::from_le_bytes([answer[22], answer[23]]);
        assert_eq!(Status::from_wire(word).code(), status.code());
        assert_eq!(answer[20..22], [5, 0]);
    }
}

#[test]
fn a_cid_that_is_outstanding_conflicts_and_the_first_command_is_unharmed() {
    let (mut host, mut controller) = (host(), controller());
    let (_, cid) = host.submit(Sqe::flush(1), Direction::None, 0).unwrap();
    let stream = sent(&mut host, |_| Vec::new());
    let twice = [stream.clone(), stream].concat();
    feed(&mut controller, &twice, 72, |_| (), |_, _, _| ()).unwrap();
    let Some(ControllerEvent::Command { slot, .. }) = controller.event() else {
        panic!()
    };
    assert_eq!(controller.event(), None);
    let answer = sent(&mut controller, |_| Vec::new());
    let word = u16::from_le_bytes([answer[22], answer[23]]);
    assert_eq!(Status::from_wire(word).code(), Status::CID_CONFLICT.code());
    controller.respond(slot, Cqe::default());
    let answer = sent(&mut controller, |_| Vec::new());
    assert_eq!(answer[20..22], cid.to_le_bytes());
}

#[test]
fn success_with_less_data_than_asked_is_a_transfer_error() {
    let (mut host, cid) = with_command(Direction::In, 100);
    let stream = [data_pdu(0x07, 0, cid, 0, 0, 50), response(cid)].concat();
    feed(&mut host, &stream, 7, |_| (), |_, _, _| ()).unwrap();
    let done = host.completed().unwrap();
    assert_eq!(done.cqe.status(), Status::DATA_TRANSFER_ERROR);
    assert_eq!(done.transferred, 50);

    // A write that reports success before its data was asked for has not written it.
    let (mut host, cid) = with_command(Direction::Out, 5000);
    feed(&mut host, &response(cid), 24, |_| (), |_, _, _| ()).unwrap();
    assert_eq!(
        host.completed().unwrap().cqe.status(),
        Status::DATA_TRANSFER_ERROR
    );
}

#[test]
fn a_command_retires_only_when_the_kernel_has_its_data() {
    let mut host = host();
    let (_, cid) = host
        .submit(Sqe::write(1, 0, 1, false), Direction::Out, 512)
        .unwrap();
    let pdu = host.transmit().unwrap();
    feed(&mut host, &response(cid), 24, |_| (), |_, _, _| ()).unwrap();
    assert_eq!(host.completed(), None);
    host.transmitted(pdu.payload.unwrap());
    assert!(host.completed().unwrap().cqe.status().is_success());
}

#[test]
fn an_early_error_stops_data_that_was_asked_for() {
    let (mut host, cid) = with_command(Direction::Out, 9000);
    feed(
        &mut host,
        &data_pdu(0x09, 0, cid, 3, 0, 9000),
        24,
        |_| (),
        |_, _, _| (),
    )
    .unwrap();
    let first = host.transmit().unwrap();
    let mut failed = response(cid);
    failed[22..24].copy_from_slice(&Status::INTERNAL_ERROR.to_wire().to_le_bytes());
    feed(&mut host, &failed, 24, |_| (), |_, _, _| ()).unwrap();
    assert!(host.transmit().is_none());
    host.transmitted(first.payload.unwrap());
    // As many as the kernel took of what was asked for.
    let done = host.completed().unwrap();
    assert_eq!(done.cqe.status(), Status::INTERNAL_ERROR);
    assert_eq!(done.transferred, 4096);
}

#[test]
fn data_that_was_asked_for_and_never_left_is_not_written() {
    let (mut host, cid) = with_command(Direction::Out, 9000);
    let asked = data_pdu(0x09, 0, cid, 3, 0, 9000);
    let stream = [asked, response(cid)].concat();
    feed(&mut host, &stream, 24, |_| (), |_, _, _| ()).unwrap();
    let done = host.completed().unwrap();
    assert_eq!(done.cqe.status(), Status::DATA_TRANSFER_ERROR);
    assert_eq!(done.transferred, 0);
}

#[test]
fn what_is_lost_with_the_connection_counts_what_moved_and_completes_once() {
    let mut host = host();
    let mut submit = |direction, len| {
        let sqe = Sqe::write(1, 0, 1, false);
        host.submit(sqe, direction, len).unwrap().1
    };
    let read = submit(Direction::In, 200);
    let asked = submit(Direction::Out, 9000);
    submit(Direction::Out, 512);
    sent(&mut host, |_| vec![0; 512]);
    // One that is never sent.
    let sqe = Sqe::write(1, 0, 1, false);
    host.submit(sqe, Direction::Out, 100).unwrap();
    let stream = [
        data_pdu(0x07, 0, read, 0, 0, 50),
        data_pdu(0x09, 0, asked, 3, 0, 9000),
        // Cut in the middle.
        data_pdu(0x07, 0, read, 0, 50, 50)[..60].to_vec(),
    ]
    .concat();
    feed(&mut host, &stream, 24, |_| (), |_, _, _| ()).unwrap();
    while host.transmit().unwrap().payload.unwrap().slot != 1 {}
    host.abort_all();
    host.abort_all();
    let lost = |host: &mut QPair<Host>| {
        let done = host.completed()?;
        assert_eq!(done.cqe.status(), Status::ABORTED_BY_HOST);
        assert!(!done.sqhd_valid);
        Some((done.slot, done.transferred))
    };
    let mut all: Vec<_> = std::iter::from_fn(|| lost(&mut host)).collect();
    all.sort_unstable();
    assert_eq!(all, [(0, 50), (1, 0), (2, 512), (3, 0)]);
    assert_eq!((host.outstanding(), host.room()), (0, 7));
    assert!(host.transmit().is_none());
}

#[test]
fn a_stale_cid_never_completes_the_command_that_has_its_slot_now() {
    let mut host = host();
    let (slot, first) = host.submit(Sqe::flush(1), Direction::None, 0).unwrap();
    sent(&mut host, |_| Vec::new());
    feed(&mut host, &response(first), 24, |_| (), |_, _, _| ()).unwrap();
    host.completed().unwrap();
    let (again, second) = host.submit(Sqe::flush(1), Direction::None, 0).unwrap();
    assert_eq!(slot, again);
    assert_ne!(first, second);
    sent(&mut host, |_| Vec::new());
    assert_eq!(offence(&mut host, &response(first)), (1, 20));
}

#[test]
fn a_completion_for_a_command_that_nobody_sent_ends_the_connection() {
    for stranger in [1, 2, 7, 8, 0x0101, 0x7fff, 0xffff] {
        let mut host = host();
        let (_, cid) = host.submit(Sqe::flush(1), Direction::None, 0).unwrap();
        sent(&mut host, |_| Vec::new());
        let unknown = cid.wrapping_add(stranger);
        assert_eq!(
            offence(&mut host, &response(unknown)),
            (1, 20),
            "{stranger}"
        );
        assert!(host.completed().is_none());
    }
}

#[test]
fn large_writes_take_turns_on_the_wire() {
    let mut host = host();
    let cids: Vec<u16> = (0..2)
        .map(|_| {
            host.submit(Sqe::write(1, 0, 1, false), Direction::Out, 12288)
                .unwrap()
                .1
        })
        .collect();
    sent(&mut host, |_| Vec::new());
    for &cid in &cids {
        feed(
            &mut host,
            &data_pdu(0x09, 0, cid, 0, 0, 12288),
            24,
            |_| (),
            |_, _, _| (),
        )
        .unwrap();
    }
    let mut order = Vec::new();
    while let Some(pdu) = host.transmit() {
        order.push(u16::from_le_bytes([pdu.header()[8], pdu.header()[9]]));
    }
    assert_eq!(
        order,
        [cids[0], cids[1], cids[0], cids[1], cids[0], cids[1]]
    );
}

#[test]
fn payload_is_aligned_as_the_peer_asks() {
    let wide = Limits {
        tx_align: 128,
        ..limits()
    };
    let mut host = QPair::host(QUEUE_SIZE, wide);
    host.submit(Sqe::write(1, 0, 1, false), Direction::Out, 512)
        .unwrap();
    let stream = sent(&mut host, |_| pattern(512));
    assert_eq!((stream[3], stream.len()), (128, 128 + 512));
    assert!(stream[72..128].iter().all(|&pad| pad == 0));
    let mut controller = controller();
    let mut stored = vec![0; 512];
    let mut command = None;
    feed(
        &mut controller,
        &stream,
        5,
        |machine| command = machine.event(),
        |_, offset, bytes| stored[offset as usize..][..bytes.len()].copy_from_slice(bytes),
    )
    .unwrap();
    assert!(command.is_some());
    assert_eq!(stored, pattern(512));
}

#[test]
fn a_termination_request_ends_the_machine_with_its_reason_and_no_answer() {
    let mut term = header(0x03, 0, 24, 0, 32);
    term[8] = 4;
    term.extend_from_slice(&[0; 8]);
    let mut host = host();
    feed(&mut host, &term, 3, |_| (), |_, _, _| ()).unwrap();
    assert_eq!(host.terminated().unwrap().unwrap().fes.0, 4);
    assert!(host.transmit().is_none());
    // One that is malformed is not answered either.
    for (hlen, plen, read) in [
        (24, 0, false),
        (24, 23, false),
        (24, 24, true),
        (24, 152, true),
        (24, 153, false),
        (24, u32::MAX, false),
        (23, 24, false),
    ] {
        let mut host = self::host();
        let mut bytes = header(0x03, 0, hlen, 0, plen);
        bytes.resize(152, 0);
        feed(&mut host, &bytes, 24, |_| (), |_, _, _| ()).unwrap();
        assert_eq!(host.terminated().unwrap().is_some(), read, "{hlen} {plen}");
        assert!(host.transmit().is_none());
    }
}

#[test]
fn a_read_that_is_sent_in_part_is_answered_by_an_entry() {
    let (mut host, mut controller) = (host(), controller());
    host.submit(Sqe::read(1, 0, 1), Direction::In, 1000)
        .unwrap();
    let stream = sent(&mut host, |_| Vec::new());
    feed(&mut controller, &stream, 72, |_| (), |_, _, _| ()).unwrap();
    let Some(ControllerEvent::Command { slot, .. }) = controller.event() else {
        panic!()
    };
    controller.send(slot, 0, 999, true).unwrap();
    controller.respond(slot, Cqe::default());
    let stream = sent(&mut controller, |_| pattern(1000));
    // C2HData with LAST_PDU and without SUCCESS, and a response.
    assert_eq!((stream[1], stream.len()), (4, 24 + 999 + 24));
}

#[test]
fn sqhd_counts_the_answers_unless_flow_control_is_off() {
    for on in [true, false] {
        let mut host = host();
        let mut controller = QPair::controller(QUEUE_SIZE, on, limits());
        for answer in 1..20u16 {
            host.submit(Sqe::read(1, 0, 1), Direction::In, 8).unwrap();
            let stream = sent(&mut host, |_| Vec::new());
            feed(&mut controller, &stream, 72, |_| (), |_, _, _| ()).unwrap();
            let Some(ControllerEvent::Command { slot, .. }) = controller.event() else {
                panic!()
            };
            controller.send(slot, 0, 8, true).unwrap();
            controller.respond(slot, Cqe::default());
            let stream = sent(&mut controller, |_| pattern(8));
            feed(&mut host, &stream, 24, |_| (), |_, _, _| ()).unwrap();
            let done = host.completed().unwrap();
            // A success is a flag of the data only without flow control.
            assert_eq!((done.sqhd_valid, stream.len() > 32), (on, on));
            let sqhd = if on { (2 * answer - 1) % 8 } else { 0 };
            assert_eq!(done.cqe.sqhd.get(), sqhd);
            // Other answers are entries in any case.
            host.submit(Sqe::flush(1), Direction::None, 0).unwrap();
            let stream = sent(&mut host, |_| Vec::new());
            feed(&mut controller, &stream, 72, |_| (), |_, _, _| ()).unwrap();
            let Some(ControllerEvent::Command { slot, .. }) = controller.event() else {
                panic!()
            };
            controller.respond(slot, Cqe::default());
            let stream = sent(&mut controller, |_| Vec::new());
            feed(&mut host, &stream, 24, |_| (), |_, _, _| ()).unwrap();
            let done = host.completed().unwrap();
            let sqhd = if on { 2 * answer % 8 } else { 0xffff };
            assert_eq!((done.sqhd_valid, done.cqe.sqhd.get()), (true, sqhd));
        }
    }
}
