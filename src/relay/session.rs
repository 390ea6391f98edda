//! The session with QEMU: the client's commands and the relay's own, one behind the other.

use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    net::UnixStream,
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{process::Process, socket_file::Place};
use crate::{
    qemu,
    qmp::{Execute, ITEM_MAX, QmpError, envelope::FromQemu, socket},
};

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
    /// This client's: its reply keeps its place among the events.
    Client(u64),
}

/// What QEMU said, in its order.
#[derive(Debug)]
pub enum Said {
    /// The line of an event.
    Event(Vec<u8>),
    /// The line of a reply to this client.
    Reply(u64, Vec<u8>),
}

/// Executes commands in the session. QEMU answers in the order in which they are sent; the ids of
/// the relay's own make sure that no reply of a client's is taken for one of them, or for another's.
#[derive(Clone)]
pub struct Qemu {
    requests: mpsc::Sender<Request>,
    /// Closed when nothing more of QEMU's is read.
    waiting: mpsc::Sender<Waiter>,
    /// Begins the ids of the relay's own commands; no client can guess it.
    own_id: Arc<str>,
    next_id: Arc<AtomicU64>,
}

impl Qemu {
    /// QEMU is gone, or only the session with it.
    pub fn is_lost(&self) -> bool {
        self.waiting.is_closed()
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
        let (requests, to_write) = mpsc::channel(QUEUE);
        let (waiting, waiters) = mpsc::channel(QUEUE);
        let (say, said) = mpsc::channel(QUEUE);
        tokio::spawn(write(stream.clone(), to_write, waiting.clone()));
        let random = RandomState::new().build_hasher().finish();
        let own_id: Arc<str> = format!("qemu-rdma-helper-{random:016x}-").into();
        tokio::spawn(read(lines, Replies { waiters, next: None, own_id: own_id.clone() }, say));
        let mut qemu = Qemu { requests, waiting, own_id, next_id: Arc::default() };
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

/// Negotiate, and see that it lasts: a QEMU that is just starting may take the session for opened
/// twice, greet twice, and expect another negotiation then.
async fn negotiate(qemu: &mut Qemu) -> Result<(), QmpError> {
    qemu.execute("qmp_capabilities", Value::Null).await?;
    if qemu.execute("query-version", Value::Null).await.is_err() {
        qemu.execute("qmp_capabilities", Value::Null).await?;
    }
    Ok(())
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl Qemu {
    /// Send the command of client number `client` as it is; the reply comes as [`Said::Reply`].
    ///
    /// # Errors
    /// [`QmpError::connection_lost`].
    pub async fn forward(
        &self,
        client: u64,
        line: Vec<u8>,
        fds: Vec<OwnedFd>,
    ) -> Result<(), QmpError> {
        let request = Request { line, fds, waiter: Waiter::Client(client) };
        self.requests.send(request).await.map_err(|_| QmpError::connection_lost())
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
        let line = self.ask(command, arguments, fds).await?;
        said(FromQemu::read(&line), command)
    }

    /// The line of the reply.
    async fn ask(
        &self,
        command: &str,
        arguments: Value,
        fds: Vec<OwnedFd>,
    ) -> Result<Vec<u8>, QmpError> {
        let id = format!("{}{}", self.own_id, self.next_id.fetch_add(1, Ordering::Relaxed));
        let mut request = json!({ "execute": command, "id": &id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let (waiter, reply) = oneshot::channel();
        let line = format!("{request}\r\n").into_bytes();
        let request = Request { line, fds, waiter: Waiter::Own(id, waiter) };
        self.requests.send(request).await.map_err(|_| QmpError::connection_lost())?;
        reply.await.map_err(|_| QmpError::connection_lost())
    }
}

/// What a reply to `command` says.
fn said(reply: serde_json::Result<FromQemu>, command: &str) -> Result<Value, QmpError> {
    match reply {
        Ok(FromQemu::Reply { result, .. }) => result,
        _ => Err(QmpError::generic(format!("QEMU's reply to '{command}' is not understood"))),
    }
}

/// The session, for what QEMU answers a client through us: its strings are what QEMU wrote, those of
/// errors excepted.
pub struct Verbatim(pub Qemu);

impl Execute for Verbatim {
    async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let line = self.0.ask(command, arguments, Vec::new()).await?;
        said(FromQemu::read_verbatim(&line), command)
    }
}

impl Execute for Qemu {
    async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_with(command, arguments, Vec::new()).await
    }
}

/// Write requests, and queue their waiters in the same order.
async fn write(
    stream: Arc<UnixStream>,
    mut requests: mpsc::Receiver<Request>,
    waiting: mpsc::Sender<Waiter>,
) {
    while let Some(Request { line, fds, waiter }) = requests.recv().await {
        if waiting.send(waiter).await.is_err() {
            return;
        }
        let borrowed: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        if let Err(error) = socket::send_all_async(&stream, &line, &borrowed).await {
            // The reader ends the session.
            debug!(%error, "QEMU takes no more commands");
            return;
        }
    }
}

/// Who waits for replies, in the order of the commands.
struct Replies {
    waiters: mpsc::Receiver<Waiter>,
    next: Option<Waiter>,
    own_id: Arc<str>,
}

impl Replies {
    /// Who waits for a reply with this id. QEMU may answer one line of a client's with more than
    /// one error, and those have no id.
    fn waiter(&mut self, id: Option<&str>) -> Option<Waiter> {
        loop {
            let waiter = self.next.take().or_else(|| self.waiters.try_recv().ok())?;
            let own_reply = id.is_some_and(|id| id.starts_with(&*self.own_id));
            match waiter {
                Waiter::Client(_) if !own_reply => return Some(waiter),
                Waiter::Own(ref own, _) if Some(own.as_str()) == id => return Some(waiter),
                // One more reply to what was answered: its own is still to come.
                Waiter::Own(..) if !own_reply => {
                    self.next = Some(waiter);
                    return None;
                }
                // It was not answered, and will not be.
                Waiter::Client(_) | Waiter::Own(..) => {}
            }
        }
    }
}

/// Hand the relay's own replies to their waiters, and say the rest.
async fn read(mut lines: Lines, mut replies: Replies, say: mpsc::Sender<Said>) {
    loop {
        let line = match lines.next().await {
            Ok(Some(line)) => line,
            Ok(None) => return,
            Err(error) => return warn!(%error, "the session with QEMU failed"),
        };
        let said = match FromQemu::read(&line) {
            Ok(FromQemu::Reply { id, .. }) => match replies.waiter(id.as_deref()) {
                Some(Waiter::Client(client)) => Said::Reply(client, line),
                Some(Waiter::Own(_, waiter)) => {
                    // Whoever does not wait any more does not want it.
                    let _ = waiter.send(line);
                    continue;
                }
                None => {
                    debug!("a reply of QEMU that nobody waits for");
                    continue;
                }
            },
            Ok(FromQemu::Other(greeting)) if greeting.get("QMP").is_some() => {
                debug!("QEMU greets again");
                continue;
            }
            Ok(FromQemu::Event { .. } | FromQemu::Other(_)) => Said::Event(line),
            Err(error) => {
                warn!(%error, "a line of QEMU that is no JSON object");
                continue;
            }
        };
        if say.send(said).await.is_err() {
            return;
        }
    }
}

/// Lines from QEMU, with their ends.
struct Lines {
    stream: Arc<UnixStream>,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that contain no end of line.
    scanned: usize,
    /// A line was too long: drop the rest of it.
    dropping: bool,
    /// Who sent the last bytes, if the socket tells.
    sender: Option<u32>,
}

impl Lines {
    fn new(stream: Arc<UnixStream>) -> Self {
        Self { stream, buffer: Vec::new(), scanned: 0, dropping: false, sender: None }
    }

    /// QEMU's first word; `None` if it has none.
    async fn greeting(&mut self) -> io::Result<Option<Value>> {
        while let Some(line) = self.next().await? {
            match FromQemu::read(&line) {
                Ok(FromQemu::Other(greeting)) if greeting["QMP"].is_object() => {
                    return Ok(Some(greeting));
                }
                // Events may come before the greeting.
                Ok(FromQemu::Event { .. }) => {}
                _ => return Err(invalid("it does not greet as QMP does")),
            }
        }
        Ok(None)
    }

    /// The next line; a line that is too long becomes an error reply, which is what it was.
    async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.buffer[self.scanned..].iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.drain(..=self.scanned + end).collect();
                self.scanned = 0;
                if std::mem::take(&mut self.dropping) {
                    let error = QmpError::generic(format!(
                        "QEMU's reply has more than {ITEM_MAX} bytes; ask for less at a time"
                    ));
                    return Ok(Some(crate::qmp::envelope::reply(&Err(error), None)));
                }
                return Ok(Some(line));
            }
            self.scanned = self.buffer.len();
            if self.scanned > ITEM_MAX {
                self.dropping = true;
            }
            if self.dropping {
                self.buffer.clear();
                self.scanned = 0;
            }
            let mut piece = [0; 16384];
            let received = socket::recv_with_sender(&self.stream, &mut piece).await;
            let (received, sender) = match received {
                // QEMU ended with bytes of ours unread.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => (0, None),
                other => other?,
            };
            self.sender = sender.map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
            if received == 0 {
                return Ok(None);
            }
            self.buffer.extend_from_slice(&piece[..received]);
        }
    }
}
