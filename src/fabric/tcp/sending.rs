//! The sending half.

use std::{net::Shutdown, ops::Range, sync::Arc};

use super::{
    frame::{self, Header},
    shared::{Shared, of_memory},
    socket::{Socket, WriteError},
};
use crate::{
    fabric::{Pinned, RemoteKey, Result, SendHalf},
    memory::Region,
};

pub(super) struct TcpSendHalf {
    pub(super) shared: Arc<Shared>,
}

/// The header of a write of `length` bytes to `offset` of the region that `remote` names.
fn write_header(offset: u64, length: u64, remote: RemoteKey) -> Header {
    Header::new(frame::WRITE, remote.rkey, remote.address.wrapping_add(offset), length)
}

impl SendHalf for TcpSendHalf {
    fn send(&self, header: &[u8], payload: &[u8]) -> Result<()> {
        let length = (header.len() + payload.len()) as u64;
        let frame = Header::new(frame::SEND, 0, 0, length);
        let sent = self.shared.sockets[0].send(frame, [header, payload]);
        sent.map_err(|error| self.shared.failure(error))
    }

    fn send_after_writes(&self, header: &[u8], payload: &[u8]) -> Result<()> {
        // The peer has confirmed to `drain` what has landed.
        self.send(header, payload)
    }

    fn orders_writes(&self) -> bool {
        true
    }

    fn write(
        &self,
        region: &Arc<Region>,
        offset: u64,
        length: u64,
        remote: RemoteKey,
    ) -> Result<()> {
        let shared = &*self.shared;
        shared.take_place(length)?;
        let header = write_header(offset, length, remote);
        shared.socket(offset).write(header, region, offset).map_err(|error| match error {
            WriteError::Socket(error) => shared.failure(error),
            WriteError::Memory(error) => of_memory(region, error),
            WriteError::Either(error) => shared.failure_at(region, error),
        })
    }

    fn write_bytes(&self, bytes: &[u8], offset: u64, remote: RemoteKey) -> Result<()> {
        let shared = &*self.shared;
        let length = bytes.len() as u64;
        shared.take_place(length)?;
        let sent = shared.socket(offset).write_bytes(write_header(offset, length, remote), bytes);
        sent.map_err(|error| shared.failure(error))
    }

    fn pin(&self, _region: &Arc<Region>, _range: Range<u64>) -> Result<()> {
        Ok(())
    }

    fn unpin(&self, _region: &Arc<Region>, _range: Range<u64>) {}

    fn pinned(&self) -> Pinned {
        Pinned::default()
    }

    fn drain(&self) -> Result<()> {
        let shared = &*self.shared;
        let flush = |socket: &Socket| {
            let posted = socket.flush(Header::new(frame::FLUSH, 0, 0, 0));
            posted.map_err(|error| shared.failure(error))
        };
        let posted = shared.sockets.iter().map(flush).collect::<Result<Vec<_>>>()?;
        shared.wait_until(|_| {
            shared.sockets.iter().zip(&posted).all(|(socket, posted)| socket.landed() >= *posted)
        })
    }

    fn be_patient(&self) {
        self.shared.sockets.iter().for_each(Socket::be_patient);
    }

    fn finish(&self) {
        // Closing a socket with unread bytes resets the connection and may lose sent data, so let
        // the peer close first. The shutdown fails only if it has.
        if self.shared.sockets[0].stream.shutdown(Shutdown::Write).is_ok() {
            self.shared.await_end();
        }
    }

    fn connections(&self) -> u32 {
        self.shared.sockets.len() as u32
    }

    fn posted(&self) -> u64 {
        self.shared.posted()
    }

    fn landed(&self) -> u64 {
        self.shared.landed()
    }
}
