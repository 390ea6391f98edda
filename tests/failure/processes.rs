//! Dying processes and cancelled migrations: the guest is never lost.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixListener,
    time::Instant,
};

use crate::support::{
    Config, Guest, Helper, Host, Memory, PATIENCE, Pair, Proxy, Qmp, QmpProxy, VERSIONS,
    eventually, helper::signal_process,
};
use rustix::process::Signal;
use serde_json::{Value, json};

/// A guest for tests in which RAM does not matter.
const SMALL: Guest = Guest::Dirty { fill: 8, hot: 1, spin: 3000 };

/// A guest that dirties RAM faster than [`in_mid_transfer`] sends it.
const FAST: Guest = Guest::Dirty { fill: 48, hot: 16, spin: 300 };

/// Limit the bandwidth, so that the guest dirties RAM faster and the test has time to act.
fn slow(pair: &mut Pair, mib_per_second: u64) {
    let limit = json!({ "max-bandwidth": mib_per_second << 20 });
    pair.source.client.run("migrate-set-parameters", limit);
}

/// Start a migration and wait until RAM has moved.
fn in_mid_transfer(pair: &mut Pair) {
    slow(pair, 16);
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    eventually("RAM to move", || {
        let state = pair.source.client.run("query-migrate", json!({}));
        (state["ram"]["transferred"].as_u64().unwrap_or(0) > 4 << 20).then_some(())
    });
}

/// Start a migration and wait for pre-switchover, where the guest is stopped.
fn at_pre_switchover(config: &Config) -> Pair {
    let mut pair = Pair::start(config);
    pair.source.client.capability("pause-before-switchover", true);
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    pair.source.await_status(&["pre-switchover"]);
    pair
}

/// Assert that the guest runs at the source after its helper died, and migrates with a new helper.
#[track_caller]
fn runs_on_with_a_new_helper(mut pair: Pair, config: &Config) {
    eventually("the guest to run", || (pair.source.qemu.status() == "running").then_some(()));
    pair.source.qemu.assert_goes_on();
    let socket = pair.source.qemu.helper_socket();
    pair.source.helper = Helper::attach(pair.dir.path(), "source", &socket, &[]);
    pair.source.client = Qmp::connect(&pair.source.helper.socket);
    pair.source.client.capability("pause-before-switchover", false);
    migrates_after_all(pair, config);
}

/// Assert that the migration failed, with a one-line reason, and the guest runs at the source.
#[track_caller]
fn failed(pair: &mut Pair, words: &[&str]) -> Value {
    let end = pair.source.await_status(&["failed", "completed", "cancelled"]);
    assert_eq!(end["status"], "failed", "{end}");
    let text = end["error-desc"].as_str().unwrap_or_default();
    println!("error-desc: {text}");
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
    assert!(!text.contains('\n'));
    runs_on(pair);
    end
}

/// Wait until a process ends by itself.
#[track_caller]
fn ends(pid: u32) {
    let path = format!("/proc/{pid}");
    eventually("the worker to end", || (!fs::exists(&path).unwrap()).then_some(()));
}

/// Assert that the guest runs at the source and no worker is left.
#[track_caller]
fn runs_on(pair: &mut Pair) {
    eventually("the guest to run", || (pair.source.qemu.status() == "running").then_some(()));
    pair.source.qemu.assert_goes_on();
    pair.source.helper.await_no_worker();
}

/// Assert that the guest migrates to a new destination, without a descriptor leak.
#[track_caller]
fn migrates_after_all(mut pair: Pair, config: &Config) {
    let descriptors = pair.source.helper.descriptors();
    pair.new_destination(config, "second");
    slow(&mut pair, 4096);
    pair.migrate();
    pair.verify();
    pair.source.helper.await_no_worker();
    eventually("descriptors to be closed", || {
        (pair.source.helper.descriptors() <= descriptors).then_some(())
    });
}

/// Wait until the destination's QEMU has ended, which frees its memory, and its helper with it.
#[track_caller]
fn destination_is_gone(pair: &mut Pair) {
    eventually("the destination's QEMU to end", || pair.destination.qemu.child.try_wait().unwrap());
    eventually("its helper to end", || pair.destination.helper.child.try_wait().unwrap());
    assert!(!pair.destination.helper.socket.exists());
}

