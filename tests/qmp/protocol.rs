//! The QMP protocol below the commands: on every version the helper's answers are QEMU's, byte for
//! byte. Based on QEMU's `tests/qtest/qmp-test.c`.

use std::{
    ffi::CString,
    fs::OpenOptions,
    io::{BufRead as _, BufReader, Write as _},
    os::{fd::AsFd as _, unix::net::UnixListener},
    path::{Path, PathBuf},
    thread,
};

use crate::support::{Config, Helper, Host, Pair, Qmp, VERSIONS};
use rustix::process::Signal;
use serde_json::{Value, json};

fn host(version: &'static str) -> (tempfile::TempDir, Host) {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { version, paused: true, mib: 64, ..Config::default() };
    let host = Host::start(&dir, "only", &config);
    (dir, host)
}

/// Connect a client to QEMU and one to the helper, both without negotiation.
fn both(host: &mut Host) -> [Qmp; 2] {
    host.client = Qmp::nobody();
    [&host.qemu.spare_socket(), &host.helper.socket].map(|path| Qmp::connect_raw(path))
}

/// Remove the position from a parse error. From 11.1 on QEMU counts it over the whole session.
fn without_place(line: &str) -> String {
    let Some((before, after)) = line.split_once("\"desc\": \"") else { return line.to_owned() };
    let text = after.trim_start_matches(|c: char| c.is_ascii_digit() || c == ':');
    let is_place = text.starts_with(" JSON parse error");
    let text = if is_place { text.trim_start() } else { after };
    format!("{before}\"desc\": \"{text}")
}

/// Return all answers to `bytes`. A byte that JSON does not allow ends what is incomplete, and the
/// reply to a command with an id marks the end.
fn answers(client: &mut Qmp, bytes: &[u8]) -> Vec<String> {
    client.send(&[bytes, b"\xff\n{'execute': 'no-such-command', 'id': 'the end'}\n"].concat());
    let mut lines = Vec::new();
    loop {
        let line = client.line().expect("the server hung up");
        if line.contains("\"the end\"") {
            return lines;
        }
        if !line.contains("\"event\"") {
            lines.push(without_place(&line));
        }
    }
}

/// Malformed and unusual commands.
fn oddities() -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = [
        // From QEMU's test.
        &b"{]\n"[..],
        b"{\xff",
        b"{\x01",
        b"{'bad \xff",
        b"{'execute': 'nonexistent', 'id':'\n",
        b"%p",
        b"null\n",
        b"{}",
        b"{ 'execute': true }",
        b"{ 'execute': 'no-such-cmd', 'arguments': [] }",
        b"{ 'execute': 'no-such-cmd', 'extra': true }",
        // Junk, and where QEMU resumes parsing.
        b"foo bar\n",
        b"@ rest, of it: {} bar\n",
        b"{\"execute\": \"query-status\", \"x\": \"\xff\"}\n",
        b"}{'id': 1}]",
        b"{]}{[}][1 {2]}",
        b":,,",
        b"\x00\x01\t\x02\r\x7f\n",
        b"'a\\\n\"b\n-\n1.\n01\n0e5 7\n",
        b"[1, 2]5 'x' true",
        b"abcDEF ghi\n{}",
        // Values.
        b"{'a' 1}{1: 2}{'a': nul}{'a': tru\xff}",
        b"{'a': 1, 'a': 2}{'execute': 'x', 'id': 1, 'id': 2}",
        b"{'a': '\\q'}{'a': '\\ud800'}{'a': '\xc3'}{'a': '\xef\xb7\x90'}{'a': '\\uffff'}",
        b"{'execute': 'query-name', 'arguments': {'a': 1, 'a': 2}, 'id': 8}",
        b"{'execute': 'query-name', 'arguments': {'a': [1 2]}, 'id': 8}",
        b"{'execute': 'query-name', 'arguments': {'a': '\xc0\x80'}, 'id': 8}",
        b"{'execute': 'query-name', 'arguments': {'a': 1e400}, 'id': 8}",
        // Refusals, with their ids.
        b"{'execute': 'x', 'extra': true, 'id': 4}",
        b"{'id': null, 'execute': 'query-name'}{'id': {'a': ['b']}, 'execute': 5}",
        b"{'arguments': {}, 'id': 9}{'execute': 'x', 'arguments': 7, 'id': 10}",
        b"{'execute': 'no-such-command', 'exec-oob': 'x', 'id': 5}",
        b"{'exec-oob': 'yank', 'id': 6}{'exec-oob': 7, 'id': [7]}",
        b"{'\\u0065xecute': 'no-such-command', 'id': 11}",
        b"{'execute': 'qmp_capabilities', 'arguments': {'enable': 'oob'}, 'id': 1}",
        b"{'execute': 'qmp_capabilities', 'arguments': {'enable': ['no-such']}, 'id': 2}",
        b"{'execute': 'qmp_capabilities', 'arguments': {'enable': [5]}, 'id': 3}",
        b"{'execute': 'qmp_capabilities', 'arguments': {'no-such': []}, 'id': 4}",
    ]
    .map(<[u8]>::to_vec)
    .into();
    // The deepest nesting that QEMU accepts, also in its replies.
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    all.push(format!("{{'execute': 'x', 'id': {}}}", nested(130)).into());
    all.push(format!("{{'execute': 'x', 'id': {}}}", nested(1023)).into());
    all.push(format!("{{'execute': 'query-name', 'id': {}}}", nested(1023)).into());
    all.push(nested(1024).into());
    all
}

