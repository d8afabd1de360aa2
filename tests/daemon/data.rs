//! What is written is what is read: against a model, at random, on several queues at once.

use crate::daemons::{Attach, Directory, Export};
use crate::driver::{Direction, Driver};
use crate::front_end::{DATA, FrontEnd, OK, kind};
use crate::memory::LOW_SIZE;
use crate::noise::noise;
use crate::ring::{into, out};

const DISK: usize = 64 << 20;
const QUEUES: usize = 4;
/// Each queue has a part of the disk to itself, and the same part of the memory.
const PART: usize = DISK / QUEUES;
const ROUNDS: usize = 12;
/// Requests of three descriptors that fill a queue of 128 entries.
const FULL: usize = 128 / 3;

/// One request: where on the disk and in the memory it is, and how long.
struct Request {
    direction: Direction,
    at: usize,
    len: usize,
}

/// Lengths of many orders of magnitude, up to several times what one command may transfer; in some
/// rounds only short ones, so that queues become full.
fn random_len(rng: &mut fastrand::Rng, block: usize, short: bool) -> usize {
    let most = match rng.u8(..100) {
        _ if short => 32 << 10,
        0..40 => 4 << 10,
        40..70 => 128 << 10,
        70..90 => 1 << 20,
        _ => 4 << 20,
    };
    rng.usize(1..=most / block) * block
}

/// Cuts the queue's part of the disk into requests, next to each other or with gaps.
fn random_requests(
    rng: &mut fastrand::Rng,
    queue: usize,
    block: usize,
    short: bool,
) -> Vec<Request> {
    let mut requests = Vec::new();
    let (mut at, end) = (queue * PART, (queue + 1) * PART);
    loop {
        at += if rng.bool() {
            0
        } else {
            rng.usize(..64) * block
        };
        let len = random_len(rng, block, short);
        if at + len > end || requests.len() == FULL {
            rng.shuffle(&mut requests);
            return requests;
        }
        let direction = if rng.bool() {
            Direction::Read
        } else {
            Direction::Write
        };
        requests.push(Request { direction, at, len });
        at += len;
    }
}

struct Totals {
    requests: u64,
    read_bytes: u64,
    written_bytes: u64,
    full_queues: usize,
}

/// Fills queue after queue, kicks them all, waits for all, and compares with the model.
fn compare_with_model(driver: &mut Driver, model: &mut [u8], block: usize, seed: u64) -> Totals {
    let mut rng = fastrand::Rng::with_seed(seed);
    let fresh = noise(8 << 20, seed);
    let mut totals = Totals {
        requests: 0,
        read_bytes: 0,
        written_bytes: 0,
        full_queues: 0,
    };
    for round in 0..ROUNDS {
        let queues: Vec<_> = (0..QUEUES)
            .map(|queue| random_requests(&mut rng, queue, block, round % 3 == 2))
            .collect();
        for (queue, requests) in queues.iter().enumerate() {
            for (number, Request { direction, at, len }) in requests.iter().enumerate() {
                let range = *at..at + len;
                match direction {
                    Direction::Write => {
                        let from = rng.usize(..=fresh.len() - len);
                        model[range].copy_from_slice(&fresh[from..from + len]);
                        driver.write_memory(*at, &fresh[from..from + len]);
                        totals.written_bytes += *len as u64;
                    }
                    Direction::Read => {
                        driver.write_memory(*at, &vec![0xee; *len]);
                        totals.read_bytes += *len as u64;
                    }
                }
                assert!(driver.add(queue, *direction, *at as u64, (*at, *len), number));
            }
            totals.requests += requests.len() as u64;
            if requests.len() == FULL {
                let full = !driver.add(queue, Direction::Read, 0, (0, block), 0);
                assert!(full, "{FULL} requests do not fill a queue");
                totals.full_queues += 1;
            }
        }
        (0..QUEUES).for_each(|queue| driver.kick(queue));
        for (queue, requests) in queues.iter().enumerate() {
            let mut done = driver.wait(queue, requests.len());
            done.sort_unstable();
            assert!(done.into_iter().eq(0..requests.len()));
            for Request { direction, at, len } in requests {
                let same = driver.read_memory(*at, *len) == model[*at..at + len];
                assert!(
                    same,
                    "{direction:?} of {len} bytes at {at}: seed {seed}, round {round}"
                );
            }
        }
    }
    totals
}

#[track_caller]
fn random_requests_match_a_model(spec: &str, block: usize) -> Vec<u8> {
    let seed = fastrand::u64(..);
    eprintln!("seed {seed}");
    let mut export = Export::start(&[spec]);
    let mut attach = Attach::start_with(&["--nr-io-queues", "2"], export.uri());
    let mut driver = Driver::connect(&attach.socket, QUEUES, 128, DISK as u64);
    let mut model = vec![0; DISK];
    let totals = compare_with_model(&mut driver, &mut model, block, seed);
    driver.flush(0);
    driver.kick(0);
    driver.wait(0, 1);
    drop(driver);
    attach.stop();
    export.stop();
    assert!(totals.full_queues > 0, "no queue was ever full");
    let counted = ["requests", "read_bytes", "written_bytes", "errors"];
    let expected = [
        totals.requests + 1,
        totals.read_bytes,
        totals.written_bytes,
        0,
    ];
    assert_eq!(counted.map(|name| attach.counter(name)), expected);
    let counted = ["read_bytes", "written_bytes"].map(|name| export.counter(1, name));
    assert_eq!(counted, [totals.read_bytes, totals.written_bytes]);
    model
}

#[test]
fn random_requests_to_blocks_of_512_bytes_match_a_model() {
    random_requests_match_a_model("ram:64M", 512);
}

#[test]
fn random_requests_to_blocks_of_4096_bytes_match_a_model() {
    random_requests_match_a_model("ram:64M,block-size=4096", 4096);
}

#[test]
fn random_requests_to_a_file_match_a_model_and_so_does_the_file() {
    let directory = Directory::new();
    let path = directory.path("disk.img");
    let file = std::fs::File::create(&path).expect("a file");
    file.set_len(DISK as u64).expect("a size");
    let model = random_requests_match_a_model(&format!("file:{}", path.display()), 512);
    assert!(
        std::fs::read(&path).expect("the file") == model,
        "the file is not as the model"
    );
}

#[test]
fn a_request_larger_than_any_command_can_be_is_carried_out_whole() {
    // A command names at most 65536 blocks; this is more, in one piece and in one descriptor.
    const LEN: u64 = 40 << 20;
    const { assert!(LEN > 65536 * 512 && DATA + LEN <= LOW_SIZE) };
    let len = u32::try_from(LEN).expect("below 4 GiB");
    let export = Export::start(&["ram:48M"]);
    let mut attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    let data = noise(40 << 20, 8);
    guest.memory.write(DATA, &data);
    assert_eq!(guest.run(0, kind::WRITE, 3, &[out(DATA, len)]), OK);
    guest.memory.write(DATA, &vec![0xee; 40 << 20]);
    assert_eq!(guest.run(0, kind::READ, 3, &[into(DATA, len)]), OK);
    assert!(
        guest.memory.read(DATA, 40 << 20) == data,
        "it came back different"
    );
    drop(guest);
    attach.stop();
    assert_eq!(
        (attach.counter("requests"), attach.counter("errors")),
        (2, 0)
    );
    assert!(
        attach.counter("commands") >= 80,
        "{} commands",
        attach.counter("commands")
    );
}
