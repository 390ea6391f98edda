//! An established connection and its two halves.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, atomic::Ordering},
};

use rdma_sys::rdma_cm_event_type as kind;
use rustix::{
    event::{PollFd, PollFlags},
    fd::AsFd as _,
};

use super::{
    Timeouts,
    buffers::Buffers,
    cm::wait_for,
    objects::{Access, Completion, CompletionQueue, Depth, Local, MemoryRegion, QueuePair},
    sending::{SEND_DEPTH, Shared, VerbsPoster, identity},
};
use crate::{
    fabric::{Connection, FabricError, Handle, MESSAGE_MAX, Poster, Receiver, RemoteKey, Result},
    memory::Region,
};

/// Messages that may arrive without a credit: READY, answers, errors.
const UNCREDITED: u16 = 16;

/// How much a connection's queue pair holds; `window` as in [`super::Verbs`].
pub(super) fn depth(window: u16) -> Depth {
    Depth { send: SEND_DEPTH, receive: u32::from(window + UNCREDITED) }
}

/// A connection before its halves go to their threads.
pub(super) struct VerbsConnection {
    shared: Arc<Shared>,
    received: Received,
}

/// Buffers for messages from the peer.
struct Received {
    buffers: Arc<Buffers>,
    registration: MemoryRegion,
}

/// Where a region's first byte is.
fn address(region: &Region) -> Result<u64> {
    let mapped = region.mapped(0, region.length());
    let memory = |source| FabricError::Memory { block: region.name().to_owned(), source };
    Ok(mapped.map_err(memory)?.0.as_ptr() as u64)
}

impl VerbsConnection {
    /// Make the queue pair of `id`, and offer its buffers; it need not be connected yet.
    pub(super) fn new(id: super::cm::Id, window: u16, timeouts: Timeouts) -> Result<Self> {
        let depth = depth(window);
        let pair = QueuePair::new(id, depth)?;
        let buffers = Arc::new(Buffers::new(depth.receive as usize));
        let received = Received {
            registration: MemoryRegion::of_buffers(&pair.domain, &buffers, Access::Receive)?,
            buffers,
        };
        let shared = Shared::new(pair, timeouts)?;
        for index in 0..received.buffers.count() {
            received.offer(&shared, index)?;
        }
        Ok(Self { shared: Arc::new(shared), received })
    }

    /// The identifier, to connect it.
    pub(super) fn id(&self) -> &super::cm::Id {
        &self.shared.pair.id
    }
}

impl Received {
    fn offer(&self, shared: &Shared, index: usize) -> Result<()> {
        let local = Local {
            address: self.buffers.address(index),
            length: MESSAGE_MAX as u32,
            lkey: self.registration.lkey(),
        };
        shared.pair.receive(index as u64, local)
    }
}

impl Connection for VerbsConnection {
    fn split(self: Box<Self>) -> (Arc<dyn Poster>, Box<dyn Receiver>) {
        let poster = VerbsPoster { shared: self.shared.clone() };
        let receiver = VerbsReceiver {
            shared: self.shared,
            received: self.received,
            registered: HashMap::new(),
            disconnected: false,
        };
        (Arc::new(poster), Box::new(receiver))
    }

    fn handle(&self) -> Handle {
        let shared = self.shared.clone();
        Handle::new(move || shared.close())
    }
}

/// The half that receives.
struct VerbsReceiver {
    shared: Arc<Shared>,
    received: Received,
    /// What the peer may write, by region and range.
    registered: HashMap<(usize, u64, u64), MemoryRegion>,
    disconnected: bool,
}

impl Receiver for VerbsReceiver {
    fn receive(&mut self, message: &mut Vec<u8>) -> Result<()> {
        let result = self.next_message(message);
        match result {
            Ok(()) => Ok(()),
            Err(error) => {
                // What failed may have been a request, and what came here its consequence.
                let error =
                    if matches!(error, FabricError::Closed) { self.shared.cause() } else { error };
                self.shared.close();
                Err(error)
            }
        }
    }

    fn landed(&self) -> u64 {
        0
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
        let (domain, access) = (&self.shared.pair.domain, Access::RemoteWrite);
        let part = MemoryRegion::of_region(domain, region, &range, access)?;
        let remote = part.remote_key(block);
        self.registered.insert(key, part);
        Ok(remote)
    }

    fn revoke(&mut self) {
        // Deregistration returns when the device lets nobody in any more.
        self.registered.clear();
    }
}

impl VerbsReceiver {
    fn next_message(&mut self, message: &mut Vec<u8>) -> Result<()> {
        let shared = self.shared.clone();
        let queue: &CompletionQueue = &shared.pair.received;
        loop {
            if let Some(completion) = queue.poll()? {
                return self.take(shared.checked(completion)?, message);
            }
            // What was sent before the end has been taken by now.
            if self.disconnected || shared.closed.load(Ordering::SeqCst) {
                return Err(shared.end());
            }
            queue.arm()?;
            if let Some(completion) = queue.poll()? {
                return self.take(shared.checked(completion)?, message);
            }
            let channel = shared.pair.id.channel();
            let mut fds = [
                PollFd::from_borrowed_fd(queue.fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(channel.fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(shared.wake.as_fd(), PollFlags::IN),
            ];
            wait_for(&mut fds, Some(shared.timeouts.keep_alive()))?;
            if fds.iter().all(|fd| fd.revents().is_empty()) {
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

    /// Copy a message out of its buffer and offer the buffer again: messages are what is left of the
    /// stream without RAM, and small.
    fn take(&mut self, completion: Completion, message: &mut Vec<u8>) -> Result<()> {
        let index = completion.id as usize;
        self.received.buffers.take(index, completion.length as usize, message);
        self.received.offer(&self.shared, index)
    }
}
