//! Buffers of one size each, for control messages and for copies of guest memory.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    io,
    ptr::NonNull,
};

use rustix::mm::{Advice, madvise};

use crate::{fabric::MESSAGE_MAX, memory::Region};

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
        // no, and that is well too.
        // SAFETY: advice about the allocation, whose content it does not change.
        let _ =
            unsafe { madvise(start.as_ptr().cast(), count * MESSAGE_MAX, Advice::LinuxHugepage) };
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

    /// Put `length` bytes of a region into one.
    pub(super) fn copy(
        &self,
        index: usize,
        region: &Region,
        offset: u64,
        length: usize,
    ) -> io::Result<()> {
        assert!(length <= MESSAGE_MAX);
        // SAFETY: within the buffer, initialised, and owned by who calls (see the type).
        let to = unsafe { std::slice::from_raw_parts_mut(self.buffer(index), length) };
        region.read_at(to, offset)
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
