//! What the guest writes is what it reads, after a reboot too, and what the image holds in the end.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest_tests::{Checks, Guest, GuestOptions, Seeded, fill, rounds};

use crate::cases::{
    Configured, DROP_CACHES, file_system_holds_a_tree, fio_verify, image, image_directory,
    no_kernel_errors, range_is_cleared, write_and_read_back,
};
use crate::disks::{Disks, Storage, Wanted};
use crate::{MIB, seed};

const DATA: Configured = Configured {
    disk: "vda",
    serial: "data",
    mib: 96,
    block: 512,
    queues: 2,
};
const SCRATCH: Configured = Configured {
    disk: "vdb",
    serial: "scratch",
    mib: 192,
    block: 512,
    queues: 1,
};

/// Where the 64 MiB of seeded data go, on [`DATA`].
const OFFSET: u64 = 8 * MIB;
const LENGTH: u64 = 64 * MIB;

/// Writes of a sector, over an odd boundary, and of a sector a call: offset, length, seed, chunk.
const SMALL_WRITES: [(u64, u64, u64, u64); 3] = [
    (512, 512, 101, 512),
    (2 * MIB - 1536, 3584, 102, 3584),
    (80 * MIB, 65536, 103, 512),
];

/// Bytes of one range of a Dataset Management command.
const DISCARD_RANGE: u64 = 16;

#[test]
fn data_survives_the_path_a_reboot_and_the_power_off() {
    let name =
        "data survives the path, a reboot and the power-off (2 CPUs; vda: data, vdb: scratch)";
    data_survives(Storage::Remote, Checks::new(name));
}

#[test]
fn data_on_local_disks_survives_a_reboot_and_the_power_off() {
    let name = "data on local disks survives a reboot and the power-off (2 CPUs; vda: data, vdb: scratch, direct I/O)";
    data_survives(Storage::Local, Checks::new(name));
}

