//! Explanations for users of why a block's memory could not be read or written.

use std::{fs, io, os::fd::OwnedFd};

use rustix::{
    fs::{fstat, fstatfs},
    io::Errno,
};

/// `f_type` of hugetlbfs (linux/magic.h), memfds with MFD_HUGETLB included.
pub(super) const HUGETLBFS_MAGIC: u64 = 0x958458f6;

/// Explain an error from accessing the memory of `file`; return it unchanged if clear by itself.
pub(super) fn explain(file: &OwnedFd, error: io::Error) -> io::Error {
    let text = match error.raw_os_error().map(Errno::from_raw_os_error) {
        // EFAULT: the kernel could not fault in a page of a mapping.
        Some(Errno::NOSPC | Errno::FAULT | Errno::NOMEM) => shortage(file, &error),
        Some(Errno::IO | Errno::HWPOISON) => Some(broken(&error)),
        _ => None,
    };
    let kind = error.kind();
    text.map_or(error, |text| io::Error::new(kind, text))
}

fn broken(error: &io::Error) -> String {
    format!(
        "its memory can't be read or written ({error}); the host's kernel log says whether a memory \
         module is broken"
    )
}

/// Describe which memory is short, and what helps.
fn shortage(file: &OwnedFd, error: &io::Error) -> Option<String> {
    let (stat, file_system) = (fstat(file).ok()?, fstatfs(file).ok()?);
    let (size, exists) = (stat.st_size.cast_unsigned(), stat.st_blocks.cast_unsigned() * 512);
    if exists >= size {
        return (error.raw_os_error() == Some(libc::EFAULT)).then(|| broken(error));
    }
    if file_system.f_type.cast_unsigned() == HUGETLBFS_MAGIC {
        let page = file_system.f_bsize.cast_unsigned().max(1);
        let (all, there) = (size.div_ceil(page), exists / page);
        let pool = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page >> 10);
        let free = fs::read_to_string(format!("{pool}/free_hugepages")).unwrap_or_default();
        return Some(format!(
            "{} of the {all} huge pages of {} KiB of its file do not exist yet, and no more can be had \
             ({} are free on the host: {error}); raise {pool}/nr_hugepages, or the limit of the mount \
             or control group, or have QEMU preallocate the memory (prealloc=on)",
            all.saturating_sub(there),
            page >> 10,
            free.trim(),
        ));
    }
    Some(format!(
        "{} of the {} MiB of its file do not exist yet, and no more can be had ({error}); enlarge the \
         file system that the memory is on, or free memory of the host",
        size.saturating_sub(exists) >> 20,
        size >> 20,
    ))
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    fn said(file: &OwnedFd, errno: Errno) -> String {
        explain(file, errno.into()).to_string()
    }

    #[test]
    fn what_is_missing_is_said() {
        let file = memfd_create("short", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 8 << 20).unwrap();
        rustix::io::pwrite(&file, &[1; 1 << 20], 0).unwrap();
        for errno in [Errno::NOSPC, Errno::FAULT, Errno::NOMEM] {
            let text = said(&file, errno);
            assert!(text.contains("7 of the 8 MiB of its file do not exist yet"), "{text}");
        }
        assert!(said(&file, Errno::IO).contains("memory module"));
        // A socket's errors are not the memory's.
        for errno in [Errno::CONNRESET, Errno::AGAIN] {
            assert_eq!(explain(&file, errno.into()).raw_os_error(), Some(errno.raw_os_error()));
        }
        rustix::io::pwrite(&file, &vec![1; 8 << 20], 0).unwrap();
        assert!(said(&file, Errno::FAULT).contains("memory module"));
        assert_eq!(explain(&file, Errno::NOMEM.into()).raw_os_error(), Some(libc::ENOMEM));
    }
}
