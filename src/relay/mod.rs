//! The long-lived process between management and QEMU.
//!
//! Owns the QMP connections and nothing else that can fail: it parses no migration stream, maps no
//! guest memory and loads no RDMA library; a worker process per migration does. One task takes
//! QEMU's events, the client's commands and what migrations have to say, in turn; each command
//! runs in a task of its own, and the next is taken when it was answered.

mod client;
mod destination;
mod helper_commands;
mod intercept;
mod process;
pub mod schema;
mod serve;
mod session;
mod source;
mod view;
mod worker;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::Value;

use crate::{
    fabric,
    migration::messages::{self, FabricKind, Options},
    qemu::{blockers, blocks::RamBlock},
    qmp::{Execute as _, QmpError},
};
use process::Process;
use session::{Qemu, Session};

/// A worker that reports nothing for so long has hung.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// Which fabric migrations use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FabricChoice {
    /// `verbs` where there is a device, else `tcp`.
    Auto,
    /// RDMA or nothing.
    Verbs,
    /// TCP.
    Tcp,
}

impl FabricChoice {
    /// What carries a migration that starts now.
    pub fn kind(self) -> FabricKind {
        match self {
            Self::Auto => FabricKind::auto(),
            Self::Tcp => FabricKind::Tcp,
            Self::Verbs => FabricKind::Verbs,
        }
    }

    /// Can it be had on this host?
    ///
    /// # Errors
    /// [`RelayError::NoVerbs`] or [`RelayError::NoDevice`].
    pub fn check(self) -> Result<(), RelayError> {
        match self {
            Self::Verbs if !cfg!(feature = "verbs") => Err(RelayError::NoVerbs),
            Self::Verbs if fabric::devices().is_empty() => Err(RelayError::NoDevice),
            _ => Ok(()),
        }
    }
}

/// What `attach` is told.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    /// QEMU's QMP socket.
    pub qemu_qmp: PathBuf,
    /// Where to serve QMP.
    pub qmp: PathBuf,
    /// Which fabric to use.
    pub fabric: FabricChoice,
    /// How long a transfer that is due may make no progress.
    pub stall_timeout: Duration,
    /// How long the peer's RDMA device may give no sign of life.
    pub peer_timeout: Duration,
    /// Queue pairs that carry RAM between two helpers.
    pub queue_pairs: u16,
    /// Bytes of guest RAM that may be pinned at a time; `None`: all of it.
    pub pin_limit: Option<u64>,
    /// QEMU's process, where the socket does not tell.
    pub pid: Option<u32>,
}

/// Why `attach` ended.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// No session with QEMU.
    #[error(
        "Cannot attach to QEMU at {path}: {source}; is it the socket of a running '-qmp unix:...,server=on,wait=off'?"
    )]
    Qemu {
        /// Its socket.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The own socket can't be served.
    #[error(
        "Cannot serve QMP at {path}: {source}; choose another path or end whoever serves there"
    )]
    Serve {
        /// The socket.
        path: PathBuf,
        /// errno.
        source: io::Error,
    },
    /// Not in this build.
    #[error("This build has no 'verbs' fabric; use --fabric tcp")]
    NoVerbs,
    /// Not on this host.
    #[error(
        "This host has no RDMA device; load its driver ('rdma link' shows it), or use --fabric tcp"
    )]
    NoDevice,
    /// The runtime could not be set up.
    #[error("Cannot start: {0}")]
    Start(#[source] io::Error),
}

