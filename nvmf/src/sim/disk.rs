//! A disk that stores nothing: it knows what each block may hold, and judges what is read.
//!
//! Several writes to a block at a time may end in either order. A write that failed or was never
//! answered leaves the old or the new content, block by block. What a read returns must be allowed,
//! and rules out what was overwritten before. After a power cut, what a flush (or a write with
//! force unit access) did not cover may be back to anything since.

/// When something happened: numbers that grow.
pub type Moment = u64;

/// What zeroes are, among the values of blocks.
pub const ZEROES: u64 = 0;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It may yet take effect.
    Open,
    /// It took effect before this.
    Done(Moment),
    /// If it took effect, then before this.
    Perhaps(Moment),
}

#[derive(Debug, Clone)]
struct Candidate {
    write: u64,
    value: u64,
    began: Moment,
    fate: Fate,
    /// Reads that begin after this cannot see it.
    hidden: Option<Moment>,
    /// Not even a power cut brings it back.
    gone: bool,
}

impl Candidate {
    /// It can take no effect after this.
    fn settled(&self) -> Option<Moment> {
        match self.fate {
            Fate::Open => None,
            Fate::Done(at) | Fate::Perhaps(at) => Some(at),
        }
    }

    fn may_be_seen(&self, began: Moment) -> bool {
        self.hidden.is_none_or(|hidden| began < hidden)
    }
}

/// A content that is not allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forbidden {
    /// The block.
    pub lba: u64,
    /// The write whose content it has.
    pub found: u64,
    /// Those whose content it might have.
    pub allowed: Vec<u64>,
}

/// See the module. A value names the content of a block; each write has a value of its own, but all
/// that write zeroes have [`ZEROES`].
#[derive(Debug)]
pub struct ModelDisk {
    blocks: Vec<Vec<Candidate>>,
    /// Acknowledged writes may be lost with the power.
    volatile: bool,
    now: Moment,
}

impl ModelDisk {
    /// A disk of zeroes.
    pub fn new(blocks: usize, volatile: bool) -> Self {
        let zeroes = Candidate {
            write: 0,
            value: ZEROES,
            began: 0,
            fate: Fate::Done(0),
            hidden: None,
            gone: false,
        };
        Self {
            blocks: vec![vec![zeroes]; blocks],
            volatile,
            now: 1,
        }
    }

    /// The present; every call is a moment of its own.
    pub fn now(&mut self) -> Moment {
        self.now += 1;
        self.now
    }

    fn range(&mut self, lba: u64, count: u32) -> &mut [Vec<Candidate>] {
        let start = (lba as usize).min(self.blocks.len());
        let end = (start + count as usize).min(self.blocks.len());
        &mut self.blocks[start..end]
    }

    /// A write (its number never used before, and not 0) begins.
    pub fn begin(&mut self, write: u64, value: u64, lba: u64, count: u32) {
        let began = self.now();
        for block in self.range(lba, count) {
            block.push(Candidate {
                write,
                value,
                began,
                fate: Fate::Open,
                hidden: None,
                gone: false,
            });
        }
    }

    /// It was acknowledged; `durable` when it was one with force unit access.
    pub fn done(&mut self, write: u64, lba: u64, count: u32, durable: bool) {
        let now = self.now();
        let durable = durable || !self.volatile;
        for block in self.range(lba, count) {
            let Some(own) = block.iter_mut().find(|it| it.write == write) else {
                continue;
            };
            own.fate = Fate::Done(now);
            let began = own.began;
            for older in older_than(block, began) {
                older.hidden.get_or_insert(now);
                older.gone |= durable;
            }
        }
    }

    /// It was answered with an error.
    pub fn failed(&mut self, write: u64, lba: u64, count: u32) {
        let now = self.now();
        for block in self.range(lba, count) {
            for own in block.iter_mut().filter(|it| it.write == write) {
                own.fate = Fate::Perhaps(now);
            }
        }
    }

