//! Limits of the controller: what a guest asks for is carried out within them, and offered to it all the same.

use nvmf::spec::Sqe;
use nvmf::spec::identify::{IdentifyController, IdentifyNamespace, oncs};
use nvmf::spec::opcode::nvm;
use nvmf::spec::sqe::DsmRange;
use zerocopy::FromBytes;

use crate::daemons::{Attach, Directory, Export};
use crate::front_end::{DATA, FrontEnd, IOERR, OK, Setup, feature, kind};
use crate::ring::{into, out};
use crate::scripted::{Script, Scripted};

/// Transfers of 16 blocks that cross no multiple of 12, and capsules that hold one.
fn identity(data: &mut IdentifyController) {
    data.ver = 0x0002_0000.into();
    data.mdts = 1;
    data.ioccsz = (4 + 8192 / 16).into();
    data.oncs = (oncs::WRITE_ZEROES | oncs::DATASET_MANAGEMENT).into();
}

fn boundary(data: &mut IdentifyNamespace) {
    data.noiob = 12.into();
}

/// WZSL of two pages, which are 16 blocks; two ranges, of 20 blocks each and 30 together.
fn command_set(data: &mut [u8]) {
    (data[1], data[3]) = (1, 2);
    data[4..8].copy_from_slice(&20_u32.to_le_bytes());
    data[8..16].copy_from_slice(&30_u64.to_le_bytes());
}

/// The blocks of commands that must all have this opcode.
#[track_caller]
fn blocks(commands: &[(Sqe, Vec<u8>)], opcode: u8) -> Vec<(u64, u64)> {
    let of = |(sqe, _): &(Sqe, Vec<u8>)| {
        assert_eq!(sqe.opcode, opcode);
        (sqe.slba(), sqe.block_count().into())
    };
    commands.iter().map(of).collect()
}

/// Checks that these are the blocks `first..end`, one after the other.
#[track_caller]
fn cover(blocks: &[(u64, u64)], first: u64, end: u64) {
    let mut next = first;
    for (slba, count) in blocks {
        assert_eq!(*slba, next, "{blocks:?}");
        next += count;
    }
    assert_eq!(next, end, "{blocks:?}");
}

