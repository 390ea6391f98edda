//! `/proc/PID/maps`: which file backs an address of QEMU.

use std::{io, ops::Range, os::fd::OwnedFd};

use super::process::{Found, Process};

/// A shared, writable mapping of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileMapping {
    /// First address.
    pub start: u64,
    /// End address, exclusive.
    pub end: u64,
    /// File offset of `start`.
    pub offset: u64,
    device: (u32, u32),
    inode: u64,
    /// The file's path, as /proc shows it.
    pub path: String,
}

impl FileMapping {
    /// Whether both map the same file.
    pub(super) fn same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// Open the file that `process` has mapped. Search its descriptors first, because a memfd has
    /// no other name, then the path.
    ///
    /// The process controls both, and may be less privileged than the helper. So the file is held
    /// and compared before it is opened. While it is held, no other file gets its inode number; and
    /// if the process has it mapped then, shared and writable, the process could write it by
    /// itself.
    ///
    /// Hold the file with `O_PATH` rather than take the descriptor with pidfd_getfd(2), which Yama
    /// and containers forbid to a helper that runs as QEMU's user.
    pub(super) fn open(&self, process: &Process) -> io::Result<OwnedFd> {
        let found = self.find(process)?;
        let now = parse(&process.maps()?);
        let is_here = |other: &Self| other.start <= self.start && self.start < other.end;
        if !now.iter().any(|other| is_here(other) && self.same_file(other)) {
            return Err(self.is_gone());
        }
        found.open()
    }

    fn find(&self, process: &Process) -> io::Result<Found> {
        let is_it = |found: &Found| found.identity() == Some((self.device, self.inode));
        let mut denied = None;
        for number in process.descriptors()? {
            match process.descriptor(number, self.inode) {
                Ok(found) if is_it(&found) => return Ok(found),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    denied = Some(error);
                }
                // Another file, or a descriptor closed meanwhile.
                _ => {}
            }
        }
        match Found::at(&self.path) {
            Ok(found) if is_it(&found) => Ok(found),
            Ok(_) => Err(self.is_gone()),
            Err(error) => Err(denied.unwrap_or(error)),
        }
    }

    fn is_gone(&self) -> io::Error {
        let why = format!("{} is not the file that QEMU has mapped any more", self.path);
        io::Error::new(io::ErrorKind::NotFound, why)
    }
}

/// Parse the shared, writable file mappings in `text`, in address order.
pub(super) fn parse(text: &str) -> Vec<FileMapping> {
    text.lines().filter_map(parse_line).collect()
}

/// Whether anything is mapped at `address`.
pub(super) fn is_mapped(text: &str, address: u64) -> bool {
    let is_there = |line: &str| Some(range(line.split(' ').next()?)?.contains(&address));
    text.lines().any(|line| is_there(line) == Some(true))
}

/// Whether the mapping at `address` is private: no other process sees writes to it.
pub(super) fn is_private(text: &str, address: u64) -> bool {
    let private = |line: &str| {
        let mut words = line.split(' ');
        Some(range(words.next()?)?.contains(&address) && words.next()?.ends_with('p'))
    };
    text.lines().any(|line| private(line) == Some(true))
}

