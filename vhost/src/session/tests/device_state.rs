//! The device's state, saved and loaded as cloud-hypervisor does, and by front-ends that do it wrongly.

use std::io::{PipeReader, PipeWriter};
use std::os::fd::OwnedFd;
use std::time::Instant;

use vhost::vhost_user::message::VhostTransferStateDirection::{self, LOAD, SAVE};
use vhost::vhost_user::message::VhostTransferStatePhase::STOPPED;

use super::*;

/// Longer than a front-end is kept waiting, shorter than for ever.
const LONG: Duration = Duration::from_secs(8);

fn pipe() -> (PipeReader, PipeWriter) {
    std::io::pipe().expect("a pipe")
}

impl Bench {
    fn transfer(
        &self,
        direction: VhostTransferStateDirection,
        end: impl Into<OwnedFd>,
    ) -> vhost::Result<()> {
        let file = self
            .front
            .set_device_state_fd(direction, STOPPED, end.into())?;
        assert!(file.is_none(), "our end is as good as theirs");
        Ok(())
    }

    fn save(&self) -> Vec<u8> {
        let (mut reader, writer) = pipe();
        self.transfer(SAVE, writer).expect("SAVE");
        let mut state = Vec::new();
        reader.read_to_end(&mut state).expect("a state");
        self.front.check_device_state().expect("CHECK");
        state
    }

    fn load(&self, state: &[u8]) -> vhost::Result<()> {
        let (reader, mut writer) = pipe();
        self.transfer(LOAD, reader).expect("LOAD");
        writer.write_all(state).expect("room");
        drop(writer);
        self.front.check_device_state()
    }
}

#[test]
fn a_state_that_was_saved_is_loaded_elsewhere() {
    let mut source = Bench::new();
    source.run_ring();
    source.set_writeback(0).expect("write-through");
    let (_reader, writer) = pipe();
    source
        .transfer(SAVE, writer)
        .expect_err("ring 0 is running");
    source.front.get_vring_base(0).expect("base");
    let settled = |bench: &Bench| bench.worker.events().contains(&"settle".to_owned());
    assert!(!settled(&source), "nobody goes on elsewhere");
    let state = source.save();
    assert!(settled(&source), "somebody may");
    source.load(&state).expect("its own");
    assert!(!settled(&source));
    assert_eq!(source.save(), state, "as often as wanted");
    source.goes_on();
    source.close().3.expect("orderly");

    let mut destination = Bench::new();
    destination.negotiate();
    assert_eq!(destination.config(32, 1).expect("config"), [1]);
    destination.load(&state).expect("the same disk");
    assert_eq!(destination.config(32, 1).expect("config"), [0]);
    destination.load(&[]).expect("no state is fine");
    assert_eq!(destination.config(32, 1).expect("config"), [0]);
    destination.close().3.expect("orderly");
}

#[test]
fn a_state_of_another_disk_and_one_that_is_none_are_refused() {
    let mut source = Bench::new();
    source.negotiate();
    let state = source.save();
    source.close().3.expect("orderly");
    let mut other = Bench::with(DeviceOptions {
        serial: *b"SERIAL-OF-THE-DISK-2",
        ..options()
    });
    other.negotiate();
    other.load(&state).expect_err("another serial");
    other.load(&state[..40]).expect_err("cut short");
    other
        .load(b"something else entirely")
        .expect_err("no state");
    other.load(&[0; 40_000]).expect_err("far too long");
    assert_eq!(other.config(32, 1).expect("config"), [1]);
    let own = other.save();
    other.load(&own).expect("its own");
    other.close().3.expect("orderly");
}

#[test]
fn a_disk_that_has_grown_on_the_way_tells_its_guest() {
    let mut source = Bench::new();
    source.negotiate();
    let state = source.save();
    source.close().3.expect("orderly");
    let mut grown = Bench::with(DeviceOptions {
        capacity_sectors: 4096,
        ..options()
    });
    grown.negotiate();
    let (mut channel, theirs) = UnixStream::pair().expect("a pair");
    grown.front.set_backend_request_fd(&theirs).expect("given");
    grown.load(&state).expect("the same disk, larger");
    channel.read_exact(&mut [0; 12]).expect("a notice");
    let larger = grown.save();
    grown.close().3.expect("orderly");
    let mut small = Bench::new();
    small.negotiate();
    small.load(&larger).expect_err("the same disk, smaller");
    small.close().3.expect("orderly");
}

#[test]
fn a_front_end_that_does_not_go_on_keeps_nobody_waiting() {
    let mut bench = Bench::new();
    bench.negotiate();
    let began = Instant::now();
    bench
        .front
        .check_device_state()
        .expect_err("nothing to check");
    // Nobody writes, nobody reads.
    let (reader, writer) = pipe();
    bench.transfer(LOAD, reader).expect("LOAD");
    bench.front.check_device_state().expect_err("not closed");
    bench.front.check_device_state().expect_err("and over");
    drop(writer);
    let (mut full, writer) = pipe();
    rustix::fs::fcntl_setfl(&writer, rustix::fs::OFlags::NONBLOCK).expect("flags");
    while (&writer).write(&[0; 4096]).is_ok() {}
    bench
        .transfer(SAVE, writer.try_clone().expect("a clone"))
        .expect("SAVE");
    bench.front.check_device_state().expect_err("no room");
    drop(writer);
    let mut bytes = Vec::new();
    full.read_to_end(&mut bytes)
        .expect("the end: our copy is closed");
    assert!(bytes.iter().all(|byte| *byte == 0));
    // The reader leaves.
    let (reader, writer) = pipe();
    drop(reader);
    bench.transfer(SAVE, writer).expect("SAVE");
    bench.front.check_device_state().expect_err("gone");
    // One transfer ends the one before.
    let (reader, writer) = pipe();
    bench.transfer(LOAD, reader).expect("LOAD");
    assert!(!bench.save().is_empty());
    drop(writer);
    // A transfer that nobody asks about goes with the session.
    let (reader, mut writer) = pipe();
    bench.transfer(LOAD, reader).expect("LOAD");
    bench.close().3.expect("orderly");
    while writer.write(&[0]).is_ok() {
        assert!(began.elapsed() < LONG, "somebody still reads");
    }
}

#[test]
fn a_transfer_without_a_descriptor_is_answered_as_a_failed_one() {
    let mut bench = Bench::new();
    bench.negotiate();
    let request = FrontendReq::SET_DEVICE_STATE_FD as u32;
    bench.send(request, 1, &[0; 8]);
    let (code, flags, reply) = bench.receive();
    assert_eq!((code, flags), (request, 5));
    assert_eq!(reply, 0x101_u64.to_le_bytes());
    bench.goes_on();
    bench.close().3.expect("orderly");
}
