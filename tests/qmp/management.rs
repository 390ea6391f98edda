//! What a manager such as libvirt does and expects, command by command, at both ends.

use std::{
    net::TcpListener,
    os::{fd::AsFd as _, unix::net::UnixStream},
    time::{Duration, Instant},
};

use crate::support::{
    Config, Guest, Host, Pair, Qmp, VERSIONS, eventually, free_port,
    helper::signal_process,
    image::{await_job, make_image},
    wire::Peer,
};
use rustix::process::Signal;
use serde_json::{Value, json};

/// libvirt's "unlimited".
const UNLIMITED: u64 = 9_223_372_036_853_727_232;

/// Set every non-experimental capability of QEMU's explicitly, as libvirt does.
fn set_all_capabilities(host: &mut Host, on: &[&str]) {
    let known = host.client.run("query-migrate-capabilities", json!({}));
    let names = known.as_array().unwrap().iter();
    let names = names.map(|entry| entry["capability"].as_str().unwrap());
    let explicit = names.filter(|name| !name.starts_with("x-") && *name != "events");
    let states = explicit.map(|name| json!({"capability": name, "state": on.contains(&name)}));
    let states: Vec<Value> = states.collect();
    assert!(states.iter().any(|entry| entry["capability"] == "rdma-pin-all"), "{states:?}");
    host.client.run("migrate-set-capabilities", json!({ "capabilities": states }));
}

/// Return the events that a manager follows, with only the first pass: how many there are varies.
fn followed(client: &Qmp) -> Vec<String> {
    let shown = |event: &Value| match event["event"].as_str().unwrap() {
        "MIGRATION" => Some(event["data"]["status"].as_str().unwrap().to_owned()),
        "MIGRATION_PASS" if event["data"]["pass"] == 1 => Some("pass 1".to_owned()),
        name @ ("STOP" | "RESUME") => Some(name.to_owned()),
        _ => None,
    };
    client.events.iter().filter_map(shown).collect()
}

/// Return the names of a reply's members and of those in `ram`, but not `socket-address`.
fn members(reply: &Value) -> Vec<String> {
    let names = |value: &Value, prefix: &str| -> Vec<String> {
        let object = value.as_object().into_iter().flatten();
        object.map(|(name, _)| format!("{prefix}{name}")).collect()
    };
    let mut members = names(reply, "");
    members.retain(|name| name != "socket-address");
    members.extend(names(&reply["ram"], "ram."));
    members.sort();
    members
}

/// What a manager has seen.
#[derive(Debug, PartialEq)]
struct Seen {
    source_events: Vec<String>,
    destination_events: Vec<String>,
    /// Members of `query-migrate` at pre-switchover and at the end; at the destination, while it
    /// waits and at the end.
    source_members: [Vec<String>; 2],
    destination_members: [Vec<String>; 2],
}

