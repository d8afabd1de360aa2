//! Regions: where they may lie, which are refused, and who unmaps them.

use rustix::fs::{SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::Bytes;
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::guest::{Guest, REGION, REGIONS, memfd, spec};

mod hugetlb;

/// One region from 0x1000 on.
fn one(size: u64, file_offset: u64) -> RegionSpec {
    RegionSpec {
        guest_addr: 0x1000,
        user_addr: 0x5000,
        size,
        file_offset,
    }
}

fn clone(file: &File) -> File {
    file.try_clone().expect("clone")
}

fn base_of(map: &GuestMap, addr: u64) -> *mut u8 {
    map.slice(addr, 1).expect("mapped").ptr_guard_mut().as_ptr()
}

#[test]
fn a_region_may_start_anywhere_in_its_file() {
    let file = memfd(0x10_0000);
    let spec = RegionSpec {
        guest_addr: 0x1000,
        user_addr: 0x5000,
        size: 0x1234,
        file_offset: 0x2345,
    };
    let map = GuestMap::default()
        .replaced(vec![(spec, file.try_clone().expect("clone"))])
        .expect("map");
    assert_eq!(map.table().last_addr().0, 0x2233);
    map.write_slice(b"hello", GuestAddress(0x1000))
        .expect("inside");
    let mut bytes = [0; 5];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0x2345).expect("read");
    assert_eq!(&bytes, b"hello");
    assert_eq!(map.guest_addr(0x5000), Some(0x1000));
    assert_eq!(map.guest_addr(0x6233), Some(0x2233));
    assert_eq!(map.guest_addr(0x6234), None);
}

#[test]
fn bad_regions_are_refused() {
    let guest = Guest::new();
    let add = |spec| guest.map.with(spec, &memfd(REGION)).err();
    let free = RegionSpec {
        guest_addr: 0x20_0000,
        ..spec(0x20_0000)
    };
    let overlap = RegionSpec {
        guest_addr: REGIONS[2] + REGION - 1,
        ..free
    };
    assert!(matches!(add(overlap), Some(MemoryError::Overlap(..))));
    let same_user = RegionSpec {
        user_addr: spec(0).user_addr + 1,
        ..free
    };
    assert!(matches!(add(same_user), Some(MemoryError::Overlap(..))));
    let long = RegionSpec {
        size: REGION + 1,
        ..free
    };
    assert!(matches!(add(long), Some(MemoryError::PastEndOfFile(..))));
    for bad in [
        RegionSpec { size: 0, ..free },
        RegionSpec {
            size: u64::MAX,
            ..free
        },
        RegionSpec {
            file_offset: u64::MAX,
            ..free
        },
    ] {
        assert!(matches!(add(bad), Some(MemoryError::Range(..))), "{bad:?}");
    }
    assert!(add(free).is_none());
    assert!(matches!(
        guest.map.without(free),
        Err(MemoryError::NoSuchRegion(..))
    ));
    let other_user = RegionSpec {
        user_addr: 1,
        ..spec(0)
    };
    assert!(guest.map.without(other_user).is_err());
    let other_offset = RegionSpec {
        file_offset: 0x1000,
        ..spec(0)
    };
    assert_eq!(
        guest.map.without(other_offset).expect("removed").regions(),
        2
    );
}

#[test]
fn any_file_that_can_be_written_will_do_and_no_other() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.as_path().join("memory");
    let plain = File::create_new(&path).expect("a file");
    let read_only = File::open(&path).expect("a file");
    let write_only = File::options().write(true).open(&path);
    let write_only = write_only.expect("a file");
    plain.set_len(0x4000).expect("a size");
    let map = GuestMap::default().with(one(0x3000, 0x800), &plain);
    let map = map.expect("a file of a file system");
    map.write_slice(b"kept", GuestAddress(0x1800))
        .expect("inside");
    drop(map);
    assert_eq!(
        std::fs::read(&path).expect("read")[0x1000..0x1004],
        *b"kept"
    );
    // A mapping of those would fail at the first answer, or at the first request.
    let sealed = memfd_create("guest", rustix::fs::MemfdFlags::ALLOW_SEALING).expect("memfd");
    let sealed = File::from(sealed);
    sealed.set_len(0x4000).expect("a size");
    fcntl_add_seals(&sealed, SealFlags::WRITE).expect("a seal");
    let (pipe, _writer) = std::io::pipe().expect("a pipe");
    let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
    for (what, file) in [
        ("read-only", read_only),
        ("write-only", write_only),
        ("sealed", sealed),
        ("a pipe", pipe),
    ] {
        let refused = GuestMap::default().with(one(0x3000, 0), &file).err();
        assert!(
            matches!(refused, Some(MemoryError::Map(0x1000, 0x3000, _))),
            "{what}: {refused:?}"
        );
    }
    plain.set_len(0x3000).expect("a size");
    let short = GuestMap::default().with(one(0x3000, 0x800), &plain).err();
    assert!(
        matches!(short, Some(MemoryError::PastEndOfFile(..))),
        "{short:?}"
    );
}

#[test]
fn a_new_table_maps_only_what_the_old_one_does_not_have() {
    let guest = Guest::new();
    let other = memfd(2 * REGION);
    let table = |last: RegionSpec, file: &File| {
        let specs = [spec(REGIONS[0]), spec(REGIONS[1]), last];
        let files = [&guest.files[0], &guest.files[1], file].map(clone);
        specs.into_iter().zip(files).collect::<Vec<_>>()
    };
    let last = spec(REGIONS[2]);
    let same = guest.map.replaced(table(last, &guest.files[2]));
    let same = same.expect("the same table");
    for addr in REGIONS {
        assert_eq!(base_of(&same, addr), base_of(&guest.map, addr));
    }
    // Another file, another part of it, another size, another address of the front-end's.
    let moved = RegionSpec {
        file_offset: 0x1000,
        ..last
    };
    let smaller = RegionSpec {
        size: REGION / 2,
        ..last
    };
    let elsewhere = RegionSpec {
        user_addr: last.user_addr + REGION,
        ..last
    };
    for (changed, file) in [
        (last, &other),
        (moved, &other),
        (smaller, &guest.files[2]),
        (elsewhere, &guest.files[2]),
    ] {
        let map = guest.map.replaced(table(changed, file)).expect("a table");
        assert_eq!(base_of(&map, 0), base_of(&guest.map, 0));
        assert_ne!(
            base_of(&map, REGIONS[2]),
            base_of(&guest.map, REGIONS[2]),
            "{changed:?}"
        );
    }
    // A file that has become too short is refused, mapped or not.
    guest.files[2].set_len(REGION - 1).expect("a size");
    let short = guest.map.replaced(table(last, &guest.files[2])).err();
    assert!(matches!(short, Some(MemoryError::PastEndOfFile(..))));
}

#[test]
fn whoever_drops_the_last_generation_does_not_unmap() {
    // No other test maps as many bytes.
    const SIZE: usize = 0x7b_3000;
    let map = GuestMap::default().with(one(SIZE as u64, 0), &memfd(SIZE as u64));
    let map = map.expect("mapped");
    let newer = map.without(one(SIZE as u64, 0)).expect("removed");
    assert_eq!(newer.regions(), 0);
    let worker = std::thread::Builder::new().name("worker".to_owned());
    let worker = worker.spawn(move || drop(map)).expect("a thread");
    worker.join().expect("no panic");
    let thread = unmap::thread_that_unmapped(SIZE);
    assert_eq!(thread.as_deref(), Some("unmap"));
}
