//! What is offered and configured: features, configuration space, cache mode.

use super::*;

#[test]
fn the_offer_is_what_is_implemented() {
    let mut bench = Bench::new();
    let features = bench.front.get_features().expect("features");
    // SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES, INDIRECT_DESC,
    // EVENT_IDX, protocol features, VERSION_1, and LOG_ALL, which is vhost's own.
    let bits = [2, 6, 9, 10, 11, 12, 13, 14, 26, 28, 29, 30, 32];
    assert_eq!(features, bits.iter().map(|bit| 1 << bit).sum::<u64>());
    // The library's front-end drops what it does not know, so this is asked without it.
    bench.send(FrontendReq::GET_PROTOCOL_FEATURES as u32, 1, &[]);
    let (_, _, protocol) = bench.receive();
    // MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS,
    // DEVICE_STATE, GET_VRING_BASE_INFLIGHT, GET_VRING_BASE_SKIP_DRAIN.
    let bits = [0, 1, 3, 5, 9, 12, 13, 15, 19, 20, 23];
    let offer = bits.iter().map(|bit| 1 << bit).sum::<u64>();
    assert_eq!(protocol, offer.to_le_bytes());
    let protocol = bench
        .front
        .get_protocol_features()
        .expect("protocol features");
    bench
        .front
        .set_protocol_features(protocol)
        .expect("set protocol features");
    assert_eq!(bench.front.get_queue_num().expect("queues"), 4);
    assert_eq!(bench.front.get_max_mem_slots().expect("slots"), 509);
    bench.close().3.expect("orderly");
}

#[test]
fn a_read_only_disk_says_so() {
    let read_only = DeviceOptions {
        read_only: true,
        ..options()
    };
    let bench = Bench::with(read_only);
    let features = bench.front.get_features().expect("features");
    assert_ne!(features & bit(VIRTIO_BLK_F_RO), 0);
}

#[test]
fn the_configuration_is_served_in_any_size_and_from_either_offset() {
    let mut bench = Bench::new();
    bench.negotiate();
    let whole = bench.config(0, 256).expect("whole");
    assert_eq!(whole[..8], 2048_u64.to_le_bytes());
    assert_eq!(whole[34..36], 4_u16.to_le_bytes());
    assert_eq!(whole[60..], [0; 196]);
    for size in [1, 8, 36, 48, 57, 60, 72, 255] {
        let bytes = bench.config(0, size).expect("inside");
        assert_eq!(bytes, whole[..usize::try_from(size).expect("small")]);
    }
    assert_eq!(bench.config(0x100, 60).expect("legacy"), whole[..60]);
    assert_eq!(bench.config(33, 3).expect("odd"), whole[33..36]);
    bench.device.set_capacity(99);
    assert_eq!(bench.config(0, 8).expect("capacity"), 99_u64.to_le_bytes());
    bench.goes_on();
}

/// What the back-end says on its channel is `count` notices of a changed configuration.
fn notices(channel: &mut UnixStream, count: usize) {
    let timeout = Some(Duration::from_secs(5));
    channel.set_read_timeout(timeout).expect("a time-out");
    for _ in 0..count {
        let mut message = [0; 12];
        channel.read_exact(&mut message).expect("a notice");
        // CONFIG_CHANGE_MSG, version 1, no body.
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }
    channel.set_nonblocking(true).expect("not blocking");
    let more = channel.read(&mut [0]).expect_err("nothing more");
    assert_eq!(more.kind(), std::io::ErrorKind::WouldBlock);
    channel.set_nonblocking(false).expect("blocking");
}