/// Migrate as libvirt 11.3 does, listening at `listen` and connecting to `uri`.
fn as_libvirt_does(config: &Config, listen: &str, uri: &str) -> Seen {
    let mut pair = Pair::start(config);
    let (mut both, mut incoming) = (vec!["return-path"], json!({ "uri": listen }));
    if config.version != "7.2" {
        both.push("switchover-ack");
        incoming["exit-on-error"] = false.into();
    }
    let tls_off = json!({"tls-creds": "", "tls-hostname": ""});
    let parameters = json!({"tls-creds": "", "tls-hostname": "", "max-bandwidth": UNLIMITED});

    let Pair { source, destination, .. } = &mut pair;
    destination.client.run("query-migrate-parameters", json!({}));
    set_all_capabilities(destination, &[&both[..], &["late-block-activate"]].concat());
    destination.client.run("migrate-set-parameters", tls_off);
    destination.client.run("migrate-incoming", incoming);
    let waiting = destination.client.run("query-migrate", json!({}));

    assert_eq!(source.client.run("query-migrate", json!({})), json!({}));
    let before = source.client.run("query-migrate-parameters", json!({}));
    set_all_capabilities(source, &[&both[..], &["pause-before-switchover"]].concat());
    source.client.run("migrate-set-parameters", parameters);
    let mut migrate = json!({ "uri": uri });
    if config.version != "11.1" {
        // QEMU 11.1 no longer has this argument.
        migrate["detach"] = true.into();
    }
    source.client.run("migrate", migrate);
    assert_eq!(followed(&source.client).first().unwrap(), "setup", "it comes before the reply");
    source.client.await_event("MIGRATION", |data| data["status"] == "pre-switchover");
    let paused = source.client.run("query-migrate", json!({}));
    assert_eq!(paused["status"], "pre-switchover");
    for figure in ["transferred", "remaining", "total"] {
        assert!(paused["ram"][figure].is_u64(), "{paused}");
    }
    // The worker reports its figures four times a second.
    eventually("the progress", || {
        let paused = source.client.run("query-migrate", json!({}));
        (paused["ram"]["transferred"].as_u64() > Some(1 << 20)).then_some(())
    });
    source.client.run("migrate-continue", json!({"state": "pre-switchover"}));
    source.client.await_event("MIGRATION", |data| data["status"] == "completed");
    let end = source.client.run("query-migrate", json!({}));
    assert_eq!(end["status"], "completed");
    assert!(end["ram"]["transferred"].as_u64().unwrap() >= 96 << 20, "{end}");
    assert!(end["ram"]["mbps"].as_f64().unwrap() > 0.0, "{end}");
    let passes = source.client.events.iter().filter(|event| event["event"] == "MIGRATION_PASS");
    let passes: Vec<_> = passes.map(|event| event["data"]["pass"].as_u64().unwrap()).collect();
    // Later versions don't announce the first pass.
    let first = if config.version == "11.1" { 2 } else { 1 };
    assert_eq!(passes, (first..first + passes.len() as u64).collect::<Vec<_>>());

    destination.client.await_event("MIGRATION", |data| data["status"] == "completed");
    let there = destination.client.run("query-migrate", json!({}));
    assert_eq!(there["status"], "completed");
    for query in ["query-chardev", "query-block"] {
        destination.client.run(query, json!({}));
    }
    pair.verify();
    let Pair { source, destination, .. } = &mut pair;
    destination.client.await_event("RESUME", |_| true);
    set_all_capabilities(destination, &[]);
    let default = &before["max-bandwidth"];
    destination.client.run("migrate-set-parameters", json!({ "max-bandwidth": default }));
    let seen = Seen {
        source_events: followed(&source.client),
        destination_events: followed(&destination.client),
        source_members: [members(&paused), members(&end)],
        destination_members: [members(&waiting), members(&there)],
    };
    signal_process(source.qemu.pid(), Signal::TERM);
    source.client.await_event("SHUTDOWN", |_| true);
    eventually("the source's helper to end", || source.helper.child.try_wait().unwrap());
    seen
}

/// libvirt's commands get the same events and members as over QEMU's own `tcp:`.
#[test]
fn libvirts_commands_and_what_it_sees() {
    for (version, host) in [("11.1", "127.0.0.1"), ("10.0", "127.0.0.1"), ("7.2", "[::1]")] {
        let config = Config { version, ..Config::default() };
        let port = free_port();
        let listen = |scheme: &str| format!("{scheme}:[::]:{port}");
        let uri = |scheme: &str| format!("{scheme}:{host}:{port}");
        let ours = as_libvirt_does(&config, &listen("rdma"), &uri("rdma"));
        println!("{ours:#?}");
        let qemus = as_libvirt_does(&config, &listen("tcp"), &uri("tcp"));
        assert_eq!(ours, qemus);
        let states = ["setup", "active", "STOP", "pre-switchover", "device", "completed"];
        let seen: Vec<_> =
            ours.source_events.iter().filter(|event| !event.starts_with("pass")).collect();
        assert_eq!(seen, states);
    }
}

/// Start a migration, and wait until RAM has moved.
fn in_mid_transfer(pair: &mut Pair, incoming: Value) {
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 16 << 20 }));
    pair.destination.client.run("migrate-incoming", incoming.clone());
    pair.source.client.run("migrate", json!({ "uri": incoming["uri"] }));
    eventually("RAM to move", || {
        let state = pair.source.client.run("query-migrate", json!({}));
        (state["ram"]["transferred"].as_u64().unwrap_or(0) > 1 << 20).then_some(())
    });
}

/// Assert that the guest runs at the source and that its next migration succeeds.
#[track_caller]
fn migrates_after_all(pair: &mut Pair) {
    pair.source.helper.await_no_worker();
    assert_eq!(pair.source.qemu.status(), "running");
    pair.source.qemu.assert_goes_on();
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 32 }));
    pair.migrate();
    pair.verify();
}

