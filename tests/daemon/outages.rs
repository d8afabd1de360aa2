//! A controller that goes away and comes back, as a guest sees it: not at all, but for the time it takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use vhost::VhostBackend;

use crate::daemons::{Attach, Directory, Export};
use crate::driver::{Direction, Driver};
use crate::front_end::{DATA, FrontEnd, IOERR, OK, Setup, UNANSWERED, kind};
use crate::noise::noise;
use crate::proxy::Proxy;
use crate::ring::out;

const UUID: &str = "uuid=6ba7b810-9dad-41d1-80b4-00c04fd430c8";
const OTHER_UUID: &str = "uuid=6ba7b811-9dad-41d1-80b4-00c04fd430c8";
/// Keep-alive of a second, and attempts as often as there can be.
pub(crate) const QUICK: [&str; 4] = ["--keep-alive-tmo", "1", "--reconnect-delay", "1"];
/// Twice the keep-alive time-out of [`QUICK`].
pub(crate) const FENCED: Duration = Duration::from_secs(2);
/// Longer than any attempt's pause, and what an attempt takes.
const SOON: Duration = Duration::from_secs(8);
/// Long enough for a request that is not held to be answered, many times over.
pub(crate) const WHILE: Duration = Duration::from_millis(300);

/// A target whose disk is a file, which can go away and come back where it was.
struct Target {
    directory: Directory,
    address: String,
    export: Option<Export>,
}

impl Target {
    fn start(size: u64) -> Self {
        let directory = Directory::new();
        let mut target = Self {
            directory,
            address: "127.0.0.1:0".to_owned(),
            export: None,
        };
        target.resize("disk.img", size);
        target.come_back("disk.img", UUID);
        target.address = target.export().address().to_owned();
        target
    }

    fn resize(&self, name: &str, size: u64) {
        let file = std::fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.directory.path(name))
            .expect("a file");
        file.set_len(size).expect("room");
    }

    fn export(&self) -> &Export {
        self.export.as_ref().expect("it runs")
    }

    /// SIGKILL.
    fn kill(&mut self) {
        drop(self.export.take());
    }

    fn come_back(&mut self, name: &str, options: &str) {
        let spec = format!("file:{},{options}", self.directory.path(name).display());
        self.export = Some(Export::start_with(&["--listen", &self.address], &[&spec]));
    }

    fn attach(&self, args: &[&str]) -> Attach {
        let args: Vec<_> = QUICK.iter().chain(args).copied().collect();
        Attach::start_with(&args, self.export().subsystem())
    }
}

