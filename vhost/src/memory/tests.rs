//! Regions: where they may lie, and which are refused.

use vm_memory::Bytes;

use super::*;
use crate::guest::{Guest, REGION, REGIONS, memfd, spec};

#[test]
fn a_region_may_start_anywhere_in_its_file() {
    let file = memfd(0x10_0000);
    let spec = RegionSpec {
        guest_addr: 0x1000,
        user_addr: 0x5000,
        size: 0x1234,
        file_offset: 0x2345,
    };
    let map = GuestMap::default().replaced(vec![(spec, file.try_clone().expect("clone"))]).expect("map");
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
