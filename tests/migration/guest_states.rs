//! After a failed migration a guest is in the state it had before, and QEMU got no command that it
//! can't execute in that state.

use crate::support::{
    Config, Host, Pair, VERSIONS, eventually,
    helper::{Helper, signal_process},
};
use rustix::process::Signal;
use serde_json::json;

/// A machine whose guest can be stopped in any way.
fn config(version: &'static str) -> Config {
    let devices = [
        "-device pvpanic",
        "-device ib700",
        "-action panic=pause,watchdog=pause",
        "-no-shutdown",
        "-blockdev driver=blkdebug,node-name=bad,image.driver=null-co,image.size=1048576,inject-error.0.event=none,inject-error.0.iotype=read",
        "-device ide-hd,drive=bad,bus=ide.0,unit=0,rerror=stop,werror=stop",
    ];
    Config { version, devices: devices.map(str::to_owned).to_vec(), ..Config::default() }
}

/// The same with a device that the destination lacks.
fn with_a_device(version: &'static str) -> Config {
    let mut config = config(version);
    config.devices.push("-device virtio-serial-pci".into());
    config
}

/// Start a source with that device, and a destination that will fail to load.
fn failing_pair(version: &'static str, return_path: bool) -> Pair {
    let mut pair = Pair::start(&config(version));
    pair.source = Host::start(&pair.dir, "with-device", &with_a_device(version));
    pair.source.client.capability("events", true);
    for host in [&mut pair.source, &mut pair.destination] {
        host.client.capability("return-path", return_path);
    }
    pair.source.qemu.await_guest();
    pair
}

/// Put the guest into this state through I/O ports, because it does none of that by itself.
fn enter(source: &mut Host, state: &str) {
    let lines: &[&str] = match state {
        "paused" => &["stop"],
        // Sleep type and sleep enable of PM1a_CNT, one of the machine's ACPI registers.
        "suspended" => &["o /h 0x604 0x2400"],
        "shutdown" => &["o /h 0x604 0x2000"],
        "guest-panicked" => &["o /b 0x505 1"],
        // Expires at once.
        "watchdog" => &["o /b 0x443 0xf"],
        // Reads a sector of the disk.
        "io-error" => &[
            "o /b 0x1f6 0xe0",
            "o /b 0x1f2 1",
            "o /b 0x1f3 0",
            "o /b 0x1f4 0",
            "o /b 0x1f5 0",
            "o /b 0x1f7 0x20",
        ],
        other => panic!("{other}"),
    };
    let (qemu, mut looks) = (&mut source.qemu, 0);
    eventually(state, || {
        if qemu.status() == state {
            return Some(());
        }
        // A machine that is just starting may lose it: retry after a second.
        if looks % 100 == 0 {
            lines.iter().for_each(|line| assert_eq!(qemu.qmp.hmp(line), ""));
        }
        looks += 1;
        None
    });
}

/// Wait until the migration fails at the destination's QEMU, and return why.
fn fails(pair: &mut Pair) -> String {
    let end = pair.source.await_status(&["failed", "completed"]);
    assert_eq!(end["status"], "failed", "{end}");
    pair.source.helper.await_no_worker();
    let text = end["error-desc"].as_str().unwrap().to_owned();
    assert!(text.contains("destination's QEMU"), "{text}");
    text
}

/// Assert that the guest runs and that its next migration succeeds.
fn migrates_after_all(mut pair: Pair, version: &'static str) {
    pair.source.qemu.await_guest();
    pair.source.qemu.assert_goes_on();
    let client = &mut pair.source.client;
    client.capability("return-path", false);
    client.capability("pause-before-switchover", false);
    let fast = json!({ "max-bandwidth": 1_u64 << 32, "downtime-limit": 8000 });
    client.run("migrate-set-parameters", fast);
    pair.new_destination(&with_a_device(version), "next");
    pair.migrate();
    pair.verify();
}

/// Migrate so that the source's QEMU completes before the destination's can fail.
fn completes_first(pair: &mut Pair) {
    pair.source.client.capability("pause-before-switchover", true);
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    pair.source.await_status(&["pre-switchover"]);
    let destination = pair.destination.qemu.pid();
    signal_process(destination, Signal::STOP);
    pair.source.client.run("migrate-continue", json!({ "state": CONTINUE }));
    eventually("QEMU to complete", || (pair.source.qemu.status() == "postmigrate").then_some(()));
    signal_process(destination, Signal::CONT);
}

#[test]
fn a_guest_that_stood_still_stays_so() {
    for version in VERSIONS {
        for state in ["paused", "guest-panicked", "watchdog", "io-error", "shutdown"] {
            let mut pair = failing_pair(version, false);
            enter(&mut pair.source, state);
            completes_first(&mut pair);
            let why = fails(&mut pair);
            println!("{version}, {state}: {why}");
            assert!(why.contains("stays stopped, as it was"), "{why}");
            assert_eq!(pair.source.qemu.status(), "postmigrate");
        }
    }
}

