//! Sockets with a name, also in directories that others may write: QEMU's own, above all.

use std::{
    ffi::OsString,
    io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::Path,
    sync::{Mutex, PoisonError},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, fchmod, openat, statat, unlinkat},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
    process::umask,
};

/// As many as the system allows.
const BACKLOG: i32 = -1;

/// Who sets the file mode creation mask, and back.
static UMASK: Mutex<()> = Mutex::new(());

/// Listen at `path`, with this mode. The socket has it before it has the name, which somebody else
/// might make another file's.
///
/// # Errors
/// The system's.
pub(super) fn listen_at(path: &Path, mode: Mode) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    fchmod(&socket, mode)?;
    let address = SocketAddrUnix::new(path)?;
    // It is the process's, where nobody else makes files meanwhile.
    let taken = UMASK.lock().unwrap_or_else(PoisonError::into_inner);
    let before = umask(Mode::empty());
    let bound = bind(&socket, &address);
    umask(before);
    drop(taken);
    bound?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// A name in a directory, which stays the same directory if somebody puts another in its place.
#[derive(Debug)]
pub(super) struct Place {
    directory: OwnedFd,
    name: OsString,
}

impl Place {
    /// Where `path` leads now.
    ///
    /// # Errors
    /// The system's; `InvalidInput` for a path without a name.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, parent.unwrap_or(Path::new(".")), flags, Mode::empty())?;
        Ok(Self { directory, name })
    }

    fn stat(&self) -> io::Result<Stat> {
        Ok(statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// There is a socket.
    pub(super) fn has_socket(&self) -> bool {
        let is_socket = |stat: Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket;
        self.stat().is_ok_and(is_socket)
    }

    /// Remove what is there.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn remove(&self) -> io::Result<()> {
        Ok(unlinkat(&self.directory, &self.name, AtFlags::empty())?)
    }
}

/// The file of a socket, which goes with it.
#[derive(Debug)]
pub(super) struct SocketFile {
    place: Place,
    /// Which file it is: another QEMU that was started at this path since has its own there.
    identity: (u64, u64),
}

impl SocketFile {
    /// The file at `path`; `None` if there is none any more.
    pub(super) fn open(path: &Path) -> Option<Self> {
        let place = Place::open(path).ok()?;
        let stat = place.stat().ok()?;
        Some(Self { place, identity: (stat.st_dev, stat.st_ino) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.place.stat().is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.identity) {
            // Somebody else may be just about to remove it.
            let _ = self.place.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::{
            fs::{PermissionsExt as _, symlink},
            net::UnixStream,
        },
        path::PathBuf,
        sync::atomic::{AtomicBool, AtomicUsize, Ordering},
        thread,
    };

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_socket_has_its_mode_from_the_start() {
        let dir = tempfile::tempdir().unwrap();
        for bits in [0o600, 0o666] {
            let path = dir.path().join(format!("{bits:o}"));
            let _listener = listen_at(&path, Mode::from_raw_mode(bits)).unwrap();
            assert_eq!(mode(&path), bits);
            UnixStream::connect(&path).unwrap();
        }
    }

    /// Whoever owns the directory puts a link in the place of each new socket.
    #[test]
    fn no_link_is_followed_to_another_file() {
        const TRIES: usize = 300;
        let dir = tempfile::tempdir().unwrap();
        let (victim, path) = (dir.path().join("victim"), dir.path().join("socket"));
        fs::write(&victim, "").unwrap();
        fs::set_permissions(&victim, fs::Permissions::from_mode(0o640)).unwrap();
        let (done, swapped) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                let link = dir.path().join("link");
                while !done.load(Ordering::Relaxed) {
                    let _ = symlink(&victim, &link);
                    let there = fs::symlink_metadata(&path);
                    if there.is_ok_and(|there| !there.is_symlink()) {
                        fs::rename(&link, &path).unwrap();
                        swapped.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
            for turn in 0..TRIES {
                let listener = listen_at(&path, Mode::from_raw_mode(0o666)).unwrap();
                let file = SocketFile::open(&path);
                assert_eq!(mode(&victim), 0o640, "{turn}");
                while swapped.load(Ordering::Relaxed) <= turn {
                    thread::yield_now();
                }
                drop((file, listener));
                assert!(victim.exists());
                let _ = fs::remove_file(&path);
            }
            done.store(true, Ordering::Relaxed);
        });
        assert_eq!(swapped.into_inner(), TRIES);
    }

    /// Whoever owns the directory above puts a link to another in its place.
    #[test]
    fn nothing_is_removed_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| -> PathBuf { dir.path().join(path) };
        fs::create_dir(at("ours")).unwrap();
        fs::create_dir(at("theirs")).unwrap();
        let listener = listen_at(&at("ours/socket"), Mode::RUSR).unwrap();
        let file = SocketFile::open(&at("ours/socket")).unwrap();
        fs::hard_link(at("ours/socket"), at("theirs/socket")).unwrap();
        fs::rename(at("ours"), at("moved")).unwrap();
        symlink(at("theirs"), at("ours")).unwrap();
        drop((file, listener));
        assert!(at("theirs/socket").exists());
        assert!(!at("moved/socket").exists());
    }

    #[test]
    fn a_successors_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = listen_at(&path, Mode::RUSR).unwrap();
        let file = SocketFile::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _successor = listen_at(&path, Mode::RUSR).unwrap();
        drop((file, listener));
        assert!(Place::open(&path).unwrap().has_socket());
    }
}
