//! Migrations over real verbs: between helpers, and with a stock QEMU at either end.
//!
//! They need an RDMA device: `scripts/lab/test` runs them in a machine that has one. Elsewhere they
//! say so and do nothing.

mod support;

use serde_json::json;
use support::{Config, Guest, Pair, free_port};

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