fn data_survives(storage: Storage, mut checks: Checks) {
    let directory = image_directory().unwrap();
    let data = image(&directory, "data.img", DATA.mib).unwrap();
    let scratch = image(&directory, "scratch.img", SCRATCH.mib).unwrap();
    let wanted = [
        Wanted {
            spec: data.display().to_string(),
            seen: DATA,
            read_only: false,
        },
        Wanted {
            spec: format!("file:{}{}", scratch.display(), storage.direct()),
            seen: SCRATCH,
            read_only: false,
        },
    ];
    let mut disks = Disks::start(storage, &wanted).unwrap();
    let mut guest = Guest::boot(&GuestOptions {
        cpus: 2,
        disks: disks.to_boot_with(),
        ..GuestOptions::default()
    })
    .unwrap();

    checks.check("size, block size, queue count, serial of vda", || {
        DATA.check(&mut guest)
    });
    checks.check("size, block size, queue count, serial of vdb", || {
        SCRATCH.check(&mut guest)
    });
    checks.check("a fresh image reads as zeroes", || {
        guest.sh(&format!("seeded-data zeroes /dev/vda 0 {}", DATA.mib * MIB))?;
        Ok("96 MiB")
    });
    for round in 0..rounds() {
        round_of_cases(&mut checks, &mut guest, &scratch, round);
    }
    checks.check("small and odd writes after the reboot", || {
        for (offset, length, seed, chunk) in SMALL_WRITES {
            guest.sh(&format!(
                "seeded-data write /dev/vda {offset} {length} {seed} {chunk}"
            ))?;
        }
        Ok("512 B, 3584 B over 2 MiB, 64 KiB by the sector")
    });
    checks.check("no error in the kernel's log", || {
        no_kernel_errors(&mut guest)
    });
    checks.check("the daemon keeps its memory small", || {
        let bytes = disks.process(0).daemon.resident_bytes()?;
        ensure!(
            bytes < 16 * MIB,
            "{} KiB are resident, 16 MiB are the limit",
            bytes / 1024
        );
        Ok(format!("{} KiB", bytes / 1024))
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check("the daemons end cleanly", || disks.stop());
    checks.check("the image holds exactly what the guest wrote", || {
        image_is_as_written(&data)
    });
    checks.check("the counters tell of what the guest did", || {
        let (disk, namespace) = (disks.counters(1)?, disks.storage_counters(1)?);
        ensure!(
            namespace.write_zeroes > 0,
            "no write zeroes arrived: {namespace:?}"
        );
        ensure!(
            namespace.deallocates > 0,
            "no deallocate arrived: {namespace:?}"
        );
        ensure!(
            namespace.flushes > 0 && disk.flushes > 0,
            "no flush: {disk:?} {namespace:?}"
        );
        ensure!(
            namespace.fua_writes == 0,
            "FUA without being asked for: {namespace:?}"
        );
        ensure!(
            (disk.read_bytes, disk.written_bytes)
                == (namespace.read_bytes, namespace.written_bytes),
            "bytes differ: {disk:?} {namespace:?}"
        );
        ensure!(
            disk.written_bytes > 200 * MIB,
            "so few bytes written: {disk:?}"
        );
        // Direct I/O takes the guest's memory as it is, aligned; what is copied are the ranges of discards.
        ensure!(
            storage == Storage::Remote
                || (namespace.copied_bytes == 0
                    && disk.copied_bytes == DISCARD_RANGE * namespace.deallocates),
            "bytes were copied: {disk:?} {namespace:?}"
        );
        Ok(format!("{disk:?}"))
    });
    checks.finish();
}

fn round_of_cases(checks: &mut Checks, guest: &mut Guest, scratch: &Path, round: u64) {
    checks.check(
        "64 MiB written, synced, cache dropped, read back equal",
        || {
            let stretch = Seeded {
                seed: seed(round),
                offset: OFFSET,
                length: LENGTH,
            };
            write_and_read_back(guest, "vda", stretch)
        },
    );
    checks.check("fio verify, randrw, crc32c, queue depth 32, 2 jobs", || {
        fio_verify(guest, "vdb", 24, round)
    });
    checks.check("mkfs.ext4, mount, copy a tree, unmount, fsck", || {
        file_system_holds_a_tree(guest, "vdb")
    });
    checks.check("write zeroes (blkdiscard -z)", || {
        range_is_cleared(guest, "vdb", "-z", seed(round) ^ 1)
    });
    checks.check("discard (blkdiscard)", || {
        range_is_cleared(guest, "vdb", "", seed(round) ^ 2)
    });
    checks.check("a discard gives the image's space back", || {
        discard_frees(guest, scratch)
    });
    checks.check("two disks at once hold their own data", || {
        both_at_once(guest, round)
    });
    checks.check("reboot inside the guest", || {
        guest.reboot()?;
        DATA.check(guest)?;
        SCRATCH.check(guest)
    });
    checks.check("the data is there after the reboot", || {
        guest.sh(&format!(
            "seeded-data verify /dev/vda {OFFSET} {LENGTH} {}",
            seed(round)
        ))?;
        Ok("64 MiB")
    });
}

fn discard_frees(guest: &mut Guest, image: &Path) -> Result<String> {
    let allocated =
        || -> Result<u64> { Ok(fs::metadata(image).context("image")?.blocks() * 512 / MIB) };
    guest.sh(&format!(
        "seeded-data write /dev/vdb 0 {} 1; {DROP_CACHES}",
        128 * MIB
    ))?;
    let before = allocated()?;
    guest.sh("blkdiscard /dev/vdb; sync")?;
    let after = allocated()?;
    ensure!(
        before >= 128 && after <= 8,
        "{before} MiB are allocated before, {after} MiB after the whole disk was discarded"
    );
    Ok(format!("from {before} to {after} MiB"))
}

/// Both disks are written at the same time, then read at the same time.
fn both_at_once(guest: &mut Guest, round: u64) -> Result<String> {
    // On vda the data that is there is written again, so that it stays what it has to be.
    let places = [
        format!("/dev/vda {OFFSET} {} {}", 32 * MIB, seed(round)),
        format!("/dev/vdb {OFFSET} {} {}", 32 * MIB, seed(round) ^ 3),
    ];
    for verb in ["write", "verify"] {
        let mut jobs = Vec::new();
        for place in &places {
            let script = format!("seeded-data {verb} {place}");
            jobs.push(guest.start(&script, Duration::from_secs(120))?);
        }
        for (job, place) in jobs.into_iter().zip(&places) {
            guest
                .finish(job)?
                .success()
                .with_context(|| format!("{verb} {place}"))?;
        }
        guest.sh(DROP_CACHES)?;
    }
    Ok("32 MiB each".to_owned())
}

/// The whole image, byte for byte, against what the guest was told to write.
fn image_is_as_written(path: &Path) -> Result<String> {
    let found = fs::read(path)?;
    let mut expected = vec![0; (DATA.mib * MIB) as usize];
    let large = (OFFSET, LENGTH, seed(rounds() - 1), 0);
    for (offset, length, seed, _) in SMALL_WRITES.into_iter().chain([large]) {
        fill(
            seed,
            offset,
            &mut expected[offset as usize..(offset + length) as usize],
        );
    }
    ensure!(
        found.len() == expected.len(),
        "its size is {}, should be {}",
        found.len(),
        expected.len()
    );
    let mut differing = (0..found.len()).filter(|&at| found[at] != expected[at]);
    if let Some(first) = differing.next() {
        anyhow::bail!(
            "{} bytes differ, the first is number {first}",
            differing.count() + 1
        );
    }
    Ok(format!("{} MiB compared", DATA.mib))
}
