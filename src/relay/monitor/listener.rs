//! Where a monitor's clients connect.

use std::{
    io,
    os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::Mode;
use tokio::{
    net::{UnixListener, UnixStream},
    time::{Instant, sleep, sleep_until},
};
use tracing::debug;

use crate::relay::socket_file::{Place, SocketFile};

/// Delay before a failed `accept` is retried.
const PAUSE: Duration = Duration::from_secs(1);

/// Source of clients, one at a time.
pub enum MonitorListener {
    /// Clients connect to a socket.
    Listening(ServedSocket),
    /// One connected client; no other will follow.
    Connected(Option<UnixStream>),
    /// The relay connects to the client, again and again.
    Connecting {
        /// The client's socket.
        path: PathBuf,
        /// Interval between attempts.
        every: Duration,
        /// Time of the next attempt.
        next: Instant,
    },
}

impl MonitorListener {
    /// Create a listener without clients.
    pub fn closed() -> Self {
        Self::Connected(None)
    }

    /// Use a socket that listens already, and remove the file at `path` on drop.
    ///
    /// # Errors
    /// An I/O error from the system.
    pub fn listening(listener: StdUnixListener, path: Option<PathBuf>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let place = path.and_then(|path| Place::open(&path).ok());
        Ok(Self::Listening(ServedSocket {
            _file: place.and_then(SocketFile::at),
            listener,
            first: None,
        }))
    }

    /// Use a client that is connected already.
    ///
    /// # Errors
    /// An I/O error from the system.
    pub fn connected(stream: StdUnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self::Connected(Some(UnixStream::from_std(stream)?)))
    }

    /// Connect to `path` now, and again whenever the client is gone.
    pub fn connecting(path: PathBuf, every: Duration) -> Self {
        Self::Connecting { path, every, next: Instant::now() }
    }

    /// Wait for the first client; the next [`Self::client`] returns it.
    ///
    /// # Errors
    /// An I/O error from the system.
    pub async fn wait(&mut self) -> io::Result<()> {
        if let Self::Listening(socket) = self
            && socket.first.is_none()
        {
            socket.first = Some(socket.listener.accept().await?.0);
        }
        Ok(())
    }

    /// Return the next client. Cancel safe.
    ///
    /// # Errors
    /// An I/O error from the system.
    pub async fn client(&mut self) -> io::Result<UnixStream> {
        match self {
            Self::Listening(socket) => match socket.first.take() {
                Some(stream) => Ok(stream),
                None => match socket.listener.accept().await {
                    Ok((stream, _)) => Ok(stream),
                    Err(error) => {
                        // A shortage of descriptors lasts for a while.
                        sleep(PAUSE).await;
                        Err(error)
                    }
                },
            },
            Self::Connected(stream) => match stream.take() {
                Some(stream) => Ok(stream),
                None => std::future::pending().await,
            },
            Self::Connecting { path, every, next } => loop {
                sleep_until(*next).await;
                *next = Instant::now() + *every;
                match UnixStream::connect(&path).await {
                    Ok(stream) => return Ok(stream),
                    Err(error) => debug!(path = %path.display(), %error, "nobody is there"),
                }
            },
        }
    }
}

/// A socket that the relay serves. Its file, if it has one, is removed on drop.
pub struct ServedSocket {
    /// Dropped first: while the socket exists, its file's inode is not reused.
    _file: Option<SocketFile>,
    listener: UnixListener,
    first: Option<UnixStream>,
}

impl ServedSocket {
    /// Bind `path`, replacing a socket that is no longer served. Whoever may connect controls the
    /// guest.
    ///
    /// # Errors
    /// An I/O error from the system; `AddrInUse` if the path is served.
    pub async fn bind(path: &Path) -> io::Result<Self> {
        let place = Place::open(path)?;
        if place.has_socket() {
            match place.connect().await {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => place.remove()?,
                _ => return Err(io::ErrorKind::AddrInUse.into()),
            }
        }
        let listener = UnixListener::from_std(place.listen(Mode::RUSR | Mode::WUSR)?)?;
        Ok(Self { _file: SocketFile::at(place), listener, first: None })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::MetadataExt as _,
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    use rustix::fs::{CWD, RenameFlags, renameat_with};

    use super::*;

    /// The owner of the parent directory keeps exchanging our directory and theirs. Another guest's
    /// socket, served or not, stays where it is.
    #[tokio::test]
    async fn anothers_socket_is_not_taken_for_ours() {
        const TRIES: usize = 2000;
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
        fs::create_dir(&ours).unwrap();
        fs::create_dir(&theirs).unwrap();
        let theirs_socket = StdUnixListener::bind(theirs.join("socket")).unwrap();
        let inode = |path: &Path| fs::metadata(path.join("socket")).ok().map(|it| it.ino());
        let before = inode(&theirs);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    renameat_with(CWD, &ours, CWD, &theirs, RenameFlags::EXCHANGE).unwrap();
                }
            });
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
                runtime.unwrap().block_on(async {
                    for _ in 0..TRIES {
                        // Half of the time it is theirs, which is served.
                        drop(ServedSocket::bind(&ours.join("socket")).await);
                    }
                });
                done.store(true, Ordering::Relaxed);
            });
        });
        // Nothing of ours is left.
        let mut left = [inode(&ours), inode(&theirs)];
        left.sort();
        assert_eq!(left, [None, before]);
        drop(theirs_socket);
    }
}
