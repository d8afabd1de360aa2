//! Marks in a log, and a migration by model: whatever is not marked is not copied, and is missed at the end.

use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;
use crate::blk::request::BlkStatus;
use crate::guest::{
    EVENT_IDX, Guest, REGION, REGIONS, features, header, into, memfd, options, out, spec,
};
use crate::queue::{Queue, QueueUpdate, Request};
use crate::{Device, Token};

const PAGE_LEN: usize = PAGE as usize;

/// A bitmap in a file of its own, `offset` bytes from its start.
fn log(bytes: u64, offset: u64) -> (File, DirtyLog) {
    let file = memfd(offset + bytes);
    let log = DirtyLog::map(&file, bytes, offset).expect("a log");
    (file, log)
}

fn bits(file: &File, offset: u64, bytes: usize) -> Vec<u8> {
    let mut bits = vec![0; bytes];
    file.read_exact_at(&mut bits, offset).expect("the log");
    bits
}

#[test]
fn a_page_is_marked_by_its_first_and_by_its_last_byte() {
    let (file, log) = log(4, 0);
    assert!(log.mark(PAGE - 1, 1));
    assert!(log.mark(3 * PAGE, 1));
    assert!(log.mark(9 * PAGE - 1, 2));
    assert_eq!(bits(&file, 0, 4), [0b0000_1001, 0b0000_0011, 0, 0]);
    assert!(log.mark(5 * PAGE, 0), "nothing is nothing");
    assert!(log.mark(14 * PAGE + 7, 12 * PAGE));
    assert_eq!(
        bits(&file, 0, 4),
        [0b0000_1001, 0b1100_0011, 0xff, 0b0000_0111]
    );
}

#[test]
fn a_log_may_begin_anywhere_in_its_file_and_nothing_around_it_is_touched() {
    let file = memfd(3 * PAGE);
    let log = DirtyLog::map(&file, 5, PAGE + 123).expect("a log");
    assert!(log.mark(0, 40 * PAGE));
    assert_eq!(bits(&file, PAGE + 122, 7), [0, 255, 255, 255, 255, 255, 0]);
}

#[test]
fn a_mark_beyond_the_log_is_left_out_and_told() {
    let (file, log) = log(2, 8);
    assert!(!log.mark(15 * PAGE, 2 * PAGE));
    assert!(!log.mark(16 * PAGE, 1));
    assert!(!log.mark(u64::MAX - 1, 2));
    assert!(!log.mark(u64::MAX, u64::MAX));
    assert_eq!(bits(&file, 0, 10), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0b1000_0000]);
}

#[test]
fn a_log_that_its_file_does_not_hold_is_refused() {
    let file = memfd(PAGE);
    for (bytes, offset) in [(PAGE + 1, 0), (1, PAGE), (0, 0), (u64::MAX, 1)] {
        assert!(
            DirtyLog::map(&file, bytes, offset).is_err(),
            "{bytes} {offset}"
        );
    }
}

#[test]
fn memory_of_ours_is_the_guest_s_again_across_regions_and_not_outside() {
    let guest = Guest::new();
    for region in REGIONS {
        let mapped = guest.map.slice(region + 100, 50).expect("inside");
        let host = mapped.ptr_guard().as_ptr().addr();
        let ranges: Vec<_> = guest.map.guest_ranges(host, 50).collect();
        assert_eq!(ranges, [(region + 100, 50)]);
        // Beyond its end is another region, or nothing.
        let all: Vec<_> = guest.map.guest_ranges(host, 2 * REGION as usize).collect();
        assert_eq!(all[0], (region + 100, REGION - 100));
    }
    assert_eq!(guest.map.guest_ranges(1, 1).count(), 0);
}

#[test]
fn writes_to_a_used_ring_are_marked_where_they_are_logged() {
    const SIZE: u16 = 1024;
    let (file, log) = log(8, 0);
    let ring = RingLog {
        log: Arc::new(log),
        data: false,
        used: Some(8 * PAGE - 4),
        call: None,
        complaints: Arc::default(),
    };
    let marked = || {
        let marks = bits(&file, 0, 8);
        file.write_all_at(&[0; 8], 0).expect("cleared");
        let pages = (0..64).filter(|page| marks[page / 8] >> (page % 8) & 1 != 0);
        pages.collect::<Vec<_>>()
    };
    ring.published();
    assert_eq!(marked(), [7]);
    // The index is that behind the element. The first is right behind the page's end, and 512 fill a page.
    for (staged, page) in [(1, 8), (512, 8), (513, 9), (1024, 9), (1025, 8), (0, 9)] {
        ring.staged(staged, SIZE);
        assert_eq!(marked(), [page], "{staged}");
    }
    ring.notified(false, SIZE);
    assert_eq!(marked(), [7]);
    ring.notified(true, SIZE);
    assert_eq!(marked(), [10]);
    ring.wrote(0, 10 * PAGE);
    assert_eq!(marked(), [0; 0], "data is not logged");
}

