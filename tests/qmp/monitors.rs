//! What a client of the helper sees: QEMU's own QMP, byte for byte, and refusals in QEMU's words.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::{
        fd::AsFd as _,
        unix::net::{UnixListener, UnixStream},
    },
};

use crate::support::{Config, Helper, Host, Pair, Qmp, VERSIONS, eventually};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Start a host whose QEMU is paused.
fn host() -> (tempfile::TempDir, Host) {
    let dir = tempfile::tempdir().unwrap();
    let host = Host::start(&dir, "only", &Config { paused: true, ..Config::default() });
    (dir, host)
}

#[test]
fn replies_are_qemus_byte_for_byte() {
    let (_dir, mut host) = host();
    for command in [
        "query-command-line-options",
        "query-block",
        "query-cpus-fast",
        "query-nonsense",
        "query-memdev",
    ] {
        let line = format!("{{\"execute\": \"{command}\", \"id\": {{\"a\": [1, \"é\"]}}}}\r\n");
        host.qemu.qmp.send(line.as_bytes());
        host.client.send(line.as_bytes());
        let (direct, through) = (host.qemu.qmp.reply_line(), host.client.reply_line());
        assert!(through.ends_with("\r\n"));
        assert!(direct == through, "{command}: {direct:.200} / {through:.200}");
    }
}

#[test]
fn own_replies_echo_the_id() {
    let (_dir, mut host) = host();
    host.client.send(b"{\"execute\": \"query-rdma-migrate-blockers\", \"id\": 1.0e2 }\n");
    assert_eq!(host.client.reply_line(), "{\"return\": [], \"id\": 1.0e2}\r\n");
    host.client.send(b"{\"id\": \"x\", \"execute\": \"query-migrate\"}\n");
    assert_eq!(host.client.reply_line(), "{\"return\": {}, \"id\": \"x\"}\r\n");
}

#[test]
fn refusals_are_in_qemus_words_and_the_connection_stays() {
    let (_dir, mut host) = host();
    let client = &mut host.client;
    for (sent, expected) in [
        ("foo", "JSON parse error"),
        ("{\"execute\": }", "JSON parse error"),
        ("[]", "QMP input must be a JSON object"),
        ("{\"execute\": 5}", "QMP input member 'execute' must be a string"),
        ("{\"execute\": \"nonsense\"}", "The command nonsense has not been found"),
        (
            "{\"execute\": \"migrate\", \"arguments\": {\"uri\": 5}}",
            "Invalid parameter type for 'uri', expected: string",
        ),
        (
            "{\"execute\": \"migrate\", \"arguments\": {\"uri\": \"rdma:h:1\", \"typo\": 1}}",
            "Parameter 'typo' is unexpected",
        ),
        (
            "{\"execute\": \"query-rdma-helper\", \"arguments\": {\"typo\": 1}}",
            "Parameter 'typo' is unexpected",
        ),
        (
            "{\"execute\": \"query-rdma-migrate-blockers\", \"arguments\": {\"typo\": 1}}",
            "Parameter 'typo' is unexpected",
        ),
        ("{\"execute\": \"migrate\", \"arguments\": {\"uri\": \"rdma:host\"}}", "no port"),
        (
            "{\"execute\": \"migrate-incoming\", \"arguments\": {\"uri\": \"rdma:127.0.0.1:1\"}}",
            "incoming",
        ),
    ] {
        client.send(format!("{sent}\n").as_bytes());
        let line = client.reply_line();
        let reply: Value = serde_json::from_str(&line).unwrap();
        let desc = reply["error"]["desc"].as_str().unwrap_or_default();
        println!("{sent} -> {desc}");
        assert!(desc.contains(expected), "{sent}: {line}");
    }
    let error = client.fails_to_migrate("rdma:no-such-host.invalid:1");
    assert!(error.contains("Cannot resolve 'no-such-host.invalid'"), "{error}");
    // A port that nobody listens on.
    let uri = format!("rdma:127.0.0.1:{}", crate::support::free_port());
    let error = client.fails_to_migrate(&uri);
    println!("{uri} -> {error}");
    assert!(
        error.contains(&uri[5..])
            && error.contains("refused")
            && error.contains("migrate-incoming"),
        "{error}"
    );
    assert_eq!(client.run("query-status", json!({}))["status"], "prelaunch");
    host.helper.await_no_worker();
}