/// Return pieces of commands in random order, the same in each run.
fn shuffled() -> impl Iterator<Item = Vec<u8>> {
    const PIECES: [&[u8]; 24] = [
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"'a'",
        b"\"id\"",
        b"'execute'",
        b"'query-name'",
        b"1",
        b"-0.5e3",
        b"true",
        b"nul",
        b" ",
        b"\n",
        b"\t",
        b"\x01",
        b"\xff",
        b"'",
        b"\\",
        b"{'execute': 'query-name'}",
        b"\xc3",
        b"X",
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(state >> 33).unwrap() % below
    };
    (0..150)
        .map(move |_| (0..=next(14)).flat_map(|_| PIECES[next(PIECES.len())].to_vec()).collect())
}

#[test]
fn malformed_commands_are_answered_as_qemu_does() {
    for version in VERSIONS {
        let (_dir, mut host) = host(version);
        let mut clients = both(&mut host);
        for negotiated in [false, true] {
            // QEMU echoes such an id as something that is not JSON, where the reply is QEMU's.
            let number = b"{'id': 1e400, 'execute': 'x'}{'id': -1e400, 'execute': 'x'}".to_vec();
            let numbers = negotiated.then_some(number);
            for bytes in oddities().into_iter().chain(numbers).chain(shuffled()) {
                let [direct, through] = clients.each_mut().map(|client| answers(client, &bytes));
                let what = bytes.escape_ascii().to_string();
                assert_eq!(
                    direct, through,
                    "QEMU {version}, negotiated: {negotiated}: {what:.300}"
                );
            }
            if !negotiated {
                for client in &mut clients {
                    client.run("qmp_capabilities", json!({}));
                }
            }
        }
        // The helper's own commands still work.
        assert_eq!(clients[1].run("query-rdma-migrate-blockers", json!({})), json!([]));
    }
}

/// A byte that JSON does not allow ends an incomplete command, and the next one is read at once.
#[test]
fn a_stray_byte_begins_anew() {
    for version in VERSIONS {
        let (_dir, mut host) = host(version);
        host.client.send(b"{\"execute\": \"query-st");
        assert_eq!(host.qemu.status(), "prelaunch");
        host.client.send(b"\xff{\"execute\": \"query-name\", \"id\": 1}");
        assert!(host.client.reply_line().contains("JSON parse error"), "{version}");
        assert_eq!(host.client.reply_line(), "{\"return\": {}, \"id\": 1}\r\n");
    }
}

/// A command that blocks QEMU's main loop until somebody opens a pipe for writing.
struct Blocking(PathBuf);

impl Blocking {
    fn new(dir: &Path) -> Self {
        let path = dir.join("pipe");
        let name = CString::new(path.to_str().unwrap()).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &name,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        Self(path)
    }

    fn send(&self, client: &mut Qmp, id: &str) {
        let image = json!({ "driver": "null-co", "read-zeroes": true });
        let arguments =
            json!({ "driver": "blkdebug", "node-name": id, "config": self.0, "image": image });
        let command = json!({ "execute": "blockdev-add", "id": id, "arguments": arguments });
        client.send(format!("{command}\n").as_bytes());
    }

    /// Open the pipe, once QEMU reads it.
    fn unblock(&self) {
        OpenOptions::new().write(true).open(&self.0).unwrap();
    }
}

