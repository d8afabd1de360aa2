//! A disk is plugged in while the guest runs, and pulled out under a load.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use guest_tests::{
    Attach, AttachOptions, Checks, Export, Guest, GuestOptions, Seeded, qemu_version, rounds,
};
use serde_json::json;

use crate::cases::write_and_read_back;
use crate::load::Load;
use crate::{MIB, seed};

/// A guest that is emulated takes its time to let a disk go.
const LIMIT: Duration = Duration::from_secs(60);
/// A load has all of this until something happens to it.
const LOAD_LIMIT: Duration = Duration::from_secs(120);
/// Behind what a load writes to.
const STRETCH: u64 = 96 * MIB;

fn plug(guest: &mut Guest, socket: &Path) -> Result<()> {
    let mut monitor = guest.monitor()?;
    let reconnect = match qemu_version()? >= (9, 2) {
        true => ("reconnect-ms", 1000),
        false => ("reconnect", 1),
    };
    let mut data =
        json!({ "addr": { "type": "unix", "data": { "path": socket } }, "server": false });
    data[reconnect.0] = reconnect.1.into();
    let backend = json!({ "type": "socket", "data": data });
    monitor.execute(
        "chardev-add",
        &json!({ "id": "socket", "backend": backend }),
    )?;
    let disk = json!({
        "driver": "vhost-user-blk-pci", "id": "disk", "bus": "slot-for-disk", "chardev": "socket", "num-queues": 1
    });
    monitor.execute("device_add", &disk)?;
    guest.sh("for i in $(seq 300); do [ -b /dev/vda ] && exit; sleep 0.1; done; false")?;
    Ok(())
}

/// Asks the guest to let the disk go, and takes it away.
fn pull(guest: &mut Guest) -> Result<()> {
    let mut monitor = guest.monitor()?;
    let deadline = Instant::now() + LIMIT;
    monitor.execute("device_del", &json!({ "id": "disk" }))?;
    loop {
        let plugged = monitor.execute("qom-list", &json!({ "path": "/machine/peripheral" }))?;
        let devices = plugged.as_array().into_iter().flatten();
        if devices.into_iter().all(|device| device["name"] != "disk") {
            break;
        }
        ensure!(Instant::now() < deadline, "the guest keeps it: {plugged}");
        sleep(Duration::from_millis(100));
    }
    // The device's remains are put away a little later, and have the socket until then.
    while let Err(error) = monitor.execute("chardev-remove", &json!({ "id": "socket" })) {
        ensure!(Instant::now() < deadline, error);
        sleep(Duration::from_millis(100));
    }
    guest.sh("! [ -e /dev/vda ]")?;
    Ok(())
}

#[test]
fn a_disk_is_plugged_in_and_pulled_out_under_a_load() {
    let mut checks = Checks::new("a disk is plugged in and pulled out under a load (vda)");
    let directory = tempfile::tempdir().unwrap();
    let mut export = Export::start(&["ram:128M".to_owned()]).unwrap();
    let socket = directory.path().join("plugged.sock");
    let mut attach = Attach::start(&socket, &export.uris[0], &AttachOptions::default()).unwrap();
    let port = [
        "-device",
        "pcie-root-port,id=slot-for-disk,chassis=1,slot=1",
    ];
    let mut guest = Guest::boot(&GuestOptions {
        arguments: port.map(str::to_owned).to_vec(),
        ..GuestOptions::default()
    })
    .unwrap();
    let stretch = Seeded {
        seed: seed(0),
        offset: STRETCH,
        length: 8 * MIB,
    };
    let verify = |guest: &mut Guest| {
        guest.sh(&format!(
            "seeded-data verify /dev/vda {} {} {}",
            stretch.offset, stretch.length, stretch.seed
        ))
    };
    checks.check("it is plugged in, written and read", || {
        plug(&mut guest, &socket)?;
        write_and_read_back(&mut guest, "vda", stretch)
    });
    checks.check(
        "it is pulled out under a load, and plugged in again",
        || {
            for round in 0..2 * rounds() {
                let load = Load::start(&mut guest, "vda", seed(round), LOAD_LIMIT)?;
                load.await_writes(&mut guest)?;
                pull(&mut guest)?;
                let lost = load.finish(&mut guest);
                ensure!(lost.is_err(), "a load went well without its disk");
                plug(&mut guest, &socket)?;
                verify(&mut guest)?;
            }
            Ok(format!("{} times", 2 * rounds()))
        },
    );
    checks.check("it is worked on afterwards", || {
        let load = Load::start(&mut guest, "vda", seed(9), LOAD_LIMIT)?;
        load.await_writes(&mut guest)?;
        load.finish(&mut guest)
    });
    checks.check("power-off, and the daemons end cleanly", || {
        guest.power_off()?;
        attach.stop()?;
        export.stop()?;
        Ok("status 0")
    });
    checks.finish();
}
