use serde_json::json;

use super::*;
use crate::{control::Progress, relay::migration::status::Phase};

/// QEMU's text and `query-migrate` at the same moment, one pair per line.
const RECORDED: &str = include_str!("../../../../../tests/data/info-migrate.jsonl");

const V7_2: Version = Version { major: 7, minor: 2, micro: 22 };
const V11_1: Version = Version { major: 11, minor: 1, micro: 3 };

fn version(text: &str) -> Version {
    let (major, minor) = text.split_once('.').unwrap();
    Version { major: major.parse().unwrap(), minor: minor.parse().unwrap(), micro: 0 }
}

fn recorded() -> impl Iterator<Item = (Version, String, Value)> {
    RECORDED.lines().map(|line| {
        let mut said: Value = serde_json::from_str(line).unwrap();
        let text = said["text"].as_str().unwrap().to_owned();
        (version(said["version"].as_str().unwrap()), text, said["reply"].take())
    })
}

/// A view without rows of its own.
fn view() -> View {
    View { phase: Phase::Running, ..View::new(Side::Source) }
}

fn with_figures() -> View {
    let progress = Progress {
        fabric: "verbs".into(),
        pinned: 3 << 20,
        pin_ms: 7,
        connections: 1,
        ..Progress::default()
    };
    View { progress, ..view() }
}

#[test]
fn it_is_qemus_own_text() {
    let mut states = Vec::new();
    for (version, text, reply) in recorded() {
        assert_eq!(view().overlay_text(version, &text, &reply), text, "{version}: {reply}");
        states.push((version.major, reply["status"].as_str().unwrap_or("none").to_owned()));
    }
    for major in [7, 10, 11] {
        for status in ["none", "setup", "pre-switchover", "completed", "failed", "cancelled"] {
            assert!(states.contains(&(major, status.into())), "{major}, {status}");
        }
    }
}

/// Remove what only QEMU knows of its own migration.
fn without_cache(text: &str) -> String {
    let begins = ["cache size", "xbzrle", "XBZRLE", "  miss_rate"];
    let lines = text.lines().filter(|line| !begins.iter().any(|begin| line.starts_with(begin)));
    lines.flat_map(|line| [line, "\r\n"]).collect()
}

/// Whatever QEMU's own migration is: none, or one that ended otherwise.
#[test]
fn it_is_made_where_qemu_has_another() {
    // Compare only texts of the same query with the same blockers.
    let alike = |one: &str, other: &str| {
        ["lobals:", "blocked:"].iter().all(|word| one.contains(word) == other.contains(word))
    };
    let mut made = 0;
    for (version, expected, reply) in recorded() {
        for (_, text, _) in recorded().filter(|it| it.0 == version && alike(&it.1, &expected)) {
            let shown = view().overlay_text(version, &text, &reply);
            assert_eq!(without_cache(&shown), without_cache(&expected), "{version}: {text}");
            made += 1;
        }
    }
    assert!(made > 200, "{made}");
}

#[test]
fn figures_of_the_helper_come_at_the_end() {
    let reply = json!({ "status": "active", "total-time": 5, "ram": { "total": 1 << 20 } });
    let text = with_figures().overlay_text(V7_2, "globals:\r\n", &reply);
    assert!(
        text.starts_with("globals:\r\nMigration status: active\r\ntotal time: 5 ms\r\n"),
        "{text}"
    );
    assert!(text.ends_with("rdma fabric: verbs\r\nrdma pinned: 3072 kbytes in 7 ms\r\n"), "{text}");
    let text = with_figures().overlay_text(V11_1, "", &reply);
    assert!(
        text.starts_with("Status: \t\tactive\r\nTime (ms): \t\ttotal=5\r\nRAM info:\r\n"),
        "{text}"
    );
    let own =
        "RDMA info:\r\n  Fabric: \t\tverbs\r\n  Pinned: \t\t3 MiB\r\n  Pin Time (ms): \t7\r\n";
    assert!(text.ends_with(own), "{text}");
    // A destination has no such figures.
    let destination = View { side: Side::Destination, ..with_figures() };
    let text = destination.overlay_text(V7_2, "globals:\r\n", &json!({ "status": "active" }));
    assert!(text.ends_with("Migration status: active\r\ntotal time: 0 ms\r\n"), "{text}");
}

#[test]
fn a_failure_says_why() {
    let reply = json!({ "status": "failed", "error-desc": "It broke" });
    let text = view().overlay_text(V7_2, "", &reply);
    assert_eq!(text, "Migration status: failed (It broke)\r\ntotal time: 0 ms\r\n");
    assert_eq!(view().overlay_text(V11_1, "", &reply), "Status: \t\tfailed (It broke)\r\n");
}

#[test]
fn a_destination_listens_at_rdma() {
    let socket = |host: &str| json!({ "type": "inet", "host": host, "port": "4444" });
    let reply = json!({ "status": "setup", "socket-address": [socket("::1"), socket("h")] });
    let view = View::new(Side::Destination);
    let text = view.overlay_text(V11_1, "", &reply);
    let sockets = "Sockets: [\r\n\trdma:[::1]:4444\r\n\trdma:h:4444\r\n]\r\n";
    assert_eq!(text, format!("Status: \t\tsetup\r\n{sockets}"));
    let text = view.overlay_text(V7_2, "globals:\r\n", &reply);
    assert!(text.contains("ms\r\nsocket address: [\r\n\trdma:[::1]:4444\r\n"), "{text}");
}

#[test]
fn sizes_are_qemus() {
    for (bytes, expected) in [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (67_641_344, "64.5 MiB"),
        (517_017, "505 KiB"),
        (1_023_950, "1e+03 KiB"),
        (1_024_000, "0.977 MiB"),
        (5 << 40, "5 TiB"),
        (u64::MAX, "16 EiB"),
    ] {
        assert_eq!(size(bytes), expected);
    }
}
