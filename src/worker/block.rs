//! The attached QEMU's memory, as a worker has it.

use std::sync::Arc;

use crate::memory::Region;

/// One of the attached QEMU's RAM blocks.
pub struct Block {
    /// QEMU's idstr.
    pub name: String,
    /// Used length in bytes.
    pub length: u64,
    /// Its memory; `None` if its pages stay in the stream.
    pub region: Option<Arc<Region>>,
    /// QEMU reads all of it.
    pub read_whole: bool,
}
