//! An established connection and its receiving half.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{Arc, atomic::Ordering},
};

use rdma_sys::{ibv_wc_status as status, rdma_cm_event_type as kind};
use rustix::{
    event::{PollFd, PollFlags},
    fd::AsFd as _,
};

use super::{
    cm::Id,
    cm::wait_for,
    completion_queue::{Completion, CompletionQueue},
    marks::{self, Marks},
    memory_region::{Access, MemoryRegion},
    protection_domain::ProtectionDomain,
    queue_pair::{Depth, QueuePair, Queues},
    recv_buffers::Received,
    sending::{SEND_DEPTH, Shared, VerbsSendHalf, identity},
    timeouts::Timeouts,
};
use crate::{
    fabric::{Connection, FabricError, Guard, Handle, RecvHalf, RemoteKey, Result, SendHalf},
    memory::Region,
};

/// Messages that may arrive without a credit: READY, replies, errors.
const UNCREDITED: u16 = 8;

/// Queue sizes of a connection's first queue pair; `window` as in [`super::Verbs`].
pub(super) fn depth(window: u16) -> Depth {
    Depth { send: SEND_DEPTH, receive: u32::from(window + UNCREDITED) }
}

/// Queue sizes of a queue pair for RAM, which receives at most one mark per message that needs a
/// credit.
fn lane_depth(window: u16) -> Depth {
    Depth { send: SEND_DEPTH, receive: window.into() }
}

/// Completions that all queue pairs may produce, for sends and receives; `window` and `lanes` as in
/// [`super::Verbs`].
pub(super) fn completions(window: u16, lanes: u16) -> Depth {
    let (first, lane, lanes) = (depth(window), lane_depth(window), u32::from(lanes));
    Depth { send: first.send + lanes * lane.send, receive: first.receive + lanes * lane.receive }
}

/// A connection before it is split into halves.
pub(super) struct VerbsConnection {
    shared: Arc<Shared>,
}

/// The address of a region's first byte.
fn address(region: &Region) -> Result<u64> {
    let mapped = region.mapped(0, region.length());
    let memory = |source| FabricError::Memory { block: region.name().to_owned(), source };
    Ok(mapped.map_err(memory)?.0.as_ptr() as u64)
}

/// A connection that is being established: its first queue pair, and those for RAM.
pub(super) struct Opening {
    pairs: Vec<QueuePair>,
    queues: Queues,
    /// Domain of the queue pairs for RAM. Its keys are invalid on the first queue pair.
    ram_domain: Arc<ProtectionDomain>,
    received: Received,
    window: u16,
}

impl Opening {
    /// Create the queue pair of `id` and post its buffers; it need not be connected yet. Up to
    /// `lanes` more may follow.
    pub(super) fn new(id: Id, window: u16, lanes: u16) -> Result<Self> {
        let (depth, completions) = (depth(window), completions(window, lanes));
        let queues = Queues {
            sent: Arc::new(CompletionQueue::new(&id, completions.send)?),
            received: Arc::new(CompletionQueue::new(&id, completions.receive)?),
        };
        let (domain, ram_domain) = (ProtectionDomain::new(&id)?, ProtectionDomain::new(&id)?);
        let pair = QueuePair::new(id, domain, queues.clone(), depth)?;
        let received = Received::offer_all(&pair, depth.receive as usize)?;
        Ok(Self { pairs: vec![pair], queues, ram_domain, received, window })
    }

    /// The identifier of the first queue pair, to connect it.
    pub(super) fn id(&self) -> &Id {
        &self.pairs[0].id
    }

    /// Add a queue pair for RAM. Return its identifier, to connect it.
    pub(super) fn add_lane(&mut self, id: Id) -> Result<&Id> {
        let depth = lane_depth(self.window);
        let pair = QueuePair::new(id, self.ram_domain.clone(), self.queues.clone(), depth)?;
        marks::offer_all(&pair, self.pairs.len(), depth.receive)?;
        self.pairs.push(pair);
        Ok(&self.pairs[self.pairs.len() - 1].id)
    }

    /// Complete the connection, once all queue pairs are connected.
    pub(super) fn finish(self, timeouts: Timeouts) -> Result<VerbsConnection> {
        let shared = Arc::new(Shared::new(self.pairs, self.received, timeouts)?);
        Ok(VerbsConnection { shared })
    }
}

impl Connection for VerbsConnection {
    fn split(self: Box<Self>) -> (Arc<dyn SendHalf>, Box<dyn RecvHalf>) {
        let send_half = VerbsSendHalf { shared: self.shared.clone() };
        let receiver = VerbsRecvHalf {
            marks: Marks::new(self.shared.pairs.len()),
            lost: None,
            waiting: VecDeque::new(),
            shared: self.shared,
            registered: HashMap::new(),
            disconnected: false,
        };
        (Arc::new(send_half), Box::new(receiver))
    }

    fn handle(&self) -> Handle {
        let shared = self.shared.clone();
        Handle::new(move || shared.close())
    }
}

