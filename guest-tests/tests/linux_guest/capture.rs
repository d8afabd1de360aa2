//! Captures what Linux says as host and as target, as the wire fixtures `linux-*` of `nvmf/tests/wire`. Run by hand, when they
//! are to change: `cargo test -p guest-tests --test linux_guest -- --ignored captured_anew`.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use guest_tests::{Attach, AttachOptions, Disk, Export, Guest, GuestOptions, Recorder};

/// In the guest: 40 blocks, another byte in each, so that a fixture is short.
const DATA: &str = "for i in $(seq 40); do head -c 512 /dev/zero | tr '\\0' \"\\\\$(printf %03o $i)\"; done >/tmp/a";

/// The admin queue is connected first, then the I/O queue.
fn keep(recorder: &Recorder, name: &str, title: &str) -> Result<()> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nvmf/tests/wire");
    let connections = recorder.connections(title);
    ensure!(
        connections.len() == 2,
        "{} connections were made",
        connections.len()
    );
    fs::create_dir_all(&directory)?;
    for (queue, text) in ["admin", "io"].into_iter().zip(connections) {
        fs::write(directory.join(format!("{name}-{queue}.hex")), text)?;
    }
    Ok(())
}

#[test]
#[ignore = "writes fixtures"]
fn captured_anew_from_a_linux_host() {
    let export = Export::start(&["ram:1M"]).unwrap();
    let uri = export.uris[0].strip_prefix("nvme+tcp://").unwrap();
    let (address, path) = uri.split_once('/').unwrap();
    let nqn = path.split('?').next().unwrap();
    let recorder = Recorder::start(address.parse().unwrap()).unwrap();
    let mut guest = Guest::boot(&GuestOptions {
        network: true,
        ..GuestOptions::default()
    })
    .unwrap();
    let port = recorder.address.port();
    guest
        .sh(&format!(
            "modprobe nvme-tcp\n\
             nvme connect -t tcp -a 10.0.2.2 -s {port} -n {nqn} --nr-io-queues=1 --queue-size=16 --keep-alive-tmo=5 \
             --hostid=11111111-2222-3333-4444-555555555555 --hostnqn=nqn.2026-01.org.example:linux-host\n\
             for i in $(seq 100); do [ -b /dev/nvme1n1 ] && break; sleep 0.1; done\n\
             {DATA}\n\
             for count in 1 16 40; do\n\
             place=\"/dev/nvme1n1 --start-block=$count --block-count=$((count - 1)) --data-size=$((count * 512))\"\n\
             nvme write $place --data=/tmp/a; nvme read $place --data=/tmp/b; nvme compare $place --data=/tmp/a\n\
             done\n\
             nvme flush /dev/nvme1n1; nvme dsm /dev/nvme1n1 --ad --slbs=0 --blocks=8\n\
             nvme write-zeroes /dev/nvme1n1 --start-block=0 --block-count=7\n\
             ! nvme read /dev/nvme1n1 --start-block=2048 --block-count=0 --data-size=512 --data=/tmp/b\n\
             nvme disconnect -n {nqn}"
        ))
        .unwrap();
    keep(
        &recorder,
        "linux-host",
        "a Linux 6.12 host and our controller, no digests",
    )
    .unwrap();
}

#[test]
#[ignore = "writes fixtures"]
fn captured_anew_from_a_linux_target() {
    let directory = tempfile::tempdir().unwrap();
    let mut target = Guest::boot(&GuestOptions {
        forward: vec![4420],
        ..GuestOptions::default()
    })
    .unwrap();
    let nqn = "nqn.2026-01.org.example:linux";
    target
        .sh(&format!(
            "modprobe -a nvmet-tcp; modprobe brd rd_nr=1 rd_size=1024\n\
             mount -t configfs none /sys/kernel/config; cd /sys/kernel/config/nvmet\n\
             s=subsystems/{nqn}; mkdir $s; echo 1 >$s/attr_allow_any_host\n\
             mkdir $s/namespaces/1; echo /dev/ram0 >$s/namespaces/1/device_path; echo 1 >$s/namespaces/1/enable\n\
             mkdir ports/1; cd ports/1; echo ipv4 >addr_adrfam; echo tcp >addr_trtype; echo 0.0.0.0 >addr_traddr\n\
             echo 4420 >addr_trsvcid; echo 4096 >param_inline_data_size; ln -s $PWD/../../$s subsystems/{nqn}"
        ))
        .unwrap();
    let recorder = Recorder::start(target.forwarded(4420).unwrap()).unwrap();
    let socket = directory.path().join("captured.sock");
    let options = AttachOptions {
        num_queues: Some(1),
        arguments: ["--nr-io-queues", "1", "--queue-size", "32"]
            .map(str::to_owned)
            .into(),
        ..AttachOptions::default()
    };
    let uri = format!("nvme+tcp://{}/{nqn}", recorder.address);
    let mut attach = Attach::start(&socket, &uri, &options).unwrap();
    let mut guest = Guest::boot(&GuestOptions {
        disks: vec![Disk { socket, queues: 1 }],
        ..GuestOptions::default()
    })
    .unwrap();
    guest
        .sh(&format!(
            "{DATA}\n\
             for size in 512 4096 20480; do\n\
             dd if=/tmp/a of=/dev/vda bs=$size count=1 oflag=direct conv=notrunc,fsync status=none\n\
             dd if=/dev/vda of=/tmp/b bs=$size count=1 iflag=direct status=none; cmp -n $size /tmp/a /tmp/b\n\
             done\n\
             blkdiscard -o 65536 -l 65536 /dev/vda; blkdiscard -z -o 0 -l 4096 /dev/vda",
        ))
        .unwrap();
    guest.power_off().unwrap();
    attach.stop().unwrap();
    keep(
        &recorder,
        "linux-target",
        "our host and a Linux 6.12 target, no digests",
    )
    .unwrap();
}
