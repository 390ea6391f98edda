//! The session with QEMU: the client's commands and the relay's own, one behind the other, and past all
//! of them what is out of band.

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

/// How long QEMU may take to greet.
const GREETING: Duration = Duration::from_secs(5);

/// How soon a socket that is not there is looked for again.
const RETRY: Duration = Duration::from_millis(100);

/// Requests and events that may wait; whoever has more to say waits too.
const QUEUE: usize = 256;

/// A command on its way to QEMU, and who waits for the reply's line.
struct Request {
    line: Vec<u8>,
    fds: Vec<OwnedFd>,
    waiter: Waiter,
}

enum Waiter {
    /// A command of the relay's own, with its id.
    Own(String, oneshot::Sender<Vec<u8>>),
    /// This client's, with its id: its reply keeps its place among the events.
    Client(u64, Option<Id>),
}

/// In which order commands are executed.
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
    /// The line of an event.
    Event(Vec<u8>),
    /// The line of a reply to this client's command.
    Reply(u64, Band, Vec<u8>),
}

/// Executes commands in the session.
///
/// QEMU gets a command in band when it has answered the one before, as if each were sent by a client
/// that waits; so its reply is what has no id of ours, and descriptors can't come to another. Whatever
/// QEMU makes of a client's command, the ids of the relay's own make sure that nobody gets another's
/// reply.
#[derive(Clone)]
pub struct Qemu {
    requests: mpsc::Sender<Request>,
    /// Those out of band, with the ids under which they are sent.
    overtaking: mpsc::Sender<(String, Request)>,
    /// QEMU takes commands out of band.
    oob: bool,
    /// Begins the ids of the relay's own commands; no client can guess it.
    own_id: Arc<str>,
    next_id: Arc<AtomicU64>,
}

impl Qemu {
    /// QEMU is gone, or only the session with it.
    pub fn is_lost(&self) -> bool {
        self.requests.is_closed()
    }
}

/// A session that was just made.
pub struct Session {
    /// QEMU's end of it may be held by others when QEMU is gone: see [`Self::end_with`].
    stream: Arc<UnixStream>,
    /// Executes commands.
    pub qemu: Qemu,
    /// Events, and replies to clients. Closed when QEMU is gone.
    pub said: mpsc::Receiver<Said>,
    /// What QEMU greeted with.
    pub greeting: Value,
    /// The process at the other end of the socket.
    pub pid: u32,
}

impl Session {
    /// Connect to QEMU's QMP socket, and negotiate; wait so long for a QEMU that is about to start. No
    /// link is followed from its place to another's, because QEMU may own its directory, and be taken for
    /// the other then.
    ///
    /// # Errors
    /// The system's; `InvalidData` if that is no QMP server.
    pub async fn connect(path: &Path, wait: Duration) -> io::Result<Self> {
        let begun = Instant::now();
        let stream = reach(path, wait).await?;
        let pid = qemu::peer_pid(&stream)?;
        let mut lines = Lines::new(Arc::new(stream));
        // QEMU serves one client a socket, and lets the next wait without a word. One that has just made
        // it greets when it has made the guest, too.
        let patience = GREETING.max(wait.saturating_sub(begun.elapsed()));
        let another = || invalid("it does not answer; is another client attached?");
        let greeting = timeout(patience, lines.greeting()).await.map_err(|_| another())??;
        let greeting = greeting.ok_or_else(another)?;
        let late = |_| invalid("it does not answer as QMP does");
        timeout(GREETING, Self::negotiated(lines, greeting, pid)).await.map_err(late)?
    }

    /// Negotiate with a QEMU that is just starting, at the other end of `stream`; it may take as
    /// long as it needs. `None` if it ended before that.
    ///
    /// The socket has named senders (SO_PASSCRED) since before QEMU was there: who made the pair is
    /// not who greets, because QEMU may go to the background in between.
    ///
    /// # Errors
    /// As for [`Self::connect`].
    pub async fn begin(stream: UnixStream) -> io::Result<Option<Self>> {
        let mut lines = Lines::new(Arc::new(stream));
        let Some(greeting) = lines.greeting().await? else { return Ok(None) };
        let pid = lines.sender.ok_or_else(|| invalid("nobody has sent what it said"))?;
        match Self::negotiated(lines, greeting, pid).await {
            // It ended in the midst of it.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            session => session.map(Some),
        }
    }

    /// The process at the other end of the socket, of which QEMU says that it is alive.
    pub fn peer(&self) -> Process {
        Process::peer(&*self.stream, self.pid)
    }

