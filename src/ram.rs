//! What a guest's RAM consists of: pages, chunks, blocks, ranges.

/// The target's page size: 4 KiB on x86.
pub const PAGE: u64 = 4096;

/// Size of a huge page in bytes (`PMD_SIZE`).
pub const HUGE_PAGE: u64 = 2 << 20;

/// Size of a chunk in bytes, counted from its block's start (RDMA_REG_CHUNK_SHIFT 20). Ranges are
/// whole chunks, except at the block's end, and no write crosses into another chunk. From 11.1 on,
/// stock QEMU may register larger chunks (`x-rdma-chunk-size`).
pub const CHUNK: u64 = 1 << 20;

/// Largest chunk that stock QEMU may register, in bytes.
pub const CHUNK_MAX: u64 = 1 << 30;

/// Largest range in bytes, if the pin limit allows it. Beyond this size the cost of a registration
/// no longer matters.
pub const RANGE_MAX: u64 = 64 << 20;

/// Most RAM blocks of a guest: as many as fit into one RAM_BLOCKS_RESULT (`wire`).
pub const BLOCKS_MAX: usize = 16383;

/// Longer than any ROM by far, in bytes: a longer block is guest memory. QEMU resizes some of its
/// ROMs when it loads a guest.
pub const ROM_MAX: u64 = 64 << 20;

/// How a RAM block's pages are transferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// Written to the destination's memory from the shared mapping; their records are removed.
    Direct,
    /// Written to the destination's memory from their records, which are removed.
    Copied,
    /// Sent as records in the stream.
    Inline,
}

/// A range of a RAM block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRange {
    /// Index in the stream's block list.
    pub block: u32,
    /// Offset in the block in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}