/// A suspended guest stays so after a failure and can be woken up. QEMU 7.2 wakes it up to migrate
/// it.
#[test]
fn a_suspended_guest_sleeps_on() {
    for version in VERSIONS {
        for return_path in [false, true] {
            let mut pair = failing_pair(version, return_path);
            enter(&mut pair.source, "suspended");
            let uri = pair.listen();
            pair.source.client.run("migrate", json!({ "uri": uri }));
            println!("{version}: {}", fails(&mut pair));
            let client = &mut pair.source.client;
            let capabilities = client.run("query-migrate-capabilities", json!({}));
            let expected = json!({ "capability": "return-path", "state": return_path });
            assert!(capabilities.as_array().unwrap().contains(&expected), "{capabilities}");
            if version == "7.2" {
                eventually("the guest", || (pair.source.qemu.status() == "running").then_some(()));
            } else {
                assert_eq!(pair.source.qemu.status(), "suspended");
                client.run("system_wakeup", json!({}));
                client.await_event("WAKEUP", |_| true);
            }
            migrates_after_all(pair, version);
        }
    }
}

/// A suspended guest arrives suspended and can be woken up.
#[test]
fn a_suspended_guest_migrates() {
    for version in VERSIONS {
        let mut pair = Pair::start(&config(version));
        enter(&mut pair.source, "suspended");
        pair.migrate();
        pair.compare();
        let client = &mut pair.destination.client;
        client.run("cont", json!({}));
        if version != "7.2" {
            assert_eq!(pair.destination.qemu.status(), "suspended");
            client.run("system_wakeup", json!({}));
            client.await_event("WAKEUP", |_| true);
        }
        pair.destination.qemu.await_guest();
        pair.destination.qemu.assert_goes_on();
    }
}

/// Suspend a guest in mid-migration, at a QEMU that does not wait for the destination.
fn suspended_meanwhile(version: &'static str) -> Pair {
    let mut pair = failing_pair(version, false);
    let client = &mut pair.source.client;
    client.capability("pause-before-switchover", true);
    client.run("migrate-set-parameters", json!({ "max-bandwidth": 16 << 20 }));
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    pair.source.await_status(&["active"]);
    enter(&mut pair.source, "suspended");
    let fast = json!({ "max-bandwidth": 1_u64 << 32, "downtime-limit": 8000 });
    pair.source.client.run("migrate-set-parameters", fast);
    pair.source.await_status(&["pre-switchover"]);
    pair
}

const CONTINUE: &str = "pre-switchover";

/// A guest suspended during a failed migration stays stopped, with a hint: `cont` would abort QEMU.
#[test]
fn a_guest_that_is_suspended_meanwhile_does_not_end_qemu() {
    for version in VERSIONS {
        let mut pair = suspended_meanwhile(version);
        pair.source.client.run("migrate-continue", json!({ "state": CONTINUE }));
        let why = fails(&mut pair);
        println!("{version}: {why}");
        if version == "7.2" {
            eventually("the guest", || (pair.source.qemu.status() == "running").then_some(()));
        } else {
            assert!(why.contains("'system_reset' and 'cont'"), "{why}");
            assert_eq!(pair.source.qemu.status(), "postmigrate");
            pair.source.client.run("system_reset", json!({}));
            pair.source.client.await_event("RESET", |_| true);
            pair.source.client.run("cont", json!({}));
        }
        migrates_after_all(pair, version);
    }
}

/// A worker without its relay does not continue a suspended guest either.
#[test]
fn the_relay_is_killed_while_the_guest_is_suspended() {
    for version in VERSIONS {
        let mut pair = suspended_meanwhile(version);
        let destination = pair.destination.qemu.pid();
        signal_process(destination, Signal::STOP);
        pair.source.client.run("migrate-continue", json!({ "state": CONTINUE }));
        eventually("QEMU to complete", || {
            (pair.source.qemu.status() == "postmigrate").then_some(())
        });
        let worker = pair.source.helper.await_worker();
        pair.source.helper.kill();
        signal_process(destination, Signal::CONT);
        the_worker_ends_it(pair, version, worker);
    }
}

/// Wait for the worker's end, and assert that QEMU and the guest survive it.
fn the_worker_ends_it(mut pair: Pair, version: &'static str, worker: u32) {
    eventually("the worker's end", || crate::support::wrapped::has_ended(worker).then_some(()));
    if version == "7.2" {
        eventually("the guest", || (pair.source.qemu.status() == "running").then_some(()));
    } else {
        assert_eq!(pair.source.qemu.status(), "postmigrate");
        pair.source.qemu.qmp.run("system_reset", json!({}));
        pair.source.qemu.qmp.await_event("RESET", |_| true);
        pair.source.qemu.qmp.run("cont", json!({}));
    }
    let socket = pair.source.qemu.helper_socket();
    pair.source.helper = Helper::attach(pair.dir.path(), "again", &socket, &[]);
    pair.source.client = crate::support::Qmp::connect(&pair.source.helper.socket);
    pair.source.client.capability("events", true);
    migrates_after_all(pair, version);
}
