//! `migrate_cancel` while QEMU switches over: the guest runs at one end, and no more.

mod support;

use serde_json::json;
use support::{Config, Pair, Qmp, VERSIONS, eventually};

/// The destination lets the guest run as soon as it has it.
fn start(version: &'static str, return_path: bool) -> Pair {
    let config = Config { version, ..Config::default() };
    let mut pair = Pair::start(&config);
    let runs_by_itself = Config { incoming: true, ..config };
    pair.destination = support::Host::start(&pair.dir, "runs", &runs_by_itself);
    for host in [&mut pair.source, &mut pair.destination] {
        host.client.capability("return-path", return_path);
        host.client.capability("events", true);
    }
    pair.source.client.capability("pause-before-switchover", true);
    let fast = json!({ "max-bandwidth": 1_u64 << 32, "downtime-limit": 8000 });
    pair.source.client.run("migrate-set-parameters", fast);
    pair
}

/// Where the guest runs, once that is certain: at the source, or not.
fn runs_at_source(pair: &mut Pair) -> bool {
    let end = pair.source.await_status(&["completed", "failed", "cancelled"]);
    pair.source.helper.await_no_worker();
    let here = pair.source.qemu.status() == "running";
    assert_eq!(here, end["status"] == "cancelled", "{end}");
    here
}

/// The command comes in the same moment as the one that lets QEMU go on, or a little later, in which
/// `between` other commands were answered.
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

#[test]
fn cancelled_while_it_switches_over() {
    for (turn, version) in VERSIONS.into_iter().cycle().take(12).enumerate() {
        let return_path = turn % 2 == 0;
        let mut pair = start(version, return_path);
        switch_over_and_cancel(&mut pair, turn / 2);
        let here = runs_at_source(&mut pair);
        println!("{version}, return-path {return_path}, {}: at the source {here}", turn / 2);
        if here {
            pair.source.qemu.assert_goes_on();
            // Its QEMU has failed, or ended because of that.
            let there = pair.destination.client.try_execute("query-status", &json!({}));
            assert!(there.is_err() || pair.destination.qemu.status() != "running");
        } else {
            eventually("the destination's guest to run", || {
                (pair.destination.qemu.status() == "running").then_some(())
            });
            pair.destination.qemu.assert_goes_on();
        }
    }
}
