//! Messages over a connection: who may send, and what was consumed.

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

/// How long the peer may take to hear why a migration has failed.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// How much of a block that is pinned as a whole is pinned at a time, in bytes.
const PIECE: u64 = 1 << 30;

/// The sending side of a connection, shared by the threads of a worker.
pub struct Link {
    send_half: Arc<dyn SendHalf>,
    handle: Handle,
    /// What the peer granted.
    granted: Mutex<credit::Sender>,
    /// Signalled when credits arrive, and when the connection ends.
    changed: Condvar,
    /// What the peer was granted.
    grants: Mutex<credit::Receiver>,
    stall_timeout: Duration,
    /// Whoever waits for a credit waits as long as the connection stands.
    patient: AtomicBool,
    /// Nothing more is received: no credit either.
    over: AtomicBool,
    /// Why the connection was ended from here, if it was not for its own reasons.
    ended: Mutex<Option<End>>,
    /// The peer is a stock QEMU.
    stock: bool,
    /// A stock peer's connection for the return path, which ends with this one.
    companion: Mutex<Option<Arc<Link>>>,
}

/// Why a connection was ended from here.
#[derive(Debug, Clone)]
enum End {
    /// The peer took too long.
    Late(Duration),
    /// Nobody looks at the time any more.
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

/// The receiving side. When it goes, nothing can be waited for any more.
pub struct LinkReceiver {
    receiver: Box<dyn RecvHalf>,
    link: Arc<Link>,
}

impl Drop for LinkReceiver {
    fn drop(&mut self) {
        // Under the lock: nobody is between looking and waiting.
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
    /// A link over `connection`; `sending` and `receiving` say how credits are granted.
    pub fn new(
        connection: Box<dyn Connection>,
        sending: Flow,
        receiving: Flow,
        stall_timeout: Duration,
    ) -> (Arc<Self>, LinkReceiver) {
        Self::with(connection, sending, receiving, stall_timeout, false)
    }

    /// A link to a stock QEMU, which grants a credit a message.
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

    /// Give the peer so long, however busy it is meanwhile.
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

    /// Send a message, once the peer has a buffer for it if it needs one.
    ///
    /// # Errors
    /// When the connection is lost, or the peer grants nothing for the stall timeout.
    pub fn send(&self, message: &Message<'_>) -> Result<()> {
        if message.needs_credit() {
            self.take_credit()?;
        }
        let mut scratch = Vec::new();
        let (header, payload) = message.encode(&mut scratch);
        let sent = match message.follows_writes() {
            true => self.send_half.send_behind_writes(&header, payload),
            false => self.send_half.send(&header, payload),
        };
        Ok(sent?)
    }

    /// The peer is a stock QEMU: version 1 and nothing more.
    pub fn is_stock(&self) -> bool {
        self.stock
    }

    /// Ends the connection from any thread.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// End `companion` together with this, and be as patient there.
    pub fn accompany(&self, companion: &Arc<Self>) {
        *lock(&self.companion) = Some(companion.clone());
        if self.patient.load(Ordering::Relaxed) {
            companion.be_patient();
        }
    }

    /// Wait until the peer is ready for a message.
    ///
    /// # Errors
    /// As for sending one.
    pub fn await_ready(&self) -> Result<()> {
        self.await_credit(|granted| granted.any())
    }

    /// How many messages have taken a credit so far.
    pub fn messages(&self) -> u64 {
        lock(&self.granted).taken()
    }

    /// Wait until the peer has dealt with the first `messages` of them. It says so at once only
    /// of REGISTER_FINISHED and what came before.
    ///
    /// # Errors
    /// As for sending one.
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

    /// A received message that had taken a credit is dealt with: its buffer is free.
    ///
    /// # Errors
    /// When the connection is lost.
    pub fn consumed(&self) -> Result<()> {
        lock(&self.grants).consumed();
        self.grant()
    }

    /// The same, for a message behind which the peer may wait until all were dealt with.
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

    /// Say READY if that is due: it is at the start of a link with READY for each message.
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

    /// Get a range of a region ready to be written from; see [`SendHalf::pin`].
    ///
    /// # Errors
    /// When the device can't register it.
    pub fn pin(&self, region: &Arc<Region>, range: Range<u64>) -> Result<()> {
        Ok(self.send_half.pin(region, range)?)
    }

    /// Get all of a region ready, piece by piece, so that its progress is seen.
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

    /// Connections that carry RAM.
    pub fn connections(&self) -> u32 {
        self.send_half.connections()
    }

    /// Guest memory that is pinned on this side.
    pub fn pinned(&self) -> Pinned {
        self.send_half.pinned()
    }

    /// How long a transfer that is due may make no progress.
    pub fn stall_timeout(&self) -> Duration {
        self.stall_timeout
    }

    /// What is written again has to wait for the peer's word; see [`SendHalf::orders_writes`].
    pub fn orders_writes(&self) -> bool {
        self.send_half.orders_writes()
    }

    /// The guest may come to run at the destination: from here on a peer that takes its time is no
    /// failure any more, as long as the connection stands. Its QEMU may need it to load a device.
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

    /// Bytes of writes that were posted, and that have landed.
    pub fn written(&self) -> (u64, u64) {
        let landed = self.send_half.landed();
        (self.send_half.posted(), landed)
    }

    /// Tell the peer that the migration has failed here. It notices the end of the connection in any case.
    pub fn tell(&self, text: String, guest_never_ran: bool) {
        // It may be gone.
        let _ = self.send(&match self.stock {
            true => Message::Error,
            false => Message::ErrorText { text: text.into(), guest_never_ran },
        });
    }

    /// End the connection; if it still stands, tell the peer why, which may take [`LAST_WORDS`].
    pub fn end(self: &Arc<Self>, error: &MigrationError, guest_never_ran: bool) {
        // Others may be sending, to a peer that takes nothing.
        let _deadline = self.deadline(LAST_WORDS);
        let text = match error {
            // It has failed behind RAM, and does not know what is known here.
            MigrationError::PeerFailed { guest_never_ran: false, .. } if guest_never_ran => {
                Some(error.to_string())
            }
            MigrationError::PeerFailed { .. } => None,
            // What this host lacks, the peer's operator can't see.
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

    /// End the connection.
    pub fn close(&self) {
        self.handle.close();
        if let Some(companion) = &*lock(&self.companion) {
            companion.close();
        }
    }
}

/// Tell peers why a migration has failed, on a thread that the process should outlive, and end their
/// connections; then do `after`.
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
    /// The next message, with READY dealt with; one that follows writes when those have landed.
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

    /// Bytes of the peer's writes that have landed here.
    pub fn landed(&self) -> u64 {
        self.receiver.landed()
    }

    /// Ask before the peer's first write lands; see [`RecvHalf::guard`].
    pub fn guard(&mut self, may_land: Guard) {
        self.receiver.guard(may_land);
    }

    /// Name a region to the peer; see [`RecvHalf::announce`].
    ///
    /// # Errors
    /// When it can't be mapped.
    pub fn announce(&mut self, region: &Arc<Region>) -> Result<RemoteKey> {
        Ok(self.receiver.announce(region)?)
    }

    /// Let the peer write into `range` of `region`; see [`RecvHalf::register`].
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

    /// Withdraw the peer's access to memory.
    pub fn revoke(&mut self) {
        self.receiver.revoke();
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, thread, time::Instant};

    use super::*;
    use crate::worker::idle_link;

    /// And is no burden meanwhile.
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

    /// Who waits for a credit is let go with the thread that would have received it.
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

    /// The last words wait for nobody who takes none.
    #[test]
    fn last_words_take_a_moment_only() {
        let (link, _receiver) = idle_link::link();
        let begun = Instant::now();
        link.end(&MigrationError::Aborted("told".into()), true);
        assert!(begun.elapsed() < LAST_WORDS * 3);
    }
}
