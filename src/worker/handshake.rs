//! Shared part of the handshake: versions, and whether both sides have the same RAM blocks. The
//! halves are `source/handshake.rs` and `destination/handshake.rs`.

use std::time::Duration;

use super::block::Block;
use crate::{
    control::{FabricKind, Options},
    proto::error::{MigrationError, Result},
    wire::{Extension, ListedBlock, Message, PrivateData, credit::WINDOW},
};

/// How long each side waits for the peer's next step of the handshake.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// Return the blocks as entries of a block list.
pub fn listed(blocks: &[Block]) -> Vec<ListedBlock> {
    let listed = |block: &Block| ListedBlock { name: block.name.clone(), length: block.length };
    blocks.iter().map(listed).collect()
}

/// Return the extension that this side offers another helper.
pub fn ours(options: &Options) -> Extension {
    let mib = |bytes: u64| u32::try_from(bytes >> 20).unwrap_or(u32::MAX).max(1);
    Extension {
        version: Extension::VERSION,
        window: WINDOW,
        pin_limit: options.pin_limit.map_or(0, mib),
    }
}

/// Return the peer's extension; `None` for a stock QEMU, which speaks only RDMA.
pub fn extension(private_data: &PrivateData, options: &Options) -> Result<Option<Extension>> {
    match private_data.extension {
        Some(extension) => Ok(Some(extension)),
        None if options.fabric == FabricKind::Verbs => Ok(None),
        None => Err(no_helper()),
    }
}

fn no_helper() -> MigrationError {
    MigrationError::Incompatible(
        "The peer is not a helper (it lacks the protocol's extension); start \
         'qemu-rdma-helper attach' beside its QEMU"
            .into(),
    )
}

/// Check that the pin limit holds a chunk: a stock destination registers memory by chunks, and so
/// does this end.
pub fn check_chunk(options: &Options) -> Result<()> {
    match options.pin_limit {
        Some(limit) if !options.pin_all && limit < options.chunk_size => {
            Err(MigrationError::Incompatible(format!(
                "Parameter x-rdma-chunk-size lets a stock QEMU pin {} MiB at a time, and --pin-limit \
                 allows {} MiB; raise it, or set the parameter to less at both ends",
                options.chunk_size >> 20,
                limit >> 20
            )))
        }
        _ => Ok(()),
    }
}

/// Check that the limit holds all blocks that are written, if pin-all pins them.
pub fn check_limit(
    blocks: &[Block],
    pin_all: bool,
    limit: Option<u64>,
    options: &Options,
) -> Result<()> {
    let Some(limit) = limit.filter(|_| pin_all && options.fabric == FabricKind::Verbs) else {
        return Ok(());
    };
    let written = blocks.iter().filter_map(|block| block.region.as_ref());
    let total: u64 = written.map(|region| region.length()).sum();
    if total <= limit {
        return Ok(());
    }
    Err(MigrationError::Incompatible(format!(
        "rdma-pin-all pins {} MiB of guest RAM and --pin-limit allows {} MiB; raise it, or turn \
         rdma-pin-all off",
        total.div_ceil(1 << 20),
        limit >> 20
    )))
}

/// Return the error for a message that is out of turn.
pub fn unexpected(message: &Message<'_>, wanted: &str) -> MigrationError {
    MigrationError::Peer(format!("{} where {wanted} belongs", message.name()))
}
