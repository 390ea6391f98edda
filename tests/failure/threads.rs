//! A panic of any thread of a worker is noticed: the migration ends, and the guest keeps running.

use std::time::{Duration, Instant};

use crate::support::{Config, Host, Pair, Qmp, eventually};
use serde_json::json;

/// A pair in which `thread`, at one end, panics instead of doing its work, `after` milliseconds
/// after its start, when other threads wait for it.
fn pair(thread: &str, after: u32, at_source: bool) -> Pair {
    // Leaked: a test has only a few of them.
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

/// Migrate at `rate` MiB/s. Return why that failed, or an empty string.
fn migrate(pair: &mut Pair, rate: u64) -> String {
    let limit = json!({ "max-bandwidth": rate << 20 });
    pair.source.client.run("migrate-set-parameters", limit);
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    let end = pair.source.await_status(&["failed", "completed", "cancelled"]);
    end["error-desc"].as_str().unwrap_or_default().to_owned()
}

/// Assert that `thread` panicked, by the panic message in the log.
#[track_caller]
fn assert_panicked(host: &Host, thread: &str) {
    let report = format!("thread '{thread}' ");
    eventually("the system's report", || {
        let log = host.helper.log();
        (log.contains(&report) && log.contains("on demand")).then_some(())
    });
}

/// Time limit for a panic to end the migration.
///
/// It is shorter than the stall timeout, which ends every wait for a silent peer anyway.
const PROMPT: Duration = Duration::from_secs(30);

/// Assert that the panic fails the migration promptly, and that the end with that thread reports
/// it: the source to its client, the destination in its log.
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
    // Not at the destination: one that waited for a source waits for the next.
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

/// Prefaulting is only a help: the migration succeeds without it.
#[test]
fn that_makes_large_pages() {
    let mut pair = pair("prefault", 0, true);
    assert_eq!(migrate(&mut pair, 4096), "");
    assert_panicked(&pair.source, "prefault");
    pair.verify();
}

/// The source's QEMU does not wait forever to hear that the destination's has the guest.
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

/// A panic of a relay's task, which neither the worker nor QEMU notices, fails the migration too.
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
        // QEMU's settings are restored.
        let mut qemu = Qmp::connect(&pair.source.qemu.spare_socket());
        assert_eq!(qemu.hmp("info migrate_capabilities"), {
            pair.source.client.hmp("info migrate_capabilities")
        });
    }
}

/// The guest runs at the destination only, although the source's helper cannot know that it does.
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

/// The destination learns that the source has ended the migration, even if it cannot learn why.
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
