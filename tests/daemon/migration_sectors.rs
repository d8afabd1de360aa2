//! A guest that moves whose sectors are smaller than the namespace's blocks (`--emulate-512`).

use vhost::VhostBackend;

use crate::daemons::{Attach, Export};
use crate::front_end::{DATA, OK, kind};
use crate::migration::{Migrating, RINGS, a_copy_keeps_up, negotiate, start};
use crate::noise::noise;
use crate::ring::out;

const EMULATE: [&str; 1] = ["--emulate-512"];
const BLOCKS: &str = "ram:16M,block-size=4096";

#[test]
fn what_is_written_for_a_disk_with_small_sectors_is_marked() {
    let export = Export::start(&[BLOCKS]);
    a_copy_keeps_up(&Attach::start_with(&EMULATE, export.uri()));
    a_copy_keeps_up(&Attach::serve(&EMULATE, BLOCKS));
}

#[test]
fn sectors_that_are_written_while_their_guest_moves_are_all_there_and_so_are_those_around() {
    let slow = "fault=delay=1ms-20ms:read,fault=delay=1ms-20ms:write";
    let export = Export::start(&[&format!("{BLOCKS},{slow}")]);
    let disks = [(); 2].map(|()| Attach::start_with(&EMULATE, export.uri()));
    let mut moving = Migrating::connect(&disks[0].socket);
    const SECTORS: u64 = 64;
    let mut disk = noise((SECTORS * 512) as usize, 1);
    assert_eq!(moving.guest.write(0, 0, &disk), OK);
    for round in 1..6_u64 {
        moving.begin();
        let guest = &mut moving.guest;
        // Two or three of the sectors of each block, on either ring; stopping waits for them.
        let sectors: Vec<_> = (round % 3..SECTORS).step_by(3).collect();
        for (slot, &sector) in sectors.iter().enumerate() {
            let at = DATA + 512 * sector;
            let data = noise(512, round << 8 | sector);
            guest.memory.write(at, &data);
            let from = (sector * 512) as usize;
            disk[from..from + 512].copy_from_slice(&data);
            guest.add(
                slot % RINGS,
                slot / RINGS,
                kind::WRITE,
                sector,
                &[out(at, 512)],
            );
        }
        for ring in &mut guest.rings {
            ring.submit();
        }
        let bases = [0, 1].map(|ring| {
            let base = guest.frontend.get_vring_base(ring);
            u16::try_from(base.expect("GET_VRING_BASE")).expect("an index")
        });
        // The ring had some of them when it stopped; the rest is for the next daemon.
        let next = usize::from(round % 2 == 1);
        guest.frontend = negotiate(&disks[next].socket).0;
        start(guest, bases);
        for ring in 0..RINGS {
            let mine = sectors.iter().skip(ring).step_by(RINGS).count();
            guest.rings[ring].wait(mine);
            for slot in 0..mine {
                assert_eq!(guest.status(ring, slot), OK, "round {round}");
            }
        }
        let (status, read) = guest.read(0, 0, disk.len());
        assert_eq!(status, OK);
        let differs = read
            .chunks(512)
            .zip(disk.chunks(512))
            .position(|(a, b)| a != b);
        assert_eq!(
            differs, None,
            "a sector is not what was written, round {round}"
        );
    }
}
