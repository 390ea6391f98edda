//! The program's commands, as an operator runs them.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Read as _},
    os::unix::{
        fs::{MetadataExt as _, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use crate::support::{
    Config, Helper, Host, Memory, Pair, Qemu, Qmp, VERSIONS,
    helper::{BINARY, signal_process},
    qemu::Process,
};
use rustix::process::Signal;
use serde_json::json;

fn run(arguments: &[&str]) -> Output {
    Command::new(BINARY).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn misuse_is_told_from_failure() {
    assert_eq!(run(&["nonsense"]).status.code(), Some(2));
    assert_eq!(run(&["attach"]).status.code(), Some(2));
    assert_eq!(
        run(&["migrate", "--qmp", "x", "--max-bandwidth", "fast", "rdma:h:1"]).status.code(),
        Some(2)
    );
    assert_eq!(run(&["--version"]).status.code(), Some(0));
    let help = text(&run(&["--help"]).stdout);
    for command in ["attach", "migrate", "hmp", "check"] {
        assert!(help.contains(command), "{help}");
    }
    assert!(!help.contains("worker"), "{help}");
    let output = run(&["attach", "--wait", "0", "--qemu-qmp", "/nonexistent", "--qmp", "/tmp/x"]);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("/nonexistent") && error.lines().count() == 1, "{error}");
    let output = run(&["attach", "--qemu-qmp", "x", "--qmp", "y", "--fabric", "verbs"]);
    let error = text(&output.stderr);
    let here = !std::path::Path::new("/sys/class/infiniband").exists();
    assert!(!here || error.contains("no 'verbs' fabric") || error.contains("no RDMA device"));
}

/// Return a command's standard error. JOURNAL_STREAM names it if `its`, as under systemd.
fn on_journal(command: &mut Command, its: bool) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    let of = fs::metadata(file.path()).unwrap();
    let inode = if its { of.ino() } else { of.ino() + 1 };
    let output = command
        .env("JOURNAL_STREAM", format!("{}:{inode}", of.dev()))
        .env("RUST_LOG", "info")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(file.reopen().unwrap());
    output.status().unwrap();
    fs::read_to_string(file.path()).unwrap()
}

/// Under systemd each message has a journal priority, and neither a time nor a level of its own.
#[test]
fn priorities_are_the_journals() {
    let qemu = crate::support::cache("bin/qemu-10.0");
    let run = |arguments: &str, its: bool| {
        let mut command = Command::new(BINARY);
        command.args(["run", "--"]).arg(&qemu).args(arguments.split_whitespace());
        on_journal(&mut command, its)
    };
    let asks = "QEMU is started as it is: it asks for help\n";
    assert_eq!(run("--version", true), format!("<6>{asks}"));
    let other = run("--version", false);
    assert!(other.ends_with(&format!(" INFO {asks}")) && other.starts_with("20"), "{other}");
    let warns = run("-monitor none -qmp-pretty none -chardev nonsense", true);
    assert!(warns.contains("<4>The monitor of '-qmp-pretty none' stays QEMU's own"), "{warns}");
    let fails = on_journal(Command::new(BINARY).args(["run", "--", "/nonexistent", "-h"]), true);
    let (first, last) = fails.split_once('\n').unwrap();
    assert_eq!(first, "<6>QEMU is started as it is: it asks for help");
    let failure = "Cannot run /nonexistent: No such file or directory (os error 2); is it the path of a QEMU?";
    assert_eq!(last, format!("<3>{failure}\n"));
}

/// A failure is reported in one sentence, without repetition or internal names.
#[test]
fn failures_are_said_once() {
    for (arguments, sentence) in [
        (
            "attach --fabric tcp --wait 0 --qemu-qmp /nonexistent --qmp /nonexistent",
            "Cannot attach to QEMU at /nonexistent: No such file or directory (os error 2); is it the \
             socket of a running '-qmp unix:...,server=on,wait=off'?",
        ),
        (
            "run -- /nonexistent -qmp unix:/nonexistent/qmp,server=on,wait=off",
            "Cannot serve QEMU's monitor at /nonexistent/qmp: No such file or directory (os error 2); \
             look at -qmp or -chardev",
        ),
        (
            "run -- /nonexistent -version",
            "Cannot run /nonexistent: No such file or directory (os error 2); is it the path of a QEMU?",
        ),
        (
            "hmp --qmp /nonexistent quit",
            "Cannot connect to the QMP socket /nonexistent: No such file or directory (os error 2)",
        ),
    ] {
        let output = run(&arguments.split(' ').collect::<Vec<_>>());
        assert_eq!(text(&output.stderr), format!("qemu-rdma-helper: {sentence}\n"));
        assert_eq!(output.status.code(), Some(1), "{arguments}");
    }
}

/// `attach` and QEMU may be started in any order.
#[test]
fn attach_waits_for_a_qemu_that_starts_later() {
    for version in VERSIONS {
        let dir = tempfile::tempdir().unwrap();
        let (qemu, socket) = (dir.path().join("late.helper.qemu"), dir.path().join("qmp"));
        // The stale socket of a killed QEMU.
        drop((version == "10.0").then(|| UnixListener::bind(&qemu).unwrap()));
        let mut attach = Command::new(BINARY);
        attach.args(["attach", "--fabric", "tcp", "--wait", "120", "--qemu-qmp"]).arg(&qemu);
        let attach = attach.arg("--qmp").arg(&socket).stderr(Stdio::piped()).spawn().unwrap();
        let mut attach = Process::new(attach);
        let mut log = BufReader::new(attach.stderr.take().unwrap()).lines();
        let said = log.next().unwrap().unwrap();
        assert!(said.contains("waiting for QEMU's socket"), "{said}");
        assert!(!socket.exists());
        let config = Config { version, paused: true, ..Config::default() };
        let _late = Qemu::start(dir.path(), "late", &config);
        let mut client = Qmp::connect(&socket);
        assert_eq!(client.run("query-status", json!({}))["status"], "prelaunch");
    }
}

#[test]
fn attach_gives_up_in_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let attach = |qemu: &Path, wait: &str| {
        let begun = Instant::now();
        let qemu = qemu.to_str().unwrap();
        let output =
            run(&["attach", "--wait", wait, "--qemu-qmp", qemu, "--qmp", "/nonexistent/x"]);
        let error = text(&output.stderr).lines().last().unwrap().to_owned();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(&format!("Cannot attach to QEMU at {qemu}: ")), "{error}");
        (error, begun.elapsed())
    };
    // `attach` waits for the whole time: no file, no directory, nobody listens.
    let stale = dir.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    for (path, why) in [
        (dir.path().join("missing"), "No such file or directory"),
        (dir.path().join("missing/qemu"), "No such file or directory"),
        (stale.clone(), "Connection refused"),
    ] {
        let (error, took) = attach(&path, "1");
        assert!(error.contains(why) && error.contains(" for 1 s; is it the socket of"), "{error}");
        assert!(took >= Duration::from_secs(1), "{took:?}");
        let (error, _) = attach(&path, "0");
        assert!(error.contains(why) && !error.contains(" for "), "{error}");
    }
    // Errors that waiting does not change are reported at once.
    let (file, link) = (dir.path().join("file"), dir.path().join("link"));
    fs::write(&file, "").unwrap();
    symlink(&stale, &link).unwrap();
    for (path, why) in [(file, "it is not a socket"), (link, "it is a symbolic link")] {
        let (error, took) = attach(&path, "86400");
        assert!(error.contains(why) && took < crate::support::PATIENCE, "{error}");
    }
    for wrong in ["-1", "1.5", "86401", ""] {
        let output = run(&["attach", "--wait", wrong, "--qemu-qmp", "x", "--qmp", "y"]);
        assert_eq!(output.status.code(), Some(2), "{wrong}");
    }
}

