//! Verbs objects: a type each, which keeps what it depends on alive.

use std::{
    any::Any,
    io,
    mem::MaybeUninit,
    ops::Range,
    os::fd::BorrowedFd,
    ptr::{self, NonNull},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rdma_sys::{
    ibv_access_flags, ibv_comp_channel, ibv_cq, ibv_mr, ibv_pd, ibv_poll_cq, ibv_req_notify_cq,
    ibv_wc, ibv_wc_status,
};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::{
    buffers::Buffers,
    cm::Id,
    library::{Library, check_errno},
};
use crate::{
    fabric::{FabricError, Pinned, RemoteKey, Result},
    memory::Region,
};

/// The handle of an object, or what errno says.
fn created<T>(call: &'static str, raw: *mut T) -> Result<NonNull<T>> {
    NonNull::new(raw).ok_or_else(|| FabricError::Host { call, source: io::Error::last_os_error() })
}

/// The device has no room for what was to be made.
pub(super) fn refused(what: impl FnOnce() -> String) -> impl FnOnce(FabricError) -> FabricError {
    |error| match error {
        FabricError::Host { source, .. } => FabricError::Refused { what: what(), source },
        other => other,
    }
}

/// A protection domain.
pub(super) struct ProtectionDomain {
    raw: NonNull<ibv_pd>,
    library: &'static Library,
    /// Guest memory that is registered in it, in bytes.
    pinned: AtomicU64,
    /// Nanoseconds that its registrations and their ends have taken.
    pinning: AtomicU64,
}

// SAFETY: libibverbs' objects may be used from any thread (ibv_fork_init(3) and others demand
// nothing more); so for the types below.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as for `Send`.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    /// On the device of `id`, which librdmacm keeps open until the process ends.
    pub(super) fn new(id: &Id) -> Result<Arc<Self>> {
        let library = id.library();
        // SAFETY: the device is open.
        let raw = unsafe { (library.ibv_alloc_pd)(id.context()?.as_ptr()) };
        let raw = created("ibv_alloc_pd", raw)?;
        Ok(Arc::new(Self { raw, library, pinned: 0.into(), pinning: 0.into() }))
    }

    /// Guest memory that is registered in it.
    pub(super) fn pinned(&self) -> Pinned {
        Pinned {
            bytes: self.pinned.load(Ordering::Relaxed),
            time: Duration::from_nanos(self.pinning.load(Ordering::Relaxed)),
        }
    }

    pub(super) fn as_ptr(&self) -> *mut ibv_pd {
        self.raw.as_ptr()
    }

    fn took(&self, since: Instant) {
        let nanoseconds = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.pinning.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: what was made in it held it, so nothing is left.
        unsafe { (self.library.ibv_dealloc_pd)(self.raw.as_ptr()) };
    }
}

/// What a device may do with memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Send it.
    Read,
    /// Receive messages into it.
    Receive,
    /// Let the peer write it.
    RemoteWrite,
}

impl Access {
    fn flags(self) -> i32 {
        let flags = match self {
            Self::Read => 0,
            Self::Receive => ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0,
            // Remote writing needs local writing too (ibv_reg_mr(3)).
            Self::RemoteWrite => {
                ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0
                    | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0
            }
        };
        flags.cast_signed()
    }
}

/// Memory that is registered with a device, and pinned.
pub(super) struct MemoryRegion {
    raw: NonNull<ibv_mr>,
    domain: Arc<ProtectionDomain>,
    /// Bytes of guest memory in it.
    guest: u64,
    /// Keeps it mapped.
    _memory: Arc<dyn Any + Send + Sync>,
}

// SAFETY: see `ProtectionDomain`.
unsafe impl Send for MemoryRegion {}
// SAFETY: as for `Send`.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    fn new(
        domain: &Arc<ProtectionDomain>,
        memory: Arc<dyn Any + Send + Sync>,
        (address, length): (NonNull<u8>, usize),
        access: Access,
    ) -> io::Result<Self> {
        // SAFETY: the range belongs to `memory`, which is held as long as this.
        let raw = unsafe {
            (domain.library.ibv_reg_mr)(
                domain.raw.as_ptr(),
                address.as_ptr().cast(),
                length,
                access.flags(),
            )
        };
        let raw = NonNull::new(raw).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { raw, domain: domain.clone(), guest: 0, _memory: memory })
    }

    /// Register message buffers.
    pub(super) fn of_buffers(
        domain: &Arc<ProtectionDomain>,
        buffers: &Arc<Buffers>,
        access: Access,
    ) -> Result<Self> {
        let range = buffers.range();
        let mib = range.1.div_ceil(1 << 20) as u64;
        Self::new(domain, buffers.clone(), range, access).map_err(|source| FabricError::Pin {
            what: "message buffers".into(),
            mib,
            source,
        })
    }

    /// Register a range of a RAM block.
    pub(super) fn of_region(
        domain: &Arc<ProtectionDomain>,
        region: &Arc<Region>,
        range: &Range<u64>,
        access: Access,
    ) -> Result<Self> {
        let length = range.end - range.start;
        let failed = |source| FabricError::Pin {
            what: format!("RAM block '{}'", region.name()),
            mib: length.div_ceil(1 << 20),
            source,
        };
        let range = region.populated(range.start, length).map_err(failed)?;
        let begun = Instant::now();
        let mut part = Self::new(domain, region.clone(), range, access).map_err(failed)?;
        part.guest = length;
        domain.took(begun);
        domain.pinned.fetch_add(length, Ordering::Relaxed);
        Ok(part)
    }

    /// For work requests here.
    pub(super) fn lkey(&self) -> u32 {
        // SAFETY: alive; the key never changes.
        unsafe { self.raw.as_ref().lkey }
    }

    /// For the peer. It is in the caller's hands that the address is the whole block's.
    pub(super) fn remote_key(&self, block: u64) -> RemoteKey {
        // SAFETY: as for `lkey`.
        RemoteKey { address: block, rkey: unsafe { self.raw.as_ref().rkey } }
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        let begun = Instant::now();
        // SAFETY: it was registered once; work requests that still name it fail.
        unsafe { (self.domain.library.ibv_dereg_mr)(self.raw.as_ptr()) };
        if self.guest > 0 {
            self.domain.took(begun);
            self.domain.pinned.fetch_sub(self.guest, Ordering::Relaxed);
        }
    }
}

