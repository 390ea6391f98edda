//! `run` over RDMA: relay and workers have dropped the privileges that they don't need.

use crate::support::{Config, Memory, wrapped::WrappedPair};
use serde_json::json;

fn migrates(pin_all: bool) {
    let config = Config { memory: Memory::Private, mib: 128, ..Config::default() };
    let mut pair = WrappedPair::start(&config);
    for host in [&mut pair.source, &mut pair.destination] {
        host.client.capability("rdma-pin-all", pin_all);
    }
    pair.migrate();
    let info = pair.source.client.run("query-rdma-helper", json!({}));
    assert_eq!(info["fabric"], "verbs");
    let block = info["blocks"].as_array().unwrap().iter().find(|block| block["name"] == "pc.ram");
    assert_eq!(block.unwrap()["transfer-mode"], "direct");
    if pin_all {
        let event = |event: &&serde_json::Value| event["event"] == "RDMA_MIGRATION_THROUGHPUT";
        let last = pair.source.client.events.iter().rfind(event).unwrap().clone();
        assert!(last["data"]["pinned"].as_u64().unwrap() >= 128 << 20, "{last}");
    }
}

#[test]
fn under_run() {
    if crate::support::lab() {
        migrates(false);
    }
}

#[test]
fn under_run_with_pin_all() {
    if crate::support::lab() {
        migrates(true);
    }
}
