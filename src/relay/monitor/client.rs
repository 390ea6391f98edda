//! The connection of one client: commands in, lines out.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    net::UnixStream,
    sync::{Notify, mpsc, watch},
    task::JoinHandle,
};
use tracing::{debug, warn};

use crate::qmp::{
    ITEM_MAX,
    framer::{Framed, Framer},
    socket,
};

/// Bytes that may be queued for a client that does not read. Above that, no more of its commands
/// are read and its events are dropped. The reply to a command comes on top.
const QUEUED_MAX: usize = 2 * ITEM_MAX;

/// A command, with the descriptors that arrived with it or before it.
pub struct FromClient {
    /// What the client sent.
    pub framed: Framed,
    /// The descriptors.
    pub fds: Vec<OwnedFd>,
}

/// What is queued for a client.
#[derive(Default)]
struct Queued {
    bytes: AtomicUsize,
    /// Notified when the client has read some.
    less: Notify,
}

/// A connected client.
pub struct Client {
    commands: mpsc::Receiver<FromClient>,
    /// The client has negotiated.
    pub negotiated: bool,
    /// The client has enabled out-of-band execution.
    pub oob: bool,
    /// Descriptors that no command has taken.
    descriptors: Vec<OwnedFd>,
    lines: mpsc::UnboundedSender<Vec<u8>>,
    queued: Arc<Queued>,
    /// Events are dropped because the client does not read.
    loses: bool,
    reading: JoinHandle<()>,
    /// Closed when reading has ended.
    read: watch::Receiver<()>,
    writing: JoinHandle<()>,
}

impl Client {
    /// Serve a connection.
    pub fn new(stream: UnixStream) -> Self {
        let stream = Arc::new(stream);
        let (sender, commands) = mpsc::channel(1);
        let (lines, to_write) = mpsc::unbounded_channel();
        let queued = Arc::new(Queued::default());
        let (reads, read) = watch::channel(());
        let reading = tokio::spawn(read_all(stream.clone(), sender, reads));
        let writing = tokio::spawn(write(stream, to_write, queued.clone()));
        Self {
            commands,
            negotiated: false,
            oob: false,
            descriptors: Vec::new(),
            lines,
            queued,
            loses: false,
            reading,
            read,
            writing,
        }
    }

    /// Wait until the client has hung up and all it sent is read.
    pub fn hung_up(&self) -> impl Future<Output = ()> + use<> {
        let mut read = self.read.clone();
        async move { while read.changed().await.is_ok() {} }
    }

    /// Queue a line. A lost connection is noticed where commands are read.
    pub fn send(&self, line: Vec<u8>) {
        self.queued.bytes.fetch_add(line.len(), Ordering::Relaxed);
        let _ = self.lines.send(line);
    }

    /// Queue the line of an event, or drop it if too much is queued: a manager may take a lost
    /// connection for the end of its guest, but it can query what it was not told.
    pub fn send_event(&mut self, line: Vec<u8>) {
        let lost = self.queued.bytes.load(Ordering::Relaxed) > QUEUED_MAX;
        if lost && !self.loses {
            warn!("the client does not read: events are lost");
        }
        self.loses = lost;
        if !lost {
            self.send(line);
        }
    }

    /// Return the next command; `None` when the client is gone. Only one is read ahead, and none
    /// while replies pile up: a client that sends without waiting is held back by its own socket.
    pub async fn next_command(&mut self) -> Option<FromClient> {
        while self.queued.bytes.load(Ordering::Relaxed) > QUEUED_MAX && !self.lines.is_closed() {
            self.queued.less.notified().await;
        }
        // A client that takes no replies is gone.
        if self.lines.is_closed() { None } else { self.commands.recv().await }
    }

    /// Keep descriptors that arrived.
    ///
    /// QEMU keeps them until a command takes them or others arrive (`tcp_chr_recv` in
    /// `chardev/char-socket.c`), whatever else was sent with them. The relay keeps them in QEMU's
    /// place: its own descriptors, sent in between, would replace them in QEMU.
    pub fn keep(&mut self, fds: Vec<OwnedFd>) {
        if !fds.is_empty() {
            self.descriptors = fds;
        }
    }

    /// Take the descriptors if the command uses them: QEMU uses one and closes the others.
    pub fn take_descriptors(&mut self, command: &str) -> Vec<OwnedFd> {
        let takes = ["getfd", "add-fd"].contains(&command);
        if takes { std::mem::take(&mut self.descriptors) } else { Vec::new() }
    }

    /// Deliver the queued lines, then close the connection.
    pub async fn finish(self) {
        let Self { lines, reading, writing, .. } = self;
        reading.abort();
        drop(lines);
        // Ends after the last line, or when the client is gone.
        let _ = writing.await;
    }

    /// Close the connection now.
    pub fn disconnect(self) {
        self.reading.abort();
        self.writing.abort();
    }
}

async fn write(
    stream: Arc<UnixStream>,
    mut lines: mpsc::UnboundedReceiver<Vec<u8>>,
    queued: Arc<Queued>,
) {
    while let Some(line) = lines.recv().await {
        if let Err(error) = socket::send_all_async(&stream, &line, &[]).await {
            debug!(%error, "the client takes no more lines");
            lines.close();
            return queued.less.notify_one();
        }
        queued.bytes.fetch_sub(line.len(), Ordering::Relaxed);
        queued.less.notify_one();
    }
}

async fn read_all(
    stream: Arc<UnixStream>,
    commands: mpsc::Sender<FromClient>,
    _reads: watch::Sender<()>,
) {
    if let Err(error) = read_commands(&stream, &commands).await {
        debug!(%error, "the client's connection failed");
    }
}

async fn read_commands(stream: &UnixStream, commands: &mpsc::Sender<FromClient>) -> io::Result<()> {
    let mut framer = Framer::default();
    let mut came = Vec::new();
    loop {
        let (mut piece, mut fds) = ([0; 16384], Vec::new());
        let length = socket::recv_apart(stream, &mut piece, &mut fds).await?;
        if length == 0 {
            return Ok(());
        }
        if !fds.is_empty() {
            came = fds;
        }
        framer.push(&piece[..length]);
        while let Some(framed) = framer.take() {
            let fds = std::mem::take(&mut came);
            if commands.send(FromClient { framed, fds }).await.is_err() {
                return Ok(());
            }
        }
    }
}
