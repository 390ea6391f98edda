//! The socket to which QEMU connects its multifd channels: it can only connect those to an address.

use std::{
    hash::{BuildHasher as _, RandomState},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::Mode;
use serde_json::{Value, json};
use tokio::{net::UnixListener, time::timeout};
use tracing::{debug, info};

use crate::{
    qemu,
    qmp::{Execute, QmpError},
    relay::{
        context::Context,
        socket_file::{Place, SocketFile},
    },
};

/// How long QEMU may take to connect after it has replied that it does.
const CONNECTED: Duration = Duration::from_secs(5);

/// Id of the chardev with which QEMU tries to connect.
const CHARDEV: &str = "qemu-rdma-helper-probe";

/// A socket that QEMU can reach; nobody else is accepted. Its file is removed on drop.
pub struct MultifdListener {
    /// Dropped first: while the socket exists, its file's inode is not reused.
    _file: Option<SocketFile>,
    listener: UnixListener,
    path: PathBuf,
    pid: u32,
}

impl MultifdListener {
    /// Create one; `None` if no directory is suitable. QEMU may be another user, see other
    /// directories, or be confined to some: so it is asked to connect, as a chardev.
    pub async fn open(context: &Context) -> Option<Self> {
        // A service's writable directory.
        let own = std::env::var_os("RUNTIME_DIRECTORY").map(PathBuf::from);
        let beside_qmp = context.qemu_qmp.as_ref().and_then(|qmp| qmp.path.parent());
        let others = [beside_qmp.map(Path::to_owned), Some(std::env::temp_dir())];
        for directory in own.into_iter().chain(others.into_iter().flatten()) {
            let listener = match Self::bind(&directory, context.pid) {
                Ok(listener) => listener,
                Err(error) => {
                    debug!(%error, directory = %directory.display(), "no socket for QEMU here");
                    continue;
                }
            };
            match listener.is_reached_by(&mut context.qemu.clone()).await {
                Ok(()) => return Some(listener),
                Err(error) => debug!(%error, path = %listener.path.display(), "QEMU can't connect"),
            }
        }
        info!("found no directory for a socket that QEMU can reach: not using multifd");
        None
    }

    fn bind(directory: &Path, pid: u32) -> io::Result<Self> {
        let name = format!("qemu-rdma-helper-{:016x}", RandomState::new().hash_one(pid));
        let path = directory.join(name);
        // QEMU may be another user; the peer's PID is checked.
        let place = Place::open(&path)?;
        let listener = UnixListener::from_std(place.listen(Mode::from_raw_mode(0o666))?)?;
        Ok(Self { _file: SocketFile::at(place), listener, path, pid })
    }

    async fn is_reached_by(&self, qemu: &mut impl Execute) -> Result<(), QmpError> {
        let address = json!({ "type": "unix", "data": { "path": self.path } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        qemu.execute("chardev-add", json!({ "id": CHARDEV, "backend": backend })).await?;
        let connected = timeout(CONNECTED, self.accept()).await;
        qemu.execute("chardev-remove", json!({ "id": CHARDEV })).await?;
        match connected {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(QmpError::generic(error.to_string())),
            Err(_) => Err(QmpError::generic("another process connects in its place")),
        }
    }

    /// Return the URI for `migrate`.
    pub fn uri(&self) -> Value {
        format!("unix:{}", self.path.display()).into()
    }

    /// Accept QEMU's next connection. Cancel safe.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            let (stream, _) = self.listener.accept().await?;
            if qemu::peer_pid(&stream).is_ok_and(|pid| pid == self.pid) {
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                return Ok(stream.into());
            }
            debug!("a process other than QEMU connected");
        }
    }
}
