//! Storage that fails on purpose, as a guest sees it: errors, delays, no answer at all, power cuts.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::daemons::{Attach, Directory, Export};
use crate::driver::{Direction, Driver};
use crate::front_end::{FrontEnd, IOERR, OK, Setup, feature};

/// A disk of this storage: in one process, or over the fabric.
struct Disk {
    attach: Attach,
    export: Option<Export>,
}

impl Disk {
    #[track_caller]
    fn local(spec: &str) -> Self {
        Self {
            attach: Attach::serve(&[], spec),
            export: None,
        }
    }

    #[track_caller]
    fn remote(spec: &str) -> Self {
        let export = Export::start(&[spec]);
        Self {
            attach: Attach::start(export.uri()),
            export: Some(export),
        }
    }

    #[track_caller]
    fn both(spec: &str) -> [Self; 2] {
        [Self::local(spec), Self::remote(spec)]
    }

    /// Ends all, the guest's side first, each in the time that it has.
    #[track_caller]
    fn stop(mut self) {
        self.attach.stop();
        if let Some(mut export) = self.export {
            export.stop();
        }
    }
}

#[test]
fn a_guest_sees_the_errors_that_the_rules_pick_and_no_others() {
    let spec = "ram:8M,fault=error:write:lba=16-23,fault=error=2/81+dnr:read:lba=100:count=1,\
                fault=error:flush:every=2";
    for disk in Disk::both(spec) {
        let mut guest = FrontEnd::connect(&disk.attach.socket);
        for (sector, status) in [(0, OK), (15, OK), (16, IOERR), (23, IOERR), (24, OK)] {
            assert_eq!(guest.write(0, sector, &[7; 512]), status, "{sector}");
        }
        assert_eq!(guest.write(0, 8, &[7; 16 * 512]), IOERR, "part of it");
        assert_eq!(guest.read(0, 16, 512).0, OK);
        assert_eq!(guest.read(0, 100, 512).0, IOERR);
        assert_eq!(guest.read(0, 100, 512).0, OK);
        assert_eq!([guest.flush(0), guest.flush(0)], [IOERR, OK]);
        drop(guest);
        disk.stop();
    }
}