fn enable_oob(client: &mut Qmp) {
    let greeting: Value = serde_json::from_str(&client.greeting).unwrap();
    assert_eq!(greeting["QMP"]["capabilities"], json!(["oob"]));
    let refused = client.refused("qmp_capabilities", json!({ "enable": ["cap-does-not-exist"] }));
    assert!(refused.contains("cap-does-not-exist"), "{refused}");
    client.run("qmp_capabilities", json!({ "enable": ["oob"] }));
}

/// Out-of-band commands overtake others as in QEMU (`test_qmp_oob` of its qmp-test.c).
#[test]
fn commands_out_of_band_overtake_as_at_qemu() {
    for version in VERSIONS {
        let (dir, mut host) = host(version);
        let blocking = Blocking::new(dir.path());
        let [direct, through] = both(&mut host).map(|mut client| {
            let mut lines = Vec::new();
            enable_oob(&mut client);
            let mut say = |client: &mut Qmp, count: usize| {
                lines.extend((0..count).map(|_| without_place(&client.reply_line())));
            };
            for command in [
                "{ 'exec-oob': 'query-cpus-fast' }",
                "{ 'exec-oob': 'no-such-command', 'id': 'id' }",
                "{ 'exec-oob': 'migrate', 'arguments': {'uri': 'rdma:h:1'}, 'id': 7 }",
                "{ 'exec-oob': 'x', 'execute': 'x', 'id': 8 }",
                "{ 'exec-oob': 'x', 'extra': 1, 'id': 9 }",
            ] {
                client.send(command.as_bytes());
                say(&mut client, 1);
            }
            client.send(b"{ 'exec-oob': 9, 'id': 9 }{ 'exec-oob': 'query-yank', 'id': 1.50 }");
            say(&mut client, 1);
            // The helper echoes an id byte for byte, while QEMU prints its value.
            let last = client.reply_line().replace("1.50", "1.5");
            blocking.send(&mut client, "ib-blocks-1");
            client.send(b"{ 'execute': 'query-name', 'id': 'ib-quick-1' }");
            client.send(b"{ 'exec-oob': 'migrate-pause', 'id': 'oob-1' }");
            say(&mut client, 1);
            client.send(b"{ 'exec-oob': 'query-yank' }");
            say(&mut client, 1);
            // Malformed commands are answered in order, as is what QEMU can't read as out-of-band.
            client.send(
                b"{ 'id': 'err-2' } foo { 'exec-oob': 'yank', 'arguments': {'a': 1, 'a': 2} }",
            );
            blocking.unblock();
            say(&mut client, 5);
            client.run("blockdev-del", json!({ "node-name": "ib-blocks-1" }));
            lines.push(last);
            lines
        });
        assert_eq!(direct, through, "QEMU {version}");
        let of = |id: &str| through.iter().position(|line| line.contains(id)).unwrap();
        assert!(
            of("oob-1") < of("ib-blocks-1") && of("ib-blocks-1") < of("ib-quick-1"),
            "{through:#?}"
        );
    }
}

/// A client that has not enabled `oob` gets QEMU's refusal, and replies in QEMU's order.
#[test]
fn nothing_overtakes_for_who_has_not_asked_for_it() {
    for version in VERSIONS {
        let (dir, mut host) = host(version);
        let blocking = Blocking::new(dir.path());
        let [direct, through] = both(&mut host).map(|mut client| {
            client.run("qmp_capabilities", json!({ "enable": [] }));
            blocking.send(&mut client, "blocks");
            client.send(b"{ 'exec-oob': 'query-yank', 'id': 'oob' }{ 'execute': 'query-name' }");
            blocking.unblock();
            let lines: Vec<_> = (0..3).map(|_| client.reply_line()).collect();
            client.run("blockdev-del", json!({ "node-name": "blocks" }));
            lines
        });
        assert_eq!(direct, through, "QEMU {version}");
        assert!(through[0].contains("blocks") && through[1].contains("'exec-oob' is unexpected"));
    }
}

