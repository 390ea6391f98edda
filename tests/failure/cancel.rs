//! `migrate_cancel` while QEMU switches over: the guest runs at exactly one end.

use crate::support::{
    Config, Pair, Qmp, VERSIONS, eventually,
    helper::{signal_if_alive, signal_process},
    wrapped::has_ended,
};
use rustix::process::Signal;
use serde_json::json;

/// A pair whose destination runs the guest as soon as it has loaded it.
fn start(version: &'static str, return_path: bool) -> Pair {
    let config = Config { version, ..Config::default() };
    with_destination(Pair::start(&config), config, return_path)
}

fn with_destination(mut pair: Pair, config: Config, return_path: bool) -> Pair {
    let runs_by_itself = Config { incoming: true, ..config };
    pair.destination = crate::support::Host::start(&pair.dir, "runs", &runs_by_itself);
    for host in [&mut pair.source, &mut pair.destination] {
        host.client.capability("return-path", return_path);
        host.client.capability("events", true);
    }
    pair.source.client.capability("pause-before-switchover", true);
    let fast = json!({ "max-bandwidth": 1_u64 << 32, "downtime-limit": 8000 });
    pair.source.client.run("migrate-set-parameters", fast);
    pair
}

/// Wait until the migration is over. Return whether the guest runs at the source.
fn runs_at_source(pair: &mut Pair) -> bool {
    let end = pair.source.await_status(&["completed", "failed", "cancelled"]);
    pair.source.helper.await_no_worker();
    let here = pair.source.qemu.status() == "running";
    assert_eq!(here, end["status"] == "cancelled", "{end}");
    here
}

/// Cancel at the same moment as `migrate-continue`, or a little later, after `between` other
/// commands were answered.
fn switch_over_and_cancel(pair: &mut Pair, between: usize) {
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    pair.source.await_status(&["pre-switchover"]);
    let mut other = Qmp::connect(&pair.source.qemu.spare_socket());
    let go_on = json!({
        "execute": "migrate-continue", "arguments": { "state": "pre-switchover" }
    });
    other.send(format!("{go_on}\n").as_bytes());
    for _ in 0..between {
        pair.source.client.run("query-migrate", json!({}));
    }
    pair.source.client.run("migrate_cancel", json!({}));
}

/// Assert that the guest runs where reported. Return whether that is the source.
#[track_caller]
fn runs_once(pair: &mut Pair) -> bool {
    let here = runs_at_source(pair);
    if here {
        pair.source.qemu.assert_goes_on();
        // The destination's QEMU ends when its migration fails.
        let there = pair.destination.qemu.pid();
        eventually("the destination's QEMU to end", || has_ended(there).then_some(()));
    } else {
        eventually("the destination's guest to run", || {
            (pair.destination.qemu.status() == "running").then_some(())
        });
        pair.destination.qemu.assert_goes_on();
    }
    here
}

/// A cancel while a stopped worker holds the end of the stream: the guest runs at the source only.
///
/// QEMU, which has written its whole stream and waits for the destination, resumes its guest when
/// it is cancelled, and the worker continues.
#[test]
fn cancelled_while_the_worker_stands_still() {
    for version in VERSIONS {
        let mut pair = start(version, true);
        // So that the rest fits into the buffers on the way.
        pair.source.client.run("migrate-set-parameters", json!({ "downtime-limit": 1 }));
        let uri = pair.listen();
        pair.source.client.run("migrate", json!({ "uri": uri }));
        pair.source.await_status(&["pre-switchover"]);
        let worker = pair.source.helper.await_worker();
        signal_process(worker, Signal::STOP);
        let mut qemu = Qmp::connect(&pair.source.qemu.spare_socket());
        qemu.run("migrate-continue", json!({ "state": "pre-switchover" }));
        let mut is = |state: &str| qemu.run("query-migrate", json!({}))["status"] == state;
        // If the rest is too much, QEMU can't continue, and the worker is given up.
        eventually("the end of the stream", || (is("device") || has_ended(worker)).then_some(()));
        pair.source.client.run("migrate_cancel", json!({}));
        eventually("QEMU or the worker to end", || {
            (has_ended(worker) || is("cancelled")).then_some(())
        });
        signal_if_alive(worker, Signal::CONT);
        assert!(runs_once(&mut pair), "{version}");
    }
}

#[test]
fn cancelled_while_it_switches_over() {
    for (turn, version) in VERSIONS.into_iter().cycle().take(12).enumerate() {
        let return_path = turn % 2 == 0;
        let mut pair = start(version, return_path);
        switch_over_and_cancel(&mut pair, turn / 2);
        let here = runs_once(&mut pair);
        println!("{version}, return-path {return_path}, {}: at the source {here}", turn / 2);
    }
}

/// The guest runs once, although the destination's QEMU waits for a description that never arrives.
///
/// If the stream ends there, that QEMU reports a failure on its return path, yet runs the guest.
#[test]
fn cancelled_while_the_destination_waits_for_a_description() {
    for version in VERSIONS {
        let config = Config { version, machine: "pc,suppress-vmdesc=on", ..Config::default() };
        let expecting = Config { machine: "pc", ..config.clone() };
        let mut pair = with_destination(Pair::start(&config), expecting, true);
        let uri = pair.listen();
        pair.source.client.run("migrate", json!({ "uri": uri }));
        pair.source.await_status(&["pre-switchover"]);
        pair.source.client.run("migrate-continue", json!({ "state": "pre-switchover" }));
        let mut there = Qmp::connect(&pair.destination.qemu.spare_socket());
        eventually("the guest's devices to be loaded", || {
            // EIP of a machine that was just created.
            (!there.hmp("info registers").contains("EIP=0000fff0")).then_some(())
        });
        pair.source.client.run("migrate_cancel", json!({}));
        let here = runs_once(&mut pair);
        println!("{version}: at the source {here}");
    }
}
