//! The relay of a QEMU that is started with it; see [`launch`](super::launch).
//!
//! It exits only when QEMU exits: a manager takes the loss of a monitor for the guest's end.

use std::{
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, json};
use tokio::{
    net::UnixStream,
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
};
use tracing::{debug, error, warn};

use super::{
    attach::look_at_version,
    context::{Context, Settings},
    migration::{slots::Migrations, worker},
    monitor::{Monitor, listener::MonitorListener},
    process::Process,
    qemu_session::{Qemu, Session},
};
use crate::{
    address::Address,
    control::lines::Lines,
    qemu::ram_blocks::OwnMemory,
    qmp::{Execute as _, QmpError, socket},
    sandbox::{Role, confine},
};

/// fdname of a migration socket that is never written to.
const FDNAME: &str = "qemu-rdma-helper-failed";

/// The last signal of Linux (signal(7), real-time signals).
const SIGNAL_MAX: libc::c_int = 64;

/// Signals whose disposition is left alone: those that can't be caught, those that do nothing by
/// default, those that a fault raises, and the C library's (32 and 33).
///
/// SIGCHLD is not among them: while it is ignored, a worker's exit status is lost.
const SIGNALS_KEPT: [libc::c_int; 14] = [
    libc::SIGKILL,
    libc::SIGSTOP,
    libc::SIGCONT,
    libc::SIGURG,
    libc::SIGWINCH,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGSEGV,
    libc::SIGSYS,
    libc::SIGTRAP,
    32,
    33,
];

/// The order that starts the relay, a line of JSON. Its descriptors: for each monitor the session
/// with QEMU, then the listener's socket, if it has one; then the memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Start {
    /// How migrations are carried.
    pub settings: Settings,
    /// QEMU's monitors.
    pub monitors: Vec<StartMonitor>,
    /// Memory of RAM backends.
    pub memory: Vec<StartMemory>,
    /// Where to listen from the start.
    pub incoming: Option<Address>,
    /// QEMU daemonizes: standard error is left once QEMU has started.
    pub background: bool,
}

/// One of QEMU's monitors.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct StartMonitor {
    /// Where its clients connect.
    pub listener: StartListener,
}

/// Where a monitor's clients connect.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum StartListener {
    /// On this listening socket, whose descriptor is attached.
    Listening {
        /// Its path, if the file is to be removed at the end.
        path: Option<PathBuf>,
        /// QEMU starts only when a client has connected.
        wait: bool,
    },
    /// The client is connected already; its descriptor is attached.
    Connected,
    /// The relay connects to the client.
    Connecting {
        /// The client's socket.
        path: PathBuf,
        /// Interval between attempts.
        every: Duration,
    },
    /// Nowhere.
    Closed,
}

/// Memory of a RAM backend; its descriptor is attached.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct StartMemory {
    /// The backend's id.
    pub id: String,
    /// Path under which QEMU opens it.
    pub path: String,
}

/// The relay's answer to [`Start`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Started {
    /// Clients can connect.
    Ready,
    /// Why clients can't connect.
    Failed(String),
}

/// Detach from what management started, and drop privileges that are not needed. Call it while
/// there is one thread.
///
/// # Errors
/// An I/O error from the system.
pub fn detach() -> io::Result<()> {
    // Signals from a terminal are meant for QEMU.
    rustix::process::setsid()?;
    // Keep no file system busy.
    std::env::set_current_dir("/")?;
    confine(Role::Started);
    Ok(())
}

/// Receive the order from `control`, and serve until QEMU is gone.
///
/// # Errors
/// An I/O error from the system; or no valid order arrived and its sender can't be told.
pub async fn run(control: StdUnixStream) -> io::Result<()> {
    for number in (1..=SIGNAL_MAX).filter(|number| !SIGNALS_KEPT.contains(number)) {
        // Has no effect from now on.
        let _ = signal(SignalKind::from_raw(number))?;
    }
    let order = receive(&control);
    control.set_nonblocking(true)?;
    let control = UnixStream::from_std(control)?;
    let prepared = async {
        let (start, fds) = order?;
        prepare(start, fds).await
    };
    let result = tokio::select! {
        result = prepared => result,
        // The launcher is gone and will not become QEMU.
        () = closed(&control) => return Ok(()),
    };
    match result {
        Ok(prepared) => {
            // A launcher that is gone needs no answer: QEMU will not start.
            let _ = answer(&control, &Started::Ready).await;
            drop(control);
            serve(prepared).await
        }
        // The launcher prints the error. Print it here only if the launcher is gone.
        Err(error) => match answer(&control, &Started::Failed(error.to_string())).await {
            Ok(()) => Ok(()),
            Err(_) => Err(error),
        },
    }
}

/// Wait until the other end is closed; it sends nothing more.
async fn closed(control: &UnixStream) {
    while let Ok(1..) = socket::recv_async(control, &mut [0; 64], &mut Vec::new()).await {}
}

/// An order whose sockets and memory are set up.
struct Prepared {
    settings: Settings,
    monitors: Vec<(UnixStream, MonitorListener)>,
    memory: Vec<OwnMemory>,
    incoming: Option<Address>,
    background: bool,
}

