//! Connects to a peer, by one queue pair or several.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use rdma_sys::rdma_cm_event_type as kind;

use super::{
    Verbs, cm::Id, connection::Opening, listener::VerbsListener, preflight::memlock, route,
};
use crate::{
    address::Address,
    fabric::{
        Connection, Fabric, FabricError, Listener, Result,
        connection_group::{Kind, Trailer},
        resolve,
    },
};

impl Fabric for Verbs {
    fn name(&self) -> &'static str {
        "verbs"
    }

    fn listen(&self, address: &Address) -> Result<Box<dyn Listener>> {
        memlock::suffices_for_messages(self.window)?;
        Ok(Box::new(VerbsListener::bind(address, self.clone())?))
    }

    fn connect(
        &self,
        address: &Address,
        private_data: &[u8],
        timeout: Duration,
    ) -> Result<(Vec<u8>, Box<dyn Connection>)> {
        let deadline = Instant::now() + timeout;
        let mut last = FabricError::Connect {
            address: address.clone(),
            source: io::ErrorKind::TimedOut.into(),
        };
        for candidate in resolve(address)? {
            match self.connect_to(address, candidate, private_data, deadline) {
                Ok(connected) => return Ok(connected),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

impl Verbs {
    fn connect_to(
        &self,
        address: &Address,
        candidate: SocketAddr,
        private_data: &[u8],
        deadline: Instant,
    ) -> Result<(Vec<u8>, Box<dyn Connection>)> {
        let route = || self.route(address, candidate, deadline);
        let establish = |id: &Id, trailer: Trailer| {
            id.connect(&trailer.append(private_data)?)?;
            route::expect(id, kind::RDMA_CM_EVENT_ESTABLISHED, address, deadline)
        };
        let mut opening = Opening::new(route()?, self.window, self.lanes)?;
        let reply =
            establish(opening.id(), Trailer::new(Kind::QueuePairs, self.lanes, 0, 0))?.private_data;
        if let Some(granted) = Trailer::find(Kind::QueuePairs, &reply) {
            for lane in 1..=granted.lanes.get().min(self.lanes) {
                let trailer = Trailer::new(Kind::QueuePairs, 0, lane, granted.session.get());
                establish(opening.add_lane(route()?)?, trailer)?;
            }
        }
        Ok((reply, Box::new(opening.finish(self.timeouts)?)))
    }

    /// Create an identifier with a device and a route to the peer.
    fn route(&self, address: &Address, candidate: SocketAddr, deadline: Instant) -> Result<Id> {
        let id = route::resolve(address, candidate, deadline)?;
        id.set_peer_timeout(self.timeouts.acknowledgement())?;
        Ok(id)
    }
}
