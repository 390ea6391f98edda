//! Unix socket files, also in directories that others, above all QEMU, may write to.

use std::{
    ffi::OsString,
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, fchmod, fstat, openat, statat, unlinkat},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
    process::umask,
};
use tokio::net::UnixStream;

/// The longest backlog that the system allows.
const BACKLOG: i32 = -1;

/// Held while the file mode creation mask is changed.
static UMASK: Mutex<()> = Mutex::new(());

/// A file name in a directory that is kept open: all operations happen in that directory, even if
/// another one takes over its path.
#[derive(Debug)]
pub(super) struct Place {
    directory: OwnedFd,
    name: OsString,
}

impl Place {
    /// Resolve `path` now.
    ///
    /// # Errors
    /// An I/O error from the system; `InvalidInput` for a path without a file name.
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

    /// Return whether there is a socket.
    pub(super) fn has_socket(&self) -> bool {
        let is_socket = |stat: Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket;
        self.stat().is_ok_and(is_socket)
    }

    /// Return a path to the file through the open directory.
    fn path(&self) -> PathBuf {
        Path::new("/proc/self/fd").join(self.directory.as_raw_fd().to_string()).join(&self.name)
    }

    /// Connect to the socket.
    ///
    /// # Errors
    /// An I/O error from the system; `InvalidInput` for a symbolic link or another type of file.
    pub(super) async fn connect(&self) -> io::Result<UnixStream> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&self.directory, &self.name, flags, Mode::empty())?;
        let why = match FileType::from_raw_mode(fstat(&file)?.st_mode) {
            FileType::Socket => None,
            FileType::Symlink => {
                Some("it is a symbolic link, whose target may change; give the socket's own path")
            }
            _ => Some("it is not a socket"),
        };
        if let Some(why) = why {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        UnixStream::connect(format!("/proc/self/fd/{}", file.as_raw_fd())).await
    }

    /// Listen here, with this file mode. The mode is set before `bind`: afterwards the name may
    /// refer to another file.
    ///
    /// # Errors
    /// An I/O error from the system.
    pub(super) fn listen(&self, mode: Mode) -> io::Result<UnixListener> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        fchmod(&socket, mode)?;
        let address = SocketAddrUnix::new(self.path())?;
        // The mask is per process; nothing else creates files meanwhile.
        let taken = UMASK.lock().unwrap_or_else(PoisonError::into_inner);
        let before = umask(Mode::empty());
        let bound = bind(&socket, &address);
        umask(before);
        drop(taken);
        bound?;
        listen(&socket, BACKLOG)?;
        Ok(socket.into())
    }

    /// Remove the file.
    ///
    /// # Errors
    /// An I/O error from the system.
    pub(super) fn remove(&self) -> io::Result<()> {
        Ok(unlinkat(&self.directory, &self.name, AtFlags::empty())?)
    }
}

/// The file of a socket, removed on drop.
#[derive(Debug)]
pub(super) struct SocketFile {
    place: Place,
    /// Device and inode: a QEMU started later may have its own socket at the same path.
    identity: (u64, u64),
}

impl SocketFile {
    /// Identify the file at `place`; `None` if it is gone.
    pub(super) fn at(place: Place) -> Option<Self> {
        let stat = place.stat().ok()?;
        Some(Self { place, identity: (stat.st_dev, stat.st_ino) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.place.stat().is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.identity) {
            // Another process may be about to remove it.
            let _ = self.place.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        mem::MaybeUninit,
        os::unix::{
            fs::{PermissionsExt as _, symlink},
            net::UnixStream,
        },
        sync::atomic::{AtomicBool, AtomicUsize, Ordering},
        thread,
    };

    use rustix::{
        fs::inotify::{self, ReadFlags, WatchFlags},
        io::Errno,
    };

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn listen_at(path: &Path, mode: Mode) -> io::Result<UnixListener> {
        Place::open(path)?.listen(mode)
    }

    /// No change of its mode follows, so nobody has seen another one.
    #[test]
    fn a_socket_has_its_mode_from_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        let what = WatchFlags::CREATE | WatchFlags::ATTRIB | WatchFlags::MOVED_TO;
        inotify::add_watch(&watch, dir.path(), what).unwrap();
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(watch, &mut space);
        for bits in [0o600, 0o666] {
            let path = dir.path().join(format!("{bits:o}"));
            let _listener = listen_at(&path, Mode::from_raw_mode(bits)).unwrap();
            assert_eq!(mode(&path), bits);
            UnixStream::connect(&path).unwrap();
            assert_eq!(events.next().unwrap().events(), ReadFlags::CREATE);
            assert_eq!(events.next().unwrap_err(), Errno::AGAIN);
        }
    }

    /// The owner of the parent directory replaces the directory.
    #[test]
    fn all_is_done_in_one_directory() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| -> PathBuf { dir.path().join(path) };
        fs::create_dir(at("ours")).unwrap();
        fs::create_dir(at("theirs")).unwrap();
        let place = Place::open(&at("ours/socket")).unwrap();
        fs::rename(at("ours"), at("moved")).unwrap();
        fs::rename(at("theirs"), at("ours")).unwrap();
        let listener = place.listen(Mode::RUSR).unwrap();
        assert!(at("moved/socket").exists() && !at("ours/socket").exists());
        let theirs = listen_at(&at("ours/socket"), Mode::RUSR).unwrap();
        assert!(place.has_socket());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let _client = runtime.block_on(place.connect()).unwrap();
        listener.accept().unwrap();
        assert_eq!(theirs.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop((SocketFile::at(place), listener));
        assert!(!at("moved/socket").exists() && at("ours/socket").exists());
    }

    #[tokio::test]
    async fn no_link_is_followed_to_anothers_socket() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, link) = (dir.path().join("socket"), dir.path().join("link"));
        let _listener = listen_at(&socket, Mode::RUSR | Mode::WUSR).unwrap();
        symlink(&socket, &link).unwrap();
        Place::open(&socket).unwrap().connect().await.unwrap();
        let error = Place::open(&link).unwrap().connect().await.unwrap_err();
        assert!(error.to_string().contains("it is a symbolic link"), "{error}");
        let error = Place::open(dir.path()).unwrap().connect().await.unwrap_err();
        assert_eq!(error.to_string(), "it is not a socket");
        let error = Place::open(&dir.path().join("none")).unwrap().connect().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    /// The owner of the directory replaces each new socket by a symbolic link.
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
                let file = SocketFile::at(Place::open(&path).unwrap());
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

    /// The owner of the parent directory replaces the directory by a symbolic link to another one.
    #[test]
    fn nothing_is_removed_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| -> PathBuf { dir.path().join(path) };
        fs::create_dir(at("ours")).unwrap();
        fs::create_dir(at("theirs")).unwrap();
        let listener = listen_at(&at("ours/socket"), Mode::RUSR).unwrap();
        let file = SocketFile::at(Place::open(&at("ours/socket")).unwrap()).unwrap();
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
        let file = SocketFile::at(Place::open(&path).unwrap()).unwrap();
        fs::remove_file(&path).unwrap();
        let _successor = listen_at(&path, Mode::RUSR).unwrap();
        drop((file, listener));
        assert!(Place::open(&path).unwrap().has_socket());
    }
}