fn rdma() -> String {
    format!("rdma:127.0.0.1:{}", free_port())
}

/// `exit-on-error` decides whether QEMU stays at the destination when a migration fails.
#[test]
fn exit_on_error_is_honoured() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    in_mid_transfer(&mut pair, json!({"uri": rdma(), "exit-on-error": false}));
    pair.source.client.run("migrate_cancel", json!({}));
    pair.source.await_status(&["cancelled"]);
    let states = pair.source.client.migration_states();
    assert_eq!(states, ["setup", "active", "cancelling", "cancelled"]);
    pair.destination.client.await_event("MIGRATION", |data| data["status"] == "failed");
    let state = pair.destination.client.run("query-migrate", json!({}));
    println!("{state}");
    assert_eq!(state["status"], "failed");
    assert!(state["error-desc"].is_string(), "{state}");
    pair.destination.helper.await_no_worker();
    pair.destination.client.run("quit", json!({}));

    pair.new_destination(&config, "exits");
    in_mid_transfer(&mut pair, json!({"uri": rdma(), "exit-on-error": true}));
    pair.source.client.run("migrate_cancel", json!({}));
    pair.source.await_status(&["cancelled"]);
    let qemu = &mut pair.destination.qemu.child;
    let code = eventually("the destination's QEMU to exit", || qemu.try_wait().unwrap());
    assert_eq!(code.code(), Some(1));
    eventually("its helper's end", || pair.destination.helper.child.try_wait().unwrap());

    // QEMU refuses an argument that it does not have yet, and no worker is left.
    let old = Config { version: "7.2", ..config.clone() };
    pair.new_destination(&old, "old");
    let with_argument = json!({"uri": rdma(), "exit-on-error": false});
    let error = pair.destination.client.refused("migrate-incoming", with_argument);
    assert_eq!(error, "Parameter 'exit-on-error' is unexpected");
    pair.destination.helper.await_no_worker();
    pair.destination.client.run("migrate-incoming", json!({ "uri": rdma() }));

    pair.new_destination(&config, "last");
    migrates_after_all(&mut pair);
}

/// A guest at pre-switchover resumes when the destination dies, cancelled or not. QEMU does not
/// notice by itself.
#[test]
fn the_destination_dies_while_the_source_is_at_pre_switchover() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    pair.source.client.capability("pause-before-switchover", true);
    for cancel in [true, false] {
        pair.source.client.events.clear();
        let uri = pair.listen();
        pair.source.client.run("migrate", json!({ "uri": uri }));
        pair.source.client.await_event("MIGRATION", |data| data["status"] == "pre-switchover");
        pair.destination.qemu.kill();
        if cancel {
            pair.source.client.run("migrate_cancel", json!({}));
        }
        pair.source.client.await_event("RESUME", |_| true);
        let end = pair.source.await_status(&["failed", "cancelled"]);
        println!("{end}");
        assert!(cancel || end["status"] == "failed", "{end}");
        assert!(end["ram"]["total"].as_u64().unwrap() > 96 << 20, "{end}");
        let last = |data: &Value| data["status"] == end["status"];
        pair.source.client.await_event("MIGRATION", last);
        pair.source.qemu.assert_goes_on();
        pair.new_destination(&config, if cancel { "second" } else { "third" });
    }
    pair.source.client.capability("pause-before-switchover", false);
    migrates_after_all(&mut pair);
}

/// Disconnect the manager and connect a new one.
fn come_back(host: &mut Host) {
    drop(std::mem::replace(&mut host.client, Qmp::nobody()));
    host.client = Qmp::connect(&host.helper.socket);
}

/// A restarted manager finds the running migration and can cancel it.
#[test]
fn a_manager_that_comes_back_cancels() {
    let mut pair = Pair::start(&Config::default());
    in_mid_transfer(&mut pair, json!({ "uri": rdma() }));
    come_back(&mut pair.source);
    let state = pair.source.client.run("query-migrate", json!({}));
    assert_eq!(state["status"], "active", "{state}");
    assert!(state["ram"]["transferred"].as_u64().unwrap() > 0, "{state}");
    pair.source.client.run("migrate_cancel", json!({}));
    pair.source.client.await_event("MIGRATION", |data| data["status"] == "cancelled");
    pair.source.await_status(&["cancelled"]);
    pair.new_destination(&Config::default(), "next");
    migrates_after_all(&mut pair);
}

