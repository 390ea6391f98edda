//! Lines of the human monitor, as far as they concern a migration.

use serde_json::Value;

use super::{
    QmpError,
    uri::{self, Target},
};
use crate::migration::messages::Address;

/// What a line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// `migrate [-d] rdma:HOST:PORT`.
    Migrate(Address),
    /// `migrate_incoming rdma:HOST:PORT`.
    MigrateIncoming(Address),
    /// `migrate_set_capability x-rdma-pin-all on|off`: a name that QEMU no longer has.
    PinAll(String),
    /// `migrate_cancel`.
    Cancel,
    /// `info migrate`.
    InfoMigrate,
    /// `info migrate_capabilities` or `info migrate_parameters`: the word.
    InfoSettings(String),
    /// `migrate_set_parameter` or `migrate_set_capability`.
    Set(Setting),
    /// One that is ours and wrong.
    Wrong(QmpError),
    /// QEMU's business.
    Other,
}

/// A setting of migrations that a line changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Setting {
    /// `migrate_set_parameter`.
    Parameter {
        /// Its name.
        name: String,
        /// The rest of the line, from its first word on.
        value: String,
        /// The line.
        line: String,
    },
    /// `migrate_set_capability`.
    Capability {
        /// Its name.
        name: String,
        /// On or off, and the rest of the line; `None` if QEMU takes it for neither.
        state: Option<(bool, String)>,
        /// The line.
        line: String,
    },
}

impl Setting {
    /// As it was said.
    pub fn line(&self) -> &str {
        match self {
            Self::Parameter { line, .. } | Self::Capability { line, .. } => line,
        }
    }

    /// In a line, if QEMU would look for the name of one there.
    fn read(line: &str) -> Option<Self> {
        let (command, rest) = split_command(line);
        let parameter = match command {
            "migrate_set_parameter" => true,
            "migrate_set_capability" => false,
            _ => return None,
        };
        let (name, rest) = word(rest)?;
        let (rest, line) = (rest.trim_start_matches(is_space), line.to_owned());
        if parameter {
            return Some(Self::Parameter { name, value: rest.to_owned(), line });
        }
        let (state, rest) = rest.split_at(rest.find(is_space).unwrap_or(rest.len()));
        let state = match state {
            "on" => Some((true, rest.to_owned())),
            "off" => Some((false, rest.to_owned())),
            _ => None,
        };
        Some(Self::Capability { name, state, line })
    }
}

/// The name of a line's command, and what follows.
fn split_command(line: &str) -> (&str, &str) {
    let line = line.trim_start_matches(is_space);
    line.split_at(line.find(|c| is_space(c) || c == '/').unwrap_or(line.len()))
}

/// The name of a line's command.
pub fn command(line: &str) -> &str {
    split_command(line).0
}

/// C's isspace.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t'..='\r')
}

/// The first word, which may be in quotes, and what follows (`get_str` of `monitor/hmp.c`); `None` if
/// there is none, or its quotes are wrong.
pub fn word(text: &str) -> Option<(String, &str)> {
    let text = text.trim_start_matches(is_space);
    let Some(quoted) = text.strip_prefix('"') else {
        let (word, rest) = text.split_at(text.find(is_space).unwrap_or(text.len()));
        return Some((word.to_owned(), rest)).filter(|(word, _)| !word.is_empty());
    };
    let mut word = String::new();
    let mut chars = quoted.char_indices();
    loop {
        match chars.next()? {
            (end, '"') => return Some((word, &quoted[end + 1..])),
            (_, '\\') => word.push(match chars.next()?.1 {
                'n' => '\n',
                'r' => '\r',
                c @ ('\\' | '\'' | '"') => c,
                _ => return None,
            }),
            (_, c) => word.push(c),
        }
    }
}

/// The number that all of a text is to QEMU (`strtoull` with base 0).
pub fn number(text: &str) -> Option<Value> {
    let text = text.trim_start_matches(is_space);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let hexadecimal = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"));
    let (digits, radix) = match hexadecimal {
        Some(digits) => (digits, 16),
        None if digits.starts_with('0') => (digits, 8),
        None => (digits, 10),
    };
    if digits.starts_with('+') {
        return None;
    }
    let number = u64::from_str_radix(digits, radix).ok()?;
    // C wraps it.
    Some(if negative { number.wrapping_neg() } else { number }.into())
}

/// Read a line.
///
/// # Errors
/// The monitor's text for a line that is ours and wrong.
pub fn parse(line: &str) -> Result<Line, QmpError> {
    if let Some(setting) = Setting::read(line)
        && !matches!(&setting, Setting::Capability { name, .. } if name == "x-rdma-pin-all")
    {
        return Ok(Line::Set(setting));
    }
    let mut words = line.split_whitespace();
    let (command, rest): (_, Vec<&str>) = (words.next().unwrap_or_default(), words.collect());
    Ok(match (command, rest.as_slice()) {
        ("migrate", [flags @ .., address]) => match uri::parse(address)? {
            Target::Rdma(_) if flags.contains(&"-r") => {
                return Err(QmpError::generic("A migration over rdma: can't be resumed"));
            }
            Target::Rdma(address) if flags.iter().all(|flag| *flag == "-d") => {
                Line::Migrate(address)
            }
            _ => Line::Other,
        },
        ("migrate_incoming", [address]) => match uri::parse(address)? {
            Target::Rdma(address) => Line::MigrateIncoming(address),
            Target::Other => Line::Other,
        },
        ("migrate_set_capability", ["x-rdma-pin-all", state]) => Line::PinAll((*state).to_owned()),
        ("migrate_cancel", []) => Line::Cancel,
        ("info", ["migrate"]) => Line::InfoMigrate,
        ("info", [what @ ("migrate_capabilities" | "migrate_parameters")]) => {
            Line::InfoSettings((*what).to_owned())
        }
        _ => Line::Other,
    })
}

