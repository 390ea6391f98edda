//! QEMU's process, as /proc shows it.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
};

use rustix::{
    fs::{CWD, Dir, Mode, OFlags, fcntl_getfl, open, openat},
    io::Errno,
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
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

    fn read(&self, path: &str) -> io::Result<String> {
        let mut text = String::new();
        File::from(self.open_at(path, OFlags::RDONLY)?).read_to_string(&mut text)?;
        Ok(text)
    }

    /// What it has mapped.
    pub(super) fn maps(&self) -> io::Result<String> {
        self.read("maps")
    }

    /// The numbers of its descriptors, which are not in fd/ alone: that is its user's, while to trace it
    /// (CAP_SYS_PTRACE) is enough for fdinfo/.
    pub(super) fn descriptors(&self) -> io::Result<Vec<RawFd>> {
        let mut numbers = Vec::new();
        for entry in Dir::new(self.open_at("fdinfo", OFlags::RDONLY | OFlags::DIRECTORY)?)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            numbers.extend(name.parse::<RawFd>());
        }
        Ok(numbers)
    }

    /// What its descriptor `number` is now, of use only if it is a file with this `inode` number.
    pub(super) fn descriptor(&self, number: RawFd, inode: u64) -> io::Result<Found> {
        match self.open_at(&format!("fd/{number}"), OFlags::PATH) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                self.take(number, inode).map(Found)
            }
            found => Ok(Found(found?)),
        }
    }

    /// Take its descriptor `number`, if that is a file with this `inode` number: not any, because to let
    /// go of a file may have effects.
    ///
    /// It is another's, if that has the process's number by now. So look at this one's mappings
    /// afterwards: whoever has some had its number until then.
    fn take(&self, number: RawFd, inode: u64) -> io::Result<OwnedFd> {
        let info = self.read(&format!("fdinfo/{number}"))?;
        let shown = info.lines().find_map(|line| line.strip_prefix("ino:"));
        if shown.and_then(|shown| shown.trim().parse().ok()) != Some(inode) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        Ok(pidfd_getfd(process, number, PidfdGetfdFlags::empty())?)
    }
}

/// A file that was found, and not opened: what it is can be looked at, without a trace and whatever it
/// is. Or QEMU's own descriptor of one.
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
    ///
    /// Where its permissions are for QEMU's user alone, QEMU's own descriptor does: nobody has a use for
    /// the position that is shared then.
    pub(super) fn open(self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match open(path, flags, Mode::empty()) {
            Err(Errno::ACCESS) if self.is_open_for_writing() => Ok(self.0),
            opened => Ok(opened?),
        }
    }

    fn is_open_for_writing(&self) -> bool {
        fcntl_getfl(&self.0).is_ok_and(|flags| flags & OFlags::RWMODE == OFlags::RDWR)
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
        assert!(process.descriptors().unwrap().contains(&0));
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