#[test]
fn what_a_guest_asks_for_keeps_to_every_limit_that_a_controller_states() {
    let controller = Scripted::start(Script {
        controller: Some(identity),
        namespace: Some(boundary),
        command_set: Some(command_set),
        ..Script::default()
    });
    let attach = Attach::start(&controller.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    for (request, opcode, buffer) in [
        (kind::READ, nvm::READ, into(DATA, 64 * 512)),
        (kind::WRITE, nvm::WRITE, out(DATA, 64 * 512)),
    ] {
        assert_eq!(guest.run(0, request, 5, &[buffer]), OK);
        let blocks = blocks(&controller.take_commands(), opcode);
        cover(&blocks, 5, 69);
        for (slba, count) in &blocks {
            assert!(
                *count <= 16 && slba / 12 == (slba + count - 1) / 12,
                "{blocks:?}"
            );
        }
        // From 5 to 12, four times 12 and 9 more; no more pieces than needed.
        assert_eq!(blocks.len(), 6, "{blocks:?}");
    }
    assert_eq!(guest.range(kind::WRITE_ZEROES, 3, 100, 0), OK);
    let zeroed = blocks(&controller.take_commands(), nvm::WRITE_ZEROES);
    cover(&zeroed, 3, 103);
    assert!(zeroed.iter().all(|(_, count)| *count <= 16), "{zeroed:?}");
    assert_eq!(guest.range(kind::DISCARD, 7, 100, 0), OK);
    let mut discarded = Vec::new();
    for (sqe, data) in controller.take_commands() {
        assert_eq!(sqe.opcode, nvm::DATASET_MANAGEMENT);
        let ranges = <[DsmRange]>::ref_from_bytes(&data).expect("ranges");
        let ranges = ranges
            .iter()
            .map(|range| (range.slba.get(), u64::from(range.nlb.get())));
        let ranges: Vec<_> = ranges.collect();
        assert!(
            ranges.len() <= 2 && ranges.iter().all(|(_, count)| *count <= 20),
            "{ranges:?}"
        );
        assert!(
            ranges.iter().map(|(_, count)| count).sum::<u64>() <= 30,
            "{ranges:?}"
        );
        discarded.extend(ranges);
    }
    cover(&discarded, 7, 107);
}

#[test]
fn a_controller_that_lacks_commands_gets_writes_of_zeroes_and_no_discards() {
    let controller = Scripted::start(Script {
        controller: Some(|data| {
            identity(data);
            data.oncs = 0.into();
        }),
        ..Script::default()
    });
    let rich = Scripted::start(Script {
        controller: Some(identity),
        ..Script::default()
    });
    let attach = Attach::start(&controller.uri());
    let mut guest = FrontEnd::connect(&attach.socket);
    let other = Attach::start(&rich.uri());
    let offered = FrontEnd::connect(&other.socket).features;
    assert_eq!(
        guest.features, offered,
        "what is on offer does not depend on it"
    );
    assert_eq!(guest.range(kind::DISCARD, 7, 100, 0), OK);
    assert_eq!(controller.take_commands().len(), 0);
    assert_eq!(guest.range(kind::WRITE_ZEROES, 3, 100, 0), OK);
    let commands = controller.take_commands();
    cover(&blocks(&commands, nvm::WRITE), 3, 103);
    assert!(
        commands
            .iter()
            .all(|(_, data)| data.iter().all(|byte| *byte == 0))
    );
    assert_eq!(guest.flush(0), OK);
    let flushed = controller.take_commands();
    assert_eq!(
        flushed.len(),
        1,
        "a flush is forwarded though there is no volatile cache"
    );
    assert_eq!(flushed[0].0.opcode, nvm::FLUSH);
}

#[test]
fn rings_share_the_queue_pairs_that_a_controller_grants() {
    // One, whatever is asked for, with room for three commands.
    let controller = Scripted::start(Script {
        controller: Some(|data| {
            identity(data);
            data.maxcmd = 4.into();
        }),
        ..Script::default()
    });
    let args = ["--nr-io-queues=8", "--queue-size=256"];
    let mut attach = Attach::start_with(&args, &controller.uri());
    let ready = attach.process.logged("disk ready");
    assert_eq!(ready[0]["lanes"], 1);
    let setup = Setup {
        rings: 8,
        ..Setup::default()
    };
    let mut guest = FrontEnd::connect_with(&attach.socket, setup);
    for round in 0..20_usize {
        for ring in 0..8 {
            for slot in 0..12 {
                let sector = (round + slot) as u64;
                guest.add(ring, slot, kind::READ, sector, &[into(DATA, 4096)]);
            }
            guest.rings[ring].submit();
        }
        for ring in 0..8 {
            guest.rings[ring].wait(12);
        }
    }
    drop(guest);
    attach.stop();
    assert_eq!(attach.counter("reads"), 20 * 8 * 12);
    assert_eq!(attach.counter("errors"), 0);
}

#[test]
fn a_namespace_that_is_write_protected_is_told_of_and_served_as_the_user_asked() {
    let directory = Directory::new();
    let path = directory.path("disk.img");
    std::fs::write(&path, vec![7; 1 << 20]).expect("an image");
    let spec = format!("file:{},ro", path.to_str().expect("UTF-8"));
    let export = Export::start(&[&spec]);
    let attach = Attach::start(export.uri());
    let told = |attach: &Attach| {
        let lines = attach.process.stderr();
        lines
            .iter()
            .filter(|line| line.contains("write protected"))
            .count()
    };
    assert_eq!(told(&attach), 1);
    let mut guest = FrontEnd::connect(&attach.socket);
    assert_eq!(guest.features & feature::RO, 0);
    assert_eq!(guest.read(0, 0, 512), (OK, vec![7; 512]));
    assert_eq!(guest.write(0, 0, &[1; 512]), IOERR);
    assert_eq!(guest.range(kind::WRITE_ZEROES, 0, 8, 0), IOERR);
    assert_eq!(guest.flush(0), OK);
    assert_eq!(guest.read(0, 0, 512), (OK, vec![7; 512]));
    // Each at its first failure; asked for, it is no news.
    assert!(told(&attach) >= 2);
    let attach = Attach::start_with(&["--read-only"], export.uri());
    assert_eq!(told(&attach), 0);
    assert_ne!(FrontEnd::connect(&attach.socket).features & feature::RO, 0);
}
