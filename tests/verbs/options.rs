//! The RDMA options of `attach`: `--connections` and `--pin-limit`.
//!
//! They need an RDMA device: `scripts/lab/test` runs them in a machine that has one. Elsewhere they
//! are skipped.

use crate::support::{Config, Guest, Host, Pair, eventually, free_port, helper};
use serde_json::{Value, json};

/// Bytes that a worker pins for messages: 16 + 8 buffers for receiving and 8 for sending.
const BUFFERS: u64 = 32 * (512 << 10);

fn config() -> Config {
    let guest = Guest::Dirty { fill: 40, hot: 4, spin: 3000 };
    Config { mib: 96, guest, ..Config::default() }
}

fn pair(source: &[&str], destination: &[&str]) -> Pair {
    let dir = tempfile::tempdir().unwrap();
    let source = Host::with_helper(&dir, "source", &config(), source);
    let destination = Host::with_helper(&dir, "destination", &config().incoming(), destination);
    let mut pair = Pair { source, destination, dir };
    pair.source.qemu.await_guest();
    pair
}

/// Migrate to `uri`. Return the last figures, and the most that a worker had pinned.
fn migrate(pair: &mut Pair, uri: &str) -> (Value, u64) {
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 32 }));
    pair.source.client.run("migrate", json!({ "uri": uri }));
    let mut pinned = 0;
    loop {
        let workers = [&pair.source, &pair.destination].map(|host| host.helper.workers());
        pinned = workers.iter().flatten().map(|it| helper::pinned(*it)).fold(pinned, u64::max);
        let state = pair.source.client.run("query-migrate", json!({}));
        match state["status"].as_str() {
            Some("completed") => break,
            Some("failed" | "cancelled") => panic!("{state}"),
            _ => {}
        }
    }
    // The last event arrives when the worker has reported its end.
    let last = |data: &Value| data["remaining"] == 0;
    let event = pair.source.client.await_event("RDMA_MIGRATION_THROUGHPUT", last);
    (event["data"].clone(), pinned)
}

#[test]
fn with_several_queue_pairs() {
    if !crate::support::lab() {
        return;
    }
    for (source, destination, connections) in [("16", "16", 16), ("4", "2", 2), ("1", "3", 1)] {
        let options = |count| ["--connections", count];
        let mut pair = pair(&options(source), &options(destination));
        let uri = pair.listen();
        let (figures, _) = migrate(&mut pair, &uri);
        assert_eq!(figures["connections"], connections);
        pair.verify();
    }
}

/// 40 MiB and more migrate with 16 MiB pinned.
#[test]
fn with_a_pin_limit() {
    if !crate::support::lab() {
        return;
    }
    let limit = &["--pin-limit", "16m"][..];
    for (source, destination) in [(limit, &[][..]), (&[][..], limit)] {
        let mut pair = pair(source, destination);
        let uri = pair.listen();
        let (figures, pinned) = migrate(&mut pair, &uri);
        assert!((BUFFERS + (1 << 20)..=BUFFERS + (16 << 20)).contains(&pinned), "{pinned}");
        assert!(figures["pin-time"].as_u64().unwrap() > 0, "{figures}");
        pair.verify();
    }
    println!("to a stock QEMU");
    let mut pair = pair(limit, &[]);
    let uri = format!("rdma:{}:{}", crate::support::address(), free_port());
    pair.destination.qemu.qmp.run("migrate-incoming", json!({ "uri": uri }));
    let (_, pinned) = migrate(&mut pair, &uri);
    assert!((BUFFERS + (1 << 20)..=BUFFERS + (16 << 20)).contains(&pinned), "{pinned}");
    pair.verify();
}

/// `rdma-pin-all` is refused at either end if the guest's RAM exceeds `--pin-limit`.
#[test]
fn pin_all_beyond_the_pin_limit() {
    if !crate::support::lab() {
        return;
    }
    let limit = &["--pin-limit", "64m"][..];
    for (source, destination) in [(limit, &[][..]), (&[][..], limit)] {
        let mut pair = pair(source, destination);
        let uri = pair.listen();
        pair.source.client.capability("rdma-pin-all", true);
        let error = pair.source.client.fails_to_migrate(&uri);
        println!("{error}");
        assert!(error.contains("--pin-limit allows 64 MiB; raise it"), "{error}");
        pair.source.qemu.assert_goes_on();
        pair.source.client.capability("rdma-pin-all", false);
        migrate(&mut pair, &uri);
        pair.verify();
    }
}

/// A stock source never unregisters memory, so a small `--pin-limit` fails its migration with a
/// hint.
#[test]
fn a_stock_source_beyond_the_pin_limit() {
    if !crate::support::lab() {
        return;
    }
    let mut pair = pair(&[], &["--pin-limit", "16m"]);
    let uri = pair.listen();
    pair.source.qemu.qmp.run("migrate", json!({ "uri": uri }));
    pair.source.await_status(&["failed"]);
    let line = eventually("the destination's reason", || {
        let log = pair.destination.helper.log();
        log.lines().find(|line| line.contains("migration failed")).map(str::to_owned)
    });
    println!("{line}");
    assert!(line.contains("the destination's --pin-limit, and releases none; raise it"), "{line}");
    pair.source.qemu.assert_goes_on();
}
