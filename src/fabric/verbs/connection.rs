//! An established connection and its two halves.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use rdma_sys::{ibv_wc_status as status, rdma_cm_event_type as kind};
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd},
    fd::{AsFd as _, OwnedFd},
};

use super::{
    Timeouts,
    buffers::Buffers,
    cm::wait_for,
    objects::{Access, Completion, CompletionQueue, Depth, Local, MemoryRegion, QueuePair},
};
use crate::{
    fabric::{Connection, FabricError, Handle, Poster, Receiver, RemoteKey, Result},
    memory::{Ranges, Region},
};

/// Work requests that may be outstanding (QEMU's RDMA_SIGNALED_SEND_MAX).
const SEND_DEPTH: u32 = 512;

/// Writes, and bytes of writes, of which only the last is signalled.
const SIGNAL_REQUESTS: u32 = 32;
const SIGNAL_BYTES: u64 = 1 << 20;

/// Most bytes of writes in flight; as in the tcp fabric, and for its reason.
const WINDOW: u64 = 8 << 20;

/// Messages that may be on their way out.
const SEND_BUFFERS: usize = 8;

/// Messages that may arrive without a credit: READY, answers, errors.
const UNCREDITED: u16 = 16;

/// How long the last words may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// Work requests up to a signalled one.
#[derive(Debug, Default, Clone, Copy)]
struct Batch {
    requests: u32,
    bytes: u64,
    /// The buffer of a message.
    buffer: Option<usize>,
}

/// What posts share.
struct Sending {
    buffers: Arc<Buffers>,
    registration: MemoryRegion,
    free: Vec<usize>,
    /// Signalled, in their order: reliable connections complete in it.
    flight: VecDeque<Batch>,
    /// Posted behind the last signalled one.
    unsignalled: Batch,
    outstanding: u32,
    /// Guest memory that is registered for sending, by region.
    local: HashMap<usize, Ranges<MemoryRegion>>,
    /// Guest memory that is registered as a whole.
    pinned: HashMap<usize, MemoryRegion>,
}

/// What both halves and handles share.
struct Shared {
    pair: QueuePair,
    /// Ends whoever waits.
    wake: OwnedFd,
    closed: AtomicBool,
    /// Why the connection ended, if it was not closed.
    failure: Mutex<Option<status::Type>>,
    /// Held while requests are posted and their completions taken. One write in it is up to 1 MiB.
    sending: Mutex<Sending>,
    posted: AtomicU64,
    landed: AtomicU64,
    timeouts: Timeouts,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A region's identity as long as it is held.
fn identity(region: &Arc<Region>) -> usize {
    Arc::as_ptr(region) as usize
}

impl Shared {
    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        // It fails only when the counter is at its end, and then it is readable all the more.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        self.pair.id.disconnect();
    }

    /// Why the connection has ended.
    fn end(&self) -> FabricError {
        match *lock(&self.failure) {
            Some(status::IBV_WC_RETRY_EXC_ERR | status::IBV_WC_RESP_TIMEOUT_ERR) => {
                FabricError::Unreachable(self.timeouts.peer)
            }
            Some(status::IBV_WC_RNR_RETRY_EXC_ERR) => {
                FabricError::Malformed("it has no buffer for a message that it asked for".into())
            }
            Some(
                status::IBV_WC_REM_ACCESS_ERR
                | status::IBV_WC_REM_INV_REQ_ERR
                | status::IBV_WC_REM_OP_ERR,
            ) => FabricError::Malformed("it does not let its memory be written".into()),
            Some(other) => FabricError::Device(other),
            None => FabricError::Closed,
        }
    }

    /// A completion with this status: is it a success?
    fn checked(&self, completion: Completion) -> Result<Completion> {
        match completion.status {
            status::IBV_WC_SUCCESS => Ok(completion),
            // The consequence of what ended the connection.
            status::IBV_WC_WR_FLUSH_ERR => Err(self.end()),
            failed => {
                lock(&self.failure).get_or_insert(failed);
                Err(self.end())
            }
        }
    }

