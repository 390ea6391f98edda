//! Successful migrations of real QEMUs: all of RAM is compared, and the guest keeps running.

use crate::support::{Config, Guest, Host, Memory, Pair, VERSIONS, eventually, memory};
use serde_json::{Value, json};

fn migrates(config: &Config) -> Pair {
    let mut pair = Pair::start(config);
    pair.migrate();
    pair.verify();
    pair
}

/// The comparison finds a page that differs.
#[test]
fn the_comparison_can_fail() {
    use std::{fs::OpenOptions, os::unix::fs::FileExt as _};
    let mut pair = Pair::start(&Config::default());
    pair.migrate();
    pair.compare();
    let maps =
        std::fs::read_to_string(format!("/proc/{}/maps", pair.destination.qemu.pid())).unwrap();
    let line = maps.lines().find(|line| line.contains("memfd:memory-backend")).unwrap();
    let range = line.split(' ').next().unwrap();
    let path = format!("/proc/{}/map_files/{range}", pair.destination.qemu.pid());
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(b"!", 0x12_3456).unwrap();
    let differences = memory::compare(&mut pair.source.qemu, &mut pair.destination.qemu);
    assert_eq!(differences, ["ram0: 1 pages, the first at 0x123000"]);
}

#[test]
fn busy_guest_of_each_version() {
    for version in VERSIONS {
        migrates(&Config { version, ..Config::default() });
    }
}

#[test]
fn idle_guest() {
    migrates(&Config { guest: Guest::Dirty { fill: 32, hot: 0, spin: 0 }, ..Config::default() });
}

#[test]
fn numa_nodes_and_a_dimm_of_each_version() {
    for version in VERSIONS {
        migrates(&Config { memory: Memory::Numa, version, ..Config::default() });
    }
}

#[test]
fn file_on_tmpfs() {
    migrates(&Config { memory: Memory::File, ..Config::default() });
}

#[test]
fn huge_pages_of_2_mib() {
    if let Err(why) = crate::support::huge_pages() {
        return println!("skipped: {why}");
    }
    migrates(&Config { memory: Memory::Huge, ..Config::default() });
}

#[test]
fn q35_with_vga_and_virtio_devices() {
    let devices = [
        "-vga std",
        "-device virtio-net-pci",
        "-device virtio-balloon-pci",
        "-device virtio-serial-pci",
    ];
    let devices = devices.map(str::to_owned).to_vec();
    migrates(&Config { machine: "q35", devices, ..Config::default() });
}

#[test]
fn pc_with_vga_of_each_version() {
    for version in VERSIONS {
        let devices = vec!["-vga std".into(), "-device e1000".into()];
        migrates(&Config { version, devices, ..Config::default() });
    }
}

#[test]
fn linux_with_direct_reads_in_flight() {
    migrates(&Config::default().with_direct_reads());
}

#[test]
fn with_return_path() {
    for version in VERSIONS {
        let mut pair = Pair::start(&Config { version, ..Config::default() });
        for host in [&mut pair.source, &mut pair.destination] {
            host.client.capability("return-path", true);
        }
        pair.migrate();
        pair.verify();
    }
}

/// RAM takes as many connections as both helpers have.
#[test]
fn over_several_connections() {
    for (source, destination, connections) in [("1", "4", 1), ("2", "2", 2), ("16", "4", 4)] {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::default();
        let start = |name, config: &Config, count| {
            Host::with_helper(&dir, name, config, &["--connections", count])
        };
        let source = start("source", &config, source);
        let destination = start("destination", &config.clone().incoming(), destination);
        let mut pair = Pair { source, destination, dir };
        pair.source.qemu.await_guest();
        let limit = json!({ "max-bandwidth": 1_u64 << 32 });
        pair.source.client.run("migrate-set-parameters", limit);
        pair.migrate();
        let last = |data: &Value| data["remaining"] == 0;
        let event = pair.source.client.await_event("RDMA_MIGRATION_THROUGHPUT", last);
        assert_eq!(event["data"]["connections"], connections);
        pair.verify();
    }
}

