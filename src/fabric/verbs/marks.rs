//! Marks: what proves to a receiver that writes have landed.
//!
//! A completion tells the side that writes nothing about memory at the other one: over InfiniBand
//! that the device there has the bytes, over iWARP not even that. A message that arrives does: all
//! writes before it on the same queue pair have landed (ibv_reg_mr(3) of rdma-core 56, at
//! IBV_ACCESS_RELAXED_ORDERING; RFC 5040, 5.5). So whoever sends a message behind writes sends one of no bytes, a mark, on each queue pair
//! for RAM before it, and who receives the message waits for as many marks on each as there were
//! such messages. A queue pair that carries messages itself needs none.

use super::{
    completion_queue::Completion,
    device::Transport,
    queue_pair::{Local, QueuePair},
};
use crate::fabric::Result;

/// In the identifiers of buffers for marks; behind it is which queue pair they are of.
const MARK: u64 = 1 << 32;

/// Offer queue pair `index` buffers for `count` marks. As many may be on their way as messages that
/// need a credit.
pub(super) fn offer_all(pair: &QueuePair, index: usize, count: u32) -> Result<()> {
    (0..count).try_for_each(|_| offer(pair, index))
}

/// Offer one more.
pub(super) fn offer(pair: &QueuePair, index: usize) -> Result<()> {
    // rdma-core's provider of siw takes no buffer without an element (`push_recv_wqe`).
    let nothing = Local { address: 0, length: 0, lkey: 0 };
    let is_iwarp = pair.transport()? == Transport::Iwarp;
    pair.receive(MARK | index as u64, is_iwarp.then_some(nothing))
}

/// The queue pair that a received mark belongs to; `None` if this is a message.
pub(super) fn queue_pair(completion: &Completion) -> Option<usize> {
    (completion.id & MARK != 0).then_some((completion.id & !MARK) as usize)
}

/// Marks that have arrived, and those that must have.
#[derive(Debug)]
pub(super) struct Marks {
    /// By queue pair.
    arrived: Vec<u64>,
    /// Messages that were sent behind writes.
    due: u64,
}

impl Marks {
    /// None on any of `pairs` queue pairs, of which the first has none.
    pub(super) fn new(pairs: usize) -> Self {
        let mut arrived = vec![0; pairs];
        arrived[0] = u64::MAX;
        Self { arrived, due: 0 }
    }

    /// One has arrived.
    pub(super) fn arrive(&mut self, index: usize) {
        self.arrived[index] += 1;
    }

    /// A message has that was sent behind writes.
    pub(super) fn expect(&mut self) {
        self.due += 1;
    }

    /// All writes before the last such message have landed.
    pub(super) fn are_complete(&self) -> bool {
        self.arrived.iter().all(|arrived| *arrived >= self.due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_waits_for_its_mark_on_each_queue_pair() {
        let mut marks = Marks::new(3);
        assert!(marks.are_complete());
        marks.expect();
        marks.arrive(1);
        assert!(!marks.are_complete());
        // Of the next message: no proof of what queue pair 2 has.
        marks.arrive(1);
        assert!(!marks.are_complete());
        marks.arrive(2);
        assert!(marks.are_complete());
        marks.expect();
        assert!(!marks.are_complete());
        marks.arrive(2);
        assert!(marks.are_complete());
    }

    #[test]
    fn the_queue_pair_of_messages_needs_none() {
        let mut marks = Marks::new(1);
        marks.expect();
        assert!(marks.are_complete());
    }
}
