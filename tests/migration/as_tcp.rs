//! A manager sees the same over `rdma:` as over QEMU's `tcp:`. The same scripts drive both, and
//! replies, events and states are compared in order.
//!
//! Intended differences are in `MEANT`, each with its reason, and in docs/runbook.md.

use std::fmt::Write as _;

use crate::support::{
    Config, Guest, Helper, Memory, Qemu, Qmp, VERSIONS, eventually, free_port, image::make_image,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// What migrates the guest.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Carrier {
    Qemu,
    Helper,
}

impl Carrier {
    fn scheme(self) -> &'static str {
        match self {
            Self::Qemu => "tcp",
            Self::Helper => "rdma",
        }
    }
}

/// Events to compare. Others are the helper's own, or as many as the migration has passes.
const EVENTS: [&str; 4] = ["MIGRATION", "STOP", "RESUME", "SHUTDOWN"];

/// Commands, and the event that QEMU sends before the reply. Other events are sent by QEMU's
/// threads, a moment before or after a reply.
const SAID_BEFORE: [(&str, &str); 5] = [
    ("cont", "RESUME "),
    ("migrate", "MIGRATION setup"),
    ("migrate-incoming", "MIGRATION setup"),
    ("migrate_cancel", "MIGRATION cancelling"),
    ("stop", "STOP "),
];

/// In place of an error whose text can't be the same: only its presence is compared.
const NO_PEER: &str = "(why)";

/// One end, and what its manager was told.
struct End {
    name: &'static str,
    client: Qmp,
    qemu: Qemu,
    _helper: Option<Helper>,
    record: Vec<String>,
    /// The events, in order.
    told: Vec<String>,
    /// Number of events processed so far.
    events: usize,
}

