//! Equally sized buffers: separate ones for control messages, contiguous for staged guest memory.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    ptr::NonNull,
};

use rustix::mm::{Advice, madvise};

use crate::fabric::MESSAGE_MAX;

/// Size of a huge page: pinned memory should not share pages with anything else.
const ALIGNMENT: usize = 2 << 20;

/// Buffers of [`MESSAGE_MAX`] bytes each.
pub(super) struct Buffers {
    start: NonNull<u8>,
    count: usize,
}

// SAFETY: plain memory. Completions decide who may touch a buffer: its owner may from the
// completion until the buffer is posted again.
unsafe impl Send for Buffers {}
// SAFETY: as for `Send`.
unsafe impl Sync for Buffers {}

fn layout(count: usize) -> Layout {
    match Layout::from_size_align(count * MESSAGE_MAX, ALIGNMENT) {
        Ok(layout) => layout,
        // Both factors are constants of the callers.
        Err(_) => unreachable!(),
    }
}

impl Buffers {
    pub(super) fn new(count: usize) -> Self {
        assert!(count > 0);
        // SAFETY: the size is not zero.
        let start = unsafe { alloc_zeroed(layout(count)) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout(count)) };
        // Without huge pages there are thousands of pages to pin. A kernel that does not support
        // the advice is fine too. Staged data is the guest's and must not appear in a core dump.
        for advice in [Advice::LinuxHugepage, Advice::LinuxDontDump] {
            // SAFETY: advice about the allocation, whose content it does not change.
            let _ = unsafe { madvise(start.as_ptr().cast(), count * MESSAGE_MAX, advice) };
        }
        Self { start, count }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// The memory of all buffers.
    pub(super) fn range(&self) -> (NonNull<u8>, usize) {
        (self.start, self.count * MESSAGE_MAX)
    }

    fn buffer(&self, index: usize) -> *mut u8 {
        assert!(index < self.count);
        // SAFETY: within the allocation.
        unsafe { self.start.as_ptr().add(index * MESSAGE_MAX) }
    }

    /// The address of a buffer, for a work request.
    pub(super) fn address(&self, index: usize) -> u64 {
        self.buffer(index) as u64
    }

    /// Copy a message into a buffer. Return its length.
    pub(super) fn fill(&self, index: usize, parts: [&[u8]; 2]) -> usize {
        let [header, payload] = parts;
        let length = header.len() + payload.len();
        assert!(length <= MESSAGE_MAX);
        let to = self.buffer(index);
        // SAFETY: both parts fit, as checked above; no device reads the buffer, because the caller
        // owns it (see the type), and the slices don't overlap it.
        unsafe {
            to.copy_from_nonoverlapping(header.as_ptr(), header.len());
            to.add(header.len()).copy_from_nonoverlapping(payload.as_ptr(), payload.len());
        }
        length
    }

    /// Copy bytes to offset `at` of the contiguous buffers. Return their address.
    pub(super) fn put(&self, at: usize, bytes: &[u8]) -> u64 {
        assert!(at.checked_add(bytes.len()).is_some_and(|end| end <= self.count * MESSAGE_MAX));
        // SAFETY: the range is within the allocation, as checked above; no device reads it, because
        // the caller owns it (see the type), and the slice doesn't overlap it.
        unsafe {
            let to = self.start.as_ptr().add(at);
            to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            to as u64
        }
    }

    /// Copy a message out of a buffer.
    pub(super) fn take(&self, index: usize, length: usize, message: &mut Vec<u8>) {
        assert!(length <= MESSAGE_MAX);
        message.clear();
        // SAFETY: the range is within the buffer, initialised, and owned by the caller.
        message.extend_from_slice(unsafe {
            std::slice::from_raw_parts(self.buffer(index).cast_const(), length)
        });
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout; the registration that held this is gone.
        unsafe { dealloc(self.start.as_ptr(), layout(self.count)) };
    }
}
