//! What a disk is to the guest: its block size, queues and cache, and that it may be read-only.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use guest_tests::{Checks, Guest, GuestOptions, Seeded, fill, rounds};

use crate::cases::{
    Configured, DROP_CACHES, file_system_holds_a_tree, fio_verify, image, image_directory,
    no_kernel_errors, write_and_read_back,
};
use crate::disks::{Disks, Storage, Wanted};
use crate::{MIB, seed};

const LARGE: Configured = Configured {
    disk: "vda",
    serial: "large",
    mib: 128,
    block: 4096,
    queues: 4,
};
const PROTECTED: Configured = Configured {
    disk: "vdb",
    serial: "protected",
    mib: 16,
    block: 512,
    queues: 1,
};
const RAM: Configured = Configured {
    disk: "vdc",
    serial: "ram",
    mib: 64,
    block: 512,
    queues: 1,
};

const NOTHING: Configured = Configured {
    disk: "vdd",
    serial: "nothing",
    mib: 1 << 20,
    block: 512,
    queues: 1,
};

/// What the read-only disk holds.
const PROTECTED_SEED: u64 = 11;

#[test]
fn queues_caches_block_sizes_and_read_only_disks() {
    let name = "queues, caches, block sizes, read-only disks (4 CPUs; vda: 4096-byte blocks, vdb: read-only, \
                vdc: RAM, vdd: null)";
    kinds_of_disks(Storage::Remote, Checks::new(name));
}

#[test]
fn queues_caches_block_sizes_and_read_only_local_disks() {
    let name = "queues, caches, block sizes, read-only local disks (4 CPUs; vda: 4096-byte blocks, direct I/O, \
                vdb: read-only, vdc: RAM, vdd: null)";
    kinds_of_disks(Storage::Local, Checks::new(name));
}

/// The disks; whether one is read-only is said to `attach`, and for local disks in the storage's own specification.
fn wanted(storage: Storage, large: &Path, protected: &Path) -> [Wanted; 4] {
    let wanted = |spec: String, seen: Configured| Wanted {
        spec,
        seen,
        read_only: false,
    };
    let (large, protected) = (large.display(), protected.display());
    let attached = storage == Storage::Remote;
    let ro = if attached { "" } else { ",ro" };
    let direct = storage.direct();
    [
        wanted(format!("file:{large},block-size=4096{direct}"), LARGE),
        Wanted {
            read_only: attached,
            ..wanted(format!("{protected}{ro}"), PROTECTED)
        },
        wanted(format!("ram:{}M", RAM.mib), RAM),
        wanted(format!("null:{}M", NOTHING.mib), NOTHING),
    ]
}