/// What happens next; numbers choose among what there is.
#[derive(Debug, Clone)]
enum Step {
    /// A request: its kind, and where its data and status are.
    Post(u8, u64, u64, u64),
    Take,
    /// Something arrives in the memory of a read.
    Arrive(usize, usize, usize, u8),
    Finish(usize, BlkStatus),
    Flush,
    Rearm,
    /// The front-end copies what is marked.
    Copy,
    /// The last region goes, or comes back.
    Unplug,
    /// The migration is cancelled, and another one begins.
    Again,
    /// The front-end shares another log.
    Swap,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let status = prop_oneof![Just(BlkStatus::Ok), Just(BlkStatus::IoError)];
    let step = prop_oneof![
        6 => (0..6_u8, 0..0x1_7000_u64, 1..20_u64, 0..0xffff_u64)
            .prop_map(|(kind, at, sectors, status)| Step::Post(kind, at, sectors, status)),
        5 => Just(Step::Take),
        6 => (any::<usize>(), any::<usize>(), 1..9000_usize, any::<u8>())
            .prop_map(|(which, at, len, byte)| Step::Arrive(which, at, len, byte)),
        5 => (any::<usize>(), status).prop_map(|(which, status)| Step::Finish(which, status)),
        3 => Just(Step::Flush),
        2 => Just(Step::Rearm),
        3 => Just(Step::Copy),
        1 => Just(Step::Unplug),
        1 => Just(Step::Again),
        1 => Just(Step::Swap),
    ];
    prop::collection::vec(step, 1..120)
}

/// A guest, its device, and the front-end that migrates it.
struct Migration {
    guest: Guest,
    queue: Queue,
    requests: Vec<Request>,
    /// Requests posted and not taken.
    offered: usize,
    unplugged: bool,
    log: File,
    /// What has been copied of each region.
    copy: Vec<Vec<u8>>,
    logging: bool,
    /// Where the used ring is.
    used: u64,
}

/// Used rings on one page, with pages that begin behind the index, between elements, and behind them.
const USED: [u64; 4] = [0x2000, 0x2ffc, 0x2fc4, 0x2f7c];
const LOG_BYTES: usize = 34;

impl Migration {
    fn new(event_idx: bool, used: u64) -> Self {
        let guest = Guest::new();
        let device = Device::new(options());
        let mut setup = Guest::setup(&device, &guest.map);
        let without: &[u32] = if event_idx { &[] } else { &[EVENT_IDX] };
        setup.features = features(&device, without);
        setup.addresses.used = used;
        let mut migration = Self {
            queue: Queue::new(setup).expect("a ring"),
            guest,
            requests: Vec::new(),
            offered: 0,
            unplugged: false,
            log: memfd(1),
            copy: Vec::new(),
            logging: false,
            used,
        };
        migration.begin();
        migration
    }

    fn memory(&self) -> Vec<Vec<u8>> {
        let len = usize::try_from(REGION).expect("small");
        REGIONS.map(|region| self.guest.read(region, len)).to_vec()
    }

    fn set_log(&mut self, on: bool) {
        let (file, log) = log(LOG_BYTES as u64, 4000);
        let ring = RingLog {
            log: Arc::new(log),
            data: true,
            used: Some(self.used),
            call: None,
            complaints: Arc::default(),
        };
        self.queue.apply(QueueUpdate::Log(on.then_some(ring)));
        self.log = file;
        self.logging = on;
    }

    /// Everything is copied once; from then on only what is marked.
    fn begin(&mut self) {
        self.set_log(true);
        self.copy = self.memory();
    }

    /// Does what the guest does: the front-end knows of its writes by other means.
    fn by_guest(&mut self, act: impl FnOnce(&mut Guest)) {
        let before = self.memory();
        act(&mut self.guest);
        let after = self.memory();
        for ((copy, before), after) in self.copy.iter_mut().zip(before).zip(after) {
            let pages = before.chunks(PAGE_LEN).zip(after.chunks(PAGE_LEN));
            for (copy, (before, after)) in copy.chunks_mut(PAGE_LEN).zip(pages) {
                if before == after {
                    continue;
                }
                for ((copy, before), after) in copy.iter_mut().zip(before).zip(after) {
                    if before != after {
                        *copy = *after;
                    }
                }
            }
        }
    }

