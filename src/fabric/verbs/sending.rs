//! The sending half: messages, writes, and the accounting of both.

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
    buffers::Buffers,
    cm::{wait_for, wait_through},
    completion_queue::{Completion, CompletionQueue},
    device::Transport,
    memory_region::{Access, MemoryRegion},
    protection_domain::ProtectionDomain,
    queue_pair::{Local, QueuePair},
    recv_buffers::Received,
    staging_ring::Ring,
    timeouts::Timeouts,
};
use crate::{
    fabric::{FabricError, Pinned, RemoteKey, Result, SendHalf},
    memory::{Ranges, Region},
    patience::{Found, await_enough},
    ram::CHUNK,
};

/// Outstanding work requests per queue pair (QEMU's RDMA_SIGNALED_SEND_MAX).
pub(super) const SEND_DEPTH: u32 = 512;

/// Number and bytes of writes of which only the last is signalled.
const SIGNAL_REQUESTS: u32 = 32;
const SIGNAL_BYTES: u64 = 1 << 20;

/// Most bytes of writes in flight, as in the tcp fabric and for the same reason.
const WINDOW: u64 = 8 << 20;

/// Messages that may be in flight.
pub(super) const SEND_BUFFERS: usize = 8;

/// Time limit for the final message.
const FAREWELL: Duration = Duration::from_secs(1);

/// Work requests up to and including a signalled one.
#[derive(Debug, Default, Clone, Copy)]
struct Batch {
    requests: u32,
    bytes: u64,
    /// Buffer of a message.
    buffer: Option<usize>,
    /// Bytes used in the staging ring.
    staged: usize,
}

/// Work requests posted to a queue pair.
#[derive(Debug, Default)]
struct Posted {
    /// Signalled batches, in order: a reliable connection completes them in order.
    flight: VecDeque<Batch>,
    /// Requests posted after the last signalled one.
    unsignalled: Batch,
    outstanding: u32,
}

/// State of posting, shared by all threads that send.
struct Sending {
    buffers: Arc<Buffers>,
    registration: MemoryRegion,
    free: Vec<usize>,
    /// By queue pair.
    posted: Vec<Posted>,
    /// Time of the last completion, or of the last post to an idle connection.
    quiet_since: Instant,
    /// Guest memory registered for sending, by region.
    pinned: HashMap<usize, Ranges<MemoryRegion>>,
    /// For bytes outside guest memory; created on first use.
    ring: Option<Ring>,
}

impl Sending {
    /// Whether no signalled request is in flight.
    fn is_quiet(&self) -> bool {
        self.posted.iter().all(|posted| posted.flight.is_empty())
    }

    /// Whether no signalled request, marks included, is in flight on queue pairs that carry RAM but
    /// no messages: the peer may then close them.
    fn is_ram_quiet(&self) -> bool {
        self.posted[1..].iter().all(|posted| posted.flight.is_empty())
    }

    /// The local key for a write from `offset` of `region`.
    fn lkey(&self, region: &Arc<Region>, offset: u64) -> Result<u32> {
        let part = self.pinned.get(&identity(region)).and_then(|ranges| ranges.get(offset));
        part.map(|(_, part)| part.lkey()).ok_or_else(|| FabricError::Memory {
            block: region.name().to_owned(),
            source: std::io::Error::other(format!("offset {offset:#x} is not registered")),
        })
    }
}

/// State shared by both halves and handles.
pub(super) struct Shared {
    /// The first carries messages, and also RAM if it is the only one. Otherwise the others carry
    /// RAM, each chunk always on the same one.
    pub(super) pairs: Vec<QueuePair>,
    /// Receive buffers of the first queue pair. Fields are dropped in order, so they outlive the
    /// queue pairs.
    pub(super) received: Received,
    /// Wakes all waiting threads.
    pub(super) wake: OwnedFd,
    pub(super) closed: AtomicBool,
    /// Why the connection ended, if it was not closed.
    failure: Mutex<Option<status::Type>>,
    /// Held while posting requests and taking completions, once per write of up to 1 MiB.
    sending: Mutex<Sending>,
    posted: AtomicU64,
    landed: AtomicU64,
    pub(super) timeouts: Timeouts,
    transport: Transport,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A key for a region, unique while the region exists.
pub(super) fn identity(region: &Arc<Region>) -> usize {
    Arc::as_ptr(region) as usize
}

impl Shared {
    pub(super) fn new(
        pairs: Vec<QueuePair>,
        received: Received,
        timeouts: Timeouts,
    ) -> Result<Self> {
        let buffers = Arc::new(Buffers::new(SEND_BUFFERS));
        let sending = Sending {
            registration: MemoryRegion::of_buffers(&pairs[0].domain, &buffers, Access::Read)?,
            free: (0..buffers.count()).collect(),
            buffers,
            posted: pairs.iter().map(|_| Posted::default()).collect(),
            quiet_since: Instant::now(),
            pinned: HashMap::new(),
            ring: None,
        };
        let transport = pairs[0].transport()?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| FabricError::Host { call: "eventfd", source: errno.into() })?;
        Ok(Self {
            pairs,
            received,
            wake,
            closed: AtomicBool::new(false),
            failure: Mutex::default(),
            sending: Mutex::new(sending),
            posted: AtomicU64::new(0),
            landed: AtomicU64::new(0),
            timeouts,
            transport,
        })
    }

