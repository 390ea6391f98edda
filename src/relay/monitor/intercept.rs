//! Selects the client's commands that are the relay's, and parses them.

use serde_json::{Map, Value, json};

use super::introspection;
use crate::{
    address::Address,
    qmp::{
        QmpError, Version,
        envelope::Command,
        hmp::{self, Line},
        uri::{self, Target},
    },
    relay::migration::{IN_PROGRESS, status::Side},
};

/// A command of the relay's.
#[derive(Debug, Clone, PartialEq)]
pub enum Intercepted {
    /// Migrate to this address.
    Migrate(Address),
    /// QEMU itself saves or loads the guest.
    SaveOrLoad(SaveOrLoad),
    /// Wait for a migration at this address.
    MigrateIncoming {
        /// The address.
        address: Address,
        /// The client's `exit-on-error` (since 9.1).
        exit_on_error: Option<bool>,
    },
    /// `migrate_cancel`. QEMU executes it, unless it is too early or too late.
    Cancel,
    /// `yank` of a migration, likewise. The other instances are QEMU's.
    Yank(Vec<Value>),
    /// `cont`. QEMU executes it, unless the guest may run at the destination.
    Cont {
        /// Entered at the human monitor, whose reply is text.
        line: bool,
    },
    /// `query-migrate`.
    QueryMigrate,
    /// `migrate-set-capabilities`.
    SetCapabilities {
        /// Its arguments, with QEMU's name for each capability.
        arguments: Map<String, Value>,
        /// A name differs from the client's.
        renamed: bool,
    },
    /// `migrate-set-parameters`, with these arguments.
    SetParameters(Map<String, Value>),
    /// `query-migrate-capabilities` or `query-migrate-parameters`; some may be borrowed.
    QuerySettings(Settings),
    /// `query-rdma-helper`.
    QueryHelper,
    /// `query-rdma-migrate-blockers`.
    QueryBlockers,
    /// `query-qmp-schema` or `query-commands`.
    Introspect(String),
    /// A line of the human monitor that is the relay's; the reply is text.
    Monitor(Line),
    /// A command that QEMU would refuse.
    Refused(QmpError),
}

impl Intercepted {
    /// Return whether the command queries or sets QEMU's settings: QEMU executes it if none is
    /// borrowed.
    pub fn is_about_settings(&self) -> bool {
        matches!(
            self,
            Self::SetCapabilities { renamed: false, .. }
                | Self::SetParameters(_)
                | Self::QuerySettings(_)
                | Self::Monitor(Line::InfoSettings(_) | Line::Set(_))
        )
    }
}

/// A command by which QEMU saves or loads the guest: a migration over another transport, or a
/// snapshot.
///
/// Both use the settings of migrations, and 7.2 to 11.1 crash if multifd is on while no migration
/// has created channels.
#[derive(Debug, Clone, PartialEq)]
pub struct SaveOrLoad {
    /// Its name.
    pub command: String,
    /// Its arguments.
    pub arguments: Value,
    /// This host's side, if it is a migration.
    pub migrates: Option<Side>,
}

impl SaveOrLoad {
    fn new(command: &Command, arguments: Value, migrates: Option<Side>) -> Self {
        Self { command: command.name.clone(), arguments, migrates }
    }

    /// Return whether QEMU writes a snapshot, which it shows in `query-migrate` afterwards.
    pub fn saves(&self) -> bool {
        let line = self.arguments["command-line"].as_str().unwrap_or_default();
        self.command == "snapshot-save" || hmp::command(line) == "savevm"
    }
}

/// A group of QEMU's settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settings {
    /// Capabilities.
    Capabilities,
    /// Parameters.
    Parameters,
}

impl Settings {
    /// Return the command that queries them.
    pub fn query(self) -> &'static str {
        match self {
            Self::Capabilities => "query-migrate-capabilities",
            Self::Parameters => "query-migrate-parameters",
        }
    }
}

/// Commands that may be the relay's.
const OURS: [&str; 20] = [
    "cont",
    "human-monitor-command",
    "migrate",
    "migrate-incoming",
    "migrate-recover",
    "migrate-set-capabilities",
    "migrate-set-parameters",
    "migrate_cancel",
    "query-commands",
    "query-migrate",
    "query-migrate-capabilities",
    "query-migrate-parameters",
    "query-qmp-schema",
    "query-rdma-helper",
    "query-rdma-migrate-blockers",
    "snapshot-load",
    "snapshot-save",
    "xen-load-devices-state",
    "xen-save-devices-state",
    "yank",
];

