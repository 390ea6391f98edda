//! Migrations over real verbs: between helpers, and with a stock QEMU at either end.
//!
//! They need an RDMA device: `scripts/lab/test` runs them in a machine that has one. Elsewhere they
//! say so and do nothing.

mod support;

use rustix::process::Signal;
use serde_json::json;
use support::{Config, Guest, Pair, eventually, free_port, helper::signal_process};

/// With and without `rdma-pin-all` and `return-path`.
const CASES: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

/// Is there a device?
fn lab() -> bool {
    let here = support::in_lab();
    if !here {
        println!("skipped: no RDMA device; scripts/lab/test has one");
    }
    here
}

/// The machine is slow: small, and busy enough.
fn config() -> Config {
    let guest = Guest::Dirty { fill: 40, hot: 4, spin: 3000 };
    Config { mib: 96, guest, ..Config::default() }
}

fn pair(pin_all: bool, return_path: bool) -> Pair {
    let mut pair = Pair::start(&config());
    for host in [&mut pair.source, &mut pair.destination] {
        host.client.capability("rdma-pin-all", pin_all);
        host.client.capability("return-path", return_path);
    }
    pair
}

#[test]
fn from_helper_to_helper() {
    if !lab() {
        return;
    }
    for (pin_all, return_path) in CASES {
        println!("pin-all {pin_all}, return-path {return_path}");
        let mut pair = pair(pin_all, return_path);
        pair.migrate();
        pair.verify();
    }
}

#[test]
fn from_helper_to_stock_qemu() {
    if !lab() {
        return;
    }
    for (pin_all, return_path) in CASES {
        println!("pin-all {pin_all}, return-path {return_path}");
        let mut pair = pair(pin_all, return_path);
        let uri = format!("rdma:{}:{}", support::address(), free_port());
        pair.destination.qemu.qmp.run("migrate-incoming", json!({ "uri": uri }));
        pair.source.client.run("migrate", json!({ "uri": uri }));
        let end = pair.source.await_status(&["completed", "failed", "cancelled"]);
        assert_eq!(end["status"], "completed", "{end}");
        pair.verify();
        pair.source.helper.await_no_worker();
    }
}

#[test]
fn from_stock_qemu_to_helper() {
    if !lab() {
        return;
    }
    for (pin_all, return_path) in CASES {
        println!("pin-all {pin_all}, return-path {return_path}");
        let mut pair = pair(pin_all, return_path);
        let uri = pair.listen();
        pair.source.qemu.qmp.run("migrate", json!({ "uri": uri }));
        pair.destination.await_status(&["completed"]);
        pair.source.await_status(&["completed"]);
        pair.verify();
        pair.destination.helper.await_no_worker();
    }
}

/// QEMU 7.2 takes a return path over RDMA only with postcopy.
#[test]
fn with_qemu_7_2_at_both_ends() {
    if !lab() {
        return;
    }
    let config = Config { version: "7.2", ..config() };
    for stock in [None, Some("source"), Some("destination")] {
        println!("stock: {stock:?}");
        let mut pair = Pair::start(&config);
        let uri = format!("rdma:{}:{}", support::address(), free_port());
        let arguments = json!({ "uri": uri });
        match stock {
            Some("destination") => {
                pair.destination.qemu.qmp.run("migrate-incoming", arguments.clone())
            }
            _ => pair.destination.client.run("migrate-incoming", arguments.clone()),
        };
        match stock {
            Some("source") => pair.source.qemu.qmp.run("migrate", arguments),
            _ => pair.source.client.run("migrate", arguments),
        };
        let end = pair.source.await_status(&["completed", "failed", "cancelled"]);
        assert_eq!(end["status"], "completed", "{end}");
        pair.destination.await_status(&["completed"]);
        pair.verify();
    }
}

/// Registering gives holes memory, so that is bounded by what is written around them.
#[test]
fn most_of_the_memory_that_was_never_touched_stays_a_hole() {
    if !lab() {
        return;
    }
    let mut pair = Pair::start(&Config { mib: 512, ..config() });
    pair.migrate();
    let allocated = support::memory::allocated(&mut pair.destination.qemu, "ram0");
    pair.verify();
    assert!(allocated < 100 << 20, "{} MiB are allocated at the destination", allocated >> 20);
}

