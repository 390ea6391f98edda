//! Checks for migrations over tcp. They do not connect.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
};

use crate::{
    address::Address,
    fabric::{FabricError, Finding, Result, resolve},
};

/// Check for a route to `address`, without connecting. An address of this host passes too.
pub fn preflight(address: &Address) -> Finding {
    match route(address) {
        Ok(from) => Finding::good(format!("Route to {address}: from {from}")),
        Err(error) => Finding::error(&error),
    }
}

/// The local address of a route to `address`.
fn route(address: &Address) -> Result<IpAddr> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for candidate in resolve(address)? {
        // Connecting a datagram socket sends nothing: the kernel only looks up the route.
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
