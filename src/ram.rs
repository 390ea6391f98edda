//! What a guest's RAM is made of, for all who deal with it: pages, chunks, blocks, ranges.

/// The target's page size: 4 KiB on x86.
pub const PAGE: u64 = 4096;

/// A huge page, in bytes (`PMD_SIZE`).
pub const HUGE_PAGE: u64 = 2 << 20;

/// Bytes of a chunk, counted from its block's start (RDMA_REG_CHUNK_SHIFT 20). Ranges are whole
/// chunks, save at the block's end, and no write crosses into another chunk. Those that stock QEMUs
/// register may be larger since 11.1 (`x-rdma-chunk-size`).
pub const CHUNK: u64 = 1 << 20;

/// The largest of those.
pub const CHUNK_MAX: u64 = 1 << 30;

/// Largest range in bytes, if memory is no object. Beyond, the cost of a registration no longer
/// counts.
pub const RANGE_MAX: u64 = 64 << 20;

/// Most RAM blocks of a guest: what one RAM_BLOCKS_RESULT can name (`wire`).
pub const BLOCKS_MAX: usize = 16383;

/// QEMU resizes some of its ROMs when it loads a guest. None is nearly as long as this, in bytes:
/// what is longer is the guest's memory.
pub const ROM_MAX: u64 = 64 << 20;

/// How a RAM block's pages are transferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// Written to the destination's memory from the shared mapping; their records are taken out.
    Direct,
    /// Written to the destination's memory from their records, which are taken out.
    Copied,
    /// As records in the stream.
    Inline,
}

/// A range of a RAM block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRange {
    /// Index in the stream's block list.
    pub block: u32,
    /// Offset in the block in bytes.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}
