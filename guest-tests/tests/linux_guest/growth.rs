//! Namespaces that change under those who have them: Linux's target changes one under `attach` and a guest, and `export` one under
//! Linux's host.

use std::fs::OpenOptions;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest_tests::{
    Attach, AttachOptions, Checks, Disk, Export, Guest, GuestOptions, Seeded, rounds,
};

use crate::cases::{image, image_directory, no_kernel_errors, write_and_read_back};
use crate::load::Load;
use crate::{MIB, seed};

const NQN: &str = "nqn.2026-01.org.example:changes";
const PORT: u16 = 4420;
const SMALL_MIB: u64 = 64;
const LARGE_MIB: u64 = 160;
/// The load has all of this.
const LIMIT: Duration = Duration::from_secs(600);
/// The longest that a request may take, on a busy machine.
const STALL: Duration = Duration::from_secs(10);
const HOST: &str =
    "--hostid=11111111-2222-3333-4444-555555555555 --hostnqn=nqn.2026-01.org.example:linux-host";
/// In the target's configuration.
const NAMESPACE: &str =
    "/sys/kernel/config/nvmet/subsystems/nqn.2026-01.org.example:changes/namespaces/1";
const GROUP: &str = "/sys/kernel/config/nvmet/ports/4420/ana_groups/1/ana_state";

/// nvmet with one file.
fn configure(target: &mut Guest) -> Result<()> {
    let script = format!(
        "modprobe nvmet-tcp; mount -t configfs none /sys/kernel/config; cd /sys/kernel/config/nvmet\n\
         truncate -s {SMALL_MIB}M /tmp/disk.img\n\
         s=subsystems/{NQN}; mkdir $s; echo 1 >$s/attr_allow_any_host\n\
         n=$s/namespaces/1; mkdir $n; echo /tmp/disk.img >$n/device_path; echo 1 >$n/buffered_io; echo 1 >$n/enable\n\
         p=ports/{PORT}; mkdir $p; echo ipv4 >$p/addr_adrfam; echo tcp >$p/addr_trtype\n\
         echo 0.0.0.0 >$p/addr_traddr; echo {PORT} >$p/addr_trsvcid; ln -s $PWD/$s $p/subsystems/{NQN}"
    );
    target.sh(&script).context("nvmet")?;
    Ok(())
}

/// Waits until the guest sees a block device of this size.
fn await_size(guest: &mut Guest, device: &str, mib: u64) -> Result<String> {
    guest.sh(&format!(
        "for i in $(seq 100); do s=$(blockdev --getsize64 {device}); [ $s = {} ] && exit 0; sleep 0.1; done; \
         echo it has $s bytes >&2; false",
        mib * MIB
    ))?;
    Ok(format!("{mib} MiB"))
}

fn await_logged(attach: &Attach, message: &str, count: usize) -> Result<String> {
    for _ in 0..100 {
        if attach.daemon.logged(message).len() >= count {
            return Ok(message.to_owned());
        }
        sleep(Duration::from_millis(100));
    }
    anyhow::bail!("attach has not logged '{message}' {count} times within 10 s");
}

fn grow(image: &Path, mib: u64, export: &Export) -> Result<()> {
    OpenOptions::new()
        .write(true)
        .open(image)?
        .set_len(mib * MIB)?;
    export.daemon.hang_up()
}

