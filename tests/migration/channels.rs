//! Multifd channels between QEMU and the source's helper, which nobody else sees.

use std::os::unix::fs::FileTypeExt as _;

use crate::support::{Config, Guest, Helper, Host, Pair, Qmp, VERSIONS, eventually};
use serde_json::{Value, json};

/// 32 MiB are hot, and at most 32 MiB/s are allowed: the migration never converges.
const BUSY: Guest = Guest::Dirty { fill: 48, hot: 32, spin: 0 };

/// Return whether multifd is on, and the number of channels.
fn settings(qemu: &mut Qmp) -> (bool, u64) {
    let capabilities = qemu.run("query-migrate-capabilities", json!({}));
    let parameters = qemu.run("query-migrate-parameters", json!({}));
    (multifd(&capabilities), parameters["multifd-channels"].as_u64().unwrap())
}

fn multifd(capabilities: &Value) -> bool {
    let mut capabilities = capabilities.as_array().unwrap().iter();
    capabilities.find(|entry| entry["capability"] == "multifd").unwrap()["state"] == true
}

/// Begin a migration that does not end by itself.
fn begin(pair: &mut Pair) {
    let uri = pair.listen();
    let client = &mut pair.source.client;
    client.run("migrate-set-parameters", json!({ "max-bandwidth": 16 << 20, "downtime-limit": 1 }));
    client.run("migrate", json!({ "uri": uri }));
    client.await_event("MIGRATION_PASS", |data| data["pass"].as_u64() >= Some(2));
}

#[test]
fn a_busy_guest_through_any_number_of_channels() {
    for version in VERSIONS {
        for channels in ["0", "1", "2", "4", "16"] {
            let guest = Guest::Dirty { fill: 64, hot: 8, spin: 2000 };
            let config = Config { version, guest, ..Config::default() };
            let mut pair = Pair::start(&config);
            let socket = pair.source.qemu.helper_socket();
            pair.source.helper.kill();
            let options = ["--channels", channels];
            pair.source.helper = Helper::attach(pair.dir.path(), "source", &socket, &options);
            pair.source.client = Qmp::connect(&pair.source.helper.socket);
            pair.migrate();
            pair.verify();
            let log = pair.source.helper.log();
            let used = log.contains(&format!("QEMU sends through {channels} channels"));
            assert_eq!(used, channels != "0", "{version}, {channels} channels: {log}");
        }
    }
}

/// Video memory and ROMs are not shared: their pages move from the channels into the stream.
#[test]
fn pages_that_are_not_shared_come_through_channels_too() {
    let devices = vec!["-vga std".to_owned()];
    let mut pair = Pair::start(&Config { devices, ..Config::default() });
    pair.migrate();
    assert_eq!(pair.source.transferred_as("0000:00:02.0/vga.vram"), "Inline");
    pair.verify();
}

#[test]
fn management_sees_nothing_of_it() {
    let mut pair = Pair::start(&Config { guest: BUSY, ..Config::default() });
    let chosen = json!({ "multifd-channels": 5, "multifd-compression": "zlib" });
    pair.source.client.run("migrate-set-parameters", chosen);
    let mut qemu = Qmp::connect(&pair.source.qemu.spare_socket());
    assert_eq!(settings(&mut qemu), (false, 5));
    begin(&mut pair);
    assert_eq!(settings(&mut qemu), (true, 2));
    let client = &mut pair.source.client;
    assert_eq!(settings(client), (false, 5));
    let parameters = client.run("query-migrate-parameters", json!({}));
    assert_eq!(parameters["multifd-compression"], "zlib");
    assert!(client.hmp("info migrate_capabilities").contains("multifd: off\r\n"));
    let text = client.hmp("info migrate_parameters");
    assert!(text.contains("multifd-channels: 5\r\n"), "{text}");
    assert!(text.contains("multifd-compression: zlib\r\n"), "{text}");
    let ram = client.run("query-migrate", json!({}))["ram"].clone();
    assert_eq!(ram["multifd-bytes"], 0);
    assert!(ram["precopy-bytes"].as_u64() > Some(32 << 20), "{ram}");
    let text = client.hmp("info migrate");
    assert!(!text.contains("multifd bytes:") || text.contains("multifd bytes: 0 kbytes"), "{text}");
    client.run(
        "migrate-set-parameters",
        json!({ "max-bandwidth": 1_u64 << 32, "downtime-limit": 8000 }),
    );
    let end = pair.source.await_status(&["completed", "failed"]);
    assert_eq!(end["status"], "completed", "{end}");
    assert_eq!(settings(&mut qemu), (false, 5));
    let parameters = qemu.run("query-migrate-parameters", json!({}));
    assert_eq!(parameters["multifd-compression"], "zlib");
    pair.verify();
}

