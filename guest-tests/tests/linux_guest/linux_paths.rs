//! Two ports of a Linux target are two paths to a guest's disks: each goes and comes back, and their access states change.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use guest_tests::{Attach, Checks, Disk, Guest, GuestOptions, rounds};

use crate::cases::no_kernel_errors;
use crate::load::{Done, Load};
use crate::nvmet::{self, NQN, NVMET, await_logged};
use crate::seed;

const PORTS: [u16; 2] = [4420, 4421];
/// Each disk has a policy of its own.
const POLICIES: [&str; 2] = ["round-robin", "numa"];
const NAMES: [&str; 2] = ["vda", "vdb"];
const BACK: &str = "association is back";
/// The loads have all of this for what happens meanwhile.
const LIMIT: Duration = Duration::from_secs(600);
/// A path is away for so long.
const AWAY: Duration = Duration::from_secs(2);
/// The longest that a request may take: twice the keep-alive time if it waits for a write of unknown fate, and a busy machine.
const STALL: Duration = Duration::from_secs(20);

/// Access states of the two ports, each for a second, for the first namespace's group; those of the second have the ports exchanged.
/// Where no path can be used, requests wait.
const STATES: [(&str, &str); 6] = [
    ("optimized", "inaccessible"),
    ("inaccessible", "optimized"),
    ("non-optimized", "optimized"),
    ("change", "change"),
    ("inaccessible", "non-optimized"),
    ("inaccessible", "inaccessible"),
];

#[test]
fn two_paths_to_a_linux_target_come_and_go_and_change_their_access() {
    let directory = tempfile::tempdir().unwrap();
    let mut checks = Checks::new(
        "two paths to a Linux target come and go and change their access (nvmet in a guest of its own; vda and vdb: null_blk, slow)",
    );
    let mut target = nvmet::boot(&PORTS, 2, 64).unwrap();
    let mut attached = Vec::new();
    let mut disks = Vec::new();
    for (nsid, policy) in (1..).zip(POLICIES) {
        let socket = directory.path().join(format!("{nsid}.sock"));
        let policy = ["--iopolicy", policy];
        let attach = nvmet::attach(&target, &PORTS, nsid, &socket, &policy).unwrap();
        await_logged(&attach, "another path is connected", 1).unwrap();
        attached.push(attach);
        disks.push(Disk { socket, queues: 1 });
    }
    let mut guest = Guest::boot(&GuestOptions {
        disks,
        ..GuestOptions::default()
    })
    .unwrap();

    checks.check("one path of two is lost and comes back, in turn", || {
        let loads = start(&mut guest)?;
        let times = if rounds() > 1 { 10 } else { 3 };
        for time in 0..times {
            lose(&mut target, &attached, PORTS[time % 2])?;
        }
        let done = finish(loads, &mut guest)?;
        Ok(format!("{times} times; {done}"))
    });
    checks.check("access states change every second", || {
        let loads = start(&mut guest)?;
        let times = 20 * usize::try_from(rounds().min(10))?;
        for &(one, other) in STATES.iter().cycle().take(times) {
            set_states(&mut target, one, other)?;
            sleep(Duration::from_secs(1));
        }
        set_states(&mut target, "optimized", "optimized")?;
        let done = finish(loads, &mut guest)?;
        Ok(format!("{times} times; {done}"))
    });
    checks.check("no error in the guest's kernel log", || {
        no_kernel_errors(&mut guest)
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check("attach ends cleanly", || {
        for attach in &mut attached {
            attach.stop()?;
        }
        Ok(format!(
            "both, {} requests were replayed",
            replayed(&attached)
        ))
    });
    checks.finish();
}

/// Requests that losses left unanswered.
fn replayed(attached: &[Attach]) -> u64 {
    let back = attached
        .iter()
        .flat_map(|attach| attach.daemon.logged(BACK));
    back.filter_map(|fields| fields["replayed"].as_u64()).sum()
}

fn start(guest: &mut Guest) -> Result<Vec<Load>> {
    let loads = NAMES
        .iter()
        .map(|name| Load::start(guest, name, seed(0), LIMIT));
    let loads = loads.collect::<Result<Vec<_>>>()?;
    sleep(Duration::from_secs(3));
    Ok(loads)
}

/// Nothing may have failed, nor taken too long.
fn finish(loads: Vec<Load>, guest: &mut Guest) -> Result<String> {
    // What waited last is done, and more.
    sleep(Duration::from_secs(2));
    let done = loads.into_iter().map(|load| load.finish(guest));
    let done = done.collect::<Result<Vec<_>>>()?;
    let said: Vec<_> = done.iter().map(ToString::to_string).collect();
    let in_time = |done: &Done| done.longest < STALL;
    ensure!(done.iter().all(in_time), "{}", said.join("; "));
    Ok(said.join("; "))
}

/// Takes the subsystem from a port, which ends the associations there, and gives it back.
fn lose(target: &mut Guest, attached: &[Attach], port: u16) -> Result<()> {
    let before: Vec<_> = attached
        .iter()
        .map(|attach| attach.daemon.logged(BACK).len())
        .collect();
    target.sh(&format!("rm {NVMET}/ports/{port}/subsystems/{NQN}"))?;
    sleep(AWAY);
    target.sh(&format!(
        "ln -s {NVMET}/subsystems/{NQN} {NVMET}/ports/{port}/subsystems/{NQN}"
    ))?;
    for (attach, before) in attached.iter().zip(before) {
        await_logged(attach, BACK, before + 1)?;
    }
    Ok(())
}

/// Sets the states of both groups at both ports; better ones first, so that a path is there when the other goes.
fn set_states(target: &mut Guest, one: &str, other: &str) -> Result<()> {
    let mut states = Vec::new();
    for (port, state_of) in PORTS.iter().zip([[one, other], [other, one]]) {
        for (group, state) in (1..).zip(state_of) {
            states.push((
                !state.ends_with("optimized"),
                format!("echo {state} >{NVMET}/ports/{port}/ana_groups/{group}/ana_state\n"),
            ));
        }
    }
    states.sort();
    target.sh(&states.into_iter().map(|(_, line)| line).collect::<String>())?;
    Ok(())
}
