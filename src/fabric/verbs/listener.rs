//! The listener.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
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
    connection::Opening,
    route::no_device,
};
use crate::{
    address::Address,
    fabric::{
        Connection, FabricError, Handle, Listener, Request, Result,
        connection_group::{
            ConnectionGroup, ConnectionGroups, ESTABLISHING, Kind, Opened, Trailer,
        },
        resolve,
    },
    refusals::Refusals,
};

/// A listening identifier.
pub(super) struct VerbsListener {
    address: Address,
    fabric: Verbs,
    id: Id,
    stop: Arc<Stop>,
    sessions: Arc<ConnectionGroups<Id>>,
    refused: Refusals,
}

/// Ends a blocked accept.
struct Stop {
    closed: AtomicBool,
    wake: OwnedFd,
}

impl Stop {
    fn new() -> Result<Arc<Self>> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| FabricError::Host { call: "eventfd", source: errno.into() })?;
        Ok(Arc::new(Self { closed: AtomicBool::new(false), wake }))
    }

    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        // Fails only if the counter is at its maximum, and then the descriptor is readable anyway.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

impl VerbsListener {
    pub(super) fn bind(address: &Address, fabric: Verbs) -> Result<Self> {
        let stop = Stop::new()?;
        let mut last = None;
        for candidate in resolve(address)? {
            match listen(candidate) {
                Ok(id) => {
                    let address = Address { port: id.port(), ..address.clone() };
                    let (sessions, refused) = (Arc::default(), Refusals::default());
                    return Ok(Self { address, fabric, id, stop, sessions, refused });
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
            let own = own.and_then(|id| Ok((id, Stop::new()?)));
            let trailer = Trailer::find(Kind::QueuePairs, &private_data);
            match (own, trailer) {
                (Ok((id, _)), Some(trailer)) if trailer.lane.get() > 0 => {
                    // Dropping an identifier notifies its peer.
                    if !self.sessions.add(&trailer, id) {
                        self.refused.say(|left_out| {
                            info!(left_out, "rejected a queue pair: it belongs to no session");
                        });
                    }
                }
                (Ok((id, stop)), _) => {
                    let (fabric, sessions) = (self.fabric.clone(), self.sessions.clone());
                    let lanes = trailer.map_or(0, |trailer| trailer.lanes.get());
                    let lanes = lanes.min(self.fabric.lanes);
                    return Ok(Box::new(VerbsRequest {
                        id: Some(id),
                        private_data,
                        lanes,
                        fabric,
                        sessions,
                        opened: Opened::default(),
                        stop,
                    }));
                }
                (Err(error), _) => self.refused.say(|left_out| {
                    info!(%error, left_out, "a peer could not be served");
                }),
            }
        }
    }

    fn handle(&self) -> Handle {
        let stop = self.stop.clone();
        Handle::new(move || stop.close())
    }
}

/// A peer that asks to connect.
struct VerbsRequest {
    /// `None` once accepted.
    id: Option<Id>,
    private_data: Vec<u8>,
    /// Further queue pairs granted to it.
    lanes: u16,
    fabric: Verbs,
    sessions: Arc<ConnectionGroups<Id>>,
    opened: Opened,
    stop: Arc<Stop>,
}

impl Request for VerbsRequest {
    fn private_data(&self) -> &[u8] {
        &self.private_data
    }

    fn peer(&self) -> SocketAddr {
        // A device without IP has no peer address.
        let nobody = (Ipv4Addr::UNSPECIFIED, 0).into();
        self.id.as_ref().and_then(Id::peer).unwrap_or(nobody)
    }

    fn handle(&self) -> Handle {
        let (stop, opened, sessions) =
            (self.stop.clone(), self.opened.clone(), self.sessions.clone());
        Handle::new(move || {
            stop.close();
            opened.close(&sessions);
        })
    }

    fn accept(mut self: Box<Self>, private_data: &[u8]) -> Result<Box<dyn Connection>> {
        let id = self.id.take().ok_or(FabricError::Closed)?;
        id.set_peer_timeout(self.fabric.timeouts.acknowledgement())?;
        let mut opening = Opening::new(id, self.fabric.window, self.lanes)?;
        if self.lanes == 0 {
            let deadline = Instant::now() + ESTABLISHING;
            establish(opening.id(), private_data, deadline, &self.stop)?;
        } else {
            let session = self.sessions.open(self.lanes);
            self.opened.set(&session);
            let reply = Trailer::new(Kind::QueuePairs, self.lanes, 0, session.number())
                .append(private_data)?;
            establish(opening.id(), &reply, session.deadline(), &self.stop)?;
            self.take_lanes(&mut opening, &session)?;
        }
        Ok(Box::new(opening.finish(self.fabric.timeouts)?))
    }
}

/// Accept, and wait until the connection is established.
fn establish(id: &Id, private_data: &[u8], deadline: Instant, stop: &Stop) -> Result<()> {
    id.accept(private_data)?;
    match id.channel().wait(Some(stop.wake.as_fd()), Some(deadline))? {
        Some(event) if event.kind == kind::RDMA_CM_EVENT_ESTABLISHED => Ok(()),
        _ => Err(FabricError::Closed),
    }
}

impl VerbsRequest {
    /// Accept the peer's further queue pairs, one after the other.
    fn take_lanes(&self, opening: &mut Opening, session: &ConnectionGroup<Id>) -> Result<()> {
        for lane in 1..=self.lanes {
            let id = session.next(lane)?;
            id.set_peer_timeout(self.fabric.timeouts.acknowledgement())?;
            establish(opening.add_lane(id)?, &[], session.deadline(), &self.stop)?;
        }
        Ok(())
    }
}

impl Drop for VerbsRequest {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            id.reject();
        }
    }
}