/// Replace the values of `key: value` lines in the monitor's text; keys that are missing are
/// added at the end.
pub fn with_values(text: &str, values: &[(&str, String)]) -> String {
    let mut missing: Vec<_> = values.iter().collect();
    let mut lines = Vec::new();
    for line in text.lines() {
        let key = line.split_once(':').map(|(key, _)| key);
        match values.iter().find(|(name, _)| Some(*name) == key) {
            Some((name, value)) => {
                missing.retain(|(other, _)| other != name);
                lines.push(format!("{name}: {value}"));
            }
            None => lines.push(line.to_owned()),
        }
    }
    lines.extend(missing.into_iter().map(|(name, value)| format!("{name}: {value}")));
    lines.join("\r\n") + "\r\n"
}

/// An error as the monitor prints it.
pub fn error_text(error: &QmpError) -> String {
    format!("Error: {}\r\n", error.desc)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address() -> Address {
        Address { host: "h".into(), port: 1 }
    }

    #[test]
    fn runbook_lines_are_qemus() {
        assert_eq!(parse("migrate -d rdma:h:1").unwrap(), Line::Migrate(address()));
        assert_eq!(parse(" migrate  rdma:h:1 ").unwrap(), Line::Migrate(address()));
        assert_eq!(parse("migrate_incoming rdma:h:1").unwrap(), Line::MigrateIncoming(address()));
        assert_eq!(parse("info migrate").unwrap(), Line::InfoMigrate);
        assert_eq!(
            parse("migrate_set_capability x-rdma-pin-all on").unwrap(),
            Line::PinAll("on".into())
        );
        for other in [
            "migrate -d tcp:h:1",
            "info status",
            "",
            "migrate",
            "migrate -x rdma:h:1",
            "migrate_set_capability",
            "migrate_set_parameter",
            "migrate_set_parameter \"max",
            "migrate_set_par max-bandwidth 40g",
        ] {
            assert_eq!(parse(other).unwrap(), Line::Other, "{other}");
        }
        assert!(parse("migrate -d rdma:h").unwrap_err().desc.contains("no port"));
        assert!(parse("migrate -r rdma:h:1").is_err());
    }

    #[test]
    fn settings_are_named_as_qemu_reads_them() {
        let parameter = |line: &str| match parse(line).unwrap() {
            Line::Set(Setting::Parameter { name, value, .. }) => (name, value),
            other => panic!("{line}: {other:?}"),
        };
        for (line, name, value) in [
            ("migrate_set_parameter max-bandwidth 40g", "max-bandwidth", "40g"),
            ("\tmigrate_set_parameter\u{b}multifd-channels  5  ", "multifd-channels", "5  "),
            ("migrate_set_parameter \"multifd\\\"x\"  \"5\" 6", "multifd\"x", "\"5\" 6"),
            ("migrate_set_parameter \"multifd-channels\"5", "multifd-channels", "5"),
            ("migrate_set_parameter multifd-channels", "multifd-channels", ""),
        ] {
            assert_eq!(parameter(line), (name.into(), value.into()), "{line}");
        }
        // No space to C.
        assert_eq!(parse("migrate_set_parameter\u{a0}x y z").unwrap(), Line::Other);
        let state = |line: &str| match parse(line).unwrap() {
            Line::Set(Setting::Capability { name, state, .. }) if name == "multifd" => state,
            other => panic!("{line}: {other:?}"),
        };
        assert_eq!(state("migrate_set_capability multifd on"), Some((true, String::new())));
        let off = state("migrate_set_capability \"multifd\" off x");
        assert_eq!(off, Some((false, " x".into())));
        for neither in ["ON", "\"on\"", "", "onx"] {
            assert_eq!(state(&format!("migrate_set_capability multifd {neither}")), None);
        }
    }

    #[test]
    fn numbers_are_what_they_are_to_c() {
        for (text, expected) in [
            ("5", 5_u64),
            (" +5", 5),
            ("0x1F", 31),
            ("010", 8),
            ("0", 0),
            ("-1", u64::MAX),
            ("-18446744073709551615", 1),
        ] {
            assert_eq!(number(text), Some(expected.into()), "{text}");
        }
        for text in ["", "-", "0x", "08", "5 ", "1k", "0b1", "++5", "-+5", "18446744073709551616"] {
            assert_eq!(number(text), None, "{text}");
        }
    }

    #[test]
    fn values_are_replaced_and_added() {
        let text = "Migration status: active\r\nthroughput: 0.00 mbps\r\nnormal: 0 pages\r\n";
        let values = [("throughput", "8.00 mbps".to_owned()), ("fabric", "tcp".to_owned())];
        let expected = "Migration status: active\r\nthroughput: 8.00 mbps\r\nnormal: 0 pages\r\nfabric: tcp\r\n";
        assert_eq!(with_values(text, &values), expected);
    }
}
