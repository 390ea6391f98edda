//! What leaves: messages, writes, and what keeps count of them.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rdma_sys::ibv_wc_status as status;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd},
    fd::OwnedFd,
};

use super::{
    Timeouts,
    buffers::Buffers,
    cm::wait_for,
    objects::{Access, Completion, Local, MemoryRegion, ProtectionDomain, QueuePair},
};
use crate::{
    fabric::{FabricError, MESSAGE_MAX, Poster, RemoteKey, Result},
    memory::{Ranges, Region},
};

/// Work requests that may be outstanding (QEMU's RDMA_SIGNALED_SEND_MAX).
pub(super) const SEND_DEPTH: u32 = 512;

/// Writes, and bytes of writes, of which only the last is signalled.
const SIGNAL_REQUESTS: u32 = 32;
const SIGNAL_BYTES: u64 = 1 << 20;

/// Most bytes of writes in flight; as in the tcp fabric, and for its reason.
const WINDOW: u64 = 8 << 20;

/// Messages that may be on their way out.
pub(super) const SEND_BUFFERS: usize = 8;

/// Copies of guest memory that may be on their way: as many bytes as [`WINDOW`].
pub(super) const COPIES: usize = 16;

/// How long the last words may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// Work requests up to a signalled one.
#[derive(Debug, Default, Clone, Copy)]
struct Batch {
    requests: u32,
    bytes: u64,
    /// The buffer of a message.
    buffer: Option<usize>,
    /// Buffers of copies.
    copies: usize,
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
    /// When nothing was outstanding or something completed, as far as an idle connection looked.
    quiet_since: Instant,
    /// Guest memory that is registered for sending, by region.
    local: HashMap<usize, Ranges<MemoryRegion>>,
    /// Guest memory that is registered as a whole.
    pinned: HashMap<usize, MemoryRegion>,
    /// For guest memory that can't be registered; made when it is needed.
    copies: Option<Copies>,
}

/// Copies of guest memory on their way: a ring, because they complete in their order.
struct Copies {
    buffers: Arc<Buffers>,
    registration: MemoryRegion,
    next: usize,
    used: usize,
}

impl Copies {
    fn new(domain: &Arc<ProtectionDomain>) -> Result<Self> {
        let buffers = Arc::new(Buffers::new(COPIES));
        let registration = MemoryRegion::of_buffers(domain, &buffers, Access::Read)?;
        Ok(Self { buffers, registration, next: 0, used: 0 })
    }

    /// Copy to the next buffer, which is free.
    fn take(&mut self, region: &Region, offset: u64, length: usize) -> std::io::Result<Local> {
        let index = self.next;
        self.buffers.copy(index, region, offset, length)?;
        self.next = (index + 1) % COPIES;
        self.used += 1;
        let address = self.buffers.address(index);
        Ok(Local { address, length: length as u32, lkey: self.registration.lkey() })
    }
}

/// What both halves and handles share.
pub(super) struct Shared {
    pub(super) pair: QueuePair,
    /// Ends whoever waits.
    pub(super) wake: OwnedFd,
    pub(super) closed: AtomicBool,
    /// Why the connection ended, if it was not closed.
    failure: Mutex<Option<status::Type>>,
    /// Held while requests are posted and their completions taken. One write in it is up to 1 MiB.
    sending: Mutex<Sending>,
    posted: AtomicU64,
    landed: AtomicU64,
    pub(super) timeouts: Timeouts,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A region's identity as long as it is held.
pub(super) fn identity(region: &Arc<Region>) -> usize {
    Arc::as_ptr(region) as usize
}

impl Shared {
    pub(super) fn new(pair: QueuePair, timeouts: Timeouts) -> Result<Self> {
        let buffers = Arc::new(Buffers::new(SEND_BUFFERS));
        let sending = Sending {
            registration: MemoryRegion::of_buffers(&pair.domain, &buffers, Access::Read)?,
            free: (0..buffers.count()).collect(),
            buffers,
            flight: VecDeque::new(),
            unsignalled: Batch::default(),
            outstanding: 0,
            quiet_since: Instant::now(),
            local: HashMap::new(),
            pinned: HashMap::new(),
            copies: None,
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| FabricError::Host { call: "eventfd", source: errno.into() })?;
        Ok(Self {
            pair,
            wake,
            closed: AtomicBool::new(false),
            failure: Mutex::default(),
            sending: Mutex::new(sending),
            posted: AtomicU64::new(0),
            landed: AtomicU64::new(0),
            timeouts,
        })
    }

    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        // It fails only when the counter is at its end, and then it is readable all the more.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        self.pair.id.disconnect();
    }

