//! The receiving half: messages on the first connection, writes on all of them.

use std::{
    io,
    ops::Range,
    os::fd::AsFd as _,
    sync::{Arc, atomic::Ordering},
    thread::JoinHandle,
};

use rustix::net::{RecvFlags, recv};
use zerocopy::FromBytes as _;

use super::{
    frame::{self, HEADER_SIZE, Header},
    shared::{Shared, WINDOW, lock, of_memory},
    socket::Socket,
};
use crate::{
    fabric::{FabricError, Guard, MESSAGE_MAX, RecvHalf, RemoteKey, Result},
    memory::{Pipe, Region, WriteWindow},
    patience::persist,
    ram::CHUNK,
    threads,
};

/// Bytes that land on a connection before an unrequested LANDED.
const REPORT_EVERY: u64 = 1 << 20;

/// Size of the read-ahead buffer in bytes: the frames of some fifteen single pages.
const READ_AHEAD: usize = 64 << 10;

/// Longest write that is received through the buffer instead of the pipe. It is a few per cent
/// cheaper if one system call returns several frames, or all of one. At 512 KiB the pipe, which
/// copies once less, costs a third less.
const BUFFERED_MAX: u64 = READ_AHEAD as u64;

pub(super) struct TcpRecvHalf {
    shared: Arc<Shared>,
    first: Incoming,
    /// Threads that receive from the other connections.
    others: Vec<JoinHandle<()>>,
}

impl TcpRecvHalf {
    /// Start threads that receive from all connections but the first.
    pub(super) fn begin(shared: Arc<Shared>, first: Incoming, others: Vec<Incoming>) -> Self {
        let take = |other: Incoming| {
            let shared = shared.clone();
            threads::start(
                "writes",
                move || other.take_writes(),
                move |end| {
                    if let Err(lost) = end {
                        shared.fail_with(lost.into());
                    }
                },
            )
        };
        let others = others.into_iter().filter_map(take).collect();
        Self { shared, first, others }
    }
}

impl RecvHalf for TcpRecvHalf {
    fn receive(&mut self, message: &mut Vec<u8>) -> Result<()> {
        let result = self.first.next_message(message);
        result.map_err(|error| {
            self.shared.fail();
            // `error` is then a consequence of that failure.
            self.shared.take_failure().unwrap_or(error)
        })
    }

    fn await_writes(&mut self) -> Result<()> {
        // The peer's `drain` has waited for our LANDED.
        Ok(())
    }

    fn landed(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }

    fn guard(&mut self, may_land: Guard) {
        self.shared.guard(may_land);
    }

    fn announce(&mut self, region: &Arc<Region>) -> Result<RemoteKey> {
        let mut regions = lock(&self.shared.regions);
        let known = regions.iter().position(|known| Arc::ptr_eq(known, region));
        let index = known.unwrap_or_else(|| {
            regions.push(region.clone());
            regions.len() - 1
        });
        let rkey = u32::try_from(index + 1).map_err(|_| FabricError::Host {
            call: "Registering memory",
            source: io::ErrorKind::OutOfMemory.into(),
        })?;
        // A region's addresses are offsets, so it need not be mapped to be written.
        Ok(RemoteKey { address: 0, rkey })
    }

    fn register(&mut self, region: &Arc<Region>, _range: Range<u64>) -> Result<RemoteKey> {
        self.announce(region)
    }

    fn unregister(&mut self, _region: &Arc<Region>, _range: Range<u64>) {
        // Peers request no ranges: the announced key covers the whole region.
    }

    fn revoke(&mut self) {
        lock(&self.shared.regions).clear();
        // A thread that looked up a region earlier may still be writing to it. It ends with its
        // connection, because it blocks on nothing else.
        self.shared.end_ram();
        for other in self.others.drain(..) {
            // Its end was already reported.
            let _ = other.join();
        }
        // Writes of the first connection land on this thread.
    }
}

impl Drop for TcpRecvHalf {
    /// LANDED is no longer processed: wake threads that wait for it.
    fn drop(&mut self) {
        self.shared.end_ram();
        self.shared.fail();
    }
}

/// The receiving side of one connection.
pub(super) struct Incoming {
    shared: Arc<Shared>,
    /// Index of the connection.
    index: usize,
    pipe: Pipe,
    window: WriteWindow,
    /// Read-ahead buffer; `next..end` is unread.
    ahead: Box<[u8]>,
    next: usize,
    end: usize,
    /// The last frame was a long write. The next one most often is too, and its payload should not
    /// be read into the buffer.
    after_long: bool,
    /// Bytes of writes that landed from this connection, and how many were reported to the peer.
    received: u64,
    reported: u64,
    report_every: u64,
}

impl Incoming {
    pub(super) fn new(shared: &Arc<Shared>, index: usize) -> io::Result<Self> {
        // Unreported bytes use at most half of the window.
        let most = WINDOW / 2 / shared.sockets.len() as u64;
        Ok(Self {
            shared: shared.clone(),
            index,
            pipe: Pipe::new()?,
            window: WriteWindow::new(shared.sockets.len()),
            ahead: vec![0; READ_AHEAD].into_boxed_slice(),
            next: 0,
            end: 0,
            after_long: false,
            received: 0,
            reported: 0,
            report_every: REPORT_EVERY.min(most),
        })
    }

    fn socket(&self) -> &Socket {
        &self.shared.sockets[self.index]
    }

