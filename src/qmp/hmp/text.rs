//! The human monitor's output.

use crate::qmp::QmpError;

/// Replace the values of `key: value` lines in the monitor's output, where present. Quotes and
/// units are kept.
pub fn with_values(text: &str, values: &[(&str, String)]) -> String {
    let lines = text.lines().map(|line| {
        let changed = line.split_once(": ").and_then(|(key, before)| {
            let (_, value) = values.iter().find(|(name, _)| *name == key)?;
            Some(format!("{key}: {}\r\n", in_form_of(before, value)))
        });
        changed.unwrap_or_else(|| format!("{line}\r\n"))
    });
    lines.collect()
}

fn in_form_of(before: &str, value: &str) -> String {
    match before.split_once(' ') {
        _ if before.starts_with('\'') => format!("'{value}'"),
        Some((number, unit)) if number.parse::<u64>().is_ok() => format!("{value} {unit}"),
        _ => value.to_owned(),
    }
}

/// An error as the monitor prints it.
pub fn error_text(error: &QmpError) -> String {
    format!("Error: {}\r\n", error.desc)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_replaced_in_their_form() {
        let text = "multifd-channels: 8\r\nmode: normal\r\ntls-creds: 'a'\r\nx-rdma-chunk-size: 1 bytes\r\ncpr-exec-command:\r\n";
        let values = [
            ("multifd-channels", "2"),
            ("mode", "cpr-reboot"),
            ("tls-creds", ""),
            ("x-rdma-chunk-size", "4"),
            ("nothing", "5"),
        ];
        let values = values.map(|(name, value)| (name, value.to_owned()));
        let expected = "multifd-channels: 2\r\nmode: cpr-reboot\r\ntls-creds: ''\r\nx-rdma-chunk-size: 4 bytes\r\ncpr-exec-command:\r\n";
        assert_eq!(with_values(text, &values), expected);
    }
}
