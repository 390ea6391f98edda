//! One TCP connection of a link. It sends whole frames, one at a time.

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

/// Longest write that is copied out of guest memory, to send it with its header in one system call.
/// `sendfile` needs a second call but does not copy. For writes of 4 KiB it costs the sender 0.52
/// s/GiB, copying 0.36; for 16 KiB it is 0.20 against 0.23.
const COPIED_MAX: u64 = 8 << 10;

/// Most bytes per `sendfile` call.
const SENDFILE_MAX: u64 = 16 << 20;

pub(super) struct Socket {
    pub(super) stream: TcpStream,
    /// Held while a frame is sent: several threads send, and the receiver replies with LANDED on
    /// the same connection. Taken once per frame, not once per page.
    sending: Mutex<Sending>,
    /// Bytes of writes sent, or being sent.
    posted: AtomicU64,
    /// Bytes of `posted` that have landed.
    pub(super) landed: AtomicU64,
    /// How long the peer may receive nothing.
    stall_timeout: Duration,
    /// Ignore `stall_timeout`.
    patient: AtomicBool,
}

/// State of the thread that sends a frame.
#[derive(Default)]
struct Sending {
    /// Buffer for bytes copied out of guest memory.
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

    /// From now on wait for a peer that receives nothing for as long as the connection exists. The
    /// kernel detects its end: by keepalive, or because sent data is not acknowledged.
    pub(super) fn be_patient(&self) {
        self.patient.store(true, Ordering::Relaxed);
        // Fails only if the connection has ended.
        let _ = sockopt::set_tcp_user_timeout(&self.stream, 0);
    }

    /// The stall timeout in effect.
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

    /// Send a frame that is not a write.
    pub(super) fn send(&self, header: Header, payload: [&[u8]; 2]) -> io::Result<()> {
        let _sending = self.lock();
        self.send_all([header.as_bytes(), payload[0], payload[1]], false)
    }

    pub(super) fn write_bytes(&self, header: Header, bytes: &[u8]) -> io::Result<()> {
        let _sending = self.lock();
        self.posted.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.send_all([header.as_bytes(), bytes, &[]], false)
    }

    /// Send a write of the content of `region` at `offset`.
    pub(super) fn write(
        &self,
        header: Header,
        region: &Region,
        mut offset: u64,
    ) -> Result<(), WriteError> {
        let length = header.length.get();
        let mut sending = self.lock();
        // Before the first byte is sent: LANDED for it may arrive before the write returns.
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
                    // Otherwise the peer would take the final message for the rest of this write.
                    let _ = self.stream.shutdown(Shutdown::Write);
                    return Err(WriteError::Either(error));
                }
            };
        }
        Ok(())
    }

    /// If writes are in flight, request a LANDED. Return the number of bytes that it reports once
    /// all of them have landed.
    pub(super) fn flush(&self, header: Header) -> io::Result<u64> {
        // Under the lock, so that later writes follow the request.
        let _sending = self.lock();
        let posted = self.posted();
        if posted > self.landed() {
            self.send_all([header.as_bytes(), &[], &[]], false)?;
        }
        Ok(posted)
    }

    /// Send all of `parts`; `more` says that more data follows at once.
    fn send_all(&self, parts: [&[u8]; 3], more: bool) -> io::Result<()> {
        let flags = SendFlags::NOSIGNAL | if more { SendFlags::MORE } else { SendFlags::empty() };
        let mut slices = parts.map(IoSlice::new);
        let mut left = &mut slices[..];
        // Skip empty slices at the front.
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
    /// The connection's.
    Socket(io::Error),
    /// Guest memory's.
    Memory(io::Error),
    /// Of a system call that uses both.
    Either(io::Error),
}

/// Keepalive interval in seconds.
const KEEPALIVE: u32 = 5;

/// Detect a dead peer: by keepalive while idle, by a limit on unacknowledged data otherwise.
pub(super) fn set_options(stream: &TcpStream, stall_timeout: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(stall_timeout.min(SLICE)))?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(KEEPALIVE.into()))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(KEEPALIVE.into()))?;
    // Effective after `be_patient`. The kernel allows no more than 127 (MAX_TCP_KEEPCNT).
    let probes = stall_timeout.as_secs().div_ceil(KEEPALIVE.into()).clamp(12, 127);
    sockopt::set_tcp_keepcnt(stream, probes as u32)?;
    // Limits unacknowledged data, and overrides the keepalive count.
    let milliseconds = u32::try_from(stall_timeout.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(stream, milliseconds)?;
    Ok(())
}
