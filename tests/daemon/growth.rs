//! A disk that grows while a guest has it: a file behind a target, behind a local disk, and one that has
//! grown while its target was away.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use crate::daemons::{Attach, Directory, Export};
use crate::front_end::{FrontEnd, IOERR, OK, SECTOR};
use crate::noise::noise;
use crate::process::Process;

const SMALL: u64 = 1 << 20;
const LARGE: u64 = 3 << 20;
const UUID: &str = "uuid=6ba7b810-9dad-41d1-80b4-00c04fd430c8";
/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(10);

/// A file that can grow.
struct Image(Directory);

impl Image {
    fn new() -> Self {
        let image = Self(Directory::new());
        std::fs::write(image.path(), noise(SMALL as usize, 1)).expect("an image");
        image
    }

    fn path(&self) -> String {
        let path = self.0.path("disk.img");
        path.to_str().expect("UTF-8").to_owned()
    }

    fn resize(&self, size: u64) {
        let file = std::fs::OpenOptions::new().write(true).open(self.path());
        file.expect("a file").set_len(size).expect("room");
    }
}

/// Bytes of the disk as the configuration space has them.
fn capacity(front_end: &mut FrontEnd) -> u64 {
    let flags = VhostUserConfigFlags::WRITABLE;
    let config = front_end.frontend.get_config(0, 8, flags, &[0; 8]);
    let (_, bytes) = config.expect("GET_CONFIG");
    u64::from_le_bytes(bytes.try_into().expect("8 bytes")) * SECTOR
}

/// Gives the back-end a channel to speak first on.
fn give_channel(front_end: &mut FrontEnd) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    ours.set_read_timeout(Some(LONG)).expect("a time-out");
    let given = front_end.frontend.set_backend_request_fd(&theirs);
    given.expect("SET_BACKEND_REQ_FD");
    ours
}

/// Waits until the back-end says that the configuration has changed.
#[track_caller]
fn await_notice(channel: &mut UnixStream) {
    let mut message = [0; 12];
    channel.read_exact(&mut message).expect("a notice");
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
}

/// What only a disk of the larger size can do, and keeps.
#[track_caller]
fn use_the_new_blocks(front_end: &mut FrontEnd) {
    let last = LARGE / SECTOR - 8;
    let data = noise(4096, 2);
    assert_eq!(front_end.write(0, last, &data), OK);
    assert_eq!(front_end.read(0, last, 4096), (OK, data));
    assert_eq!(front_end.read(0, last + 1, 4096).0, IOERR, "the end");
    assert_eq!(front_end.read(0, 0, 512), (OK, noise(512, 1)));
}

/// Grows the file behind a running disk, `holder` of which has it open.
#[track_caller]
fn grows(image: &Image, disk: &Attach, holder: &Process) {
    let mut front_end = FrontEnd::connect(&disk.socket);
    let mut channel = give_channel(&mut front_end);
    assert_eq!(capacity(&mut front_end), SMALL);
    let beyond = SMALL / SECTOR;
    assert_eq!(front_end.write(0, beyond, &noise(4096, 2)), IOERR);
    image.resize(LARGE);
    assert_eq!(front_end.write(0, beyond, &noise(4096, 2)), IOERR);
    holder.signal(Signal::HUP);
    await_notice(&mut channel);
    assert_eq!(capacity(&mut front_end), LARGE);
    use_the_new_blocks(&mut front_end);
    // A signal without growth changes nothing; nor does a file that shrinks.
    image.resize(LARGE - (1 << 20));
    holder.signal(Signal::HUP);
    image.resize(LARGE + 4096);
    holder.signal(Signal::HUP);
    await_notice(&mut channel);
    assert_eq!(capacity(&mut front_end), LARGE + 4096);
    channel.set_nonblocking(true).expect("not blocking");
    channel.read(&mut [0]).expect_err("nothing more");
}

#[test]
fn a_file_of_a_target_that_grows_reaches_the_guest() {
    let image = Image::new();
    let export = Export::start(&[&image.path()]);
    let attach = Attach::start(export.uri());
    grows(&image, &attach, &export.process);
    // The VMM is told first.
    let last = format!("\"blocks\":{}", (LARGE + 4096) / 512);
    attach.process.await_log(|line| line.contains(&last));
    let grown = attach
        .process
        .logged("the namespace has grown: the VMM is told");
    let blocks = grown.iter().map(|fields| fields["blocks"].clone());
    let expected = [LARGE / 512, (LARGE + 4096) / 512];
    assert!(
        blocks.eq(expected.map(serde_json::Value::from)),
        "{grown:?}"
    );
    assert_eq!(grown[0]["disk"], export.uri());
}

#[test]
fn a_file_of_a_local_disk_that_grows_reaches_the_guest() {
    let image = Image::new();
    let serve = Attach::serve(&[], &image.path());
    grows(&image, &serve, &serve.process);
}

#[test]
fn a_front_end_without_a_channel_and_the_next_one_see_the_new_size_when_they_look() {
    let image = Image::new();
    let export = Export::start(&[&image.path()]);
    let attach = Attach::start(export.uri());
    let mut front_end = FrontEnd::connect(&attach.socket);
    assert_eq!(capacity(&mut front_end), SMALL);
    image.resize(LARGE);
    export.process.signal(Signal::HUP);
    let message = "the namespace has grown: the VMM sees it when it reads the configuration again";
    attach.process.await_log(|line| line.contains(message));
    assert_eq!(capacity(&mut front_end), LARGE);
    use_the_new_blocks(&mut front_end);
    drop(front_end);
    let mut next = FrontEnd::connect(&attach.socket);
    assert_eq!(capacity(&mut next), LARGE);
    use_the_new_blocks(&mut next);
}

#[test]
fn a_namespace_that_has_grown_while_it_was_away_is_larger_when_it_is_back() {
    let image = Image::new();
    let spec = format!("{},{UUID}", image.path());
    let mut export = Export::start(&[&spec]);
    let (address, uri) = (export.address().to_owned(), export.uri().to_owned());
    let quick = ["--keep-alive-tmo", "1", "--reconnect-delay", "1"];
    let attach = Attach::start_with(&quick, &uri);
    let mut front_end = FrontEnd::connect(&attach.socket);
    let mut channel = give_channel(&mut front_end);
    export.stop();
    image.resize(LARGE);
    let export = Export::start_with(&["--listen", &address], &[&spec]);
    await_notice(&mut channel);
    assert_eq!(capacity(&mut front_end), LARGE);
    use_the_new_blocks(&mut front_end);
    // The new association reports, too.
    image.resize(LARGE + (1 << 20));
    export.process.signal(Signal::HUP);
    await_notice(&mut channel);
    assert_eq!(capacity(&mut front_end), LARGE + (1 << 20));
}

#[test]
fn a_notice_takes_no_longer_than_the_questions_it_raises() {
    let image = Image::new();
    let export = Export::start(&[&image.path()]);
    let attach = Attach::start(export.uri());
    let mut front_end = FrontEnd::connect(&attach.socket);
    let mut channel = give_channel(&mut front_end);
    let began = Instant::now();
    for step in 1..=20 {
        image.resize(SMALL + step * 4096);
        export.process.signal(Signal::HUP);
        await_notice(&mut channel);
        assert_eq!(capacity(&mut front_end), SMALL + step * 4096);
    }
    let took = began.elapsed();
    assert!(took < Duration::from_secs(5), "20 steps took {took:?}");
}
