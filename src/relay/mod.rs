//! The long-lived process between management and QEMU.
//!
//! Owns the QMP connections and nothing else that can fail: it parses no migration stream, maps no
//! guest memory and loads no RDMA library; a worker process per migration does. One task per monitor
//! takes QEMU's events, the client's commands and what migrations have to say, in turn; each command
//! runs in a task of its own, and the next in band is taken when it was answered.
//!
//! It stands beside a running QEMU ([`attach`]), or is started with it ([`launch`]).

pub mod launch;
mod migration;
mod monitor;
mod process;
mod qemu_session;
pub mod schema;
mod socket_file;
pub mod wrapped;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing::{info, warn};

use crate::{
    control::{self, FabricKind, Options, QmpSocket},
    fabric,
    patience::Patience,
    qemu::{
        QemuError, Version,
        blocker::Blocker,
        blockers,
        blocks::{self, OwnMemory, RamBlock},
    },
    qmp::{Execute as _, QmpError, envelope},
    ram::{CHUNK, CHUNK_MAX},
    sandbox::{Role, confine},
};
use migration::slots::Migrations;
use monitor::listener::{MonitorListener, ServedSocket};
use process::Process;
use qemu_session::{Qemu, Session};

/// A worker that reports nothing for so long has hung, and how long the relay may be busy otherwise
/// meanwhile: what is longer, it was stopped itself.
const HEARTBEAT: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3));

/// How long a worker may still report nothing, from now on.
fn heartbeat() -> Patience {
    Patience::in_slices(HEARTBEAT.0, HEARTBEAT.1)
}

/// Which fabric migrations use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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
            Self::Auto => fabric::auto(),
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

/// How migrations are carried.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    /// Which fabric to use.
    pub fabric: FabricChoice,
    /// How long a transfer that is due may make no progress.
    pub stall_timeout: Duration,
    /// How long the peer's RDMA device may give no sign of life.
    pub peer_timeout: Duration,
    /// Connections, or queue pairs, that carry RAM between two helpers.
    pub connections: u16,
    /// Multifd channels that a source's QEMU should use; 0 for none.
    pub channels: u16,
    /// Bytes of guest RAM that may be pinned at a time; `None`: all of it.
    pub pin_limit: Option<u64>,
    /// Processors that workers may use; none: all.
    #[serde(default)]
    pub cpus: Vec<u16>,
}

/// What `attach` is told.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    /// QEMU's QMP socket.
    pub qemu_qmp: PathBuf,
    /// Where to serve QMP.
    pub qmp: PathBuf,
    /// How long to wait for a QEMU that is about to start.
    pub wait: Duration,
    /// How migrations are carried.
    pub settings: Settings,
    /// QEMU's process, where the socket does not tell.
    pub pid: Option<u32>,
}

/// Why the relay ended.
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
    let AttachOptions { qemu_qmp, qmp, wait, settings, pid } = options;
    settings.fabric.check()?;
    confine(Role::Attached);
    let qemu_error = |source| RelayError::Qemu { path: qemu_qmp.clone(), source };
    let mut session = Session::connect(&qemu_qmp, wait).await.map_err(qemu_error)?;
    let process = match pid {
        Some(pid) => Process::open(pid),
        None => session.peer(),
    };
    let qemu_qmp = QmpSocket { path: qemu_qmp, pid: session.pid };
    session.pid = pid.unwrap_or(session.pid);
    let serve_error = |source| RelayError::Serve { path: qmp.clone(), source };
    let socket = ServedSocket::bind(&qmp).await.map_err(serve_error)?;
    let ending = told_to_end().map_err(RelayError::Start)?;
    let context = Context {
        qemu: session.qemu.clone(),
        qemu_qmp: Some(qemu_qmp),
        pid: session.pid,
        process: Arc::new(process),
        settings,
        memory: Arc::default(),
    };
    let (migrations, mut outputs) = Migrations::new(1);
    // It fails only where no service manager waits for it.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    info!(path = %qmp.display(), pid = context.pid, "serving QMP");
    look_at_version(&session.greeting);
    let monitor = monitor::Monitor::new(context, migrations.clone(), session.greeting);
    if let Some(output) = outputs.pop() {
        monitor.run(MonitorListener::Listening(socket), session.said, output, ending.clone()).await;
    }
    let reason = *ending.borrow();
    if reason.is_none() {
        info!("QEMU is gone: ending");
    }
    migrations.end(reason).await;
    Ok(())
}

