//! Where management comes in.

use std::{
    io,
    os::unix::{
        fs::MetadataExt as _,
        net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    net::{UnixListener, UnixStream},
    time::{Instant, sleep, sleep_until},
};
use tracing::debug;

/// How long after a client that could not be let in the next one is.
const PAUSE: Duration = Duration::from_secs(1);

/// Where clients come from, one at a time.
pub enum Door {
    /// They connect to a socket.
    Listening(ServedSocket),
    /// There is one, and no other will be.
    Connected(Option<UnixStream>),
    /// They are connected to, again and again.
    Connecting {
        /// Their socket.
        path: PathBuf,
        /// How long after an attempt the next one follows.
        every: Duration,
        /// When that is.
        next: Instant,
    },
}

impl Door {
    /// Nobody comes.
    pub fn closed() -> Self {
        Self::Connected(None)
    }

    /// A socket that listens already.
    ///
    /// # Errors
    /// The system's.
    pub fn listening(listener: StdUnixListener, path: Option<PathBuf>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let file = path.map(SocketFile::open);
        Ok(Self::Listening(ServedSocket { _file: file, listener, first: None }))
    }

    /// A client that is there.
    ///
    /// # Errors
    /// The system's.
    pub fn connected(stream: StdUnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self::Connected(Some(UnixStream::from_std(stream)?)))
    }

    /// Connect to `path` now, and whenever the client is gone.
    pub fn connecting(path: PathBuf, every: Duration) -> Self {
        Self::Connecting { path, every, next: Instant::now() }
    }

    /// Wait until the first client is there; the next [`Self::client`] is that one.
    ///
    /// # Errors
    /// The system's.
    pub async fn wait(&mut self) -> io::Result<()> {
        if let Self::Listening(socket) = self
            && socket.first.is_none()
        {
            socket.first = Some(socket.listener.accept().await?.0);
        }
        Ok(())
    }

    /// The next client. Nothing is lost if the future is dropped.
    ///
    /// # Errors
    /// The system's.
    pub async fn client(&mut self) -> io::Result<UnixStream> {
        match self {
            Self::Listening(socket) => match socket.first.take() {
                Some(stream) => Ok(stream),
                None => match socket.listener.accept().await {
                    Ok((stream, _)) => Ok(stream),
                    Err(error) => {
                        // Descriptors that are missing now are missing for a while.
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

/// A socket that the relay serves; if it has a path, that goes with it.
pub struct ServedSocket {
    /// Goes first: while the socket is there, its file's number is no other's.
    _file: Option<SocketFile>,
    listener: UnixListener,
    first: Option<UnixStream>,
}

/// The file of a socket, which goes with it.
struct SocketFile {
    path: PathBuf,
    /// Which file it is: another QEMU that was started at this path since has its own there.
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    fn open(path: PathBuf) -> Self {
        let identity = Self::identity(&path);
        Self { path, identity }
    }

    fn identity(path: &Path) -> Option<(u64, u64)> {
        let metadata = std::fs::symlink_metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && Self::identity(&self.path) == self.identity {
            // Somebody else may be just about to remove it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl ServedSocket {
    /// Bind `path`, in place of a socket that nobody serves any more.
    ///
    /// # Errors
    /// The system's; `AddrInUse` if it is served.
    pub async fn bind(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};

        if let Ok(metadata) = std::fs::symlink_metadata(path)
            && metadata.file_type().is_socket()
        {
            match UnixStream::connect(path).await {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path)?;
                }
                _ => return Err(io::ErrorKind::AddrInUse.into()),
            }
        }
        let listener = UnixListener::bind(path)?;
        // Whoever may connect controls the guest.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        let file = Some(SocketFile::open(path.to_owned()));
        Ok(Self { _file: file, listener, first: None })
    }
}
