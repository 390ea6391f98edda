//! State shared by the halves and threads of a link: connections, bytes in flight, and errors.

use std::{
    io,
    net::Shutdown,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::retry_on_intr,
};

use super::socket::Socket;
use crate::{
    fabric::{FabricError, Guard, Result},
    memory::Region,
    patience::Patience,
    ram::CHUNK,
};

/// Most bytes of writes in flight, over all connections together. It bounds the data that QEMU
/// believes to be sent and that is not: 8 MiB take 7 ms at 10 Gbit/s.
pub(super) const WINDOW: u64 = 8 << 20;

/// How long the peer may take to close after the final message.
const FAREWELL: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

pub(super) struct Shared {
    /// The first carries messages; all carry RAM.
    pub(super) sockets: Vec<Socket>,
    /// Bytes of writes that have entered [`WINDOW`], and that have left it.
    posted: AtomicU64,
    landed: AtomicU64,
    /// Bytes of the peer's writes that have landed here.
    pub(super) received: AtomicU64,
    /// Regions that the peer may write, by rkey - 1. Locked once per frame.
    pub(super) regions: Mutex<Vec<Arc<Region>>>,
    /// Whether the peer's writes may land; if not, `guard` is asked.
    admitted: AtomicBool,
    guard: Mutex<Option<Guard>>,
    /// RAM transfer is over: the loss of any connection but the first is expected.
    ram_ended: AtomicBool,
    /// Error of a connection other than the first, for the receiver to report.
    failure: Mutex<Option<FabricError>>,
    failed: AtomicBool,
    /// A thread ran into the stall timeout: errors on other threads are its consequence.
    stalled: AtomicBool,
    begun: Instant,
    /// When the peer last made progress, in milliseconds since `begun`.
    heard: AtomicU64,
    /// With `changed`: signals a change of `landed` or `failed`.
    change: Mutex<()>,
    changed: Condvar,
    pub(super) stall_timeout: Duration,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(sockets: Vec<Socket>, stall_timeout: Duration) -> Self {
        Self {
            sockets,
            posted: AtomicU64::new(0),
            landed: AtomicU64::new(0),
            received: AtomicU64::new(0),
            regions: Mutex::default(),
            admitted: AtomicBool::new(true),
            guard: Mutex::default(),
            ram_ended: AtomicBool::new(false),
            failure: Mutex::default(),
            failed: AtomicBool::new(false),
            stalled: AtomicBool::new(false),
            begun: Instant::now(),
            heard: AtomicU64::new(0),
            change: Mutex::default(),
            changed: Condvar::new(),
            stall_timeout,
        }
    }

    pub(super) fn posted(&self) -> u64 {
        self.posted.load(Ordering::Relaxed)
    }

    pub(super) fn landed(&self) -> u64 {
        // Pairs with the release in `has_landed`: a thread that sees bytes as landed sees them as
        // posted too.
        self.landed.load(Ordering::Acquire)
    }

    /// The connection for the chunk at `offset` of a block. It never changes, so that an older
    /// write never lands after a newer one.
    pub(super) fn socket(&self, offset: u64) -> &Socket {
        &self.sockets[(offset / CHUNK) as usize % self.sockets.len()]
    }

    /// Ask `may_land` before any further write lands, until it has agreed once.
    pub(super) fn guard(&self, may_land: Guard) {
        *lock(&self.guard) = Some(may_land);
        self.admitted.store(false, Ordering::SeqCst);
    }

    /// Whether the peer's writes may land.
    pub(super) fn may_land(&self) -> bool {
        if self.admitted.load(Ordering::Relaxed) {
            return true;
        }
        let guard = lock(&self.guard).clone();
        let admitted = guard.is_none_or(|may_land| may_land());
        if admitted {
            self.admitted.store(true, Ordering::Relaxed);
        }
        admitted
    }

    /// Translate a socket error.
    pub(super) fn failure(&self, error: io::Error) -> FabricError {
        match error.kind() {
            // Limit of SO_SNDTIMEO or TCP_USER_TIMEOUT.
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.stall(),
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted => self.end(),
            _ => FabricError::Host { call: "The connection to the peer", source: error },
        }
    }

    /// Translate an error of a transfer between a socket and `region`: an error that cannot be the
    /// socket's is the memory's.
    pub(super) fn failure_at(&self, region: &Region, error: io::Error) -> FabricError {
        match self.failure(error) {
            FabricError::Host { source, .. } => of_memory(region, source),
            other => other,
        }
    }

    fn stall(&self) -> FabricError {
        self.stalled.store(true, Ordering::Relaxed);
        FabricError::Stalled(self.stall_timeout)
    }

