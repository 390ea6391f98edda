//! Staging buffer for bytes to send that are not in guest memory: a registered ring, because writes
//! complete in order.

use std::sync::Arc;

use super::{
    buffers::Buffers,
    memory_region::{Access, MemoryRegion},
    protection_domain::ProtectionDomain,
    queue_pair::Local,
};
use crate::fabric::{MESSAGE_MAX, Result};

/// Most bytes per write (`Limits::write` of the stream's rewriter).
pub(super) const WRITE_MAX: usize = 1 << 20;

/// Buffers in the ring: 8 MiB, the window of writes in flight.
const BUFFERS: usize = 16;

/// Size of the ring in bytes. Less than 1 MiB is unsignalled, and less than [`WRITE_MAX`] is
/// skipped at its end: so waiting for completions always frees enough.
pub(super) const SIZE: usize = BUFFERS * MESSAGE_MAX;

pub(super) struct Ring {
    buffers: Arc<Buffers>,
    registration: MemoryRegion,
    space: Space,
}

impl Ring {
    pub(super) fn new(domain: &Arc<ProtectionDomain>) -> Result<Self> {
        let buffers = Arc::new(Buffers::new(BUFFERS));
        let registration = MemoryRegion::of_buffers(domain, &buffers, Access::Read)?;
        Ok(Self { buffers, registration, space: Space::default() })
    }

    /// Whether [`WRITE_MAX`] bytes are free.
    pub(super) fn has_space(&self) -> bool {
        self.space.has_space(WRITE_MAX)
    }

    /// Copy `bytes`, which must fit. Return also the number of bytes to give back once they are
    /// written.
    pub(super) fn take(&mut self, bytes: &[u8]) -> (Local, usize) {
        let (at, taken) = self.space.take(bytes.len());
        let address = self.buffers.put(at, bytes);
        let lkey = self.registration.lkey();
        (Local { address, length: bytes.len() as u32, lkey }, taken)
    }

    /// Free the oldest `taken` bytes.
    pub(super) fn give_back(&mut self, taken: usize) {
        self.space.used -= taken;
    }
}

/// The used part of the ring.
#[derive(Debug, Default)]
struct Space {
    next: usize,
    used: usize,
}

impl Space {
    /// Bytes to skip so that `length` bytes are contiguous.
    fn passed_over(&self, length: usize) -> usize {
        if SIZE - self.next < length { SIZE - self.next } else { 0 }
    }

    fn has_space(&self, length: usize) -> bool {
        self.used + self.passed_over(length) + length <= SIZE
    }

    /// Reserve `length` bytes. Return their offset, and the number of bytes used including skipped
    /// ones.
    fn take(&mut self, length: usize) -> (usize, usize) {
        assert!(self.has_space(length));
        let passed_over = self.passed_over(length);
        let at = (self.next + passed_over) % SIZE;
        self.next = at + length;
        self.used += passed_over + length;
        (at, passed_over + length)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Bytes in flight are never overwritten, and giving back frees enough.
        #[test]
        fn nothing_overlaps(lengths in prop::collection::vec(1..=WRITE_MAX, 1..200)) {
            let mut space = Space::default();
            let mut flight: VecDeque<(usize, usize, usize)> = VecDeque::new();
            for length in lengths {
                while !space.has_space(WRITE_MAX) {
                    let (_, _, taken) = flight.pop_front().unwrap();
                    space.used -= taken;
                }
                let (at, taken) = space.take(length);
                prop_assert!(at + length <= SIZE);
                for (other, other_length, _) in &flight {
                    prop_assert!(at + length <= *other || other + other_length <= at);
                }
                flight.push_back((at, length, taken));
            }
        }
    }
}