    /// Process writes until the connection ends. An end between two frames is not a failure while
    /// no write from this side is in flight: a later one will notice it.
    fn take_writes(mut self) {
        let error = loop {
            match self.header() {
                Ok(Some(header)) if header.kind == frame::SEND => {
                    break FabricError::Malformed("a message where only writes belong".into());
                }
                Ok(Some(header)) => {
                    if let Err(error) = self.frame(header) {
                        break error;
                    }
                }
                Ok(None) if self.socket().landed() == self.socket().posted() => return,
                Ok(None) => break self.shared.end(),
                Err(error) => break error,
            }
        };
        self.shared.fail_with(error);
    }

    /// Process frames up to the next message.
    fn next_message(&mut self, message: &mut Vec<u8>) -> Result<()> {
        loop {
            let header = self.header()?.ok_or_else(|| self.shared.end())?;
            let length = header.length.get();
            match header.kind.get() {
                frame::SEND if length <= MESSAGE_MAX as u64 => {
                    message.resize(length as usize, 0);
                    return match self.read_exact(message)? {
                        true => Ok(()),
                        false => Err(self.shared.end()),
                    };
                }
                frame::SEND => {
                    return Err(FabricError::Malformed(format!(
                        "a message of {length} bytes; the longest has {MESSAGE_MAX}"
                    )));
                }
                _ => self.frame(header)?,
            }
        }
    }

    /// Process a frame that is not a message.
    fn frame(&mut self, header: Header) -> Result<()> {
        match header.kind.get() {
            frame::WRITE => self.land(header.rkey.get(), header.address.get(), header.length.get()),
            frame::FLUSH => self.report(),
            frame::LANDED => self.shared.has_landed(self.socket(), header.address.get()),
            kind => Err(FabricError::Malformed(format!("frame kind {kind}"))),
        }
    }

    /// Receive a write into its region.
    fn land(&mut self, rkey: u32, address: u64, length: u64) -> Result<()> {
        let index = (rkey as usize).checked_sub(1);
        let region = index.and_then(|index| lock(&self.shared.regions).get(index).cloned());
        let Some(region) = region else {
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
        if !self.shared.may_land() {
            return Err(FabricError::RemoteAccess("another peer is migrating".into()));
        }
        let mut at = address;
        while at < end {
            // An honest write stays within its chunk. Prepare no memory for the rest of another
            // before it arrives.
            let next = (at / CHUNK + 1).saturating_mul(CHUNK).min(end);
            self.land_piece(&region, at, next, length)?;
            at = next;
        }
        Ok(())
    }

    /// Receive the part from `at` to `end` of a write of `length` bytes.
    fn land_piece(&mut self, region: &Region, mut at: u64, end: u64, length: u64) -> Result<()> {
        region.prepare_write(&mut self.window, at, end - at);
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let landed = if length <= BUFFERED_MAX || self.next < self.end {
                self.land_copied(region, at, left)?
            } else {
                let stream = self.shared.sockets[self.index].stream.as_fd();
                let (pipe, window) = (&mut self.pipe, &self.window);
                let receive = || region.receive_from(stream, pipe, window, at, left);
                persist(|| None, receive).map_err(|error| self.shared.failure_at(region, error))?
            };
            if landed == 0 {
                return Err(self.shared.end());
            }
            at += landed as u64;
            self.received += landed as u64;
            self.shared.received.fetch_add(landed as u64, Ordering::Relaxed);
            if self.received - self.reported >= self.report_every {
                self.report()?;
            }
        }
        Ok(())
    }

    /// Write up to `left` bytes from the buffer to `region`. Return their number; 0 at end of
    /// stream.
    fn land_copied(&mut self, region: &Region, at: u64, left: usize) -> Result<usize> {
        if self.next == self.end && !self.read_ahead()? {
            return Ok(0);
        }
        let take = left.min(self.end - self.next);
        let bytes = &self.ahead[self.next..self.next + take];
        region.write_at(bytes, at).map_err(|error| of_memory(region, error))?;
        self.next += take;
        Ok(take)
    }

    /// Report to the peer how much has landed.
    fn report(&mut self) -> Result<()> {
        self.reported = self.received;
        let landed = Header::new(frame::LANDED, 0, self.received, 0);
        self.socket().send(landed, [&[], &[]]).map_err(|error| self.shared.failure(error))
    }

    /// Receive the next frame's header; `None` at end of stream.
    fn header(&mut self) -> Result<Option<Header>> {
        let mut bytes = [0; HEADER_SIZE];
        if !self.read_exact(&mut bytes)? {
            return Ok(None);
        }
        let header = Header::read_from_bytes(&bytes)
            .map_err(|_| FabricError::Malformed("header size".into()))?;
        self.after_long = header.kind == frame::WRITE && header.length.get() > BUFFERED_MAX;
        Ok(Some(header))
    }

    /// Fill `to`. Return false at end of stream before the first byte.
    fn read_exact(&mut self, to: &mut [u8]) -> Result<bool> {
        let mut done = 0;
        while done < to.len() {
            if self.next == self.end && !self.read_ahead()? {
                return if done == 0 { Ok(false) } else { Err(self.shared.end()) };
            }
            let take = (to.len() - done).min(self.end - self.next);
            to[done..done + take].copy_from_slice(&self.ahead[self.next..self.next + take]);
            self.next += take;
            done += take;
        }
        Ok(true)
    }

    /// Refill the empty buffer. Return false at end of stream.
    fn read_ahead(&mut self) -> Result<bool> {
        let stream = &self.shared.sockets[self.index].stream;
        self.next = 0;
        self.end = 0;
        let most = if self.after_long { HEADER_SIZE } else { READ_AHEAD };
        let ahead = &mut self.ahead[..most];
        let receive = || recv(stream, &mut *ahead, RecvFlags::empty());
        let received = persist(|| None, receive);
        self.end = received.map_err(|error| self.shared.failure(error))?.0;
        Ok(self.end > 0)
    }
}