#[test]
fn the_destinations_worker_is_killed() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    in_mid_transfer(&mut pair);
    signal_process(pair.destination.helper.await_worker(), Signal::KILL);
    failed(&mut pair, &["closed the connection"]);
    destination_is_gone(&mut pair);
    migrates_after_all(pair, &config);
}

/// A migration succeeds after one with a return path failed or was cancelled.
///
/// QEMU 7.2 believes that the return path is still open.
#[test]
fn the_next_one_succeeds_after_one_with_return_path_failed() {
    for version in VERSIONS {
        for (cancelled, next) in [(false, false), (false, true), (true, false), (true, true)] {
            println!("QEMU {version}, cancelled: {cancelled}, return path then: {next}");
            let config = Config { version, mib: 64, guest: FAST, ..Config::default() };
            let mut pair = Pair::start(&config);
            let open = |host: &mut Host, open| host.client.capability("return-path", open);
            open(&mut pair.source, true);
            open(&mut pair.destination, true);
            in_mid_transfer(&mut pair);
            if cancelled {
                pair.source.client.run("migrate_cancel", json!({}));
                pair.source.await_status(&["cancelled"]);
                runs_on(&mut pair);
            } else {
                signal_process(pair.destination.helper.await_worker(), Signal::KILL);
                failed(&mut pair, &["closed the connection"]);
            }
            destination_is_gone(&mut pair);
            pair.new_destination(&config, "next");
            open(&mut pair.source, next);
            open(&mut pair.destination, next);
            slow(&mut pair, 4096);
            pair.migrate();
            pair.verify();
            pair.source.helper.await_no_worker();
        }
    }
}

#[test]
fn the_sources_worker_is_killed() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    in_mid_transfer(&mut pair);
    signal_process(pair.source.helper.await_worker(), Signal::KILL);
    let end = failed(&mut pair, &["worker process died", "migrate again"]);
    assert!(end["ram"]["transferred"].as_u64().unwrap() > 0, "{end}");
    destination_is_gone(&mut pair);
    migrates_after_all(pair, &config);
}

#[test]
fn the_sources_worker_is_killed_at_pre_switchover() {
    let config = Config::default();
    let mut pair = at_pre_switchover(&config);
    signal_process(pair.source.helper.await_worker(), Signal::KILL);
    failed(&mut pair, &["worker process died"]);
    pair.source.client.await_event("MIGRATION", |data| data["status"] == "failed");
    let states = pair.source.client.migration_states();
    assert_eq!(states.last().unwrap(), "failed", "{states:?}");
    pair.source.client.capability("pause-before-switchover", false);
    migrates_after_all(pair, &config);
}

#[test]
fn a_worker_that_hangs_does_not_hold_a_cancellation() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    in_mid_transfer(&mut pair);
    let worker = pair.source.helper.await_worker();
    signal_process(worker, Signal::STOP);
    pair.source.client.run("migrate_cancel", json!({}));
    pair.source.await_status(&["cancelled"]);
    runs_on(&mut pair);
    migrates_after_all(pair, &config);
}

#[test]
fn the_destinations_relay_is_killed() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    in_mid_transfer(&mut pair);
    pair.destination.helper.kill();
    failed(&mut pair, &["destination's helper is gone"]);
    eventually("the destination's QEMU to end", || pair.destination.qemu.child.try_wait().unwrap());
    migrates_after_all(pair, &config);
}

#[test]
fn the_sources_relay_is_killed() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    in_mid_transfer(&mut pair);
    let worker = pair.source.helper.await_worker();
    pair.source.helper.kill();
    ends(worker);
    eventually("QEMU's migration to end", || {
        let state = pair.source.qemu.qmp.run("query-migrate", json!({}));
        // With multifd channels it is cancelled.
        matches!(state["status"].as_str(), Some("failed" | "cancelled")).then_some(())
    });
    assert_eq!(pair.source.qemu.status(), "running");
    destination_is_gone(&mut pair);
    let socket = pair.source.qemu.helper_socket();
    pair.source.helper = Helper::attach(pair.dir.path(), "source", &socket, &[]);
    pair.source.client = Qmp::connect(&pair.source.helper.socket);
    runs_on(&mut pair);
    migrates_after_all(pair, &config);
}