#[test]
fn namespaces_that_change_reach_those_who_have_them() {
    let mut checks = Checks::new(
        "namespaces that change reach those who have them (nvmet in a guest of its own; vda: its file)",
    );
    let directory = image_directory().unwrap();
    let mut target = Guest::boot(&GuestOptions {
        forward: vec![PORT],
        ..GuestOptions::default()
    })
    .unwrap();
    configure(&mut target).unwrap();
    let uri = format!("nvme+tcp://{}/{NQN}", target.forwarded(PORT).unwrap());
    let socket = directory.path().join("changes.sock");
    let mut attach = Attach::start(&socket, &uri, &AttachOptions::default()).unwrap();
    let mut guest = Guest::boot(&GuestOptions {
        disks: vec![Disk { socket, queues: 1 }],
        network: true,
        ..GuestOptions::default()
    })
    .unwrap();

    checks.check("the disk is as large as the target's file", || {
        await_size(&mut guest, "/dev/vda", SMALL_MIB)
    });
    checks.check(
        "the file grows, and so does the disk of a running guest",
        || {
            target.sh(&format!(
                "truncate -s {LARGE_MIB}M /tmp/disk.img; echo 1 >{NAMESPACE}/revalidate_size"
            ))?;
            await_size(&mut guest, "/dev/vda", LARGE_MIB)
        },
    );
    checks.check("what is new is written and read back", || {
        let stretch = Seeded {
            seed: seed(0),
            offset: SMALL_MIB * MIB - 4096,
            length: 8 * MIB,
        };
        write_and_read_back(&mut guest, "vda", stretch)
    });
    checks.check("it grows again and again under load", || {
        let load = Load::start(&mut guest, "vda", seed(2), LIMIT)?;
        sleep(Duration::from_secs(2));
        let times = if rounds() > 1 { 20 } else { 4 };
        for time in 1..=times {
            let mib = LARGE_MIB + time;
            target.sh(&format!(
                "truncate -s {mib}M /tmp/disk.img; echo 1 >{NAMESPACE}/revalidate_size"
            ))?;
            await_size(&mut guest, "/dev/vda", mib)?;
            // What is new can be used at once.
            let stretch = Seeded {
                seed: seed(3),
                offset: (mib - 1) * MIB,
                length: MIB,
            };
            write_and_read_back(&mut guest, "vda", stretch)?;
        }
        let done = load.finish(&mut guest)?;
        ensure!(done.longest < STALL, "{done}");
        Ok(format!("{times} times; {done}"))
    });
    checks.check("a namespace that goes and comes back is reported", || {
        target.sh(&format!("echo 0 >{NAMESPACE}/enable"))?;
        let gone = "the namespace is gone from its controller: requests fail until it is back";
        await_logged(&attach, gone, 1)?;
        target.sh(&format!("echo 1 >{NAMESPACE}/enable"))?;
        await_logged(&attach, "the namespace is as it was before", 1)
    });
    checks.check("and its disk works", || {
        let stretch = Seeded {
            seed: seed(1),
            offset: 0,
            length: 4 * MIB,
        };
        write_and_read_back(&mut guest, "vda", stretch)
    });
    checks.check("changes of the access state are reported", || {
        for (count, state) in (1..).zip(["non-optimized", "optimized"]) {
            target.sh(&format!("echo {state} >{GROUP}"))?;
            await_logged(&attach, "asymmetric namespace access changed", count)?;
        }
        Ok("both")
    });
    checks.check("a Linux host sees an exported file grow", || {
        linux_host(&mut guest, &directory)
    });
    checks.check("no error in the guest's kernel log", || {
        no_kernel_errors(&mut guest)
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check("attach ends cleanly", || {
        attach.stop()?;
        let lost = attach.daemon.logged("association lost").len();
        ensure!(lost == 0, "it lost {lost} associations");
        Ok("with the association that it began with")
    });
    checks.finish();
}

/// Grows a file under Linux's NVMe/TCP host, time and again.
fn linux_host(guest: &mut Guest, directory: &tempfile::TempDir) -> Result<String> {
    let image = image(directory, "exported.img", SMALL_MIB)?;
    let mut export = Export::start(&[image.display().to_string()])?;
    let uri = export.uris[0].clone();
    let rest = uri.strip_prefix("nvme+tcp://127.0.0.1:");
    let (port, path) = rest
        .and_then(|rest| rest.split_once('/'))
        .with_context(|| uri.clone())?;
    let nqn = path.split('?').next().unwrap_or_default();
    guest.sh(&format!(
        "modprobe nvme-tcp; nvme connect -t tcp -a 10.0.2.2 -s {port} -n {nqn} --nr-io-queues=1 {HOST}\n\
         for i in $(seq 100); do [ -e /dev/nvme1n1 ] && break; sleep 0.1; done"
    ))?;
    await_size(guest, "/dev/nvme1n1", SMALL_MIB)?;
    for mib in [SMALL_MIB + 1, SMALL_MIB + 17, LARGE_MIB] {
        grow(&image, mib, &export)?;
        await_size(guest, "/dev/nvme1n1", mib)?;
    }
    guest.sh(&format!(
        "dd if=/dev/urandom of=/tmp/piece bs=1M count=1 status=none; \
         dd if=/tmp/piece of=/dev/nvme1n1 bs=1M seek={} oflag=direct status=none; \
         dd if=/dev/nvme1n1 bs=1M skip={} count=1 iflag=direct status=none | cmp - /tmp/piece; \
         nvme disconnect -n {nqn}",
        LARGE_MIB - 1,
        LARGE_MIB - 1
    ))?;
    export.stop()?;
    Ok(format!("{SMALL_MIB} to {LARGE_MIB} MiB in three steps"))
}