    /// Take what has completed; was there anything?
    fn take_sent(&self, sending: &mut Sending) -> Result<bool> {
        let mut any = false;
        while let Some(completion) = self.pair.sent.poll()? {
            self.checked(completion)?;
            any = true;
            let Some(batch) = sending.flight.pop_front() else { continue };
            sending.outstanding -= batch.requests;
            sending.free.extend(batch.buffer);
            self.landed.fetch_add(batch.bytes, Ordering::Relaxed);
        }
        Ok(any)
    }

    /// Wait until `enough`, which completions make true sooner or later.
    fn await_sent(
        &self,
        sending: &mut Sending,
        limit: Duration,
        enough: impl Fn(&Sending, u64) -> bool,
    ) -> Result<()> {
        loop {
            self.take_sent(sending)?;
            let in_flight =
                self.posted.load(Ordering::Relaxed) - self.landed.load(Ordering::Relaxed);
            if enough(sending, in_flight) {
                return Ok(());
            }
            self.pair.sent.arm()?;
            if self.take_sent(sending)? {
                continue;
            }
            if self.closed.load(Ordering::SeqCst) {
                return Err(self.end());
            }
            let mut fds = [
                PollFd::from_borrowed_fd(self.pair.sent.fd(), PollFlags::IN),
                PollFd::new(&self.wake, PollFlags::IN),
            ];
            wait_for(&mut fds, Some(limit))?;
            if fds.iter().all(|fd| fd.revents().is_empty()) && !self.take_sent(sending)? {
                return Err(FabricError::Stalled(limit));
            }
        }
    }

    /// Post a write, and count it.
    fn post_write(&self, sending: &mut Sending, local: Option<Local>, to: RemoteKey) -> Result<()> {
        let batch = &mut sending.unsignalled;
        batch.requests += 1;
        batch.bytes += local.map_or(0, |local| u64::from(local.length));
        let signalled =
            local.is_none() || batch.requests >= SIGNAL_REQUESTS || batch.bytes >= SIGNAL_BYTES;
        self.pair.write(0, local, to, signalled)?;
        sending.outstanding += 1;
        if signalled {
            sending.flight.push_back(std::mem::take(&mut sending.unsignalled));
        }
        Ok(())
    }

    /// Let the peer acknowledge what was posted, or that it is there.
    fn post_nothing(&self, sending: &mut Sending) -> Result<()> {
        // A write of no bytes needs no key (InfiniBand specification, C9-88).
        self.post_write(sending, None, RemoteKey { address: 0, rkey: 0 })
    }

