//! A controller that grants fewer I/O queues than before: rings share what there is, and get back what they had.

use std::time::{Duration, Instant};

use crate::daemons::{Attach, Export};
use crate::front_end::{DATA, FrontEnd, OK, Setup, kind};
use crate::outages::{BACK, QUICK, WHILE, await_logged};
use crate::ring::out;

const RINGS: usize = 5;
const SPEC: &str = "uuid=6ba7b810-9dad-41d1-80b4-00c04fd430c8";
const SPREAD: &str = "rings are spread over the lanes that have a queue pair";

fn export(address: &str, queues: &str, image: &std::path::Path) -> Export {
    let spec = format!("file:{},{SPEC}", image.display());
    Export::start_with(&["--listen", address, "--nr-io-queues", queues], &[&spec])
}

/// Writes on every ring; gives the requests that each has in flight.
fn post(guest: &mut FrontEnd, byte: u8) {
    for ring in 0..RINGS {
        for slot in 0..6 {
            let block = (6 * ring + slot) as u64;
            let at = DATA + 4096 * block;
            guest.memory.write(at, &[byte; 4096]);
            guest.add(ring, slot, kind::WRITE, 8 * block, &[out(at, 4096)]);
        }
        guest.rings[ring].submit();
    }
}

#[track_caller]
fn finish(guest: &mut FrontEnd) {
    for ring in 0..RINGS {
        guest.rings[ring].wait(6);
        assert!(
            (0..6).all(|slot| guest.status(ring, slot) == OK),
            "ring {ring}"
        );
    }
}

#[test]
fn rings_go_where_there_are_queue_pairs_and_come_back_when_all_are_there() {
    let directory = crate::daemons::Directory::new();
    let image = directory.path("disk.img");
    let file = std::fs::File::create(&image).expect("a file");
    file.set_len(8 << 20).expect("room");
    let mut target = export("127.0.0.1:0", "4", &image);
    let address = target.address().to_owned();
    let args = [&QUICK[..], &["--nr-io-queues", "4"]].concat();
    let mut attach = Attach::start_with(&args, target.subsystem());
    assert_eq!(attach.process.logged("disk ready")[0]["lanes"], 4);
    let setup = Setup {
        rings: RINGS,
        ..Setup::default()
    };
    let mut guest = FrontEnd::connect_with(&attach.socket, setup);
    let mut back = 0;
    let mut moves = 0;
    let mut byte = 0;
    for queues in ["1", "4", "2", "1", "3", "4"] {
        byte += 1;
        post(&mut guest, byte);
        finish(&mut guest);
        // Some are in flight when it goes.
        target.process.pause();
        byte += 1;
        post(&mut guest, byte);
        std::thread::sleep(WHILE);
        drop(target);
        target = export(&address, queues, &image);
        let began = Instant::now();
        (back, moves) = (back + 1, moves + 1);
        await_logged(&attach, BACK, back);
        await_logged(&attach, SPREAD, moves);
        let told = &attach.process.logged(SPREAD)[moves - 1]["lanes"];
        assert_eq!(told.to_string(), queues);
        finish(&mut guest);
        assert!(
            began.elapsed() < Duration::from_secs(8),
            "{:?}",
            began.elapsed()
        );
        for block in 0..6 * RINGS as u64 {
            let found = guest.read(block as usize % RINGS, 8 * block, 4096);
            assert_eq!(found, (OK, vec![byte; 4096]), "block {block}");
        }
    }
    drop(guest);
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}
