//! Lines of the human monitor that concern a migration.
//!
//! They are parsed by QEMU's own grammar, which differs between versions. Any spelling that QEMU
//! accepts for a migration over `rdma:` is handled here. QEMU itself answers what it refuses.

mod grammar;
mod text;

use super::{
    QmpError, Version,
    uri::{self, Target},
};
use crate::address::Address;
use grammar::Arguments;
pub use grammar::number;
pub use text::{error_text, with_values};

/// What a line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// `migrate [-d] rdma:HOST:PORT`.
    Migrate {
        /// The destination.
        address: Address,
        /// `-d`. Without it the monitor waits for the end of the migration, if it can.
        detach: bool,
    },
    /// `migrate_incoming rdma:HOST:PORT`.
    MigrateIncoming(Address),
    /// `migrate` over another transport.
    OtherMigrate,
    /// `migrate_incoming` over another transport.
    OtherMigrateIncoming,
    /// `savevm` or `loadvm`.
    Snapshot,
    /// `migrate_set_capability x-rdma-pin-all on|off`, a name that QEMU no longer has.
    PinAll(bool),
    /// `migrate_cancel`.
    Cancel,
    /// `cont`, or `c`.
    Cont,
    /// `info migrate`, with its line.
    InfoMigrate(String),
    /// `info migrate_capabilities` or `info migrate_parameters`, with its line.
    InfoSettings(String),
    /// `migrate_set_parameter` or `migrate_set_capability`.
    Set(Setting),
    /// An invalid line that names `rdma:`.
    Wrong(QmpError),
    /// A line that QEMU should reject. A QEMU with newer flags may accept it, so `rdma:` is
    /// replaced by a scheme that no QEMU has.
    Unread(String),
    /// Left to QEMU.
    Other,
}

/// A migration setting that a line changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Setting {
    /// `migrate_set_parameter`.
    Parameter {
        /// Its name.
        name: String,
        /// Its new value, in the monitor's syntax.
        value: String,
        /// The line.
        line: String,
    },
    /// `migrate_set_capability`.
    Capability {
        /// Its name.
        name: String,
        /// On or off.
        state: bool,
        /// The line.
        line: String,
    },
}

impl Setting {
    /// The original line.
    pub fn line(&self) -> &str {
        match self {
            Self::Parameter { line, .. } | Self::Capability { line, .. } => line,
        }
    }
}

/// The arguments of a command that concerns the helper: `args_type` in this version's
/// `hmp-commands.hx` and `hmp-commands-info.hx`.
fn types(command: &str, version: Version) -> Option<&'static str> {
    Some(match command {
        "c" | "cont" => "",
        "info migrate" if version.is_at_least(10, 1) => "all:-a",
        "info migrate" | "info migrate_capabilities" | "info migrate_parameters" => "",
        "loadvm" => "name:s",
        "savevm" => "name:s?",
        "migrate" if version.is_at_least(9, 1) => "detach:-d,resume:-r,uri:s",
        "migrate" => "detach:-d,blk:-b,inc:-i,resume:-r,uri:s",
        "migrate_cancel" => "",
        "migrate_incoming" | "migrate_recover" => "uri:s",
        "migrate_set_capability" => "capability:s,state:b",
        // One parameter is a list of words.
        "migrate_set_parameter" if version.is_at_least(10, 2) => "parameter:s,value:S",
        "migrate_set_parameter" => "parameter:s,value:s",
        _ => return None,
    })
}

/// The name of a line's command.
pub fn command(line: &str) -> &str {
    grammar::command(line).0
}

/// Parse a line for a QEMU of this version.
pub fn parse(line: &str, version: Version) -> Line {
    let (name, mut rest) = grammar::command(line);
    let mut command = name.to_owned();
    if name == "info" {
        let (what, after) = grammar::command(rest);
        command = format!("info {what}");
        rest = after;
    }
    let Some(types) = types(&command, version) else { return Line::Other };
    let Some(found) = Arguments::read(types, rest) else {
        let migrates = ["migrate", "migrate_incoming", "migrate_recover"].contains(&name);
        return if migrates && line.contains(uri::SCHEME) {
            Line::Unread(line.replace(uri::SCHEME, "none:"))
        } else {
            Line::Other
        };
    };
    understood(&command, found, line.to_owned()).unwrap_or_else(Line::Wrong)
}