#[test]
fn the_sources_relay_is_told_to_end() {
    let mut pair = Pair::start(&Config::default());
    in_mid_transfer(&mut pair);
    pair.source.helper.signal(Signal::TERM);
    let status = eventually("the relay to end", || pair.source.helper.child.try_wait().unwrap());
    assert!(status.success(), "{status}");
    assert!(!pair.source.helper.socket.exists());
    eventually("QEMU's migration to end", || {
        let state = pair.source.qemu.qmp.run("query-migrate", json!({}));
        matches!(state["status"].as_str(), Some("failed" | "cancelled")).then_some(())
    });
    assert_eq!(pair.source.qemu.status(), "running");
    pair.source.qemu.assert_goes_on();
    let log = pair.destination.helper.log();
    assert!(log.contains("was told to end (SIGTERM)"), "{log}");
}

#[test]
fn the_destinations_qemu_is_killed() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    in_mid_transfer(&mut pair);
    pair.destination.qemu.kill();
    failed(&mut pair, &["destination's QEMU is gone"]);
    destination_is_gone(&mut pair);
    migrates_after_all(pair, &config);
}

#[test]
fn the_sources_qemu_is_killed() {
    let mut pair = Pair::start(&Config::default());
    in_mid_transfer(&mut pair);
    pair.source.qemu.kill();
    eventually("the source's helper to end", || pair.source.helper.child.try_wait().unwrap());
    assert!(!pair.source.helper.socket.exists());
    destination_is_gone(&mut pair);
    let log = pair.destination.helper.log();
    assert!(
        log.contains("source's QEMU is gone") || log.contains("ended its migration stream"),
        "{log}"
    );
}

/// Stop the source's worker from the agreement on until several orders are queued: it reads all of
/// them at once.
///
/// A paused guest causes one more, as soon as QEMU migrates.
fn orders_arrive_at_once(version: &'static str, helper: &[&str]) {
    let config = Config { version, mib: 64, guest: SMALL, ..Config::default() };
    let dir = tempfile::tempdir().unwrap();
    let destination = config.clone().incoming();
    let mut pair = Pair {
        source: Host::with_helper(&dir, "source", &config, helper),
        destination: Host::start(&dir, "destination", &destination),
        dir,
    };
    pair.source.qemu.await_guest();
    pair.source.client.run("stop", json!({}));
    for turn in 0..4 {
        let uri = pair.listen();
        let agreed = |pair: &Pair| pair.source.helper.log().matches("block lists agree").count();
        let before = agreed(&pair);
        pair.source.client.run("migrate", json!({ "uri": uri }));
        let deadline = Instant::now() + PATIENCE;
        while agreed(&pair) == before {
            assert!(Instant::now() < deadline, "no agreement");
        }
        let worker = pair.source.helper.await_worker();
        signal_process(worker, Signal::STOP);
        // The relay alone sends this event, after all initial orders.
        pair.source.client.await_event("RDMA_MIGRATION_THROUGHPUT", |_| true);
        signal_process(worker, Signal::CONT);
        let end = pair.source.await_status(&["completed", "failed", "cancelled"]);
        assert_eq!(end["status"], "completed", "{version}, {turn}: {end}");
        pair.compare();
        assert_eq!(pair.destination.qemu.status(), "paused");
        let name = format!("destination{turn}");
        let next = Host::with_helper(&pair.dir, &name, &destination, helper);
        pair.source = std::mem::replace(&mut pair.destination, next);
    }
    pair.source.client.run("cont", json!({}));
    pair.source.qemu.assert_goes_on();
}

#[test]
fn orders_arrive_at_once_for_a_paused_guest() {
    for version in VERSIONS {
        orders_arrive_at_once(version, &[]);
    }
}

#[test]
fn orders_arrive_at_once_without_channels() {
    orders_arrive_at_once("10.0", &["--channels", "0"]);
}