    /// Send completion queue of all queue pairs.
    fn sent(&self) -> &CompletionQueue {
        self.pairs[0].sent()
    }

    /// Index of the first queue pair for RAM.
    fn first_lane(&self) -> usize {
        usize::from(self.pairs.len() > 1)
    }

    /// Index of the queue pair for the chunk at `offset` of a block.
    fn lane(&self, offset: u64) -> usize {
        let first = self.first_lane();
        first + (offset / CHUNK) as usize % (self.pairs.len() - first)
    }

    /// Bytes of writes per queue pair of which only the last is signalled. The total over all queue
    /// pairs is far below [`WINDOW`], so that there is always a completion to wait for.
    fn signal_bytes(&self) -> u64 {
        SIGNAL_BYTES / self.pairs.len() as u64
    }

    /// The protection domain of guest memory.
    pub(super) fn ram_domain(&self) -> &Arc<ProtectionDomain> {
        &self.pairs[self.first_lane()].domain
    }

    /// Deny the peer all further writes. Return false if the device can't.
    pub(super) fn refuse_writes(&self) -> bool {
        match self.first_lane() {
            0 => self.transport.guards_queue_pairs() && self.pairs[0].refuse_writes().is_ok(),
            first => self.pairs[first..].iter().try_for_each(QueuePair::fail).is_ok(),
        }
    }

    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        // Fails only if the counter is at its maximum, and then the descriptor is readable anyway.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        for pair in &self.pairs {
            pair.id.disconnect();
        }
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

    /// Why the connection has ended, with errors in completions not yet taken.
    pub(super) fn cause(&self) -> FabricError {
        self.take_sent(&mut lock(&self.sending)).err().unwrap_or_else(|| self.end())
    }

    /// Return the completion if it succeeded, else why the connection has ended.
    pub(super) fn checked(&self, completion: Completion) -> Result<Completion> {
        match completion.status {
            status::IBV_WC_SUCCESS => Ok(completion),
            // A consequence of the original failure.
            status::IBV_WC_WR_FLUSH_ERR => Err(self.end()),
            failed => {
                lock(&self.failure).get_or_insert(failed);
                Err(self.end())
            }
        }
    }

    /// Take all send completions. Return whether there were any.
    fn take_sent(&self, sending: &mut Sending) -> Result<bool> {
        let mut any = false;
        while let Some(completion) = self.sent().poll()? {
            let completion = self.checked(completion)?;
            any = true;
            let posted = sending.posted.get_mut(completion.id as usize);
            let Some((posted, batch)) =
                posted.and_then(|it| it.flight.pop_front().map(|batch| (it, batch)))
            else {
                continue;
            };
            posted.outstanding -= batch.requests;
            sending.free.extend(batch.buffer);
            if let Some(ring) = &mut sending.ring {
                ring.give_back(batch.staged);
            }
            self.landed.fetch_add(batch.bytes, Ordering::Relaxed);
        }
        if any {
            sending.quiet_since = Instant::now();
        }
        Ok(any)
    }

    /// Wait until `enough` returns true. Its arguments are the state and the bytes in flight, which
    /// completions change.
    fn await_sent(
        &self,
        sending: &mut Sending,
        limit: Duration,
        enough: impl Fn(&Sending, u64) -> bool,
    ) -> Result<()> {
        let enough = |sending: &Sending| {
            let landed = self.landed.load(Ordering::Relaxed);
            enough(sending, self.posted.load(Ordering::Relaxed) - landed)
        };
        let look = || {
            let mut any = self.take_sent(sending)?;
            if !enough(sending) {
                self.sent().arm()?;
                // Completions that arrived before arming wake nobody.
                any |= self.take_sent(sending)?;
            }
            Ok(match any {
                _ if enough(sending) => Found::Enough,
                true => Found::Some,
                false => Found::Nothing,
            })
        };
        let wait = |slice| {
            if self.closed.load(Ordering::SeqCst) {
                return Err(self.end());
            }
            let mut fds = [
                PollFd::from_borrowed_fd(self.sent().fd(), PollFlags::IN),
                PollFd::new(&self.wake, PollFlags::IN),
            ];
            wait_for(&mut fds, Some(slice))
        };
        match await_enough(limit, look, wait)? {
            true => Ok(()),
            false => Err(FabricError::Unreachable(self.timeouts.peer)),
        }
    }

    /// Wait until one more request may be posted to a queue pair.
    fn await_slot(&self, sending: &mut Sending, lane: usize) -> Result<()> {
        self.await_sent(sending, self.timeouts.acknowledgement(), |sending, _| {
            sending.posted[lane].outstanding < SEND_DEPTH
        })
    }

    /// Post a message, once a buffer and a queue entry are free.
    fn post_message(&self, sending: &mut Sending, header: &[u8], payload: &[u8]) -> Result<()> {
        self.await_sent(sending, self.timeouts.acknowledgement(), |sending, _| {
            !sending.free.is_empty() && sending.posted[0].outstanding < SEND_DEPTH
        })?;
        let Some(buffer) = sending.free.pop() else { return Err(FabricError::Closed) };
        let length = sending.buffers.fill(buffer, [header, payload]);
        let local = Local {
            address: sending.buffers.address(buffer),
            length: length as u32,
            lkey: sending.registration.lkey(),
        };
        self.post_send(sending, 0, Some(local), Some(buffer))
    }

    /// Post and account for a message in `buffer`, or a mark.
    fn post_send(
        &self,
        sending: &mut Sending,
        lane: usize,
        local: Option<Local>,
        buffer: Option<usize>,
    ) -> Result<()> {
        self.pairs[lane].send(lane as u64, local)?;
        self.count(sending, lane, buffer);
        Ok(())
    }

    /// Account for a posted signalled request that is not a write.
    fn count(&self, sending: &mut Sending, lane: usize, buffer: Option<usize>) {
        if sending.is_quiet() {
            sending.quiet_since = Instant::now();
        }
        let posted = &mut sending.posted[lane];
        let mut batch = std::mem::take(&mut posted.unsignalled);
        batch.requests += 1;
        batch.buffer = buffer;
        posted.outstanding += 1;
        posted.flight.push_back(batch);
    }

    fn post_write(
        &self,
        sending: &mut Sending,
        lane: usize,
        local: Option<Local>,
        to: RemoteKey,
    ) -> Result<()> {
        if sending.is_quiet() {
            sending.quiet_since = Instant::now();
        }
        let posted = &mut sending.posted[lane];
        let batch = &mut posted.unsignalled;
        batch.requests += 1;
        batch.bytes += local.map_or(0, |local| u64::from(local.length));
        let signalled = local.is_none()
            || batch.staged > 0 && !self.transport.releases_unsignalled()
            || batch.requests >= SIGNAL_REQUESTS
            || batch.bytes >= self.signal_bytes();
        self.pairs[lane].write(lane as u64, local, to, signalled)?;
        posted.outstanding += 1;
        if signalled {
            posted.flight.push_back(std::mem::take(&mut posted.unsignalled));
        }
        Ok(())
    }

    /// Probe the peer's device.
    fn post_question(&self, sending: &mut Sending) -> Result<()> {
        if self.transport.acknowledges() {
            return self.post_nothing(sending, 0);
        }
        // Only helpers accept reads; with them RAM has separate queue pairs.
        if self.first_lane() > 0 {
            self.pairs[0].read_nothing(0)?;
            self.count(sending, 0, None);
        }
        Ok(())
    }

    /// Post a signalled request, whose completion covers all requests before it.
    fn post_nothing(&self, sending: &mut Sending, lane: usize) -> Result<()> {
        // A write of zero bytes needs no key (InfiniBand specification, C9-88, as cited in
        // `check_rkey` of Linux's rxe; RFC 5041, 5.2).
        self.post_write(sending, lane, None, RemoteKey { address: 0, rkey: 0 })
    }

    /// Probe the peer after a silence, or fail if it has not answered in time.
    pub(super) fn keep_alive(&self) -> Result<()> {
        // The thread that holds the lock checks the peer itself.
        let mut sending = match self.sending.try_lock() {
            Ok(sending) => sending,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        self.take_sent(&mut sending)?;
        if sending.is_quiet() {
            self.post_question(&mut sending)
        } else if sending.quiet_since.elapsed() > self.timeouts.acknowledgement() {
            Err(FabricError::Unreachable(self.timeouts.peer))
        } else {
            Ok(())
        }
    }
}