    /// A flush that began then was acknowledged: whatever was acknowledged before it stays.
    pub fn flushed(&mut self, flush_began: Moment) {
        for block in &mut self.blocks {
            let durable = block.iter().filter_map(|it| match it.fate {
                Fate::Done(at) if at < flush_began => Some(it.began),
                _ => None,
            });
            if let Some(began) = durable.max() {
                for older in older_than(block, began) {
                    older.gone = true;
                }
            }
        }
    }

    /// Writes with lower numbers than `before` take no effect any more: the controller that might
    /// still have done them is no more.
    pub fn settle(&mut self, before: u64) {
        let now = self.now();
        for candidate in self.blocks.iter_mut().flatten() {
            if candidate.fate == Fate::Open && candidate.write < before {
                candidate.fate = Fate::Perhaps(now);
            }
        }
    }

    /// Power is gone and back: what was acknowledged and not made durable may be undone.
    pub fn power_cut(&mut self) {
        self.settle(u64::MAX);
        if self.volatile {
            for candidate in self.blocks.iter_mut().flatten().filter(|it| !it.gone) {
                candidate.hidden = None;
                // It may be undone, and then no flush makes it last.
                if let Fate::Done(at) = candidate.fate {
                    candidate.fate = Fate::Perhaps(at);
                }
            }
        }
    }