/// As in QEMU, eight commands may wait for the current one. Then not even out-of-band ones are
/// read.
#[test]
fn commands_wait_in_bounds() {
    for version in VERSIONS {
        let (dir, mut host) = host(version);
        let blocking = Blocking::new(dir.path());
        for mut client in both(&mut host) {
            enable_oob(&mut client);
            for (waiting, overtakes) in [(7, true), (8, false)] {
                blocking.send(&mut client, "blocks");
                for id in 0..waiting {
                    client.send(format!("{{'execute': 'query-name', 'id': {id}}}").as_bytes());
                }
                client.send(b"{'exec-oob': 'query-yank', 'id': 'oob'}");
                let mut lines = Vec::new();
                if overtakes {
                    lines.push(client.reply_line());
                    assert!(lines[0].contains("oob"), "{lines:?}");
                }
                blocking.unblock();
                while lines.len() < waiting + 2 {
                    lines.push(client.reply_line());
                }
                let in_band: Vec<_> = lines.iter().filter(|line| !line.contains("oob")).collect();
                assert!(in_band[0].contains("\"id\": \"blocks\""), "{in_band:?}");
                for (id, line) in in_band[1..].iter().enumerate() {
                    assert_eq!(**line, format!("{{\"return\": {{}}, \"id\": {id}}}\r\n"));
                }
                client.run("blockdev-del", json!({ "node-name": "blocks" }));
            }
        }
    }
}

/// Out-of-band commands overtake the helper's own commands that wait for QEMU.
#[test]
fn out_of_band_passes_the_helpers_own_commands() {
    for version in VERSIONS {
        let (dir, mut host) = host(version);
        let blocking = Blocking::new(dir.path());
        host.client = Qmp::nobody();
        let mut client = Qmp::connect_raw(&host.helper.socket);
        enable_oob(&mut client);
        blocking.send(&mut host.qemu.qmp, "blocks");
        client.send(
            b"{'execute': 'query-rdma-helper', 'id': 'own'}{'exec-oob': 'query-yank', 'id': 'oob'}",
        );
        assert!(client.reply_line().ends_with("], \"id\": \"oob\"}\r\n"));
        client.send(b"{'exec-oob': 'query-rdma-helper', 'id': 1}");
        let refusal = client.reply_line();
        assert!(
            refusal.starts_with("{\"id\": 1, ") && refusal.contains("does not support OOB"),
            "{refusal}"
        );
        blocking.unblock();
        assert!(client.reply_line().contains("\"id\": \"own\""));
    }
}

/// An out-of-band `yank` ends the helper's migration even while QEMU's main loop is blocked.
#[test]
fn yanked_out_of_band() {
    for version in VERSIONS {
        let config = Config { version, mib: 64, ..Config::default() };
        let mut pair = Pair::start(&config);
        let blocking = Blocking::new(pair.dir.path());
        pair.source.client = Qmp::nobody();
        let mut client = Qmp::connect_raw(&pair.source.helper.socket);
        enable_oob(&mut client);
        client.run("migrate-set-parameters", json!({ "max-bandwidth": 1 << 20 }));
        let uri = pair.listen();
        client.run("migrate", json!({ "uri": uri }));
        crate::support::eventually("the first bytes", || {
            let state = client.run("query-migrate", json!({}));
            (state["ram"]["transferred"].as_u64() > Some(0)).then_some(())
        });
        blocking.send(&mut client, "blocks");
        client.send(
            b"{'exec-oob': 'yank', 'arguments': {'instances': [{'type': 'migration'}]}, 'id': 1}",
        );
        assert_eq!(client.reply_line(), "{\"return\": {}, \"id\": 1}\r\n");
        blocking.unblock();
        assert!(client.reply_line().contains("\"id\": \"blocks\""));
        pair.source.client = client;
        let state = pair.source.await_status(&["failed"]);
        println!("{version}: {}", state["error-desc"]);
        assert_eq!(pair.source.client.run("query-status", json!({}))["status"], "running");
    }
}

/// A chain of more than 100 images is shown, though the reply nests deeper than most parsers allow.
#[test]
fn a_long_chain_of_images_is_shown() {
    for version in VERSIONS {
        let (dir, mut host) = host(version);
        let null = json!({ "driver": "null-co", "node-name": "first", "size": 1 << 20 });
        host.qemu.qmp.run("blockdev-add", null);
        let path = |turn: usize| dir.path().join(format!("{turn}.qcow2"));
        for turn in 0..130 {
            image(&path(turn), turn.checked_sub(1).map(path).as_deref());
        }
        let top = path(129);
        let text = host.qemu.qmp.hmp(&format!("drive_add 0 if=none,id=top,file={}", top.display()));
        assert!(text.contains("OK"), "{text}");
        let query = b"{\"execute\": \"query-block\", \"id\": 7}\n";
        host.qemu.qmp.send(query);
        host.client.send(query);
        let (direct, through) = (host.qemu.qmp.line().unwrap(), host.client.line().unwrap());
        assert!(direct == through && through.contains("0.qcow2"), "{version}: {through:.200}");
        assert!(through.matches("backing-image").count() >= 129, "{through:.200}");
        assert_eq!(host.client.run("query-rdma-migrate-blockers", json!({})), json!([]));
    }
}

