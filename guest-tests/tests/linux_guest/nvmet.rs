//! A Linux target in a guest of its own, with slow memory for namespaces, and the disks that are made of them.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guest_tests::{Attach, AttachOptions, Guest, GuestOptions};

/// How long a change may take to be seen.
pub(crate) const SEEN: Duration = Duration::from_secs(30);
/// Seconds.
const ARGUMENTS: [&str; 4] = ["--keep-alive-tmo", "3", "--reconnect-delay", "2"];
pub(crate) const NQN: &str = "nqn.2026-01.org.example:ways";
/// Its configuration.
pub(crate) const NVMET: &str = "/sys/kernel/config/nvmet";

/// The directory of each port is called by its number, and so is the ANA group of each namespace. Each takes 20 ms for a command, so
/// that there are commands to be lost.
const CONFIGURE: &str = "
modprobe -a nvmet-tcp
modprobe null_blk nr_devices=0
mount -t configfs none /sys/kernel/config
cd NVMET; mkdir subsystems/NQN
echo 1 >subsystems/NQN/attr_allow_any_host
for i in NAMESPACES; do
    d=/sys/kernel/config/nullb/nullb$i; mkdir $d; echo 512 >$d/blocksize; echo MIB >$d/size; echo 1 >$d/memory_backed
    echo 2 >$d/irqmode; echo 20000000 >$d/completion_nsec; echo 1 >$d/power
    n=subsystems/NQN/namespaces/$i; mkdir $n; echo /dev/nullb$i >$n/device_path; echo $i >$n/ana_grpid; echo 1 >$n/enable
done
for port in PORTS; do
    p=ports/$port; mkdir $p; echo ipv4 >$p/addr_adrfam; echo tcp >$p/addr_trtype
    echo 0.0.0.0 >$p/addr_traddr; echo $port >$p/addr_trsvcid
    for i in NAMESPACES; do [ -d $p/ana_groups/$i ] || mkdir $p/ana_groups/$i; echo optimized >$p/ana_groups/$i/ana_state; done
    ln -s NVMET/subsystems/NQN $p/subsystems/NQN
done
";

/// Boots a target with these ports, and with namespaces 1 to `namespaces`, each of so many MiB.
pub(crate) fn boot(ports: &[u16], namespaces: u32, mib: u64) -> Result<Guest> {
    let mut target = Guest::boot(&GuestOptions {
        forward: ports.to_vec(),
        ..GuestOptions::default()
    })?;
    let all: Vec<_> = ports.iter().map(ToString::to_string).collect();
    let script = CONFIGURE
        .replace("NAMESPACES", &format!("$(seq {namespaces})"))
        .replace("PORTS", &all.join(" "))
        .replace("NQN", NQN)
        .replace("NVMET", NVMET)
        .replace("MIB", &mib.to_string());
    target.sh(&script).context("nvmet")?;
    Ok(target)
}

/// Attaches a namespace of the target by these of its ports, with one queue.
pub(crate) fn attach(
    target: &Guest,
    ports: &[u16],
    nsid: u32,
    socket: &Path,
    arguments: &[&str],
) -> Result<Attach> {
    let uri = |port: &u16| -> Result<String> {
        Ok(format!("nvme+tcp://{}/{NQN}", target.forwarded(*port)?))
    };
    let (first, others) = ports.split_first().context("a port")?;
    let mut all = [&ARGUMENTS[..], arguments].concat();
    let others = others.iter().map(uri).collect::<Result<Vec<_>>>()?;
    for other in &others {
        all.extend(["--path", other]);
    }
    let options = AttachOptions {
        num_queues: Some(1),
        arguments: all.into_iter().map(str::to_owned).collect(),
        ..AttachOptions::default()
    };
    Attach::start(socket, &format!("{}?nsid={nsid}", uri(first)?), &options)
}

/// Waits until a disk has logged a message so many times.
pub(crate) fn await_logged(attach: &Attach, message: &str, times: usize) -> Result<()> {
    let deadline = Instant::now() + SEEN;
    while attach.daemon.logged(message).len() < times {
        if Instant::now() > deadline {
            bail!("not logged {times} times within {SEEN:?}: {message}");
        }
        sleep(Duration::from_millis(50));
    }
    Ok(())
}