fn range(word: &str) -> Option<Range<u64>> {
    let (start, end) = word.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

fn parse_line(line: &str) -> Option<FileMapping> {
    let mut words = line.splitn(6, ' ');
    let Range { start, end } = range(words.next()?)?;
    let permissions = words.next()?;
    let (offset, device, inode) = (words.next()?, words.next()?, words.next()?);
    let (major, minor) = device.split_once(':')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let inode = inode.parse().ok()?;
    if permissions != "rw-s" || inode == 0 {
        return None;
    }
    Some(FileMapping {
        start,
        end,
        offset: hex(offset)?,
        device: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
        inode,
        path: words.next().unwrap_or_default().trim().to_owned(),
    })
}

/// The file that backs `length` bytes from `address`, and the offset in it. Mappings that the
/// kernel has split are joined.
pub(super) fn backing(
    mappings: &[FileMapping],
    address: u64,
    length: u64,
) -> Option<(&FileMapping, u64)> {
    let first = mappings.iter().position(|m| m.start <= address && address < m.end)?;
    let mapping = &mappings[first];
    let end = address.checked_add(length)?;
    let mut reached = mapping.end;
    for next in &mappings[first + 1..] {
        let file_offset = mapping.offset.checked_add(reached - mapping.start);
        let continues = next.start == reached && next.same_file(mapping);
        if reached >= end || !continues || Some(next.offset) != file_offset {
            break;
        }
        reached = next.end;
    }
    let offset = mapping.offset.checked_add(address - mapping.start)?;
    (reached >= end).then_some((mapping, offset))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::MetadataExt as _};

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;
    use crate::memory::Region;

    const LENGTH: u64 = 1 << 20;

    /// The parsed mapping of a file in this process, and the region that keeps it mapped.
    fn mapped(file: impl Into<OwnedFd>) -> (FileMapping, Region) {
        let region = Region::new("ram0", file.into(), 0, LENGTH).unwrap();
        let (address, _) = region.mapped(0, LENGTH).unwrap();
        let address = address.as_ptr() as u64;
        let mappings = parse(&ourselves().maps().unwrap());
        let known = mappings.into_iter().find(|it| it.start <= address && address < it.end);
        (known.unwrap(), region)
    }

    fn ourselves() -> Process {
        Process::open(std::process::id())
    }

    fn inode(file: OwnedFd) -> u64 {
        File::from(file).metadata().unwrap().ino()
    }

    /// A process may have a descriptor of a file that it must not write. So a file is opened only
    /// if it is mapped writable at that very address.
    #[test]
    fn what_is_not_mapped_any_more_is_not_opened() {
        let memfd = memfd_create("ram0", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memfd, LENGTH).unwrap();
        let (mapping, region) = mapped(memfd.try_clone().unwrap());
        assert_eq!(inode(mapping.open(&ourselves()).unwrap()), mapping.inode);
        drop(region);
        // Its descriptor still leads to it.
        assert!(mapping.find(&ourselves()).is_ok());
        assert_eq!(mapping.open(&ourselves()).unwrap_err().kind(), io::ErrorKind::NotFound);
        drop(memfd);
    }

    const MAPS: &str = "\
7ff9dffff000-7ff9e7fff000 rw-s 00000000 00:01 1115                       /memfd:memory-backend-memfd (deleted)
7ff9e7fff000-7ff9e8000000 ---p 00000000 00:00 0
7ffa07fff000-7ffa0ffff000 rw-s 00001000 00:01 1113                       /dev/shm/a b
7ffa0ffff000-7ffa17fff000 rw-s 08001000 00:01 1113                       /dev/shm/a b
7ffa17fff000-7ffa18fff000 r--s 00000000 00:01 1114                       /memfd:x (deleted)
";

    #[test]
    fn only_shared_writable_files_count() {
        let mappings = parse(MAPS);
        assert_eq!(mappings.len(), 3);
        assert_eq!(mappings[1].path, "/dev/shm/a b");
    }

    #[test]
    fn private_mappings_are_seen() {
        assert!(is_mapped(MAPS, 0x7ff9_e7ff_f000));
        assert!(is_mapped(MAPS, 0x7ffa_18ff_efff));
        assert!(!is_mapped(MAPS, 0x7ffa_18ff_f000));
        assert!(!is_mapped("nonsense", 0));
    }

    #[test]
    fn split_mappings_are_joined() {
        let mappings = parse(MAPS);
        let (file, offset) = backing(&mappings, 0x7ffa_0800_0000, 0x0fff_f000).unwrap();
        assert_eq!((file.path.as_str(), offset), ("/dev/shm/a b", 0x2000));
        assert!(backing(&mappings, 0x7ffa_0800_0000, 0x1000_0000).is_none());
        assert!(backing(&mappings, 0x1000, 0x1000).is_none());
        assert!(backing(&mappings, 0x7ffa_0800_0000, u64::MAX).is_none());
    }
}
