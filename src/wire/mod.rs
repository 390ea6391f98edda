//! QEMU's "RDMA Live Migration Specification, Version 1", and what two helpers add to it.
//!
//! Messages, credits and the RAM-block exchange, as values and state machines without I/O. Knows
//! neither fabrics nor files. All numbers on the wire are big endian, and everything that comes
//! from it is hostile until checked here. The layout is in `docs/protocol.md`; the sources are
//! QEMU's `docs/rdma.txt` and `migration/rdma.c` (the same from 7.2 to 10.0).

pub mod blocks;
pub mod credit;
mod message;
mod private_data;
#[cfg(test)]
mod tests;

pub use message::{
    Compress, HEADER_SIZE, ListedBlock, Message, PAYLOAD_MAX, RamBlockEntry, Register,
    RegisterResult, TEXT_MAX,
};
pub use private_data::{Extension, PrivateData, VERSION};

/// Bytes of a control buffer, header included: the longest message (RDMA_CONTROL_MAX_BUFFER).
pub const MESSAGE_MAX: usize = 512 << 10;

const _: () = assert!(crate::ram::BLOCKS_MAX == PAYLOAD_MAX / 32);

/// Most requests in one REGISTER_REQUEST (RDMA_CONTROL_MAX_COMMANDS_PER_MESSAGE).
pub const REQUESTS_MAX: u32 = 4096;

/// What can be wrong with what a peer sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The bytes are no message.
    #[error("Malformed {what}: {why}")]
    Malformed {
        /// Which message.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A message that is well formed and out of turn, or names what does not exist.
    #[error("{0}")]
    Misbehaved(String),
    /// An honest peer with which no migration is possible.
    #[error("{0}")]
    Incompatible(String),
}

impl WireError {
    fn malformed(what: &'static str, why: impl Into<String>) -> Self {
        Self::Malformed { what, why: why.into() }
    }
}