#[test]
fn with_pause_before_switchover_and_channels() {
    let mut pair = Pair::start(&Config::default());
    for name in ["pause-before-switchover", "return-path", "rdma-pin-all"] {
        pair.source.client.capability(name, true);
    }
    let port = crate::support::free_port().to_string();
    let channels = json!([{"channel-type": "main", "addr": {"transport": "rdma", "host": "127.0.0.1", "port": port}}]);
    pair.destination.client.run("migrate-incoming", json!({ "channels": channels }));
    pair.source.client.run("migrate", json!({ "channels": channels }));
    pair.source.client.await_event("MIGRATION", |data| data["status"] == "pre-switchover");
    assert_eq!(pair.source.status(), "pre-switchover");
    pair.source.client.run("migrate-continue", json!({"state": "pre-switchover"}));
    pair.source.await_status(&["completed"]);
    pair.verify();
    let expected = ["setup", "active", "pre-switchover", "device", "completed"];
    assert_eq!(pair.source.client.migration_states(), expected);
}

#[test]
fn without_the_events_capability() {
    let mut pair = Pair::start(&Config::default());
    for host in [&mut pair.source, &mut pair.destination] {
        host.client.capability("events", false);
        host.client.events.clear();
    }
    pair.migrate();
    pair.verify();
    assert_eq!(pair.source.client.migration_states(), [""; 0]);
}

/// XBZRLE is refused: QEMU omits a page that matches its last copy, but what the helper wrote for
/// that copy may be newer.
#[test]
fn xbzrle_is_refused_with_a_hint() {
    let mut pair = Pair::start(&Config::default());
    let uri = pair.listen();
    pair.source.client.capability("xbzrle", true);
    let error = pair.source.client.refused("migrate", json!({ "uri": uri }));
    println!("{error}");
    assert!(error.contains("'xbzrle'"), "{error}");
    assert!(error.contains("migrate_set_capability xbzrle off"), "{error}");
    pair.source.qemu.assert_goes_on();
    pair.source.client.capability("xbzrle", false);
    pair.source.client.run("migrate", json!({ "uri": uri }));
    pair.source.await_status(&["completed"]);
    pair.verify();
}

#[test]
fn with_compressed_pages_of_qemu_7_2() {
    let mut pair = Pair::start(&Config { version: "7.2", ..Config::default() });
    for host in [&mut pair.source, &mut pair.destination] {
        host.client.capability("compress", true);
    }
    pair.migrate();
    pair.verify();
}

/// One guest migrates through every version and back.
#[test]
fn between_versions_of_qemu() {
    for machine in ["pc-i440fx-7.2", "pc-q35-7.2"] {
        let config = |version| Config { version, machine, ..Config::default() };
        let mut pair = Pair::start(&config("7.2"));
        pair.migrate();
        pair.verify();
        for (turn, version) in ["10.0", "11.1", "7.2"].into_iter().enumerate() {
            pair.turn_around(&config(version), &format!("host-{turn}"));
            pair.migrate();
            pair.verify();
        }
    }
}

/// A guest with a hot-plugged DIMM migrates. The destination has the DIMM from the start.
#[test]
fn a_dimm_that_was_hot_plugged() {
    let slots = Config { devices: vec!["-m 192,slots=2,maxmem=1G".into()], ..Config::default() };
    let mut pair = Pair::start(&slots);
    let mut with_dimm = slots;
    for option in [
        "-object memory-backend-memfd,id=late,size=64M,share=on",
        "-device pc-dimm,id=dimm,memdev=late",
    ] {
        with_dimm.devices.push(option.into());
    }
    pair.new_destination(&with_dimm, "with-dimm");
    let backend = json!({
        "qom-type": "memory-backend-memfd", "id": "late", "size": 64 << 20, "share": true
    });
    pair.source.client.run("object-add", backend);
    let dimm = json!({ "driver": "pc-dimm", "id": "dimm", "memdev": "late" });
    pair.source.client.run("device_add", dimm);
    let info = pair.source.client.run("query-rdma-helper", json!({}));
    assert!(info["blocks"].to_string().contains("late"), "{info}");
    pair.migrate();
    pair.verify();
}

