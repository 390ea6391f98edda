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

/// A process's directory in /proc. While it is open it belongs to that process, even if the PID is
/// reused.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    directory: Result<OwnedFd, Errno>,
}

impl Process {
    /// Open the directory of process `pid`. A failure is reported at the first access.
    pub fn open(pid: u32) -> Self {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Self { pid, directory: open(format!("/proc/{pid}"), flags, Mode::empty()) }
    }

    /// A process that must not be inspected, because its identity is uncertain.
    pub fn unknown(pid: u32) -> Self {
        Self { pid, directory: Err(Errno::SRCH) }
    }

    /// Its PID.
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

    /// Its mappings (`maps`).
    pub(super) fn maps(&self) -> io::Result<String> {
        self.read("maps")
    }

    /// The numbers of its descriptors, from fdinfo/: only the process's user may list fd/, while
    /// CAP_SYS_PTRACE is enough for fdinfo/.
    pub(super) fn descriptors(&self) -> io::Result<Vec<RawFd>> {
        let mut numbers = Vec::new();
        for entry in Dir::new(self.open_at("fdinfo", OFlags::RDONLY | OFlags::DIRECTORY)?)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            numbers.extend(name.parse::<RawFd>());
        }
        Ok(numbers)
    }

    /// What its descriptor `number` is now; of use only if it is a file with this `inode` number.
    pub(super) fn descriptor(&self, number: RawFd, inode: u64) -> io::Result<Found> {
        match self.open_at(&format!("fd/{number}"), OFlags::PATH) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                self.take(number, inode).map(Found)
            }
            found => Ok(Found(found?)),
        }
    }

    /// Take its descriptor `number` if it is a file with this `inode` number. No other, because
    /// closing a file may have effects.
    ///
    /// If the PID was reused, the descriptor is another process's. So check this process's mappings
    /// afterwards: if it has any, the PID was its own until then.
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

/// A file that was found but not opened, so that inspecting it has no side effects, whatever it is.
/// Or a descriptor taken from QEMU.
#[derive(Debug)]
pub(super) struct Found(OwnedFd);

impl Found {
    /// Hold what is at `path` now.
    pub(super) fn at(path: &str) -> io::Result<Self> {
        Ok(Self(openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// Device and inode number of a regular file; `None` for anything else.
    pub(super) fn identity(&self) -> Option<((u32, u32), u64)> {
        use rustix::fs::{AtFlags, FileType, StatxFlags, statx};

        // Cached attributes only: a file system that QEMU provides may never answer.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = statx(self.0.as_fd(), "", flags, StatxFlags::TYPE | StatxFlags::INO).ok()?;
        let regular = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::RegularFile;
        regular.then_some(((stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino))
    }

    /// Open this very file, whatever its path or descriptor number refers to by now.
    ///
    /// If its permissions admit only QEMU's user, use QEMU's own descriptor: the file position is
    /// then shared, but nothing uses it.
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
        // Whatever process has its PID by now.
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
