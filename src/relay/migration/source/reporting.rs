//! What clients see of an outgoing migration.

use tracing::info;

use super::Source;
use crate::{
    control::Progress,
    proto::relay::source::End,
    qmp::envelope,
    relay::migration::{
        ask,
        events::Output,
        status::{Phase, rate},
    },
};

impl Source {
    /// Show the figures of another second.
    pub(super) fn show_figures(&self, last: &mut Progress, max_bandwidth: u64) {
        self.view.send_modify(|view| {
            let bytes = view.progress.ram_bytes.saturating_sub(last.ram_bytes);
            let milliseconds = view.progress.elapsed_ms.saturating_sub(last.elapsed_ms);
            view.mbps = rate(bytes, milliseconds);
            *last = view.progress.clone();
            view.max_bandwidth = max_bandwidth;
        });
    }

    /// Show how the migration ended. If QEMU's own ended otherwise, clients get no event of that.
    pub(super) async fn show(&self, end: End) {
        if end == End::Completed {
            info!("migration completed");
            if let Some((state, max_bandwidth)) = ask::in_time(ask::figures(self.qemu())).await {
                self.view.send_modify(|view| {
                    view.note(state);
                    view.max_bandwidth = max_bandwidth;
                });
            }
        }
        let (phase, shown) = match end {
            End::Completed => (Phase::Confirmed, "completed"),
            End::Cancelled => (Phase::Cancelled, "cancelled"),
            End::Failed(reason) => (Phase::Failed(reason), "failed"),
        };
        let (said, has_failing) = {
            let view = self.view.borrow();
            (view.status.clone().unwrap_or_default(), view.has_failing)
        };
        self.view.send_modify(|view| view.phase = phase);
        self.emit_throughput().await;
        if said == shown || !["completed", "failed"].contains(&said.as_str()) {
            return self.put(Output::Release).await;
        }
        if shown == "failed" && has_failing {
            self.tell_status("failing").await;
        }
        self.put(Output::Instead(envelope::status(shown))).await;
    }
}
