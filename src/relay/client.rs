//! The connection of one client: its commands in, lines out.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{net::UnixStream, sync::mpsc, task::JoinHandle};
use tracing::debug;

use crate::qmp::{
    ITEM_MAX,
    framer::{Framed, Framer},
    socket,
};

/// Most bytes that wait for a client that does not read.
const QUEUED_MAX: usize = 2 * ITEM_MAX;

/// Most descriptors that wait for the command that they belong to; QEMU keeps those of one.
const FDS_MAX: usize = socket::FDS_MAX;

/// A command with its descriptors.
pub struct FromClient {
    /// What was sent.
    pub framed: Framed,
    /// The descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

/// A connected client.
pub struct Client {
    /// Its commands; closed when it is gone. The next is read only when one was taken, so a
    /// client that sends without waiting is held back by its own socket.
    pub commands: mpsc::Receiver<FromClient>,
    /// It has negotiated.
    pub negotiated: bool,
    lines: mpsc::UnboundedSender<Vec<u8>>,
    queued: Arc<AtomicUsize>,
    reading: JoinHandle<()>,
    writing: JoinHandle<()>,
}

impl Client {
    /// Serve a connection.
    pub fn new(stream: UnixStream) -> Self {
        let stream = Arc::new(stream);
        let (sender, commands) = mpsc::channel(1);
        let (lines, to_write) = mpsc::unbounded_channel();
        let queued = Arc::new(AtomicUsize::new(0));
        let reading = tokio::spawn(read(stream.clone(), sender));
        let writing = tokio::spawn(write(stream, to_write, queued.clone()));
        Self { commands, negotiated: false, lines, queued, reading, writing }
    }

    /// Send a line; false if the client is gone, or has not read for too long.
    pub fn send(&self, line: Vec<u8>) -> bool {
        let queued = self.queued.fetch_add(line.len(), Ordering::Relaxed) + line.len();
        queued <= QUEUED_MAX && self.lines.send(line).is_ok()
    }

    /// Let what was sent arrive, then end the connection.
    pub async fn finish(self) {
        let Self { lines, reading, writing, .. } = self;
        reading.abort();
        drop(lines);
        // It ends with the last line, or with the client.
        let _ = writing.await;
    }

    /// End the connection now.
    pub fn disconnect(self) {
        self.reading.abort();
        self.writing.abort();
    }
}

async fn write(
    stream: Arc<UnixStream>,
    mut lines: mpsc::UnboundedReceiver<Vec<u8>>,
    queued: Arc<AtomicUsize>,
) {
    while let Some(line) = lines.recv().await {
        if let Err(error) = socket::send_all_async(&stream, &line, &[]).await {
            return debug!(%error, "the client takes no more lines");
        }
        queued.fetch_sub(line.len(), Ordering::Relaxed);
    }
}

async fn read(stream: Arc<UnixStream>, commands: mpsc::Sender<FromClient>) {
    if let Err(error) = read_commands(&stream, &commands).await {
        debug!(%error, "the client's connection failed");
    }
}

/// Cut what the client sends into commands.
///
/// The descriptors of a `recvmsg` came with its last bytes, because the kernel ends a read behind
/// bytes that carry descriptors; so they belong to the command that contains the last byte.
async fn read_commands(stream: &UnixStream, commands: &mpsc::Sender<FromClient>) -> io::Result<()> {
    let mut framer = Framer::default();
    let mut received = 0_u64;
    let mut waiting: Vec<(u64, OwnedFd)> = Vec::new();
    loop {
        let mut piece = [0; 16384];
        let mut fds = Vec::new();
        let length = socket::recv_async(stream, &mut piece, &mut fds).await?;
        if length == 0 {
            return Ok(());
        }
        received += length as u64;
        waiting.extend(fds.into_iter().map(|fd| (received, fd)));
        if waiting.len() > FDS_MAX {
            waiting.drain(..waiting.len() - FDS_MAX);
        }
        framer.push(&piece[..length]);
        while let Some((framed, end)) = framer.take() {
            let mine = waiting.iter().take_while(|(last_byte, _)| *last_byte <= end).count();
            let fds = waiting.drain(..mine).map(|(_, fd)| fd).collect();
            if commands.send(FromClient { framed, fds }).await.is_err() {
                return Ok(());
            }
        }
    }
}
