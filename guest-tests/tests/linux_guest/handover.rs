//! A disk goes from one process to the next under a guest that works on it.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest_tests::{Attach, AttachOptions, Checks, Disk, Export, Guest, GuestOptions, rounds};

use crate::cases::{image, image_directory, no_kernel_errors};
use crate::load::Load;
use crate::{MIB, seed};

const SIZE_MIB: u64 = 128;
/// The load has all of this for the hand-overs.
const LIMIT: Duration = Duration::from_secs(600);
/// The longest that a guest may wait for a hand-over to a target that is well, on a machine whose processors are
/// emulating one.
const STALL_MS: u64 = 500;
const READY: Duration = Duration::from_secs(10);
/// The longest that a request may take where processors are emulated.
const SLOWEST: Duration = Duration::from_secs(10);

/// So often is it handed over: twenty times where there is time.
fn hand_overs() -> usize {
    if rounds() > 1 { 20 } else { 3 }
}

/// Starts a process that takes the disk over, and gives it with the stall that it tells.
fn take_over(old: &mut Attach, uri: &str) -> Result<(Attach, u64)> {
    let options = AttachOptions {
        arguments: vec!["--takeover".to_owned()],
        ..AttachOptions::default()
    };
    let mut new = Attach::start(&old.socket, uri, &options)?;
    let status = old.daemon.wait(Duration::from_secs(10))?;
    ensure!(status.success(), "the process before ended with {status}");
    let told = |line: &str| line.contains("guest stalled");
    let told = new.daemon.wait_for_output(1, READY, told)?.concat();
    let stall = told.split("guest stalled ").nth(1);
    let stall = stall.and_then(|rest| rest.split(' ').next());
    let stall = stall.with_context(|| format!("no stall in {told:?}"))?;
    Ok((new, stall.parse()?))
}

#[test]
fn a_disk_that_is_handed_over_is_not_noticed_by_its_guest() {
    let mut checks = Checks::new("a disk is handed over from process to process (vda)");
    let directory = image_directory().unwrap();
    let image = image(&directory, "handover.img", SIZE_MIB).unwrap();
    let export = Export::start(&[&format!("file:{}", image.display())]).unwrap();
    let uri = export.uris[0].clone();
    let socket = directory.path().join("handover.sock");
    let mut attach = Attach::start(&socket, &uri, &AttachOptions::default()).unwrap();
    let mut guest = Guest::boot(&GuestOptions {
        disks: vec![Disk { socket, queues: 2 }],
        ..GuestOptions::default()
    })
    .unwrap();

    let load = Load::start(&mut guest, "vda", seed(0), LIMIT).unwrap();
    sleep(Duration::from_secs(3));
    checks.check("the disk is handed over under load", || {
        let mut longest = 0;
        for _ in 0..hand_overs() {
            let (new, stall) = take_over(&mut attach, &uri)?;
            longest = longest.max(stall);
            attach = new;
            sleep(Duration::from_secs(2));
        }
        ensure!(longest < STALL_MS, "the guest stalled for {longest} ms");
        let times = hand_overs();
        Ok(format!(
            "{times} times, the guest stalled for {longest} ms at most"
        ))
    });
    checks.check("what the guest wrote meanwhile, it has read", || {
        let done = load.finish(&mut guest)?;
        ensure!(done.longest < SLOWEST, "{done}");
        Ok(done)
    });
    checks.check("no error in the kernel's log", || {
        no_kernel_errors(&mut guest)
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check("the last process ends cleanly", || {
        attach.stop()?;
        let moved = attach.counters()?.written_bytes / MIB;
        Ok(format!("{moved} MiB written through it"))
    });
    checks.finish();
}
