//! Sectors of 512 bytes on namespaces with blocks of 4096: firmware boots from one, and a guest works with sectors.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use guest_tests::{
    Attach, AttachOptions, Checks, Daemon, Disk, Export, Guest, GuestOptions, qemu_program, rounds,
};

use crate::cases::{LONG, image, image_directory, no_kernel_errors};
use crate::seed;

const SECTOR: u64 = 512;
const SIZE_MIB: u64 = 64;
/// Where the text is that the boot sector prints, and where it puts a copy: neither is at the start of a block.
const TEXT_AT: u64 = 1003;
const COPY_AT: u64 = 2013;
const TEXT: &[u8] = b"a sector within a block was read by firmware\r\n\0";
/// What is around the copy.
const AROUND: u8 = 0x5a;
/// Firmware takes a few seconds, a busy machine more.
const BOOT_LIMIT: Duration = Duration::from_secs(90);

/// A boot sector: has the firmware read a sector (INT 13h, AH=42h), write it elsewhere (AH=43h), read it from there, and
/// prints what it has then at the first serial port.
fn boot_sector() -> [u8; 512] {
    // Offsets in the sector, which is at 7c00h.
    const PRINT: usize = 0x80;
    const STOP: usize = 0xa0;
    const PACKETS: usize = 0x100;
    /// Where sectors are read to; it is zero at first.
    const BUFFERS: [u16; 2] = [0x8000, 0x8200];
    // xor ax,ax; mov ds,ax; mov es,ax; mov ss,ax; mov sp,7c00h; sti
    let mut code = vec![
        0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xfb,
    ];
    // A short jump is as far as from its end.
    let jump = |code: &mut Vec<u8>, operation, to: usize| {
        let distance = u8::try_from(to - code.len() - 2).unwrap();
        code.extend([operation, distance]);
    };
    for (function, packet) in [(0x42, 0u16), (0x43, 1), (0x42, 2)] {
        let [low, high] = (0x7c00 + PACKETS as u16 + 16 * packet).to_le_bytes();
        // mov si,packet; mov ax,function; int 13h; jc stop. The drive stays in dl.
        code.extend([0xbe, low, high, 0xb8, 0x00, function, 0xcd, 0x13]);
        jump(&mut code, 0x72, STOP);
    }
    // mov si,buffer; jmp print
    let [low, high] = BUFFERS[1].to_le_bytes();
    code.extend([0xbe, low, high]);
    jump(&mut code, 0xeb, PRINT);
    let mut sector = [0; 512];
    sector[..code.len()].copy_from_slice(&code);
    // print: lodsb; test al,al; jz stop; mov bl,al; wait: mov dx,3fdh; in al,dx; test al,20h; jz wait;
    // mov dx,3f8h; mov al,bl; out dx,al; jmp print
    let print = [
        0xac, 0x84, 0xc0, 0x74, 0x1b, 0x88, 0xc3, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x20, 0x74, 0xf8,
        0xba, 0xf8, 0x03, 0x88, 0xd8, 0xee, 0xeb, 0xe9,
    ];
    sector[PRINT..PRINT + print.len()].copy_from_slice(&print);
    // stop: hlt; jmp stop
    sector[STOP..STOP + 3].copy_from_slice(&[0xf4, 0xeb, 0xfd]);
    let packets = [
        (BUFFERS[0], TEXT_AT),
        (BUFFERS[0], COPY_AT),
        (BUFFERS[1], COPY_AT),
    ];
    for (packet, (buffer, lba)) in packets.into_iter().enumerate() {
        // Its size, how many sectors, where to (offset and segment), where from.
        let mut bytes = vec![16, 0, 1, 0];
        bytes.extend(buffer.to_le_bytes());
        bytes.extend([0, 0]);
        bytes.extend(lba.to_le_bytes());
        let at = PACKETS + 16 * packet;
        sector[at..at + 16].copy_from_slice(&bytes);
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// A disk image whose boot sector it is.
fn bootable(path: &Path) -> Result<()> {
    let file = std::fs::OpenOptions::new().write(true).open(path)?;
    file.write_all_at(&boot_sector(), 0)?;
    file.write_all_at(TEXT, TEXT_AT * SECTOR)?;
    let around = vec![AROUND; 32 * SECTOR as usize];
    file.write_all_at(&around, (COPY_AT - 16) * SECTOR)?;
    Ok(())
}

/// A machine with nothing but firmware and the disk; a log of each, the serial port's first.
struct Machine {
    _qemu: Daemon,
    serial: std::path::PathBuf,
    firmware: std::path::PathBuf,
}

impl Machine {
    fn start(directory: &Path, socket: &Path) -> Result<Self> {
        let serial = directory.join("serial.log");
        let firmware = directory.join("firmware.log");
        let mut command = Command::new(qemu_program());
        command.args(["-M", "q35", "-nodefaults", "-display", "none", "-m", "64M"]);
        command.args([
            "-object",
            "memory-backend-memfd,id=memory,size=64M,share=on",
        ]);
        command.args(["-numa", "node,memdev=memory"]);
        let log = |path: &Path| format!("file:{}", path.display());
        command.args(["-serial", &log(&serial)]);
        let said = format!("file,id=firmware,path={}", firmware.display());
        command.args(["-chardev", &said]);
        command.args(["-device", "isa-debugcon,iobase=0x402,chardev=firmware"]);
        let disk = format!("socket,id=disk,path={}", socket.display());
        command.args(["-chardev", &disk]);
        command.args(["-device", "vhost-user-blk-pci,chardev=disk,bootindex=1"]);
        Ok(Self {
            _qemu: Daemon::start("QEMU", &command)?,
            serial,
            firmware,
        })
    }

    /// Waits until one of the two has said something.
    fn await_said(path: &Path, text: &str) -> Result<()> {
        let deadline = Instant::now() + BOOT_LIMIT;
        loop {
            let said = std::fs::read(path).unwrap_or_default();
            let said = String::from_utf8_lossy(&said);
            if said.contains(text) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("not '{text}' but: {said}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn with_sectors() -> AttachOptions {
    AttachOptions {
        arguments: vec!["--emulate-512".to_owned()],
        ..AttachOptions::default()
    }
}

#[test]
fn firmware_boots_from_a_namespace_with_large_blocks_that_has_sectors() {
    let mut checks = Checks::new("firmware and sectors (SeaBIOS, nothing else)");
    let directory = image_directory().unwrap();
    let image = image(&directory, "boot.img", SIZE_MIB).unwrap();
    bootable(&image).unwrap();
    let spec = format!("file:{},block-size=4096", image.display());
    let mut export = Export::start(&[&spec]).unwrap();
    let socket = directory.path().join("boot.sock");
    let text = String::from_utf8_lossy(&TEXT[..TEXT.len() - 3]).into_owned();
    checks.check("without the option it takes the disk for unusable", || {
        let options = AttachOptions::default();
        let mut attach = Attach::start(&socket, &export.uris[0], &options)?;
        let machine = Machine::start(directory.path(), &socket)?;
        Machine::await_said(&machine.firmware, "No bootable device")?;
        let said = std::fs::read_to_string(&machine.firmware)?;
        let mut lines = said.lines();
        let refused = lines.find(|line| line.contains("4096"));
        drop(machine);
        attach.stop()?;
        Ok(refused.context(said.clone())?.to_owned())
    });
    checks.check("with it, it boots, reads and writes", || {
        let mut attach = Attach::start(&socket, &export.uris[0], &with_sectors())?;
        let machine = Machine::start(directory.path(), &socket)?;
        Machine::await_said(&machine.serial, &text)?;
        drop(machine);
        attach.stop()?;
        Ok(text.clone())
    });
    checks.check(
        "one sector was written, and those around it are as they were",
        || {
            export.stop()?;
            let mut found = vec![0; 33 * SECTOR as usize];
            let file = std::fs::File::open(&image)?;
            file.read_exact_at(&mut found, (COPY_AT - 16) * SECTOR)?;
            let (before, rest) = found.split_at(16 * SECTOR as usize);
            let (copy, after) = rest.split_at(SECTOR as usize);
            ensure!(copy.starts_with(TEXT), "no copy");
            let after = &after[..15 * SECTOR as usize];
            let same = |bytes: &[u8]| bytes.iter().all(|&byte| byte == AROUND);
            ensure!(same(before) && same(after), "a neighbour has changed");
            Ok(format!("sector {COPY_AT}"))
        },
    );
    checks.finish();
}

#[test]
fn a_linux_guest_works_with_sectors_of_a_namespace_with_large_blocks() {
    let mut checks =
        Checks::new("sectors in Linux (vda: remote, vdb: local, both with blocks of 4096)");
    let directory = image_directory().unwrap();
    let spec = |name| {
        let image = image(&directory, name, SIZE_MIB).unwrap();
        format!("file:{},block-size=4096", image.display())
    };
    let mut export = Export::start(&[&spec("remote.img")]).unwrap();
    let sockets = ["remote.sock", "local.sock"].map(|name| directory.path().join(name));
    let remote = Attach::start(&sockets[0], &export.uris[0], &with_sectors());
    let local = Attach::serve(&sockets[1], &spec("local.img"), &with_sectors());
    let mut attached = [remote.unwrap(), local.unwrap()];
    let disks = sockets.into_iter().map(|socket| Disk { socket, queues: 2 });
    let mut guest = Guest::boot(&GuestOptions {
        cpus: 2,
        disks: disks.collect(),
        ..GuestOptions::default()
    })
    .unwrap();
    checks.check(
        "the guest sees sectors, and the blocks that they are in",
        || {
            let seen = guest.sh(
                "for d in vda vdb; do blockdev --getss --getpbsz --getiomin /dev/$d; done | xargs",
            )?;
            ensure!(seen == "512 4096 4096 512 4096 4096", "{seen}");
            Ok(seen)
        },
    );
    for disk in ["vda", "vdb"] {
        for round in 0..rounds().min(5) {
            checks.check(&format!("{disk}: fio writes single sectors and verifies"), || {
                let seed = seed(round);
                guest.sh_within(
                    LONG,
                    &format!(
                        "fio --name=verify --filename=/dev/{disk} --rw=randrw --bsrange=512-6k --bs_unaligned=0 \
                         --blockalign=512 --numjobs=2 --size=1M --offset_increment=1M --ioengine=libaio --iodepth=16 \
                         --direct=1 --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed={seed} >/tmp/fio.log 2>&1 || \
                         {{ tail -20 /tmp/fio.log >&2; exit 1; }}"
                    ),
                )?;
                Ok(format!("2 MiB, seed {seed}"))
            });
        }
        checks.check(&format!("{disk}: a file system of blocks of 1024"), || {
            guest.sh_within(
                LONG,
                &format!(
                    "mkfs.ext4 -q -b 1024 /dev/{disk}; mkdir -p /tmp/m; mount /dev/{disk} /tmp/m; \
                     dd if=/dev/urandom of=/tmp/m/a bs=1k count=3001 status=none; sum=$(md5sum </tmp/m/a); \
                     cp /tmp/m/a /tmp/m/b; rm /tmp/m/a; fstrim /tmp/m; umount /tmp/m; echo 3 >/proc/sys/vm/drop_caches; \
                     mount /dev/{disk} /tmp/m; [ \"$sum\" = \"$(md5sum </tmp/m/b)\" ]; umount /tmp/m; e2fsck -fn /dev/{disk}"
                ),
            )?;
            Ok("written, trimmed, read back and checked")
        });
    }
    checks.check("no error in the kernel's log", || {
        no_kernel_errors(&mut guest)
    });
    checks.check("power-off", || guest.power_off().map(|()| "QEMU ended"));
    checks.check("the daemons end cleanly", || {
        for attach in &mut attached {
            attach.stop()?;
        }
        export.stop()?;
        let unaligned = |attach: &Attach| {
            let counters = attach.daemon.logged("disk counters");
            counters
                .first()
                .and_then(|fields| fields["unaligned"].as_u64())
        };
        let unaligned = attached.each_ref().map(unaligned);
        ensure!(
            unaligned.iter().all(|count| *count > Some(100)),
            "{unaligned:?}"
        );
        Ok(format!("requests that were not aligned: {unaligned:?}"))
    });
    checks.finish();
}