/// Memory and a network card plugged while the destination waits are migrated, as with QEMU's
/// `tcp:`.
#[test]
fn what_is_plugged_in_while_the_destination_waits() {
    for version in VERSIONS {
        let devices = vec!["-m 192,slots=2,maxmem=1G".into()];
        let mut pair = Pair::start(&Config { version, devices, ..Config::default() });
        let uri = pair.listen();
        for host in [&mut pair.destination, &mut pair.source] {
            let backend = json!({
                "qom-type": "memory-backend-memfd", "id": "late", "size": 64 << 20, "share": true
            });
            host.client.run("object-add", backend);
            let dimm = json!({ "driver": "pc-dimm", "id": "dimm", "memdev": "late" });
            host.client.run("device_add", dimm);
            let card =
                json!({ "driver": "virtio-net-pci", "id": "card", "mac": "52:54:00:12:34:56" });
            host.client.run("device_add", card);
        }
        pair.source.client.run("migrate", json!({ "uri": uri }));
        let end = pair.source.await_status(&["completed", "failed"]);
        assert_eq!(end["status"], "completed", "{version}: {end}");
        assert_eq!(pair.source.transferred_as("late"), "Direct");
        pair.verify();
    }
}

/// A source's private memory is written from its stream.
#[test]
fn private_memory_to_shared() {
    for version in VERSIONS {
        let config = Config { version, memory: Memory::Private, ..Config::default() };
        let mut pair = Pair::start(&config);
        pair.new_destination(&Config { memory: Memory::PcRam, ..config }, "shared");
        assert_eq!(pair.source.transfer("pc.ram"), "copied");
        assert_eq!(pair.source.transfer("pc.bios"), "inline");
        assert_eq!(pair.source.client.run("query-rdma-migrate-blockers", json!({})), json!([]));
        pair.migrate();
        assert_eq!(pair.source.transferred_as("pc.ram"), "Copied");
        assert_eq!(pair.source.transferred_as("pc.bios"), "Inline");
        pair.verify();
    }
}

/// Memory that is private at the destination takes QEMU's stream.
#[test]
fn private_memory_at_the_destination() {
    for memory in [Memory::Private, Memory::PcRam] {
        let config = Config { memory, ..Config::default() };
        let mut pair = Pair::start(&config);
        pair.new_destination(&Config { memory: Memory::Private, ..config }, "private");
        pair.migrate();
        assert_eq!(pair.source.transferred_as("pc.ram"), "Inline");
        let log = pair.source.helper.log();
        assert!(log.contains("'pc.ram' is not shared at the destination"), "{log}");
        pair.verify();
    }
}

/// Holes of the source stay holes at the destination.
#[test]
fn private_memory_that_was_never_touched_stays_a_hole() {
    let guest = Guest::Dirty { fill: 32, hot: 4, spin: 3000 };
    let config = Config { mib: 1024, memory: Memory::Private, guest, ..Config::default() };
    let mut pair = Pair::start(&config);
    pair.new_destination(&Config { memory: Memory::PcRam, ..config }, "shared");
    pair.migrate();
    let allocated = memory::allocated(&mut pair.destination.qemu, "pc.ram");
    pair.verify();
    assert!(allocated < 40 << 20, "{} MiB are allocated at the destination", allocated >> 20);
}

/// A source whose memory is copied must not encode pages, because only QEMU can decode them.
#[test]
fn encoded_pages_of_private_memory_are_refused_with_a_hint() {
    let config = Config { version: "7.2", memory: Memory::Private, ..Config::default() };
    let mut pair = Pair::start(&config);
    pair.new_destination(&Config { memory: Memory::PcRam, ..config }, "shared");
    pair.source.client.capability("compress", true);
    let uri = pair.listen();
    let error = pair.source.client.refused("migrate", json!({ "uri": uri }));
    println!("{error}");
    assert!(error.contains("'compress'") && error.contains("'pc.ram'"), "{error}");
    assert!(error.contains("migrate_set_capability compress off"), "{error}");
    pair.source.qemu.assert_goes_on();
    pair.source.client.capability("compress", false);
    pair.source.client.run("migrate", json!({ "uri": uri }));
    pair.source.await_status(&["completed"]);
    pair.verify();
}

