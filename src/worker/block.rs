//! The attached QEMU's RAM blocks, as a worker has them.

use std::sync::Arc;

use crate::memory::Region;

/// One of the attached QEMU's RAM blocks.
pub struct Block {
    /// QEMU's idstr.
    pub name: String,
    /// Used length in bytes.
    pub length: u64,
    /// The block's memory; `None` if its pages stay in the stream.
    pub region: Option<Arc<Region>>,
    /// Whether QEMU reads all of the block in a migration.
    pub read_whole: bool,
}