#[test]
fn cancelled_in_the_first_pass() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    in_mid_transfer(&mut pair);
    pair.source.client.run("migrate_cancel", json!({}));
    pair.source.await_status(&["cancelled"]);
    runs_on(&mut pair);
    destination_is_gone(&mut pair);
    let states = pair.source.client.migration_states();
    assert_eq!(states, ["setup", "active", "cancelling", "cancelled"]);
    migrates_after_all(pair, &config);
}

#[test]
fn cancelled_in_a_later_pass() {
    // 32 MiB are hot and 32 MiB/s are allowed: the migration never converges.
    let guest = Guest::Dirty { fill: 48, hot: 32, spin: 0 };
    let config = Config { guest, ..Config::default() };
    let mut pair = Pair::start(&config);
    slow(&mut pair, 32);
    pair.source.client.run("migrate-set-parameters", json!({ "downtime-limit": 1 }));
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    pair.source.client.await_event("MIGRATION_PASS", |data| data["pass"].as_u64() >= Some(3));
    pair.source.client.run("migrate_cancel", json!({}));
    pair.source.await_status(&["cancelled"]);
    runs_on(&mut pair);
    pair.source.client.run("migrate-set-parameters", json!({ "downtime-limit": 2000 }));
    migrates_after_all(pair, &config);
}

#[test]
fn cancelled_at_pre_switchover() {
    let config = Config::default();
    let mut pair = at_pre_switchover(&config);
    pair.source.client.run("migrate_cancel", json!({}));
    pair.source.await_status(&["cancelled"]);
    runs_on(&mut pair);
    pair.source.client.capability("pause-before-switchover", false);
    migrates_after_all(pair, &config);
}

/// The guest runs again if the destination fails to load it.
///
/// Without a return path the source's QEMU has completed before, and the guest is resumed once the
/// destination reports that it never ran. With one, QEMU itself waits for the destination.
#[test]
fn the_destination_fails_after_the_source_completed() {
    for return_path in [false, true] {
        let mut pair = with_a_device_at_the_source();
        for host in [&mut pair.source, &mut pair.destination] {
            host.client.capability("return-path", return_path);
        }
        slow(&mut pair, 4096);
        let uri = pair.listen();
        pair.source.client.run("migrate", json!({ "uri": uri }));
        failed(&mut pair, &["destination's QEMU"]);
        let states = pair.source.client.migration_states();
        assert!(!states.contains(&"completed".to_owned()), "{states:?}");
        assert_eq!(states.last().unwrap(), "failed");
        pair.source.client.capability("return-path", false);
        migrates_after_all(pair, &with_a_device());
    }
}

/// A device that only the source has: the destination fails to load its state.
fn with_a_device() -> Config {
    Config { devices: vec!["-device virtio-serial-pci".into()], ..Config::default() }
}

/// A source with that device, and a destination that will fail to load it.
fn with_a_device_at_the_source() -> Pair {
    let mut pair = Pair::start(&Config::default());
    pair.source = Host::start(&pair.dir, "with-device", &with_a_device());
    pair.source.client.capability("events", true);
    pair.source.qemu.await_guest();
    pair
}

/// A guest that a client stopped, before or during the migration, is not started by anything else.
#[test]
fn a_guest_that_was_stopped_stays_so_when_the_destination_fails() {
    for (before, meanwhile) in [("stop", "stop"), ("cont", "stop"), ("stop", "cont")] {
        let mut pair = with_a_device_at_the_source();
        pair.source.client.run(before, json!({}));
        in_mid_transfer(&mut pair);
        pair.source.client.run(meanwhile, json!({}));
        slow(&mut pair, 4096);
        if meanwhile == "stop" {
            let end = pair.source.await_status(&["failed", "completed"]);
            assert_eq!(end["status"], "failed", "{end}");
            let text = end["error-desc"].as_str().unwrap();
            assert!(
                text.contains("destination's QEMU") && text.contains("stays stopped"),
                "{text}"
            );
            pair.source.helper.await_no_worker();
            assert_eq!(pair.source.qemu.status(), "postmigrate");
            pair.source.client.run("cont", json!({}));
            runs_on(&mut pair);
        } else {
            failed(&mut pair, &["destination's QEMU"]);
        }
        migrates_after_all(pair, &with_a_device());
    }
}