fn kinds_of_disks(storage: Storage, mut checks: Checks) {
    let directory = image_directory().unwrap();
    let large = image(&directory, "large.img", LARGE.mib).unwrap();
    let protected = image(&directory, "protected.img", PROTECTED.mib).unwrap();
    let mut content = vec![0; (PROTECTED.mib * MIB) as usize];
    fill(PROTECTED_SEED, 0, &mut content);
    fs::write(&protected, &content).unwrap();
    let mut disks = Disks::start(storage, &wanted(storage, &large, &protected)).unwrap();
    let mut guest = Guest::boot(&GuestOptions {
        cpus: 4,
        disks: disks.to_boot_with(),
        ..GuestOptions::default()
    })
    .unwrap();

    checks.check(
        "a namespace with 4096-byte blocks, 4 queues on 4 CPUs",
        || LARGE.check(&mut guest),
    );
    checks.check("a namespace in RAM", || RAM.check(&mut guest));
    checks.check("I/O from each CPU goes through a queue of its own", || {
        every_cpu_has_a_queue(&mut guest)
    });
    let guest_flushes = cache_modes(&mut checks, &mut guest);
    for round in 0..rounds() {
        checks.check(
            "64 MiB on 4096-byte blocks written, synced, read back equal",
            || {
                let stretch = Seeded {
                    seed: seed(round),
                    offset: 4096,
                    length: 64 * MIB,
                };
                write_and_read_back(&mut guest, "vda", stretch)
            },
        );
        checks.check("fio verify on 4096-byte blocks and 4 queues", || {
            fio_verify(&mut guest, "vda", 16, round)
        });
        checks.check("a file system on 4096-byte blocks", || {
            file_system_holds_a_tree(&mut guest, "vda")
        });
    }
    checks.check("a read-only disk shows its data and refuses writes", || {
        read_only(&mut guest)
    });
    checks.check(
        "a disk of nothing reads as zeroes, whatever was written",
        || nothing(&mut guest),
    );
    checks.check("no error in the kernel's log", || {
        no_kernel_errors(&mut guest)
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check("the daemons end cleanly", || disks.stop());
    checks.check("the guest's flushes reached the backend", || {
        let namespace = disks.storage_counters(2)?;
        ensure!(
            guest_flushes >= 10 && namespace.flushes >= guest_flushes,
            "{guest_flushes} were sent, {} arrived",
            namespace.flushes
        );
        Ok(format!(
            "{guest_flushes} sent, {} arrived",
            namespace.flushes
        ))
    });
    checks.check("write-through reached the backend as FUA", || {
        let namespace = disks.storage_counters(2)?;
        ensure!(
            namespace.fua_writes == 7,
            "{} FUA writes, should be 7",
            namespace.fua_writes
        );
        ensure!(
            namespace.writes == 22,
            "{} writes, should be 22",
            namespace.writes
        );
        Ok("7 of 22 writes")
    });
    checks.check("nothing was written to the read-only disk", || {
        let namespace = disks.storage_counters(1)?;
        ensure!(
            namespace.writes == 0 && namespace.write_zeroes == 0,
            "{namespace:?}"
        );
        ensure!(fs::read(&protected)? == content, "the image has changed");
        Ok("image unchanged")
    });
    checks.finish();
}

/// Reads from each CPU in turn, and looks at which queue's interrupt counts.
fn every_cpu_has_a_queue(guest: &mut Guest) -> Result<String> {
    let device = guest.sh("basename $(readlink /sys/block/vda/device)")?;
    let interrupts = |guest: &mut Guest| -> Result<Vec<u64>> {
        let counts = guest.sh(&format!(
            "awk '/{device}-req\\./ {{ n = 0; for (i = 2; i <= 5; i++) n += $i; print n }}' \
             /proc/interrupts"
        ))?;
        Ok(counts.lines().map(str::parse).collect::<Result<_, _>>()?)
    };
    let mut used = Vec::new();
    for cpu in 0..4 {
        let before = interrupts(guest)?;
        guest.sh(&format!(
            "taskset -c {cpu} dd if=/dev/vda of=/dev/null bs=4k count=50 iflag=direct status=none"
        ))?;
        let after = interrupts(guest)?;
        ensure!(
            before.len() == 4,
            "{} request queues have an interrupt",
            before.len()
        );
        let grown: Vec<usize> = (0..4)
            .filter(|&queue| after[queue] >= before[queue] + 25)
            .collect();
        ensure!(
            grown.len() == 1,
            "50 reads on CPU {cpu}: the queues' interrupts went from {before:?} to {after:?}"
        );
        used.extend(grown);
    }
    let mut distinct = used.clone();
    distinct.sort_unstable();
    distinct.dedup();
    ensure!(distinct.len() == 4, "CPUs 0 to 3 used the queues {used:?}");
    Ok(format!("CPUs 0 to 3 used the queues {used:?}"))
}

/// Works on vdc, which nothing else writes to, so that its counters are exact: 10 writes with an
/// fsync each, 7 under write-through, 5 under write-back. Returns how many flushes the guest sent.
fn cache_modes(checks: &mut Checks, guest: &mut Guest) -> u64 {
    let mut sent = 0;
    checks.check("an fsync becomes a flush", || {
        let cache = guest.sh("cat /sys/block/vdc/queue/write_cache")?;
        ensure!(cache == "write back", "the cache is '{cache}', should be 'write back'");
        guest.sh(
            "for i in $(seq 10); do \
             dd if=/dev/zero of=/dev/vdc bs=4k count=1 seek=$i conv=notrunc,fsync status=none; done",
        )?;
        sent = guest.sh("awk '{print $16}' /sys/block/vdc/stat")?.parse()?;
        ensure!(sent >= 10, "the guest sent {sent} flushes for 10 fsyncs");
        Ok(format!("{sent} flushes for 10 fsyncs"))
    });
    for (mode, first, writes) in [("write through", 100, 7), ("write back", 200, 5)] {
        checks.check(&format!("the guest switches the cache to {mode}"), || {
            // The driver's own attribute: it tells the device. queue/write_cache follows.
            guest.sh(&format!("echo '{mode}' >/sys/block/vdc/cache_type"))?;
            let cache =
                guest.sh("cat /sys/block/vdc/cache_type /sys/block/vdc/queue/write_cache")?;
            ensure!(cache == format!("{mode}\n{mode}"), "the cache is {cache:?}");
            guest.sh(&format!(
                "dd if=/dev/zero of=/dev/vdc bs=4k count={writes} seek={first} oflag=direct \
                 conv=notrunc status=none"
            ))?;
            Ok(format!("{writes} writes"))
        });
    }
    sent
}

fn nothing(guest: &mut Guest) -> Result<String> {
    NOTHING.check(guest)?;
    let (end, length) = (NOTHING.mib * MIB, 4 * MIB);
    let last = end - length;
    guest.sh(&format!(
        "for at in 0 {last}; do seeded-data write /dev/vdd $at {length} 13; {DROP_CACHES}\n\
         seeded-data zeroes /dev/vdd $at {length}; done"
    ))?;
    Ok("4 MiB at the start, 4 MiB at the end of 1 TiB".to_owned())
}

fn read_only(guest: &mut Guest) -> Result<String> {
    PROTECTED.check(guest)?;
    let flag = guest.sh("cat /sys/block/vdb/ro")?;
    ensure!(flag == "1", "/sys/block/vdb/ro is {flag}");
    let verify = format!(
        "{DROP_CACHES}; seeded-data verify /dev/vdb 0 {} {PROTECTED_SEED}",
        16 * MIB
    );
    guest.sh(&verify)?;
    for write in [
        "seeded-data write /dev/vdb 0 4096 12",
        "blockdev --setrw /dev/vdb; seeded-data write /dev/vdb 0 4096 12",
    ] {
        let output = guest.run(write)?;
        ensure!(output.status != 0, "this was taken: {write}");
    }
    guest.sh(&verify)?;
    Ok("the data is unchanged".to_owned())
}
