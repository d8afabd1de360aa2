//! A load on a disk while something happens to it: fio writes and verifies, stretch after stretch, until it is told to end.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest_tests::{Guest, Job};

/// Two mebibytes after the other are written, read back and compared, in the first 64 of the disk. A field of fio's terse output is the longest
/// that a read took, another the longest of a write, both in microseconds.
const SCRIPT: &str = "
touch /tmp/load-DISK; round=0; longest=0
while [ -e /tmp/load-DISK ]; do
    fio --name=load --filename=/dev/DISK --offset=$((round % 32 * 2))M --size=2M --rw=randwrite --bs=4k --ioengine=libaio \
        --iodepth=8 --direct=1 --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=$((SEED + round)) \
        --output-format=terse --terse-version=3 >/tmp/load-DISK.log 2>&1 || { tail -20 /tmp/load-DISK.log >&2; exit 1; }
    longest=$(awk -F';' -v longest=$longest '$1 == 3 {
        if ($39 > longest) longest = $39; if ($80 > longest) longest = $80 } END {printf \"%d\", longest}' /tmp/load-DISK.log)
    round=$((round + 1))
done
echo $((round * 2)) $longest
";

/// A load in a guest.
#[must_use = "finish() says whether it went well"]
pub(crate) struct Load {
    job: Job,
    disk: &'static str,
    seed: u64,
}

/// What a load did.
pub(crate) struct Done {
    /// Written, read back and compared.
    pub(crate) mib: u64,
    /// The longest time from a request to its answer, as the guest saw it.
    pub(crate) longest: Duration,
    seed: u64,
}

impl Load {
    /// Starts it on a disk. It has to be told to end within `limit`.
    pub(crate) fn start(
        guest: &mut Guest,
        disk: &'static str,
        seed: u64,
        limit: Duration,
    ) -> Result<Self> {
        let script = SCRIPT.replace("DISK", disk);
        let job = guest.start(&script.replace("SEED", &seed.to_string()), limit)?;
        Ok(Self { job, disk, seed })
    }

    /// Waits until it has written something: a fio takes seconds to start on an emulated processor.
    pub(crate) fn await_writes(&self, guest: &mut Guest) -> Result<()> {
        let stat = format!("/sys/block/{}/stat", self.disk);
        let script = format!(
            "before=$(awk '{{print $5}}' {stat}); \
            for i in $(seq 600); do [ $(awk '{{print $5}}' {stat}) -gt $before ] && exit; sleep 0.1; done; exit 1"
        );
        guest.sh(&script).map(drop)
    }

    /// It will never be heard of again: its machine is going to be reset.
    pub(crate) fn give_up(self) {}

    /// Has it end. All that it did must have gone well.
    pub(crate) fn finish(self, guest: &mut Guest) -> Result<Done> {
        guest.sh(&format!("rm -f /tmp/load-{}", self.disk))?;
        let said = guest.finish(self.job)?.success()?;
        let (mib, longest) = said.split_once(' ').with_context(|| said.clone())?;
        let done = Done {
            mib: mib.parse().context("rounds")?,
            longest: Duration::from_micros(longest.parse().context("microseconds")?),
            seed: self.seed,
        };
        ensure!(
            done.mib > 0 && !done.longest.is_zero(),
            "it did nothing: {said}"
        );
        Ok(done)
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mib, longest, seed } = self;
        let longest = longest.as_secs_f32();
        write!(
            f,
            "{mib} MiB verified, seed {seed}, the longest request took {longest:.1} s"
        )
    }
}
