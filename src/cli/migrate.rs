//! `migrate`: one migration, from start to end.

use std::{
    fmt,
    io::{self, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};
use qemu_rdma_helper::qmp::Execute as _;
use serde_json::{Map, Value, json};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{MissedTickBehavior, interval},
};

use super::{client::Client, exit};

/// Migrate the guest and show the progress.
///
/// The destination's helper must wait for it (migrate-incoming). Ctrl-C, SIGTERM and SIGHUP cancel it:
/// the guest keeps running here. The exit code is 0 only if the guest is at the destination.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The helper's QMP socket at the source
    #[arg(long, value_name = "PATH")]
    qmp: PathBuf,
    /// Destination: rdma:HOST:PORT
    #[arg(value_name = "URI")]
    uri: String,
    /// Register all of the guest's memory at the start (capability rdma-pin-all)
    #[arg(long)]
    pin_all: bool,
    /// Maximum bytes per second, as in QEMU's monitor: 40g is 40 GiB/s, not 40 Gbit/s; a bare number is
    /// MiB/s
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_bandwidth: Option<u64>,
    /// Maximum downtime in milliseconds
    #[arg(long, value_name = "MS")]
    downtime_limit: Option<u64>,
}

/// Parse a size as QEMU's monitor does (`strtosz` with MiB as default unit).
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no size: a number, then b, k, m, g, t or p");
    let unit = text.chars().last().map(|last| last.to_ascii_lowercase()).ok_or_else(wrong)?;
    let (digits, shift) = match unit {
        'b' => (&text[..text.len() - 1], 0),
        'k' => (&text[..text.len() - 1], 10),
        'm' => (&text[..text.len() - 1], 20),
        'g' => (&text[..text.len() - 1], 30),
        't' => (&text[..text.len() - 1], 40),
        'p' => (&text[..text.len() - 1], 50),
        _ => (text, 20),
    };
    let number: f64 = digits.parse().map_err(|_| wrong())?;
    let bytes = number * (1_u64 << shift) as f64;
    if !(0.0..9.2e18).contains(&bytes) {
        return Err(wrong());
    }
    Ok(bytes as u64)
}

/// Run the migration to its end.
pub async fn run(args: Args) -> anyhow::Result<u8> {
    if !args.uri.starts_with("rdma:") {
        bail!("'{}' is no rdma:HOST:PORT; other migrations are QEMU's own: use 'hmp'", args.uri);
    }
    let mut client = Client::connect(&args.qmp).await?;
    prepare(&mut client, &args).await?;
    let mut signals = Signals::new().context("Cannot watch for Ctrl-C")?;
    client
        .execute("migrate", json!({ "uri": args.uri }))
        .await
        .context("The migration did not start; the guest keeps running here")?;
    let progress = Display::new();
    let mut ticks = interval(Duration::from_millis(250));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut cancelled = false;
    loop {
        tokio::select! {
            () = signals.next() => {
                cancelled = true;
                client.execute("migrate_cancel", Value::Null).await?;
            }
            _ = ticks.tick() => {
                let state = client.execute("query-migrate", Value::Null).await?;
                match state["status"].as_str().unwrap_or("none") {
                    "completed" => {
                        progress.finish();
                        summary(&state);
                        return Ok(exit::DONE);
                    }
                    "failed" => {
                        progress.finish();
                        let why = state["error-desc"].as_str().unwrap_or("The migration failed");
                        let guest = client.execute("query-status", Value::Null).await?;
                        match guest["status"].as_str() {
                            Some("running") => bail!("{why}; the guest keeps running here"),
                            _ => bail!("{why}"),
                        }
                    }
                    "cancelled" if cancelled => {
                        progress.finish();
                        bail!("Cancelled; the guest keeps running here");
                    }
                    "cancelled" => {
                        progress.finish();
                        bail!("The migration was cancelled; the guest keeps running here");
                    }
                    status => progress.show(status, &state),
                }
            }
        }
    }
}

/// Signals that cancel the migration. The terminal may be gone with one of them.
struct Signals([Signal; 3]);

