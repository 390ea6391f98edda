//! A client that retries at once when a migration has failed, over another transport or the same.

use crate::support::{
    Config, Guest, Qemu, Qmp, VERSIONS, free_port,
    helper::signal_process,
    memory,
    wrapped::{Wrapped, WrappedPair},
};
use rustix::process::Signal;
use serde_json::{Value, json};

const ENDS: [&str; 2] = ["cancelled", "failed"];

/// Start a guest whose memory is private, so that its migrations borrow multifd.
fn start(version: &'static str) -> WrappedPair {
    let guest = Guest::Dirty { fill: 48, hot: 32, spin: 0 };
    WrappedPair::start(&Config { version, guest, mib: 96, ..Config::default() })
}

/// How a client learns of the end.
#[derive(Clone, Copy, Debug)]
enum Learns {
    ByEvent,
    ByAsking,
}

fn await_end(client: &mut Qmp, learns: Learns) -> String {
    match learns {
        Learns::ByEvent => {
            let is_end = |data: &Value| ENDS.contains(&data["status"].as_str().unwrap());
            let event = client.await_event("MIGRATION", is_end);
            event["data"]["status"].as_str().unwrap().to_owned()
        }
        Learns::ByAsking => loop {
            let state = client.run("query-migrate", json!({}));
            let status = state["status"].as_str().unwrap();
            if ENDS.contains(&status) {
                break status.to_owned();
            }
        },
    }
}

/// Migrate by QEMU alone, and assert that everything reported of it is correct.
#[track_caller]
fn migrate_by_qemu(source: &mut Wrapped, destination: &mut Qemu, to: &str, before: usize) {
    let client = &mut source.client;
    client.run("migrate", json!({ "uri": to }));
    let status = loop {
        let state = client.run("query-migrate", json!({}));
        let status = state["status"].as_str().unwrap().to_owned();
        if !["setup", "active", "device"].contains(&&*status) {
            break status;
        }
    };
    assert_eq!(status, "completed");
    let done = |data: &Value| data["status"] == "completed";
    client.await_event("MIGRATION", done);
    let mut states = client.migration_states().split_off(before);
    // Later versions report this too.
    states.retain(|state| state != "device");
    assert_eq!(states, ["setup", "active", "completed"]);
    let differences = memory::compare(&mut source.qemu, destination);
    assert!(differences.is_empty(), "RAM differs: {differences:#?}");
    let mut there = Qmp::connect(&destination.helper_socket());
    assert_eq!(there.run("query-migrate", json!({}))["status"], "completed");
    there.run("cont", json!({}));
    destination.assert_goes_on();
}

#[test]
fn another_transport_is_tried_at_once() {
    for version in VERSIONS {
        for (turn, learns) in [Learns::ByEvent, Learns::ByAsking].into_iter().enumerate() {
            for fails in [false, true] {
                let mut pair = start(version);
                pair.begin(16);
                pair.source.await_status(&["active"]);
                if fails {
                    signal_process(pair.destination.await_worker(), Signal::KILL);
                } else {
                    pair.source.client.run("migrate_cancel", json!({}));
                }
                let end = await_end(&mut pair.source.client, learns);
                assert_eq!(end, if fails { "failed" } else { "cancelled" });
                // Skip earlier states: QEMU reports `cancelling` first if cancelled.
                let before = pair.source.client.migration_states().len();
                let fast = json!({ "max-bandwidth": 1_u64 << 32, "downtime-limit": 8000 });
                pair.source.client.run("migrate-set-parameters", fast);
                let name = format!("by-qemu-{turn}-{fails}");
                let to = format!("tcp:127.0.0.1:{}", free_port());
                let config = pair.config.clone().incoming();
                let mut other = Qemu::start(pair.dir.path(), &name, &config);
                let mut there = Qmp::connect(&other.helper_socket());
                there.run("migrate-incoming", json!({ "uri": to }));
                drop(there);
                migrate_by_qemu(&mut pair.source, &mut other, &to, before);
            }
        }
    }
}

/// The next migration may begin at once, even if the last worker still says goodbye to its peer.
#[test]
fn the_next_one_begins_at_once() {
    for version in VERSIONS {
        let mut pair = start(version);
        for learns in [Learns::ByEvent, Learns::ByAsking] {
            let uri = format!("rdma:127.0.0.1:{}", free_port());
            let mut next =
                Wrapped::start(&pair.dir, &format!("{learns:?}"), &pair.config.clone().incoming());
            next.client.run("migrate-incoming", json!({ "uri": uri }));
            pair.begin(16);
            pair.source.await_status(&["active"]);
            pair.source.client.run("migrate_cancel", json!({}));
            await_end(&mut pair.source.client, learns);
            pair.source.client.run("migrate", json!({ "uri": uri }));
            pair.source.client.run("migrate_cancel", json!({}));
            pair.source.await_status(&["cancelled"]);
            pair.source.runs_on();
            pair.new_destination();
        }
        pair.source.client.run("migrate-set-parameters", json!({ "downtime-limit": 8000 }));
        pair.migrate();
    }
}
