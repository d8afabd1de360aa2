//! SIGUSR1: what the log says then of disks, paths and targets, and that nothing ends.

use rustix::process::Signal;
use serde_json::Value;
use vhost::VhostBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::daemons::{Attach, Export};
use crate::front_end::{FrontEnd, OK, Setup};
use crate::malformed::{MISDEEDS, reported};
use crate::outages::{QUICK, await_logged};

const DISK: &str = "status: disk";
const PATH: &str = "status: path";
const PATHS: &str = "status: paths";

/// Asks for the `count`th time. Gives what is said of the disk.
#[track_caller]
fn ask(attach: &Attach, count: usize) -> Value {
    attach.process.signal(Signal::USR1);
    await_logged(attach, DISK, count);
    await_logged(attach, "disk counters", count);
    await_logged(attach, PATHS, count);
    attach.process.logged(DISK).remove(count - 1)
}

#[test]
fn a_signal_has_the_log_say_how_a_disk_is_and_its_paths_and_which_rings_are_broken_and_why() {
    let export = Export::start(&["ram:64M"]);
    let nobody = export.subsystem().replace(export.address(), "127.0.0.1:1");
    let args = [&QUICK[..], &["--path", &nobody]].concat();
    let mut attach = Attach::start_with(&args, export.subsystem());
    let nothing = ask(&attach, 1);
    assert_eq!(nothing["front_end"], false);

    let setup = Setup {
        rings: 2,
        ..Setup::default()
    };
    let mut guest = FrontEnd::connect_with(&attach.socket, setup);
    assert_eq!(guest.write(1, 0, &[7; 512]), OK);
    let well = ask(&attach, 2);
    assert_eq!(well["front_end"], true);
    assert_eq!(well["told_of_changes"], false);
    assert_eq!(well["sectors"], 131_072);
    assert_eq!(well["broken"], "");
    assert_eq!(attach.process.logged("disk counters")[1]["writes"], 1);
    let [here, away] = &attach.process.logged(PATH)[2..] else {
        panic!("not two paths")
    };
    assert_eq!(here["controller"], export.address());
    assert_eq!(here["state"], "connected");
    assert_eq!(here["access"], "optimized");
    assert!(away["target"].as_str().is_some_and(|it| it.contains(":1/")));
    assert_ne!(away["state"], "connected");
    let paths = &attach.process.logged(PATHS)[1];
    assert_eq!(
        (&paths["paths"], &paths["connected"]),
        (&2.into(), &1.into())
    );
    assert_eq!(paths["fences"], 0);

    let err = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let set = guest.frontend.set_vring_err(0, &err);
    set.expect("SET_VRING_ERR");
    let (misdeed, commit) = MISDEEDS[0];
    commit(&mut guest);
    guest.rings[0].publish();
    guest.rings[0].kick();
    assert!(reported(&err), "{misdeed}");
    let broken = ask(&attach, 3)["broken"].to_string();
    assert!(
        broken.starts_with("\"ring 0: ") && broken.len() > 15,
        "{broken}"
    );
    guest.frontend.get_vring_base(0).expect("GET_VRING_BASE");
    assert_eq!(ask(&attach, 4)["broken"], "");

    export.process.signal(Signal::USR1);
    export
        .process
        .await_log(|line| line.contains("target counters"));
    assert_eq!(guest.read(1, 0, 512), (OK, vec![7; 512]));
    drop(guest);
    attach.stop();
}
