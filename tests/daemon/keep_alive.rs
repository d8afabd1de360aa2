//! Keep-alive of a disk that is busy and of one that is idle, with controllers that count traffic and others that do not.

use std::thread;
use std::time::{Duration, Instant};

use nvmf::spec::identify::ctratt;

use crate::daemons::{Attach, Export};
use crate::front_end::{FrontEnd, OK};
use crate::outages::QUICK;
use crate::scripted::{Script, Scripted};

const LOST: &str = "association lost";

fn scripted(counts_traffic: bool) -> Scripted {
    Scripted::start(Script {
        controller: counts_traffic
            .then_some(|identity| identity.ctratt = (ctratt::TBKAS | ctratt::HOST_ID_128).into()),
        ..Script::default()
    })
}

/// Reads one after the other for so long.
fn work(guest: &mut FrontEnd, length: Duration) {
    let began = Instant::now();
    while began.elapsed() < length {
        assert_eq!(guest.read(0, 0, 512).0, OK);
        thread::sleep(Duration::from_millis(10));
    }
}

/// Keep Alive commands that came since then.
fn since(controller: &Scripted, begin: Instant) -> usize {
    let all = controller.keep_alives();
    all.iter().filter(|&&at| at > begin).count()
}

#[test]
fn a_busy_disk_sends_keep_alives_where_they_alone_count_and_hardly_any_where_traffic_does() {
    for counts_traffic in [true, false] {
        let controller = scripted(counts_traffic);
        let attach = Attach::start_with(&QUICK, &controller.uri());
        let mut guest = FrontEnd::connect(&attach.socket);
        work(&mut guest, Duration::from_millis(700));
        let begin = Instant::now();
        work(&mut guest, Duration::from_secs(4));
        let sent = since(&controller, begin);
        // A machine that has no time for the disk has it send one.
        let expected = if counts_traffic { 0..=2 } else { 5..=9 };
        assert!(expected.contains(&sent), "{counts_traffic}: {sent}");
        // An idle one is not forgotten.
        let begin = Instant::now();
        thread::sleep(Duration::from_secs(3));
        let sent = since(&controller, begin);
        assert!((4..=7).contains(&sent), "{counts_traffic}: {sent}");
        assert_eq!(attach.process.logged(LOST).len(), 0);
    }
}

#[test]
fn a_target_keeps_a_disk_that_is_busy_idle_and_busy_again() {
    let export = Export::start(&["ram:8M"]);
    let mut attach = Attach::start_with(&QUICK, export.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    for _ in 0..2 {
        // The target gives a host up that is silent for two seconds.
        work(&mut guest, Duration::from_secs(3));
        thread::sleep(Duration::from_secs(3));
    }
    assert_eq!(guest.read(0, 0, 512).0, OK);
    assert_eq!(attach.process.logged(LOST).len(), 0);
    drop(guest);
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}
