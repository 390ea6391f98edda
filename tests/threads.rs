//! Each thread of a worker that panics is noticed: the migration ends, and the guest runs on.

mod support;

use serde_json::json;
use support::{Config, Host, Pair, Qmp, eventually};

/// A pair whose thread of this name, at one end, panics instead of doing its work, so many milliseconds
/// after it began: others have come to wait for it.
fn pair(thread: &str, after: u32, at_source: bool) -> Pair {
    // There are a few of them in the life of a test.
    let panics: &'static str = format!("QEMU_RDMA_HELPER_TEST_PANIC={thread}:{after}").leak();
    let under: &'static [&'static str] = vec!["env", panics].leak();
    let panics = Config { under, ..Config::default() };
    let dir = tempfile::tempdir().unwrap();
    let options = ["--connections", "2", "--stall-timeout", "60"];
    let start = |name, here| {
        let config = if here { panics.clone() } else { Config::default() };
        let config = if name == "source" { config } else { config.incoming() };
        Host::with_helper(&dir, name, &config, &options)
    };
    let (source, destination) = (start("source", at_source), start("destination", !at_source));
    let mut pair = Pair { source, destination, dir };
    for host in [&mut pair.source, &mut pair.destination] {
        host.client.capability("return-path", true);
        host.client.capability("events", true);
    }
    pair.source.qemu.await_guest();
    pair
}

/// Migrate at so many MiB a second; returns why that failed.
fn migrate(pair: &mut Pair, rate: u64) -> String {
    let limit = json!({ "max-bandwidth": rate << 20 });
    pair.source.client.run("migrate-set-parameters", limit);
    let uri = pair.listen();
    match pair.source.client.execute("migrate", json!({ "uri": uri })) {
        Ok(_) => {
            let end = pair.source.await_status(&["failed", "completed", "cancelled"]);
            end["error-desc"].as_str().unwrap_or_default().to_owned()
        }
        Err(refused) => refused["desc"].as_str().unwrap().to_owned(),
    }
}

/// It did, as the system's own report of it says.
#[track_caller]
fn assert_panicked(host: &Host, thread: &str) {
    let report = format!("thread '{thread}' ");
    let log = host.helper.log();
    assert!(log.contains(&report) && log.contains("on demand"), "{log}");
}

#[track_caller]
fn fails(thread: &'static str, at_source: bool) {
    let mut pair = pair(thread, 400, at_source);
    let why = migrate(&mut pair, 16);
    println!("| {} | {thread} | {why} |", if at_source { "source" } else { "destination" });
    assert!(!why.is_empty());
    assert_panicked(if at_source { &pair.source } else { &pair.destination }, thread);
    eventually("the guest to run", || (pair.source.qemu.status() == "running").then_some(()));
    pair.source.qemu.assert_goes_on();
    // Who waited for a source waits for the next one.
    pair.source.helper.await_no_worker();
}

#[test]
fn that_connects() {
    fails("connect", true);
}

#[test]
fn that_takes_the_sources_stream() {
    fails("intake", true);
}

#[test]
fn that_takes_a_channel() {
    fails("channel", true);
}

#[test]
fn that_hears_the_destinations_answers() {
    fails("answers", true);
}

#[test]
fn that_hears_the_relay() {
    fails("orders", true);
    fails("orders", false);
}

#[test]
fn that_receives_on_another_connection() {
    fails("writes", true);
    fails("writes", false);
}

#[test]
fn that_lands_what_the_source_sends() {
    fails("landing", false);
}

#[test]
fn that_lets_sources_in() {
    fails("door", false);
    fails("accept", false);
    fails("greeting", false);
}

#[test]
fn that_forwards_the_return_path() {
    fails("return path", false);
}

/// What it does is a help, and no more.
#[test]
fn that_makes_large_pages() {
    let mut pair = pair("holes", 0, true);
    assert_eq!(migrate(&mut pair, 4096), "");
    assert_panicked(&pair.source, "holes");
    pair.verify();
}

/// The destination's QEMU has the guest, and the source's waits for ever to hear that.
#[test]
fn that_forwards_the_return_path_at_the_end() {
    let mut pair = pair("return path", 4000, false);
    pair.source.client.capability("pause-before-switchover", true);
    let limit = json!({ "max-bandwidth": 1_u64 << 32 });
    pair.source.client.run("migrate-set-parameters", limit);
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    pair.source.await_status(&["pre-switchover"]);
    pair.source.client.run("migrate-continue", json!({ "state": "pre-switchover" }));
    let end = pair.source.await_status(&["failed", "completed", "cancelled"]);
    assert_eq!(end["status"], "completed", "{end}");
    assert_panicked(&pair.destination, "return path");
    pair.verify();
}

/// The relay's tasks, of whose end neither the worker nor QEMU hears.
#[test]
fn tasks_of_the_relay() {
    for (task, after) in [("prepare", 0), ("follow", 400)] {
        let mut pair = pair(task, after, true);
        let why = migrate(&mut pair, 16);
        println!("| source | {task} | {why} |");
        assert!(why.contains(&format!("'{task}' panicked (on demand)")), "{why}");
        eventually("the guest to run", || (pair.source.qemu.status() == "running").then_some(()));
        pair.source.qemu.assert_goes_on();
        pair.source.helper.await_no_worker();
        // QEMU is set back.
        let mut qemu = Qmp::connect(&pair.source.qemu.spare_socket());
        assert_eq!(qemu.hmp("info migrate_capabilities"), {
            pair.source.client.hmp("info migrate_capabilities")
        });
    }
}