/// An argument, the first version that has it, and the first that no longer has it.
type Since = (&'static str, (u64, u64), (u64, u64));

const EVER: (u64, u64) = (u64::MAX, 0);

/// Arguments of `migrate` (`qapi/migration.json`).
const MIGRATE: &[Since] = &[
    ("uri", (0, 0), EVER),
    ("resume", (0, 0), EVER),
    ("channels", (8, 2), EVER),
    ("detach", (0, 0), (11, 1)),
    ("blk", (0, 0), (9, 1)),
    ("inc", (0, 0), (9, 1)),
];

/// Arguments of `migrate-incoming`.
const MIGRATE_INCOMING: &[Since] =
    &[("uri", (0, 0), EVER), ("channels", (8, 2), EVER), ("exit-on-error", (9, 1), EVER)];

/// Return the arguments that this version of QEMU has.
fn known(arguments: &[Since], version: Version) -> Vec<&'static str> {
    let has = |(_, first, gone): &&Since| {
        version.is_at_least(first.0, first.1) && !version.is_at_least(gone.0, gone.1)
    };
    arguments.iter().filter(has).map(|(name, ..)| *name).collect()
}

/// Parse a command for a QEMU of this version; `None` if QEMU executes it.
///
/// # Errors
/// The reply to an invalid command of the relay's, in QEMU's words.
pub fn intercept(command: &Command, version: Version) -> Result<Option<Intercepted>, QmpError> {
    let name = introspection::alias(&command.name);
    if !OURS.contains(&name) {
        return Ok(None);
    }
    if name == "human-monitor-command" {
        let Some(line) = command.line() else { return Ok(None) };
        return monitor(command, &line, version);
    }
    let arguments = &command.arguments()?;
    Ok(Some(match name {
        "migrate" => match uri::target(arguments)? {
            Target::Rdma(address) => {
                only(arguments, &known(MIGRATE, version))?;
                boolean(arguments, "detach")?;
                uri::refuse(|option| Ok(boolean(arguments, option)? == Some(true)))?;
                Intercepted::Migrate(address)
            }
            Target::Other => Intercepted::SaveOrLoad(SaveOrLoad::new(
                command,
                arguments.clone().into(),
                Some(Side::Source),
            )),
        },
        "migrate-incoming" => match uri::target(arguments)? {
            Target::Rdma(address) => {
                only(arguments, &known(MIGRATE_INCOMING, version))?;
                let exit_on_error = boolean(arguments, "exit-on-error")?;
                Intercepted::MigrateIncoming { address, exit_on_error }
            }
            Target::Other => Intercepted::SaveOrLoad(SaveOrLoad::new(
                command,
                arguments.clone().into(),
                Some(Side::Destination),
            )),
        },
        "cont" if arguments.is_empty() => Intercepted::Cont { line: false },
        // QEMU's own RDMA would listen there.
        "migrate-recover" if uri::target(arguments)? != Target::Other => {
            return Err(uri::not_resumed());
        }
        "migrate_cancel" if arguments.is_empty() => Intercepted::Cancel,
        "query-commands" | "query-qmp-schema" if arguments.is_empty() => {
            Intercepted::Introspect(command.name.clone())
        }
        "query-migrate" if arguments.is_empty() => Intercepted::QueryMigrate,
        "query-migrate-capabilities" if arguments.is_empty() => {
            Intercepted::QuerySettings(Settings::Capabilities)
        }
        "query-migrate-parameters" if arguments.is_empty() => {
            Intercepted::QuerySettings(Settings::Parameters)
        }
        "migrate-set-capabilities" => {
            let (arguments, renamed) = with_qemus_name(arguments);
            Intercepted::SetCapabilities { arguments, renamed }
        }
        "migrate-set-parameters" => Intercepted::SetParameters(arguments.clone()),
        "query-rdma-helper" => {
            only(arguments, &[])?;
            Intercepted::QueryHelper
        }
        "query-rdma-migrate-blockers" => {
            only(arguments, &[])?;
            Intercepted::QueryBlockers
        }
        "snapshot-load" | "snapshot-save" | "xen-load-devices-state" | "xen-save-devices-state" => {
            Intercepted::SaveOrLoad(SaveOrLoad::new(command, arguments.clone().into(), None))
        }
        "yank" => return Ok(yank(arguments)),
        _ => return Ok(None),
    }))
}

fn yank(arguments: &Map<String, Value>) -> Option<Intercepted> {
    let instances = arguments.get("instances")?.as_array()?.iter().cloned();
    let (migrations, others): (Vec<_>, Vec<_>) =
        instances.partition(|instance| instance["type"] == "migration");
    (!migrations.is_empty()).then_some(Intercepted::Yank(others))
}

