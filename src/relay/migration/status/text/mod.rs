//! `info migrate`: the same in the human monitor's form.
//!
//! QEMU's text is about its own migration; clients see ours. So the rows about a migration are
//! rebuilt from the `query-migrate` that clients are shown, in the form of the attached QEMU, and
//! the other lines stay (`hmp_info_migrate` in `monitor/hmp-cmds.c`, later
//! `migration/migration-hmp-cmds.c`).

use serde_json::Value;

use super::{Side, View};
use crate::qmp::Version;

impl View {
    /// Return what a client gets for QEMU's `text`, when `query-migrate` shows `reply`.
    pub fn overlay_text(&self, version: Version, text: &str, reply: &Value) -> String {
        let table = Table { reply, incoming: self.side == Side::Destination, version };
        let grouped = version.is_at_least(10, 1);
        let rows = if grouped { table.grouped() } else { table.plain() };
        let mut lines = merged(text, rows, reply, if grouped { &GROUPED } else { &PLAIN });
        lines.extend(self.own_rows(grouped, reply));
        lines.iter().flat_map(|line| [line, "\r\n"]).collect()
    }

    /// Return the rows that QEMU does not have.
    fn own_rows(&self, grouped: bool, reply: &Value) -> Vec<String> {
        let (progress, mut rows) = (&self.progress, Vec::new());
        if self.side == Side::Destination || !reply["ram"].is_object() || progress.fabric.is_empty()
        {
            return rows;
        }
        let pins = progress.pin_ms > 0;
        if grouped {
            rows.push("RDMA info:".into());
            rows.push(format!("  Fabric: \t\t{}", progress.fabric));
            if pins {
                rows.push(format!("  Pinned: \t\t{}", size(progress.pinned)));
                rows.push(format!("  Pin Time (ms): \t{}", progress.pin_ms));
            }
        } else {
            rows.push(format!("rdma fabric: {}", progress.fabric));
            if pins {
                let (kbytes, ms) = (progress.pinned >> 10, progress.pin_ms);
                rows.push(format!("rdma pinned: {kbytes} kbytes in {ms} ms"));
            }
        }
        rows
    }
}

/// QEMU's lines about a migration, by their beginnings.
struct Form {
    /// Rows that are rebuilt.
    rows: &'static [&'static str],
    /// Lines that stay as long as `query-migrate` has this member.
    others: &'static [(&'static str, &'static str)],
    /// Beginning of the first line after the table.
    behind: &'static str,
}

/// The form up to 10.0.
const PLAIN: Form = Form {
    rows: &[
        "Migration status:",
        "total time:",
        "expected downtime:",
        "downtime:",
        "setup:",
        "transferred ram:",
        "throughput:",
        "remaining ram:",
        "total ram:",
        "duplicate:",
        "skipped:",
        "normal:",
        "normal bytes:",
        "dirty sync count:",
        "page size:",
        "multifd bytes:",
        "pages-per-second:",
        "dirty pages rate:",
        "postcopy request count:",
        "precopy ram:",
        "downtime ram:",
        "postcopy ram:",
        "Zero-copy-send fallbacks happened:",
        "socket address: [",
        "\t",
        "]",
    ],
    others: &[
        ("cache size:", "xbzrle-cache"),
        ("xbzrle ", "xbzrle-cache"),
        ("compress", "compression"),
        ("cpu throttle percentage:", "cpu-throttle-percentage"),
        ("dirty-limit throttle time:", "dirty-limit-throttle-time-per-round"),
        ("dirty-limit ring full time:", "dirty-limit-ring-full-time"),
        ("postcopy blocktime:", "postcopy-blocktime"),
        ("postcopy vcpu blocktime:", "postcopy-vcpu-blocktime"),
        ("vfio device transferred:", "vfio"),
    ],
    behind: "cache size:",
};

/// The form since 10.1.
const GROUPED: Form = Form {
    rows: &[
        "Status:",
        "Time (ms):",
        "Remaining:",
        "Sockets: [",
        "\t",
        "]",
        "RAM info:",
        "  Throughput (Mbps):",
        "  Sizes:",
        "  Transfers:",
        "    Channels:",
        "    Page Types:",
        "  Page Rates (pps):",
        "  Others:",
    ],
    others: &[
        ("XBZRLE:", "xbzrle-cache"),
        ("  miss_rate=", "xbzrle-cache"),
        ("CPU Throttle (%):", "cpu-throttle-percentage"),
        ("Dirty-limit Throttle (us):", "dirty-limit-throttle-time-per-round"),
        ("Dirty-limit Ring Full (us):", "dirty-limit-ring-full-time"),
    ],
    behind: "Globals:",
};

