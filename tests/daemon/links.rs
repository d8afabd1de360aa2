//! Links between host and target that are cut, in networks of their own: a cable that is pulled, a switch that forgets.

use std::thread;
use std::time::{Duration, Instant};

use crate::daemons::{Attach, Directory, Export};
use crate::networks::{Cut, Networks};
use crate::outages::{BACK, QUICK, await_logged, under_load};

const UUID: &str = "uuid=6ba7b810-9dad-41d1-80b4-00c04fd430c8";
/// Half the keep-alive time-out of [`QUICK`] until the question, all of it until there is no answer, and as much again for a busy
/// machine.
const DETECTED: Duration = Duration::from_secs(3);
/// Longer than [`DETECTED`], so that attempts fail, too.
const AWAY: Duration = Duration::from_secs(4);
const EVERY: [Cut; 3] = [Cut::Swallowed, Cut::Unplugged, Cut::Down];

/// A target at the far end of all links.
struct Target {
    networks: Networks,
    export: Export,
    /// Of its file.
    _directory: Directory,
}

impl Target {
    /// None where the machine does not let us.
    fn start(links: u8) -> Option<Self> {
        let networks = Networks::start(links)?;
        let directory = Directory::new();
        let path = directory.path("disk.img");
        let file = std::fs::File::create(&path).expect("a file");
        file.set_len(64 << 20).expect("room");
        let spec = format!("file:{},{UUID}", path.display());
        let address = format!("{}:4420", networks.address(1));
        let export = Export::start_behind(&networks.target(), &["--listen", &address], &[&spec]);
        Some(Self {
            networks,
            export,
            _directory: directory,
        })
    }
}

/// Waits until the disk has lost so many associations; in time after `began`.
#[track_caller]
fn await_lost(attach: &Attach, count: usize, began: Instant) -> Duration {
    loop {
        let lines = attach.process.stderr();
        let lost = lines
            .iter()
            .filter(|line| line.contains("association lost"));
        let (lost, after) = (lost.count(), began.elapsed());
        if lost >= count {
            return after;
        }
        assert!(after < DETECTED, "not lost {count} times after {after:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_link_that_is_cut_and_mended_is_noticed_in_time_and_by_no_guest() {
    let Some(target) = Target::start(1) else {
        return;
    };
    let uri = target.export.subsystem();
    let mut attach = Attach::start_behind(&target.networks.host(), &QUICK, uri);
    let longest = under_load(&attach, || {
        for (round, how) in (1..).zip(EVERY) {
            thread::sleep(Duration::from_millis(300));
            let began = Instant::now();
            target.networks.cut(1, how);
            let detected = await_lost(&attach, round, began);
            thread::sleep(AWAY.saturating_sub(began.elapsed()));
            target.networks.mend(1, how);
            let mended = Instant::now();
            await_logged(&attach, BACK, round);
            let back = mended.elapsed();
            eprintln!("{how:?}: noticed after {detected:.1?}, back {back:.1?} after it was mended");
        }
    });
    eprintln!("the longest stall: {longest:.1?}");
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}
