//! Daemons are killed, or told to end, at any moment, under a guest that works on its disk, and started again: QEMU finds them when
//! it looks for them, once a second.

use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guest_tests::{
    Attach, AttachOptions, Checks, Export, Guest, GuestOptions, reconnect_each_second, rounds,
};
use tempfile::TempDir;

use crate::cases::{image, image_directory, no_kernel_errors};
use crate::disks::Storage;
use crate::load::Load;
use crate::synced::Pieces;
use crate::{MIB, seed};

const SIZE_MIB: u64 = 128;
/// The load has all of this for the kills.
const LIMIT: Duration = Duration::from_secs(240);
/// The longest that a request may take: QEMU's second, a start of the daemon, a handshake, and half a second for all of it.
const STALL: Duration = Duration::from_millis(1500);
/// QEMU looks for it once a second.
const FOUND: Duration = Duration::from_secs(20);
const UUID: &str = "6ba7b812-9dad-41d1-80b4-00c04fd430c8";
/// Where what the guest syncs ends, and what is never synced begins.
const SYNCED: u64 = 96 * MIB;

/// So often is it ended: twenty times where there is time.
fn ends() -> u64 {
    if rounds() > 1 { 20 } else { 3 }
}

/// How a daemon is ended.
#[derive(Clone, Copy)]
enum End {
    Killed,
    /// By SIGTERM.
    Told,
}

/// How long a daemon was away.
#[derive(Default)]
struct Away {
    /// Until the next one was there.
    there: Duration,
    /// Until QEMU was connected with that.
    found: Duration,
}

impl Away {
    fn longest(&self, other: &Self) -> Self {
        Self {
            there: self.there.max(other.there),
            found: self.found.max(other.found),
        }
    }
}

/// A disk whose daemon can be killed and started again.
struct Disk {
    storage: Storage,
    socket: PathBuf,
    image: PathBuf,
    options: &'static str,
    export: Option<Export>,
    daemon: Option<Attach>,
}

impl Disk {
    fn start(storage: Storage, directory: &TempDir, options: &'static str) -> Result<Self> {
        let mut disk = Self {
            storage,
            socket: directory.path().join("crash.sock"),
            image: image(directory, "crash.img", SIZE_MIB)?,
            options,
            export: None,
            daemon: None,
        };
        disk.start_target()?;
        disk.start_daemon()?;
        Ok(disk)
    }

    fn spec(&self) -> String {
        format!("file:{},uuid={UUID}{}", self.image.display(), self.options)
    }

    fn start_target(&mut self) -> Result<()> {
        if self.storage == Storage::Remote {
            self.export = Some(Export::start(&[self.spec()])?);
        }
        Ok(())
    }

    fn start_daemon(&mut self) -> Result<()> {
        let options = AttachOptions::default();
        self.daemon = Some(match &self.export {
            Some(export) => Attach::start(&self.socket, &export.uris[0], &options)?,
            None => Attach::serve(&self.socket, &self.spec(), &options)?,
        });
        Ok(())
    }

    fn daemon(&mut self) -> Result<&mut Attach> {
        self.daemon.as_mut().context("it runs")
    }

    /// Waits until QEMU has found the next one.
    fn restart(&mut self, end: End) -> Result<Away> {
        let begun = Instant::now();
        match end {
            End::Killed => self.daemon()?.daemon.kill()?,
            End::Told => self.daemon()?.stop()?,
        }
        self.start_daemon()?;
        let there = begun.elapsed();
        let daemon = &self.daemon()?.daemon;
        while daemon.logged("front-end connected").is_empty() {
            ensure!(begun.elapsed() < FOUND, "QEMU does not find it");
            sleep(Duration::from_millis(5));
        }
        let found = begun.elapsed();
        Ok(Away { there, found })
    }

    /// QEMU looks for a daemon that is gone once a second.
    fn guest(&self) -> Result<GuestOptions> {
        let reconnect = reconnect_each_second()?;
        let socket = self.socket.display();
        let arguments = [
            "-chardev",
            &format!("socket,id=disk,path={socket},{reconnect}"),
            "-device",
            "vhost-user-blk-pci,chardev=disk,num-queues=2",
        ];
        Ok(GuestOptions {
            arguments: arguments.map(str::to_owned).to_vec(),
            ..GuestOptions::default()
        })
    }

    fn stop(&mut self) -> Result<()> {
        self.daemon()?.stop()?;
        match &mut self.export {
            Some(export) => export.stop(),
            None => Ok(()),
        }
    }
}

