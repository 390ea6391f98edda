//! Unmodified QMP clients: QEMU's Python library, its qmp-shell, and a shell with lines of the
//! human monitor (docs/examples).

use std::{
    env,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Output, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::Instant,
};

use crate::support::{Config, Pair, Qmp, cache, free_port, helper::BINARY};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::json;

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/examples").join(name)
}

/// Return a command that finds QEMU's Python package and the helper.
fn command(program: &Path) -> Command {
    let helper = Path::new(BINARY).parent().unwrap().to_owned();
    let others = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths([helper].into_iter().chain(env::split_paths(&others))).unwrap();
    let mut command = Command::new(program);
    command.env("PATH", path).env("PYTHONPATH", cache("python")).env("PYTHONUNBUFFERED", "1");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Disconnect the test's own clients: a helper serves one client at a time.
fn disconnect_clients(pair: &mut Pair) {
    for host in [&mut pair.source, &mut pair.destination] {
        host.client = Qmp::connect(&host.qemu.spare_socket());
    }
}

/// Return a command for an example, in its own process group as from a shell.
fn migrate_by(name: &str, pair: &Pair, destination: &str, uri: &str) -> Command {
    let mut command = command(&example(name));
    command.arg(&pair.source.helper.socket).arg(destination).arg(uri).process_group(0);
    command
}

fn socket(host: &crate::support::Host) -> &str {
    host.helper.socket.to_str().unwrap()
}

fn some_uri() -> String {
    format!("rdma:127.0.0.1:{}", free_port())
}

#[track_caller]
fn succeeds(output: &Output) -> String {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!((output.status.code(), err.as_str()), (Some(0), ""), "{out}");
    print!("{out}");
    out
}

/// Send SIGINT, as Ctrl-C does, when a line with `word` was printed. Return the output.
fn interrupted_at(word: &str, command: &mut Command) -> Output {
    let mut child = command.spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut seen = String::new();
    while !seen.lines().last().unwrap_or_default().contains(word) {
        assert_ne!(out.read_line(&mut seen).unwrap(), 0, "it ended: {seen}");
    }
    let group = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process_group(group, Signal::INT).unwrap();
    out.read_to_string(&mut seen).unwrap();
    let output = child.wait_with_output().unwrap();
    Output { stdout: seen.into_bytes(), ..output }
}

/// Make the migration slow enough to be interrupted.
fn slow_down(pair: &mut Pair) {
    pair.source.client.run("migrate-set-parameters", json!({ "max-bandwidth": 8 << 20 }));
}

#[test]
fn qemus_python_library() {
    let mut pair = Pair::start(&Config::default());
    disconnect_clients(&mut pair);
    let mut script = migrate_by("migrate.py", &pair, socket(&pair.destination), &some_uri());
    script.args(["--pin-all", "--max-bandwidth", &(256_u32 << 20).to_string()]);
    let out = succeeds(&script.output().unwrap());
    let states: Vec<_> = out.lines().filter_map(|line| line.strip_prefix("migration: ")).collect();
    assert_eq!(states, ["setup", "active", "device", "completed"], "{out}");
    // The last progress event precedes the final state.
    let last = out.lines().rev().nth(2).unwrap();
    assert!(last.starts_with("tcp: ") && last.ends_with(" mbps, 0 MiB left"), "{out}");
    let summary = out.lines().last().unwrap();
    assert!(summary.starts_with("sent ") && summary.contains(" ms, downtime "), "{out}");
    pair.verify();
    let state = pair.source.qemu.qmp.run("query-migrate-capabilities", json!({}));
    let on = json!({ "capability": "rdma-pin-all", "state": true });
    assert!(state.as_array().unwrap().contains(&on), "{state}");
}

#[test]
fn interrupting_qemus_python_library_cancels() {
    let mut pair = Pair::start(&Config::default());
    slow_down(&mut pair);
    disconnect_clients(&mut pair);
    let mut script = migrate_by("migrate.py", &pair, socket(&pair.destination), &some_uri());
    let output = interrupted_at("mbps", &mut script);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr), "cancelled: the guest runs on at the source\n");
    pair.source.qemu.assert_goes_on();
}

