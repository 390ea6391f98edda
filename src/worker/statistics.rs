//! Counters that data threads update and reports read.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use super::link::Link;
use crate::{control::Progress, fabric::Pinned};

/// Figures of one migration. Readers may see counters from slightly different moments.
pub struct Statistics {
    started: Instant,
    fabric: &'static str,
    /// The connection, once there is one.
    link: Mutex<Option<Arc<Link>>>,
    /// Bytes announced as zero.
    pub zero_bytes: AtomicU64,
    /// Bytes of the stream that were forwarded.
    pub stream_bytes: AtomicU64,
    /// RAM bytes posted to the destination, or landed here.
    pub ram_posted: AtomicU64,
    /// RAM bytes known to have landed.
    pub ram_landed: AtomicU64,
    /// Milliseconds until the block lists agreed.
    pub setup_ms: AtomicU64,
}

impl Statistics {
    /// Create counters that are zero; time starts now.
    pub fn new(fabric: &'static str) -> Arc<Self> {
        Arc::new(Self {
            started: Instant::now(),
            fabric,
            link: Mutex::default(),
            zero_bytes: AtomicU64::new(0),
            stream_bytes: AtomicU64::new(0),
            ram_posted: AtomicU64::new(0),
            ram_landed: AtomicU64::new(0),
            setup_ms: AtomicU64::new(0),
        })
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Report the figures of this connection from now on.
    pub fn follow(&self, link: &Arc<Link>) {
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = Some(link.clone());
    }

    fn link(&self) -> Option<Arc<Link>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Note the end of the set-up: the block lists agree.
    pub fn set_up(&self) {
        self.setup_ms.store(self.elapsed_ms(), Ordering::Relaxed);
    }

    /// Return the current figures.
    pub fn progress(&self) -> Progress {
        let landed = self.ram_landed.load(Ordering::Relaxed);
        let link = self.link();
        let pinned = link.as_ref().map_or_else(Pinned::default, |link| link.pinned());
        Progress {
            ram_bytes: landed,
            zero_bytes: self.zero_bytes.load(Ordering::Relaxed),
            stream_bytes: self.stream_bytes.load(Ordering::Relaxed),
            in_flight: self.ram_posted.load(Ordering::Relaxed).saturating_sub(landed),
            setup_ms: self.setup_ms.load(Ordering::Relaxed),
            elapsed_ms: self.elapsed_ms(),
            pinned: pinned.bytes,
            pin_ms: u64::try_from(pinned.time.as_millis()).unwrap_or(u64::MAX),
            fabric: self.fabric.to_owned(),
            connections: link.map_or(1, |link| link.connections()),
        }
    }
}
