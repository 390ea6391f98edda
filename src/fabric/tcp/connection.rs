//! An established connection and its two halves.

use std::{
    io,
    net::{Shutdown, TcpStream},
    ops::Range,
    os::fd::AsFd,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{RecvFlags, SendFlags},
};
use zerocopy::{FromBytes, IntoBytes};

use super::{
    frame::{self, HEADER_SIZE, Header},
    set_options,
};
use crate::{
    fabric::{
        Connection, FabricError, Handle, MESSAGE_MAX, Pinned, Poster, Receiver, RemoteKey, Result,
    },
    memory::{Pipe, Region},
};

/// Most bytes of writes in flight. It bounds what QEMU believes to be sent and is not: 8 MiB are
/// 7 ms at 10 Gbit/s.
const WINDOW: u64 = 8 << 20;

/// Bytes that land before the sender is told unasked; a small part of [`WINDOW`].
const REPORT_EVERY: u64 = 1 << 20;

/// Bytes that are read ahead: the frames of some fifteen single pages.
const READ_AHEAD: usize = 64 << 10;

/// How long the peer may take to close after the last words.
const FAREWELL: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Most bytes that one `sendfile` is asked for.
const SENDFILE_MAX: u64 = 16 << 20;

/// What both halves and handles share.
struct Shared {
    stream: TcpStream,
    /// Held while a frame is sent, because the receiver answers with LANDED on the same socket.
    /// Taken once a frame, not once a page, and contended only then.
    sending: Mutex<()>,
    posted: AtomicU64,
    landed: AtomicU64,
    failed: AtomicBool,
    /// Some thread ran into a time bound: what the others see then is its consequence.
    stalled: AtomicBool,
    begun: Instant,
    /// When the peer last took something, in milliseconds since `begun`.
    heard: AtomicU64,
    /// With `changed`: signals that `landed` or `failed` changed.
    change: Mutex<()>,
    changed: Condvar,
    stall_timeout: Duration,
}

impl Shared {
    fn posted(&self) -> u64 {
        self.posted.load(Ordering::Relaxed)
    }

    fn landed(&self) -> u64 {
        self.landed.load(Ordering::Relaxed)
    }

    fn lock(mutex: &Mutex<()>) -> MutexGuard<'_, ()> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an error of the socket means.
    fn failure(&self, error: io::Error) -> FabricError {
        match error.kind() {
            // The bound of SO_SNDTIMEO or TCP_USER_TIMEOUT.
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.stall(),
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted => self.end(),
            _ => FabricError::Host { call: "The connection to the peer", source: error },
        }
    }

    fn stall(&self) -> FabricError {
        self.stalled.store(true, Ordering::Relaxed);
        FabricError::Stalled(self.stall_timeout)
    }

