//! What clients see of a migration of ours: `query-migrate`, `info migrate`, the event.

mod text;

use std::net::IpAddr;

use qapi::qmp::MigrationStats;
use serde_json::{Value, json};

use crate::{
    address::Address,
    control::Progress,
    qmp::envelope,
    relay::schema::{RDMA_MIGRATION_THROUGHPUT, RdmaCapabilityState, RdmaFabric},
};

/// Phase of a migration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Phase {
    /// Only requested: QEMU may refuse it because of another one. Not shown.
    #[default]
    Asked,
    /// Connecting to the destination; QEMU does not know of it.
    Connecting,
    /// QEMU's migration runs.
    Running,
    /// The destination's QEMU completed.
    Confirmed,
    /// Failed; QEMU's migration is being cancelled because of that.
    Failing,
    /// Failed; the reason in one sentence.
    Failed(String),
    /// Cancelled.
    Cancelled,
}

/// A side of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

impl Side {
    /// Return its name on a worker's command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// What clients are shown; nothing here steers the migration. It outlives the migration.
#[derive(Debug, Clone)]
pub struct View {
    /// Its side.
    pub side: Side,
    /// Its phase.
    pub phase: Phase,
    /// The worker's last figures.
    pub progress: Progress,
    /// RAM throughput of the last second in 10^6 bit/s.
    pub mbps: f64,
    /// The last `ram` object of QEMU's `query-migrate`.
    pub ram: Value,
    /// The last `status` in it.
    pub status: Option<String>,
    /// Capability `rdma-pin-all`.
    pub pin_all: bool,
    /// Parameter `max-bandwidth` in bytes per second.
    pub max_bandwidth: u64,
    /// Capability `events` is on.
    pub tells: bool,
    /// QEMU has a status for a migration that fails and is not cleaned up yet (11.1).
    pub has_failing: bool,
    /// A client has cancelled the migration.
    pub cancels: bool,
    /// Clients were told of the cancel.
    pub told_cancelling: bool,
    /// Where it waits for a source.
    pub listens: Option<Address>,
}

impl View {
    /// Create the view of a new migration.
    pub fn new(side: Side) -> Self {
        Self {
            side,
            phase: Phase::default(),
            progress: Progress::default(),
            mbps: 0.0,
            ram: Value::Null,
            status: None,
            pin_all: false,
            max_bandwidth: 0,
            tells: false,
            has_failing: false,
            cancels: false,
            told_cancelling: false,
            listens: None,
        }
    }

