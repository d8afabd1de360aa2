//! Limits of a disk as a guest's own benchmark sees them: no more than they allow, and no errors.

use anyhow::{Context, Result, ensure};
use guest_tests::{Attach, AttachOptions, Checks, Disk, Export, Guest, GuestOptions};

use crate::cases::no_kernel_errors;

const IOPS: u32 = 300;
const IOPS_BURST: u32 = 30;
/// Bytes in a second, and at once.
const BANDWIDTH: u32 = 4 << 20;
const BANDWIDTH_BURST: u32 = 1 << 20;

/// Keeps 16 requests under way on each of two jobs for some seconds. Of fio's terse output the KiB that were read and written and
/// the milliseconds that this took are wanted; two jobs are reported as one.
const LOAD: &str = "
fio --name=load --filename=/dev/DISK --rw=randrw --bs=BLOCK --ioengine=libaio --iodepth=16 --numjobs=2 --group_reporting \
    --direct=1 --time_based --runtime=5 --output-format=terse --terse-version=3 >/tmp/load.log 2>&1 || { cat /tmp/load.log >&2; exit 1; }
awk -F';' '$1 == 3 { print $5, $6 + $47, ($9 > $50 ? $9 : $50) }' /tmp/load.log
";

/// Checks what passed in units of `kib`; no machine is so slow that more than half of it is missed.
fn check(
    guest: &mut Guest,
    disk: &str,
    block: &str,
    kib: f64,
    rate: u32,
    burst: u32,
) -> Result<String> {
    let said = guest.sh(&LOAD.replace("DISK", disk).replace("BLOCK", block))?;
    let numbers: Vec<f64> = said.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    let [error, moved, millis] = numbers[..] else {
        return Err(anyhow::anyhow!(said)).context("error, KiB, milliseconds");
    };
    let (passed, seconds) = (moved / kib, millis / 1000.0);
    let most = f64::from(rate) * seconds + f64::from(burst);
    ensure!(error == 0.0, "fio saw error {error}");
    // A lane that is late adds one request of each kind.
    ensure!(
        passed <= most + 2.0,
        "{passed:.0} in {seconds:.2} s, of at most {most:.0}"
    );
    ensure!(
        passed >= most / 2.0,
        "{passed:.0} in {seconds:.2} s, of {most:.0}"
    );
    Ok(format!("{passed:.0} in {seconds:.2} s, at most {most:.0}"))
}

#[test]
fn a_guest_gets_no_more_than_its_disks_limits_and_no_errors() {
    let mut checks = Checks::new("limits of disks (vda: requests, remote; vdb: bytes, local)");
    let directory = tempfile::tempdir().unwrap();
    let mut export = Export::start(&["ram:64M"]).unwrap();
    let sockets = ["remote.sock", "local.sock"].map(|name| directory.path().join(name));
    let options = |arguments: [String; 2]| AttachOptions {
        arguments: arguments.to_vec(),
        ..AttachOptions::default()
    };
    let requests = options([
        format!("--iops={IOPS}"),
        format!("--iops-burst={IOPS_BURST}"),
    ]);
    let bytes = options([
        format!("--bandwidth={BANDWIDTH}"),
        format!("--bandwidth-burst={BANDWIDTH_BURST}"),
    ]);
    let remote = Attach::start(&sockets[0], &export.uris[0], &requests);
    let local = Attach::serve(&sockets[1], "ram:64M", &bytes);
    let mut attached = [remote.unwrap(), local.unwrap()];
    let disks = sockets.into_iter().map(|socket| Disk { socket, queues: 2 });
    let mut guest = Guest::boot(&GuestOptions {
        cpus: 2,
        disks: disks.collect(),
        ..GuestOptions::default()
    })
    .unwrap();
    checks.check("requests in a second", || {
        check(&mut guest, "vda", "4k", 4.0, IOPS, IOPS_BURST)
    });
    checks.check("KiB in a second", || {
        let (rate, burst) = (BANDWIDTH >> 10, BANDWIDTH_BURST >> 10);
        check(&mut guest, "vdb", "32k", 1.0, rate, burst)
    });
    checks.check("no error in the kernel's log", || {
        no_kernel_errors(&mut guest)
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check("the daemons end cleanly", || {
        let mut throttled = Vec::new();
        for attach in &mut attached {
            attach.stop()?;
            let counters = attach.daemon.logged("disk counters");
            throttled.extend(
                counters
                    .iter()
                    .filter_map(|fields| fields["throttled"].as_u64()),
            );
        }
        export.stop()?;
        ensure!(
            throttled.len() == 2 && !throttled.contains(&0),
            "{throttled:?}"
        );
        Ok(format!("requests that waited: {throttled:?}"))
    });
    checks.finish();
}
