//! Linux's own discovery, with nvme-cli in a guest, against `export`: what it lists, and that everything listed can be connected.
//!
//! A discovery log names addresses, and a guest has to reach them: so the exports and QEMU run in a network namespace of the
//! test's own, whose addresses QEMU's user network leads to.

use anyhow::{Context, Result, ensure};
use guest_tests::{Checks, Export, Guest, GuestOptions, Network, Seeded, discover};
use serde_json::{Value, json};

use crate::cases::{fio_verify, no_kernel_errors, write_and_read_back};
use crate::{MIB, seed};

/// Of an export for everybody; it listens on both.
const OPEN: [&str; 2] = ["198.51.100.1", "198.51.100.2"];
/// Of an export for one host.
const CLOSED: &str = "198.51.100.3";
const OPEN_NQN: &str = "nqn.2026-01.org.example:open";
const CLOSED_NQN: &str = "nqn.2026-01.org.example:closed";
const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";

const FRIEND: &str = "nqn.2026-01.org.example:friend";
const STRANGER: &str = "nqn.2026-01.org.example:stranger";

/// To each namespace.
const WRITTEN_MIB: u64 = 3;

/// In the guest: controllers of fabrics, as "subsystem address state", sorted.
const CONNECTED: &str = "cd /sys/class/nvme; for c in *; do [ $(cat $c/transport) = tcp ] || continue; \
                         echo $(cat $c/subsysnqn $c/address $c/state); done | sort";

/// The options of nvme-cli that say who the guest is.
fn as_host(hostnqn: &str) -> String {
    format!("-q {hostnqn} -I 11111111-2222-3333-4444-555555555555")
}