#[test]
fn what_excludes_rdma_is_refused_at_once() {
    let (_dir, mut host) = host();
    for capability in ["multifd", "postcopy-ram", "x-ignore-shared", "dirty-bitmaps"] {
        host.client.capability(capability, true);
        let error = host.client.refused("migrate", json!({ "uri": "rdma:127.0.0.1:1" }));
        println!("{error}");
        assert!(error.contains(capability) && error.contains("off"), "{error}");
        let blockers = host.client.run("query-rdma-migrate-blockers", json!({}));
        assert!(blockers[0]["reason"].as_str().unwrap().contains(capability), "{blockers}");
        host.client.capability(capability, false);
    }
    assert_eq!(host.client.run("query-rdma-migrate-blockers", json!({})), json!([]));
}

/// `query-commands` and `query-qmp-schema` show the helper's additions, in QEMU's form and at the
/// end.
#[test]
fn introspection_shows_what_is_added() {
    for version in VERSIONS {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { version, paused: true, ..Config::default() };
        let mut host = crate::support::Host::start(&dir, "host", &config);
        let mut added = |command: &str| -> Vec<Value> {
            let list = |reply: Value| reply.as_array().unwrap().clone();
            let all = list(host.client.run(command, json!({})));
            let qemus = list(host.qemu.qmp.run(command, json!({})));
            assert_eq!(all[..qemus.len()], qemus, "{command}");
            all[qemus.len()..].to_vec()
        };
        let commands = added("query-commands");
        let schema = added("query-qmp-schema");
        let of_kind = |kind: &str| -> Vec<_> {
            let found = schema.iter().filter(|entity| entity["meta-type"] == kind);
            found.map(|entity| entity["name"].as_str().unwrap().to_owned()).collect()
        };
        let names: Vec<_> = commands.iter().map(|it| it["name"].as_str().unwrap()).collect();
        assert_eq!(of_kind("command"), names);
        assert_eq!(of_kind("event"), ["RDMA_MIGRATION_THROUGHPUT"]);
        // QEMU already lists QAPI's built-in types.
        assert_eq!(of_kind("builtin").len(), 0);
        // Each has a name with QEMU's downstream prefix and a short one. Both work.
        assert_eq!(names.len(), 4);
        for name in names {
            let short = name.strip_prefix("__org.qemu-rdma-helper_").unwrap_or(name);
            assert_eq!(host.client.run(name, json!({})), host.client.run(short, json!({})));
        }
        let info = host.client.run("query-rdma-helper", json!({}));
        assert_eq!(info["qemu"], host.qemu.qmp.run("query-version", json!({})));
        let error = host.client.refused("query-commands", json!({ "typo": 1 }));
        assert_eq!(error, host.qemu.qmp.refused("query-commands", json!({ "typo": 1 })));
    }
}

#[test]
fn one_migration_at_a_time() {
    let mut pair = Pair::start(&Config::default());
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 8 << 20 }));
    let uri = pair.listen();
    let error = pair.destination.client.refused("migrate-incoming", json!({ "uri": uri }));
    assert!(error.contains("already"), "{error}");
    pair.source.client.run("migrate", json!({ "uri": uri }));
    for other in [uri.as_str(), "unix:/nonexistent"] {
        let error = pair.source.client.refused("migrate", json!({ "uri": other }));
        assert_eq!(error, "There's a migration process in progress");
    }
    let text = pair.source.client.hmp(&format!("migrate -d {uri}"));
    assert_eq!(text, "Error: There's a migration process in progress\r\n");
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 32 }));
    pair.source.await_status(&["completed"]);
    pair.verify();
}

#[test]
fn half_a_command_then_silence_harms_nobody() {
    let (_dir, mut host) = host();
    host.client.send(b"{\"execute\": \"query-st");
    // Events still arrive.
    host.qemu.qmp.run("cont", json!({}));
    host.client.await_event("RESUME", |_| true);
    host.client.send(b"atus\"}\n");
    assert!(host.client.reply_line().contains("running"));
}

#[test]
fn a_command_of_64_mib_is_refused_in_bounds() {
    let (_dir, mut host) = host();
    host.client.send(b"{\"execute\": \"");
    let piece = vec![b'x'; 1 << 20];
    for _ in 0..64 {
        host.client.send(&piece);
    }
    host.client.send(b"\"}\n{\"execute\": \"query-status\"}\n");
    assert!(host.client.reply_line().contains("JSON parse error"));
    assert!(host.client.reply_line().contains("prelaunch"));
    let peak = crate::support::helper::peak_rss(host.helper.pid());
    assert!(peak < 48 << 20, "{} KiB", peak >> 10);
}

