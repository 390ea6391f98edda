//! Which limit the worker keeps RAM within, where QEMU's own is not enough.

use crate::{control::Order, relay::migration::worker::Worker};

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

    /// The guest runs, or was stopped by its client. Returns whether the limit was lifted.
    pub(super) fn resume(&mut self) -> bool {
        let lifted = matches!(self, Self::Lifted);
        if lifted {
            *self = Self::At(None);
        }
        lifted
    }
}
