//! Linux's own NVMe/TCP target, nvmet in one guest, whose namespaces `attach` brings to another guest.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use guest_tests::{Attach, AttachOptions, Checks, Disk, Guest, GuestOptions, Seeded, rounds};
use tempfile::TempDir;

use crate::cases::{
    Configured, file_system_holds_a_tree, fio_verify, no_kernel_errors, range_is_cleared,
    write_and_read_back,
};
use crate::{MIB, seed};

const NQN: &str = "nqn.2026-01.org.example:linux";
/// Whom it lets in is nobody.
const CLOSED_NQN: &str = "nqn.2026-01.org.example:closed";

/// A namespace of the target and the port that it is attached through.
struct Exported {
    seen: Configured,
    /// The namespace's storage in the target's guest.
    device: &'static str,
    nsid: u32,
    port: u16,
    /// In-capsule data that the port takes, in bytes.
    inline: u32,
    /// How it is attached.
    digests: &'static [&'static str],
}

/// The disk after those: the first of them once more.
const READ_ONLY: &str = "vdg";

const DIGESTS: &[&str] = &["--hdr-digest", "--data-digest"];

/// Every in-capsule limit with digests and without.
const EXPORTED: [Exported; 6] = [
    Exported {
        seen: disk("vda", "brd0", 512, 4),
        device: "/dev/ram0",
        nsid: 1,
        port: 4420,
        inline: 0,
        digests: &[],
    },
    Exported {
        seen: disk("vdb", "null_blk0", 4096, 2),
        device: "/dev/nullb0",
        nsid: 2,
        port: 4421,
        inline: 4096,
        digests: DIGESTS,
    },
    Exported {
        seen: disk("vdc", "loop0", 512, 1),
        device: "/dev/loop0",
        nsid: 7,
        port: 4422,
        inline: 16384,
        digests: &["--data-digest"],
    },
    Exported {
        seen: disk("vdd", "brd1", 512, 2),
        device: "/dev/ram1",
        nsid: 8,
        port: 4420,
        inline: 0,
        digests: DIGESTS,
    },
    Exported {
        seen: disk("vde", "null_blk1", 4096, 1),
        device: "/dev/nullb1",
        nsid: 9,
        port: 4421,
        inline: 4096,
        digests: &[],
    },
    Exported {
        seen: disk("vdf", "loop1", 512, 2),
        device: "/dev/loop1",
        nsid: 10,
        port: 4422,
        inline: 16384,
        digests: &[],
    },
];

const fn disk(disk: &'static str, serial: &'static str, block: u32, queues: u16) -> Configured {
    Configured {
        disk,
        serial,
        mib: MIB_EACH,
        block,
        queues,
    }
}

/// Each device, in MiB.
const MIB_EACH: u64 = 128;

/// Makes the devices in the target's guest, two of each kind: memory, memory with 4096-byte blocks that can be discarded, and a
/// file. `MIB` is how large each is.
const DEVICES: &str = "
modprobe -a nvmet-tcp loop
modprobe brd rd_nr=2 rd_size=$((MIB * 1024))
modprobe null_blk nr_devices=0
mount -t configfs none /sys/kernel/config
for i in 0 1; do
    n=/sys/kernel/config/nullb/nullb$i; mkdir $n
    echo 4096 >$n/blocksize; echo $MIB >$n/size; echo 1 >$n/memory_backed; echo 1 >$n/discard; echo 1 >$n/power
    truncate -s ${MIB}M /tmp/loop$i.img; losetup /dev/loop$i /tmp/loop$i.img
done
";

/// Each with its in-capsule limit.
fn ports() -> BTreeMap<u16, u32> {
    EXPORTED.iter().map(|it| (it.port, it.inline)).collect()
}

fn configure(guest: &mut Guest) -> Result<()> {
    guest
        .sh(&format!("MIB={MIB_EACH}\n{DEVICES}"))
        .context("devices")?;
    let mut script = format!(
        "cd /sys/kernel/config/nvmet; mkdir subsystems/{NQN} subsystems/{CLOSED_NQN}\n\
         echo 1 >subsystems/{NQN}/attr_allow_any_host\n\
         echo 0 >subsystems/{CLOSED_NQN}/attr_allow_any_host\n"
    );
    for Exported { device, nsid, .. } in EXPORTED {
        script += &format!(
            "n=subsystems/{NQN}/namespaces/{nsid}; mkdir $n; echo {device} >$n/device_path; echo 1 >$n/enable\n"
        );
    }
    for (port, inline) in ports() {
        script += &format!(
            "p=ports/{port}; mkdir $p; echo ipv4 >$p/addr_adrfam; echo tcp >$p/addr_trtype\n\
             echo 0.0.0.0 >$p/addr_traddr; echo {port} >$p/addr_trsvcid; echo {inline} >$p/param_inline_data_size\n\
             for s in {NQN} {CLOSED_NQN}; do ln -s $PWD/subsystems/$s $p/subsystems/$s; done\n"
        );
    }
    guest.sh(&script).context("nvmet")?;
    Ok(())
}