/// A source whose QEMU takes its migration for complete, and a stopped destination that will fail
/// when it continues.
fn complete_to_qemu(before: &'static str) -> Pair {
    let mut pair = with_a_device_at_the_source();
    pair.source.client.run(before, json!({}));
    pair.source.client.capability("pause-before-switchover", true);
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    pair.source.await_status(&["pre-switchover"]);
    signal_process(pair.destination.qemu.pid(), Signal::STOP);
    pair.source.client.run("migrate-continue", json!({ "state": "pre-switchover" }));
    await_guest_is(&mut pair, "postmigrate");
    pair
}

fn await_guest_is(pair: &mut Pair, status: &str) {
    eventually(status, || (pair.source.qemu.status() == status).then_some(()));
}

/// Reset the source's guest: QEMU forgets that it has left.
fn reset(pair: &mut Pair) {
    pair.source.client.run("system_reset", json!({}));
    await_guest_is(pair, "prelaunch");
}

/// A worker whose relay died resumes the guest if a migration fails that QEMU took for a success.
#[test]
fn the_sources_relay_is_killed_before_the_destination_fails() {
    for (before, is_reset) in [("cont", false), ("stop", false), ("cont", true)] {
        let mut pair = complete_to_qemu(before);
        if is_reset {
            reset(&mut pair);
        }
        let worker = pair.source.helper.await_worker();
        pair.source.helper.kill();
        signal_process(pair.destination.qemu.pid(), Signal::CONT);
        ends(worker);
        if before == "stop" {
            assert_eq!(pair.source.qemu.status(), "postmigrate");
            pair.source.qemu.qmp.run("cont", json!({}));
        }
        runs_on_with_a_new_helper(pair, &with_a_device());
    }
}

#[test]
fn a_guest_that_is_reset_at_the_end_runs_on_when_the_destination_fails() {
    let mut pair = complete_to_qemu("cont");
    reset(&mut pair);
    signal_process(pair.destination.qemu.pid(), Signal::CONT);
    failed(&mut pair, &["destination's QEMU"]);
    pair.source.client.capability("pause-before-switchover", false);
    migrates_after_all(pair, &with_a_device());
}

/// A lost QMP session with a live QEMU cancels the migration; the guest keeps running.
#[test]
fn the_session_with_qemu_is_lost_at_pre_switchover() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    let proxy = QmpProxy::start(&pair.dir.path().join("between"), pair.source.qemu.spare_socket());
    let pid = pair.source.qemu.pid().to_string();
    pair.source.helper = Helper::attach(pair.dir.path(), "beside", &proxy.path, &["--pid", &pid]);
    pair.source.client = Qmp::connect(&pair.source.helper.socket);
    pair.source.client.capability("pause-before-switchover", true);
    let uri = pair.listen();
    pair.source.client.run("migrate", json!({ "uri": uri }));
    pair.source.await_status(&["pre-switchover"]);
    assert!(pair.source.helper.log().contains("QEMU sends through 2 channels"));
    let worker = pair.source.helper.await_worker();
    proxy.cut();
    ends(worker);
    assert_eq!(pair.source.qemu.qmp.run("query-migrate", json!({}))["status"], "cancelled");
    let capabilities = pair.source.qemu.qmp.run("query-migrate-capabilities", json!({}));
    let multifd = json!({"capability": "multifd", "state": false});
    assert!(capabilities.as_array().unwrap().contains(&multifd), "{capabilities}");
    runs_on_with_a_new_helper(pair, &config);
}

/// With `exit-on-error` off the destination's QEMU stays, and both ends report the failure.
#[test]
fn the_destination_fails_and_stays() {
    let mut pair = with_a_device_at_the_source();
    let uri = format!("rdma:127.0.0.1:{}", crate::support::free_port());
    let arguments = json!({ "uri": uri, "exit-on-error": false });
    pair.destination.client.run("migrate-incoming", arguments);
    pair.source.client.run("migrate", json!({ "uri": uri }));
    failed(&mut pair, &["failed to load the guest: load of migration failed"]);
    let state = pair.destination.await_status(&["failed"]);
    assert!(state["error-desc"].as_str().unwrap().contains("load of migration"), "{state}");
    pair.destination.helper.await_no_worker();
    migrates_after_all(pair, &with_a_device());
}