/// A guest with a virtio-mem device, whose state precedes RAM, migrates. Nothing is plugged,
/// because the guest has no driver.
#[test]
fn with_virtio_mem() {
    for version in VERSIONS {
        let devices = [
            "-m 192,slots=2,maxmem=1G",
            "-object memory-backend-memfd,id=vmem0,size=128M,share=on",
            "-device virtio-mem-pci,id=vm0,memdev=vmem0,requested-size=0",
        ];
        let devices = devices.map(str::to_owned).to_vec();
        let mut pair = Pair::start(&Config { version, devices, ..Config::default() });
        // The tcp fabric pins nothing.
        let block = "0000:00:02.0/vmem0";
        assert_eq!(pair.source.transfer(block), "direct");
        pair.migrate();
        for host in [&mut pair.source, &mut pair.destination] {
            assert_eq!(memory::allocated(&mut host.qemu, block), 0, "QEMU {version}");
        }
        pair.verify();
    }
}

#[test]
fn memory_that_was_never_touched_stays_a_hole() {
    let guest = Guest::Dirty { fill: 32, hot: 4, spin: 3000 };
    let mut pair = Pair::start(&Config { mib: 1024, guest, ..Config::default() });
    pair.migrate();
    let allocated = memory::allocated(&mut pair.destination.qemu, "ram0");
    pair.verify();
    assert!(allocated < 40 << 20, "{} MiB are allocated at the destination", allocated >> 20);
    let state = pair.source.client.run("query-migrate", json!({}));
    let transferred = state["ram"]["transferred"].as_u64().unwrap();
    assert!(transferred < 64 << 20, "{} MiB were transferred", transferred >> 20);
}

/// Preallocated memory stays allocated, even where its pages are zero.
#[test]
fn preallocated_memory_stays_allocated() {
    let memory = "-object memory-backend-memfd,id=early,size=64M,share=on,prealloc=on";
    let devices = vec![
        "-m 192,slots=2,maxmem=1G".into(),
        memory.into(),
        "-device pc-dimm,id=dimm,memdev=early".into(),
    ];
    let mut pair = Pair::start(&Config { devices, ..Config::default() });
    pair.migrate();
    let allocated = memory::allocated(&mut pair.destination.qemu, "early");
    assert_eq!(allocated, 64 << 20);
    pair.verify();
}

/// A memory backend that no device uses is not part of the migration.
#[test]
fn unused_memory_backends_are_not_migrated() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    let unused = json!({ "qom-type": "memory-backend-memfd", "id": "idle", "size": 32 << 20, "share": true });
    pair.source.client.run("object-add", unused);
    pair.migrate();
    pair.verify();
}

#[test]
fn to_and_fro_through_the_same_helpers_clients_come_and_go() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    for turn in 0..3 {
        pair.migrate();
        pair.verify();
        // The destination becomes the source.
        let name = format!("host-{turn}");
        let next = crate::support::Host::start(&pair.dir, &name, &config.clone().incoming());
        let client = crate::support::Qmp::connect;
        let old = std::mem::replace(&mut pair.destination, next);
        let crate::support::Host { helper, qemu, client: gone } = old;
        drop(gone);
        pair.source = crate::support::Host { client: client(&helper.socket), helper, qemu };
    }
}

#[test]
fn progress_is_true_and_reported() {
    let mut pair = Pair::start(&Config::default());
    // 96 MiB at 32 MiB/s: three seconds.
    let limit = json!({ "max-bandwidth": 32 << 20 });
    pair.source.client.run("migrate-set-parameters", limit);
    pair.source.client.capability("rdma-pin-all", true);
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    let event = pair
        .source
        .client
        .await_event("RDMA_MIGRATION_THROUGHPUT", |data| data["transferred"].as_u64().unwrap() > 0);
    let data = &event["data"];
    assert_eq!(data["max-bandwidth"], 32 << 20);
    assert_eq!(data["fabric"], "tcp");
    assert_eq!(data["status"], "active");
    assert_eq!(data["capabilities"], json!([{"capability": "rdma-pin-all", "state": true}]));
    let mbps = data["mbps"].as_f64().unwrap();
    assert!((100.0..400.0).contains(&mbps), "{mbps} mbps where 268 are allowed");
    let state = pair.source.client.run("query-migrate", json!({}));
    let figure = |state: &Value, name: &str| state["ram"][name].as_u64().unwrap();
    assert!(figure(&state, "transferred") > 0 && figure(&state, "remaining") > 0, "{state}");
    let info = pair.source.client.hmp("info migrate");
    assert!(info.contains("rdma fabric: tcp") && info.contains("throughput: "), "{info}");

    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 32 }));
    let end = pair.source.await_status(&["completed"]);
    pair.verify();
    assert_eq!(figure(&end, "remaining"), 0);
    assert!(figure(&end, "transferred") >= 96 << 20, "{end}");
    let events = &pair.source.client.events;
    let of = |name: &str| events.iter().rposition(|event| event["event"] == name).unwrap();
    let last = &events[of("RDMA_MIGRATION_THROUGHPUT")]["data"];
    assert_eq!((&last["remaining"], &last["status"]), (&json!(0), &json!("completed")));
    assert!(of("RDMA_MIGRATION_THROUGHPUT") < of("MIGRATION"), "{events:#?}");
}

