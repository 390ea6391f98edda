//! Migrations from a QEMU that announces shared RAM without its content (qemu-patches/).
//!
//! scripts/qemu-patched builds it; the tests run only when named: `cargo test --test patched`.

#[path = "../support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use support::{Config, Guest, Memory, Pair, Proxy, eventually, helper::signal_process, memory};

const CAPABILITIES: [&str; 2] = ["return-path", "x-shared-ram-external"];

/// Pages of a guest with [`config`].
const PAGES: u64 = 192 << 20 >> 12;

fn config() -> Config {
    Config { version: "patched", ..Config::default() }
}

fn migrates(config: &Config) -> (Pair, Value) {
    let mut pair = Pair::start(config);
    let end = pair.migrate();
    pair.verify();
    assert_announced(&end);
    (pair, end)
}

/// Assert that RAM was announced: QEMU finds zero pages only in what it sends with content.
#[track_caller]
fn assert_announced(state: &Value) {
    let ram = &state["ram"];
    let (normal, zero) = (ram["normal"].as_u64().unwrap(), ram["duplicate"].as_u64().unwrap());
    let pages = ram["total"].as_u64().unwrap() / 4096;
    // ROMs are not announced.
    assert!(normal + zero >= pages && zero < 4096, "{ram}");
}

fn port_of(uri: &str) -> u16 {
    uri.rsplit(':').next().unwrap().parse().unwrap()
}

/// Assert that QEMU's own capabilities are `at_qemu`, and off for a client of the helper.
#[track_caller]
fn assert_capabilities(pair: &mut Pair, at_qemu: bool) {
    let states = |reply: &Value| -> Vec<bool> {
        let is_on = |name: &str| {
            let found = reply.as_array().unwrap().iter().find(|entry| entry["capability"] == name);
            found.unwrap()["state"].as_bool().unwrap()
        };
        CAPABILITIES.map(is_on).to_vec()
    };
    let query = ("query-migrate-capabilities", json!({}));
    assert_eq!(states(&pair.source.qemu.qmp.run(query.0, query.1.clone())), [at_qemu; 2]);
    assert_eq!(states(&pair.source.client.run(query.0, query.1)), [false; 2]);
    let text = pair.source.client.hmp("info migrate_capabilities");
    assert!(text.contains("x-shared-ram-external: off"), "{text}");
}

#[test]
fn busy_guest() {
    let (mut pair, _) = migrates(&config());
    assert_capabilities(&mut pair, false);
    let expected = ["setup", "active", "device", "completed"];
    assert_eq!(pair.source.client.migration_states(), expected);
}

/// Capabilities that a client has set stay set.
#[test]
fn where_the_client_has_set_it() {
    let mut pair = Pair::start(&config());
    for name in CAPABILITIES {
        pair.source.client.capability(name, true);
    }
    let end = pair.migrate();
    assert_announced(&end);
    pair.verify();
    let capabilities = pair.source.client.run("query-migrate-capabilities", json!({}));
    for name in CAPABILITIES {
        let on = json!({ "capability": name, "state": true });
        assert!(capabilities.as_array().unwrap().contains(&on), "{capabilities}");
    }
}

/// Return the number of pages that QEMU counted as data.
fn normal(pair: &mut Pair) -> u64 {
    let state = pair.source.client.run("query-migrate", json!({}));
    state["ram"]["normal"].as_u64().unwrap_or(0)
}

/// Begin a migration at `mib` MiB a second, and wait until some RAM has moved.
fn begin_slowly(pair: &mut Pair, mib: u64) {
    let limit = json!({ "max-bandwidth": mib << 20 });
    pair.source.client.run("migrate-set-parameters", limit);
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    eventually("some RAM", || (normal(pair) > 2048).then_some(()));
}

/// QEMU is not asked to announce pages that must stay in the stream, as the destination shares
/// nothing.
#[test]
fn not_where_the_destination_shares_nothing() {
    let mut pair = Pair::start(&Config { memory: Memory::PcRam, ..config() });
    pair.new_destination(&Config { memory: Memory::Private, ..config() }, "private");
    let end = pair.migrate();
    assert!(end["ram"]["duplicate"].as_u64().unwrap() > PAGES / 4, "{end}");
    pair.verify();
    assert_capabilities(&mut pair, false);
}

#[test]
fn settings_are_back_when_the_worker_dies() {
    let mut pair = Pair::start(&config());
    begin_slowly(&mut pair, 16);
    assert_capabilities(&mut pair, true);
    signal_process(pair.source.helper.await_worker(), Signal::KILL);
    pair.source.await_status(&["failed"]);
    assert_capabilities(&mut pair, false);
    pair.source.qemu.assert_goes_on();
}

#[test]
fn to_a_qemu_that_knows_nothing_of_it() {
    let stock = Config { version: "10.0", ..Config::default() };
    let mut pair = Pair::start(&config());
    pair.new_destination(&stock, "stock");
    let end = pair.migrate();
    assert_announced(&end);
    // Versions and blocks are the same at both ends.
    pair.verify();
}

#[test]
fn several_blocks() {
    migrates(&Config { memory: Memory::Numa, ..config() });
}

#[test]
fn a_file_on_tmpfs() {
    migrates(&Config { memory: Memory::File, ..config() });
}

#[test]
fn huge_pages_of_2_mib() {
    support::huge_pages().unwrap();
    migrates(&Config { memory: Memory::Huge, ..config() });
}