#[test]
fn auto_takes_verbs_where_there_is_a_device() {
    let dir = tempfile::tempdir().unwrap();
    let config = crate::support::Config { paused: true, ..crate::support::Config::default() };
    let mut host = crate::support::Host::with_helper(&dir, "auto", &config, &["--fabric", "auto"]);
    let info = host.client.run("query-rdma-helper", serde_json::json!({}));
    let none = info["devices"].as_array().unwrap().is_empty();
    assert_eq!(info["fabric"], if none || cfg!(not(feature = "verbs")) { "tcp" } else { "verbs" });
}

/// Return a `migrate` command for the pair, whose own client moves to a spare monitor.
fn migrate_command(pair: &mut Pair, uri: &str, more: &[&str]) -> Command {
    let Pair { source, .. } = pair;
    let socket = source.helper.socket.clone();
    // The helper serves one client at a time, as QEMU does.
    source.client = crate::support::Qmp::connect(&source.qemu.spare_socket());
    let mut command = Command::new(BINARY);
    command.arg("migrate").arg("--qmp").arg(socket).args(more).arg(uri);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn migrate_shows_progress_and_ends_when_the_guest_is_there() {
    let mut pair = Pair::start(&Config::default());
    let uri = pair.listen();
    let more = ["--pin-all", "--max-bandwidth", "64m", "--downtime-limit", "500"];
    let output = migrate_command(&mut pair, &uri, &more).output().unwrap();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{out}{err}");
    print!("{out}");
    assert!(out.contains("mbps") && out.contains("MiB left"), "{out}");
    for line in ["total time", "downtime", "throughput", "transferred"] {
        assert!(out.contains(line), "{out}");
    }
    pair.verify();
    let parameters = pair.source.qemu.qmp.run("query-migrate-parameters", json!({}));
    assert_eq!(parameters["max-bandwidth"], 64 << 20);
    assert_eq!(parameters["downtime-limit"], 500);
}

#[test]
fn interrupting_migrate_cancels_and_waits_for_the_end() {
    let config = Config::default();
    let mut pair = Pair::start(&config);
    for (name, signal) in [("int", Signal::INT), ("term", Signal::TERM), ("hup", Signal::HUP)] {
        let uri = pair.listen();
        let mut child =
            migrate_command(&mut pair, &uri, &["--max-bandwidth", "8m"]).spawn().unwrap();
        // Progress is printed, so the migration runs.
        let mut first = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
        signal_process(child.id(), signal);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{name}");
        let error = text(&output.stderr);
        assert!(error.contains("Cancelled; the guest keeps running here"), "{name}: {error}");
        assert_eq!(pair.source.qemu.status(), "running");
        pair.source.qemu.assert_goes_on();
        pair.new_destination(&config, name);
        // Disconnect, so that the next command can connect.
        pair.source.client = Qmp::nobody();
    }
}

#[test]
fn migrate_says_what_is_wrong() {
    let mut pair = Pair::start(&Config::default());
    let uri = format!("rdma:127.0.0.1:{}", crate::support::free_port());
    let output = migrate_command(&mut pair, &uri, &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("refused") && error.contains("keeps running here"), "{error}");
    let socket = pair.source.qemu.spare_socket();
    drop(std::mem::replace(
        &mut pair.source.client,
        crate::support::Qmp::connect(&pair.source.helper.socket),
    ));
    let output =
        Command::new(BINARY).arg("migrate").arg("--qmp").arg(socket).arg(&uri).output().unwrap();
    assert!(text(&output.stderr).contains("not a helper's socket"), "{}", text(&output.stderr));
    let output = run(&["migrate", "--qmp", "/nonexistent", "tcp:h:1"]);
    assert!(text(&output.stderr).contains("no rdma:HOST:PORT"));
}

#[test]
fn hmp_runs_runbook_lines() {
    let mut pair = Pair::start(&Config::default());
    let uri = pair.listen();
    let socket = pair.source.helper.socket.clone();
    pair.source.client = crate::support::Qmp::connect(&pair.source.qemu.spare_socket());
    let hmp = |lines: &[&str]| {
        Command::new(BINARY).arg("hmp").arg("--qmp").arg(&socket).args(lines).output().unwrap()
    };
    let migrate = format!("migrate -d {uri}");
    let output = hmp(&[
        "migrate_set_capability rdma-pin-all on",
        "migrate_set_parameter max-bandwidth 40g",
        &migrate,
    ]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), String::new()));
    crate::support::eventually("completion", || {
        let output = hmp(&["info migrate"]);
        text(&output.stdout).contains("Migration status: completed").then_some(())
    });
    pair.verify();
    let output = hmp(&["migrate -d rdma:nowhere", "info status"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stdout).starts_with("Error: ") && !text(&output.stdout).contains("VM status")
    );
}