    /// Why the connection has ended. The system says only once that the time was over, and may say
    /// it to a `sendfile` that had sent something, which then returns no error; so a peer that had
    /// long taken nothing counts as stalled too.
    fn end(&self) -> FabricError {
        let now = self.begun.elapsed().as_millis() as u64;
        let silent = now.saturating_sub(self.heard.load(Ordering::Relaxed));
        let long = Duration::from_millis(silent) > self.stall_timeout / 2;
        if self.stalled.load(Ordering::Relaxed) || long && self.posted() > self.landed() {
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

    /// Send all of `bytes`; `more` follows at once.
    fn send_all(&self, mut bytes: &[u8], more: bool) -> Result<()> {
        let flags = SendFlags::NOSIGNAL | if more { SendFlags::MORE } else { SendFlags::empty() };
        while !bytes.is_empty() {
            let sent = rustix::net::send(&self.stream, bytes, flags)
                .map_err(|errno| self.failure(errno.into()))?;
            bytes = &bytes[sent..];
        }
        Ok(())
    }

    fn send_frame(&self, header: Header, parts: [&[u8]; 2]) -> Result<()> {
        let _sending = Self::lock(&self.sending);
        self.send_all(header.as_bytes(), header.length.get() > 0)?;
        self.send_all(parts[0], !parts[1].is_empty())?;
        self.send_all(parts[1], false)
    }

    /// Wait until at most `in_flight` bytes are in flight.
    fn wait_in_flight(&self, in_flight: u64) -> Result<()> {
        let mut guard = Self::lock(&self.change);
        loop {
            if self.failed.load(Ordering::Relaxed) {
                return Err(self.end());
            }
            let landed = self.landed();
            if self.posted() - landed <= in_flight {
                return Ok(());
            }
            let (next, timeout) = self
                .changed
                .wait_timeout(guard, self.stall_timeout)
                .unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() && self.landed() == landed {
                return Err(self.stall());
            }
            guard = next;
        }
    }

    /// Tell a waiting poster.
    fn signal(&self) {
        let _guard = Self::lock(&self.change);
        self.changed.notify_all();
    }

    fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
        self.signal();
    }
}

/// A failure of a transfer between the socket and `region`: what is not the socket's is memory's.
fn of_region(region: &Region, failure: FabricError) -> FabricError {
    match failure {
        FabricError::Host { source, .. } => {
            FabricError::Memory { block: region.name().to_owned(), source }
        }
        other => other,
    }
}

/// A connection before its halves go to their threads.
pub(super) struct TcpConnection {
    shared: Arc<Shared>,
    pipe: Pipe,
}

impl TcpConnection {
    pub(super) fn new(stream: TcpStream, stall_timeout: Duration) -> Result<Self> {
        let host = |source| FabricError::Host { call: "Setting up the connection", source };
        set_options(&stream, stall_timeout).map_err(host)?;
        let shared = Shared {
            stream,
            sending: Mutex::default(),
            posted: AtomicU64::new(0),
            landed: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            stalled: AtomicBool::new(false),
            begun: Instant::now(),
            heard: AtomicU64::new(0),
            change: Mutex::default(),
            changed: Condvar::new(),
            stall_timeout,
        };
        Ok(Self { shared: Arc::new(shared), pipe: Pipe::new().map_err(host)? })
    }
}

impl Connection for TcpConnection {
    fn split(self: Box<Self>) -> (Arc<dyn Poster>, Box<dyn Receiver>) {
        let poster = TcpPoster { shared: self.shared.clone() };
        let receiver = TcpReceiver {
            shared: self.shared,
            regions: Vec::new(),
            pipe: self.pipe,
            ahead: vec![0; READ_AHEAD].into_boxed_slice(),
            next: 0,
            end: 0,
            received: 0,
            reported: 0,
        };
        (Arc::new(poster), Box::new(receiver))
    }

    fn handle(&self) -> Handle {
        let shared = self.shared.clone();
        Handle::new(move || {
            // It fails only when the connection has ended already.
            let _ = shared.stream.shutdown(Shutdown::Both);
            shared.fail();
        })
    }
}

struct TcpPoster {
    shared: Arc<Shared>,
}

impl TcpPoster {
    /// Begin a write of `length` bytes to `offset` of the region that `remote` names: its bytes
    /// follow, while the guard is held.
    fn begin_write(
        &self,
        offset: u64,
        length: u64,
        remote: RemoteKey,
    ) -> Result<MutexGuard<'_, ()>> {
        let shared = &*self.shared;
        if shared.posted() - shared.landed() > WINDOW {
            shared.wait_in_flight(WINDOW)?;
        }
        if shared.posted() == shared.landed() {
            shared.progress();
        }
        // Before the first byte leaves: the peer's LANDED may overtake the end of the write.
        shared.posted.fetch_add(length, Ordering::Relaxed);
        let address = remote.address.wrapping_add(offset);
        let header = Header::new(frame::WRITE, remote.rkey, address, length);
        let sending = Shared::lock(&shared.sending);
        shared.send_all(header.as_bytes(), true)?;
        Ok(sending)
    }
}