struct VerbsRecvHalf {
    shared: Arc<Shared>,
    /// Memory that the peer may write, by region and range.
    registered: HashMap<(usize, u64, u64), MemoryRegion>,
    marks: Marks,
    /// Failed completion of a buffer for marks: no mark will arrive in it.
    lost: Option<Completion>,
    /// Messages received while waiting for marks; at most as many as there are buffers.
    waiting: VecDeque<Completion>,
    disconnected: bool,
}

impl RecvHalf for VerbsRecvHalf {
    fn receive(&mut self, message: &mut Vec<u8>) -> Result<()> {
        self.next_message(message).map_err(|error| self.failed(error))
    }

    fn await_writes(&mut self) -> Result<()> {
        self.marks.expect();
        self.await_marks().map_err(|error| self.failed(error))
    }

    fn landed(&self) -> u64 {
        0
    }

    fn guard(&mut self, _may_land: Guard) {
        // The device writes, and only into registered memory.
    }

    fn announce(&mut self, region: &Arc<Region>) -> Result<RemoteKey> {
        Ok(RemoteKey { address: address(region)?, rkey: 0 })
    }

    fn register(&mut self, region: &Arc<Region>, range: Range<u64>) -> Result<RemoteKey> {
        let block = address(region)?;
        let key = (identity(region), range.start, range.end);
        if let Some(known) = self.registered.get(&key) {
            return Ok(known.remote_key(block));
        }
        let (domain, access) = (self.shared.ram_domain(), Access::RemoteWrite);
        let part = MemoryRegion::of_region(domain, region, &range, access)?;
        let remote = part.remote_key(block);
        self.registered.insert(key, part);
        Ok(remote)
    }

    fn unregister(&mut self, region: &Arc<Region>, range: Range<u64>) {
        self.registered.remove(&(identity(region), range.start, range.end));
    }

    fn revoke(&mut self) {
        // Deregistration always works, but takes longer the more memory there is to unpin, and it
        // delays the guest.
        if !self.shared.refuse_writes() {
            self.registered.clear();
        }
    }
}

impl VerbsRecvHalf {
    /// Close the connection because of `error`. Return the original cause.
    fn failed(&self, error: FabricError) -> FabricError {
        // The failure may have been a request's, and `error` its consequence.
        let error = if matches!(error, FabricError::Closed) { self.shared.cause() } else { error };
        self.shared.close();
        error
    }

    fn next_message(&mut self, message: &mut Vec<u8>) -> Result<()> {
        let completion = loop {
            match self.waiting.pop_front() {
                Some(completion) => break completion,
                None => self.take_received()?,
            }
        };
        let (index, length) = (completion.id as usize, completion.length as usize);
        self.shared.received.take(&self.shared.pairs[0], index, length, message)
    }

    fn await_marks(&mut self) -> Result<()> {
        while !self.marks.are_complete() {
            if let Some(lost) = self.lost {
                return self.shared.checked(lost).map(drop);
            }
            self.take_received()?;
        }
        Ok(())
    }

    /// Wait for the next message or mark, and record it.
    fn take_received(&mut self) -> Result<()> {
        let completion = self.next_received()?;
        match marks::queue_pair(&completion) {
            None => self.waiting.push_back(self.shared.checked(completion)?),
            Some(lane) if completion.status == status::IBV_WC_SUCCESS => {
                self.marks.arrive(lane);
                marks::offer(&self.shared.pairs[lane], lane)?;
            }
            // Access to RAM has ended, or the queue pair is broken. A wait for a mark must fail.
            Some(_) => self.lost = Some(completion),
        }
        Ok(())
    }

    fn next_received(&mut self) -> Result<Completion> {
        let shared = self.shared.clone();
        let queue: &CompletionQueue = shared.pairs[0].received();
        loop {
            if let Some(completion) = queue.poll()? {
                return Ok(completion);
            }
            // Messages sent before the end have been received by now.
            if self.disconnected || shared.closed.load(Ordering::SeqCst) {
                return Err(shared.end());
            }
            queue.arm()?;
            if let Some(completion) = queue.poll()? {
                return Ok(completion);
            }
            let channel = shared.pairs[0].id.channel();
            let mut fds = [
                PollFd::from_borrowed_fd(queue.fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(channel.fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(shared.wake.as_fd(), PollFlags::IN),
            ];
            if wait_for(&mut fds, Some(shared.timeouts.keep_alive()))? {
                shared.keep_alive()?;
            }
            while let Some(event) = channel.next()? {
                self.disconnected |= matches!(
                    event.kind,
                    kind::RDMA_CM_EVENT_DISCONNECTED
                        | kind::RDMA_CM_EVENT_DEVICE_REMOVAL
                        | kind::RDMA_CM_EVENT_CONNECT_ERROR
                        | kind::RDMA_CM_EVENT_TIMEWAIT_EXIT
                );
            }
        }
    }
}