#[test]
fn qemus_python_library_shows_our_refusals() {
    let mut pair = Pair::start(&Config::default());
    disconnect_clients(&mut pair);
    let uri = "rdma:127.0.0.1";
    let output = migrate_by("migrate.py", &pair, socket(&pair.destination), uri).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.starts_with("migrate.py: Bad migration address"), "{error}");
    pair.source.qemu.assert_goes_on();
}

/// A qmp-shell on a terminal of its own.
struct Shell {
    child: Child,
    keyboard: ChildStdin,
    screen: Receiver<u8>,
}

impl Shell {
    const PROMPT: &str = "(QEMU) ";

    fn start(dir: &Path, options: &str, socket: &str) -> Self {
        let shell = cache("python/bin/qmp-shell");
        let line = format!("stty -echo; exec {} {options} {socket}", shell.display());
        let mut child = command("script".as_ref())
            .args(["--quiet", "--flush", "--return", "--command", &line, "/dev/null"])
            .env("TERM", "dumb") // no escape sequences
            .env("HOME", dir) // for its history
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let (keyboard, terminal) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, screen) = channel();
        thread::spawn(move || {
            for byte in BufReader::new(terminal).bytes().map_while(Result::ok) {
                if sender.send(byte).is_err() {
                    return;
                }
            }
        });
        Self { child, keyboard, screen }
    }

    /// Return what it shows up to the next prompt.
    #[track_caller]
    fn until_prompt(&mut self) -> String {
        let deadline = Instant::now() + crate::support::PATIENCE;
        let mut shown = Vec::new();
        while !shown.ends_with(Self::PROMPT.as_bytes()) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(left) {
                Ok(byte) => shown.push(byte),
                Err(why) => panic!("no prompt, {why}: {}", text(&shown)),
            }
        }
        text(&shown)
    }

    #[track_caller]
    fn run(&mut self, line: &str) -> String {
        writeln!(self.keyboard, "{line}").unwrap();
        let shown = self.until_prompt();
        println!("(QEMU) {line}\n{shown}");
        shown
    }

    fn end(mut self) {
        drop(self.keyboard);
        assert!(self.child.wait().unwrap().success());
    }
}

