//! RDMA by libibverbs and librdmacm.
//!
//! A reliable connected queue pair carries control messages as SEND and guest RAM as RDMA WRITE,
//! directly between the guests' memories. This module makes all calls of the libraries; it and
//! `memory/` contain the only `unsafe` code of the project. It does not interpret messages.
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
    /// Control messages that each side has buffers for, besides those that need no credit.
    pub window: u16,
    /// Queue pairs for RAM besides the first one, if the peer supports them. With 0, RAM uses the
    /// first one, as with a stock QEMU.
    pub lanes: u16,
}

/// Load the libraries and the providers of the devices. An error is ignored: the first user gets it
/// again.
pub fn prepare() {
    drop(EventChannel::new());
}
