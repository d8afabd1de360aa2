//! A controller goes away and comes back under a guest that works on its disk.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest_tests::{Attach, AttachOptions, Checks, Disk, Export, Guest, GuestOptions, rounds};

use crate::cases::{image, image_directory, no_kernel_errors};
use crate::load::Load;
use crate::{MIB, seed};

const SIZE_MIB: u64 = 128;
/// Seconds; short, so that the test need not wait.
const KEEP_ALIVE: &str = "2";
/// Longer than that, and than an attempt to connect takes.
const FROZEN: Duration = Duration::from_secs(20);
/// The load has all of this for the outages.
const LIMIT: Duration = Duration::from_secs(600);
/// The longest that a request may take: a target that stands still, an attempt after it that is late, and a busy machine.
const STALL: Duration = Duration::from_secs(45);
const UUID: &str = "6ba7b812-9dad-41d1-80b4-00c04fd430c8";

struct Target {
    address: String,
    spec: String,
    export: Export,
}

impl Target {
    fn start(spec: String) -> Result<Self> {
        let export = Export::start(&[&spec])?;
        let uri = &export.uris[0];
        let rest = uri.strip_prefix("nvme+tcp://");
        let address = rest.and_then(|rest| rest.split('/').next());
        let address = address.with_context(|| uri.clone())?.to_owned();
        Ok(Self {
            address,
            spec,
            export,
        })
    }

    fn kill_and_restart(&mut self) -> Result<()> {
        self.export.daemon.kill()?;
        sleep(Duration::from_secs(1));
        self.export = Export::start_at(&self.address, &[&self.spec])?;
        Ok(())
    }
}

/// So often is it killed: twenty times where there is time.
fn kills() -> usize {
    if rounds() > 1 { 20 } else { 8 }
}

/// Waits until the disk has been connected again so many times.
fn await_back(attach: &Attach, times: usize) -> Result<()> {
    let logged = |message: &str| attach.daemon.logged(message).len();
    for _ in 0..300 {
        if logged("association is back") + logged("association is back again") >= times {
            return Ok(());
        }
        sleep(Duration::from_millis(100));
    }
    anyhow::bail!("the disk is not connected again within 30 s");
}

#[test]
fn a_controller_that_goes_away_and_comes_back_is_not_noticed() {
    let mut checks = Checks::new("a controller goes away and comes back (vda)");
    let directory = image_directory().unwrap();
    let image = image(&directory, "outage.img", SIZE_MIB).unwrap();
    let spec = format!("file:{},uuid={UUID}", image.display());
    let mut target = Target::start(spec).unwrap();
    let options = AttachOptions {
        // Of outages in a row not each leaves a line otherwise.
        arguments: ["--keep-alive-tmo", KEEP_ALIVE, "--log-level", "debug"]
            .map(str::to_owned)
            .to_vec(),
        ..AttachOptions::default()
    };
    let socket = directory.path().join("outage.sock");
    let mut attach = Attach::start(&socket, &target.export.uris[0], &options).unwrap();
    let disks = vec![Disk { socket, queues: 2 }];
    let mut guest = Guest::boot(&GuestOptions {
        disks,
        ..GuestOptions::default()
    })
    .unwrap();

    let load = Load::start(&mut guest, "vda", seed(0), LIMIT).unwrap();
    sleep(Duration::from_secs(3));
    let kills = kills();
    checks.check("the target is killed and started again", || {
        for kill in 1..=kills {
            target.kill_and_restart()?;
            await_back(&attach, kill)?;
            sleep(Duration::from_secs(1));
        }
        Ok(format!("{kills} times"))
    });
    checks.check(
        "it stands still for longer than the keep-alive time",
        || {
            target.export.daemon.freeze()?;
            sleep(FROZEN);
            target.export.daemon.thaw()?;
            await_back(&attach, kills + 1)?;
            sleep(Duration::from_secs(3));
            Ok(format!("{FROZEN:?}"))
        },
    );
    checks.check("what the guest wrote meanwhile, it has read", || {
        let done = load.finish(&mut guest)?;
        ensure!(done.longest < STALL, "{done}");
        Ok(done)
    });
    checks.check("no error in the kernel's log", || {
        no_kernel_errors(&mut guest)
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check("the daemons end cleanly", || {
        attach.stop()?;
        target.export.stop()?;
        let back = attach.daemon.logged("association is back");
        let number = |name: &str| {
            back.iter()
                .map(|fields| fields[name].as_f64().unwrap_or(0.0))
                .fold(0.0, f64::max)
        };
        let moved = attach.counters()?.written_bytes / MIB;
        Ok(format!(
            "away for {:.1} s at most, {} requests replayed at once at most, {moved} MiB written",
            number("seconds"),
            number("replayed")
        ))
    });
    checks.finish();
}
