//! Bytes on their way that are nobody's memory: a registered ring, because writes complete in
//! their order.

use std::sync::Arc;

use super::{
    buffers::Buffers,
    memory_region::{Access, MemoryRegion},
    protection_domain::ProtectionDomain,
    queue_pair::Local,
};
use crate::fabric::{MESSAGE_MAX, Result};

/// Most bytes of one write (Limits::write of the stream's rewriter).
pub(super) const WRITE_MAX: usize = 1 << 20;

/// Buffers that the ring is made of: 8 MiB, the window of writes in flight.
const BUFFERS: usize = 16;

/// Bytes of the ring. What is not signalled yet is below 1 MiB, and what is passed over at its end
/// below [`WRITE_MAX`]: so waiting for completions always makes room.
pub(super) const SIZE: usize = BUFFERS * MESSAGE_MAX;

/// The ring.
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

    /// There is room for [`WRITE_MAX`] bytes.
    pub(super) fn has_room(&self) -> bool {
        self.space.has_room(WRITE_MAX)
    }

    /// Copy `bytes`, for which there is room; also returns what is to be given back when they have
    /// been written.
    pub(super) fn take(&mut self, bytes: &[u8]) -> (Local, usize) {
        let (at, taken) = self.space.take(bytes.len());
        let address = self.buffers.put(at, bytes);
        let lkey = self.registration.lkey();
        (Local { address, length: bytes.len() as u32, lkey }, taken)
    }

    /// The oldest of what was taken is free.
    pub(super) fn give_back(&mut self, taken: usize) {
        self.space.used -= taken;
    }
}

/// What of the ring is used.
#[derive(Debug, Default)]
struct Space {
    next: usize,
    used: usize,
}

impl Space {
    /// Bytes to pass over so that `length` bytes lie in a row.
    fn passed_over(&self, length: usize) -> usize {
        if SIZE - self.next < length { SIZE - self.next } else { 0 }
    }

    fn has_room(&self, length: usize) -> bool {
        self.used + self.passed_over(length) + length <= SIZE
    }

    /// Where `length` bytes begin, and how many are used by that.
    fn take(&mut self, length: usize) -> (usize, usize) {
        assert!(self.has_room(length));
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
        /// What is on its way is never overwritten, and room is made by giving back.
        #[test]
        fn nothing_overlaps(lengths in prop::collection::vec(1..=WRITE_MAX, 1..200)) {
            let mut space = Space::default();
            let mut flight: VecDeque<(usize, usize, usize)> = VecDeque::new();
            for length in lengths {
                while !space.has_room(WRITE_MAX) {
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