/// Write an empty qcow2 image, with an optional backing file.
fn image(path: &Path, over: Option<&Path>) {
    const CLUSTER: usize = 1 << 16;
    let over = over.map(|over| over.to_str().unwrap()).unwrap_or_default();
    let format = b"\xe2\x79\x2a\xca\x00\x00\x00\x05qcow2\0\0\0\0\0\0\0\0\0\0\0";
    let mut header = Vec::new();
    header.extend_from_slice(b"QFI\xfb");
    let mut number = |value: usize, bytes: usize| {
        header.extend_from_slice(&(value as u64).to_be_bytes()[8 - bytes..]);
    };
    let place = if over.is_empty() { 0 } else { 512 };
    for (value, bytes) in [
        (3, 4),
        (place, 8),
        (over.len(), 4),
        // `cluster_bits`, `size`, `crypt_method`.
        (16, 4),
        (1 << 20, 8),
        (0, 4),
        // `l1_size`, `l1_table_offset`, and the same of the refcount table.
        (1, 4),
        (3 * CLUSTER, 8),
        (CLUSTER, 8),
        (1, 4),
        // Snapshots, features, `refcount_order`, `header_length`.
        (0, 4),
        (0, 8),
        (0, 8),
        (0, 8),
        (0, 8),
        (4, 4),
        (104, 4),
    ] {
        number(value, bytes);
    }
    if !over.is_empty() {
        header.extend_from_slice(&format[..16]);
        header.extend_from_slice(&[0; 8]);
    }
    header.resize(512, 0);
    header.extend_from_slice(over.as_bytes());
    header.resize(4 * CLUSTER, 0);
    header[CLUSTER..CLUSTER + 8].copy_from_slice(&(2 * CLUSTER as u64).to_be_bytes());
    for cluster in 0..4 {
        header[2 * CLUSTER + 2 * cluster + 1] = 1;
    }
    std::fs::write(path, header).unwrap();
}

/// Every reply reaches the client that asked, even if no parser accepts it. The test plays QEMU.
#[test]
fn every_reply_reaches_who_asked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("played");
    let listener = UnixListener::bind(&path).unwrap();
    let deep = "[".repeat(5000) + &"]".repeat(5000);
    let huge = format!("\"{}\"", "x".repeat(17 << 20));
    let answers = ["-nan".to_owned(), "1e400".to_owned(), deep.clone(), huge];
    let played = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let say = |line: &str| (&stream).write_all(format!("{line}\r\n").as_bytes());
        say(r#"{"QMP": {"version": {"qemu": {"major": 99}}, "capabilities": []}}"#).unwrap();
        let mut answers = answers.iter().flat_map(|answer| [answer, answer]);
        while let Some(Ok(line)) = lines.next() {
            let request: Value = serde_json::from_str(&line).unwrap();
            let right =
                ["qmp_capabilities", "query-name"].contains(&request["execute"].as_str().unwrap());
            let settles = right || request["id"].to_string().ends_with("-1\"");
            let answer = if settles { "{}" } else { answers.next().unwrap() };
            say(&format!("{{\"return\": {answer}, \"id\": {}}}", request["id"])).unwrap();
        }
    });
    let helper = Helper::attach(dir.path(), "played", &path, &[]);
    let mut client = Qmp::connect_raw(&helper.socket);
    client.run("qmp_capabilities", json!({}));
    for answer in ["-nan", "1e400", &deep, "huge"] {
        // The client's own command, then one that the helper executes for it.
        client.send(b"{\"execute\": \"query-x\", \"id\": [1]}\n");
        let line = client.line().unwrap();
        if answer == "huge" {
            assert!(line.starts_with("{\"id\": [1], ") && line.contains("ask for less"), "{line}");
        } else {
            assert_eq!(line, format!("{{\"return\": {answer}, \"id\": [1]}}\r\n"));
        }
        client.send(b"{\"execute\": \"query-rdma-helper\", \"id\": 2}\n");
        let line = client.line().unwrap();
        println!("{line}");
        assert!(line.starts_with("{\"id\": 2, \"error\": "), "{answer:.10}: {line}");
        client.send(b"{\"execute\": \"query-name\", \"id\": 3}\n");
        assert_eq!(client.line().unwrap(), "{\"return\": {}, \"id\": 3}\r\n");
    }
    drop(client);
    drop(helper);
    played.join().unwrap();
}