    /// Why the connection has ended.
    pub(super) fn end(&self) -> FabricError {
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

    /// The same, with what requests say that nobody has looked at yet.
    pub(super) fn cause(&self) -> FabricError {
        self.take_sent(&mut lock(&self.sending)).err().unwrap_or_else(|| self.end())
    }

    /// A completion with this status: is it a success?
    pub(super) fn checked(&self, completion: Completion) -> Result<Completion> {
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
            if let Some(copies) = &mut sending.copies {
                copies.used -= batch.copies;
            }
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
                return Err(FabricError::Unreachable(self.timeouts.peer));
            }
        }
    }

    /// Post a write, and count it.
    fn post_write(&self, sending: &mut Sending, local: Option<Local>, to: RemoteKey) -> Result<()> {
        let batch = &mut sending.unsignalled;
        batch.requests += 1;
        batch.bytes += local.map_or(0, |local| u64::from(local.length));
        let signalled = local.is_none()
            || batch.requests >= SIGNAL_REQUESTS
            || batch.copies >= COPIES / 4
            || batch.bytes >= SIGNAL_BYTES;
        self.pair.write(0, local, to, signalled)?;
        sending.outstanding += 1;
        if signalled {
            sending.flight.push_back(std::mem::take(&mut sending.unsignalled));
        }
        Ok(())
    }

    /// Write from copies, which are read from the file: there the guest's pages are the ones that it
    /// has now, whatever was taken away and came back.
    fn write_copies(
        &self,
        sending: &mut Sending,
        region: &Arc<Region>,
        range: Range<u64>,
        remote: RemoteKey,
    ) -> Result<()> {
        if sending.copies.is_none() {
            sending.copies = Some(Copies::new(&self.pair.domain)?);
        }
        for offset in range.clone().step_by(MESSAGE_MAX) {
            self.await_sent(sending, self.timeouts.acknowledgement(), |sending, _| {
                sending.outstanding < SEND_DEPTH
                    && sending.copies.as_ref().is_some_and(|copies| copies.used < COPIES)
            })?;
            let Some(copies) = &mut sending.copies else { return Err(FabricError::Closed) };
            let length = (range.end - offset).min(MESSAGE_MAX as u64) as usize;
            let memory = |source| FabricError::Memory { block: region.name().to_owned(), source };
            let local = copies.take(region, offset, length).map_err(memory)?;
            sending.unsignalled.copies += 1;
            let to = RemoteKey { address: remote.address.wrapping_add(offset), ..remote };
            self.posted.fetch_add(length as u64, Ordering::Relaxed);
            self.post_write(sending, Some(local), to)?;
        }
        Ok(())
    }

    /// Let the peer acknowledge what was posted, or that it is there.
    fn post_nothing(&self, sending: &mut Sending) -> Result<()> {
        // A write of no bytes needs no key (InfiniBand specification, C9-88).
        self.post_write(sending, None, RemoteKey { address: 0, rkey: 0 })
    }

    /// Nothing has happened for a while: is the peer still there?
    pub(super) fn keep_alive(&self) -> Result<()> {
        // Whoever holds the lock looks after it.
        let mut sending = match self.sending.try_lock() {
            Ok(sending) => sending,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        let heard = self.take_sent(&mut sending)?;
        if heard || sending.flight.is_empty() {
            sending.quiet_since = Instant::now();
        }
        if sending.flight.is_empty() {
            self.post_nothing(&mut sending)
        } else if sending.quiet_since.elapsed() > self.timeouts.acknowledgement() {
            Err(FabricError::Unreachable(self.timeouts.peer))
        } else {
            Ok(())
        }
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

/// The half that sends.
pub(super) struct VerbsPoster {
    pub(super) shared: Arc<Shared>,
}

impl Poster for VerbsPoster {
    fn send(&self, header: &[u8], payload: &[u8]) -> Result<()> {
        let shared = &*self.shared;
        let sending = &mut *lock(&shared.sending);
        shared.await_sent(sending, shared.timeouts.acknowledgement(), |sending, _| {
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
        shared.await_sent(sending, shared.timeouts.acknowledgement(), |sending, in_flight| {
            sending.outstanding < SEND_DEPTH && in_flight <= WINDOW
        })?;
        if region.is_discardable() {
            return shared.write_copies(sending, region, offset..offset + length, remote);
        }
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
        if region.is_discardable() {
            return Ok(());
        }
        let (domain, all) = (&self.shared.pair.domain, 0..region.length());
        let whole = MemoryRegion::of_region(domain, region, &all, Access::Read)?;
        lock(&self.shared.sending).pinned.insert(identity(region), whole);
        Ok(())
    }

    fn drain(&self) -> Result<()> {
        let shared = &*self.shared;
        let sending = &mut *lock(&shared.sending);
        if sending.unsignalled.requests > 0 {
            shared.await_sent(sending, shared.timeouts.acknowledgement(), |sending, _| {
                sending.outstanding < SEND_DEPTH
            })?;
            shared.post_nothing(sending)?;
        }
        shared.await_sent(sending, shared.timeouts.acknowledgement(), |_, in_flight| in_flight == 0)
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
