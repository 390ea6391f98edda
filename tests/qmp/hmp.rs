//! The helper reads lines of the human monitor as QEMU does, and shows `info migrate` in the form
//! of the attached QEMU.

use crate::support::{Config, Host, Pair, Qmp, VERSIONS};
use qemu_rdma_helper::qmp::{
    Version,
    hmp::{self, Line, Setting},
};
use serde_json::{Value, json};

fn idle(version: &'static str) -> (tempfile::TempDir, Host) {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { version, paused: true, ..Config::default() };
    let host = Host::start(&dir, "host", &config);
    (dir, host)
}

/// Whether this is QEMU's complaint about a line that it does not run.
fn complains(text: &str) -> bool {
    text.starts_with("unknown command:") || text.contains("Try \"help")
}

/// Return lines of all kinds, some of which QEMU reads as a migration to the address `none:x`.
fn some_lines() -> Vec<String> {
    const COMMANDS: [&str; 7] = [
        "migrate",
        "migrate",
        "migrate_incoming",
        "migrate_recover",
        " migrate",
        "Migrate",
        "migrat",
    ];
    const SPACES: [&str; 8] = [" ", " ", "  ", "\t", "\u{b}\u{c}", "\r\n", "", "/"];
    const WORDS: [&str; 20] = [
        "none:x",
        "none:x",
        "none:x",
        "\"none:x\"",
        "\"none:x",
        "'none:x'",
        "\"none:\\x\"",
        "\"\\\\none:x\"",
        "-d",
        "-d",
        "-r",
        "-b",
        "-i",
        "-dnone:x",
        "-d\"none:x\"",
        "-d-r",
        "-x",
        "--",
        "-",
        "\u{e4}",
    ];
    let mut random = fastrand::Rng::with_seed(7);
    let mut pick = |of: &[&'static str]| *random.choice(of).unwrap();
    let mut lines: Vec<_> = (0..3000)
        .map(|turn| {
            let mut line = pick(&COMMANDS).to_owned();
            for _ in 0..turn % 4 {
                line += pick(&SPACES);
                line += pick(&WORDS);
            }
            line + pick(&["", "", " ", "\n"])
        })
        .collect();
    // QEMU truncates words, addresses included.
    lines.push(format!("migrate none:{}", "x".repeat(2000)));
    lines.push(format!("{}migrate{}none:x", " ".repeat(5000), " ".repeat(5000)));
    lines
}

/// A migration to `rdma:` is the helper's in any spelling that QEMU accepts, and gets QEMU's error
/// in any other. The scheme `none:`, which no QEMU has, shows how QEMU reads a line.
#[test]
fn lines_are_read_as_qemu_reads_them() {
    for version in VERSIONS {
        let (_dir, mut host) = idle(version);
        let (mut ours, mut refused) = (0, 0);
        for line in some_lines() {
            let qemus = host.qemu.qmp.hmp(&line);
            let asked = line.replace("none:", "rdma:");
            let said = host.client.hmp(&asked);
            let is_ours = said.starts_with("Error: Bad migration address 'rdma:x");
            if complains(&qemus) {
                assert_eq!(said, qemus.replace("none:", "rdma:"), "{version}: {asked:?}");
                refused += 1;
            } else if qemus.contains("protocol: none:x") {
                assert!(is_ours, "{version}: {asked:?}: {said}");
            } else {
                let same = said == qemus.replace("none:", "rdma:");
                assert!(same || is_ours, "{version}: {asked:?}: {said}, not {qemus}");
            }
            ours += usize::from(is_ours);
        }
        println!("{version}: {ours} lines are ours, {refused} are refused");
        assert!(ours > 100 && refused > 300, "{ours}, {refused}");
    }
}

/// The helper refuses what `rdma:` does not support, in any spelling that QEMU accepts.
#[test]
fn what_rdma_can_not_is_refused_in_any_spelling() {
    for version in VERSIONS {
        let (_dir, mut host) = idle(version);
        let has_storage = version == "7.2";
        for (line, said) in [
            ("migrate -rrdma:h:1", "Error: A migration over rdma: can't be resumed\r\n"),
            ("migrate_recover \"rdma:h:1\"", "Error: A migration over rdma: can't be resumed\r\n"),
            ("migrate -b rdma:h:1", "Error: Parameter 'blk' can't be combined with rdma:"),
            ("migrate -d -i\"rdma:h:1\"", "Error: Parameter 'inc' can't be combined with rdma:"),
        ] {
            let text = host.client.hmp(line);
            if said.contains("Parameter") && !has_storage {
                assert!(text.starts_with("migrate: unsupported option -"), "{line}: {text}");
            } else {
                assert!(text.starts_with(said), "{version}: {line}: {text}");
            }
        }
        // Otherwise QEMU's own RDMA would listen.
        let uri = json!({ "uri": "rdma:h:1" });
        let error = host.client.refused("migrate-recover", uri);
        assert_eq!(error, "A migration over rdma: can't be resumed");
    }
}

/// Lines that set parameters and capabilities are read as QEMU reads them.
#[test]
fn settings_are_read_as_qemu_reads_them() {
    const NAMES: [&str; 5] = [
        "multifd-channels",
        "\"multifd-channels\"",
        "multifd\\-channels",
        "'multifd-channels'",
        "",
    ];
    const VALUES: [&str; 12] =
        ["7", "0x10", "011", "+5", "\"9\"", "-1", "9 ", "9\t", "9 x", "many", "\"", ""];
    for version in VERSIONS {
        let (_dir, mut host) = idle(version);
        let info = host.client.run("query-version", json!({}));
        let (qmp, mut set) = (&mut host.qemu.qmp, 0);
        for (name, value) in NAMES.iter().flat_map(|name| VALUES.map(|value| (name, value))) {
            for space in [" ", "\t  ", ""] {
                let line = format!("migrate_set_parameter {name}{space}{value}");
                let text = qmp.hmp(&line);
                let parameters = qmp.run("query-migrate-parameters", json!({}));
                match hmp::parse(&line, Version::read(&info)) {
                    Line::Set(Setting::Parameter { name, value, .. }) => {
                        assert!(!complains(&text), "{version}: {line:?}: {text}");
                        if text.is_empty() {
                            let known = (name.as_str(), hmp::number(&value));
                            let shown = parameters["multifd-channels"].as_u64();
                            assert_eq!(known, ("multifd-channels", shown), "{line:?}");
                            set += 1;
                        }
                    }
                    other => assert!(complains(&text), "{version}: {line:?}: {text}, {other:?}"),
                }
            }
        }
        assert!(set > 15, "{set}");
        for state in ["on", "off ", "ON", "\"on\"", "onx", "on x", "on/", ""] {
            let line = format!("migrate_set_capability \"multifd\"{state}");
            let text = qmp.hmp(&line);
            let read = hmp::parse(&line, Version::read(&info));
            let takes = matches!(read, Line::Set(Setting::Capability { .. }));
            assert_eq!(takes, !complains(&text), "{version}: {line}: {text}");
        }
    }
}

/// Return the label of each line, or that of its group.
fn labels(text: &str) -> Vec<&str> {
    text.lines().map(|line| line.split(':').next().unwrap()).collect()
}

/// Return the number after `label`.
#[track_caller]
fn figure(text: &str, label: &str) -> u64 {
    let (_, rest) = text.split_once(label).unwrap_or_else(|| panic!("no {label}: {text}"));
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest[..digits].parse().unwrap_or_else(|_| panic!("no number behind {label}: {text}"))
}

fn is_grouped(version: &str) -> bool {
    version == "11.1"
}

/// Assert that `info migrate` is QEMU's table with the helper's figures, and its own rows at the
/// end.
#[track_caller]
fn is_one_table(version: &str, client: &mut Qmp, qemu: &mut Qmp, status: &str) {
    let lines: &[_] =
        if is_grouped(version) { &["info migrate", "info migrate -a"] } else { &["info migrate"] };
    for line in lines {
        let (shown, qemus) = (client.hmp(line), qemu.hmp(line));
        let state = client.run("query-migrate", json!({}));
        let own: &[_] =
            if is_grouped(version) { &["RDMA info", "  Fabric"] } else { &["rdma fabric"] };
        assert_eq!(labels(&shown), [&labels(&qemus)[..], own].concat(), "{shown}{qemus}");
        let ram = |name: &str| state["ram"][name].as_u64().unwrap();
        if is_grouped(version) {
            assert!(shown.contains(&format!("Status: \t\t{status}\r\n")), "{shown}");
            assert_eq!(figure(&shown, "dirty_syncs="), ram("dirty-sync-count"), "{shown}");
            assert_eq!(figure(&shown, "normal="), ram("normal"), "{shown}");
            // Multifd is used only between QEMU and the helper.
            assert!(shown.contains(", multifd=0 B, postcopy=0 B\r\n"), "{shown}");
            assert!(shown.contains("  Fabric: \t\ttcp\r\n"), "{shown}");
        } else {
            assert!(shown.contains(&format!("Migration status: {status}\r\n")), "{shown}");
            assert_eq!(figure(&shown, "transferred ram: "), ram("transferred") >> 10, "{shown}");
            assert_eq!(figure(&shown, "remaining ram: "), ram("remaining") >> 10, "{shown}");
            assert_eq!(figure(&shown, "multifd bytes: "), 0, "{shown}");
            assert!(shown.ends_with("rdma fabric: tcp\r\n"), "{shown}");
        }
        print!("{version}, {line}:\n{shown}");
    }
}

#[test]
fn info_migrate_is_one_table_in_the_versions_form() {
    for version in VERSIONS {
        let config = Config { version, ..Config::default() };
        let mut pair = Pair::start(&config);
        let _link = pair.at_pre_switchover(true);
        let Pair { source, destination, .. } = &mut pair;
        is_one_table(version, &mut source.client, &mut source.qemu.qmp, "pre-switchover");
        let state = json!({ "state": "pre-switchover" });
        source.client.run("migrate-continue", state);
        source.await_status(&["completed"]);
        is_one_table(version, &mut source.client, &mut source.qemu.qmp, "completed");
        let shown = destination.client.hmp("info migrate");
        let status = if is_grouped(version) { "Status: \t\t" } else { "Migration status: " };
        assert!(shown.contains(&format!("{status}completed\r\n")), "{shown}");
        assert!(!shown.contains("abric"), "{shown}");
    }
}

/// `info migrate` has the version's form even if a migration failed before QEMU knew of it.
#[test]
fn a_failure_before_qemu_knew_is_in_the_versions_form() {
    for version in VERSIONS {
        let (_dir, mut host) = idle(version);
        let before = host.client.hmp("info migrate");
        assert_eq!(before, host.qemu.qmp.hmp("info migrate"));
        // Nobody listens.
        let uri = format!("rdma:127.0.0.1:{}", crate::support::free_port());
        let _ = host.client.execute("migrate", json!({ "uri": uri }));
        let state = host.await_status(&["failed"]);
        let why = state["error-desc"].as_str().unwrap();
        let shown = host.client.hmp("info migrate");
        let expected = match version {
            "11.1" => format!("Status: \t\tfailed ({why})\r\n"),
            _ => format!("{before}Migration status: failed ({why})\r\ntotal time: 0 ms\r\n"),
        };
        assert!(shown.starts_with(&expected), "{shown}");
        let ram =
            if is_grouped(version) { "RAM info:\r\n" } else { "transferred ram: 0 kbytes\r\n" };
        assert_eq!(shown.contains(ram), state["ram"].is_object(), "{shown}");
    }
}

/// `migrate` prints what it prints for a migration of QEMU's own.
#[test]
fn migrate_answers_as_qemu_does() {
    for version in VERSIONS {
        let mut pair = Pair::start(&Config { version, ..Config::default() });
        let dir = tempfile::tempdir().unwrap();
        let mut other = Host::start(&dir, "other", &Config { version, ..Config::default() });
        let qemus = other.qemu.qmp.hmp("migrate exec:cat>/dev/null");
        let uri = pair.listen();
        assert_eq!(pair.source.client.hmp(&format!("migrate {uri}")), qemus, "{version}");
        let end: Value = pair.source.await_status(&["completed", "failed", "cancelled"]);
        assert_eq!(end["status"], "completed", "{end}");
    }
}
