//! The session with QEMU: the client's commands and the relay's own, one behind the other.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use serde_json::{Value, json};
use tokio::{
    net::UnixStream,
    sync::{mpsc, oneshot},
};
use tracing::{debug, warn};

use crate::{
    qemu,
    qmp::{Execute, ITEM_MAX, QmpError, envelope::FromQemu, socket},
};

/// Requests and events that may wait; whoever has more to say waits too.
const QUEUE: usize = 256;

/// A command on its way to QEMU, and who waits for the reply's line.
struct Request {
    line: Vec<u8>,
    fds: Vec<OwnedFd>,
    waiter: Waiter,
}

enum Waiter {
    /// A command of the relay's own.
    Own(oneshot::Sender<Vec<u8>>),
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

/// Executes commands in the session. QEMU answers in the order in which they are sent, so replies
/// need no matching; ids are only there to tell people in a trace whose command it was.
#[derive(Clone)]
pub struct Qemu {
    requests: mpsc::Sender<Request>,
    next_id: Arc<AtomicU64>,
}

/// A session that was just made.
pub struct Session {
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
    /// Connect to QEMU's QMP socket, and negotiate.
    ///
    /// # Errors
    /// The system's; `InvalidData` if that is no QMP server.
    pub async fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path).await?;
        let pid = qemu::peer_pid(&stream)?;
        let stream = Arc::new(stream);
        let mut lines = Lines::new(stream.clone());
        let greeting = loop {
            let Some(line) = lines.next().await? else {
                return Err(invalid("it closed the connection; is another client attached?"));
            };
            match FromQemu::read(&line) {
                Ok(FromQemu::Other(greeting)) if greeting.get("QMP").is_some() => break greeting,
                // Events may come before the greeting.
                Ok(FromQemu::Event { .. }) => {}
                _ => return Err(invalid("it does not greet as QMP does")),
            }
        };
        let (requests, to_write) = mpsc::channel(QUEUE);
        let (waiting, waiters) = mpsc::channel(QUEUE);
        let (say, said) = mpsc::channel(QUEUE);
        tokio::spawn(write(stream, to_write, waiting));
        tokio::spawn(read(lines, waiters, say));
        let mut qemu = Qemu { requests, next_id: Arc::default() };
        qemu.execute("qmp_capabilities", Value::Null)
            .await
            .map_err(|error| invalid(&format!("it refused to negotiate: {error}")))?;
        Ok(Self { qemu, said, greeting, pid })
    }
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
        let id = format!("qemu-rdma-helper-{}", self.next_id.fetch_add(1, Ordering::Relaxed));
        let mut request = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let (waiter, reply) = oneshot::channel();
        let line = format!("{request}\r\n").into_bytes();
        let request = Request { line, fds, waiter: Waiter::Own(waiter) };
        self.requests.send(request).await.map_err(|_| QmpError::connection_lost())?;
        let line = reply.await.map_err(|_| QmpError::connection_lost())?;
        match FromQemu::read(&line) {
            Ok(FromQemu::Reply { result, .. }) => result,
            _ => Err(QmpError::generic(format!("QEMU's reply to '{command}' is not understood"))),
        }
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

/// Hand the relay's own replies to their waiters, and say the rest.
async fn read(mut lines: Lines, mut waiters: mpsc::Receiver<Waiter>, say: mpsc::Sender<Said>) {
    loop {
        let line = match lines.next().await {
            Ok(Some(line)) => line,
            Ok(None) => return,
            Err(error) => return warn!(%error, "the session with QEMU failed"),
        };
        let said = match FromQemu::read(&line) {
            Ok(FromQemu::Reply { .. }) => match waiters.try_recv() {
                Ok(Waiter::Client(client)) => Said::Reply(client, line),
                Ok(Waiter::Own(waiter)) => {
                    // Whoever does not wait any more does not want it.
                    let _ = waiter.send(line);
                    continue;
                }
                Err(_) => {
                    warn!("a reply of QEMU that nobody waits for");
                    continue;
                }
            },
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
}

impl Lines {
    fn new(stream: Arc<UnixStream>) -> Self {
        Self { stream, buffer: Vec::new(), scanned: 0, dropping: false }
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
            let received = socket::recv_async(&self.stream, &mut piece, &mut Vec::new()).await;
            let received = match received {
                // QEMU ended with bytes of ours unread.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
                other => other?,
            };
            if received == 0 {
                return Ok(None);
            }
            self.buffer.extend_from_slice(&piece[..received]);
        }
    }
}
