//! Buffers of one size each, for control messages; in a row, for staged guest memory.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    ptr::NonNull,
};

use rustix::mm::{Advice, madvise};

use crate::fabric::MESSAGE_MAX;

/// Size of a huge page: what is pinned should not share pages with anything else.
const ALIGNMENT: usize = 2 << 20;

/// So many buffers of [`MESSAGE_MAX`] bytes each.
pub(super) struct Buffers {
    start: NonNull<u8>,
    count: usize,
}

// SAFETY: plain memory. Who may touch which buffer when is told by completions: a buffer is its
// owner's from its completion until it is posted again.
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
        // Pinned page by page otherwise, of which there are thousands. A kernel without them says
        // no, and that is well too. What is staged is the guest's, and nothing for a core dump.
        for advice in [Advice::LinuxHugepage, Advice::LinuxDontDump] {
            // SAFETY: advice about the allocation, whose content it does not change.
            let _ = unsafe { madvise(start.as_ptr().cast(), count * MESSAGE_MAX, advice) };
        }
        Self { start, count }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// All of them.
    pub(super) fn range(&self) -> (NonNull<u8>, usize) {
        (self.start, self.count * MESSAGE_MAX)
    }

    fn buffer(&self, index: usize) -> *mut u8 {
        assert!(index < self.count);
        // SAFETY: within the allocation.
        unsafe { self.start.as_ptr().add(index * MESSAGE_MAX) }
    }

    /// The address of one, for a work request.
    pub(super) fn address(&self, index: usize) -> u64 {
        self.buffer(index) as u64
    }

    /// Put a message into one; returns its length.
    pub(super) fn fill(&self, index: usize, parts: [&[u8]; 2]) -> usize {
        let [header, payload] = parts;
        let length = header.len() + payload.len();
        assert!(length <= MESSAGE_MAX);
        let to = self.buffer(index);
        // SAFETY: both parts fit, as was checked; no device reads the buffer, because the one who
        // calls owns it (see the type), and our slices don't overlap it.
        unsafe {
            to.copy_from_nonoverlapping(header.as_ptr(), header.len());
            to.add(header.len()).copy_from_nonoverlapping(payload.as_ptr(), payload.len());
        }
        length
    }

    /// Put bytes at `at` of all buffers, which lie in a row; returns their address.
    pub(super) fn put(&self, at: usize, bytes: &[u8]) -> u64 {
        assert!(at.checked_add(bytes.len()).is_some_and(|end| end <= self.count * MESSAGE_MAX));
        // SAFETY: the range is within the allocation, as was checked; no device reads it, because
        // the one who calls owns it (see the type), and our slice doesn't overlap it.
        unsafe {
            let to = self.start.as_ptr().add(at);
            to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            to as u64
        }
    }

    /// Take a message out of one.
    pub(super) fn take(&self, index: usize, length: usize, message: &mut Vec<u8>) {
        assert!(length <= MESSAGE_MAX);
        message.clear();
        // SAFETY: the range is within the buffer, initialised, and owned by who calls.
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