/// Say in the log what a QEMU that is newer than all that were tried deserves.
fn look_at_version(greeting: &Value) {
    let version = Version::read(&greeting["QMP"]["version"]);
    if let Some(Blocker { reason, cure }) = version.too_new() {
        warn!("{reason}; {cure}");
    }
}

/// Becomes the reason when a signal tells us to end.
fn told_to_end() -> io::Result<watch::Receiver<Option<&'static str>>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (tell, ending) = watch::channel(None);
    tokio::spawn(async move {
        let reason = tokio::select! {
            _ = terminate.recv() => {
                "The helper was told to end (SIGTERM); start it again to migrate"
            }
            _ = interrupt.recv() => {
                "The helper was told to end (SIGINT); start it again to migrate"
            }
        };
        tell.send_replace(Some(reason));
    });
    Ok(ending)
}

/// What migrations and commands need of the relay.
#[derive(Clone)]
struct Context {
    qemu: Qemu,
    /// QEMU's own socket, for a worker whose relay is gone.
    qemu_qmp: Option<QmpSocket>,
    pid: u32,
    process: Arc<Process>,
    settings: Settings,
    /// Backends on memory of the helper's.
    memory: Arc<[OwnMemory]>,
}

impl Context {
    /// QEMU's RAM blocks.
    async fn blocks(&self) -> Result<Vec<RamBlock>, QemuError> {
        blocks::find(&mut self.qemu.clone(), self.process.files(), &self.memory).await
    }

    /// What the client set in QEMU that matters to a worker.
    async fn options(&self, qemu: &mut Qemu) -> Result<Options, QmpError> {
        let capabilities = qemu.execute("query-migrate-capabilities", Value::Null).await?;
        let parameters = qemu.execute("query-migrate-parameters", Value::Null).await?;
        Ok(Options {
            pin_all: blockers::is_on(&capabilities, "rdma-pin-all"),
            return_path: blockers::is_on(&capabilities, "return-path"),
            stall_timeout: self.settings.stall_timeout.as_secs().max(1),
            peer_timeout: self.settings.peer_timeout.as_secs().max(1),
            connections: self.settings.connections,
            channels: self.settings.channels,
            pin_limit: self.settings.pin_limit,
            chunk_size: chunk_size(&parameters),
            cpus: self.settings.cpus.clone(),
            fabric: self.settings.fabric.kind(),
        })
    }
}

/// By which chunks QEMU's own RDMA would register memory (since 11.1), as a stock peer does.
fn chunk_size(parameters: &Value) -> u64 {
    let size = parameters["x-rdma-chunk-size"].as_u64();
    let is_one = |size: &u64| size.is_power_of_two() && (CHUNK..=CHUNK_MAX).contains(size);
    size.filter(is_one).unwrap_or(CHUNK)
}

/// An event of QEMU's that concerns a migration, or word of the relay itself.
#[derive(Debug, Clone)]
enum QemuEvent {
    /// MIGRATION: its state changed.
    Migration,
    /// RESUME: the guest runs.
    Resumed,
    /// STOP: the guest does not run.
    Stopped,
    /// SUSPEND: it sleeps.
    Suspended,
    /// WAKEUP: it does no more.
    Woken,
    /// A parameter of migrations may have changed.
    Parameters,
    /// The migration is to fail, because the relay is told to end or for another reason.
    Abort(String),
}

/// What a migration has for the client.
#[derive(Debug, Clone)]
enum Output {
    /// The line of an event.
    Emit(Vec<u8>),
    /// QEMU has said how the migration ended: events that were held back may pass.
    Release,
    /// The migration did not end as QEMU has it: this event takes the place of QEMU's.
    Instead(Vec<u8>),
}

impl Output {
    /// The event of a status.
    fn status(status: &str) -> Self {
        Self::Emit(envelope::status(status))
    }
}

/// The blocks of an order.
fn listed(blocks: &[RamBlock]) -> Vec<control::Block> {
    let listed = |block: &RamBlock| control::Block {
        name: block.name.clone(),
        length: block.length,
        page_size: block.page_size,
        file_offset: block.backing.as_ref().map(|backing| backing.offset),
        read_whole: block.read_whole,
    };
    blocks.iter().map(listed).collect()
}