/// A restarted manager can cancel a migration that still connects.
#[test]
fn a_manager_that_comes_back_while_the_source_connects_cancels() {
    let mut pair = Pair::start(&Config::default());
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("rdma:{}", silent.local_addr().unwrap());
    let migrate = json!({"execute": "migrate", "arguments": {"uri": uri}});
    pair.source.client.send(format!("{migrate}\n").as_bytes());
    let mut peer = Peer::accept(&silent);
    // The source's hello.
    peer.frame().unwrap();
    let begun = Instant::now();
    come_back(&mut pair.source);
    let state = pair.source.client.run("query-migrate", json!({}));
    assert_eq!(state["status"], "setup", "{state}");
    pair.source.client.run("migrate_cancel", json!({}));
    pair.source.client.await_event("MIGRATION", |data| data["status"] == "cancelled");
    assert!(begun.elapsed() < Duration::from_secs(2), "it took {:?}", begun.elapsed());
    assert_eq!(pair.source.status(), "cancelled");
    peer.frame().unwrap_err();
    migrates_after_all(&mut pair);
}

/// Return the last of the next `count` throughput reports.
fn throughput(client: &mut Qmp, count: usize) -> Value {
    client.events.clear();
    let name = "RDMA_MIGRATION_THROUGHPUT";
    for _ in 1..count {
        client.await_event(name, |_| true);
        client.events.clear();
    }
    client.await_event(name, |_| true)["data"].clone()
}

#[test]
fn parameters_that_are_set_in_mid_migration_take_effect() {
    // 32 MiB are hot, and at most 32 MiB/s are allowed: the migration never converges.
    let guest = Guest::Dirty { fill: 48, hot: 32, spin: 0 };
    let mut pair = Pair::start(&Config { guest, ..Config::default() });
    let uri = pair.listen();
    let client = &mut pair.source.client;
    client.run("migrate-set-parameters", json!({"max-bandwidth": 8 << 20, "downtime-limit": 1}));
    client.run("migrate", json!({ "uri": uri }));
    for (mib, range) in [(8, 20.0..90.0), (32, 100.0..330.0), (8, 20.0..90.0)] {
        client.run("migrate-set-parameters", json!({ "max-bandwidth": mib << 20 }));
        // The first two may count bytes from before the change.
        let data = throughput(client, 3);
        println!("{mib} MiB/s: {data}");
        assert_eq!(data["max-bandwidth"], mib << 20);
        let mbps = data["mbps"].as_f64().unwrap();
        assert!(range.contains(&mbps), "{mbps} mbps at {mib} MiB/s");
        let state = client.run("query-migrate", json!({}));
        let shown = state["ram"]["mbps"].as_f64().unwrap();
        assert!(range.contains(&shown), "{shown} mbps at {mib} MiB/s");
    }
    client.run("migrate-set-parameters", json!({ "max-bandwidth": 32 << 20 }));
    client.await_event("MIGRATION_PASS", |data| data["pass"].as_u64() >= Some(3));
    assert_eq!(client.run("query-migrate", json!({}))["status"], "active");
    client.run("migrate-set-parameters", json!({ "downtime-limit": 8000 }));
    let end = pair.source.await_status(&["completed", "failed"]);
    assert_eq!(end["status"], "completed", "{end}");
    pair.verify();
}

/// Assert that a command is refused at once, with these words.
#[track_caller]
fn refused_at_once(client: &mut Qmp, command: &str, arguments: &Value, words: &[&str]) {
    let begun = Instant::now();
    let error = client.refused(command, arguments.clone());
    println!("{command}: {error}");
    assert!(begun.elapsed() < Duration::from_secs(2), "it took {:?}", begun.elapsed());
    for word in words {
        assert!(error.contains(word), "'{word}' is not in: {error}");
    }
}