/// Waits until a message was logged so many times.
#[track_caller]
pub(crate) fn await_logged(attach: &Attach, message: &str, count: usize) {
    let deadline = Instant::now() + SOON;
    while attach.process.logged(message).len() < count {
        assert!(
            Instant::now() < deadline,
            "not logged {count} times: {message}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until a request is answered, and well.
#[track_caller]
pub(crate) fn await_status(guest: &FrontEnd, ring: usize, slot: usize) {
    let deadline = Instant::now() + SOON;
    while guest.status(ring, slot) == UNANSWERED {
        assert!(Instant::now() < deadline, "request {slot} is not answered");
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(guest.status(ring, slot), OK, "request {slot}");
}

#[track_caller]
fn await_lost(attach: &Attach) {
    attach
        .process
        .await_log(|line| line.contains("association lost"));
}

pub(crate) const BACK: &str = "association is back";
const QUEUES: usize = 4;
const BLOCK: usize = 4096;
const BLOCKS: usize = 24;

/// Writes all of several blocks of each queue and reads them back, again and again until it is told to stop. Every answer
/// must be good and what is read what was written. It is told when to stop, and does a few rounds in any case. Gives the
/// rounds, and the longest of them.
fn work(driver: &mut Driver, stop: &AtomicBool) -> (u64, Duration) {
    let (mut rounds, mut longest) = (0, Duration::ZERO);
    while rounds <= 5 || !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        let fresh = noise(QUEUES * BLOCKS * BLOCK, rounds);
        for direction in [Direction::Write, Direction::Read] {
            let memory = match direction {
                Direction::Write => fresh.clone(),
                Direction::Read => vec![0xee; fresh.len()],
            };
            driver.write_memory(0, &memory);
            for queue in 0..QUEUES {
                for number in 0..BLOCKS {
                    let at = (queue * BLOCKS + number) * BLOCK;
                    assert!(driver.add(queue, direction, at as u64, (at, BLOCK), number));
                }
                driver.kick(queue);
            }
            (0..QUEUES).for_each(|queue| drop(driver.wait(queue, BLOCKS)));
        }
        assert!(
            driver.read_memory(0, fresh.len()) == fresh,
            "round {rounds}"
        );
        rounds += 1;
        longest = longest.max(began.elapsed());
    }
    (rounds, longest)
}

/// Runs the workload while `outages` go on. Gives the longest of its rounds.
pub(crate) fn under_load(attach: &Attach, outages: impl FnOnce()) -> Duration {
    let stop = Arc::new(AtomicBool::new(false));
    let (socket, stopped) = (attach.socket.clone(), Arc::clone(&stop));
    let worker = thread::spawn(move || {
        let mut driver = Driver::connect(&socket, QUEUES, 128, 4 << 20);
        work(&mut driver, &stopped)
    });
    outages();
    // Some rounds after the last.
    thread::sleep(FENCED + WHILE);
    stop.store(true, Ordering::Relaxed);
    let (rounds, longest) = worker.join().expect("no answer is bad");
    eprintln!("{rounds} rounds, the longest took {longest:?}");
    longest
}

#[test]
fn a_target_that_is_killed_and_started_again_five_times_is_not_noticed_by_a_busy_guest() {
    let mut target = Target::start(64 << 20);
    let mut attach = target.attach(&["--nr-io-queues", "2"]);
    under_load(&attach, || {
        for round in 1..=5 {
            thread::sleep(WHILE);
            if round % 2 == 1 {
                // So that it certainly dies with requests unanswered.
                target.export().process.pause();
                thread::sleep(WHILE);
            }
            target.kill();
            thread::sleep(WHILE);
            target.come_back("disk.img", UUID);
            await_logged(&attach, BACK, round);
        }
    });
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
    let replayed = attach.process.logged(BACK);
    let replayed = replayed.iter().map(|fields| fields["replayed"].as_u64());
    let replayed = replayed.map(|count| count.expect("a number")).sum::<u64>();
    assert!(replayed > 0, "nothing was ever in flight");
}

#[test]
fn a_target_that_ends_in_good_order_and_starts_again_is_not_noticed_by_a_busy_guest() {
    let mut target = Target::start(64 << 20);
    let mut attach = target.attach(&["--nr-io-queues", "2"]);
    under_load(&attach, || {
        for round in 1..=3 {
            thread::sleep(WHILE);
            target.export.as_mut().expect("it runs").stop();
            target.come_back("disk.img", UUID);
            await_logged(&attach, BACK, round);
        }
    });
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}

#[test]
fn a_target_that_is_stopped_for_longer_than_the_keep_alive_time_is_not_noticed() {
    let target = Target::start(64 << 20);
    let mut attach = target.attach(&[]);
    under_load(&attach, || {
        thread::sleep(WHILE);
        target.export().process.pause();
        await_lost(&attach);
        thread::sleep(Duration::from_secs(2));
        target.export().process.resume();
        await_logged(&attach, BACK, 1);
    });
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}

#[test]
fn a_path_that_swallows_everything_is_not_noticed_when_it_works_again() {
    let target = Target::start(64 << 20);
    let proxy = Proxy::start(target.export().address());
    let uri = proxy.uri(target.export().subsystem());
    let mut attach = Attach::start_with(&QUICK, &uri);
    under_load(&attach, || {
        thread::sleep(WHILE);
        proxy.silence(true);
        await_lost(&attach);
        // A connection that began in silence has nothing more to come.
        thread::sleep(WHILE);
        proxy.silence(false);
        proxy.cut_hosts_off();
        await_logged(&attach, BACK, 1);
    });
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}

#[test]
fn while_it_is_away_requests_are_held_and_attempts_are_few_in_the_log() {
    let mut target = Target::start(8 << 20);
    let mut attach = target.attach(&["--nr-io-queues", "2"]);
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    let address = target.address.clone();
    target.kill();
    await_lost(&attach);
    guest.memory.write(DATA, &[2; 512]);
    for slot in 0..4 {
        guest.add(0, slot, kind::WRITE, 8 * slot as u64, &[out(DATA, 512)]);
    }
    guest.add(0, 4, kind::FLUSH, 0, &[]);
    guest.rings[0].submit();
    assert!(guest.rings[0].is_silent(Duration::from_secs(4)));
    let lines = attach.process.stderr();
    let failures: Vec<_> = lines
        .iter()
        .filter(|line| line.contains("still not connected") && line.contains(&address))
        .collect();
    assert!((2..=4).contains(&failures.len()), "{failures:?}");
    target.come_back("disk.img", UUID);
    guest.rings[0].wait(5);
    assert_eq!([0, 1, 2, 3, 4].map(|slot| guest.status(0, slot)), [OK; 5]);
    assert_eq!(guest.read(0, 24, 512), (OK, vec![2; 512]));
    attach.stop();
    assert_eq!(attach.counter("errors"), 0);
}

#[test]
fn another_or_a_smaller_namespace_is_not_taken_for_the_one_that_was_lost() {
    let mut target = Target::start(8 << 20);
    let attach = target.attach(&[]);
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    target.resize("other.img", 8 << 20);
    target.resize("smaller.img", 4 << 20);
    let larger_blocks = format!("{UUID},block-size=4096");
    let (lost, other) = (&UUID["uuid=".len()..], &OTHER_UUID["uuid=".len()..]);
    target.kill();
    await_lost(&attach);
    guest.add(0, 0, kind::WRITE, 0, &[out(DATA, 512)]);
    guest.rings[0].submit();
    for (name, options, said) in [
        ("other.img", OTHER_UUID, [lost, other]),
        ("smaller.img", UUID, ["8192 blocks", "16384"]),
        ("disk.img", &larger_blocks, ["4096 bytes", "512"]),
    ] {
        let before = attach.process.stderr().len();
        target.kill();
        target.come_back(name, options);
        // Logged at growing intervals, so not necessarily as a warning.
        attach.process.await_log(|line| {
            said.iter().all(|said| line.contains(said)) && line.contains("connected")
        });
        assert!(attach.process.stderr().len() > before);
        assert_eq!(guest.status(0, 0), UNANSWERED, "{name}");
        assert_eq!(attach.process.logged(BACK).len(), 0);
    }
    target.kill();
    // It may have grown.
    target.resize("disk.img", 16 << 20);
    target.come_back("disk.img", UUID);
    guest.rings[0].wait(1);
    assert_eq!(guest.status(0, 0), OK);
}

#[test]
fn a_controller_that_is_given_up_fails_requests_until_it_is_back() {
    for option in ["--ctrl-loss-tmo", "--fast-io-fail-tmo"] {
        let mut target = Target::start(8 << 20);
        let mut attach = target.attach(&[option, "1"]);
        let mut guest = FrontEnd::connect(&attach.socket);
        assert_eq!(guest.write(0, 0, &[1; 512]), OK);
        target.kill();
        let lost = Instant::now();
        assert_eq!(guest.read(0, 0, 512).0, IOERR);
        assert!(
            lost.elapsed() >= Duration::from_millis(900),
            "{:?}",
            lost.elapsed()
        );
        let failing = Instant::now();
        for _ in 0..10 {
            assert_eq!(guest.write(0, 0, &[2; 512]), IOERR);
            assert_eq!(guest.flush(0), IOERR);
        }
        assert!(
            failing.elapsed() < Duration::from_secs(1),
            "{:?}",
            failing.elapsed()
        );
        let log = attach.process.stderr();
        assert!(
            log.iter()
                .any(|line| line.contains("\"ERROR\"") && line.contains(option))
        );
        target.come_back("disk.img", UUID);
        await_logged(&attach, BACK, 1);
        assert_eq!(guest.read(0, 0, 512), (OK, vec![1; 512]));
        attach.stop();
        assert_eq!(attach.counter("errors"), 21);
    }
}

#[test]
fn many_requests_fail_at_once_when_nothing_is_held() {
    let mut target = Target::start(8 << 20);
    let attach = target.attach(&["--ctrl-loss-tmo", "0"]);
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    target.kill();
    await_lost(&attach);
    for slot in 0..40 {
        guest.add(0, slot, kind::WRITE, 0, &[out(DATA, 512)]);
    }
    guest.rings[0].submit();
    guest.rings[0].wait(40);
    assert!((0..40).all(|slot| guest.status(0, slot) == IOERR));
}

#[test]
fn a_front_end_that_comes_while_the_controller_is_away_is_served_as_soon_as_it_is_back() {
    let mut target = Target::start(8 << 20);
    let mut attach = target.attach(&["--drain-timeout", "1"]);
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    target.kill();
    await_lost(&attach);
    guest.add(0, 0, kind::WRITE, 8, &[out(DATA, 512)]);
    guest.rings[0].submit();
    thread::sleep(WHILE);
    drop(guest);
    let left = Instant::now();
    let mut guest = FrontEnd::connect(&attach.socket);
    assert!(left.elapsed() < SOON, "{:?}", left.elapsed());
    guest.add(0, 0, kind::WRITE, 16, &[out(DATA, 512)]);
    guest.rings[0].submit();
    assert!(guest.rings[0].is_silent(WHILE));
    target.come_back("disk.img", UUID);
    guest.rings[0].wait(1);
    assert_eq!(guest.status(0, 0), OK);
    attach.stop();
    assert_eq!(attach.counter("errors"), 1, "that of the first front-end");
}

#[test]
fn a_signal_ends_attach_in_time_while_the_controller_is_away_and_requests_are_held() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut target = Target::start(8 << 20);
        let mut attach = target.attach(&["--nr-io-queues", "2"]);
        let mut guest = FrontEnd::connect(&attach.socket);
        assert_eq!(guest.write(0, 0, &[1; 512]), OK);
        target.kill();
        await_lost(&attach);
        for slot in 0..30 {
            guest.add(0, slot, kind::WRITE, 8 * slot as u64, &[out(DATA, 4096)]);
        }
        guest.rings[0].submit();
        thread::sleep(WHILE);
        // Asserts the time.
        attach.stop_by(signal);
        assert!(
            guest.rings[0].used().is_empty(),
            "nobody did it, and yet it was answered"
        );
    }
}

#[test]
fn a_ring_that_is_stopped_while_the_controller_is_away_fails_what_it_has_after_a_time() {
    let mut target = Target::start(8 << 20);
    let attach = target.attach(&["--drain-timeout", "1"]);
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    target.kill();
    await_lost(&attach);
    for slot in 0..2 {
        guest.add(0, slot, kind::WRITE, 8, &[out(DATA, 512)]);
    }
    guest.rings[0].submit();
    assert!(guest.rings[0].is_silent(WHILE));
    let asked = Instant::now();
    let base = guest.frontend.get_vring_base(0).expect("GET_VRING_BASE");
    let took = asked.elapsed();
    assert!(
        took >= Duration::from_millis(900) && took < SOON,
        "{took:?}"
    );
    // What was taken is answered, and what was not is there for whoever goes on.
    let answered = guest.rings[0].used().len();
    assert!(answered >= 1);
    assert_eq!(base, 1 + u32::try_from(answered).expect("a few"));
    assert_eq!(guest.status(0, 0), IOERR);
    target.come_back("disk.img", UUID);
    await_logged(&attach, BACK, 1);
    guest.start(0, u16::try_from(base).expect("an index"));
    guest.add(0, 5, kind::WRITE, 8, &[out(DATA, 512)]);
    guest.rings[0].submit();
    guest.rings[0].wait(3 - answered);
    assert_eq!(guest.status(0, 5), OK);
}

#[test]
fn a_write_that_a_lost_association_carries_out_late_does_not_undo_a_later_one() {
    late_write_against_a_later_one_on(0);
}

#[test]
fn nor_one_on_another_lane() {
    late_write_against_a_later_one_on(1);
}

/// The late write comes from ring 0, the later one from this ring; each has a lane to itself.
fn late_write_against_a_later_one_on(ring: usize) {
    // The target holds the first write back, and does not learn that the host is gone.
    let export = Export::start_silent(&["ram:8M,fault=delay=1500ms:write:count=1"]);
    let proxy = Proxy::start(export.address());
    let args = [&QUICK[..], &["--nr-io-queues", "2"]].concat();
    let mut attach = Attach::start_with(&args, &proxy.uri(export.subsystem()));
    let setup = Setup {
        rings: 2,
        ..Setup::default()
    };
    let mut guest = FrontEnd::connect_with(&attach.socket, setup);
    let [first, second, data] = [DATA, DATA + 0x10_0000, DATA + 0x20_0000];
    guest.memory.write(first, &[1; 4096]);
    guest.memory.write(second, &[2; 4096]);
    guest.add(0, 0, kind::WRITE, 0, &[out(first, 4096)]);
    guest.rings[0].submit();
    thread::sleep(WHILE);
    let lost = Instant::now();
    proxy.cut_hosts_off();
    // Replayed at once.
    guest.rings[0].wait(1);
    assert_eq!(guest.status(0, 0), OK);
    assert!(lost.elapsed() < FENCED, "{:?}", lost.elapsed());
    guest.add(ring, 1, kind::WRITE, 4, &[out(second, 4096)]);
    // Neither reads nor writes elsewhere are held up behind it.
    guest.add(ring, 2, kind::READ, 0, &[crate::ring::into(data, 4096)]);
    guest.add(ring, 3, kind::WRITE, 64, &[out(second, 4096)]);
    guest.rings[ring].submit();
    await_status(&guest, ring, 2);
    await_status(&guest, ring, 3);
    assert!(lost.elapsed() < FENCED, "{:?}", lost.elapsed());
    await_status(&guest, ring, 1);
    let held = lost.elapsed();
    guest.rings[ring].wait(3);
    // By now the first has been carried out a second time, if it ever is.
    thread::sleep(FENCED.saturating_sub(lost.elapsed()));
    let content = guest.read(0, 0, 12 * 512);
    let expected = [vec![1; 2048], vec![2; 4096]].concat();
    assert_eq!(content.0, OK);
    assert!(content.1 == expected, "the first write came last");
    assert!(guest.memory.read(data, 4096) == [1; 4096]);
    eprintln!("it was held for {held:?}");
    assert!(held >= FENCED, "it was held for {held:?}");
    attach.stop();
    let back = attach.process.logged(BACK);
    assert_eq!(back[0]["replayed"], 1);
    assert_eq!(back[0]["fenced"], 1);
}