#[test]
fn a_delayed_request_holds_up_no_other() {
    for disk in Disk::both("ram:8M,fault=delay=300ms:read:lba=0") {
        let mut driver = Driver::connect(&disk.attach.socket, 1, 128, 1 << 20);
        let began = Instant::now();
        for number in 0..8 {
            let at = number * 4096;
            assert!(driver.add(0, Direction::Read, at as u64, (at, 4096), number));
        }
        driver.kick(0);
        let mut first = driver.wait(0, 7);
        first.sort_unstable();
        assert_eq!(first, [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(driver.wait(0, 1), [0]);
        assert!(began.elapsed() >= Duration::from_millis(300));
        drop(driver);
        disk.stop();
    }
}

#[test]
fn a_request_that_hangs_keeps_nothing_from_ending_in_time() {
    for disk in Disk::both("ram:8M,fault=hang:read:lba=0,fault=delay=60s:write:lba=0") {
        let mut driver = Driver::connect(&disk.attach.socket, 1, 128, 1 << 20);
        assert!(driver.add(0, Direction::Read, 0, (0, 4096), 0));
        assert!(driver.add(0, Direction::Write, 0, (4096, 4096), 1));
        assert!(driver.add(0, Direction::Read, 4096, (8192, 4096), 2));
        driver.kick(0);
        assert_eq!(driver.wait(0, 1), [2]);
        disk.stop();
    }
}

/// An image, and the disks on it that are killed.
struct Image {
    directory: Directory,
}

impl Image {
    fn new() -> Self {
        let directory = Directory::new();
        std::fs::write(directory.path("disk.img"), vec![0; 8 << 20]).expect("an image");
        Self { directory }
    }

    fn spec(&self) -> String {
        let path = self.directory.path("disk.img");
        format!("{},powercut=1M:seed=5", path.display())
    }

    /// The first byte of so many sectors.
    fn bytes(&self, sectors: usize) -> Vec<u8> {
        let image = std::fs::read(self.directory.path("disk.img")).expect("an image");
        image.chunks(512).take(sectors).map(|s| s[0]).collect()
    }
}

#[test]
fn a_kill_loses_what_was_not_flushed_and_nothing_that_was() {
    for remote in [false, true] {
        let image = Image::new();
        let disk = match remote {
            true => Disk::remote(&image.spec()),
            false => Disk::local(&image.spec()),
        };
        let mut guest = FrontEnd::connect(&disk.attach.socket);
        assert_ne!(guest.features & feature::FLUSH, 0);
        assert_eq!(guest.write(0, 0, &[1; 8 * 512]), OK);
        assert_eq!(guest.flush(0), OK);
        assert_eq!(guest.write(0, 4, &[2; 8 * 512]), OK);
        let (status, seen) = guest.read(0, 0, 12 * 512);
        assert_eq!(status, OK);
        let seen: Vec<u8> = seen.chunks(512).map(|sector| sector[0]).collect();
        assert_eq!(seen, [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2]);
        let storage = disk
            .export
            .as_ref()
            .map_or(&disk.attach.process, |e| &e.process);
        storage.signal(Signal::KILL);
        drop(guest);
        drop(disk);
        assert_eq!(image.bytes(12), [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]);
    }
}

#[test]
fn a_kill_loses_a_part_of_what_was_more_than_the_cache_holds() {
    let image = Image::new();
    let disk = Disk::remote(&image.spec());
    let mut guest = FrontEnd::connect(&disk.attach.socket);
    for sector in (0..8192).step_by(8) {
        assert_eq!(guest.write(0, sector, &[3; 8 * 512]), OK);
    }
    let (status, seen) = guest.read(0, 0, 4 << 20);
    assert!(status == OK && seen == [3; 4 << 20], "all of it is seen");
    let export = disk.export.as_ref().expect("a remote disk");
    export.process.signal(Signal::KILL);
    drop(guest);
    drop(disk);
    let lost = image.bytes(8192).iter().filter(|&&byte| byte == 0).count();
    // A cache of 1 MiB holds 2048 sectors.
    assert!((1..=2048).contains(&lost), "{lost} sectors are lost");
}

#[test]
fn an_orderly_end_of_a_local_disk_loses_nothing() {
    let image = Image::new();
    let disk = Disk::local(&image.spec());
    let mut guest = FrontEnd::connect(&disk.attach.socket);
    assert_eq!(guest.write(0, 0, &[4; 8 * 512]), OK);
    drop(guest);
    disk.stop();
    assert_eq!(image.bytes(9), [4, 4, 4, 4, 4, 4, 4, 4, 0]);
}

#[test]
fn a_guest_that_cannot_flush_has_all_its_writes_on_the_medium() {
    let image = Image::new();
    let disk = Disk::local(&image.spec());
    let setup = Setup {
        without: feature::FLUSH,
        ..Setup::default()
    };
    let mut guest = FrontEnd::connect_with(&disk.attach.socket, setup);
    assert_eq!(guest.write(0, 0, &[5; 8 * 512]), OK);
    disk.attach.process.signal(Signal::KILL);
    drop(guest);
    drop(disk);
    assert_eq!(image.bytes(9), [5, 5, 5, 5, 5, 5, 5, 5, 0]);
}

#[test]
fn a_worker_sleeps_while_a_request_is_held_back_and_after_it() {
    let wake_ups = |disk: &Disk| -> u64 {
        let of = |process: &crate::process::Process| -> u64 {
            let switches = process.context_switches().into_iter();
            let workers = switches.filter(|(name, _)| name.starts_with("worker-"));
            workers.map(|(_, switches)| switches).sum()
        };
        of(&disk.attach.process) + disk.export.as_ref().map_or(0, |e| of(&e.process))
    };
    // One that spins is not woken, either.
    let ticks = |disk: &Disk| -> u64 {
        let of = |process: &crate::process::Process| -> u64 {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid()));
            let stat = stat.expect("it runs");
            let (_, fields) = stat.rsplit_once(')').expect("a name");
            let fields: Vec<&str> = fields.split_whitespace().collect();
            let number = |at: usize| fields[at].parse::<u64>().expect("a number");
            number(11) + number(12)
        };
        of(&disk.attach.process) + disk.export.as_ref().map_or(0, |e| of(&e.process))
    };
    let seen = |disk: &Disk| (wake_ups(disk), ticks(disk));
    let still = |disk: &Disk, (wakes, ticks): (u64, u64), when: &str| {
        let (now, burnt) = seen(disk);
        assert_eq!(now, wakes, "{when}");
        assert!(burnt - ticks <= 5, "{} ticks of CPU {when}", burnt - ticks);
    };
    let idle = Duration::from_millis(400);
    for disk in Disk::both("ram:8M,fault=delay=1s:read:lba=0,fault=hang:read:lba=8") {
        let mut driver = Driver::connect(&disk.attach.socket, 1, 128, 1 << 20);
        for sector in [0, 8, 16] {
            let at = sector * 512;
            assert!(driver.add(0, Direction::Read, at as u64, (at, 512), sector));
        }
        driver.kick(0);
        assert_eq!(driver.wait(0, 1), [16]);
        std::thread::sleep(Duration::from_millis(100));
        let before = seen(&disk);
        std::thread::sleep(idle);
        still(&disk, before, "while they are held back");
        assert_eq!(driver.wait(0, 1), [0]);
        std::thread::sleep(Duration::from_millis(100));
        let before = seen(&disk);
        std::thread::sleep(idle);
        still(&disk, before, "after the timer");
        drop(driver);
        disk.stop();
    }
}
