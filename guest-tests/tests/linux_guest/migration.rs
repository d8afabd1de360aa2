//! A guest moves between two machines while it works on its disk: live, back again, and through a file. Both machines' daemons are attached
//! to its namespace all the while.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use guest_tests::{
    Attach, AttachOptions, Checks, Disk, Export, Guest, GuestOptions, Migrated, Monitor, Seeded,
    qemu_version, rounds, rounds_of_copying,
};

use crate::cases::{image, image_directory, no_kernel_errors, write_and_read_back};
use crate::load::Load;
use crate::{MIB, seed};

const SIZE_MIB: u64 = 128;
const MEMORY_MIB: u32 = 320;
/// One after another, there and back.
const MOVES: u64 = 3;
/// A migration copies half a gigabyte between two machines that are emulated, and then what was written to meanwhile.
const LIMIT: Duration = Duration::from_secs(180);
/// The load has all of this for all moves.
const LOAD_LIMIT: Duration = Duration::from_secs(1200);
/// The longest that a request may take while a guest moves live, on a busy machine.
const STALL: Duration = Duration::from_secs(20);

/// Two places where the guest can be, and the one where it is.
struct Places {
    daemons: [Attach; 2],
    /// Further arguments of QEMU.
    arguments: Vec<String>,
    here: usize,
    guest: Guest,
}

impl Places {
    fn options(disk: &Attach, arguments: &[String]) -> GuestOptions {
        GuestOptions {
            disks: vec![Disk {
                socket: disk.socket.clone(),
                queues: 2,
            }],
            memory_mib: MEMORY_MIB,
            migratable: true,
            arguments: arguments.to_vec(),
            ..GuestOptions::default()
        }
    }

    /// The guest boots at the first. `arguments` are the daemons'.
    fn start(directory: &Path, uri: &str, arguments: &[&str]) -> Result<Self> {
        Self::start_with(directory, uri, arguments, &[])
    }

    /// As [`Self::start`], with arguments of QEMU's, too.
    fn start_with(
        directory: &Path,
        uri: &str,
        arguments: &[&str],
        of_qemu: &[&str],
    ) -> Result<Self> {
        let of_qemu: Vec<_> = of_qemu.iter().copied().map(str::to_owned).collect();
        let options = AttachOptions {
            arguments: arguments.iter().copied().map(str::to_owned).collect(),
            ..AttachOptions::default()
        };
        let attach = |name: &str| Attach::start(&directory.join(name), uri, &options);
        let daemons = [attach("first.sock")?, attach("second.sock")?];
        let guest = Guest::boot(&Self::options(&daemons[0], &of_qemu))?;
        Ok(Self {
            daemons,
            arguments: of_qemu,
            here: 0,
            guest,
        })
    }

    /// The machine at the other place.
    fn options_there(&self) -> GuestOptions {
        Self::options(&self.daemons[1 - self.here], &self.arguments)
    }

    /// Starts a machine at the other place, which takes the guest from `uri`.
    fn other(&self, uri: &str) -> Result<Guest> {
        Guest::incoming(&self.options_there(), uri)
    }

    /// The guest runs at the other place now.
    fn arrived(&mut self, mut there: Guest) -> Result<()> {
        there.monitor()?.await_running(LIMIT)?;
        there.take_over(&self.guest);
        std::mem::replace(&mut self.guest, there).kill()?;
        self.here = 1 - self.here;
        Ok(())
    }

    fn go_live(&mut self, directory: &Path) -> Result<Migrated> {
        let uri = format!("unix:{}", directory.join("migration.sock").display());
        let there = self.other(&uri)?;
        let migrated = self.guest.monitor()?.migrate(&uri, LIMIT)?;
        self.arrived(there)?;
        Ok(migrated)
    }

    /// The same, but the guest goes on only after its memory here and there was compared.
    fn go_compared(&mut self, directory: &Path) -> Result<Migrated> {
        let uri = format!("unix:{}", directory.join("migration.sock").display());
        let mut options = self.options_there();
        options.arguments.push("-S".to_owned());
        let there = Guest::incoming(&options, &uri)?;
        let migrated = self.guest.monitor()?.migrate(&uri, LIMIT)?;
        let mut monitor = there.monitor()?;
        monitor.await_migrated(LIMIT)?;
        let files = [
            directory.join("here.memory"),
            directory.join("there.memory"),
        ];
        let size = u64::from(MEMORY_MIB) * MIB;
        self.guest.monitor()?.save_memory(size, &files[0])?;
        monitor.save_memory(size, &files[1])?;
        let pages = differing_pages(&files)?;
        ensure!(
            pages.is_empty(),
            "{} pages are not what they were, the first at {:#x}",
            pages.len(),
            pages[0]
        );
        monitor.cont()?;
        drop(monitor);
        self.arrived(there)?;
        Ok(migrated)
    }