#[test]
fn qmp_shell() {
    let mut pair = Pair::start(&Config::default());
    disconnect_clients(&mut pair);
    let mut destination = Shell::start(pair.dir.path(), "", socket(&pair.destination));
    let mut source = Shell::start(pair.dir.path(), "", socket(&pair.source));
    for shell in [&mut destination, &mut source] {
        let greeting = shell.until_prompt();
        assert!(greeting.contains("Connected to QEMU 10.0."), "{greeting}");
        let on = "capabilities=[{'capability':'rdma-pin-all','state':true}]";
        let shown = shell.run(&format!("migrate-set-capabilities {on}"));
        assert!(shown.contains(r#"{"return": {}"#), "{shown}");
    }
    let uri = some_uri();
    let shown = destination.run(&format!("migrate-incoming uri={uri}"));
    assert!(shown.contains(r#"{"return": {}"#), "{shown}");
    let shown = source.run(&format!("migrate uri={uri}"));
    assert!(shown.contains(r#"{"return": {}"#), "{shown}");
    crate::support::eventually("completion", || {
        source.run("query-migrate").contains(r#""status": "completed""#).then_some(())
    });
    // An empty line shows the pending events.
    let events = source.run("");
    let of = |name: &str| events.rfind(name).unwrap_or_else(|| panic!("no {name}: {events}"));
    assert!(of("RDMA_MIGRATION_THROUGHPUT") < of("'completed'"), "{events}");
    // Tab completes commands that qmp-shell knows from `query-commands`.
    for word in ["query-rdma-he\t", "__org.qemu-rdma-helper_query-rdma-h\t"] {
        let shown = source.run(word);
        assert!(shown.contains(r#""fabric": "tcp""#), "{shown}");
    }
    source.end();
    destination.end();
    pair.verify();
}

#[test]
fn qmp_shell_with_lines_of_the_monitor() {
    let mut pair = Pair::start(&Config::default());
    disconnect_clients(&mut pair);
    let mut destination = Shell::start(pair.dir.path(), "-H", socket(&pair.destination));
    let mut source = Shell::start(pair.dir.path(), "-H", socket(&pair.source));
    let uri = some_uri();
    destination.until_prompt();
    source.until_prompt();
    let refused = source.run("migrate -d rdma:nowhere");
    assert!(refused.contains("Error: Bad migration address"), "{refused}");
    let listens = destination.run(&format!("migrate_incoming {uri}"));
    assert!(!listens.contains("Error"), "{listens}");
    for line in [
        "migrate_set_capability rdma-pin-all on",
        "migrate_set_parameter max-bandwidth 40g",
        &format!("migrate -d {uri}"),
    ] {
        let shown = source.run(line);
        assert!(!shown.contains("Error"), "{shown}");
    }
    crate::support::eventually("completion", || {
        source.run("info migrate").contains("Migration status: completed").then_some(())
    });
    source.end();
    destination.end();
    pair.verify();
}

#[test]
fn a_runbook_of_monitor_lines() {
    let mut pair = Pair::start(&Config::default());
    disconnect_clients(&mut pair);
    let mut script = migrate_by("migrate.sh", &pair, socket(&pair.destination), &some_uri());
    let out = succeeds(&script.env("MAX_BANDWIDTH", "64m").output().unwrap());
    assert!(out.starts_with("active") || out.starts_with("setup"), "{out}");
    assert!(out.contains(" mbps, ") && out.contains(" kbytes left\n"), "{out}");
    assert!(out.contains("\ntotal time: ") && out.contains("\ndowntime: "), "{out}");
    assert!(out.ends_with("completed: the guest is at the destination\n"), "{out}");
    pair.verify();
    let parameters = pair.source.qemu.qmp.run("query-migrate-parameters", json!({}));
    assert_eq!(parameters["max-bandwidth"], 64 << 20);
}

/// The script also works with the form of `info migrate` in QEMU 11.1.
#[test]
fn a_runbook_of_monitor_lines_on_qemu_11_1() {
    let mut pair = Pair::start(&Config { version: "11.1", ..Config::default() });
    disconnect_clients(&mut pair);
    let mut script = migrate_by("migrate.sh", &pair, socket(&pair.destination), &some_uri());
    let out = succeeds(&script.env("MAX_BANDWIDTH", "64m").output().unwrap());
    assert!(out.starts_with("active, ") || out.starts_with("setup"), "{out}");
    assert!(out.contains(" mbps, ") && out.contains("iB left\n"), "{out}");
    for row in ["\nTime (ms): \t\ttotal=", ", down=", "\n  Transfers: \t\ttransferred="] {
        assert!(out.contains(row), "{out}");
    }
    assert!(out.ends_with("completed: the guest is at the destination\n"), "{out}");
    pair.verify();
}

#[test]
fn interrupting_a_runbook_cancels() {
    let mut pair = Pair::start(&Config::default());
    disconnect_clients(&mut pair);
    let mut script = migrate_by("migrate.sh", &pair, socket(&pair.destination), &some_uri());
    let output = interrupted_at("active", script.env("MAX_BANDWIDTH", "8m"));
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stdout));
    let error = text(&output.stderr);
    assert_eq!(error, "migrate.sh: cancelled; the guest runs on at the source\n");
    assert_eq!(pair.source.qemu.status(), "running");
    pair.source.qemu.assert_goes_on();
}

#[test]
fn a_runbook_whose_destination_is_not_there() {
    let mut pair = Pair::start(&Config::default());
    disconnect_clients(&mut pair);
    let missing = pair.dir.path().join("missing.qmp");
    for (destination, said) in [
        (missing.to_str().unwrap(), "migrate.sh: destination: qemu-rdma-helper: Cannot connect"),
        // Nobody listens.
        ("-", "migrate.sh: the migration failed (Cannot connect to 127.0.0.1:"),
    ] {
        let output = migrate_by("migrate.sh", &pair, destination, &some_uri()).output().unwrap();
        let (out, error) = (text(&output.stdout), text(&output.stderr));
        print!("{error}");
        assert_eq!((output.status.code(), out.as_str()), (Some(1), ""), "{error}");
        assert!(error.starts_with(said) && error.lines().count() == 1, "{error}");
        pair.source.qemu.assert_goes_on();
    }
    let output = command(&example("migrate.sh")).arg("source.qmp").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).starts_with("usage: migrate.sh SOURCE.qmp "));
    // Now the destination listens.
    let uri = some_uri();
    pair.destination.client = Qmp::connect(&pair.destination.helper.socket);
    pair.destination.client.run("migrate-incoming", json!({ "uri": uri }));
    succeeds(&migrate_by("migrate.sh", &pair, "-", &uri).output().unwrap());
    pair.verify();
}