impl Poster for TcpPoster {
    fn send(&self, header: &[u8], payload: &[u8]) -> Result<()> {
        let length = (header.len() + payload.len()) as u64;
        self.shared.send_frame(Header::new(frame::SEND, 0, 0, length), [header, payload])
    }

    fn write(
        &self,
        region: &Arc<Region>,
        mut offset: u64,
        length: u64,
        remote: RemoteKey,
    ) -> Result<()> {
        let _sending = self.begin_write(offset, length, remote)?;
        let shared = &*self.shared;
        let end = offset + length;
        while offset < end {
            let sent = region
                .send_to(shared.stream.as_fd(), offset, (end - offset).min(SENDFILE_MAX) as usize)
                .map_err(|error| of_region(region, shared.failure(error)))?;
            offset += sent as u64;
        }
        Ok(())
    }

    fn write_bytes(&self, bytes: &[u8], offset: u64, remote: RemoteKey) -> Result<()> {
        let _sending = self.begin_write(offset, bytes.len() as u64, remote)?;
        self.shared.send_all(bytes, false)
    }

    fn pin(&self, _region: &Arc<Region>, _range: Range<u64>) -> Result<()> {
        Ok(())
    }

    fn unpin(&self, _region: &Arc<Region>, _range: Range<u64>) {}

    fn pinned(&self) -> Pinned {
        Pinned::default()
    }

    fn drain(&self) -> Result<()> {
        if self.shared.posted() > self.shared.landed() {
            self.shared.send_frame(Header::new(frame::FLUSH, 0, 0, 0), [&[], &[]])?;
        }
        self.shared.wait_in_flight(0)
    }

    fn finish(&self) {
        let stream = &self.shared.stream;
        // Closing a socket with unread bytes would reset the connection and may lose what was
        // sent, so the peer is given the time to close first. Both calls fail only if it has.
        if stream.shutdown(Shutdown::Write).is_ok() {
            let mut closed = [PollFd::new(stream, PollFlags::RDHUP)];
            let _ = poll(&mut closed, Some(&FAREWELL));
        }
    }

    fn connections(&self) -> u32 {
        1
    }

    fn posted(&self) -> u64 {
        self.shared.posted()
    }

    fn landed(&self) -> u64 {
        self.shared.landed()
    }
}

struct TcpReceiver {
    shared: Arc<Shared>,
    /// By rkey - 1.
    regions: Vec<Arc<Region>>,
    pipe: Pipe,
    /// Bytes read ahead: `next..end` are not used yet.
    ahead: Box<[u8]>,
    next: usize,
    end: usize,
    /// Bytes of writes that landed here, and how many of them the peer was told.
    received: u64,
    reported: u64,
}

impl Receiver for TcpReceiver {
    fn receive(&mut self, message: &mut Vec<u8>) -> Result<()> {
        let result = self.next_message(message);
        if result.is_err() {
            self.shared.fail();
        }
        result
    }

    fn landed(&self) -> u64 {
        self.received
    }

    fn announce(&mut self, region: &Arc<Region>) -> Result<RemoteKey> {
        let known = self.regions.iter().position(|known| Arc::ptr_eq(known, region));
        let index = known.unwrap_or_else(|| {
            self.regions.push(region.clone());
            self.regions.len() - 1
        });
        let rkey = u32::try_from(index + 1).map_err(|_| FabricError::Host {
            call: "Registering memory",
            source: io::ErrorKind::OutOfMemory.into(),
        })?;
        // A region's addresses are offsets in it: it need not be mapped to be written.
        Ok(RemoteKey { address: 0, rkey })
    }

    fn register(&mut self, region: &Arc<Region>, _range: Range<u64>) -> Result<RemoteKey> {
        self.announce(region)
    }

    fn unregister(&mut self, _region: &Arc<Region>, _range: Range<u64>) {
        // Nobody asks for ranges: the key to the whole region is announced.
    }

    fn revoke(&mut self) {
        // Writes land on this thread only, so none is under way.
        self.regions.clear();
    }
}