    /// Why the link has ended. The kernel reports a timeout only once, possibly to a `sendfile`
    /// that had sent something and therefore returns no error. So a peer that has been silent for
    /// long counts as stalled too.
    pub(super) fn end(&self) -> FabricError {
        let now = self.begun.elapsed().as_millis() as u64;
        let silent = now.saturating_sub(self.heard.load(Ordering::Relaxed));
        let long = Duration::from_millis(silent) > self.stall_timeout / 2;
        let landed = self.landed();
        if self.stalled.load(Ordering::Relaxed) || long && self.posted() > landed {
            FabricError::Stalled(self.stall_timeout)
        } else {
            FabricError::Closed
        }
    }

    /// Record that the peer made progress, or that nothing was due.
    fn progress(&self) {
        let now = self.begun.elapsed().as_millis() as u64;
        self.heard.store(now, Ordering::Relaxed);
    }

    /// Wait until [`WINDOW`] has space for a write of `length` bytes, and reserve it.
    pub(super) fn take_place(&self, length: u64) -> Result<()> {
        loop {
            // Load this first: it never exceeds a later `posted`.
            let landed = self.landed();
            let posted = self.posted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |posted| {
                (posted - landed <= WINDOW).then_some(posted + length)
            });
            match posted {
                Ok(posted) => {
                    if posted == landed {
                        self.progress();
                    }
                    return Ok(());
                }
                Err(_) => self.wait_until(|landed| self.posted() - landed <= WINDOW)?,
            }
        }
    }

    /// Wait until `done` returns true for the number of landed bytes.
    pub(super) fn wait_until(&self, done: impl Fn(u64) -> bool) -> Result<()> {
        let mut guard = lock(&self.change);
        let (mut seen, mut patience) = (self.landed(), Patience::new(self.stall_timeout));
        loop {
            if self.failed.load(Ordering::Relaxed) {
                return Err(self.end());
            }
            let landed = self.landed();
            if done(landed) {
                return Ok(());
            }
            if landed != seen {
                (seen, patience) = (landed, Patience::new(self.stall_timeout));
            }
            let (next, timeout) = self
                .changed
                .wait_timeout(guard, patience.slice())
                .unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() && !patience.lasts() && self.landed() == landed {
                return Err(self.stall());
            }
            guard = next;
        }
    }

    /// Handle the peer's report that `landed` bytes of those posted to `socket` have landed.
    pub(super) fn has_landed(&self, socket: &Socket, landed: u64) -> Result<()> {
        // Only the socket's receiving thread calls this, and `posted` only grows.
        let before = socket.landed();
        if landed < before || landed > socket.posted() {
            return Err(FabricError::Malformed(format!(
                "{landed} bytes landed of {} that were written",
                socket.posted()
            )));
        }
        socket.landed.store(landed, Ordering::Relaxed);
        self.landed.fetch_add(landed - before, Ordering::Release);
        self.progress();
        self.signal();
        Ok(())
    }

    /// Wake threads that wait for progress.
    fn signal(&self) {
        let _guard = lock(&self.change);
        self.changed.notify_all();
    }

    pub(super) fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
        self.signal();
    }

    /// Fail the link because a connection other than the first has failed. The sending direction
    /// stays open for a final message.
    pub(super) fn fail_with(&self, error: FabricError) {
        if self.ram_ended.load(Ordering::SeqCst) {
            return;
        }
        if matches!(error, FabricError::Closed) {
            // The peer closes all connections, and may have sent the reason on the first.
            self.await_end();
        }
        lock(&self.failure).get_or_insert(error);
        // Fails only if the connection has already ended.
        let _ = self.sockets[0].stream.shutdown(Shutdown::Read);
        self.fail();
    }

    /// The error of a connection other than the first, if one has failed.
    pub(super) fn take_failure(&self) -> Option<FabricError> {
        lock(&self.failure).take()
    }

    /// Wait briefly for the peer to close the first connection.
    pub(super) fn await_end(&self) {
        let mut closed = [PollFd::new(&self.sockets[0].stream, PollFlags::RDHUP)];
        // Fails only if it is closed.
        let _ = retry_on_intr(|| poll(&mut closed, Some(&FAREWELL)));
    }

    /// Close all connections but the first, which ends the threads that receive from them.
    pub(super) fn end_ram(&self) {
        self.ram_ended.store(true, Ordering::SeqCst);
        for socket in &self.sockets[1..] {
            // Fails only if the connection has already ended.
            let _ = socket.stream.shutdown(Shutdown::Both);
        }
    }

    pub(super) fn close(&self) {
        self.end_ram();
        // Fails only if the connection has already ended.
        let _ = self.sockets[0].stream.shutdown(Shutdown::Both);
        self.fail();
    }
}

/// The error for memory of `region` that could not be read or written.
pub(super) fn of_memory(region: &Region, source: io::Error) -> FabricError {
    FabricError::Memory { block: region.name().to_owned(), source }
}
