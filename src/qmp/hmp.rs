//! Lines of the human monitor, as far as they concern a migration.

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
    /// One that is ours and wrong.
    Wrong(QmpError),
    /// QEMU's business.
    Other,
}

/// Read a line.
///
/// # Errors
/// The monitor's text for a line that is ours and wrong.
pub fn parse(line: &str) -> Result<Line, QmpError> {
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
            "migrate_set_capability rdma-pin-all on",
            "migrate_set_parameter max-bandwidth 40g",
        ] {
            assert_eq!(parse(other).unwrap(), Line::Other, "{other}");
        }
        assert!(parse("migrate -d rdma:h").unwrap_err().desc.contains("no port"));
        assert!(parse("migrate -r rdma:h:1").is_err());
    }

    #[test]
    fn values_are_replaced_and_added() {
        let text = "Migration status: active\r\nthroughput: 0.00 mbps\r\nnormal: 0 pages\r\n";
        let values = [("throughput", "8.00 mbps".to_owned()), ("fabric", "tcp".to_owned())];
        let expected = "Migration status: active\r\nthroughput: 8.00 mbps\r\nnormal: 0 pages\r\nfabric: tcp\r\n";
        assert_eq!(with_values(text, &values), expected);
    }
}