    /// It is stopped, saved and loaded. Returns the time from its last step to its next one.
    fn go_through_a_file(&mut self, directory: &Path) -> Result<Duration> {
        let mut monitor = self.guest.monitor()?;
        monitor.stop()?;
        let stopped = Instant::now();
        save(&mut monitor, directory)?;
        let there = self.load(directory)?;
        // It was not running when it was saved.
        let mut monitor = there.monitor()?;
        monitor.await_migrated(LIMIT)?;
        monitor.cont()?;
        drop(monitor);
        self.arrived(there)?;
        Ok(stopped.elapsed())
    }

    /// It is saved while it works, and loaded.
    fn go_live_through_a_file(&mut self, directory: &Path) -> Result<Migrated> {
        let migrated = save(&mut self.guest.monitor()?, directory)?;
        let there = self.load(directory)?;
        self.arrived(there)?;
        Ok(migrated)
    }

    fn load(&self, directory: &Path) -> Result<Guest> {
        self.other(&format!("exec:cat {}", state(directory)))
    }
}

/// The file for a guest that is saved.
fn state(directory: &Path) -> String {
    directory.join("guest.state").display().to_string()
}

fn save(monitor: &mut Monitor, directory: &Path) -> Result<Migrated> {
    monitor.migrate(&format!("exec:cat >{}", state(directory)), LIMIT)
}

/// Of the rounds that were asked for, as many as even a guest has that does little for a moment.
fn in_rounds(migrated: Migrated) -> Result<Migrated> {
    let least = rounds_of_copying()?.min(3);
    ensure!(migrated.rounds >= least, "{migrated:?}");
    Ok(migrated)
}

/// Addresses of pages that the files have different, which are removed.
fn differing_pages(files: &[PathBuf; 2]) -> Result<Vec<usize>> {
    const PAGE: usize = 4096;
    let mut memories = Vec::new();
    for file in files {
        memories.push(std::fs::read(file)?);
        std::fs::remove_file(file)?;
    }
    ensure!(memories[0].len() == memories[1].len() && !memories[0].is_empty());
    let pages = memories[0].chunks(PAGE).zip(memories[1].chunks(PAGE));
    let differ = pages.enumerate().filter(|(_, (here, there))| here != there);
    Ok(differ.map(|(page, _)| page * PAGE).collect())
}

/// Moves it so many times while it works.
fn move_live(places: &mut Places, directory: &Path, moves: u64) -> Result<String> {
    let mut longest = Duration::ZERO;
    let mut copied = 0;
    for _ in 0..moves {
        let migrated = in_rounds(places.go_live(directory)?)?;
        longest = longest.max(migrated.downtime);
        copied += migrated.rounds;
        sleep(Duration::from_secs(2));
    }
    Ok(format!(
        "{moves} times, copied in {copied} rounds, it stood still for {longest:.1?} at most"
    ))
}

#[test]
fn a_guest_with_sectors_of_a_namespace_with_large_blocks_moves() {
    let mut checks = Checks::new("a guest with sectors moves (vda: one namespace, blocks of 4096)");
    let directory = image_directory().unwrap();
    let image = image(&directory, "moved.img", SIZE_MIB).unwrap();
    let spec = format!("file:{},block-size=4096", image.display());
    let mut export = Export::start(&[spec]).unwrap();
    let arguments = ["--emulate-512"];
    let mut places = Places::start(directory.path(), &export.uris[0], &arguments).unwrap();
    let load = Load::start(&mut places.guest, "vda", seed(0), LOAD_LIMIT).unwrap();
    load.await_writes(&mut places.guest).unwrap();
    checks.check("it is moved live, there and back", || {
        move_live(&mut places, directory.path(), 2 * rounds())
    });
    checks.check("what it wrote meanwhile, it has read", || {
        let done = load.finish(&mut places.guest)?;
        ensure!(done.longest < STALL, "{done}");
        Ok(done)
    });
    checks.check("no error in the guest's kernel log", || {
        no_kernel_errors(&mut places.guest)
    });
    checks.check("power-off, and the daemons end cleanly", || {
        places.guest.power_off()?;
        for attach in &mut places.daemons {
            attach.stop()?;
        }
        export.stop().map(|()| "status 0")
    });
    checks.finish();
}