/// Attach to a QEMU and serve QMP until QEMU is gone or a signal comes.
///
/// # Errors
/// When it can't attach or serve.
pub async fn attach(options: AttachOptions) -> Result<(), RelayError> {
    options.fabric.check()?;
    let qemu_error = |source| RelayError::Qemu { path: options.qemu_qmp.clone(), source };
    let Session { qemu, said, greeting, pid } =
        Session::connect(&options.qemu_qmp).await.map_err(qemu_error)?;
    let pid = options.pid.unwrap_or(pid);
    let process = Arc::new(Process::open(pid));
    let (qemu_qmp, fabric) = (options.qemu_qmp.clone(), options.fabric);
    let (stall_timeout, peer_timeout) = (options.stall_timeout, options.peer_timeout);
    let (queue_pairs, pin_limit) = (options.queue_pairs, options.pin_limit);
    let context = Context {
        qemu,
        qemu_qmp,
        pid,
        process,
        fabric,
        stall_timeout,
        peer_timeout,
        queue_pairs,
        pin_limit,
    };
    let serve_error = |source| RelayError::Serve { path: options.qmp.clone(), source };
    let socket = ServedSocket::bind(&options.qmp).await.map_err(serve_error)?;
    serve::Relay::new(context, greeting).run(socket, said).await.map_err(RelayError::Start)
}

/// What migrations and commands need of the relay.
#[derive(Clone)]
struct Context {
    qemu: Qemu,
    qemu_qmp: PathBuf,
    pid: u32,
    process: Arc<Process>,
    fabric: FabricChoice,
    stall_timeout: Duration,
    peer_timeout: Duration,
    queue_pairs: u16,
    pin_limit: Option<u64>,
}

impl Context {
    /// What the client set in QEMU that matters to a worker.
    async fn options(&self, qemu: &mut Qemu) -> Result<Options, QmpError> {
        let capabilities = qemu.execute("query-migrate-capabilities", Value::Null).await?;
        Ok(Options {
            pin_all: blockers::is_on(&capabilities, "rdma-pin-all"),
            return_path: blockers::is_on(&capabilities, "return-path"),
            stall_timeout: self.stall_timeout.as_secs().max(1),
            peer_timeout: self.peer_timeout.as_secs().max(1),
            queue_pairs: self.queue_pairs,
            pin_limit: self.pin_limit,
            fabric: self.fabric.kind(),
        })
    }
}

/// An event of QEMU's that concerns a migration, or word of the relay itself.
#[derive(Debug, Clone)]
enum QemuEvent {
    /// MIGRATION: its state changed.
    Migration,
    /// RESUME: the guest runs.
    Resumed,
    /// The relay is told to end.
    Abort(String),
}

/// What a migration has for the client.
#[derive(Debug)]
enum Output {
    /// The line of an event.
    Emit(Vec<u8>),
    /// The destination completed, or QEMU failed by itself: events that were held back may pass.
    Release,
    /// The migration failed after QEMU completed: this event takes the place of QEMU's.
    FailInstead(Vec<u8>),
}

/// The blocks of an order.
fn listed(blocks: &[RamBlock]) -> Vec<messages::Block> {
    let listed = |block: &RamBlock| messages::Block {
        name: block.name.clone(),
        length: block.length,
        page_size: block.page_size,
        file_offset: block.backing.as_ref().map(|backing| backing.offset),
    };
    blocks.iter().map(listed).collect()
}

/// The socket that the relay serves; its path goes with it.
struct ServedSocket {
    listener: tokio::net::UnixListener,
    path: PathBuf,
}

impl ServedSocket {
    /// Bind `path`, in place of a socket that nobody serves any more.
    async fn bind(path: &Path) -> io::Result<Self> {
        use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};

        if let Ok(metadata) = std::fs::symlink_metadata(path)
            && metadata.file_type().is_socket()
        {
            match tokio::net::UnixStream::connect(path).await {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(path)?;
                }
                _ => return Err(io::ErrorKind::AddrInUse.into()),
            }
        }
        let listener = tokio::net::UnixListener::bind(path)?;
        // Whoever may connect controls the guest.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path: path.to_owned() })
    }
}

impl Drop for ServedSocket {
    fn drop(&mut self) {
        // It may have been removed by somebody else.
        let _ = std::fs::remove_file(&self.path);
    }
}
