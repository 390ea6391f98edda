//! The worker of one migration: stream, memory and fabric, in a process that may crash.
//!
//! The state machine of this side ([`proto`](crate::proto)) makes all decisions. One thread drives
//! it (`drive`) and never blocks on the peer, QEMU or the relay: other threads do what may. Data
//! threads handle QEMU's stream and the peer's messages, and send events, above all when they end
//! (`threads`). The relay speaks QMP, and passes on what QEMU and the client said, in
//! [`control`](crate::control).

mod block;
mod destination;
mod drive;
mod handshake;
#[cfg(test)]
mod idle_link;
mod link;
pub mod process;
pub(crate) mod qemu_sockets;
pub mod relay_socket;
pub(crate) mod return_path;
mod source;
mod statistics;