/// Says when a queue has completions.
struct CompletionChannel {
    raw: NonNull<ibv_comp_channel>,
    library: &'static Library,
}

impl CompletionChannel {
    fn new(id: &Id) -> Result<Self> {
        let library = id.library();
        // SAFETY: the device is open.
        let raw = unsafe { (library.ibv_create_comp_channel)(id.context()?.as_ptr()) };
        let channel = Self { raw: created("ibv_create_comp_channel", raw)?, library };
        let nonblocking = fcntl_getfl(channel.fd())
            .and_then(|flags| fcntl_setfl(channel.fd(), flags | OFlags::NONBLOCK));
        nonblocking.map_err(|errno| FabricError::Host { call: "fcntl", source: errno.into() })?;
        Ok(channel)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the channel exists.
        unsafe { BorrowedFd::borrow_raw(self.raw.as_ref().fd) }
    }
}

impl Drop for CompletionChannel {
    fn drop(&mut self) {
        // SAFETY: its queue is gone: it is declared, and so dropped, before this.
        unsafe { (self.library.ibv_destroy_comp_channel)(self.raw.as_ptr()) };
    }
}

/// A completion.
#[derive(Debug, Clone, Copy)]
pub(super) struct Completion {
    /// Of the work request.
    pub(super) id: u64,
    /// `ibv_wc_status`.
    pub(super) status: ibv_wc_status::Type,
    /// Bytes received.
    pub(super) length: u32,
}

/// A completion queue with a channel of its own.
pub(super) struct CompletionQueue {
    raw: NonNull<ibv_cq>,
    /// Notifications that were taken and not acknowledged.
    notified: AtomicU32,
    channel: CompletionChannel,
}

// SAFETY: see `ProtectionDomain`.
unsafe impl Send for CompletionQueue {}
// SAFETY: as for `Send`.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    pub(super) fn new(id: &Id, size: u32) -> Result<Self> {
        let channel = CompletionChannel::new(id)?;
        // SAFETY: device and channel are alive.
        let raw = unsafe {
            (id.library().ibv_create_cq)(
                id.context()?.as_ptr(),
                size.cast_signed(),
                ptr::null_mut(),
                channel.raw.as_ptr(),
                0,
            )
        };
        let raw = created("ibv_create_cq", raw)
            .map_err(refused(|| format!("a queue of {size} completions")))?;
        Ok(Self { raw, notified: AtomicU32::new(0), channel })
    }

    pub(super) fn as_ptr(&self) -> *mut ibv_cq {
        self.raw.as_ptr()
    }

    /// The next completion, if there is one.
    pub(super) fn poll(&self) -> Result<Option<Completion>> {
        let mut completion = MaybeUninit::<ibv_wc>::uninit();
        // SAFETY: the queue is alive, and there is room for the one that is asked for.
        let found = unsafe { ibv_poll_cq(self.raw.as_ptr(), 1, completion.as_mut_ptr()) };
        match found {
            0 => Ok(None),
            1 => {
                // SAFETY: one was written.
                let wc = unsafe { completion.assume_init() };
                Ok(Some(Completion { id: wc.wr_id, status: wc.status, length: wc.byte_len }))
            }
            errno => Err(check_errno("ibv_poll_cq", errno).err().unwrap_or(FabricError::Closed)),
        }
    }

    /// Make [`CompletionQueue::fd`] readable at the next completion. What came before does not: poll
    /// once more behind this.
    pub(super) fn arm(&self) -> Result<()> {
        let mut queue = ptr::null_mut();
        let mut context = ptr::null_mut();
        let library = self.channel.library;
        // SAFETY: the channel is alive, and does not block.
        while unsafe {
            (library.ibv_get_cq_event)(self.channel.raw.as_ptr(), &mut queue, &mut context)
        } == 0
        {
            self.notified.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the queue is alive.
        check_errno("ibv_req_notify_cq", unsafe { ibv_req_notify_cq(self.raw.as_ptr(), 0) })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.channel.fd()
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        let library = self.channel.library;
        // SAFETY: so many notifications were taken; the queue pair, which held this, is gone.
        unsafe {
            (library.ibv_ack_cq_events)(self.raw.as_ptr(), *self.notified.get_mut());
            (library.ibv_destroy_cq)(self.raw.as_ptr());
        }
    }
}
