//! Messages as such: refused, in pieces, with descriptors, at the end of a connection.

use super::*;

#[test]
fn a_configuration_request_that_makes_no_sense_is_answered_without_payload() {
    let mut bench = Bench::new();
    bench.negotiate();
    let get_config = FrontendReq::GET_CONFIG as u32;
    // No bytes at all, too little room, past what there is, past what the library knows.
    for (size, payload) in [(0_u32, 0), (60, 4), (250, 250), (0x2000, 60)] {
        let mut body = [7_u32, size, 0].map(u32::to_le_bytes).concat();
        body.resize(12 + payload, 0);
        bench.send(get_config, 1, &body);
        let (code, flags, reply) = bench.receive();
        assert_eq!((code, flags), (get_config, 5));
        assert_eq!(reply, [7_u32, 0, 0].map(u32::to_le_bytes).concat());
    }
    bench.goes_on();
}

#[test]
fn refused_messages_are_answered_and_the_session_goes_on() {
    let mut bench = Bench::new();
    bench.negotiate();
    let code = |request: FrontendReq| request as u32;
    // Refused by the handler.
    bench.refused(
        code(FrontendReq::SET_FEATURES),
        &(1_u64 << 60).to_le_bytes(),
    );
    bench.refused(code(FrontendReq::SET_VRING_NUM), &state(0, 12));
    bench.refused(code(FrontendReq::SET_VRING_NUM), &state(4, 16));
    bench.refused(code(FrontendReq::SET_VRING_BASE), &state(0, 0x1_0000));
    // Refused by the library with an answer of its own.
    bench.refused(code(FrontendReq::SET_MEM_TABLE), &[0; 8]);
    bench.refused(code(FrontendReq::SET_BACKEND_REQ_FD), &[]);
    // Refused by the library without one: wrong size, wrong value, missing or extra descriptor.
    bench.refused(code(FrontendReq::SET_OWNER), &[0; 8]);
    bench.refused(code(FrontendReq::SET_VRING_NUM), &[0; 4]);
    bench.refused(code(FrontendReq::SET_VRING_ENABLE), &state(0, 2));
    bench.refused(code(FrontendReq::SET_VRING_KICK), &0_u64.to_le_bytes());
    bench.refused(code(FrontendReq::ADD_MEM_REG), &[0; 40]);
    bench.refused(code(FrontendReq::SET_CONFIG), &[0; 4]);
    // Not on offer.
    bench.refused(code(FrontendReq::SET_INFLIGHT_FD), &[0; 20]);
    // Unknown to the library, which would lose its place in the stream.
    bench.refused(4711, b"whatever this is");
    bench.refused(0, &[0; 8]);
    bench.refused(4711, &[0; 5000]);
    bench.goes_on();
    assert_eq!(bench.worker.events(), [""; 0]);
    bench.close().3.expect("orderly");
}

#[test]
fn a_descriptor_where_none_belongs_is_refused_and_closed() {
    let mut bench = Bench::new();
    bench.negotiate();
    let (mut reader, writer) = std::io::pipe().expect("pipe");
    let message = [
        FrontendReq::SET_VRING_NUM as u32,
        1 | 8,
        8,
        0,
        u32::from(SIZE),
    ];
    let message = message.map(u32::to_le_bytes).concat();
    let files = [writer.as_raw_fd()];
    vmm_sys_util::sock_ctrl_msg::ScmSocket::send_with_fds(&bench.raw, &[&message[..]], &files)
        .expect("send");
    assert_eq!(bench.receive().2, 1_u64.to_le_bytes());
    drop(writer);
    assert_eq!(reader.read(&mut [0]).expect("end"), 0, "our copy is closed");
    bench.goes_on();
}

#[test]
fn messages_sent_without_waiting_keep_their_descriptors_apart() {
    let mut bench = Bench::new();
    bench.negotiate();
    bench.share_memory();
    // No acknowledgements: the next messages are in the socket before the first is handled.
    bench.front.set_hdr_flags(VhostUserHeaderFlag::empty());
    for _ in 0..50 {
        bench.set_up_ring(0);
        bench.set_up_ring(1);
        bench.front.set_vring_enable(0, true).expect("enable");
        bench.front.set_vring_enable(1, true).expect("enable");
        assert_eq!(bench.front.get_vring_base(0).expect("base"), 0);
        assert_eq!(bench.front.get_vring_base(1).expect("base"), 0);
        let round = ["start 0", "start 1", "stop 0", "stop 1"];
        assert_eq!(bench.worker.events(), round);
        bench.front.set_vring_enable(0, false).expect("disable");
        bench.front.set_vring_enable(1, false).expect("disable");
    }
}

