//! What would stop a migration over tcp, found without connecting.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
};

use crate::{
    address::Address,
    fabric::{FabricError, Finding, Result, resolve},
};

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