/// A migration at its very end: the destination's guest runs, and the source does not know it yet.
fn at_the_very_end(return_path: bool) -> (Pair, Proxy) {
    // A cancelled source waits this long for a destination that does not answer.
    let mut pair = Pair::with_helpers(&Config::default(), &["--stall-timeout", "5"]);
    let runs_by_itself = Config { incoming: true, ..Config::default() };
    pair.destination = Host::start(&pair.dir, "runs", &runs_by_itself);
    let proxy = pair.at_pre_switchover(return_path);
    proxy.hold_messages();
    pair.source.client.run("migrate-continue", json!({ "state": "pre-switchover" }));
    eventually("the destination's guest to run", || {
        (pair.destination.qemu.status() == "running").then_some(())
    });
    assert_ne!(pair.source.status(), "completed");
    (pair, proxy)
}

/// Assert that the guest runs at the destination and nowhere else.
#[track_caller]
fn runs_only_at_the_destination(pair: &mut Pair) {
    pair.destination.qemu.assert_goes_on();
    assert_eq!(pair.source.qemu.status(), "postmigrate");
}

#[track_caller]
fn stays_stopped(pair: &mut Pair) {
    let end = pair.source.await_status(&["failed", "completed", "cancelled"]);
    let text = end["error-desc"].as_str().unwrap_or_default();
    println!("error-desc: {text}");
    assert_eq!(end["status"], "failed", "{end}");
    assert!(text.contains("stays stopped here") && text.contains("look there"), "{text}");
    runs_only_at_the_destination(pair);
    pair.source.helper.await_no_worker();
}

#[test]
fn the_link_is_lost_at_the_very_end() {
    for return_path in [false, true] {
        let (mut pair, proxy) = at_the_very_end(return_path);
        proxy.cut();
        stays_stopped(&mut pair);
        pair.destination.await_status(&["completed"]);
    }
}

#[test]
fn the_sources_worker_is_killed_at_the_very_end() {
    for return_path in [false, true] {
        let (mut pair, _proxy) = at_the_very_end(return_path);
        signal_process(pair.source.helper.await_worker(), Signal::KILL);
        stays_stopped(&mut pair);
    }
}

#[test]
fn cancelled_at_the_very_end() {
    for return_path in [false, true] {
        let (mut pair, _proxy) = at_the_very_end(return_path);
        pair.source.client.run("migrate_cancel", json!({}));
        stays_stopped(&mut pair);
    }
}

/// Yank the source's migration, as an impatient manager does.
fn yank(pair: &mut Pair) {
    let instances = json!([{ "type": "migration" }]);
    pair.source.client.run("yank", json!({ "instances": instances }));
}

#[test]
fn yanked_at_any_time() {
    for version in VERSIONS {
        let config = Config { version, mib: 64, guest: FAST, ..Config::default() };
        for pause in [true, false] {
            println!("QEMU {version}, at pre-switchover: {pause}");
            let mut pair = Pair::start(&config);
            pair.source.client.capability("pause-before-switchover", pause);
            if pause {
                let uri = pair.listen();
                pair.source.client.run("migrate", json!({ "uri": uri }));
                pair.source.await_status(&["pre-switchover"]);
            } else {
                in_mid_transfer(&mut pair);
            }
            yank(&mut pair);
            failed(&mut pair, &["The migration was yanked"]);
            destination_is_gone(&mut pair);
            pair.source.client.capability("pause-before-switchover", false);
            migrates_after_all(pair, &config);
        }
    }
}

/// A yank does not start a guest that already runs at the destination, as QEMU alone would.
#[test]
fn yanked_at_the_very_end() {
    for return_path in [false, true] {
        let (mut pair, _proxy) = at_the_very_end(return_path);
        yank(&mut pair);
        stays_stopped(&mut pair);
    }
}