impl TcpReceiver {
    fn next_message(&mut self, message: &mut Vec<u8>) -> Result<()> {
        loop {
            let mut bytes = [0; HEADER_SIZE];
            self.read_exact(&mut bytes)?;
            let Ok(header) = Header::read_from_bytes(&bytes) else {
                return Err(FabricError::Malformed("header size".into()));
            };
            let length = header.length.get();
            match header.kind.get() {
                frame::SEND if length <= MESSAGE_MAX as u64 => {
                    message.resize(length as usize, 0);
                    return self.read_exact(message);
                }
                frame::SEND => {
                    return Err(FabricError::Malformed(format!(
                        "a message of {length} bytes; the longest has {MESSAGE_MAX}"
                    )));
                }
                frame::WRITE => self.land(header.rkey.get(), header.address.get(), length)?,
                frame::FLUSH => self.report()?,
                frame::LANDED => self.landed(header.address.get())?,
                kind => return Err(FabricError::Malformed(format!("frame kind {kind}"))),
            }
        }
    }

    /// The peer says how much of what was posted has landed there.
    fn landed(&mut self, landed: u64) -> Result<()> {
        // `landed` is stored first, and `posted` only grows.
        if landed < self.shared.landed() || landed > self.shared.posted() {
            return Err(FabricError::Malformed(format!(
                "{landed} bytes landed of {} that were written",
                self.shared.posted()
            )));
        }
        self.shared.landed.store(landed, Ordering::Relaxed);
        self.shared.progress();
        self.shared.signal();
        Ok(())
    }

    /// Receive a write into the region that it names.
    fn land(&mut self, rkey: u32, address: u64, length: u64) -> Result<()> {
        let region = (rkey as usize).checked_sub(1).and_then(|index| self.regions.get(index));
        let Some(region) = region.cloned() else {
            return Err(FabricError::RemoteAccess(format!(
                "no memory is registered under key {rkey}"
            )));
        };
        let end = address.checked_add(length).filter(|end| *end <= region.length());
        let Some(end) = end else {
            return Err(FabricError::RemoteAccess(format!(
                "{length} bytes at {address:#x} are beyond RAM block '{}' of {} bytes",
                region.name(),
                region.length()
            )));
        };
        let mut at = address;
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let ready = self.end - self.next;
            let landed = if ready > 0 {
                let take = left.min(ready);
                region
                    .write_at(&self.ahead[self.next..self.next + take], at)
                    .map_err(|error| of_region(&region, self.shared.failure(error)))?;
                self.next += take;
                take
            } else {
                region
                    .receive_from(self.shared.stream.as_fd(), &mut self.pipe, at, left)
                    .map_err(|error| of_region(&region, self.shared.failure(error)))?
            };
            if landed == 0 {
                return Err(self.shared.end());
            }
            at += landed as u64;
            self.received += landed as u64;
            if self.received - self.reported >= REPORT_EVERY {
                self.report()?;
            }
        }
        Ok(())
    }

    /// Tell the peer how much has landed.
    fn report(&mut self) -> Result<()> {
        self.reported = self.received;
        self.shared.send_frame(Header::new(frame::LANDED, 0, self.received, 0), [&[], &[]])
    }

    fn read_exact(&mut self, mut to: &mut [u8]) -> Result<()> {
        while !to.is_empty() {
            if self.next == self.end {
                self.next = 0;
                self.end = 0;
                let received =
                    rustix::net::recv(&self.shared.stream, &mut *self.ahead, RecvFlags::empty())
                        .map_err(|errno| self.shared.failure(errno.into()))?
                        .0;
                if received == 0 {
                    return Err(self.shared.end());
                }
                self.end = received;
            }
            let take = to.len().min(self.end - self.next);
            let (now, later) = to.split_at_mut(take);
            now.copy_from_slice(&self.ahead[self.next..self.next + take]);
            self.next += take;
            to = later;
        }
        Ok(())
    }
}
