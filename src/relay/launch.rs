//! Starts QEMU with a relay: reads QEMU's command line, starts the relay, and becomes QEMU.
//!
//! So QEMU has the PID, the parent and the limits that management gave it, and no child of ours.
//! The relay's side of the start is in [`wrapped`](super::wrapped).

use std::{
    convert::Infallible,
    ffi::{OsStr, OsString},
    io::{self, BufRead as _, BufReader},
    os::{
        fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::{
            net::{UnixListener, UnixStream},
            process::CommandExt as _,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use command_fds::{CommandFdExt as _, FdMapping};
use memfd::{FileSeal, MemfdOptions};
use tracing::{info, warn};

use super::{
    context::Settings,
    wrapped::{Start, StartListener, StartMemory, StartMonitor, Started},
};
use crate::{
    control::lines::line,
    memory::inherited,
    qemu::command_line::{Endpoint, Invocation, Memory, Monitor, Plan},
    qmp::{QmpError, socket},
};

/// How long the relay may take to start. A host that starts all its guests at once is slow.
const START: Duration = Duration::from_secs(60);

/// Memory sizes are multiples of this many bytes.
const PAGE: u64 = 4096;

/// Why QEMU could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// `-incoming rdma:` is invalid.
    #[error("-incoming: {0}")]
    Incoming(QmpError),
    /// A monitor's socket can't be served.
    #[error("Cannot serve QEMU's monitor at {place}: {source}; look at -qmp or -chardev")]
    Monitor {
        /// Its address.
        place: String,
        /// errno.
        source: io::Error,
    },
    /// Memory for a RAM backend can't be created.
    #[error(
        "Cannot make {size} bytes of shared memory for RAM backend '{id}': {why}; --keep-backends \
         leaves the guest's RAM as it is"
    )]
    Memory {
        /// The backend's id.
        id: String,
        /// Its size in bytes.
        size: u64,
        /// What went wrong.
        why: String,
    },
    /// The relay can't be started.
    #[error("Cannot start the relay process: {0}")]
    Relay(String),
    /// QEMU can't be executed.
    #[error("Cannot run {}: {source}; is it the path of a QEMU?", binary.display())]
    Qemu {
        /// The program.
        binary: PathBuf,
        /// errno.
        source: io::Error,
    },
}

/// What to start.
#[derive(Debug)]
pub struct Launch {
    /// QEMU's program.
    pub binary: OsString,
    /// QEMU's arguments.
    pub arguments: Vec<OsString>,
    /// How migrations are carried.
    pub settings: Settings,
    /// Leave RAM backends as they are.
    pub keep_backends: bool,
}

/// Become QEMU, with a relay in front of its monitors. Returns only if that fails.
///
/// # Errors
/// [`LaunchError`].
pub fn launch(launch: Launch) -> Result<Infallible, LaunchError> {
    let Launch { binary, arguments, settings, keep_backends } = launch;
    let invocation = Invocation::read(&binary, &arguments, keep_backends, Path::is_dir);
    let plan = match invocation.map_err(LaunchError::Incoming)? {
        Invocation::Guest(plan) => plan,
        Invocation::Untouched { why, notes } => {
            info!("QEMU is started as it is: {why}");
            notes.iter().for_each(|note| warn!("{note}"));
            return become_qemu(&binary, arguments, Vec::new());
        }
    };
    for note in &plan.notes {
        warn!("{note}");
    }
    let monitors: Vec<_> = plan.monitors.iter().map(Session::make).collect::<Result<_, _>>()?;
    let memory: Vec<_> = plan.memory.iter().map(memfd).collect::<Result<_, _>>()?;
    let numbers: Vec<_> = monitors.iter().map(|session| session.number).collect();
    let memory_numbers: Vec<_> = memory.iter().map(AsRawFd::as_raw_fd).collect();
    start_relay(&plan, settings, &monitors, &memory)?;
    let arguments = plan.arguments(&numbers, &memory_numbers);
    let sessions = monitors.into_iter().map(|session| (session.qemu, session.number));
    let kept = sessions.chain(memory.into_iter().zip(memory_numbers)).collect();
    become_qemu(&binary, arguments, kept)
}

/// The session between QEMU and the relay for one monitor, and the listener for its clients.
struct Session {
    /// The relay's end.
    relay: OwnedFd,
    /// QEMU's end, and its descriptor number in QEMU.
    qemu: OwnedFd,
    number: RawFd,
    listener: StartListener,
    listener_fd: Option<OwnedFd>,
}

impl Session {
    fn make(monitor: &Monitor) -> Result<Self, LaunchError> {
        let place = || monitor.endpoint.to_string();
        let made =
            listener(&monitor.endpoint).and_then(|listener| Ok((listener, UnixStream::pair()?)));
        let ((listener, listener_fd), (relay, qemu)) =
            made.map_err(|source| LaunchError::Monitor { place: place(), source })?;
        let number = monitor.fd().unwrap_or(qemu.as_raw_fd());
        Ok(Self { relay: relay.into(), qemu: qemu.into(), number, listener, listener_fd })
    }
}

