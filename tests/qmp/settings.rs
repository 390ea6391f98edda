//! Settings that a migration has borrowed: clients see and change only their own values.

use std::{
    io,
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use crate::support::{
    Config, Guest, Pair, Qmp, VERSIONS, eventually, free_port, helper::signal_process,
    wrapped::WrappedPair,
};
use rustix::process::Signal;
use serde_json::{Value, json};

/// 32 MiB are hot, and at most 32 MiB/s are allowed: the migration never converges.
const BUSY: Guest = Guest::Dirty { fill: 48, hot: 32, spin: 0 };

fn busy(version: &'static str) -> Config {
    Config { version, guest: BUSY, ..Config::default() }
}

/// Begin a migration that does not end by itself.
fn begin(pair: &mut Pair) {
    let uri = pair.listen();
    let client = &mut pair.source.client;
    client.run("migrate-set-parameters", json!({ "max-bandwidth": 16 << 20, "downtime-limit": 1 }));
    client.run("migrate", json!({ "uri": uri }));
    pair.source.await_status(&["active"]);
}

fn channels(qmp: &mut Qmp) -> (u64, String) {
    let parameters = qmp.run("query-migrate-parameters", json!({}));
    let compression = parameters["multifd-compression"].as_str().unwrap().to_owned();
    (parameters["multifd-channels"].as_u64().unwrap(), compression)
}

fn is_on(qmp: &mut Qmp, name: &str) -> bool {
    let capabilities = qmp.run("query-migrate-capabilities", json!({}));
    let mut capabilities = capabilities.as_array().unwrap().iter();
    capabilities.find(|entry| entry["capability"] == name).unwrap()["state"] == true
}

/// Assert that the client sees each of its changes at once, by any command, and QEMU none of them.
#[track_caller]
fn write_all(client: &mut Qmp, qemu: &mut Qmp) {
    let borrowed = (channels(qemu), is_on(qemu, "multifd"));
    assert_eq!(borrowed, ((2, "none".into()), true));
    let set = |client: &mut Qmp, arguments| client.run("migrate-set-parameters", arguments);
    set(client, json!({ "multifd-channels": 7 }));
    assert_eq!(channels(client).0, 7);
    set(client, json!({ "multifd-compression": "zlib" }));
    assert_eq!(channels(client), (7, "zlib".into()));
    set(
        client,
        json!({ "multifd-channels": 9, "announce-rounds": 6, "multifd-compression": "none" }),
    );
    assert_eq!(channels(client), (9, "none".into()));
    assert_eq!(qemu.run("query-migrate-parameters", json!({}))["announce-rounds"], 6);
    for (line, expected) in [
        ("migrate_set_parameter multifd-channels 0x10", 16),
        ("\tmigrate_set_parameter  \"multifd-channels\"\t011", 9),
        ("migrate_set_parameter multifd-channels +5", 5),
    ] {
        assert_eq!(client.hmp(line), "", "{line}");
        assert_eq!(channels(client), (expected, "none".into()), "{line}");
    }
    assert_eq!(client.hmp("migrate_set_parameter multifd-compression zlib"), "");
    let text = client.hmp("info migrate_parameters");
    assert!(text.contains("multifd-channels: 5\r\nmultifd-compression: zlib\r\n"), "{text}");
    // Write back what was shown.
    let shown = client.run("query-migrate-parameters", json!({}));
    set(client, shown.clone());
    assert_eq!(client.run("query-migrate-parameters", json!({})), shown);
    assert_eq!((channels(qemu), is_on(qemu, "multifd")), borrowed);
}

/// Assert that refused commands change nothing and get QEMU's error. `other` is a QEMU that does
/// not migrate.
#[track_caller]
fn refuse_all(client: &mut Qmp, qemu: &mut Qmp, other: &mut Qmp) {
    let before = client.run("query-migrate-parameters", json!({}));
    for arguments in [
        json!({ "multifd-channels": 0 }),
        json!({ "multifd-channels": 256 }),
        json!({ "multifd-channels": -1 }),
        json!({ "multifd-channels": "7" }),
        json!({ "multifd-channels": null }),
        json!({ "multifd-compression": "foo" }),
        json!({ "multifd-compression": 7 }),
        json!({ "multifd-channels": 7, "nonsense": 1 }),
        json!({ "multifd-channels": 7, "max-bandwidth": "fast" }),
        json!({ "multifd-channels": 7, "max-cpu-throttle": 0 }),
        json!({ "multifd-channels": 0, "max-cpu-throttle": 0 }),
    ] {
        let ours = client.refused("migrate-set-parameters", arguments.clone());
        assert_eq!(ours, other.refused("migrate-set-parameters", arguments));
    }
    for line in [
        "multifd-channels",
        "multifd-channels 0",
        "multifd-channels 300",
        "multifd-channels many",
        "multifd-channels \"7",
        "multifd-channels 7 x",
        "multifd-channels ",
        "multifd-compression foo",
        "multifd 7",
    ] {
        let line = format!("migrate_set_parameter {line}");
        let ours = client.hmp(&line);
        assert_ne!(ours, "", "{line}");
        assert_eq!(ours, other.hmp(&line), "{line}");
    }
    // QEMU changes no capability while it migrates.
    let off = json!([{ "capability": "multifd", "state": false }]);
    let both = json!([{ "capability": "events", "state": false }, off[0]]);
    let wrong = json!([{ "capability": "multifd", "state": "off" }]);
    for capabilities in [off, both, wrong, json!([{ "capability": "multifd" }]), json!(7)] {
        let arguments = json!({ "capabilities": capabilities });
        let ours = client.refused("migrate-set-capabilities", arguments.clone());
        assert_eq!(ours, qemu.refused("migrate-set-capabilities", arguments));
    }
    for line in ["multifd off", "\"multifd\" on", "multifd maybe", "multifd off x", "multifd"] {
        let line = format!("migrate_set_capability {line}");
        let ours = client.hmp(&line);
        assert_ne!(ours, "", "{line}");
        assert_eq!(ours, qemu.hmp(&line), "{line}");
    }
    assert_eq!(client.run("query-migrate-parameters", json!({})), before);
    assert!(!is_on(client, "multifd") && is_on(client, "events"));
}

/// Settings changed in any phase of a migration apply when it completes.
#[test]
fn what_is_written_meanwhile_is_kept() {
    for version in VERSIONS {
        let mut pair = Pair::start(&busy(version));
        pair.source.client.capability("pause-before-switchover", true);
        for host in [&mut pair.source, &mut pair.destination] {
            host.client.capability("return-path", true);
        }
        let mut qemu = Qmp::connect(&pair.source.qemu.spare_socket());
        let mut other = Qmp::connect(&pair.destination.qemu.spare_socket());
        let both = |pair: &mut Pair, qemu: &mut Qmp, other: &mut Qmp| {
            write_all(&mut pair.source.client, qemu);
            refuse_all(&mut pair.source.client, qemu, other);
        };
        begin(&mut pair);
        both(&mut pair, &mut qemu, &mut other);
        let client = &mut pair.source.client;
        client.await_event("MIGRATION_PASS", |data| data["pass"].as_u64() >= Some(2));
        both(&mut pair, &mut qemu, &mut other);
        let blockers = pair.source.client.run("query-rdma-migrate-blockers", json!({}));
        assert_eq!(blockers, json!([]));
        let fast = json!({ "max-bandwidth": 1_u64 << 32, "downtime-limit": 8000 });
        pair.source.client.run("migrate-set-parameters", fast);
        pair.source.await_status(&["pre-switchover"]);
        both(&mut pair, &mut qemu, &mut other);
        // QEMU waits for the stopped destination.
        let destination = pair.destination.qemu.pid();
        signal_process(destination, Signal::STOP);
        pair.source.client.run("migrate-continue", json!({ "state": "pre-switchover" }));
        pair.source.await_status(&["device"]);
        write_all(&mut pair.source.client, &mut qemu);
        signal_process(destination, Signal::CONT);
        let end = pair.source.await_status(&["completed", "failed"]);
        assert_eq!(end["status"], "completed", "{end}");
        assert_eq!(channels(&mut qemu), (5, "zlib".into()));
        assert!(!is_on(&mut qemu, "multifd"));
        pair.verify();
    }
}

/// Settings changed during a migration apply however it fails. If the relay dies, the worker sets
/// them.
#[test]
fn what_was_written_is_there_after_a_failure() {
    let ends: [fn(&mut Pair); 4] = [
        |pair| drop(pair.source.client.run("migrate_cancel", json!({}))),
        |pair| pair.destination.qemu.kill(),
        |pair| signal_process(pair.source.helper.await_worker(), Signal::KILL),
        |pair| pair.source.helper.kill(),
    ];
    for version in VERSIONS {
        let config = busy(version);
        let mut pair = Pair::start(&config);
        let mut qemu = Qmp::connect(&pair.source.qemu.spare_socket());
        for (turn, end) in ends.into_iter().enumerate() {
            let expected = (turn as u64 + 11, "zlib".to_owned());
            begin(&mut pair);
            assert!(is_on(&mut qemu, "multifd"));
            let written = json!({ "multifd-channels": expected.0, "multifd-compression": "zlib" });
            pair.source.client.run("migrate-set-parameters", written);
            end(&mut pair);
            let set_back = |qemu: &mut Qmp| !is_on(qemu, "multifd") && channels(qemu) == expected;
            eventually("what was written", || set_back(&mut qemu).then_some(()));
            pair.source.qemu.assert_goes_on();
            let none = json!({ "multifd-compression": "none" });
            qemu.run("migrate-set-parameters", none);
            if turn + 1 < ends.len() {
                pair.source.await_status(&["failed", "cancelled"]);
                pair.source.helper.await_no_worker();
                pair.new_destination(&config, &format!("next-{turn}"));
            }
        }
    }
}

/// No change by another monitor is lost, whether settings are being borrowed, restored or in
/// between.
#[test]
fn no_write_is_lost_at_any_time() {
    for version in VERSIONS {
        let mut pair = WrappedPair::start(&busy(version));
        let done = Arc::new(AtomicBool::new(false));
        let mut writer = Qmp::connect(&pair.source.qemu.spare_socket());
        let writing = thread::spawn({
            let done = done.clone();
            move || {
                let mut count = 0;
                while !done.load(Ordering::SeqCst) {
                    let number = count % 255 + 1;
                    let compression = ["none", "zlib"][count as usize % 2];
                    let expected = (number, compression.to_owned());
                    if count % 3 == 0 {
                        let line = |name, value: &dyn std::fmt::Display| {
                            format!("migrate_set_parameter {name} {value}")
                        };
                        assert_eq!(writer.hmp(&line("multifd-channels", &number)), "");
                        assert_eq!(writer.hmp(&line("multifd-compression", &compression)), "");
                    } else {
                        let both = json!({ "multifd-channels": number, "multifd-compression": compression });
                        writer.run("migrate-set-parameters", both);
                    }
                    assert_eq!(channels(&mut writer), expected);
                    count += 1;
                }
                (writer, count)
            }
        });
        for _ in 0..3 {
            pair.begin(16);
            pair.source.await_status(&["active"]);
            pair.source.client.run("migrate_cancel", json!({}));
            pair.source.await_status(&["cancelled"]);
            pair.source.runs_on();
            pair.new_destination();
        }
        pair.source.client.run("migrate-set-parameters", json!({ "downtime-limit": 8000 }));
        pair.migrate();
        done.store(true, Ordering::SeqCst);
        let (mut writer, count) = writing.join().unwrap();
        println!("{version}: {count} writes");
        let last = (count - 1) % 255 + 1;
        assert_eq!(channels(&mut writer).0, last);
        assert_eq!(channels(&mut pair.source.client).0, last);
    }
}

/// Return this QEMU's values of the parameter `mode`, except the one that migrates all memory.
fn modes(qmp: &mut Qmp) -> Vec<String> {
    let schema = qmp.run("query-qmp-schema", json!({}));
    let entries = schema.as_array().unwrap();
    let lists = entries.iter().filter(|entry| entry["meta-type"] == "enum");
    let values = |entry: &Value| -> Vec<String> {
        let values = entry["values"].as_array().unwrap().iter();
        values.map(|value| value.as_str().unwrap().to_owned()).collect()
    };
    let modes = lists.map(values).find(|list| list.contains(&"cpr-reboot".to_owned()));
    modes.unwrap_or_default().into_iter().filter(|mode| mode != "normal").collect()
}

#[test]
fn any_mode_but_normal_is_refused() {
    for version in VERSIONS {
        let mut pair = Pair::start(&Config { version, ..Config::default() });
        let arguments = json!({ "uri": format!("rdma:127.0.0.1:{}", free_port()) });
        let modes = modes(&mut pair.source.client);
        assert_eq!(modes.is_empty(), version == "7.2", "{modes:?}");
        for mode in &modes {
            for (host, command) in
                [(&mut pair.destination, "migrate-incoming"), (&mut pair.source, "migrate")]
            {
                host.client.run("migrate-set-parameters", json!({ "mode": mode }));
                let why = host.client.refused(command, arguments.clone());
                println!("{version}: {why}");
                assert!(why.contains(mode) && why.contains("migrate_set_parameter mode normal"));
                let blockers = host.client.run("query-rdma-migrate-blockers", json!({}));
                assert!(blockers[0]["reason"].as_str().unwrap().contains(mode), "{blockers}");
                host.client.run("migrate-set-parameters", json!({ "mode": "normal" }));
            }
        }
        pair.migrate();
        pair.verify();
    }
}

/// Connect the source with the destination at port `to`.
fn connect_through(source: &TcpStream, to: u16) {
    let destination = TcpStream::connect(("127.0.0.1", to)).unwrap();
    for (from, into) in [(source, &destination), (&destination, source)] {
        let (mut from, mut into) = (from.try_clone().unwrap(), into.try_clone().unwrap());
        thread::spawn(move || {
            let _ = io::copy(&mut from, &mut into);
            let _ = into.shutdown(Shutdown::Both);
        });
    }
}

/// A `mode` set between the client's `migrate` and QEMU's fails the migration, with a hint.
#[test]
fn a_mode_that_is_set_while_the_source_connects_is_refused() {
    for version in ["10.0", "11.1"] {
        let config = Config { version, ..Config::default() };
        let mut pair = Pair::start(&config);
        let to = pair.listen();
        let between = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("rdma:{}", between.local_addr().unwrap());
        pair.source.client.run("migrate", json!({ "uri": uri }));
        let (source, _) = between.accept().unwrap();
        let mut qemu = Qmp::connect(&pair.source.qemu.spare_socket());
        qemu.run("migrate-set-parameters", json!({ "mode": "cpr-transfer" }));
        connect_through(&source, to.rsplit(':').next().unwrap().parse().unwrap());
        let end = pair.source.await_status(&["failed", "completed"]);
        assert_eq!(end["status"], "failed", "{end}");
        let why = end["error-desc"].as_str().unwrap();
        assert!(why.contains("migrate_set_parameter mode normal"), "{why}");
        pair.source.qemu.assert_goes_on();
        qemu.run("migrate-set-parameters", json!({ "mode": "normal" }));
        pair.new_destination(&config, "next");
        pair.migrate();
        pair.verify();
    }
}

/// A `mode` set during a migration applies after it. Else QEMU would leave out what it has not
/// sent.
#[test]
fn a_mode_that_is_set_meanwhile_is_kept() {
    for (version, helper_options) in [("10.0", "2"), ("11.1", "2"), ("11.1", "0")] {
        let config = busy(version);
        let mut pair = Pair::start(&config);
        with_channels(&mut pair, helper_options);
        let mut qemu = Qmp::connect(&pair.source.qemu.spare_socket());
        begin(&mut pair);
        let mode = |qmp: &mut Qmp| qmp.run("query-migrate-parameters", json!({}))["mode"].clone();
        let client = &mut pair.source.client;
        client.run("migrate-set-parameters", json!({ "mode": "cpr-transfer" }));
        assert_eq!(mode(client), "cpr-transfer");
        assert_eq!(client.hmp("migrate_set_parameter mode cpr-reboot"), "");
        assert_eq!((mode(client), mode(&mut qemu)), (json!("cpr-reboot"), json!("normal")));
        let fast = json!({ "max-bandwidth": 1_u64 << 32, "downtime-limit": 8000 });
        client.run("migrate-set-parameters", fast);
        let end = pair.source.await_status(&["completed", "failed"]);
        assert_eq!(end["status"], "completed", "{end}");
        assert_eq!(mode(&mut qemu), "cpr-reboot");
        pair.verify();
    }
}

/// Restart the source's helper with this number of channels.
fn with_channels(pair: &mut Pair, channels: &str) {
    let socket = pair.source.qemu.helper_socket();
    pair.source.helper.kill();
    let options = ["--channels", channels];
    pair.source.helper =
        crate::support::Helper::attach(pair.dir.path(), "source", &socket, &options);
    pair.source.client = Qmp::connect(&pair.source.helper.socket);
}

/// A migration fails if QEMU leaves out memory: here `mode` is set without the helper. (If the
/// guest ran, QEMU would abort.)
#[test]
fn a_migration_that_leaves_out_memory_fails() {
    let config = busy("11.1");
    let mut pair = Pair::start(&config);
    let mut qemu = Qmp::connect(&pair.source.qemu.spare_socket());
    pair.source.client.run("stop", json!({}));
    begin(&mut pair);
    qemu.run("migrate-set-parameters", json!({ "mode": "cpr-transfer" }));
    let fast = json!({ "max-bandwidth": 1_u64 << 32, "downtime-limit": 8000 });
    pair.source.client.run("migrate-set-parameters", fast);
    let end = pair.source.await_status(&["completed", "failed"]);
    println!("{end}");
    assert_eq!(end["status"], "failed", "{end}");
    let why = end["error-desc"].as_str().unwrap();
    assert!(why.contains("did not send all of the guest's memory"), "{why}");
    pair.source.helper.await_no_worker();
    qemu.run("migrate-set-parameters", json!({ "mode": "normal" }));
    pair.source.client.run("cont", json!({}));
    pair.source.qemu.assert_goes_on();
    pair.new_destination(&config, "next");
    pair.migrate();
    pair.verify();
}

/// Capabilities that crash QEMU if set in the middle of a stream; multifd also at the end of one
/// without channels.
const DANGEROUS: [&str; 2] = ["multifd", "x-ignore-shared"];

#[test]
fn what_would_end_a_destination_that_waits_is_kept_from_it() {
    for version in VERSIONS {
        let mut pair = Pair::start(&Config { version, ..Config::default() });
        let uri = json!(format!("rdma:127.0.0.1:{}", free_port()));
        let exit = json!({ "uri": uri, "exit-on-error": false });
        let arguments = if version == "7.2" { json!({ "uri": uri }) } else { exit };
        let client = &mut pair.destination.client;
        client.run("migrate-incoming", arguments);
        let mut qemu = Qmp::connect(&pair.destination.qemu.spare_socket());
        for capability in DANGEROUS {
            client.capability(capability, true);
            assert_eq!(client.hmp(&format!("migrate_set_capability {capability} off")), "");
            assert!(!is_on(client, capability));
            assert_eq!(client.hmp(&format!("migrate_set_capability {capability} on")), "");
            assert!(is_on(client, capability));
            assert!(!is_on(&mut qemu, capability), "{capability}");
        }
        signal_process(pair.destination.helper.await_worker(), Signal::KILL);
        if version == "7.2" {
            // It exits when a migration fails.
            let status = pair.destination.qemu.child.wait().unwrap();
            assert_eq!(status.code(), Some(1), "{status}");
            continue;
        }
        for capability in DANGEROUS {
            eventually("what was written", || is_on(&mut qemu, capability).then_some(()));
            assert!(is_on(&mut pair.destination.client, capability));
        }
        assert_eq!(qemu.run("query-migrate", json!({}))["status"], "failed");
    }
}

/// A destination gets all memory even if told to ignore shared memory: under the helper all is
/// shared.
#[test]
fn a_destination_that_is_told_to_ignore_shared_memory_gets_it() {
    for version in VERSIONS {
        let mut pair = Pair::start(&Config { version, ..Config::default() });
        let uri = pair.listen();
        pair.source.client.run("migrate", json!({ "uri": uri }));
        // QEMU's stream begins when it is continued.
        signal_process(pair.source.qemu.pid(), Signal::STOP);
        eventually("an agreement", || {
            pair.destination.helper.log().contains("block lists agree").then_some(())
        });
        let client = &mut pair.destination.client;
        client.capability("x-ignore-shared", true);
        // A mode that leaves out shared memory too, where QEMU has one.
        if version != "7.2" {
            client.run("migrate-set-parameters", json!({ "mode": "cpr-transfer" }));
        }
        signal_process(pair.source.qemu.pid(), Signal::CONT);
        let end = pair.source.await_status(&["completed", "failed"]);
        assert_eq!(end["status"], "completed", "{version}: {end}");
        assert_eq!(pair.destination.status(), "completed");
        let client = &mut pair.destination.client;
        eventually("what was written", || is_on(client, "x-ignore-shared").then_some(()));
        client.capability("x-ignore-shared", false);
        if version != "7.2" {
            let parameters = client.run("query-migrate-parameters", json!({}));
            assert_eq!(parameters["mode"], "cpr-transfer", "{version}");
            client.run("migrate-set-parameters", json!({ "mode": "normal" }));
        }
        pair.verify();
    }
}
