//! Finds the device and the route to an address.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use rdma_sys::rdma_cm_event_type as kind;

use super::{
    cm::{Event, EventChannel, Id},
    preflight::probe,
};
use crate::{
    address::Address,
    fabric::{self, FabricError, Result},
};

/// Resolve `candidate`, one of the addresses of `address`, and the route to it.
///
/// # Errors
/// If there is no route, or it is not found before `deadline`.
pub(super) fn resolve(address: &Address, candidate: SocketAddr, deadline: Instant) -> Result<Id> {
    let id = Id::new(&EventChannel::new()?)?;
    let left = || deadline.saturating_duration_since(Instant::now());
    let failed = |error| match error {
        FabricError::Host { source, .. } => no_route(address, source),
        other => other,
    };
    id.resolve_address(candidate, left()).map_err(failed)?;
    expect(&id, kind::RDMA_CM_EVENT_ADDR_RESOLVED, address, deadline)?;
    id.resolve_route(left()).map_err(failed)?;
    expect(&id, kind::RDMA_CM_EVENT_ROUTE_RESOLVED, address, deadline)?;
    Ok(id)
}

/// Wait for event `wanted`; any other one is an error.
pub(super) fn expect(
    id: &Id,
    wanted: kind::Type,
    address: &Address,
    deadline: Instant,
) -> Result<Event> {
    let failed = |error: io::ErrorKind| {
        Err(FabricError::Connect { address: address.clone(), source: error.into() })
    };
    let Some(event) = id.channel().wait(None, Some(deadline))? else {
        return failed(io::ErrorKind::TimedOut);
    };
    match event.kind {
        kind if kind == wanted => Ok(event),
        kind::RDMA_CM_EVENT_ADDR_ERROR | kind::RDMA_CM_EVENT_ROUTE_ERROR => {
            Err(no_route(address, io::Error::from_raw_os_error(event.status.abs())))
        }
        kind::RDMA_CM_EVENT_REJECTED => failed(io::ErrorKind::ConnectionRefused),
        kind::RDMA_CM_EVENT_UNREACHABLE => failed(io::ErrorKind::HostUnreachable),
        _ => failed(io::ErrorKind::ConnectionAborted),
    }
}

/// There is no route, or none over an RDMA device.
fn no_route(address: &Address, source: io::Error) -> FabricError {
    if source.raw_os_error() == Some(libc::ENODEV) {
        no_device(address, &source)
    } else {
        FabricError::NoRoute { address: address.clone(), source }
    }
}

/// No RDMA device leads to the address.
pub(super) fn no_device(address: &Address, source: &io::Error) -> FabricError {
    FabricError::Unavailable(format!(
        "no RDMA device leads to {address} ({source}); use an address in the network of a device's \
         interface ('rdma link' names it, 'ip route get' the one that is used now)"
    ))
}

/// A route to an address.
#[derive(Debug)]
pub(super) struct Route {
    /// Name of the device.
    pub(super) device: String,
    /// Port of the device, from 1.
    pub(super) port: u8,
    /// Local address.
    pub(super) from: Option<SocketAddr>,
    /// The address belongs to this host.
    pub(super) is_own: bool,
}

/// Find the route to `address`, without connecting. `None` if it stands for every address of this
/// host.
///
/// # Errors
/// If there is no route, or it is not found within `limit`.
pub(super) fn find(address: &Address, limit: Duration) -> Result<Option<Route>> {
    let deadline = Instant::now() + limit;
    let mut last = None;
    for candidate in fabric::resolve(address)? {
        if candidate.ip().is_unspecified() {
            return Ok(None);
        }
        match resolve(address, candidate, deadline) {
            Ok(id) => {
                let from = id.local();
                return Ok(Some(Route {
                    device: probe::name(id.library(), id.context()?),
                    port: id.device_port(),
                    from,
                    is_own: from.is_some_and(|from| from.ip() == candidate.ip()),
                }));
            }
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or(FabricError::Closed))
}