pub(super) struct VerbsSendHalf {
    pub(super) shared: Arc<Shared>,
}

impl SendHalf for VerbsSendHalf {
    fn send(&self, header: &[u8], payload: &[u8]) -> Result<()> {
        let shared = &*self.shared;
        shared.post_message(&mut lock(&shared.sending), header, payload)
    }

    fn send_after_writes(&self, header: &[u8], payload: &[u8]) -> Result<()> {
        let shared = &*self.shared;
        // Held from the first mark to the message, so that marks of several messages never
        // interleave.
        let sending = &mut *lock(&shared.sending);
        for lane in 1..shared.pairs.len() {
            shared.await_slot(sending, lane)?;
            shared.post_send(sending, lane, None, None)?;
        }
        shared.post_message(sending, header, payload)
    }

    fn orders_writes(&self) -> bool {
        self.shared.transport.orders_writes()
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
        let lane = shared.lane(offset);
        shared.await_sent(sending, shared.timeouts.acknowledgement(), |sending, in_flight| {
            sending.posted[lane].outstanding < SEND_DEPTH && in_flight <= WINDOW
        })?;
        let memory = |source| FabricError::Memory { block: region.name().to_owned(), source };
        let (address, length) = region.mapped(offset, length).map_err(memory)?;
        let local = Local {
            address: address.as_ptr() as u64,
            length: u32::try_from(length)
                .map_err(|_| memory(std::io::ErrorKind::InvalidInput.into()))?,
            lkey: sending.lkey(region, offset)?,
        };
        let to = RemoteKey { address: remote.address.wrapping_add(offset), ..remote };
        shared.posted.fetch_add(length as u64, Ordering::Relaxed);
        shared.post_write(sending, lane, Some(local), to)
    }

