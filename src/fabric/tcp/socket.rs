//! One TCP connection of a link: whole frames out, one after the other.

use std::{
    io::{self, IoSlice},
    net::{Shutdown, TcpStream},
    os::fd::AsFd as _,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg, sockopt};
use zerocopy::IntoBytes as _;

use super::frame::Header;
use crate::{
    memory::Region,
    patience::{SLICE, persist},
};

/// Longest write that is copied out of guest memory, to leave with its header in one system call.
/// `sendfile` needs a second one and copies nothing: it costs the sender 0.52 s/GiB where copying
/// costs 0.36 in writes of 4 KiB, 0.20 and 0.23 in writes of 16 KiB.
const COPIED_MAX: u64 = 8 << 10;

/// Most bytes that one `sendfile` is asked for.
const SENDFILE_MAX: u64 = 16 << 20;

/// A connection.
pub(super) struct Socket {
    pub(super) stream: TcpStream,
    /// Held while a frame is sent, because several threads send, and the receiver answers with
    /// LANDED on the same connection. Taken once a frame, not once a page.
    sending: Mutex<Sending>,
    /// Bytes of writes that were sent or are being sent.
    posted: AtomicU64,
    /// Bytes of them that have landed.
    pub(super) landed: AtomicU64,
    /// How long the peer may take nothing.
    stall_timeout: Duration,
    /// As long as it likes.
    patient: AtomicBool,
}

/// What belongs to who sends a frame.
#[derive(Default)]
struct Sending {
    /// Bytes that are copied out of guest memory.
    copied: Vec<u8>,
}

impl Socket {
    pub(super) fn new(stream: TcpStream, stall_timeout: Duration) -> Self {
        Self {
            stream,
            sending: Mutex::default(),
            posted: AtomicU64::new(0),
            landed: AtomicU64::new(0),
            stall_timeout,
            patient: AtomicBool::new(false),
        }
    }

    /// From here on a peer that takes nothing is waited for as long as the connection stands. Whether it
    /// does the system finds out: by keepalive, or because nobody acknowledges what is sent.
    pub(super) fn be_patient(&self) {
        self.patient.store(true, Ordering::Relaxed);
        // It fails only when the connection has ended.
        let _ = sockopt::set_tcp_user_timeout(&self.stream, 0);
    }

    /// How long the peer may take nothing now.
    fn limit(&self) -> Option<Duration> {
        (!self.patient.load(Ordering::Relaxed)).then_some(self.stall_timeout)
    }

    pub(super) fn posted(&self) -> u64 {
        self.posted.load(Ordering::Relaxed)
    }

    pub(super) fn landed(&self) -> u64 {
        self.landed.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Sending> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Send a frame without RAM.
    pub(super) fn send(&self, header: Header, payload: [&[u8]; 2]) -> io::Result<()> {
        let _sending = self.lock();
        self.send_all([header.as_bytes(), payload[0], payload[1]], false)
    }

    /// Send a write of `bytes`.
    pub(super) fn write_bytes(&self, header: Header, bytes: &[u8]) -> io::Result<()> {
        let _sending = self.lock();
        self.posted.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.send_all([header.as_bytes(), bytes, &[]], false)
    }

    /// Send a write of what is at `offset` of `region`.
    pub(super) fn write(
        &self,
        header: Header,
        region: &Region,
        mut offset: u64,
    ) -> Result<(), WriteError> {
        let length = header.length.get();
        let mut sending = self.lock();
        // Before the first byte leaves: the peer's LANDED may overtake the end of the write.
        self.posted.fetch_add(length, Ordering::Relaxed);
        if length <= COPIED_MAX {
            sending.copied.resize(length as usize, 0);
            region.read_at(&mut sending.copied, offset).map_err(WriteError::Memory)?;
            let frame = [header.as_bytes(), &sending.copied, &[]];
            return self.send_all(frame, false).map_err(WriteError::Socket);
        }
        self.send_all([header.as_bytes(), &[], &[]], true).map_err(WriteError::Socket)?;
        let end = offset + length;
        while offset < end {
            let some = (end - offset).min(SENDFILE_MAX) as usize;
            let send = || region.send_to(self.stream.as_fd(), offset, some);
            let sent = persist(|| self.limit(), send);
            offset += match sent {
                Ok(sent) => sent as u64,
                Err(error) => {
                    // Else the peer would take what follows, the last words, for the rest of it.
                    let _ = self.stream.shutdown(Shutdown::Write);
                    return Err(WriteError::Either(error));
                }
            };
        }
        Ok(())
    }

    /// If writes are under way, ask how much of them has landed. Returns how much that must be when
    /// all of them have.
    pub(super) fn flush(&self, header: Header) -> io::Result<u64> {
        // Under the lock: what is posted later is behind the question.
        let _sending = self.lock();
        let posted = self.posted();
        if posted > self.landed() {
            self.send_all([header.as_bytes(), &[], &[]], false)?;
        }
        Ok(posted)
    }

    /// Send all of `parts`; `more` follows at once.
    fn send_all(&self, parts: [&[u8]; 3], more: bool) -> io::Result<()> {
        let flags = SendFlags::NOSIGNAL | if more { SendFlags::MORE } else { SendFlags::empty() };
        let mut slices = parts.map(IoSlice::new);
        let mut left = &mut slices[..];
        // What is empty at the front goes away.
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            let send = || sendmsg(&self.stream, left, &mut SendAncillaryBuffer::default(), flags);
            let sent = persist(|| self.limit(), send)?;
            IoSlice::advance_slices(&mut left, sent);
        }
        Ok(())
    }
}

/// Why a write of guest memory was not sent.
pub(super) enum WriteError {
    /// The connection's fault.
    Socket(io::Error),
    /// The memory's.
    Memory(io::Error),
    /// Of a system call that has to do with both.
    Either(io::Error),
}

/// How often a peer that is silent is asked whether it is there, in seconds.
const KEEPALIVE: u32 = 5;

/// Make a dead peer noticed: keepalive while idle, a bound on unacknowledged data.
pub(super) fn set_options(stream: &TcpStream, stall_timeout: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(stall_timeout.min(SLICE)))?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(KEEPALIVE.into()))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(KEEPALIVE.into()))?;
    // It counts for who has become patient; the system allows no more (MAX_TCP_KEEPCNT).
    let probes = stall_timeout.as_secs().div_ceil(KEEPALIVE.into()).clamp(12, 127);
    sockopt::set_tcp_keepcnt(stream, probes as u32)?;
    // It bounds unacknowledged data, and keepalive too.
    let milliseconds = u32::try_from(stall_timeout.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(stream, milliseconds)?;
    Ok(())
}
