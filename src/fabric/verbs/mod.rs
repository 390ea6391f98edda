//! RDMA: libibverbs and librdmacm.
//!
//! A reliable connected queue pair carries control messages as SEND and guest RAM as RDMA WRITE,
//! straight from and into the guests' memory. Owns every call of the libraries, and with
//! `memory/` the only `unsafe` of the project. Knows nothing of what messages mean.
#![allow(unsafe_code)]

mod buffers;
mod cm;
mod connection;
mod judging;
mod library;
mod listener;
mod memlock;
mod needs;
mod objects;
mod ports;
pub mod preflight;
mod probe;
mod route;
mod sending;

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use rdma_sys::rdma_cm_event_type as kind;

use self::connection::VerbsConnection;
use super::{Connection, Fabric, FabricError, Listener, Result, resolve};
use crate::migration::messages::Address;

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// Without progress of a transfer that is due.
    pub stall: Duration,
    /// Without any sign of life of the peer's device.
    pub peer: Duration,
}

impl Timeouts {
    /// Silence after which the peer is asked for a sign of life.
    fn keep_alive(&self) -> Duration {
        self.peer / 5
    }

    /// What is left of `peer` for the transport's retries.
    fn acknowledgement(&self) -> Duration {
        self.peer - self.keep_alive()
    }
}

/// The `verbs` fabric.
#[derive(Debug, Clone)]
pub struct Verbs {
    /// Time limits.
    pub timeouts: Timeouts,
    /// Control messages that each side has buffers for, beside those that need no credit.
    pub window: u16,
}

impl Fabric for Verbs {
    fn name(&self) -> &'static str {
        "verbs"
    }

    fn listen(&self, address: &Address) -> Result<Box<dyn Listener>> {
        memlock::suffices_for_messages(self.window)?;
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
        let id = route::resolve(address, candidate, deadline)?;
        id.set_peer_timeout(self.timeouts.acknowledgement())?;
        let connection = VerbsConnection::new(id, self.window, self.timeouts)?;
        connection.id().connect(private_data)?;
        let established =
            route::expect(connection.id(), kind::RDMA_CM_EVENT_ESTABLISHED, address, deadline)?;
        Ok((established.private_data, Box::new(connection)))
    }
}