#[test]
fn a_new_capacity_is_told_on_the_channel_that_the_front_end_gave() {
    let mut bench = Bench::new();
    bench.negotiate();
    assert!(!bench.device.set_capacity(3000), "there is no channel yet");
    let (mut channel, theirs) = UnixStream::pair().expect("a pair");
    bench.front.set_backend_request_fd(&theirs).expect("given");
    drop(theirs);
    notices(&mut channel, 0);
    assert!(bench.device.set_capacity(4000));
    assert!(bench.device.set_capacity(5000));
    notices(&mut channel, 2);
    assert_eq!(bench.config(0, 8).expect("config"), 5000_u64.to_le_bytes());
    // Another one takes its place; what is no socket does not, and a reset changes nothing.
    let (mut second, theirs) = UnixStream::pair().expect("a pair");
    bench.front.set_backend_request_fd(&theirs).expect("given");
    drop(theirs);
    assert_eq!(channel.read(&mut [0]).expect("the end"), 0, "it is closed");
    assert!(bench.front.set_backend_request_fd(&bench.kick).is_err());
    bench.front.reset_device().expect("reset");
    assert!(bench.device.set_capacity(6000));
    notices(&mut second, 1);
    // It goes with the front-end.
    let device = Arc::clone(&bench.device);
    bench.close().3.expect("orderly");
    assert_eq!(second.read(&mut [0]).expect("the end"), 0, "it is closed");
    assert!(!device.set_capacity(7000));
}

#[test]
fn a_front_end_that_closes_its_channel_is_told_nothing_more_and_stays() {
    let mut bench = Bench::new();
    bench.negotiate();
    let (channel, theirs) = UnixStream::pair().expect("a pair");
    bench.front.set_backend_request_fd(&theirs).expect("given");
    drop((channel, theirs));
    assert!(!bench.device.set_capacity(4000));
    bench.goes_on();
}

/// Whether a write taken now has to be durable.
fn next_write_is_fua(bench: &mut Bench) -> bool {
    bench.guest.write(0x4000, &header(DISK_WRITE, 0));
    let buffers = [out(0x4000, 16), out(0x6000, 512), into(0x5000, 1)];
    bench.guest.post(&buffers);
    bench.front.set_vring_enable(0, true).expect("scan");
    bench.worker.with(0, |lane| {
        let request = lane.held.pop().expect("the write");
        let fua = matches!(request.operation, Operation::Write { fua: true, .. });
        finish(&mut lane.queue, request.token, &request.operation);
        lane.queue.flush();
        fua
    })
}

#[test]
fn a_guest_that_chose_write_through_gets_fua_until_it_chooses_again() {
    let mut bench = Bench::new();
    bench.run_ring();
    assert!(!next_write_is_fua(&mut bench));
    bench.set_writeback(0).expect("write-through");
    assert_eq!(bench.config(32, 1).expect("config"), [0]);
    assert!(next_write_is_fua(&mut bench));
    bench.set_writeback(1).expect("write-back");
    assert!(!next_write_is_fua(&mut bench));
    bench.set_writeback(0).expect("write-through");
    bench.front.reset_device().expect("reset");
    assert_eq!(bench.config(32, 1).expect("config"), [1]);
}

#[test]
fn a_guest_that_cannot_flush_gets_fua_always() {
    for without in [
        bit(VIRTIO_BLK_F_FLUSH),
        bit(VIRTIO_BLK_F_FLUSH) | bit(VIRTIO_BLK_F_CONFIG_WCE),
    ] {
        let mut bench = Bench::new();
        bench.negotiate_without(without | bit(EVENT_IDX));
        bench.share_memory();
        bench.set_up_ring(0);
        assert!(next_write_is_fua(&mut bench));
        bench.set_writeback(1).expect("accepted, but FLUSH decides");
        assert!(next_write_is_fua(&mut bench));
    }
}

#[test]
fn the_cache_mode_of_a_driver_that_did_not_negotiate_it_changes_nothing() {
    let mut bench = Bench::new();
    bench.negotiate_without(bit(VIRTIO_BLK_F_CONFIG_WCE));
    bench.share_memory();
    bench.set_up_ring(0);
    bench.set_writeback(0).expect("accepted");
    assert!(!next_write_is_fua(&mut bench));
}

#[test]
fn nothing_but_the_cache_mode_can_be_written() {
    let mut bench = Bench::new();
    bench.negotiate();
    let flags = VhostUserConfigFlags::WRITABLE;
    let before = bench.config(0, 60).expect("config");
    assert!(bench.front.set_config(0, flags, &[1; 8]).is_err());
    assert!(bench.front.set_config(0, flags, &before).is_err());
    assert!(bench.set_writeback(2).is_err());
    assert_eq!(bench.config(0, 60).expect("config"), before);
    bench.goes_on();
}