/// Refuse what QEMU would refuse if it knew that a migration is about to start
/// (`migrate_caps_check` in `migration/options.c`, `qdev_device_add` and `qdev_unplug` in
/// `system/qdev-monitor.c`).
pub fn refusal(command: &Command) -> Option<Intercepted> {
    let why = |name: &str| match name {
        "migrate-set-capabilities" | "migrate_set_capability" => Some(IN_PROGRESS.to_owned()),
        "device_add" | "device_del" => Some(format!("{name} not allowed while migrating")),
        _ => None,
    };
    if command.name != "human-monitor-command" {
        return Some(Intercepted::Refused(QmpError::generic(why(&command.name)?)));
    }
    let line = command.line()?;
    let refused = QmpError::generic(why(hmp::command(&line))?);
    Some(Intercepted::Monitor(Line::Wrong(refused)))
}

/// Parse a line of the human monitor, of any length, as QEMU does.
fn monitor(
    command: &Command,
    line: &str,
    version: Version,
) -> Result<Option<Intercepted>, QmpError> {
    let arguments = command.arguments();
    let migrates = match hmp::parse(line, version) {
        Line::Other => return Ok(None),
        Line::OtherMigrate => Some(Side::Source),
        Line::OtherMigrateIncoming => Some(Side::Destination),
        Line::Snapshot => None,
        Line::Cont => return Ok(Some(Intercepted::Cont { line: true })),
        line => {
            if let Ok(arguments) = arguments {
                only(&arguments, &["command-line", "cpu-index"])?;
                integer(&arguments, "cpu-index")?;
            }
            return Ok(Some(Intercepted::Monitor(line)));
        }
    };
    let arguments = arguments.map_or_else(|_| json!({ "command-line": line }), Value::Object);
    Ok(Some(Intercepted::SaveOrLoad(SaveOrLoad::new(command, arguments, migrates))))
}

/// Refuse arguments that the command does not have.
fn only(arguments: &Map<String, Value>, known: &[&str]) -> Result<(), QmpError> {
    match arguments.keys().find(|name| !known.contains(&name.as_str())) {
        Some(name) => Err(QmpError::generic(format!("Parameter '{name}' is unexpected"))),
        None => Ok(()),
    }
}

fn integer(arguments: &Map<String, Value>, name: &str) -> Result<(), QmpError> {
    match arguments.get(name) {
        Some(value) if !value.is_i64() && !value.is_u64() => Err(QmpError::generic(format!(
            "Invalid parameter type for '{name}', expected: integer"
        ))),
        _ => Ok(()),
    }
}

fn boolean(arguments: &Map<String, Value>, name: &str) -> Result<Option<bool>, QmpError> {
    match arguments.get(name) {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(_) => Err(QmpError::generic(format!(
            "Invalid parameter type for '{name}', expected: boolean"
        ))),
    }
}

