//! Virtual machines come and go, the daemons stay.

use std::time::Duration;

use anyhow::{Result, ensure};
use guest_tests::{Checks, Guest, GuestOptions, Seeded};

use crate::cases::{Configured, image, image_directory, no_kernel_errors, write_and_read_back};
use crate::disks::{Disks, Storage, Wanted};
use crate::{MIB, seed};

const DISK: Configured = Configured {
    disk: "vda",
    serial: "steady",
    mib: 128,
    block: 512,
    queues: 1,
};

#[test]
fn the_next_machine_takes_the_disk_of_one_that_was_killed() {
    let name = "the next machine takes the disk of one that was killed (vda)";
    the_next_machine(Storage::Remote, Checks::new(name));
}

#[test]
fn the_next_machine_takes_the_local_disk_of_one_that_was_killed() {
    let name = "the next machine takes the local disk of one that was killed (vda)";
    the_next_machine(Storage::Local, Checks::new(name));
}

fn the_next_machine(storage: Storage, mut checks: Checks) {
    let directory = image_directory().unwrap();
    let image = image(&directory, "steady.img", DISK.mib).unwrap();
    // The kernel may still read into the memory of a machine that is gone, or write from it.
    let spec = match storage {
        Storage::Remote => format!("ram:{}M", DISK.mib),
        Storage::Local => format!("{},direct", image.display()),
    };
    let wanted = [Wanted {
        spec,
        seen: DISK,
        read_only: false,
    }];
    let mut disks = Disks::start(storage, &wanted).unwrap();
    let options = GuestOptions {
        disks: disks.to_boot_with(),
        ..GuestOptions::default()
    };

    let mut first = Guest::boot(&options).unwrap();
    checks.check("the first machine writes", || {
        let stretch = Seeded {
            seed: seed(0),
            offset: 0,
            length: 32 * MIB,
        };
        write_and_read_back(&mut first, "vda", stretch)
    });
    checks.check("QEMU is killed in the middle of writes", || {
        let writes = format!(
            "for i in $(seq 1000); do seeded-data write /dev/vda {} {} 5; done",
            64 * MIB,
            16 * MIB
        );
        let _never_answered = first.start(&writes, Duration::from_secs(60))?;
        std::thread::sleep(Duration::from_secs(2));
        first.kill()?;
        let ended = disks.process(0).daemon.try_wait()?;
        ensure!(ended.is_none(), "the daemon has ended, too");
        Ok("the daemon is still there")
    });
    drop(first);

    let mut second = Guest::boot(&options).unwrap();
    checks.check("the second machine finds the same disk", || {
        DISK.check(&mut second)
    });
    checks.check("and on it what the first had synced", || {
        second.sh(&format!(
            "seeded-data verify /dev/vda 0 {} {}",
            32 * MIB,
            seed(0)
        ))?;
        Ok("32 MiB")
    });
    checks.check("128 KiB requests, read and written", || {
        large_requests(&mut second)
    });
    checks.check("no error in the kernel's log", || {
        no_kernel_errors(&mut second)
    });
    checks.check("power-off", || second.power_off().map(|()| "QEMU ended"));
    checks.check("the daemons end cleanly", || disks.stop());
    checks.check("hardly a byte was copied on the way", || {
        let disk = disks.counters(0)?;
        let moved = disk.read_bytes + disk.written_bytes;
        // Small reads (the partition scan, for one) may be copied out of the receive buffer.
        ensure!(
            moved > 150 * MIB && disk.copied_bytes < moved / 20,
            "{} of {moved} bytes were copied",
            disk.copied_bytes
        );
        Ok(format!("{} of {moved} bytes", disk.copied_bytes))
    });
    checks.finish();
}

fn large_requests(guest: &mut Guest) -> Result<String> {
    guest.sh(
        "fio --name=large --filename=/dev/vda --offset=32M --size=32M --rw=write --bs=128k \
         --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c --verify_fatal=1 --do_verify=1 \
         >/tmp/fio.log || { tail -20 /tmp/fio.log >&2; false; }",
    )?;
    Ok("32 MiB each way, verified".to_owned())
}
