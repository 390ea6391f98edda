//! The operations of a queue pair, framed over TCP connections: for hosts without an RDMA device.
//!
//! Short writes are copied, others leave by `sendfile` and are spliced into the destination's RAM.
//! Frames are `docs/protocol.md`'s: a 24-byte header, then the payload. The peer is not
//! authenticated and nothing is encrypted, as with RDMA itself.

mod connection;
mod frame;
mod listener;
mod receiving;
mod sending;
mod shared;
mod socket;
#[cfg(test)]
mod tests;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use rustix::net::sockopt;

use super::{
    Connection, Fabric, FabricError, Finding, Listener, Result,
    connection_group::{Kind, Trailer},
    resolve,
};
use crate::{
    address::Address,
    patience::{Patience, SLICE},
};

/// The `tcp` fabric.
#[derive(Debug, Clone)]
pub struct Tcp {
    /// How long a transfer that is due may make no progress.
    pub stall_timeout: Duration,
    /// Connections of a link, if the peer has as many.
    pub connections: u16,
}

impl Fabric for Tcp {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn listen(&self, address: &Address) -> Result<Box<dyn Listener>> {
        Ok(Box::new(listener::TcpFabricListener::bind(address, self.clone())?))
    }

    fn connect(
        &self,
        address: &Address,
        private_data: &[u8],
        timeout: Duration,
    ) -> Result<(Vec<u8>, Box<dyn Connection>)> {
        let mut patience = Patience::new(timeout);
        let (stream, peer) = connect_any(address, &mut patience)?;
        let connect = |source| FabricError::Connect { address: address.clone(), source };
        let further = self.connections.saturating_sub(1);
        let hello = match further {
            0 => private_data.to_vec(),
            _ => Trailer::new(Kind::Connections, further, 0, 0).append(private_data)?,
        };
        let reply = greet(&stream, &hello, &mut patience).map_err(connect)?;
        let mut others = Vec::new();
        if let Some(granted) = Trailer::find(Kind::Connections, &reply) {
            for lane in 1..=granted.lanes.get().min(further) {
                let hello =
                    Trailer::new(Kind::Connections, 0, lane, granted.session.get()).append(&[])?;
                others.push(connect_further(peer, &hello, &mut patience).map_err(connect)?);
            }
        }
        Ok((reply, Box::new(connection::TcpConnection::new(stream, others, self.stall_timeout)?)))
    }
}

/// Send a greeting and receive the peer's.
fn greet(stream: &TcpStream, private_data: &[u8], patience: &mut Patience) -> io::Result<Vec<u8>> {
    frame::write_hello(stream, private_data)?;
    frame::read_hello(stream, patience)
}

/// Connect in what is left. A process that was stopped meanwhile has not waited: it tries again.
fn connect_in(peer: SocketAddr, patience: &mut Patience) -> io::Result<TcpStream> {
    loop {
        let (begun, left) = (Instant::now(), patience.left());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let connected = TcpStream::connect_timeout(&peer, left);
        let waited = begun.elapsed();
        let was_stopped = waited >= left + SLICE;
        patience.spend(if was_stopped { SLICE } else { waited });
        match connected {
            Err(error) if was_stopped && error.kind() == io::ErrorKind::TimedOut => {}
            connected => return connected,
        }
    }
}

/// Connect once more to where the first connection leads.
fn connect_further(
    peer: SocketAddr,
    hello: &[u8],
    patience: &mut Patience,
) -> io::Result<TcpStream> {
    let stream = connect_in(peer, patience)?;
    greet(&stream, hello, patience)?;
    Ok(stream)
}

/// Does a route lead to `address`, or is it this host's? Found without connecting.
pub fn preflight(address: &Address) -> Finding {
    match route(address) {
        Ok(from) => Finding::good(format!("Route to {address}: from {from}")),
        Err(error) => Finding::error(&error),
    }
}

/// The address at this end of a route to `address`.
fn route(address: &Address) -> Result<IpAddr> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for candidate in resolve(address)? {
        // Connecting a datagram socket sends nothing: the kernel looks for the route.
        let found = UdpSocket::bind((any(candidate), 0))
            .and_then(|socket| socket.connect(candidate).and_then(|()| socket.local_addr()));
        match found {
            Ok(from) => return Ok(from.ip()),
            Err(error) => last = error,
        }
    }
    Err(FabricError::NoRoute { address: address.clone(), source: last })
}

/// The unspecified address of the same family.
fn any(address: SocketAddr) -> IpAddr {
    match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Connect to the first address of `address` that answers; says which.
fn connect_any(address: &Address, patience: &mut Patience) -> Result<(TcpStream, SocketAddr)> {
    let mut last = io::Error::from(io::ErrorKind::TimedOut);
    for candidate in resolve(address)? {
        match connect_in(candidate, patience) {
            Ok(stream) => return Ok((stream, candidate)),
            Err(error) => last = error,
        }
    }
    Err(FabricError::Connect { address: address.clone(), source: last })
}

/// How often a peer that is silent is asked whether it is there, in seconds.
const KEEPALIVE: u32 = 5;

/// Make a dead peer noticed: keepalive while idle, a bound on unacknowledged data.
fn set_options(stream: &TcpStream, stall_timeout: Duration) -> io::Result<()> {
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
