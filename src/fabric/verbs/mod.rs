//! RDMA: libibverbs and librdmacm.
//!
//! A reliable connected queue pair carries control messages as SEND and guest RAM as RDMA WRITE,
//! straight from and into the guests' memory. Owns every call of the libraries, and with
//! `memory/` the only `unsafe` of the project. Knows nothing of what messages mean.
#![allow(unsafe_code)]

mod buffers;
mod cm;
mod connection;
mod device;
mod library;
mod listener;
mod marks;
mod objects;
pub mod preflight;
mod queue_pair;
mod received;
mod ring;
mod route;
mod sending;
mod timeouts;

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use rdma_sys::rdma_cm_event_type as kind;

pub use timeouts::Timeouts;

use self::{
    cm::{EventChannel, Id},
    connection::Opening,
};
use super::{
    Connection, Fabric, FabricError, Listener, Result,
    connection_group::{Kind, Trailer},
    resolve,
};
use crate::address::Address;

/// The `verbs` fabric.
#[derive(Debug, Clone)]
pub struct Verbs {
    /// Time limits.
    pub timeouts: Timeouts,
    /// Control messages that each side has buffers for, beside those that need no credit.
    pub window: u16,
    /// Queue pairs for RAM beside the first one, where the peer has them too. With 0 RAM goes
    /// through that one, as with a stock QEMU.
    pub lanes: u16,
}

/// Load the libraries, and the devices' drivers with them. Who needs them gets to know if it fails.
pub fn prepare() {
    drop(EventChannel::new());
}

impl Fabric for Verbs {
    fn name(&self) -> &'static str {
        "verbs"
    }

    fn listen(&self, address: &Address) -> Result<Box<dyn Listener>> {
        preflight::memlock::suffices_for_messages(self.window)?;
        Ok(Box::new(listener::VerbsListener::bind(address, self.clone())?))
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

    /// An identifier with a device and a route to the peer.
    fn route(&self, address: &Address, candidate: SocketAddr, deadline: Instant) -> Result<Id> {
        let id = route::resolve(address, candidate, deadline)?;
        id.set_peer_timeout(self.timeouts.acknowledgement())?;
        Ok(id)
    }
}