/// Replace `x-rdma-pin-all`, the name before QEMU 2.2, by `rdma-pin-all`; return the arguments and
/// whether it occurs.
fn with_qemus_name(arguments: &Map<String, Value>) -> (Map<String, Value>, bool) {
    let mut arguments = arguments.clone();
    let mut renamed = false;
    let list = arguments.get_mut("capabilities").and_then(Value::as_array_mut);
    for entry in list.into_iter().flatten() {
        if entry["capability"] == "x-rdma-pin-all" {
            entry["capability"] = "rdma-pin-all".into();
            renamed = true;
        }
    }
    (arguments, renamed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(text: &str) -> Result<Option<Intercepted>, QmpError> {
        ask_of((10, 0), text)
    }

    fn ask_of((major, minor): (u64, u64), text: &str) -> Result<Option<Intercepted>, QmpError> {
        let version = Version { major, minor, micro: 0 };
        intercept(&Command::read(text.as_bytes(), false).unwrap(), version)
    }

    fn refusal(text: &str) -> String {
        ask(text).unwrap_err().desc
    }

    fn address() -> Address {
        Address { host: "h".into(), port: 1 }
    }

    /// Return whether QEMU migrates, if it saves or loads the guest.
    fn by_qemu(text: &str) -> Option<bool> {
        match ask(text).unwrap() {
            Some(Intercepted::SaveOrLoad(by_qemu)) => Some(by_qemu.migrates.is_some()),
            _ => None,
        }
    }

    #[test]
    fn rdma_migrations_are_ours() {
        let migrate = Some(Intercepted::Migrate(address()));
        assert_eq!(
            ask(r#"{"execute": "migrate", "arguments": {"uri": "rdma:h:1", "detach": true}}"#)
                .unwrap(),
            migrate
        );
        let channels = r#"{"execute": "migrate", "arguments": {"channels": [{"channel-type": "main", "addr": {"transport": "rdma", "host": "h", "port": "1"}}]}}"#;
        assert_eq!(ask(channels).unwrap(), migrate);
        let incoming = r#"{"execute": "migrate-incoming", "arguments": {"uri": "rdma:h:1", "exit-on-error": false}}"#;
        let expected =
            Intercepted::MigrateIncoming { address: address(), exit_on_error: Some(false) };
        assert_eq!(ask(incoming).unwrap(), Some(expected));
        let line = r#"{"execute": "human-monitor-command", "arguments": {"command-line": "migrate -d rdma:h:1"}}"#;
        let expected = Line::Migrate { address: address(), detach: true };
        assert_eq!(ask(line).unwrap(), Some(Intercepted::Monitor(expected)));
    }

    #[test]
    fn the_rest_is_qemus() {
        for text in [
            r#"{"execute": "query-status"}"#,
            r#"{"execute": "query-migrate", "arguments": {"x": 1}}"#,
            r#"{"execute": "human-monitor-command", "arguments": {"command-line": "info status"}}"#,
            r#"{"execute": "human-monitor-command", "arguments": {"command-line": 5}}"#,
        ] {
            assert_eq!(ask(text).unwrap(), None, "{text}");
        }
        let tcp = r#"{"execute": "migrate", "arguments": {"uri": "tcp:h:1", "whatever": 1}}"#;
        assert_eq!(by_qemu(tcp), Some(true));
        let incoming = r#"{"execute": "migrate-incoming", "arguments": {"uri": "tcp:h:1"}}"#;
        assert_eq!(by_qemu(incoming), Some(true));
        let wrong = r#"{"execute": "migrate", "arguments": {"uri": 5}}"#;
        assert_eq!(by_qemu(wrong), Some(true));
        for line in ["migrate -dtcp:h:1", " savevm one", "loadvm one", "savevm"] {
            let text = json!({ "execute": "human-monitor-command", "arguments": { "command-line": line } });
            assert_eq!(by_qemu(&text.to_string()), Some(line.starts_with("migrate")));
        }
        let snapshot = r#"{"execute": "snapshot-save", "arguments": {"tag": "one"}}"#;
        assert_eq!(by_qemu(snapshot), Some(false));
    }

    /// QEMU accepts a line of any length, and searches all of it for a word.
    #[test]
    fn no_line_is_too_long() {
        let space = " ".repeat(1 << 20);
        for (line, padded) in [
            ("migrate rdma:h:1", format!("{space}migrate{space}rdma:h:1{space}")),
            ("savevm one", format!("savevm{space}one")),
            ("migrate_set_parameter a b", format!("{space}migrate_set_parameter a b")),
            ("info migrate", format!("info {space}migrate{space}")),
        ] {
            let ask = |line: &str, space: &str| {
                let line = json!(line);
                ask(&format!(
                    r#"{{"execute": "human-monitor-command", "arguments": {{{space}"command-line": {line}}}}}"#
                ))
            };
            let kind = |asked: Result<Option<Intercepted>, _>| {
                std::mem::discriminant(&asked.unwrap().unwrap())
            };
            assert_eq!(kind(ask(&padded, "")), kind(ask(line, "")), "{line}");
            assert_eq!(ask(line, &space), ask(line, ""), "{line}");
        }
    }

    #[test]
    fn a_migration_that_is_yanked_is_told_from_others() {
        let yank = |instances: &str| {
            ask(&format!(r#"{{"execute": "yank", "arguments": {{"instances": {instances}}}}}"#))
        };
        let device = serde_json::json!({ "type": "chardev", "id": "c" });
        let both = yank(r#"[{"type": "chardev", "id": "c"}, {"type": "migration"}]"#);
        assert_eq!(both.unwrap(), Some(Intercepted::Yank(vec![device])));
        let alone = yank(r#"[{"type": "migration"}]"#).unwrap();
        assert_eq!(alone, Some(Intercepted::Yank(Vec::new())));
        for other in [r#"[{"type": "chardev", "id": "c"}]"#, "[]", "[7]", "7"] {
            assert_eq!(yank(other).unwrap(), None, "{other}");
        }
    }

    /// They may be borrowed.
    #[test]
    fn settings_are_looked_at() {
        for text in [
            r#"{"execute": "migrate-set-capabilities", "arguments": {"capabilities": [{"capability": "rdma-pin-all", "state": true}]}}"#,
            r#"{"execute": "migrate-set-capabilities", "arguments": {"capabilities": 7}}"#,
            r#"{"execute": "migrate-set-capabilities"}"#,
            r#"{"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 7}}"#,
            r#"{"execute": "query-migrate-parameters"}"#,
            r#"{"execute": "human-monitor-command", "arguments": {"command-line": "migrate_set_parameter a b"}}"#,
        ] {
            assert!(ask(text).unwrap().unwrap().is_about_settings(), "{text}");
        }
    }

    #[test]
    fn what_is_added_has_two_names() {
        for name in ["query-rdma-helper", "__org.qemu-rdma-helper_query-rdma-helper"] {
            let asked = ask(&json!({ "execute": name }).to_string()).unwrap();
            assert_eq!(asked, Some(Intercepted::QueryHelper), "{name}");
        }
        for others in ["__org.qemu-rdma-helper_migrate", "__org.example_query-rdma-helper"] {
            assert_eq!(ask(&json!({ "execute": others }).to_string()).unwrap(), None, "{others}");
        }
        let schema = ask(r#"{"execute": "query-qmp-schema"}"#).unwrap();
        assert_eq!(schema, Some(Intercepted::Introspect("query-qmp-schema".into())));
    }

    #[test]
    fn no_postcopy_goes_on_over_qemus_own_rdma() {
        let recover = r#"{"execute": "migrate-recover", "arguments": {"uri": "rdma:h:1"}}"#;
        assert_eq!(refusal(recover), "A migration over rdma: can't be resumed");
        let tcp = r#"{"execute": "migrate-recover", "arguments": {"uri": "tcp:h:1"}}"#;
        assert_eq!(ask(tcp).unwrap(), None);
    }

    #[test]
    fn storage_migration_is_refused() {
        let blk = r#"{"execute": "migrate", "arguments": {"uri": "rdma:h:1", "blk": true}}"#;
        let refused = ask_of((7, 2), blk).unwrap_err().desc;
        assert!(refused.starts_with("Parameter 'blk' can't be combined"), "{refused}");
        assert_eq!(refusal(blk), "Parameter 'blk' is unexpected");
        let off = r#"{"execute": "migrate", "arguments": {"uri": "rdma:h:1", "inc": false}}"#;
        assert_eq!(ask_of((7, 2), off).unwrap(), Some(Intercepted::Migrate(address())));
    }

    #[test]
    fn the_old_name_is_translated() {
        let text = r#"{"execute": "migrate-set-capabilities", "arguments": {"capabilities": [{"capability": "x-rdma-pin-all", "state": true}, {"capability": "events", "state": true}]}}"#;
        let expected = json!({"capabilities": [{"capability": "rdma-pin-all", "state": true}, {"capability": "events", "state": true}]});
        let arguments = expected.as_object().unwrap().clone();
        let expected = Intercepted::SetCapabilities { arguments, renamed: true };
        assert!(!expected.is_about_settings(), "it goes to QEMU with another name");
        assert_eq!(ask(text).unwrap(), Some(expected));
    }

    #[test]
    fn refusals_are_in_qemus_words() {
        let typo = r#"{"execute": "query-rdma-helper", "arguments": {"typo": 1}}"#;
        assert_eq!(refusal(typo), "Parameter 'typo' is unexpected");
        let typo = r#"{"execute": "migrate", "arguments": {"uri": "rdma:h:1", "typo": 1}}"#;
        assert_eq!(refusal(typo), "Parameter 'typo' is unexpected");
        let kind = r#"{"execute": "migrate", "arguments": {"uri": "rdma:h:1", "resume": 1}}"#;
        assert_eq!(refusal(kind), "Invalid parameter type for 'resume', expected: boolean");
        let line = |more: &str| {
            refusal(&format!(
                r#"{{"execute": "human-monitor-command", "arguments": {{"command-line": "migrate rdma:h:1", {more}}}}}"#
            ))
        };
        assert_eq!(line(r#""typo": 1"#), "Parameter 'typo' is unexpected");
        let kind = "Invalid parameter type for 'cpu-index', expected: integer";
        assert_eq!(line(r#""cpu-index": "0""#), kind);
        assert!(
            refusal(r#"{"execute": "migrate", "arguments": {"uri": "rdma:h"}}"#)
                .contains("no port")
        );
    }
}
