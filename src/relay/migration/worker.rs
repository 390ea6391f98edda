//! The worker process of one migration, as the relay sees it.

use std::{
    io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::UnixStream,
    process::{Child, Command},
    runtime::Handle,
    sync::{Mutex, oneshot},
    time::timeout,
};
use tracing::warn;

use super::status::Side;
use crate::{
    control::{FabricKind, LINE_MAX, Order, Report, lines::line},
    patience::{Patience, within},
    qemu::ram_blocks::RamBlock,
    qmp::socket,
    threads,
};

/// How long a worker's process may take to start.
const START: Duration = Duration::from_secs(10);

/// How long a worker may take to accept an order.
const TAKES: Duration = Duration::from_secs(10);

/// How long a worker may take to tell the peer of a failure.
const LAST_WORDS: Duration = Duration::from_secs(4);

/// The error when there is no worker to report one.
pub const WORKER_DIED: &str =
    "The helper's worker process died; see its messages in the helper's log, and migrate again";

/// Time without a report after which a worker counts as hung; and the most of it that counts at
/// once. If the relay is away for longer, it was stopped itself.
const HEARTBEAT: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3));

/// Return how long a worker may report nothing from now on.
pub fn heartbeat() -> Patience {
    Patience::in_slices(HEARTBEAT.0, HEARTBEAT.1)
}

/// A running worker. Dropping it kills the process, unless that has QEMU's stream: then it ends
/// QEMU's migration by itself.
pub struct Worker {
    child: Child,
    has_stream: bool,
    control: Arc<UnixStream>,
    orders: Orders,
    buffer: Vec<u8>,
}

/// Sends a worker orders, one at a time, until the worker accepts none for too long.
#[derive(Clone)]
pub struct Orders(Arc<Mutex<Option<Arc<UnixStream>>>>);

impl Orders {
    fn over(control: &Arc<UnixStream>) -> Self {
        Self(Arc::new(Mutex::new(Some(control.clone()))))
    }

    /// Send an order. The socket buffers some hundred for a worker that is stopped.
    ///
    /// # Errors
    /// An I/O error from the system; or the worker accepts none.
    pub async fn send(&self, order: &Order, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut open = self.0.lock().await;
        let Some(control) = open.clone() else { return Err(takes_none()) };
        let line = line(order, fds.len())?;
        if let Some(sent) = within(TAKES, socket::send_all_async(&control, &line, fds)).await {
            return sent;
        }
        // Part of it may have been sent.
        *open = None;
        Err(takes_none())
    }
}

fn takes_none() -> io::Error {
    io::Error::other("it accepts no orders")
}

impl Worker {
    /// Start a worker for a migration at this `side`. It prepares `fabric` while its order is
    /// assembled.
    ///
    /// # Errors
    /// An I/O error from the system; or it did not start in time.
    pub async fn start(side: Side, fabric: FabricKind) -> io::Result<Self> {
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("qemu-rdma-helper").args(["worker", side.name()]);
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
        let child = spawn(command).await?;
        let control = Arc::new(UnixStream::from_std(ours)?);
        let orders = Orders::over(&control);
        orders.send(&Order::Prepare { fabric }, &[]).await?;
        Ok(Self { child, has_stream: false, control, orders, buffer: Vec::new() })
    }

    /// Return a handle for others that send orders.
    pub fn orders(&self) -> Orders {
        self.orders.clone()
    }

    /// Send an order with descriptors.
    ///
    /// # Errors
    /// As for [`Orders::send`].
    pub async fn begin(&mut self, order: &Order, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.orders.send(order, fds).await
    }

    /// Send an order. A worker that accepts none is killed; [`Self::report`] notices its end.
    pub async fn order(&mut self, order: &Order) {
        if let Err(error) = self.orders.send(order, &[]).await {
            warn!(%error, "the worker takes no orders");
            // It may have exited already.
            let _ = self.child.start_kill();
        }
    }

    /// Return the next report; `None` when the worker is gone or its report is invalid. Cancel
    /// safe.
    pub async fn report(&mut self) -> Option<Report> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return match serde_json::from_slice(&line) {
                    Ok(report) => Some(report),
                    Err(error) => {
                        warn!(%error, "the worker's report is invalid");
                        None
                    }
                };
            }
            if self.buffer.len() > LINE_MAX {
                return None;
            }
            let mut piece = [0; 4096];
            match socket::recv_async(&self.control, &mut piece, &mut Vec::new()).await {
                Ok(received @ 1..) => self.buffer.extend_from_slice(&piece[..received]),
                Ok(0) | Err(_) => return None,
            }
        }
    }

    /// Kill it, and wait until its descriptors are closed.
    pub async fn kill(&mut self) {
        if let Err(error) = self.child.kill().await {
            warn!(%error, "the worker could not be killed");
        }
    }

    /// Keep the worker alive when this is dropped, from now on.
    pub fn has_stream(&mut self) {
        self.has_stream = true;
    }

    /// Leave to the worker what remains to be done at QEMU: nothing of that can be done here.
    pub async fn leave(mut self, reason: String) {
        // It may have exited already; if not, it continues by itself.
        let _ = self.orders.send(&Order::Detach { reason }, &[]).await;
        let _ = timeout(LAST_WORDS, self.child.wait()).await;
    }

    /// Wait until the worker has told the peer everything; kill it if that takes too long.
    pub async fn finish(mut self) {
        // It may have exited already.
        let _ = self.orders.send(&Order::Finish, &[]).await;
        if timeout(LAST_WORDS, self.child.wait()).await.is_err() {
            self.kill().await;
        }
    }
}

/// Start a process on a thread of its own: `spawn` returns when the program runs, and never if the
/// process is stopped before that. One that is too late exits when its control socket is closed.
async fn spawn(mut command: Command) -> io::Result<Child> {
    let (runtime, (started, child)) = (Handle::current(), oneshot::channel());
    let spawn = move || {
        let _inside = runtime.enter();
        command.spawn()
    };
    threads::start("start", spawn, move |child| {
        // Nobody waits for a process that is too late.
        let _ = started.send(child.unwrap_or_else(|lost| Err(io::Error::other(lost))));
    });
    let late = || io::Error::other("The helper's worker did not start in time");
    within(START, child).await.ok_or_else(late)?.map_err(|_| late())?
}

impl Drop for Worker {
    fn drop(&mut self) {
        if !self.has_stream {
            // It may have exited already.
            let _ = self.child.start_kill();
        }
    }
}

/// Create a socket for QEMU's migration; returns the worker's end, and QEMU's.
///
/// # Errors
/// An I/O error from the system.
pub fn migration_socket() -> io::Result<(OwnedFd, OwnedFd)> {
    let (worker, qemu) = StdUnixStream::pair()?;
    Ok((worker.into(), qemu.into()))
}

/// Return the files of those blocks that have one.
pub fn block_fds(blocks: &[RamBlock]) -> Vec<BorrowedFd<'_>> {
    let backings = blocks.iter().filter_map(|block| block.backing.as_ref());
    backings.map(|backing| backing.file.as_fd()).collect()
}