/// QEMU 11.1 and later can have requests move with the guest, instead of waiting for them: in the region of those in flight.
#[test]
fn a_guest_moves_with_its_requests_in_flight() {
    if qemu_version().unwrap() < (11, 1) {
        eprintln!("  skipped: requests move with a guest where VHOST_NVMF_QEMU is 11.1 or later");
        return;
    }
    let mut checks = Checks::new("a guest moves with its requests in flight (vda: slow storage)");
    let directory = image_directory().unwrap();
    let image = image(&directory, "moved.img", SIZE_MIB).unwrap();
    let spec = format!("file:{},fault=delay=500ms-1s:rate=20%", image.display());
    let mut export = Export::start(&[spec]).unwrap();
    let of_qemu = ["-global", "vhost-user-blk-pci.inflight-migration=on"];
    let mut places = Places::start_with(directory.path(), &export.uris[0], &[], &of_qemu).unwrap();
    let load = Load::start(&mut places.guest, "vda", seed(0), LOAD_LIMIT).unwrap();
    load.await_writes(&mut places.guest).unwrap();
    checks.check("it is moved live, there and back", || {
        move_live(&mut places, directory.path(), 4 * rounds())
    });
    checks.check("what it wrote meanwhile, it has read", || {
        let done = load.finish(&mut places.guest)?;
        ensure!(done.longest < STALL, "{done}");
        Ok(done)
    });
    checks.check("no error in the guest's kernel log", || {
        no_kernel_errors(&mut places.guest)
    });
    checks.check("power-off, and the daemons end cleanly", || {
        places.guest.power_off()?;
        let mut moved = 0;
        for attach in &mut places.daemons {
            attach.stop()?;
            let rings = attach.daemon.logged("ring goes on from an earlier life");
            moved += rings
                .iter()
                .filter_map(|ring| ring["in_flight"].as_u64())
                .sum::<u64>();
        }
        export.stop()?;
        ensure!(moved > 0, "none was in flight");
        Ok(format!("{moved} requests moved in flight"))
    });
    checks.finish();
}

#[test]
fn a_guest_moves_between_machines_and_does_not_notice() {
    let mut checks =
        Checks::new("a guest moves between machines (vda: one namespace, two daemons)");
    let directory = image_directory().unwrap();
    let image = image(&directory, "moved.img", SIZE_MIB).unwrap();
    let mut export = Export::start(&[format!("file:{}", image.display())]).unwrap();
    let mut places = Places::start(directory.path(), &export.uris[0], &[]).unwrap();

    let load = Load::start(&mut places.guest, "vda", seed(0), LOAD_LIMIT).unwrap();
    load.await_writes(&mut places.guest).unwrap();
    checks.check("it is moved live, there and back", || {
        let moves = MOVES * rounds();
        move_live(&mut places, directory.path(), moves)
    });
    checks.check("its memory is the same there as here", || {
        let moves = 2 * rounds();
        for _ in 0..moves {
            in_rounds(places.go_compared(directory.path())?)?;
            sleep(Duration::from_secs(2));
        }
        Ok(format!("all {MEMORY_MIB} MiB, {moves} times"))
    });
    checks.check("its machine is stopped and goes on", || {
        let mut monitor = places.guest.monitor()?;
        for _ in 0..5 * rounds() {
            monitor.stop()?;
            sleep(Duration::from_millis(300));
            monitor.cont()?;
            sleep(Duration::from_millis(300));
        }
        Ok(format!("{} times", 5 * rounds()))
    });
    checks.check("what it wrote meanwhile, it has read", || {
        let done = load.finish(&mut places.guest)?;
        ensure!(done.longest < STALL, "{done}");
        Ok(done)
    });
    let load = Load::start(&mut places.guest, "vda", seed(1), LOAD_LIMIT).unwrap();
    load.await_writes(&mut places.guest).unwrap();
    checks.check("it goes through a file", || {
        let away = places.go_through_a_file(directory.path())?;
        Ok(format!("and was away for {away:.1?}"))
    });
    checks.check("and again, while it works", || {
        sleep(Duration::from_secs(2));
        let migrated = in_rounds(places.go_live_through_a_file(directory.path())?)?;
        sleep(Duration::from_secs(2));
        Ok(format!("copied in {} rounds", migrated.rounds))
    });
    checks.check("and what it wrote around that, it has read", || {
        load.finish(&mut places.guest)
    });
    checks.check("a write here is read there", || {
        let stretch = Seeded {
            seed: seed(2),
            offset: 64 * MIB,
            length: 8 * MIB,
        };
        write_and_read_back(&mut places.guest, "vda", stretch)?;
        places.go_live(directory.path())?;
        places.guest.sh(&format!(
            "echo 3 >/proc/sys/vm/drop_caches; seeded-data verify /dev/vda {} {} {}",
            stretch.offset, stretch.length, stretch.seed
        ))?;
        Ok("8 MiB")
    });
    checks.check("no error in the guest's kernel log", || {
        no_kernel_errors(&mut places.guest)
    });
    checks.check("power-off", || {
        places.guest.power_off().map(|()| "QEMU ended")
    });
    checks.check("the daemons end cleanly", || {
        let mut moved = Vec::new();
        for attach in &mut places.daemons {
            attach.stop()?;
            let counters = attach.counters()?;
            moved.push(counters.read_bytes / MIB + counters.written_bytes / MIB);
            let log = attach.daemon.logged("the front-end's log of written pages");
            ensure!(log.is_empty(), "{log:?}");
        }
        export.stop()?;
        ensure!(moved.iter().all(|mib| *mib > 0), "{moved:?}");
        Ok(format!("{moved:?} MiB read and written"))
    });
    checks.finish();
}
