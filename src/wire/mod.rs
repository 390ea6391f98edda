//! QEMU's "RDMA Live Migration Specification, Version 1", and what two helpers add to it.
//!
//! Messages, credits and the RAM-block exchange, as values and state machines without I/O. Knows
//! neither fabrics nor files. All numbers on the wire are big endian, and everything received is
//! untrusted until checked here. The layout is in `docs/protocol.md`; the sources are QEMU's
//! `docs/rdma.txt` and `migration/rdma.c` (the same from 7.2 to 10.0).

pub mod blocks;
pub mod credit;
mod error;
mod message;
mod private_data;
#[cfg(test)]
mod tests;

pub use error::WireError;
pub use message::{
    Compress, HEADER_SIZE, ListedBlock, MESSAGE_MAX, Message, PAYLOAD_MAX, REQUESTS_MAX,
    RamBlockEntry, Register, RegisterResult, TEXT_MAX,
};
pub use private_data::{Extension, PrivateData, VERSION};
