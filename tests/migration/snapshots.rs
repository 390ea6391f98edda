//! Snapshots and other migrations while a migration has borrowed settings that affect them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use crate::support::{
    Config, Guest, Qmp, VERSIONS, eventually, free_port,
    image::make_image,
    wrapped::{Wrapped, WrappedPair},
};
use serde_json::json;

const BUSY: &str = "There's a migration process in progress";

/// Start a guest whose memory is private, so that its migrations borrow multifd.
fn start(version: &'static str) -> WrappedPair {
    let guest = Guest::Dirty { fill: 48, hot: 32, spin: 0 };
    let mut pair = WrappedPair::start(&Config { version, guest, mib: 96, ..Config::default() });
    let image = pair.dir.path().join("disk.qcow2");
    make_image(&mut pair.source.client, image.to_str().unwrap());
    pair
}

fn is_busy(text: &str) -> bool {
    text == format!("Error: {BUSY}\r\n")
}

fn cancel(source: &mut Wrapped) {
    source.client.run("migrate_cancel", json!({}));
    let end = source.await_status(&["cancelled", "failed", "completed", "none"]);
    assert_eq!(end["status"], "cancelled", "{end}");
}

/// While multifd is borrowed, snapshots and other migrations are refused: QEMU would crash without
/// channels for them.
#[test]
fn nothing_else_goes_by_borrowed_settings() {
    for version in VERSIONS {
        let mut pair = start(version);
        assert_eq!(pair.source.client.hmp("savevm one"), "");
        pair.begin(16);
        pair.source.await_status(&["active"]);
        let other = format!("tcp:127.0.0.1:{}", free_port());
        let client = &mut pair.source.client;
        for line in ["savevm two", "loadvm one", &format!("migrate -d {other}")] {
            let text = client.hmp(line);
            assert!(is_busy(&text), "{version}: {line}: {text}");
        }
        let why = client.refused("migrate", json!({ "uri": other }));
        assert!(why.contains(BUSY), "{why}");
        let snapshot =
            json!({"job-id": "job", "tag": "one", "vmstate": "disk", "devices": ["disk"]});
        for command in ["snapshot-save", "snapshot-load"] {
            let why = client.refused(command, snapshot.clone());
            assert!(why.contains(BUSY), "{command}: {why}");
        }
        // The helper's migration goes on and is shown.
        assert_eq!(pair.source.await_status(&["active"])["status"], "active");
        cancel(&mut pair.source);
        assert_eq!(pair.source.client.hmp("savevm two"), "");
        assert_eq!(pair.source.client.hmp("loadvm one"), "");
        pair.source.runs_on();
        pair.new_destination();
        pair.migrate();
    }
}

/// Another monitor's snapshots are made or refused at any time, also while settings are borrowed or
/// restored.
#[test]
fn snapshots_are_made_at_any_time() {
    for version in VERSIONS {
        let mut pair = start(version);
        let done = Arc::new(AtomicBool::new(false));
        let mut other = Qmp::connect(&pair.source.qemu.spare_socket());
        let saving = thread::spawn({
            let done = done.clone();
            move || {
                let (mut made, mut refused) = (0, 0);
                while !done.load(Ordering::SeqCst) {
                    let text = other.hmp("savevm one");
                    assert!(text.is_empty() || is_busy(&text), "{text}");
                    *(if text.is_empty() { &mut made } else { &mut refused }) += 1;
                }
                (made, refused)
            }
        });
        for _ in 0..3 {
            // QEMU itself refuses a migration while it makes a snapshot.
            let uri = format!("rdma:127.0.0.1:{}", free_port());
            pair.destination.client.run("migrate-incoming", json!({ "uri": uri }));
            let migrate = json!({ "uri": uri });
            while pair.source.client.try_execute("migrate", &migrate).is_err() {}
            let client = &mut pair.source.client;
            let ends = |client: &Qmp| {
                let states = client.migration_states();
                states.iter().filter(|state| *state == "cancelled").count()
            };
            let before = ends(client);
            client.run("migrate_cancel", json!({}));
            // `query-migrate` may already show the next snapshot.
            eventually("the end", || {
                client.run("query-version", json!({}));
                (ends(client) > before).then_some(())
            });
            pair.source.runs_on();
            pair.new_destination();
        }
        done.store(true, Ordering::SeqCst);
        let (made, refused) = saving.join().unwrap();
        println!("{version}: {made} made, {refused} refused");
        assert!(made > 0);
        pair.migrate();
    }
}

/// A snapshot after a failed migration is shown as QEMU reports it, not as that migration.
#[test]
fn a_snapshot_after_a_migration_that_failed_is_shown_as_it_went() {
    for version in VERSIONS {
        let mut pair = start(version);
        let client = &mut pair.source.client;
        client.fails_to_migrate("rdma:127.0.0.1:1");
        let before = client.migration_states().len();
        assert_eq!(client.hmp("savevm one"), "");
        let state = client.run("query-migrate", json!({}));
        assert_eq!(state["status"], "completed", "{version}: {state}");
        assert_eq!(client.migration_states()[before..], ["setup", "completed"], "{version}");
    }
}
