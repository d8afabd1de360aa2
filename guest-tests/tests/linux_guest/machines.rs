//! Virtual machines come and go, the daemons stay.

use std::time::Duration;

use anyhow::{Result, ensure};
use guest_tests::{Checks, Export, Guest, GuestOptions, Seeded};

use crate::cases::{Configured, attach, no_kernel_errors, write_and_read_back};
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
    let directory = tempfile::tempdir().unwrap();
    let mut export = Export::start(&[format!("ram:{}M", DISK.mib)]).unwrap();
    let (mut attach, disk) =
        attach(&directory, &export.uris[0], DISK.serial, DISK.queues, false).unwrap();
    let options = GuestOptions {
        disks: vec![disk],
        ..GuestOptions::default()
    };

    let mut checks = Checks::new("the next machine takes the disk of one that was killed (vda)");
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
        ensure!(attach.daemon.try_wait()?.is_none(), "attach has ended, too");
        Ok("attach is still there")
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
    checks.check("attach ends cleanly", || attach.stop().map(|()| "in time"));
    checks.check("export ends cleanly", || export.stop().map(|()| "in time"));
    checks.check("hardly a byte was copied on the way", || {
        let disk = attach.counters()?;
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