#[test]
fn a_linux_host_discovers_and_connects_to_all_that_it_may() {
    let network = match Network::start(&[OPEN[0], OPEN[1], CLOSED]) {
        Ok(network) => network,
        Err(error) => {
            eprintln!("SKIPPED: {error:#}");
            return;
        }
    };
    let mut open =
        Export::start_in(&network, &OPEN, &["--subnqn", OPEN_NQN], &["ram:64M"]).unwrap();
    let arguments = ["--subnqn", CLOSED_NQN, "--allow-host", FRIEND];
    let specs = ["ram:32M", "ram:32M,block-size=4096"];
    let mut closed = Export::start_in(&network, &[CLOSED], &arguments, &specs).unwrap();
    let mut checks = Checks::new(
        "a Linux host discovers and connects to all that it may (one export for everybody on two addresses, one for \
         one host)",
    );
    let mut guest = Guest::boot(&GuestOptions {
        cpus: 2,
        network: true,
        entrance: network.entrance(),
        ..GuestOptions::default()
    })
    .unwrap();
    guest.sh("modprobe nvme-tcp").unwrap();

    for (name, address, port, host, expected) in logs() {
        checks.check(
            &format!("nvme discover {name}, and ours says the same"),
            || {
                let theirs = nvme_discover(&mut guest, address, port, host)?;
                let port = port.map_or_else(String::new, |port| format!(":{port}"));
                let ours = discover(&network, host, &format!("nvme+tcp://{address}{port}"))?;
                same_log(&theirs, &ours)?;
                let listed = listed(&theirs)?;
                ensure!(listed == expected, "{listed:#?}");
                Ok(format!("{} records", listed.len()))
            },
        );
    }
    checks.check("the generation stays while nothing changes", || {
        let mut generations = Vec::new();
        for _ in 0..2 {
            let log = nvme_discover(&mut guest, OPEN[0], None, FRIEND)?;
            generations.push(log["genctr"].as_u64().context("no genctr")?);
        }
        ensure!(generations[0] == generations[1], "{generations:?}");
        Ok(generations[0])
    });
    checks.check(
        "nvme connect-all as a stranger, at the closed export",
        || {
            connect_all(&mut guest, CLOSED, STRANGER)?;
            let connected = guest.sh(CONNECTED)?;
            ensure!(connected.is_empty(), "{connected}");
            Ok("nothing is connected")
        },
    );
    checks.check("nvme connect-all as a friend, at both", || {
        connect_all(&mut guest, OPEN[1], FRIEND)?;
        connect_all(&mut guest, CLOSED, FRIEND)?;
        connected_to_all(&mut guest)
    });
    checks.check("and again, which changes nothing", || {
        connect_all(&mut guest, OPEN[0], FRIEND)?;
        connected_to_all(&mut guest)
    });
    for (name, nqn, nsid) in [
        ("open", OPEN_NQN, 1),
        ("first", CLOSED_NQN, 1),
        ("second", CLOSED_NQN, 2),
    ] {
        checks.check(&format!("{name}: written and read back"), || {
            // Whatever number the kernel gave to the subsystem.
            guest.sh(&format!(
                "for s in /sys/class/nvme-subsystem/*; do [ $(cat $s/subsysnqn) = {nqn} ] || continue\n\
                 for d in $s/nvme*n{nsid}; do ln -sf $(basename $d) /dev/{name}; done; done; [ -b /dev/{name} ]"
            ))?;
            let stretch = Seeded {
                seed: seed(0) ^ nsid,
                offset: 16 * MIB,
                length: WRITTEN_MIB * MIB,
            };
            write_and_read_back(&mut guest, name, stretch)
        });
    }
    checks.check("fio verify over both ways to the open export", || {
        fio_verify(&mut guest, "open", 1, 0)
    });
    checks.check("nvme disconnect-all", || {
        guest.sh("nvme disconnect-all")?;
        let connected = guest.sh(CONNECTED)?;
        ensure!(connected.is_empty(), "{connected}");
        Ok("nothing is connected")
    });
    checks.check("no error in the kernel's log", || {
        no_kernel_errors(&mut guest)
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check("the exports end cleanly", || {
        open.stop()?;
        closed.stop().map(|()| "both")
    });
    checks.check("what was written has arrived there", || {
        let written = [open.counters(1)?, closed.counters(1)?, closed.counters(2)?];
        let written = written.map(|it| it.written_bytes / MIB);
        ensure!(
            written.iter().all(|&mib| mib >= WRITTEN_MIB),
            "{written:?} MiB"
        );
        Ok(format!("{written:?} MiB"))
    });
    checks.finish();
}

/// A record as (subsystem, address, port).
type Listed = (&'static str, &'static str, &'static str);
/// What it is called, the address and port that are asked, who asks, and what is there, sorted.
type Log = (
    &'static str,
    &'static str,
    Option<u16>,
    &'static str,
    Vec<Listed>,
);

fn logs() -> Vec<Log> {
    let discovery = |address| {
        [
            (DISCOVERY_NQN, address, "4420"),
            (DISCOVERY_NQN, address, "8009"),
        ]
    };
    let open: Vec<Listed> = OPEN
        .iter()
        .flat_map(|&address| discovery(address))
        .chain(OPEN.map(|address| (OPEN_NQN, address, "4420")))
        .collect();
    let closed = discovery(CLOSED).to_vec();
    let friend = [&closed[..], &[(CLOSED_NQN, CLOSED, "4420")]].concat();
    let mut logs = vec![
        ("on port 8009", OPEN[0], None, STRANGER, open.clone()),
        ("on the I/O port", OPEN[1], Some(4420), STRANGER, open),
        ("as a host that is allowed", CLOSED, None, FRIEND, friend),
        ("as a stranger", CLOSED, None, STRANGER, closed),
    ];
    logs.iter_mut().for_each(|log| log.4.sort_unstable());
    logs
}

fn nvme_discover(
    guest: &mut Guest,
    address: &str,
    port: Option<u16>,
    hostnqn: &str,
) -> Result<Value> {
    let port = port.map_or_else(String::new, |port| format!("-s {port}"));
    let host = as_host(hostnqn);
    let text = guest.sh(&format!(
        "nvme discover -t tcp -a {address} {port} {host} -o json"
    ))?;
    serde_json::from_str(&text).context(text)
}

/// The records of nvme-cli's log, sorted.
fn listed(log: &Value) -> Result<Vec<(&str, &str, &str)>> {
    let records = log["records"].as_array().context("no records")?;
    let mut listed: Vec<_> = records
        .iter()
        .map(|it| {
            let text = |name: &str| it[name].as_str().unwrap_or("-");
            (text("subnqn"), text("traddr"), text("trsvcid"))
        })
        .collect();
    listed.sort_unstable();
    Ok(listed)
}

/// Compares nvme-cli's view of a log with ours, field by field.
fn same_log(theirs: &Value, ours: &Value) -> Result<()> {
    ensure!(
        theirs["genctr"] == ours["generation"],
        "GENCTR is {} to them, {} to us",
        theirs["genctr"],
        ours["generation"]
    );
    ensure!(ours["skipped"] == json!([]), "{}", ours["skipped"]);
    let records = |log: &Value| log["records"].as_array().cloned().unwrap_or_default();
    let (theirs, ours) = (records(theirs), records(ours));
    ensure!(
        theirs.len() == ours.len(),
        "{} records to them, {} to us",
        theirs.len(),
        ours.len()
    );
    for (their, our) in theirs.iter().zip(&ours) {
        for name in ["subnqn", "traddr", "trsvcid", "portid"] {
            ensure!(their[name] == our[name], "{name}: {their} {our}");
        }
        for (theirs, ours) in [("trtype", "transport"), ("adrfam", "address_family")] {
            ensure!(their[theirs] == our[ours], "{theirs}: {their} {our}");
        }
        let is_current = our["subtype"] == "current";
        let subtype = match is_current {
            true => "current discovery subsystem",
            false => "nvme subsystem",
        };
        ensure!(their["subtype"] == subtype, "{their} {our}");
        ensure!(our["uri"].is_null() == is_current, "{our}");
    }
    Ok(())
}

fn connect_all(guest: &mut Guest, address: &str, hostnqn: &str) -> Result<()> {
    let host = as_host(hostnqn);
    guest.sh(&format!(
        "nvme connect-all -t tcp -a {address} {host} --keep-alive-tmo=5 --nr-io-queues=2"
    ))?;
    Ok(())
}

/// Both ways to the open subsystem and the one to the closed, each a controller that is live; namespaces and not their paths count.
fn connected_to_all(guest: &mut Guest) -> Result<String> {
    let connected = guest.sh(CONNECTED)?;
    let line = |nqn, address| format!("{nqn} traddr={address},trsvcid=4420");
    let expected = [
        line(CLOSED_NQN, CLOSED),
        line(OPEN_NQN, OPEN[0]),
        line(OPEN_NQN, OPEN[1]),
    ];
    let lines: Vec<&str> = connected.lines().collect();
    let all = lines.len() == expected.len()
        && lines
            .iter()
            .zip(&expected)
            .all(|(line, expected)| line.starts_with(expected.as_str()) && line.ends_with(" live"));
    ensure!(all, "{connected}");
    let namespaces = guest.sh(
        "for i in $(seq 50); do n=$(ls /sys/block | grep -cE '^nvme[1-9][0-9]*n[0-9]+$'); [ $n = 3 ] && break; \
         sleep 0.1; done; echo $n",
    )?;
    ensure!(namespaces == "3", "{namespaces} namespaces");
    Ok("3 controllers, 3 namespaces".to_owned())
}
