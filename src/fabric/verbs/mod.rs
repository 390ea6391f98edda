//! RDMA: libibverbs and librdmacm.
//!
//! A reliable connected queue pair carries control messages as SEND and guest RAM as RDMA WRITE,
//! straight from and into the guests' memory. Owns every call of the libraries, and with
//! `memory/` the only `unsafe` of the project. Knows nothing of what messages mean.
#![allow(unsafe_code)]

mod buffers;
mod cm;
mod completion_queue;
mod connecting;
mod connection;
mod device;
mod library;
mod listener;
mod marks;
mod memory_region;
pub mod preflight;
mod protection_domain;
mod queue_pair;
mod recv_buffers;
mod route;
mod sending;
mod staging_ring;
mod timeouts;

pub use timeouts::Timeouts;

use cm::EventChannel;

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