#[test]
fn what_excludes_rdma_is_refused_at_both_ends() {
    let mut pair = Pair::start(&Config::default());
    let arguments = json!({ "uri": rdma() });
    let Pair { source, destination, .. } = &mut pair;
    for (host, command) in [(&mut *destination, "migrate-incoming"), (&mut *source, "migrate")] {
        for names in [&["multifd"][..], &["multifd", "zero-copy-send"], &["postcopy-ram"]] {
            names.iter().for_each(|name| host.client.capability(name, true));
            let hints = names.iter().map(|name| format!("migrate_set_capability {name} off"));
            let hints: Vec<String> = hints.collect();
            let words: Vec<&str> = hints.iter().map(String::as_str).collect();
            refused_at_once(&mut host.client, command, &arguments, &words);
            names.iter().rev().for_each(|name| host.client.capability(name, false));
        }
        host.client.run("migrate-set-parameters", json!({ "tls-creds": "tls0" }));
        refused_at_once(&mut host.client, command, &arguments, &["'tls-creds'", "unset it"]);
        host.client.run("migrate-set-parameters", json!({ "tls-creds": "" }));
        // Channels that management requests.
        let addr = json!({"transport": "rdma", "host": "127.0.0.1", "port": "1"});
        let main = json!({"channel-type": "main", "addr": addr});
        let two = json!({ "channels": [main, main] });
        refused_at_once(&mut host.client, command, &two, &["exactly one channel"]);
        let both = json!({"uri": arguments["uri"], "channels": [main]});
        refused_at_once(&mut host.client, command, &both, &["either 'uri' or 'channels'"]);
    }

    // Now the destination waits.
    destination.client.run("migrate-incoming", arguments.clone());
    for name in ["multifd", "postcopy-ram"] {
        source.client.capability(name, true);
        refused_at_once(&mut source.client, "migrate", &arguments, &[name]);
        source.client.capability(name, false);
    }
    source.client.run("migrate", arguments);
    source.await_status(&["completed"]);
    pair.verify();
}

/// A capability that excludes `rdma:`, set while the destination waits, fails the migration with a
/// hint. With multifd QEMU would wait for channels forever.
#[test]
fn what_excludes_rdma_at_a_destination_that_waits_already_is_refused() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    for (turn, name) in ["multifd", "postcopy-ram"].into_iter().enumerate() {
        let uri = rdma();
        let incoming = json!({"uri": uri, "exit-on-error": false});
        pair.destination.client.run("migrate-incoming", incoming);
        pair.destination.client.capability(name, true);
        pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 16 << 20 }));
        let error = pair.source.client.fails_to_migrate(&uri);
        println!("{error}");
        let hint = format!("migrate_set_capability {name} off");
        assert!(error.contains("destination") && error.contains(&hint), "{error}");
        let state = pair.destination.await_status(&["failed"]);
        assert!(state["error-desc"].as_str().unwrap().contains(&hint), "{state}");
        pair.new_destination(&config, &format!("next-{turn}"));
    }
    migrates_after_all(&mut pair);
}

/// Assert that the helper had no part in the migration and that the client sees only QEMU.
#[track_caller]
fn assert_untouched(host: &mut Host) {
    // QEMU reports `completed` a moment before its figures are final.
    eventually("the same reply", || {
        let shown = host.client.run("query-migrate", json!({}));
        (shown == host.qemu.qmp.run("query-migrate", json!({}))).then_some(())
    });
    let ours = |event: &&Value| event["event"] == "RDMA_MIGRATION_THROUGHPUT";
    assert_eq!(host.client.events.iter().find(ours), None);
    assert_eq!(host.helper.workers(), [0; 0]);
    host.client.events.clear();
}

/// Return the arguments of `migrate` for one of QEMU's transports.
fn arguments_for(transport: &str, path: &str) -> Value {
    let port = free_port().to_string();
    let addr = json!({"transport": "socket", "type": "inet", "host": "127.0.0.1", "port": port});
    match transport {
        "fd" => json!({"uri": "fd:mine"}),
        "unix" | "file" => json!({ "uri": format!("{transport}:{path}") }),
        "exec" => json!({ "uri": format!("exec:cat > {path}") }),
        "channels" => json!({"channels": [{"channel-type": "main", "addr": addr}]}),
        _ => json!({ "uri": format!("tcp:127.0.0.1:{port}") }),
    }
}