#[test]
fn channels_sent_without_waiting_are_kept_apart_from_each_other_and_from_other_descriptors() {
    let mut bench = Bench::new();
    bench.negotiate();
    bench.front.set_hdr_flags(VhostUserHeaderFlag::empty());
    for _ in 0..50 {
        let mut ours = Vec::new();
        for index in 0..3 {
            let (near, far) = UnixStream::pair().expect("a pair");
            bench.front.set_vring_call(0, &bench.call).expect("call");
            bench.front.set_backend_request_fd(&far).expect("given");
            bench
                .front
                .set_vring_kick(index, &bench.kick)
                .expect("kick");
            ours.push(near);
        }
        // Answered, so that all was handled before.
        bench.goes_on();
        let last = ours.pop().expect("three");
        for mut replaced in ours {
            assert_eq!(replaced.read(&mut [0]).expect("the end"), 0);
        }
        assert!(bench.device.set_capacity(1));
        let mut message = [0; 12];
        (&last).read_exact(&mut message).expect("a notice");
    }
}

#[test]
fn messages_in_pieces_are_put_together() {
    let bench = Bench::new();
    let message = [FrontendReq::SET_VRING_NUM as u32, 1, 8, 0, 7];
    for byte in message.map(u32::to_le_bytes).concat() {
        (&bench.raw).write_all(&[byte]).expect("send");
        std::thread::sleep(Duration::from_millis(1));
    }
    bench.goes_on();
}

#[test]
fn a_message_of_absurd_size_ends_the_session() {
    let bench = Bench::new();
    let message = [4711, 1, u32::MAX].map(u32::to_le_bytes).concat();
    (&bench.raw).write_all(&message).expect("send");
    assert!(bench.close().3.is_err());
}

#[test]
fn a_connection_that_ends_inside_a_message_is_an_error() {
    for part in [5, 12, 15] {
        let bench = Bench::new();
        let message = [FrontendReq::SET_VRING_NUM as u32, 1, 8, 0, 7];
        let message = message.map(u32::to_le_bytes).concat();
        (&bench.raw).write_all(&message[..part]).expect("send");
        assert!(bench.close().3.is_err(), "{part} bytes");
    }
}

#[test]
fn features_outside_the_offer_and_legacy_drivers_are_refused() {
    let mut bench = Bench::new();
    bench.negotiate();
    let offer = bench.device.features();
    assert!(bench.front.set_features(offer | 1 << 27).is_err());
    assert!(
        bench
            .front
            .set_features(offer & !bit(VIRTIO_F_VERSION_1))
            .is_err()
    );
    bench.front.set_features(offer).expect("the offer itself");
    let unknown = VhostUserProtocolFeatures::PAGEFAULT.bits();
    let set = FrontendReq::SET_PROTOCOL_FEATURES as u32;
    bench.send(set, 1, &unknown.to_le_bytes());
    bench.goes_on();
}

#[test]
fn a_shut_down_stream_ends_the_session() {
    let (_ours, theirs) = UnixStream::pair().expect("socket pair");
    let handle = theirs.try_clone().expect("clone");
    let worker: Arc<Worker> = Arc::default();
    let thread = std::thread::spawn(move || serve(theirs, Device::new(options()), worker));
    handle
        .shutdown(std::net::Shutdown::Both)
        .expect("shut down");
    thread.join().expect("no panic").expect("orderly");
}

#[test]
fn a_refusal_is_said_once_whoever_finds_the_fault() {
    let mut bench = Bench::new();
    bench.negotiate();
    // No descriptor comes with any of them; the library checks some itself.
    for request in [
        FrontendReq::SET_MEM_TABLE,
        FrontendReq::SET_CONFIG,
        FrontendReq::SET_BACKEND_REQ_FD,
        FrontendReq::GPU_SET_SOCKET,
        FrontendReq::SET_INFLIGHT_FD,
        FrontendReq::ADD_MEM_REG,
    ] {
        bench.refused(request as u32, &[]);
        // Another answer to it would be taken for this one.
        bench.goes_on();
    }
}