#[test]
fn the_sources_relay_is_killed_at_the_very_end() {
    let (mut pair, proxy) = at_the_very_end(true);
    let worker = pair.source.helper.await_worker();
    pair.source.helper.kill();
    proxy.cut();
    ends(worker);
    runs_only_at_the_destination(&mut pair);
}

/// A guest that runs at the destination keeps running there, and only there, if the worker dies.
#[test]
fn the_destinations_worker_is_killed_at_the_very_end() {
    let (mut pair, _proxy) = at_the_very_end(true);
    signal_process(pair.destination.helper.await_worker(), Signal::KILL);
    stays_stopped(&mut pair);
}

/// The guest runs again if the relay dies at pre-switchover, where QEMU notices nothing by itself.
#[test]
fn the_sources_relay_is_killed_at_pre_switchover() {
    let config = Config::default();
    let mut pair = at_pre_switchover(&config);
    pair.source.helper.kill();
    runs_on_with_a_new_helper(pair, &config);
}

/// A worker without its relay sends nothing to another server at QEMU's socket path, a successor or
/// one that QEMU redirects us to: its guest is not ours.
#[test]
fn the_sources_relay_is_killed_and_anothers_socket_is_left_alone() {
    let mut pair = at_pre_switchover(&Config::default());
    let path = pair.source.qemu.helper_socket();
    let other = pair.dir.path().join("other");
    let listener = UnixListener::bind(&other).unwrap();
    let link = pair.dir.path().join("link");
    std::os::unix::fs::symlink(&other, &link).unwrap();
    fs::rename(&link, &path).unwrap();
    pair.source.helper.kill();
    let (mut client, _) = listener.accept().unwrap();
    let greeting = b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n";
    // It may have hung up already.
    let _ = client.write_all(greeting);
    let mut said = Vec::new();
    let _ = client.read_to_end(&mut said);
    assert_eq!(String::from_utf8_lossy(&said), "");
}

/// The guest runs again if the relay dies after a failure but before it cancels.
///
/// With channels, their end would leave the guest stopped for good; without, QEMU notices nothing.
#[test]
fn the_sources_relay_is_killed_before_it_cancels() {
    for memory in [Memory::Memfd, Memory::Private] {
        let config = Config { memory, ..Config::default() };
        let mut pair = at_pre_switchover(&config);
        pair.source.helper.signal(Signal::STOP);
        signal_process(pair.destination.helper.await_worker(), Signal::KILL);
        eventually("the worker to leave the rest to the relay", || {
            pair.source.helper.log().contains("waiting for the relay").then_some(())
        });
        pair.source.helper.kill();
        runs_on_with_a_new_helper(pair, &config);
    }
}

/// The CPUs that each thread of a process may run on (`Cpus_allowed_list`).
fn processors(pid: u32) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let allowed = |thread: &fs::DirEntry| {
        let status = fs::read_to_string(thread.path().join("status")).ok()?;
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        Some(list.trim().to_owned())
    };
    threads.flatten().filter_map(|thread| allowed(&thread)).collect()
}

#[test]
fn workers_keep_to_their_processors() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::default();
    let options = &["--cpus", "0"];
    let source = Host::with_helper(&dir, "source", &config, options);
    let destination = Host::with_helper(&dir, "destination", &config.incoming(), options);
    let mut pair = Pair { source, destination, dir };
    pair.source.qemu.await_guest();
    in_mid_transfer(&mut pair);
    for host in [&pair.source, &pair.destination] {
        let processors = processors(host.helper.await_worker());
        // The threads that move RAM, the state machine and others.
        assert!(
            processors.len() > 2 && processors.iter().all(|list| list == "0"),
            "{processors:?}"
        );
    }
    slow(&mut pair, 4096);
    pair.source.await_status(&["completed"]);
    pair.verify();
}

#[test]
fn processors_that_are_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = Host::with_helper(&dir, "source", &Config::default(), &["--cpus", "1000"]);
    let error = source.client.fails_to_migrate("rdma:127.0.0.1:1");
    assert!(error.contains("none of the processors of its --cpus"), "{error}");
    source.qemu.assert_goes_on();
}
