//! Where QEMU connects when its migration has multifd channels, which it has only over an address.

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

/// How long QEMU may take to connect once it has said that it does.
const CONNECTED: Duration = Duration::from_secs(5);

/// The id of the chardev by which QEMU tries to connect.
const CHARDEV: &str = "qemu-rdma-helper-probe";

/// A socket that QEMU can reach, and whoever else connects is not let in. Its name is gone when this
/// is dropped.
pub struct MultifdListener {
    /// Goes first: while the socket is there, its file's number is no other's.
    _file: Option<SocketFile>,
    listener: UnixListener,
    path: PathBuf,
    pid: u32,
}

impl MultifdListener {
    /// Make one. QEMU may be another user, see other directories, or be confined to some: so it is
    /// asked to connect, as a chardev. `None` if there is no place.
    pub async fn open(context: &Context) -> Option<Self> {
        // Of a service: where it may write.
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
        info!("there is no place for a socket that QEMU can reach: RAM comes through one socket");
        None
    }

    fn bind(directory: &Path, pid: u32) -> io::Result<Self> {
        let name = format!("qemu-rdma-helper-{:016x}", RandomState::new().hash_one(pid));
        let path = directory.join(name);
        // QEMU may be another user; who connects is looked at.
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

    /// The URI for `migrate`.
    pub fn uri(&self) -> Value {
        format!("unix:{}", self.path.display()).into()
    }

    /// QEMU's next connection. Nothing is lost if the future is dropped.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            let (stream, _) = self.listener.accept().await?;
            if qemu::peer_pid(&stream).is_ok_and(|pid| pid == self.pid) {
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                return Ok(stream.into());
            }
            debug!("somebody else than QEMU connected");
        }
    }
}
