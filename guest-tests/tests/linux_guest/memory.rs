//! A guest gets memory and gives it back while it works on its disk with buffers in it. Its first memory is in huge pages where this
//! machine has some.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guest_tests::{
    Attach, AttachOptions, Checks, Disk, Export, Guest, GuestOptions, Seeded, rounds,
};
use serde_json::json;

use crate::cases::{no_kernel_errors, write_and_read_back};
use crate::load::Load;
use crate::{MIB, seed};

const MEMORY_MIB: u32 = 384;
const MODULE_MIB: u64 = 256;
/// The load has all of this for memory to come and go.
const LIMIT: Duration = Duration::from_secs(900);
/// A guest that is emulated takes its time to empty a module.
const UNPLUG_LIMIT: Duration = Duration::from_secs(120);
/// The longest that a request may take on a busy machine.
const STALL: Duration = Duration::from_secs(20);
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages that are reserved for a guest, given back when dropped.
struct HugePages(String);

impl HugePages {
    /// `None`, and why is printed, where there are none to be had.
    fn reserve(mib: u32) -> Option<Self> {
        let read = || fs::read_to_string(POOL).ok();
        let number = |text: &str| text.trim().parse::<u32>().unwrap_or(0);
        let before = read()?;
        let wanted = number(&before) + mib / 2;
        let pages = Self(before);
        let asked = fs::write(POOL, wanted.to_string());
        let reserved = read().is_some_and(|now| number(&now) >= wanted);
        if asked.is_ok() && reserved {
            return Some(pages);
        }
        eprintln!(
            "SKIPPED: a guest in huge pages. It takes root and {mib} MiB in pieces of 2 MiB; its memory is ordinary instead"
        );
        None
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(POOL, &self.0);
    }
}

/// Plugs a module in and has the guest use it for what can be moved out again.
fn plug(guest: &mut Guest) -> Result<()> {
    guest.sh("echo online_movable >/sys/devices/system/memory/auto_online_blocks")?;
    let mut monitor = guest.monitor()?;
    let memory = json!({
        "qom-type": "memory-backend-memfd", "id": "module", "size": MODULE_MIB * MIB, "share": true
    });
    monitor.execute("object-add", &memory)?;
    let module = json!({ "driver": "pc-dimm", "id": "dimm", "memdev": "module" });
    monitor.execute("device_add", &module)?;
    let present = movable("present", "$2");
    guest
        .sh(&format!(
            "for i in $(seq 100); do [ $({present}) = {} ] && exit 0; sleep 0.1; done; false",
            MODULE_MIB * MIB
        ))
        .context("the guest does not use the module")?;
    Ok(())
}

/// A command that prints a number of the zone that the module makes up, in bytes.
fn movable(line: &str, field: &str) -> String {
    format!(
        "awk '$1 == \"Node\" {{ here = $4 == \"Movable\" }} here && /^ *{line} / {{ n += {field} }} END {{ print n * 4096 }}' /proc/zoneinfo"
    )
}

/// Bytes of the module that the guest uses, now.
fn used(guest: &mut Guest) -> Result<u64> {
    let free = guest.sh(&movable("pages free", "$3"))?;
    let free: u64 = free.parse().with_context(|| free.clone())?;
    Ok(MODULE_MIB * MIB - free)
}

/// Has the guest empty the module, and pulls it.
fn unplug(guest: &Guest) -> Result<()> {
    let mut monitor = guest.monitor()?;
    let deadline = Instant::now() + UNPLUG_LIMIT;
    monitor.execute("device_del", &json!({ "id": "dimm" }))?;
    loop {
        let modules = monitor.execute("query-memory-devices", &json!({}))?;
        if modules.as_array().is_some_and(Vec::is_empty) {
            break;
        }
        ensure!(Instant::now() < deadline, "the guest keeps it: {modules}");
        sleep(Duration::from_millis(200));
        // A page was in use just then: once more. While it is being tried, that is refused.
        let _ = monitor.execute("device_del", &json!({ "id": "dimm" }));
    }
    monitor.execute("object-del", &json!({ "id": "module" }))?;
    Ok(())
}

#[test]
fn memory_comes_and_goes_under_a_load() {
    let mut checks = Checks::new("memory comes and goes under a load (vda)");
    let directory = tempfile::tempdir().unwrap();
    let mut export = Export::start(&["ram:128M".to_owned()]).unwrap();
    let socket = directory.path().join("memory.sock");
    let mut attach = Attach::start(&socket, &export.uris[0], &AttachOptions::default()).unwrap();
    let pages = HugePages::reserve(MEMORY_MIB);
    let mut guest = Guest::boot(&GuestOptions {
        disks: vec![Disk { socket, queues: 1 }],
        memory_mib: MEMORY_MIB,
        huge_pages: pages.is_some(),
        arguments: ["-m", "slots=4,maxmem=2G"].map(str::to_owned).into(),
        ..GuestOptions::default()
    })
    .unwrap();

    let kind = if pages.is_some() {
        "huge pages"
    } else {
        "ordinary pages"
    };
    checks.check("data in the first memory", || {
        let stretch = Seeded {
            seed: seed(0),
            offset: 64 * MIB,
            length: 16 * MIB,
        };
        write_and_read_back(&mut guest, "vda", stretch)?;
        Ok(kind)
    });
    let load = Load::start(&mut guest, "vda", seed(0), LIMIT).unwrap();
    checks.check(
        "a module is plugged, used and pulled under the load",
        || {
            let times = 2 * rounds();
            let mut most = 0;
            for _ in 0..times {
                plug(&mut guest)?;
                // What user processes take comes from there first.
                for _ in 0..5 {
                    sleep(Duration::from_secs(1));
                    most = most.max(used(&mut guest)?);
                }
                ensure!(most > 4 * MIB, "of the module, {most} bytes were used");
                unplug(&guest)?;
            }
            Ok(format!("{times} times, {} MiB of it used", most / MIB))
        },
    );
    checks.check("what was written meanwhile was read", || {
        let done = load.finish(&mut guest)?;
        ensure!(done.longest < STALL, "{done}");
        Ok(done)
    });
    checks.check("no error in the guest's kernel log", || {
        no_kernel_errors(&mut guest)
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check(
        "attach ends cleanly, and no ring was suspended or broken",
        || {
            attach.stop()?;
            for message in ["ring is broken", "ring is suspended"] {
                let count = attach.daemon.logged(message).len();
                ensure!(count == 0, "it logged '{message}' {count} times");
            }
            Ok("no complaint")
        },
    );
    checks.check("the target ends cleanly", || {
        export.stop().map(|()| "ended")
    });
    checks.finish();
}
