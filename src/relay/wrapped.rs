//! The relay of a QEMU that is just starting; see [`launch`](super::launch).
//!
//! It lives exactly as long as QEMU: a manager that loses its monitor takes the guest for dead.

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

/// Name of a migration socket that nobody writes to.
const FDNAME: &str = "qemu-rdma-helper-failed";

/// The last signal of Linux (signal(7), real-time signals).
const SIGNAL_MAX: libc::c_int = 64;

/// Signals that stay what they are: those that can't be caught, that do nothing by themselves, that
/// a fault raises, and those of the C library (32 and 33).
///
/// SIGCHLD is not among them: where it is ignored, nobody learns how a worker ended.
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

/// What the relay is told, as a line of JSON. Descriptors come with it: for each monitor its
/// session with QEMU, then what its listener is made of; then the memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Start {
    /// How migrations are carried.
    pub settings: Settings,
    /// QEMU's monitors.
    pub monitors: Vec<StartMonitor>,
    /// Memory of RAM backends.
    pub memory: Vec<StartMemory>,
    /// Where to listen from the start on.
    pub incoming: Option<Address>,
    /// QEMU goes to the background: it leaves standard error once it has started.
    pub background: bool,
}

/// A monitor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct StartMonitor {
    /// Where clients come in.
    pub listener: StartListener,
}

/// Where clients come in.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum StartListener {
    /// At this socket, which comes along.
    Listening {
        /// Its path, if it is to be removed at the end.
        path: Option<PathBuf>,
        /// QEMU is to start only when a client is there.
        wait: bool,
    },
    /// It is there: its connection comes along.
    Connected,
    /// It is to be connected to.
    Connecting {
        /// Its socket.
        path: PathBuf,
        /// How often to try.
        every: Duration,
    },
    /// Nowhere.
    Closed,
}

/// Memory of a RAM backend; it comes along.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct StartMemory {
    /// The backend's id.
    pub id: String,
    /// Where QEMU finds it.
    pub path: String,
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Started {
    /// Clients can connect.
    Ready,
    /// Why they can't.
    Failed(String),
}

/// Leave what management has started, and give up what is not needed. Called while there is one
/// thread.
///
/// # Errors
/// The system's.
pub fn detach() -> io::Result<()> {
    // Signals of a terminal are for QEMU.
    rustix::process::setsid()?;
    // Hold no file system.
    std::env::set_current_dir("/")?;
    confine(Role::Started);
    Ok(())
}

/// Take the order that comes at `control`, and serve until QEMU is gone.
///
/// # Errors
/// When no proper order comes, and who should have sent it can't be told.
pub async fn run(control: StdUnixStream) -> io::Result<()> {
    for number in (1..=SIGNAL_MAX).filter(|number| !SIGNALS_KEPT.contains(number)) {
        // From now on it has no effect.
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
        // Nobody will become QEMU any more.
        () = closed(&control) => return Ok(()),
    };
    match result {
        Ok(prepared) => {
            // Whoever is gone needs no answer: QEMU will not come.
            let _ = answer(&control, &Started::Ready).await;
            drop(control);
            serve(prepared).await
        }
        // Whoever is told says it, once.
        Err(error) => match answer(&control, &Started::Failed(error.to_string())).await {
            Ok(()) => Ok(()),
            Err(_) => Err(error),
        },
    }
}

/// Wait until the other end is closed; it says nothing more.
async fn closed(control: &UnixStream) {
    while let Ok(1..) = socket::recv_async(control, &mut [0; 64], &mut Vec::new()).await {}
}

/// What an order has become.
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

/// The order, and its descriptors.
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
            // It refused its arguments, or never came.
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
    // No more than that: a manager quotes the last words of a QEMU that has died.
    debug!(pid, "serving QMP");
    if background {
        leave_stderr();
    }
    // Only QEMU's end is a reason to end.
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

/// Whoever reads what QEMU said while it started waits for its end.
fn leave_stderr() {
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null");
    if let Err(error) = null.and_then(|null| Ok(rustix::stdio::dup2_stderr(null)?)) {
        warn!(%error, "standard error could not be left");
    }
}

/// Let QEMU end as it does by itself when it can't listen: with a message, and exit status 1.
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