/// Replace QEMU's rows in its text.
fn merged(text: &str, rows: Vec<String>, reply: &Value, form: &Form) -> Vec<String> {
    let (mut before, mut behind) = (Vec::new(), Vec::new());
    let mut passed = false;
    for line in text.lines() {
        let begins = |with: &str| line.starts_with(with);
        if form.rows.iter().any(|row| begins(row)) {
            passed = true;
            continue;
        }
        passed |= begins(form.behind);
        let gone = |(begin, member): &(&str, &str)| begins(begin) && reply.get(member).is_none();
        if !form.others.iter().any(gone) {
            if passed { &mut behind } else { &mut before }.push(line.to_owned());
        }
    }
    [before, rows, behind].concat()
}

/// What `query-migrate` shows, as text.
struct Table<'a> {
    reply: &'a Value,
    incoming: bool,
    version: Version,
}

impl Table<'_> {
    fn plain(&self) -> Vec<String> {
        let mut rows = Vec::new();
        let time = |name: &str| self.reply[name].as_u64();
        if let Some(status) = self.status(&["failed"]) {
            rows.push(format!("Migration status: {status}"));
            rows.push(format!("total time: {} ms", time("total-time").unwrap_or(0)));
            for (row, name) in [
                ("expected downtime", "expected-downtime"),
                ("downtime", "downtime"),
                ("setup", "setup-time"),
            ] {
                rows.extend(time(name).map(|time| format!("{row}: {time} ms")));
            }
        }
        if self.reply["ram"].is_object() {
            rows.extend(self.plain_ram());
        }
        self.sockets("socket address: [", &mut rows);
        rows
    }

    fn plain_ram(&self) -> Vec<String> {
        let figure = |name: &str| self.figure(name);
        let kbytes = |name: &str| figure(name) >> 10;
        let mut rows = vec![
            format!("transferred ram: {} kbytes", kbytes("transferred")),
            format!("throughput: {:.2} mbps", self.mbps()),
            format!("remaining ram: {} kbytes", kbytes("remaining")),
            format!("total ram: {} kbytes", kbytes("total")),
            format!("duplicate: {} pages", figure("duplicate")),
        ];
        if !self.version.is_at_least(9, 1) {
            rows.push(format!("skipped: {} pages", figure("skipped")));
        }
        rows.extend([
            format!("normal: {} pages", figure("normal")),
            format!("normal bytes: {} kbytes", kbytes("normal-bytes")),
            format!("dirty sync count: {}", figure("dirty-sync-count")),
            format!("page size: {} kbytes", kbytes("page-size")),
            format!("multifd bytes: {} kbytes", kbytes("multifd-bytes")),
            format!("pages-per-second: {}", figure("pages-per-second")),
        ]);
        // Zero values are omitted.
        let mut optional = |row: &str, name: &str, shift: u32, unit: &str| {
            if figure(name) > 0 {
                rows.push(format!("{row}: {}{unit}", figure(name) >> shift));
            }
        };
        optional("dirty pages rate", "dirty-pages-rate", 0, " pages");
        optional("postcopy request count", "postcopy-requests", 0, "");
        optional("precopy ram", "precopy-bytes", 10, " kbytes");
        optional("downtime ram", "downtime-bytes", 10, " kbytes");
        optional("postcopy ram", "postcopy-bytes", 10, " kbytes");
        let missed = "Zero-copy-send fallbacks happened";
        optional(missed, "dirty-sync-missed-zero-copy", 0, " times");
        rows
    }

    fn grouped(&self) -> Vec<String> {
        let mut rows = Vec::new();
        if let Some(status) = self.status(&["failed", "postcopy-paused"]) {
            rows.push(format!("Status: \t\t{status}"));
            let times = self.list(
                self.reply,
                &[
                    ("total", "total-time"),
                    ("setup", "setup-time"),
                    ("exp_down", "expected-downtime"),
                    ("down", "downtime"),
                ],
            );
            if self.reply["total-time"].as_u64().is_some_and(|total| total > 0) {
                rows.push(format!("Time (ms): \t\t{times}"));
            }
        }
        if let Some(remaining) = self.reply["remaining"].as_u64() {
            rows.push(format!("Remaining: \t\t{}", size(remaining)));
        }
        self.sockets("Sockets: [", &mut rows);
        if self.reply["ram"].is_object() {
            rows.extend(self.grouped_ram());
        }
        rows
    }

    fn grouped_ram(&self) -> Vec<String> {
        let figure = |name: &str| self.figure(name);
        let size = |name: &str| size(figure(name));
        let vfio = self.reply["vfio"]["transferred"].as_u64();
        let vfio = vfio.map_or(String::new(), |bytes| format!(", vfio={}", self::size(bytes)));
        // Zero values are omitted.
        let optional = |row: &str, name: &str| match figure(name) {
            0 => String::new(),
            figure => format!(", {row}={figure}"),
        };
        vec![
            "RAM info:".into(),
            format!("  Throughput (Mbps): \t{:.2}", self.mbps()),
            format!("  Sizes: \t\tpagesize={}, total={}", size("page-size"), size("total")),
            format!(
                "  Transfers: \t\ttransferred={}, remain={}",
                size("transferred"),
                size("remaining")
            ),
            format!(
                "    Channels: \t\tprecopy={}, multifd={}, postcopy={}{vfio}",
                size("precopy-bytes"),
                size("multifd-bytes"),
                size("postcopy-bytes")
            ),
            format!("    Page Types: \tnormal={}, zero={}", figure("normal"), figure("duplicate")),
            format!(
                "  Page Rates (pps): \ttransfer={}{}",
                figure("pages-per-second"),
                optional("dirty", "dirty-pages-rate")
            ),
            format!(
                "  Others: \t\tdirty_syncs={}{}{}{}",
                figure("dirty-sync-count"),
                optional("postcopy_req", "postcopy-requests"),
                optional("downtime_bytes", "downtime-bytes"),
                optional("zerocopy_fallbacks", "dirty-sync-missed-zero-copy")
            ),
        ]
    }

    /// Return the status, with the error if it is one of `explained`.
    fn status(&self, explained: &[&str]) -> Option<String> {
        let status = self.reply["status"].as_str()?;
        let why = self.reply["error-desc"].as_str().filter(|_| explained.contains(&status));
        Some(why.map_or_else(|| status.to_owned(), |why| format!("{status} ({why})")))
    }

    fn figure(&self, name: &str) -> u64 {
        self.reply["ram"][name].as_u64().unwrap_or(0)
    }

    fn mbps(&self) -> f64 {
        self.reply["ram"]["mbps"].as_f64().unwrap_or(0.0)
    }

    /// Format the members that exist as `name=figure, …`.
    fn list(&self, of: &Value, names: &[(&str, &str)]) -> String {
        let figures = names
            .iter()
            .filter_map(|(name, member)| Some(format!("{name}={}", of[member].as_u64()?)));
        figures.collect::<Vec<_>>().join(", ")
    }

    /// Add the listening sockets; those of a migration of ours in the form that `migrate` takes.
    fn sockets(&self, heading: &str, rows: &mut Vec<String>) {
        let Some(sockets) = self.reply["socket-address"].as_array() else { return };
        let uri = |socket: &Value| {
            let text = |name: &str| socket[name].as_str().unwrap_or_default().to_owned();
            match text("type").as_str() {
                "inet" if self.incoming && text("host").contains(':') => {
                    format!("rdma:[{}]:{}", text("host"), text("port"))
                }
                "inet" if self.incoming => format!("rdma:{}:{}", text("host"), text("port")),
                "inet" => format!("tcp:{}:{}", text("host"), text("port")),
                "vsock" => format!("vsock:{}:{}", text("cid"), text("port")),
                "fd" => format!("fd:{}", text("str")),
                _ => format!("unix:{}", text("path")),
            }
        };
        rows.push(heading.to_owned());
        rows.extend(sockets.iter().map(|socket| format!("\t{}", uri(socket))));
        rows.push("]".into());
    }
}

/// Format a size as `size_to_str` in `util/cutils.c` does: three digits, and a unit of which there
/// are less than 1000.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let (mut unit, mut least) = (0, 1000);
    while bytes >= least && unit + 1 < UNITS.len() {
        unit += 1;
        least = least.saturating_mul(1024);
    }
    let value = bytes as f64 / (1_u64 << (10 * unit)) as f64;
    format!("{} {}B", three_digits(value), UNITS[unit])
}

/// Format a number that is not negative as C's `%0.3g` does.
fn three_digits(value: f64) -> String {
    let scientific = format!("{value:.2e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trimmed = |number: &str| match number.contains('.') {
        true => number.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => number.to_owned(),
    };
    match 2 - exponent {
        decimals @ 0..=6 => {
            let decimals = usize::try_from(decimals).unwrap_or(0);
            trimmed(&format!("{value:.decimals$}"))
        }
        _ => format!("{}e{exponent:+03}", trimmed(mantissa)),
    }
}

#[cfg(test)]
mod tests;
