//! The simulation finds what it is there for: deliberate defects, each within a few hundred worlds.

use nvmf::sim::{Mutation, Profile};

use super::outcome;

/// Worlds in which a defect has to show.
const BOUND: u64 = 400;

#[track_caller]
fn is_caught(mutation: Mutation) {
    let caught = (0..BOUND).find_map(|seed| {
        let on = mutation.enable();
        let what = outcome(seed, Profile::Any).err();
        drop(on);
        what.map(|what| (seed, what))
    });
    let Some((seed, what)) = caught else {
        panic!("{mutation:?} goes unnoticed in {BOUND} worlds");
    };
    println!("{mutation:?}: {what}");
    let sound = outcome(seed, Profile::Any);
    assert!(sound.is_ok(), "it is not the mutation: {sound:?}");
}

#[test]
fn last_and_success_swapped_is_caught() {
    is_caught(Mutation::LastAndSuccessSwapped);
}

#[test]
fn a_short_transfer_that_is_accepted_is_caught() {
    is_caught(Mutation::ShortTransferAccepted);
}

#[test]
fn retiring_on_the_cqe_alone_is_caught() {
    is_caught(Mutation::RetiredOnCqeAlone);
}

#[test]
fn a_digest_that_is_ignored_is_caught() {
    is_caught(Mutation::DigestIgnored);
}

#[test]
fn an_r2t_range_that_is_not_checked_is_caught() {
    is_caught(Mutation::R2tRangeUnchecked);
}
