//! Local disks: `serve` brings a file, or nothing, to a guest with no network in between.

use std::path::PathBuf;

use crate::daemons::Attach;
use crate::driver::{Direction, Driver};
use crate::noise::noise;

const DISK: usize = 8 << 20;
const PIECE: usize = 128 << 10;
const QUEUES: usize = 2;

/// A file of noise on a file system that has direct I/O, removed with the test.
struct Image {
    path: PathBuf,
    content: Vec<u8>,
    _directory: tempfile::TempDir,
}

impl Image {
    fn new() -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let path = directory.path().join("disk.img");
        let content = noise(DISK, 1);
        std::fs::write(&path, &content).expect("an image");
        Self {
            path,
            content,
            _directory: directory,
        }
    }

    fn spec(&self, options: &str) -> String {
        format!("{}{options}", self.path.to_str().expect("UTF-8"))
    }
}

/// Moves the whole disk in pieces that are all under way at once, between its places and places
/// `shift` bytes further in the memory.
#[track_caller]
fn move_all(driver: &mut Driver, direction: Direction, shift: usize) {
    for number in 0..DISK / PIECE {
        let (queue, at) = (number % QUEUES, number * PIECE);
        let piece = (at + shift, PIECE);
        assert!(driver.add(queue, direction, at as u64, piece, number));
    }
    for queue in 0..QUEUES {
        driver.kick(queue);
    }
    for queue in 0..QUEUES {
        driver.wait(queue, DISK / PIECE / QUEUES);
    }
}

/// Reads the disk, writes it anew, and compares; gives the daemon after its end.
#[track_caller]
fn read_and_write(options: &str, shift: usize) -> Attach {
    let image = Image::new();
    let mut serve = Attach::serve(&["--nr-io-queues", "2"], &image.spec(options));
    let memory = (2 * DISK) as u64;
    let mut driver = Driver::connect(&serve.socket, QUEUES, 128, memory);
    driver.write_memory(0, &vec![0xee; DISK + PIECE]);
    move_all(&mut driver, Direction::Read, shift);
    assert!(driver.read_memory(shift, DISK) == image.content);
    let end = driver.read_memory(shift + DISK, PIECE - shift);
    assert!(
        end.iter().all(|&byte| byte == 0xee),
        "memory beyond is not touched"
    );
    let fresh = noise(DISK, 2);
    driver.write_memory(shift, &fresh);
    move_all(&mut driver, Direction::Write, shift);
    driver.flush(0);
    driver.kick(0);
    driver.wait(0, 1);
    assert!(std::fs::read(&image.path).expect("the image") == fresh);
    drop(driver);
    serve.stop();
    let moved = DISK as u64;
    for count in ["read_bytes", "written_bytes"] {
        assert_eq!(serve.counter(count), moved);
        assert_eq!(serve.storage_counter(count), moved);
    }
    assert_eq!(serve.storage_counter("flushes"), 1);
    assert_eq!(serve.counter("copied_bytes"), 0);
    serve
}

#[test]
fn a_local_file_goes_to_the_guests_own_pages_and_comes_from_them() {
    let serve = read_and_write("", 0);
    assert_eq!(serve.storage_counter("copied_bytes"), 0);
    // Nor does memory have to be aligned.
    let serve = read_and_write("", 3);
    assert_eq!(serve.storage_counter("copied_bytes"), 0);
}

#[test]
fn direct_io_copies_only_where_the_guests_memory_is_not_aligned() {
    let serve = read_and_write(",direct,block-size=4096", 0);
    assert_eq!(serve.storage_counter("copied_bytes"), 0);
    let serve = read_and_write(",direct,block-size=4096", 3);
    assert_eq!(serve.storage_counter("copied_bytes"), 2 * DISK as u64);
}

#[test]
fn reads_of_nothing_are_zeroes_and_not_what_was_in_the_memory() {
    let mut serve = Attach::serve(&[], "null:1T");
    let mut driver = Driver::connect(&serve.socket, 1, 128, 1 << 20);
    driver.write_memory(0, &vec![0xee; 1 << 20]);
    let offset = (1 << 40) - 65536;
    assert!(driver.add(0, Direction::Write, offset, (4096, 65536), 0));
    assert!(driver.add(0, Direction::Read, offset, (0, 65536), 1));
    driver.kick(0);
    driver.wait(0, 2);
    assert_eq!(driver.read_memory(0, 65536), [0; 65536]);
    assert_eq!(driver.read_memory(65536, 4096), [0xee; 4096]);
    drop(driver);
    serve.stop();
    assert_eq!(serve.storage_counter("reads"), 1);
    assert_eq!(serve.counter("copied_bytes"), 0);
}