#[test]
fn check_finds_what_would_fail() {
    let dir = tempfile::tempdir().unwrap();
    let check = |host: &Host| {
        let socket = host.qemu.spare_socket();
        let output =
            Command::new(BINARY).arg("check").arg("--qemu-qmp").arg(socket).output().unwrap();
        (output.status.code(), text(&output.stdout))
    };
    let good = Host::start(&dir, "good", &Config { paused: true, ..Config::default() });
    let (code, out) = check(&good);
    print!("{out}");
    assert_eq!(code, Some(0), "{out}");
    assert!(
        out.contains("QEMU 10.0") && out.contains("'ram0', 196608 KiB: written from /memfd"),
        "{out}"
    );
    assert!(out.contains("RDMA device"), "{out}");
    assert!(cfg!(not(feature = "verbs")) || out.contains("memlock of a helper that"), "{out}");
    assert!(out.ends_with("ok       nothing that is known would stop a migration\n"), "{out}");
    let private = Config { paused: true, memory: Memory::Private, ..Config::default() };
    let mut private = Host::start(&dir, "private", &private);
    let (code, out) = check(&private);
    assert_eq!(code, Some(0), "{out}");
    assert!(out.contains("'pc.ram', 196608 KiB: written from the stream"), "{out}");
    assert!(
        out.contains("warning  The guest's memory, RAM block 'pc.ram'")
            && out.contains("hint: start QEMU with -object memory-backend-memfd"),
        "{out}"
    );
    private.client.capability("xbzrle", true);
    let (code, out) = check(&private);
    assert_eq!(code, Some(1), "{out}");
    assert!(out.contains("fail     Capability 'xbzrle'"), "{out}");
}