fn uri(target: &Guest, port: u16, nqn: &str, nsid: u32) -> Result<String> {
    let address = target.forwarded(port)?;
    Ok(format!("nvme+tcp://{address}/{nqn}?nsid={nsid}"))
}

#[test]
fn a_linux_target_is_a_disk_like_any_other() {
    let directory = tempfile::tempdir().unwrap();
    let mut checks = Checks::new(
        "a Linux target is a disk like any other (nvmet in a guest of its own; vda, vdd: brd, vdb, vde: \
         null_blk with 4096-byte blocks, vdc, vdf: files)",
    );
    let mut target = Guest::boot(&GuestOptions {
        memory_mib: 768,
        forward: ports().into_keys().collect(),
        ..GuestOptions::default()
    })
    .unwrap();
    configure(&mut target).unwrap();
    what_is_refused(&mut checks, &directory, &target);

    let mut attached = Vec::new();
    let mut disks = Vec::new();
    for Exported {
        seen,
        nsid,
        port,
        digests,
        ..
    } in &EXPORTED
    {
        let uri = uri(&target, *port, NQN, *nsid).unwrap();
        let socket = directory.path().join(format!("{}.sock", seen.serial));
        let options = AttachOptions {
            num_queues: Some(seen.queues),
            serial: Some(seen.serial.to_owned()),
            arguments: digests.iter().map(|&it| it.to_owned()).collect(),
            ..AttachOptions::default()
        };
        attached.push(Attach::start(&socket, &uri, &options).unwrap());
        disks.push(Disk {
            socket,
            queues: seen.queues,
        });
    }
    let read_only = read_only(&directory, &target).unwrap();
    disks.push(Disk {
        socket: read_only.socket.clone(),
        queues: 1,
    });
    attached.push(read_only);
    // It complains of Connects that it refuses.
    target.sh("dmesg -C").unwrap();
    let mut guest = Guest::boot(&GuestOptions {
        cpus: 4,
        disks,
        ..GuestOptions::default()
    })
    .unwrap();
    for Exported {
        seen,
        inline,
        digests,
        ..
    } in EXPORTED
    {
        let digests = digests.join(" ");
        let name = format!("{} with {inline} bytes in-capsule {digests}", seen.serial);
        checks.check(&format!("{name}: what the guest sees"), || {
            seen.check(&mut guest)
        });
        for round in 0..rounds() {
            checks.check(&format!("{name}: written and read back"), || {
                let stretch = Seeded {
                    seed: seed(round),
                    offset: 4096,
                    length: 6 * MIB,
                };
                write_and_read_back(&mut guest, seen.disk, stretch)
            });
            checks.check(&format!("{name}: fio verify"), || {
                fio_verify(&mut guest, seen.disk, 3, round)
            });
        }
    }
    // brd cannot discard.
    for (what, disk, option) in [
        ("write zeroes", "vda", "-z"),
        ("write zeroes", "vdb", "-z"),
        ("discard", "vdb", ""),
        ("discard", "vdc", ""),
    ] {
        checks.check(&format!("{what} on {disk}"), || {
            range_is_cleared(&mut guest, disk, option, seed(0) ^ 2)
        });
    }
    checks.check("a file system on the target's file", || {
        file_system_holds_a_tree(&mut guest, "vdc")
    });
    checks.check("flushes reach the target's device", || {
        flushes_arrive(&mut guest, &mut target)
    });
    checks.check("and writes do, through its cache, without any", || {
        writes_go_through(&mut guest, &mut target)
    });
    checks.check("a read-only disk reads, and refuses to be written", || {
        only_read(&mut guest)
    });
    checks.check("after a reboot every disk has what was written", || {
        survives_a_reboot(&mut guest)
    });
    checks.check("no error in the guest's kernel log", || {
        no_kernel_errors(&mut guest)
    });
    checks.check("no error in the target's kernel log", || {
        let errors = target
            .sh("dmesg | grep -E 'I/O error|nvmet.*(fail|error|bad|invalid|unexpected)' || true")?;
        ensure!(errors.is_empty(), "{errors}");
        no_kernel_errors(&mut target)
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check("attach ends cleanly", || {
        for attach in &mut attached {
            attach.stop()?;
        }
        Ok(format!("all {}", attached.len()))
    });
    checks.check("the target has no controller left", || {
        no_controller_left(&mut target)
    });
    checks.finish();
}

/// [`READ_ONLY`], which another disk writes to.
fn read_only(directory: &TempDir, target: &Guest) -> Result<Attach> {
    let Exported { nsid, port, .. } = EXPORTED[0];
    let uri = uri(target, port, NQN, nsid)?;
    let options = AttachOptions {
        num_queues: Some(1),
        read_only: true,
        ..AttachOptions::default()
    };
    Attach::start(&directory.path().join("read-only.sock"), &uri, &options)
}

fn only_read(guest: &mut Guest) -> Result<String> {
    let writable = EXPORTED[0].seen.disk;
    guest.sh(&format!(
        "[ $(blockdev --getro /dev/{READ_ONLY}) = 1 ]; sync; blockdev --flushbufs /dev/{READ_ONLY}; \
         cmp -n {MIB} /dev/{writable} /dev/{READ_ONLY}; \
         ! dd if=/dev/zero of=/dev/{READ_ONLY} bs=4k count=1 conv=fsync status=none"
    ))?;
    Ok(format!("1 MiB of {writable} read through it"))
}

fn survives_a_reboot(guest: &mut Guest) -> Result<String> {
    let stretch = Seeded {
        seed: seed(0) ^ 3,
        offset: 96 * MIB,
        length: 4 * MIB,
    };
    for Exported { seen, .. } in EXPORTED {
        write_and_read_back(guest, seen.disk, stretch)?;
    }
    guest.reboot()?;
    for Exported { seen, .. } in EXPORTED {
        seen.check(guest)?;
        guest.sh(&format!(
            "seeded-data verify /dev/{} {} {} {}",
            seen.disk, stretch.offset, stretch.length, stretch.seed
        ))?;
    }
    Ok(format!("{} disks, 4 MiB each", EXPORTED.len()))
}

/// What `attach` says when the target refuses it.
fn what_is_refused(checks: &mut Checks, directory: &TempDir, target: &Guest) {
    let socket = directory.path().join("refused.sock");
    for (name, nqn, nsid, words) in [
        (
            "a subsystem that the target does not have",
            "nqn.2026-01.org.example:nobody",
            1,
            &["nqn.2026-01.org.example:nobody"][..],
        ),
        (
            "a host that the target does not let in",
            CLOSED_NQN,
            1,
            &[CLOSED_NQN, "host"],
        ),
        (
            "a namespace that the target does not have",
            NQN,
            5,
            &["5", NQN],
        ),
    ] {
        checks.check(&format!("{name} is refused in one line"), || {
            let line = Attach::refused(&socket, &uri(target, 4420, nqn, nsid)?)?;
            for word in words {
                ensure!(line.contains(word), "'{word}' is not in: {line}");
            }
            Ok(line)
        });
    }
}

/// Flushes that the file behind vdc has had.
fn flushes(target: &mut Guest) -> Result<u64> {
    Ok(target
        .sh("awk '{print $16}' /sys/block/loop0/stat")?
        .parse()?)
}

/// A guest that chose write-through sends no flush, and what it wrote is durable all the same.
fn writes_go_through(guest: &mut Guest, target: &mut Guest) -> Result<String> {
    let before = flushes(target)?;
    guest.sh("echo 'write through' >/sys/block/vdc/cache_type; \
         dd if=/dev/zero of=/dev/vdc bs=4k count=10 seek=20 conv=notrunc oflag=direct status=none; \
         echo 'write back' >/sys/block/vdc/cache_type")?;
    let arrived = flushes(target)? - before;
    ensure!(arrived >= 10, "{arrived} flushes arrived after 10 writes");
    Ok(format!("{arrived} after 10 writes"))
}

fn flushes_arrive(guest: &mut Guest, target: &mut Guest) -> Result<String> {
    let before = flushes(target)?;
    guest.sh("for i in $(seq 10); do \
         dd if=/dev/zero of=/dev/vdc bs=4k count=1 seek=$i conv=notrunc,fsync status=none; done")?;
    let arrived = flushes(target)? - before;
    ensure!(arrived >= 10, "{arrived} flushes arrived after 10 fsyncs");
    Ok(format!("{arrived} after 10 fsyncs"))
}

/// Each association was ended, not forgotten: without keep-alives the target would find out only much later.
fn no_controller_left(target: &mut Guest) -> Result<String> {
    let left = target.sh(
        "for i in $(seq 20); do n=$(ss -Htn state established | wc -l); [ $n = 0 ] && break; sleep 0.1; done; echo $n",
    )?;
    ensure!(left == "0", "{left} connections are left");
    Ok("no connection".to_owned())
}
