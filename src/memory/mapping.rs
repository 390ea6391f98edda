//! A shared mapping of part of a file.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    ptr::{self, NonNull},
};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// Since Linux 6.1 (asm-generic/mman-common.h).
const MADV_COLLAPSE: libc::c_int = 25;

/// A shared, writable mapping of guest RAM.
///
/// QEMU and the guest write the same memory, so it is only ever touched through raw pointers. A
/// torn or stale read is harmless: QEMU reports a page again when it is written again.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    length: usize,
    /// What to unmap: more than the mapping if an alignment was requested.
    whole: (NonNull<u8>, usize),
}

// SAFETY: the mapping is plain memory that stays valid until drop; no method hands out a
// reference into it, and all of them only pass its addresses to the kernel or copy bytes.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`; concurrent writers exist anyway (the guest), see the type's comment.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Map `length` bytes of `file` from `offset`; both are multiples of the file's page size.
    ///
    /// Huge pages are not reserved for it: QEMU has reserved them if configured so, and our code
    /// allocates each page before touching it.
    pub(super) fn new(file: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours.
        let start = unsafe { mmap(ptr::null_mut(), length, protection, flags, file, offset)? };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Self { start, length, whole: (start, length) }.not_dumped()
    }

    /// Like [`Self::new`], at a multiple of `alignment` bytes, which is a power of two.
    pub(super) fn aligned(
        file: BorrowedFd<'_>,
        offset: u64,
        length: usize,
        alignment: usize,
    ) -> io::Result<Self> {
        let reserved = length.checked_add(alignment).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours.
        let whole =
            unsafe { mmap_anonymous(ptr::null_mut(), reserved, ProtFlags::empty(), flags)? };
        let whole = NonNull::new(whole.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let before = whole.as_ptr().align_offset(alignment);
        // SAFETY: `before` is less than `alignment`, so this is within the reservation.
        let start = unsafe { whole.add(before) };
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // On failure the reservation is leaked: the kernel may have unmapped a part of it, where
        // another mapping may be by now.
        // SAFETY: the range is within the reservation just made, which nothing else uses.
        unsafe { mmap(start.as_ptr().cast(), length, protection, flags, file, offset)? };
        Self { start, length, whole: (whole, reserved) }.not_dumped()
    }

    /// Exclude guest memory from core dumps.
    fn not_dumped(self) -> io::Result<Self> {
        let start = self.start.as_ptr().cast();
        // SAFETY: advice about our own mapping, whose content it does not change.
        unsafe { madvise(start, self.length, Advice::LinuxDontDump)? };
        Ok(self)
    }

    /// Replace small pages with huge ones. Each huge page needs at least one small page.
    pub(super) fn collapse(&self, offset: u64, length: usize) -> io::Result<()> {
        let from = self.at(offset, length)?;
        // SAFETY: the range is mapped (`at`); its content stays as it is.
        let result = unsafe { libc::madvise(from.cast(), length, MADV_COLLAPSE) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Return the address of `offset`, after checking that `length` bytes from it are mapped.
    fn at(&self, offset: u64, length: usize) -> io::Result<*mut u8> {
        let fits = usize::try_from(offset)
            .ok()
            .filter(|at| at.checked_add(length).is_some_and(|end| end <= self.length));
        let Some(at) = fits else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the mapping"));
        };
        // SAFETY: `at + length` is within the mapping, as checked above.
        Ok(unsafe { self.start.as_ptr().add(at) })
    }

    /// Return the address of `length` bytes at `offset`.
    pub(super) fn pointer(&self, offset: u64, length: usize) -> io::Result<NonNull<u8>> {
        NonNull::new(self.at(offset, length)?).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Send up to `length` bytes from `offset` on a stream socket.
    pub(super) fn send_to(
        &self,
        socket: BorrowedFd<'_>,
        offset: u64,
        length: usize,
    ) -> io::Result<usize> {
        let from = self.at(offset, length)?;
        // SAFETY: the range is mapped (`at`); the kernel only reads it.
        let sent =
            unsafe { libc::send(socket.as_raw_fd(), from.cast(), length, libc::MSG_NOSIGNAL) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Receive up to `length` bytes from a stream socket to `offset`.
    pub(super) fn receive_from(
        &self,
        socket: BorrowedFd<'_>,
        offset: u64,
        length: usize,
    ) -> io::Result<usize> {
        let to = self.at(offset, length)?;
        // SAFETY: the range is mapped (`at`) writable; the kernel writes `length` bytes at most.
        let received = unsafe { libc::recv(socket.as_fd().as_raw_fd(), to.cast(), length, 0) };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    /// Copy `bytes` to `offset`.
    pub(super) fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let to = self.at(offset, bytes.len())?;
        // SAFETY: the range is mapped (`at`); `bytes` is ours, so the two can't overlap.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Write `length` zero bytes at `offset`.
    pub(super) fn zero(&self, offset: u64, length: usize) -> io::Result<()> {
        let to = self.at(offset, length)?;
        // SAFETY: the range is mapped (`at`) writable.
        unsafe { ptr::write_bytes(to, 0, length) };
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is what `mmap` returned, and no pointer into it outlives self. An error
        // could only mean that it is not a mapping, which `new` excludes.
        let _ = unsafe { munmap(self.whole.0.as_ptr().cast(), self.whole.1) };
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::OwnedFd};

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    const LENGTH: usize = 1 << 20;

    /// Permissions and flags of the mapping at `start`, from smaps.
    fn said(start: *const u8) -> (String, String) {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = smaps.lines();
        let head = format!("{:x}-", start as usize);
        let first = lines.find(|line| line.starts_with(&head)).unwrap();
        let flags = lines.find_map(|line| line.strip_prefix("VmFlags:")).unwrap();
        (first.split(' ').nth(1).unwrap().to_owned(), flags.to_owned())
    }

    #[test]
    fn no_mapping_is_for_a_core_dump() {
        let file: OwnedFd = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, LENGTH as u64).unwrap();
        for mapping in [
            Mapping::new(file.as_fd(), 0, LENGTH).unwrap(),
            Mapping::aligned(file.as_fd(), 0, LENGTH, 2 << 20).unwrap(),
        ] {
            let (permissions, flags) = said(mapping.start.as_ptr());
            assert_eq!(permissions, "rw-s");
            assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{flags}");
        }
    }
}