/// What the whole system has left, which QEMU shows since 11.1, is correct.
#[test]
fn what_the_whole_system_of_qemu_11_1_has_left_is_true() {
    let mut pair = Pair::start(&Config { version: "11.1", ..Config::default() });
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 32 << 20 }));
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    let (whole, ram) = eventually("figures", || {
        let state = pair.source.client.run("query-migrate", json!({}));
        let moved = state["ram"]["transferred"].as_u64()? > 1 << 20;
        moved.then(|| (state["remaining"].as_u64(), state["ram"]["remaining"].as_u64().unwrap()))
    });
    let whole = whole.unwrap();
    assert!((ram..ram + (16 << 20)).contains(&whole), "{whole} of which {ram} are RAM's");
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 32 }));
    let end = pair.source.await_status(&["completed", "failed"]);
    assert_eq!(end["status"], "completed", "{end}");
    assert_eq!(end["remaining"].as_u64().unwrap_or(0), 0, "{end}");
    pair.verify();
}

#[test]
fn runbook_lines() {
    let mut pair = Pair::start(&Config::default());
    let uri = pair.listen();
    let client = &mut pair.source.client;
    assert_eq!(client.hmp("migrate_set_capability rdma-pin-all on"), "");
    assert_eq!(client.hmp("migrate_set_capability x-rdma-pin-all on"), "");
    assert_eq!(client.hmp("migrate_set_parameter max-bandwidth 40g"), "");
    assert!(client.hmp("info migrate_capabilities").contains("rdma-pin-all: on"));
    assert!(client.hmp("migrate -d rdma:127.0.0.1").starts_with("Error: "));
    assert_eq!(client.hmp(&format!("migrate -d {uri}")), "");
    pair.source.await_status(&["completed"]);
    let info = pair.source.client.hmp("info migrate");
    assert!(info.contains("Migration status: completed\r\n"), "{info}");
    pair.verify();
}

/// Relay and worker together take at most 64 MiB, whatever the guest's size.
#[test]
fn memory_of_the_helpers_is_bounded() {
    helpers_are_small(Memory::Memfd);
}

#[test]
fn memory_of_the_helpers_is_bounded_where_the_guests_is_private() {
    helpers_are_small(Memory::Private);
}

fn helpers_are_small(memory: Memory) {
    let guest = Guest::Dirty { fill: 700, hot: 16, spin: 1000 };
    let config = Config { mib: 1024, guest, memory, ..Config::default() };
    let mut pair = Pair::start(&config);
    if config.memory == Memory::Private {
        pair.new_destination(&Config { memory: Memory::PcRam, ..config }, "shared");
    }
    let uri = pair.listen();
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 256 << 20 }));
    pair.source.client.run("migrate", json!({ "uri": uri }));
    let workers = [pair.source.helper.await_worker(), pair.destination.helper.await_worker()];
    let mut peak = [0; 2];
    eventually("the end", || {
        for (peak, worker) in peak.iter_mut().zip(workers) {
            *peak = (*peak).max(crate::support::helper::peak_rss(worker));
        }
        (pair.source.status() == "completed").then_some(())
    });
    pair.verify();
    let relays = [&pair.source.helper, &pair.destination.helper];
    for (worker, relay) in peak.into_iter().zip(relays) {
        let relay = crate::support::helper::peak_rss(relay.pid());
        assert!(worker + relay < 64 << 20, "{} + {} KiB", worker >> 10, relay >> 10);
    }
}