    /// Return whether clients see how it ended, and may begin another one.
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Confirmed | Phase::Failed(_) | Phase::Cancelled)
    }

    /// Return whether QEMU reports its migration's end with `status`, and clients don't see that
    /// yet.
    pub fn awaits_end(&self, status: &str) -> bool {
        let goes_on = matches!(self.phase, Phase::Running | Phase::Failing);
        self.side == Side::Source && goes_on && ["cancelled", "failed"].contains(&status)
    }

    /// Return whether clients should see the migration.
    pub fn shows(&self) -> bool {
        self.phase != Phase::Asked
    }

    /// Set the figures of a migration of `total` bytes of RAM, before QEMU reports any.
    pub fn begin(&mut self, total: u64) {
        let total = i64::try_from(total).unwrap_or(i64::MAX);
        self.ram = json!(MigrationStats {
            dirty_pages_rate: 0,
            dirty_sync_count: 0,
            dirty_sync_missed_zero_copy: 0,
            downtime_bytes: 0,
            duplicate: 0,
            mbps: 0.0,
            multifd_bytes: 0,
            normal: 0,
            normal_bytes: 0,
            page_size: 4096,
            pages_per_second: 0,
            postcopy_bytes: 0,
            postcopy_requests: 0,
            precopy_bytes: 0,
            remaining: total,
            total,
            transferred: 0,
        });
    }

    /// Return RAM throughput of the whole migration without its set-up, in 10^6 bit/s.
    fn overall_mbps(&self) -> f64 {
        let milliseconds = self.progress.elapsed_ms.saturating_sub(self.progress.setup_ms);
        rate(self.progress.ram_bytes, milliseconds)
    }

    fn shown_mbps(&self) -> f64 {
        if self.phase == Phase::Running { self.mbps } else { self.overall_mbps() }
    }

    fn transferred(&self) -> u64 {
        self.progress.ram_bytes + self.progress.stream_bytes
    }

    /// Return what QEMU still has to send, plus what is in flight.
    fn remaining(&self, ram: &Value) -> u64 {
        self.remaining_of(&ram["remaining"])
    }

    fn remaining_of(&self, qemus: &Value) -> u64 {
        if self.phase == Phase::Confirmed {
            return 0;
        }
        qemus.as_u64().unwrap_or(0).saturating_add(self.progress.in_flight)
    }

    /// Put our figures into the reply of `query-migrate`; the rest stays QEMU's. A reply that is
    /// not an object counts as an empty one.
    pub fn overlay(&self, reply: &mut Value) {
        if !reply.is_object() {
            *reply = json!({});
        }
        let status = reply["status"].as_str().unwrap_or("none").to_owned();
        match &self.phase {
            // QEMU knows better: the guest is here.
            Phase::Failed(_) if self.side == Side::Destination && status == "completed" => {}
            // No client has cancelled it: the relay has, because it failed. It is not over yet.
            Phase::Failing => {
                // Not even if QEMU considers it complete.
                let ends = ["cancelling", "cancelled", "completed", "failed"];
                if ends.contains(&status.as_str()) {
                    goes_on(reply, if self.has_failing { "failing" } else { "active" });
                }
            }
            // QEMU's status is that of another migration.
            Phase::Connecting if self.cancels => *reply = json!({ "status": "cancelling" }),
            Phase::Connecting => *reply = json!({ "status": "setup" }),
            Phase::Cancelled => reply["status"] = "cancelled".into(),
            Phase::Failed(reason) => {
                reply["status"] = "failed".into();
                reply["error-desc"] = reason.as_str().into();
            }
            // Not before the destination's QEMU has confirmed it.
            Phase::Running if self.side == Side::Source && status == "completed" => {
                reply["status"] = "device".into();
            }
            // Not before the relay has noted it: QEMU's status after that is the next migration's.
            Phase::Running if self.side == Side::Source && status == "cancelled" => {
                reply["status"] = "cancelling".into();
            }
            // The worker is cancelled first, then QEMU.
            Phase::Running if self.cancels && status != "completed" => {
                reply["status"] = "cancelling".into();
            }
            // Not before the worker has given the reason.
            Phase::Running if self.side == Side::Source && status == "failed" => {
                goes_on(reply, "active");
            }
            Phase::Asked | Phase::Running | Phase::Confirmed => {}
        }
        if self.side == Side::Destination {
            if let (Phase::Running, Some(address)) = (&self.phase, &self.listens) {
                reply["socket-address"] = json!([socket_address(address)]);
            }
            return;
        }
        // To cancel, QEMU closes its channels, and then reports that they broke.
        if reply["status"] == "cancelled"
            && let Some(reply) = reply.as_object_mut()
        {
            reply.remove("error-desc");
        }
        if !reply["ram"].is_object() {
            if !self.ram.is_object() {
                return;
            }
            reply["ram"] = self.ram.clone();
        }
        // Of the whole system, since 11.1: RAM in flight has not arrived yet.
        if let Some(whole) = reply.get_mut("remaining") {
            *whole = self.remaining_of(whole).into();
        }
        let remaining = self.remaining(&reply["ram"]);
        let ram = &mut reply["ram"];
        ram["transferred"] = self.transferred().into();
        ram["remaining"] = remaining.into();
        ram["mbps"] = self.shown_mbps().into();
        // Multifd is used only between QEMU and us.
        if let Some(bytes @ 1..) = ram["multifd-bytes"].as_u64() {
            ram["multifd-bytes"] = 0.into();
            let precopy = ram["precopy-bytes"].as_u64().unwrap_or(0);
            ram["precopy-bytes"] = precopy.saturating_add(bytes).into();
        }
    }

    /// Record QEMU's `query-migrate` as its last known state.
    pub fn note(&mut self, mut state: Value) {
        self.status = state["status"].as_str().map(str::to_owned);
        if state["ram"].is_object() {
            self.ram = state["ram"].take();
        }
    }

    /// Return the status that clients see, by what is known.
    fn shown_status(&self) -> String {
        let mut shown =
            self.status.as_ref().map_or(json!({}), |status| json!({ "status": status }));
        self.overlay(&mut shown);
        shown["status"].as_str().unwrap_or("none").to_owned()
    }

    /// Return the line of an RDMA_MIGRATION_THROUGHPUT event.
    pub fn throughput_event(&self) -> Vec<u8> {
        let figure = |name: &str| self.ram[name].as_u64().unwrap_or(0);
        let data = RDMA_MIGRATION_THROUGHPUT {
            mbps: self.shown_mbps(),
            transferred: self.transferred(),
            remaining: self.remaining(&self.ram),
            total: figure("total"),
            dirty_sync_count: figure("dirty-sync-count"),
            max_bandwidth: self.max_bandwidth,
            capabilities: vec![RdmaCapabilityState {
                capability: "rdma-pin-all".into(),
                state: self.pin_all,
            }],
            fabric: self.progress.fabric.parse().unwrap_or(RdmaFabric::tcp),
            connections: self.progress.connections,
            pinned: self.progress.pinned,
            pin_time: self.progress.pin_ms,
            status: self.shown_status(),
        };
        envelope::event("RDMA_MIGRATION_THROUGHPUT", &json!(data))
    }
}