async fn prepare(start: Start, fds: Vec<OwnedFd>) -> io::Result<Prepared> {
    let mut fds = fds.into_iter();
    let mut next = || fds.next().ok_or_else(|| wrong("descriptors are missing"));
    let mut monitors = Vec::new();
    for monitor in start.monitors {
        let session = StdUnixStream::from(next()?);
        session.set_nonblocking(true)?;
        rustix::net::sockopt::set_socket_passcred(&session, true)?;
        let listener = match monitor.listener {
            StartListener::Listening { path, wait } => {
                let mut listener = MonitorListener::listening(next()?.into(), path)?;
                if wait {
                    listener.wait().await?;
                }
                listener
            }
            StartListener::Connected => MonitorListener::connected(next()?.into())?,
            StartListener::Connecting { path, every } => MonitorListener::connecting(path, every),
            StartListener::Closed => MonitorListener::closed(),
        };
        monitors.push((UnixStream::from_std(session)?, listener));
    }
    let mut memory = Vec::new();
    for StartMemory { id, path } in start.memory {
        memory.push(OwnMemory { id, path, file: next()? });
    }
    let Start { settings, incoming, background, .. } = start;
    Ok(Prepared { settings, monitors, memory, incoming, background })
}

fn receive(control: &StdUnixStream) -> io::Result<(Start, Vec<OwnedFd>)> {
    let mut lines = Lines::default();
    loop {
        if let Some(order) = lines.take()? {
            return Ok(order);
        }
        let (mut piece, mut fds) = ([0; 4096], Vec::new());
        match socket::recv(control.as_fd(), &mut piece, &mut fds)? {
            0 => return Err(wrong("it breaks off")),
            received => lines.push(&piece[..received], fds),
        }
    }
}

fn wrong(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the order to the relay is wrong: {why}"))
}

async fn answer(control: &UnixStream, answer: &Started) -> io::Result<()> {
    let line = json!(answer);
    socket::send_all_async(control, format!("{line}\n").as_bytes(), &[]).await
}

async fn serve(prepared: Prepared) -> io::Result<()> {
    let Prepared { settings, monitors, memory, incoming, background } = prepared;
    let mut sessions = Vec::new();
    for (stream, listener) in monitors {
        match Session::begin(stream).await? {
            Some(session) => sessions.push((session, listener)),
            // QEMU refused its arguments, or was never started.
            None => return Ok(()),
        }
    }
    let Some(pid) = sessions.first().map(|(session, _)| session.pid) else { return Ok(()) };
    let (memory, process): (Arc<[_]>, _) = (memory.into(), Arc::new(Process::open(pid)));
    let context = |qemu: &Qemu| Context {
        qemu: qemu.clone(),
        qemu_qmp: None,
        pid,
        process: process.clone(),
        settings: settings.clone(),
        memory: memory.clone(),
    };
    let (migrations, outputs) = Migrations::new(sessions.len());
    if let (Some(address), Some((session, _))) = (incoming, sessions.first()) {
        let context = context(&session.qemu);
        let listens = migrations.migrate_incoming(context, address.clone(), None);
        if let Err(error) = listens.await {
            error!("-incoming rdma:{address}: {error}");
            refuse_incoming(session.qemu.clone()).await;
        }
    }
    if let Some((session, _)) = sessions.first() {
        look_at_version(&session.greeting);
    }
    // At debug level only: a manager quotes the last lines of a QEMU that died.
    debug!(pid, "serving QMP");
    if background {
        leave_stderr();
    }
    // Only QEMU's exit ends the relay.
    let (_tell, ending) = watch::channel(None);
    let mut running = JoinSet::new();
    for ((session, listener), output) in sessions.into_iter().zip(outputs) {
        session.end_with(process.clone());
        let monitor = Monitor::new(context(&session.qemu), migrations.clone(), session.greeting);
        running.spawn(monitor.run(listener, session.said, output, ending.clone()));
    }
    running.join_all().await;
    migrations.end(None).await;
    Ok(())
}

/// Leave standard error: a reader of QEMU's startup messages waits for end of file.
fn leave_stderr() {
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null");
    if let Err(error) = null.and_then(|null| Ok(rustix::stdio::dup2_stderr(null)?)) {
        warn!(%error, "standard error could not be left");
    }
}

/// Make QEMU exit as it does when it can't listen: with a message and exit status 1.
async fn refuse_incoming(mut qemu: Qemu) {
    let refused = async {
        let (nobody, theirs) =
            worker::migration_socket().map_err(|error| QmpError::generic(error.to_string()))?;
        qemu.execute_with("getfd", json!({ "fdname": FDNAME }), vec![theirs]).await?;
        drop(nobody);
        let mut arguments = Map::new();
        arguments.insert("uri".into(), format!("fd:{FDNAME}").into());
        qemu.execute("migrate-incoming", arguments.into()).await
    };
    if let Err(error) = refused.await
        && error.class != QmpError::CONNECTION_LOST
    {
        error!(%error, "QEMU waits for a migration that will not come");
    }
}