    /// A read, or a successful compare, that began then returned these values.
    ///
    /// # Errors
    /// The first that is not allowed.
    pub fn read(&mut self, lba: u64, values: &[u64], began: Moment) -> Result<(), Forbidden> {
        let now = self.now();
        for ((at, block), &value) in (lba..)
            .zip(self.range(lba, values.len() as u32))
            .zip(values)
        {
            let seen: Vec<usize> = (0..block.len())
                .filter(|&i| block[i].value == value && block[i].may_be_seen(began))
                .collect();
            match seen[..] {
                [] => {
                    let visible = block.iter().filter(|it| it.may_be_seen(began));
                    return Err(Forbidden {
                        lba: at,
                        found: value,
                        allowed: visible.map(|it| it.value).collect(),
                    });
                }
                // What was settled before the read, and is not what it returned, is overwritten.
                [only] => {
                    for (i, other) in block.iter_mut().enumerate() {
                        if i != only && other.settled().is_some_and(|at| at < began) {
                            other.hidden.get_or_insert(now);
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// What a block most likely holds.
    pub fn likely(&self, lba: u64) -> u64 {
        let block = self.blocks.get(lba as usize);
        let visible = block.into_iter().flatten().rev();
        let mut visible = visible.filter(|it| it.hidden.is_none() && it.fate != Fate::Open);
        visible.next().map_or(ZEROES, |it| it.value)
    }

    /// A compare with these values that began then may have failed: some block may differ.
    pub fn may_differ(&mut self, lba: u64, values: &[u64], began: Moment) -> bool {
        let blocks = self.range(lba, values.len() as u32);
        blocks.iter().zip(values).any(|(block, value)| {
            block
                .iter()
                .any(|it| it.value != *value && it.may_be_seen(began))
        })
    }
}

/// Those that can take no effect after this.
fn older_than(block: &mut [Candidate], began: Moment) -> impl Iterator<Item = &mut Candidate> {
    let settled = move |it: &&mut Candidate| it.settled().is_some_and(|at| at < began);
    block.iter_mut().filter(settled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(disk: &ModelDisk, value: u64) -> bool {
        let mut disk = ModelDisk {
            blocks: disk.blocks.clone(),
            ..*disk
        };
        let began = disk.now();
        disk.read(0, &[value], began).is_ok()
    }

    fn write(disk: &mut ModelDisk, value: u64, durable: bool) {
        disk.begin(value, value, 0, 1);
        disk.done(value, 0, 1, durable);
    }

    #[test]
    fn an_acknowledged_write_is_all_that_may_be_read() {
        let mut disk = ModelDisk::new(1, false);
        assert!(allowed(&disk, ZEROES) && !allowed(&disk, 1));
        write(&mut disk, 1, false);
        assert!(allowed(&disk, 1) && !allowed(&disk, ZEROES));
    }

    #[test]
    fn concurrent_writes_may_end_either_way_until_a_read_tells() {
        let mut disk = ModelDisk::new(1, false);
        disk.begin(1, 1, 0, 1);
        disk.begin(2, 2, 0, 1);
        disk.done(2, 0, 1, false);
        disk.done(1, 0, 1, false);
        assert!(allowed(&disk, 1) && allowed(&disk, 2) && !allowed(&disk, ZEROES));
        let began = disk.now();
        assert!(disk.read(0, &[1], began).is_ok());
        assert!(allowed(&disk, 1) && !allowed(&disk, 2));
    }

    #[test]
    fn a_read_may_return_what_was_there_when_it_began() {
        let mut disk = ModelDisk::new(1, false);
        write(&mut disk, 1, false);
        let began = disk.now();
        write(&mut disk, 2, false);
        assert!(disk.read(0, &[1], began).is_ok());
        assert!(disk.read(0, &[ZEROES], began).is_err());
        assert!(!allowed(&disk, 1));
    }

    #[test]
    fn a_failed_write_leaves_old_or_new_and_a_lost_one_may_come_late() {
        let mut disk = ModelDisk::new(1, false);
        write(&mut disk, 1, false);
        disk.begin(2, 2, 0, 1);
        disk.failed(2, 0, 1);
        assert!(allowed(&disk, 1) && allowed(&disk, 2));
        disk.begin(3, 3, 0, 1);
        write(&mut disk, 4, false);
        assert!(allowed(&disk, 3) && allowed(&disk, 4) && !allowed(&disk, 2));
        let began = disk.now();
        assert!(disk.read(0, &[4], began).is_ok());
        assert!(allowed(&disk, 3), "it is still open");
        disk.settle(4);
        let began = disk.now();
        assert!(disk.read(0, &[4], began).is_ok());
        assert!(!allowed(&disk, 3));
    }

    #[test]
    fn a_power_cut_undoes_what_was_not_flushed_and_nothing_else() {
        let mut disk = ModelDisk::new(1, true);
        write(&mut disk, 1, false);
        let began = disk.now();
        disk.flushed(began);
        write(&mut disk, 2, false);
        write(&mut disk, 3, false);
        assert!(!allowed(&disk, 2));
        disk.power_cut();
        for value in [1, 2, 3] {
            assert!(allowed(&disk, value), "{value}");
        }
        assert!(!allowed(&disk, ZEROES));
        write(&mut disk, 4, true);
        disk.power_cut();
        assert!(allowed(&disk, 4) && !allowed(&disk, 3));
    }

    #[test]
    fn a_flush_covers_only_what_was_acknowledged_before_it_began() {
        let mut disk = ModelDisk::new(1, true);
        disk.begin(1, 1, 0, 1);
        let began = disk.now();
        disk.done(1, 0, 1, false);
        disk.flushed(began);
        disk.power_cut();
        assert!(allowed(&disk, ZEROES) && allowed(&disk, 1));
    }

    #[test]
    fn what_a_power_cut_undid_is_made_durable_by_no_later_flush() {
        let mut disk = ModelDisk::new(1, true);
        write(&mut disk, 1, true);
        write(&mut disk, 2, false);
        disk.power_cut();
        let began = disk.now();
        disk.flushed(began);
        disk.power_cut();
        assert!(allowed(&disk, 1) && allowed(&disk, 2) && !allowed(&disk, ZEROES));
    }

    #[test]
    fn a_compare_may_fail_only_where_something_else_may_be() {
        let mut disk = ModelDisk::new(2, false);
        write(&mut disk, 1, false);
        let began = disk.now();
        assert!(!disk.may_differ(0, &[1, ZEROES], began));
        assert!(disk.may_differ(0, &[1, 1], began));
    }
}