fn understood(command: &str, mut found: Arguments, line: String) -> Result<Line, QmpError> {
    Ok(match command {
        "c" | "cont" => Line::Cont,
        "info migrate" => Line::InfoMigrate(line),
        "info migrate_capabilities" | "info migrate_parameters" => Line::InfoSettings(line),
        "loadvm" | "savevm" => Line::Snapshot,
        "migrate" => match uri::parse(&found.take("uri"))? {
            Target::Rdma(address) => {
                uri::refuse(|option| Ok(found.is_on(option)))?;
                Line::Migrate { address, detach: found.is_on("detach") }
            }
            Target::Other => Line::OtherMigrate,
        },
        "migrate_cancel" => Line::Cancel,
        "migrate_incoming" => match uri::parse(&found.take("uri"))? {
            Target::Rdma(address) => Line::MigrateIncoming(address),
            Target::Other => Line::OtherMigrateIncoming,
        },
        "migrate_recover" => match uri::parse(&found.take("uri"))? {
            Target::Rdma(_) => return Err(uri::not_resumed()),
            Target::Other => Line::Other,
        },
        "migrate_set_capability" => {
            let (name, state) = (found.take("capability"), found.is_on("state"));
            match name.as_str() {
                "x-rdma-pin-all" => Line::PinAll(state),
                _ => Line::Set(Setting::Capability { name, state, line }),
            }
        }
        _ => {
            let (name, value) = (found.take("parameter"), found.take("value"));
            Line::Set(Setting::Parameter { name, value, line })
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const V7_2: Version = Version { major: 7, minor: 2, micro: 22 };
    const V10_0: Version = Version { major: 10, minor: 0, micro: 2 };
    const V11_1: Version = Version { major: 11, minor: 1, micro: 3 };
    const ALL: [Version; 3] = [V7_2, V10_0, V11_1];

    fn migrate(detach: bool) -> Line {
        Line::Migrate { address: Address { host: "h".into(), port: 1 }, detach }
    }

    fn wrong(line: &str) -> String {
        match parse(line, V7_2) {
            Line::Wrong(error) => error.desc,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn runbook_lines_are_qemus() {
        for version in ALL {
            let parse = |line| parse(line, version);
            assert_eq!(parse("migrate -d rdma:h:1"), migrate(true));
            assert_eq!(parse(" migrate  rdma:h:1 "), migrate(false));
            assert_eq!(parse("migrate_cancel "), Line::Cancel);
            assert_eq!((parse("c"), parse("\tcont ")), (Line::Cont, Line::Cont));
            assert_eq!(parse("info  migrate"), Line::InfoMigrate("info  migrate".into()));
            assert_eq!(parse("migrate_set_capability x-rdma-pin-all on"), Line::PinAll(true));
            assert!(matches!(parse("migrate_incoming rdma:h:1"), Line::MigrateIncoming(_)));
            assert!(matches!(parse("info migrate_parameters"), Line::InfoSettings(_)));
            assert_eq!(parse("migrate -d tcp:h:1"), Line::OtherMigrate);
            assert_eq!(parse("migrate_incoming tcp:h:1"), Line::OtherMigrateIncoming);
            assert_eq!((parse("savevm"), parse("loadvm x")), (Line::Snapshot, Line::Snapshot));
            for other in [
                "",
                "info",
                "info status",
                "info/migrate",
                "info /migrate",
                "info migrate x",
                "INFO migrate",
                "Migrate rdma:h:1",
                "migrate",
                "migrate_cancel x",
                "cont x",
                "migrate_recover tcp:h:1",
                "loadvm",
                "migrate_set_capability",
                "migrate_set_capability x-rdma-pin-all maybe",
                "migrate_set_parameter multifd-channels",
                "migrate_set_parameter \"max",
                "migrate_set_par max-bandwidth 40g",
                "help rdma:h:1",
            ] {
                assert_eq!(parse(other), Line::Other, "{other}");
            }
        }
        assert!(wrong("migrate -d rdma:h").contains("no port"));
        for resumed in ["migrate -r rdma:h:1", "migrate_recover rdma:h:1"] {
            assert!(wrong(resumed).contains("can't be resumed"), "{resumed}");
        }
    }

    #[test]
    fn every_spelling_of_rdma_is_ours() {
        for version in ALL {
            for (line, detach) in [
                ("migrate -drdma:h:1", true),
                ("migrate \"rdma:h:1\"", false),
                ("\u{c}migrate\u{b}-d\"rdma:h:1\"", true),
                ("migrate rdma:h:1,to=2", false),
            ] {
                assert_eq!(parse(line, version), migrate(detach), "{line}");
            }
        }
        assert!(wrong("migrate -d-rrdma:h:1").contains("can't be resumed"));
        assert!(wrong("migrate -brdma:h:1").contains("'blk' can't be combined"));
        assert!(wrong("migrate -d -i rdma:h:1").contains("'inc' can't be combined"));
        // Not a scheme of QEMU's, or a file name.
        for other in ["migrate RDMA:h:1", "migrate/rdma:h:1", "migrate 'rdma:h:1'"] {
            assert_eq!(parse(other, V10_0), Line::OtherMigrate, "{other}");
        }
    }

    #[test]
    fn what_is_not_understood_is_asked_without_rdma() {
        for (line, asked) in [
            ("migrate -x rdma:h:1", "migrate -x none:h:1"),
            ("migrate -b rdma:h:1", "migrate -b none:h:1"),
            ("migrate rdma:h:1 rdma:h:2", "migrate none:h:1 none:h:2"),
            ("migrate_incoming \"rdma:h", "migrate_incoming \"none:h"),
            ("migrate_recover rdma:h:1 x", "migrate_recover none:h:1 x"),
        ] {
            assert_eq!(parse(line, V10_0), Line::Unread(asked.into()), "{line}");
        }
    }

    #[test]
    fn flags_are_the_versions() {
        let line = "info migrate -a";
        assert_eq!(parse(line, V10_0), Line::Other);
        assert_eq!(parse(line, V11_1), Line::InfoMigrate(line.into()));
        assert_eq!(parse("migrate -b tcp:h:1", V7_2), Line::OtherMigrate);
        assert_eq!(parse("migrate -b tcp:h:1", V10_0), Line::Other);
    }

    #[test]
    fn settings_are_named_as_qemu_reads_them() {
        let parameter = |line: &str, version| match parse(line, version) {
            Line::Set(Setting::Parameter { name, value, .. }) => Some((name, value)),
            Line::Other => None,
            other => panic!("{line}: {other:?}"),
        };
        for (line, name, value) in [
            ("migrate_set_parameter max-bandwidth 40g", "max-bandwidth", "40g"),
            ("migrate_set_parameter\u{b}multifd-channels  5", "multifd-channels", "5"),
            ("migrate_set_parameter \"multifd\\\"x\"5", "multifd\"x", "5"),
        ] {
            for version in ALL {
                assert_eq!(parameter(line, version), Some((name.into(), value.into())), "{line}");
            }
        }
        let quoted = "migrate_set_parameter tls-creds \"a b\" ";
        assert_eq!(parameter(quoted, V10_0).unwrap().1, "a b");
        assert_eq!(parameter(quoted, V11_1).unwrap().1, "\"a b\" ");
        let two = "migrate_set_parameter multifd-channels 5 6";
        assert_eq!((parameter(two, V10_0), parameter(two, V11_1).unwrap().1), (None, "5 6".into()));
        let state = |line: &str| match parse(line, V10_0) {
            Line::Set(Setting::Capability { name, state, .. }) if name == "multifd" => Some(state),
            _ => None,
        };
        assert_eq!(state("migrate_set_capability multifd on"), Some(true));
        assert_eq!(state("migrate_set_capability \"multifd\"off "), Some(false));
        assert_eq!(state("migrate_set_capability multifd ON"), None);
    }

    fn spaces() -> impl Strategy<Value = String> {
        "[ \t\n\u{b}\u{c}\r]{1,4}"
    }

    /// A word as it is, or in quotes with some of the characters escaped that may be.
    fn spelled(word: &'static str) -> impl Strategy<Value = String> {
        let quoted = word.chars().map(|c| match c {
            '\n' => "\\n".to_owned(),
            '"' | '\\' => format!("\\{c}"),
            c => c.to_string(),
        });
        prop_oneof![Just(word.to_owned()), Just(format!("\"{}\"", quoted.collect::<String>()))]
    }

    proptest! {
        #[test]
        fn spacing_and_quotes_change_nothing(
            detach in any::<bool>(),
            s in prop::collection::vec(spaces(), 3),
            end in "[ \t]{0,3}",
            uri in spelled("rdma:h:1"),
            name in spelled("multifd-channels"),
            version in prop::sample::select(&ALL[..]),
        ) {
            let (first, second, third) = (&s[0], &s[1], &s[2]);
            let flag = if detach { format!("-d{third}") } else { String::new() };
            let line = format!("{first}migrate{second}{flag}{uri}{end}");
            prop_assert_eq!(parse(&line, version), migrate(detach));
            let line = format!("{first}migrate_incoming{second}{uri}{end}");
            prop_assert!(matches!(parse(&line, version), Line::MigrateIncoming(_)));
            let line = format!("{first}migrate_set_parameter{second}{name}{third}5");
            let expected = Setting::Parameter {
                name: "multifd-channels".into(), value: "5".into(), line: line.clone(),
            };
            prop_assert_eq!(parse(&line, version), Line::Set(expected));
            let line = format!("{first}info{second}migrate{end}");
            prop_assert_eq!(parse(&line, version), Line::InfoMigrate(line));
        }

        /// Whatever its spelling, and whether QEMU accepts it or not.
        #[test]
        fn no_line_with_rdma_goes_on_as_it_is(
            line in "[ \t]?migrate(_incoming)?[ \t/][ \t/\"dr-]{0,5}rdma:h:1[ \"x\\\\]{0,3}",
            version in prop::sample::select(&ALL[..]),
        ) {
            match parse(&line, version) {
                Line::Other => prop_assert!(false, "it goes on"),
                Line::Unread(asked) => prop_assert!(!asked.contains("rdma:")),
                // The address contains `rdma:`, but does not begin with it.
                Line::OtherMigrate | Line::OtherMigrateIncoming => {
                    let begins = line.contains(" rdma:") || line.contains("\trdma:");
                    prop_assert!(!begins || line.contains('"'));
                }
                _ => {}
            }
        }
    }
}