/// Prepare both ends for one of QEMU's transports.
fn prepare_for(transport: &str, hosts: [&mut Host; 2]) {
    match transport {
        "fd" => {
            let (ours, theirs) = UnixStream::pair().unwrap();
            for (host, end) in hosts.into_iter().zip([ours, theirs]) {
                let getfd = json!({"execute": "getfd", "arguments": {"fdname": "mine"}});
                host.client.send_with_fd(format!("{getfd}\n").as_bytes(), end.as_fd());
                assert_eq!(host.client.reply_line(), "{\"return\": {}}\r\n");
            }
        }
        "multifd" => {
            for host in hosts {
                host.client.capability("multifd", true);
                host.client.run("migrate-set-parameters", json!({ "multifd-channels": 4 }));
            }
        }
        _ => {}
    }
}

/// QEMU's own transports pass untouched, after and before a migration over `rdma:`.
#[test]
fn other_transports_pass_untouched() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    pair.migrate();
    pair.verify();
    let completed = |data: &Value| data["status"] == "completed";
    for transport in ["fd", "unix", "tcp", "multifd", "channels", "exec", "file"] {
        pair.turn_around(&config, transport);
        let path = pair.dir.path().join(format!("{transport}.state"));
        let to = arguments_for(transport, path.to_str().unwrap());
        let Pair { source, destination, .. } = &mut pair;
        source.client.events.clear();
        prepare_for(transport, [&mut *source, &mut *destination]);
        // A file must exist before it is read.
        if matches!(transport, "exec" | "file") {
            source.client.run("migrate", to.clone());
            source.client.await_event("MIGRATION", completed);
            let from = to["uri"].as_str().unwrap().replace("cat >", "cat");
            destination.client.run("migrate-incoming", json!({ "uri": from }));
        } else {
            destination.client.run("migrate-incoming", to.clone());
            source.client.run("migrate", to);
            source.client.await_event("MIGRATION", completed);
        }
        destination.client.await_event("MIGRATION", completed);
        assert_untouched(source);
        assert_untouched(destination);
        pair.verify();
        pair.destination.client.capability("multifd", false);
    }
    pair.turn_around(&config, "last");
    pair.migrate();
    pair.verify();
}

#[test]
fn snapshots_pass_untouched() {
    for version in VERSIONS {
        let mut pair = Pair::start(&Config { version, ..Config::default() });
        let host = &mut pair.source;
        make_image(&mut host.client, pair.dir.path().join("disk.qcow2").to_str().unwrap());
        let snapshot = |job: &str| json!({"job-id": job, "tag": "one", "vmstate": "disk", "devices": ["disk"]});
        host.client.run("snapshot-save", snapshot("save"));
        await_job(&mut host.client, "save");
        host.qemu.assert_goes_on();
        host.client.run("stop", json!({}));
        host.client.run("snapshot-load", snapshot("load"));
        await_job(&mut host.client, "load");
        host.client.run("cont", json!({}));
        assert_untouched(host);
        host.qemu.assert_goes_on();
        // The destination does not have the image.
        for node in ["disk", "protocol"] {
            host.client.run("blockdev-del", json!({ "node-name": node }));
        }
        pair.migrate();
        pair.verify();
    }
}

/// `error-desc` keeps QEMU's own reason: here a disk that can't be flushed when the guest stops.
#[test]
fn qemus_own_reason_is_kept() {
    for version in VERSIONS {
        let mut pair = Pair::start(&Config { version, ..Config::default() });
        let broken = json!({
            "driver": "blkdebug",
            "node-name": "broken",
            "image": { "driver": "null-co" },
            "inject-error": [{ "event": "none", "iotype": "flush", "errno": 5 }],
        });
        pair.source.client.run("blockdev-add", broken);
        pair.source.client.hmp("qemu-io broken \"write 0 512\"");
        let uri = pair.listen();
        pair.source.client.run("migrate", json!({ "uri": uri }));
        let end = pair.source.await_status(&["failed", "completed", "cancelled"]);
        println!("{version}: {}", end["error-desc"]);
        let why = end["error-desc"].as_str().unwrap();
        assert!(why.starts_with("QEMU ended its migration stream early"), "{why}");
        let mut qemu = Qmp::connect(&pair.source.qemu.spare_socket());
        let qemus = qemu.run("query-migrate", json!({}))["error-desc"].take();
        // QEMU 7.2 gives no reason.
        assert_eq!(qemus.is_string(), version != "7.2");
        assert!(why.ends_with(qemus.as_str().unwrap_or_default()), "{why}");
        pair.source.qemu.assert_goes_on();
    }
}
