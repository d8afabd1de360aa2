//! A guest that moves shortly after its disk lost a controller: what that still writes undoes nothing that the guest has
//! written elsewhere.

use std::thread;
use std::time::{Duration, Instant};

use vhost::VhostBackend;

use crate::daemons::{Attach, Export};
use crate::front_end::{DATA, OK, kind};
use crate::migration::{Migrating, RINGS, negotiate, save, start};
use crate::outages::{FENCED, QUICK, WHILE};
use crate::proxy::Proxy;
use crate::ring::out;

/// The first write that a target gets is carried out so late, whatever became of its host.
const LATE: Duration = Duration::from_millis(1200);
const BEGUN: &str = "writes that were lost with a controller may still be carried out: the guest does not go on elsewhere \
                     before that is over";
const OVER: &str = "no write can be late any more";
const OUTLASTED: &str = "the guest may go on elsewhere while writes that were lost with a controller may still be \
                         carried out: keep it paused for that long, or set --drain-timeout to more than three \
                         keep-alive time-outs";

/// A disk that has lost a write with its association, and written it again.
struct Source {
    export: Export,
    disk: Attach,
    moving: Migrating,
    /// The write was sent, and lost.
    sent: Instant,
    lost: Instant,
}

impl Source {
    /// Writes ones to so many sectors from sector 1 on. The front-end logs before, or not at all.
    #[track_caller]
    fn start(args: &[&str], spec: &str, logged: bool, sectors: u32) -> Self {
        let late = LATE.as_millis();
        let slow = format!("{spec},fault=delay={late}ms:write:count=1");
        let export = Export::start_silent(&[&slow]);
        let proxy = Proxy::start(export.address());
        let disk = Attach::start_with(args, &proxy.uri(export.subsystem()));
        let mut moving = Migrating::connect(&disk.socket);
        if logged {
            moving.begin();
        }
        let guest = &mut moving.guest;
        guest.memory.write(DATA, &[1; 4096]);
        guest.add(0, 0, kind::WRITE, 1, &[out(DATA, 512 * sectors)]);
        let sent = Instant::now();
        guest.rings[0].submit();
        thread::sleep(WHILE);
        let lost = Instant::now();
        proxy.cut_hosts_off();
        guest.rings[0].wait(1);
        assert_eq!(guest.status(0, 0), OK);
        assert!(lost.elapsed() < FENCED, "{:?}", lost.elapsed());
        Self {
            export,
            disk,
            moving,
            sent,
            lost,
        }
    }

    /// Stops all rings. Gives where.
    #[track_caller]
    fn stop(&self) -> [u16; RINGS] {
        [0, 1].map(|ring| {
            let base = self.moving.guest.frontend.get_vring_base(ring);
            u16::try_from(base.expect("GET_VRING_BASE")).expect("an index")
        })
    }
}

#[track_caller]
fn the_destinations_write_stays(args: &[&str], spec: &str, sectors: u32) {
    let args = [&QUICK[..], args].concat();
    let mut source = Source::start(&args, spec, true, sectors);
    let destination = Attach::start_with(&args, source.export.uri());
    let bases = source.stop();
    let stopped = source.lost.elapsed();
    let guest = &mut source.moving.guest;
    guest.frontend = negotiate(&destination.socket).0;
    start(guest, bases);
    // One that was written, and one next to it.
    for sector in [1, u64::from(sectors) + 1] {
        assert_eq!(guest.write(1, sector, &[2; 512]), OK);
    }
    thread::sleep((LATE + WHILE).saturating_sub(source.sent.elapsed()));
    for sector in [1, u64::from(sectors) + 1] {
        let (status, read) = guest.read(1, sector, 512);
        assert_eq!(status, OK);
        assert!(read == [2; 512], "sector {sector} was undone");
    }
    assert!(
        stopped >= FENCED,
        "the last ring was back after {stopped:?}"
    );
    let told = [BEGUN, OVER].map(|told| source.disk.process.logged(told).len());
    assert_eq!(told, [1, 1], "{:?}", source.disk.process.stderr());
}

#[test]
fn a_write_that_the_source_lost_does_not_undo_one_of_the_destination() {
    the_destinations_write_stays(&[], "ram:8M", 4);
}

#[test]
fn nor_does_what_it_wrote_around_a_sector() {
    the_destinations_write_stays(&["--emulate-512"], "ram:8M,block-size=4096", 1);
}

#[test]
fn a_ring_that_stops_without_a_migration_does_not_wait() {
    let source = Source::start(&QUICK, "ram:8M", false, 8);
    source.stop();
    let stopped = source.lost.elapsed();
    assert!(stopped < FENCED, "{stopped:?}");
    // Whoever loads the state may be elsewhere.
    let state = save(&source.moving.guest.frontend);
    assert!(!state.is_empty());
    let saved = source.lost.elapsed();
    assert!(saved >= FENCED, "{saved:?}");
    assert_eq!(source.disk.process.logged(OVER).len(), 1);
}

#[test]
fn a_guest_is_kept_no_longer_than_rings_may_take_to_stop_and_its_user_is_told() {
    let args = [
        "--keep-alive-tmo",
        "5",
        "--reconnect-delay",
        "1",
        "--drain-timeout",
        "1",
    ];
    let source = Source::start(&args, "ram:8M", true, 8);
    source.stop();
    let stopped = source.lost.elapsed();
    let most = Duration::from_secs(5);
    assert!(
        stopped >= Duration::from_secs(1) && stopped < most,
        "{stopped:?}"
    );
    let told = source.disk.process.logged(OUTLASTED);
    assert_eq!(told.len(), 1);
    let seconds = told[0]["seconds"].as_u64().expect("how long");
    assert!((8..=15).contains(&seconds), "{seconds}");
}

#[test]
fn a_daemon_that_is_ended_meanwhile_ends_at_once() {
    let args = ["--keep-alive-tmo", "5", "--reconnect-delay", "1"];
    let Source {
        mut disk,
        moving,
        export: _export,
        ..
    } = Source::start(&args, "ram:8M", true, 8);
    thread::scope(|scope| {
        let stopping = scope.spawn(|| {
            for ring in 0..RINGS {
                // The last has no answer, or one that nobody waits for.
                let _ = moving.guest.frontend.get_vring_base(ring);
            }
        });
        disk.process.await_log(|line| line.contains(BEGUN));
        disk.stop();
        stopping.join().expect("no panic");
    });
    assert_eq!(disk.process.logged(OVER).len(), 0);
}
