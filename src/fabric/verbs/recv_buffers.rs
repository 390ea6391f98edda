//! Buffers for messages from the peer.

use std::sync::Arc;

use super::{
    buffers::Buffers,
    memory_region::{Access, MemoryRegion},
    queue_pair::{Local, QueuePair},
};
use crate::fabric::{MESSAGE_MAX, Result};

/// Receive buffers of a queue pair, registered as long as it exists: a message that hits an
/// unregistered buffer fails at the peer, which then never reads what it was sent.
pub(super) struct Received {
    buffers: Arc<Buffers>,
    registration: MemoryRegion,
}

impl Received {
    /// Post `count` buffers to a queue pair.
    pub(super) fn offer_all(pair: &QueuePair, count: usize) -> Result<Self> {
        let buffers = Arc::new(Buffers::new(count));
        let registration = MemoryRegion::of_buffers(&pair.domain, &buffers, Access::Receive)?;
        let received = Self { buffers, registration };
        (0..count).try_for_each(|index| received.offer(pair, index))?;
        Ok(received)
    }

    fn offer(&self, pair: &QueuePair, index: usize) -> Result<()> {
        let local = Local {
            address: self.buffers.address(index),
            length: MESSAGE_MAX as u32,
            lkey: self.registration.lkey(),
        };
        pair.receive(index as u64, Some(local))
    }

    /// Copy a message out of its buffer and post the buffer again. Messages are small: they do not
    /// contain RAM.
    pub(super) fn take(
        &self,
        pair: &QueuePair,
        index: usize,
        length: usize,
        message: &mut Vec<u8>,
    ) -> Result<()> {
        self.buffers.take(index, length, message);
        self.offer(pair, index)
    }
}