#[test]
fn a_client_must_negotiate_and_may_come_again() {
    let (_dir, host) = host();
    let Host { client, helper, qemu: _qemu } = host;
    drop(client);
    for _ in 0..3 {
        let mut client = Qmp::connect_raw(&helper.socket);
        assert!(client.greeting.contains("\"QMP\"") && client.greeting.ends_with("\r\n"));
        let error = client.execute("query-status", json!({})).unwrap_err();
        assert_eq!(error["class"], "CommandNotFound");
        client.run("qmp_capabilities", json!({}));
        client.run("query-status", json!({}));
        let error = client.refused("qmp_capabilities", json!({}));
        assert!(error.contains("already complete"), "{error}");
    }
}

#[test]
fn descriptors_pass_with_their_command() {
    let (_dir, mut host) = host();
    let (ours, theirs) = UnixStream::pair().unwrap();
    // Two commands at once; the descriptor belongs to the second.
    host.client.send(b"{\"execute\": \"query-status\"}\n");
    host.client.send_with_fd(
        b"{\"execute\": \"getfd\", \"arguments\": {\"fdname\": \"mine\"}}\n",
        theirs.as_fd(),
    );
    drop(theirs);
    assert!(host.client.reply_line().contains("prelaunch"));
    assert_eq!(host.client.reply_line(), "{\"return\": {}}\r\n");
    let file = std::fs::File::open("/dev/null").unwrap();
    host.client.send_with_fd(
        b"{\"execute\": \"add-fd\", \"arguments\": {\"fdset-id\": 7}}\n",
        file.as_fd(),
    );
    assert!(host.client.reply_line().contains("\"fdset-id\": 7"));
    let error = host.client.refused("getfd", json!({ "fdname": "none" }));
    assert!(error.contains("SCM_RIGHTS"), "{error}");
    // QEMU's own migration into that descriptor is left alone.
    host.client.run("migrate", json!({ "uri": "fd:mine" }));
    let mut magic = [0; 4];
    (&ours).read_exact(&mut magic).unwrap();
    assert_eq!(&magic, b"QEVM");
    drop(ours);
    let state = host.await_status(&["failed"]);
    assert!(state["error-desc"].as_str().is_some(), "{state}");
}

/// A descriptor is for the first command that takes one, as in QEMU, whatever it was sent with.
#[test]
fn descriptors_wait_for_the_command_that_takes_them() {
    const QUERY: &str = "{\"execute\": \"query-status\"}\n";
    const GETFD: &str = "{\"execute\": \"getfd\", \"arguments\": {\"fdname\": \"it\"}}\n";
    let file = std::fs::File::open("/dev/null").unwrap();
    for version in VERSIONS {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { version, ..Config::default() }.incoming();
        let mut host = Host::start(&dir, "host", &config);
        let mut taken = |with: &[&str], without: &[&str]| {
            let clients = [&mut host.client, &mut host.qemu.qmp];
            let [ours, qemus] = clients.map(|client| {
                client.send_with_fd(with.concat().as_bytes(), file.as_fd());
                client.send(without.concat().as_bytes());
                let commands = [with, without].concat();
                let replies: Vec<_> = commands.iter().map(|_| client.reply_line()).collect();
                replies.iter().map(|reply| !reply.contains("error")).collect::<Vec<_>>()
            });
            assert_eq!(ours, qemus, "{version}: {with:?} {without:?}");
            ours
        };
        assert_eq!(taken(&[GETFD, QUERY], &[]), [true, true]);
        assert_eq!(taken(&[QUERY, GETFD], &[]), [true, true]);
        assert_eq!(taken(&[GETFD, GETFD], &[QUERY]), [true, false, true]);
        assert_eq!(taken(&[QUERY], &[QUERY, GETFD, GETFD]), [true, true, true, false]);
        // A command of the helper's, which sends commands to QEMU itself.
        assert_eq!(taken(&["{\"execute\": \"query-migrate\"}\n"], &[GETFD]), [true, true]);
    }
}

#[test]
fn other_migrations_are_qemus() {
    let (dir, mut host) = host();
    let path = dir.path().join("state");
    host.client.capability("events", true);
    host.client.run("migrate", json!({ "uri": format!("exec:cat > {}", path.display()) }));
    let end = host.await_status(&["completed"]);
    assert_eq!(end, host.qemu.qmp.run("query-migrate", json!({})));
    assert_eq!(host.client.migration_states(), ["setup", "active", "device", "completed"]);
}

