//! The session with QEMU. In band it sends the client's commands and the relay's own one at a time;
//! out-of-band commands overtake them.

mod lines;

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    net::UnixStream,
    sync::{Notify, mpsc, oneshot},
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{process::Process, socket_file::Place};
use crate::{
    qemu,
    qmp::{
        Execute, ITEM_MAX, QmpError,
        envelope::{self, FromQemu, Id, Kind, OutOfBand},
        socket,
    },
};
use lines::{Line, Lines, greeting, invalid};

/// How long QEMU may take to send its greeting.
const GREETING: Duration = Duration::from_secs(5);

/// Delay before a missing socket is looked for again.
const RETRY: Duration = Duration::from_millis(100);

/// Requests and events that may be queued; their sender waits while the queue is full.
const QUEUE: usize = 256;

/// A command for QEMU, and where its reply goes.
struct Request {
    line: Vec<u8>,
    fds: Vec<OwnedFd>,
    waiter: Waiter,
}

enum Waiter {
    /// To the relay itself; with the command's id.
    Own(String, oneshot::Sender<Vec<u8>>),
    /// To this client; with the command's id. The reply keeps its place among the events.
    Client(u64, Option<Id>),
}

/// The order in which commands execute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Band {
    /// One after the other.
    In,
    /// At once.
    Out,
}

/// What QEMU said, in its order.
#[derive(Debug)]
pub enum Said {
    /// An event's line.
    Event(Vec<u8>),
    /// The line of a reply to this client's command.
    Reply(u64, Band, Vec<u8>),
}

/// Executes commands in the session.
///
/// QEMU gets an in-band command when it has replied to the previous one, as from a client that
/// waits. So a reply without an id of ours belongs to that command, and no other command can take
/// its descriptors. Whatever QEMU makes of a client's command, the relay's own ids ensure that
/// nobody gets another's reply.
#[derive(Clone)]
pub struct Qemu {
    requests: mpsc::Sender<Request>,
    /// Out-of-band requests, with the ids under which they are sent.
    overtaking: mpsc::Sender<(String, Request)>,
    /// QEMU accepts out-of-band commands.
    oob: bool,
    /// Prefix of the ids of the relay's own commands; no client can guess it.
    own_id: Arc<str>,
    next_id: Arc<AtomicU64>,
}

impl Qemu {
    /// Return whether QEMU, or only the session with it, is gone.
    pub fn is_lost(&self) -> bool {
        self.requests.is_closed()
    }
}

/// A new session.
pub struct Session {
    /// Others may hold QEMU's end after QEMU is gone: see [`Self::end_with`].
    stream: Arc<UnixStream>,
    /// Executes commands.
    pub qemu: Qemu,
    /// Events, and replies to clients. Closed when QEMU is gone.
    pub said: mpsc::Receiver<Said>,
    /// QEMU's greeting.
    pub greeting: Value,
    /// PID of the process at the other end of the socket.
    pub pid: u32,
}

impl Session {
    /// Connect to QEMU's QMP socket and negotiate; wait this long for a QEMU that is about to
    /// start.
    ///
    /// Symbolic links are not followed: QEMU may own the directory, and a link to another's socket
    /// would make QEMU pass for its owner.
    ///
    /// # Errors
    /// An I/O error from the system; `InvalidData` if that is not a QMP server.
    pub async fn connect(path: &Path, wait: Duration) -> io::Result<Self> {
        let begun = Instant::now();
        let stream = reach(path, wait).await?;
        let pid = qemu::peer_pid(&stream)?;
        let mut lines = Lines::new(Arc::new(stream));
        // QEMU serves one client per socket and does not answer the next. A QEMU that has just made
        // its socket sends the greeting only after it has created the guest.
        let patience = GREETING.max(wait.saturating_sub(begun.elapsed()));
        let another = || invalid("it does not answer; is another client attached?");
        let greeting = timeout(patience, lines.greeting()).await.map_err(|_| another())??;
        let greeting = greeting.ok_or_else(another)?;
        let late = |_| invalid("it does not answer as QMP does");
        timeout(GREETING, Self::negotiated(lines, greeting, pid)).await.map_err(late)?
    }

