//! Linux's own NVMe/TCP host, in a guest, against `export`: what nvme-cli asks, and what the kernel does by itself.

use std::fs;

use anyhow::{Context, Result, ensure};
use guest_tests::{Checks, Export, Guest, GuestOptions, Seeded, fill, rounds};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cases::{
    DROP_CACHES, fio_verify, image, no_kernel_errors, range_is_cleared, write_and_read_back,
};
use crate::{MIB, seed};

/// The controller in the guest: number 0 is its root disk's.
const CONTROLLER: &str = "/dev/nvme1";
/// Memory, 512-byte blocks. The kernel numbers its devices as it finds them; these links in /dev go by NSID.
const MEMORY: &str = "nsid1";
/// A file, 4096-byte blocks.
const FILE: &str = "nsid2";
/// A file, read-only.
const PROTECTED: &str = "nsid3";

const MEMORY_MIB: u64 = 64;
const FILE_MIB: u64 = 192;
const PROTECTED_MIB: u64 = 4;
const PROTECTED_SEED: u64 = 21;

const HOST_ID: &str = "11111111-2222-3333-4444-555555555555";
const HOST: &str =
    "--hostid=11111111-2222-3333-4444-555555555555 --hostnqn=nqn.2026-01.org.example:linux-host";

/// Where the guest finds the subsystem.
struct Subsystem {
    port: u16,
    nqn: String,
}

impl Subsystem {
    fn of(export: &Export) -> Result<Self> {
        let uri = &export.uris[0];
        let rest = uri.strip_prefix("nvme+tcp://127.0.0.1:");
        let rest = rest.with_context(|| uri.clone())?;
        let (port, path) = rest.split_once('/').with_context(|| uri.clone())?;
        let nqn = path.split('?').next().unwrap_or_default();
        Ok(Self {
            port: port.parse()?,
            nqn: nqn.to_owned(),
        })
    }

    /// Connects with so many I/O queues, and waits for the namespaces.
    fn connect(&self, guest: &mut Guest, queues: u16, digests: &str) -> Result<String> {
        let Self { port, nqn } = self;
        guest.sh(&format!(
            "nvme connect -t tcp -a 10.0.2.2 -s {port} -n {nqn} --keep-alive-tmo=5 --nr-io-queues={queues} \
             {HOST} {digests}\n\
             for i in $(seq 100); do [ $(ls -d /sys/block/nvme1n* | wc -l) = 3 ] && break; sleep 0.1; done\n\
             for n in /sys/block/nvme1n*; do ln -sf $(basename $n) /dev/nsid$(cat $n/nsid); done"
        ))?;
        let state = guest.sh(
            "cd /sys/class/nvme/nvme1; echo $(cat transport state kato queue_count) \
             $(ls /sys/block/nvme1c*n1/mq | wc -l)",
        )?;
        let expected = format!("tcp live 5 {} {queues}", queues + 1);
        ensure!(
            state == expected,
            "transport, state, keep-alive time, queues are '{state}', should be '{expected}'"
        );
        Ok(format!("{queues} I/O queues"))
    }

    fn disconnect(&self, guest: &mut Guest) -> Result<String> {
        let said = guest.sh(&format!("nvme disconnect -n {}", self.nqn))?;
        ensure!(said.ends_with("disconnected 1 controller(s)"), "{said}");
        guest.sh(&format!("! [ -e {CONTROLLER} ]"))?;
        Ok(said)
    }
}