/// Unknown events and fields pass unchanged and in order. The test plays QEMU.
#[test]
fn unknown_events_and_fields_keep_their_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("played");
    let listener = UnixListener::bind(&path).unwrap();
    let played = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let say = |line: &str| (&stream).write_all(format!("{line}\r\n").as_bytes()).unwrap();
        say(r#"{"event": "EARLY", "timestamp": {"seconds": -1, "microseconds": -1}}"#);
        say(
            r#"{"QMP": {"version": {"qemu": {"major": 99}}, "capabilities": ["oob", "new"]}, "x": 1}"#,
        );
        let mut expect = |name: &str| {
            let command: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
            assert_eq!(command["execute"], name);
            command["id"].clone()
        };
        let id = expect("qmp_capabilities");
        say(&json!({ "return": {}, "id": id }).to_string());
        // A QEMU that is just starting may greet again and require negotiation again.
        say(r#"{"QMP": {"version": {}, "capabilities": []}}"#);
        let id = expect("query-version");
        let error = json!({ "class": "CommandNotFound", "desc": "Expecting negotiation" });
        say(&json!({ "error": error, "id": id }).to_string());
        let id = expect("qmp_capabilities");
        say(&json!({ "return": {}, "id": id }).to_string());
        let command = lines.next().unwrap().unwrap();
        assert_eq!(command, r#"{ "execute" : "query-x",   "id": 7}"#);
        say(
            r#"{"event": "NEW_EVENT", "data": {"b": 1,   "a": 1e3}, "timestamp": {"seconds": 1, "microseconds": 2}}"#,
        );
        say(r#"{"id": 7, "error": {"class": "NewClass", "desc": "d", "more": null}}"#);
        say(
            r#"{"event": "MIGRATION", "data": {"status": "new-state"}, "timestamp": {"seconds": 1, "microseconds": 3}}"#,
        );
        lines.next();
    });
    let helper = Helper::attach(dir.path(), "played", &path, &[]);
    let mut client = Qmp::connect_raw(&helper.socket);
    let greeting: Value = serde_json::from_str(&client.greeting).unwrap();
    assert_eq!(
        greeting,
        json!({"QMP": {"version": {"qemu": {"major": 99}}, "capabilities": ["oob"]}, "x": 1})
    );
    client.run("qmp_capabilities", json!({}));
    client.send(b"{ \"execute\" : \"query-x\",   \"id\": 7}\n");
    let lines: Vec<_> = (0..3).map(|_| client.line().unwrap()).collect();
    assert_eq!(
        lines,
        [
            "{\"event\": \"NEW_EVENT\", \"data\": {\"b\": 1,   \"a\": 1e3}, \"timestamp\": {\"seconds\": 1, \"microseconds\": 2}}\r\n",
            "{\"id\": 7, \"error\": {\"class\": \"NewClass\", \"desc\": \"d\", \"more\": null}}\r\n",
            "{\"event\": \"MIGRATION\", \"data\": {\"status\": \"new-state\"}, \"timestamp\": {\"seconds\": 1, \"microseconds\": 3}}\r\n",
        ]
    );
    drop(client);
    drop(helper);
    played.join().unwrap();
}

#[test]
fn a_client_that_does_not_read_stalls_nobody() {
    let (dir, host) = host();
    let Host { client, helper, mut qemu } = host;
    drop(client);
    let mut lazy = Qmp::connect(&helper.socket);
    // Far more replies than all buffers hold.
    while lazy.try_send(b"{\"execute\": \"query-qmp-schema\"}\n") && helper.log().is_empty() {}
    drop(lazy);
    let mut client = Qmp::connect(&helper.socket);
    assert_eq!(client.run("query-status", json!({}))["status"], "prelaunch");
    assert_eq!(qemu.status(), "prelaunch");
    drop(dir);
}

#[test]
fn the_end_of_qemu_is_told_after_all_that_it_said() {
    let (_dir, mut host) = host();
    host.client.send(b"{\"execute\": \"quit\"}\n");
    let mut lines = Vec::new();
    while let Some(line) = host.client.line() {
        lines.push(line);
    }
    // In whichever order QEMU sends them.
    assert!(lines.iter().any(|line| line == "{\"return\": {}}\r\n"), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("SHUTDOWN")), "{lines:?}");
    let status = eventually("the helper's end", || host.helper.child.try_wait().unwrap());
    assert!(status.success());
    assert!(!host.helper.socket.exists());
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let (dir, mut host) = host();
    let socket = host.helper.socket.clone();
    let attach = |qemu: std::path::PathBuf| {
        let mut command = std::process::Command::new(crate::support::helper::BINARY);
        command.args(["attach", "--qemu-qmp"]).arg(qemu).arg("--qmp").arg(&socket);
        command
    };
    let output = attach(host.qemu.spare_socket()).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("Address already in use") || error.contains("in use"), "{error}");
    host.helper.signal(Signal::KILL);
    eventually("its end", || host.helper.child.try_wait().unwrap());
    assert!(host.helper.socket.exists());
    let mut again = attach(host.qemu.helper_socket());
    let mut again = again.stderr(std::process::Stdio::null()).spawn().unwrap();
    let mut client = Qmp::connect(&host.helper.socket);
    client.run("query-rdma-helper", json!({}));
    drop(client);
    drop(dir);
    again.kill().unwrap();
    again.wait().unwrap();
}