    fn copy_marked(&mut self) {
        let marks = bits(&self.log, 4000, LOG_BYTES);
        self.log
            .write_all_at(&[0; LOG_BYTES], 4000)
            .expect("cleared");
        for (page, _) in (0..LOG_BYTES * 8)
            .zip(0_u64..)
            .filter(|(page, _)| marks[page / 8] >> (page % 8) & 1 != 0)
        {
            let addr = page as u64 * PAGE;
            let region = REGIONS
                .iter()
                .position(|start| (*start..start + REGION).contains(&addr));
            let region = region.expect("only memory is marked");
            let at = usize::try_from(addr - REGIONS[region]).expect("small");
            let bytes = self.guest.read(addr, PAGE_LEN);
            self.copy[region][at..at + PAGE_LEN].copy_from_slice(&bytes);
        }
    }

    fn post(&mut self, kind: u8, at: u64, sectors: u64, status: u64) {
        // Behind the rings and headers, in the first two regions or in the last.
        let place = |at: u64| match 0x8000 + at {
            low if low < 2 * REGION => low,
            high => REGIONS[2] + (high - 2 * REGION),
        };
        let len = u32::try_from(sectors * 512).expect("small");
        let end = if at < 0x1_8000 - 0x2800 { at } else { 0x1_8000 };
        let (data, status) = (place(end), (place(status), 1));
        let header_at = 0x4000 + 16 * u64::from(self.guest.avail_idx % 64);
        let (number, data) = match kind {
            0..3 => (0, vec![into(data, len)]),
            3 => (8, vec![into(data, 20)]),
            4 => (4711, vec![into(data, len)]),
            _ => (4, vec![]),
        };
        self.by_guest(|guest| {
            guest.write(header_at, &header(number, 0));
            let mut chain = vec![out(header_at, 16)];
            chain.extend(data);
            chain.push(into(status.0, status.1));
            guest.post(&chain);
        });
        self.offered += 1;
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Post(kind, at, sectors, status) => {
                if self.offered < 4 && self.requests.len() < 8 {
                    self.post(kind, at, sectors, status);
                }
            }
            Step::Take => {
                while let Ok(Some(request)) = self.queue.take(&mut Vec::new) {
                    self.requests.push(request);
                }
                self.queue.flush();
                if !self.unplugged {
                    self.offered = 0;
                }
            }
            Step::Arrive(which, at, len, byte) => {
                let count = self.requests.len().max(1);
                if let Some(Request {
                    operation: Operation::Read { sink, .. },
                    ..
                }) = self.requests.get_mut(which % count)
                {
                    let at = at % sink.len();
                    let end = sink.len().min(at + len);
                    sink.fill(at..end, byte).expect("inside");
                }
            }
            Step::Finish(which, status) => {
                if !self.requests.is_empty() {
                    let which = which % self.requests.len();
                    let Request {
                        token, operation, ..
                    } = self.requests.swap_remove(which);
                    self.finish(token, &operation, status);
                }
            }
            Step::Flush => drop(self.queue.flush()),
            Step::Rearm => drop(self.queue.rearm()),
            Step::Copy if self.logging => self.copy_marked(),
            Step::Copy => {}
            Step::Unplug => {
                let last = spec(REGIONS[2]);
                self.unplugged = !self.unplugged;
                let map = match self.unplugged {
                    true => self.guest.map.without(last).expect("there"),
                    false => crate::guest::map_of(&self.guest.files),
                };
                self.queue.apply(QueueUpdate::Memory(Arc::new(map)));
            }
            Step::Again => match self.logging {
                true => self.set_log(false),
                false => self.begin(),
            },
            Step::Swap if self.logging => {
                let before = self.log.try_clone().expect("a descriptor");
                self.set_log(true);
                // What was marked in the one before is copied after it was replaced.
                let now = std::mem::replace(&mut self.log, before);
                self.copy_marked();
                self.log = now;
            }
            Step::Swap => {}
        }
    }

    fn finish(&mut self, token: Token, operation: &Operation, status: BlkStatus) {
        self.queue.finish(token, operation, status);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_copy_of_what_is_marked_is_what_the_guest_has_at_the_end(
        steps in steps(),
        event_idx: bool,
        used in prop::sample::select(USED.to_vec()),
    ) {
        let mut migration = Migration::new(event_idx, used);
        for step in steps {
            migration.run(step);
        }
        if !migration.logging {
            migration.begin();
        }
        for Request { token, operation, .. } in std::mem::take(&mut migration.requests) {
            migration.finish(token, &operation, BlkStatus::Ok);
        }
        migration.queue.flush();
        migration.copy_marked();
        for (copy, memory) in migration.copy.iter().zip(migration.memory()) {
            let pages = copy.chunks(PAGE_LEN).zip(memory.chunks(PAGE_LEN));
            let missed = pages.map(|(copy, memory)| copy != memory).position(|missed| missed);
            prop_assert_eq!(missed, None, "a page that nobody copied");
        }
    }
}
