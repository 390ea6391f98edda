//! The mapping of a block on hugetlbfs, whose pages are allocated before they are touched.
//!
//! If a page can't be allocated (the pool is empty, the mount or the control group is at its
//! limit), touching it through a mapping raises SIGBUS, while `fallocate` returns an error.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::retry_on_intr,
};

use super::mapping::Mapping;

/// A block's mapping, and which of its pages exist.
#[derive(Debug)]
pub(super) struct HugetlbMapping {
    mapping: Mapping,
    /// Where the block begins in its file.
    start: u64,
    /// Length of a page in bytes.
    page: u64,
    /// A bit for each page that is known to exist.
    exists: Box<[AtomicU64]>,
}

impl HugetlbMapping {
    /// Map `length` bytes of `file`, whose pages have `page` bytes, from `start`.
    pub(super) fn new(file: &OwnedFd, start: u64, length: u64, page: u64) -> io::Result<Self> {
        let mapped = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mapping = Mapping::new(file.as_fd(), start, mapped)?;
        let words = length.div_ceil(page.max(1)).div_ceil(64);
        let exists = (0..words).map(|_| AtomicU64::new(0)).collect();
        Ok(Self { mapping, start, page: page.max(1), exists })
    }

    /// The mapping, for callers that do not touch it themselves.
    pub(super) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Allocate the pages of `length` bytes at `offset`, and return the mapping. The pages are no
    /// longer holes, so the caller should be about to write them.
    pub(super) fn populated(
        &self,
        file: &OwnedFd,
        offset: u64,
        length: u64,
    ) -> io::Result<&Mapping> {
        let end = offset.saturating_add(length);
        for page in offset / self.page..end.div_ceil(self.page) {
            let word = self.exists.get((page / 64) as usize);
            let word = word.ok_or(io::ErrorKind::InvalidInput)?;
            let bit = 1 << (page % 64);
            if word.load(Ordering::Relaxed) & bit == 0 {
                let at = self.start + page * self.page;
                retry_on_intr(|| fallocate(file, FallocateFlags::KEEP_SIZE, at, self.page))?;
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
        Ok(&self.mapping)
    }
}