#[test]
fn a_linux_host_finds_everything_that_it_looks_for() {
    let directory = tempfile::tempdir().unwrap();
    let (specs, protected) = namespaces(&directory).unwrap();
    let mut export = Export::start(&specs).unwrap();
    let subsystem = Subsystem::of(&export).unwrap();
    let mut checks = Checks::new(
        "a Linux host finds everything that it looks for (4 CPUs; NSID 1: memory, 2: a file with \
         4096-byte blocks, 3: read-only)",
    );
    let mut guest = Guest::boot(&GuestOptions {
        cpus: 4,
        network: true,
        ..GuestOptions::default()
    })
    .unwrap();
    guest.sh("modprobe nvme-tcp").unwrap();

    checks.check("nvme connect", || subsystem.connect(&mut guest, 4, ""));
    identities(&mut checks, &mut guest, &subsystem);
    log_pages(&mut checks, &mut guest);
    features(&mut checks, &mut guest);
    commands(&mut checks, &mut guest);
    statuses(&mut checks, &mut guest);
    data(&mut checks, &mut guest);
    checks.check("20 idle seconds with a keep-alive time of 5", || {
        idle(&mut guest)
    });
    checks.check("nvme reset, twice, and data after it", || reset(&mut guest));
    checks.check("nvme ns-rescan", || {
        guest.sh(&format!("nvme ns-rescan {CONTROLLER}"))?;
        let seen = guest.sh(&format!("ls -d /sys/block/nvme1n* | wc -l; cat {STATE}"))?;
        ensure!(seen == "3\nlive", "{seen}");
        Ok("3 namespaces")
    });
    checks.check("nvme disconnect", || subsystem.disconnect(&mut guest));
    for (queues, digests) in [
        (1, ""),
        (1, "--hdr-digest --data-digest"),
        (2, ""),
        (2, "--hdr-digest"),
        (4, ""),
        (4, "--data-digest"),
    ] {
        checks.check(&format!("fio verify on {queues} queues {digests}"), || {
            subsystem.connect(&mut guest, queues, digests)?;
            let seen = fio_verify(&mut guest, MEMORY, 4, 0)?;
            subsystem.disconnect(&mut guest)?;
            Ok(seen)
        });
    }
    what_is_refused(&mut checks, &mut guest, &subsystem);
    checks.check("no error in the kernel's log", || {
        no_kernel_errors(&mut guest)
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check("export ends cleanly", || export.stop().map(|()| "in time"));
    checks.check("what the host sent has arrived", || arrived(&export));
    checks.check("nothing was written to the read-only namespace", || {
        let mut expected = vec![0; (PROTECTED_MIB * MIB) as usize];
        fill(PROTECTED_SEED, 0, &mut expected);
        ensure!(fs::read(&protected)? == expected, "the image has changed");
        Ok("image unchanged")
    });
    checks.finish();
}

const STATE: &str = "/sys/class/nvme/nvme1/state";

/// The specifications for `export`, and the read-only image.
fn namespaces(directory: &TempDir) -> Result<(Vec<String>, std::path::PathBuf)> {
    let file = image(directory, "file.img", FILE_MIB)?;
    let protected = image(directory, "protected.img", PROTECTED_MIB)?;
    let mut content = vec![0; (PROTECTED_MIB * MIB) as usize];
    fill(PROTECTED_SEED, 0, &mut content);
    fs::write(&protected, &content)?;
    let specs = vec![
        format!("ram:{MEMORY_MIB}M"),
        format!("file:{},block-size=4096", file.display()),
        format!("file:{},ro", protected.display()),
    ];
    Ok((specs, protected))
}

/// What an nvme command prints as JSON.
fn ask(guest: &mut Guest, command: &str) -> Result<Value> {
    let text = guest.sh(&format!("nvme {command} -o json"))?;
    serde_json::from_str(&text).with_context(|| format!("nvme {command}: {text}"))
}

/// Compares fields of an answer.
fn expect(answer: &Value, fields: Value) -> Result<()> {
    for (name, value) in fields.as_object().into_iter().flatten() {
        let found = &answer[name];
        ensure!(found == value, "{name} is {found}, should be {value}");
    }
    Ok(())
}

fn identities(checks: &mut Checks, guest: &mut Guest, subsystem: &Subsystem) {
    checks.check("nvme id-ctrl", || {
        let answer = ask(guest, &format!("id-ctrl {CONTROLLER}"))?;
        expect(
            &answer,
            json!({
                // Compare, Dataset Management, Write Zeroes; 1 MiB; a volatile cache.
                "subnqn": subsystem.nqn, "cntrltype": 1, "oncs": 0xd, "mdts": 8, "vwc": 5,
                "ioccsz": (64 + 8192) / 16, "iorcsz": 1, "kas": 10, "nn": 1024,
            }),
        )?;
        Ok(format!("{} {}", answer["mn"], answer["fr"]))
    });
    checks.check("nvme list-ns", || {
        let answer = ask(guest, &format!("list-ns {CONTROLLER}"))?;
        let expected = json!({"nsid_list": [{"nsid": 1}, {"nsid": 2}, {"nsid": 3}]});
        ensure!(answer == expected, "{answer}");
        Ok("1, 2, 3")
    });
    for (nsid, mib, lbads, protected) in [
        (1, MEMORY_MIB, 9, 0),
        (2, FILE_MIB, 12, 0),
        (3, PROTECTED_MIB, 9, 1),
    ] {
        checks.check(&format!("nvme id-ns {nsid}"), || {
            let answer = ask(guest, &format!("id-ns {CONTROLLER} -n {nsid}"))?;
            let blocks = (mib * MIB) >> lbads;
            expect(
                &answer,
                json!({"nsze": blocks, "ncap": blocks, "nsattr": protected}),
            )?;
            expect(&answer["lbafs"][0], json!({"ms": 0, "ds": lbads}))?;
            Ok(format!("{blocks} blocks"))
        });
    }
    checks.check("nvme ns-descs", || {
        let answer = ask(guest, &format!("ns-descs {CONTROLLER} -n 1"))?;
        let list = answer["ns-descs"].as_array().context("no list")?.clone();
        let kinds: Vec<&Value> = list.iter().map(|it| &it["type"]).collect();
        ensure!(kinds == ["nguid", "uuid", "csi"], "{answer}");
        let plain = list[1]["uuid"]
            .as_str()
            .unwrap_or_default()
            .replace('-', "");
        ensure!(list[0]["nguid"] == plain, "{answer}");
        Ok(plain)
    });
    checks.check("what the kernel made of it", || {
        let seen = guest.sh(&format!(
            "for d in {MEMORY} {FILE} {PROTECTED}; do cd /sys/block/$(readlink /dev/$d); \
             echo $(cat ro queue/logical_block_size queue/max_hw_sectors_kb queue/write_cache); done"
        ))?;
        let expected = "0 512 1024 write back\n0 4096 1024 write back\n1 512 1024 write back";
        ensure!(seen == expected, "{seen:?}");
        Ok("read-only, block size, MDTS, cache")
    });
}

fn log_pages(checks: &mut Checks, guest: &mut Guest) {
    checks.check("nvme smart-log", || {
        let before = ask(guest, &format!("smart-log {CONTROLLER}"))?;
        expect(
            &before,
            json!({"avail_spare": 100, "percent_used": 0, "media_errors": "0"}),
        )?;
        guest.sh(&format!(
            "dd if=/dev/zero of=/dev/{MEMORY} bs=64k count=160 oflag=direct status=none"
        ))?;
        let after = ask(guest, &format!("smart-log {CONTROLLER}"))?;
        let grown = |name: &str| -> Result<u64> {
            let number = |log: &Value| log[name].as_str().map(str::parse::<u64>);
            let (before, after) = (number(&before), number(&after));
            Ok(after.context("no number")?? - before.context("no number")??)
        };
        let (commands, units) = (grown("host_write_commands")?, grown("data_units_written")?);
        // 10 MiB in units of 512000 bytes.
        ensure!(
            commands == 160 && (20..=21).contains(&units),
            "after 160 writes of 64 KiB: {commands} commands, {units} units more"
        );
        Ok("160 writes of 64 KiB are counted")
    });
    checks.check("nvme error-log", || {
        let answer = ask(guest, &format!("error-log {CONTROLLER}"))?;
        expect(&answer["errors"][0], json!({"error_count": 0}))?;
        Ok("no error")
    });
    checks.check("nvme fw-log", || {
        let answer = ask(guest, &format!("fw-log {CONTROLLER}"))?;
        expect(&answer["nvme1"], json!({"Active Firmware Slot (afi)": 1}))?;
        Ok(answer["nvme1"]["Firmware Rev Slot 1"].to_string())
    });
    checks.check("nvme effects-log", || {
        // Without --csi, this version looks for registers that only PCIe has.
        let text = guest.sh(&format!(
            "nvme effects-log {CONTROLLER} --csi=0 -o json | tr -d ' \\n'"
        ))?;
        for command in [
            "ACS_6(Identify)",
            "IOCS_5(Compare)",
            "IOCS_9(DatasetManagement)",
        ] {
            ensure!(text.contains(command), "{command} is not in {text}");
        }
        ensure!(
            !text.contains("IOCS_4("),
            "Write Uncorrectable is in {text}"
        );
        Ok("Compare, no Write Uncorrectable")
    });
    checks.check("nvme supported-log-pages", || {
        let text = guest.sh(&format!(
            "nvme supported-log-pages {CONTROLLER} | grep -c '^LID 0x'"
        ))?;
        ensure!(text == "7", "{text} pages");
        Ok("7 pages")
    });
}

fn features(checks: &mut Checks, guest: &mut Guest) {
    checks.check("nvme get-feature", || {
        for (fid, value) in [
            (0x01, 0),
            (0x02, 0),
            (0x04, 65535),
            (0x05, 0),
            (0x06, 1),
            (0x07, 0x0003_0003),
            (0x0a, 0),
            (0x0f, 5000),
        ] {
            let found = feature(guest, fid)?;
            ensure!(
                found == value,
                "feature {fid:#x} is {found:#x}, should be {value:#x}"
            );
        }
        let said = guest.sh(&format!(
            "nvme get-feature {CONTROLLER} -f 0x81 -l 16 -b | od -An -tx1"
        ))?;
        let id = HOST_ID.replace('-', "");
        ensure!(said.replace(' ', "") == id, "the host identifier is {said}");
        Ok("8 values and the host identifier")
    });
    checks.check("nvme set-feature", || {
        guest.sh(&format!("nvme set-feature {CONTROLLER} -f 4 -v 0x157"))?;
        let found = feature(guest, 4)?;
        ensure!(found == 0x157, "it is {found:#x}");
        Ok("temperature threshold")
    });
}

/// The value of a feature.
fn feature(guest: &mut Guest, fid: u8) -> Result<u32> {
    let said = guest.sh(&format!("nvme get-feature {CONTROLLER} -f {fid}"))?;
    let value = said.rsplit("Current value:").next().unwrap_or_default();
    u32::from_str_radix(value.trim_start_matches("0x"), 16).context(said)
}

fn commands(checks: &mut Checks, guest: &mut Guest) {
    // In the capsule (up to 8 KiB), and fetched.
    for (disk, block, bytes) in [
        (MEMORY, 512, 512),
        (MEMORY, 512, 65536),
        (FILE, 4096, 8192),
        (FILE, 4096, 1 << 20),
    ] {
        checks.check(&format!("nvme write, read, compare {bytes} bytes on {disk}"), || {
            let count = bytes / block - 1;
            let place = format!("/dev/{disk} --start-block=24 --block-count={count} --data-size={bytes}");
            guest.sh(&format!(
                "head -c {bytes} /dev/urandom >/tmp/a; cp /tmp/a /tmp/b; rm -f /tmp/c\n\
                 nvme write {place} --data=/tmp/a; nvme read {place} --data=/tmp/c; cmp /tmp/a /tmp/c\n\
                 nvme compare {place} --data=/tmp/a\n\
                 printf x | dd of=/tmp/b bs=1 seek=$(({bytes} - 1)) conv=notrunc status=none; cmp -s /tmp/a /tmp/b && exit\n\
                 if nvme compare {place} --data=/tmp/b 2>/tmp/err >&2; then echo 'no difference found'; exit 1; fi\n\
                 grep '(0x4285)' /tmp/err /dev/null"
            ))?;
            Ok("and a difference in the last byte is found")
        });
    }
    checks.check("nvme write-zeroes, dsm, flush", || {
        for disk in [MEMORY, FILE] {
            guest.sh(&format!(
                "seeded-data write /dev/{disk} 0 65536 5\n\
                 b=$(blockdev --getss /dev/{disk})\n\
                 nvme write-zeroes /dev/{disk} --start-block=0 --block-count=$((8192 / b - 1))\n\
                 nvme dsm /dev/{disk} --ad --slbs=$((16384 / b)),$((32768 / b)) --blocks=$((8192 / b)),$((4096 / b))\n\
                 nvme flush /dev/{disk}\n\
                 {DROP_CACHES}\n\
                 seeded-data zeroes /dev/{disk} 0 8192\n\
                 seeded-data zeroes /dev/{disk} 16384 8192\n\
                 seeded-data zeroes /dev/{disk} 32768 4096\n\
                 seeded-data verify /dev/{disk} 8192 8192 5\n\
                 seeded-data verify /dev/{disk} 24576 8192 5\n\
                 seeded-data verify /dev/{disk} 36864 28672 5"
            ))
            .with_context(|| disk.to_owned())?;
        }
        Ok("exactly what was named is cleared")
    });
}

fn statuses(checks: &mut Checks, guest: &mut Guest) {
    let blocks = MEMORY_MIB * MIB / 512;
    let io = |opcode: u8, more: String| {
        format!("io-passthru /dev/{MEMORY} --namespace-id=1 --opcode={opcode:#x} {more}")
    };
    for (what, command, status) in [
        ("an unknown I/O opcode", io(0x7e, String::new()), 0x4001),
        (
            "an unknown admin opcode",
            format!("admin-passthru {CONTROLLER} --opcode=0xc0"),
            0x4001,
        ),
        (
            "a read behind the end",
            io(
                2,
                format!("--cdw10={blocks} --cdw12=7 --data-len=4096 --read"),
            ),
            0x4080,
        ),
        (
            "a read over the end",
            io(
                2,
                format!("--cdw10={} --cdw12=7 --data-len=4096 --read", blocks - 7),
            ),
            0x4080,
        ),
        (
            "a write behind the end",
            io(
                1,
                format!(
                    "--cdw10={blocks} --cdw12=7 --data-len=4096 --write --input-file=/dev/zero"
                ),
            ),
            0x4080,
        ),
        (
            "Write Zeroes over the end",
            io(8, format!("--cdw10={} --cdw12=7", blocks - 7)),
            0x4080,
        ),
        (
            "a read of more than its memory",
            io(2, "--cdw10=16 --cdw12=7 --data-len=512 --read".to_owned()),
            0x400f,
        ),
        (
            "a deallocate behind the end",
            format!("dsm /dev/{MEMORY} --ad --slbs={blocks} --blocks=8"),
            0x4080,
        ),
        (
            "a write to the read-only namespace",
            format!(
                "write /dev/{PROTECTED} --start-block=0 --block-count=0 --data-size=512 --data=/tmp/a"
            ),
            0x4020,
        ),
        (
            "Write Uncorrectable",
            format!("write-uncor /dev/{MEMORY} --start-block=0 --block-count=0"),
            0x4001,
        ),
        (
            "Identify of a namespace that is not there",
            format!("ns-descs {CONTROLLER} --namespace-id=9"),
            0x4002,
        ),
        (
            "a log page that is not there",
            format!("get-log {CONTROLLER} --log-id=0x42 --log-len=512"),
            0x4002,
        ),
        (
            "a feature that is not there",
            format!("get-feature {CONTROLLER} --feature-id=0x7e"),
            0x4002,
        ),
    ] {
        checks.check(&format!("{what} is refused with {status:#06x}"), || {
            refused(guest, &command, &format!("({status:#x})"))
        });
    }
}

/// Runs an nvme command that has to fail with these words.
fn refused(guest: &mut Guest, command: &str, words: &str) -> Result<String> {
    let output = guest.run(&format!("nvme {command}"))?;
    let said = format!("{} {}", output.stdout.trim(), output.stderr.trim());
    ensure!(
        output.status != 0 && said.contains(words),
        "nvme {command}: status {}: {said}",
        output.status
    );
    let line = said.lines().last().unwrap_or_default();
    Ok(line.trim().chars().take(60).collect::<String>())
}

fn data(checks: &mut Checks, guest: &mut Guest) {
    checks.check("4 MiB at a time, direct, both ways", || {
        let (length, seed) = (16 * MIB, seed(0) ^ 7);
        guest.sh(&format!(
            "truncate -s {length} /tmp/a; seeded-data write /tmp/a 0 {length} {seed}\n\
             dd if=/tmp/a of=/dev/{FILE} bs=4M oflag=direct conv=notrunc status=none\n\
             dd if=/dev/{FILE} of=/tmp/b bs=4M count=4 iflag=direct status=none\n\
             cmp /tmp/a /tmp/b; rm /tmp/a /tmp/b"
        ))?;
        Ok("16 MiB")
    });
    for round in 0..rounds() {
        checks.check(
            "12 MiB written, synced, cache dropped, read back equal",
            || {
                let stretch = Seeded {
                    seed: seed(round),
                    offset: 4096,
                    length: 12 * MIB,
                };
                write_and_read_back(guest, FILE, stretch)
            },
        );
        checks.check("write zeroes (blkdiscard -z)", || {
            range_is_cleared(guest, MEMORY, "-z", seed(round) ^ 1)
        });
        checks.check("discard (blkdiscard)", || {
            range_is_cleared(guest, FILE, "", seed(round) ^ 2)
        });
    }
    checks.check("the read-only namespace shows its data", || {
        let length = PROTECTED_MIB * MIB;
        guest.sh(&format!(
            "seeded-data verify /dev/{PROTECTED} 0 {length} {PROTECTED_SEED}"
        ))?;
        Ok("4 MiB")
    });
}

/// The association lives on Keep Alive commands alone, and is the same one after.
fn idle(guest: &mut Guest) -> Result<String> {
    let seen = guest.sh(
        "cd /sys/class/nvme/nvme1; before=$(cat cntlid); dmesg -C; sleep 20\n\
         echo $(cat state) $(($(cat cntlid) - before)); dmesg",
    )?;
    ensure!(seen == "live 0", "{seen}");
    guest.sh(&format!(
        "dd if=/dev/{FILE} of=/dev/null bs=4k count=8 iflag=direct status=none"
    ))?;
    Ok("the same association, nothing in the kernel's log".to_owned())
}

fn reset(guest: &mut Guest) -> Result<String> {
    let place = format!("/dev/{FILE} {} {} 77", 64 * MIB, 2 * MIB);
    guest.sh(&format!(
        "seeded-data write {place}; before=$(cat /sys/class/nvme/nvme1/cntlid)\n\
         for round in 1 2; do nvme reset {CONTROLLER}; [ $(cat {STATE}) = live ]; done\n\
         [ $(cat /sys/class/nvme/nvme1/cntlid) = $((before + 2)) ]\n\
         {DROP_CACHES}; seeded-data verify {place}; seeded-data write {place}"
    ))?;
    Ok("a new association each time".to_owned())
}

/// What the kernel says when it cannot connect.
fn what_is_refused(checks: &mut Checks, guest: &mut Guest, subsystem: &Subsystem) {
    let Subsystem { port, nqn } = subsystem;
    checks.check("a subsystem that does not exist is refused", || {
        guest.sh("dmesg -C")?;
        let connect = format!("connect -t tcp -a 10.0.2.2 -s {port} -n {nqn}x {HOST}");
        refused(guest, &connect, "")?;
        let log = guest.sh("dmesg")?;
        let expected = "Connect Invalid Data Parameter, subsysnqn";
        ensure!(log.contains(expected), "{log}");
        Ok(expected)
    });
}

fn arrived(export: &Export) -> Result<String> {
    let (memory, file) = (export.counters(1)?, export.counters(2)?);
    ensure!(
        memory.write_zeroes > 0 && file.deallocates > 0 && file.flushes > 0,
        "{memory:?} {file:?}"
    );
    let protected = export.counters(3)?;
    ensure!(
        protected.writes == 0 && protected.written_bytes == 0,
        "{protected:?}"
    );
    Ok(format!("{file:?}"))
}
