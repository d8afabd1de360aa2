//! What a Linux target stops having, and has again, while a guest works with it: a namespace, and its processor.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use guest_tests::{Attach, Checks, Disk, Guest, GuestOptions, Seeded, rounds};

use crate::cases::write_and_read_back;
use crate::load::Load;
use crate::nvmet::{self, NQN, NVMET, await_logged};
use crate::{MIB, seed};

const PORT: u16 = 4420;
/// Longer than the keep-alive time of its disks.
const STILL: Duration = Duration::from_secs(12);
/// What is answered for want of a path leaves no line otherwise.
const DEBUG: [&str; 2] = ["--log-level", "debug"];
/// The loads have all of this for what happens meanwhile.
const LIMIT: Duration = Duration::from_secs(900);
/// The longest that a request may take: [`STILL`], an attempt after it that is late, and a busy machine.
const STALL: Duration = Duration::from_secs(40);

#[test]
fn what_a_linux_target_does_not_have_for_a_while_is_there_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut checks = Checks::new(
        "what a Linux target does not have for a while is there again (nvmet in a guest of its own; vda and vdb: null_blk, slow)",
    );
    let mut target = nvmet::boot(&[PORT], 2, 64).unwrap();
    let mut attached = Vec::new();
    let mut disks = Vec::new();
    for nsid in 1..=2 {
        let socket = directory.path().join(format!("{nsid}.sock"));
        attached.push(nvmet::attach(&target, &[PORT], nsid, &socket, &DEBUG).unwrap());
        disks.push(Disk { socket, queues: 1 });
    }
    let mut guest = Guest::boot(&GuestOptions {
        disks,
        ..GuestOptions::default()
    })
    .unwrap();

    // Nothing that happens to the other namespace is seen here.
    let load = Load::start(&mut guest, "vda", seed(0), LIMIT).unwrap();
    for round in 1..=rounds() {
        checks.check(
            &format!("round {round}: a namespace is disabled, removed, and back, under I/O"),
            || goes_and_returns(&mut target, &mut guest, &attached[1], round),
        );
        checks.check(&format!("round {round}: the target stands still"), || {
            stands_still(&target, &attached)
        });
    }
    checks.check("the other disk never noticed, but for the time", || {
        let done = load.finish(&mut guest)?;
        ensure!(done.longest < STALL, "{done}");
        Ok(done)
    });
    checks.check("what was written last is there", || {
        let stretch = Seeded {
            seed: seed(0) ^ 5,
            offset: MIB,
            length: 4 * MIB,
        };
        write_and_read_back(&mut guest, "vdb", stretch)
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check("attach ends cleanly", || {
        for attach in &mut attached {
            attach.stop()?;
        }
        Ok("both")
    });
    checks.finish();
}

/// Reads by four at a time until there is no file any more; then how many were good, and how many not. (A write that failed might
/// leave either content, and the data is compared afterwards.)
const READS: &str = "
touch /tmp/reading
for reader in 1 2 3 4; do
    ( good=0; bad=0
      while [ -e /tmp/reading ]; do
          if dd if=/dev/vdb of=/dev/null bs=4k count=64 skip=$((1024 + reader * 64)) iflag=direct status=none 2>/dev/null
          then good=$((good + 1)); else bad=$((bad + 1)); fi
      done
      echo $good $bad ) &
done | awk '{good += $1; bad += $2} END {print good, bad}'
";
const ONE_READ: &str =
    "timeout 20 dd if=/dev/vdb of=/dev/null bs=4k count=1 skip=1024 iflag=direct";

/// How a namespace goes, said in its own directory, and how it comes back.
const LEAVES: [(&str, &str, &str); 2] = [
    ("disabled", "echo 0 >2/enable", "echo 1 >2/enable"),
    (
        "removed",
        "cat 2/device_uuid >/tmp/uuid; echo 0 >2/enable; rmdir 2",
        "mkdir 2; cat /tmp/uuid >2/device_uuid; echo /dev/nullb2 >2/device_path; echo 2 >2/ana_grpid; echo 1 >2/enable",
    ),
];

/// Requests for a namespace that its controller does not have are errors for the guest, and no more than that.
fn goes_and_returns(
    target: &mut Guest,
    guest: &mut Guest,
    attach: &Attach,
    round: u64,
) -> Result<String> {
    let gone = "the namespace is gone from its controller: requests fail until it is back";
    let back = "the namespace is as it was before";
    let namespaces = format!("cd {NVMET}/subsystems/{NQN}/namespaces");
    let mut said = Vec::new();
    for (name, goes, returns) in LEAVES {
        let stretch = Seeded {
            seed: seed(round) ^ 7,
            offset: 4 * MIB,
            length: 4 * MIB,
        };
        write_and_read_back(guest, "vdb", stretch)?;
        let reads = guest.start(READS, Duration::from_secs(100))?;
        guest.sh("while ! [ -e /tmp/reading ]; do sleep 0.1; done; sleep 1.5")?;
        let times = attach.daemon.logged(gone).len() + 1;
        target.sh(&format!("{namespaces}; {goes}"))?;
        await_logged(attach, gone, times)?;
        let asked = Instant::now();
        let refused = guest.run(ONE_READ)?;
        let took = asked.elapsed();
        target.sh(&format!("{namespaces}; {returns}"))?;
        await_logged(attach, back, times)?;
        guest.sh("rm /tmp/reading")?;
        let reads = guest.finish(reads)?.success()?;
        let all_sorts = reads.split(' ').all(|count| count != "0");
        ensure!(
            refused.stderr.contains("Input/output error") && all_sorts,
            "{name}: '{}' after {took:.1?}, good and bad reads are {reads}",
            refused.stderr.trim()
        );
        guest.sh(&format!(
            "seeded-data verify /dev/vdb {} {} {}",
            stretch.offset, stretch.length, stretch.seed
        ))?;
        said.push(format!(
            "{name}: refused after {took:.1?}, {reads} reads good and bad"
        ));
    }
    // What the guest is told is an I/O error, whatever the target has answered.
    for beginning in [
        "a request was lost",
        "a request failed",
        "a command was refused",
    ] {
        said.extend(attach.daemon.messages(beginning));
    }
    Ok(said.join(", "))
}

/// The target's machine is stopped for longer than the keep-alive time, then goes on.
fn stands_still(target: &Guest, attached: &[Attach]) -> Result<String> {
    let back = "association is back";
    let before: Vec<_> = attached
        .iter()
        .map(|attach| attach.daemon.logged(back).len())
        .collect();
    target.freeze()?;
    sleep(STILL);
    target.thaw()?;
    for (attach, before) in attached.iter().zip(before) {
        await_logged(attach, back, before + 1)?;
    }
    Ok(format!("for {STILL:?}"))
}
