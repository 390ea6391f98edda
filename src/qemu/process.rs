//! QEMU's process, as /proc shows it.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read as _},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
};

use rustix::{
    fs::{CWD, Dir, Mode, OFlags, open, openat},
    io::Errno,
};

/// The directory of a process in /proc. As long as it is open it is that process's, even if another
/// gets the number.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    directory: Result<OwnedFd, Errno>,
}

impl Process {
    /// The process `pid`. That it can't be found shows when it is looked into.
    pub fn open(pid: u32) -> Self {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Self { pid, directory: open(format!("/proc/{pid}"), flags, Mode::empty()) }
    }

    /// Nothing of it may be looked at: it is not certain who it is.
    pub fn unknown(pid: u32) -> Self {
        Self { pid, directory: Err(Errno::SRCH) }
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    fn open_at(&self, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
        let directory = self.directory.as_ref().map_err(|errno| *errno)?;
        Ok(openat(directory, path, flags | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// What it has mapped.
    pub(super) fn maps(&self) -> io::Result<String> {
        let mut text = String::new();
        File::from(self.open_at("maps", OFlags::RDONLY)?).read_to_string(&mut text)?;
        Ok(text)
    }

    /// The numbers of its descriptors.
    pub(super) fn descriptors(&self) -> io::Result<Vec<CString>> {
        let directory = self.open_at("fd", OFlags::RDONLY | OFlags::DIRECTORY)?;
        let entries = Dir::new(directory)?.map(|entry| Ok(entry?.file_name().to_owned()));
        let entries: io::Result<Vec<_>> = entries.collect();
        Ok(entries?.into_iter().filter(|name| !name.as_bytes().starts_with(b".")).collect())
    }

    /// What its descriptor `number` is now.
    pub(super) fn descriptor(&self, number: &CString) -> io::Result<Found> {
        let path = format!("fd/{}", number.to_string_lossy());
        Ok(Found(self.open_at(&path, OFlags::PATH)?))
    }
}

/// A file that was found, and not opened: what it is can be looked at, without a trace and whatever it
/// is.
#[derive(Debug)]
pub(super) struct Found(OwnedFd);

impl Found {
    /// What is at `path` now.
    pub(super) fn at(path: &str) -> io::Result<Self> {
        Ok(Self(openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// The device and the number of a regular file; `None` for anything else.
    pub(super) fn identity(&self) -> Option<((u32, u32), u64)> {
        use rustix::fs::{AtFlags, FileType, StatxFlags, statx};

        // What is known of it: a file system of QEMU's own may never answer.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = statx(self.0.as_fd(), "", flags, StatxFlags::TYPE | StatxFlags::INO).ok()?;
        let regular = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::RegularFile;
        regular.then_some(((stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino))
    }

    /// Open this file, whatever has the name or the number by now under which it was found.
    pub(super) fn open(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        Ok(open(path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_that_has_ended_is_no_other() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = Process::open(child.id());
        assert!(!process.maps().unwrap().is_empty());
        assert!(process.descriptors().unwrap().iter().any(|number| number.as_bytes() == b"0"));
        child.kill().unwrap();
        child.wait().unwrap();
        // Whoever has its number by now.
        assert_eq!(process.maps().unwrap_err().raw_os_error(), Some(libc::ESRCH));
        assert!(process.descriptors().is_err());
    }

    #[test]
    fn only_regular_files_are_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let found = |path: &str| Found::at(path).unwrap();
        assert!(found(path.to_str().unwrap()).identity().is_some());
        assert!(found("/dev/null").identity().is_none());
        assert!(found("/tmp").identity().is_none());
        found(path.to_str().unwrap()).open().unwrap();
    }
}
