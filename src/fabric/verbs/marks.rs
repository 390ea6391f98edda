//! Marks, which prove to a receiver that writes have landed.
//!
//! A completion tells the writer nothing about the peer's memory: over InfiniBand it means that the
//! peer's device has the bytes, over iWARP not even that. A received message is a proof: all writes
//! before it on the same queue pair have landed (ibv_reg_mr(3) of rdma-core 56, at
//! IBV_ACCESS_RELAXED_ORDERING; RFC 5040, 5.5). So a sender that needs a proof sends an empty
//! message, a mark, on each queue pair for RAM before its message. The receiver of the message
//! waits until each of them has received as many marks as there were such messages. A queue pair
//! that carries messages itself needs no marks.

use super::{
    completion_queue::Completion,
    device::Transport,
    queue_pair::{Local, QueuePair},
};
use crate::fabric::Result;

/// Flag in the work request ids of buffers for marks; the lower bits are the index of the queue
/// pair.
const MARK: u64 = 1 << 32;

/// Post buffers for `count` marks to queue pair `index`. At most as many marks may be in flight as
/// messages that need a credit.
pub(super) fn offer_all(pair: &QueuePair, index: usize, count: u32) -> Result<()> {
    (0..count).try_for_each(|_| offer(pair, index))
}

/// Post a buffer for one more mark.
pub(super) fn offer(pair: &QueuePair, index: usize) -> Result<()> {
    // rdma-core's siw provider rejects a buffer without an element (`push_recv_wqe`).
    let nothing = Local { address: 0, length: 0, lkey: 0 };
    let is_iwarp = pair.transport()? == Transport::Iwarp;
    pair.receive(MARK | index as u64, is_iwarp.then_some(nothing))
}

/// The queue pair of a received mark; `None` for a message.
pub(super) fn queue_pair(completion: &Completion) -> Option<usize> {
    (completion.id & MARK != 0).then_some((completion.id & !MARK) as usize)
}

/// Counters of received and expected marks.
#[derive(Debug)]
pub(super) struct Marks {
    /// Marks received, by queue pair.
    arrived: Vec<u64>,
    /// Messages received that marks precede.
    due: u64,
}

impl Marks {
    /// Start with no marks on `pairs` queue pairs; the first never gets any.
    pub(super) fn new(pairs: usize) -> Self {
        let mut arrived = vec![0; pairs];
        arrived[0] = u64::MAX;
        Self { arrived, due: 0 }
    }

    /// Count a mark on queue pair `index`.
    pub(super) fn arrive(&mut self, index: usize) {
        self.arrived[index] += 1;
    }

    /// Count a message that marks precede.
    pub(super) fn expect(&mut self) {
        self.due += 1;
    }

    /// Whether all writes before the last counted message have landed.
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
        // The next message's mark: it proves nothing about queue pair 2.
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
