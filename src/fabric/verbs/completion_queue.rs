//! A completion queue and its completion channel.

use std::{
    mem::MaybeUninit,
    os::fd::BorrowedFd,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU32, Ordering},
};

use rdma_sys::{ibv_comp_channel, ibv_cq, ibv_poll_cq, ibv_req_notify_cq, ibv_wc, ibv_wc_status};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::{
    cm::Id,
    library::{Library, check_errno, created, refused},
};
use crate::fabric::{FabricError, Result};

/// A completion channel, readable when its queue has completions.
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
        // SAFETY: the queue is already destroyed: `CompletionQueue` destroys it before it drops its
        // fields.
        unsafe { (self.library.ibv_destroy_comp_channel)(self.raw.as_ptr()) };
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Completion {
    /// Id of the work request.
    pub(super) id: u64,
    /// `ibv_wc_status`.
    pub(super) status: ibv_wc_status::Type,
    /// Bytes received.
    pub(super) length: u32,
}

/// A completion queue with a channel of its own.
pub(super) struct CompletionQueue {
    raw: NonNull<ibv_cq>,
    /// Notifications taken and not yet acknowledged.
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

    /// Return the next completion, if there is one.
    pub(super) fn poll(&self) -> Result<Option<Completion>> {
        let mut completion = MaybeUninit::<ibv_wc>::uninit();
        // SAFETY: the queue is alive, and `completion` has space for the one that is requested.
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

    /// Make [`CompletionQueue::fd`] readable at the next completion. Earlier completions do not
    /// trigger it: poll once more after this.
    pub(super) fn arm(&self) -> Result<()> {
        let mut queue = ptr::null_mut();
        let mut context = ptr::null_mut();
        let library = self.channel.library;
        // SAFETY: the channel is alive. It does not block.
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
        // SAFETY: this is the number of notifications taken; the queue pair, which held this, is
        // gone.
        unsafe {
            (library.ibv_ack_cq_events)(self.raw.as_ptr(), *self.notified.get_mut());
            (library.ibv_destroy_cq)(self.raw.as_ptr());
        }
    }
}
