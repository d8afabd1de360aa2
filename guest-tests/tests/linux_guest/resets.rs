//! A machine is reset in the middle of its guest's writes, again and again, while the daemon goes on.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use guest_tests::{Attach, AttachOptions, Checks, Disk, Export, Guest, GuestOptions, rounds};

use crate::cases::{Configured, image, image_directory, no_kernel_errors};
use crate::load::Load;
use crate::synced::Pieces;
use crate::{MIB, seed};

const DISK: Configured = Configured {
    disk: "vda",
    serial: "reset",
    mib: 128,
    block: 512,
    queues: 2,
};
/// The load has the first half of the disk, what the guest syncs the other.
const SYNCED: u64 = 64 * MIB;
const LIMIT: Duration = Duration::from_secs(120);
/// The longest that QEMU may take for a reset: less than rings would be drained for, and enough to put the kernel back where
/// processors are emulated.
const RESET: Duration = Duration::from_secs(15);
/// The longest that a request may take where processors are emulated.
const SLOWEST: Duration = Duration::from_secs(10);

/// So often is it reset: twenty times where there is time.
fn resets() -> u64 {
    if rounds() > 1 { 20 } else { 2 }
}

/// What the guest does between resets.
fn pieces(reset: u64) -> Pieces {
    Pieces::of(SYNCED, DISK.mib * MIB - SYNCED, seed(reset) * 4096)
}

#[test]
fn a_machine_that_is_reset_in_the_middle_of_writes_finds_what_it_had_synced() {
    let mut checks = Checks::new("a machine is reset in the middle of writes (2 CPUs; vda)");
    let directory = image_directory().unwrap();
    let image = image(&directory, "reset.img", DISK.mib).unwrap();
    let mut export = Export::start(&[&format!("file:{}", image.display())]).unwrap();
    let socket = directory.path().join("reset.sock");
    let options = AttachOptions {
        serial: Some(DISK.serial.to_owned()),
        ..AttachOptions::default()
    };
    let mut attach = Attach::start(&socket, &export.uris[0], &options).unwrap();
    let queues = DISK.queues;
    let mut guest = Guest::boot(&GuestOptions {
        cpus: queues,
        disks: vec![Disk { socket, queues }],
        ..GuestOptions::default()
    })
    .unwrap();

    let mut longest = Duration::ZERO;
    for reset in 0..resets() {
        checks.check("reset under load, it finds the same disk", || {
            let (synced, taken) = reset_under_load(&mut guest, reset)?;
            longest = longest.max(taken);
            DISK.check(&mut guest)?;
            let there = pieces(reset).verify(&mut guest, synced)?;
            no_kernel_errors(&mut guest)?;
            Ok(format!("and what it had synced, {there}"))
        });
    }
    checks.check("QEMU did not have to wait for the rings", || {
        ensure!(longest < RESET, "{longest:?}");
        let (resets, seconds) = (resets(), longest.as_secs_f32());
        Ok(format!("{resets} resets, {seconds:.2} s at most"))
    });
    checks.check("it works on", || {
        let load = Load::start(&mut guest, "vda", seed(0), LIMIT)?;
        sleep(Duration::from_secs(3));
        let done = load.finish(&mut guest)?;
        ensure!(done.longest < SLOWEST, "{done}");
        Ok(done)
    });
    checks.check("no error in the kernel's log", || {
        no_kernel_errors(&mut guest)
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check("the daemons end cleanly", || {
        attach.stop()?;
        export.stop().map(|()| "status 0")
    });
    checks.check("neither had anything to complain of", || {
        let mut warnings = attach.daemon.warnings();
        warnings.extend(export.daemon.warnings());
        ensure!(warnings.is_empty(), "{}", warnings.join("\n"));
        Ok("no warning")
    });
    checks.finish();
}

/// Gives the number of pieces that the guest had told it has synced, and how long QEMU took to reset its devices.
fn reset_under_load(guest: &mut Guest, reset: u64) -> Result<(u64, Duration)> {
    let pieces = pieces(reset);
    let load = Load::start(guest, "vda", seed(reset), LIMIT)?;
    load.await_writes(guest)?;
    pieces.write(guest, "", LIMIT)?;
    // Each time at another moment of what the guest does.
    pieces.await_told(guest, 1 + reset * 7 % 10, LIMIT)?;
    sleep(Duration::from_millis(reset * 97 % 300));
    load.give_up();
    let taken = guest.reset()?;
    let synced = pieces.told(guest);
    guest.come_up_again()?;
    ensure!(synced > 0 && synced < pieces.count, "{synced} were synced");
    Ok((synced, taken))
}