    fn write_bytes(&self, bytes: &[u8], offset: u64, remote: RemoteKey) -> Result<()> {
        let shared = &*self.shared;
        let sending = &mut *lock(&shared.sending);
        // The ring needs completions in order, hence a single queue pair.
        let lane = shared.first_lane();
        if sending.ring.is_none() {
            sending.ring = Some(Ring::new(shared.ram_domain())?);
        }
        shared.await_sent(sending, shared.timeouts.acknowledgement(), |sending, in_flight| {
            sending.posted[lane].outstanding < SEND_DEPTH
                && in_flight <= WINDOW
                && sending.ring.as_ref().is_some_and(Ring::has_space)
        })?;
        let Some(ring) = &mut sending.ring else { return Err(FabricError::Closed) };
        let (local, taken) = ring.take(bytes);
        sending.posted[lane].unsignalled.staged += taken;
        let to = RemoteKey { address: remote.address.wrapping_add(offset), ..remote };
        shared.posted.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        shared.post_write(sending, lane, Some(local), to)
    }

    fn pin(&self, region: &Arc<Region>, range: Range<u64>) -> Result<()> {
        let domain = self.shared.ram_domain();
        // Without the lock: registration takes long and must not delay messages.
        let part = MemoryRegion::of_region(domain, region, &range, Access::Read)?;
        let sending = &mut *lock(&self.shared.sending);
        sending.pinned.entry(identity(region)).or_default().insert(range, part);
        Ok(())
    }

    fn unpin(&self, region: &Arc<Region>, range: Range<u64>) {
        let sending = &mut *lock(&self.shared.sending);
        let part = sending.pinned.get_mut(&identity(region)).and_then(|it| it.remove(&range));
        drop(part);
    }

    fn pinned(&self) -> Pinned {
        self.shared.ram_domain().pinned()
    }

    fn drain(&self) -> Result<()> {
        let shared = &*self.shared;
        let sending = &mut *lock(&shared.sending);
        for lane in 0..shared.pairs.len() {
            if sending.posted[lane].unsignalled.requests == 0 {
                continue;
            }
            shared.await_slot(sending, lane)?;
            shared.post_nothing(sending, lane)?;
        }
        shared.await_sent(sending, shared.timeouts.acknowledgement(), |sending, in_flight| {
            in_flight == 0 && sending.is_ram_quiet()
        })
    }

    fn finish(&self) {
        let shared = &*self.shared;
        // After an error the peer is gone and needs nothing more.
        let sent = shared
            .await_sent(&mut lock(&shared.sending), FAREWELL, |sending, _| sending.is_quiet());
        // InfiniBand: a completed message is in the peer's buffer. iWARP: it is once the peer
        // closes, which it does after the final message.
        if sent.is_ok() && !shared.transport.acknowledges() {
            let mut fds = [
                PollFd::from_borrowed_fd(shared.pairs[0].id.channel().fd(), PollFlags::IN),
                PollFd::new(&shared.wake, PollFlags::IN),
            ];
            let _ = wait_through(&mut fds, FAREWELL);
        }
    }

    fn connections(&self) -> u32 {
        (self.shared.pairs.len() - self.shared.first_lane()) as u32
    }

    fn posted(&self) -> u64 {
        self.shared.posted.load(Ordering::Relaxed)
    }

    fn landed(&self) -> u64 {
        self.shared.landed.load(Ordering::Relaxed)
    }
}
