//! The worker of one migration: stream, memory and fabric in a process that may die.
//!
//! Owns the threads of a migration. What is decided is decided in [`proto`](crate::proto), by the state
//! machine of this side, which one thread drives (`drive`); data threads take QEMU's stream and the
//! peer's messages, and tell it what happens, their own end above all (`threads`). That thread itself waits for
//! nobody but them: what may take the peer, QEMU or the relay its time is theirs to do. Knows nothing of
//! QMP: the relay says what QEMU and the client said, in [`control`](crate::control).

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
