//! Storage that fails on purpose, as a guest sees it: errors, delays, and no answer at all.

use std::time::{Duration, Instant};

use crate::daemons::{Attach, Export};
use crate::driver::{Direction, Driver};
use crate::front_end::{FrontEnd, IOERR, OK};

/// A disk of this storage: in one process, or over the fabric.
pub(crate) struct Disk {
    pub(crate) attach: Attach,
    pub(crate) export: Option<Export>,
}

impl Disk {
    #[track_caller]
    pub(crate) fn local(spec: &str) -> Self {
        Self {
            attach: Attach::serve(&[], spec),
            export: None,
        }
    }

    #[track_caller]
    pub(crate) fn remote(spec: &str) -> Self {
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
    pub(crate) fn stop(mut self) {
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
