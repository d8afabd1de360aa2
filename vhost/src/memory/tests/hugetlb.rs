//! Memory in huge pages: regions of files on a hugetlbfs, which only root can mount.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::*;

const POOL: &str = "/proc/sys/vm/nr_hugepages";
const HUGE: u64 = 2 << 20;

/// A hugetlbfs of 2-MiB pages with room for four, unmounted when dropped.
struct HugePages {
    directory: TempDir,
    pool: String,
}

impl HugePages {
    /// `None`, and why is printed, where it cannot be had.
    fn mount() -> Option<Self> {
        let skip = |why: &str| {
            eprintln!("SKIPPED: memory in huge pages: {why}");
            None
        };
        let Ok(pool) = fs::read_to_string(POOL) else {
            return skip("the kernel has no pool of them");
        };
        let before: u64 = pool.trim().parse().unwrap_or(0);
        if fs::write(POOL, format!("{}", before + 4)).is_err() {
            return skip("it takes root to reserve some");
        }
        let directory = TempDir::new().expect("a directory");
        let mut mount = Command::new("mount");
        mount.args(["-t", "hugetlbfs", "-o", "pagesize=2M", "none"]);
        let mounted = mount.arg(directory.as_path()).status();
        let this = Self { directory, pool };
        if !mounted.is_ok_and(|status| status.success()) {
            return skip("a hugetlbfs cannot be mounted");
        }
        let reserved = fs::read_to_string(POOL).unwrap_or_default();
        if reserved.trim().parse().unwrap_or(0) < before + 4 {
            return skip("there is too little memory in one piece");
        }
        Some(this)
    }

    fn path(&self) -> &Path {
        self.directory.as_path()
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // Our mappings do not hold the mount, since the files are closed.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
        let _ = fs::write(POOL, &self.pool);
    }
}

#[test]
fn regions_of_files_in_huge_pages_may_start_and_end_anywhere() {
    let Some(pages) = HugePages::mount() else {
        return;
    };
    let path = pages.path().join("guest");
    let file = File::create_new(path).expect("a file");
    file.set_len(4 * HUGE).expect("a size");
    // Neither the offset nor the length is a multiple of a huge page.
    let odd = one(HUGE + 0x3000, HUGE / 2 + 0x1000);
    let map = GuestMap::default().with(odd, &file).expect("mapped");
    let last = odd.guest_addr + odd.size - 4;
    map.write_slice(b"last", GuestAddress(last)).expect("in it");
    assert!(map.write_slice(b"!", GuestAddress(last + 4)).is_err());
    let whole = one(4 * HUGE, 0);
    let whole = GuestMap::default().with(whole, &file).expect("mapped");
    let mut bytes = [0; 4];
    let at = 0x1000 + odd.file_offset + odd.size - 4;
    whole
        .read_slice(&mut bytes, GuestAddress(at))
        .expect("in it");
    assert_eq!(&bytes, b"last");
}