#[test]
fn check_judges_by_the_fabric_that_is_used() {
    let check = |arguments: &[&str]| {
        let output = run(&[&["check"], arguments].concat());
        let out = text(&output.stdout);
        println!("{out}");
        (output.status.code(), out)
    };
    let (code, out) = check(&["--fabric", "tcp", "rdma:127.0.0.1:4444"]);
    assert_eq!(code, Some(0));
    assert!(out.contains("ok       Route to 127.0.0.1:4444: from 127.0.0.1\n"), "{out}");
    assert!(!out.contains("memlock"), "{out}");
    let (code, out) = check(&["--fabric", "tcp", "rdma:nowhere.invalid:4444"]);
    assert_eq!(code, Some(1));
    let unknown = out.lines().skip_while(|line| !line.starts_with("fail     Cannot resolve"));
    assert_eq!(unknown.last(), Some("         hint: check the name or give an address"), "{out}");
    for wrong in ["tcp:h:1", "rdma:h"] {
        let output = run(&["check", wrong]);
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains("rdma:HOST:PORT"));
    }
    if Path::new("/sys/class/infiniband")
        .read_dir()
        .is_ok_and(|mut devices| devices.next().is_some())
    {
        return println!("the rest is for hosts without a device");
    }
    let (code, out) = check(&[]);
    assert_eq!(code, Some(0));
    assert!(out.starts_with("warning  ") && out.contains("migrations use the tcp fabric"), "{out}");
    let (code, out) = check(&["--fabric", "verbs"]);
    assert_eq!(code, Some(1));
    assert!(out.starts_with("fail     This ") && out.contains("use --fabric tcp"), "{out}");
}

/// At a helper's socket, `check` judges what that helper uses.
#[test]
fn check_at_a_helpers_socket() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { paused: true, ..Config::default() };
    let mut host = Host::with_helper(&dir, "only", &config, &["--fabric", "tcp"]);
    host.client = crate::support::Qmp::connect(&host.qemu.spare_socket());
    let output = run(&["check", "--qemu-qmp", host.helper.socket.to_str().unwrap()]);
    let out = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{out}");
    assert!(out.starts_with("ok       Fabric tcp: no RDMA device is used\n"), "{out}");
    assert!(out.contains(&format!(", process {}\n", host.qemu.pid())), "{out}");
}