/// Set the status of a migration that is not over, and remove the error.
fn goes_on(reply: &mut Value, status: &str) {
    reply["status"] = status.into();
    if let Some(reply) = reply.as_object_mut() {
        reply.remove("error-desc");
    }
}

/// Format an address as QEMU shows a listening socket.
fn socket_address(Address { host, port }: &Address) -> Value {
    let mut shown = json!({ "type": "inet", "host": host, "port": port.to_string() });
    match host.parse() {
        Ok(IpAddr::V4(_)) => shown["ipv4"] = true.into(),
        Ok(IpAddr::V6(_)) => shown["ipv6"] = true.into(),
        Err(_) => {}
    }
    shown
}

/// Return a rate in 10^6 bit/s.
pub fn rate(bytes: u64, milliseconds: u64) -> f64 {
    if milliseconds == 0 { 0.0 } else { bytes as f64 * 8.0 / 1000.0 / milliseconds as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(side: Side) -> View {
        let progress = Progress {
            ram_bytes: 1_000_000,
            stream_bytes: 24,
            in_flight: 4096,
            setup_ms: 10,
            elapsed_ms: 110,
            pinned: 2 << 20,
            pin_ms: 3,
            fabric: "tcp".into(),
            connections: 1,
            ..Progress::default()
        };
        View { phase: Phase::Running, progress, mbps: 12.5, ..View::new(side) }
    }

    fn reply() -> Value {
        json!({"status": "active", "new": 1, "ram": {"total": 9, "remaining": 5, "mbps": 1.0, "transferred": 7, "normal": 3}})
    }

    #[test]
    fn figures_are_ours_and_the_rest_is_qemus() {
        let mut shown = reply();
        shown["remaining"] = 6.into();
        view(Side::Source).overlay(&mut shown);
        let expected = json!({"status": "active", "new": 1, "remaining": 4102, "ram": {"total": 9, "remaining": 4101, "mbps": 12.5, "transferred": 1_000_024, "normal": 3}});
        assert_eq!(shown, expected);
    }

    /// QEMU 11.1 also counts what devices have left.
    #[test]
    fn what_the_whole_system_has_left_is_no_less_than_ram() {
        let mut view = view(Side::Source);
        let left = |view: &View| {
            let mut shown = reply();
            shown["remaining"] = 105.into();
            view.overlay(&mut shown);
            (shown["remaining"].clone(), shown["ram"]["remaining"].clone())
        };
        assert_eq!(left(&view), (json!(4201), json!(4101)));
        view.phase = Phase::Confirmed;
        assert_eq!(left(&view), (json!(0), json!(0)));
    }

    #[test]
    fn completion_is_shown_when_it_is_confirmed() {
        let mut view = view(Side::Source);
        let shown = |view: &View| {
            let mut shown = reply();
            shown["status"] = "completed".into();
            view.overlay(&mut shown);
            (shown["status"].clone(), shown["ram"]["mbps"].clone())
        };
        assert_eq!(shown(&view), (json!("device"), json!(12.5)));
        view.phase = Phase::Confirmed;
        assert_eq!(shown(&view), (json!("completed"), json!(80.0)));
    }

    /// A manager that saw `completed` would end the source's guest, which is to run again.
    #[test]
    fn a_failing_migration_is_shown_as_neither_over_nor_cancelled() {
        let mut view = View { phase: Phase::Failing, ..view(Side::Source) };
        for (has_failing, expected) in [(false, "active"), (true, "failing")] {
            view.has_failing = has_failing;
            for status in ["cancelling", "cancelled", "completed", "failed"] {
                let mut shown = json!({ "status": status, "error-desc": "it broke" });
                view.overlay(&mut shown);
                assert_eq!(shown, json!({ "status": expected }), "{status}");
            }
        }
    }

    #[test]
    fn a_cancellation_is_no_error() {
        let mut view = view(Side::Source);
        let mut shown = json!({"status": "cancelled", "error-desc": "Broken pipe"});
        view.overlay(&mut shown);
        assert_eq!(shown["status"], "cancelling", "the relay does not know yet");
        view.phase = Phase::Cancelled;
        view.overlay(&mut shown);
        assert_eq!(shown["status"], "cancelled");
        assert!(shown.get("error-desc").is_none());
    }

    #[test]
    fn failure_keeps_the_figures() {
        let mut view = view(Side::Source);
        view.phase = Phase::Failed("It broke".into());
        view.ram = json!({"total": 9, "remaining": 5});
        let mut shown = json!({});
        view.overlay(&mut shown);
        assert_eq!(shown["status"], "failed");
        assert_eq!(shown["error-desc"], "It broke");
        assert_eq!(shown["ram"]["transferred"], 1_000_024);
    }

    #[test]
    fn the_event_is_the_schemas() {
        let line = String::from_utf8(view(Side::Source).throughput_event()).unwrap();
        let event: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(event["event"], "RDMA_MIGRATION_THROUGHPUT");
        assert_eq!(event["data"]["fabric"], "tcp");
        assert_eq!(event["data"]["mbps"], 12.5);
        assert_eq!(event["data"]["pinned"], 2 << 20);
        assert_eq!(event["data"]["pin-time"], 3);
        assert_eq!(event["data"]["status"], "none");
        assert_eq!(
            event["data"]["capabilities"],
            json!([{"capability": "rdma-pin-all", "state": false}])
        );
    }

    #[test]
    fn the_event_says_what_is_shown_elsewhere() {
        let mut view = view(Side::Source);
        let status = |view: &View| {
            let line = view.throughput_event();
            let event: Value = serde_json::from_slice(&line).unwrap();
            event["data"]["status"].as_str().unwrap().to_owned()
        };
        view.phase = Phase::Connecting;
        assert_eq!(status(&view), "setup");
        view.phase = Phase::Running;
        view.note(json!({ "status": "active", "ram": { "total": 5 } }));
        assert_eq!((status(&view), &view.ram["total"]), ("active".into(), &json!(5)));
        view.note(json!({ "status": "completed" }));
        assert_eq!((status(&view), &view.ram["total"]), ("device".into(), &json!(5)));
        view.phase = Phase::Confirmed;
        assert_eq!(status(&view), "completed");
        view.phase = Phase::Failed("It broke".into());
        assert_eq!(status(&view), "failed");
    }
}