impl Signals {
    fn new() -> io::Result<Self> {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [interrupt, terminate, hang_up] = kinds.map(signal);
        Ok(Self([interrupt?, terminate?, hang_up?]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hang_up] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hang_up.recv() => {}
        }
    }
}

/// Print a line, if anybody reads it.
fn say(text: fmt::Arguments<'_>) {
    // The terminal may be gone; the migration must be awaited all the same.
    let _ = writeln!(io::stdout(), "{text}");
}

/// Set what the arguments ask for.
async fn prepare(client: &mut Client, args: &Args) -> anyhow::Result<()> {
    let helper = client.execute("query-rdma-helper", Value::Null).await;
    if helper.is_err_and(|error| error.class == "CommandNotFound") {
        bail!("{} is not a helper's socket; give the --qmp of 'attach'", Path::display(&args.qmp));
    }
    let pin_all = json!([{ "capability": "rdma-pin-all", "state": args.pin_all }]);
    client.execute("migrate-set-capabilities", json!({ "capabilities": pin_all })).await?;
    let mut parameters = Map::new();
    if let Some(limit) = args.max_bandwidth {
        parameters.insert("max-bandwidth".into(), limit.into());
    }
    if let Some(limit) = args.downtime_limit {
        parameters.insert("downtime-limit".into(), limit.into());
    }
    if !parameters.is_empty() {
        client.execute("migrate-set-parameters", Value::Object(parameters)).await?;
    }
    Ok(())
}

/// Progress display: a bar on a terminal, else one line per second.
struct Display {
    bar: Option<ProgressBar>,
    last: std::cell::Cell<Option<Instant>>,
}

impl Display {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:40} {percent:>3}% {msg}");
            let bar = ProgressBar::new(1);
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        Self { bar, last: std::cell::Cell::new(None) }
    }

    fn show(&self, status: &str, state: &Value) {
        let figure = |name: &str| state["ram"][name].as_u64().unwrap_or(0);
        let (total, remaining) = (figure("total"), figure("remaining"));
        let mbps = state["ram"]["mbps"].as_f64().unwrap_or(0.0);
        let expected = match state["expected-downtime"].as_u64() {
            Some(milliseconds) => format!(", expected downtime {milliseconds} ms"),
            None => String::new(),
        };
        let text = format!("{status}, {mbps:.0} mbps, {} MiB left{expected}", remaining >> 20);
        if let Some(bar) = &self.bar {
            bar.set_length(total.max(1));
            bar.set_position(total.saturating_sub(remaining));
            bar.set_message(text);
        } else if self.last.get().is_none_or(|last| last.elapsed() >= Duration::from_secs(1)) {
            self.last.set(Some(Instant::now()));
            say(format_args!("{text}"));
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn summary(state: &Value) {
    let time = |name: &str| state[name].as_u64().unwrap_or(0);
    let figure = |name: &str| state["ram"][name].as_u64().unwrap_or(0);
    let mbps = state["ram"]["mbps"].as_f64().unwrap_or(0.0);
    say(format_args!("completed: the guest is at the destination"));
    say(format_args!(
        "  total time   {} ms, including set-up {} ms",
        time("total-time"),
        time("setup-time")
    ));
    say(format_args!("  downtime     {} ms", time("downtime")));
    say(format_args!(
        "  transferred  {} MiB of {} MiB",
        figure("transferred") >> 20,
        figure("total") >> 20
    ));
    say(format_args!(
        "  throughput   {mbps:.0} mbps ({:.0} MiB/s)",
        mbps * 1e6 / 8.0 / f64::from(1 << 20)
    ));
    say(format_args!("  dirty syncs  {}", figure("dirty-sync-count")));
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes_are_the_monitors() {
        assert_eq!(parse_size("40g"), Ok(40 << 30));
        assert_eq!(parse_size("1.5G"), Ok(3 << 29));
        assert_eq!(parse_size("100"), Ok(100 << 20));
        assert_eq!(parse_size("7b"), Ok(7));
        for wrong in ["", "g", "x", "-1", "1e30g", "nan"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