/// A client never gets the reply to another's or the helper's own command, even if QEMU sends more
/// or fewer replies than there were commands.
#[test]
fn nobody_gets_anothers_reply() {
    let (_dir, mut host) = host();
    for _ in 0..5 {
        host.client.send(b"{\"execute\": \"query-status\", \"x\": \"\xff\"}\n");
        host.client.send(b"{\"execute\": \"query-migrate\", \"id\": 1}\n");
        host.client.send(b"{\"execute\": \"query-status\", \"x\": 1, \"id\": 2}\n");
        host.client.send(b"{\"execute\": \"query-name\", \"id\": 3}\n");
        // The rest of the line after the stray byte is answered too.
        let replies: Vec<Value> =
            (0..5).map(|_| serde_json::from_str(&host.client.reply_line()).unwrap()).collect();
        let ids: Vec<_> = replies.iter().map(|reply| reply["id"].clone()).collect();
        assert_eq!(ids, [Value::Null, Value::Null, json!(1), json!(2), json!(3)], "{replies:#?}");
        assert!(replies[..2].iter().all(|reply| reply["error"].is_object()));
        assert!(replies[4]["return"].is_object());
    }
}

/// Commands just below the size limit take bounded memory, even those that cost most to parse.
#[test]
fn a_command_of_15_mib_is_read_in_bounds() {
    let (_dir, mut host) = host();
    let zeroes = "0,".repeat(7 << 20);
    let command =
        format!("{{\"execute\": \"query-status\", \"arguments\": {{\"x\": [{zeroes}0]}}}}\n");
    host.client.send(command.as_bytes());
    let reply = host.client.reply_line();
    assert!(reply.contains("too many values"), "{reply}");
    let text = "x".repeat(15 << 20);
    let arguments = format!("{{\"x\": \"{text}\"}}");
    let command = format!("{{\"execute\": \"migrate\", \"arguments\": {arguments}}}\n");
    host.client.send(command.as_bytes());
    let reply = host.client.reply_line();
    assert!(reply.contains("have more than 262144 bytes"), "{reply}");
    let peak = crate::support::helper::peak_rss(host.helper.pid());
    assert!(peak < 100 << 20, "{} MiB", peak >> 20);
    assert_eq!(host.client.run("query-status", json!({}))["status"], "prelaunch");
}

/// A refused migration does not replace the state of another.
#[test]
fn a_refused_migration_leaves_the_others_state() {
    let mut pair = Pair::start(&Config::default());
    // QEMU's own migration at both ends, after refused ones over `rdma:`.
    for uri in ["rdma:nowhere", "rdma:256.0.0.1:1"] {
        pair.destination.client.refused("migrate-incoming", json!({ "uri": uri }));
    }
    let uri = format!("tcp:127.0.0.1:{}", crate::support::free_port());
    pair.destination.client.run("migrate-incoming", json!({ "uri": uri }));
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 8 << 20 }));
    pair.source.client.run("migrate", json!({ "uri": uri }));
    pair.source.client.refused("migrate", json!({ "uri": "rdma:127.0.0.1:1" }));
    assert_ne!(pair.source.status(), "failed");
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 32 }));
    pair.source.await_status(&["completed"]);
    pair.destination.await_status(&["completed"]);
    let why = pair.source.client.refused("migrate", json!({ "uri": "rdma:127.0.0.1:1" }));
    assert!(why.contains("previous migration"), "{why}");
    assert_eq!(pair.source.status(), "completed");
    pair.verify();
}

#[test]
fn another_client_is_told_that_it_has_to_wait() {
    let (dir, host) = host();
    for (path, command) in [(&host.helper.socket, "check"), (&host.qemu.helper_socket(), "check")] {
        let output = std::process::Command::new(crate::support::helper::BINARY)
            .args([command, "--qemu-qmp", path.to_str().unwrap()])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("end its other client first"), "{text}");
    }
    let second = dir.path().join("second.qmp");
    let output = std::process::Command::new(crate::support::helper::BINARY)
        .args(["attach", "--qemu-qmp", host.qemu.helper_socket().to_str().unwrap()])
        .args(["--qmp", second.to_str().unwrap()])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("is another client attached?"), "{text}");
}