/// A client that sees the end may begin another migration over anything, because QEMU is set back.
#[test]
fn qemu_is_set_back_before_the_end_is_seen() {
    let config = Config { guest: BUSY, ..Config::default() };
    let mut pair = Pair::start(&config);
    let mut qemu = Qmp::connect(&pair.source.qemu.spare_socket());
    let ends: [fn(&mut Pair); 3] = [
        |pair| {
            pair.source.client.run("migrate_cancel", json!({}));
        },
        |pair| pair.destination.qemu.kill(),
        |pair| {
            crate::support::helper::signal_process(
                pair.source.helper.await_worker(),
                rustix::process::Signal::KILL,
            )
        },
    ];
    for (turn, end) in ends.into_iter().enumerate() {
        begin(&mut pair);
        assert_eq!(settings(&mut qemu), (true, 2));
        pair.source.client.events.clear();
        end(&mut pair);
        pair.source.client.await_event("MIGRATION", |data| {
            data["status"] == "failed" || data["status"] == "cancelled"
        });
        assert_eq!(settings(&mut qemu), (false, 2));
        pair.source.qemu.assert_goes_on();
        pair.new_destination(&config, &format!("next-{turn}"));
    }
    let limits = json!({ "max-bandwidth": 1_u64 << 32, "downtime-limit": 8000 });
    pair.source.client.run("migrate-set-parameters", limits);
    pair.migrate();
    pair.verify();
}

/// If the relay is killed, the worker restores QEMU's settings.
#[test]
fn qemu_is_set_back_when_the_relay_is_killed() {
    let mut pair = Pair::start(&Config { guest: BUSY, ..Config::default() });
    let mut qemu = Qmp::connect(&pair.source.qemu.spare_socket());
    begin(&mut pair);
    assert_eq!(settings(&mut qemu), (true, 2));
    pair.source.helper.kill();
    eventually("the settings", || (settings(&mut qemu) == (false, 2)).then_some(()));
    pair.source.qemu.assert_goes_on();
}

/// Where QEMU can't connect to the helper's socket, it uses no channels.
#[test]
fn a_qemu_that_reaches_no_socket_uses_no_channels() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    // The path of the relay's socket is longer than QEMU's, and too long here.
    let mut deep = pair.dir.path().to_owned();
    while deep.as_os_str().len() < 85 {
        deep.push("d".repeat((89 - deep.as_os_str().len()).min(40)));
    }
    std::fs::create_dir_all(&deep).unwrap();
    let socket = deep.join("q");
    std::fs::hard_link(pair.source.qemu.helper_socket(), &socket).unwrap();
    pair.source.helper.kill();
    let nowhere = "TMPDIR=/nonexistent";
    pair.source.helper =
        Helper::attach_under(&["env", nowhere], pair.dir.path(), "source", &socket, &[]);
    pair.source.client = Qmp::connect(&pair.source.helper.socket);
    pair.migrate();
    assert!(!pair.source.helper.log().contains("QEMU sends through"));
    pair.verify();
}

/// A migration leaves neither a socket nor a chardev.
#[test]
fn nothing_is_left_behind() {
    let mut pair = Pair::start(&Config::default());
    let before = pair.source.client.run("query-chardev", json!({}));
    pair.migrate();
    assert_eq!(pair.source.client.run("query-chardev", json!({})), before);
    let sockets = |host: &Host| {
        let entries = std::fs::read_dir(host.qemu.helper_socket().parent().unwrap()).unwrap();
        let sockets =
            entries.filter(|entry| entry.as_ref().unwrap().file_type().unwrap().is_socket());
        sockets.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>()
    };
    let left = sockets(&pair.source);
    assert!(
        !left.iter().any(|name| name.to_string_lossy().starts_with("qemu-rdma-helper-")),
        "{left:?}"
    );
}

/// The switchover of a guest that its client has stopped is not limited, as over `tcp:`. QEMU sends no
/// STOP for it, and its monitor waits until all of RAM is sent.
#[test]
fn a_stopped_guest_switches_over_at_full_speed() {
    for version in VERSIONS {
        let guest = Guest::Dirty { fill: 448, hot: 1, spin: 0 };
        let mut pair = Pair::start(&Config { version, mib: 512, guest, ..Config::default() });
        pair.source.qemu.await_guest();
        let uri = pair.listen();
        let client = &mut pair.source.client;
        client.run("stop", json!({}));
        // Everything that is left may be sent after the switchover.
        let slow = json!({ "max-bandwidth": 1 << 20, "downtime-limit": 2_000_000 });
        client.run("migrate-set-parameters", slow);
        client.run("migrate", json!({ "uri": uri }));
        let end = pair.source.await_status(&["completed", "failed"]);
        assert_eq!(end["status"], "completed", "{version}: {end}");
        pair.verify();
    }
}

/// QEMU's monitor answers at the lowest `max-bandwidth`. A refused `device_add` waits in the main
/// loop until no thread holds the RCU lock, which those with a full channel hold.
#[test]
fn qemu_answers_at_the_lowest_limit() {
    for version in VERSIONS {
        let mut pair = Pair::start(&Config { version, guest: BUSY, ..Config::default() });
        begin(&mut pair);
        assert!(settings(&mut Qmp::connect(&pair.source.qemu.spare_socket())).0, "{version}");
        let client = &mut pair.source.client;
        client.run("migrate-set-parameters", json!({ "max-bandwidth": 10 }));
        for _ in 0..3 {
            let why = client.refused("device_add", json!({ "driver": "pci-testdev" }));
            assert_eq!(why, "device_add not allowed while migrating", "{version}");
        }
        client.run("migrate_cancel", json!({}));
        pair.source.await_status(&["cancelled"]);
        pair.source.qemu.assert_goes_on();
    }
}
