//! The cases that any disk has to pass, whatever it is made of, and how a disk is set up.

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest_tests::{Guest, Seeded};
use tempfile::TempDir;

use crate::{MIB, seed};

/// For the cases that move much data.
pub(crate) const LONG: Duration = Duration::from_secs(240);

/// In the guest: everything written is on the disk, and reads go to the disk.
pub(crate) const DROP_CACHES: &str = "sync; echo 3 >/proc/sys/vm/drop_caches";

/// Where images go: on a file system that has direct I/O, unlike that of temporary files on some machines.
pub(crate) fn image_directory() -> Result<TempDir> {
    Ok(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?)
}

/// An image of `mib` MiB, all a hole.
pub(crate) fn image(directory: &TempDir, name: &str, mib: u64) -> Result<PathBuf> {
    let path = directory.path().join(name);
    File::create(&path)?.set_len(mib * MIB)?;
    Ok(path)
}

/// What a disk was configured to be.
#[derive(Clone, Copy)]
pub(crate) struct Configured {
    pub(crate) disk: &'static str,
    pub(crate) serial: &'static str,
    pub(crate) mib: u64,
    pub(crate) block: u32,
    pub(crate) queues: u16,
}

impl Configured {
    /// Compares with what the guest sees.
    pub(crate) fn check(self, guest: &mut Guest) -> Result<String> {
        let Self {
            disk,
            serial,
            mib,
            block,
            queues,
        } = self;
        let seen = guest.sh(&format!(
            "d=/sys/block/{disk}; echo $(cat $d/serial) $(blockdev --getsize64 /dev/{disk}) \
             $(cat $d/queue/logical_block_size) $(ls $d/mq | wc -l)"
        ))?;
        let expected = format!("{serial} {} {block} {queues}", mib * MIB);
        ensure!(
            seen == expected,
            "serial, size, block size, queues are '{seen}', should be '{expected}'"
        );
        Ok(seen)
    }
}

pub(crate) fn write_and_read_back(
    guest: &mut Guest,
    disk: &str,
    stretch: Seeded,
) -> Result<String> {
    let Seeded {
        seed,
        offset,
        length,
    } = stretch;
    let place = format!("/dev/{disk} {offset} {length} {seed}");
    guest.sh(&format!(
        "seeded-data write {place}; {DROP_CACHES}; seeded-data verify {place}"
    ))?;
    Ok(format!(
        "{} MiB at byte {offset}, seed {seed}",
        length / MIB
    ))
}

/// Two jobs, each on a stretch of its own.
pub(crate) fn fio_verify(guest: &mut Guest, disk: &str, mib: u64, round: u64) -> Result<String> {
    let seed = seed(round);
    guest.sh_within(
        LONG,
        &format!(
            "fio --name=verify --filename=/dev/{disk} --rw=randrw --bsrange=4k-64k --numjobs=2 \
             --size={mib}M --offset_increment={mib}M --ioengine=libaio --iodepth=32 --direct=1 \
             --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed={seed} --group_reporting \
             >/tmp/fio.log || {{ tail -20 /tmp/fio.log >&2; false; }}"
        ),
    )?;
    let summary = guest
        .sh("grep -E '^ +(read|write):' /tmp/fio.log | tr -d ',' | tr -s ' ' | cut -d' ' -f2-3")?;
    Ok(format!(
        "2 jobs of {mib} MiB, seed {seed}, {}",
        summary.replace('\n', " ")
    ))
}

pub(crate) fn file_system_holds_a_tree(guest: &mut Guest, disk: &str) -> Result<String> {
    let seen = guest.sh_within(
        LONG,
        &format!(
            "mkfs.ext4 -q -F /dev/{disk}; mount /dev/{disk} /mnt; cp -a /usr/bin /etc /mnt/; \
             umount /mnt; {DROP_CACHES}; fsck.ext4 -fn /dev/{disk} >&2; \
             mount -o ro /dev/{disk} /mnt; diff -r --no-dereference /usr/bin /mnt/bin; \
             diff -r --no-dereference /etc /mnt/etc; find /mnt -type f | wc -l; umount /mnt"
        ),
    )?;
    let files: u32 = seen.parse().context("the number of files")?;
    ensure!(files > 200, "only {files} files were copied");
    Ok(format!("{files} files, fsck clean"))
}

/// Zeroes or discards the middle of a stretch of data: the middle reads as zeroes, what is beside
/// it stays.
pub(crate) fn range_is_cleared(
    guest: &mut Guest,
    disk: &str,
    blkdiscard: &str,
    seed: u64,
) -> Result<String> {
    let device = format!("/dev/{disk}");
    let (start, length, end) = (4 * MIB + 4096, 16 * MIB, 20 * MIB + 4096);
    let whole = 24 * MIB;
    let after = whole - end;
    guest.sh(&format!(
        "seeded-data write {device} 0 {whole} {seed}; {DROP_CACHES}; \
         blkdiscard {blkdiscard} -o {start} -l {length} {device}; {DROP_CACHES}; \
         seeded-data verify {device} 0 {start} {seed}; \
         seeded-data zeroes {device} {start} {length}; \
         seeded-data verify {device} {end} {after} {seed}",
    ))?;
    Ok("16 MiB read as zeroes, what is beside them is unchanged".to_owned())
}

pub(crate) fn no_kernel_errors(guest: &mut Guest) -> Result<String> {
    let errors = guest.sh(
        "dmesg | grep -E 'I/O error|critical .* error|blk_update_request|EXT4-fs (error|warning)|\
         hung task|blocked for more|virtio.*(fail|invalid)' || true",
    )?;
    ensure!(errors.is_empty(), "{errors}");
    Ok("clean".to_owned())
}
