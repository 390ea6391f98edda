//! Connects to a peer, by one connection or several.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use super::{Tcp, connection::TcpConnection, frame, listener::TcpFabricListener};
use crate::{
    address::Address,
    fabric::{
        Connection, Fabric, FabricError, Listener, Result,
        connection_group::{Kind, Trailer},
        resolve,
    },
    patience::{Patience, SLICE},
};

impl Fabric for Tcp {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn listen(&self, address: &Address) -> Result<Box<dyn Listener>> {
        Ok(Box::new(TcpFabricListener::bind(address, self.clone())?))
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
        Ok((reply, Box::new(TcpConnection::new(stream, others, self.stall_timeout)?)))
    }
}

/// Exchange hellos with the peer.
fn greet(stream: &TcpStream, private_data: &[u8], patience: &mut Patience) -> io::Result<Vec<u8>> {
    frame::write_hello(stream, private_data)?;
    frame::read_hello(stream, patience)
}

/// Connect in the time that is left. Time during which this process was stopped does not count: it
/// tries again.
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

/// Make a further connection to the address of the first.
fn connect_further(
    peer: SocketAddr,
    hello: &[u8],
    patience: &mut Patience,
) -> io::Result<TcpStream> {
    let stream = connect_in(peer, patience)?;
    greet(&stream, hello, patience)?;
    Ok(stream)
}

/// Connect to the first address of `address` that answers, and return which.
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
