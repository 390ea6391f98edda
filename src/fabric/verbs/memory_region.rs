//! Memory regions that are registered with a device.

use std::{any::Any, io, ops::Range, ptr::NonNull, sync::Arc, time::Instant};

use rdma_sys::{ibv_access_flags, ibv_mr};

use super::{buffers::Buffers, protection_domain::ProtectionDomain};
use crate::{
    fabric::{FabricError, RemoteKey, Result},
    memory::Region,
};

/// What a device may do with memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Send from it.
    Read,
    /// Receive messages into it.
    Receive,
    /// Let the peer write to it.
    RemoteWrite,
}

impl Access {
    fn flags(self) -> i32 {
        let flags = match self {
            Self::Read => 0,
            Self::Receive => ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0,
            // Remote write requires local write (ibv_reg_mr(3)).
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
    /// Keeps the memory mapped.
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
        // SAFETY: the range belongs to `memory`, which the returned object holds.
        let raw = unsafe {
            (domain.library().ibv_reg_mr)(
                domain.as_ptr(),
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
        domain.registered(length, begun);
        Ok(part)
    }

    /// The key for local work requests.
    pub(super) fn lkey(&self) -> u32 {
        // SAFETY: the registration exists; its key never changes.
        unsafe { self.raw.as_ref().lkey }
    }

    /// The key for the peer. `block` must be the address of the whole block.
    pub(super) fn remote_key(&self, block: u64) -> RemoteKey {
        // SAFETY: as for `lkey`.
        RemoteKey { address: block, rkey: unsafe { self.raw.as_ref().rkey } }
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        let begun = Instant::now();
        // SAFETY: registered once; work requests that still use it fail.
        unsafe { (self.domain.library().ibv_dereg_mr)(self.raw.as_ptr()) };
        if self.guest > 0 {
            self.domain.deregistered(self.guest, begun);
        }
    }
}
