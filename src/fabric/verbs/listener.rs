//! Waiting for peers.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rdma_sys::rdma_cm_event_type as kind;
use rustix::{
    event::{EventfdFlags, eventfd},
    fd::{AsFd as _, OwnedFd},
};
use tracing::{debug, info};

use super::{
    Verbs,
    cm::{Event, EventChannel, Id},
    connection::VerbsConnection,
    route::no_device,
};
use crate::{
    fabric::{Connection, FabricError, Handle, Listener, Request, Result, resolve},
    migration::messages::Address,
};

/// How long a peer may take from the acceptance to the established connection.
const ESTABLISHING: Duration = Duration::from_secs(5);

/// A listening identifier.
pub(super) struct VerbsListener {
    address: Address,
    fabric: Verbs,
    id: Id,
    stop: Arc<Stop>,
}

/// Ends a blocked accept.
struct Stop {
    closed: AtomicBool,
    wake: OwnedFd,
}

impl VerbsListener {
    pub(super) fn bind(address: &Address, fabric: Verbs) -> Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| FabricError::Host { call: "eventfd", source: errno.into() })?;
        let mut last = None;
        for candidate in resolve(address)? {
            match listen(candidate) {
                Ok(id) => {
                    let address = Address { port: id.port(), ..address.clone() };
                    let stop = Arc::new(Stop { closed: AtomicBool::new(false), wake });
                    return Ok(Self { address, fabric, id, stop });
                }
                Err(error) => last = Some(error),
            }
        }
        Err(match last {
            Some(FabricError::Host { source, .. })
                if source.raw_os_error() == Some(libc::ENODEV) =>
            {
                no_device(address, &source)
            }
            Some(FabricError::Host { source, .. }) => {
                FabricError::Listen { address: address.clone(), source }
            }
            Some(other) => other,
            None => FabricError::Closed,
        })
    }
}

fn listen(candidate: SocketAddr) -> Result<Id> {
    let id = Id::new(&EventChannel::new()?)?;
    id.listen(candidate)?;
    Ok(id)
}

impl Listener for VerbsListener {
    fn address(&self) -> &Address {
        &self.address
    }

    fn accept(&mut self) -> Result<Box<dyn Request>> {
        loop {
            if self.stop.closed.load(Ordering::SeqCst) {
                return Err(FabricError::Closed);
            }
            let event = self.id.channel().wait(Some(self.stop.wake.as_fd()), None)?;
            let Some(Event { request: Some(id), private_data, .. }) = event else {
                debug!(kind = event.map(|event| event.kind), "an event of a listener");
                continue;
            };
            let own = EventChannel::new().and_then(|channel| id.migrate(&channel));
            match own {
                Ok(id) => {
                    let fabric = self.fabric.clone();
                    return Ok(Box::new(VerbsRequest { id: Some(id), private_data, fabric }));
                }
                Err(error) => info!(%error, "a peer could not be served"),
            }
        }
    }

    fn handle(&self) -> Handle {
        let stop = self.stop.clone();
        Handle::new(move || {
            stop.closed.store(true, Ordering::SeqCst);
            // It fails only when the counter is at its end, and then it is readable all the more.
            let _ = rustix::io::write(&stop.wake, &1_u64.to_ne_bytes());
        })
    }
}

/// A peer that asks to connect.
struct VerbsRequest {
    /// Until it is let in.
    id: Option<Id>,
    private_data: Vec<u8>,
    fabric: Verbs,
}

impl Request for VerbsRequest {
    fn private_data(&self) -> &[u8] {
        &self.private_data
    }

    fn peer(&self) -> String {
        self.id.as_ref().and_then(Id::peer).map_or_else(|| "?".into(), |peer| peer.to_string())
    }

    fn accept(mut self: Box<Self>, private_data: &[u8]) -> Result<Box<dyn Connection>> {
        let id = self.id.take().ok_or(FabricError::Closed)?;
        id.set_peer_timeout(self.fabric.timeouts.acknowledgement())?;
        let connection = VerbsConnection::new(id, self.fabric.window, self.fabric.timeouts)?;
        connection.id().accept(private_data)?;
        let deadline = Instant::now() + ESTABLISHING;
        match connection.id().channel().wait(None, Some(deadline))? {
            Some(event) if event.kind == kind::RDMA_CM_EVENT_ESTABLISHED => {
                Ok(Box::new(connection))
            }
            _ => Err(FabricError::Closed),
        }
    }
}

impl Drop for VerbsRequest {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            id.reject();
        }
    }
}