    /// Negotiate with a starting QEMU at the other end of `stream`; it may take as long as it
    /// needs. `None` if QEMU exits before that.
    ///
    /// SO_PASSCRED has been set on the socket since before QEMU started: the process that made the
    /// pair is not the one that sends the greeting, because QEMU may daemonize in between.
    ///
    /// # Errors
    /// As for [`Self::connect`].
    pub async fn begin(stream: UnixStream) -> io::Result<Option<Self>> {
        let mut lines = Lines::new(Arc::new(stream));
        let Some(greeting) = lines.greeting().await? else { return Ok(None) };
        let pid = lines.sender.ok_or_else(|| invalid("the socket does not tell the sender"))?;
        match Self::negotiated(lines, greeting, pid).await {
            // QEMU exited during the negotiation.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            session => session.map(Some),
        }
    }

    /// Open the process at the other end of the socket; the negotiation shows that QEMU is alive.
    pub fn peer(&self) -> Process {
        Process::peer(&*self.stream, self.pid)
    }

    /// End the session when `process` has exited, even if a child of QEMU's still holds QEMU's end.
    pub fn end_with(&self, process: Arc<Process>) {
        let stream = self.stream.clone();
        tokio::spawn(async move {
            process.ended().await;
            // QEMU's last output is still read.
            let _ = rustix::net::shutdown(&stream, rustix::net::Shutdown::Read);
        });
    }

    async fn negotiated(lines: Lines, greeting: Value, pid: u32) -> io::Result<Self> {
        let stream = lines.stream.clone();
        let (requests, in_turn) = mpsc::channel(QUEUE);
        let (overtaking, at_once) = mpsc::channel(QUEUE);
        let (say, said) = mpsc::channel(QUEUE);
        let random = RandomState::new().build_hasher().finish();
        let own_id: Arc<str> = format!("qemu-rdma-helper-{random:016x}-").into();
        let writer = stream.clone();
        tokio::spawn(async move {
            let waiting = Waiting::default();
            tokio::select! {
                () = read(lines, &waiting, say) => {}
                () = write(&writer, in_turn, at_once, &waiting) => {}
            }
        });
        let oob = offers_oob(&greeting);
        let mut qemu = Qemu { requests, overtaking, oob, own_id, next_id: Arc::default() };
        let refused = |error: QmpError| match &*error.class {
            QmpError::CONNECTION_LOST => {
                io::Error::new(io::ErrorKind::UnexpectedEof, "it ended while it negotiated")
            }
            _ => invalid(&format!("it refused to negotiate: {error}")),
        };
        negotiate(&mut qemu).await.map_err(refused)?;
        Ok(Self { stream, qemu, said, greeting, pid })
    }
}

/// Connect to the socket at `path`, waiting this long until it exists and somebody listens.
///
/// Polls: no event on the directory tells that somebody listens, and the directory itself may not
/// exist yet.
async fn reach(path: &Path, wait: Duration) -> io::Result<UnixStream> {
    let begun = Instant::now();
    let mut waits = false;
    loop {
        let connected = async { Place::open(path)?.connect().await };
        let error = match connected.await {
            Err(error) if may_come(&error) => error,
            connected => return connected,
        };
        if begun.elapsed() >= wait {
            let waited = if waits { format!(" for {} s", wait.as_secs()) } else { String::new() };
            return Err(io::Error::new(error.kind(), format!("{error}{waited}")));
        }
        if !std::mem::replace(&mut waits, true) {
            info!(path = %path.display(), "waiting for QEMU's socket");
        }
        sleep(RETRY.min(wait.saturating_sub(begun.elapsed()))).await;
    }
}