#[test]
fn a_daemon_that_is_killed_or_restarted_again_and_again_is_not_noticed() {
    let name = "the daemon of a remote disk is ended again and again (vda)";
    ended_again_and_again(Storage::Remote, Checks::new(name));
}

#[test]
fn the_daemon_of_a_local_disk_that_is_killed_or_restarted_again_and_again_is_not_noticed() {
    let name = "the daemon of a local disk is ended again and again (vda)";
    ended_again_and_again(Storage::Local, Checks::new(name));
}

fn ended_again_and_again(storage: Storage, mut checks: Checks) {
    let directory = image_directory().unwrap();
    let mut disk = Disk::start(storage, &directory, storage.direct()).unwrap();
    let mut guest = Guest::boot(&disk.guest().unwrap()).unwrap();
    for (end, name) in [
        (End::Killed, "killed and started again under load"),
        (End::Told, "told to end and started again under load"),
    ] {
        checks.check(name, || again_and_again(&mut disk, &mut guest, end));
    }
    checks.check("no error in the kernel's log", || {
        no_kernel_errors(&mut guest)
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check("the daemons end cleanly", || {
        disk.stop().map(|()| "status 0")
    });
    checks.finish();
}

/// What the guest wrote meanwhile, it has read.
fn again_and_again(disk: &mut Disk, guest: &mut Guest, end: End) -> Result<String> {
    let load = Load::start(guest, "vda", seed(end as u64), LIMIT)?;
    sleep(Duration::from_secs(3));
    let mut away = Away::default();
    for number in 0..ends() {
        away = away.longest(&disk.restart(end)?);
        // Each time at another moment of what the guest does.
        sleep(Duration::from_millis(1000 + number * 977 % 3000));
    }
    let done = load.finish(guest)?;
    // The start of a process is the machine's affair.
    ensure!(done.longest < STALL + away.there, "{done}");
    let (ends, there) = (ends(), away.there.as_secs_f32());
    let found = away.found.as_secs_f32();
    Ok(format!(
        "{ends} times, there again after {there:.2} s, found after {found:.2} s at most; {done}"
    ))
}

#[test]
fn what_a_guest_was_told_is_synced_is_there_after_everything_was_killed_at_once() {
    let mut checks = Checks::new("daemon, QEMU and target are killed at once (vda)");
    let directory = image_directory().unwrap();
    let mut disk = Disk::start(Storage::Remote, &directory, ",powercut").unwrap();
    for round in 0..rounds() {
        let pieces = Pieces::of(0, SYNCED, seed(round) * 4096);
        let mut guest = Guest::boot(&disk.guest().unwrap()).unwrap();
        let mut synced = 0;
        checks.check("everything is killed in the middle of writes", || {
            synced = everything_is_killed(&mut disk, &mut guest, pieces)?;
            Ok(format!("{synced} pieces were synced"))
        });
        drop(guest);
        disk.daemon = None;
        disk.start_target().unwrap();
        disk.start_daemon().unwrap();
        let mut guest = Guest::boot(&disk.guest().unwrap()).unwrap();
        checks.check("each piece that was synced is there", || {
            pieces.verify(&mut guest, synced)
        });
        checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    }
    checks.check("the daemons end cleanly", || {
        disk.stop().map(|()| "status 0")
    });
    checks.finish();
}

/// The daemon several times, then all at once. Gives the number of pieces that the guest had told it has synced.
fn everything_is_killed(disk: &mut Disk, guest: &mut Guest, pieces: Pieces) -> Result<u64> {
    // What is beside them is never synced, and may be lost.
    let beside = format!(
        "dd if=/dev/urandom of=/dev/vda bs=64k seek={} count=400 oflag=direct &",
        SYNCED >> 16
    );
    pieces.write(guest, &beside, LIMIT)?;
    pieces.await_told(guest, 1, LIMIT)?;
    for _ in 0..ends() {
        disk.restart(End::Killed)?;
        sleep(Duration::from_millis(1500));
    }
    pieces.await_told(guest, 11, LIMIT)?;
    let export = disk.export.as_mut().context("it runs")?;
    export.daemon.kill()?;
    if let Some(daemon) = &mut disk.daemon {
        daemon.daemon.kill()?;
    }
    guest.kill()?;
    let synced = pieces.told(guest);
    ensure!(synced < pieces.count, "all pieces were synced");
    Ok(synced)
}
