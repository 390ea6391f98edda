//! What arrives: messages on the first connection, writes on all of them.

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

/// Bytes that land on a connection before the sender is told unasked.
const REPORT_EVERY: u64 = 1 << 20;

/// Bytes that are read ahead: the frames of some fifteen single pages.
const READ_AHEAD: usize = 64 << 10;

/// Longest write that lands through the buffer instead of the pipe. Where several frames, or all of
/// one, come by one system call, that is cheaper by some per cent. At 512 KiB the pipe, which copies
/// once less, costs a third less.
const BUFFERED_MAX: u64 = READ_AHEAD as u64;

/// The half that receives.
pub(super) struct TcpRecvHalf {
    shared: Arc<Shared>,
    first: Incoming,
    /// Those that receive from the other connections.
    others: Vec<JoinHandle<()>>,
}

impl TcpRecvHalf {
    /// Receive from all but the first connection on threads of their own.
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
            // What came here was its consequence.
            self.shared.take_failure().unwrap_or(error)
        })
    }

    fn await_writes(&mut self) -> Result<()> {
        // The peer has waited until it was told.
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
        lock(&self.shared.regions).clear();
        // Who has looked up a region before that may still be writing to it. A thread does not
        // outlive its connection: it waits for nothing else.
        self.shared.end_ram();
        for other in self.others.drain(..) {
            // It has said how it ended.
            let _ = other.join();
        }
        // The first connection's writes land on this thread.
    }
}

impl Drop for TcpRecvHalf {
    /// Nobody hears any more what has landed: who waits for that has to know.
    fn drop(&mut self) {
        self.shared.end_ram();
        self.shared.fail();
    }
}

/// What arrives on one connection.
pub(super) struct Incoming {
    shared: Arc<Shared>,
    /// Which one.
    index: usize,
    pipe: Pipe,
    window: WriteWindow,
    /// Bytes read ahead: `next..end` are not used yet.
    ahead: Box<[u8]>,
    next: usize,
    end: usize,
    /// The last frame was a long write. So, most often, is the next one, whose bytes had better not
    /// come into the buffer.
    after_long: bool,
    /// Bytes of writes that landed from here, and how many of them the peer was told.
    received: u64,
    reported: u64,
    report_every: u64,
}

impl Incoming {
    pub(super) fn new(shared: &Arc<Shared>, index: usize) -> io::Result<Self> {
        // What nobody is told of at any time leaves half of the window to be used.
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

    /// Land writes until the connection ends. That is no failure between two frames while nothing
    /// is under way from here: who writes to it later notices.
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

    /// Receive up to the next message.
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

    /// Deal with a frame that is no message.
    fn frame(&mut self, header: Header) -> Result<()> {
        match header.kind.get() {
            frame::WRITE => self.land(header.rkey.get(), header.address.get(), header.length.get()),
            frame::FLUSH => self.report(),
            frame::LANDED => self.shared.has_landed(self.socket(), header.address.get()),
            kind => Err(FabricError::Malformed(format!("frame kind {kind}"))),
        }
    }

    /// Receive a write into the region that it names.
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
            return Err(FabricError::RemoteAccess("it is another peer's turn".into()));
        }
        let mut at = address;
        while at < end {
            // No honest write leaves its chunk. One that does is not given memory before it is there.
            let next = (at / CHUNK + 1).saturating_mul(CHUNK).min(end);
            self.land_piece(&region, at, next, length)?;
            at = next;
        }
        Ok(())
    }

    /// Receive the part of a write of `length` bytes that goes from `at` to `end`.
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

    /// Land up to `left` bytes through the buffer. Returns how many; 0 at the connection's end.
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

    /// Tell the peer how much has landed.
    fn report(&mut self) -> Result<()> {
        self.reported = self.received;
        let landed = Header::new(frame::LANDED, 0, self.received, 0);
        self.socket().send(landed, [&[], &[]]).map_err(|error| self.shared.failure(error))
    }

    /// The next frame's header; `None` at the connection's end.
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

    /// Fill `to`; false if the connection ends before its first byte.
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

    /// Receive into the buffer, which is used up; false at the connection's end.
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
