//! Memory that comes, goes and moves while requests run: what is in flight keeps its memory, and nobody
//! waits for what becomes of the rest.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use crate::daemons::{Attach, Export};
use crate::front_end::{DATA, FrontEnd, OK, SECTOR, Setup, kind};
use crate::memory::{memfd, user_addr};
use crate::process::Process;
use crate::ring::{Buffer, into, out};

/// Where memory is plugged in: behind all that the guest has.
pub(crate) const PLUGGED: u64 = 8 << 30;

/// A module of memory that can be plugged in.
pub(crate) struct Module {
    file: File,
    memory: GuestMemoryMmap,
    size: u64,
}

impl Module {
    pub(crate) fn new(size: u64) -> Self {
        let file = memfd(size);
        let clone = FileOffset::new(file.try_clone().expect("a descriptor"), 0);
        let len = usize::try_from(size).expect("64 bits");
        let range = (GuestAddress(PLUGGED), len, Some(clone));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).expect("memory");
        Self { file, memory, size }
    }

    /// As the front-end tells the back-end; `shift` moves what the front-end itself sees of it.
    pub(crate) fn region(&self, shift: u64) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: PLUGGED,
            memory_size: self.size,
            userspace_addr: user_addr(PLUGGED) + shift,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    pub(crate) fn fill(&self, at: u64, len: usize, with: u8) {
        self.memory
            .write_slice(&vec![with; len], GuestAddress(PLUGGED + at))
            .expect("in it");
    }

    #[track_caller]
    pub(crate) fn holds(&self, at: u64, len: usize, what: u8) {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(PLUGGED + at))
            .expect("in it");
        let wrong = bytes.iter().position(|byte| *byte != what);
        assert_eq!(wrong, None, "at {at}, not {what}");
    }
}

const BLOCK: u64 = 4096;

fn piece(slot: u64) -> u64 {
    PLUGGED + BLOCK * slot
}

/// The whole table that the guest has, with the module or without.
fn table(guest: &FrontEnd, module: Option<&Module>, shift: u64) -> Vec<VhostUserMemoryRegionInfo> {
    let mut regions = guest.memory.regions();
    regions.extend(module.map(|module| module.region(shift)));
    regions
}

/// Takes the module away in this way.
type Unplug = fn(&mut FrontEnd, &Module);

const WAYS: [(&str, Unplug); 3] = [
    ("REM_MEM_REG", |guest, module| {
        guest
            .frontend
            .remove_mem_region(&module.region(0))
            .expect("REM_MEM_REG");
    }),
    ("SET_MEM_TABLE without it", |guest, _| {
        let regions = table(guest, None, 0);
        guest
            .frontend
            .set_mem_table(&regions)
            .expect("SET_MEM_TABLE");
    }),
    ("SET_MEM_TABLE with all of it elsewhere", |guest, module| {
        let regions = table(guest, Some(module), 1 << 40);
        guest
            .frontend
            .set_mem_table(&regions)
            .expect("SET_MEM_TABLE");
        guest
            .frontend
            .remove_mem_region(&module.region(1 << 40))
            .expect("REM_MEM_REG");
    }),
];

/// Unplugs the module when eight requests have been taken and none is answered, and waits for them.
#[track_caller]
fn unplug_in_flight(guest: &mut FrontEnd, module: &Module, way: &str, unplug: Unplug) {
    let before = guest.rings[0].used_idx();
    std::thread::sleep(Duration::from_millis(40));
    unplug(guest, module);
    assert_eq!(guest.rings[0].used_idx(), before, "{way}: it waited");
    guest.rings[0].wait(8);
}

#[test]
fn requests_in_flight_keep_memory_that_is_unplugged_or_moved_under_them() {
    // What is read and written arrives long after the memory is gone from the table.
    let export = Export::start(&["ram:8M,fault=delay=150ms:read,fault=delay=150ms:write"]);
    let mut attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    for (number, (way, unplug)) in (1_u8..).zip(WAYS) {
        let module = Module::new(1 << 20);
        guest
            .frontend
            .add_mem_region(&module.region(0))
            .expect("ADD_MEM_REG");
        let len = u32::try_from(BLOCK).expect("small");
        for slot in 0..8 {
            let at = u64::try_from(slot).expect("small");
            module.fill(BLOCK * at, len as usize, number);
            let sector = at * BLOCK / SECTOR;
            guest.add(0, slot, kind::WRITE, sector, &[out(piece(at), len)]);
        }
        guest.rings[0].submit();
        unplug_in_flight(&mut guest, &module, way, unplug);
        guest
            .frontend
            .add_mem_region(&module.region(0))
            .expect("ADD_MEM_REG");
        for slot in 0..8 {
            assert_eq!(guest.status(0, slot), OK, "{way}: write {slot}");
            let at = u64::try_from(slot).expect("small");
            let sector = at * BLOCK / SECTOR;
            guest.add(0, slot, kind::READ, sector, &[into(piece(8 + at), len)]);
        }
        guest.rings[0].submit();
        unplug_in_flight(&mut guest, &module, way, unplug);
        for slot in 0..8 {
            assert_eq!(guest.status(0, slot), OK, "{way}: read {slot}");
        }
        module.holds(8 * BLOCK, 8 * len as usize, number);
    }
    drop(guest);
    attach.stop();
}

