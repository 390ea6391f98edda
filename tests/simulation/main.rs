//! A migration's state machines and models of their environment, in virtual time. Whatever is late,
//! lost, killed or stopped: the guest never runs twice, and if it does not run, the reason is
//! reported.
//!
//! A schedule is a list of numbers, each of which chooses a possible step. proptest draws them from
//! a seed, and shortens schedules that failed. `scripts/simulate` runs more of them.

mod check;
mod network;
mod qemu;
mod relay;
mod worker;
mod world;

use std::{
    collections::HashSet,
    env,
    hash::{DefaultHasher, Hasher as _},
    time::{Duration, Instant},
};

use proptest::{
    collection::vec,
    prelude::any,
    test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner},
};
use qemu::Run;
use world::{Start, Step, World};

/// Choices of a schedule. After them every step is the natural one.
const CHOICES: usize = 300;

/// Steps within which everything must end then.
const STEPS: usize = 3000;

/// Faults and orders in a schedule.
const FAULTS: u32 = 3;
const ORDERS: u32 = 3;

/// How long `scripts/test` searches.
const TIME: Duration = Duration::from_secs(10);

/// What the schedules have covered.
#[derive(Default)]
struct Seen {
    schedules: u64,
    steps: u64,
    states: HashSet<u64>,
}

/// Return the step that `choice` selects.
fn choose(world: &mut World, choice: u16, faults: &mut u32, orders: &mut u32) -> Option<Step> {
    let (kind, index) = (choice % 16, usize::from(choice / 16));
    let mut steps = match kind {
        15 if *faults > 0 => {
            *faults -= 1;
            world.faults()
        }
        14 if *orders > 0 => {
            *orders -= 1;
            world.orders()
        }
        13 => world.frozen(),
        _ => Vec::new(),
    };
    if steps.is_empty() {
        steps = world.progress();
    }
    (!steps.is_empty()).then(|| steps[index % steps.len()])
}

fn start(choice: u16) -> Start {
    let guest = match choice / 2 % 8 {
        1 => Run::Paused,
        2 => Run::Suspended,
        _ => Run::Running,
    };
    Start { guest, has_return_path: choice % 2 == 1 }
}

/// Run a schedule.
fn run(choices: &[u16], seen: &mut Seen) -> (World, Result<(), String>) {
    let (first, rest) = choices.split_first().unwrap_or((&0, &[]));
    let mut world = World::new(start(*first), Instant::now());
    let (mut faults, mut orders) = (FAULTS, ORDERS);
    seen.schedules += 1;
    for choice in rest {
        let Some(step) = choose(&mut world, *choice, &mut faults, &mut orders) else { break };
        if let Err(why) = perform(&mut world, step, seen) {
            return (world, Err(why));
        }
    }
    for step in world.frozen() {
        world.perform(step);
    }
    for _ in 0..STEPS {
        if world.is_settled() {
            let end = check::at_end(&world);
            return (world, end);
        }
        let Some(step) = world.progress().first().copied() else { break };
        if let Err(why) = perform(&mut world, step, seen) {
            return (world, Err(why));
        }
    }
    (world, Err("somebody waits for ever".into()))
}

fn perform(world: &mut World, step: Step, seen: &mut Seen) -> Result<(), String> {
    world.perform(step);
    seen.steps += 1;
    let mut hasher = DefaultHasher::new();
    world.hash_into(&mut hasher);
    seen.states.insert(hasher.finish());
    check::always(world)
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number")))
}

/// Return a runner for schedules of this seed.
fn runner(seed: u64, cases: u32) -> TestRunner {
    let config =
        Config { cases, failure_persistence: None, max_shrink_iters: 20_000, ..Config::default() };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes))
}

/// Search for a schedule of this seed that fails. Return the shortest one, and why it fails.
fn look(seed: u64, cases: u32, seen: &mut Seen) -> Option<(World, String)> {
    let seen = std::cell::RefCell::new(seen);
    let found = runner(seed, cases).run(&vec(any::<u16>(), 1..CHOICES), |choices| {
        let (_, result) = run(&choices, &mut seen.borrow_mut());
        result.map_err(TestCaseError::fail)
    });
    match found {
        Err(TestError::Fail(why, choices)) => {
            let choices = shorten(choices, &why.to_string(), &mut seen.borrow_mut());
            let (world, _) = run(&choices, &mut seen.borrow_mut());
            Some((world, why.to_string()))
        }
        Err(TestError::Abort(why)) => panic!("{why}"),
        Ok(()) => None,
    }
}

/// Shorten a schedule as long as it fails in the same way: drop choices, or make them natural.
fn shorten(mut choices: Vec<u16>, why: &str, seen: &mut Seen) -> Vec<u16> {
    let mut length = |choices: &[u16]| {
        let (world, end) = run(choices, seen);
        (end.err().as_deref() == Some(why)).then_some(world.trace.len())
    };
    let mut best = length(&choices).unwrap_or(usize::MAX);
    loop {
        let before = (best, choices.clone());
        for size in [32, 8, 4, 2, 1] {
            let mut at = 1;
            while at < choices.len() {
                let end = choices.len().min(at + size);
                let mut without = choices.clone();
                without.drain(at..end);
                let mut natural = choices.clone();
                natural[at..end].fill(0);
                let shorter = [without, natural].into_iter().find(|shorter| {
                    *shorter != choices
                        && length(shorter).is_some_and(|length| {
                            let is_shorter = length <= best;
                            best = best.min(length);
                            is_shorter
                        })
                });
                match shorter {
                    Some(shorter) if shorter.len() < choices.len() => choices = shorter,
                    Some(shorter) => {
                        choices = shorter;
                        at = end;
                    }
                    None => at = end,
                }
            }
        }
        if before == (best, choices.clone()) {
            return choices;
        }
    }
}

/// Schedules per seed.
const CASES: u32 = 500;

#[test]
fn the_guest_runs_at_one_end_at_the_most() {
    let first = number("QEMU_RDMA_HELPER_SIMULATE_SEED");
    let minutes = number("QEMU_RDMA_HELPER_SIMULATE_MINUTES");
    let limit = minutes.map_or(TIME, |minutes| Duration::from_secs(60 * minutes));
    let (begun, mut seen) = (Instant::now(), Seen::default());
    for seed in first.unwrap_or(1).. {
        if let Some((world, why)) = look(seed, CASES, &mut seen) {
            let (start, trace) = (world.start, world.trace.join("\n"));
            panic!("seed {seed}: {why}\n{start:?}\n{trace}\n");
        }
        if begun.elapsed() >= limit || first.is_some() && minutes.is_none() {
            break;
        }
    }
    println!(
        "{} schedules, {} steps, {} states: none went wrong",
        seen.schedules,
        seen.steps,
        seen.states.len()
    );
}