/// What a balloon gives back may come back as another page: nothing of it stays registered.
#[test]
fn with_a_balloon() {
    if !lab() {
        return;
    }
    let devices = vec!["-device virtio-balloon-pci".into()];
    for pin_all in [false, true] {
        let mut pair = Pair::start(&Config { devices: devices.clone(), ..config() });
        pair.source.client.capability("rdma-pin-all", pin_all);
        let uri = pair.listen();
        in_mid_transfer(&mut pair, &uri);
        let pinned = support::helper::pinned(pair.source.helper.await_worker());
        assert!((1..32 << 20).contains(&pinned), "{} MiB are pinned", pinned >> 20);
        let limit = json!({ "max-bandwidth": 1_u64 << 32 });
        pair.source.client.run("migrate-set-parameters", limit);
        let end = pair.source.await_status(&["completed", "failed"]);
        assert_eq!(end["status"], "completed", "{end}");
        pair.verify();
    }
}

/// The guest runs at the source, a second migration to a new destination succeeds.
fn migrates_after_all(mut pair: Pair) {
    eventually("the guest to run", || (pair.source.qemu.status() == "running").then_some(()));
    pair.source.qemu.assert_goes_on();
    pair.source.helper.await_no_worker();
    let limit = json!({ "max-bandwidth": 1_u64 << 32 });
    pair.source.client.run("migrate-set-parameters", limit);
    pair.new_destination(&config(), "second");
    pair.migrate();
    pair.verify();
}

/// Start a migration to `uri`, slowly, and wait until RAM has moved.
fn in_mid_transfer(pair: &mut Pair, uri: &str) {
    let limit = json!({ "max-bandwidth": 4 << 20 });
    pair.source.client.run("migrate-set-parameters", limit);
    pair.source.client.run("migrate", json!({ "uri": uri }));
    eventually("RAM to move", || {
        let state = pair.source.client.run("query-migrate", json!({}));
        (state["ram"]["transferred"].as_u64().unwrap_or(0) > 1 << 20).then_some(())
    });
}

#[test]
fn a_destination_that_dies() {
    if !lab() {
        return;
    }
    for stock in [false, true] {
        let mut pair = Pair::start(&config());
        let uri = if stock {
            let uri = format!("rdma:{}:{}", support::address(), free_port());
            pair.destination.qemu.qmp.run("migrate-incoming", json!({ "uri": uri }));
            uri
        } else {
            pair.listen()
        };
        in_mid_transfer(&mut pair, &uri);
        if stock {
            pair.destination.qemu.kill();
        } else {
            let worker = pair.destination.helper.await_worker();
            signal_process(worker, Signal::KILL);
        }
        let end = pair.source.await_status(&["failed", "completed"]);
        println!("error-desc: {}", end["error-desc"]);
        assert_eq!(end["status"], "failed", "{end}");
        migrates_after_all(pair);
    }
}

#[test]
fn cancelled_with_a_stock_destination() {
    if !lab() {
        return;
    }
    let mut pair = Pair::start(&config());
    let uri = format!("rdma:{}:{}", support::address(), free_port());
    pair.destination.qemu.qmp.run("migrate-incoming", json!({ "uri": uri }));
    in_mid_transfer(&mut pair, &uri);
    pair.source.client.run("migrate_cancel", json!({}));
    pair.source.await_status(&["cancelled"]);
    eventually("the destination's QEMU to end", || pair.destination.qemu.child.try_wait().unwrap());
    migrates_after_all(pair);
}

#[test]
fn destinations_that_are_not_there() {
    if !lab() {
        return;
    }
    let mut pair = Pair::start(&config());
    for (host, words) in
        [("127.0.0.1", "no RDMA device leads to"), (&*support::address(), "refused")]
    {
        let uri = format!("rdma:{host}:{}", free_port());
        let error = pair.source.client.refused("migrate", json!({ "uri": uri }));
        println!("{error}");
        assert!(error.contains(words), "{error}");
    }
    let uri = json!({ "uri": "rdma:192.0.2.1:4444" });
    let error = pair.destination.client.refused("migrate-incoming", uri);
    println!("{error}");
    assert!(error.contains("no RDMA device") || error.contains("Cannot listen"), "{error}");
    pair.migrate();
    pair.verify();
}