/// Return whether a QEMU that is yet to start may cause this error.
fn may_come(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Return whether commands can execute out of band. QEMU offers that if its monitor has its own
/// thread.
pub fn offers_oob(greeting: &Value) -> bool {
    let capabilities = greeting.pointer("/QMP/capabilities").and_then(Value::as_array);
    capabilities.is_some_and(|capabilities| capabilities.contains(&json!("oob")))
}

/// Negotiate, and check that it lasts: a starting QEMU may take the session for opened twice, greet
/// twice, and then expect another negotiation.
async fn negotiate(qemu: &mut Qemu) -> Result<(), QmpError> {
    let enable = if qemu.oob { json!({ "enable": ["oob"] }) } else { Value::Null };
    qemu.execute("qmp_capabilities", enable.clone()).await?;
    if qemu.execute("query-version", Value::Null).await.is_err() {
        qemu.execute("qmp_capabilities", enable).await?;
    }
    Ok(())
}

impl Qemu {
    /// Send a command of client number `client` unchanged; `id` is its id, if it has one. The reply
    /// arrives as [`Said::Reply`].
    ///
    /// # Errors
    /// [`QmpError::connection_lost`].
    pub async fn forward(
        &self,
        client: u64,
        mut line: Vec<u8>,
        id: Option<Id>,
        fds: Vec<OwnedFd>,
    ) -> Result<(), QmpError> {
        // A delimiter: QEMU's parser, too, must end the command here.
        line.extend_from_slice(b"\r\n");
        let request = Request { line, fds, waiter: Waiter::Client(client, id) };
        self.requests.send(request).await.map_err(|_| QmpError::connection_lost())
    }

    /// Send a client's out-of-band command under an id of ours: its reply may arrive at any time.
    pub fn overtaking(
        &self,
        client: u64,
        command: &OutOfBand<'_>,
    ) -> impl Future<Output = ()> + Send + use<> {
        let id = self.id();
        let waiter = Waiter::Client(client, command.id.clone());
        let request = Request { line: command.under(&id), fds: Vec::new(), waiter };
        let overtaking = self.overtaking.clone();
        // Fails only if QEMU is gone, which ends the relay.
        async move { drop(overtaking.send((id, request)).await) }
    }

    /// Execute a command of our own, with descriptors.
    ///
    /// # Errors
    /// The error reply, or [`QmpError::connection_lost`].
    pub async fn execute_with(
        &self,
        command: &str,
        arguments: Value,
        fds: Vec<OwnedFd>,
    ) -> Result<Value, QmpError> {
        let line = self.ask(Band::In, command, arguments, fds).await?;
        said(FromQemu::read(&line), command)
    }

    /// Execute a command of our own in this band, or in band if QEMU has no other.
    ///
    /// # Errors
    /// The error reply, or [`QmpError::connection_lost`].
    pub async fn execute_in(
        &self,
        band: Band,
        command: &str,
        arguments: Value,
    ) -> Result<Value, QmpError> {
        let band = if self.oob { band } else { Band::In };
        let line = self.ask(band, command, arguments, Vec::new()).await?;
        said(FromQemu::read(&line), command)
    }

    fn id(&self) -> String {
        format!("{}{}", self.own_id, self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Execute a command of our own, and return the line of the reply.
    async fn ask(
        &self,
        band: Band,
        command: &str,
        arguments: Value,
        fds: Vec<OwnedFd>,
    ) -> Result<Vec<u8>, QmpError> {
        let id = self.id();
        let execute = if band == Band::In { "execute" } else { "exec-oob" };
        let mut request = json!({ execute: command, "id": &id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let (waiter, reply) = oneshot::channel();
        let line = format!("{request}\r\n").into_bytes();
        let request = Request { line, fds, waiter: Waiter::Own(id.clone(), waiter) };
        let sent = match band {
            Band::In => self.requests.send(request).await.is_ok(),
            Band::Out => self.overtaking.send((id, request)).await.is_ok(),
        };
        if !sent {
            return Err(QmpError::connection_lost());
        }
        reply.await.map_err(|_| QmpError::connection_lost())
    }
}

/// Return the result in a reply to `command`.
fn said(reply: Option<FromQemu>, command: &str) -> Result<Value, QmpError> {
    match reply {
        Some(FromQemu::Reply { result, .. }) => result,
        _ => Err(QmpError::generic(format!("QEMU's reply to '{command}' is not understood"))),
    }
}

/// The session, for replies that are passed on to a client: all strings but those of errors stay as
/// QEMU wrote them.
pub struct Verbatim(pub Qemu);

impl Execute for Verbatim {
    async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let line = self.0.ask(Band::In, command, arguments, Vec::new()).await?;
        said(FromQemu::read_verbatim(&line), command)
    }
}

impl Execute for Qemu {
    async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_with(command, arguments, Vec::new()).await
    }
}

/// Recipients of pending replies.
#[derive(Default)]
struct Waiting {
    waiters: Mutex<Waiters>,
    /// Notified when the in-band command has its reply.
    answered: Notify,
}

#[derive(Default)]
struct Waiters {
    in_band: Option<Waiter>,
    /// By the ids under which the commands were sent.
    out_of_band: HashMap<String, Waiter>,
}

impl Waiting {
    fn waiters(&self) -> MutexGuard<'_, Waiters> {
        // Nothing panics while it holds the lock.
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Take the recipient of a reply with this id. A reply with no id, or with a client's, is in
    /// band.
    fn take(&self, id: Option<&[u8]>) -> Option<(Band, Waiter)> {
        let mut waiters = self.waiters();
        let id: Option<String> = id.and_then(|id| serde_json::from_slice(id).ok());
        if let Some(waiter) = id.as_ref().and_then(|id| waiters.out_of_band.remove(id)) {
            return Some((Band::Out, waiter));
        }
        let is_its = |waiter: &mut Waiter| match waiter {
            Waiter::Own(own, _) => id.as_deref() == Some(own.as_str()),
            Waiter::Client(..) => true,
        };
        let waiter = waiters.in_band.take_if(is_its)?;
        self.answered.notify_one();
        Some((Band::In, waiter))
    }

    /// Take the recipient of the in-band reply, whatever the reply is.
    fn take_in_band(&self) -> Option<Waiter> {
        let waiter = self.waiters().in_band.take()?;
        self.answered.notify_one();
        Some(waiter)
    }
}

/// Write requests: in-band ones after the previous reply, out-of-band ones at once.
async fn write(
    stream: &UnixStream,
    mut in_turn: mpsc::Receiver<Request>,
    mut at_once: mpsc::Receiver<(String, Request)>,
    waiting: &Waiting,
) {
    let mut busy = false;
    loop {
        let (line, fds) = tokio::select! {
            biased;
            () = waiting.answered.notified(), if busy => {
                busy = false;
                continue;
            }
            Some((id, Request { line, fds, waiter })) = at_once.recv() => {
                waiting.waiters().out_of_band.insert(id, waiter);
                (line, fds)
            }
            Some(Request { line, fds, waiter }) = in_turn.recv(), if !busy => {
                waiting.waiters().in_band = Some(waiter);
                busy = true;
                (line, fds)
            }
            // No more requests can follow; QEMU's output is still read.
            else => break,
        };
        let borrowed: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        if let Err(error) = socket::send_all_async(stream, &line, &borrowed).await {
            // `read` ends the session.
            debug!(%error, "QEMU takes no more commands");
            break;
        }
    }
    drop((in_turn, at_once));
    std::future::pending().await
}

/// Deliver the relay's own replies to their recipients, and pass on the rest.
async fn read(mut lines: Lines, waiting: &Waiting, say: mpsc::Sender<Said>) {
    loop {
        let said = match lines.next().await {
            Ok(Some(Line::Whole(line))) => heard(line, waiting),
            Ok(Some(Line::TooLong)) => cut_off(waiting),
            Ok(None) => return,
            Err(error) => return warn!(%error, "the session with QEMU failed"),
        };
        if let Some(said) = said
            && say.send(said).await.is_err()
        {
            return;
        }
    }
}

/// Return what clients get of a line, if anything. Replies are not parsed for that: only the asker
/// has to understand them.
fn heard(line: Vec<u8>, waiting: &Waiting) -> Option<Said> {
    let waiter = match Kind::of(&line) {
        Some(Kind::Reply(id)) => waiting.take(id),
        Some(Kind::Other) if greeting(&line).is_some() => {
            debug!("QEMU greets again");
            return None;
        }
        Some(Kind::Event | Kind::Other) => return Some(Said::Event(line)),
        None => {
            warn!("QEMU sent a line that is not a JSON object");
            waiting.take_in_band().map(|waiter| (Band::In, waiter))
        }
    };
    match waiter {
        Some((Band::In, Waiter::Client(client, _))) => Some(Said::Reply(client, Band::In, line)),
        Some((Band::Out, Waiter::Client(client, id))) => {
            Some(Said::Reply(client, Band::Out, envelope::with_id(&line, id.as_ref())))
        }
        Some((_, Waiter::Own(_, waiter))) => {
            // A recipient that has given up does not need it.
            let _ = waiter.send(line);
            None
        }
        None => {
            debug!("unexpected reply from QEMU");
            None
        }
    }
}

/// Handle a line too long to keep. Events are short, so it was a reply: return an error to the
/// asker.
fn cut_off(waiting: &Waiting) -> Option<Said> {
    let error = QmpError::generic(format!(
        "QEMU's reply has more than {ITEM_MAX} bytes; ask for less at a time"
    ));
    match waiting.take_in_band() {
        Some(Waiter::Client(client, id)) => {
            Some(Said::Reply(client, Band::In, envelope::reply(&Err(error), id.as_ref())))
        }
        Some(Waiter::Own(_, waiter)) => {
            let _ = waiter.send(envelope::reply(&Err(error), None));
            None
        }
        None => {
            warn!("QEMU sent an over-long line that is not a reply");
            None
        }
    }
}
