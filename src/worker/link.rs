//! Messages over a connection, and the credits that they take.

use std::{
    ops::Range,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use tracing::warn;

use crate::{
    fabric::{Connection, FabricError, Guard, Handle, Pinned, RecvHalf, RemoteKey, SendHalf},
    memory::Region,
    patience::Patience,
    proto::error::{MigrationError, Result},
    threads::{self, Lost},
    wire::{
        Message,
        credit::{self, Flow},
    },
};

/// Time limit for telling the peer why a migration has failed.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// How many bytes of a block that is pinned as a whole are pinned at a time.
const PIECE: u64 = 1 << 30;

/// The sending side of a connection, shared by the threads of a worker.
pub struct Link {
    send_half: Arc<dyn SendHalf>,
    handle: Handle,
    /// Credits that the peer granted.
    granted: Mutex<credit::Sender>,
    /// Signalled when credits arrive, and when the connection ends.
    changed: Condvar,
    /// Credits that were granted to the peer.
    grants: Mutex<credit::Receiver>,
    stall_timeout: Duration,
    /// Whether to wait for credits as long as the connection stands.
    patient: AtomicBool,
    /// Whether the receiver is gone, so that no more credits arrive.
    over: AtomicBool,
    /// Why this side ended the connection, if a deadline did.
    ended: Mutex<Option<End>>,
    /// Whether the peer is a stock QEMU.
    stock: bool,
    /// A stock peer's connection for the return path, which is closed together with this one.
    companion: Mutex<Option<Arc<Link>>>,
}

/// Why this side ended a connection.
#[derive(Debug, Clone)]
enum End {
    /// The peer took too long.
    Late(Duration),
    /// The thread that watched the deadline is lost.
    Lost(Lost),
}

impl From<End> for FabricError {
    fn from(end: End) -> Self {
        match end {
            End::Late(limit) => Self::Stalled(limit),
            End::Lost(lost) => Self::Lost(lost),
        }
    }
}

/// Ends the connection when its time is over, unless it is dropped before.
pub struct Deadline {
    _pending: mpsc::Sender<()>,
}

/// The receiving side. Dropping it releases all threads that wait for credits.
pub struct LinkReceiver {
    receiver: Box<dyn RecvHalf>,
    link: Arc<Link>,
}

impl Drop for LinkReceiver {
    fn drop(&mut self) {
        // Under the lock, so that no thread is between checking and waiting.
        let granted = lock(&self.link.granted);
        self.link.over.store(true, Ordering::Relaxed);
        drop(granted);
        self.link.changed.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    /// Create a link over `connection`; `sending` and `receiving` say how credits are granted.
    pub fn new(
        connection: Box<dyn Connection>,
        sending: Flow,
        receiving: Flow,
        stall_timeout: Duration,
    ) -> (Arc<Self>, LinkReceiver) {
        Self::with(connection, sending, receiving, stall_timeout, false)
    }

    /// Create a link to a stock QEMU, which grants one credit per message.
    pub fn stock(
        connection: Box<dyn Connection>,
        receiving: Flow,
        stall_timeout: Duration,
    ) -> (Arc<Self>, LinkReceiver) {
        Self::with(connection, Flow::Lockstep, receiving, stall_timeout, true)
    }

    fn with(
        connection: Box<dyn Connection>,
        sending: Flow,
        receiving: Flow,
        stall_timeout: Duration,
        stock: bool,
    ) -> (Arc<Self>, LinkReceiver) {
        let handle = connection.handle();
        let (send_half, receiver) = connection.split();
        let link = Self {
            send_half,
            handle,
            granted: Mutex::new(credit::Sender::new(sending)),
            changed: Condvar::new(),
            grants: Mutex::new(credit::Receiver::new(receiving)),
            stall_timeout,
            patient: AtomicBool::new(false),
            over: AtomicBool::new(false),
            ended: Mutex::default(),
            stock,
            companion: Mutex::default(),
        };
        let link = Arc::new(link);
        (link.clone(), LinkReceiver { receiver, link })
    }

    /// Close the connection after `limit`, however busy it is, unless the result is dropped before.
    pub fn deadline(self: &Arc<Self>, limit: Duration) -> Deadline {
        let (pending, done) = mpsc::channel();
        let link = self.clone();
        let wait = move || {
            let mut patience = Patience::new(limit);
            while done.recv_timeout(patience.slice()) == Err(mpsc::RecvTimeoutError::Timeout) {
                if !patience.lasts() {
                    return Some(End::Late(limit));
                }
            }
            None
        };
        threads::start("deadline", wait, move |waited| {
            if let Some(end) = waited.unwrap_or_else(|lost| Some(End::Lost(lost))) {
                *lock(&link.ended) = Some(end);
                link.close();
            }
        });
        Deadline { _pending: pending }
    }

    /// Send a message, after waiting for a credit if it needs one.
    ///
    /// # Errors
    /// When the connection is lost, or the peer grants no credit for the stall timeout.
    pub fn send(&self, message: &Message<'_>) -> Result<()> {
        if message.needs_credit() {
            self.take_credit()?;
        }
        let mut scratch = Vec::new();
        let (header, payload) = message.encode(&mut scratch);
        let sent = match message.follows_writes() {
            true => self.send_half.send_after_writes(&header, payload),
            false => self.send_half.send(&header, payload),
        };
        Ok(sent?)
    }

    /// Return whether the peer is a stock QEMU, which knows version 1 and nothing more.
    pub fn is_stock(&self) -> bool {
        self.stock
    }

    /// Return a handle that closes the connection from any thread.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Close `companion` together with this link, and make it as patient.
    pub fn accompany(&self, companion: &Arc<Self>) {
        *lock(&self.companion) = Some(companion.clone());
        if self.patient.load(Ordering::Relaxed) {
            companion.be_patient();
        }
    }

    /// Wait until the peer can receive a message.
    ///
    /// # Errors
    /// As for [`Self::send`].
    pub fn await_ready(&self) -> Result<()> {
        self.await_credit(|granted| granted.any())
    }

    /// Return how many messages have taken a credit so far.
    pub fn messages(&self) -> u64 {
        lock(&self.granted).taken()
    }

    /// Wait until the peer has consumed the first `messages` of them. It confirms at once only
    /// REGISTER_FINISHED and what was sent before.
    ///
    /// # Errors
    /// As for [`Self::send`].
    pub fn await_consumed(&self, messages: u64) -> Result<()> {
        self.await_credit(|granted| granted.consumed(messages))
    }

    fn take_credit(&self) -> Result<()> {
        self.await_credit(credit::Sender::take)
    }

    fn await_credit(&self, there: impl Fn(&mut credit::Sender) -> bool) -> Result<()> {
        let mut granted = lock(&self.granted);
        let mut patience = Patience::new(self.stall_timeout);
        loop {
            if there(&mut granted) {
                return Ok(());
            }
            if self.over.load(Ordering::Relaxed) {
                return Err(FabricError::Closed.into());
            }
            let (next, timeout) = self
                .changed
                .wait_timeout(granted, patience.slice())
                .unwrap_or_else(PoisonError::into_inner);
            granted = next;
            if !timeout.timed_out() || self.patient.load(Ordering::Relaxed) {
                patience = Patience::new(self.stall_timeout);
            } else if !patience.lasts() {
                return Err(FabricError::Stalled(self.stall_timeout).into());
            }
        }
    }

    /// Count a received message that had taken a credit as consumed: its buffer is free.
    ///
    /// # Errors
    /// When the connection is lost.
    pub fn consumed(&self) -> Result<()> {
        lock(&self.grants).consumed();
        self.grant()
    }

    /// The same, for a message after which the peer may wait until all messages are consumed.
    ///
    /// # Errors
    /// When the connection is lost.
    pub fn all_consumed(&self) -> Result<()> {
        let mut grants = lock(&self.grants);
        grants.consumed();
        let grant = grants.grant_all();
        drop(grants);
        grant.map_or(Ok(()), |repeat| self.send(&Message::Ready(repeat)))
    }

    /// Send READY if it is due. At the start it is, on a link with a READY per message.
    ///
    /// # Errors
    /// When the connection is lost.
    pub fn grant(&self) -> Result<()> {
        let grant = lock(&self.grants).grant();
        grant.map_or(Ok(()), |repeat| self.send(&Message::Ready(repeat)))
    }

    /// Write RAM; see [`SendHalf::write`].
    ///
    /// # Errors
    /// When the connection is lost.
    pub fn write(
        &self,
        region: &Arc<Region>,
        offset: u64,
        length: u64,
        to: RemoteKey,
    ) -> Result<()> {
        Ok(self.send_half.write(region, offset, length, to)?)
    }

    /// Write bytes to RAM; see [`SendHalf::write_bytes`].
    ///
    /// # Errors
    /// When the connection is lost.
    pub fn write_bytes(&self, bytes: &[u8], offset: u64, to: RemoteKey) -> Result<()> {
        Ok(self.send_half.write_bytes(bytes, offset, to)?)
    }

    /// Prepare a range of a region to be written from; see [`SendHalf::pin`].
    ///
    /// # Errors
    /// When the device can't register it.
    pub fn pin(&self, region: &Arc<Region>, range: Range<u64>) -> Result<()> {
        Ok(self.send_half.pin(region, range)?)
    }

    /// Prepare all of a region, piece by piece, so that its progress is visible.
    ///
    /// # Errors
    /// When the device can't register it.
    pub fn pin_all(&self, region: &Arc<Region>) -> Result<()> {
        let pieces = (0..region.length()).step_by(PIECE as usize);
        pieces
            .map(|start| start..region.length().min(start + PIECE))
            .try_for_each(|piece| self.pin(region, piece))
    }

    /// Release a range; see [`SendHalf::unpin`].
    pub fn unpin(&self, region: &Arc<Region>, range: Range<u64>) {
        self.send_half.unpin(region, range);
    }

    /// Return how many connections carry RAM.
    pub fn connections(&self) -> u32 {
        self.send_half.connections()
    }

    /// Return how much guest memory is pinned on this side.
    pub fn pinned(&self) -> Pinned {
        self.send_half.pinned()
    }

    /// Return how long a pending transfer may make no progress.
    pub fn stall_timeout(&self) -> Duration {
        self.stall_timeout
    }

    /// Return whether an older write never lands after a newer one; see
    /// [`SendHalf::orders_writes`].
    pub fn orders_writes(&self) -> bool {
        self.send_half.orders_writes()
    }

    /// Stop treating a slow peer as failed while the connection stands. From here on the guest may
    /// run at the destination, and its QEMU may need time to load a device.
    pub fn be_patient(&self) {
        self.patient.store(true, Ordering::Relaxed);
        self.send_half.be_patient();
        if let Some(companion) = &*lock(&self.companion) {
            companion.be_patient();
        }
    }

    /// Wait until all writes have left; see [`SendHalf::drain`].
    ///
    /// # Errors
    /// When the connection is lost.
    pub fn drain(&self) -> Result<()> {
        Ok(self.send_half.drain()?)
    }

    /// Return how many bytes of writes were posted, and how many have landed.
    pub fn written(&self) -> (u64, u64) {
        let landed = self.send_half.landed();
        (self.send_half.posted(), landed)
    }

    /// Tell the peer that the migration has failed here; it notices the closed connection anyway.
    pub fn tell(&self, text: String, guest_never_ran: bool) {
        // The peer may be gone.
        let _ = self.send(&match self.stock {
            true => Message::Error,
            false => Message::ErrorText { text: text.into(), guest_never_ran },
        });
    }

    /// Close the connection; if it still stands, tell the peer why, for at most [`LAST_WORDS`].
    pub fn end(self: &Arc<Self>, error: &MigrationError, guest_never_ran: bool) {
        // Other threads may be sending, to a peer that accepts nothing.
        let _deadline = self.deadline(LAST_WORDS);
        let text = match error {
            // The peer failed after RAM, and does not know that the guest never ran.
            MigrationError::PeerFailed { guest_never_ran: false, .. } if guest_never_ran => {
                Some(error.to_string())
            }
            MigrationError::PeerFailed { .. } => None,
            // The peer's operator can't see what this host lacks.
            MigrationError::Fabric(error) => {
                error.leaves_connection().then(|| format!("The other host says: {error}"))
            }
            error => Some(error.to_string()),
        };
        if let Some(text) = text {
            self.tell(text, guest_never_ran);
            self.send_half.finish();
        }
        self.close();
    }

    /// Close the connection.
    pub fn close(&self) {
        self.handle.close();
        if let Some(companion) = &*lock(&self.companion) {
            companion.close();
        }
    }
}

/// Tell peers why a migration has failed and close their connections, then call `after`. This runs
/// on the returned thread, which the process should join before it exits.
pub fn end_all(
    links: Vec<Arc<Link>>,
    error: MigrationError,
    guest_never_ran: bool,
    after: impl FnOnce() + Send + 'static,
) -> Option<JoinHandle<()>> {
    let untold = links.clone();
    let end = move || {
        for link in links {
            link.end(&error, guest_never_ran);
        }
    };
    threads::start("last words", end, move |ended| {
        if let Err(lost) = ended {
            warn!(%lost, "the peer may not know why");
            untold.iter().for_each(|link| link.close());
        }
        after();
    })
}

impl LinkReceiver {
    /// Return the next message. Handles READY; a message that follows writes is returned when they
    /// have landed.
    ///
    /// # Errors
    /// When the connection is lost or the peer breaks the protocol.
    pub fn next<'b>(&mut self, link: &Link, buffer: &'b mut Vec<u8>) -> Result<Message<'b>> {
        loop {
            self.receiver.receive(buffer).map_err(|error| match (error, &*lock(&link.ended)) {
                (FabricError::Closed, Some(end)) => end.clone().into(),
                (error, _) => error,
            })?;
            let Message::Ready(repeat) = Message::decode(buffer)? else { break };
            lock(&link.granted).ready(repeat)?;
            link.changed.notify_all();
        }
        let message = Message::decode(buffer)?;
        if message.needs_credit() {
            lock(&link.grants).received()?;
        }
        if message.follows_writes() {
            self.receiver.await_writes()?;
        }
        Ok(message)
    }

    /// Return how many bytes of the peer's writes have landed here.
    pub fn landed(&self) -> u64 {
        self.receiver.landed()
    }

    /// Set a check that runs before the peer's first write lands; see [`RecvHalf::guard`].
    pub fn guard(&mut self, may_land: Guard) {
        self.receiver.guard(may_land);
    }

    /// Announce a region to the peer; see [`RecvHalf::announce`].
    ///
    /// # Errors
    /// When it can't be mapped.
    pub fn announce(&mut self, region: &Arc<Region>) -> Result<RemoteKey> {
        Ok(self.receiver.announce(region)?)
    }

    /// Let the peer write to `range` of `region`; see [`RecvHalf::register`].
    ///
    /// # Errors
    /// When the device can't register it.
    pub fn register(&mut self, region: &Arc<Region>, range: Range<u64>) -> Result<RemoteKey> {
        Ok(self.receiver.register(region, range)?)
    }

    /// Withdraw the peer's access to a range; see [`RecvHalf::unregister`].
    pub fn unregister(&mut self, region: &Arc<Region>, range: Range<u64>) {
        self.receiver.unregister(region, range);
    }

    /// Withdraw all of the peer's access to memory.
    pub fn revoke(&mut self) {
        self.receiver.revoke();
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, thread, time::Instant};

    use super::*;
    use crate::worker::idle_link;

    /// Patience lifts the stall timeout, and does not busy-wait.
    #[test]
    fn the_patient_wait_as_long_as_the_connection_stands() {
        const LIMIT: Duration = Duration::from_millis(20);
        let (link, receiver) = idle_link::link_of(LIMIT);
        assert!(matches!(
            link.await_consumed(1),
            Err(MigrationError::Fabric(FabricError::Stalled(LIMIT)))
        ));
        link.be_patient();
        let begun = Instant::now();
        let looks = Cell::new(0);
        let waited = thread::scope(|scope| {
            scope.spawn(|| {
                thread::park_timeout(LIMIT * 10);
                drop(receiver);
            });
            link.await_credit(|_| {
                looks.set(looks.get() + 1);
                false
            })
        });
        assert!(matches!(waited, Err(MigrationError::Fabric(FabricError::Closed))));
        assert!(begun.elapsed() >= LIMIT * 10);
        assert!(looks.get() <= 15, "{} looks in {:?}", looks.get(), begun.elapsed());
    }

    #[test]
    fn whoever_waits_for_a_credit_is_let_go_when_nothing_is_received_any_more() {
        let (link, receiver) = idle_link::link();
        let waiting = link.clone();
        let waiting = thread::spawn(move || waiting.await_consumed(1));
        let receiving = thread::spawn(move || {
            let _receiver = receiver;
            panic!("on purpose");
        });
        assert!(receiving.join().is_err());
        let begun = Instant::now();
        let waited = waiting.join().unwrap();
        assert!(matches!(waited, Err(MigrationError::Fabric(FabricError::Closed))));
        assert!(begun.elapsed() < link.stall_timeout() / 2);
    }

    /// A peer that accepts nothing does not hold up the end.
    #[test]
    fn last_words_take_a_moment_only() {
        let (link, _receiver) = idle_link::link();
        let begun = Instant::now();
        link.end(&MigrationError::Aborted("told".into()), true);
        assert!(begun.elapsed() < LAST_WORDS * 3);
    }
}