impl End {
    fn start(dir: &TempDir, name: &'static str, config: &Config, carrier: Carrier) -> Self {
        let qemu = Qemu::start(dir.path(), name, config);
        let socket = qemu.helper_socket();
        let helper =
            (carrier == Carrier::Helper).then(|| Helper::attach(dir.path(), name, &socket, &[]));
        let client = Qmp::connect(helper.as_ref().map_or(&socket, |helper| &helper.socket));
        let mut end = Self {
            name,
            client,
            qemu,
            _helper: helper,
            record: Vec::new(),
            told: Vec::new(),
            events: 0,
        };
        end.client.capability("events", true);
        end.client.run("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 32 }));
        end
    }

    fn note(&mut self, line: &str) {
        self.record.push(format!("{}: {line}", self.name));
    }

    /// Process and return the new events.
    fn look_at_events(&mut self) -> &[String] {
        let known = self.told.len();
        while let Some(event) = self.client.events.get(self.events) {
            self.events += 1;
            let name = event["event"].as_str().unwrap();
            let status = event["data"]["status"].as_str().unwrap_or_default();
            // QEMU 7.2 may or may not report it when cancelled before the switchover.
            if EVENTS.contains(&name) && status != "device" {
                self.told.push(format!("{name} {status}"));
            }
        }
        &self.told[known..]
    }

    /// Execute a command; note the reply, and whether the event that QEMU sends before it came
    /// first.
    fn ask(&mut self, command: &str, arguments: Value) {
        self.look_at_events();
        let reply = self.client.execute(command, arguments.clone());
        let told = self.look_at_events();
        let before = SAID_BEFORE.iter().find(|(name, _)| *name == command);
        if let Some((_, event)) = before.filter(|(_, event)| told.iter().any(|it| it == event)) {
            self.note(&format!("is told {event} before the reply to {command}"));
        }
        let said = match reply {
            Ok(mut value) => {
                value.sort_all_objects();
                format!("{value}")
            }
            Err(error) => format!("{}: {}", error["class"], error["desc"]),
        };
        let line = plain(&format!("{command} {arguments} -> {said}"));
        self.note(&line);
    }

    fn turn_on(&mut self, capability: &str) {
        let on = json!([{ "capability": capability, "state": true }]);
        self.ask("migrate-set-capabilities", json!({ "capabilities": on }));
    }

    fn settings(&mut self) {
        self.ask("query-migrate-capabilities", json!({}));
        self.ask("query-migrate-parameters", json!({}));
        self.hmp("info migrate_capabilities");
        self.hmp("info migrate_parameters");
    }

    fn hmp(&mut self, line: &str) {
        self.ask("human-monitor-command", json!({ "command-line": line }));
    }

    /// Wait for a state of the migration, and note it and whether there is an error.
    #[track_caller]
    fn await_status(&mut self, wanted: &str) {
        let state = eventually(&format!("{wanted} at the {}", self.name), || {
            let state = self.client.run("query-migrate", json!({}));
            let ends = ["completed", "failed", "cancelled"];
            let status = state["status"].as_str().unwrap_or("none").to_owned();
            assert!(status == wanted || !ends.contains(&&*status), "{}: {state}", self.name);
            (status == wanted).then_some(state)
        });
        let why = if state.get("error-desc").is_some() { NO_PEER } else { "" };
        let line = format!("query-migrate is {wanted} {why}");
        self.note(&line);
    }

    /// Wait for the migration's end, and note which it is.
    fn await_end(&mut self) {
        let end = eventually("the end of a migration", || {
            let state = self.client.run("query-migrate", json!({}));
            let status = state["status"].as_str().unwrap_or("none").to_owned();
            ["completed", "failed", "cancelled"].contains(&&*status).then_some(status)
        });
        self.note(&format!("ends as {end}"));
    }

    fn note_status(&mut self) {
        let state = self.client.run("query-migrate", json!({}));
        let line = format!("query-migrate is {}", state["status"]);
        self.note(&line);
    }

    fn guest(&mut self) {
        self.ask("query-status", json!({}));
    }

    /// Return all that the manager was told. The last state's event may arrive a moment later.
    fn end(&mut self) -> Vec<String> {
        if self.qemu.child.try_wait().unwrap().is_none() {
            let ends = ["completed", "failed", "cancelled"];
            eventually("the last event", || {
                let state = self.client.run("query-migrate", json!({}));
                self.look_at_events();
                let status = state["status"].as_str().filter(|status| ends.contains(status));
                let last = self.told.iter().rfind(|event| event.starts_with("MIGRATION"));
                let is_last = |status: &str| last.is_some_and(|last| last.ends_with(status));
                status.is_none_or(is_last).then_some(())
            });
        }
        let events = self.told.drain(..).map(|event| format!("{}: event {event}", self.name));
        let mut all = std::mem::take(&mut self.record);
        all.extend(events);
        all
    }

    /// Wait until the migration fails, and note whether QEMU exits or stays.
    fn await_failure(&mut self) {
        let end = eventually("the destination to fail", || {
            if self.qemu.child.try_wait().unwrap().is_some() {
                return Some("exits");
            }
            let state = self.client.try_execute("query-migrate", &json!({})).ok()?;
            (state["status"] == "failed").then_some("stays")
        });
        self.note(&format!("QEMU {end}"));
    }

    fn await_exit(&mut self) {
        let status = eventually("QEMU's end", || self.qemu.child.try_wait().unwrap());
        let line = format!("QEMU exits: {:?}", status.code());
        self.note(&line);
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {:#?}", self.record);
        }
    }
}

/// Replace what differs between any two migrations: schemes and addresses.
fn plain(text: &str) -> String {
    let mut words = Vec::new();
    for word in text.replace("rdma:", "SCHEME:").replace("tcp:", "SCHEME:").split(' ') {
        let word = match word.find("127.0.0.1:") {
            Some(at) => {
                let rest = &word[at + "127.0.0.1:".len()..];
                let rest = rest.trim_start_matches(|c: char| c.is_ascii_digit());
                format!("{}ADDRESS{rest}", &word[..at])
            }
            None => word.to_owned(),
        };
        words.push(word);
    }
    words.join(" ")
}

struct Scene {
    dir: TempDir,
    config: Config,
    carrier: Carrier,
    source: End,
    destination: End,
    /// Records of destinations that are gone.
    before: Vec<String>,
}

impl Scene {
    fn start(version: &'static str, carrier: Carrier) -> Self {
        let guest = Guest::Dirty { fill: 24, hot: 2, spin: 3000 };
        let config = Config { version, guest, mib: 48, memory: Memory::PcRam, ..Config::default() };
        let dir = tempfile::tempdir().unwrap();
        let mut source = End::start(&dir, "source", &config, carrier);
        source.qemu.await_guest();
        let destination = End::start(&dir, "destination", &config.clone().incoming(), carrier);
        Self { dir, config, carrier, source, destination, before: Vec::new() }
    }

