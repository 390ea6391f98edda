//! Each thread of a worker that panics is noticed: the migration ends, and the guest runs on.

use std::time::{Duration, Instant};

use crate::support::{Config, Host, Pair, Qmp, eventually};
use serde_json::json;

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
    pair.source.client.run("migrate", json!({ "uri": uri }));
    let end = pair.source.await_status(&["failed", "completed", "cancelled"]);
    end["error-desc"].as_str().unwrap_or_default().to_owned()
}

/// It did, as the system's own report of it says.
#[track_caller]
fn assert_panicked(host: &Host, thread: &str) {
    let report = format!("thread '{thread}' ");
    eventually("the system's report", || {
        let log = host.helper.log();
        (log.contains(&report) && log.contains("on demand")).then_some(())
    });
}

/// The longest that it may take until a migration has ended of it: less than the stall timeout, in which
/// everything ends that waits for somebody who says nothing.
const PROMPT: Duration = Duration::from_secs(30);

/// The migration fails of it, and soon. Whose thread it is says so: to its client, and in its log.
#[track_caller]
fn fails(thread: &'static str, at_source: bool) {
    let mut pair = pair(thread, 400, at_source);
    let begun = Instant::now();
    let why = migrate(&mut pair, 16);
    let took = begun.elapsed();
    let end = if at_source { "source" } else { "destination" };
    println!("| {end} | {thread} | {took:?} | {why} |");
    assert!(took < PROMPT, "{took:?}: {why}");
    let lost = format!("'{thread}' panicked (on demand)");
    if at_source {
        assert!(why.contains(&lost), "{why}");
        assert_panicked(&pair.source, thread);
    } else {
        assert!(!why.is_empty());
        assert_panicked(&pair.destination, thread);
        eventually("the reason", || pair.destination.helper.log().contains(&lost).then_some(()));
    }
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
    fails("stream reader", true);
}

#[test]
fn that_takes_a_channel() {
    fails("channel", true);
}

#[test]
fn that_hears_the_destinations_answers() {
    fails("reply reader", true);
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
    fails("receiver", false);
}

#[test]
fn that_lets_sources_in() {
    fails("acceptor", false);
    fails("accept", false);
    fails("greeting", false);
    fails("source", false);
}

#[test]
fn that_looks_at_the_time() {
    fails("deadline", true);
    fails("deadline", false);
}

#[test]
fn that_forwards_the_return_path() {
    fails("return path", false);
}

/// What it does is a help, and no more.
#[test]
fn that_makes_large_pages() {
    let mut pair = pair("prefault", 0, true);
    assert_eq!(migrate(&mut pair, 4096), "");
    assert_panicked(&pair.source, "prefault");
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

/// The guest runs at the destination, and the source's helper can't know that.
#[test]
fn that_tells_the_source_of_the_end() {
    let mut pair = pair("final ack", 0, false);
    let why = migrate(&mut pair, 4096);
    println!("| destination | final ack | {why} |");
    assert!(!why.is_empty());
    assert_panicked(&pair.destination, "final ack");
    pair.destination.await_status(&["completed"]);
    pair.destination.client.run("cont", json!({}));
    pair.destination.qemu.assert_goes_on();
    pair.destination.helper.await_no_worker();
    assert_eq!(pair.source.qemu.status(), "postmigrate");
}

/// Why the source has ended it the destination doesn't hear then; that it has, it does.
#[test]
fn that_tells_the_peer_why() {
    let mut pair = pair("last words", 0, true);
    let limit = json!({ "max-bandwidth": 16 << 20 });
    pair.source.client.run("migrate-set-parameters", limit);
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    pair.source.await_status(&["active"]);
    pair.source.client.run("migrate_cancel", json!({}));
    pair.source.await_status(&["cancelled"]);
    assert_panicked(&pair.source, "last words");
    eventually("the log's line", || {
        pair.source.helper.log().contains("the peer may not know why").then_some(())
    });
    pair.destination.helper.await_no_worker();
    assert_eq!(pair.source.qemu.status(), "running");
    pair.source.qemu.assert_goes_on();
    pair.source.helper.await_no_worker();
}