/// `hmp` fails on a reply that it can't parse, instead of waiting for another.
#[test]
fn the_shells_commands_do_not_wait_for_what_they_can_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("played");
    let listener = UnixListener::bind(&path).unwrap();
    let deep = "[".repeat(5000) + &"]".repeat(5000);
    let played = thread::spawn(move || {
        for answer in ["\"fine\"", "1e400"] {
            let (stream, _) = listener.accept().unwrap();
            let say = |line: &str| (&stream).write_all(format!("{line}\r\n").as_bytes()).unwrap();
            say(r#"{"QMP": {"version": {}, "capabilities": []}}"#);
            for line in BufReader::new(&stream).lines().map_while(Result::ok) {
                say(&format!("{{\"event\": \"X\", \"data\": {deep}}}"));
                let answer = if line.contains("qmp_capabilities") { "{}" } else { answer };
                say(&format!("{{\"return\": {answer}}}"));
            }
        }
    });
    let run = || {
        let mut command = std::process::Command::new(crate::support::helper::BINARY);
        let output = command.args(["hmp", "--qmp"]).arg(&path).arg("info status").output().unwrap();
        let texts = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        (output.status.code(), texts.concat())
    };
    assert_eq!(run(), (Some(0), "fine".to_owned()));
    let (status, text) = run();
    assert!(status == Some(1) && text.contains("not understood"), "{text}");
    played.join().unwrap();
}

/// A descriptor belongs to the byte it came with: earlier commands do not get it, even if read with
/// it.
#[test]
fn descriptors_are_not_for_what_came_before_them() {
    const QUERY: &[u8] = b"{\"execute\": \"query-name\"}\n";
    const GETFD: &[u8] = b"{\"execute\": \"getfd\", \"arguments\": {\"fdname\": \"it\"}}\n";
    let file = std::fs::File::open("/dev/null").unwrap();
    for version in VERSIONS {
        let (_dir, mut host) = host(version);
        let half = GETFD.len() / 2;
        for messages in [
            &[(GETFD, false), (QUERY, true), (GETFD, false)][..],
            &[(QUERY, false), (GETFD, true), (GETFD, false)],
            &[(&GETFD[..half], false), (&GETFD[half..], true)],
            &[(&GETFD[..half], true), (&GETFD[half..], false)],
            &[(GETFD, true), (GETFD, true), (QUERY, true), (QUERY, false)],
        ] {
            // Let the helper find all messages at once.
            host.helper.signal(Signal::STOP);
            let commands = messages
                .iter()
                .flat_map(|(text, _)| text.iter())
                .filter(|byte| **byte == b'\n')
                .count();
            let [direct, through] = [&mut host.qemu.qmp, &mut host.client].map(|client| {
                for (text, with) in messages {
                    if *with { client.send_with_fd(text, file.as_fd()) } else { client.send(text) }
                }
                client
            });
            host.helper.signal(Signal::CONT);
            let lines = |client: &mut Qmp| -> Vec<_> {
                (0..commands).map(|_| client.reply_line()).collect()
            };
            let lines = [lines(direct), lines(through)];
            assert_eq!(lines[0], lines[1], "QEMU {version}: {messages:?}");
            // Consume any descriptor that is left.
            for client in [&mut host.qemu.qmp, &mut host.client] {
                let _ = client.execute("getfd", json!({ "fdname": "rest" }));
            }
        }
    }
}

/// A command before negotiation does not take a descriptor.
#[test]
fn descriptors_wait_for_the_negotiation() {
    let file = std::fs::File::open("/dev/null").unwrap();
    for version in VERSIONS {
        let (_dir, mut host) = host(version);
        let [direct, through] = both(&mut host).map(|mut client| {
            let getfd = b"{\"execute\": \"getfd\", \"arguments\": {\"fdname\": \"it\"}}\n";
            client.send_with_fd(getfd, file.as_fd());
            client.send(b"{\"execute\": \"qmp_capabilities\"}\n");
            client.send(&[&getfd[..], getfd].concat());
            (0..4).map(|_| client.reply_line()).collect::<Vec<_>>()
        });
        assert_eq!(direct, through, "QEMU {version}");
        assert!(through[2].contains("return") && through[3].contains("SCM_RIGHTS"), "{through:?}");
    }
}