#[test]
fn a_request_may_lie_in_two_regions_side_by_side() {
    let export = Export::start(&["ram:8M"]);
    let attach = Attach::start(export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    // Two regions of one file, which meet in the middle of a page.
    let module = Module::new(1 << 20);
    let middle = (512 << 10) + 0x234;
    let part = |start, end| VhostUserMemoryRegionInfo {
        guest_phys_addr: PLUGGED + start,
        memory_size: end - start,
        userspace_addr: user_addr(PLUGGED + start) + start,
        mmap_offset: start,
        mmap_handle: module.file.as_raw_fd(),
    };
    for region in [part(0, middle), part(middle, 1 << 20)] {
        guest.frontend.add_mem_region(&region).expect("ADD_MEM_REG");
    }
    let len = 64 << 10;
    module.fill(0, 1 << 20, 0x33);
    let across = PLUGGED + middle - 3000;
    assert_eq!(guest.run(0, kind::WRITE, 0, &[out(across, len)]), OK);
    module.fill(0, 1 << 20, 0x44);
    assert_eq!(guest.run(0, kind::READ, 0, &[into(across, len)]), OK);
    module.holds(middle - 3000, len as usize, 0x33);
    module.holds(middle - 3001, 1, 0x44);
    module.holds(middle - 3000 + u64::from(len), 1, 0x44);
}

/// Requests of 4 KiB one after the other until `over` says so; the longest.
fn longest(guest: &mut FrontEnd, mut over: impl FnMut() -> bool) -> Duration {
    let mut longest = Duration::ZERO;
    while !over() {
        let began = Instant::now();
        assert_eq!(guest.run(0, kind::READ, 0, &[into(DATA, 4096)]), OK);
        longest = longest.max(began.elapsed());
    }
    longest
}

/// Has the device write to all of the module.
fn touch(guest: &mut FrontEnd, module: &Module) {
    const MIB: u64 = 1 << 20;
    for first in (0..module.size / MIB).step_by(8) {
        for slot in 0..8 {
            let at = PLUGGED + (first + u64::try_from(slot).expect("small")) * MIB;
            let data: [Buffer; 1] = [into(at, u32::try_from(MIB).expect("small"))];
            guest.add(0, slot, kind::READ, 0, &data);
        }
        guest.rings[0].submit();
        guest.rings[0].wait(8);
    }
    assert_eq!(guest.status(0, 7), OK);
}

/// CPU time that the daemon's thread for unmapping has spent in the kernel, in hundredths of a second.
fn unmapping(process: &Process) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.pid()));
    let stats = tasks.expect("a process").flatten().filter_map(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        let (_, fields) = stat.split_once(" (unmap) ")?;
        // State is the third field of all, system time the fifteenth.
        fields.split(' ').nth(12)?.parse::<u64>().ok()
    });
    stats.sum()
}

/// Longest that a request may take while memory is mapped and unmapped. A stall of a second is what a
/// guest's user sees; this test is about far less, but shares its machine with others.
const STALL: Duration = Duration::from_millis(500);

#[test]
fn no_request_waits_while_much_memory_is_unmapped() {
    let gib = std::env::var("MEMORY_GIB").ok();
    let gib: u64 = gib.map_or(1, |gib| gib.parse().expect("GiB"));
    let export = Export::start(&["null:64M"]);
    let mut attach = Attach::start(export.uri());
    let setup = Setup {
        size: 32,
        ..Setup::default()
    };
    let mut guest = FrontEnd::connect_with(&attach.socket, setup);
    let module = Module::new(gib << 30);
    let quiet_until = Instant::now() + Duration::from_millis(300);
    let quiet = longest(&mut guest, || Instant::now() > quiet_until);
    for (way, unplug) in WAYS {
        guest
            .frontend
            .add_mem_region(&module.region(0))
            .expect("ADD_MEM_REG");
        touch(&mut guest, &module);
        let spent = unmapping(&attach.process);
        let mut elsewhere = FrontEnd {
            frontend: guest.frontend.clone(),
            memory: guest.memory.clone(),
            rings: Vec::new(),
            features: guest.features,
        };
        let (swapped, took) = std::thread::scope(|scope| {
            let swap = scope.spawn(|| {
                let began = Instant::now();
                unplug(&mut elsewhere, &module);
                began.elapsed()
            });
            let mut until = None;
            // The unmapping goes on behind the answer.
            let longest = longest(&mut guest, || {
                let now = Instant::now();
                if swap.is_finished() {
                    now > *until.get_or_insert(now + Duration::from_millis(500))
                } else {
                    false
                }
            });
            (longest, swap.join().expect("it swaps"))
        });
        eprintln!(
            "{way}, {gib} GiB touched: answered after {took:?}, longest request {swapped:?} \
             (undisturbed {quiet:?})"
        );
        assert!(swapped < STALL, "{way}: a request took {swapped:?}");
        let spent = unmapping(&attach.process) - spent;
        assert!(spent > 0, "{way}: some other thread unmapped it");
    }
    drop(guest);
    attach.stop();
}
