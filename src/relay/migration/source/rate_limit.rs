//! The limit within which the worker keeps RAM, where QEMU's own is not enough.

use crate::{control::Order, relay::migration::worker::Worker};

/// Lowest rate in bytes per second.
///
/// A thread of QEMU's that waits for space in a channel holds the RCU lock; the main loop waits for
/// that in a command that drains RCU, such as a refused `device_add`: at this rate, as long as some
/// packets take. QEMU itself sends more with channels, a packet of half a MiB each tenth of a
/// second.
const SLOWEST: u64 = 1 << 20;

/// Whether the worker keeps RAM within `max-bandwidth`.
pub(super) enum RateLimit {
    /// At this rate in bytes per second; `None` for unlimited.
    At(Option<u64>),
    /// Not now.
    Lifted(Why),
    /// QEMU does so itself.
    Never,
}

/// Why a limit is lifted.
#[derive(PartialEq)]
pub(super) enum Why {
    /// The guest is stopped, or the migration will not complete.
    Stopped,
    /// QEMU does not answer. QEMU does not report that it switches over with a guest that its client
    /// has stopped, and it holds its lock until everything is sent.
    Silent,
}

impl RateLimit {
    pub(super) async fn lift(&mut self, worker: &mut Worker, why: Why) {
        match self {
            Self::At(_) => {
                *self = Self::Lifted(why);
                worker.order(&Order::SetRateLimit { rate: None }).await;
            }
            Self::Lifted(_) if why == Why::Stopped => *self = Self::Lifted(why),
            Self::Lifted(_) | Self::Never => {}
        }
    }

    /// QEMU answers.
    pub(super) fn answered(&mut self) {
        if matches!(self, Self::Lifted(Why::Silent)) {
            *self = Self::At(None);
        }
    }

    /// Apply `max-bandwidth`, in bytes per second.
    pub(super) async fn follow(&mut self, worker: &mut Worker, max_bandwidth: u64) {
        let Self::At(now) = self else { return };
        // QEMU divides it by ten, and takes zero for unlimited.
        let rate = Some(max_bandwidth).filter(|rate| *rate >= 10);
        let rate = rate.map(|rate| rate.max(SLOWEST));
        if std::mem::replace(now, rate) != rate {
            worker.order(&Order::SetRateLimit { rate }).await;
        }
    }

    /// Limit again: the guest runs, or its client has stopped it. Returns whether the limit was
    /// lifted.
    pub(super) fn resume(&mut self) -> bool {
        let lifted = matches!(self, Self::Lifted(_));
        if lifted {
            *self = Self::At(None);
        }
        lifted
    }
}