/// `--pid` names QEMU's process where a manager created the socket. A wrong one is noticed.
#[test]
fn the_process_can_be_told() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { paused: true, ..Config::default() };
    let mut host = Host::start(&dir, "only", &config);
    let helper = |name: &str, pid: u32| {
        let pid = pid.to_string();
        Helper::attach(dir.path(), name, &host.qemu.spare_socket(), &["--pid", &pid])
    };
    let told = helper("told", host.qemu.pid());
    let mut client = crate::support::Qmp::connect(&told.socket);
    assert_eq!(client.run("query-rdma-migrate-blockers", json!({})), json!([]));
    drop((client, told));
    let wrong = helper("wrong", std::process::id());
    let mut client = crate::support::Qmp::connect(&wrong.socket);
    for (command, arguments) in [
        ("query-rdma-migrate-blockers", json!({})),
        ("migrate", json!({ "uri": "rdma:127.0.0.1:1" })),
    ] {
        let error = client.refused(command, arguments);
        println!("{error}");
        assert!(error.contains("RAM block 'ram0'") && error.contains("--pid"), "{error}");
    }
    assert_eq!(host.qemu.status(), "prelaunch");
}

/// `docs/man` is what `qemu-rdma-helper man docs/man` writes.
#[test]
fn the_man_pages_are_the_help_texts() {
    let dir = tempfile::tempdir().unwrap();
    assert!(run(&["man", dir.path().to_str().unwrap()]).status.success());
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/man");
    let pages = |dir: &Path| -> BTreeMap<_, _> {
        let page = |path: PathBuf| {
            (path.file_name().unwrap().to_owned(), fs::read_to_string(path).unwrap())
        };
        fs::read_dir(dir).unwrap().map(|entry| page(entry.unwrap().path())).collect()
    };
    assert_eq!(pages(&kept), pages(dir.path()));
}

/// Each shell completes exactly the commands and options of the help texts.
#[test]
fn completions_know_every_option() {
    let dir = tempfile::tempdir().unwrap();
    assert!(run(&["completions", dir.path().to_str().unwrap()]).status.success());
    let words = |text: &str, from: &str| -> Vec<String> {
        let lines = text.lines().skip_while(|line| *line != from).skip(1);
        let lines = lines.take_while(|line| line.is_empty() || line.starts_with(' '));
        let word = |line: &str| line.split_whitespace().next().map(str::to_owned);
        lines
            .filter(|line| line.starts_with("  ") && !line.starts_with("    "))
            .filter_map(word)
            .collect()
    };
    let help = |arguments: &[&str]| text(&run(arguments).stdout);
    let mut commands = words(&help(&["--help"]), "Commands:");
    commands.retain(|command| command != "help");
    assert!(commands.len() >= 4, "{commands:?}");
    let complete = |words: &[&str]| {
        let script = dir.path().join("qemu-rdma-helper.bash");
        let last = words.len().to_string();
        let ask = "source $1; COMP_CWORD=$2; COMP_WORDS=(qemu-rdma-helper \"${@:3}\"); \
            $(complete -p $COMP_WORDS | sed 's/.*-F \\([^ ]*\\).*/\\1/') $COMP_WORDS \"${@: -1}\" \"${@: -2:1}\"; echo ${COMPREPLY[@]}";
        let mut bash = Command::new("bash");
        bash.args(["-c", ask, "bash"]).arg(script).arg(last).args(words);
        let reply = text(&bash.output().unwrap().stdout);
        reply.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let mut known = complete(&[""]);
    known.retain(|word| !word.starts_with('-'));
    assert_eq!(known, commands);
    let script = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    let (fish, zsh) = (script("qemu-rdma-helper.fish"), script("_qemu-rdma-helper"));
    for command in &commands {
        let help = help(&[command, "-h"]);
        let options =
            help.split_whitespace().filter(|word| word.starts_with("--") && word.len() > 2);
        let mut options: Vec<_> =
            options.map(|word| word.trim_end_matches(',').to_owned()).collect();
        options.sort();
        options.dedup();
        let mut known = complete(&[command, "--"]);
        known.sort();
        assert_eq!(known, options, "{help}");
        for option in &options {
            let line = format!("using_subcommand {command}\" ");
            let long = format!("-l {} ", &option[2..]);
            assert!(fish.lines().any(|l| l.contains(&line) && l.contains(&long)), "{option}");
            assert!(zsh.contains(&format!("'{option}")), "{option}");
        }
    }
    assert_eq!(complete(&["attach", "--fabric", ""]), ["auto", "verbs", "tcp"]);
    for hidden in ["worker", "completions"] {
        assert!(!fish.contains(hidden) && !zsh.contains(hidden), "{hidden}");
    }
}