    fn new_destination(&mut self, config: Config) {
        let next = End::start(&self.dir, "next", &config.incoming(), self.carrier);
        self.before.append(&mut self.destination.end());
        self.destination = next;
    }

    fn uri(&self) -> String {
        format!("{}:127.0.0.1:{}", self.carrier.scheme(), free_port())
    }

    fn nowhere(&self) -> Value {
        json!({ "uri": self.uri() })
    }

    /// Let the destination listen, and return the arguments for the source.
    fn listen(&mut self) -> Value {
        let uri = self.nowhere();
        self.destination.ask("migrate-incoming", uri.clone());
        uri
    }

    /// Begin a slow migration.
    fn begin(&mut self) {
        let uri = self.listen();
        let slow = json!({ "max-bandwidth": 1 << 20 });
        self.source.ask("migrate-set-parameters", slow);
        self.source.ask("migrate", uri);
        self.source.await_status("active");
        self.destination.await_status("active");
    }

    fn hurry(&mut self) {
        self.source.ask("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 32 }));
    }

    fn record(mut self) -> Vec<String> {
        let mut record = self.source.end();
        record.append(&mut self.before);
        record.append(&mut self.destination.end());
        record
    }
}

/// Commands before, during and after a migration.
fn completes(scene: &mut Scene) {
    scene.source.ask("query-migrate", json!({}));
    scene.source.ask("migrate_cancel", json!({}));
    scene.destination.ask("query-migrate", json!({}));
    scene.destination.ask("migrate_cancel", json!({}));
    // Each end is asked for what only the other can do.
    let uri = scene.nowhere();
    scene.destination.ask("migrate", uri.clone());
    scene.source.ask("migrate-incoming", uri);
    scene.begin();
    let uri = scene.nowhere();
    scene.source.ask("migrate", uri.clone());
    scene.destination.ask("migrate-incoming", uri.clone());
    scene.destination.ask("migrate", uri);
    scene.source.turn_on("auto-converge");
    scene.source.hmp("migrate_set_capability auto-converge on");
    scene.source.ask("device_add", json!({ "driver": "pci-testdev", "id": "late" }));
    scene.source.hmp("device_add pci-testdev,id=late");
    scene.source.hmp("savevm one");
    scene.source.ask("migrate-continue", json!({ "state": "pre-switchover" }));
    scene.source.ask("migrate-start-postcopy", json!({}));
    scene.source.guest();
    scene.hurry();
    scene.source.await_status("completed");
    scene.destination.await_status("completed");
    scene.source.guest();
    scene.destination.guest();
    scene.source.ask("migrate_cancel", json!({}));
    let uri = scene.nowhere();
    scene.source.ask("migrate", uri);
    scene.destination.ask("cont", json!({}));
    scene.destination.guest();
}

/// Nobody listens; then the client cancels, and the destination exits. The next migration succeeds.
fn fails_and_is_cancelled(scene: &mut Scene) {
    let uri = scene.nowhere();
    scene.source.ask("migrate", uri);
    scene.source.await_status("failed");
    scene.source.guest();
    scene.source.ask("migrate_cancel", json!({}));
    scene.source.await_status("failed");
    scene.begin();
    scene.source.ask("stop", json!({}));
    scene.source.guest();
    scene.source.ask("cont", json!({}));
    scene.source.ask("migrate_cancel", json!({}));
    scene.source.await_status("cancelled");
    scene.source.guest();
    scene.destination.await_exit();
    scene.new_destination(scene.config.clone());
    let uri = scene.listen();
    scene.hurry();
    scene.source.ask("migrate", uri);
    scene.source.await_status("completed");
    scene.destination.await_status("completed");
}

/// The switchover waits for the client, which has stopped the guest before.
fn waits_before_the_switchover(scene: &mut Scene) {
    scene.source.turn_on("pause-before-switchover");
    scene.source.ask("stop", json!({}));
    let uri = scene.listen();
    scene.source.ask("migrate", uri);
    scene.source.await_status("pre-switchover");
    scene.source.guest();
    scene.source.ask("migrate_cancel", json!({}));
    scene.source.await_status("cancelled");
    scene.source.guest();
    // QEMU 7.2 takes a guest that was stopped before for one that has migrated.
    scene.source.ask("cont", json!({}));
    scene.source.ask("stop", json!({}));
    scene.source.guest();
    scene.destination.await_exit();
    scene.new_destination(scene.config.clone());
    let uri = scene.listen();
    scene.source.ask("migrate", uri);
    scene.source.await_status("pre-switchover");
    scene.source.ask("migrate-continue", json!({ "state": "device" }));
    scene.source.ask("migrate-continue", json!({ "state": "pre-switchover" }));
    scene.source.await_status("completed");
    scene.destination.await_status("completed");
    scene.destination.guest();
}

/// The destination dies, and the next one is another machine.
fn loses_its_destination(scene: &mut Scene) {
    scene.begin();
    scene.destination.qemu.kill();
    scene.source.await_status("failed");
    scene.source.guest();
    let other = Config { mib: 64, ..scene.config.clone() };
    scene.new_destination(other);
    let uri = scene.listen();
    scene.hurry();
    scene.source.ask("migrate", uri);
    scene.source.await_status("failed");
    scene.source.guest();
    // The helper does not accept a source with other RAM blocks, and its destination keeps waiting.
    match scene.carrier {
        Carrier::Qemu => scene.destination.await_exit(),
        Carrier::Helper => scene.destination.note("QEMU waits"),
    }
}

/// Malformed commands.
fn is_asked_wrongly(scene: &mut Scene) {
    let scheme = scene.carrier.scheme();
    let uri = format!("{scheme}:127.0.0.1:1");
    for arguments in [
        json!({}),
        json!({ "uri": 7 }),
        json!({ "uri": uri, "typo": 1 }),
        json!({ "uri": uri, "detach": 7 }),
    ] {
        scene.source.ask("migrate", arguments.clone());
        scene.destination.ask("migrate-incoming", arguments);
    }
    scene.source.ask("migrate-pause", json!({}));
    scene.destination.ask("migrate-pause", json!({}));
    scene.source.ask("migrate-recover", json!({ "uri": uri }));
    scene.destination.ask("migrate-recover", json!({ "uri": uri }));
    scene.source.ask("query-migrate", json!({ "typo": 1 }));
    scene.source.ask("migrate_cancel", json!({ "typo": 1 }));
    scene.source.ask("migrate-set-parameters", json!({ "max-bandwidth": "much" }));
    scene.source.ask("migrate-set-capabilities", json!({ "capabilities": 7 }));
    scene.source.hmp("migrate");
    scene.source.hmp("migrate -x SCHEME:127.0.0.1:1");
    scene.source.hmp("migrate_incoming");
    scene.source.note_status();
    scene.destination.note_status();
}

/// Snapshots before, during and after a migration.
fn takes_snapshots(scene: &mut Scene) {
    let image = scene.dir.path().join("disk.qcow2");
    make_image(&mut scene.source.client, image.to_str().unwrap());
    scene.source.hmp("savevm one");
    scene.source.note_status();
    let uri = scene.nowhere();
    scene.source.ask("migrate", uri);
    scene.source.await_status("failed");
    scene.source.hmp("savevm two");
    scene.source.note_status();
    scene.source.hmp("loadvm one");
    scene.source.note_status();
    scene.source.guest();
    scene.begin();
    scene.source.hmp("savevm three");
    scene.source.hmp("loadvm one");
    scene.source.note_status();
    scene.source.ask("migrate_cancel", json!({}));
    scene.source.await_status("cancelled");
    scene.destination.await_exit();
    scene.source.hmp("savevm four");
    scene.source.note_status();
    scene.source.guest();
}

/// With a return path; first to a destination that lacks a device.
fn has_a_return_path(scene: &mut Scene) {
    scene
        .source
        .ask("device_add", json!({ "driver": "e1000", "id": "nic", "romfile": "", "addr": "5" }));
    scene.source.turn_on("return-path");
    scene.destination.turn_on("return-path");
    let uri = scene.listen();
    scene.source.ask("migrate", uri);
    scene.source.await_status("failed");
    scene.source.guest();
    scene.destination.await_exit();
    let mut config = scene.config.clone();
    config.devices.push("-device e1000,id=nic,romfile=,addr=5".into());
    scene.new_destination(config);
    scene.destination.turn_on("return-path");
    let uri = scene.listen();
    scene.source.ask("migrate", uri);
    scene.source.await_status("completed");
    scene.destination.await_status("completed");
    scene.source.guest();
}

/// Without a return path QEMU takes its migration for complete, unless the connection breaks while
/// it still sends. The helper's source learns of the failure.
fn is_not_heard(scene: &mut Scene) {
    scene
        .source
        .ask("device_add", json!({ "driver": "e1000", "id": "nic", "romfile": "", "addr": "5" }));
    let uri = scene.listen();
    scene.source.ask("migrate", uri);
    scene.source.await_end();
    scene.destination.await_exit();
    scene.source.guest();
    if scene.carrier == Carrier::Helper {
        let source = &mut scene.source;
        assert!(source.record.iter().any(|line| line.ends_with("ends as failed")));
        assert_eq!(source.client.run("query-status", json!({}))["status"], "running");
        source.look_at_events();
        assert!(source.told.iter().any(|event| event == "RESUME "), "{:?}", source.told);
    }
}

/// Lines of the human monitor.
fn is_told_by_lines(scene: &mut Scene) {
    scene.source.hmp("migrate_set_parameter max-bandwidth 1M");
    scene.source.hmp("migrate_set_parameter max-bandwidth");
    scene.source.hmp("migrate_set_parameter nonsense 1");
    scene.source.hmp("migrate_set_capability nonsense on");
    scene.source.hmp("migrate_set_capability auto-converge");
    scene.source.hmp("migrate_set_capability auto-converge on");
    scene.source.hmp("migrate_cancel");
    scene.source.hmp("migrate_pause");
    scene.source.hmp("migrate_continue pre-switchover");
    let uri = scene.uri();
    scene.destination.hmp(&format!("migrate_incoming {uri}"));
    scene.destination.hmp(&format!("migrate_incoming {uri}"));
    scene.source.hmp(&format!("migrate -d {uri}"));
    scene.source.await_status("active");
    scene.source.hmp(&format!("migrate -d {uri}"));
    scene.source.hmp("migrate_start_postcopy");
    scene.source.hmp("migrate_cancel");
    scene.source.await_status("cancelled");
    // With HMP only QEMU before 9.1 exits on an error.
    scene.destination.await_failure();
    scene.new_destination(scene.config.clone());
    let uri = scene.uri();
    scene.destination.hmp(&format!("migrate_incoming {uri}"));
    scene.source.hmp("migrate_set_parameter max-bandwidth 1G");
    scene.source.hmp(&format!("migrate {uri}"));
    scene.source.await_status("completed");
    scene.destination.await_status("completed");
    scene.destination.hmp("cont");
    scene.destination.guest();
}

/// Settings shown are the client's, at any time.
fn shows_settings(scene: &mut Scene) {
    scene.source.settings();
    scene.destination.settings();
    scene.begin();
    scene.source.settings();
    scene.destination.settings();
    scene.source.ask(
        "migrate-set-parameters",
        json!({ "multifd-channels": 3, "multifd-compression": "zlib", "downtime-limit": 250 }),
    );
    scene.source.hmp("migrate_set_parameter multifd-channels 5");
    scene.source.turn_on("multifd");
    scene.source.settings();
    scene.source.ask("migrate_cancel", json!({}));
    scene.source.await_status("cancelled");
    scene.source.settings();
    scene.destination.await_exit();
    scene.new_destination(scene.config.clone());
    scene.hurry();
    let uri = scene.listen();
    scene.source.ask("migrate", uri);
    scene.source.await_status("completed");
    scene.destination.await_status("completed");
    scene.source.settings();
    scene.destination.settings();
}

/// A destination that stays after a failure.
fn stays(scene: &mut Scene) {
    let mut incoming = scene.nowhere();
    let outgoing = incoming.clone();
    incoming["exit-on-error"] = false.into();
    scene.destination.ask("migrate-incoming", incoming);
    if scene.config.version == "7.2" {
        return;
    }
    scene.source.ask("migrate-set-parameters", json!({ "max-bandwidth": 1 << 20 }));
    scene.source.ask("migrate", outgoing);
    scene.source.await_status("active");
    scene.destination.await_status("active");
    scene.source.ask("migrate_cancel", json!({}));
    scene.source.await_status("cancelled");
    scene.destination.await_status("failed");
    scene.destination.guest();
    let again = scene.nowhere();
    scene.destination.ask("migrate-incoming", again);
}

/// The manager yanks the migration.
fn is_yanked(scene: &mut Scene) {
    let migration = json!({ "instances": [{ "type": "migration" }] });
    scene.source.ask("query-yank", json!({}));
    scene.source.ask("yank", migration.clone());
    scene.begin();
    scene.source.ask("query-yank", json!({}));
    scene.source.ask("yank", migration);
    scene.source.await_end();
    scene.source.guest();
    scene.destination.await_exit();
    scene.source.ask("query-yank", json!({}));
}

type Script = (&'static str, fn(&mut Scene));

const SCRIPTS: [Script; 12] = [
    ("completes", completes),
    ("fails and is cancelled", fails_and_is_cancelled),
    ("waits before the switchover", waits_before_the_switchover),
    ("loses its destination", loses_its_destination),
    ("is asked wrongly", is_asked_wrongly),
    ("takes snapshots", takes_snapshots),
    ("has a return path", has_a_return_path),
    ("is not heard", is_not_heard),
    ("is told by lines", is_told_by_lines),
    ("shows settings", shows_settings),
    ("stays", stays),
    ("is yanked", is_yanked),
];

/// An intended difference.
struct Meant {
    script: &'static str,
    /// What QEMU reports over `tcp:`, if anything.
    theirs: &'static str,
    /// What the helper reports instead, if anything.
    ours: &'static str,
}

/// All intended differences, with their reasons.
const MEANT: [Meant; 18] = [
    // A source whose RAM blocks differ is not accepted: it never becomes `active`, and the
    // destination keeps waiting.
    meant("loses its destination", "next: QEMU exits: Some(1)", "next: QEMU waits"),
    meant("loses its destination", "source: event MIGRATION active", ""),
    // There are two reasons against a snapshot, and QEMU reports the other one.
    meant(
        "completes",
        "no block device can store vmstate for snapshot",
        "There's a migration process in progress",
    ),
    // QEMU's reason would be the socket that the helper broke to cancel the migration.
    meant(
        "waits before the switchover",
        "query-migrate is cancelled (why)",
        "query-migrate is cancelled ",
    ),
    // Migrations over `rdma:` can't be resumed yet.
    meant(
        "is asked wrongly",
        "Migrate recover can only be run when postcopy is paused.",
        "A migration over SCHEME: can't be resumed",
    ),
    // QEMU refuses only by accident, after it has stopped its guest, which stays stopped.
    meant(
        "takes snapshots",
        "Error: duplicate yank instance",
        "Error: There's a migration process in progress",
    ),
    meant("takes snapshots", r#""running":false"#, r#""running":true"#),
    meant("takes snapshots", "source: event STOP ", "source: event STOP "),
    meant("takes snapshots", "source: event RESUME ", "source: event RESUME "),
    // QEMU 7.2 gives no reason here.
    meant("has a return path", "query-migrate is failed ", "query-migrate is failed (why)"),
    // The helper reports the end when the migration is over and the guest runs.
    meant("has a return path", "source: event MIGRATION failed", "source: event MIGRATION failed"),
    // QEMU 11.1 may or may not report it.
    meant(
        "has a return path",
        "source: event MIGRATION failing",
        "source: event MIGRATION failing",
    ),
    // Over `tcp:` this guest may be lost. If not, QEMU reports the same in any order.
    meant("is not heard", "ends as completed", "ends as failed"),
    meant("is not heard", r#""status":"postmigrate""#, r#""status":"running""#),
    meant("is not heard", "source: event MIGRATION completed", ""),
    meant("is not heard", "source: event MIGRATION failing", "source: event MIGRATION failing"),
    meant("is not heard", "source: event MIGRATION failed", "source: event MIGRATION failed"),
    meant("is not heard", "source: event RESUME ", "source: event RESUME "),
];

/// Return a difference in this script. An empty text covers nothing.
const fn meant(script: &'static str, theirs: &'static str, ours: &'static str) -> Meant {
    Meant { script, theirs, ours }
}

impl Meant {
    fn covers(&self, script: &str, sign: char, line: &str) -> bool {
        let said = if sign == '-' { self.theirs } else { self.ours };
        self.script == script && !said.is_empty() && line.contains(said)
    }
}

/// Return the lines outside the longest common subsequence, in order.
fn differences<'a>(theirs: &'a [String], ours: &'a [String]) -> Vec<(char, &'a str)> {
    // Length of the common subsequence from here on.
    let mut common = vec![vec![0; ours.len() + 1]; theirs.len() + 1];
    for there in (0..theirs.len()).rev() {
        for here in (0..ours.len()).rev() {
            common[there][here] = match theirs[there] == ours[here] {
                true => common[there + 1][here + 1] + 1,
                false => common[there + 1][here].max(common[there][here + 1]),
            };
        }
    }
    let (mut there, mut here, mut differences) = (0, 0, Vec::new());
    while there < theirs.len() || here < ours.len() {
        let ends = (there == theirs.len(), here == ours.len());
        if ends == (false, false) && theirs[there] == ours[here] {
            (there, here) = (there + 1, here + 1);
        } else if ends.1 || !ends.0 && common[there + 1][here] >= common[there][here + 1] {
            differences.push(('-', theirs[there].as_str()));
            there += 1;
        } else {
            differences.push(('+', ours[here].as_str()));
            here += 1;
        }
    }
    differences
}

fn compare(version: &'static str) {
    let mut report = String::new();
    for (name, script) in SCRIPTS {
        let [theirs, ours] = [Carrier::Qemu, Carrier::Helper].map(|carrier| {
            let mut scene = Scene::start(version, carrier);
            script(&mut scene);
            scene.record()
        });
        for (sign, line) in differences(&theirs, &ours) {
            if !MEANT.iter().any(|meant| meant.covers(name, sign, line)) {
                writeln!(report, "{name}: {sign} {line}").unwrap();
            }
        }
    }
    assert!(report.is_empty(), "QEMU {version}, - is said over tcp:, + by the helper\n{report}");
}

#[test]
fn of_7_2() {
    compare(VERSIONS[0]);
}

#[test]
fn of_10_0() {
    compare(VERSIONS[1]);
}

#[test]
fn of_11_1() {
    compare(VERSIONS[2]);
}
