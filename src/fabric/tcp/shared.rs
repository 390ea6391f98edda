//! What the halves and threads of a link share: its connections, what is in flight through all of them, and how
//! it ends.

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

/// Most bytes of writes in flight, through all connections together. It bounds what QEMU believes
/// to be sent and is not: 8 MiB are 7 ms at 10 Gbit/s.
pub(super) const WINDOW: u64 = 8 << 20;

/// How long the peer may take to close after the last words.
const FAREWELL: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// What both halves, handles and threads share.
pub(super) struct Shared {
    /// Messages go through the first one, RAM through all of them.
    pub(super) sockets: Vec<Socket>,
    /// Bytes of writes that have their place in [`WINDOW`], and that have left it.
    posted: AtomicU64,
    landed: AtomicU64,
    /// Bytes of the peer's writes that landed here.
    pub(super) received: AtomicU64,
    /// What the peer may write, by rkey - 1. The lock is taken once a frame.
    pub(super) regions: Mutex<Vec<Arc<Region>>>,
    /// The peer's writes may land.
    admitted: AtomicBool,
    /// Who says so.
    guard: Mutex<Option<Guard>>,
    /// Nothing may come any more on any but the first connection, and nobody misses it.
    ram_ended: AtomicBool,
    /// Why another connection than the first one has failed: the receiver's to tell.
    failure: Mutex<Option<FabricError>>,
    failed: AtomicBool,
    /// Some thread ran into a time bound: what the others see then is its consequence.
    stalled: AtomicBool,
    begun: Instant,
    /// When the peer last took something, in milliseconds since `begun`.
    heard: AtomicU64,
    /// With `changed`: signals that `landed` or `failed` changed.
    change: Mutex<()>,
    changed: Condvar,
    pub(super) stall_timeout: Duration,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Of a link over these.
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
        // Who has seen what landed has seen that it was posted.
        self.landed.load(Ordering::Acquire)
    }

    /// The connection of the chunk at `offset` of a block: the same one for ever, so that an older
    /// write never lands behind a newer one.
    pub(super) fn socket(&self, offset: u64) -> &Socket {
        &self.sockets[(offset / CHUNK) as usize % self.sockets.len()]
    }

    /// From now on `may_land` is asked before a write lands, until it has said yes.
    pub(super) fn guard(&self, may_land: Guard) {
        *lock(&self.guard) = Some(may_land);
        self.admitted.store(false, Ordering::SeqCst);
    }

    /// May the peer's writes land?
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

    /// What an error of a socket means.
    pub(super) fn failure(&self, error: io::Error) -> FabricError {
        match error.kind() {
            // The bound of SO_SNDTIMEO or TCP_USER_TIMEOUT.
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.stall(),
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted => self.end(),
            _ => FabricError::Host { call: "The connection to the peer", source: error },
        }
    }

    /// What an error of a transfer between a socket and `region` means: what is not the socket's is
    /// memory's.
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

    /// Why the link has ended. The system says only once that the time was over, and may say
    /// it to a `sendfile` that had sent something, which then returns no error; so a peer that had
    /// long taken nothing counts as stalled too.
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

    /// The peer took something, or nothing was due.
    fn progress(&self) {
        let now = self.begun.elapsed().as_millis() as u64;
        self.heard.store(now, Ordering::Relaxed);
    }

    /// Wait for a place in [`WINDOW`] for a write of `length` bytes, and take it.
    pub(super) fn take_place(&self, length: u64) -> Result<()> {
        loop {
            // First: it never exceeds what is posted then.
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

    /// Wait until `done`, which looks at what has landed.
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

    /// The peer says how much of what was posted to `socket` has landed there.
    pub(super) fn has_landed(&self, socket: &Socket, landed: u64) -> Result<()> {
        // Only the thread that receives from the socket comes here, and `posted` only grows.
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

    /// Tell waiting posters.
    fn signal(&self) {
        let _guard = lock(&self.change);
        self.changed.notify_all();
    }

    pub(super) fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
        self.signal();
    }

    /// Another connection than the first one has failed, and with it the link. What goes the other
    /// way still does, for the last words.
    pub(super) fn fail_with(&self, error: FabricError) {
        if self.ram_ended.load(Ordering::SeqCst) {
            return;
        }
        if matches!(error, FabricError::Closed) {
            // The peer closes all of them, and may have said why on the first one.
            self.await_end();
        }
        lock(&self.failure).get_or_insert(error);
        // It fails only when the connection has ended already.
        let _ = self.sockets[0].stream.shutdown(Shutdown::Read);
        self.fail();
    }

    /// Why another connection than the first one has failed, if one has.
    pub(super) fn take_failure(&self) -> Option<FabricError> {
        lock(&self.failure).take()
    }

    /// Give the peer a moment to close the first connection.
    pub(super) fn await_end(&self) {
        let mut closed = [PollFd::new(&self.sockets[0].stream, PollFlags::RDHUP)];
        // It fails only if it is closed.
        let _ = retry_on_intr(|| poll(&mut closed, Some(&FAREWELL)));
    }

    /// End all connections but the first one: whoever receives from them ends.
    pub(super) fn end_ram(&self) {
        self.ram_ended.store(true, Ordering::SeqCst);
        for socket in &self.sockets[1..] {
            // It fails only when the connection has ended already.
            let _ = socket.stream.shutdown(Shutdown::Both);
        }
    }

    pub(super) fn close(&self) {
        self.end_ram();
        // It fails only when the connection has ended already.
        let _ = self.sockets[0].stream.shutdown(Shutdown::Both);
        self.fail();
    }
}

/// The memory of `region` could not be read or written.
pub(super) fn of_memory(region: &Region, source: io::Error) -> FabricError {
    FabricError::Memory { block: region.name().to_owned(), source }
}