    /// Nothing has happened for a while: is the peer still there?
    fn keep_alive(&self) -> Result<()> {
        // Whoever holds the lock looks after it.
        let mut sending = match self.sending.try_lock() {
            Ok(sending) => sending,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        self.take_sent(&mut sending)?;
        if sending.outstanding == 0 { self.post_nothing(&mut sending) } else { Ok(()) }
    }

    /// The local key for a write from `offset` of `region`, which crosses no chunk.
    fn lkey(&self, sending: &mut Sending, region: &Arc<Region>, offset: u64) -> Result<u32> {
        let identity = identity(region);
        if let Some(whole) = sending.pinned.get(&identity) {
            return Ok(whole.lkey());
        }
        let ranges = sending.local.entry(identity).or_default();
        if let Some(part) = ranges.get(offset) {
            return Ok(part.lkey());
        }
        let range = ranges.wanted(offset, region.length());
        let part = MemoryRegion::of_region(&self.pair.domain, region, &range, Access::Read)?;
        let lkey = part.lkey();
        ranges.insert(range, part);
        Ok(lkey)
    }
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
        let receive = u32::from(window + UNCREDITED);
        let pair = QueuePair::new(id, Depth { send: SEND_DEPTH, receive })?;
        let buffers = Arc::new(Buffers::new(SEND_BUFFERS));
        let sending = Sending {
            registration: MemoryRegion::of_buffers(&pair.domain, &buffers, Access::Read)?,
            free: (0..buffers.count()).collect(),
            buffers,
            flight: VecDeque::new(),
            unsignalled: Batch::default(),
            outstanding: 0,
            local: HashMap::new(),
            pinned: HashMap::new(),
        };
        let buffers = Arc::new(Buffers::new(receive as usize));
        let received = Received {
            registration: MemoryRegion::of_buffers(&pair.domain, &buffers, Access::Receive)?,
            buffers,
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| FabricError::Host { call: "eventfd", source: errno.into() })?;
        let shared = Shared {
            pair,
            wake,
            closed: AtomicBool::new(false),
            failure: Mutex::default(),
            sending: Mutex::new(sending),
            posted: AtomicU64::new(0),
            landed: AtomicU64::new(0),
            timeouts,
        };
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
            length: crate::fabric::MESSAGE_MAX as u32,
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

struct VerbsPoster {
    shared: Arc<Shared>,
}

impl Poster for VerbsPoster {
    fn send(&self, header: &[u8], payload: &[u8]) -> Result<()> {
        let shared = &*self.shared;
        let sending = &mut *lock(&shared.sending);
        shared.await_sent(sending, shared.timeouts.stall, |sending, _| {
            !sending.free.is_empty() && sending.outstanding < SEND_DEPTH
        })?;
        let Some(buffer) = sending.free.pop() else { return Err(FabricError::Closed) };
        let length = sending.buffers.fill(buffer, [header, payload]);
        let local = Local {
            address: sending.buffers.address(buffer),
            length: length as u32,
            lkey: sending.registration.lkey(),
        };
        shared.pair.send(0, local)?;
        let mut batch = std::mem::take(&mut sending.unsignalled);
        batch.requests += 1;
        batch.buffer = Some(buffer);
        sending.outstanding += 1;
        sending.flight.push_back(batch);
        Ok(())
    }

    fn write(
        &self,
        region: &Arc<Region>,
        offset: u64,
        length: u64,
        remote: RemoteKey,
    ) -> Result<()> {
        let shared = &*self.shared;
        let sending = &mut *lock(&shared.sending);
        shared.await_sent(sending, shared.timeouts.stall, |sending, in_flight| {
            sending.outstanding < SEND_DEPTH && in_flight <= WINDOW
        })?;
        let memory = |source| FabricError::Memory { block: region.name().to_owned(), source };
        let (address, length) = region.mapped(offset, length).map_err(memory)?;
        let local = Local {
            address: address.as_ptr() as u64,
            length: u32::try_from(length)
                .map_err(|_| memory(std::io::ErrorKind::InvalidInput.into()))?,
            lkey: shared.lkey(sending, region, offset)?,
        };
        let to = RemoteKey { address: remote.address.wrapping_add(offset), ..remote };
        shared.posted.fetch_add(length as u64, Ordering::Relaxed);
        shared.post_write(sending, Some(local), to)
    }

    fn pin(&self, region: &Arc<Region>) -> Result<()> {
        let (domain, all) = (&self.shared.pair.domain, 0..region.length());
        let whole = MemoryRegion::of_region(domain, region, &all, Access::Read)?;
        lock(&self.shared.sending).pinned.insert(identity(region), whole);
        Ok(())
    }

    fn drain(&self) -> Result<()> {
        let shared = &*self.shared;
        let sending = &mut *lock(&shared.sending);
        if sending.unsignalled.requests > 0 {
            shared.await_sent(sending, shared.timeouts.stall, |sending, _| {
                sending.outstanding < SEND_DEPTH
            })?;
            shared.post_nothing(sending)?;
        }
        shared.await_sent(sending, shared.timeouts.stall, |_, in_flight| in_flight == 0)
    }

    fn finish(&self) {
        let shared = &*self.shared;
        let sending = &mut *lock(&shared.sending);
        // A message is in the peer's buffer when it completes. A peer that is gone needs none.
        let _ = shared.await_sent(sending, FAREWELL, |sending, _| sending.flight.is_empty());
    }

    fn posted(&self) -> u64 {
        self.shared.posted.load(Ordering::Relaxed)
    }

    fn landed(&self) -> u64 {
        self.shared.landed.load(Ordering::Relaxed)
    }
}

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
        if result.is_err() {
            self.shared.close();
        }
        result
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
