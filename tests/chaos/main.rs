//! Migrations whose workers are killed at any moment, while other monitors send random commands:
//! whatever QEMU survives alone, it survives with a helper.
//!
//! A round starts two QEMUs and their relays, begins a migration, and lets a client at each end
//! send random commands until the migration is over. Then the guest must run, or be able to run, at
//! exactly one end. If that is the source, the next migration must succeed. A round that fails is
//! repeated with QEMU alone over `tcp:`; if it fails in the same way, the failure is QEMU's own.
//!
//! A round is drawn from its seed, which is printed. `QEMU_RDMA_HELPER_TEST_SEED` sets that of the
//! first round, and `QEMU_RDMA_HELPER_TEST_MINUTES` the duration; without a duration a few rounds
//! are run.

#[path = "../support/mod.rs"]
mod support;

mod commands;
mod end;
mod round;

use std::{
    env,
    time::{Duration, Instant},
};

use end::{Carrier, Kind};
use round::Round;

/// Rounds for each version if no duration is set.
const ROUNDS: u64 = 2;

/// How often a failed round is repeated with QEMU alone.
///
/// Many times: in most rounds QEMU can fail in more than one way.
const CONTROLS: u32 = 20;

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number")))
}

fn rounds(version: &'static str) {
    let first = number("QEMU_RDMA_HELPER_TEST_SEED").unwrap_or(1);
    let minutes = number("QEMU_RDMA_HELPER_TEST_MINUTES");
    let end = minutes.map(|minutes| Instant::now() + Duration::from_secs(60 * minutes));
    let (mut qemus_own, mut ours) = (0, Vec::new());
    for seed in first.. {
        let over = end.map_or(seed == first + ROUNDS, |end| Instant::now() >= end);
        if over {
            println!(
                "QEMU {version}: {} rounds, {qemus_own} went wrong with QEMU alone too",
                seed - first
            );
            assert!(ours.is_empty(), "QEMU {version}: {ours:#?}");
            return;
        }
        let round = Round::draw(version, seed);
        let Err(wrong) = round.run(Carrier::Helpers) else { continue };
        println!("QEMU {version}, seed {seed}: {wrong}");
        let same = (0..CONTROLS).any(|_| {
            let alone = round.run(Carrier::Qemu).err();
            println!("QEMU {version}, seed {seed}, with QEMU alone: {alone:?}");
            alone.is_some_and(|alone| alone.kind == wrong.kind)
        });
        if same {
            qemus_own += 1;
        } else {
            ours.push((seed, wrong.kind));
        }
    }
}

#[test]
fn qemu_7_2() {
    rounds("7.2");
}

#[test]
fn qemu_10_0() {
    rounds("10.0");
}

#[test]
fn qemu_11_1() {
    rounds("11.1");
}

/// The random clients leave out only what ends QEMU alone, too.
#[test]
fn what_is_left_out_ends_qemu_alone() {
    let source = ("7.2", "source", None);
    let destinations = [("7.2", "compress"), ("11.1", "x-colo")];
    let destinations = destinations.map(|(version, given)| (version, "destination", Some(given)));
    for (version, name, given) in [source].into_iter().chain(destinations) {
        let ends = (0..CONTROLS).any(|_| {
            let fate = round::fate_of_qemu_alone(version, given);
            println!("QEMU {version}, {given:?} at the {name}: {fate:?}");
            matches!(fate, Some(Kind::Died(died, _)) if died == name)
        });
        assert!(ends, "QEMU {version}: the {name} survives it");
    }
}
