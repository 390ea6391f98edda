//! Which limit the worker keeps RAM within, where QEMU's own is not enough.

use serde_json::Value;
use tokio::time::timeout;

use super::{ANSWER, Source};
use crate::{control::Order, qmp::Execute as _, relay::migration::worker::Worker};

/// The slowest pace in bytes per second. Who waits for room in a channel holds QEMU's RCU lock, and a command
/// that drains RCU, such as a refused `device_add`, its main loop until then: here the time of some packets.
/// By itself QEMU sends more with channels, a packet of half a MiB in each tenth of a second.
const SLOWEST: u64 = 1 << 20;

/// Whether the worker keeps RAM within `max-bandwidth`.
pub(super) enum Pacing {
    /// At this rate in bytes per second; `None`: any.
    At(Option<u64>),
    /// Not while the guest stands still.
    Lifted,
    /// QEMU does so by itself.
    Never,
}

impl Pacing {
    pub(super) async fn lift(&mut self, worker: &mut Worker) {
        if matches!(self, Self::At(_)) {
            *self = Self::Lifted;
            worker.order(&Order::SetRateLimit { rate: None }).await;
        }
    }

    /// `max-bandwidth` is so many bytes per second.
    pub(super) async fn follow(&mut self, worker: &mut Worker, max_bandwidth: u64) {
        let Self::At(now) = self else { return };
        // QEMU divides it by ten, and takes nothing for no limit.
        let rate = Some(max_bandwidth).filter(|rate| *rate >= 10);
        let rate = rate.map(|rate| rate.max(SLOWEST));
        if std::mem::replace(now, rate) != rate {
            worker.order(&Order::SetRateLimit { rate }).await;
        }
    }

    pub(super) fn resume(&mut self) {
        if matches!(self, Self::Lifted) {
            *self = Self::At(None);
        }
    }
}

impl Source {
    /// Keep the worker to `max-bandwidth`, which may have changed.
    pub(super) async fn pace(&self, worker: &mut Worker, pacing: &mut Pacing) {
        if !matches!(pacing, Pacing::At(_)) {
            return;
        }
        let mut qemu = self.qemu();
        let parameters = timeout(ANSWER, qemu.execute("query-migrate-parameters", Value::Null));
        if let Ok(Ok(parameters)) = parameters.await {
            let max_bandwidth = parameters["max-bandwidth"].as_u64().unwrap_or(0);
            pacing.follow(worker, max_bandwidth).await;
        }
    }
}
