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
const AWAY: Duration = Duration::from_millis(3500);
/// Until requests go the other way: the loss is noticed, and what may still be written is waited for, which is twice the keep-alive
/// time-out; and a busy machine.
const STALL: Duration = Duration::from_secs(6);
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
        let listen = (1..=links).flat_map(|link| {
            let address = format!("{}:4420", networks.address(link));
            ["--listen".to_owned(), address]
        });
        let listen: Vec<_> = listen.collect();
        let listen: Vec<_> = listen.iter().map(String::as_str).collect();
        let export = Export::start_behind(&networks.target(), &listen, &[&spec]);
        Some(Self {
            networks,
            export,
            _directory: directory,
        })
    }

    /// The target at the end of a link.
    fn uri(&self, link: u8) -> String {
        let first = self.networks.address(1);
        let uri = self.export.subsystem();
        uri.replace(&first, &self.networks.address(link))
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
    let mut attach = Attach::start_behind(&target.networks.host(), &QUICK, &target.uri(1));
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

#[test]
fn a_link_of_two_that_is_cut_stalls_a_guest_no_longer_than_it_takes_to_notice() {
    let Some(target) = Target::start(2) else {
        return;
    };
    let other = target.uri(2);
    for policy in ["numa", "round-robin"] {
        let args = ["--path", &other, "--iopolicy", policy];
        let args = [&QUICK[..], &args].concat();
        let mut attach = Attach::start_behind(&target.networks.host(), &args, &target.uri(1));
        await_logged(&attach, "another path is connected", 1);
        let longest = under_load(&attach, || {
            let cuts = EVERY.iter().zip([1, 2].iter().cycle());
            for (round, (&how, &link)) in (1..).zip(cuts) {
                thread::sleep(Duration::from_millis(300));
                let began = Instant::now();
                target.networks.cut(link, how);
                await_lost(&attach, round, began);
                thread::sleep(AWAY.saturating_sub(began.elapsed()));
                target.networks.mend(link, how);
                await_logged(&attach, BACK, round);
            }
        });
        eprintln!("{policy}: the longest stall: {longest:.1?}");
        assert!(longest < STALL, "{policy}: {longest:?}");
        attach.stop();
        assert_eq!(attach.counter("errors"), 0);
    }
}
