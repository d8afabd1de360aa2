//! Daemons are killed, at any moment, under a guest that works on its disk, and started again: QEMU finds them when it looks for
//! them, once a second.

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
use crate::{MIB, seed};

const SIZE_MIB: u64 = 128;
/// The load has all of this for the kills.
const LIMIT: Duration = Duration::from_secs(240);
/// The longest that a request may take: QEMU's second, a start of the daemon, a handshake, and half a second for all of it.
const STALL: Duration = Duration::from_millis(1500);
const UUID: &str = "6ba7b812-9dad-41d1-80b4-00c04fd430c8";
/// Bytes of one piece of the guest that tells what it has synced.
const PIECE: u64 = 64 << 10;
/// Where its pieces end, and what is never synced begins.
const SYNCED: u64 = 96 * MIB;

/// So often is it killed: twenty times where there is time.
fn kills() -> usize {
    if rounds() > 1 { 20 } else { 3 }
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

    /// SIGKILL. Gives the time until it is there again.
    fn kill_and_restart(&mut self) -> Result<Duration> {
        let killed = Instant::now();
        self.daemon()?.daemon.kill()?;
        self.start_daemon()?;
        Ok(killed.elapsed())
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
fn a_daemon_that_is_killed_again_and_again_is_not_noticed() {
    let name = "the daemon of a remote disk is killed again and again (vda)";
    killed_again_and_again(Storage::Remote, Checks::new(name));
}

#[test]
fn the_daemon_of_a_local_disk_that_is_killed_again_and_again_is_not_noticed() {
    let name = "the daemon of a local disk is killed again and again (vda)";
    killed_again_and_again(Storage::Local, Checks::new(name));
}

fn killed_again_and_again(storage: Storage, mut checks: Checks) {
    let directory = image_directory().unwrap();
    let mut disk = Disk::start(storage, &directory, storage.direct()).unwrap();
    let mut guest = Guest::boot(&disk.guest().unwrap()).unwrap();
    let load = Load::start(&mut guest, "vda", seed(0), LIMIT).unwrap();
    sleep(Duration::from_secs(3));
    let mut away = Duration::ZERO;
    checks.check("the daemon is killed and started again", || {
        for kill in 0..kills() as u64 {
            away = away.max(disk.kill_and_restart()?);
            // Each time at another moment of what the guest does.
            sleep(Duration::from_millis(2000 + kill * 977 % 3000));
        }
        let kills = kills();
        Ok(format!(
            "{kills} times, away for {:.2} s at most",
            away.as_secs_f32()
        ))
    });
    checks.check("what the guest wrote meanwhile, it has read", || {
        let done = load.finish(&mut guest)?;
        // The start of a process is the machine's affair.
        ensure!(done.longest < STALL + away, "{done}");
        Ok(done)
    });
    checks.check("it works on", || {
        let load = Load::start(&mut guest, "vda", seed(1), LIMIT)?;
        sleep(Duration::from_secs(3));
        load.finish(&mut guest)
    });
    checks.check("no error in the kernel's log", || {
        no_kernel_errors(&mut guest)
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check("the daemons end cleanly", || {
        disk.stop().map(|()| "status 0")
    });
    checks.finish();
}

/// Pieces that the guest says it has synced.
fn told(guest: &Guest) -> u64 {
    let console = guest.console_tail(200);
    let said = console
        .lines()
        .filter_map(|line| line.trim().strip_prefix("synced "));
    said.filter_map(|number| number.parse().ok())
        .max()
        .unwrap_or(0)
}

#[test]
fn what_a_guest_was_told_is_synced_is_there_after_everything_was_killed_at_once() {
    let mut checks = Checks::new("daemon, QEMU and target are killed at once (vda)");
    let directory = image_directory().unwrap();
    let mut disk = Disk::start(Storage::Remote, &directory, ",powercut").unwrap();
    for round in 0..rounds() {
        let base = seed(round) * 4096;
        let mut guest = Guest::boot(&disk.guest().unwrap()).unwrap();
        let mut synced = 0;
        checks.check("everything is killed in the middle of writes", || {
            let (piece, last) = (PIECE, SYNCED / PIECE);
            // What is beside them is never synced, and may be lost.
            let _never_answered = guest.start(
                &format!(
                    "dd if=/dev/urandom of=/dev/vda bs=64k seek={last} count=400 oflag=direct &
                     for i in $(seq {last}); do
                         seeded-data write /dev/vda $((i * {piece} - {piece})) {piece} $(({base} + i))
                         echo synced $i >/dev/ttyS0
                     done"
                ),
                LIMIT,
            )?;
            sleep(Duration::from_secs(2));
            for _ in 0..kills() {
                disk.kill_and_restart()?;
                sleep(Duration::from_millis(2500));
            }
            let export = disk.export.as_mut().context("it runs")?;
            export.daemon.kill()?;
            if let Some(daemon) = &mut disk.daemon {
                daemon.daemon.kill()?;
            }
            guest.kill()?;
            synced = told(&guest);
            ensure!(synced > 10 && synced < last, "{synced} pieces were synced");
            Ok(format!("{synced} pieces were synced"))
        });
        drop(guest);
        disk.daemon = None;
        disk.start_target().unwrap();
        disk.start_daemon().unwrap();
        let mut guest = Guest::boot(&disk.guest().unwrap()).unwrap();
        checks.check("each piece that was synced is there", || {
            guest.sh(&format!(
                "for i in $(seq {synced}); do
                     seeded-data verify /dev/vda $((i * {PIECE} - {PIECE})) {PIECE} $(({base} + i))
                 done"
            ))?;
            Ok(format!("{synced} of {} KiB", PIECE >> 10))
        });
        checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    }
    checks.check("the daemons end cleanly", || {
        disk.stop().map(|()| "status 0")
    });
    checks.finish();
}