/// Make the socket on which management connects, in QEMU's place.
fn listener(endpoint: &Endpoint) -> io::Result<(StartListener, Option<OwnedFd>)> {
    Ok(match endpoint {
        Endpoint::Listen { path, wait } => {
            let path = std::path::absolute(path)?;
            // As QEMU does (util/qemu-sockets.c, unix_listen_saddr).
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(&path)?;
            (StartListener::Listening { path: Some(path), wait: *wait }, Some(listener.into()))
        }
        Endpoint::Listening { fd, wait } => {
            (StartListener::Listening { path: None, wait: *wait }, Some(inherited(*fd)?))
        }
        Endpoint::Connect { path, reconnect: Some(every) } => {
            let path = std::path::absolute(path)?;
            (StartListener::Connecting { path, every: *every }, None)
        }
        Endpoint::Connect { path, reconnect: None } => {
            (StartListener::Connected, Some(UnixStream::connect(path)?.into()))
        }
        Endpoint::Connected { fd } => (StartListener::Connected, Some(inherited(*fd)?)),
        Endpoint::Nobody => (StartListener::Closed, None),
    })
}

/// Create memory for a backend, sealed to its size.
fn memfd(memory: &Memory) -> Result<OwnedFd, LaunchError> {
    let Memory { id, size, .. } = memory;
    let fail = |why: String| LaunchError::Memory { id: id.clone(), size: *size, why };
    let name = format!("memory-backend-{id}");
    let options = MemfdOptions::default().allow_sealing(true);
    let memfd = options.create(name).map_err(|error| fail(error.to_string()))?;
    let length = size.checked_next_multiple_of(PAGE).ok_or_else(|| fail("too much".into()))?;
    memfd.as_file().set_len(length).map_err(|error| fail(error.to_string()))?;
    memfd
        .add_seals(&[FileSeal::SealGrow, FileSeal::SealShrink, FileSeal::SealSeal])
        .map_err(|error| fail(error.to_string()))?;
    Ok(memfd.into_file().into())
}

/// Start the relay, and wait until it serves.
fn start_relay(
    plan: &Plan,
    settings: Settings,
    sessions: &[Session],
    memory: &[OwnedFd],
) -> Result<(), LaunchError> {
    let relay = |error: io::Error| LaunchError::Relay(error.to_string());
    let memory_listed = plan.memory.iter().zip(memory).map(|(memory, fd)| StartMemory {
        id: memory.id.clone(),
        path: Memory::path(fd.as_raw_fd()),
    });
    let start = Start {
        settings,
        monitors: sessions.iter().map(|s| StartMonitor { listener: s.listener.clone() }).collect(),
        memory: memory_listed.collect(),
        incoming: plan.incoming.clone(),
        background: plan.background,
    };
    let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
    for session in sessions {
        fds.push(session.relay.as_fd());
        fds.extend(session.listener_fd.as_ref().map(|fd| fd.as_fd()));
    }
    fds.extend(memory.iter().map(|fd| fd.as_fd()));
    let (ours, theirs) = UnixStream::pair().map_err(relay)?;
    let starter = Command::new("/proc/self/exe")
        .arg0("qemu-rdma-helper")
        .arg("relay")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn();
    match starter.map_err(relay)?.wait() {
        Ok(status) if !status.success() => {
            return Err(LaunchError::Relay(format!("it ended with {status}; see its messages")));
        }
        // If management ignores SIGCHLD, so does this process: there is nothing left to wait for.
        Err(error) if error.raw_os_error() != Some(libc::ECHILD) => return Err(relay(error)),
        _ => {}
    }
    let line = line(&start, fds.len()).map_err(relay)?;
    socket::send_all(&ours, &line, &fds).map_err(relay)?;
    // With `wait=on` QEMU waits for management without a limit; so does this.
    let waits =
        |session: &Session| matches!(session.listener, StartListener::Listening { wait: true, .. });
    let patience = (!sessions.iter().any(waits)).then_some(START);
    ours.set_read_timeout(patience).map_err(relay)?;
    let mut answer = String::new();
    BufReader::new(ours).read_line(&mut answer).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => {
            LaunchError::Relay(format!("it was not ready within {} s", START.as_secs()))
        }
        _ => relay(error),
    })?;
    match serde_json::from_str(&answer) {
        Ok(Started::Ready) => Ok(()),
        Ok(Started::Failed(why)) => Err(LaunchError::Relay(why)),
        Err(_) => Err(LaunchError::Relay("it died; see its messages".into())),
    }
}

/// Execute QEMU in this process. Descriptors opened here are closed; inherited ones stay open.
fn become_qemu(
    binary: &OsStr,
    arguments: Vec<OsString>,
    kept: Vec<(OwnedFd, RawFd)>,
) -> Result<Infallible, LaunchError> {
    let failed = |source| LaunchError::Qemu { binary: binary.into(), source };
    let mappings =
        kept.into_iter().map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd }).collect();
    let mut command = Command::new(binary);
    command.args(arguments);
    let twice = |_| io::Error::new(io::ErrorKind::InvalidInput, "two monitors on one descriptor");
    command.fd_mappings(mappings).map_err(twice).map_err(failed)?;
    Err(failed(command.exec()))
}
