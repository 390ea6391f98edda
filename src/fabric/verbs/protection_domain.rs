//! A protection domain, and the amount of memory pinned in it.

use std::{
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rdma_sys::ibv_pd;

use super::{
    cm::Id,
    library::{Library, created},
};
use crate::fabric::{Pinned, Result};

pub(super) struct ProtectionDomain {
    raw: NonNull<ibv_pd>,
    library: &'static Library,
    /// Registered guest memory in bytes.
    pinned: AtomicU64,
    /// Time spent on registrations and deregistrations, in nanoseconds.
    pinning: AtomicU64,
}

// SAFETY: libibverbs' objects may be used from any thread (ibv_fork_init(3) and others require
// nothing more). The same holds for the types that refer to this comment.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as for `Send`.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    /// Create a domain on the device of `id`, which librdmacm keeps open until the process ends.
    pub(super) fn new(id: &Id) -> Result<Arc<Self>> {
        let library = id.library();
        // SAFETY: the device is open.
        let raw = unsafe { (library.ibv_alloc_pd)(id.context()?.as_ptr()) };
        let raw = created("ibv_alloc_pd", raw)?;
        Ok(Arc::new(Self { raw, library, pinned: 0.into(), pinning: 0.into() }))
    }

    /// Registered guest memory.
    pub(super) fn pinned(&self) -> Pinned {
        Pinned {
            bytes: self.pinned.load(Ordering::Relaxed),
            time: Duration::from_nanos(self.pinning.load(Ordering::Relaxed)),
        }
    }

    pub(super) fn as_ptr(&self) -> *mut ibv_pd {
        self.raw.as_ptr()
    }

    pub(super) fn library(&self) -> &'static Library {
        self.library
    }

    /// Account for a registration of guest memory that began at `since`.
    pub(super) fn registered(&self, bytes: u64, since: Instant) {
        self.took(since);
        self.pinned.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Account for a deregistration that began at `since`.
    pub(super) fn deregistered(&self, bytes: u64, since: Instant) {
        self.took(since);
        self.pinned.fetch_sub(bytes, Ordering::Relaxed);
    }

    fn took(&self, since: Instant) {
        let nanoseconds = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.pinning.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: every object created in the domain holds it, so none is left.
        unsafe { (self.library.ibv_dealloc_pd)(self.raw.as_ptr()) };
    }
}