#[test]
fn linux_with_direct_reads_in_flight() {
    migrates(&config().with_direct_reads());
}

#[test]
fn untouched_memory_stays_unallocated_on_both_sides() {
    let guest = Guest::Dirty { fill: 16, hot: 4, spin: 3000 };
    let mut pair = Pair::start(&Config { mib: 512, guest, ..config() });
    let before = memory::allocated(&mut pair.source.qemu, "ram0");
    let end = pair.migrate();
    assert_announced(&end);
    let after = memory::allocated(&mut pair.source.qemu, "ram0");
    let there = memory::allocated(&mut pair.destination.qemu, "ram0");
    println!("allocated: source {before} before, {after} after, destination {there}");
    assert!(before < 64 << 20, "{before}");
    // Firmware and devices touch some memory meanwhile.
    assert!(after <= before + (1 << 20), "{before} {after}");
    assert!(there <= after + after / 20, "{after} {there}");
    // Holes do not count as transferred.
    assert!(end["ram"]["transferred"].as_u64().unwrap() < 256 << 20, "{end}");
    pair.verify();
}

/// Holes take no bandwidth, even under a limit at which their bytes would take long.
#[test]
fn untouched_memory_is_no_bandwidth() {
    let guest = Guest::Dirty { fill: 8, hot: 0, spin: 0 };
    let mut pair = Pair::start(&Config { mib: 2048, guest, ..config() });
    let limit = json!({ "max-bandwidth": 64 << 20 });
    pair.source.client.run("migrate-set-parameters", limit);
    let end = pair.migrate();
    let took = end["total-time"].as_u64().unwrap();
    // Its bytes would take 32 s.
    assert!(took < 8000, "{took} ms");
    pair.verify();
}

#[test]
fn cancelled_and_begun_again() {
    let mut pair = Pair::start(&config());
    for _ in 0..2 {
        let limit = json!({ "max-bandwidth": 16 << 20 });
        pair.source.client.run("migrate-set-parameters", limit);
        let uri = pair.listen();
        pair.source.client.run("migrate", json!({ "uri": uri }));
        eventually("half a pass", || {
            let state = pair.source.client.run("query-migrate", json!({}));
            (state["ram"]["normal"].as_u64()? > 2048).then_some(())
        });
        pair.source.client.run("migrate_cancel", json!({}));
        pair.source.await_status(&["cancelled"]);
        assert_capabilities(&mut pair, false);
        pair.source.helper.await_no_worker();
        pair.source.qemu.assert_goes_on();
        pair.new_destination(&config(), "again");
    }
    let limit = json!({ "max-bandwidth": 1_u64 << 32 });
    pair.source.client.run("migrate-set-parameters", limit);
    pair.migrate();
    pair.verify();
}

/// Only pages that have landed are acknowledged, and QEMU waits for a stopped destination.
#[test]
fn a_destination_that_stands_still_holds_the_source() {
    let mut pair = Pair::start(&config());
    begin_slowly(&mut pair, 32);
    let worker = pair.destination.helper.await_worker();
    signal_process(worker, Signal::STOP);
    // Sockets and windows fill up, and then nothing moves.
    let mut last = (0, Instant::now());
    eventually("a halt", || {
        let now = normal(&mut pair);
        if now != last.0 {
            last = (now, Instant::now());
        }
        (last.1.elapsed() > Duration::from_secs(2)).then_some(())
    });
    assert!(last.0 < PAGES / 2, "{} of {PAGES} pages were announced", last.0);
    pair.source.qemu.assert_goes_on();
    signal_process(worker, Signal::CONT);
    let limit = json!({ "max-bandwidth": 1_u64 << 32 });
    pair.source.client.run("migrate-set-parameters", limit);
    pair.source.await_status(&["completed"]);
    pair.verify();
}

/// QEMU knows the fabric's bandwidth, so it does not stop the guest too early over a slow link.
#[test]
fn downtime_limit_holds_over_a_slow_link() {
    let guest = Guest::Dirty { fill: 96, hot: 48, spin: 0 };
    let mut pair = Pair::start(&Config { guest, ..config() });
    let set = |pair: &mut Pair, limit: u64| {
        pair.source.client.run("migrate-set-parameters", json!({ "downtime-limit": limit }));
    };
    set(&mut pair, 150);
    let uri = pair.listen();
    let proxy = Proxy::throttled(port_of(&uri), 128 << 20);
    let uri = format!("rdma:127.0.0.1:{}", proxy.port);
    pair.source.client.run("migrate", json!({ "uri": uri }));
    let expected = eventually("the fifth pass", || {
        let state = pair.source.client.run("query-migrate", json!({}));
        assert_eq!(pair.source.qemu.status(), "running", "{state}");
        let passes = state["ram"]["dirty-sync-count"].as_u64()?;
        (passes >= 5).then(|| state["expected-downtime"].as_u64())?
    });
    // 48 MiB at 128 MiB/s take 375 ms.
    assert!((250..800).contains(&expected), "{expected} ms");
    set(&mut pair, 1000);
    let end = pair.source.await_status(&["completed", "failed"]);
    let downtime = end["downtime"].as_u64().unwrap();
    println!("downtime {downtime} ms, expected before {expected} ms");
    assert!(downtime < 1000, "{end}");
    pair.verify();
}