    /// End when `process` has ended, whoever else holds QEMU's end: a child of QEMU's may.
    pub fn end_with(&self, process: Arc<Process>) {
        let stream = self.stream.clone();
        tokio::spawn(async move {
            process.ended().await;
            // What QEMU has said is still read.
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

/// Connect to the socket at `path`, which may take so long to be there and to be listened at.
///
/// It is looked for again and again: that somebody listens is no change that a directory tells of, and the
/// directory itself may be yet to come.
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

/// Is that what it looks like where a QEMU is yet to start?
fn may_come(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// Can commands be executed out of band? QEMU offers it where its monitor has a thread for itself.
pub fn offers_oob(greeting: &Value) -> bool {
    let capabilities = greeting.pointer("/QMP/capabilities").and_then(Value::as_array);
    capabilities.is_some_and(|capabilities| capabilities.contains(&json!("oob")))
}

/// Negotiate, and see that it lasts: a QEMU that is just starting may take the session for opened
/// twice, greet twice, and expect another negotiation then.
async fn negotiate(qemu: &mut Qemu) -> Result<(), QmpError> {
    let enable = if qemu.oob { json!({ "enable": ["oob"] }) } else { Value::Null };
    qemu.execute("qmp_capabilities", enable.clone()).await?;
    if qemu.execute("query-version", Value::Null).await.is_err() {
        qemu.execute("qmp_capabilities", enable).await?;
    }
    Ok(())
}

impl Qemu {
    /// Send the command of client number `client` as it is, with this id if it has one; the reply comes
    /// as [`Said::Reply`].
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
        // It ends where its last byte is, for QEMU too.
        line.extend_from_slice(b"\r\n");
        let request = Request { line, fds, waiter: Waiter::Client(client, id) };
        self.requests.send(request).await.map_err(|_| QmpError::connection_lost())
    }

    /// A client's command out of band, under an id of ours: its reply may come at any time.
    pub fn overtaking(
        &self,
        client: u64,
        command: &OutOfBand<'_>,
    ) -> impl Future<Output = ()> + Send + use<> {
        let id = self.id();
        let waiter = Waiter::Client(client, command.id.clone());
        let request = Request { line: command.under(&id), fds: Vec::new(), waiter };
        let overtaking = self.overtaking.clone();
        // A QEMU that is gone ends the relay.
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

    /// Execute a command of our own in this band, or in band where QEMU has no other.
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

    /// The line of the reply.
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

/// What a reply to `command` says.
fn said(reply: Option<FromQemu>, command: &str) -> Result<Value, QmpError> {
    match reply {
        Some(FromQemu::Reply { result, .. }) => result,
        _ => Err(QmpError::generic(format!("QEMU's reply to '{command}' is not understood"))),
    }
}

/// The session, for what QEMU answers a client through us: its strings are what QEMU wrote, those of
/// errors excepted.
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

/// Who waits for replies.
#[derive(Default)]
struct Waiting {
    waiters: Mutex<Waiters>,
    /// The command in band was answered.
    answered: Notify,
}

#[derive(Default)]
struct Waiters {
    in_band: Option<Waiter>,
    /// By the ids under which their commands were sent.
    out_of_band: HashMap<String, Waiter>,
}

impl Waiting {
    fn waiters(&self) -> MutexGuard<'_, Waiters> {
        // Nobody panics while he has it.
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who waits for a reply with this id; a reply with none, or with a client's, is in band.
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

    /// Who waits for the reply in band, whatever it says.
    fn take_in_band(&self) -> Option<Waiter> {
        let waiter = self.waiters().in_band.take()?;
        self.answered.notify_one();
        Some(waiter)
    }
}

/// Write requests: in band one when the one before was answered, out of band at once.
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
            // Nobody asks any more: QEMU is still heard.
            else => break,
        };
        let borrowed: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        if let Err(error) = socket::send_all_async(stream, &line, &borrowed).await {
            // The reader ends the session.
            debug!(%error, "QEMU takes no more commands");
            break;
        }
    }
    drop((in_turn, at_once));
    std::future::pending().await
}

/// Hand the relay's own replies to their waiters, and say the rest.
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

/// What a line means to clients, if it is for one. Replies are not read for that: whoever asked may
/// understand them.
fn heard(line: Vec<u8>, waiting: &Waiting) -> Option<Said> {
    let waiter = match Kind::of(&line) {
        Some(Kind::Reply(id)) => waiting.take(id),
        Some(Kind::Other) if greeting(&line).is_some() => {
            debug!("QEMU greets again");
            return None;
        }
        Some(Kind::Event | Kind::Other) => return Some(Said::Event(line)),
        None => {
            warn!("a line of QEMU that is no JSON object");
            waiting.take_in_band().map(|waiter| (Band::In, waiter))
        }
    };
    match waiter {
        Some((Band::In, Waiter::Client(client, _))) => Some(Said::Reply(client, Band::In, line)),
        Some((Band::Out, Waiter::Client(client, id))) => {
            Some(Said::Reply(client, Band::Out, envelope::with_id(&line, id.as_ref())))
        }
        Some((_, Waiter::Own(_, waiter))) => {
            // Whoever does not wait any more does not want it.
            let _ = waiter.send(line);
            None
        }
        None => {
            debug!("a reply of QEMU that nobody waits for");
            None
        }
    }
}

/// A line that is too long to keep was a reply: events are short. Whoever asked is told.
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
            warn!("a line of QEMU that is too long, and no reply");
            None
        }
    }
}
